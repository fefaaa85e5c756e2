"""Variants of training that may close the gap between adapters and full rank: patches of modules.

    python results/close_gap/variants.py maps=svd,warm=100 configs/60m_mora.py --groups=permute ...
    python results/close_gap/variants.py none configs/tiny_mora.py ...

A variant is a function of (patches, value) that patches train.py, mora.py and optimizer.py for one
run; `applied` takes the patches back. Plans of results/sweep.py use it as PREPARE. No run writes a
checkpoint: some updates have no format. One process, no resume, no FSDP.
"""
import collections
import contextlib
import dataclasses
import itertools
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
    counter = itertools.count()

    def step(original, model, optimizer, batch, *rest):
        hook(next(counter), model, optimizer, batch)
        return original(model, optimizer, batch, *rest)

    wrap(patches, train, "optimizer_step", step)


def block_matrices(model):
    """Return {name: weight} of the blocks' linear layers, adapted or not."""
    return {name: p for name, p in model.named_parameters()
            if p.ndim == 2 and ".layers." in f".{name}" and ".update." not in name}


def report(text):
    print(f"variant: {text}", flush=True)


# ------------------------------------------------------------ the frozen weights

def after_building(patches, change):
    """Call change(cfg, {name: weight of the blocks}) once train.py has built the model."""
    def build(original, *args):
        cfg, model = original(*args)
        change(cfg, block_matrices(model))
        return cfg, model

    wrap(patches, train, "build_model", build)


def init_std(patches, factor, kinds=KINDS):
    """Multiply the standard deviation of the blocks' matrices at the start by a factor."""
    def change(cfg, matrices):
        for name, weight in matrices.items():
            if name.split(".")[-2] in kinds:
                weight.data.mul_(float(factor))

    after_building(patches, change)


def residual_std(patches, factor):
    """Apply init_std to o_proj and down_proj alone: at 0 every block starts as the identity."""
    init_std(patches, factor, ("o_proj", "down_proj"))


def noise_decay(patches, factor):
    """Multiply the random part of W, which the seed gives, by a factor at each restart."""
    noise = {}

    def keep(cfg, matrices):
        noise.update({name: weight.detach().clone() for name, weight in matrices.items()})

    def restart(original, model, *args):
        for name, weight in block_matrices(model).items():
            weight.data.sub_(noise[name].to(weight.device), alpha=1 - float(factor))
            noise[name].mul_(float(factor))
        return original(model, *args)

    after_building(patches, keep)
    wrap(patches, mora, "restart", restart)


def orthogonal(patches, gain):
    """Start from orthogonal matrices in the blocks, with `gain` times the root mean square."""
    def change(cfg, matrices):
        generator = torch.Generator().manual_seed(cfg.seed)
        for weight in matrices.values():
            scale = float(gain) * weight.std() * max(weight.shape) ** 0.5
            nn.init.orthogonal_(weight.data, scale.item(), generator=generator)

    after_building(patches, change)


# ------------------------------------------------------------ full rank, a part at a time

def units_of(model, unit):
    """Return {unit: [names of its matrices]}; unit: "block" or "matrix"."""
    units = {}
    for name in block_matrices(model):
        block = name.split(".layers.")[1].split(".")[0]
        key = block if unit == "block" else f"{block} {name.split('.')[-2]}"
        units.setdefault(key, []).append(name)
    return units


def full_layer(patches, value):
    """UNIT:EVERY[:SHARE]. Method full; in a cycle of EVERY steps only some units train: one block,
    or single matrices until SHARE of the block parameters is reached (default: one unit). Units are
    drawn without replacement until all have had a turn. Frozen ones lose Muon's state and get no
    gradient. Embeddings, head and norms always train."""
    unit, every, *share = value.split(":")
    config.need(unit in ("block", "matrix"), f"full_layer={value}: the units are block and matrix")
    deck, draw = [], random.Random(0)

    def choose(step, model, optimizer, _):
        if step % int(every):
            return
        matrices, units, chosen = block_matrices(model), units_of(model, unit), []
        total = sum(p.numel() for p in matrices.values())
        wanted = float(share[0]) * total if share else 1
        count = 0
        while count < wanted:
            if not deck:
                deck.extend(draw.sample(sorted(units), len(units)))
            names = units[deck.pop()]
            chosen += names
            count += sum(matrices[name].numel() for name in names)
        for name, p in matrices.items():
            p.requires_grad_(name in chosen)
            if name not in chosen:
                optimizer.state.pop(p, None)
        if step < 3 * int(every):
            report(f"step {step}: {count:,} of {total:,} block parameters train in {len(chosen)} "
                   f"matrices")

    before_steps(patches, choose)


