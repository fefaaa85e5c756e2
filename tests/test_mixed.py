"""MoRA beside a LoRA (mora.Mixed): the laws of every update, and restarts that leave LoRA alone."""
import copy
import json

import pytest
import torch

import adapters
import mora
from config import UserError
from model import Llama, LlamaConfig
from optimizer import AdamWMuon

SHAPE = LlamaConfig(vocab_size=61, hidden_size=40, intermediate_size=72, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2)


def adapted(groups="permute", operator="share", std=0.05, **options):
    model = mora.adapt(Llama(SHAPE, seed=0), rank=6, lora_rank=2, groups=groups, operator=operator,
                       **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in mora.adapter_parameters(model):
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return model


def tokens(seed=2):
    return torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(seed))


def loss(model):
    ids = tokens()
    return model(ids[:, :-1], ids[:, 1:])


def train_a_step(model, optimizer):
    loss(model).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("operator", ["share", "decouple", "rotate"])
def test_merged_equals_two_paths_in_value_and_gradients(operator):
    model = adapted(operator=operator)
    other = copy.deepcopy(model)
    for _, layer in mora.adapted_layers(other):
        layer.merges = False
    results = []
    for one in (model, other):
        value = loss(one)
        value.backward()
        results.append([value, *(p.grad for _, p in mora.adapter_parameters(one))])
    torch.testing.assert_close(*results)
    assert all(gradient.norm() > 0 for gradient in results[0][1:])


def test_budget_is_shared_and_the_update_starts_at_zero():
    mixed = mora.adapt(Llama(SHAPE, seed=0), rank=6, lora_rank=2)
    budget = sum(6 * sum(layer.weight.shape) for _, layer in mora.adapted_layers(mixed))
    assert 0.8 * budget < sum(p.numel() for _, p in mora.adapter_parameters(mixed)) <= budget
    for _, layer in mora.adapted_layers(mixed):
        assert not layer.update.delta().any() and layer.update.low_rank.A.any()


@pytest.mark.parametrize("muon", [True, False])
def test_a_restart_merges_m_alone_and_changes_no_function(muon):
    model = adapted(train_rest=True)
    parameters = [p for p in model.parameters() if p.requires_grad and p.ndim == 2]
    optimizer = AdamWMuon([{"params": parameters, "muon": muon, "weight_decay": 0.0}], lr=1e-3)
    train_a_step(model, optimizer)
    low_rank = [(p, p.detach().clone(), copy.deepcopy(optimizer.state[p]))
                for name, p in mora.adapter_parameters(model) if ".low_rank." in name]
    before, groups = model(tokens()), [layer.update.fold_in.order.clone()
                                       for _, layer in mora.adapted_layers(model)]
    report = mora.restart(model, optimizer, cycle=1)
    torch.testing.assert_close(model(tokens()), before, rtol=1e-4, atol=1e-5)
    assert report["states"] == len(mora.adapted_layers(model)) and report["update_norm"] > 0
    for p, value, state in low_rank:
        assert torch.equal(p, value) and optimizer.state[p].keys() == state.keys()
        torch.testing.assert_close(dict(optimizer.state[p]), dict(state), rtol=0, atol=0)
    for (_, layer), order in zip(mora.adapted_layers(model), groups, strict=True):
        assert not layer.update.M.any() and not optimizer.state.get(layer.update.M)
        assert not torch.equal(layer.update.fold_in.order, order)
    train_a_step(model, optimizer)


def test_merge_adds_both_parts():
    model = adapted()
    before = model(tokens())
    torch.testing.assert_close(mora.merge(model)(tokens()), before, rtol=1e-4, atol=1e-5)


def test_an_adapter_folder_gives_the_same_function(tmp_path):
    model = adapted()
    adapters.save(model, tmp_path)
    loaded = adapters.load(Llama(SHAPE, seed=0), tmp_path)
    assert torch.equal(loaded(tokens()), model(tokens()))
    name, layer = mora.adapted_layers(loaded)[0]
    assert isinstance(layer.update, mora.Mixed) and layer.update.lora_rank == 2
    for (_, a), (_, b) in zip(mora.adapter_parameters(model), mora.adapter_parameters(loaded),
                              strict=True):
        assert torch.equal(a, b)


def test_as_lora_holds_both_parts(tmp_path):
    model = adapted()
    report = adapters.as_lora(model, tmp_path)
    loaded = adapters.load(Llama(SHAPE, seed=0), tmp_path)
    torch.testing.assert_close(loaded(tokens()), model(tokens()), rtol=1e-4, atol=1e-5)
    width = max(len(layer.update.M) for _, layer in mora.adapted_layers(model))
    assert report["rank"] == width + 2 and report["error"] < 1e-6


@pytest.mark.parametrize("options", [
    {"lora_rank": 6}, {"lora_rank": -1}, {"lora_rank": 2, "dora": True},
    {"lora_rank": 2, "method": "lora"}, {"lora_rank": 2.0}, {"lora_rank": True}])
def test_wrong_parts_are_refused(options):
    with pytest.raises(ValueError, match="lora_rank is the part of MoRA's rank .* got lora_rank"):
        mora.adapt(Llama(SHAPE, seed=0), rank=6, **options)


def test_a_folder_without_low_rank_tensors_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    adapters.save(adapted(), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors = {name: t for name, t in tensors.items() if "lora_A" not in name}
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="does not fit the base model"):
        adapters.load(Llama(SHAPE, seed=0), tmp_path)


@pytest.mark.parametrize("changes", [
    {"lora_rank": 6}, {"rank_pattern": {"q_proj": 2}}, {"use_dora": True},
    {"peft_type": "LORA", "lora_alpha": 6}])
def test_a_wrong_part_in_a_folder_is_one_line(tmp_path, changes):
    adapters.save(adapted(), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=r"adapter_config.json: lora_rank must be .* got \d$"):
        adapters.load(Llama(SHAPE, seed=0), tmp_path)


@pytest.mark.parametrize("method", ["mora", "lora"])
def test_a_layer_of_the_model_may_be_called_low_rank(method):
    """Its update restarts as every other one."""
    linears = {name: torch.nn.Linear(8, 8) for name in ("low_rank", "q_proj")}
    model = torch.nn.ModuleDict(linears)
    mora.adapt(model, method=method, rank=2, targets=("low_rank", "q_proj"))
    parameters = [p for _, p in mora.adapter_parameters(model)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    x = torch.randn(4, 8)
    model["q_proj"](model["low_rank"](x)).square().sum().backward()
    optimizer.step()
    assert mora.restart(model, optimizer, cycle=1)["states"] == len(parameters)
