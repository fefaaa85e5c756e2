"""The sweep of results/continual: continual pretraining of a 135M model on two domains.

Biomedical text once, 212 steps of 32 x 1,024 tokens; finance three times, 209 steps of 16 x 1,024.
The runs that are done, in sweep.jsonl beside this file, decide which rates and seeds follow.
"""
from pathlib import Path

import answered
import rates

FOLDER = Path(__file__).parent
CONFIG = "configs/continual.py"
EVALUATE = ["data/wiki_val"]  # what is forgotten
DOMAINS = {"biomed": {"steps": 212, "batch_size": 32, "tokens": 6_965_399},
           "finance": {"steps": 209, "batch_size": 16, "tokens": 1_143_453}}
WARMUP, SEQ_LEN = 20, 1024
# {(method, optimizer): rate in the middle}: the best of results/gsm8k where it has one
CENTRES = {("mora_r8", "adamw"): 1e-2, ("lora_r8", "adamw"): 1e-2, ("mora_r256", "adamw"): 1e-3,
           ("lora_r256", "adamw"): 1e-3, ("fft", "adamw"): 3e-4, ("dora_r8", "adamw"): 1e-2,
           ("mora_r8", "muon"): 1e-2, ("lora_r8", "muon"): 1e-2}
GROUPS = {(domain, *group): lr for domain in DOMAINS for group, lr in CENTRES.items()}


def PREPARE(name):
    """Evaluate without torch.compile: other numbers of rows would be compiled for two passes."""
    return answered.losses()


def score(record):
    """What chooses a rate: the loss on the domain's validation text."""
    return (record["val_loss"],)


def make(group, lr, seed, steps=0):
    """Return (config file, words) of a run."""
    (domain, method, optimizer), setting = group, DOMAINS[group[0]]
    steps, batch = steps or setting["steps"], setting["batch_size"]
    # (DoRA is LoRA's variant with trained lengths of rows)
    words = ["lora_r8", "--dora"] if method == "dora_r8" else [method]
    return CONFIG, [*words, f"--data=data/{domain}", f"--optimizer={optimizer}", f"--lr={lr}",
                    f"--seed={seed}", f"--seq_len={SEQ_LEN}", f"--batch_size={batch}",
                    f"--micro_batch={batch}", f"--steps={steps}", f"--warmup={WARMUP}",
                    f"--eval_every={steps}", f"--save_every={steps}", "--keep=1",
                    "--base_dtype=float32"]


# the untrained model: one step at a rate that changes no weight
RUNS = {f"{domain}-base": make((domain, "fft", "adamw"), 1e-30, rates.SEED, steps=1)
        for domain in DOMAINS}
RECORDS = {name: record for name, record in rates.read(FOLDER / "sweep.jsonl").items()
           if name not in RUNS}
RUNS |= rates.runs(GROUPS, RECORDS, score, make)
