"""What a run leaves for other tools: merged directories, samples, scores. transformers judges."""
import itertools
import json
import math
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import config
import data
import evaluate
import merge
import mora
import sample
import train
from config import UserError
from model import Llama, LlamaConfig
from shards import Tokens

ROOT = Path(__file__).parent.parent
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 2}


def transformers_model(folder):
    """The model of a directory, loaded strictly."""
    from transformers import LlamaForCausalLM
    model, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


REMORA = ["--groups=permute", "--restart_every=3", "--restart_warmup=2"]
METHODS = (["--method=lora", "--alpha=4"], ["--operator=rotate", "--tie_word_embeddings=true"],
           REMORA)


@pytest.mark.parametrize("method", METHODS, ids=" ".join)
@torch.no_grad()
def test_merged_directory_loads_in_transformers(run, method, capsys):
    """With the adapted model's logits; the last method's checkpoint is in its third cycle."""
    with torch.enable_grad():
        out = run(*method, "--steps=10")
    merge.main([str(out)])
    printed = re.search(r"difference of the logits (\S+)", capsys.readouterr().out).group(1)
    adapted, _, path = checkpoint.load(out)
    state = json.loads((path / "state.json").read_text())
    assert state["cycle"] == (3 if method == REMORA else 0)
    layers = [layer for _, layer in mora.adapted_layers(adapted)]
    assert any(layer.update.delta().abs().sum() > 0 for layer in layers)
    for layer in layers:
        layer.merges = False  # two paths, so that W + dW is not compared with itself
    merged, ids = transformers_model(out / "merged"), torch.randint(257, (2, 40))
    difference = (adapted(ids) - merged(ids).logits).abs().max()
    assert difference < 1e-4 and float(printed) < 1e-4
    assert (out / "merged" / "tokenizer.json").exists()
    base = transformers_model(path / "base")  # W alone loads too, and is another function
    assert (base(ids).logits - merged(ids).logits).abs().max() > 1e-3


