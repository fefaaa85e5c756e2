"""Variants that may close the gap, at 60m: 1,000 steps of 32,768 tokens, the most promising first.

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
LORA = ["--method=lora", "--rank=32", "--restart_warmup=0"]
FULL = ["--method=full"]


def run(variant, lr=4e-3, rest_lr=6.4e-2, words=CYCLES, restart_every=100, **more):
    """Return {name: (config, words)}. The name's first word is the variant, see PREPARE."""
    restarts = []
    if restart_every and words is not FULL:
        restarts = [f"--restart_every={restart_every}"]
    options = [f"--{key}={value}" for key, value in more.items()]
    method = words[0].removeprefix("--method=")
    name = " ".join([variant, method, f"{lr:g}", f"{rest_lr:g}",
                     *(word.removeprefix("--") for word in restarts + options)])
    rates = [f"--lr={lr}", f"--rest_lr={rest_lr}"]
    return {name: (CONFIG, [*COMMON, *words, *restarts, *rates, *options])}


def mixed(value, rest_lr=3.2e-2, restart_every=10, **more):
    """Return run() of the variant mixed, with its usual settings."""
    return run(f"mixed={value}", rest_lr=rest_lr, restart_every=restart_every, **more)


def PREPARE(name):
    return applied(name.split()[0])


RUNS = {
    # LoRA that stays plus MoRA that restarts: far ahead in the tiny probe, with short cycles and a
    # small share of LoRA. LoRA is best at rest_lr 3.2e-2, permuted groups at 6.4e-2
    **mixed("0.25:2"), **mixed("0.25"), **mixed("0.125:2"), **mixed("0.5"),
    **mixed("0.25:2", restart_every=25), **mixed("0.25:2", restart_every=5),
    **mixed("0.25:2", rest_lr=6.4e-2), **mixed("0.25:2", lr=8e-3), **mixed("0.25:2", lr=2e-3),
    **mixed("0.25:4"), **mixed("0.25:2", restart_every=50), **mixed("0.25:2", rank=80),
    **run("none"), **run("none", rest_lr=3.2e-2, words=LORA, restart_every=0),
    # the share that LoRA has, and how often MoRA restarts beside it: 0 is never
    **mixed("0.5", restart_every=0), **mixed("0.5", restart_every=50), **mixed("0.75"),
    **mixed("0.5", seed=1), **mixed("0.5", seed=2),
    # few more parameters: scales of the rows of W + dW, weights of features in their groups; and
    # other rates of LoRA's B
    **run("none", dora=True), **run("weighted=1"),
    **run("none", rest_lr=3.2e-2, words=LORA, restart_every=0, lora_plus_ratio=4),
    **run("none", rest_lr=3.2e-2, words=LORA, restart_every=0, lora_plus_ratio=0.25),
    **mixed("0.25,warm=100"), **mixed("0.25,init_std=0.5"),
    # LoRA restarted without a new warm-up: is it the restart or the warm-up that hurts ReLoRA?
    **run("none", rest_lr=3.2e-2, words=LORA, restart_every=200),
    # random dense maps instead of folds; the gradient's largest directions: at 1.2e-3 dW has the
    # spectral norm of full rank's steps
    **run("maps=svd:2", lr=2e-3),
    # smaller frozen weights (full rank has the same offer), and forgotten ones
    **run("init_std=0.5", lr=2e-3, rest_lr=3.2e-2, words=FULL),
    **run("noise_decay=0.8"),
    # more of the budget for attention
    **run("budget=q_proj:2;k_proj:2;v_proj:2;o_proj:2"),
    # full rank of a part at a time
    **run("full_layer=block:25", rest_lr=3.2e-2, words=FULL),
    **run("stagger=8", restart_every=12),
    **run("cycle_lr=0.5:1.5:100"), **run("keep_momentum=1"),
}