# ------------------------------------------------------------ cycles

def stagger(patches, groups):
    """Restart every `groups`-th block alone, in turn; divide restart_every by this number."""
    def block_of(name):
        return int(name.split("layers.")[1].split(".")[0])

    def restart(original, model, optimizer, cycle, *args):
        chosen = [(name, layer) for name, layer in mora.adapted_layers(model)
                  if block_of(name) % int(groups) == cycle % int(groups)]
        with mock.patch.object(mora, "adapted_layers", lambda model: chosen):
            return original(model, optimizer, cycle, *args)

    wrap(patches, mora, "restart", restart)


def warm(patches, steps):
    """Train all weights at full rank for `steps` steps, then adapters on them, on one schedule."""
    cfg = None

    def prepare(original, adapter_cfg, *args):
        nonlocal cfg
        cfg = adapter_cfg
        return original(dataclasses.replace(cfg, method="full"), *args)

    def switch(step, model, optimizer_, _):
        if step != int(steps):
            return
        for weight in block_matrices(model).values():
            optimizer_.state.pop(weight, None)
        mora.adapt(model, **cfg.adapter(), cycle=cfg.cycle(step)[0])
        optimizer_.param_groups.clear()
        device = next(model.parameters()).device
        for group in optimizer.build_optimizer(cfg, model, device).param_groups:
            optimizer_.add_param_group(group)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        report(f"step {step}: {count:,} parameters train from here on")

    def restart(original, model, *args):
        if not mora.adapted_layers(model):  # a cycle ends at full rank: nothing to merge
            return {"states": 0, "update_norm": 0.0}
        return original(model, *args)

    wrap(patches, train, "prepare_model", prepare)
    wrap(patches, mora, "restart", restart)
    before_steps(patches, switch)


def keep_momentum(patches, _):
    """A restart keeps Muon's momentum of M."""
    def restart(original, model, optimizer, *args):
        kept = {p: optimizer.state[p] for _, p in mora.adapter_parameters(model)}
        result = original(model, optimizer, *args)
        optimizer.state.update(kept)
        return result

    wrap(patches, mora, "restart", restart)


def full_momentum(patches, _):
    """A restart gives M the momentum of W's gradient at full rank, compressed by the new groups. It
    needs full rank's state, so it saves no memory: this measures what a forgotten momentum costs.
    """
    momenta = {}

    def note(step, model, optimizer_, batch):
        for layer, gradient in full_gradients(model, batch).items():
            momenta.setdefault(layer, torch.zeros_like(gradient)).lerp_(
                gradient, 1 - optimizer.MUON_MOMENTUM)

    def restart(original, model, optimizer_, *args):
        result = original(model, optimizer_, *args)
        for layer, momentum in momenta.items():
            M = layer.update.M
            with torch.enable_grad():  # the gradient of <dW, momentum> is the momentum of M
                inner = (layer.update.delta() * momentum).sum()
            optimizer_.state[M] = {"momentum": torch.autograd.grad(inner, M)[0]}
        return result

    wrap(patches, mora, "restart", restart)
    before_steps(patches, note)


def cycle_lr(patches, value):
    """HIGH:LOW:EVERY. In each cycle of EVERY steps the matrices' rate goes linearly from HIGH to
    LOW times the schedule's, so that an update can be annealed before it is merged."""
    high, low, every = map(float, value.split(":"))

    def step(step, model, optimizer, batch):
        done = step % every / every
        for group in optimizer.param_groups:
            if group["muon"]:
                group["ratio"] = high + (low - high) * done

    before_steps(patches, step)


def merge_mean(patches, last):
    """LAST. A restart merges the mean of M over the last LAST steps of the cycle, to average out
    the noise of the steps. The model's function changes a little."""
    values = collections.defaultdict(lambda: collections.deque(maxlen=int(last)))

    def note(step, model, optimizer, batch):
        for _, p in mora.adapter_parameters(model):
            values[p].append(p.detach().clone())

    def restart(original, model, *args):
        for _, p in mora.adapter_parameters(model):
            p.data.copy_(torch.stack(list(values[p])).mean(0))
        values.clear()
        return original(model, *args)

    before_steps(patches, note)
    wrap(patches, mora, "restart", restart)


