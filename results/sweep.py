"""Run many training runs, several processes per GPU, each run in one line of JSON.

    python results/sweep.py results/pretrain_60m/plan.py OUT --per_gpu=3 --seconds=500

A plan is a Python file with RUNS = {name: (config file, ["--key=value", ...])} and EVALUATE, data
folders to evaluate every model on too. PREPARE(name), if a plan has it, is a context (`with`) that
the run is in; a dict that it yields becomes a part of the run's line. SPECTRA = False leaves out
the singular values of what changed in the blocks, which take seconds a run. A run with a line in
sweep.jsonl, beside the plan, is done; one that failed has a line with "error". To run it again,
remove its line and start the sweep again.

A worker reads the plan before each run, so that RUNS may depend on sweep.jsonl and grow, and it
waits while a run of another worker may make it grow. No run starts that would end after --seconds.
A stopped sweep can be started again. Without PREPARE it continues runs from their checkpoints in
OUT/runs; the "seconds" of such a run are those of its last part. Logs: OUT/*.log.
"""
import contextlib
import json
import os
import runpy
import shutil
import statistics
import subprocess
import sys
import time
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])
import rates  # noqa: E402

LOOK_EVERY = 5  # seconds between two looks of a worker that waits


def claim(path):
    """Return whether this process is the first to claim a run; the file holds its process id."""
    try:
        with open(path, "x") as file:
            file.write(str(os.getpid()))
        return True
    except FileExistsError:
        return False


def is_running(path):
    """Return whether the process that claimed a run is alive."""
    try:
        os.kill(int(path.read_text()), 0)
    except ProcessLookupError:
        return False
    except (FileNotFoundError, ValueError):  # given back or not yet written: look again
        pass
    return True


def change_of(layer, first):
    """Return dW of a projection, float32, since its first weight: restarts' merges and update."""
    import torch

    import mora
    if layer.weight.dtype == torch.float8_e4m3fn:  # it takes no merge: the update is all of dW
        return mora.delta_of(layer.update, layer.weight.device, torch.float32)
    weight = layer.merged() if hasattr(layer, "merged") else layer.weight
    return weight - first.to(layer.weight)  # in the base's type, so that its rounding cancels


def measure_blocks(model, first):
    """Return the trainable share of the blocks' projections, the spectrum of their dW, a mean over
    all, and the spectra by kind (q_proj, ...).

    first: the model before training. Singular values come from the smaller Gram matrix, which is
    several times faster; they are exact to 1e-8 of the largest, and ranks count to 1e-3 of it.
    """
    import torch

    from analyze import mean_measures
    from model import block_linears
    before, layers, values = block_linears(first), block_linears(model), {}
    with torch.no_grad():
        for name, layer in layers.items():
            delta = change_of(layer, before[name].weight).double()
            delta = delta if len(delta) <= delta.shape[1] else delta.T
            squares = torch.linalg.eigvalsh(delta @ delta.T)
            values[name] = squares.flip(0).clamp(min=0).sqrt().cpu()
    trained = sum(p.numel() for layer in layers.values() for p in layer.parameters()
                  if p.requires_grad)
    total = sum(layer.weight.numel() for layer in layers.values())
    means = {kind: {key: float(f"{value:.4g}") for key, value in row.items()}
             for kind, row in mean_measures(values).items()}
    return {"trainable_block_fraction": round(trained / total, 4), "spectrum": means.pop("all"),
            "spectra": means}


def record(name, folder, extra):
    """Return the numbers of a finished run, from its log.jsonl, as a dict."""
    head, *lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    head["config"]["out"] = name  # not a path of the machine
    # of a resumed run the later line of a step counts
    steps = [*{line["step"]: line for line in lines if "loss" in line}.values()]
    scores = [*{line["step"]: line for line in lines if "val_ppl" in line}.values()]
    return {"name": name, "val_ppl": scores[-1]["val_ppl"], "val_loss": scores[-1]["val_loss"],
            "bits_per_byte": scores[-1]["val_bits_per_byte"], **extra,
            "tokens_per_s": statistics.median_high(line["tokens_per_s"] for line in steps),
            "losses": [[line["step"], round(line["loss"], 4)] for line in steps],
            "val_losses": [[line["step"], round(line["val_loss"], 4)] for line in scores],
            **{key: head[key] for key in ("trainable_parameters", "device", "torch", "config")}}


