"""The sweep of results/pretrain_60m: grids of two rates, then longer runs at the best of them.

A grid (see results/grid.py) has 1,000 steps of 32,768 tokens, 33 M. At its best rates follow 66 M
tokens with three seeds, and 131 M with one for some methods. The runs of earlier sweeps, in
sweep.jsonl beside this file, decide what is missing.
"""
from functools import partial
from pathlib import Path

import grid
import rates

FOLDER = Path(__file__).parent
CONFIG = "configs/60m_mora.py"
EVALUATE = ["data/c4_sample"]
COMMON = ["--batch_size=64", "--micro_batch=64", "--warmup=100", "--log_every=50", "--keep=1",
          "--residual_init=true"]
PERMUTE = ["--method=mora", "--groups=permute", "--restart_warmup=0"]
METHODS = {
    "full": ["--method=full"],
    "lora": ["--method=lora", "--rank=32"],
    "mora_share": ["--method=mora", "--rank=32"],
    "remora_permute": [*PERMUTE, "--rank=32", "--restart_every=100"],
    "best": [*PERMUTE, "--rank=32", "--restart_every=10", "--lora_rank=16"],  # configs/60m_best.py
    # the paper's share of warm-up in a cycle: 50 steps of 2,000
    "remora_alternate": ["--method=mora", "--rank=32", "--groups=alternate", "--restart_every=200",
                         "--restart_warmup=5"],
    "relora": ["--method=lora", "--rank=32", "--restart_every=200", "--restart_warmup=5"],
    # ten times that, and permuted groups without restarts
    "remora_alternate_warmup50": ["--method=mora", "--rank=32", "--groups=alternate",
                                  "--restart_every=200", "--restart_warmup=50"],
    "relora_warmup50": ["--method=lora", "--rank=32", "--restart_every=200",
                        "--restart_warmup=50"],
    "mora_permute": ["--method=mora", "--groups=permute", "--rank=32"],
    "frozen": ["--method=frozen"],  # embeddings, head and norms learn, always by AdamW
    # no adapter at all: one block instead of eight, 12.5 % of their parameters
    "full_one_block": ["--method=full", "--num_hidden_layers=1"],
    # 25 % of the block parameters
    "lora_r80": ["--method=lora", "--rank=80"],
    "mora_share_r80": ["--method=mora", "--rank=80"],
    "best_r80": [*PERMUTE, "--rank=80", "--restart_every=10", "--lora_rank=40"],
    # the best ReMoRA with AdamW, at r = 80
    "remora_alternate_r80": ["--method=mora", "--rank=80", "--groups=alternate",
                             "--restart_every=200", "--restart_warmup=5"],
}
# {(method, optimizer): (lr, rest_lr) where its grid starts}, the most important first
MUON = {("full", "muon"): (2e-3, 3.2e-2), ("best", "muon"): (4e-3, 3.2e-2),
        ("lora", "muon"): (4e-3, 3.2e-2), ("mora_share", "muon"): (2e-3, 3.2e-2),
        ("remora_permute", "muon"): (4e-3, 6.4e-2), ("remora_alternate", "muon"): (4e-3, 6.4e-2),
        ("relora", "muon"): (4e-3, 1.6e-2)}
ADAMW = {("full", "adamw"): (1e-3, 1.6e-2), ("best", "adamw"): (1e-3, 1.6e-2),
         ("lora", "adamw"): (2e-3, 1.6e-2), ("mora_share", "adamw"): (1e-3, 1.6e-2),
         ("remora_permute", "adamw"): (1e-3, 1.6e-2),
         ("remora_alternate", "adamw"): (1e-3, 1.6e-2), ("relora", "adamw"): (4e-3, 1.6e-2),
         ("frozen", "adamw"): (1e-3, 6.4e-2)}
OTHERS = {("full_one_block", "muon"): (4e-3, 3.2e-2), ("best_r80", "muon"): (4e-3, 3.2e-2),
          ("lora_r80", "muon"): (4e-3, 3.2e-2), ("mora_share_r80", "muon"): (2e-3, 3.2e-2)}
ADAMW_R80 = {("lora_r80", "adamw"): (4e-3, 3.2e-2), ("mora_share_r80", "adamw"): (1e-3, 1.6e-2),
             ("remora_alternate_r80", "adamw"): (1e-3, 1.6e-2)}
# one run of 33 M tokens each, at least
CHECKS = {("relora_warmup50", "muon"): (4e-3, 3.2e-2), ("mora_permute", "muon"): (4e-3, 6.4e-2),
          ("remora_alternate_warmup50", "muon"): (4e-3, 6.4e-2)}
CENTRES = MUON | ADAMW | OTHERS | ADAMW_R80 | CHECKS
LONGEST = {(method, "muon") for method in ("full", "lora", "mora_share", "best")}
SEED, MORE_SEEDS = 1337, (1, 2)
STEPS = 1000  # of the runs of a grid


def name_of(group, point, seed=SEED, steps=STEPS):
    """Return the name of a run; group: (method, optimizer); point: see grid.py."""
    lr, rest_lr = grid.rates_at(CENTRES[group], point)
    name = f"{'-'.join(group)}-{lr:g}-{rest_lr:g}-s{seed}"
    return name if steps == STEPS else f"{name}-steps{steps}"


def run(group, point, seed=SEED, steps=STEPS):
    """Return {name: (config, words)} of one run."""
    (method, optimizer), (lr, rest_lr) = group, grid.rates_at(CENTRES[group], point)
    eval_every = steps if steps == STEPS else steps // 8
    words = [*COMMON, *METHODS[method], f"--optimizer={optimizer}", f"--seed={seed}",
             f"--lr={lr}", f"--rest_lr={rest_lr}", f"--steps={steps}", f"--save_every={steps}",
             f"--eval_every={eval_every}"]
    return {name_of(group, point, seed, steps): (CONFIG, words)}


def search(group, records):
    """Return (the best point of a group, its neighbours that have not been tried)."""
    return grid.search(partial(name_of, group), records, has_lr=group[0] != "frozen")


def plan(records):
    """Return RUNS: the checks; of each other set of groups what its grids lack, then long runs."""
    runs = {}
    for group in CHECKS:
        runs |= run(group, (0, 0))
    for groups in (MUON, OTHERS, ADAMW, ADAMW_R80):
        best = {}  # {group: best point} of the grids that are closed
        for group in groups:
            point, missing = search(group, records)
            for neighbour in missing:
                runs |= run(group, neighbour)
            if not missing:
                best[group] = point
        for group, point in best.items():
            runs |= run(group, point, steps=2000)
        for group, point in best.items():
            if group in LONGEST:
                runs |= run(group, point, steps=4000)
        for seed in MORE_SEEDS:
            for group, point in best.items():
                runs |= run(group, point, seed, steps=2000)
    return runs


RUNS = plan(rates.read(FOLDER / "sweep.jsonl"))
