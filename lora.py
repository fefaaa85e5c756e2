"""LoRA and its variants, the baselines of MoRA. Needs torch alone.

    y <- [ B ] <- [ A ] <- x        dW = scale B A, eq. 1; B starts at zero
         d x r    r x k

The variants choose
    the scale   LoRA: alpha / rank; rsLoRA (arXiv 2312.03732): alpha / sqrt(rank)
    A           LoRA: uniform; AsyLoRA (arXiv 2402.16842): orthonormal rows, trained or frozen
    the rate    LoRA+ (arXiv 2402.12354): B learns faster than A; see optimizer.py
    the rows    DoRA (arXiv 2402.09353): the rows of W + dW get trained lengths; see Rescaled
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

KINDS_OF_A = ("uniform", "orthogonal", "frozen")


class LowRank(nn.Module):
    """LoRA: A (rank, in), B (out, rank). alpha 0: scale 1. lora_A frozen: orthogonal, untrained."""

    def __init__(self, in_features, out_features, rank, alpha=0.0, rslora=False, lora_A="uniform"):
        super().__init__()
        self.rank, self.alpha, self.rslora, self.lora_A = rank, alpha, rslora, lora_A
        divisor = math.sqrt(rank) if rslora else rank
        self.scale = alpha / divisor if alpha else 1.0
        self.A = nn.Parameter(torch.zeros(rank, in_features), requires_grad=lora_A != "frozen")
        self.B = nn.Parameter(torch.zeros(out_features, rank))

    def start_cycle(self, cycle, generator):
        """Draw A: uniform with the variance of Kaiming's rule, or orthogonal. Set B = 0."""
        A, bound = torch.empty(self.A.shape, device="cpu"), self.A.shape[1] ** -0.5
        if self.lora_A == "uniform":
            A.uniform_(-bound, bound, generator=generator)
        else:  # U V^T of a Gaussian matrix: all orthonormal A are as likely, and SVD's signs cancel
            gaussian = A.double().normal_(generator=generator)
            U, _, Vh = torch.linalg.svd(gaussian, full_matrices=False)
            A = U @ Vh
        self.A.copy_(A)
        self.B.zero_()

    def forward(self, x):
        """dW x, (..., in) -> (..., out), in x's dtype."""
        return F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype)) * self.scale

    def compress(self, x):
        """What the gradients need of x: x, (tokens, in), or A x, (tokens, rank), of a frozen A."""
        x = x.reshape(-1, x.shape[-1])
        return x if self.A.requires_grad else F.linear(x, self.A.to(x.dtype))

    def gradients(self, compressed, dy):
        """[dA, dB] = [scale B^T dy x^T, scale dy (A x)^T], of all tokens; None for a frozen A."""
        dy, dA, Ax = dy.reshape(-1, dy.shape[-1]), None, compressed
        if self.A.requires_grad:  # compressed is x
            Ax, dAx = compressed @ self.A.to(compressed.dtype).T, dy @ self.B.to(dy.dtype)
            dA = (dAx.T @ compressed).to(self.A.dtype) * self.scale
        return [dA, (dy.T @ Ax).to(self.B.dtype) * self.scale]

    def delta(self):
        """dW = scale B A, (out, in)."""
        return self.B @ self.A * self.scale


class Rescaled(nn.Module):
    """DoRA (arXiv 2402.09353) around any update: the rows of W + dW get trained lengths m.

        y = s (W + dW) x        s = diag(m / ||W + dW||), m starts at ||W||; s trains m alone

    As an update of W it is s (W + dW) - W. layer.matrix is W, (out, in); `inner` makes dW."""

    def __init__(self, layer, inner):
        super().__init__()
        self.layer, self.inner = (layer,), inner  # a tuple: the layer is read, but no submodule
        self.magnitude = nn.Parameter(torch.zeros(len(layer.matrix)))

    def start_cycle(self, cycle, generator):
        """Start the inner update and set m to the lengths of the rows: dW = 0."""
        self.inner.start_cycle(cycle, generator)
        self.magnitude.copy_(row_norms(self.merged()))

    def merged(self):
        """W + the inner dW, (out, in), in float32 or float64."""
        return self.layer[0].matrix.to(self.magnitude.dtype) + self.inner.delta()

    def delta(self):
        """s (W + dW) - W, (out, in)."""
        merged = self.merged()
        return (self.magnitude / row_norms(merged))[:, None] * merged - self.layer[0].matrix

    def forward(self, x):
        """The change of the layer's output, (..., in) -> (..., out), in x's dtype."""
        y = F.linear(x, self.layer[0].matrix.to(x.dtype))
        scale = self.magnitude / row_norms(self.merged())
        return ((scale - 1) * y + scale * self.inner(x)).to(y.dtype)

    def compress(self, x):
        return x.reshape(-1, x.shape[-1])  # the gradient of m needs all of it

    def gradients(self, x, dy):
        """[dm, then the inner update's]: dm = sum over tokens of dy (W + dW) x / ||W + dW||, which
        takes one more product of W's size, as in full rank."""
        dy, merged = dy.reshape(-1, dy.shape[-1]), self.merged()
        norms = row_norms(merged)
        dm = (dy * F.linear(x, merged.to(x.dtype))).sum(0, dtype=norms.dtype) / norms
        scaled_dy = (dy * (self.magnitude / norms)).to(dy.dtype)
        return [dm, *self.inner.gradients(self.inner.compress(x), scaled_dy)]


def row_norms(matrix):
    """The length of each row, detached; at least the smallest normal number, for rows of zeros."""
    return matrix.detach().norm(dim=1).clamp_min(torch.finfo(matrix.dtype).tiny)
