"""Adapter folders, compared with peft for LoRA and DoRA."""
import copy
import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import checkpoint
import evaluate
import merge
import mora
from config import UserError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
VARIANTS = {
    "lora": dict(),
    "rslora": dict(use_rslora=True),
    "dora": dict(use_dora=True),
    "dora, rslora, dropout": dict(use_dora=True, use_rslora=True, lora_dropout=0.3),
    "dropout": dict(lora_dropout=0.3),
}


@pytest.mark.filterwarnings("ignore:dropout")
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
    out = run("--method=lora", *options)
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
    out = run(*options, "--restart_every=6")
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
    with pytest.raises(UserError, match="operator = 'twist' is not implemented, only 'truncate'"):
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


REFUSED_KEYS = [
    ("peft_type", "LOHA"), ("lora_bias", True), ("modules_to_save", ["lm_head"]),
    ("layer_replication", [[0, 2]]), ("bias", "all"), ("fan_in_fan_out", True),
    ("megatron_config", {"a": 1}), ("init_lora_weights", "pissa"), ("key_of_tomorrow", 1),
    ("lora_alpha", None), ("mora_type", 5)]


@pytest.mark.parametrize("key, value", REFUSED_KEYS)
def test_a_key_that_is_not_implemented_is_refused_by_its_name(llama, tmp_path, key, value):
    trained_by_peft(llama, tmp_path, target_modules=["q_proj"])
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
     "lora_A.weight 5 x 32, .*here it takes lora_A.weight 4 x 32"),
    ({f"{Q_PROJ}.lora_magnitude_vector": (32,)}, "lora_magnitude_vector 32, but here")]


@pytest.mark.parametrize("shapes, message", REFUSED_TENSORS)
def test_a_tensor_that_does_not_fit_is_refused_by_its_name(llama, tmp_path, shapes, message):
    trained_by_peft(llama, tmp_path, target_modules=["q_proj"])
    file = tmp_path / "adapter_model.safetensors"
    changed = {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_file(load_file(file) | changed, file)
    with pytest.raises(UserError, match=message):
        checkpoint.load(tmp_path)


def test_a_pickled_adapter_is_refused(llama, tmp_path):
    trained_by_peft(llama, tmp_path, target_modules=["q_proj"])
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="pickled"):
        checkpoint.load(tmp_path)
