"""A model of equal GPU time: adapters in FP8 beside full rank in bf16 on 32.8 M tokens.

Quality is that of this folder's runs in bf16 (FP8 changes a loss by 0.001 to 0.002), speed that of
the 1.3b shape (results/fp8, bench.py on one H200), both with Muon. A step has 65,536 tokens per
GPU: the paper's 1,024 sequences of 512 on eight GPUs. Restarts are added to it. While full rank
trains on 32.8 M tokens, an adapter trains on `tokens_ratio` times as many; its perplexity there
lies on the line through its runs of 33 and 66 M tokens, in logarithms of both. "full" is full rank
in FP8.
"""
import json
import math
from pathlib import Path

import pretraining

FP8 = Path(__file__).parents[1] / "fp8"
# {method here: (rank of the same share of the 1.3b shape, method of bench.py, steps between
# restarts or 0)}
SPEEDS = {"full": (128, "full", 0), "mora_share": (128, "mora", 0), "lora": (128, "lora", 0),
          "remora_permute": (128, "remora_permute", 100), "best": (128, "mixed", 10),
          "mora_share_r80": (320, "mora", 0), "lora_r80": (320, "lora", 0),
          "best_r80": (320, "mixed", 10)}


def read_bench(name):
    """Return the numbers of a file of results/fp8."""
    return json.loads((FP8 / name).read_text())


def at_ratio(by_tokens, ratio):
    """Return the perplexity at `ratio` times 33 M tokens, or None if that is not between runs of 33
    and 66 M tokens at the same rates; by_tokens: {million tokens: [runs]}."""
    if 66 not in by_tokens or not 1 <= ratio <= 2:
        return None
    longer = pretraining.with_most_seeds(by_tokens[66])
    short = pretraining.at_rates_of(longer[0], by_tokens.get(33, ()))
    if not short:
        return None
    at_33 = pretraining.average(short, "val_ppl", 9)
    at_66 = pretraining.average(longer, "val_ppl", 9)
    return at_33 * (at_66 / at_33) ** math.log2(ratio)


def numbers(groups):
    """Return the flat numbers of the model; groups: {(method, optimizer): {M tokens: [runs]}}."""
    found = {}
    full = pretraining.token_seconds(read_bench("bench_65k_r128.json"), "1.3b.full_muon")
    for method, (rank, name, every) in SPEEDS.items():
        bench = read_bench(f"bench_65k_r{rank}.json")
        seconds = pretraining.token_seconds(bench, f"1.3b.{name}_muon_fp8", every)
        if not (full and seconds):
            continue
        ratio = full / seconds
        ppl = at_ratio(groups.get((method, "muon"), {}), ratio)
        if ppl:
            found |= {f"equal_time.{method}.tokens_ratio": round(ratio, 2),
                      f"equal_time.{method}.wiki_ppl": round(ppl, 2)}
    return found