@torch.no_grad()
def test_perplexity_of_a_merged_directory_is_transformers(run, corpus, capsys):
    with torch.enable_grad():
        out = run("--steps=10")
    merge.main([str(out)])
    capsys.readouterr()
    evaluate.main([str(out / "merged"), str(corpus)])
    result = json.loads(capsys.readouterr().out)
    model = transformers_model(out / "merged")
    split = Tokens(corpus, "val")
    tokens = torch.from_numpy(split.read(0, len(split)))
    nats, count = 0.0, 0
    for first in range(0, len(tokens) - 1, 16):
        window = tokens[None, first:first + 17]
        logits = model(window[:, :-1]).logits[0]
        losses = torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none")
        nats, count = nats + losses.sum().item(), count + len(losses)
    assert result["tokens"] == count == len(tokens) - 1
    assert result["ppl"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    totals = json.loads((corpus / "manifest.json").read_text())["splits"]["val"]
    bits_per_token = nats / count / math.log(2)
    bits_per_byte = bits_per_token * totals["tokens"] / totals["bytes"]
    assert result["bits_per_byte"] == pytest.approx(bits_per_byte, rel=1e-4)


@pytest.mark.parametrize("seq_len", (8, 32))
def test_evaluate_prints_the_log_s_figure_after_init_from(run, corpus, capsys, seq_len):
    """With the window of the run, not of the model that it started from (16)."""
    first = run("--steps=10")
    out = first.with_name("second")
    run(f"--init_from={first}", f"--out={out}", f"--seq_len={seq_len}", "--steps=10")
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    expected = [line["val_loss"] for line in logged if "val_loss" in line][-1]
    step = checkpoint.steps_of(out)[-1]
    merge.main([str(out)])
    for path in (out, step / "adapter", out / "merged"):
        capsys.readouterr()
        evaluate.main([str(path), str(corpus)])
        loss = json.loads(capsys.readouterr().out)["loss"]
        assert loss == pytest.approx(expected, rel=1e-5), path
    assert checkpoint.load(step / "base")[0].trained_seq_len == seq_len
    evaluate.main([str(out), str(corpus), "--seq_len=16"])
    assert json.loads(capsys.readouterr().out)["loss"] != pytest.approx(expected, rel=1e-4)


def test_a_merged_adapter_of_a_step_stands_beside_the_steps(run, tmp_path):
    """Inside the step it would be removed with it. An adapter elsewhere has merged/ beside it."""
    out = run("--steps=2")
    step = checkpoint.steps_of(out)[-1]
    merge.main([str(step / "adapter")])
    assert (out / "merged").is_dir() and not (step / "merged").exists()
    shutil.copytree(step / "adapter", tmp_path / "elsewhere" / "adapter")
    merge.main([str(tmp_path / "elsewhere" / "adapter"), f"--base={step / 'base'}"])
    assert (tmp_path / "elsewhere" / "merged").is_dir()
    with pytest.raises(UserError, match="lies in a step, which its run may remove"):
        merge.main([str(out), str(step / "adapter" / "merged")])


def test_a_link_is_the_directory_that_it_names(run, tmp_path):
    """Also one called base, as the directory of a checkpoint is."""
    out, link = run("--steps=2", "--seq_len=8"), tmp_path / "base"
    merge.main([str(out)])
    link.symlink_to(out / "merged")
    assert checkpoint.load(link)[0].trained_seq_len == 8


def test_a_state_without_the_key_in_config_json_tells_the_length(run):
    """As checkpoints of 2026-11-24 and before."""
    step = checkpoint.steps_of(run("--steps=2", "--seq_len=8"))[-1]
    for file, old in ((step / "base" / "config.json", {"seq_len": None}),
                      (step / "state.json", {"files": {}})):  # no checksum of config.json
        file.write_text(json.dumps(json.loads(file.read_text()) | old))
    assert checkpoint.load(step)[0].trained_seq_len == 8


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


@pytest.mark.parametrize("wrong", (lambda delta: 0 * delta, lambda delta: math.nan * delta))
def test_a_merge_that_changes_the_function_is_refused(monkeypatch, wrong):
    """The sum is compared with the operator's own maps, not with itself."""
    model = Llama(LlamaConfig(vocab_size=65, **SHAPE), seed=0)
    mora.adapt(model, rank=4)
    for _, parameter in mora.adapter_parameters(model):
        torch.nn.init.normal_(parameter)
    merged, difference = merge.merged_model(model, "here")
    assert difference < 1e-4 and not mora.adapted_layers(merged) and mora.adapted_layers(model)
    delta = mora.Square.delta
    monkeypatch.setattr(mora.Square, "delta", lambda square: wrong(delta(square)))
    with pytest.raises(UserError, match="nothing was written; is here damaged"):
        merge.merged_model(model, "here")


def test_a_merge_keeps_no_file_of_a_killed_one(run, tmp_path):
    out, left = run("--steps=2"), tmp_path / ".writing-merged" / "new"
    left.mkdir(parents=True)
    (left / "chat_template.jinja").write_text("of another model")
    merge.main([str(out), str(tmp_path / "merged")])
    assert not (tmp_path / "merged" / "chat_template.jinja").exists()
    assert [path.name for path in tmp_path.glob("*merged*")] == ["merged"]


def test_a_corpus_of_another_tokenizer_is_not_scored(run, corpus, tmp_path):
    out, other = run("--steps=2"), shutil.copytree(corpus, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": "gpt2"}))
    with pytest.raises(UserError, match="has the tokenizer bytes, .* was prepared with gpt2"):
        evaluate.main([str(out), str(other)])


def test_sample_streams_from_a_run_and_from_a_directory(run, capsys):
    out = run("--steps=10")
    merge.main([str(out)])
    texts = []
    for path, *words in ((out, "--seed=3"), (out / "merged", "--seed=3"), (out, "--seed=4"),
                         (out, "--temperature=0"), (out, "--top_k=1")):
        capsys.readouterr()
        sample.main([str(path), "--prompt=docu", "--max_new_tokens=20", *words])
        texts.append(capsys.readouterr().out.split("\n[")[0])
    assert texts[0] == texts[1] and texts[0].startswith("docu") and len(texts[0]) > 4
    assert texts[3] == texts[4] and len({*texts}) == 3  # the likeliest; another seed, another text


def test_a_mora_run_becomes_a_lora_that_peft_loads(run, tmp_path, capsys):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    out, target = run("--steps=10"), tmp_path / "lora"
    merge.main([str(out), str(target), "--as_lora"])
    assert "a LoRA of rank" in capsys.readouterr().out
    base = checkpoint.steps_of(out)[-1] / "base"
    config = checkpoint.read_json(target / "adapter_config.json")
    assert config["base_model_name_or_path"] == str(base)
    merge.main([str(base.parent / "adapter"), str(tmp_path / "of_adapter"), "--as_lora"])
    assert checkpoint.read_json(tmp_path / "of_adapter" / "adapter_config.json") == config
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), target)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        ours = checkpoint.load(out)[0](ids)
        assert (ours - theirs(ids).logits).abs().max() < 1e-5
    merge.main([str(out), str(tmp_path / "half"), "--as_lora", "--dtype=bfloat16"])
    for name, dtype in (("lora", torch.float32), ("half", torch.bfloat16)):
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    merge.main([str(out), str(tmp_path / "cut"), "--as_lora", "--rank=3"])
    assert checkpoint.read_json(tmp_path / "cut" / "adapter_config.json")["r"] == 3 < config["r"]
    with pytest.raises(UserError, match="needs a TARGET"):
        merge.main([str(out), "--as_lora"])
    with pytest.raises(UserError, match="exists and is not empty"):
        merge.main([str(out), str(target), "--as_lora"])
    with pytest.raises(UserError, match="needs --as_lora"):
        merge.main([str(out), "--rank=4"])


