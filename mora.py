"""MoRA, and what every update shares: adapt, merge, restart. One file to copy, with lora.py.

    adapted layer:  y = (W + dW) x      W is frozen; dW is linear in x, zero at the start, trained

           LoRA (lora.py)             Square: MoRA, arXiv 2405.12130, eq. 2
      y <- [ B ] <- [ A ] <- x        y <- F_out^T <- [ M ] <- F_in <- x
           d x r    r x k                 decompress  r^ x r^  compress

The fixed maps F_in and F_out have no parameters, so all of the budget r (d + k) is in M: its width
is r^ = floor(sqrt(r (d + k))). dW has rank r^ or more, where LoRA's has rank r.

    model = mora.adapt(model, rank=8, operator="rotate", targets=("q_proj", "v_proj"))
    ... train the parameters that require a gradient ...
    model = mora.merge(model)      # W <- W + dW: the plain layers come back

`restart` merges, sets dW = 0 with other fixed maps and forgets the optimizer states of the update.
Merging and restarting do not change the function.

Letters: k in_features, d out_features, r^ (r_hat) the width of M, m the blocks that share M.
"""
import contextlib
import functools
import math
import re
import warnings
import zlib

import torch
from torch import nn
from torch.nn import functional as F

from lora import KINDS_OF_A, LowRank, Rescaled

METHODS = ("mora", "lora", "frozen")
OPERATORS = ("truncate", "share", "decouple", "rotate")
GROUPS = ("strided", "contiguous", "alternate", "permute")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALIGNED = 8  # bfloat16 numbers in 16 bytes: matrix products are fastest on rows of such multiples


def r_hat(rank, in_features, out_features, even=False):
    """The width of M: floor(sqrt(rank (in + out))), no more parameters than LoRA's (section 4)."""
    width = math.isqrt(rank * (in_features + out_features))
    return width - width % 2 if even else width


# ------------------------------------------------------------
# the fixed maps

def contiguous_order(features, width, device=None):
    """The permutation (features,) that puts neighbours into one group: appendix B's second kind.

    Position p * width + i holds the p-th member of group i. The first `features mod width` groups
    have one member more than the others.
    """
    smaller_size, larger_groups = divmod(features, width)
    position = torch.arange(features, device=device)
    group = position % width
    first_member = group * smaller_size + group.clamp(max=larger_groups)
    return first_member + position // width


def rolled_order(features, width, generator, device=None):
    """A random permutation (features,) that is read in long runs.

    All features are rolled by a random offset, then every piece of `width` by one of its own.
    Merged cycles reach the rank that they reach with uniform permutations (LOG.md, 2026-11-22),
    and reading memory costs what it costs without a permutation.
    """
    def rolled(indices):
        offset = torch.randint(len(indices), (1,), generator=generator, device="cpu")
        return indices.roll(int(offset))

    pieces = rolled(torch.arange(features, device=device)).split(width)
    return torch.cat([rolled(piece) for piece in pieces])


def rotations(width, pieces):
    """Cosines and signed sines of eq. 10, (2, pieces, width), float64.

    Piece p is rotated by the angles p * 10000^(-2j / width). The pairs are (j, j + width/2), where
    the paper has (2j, 2j + 1).
    """
    pair = torch.arange(0, width, 2, dtype=torch.float64, device="cpu")
    theta = 10000.0 ** (-pair / width)
    angles = torch.arange(pieces, dtype=torch.float64, device="cpu")[:, None] * theta
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)))


class Permute(torch.autograd.Function):
    """x[..., order], whose gradient is a gather; the gradient of indexing is a slow scatter."""

    generate_vmap_rule = True  # torch.func.vmap

    @staticmethod
    def forward(x, order, inverse):
        return x[..., order]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, dy):
        order, inverse = ctx.saved_tensors
        return Permute.apply(dy, inverse, order), None, None


