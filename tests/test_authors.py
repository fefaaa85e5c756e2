"""The authors' map, written down a second time."""
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapters as authors
import checkpoint
import merge
from config import UserError


def their_forward(kind, M, x, d):
    """The authors' map of one input vector, feature by feature: what kongds/MoRA's layer computes in training."""
    k, r = len(x), len(M)
    if kind in (2, 3):  # neighbours, the first k mod r groups one larger
        groups, rest = [], list(x)
        for g in range(r):
            size = k // r + (g < k % r)
            groups.append(sum(rest[:size], torch.zeros((), dtype=x.dtype)))
            rest = rest[size:]
        hidden = [torch.stack(groups)]
    else:
        filled = list(x)
        while len(filled) % r:  # what is missing is taken from the front again
            filled.append(x[len(filled) - k])
        pieces = [torch.stack(filled[i:i + r]) for i in range(0, len(filled), r)]
        hidden = [sum(pieces)] if kind in (1, 4) else []
        for p, piece in enumerate(pieces if kind == 6 else ()):
            pairs = [complex(piece[j], piece[j + r // 2]) * complex(math.cos(p * 10000 ** (-2 * j / r)), math.sin(p * 10000 ** (-2 * j / r))) for j in range(r // 2)]
            hidden.append(torch.tensor([z.real for z in pairs] + [z.imag for z in pairs], dtype=x.dtype))
    y = torch.cat([M @ h for h in hidden])
    if kind in (2, 4):
        return torch.cat([y[g].repeat(d // r + (g < d % r)) for g in range(r)])
    return torch.cat([y] * (d // len(y) + 1))[:d]


@pytest.mark.parametrize("kind", authors.AUTHORS_TYPES)
@pytest.mark.parametrize("shape", [(70, 50, 12), (50, 130, 12), (24, 24, 6), (24, 48, 8), (48, 24, 16), (16, 200, 14), (200, 16, 14), (20, 22, 20), (20, 60, 26), (12, 9, 16)], ids=str)
def test_delta_is_their_forward(kind, shape):
    k, d, r = shape
    M = torch.randn(r, r, dtype=torch.float64)
    expected = torch.stack([their_forward(kind, M, x, d) for x in torch.eye(k, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(authors.authors_delta(kind, M, k, d), expected, rtol=1e-12, atol=1e-12)


def test_their_widths_and_what_crashes_there():
    # (in + out) r = 1025: sqrt is 32.02; 8192 * 8: 256; 15000 * 8: 346.4; 15096 * 8: 347.5, rounded up, odd
    widths = [authors.authors_r_hat(rank, k, d, kind) for rank, k, d, kind in ((5, 105, 100, 1), (8, 4096, 4096, 6), (8, 4096, 11008, 1), (8, 4096, 11008, 6), (1, 20, 23, 1))]
    assert widths == [32, 256, 348, 348, 7] and authors.authors_r_hat(1, 20, 23, 6) == 6
    for kind in (1, 4, 6):
        with pytest.raises(ValueError, match=f"mora_type {kind} wraps 4 inputs"):
            authors.authors_delta(kind, torch.zeros(10, 10), 4, 60)
    with pytest.raises(ValueError, match="even r\\^, got 5"):
        authors.authors_delta(6, torch.zeros(5, 5), 10, 10)


@pytest.mark.parametrize("kind", (1, 6))
def test_their_adapters_merge_here(run, tmp_path, kind):
    """A folder as their fork writes it, lora_B a second copy of lora_A; the merged weights are W + their map."""
    base, tensors = run("--method=full", "--steps=1") / "step-00000001" / "base", {}
    weights = load_file(base / "model.safetensors")
    targets = [name for name in weights if "self_attn.v_proj" in name or "up_proj" in name]
    for name in targets:
        r = authors.authors_r_hat(3, *reversed(weights[name].shape), kind)
        for key in ("lora_A", "lora_B"):
            tensors["base_model.model." + name.replace("weight", f"{key}.weight")] = torch.randn(r, r, generator=torch.Generator().manual_seed(r))
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 16, "use_mora": True, "mora_type": kind, "use_dora": False, "bias": "none", "init_lora_weights": True,
              "target_modules": ["v_proj", "up_proj"], "megatron_core": "megatron.core", "loftq_config": {}, "rank_pattern": {}, "lora_dropout": 0.0}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    merge.main([str(folder), str(tmp_path / "merged"), f"--base={base}"])
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, expected in weights.items():
        if name in targets:
            M = tensors["base_model.model." + name.replace("weight", "lora_A.weight")]
            expected = expected + torch.stack([their_forward(kind, M, x, len(expected)) for x in torch.eye(expected.shape[1])], dim=1)
        torch.testing.assert_close(merged[name], expected)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 1000, "mora_type": 1}))
    with pytest.raises(UserError, match="up_proj: mora_type 1 wraps 16 inputs"):
        checkpoint.load(folder, base)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors[next(key for key in tensors if "lora_B" in key)] += 1
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="a lora_B that is not its lora_A"):
        checkpoint.load(folder, base)
