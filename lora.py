"""LoRA and its variants: U = scale B A, eq. 1; stands alone.

    y <- [ B ] <- [ A ] <- x        B starts at zero
         d x r    r x k

The variants choose the scale (alpha / rank; rsLoRA, arXiv 2312.03732: alpha / sqrt(rank)) and A: uniform (LoRA) or with orthonormal
rows, trained or frozen (AsyLoRA, arXiv 2402.16842). LoRA+ (arXiv 2402.12354) is a learning rate and stands in train.py; DoRA
rescales W + dW, whatever the update, and stands in dora.py.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

KINDS_OF_A = ("uniform", "orthogonal", "frozen")  # choices of lora_A


class LowRank(nn.Module):
    """alpha 0 means scale 1. lora_A: "uniform", "orthogonal", or "frozen": orthogonal and not trained."""

    def __init__(self, in_features, out_features, rank, alpha=0.0, rslora=False, lora_A="uniform", device=None, dtype=None):
        super().__init__()
        self.scale = alpha / (math.sqrt(rank) if rslora else rank) if alpha else 1.0
        self.lora_A = lora_A
        self.A = nn.Parameter(torch.zeros(rank, in_features, device=device, dtype=dtype), requires_grad=lora_A != "frozen")
        self.B = nn.Parameter(torch.zeros(out_features, rank, device=device, dtype=dtype))

    @torch.no_grad()
    def start(self, cycle, generator, siblings):
        """A uniform with the variance of Kaiming's rule, or orthogonal; B = 0."""
        if self.lora_A == "uniform":
            bound = self.A.shape[1] ** -0.5
            self.A.copy_(torch.empty(self.A.shape).uniform_(-bound, bound, generator=generator))
        else:  # U V^T of a Gaussian matrix: every orthonormal A is as likely, and the signs that an SVD is free to choose cancel
            U, _, Vh = torch.linalg.svd(torch.randn(self.A.shape, generator=generator, dtype=torch.float64), full_matrices=False)
            self.A.copy_(U @ Vh)
        self.B.zero_()

    def forward(self, x):
        return F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype)) * self.scale

    def compress(self, x):
        """The gradient of A needs x itself, (tokens, in); a frozen A leaves A x, (tokens, rank)."""
        x = x.flatten(0, -2)
        return x if self.A.requires_grad else F.linear(x, self.A.to(x.dtype))

    def gradients(self, x, dy):
        """(dA, dB) = (scale B^T dy x^T, scale dy (A x)^T), summed over tokens; dA is None if A is frozen."""
        dy = dy.flatten(0, -2)  # the scale waits for what is small
        dB = (dy.T @ (x @ self.A.to(x.dtype).T if self.A.requires_grad else x)).to(self.B.dtype) * self.scale
        if not self.A.requires_grad:
            return None, dB
        dA = ((dy @ self.B.to(dy.dtype)).T @ x).to(self.A.dtype) * self.scale
        return dA, dB

    def delta(self):
        """dW = scale B A, (out, in)."""
        return self.B @ self.A * self.scale



class Rescaled(nn.Module):
    """The update `inner` of a linear layer, with the rows of W + dW rescaled."""

    def __init__(self, linear, inner):
        super().__init__()
        self.linear = (linear,)  # in a tuple: read, but not a submodule
        self.inner = inner
        wide = torch.promote_types(linear.weight.dtype, torch.float32)
        self.magnitude = nn.Parameter(torch.zeros(linear.out_features, device=linear.weight.device, dtype=wide))

    @torch.no_grad()
    def start(self, cycle, *generators):
        """The inner update starts, and m is what the rows are: U = 0."""
        self.inner.start(cycle, *generators)
        self.magnitude.copy_(norms(self.whole()))

    def whole(self):
        """W + dW, (out, in), in float32 at least."""
        return self.linear[0].weight.to(self.magnitude.dtype) + self.inner.delta()

    def delta(self):
        """s (W + dW) - W, (out, in)."""
        whole = self.whole()
        return (self.magnitude / norms(whole))[:, None] * whole - self.linear[0].weight

    def forward(self, x):
        y, scale = F.linear(x, self.linear[0].weight.to(x.dtype)), self.magnitude / norms(self.whole())
        return ((scale - 1) * y + scale * self.inner(x)).to(y.dtype)

    def compress(self, x):
        """The gradient of m needs all of x, (tokens, in)."""
        return x.flatten(0, -2)

    def gradients(self, x, dy):
        """(dm, the inner update's): dm = sum over tokens of dy (W + dW) x / ||W + dW||. One more product of W's size, as in full rank."""
        dy, whole = dy.flatten(0, -2), self.whole()
        length = norms(whole)
        dm = (dy * F.linear(x, whole.to(x.dtype))).sum(0, dtype=length.dtype) / length
        return dm, *self.inner.gradients(self.inner.compress(x), (dy * (self.magnitude / length)).to(dy.dtype))


def norms(matrix):
    """||.|| of each row, detached; never 0, for the sake of rows of zeros."""
    return matrix.detach().norm(dim=1).clamp_min(torch.finfo(matrix.dtype).tiny)
