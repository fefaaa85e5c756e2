"""Variants of training that may close the gap between adapters and full rank: patches of modules.

    python results/close_gap/variants.py maps=svd,warm=100 configs/60m_mora.py --groups=permute ...
    python results/close_gap/variants.py none configs/tiny_mora.py ...

A variant patches train.py, mora.py and optimizer.py for one run; `applied` takes the patches back.
Plans of results/sweep.py use it as PREPARE. No run writes a checkpoint: some updates have no
format. One process, no resume, no FSDP.
"""
import contextlib
import dataclasses
import math
import random
import sys
import zlib
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import config  # isort: skip
import torch
from torch import nn
from torch.nn import functional as F

import checkpoint
import mora
import optimizer
import train

KINDS = mora.PROJECTIONS


def wrap(patches, module, name, wrapper):
    """Replace module.name by a function that calls wrapper(original, *its arguments)."""
    original = getattr(module, name)
    patches.enter_context(mock.patch.object(
        module, name, lambda *args, **kwargs: wrapper(original, *args, **kwargs)))


def before_steps(patches, hook):
    """Call hook(step, model, optimizer, batch) before each optimizer step."""
    steps = iter(range(10 ** 9))

    def step(original, model, optimizer, batch, *rest):
        hook(next(steps), model, optimizer, batch)
        return original(model, optimizer, batch, *rest)

    wrap(patches, train, "optimizer_step", step)


def block_matrices(model):
    """{name: parameter} of the weights of the blocks' linear layers, adapted or not."""
    return {name: p for name, p in model.named_parameters()
            if p.ndim == 2 and ".layers." in f".{name}" and ".update." not in name}


def say(text):
    print(f"variant: {text}", flush=True)


# ------------------------------------------------------------ the frozen weights

def init_std(patches, factor, names=KINDS):
    """The standard deviation of the blocks' matrices at the start, times a factor."""
    def build(original, cfg, tokens):
        cfg, model = original(cfg, tokens)
        for name, weight in block_matrices(model).items():
            if any(key in name for key in names):
                weight.data.mul_(float(factor))
        return cfg, model

    wrap(patches, train, "build_model", build)


def residual_std(patches, factor):
    """init_std of o_proj and down_proj alone: at 0 every block is the identity at the start."""
    init_std(patches, factor, ("o_proj", "down_proj"))


def noise_decay(patches, factor):
    """The random part of W shrinks by `factor` at each restart; what training added stays. The
    start weights follow from the seed, so they cost no memory."""
    start = {}

    def build(original, cfg, tokens):
        cfg, model = original(cfg, tokens)
        start.update({name: w.detach().clone() for name, w in block_matrices(model).items()})
        return cfg, model

    def restart(original, model, *args):
        for name, weight in block_matrices(model).items():
            noise = start[name]
            weight.data.sub_(noise.to(weight.device), alpha=1 - float(factor))
            noise.mul_(float(factor))
        return original(model, *args)

    wrap(patches, train, "build_model", build)
    wrap(patches, mora, "restart", restart)


# ------------------------------------------------------------ full rank, a part at a time

def units_of(model, unit):
    """{name of a unit: [its matrices' names]}; unit: block, kind or matrix."""
    units = {}
    for name in block_matrices(model):
        block, kind = name.split(".layers.")[1].split(".")[0], name.split(".")[-2]
        key = {"block": block, "kind": kind, "matrix": f"{block} {kind}"}[unit]
        units.setdefault(key, []).append(name)
    return units


def full_layer(patches, value):
    """UNIT:EVERY[:SHARE]. Method full; in a cycle of EVERY steps some units alone train: one block
    or kind, or single matrices until SHARE of the block parameters is reached (default: one unit).
    Units are drawn like cards: each once before any again. Frozen ones lose Muon's state and get no
    gradient. Embeddings, head and norms always train."""
    unit, every, *share = value.split(":")
    deck, draw = [], random.Random(0)

    def deal(step, model, optimizer, _):
        if step % int(every):
            return
        matrices, units, chosen = block_matrices(model), units_of(model, unit), []
        total = sum(p.numel() for p in matrices.values())
        wanted = float(share[0]) * total if share else 1
        while sum(matrices[name].numel() for name in chosen) < wanted:
            if not deck:
                deck.extend(draw.sample(sorted(units), len(units)))
            chosen += units[deck.pop()]
        for name, p in matrices.items():
            p.requires_grad_(name in chosen)
            if name not in chosen:
                optimizer.state.pop(p, None)
        count = sum(matrices[name].numel() for name in chosen)
        if step < 3 * int(every):
            say(f"step {step}: {count:,} of {total:,} block parameters train in {len(chosen)} "
                f"matrices")

    before_steps(patches, deal)


