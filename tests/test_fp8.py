"""FP8 products: accuracy, gradients, weights that outgrow their scale, resume, compilation."""
import copy
import json
import shutil

import pytest
import torch
from conftest import finish
from safetensors.torch import load_file, save_file
from test_train import records, same
from torch.nn import functional as F

import checkpoint
import merge
import mora
from config import UserError
from model import (
    Float8Products,
    Llama,
    LlamaConfig,
    block_linears,
    fit_scales,
    fp8_scales,
    keep_in_fp8,
    use_fp8,
)

METHODS = {"full": {}, "lora": {"method": "lora"},
           "mora": {"operator": "rotate", "groups": "permute"}}
FP8_RUN = ["--matmul=fp8", "--hidden_size=32", "--intermediate_size=48", "--lr=3e-2",
           "--groups=permute", "--restart_every=7", "--batch_size=2", "--micro_batch=2"]


def llama(method="full", intermediate_size=48, **options):
    """A model of two blocks; its update, if there is one, is not zero."""
    cfg = LlamaConfig(vocab_size=65, hidden_size=32, intermediate_size=intermediate_size,
                      num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    model = Llama(cfg, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim == 2 else 1)
        if method != "full":
            mora.adapt(model, rank=4, train_rest=True, **METHODS[method], **options)
            for _, parameter in mora.adapter_parameters(model):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def ids_and_targets():
    ids = torch.randint(65, (2, 17), generator=torch.Generator().manual_seed(2))
    return ids[:, :-1], ids[:, 1:]


def loss_and_gradients(model):
    """(loss, {name: gradient})."""
    model.zero_grad()
    loss = model(*ids_and_targets())
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()
                 if p.grad is not None}
    return loss.detach(), gradients


def full_weight(layer):
    """The matrix that a layer multiplies by."""
    return layer.merged() if isinstance(layer, mora.AdaptedLinear) else layer.weight


