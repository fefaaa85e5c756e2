"""The sweep of results/continual: continual pretraining of a 135M model on two domains.

Biomedical text once, 212 steps of 32 x 1,024 tokens; finance three times, 209 steps of 16 x 1,024.
The paper's methods with AdamW come first, then groups chosen by the gradient beside others of the
same rank (biomedical text alone), then Muon, then the rates half way from the best ones of LoRA,
MoRA and permuted share to their neighbours. The runs that are done, in sweep.jsonl beside this
file, decide which rates and seeds follow.
"""
from pathlib import Path

import answered
import rates

FOLDER = Path(__file__).parent
CONFIG = "configs/continual.py"
EVALUATE = ["data/wiki_val"]  # measures what is forgotten
DOMAINS = {"biomed": {"steps": 212, "batch_size": 32, "tokens": 6_965_399},
           "finance": {"steps": 209, "batch_size": 16, "tokens": 1_143_453}}
WARMUP, SEQ_LEN = 20, 1024
MICRO_BATCH = 16  # so that three runs of full fine-tuning have room on a GPU of 80 GB
SPECTRA, RESUMES = (), True
# {method: rate in the middle}: the best of results/gsm8k where it has one
ADAMW = {"mora_r8": 1e-2, "lora_r8": 1e-2, "mora_r256": 1e-3, "lora_r256": 1e-3, "fft": 3e-4,
         "dora_r8": 1e-2}
GROUPED = {"truncate_gradient_r8": 1e-2, "share_gradient_r8": 3e-3, "share_permute_r8": 3e-3,
           "share_strided_r8": 3e-3, "truncate_gradient_r32": 3e-3, "share_gradient_r32": 1e-3,
           "rotate_strided_r32": 3e-3, "lora_r32": 1e-2,
           "share_strided_r32": 3e-3, "share_permute_r32": 3e-3}
MUON = {"mora_r8": 1e-2, "lora_r8": 1e-2}
TIERS = [{(domain, method, "adamw"): lr for domain in DOMAINS for method, lr in ADAMW.items()},
         {("biomed", method, "adamw"): lr for method, lr in GROUPED.items()},
         {(domain, method, "muon"): lr for domain in DOMAINS for method, lr in MUON.items()}]
GROUPS = TIERS[0] | TIERS[1] | TIERS[2]
REFINED = [(domain, method, "adamw") for domain in DOMAINS
           for method in ("lora_r8", "mora_r8", "lora_r256", "mora_r256")]
REFINED += [("biomed", "share_permute_r8", "adamw"), *TIERS[2]]


def words_of(method):
    """Return a variant of the config file and the keys that differ from it."""
    if method == "dora_r8":  # DoRA is LoRA's variant with trained lengths of rows
        return ["lora_r8", "--dora"]
    if method == "lora_r32":  # scaled as at r = 8
        return ["lora_r8", "--rank=32", "--alpha=64"]
    if method in GROUPED:
        return rates.operator_words(method)
    return [method]


def PREPARE(name):
    """Evaluate without torch.compile, which would compile anew for the evaluation's batches."""
    return answered.losses()


def score(record):
    """Return what chooses a rate: the loss on the domain's validation text."""
    return (record["val_loss"],)


def make(group, lr, seed, steps=None):
    """Return (config file, words) of a run; steps: default, the domain's."""
    domain, method, optimizer = group
    if steps is None:
        steps = DOMAINS[domain]["steps"]
    return CONFIG, [*words_of(method), f"--data=data/{domain}", f"--optimizer={optimizer}",
                    f"--lr={lr}", f"--seed={seed}", f"--seq_len={SEQ_LEN}",
                    f"--batch_size={DOMAINS[domain]['batch_size']}",
                    f"--micro_batch={MICRO_BATCH}", f"--steps={steps}",
                    f"--warmup={WARMUP}", f"--eval_every={steps}", f"--save_every={steps}",
                    "--keep=1", "--base_dtype=float32"]


# the untrained model: one step at a rate that changes no weight
RUNS = {f"{domain}-base": make((domain, "fft", "adamw"), 1e-30, rates.SEED, steps=1)
        for domain in DOMAINS}
RECORDS = {name: record for name, record in rates.read(FOLDER / "sweep.jsonl").items()
           if name not in RUNS}
for tier in TIERS:
    RUNS |= rates.runs(tier, RECORDS, score, make)
RUNS |= rates.half_way(REFINED, RECORDS, score, make)