# ------------------------------------------------------------ other updates

def replace_updates(patches, make):
    """After mora.adapt: replace each layer's update by make(name, layer, keys), start the cycle.
    keys: those of mora.adapt."""
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
        report(f"updates of {count:,} parameters for {total:,} of the blocks, {count / total:.3f}")
        return model

    wrap(patches, mora, "adapt", adapt)


def square(layer, rank, keys):
    """Return a mora.Square for a layer."""
    d, k = layer.matrix.shape
    return mora.Square(k, d, rank, keys["operator"], keys["groups"])


def allow_fractional_ranks(patches):
    """Let mora.r_hat take ranks that are not whole: floor(sqrt(r (in + out)))."""
    wrap(patches, mora, "r_hat", lambda _, rank, n, m, even=False: math.isqrt(int(rank * (n + m))))


def budget(patches, value):
    """KIND:FACTOR;KIND:FACTOR... Multiply the rank of each kind of projection by a factor; all
    factors are divided by their mean over the parameters, so that the total stays."""
    factors = dict.fromkeys(KINDS, 1.0)
    for pair in value.split(";"):
        kind, factor = pair.split(":")
        factors[kind] = float(factor)
    mean = 1.0

    def adapt(original, model, **keys):
        nonlocal mean
        targets = mora.find_targets(model, keys["targets"])
        sizes = {name: sum(layer.weight.shape) for name, layer in targets.items()}
        wanted = sum(factors[name.rpartition(".")[2]] * size for name, size in sizes.items())
        mean = wanted / sum(sizes.values())
        return original(model, **keys)

    def make(name, layer, keys):  # one fold per layer: the widths of q, k and v differ
        return square(layer, keys["rank"] * factors[name.rpartition(".")[2]] / mean, keys)

    allow_fractional_ranks(patches)
    replace_updates(patches, make)
    wrap(patches, mora, "adapt", adapt)


