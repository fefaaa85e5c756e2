"""GSM8K with a 135M model: every method, two rates each, exact match on the 1,319 test questions.

    python data.py sft gsm8k train.jsonl --val test.jsonl --tokenizer=MODEL --seq_len=576
    python results/gsm8k/run.py OUT MODEL [SECONDS]     on every GPU there is; the same command again goes on where time was over
    python results/gsm8k/report.py OUT

Arithmetic: 174 steps x 128 samples, 1.60 M tokens an epoch, 4.8 M a run. Rows get one of two lengths, 272 or 576, because a length costs a compilation of
every method (about 10 s) and padding (35 %; four lengths 18 %, sixteen 11 %) only 4-5 s a run: 7.5 M positions, at 350k a second 21 s. 16 runs 340,
8 methods x 2 shapes 160-200, 17 x answers (about 550 tokens one after another, 6-8 ms each) 75 GPU seconds: about 320 s on two GPUs.
Memory: 645 KB a token (see ../uuid/run.py) x 64 x 576 = 37,000 tokens: 24 GB, three times that without compilation; answers to 1,319 questions at once
1,319 x 700 x 23 KB = 21 GB. One process a GPU: the first attempt ran five and their eager graphs, 28 GB each, filled the GPU.
"""
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "results")]
import runner
from evaluate import answers

LIMIT = int(os.environ.get("LIMIT", 0))  # questions; 0: all
COMMON = ["--micro_batch=64"]
FFT, LORA, MORA = (str(ROOT / f"configs/gsm8k_{name}.py") for name in ("fft", "lora_r8", "mora_r8"))
METHODS = {
    "base": [FFT], "fft": [FFT], "lora": [LORA], "mora_rotate_r8": [MORA], "mora_share_r256": [MORA, "--rank=256", "--operator=share"],
    **{f"operator_{name}": [MORA, "--rank=32", f"--operator={name}"] for name in ("truncate", "share", "decouple", "rotate")},
}
# the paper's highest rates for 7B, and about four times those: first the higher ones, small models like them
RATES = {"base": (0.0,), "fft": (1e-4, 2e-5), "lora": (1e-3, 2e-4), "mora_rotate_r8": (1.2e-3, 3e-4), "mora_share_r256": (2e-4, 5e-5),
         **{f"operator_{name}": (1.2e-3, 3e-4) for name in ("rotate", "share", "decouple", "truncate")}}
EVERY = 10 ** 9


def plan(_):
    """The first rates of all methods, then the second ones."""
    return [(place, method, rates[place], EVERY) for place in range(2) for method, rates in RATES.items() if place < len(rates)]


def look(place, model=None, step=0, row=None, last=True):
    """The answers, at the end of a run; one that was cut answers when it is done. The base model alone: its row."""
    base, began = row is None, time.time()
    if base:
        model, row = place.model("base"), {"method": "base", "lr": 0.0, "step": 0, "status": "done"}
    if row["status"] != "cut":
        row |= answers(model, place.tok, place.val, 1319, LIMIT, 416)
        row["answer_seconds"] = time.time() - began
    return row if base else False


if __name__ == "__main__":
    if sys.argv[1] == "work":
        runner.work(runner.Place(sys.argv[2], sys.argv[3], float(sys.argv[4]), COMMON, METHODS, (272,)), plan, look, EVERY)
    else:
        runner.launch(__file__, sys.argv[1], sys.argv[2], float(sys.argv[3]) if len(sys.argv) > 3 else 1e9)
