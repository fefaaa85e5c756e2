"""The sweep of results/uuid: 10,000 pairs of UUIDs, every rate to the end, AdamW and Muon.

Rates are constant, with Muon after a warm-up of 20 steps. A run ends when 99.9 % of all digits are
right. The runs that are done, in sweep.jsonl beside this file, decide which rates and seeds
follow; so do those of runs.jsonl, the log of an earlier program, that were not cut.
"""
import json
from pathlib import Path

import answered
import rates

FOLDER = Path(__file__).parent
CONFIG = "configs/uuid.py"
EVALUATE = []
PREPARE = answered.during
STEPS, COMMON = 1000, ["--seq_len=75", "--micro_batch=500", "--eval_every=100",
                       "--eval_tokens=70000", "--keep=1"]
# {(method, optimizer): rate in the middle}; Muon's are a guess from AdamW's in runs.jsonl
CENTRES = {("mora_r8", "muon"): 3e-3, ("mora_r256", "muon"): 1e-3, ("mora_r8", "adamw"): 3e-3,
           ("mora_r256", "adamw"): 3e-4, ("lora_r8", "muon"): 3e-3, ("lora_r8", "adamw"): 3e-3,
           ("lora_r256", "muon"): 1e-3, ("lora_r256", "adamw"): 1e-3, ("fft", "muon"): 3e-4,
           ("fft", "adamw"): 3e-4}
GROUPS = {("uuid", *group): lr for group, lr in CENTRES.items()}
# the same at r = 8 with a rate that falls to 0 (the digits improve late there)
GROUPS |= {("decay", method, "muon"): CENTRES[method, "muon"] for method in ("mora_r8", "lora_r8")}


def steps_to_99(curve):
    """Return the first step with 99 % of the digits right, or None."""
    return next((step for step, digits, _ in curve if digits >= 0.99), None)


def score(record):
    """What chooses a rate: the first step with 99 %, then the digits at the end."""
    return (steps_to_99(record["curve"]) or 10 * STEPS, -record["curve"][-1][1])


def make(group, lr, seed):
    """Return (config file, words) of a run."""
    task, method, optimizer = group
    return CONFIG, [method, *COMMON, f"--optimizer={optimizer}", f"--lr={lr}", f"--seed={seed}",
                    f"--steps={STEPS}", f"--save_every={STEPS}",
                    f"--warmup={20 if optimizer == 'muon' else 0}",
                    f"--min_lr_ratio={0.0 if task == 'decay' else 1.0}"]


def read_earlier():
    """Return the records of runs.jsonl that went to the end or reached 99 %, named as new ones."""
    lines = (FOLDER / "runs.jsonl").read_text().splitlines()
    return {rates.name_of(("uuid", record["method"], "adamw"), record["seed"], record["lr"]): record
            for record in map(json.loads, lines)
            if record["step"] == STEPS or record["steps_to_99"]}


def read():
    """Return the records of both programs."""
    return read_earlier() | rates.read(FOLDER / "sweep.jsonl")


RUNS = {name: run for name, run in rates.runs(GROUPS, read(), score, make).items()
        if name not in read_earlier()}
