"""LoRA and MoRA as a small algebra; stands alone (with fold.py, lora.py, dora.py), adapts any torch module.

    adapted layer:  y = (W + dW) x      dW = U is linear in x, zero at the start, and the only thing that trains

           LowRank                    Square (MoRA, arXiv 2405.12130, eq. 2)
      y <- [ B ] <- [ A ] <- x        y <- F_out^T <- [ M ] <- F_in <- x
           d x r    r x k                 decompress  r^ x r^  compress      r^ = floor(sqrt(r (d + k)))

Four verbs: apply U(x); delta(), the matrix of U; merge: W <- W + dW and the plain layer comes back; restart: W <- W + dW,
U <- 0 with its fixed maps moved and its optimizer state forgotten. The function is unchanged by merge and by restart.

    model = mora.adapt(model, method="mora", rank=8, operator="rotate", targets=("q_proj", "v_proj"))
    ... train the parameters that require a gradient ...
    model = mora.merge(model)

Letters: k in_features, d out_features, r^ (r_hat) the width of M, m the blocks that share M.
"""
import math
import warnings
import zlib

import torch
from torch import nn
from torch.nn import functional as F

from lora import KINDS_OF_A, LowRank, Rescaled

METHODS = ("lora", "mora", "frozen")
OPERATORS = ("truncate", "share", "decouple", "rotate")
GROUPS = ("strided", "contiguous", "alternate", "permute")
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


def r_hat(rank, in_features, out_features, even=False):
    """The width of the square matrix that costs no more than LoRA of this rank: floor(sqrt(rank (in + out))), section 4."""
    width = math.isqrt(rank * (in_features + out_features))
    return width - width % 2 if even else width


