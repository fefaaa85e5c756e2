"""The sweep of results/uuid: 10,000 pairs of UUIDs, AdamW and Muon, rates that fall to 0.

The search of rates, and the seeds after it, have linear schedules to 0 after a warm-up of 20 steps:
1,000 steps at r = 8, 500 for the rest. With constant rates (task "uuid": runs.jsonl, of an earlier
program, and four runs with Muon, one rate each) no run with Muon reaches 99 %. A run ends when 99.9
% of all digits are right. Rates and their seeds come first, then, where not every seed of both LoRA
and MoRA reached 99 %, the rates half way from the best one to its neighbours. The runs that are
done, in sweep.jsonl beside this file, decide what follows.
"""
import json
from pathlib import Path

import answered
import rates

FOLDER = Path(__file__).parent
CONFIG = "configs/uuid.py"
EVALUATE = []
PREPARE = answered.during
SPECTRA, RESUMES = (), True
STEPS = 1000  # of constant rates, and at r = 8
COMMON = ["--seq_len=75", "--micro_batch=500", "--eval_every=100", "--eval_tokens=70000",
          "--keep=1", "--schedule=linear"]
# {method: rate in the middle}: guesses from the runs with constant rates
MUON = {"mora_r8": 3e-3, "lora_r8": 3e-3, "mora_r256": 1e-3, "lora_r256": 1e-3, "fft": 3e-4}
ADAMW = {"mora_r8": 3e-3, "lora_r8": 1e-2, "mora_r256": 1e-3, "lora_r256": 3e-3, "fft": 3e-4}
GRADIENT = {"truncate_gradient_r8": 3e-3, "share_gradient_r8": 3e-3}
FALLING = {("falling", method, "muon"): lr for method, lr in (MUON | GRADIENT).items()}
FALLING |= {("falling", method, "adamw"): lr for method, lr in ADAMW.items()}
CONSTANT = {("uuid", method, "muon"): lr for method, lr in MUON.items() if method != "fft"}
REFINED = [*(("falling", method, optimizer) for optimizer in ("muon", "adamw")
             for method in ("lora_r8", "mora_r8")),
           *(("falling", method, "adamw") for method in ("lora_r256", "mora_r256"))]
GROUPS = [*FALLING, *(("uuid", method, "adamw") for method in ADAMW), *CONSTANT]


def steps_to_99(curve):
    """Return the first step with 99 % of the digits right, or None."""
    for step, digits, _ in curve:
        if digits >= 0.99:
            return step
    return None


def digits_at(curve, at):
    """Return the share of right digits at the last evaluation up to a step."""
    return [digits for step, digits, _ in curve if step <= at][-1]


def score(record):
    """Return what chooses a rate: the first step with 99 %, then the digits at the end."""
    return (steps_to_99(record["curve"]) or 10 * STEPS, -record["curve"][-1][1])


def make(group, lr, seed):
    """Return (config file, words) of a run."""
    task, method, optimizer = group
    words = rates.operator_words(method) if method in GRADIENT else [method]
    steps = STEPS if task == "uuid" or method.endswith("_r8") else STEPS // 2
    return CONFIG, [*words, *COMMON, f"--optimizer={optimizer}", f"--lr={lr}", f"--seed={seed}",
                    f"--steps={steps}", f"--save_every={steps}", "--warmup=20",
                    f"--min_lr_ratio={1.0 if task == 'uuid' else 0.0}"]


def read_earlier():
    """Return the records of runs.jsonl that went to the end or reached 99 %, named as new ones."""
    found = {}
    for line in (FOLDER / "runs.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["step"] == STEPS or record["steps_to_99"]:
            group = "uuid", record["method"], "adamw"
            found[rates.name_of(group, record["seed"], record["lr"])] = record
    return found


def read():
    """Return the records of both programs."""
    return read_earlier() | rates.read(FOLDER / "sweep.jsonl")


RECORDS = read()
RUNS = {rates.name_of(group, rates.SEED, lr): make(group, lr, rates.SEED)
        for group, lr in CONSTANT.items()}
RUNS |= rates.runs(FALLING, RECORDS, score, make)
RUNS |= rates.half_way(REFINED, RECORDS, score, make)
