"""Write metrics.json from the logs beside this file, and losses.png.

    python results/pretrain_250m/metrics.py

METHOD.OPTIMIZER.wiki_ppl is the last validation, .best_ppl the lowest of all, at .best_step.
METHOD_fp8 trained with --matmul=fp8; .loss_difference_STEP is its validation loss minus bf16's.
The lines of plan.py's sweep, in sweep.jsonl, are not read yet.
"""
import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import median, stdev

FOLDER = Path(__file__).parent


def of_run(path):
    """Return (name, config, {step: validation loss}, [tokens per second]) of a log.jsonl."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    config = records[0]["config"]
    losses = {record["step"]: record["val_loss"] for record in records if "val_loss" in record}
    speeds = [record["tokens_per_s"] for record in records if "tokens_per_s" in record]
    return f"{path.stem}.{config['optimizer']}", config, losses, speeds


def logs(folder):
    return sorted(set(folder.glob("*.jsonl")) - {folder / "sweep.jsonl"})


def summarize(folder):
    numbers, runs = {}, {}
    for path in logs(folder):
        name, config, losses, speeds = of_run(path)
        runs[name], last, best = losses, max(losses), min(losses, key=losses.get)
        numbers |= {f"{name}.wiki_ppl": math.exp(losses[last]), f"{name}.wiki_loss": losses[last],
                    f"{name}.best_ppl": math.exp(losses[best]), f"{name}.best_step": best,
                    f"{name}.lr": config["lr"], f"{name}.rest_lr": config["rest_lr"],
                    f"{name}.tokens_per_s": median(speeds)}
        numbers |= {f"{name}.val_loss_{step}": loss for step, loss in losses.items()}
    for name, losses in runs.items():
        method, _, optimizer = name.partition(".")
        fp8 = runs.get(f"{method}_fp8.{optimizer}")
        if fp8:
            steps = [step for step in losses if step]
            differences = {step: fp8[step] - losses[step] for step in steps}
            numbers |= {f"{method}_fp8.{optimizer}.loss_difference_{step}": difference
                        for step, difference in differences.items()}
            numbers[f"{method}_fp8.{optimizer}.loss_difference_std"] = stdev(differences.values())
    return {name: round(number, 4) for name, number in numbers.items()}


if __name__ == "__main__":
    (FOLDER / "metrics.json").write_text(json.dumps(summarize(FOLDER), indent=1) + "\n")
    names = [path.name for path in logs(FOLDER)]
    subprocess.run([sys.executable, FOLDER.parents[1] / "analyze.py", "losses", *names,
                    "--png=losses.png"], cwd=FOLDER, check=True)
