"""Run many training runs, several processes per GPU, each run in one line of JSON.

    python results/sweep.py results/pretrain_60m/plan.py OUT --per_gpu=3 --seconds=500

A plan is a Python file with RUNS = {name: (config file, ["--key=value", ...])} and EVALUATE, more
data folders on which every model is evaluated. PREPARE(name), if a plan has it, returns a context
manager in which the run happens; a dict that it yields is added to the run's line. SPECTRA, if a
plan has it, names the runs whose changes of the blocks get their singular values, which take
seconds per run. A run with a line in sweep.jsonl, beside the plan, is done; one that failed has a
line with "error". To run it again, remove its line and start the sweep again.

A worker reads the plan before each run, since RUNS may depend on sweep.jsonl and grow. It waits
while other workers' runs may make the plan grow. No run starts that would end after --seconds, by
the times of earlier runs; one that is longer than all of them may end later. A sweep ends if its
first three runs fail. A stopped sweep can be started again. It continues runs from their
checkpoints in OUT/runs, those of a plan with PREPARE only if it says RESUMES = True; such a run has
"resumed" in its line, and no "seconds" and no "peak_gib". Logs: OUT/*.log.
"""
import contextlib
import json
import os
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import time
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])
import rates  # noqa: E402

LOOK_EVERY = 5  # seconds after which a worker that waits reads the plan again
SAVE_WITHIN = 30  # seconds that workers have to save their runs after SIGTERM


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
    """Return dW of a projection since its first weight: what restarts merged, and the update."""
    import torch

    import mora
    if layer.weight.dtype == torch.float8_e4m3fn:  # restarts cannot merge: the update is all of dW
        return mora.delta_of(layer.update, layer.weight.device, torch.float32)
    weight = layer.merged() if hasattr(layer, "merged") else layer.weight
    return weight - first.to(layer.weight)  # in the base's type, so that its rounding cancels


def measure_blocks(model, first):
    """Return the trainable share of the blocks' projections and the mean spectra of their dW: of
    all projections, and by kind (q_proj, ...).

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
            if len(delta) > delta.shape[1]:
                delta = delta.T
            squares = torch.linalg.eigvalsh(delta @ delta.T)
            values[name] = squares.flip(0).clamp(min=0).sqrt().cpu()
    trained = sum(p.numel() for layer in layers.values() for p in layer.parameters()
                  if p.requires_grad)
    total = sum(layer.weight.numel() for layer in layers.values())
    spectra = {kind: {key: float(f"{value:.4g}") for key, value in row.items()}
               for kind, row in mean_measures(values).items()}
    return {"trainable_block_fraction": round(trained / total, 4), "spectrum": spectra.pop("all"),
            "spectra": spectra}


def record(name, folder, extra):
    """Return the numbers of a finished run, from its log.jsonl, as a dict."""
    head, *lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    head["config"]["out"] = name  # not a path of the machine
    # a resumed run repeats steps, maybe on another card: the later line of a step counts
    device, steps, scores = head["device"], {}, {}
    for line in lines:
        device = line.get("device", device)
        if "loss" in line:
            steps[line["step"]] = line | {"device": device}
        elif "val_ppl" in line:
            scores[line["step"]] = line
    steps, scores = [*steps.values()], [*scores.values()]
    device = steps[-1]["device"]
    speeds = [line["tokens_per_s"] for line in steps if line["device"] == device]
    return {"name": name, "val_ppl": scores[-1]["val_ppl"], "val_loss": scores[-1]["val_loss"],
            "bits_per_byte": scores[-1]["val_bits_per_byte"], **extra,
            "tokens_per_s": statistics.median_high(speeds),
            "losses": [[line["step"], round(line["loss"], 4)] for line in steps],
            "val_losses": [[line["step"], round(line["val_loss"], 4)] for line in scores],
            **{key: head[key] for key in ("trainable_parameters", "torch", "config")},
            "device": device}


def run_one(name, words, folders, out, spectra=True):
    """Train one run, or what is left of it, and evaluate it; return its record."""
    import torch

    import checkpoint
    import train
    from config import load
    from evaluate import perplexity
    from shards import open_split
    torch.compiler.reset()
    folder, started, extra = out / "runs" / name, time.time(), {}
    words = [*words, f"--out={folder}"]
    if checkpoint.steps_of(folder):  # an earlier start of the sweep was stopped in this run
        words.append("--resume")
        extra["resumed"] = True  # its seconds and its peak would be those of the last part
    else:
        shutil.rmtree(folder, ignore_errors=True)
    cfg = load(words, None)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    model = train.train(cfg)
    peak_gib = round(torch.cuda.max_memory_allocated() / 2 ** 30, 2)  # 0 on a CPU
    for data in folders:
        tokens = open_split(data, "val", verify=False)
        scores = perplexity(model, tokens, cfg.seq_len, 32, limit=cfg.eval_tokens)
        for key in ("ppl", "bits_per_byte"):
            extra[f"{Path(data).name}_{key}"] = scores[key]
    if "resumed" not in extra:
        extra |= {"peak_gib": peak_gib, "seconds": round(time.time() - started, 1)}
    if spectra:
        try:
            _, first = train.build_model(cfg, open_split(cfg.data, "train", verify=False))
            extra |= measure_blocks(model, first)
        except Exception as error:  # a finished run keeps its scores
            extra["spectrum_error"] = f"{type(error).__name__}: {error}"[:500]
    result = record(name, folder, extra)
    shutil.rmtree(folder)
    return result


def attempt(name, plan, out):
    """Return the record of a run, or of its error; plan: the values of the plan's file."""
    file, words = plan["RUNS"][name]
    prepare = plan.get("PREPARE", contextlib.nullcontext)
    if not continues(plan):
        shutil.rmtree(out / "runs" / name, ignore_errors=True)
    try:
        with prepare(name) as more:
            line = run_one(name, [file, *words], plan["EVALUATE"], out,
                           name in plan.get("SPECTRA", plan["RUNS"]))
        return line | more if isinstance(more, dict) else line
    except Exception as error:  # one run that fails must not end the sweep
        if "CUDA error" in str(error):  # but after a failed kernel, this process can run none
            (out / "claims" / name).unlink()
            raise
        line = {"name": name, "error": f"{type(error).__name__}: {error}"[:500]}
        config = out / "runs" / name / "config.json"
        if config.exists():  # the run had begun
            line["config"] = json.loads(config.read_text()) | {"out": name}
        return line


