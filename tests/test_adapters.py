"""Adapter folders, with peft as the judge of LoRA and DoRA."""
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
    """In float64, with the same A, B, m and the same dropped inputs: y, dx, dA, dB, dm, and the merged matrix."""
    torch.manual_seed(0)
    linear = nn.Linear(20, 12, bias=bias, dtype=torch.float64)
    options, x = VARIANTS[variant], torch.randn(3, 5, 20, dtype=torch.float64)
    ours = mora.adapt(nn.ModuleDict({"q": nn.Linear(20, 12, bias=bias, dtype=torch.float64)}), "lora", rank=4, alpha=6.0, targets=("q",),
                      rslora="use_rslora" in options, dora="use_dora" in options, dropout=options.get("lora_dropout", 0.0))
    theirs = peft.get_peft_model(nn.ModuleDict({"q": linear}), peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q"], **options), autocast_adapter_dtype=False)
    ours["q"].weight.data.copy_(linear.weight)
    if bias:
        ours["q"].bias.data.copy_(linear.bias)
    layer, update = theirs.base_model.model["q"], ours["q"].update
    pairs = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
    if "use_dora" in options:
        pairs["magnitude"] = layer.lora_magnitude_vector["default"].weight
    mine = {key.removeprefix("inner."): parameter for key, parameter in update.named_parameters()}
    assert mine.keys() == pairs.keys() and all(p.dtype == torch.float64 for p in pairs.values())
    for key, parameter in mine.items():
        nn.init.normal_(parameter)
        pairs[key].data.copy_(parameter)
    outcomes = []
    for call, parameters in ((ours["q"], mine), (layer, pairs)):
        torch.manual_seed(1)
        x = x.detach().requires_grad_()
        y = call(x)
        outcomes.append((y, *torch.autograd.grad(y.sin().sum(), (x, *(parameters[key] for key in sorted(parameters))))))
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    layer.merge()
    torch.testing.assert_close(ours["q"].weight + ours["q"].delta(), layer.base_layer.weight, rtol=1e-10, atol=1e-10)


def hugging_face(folder):
    from transformers import LlamaForCausalLM
    return LlamaForCausalLM.from_pretrained(folder).eval()


IDS = torch.randint(257, (2, 30), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    y = model(IDS)
    return getattr(y, "logits", y)


def assert_scored_as_in_training(out, model, corpus):
    """The run's own last validation loss, of the model as it trained, is that of what was loaded."""
    values = [json.loads(line)["val_loss"] for line in (out / "log.jsonl").read_text().splitlines() if "val_loss" in line]
    loss = evaluate.perplexity(model, evaluate.open_split(corpus, "val"), 16, 4)["loss"]
    assert values[-1] == pytest.approx(loss, rel=1e-6) and values[-1] < values[0]


@pytest.mark.parametrize("options", (["--alpha=4"], ["--dora=true"], ["--alpha=3", "--rslora=true", "--lora_A=frozen", "--targets=q_proj,up_proj"]), ids=" ".join)
def test_peft_loads_our_adapters(run, corpus, options, capsys):
    """adapter/ on base/ is the model, for peft too; and merging, scoring and adapting further know it here."""
    out = run("--method=lora", *options)
    model, _, path = checkpoint.load(out)
    assert_scored_as_in_training(out, model, corpus)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of keys that peft does not know, of tensors that it misses
        theirs = peft.PeftModel.from_pretrained(hugging_face(path / "base"), path / "adapter")
    assert (logits(theirs) - logits(model)).abs().max() < 1e-5
    assert (logits(model) - logits(checkpoint.load(path / "base")[0])).abs().max() > 1e-3
    merge.main([str(out)])
    merge.main([str(path / "adapter"), str(out / "from_the_adapter")])  # it names its base
    assert (logits(hugging_face(out / "from_the_adapter")) - logits(model)).abs().max() < 1e-5
    capsys.readouterr()
    evaluate.main([str(out / "merged"), str(corpus)]), evaluate.main([str(path / "adapter"), str(corpus)])
    scores = [json.loads(line)["loss"] for line in capsys.readouterr().out.splitlines()]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


@pytest.mark.parametrize("options", (["--dora=true", "--groups=alternate"], ["--operator=rotate", "--groups=permute"]), ids=" ".join)
def test_our_mora_adapters_merge_without_their_run(run, corpus, tmp_path, monkeypatch, options):
    """With the groups of their cycle, here the third; and never with the ../base of where one happens to stand."""
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
    merge.main([str(tmp_path / "elsewhere"), str(tmp_path / "merged"), f"--base={tmp_path / 'model'}"])
    assert (logits(hugging_face(tmp_path / "merged")) - logits(model)).abs().max() < 1e-5
    config = tmp_path / "elsewhere" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"operator": "twist"}))
    with pytest.raises(UserError, match="operator = 'twist' is not implemented, only 'truncate'"):
        checkpoint.load(tmp_path / "elsewhere", tmp_path / "model")
    with pytest.raises(UserError, match="is no adapter folder"):
        merge.main([str(out), f"--base={tmp_path / 'model'}"])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny directory that transformers wrote."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama") / "model"
    LlamaForCausalLM(LlamaConfig(vocab_size=257, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(folder)
    return folder


def trained_by_peft(llama, folder, **options):
    """An adapter folder as peft writes it, with numbers in all its tensors; returns peft's model."""
    model = peft.get_peft_model(hugging_face(llama), peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("options", (
    dict(target_modules=["q_proj", "down_proj"]),
    dict(target_modules="all-linear", use_dora=True, lora_dropout=0.1),
    dict(target_modules=r".*\.1\..*(k|gate)_proj", use_rslora=True, init_lora_weights="gaussian"),
    dict(target_modules=["v_proj", "o_proj"], rank_pattern={"v_proj": 2, "layers.1.*o_proj": 6}, alpha_pattern={"1.self_attn.v_proj": 3}),
), ids=str)
def test_pefts_adapters_merge_here(llama, tmp_path, options):
    theirs = trained_by_peft(llama, tmp_path / "adapter", **options)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(llama)
    merge.main([str(tmp_path / "adapter"), str(tmp_path / "merged")])
    expected = logits(theirs)
    torch.testing.assert_close(logits(hugging_face(tmp_path / "merged")), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(theirs.merge_and_unload()), expected, rtol=0, atol=1e-5)
    assert (logits(hugging_face(llama)) - expected).abs().max() > 1e-3


def test_what_is_not_implemented_is_refused_by_its_key(llama, tmp_path):
    folder = tmp_path / "adapter"
    trained_by_peft(llama, folder, target_modules=["q_proj"])
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    good, tensors = json.loads(config.read_text()), load_file(weights)
    for key, value in (("peft_type", "LOHA"), ("lora_bias", True), ("modules_to_save", ["lm_head"]), ("layer_replication", [[0, 2]]), ("bias", "all"),
                       ("fan_in_fan_out", True), ("megatron_config", {"a": 1}), ("init_lora_weights", "pissa"), ("key_of_tomorrow", 1),
                       ("lora_alpha", None), ("mora_type", 5)):
        config.write_text(json.dumps(good | {key: value} | ({"use_mora": True} if key == "mora_type" else {})))
        with pytest.raises(UserError, match=key):
            checkpoint.load(folder)
    config.write_text(json.dumps(good))
    key = next(iter(tensors))
    for change, says in (({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32), "base_model.model.lm_head.lora_B.weight": torch.zeros(257, 4)}, "adapts lm_head"),
                         ({"base_model.model.model.norm.weight": torch.zeros(32)}, "norm.weight is no part"),
                         ({key: torch.zeros(5, 32)}, "lora_A.weight 5 x 32, .*here it takes lora_A.weight 4 x 32"),
                         ({"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.zeros(32)}, "lora_magnitude_vector 32, but here")):
        save_file(tensors | change, weights)
        with pytest.raises(UserError, match=says):
            checkpoint.load(folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="pickled"):
        checkpoint.load(folder)
