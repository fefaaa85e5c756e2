"""The sweep of results/pretrain_250m: rates on short runs, then 131 M tokens at the best of them.

The rates are those of results/pretrain_60m; on 200 steps of 65,536 tokens (13 M) each is checked by
a factor of 2 to each side, see results/grid.py. What is best for 200 steps need not be best for
2,000, so some methods have a long run at other rates, too: FURTHER. The runs of earlier sweeps, in
sweep.jsonl beside this file, decide what is missing. A long run takes 14 to 20 minutes of an H100
that two of them share.
"""
from functools import partial
from pathlib import Path

import grid
import rates

FOLDER = Path(__file__).parent
CONFIG = "configs/60m_mora.py"
EVALUATE = ["data/c4_sample"]
COMMON = ["--hidden_size=768", "--intermediate_size=2560", "--num_hidden_layers=24",
          "--num_attention_heads=16", "--batch_size=128", "--micro_batch=64", "--log_every=20",
          "--keep=1", "--residual_init=true", "--matmul=fp8"]
PERMUTE = ["--method=mora", "--rank=128", "--groups=permute", "--restart_every=10",
           "--restart_warmup=0"]
METHODS = {
    "full": ["--method=full"],
    "mora_share": ["--method=mora", "--rank=128"],
    "best": [*PERMUTE, "--lora_rank=64"],  # configs/250m_best.py
    "lora": ["--method=lora", "--rank=128"],
    "remora_alternate": ["--method=mora", "--rank=128", "--groups=alternate",
                         "--restart_every=400", "--restart_warmup=10"],
}
# {(method, optimizer): (lr, rest_lr) where its grid starts}
CENTRES = {("full", "muon"): (4e-3, 6.4e-2), ("mora_share", "muon"): (2e-3, 3.2e-2),
           ("best", "muon"): (4e-3, 3.2e-2), ("lora", "muon"): (4e-3, 3.2e-2),
           ("remora_alternate", "muon"): (2e-3, 3.2e-2),
           # restarts every ten steps are worse with AdamW (results/pretrain_60m): no "best"
           ("full", "adamw"): (1e-3, 1.6e-2), ("remora_alternate", "adamw"): (1e-3, 1.6e-2),
           # full rank and MoRA with AdamW had their best lr at a quarter of 60m's
           ("lora", "adamw"): (1e-3, 3.2e-2), ("mora_share", "adamw"): (1e-3, 1.6e-2)}
# a short run ends before the first restart, so that its grid would be the other method's again
GRID_OF = {("remora_alternate", optimizer): ("mora_share", optimizer)
           for optimizer in ("muon", "adamw")}
# {(method, optimizer): (lr, rest_lr) of one more long run}: with Muon those of the older logs of
# full rank and MoRA, with AdamW an lr between that of 200 steps and 60m's
FURTHER = {("lora", "muon"): (2e-3, 1.6e-2), ("best", "muon"): (2e-3, 1.6e-2),
           ("full", "adamw"): (5e-4, 3.2e-2), ("mora_share", "adamw"): (5e-4, 1.6e-2)}
# their grids and long runs come after all others'
LAST = [("lora", "adamw"), ("mora_share", "adamw")]
SHORT, LONG = 200, 2000  # steps
WARMUP = {SHORT: 40, LONG: 200}
SEED = 1337


def name_at(group, pair, steps):
    """Return the name of a run; group: (method, optimizer); pair: (lr, rest_lr)."""
    lr, rest_lr = pair
    return f"{'-'.join(group)}-{lr:g}-{rest_lr:g}-s{SEED}-steps{steps}"


def name_of(group, point, steps):
    """Return the name of a run at a point of its group's grid, see grid.py."""
    return name_at(group, grid.rates_at(CENTRES[group], point), steps)


def run(group, pair, steps):
    """Return {name: (config, words)} of one run."""
    (method, optimizer), (lr, rest_lr) = group, pair
    words = [*COMMON, *METHODS[method], f"--optimizer={optimizer}", f"--seed={SEED}", f"--lr={lr}",
             f"--rest_lr={rest_lr}", f"--steps={steps}", f"--warmup={WARMUP[steps]}",
             "--eval_every=250", f"--save_every={min(steps, 1000)}"]
    return {name_at(group, pair, steps): (CONFIG, words)}


def of_groups(groups, records):
    """Return {name: (config, words)}: what the grids lack, then the long runs of closed ones."""
    short_runs, long_runs = {}, {}
    for group in groups:
        grid_group = GRID_OF.get(group, group)
        point, missing = grid.search(partial(name_of, grid_group, steps=SHORT), records)
        for neighbour in missing:
            short_runs |= run(grid_group, grid.rates_at(CENTRES[grid_group], neighbour), SHORT)
        if not missing:
            long_runs |= run(group, grid.rates_at(CENTRES[group], point), LONG)
    return short_runs | long_runs


def plan(records):
    """Return RUNS: everything of the first groups, the long runs at further rates, that of LAST."""
    runs = of_groups([group for group in CENTRES if group not in LAST], records)
    for group, pair in FURTHER.items():
        runs |= run(group, pair, LONG)
    return runs | of_groups(LAST, records)


RUNS = plan(rates.read(FOLDER / "sweep.jsonl"))
SPECTRA = {name for name in RUNS if name.endswith(f"-steps{LONG}")}
