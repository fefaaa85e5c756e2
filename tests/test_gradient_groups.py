"""Groups that the gradient chooses: they hold its energy, and a file's are taken as they are."""
import copy
import json
import runpy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import finish
from safetensors.torch import load_file, save_file
from test_mora import NORMS, small_model
from test_train import records
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import adapters
import checkpoint
import merge
import mora
import train
from batches import Batches, SampleBatches
from config import Config, UserError
from model import Llama, LlamaConfig
from shards import open_split

transformers = pytest.importorskip("transformers")
ROOT = Path(mora.__file__).parent
SHAPE = LlamaConfig(61, 32, 56, 2, 4, 2)


def llama():
    """Features of unequal importance, as pretraining makes them."""
    model, generator = Llama(SHAPE, seed=0), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.normal_(generator=generator).exp_()
    return model


def losses(model, seed, count=4):
    """Of batches of which some tokens are frequent; drawn one after another."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        ids = (61 * torch.rand(4, 17, generator=generator) ** 3).long()
        yield model(ids[:, :-1], ids[:, 1:])


def gradients_of(model, seed):
    """{name: gradient of the weight} of the projections."""
    sum(losses(model, seed)).backward()
    return {name: linear.weight.grad for name, linear in mora.find_linears(model).items()
            if name.rpartition(".")[2] in mora.PROJECTIONS}


def held_energy(groups, held_out, rank=8):
    """The part of the gradient's energy in the space of the updates of truncate."""
    model, inside = llama(), 0.0
    gradients = mora.gradient_norms(model, losses(model, 0)) if groups == "gradient" else None
    mora.adapt(model, rank=rank, operator="truncate", groups=groups, gradients=gradients)
    for name, layer in mora.adapted_layers(model):
        fold_in, fold_out = layer.update.fold_in, layer.update.fold_out
        inside += fold_out(fold_in(held_out[name])[:, 0].T).square().sum()
    return float(inside / sum(gradient.square().sum() for gradient in held_out.values()))


def test_more_of_the_gradient_of_other_batches_is_in_reach():
    held_out = gradients_of(llama(), seed=1)
    shares = {groups: held_energy(groups, held_out, rank=4)
              for groups in ("strided", "permute", "gradient")}
    assert shares["gradient"] > 1.5 * max(shares["strided"], shares["permute"]), shares


@pytest.mark.parametrize("operator, groups", [("truncate", "strided"), ("truncate", "gradient"),
                                              ("share", "strided"), ("share", "permute")])
def test_held_is_the_part_of_a_matrix_in_the_space_of_the_updates(operator, groups):
    """continual/held.py against least squares with a basis of the space."""
    held = runpy.run_path(str(ROOT / "results" / "continual" / "held.py"))["held"]
    norms = {"q": (torch.rand(11), torch.rand(17))} if groups == "gradient" else None
    layer = mora.adapt(nn.ModuleDict({"q": nn.Linear(11, 17)}), rank=1, operator=operator,
                       targets=("q",), groups=groups, gradients=norms)["q"]
    basis = []
    for entry in layer.update.M.flatten().new_ones(len(layer.update.M) ** 2).diag():
        layer.update.M.data.copy_(entry.view_as(layer.update.M))
        basis.append(layer.update.delta().detach().flatten())
    matrix = torch.randn(17, 11)
    inside = torch.linalg.qr(torch.stack(basis).T)[0].T @ matrix.flatten()
    expected = inside.square().sum() / matrix.square().sum()
    torch.testing.assert_close(held(layer.update, matrix), expected)
    torch.testing.assert_close(held(layer.update, basis[3].view(17, 11)), torch.tensor(1.0))


def test_held_by_the_best_lora_is_the_part_of_the_largest_singular_values():
    measure = runpy.run_path(str(ROOT / "results" / "continual" / "held.py"))["measure"]
    measure.__globals__["KINDS"] = ()
    half = torch.diag(torch.tensor([2.0] * 8 + [1.0] * 32))
    numbers = measure(None, {}, {"change": {"a": half, "b": torch.eye(40)}})
    assert numbers == {"lora_best_r8.change": (0.5 + 0.2) / 2,
                       "lora_best_r32.change": (56 / 64 + 0.8) / 2}