def relative_error(value, exact):
    return ((value - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_product_is_accurate(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 64, generator=generator)
    x *= torch.logspace(-3, 3, 5)[:, None]  # a scale per token: small tokens lose nothing
    weight = 0.02 * torch.randn(48, 64, generator=generator)
    products = Float8Products(torch.tensor(2.0 ** -9))
    y = products.y(x.to(dtype), weight)
    exact = x @ weight.T
    assert y.shape == (3, 5, 48) and y.dtype == dtype
    for token in range(5):
        assert relative_error(y[:, token].float(), exact[:, token]) < 0.05
    assert relative_error(y.float(), exact) > 1e-3  # the product is not a float32 one


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_close_to_float32(method):
    model = llama(method)
    loss, exact = loss_and_gradients(model)
    use_fp8(model)
    assert len(fp8_scales(model)) == len(block_linears(model)) == 14
    rounded_loss, rounded = loss_and_gradients(model)
    assert rounded_loss == pytest.approx(loss.item(), rel=1e-2) and rounded_loss != loss
    assert rounded.keys() == exact.keys()
    assert any("_proj" in name for name in exact)
    for name in exact:
        assert rounded[name].dtype == exact[name].dtype
        assert relative_error(rounded[name], exact[name]) < 0.2, name
    together = [torch.cat([gradients[name].flatten() for name in exact if "_proj" in name])
                for gradients in (rounded, exact)]
    assert relative_error(*together) < 0.1


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_that_outgrows_its_scale_is_not_clipped(method):
    model = llama(method)
    use_fp8(model)
    name = list(fp8_scales(model))[3]
    layer, before = block_linears(model)[name], copy.deepcopy(fp8_scales(model))
    with torch.no_grad():
        layer.weight.mul_(100)
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(3))
    assert layer(x).isnan().any() and model(*ids_and_targets()).isnan()
    fit_scales(model, only_if_tight=True)
    after = copy.deepcopy(fp8_scales(model))
    assert [key for key in before if after[key] != before[key]] == [name]
    assert relative_error(layer(x), F.linear(x, full_weight(layer))) < 0.05
    assert model(*ids_and_targets()).isfinite()
    for only_if_tight in (True, False):
        fit_scales(model, only_if_tight)
        assert fp8_scales(model) == after


def test_a_scale_is_renewed_before_it_overflows():
    """A scale that was just set leaves room for a growth of 32 to 64, and is renewed below 4."""
    for factor, renewed in ((7.9, 0), (31.9, 14)):
        model = llama()
        use_fp8(model)
        with torch.no_grad():
            for layer in block_linears(model).values():
                layer.weight.mul_(factor)
        assert model(*ids_and_targets()).isfinite()
        before = copy.deepcopy(fp8_scales(model))
        fit_scales(model, only_if_tight=True)
        assert sum(scale != before[key] for key, scale in fp8_scales(model).items()) == renewed


def test_scales_with_less_room_than_4_are_renewed_and_no_others():
    model = llama()
    use_fp8(model)
    with torch.no_grad():
        for layer in block_linears(model).values():
            layer.weight.mul_(12)
    before = copy.deepcopy(fp8_scales(model))
    rooms = {name: 448 * before[name] / layer.weight.abs().max()
             for name, layer in block_linears(model).items()}
    fit_scales(model, only_if_tight=True)
    renewed = [name for name, scale in fp8_scales(model).items() if scale != before[name]]
    assert renewed == [name for name, room in rooms.items() if room < 4]
    assert 0 < len(renewed) < 14 and min(rooms.values()) > 2


@pytest.mark.parametrize("method", METHODS)
def test_an_evaluation_is_not_in_fp8(method):
    model = llama(method)
    with torch.no_grad():
        exact = model(*ids_and_targets())
        use_fp8(model)
        assert torch.equal(model(*ids_and_targets()), exact)
    assert model(*ids_and_targets()) != exact


@pytest.mark.parametrize("method", METHODS)
def test_a_scale_is_a_power_of_two_with_room_for_the_merged_weight(method):
    """Of W + dW, here a dW that is far larger than W."""
    model = llama(method)
    with torch.no_grad():
        for _, parameter in mora.adapter_parameters(model):
            parameter.mul_(30)
    use_fp8(model)
    for name, scale in fp8_scales(model).items():
        entry = full_weight(block_linears(model)[name]).abs().max()
        assert 32 <= 448 * scale / entry < 64 and torch.frexp(scale).mantissa == 0.5, name


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_a_weight_that_is_not_finite_keeps_its_scale(bad):
    """The run's own error names the step; a new scale would end it earlier, without a word."""
    model = llama()
    use_fp8(model)
    before = copy.deepcopy(fp8_scales(model))
    layers = block_linears(model)
    with torch.no_grad():
        layers["0.mlp.up_proj"].weight[3, 5] = bad
        layers["1.mlp.up_proj"].weight.mul_(100)
    fit_scales(model, only_if_tight=True)
    changed = [name for name, scale in fp8_scales(model).items() if scale != before[name]]
    assert changed == ["1.mlp.up_proj"]


def test_a_weight_of_zeros_can_grow():
    """Some begin from zero blocks: the first step's change must fit."""
    model = llama()
    with torch.no_grad():
        for layer in block_linears(model).values():
            layer.weight.zero_()
    use_fp8(model)
    with torch.no_grad():
        for layer in block_linears(model).values():
            layer.weight.fill_(0.3)
    assert model(*ids_and_targets()).isfinite()


def test_8_bits_are_not_merged():
    model = llama("lora")
    keep_in_fp8(model)
    for merging in (mora.merge, mora.merged_weights):
        with pytest.raises(RuntimeError, match="merge.py adds it to the original"):
            merging(model)


def test_only_sizes_of_multiples_of_16_are_converted():
    model = llama("mora", intermediate_size=40)
    use_fp8(model)
    names = {name.rpartition(".")[2] for name in fp8_scales(model)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert len(block_linears(model)) == 14 and len(fp8_scales(model)) == 8
    loss, gradients = loss_and_gradients(model)
    assert loss.isfinite() and len(gradients) == 14 + 7


def resumed(run, whole, name, words=FP8_RUN, **changes):
    """The folder of a copy of a run that lost its checkpoints after step 10 and was resumed.
    changes: of the state.json that it resumes from."""
    out = shutil.copytree(whole, whole.with_name(name))
    for step in checkpoint.steps_of(out)[1:]:
        shutil.rmtree(step)
    file = checkpoint.steps_of(out)[0] / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    run(*words, f"--out={out}", "--resume")
    return out


def test_resume_is_bitwise_identical(run):
    whole = run(*FP8_RUN)
    out = resumed(run, whole, "parts")
    last = "step-00000020"
    assert same(whole / last, out / last) and records(whole) == records(out)
    saved = [json.loads((folder / last / "state.json").read_text())["fp8_scales"]
             for folder in (whole, out)]
    assert len(saved[0]) == 14 and saved[0] == saved[1]
    others = {name: 1.5 * scale for name, scale in saved[0].items()}
    other = resumed(run, whole, "other_scales", fp8_scales=others)
    assert not same(whole / last, other / last)


def test_two_processes_and_checkpointed_blocks_change_little(run, group, tmp_path):
    """A row of x has one scale, so the split of a batch changes no product, only orders of sums."""
    words = [*FP8_RUN, "--steps=10"]
    run(*words, f"--out={tmp_path / 'one'}")
    run(*words, f"--out={tmp_path / 'blocks'}", "--checkpoint_blocks")
    assert finish(group(2, *words, "--micro_batch=1", f"--out={tmp_path / 'two'}"))[0] == [0, 0]
    one, blocks, two = (records(tmp_path / name) for name in ("one", "blocks", "two"))
    assert one == blocks
    assert one == pytest.approx(two, rel=2e-3)


GROWING = ["--hidden_size=32", "--intermediate_size=48", "--method=full", "--optimizer=muon",
           "--lr=1", "--rest_lr=1e-3", "--warmup=20", "--log_every=20", "--eval_every=20",
           "--save_every=20"]


def test_scales_are_renewed_between_the_lines_of_the_log(run):
    """Weights that grow fiftyfold before the first line: 20 steps that nobody reads."""
    run("--matmul=fp8", *GROWING)


def test_a_run_without_fp8_goes_on_with_it(run):
    """The scales are those of the weights it has now, not of its first ones."""
    out = run(*GROWING)
    run(*GROWING, "--matmul=fp8", "--steps=22", f"--out={out}", "--resume")


def test_compiled_code_is_the_same_and_not_compiled_again():
    model = llama("mora", targets=("q_proj", "down_proj"))  # the other layers are Float8Linear
    use_fp8(model)
    compiled = copy.deepcopy(model)
    torch._dynamo.reset()
    for block in compiled.model.layers:
        block.compile(backend="aot_eager", fullgraph=True)

    def assert_same():
        (a, plain), (b, fast) = loss_and_gradients(model), loss_and_gradients(compiled)
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-6)
        return a

    first = assert_same()
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for each in (model, compiled):
            for layer in block_linears(each).values():
                layer.weight.mul_(20)
            mora.start_cycle(mora.adapted_layers(each), seed=0, cycle=1)
            before = copy.deepcopy(fp8_scales(each))
            fit_scales(each, only_if_tight=True)
            assert not any(scale == before[key] for key, scale in fp8_scales(each).items())
        with torch.enable_grad():
            second = assert_same()
    torch._dynamo.reset()
    assert second.isfinite() and second != first


FLOAT8_BASE = ["--hidden_size=32", "--intermediate_size=48", "--operator=rotate",
               "--train_rest=false", "--base_dtype=float8"]


def test_a_float8_base_resumes_and_merges_into_its_original(
        run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("--hidden_size=32", "--intermediate_size=48", "--method=full", "--steps=2", "--out=first")
    base = tmp_path / "first" / "step-00000002" / "base"
    words = [*FLOAT8_BASE, "--init_from=first/step-00000002/base"]  # found from other folders, too
    whole = run(*words)
    out = resumed(run, whole, "parts", words)
    last = "step-00000020"
    assert same(whole / last, out / last) and records(whole) == records(out)

    exact = checkpoint.read_hugging_face(base)[0]
    adapted = checkpoint.load(whole)[0]
    for name, layer in mora.adapted_layers(adapted):
        assert torch.equal(layer.weight, exact.get_submodule(name).weight)
        assert layer.update.M.abs().max() > 0
    merge.main([str(whole)])
    assert f"added to the weights of {base}" in capsys.readouterr().out
    merged = checkpoint.load(whole / "merged")[0]
    for name, weight in mora.merge(adapted).state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], weight)

    others = {name: 2 * weight for name, weight in load_file(base / "model.safetensors").items()}
    save_file(others, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="model.safetensors has changed since it was saved"):
        run(*words, f"--out={out}", "--resume")


