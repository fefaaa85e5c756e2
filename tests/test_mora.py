"""The laws of the algebra, in float64 on nasty shapes."""
import copy
import itertools
import math
import warnings

import pytest
import torch
from torch import nn

import mora
from mora import contiguous_order, rolled_order

OPERATORS = ("truncate", "share", "decouple", "rotate")
# (in, out, rank): d != k both ways, r^ >= in, odd r^, exact division, pieces that outnumber the other side's
SHAPES = [(70, 50, 4), (50, 130, 3), (24, 24, 32), (33, 33, 2), (64, 64, 8), (16, 200, 1), (200, 16, 1), (9, 7, 1)]
GROUPS = ("strided", "contiguous", "alternate", "permute")


def square(k, d, rank, operator, groups="permute", cycle=1):
    update = mora.Square(k, d, rank, operator, groups, dtype=torch.float64)
    update.start(cycle, mora.generator(0, cycle, "layer"), mora.generator(0, cycle, "inputs"))
    with torch.no_grad():
        update.M.copy_(torch.randn(update.M.shape, dtype=torch.float64))
    return update


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.ModuleDict({"embed": nn.Embedding(11, 24), "q_proj": nn.Linear(24, 40), "up_proj": nn.Linear(40, 24),
                          "head": nn.Linear(24, 11)})


def run(model, ids):
    x = model["embed"](ids)
    return model["head"](x + model["up_proj"](torch.tanh(model["q_proj"](x))))