def planned_steps(words):
    """Return the --steps of a run; 1 if it has none, which makes all runs equally long."""
    steps = 1
    for word in words:
        if word.startswith("--steps="):
            steps = int(float(word.removeprefix("--steps=")))
    return steps


def continues(plan):
    """Return whether a plan's runs continue from their checkpoints: no checkpoint has what the
    context of PREPARE collects, unless the plan says so."""
    return "PREPARE" not in plan or plan.get("RESUMES", False)


def share_left(folder, steps):
    """Return the share of a run's steps after its newest checkpoint; 1 without one or --steps."""
    import checkpoint
    saved = checkpoint.steps_of(folder)
    if not saved or steps == 1:
        return 1
    return 1 - int(saved[-1].name.removeprefix("step-")) / steps


def trained_steps(line):
    """Return the steps that a finished run took; a context may have ended it before its last."""
    return line["losses"][-1][0]


def would_take(steps, own, others):
    """Return the seconds that a run may take; own, others: [(steps, seconds)] of finished runs.

    The seconds per step come from runs of a quarter to four times its length: the slowest of this
    worker's own, else the median of others'. In much shorter runs compiling and saving weigh too
    much; if there are only such runs, the run takes at least as long as the longest of them.
    """
    for runs, choose in ((own, max), (others, statistics.median)):
        per_step = [seconds / n for n, seconds in runs if 0.25 <= steps / n <= 4]
        if per_step:
            return steps * choose(per_step)
    return max((seconds for n, seconds in own + others if n < steps), default=0)


def claim_first(claims, seconds, deadline):
    """Claim the first free run that would end in time and return its name, or None without one."""
    for name, file in claims.items():
        if time.time() + seconds[name] <= deadline and claim(file):
            return name
    return None


def is_hopeless(lines):
    """Return whether all runs so far, three at least, failed for another reason than diverging, so
    that those left would fail, too: a file that is not there, say."""
    return len(lines) >= 3 and all("error" in line and not rates.diverged(line) for line in lines)