def test_a_float8_base_may_hold_the_run_and_files_that_change(run, tmp_path):
    words = ["--hidden_size=32", "--intermediate_size=48", "--steps=1"]
    first = run(*words, "--method=full", f"--out={tmp_path / 'first'}")
    with pytest.raises(UserError, match=f"init_from a Hugging Face directory, got '{first}'"):
        run(*FLOAT8_BASE, *words, f"--init_from={first}")  # its config.json is that of a run

    base = shutil.copytree(first / "step-00000001" / "base", tmp_path / "base")
    (base / "README.md").write_text("one")
    out = run(*FLOAT8_BASE, *words, f"--init_from={base}", f"--out={base / 'run'}")
    (base / "README.md").write_text("two")
    run(*FLOAT8_BASE, *words, f"--init_from={base}", f"--out={out}", "--resume", "--steps=2")
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=f"No such file or directory: '{base / 'config.json'}'"):
        checkpoint.load(moved / "run")


def test_two_processes_with_a_float8_base_equal_one(run, group, tmp_path):
    """Its weights are equal on all ranks: gloo cannot broadcast them."""
    base = run("--hidden_size=32", "--intermediate_size=48", "--method=full", "--steps=1",
               f"--out={tmp_path / 'first'}") / "step-00000001" / "base"
    words = [*FLOAT8_BASE, f"--init_from={base}", "--steps=10"]
    one, two = run(*words), tmp_path / "two"
    ended = finish(group(2, *words, f"--out={two}"))
    assert ended[0] == [0, 0], ended
    assert records(two) == pytest.approx(records(one), rel=2e-3)


def test_only_adapted_weights_are_kept_in_float8():
    model = llama("mora", targets=("q_proj", "up_proj"))
    keep_in_fp8(model)
    for name, layer in block_linears(model).items():
        is_adapted = name.endswith(("q_proj", "up_proj"))
        assert layer.weight.dtype == (torch.float8_e4m3fn if is_adapted else torch.float32), name
        assert (layer.products is not None) == is_adapted


def test_a_base_in_float8_computes_what_its_rounded_weights_say():
    model = llama("mora")
    keep_in_fp8(model)
    exact = copy.deepcopy(model)
    for layer in block_linears(exact).values():
        assert layer.weight.dtype == torch.float8_e4m3fn
        layer.weight.data = layer.weight.float() * layer.products.scale.T
        layer.products = None
    (loss, gradients), (other, others) = loss_and_gradients(model), loss_and_gradients(exact)
    assert abs(loss - other) < 0.05
    for name, gradient in others.items():
        if ".update." in name:
            assert relative_error(gradients[name], gradient) < 0.15, name