def train(model, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(11, (4, 5), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(run(model, ids).flatten(0, 1), (ids * 3 % 11).flatten()).backward()
        optimizer.step()


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("groups", GROUPS)
def test_delta_equals_apply_on_identity(operator, shape, groups):
    update = square(*shape, operator, groups)
    applied = update(torch.eye(shape[0], dtype=torch.float64)).T
    assert update.delta().shape == (shape[1], shape[0])
    torch.testing.assert_close(update.delta(), applied, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adjoint_is_the_adjoint(operator, shape):
    update = square(*shape, operator)
    for fold in (update.fold_in, update.fold_out):
        x, h = torch.randn(3, fold.features, dtype=torch.float64), torch.randn(3, fold.blocks, fold.width, dtype=torch.float64)
        torch.testing.assert_close((fold(x) * h).sum(), (x * fold.adjoint(h)).sum(), rtol=1e-12, atol=1e-10)


def test_operators_are_the_papers():
    """dW written down from eq. 4-11, element by element, where r^ divides both sides."""
    k, d, rank = 24, 12, 1  # r^ = 6
    for operator in OPERATORS:
        update = square(k, d, rank, operator, "strided")
        M, dW, r = update.M.detach(), update.delta().detach(), 6
        for i, j in itertools.product(range(d), range(k)):
            if operator == "truncate":
                expected = M[i, j] if i < r and j < r else 0.0
            elif operator == "share":
                expected = M[i % r, j % r]
            else:
                p, block = j // r, i // r  # four pieces in, two out: blocks p mod 2
                if p % 2 != block:
                    expected = 0.0
                elif operator == "decouple":
                    expected = M[i % r, j % r]
                else:  # column of M R_p: pairs (a, a + 3)
                    a, angle = j % r % 3, p * 10000 ** (-2 * (j % r % 3) / r)
                    low, high = M[i % r, a], M[i % r, a + 3]
                    expected = low * math.cos(angle) + high * math.sin(angle) if j % r < 3 else high * math.cos(angle) - low * math.sin(angle)
            assert abs(float(dW[i, j]) - float(expected)) < 1e-12, (operator, i, j)


def test_contiguous_groups_are_appendix_b():
    for features, width in ((12, 4), (14, 4), (7, 3), (5, 9)):
        order = contiguous_order(features, width)
        assert sorted(order.tolist()) == list(range(features))
        small, more = divmod(features, width)
        groups = [[int(order[q]) for q in range(g, features, width)] for g in range(min(width, features))]
        sizes = [small + (g < more) for g in range(min(width, features))]
        flat = iter(range(features))
        assert groups == [[next(flat) for _ in range(size)] for size in sizes]


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
    return fold(torch.eye(fold.features, dtype=torch.float64)).flatten(1).T


def test_alternate_groups_stay_below_their_cap():
    ranks, update = ranks_of_merged_cycles("alternate", 6)
    width, caps = update.M.shape[0], []
    for name in ("fold_in", "fold_out"):
        both = [indicator(getattr(square(48, 36, 1, "share", "alternate", cycle), name)) for cycle in (0, 1)]
        caps.append(int(torch.linalg.matrix_rank(torch.cat(both))))
    assert max(ranks) == min(caps) <= 2 * width - 1
    assert ranks[0] == width < ranks[1]


def test_turned_pieces_stack_to_the_rank_of_uniform_permutations():
    """What a cycle's fold can not see, the next one's sees: n features are spanned as soon as they can be, but for a few."""
    for features, width in ((96, 25), (50, 14), (70, 15), (128, 60)):
        generator, seen, ranks = torch.Generator().manual_seed(0), [], []
        for _ in range(-(-features // (width - 1)) + 1):
            order = rolled_order(features, width, generator)
            assert sorted(order.tolist()) == list(range(features))
            fold = torch.zeros(width, features, dtype=torch.float64)
            fold[torch.arange(features) % width, order] = 1
            seen.append(fold)
            ranks.append(int(torch.linalg.matrix_rank(torch.cat(seen))))
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


METHODS = [("lora", {})] + [("mora", {"operator": o, "groups": g}) for o, g in zip(OPERATORS, GROUPS)]
METHODS += [("lora", {"lora_A": "orthogonal", "alpha": 2.0, "rslora": True}), ("lora", {"lora_A": "frozen"}), ("lora", {"dora": True}), ("mora", {"dora": True})]


def adapted(method, options, **more):
    model = small_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mora.adapt(model, method, rank=3, targets=("q_proj", "up_proj"), **options, **more)
    for _, layer in mora.adapted_layers(model):
        layer.merges = False  # the definition, W x + U(x); test_fast_linear.py holds the merged product against it
    return model


@pytest.mark.parametrize("method, options", METHODS)
def test_update_is_zero_at_init(method, options):
    ids = torch.arange(11)[None]
    assert torch.equal(run(small_model(), ids), run(adapted(method, options), ids))


@pytest.mark.parametrize("method, options", METHODS)
def test_merge_preserves_function(method, options):
    model = adapted(method, options, train_rest=True)
    train(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), 5)
    ids = torch.arange(11)[None]
    before = run(model, ids)
    assert (before - run(small_model(), ids)).abs().max() > 1e-3
    merged = mora.merge(model)
    assert type(merged["q_proj"]) is nn.Linear and not mora.adapted_layers(merged)
    torch.testing.assert_close(run(merged, ids), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method, options", METHODS)
def test_merged_weights_are_what_merge_leaves_and_leave_the_model_alone(method, options):
    model = adapted(method, options, train_rest=True)
    train(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), 2)
    before, weights = copy.deepcopy(model.state_dict()), mora.merged_weights(model)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    merged = mora.merge(model).state_dict()
    assert weights.keys() == merged.keys() and all(torch.equal(weights[key], merged[key]) for key in merged)


@pytest.mark.parametrize("method, options", METHODS)
def test_restart_preserves_function_and_drops_exactly_the_adapter_states(method, options):
    model = adapted(method, options, train_rest=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    train(model, optimizer, 5)
    ids = torch.arange(11)[None]
    adapters = {name: p for name, p in mora.adapter_parameters(model) if p.requires_grad}
    before, states, others = run(model, ids), len(optimizer.state), copy.deepcopy(
        {n: optimizer.state[p] for n, p in model.named_parameters() if p in optimizer.state and n not in adapters})
    report = mora.restart(model, optimizer, cycle=1)
    torch.testing.assert_close(run(model, ids), before, rtol=0, atol=1e-5)
    assert report["states"] == len(adapters) == states - len(others) and report["update_norm"] > 0
    assert all(p not in optimizer.state for p in adapters.values())
    for name, p in model.named_parameters():
        if name in others:
            assert all(torch.equal(optimizer.state[p][key], value) for key, value in others[name].items())
    train(model, optimizer, 1)
    assert all(float(optimizer.state[p]["step"]) == 1 for p in adapters.values())


def test_layers_that_read_one_input_compress_it_alike():
    part = lambda: nn.ModuleDict({"q": nn.Linear(40, 30), "k": nn.Linear(40, 30), "other": nn.Linear(40, 20)})
    model = nn.ModuleDict({"a": part(), "b": part()})
    mora.adapt(model, rank=2, groups="permute", targets=("q", "k", "other"), cycle=1)
    for cycle in (1, 2):
        a, b = ({name: layer.update for name, layer in model[key].items()} for key in "ab")
        assert a["q"].fold_in is a["k"].fold_in and a["q"].fold_out is not a["k"].fold_out and a["q"].fold_in is not b["q"].fold_in
        assert (a["q"].fold_in.order != b["q"].fold_in.order).any() and (a["q"].fold_out.order != a["k"].fold_out.order).any()
        before = a["q"].fold_in.order.clone()
        mora.start(mora.adapted_layers(model), seed=0, cycle=2)
        assert cycle == 2 or (a["q"].fold_in.order != before).any()
        assert torch.equal(a["q"].fold_in.order[a["q"].fold_in.inverse.long()], torch.arange(40, dtype=torch.int32))


def test_restart_may_keep_or_prune_the_states():
    for keep in (1.0, 0.3):
        model = adapted("mora", {"operator": "truncate"})
        M = model["q_proj"].update.M
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        train(model, optimizer, 3)
        before = {key: value.clone() for key, value in optimizer.state[M].items()}
        mora.restart(model, optimizer, cycle=1, keep=keep)
        after = optimizer.state[M]
        kept = after["exp_avg"] != 0
        assert kept.sum() == pytest.approx(keep * M.numel(), abs=0.5) and torch.equal(after["exp_avg"][kept], before["exp_avg"][kept])
        assert before["exp_avg"].abs()[~kept].max() <= before["exp_avg"].abs()[kept].min() if keep < 1 else True
        assert torch.equal(after["exp_avg_sq"], before["exp_avg_sq"]) and after["step"] == before["step"] and M.abs().sum() == 0


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
    train(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1), 3)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_train_rest_chooses_what_trains():
    trains = lambda model: sorted(n for n, p in model.named_parameters() if p.requires_grad)
    assert trains(adapted("mora", {})) == ["q_proj.update.M", "up_proj.update.M"]
    rest = ["embed.weight", "head.bias", "head.weight"]
    assert trains(adapted("mora", {}, train_rest=True)) == rest + ["q_proj.update.M", "up_proj.update.M"]
    assert trains(mora.adapt(small_model(), "frozen", targets=("q_proj", "up_proj"), train_rest=True)) == rest


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="'qproj' matches no module.*q_proj"):
        mora.adapt(small_model(), targets=("qproj",))
    with pytest.raises(ValueError, match="only Embedding"):
        mora.adapt(small_model(), targets=("embed",))
    with pytest.raises(ValueError, match="adapted already"):
        mora.adapt(adapted("mora", {}), targets=("head",))
    with pytest.raises(ValueError, match="no adapted layers"):
        mora.merge(small_model())
    with pytest.raises(ValueError, match="are LoRA's .*method mora got 0.0, False, 'frozen'"):
        mora.adapt(small_model(), lora_A="frozen", targets=("head",))
    with pytest.raises(ValueError, match="give it an alpha"):
        mora.adapt(small_model(), "lora", rslora=True, targets=("head",))
    with pytest.raises(ValueError, match="operator must be one of"):
        mora.adapt(small_model(), operator="twist", targets=("head",))


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
