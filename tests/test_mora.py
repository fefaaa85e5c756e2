"""The laws of mora.py, in float64 on shapes that do not divide."""
import copy
import itertools
import math
import re
import warnings
import zlib

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mora
from model import Llama, LlamaConfig
from mora import GROUPS, OPERATORS, contiguous_order, rolled_order

# (in, out, rank): d != k both ways, r^ >= in, odd r^, exact division, many more pieces on one side
SHAPES = [(70, 50, 4), (50, 130, 3), (24, 24, 32), (33, 33, 2), (64, 64, 8), (16, 200, 1),
          (200, 16, 1), (9, 7, 1)]


def square(k, d, rank, operator, groups="permute", cycle=1):
    """A Square with a random M and the groups of a cycle."""
    update = mora.Square(k, d, rank, operator, groups).double()
    update.fold_in.move(cycle, seed=2 * cycle)
    update.fold_out.move(cycle, seed=2 * cycle + 1)
    with torch.no_grad():
        update.M.copy_(torch.randn(update.M.shape, dtype=torch.float64))
    return update


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.ModuleDict({"embed": nn.Embedding(11, 24), "q_proj": nn.Linear(24, 40),
                          "up_proj": nn.Linear(40, 24), "head": nn.Linear(24, 11)})


def run(model, ids):
    x = model["embed"](ids)
    return model["head"](x + model["up_proj"](torch.tanh(model["q_proj"](x))))