# ------------------------------------------------------------ cycles

def stagger(patches, groups):
    """A restart is that of every `groups`-th block alone, in turn; divide restart_every by it."""
    def restart(original, model, optimizer, cycle, *args):
        def subset(model):
            return [(name, layer) for name, layer in all_layers(model)
                    if int(name.split("layers.")[1].split(".")[0]) % int(groups)
                    == cycle % int(groups)]

        all_layers = mora.adapted_layers
        with mock.patch.object(mora, "adapted_layers", subset):
            return original(model, optimizer, cycle, *args)

    wrap(patches, mora, "restart", restart)


def warm(patches, steps):
    """The first `steps` steps train all weights at full rank; then the adapters start on them. It
    is a full-rank run with --init_from after it, on one schedule and without a step more."""
    settings = []

    def prepare(original, cfg, *args):
        settings.append(cfg)
        return original(dataclasses.replace(cfg, method="full"), *args)

    def switch(step, model, optimizer_, _):
        if step == int(steps):
            cfg = settings[0]
            for weight in block_matrices(model).values():
                optimizer_.state.pop(weight, None)
            mora.adapt(model, **cfg.adapter(), cycle=cfg.cycle(step)[0])
            optimizer_.param_groups.clear()
            for group in optimizer.parameter_groups(cfg, model):
                optimizer_.add_param_group(group)
            say(f"step {step}: {trained(model):,} parameters train from here on")

    def restart(original, model, *args):
        adapted = mora.adapted_layers(model)
        return original(model, *args) if adapted else {"states": 0, "update_norm": 0.0}

    wrap(patches, train, "prepare_model", prepare)
    wrap(patches, mora, "restart", restart)
    before_steps(patches, switch)


def trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def keep_momentum(patches, factor):
    """Muon's momentum of M lives on over a restart, times a factor."""
    def restart(original, model, optimizer, *args):
        kept = {p: optimizer.state[p]["momentum"] for _, p in mora.adapter_parameters(model)}
        report = original(model, optimizer, *args)
        for p, momentum in kept.items():
            optimizer.state[p] = {"momentum": momentum.mul_(float(factor))}
        return report

    wrap(patches, mora, "restart", restart)


def full_momentum(patches, _):
    """A restart gives M the momentum that it would have had: that of W's gradient at full rank,
    seen by the new groups. No adapter can have it, since it needs full rank's state: this measures
    what a forgotten momentum costs."""
    momenta = {}

    def note(step, model, optimizer_, batch):
        for layer, gradient in full_gradients(model, batch).items():
            momenta.setdefault(layer, torch.zeros_like(gradient)).lerp_(
                gradient, 1 - optimizer.MUON_MOMENTUM)

    def restart(original, model, optimizer_, *args):
        report = original(model, optimizer_, *args)
        for layer, momentum in momenta.items():
            M = next(p for n, p in layer.update.named_parameters() if n.endswith("M"))
            with torch.enable_grad():
                inner = (layer.update.delta() * momentum).sum()
            optimizer_.state[M] = {"momentum": torch.autograd.grad(inner, M)[0]}
        return report

    wrap(patches, mora, "restart", restart)
    before_steps(patches, note)


def cycle_lr(patches, value):
    """HIGH:LOW:EVERY. The rate of the matrices falls in a line from HIGH to LOW times the
    schedule's in each cycle of EVERY steps: what is merged and then frozen is annealed first."""
    high, low, every = map(float, value.split(":"))

    def step(step, model, optimizer, batch):
        done = step % every / every
        for group in optimizer.param_groups:
            if group["muon"]:
                group["ratio"] = high + (low - high) * done

    before_steps(patches, step)


