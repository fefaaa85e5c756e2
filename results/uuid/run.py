"""10,000 pairs of random UUIDs, learned by heart (section 5.1, Table 2) by a 135M model: five methods, a small search of rates.

    python data.py uuid --tokenizer=MODEL
    python results/uuid/run.py OUT MODEL [SECONDS]     on every GPU there is; the same command again goes on where time was over
    python results/uuid/report.py OUT

The rate is constant, so a search can stop early and go on: rates train PROBE steps (at r = 8 twice as many), from two neighbours on a grid
outwards until the best has worse ones on both sides or there are five. The one with the lowest training loss (the last ten steps: one epoch, all
pairs) goes on to STEPS, then one more. A run ends when 99.9 % of the digits are right.

Arithmetic: pairs are 59-75 tokens (mean 69.2), 5 % padding. Measured on one H200: 0.18 s a step (LoRA 0.22), so 190 s a run; 1.4 s for 1,000
answers, 6 s for all. 16 probes 370 s, five runs 850 s, the second rates 900 s. Memory: 16-24 GiB at 500 rows.
"""
import math
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "results")]
import runner
from evaluate import answers
from runner import SEED, Task, search

SETTINGS = {"PROBE": 100, "STEPS": 1000, "LOOK": 100, "SOME": 1000, "ALL": 10000}  # steps, steps, steps, pairs, pairs; from the environment too
PROBE, STEPS, LOOK, SOME, ALL = (int(os.environ.get(key, value)) for key, value in SETTINGS.items())
COMMON = ["--seq_len=75", "--micro_batch=500", "--epochs=0", f"--steps={STEPS}"]
# the first two rates, above the paper's: it has a 7B model
RATES = {"mora_r8": (1e-3, 3e-3), "lora_r8": (1e-3, 3e-3), "mora_r256": (3e-4, 1e-3), "lora_r256": (3e-4, 1e-3), "fft": (1e-4, 3e-4)}
# trained to the end as well, since short probes seem to favour rates that start steadily: the next higher rate, or where the probes found
# that one useless the next lower
SECOND = {"mora_r256": 3e-4, "fft": 3e-4, "mora_r8": 3e-3, "lora_r256": 3e-4, "lora_r8": 1e-3}
METHODS = {name: [str(ROOT / "configs/uuid.py"), name] for name in RATES}
METHODS["base"] = METHODS["fft"]


def plan(rows):
    """Probes; then, of methods whose search is over, the best rate and, later, a second one, to the end."""
    tasks = []
    for order, (method, rates) in enumerate(RATES.items()):
        until = PROBE * (2 if method.endswith("_r8") else 1)
        probes = [row for row in rows if row["method"] == method and row["until"] == until and row["status"] != "cut"]
        scores = {row["lr"]: row["loss"][-1][1] if row["status"] in ("done", "reached") else math.inf for row in probes}
        tried, best = search(rates, scores)
        tasks += [Task((0, 0), method, rate, SEED, until) for rate in tried]
        whole = [Task((1, order), method, best, SEED, STEPS), Task((2, list(SECOND).index(method)), method, SECOND[method], SEED, STEPS)]
        learned = {row["lr"] for row in rows if row["method"] == method and row.get("steps_to_99")}  # a cut run among them needs no more
        tasks += [task for task in whole if best and task.lr not in learned]
    return tasks


def look(place, model, step, row, last):
    """Digits right: of the first SOME pairs in between, of ALL at the end or when these are nearly all right."""
    began = time.time()
    digits, pairs = answers(model, place.tok, place.val, 2500, SOME)["digits"], SOME
    if digits >= 0.999 or last and row["step"] >= STEPS:
        digits, pairs = answers(model, place.tok, place.val, 2500, ALL)["digits"], ALL
    curve = row.setdefault("curve", [])
    curve[:] = [point for point in curve if point[0] != step] + [[step, digits, pairs]]
    row["digits"], row["answered"], row["answer_seconds"] = digits, pairs, time.time() - began
    row["steps_to_99"] = next((at for at, share, _ in curve if share >= 0.99), None)
    print(f"{row['method']} {row['lr']:g} step {step}: loss {row['loss'][-1][1]:.4f}, digits {digits:.4f} of {pairs}, "
          f"{row['tokens'] / row['seconds']:,.0f} tokens/s", flush=True)
    return digits >= 0.999


if __name__ == "__main__":
    if sys.argv[1] == "work":
        runner.work(runner.Place(sys.argv[2], sys.argv[3], float(sys.argv[4]), COMMON, METHODS, (72, 64)), plan, look, LOOK)
    else:
        runner.launch(__file__, sys.argv[1], sys.argv[2], float(sys.argv[3]) if len(sys.argv) > 3 else 1e9)
