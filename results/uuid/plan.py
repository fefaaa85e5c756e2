"""The sweep of results/uuid: 10,000 pairs of UUIDs, every rate to the end, AdamW and Muon.

Rates are constant, with Muon after a warm-up of 20 steps. A run ends when 99.9 % of all digits are
right. Order: Muon's rates and seeds, AdamW's, groups chosen by the gradient, rates that fall to 0
at r = 8. The runs that are done, in sweep.jsonl beside this file, decide what follows; so do those
of runs.jsonl, of an earlier program, that were complete or had 99 %.
"""
import json
from pathlib import Path

import answered
import rates

FOLDER = Path(__file__).parent
CONFIG = "configs/uuid.py"
EVALUATE = []
PREPARE = answered.during
SPECTRA = False
STEPS = 1000
COMMON = ["--seq_len=75", "--micro_batch=500", "--eval_every=100", "--eval_tokens=70000",
          "--keep=1"]
# {method: rate in the middle}, the most informative first; Muon's are guesses from runs.jsonl
MUON = {"mora_r8": 3e-3, "lora_r8": 3e-3, "mora_r256": 1e-3, "lora_r256": 1e-3, "fft": 3e-4}
ADAMW = {"mora_r8": 3e-3, "lora_r8": 3e-3, "mora_r256": 3e-4, "lora_r256": 1e-3, "fft": 3e-4}
GRADIENT = {"truncate_gradient_r8": 3e-3, "share_gradient_r8": 3e-3}


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
    warmup = 20 if optimizer == "muon" else 0
    min_lr_ratio = 0.0 if task == "decay" else 1.0
    return CONFIG, [*words, *COMMON, f"--optimizer={optimizer}", f"--lr={lr}", f"--seed={seed}",
                    f"--steps={STEPS}", f"--save_every={STEPS}", f"--warmup={warmup}",
                    f"--min_lr_ratio={min_lr_ratio}"]


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


def groups_of(records):
    """Return {(task, method, optimizer): rate in the middle}. The digits improve late at r = 8, so
    rates that fall to 0 are tried there ("decay") around Muon's best constant one."""
    groups = {("uuid", method, "muon"): lr for method, lr in MUON.items()}
    for method in ("mora_r8", "lora_r8"):
        lr, is_inside = rates.best(rates.scores_of(records, ("uuid", method, "muon"), score))
        if is_inside:
            groups["decay", method, "muon"] = lr
    groups |= {("uuid", method, "adamw"): lr for method, lr in ADAMW.items()}
    return groups | {("uuid", method, "muon"): lr for method, lr in GRADIENT.items()}


def place(name):
    """Return the place of a run in the order, for sorting: (tier, is another seed)."""
    (task, method, optimizer), seed, _ = rates.parts_of(name)
    if task == "decay":
        tier = 3
    elif method in GRADIENT:
        tier = 2
    else:
        tier = 1 if optimizer == "adamw" else 0
    return tier, seed != rates.SEED


RECORDS, EARLIER = read(), read_earlier()
GROUPS = groups_of(RECORDS)
ALL_RUNS = rates.runs(GROUPS, RECORDS, score, make)
RUNS = {name: ALL_RUNS[name] for name in sorted(ALL_RUNS, key=place) if name not in EARLIER}
