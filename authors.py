"""Adapters that MoRA's authors' fork of peft trained (use_mora, mora_type 1-4 and 6), to be merged: their map, written down once.

    mora_type     compress                               decompress
        1         strided groups, wrapped around         tiled
        2         contiguous groups                      repeated
        3         contiguous groups                      tiled
        4         strided groups, wrapped around         repeated
        6         pieces, wrapped around and rotated     concatenated, then tiled

Wrapped around: inputs that do not fill the last piece are followed by the first inputs again, which so count twice. Not our operators,
where padding is zero and r^ is rounded down.

This is their forward. Their merge is the same map wherever it runs, but type 6 crashes there once r^ >= in_features, while the forward
trains up to r^ = 2 in_features. After restarts (ReMoRA) the mora_type in use may differ from the one that their file names.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

TYPES = (1, 2, 3, 4, 6)


def r_hat(rank, in_features, out_features, kind):
    """Their width: sqrt(rank (in + out)) rounded to nearest; even for type 6."""
    width = int(math.sqrt((in_features + out_features) * rank) + 0.5)
    return width - width % 2 if kind == 6 else width


def check(kind, width, in_features):
    """Raise ValueError for a width on which their forward fails: no such adapter was ever trained."""
    if kind not in (2, 3) and width > 2 * in_features:
        raise ValueError(f"mora_type {kind} wraps {in_features} inputs around once and can not fill r^ = {width} of them")
    if kind == 6 and width % 2:
        raise ValueError(f"mora_type 6 rotates pairs and needs an even r^, got {width}")


def delta(kind, M, in_features, out_features):
    """dW (out, in) of a square M (r^, r^)."""
    width = M.shape[0]
    check(kind, width, in_features)
    padded = -(-in_features // width) * width
    inputs = torch.arange(padded, device=M.device) % in_features  # the input that lies at each position of the pieces
    if kind in (1, 4):
        compressed = M.new_zeros(width, in_features).index_add(1, inputs, M.repeat(1, padded // width))
    elif kind in (2, 3):
        compressed = M[:, contiguous(in_features, width, M.device)]
    else:
        compressed = M.new_zeros(padded, in_features).index_add(1, inputs, torch.block_diag(*rotated(M, padded // width)))
    if kind in (2, 4):
        return compressed[contiguous(out_features, width, M.device)]
    return compressed[torch.arange(out_features, device=M.device) % len(compressed)]


def contiguous(features, width, device):
    """The group of every feature: neighbours, the first features mod width groups one larger."""
    groups = torch.arange(width, device=device)
    return groups.repeat_interleave(features // width + (groups < features % width))


def rotated(M, pieces):
    """[M R_p]: R_p turns the pairs (j, j + r^/2) by p * 10000^(-2j/r^)."""
    width = M.shape[0]
    theta = 10000.0 ** (-torch.arange(0, width, 2, device=M.device, dtype=torch.float64) / width)
    angles = torch.arange(pieces, device=M.device)[:, None] * theta
    first, second = M.chunk(2, dim=1)
    return [torch.cat((first * cos + second * sin, second * cos - first * sin), dim=1)
            for cos, sin in zip(angles.cos().to(M), angles.sin().to(M))]


class Square(nn.Module):
    """An update of theirs. A is what their files call M."""

    def __init__(self, in_features, out_features, rank, kind, device=None, dtype=None):
        super().__init__()
        self.kind, self.shape = kind, (in_features, out_features)
        width = r_hat(rank, in_features, out_features, kind)
        check(kind, width, in_features)
        self.A = nn.Parameter(torch.zeros(width, width, device=device, dtype=dtype))

    def delta(self):
        return delta(self.kind, self.A, *self.shape)

    def forward(self, x):
        return F.linear(x, self.delta().to(x.dtype))