class Fold(nn.Module):
    """A linear map without parameters from n features to `blocks` blocks of `width`; its adjoint.

    Permute the features, cut them into pieces of `width` (the last is padded with zeros), rotate
    the pieces if asked to, add piece p to block p mod blocks. If the features fill more than
    `pieces` pieces, the map ignores the rest (truncate).

    `cycle` and `seed` are those of the latest `move`: the permutation is a function of them.
    """

    def __init__(self, features, width, blocks, pieces, rotates=False, groups="strided",
                 dtype=torch.float32):
        super().__init__()
        self.features, self.width, self.blocks, self.pieces = features, width, blocks, pieces
        self.used = min(features, pieces * width)
        self.groups, self.cycle, self.seed = groups, None, None
        # Buffers: a restart moves the groups in place, so nothing is compiled again.
        # int32: a gather reads one index per number; int64 costs 4 % of a step at 250M.
        order, inverse, turns = None, None, None
        if groups != "strided":
            order = torch.arange(features, dtype=torch.int32)
            inverse = order.clone()
        if rotates:
            turns = rotations(width, pieces).to(dtype)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("inverse", inverse, persistent=False)
        self.register_buffer("turns", turns, persistent=False)

    @torch.no_grad()
    def move(self, cycle, seed):
        """Take the permutation of this cycle (0, 1, ...); `seed` is of `permute` alone."""
        self.cycle, self.seed = cycle, seed
        if self.order is None:
            return
        device = self.order.device  # the permutation is made there: a copy to it would synchronize
        identity = torch.arange(self.features, dtype=torch.int32, device=device)
        order = identity.long()
        if self.groups == "permute":
            generator = torch.Generator().manual_seed(seed)
            order = rolled_order(self.features, self.width, generator, device)
        elif self.groups == "contiguous" or (self.groups == "alternate" and cycle % 2 == 1):
            order = contiguous_order(self.features, self.width, device)
        self.order.copy_(order)
        self.inverse[order] = identity

    def _apply(self, fn, recurse=True):
        """Fill the buffers again when they leave the meta device: no state dict holds them."""
        was_meta = any(buffer.is_meta for buffer in self.buffers())
        super()._apply(fn, recurse)
        if was_meta and self.turns is not None:
            self.turns.copy_(rotations(self.width, self.pieces))
        if was_meta and self.cycle is not None:
            self.move(self.cycle, self.seed)
        return self

    def forward(self, x, multiple=1):
        """(..., n) -> (..., blocks, width), the width padded with zeros to a multiple of this."""
        if self.order is not None:
            x = Permute.apply(x, self.order, self.inverse)
        padded = F.pad(x[..., :self.used], (0, self.pieces * self.width - self.used))
        pieces = padded.unflatten(-1, (self.pieces, self.width))
        if self.turns is not None:
            pieces = self.rotate(pieces, 1)
        # padding comes before the sum, so that one kernel does both
        pieces = F.pad(pieces, (0, -self.width % multiple, 0, -self.pieces % self.blocks))
        return pieces.unflatten(-2, (-1, self.blocks)).sum(-3)

    def adjoint(self, blocks):
        """(..., blocks, width) -> (..., n): every feature reads the place that it is added to."""
        repeats = -(-self.pieces // self.blocks)
        shape = (*blocks.shape[:-2], repeats, *blocks.shape[-2:])
        repeated = blocks.unsqueeze(-3).expand(shape)
        pieces = repeated.flatten(-3, -2)[..., :self.pieces, :]
        if self.turns is not None:
            pieces = self.rotate(pieces, -1)
        x = F.pad(pieces.flatten(-2)[..., :self.used], (0, self.features - self.used))
        return x if self.order is None else Permute.apply(x, self.inverse, self.order)

    def rotate(self, pieces, sign):
        """Rotate the pairs (j, j + width/2) of (..., pieces, width) by sign * the angles."""
        cos, sin = self.turns.to(torch.promote_types(pieces.dtype, torch.float32))
        halves = pieces.unflatten(-1, (2, -1))
        partners = halves.flip(-2).flatten(-2)  # one expression: two halves would be computed twice
        return (pieces * cos + partners * (sign * sin)).to(pieces.dtype)

    def block_of_features(self, device):
        """(n,): the block that each feature is added to."""
        block = torch.arange(self.features, device=device) // self.width % self.blocks
        return block if self.order is None else block[self.inverse]


# ------------------------------------------------------------
# MoRA

class Square(nn.Module):
    """MoRA: dW = F_out^T kron(I_m, M) F_in, eq. 2, with one square M (r^, r^).

    The operators differ in the folds alone: truncate (eq. 4, 5) keeps the first piece; share (6, 7)
    adds all pieces into one block; decouple (8) has a block for each piece; rotate (9-11) is
    decouple with the pieces of the input rotated. m = min(pieces in, pieces out), so that decouple
    and rotate ignore no input. Raises ValueError if r^ is 0.
    """

    def __init__(self, in_features, out_features, rank, operator="share", groups="strided",
                 device=None, dtype=None):
        super().__init__()
        rotates = operator == "rotate"
        width = r_hat(rank, in_features, out_features, even=rotates)
        if width < 1:
            raise ValueError(f"rank {rank} leaves no matrix to train for a layer "
                             f"{in_features} -> {out_features}")
        self.rank, self.operator, self.groups = rank, operator, groups
        self.seed = self.cycle = None  # mora.start_cycle sets them
        pieces_in, pieces_out = -(-in_features // width), -(-out_features // width)
        if operator == "truncate":
            pieces_in = pieces_out = 1
        blocks = 1 if operator == "share" else min(pieces_in, pieces_out)
        self.M = nn.Parameter(torch.zeros(width, width, device=device, dtype=dtype))
        self.fold_in = Fold(in_features, width, blocks, pieces_in, rotates, groups, self.M.dtype)
        self.fold_out = Fold(out_features, width, blocks, pieces_out, False, groups)
        self.fold_in.to(device), self.fold_out.to(device)

    @torch.no_grad()
    def start_cycle(self, cycle, generator):
        """Set M = 0 and move the groups of the outputs.

        The groups of the inputs are common to the layers that read one input, so
        mora.start_cycle moves them.
        """
        self.M.zero_()
        self.fold_out.move(cycle, generator.initial_seed())

    def forward(self, x):
        """dW x, (..., in) -> (..., out), in x's dtype."""
        padding = -len(self.M) % ALIGNED  # zeros: unaligned products get older cards' kernels
        M = F.pad(self.M.to(x.dtype), (0, padding, 0, padding))
        blocks = F.linear(self.fold_in(x, ALIGNED), M)
        return self.fold_out.adjoint(blocks[..., :len(self.M)])

    def compress(self, x):
        """F_in x, all that dM needs of x: (tokens * m, r^ padded to a multiple of ALIGNED)."""
        return self.fold_in(x, ALIGNED).flatten(0, -2)

    def gradients(self, compressed, dy):
        """[dM]: the sum over tokens and blocks of F_out(dy) F_in(x)^T."""
        width = len(self.M)
        compressed_dy = self.fold_out(dy, ALIGNED).flatten(0, -2)
        dM = (compressed_dy.T @ compressed)[:width, :width]
        return [dM.to(self.M.dtype)]

    def delta(self):
        """dW, (out, in). Only adjoints are taken, so every entry is read from M (eq. 3)."""
        m = self.fold_in.blocks
        M_of_every_block = self.M.unsqueeze(1).expand(-1, m, -1)  # (r^, m, r^)
        columns = self.fold_in.adjoint(M_of_every_block).T  # (in, r^): M, rotated, for each input
        columns = columns[:, None]  # (in, 1, r^)
        if m > 1:  # an input meets the outputs of its own block alone
            block = self.fold_in.block_of_features(columns.device)
            is_own = block[:, None] == torch.arange(m, device=columns.device)  # (in, m)
            columns = columns * is_own[..., None]  # (in, m, r^)
        return self.fold_out.adjoint(columns).T

    def settings(self):
        """What M does not say about dW; a state dict keeps it beside M."""
        return {"operator": self.operator, "groups": self.groups, "seed": self.seed,
                "cycle": self.cycle}


# ------------------------------------------------------------
# the adapted layer

class Products:
    """The two large products of a merged linear, in x's dtype. model.Float8Products: in FP8."""

    @staticmethod
    def y(x, merged):
        """(W x, what dx needs of W; None: dx gets W + dW anew)."""
        merged = merged.to(x.dtype)
        return F.linear(x, merged), merged

    @staticmethod
    def dx(dy, merged):
        return dy @ merged


TWO_PATHS = "set layer.merges = False for every (name, layer) of mora.adapted_layers(model)"


class MergedLinear(torch.autograd.Function):
    """y = (W + dW) x: one product forward and one for dx, as in a frozen layer.

    W is frozen, so no product of W's size makes a weight gradient: adapters are faster than full
    rank for this reason. The gradients of the update come from the compressed operands. The merged
    weight (FP8: W, to merge again) and update.compress(x) are saved: for MoRA r^ numbers per block
    and token, never x.
    """

    @staticmethod
    def forward(ctx, x, weight, update, products, *parameters):
        y, merged = products.y(x, weight + update.delta())
        ctx.update, ctx.products, ctx.parameters = update, products, parameters
        ctx.save_for_backward(update.compress(x), merged, weight if merged is None else None)
        return y

    @staticmethod
    def backward(ctx, dy):
        refuse_other_derivatives(ctx.update, ctx.parameters)
        compressed, merged, weight = ctx.saved_tensors
        if merged is None:
            merged = weight + ctx.update.delta()
        dx = ctx.products.dx(dy, merged)
        return dx, None, None, None, *ctx.update.gradients(compressed, dy)


def refuse_other_derivatives(update, parameters):
    """Raise RuntimeError in a backward that would be wrong; `parameters` are the forward's."""
    if torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError("the merged product of an adapted layer can be differentiated once, "
                           f"not twice: {TWO_PATHS}")
    if any(now is not before for now, before in zip(update.parameters(), parameters, strict=True)):
        raise RuntimeError("the parameters of an adapted layer were replaced between forward and "
                           f"backward (torch.func.functional_call does that): {TWO_PATHS}")


class AdaptedLinear(nn.Module):
    """A frozen linear layer with an update: y = W x + dW x + b. W stays in `.weight`.

    `.matrix` is W as (out, in): the weight, or its transpose in the Conv1D of transformers' GPT-2.

    A float32 weight and its update are merged for the product (MergedLinear). A bfloat16 weight
    would round small updates away, and dropout acts on the update's input alone: these layers
    compute W x and dW x apart ("two paths"). dora: rescale the rows of W + dW (lora.Rescaled).
    """

    def __init__(self, linear, update, dropout=0.0, dora=False):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        # The plain layer is kept for `plain`: in a tuple, so not as a submodule, and without its
        # parameters, which can be replaced here (load_state_dict(assign=True), FSDP).
        self.linear, self.transposed = (linear,), is_transposed(linear)
        linear.weight = linear.bias = None
        self.update = Rescaled(self, update) if dora else update
        self.dropout, self.products = dropout, Products
        self.merges = hasattr(update, "gradients")  # False: two paths always

    @property
    def matrix(self):
        return self.weight.T if self.transposed else self.weight

    def forward(self, x):
        """(..., in) -> (..., out), computed in x's dtype, or autocast's."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if not self.can_merge() or self.dropout:
            dropped = F.dropout(x, self.dropout, self.training)
            y = F.linear(x, self.matrix.to(x.dtype)) + self.update(dropped)
        elif torch.is_grad_enabled():
            y = MergedLinear.apply(x, self.matrix, self.update, self.products,
                                   *self.update.parameters())
        else:
            y = F.linear(x, self.merged().to(x.dtype))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def can_merge(self):
        """Whether one product with W + dW will do; the transforms of torch.func take two paths."""
        is_wide = self.weight.dtype in (torch.float32, torch.float64)
        return self.merges and is_wide and not torch._C._are_functorch_transforms_active()

    def delta(self):
        """dW, (out, in), in float32 or float64."""
        return self.update.delta()

    def merged(self):
        """W + dW, (out, in), in float32 or float64."""
        delta = self.delta()
        return self.matrix.to(delta.dtype) + delta

    @torch.no_grad()
    def merge_(self):
        """W <- W + dW; returns the squared Frobenius norm of dW, a tensor. dW stays as it is."""
        delta = self.delta()
        self.matrix.copy_(self.matrix.to(delta.dtype) + delta)
        return delta.square().sum()

    def plain(self):
        """The layer that was adapted, with the current weight and bias."""
        linear = self.linear[0]
        linear.weight, linear.bias = self.weight, self.bias
        return linear

    def get_extra_state(self):
        """{"operator": ..., "groups": ..., "seed": ..., "cycle": ...}: in the state dict, so that
        load_state_dict can refuse an update that is another map here."""
        return self.update.settings() if hasattr(self.update, "settings") else {}

    def set_extra_state(self, state):
        """Compare with the state of another model. Raises RuntimeError at the first difference."""
        own = self.get_extra_state()
        for key in {**own, **state}:
            if own.get(key) != state.get(key):
                raise RuntimeError(f"the update that is loaded has {key} {state.get(key)!r}, the "
                                   f"model's has {own.get(key)!r}: adapt the model as the saved "
                                   "one was")

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Refuse another W without its update: what dW is added to would change unnoticed."""
        has_update = any(key.startswith(f"{prefix}update.") for key in state_dict)
        if f"{prefix}weight" in state_dict and not has_update and list(self.update.parameters()):
            raise RuntimeError(f"the state dict has {prefix}weight but no update of it: load it "
                               "before the model is adapted")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self):
        rows, columns = self.matrix.shape
        return f"in_features={columns}, out_features={rows}, bias={self.bias is not None}"


def adapted_layers(model):
    """[(name, AdaptedLinear)] in the model's order."""
    return [(name, module) for name, module in model.named_modules()
            if isinstance(module, AdaptedLinear)]


def adapter_parameters(model):
    """[(name, parameter)] of the updates alone, a frozen A included."""
    return [(f"{name}.update.{key}", parameter) for name, layer in adapted_layers(model)
            for key, parameter in layer.update.named_parameters()]


# ------------------------------------------------------------
# adapt

def adapt(model, method="mora", rank=8, operator="share", groups="strided", alpha=0.0, rslora=False,
          lora_A="uniform", dora=False, dropout=0.0, targets=PROJECTIONS, train_rest=False,
          seed=0, cycle=0):
    """Replace the linear layers that `targets` names by adapted ones, in place.

    method: "mora", "lora", or "frozen" (the layers are frozen and get no update).
    operator, groups: MoRA's (see Square, Fold). alpha, rslora, lora_A: LoRA's (see LowRank).
    dora: for both (see Rescaled).
    targets: as in peft: a list of last parts of module names; a string, which is such a part or a
    regular expression of whole names; or "all-linear", all but the output embeddings.
    train_rest: the other parameters train (pretraining) or are frozen (fine-tuning).
    seed, cycle: of the random numbers (see start_cycle).

    The parameters of the updates are float32 (float64 if the weight is), on the weight's device.
    Works on any torch module and returns it. Raises ValueError for an unknown name, an option that
    the method does not take, a target that matches no nn.Linear or a shared weight, and a model
    that is adapted already.
    """
    check_options(method, rank, operator, groups, alpha, rslora, lora_A)
    if adapted_layers(model):
        raise ValueError("the model is adapted already: merge it first")
    linears = find_targets(model, targets)
    for parameter in model.parameters():
        parameter.requires_grad_(train_rest and parameter.requires_grad)
    oversized, input_folds = [], {}
    for name, linear in linears.items():
        for parameter in linear.parameters():
            parameter.requires_grad_(False)
        if method == "frozen":
            continue
        options = update_shape(linear) | {"rank": rank}
        if method == "lora":
            update = LowRank(**options, alpha=alpha, rslora=rslora, lora_A=lora_A)
        else:
            update = Square(**options, operator=operator, groups=groups)
            # q, k, v share one fold, and so do gate and up: compiled code compresses an input once
            siblings = (name.rpartition(".")[0], options["in_features"], options["out_features"])
            update.fold_in = input_folds.setdefault(siblings, update.fold_in)
            if update.M.numel() > linear.weight.numel():
                oversized.append(name)
        replace(model, name, AdaptedLinear(linear, update, dropout, dora))
    start_cycle(adapted_layers(model), seed, cycle)
    save_pretrained_merged(model)
    if dropout:
        warnings.warn(f"dropout {dropout} acts on the update's input alone, so the adapted layers "
                      "run two paths, slower than merged", stacklevel=2)
    if oversized:
        warnings.warn(f"rank {rank} gives {len(oversized)} layers (first {oversized[0]}) a square "
                      "with more entries than the weight it updates: full-rank training of them "
                      "would cost less", stacklevel=2)
    return model


def check_options(method, rank, operator, groups, alpha, rslora, lora_A):
    """Raise ValueError for options of adapt that are unknown or do not go together."""
    for key, value, choices in (("method", method, METHODS), ("operator", operator, OPERATORS),
                                ("groups", groups, GROUPS), ("lora_A", lora_A, KINDS_OF_A)):
        if value not in choices:
            raise ValueError(f"{key} must be one of {', '.join(choices)}, got {value!r}")
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if method != "lora" and (alpha or rslora or lora_A != "uniform"):
        raise ValueError("alpha, rslora and lora_A are LoRA's (MoRA's scale is 1): "
                         f"method {method} got {alpha}, {rslora}, {lora_A!r}")
    if rslora and not alpha:
        raise ValueError("rslora scales the update by alpha / sqrt(rank): give it an alpha, got 0")


def is_transposed(module):
    """Whether a module is the Conv1D of transformers' GPT-2: a linear layer, weight (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def find_linears(model):
    """{name: module} of the linear layers that can be adapted, in the model's order."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, nn.Linear) or is_transposed(module)}


def find_targets(model, targets):
    """{name: linear layer} of the layers that the targets name (see adapt), in the model's order.

    Raises ValueError for a target without a linear layer, for a weight that is used twice and for
    one that something else than its layer reads.
    """
    linears = find_linears(model)
    if targets == "all-linear":
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        found = {name: linear for name, linear in linears.items() if linear is not head}
        if not found:
            raise ValueError("targets 'all-linear' matches no linear layer of the model")
    else:
        chosen = set()
        for target in [targets] if isinstance(targets, str) else targets:
            pattern = rf"(.*\.)?{re.escape(target)}"
            if isinstance(targets, str):
                pattern = f"{pattern}|{target}"
            chosen |= matching_linears(model, linears, target, pattern)
        found = {name: linear for name, linear in linears.items() if name in chosen}
    refuse_read_weights(model, found)
    refuse_shared_weights(model, found)
    return found


def matching_linears(model, linears, target, pattern):
    """The names of linear layers that a pattern matches; raises ValueError if there are none."""
    try:
        names = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    except re.error as error:
        raise ValueError(f"target {target!r} is no regular expression: {error}") from None
    matched = {name for name in names if name in linears}
    if matched:
        return matched
    what = "no module"
    if names:
        what = f"only {type(model.get_submodule(names[0])).__name__} modules"
    last_parts = sorted({name.rpartition(".")[2] for name in linears})
    raise ValueError(f"target {target!r} matches {what}; the model's linear layers are named "
                     f"{', '.join(last_parts) or 'nothing'}")


def refuse_read_weights(model, linears):
    """Raise ValueError for a layer whose weight another module of torch multiplies by itself.

    The update would be merged into the weight, but would not be computed in training or (in the
    fast path of nn.TransformerEncoderLayer) not in evaluation.
    """
    for parent_name, parent in model.named_modules():
        if not isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            continue
        for name in linears:
            if name.rpartition(".")[0] == parent_name:
                reader = type(parent).__name__
                raise ValueError(f"{name} is no target: nn.{reader} reads its weight and would "
                                 "pass over the update")
    for name, linear in linears.items():
        if is_transposed(linear):
            continue
        shape = (linear.out_features, linear.in_features)
        weight = linear._parameters.get("weight")  # None: computed by a parametrization
        if weight is None or weight.shape != shape or not weight.is_floating_point():
            raise ValueError(f"{name} is no target: {type(linear).__name__} holds no weight of "
                             f"{shape[0]} x {shape[1]} floating-point numbers to merge into")


def refuse_shared_weights(model, linears):
    """Raise ValueError if a layer or its weight stands in two places of the model.

    A merge would change both places, but only one of them computes the update in training.
    """
    places = {}  # {id of a module or parameter: the names under which it stands}
    for parent_name, parent in model.named_modules():
        for key, held in (*parent._modules.items(), *parent._parameters.items()):
            places.setdefault(id(held), []).append(f"{parent_name}.{key}".lstrip("."))
    for name, linear in linears.items():
        others = [place for place in places[id(linear)] if place != name]
        others += [place for place in places[id(linear.weight)] if place != f"{name}.weight"]
        if others:
            raise ValueError(f"{name} shares its weight with {', '.join(others)}: an update of one "
                             "would be merged into both; untie them, or leave it out of targets")


def update_shape(linear):
    """The arguments of an update that a linear layer fixes: its features, device and dtype."""
    weight = linear.weight.T if is_transposed(linear) else linear.weight
    return {"in_features": weight.shape[1], "out_features": weight.shape[0],
            "device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}


def replace(model, name, module):
    """Put a module in the place of the one of this name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def start_cycle(layers, seed, cycle):
    """Start the updates of [(name, AdaptedLinear)]: dW = 0, with the draws of this seed and cycle.

    The draws are functions of seed, cycle and names: the same on every rank and after a resume.
    """
    input_folds = {}
    for name, layer in layers:
        with whole_parameters(layer):
            layer.update.start_cycle(cycle, seeded_generator(seed, cycle, name))
        for module in layer.update.modules():
            if isinstance(module, Square):
                module.seed, module.cycle = seed, cycle
                fold, parent = module.fold_in, name.rpartition(".")[0]
                input_folds[fold] = f"{parent} {fold.features}"
    for fold, name_of_input in input_folds.items():  # a fold that layers share is drawn once
        fold.move(cycle, seeded_generator(seed, cycle, name_of_input).initial_seed())


def seeded_generator(seed, cycle, name):
    """A CPU generator of random numbers that belongs to a name and a cycle."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {cycle} {name}".encode()))


