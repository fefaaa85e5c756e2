"""GSM8K with a 135M model: every method at rates of its own and three seeds, exact match on the 1,319 test questions.

    head -n 7000 train.jsonl > fit.jsonl; tail -n 473 train.jsonl > dev.jsonl
    python data.py sft gsm8k_fit fit.jsonl --val test.jsonl --tokenizer=MODEL --seq_len=576
    python data.py sft gsm8k_dev dev.jsonl --val dev.jsonl --tokenizer=MODEL --seq_len=576
    python results/gsm8k/run.py OUT MODEL [SECONDS]     on every GPU there is; the same command again goes on where time was over
    python results/gsm8k/report.py OUT

Rates are chosen by the loss on the 473 last training questions, which nobody trains on: from two neighbours on a grid outwards, until the best
has worse ones on both sides or there are five. The best one then gets two more seeds (of the order of the data and of LoRA's A). The test set
chooses nothing.

Arithmetic: 54 steps an epoch, 1.5 M tokens and 6 % padding, 4.5 M a run. Measured on one H200 with WORKERS=4 TURNS=2: 18-27 s a run, 12-20 s for losses
and answers to 1,319 questions, two at once; 33 runs of the search and 16 seeds: 980 s. Memory: 30-43 GiB a process that trains.
"""
import math
import os
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "results")]
import runner
from evaluate import answers, perplexity
from runner import SEED, Task, search
from samples import open_split

LIMIT = int(os.environ.get("LIMIT", 0))  # questions; 0: all
COMMON = ["--data=data/gsm8k_fit", "--micro_batch=128"]
FFT, LORA, MORA = ([str(ROOT / "configs/gsm8k.py"), name] for name in ("fft", "lora_r8", "mora_r8"))
METHODS = {
    "fft": FFT, "lora": LORA, "mora_rotate_r8": MORA, "mora_share_r256": [*MORA, "--rank=256", "--operator=share"],
    **{f"operator_{name}": [*MORA, "--rank=32", f"--operator={name}"] for name in ("rotate", "share", "decouple", "truncate")}, "base": FFT,
}
# the first two rates: the paper's highest for its 7B model, or the next below, and the next on the grid
RATES = {method: (3e-4, 1e-3) for method in METHODS} | {"fft": (3e-5, 1e-4), "mora_share_r256": (1e-4, 3e-4)}
EVERY = 10 ** 9


def plan(rows):
    """The base model; rates; then, of methods whose search is over, two seeds more."""
    tasks = [Task(0, "base", 0.0, SEED, 0)]
    for method in list(METHODS)[:-1]:
        done = [row for row in rows if row["method"] == method and row["seed"] == SEED and row["status"] != "cut"]
        tried, best = search(RATES[method], {row["lr"]: row.get("dev_loss", math.inf) for row in done})
        tasks += [Task(1, method, rate, SEED, EVERY) for rate in tried]
        tasks += [Task(1 + more, method, best, SEED + more, EVERY) for more in (1, 2) if best]
    return tasks


def look(place, model, step=0, row=None, last=True):
    """At the end of a run, or of the base model: losses, and answers unless another rate's loss is lower already."""
    base, began = row is None, time.time()
    row = {"method": "base", "lr": 0.0, "seed": SEED, "step": 0, "status": "done"} if base else row
    if row["status"] == "cut":
        return False
    with torch.compiler.set_stance("force_eager"):
        for name, split in (("dev", open_split("data/gsm8k_dev", "val", verify=False)), ("test", place.val)):
            row[f"{name}_loss"] = perplexity(model, split, 576, 64)["loss"]
    others = [other["dev_loss"] for other in runner.rows(place.out) if other["method"] == row["method"] and "dev_loss" in other]
    if row["seed"] != SEED or row["dev_loss"] < min(others, default=math.inf):
        row |= answers(model, place.tok, place.val, 1319, LIMIT)
    row["answer_seconds"] = time.time() - began
    return row if base else False


if __name__ == "__main__":
    if sys.argv[1] == "work":
        runner.work(runner.Place(sys.argv[2], sys.argv[3], float(sys.argv[4]), COMMON, METHODS, (216, 208)), plan, look, EVERY)
    else:
        runner.launch(__file__, sys.argv[1], sys.argv[2], float(sys.argv[3]) if len(sys.argv) > 3 else 1e9)
