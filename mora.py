"""MoRA, and what every update shares: adapt, merge, restart. One file to copy, with lora.py.

    adapted layer:  y = (W + dW) x      W is frozen; dW is linear in x, zero at the start, trained

           LoRA (lora.py)             Square: MoRA, arXiv 2405.12130, eq. 2
      y <- [ B ] <- [ A ] <- x        y <- F_out^T <- [ M ] <- F_in <- x
           d x r    r x k                 decompress  r^ x r^  compress

F_in and F_out are fixed: the budget r (d + k) is M's, r^ = floor(sqrt(r (d + k))).

    model = mora.adapt(model, rank=8, operator="rotate", targets=("q_proj", "v_proj"))
    ... train the parameters that require a gradient ...
    model = mora.merge(model)      # W <- W + dW: the plain layers come back

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
SETTINGS = ("scale", "operator", "groups", "seed", "cycle", "lora_rank")  # dW depends on them
ALIGNED = 8  # products are fast on rows of such multiples: 16 bytes in bfloat16


def r_hat(rank, in_features, out_features, even=False):
    """The width of M: floor(sqrt(rank (in + out))), no more parameters than LoRA's (section 4)."""
    width = math.isqrt(rank * (in_features + out_features))
    return width - width % 2 if even else width


# ------------------------------------------------------------ the fixed maps

def contiguous_order(position, width):
    """The permutation of position, 0 ... n - 1, that puts neighbours into one group: appendix B's
    second kind. Place p * width + i is member p of group i; the first n mod width have one more."""
    smaller_size, larger_groups = divmod(len(position), width)
    group = position % width
    return group * smaller_size + group.clamp(max=larger_groups) + position // width


def rolled_order(position, width, generator):
    """A random permutation of position, 0 ... n - 1: all are rolled, then every piece of `width`.
    Long runs are read fast. Merged cycles nearly reach the rank of uniform ones (LOG.md)."""
    def rolled(indices):
        offset = torch.randint(len(indices), (1,), generator=generator, device="cpu")
        return indices.roll(int(offset))

    return torch.cat([rolled(piece) for piece in rolled(position).split(width)])


def rotations(width, pieces):
    """Cosines and signed sines of eq. 10, (2, pieces, width), float64: piece p turns by the angles
    p * 10000^(-2j / width). The pairs are (j, j + width/2), where the paper has (2j, 2j + 1)."""
    theta = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)
    angles = torch.arange(pieces, dtype=torch.float64, device="cpu")[:, None] * theta
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)))


class Permute(torch.autograd.Function):
    """x[..., order], whose gradient is a gather; the gradient of indexing is a slow scatter."""
    generate_vmap_rule = True  # torch.func.vmap

    @staticmethod
    def forward(x, order, inverse):
        return x[..., order.int()]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, dy):
        order, inverse = ctx.saved_tensors
        return Permute.apply(dy, inverse, order), None, None