# ------------------------------------------------------------
# merge

def merge(model):
    """Add every update to its weight (in float32) and put the plain layers back, in place.

    Returns the model. Parameters keep their requires_grad. Raises ValueError if no layer is
    adapted.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("the model has no adapted layers to merge")
    for name, layer in layers:
        layer.merge_()
        replace(model, name, layer.plain())
    model.__dict__.pop("save_pretrained", None)  # the class's own again
    return model


@torch.no_grad()
def merged_weights(model):
    """{name: tensor}, the state dict that merge would leave. The model stays as it was.

    Tensors without an update are not copied.
    """
    weights = model.state_dict()
    for name, layer in adapted_layers(model):
        merged = layer.merged().to(layer.weight.dtype)
        weights[f"{name}.weight"] = merged.T.contiguous() if layer.transposed else merged
        del weights[f"{name}._extra_state"]
    for name, _ in adapter_parameters(model):
        del weights[name]
    return weights


def save_pretrained_merged(model):
    """Let `save_pretrained` of a transformers model write merged weights, until merge.

    Its own would write the frozen weights alone, and from_pretrained would load the bare base.
    """
    if hasattr(type(model), "save_pretrained"):
        model.save_pretrained = functools.partial(_save_merged, model)


def _save_merged(model, folder, *, state_dict=None, **options):
    if state_dict is not None:
        raise ValueError("save_pretrained of an adapted model merges the model's own weights and "
                         "takes no state_dict: call mora.merge(model) first")
    weights = merged_weights(model)
    type(model).save_pretrained(model, folder, state_dict=weights, **options)


# ------------------------------------------------------------
# restart

def restart(model, optimizer, cycle, seed=0, keep=0.0):
    """Merge and start every update again, with the draws of `cycle` (1, 2, ...): ReLoRA, ReMoRA.

    The function is unchanged. LoRA: A is drawn again, B = 0. MoRA: M = 0, the groups move.
    DoRA: m stays. The optimizer forgets the states of the adapters and no others, Adam's step count
    included. keep > 0: instead, only this part of their first moments, the largest, is left.

    Returns {"states": how many states were forgotten or pruned, "update_norm": the Frobenius norm
    of all that was merged}. Raises RuntimeError if an adapter's tensor had no state, so was not
    being trained.
    """
    parameters = [p for _, p in adapter_parameters(model) if p.requires_grad]
    states = sum(bool(optimizer.state.get(parameter)) for parameter in parameters)
    if states != len(parameters):
        raise RuntimeError(f"{states} optimizer states for {len(parameters)} adapter tensors: is "
                           "every adapter in the optimizer, and has it taken a step?")
    layers, squared_norms = adapted_layers(model), []
    for _, layer in layers:
        with whole_parameters(layer):
            squared_norms.append(layer.merge_())
    norm = torch.stack(squared_norms).sum().sqrt().item()
    start_cycle(layers, seed, cycle)
    for parameter in parameters:
        if keep:
            prune_(optimizer.state[parameter]["exp_avg"], keep)
        else:
            del optimizer.state[parameter]
    return {"states": states, "update_norm": norm}


def prune_(first_moment, part):
    """Set all but the largest entries to zero, in place.

    The second moment stays: with zeros there too, Adam's next step would be 3.16 times too large.
    """
    moment = whole(first_moment)
    kept = max(1, round(part * moment.numel()))
    magnitudes = moment.abs().flatten()
    smallest = magnitudes.topk(len(magnitudes) - kept, largest=False).indices
    moment.view(-1)[smallest] = 0
    first_moment.copy_(as_sharded(moment, first_moment))


# ------------------------------------------------------------
# models that torch's fully_shard (FSDP2) cut: each rank has a part of every parameter. In forward
# and backward its hooks make them whole; elsewhere all ranks must call these functions together.

def whole(tensor):
    """The tensor, gathered from all ranks if it is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def as_sharded(tensor, other):
    """The tensor cut as `other` is, this rank's part; the tensor itself if `other` is whole."""
    if not hasattr(other, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    part = distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)
    return part.clone()  # the part alone: a view would keep the whole tensor


@contextlib.contextmanager
def whole_parameters(module):
    """Make a module's parameters whole in a `with` block; each rank then keeps its part of them."""
    sharded = [(owner, key, parameter) for owner in module.modules()
               for key, parameter in owner._parameters.items() if hasattr(parameter, "full_tensor")]
    for owner, key, parameter in sharded:
        owner._parameters[key] = nn.Parameter(whole(parameter.detach()), parameter.requires_grad)
    yield
    for owner, key, parameter in sharded:
        parameter.detach().copy_(as_sharded(owner._parameters[key].detach(), parameter))
        owner._parameters[key] = parameter
