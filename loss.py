"""The loss head: mean cross-entropy of x @ weight^T, chunk by chunk, so that the logits of all tokens never exist at once.

At a vocabulary of 50,000 the float32 logits of one step outweigh a small model. Here a chunk's logits are turned into its gradients
at once, in the forward pass: nothing is kept and nothing computed twice. What does not count, prompts and padding, costs nothing.
N tokens, D hidden size, V vocabulary.
"""
import torch
from torch.nn import functional as F

CHUNK = 4096  # tokens: at a vocabulary of 50k, 400 MB of bfloat16 logits


def padded(weight, dtype):
    """(V, D) -> (V rounded up to a multiple of 64, D) in dtype: matrix units want it (50257 -> 50304), the parameter does not change."""
    missing = -len(weight) % 64
    return F.pad(weight.to(dtype), (0, 0, 0, missing)) if missing else weight.to(dtype)  # F.pad copies even when there is nothing to add


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def counting(targets):
    """Positions of the targets that count, chunk by chunk. How many there are the device is asked, and the head sees no others."""
    return (targets != -100).nonzero()[:, 0].split(CHUNK)


def softmax_gradient(logits, targets, vocab_size, scale):
    """(sum of the chunk's losses, scale * its gradient in the logits' dtype); columns from vocab_size on are no tokens."""
    columns = torch.arange(logits.shape[1], device=logits.device)
    wide = at_least_float32(logits).masked_fill(columns >= vocab_size, -torch.inf)
    log_sum = wide.logsumexp(dim=-1)
    loss = (log_sum - wide.gather(1, targets[:, None])[:, 0]).sum()
    gradient = ((wide - log_sum[:, None]).exp() - (columns == targets[:, None]).to(wide)) * scale
    return loss, gradient.to(logits.dtype)


class ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, kernel):
        wants_dx, wants_dw = ctx.needs_input_grad[:2]
        w, chunks = padded(weight, x.dtype), counting(targets)
        loss = torch.zeros((), device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        scale = torch.full_like(loss, sum(map(len, chunks))).reciprocal()
        dx = torch.zeros_like(x) if wants_dx else None
        dw = torch.zeros(w.shape, device=x.device, dtype=weight.dtype) if wants_dw else None
        for at in chunks:
            rows = x[at]
            part, gradient = kernel(rows @ w.T, targets[at], len(weight), scale)
            loss += part
            if wants_dx:
                dx[at] = gradient @ w
            if wants_dw and dw.is_cuda and dw.dtype != w.dtype:  # the sum over chunks in the product itself, in float32
                torch.addmm(dw, gradient.T, rows, out_dtype=dw.dtype, out=dw)
            elif wants_dw:
                dw += gradient.T @ rows
        ctx.gradients = dx, dw[:len(weight)] if wants_dw else None
        return loss * scale

    @staticmethod
    def backward(ctx, factor):
        if ctx.gradients is None:
            raise RuntimeError("the chunked loss gives its gradients away once: call backward once, or compute the loss again")
        (dx, dw), ctx.gradients = ctx.gradients, None
        return dx.mul_(factor) if dx is not None else None, dw.mul_(factor) if dw is not None else None, None, None


def cross_entropy(x, weight, targets, kernel=softmax_gradient):
    """Mean loss in nats, float32, of hidden states x (N, D), head weight (V, D) and targets (N,); a target of -100 does not count.

    kernel: softmax_gradient, or a compiled one.
    """
    if torch.is_grad_enabled():
        return ChunkedCrossEntropy.apply(x, weight, targets, kernel)
    w, chunks = padded(weight, x.dtype), counting(targets)
    parts = [F.cross_entropy(at_least_float32((x[at] @ w.T)[:, :len(weight)]), targets[at], reduction="sum") for at in chunks]
    return torch.stack(parts).sum() / sum(map(len, chunks))
