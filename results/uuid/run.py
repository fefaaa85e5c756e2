"""10,000 pairs of random UUIDs, learned by heart (section 5.1, Table 2) by a 135M model: five methods, a small search of rates.

    python data.py uuid --tokenizer=MODEL
    python results/uuid/run.py OUT MODEL [SECONDS]     on every GPU there is; the same command again goes on where time was over
    python results/uuid/report.py OUT

The rate is constant, so a search can stop early and go on: every rate trains PROBE steps, then the one with the lowest training loss goes on to
STEPS, in the order of METHODS, then the second ones. A run ends when 99.9 % of the digits are right.

Arithmetic: pairs are 59-75 tokens (mean 69.2), rows all 74 long (7.9 % padding, one shape to compile): 74,000 a step, 74 M a run of 1,000 steps. 5 x 3 x 200 +
5 x 800 = 7,000 steps = 518 M tokens; at 350k tokens/s (250M shape, measured: 280k-300k) 1,480 GPU seconds, with compilation and looks about 820 s on two
GPUs. At half that speed the probes still end after 420 s. Memory: a compiled block keeps about (8 x 576 + 4 x 1536) numbers a token, 21 KB in bfloat16,
30 blocks 645 KB: 500 rows x 74 = 37,000 tokens, 24 GB; weights, gradients, Adam 2.2 GB; answers to 2,500 pairs 2,500 x 202 x 23 KB = 12 GB.
"""
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "results")]
import runner
from evaluate import answers

SETTINGS = {"PROBE": 200, "STEPS": 1000, "LOOK": 100, "SOME": 1000, "ALL": 10000}  # steps, steps, steps, pairs, pairs; from the environment too
PROBE, STEPS, LOOK, SOME, ALL = (int(os.environ.get(key, value)) for key, value in SETTINGS.items())
COMMON = ["--seq_len=75", "--micro_batch=500", "--epochs=0", f"--steps={STEPS}"]
METHODS = {name: [str(ROOT / f"configs/uuid_{name}.py")] for name in ("mora_r8", "lora_r8", "fft", "mora_r256", "lora_r256")}
METHODS["base"] = METHODS["fft"]
# three and ten times the paper's highest rate (of a 7B model), then that rate
RATES = {"fft": (1e-4, 3e-4, 3e-5), "lora_r8": (1e-3, 3e-3, 3e-4), "lora_r256": (1e-3, 3e-3, 3e-4), "mora_r8": (6e-4, 2e-3, 2e-4),
         "mora_r256": (6e-4, 2e-3, 2e-4)}


def plan(rows):
    """Probes; then, of methods whose probes are all in, the best rate and, later, the second best, to the end."""
    tasks = [((0, 0), method, rates[place], PROBE) for place in range(3) for method, rates in RATES.items()]
    for order, method in enumerate(METHODS):
        probes = [row for row in rows if row["method"] == method and row["until"] == PROBE]
        if len({row["lr"] for row in probes if row["status"] != "cut"}) < len(RATES.get(method, " ")):
            continue
        finite = {row["lr"]: row["loss"][-1][1] for row in probes if row["status"] in ("done", "reached")}
        for place, rate in enumerate(sorted(finite, key=finite.get)[:2]):
            tasks.append(((1 + place, order), method, rate, STEPS))
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
        runner.work(runner.Place(sys.argv[2], sys.argv[3], float(sys.argv[4]), COMMON, METHODS, (74,)), plan, look, LOOK)
    else:
        runner.launch(__file__, sys.argv[1], sys.argv[2], float(sys.argv[3]) if len(sys.argv) > 3 else 1e9)
