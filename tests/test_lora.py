"""The variants of LoRA: what each changes, and that the merged product computes it."""
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import mora
from lora import LowRank

VARIANTS = {
    "rslora": dict(method="lora", alpha=3.0, rslora=True, lora_A="orthogonal"),
    "frozen A": dict(method="lora", alpha=3.0, lora_A="frozen"),
    "dora": dict(method="lora", alpha=3.0, dora=True),
    "dora, share": dict(operator="share", groups="permute", dora=True),
    "dora, rotate": dict(operator="rotate", dora=True),
}
SHAPES = [(70, 50, 4), (50, 130, 3), (33, 33, 2)]


def layer(variant, shape, dtype=torch.float64):
    """One adapted layer with a bias; random numbers in everything that trains."""
    torch.manual_seed(0)
    k, d, rank = shape
    model = nn.ModuleDict({"q": nn.Linear(k, d, dtype=dtype)})
    adapted = mora.adapt(model, rank=rank, targets=("q",), cycle=1, **VARIANTS[variant])["q"]
    for parameter in trained(adapted):
        nn.init.normal_(parameter)
    return adapted


def trained(adapted):
    return [p for p in adapted.parameters() if p.requires_grad]


def results(adapted, x, merges=True):
    """[output, dx, gradients of all that trains]"""
    adapted.merges, x = merges, x.detach().requires_grad_()
    adapted.zero_grad()
    y = adapted(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in trained(adapted))]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fast_linear_matches_two_paths(variant, shape):
    adapted, x = layer(variant, shape), torch.randn(3, 4, shape[0], dtype=torch.float64)
    merged = results(adapted, x)
    for a, b in zip(merged, results(adapted, x, merges=False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(adapted(x), merged[0])
        y = F.linear(x, adapted.weight + adapted.update.delta(), adapted.bias)
        torch.testing.assert_close(y, merged[0])


@pytest.mark.parametrize("update", ("dora", "dora, share", "dora, rotate"))
def test_dora_is_its_definition(update):
    """diag(m / ||W + dW||) (W + dW) x + b, row by row, and no gradient through the norm."""
    adapted, x = layer(update, (33, 20, 2)), torch.randn(5, 33, dtype=torch.float64)
    whole = adapted.weight + adapted.update.inner.delta()
    norms = torch.stack([row.square().sum().sqrt() for row in whole]).detach()
    columns = [x @ row * m / norm
               for row, m, norm in zip(whole, adapted.update.magnitude, norms, strict=True)]
    expected = torch.stack(columns, dim=1) + adapted.bias
    wanted = torch.autograd.grad(expected.square().sum(), trained(adapted))
    y, _, *gradients = results(adapted, x)
    torch.testing.assert_close(y, expected.detach(), rtol=1e-10, atol=1e-10)
    for a, b in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-9)


def test_dora_in_bfloat16_lets_small_changes_of_the_magnitude_through():
    adapted, x = layer("dora", (64, 64, 4), torch.float32), torch.randn(2000, 64).bfloat16()
    mora.start_cycle([("q", adapted)], seed=0, cycle=1)
    adapted.bias.data.zero_()
    before = adapted(x).detach().float()
    adapted.update.magnitude.data *= 1 + 1e-3  # bfloat16 has no number between 1 and 1.0078
    seen = ((adapted(x).detach().float() - before) * before).sum() / before.square().sum()
    assert float(seen) == pytest.approx(1e-3, rel=0.1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_in_bfloat16_gradients_are_float32_and_close_outputs_bfloat16(variant):
    adapted, x = layer(variant, (64, 48, 4), torch.float32), torch.randn(200, 64)
    exact = results(adapted, x)[2:]
    for merges in (True, False):
        y, _, *rounded = results(adapted, x.bfloat16(), merges)
        assert y.dtype == torch.bfloat16
        for gradient, wanted in zip(rounded, exact, strict=True):
            assert gradient.dtype == torch.float32
            assert (gradient - wanted).norm() < 0.03 * wanted.norm()


def test_dora_measures_the_rows_of_a_bfloat16_weight_in_float32():
    """Also inside autocast, where B A is a product in bfloat16."""
    model = nn.ModuleDict({"q": nn.Linear(64, 48, dtype=torch.bfloat16)})
    update = mora.adapt(model, "lora", rank=2, dora=True, targets=("q",))["q"].update
    assert not update.delta().any()  # m is not rounded
    nn.init.normal_(update.inner.B)
    exact = update.merged()
    with torch.autocast("cpu", torch.bfloat16):
        assert update.merged().dtype == exact.dtype == torch.float32


def test_dora_of_a_row_of_zeros_is_a_row_of_zeros():
    model = nn.ModuleDict({"q": nn.Linear(6, 4, bias=False)})
    model["q"].weight.data[1] = 0
    adapted = mora.adapt(model, "lora", rank=2, dora=True, targets=("q",))["q"]
    y, *gradients = results(adapted, torch.randn(3, 6))
    assert (y[:, 1] == 0).all() and y.abs().sum() > 0
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_dora_restarts_even_with_a_negative_magnitude():
    adapted, x = layer("dora", (33, 20, 2)), torch.randn(5, 33, dtype=torch.float64)
    assert (adapted.update.magnitude < 0).any()
    before = adapted(x)
    adapted.merge_()
    mora.start_cycle([("q", adapted)], seed=0, cycle=2)
    torch.testing.assert_close(adapted(x), before)


@pytest.mark.parametrize("variant", ("dora, share", "frozen A"))
def test_compiles_without_graph_breaks(variant):
    adapted, x = layer(variant, (48, 64, 4), torch.float32), torch.randn(6, 48)
    torch._dynamo.reset()  # graphs of earlier tests count towards its limit
    compiled = torch.compile(adapted, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(adapted, x), results(compiled, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_a_frozen_A_is_no_trained_parameter():
    parameters = dict(mora.adapter_parameters(nn.ModuleDict({"q": layer("frozen A", (64, 96, 4))})))
    assert parameters["q.update.B"].requires_grad and not parameters["q.update.A"].requires_grad


def test_with_a_frozen_A_the_backward_saves_A_x_and_not_x():
    x = torch.randn(1000, 64, dtype=torch.float64, requires_grad=True)
    adapted, saved = layer("frozen A", (64, 96, 4)), []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adapted(x)
    assert sum(tensor.numel() for tensor in saved if 1000 in tensor.shape) == 1000 * 4


def adapter_of(step):
    return load_file(step / "adapter" / "adapter_model.safetensors")


def base_of(step):
    return load_file(step / "base" / "model.safetensors")


def test_a_frozen_A_stays_in_float32_on_a_bfloat16_base(run):
    options = ["--method=lora", "--lora_A=frozen", "--base_dtype=bfloat16", "--steps=1"]
    step = run(*options) / "step-00000001"
    assert {tensor.dtype for tensor in adapter_of(step).values()} == {torch.float32}
    assert base_of(step)["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("rank, width", [(4, 30), (30, 4), (5, 5)])
def test_an_orthogonal_A_is_orthonormal_and_drawn_by_cycle(rank, width):
    A = []
    for cycle in (0, 0, 1):
        update = LowRank(width, 7, rank, lora_A="orthogonal")
        layers = [("layer", mora.AdaptedLinear(nn.Linear(width, 7).double(), update))]
        mora.start_cycle(layers, seed=0, cycle=cycle)
        A.append(update.A.detach())
    product = A[0] @ A[0].T if rank <= width else A[0].T @ A[0]
    torch.testing.assert_close(product, torch.eye(min(rank, width), dtype=torch.float64))
    assert torch.equal(A[0], A[1]) and not torch.equal(A[0], A[2]) and update.A.requires_grad


SCALES = [({}, 1), ({"alpha": 8.0}, 2), ({"alpha": 8.0, "rslora": True}, 4)]


@pytest.mark.parametrize("options, scale", SCALES, ids=str)
def test_scales(options, scale):
    update = LowRank(6, 5, rank=4, **options)
    nn.init.normal_(update.A), nn.init.normal_(update.B)
    torch.testing.assert_close(update.delta(), scale * update.B @ update.A)


def test_lora_plus_moves_B_so_many_times_as_far(run):
    """After one step of Adam: the rate times the sign of the gradient. A stays, since B = 0."""
    options = ["--method=lora", "--train_rest=false", "--steps=1"]
    plain = run(*options)
    plus = run(*options, "--lora_plus_ratio=4", f"--out={plain.with_name('plus')}")
    plain, plus = adapter_of(plain / "step-00000001"), adapter_of(plus / "step-00000001")
    for name in plain:
        torch.testing.assert_close(plus[name], plain[name] * (4 if "lora_B" in name else 1))


def test_full_rank_training_from_an_adapted_run_trains_what_was_frozen(run):
    first = run("--method=lora", "--train_rest=false", "--steps=2")
    out = f"--out={first.with_name('full')}"
    second = run(f"--init_from={first}", out, "--method=full", "--steps=2")
    before, after = base_of(first / "step-00000002"), base_of(second / "step-00000002")
    assert not any(torch.equal(before[name], after[name]) for name in before)