def merge_mean(patches, last):
    """A restart merges the mean of M over the last LAST steps of the cycle, not its last value:
    the noise of the steps is averaged out before it is frozen. The function changes a little."""
    sums, recent = {}, int(last)

    def note(step, model, optimizer, batch):
        for _, p in mora.adapter_parameters(model):
            queue = sums.setdefault(p, [])
            queue.append(p.detach().clone())
            del queue[:-recent]

    def restart(original, model, *args):
        for _, p in mora.adapter_parameters(model):
            p.data.copy_(torch.stack(sums[p]).mean(0))
        sums.clear()
        return original(model, *args)

    before_steps(patches, note)
    wrap(patches, mora, "restart", restart)


# ------------------------------------------------------------ other updates

def replace_updates(patches, make):
    """After mora.adapt: replace each layer's update by make(name, layer, rank), start the cycle."""
    def adapt(original, model, **keys):
        original(model, **keys)
        layers = mora.adapted_layers(model)
        for name, layer in layers:
            with layer.weight.device:
                layer.update = make(name, layer, keys)
            layer.merges = hasattr(layer.update, "gradients")
        mora.start_cycle(layers, keys["seed"], keys["cycle"])
        count = sum(p.numel() for _, p in mora.adapter_parameters(model))
        total = sum(p.numel() for p in block_matrices(model).values())
        say(f"updates of {count:,} parameters for {total:,} of the blocks, {count / total:.3f}")
        return model

    wrap(patches, mora, "adapt", adapt)


def square(layer, rank, keys):
    out_features, in_features = layer.matrix.shape
    return mora.Square(in_features, out_features, rank, keys["operator"], keys["groups"])


def budget(patches, value):
    """KIND:FACTOR;KIND:FACTOR... The rank of a projection kind, times a factor; the total stays
    (all factors are divided by their mean over the parameters)."""
    factors = dict.fromkeys(KINDS, 1.0) | {kind: float(factor) for kind, factor in
                                           (pair.split(":") for pair in value.split(";"))}
    mean = []

    def adapt(original, model, **keys):
        sizes = {kind: 0 for kind in KINDS}
        for name, layer in mora.find_targets(model, keys["targets"]).items():
            sizes[name.rpartition(".")[2]] += sum(layer.weight.shape)
        mean.append(sum(factors[k] * n for k, n in sizes.items()) / sum(sizes.values()))
        return original(model, **keys)

    def make(name, layer, keys):  # one fold per layer: the widths of q, k and v differ
        return square(layer, keys["rank"] * factors[name.rpartition(".")[2]] / mean[-1], keys)

    # floor(sqrt(r (in + out))) of a rank that is not whole
    wrap(patches, mora, "r_hat", lambda _, rank, n, m, even=False: math.isqrt(int(rank * (n + m))))
    replace_updates(patches, make)
    wrap(patches, mora, "adapt", adapt)


class OtherFold(mora.Fold):
    """A fold whose permutation is another draw than that of the layer's first fold."""

    def move(self, cycle, seed):
        super().move(cycle, seed if seed == self.seed else seed + 1)


class Pair(nn.Module):
    """dW = dW1 + dW2, two updates that share the budget; width: what the first one needs of x."""

    def __init__(self, first, second, width):
        super().__init__()
        self.parts, self.width = nn.ModuleList([first, second]), width

    def start_cycle(self, cycle, generator):
        for part in self.parts:
            part.start_cycle(cycle, generator)

    def forward(self, x):
        return self.parts[0](x) + self.parts[1](x)

    def compress(self, x):
        return torch.cat([part.compress(x) for part in self.parts], dim=-1)

    def gradients(self, compressed, dy):
        first, second = compressed.split((self.width, compressed.shape[-1] - self.width), dim=-1)
        return self.parts[0].gradients(first, dy) + self.parts[1].gradients(second, dy)

    def delta(self):
        return self.parts[0].delta() + self.parts[1].delta()


