"""Run many training runs, several processes per GPU, each run in one line of JSON.

    python results/sweep.py results/pretrain_60m/plan.py OUT --per_gpu=3 --seconds=500

A plan is a Python file with RUNS = {name: (config file, ["--key=value", ...])} and EVALUATE, a list
of prepared folders on which every trained model is evaluated besides. A run that has a line in
OUT/runs.jsonl is done; OUT/claims/NAME marks one that a process works on. Processes start no run
that would end after --seconds, so a sweep can be stopped and started again. Every process has a
log, OUT/*.log.
"""
import argparse
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


def finished(out):
    """Return the names of the runs that have a line in runs.jsonl."""
    path = out / "runs.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {json.loads(line)["name"] for line in lines}


def claim(out, name):
    """Return whether this process is the first to claim a run."""
    try:
        os.close(os.open(out / "claims" / name, os.O_CREAT | os.O_EXCL))
        return True
    except FileExistsError:
        return False


def record(name, folder, model, extra):
    """Return the numbers of a finished run, from its log.jsonl, as a dict."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    head, steps = lines[0], [line for line in lines[1:] if "loss" in line]
    scores = [line for line in lines if "val_ppl" in line]
    speeds = sorted(line["tokens_per_s"] for line in steps)
    return {"name": name, "val_ppl": scores[-1]["val_ppl"], "val_loss": scores[-1]["val_loss"],
            "bits_per_byte": scores[-1]["val_bits_per_byte"], **extra,
            "tokens_per_s": speeds[len(speeds) // 2], "losses": [
                [line["step"], round(line["loss"], 4)] for line in steps],
            "val_losses": [[line["step"], round(line["val_loss"], 4)] for line in scores],
            "trainable_parameters": head["trainable_parameters"], "device": head["device"],
            "torch": head["torch"], "config": head["config"]}


def run_one(name, words, folders, out):
    """Train one run and evaluate it; return its record."""
    import torch

    from config import load
    from evaluate import perplexity
    from shards import open_split
    from train import train
    torch.compiler.reset()
    folder = out / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    started = time.time()
    cfg = load([*words, f"--out={folder}"], None)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    model = train(cfg)
    peak = torch.cuda.max_memory_allocated() / 2 ** 30 if on_gpu else 0.0
    extra = {"peak_gib": round(peak, 2)}
    for data in folders:
        tokens = open_split(data, "val", verify=False)
        scores = perplexity(model, tokens, cfg.seq_len, 32, limit=cfg.eval_tokens)
        extra |= {f"{Path(data).name}_{key}": scores[key] for key in ("ppl", "bits_per_byte")}
    extra["seconds"] = round(time.time() - started, 1)
    result = record(name, folder, model, extra)
    shutil.rmtree(folder)
    return result


def work(plan, out, deadline):
    """Run what nobody has claimed, in the plan's order, until the deadline."""
    values, longest = runpy.run_path(plan), 0.0
    for name, (config, words) in values["RUNS"].items():
        if time.time() + longest > deadline:
            break
        if name in finished(out) or not claim(out, name):
            continue
        started = time.time()
        try:
            line = run_one(name, [config, *words], values["EVALUATE"], out)
        except Exception as error:  # one run that fails must not end the sweep
            if "CUDA error" in str(error):  # but after a failed kernel, this process can run none
                (out / "claims" / name).unlink()
                raise
            line = {"name": name, "error": f"{type(error).__name__}: {error}"[:500]}
        with open(out / "runs.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        longest = max(longest, time.time() - started)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan")
    parser.add_argument("out", type=Path)
    parser.add_argument("--per_gpu", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)  # of a worker
    args = parser.parse_args()
    (args.out / "claims").mkdir(parents=True, exist_ok=True)
    if args.deadline:
        return work(args.plan, args.out, args.deadline)
    for stale in (args.out / "claims").iterdir():
        stale.unlink()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = visible.split(",") if visible else [str(i) for i in range(args.gpus)]
    workers = []
    for i in range(len(gpus) * args.per_gpu):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]}
        command = [sys.executable, __file__, args.plan, args.out,
                   f"--deadline={time.time() + args.seconds}"]
        with open(args.out / f"worker{i}.log", "a") as log:
            workers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    raise SystemExit(max(worker.wait() for worker in workers))


if __name__ == "__main__":
    main()
