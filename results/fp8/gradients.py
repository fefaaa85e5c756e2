"""Error of an update's gradients in bfloat16 and in FP8, against float32 and two paths.

    python results/fp8/gradients.py [FILE]    two layers of the 1.3b shape, narrower on a CPU

The reference computes W x and dW x apart in float32. The error is the norm of the difference over
the norm of the reference, over the gradients of all matrices of the update.
"""
import copy
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import mora
from model import Llama, LlamaConfig, keep_in_fp8, use_fp8

WIDTHS = {"cuda": (2048, 5504, 32, 50304, 512), "cpu": (64, 96, 4, 257, 32)}
UPDATES = {"mora": {"method": "mora"}, "lora": {"method": "lora"}}


def adapted_model(device, options):
    """(model, token ids): an update that is not zero, as after some training."""
    hidden, ffn, heads, vocabulary, length = WIDTHS[device]
    cfg = LlamaConfig(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=ffn,
                      num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=heads)
    model = mora.adapt(Llama(cfg, seed=0), **{"rank": hidden // 16, **options})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in mora.adapter_parameters(model):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    ids = torch.randint(vocabulary, (8, length + 1), generator=generator)
    return model.to(device), ids.to(device)


def gradients(model, ids):
    """All gradients of the update, in one vector."""
    model(ids[:, :-1], ids[:, 1:]).backward()
    return torch.cat([p.grad.flatten().double() for _, p in mora.adapter_parameters(model)])


def errors(device, options):
    """{"bf16": relative error, "fp8": ..., "fp8_base": ...}; fp8_base: base_dtype float8."""
    model, ids = adapted_model(device, options)
    exact = copy.deepcopy(model)
    for _, layer in mora.adapted_layers(exact):
        layer.merges = False
    reference = gradients(exact, ids)
    result = {}
    for name, prepare in (("bf16", None), ("fp8", use_fp8), ("fp8_base", keep_in_fp8)):
        other = copy.deepcopy(model)
        other.compute_dtype = torch.bfloat16
        if prepare:
            prepare(other)
        if device == "cuda":
            other.compile_parts()
        difference = gradients(other, ids) - reference
        result[name] = (difference.norm() / reference.norm()).item()
        torch.compiler.reset()
    return result


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False
    found = {name: errors(device, options) for name, options in UPDATES.items()}
    for name, row in found.items():
        print(name, {key: round(value, 4) for key, value in row.items()})
    if sys.argv[1:]:
        Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")
