"""The sweep of results/pretrain_60m: grids of two rates, 1,000 steps of 32,768 tokens.

A method's matrices learn at lr, embeddings, head and norms at rest_lr. Rows are ordered so that a
sweep that is cut short has the most informative runs.
"""
CONFIG = "configs/60m_mora.py"
EVALUATE = ["data/c4_sample"]
COMMON = ["--batch_size=64", "--steps=1000", "--warmup=100", "--log_every=50", "--eval_every=1000",
          "--save_every=1000", "--keep=1", "--micro_batch=64", "--residual_init=true"]
METHODS = {
    "full": ["--method=full"],
    "frozen": ["--method=frozen"],  # embeddings, head and norms learn, always by AdamW
    "lora": ["--method=lora", "--rank=32"],
    "mora_share": ["--method=mora", "--rank=32"],
    "remora_permute": ["--method=mora", "--rank=32", "--groups=permute", "--restart_every=100",
                       "--restart_warmup=0"],
    "remora_alternate": ["--method=mora", "--rank=32", "--groups=alternate", "--restart_every=200"],
    "relora": ["--method=lora", "--rank=32", "--restart_every=200"],
}


def runs(method, optimizer, rates, rest_rates, seed=1337, **more):
    """Return {name: (config, words)} of a grid."""
    words = [*COMMON, *METHODS[method], f"--optimizer={optimizer}", f"--seed={seed}",
             *(f"--{key}={value}" for key, value in more.items())]
    options = "".join(f"-{key}{value}" for key, value in more.items())
    return {f"{method}-{optimizer}-{lr:g}-{rest:g}-s{seed}{options}":
            (CONFIG, [*words, f"--lr={lr}", f"--rest_lr={rest}"])
            for lr in rates for rest in rest_rates}


def longer(method, optimizer, lr, rest_lr, seed, steps):
    """As runs, of one run with more steps of 32,768 tokens."""
    return runs(method, optimizer, [lr], [rest_lr], seed, steps=steps, eval_every=steps,
                save_every=steps)


BEST = {("full", "muon"): (2e-3, 3.2e-2), ("lora", "muon"): (4e-3, 3.2e-2),
        ("mora_share", "muon"): (2e-3, 3.2e-2), ("remora_permute", "muon"): (4e-3, 6.4e-2),
        ("full", "adamw"): (1e-3, 1.6e-2), ("lora", "adamw"): (2e-3, 4e-3),
        ("mora_share", "adamw"): (1e-3, 1.6e-2), ("remora_alternate", "muon"): (2e-3, 6.4e-2),
        ("relora", "muon"): (4e-3, 3.2e-2), ("remora_permute", "adamw"): (1e-3, 8e-3)}

RUNS = {
    # FP8 or not, three seeds each
    **runs("mora_share", "muon", [2e-3], [1.6e-2]),
    **runs("mora_share", "muon", [2e-3], [1.6e-2], matmul="fp8"),
    **runs("full", "muon", [2e-3], [1.6e-2], matmul="fp8"),
    **runs("mora_share", "muon", [2e-3], [1.6e-2], seed=1, matmul="fp8"),
    **runs("mora_share", "muon", [2e-3], [1.6e-2], seed=1),
    **runs("full", "muon", [2e-3], [1.6e-2], seed=1, matmul="fp8"),
    **runs("full", "muon", [2e-3], [1.6e-2], seed=1),
    **runs("mora_share", "muon", [2e-3], [1.6e-2], seed=2, matmul="fp8"),
    **runs("full", "muon", [2e-3], [1.6e-2], seed=2, matmul="fp8"),
    **runs("mora_share", "muon", [2e-3], [1.6e-2], seed=2),
    **runs("full", "muon", [2e-3], [1.6e-2], seed=2),
    # Muon: a cross around the best so far, one factor of 2 to each side of both rates
    **runs("remora_permute", "muon", [4e-3], [3.2e-2, 6.4e-2, 0.128]),
    **runs("remora_permute", "muon", [2e-3, 8e-3], [6.4e-2]),
    **runs("lora", "muon", [4e-3], [1.6e-2, 3.2e-2, 6.4e-2]),
    **runs("lora", "muon", [2e-3, 8e-3], [3.2e-2]),
    **runs("mora_share", "muon", [2e-3], [1.6e-2, 3.2e-2, 6.4e-2]),
    **runs("mora_share", "muon", [1e-3, 4e-3], [3.2e-2]),
    **runs("full", "muon", [2e-3], [1.6e-2, 3.2e-2, 6.4e-2, 0.128]),
    **runs("full", "muon", [1e-3, 4e-3], [3.2e-2, 6.4e-2]),
    **runs("full", "muon", [8e-3], [6.4e-2]), **runs("full", "muon", [4e-3], [0.128]),
    **runs("remora_permute", "muon", [4e-3], [6.4e-2], seed=1),
    **runs("remora_permute", "muon", [4e-3], [6.4e-2], seed=2),
    **runs("lora", "muon", [4e-3], [3.2e-2], seed=1),
    **runs("lora", "muon", [4e-3], [3.2e-2], seed=2),
    **runs("relora", "muon", [4e-3], [1.6e-2, 3.2e-2, 6.4e-2]),
    **runs("relora", "muon", [2e-3, 8e-3], [3.2e-2]),
    **runs("remora_alternate", "muon", [2e-3], [3.2e-2, 6.4e-2, 0.128]),
    **runs("remora_alternate", "muon", [1e-3, 4e-3], [6.4e-2]),
    **runs("frozen", "adamw", [1e-3], [8e-3, 1.6e-2, 3.2e-2, 6.4e-2]),
    # restarts every 50 and 200 steps (nothing gained so far)
    **runs("remora_permute", "muon", [4e-3], [3.2e-2], restart_every=50),
    **runs("remora_permute", "muon", [4e-3], [3.2e-2], restart_every=200),
    # AdamW
    **runs("full", "adamw", [1e-3], [8e-3, 1.6e-2, 3.2e-2]),
    **runs("full", "adamw", [5e-4, 2e-3], [1.6e-2]),
    **runs("mora_share", "adamw", [1e-3], [8e-3, 1.6e-2, 3.2e-2]),
    **runs("mora_share", "adamw", [5e-4, 2e-3], [1.6e-2]),
    **runs("lora", "adamw", [2e-3], [2e-3, 4e-3, 8e-3, 1.6e-2]),
    **runs("lora", "adamw", [1e-3, 4e-3], [4e-3, 8e-3]),
    **runs("remora_permute", "adamw", [1e-3], [8e-3, 1.6e-2]),
    **runs("remora_permute", "adamw", [5e-4], [8e-3, 1.6e-2]),
    **runs("remora_alternate", "adamw", [5e-4, 1e-3], [8e-3, 1.6e-2]),
    **runs("relora", "adamw", [1e-3, 2e-3], [8e-3, 1.6e-2]),
    # 25 % of the block parameters
    **runs("lora", "muon", [4e-3], [3.2e-2], rank=80),
    **runs("mora_share", "muon", [2e-3], [3.2e-2], rank=80),
}

# 66 M tokens, three seeds, at the best rates of the grids; 131 M for four methods
for seed in (1337, 1, 2):
    for (method, optimizer), rates in BEST.items():
        RUNS |= longer(method, optimizer, *rates, seed, 2000)
for method in ("full", "lora", "mora_share", "remora_permute"):
    RUNS |= longer(method, "muon", *BEST[method, "muon"], 1337, 4000)
