"""Adapter folders, compared with peft for LoRA and DoRA."""
import contextlib
import copy
import json
import re
import runpy
import shutil
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import adapters
import checkpoint
import evaluate
import merge
import mora
from config import UserError
from lora import LowRank

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
VARIANTS = {
    "lora": dict(),
    "rslora": dict(use_rslora=True),
    "dora": dict(use_dora=True),
    "dora, rslora, dropout": dict(use_dora=True, use_rslora=True, lora_dropout=0.3),
    "dropout": dict(lora_dropout=0.3),
}


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_are_pefts(variant, bias):
    """In float64, with the same A, B, m and dropped inputs: y, dx, dA, dB, dm, merged matrix."""
    torch.manual_seed(0)
    plain = nn.ModuleDict({"q": nn.Linear(20, 12, bias=bias, dtype=torch.float64)})
    options, x = VARIANTS[variant], torch.randn(3, 5, 20, dtype=torch.float64)
    ours = mora.adapt(copy.deepcopy(plain), "lora", rank=4, alpha=6.0, targets=("q",),
                      rslora="use_rslora" in options, dora="use_dora" in options,
                      dropout=options.get("lora_dropout", 0.0))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q"], **options)
    theirs = peft.get_peft_model(plain, config, autocast_adapter_dtype=False)
    layer, update = theirs.base_model.model["q"], ours["q"].update
    pefts = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
    if "use_dora" in options:
        pefts["magnitude"] = layer.lora_magnitude_vector["default"].weight
    mine = {key.removeprefix("inner."): p for key, p in update.named_parameters()}
    assert mine.keys() == pefts.keys() and all(p.dtype == torch.float64 for p in pefts.values())
    for key, parameter in mine.items():
        nn.init.normal_(parameter)
        pefts[key].data.copy_(parameter)
    outcomes = []
    for call, parameters in ((ours["q"], mine), (layer, pefts)):
        torch.manual_seed(1)
        x = x.detach().requires_grad_()
        y = call(x)
        inputs = (x, *(parameters[key] for key in sorted(parameters)))
        outcomes.append((y, *torch.autograd.grad(y.sin().sum(), inputs)))
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    layer.merge()
    merged, expected = ours["q"].merged(), layer.base_layer.weight
    torch.testing.assert_close(merged, expected, rtol=1e-10, atol=1e-10)


def hugging_face(folder):
    return transformers.LlamaForCausalLM.from_pretrained(folder).eval()