class Square(nn.Module):
    """MoRA: U = F_out^T kron(I_m, M) F_in, eq. 2, with one square matrix M. The operators are choices of fold.

    truncate (eq. 4, 5): the first piece alone; share (6, 7): one block; decouple (8): a block for each piece;
    rotate (9-11): decouple with the input's pieces rotated. m = min(pieces in, pieces out), so that no input is ignored.
    """

    def __init__(self, in_features, out_features, rank, operator="share", groups="strided", device=None, dtype=None):
        super().__init__()
        rotates = operator == "rotate"
        width = r_hat(rank, in_features, out_features, even=rotates)
        if width < 1:
            raise ValueError(f"rank {rank} leaves no matrix to train for a layer {in_features} -> {out_features}")
        pieces_in, pieces_out = (1 if operator == "truncate" else -(-n // width) for n in (in_features, out_features))
        blocks = 1 if operator == "share" else min(pieces_in, pieces_out)
        self.M = nn.Parameter(torch.zeros(width, width, device=device, dtype=dtype))
        self.fold_in = Fold(in_features, width, blocks, pieces_in, rotates, groups, self.M.dtype).to(device)
        self.fold_out = Fold(out_features, width, blocks, pieces_out, False, groups).to(device)

    @torch.no_grad()
    def start(self, cycle, generator, siblings):
        """M = 0, and the groups of this cycle: those of the inputs are drawn alike by all layers that read the same input."""
        self.M.zero_()
        self.fold_in.move(cycle, siblings)
        self.fold_out.move(cycle, generator)

    def forward(self, x):
        pad = -len(self.M) % ALIGNED  # with zeros: unaligned products get older cards' kernels
        h = F.linear(self.fold_in(x, ALIGNED), F.pad(self.M.to(x.dtype), (0, pad, 0, pad)))
        return self.fold_out.adjoint(h[..., :len(self.M)])

    def compress(self, x):
        """All that the gradient of M needs of x: F_in x, (tokens * m, r^ rounded up to whole 16 bytes), rows that matrix units like."""
        return self.fold_in(x, ALIGNED).flatten(0, -2)

    def gradients(self, compressed, dy):
        """(dM,) = sum over tokens and blocks of F_out(dy) F_in(x)^T."""
        width = self.M.shape[0]
        return (self.fold_out(dy, ALIGNED).flatten(0, -2).T @ compressed)[:width, :width].to(self.M.dtype),

    def delta(self):
        """dW = F_out^T kron(I_m, M) F_in, (out, in): only adjoints, so a gather (eq. 3)."""
        blocks = self.fold_in.blocks
        columns = self.fold_in.adjoint(self.M.unsqueeze(1).expand(-1, blocks, -1)).T[:, None]  # (in, 1, r^): of M R_p, piece by piece
        if blocks > 1:  # an input meets the outputs of its block alone
            mine = self.fold_in.block(columns.device)[:, None] == torch.arange(blocks, device=columns.device)
            columns = columns * mine[..., None]
        return self.fold_out.adjoint(columns).T


class Products:
    """The two large products of a merged linear, in x's dtype; fp8.Float8Products is another pair."""

    @staticmethod
    def y(x, weight):
        """(W x, what dx will need of W)"""
        weight = weight.to(x.dtype)
        return F.linear(x, weight), weight

    @staticmethod
    def dx(dy, saved):
        return dy @ saved


class MergedLinear(torch.autograd.Function):
    """y = (W + dW) x: one product forward and one for dx; the update's gradients come from the compressed operands alone.

    W is frozen, so no product of W's size gives a weight gradient: that is what makes adapters faster than full rank. Saved are
    the merged weight and update.compress(x): for MoRA r^ numbers a block and token, never x.
    """

    @staticmethod
    def forward(ctx, x, weight, update, products, *parameters):
        y, saved = products.y(x, weight + update.delta())
        ctx.update, ctx.products = update, products
        ctx.save_for_backward(update.compress(x), saved)
        return y

    @staticmethod
    def backward(ctx, dy):
        compressed, saved = ctx.saved_tensors
        dx = ctx.products.dx(dy, saved)
        return dx, None, None, None, *ctx.update.gradients(compressed, dy)


class AdaptedLinear(nn.Module):
    """A frozen linear layer and its update: y = W x + U(x), with W in `.weight` (out, in) under its old name.

    With a float32 weight the two are merged for the product (MergedLinear). A weight in bfloat16 would round small updates away, and
    dropout acts on the update's input alone: these take two paths.
    """

    def __init__(self, linear, update, dropout=0.0):
        super().__init__()
        self.linear = (linear,)  # in a tuple: kept to be given back by merge, but not a submodule
        self.weight, self.bias = linear.weight, linear.bias
        self.update, self.dropout = update, dropout
        self.products = Products
        self.merges = hasattr(update, "gradients")  # set it to False for two paths always, to compare

    def forward(self, x):
        """(..., in) -> (..., out), computed in x's dtype, or autocast's."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if not self.merges or self.dropout or self.weight.dtype not in (torch.float32, torch.float64):
            y = F.linear(x, self.weight.to(x.dtype)) + self.update(F.dropout(x, self.dropout, self.training))
        elif torch.is_grad_enabled():
            y = MergedLinear.apply(x, self.weight, self.update, self.products, *self.update.parameters())
        else:
            y = F.linear(x, self.merged().to(x.dtype))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def delta(self):
        """The matrix of the update, (out, in)."""
        return self.update.delta()

    def merged(self):
        """W + dW, (out, in), in float32 at least."""
        delta = self.delta()
        return self.weight.to(delta.dtype) + delta

    @torch.no_grad()
    def merge_(self):
        """W <- W + dW in float32; returns dW's squared Frobenius norm, a tensor. The update is not started again here."""
        delta = self.delta()
        self.weight.copy_(self.weight.to(delta.dtype) + delta)
        return delta.square().sum()

    def extra_repr(self):
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}, bias={self.bias is not None}"


def generator(seed, cycle, name):
    """The random numbers of one name in one cycle: the same on every rank, and after a resume."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {cycle} {name}".encode()))


def start(layers, seed, cycle):
    """Start the updates of [(name, AdaptedLinear)] with the draws of this seed and cycle."""
    for name, layer in layers:
        siblings = f"{name.rpartition('.')[0]} {layer.weight.shape[1]}"
        layer.update.start(cycle, generator(seed, cycle, name), generator(seed, cycle, siblings))


def adapted_layers(model):
    """[(name, AdaptedLinear)] in the model's order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, AdaptedLinear)]


def adapter_parameters(model):
    """[(name, parameter)] of the updates alone, a frozen A included."""
    return [(f"{name}.update.{key}", p) for name, layer in adapted_layers(model) for key, p in layer.update.named_parameters()]


def replace(model, name, module):
    """Put a module in the place of the one of this name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def adapt(model, method="mora", rank=8, operator="share", groups="strided", alpha=0.0, rslora=False, lora_A="uniform", dora=False,
          dropout=0.0, targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), train_rest=False,
          seed=0, cycle=0):
    """Replace the named nn.Linear layers of any torch module by adapted ones, in place; returns the model.

    method: "mora", "lora", or "frozen" (the layers are frozen and get no update). operator, groups: MoRA's; alpha, rslora, lora_A:
    LoRA's (see LowRank); dora: for both (see Rescaled). targets: last parts of module names.
    train_rest: leave the other parameters trainable (pretraining) or freeze them (fine-tuning). The adapters' parameters are
    float32 (float64 if the weight is) on the weight's device. Raises ValueError for an unknown name, an operator that the
    method does not take, a target that matches no nn.Linear, and a model that is adapted already.
    """
    for value, choices, what in ((method, METHODS, "method"), (operator, OPERATORS, "operator"),
                                 (groups, GROUPS, "groups"), (lora_A, KINDS_OF_A, "lora_A")):
        if value not in choices:
            raise ValueError(f"{what} must be one of {', '.join(choices)}, got {value!r}")
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if method != "lora" and (alpha or rslora or lora_A != "uniform"):
        raise ValueError(f"alpha, rslora and lora_A are LoRA's (MoRA's scale is 1): method {method} got {alpha}, {rslora}, {lora_A!r}")
    if rslora and not alpha:
        raise ValueError("rslora scales the update by alpha / sqrt(rank): give it an alpha, got 0")
    if adapted_layers(model):
        raise ValueError("the model is adapted already: merge it first")

    found = _matches(model, targets)
    for parameter in model.parameters():
        parameter.requires_grad_(train_rest and parameter.requires_grad)
    oversized, folds = [], {}
    for name, linear in found.items():
        for parameter in linear.parameters():
            parameter.requires_grad_(False)
        if method == "frozen":
            continue
        shape = dict(in_features=linear.in_features, out_features=linear.out_features, rank=rank, device=linear.weight.device,
                     dtype=torch.promote_types(linear.weight.dtype, torch.float32))
        update = (LowRank(**shape, alpha=alpha, rslora=rslora, lora_A=lora_A) if method == "lora" else
                  Square(**shape, operator=operator, groups=groups))
        if method == "mora":  # one fold for q, k, v and one for gate, up: the compiler then compresses their input once
            update.fold_in = folds.setdefault((name.rpartition(".")[0], *linear.weight.shape), update.fold_in)
            oversized += [name] if update.M.numel() > linear.weight.numel() else []
        replace(model, name, AdaptedLinear(linear, Rescaled(linear, update) if dora else update, dropout))
    start(adapted_layers(model), seed, cycle)
    if dropout:
        warnings.warn(f"dropout {dropout} acts on the update's input alone, so the adapted layers run two paths, slower than merged")
    if oversized:
        warnings.warn(f"rank {rank} gives {len(oversized)} layers (first {oversized[0]}) a square with more entries than the "
                      "weight it updates: full-rank training of them would cost less")
    return model


def _matches(model, targets):
    """{name: nn.Linear} of the modules that the targets name; raises ValueError."""
    found = {}
    for target in targets:
        matches = {n: m for n, m in model.named_modules() if n == target or n.endswith(f".{target}")}
        linears = {n: m for n, m in matches.items() if isinstance(m, nn.Linear)}
        if not linears:
            names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
            kinds = f"only {type(next(iter(matches.values()))).__name__} modules" if matches else "no module"
            raise ValueError(f"target {target!r} matches {kinds}; the model's nn.Linear layers are named {', '.join(names) or 'nothing'}")
        found |= linears
    return {name: module for name, module in model.named_modules() if name in found}  # in the model's order


def merge(model):
    """Add every update to its weight (in float32) and give the plain layers back, in place; returns the model.

    Parameters keep their requires_grad. Raises ValueError if nothing is adapted.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("the model has no adapted layers to merge")
    for name, layer in layers:
        layer.merge_()
        replace(model, name, layer.linear[0])
    return model


@torch.no_grad()
def merged_weights(model):
    """{name: tensor}: the state dict that merge would leave, the model as it was. What has no update is not copied."""
    weights = model.state_dict()
    for name, layer in adapted_layers(model):
        weights[f"{name}.weight"] = layer.merged().to(layer.weight.dtype)
        for key, _ in layer.update.named_parameters():
            del weights[f"{name}.update.{key}"]
    return weights


def restart(model, optimizer, cycle, seed=0, keep=0.0):
    """Merge, start the update again with the maps of `cycle` (1, 2, ...), forget its optimizer state: ReLoRA and ReMoRA.

    The function is unchanged. LoRA's A is drawn again and B = 0; MoRA's M = 0 and its groups move; DoRA's m stays. Of the
    optimizer only the adapters' states go, Adam's step count with them; keep > 0 instead prunes their first moments to this part, the largest.
    Returns {"states": how many were forgotten or pruned, "update_norm": the Frobenius norm of all that was merged}. Raises
    RuntimeError if some adapter tensor had no state: it was not being trained.
    """
    parameters = [parameter for _, parameter in adapter_parameters(model) if parameter.requires_grad]
    states = sum(bool(optimizer.state.get(parameter)) for parameter in parameters)
    if states != len(parameters):
        raise RuntimeError(f"{states} optimizer states for {len(parameters)} adapter tensors: is every adapter in the optimizer, "
                           "and has it taken a step?")
    layers = adapted_layers(model)
    norm = torch.stack([layer.merge_() for _, layer in layers]).sum().sqrt().item()
    start(layers, seed, cycle)
    for parameter in parameters:
        if keep:
            _prune(optimizer.state[parameter]["exp_avg"], keep)
        else:
            del optimizer.state[parameter]
    return {"states": states, "update_norm": norm}


def _prune(moment, keep):
    """Zero all but the largest entries. The second moment stays: zeroing it too would make Adam's next step 3.16 times too large."""
    smallest = moment.abs().flatten().topk(moment.numel() - max(1, round(keep * moment.numel())), largest=False).indices
    moment.view(-1)[smallest] = 0