def run_one(name, words, folders, out, spectra=True):
    """Train one run, or what is left of it, and evaluate it; return its record."""
    import torch

    import checkpoint
    import train
    from config import load
    from evaluate import perplexity
    from shards import open_split
    torch.compiler.reset()
    folder, started = out / "runs" / name, time.time()
    begun = checkpoint.steps_of(folder)  # of an earlier start of the sweep, which was stopped
    if not begun:
        shutil.rmtree(folder, ignore_errors=True)
    cfg = load([*words, f"--out={folder}", *["--resume"] * bool(begun)], None)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    model = train.train(cfg)
    extra = {"peak_gib": round(torch.cuda.max_memory_allocated() / 2 ** 30, 2)}  # 0 on a CPU
    for data in folders:
        tokens = open_split(data, "val", verify=False)
        scores = perplexity(model, tokens, cfg.seq_len, 32, limit=cfg.eval_tokens)
        extra |= {f"{Path(data).name}_{key}": scores[key] for key in ("ppl", "bits_per_byte")}
    extra["seconds"] = round(time.time() - started, 1)
    try:
        if spectra:
            _, first = train.build_model(cfg, open_split(cfg.data, "train", verify=False))
            extra |= measure_blocks(model, first)
    except Exception as error:  # a finished run keeps its scores
        extra["spectrum_error"] = f"{type(error).__name__}: {error}"[:500]
    result = record(name, folder, extra)
    shutil.rmtree(folder)
    return result


def attempt(name, plan, out):
    """Return the record of a run, or of its error; plan: the values of the plan's file."""
    config, words = plan["RUNS"][name]
    if "PREPARE" in plan:  # a checkpoint lacks what the context has collected: from the beginning
        shutil.rmtree(out / "runs" / name, ignore_errors=True)
    try:
        with plan.get("PREPARE", contextlib.nullcontext)(name) as more:
            line = run_one(name, [config, *words], plan["EVALUATE"], out,
                           plan.get("SPECTRA", True))
        return line | more if isinstance(more, dict) else line
    except Exception as error:  # one run that fails must not end the sweep
        if "CUDA error" in str(error):  # but after a failed kernel, this process can run none
            (out / "claims" / name).unlink()
            raise
        return {"name": name, "error": f"{type(error).__name__}: {error}"[:500]}


def steps_of(words):
    """Return the --steps of a run; 1 if it has none, which makes all runs equally long."""
    steps = (word.removeprefix("--steps=") for word in reversed(words) if "--steps=" in word)
    return int(float(next(steps, 1)))


def would_take(steps, own, others):
    """Return the seconds that a run may take, from runs of similar length: the slowest per step of
    this worker's own, else the median of others'; 0 if there are none. Both: [(steps, seconds)]."""
    own, others = ([seconds / n for n, seconds in runs if 0.1 <= steps / n <= 10]
                   for runs in (own, others))
    return steps * (max(own) if own else statistics.median(others or [0]))


def work(path, out, deadline):
    """Run what is neither done nor claimed and would end in time, in the plan's order."""
    done, own = path.with_name("sweep.jsonl"), []
    while time.time() <= deadline:
        finished = rates.read(done)  # first: the plan must have what follows from these lines
        plan = runpy.run_path(str(path))
        claims = {name: out / "claims" / name for name in plan["RUNS"] if name not in finished}
        others = [(line["config"]["steps"], line["seconds"]) for line in finished.values()
                  if "seconds" in line]
        steps = {name: steps_of(plan["RUNS"][name][1]) for name in claims}
        in_time = [name for name in claims
                   if time.time() + would_take(steps[name], own, others) <= deadline]
        name = next((name for name in in_time if claim(claims[name])), None)
        if name is None and not any(map(is_running, filter(Path.exists, claims.values()))):
            break
        if name is None:
            time.sleep(LOOK_EVERY)
            continue
        started = time.time()
        line = json.dumps(attempt(name, plan, out)) + "\n"
        with open(done, "ab", buffering=0) as file:  # one write: other processes append too
            file.write(line.encode())
        own.append((steps[name], time.time() - started))


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    for name, kind, default in (("plan", Path, None), ("out", Path, None), ("--per_gpu", int, 1),
                                ("--gpus", int, 1), ("--seconds", float, 1e9)):
        parser.add_argument(name, type=kind, default=default)
    parser.add_argument("--deadline", type=float, help=SUPPRESS)  # of a worker
    args = parser.parse_args()
    if args.deadline:
        return work(args.plan, args.out, args.deadline)
    shutil.rmtree(args.out / "claims", ignore_errors=True)  # stale ones
    (args.out / "claims").mkdir(parents=True)
    done = args.plan.with_name("sweep.jsonl")
    if done.exists() and not done.read_bytes().endswith(b"\n"):  # of an editor, or half a line
        done.write_text("".join(json.dumps(line) + "\n" for line in rates.read(done).values()))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else range(args.gpus)
    workers, deadline = [], time.time() + args.seconds
    for i in range(len(gpus) * args.per_gpu):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpus[i % len(gpus)])}
        command = [sys.executable, __file__, args.plan, args.out, f"--deadline={deadline}"]
        with open(args.out / f"worker{i}.log", "a") as log:
            workers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    # a worker that was killed has its process id, and so looks alive to the others, until poll()
    while None in [worker.poll() for worker in workers]:
        time.sleep(0.1)
    lines, names = rates.read(done), runpy.run_path(str(args.plan))["RUNS"]
    failed = [name for name in names if "error" in lines.get(name, ())]
    print(f"{len(names) - len(names.keys() & lines.keys())} of {len(names)} runs are left; failed:",
          ", ".join(failed) or "none")
    raise SystemExit(any(worker.returncode for worker in workers))


if __name__ == "__main__":
    main()
