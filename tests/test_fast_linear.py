"""The merged product and its backward equal the two paths, in value and gradients."""
import warnings
from types import SimpleNamespace

import pytest
import torch
from test_mora import SHAPES
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mora
from model import kernel_choices
from mora import OPERATORS

KINDS = ("lora",) + OPERATORS


def layer(kind, shape, dtype=torch.float64, groups="permute", bias=True, dora=False):
    k, d, rank = shape
    linear = nn.Linear(k, d, bias=bias, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"operator": kind, "groups": groups}
        if kind == "lora":
            options = {"method": "lora", "alpha": 3.0}
        model = nn.ModuleDict({"q": linear})
        adapted = mora.adapt(model, rank=rank, targets=("q",), cycle=1, dora=dora,
                             **options)["q"]
    for parameter in adapted.update.parameters():
        nn.init.normal_(parameter)
    return adapted


def both_ways(adapted, x):
    """[(output, dx, gradients of the update)] merged and in two paths."""
    results = []
    for merges in (True, False):
        adapted.merges = merges
        x = x.detach().requires_grad_()
        y = adapted(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, *(p.grad.clone() for p in adapted.update.parameters())))
        adapted.zero_grad()
    return results


@pytest.mark.parametrize("dora", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_one_vector_is_an_input(kind, dora):
    adapted = layer(kind, (12, 20, 2), dora=dora)
    merged, paths = both_ways(adapted, torch.randn(12, dtype=torch.float64))
    for a, b in zip(merged, paths, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fast_linear_matches_two_paths(kind, shape):
    merged, paths = both_ways(layer(kind, shape), torch.randn(3, 4, shape[0], dtype=torch.float64))
    for a, b in zip(merged, paths, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 12, 1), (12, 5, 1)], ids=str)
def test_gradcheck(kind, shape):
    adapted = layer(kind, shape)
    parameters = tuple(adapted.update.parameters())
    x = torch.randn(2, 3, shape[0], dtype=torch.float64, requires_grad=True)

    def merged(x, *parameters):
        return mora.MergedLinear.apply(x, adapted.weight, adapted.update, None,
                                       *parameters)

    assert torch.autograd.gradcheck(merged, (x, *parameters))


@pytest.mark.parametrize("kind", OPERATORS)
def test_x_is_not_saved(kind):
    """MoRA saves r^ numbers per block and token, and the merged weight."""
    adapted, saved = layer(kind, (64, 96, 4), torch.float32), []
    x = torch.randn(1000, 64, requires_grad=True)

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adapted(x)
    storage = x.untyped_storage().data_ptr()
    assert all(tensor.untyped_storage().data_ptr() != storage for tensor in saved)
    numbers = sum(t.numel() for t in saved if t.numel() > 64 * 96 * 2)  # all but the weight
    update = adapted.update
    assert 0 < numbers <= 1000 * update.fold_in.blocks * (len(update.M) + mora.ALIGNED - 1)


@pytest.mark.parametrize("kind", ("lora", "share", "rotate"))
@pytest.mark.parametrize("how", ("bfloat16", "autocast"))
def test_half_precision(kind, how):
    """Outputs in bfloat16, gradients of the update in float32, both near the float32 result."""
    adapted, x = layer(kind, (64, 96, 4), torch.float32), torch.randn(50, 64)
    exact = both_ways(adapted, x)[0]
    adapted.merges = True
    x = (x.bfloat16() if how == "bfloat16" else x).detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        y = adapted(x)
    y.float().square().sum().backward()
    gradients = [p.grad for p in adapted.update.parameters()]
    assert y.dtype == torch.bfloat16 and x.grad.dtype == x.dtype
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    for a, b in zip(exact, (y, x.grad, *gradients), strict=True):
        assert (a - b.float()).norm() < 0.02 * a.norm()


def test_a_bfloat16_base_lets_small_updates_through():
    """An update of 1e-5 reaches the output within 1 %: W + dW would round most of it away."""
    torch.manual_seed(0)
    adapted = layer("share", (512, 512, 8), torch.float32, bias=False)
    nn.init.normal_(adapted.weight, std=0.02)
    nn.init.constant_(adapted.update.M, 1e-5)
    adapted.weight.data = adapted.weight.data.bfloat16()
    x = torch.rand(512, 512).bfloat16()
    weight_alone = x.float() @ adapted.weight.float().T
    expected = x.float() @ adapted.update.delta().detach().T
    # the mean over all outputs, since each bfloat16 output is rounded
    seen = (adapted(x).float() - F.linear(x, adapted.weight).float()).mean()
    assert abs(seen / expected.mean() - 1) < 0.01
    rounded = (adapted.weight + adapted.update.delta()).bfloat16()
    assert (x.float() @ rounded.float().T - weight_alone).mean() / expected.mean() < 0.5
    assert not adapted.weight.requires_grad and adapted.update.M.dtype == torch.float32