def work(path, out, deadline, per_gpu=1):
    """Run what is neither done nor claimed and would end in time, in the plan's order. A line has
    per_gpu, the processes that shared the GPU: its speed is to be read with that. If the first
    three runs fail, no more start, unless one that is under way succeeds."""
    done, own = path.with_name("sweep.jsonl"), []
    earlier = rates.read(done)
    while time.time() <= deadline:
        finished = rates.read(done)  # before the plan, so that it has the runs that follow
        plan = runpy.run_path(str(path))
        claims = {name: out / "claims" / name for name in plan["RUNS"] if name not in finished}
        others = [(trained_steps(line), line["seconds"]) for line in finished.values()
                  if "seconds" in line]  # not in a resumed run's
        steps = {name: planned_steps(plan["RUNS"][name][1]) for name in claims}
        seconds = {name: would_take(steps[name], own, others) for name in claims}
        if continues(plan):
            for name in claims:
                seconds[name] *= share_left(out / "runs" / name, steps[name])
        new = [line for name, line in finished.items() if name not in earlier]
        name = None if is_hopeless(new) else claim_first(claims, seconds, deadline)
        if name is None:
            if not any(file.exists() and is_running(file) for file in claims.values()):
                break
            time.sleep(LOOK_EVERY)
            continue
        started = time.time()
        line = attempt(name, plan, out) | {"per_gpu": per_gpu}
        with open(done, "ab", buffering=0) as file:  # one write: other processes append too
            file.write((json.dumps(line) + "\n").encode())
        # the time until a run failed, or since it was resumed, tells nothing about whole runs
        if not line.keys() & {"error", "resumed"}:
            own.append((trained_steps(line), time.time() - started))


def end_last_line(path):
    """Give the last line the newline that it lacks, or cut it off if it is half a line. The other
    lines are not written anew: a crash would lose them."""
    text = path.read_bytes()
    last = text.rpartition(b"\n")[2]
    if not last:
        return
    try:
        json.loads(last)
    except ValueError:
        os.truncate(path, len(text) - len(last))
    else:
        with open(path, "ab") as file:
            file.write(b"\n")


def stop(workers):
    """End the workers and this process. They have sessions of their own, so that a signal to the
    sweep's group reaches them through here alone. One that trains saves its run; one between two
    runs may take no notice, since train.py's handler outlives a run."""
    for worker in workers:
        worker.terminate()
    end = time.time() + SAVE_WITHIN
    while time.time() < end and None in [worker.poll() for worker in workers]:
        time.sleep(0.1)
    for worker in workers:
        if worker.poll() is None:
            os.killpg(worker.pid, signal.SIGKILL)
    raise SystemExit(143)


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--per_gpu", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=1, help="without CUDA_VISIBLE_DEVICES")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--deadline", type=float, help=SUPPRESS)  # makes this process a worker
    args = parser.parse_args()
    if args.deadline:
        return work(args.plan, args.out, args.deadline, args.per_gpu)
    shutil.rmtree(args.out / "claims", ignore_errors=True)  # those of an earlier start
    (args.out / "claims").mkdir(parents=True)
    done = args.plan.with_name("sweep.jsonl")
    if done.exists():
        end_last_line(done)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else range(args.gpus)
    workers, deadline = [], time.time() + args.seconds
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop(workers))
    for i in range(len(gpus) * args.per_gpu):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpus[i % len(gpus)])}
        command = [sys.executable, __file__, args.plan, args.out, f"--deadline={deadline}",
                   f"--per_gpu={args.per_gpu}"]
        with open(args.out / f"worker{i}.log", "a") as log:
            workers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log,
                                            start_new_session=True))
    # a killed worker keeps its process id until poll(), so that the others take it for alive
    while None in [worker.poll() for worker in workers]:
        time.sleep(0.1)
    for i, worker in enumerate(workers):
        if worker.returncode:
            print(f"a worker ended with exit status {worker.returncode}, "
                  f"see {args.out / f'worker{i}.log'}")
    lines, names = rates.read(done), runpy.run_path(str(args.plan))["RUNS"]
    left = [name for name in names if name not in lines]
    failed = [name for name in names if name in lines and "error" in lines[name]]
    print(f"{len(left)} of {len(names)} runs are left; failed:", ", ".join(failed) or "none")
    raise SystemExit(any(worker.returncode for worker in workers))


if __name__ == "__main__":
    main()
