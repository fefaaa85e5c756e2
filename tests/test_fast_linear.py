"""The merged forward and its structured backward are the two paths, value and gradients."""
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mora
from test_mora import OPERATORS, SHAPES

KINDS = ("lora",) + OPERATORS


def layer(kind, shape, dtype=torch.float64, groups="permute", bias=True):
    k, d, rank = shape
    linear = nn.Linear(k, d, bias=bias, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"method": "lora", "alpha": 3.0} if kind == "lora" else {"operator": kind, "groups": groups}
        adapted = mora.adapt(nn.ModuleDict({"q": linear}), rank=rank, targets=("q",), cycle=1, **options)["q"]
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fast_linear_matches_two_paths(kind, shape):
    merged, paths = both_ways(layer(kind, shape), torch.randn(3, 4, shape[0], dtype=torch.float64))
    for a, b in zip(merged, paths):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(9, 7, 1), (5, 12, 1), (12, 5, 1)], ids=str)
def test_gradcheck(kind, shape):
    adapted = layer(kind, shape)
    parameters = tuple(adapted.update.parameters())
    x = torch.randn(2, 3, shape[0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *p: mora.MergedLinear.apply(x, adapted.weight, adapted.update, mora.Products, *p), (x, *parameters))


@pytest.mark.parametrize("kind", KINDS)
def test_x_is_not_saved(kind):
    """MoRA keeps r^ numbers a block and token, and the merged weight; LoRA's gradient needs x itself."""
    adapted, saved = layer(kind, (64, 96, 4), torch.float32), []
    x = torch.randn(1000, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        adapted(x)
    if kind != "lora":  # the hook sees storages: x's own, or a copy as large, would be here
        assert all(t.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for t in saved)
    kept = sum(t.numel() for t in saved if 1000 in t.shape or t.numel() > 64 * 96 * 2)
    width = 64 if kind == "lora" else adapted.update.fold_in.blocks * (adapted.update.M.shape[0] + 7)
    assert kept <= 1000 * width and (kind == "lora" or kind in ("decouple", "rotate") or kept < 1000 * 64)


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
    assert y.dtype == torch.bfloat16 and x.grad.dtype == x.dtype and all(p.grad.dtype == torch.float32 for p in adapted.update.parameters())
    for a, b in zip(exact, (y, x.grad, *(p.grad for p in adapted.update.parameters()))):
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
    expected = x.float() @ adapted.delta().detach().T
    # what the layer adds, told apart from the rounding of its bfloat16 output by averaging over all outputs
    seen = (adapted(x).float() - F.linear(x, adapted.weight).float()).mean()
    assert abs(seen / expected.mean() - 1) < 0.01
    rounded = (adapted.weight + adapted.delta()).bfloat16()
    assert (x.float() @ rounded.float().T - weight_alone).mean() / expected.mean() < 0.5
    assert not adapted.weight.requires_grad and adapted.update.M.dtype == torch.float32


@pytest.mark.parametrize("kind", ("lora", "share", "rotate"))
def test_compiles_without_graph_breaks_and_regroups_without_recompiling(kind):
    adapted = layer(kind, (48, 64, 4), torch.float32)
    compiled, x = torch.compile(adapted, fullgraph=True, backend="aot_eager"), torch.randn(6, 48)
    for cycle in (1, 2):
        adapted.update.start(cycle, mora.generator(0, cycle, "q"), mora.generator(0, cycle, "in"))
        for parameter in adapted.update.parameters():
            nn.init.normal_(parameter)
        with torch._dynamo.config.patch(error_on_recompile=cycle == 2):
            results = []
            for call in (compiled, adapted):
                inputs = x.clone().requires_grad_()
                y = call(inputs)
                y.square().sum().backward()
                results.append((y.detach(), inputs.grad, *(p.grad.clone() for p in adapted.update.parameters())))
                adapted.zero_grad()
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_activation_checkpointing_changes_nothing():
    from torch.utils.checkpoint import checkpoint
    adapted, x = layer("share", (48, 64, 4)), torch.randn(6, 48, dtype=torch.float64, requires_grad=True)
    gradients = []
    for call in (adapted, lambda x: checkpoint(adapted, x, use_reentrant=False)):
        call(x).square().sum().backward()
        gradients.append((x.grad.clone(), adapted.update.M.grad.clone()))
        x.grad = None
        adapted.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_dropout_takes_two_paths_and_says_so_once():
    with pytest.warns(UserWarning, match="two paths") as caught:
        model = mora.adapt(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), targets=("0", "1"), rank=1, dropout=0.5)
    assert len(caught) == 1
    nn.init.normal_(model[0].update.M)
    x = torch.randn(64, 8)
    assert not torch.equal(model(x), model(x))