IDS = torch.randint(257, (2, 30), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    y = model(IDS)
    return getattr(y, "logits", y)


def assert_scored_as_in_training(out, model, corpus):
    """The loaded model has the last validation loss that its run logged."""
    lines = (out / "log.jsonl").read_text().splitlines()
    logged = [json.loads(line)["val_loss"] for line in lines if "val_loss" in line]
    loss = evaluate.perplexity(model, evaluate.open_split(corpus, "val"), 16, 4)["loss"]
    assert logged[-1] == pytest.approx(loss, rel=1e-6) and logged[-1] < logged[0]


LORA_RUNS = (["--alpha=4"], ["--dora=true"],
             ["--alpha=3", "--rslora=true", "--lora_A=frozen", "--targets=q_proj,up_proj"])


@pytest.mark.parametrize("options", LORA_RUNS, ids=" ".join)
def test_peft_loads_our_adapters(run, corpus, options, capsys):
    """adapter/ on base/ is the trained model: in peft, after merge.py and in evaluate.py."""
    out = run("--method=lora", "--steps=10", "--eval_every=5", *options)
    model, _, path = checkpoint.load(out)
    assert_scored_as_in_training(out, model, corpus)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of unknown keys, of missing tensors
        theirs = peft.PeftModel.from_pretrained(hugging_face(path / "base"), path / "adapter")
    assert (logits(theirs) - logits(model)).abs().max() < 1e-5
    assert (logits(model) - logits(checkpoint.load(path / "base")[0])).abs().max() > 1e-3
    merge.main([str(out)])
    merge.main([str(path / "adapter"), str(out / "from_the_adapter")])  # it names its base
    merged = hugging_face(out / "from_the_adapter")
    assert (logits(merged) - logits(model)).abs().max() < 1e-5
    capsys.readouterr()
    evaluate.main([str(out / "merged"), str(corpus)])
    evaluate.main([str(path / "adapter"), str(corpus)])
    scores = [json.loads(line)["loss"] for line in capsys.readouterr().out.splitlines()]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


MORA_RUNS = (["--dora=true", "--groups=alternate"], ["--operator=rotate", "--groups=permute"])


@pytest.mark.parametrize("options", MORA_RUNS, ids=" ".join)
def test_our_mora_adapters_merge_without_their_run(run, corpus, tmp_path, monkeypatch, options):
    """With the groups of their cycle, here the third; never on ../base of the working directory."""
    out = run(*options, "--restart_every=4", "--steps=10", "--eval_every=5")
    model, _, path = checkpoint.load(out)
    assert_scored_as_in_training(out, model, corpus)
    shutil.copytree(path / "base", tmp_path / "model")
    shutil.copytree(path / "adapter", tmp_path / "elsewhere")
    shutil.copytree(path / "base", tmp_path / "here" / "base")
    (tmp_path / "here" / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "here" / "inside")
    with pytest.raises(UserError, match="name one with --base"):
        merge.main([str(tmp_path / "elsewhere"), str(tmp_path / "merged")])
    base = f"--base={tmp_path / 'model'}"
    merge.main([str(tmp_path / "elsewhere"), str(tmp_path / "merged"), base])
    assert (logits(hugging_face(tmp_path / "merged")) - logits(model)).abs().max() < 1e-5
    config = tmp_path / "elsewhere" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"operator": "twist"}))
    with pytest.raises(UserError, match='operator must be "truncate" or .*, got "twist"'):
        checkpoint.load(tmp_path / "elsewhere", tmp_path / "model")
    with pytest.raises(UserError, match="is no adapter folder"):
        merge.main([str(out), base])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny directory that transformers wrote."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama") / "model"
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=56, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def of_peft(llama, tmp_path_factory):
    """An adapter folder of q_proj that peft wrote."""
    folder = tmp_path_factory.mktemp("peft")
    trained_by_peft(llama, folder, target_modules=["q_proj"])
    return folder


def trained_by_peft(llama, folder, **options):
    """Write an adapter folder with peft, no tensor of it zero; returns peft's model."""
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(hugging_face(llama), config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder)
    return model


PEFT_OPTIONS = (
    dict(target_modules=["q_proj", "down_proj"]),
    dict(target_modules="all-linear", use_dora=True, lora_dropout=0.1),
    dict(target_modules=r".*\.1\..*(k|gate)_proj", use_rslora=True, init_lora_weights="gaussian"),
    dict(target_modules=["v_proj", "o_proj"], rank_pattern={"v_proj": 2, "layers.1.*o_proj": 6},
         alpha_pattern={"1.self_attn.v_proj": 3}),
    dict(target_modules=["q_proj", "up_proj"], layers_to_transform=0),
    dict(target_modules=["q_proj", "up_proj"], exclude_modules=["model.layers.0.self_attn.q_proj"]),
)


@pytest.mark.parametrize("options", PEFT_OPTIONS, ids=str)
def test_pefts_adapters_merge_here(llama, tmp_path, options):
    theirs = trained_by_peft(llama, tmp_path / "adapter", **options)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(llama)
    merge.main([str(tmp_path / "adapter"), str(tmp_path / "merged")])
    expected = logits(theirs)
    merged = logits(hugging_face(tmp_path / "merged"))
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(theirs.merge_and_unload()), expected, rtol=0, atol=1e-5)
    assert (logits(hugging_face(llama)) - expected).abs().max() > 1e-3


