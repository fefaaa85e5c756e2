"""What leaves the house: merged directories, samples, scores. transformers is the judge."""
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import evaluate
import merge
import mora
import sample
from config import UserError

ROOT = Path(__file__).parent.parent


def transformers_model(folder):
    from transformers import LlamaForCausalLM
    model, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("method", (["--method=lora", "--alpha=4"], ["--operator=rotate", "--tie_word_embeddings=true"],
                                    ["--groups=permute", "--restart_every=6", "--restart_warmup=2"]), ids=" ".join)
def test_merged_directory_loads_in_transformers(run, corpus, method, capsys):
    """Strictly, with the adapted model's logits and perplexity; the last case is a ReMoRA checkpoint in its third cycle."""
    out = run(*method)
    merge.main([str(out)])
    printed = float(re.search(r"difference of the logits (\S+)", capsys.readouterr().out).group(1))
    adapted, _, path = checkpoint.load(out)
    assert json.loads((path / "state.json").read_text())["cycle"] == (3 if "--restart_every=6" in method else 0)
    other, ids = transformers_model(out / "merged"), torch.randint(257, (2, 40))
    for _, layer in mora.adapted_layers(adapted):
        layer.merges = False  # two paths, so that the comparison is not of W + dW with itself
    with torch.no_grad():
        difference = (adapted(ids) - other(ids).logits).abs().max()
    assert difference < 1e-4 and printed < 1e-4
    assert mora.adapted_layers(adapted) and any(layer.delta().abs().sum() > 0 for _, layer in mora.adapted_layers(adapted))
    base = transformers_model(path / "base")  # W alone is a Hugging Face directory too, and another function
    with torch.no_grad():
        assert (base(ids).logits - other(ids).logits).abs().max() > 1e-3

    evaluate.main([str(out / "merged"), str(corpus)])
    result = json.loads(capsys.readouterr().out)
    tokens = checkpoint_tokens(corpus)
    nats, count = 0.0, 0
    for start in range(0, len(tokens) - 1, 16):
        window = tokens[None, start:start + 17]
        with torch.no_grad():
            nats += torch.nn.functional.cross_entropy(other(window[:, :-1]).logits[0], window[0, 1:], reduction="sum").item()
        count += window.shape[1] - 1
    assert result["tokens"] == count == len(tokens) - 1
    assert result["ppl"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    manifest = json.loads((corpus / "manifest.json").read_text())["splits"]["val"]
    assert result["bits_per_byte"] == pytest.approx(nats / count * manifest["tokens"] / manifest["bytes"] / math.log(2), rel=1e-4)


def checkpoint_tokens(corpus):
    from shards import Tokens
    tokens = Tokens(corpus, "val")
    return torch.from_numpy(tokens.read(0, len(tokens)))


def test_merge_refuses(run, tmp_path):
    out = run("--steps=10")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    with pytest.raises(UserError, match="is not empty"):
        merge.main([str(out), str(tmp_path / "full")])
    merge.main([str(out), str(tmp_path / "new"), "--dtype=bfloat16"])
    assert checkpoint.read_json(tmp_path / "new" / "config.json")["dtype"] == "bfloat16"
    for path in (tmp_path / "new", checkpoint.steps_of(out)[-1] / "base"):
        with pytest.raises(UserError, match="no adapters"):
            merge.main([str(path), str(tmp_path / "other")])
    with pytest.raises(UserError, match="does not exist"):
        merge.main([str(tmp_path / "nothing")])
    with pytest.raises(UserError, match="holds no checkpoint"):
        merge.main([str(tmp_path / "full")])


def test_a_damaged_checkpoint_is_named(run):
    out = run("--steps=10")
    weights = checkpoint.steps_of(out)[-1] / "base" / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-100])
    with pytest.raises(UserError, match="model.safetensors can ?not be read"):
        checkpoint.load(out)
    config = weights.with_name("config.json")
    weights.write_bytes(good)
    for key, value in (("attention_bias", True), ("model_type", "gpt2"), ("rope_type", {"rope_type": "linear", "factor": 2}), ("mlp_bias", True), ("quantization_config", {})):
        values = checkpoint.read_json(config)
        config.write_text(json.dumps(values | {"rope_scaling" if key == "rope_type" else key: value}))
        with pytest.raises(UserError, match=key):
            checkpoint.load(out)
        config.write_text(json.dumps(values))
    checkpoint.load(out)


def test_sample_streams_from_a_run_and_from_a_directory(run, capsys):
    out = run("--steps=10")
    merge.main([str(out)])
    texts = []
    for path in (out, out / "merged"):
        capsys.readouterr()
        sample.main([str(path), "--prompt=docu", "--max_new_tokens=20", "--seed=3"])
        texts.append(capsys.readouterr().out.split("\n[")[0])
    assert texts[0] == texts[1] and texts[0].startswith("docu") and len(texts[0]) > 4


def commands():
    """The lines of README's ```sh blocks."""
    return [line.strip() for block in re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S) for line in block.splitlines() if line.strip()]


def test_readme_commands_run(tmp_path):
    """The newcomer's path with a few steps appended, in a copy of the tree; what a run prints as next works as printed."""
    for path in [*ROOT.glob("*.py"), ROOT / "configs"]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    listed = commands()
    first = next(c for c in listed if c.endswith("&& torchrun train.py")).partition("&& ")[2]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def shell(command):
        done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    output = shell(f"{first} --steps=3 --eval_tokens=2000 --device=cpu")
    assert "tokens/s" in output and "left" in output and "perplexity" in output
    printed = [line.strip() for line in output.splitlines() if line.startswith("  python")]
    assert [c.split()[1] for c in printed] == ["merge.py", "sample.py"] and set(printed) <= set(listed)
    assert "largest difference" in shell(printed[0])
    assert "tokens/s" in shell(printed[1] + " --max_new_tokens=5")
    shell("python evaluate.py out/tiny_mora data/stdlib --tokens=2000")
    assert "python evaluate.py out/tiny_mora data/stdlib" in listed


def test_readme_names_every_file():
    text = (ROOT / "README.md").read_text()
    for path in ROOT.glob("*.py"):
        assert f"{path.name} " in text, path.name


def test_readme_python_runs():
    """The three lines that adapt any torch module."""
    block = re.search(r"```python\n(import mora.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    from transformers import LlamaConfig, LlamaForCausalLM
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2))
    names = {"model": model, "torch": torch}
    adapt, rest = block.split("...", 1)
    ids = torch.randint(50, (2, 8))
    exec(adapt, names)
    before = model(ids, labels=ids).loss
    before.backward()
    names["optimizer"].step()
    after = model(ids, labels=ids).loss
    assert after < before
    exec(rest, names)
    torch.testing.assert_close(names["model"](ids, labels=ids).loss, after, rtol=0, atol=1e-5)
    assert not mora.adapted_layers(names["model"])


def test_readmes_new_method_obeys_the_laws():
    block = re.search(r"```python\n(class Diagonal.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    names = {"nn": torch.nn, "F": torch.nn.functional, "torch": torch}
    exec(block, names)
    for k, d in ((5, 7), (7, 5)):
        linear, update, x = torch.nn.Linear(k, d), names["Diagonal"](k, d), torch.randn(3, k)
        update.start_cycle(0, None)
        expected = linear(x)
        layer = mora.AdaptedLinear(linear, update)
        assert torch.equal(layer(x), expected)
        torch.nn.init.normal_(update.d)
        torch.testing.assert_close(update(torch.eye(k)).T, layer.delta())
        before = layer(x)
        layer.merge_()
        update.start_cycle(1, None)
        torch.testing.assert_close(layer(x), before)
