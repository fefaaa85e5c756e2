"""The tiny probe of the variants: 300 steps of a byte-level model, on a CPU.

    OMP_NUM_THREADS=1 python results/sweep.py results/close_gap/tiny/plan.py OUT --per_gpu=2
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from variants import applied

CONFIG = "configs/tiny_mora.py"
EVALUATE = []
COMMON = ["--eval_every=300", "--save_every=300", "--keep=1", "--log_every=25"]
CYCLES = ["--groups=permute", "--restart_every=25", "--restart_warmup=0"]
LORA = ["--method=lora"]
FULL = ["--method=full"]
NEVER = ["--restart_warmup=0", "--groups=strided"]
HALF = {"batch_size": 8, "steps": 600, "warmup": 80, "log_every": 50, "eval_every": 600,
        "save_every": 600}


def run(variant, rank=4, seed=1337, words=CYCLES, **more):
    """Return {name: (config, words)} of one run; rank 0: full rank."""
    ranks = [f"--rank={rank}"] if rank else []
    options = [f"--{key}={value}" for key, value in more.items()]
    name = " ".join([variant, f"r{rank}", f"s{seed}",
                     *(option.removeprefix("--") for option in options)])
    return {name: (CONFIG, [*COMMON, *words, *ranks, f"--seed={seed}", *options])}


def PREPARE(name):
    return applied(name.split()[0])


RUNS = {
    **run("none"), **run("none", 16), **run("none", 0, words=FULL),
    **run("maps=svd:2"), **run("maps=svd:1"),
    **run("full_layer=matrix:25:0.045", 0, words=FULL),
    **run("slices=21"),
    **run("maps=random:2"), **run("maps=sample:2"),
    **run("cycle_lr=2:0:25"), **run("merge_mean=10"), **run("slices=21", lr=4e-2),
    **run("fold_draw=signs"), **run("none", lr=2e-2), **run("none", operator="decouple", lr=2e-2),
    **run("maps=svd:2", lr=4e-3), **run("warm=30"),
    **run("budget=q_proj:2;k_proj:2;v_proj:2;o_proj:2"), **run("maps=bulk:2"),
    **run("mixed=0.5"), **run("none", words=LORA, method="lora"), **run("mixed=0.75"),
    **run("init_std=0.5"), **run("stagger=4", restart_every=6),
    **run("maps=random:2", 16), **run("none", dora=True), **run("blocks", lr=4e-2),
    **run("cycle_lr=0:2:25"), **run("noise_decay=0.9"),
    # an oracle: the momentum that full rank would have; other frozen weights, other products
    **run("none", restart_every=10), **run("full_momentum=1"),
    **run("full_momentum=1", restart_every=10), **run("full_momentum=1", restart_every=10, lr=5e-3),
    **run("full_momentum=1", restart_every=10, lr=2e-2),
    **run("hadamard=product", 8, words=NEVER), **run("hadamard=plus", 8, words=NEVER),
    **run("none", 8, words=LORA, method="lora"),
    **run("mixed=0.5:2,residual_std=0", restart_every=10),
    **run("mixed=0.5:2,init_std=0.5", restart_every=10),
    **run("mixed=0.5:2,noise_decay=0.9", restart_every=10),
    **run("mixed=0.5:2,orthogonal=1", restart_every=10),
    **run("mixed=0.5:2,init_std=2", restart_every=10),
    # the same tokens in batches of half the size
    **run("mixed=0.5:2", restart_every=10, **HALF), **run("mixed=0.5:2", restart_every=20, **HALF),
    **run("none", 0, words=FULL, **HALF), **run("none", 0, words=FULL, lr=5e-3, **HALF),
    # singular vectors of the mean gradient of many steps
    **run("maps=svd:2:0.98"), **run("maps=svd:2:0.98", lr=4e-3), **run("maps=half:2:0.98"),
    **run("maps=svd:2:0.9", restart_every=10), **run("maps=svd:2:0.9", restart_every=10, lr=5e-3),
    **run("maps=svd:2:0.9", restart_every=5, lr=5e-3), **run("maps=random:2", restart_every=10),
    **run("maps=svd:2:0.98", restart_every=10, lr=5e-3),
    **run("maps=sample:2:0.9", restart_every=10),
    **run("maps=svd:2:0.9", 16, restart_every=10, lr=5e-3),
    **run("maps_beside_lora=0.5:2:svd:2:0.9", restart_every=10),
    **run("maps_beside_lora=0.5:2:random:2", restart_every=10),
    **run("maps_beside_lora=0.5:2:sample:2:0.9", restart_every=10),
    **run("maps_beside_lora=0.5:4:svd:2:0.9", restart_every=10, lr=5e-3),
    **run("maps_beside_lora=0.25:4:svd:2:0.9", 16, restart_every=10, lr=5e-3),
    **run("two_maps=contiguous", words=NEVER), **run("none", words=NEVER, groups="strided"),
    **run("keep_momentum=1"),
}