def test_the_base_that_the_command_names_is_taken(llama, tmp_path):
    """Not the one that the adapter's config names."""
    trained_by_peft(llama, tmp_path / "adapter", target_modules=["q_proj"])
    other = checkpoint.load(llama)[0]
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    checkpoint.write_hugging_face(tmp_path / "other", other.state_dict(), other, None)
    for base, expected in ((None, llama), (str(tmp_path / "other"), tmp_path / "other")):
        model = checkpoint.load(tmp_path / "adapter", base)[0]
        wanted = load_file(expected / "model.safetensors")["lm_head.weight"]
        assert torch.equal(model.lm_head.weight, wanted)


REFUSED_KEYS = [
    ("peft_type", "LOHA"), ("lora_bias", True), ("modules_to_save", ["lm_head"]),
    ("layer_replication", [[0, 2]]), ("bias", "all"),
    ("megatron_config", {"a": 1}), ("init_lora_weights", "pissa"), ("key_of_tomorrow", 1),
    ("lora_alpha", None), ("mora_type", 5)]


@pytest.mark.parametrize("key, value", REFUSED_KEYS)
def test_a_key_that_is_not_implemented_is_refused_by_its_name(of_peft, tmp_path, key, value):
    shutil.copytree(of_peft, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text()) | {key: value}
    if key == "mora_type":
        config["use_mora"] = True
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=key):
        checkpoint.load(tmp_path)


Q_PROJ, LM_HEAD = "base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.lm_head"
REFUSED_TENSORS = [
    ({f"{LM_HEAD}.lora_A.weight": (4, 32), f"{LM_HEAD}.lora_B.weight": (257, 4)}, "adapts lm_head"),
    ({"base_model.model.model.norm.weight": (32,)}, "norm.weight is no part"),
    ({f"{Q_PROJ}.lora_A.weight": (5, 32)},
     r"0.self_attn.q_proj does not fit .*mismatch for A: .*\[5, 32\].* is torch.Size\(\[4, 32\]"),
    ({f"{Q_PROJ}.lora_magnitude_vector": (32,)}, 'q_proj does not fit .* Unexpected .*"magnitude"')]


@pytest.mark.parametrize("shapes, message", REFUSED_TENSORS)
def test_a_tensor_that_does_not_fit_is_refused_by_its_name(of_peft, tmp_path, shapes, message):
    shutil.copytree(of_peft, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "adapter_model.safetensors"
    changed = {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_file(load_file(file) | changed, file)
    with pytest.raises(UserError, match=message):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("changes, line", [
    ({}, "lacks 3 of the layers that its target_modules names .model.layers.0.self_attn.k_proj."),
    ({"target_modules": ["q_proj"]}, "lacks 1 of .*model.layers.1.self_attn.q_proj.: is it whole"),
    ({"target_modules": ["self_attn.q_proj", "x"]}, "lacks 1 of .*model.layers.1.self_attn.q_proj"),
    ({"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 4}}, "lacks 1 of the layers"),
    ({"target_modules": ".*q_proj"}, "lacks 1 of .*model.layers.1.self_attn.q_proj"),
    ({"target_modules": ["layers.0.self_attn.q_proj", "k.proj"]}, None),  # a dot is no pattern
    ({"target_modules": r".*0\..*q_proj"}, None), ({"target_modules": None}, None),
    ({"layers_to_transform": 0}, None), ({"layers_to_transform": [0]}, None),
    ({"exclude_modules": "x"}, None),
    ({"target_modules": "("}, r"target_modules: missing \), unterminated subpattern"),
    ({"target_modules": ["q_proj", 5]}, "must be text or a list of texts, got .*5")])
def test_an_adapter_that_lacks_layers_of_its_targets_is_refused(of_peft, tmp_path, changes, line):
    """The file has q_proj of the first of two layers. Keys that restrict layers are not read."""
    shutil.copytree(of_peft, tmp_path, dirs_exist_ok=True)
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file({name: t for name, t in load_file(file).items() if ".layers.0." in name}, file)
    own = json.loads(config.read_text()) | {"target_modules": ["k_proj", "q_proj"]}
    config.write_text(json.dumps(own | changes))
    with pytest.raises(UserError, match=line) if line else contextlib.nullcontext():
        checkpoint.load(tmp_path)


def test_an_adapter_without_tensors_is_refused(of_peft, tmp_path):
    shutil.copytree(of_peft, tmp_path, dirs_exist_ok=True)
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="holds no tensors, so it adapts nothing"):
        checkpoint.load(tmp_path)


def test_a_pickled_adapter_is_refused(of_peft, tmp_path):
    shutil.copytree(of_peft, tmp_path, dirs_exist_ok=True)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="holds a pickled adapter"):
        checkpoint.load(tmp_path)


# ------------------------------------------------------------
# any model: save, load, targets, save_pretrained

SMALL = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
ARCHITECTURES = {
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config(
        **SMALL, intermediate_size=56, num_key_value_heads=2)),
    "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig(
        **SMALL, intermediate_size=56, num_key_value_heads=2)),
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config(
        vocab_size=61, n_embd=32, n_layer=2, n_head=4)),
}
UPDATES = {
    "lora": dict(method="lora", alpha=6.0, lora_A="orthogonal"),
    "rslora": dict(method="lora", alpha=6.0, rslora=True),
    "dora": dict(method="lora", dora=True),
    "share": dict(groups="permute", seed=3, cycle=2),
    "rotate, dora": dict(operator="rotate", groups="alternate", cycle=1, dora=True),
}
SMALL_IDS = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(0))


