"""The sweep of results/gsm8k: Muon beside AdamW, three seeds, answers kept; bases of three types.

Rates are searched: the runs that are done, in sweep.jsonl beside this file, decide which rates and
seeds follow. AdamW's start from those that an earlier search chose (runs.jsonl), which kept no
answers. One rate above the best of each optimizer follows: its loss is higher, but its answers need
not be worse. Then groups chosen by the gradient, with AdamW, beside permuted and strided ones, and
AdamW's rates half way from the best to its neighbours.
"""
import math
from pathlib import Path

import answered
import rates

FOLDER = Path(__file__).parent
CONFIG = "configs/gsm8k.py"
EVALUATE = ["data/gsm8k_dev"]  # chooses rates; the validation split of data/gsm8k_fit is the test
COMMON = ["--data=data/gsm8k_fit", "--micro_batch=64", "--eval_every=1000", "--save_every=1000",
          "--keep=1"]
SPECTRA, RESUMES = (), True
METHODS = {"fft": ["fft"], "lora": ["lora_r8"], "mora_rotate_r8": ["mora_r8"],
           "mora_share_r256": ["mora_r8", "--rank=256", "--operator=share"]}
# {method: the middle of its rates}: those of the same operator in runs.jsonl, or of rotate at r = 8
GROUPS = {"truncate_gradient_r32": 3e-3, "share_gradient_r32": 1e-3, "share_permute_r32": 1e-3,
           "truncate_gradient_r8": 1e-2, "share_gradient_r8": 1e-2,
           "share_permute_r8": 3e-3, "share_strided_r8": 3e-3}
METHODS |= {method: rates.operator_words(method) for method in GROUPS}
# {method: AdamW's best rate, which is the middle of Muon's}
RATES = {"mora_rotate_r8": 1e-2, "lora": 1e-2, "mora_share_r256": 1e-3, "fft": 3e-4}
MUON = {("gsm8k", method, "muon"): lr for method, lr in RATES.items()}
GROUPED = {("gsm8k", method, "adamw"): lr for method, lr in GROUPS.items()}
ADAMW = {("gsm8k", method, "adamw"): lr for method, lr in RATES.items()}
SEARCHED = ADAMW | MUON | GROUPED
BASES = {(dtype, "mora_rotate_r8", "adamw"): 1e-2 for dtype in ("bfloat16", "float8")}


def score(record):
    """Return what chooses a rate: the loss on held-out training questions."""
    return (math.log(record["gsm8k_dev_ppl"]),)


def make(group, lr, seed):
    """Return (config file, words) of a run."""
    task, method, optimizer = group
    words = [*METHODS[method], *COMMON, f"--optimizer={optimizer}", f"--lr={lr}", f"--seed={seed}"]
    if group in BASES:
        words.append(f"--base_dtype={task}")
    return CONFIG, words


def PREPARE(name):
    """Keep the answers of all runs but those on bases of other types, whose losses are compared."""
    group, _, _ = rates.parts_of(name)
    return answered.losses() if group in BASES else answered.at_the_end(name)


def at_known_rates(groups):
    """Return {name: run} of {group: rate}, seed by seed."""
    return {rates.name_of(group, seed, lr): make(group, lr, seed)
            for seed in rates.SEEDS for group, lr in groups.items()}


def above(records):
    """Return {group: the rate above its best one}; until a grid is closed, AdamW's best is that of
    runs.jsonl, and Muon's is not known."""
    best = dict(ADAMW)
    for group in ADAMW | MUON:
        lr, is_inside = rates.best(rates.settled(records, group, score))
        if is_inside:
            best[group] = lr
    return {group: rates.beside(lr, 1) for group, lr in best.items()}


BASE = "gsm8k-base-adamw-s1337-1e-30"  # untrained: one step at a rate that changes nothing
RUNS = {BASE: (CONFIG, ["fft", *COMMON, "--lr=1e-30", "--steps=1", "--warmup=0"])}
RECORDS = rates.read(FOLDER / "sweep.jsonl")
ABOVE = above(RECORDS)
RUNS |= rates.runs(ADAMW | MUON, RECORDS, score, make) | at_known_rates(ABOVE)
RUNS |= rates.runs(GROUPED, RECORDS, score, make) | at_known_rates(BASES)
RUNS |= rates.half_way(ADAMW, RECORDS, score, make)