class Pair(nn.Module):
    """dW = dW1 + dW2, two updates; width: the numbers per token to which the first compresses x."""

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
    """Add M1 on the config's groups and M2 on these groups, each with half the budget."""
    def make(name, layer, keys):
        first = square(layer, keys["rank"] / 2, keys)
        second = square(layer, keys["rank"] / 2, keys | {"groups": groups})
        compressed_width = -(-len(first.M) // mora.ALIGNED) * mora.ALIGNED  # padded
        return Pair(first, second, compressed_width)

    allow_fractional_ranks(patches)
    replace_updates(patches, make)


class Dense(nn.Module):
    """An update whose forward multiplies by dW itself."""

    def forward(self, x):
        return F.linear(x, self.delta().to(x.dtype))


class Weighted(Dense):
    """dW = diag(v) dW' diag(w): each feature has a learned weight in its group, which it keeps when
    the groups change. v and w are d + k parameters, trained by AdamW."""

    def __init__(self, part, in_features, out_features):
        super().__init__()
        self.part = part
        self.w = nn.Parameter(torch.ones(in_features))
        self.v = nn.Parameter(torch.ones(out_features))

    def start_cycle(self, cycle, generator):
        self.part.start_cycle(cycle, generator)

    def delta(self):
        return self.v[:, None] * self.part.delta() * self.w


def weighted(patches, _):
    """Replace MoRA's update by Weighted."""
    def make(name, layer, keys):
        d, k = layer.matrix.shape
        return Weighted(square(layer, keys["rank"], keys), k, d)

    replace_updates(patches, make)


class Hadamard(Dense):
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

    def delta(self):
        first, second = self.factors[0].delta(), self.factors[1].delta()
        return first * (second + 1) if self.plus else first * second


def hadamard(patches, form):
    """Replace the update by Hadamard; form: "product" or "plus"."""
    def make(name, layer, keys):
        d, k = layer.matrix.shape
        return Hadamard(k, d, keys["rank"], form == "plus")

    replace_updates(patches, make)


def mixed(patches, value):
    """SHARE[:SCALE]. mora.Mixed: LoRA of this share of the rank, which is never restarted, plus
    MoRA of the rest, which is. SCALE multiplies B A, and so, with Muon, LoRA's rate."""
    share, *scale = map(float, value.split(":"))

    def make(name, layer, keys):
        (d, k), rank = layer.matrix.shape, keys["rank"]
        update = mora.Mixed(k, d, rank, keys["operator"], keys["groups"], round(share * rank))
        update.low_rank.scale = scale[0] if scale else 1.0
        return update

    replace_updates(patches, make)


def fold_draw(patches, value):
    """signs: a fold multiplies the features by random signs, new in each cycle. Without them every
    group adds its features, so that every cycle contains the sum of all features again."""
    config.need(value == "signs", f"fold_draw={value}: the only value is signs")

    def __init__(original, self, features, *args):
        original(self, features, *args)
        self.register_buffer("sign", torch.ones(features), persistent=False)

    @torch.no_grad()
    def move(original, self, cycle, seed):
        original(self, cycle, seed)
        bits = torch.randint(2, (self.features,), generator=torch.Generator().manual_seed(seed + 1))
        self.sign.copy_(2.0 * bits - 1)

    def forward(original, self, x, multiple=1):
        return original(self, x * self.sign.to(x.dtype), multiple)

    def adjoint(original, self, blocks):
        return original(self, blocks) * self.sign.to(blocks.dtype)

    for wrapper in (__init__, move, forward, adjoint):
        wrap(patches, mora.Fold, wrapper.__name__, wrapper)


class Projected(Dense):
    """dW = P^T M Q with dense maps; P (rows of M, out), Q (columns of M, in), or None: identity.

    The rows of P are orthonormal times sqrt(out / rows), so that dW has M's root mean square, as
    with folds. `maps` and `slices` set the maps before the first step of a cycle; until then
    generator is not None.
    """

    def __init__(self, in_features, out_features, rows, columns):
        super().__init__()
        self.M, self.generator = nn.Parameter(torch.zeros(rows, columns)), None
        for name, size, features in (("P", rows, out_features), ("Q", columns, in_features)):
            self.register_buffer(name, torch.zeros(size, features) if size < features else None)

    @torch.no_grad()
    def start_cycle(self, cycle, generator):
        self.M.zero_()
        self.generator, self.cycle = generator, cycle

    def compress(self, x):
        x = x[None].flatten(0, -2)
        return x if self.Q is None else F.linear(x, self.Q.to(x.dtype))

    def gradients(self, compressed, dy):
        dy = dy[None].flatten(0, -2)
        rows = dy if self.P is None else F.linear(dy, self.P.to(dy.dtype))
        return [(rows.T @ compressed).to(self.M.dtype)]

    def delta(self):
        delta = self.M if self.Q is None else self.M @ self.Q
        return delta if self.P is None else self.P.T @ delta


def full_gradients(model, batch):
    """Return {layer: gradient of its W} of one batch, by another forward and backward pass without
    torch.compile. Gradients of other parameters are dropped."""
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
    """Return (U, s, V): columns are singular vectors, s descends. From the smaller Gram matrix:
    fast, and exact enough for all but the smallest ones, which are noise."""
    if gradient.shape[0] < gradient.shape[1]:
        V, s, U = singular_vectors(gradient.T)
        return U, s, V
    g = gradient.double() if gradient.device.type == "cpu" else gradient
    values, V = torch.linalg.eigh(g.T @ g)
    s, V = values.flip(0).clamp_min(0).sqrt(), V.flip(1)
    U = torch.linalg.qr(g @ V)[0]
    return U.float(), s.float(), V.float()


@torch.no_grad()
def set_maps(update, gradient, mode):
    """Set P and Q for a cycle, see `maps`; return share_held of the gradient."""
    (rows, columns), (d, k) = update.M.shape, gradient.shape
    width, count, generator = min(rows, columns), min(d, k), update.generator
    U, s, V = singular_vectors(gradient)
    if mode in ("random", "bulk"):
        spaces = []
        for n, vectors in ((d, U), (k, V)):
            draw = torch.randn(n, width, generator=generator).to(gradient.device)
            if mode == "bulk":  # without the largest eighth
                top = vectors[:, :count // 8]
                draw -= top @ (top.T @ draw)
            spaces.append(torch.linalg.qr(draw)[0])
        U, V = spaces
    else:
        chosen = torch.arange(width)  # svd
        if mode == "sample":
            weights = s.cpu().double().clamp_min(1e-9)
            chosen = torch.multinomial(weights, width, generator=generator)
        elif mode == "half":
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
    """Return the share of a gradient's nuclear norm in the spaces of P and Q."""
    (rows, columns), (d, k), held = update.M.shape, gradient.shape, gradient
    if update.P is not None:
        held = update.P @ held * (rows / d) ** 0.5
    if update.Q is not None:
        held = held @ update.Q.T * (columns / k) ** 0.5
    return torch.linalg.svdvals(held).sum() / torch.linalg.svdvals(gradient).sum()


def maps(patches, value):
    """MODE:SIDES[:BETA]. dW = P^T M Q with P and Q renewed at each restart.

    MODE chooses among the singular vectors of W's gradient: svd takes the largest; sample draws by
    singular value, so that cycles cover new ones; half takes half of them from the largest, half
    anywhere. random draws any vectors, bulk those orthogonal to the largest eighth.
    SIDES 2: a square M as MoRA's; 1: M of all outputs x some inputs (GaLore's budget in the
    weights). BETA: the gradient is a running mean over all steps instead of one batch's.
    """
    def make(name, layer, keys, projected):
        return projected(layer, keys["rank"])

    use_maps(patches, value, make)


def maps_beside_lora(patches, value):
    """SHARE:SCALE:MODE:SIDES[:BETA]: as mixed, with maps instead of MoRA."""
    share, scale, value = value.split(":", 2)

    def make(name, layer, keys, projected):
        (d, k), lora_rank = layer.matrix.shape, round(float(share) * keys["rank"])
        low_rank = mora.LowRank(k, d, lora_rank)
        low_rank.scale = float(scale)
        return Pair(low_rank, projected(layer, keys["rank"] - lora_rank), k)

    def restart(original, model, *args):
        """Restart the second part of each Pair alone."""
        pairs = {layer: layer.update for _, layer in mora.adapted_layers(model)}
        for layer, pair in pairs.items():
            layer.update = pair.parts[1]
        result = original(model, *args)
        for layer, pair in pairs.items():
            layer.update = pair
        return result

    use_maps(patches, value, make)
    wrap(patches, mora, "restart", restart)


def use_maps(patches, value, make_update):
    """Replace the updates by make_update(name, layer, keys, projected) and renew their maps;
    projected(layer, rank): a Projected."""
    mode, sides, *beta = value.split(":")
    means = {}

    def projected(layer, rank):
        d, k = layer.matrix.shape
        width = mora.r_hat(rank, k, d)
        rows, columns = (width, width) if sides == "2" else (d, rank * (d + k) // d)
        return Projected(k, d, rows, columns)

    def projected_of(layer):
        return layer.update.parts[1] if isinstance(layer.update, Pair) else layer.update

    def renew(step, model, _, batch):
        stale = [layer for _, layer in mora.adapted_layers(model) if projected_of(layer).generator]
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
        if step:
            held = [share_held(projected_of(layer), gradients[layer]) for layer in stale]
            report(f"step {step}: the old maps hold {torch.stack(held).mean().item():.3f}")
        held = [set_maps(projected_of(layer), gradients[layer], mode) for layer in stale]
        report(f"step {step}: {len(stale)} new maps hold {torch.stack(held).mean().item():.3f} "
               "of the nuclear norm")

    replace_updates(patches, lambda *arguments: make_update(*arguments, projected))
    before_steps(patches, renew)


def slices(patches, value):
    """PARTS. An update is 1 / PARTS of the rows of q, k, v, gate, up and of the columns of o, down,
    at full rank: the same neurons (and parts of heads) of a block train together in a cycle. They
    are drawn without replacement until all have had a turn."""
    parts = float(value)

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
            onehot[torch.arange(count), chosen.to(onehot.device)] = 1.0
            update.generator = None

    replace_updates(patches, make)
    before_steps(patches, renew)


class Blocks(Dense):
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
        """Return (tokens, n) as (tokens, m, width), permuted and padded."""
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


def blocks(patches, _):
    """Replace the update by Blocks of the config's rank."""
    def make(name, layer, keys):
        d, k = layer.matrix.shape
        return Blocks(k, d, keys["rank"])

    replace_updates(patches, make)


def none(patches, _):
    """Change nothing: a baseline."""


VARIANTS = {function.__name__: function for function in (
    init_std, residual_std, noise_decay, orthogonal, full_layer, stagger, warm, keep_momentum,
    full_momentum, cycle_lr, merge_mean, budget, two_maps, weighted, hadamard, mixed, fold_draw,
    maps, maps_beside_lora, slices, blocks, none)}


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