def plain_model(architecture):
    torch.manual_seed(0)
    kind, config = ARCHITECTURES[architecture]
    return kind(config).eval()


def randomize_updates(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for _, parameter in mora.adapter_parameters(model):
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def adapted_model(architecture, update, targets="all-linear"):
    model = plain_model(architecture)
    return randomize_updates(mora.adapt(model, rank=3, targets=targets, **UPDATES[update]))


@torch.no_grad()
def small_logits(model):
    return model(SMALL_IDS).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("update", UPDATES)
def test_any_model_is_saved_loaded_and_merged(architecture, update, tmp_path):
    model = adapted_model(architecture, update)
    expected = small_logits(model)
    assert (expected - small_logits(plain_model(architecture))).abs().max() > 1e-3
    adapters.save(model, tmp_path)
    loaded = adapters.load(plain_model(architecture), tmp_path)
    torch.testing.assert_close(small_logits(loaded), expected, rtol=0, atol=1e-6)
    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in mora.adapter_parameters(loaded)}
    torch.testing.assert_close(small_logits(mora.merge(loaded)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("update", ("lora", "rslora", "dora"))
def test_peft_loads_what_save_wrote_for_any_model(architecture, update, tmp_path):
    model = adapted_model(architecture, update)
    adapters.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain_model(architecture), tmp_path)
    torch.testing.assert_close(small_logits(theirs), small_logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", (dict(target_modules="all-linear"),
                                     dict(target_modules=["c_attn"], use_dora=True)), ids=str)