def test_norms_are_those_of_the_gradient_and_leave_no_trace():
    model, expected = llama(), gradients_of(llama(), seed=0)
    model.model.layers[0].requires_grad_(False)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    flags = [p.requires_grad for p in model.parameters()]
    norms = mora.gradient_norms(model, losses(model, 0))
    assert norms.keys() == expected.keys()
    for name, (columns, rows) in norms.items():
        torch.testing.assert_close(columns, expected[name].norm(dim=0))
        torch.testing.assert_close(rows, expected[name].norm(dim=1))
    assert torch.equal(state, torch.get_rng_state())
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_norms_of_weights_in_bfloat16_are_float32():
    model = llama().bfloat16()
    norms = mora.gradient_norms(model, losses(model, 0))
    assert {part.dtype for pair in norms.values() for part in pair} == {torch.float32}


def test_features_are_in_descending_order():
    model = llama()
    norms = mora.gradient_norms(model, losses(model, 0))
    for name, layer in mora.adapted_layers(mora.adapt(model, groups="gradient", gradients=norms)):
        for fold, sizes in zip((layer.update.fold_in, layer.update.fold_out), norms[name],
                               strict=True):
            order = fold.order.long()
            assert (sizes[order].diff() <= 0).all() and (order.diff() < 0).any()
            assert torch.equal(fold.inverse[order].long(), torch.arange(fold.features))


@pytest.mark.parametrize("operator", ("truncate", "share"))
def test_merged_and_compiled_layers_are_the_layer(operator):
    linear, norms = nn.Linear(24, 40), {"q": (torch.rand(24), torch.rand(40))}
    layer = mora.adapt(nn.ModuleDict({"q": linear}), rank=3, operator=operator, targets=("q",),
                       groups="gradient", gradients=norms)["q"]
    nn.init.normal_(layer.update.M)
    torch._dynamo.reset()  # graphs of earlier tests count towards its limit
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    outcomes, x = [], torch.randn(5, 24)
    for call, merges in ((layer, False), (layer, True), (compiled, True), (compiled, False)):
        layer.merges, x = merges, x.detach().requires_grad_()
        y = call(x)
        outcomes.append((y, *torch.autograd.grad(y.sin().sum(), (x, layer.update.M))))
    with torch.no_grad():
        outcomes.append((layer(x), *outcomes[0][1:]))
        outcomes.append((mora.merge(nn.ModuleDict({"q": layer}))["q"](x), *outcomes[0][1:]))
    for outcome in outcomes[1:]:
        for a, b in zip(outcomes[0], outcome, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options, message", [
    (dict(groups="gradient"), "take gradients of every target: see mora.gradient_norms"),
    (dict(groups="permute", gradients={}), "groups gradient, and no others, take gradients"),
    (dict(groups="gradient", gradients={"up_proj": ()}), "gradients of every target"),
    (dict(groups="gradient", gradients=NORMS | {"up_proj": NORMS["q_proj"]}), "of every target")])
def test_gradients_that_are_missing_or_not_wanted_are_refused(options, message):
    model = small_model()
    with pytest.raises(ValueError, match=message):
        mora.adapt(model, targets=("q_proj", "up_proj"), **options)
    assert not mora.adapted_layers(model)


def test_losses_without_a_finite_gradient_are_refused():
    model = llama()
    with pytest.raises(ValueError, match="no finite gradient"):
        mora.gradient_norms(model, [])
    with pytest.raises(ValueError, match="no finite gradient"):
        mora.gradient_norms(model, (loss * torch.nan for loss in losses(model, 0)))


@pytest.mark.parametrize("groups", ("permute", "gradient"))
def test_torchs_own_ddp_broadcasts_the_order(groups):
    """As the Trainer wraps a model: neither gloo nor NCCL sends 16-bit integers."""
    norms = {"q": (torch.rand(24), torch.rand(40))} if groups == "gradient" else None
    model = mora.adapt(nn.ModuleDict({"q": nn.Linear(24, 40)}), targets=("q",), rank=3,
                       groups=groups, gradients=norms)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        DistributedDataParallel(model["q"])(torch.randn(3, 24)).sum().backward()
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------
# any model: files

