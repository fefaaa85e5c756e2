"""Directories that transformers writes are read as they are meant."""
import json

import pytest
import torch

import checkpoint
import evaluate
import tokenizer
from config import UserError

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 500.0}
SHAPES = {
    "multi-head": dict(num_key_value_heads=4),
    "grouped-query, tied": dict(num_key_value_heads=2, tie_word_embeddings=True),
    "llama3 rope": dict(num_key_value_heads=1, rope_parameters=LLAMA3, max_position_embeddings=512),
    "rope_theta": dict(num_key_value_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 100.0}),
}


def written(folder, shape, **options):
    """A directory written by transformers, and its model."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, **SHAPES[shape])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    model.save_pretrained(folder, **options)
    return model


def assert_same(folder, model):
    ids = torch.randint(97, (2, 200))
    with torch.no_grad():
        torch.testing.assert_close(checkpoint.load(folder)[0](ids), model(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("style", ("new", "old"))
def test_every_shape_and_both_styles_of_rope(tmp_path, shape, style):
    model = written(tmp_path / "hf", shape)
    config = tmp_path / "hf" / "config.json"
    values = json.loads(config.read_text())
    if style == "old":  # transformers 4
        rope = values.pop("rope_parameters")
        values |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope if rope["rope_type"] == "llama3" else None}
        config.write_text(json.dumps(values))
    assert_same(tmp_path / "hf", model)


def test_sharded_weights_and_what_we_write_back(tmp_path):
    model = written(tmp_path / "hf", "llama3 rope", max_shard_size="10KB")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    assert_same(tmp_path / "hf", model)
    ours = checkpoint.load(tmp_path / "hf")[0]
    checkpoint.write_hugging_face(tmp_path / "again", ours.state_dict(), ours.cfg, tokenizer.load("bytes"))
    assert checkpoint.load(tmp_path / "again")[0].cfg == ours.cfg
    from transformers import LlamaForCausalLM
    assert_same(tmp_path / "again", LlamaForCausalLM.from_pretrained(tmp_path / "again").eval())
    next((tmp_path / "hf").glob("model-00002*")).unlink()
    with pytest.raises(UserError, match="model-00002.* can not be read"):
        checkpoint.load(tmp_path / "hf")


def test_training_starts_from_such_a_directory(run, tmp_path):
    """Adapters alone on a frozen directory: the loss begins at transformers' and falls, and only the adapters moved."""
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=257, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(tmp_path / "hf")
    out = run(f"--init_from={tmp_path / 'hf'}", "--train_rest=false", "--rank=4", "--lr=0.03")
    values = [json.loads(line)["val_loss"] for line in (out / "log.jsonl").read_text().splitlines() if "val_loss" in line]
    data = json.loads((out / "config.json").read_text())["data"]
    start = evaluate.perplexity(checkpoint.load(tmp_path / "hf")[0], evaluate.open_split(data, "val"), 16, 4)["loss"]
    assert values[0] == pytest.approx(start, rel=1e-6) and values[-1] < values[0]
    before, after = load_file(tmp_path / "hf" / "model.safetensors"), load_file(checkpoint.steps_of(out)[-1] / "base" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
