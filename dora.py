"""DoRA (arXiv 2402.09353) around any update; stands alone.

    y = s (W + dW) x        s = m / ||W + dW|| for each row: a trained m, a norm that takes no part in the gradient

Seen from outside this is an update like the others, U(x) = (s (W + dW) - W) x: merge, restart and dropout follow, and they are peft's.
m starts as ||W||, and is set to the rows' norms again by a restart, which so changes no function.
"""
import torch
from torch import nn
from torch.nn import functional as F


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