def gpt2():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=61, n_embd=32, n_layer=2, n_head=4)).eval()


IDS = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path):
    """(a trained GPT-2, whose weights are transposed, the folder of its update)."""
    model = gpt2()
    both = (model(IDS, labels=IDS).loss for _ in range(2))
    norms = mora.gradient_norms(model, both, "all-linear")
    expected = gpt2()
    expected(IDS, labels=IDS).loss.backward()
    gradient = expected.transformer.h[1].mlp.c_fc.weight.grad.T
    torch.testing.assert_close(norms["transformer.h.1.mlp.c_fc"][1], 2 * gradient.norm(dim=1))
    mora.adapt(model, rank=3, targets="all-linear", groups="gradient", gradients=norms, dora=True)
    for _, layer in mora.adapted_layers(model):
        nn.init.normal_(layer.update.inner.M, std=0.1)
    adapters.save(model, tmp_path)
    return model, tmp_path


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def test_a_file_holds_the_order(saved):
    model, folder = saved
    loaded = adapters.load(gpt2(), folder)
    assert torch.equal(logits(loaded), logits(model))
    assert (logits(model) - logits(gpt2())).abs().max() > 1e-2
    for (_, a), (_, b) in zip(*map(mora.adapted_layers, (model, loaded)), strict=True):
        for fold in ("fold_in", "fold_out"):
            assert torch.equal(getattr(a.update.inner, fold).order,
                               getattr(b.update.inner, fold).order)
    adapters.save(loaded, folder / "again")
    assert adapters.checksum("", load_file(folder / "again/adapter_model.safetensors").values()) \
        == adapters.checksum("", load_file(folder / "adapter_model.safetensors").values())
    empty = mora.adapt(gpt2(), rank=3, targets="all-linear", groups="gradient", gradients={},
                       dora=True)
    empty.load_state_dict(model.state_dict())
    assert torch.equal(logits(empty), logits(model))
    torch.testing.assert_close(logits(mora.merge(loaded)), logits(model), rtol=1e-4, atol=1e-4)


def test_as_lora_is_the_same_function_and_stays_a_lora(saved):
    model, folder = saved
    adapters.as_lora(model, folder / "lora")
    loaded = adapters.load(gpt2(), folder / "lora")
    assert "M" not in dict(loaded.transformer.h[0].attn.c_attn.update.inner.named_parameters())
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


def first_order(tensors):
    return next(name for name in tensors if name.endswith("order_in"))


def drop(tensors):
    del tensors[first_order(tensors)]


def twice(tensors):
    tensors[first_order(tensors)][:2] = 3


def shorter(tensors):
    tensors[first_order(tensors)] = tensors[first_order(tensors)][1:].clone()


WRONG = [(drop, 'c_attn does not fit .* Missing key.*order"'),
         (shorter, "size mismatch for .*order"),
         (twice, "fold_in.order is no permutation of 0 ... 31")]


@pytest.mark.parametrize("change, message", WRONG)
def test_a_file_without_a_true_order_is_refused(saved, change, message):
    _, folder = saved
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(UserError, match=message) as caught:
        adapters.load(gpt2(), folder)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------
# runs

WORDS = ["--groups=gradient", "--operator=truncate", "--steps=12", "--save_every=6"]


def refuse(*args):
    raise AssertionError("a gradient was taken")


