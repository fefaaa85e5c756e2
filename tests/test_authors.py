"""The map of the authors' fork (kongds/MoRA), written a second time, feature by feature."""
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapters
import checkpoint
import merge
from config import UserError


def pieces_filled_from_the_front(x, r):
    filled = list(x)
    while len(filled) % r:
        filled.append(x[len(filled) - len(x)])
    return [torch.stack(filled[i:i + r]) for i in range(0, len(filled), r)]


def rotated(piece, p):
    """A piece with its pairs (j, j + r/2) rotated by p * 10000^(-2j/r)."""
    r = len(piece)
    pairs = []
    for j in range(r // 2):
        angle = p * 10000 ** (-2 * j / r)
        pair = complex(piece[j], piece[j + r // 2])
        pairs.append(pair * complex(math.cos(angle), math.sin(angle)))
    return torch.tensor([z.real for z in pairs] + [z.imag for z in pairs], dtype=piece.dtype)


def their_forward(kind, M, x, d):
    """What kongds/MoRA's layer adds for one input vector x in training."""
    k, r = len(x), len(M)
    if kind in (2, 3):  # groups of neighbours, the first k mod r are one larger
        groups, rest = [], list(x)
        for g in range(r):
            size = k // r + (g < k % r)
            groups.append(sum(rest[:size], torch.zeros((), dtype=x.dtype)))
            rest = rest[size:]
        compressed = [torch.stack(groups)]
    elif kind == 6:
        pieces = pieces_filled_from_the_front(x, r)
        compressed = [rotated(piece, p) for p, piece in enumerate(pieces)]
    else:
        compressed = [sum(pieces_filled_from_the_front(x, r))]
    y = torch.cat([M @ h for h in compressed])
    if kind in (2, 4):
        return torch.cat([y[g].repeat(d // r + (g < d % r)) for g in range(r)])
    return torch.cat([y] * (d // len(y) + 1))[:d]


def their_delta(kind, M, k, d):
    """dW (d, k), column by column."""
    columns = [their_forward(kind, M, x, d) for x in torch.eye(k, dtype=M.dtype)]
    return torch.stack(columns, dim=1)


SHAPES = [(70, 50, 12), (50, 130, 12), (24, 24, 6), (24, 48, 8), (48, 24, 16), (16, 80, 14),
          (80, 16, 14), (20, 22, 20), (20, 60, 26), (12, 9, 16)]


@pytest.mark.parametrize("kind", adapters.AUTHORS_TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_delta_is_their_forward(kind, shape):
    k, d, r = shape
    M = torch.randn(r, r, dtype=torch.float64)
    update = adapters.AuthorsSquare(k, d, r * r / (k + d), kind).double()
    update.A.data.copy_(M)
    torch.testing.assert_close(update.delta(), their_delta(kind, M, k, d), rtol=1e-12, atol=1e-12)


# (rank, in, out, type, r^): sqrt(1025) is 32.02; sqrt(120768) is 347.5, rounded up
WIDTHS = [(5, 105, 100, 1, 32), (8, 4096, 4096, 6, 256), (8, 4096, 11008, 1, 348),
          (8, 4096, 11008, 6, 348), (1, 20, 23, 1, 7), (1, 20, 23, 6, 6)]


@pytest.mark.parametrize("rank, k, d, kind, width", WIDTHS)
def test_their_widths(rank, k, d, kind, width):
    assert adapters.authors_r_hat(rank, k, d, kind) == width


@pytest.mark.parametrize("kind", (1, 4, 6))
def test_a_width_on_which_their_forward_fails_is_refused(kind):
    with pytest.raises(ValueError, match=f"mora_type {kind} wraps 4 inputs"):
        adapters.AuthorsSquare(4, 60, 2, kind)


CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 16, "use_mora": True, "use_dora": False,
          "bias": "none", "init_lora_weights": True, "target_modules": ["v_proj", "up_proj"],
          "megatron_core": "megatron.core", "loftq_config": {}, "rank_pattern": {},
          "lora_dropout": 0.0}


@pytest.fixture
def base(run):
    return run("--method=full", "--steps=1") / "step-00000001" / "base"


def write_authors_adapter(folder, base, kind):
    """Write a folder as their fork does, lora_B a second copy of lora_A; returns {name: M}."""
    matrices, tensors = {}, {}
    for name, weight in load_file(base / "model.safetensors").items():
        if "self_attn.v_proj" in name or "up_proj" in name:
            r = adapters.authors_r_hat(3, weight.shape[1], weight.shape[0], kind)
            M = torch.randn(r, r, generator=torch.Generator().manual_seed(r))
            layer = "base_model.model." + name.removesuffix(".weight")
            tensors |= {f"{layer}.lora_A.weight": M, f"{layer}.lora_B.weight": M.clone()}
            matrices[name] = M
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | {"mora_type": kind}))
    return matrices


@pytest.mark.parametrize("kind", (1, 6))
def test_their_adapters_merge_here(base, tmp_path, kind):
    matrices = write_authors_adapter(tmp_path / "adapter", base, kind)
    merge.main([str(tmp_path / "adapter"), str(tmp_path / "merged"), f"--base={base}"])
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, weight in load_file(base / "model.safetensors").items():
        if name in matrices:
            d, k = weight.shape
            weight = weight + their_delta(kind, matrices[name], k, d)
        torch.testing.assert_close(merged[name], weight)


def test_their_adapter_that_cannot_be_is_refused(base, tmp_path):
    write_authors_adapter(tmp_path / "adapter", base, 1)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(CONFIG | {"r": 1000, "mora_type": 1}))
    with pytest.raises(UserError, match="up_proj: mora_type 1 wraps 16 inputs"):
        checkpoint.load(tmp_path / "adapter", base)


def test_a_lora_B_that_is_no_copy_is_refused(base, tmp_path):
    write_authors_adapter(tmp_path / "adapter", base, 1)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(name for name in tensors if "lora_B" in name)] += 1
    save_file(tensors, file)
    with pytest.raises(UserError, match="a lora_B that is not its lora_A"):
        checkpoint.load(tmp_path / "adapter", base)