@pytest.mark.parametrize("kind", ("lora", "share", "rotate"))
def test_compiles_without_graph_breaks_and_regroups_without_recompiling(kind):
    adapted = layer(kind, (48, 64, 4), torch.float32)
    torch._dynamo.reset()  # graphs of earlier tests count towards its limit
    compiled, x = torch.compile(adapted, fullgraph=True, backend="aot_eager"), torch.randn(6, 48)
    for cycle in (1, 2):
        mora.start_cycle([("q", adapted)], seed=0, cycle=cycle)
        for parameter in adapted.update.parameters():
            nn.init.normal_(parameter)
        with torch._dynamo.config.patch(error_on_recompile=cycle == 2):
            results = []
            for call in (compiled, adapted):
                inputs = x.clone().requires_grad_()
                y = call(inputs)
                y.square().sum().backward()
                gradients = [p.grad.clone() for p in adapted.update.parameters()]
                results.append((y.detach(), inputs.grad, *gradients))
                adapted.zero_grad()
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_activation_checkpointing_changes_nothing():
    adapted, gradients = layer("share", (48, 64, 4)), []
    x = torch.randn(6, 48, dtype=torch.float64, requires_grad=True)
    for call in (adapted, lambda x: checkpoint(adapted, x, use_reentrant=False)):
        call(x).square().sum().backward()
        gradients.append((x.grad.clone(), adapted.update.M.grad.clone()))
        x.grad = None
        adapted.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# ------------------------------------------------------------
# second derivatives and torch.func

VARIANTS = {"lora": {"method": "lora"}, "share": {}, "dora": {"method": "lora", "dora": True},
            "rotate": {"operator": "rotate", "groups": "permute"}}


def small_network(variant):
    """Two adapted layers and {name: parameter} of the updates, all random."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()
    mora.adapt(model, targets=("0", "2"), rank=2, cycle=1, **VARIANTS[variant])
    parameters = dict(mora.adapter_parameters(model))
    for parameter in parameters.values():
        nn.init.normal_(parameter, std=0.3)
    return model, parameters


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_second_derivative_of_the_merged_product_is_refused(variant):
    model, parameters = small_network(variant)
    loss, inputs = model(torch.randn(5, 8).double()).square().sum(), list(parameters.values())
    with pytest.raises(RuntimeError, match="once.*create_graph=True .*set layer.merges"):
        torch.autograd.grad(loss, inputs, create_graph=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_paths_have_second_derivatives(variant):
    model, parameters = small_network(variant)
    for _, adapted in mora.adapted_layers(model):
        adapted.merges = False
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    if variant == "dora":  # its norm has no gradient, by definition: x alone
        assert torch.autograd.gradgradcheck(model, (x,))
        return

    def output(x, *values):
        return functional_call(model, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradgradcheck(output, (x, *parameters.values()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_torch_func_grad_and_vmap_work(variant):
    model, parameters = small_network(variant)
    x = torch.randn(5, 8).double()
    expected = torch.autograd.grad(model(x).square().sum(), list(parameters.values()))

    def loss(values, x):
        return functional_call(model, values, (x,)).square().sum()

    values = {name: parameter.detach() for name, parameter in parameters.items()}
    whole = grad(loss)(values, x)
    by_sample = vmap(grad(loss), in_dims=(None, 0))(values, x)
    for name, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(whole[name], gradient)
        torch.testing.assert_close(by_sample[name].sum(0), gradient)
    torch.testing.assert_close(vmap(model)(x), model(x))


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_that_functional_call_replaced_are_refused(variant):
    """The backward would read the module's own ones."""
    model, parameters = small_network(variant)
    values = {name: (parameter * 2).detach().requires_grad_()
              for name, parameter in parameters.items()}
    loss = functional_call(model, values, (torch.randn(5, 8).double(),)).sum()
    with pytest.raises(RuntimeError, match="own parameters.*functional_call set layer.merges"):
        loss.backward()