def train(model, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(11, (4, 5), generator=generator)
        optimizer.zero_grad()
        logits, targets = run(model, ids).flatten(0, 1), (ids * 3 % 11).flatten()
        nn.functional.cross_entropy(logits, targets).backward()
        optimizer.step()


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("groups", GROUPS)
def test_delta_equals_apply_on_identity(operator, shape, groups):
    update = square(*shape, operator, groups)
    applied = update(torch.eye(shape[0], dtype=torch.float64)).T
    with torch.no_grad():  # truncate reads the inputs that it keeps
        assert torch.equal(update(torch.eye(shape[0], dtype=torch.float64)).T, applied)
    assert update.delta().shape == (shape[1], shape[0])
    torch.testing.assert_close(update.delta(), applied, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adjoint_is_the_adjoint(operator, shape):
    update = square(*shape, operator)
    for fold in (update.fold_in, update.fold_out):
        x = torch.randn(3, fold.features, dtype=torch.float64)
        h = torch.randn(3, fold.blocks, fold.width, dtype=torch.float64)
        folded, unfolded = (fold(x) * h).sum(), (x * fold.adjoint(h)).sum()
        torch.testing.assert_close(folded, unfolded, rtol=1e-12, atol=1e-10)


def entry_of_the_papers_dW(operator, M, i, j):
    """dW[i, j] of eq. 4-11, for r^ = 6, four pieces of inputs and two of outputs."""
    r = len(M)
    row, column = i % r, j % r
    if operator == "truncate":
        return M[i, j] if i < r and j < r else 0.0
    if operator == "share":
        return M[row, column]
    piece, block = j // r, i // r
    if piece % 2 != block:
        return 0.0
    if operator == "decouple":
        return M[row, column]
    pair = column % 3  # a column of M R_p: the pairs are (pair, pair + 3)
    angle = piece * 10000 ** (-2 * pair / r)
    low, high = M[row, pair], M[row, pair + 3]
    if column < 3:
        return low * math.cos(angle) + high * math.sin(angle)
    return high * math.cos(angle) - low * math.sin(angle)


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_are_the_papers(operator):
    k, d = 24, 12
    update = square(k, d, 1, operator, "strided")
    M, dW = update.M.detach(), update.delta().detach()
    assert len(M) == 6
    for i, j in itertools.product(range(d), range(k)):
        assert abs(float(dW[i, j]) - float(entry_of_the_papers_dW(operator, M, i, j))) < 1e-12


@pytest.mark.parametrize("features, width", ((12, 4), (14, 4), (7, 3), (5, 9)))
def test_contiguous_groups_are_appendix_b(features, width):
    order = contiguous_order(torch.arange(features), width).tolist()
    groups = [order[group::width] for group in range(width)]
    assert [member for group in groups for member in group] == list(range(features))
    smaller_size, larger_groups = divmod(features, width)
    sizes = [len(group) for group in groups]
    assert sizes == [smaller_size + 1] * larger_groups + [smaller_size] * (width - larger_groups)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_budget_never_exceeds_lora(operator, shape):
    k, d, rank = shape
    width = mora.r_hat(rank, k, d, even=operator == "rotate")
    assert width ** 2 <= rank * (k + d)
    assert (width + (2 if operator == "rotate" else 1)) ** 2 > rank * (k + d)
    assert square(k, d, rank, operator).M.numel() == width ** 2


@pytest.mark.parametrize("operator", ("share", "decouple", "rotate"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_input_and_no_output_is_ignored(operator, shape):
    delta = square(*shape, operator).delta()
    assert (delta.abs().sum(0) > 0).all()
    assert (delta.abs().sum(1) > 0).all()


def ranks_of_merged_cycles(groups, cycles, k=48, d=36, rank=1):
    """Numerical rank of the sum of the updates of cycles 0, 1, ..., and r^."""
    total, ranks = torch.zeros(d, k, dtype=torch.float64), []
    for cycle in range(cycles):
        update = square(k, d, rank, "share", groups, cycle)
        total += update.delta().detach()
        ranks.append(int(torch.linalg.matrix_rank(total)))
    return ranks, update


def test_same_groups_add_no_rank():
    for groups in ("strided", "contiguous"):
        ranks, update = ranks_of_merged_cycles(groups, 4)
        assert ranks == [update.M.shape[0]] * 4


def indicator(fold):
    """The matrix of a fold, (blocks * width, features)."""
    return fold(torch.eye(fold.features, dtype=torch.float64)).flatten(1).T


def test_alternate_groups_stay_below_their_cap():
    ranks, update = ranks_of_merged_cycles("alternate", 6)
    width, caps = update.M.shape[0], []
    for name in ("fold_in", "fold_out"):
        both = [square(48, 36, 1, "share", "alternate", cycle) for cycle in (0, 1)]
        maps = torch.cat([indicator(getattr(update_of_cycle, name)) for update_of_cycle in both])
        caps.append(int(torch.linalg.matrix_rank(maps)))
    assert max(ranks) == min(caps) <= 2 * width - 1
    assert ranks[0] == width < ranks[1]


@pytest.mark.parametrize("features, width", ((96, 25), (50, 14), (70, 15), (128, 60)))
def test_rolled_orders_span_all_features_as_fast_as_uniform_permutations(features, width):
    """The folds of successive cycles are stacked; each can add a rank of at most width - 1."""
    generator, folds, ranks = torch.Generator().manual_seed(0), [], []
    for _ in range(-(-features // (width - 1)) + 1):
        order = rolled_order(torch.arange(features), width, generator)
        assert sorted(order.tolist()) == list(range(features))
        fold = torch.zeros(width, features, dtype=torch.float64)
        fold[torch.arange(features) % width, order] = 1
        folds.append(fold)
        ranks.append(int(torch.linalg.matrix_rank(torch.cat(folds))))
    assert ranks[-1] == features and ranks[1] >= min(features, 2 * width - 1) - 10


def test_permuted_groups_lift_the_cap():
    ranks, update = ranks_of_merged_cycles("permute", 8)
    assert ranks[-1] == 36 > 2 * update.M.shape[0] - 1
    assert ranks == sorted(ranks)


@pytest.mark.parametrize("operator", ("truncate", "decouple", "rotate"))
def test_every_operator_moves_its_groups(operator):
    deltas = [square(40, 40, 1, operator, "permute", cycle) for cycle in (1, 2)]
    deltas[1].M.data.copy_(deltas[0].M)
    assert (deltas[0].delta() != deltas[1].delta()).any()


def test_the_groups_of_a_saved_cycle_are_drawn_as_before():
    """Golden: a file holds the seed and the cycle alone, other draws would be another map."""
    orders = {}
    for groups, cycle in (("permute", 0), ("alternate", 0), ("alternate", 1), ("contiguous", 0)):
        fold = mora.Fold(10, 4, 1, 3, False, groups)
        fold.move(cycle, seed=5)
        orders[groups, cycle] = fold.order.tolist()
    by_neighbours = [0, 3, 6, 8, 1, 4, 7, 9, 2, 5]
    assert orders == {("permute", 0): [1, 2, 9, 0, 4, 5, 6, 3, 8, 7],
                      ("alternate", 0): [*range(10)], ("alternate", 1): by_neighbours,
                      ("contiguous", 0): by_neighbours}


@pytest.mark.parametrize("features", (2 ** 15 - 1, 2 ** 15 + 3))
def test_a_narrow_order_is_the_order(features):
    """16 bits hold no index from 32,768 on."""
    fold, x = mora.Fold(features, 4096, 2, 9, False, "permute"), torch.randn(features)
    fold.move(cycle=0, seed=0)
    wide = fold(x)
    fold.narrow()
    assert (fold.order.dtype == torch.int16) == (features < 2 ** 15)
    assert torch.equal(fold(x), wide)


def test_torchs_own_ddp_broadcasts_the_order():
    """As the Trainer wraps a model: neither gloo nor NCCL sends 16-bit integers."""
    model = mora.adapt(nn.ModuleDict({"q": nn.Linear(24, 40)}), targets=("q",), rank=3,
                       groups="permute")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        DistributedDataParallel(model["q"])(torch.randn(3, 24)).sum().backward()
    finally:
        dist.destroy_process_group()


def test_a_rotation_in_bfloat16_is_the_exact_one_rounded():
    """Its cosines and sines are not rounded first."""
    fold = mora.Square(512, 64, 1, "rotate").fold_in
    pieces = torch.randn(20, fold.pieces, fold.width).bfloat16()
    exact = fold.rotate(pieces.double(), 1)
    error = (fold.rotate(pieces, 1) - exact).norm()
    assert 0 < error < 1.01 * (exact.bfloat16() - exact).norm()


METHODS = [("lora", {}), ("lora", {"lora_A": "orthogonal", "alpha": 2.0, "rslora": True}),
           ("lora", {"lora_A": "frozen"}), ("lora", {"dora": True}), ("mora", {"dora": True})]
METHODS += [("mora", {"operator": operator, "groups": groups})
            for operator, groups in zip(OPERATORS, GROUPS, strict=True)]


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def tensors_of(model):
    return {name: value for name, value in model.state_dict().items() if torch.is_tensor(value)}


def adapted(method, options, **more):
    model = small_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mora.adapt(model, method, rank=3, targets=("q_proj", "up_proj"), **options, **more)
    for _, layer in mora.adapted_layers(model):
        layer.merges = False  # W x + dW x; test_fast_linear.py compares the merged product
    return model


@pytest.mark.parametrize("method, options", METHODS)
def test_update_is_zero_at_init(method, options):
    ids = torch.arange(11)[None]
    assert torch.equal(run(small_model(), ids), run(adapted(method, options), ids))


@pytest.mark.parametrize("method, options", METHODS)
def test_merge_preserves_function(method, options):
    model = adapted(method, options, train_rest=True)
    train(model, optimizer_of(model), 5)
    ids = torch.arange(11)[None]
    before = run(model, ids)
    assert (before - run(small_model(), ids)).abs().max() > 1e-3
    merged = mora.merge(model)
    assert type(merged["q_proj"]) is nn.Linear and not mora.adapted_layers(merged)
    torch.testing.assert_close(run(merged, ids), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method, options", METHODS)
def test_merged_weights_are_what_merge_leaves_and_leave_the_model_alone(method, options):
    model = adapted(method, options, train_rest=True)
    train(model, optimizer_of(model), 2)
    before, weights = tensors_of(copy.deepcopy(model)), mora.merged_weights(model)
    assert all(torch.equal(value, tensors_of(model)[key]) for key, value in before.items())
    merged = mora.merge(model).state_dict()
    assert weights.keys() == merged.keys()
    assert all(torch.equal(weights[key], merged[key]) for key in merged)


@pytest.mark.parametrize("method, options", METHODS)
def test_restart_preserves_function_and_drops_exactly_the_adapter_states(method, options):
    model = adapted(method, options, train_rest=True)
    optimizer = optimizer_of(model)
    train(model, optimizer, 5)
    ids = torch.arange(11)[None]
    adapters = {name: p for name, p in mora.adapter_parameters(model) if p.requires_grad}
    others = {name: p for name, p in model.named_parameters()
              if p in optimizer.state and name not in adapters}
    states_of_others = copy.deepcopy({name: optimizer.state[p] for name, p in others.items()})
    before, states = run(model, ids), len(optimizer.state)
    report = mora.restart(model, optimizer, cycle=1)
    torch.testing.assert_close(run(model, ids), before, rtol=0, atol=1e-5)
    assert report["states"] == len(adapters) == states - len(others) and report["update_norm"] > 0
    assert all(p not in optimizer.state for p in adapters.values())
    for name, state in states_of_others.items():
        now = optimizer.state[others[name]]
        assert all(torch.equal(now[key], value) for key, value in state.items())
    train(model, optimizer, 1)
    assert all(float(optimizer.state[p]["step"]) == 1 for p in adapters.values())


def block_of_three():
    return nn.ModuleDict({"q": nn.Linear(40, 30), "k": nn.Linear(40, 30), "v": nn.Linear(40, 20)})


def test_layers_that_read_one_input_compress_it_alike():
    model = nn.ModuleDict({"a": block_of_three(), "b": block_of_three()})
    mora.adapt(model, rank=2, groups="permute", targets=("q", "k", "v"), cycle=1)
    a, b = ({name: layer.update for name, layer in model[key].items()} for key in "ab")
    assert a["q"].fold_in is a["k"].fold_in and a["q"].fold_out is not a["k"].fold_out
    assert (a["q"].fold_in.order != b["q"].fold_in.order).any()
    assert (a["q"].fold_out.order != a["k"].fold_out.order).any()


def test_a_new_cycle_moves_the_groups_and_their_inverse():
    model = mora.adapt(block_of_three(), rank=2, groups="permute", targets=("q", "k"), cycle=1)
    fold = model["q"].update.fold_in
    before = fold.order.clone()
    mora.start_cycle(mora.adapted_layers(model), seed=0, cycle=2)
    assert (fold.order != before).any()
    assert torch.equal(fold.order[fold.inverse.long()], torch.arange(40, dtype=torch.int32))


@pytest.mark.parametrize("dora", [False, True])
def test_a_layers_groups_are_functions_of_seed_cycle_and_name(dora):
    """A resumed run, and an adapter folder, draw the groups again from these three."""
    model = nn.ModuleDict({"block": block_of_three()})
    mora.adapt(model, rank=2, groups="permute", targets=("q", "k"), seed=3, cycle=2, dora=dora)
    for name, layer in mora.adapted_layers(model):
        square = getattr(layer.update, "inner", layer.update)
        folds = square.fold_in, square.fold_out
        assert [fold.seed for fold in folds] == [zlib.crc32(b"3 2 block 40"),
                                                 zlib.crc32(f"3 2 {name}".encode())]
        assert [fold.cycle for fold in folds] == [2, 2]


@pytest.mark.parametrize("keep", (1.0, 0.3))
def test_restart_may_keep_or_prune_the_states(keep):
    model = adapted("mora", {"operator": "truncate"})
    M = model["q_proj"].update.M
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, 3)
    before = {key: value.clone() for key, value in optimizer.state[M].items()}
    mora.restart(model, optimizer, cycle=1, keep=keep)
    after = optimizer.state[M]
    kept = after["exp_avg"] != 0
    assert kept.sum() == pytest.approx(keep * M.numel(), abs=0.5)
    assert torch.equal(after["exp_avg"][kept], before["exp_avg"][kept])
    if keep < 1:  # the largest are kept
        magnitudes = before["exp_avg"].abs()
        assert magnitudes[~kept].max() <= magnitudes[kept].min()
    assert torch.equal(after["exp_avg_sq"], before["exp_avg_sq"])
    assert after["step"] == before["step"] and M.abs().sum() == 0


def test_pruning_leaves_the_largest_moment_at_least():
    model = adapted("mora", {})
    M = model["q_proj"].update.M
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 1)
    largest = optimizer.state[M]["exp_avg"].abs().argmax()
    mora.restart(model, optimizer, cycle=1, keep=1e-9)
    assert optimizer.state[M]["exp_avg"].flatten().nonzero().tolist() == [[largest]]


def test_the_reported_norm_is_that_of_the_change_of_all_weights():
    model = adapted("mora", {})
    optimizer = optimizer_of(model)
    train(model, optimizer, 3)
    before = [layer.weight.clone() for _, layer in mora.adapted_layers(model)]
    report = mora.restart(model, optimizer, cycle=1)
    changes = [(layer.weight - weight).flatten()
               for (_, layer), weight in zip(mora.adapted_layers(model), before, strict=True)]
    assert report["update_norm"] == pytest.approx(torch.cat(changes).norm().item(), rel=1e-4)


@pytest.mark.parametrize("wrap", (torch.compile, lambda model: nn.ModuleDict({"module": model})))
def test_a_restart_of_a_wrapped_model_draws_as_one_of_the_model(wrap):
    """torch.compile and DDP put a prefix before every name."""
    orders = []
    for own in (lambda model: model, wrap):
        model = adapted("mora", {"groups": "permute"})
        optimizer = torch.optim.AdamW(model.parameters())
        train(model, optimizer, 1)
        mora.restart(own(model), optimizer, cycle=1)
        orders.append([layer.update.fold_out.order for _, layer in mora.adapted_layers(model)])
    assert all(torch.equal(a, b) for a, b in zip(*orders, strict=True))


def test_restarts_need_weights_that_take_small_updates():
    model = adapted("mora", {})
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 1)
    layer = model["up_proj"]
    layer.weight.data = layer.weight.bfloat16()
    before = copy.deepcopy(dict(mora.adapter_parameters(model)))
    with pytest.raises(ValueError, match="up_proj: torch.bfloat16 rounds small updates away"):
        mora.restart(model, optimizer, cycle=1)
    after = dict(mora.adapter_parameters(model))
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_a_restart_takes_another_cycle():
    """The same one again draws the same groups, so that the rank of merged cycles does not grow."""
    model = adapted("mora", {"groups": "permute"}, cycle=1)
    optimizer = optimizer_of(model)
    train(model, optimizer, 1)
    before, M = model["q_proj"].weight.clone(), model["q_proj"].update.M.clone()
    with pytest.raises(ValueError, match="q_proj is in cycle 1 already: a restart begins another"):
        mora.restart(model, optimizer, cycle=1)
    layer = model["q_proj"]
    assert torch.equal(layer.weight, before) and torch.equal(layer.update.M, M)
    mora.restart(model, optimizer, cycle=2)


@pytest.mark.parametrize("keep", (2, -0.1, float("nan"), "0.5"))
def test_a_restart_keeps_a_share_of_the_moments(keep):
    model = adapted("mora", {})
    optimizer = optimizer_of(model)
    train(model, optimizer, 1)
    before = model["q_proj"].weight.clone()
    with pytest.raises(ValueError, match=f"keep must be a number from 0 to 1, got {keep!r}"):
        mora.restart(model, optimizer, cycle=1, keep=keep)
    assert torch.equal(model["q_proj"].weight, before)


def test_a_restart_that_cannot_keep_moments_changes_nothing():
    model = adapted("mora", {})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 1)
    before = model["q_proj"].weight.clone()
    with pytest.raises(RuntimeError, match="0 Adam states for 2 adapter tensors"):
        mora.restart(model, optimizer, cycle=1, keep=0.1)
    assert torch.equal(model["q_proj"].weight, before)
    with pytest.raises(RuntimeError, match="0 optimizer states for 0"):
        mora.restart(small_model(), optimizer, cycle=1)


def test_restart_raises_for_an_adapter_that_was_not_trained():
    model = adapted("lora", {})
    optimizer = torch.optim.AdamW([model["q_proj"].update.A, model["q_proj"].update.B])
    train(model, optimizer, 1)
    with pytest.raises(RuntimeError, match="2 optimizer states for 4"):
        mora.restart(model, optimizer, cycle=1)


@pytest.mark.parametrize("method, options", METHODS)
def test_every_parameter_gets_gradient_at_init_or_soon(method, options):
    model = adapted(method, options)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    train(model, optimizer, 1)
    assert any(p.grad.abs().sum() > 0 for p in parameters)
    train(model, optimizer, 1)
    assert all(p.grad.abs().sum() > 0 for p in parameters)


def test_the_frozen_weight_does_not_move():
    model = adapted("mora", {})
    before = {name: p.clone() for name, p in model.named_parameters() if "update" not in name}
    train(model, optimizer_of(model), 3)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in before.items())


def trained_names(model):
    return sorted(name for name, p in model.named_parameters() if p.requires_grad)


def test_train_rest_chooses_what_trains():
    updates = ["q_proj.update.M", "up_proj.update.M"]
    rest = ["embed.weight", "head.bias", "head.weight"]
    assert trained_names(adapted("mora", {})) == updates
    assert trained_names(adapted("mora", {}, train_rest=True)) == rest + updates
    frozen = mora.adapt(small_model(), "frozen", targets=("q_proj", "up_proj"), train_rest=True)
    assert trained_names(frozen) == rest


def test_train_rest_trains_nothing_that_was_frozen_before():
    model = small_model()
    model["embed"].requires_grad_(False)
    mora.adapt(model, targets=("q_proj", "up_proj"), rank=3, train_rest=True)
    assert trained_names(model) == ["head.bias", "head.weight", "q_proj.update.M",
                                    "up_proj.update.M"]


@pytest.mark.parametrize("method, options", METHODS)
def test_updates_of_16_bits_weights_are_float32_and_merged_weights_keep_their_dtype(
        method, options):
    model = small_model().bfloat16()
    mora.adapt(model, method, rank=3, targets=("q_proj", "up_proj"), **options)
    assert {p.dtype for _, p in mora.adapter_parameters(model)} == {torch.float32}
    for _, parameter in mora.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    sums = {f"{name}.weight": (layer.weight.float() + layer.delta()).bfloat16()  # rounded once
            for name, layer in mora.adapted_layers(model)}
    for merged in (mora.merged_weights(model), mora.merge(model).state_dict()):
        assert {weight.dtype for weight in merged.values()} == {torch.bfloat16}
        assert all(torch.equal(merged[name], weight) for name, weight in sums.items())


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="'qproj' matches no linear layer.*q_proj"):
        mora.adapt(small_model(), targets=("qproj",))
    with pytest.raises(ValueError, match="'embed' matches no linear layer"):
        mora.adapt(small_model(), targets=("embed",))
    with pytest.raises(ValueError, match="target 7 matches no linear layer"):
        mora.adapt(small_model(), targets=[7])
    for targets in ([], ()):  # nothing would be adapted, and all of the model frozen
        with pytest.raises(ValueError, match="'' matches no linear layer.*q_proj"):
            mora.adapt(small_model(), targets=targets)
    for rank in (8.0, "8", None, 0):
        with pytest.raises(ValueError, match="rank must be a whole number from 1 on, got"):
            mora.adapt(small_model(), rank=rank, targets=("head",))
    for alpha in (math.nan, math.inf):
        with pytest.raises(ValueError, match="give it an alpha above 0, got"):
            mora.adapt(small_model(), "lora", alpha=alpha, targets=("head",))
    with pytest.raises(ValueError, match="'all-linear' matches no .* named nothing"):
        mora.adapt(nn.Sequential(nn.ReLU()), targets="all-linear")
    with pytest.raises(ValueError, match="'all-linear' matches no .* named nothing"):
        mora.adapt(nn.Linear(4, 4), targets="all-linear")  # no module holds it
    only_head = nn.Sequential(nn.Linear(4, 4))
    only_head.get_output_embeddings = lambda: only_head[0]
    with pytest.raises(ValueError, match="'all-linear' matches no"):
        mora.adapt(only_head, targets="all-linear")
    with pytest.raises(ValueError, match="adapted already"):
        mora.adapt(adapted("mora", {}), targets=("head",))
    with pytest.raises(ValueError, match="no adapted layers"):
        mora.merge(small_model())
    with pytest.raises(ValueError, match="are LoRA's .*method mora got 0.0, False, 'frozen'"):
        mora.adapt(small_model(), lora_A="frozen", targets=("head",))
    with pytest.raises(ValueError, match="give it an alpha"):
        mora.adapt(small_model(), "lora", rslora=True, targets=("head",))
    with pytest.raises(ValueError, match="give it an alpha above 0, got -4"):
        mora.adapt(small_model(), "lora", alpha=-4, targets=("head",))  # load would refuse it
    with pytest.raises(ValueError, match="rank 1 leaves no M for a layer 1 -> 1"):
        mora.adapt(nn.Sequential(nn.Linear(1, 1)), rank=1, operator="rotate", targets=("0",))
    with pytest.raises(ValueError, match="operator must be one of"):
        mora.adapt(small_model(), operator="twist", targets=("head",))


@pytest.mark.parametrize("method, option, message", [
    ("lora", {"operator": "rotate"}, "operator, groups need method mora, lora got rotate"),
    ("lora", {"groups": "permute"}, "operator, groups need method mora, lora got share, perm"),
    ("mora", {"alpha": 16}, "are LoRA's .*: method mora got 16, False, 'uniform'"),
    ("frozen", {"dora": True}, "dora, dropout need .*mora or lora, frozen got True, 0.0"),
    ("frozen", {"dropout": 0.1}, "dora, dropout need .*mora or lora, frozen got False, 0.1"),
    *(("lora", {"dropout": value}, f"dropout must be a number from 0 to below 1, got {value}")
      for value in (-0.1, 1.0, 5, math.nan, True, "0.1", None)),
    *(("lora", {"alpha": value}, f"give it an alpha above 0, got {re.escape(repr(value))}")
      for value in ("16", None, np.float32(0.5))),  # no JSON holds the last: save would fail
    ("mora", {"lora_rank": "4"}, "give one below rank 8, without dora; got lora_rank 4"),
    *(("mora", option, "seed and cycle must be whole numbers, cycle from 0, got ")
      for option in ({"cycle": -1}, {"cycle": 1.0}, {"seed": 1.5}, {"seed": "1"})),
    ("mora", {"rank": True}, "rank must be a whole number from 1 on, got True"),
    ("mora", {"dora": "no"}, "dora must be one of False, True, got 'no'"),
    ("lora", {"rslora": "no", "alpha": 4}, "rslora must be one of False, True, got 'no'"),
])
def test_an_option_that_would_have_no_effect_or_no_meaning_is_refused(method, option, message):
    with pytest.raises(ValueError, match=message):
        mora.adapt(small_model(), method, targets=("head",), **option)


def test_an_oversized_lora_warns():
    with pytest.warns(UserWarning, match="rank 64 gives 1 layers .first head. .* more entries"):
        mora.adapt(small_model(), "lora", rank=64, targets=("head",))


def test_a_model_with_adapters_of_peft_is_refused():
    """Its frozen q_proj.base_layer would be adapted, and its own adapters too."""
    import peft
    settings = peft.LoraConfig(target_modules=["q_proj"], r=2)
    for targets in ("all-linear", ("q_proj",)):
        wrapped = peft.get_peft_model(small_model(), settings)
        with pytest.raises(ValueError, match="q_proj has an adapter of peft: .*merge_and_unload"):
            mora.adapt(wrapped, targets=targets)
    mora.adapt(wrapped.merge_and_unload(), targets=("q_proj",))


def test_a_linear_layer_with_a_forward_of_its_own_is_refused():
    """As bitsandbytes has: an adapted layer would compute W x without it."""
    class Scaled(nn.Linear):
        def forward(self, x):
            return 10 * super().forward(x)

    model = small_model()
    model["head"] = Scaled(24, 11)
    with pytest.raises(ValueError, match="head: this Scaled has a forward of its own"):
        mora.adapt(model, targets=("head",))


def test_a_linear_layer_whose_forward_was_replaced_is_refused():
    """As accelerate does where it moves weights between devices."""
    model = small_model()
    forward = model["head"].forward
    model["head"].forward = lambda x: 10 * forward(x)
    with pytest.raises(ValueError, match="head: this Linear has a forward of its own"):
        mora.adapt(model, targets=("head",))


def test_oversized_square_works_and_warns_once():
    with pytest.warns(UserWarning, match="more entries") as caught:
        mora.adapt(small_model(), rank=64, targets=("q_proj", "up_proj"))
    assert len(caught) == 1


def test_dropout_acts_in_training_alone():
    model = adapted("mora", {}, dropout=0.5)
    nn.init.normal_(model["q_proj"].update.M)
    ids = torch.arange(11)[None]
    assert not torch.equal(run(model.train(), ids), run(model, ids))
    assert torch.equal(run(model.eval(), ids), run(model, ids))


# ------------------------------------------------------------
# state dicts

OTHER_MAPS = [
    ("mora", {"operator": "decouple"}, {"operator": "share"}),
    ("mora", {"groups": "permute"}, {"groups": "contiguous"}),
    ("mora", {"groups": "permute", "seed": 1}, {"groups": "permute", "seed": 2}),
    ("mora", {"groups": "alternate", "cycle": 0}, {"groups": "alternate", "cycle": 1}),
    ("mora", {"dora": True, "seed": 1}, {"dora": True, "seed": 2}),
    ("lora", {"alpha": 6.0}, {"alpha": 12.0}),
    ("lora", {"alpha": 6.0, "dora": True}, {"alpha": 12.0, "dora": True}),
]


@pytest.mark.parametrize("method, saved, here", OTHER_MAPS, ids=str)
def test_the_state_of_another_map_is_refused_with_both_values(method, saved, here):
    state = adapted(method, saved).state_dict()
    key = next(key for key in saved if saved[key] != here[key])
    values = [saved[key], here[key]]
    if key == "alpha":
        key, values = "scale", [2.0, 4.0]
    theirs, own = (f"'{key}': {value!r}" for value in values)
    with pytest.raises(RuntimeError, match=f"loaded update has .*{theirs}.*, the model's .*{own}"):
        adapted(method, here).load_state_dict(state)


def test_a_state_dict_brings_a_trained_model_back(tmp_path):
    options = {"groups": "permute", "operator": "rotate", "seed": 5, "cycle": 2}
    model, ids = adapted("mora", options), torch.arange(11)[None]
    train(model, optimizer_of(model), 2)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = adapted("mora", options)
    assert not torch.equal(run(other, ids), run(model, ids))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(run(other, ids), run(model, ids))


def test_a_state_dict_without_the_map_is_refused():
    model = adapted("mora", {})
    with pytest.raises(RuntimeError, match="Missing key.*q_proj._extra_state"):
        model.load_state_dict(tensors_of(model))


# ------------------------------------------------------------
# weights that are replaced or shared

DORA = [("lora", {"dora": True}), ("mora", {"groups": "permute", "operator": "rotate"})]


@pytest.mark.parametrize("method, options", DORA)
def test_merge_takes_the_weight_that_load_state_dict_assigned(method, options):
    model, ids = adapted(method, options), torch.arange(11)[None]
    state = model.state_dict()
    state |= {name: torch.randn_like(tensor) for name, tensor in tensors_of(model).items()}
    model.load_state_dict(state, assign=True)
    before = run(model, ids)
    torch.testing.assert_close(run(mora.merge(model), ids), before, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("assign", (False, True))
@pytest.mark.parametrize("method, options", [*DORA, ("mora", {"groups": "contiguous"})])
def test_a_model_on_meta_is_filled(method, options, assign):
    """torch indexes with buffers that stay on meta without an error: numbers would be garbage."""
    model, ids = adapted(method, options, seed=3, cycle=1), torch.arange(11)[None]
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    with torch.device("meta"):
        empty = adapted(method, options, seed=3, cycle=1)
    empty = empty if assign else empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict(), assign=assign)
    expected = run(model, ids)
    torch.testing.assert_close(run(empty, ids), expected)
    torch.testing.assert_close(run(mora.merge(empty), ids), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("target", ("linear1", "linear2", "out_proj"))
def test_a_layer_whose_weight_torch_reads_is_refused_by_name(target):
    model = nn.ModuleDict({"encoder": nn.TransformerEncoderLayer(8, 2, 16)})
    reader = "MultiheadAttention" if target == "out_proj" else "TransformerEncoderLayer"
    message = rf"encoder\.(self_attn\.)?{target} is no target: nn.{reader} reads its weight"
    with pytest.raises(ValueError, match=message):
        mora.adapt(model, rank=1, targets=(target,))


@pytest.mark.parametrize("register, hook", [
    ("register_forward_hook", lambda module, inputs, output: 10 * output),
    ("register_forward_pre_hook", lambda module, inputs: (10 * inputs[0],))])
def test_a_layer_with_hooks_is_refused(register, hook):
    model = small_model()
    handle = getattr(model["head"], register)(hook)
    with pytest.raises(ValueError, match="head has forward hooks"):
        mora.adapt(model, targets=("head",))
    handle.remove()
    mora.adapt(model, targets=("head",))


def test_all_linear_leaves_out_the_head_of_this_projects_model():
    model = Llama(LlamaConfig(vocab_size=17, hidden_size=16, intermediate_size=24,
                              num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2))
    names = [name for name, _ in mora.adapted_layers(mora.adapt(model, targets="all-linear"))]
    assert len(names) == 7 and "lm_head" not in names


def test_a_layer_without_a_weight_to_merge_into_is_refused():
    model = small_model()
    nn.utils.parametrizations.weight_norm(model["head"])
    with pytest.raises(ValueError, match="head is no target: .* holds no .out, in. matrix"):
        mora.adapt(model, targets=("head",))


@pytest.mark.parametrize("weight", (torch.ones(11, 24, dtype=torch.int8), torch.ones(132, 1)))
def test_a_weight_of_a_quantized_layer_is_refused(weight):
    """Whole numbers without their scale, or packed."""
    model = small_model()
    model["head"].weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match="head is no target: .* holds no .out, in. matrix"):
        mora.adapt(model, targets=("head",))


def test_a_layer_whose_weight_another_module_shares_is_refused():
    model = small_model()
    model["head"].weight = model["embed"].weight
    with pytest.raises(ValueError, match="head shares its weight with embed.weight"):
        mora.adapt(model, targets=("head",))
    model["again"] = model["q_proj"]
    with pytest.raises(ValueError, match="q_proj shares its weight with again"):
        mora.adapt(model, targets=("q_proj",))
    mora.adapt(model, targets=("up_proj",))  # the other layers can be adapted
