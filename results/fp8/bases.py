"""Loss of an untrained model whose block weights were rounded as a base_dtype rounds them.

    python results/fp8/bases.py MODEL TEXT.json.gz    16 sequences of 512 tokens from its first rows

The computation is float32 throughout: only the rounding of the weights differs.
"""
import copy
import gzip
import itertools
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import checkpoint
from model import block_linears, quantize_rows


def rounded(weight, base):
    """The weight after rounding to float32, bfloat16 or e4m3 with a scale per row (float8)."""
    if base == "float8":
        numbers, scale = quantize_rows(weight)
        return numbers.float() * scale
    return weight.to(getattr(torch, base)).float()


@torch.no_grad()
def loss(model, ids, base):
    model = copy.deepcopy(model)
    for layer in block_linears(model).values():
        layer.weight.copy_(rounded(layer.weight, base))
    return sum(model(rows[:, :-1], rows[:, 1:]).item() for rows in ids.split(4)) / 4


if __name__ == "__main__":
    model, tok, _ = checkpoint.load(sys.argv[1])
    with gzip.open(sys.argv[2], "rt") as file:
        texts = [json.loads(line)["text"] for line in itertools.islice(file, 60)]
    ids = [int(token) for text in texts for token in tok.encode(text)]
    ids = torch.tensor(ids[:16 * 513]).view(16, 513)
    print(json.dumps({base: round(loss(model, ids, base), 4)
                      for base in ("float32", "bfloat16", "float8")}))
