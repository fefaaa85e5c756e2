"""What is wrong with a checkpoint is one line that names the file or the key."""
import json

import pytest

import checkpoint
from config import UserError

FOREIGN = {
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "model_type": {"model_type": "gpt2"},
    "rope_type": {"rope_scaling": {"rope_type": "linear", "factor": 2}},
    "quantization_config": {"quantization_config": {}},
}


@pytest.fixture
def step(run):
    return checkpoint.steps_of(run("--steps=10"))[-1]


def test_a_truncated_file_is_named(step):
    weights = step / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="model.safetensors can ?not be read"):
        checkpoint.load(step)


def test_what_is_not_implemented_is_named(step):
    file = step / "base" / "config.json"
    config = checkpoint.read_json(file)
    for key, change in FOREIGN.items():
        file.write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=f"{key} .* is not implemented"):
            checkpoint.load(step)
    file.write_text(json.dumps(config))
    checkpoint.load(step)
