"""Variants that may close the gap, at 60m: 1,000 steps of 32,768 tokens, by promise.

    python results/sweep.py results/close_gap/plan.py OUT --per_gpu=3

Known before: permuted groups, restarts every 100, rates 4e-3 and 6.4e-2: perplexity 50.3 (seed
1337), full rank 40.2. The baseline is the first run here, since machines and code differ.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from variants import applied

CONFIG = "configs/60m_mora.py"
EVALUATE = ["data/c4_sample"]
COMMON = ["--batch_size=64", "--steps=1000", "--warmup=100", "--log_every=50", "--eval_every=1000",
          "--save_every=1000", "--keep=1", "--micro_batch=64", "--residual_init=true",
          "--optimizer=muon", "--seed=1337"]
CYCLES = ["--method=mora", "--rank=32", "--groups=permute", "--restart_warmup=0"]
FULL = ["--method=full"]


def run(variant, lr=4e-3, rest_lr=6.4e-2, words=CYCLES, restart_every=100, **more):
    """Return {name: (config, words)}. The name's first word is the variant, see PREPARE."""
    every = [] if words is FULL else [f"--restart_every={restart_every}"]
    options = [f"--{key}={value}" for key, value in more.items()]
    name = " ".join([variant, f"{lr:g}", f"{rest_lr:g}", *(word[2:] for word in every + options)])
    rates = [f"--lr={lr}", f"--rest_lr={rest_lr}"]
    return {name: (CONFIG, [*COMMON, *words, *every, *rates, *options])}


def PREPARE(name):
    return applied(name.split()[0])


RUNS = {
    **run("none"),
    # random dense maps, and those without the gradient's largest directions
    **run("maps=random:2"), **run("maps=bulk:2"),
    # a tenth of the steps at full rank, then permuted groups: alone and with the best maps
    **run("warm=100"), **run("maps=random:2,warm=100"),
    # more of the budget for attention, or for the MLP
    **run("budget=q_proj:2;k_proj:2;v_proj:2;o_proj:2"),
    **run("budget=gate_proj:2;up_proj:2;down_proj:2"),
    # the frozen weights: smaller, and forgotten
    **run("init_std=0.5"), **run("noise_decay=0.8"),
    # the gradient's largest directions: 1.2e-3 gives dW the spectral norm of full rank's steps
    **run("maps=svd:2", lr=2e-3), **run("maps=half:2", lr=4e-3),
    # neighbour rates of what changes the scale of an update
    **run("maps=random:2", lr=8e-3), **run("maps=bulk:2", lr=8e-3),
    **run("stagger=8", restart_every=12),
    **run("none", dora=True),
    # full rank of a part at a time
    **run("full_layer=block:25", lr=4e-3, rest_lr=3.2e-2, words=FULL),
    **run("full_layer=block:100", lr=4e-3, rest_lr=3.2e-2, words=FULL),
    **run("blocks", lr=8e-3), **run("blocks", lr=1.6e-2),
    **run("two_maps=permute"),
    **run("base_decay=0.9"),
    **run("cycle_lr=0.5:1.5:100"),
    **run("keep_momentum=1"),
    **run("init_std=0.5", lr=2e-3, rest_lr=3.2e-2, words=FULL),
}