def two_maps(patches, groups):
    """M1 on the groups of the config plus M2 on these groups, half the budget each. permute: on
    another permutation."""
    def make(name, layer, keys):
        first, second = square(layer, keys["rank"] / 2, keys), square(
            layer, keys["rank"] / 2, keys | {"groups": groups})
        for fold in (second.fold_in, second.fold_out):
            fold.__class__ = OtherFold
        return Pair(first, second, -(-len(first.M) // mora.ALIGNED) * mora.ALIGNED)

    wrap(patches, mora, "r_hat", lambda _, rank, n, m, even=False: math.isqrt(int(rank * (n + m))))
    replace_updates(patches, make)


class Weighted(nn.Module):
    """dW = diag(v) dW' diag(w): features have a learned weight in their groups, which stays with a
    feature when the groups move. v and w are d + k parameters, learned by AdamW."""

    def __init__(self, part, in_features, out_features):
        super().__init__()
        self.part = part
        self.w = nn.Parameter(torch.ones(in_features))
        self.v = nn.Parameter(torch.ones(out_features))

    def start_cycle(self, cycle, generator):
        self.part.start_cycle(cycle, generator)

    def forward(self, x):
        return F.linear(x, self.delta().to(x.dtype))

    def delta(self):
        return self.v[:, None] * self.part.delta() * self.w


def weighted(patches, _):
    def make(name, layer, keys):
        out_features, in_features = layer.matrix.shape
        return Weighted(square(layer, keys["rank"], keys), in_features, out_features)

    replace_updates(patches, make)


class Hadamard(nn.Module):
    """dW = (B A) * (D C) elementwise, of rank up to (r / 2)^2 from r (in + out) parameters: FedPara
    (arXiv 2108.06098), LoHa in peft. plus: dW = (B A) * (1 + D C), which starts as a LoRA."""

    def __init__(self, in_features, out_features, rank, plus):
        super().__init__()
        self.factors = nn.ModuleList(mora.LowRank(in_features, out_features, rank // 2)
                                     for _ in range(2))
        self.plus = plus

    def start_cycle(self, cycle, generator):
        first, second = self.factors
        first.start_cycle(cycle, generator)
        second.start_cycle(cycle, generator)
        if not self.plus:
            with torch.no_grad():  # entries of about 1, from factors that learn as fast as LoRA's
                for p in (second.A, second.B):
                    p.copy_(0.1 * torch.randn(p.shape, generator=generator))
                second.scale = 100 / len(second.A) ** 0.5

    def forward(self, x):
        return F.linear(x, self.delta().to(x.dtype))

    def delta(self):
        first, second = (part.delta() for part in self.factors)
        return first * (second + 1 if self.plus else second)


def hadamard(patches, plus):
    def make(name, layer, keys):
        out_features, in_features = layer.matrix.shape
        return Hadamard(in_features, out_features, keys["rank"], plus == "plus")

    replace_updates(patches, make)


def orthogonal(patches, gain):
    """The blocks' matrices at the start are orthogonal, times a gain in their root mean square."""
    def build(original, cfg, tokens):
        cfg, model = original(cfg, tokens)
        generator = torch.Generator().manual_seed(cfg.seed)
        for weight in block_matrices(model).values():
            scale = float(gain) * weight.std() * max(weight.shape) ** 0.5
            nn.init.orthogonal_(weight.data, scale.item(), generator=generator)
        return cfg, model

    wrap(patches, train, "build_model", build)


def mixed(patches, value):
    """SHARE[:SCALE]. mora.Mixed: LoRA of this share of the rank, which is never restarted and finds
    its own directions, plus MoRA of the rest, which restarts and covers the others. SCALE
    multiplies B A, and with Muon LoRA's rate therefore."""
    share, scale = ([float(part) for part in value.split(":")] + [1.0])[:2]

    def make(name, layer, keys):
        (d, k), rank = layer.matrix.shape, keys["rank"]
        update = mora.Mixed(k, d, rank, keys["operator"], keys["groups"], round(share * rank))
        update.low_rank.scale = scale
        return update

    replace_updates(patches, make)


def fold_draw(patches, kinds):
    """uniform: permutations are drawn from all, not from rolled runs. signs: a fold multiplies the
    features by random signs, new in each cycle; otherwise all groups hold sums alone, and every
    cycle has the sum of all features again. Or uniform+signs."""
    def init(original, self, features, *args):
        original(self, features, *args)
        self.register_buffer("sign", torch.ones(features), persistent=False)

    @torch.no_grad()
    def move(original, self, cycle, seed):
        original(self, cycle, seed)
        bits = torch.randint(2, (self.features,), generator=torch.Generator().manual_seed(seed + 1))
        self.sign.copy_(2.0 * bits - 1)

    if "uniform" in kinds:
        wrap(patches, mora, "rolled_order", lambda _, position, width, generator: position[
            torch.randperm(len(position), generator=generator)])
    if "signs" in kinds:
        wrap(patches, mora.Fold, "__init__", init)
        wrap(patches, mora.Fold, "move", move)
        wrap(patches, mora.Fold, "forward", lambda original, self, x, multiple=1:
             original(self, x * self.sign.to(x.dtype), multiple))
        wrap(patches, mora.Fold, "adjoint", lambda original, self, blocks:
             original(self, blocks) * self.sign.to(blocks.dtype))


class Projected(nn.Module):
    """dW = P^T M Q with dense maps; P (rows of M, out), Q (columns of M, in), or None: identity.

    The rows of P are orthonormal times sqrt(out / rows), so that dW has M's root mean square, as
    with folds. Maps are set by set_maps, before the first step of a cycle, from W's gradient.
    """

    def __init__(self, in_features, out_features, rows, columns):
        super().__init__()
        self.M, self.generator = nn.Parameter(torch.zeros(rows, columns)), None
        is_left, is_right = rows < out_features, columns < in_features
        self.register_buffer("P", torch.zeros(rows, out_features) if is_left else None)
        self.register_buffer("Q", torch.zeros(columns, in_features) if is_right else None)

    @torch.no_grad()
    def start_cycle(self, cycle, generator):
        self.M.zero_()
        self.generator, self.cycle = generator, cycle  # a generator: the maps are not set yet

    def compress(self, x):
        x = x[None].flatten(0, -2)
        return x if self.Q is None else F.linear(x, self.Q.to(x.dtype))

    def gradients(self, compressed, dy):
        dy = dy[None].flatten(0, -2)
        rows = dy if self.P is None else F.linear(dy, self.P.to(dy.dtype))
        return [(rows.T @ compressed).to(self.M.dtype)]

    def forward(self, x):
        return F.linear(x, self.delta().to(x.dtype))

    def delta(self):
        delta = self.M if self.Q is None else self.M @ self.Q
        return delta if self.P is None else self.P.T @ delta


def full_gradients(model, batch):
    """{layer: gradient of its W}, of one batch: an additional forward and backward, not compiled.
    Gradients of other parameters are dropped."""
    layers = [layer for _, layer in mora.adapted_layers(model)]
    for layer in layers:
        layer.merges = False
        layer.weight.requires_grad_(True)
    with torch.compiler.set_stance("force_eager"):
        optimizer.accumulate_gradients(model, batch)
    gradients = {layer: layer.weight.grad.float() for layer in layers}
    for layer in layers:
        layer.merges = True
        layer.weight.requires_grad_(False)
    model.zero_grad()
    return gradients


def singular_vectors(gradient):
    """(U, s, V): columns are singular vectors, s descends. By the smaller Gram matrix: fast, and
    exact enough for all but the smallest, which are noise."""
    g = gradient.double() if gradient.device.type == "cpu" else gradient
    is_wide = g.shape[0] < g.shape[1]
    g = g.T if is_wide else g
    values, V = torch.linalg.eigh(g.T @ g)
    s, V = values.flip(0).clamp_min(0).sqrt(), V.flip(1)
    U = torch.linalg.qr(g @ V)[0]
    U, V = (V, U) if is_wide else (U, V)
    return U.float(), s.float(), V.float()


@torch.no_grad()
def set_maps(update, gradient, mode):
    """Set P and Q for a cycle; return the share of the gradient's nuclear norm that they hold."""
    (rows, columns), (d, k) = update.M.shape, gradient.shape
    width, generator = min(rows, columns), update.generator
    U, s, V = singular_vectors(gradient)
    if mode in ("random", "bulk"):
        spaces = []
        for n, top in ((d, U), (k, V)):
            draw = torch.randn(n, width, generator=generator).to(gradient.device)
            if mode == "bulk":  # nothing of the largest eighth
                top = top[:, :min(d, k) // 8]
                draw -= top @ (top.T @ draw)
            spaces.append(torch.linalg.qr(draw)[0])
        U, V = spaces
    else:  # svd: the largest; sample: drawn by singular value, so that cycles cover new ones
        weights, count = s.cpu().double(), min(d, k)
        chosen = torch.arange(width)
        if mode == "sample":
            chosen = torch.multinomial(weights.clamp_min(1e-9), width, generator=generator)
        elif mode == "half":  # half of them the largest, the others anywhere
            others = torch.randperm(count - width // 2, generator=generator) + width // 2
            chosen = torch.cat((chosen[:width // 2], others[:width - width // 2]))
        U, V = U[:, chosen.to(U.device)], V[:, chosen.to(V.device)]
    if update.P is not None:
        update.P.copy_(U.T * (d / width) ** 0.5)
    if update.Q is not None:
        update.Q.copy_(V.T * (k / width) ** 0.5)
    update.generator = None
    return share_held(update, gradient)


@torch.no_grad()
def share_held(update, gradient):
    """The share of a gradient's nuclear norm that the maps of a Projected hold."""
    (rows, columns), (d, k) = update.M.shape, gradient.shape
    held = gradient if update.P is None else update.P @ gradient * (rows / d) ** 0.5
    held = held if update.Q is None else held @ update.Q.T * (columns / k) ** 0.5
    return torch.linalg.svdvals(held).sum() / torch.linalg.svdvals(gradient).sum()


def maps(patches, value):
    """MODE:SIDES[:BETA]. dW = P^T M Q with P and Q renewed at each restart. MODE: svd, sample,
    half: of the singular vectors of W's gradient of one batch; random; bulk: random in the space
    without the largest eighth of the singular vectors. SIDES 2: a square M as MoRA's; 1: M
    of all outputs x some inputs (GaLore's budget in the weights). BETA: instead of one batch's, the
    gradient is a running mean of all steps'. Restarts come from the config."""
    _maps(patches, value, lambda name, layer, keys, projected: projected(layer, keys["rank"]))


def maps_beside_lora(patches, value):
    """SHARE:SCALE:MODE:SIDES:BETA: as mixed, with maps instead of MoRA."""
    share, scale, value = value.split(":", 2)

    def make(name, layer, keys, projected):
        (d, k), own = layer.matrix.shape, round(float(share) * keys["rank"])
        low_rank = mora.LowRank(k, d, own)
        low_rank.scale = float(scale)
        return Pair(low_rank, projected(layer, keys["rank"] - own), k)

    def restart(original, model, *args):
        """Only the second part of each Pair restarts."""
        pairs = {layer: layer.update for _, layer in mora.adapted_layers(model)}
        for layer, pair in pairs.items():
            layer.update = pair.parts[1]
        report = original(model, *args)
        for layer, pair in pairs.items():
            layer.update = pair
        return report

    _maps(patches, value, make)
    wrap(patches, mora, "restart", restart)


def _maps(patches, value, make_update):
    mode, sides, *beta = value.split(":")
    means = {}

    def projected(layer, rank):
        d, k = layer.matrix.shape
        width = mora.r_hat(rank, k, d)
        rows, columns = (width, width) if sides == "2" else (d, rank * (d + k) // d)
        return Projected(k, d, rows, columns)

    def own(layer):
        return layer.update.parts[1] if isinstance(layer.update, Pair) else layer.update

    def renew(step, model, _, batch):
        stale = [layer for _, layer in mora.adapted_layers(model) if own(layer).generator]
        if not stale and not beta:
            return
        gradients = full_gradients(model, batch)
        if beta:
            for layer, gradient in gradients.items():
                means.setdefault(layer, torch.zeros_like(gradient)).lerp_(
                    gradient, 1 - float(beta[0]))
            gradients = means
        if not stale:
            return
        if step:  # what the maps of the cycle that ends hold of the gradient now
            old = [share_held(own(layer), gradients[layer]) for layer in stale]
            say(f"step {step}: the old maps hold {torch.stack(old).mean().item():.3f}")
        held = torch.stack([set_maps(own(layer), gradients[layer], mode) for layer in stale])
        say(f"step {step}: {len(stale)} new maps hold {held.mean().item():.3f} of the nuclear norm")

    replace_updates(patches, lambda *made: make_update(*made, projected))
    before_steps(patches, renew)


def slices(patches, value):
    """PARTS[:SCALE]. An update is 1 / PARTS of the rows of q, k, v, gate, up and of the columns of
    o, down, at full rank: the same neurons (and parts of heads) of a block train together in a
    cycle. Neurons are drawn like cards: each once before any again."""
    parts, scale = (*map(float, value.split(":")), 1.0)[:2]

    def make(name, layer, keys):
        d, k = layer.matrix.shape
        if name.endswith(("o_proj", "down_proj")):
            return Projected(k, d, d, round(k / parts))
        return Projected(k, d, round(d / parts), k)

    @torch.no_grad()
    def renew(step, model, _, batch):
        for name, layer in mora.adapted_layers(model):
            update = layer.update
            if not update.generator:
                continue
            onehot = update.P if update.Q is None else update.Q
            count, n = onehot.shape
            turn, first = divmod(update.cycle * count, n)
            key = f"{name.rpartition('.')[0]} {n}".encode()  # one draw for a block's attention
            orders = [torch.randperm(n, generator=torch.Generator().manual_seed(
                zlib.crc32(key) + turn + i)) for i in range(2)]
            chosen = torch.cat(orders)[first:first + count]
            onehot.zero_()
            onehot[torch.arange(count), chosen.to(onehot.device)] = scale
            update.generator = None

    replace_updates(patches, make)
    before_steps(patches, renew)


class Blocks(nn.Module):
    """dW has m blocks of their own, M_1 ... M_m, on a permuted diagonal: m = d k / (r (d + k)), the
    budget of rank r, but dW has full rank, and Muon makes it nearly orthogonal."""

    def __init__(self, in_features, out_features, rank):
        super().__init__()
        k, d = self.sizes = in_features, out_features
        self.m = max(1, round(d * k / (rank * (d + k))))
        self.widths = -(-k // self.m), -(-d // self.m)
        self.M = nn.ParameterList(torch.zeros(self.widths[::-1]) for _ in range(self.m))
        for name, n in (("columns", k), ("rows", d)):
            self.register_buffer(name, torch.arange(n))
            self.register_buffer(f"{name}_inverse", torch.arange(n))

    @torch.no_grad()
    def start_cycle(self, cycle, generator):
        torch._foreach_zero_(list(self.M))
        for order, inverse in ((self.columns, self.columns_inverse),
                               (self.rows, self.rows_inverse)):
            order.copy_(torch.randperm(len(order), generator=generator, device="cpu"))
            inverse.copy_(order.argsort())

    def cut(self, x, order, inverse):
        """(tokens, n) -> (tokens, m, width), permuted and padded."""
        x = mora.Permute.apply(x, order, inverse)
        return F.pad(x, (0, -x.shape[-1] % self.m)).unflatten(-1, (self.m, -1))

    def compress(self, x):
        return self.cut(x[None].flatten(0, -2), self.columns, self.columns_inverse)

    def gradients(self, compressed, dy):
        dy = self.cut(dy[None].flatten(0, -2), self.rows, self.rows_inverse)
        return list(torch.einsum("tmo,tmi->moi", dy, compressed).float().unbind())

    def delta(self):
        (k, d), (width_in, width_out) = self.sizes, self.widths
        M = torch.stack(list(self.M))  # (m, out, in)
        is_own = torch.eye(self.m, device=M.device)[:, None, :, None]
        wide = (is_own * M[:, :, None]).reshape(self.m * width_out, self.m * width_in)
        return wide[:d, :k][self.rows_inverse][:, self.columns_inverse]

    def forward(self, x):
        return F.linear(x, self.delta().to(x.dtype))


def blocks(patches, value):
    """The update is Blocks of the config's rank, times VALUE if there is one."""
    def make(name, layer, keys):
        d, k = layer.matrix.shape
        return Blocks(k, d, keys["rank"] * float(value or 1))

    replace_updates(patches, make)


def none(patches, _):
    """Nothing: a baseline."""


VARIANTS = {function.__name__: function for function in (
    init_std, residual_std, noise_decay, full_layer, stagger, warm, keep_momentum,
    full_momentum, cycle_lr, merge_mean, budget, two_maps, weighted, hadamard,
    orthogonal, mixed, fold_draw, maps, maps_beside_lora, slices, blocks, none)}


@contextlib.contextmanager
def applied(names):
    """Apply "NAME=VALUE,NAME=VALUE" in a `with` block. Hooks of later names run first."""
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(checkpoint, "save", lambda *args: None))
        patches.enter_context(mock.patch.object(torch._dynamo.config, "recompile_limit", 64))
        for item in names.split(","):
            name, _, value = item.partition("=")
            config.need(name in VARIANTS, f"no variant {name!r}, only {', '.join(VARIANTS)}")
            VARIANTS[name](patches, value)
        yield


def main(argv):
    config.need(argv, f"name a variant: {', '.join(VARIANTS)}")
    with applied(argv[0]):
        train.main(argv[1:])


if __name__ == "__main__":
    config.command_line(main)