# ------------------------------------------------------------
# README

def readme_block(pattern):
    return re.search(pattern, (ROOT / "README.md").read_text(), re.S).group(1)


def readme_commands():
    """The commands of README's ```sh blocks, each on one line."""
    text = (ROOT / "README.md").read_text().replace("\\\n    ", "")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """call("torchrun train.py", "--steps=3"): stdout of a command of README in an empty folder."""
    mains = {"train.py": train.main, "merge.py": merge.main, "sample.py": sample.main,
             "evaluate.py": evaluate.main}
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)
    texts = data.stdlib_texts
    monkeypatch.setattr(data, "stdlib_texts", lambda: itertools.islice(texts(), 110))

    def start(command, *more):
        _, script, *words = shlex.split(command)
        mains[script]([*words, *more])
        return capsys.readouterr().out

    yield start
    for name, handler in handlers.items():
        signal.signal(name, handler)


def test_readme_commands_run(call):
    """The newcomer's commands, cut to a few steps, and what a run prints as the next commands."""
    listed = readme_commands()
    first = next(c for c in listed if c.endswith("&& torchrun train.py")).partition("&& ")[2]
    output = call(first, "--steps=3", "--batch_size=2", "--eval_tokens=2000", "--device=cpu")
    assert "tokens/s" in output and "left" in output and "perplexity" in output
    merging, sampling = (line.strip() for line in output.splitlines() if "  python" in line)
    evaluating = "python evaluate.py out/tiny_mora data/stdlib"
    assert {merging, sampling, evaluating} <= set(listed)
    assert "difference of the logits" in call(merging)
    assert "tokens/s" in call(sampling, "--max_new_tokens=5")
    assert "bits_per_byte" in call(evaluating, "--tokens=2000")


class Parsed(Exception):
    """A command has read its words and begins to work."""


def test_readme_commands_parse(monkeypatch):
    """Configs, variants, keys and options of README's commands exist."""
    def begin(*_, **__):
        raise Parsed

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(checkpoint, "load", begin)
    commands = {name: (begin, options) for name, (_, options) in data.COMMANDS.items()}
    monkeypatch.setattr(data, "COMMANDS", commands)
    modules = {"data.py": data, "evaluate.py": evaluate, "sample.py": sample, "merge.py": merge}
    parsed = 0
    for command in readme_commands():
        words = shlex.split(command.rpartition("&& ")[2])
        script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        if script is None or {"--help", "--configs"} & set(words):
            continue
        name, arguments = words[script], words[script + 1:]
        if name == "train.py":
            config.load(arguments, ROOT / "configs/tiny_mora.py")
        elif name in modules:
            with pytest.raises(Parsed):
                modules[name].main(arguments)
        else:
            continue
        parsed += 1
    assert parsed >= 17


def test_readme_names_every_file():
    text = (ROOT / "README.md").read_text()
    for path in ROOT.glob("*.py"):
        assert f"{path.name} " in text, path.name


def test_readme_python_runs():
    """The lines that adapt any torch module."""
    from transformers import LlamaConfig, LlamaForCausalLM
    block = readme_block(r"```python\n(import mora.*?)```")
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **SHAPE))
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
    names = {"nn": torch.nn, "F": torch.nn.functional, "torch": torch}
    exec(readme_block(r"```python\n(class Diagonal.*?)```"), names)
    for k, d in ((5, 7), (7, 5)):
        linear, update, x = torch.nn.Linear(k, d), names["Diagonal"](k, d), torch.randn(3, k)
        update.start_cycle(0, None)
        expected = linear(x)
        layer = mora.AdaptedLinear(linear, update)
        assert torch.equal(layer(x), expected)
        torch.nn.init.normal_(update.d)
        torch.testing.assert_close(update(torch.eye(k)).T, layer.update.delta())
        before = layer(x)
        layer.merge_()
        update.start_cycle(1, None)
        torch.testing.assert_close(layer(x), before)
