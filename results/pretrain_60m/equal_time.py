"""A model of equal GPU time: adapters in FP8 beside full rank in bf16 on 32.8 M tokens.

Quality is that of this folder's runs, speed that of the 1.3b shape (results/fp8, bench.py on one
H200), both with Muon. A step has 65,536 tokens per GPU: the paper's 1,024 sequences of 512 on eight
GPUs. Its seconds are those of the tokens with AdamW plus, once per step, the time that Muon adds to
a step of bench.py. While full rank trains on 32.8 M tokens, an adapter trains on `tokens_ratio`
times as many; its perplexity there lies on the line through its runs of 33 and 66 M tokens, in
logarithms of both.
"""
import json
import math
from pathlib import Path

import pretraining

FP8 = Path(__file__).parents[1] / "fp8"
BENCH_TOKENS, STEP_TOKENS = 16_384, 65_536
# {method here: (file of results/fp8, method of bench.py without optimizer, steps between restarts)}
SPEEDS = {"full": ("bench_h200.json", "full", 0),  # full rank in FP8, beside that in bf16
          "mora_share": ("bench_h200.json", "mora", 0),
          "lora": ("bench_h200.json", "lora", 0),
          "remora_permute": ("bench_h200.json", "remora_permute", 100),
          "best": ("bench_h200.json", "mixed", 10),
          "mora_share_r80": ("bench_h200_r320.json", "mora", 0),
          "lora_r80": ("bench_h200_r320.json", "lora", 0),
          "best_r80": ("bench_h200_r320.json", "mixed", 10)}


def step_seconds(bench, method, products="", every=0):
    """Return the seconds of a step with Muon, or None if bench lacks a speed; products: "" or
    "_fp8"; every: steps between two restarts, 0 without them."""
    adamw = bench.get(f"1.3b.{method}{products}.tokens_per_s")
    muon = bench.get(f"1.3b.{method}_muon{products}.tokens_per_s")
    restart_ms = bench.get(f"1.3b.{method}{products}.restart_ms") if every else 0.0
    if not (adamw and muon) or restart_ms is None:  # bench.py --quick times no restarts
        return None
    seconds = STEP_TOKENS / adamw + BENCH_TOKENS * (1 / muon - 1 / adamw)
    if every:
        seconds += restart_ms / 1000 / every
    return seconds


def read_bench(name):
    """Return the numbers of a file of results/fp8, {} if it does not exist."""
    return json.loads((FP8 / name).read_text()) if (FP8 / name).exists() else {}


def at_ratio(by_tokens, ratio):
    """Return the perplexity at `ratio` times 33 M tokens, or None without runs of both lengths at
    the same rates; by_tokens: {million tokens: [runs]}."""
    if 66 not in by_tokens:
        return None
    longer = pretraining.with_most_seeds(by_tokens[66])
    short = [run for run in by_tokens.get(33, ())
             if pretraining.rates_of(run) == pretraining.rates_of(longer[0])]
    if not short:
        return None
    at_33 = pretraining.average(short, "val_ppl", 9)
    at_66 = pretraining.average(longer, "val_ppl", 9)
    return at_33 * (at_66 / at_33) ** math.log2(ratio)


def numbers(groups):
    """Return the flat numbers of the model; groups: {(method, optimizer): {M tokens: [runs]}}."""
    found = {}
    full = step_seconds(read_bench("bench_h200.json"), "full")
    for method, (file, name, every) in SPEEDS.items():
        seconds = step_seconds(read_bench(file), name, "_fp8", every)
        if not (full and seconds):
            continue
        ratio = full / seconds
        ppl = at_ratio(groups.get((method, "muon"), {}), ratio)
        if ppl:
            found |= {f"equal_time.{method}.tokens_ratio": round(ratio, 2),
                      f"equal_time.{method}.wiki_ppl": round(ppl, 2)}
    return found
