"""Folds: MoRA's maps without parameters, and their adjoints. mora.py puts a trained matrix between two of them.

    compress = the fold of a layer's inputs        decompress = the adjoint of the fold of its outputs
"""
import torch
from torch import nn
from torch.nn import functional as F

ALIGNED = 8  # bfloat16 numbers in 16 bytes: matrix products want rows that are multiples of it


def contiguous_order(features, width, device=None):
    """The permutation that puts neighbours into one group: position p*width + i holds the p-th member of group i.

    Appendix B's second kind. The first `features mod width` groups have one member more.
    """
    small, more = divmod(features, width)
    place = torch.arange(features, device=device)
    group = place % width
    return group * small + group.clamp(max=more) + place // width


def rolled_order(features, width, generator, device=None):
    """A random permutation that is read in long runs: every piece turned by an amount of its own, then all features by one more.

    Merged cycles reach the rank that they reach with uniform permutations (LOG.md, 2026-11-22), and memory is read as without any.
    """
    def turned(indices):
        return indices.roll(int(torch.randint(len(indices), (1,), generator=generator)))

    return torch.cat([turned(piece) for piece in turned(torch.arange(features, device=device)).split(width)])


def rotations(width, pieces):
    """Cosines and signed sines (2, pieces, width), float64, of the angles p * 10000^(-2j/width): eq. 10, its pairs reordered to (j, j + width/2)."""
    theta = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(pieces, dtype=torch.float64)[:, None] * theta
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)))


class Permute(torch.autograd.Function):
    """x[..., order], whose gradient is a gather too: indexing's own would scatter with atomic additions, slowly and in any order."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(order, inverse)
        return x[..., order]

    @staticmethod
    def backward(ctx, dy):
        order, inverse = ctx.saved_tensors
        return Permute.apply(dy, inverse, order), None, None


class Fold(nn.Module):
    """A linear map without parameters from n features to `blocks` blocks of `width`, and its adjoint.

    Permute the features, cut them into pieces of `width` (the last one padded with zeros), rotate piece p by p * theta if
    asked, add piece p to block p mod blocks. With fewer `pieces` than the features fill, the rest is ignored (truncate).
    """

    def __init__(self, features, width, blocks, pieces, rotates=False, groups="strided", dtype=torch.float32):
        super().__init__()
        self.features, self.width, self.blocks, self.pieces = features, width, blocks, pieces
        self.used = min(features, pieces * width)
        self.groups, self.drawn, moved = groups, None, groups != "strided"
        # in buffers, so that a restart moves the groups in place and nothing is compiled again
        # (int32: a gather reads an index for every number, and half the bytes are 4 % of a step at 250M)
        self.register_buffer("order", torch.arange(features, dtype=torch.int32) if moved else None, persistent=False)
        self.register_buffer("inverse", torch.arange(features, dtype=torch.int32) if moved else None, persistent=False)
        self.register_buffer("turns", rotations(width, pieces).to(dtype) if rotates else None, persistent=False)

    @torch.no_grad()
    def move(self, cycle, generator):
        """Take the permutation of this cycle (0, 1, ...)."""
        if self.order is None or self.drawn == (cycle, generator.initial_seed()):  # nothing moves, or a sibling has moved it
            return
        self.drawn, device = (cycle, generator.initial_seed()), self.order.device  # (made on the device: a copy to it would wait)
        strided = torch.arange(self.features, dtype=torch.int32, device=device)
        order = strided.long()
        if self.groups == "permute":
            order = rolled_order(self.features, self.width, generator, device)
        elif self.groups == "contiguous" or self.groups == "alternate" and cycle % 2:
            order = contiguous_order(self.features, self.width, device)
        self.order.copy_(order)
        self.inverse[order] = strided

    def forward(self, x, aligned=1):
        """(..., n) -> (..., blocks, width rounded up with zeros to a multiple of `aligned`)"""
        if self.order is not None:
            x = Permute.apply(x, self.order, self.inverse)
        x = F.pad(x[..., :self.used], (0, self.pieces * self.width - self.used)).unflatten(-1, (self.pieces, self.width))
        if self.turns is not None:
            x = self.rotate(x, 1)
        x = F.pad(x, (0, -self.width % aligned, 0, -self.pieces % self.blocks))  # before the sum: one kernel does both
        return x.unflatten(-2, (-1, self.blocks)).sum(-3)

    def block(self, device):
        """(n,): the block that each feature is added to."""
        block = torch.arange(self.features, device=device) // self.width % self.blocks
        return block if self.inverse is None else block[self.inverse]

    def adjoint(self, h):
        """(..., blocks, width) -> (..., n)"""
        repeats = -(-self.pieces // self.blocks)
        h = h.unsqueeze(-3).expand(*h.shape[:-2], repeats, *h.shape[-2:]).flatten(-3, -2)[..., :self.pieces, :]
        if self.turns is not None:
            h = self.rotate(h, -1)
        x = F.pad(h.flatten(-2)[..., :self.used], (0, self.features - self.used))
        return x if self.inverse is None else Permute.apply(x, self.inverse, self.order)

    def rotate(self, x, sign):
        """Turn the pairs (j, j + width/2) of every piece by sign * its angles: (..., pieces, width) -> the same."""
        cos, sin = self.turns.to(torch.promote_types(x.dtype, torch.float32))
        partners = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)  # of one expression, where two halves and a cat would be computed twice
        return (x * cos + partners * (sign * sin)).to(x.dtype)