@pytest.mark.parametrize("dora", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_trains_beside_its_update_gets_its_gradient(kind, dora):
    """As after model.requires_grad_(True): the merged product would leave W as it is."""
    adapted, x = layer(kind, (12, 20, 2), dora=dora), torch.randn(3, 12, dtype=torch.float64)
    weight = adapted.merged().detach().requires_grad_()
    F.linear(x, weight, adapted.bias).square().sum().backward()
    expected = weight.grad
    if dora:  # the rows of W + dW are scaled, and their lengths count as constants
        scale = adapted.update.magnitude / adapted.update.merged().norm(dim=1)
        expected = expected * scale[:, None]
    frozen, _ = both_ways(adapted, x)
    adapted.requires_grad_(True)
    trained, _ = both_ways(adapted, x)
    for a, b in zip(trained, frozen, strict=True):
        torch.testing.assert_close(a, b)
    adapted.merges = True
    adapted(x).square().sum().backward()
    torch.testing.assert_close(adapted.weight.grad, expected)


@pytest.mark.parametrize("dora", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_that_are_plain_tensors_in_forward_get_their_gradients(kind, dora):
    """DataParallel, which the Trainer takes for several GPUs without torchrun, and FSDP 1."""
    adapted, x = layer(kind, (12, 20, 2), dora=dora), torch.randn(3, 12, dtype=torch.float64)
    adapted(x).sum().backward()
    expected = [parameter.grad.clone() for parameter in adapted.update.parameters()]
    adapted.zero_grad()
    modules = [*adapted.modules()]  # as torch.nn.parallel.replicate
    copies = {module: module._replicate_for_data_parallel() for module in modules}
    for module, copied in copies.items():
        for name, child in module.named_children():
            setattr(copied, name, copies[child])
        for name, parameter in module.named_parameters(recurse=False):
            setattr(copied, name, parameter * 1 if parameter.requires_grad else parameter.detach())
    copies[adapted](x).sum().backward()
    for parameter, gradient in zip(adapted.update.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_dropout_acts_on_the_updates_input():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    mora.adapt(model, targets=("0", "1"), rank=1, dropout=0.5)
    nn.init.normal_(model[0].update.M)
    x = torch.randn(64, 8)
    assert not torch.equal(model(x), model(x))


def test_a_bfloat16_step_makes_dW_from_bfloat16_operands():
    """LoRA's B A takes longest in float32, and W + dW is rounded to bfloat16 anyway."""
    adapted = layer("lora", (64, 48, 4), torch.float32, bias=False)
    A, B = adapted.update.A.detach(), adapted.update.B.detach()
    x = torch.randn(30, 64).bfloat16()
    y = adapted(x)
    with torch.no_grad():  # reentrant checkpointing: its loss must be that of its gradients
        assert torch.equal(adapted(x), y)
    delta = B.bfloat16() @ A.bfloat16() * adapted.update.scale
    assert torch.equal(y, F.linear(x, (adapted.weight + delta).bfloat16()))
    exact = x.double() @ adapted.merged().double().T
    adapted.merges = False
    assert (y - exact).norm() < 1.2 * (adapted(x) - exact).norm() < 6e-3 * exact.norm()


def test_an_update_that_changes_inside_autocast_is_seen_at_once():
    """autocast's cache of rounded parameters, which lives as long as its block, is not used."""
    adapted, x = layer("lora", (64, 48, 4), torch.float32), torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        before = adapted(x)
        adapted.update.B.data *= 2
        after = adapted(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adapted(x), after) and not torch.equal(before, after)


def test_autocast_rounds_no_weight_that_is_merged():
    adapted = layer("lora", (64, 48, 4), torch.float32, bias=False)
    adapted.weight.data.normal_()
    exact, changes = adapted.merged(), []
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adapted.merged(), exact)
        changes.append(adapted.merge_())
    assert torch.equal(adapted.weight, exact)
    assert changes[0] == adapted.update.delta().square().sum()


def test_rows_are_held_in_registers():
    """By the installed torch, which must call the method as ours expects; other reductions stay."""
    from sympy import Integer
    from torch._inductor.choices import InductorChoices
    from torch._inductor.sizevars import SizeVarAllocator
    from torch._inductor.virtualized import V
    hints = torch._inductor.runtime.hints.ReductionHint
    sizes = SimpleNamespace(sizevars=SizeVarAllocator())

    def held(choices, hint, length):
        features = SimpleNamespace(get_reduction_hint=lambda: hint, reduction_numel=Integer(length))
        with V.set_graph_handler(sizes):
            return choices.should_use_persistent_reduction(features, False)

    ours = kernel_choices()
    for length in (64, 1024, 5504, 16384, 16385):
        assert held(InductorChoices, hints.INNER, length) == (length <= 1024)
        assert held(ours, hints.INNER, length) == (length <= 16384)
        assert held(ours, hints.OUTER, length) == held(InductorChoices, hints.OUTER, length)