def test_a_run_uses_the_order_of_its_checkpoint(run, monkeypatch, tmp_path):
    """Resumed, merged and loaded; without the order, it is refused."""
    out = run(*WORDS)
    model, _, step = checkpoint.load(out)
    layers = mora.adapted_layers(model)
    assert any((layer.update.fold_in.order.diff() < 0).any() for _, layer in layers)
    monkeypatch.setattr(mora, "gradient_norms", refuse)
    run(*WORDS, "--steps=14", "--resume")
    resumed = dict(mora.adapted_layers(checkpoint.load(out)[0]))
    for name, layer in layers:
        assert torch.equal(layer.update.fold_in.order, resumed[name].update.fold_in.order)
        assert torch.equal(layer.update.fold_out.order, resumed[name].update.fold_out.order)
    merge.main([str(step), str(tmp_path / "merged")])
    ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        merged = checkpoint.load(tmp_path / "merged")[0]
        torch.testing.assert_close(merged(ids), model(ids), rtol=1e-4, atol=1e-4)
        restarted = mora.adapted_layers(model)[0][1].update.fold_in
        restarted.move(cycle=1, seed=5)
        assert torch.equal(restarted.order, layers[0][1].update.fold_in.order)
    newest = checkpoint.steps_of(out)[-1]
    file, state = newest / "adapter/adapter_model.safetensors", newest / "state.json"
    tensors = load_file(file)
    del tensors[first_order(tensors)]
    save_file(tensors, file)
    state.write_text(json.dumps(json.loads(state.read_text()) | {"files": {}}))
    with pytest.raises(UserError, match="do not fit the model: .*Missing key.*order") as caught:
        run(*WORDS, "--steps=16", "--resume")
    assert "\n" not in str(caught.value)


def test_the_first_steps_are_read_without_changing_them(corpus):
    """Two processes read what one does, and a run's own batches and draws stay as they are."""
    tokens, calls = open_split(corpus, "train"), []

    def model(inputs, targets):
        calls.append(inputs)
        return inputs.sum().float()

    batches = Batches(tokens, 0, 16, 8, 2)
    state = torch.get_rng_state()
    whole = sum(train.first_losses(model, batches))
    expected = [batches.load(step)[0] for step in range(train.GRADIENT_STEPS)]
    assert torch.equal(torch.cat(calls), torch.cat(expected).flatten(0, 1))
    assert batches.loading == {} and torch.equal(state, torch.get_rng_state())
    halves = [sum(train.first_losses(model, Batches(tokens, 0, 16, 8, 2, rank=rank, world=2)))
              for rank in (0, 1)]
    assert sum(halves) == whole


def test_the_first_steps_of_samples_weigh_every_learned_token_alike(pairs):
    def model(inputs, targets):
        return targets[targets != -100].float().mean()

    samples = open_split(pairs, "train")
    whole, parts = (sum(train.first_losses(model, SampleBatches(samples, 0, 64, 8, micro_batch)))
                    for micro_batch in (8, 2))
    assert float(parts) == pytest.approx(4 * float(whole), rel=1e-5)


def test_the_pass_keeps_inputs_of_blocks_alone():
    """It is not compiled, and whole activations would take more memory than the run's steps."""
    def first_losses():
        given.append(model.checkpoint_blocks)
        yield from losses(model, 0)

    cfg, model, given = Config(groups="gradient", device="cpu", compile="off"), llama(), []
    train.prepare_model(cfg, model, torch.device("cpu"), 0, first_losses())
    assert given == [True] and not model.checkpoint_blocks
    plain = llama()
    norms = mora.gradient_norms(plain, losses(plain, 0))
    for name, layer in mora.adapted_layers(model):
        assert (norms[name][0][layer.update.fold_in.order.long()].diff() <= 0).all()
    with pytest.raises(UserError, match="method mora: the losses have no finite gradient"):
        train.prepare_model(cfg, llama(), torch.device("cpu"), 0, iter(()))


def test_two_processes_choose_what_one_does(run, group, config):
    words = [*WORDS, "--eval_every=4", "--micro_batch=2"]
    one, two = run(*words), config.parent / "two"
    ended = finish(group(2, *words, f"--out={two}"))
    assert ended[0] == [0, 0], ended
    for key in ("loss", "val_loss", "grad_norm"):
        assert records(two, key) == pytest.approx(records(one, key), rel=1e-5)
    orders = [{name: tensor for name, tensor in load_file(
        out / "step-00000012/adapter/adapter_model.safetensors").items() if "order" in name}
        for out in (one, two)]
    assert len(orders[0]) == 28
    assert all(torch.equal(order, orders[1][name]) for name, order in orders[0].items())


def test_a_quantised_base_and_samples_take_gradient_groups(fit):
    out = fit("--groups=gradient", "--base_dtype=bfloat16", "--train_rest=false", "--steps=4",
              "--eval_every=4", "--save_every=4", "--dropout=0")
    assert records(out, "val_loss")[4] < records(out, "val_loss")[0]