def test_an_adapter_of_gpt2_that_peft_trained_loads_here(options, tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options)
    theirs = peft.get_peft_model(plain_model("gpt2"), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    theirs.save_pretrained(tmp_path)
    ours = adapters.load(plain_model("gpt2"), tmp_path)
    torch.testing.assert_close(small_logits(ours), small_logits(theirs), rtol=0, atol=1e-5)


def test_ranks_and_scales_per_layer_survive_load_and_save(tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM",
                             target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2},
                             alpha_pattern={"0.self_attn.q_proj": 3})
    theirs = peft.get_peft_model(plain_model("qwen2"), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = adapters.load(plain_model("qwen2"), tmp_path / "theirs")
    adapters.save(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(plain_model("qwen2"), tmp_path / "ours")
    torch.testing.assert_close(small_logits(again), small_logits(theirs), rtol=0, atol=1e-5)


def test_the_scale_of_a_layer_is_not_that_of_one_whose_name_is_like_it(tmp_path):
    alphas = {"q": 3.0, "q2": 7.0, "a.q": 6.0, "a_q": 1.5, "b.q": 7.0, "b.a_q": 7.0}

    def plain():
        torch.manual_seed(0)
        model = nn.ModuleDict({"a": nn.ModuleDict(), "b": nn.ModuleDict()})
        for name in alphas:
            model.set_submodule(name, nn.Linear(6, 5))
        return model

    model = plain()
    for name, linear in mora.find_linears(model).items():
        update = LowRank(6, 5, 2, alphas[name])
        nn.init.normal_(update.A), nn.init.normal_(update.B)
        model.set_submodule(name, mora.AdaptedLinear(linear, update))
    model.requires_grad_(False)
    adapters.save(model, tmp_path)
    loaded = mora.merge(adapters.load(plain(), tmp_path)).state_dict()
    torch.testing.assert_close(loaded, mora.merge(model).state_dict())


@pytest.mark.parametrize("update", ("dora", "share"))
def test_a_config_names_the_adapted_layers_and_their_kind(update, tmp_path):
    model = mora.adapt(plain_model("gpt2"), rank=3, dropout=0.25, **UPDATES[update],
                       targets=["h.1.attn.c_proj", "c_fc"])
    adapters.save(model, tmp_path)
    config = adapters.read_config(tmp_path)
    assert config["target_modules"] == [f"transformer.h.{name}" for name in (
        "0.mlp.c_fc", "1.attn.c_proj", "1.mlp.c_fc")]
    assert config["fan_in_fan_out"] is True and config["lora_dropout"] == 0.25
    adapters.save(mora.adapt(plain_model("qwen2"), rank=3, targets=["q_proj", "up_proj"]), tmp_path)
    config = adapters.read_config(tmp_path)
    assert config["target_modules"] == ["q_proj", "up_proj"]
    assert config["fan_in_fan_out"] is False and config["lora_dropout"] == 0


TARGETS = ["all-linear", "q_proj", r".*\.1\..*(k|gate)_proj", ["q_proj", "down_proj"],
           ["layers.0.mlp.up_proj"], "(?i).*GATE_PROJ", r"(m)odel\.layers\.0\.\1lp\.up_proj"]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_targets_are_pefts(targets):
    ours = mora.adapt(plain_model("mistral"), "lora", rank=2, targets=targets)
    modules = [targets] if targets == "q_proj" else targets  # peft: a regular expression alone
    config = peft.LoraConfig(r=2, target_modules=modules)
    theirs = peft.get_peft_model(plain_model("mistral"), config).base_model.model
    names = {name.removesuffix(".lora_A") for name, _ in theirs.named_modules()
             if name.endswith(".lora_A")}
    assert {name for name, _ in mora.adapted_layers(ours)} == names


@pytest.mark.parametrize("targets, message", [
    (".*(", "no regular expression"), ("proj", "'proj' matches no linear layer"),
    ("layers", "these are named down_proj, ")])
def test_targets_that_match_nothing_are_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        mora.adapt(plain_model("mistral"), targets=targets)


@pytest.mark.parametrize("update", ("dora", "share"))
@pytest.mark.parametrize("architecture", ("qwen2", "gpt2"))
def test_save_pretrained_of_an_adapted_model_writes_merged_weights(architecture, update, tmp_path):
    model = adapted_model(architecture, update)
    copy.deepcopy(model).save_pretrained(tmp_path / "copy")
    model.save_pretrained(tmp_path / "model")
    for name in ("copy", "model"):
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        torch.testing.assert_close(small_logits(again), small_logits(model), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="takes no state_dict"):
        model.save_pretrained(tmp_path / "other", state_dict=model.state_dict())
    merged = mora.merge(model)
    merged.save_pretrained(tmp_path / "merged", state_dict=merged.state_dict())  # as before adapt
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(small_logits(again), small_logits(model), rtol=0, atol=1e-5)


def test_save_refuses_what_a_folder_cannot_hold(tmp_path):
    with pytest.raises(UserError, match="no adapted layers"):
        adapters.save(plain_model("qwen2"), tmp_path)
    model = mora.adapt(plain_model("qwen2"), rank=2, train_rest=True)
    with pytest.raises(UserError, match="parameters train beside the updates .model.embed"):
        adapters.save(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def one_process():
    """A group of torch.distributed."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS = {"compile": partial(torch.compile, backend="eager"), "DDP": DistributedDataParallel,
            "DataParallel": torch.nn.DataParallel,
            "both": lambda model: torch.compile(DistributedDataParallel(model), backend="eager")}


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("write", (adapters.save, adapters.as_lora))
def test_a_folder_holds_the_models_own_names(one_process, wrap, write, tmp_path):
    """Not those of its wrapper, of which neither `load` nor peft would find one in the model."""
    model = adapted_model("qwen2", "share")
    model.name_or_path = "models/base"
    write(WRAPPERS[wrap](model), tmp_path)
    assert adapters.read_config(tmp_path)["base_model_name_or_path"] == "models/base"
    loaded = adapters.load(plain_model("qwen2"), tmp_path)
    torch.testing.assert_close(small_logits(loaded), small_logits(model), rtol=0, atol=1e-5)


def test_a_sharded_model_is_saved_whole(one_process, tmp_path):
    model = adapted_model("qwen2", "share")
    expected = small_logits(model)
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
    adapters.save(model, tmp_path)
    loaded = adapters.load(plain_model("qwen2"), tmp_path)
    torch.testing.assert_close(small_logits(loaded), expected, rtol=0, atol=1e-6)


def test_a_model_inside_ddp_is_not_adapted(one_process):
    """DDP averages the gradients of the parameters that it found: processes would drift apart."""
    model = DistributedDataParallel(plain_model("qwen2"))
    with pytest.raises(ValueError, match="adapt the model before"):
        mora.adapt(model, targets="all-linear")
    assert not mora.adapted_layers(model)


@pytest.mark.parametrize("update", ("lora", "share"))
@pytest.mark.parametrize("write", (adapters.save, adapters.as_lora))
def test_an_update_after_a_restart_is_not_saved_for_the_first_weights(update, write, tmp_path):
    """Its weights hold earlier updates: on the model of name_or_path the folder is another map."""
    model = adapted_model("qwen2", update)
    model.name_or_path = "models/base"
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(SMALL_IDS, labels=SMALL_IDS).loss.backward()
    optimizer.step()
    mora.restart(model, optimizer, cycle=1)
    with pytest.raises(UserError, match="restarts added updates to the weights"):
        write(model, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())
    adapters.save(model, tmp_path / "adapter", base="where the weights are")
    assert "where the weights are" in (tmp_path / "adapter" / "adapter_config.json").read_text()


def test_save_pretrained_of_a_model_that_was_compiled_before_it_was_adapted(tmp_path):
    config = copy.deepcopy(ARCHITECTURES["qwen2"][1])
    config.num_hidden_layers, config.layer_types = 1, config.layer_types[:1]  # a block compiles 1 s
    model = torch.compile(transformers.Qwen2ForCausalLM(config).eval(), backend="eager")
    randomize_updates(mora.adapt(model, rank=3, targets="all-linear"))
    expected = small_logits(model)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(small_logits(again), expected, rtol=0, atol=1e-5)
    mora.merge(model)
    assert "save_pretrained" not in mora.unwrapped(model).__dict__


def test_a_base_may_be_a_path(tmp_path):
    adapters.save(adapted_model("qwen2", "share"), tmp_path, base=tmp_path / "base")
    assert adapters.read_config(tmp_path)["base_model_name_or_path"] == str(tmp_path / "base")


def test_load_refuses_another_model(tmp_path):
    adapters.save(adapted_model("qwen2", "share"), tmp_path)
    with pytest.raises(UserError, match="is it of another base model"):
        adapters.load(plain_model("gpt2"), tmp_path)
    with pytest.raises(UserError, match="adapted already"):
        adapters.load(adapted_model("qwen2", "share"), tmp_path)


def test_load_refuses_a_layer_that_shares_its_weight(tmp_path):
    adapters.save(adapted_model("qwen2", "share", targets=["0.mlp.up_proj"]), tmp_path)
    model = plain_model("qwen2")
    mlp = model.model.layers[0].mlp
    mlp.gate_proj.weight = mlp.up_proj.weight
    with pytest.raises(UserError, match="up_proj shares its weight with .*gate_proj.weight: untie"):
        adapters.load(model, tmp_path)


def test_a_loaded_adapter_is_written_merged_by_save_pretrained(tmp_path):
    adapters.save(adapted_model("qwen2", "share"), tmp_path / "adapter")
    model = adapters.load(plain_model("qwen2"), tmp_path / "adapter")
    model.save_pretrained(tmp_path / "model")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(small_logits(again), small_logits(model), rtol=0, atol=1e-5)


def test_weights_without_their_update_are_refused():
    """As the Trainer loads a checkpoint: merged weights, strict=False, the update left as it is."""
    model = adapted_model("qwen2", "share")
    with pytest.raises(RuntimeError, match="q_proj.weight but no update of it"):
        model.load_state_dict(mora.merged_weights(model), strict=False)


def test_the_trainer_example_runs(tmp_path, monkeypatch, capsys):
    script = Path(__file__).parent.parent / "docs" / "trainer_example.py"
    assert len(script.read_text().splitlines()) <= 60
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    runpy.run_path(str(script), run_name="__main__")
    line = r"loss (\S+) -> (\S+), trained and merged logits differ by (\S+)"
    first, last, difference = map(float, re.search(line, capsys.readouterr().out).groups())
    assert last < 0.9 * first and difference < 1e-4


# ------------------------------------------------------------
# MoRA as LoRA

ONE_BLOCK = {
    "share": dict(), "share, permute": dict(groups="permute", seed=3, cycle=2),
    "truncate": dict(operator="truncate", groups="contiguous"),
    "share, dora": dict(dora=True, groups="alternate", cycle=1),
}


def mora_model(options, architecture="qwen2"):
    model = mora.adapt(plain_model(architecture), rank=3, targets="all-linear", **options)
    return randomize_updates(model)


@pytest.mark.parametrize("architecture", ("qwen2", "gpt2"))
@pytest.mark.parametrize("options", ONE_BLOCK.values(), ids=list(ONE_BLOCK))
def test_peft_loads_mora_as_lora(architecture, options, tmp_path):
    model = mora_model(options, architecture)
    report = adapters.as_lora(model, tmp_path)
    largest = max(len(p) for name, p in mora.adapter_parameters(model) if name.endswith("M"))
    assert report["rank"] == largest and report["error"] < 1e-6 and report["bytes"] > 0
    theirs = peft.PeftModel.from_pretrained(plain_model(architecture), tmp_path)
    for _, layer in mora.adapted_layers(model):
        layer.merges = False
    torch.testing.assert_close(small_logits(theirs), small_logits(model), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("options", ONE_BLOCK.values(), ids=list(ONE_BLOCK))
def test_such_a_lora_comes_back_as_mora(options, dtype, tmp_path):
    model = mora_model(options)
    report = adapters.as_lora(model, tmp_path, dtype=dtype)
    assert report["error"] < (1e-6 if dtype == torch.float32 else 5e-3)
    loaded = dict(mora.adapter_parameters(adapters.load(plain_model("qwen2"), tmp_path)))
    for name, parameter in mora.adapter_parameters(model):
        expected = parameter.to(dtype).float() if name.endswith("M") else parameter
        assert torch.equal(loaded[name], expected), name


def test_such_a_lora_of_another_model_is_refused(tmp_path):
    adapters.as_lora(mora_model({}), tmp_path)
    config = transformers.Qwen2Config(**SMALL | {"hidden_size": 16}, intermediate_size=56,
                                      num_key_value_heads=2)
    with pytest.raises(UserError, match='does not fit the base model: .*Unexpected .*"A", "B"'):
        adapters.load(transformers.Qwen2ForCausalLM(config), tmp_path)


@pytest.mark.parametrize("changed", ("tensors", "text"))
def test_such_a_lora_that_was_trained_on_stays_a_lora(changed, tmp_path):
    adapters.as_lora(mora_model({}), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    if changed == "tensors":
        next(tensor for name, tensor in tensors.items() if "lora_A" in name)[0, 0] += 0.5
    else:
        metadata["mora"] = metadata["mora"].replace('"strided"', '"contiguous"')
        assert "contiguous" in metadata["mora"]
    save_file(tensors, file, metadata)
    loaded = adapters.load(plain_model("qwen2"), tmp_path)
    assert {name.rpartition(".")[2] for name, _ in mora.adapter_parameters(loaded)} == {"A", "B"}


@pytest.mark.parametrize("edit", ({"lora_alpha": 5}, {"use_rslora": True},
                                  {"alpha_pattern": {"q_proj": 3}}), ids=str)
def test_such_a_lora_whose_scale_was_edited_has_it(edit, tmp_path):
    adapters.as_lora(mora_model({}), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | edit))
    theirs = peft.PeftModel.from_pretrained(plain_model("qwen2"), tmp_path)
    loaded = adapters.load(plain_model("qwen2"), tmp_path)
    torch.testing.assert_close(small_logits(loaded), small_logits(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("operator", ("decouple", "rotate"))
def test_operators_of_many_blocks_are_refused_or_cut_to_a_rank(operator, tmp_path):
    model = mora_model({"operator": operator})
    with pytest.raises(UserError, match=f"{operator} makes a dW of rank up to 32"):
        adapters.as_lora(model, tmp_path)
    errors = [adapters.as_lora(model, tmp_path, rank=rank)["error"] for rank in (4, 16, 32)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-5
    shares = []
    for _, layer in mora.adapted_layers(model):
        values = torch.linalg.svdvals(layer.update.delta().detach())
        shares.append(float(values[4:].norm() / values.norm()))
    assert errors[0] == pytest.approx(max(shares), rel=1e-4) and shares[-1] < max(shares)
    loaded = adapters.load(plain_model("qwen2"), tmp_path)
    torch.testing.assert_close(small_logits(loaded), small_logits(model), rtol=0, atol=1e-5)
    theirs = peft.PeftModel.from_pretrained(plain_model("qwen2"), tmp_path)
    torch.testing.assert_close(small_logits(theirs), small_logits(model), rtol=0, atol=1e-5)


def test_layers_of_different_ranks_become_one_lora(tmp_path):
    model = plain_model("qwen2")
    for name, rank in (("self_attn.q_proj", 2), ("mlp.up_proj", 5)):
        linear = model.get_submodule(f"model.layers.0.{name}")
        update = mora.Square(*mora.features_of(linear), rank)
        model.set_submodule(f"model.layers.0.{name}", mora.AdaptedLinear(linear, update))
    randomize_updates(model.requires_grad_(False))
    for square in (layer.update for _, layer in mora.adapted_layers(model)):
        square.seed = square.cycle = 0
    report = adapters.as_lora(model, tmp_path)
    widths = [len(layer.update.M) for _, layer in mora.adapted_layers(model)]
    assert report["rank"] == max(widths) > min(widths)
    theirs = peft.PeftModel.from_pretrained(plain_model("qwen2"), tmp_path)
    torch.testing.assert_close(small_logits(theirs), small_logits(model), rtol=0, atol=1e-5)


def test_a_lora_is_not_written_as_lora(tmp_path):
    with pytest.raises(UserError, match="no MoRA adapter"):
        adapters.as_lora(adapted_model("qwen2", "lora"), tmp_path)