class Fold(nn.Module):
    """A linear map without parameters from n features to `blocks` blocks of `width`, and its
    adjoint: permute the features, cut them into pieces of `width` (the last padded with zeros),
    rotate the pieces if asked to, add piece p to block p mod blocks, ignore further features."""

    def __init__(self, features, width, blocks, pieces, rotates, groups):
        super().__init__()
        self.features, self.width, self.blocks, self.pieces = features, width, blocks, pieces
        self.used = min(features, pieces * width)
        self.groups, self.cycle, self.seed = groups, None, None  # cycle, seed: of the last `move`
        order = None if groups == "strided" else torch.arange(features, dtype=torch.int32)
        inverse = None if order is None else order.clone()
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("inverse", inverse, persistent=False)
        turns = rotations(width, pieces).float() if rotates else None
        self.register_buffer("turns", turns, persistent=False)

    def move(self, cycle, seed):
        """Take this cycle's permutation, for `permute` this seed's, in place: no recompilation."""
        self.cycle, self.seed = cycle, seed
        if self.groups == "strided":
            return
        # the permutation is made on its device: a copy to it would synchronize
        order = position = torch.arange(self.features, device=self.order.device)
        if self.groups == "permute":
            order = rolled_order(position, self.width, torch.Generator().manual_seed(seed))
        elif self.groups == "contiguous" or cycle % 2 == 1:  # alternate: the odd cycles
            order = contiguous_order(position, self.width)
        self.order.copy_(order)  # feature order[i] at place i
        self.inverse.copy_(order.argsort())

    def narrow(self):
        """Hold the order in 16 bits if they suffice: read faster, but DDP cannot broadcast them."""
        if self.order is not None and self.features < 2 ** 15:
            self.order, self.inverse = self.order.short(), self.inverse.short()

    def _apply(self, fn, recurse=True):
        """Fill the buffers again: `meta` empties them, casts round them, no state dict has them."""
        super()._apply(fn, recurse)
        if self.turns is not None:
            self.turns.copy_(rotations(self.width, self.pieces))
        if self.cycle is not None:
            self.move(self.cycle, self.seed)
        return self

    def forward(self, x, multiple=1):
        """(..., n) -> (..., blocks, width), the width padded with zeros to a multiple of this."""
        if self.order is not None and torch.is_grad_enabled():
            x = Permute.apply(x, self.order, self.inverse)
        elif self.order is not None:  # truncate reads the inputs that it keeps
            x = Permute.forward(x, self.order[:self.used], self.inverse)
        padded = F.pad(x[..., :self.used], (0, self.pieces * self.width - self.used))
        pieces = self.rotate(padded.unflatten(-1, (self.pieces, self.width)), 1)
        # padding comes before the sum, so that one kernel does both
        pieces = F.pad(pieces, (0, -self.width % multiple, 0, -self.pieces % self.blocks))
        return pieces.unflatten(-2, (-1, self.blocks)).sum(-3)

    def adjoint(self, blocks):
        """(..., blocks, width) -> (..., n): every feature reads the place that it is added to."""
        repeats = -(-self.pieces // self.blocks)
        repeated = blocks.unsqueeze(-3).expand(*blocks.shape[:-2], repeats, *blocks.shape[-2:])
        pieces = self.rotate(repeated.flatten(-3, -2)[..., :self.pieces, :], -1)
        x = F.pad(pieces.flatten(-2)[..., :self.used], (0, self.features - self.used))
        return x if self.order is None else Permute.apply(x, self.inverse, self.order)

    def rotate(self, pieces, sign):
        """Rotate pairs (j, j + width/2) of (..., pieces, width) by sign * the angles, if any."""
        if self.turns is None:
            return pieces
        cos, sin = self.turns.to(torch.promote_types(pieces.dtype, torch.float32))
        partners = pieces.unflatten(-1, (2, -1)).flip(-2).flatten(-2)  # fused: no half twice
        return (pieces * cos + partners * (sign * sin)).to(pieces.dtype)


class Square(nn.Module):
    """MoRA: dW = F_out^T kron(I_m, M) F_in, eq. 2, with one square M (r^, r^). The operators differ
    in the folds alone: truncate (eq. 4, 5) keeps the first piece; share (6, 7) adds all pieces into
    one block; decouple (8) has m = min(pieces in, pieces out) blocks, so that no input is ignored;
    rotate (9-11) is decouple with the pieces of the input rotated."""

    def __init__(self, in_features, out_features, rank, operator="share", groups="strided"):
        super().__init__()
        rotates = operator == "rotate"
        width = r_hat(rank, in_features, out_features, even=rotates)
        if width < 1:
            raise ValueError(f"rank {rank} leaves no M for a layer {in_features} -> {out_features}")
        self.rank, self.operator, self.groups = rank, operator, groups
        self.seed = self.cycle = None  # mora.start_cycle sets them
        pieces_in, pieces_out = -(-in_features // width), -(-out_features // width)
        if operator == "truncate":
            pieces_in = pieces_out = 1
        blocks = 1 if operator == "share" else min(pieces_in, pieces_out)
        self.M = nn.Parameter(torch.zeros(width, width))
        self.fold_in = Fold(in_features, width, blocks, pieces_in, rotates, groups)
        self.fold_out = Fold(out_features, width, blocks, pieces_out, False, groups)

    def start_cycle(self, cycle, generator):
        """Set M = 0. Both arguments are LoRA's; mora.start_cycle moves the groups."""
        self.M.zero_()

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
        width, compressed_dy = len(self.M), self.fold_out(dy, ALIGNED).flatten(0, -2)
        return [(compressed_dy.T @ compressed)[:width, :width].to(self.M.dtype)]

    def delta(self):
        """dW, (out, in). Only adjoints are taken, so every entry is read from M (eq. 3)."""
        fold, m = self.fold_in, self.fold_in.blocks
        columns = fold.adjoint(self.M.unsqueeze(1).expand(-1, m, -1)).T[:, None]  # (in, 1, r^)
        if m > 1:  # an input meets the outputs of its own block alone
            block = torch.arange(fold.features, device=columns.device) // fold.width % m
            if fold.order is not None:
                block = block[fold.inverse.int()]
            is_own = block[:, None] == torch.arange(m, device=columns.device)  # (in, m)
            columns = columns * is_own[..., None]  # (in, m, r^)
        return self.fold_out.adjoint(columns).T


class Mixed(Square):
    """MoRA beside a LoRA: dW = F_out^T kron(I_m, M) F_in + B A; not in the paper (docs/algebra.md).
    A restart merges M's part alone and moves its groups; A, B and their optimizer states stay."""

    def __init__(self, in_features, out_features, rank, operator, groups, lora_rank):
        super().__init__(in_features, out_features, rank - lora_rank, operator, groups)
        self.rank, self.lora_rank = rank, lora_rank
        self.low_rank = LowRank(in_features, out_features, lora_rank)

    def start_cycle(self, cycle, generator):
        super().start_cycle(cycle, generator)
        if self.cycle is None:  # the first time
            self.low_rank.start_cycle(cycle, generator)

    def forward(self, x):
        return super().forward(x) + self.low_rank(x)

    def compress(self, x):
        return self.low_rank.compress(x)  # x itself: A's gradient needs it

    def gradients(self, x, dy):
        return super().gradients(super().compress(x), dy) + self.low_rank.gradients(x, dy)

    def delta(self):
        return super().delta() + self.low_rank.delta()


def delta_of(update, device, dtype):
    """Return dW. Products in it (LoRA's B A) have operands of `dtype`, inside another autocast too:
    float32's took 5 % of LoRA's step in FP8, and W + dW is rounded to bfloat16 anyway."""
    with torch.autocast(device.type, dtype, dtype.itemsize == 2, cache_enabled=False):
        return update.delta()


class MergedLinear(torch.autograd.Function):
    """y = (W + dW) x: one product forward and one for dx, without full rank's third, W's gradient.
    W + dW is saved, and update.compress(x): for MoRA r^ numbers per block and token, never x.
    products: None, or model.Float8Products, for which W is saved and merged again."""

    @staticmethod
    def forward(ctx, x, weight, update, products, *parameters):
        ctx.update, ctx.products, ctx.parameters = update, products, parameters
        compressed = update.compress(x)
        merged = weight + delta_of(update, x.device, x.dtype)
        if products is None:
            merged = merged.to(x.dtype)
        ctx.save_for_backward(compressed, merged if products is None else weight)
        return F.linear(x, merged) if products is None else products.y(x, merged)

    @staticmethod
    def backward(ctx, dy):
        own = zip(ctx.update.parameters(), ctx.parameters, strict=True)
        if torch.is_grad_enabled() or any(now is not before for now, before in own):
            raise RuntimeError("a merged layer is differentiated once, in its own parameters: for "
                               "create_graph=True or functional_call set layer.merges = False")
        compressed, matrix = ctx.saved_tensors  # matrix: W + dW, or W for FP8
        if ctx.products is None:
            dx = dy @ matrix
        else:
            dx = ctx.products.dx(dy, matrix + delta_of(ctx.update, dy.device, dy.dtype))
        return dx, None, None, None, *ctx.update.gradients(compressed, dy)


class AdaptedLinear(nn.Module):
    """A frozen linear layer with an update: y = W x + dW x + b. W stays in `.weight`. A float32
    weight and its update are merged for the product (MergedLinear). A bfloat16 weight would round
    small updates away, and dropout acts on the update's input alone: these layers compute W x and
    dW x apart ("two paths"). dora: rescale the rows of W + dW (lora.Rescaled)."""

    def __init__(self, linear, update, dropout=0.0, dora=False):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        # `merge` puts the plain layer back. It is no submodule (in a tuple) and has no parameters,
        # since they can be replaced here (load_state_dict(assign=True), FSDP).
        self.linear, self.transposed = (linear,), is_transposed(linear)
        linear.weight = linear.bias = None
        self.update = Rescaled(self, update) if dora else update
        self.update.to(self.weight.device, torch.promote_types(self.weight.dtype, torch.float32))
        self.dropout, self.products, self.restarted = dropout, None, False
        self.merges = hasattr(update, "gradients")  # False: two paths always

    @property
    def matrix(self):
        """W, (out, in): the weight, or its transpose in the Conv1D of transformers' GPT-2."""
        return self.weight.T if self.transposed else self.weight

    def forward(self, x):
        """(..., in) -> (..., out), computed in x's dtype, or autocast's."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        W, products, parameters = self.matrix, self.products, [*self.update.parameters()]
        in_transform = torch._C._are_functorch_transforms_active()  # of torch.func
        # MergedLinear gives W no gradient; in DataParallel and FSDP 1 parameters() is empty
        needs_paths = torch.is_grad_enabled() and (W.requires_grad or not parameters)
        if not self.merges or W.dtype.itemsize < 4 or self.dropout or in_transform or needs_paths:
            y = F.linear(x, W.to(x.dtype)) if products is None else products(x, W)
            y = y + self.update(F.dropout(x, self.dropout, self.training))
        elif torch.is_grad_enabled():
            y = MergedLinear.apply(x, W, self.update, products, *parameters)
        else:
            y = F.linear(x, self.merged(x.dtype).to(x.dtype))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def merged(self, dtype=torch.float32):
        """W + dW, (out, in), in float32 or float64; products in dW have operands of `dtype`."""
        return self.matrix + self.delta(dtype)  # dW is float32 or wider

    def delta(self, dtype=torch.float32):
        """dW, (out, in), see delta_of. Raises RuntimeError if W cannot take it."""
        if self.weight.dtype == torch.float8_e4m3fn:
            raise RuntimeError("8 bits round dW away: merge.py adds it to the original weights")
        return delta_of(self.update, self.weight.device, dtype)

    @torch.no_grad()
    def merge_(self, restarts=False):
        """W <- W + dW; returns the squared Frobenius norm of dW, a tensor. dW stays as it is.
        restarts: of dW only what a restart starts again (see Mixed)."""
        is_part, self.restarted = restarts and isinstance(self.update, Mixed), restarts
        with whole_parameters(self):
            delta = Square.delta(self.update) if is_part else self.delta()
            self.matrix.copy_(self.matrix.to(delta.dtype) + delta)
        return delta.square().sum()

    def get_extra_state(self):
        """The update's settings, so that load_state_dict refuses an update that is another map."""
        update = getattr(self.update, "inner", self.update)
        return {key: getattr(update, key) for key in SETTINGS if hasattr(update, key)}

    def set_extra_state(self, state):
        if state != self.get_extra_state():
            raise RuntimeError(f"the loaded update has {state}, the model's "
                               f"{self.get_extra_state()}: adapt the model as the saved one was")

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Refuse a W that comes without its update: dW would be added to another W unnoticed."""
        has_update = any(key.startswith(f"{prefix}update.") for key in state_dict)
        if f"{prefix}weight" in state_dict and not has_update and list(self.update.parameters()):
            raise RuntimeError(f"{prefix}weight but no update of it: load it, then adapt the model")
        super()._load_from_state_dict(state_dict, prefix, *args)
        if any(buffer.is_meta for buffer in self.update.buffers()):  # assign=True leaves them there
            self.update.to_empty(device=self.weight.device)


def unwrapped(model):
    """The model inside torch.compile, DDP and DataParallel, which put prefixes before its names."""
    is_parallel = isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)
    inner = model.module if is_parallel else getattr(model, "_orig_mod", None)
    return model if inner is None else unwrapped(inner)


def adapted_layers(model):
    """[(name, AdaptedLinear)] in the order, and with the names, of the unwrapped model."""
    return [(name, module) for name, module in unwrapped(model).named_modules()
            if isinstance(module, AdaptedLinear)]


def adapter_parameters(model):
    """[(name, parameter)] of the updates alone, a frozen A included."""
    return [(f"{name}.update.{key}", parameter) for name, layer in adapted_layers(model)
            for key, parameter in layer.update.named_parameters()]


def adapt(model, method="mora", rank=8, operator="share", groups="strided", alpha=0.0, rslora=False,
          lora_A="uniform", dora=False, dropout=0.0, targets=PROJECTIONS, train_rest=False,
          seed=0, cycle=0, lora_rank=0):
    """Replace the linear layers that `targets` names by adapted ones in any torch module, in place,
    and return it. Updates are float32 (float64 if the weight is), on the weight's device.

    method: "mora", "lora", or "frozen" (no update). dora: of both (see Rescaled). operator, groups,
    lora_rank: MoRA's (see Square, Fold, Mixed). alpha, rslora, lora_A: LoRA's (see LowRank).
    targets: as in peft: a list of last parts of module names; a string, which is such a part or a
    regular expression of whole names; or "all-linear", all but the output embeddings.
    train_rest: the other parameters train (pretraining) or are frozen (fine-tuning).
    seed, cycle: see start_cycle. Raises ValueError for what cannot be adapted."""
    check_options(method, rank, operator, groups, lora_rank, alpha, rslora, lora_A, dora, dropout)
    if not (isinstance(seed, int) and isinstance(cycle, int) and cycle >= 0):
        raise ValueError(f"seed and cycle must be whole numbers, cycle from 0, got {seed}, {cycle}")
    if adapted_layers(model):
        raise ValueError("the model is adapted already: merge it first")
    linears = find_targets(model, targets)
    if not train_rest:
        model.requires_grad_(False)
    oversized, input_folds = [], {}
    for name, linear in linears.items():
        linear.requires_grad_(False)
        if method == "frozen":
            continue
        shape = features_of(linear)
        with linear.weight.device:
            if method == "lora":
                update = LowRank(*shape, rank, alpha, rslora, lora_A)
            elif lora_rank:
                update = Mixed(*shape, rank, operator, groups, lora_rank)
            else:
                update = Square(*shape, rank, operator, groups)
        if method == "mora":
            # q, k, v share one fold, and so do gate and up: compiled code compresses an input once
            siblings = (name.rpartition(".")[0], *shape)
            update.fold_in = input_folds.setdefault(siblings, update.fold_in)
        if sum(p.numel() for p in update.parameters()) > linear.weight.numel():
            oversized.append(name)
        model.set_submodule(name, AdaptedLinear(linear, update, dropout, dora))
    start_cycle(adapted_layers(model), seed, cycle)
    save_pretrained_merged(unwrapped(model))
    if oversized:
        warnings.warn(f"rank {rank} gives {len(oversized)} layers (first {oversized[0]}) an update "
                      "of more entries than its weight: full rank would cost less", stacklevel=2)
    return model


def check_options(method, rank, operator, groups, lora_rank, alpha, rslora, lora_A, dora, dropout):
    """Raise ValueError for options of adapt that are unknown or do not go together."""
    for key, value, choices in (("method", method, METHODS), ("operator", operator, OPERATORS),
                                ("groups", groups, GROUPS), ("lora_A", lora_A, KINDS_OF_A),
                                ("rslora", rslora, (False, True)), ("dora", dora, (False, True))):
        if value not in choices:
            raise ValueError(f"{key} must be one of {', '.join(map(str, choices))}, got {value!r}")
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank must be a whole number from 1 on, got {rank!r}")
    if method != "mora" and (operator, groups) != ("share", "strided"):
        raise ValueError(f"operator, groups need method mora, {method} got {operator}, {groups}")
    if method != "lora" and (alpha or rslora or lora_A != "uniform"):
        raise ValueError("alpha, rslora and lora_A are LoRA's (MoRA's scale is 1): "
                         f"method {method} got {alpha}, {rslora}, {lora_A!r}")
    if method == "frozen" and (dora or dropout):
        raise ValueError(f"dora, dropout need method mora or lora, frozen got {dora}, {dropout}")
    fits = type(lora_rank) is int and 0 <= lora_rank < rank
    if not fits or lora_rank and (dora or method != "mora"):
        raise ValueError("lora_rank is the part of MoRA's rank that is a LoRA: give one below rank "
                         f"{rank}, without dora; got lora_rank {lora_rank}, dora {dora}")
    if not isinstance(alpha, int | float) or not 0 <= alpha < math.inf or rslora and not alpha:
        raise ValueError(f"alpha scales the update: give it an alpha above 0, got {alpha!r}")
    if dropout is True or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"dropout must be a number from 0 to below 1, got {dropout}")


def is_transposed(module):
    """Whether a module is the Conv1D of transformers' GPT-2: a linear layer, weight (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def find_linears(model):
    """{name: module} of the linear layers that can be adapted, in the model's order."""
    return {name: module for name, module in model.named_modules()
            if name and (isinstance(module, nn.Linear) or is_transposed(module))}


def find_targets(model, targets):
    """{name: linear layer} that the targets name (see adapt), in the model's order."""
    for name, module in model.named_modules():
        if hasattr(module, "adapter_layer_names"):
            raise ValueError(f"{name} has an adapter of peft: merge it first (merge_and_unload)")
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError("DDP ignores parameters that are added later: adapt the model before")
    linears, chosen = find_linears(model), set()
    if targets == "all-linear":
        head = getattr(model, "lm_head", None)
        if hasattr(model, "get_output_embeddings"):
            head = model.get_output_embeddings()
        linears = {name: m for name, m in linears.items() if m is not head}
        patterns = {targets: ".*"}
    elif isinstance(targets, str):
        patterns = {targets: rf"{targets}|(.*\.)?{re.escape(targets)}"}
    else:  # no target is an error, as one that matches nothing
        patterns = {target: rf"(.*\.)?{re.escape(str(target))}" for target in targets or [""]}
    for target, pattern in patterns.items():
        try:
            matched = {name for name in linears if re.fullmatch(pattern, name)}
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"target {target!r} is no regular expression: {error}") from None
        if not matched:
            parts = sorted({name.rpartition(".")[2] for name in linears})
            raise ValueError(f"target {target!r} matches no linear layer; these are named "
                             f"{', '.join(parts) or 'nothing'}")
        chosen |= matched
    found = {name: m for name, m in linears.items() if name in chosen}
    refuse_unfit(model, found)
    return found


def refuse_unfit(model, linears):
    """Raise ValueError for a layer of {name: linear} whose weight is not a matrix of its own. Its
    update would be merged for every reader of the weight, but this layer alone trains it."""
    named = list(model.named_parameters(remove_duplicate=False))
    for name, linear in linears.items():
        weight = linear._parameters.get("weight")  # None: computed by a parametrization
        reader = type(model.get_submodule(name.rpartition(".")[0]))
        others = [key for key, held in named if held is weight and key != f"{name}.weight"]
        if linear._forward_hooks or linear._forward_pre_hooks:
            raise ValueError(f"{name} has forward hooks, which an adapted layer would not call")
        is_plain = getattr(linear.forward, "__func__", None) is nn.Linear.forward
        if not (is_plain or is_transposed(linear) or hasattr(linear, "products")):  # model.py's
            raise ValueError(f"{name}: this {type(linear).__name__} has a forward of its own, "
                             "which an adapted layer would not call")
        if issubclass(reader, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            raise ValueError(f"{name} is no target: nn.{reader.__name__} reads its weight alone")
        if not is_transposed(linear) and (
                weight is None or not weight.is_floating_point()
                or weight.shape != (linear.out_features, linear.in_features)):
            raise ValueError(f"{name} is no target: it holds no (out, in) matrix of real numbers")
        if others:
            raise ValueError(f"{name} shares its weight with {', '.join(others)}: untie them first")


def features_of(linear):
    """(in_features, out_features), the first arguments of an update."""
    rows, columns = linear.weight.shape
    return (rows, columns) if is_transposed(linear) else (columns, rows)


@torch.no_grad()
def start_cycle(layers, seed, cycle):
    """Start [(name, AdaptedLinear)] at dW = 0, with draws that depend on seed, cycle and name."""
    def seed_of(name):
        own = name.replace("_orig_mod.", "").removeprefix("module.")  # of torch.compile and DDP
        return zlib.crc32(f"{seed} {cycle} {own}".encode())

    for name, layer in layers:
        with whole_parameters(layer):
            layer.update.start_cycle(cycle, torch.Generator().manual_seed(seed_of(name)))
        for square in layer.update.modules():
            if isinstance(square, Square):  # layers that share an input's fold get the same draw
                square.seed, square.cycle = seed, cycle
                input_name = f"{name.rpartition('.')[0]} {square.fold_in.features}"
                square.fold_in.move(cycle, seed_of(input_name))
                square.fold_out.move(cycle, seed_of(name))


def merge(model):
    """Add every update to its weight (in float32) and put the plain layers back, in place. Returns
    the model. Parameters keep their requires_grad. Raises ValueError if no layer is adapted."""
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("the model has no adapted layers to merge")
    for name, layer in layers:
        layer.merge_()
        linear = layer.linear[0]
        linear.weight, linear.bias = layer.weight, layer.bias
        unwrapped(model).set_submodule(name, linear)
    unwrapped(model).__dict__.pop("save_pretrained", None)  # the class's own again
    return model


@torch.no_grad()
def merged_weights(model):
    """{name: tensor}, the state dict that merge would leave. Other tensors are not copied."""
    weights = unwrapped(model).state_dict()
    for name, layer in adapted_layers(model):
        merged = layer.merged().to(layer.weight.dtype)
        weights[f"{name}.weight"] = merged.T.contiguous() if layer.transposed else merged
        del weights[f"{name}._extra_state"]
    for name, _ in adapter_parameters(model):
        del weights[name]
    return weights


def save_pretrained_merged(model):
    """Let `save_pretrained` write merged weights: from_pretrained would ignore the updates."""
    if hasattr(type(model), "save_pretrained"):
        model.save_pretrained = functools.partial(_save_merged, model)  # a deepcopy gets its own


def _save_merged(model, folder, *, state_dict=None, **options):
    if state_dict is not None:
        raise ValueError("an adapted model saves its own merged weights and takes no state_dict")
    type(model).save_pretrained(model, folder, state_dict=merged_weights(model), **options)


def restart(model, optimizer, cycle, seed=0, keep=0.0):
    """ReLoRA, ReMoRA: merge and start every update again, with the draws of `cycle` (1, 2, ...).
    The function is the same to rounding. The optimizer forgets the adapters' states alone, step
    counts too; keep > 0: only this part of Adam's first moments, the largest, is left instead.
    Returns {"states": how many were forgotten or pruned, "update_norm": the Frobenius norm of what
    was merged}. Raises RuntimeError if an adapter has no state to forget, ValueError for weights of
    16 bits, for the cycle that a MoRA is in already and for another `keep` than from 0 to 1."""
    if not isinstance(keep, int | float) or not 0 <= keep <= 1:
        raise ValueError(f"keep must be a number from 0 to 1, got {keep!r}")
    layers = adapted_layers(model)
    for name, layer in layers:
        if layer.weight.dtype.itemsize < 4:
            raise ValueError(f"{name}: {layer.weight.dtype} rounds small updates away: use float32")
        if layer.get_extra_state().get("cycle") == cycle:  # of MoRA, whose groups would not move
            raise ValueError(f"{name} is in cycle {cycle} already: a restart begins another one")
    parameters = [p for name, p in adapter_parameters(model)
                  if p.requires_grad and ".update.low_rank." not in name]  # Mixed keeps its LoRA
    held, kind = [optimizer.state.get(p, {}) for p in parameters], "Adam" if keep else "optimizer"
    states = sum("exp_avg" in state if keep else bool(state) for state in held)
    if states != len(parameters) or not parameters:
        raise RuntimeError(f"{states} {kind} states for {len(parameters)} adapter tensors: is "
                           "every adapter in the optimizer, and has it taken a step?")
    norm = torch.stack([layer.merge_(restarts=True) for _, layer in layers]).sum().sqrt().item()
    start_cycle(layers, seed, cycle)
    for parameter in parameters:
        if not keep:
            del optimizer.state[parameter]
            continue
        # the second moment stays: with zeros there, Adam's next step would be 3.16 times too large
        first_moment = optimizer.state[parameter]["exp_avg"]
        moment = whole(first_moment)
        count = moment.numel() - max(1, round(keep * moment.numel()))
        moment.view(-1)[moment.abs().flatten().topk(count, largest=False).indices] = 0
        first_moment.copy_(as_sharded(moment, first_moment))
    return {"states": states, "update_norm": norm}


# ------------------------------------------------------------ models that fully_shard (FSDP2) cut
# Each rank has a part of every parameter. torch's hooks make them whole in forward and backward;
# elsewhere all ranks must call these functions together.

def whole(tensor):
    """The tensor, gathered from all ranks if it is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather(values):
    """Nested dicts of tensors; sharded ones become whole on rank 0's CPU, None on other ranks."""
    if isinstance(values, dict):
        return {key: gather(value) for key, value in values.items()}
    full = whole(values)
    if full is values:
        return values
    return full.cpu() if torch.distributed.get_rank() == 0 else None


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
