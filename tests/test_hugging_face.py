"""Directories that transformers writes are loaded with the same logits."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import evaluate
import mora
import tokenizer
from config import UserError

transformers = pytest.importorskip("transformers")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64, "rope_theta": 500.0}
OTHER_THETA = {"rope_type": "default", "rope_theta": 100.0}
SHAPES = {
    "multi-head": dict(num_key_value_heads=4),
    "grouped-query, tied": dict(num_key_value_heads=2, tie_word_embeddings=True),
    "llama3 rope": dict(num_key_value_heads=1, rope_parameters=LLAMA3, max_position_embeddings=512),
    "rope_theta": dict(num_key_value_heads=4, rope_parameters=OTHER_THETA),
}


def small_llama(vocab_size, **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=56, num_hidden_layers=2,
        num_attention_heads=4, **options)
    return transformers.LlamaForCausalLM(config).eval()


def written(folder, shape, **options):
    """Write a directory with transformers; returns its model."""
    model = small_llama(97, **SHAPES[shape])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    model.save_pretrained(folder, **options)
    return model


def assert_same(folder, model):
    ids = torch.randint(97, (2, 200))
    with torch.no_grad():
        logits = checkpoint.load(folder)[0](ids)
        torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("style", ("new", "old"))
def test_every_shape_and_both_styles_of_rope(tmp_path, shape, style):
    model = written(tmp_path / "hf", shape)
    config = tmp_path / "hf" / "config.json"
    values = json.loads(config.read_text())
    if style == "old":  # transformers 4
        rope = values.pop("rope_parameters")
        values["rope_theta"] = rope.pop("rope_theta")
        values["rope_scaling"] = rope if rope["rope_type"] == "llama3" else None
        config.write_text(json.dumps(values))
    assert_same(tmp_path / "hf", model)


def test_keys_that_a_config_json_lacks_have_transformers_defaults():
    keys = dict(vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=2,
                num_attention_heads=4)
    ours = checkpoint.llama_config({"model_type": "llama", **keys}, "here")
    theirs = transformers.LlamaConfig(**keys)
    for key in ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps",
                "tie_word_embeddings"):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.rope_scaling is None and ours.rope_theta == 10000
    beside = keys | {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}}
    ours = checkpoint.llama_config({"model_type": "llama", **beside}, "here")
    theirs = transformers.LlamaConfig(**beside)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] == 5e5


def test_a_directory_in_bfloat16_is_loaded_in_float32(tmp_path):
    model = small_llama(97).bfloat16()
    model.save_pretrained(tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {p.dtype for p in checkpoint.load(tmp_path / "hf")[0].parameters()} == {torch.float32}
    assert_same(tmp_path / "hf", model.float())


def test_a_tied_matrix_may_be_stored_twice(tmp_path):
    model = written(tmp_path / "hf", "grouped-query, tied")
    file = tmp_path / "hf" / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, file,
              {"format": "pt"})
    assert_same(tmp_path / "hf", model)


def test_a_tied_directory_with_another_head_is_refused(tmp_path):
    """Of two matrices transformers takes both, and warns; the head was dropped here in silence."""
    small_llama(97, tie_word_embeddings=False).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(UserError, match="own: set tie_word_embeddings to false"):
        checkpoint.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(tmp_path, transformers.LlamaForCausalLM.from_pretrained(tmp_path))


def test_weights_in_several_files(tmp_path):
    model = written(tmp_path / "hf", "llama3 rope", max_shard_size="10KB")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    assert_same(tmp_path / "hf", model)
    next((tmp_path / "hf").glob("model-00002*")).unlink()
    with pytest.raises(UserError, match="model-00002.* cannot be read"):
        checkpoint.load(tmp_path / "hf")


def test_transformers_loads_what_is_written_here(tmp_path):
    written(tmp_path / "hf", "llama3 rope")
    ours = checkpoint.load(tmp_path / "hf")[0]
    bytes_tokenizer = tokenizer.load("bytes")
    checkpoint.write_hugging_face(tmp_path / "again", ours.state_dict(), ours, bytes_tokenizer)
    assert checkpoint.load(tmp_path / "again")[0].cfg == ours.cfg
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert_same(tmp_path / "again", theirs)


def test_adapters_train_on_such_a_directory_and_nothing_else_moves(run, tmp_path):
    """The validation loss starts at that of the directory and falls."""
    small_llama(257, num_key_value_heads=2).save_pretrained(tmp_path / "hf")
    out = run(f"--init_from={tmp_path / 'hf'}", "--train_rest=false", "--rank=4", "--lr=0.03")
    lines = (out / "log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["val_loss"] for line in lines if "val_loss" in line]
    validation = evaluate.open_split(json.loads((out / "config.json").read_text())["data"], "val")
    first = evaluate.perplexity(checkpoint.load(tmp_path / "hf")[0], validation, 16, 4)["loss"]
    assert losses[0] == pytest.approx(first, rel=1e-6) and losses[-1] < losses[0]
    before = load_file(tmp_path / "hf" / "model.safetensors")
    after = load_file(checkpoint.steps_of(out)[-1] / "base" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("reentrant", (False, True))
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    ids, gradients = torch.arange(40).view(2, 20), []
    for checkpointing in (False, True):
        model = mora.adapt(small_llama(97), rank=4, operator="rotate", train_rest=True).train()
        for _, parameter in mora.adapter_parameters(model):
            torch.nn.init.constant_(parameter, 0.01)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
