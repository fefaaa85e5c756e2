"""A damaged checkpoint, or a wrong value in a file, is one line: the file, the key, a way out."""
import json
import os
import pickle
import shutil
import zlib

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file, save_file
from test_sft import chat_folder

import checkpoint
import evaluate
import merge
import sample
import train
from config import UserError

WEIGHTS, ADAPTER = "base/model.safetensors", "adapter/adapter_model.safetensors"
CONFIGS = ("base/config.json", "adapter/adapter_config.json")
FILES = (WEIGHTS, ADAPTER, *CONFIGS, "optimizer.pt", "state.json")


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A run with checkpoints at steps 5 and 10, and its config file. Tests work on copies."""
    folder = tmp_path_factory.mktemp("trained")
    config = folder / "tiny.py"
    config.write_text(TINY + f"data, save_every, steps = {str(corpus)!r}, 5, 10\n")
    train.main([str(config), f"--out={folder / 'run'}"])
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    """(run folder, its newest step, a function that resumes it)."""
    out = tmp_path / "run"
    shutil.copytree(trained / "run", out)

    def resume(*words):
        train.main([str(trained / "tiny.py"), f"--out={out}", "--resume", "--steps=12", *words])

    return out, checkpoint.steps_of(out)[-1], resume


class Bomb:
    """Unpickling it creates a file."""
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mknod, (str(self.file),)


def damaged(file, kind, tmp_path):
    """Damage a file in one of several ways."""
    content = file.read_bytes()
    if kind == "missing":
        file.unlink()
    elif kind == "bomb":
        torch.save(Bomb(tmp_path / "exploded"), file)
    elif kind == "pickle":
        file.write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    elif kind == "one bit":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:])
    else:
        file.write_bytes({"truncated": content[:-7], "empty": b"", "list": b"[1, 2]",
                          "deep": b"[" * 100_000, "garbage": bytes(range(256)) * 9}[kind])


def forget_records(step):
    """Remove the checksums from a state.json, so that what reads the files sees the damage."""
    state = json.loads((step / "state.json").read_text())
    (step / "state.json").write_text(json.dumps(state | {"files": {}}))


KINDS = ("truncated", "empty", "missing", "garbage", "list", "deep", "bomb", "pickle")


@pytest.mark.parametrize("name", FILES)
def test_resume_from_a_damaged_checkpoint_is_one_line(copy, name, tmp_path):
    """It names the file, the whole checkpoint and the command, and that command works."""
    out, step, resume = copy
    original = (step / name).read_bytes()
    for kind in KINDS:
        damaged(step / name, kind, tmp_path)
        with pytest.raises(UserError) as caught:
            checkpoint.verify(step)
        text = str(caught.value)
        assert str(step / name) in text and "\n" not in text and "weights_only" not in text, text
        assert f"{out / 'step-00000005'} is whole: `rm -r {step}`" in text, (kind, text)
        assert not (tmp_path / "exploded").exists()
        (step / name).write_bytes(original)
    damaged(step / name, "truncated", tmp_path)
    with pytest.raises(UserError, match="is whole: `rm -r"):
        resume()
    if name == WEIGHTS:
        shutil.rmtree(step)
        resume()
        assert checkpoint.steps_of(out)[-1].name == "step-00000012"


def test_the_newest_whole_checkpoint_is_named_and_what_to_remove(copy, tmp_path):
    out, second, resume = copy
    resume()
    third = checkpoint.steps_of(out)[-1]
    damaged(third / WEIGHTS, "empty", tmp_path)
    with pytest.raises(UserError, match=f"{second} is whole: `rm -r {third}`"):
        checkpoint.verify(third)
    damaged(second / WEIGHTS, "empty", tmp_path)
    first = checkpoint.steps_of(out)[0]
    with pytest.raises(UserError, match=f"{first} is whole: `rm -r {second} {third}`"):
        checkpoint.verify(third)


def test_an_empty_part_of_a_sharded_tensor_is_finite():
    """Of a matrix with fewer rows than there are processes."""
    checkpoint.must_be_finite({"part": torch.empty(0, 3)}, UserError)
    with pytest.raises(UserError, match="second holds nan or inf"):
        checkpoint.must_be_finite({"part": torch.empty(0), "second": torch.tensor([1, torch.nan])},
                                  UserError)


def test_a_checksum_is_of_the_whole_file(tmp_path):
    content = bytes(range(256)) * 70_000  # more than is read at once
    (tmp_path / "large").write_bytes(content)
    record = checkpoint.file_record(tmp_path / "large")
    assert record == {"bytes": len(content), "crc32": zlib.crc32(content)}


@pytest.mark.parametrize("name", (WEIGHTS, ADAPTER, "optimizer.pt"))
def test_one_changed_bit_is_found(copy, name, tmp_path):
    out, step, resume = copy
    damaged(step / name, "one bit", tmp_path)
    with pytest.raises(UserError, match=f"{name} has changed since it was saved"):
        resume()


@pytest.mark.parametrize("name", (WEIGHTS, ADAPTER, *CONFIGS, "state.json"))
def test_the_verbs_name_a_damaged_checkpoint(copy, corpus, name, tmp_path):
    out, step, _ = copy
    damaged(step / name, "truncated", tmp_path)
    for verb, words in ((merge, []), (evaluate, [str(corpus)]), (sample, [])):
        with pytest.raises(UserError, match=f"{name}.*step-00000005 is whole: name it instead"):
            verb.main([str(out), *words])
    merge.main([str(out / "step-00000005"), str(tmp_path / "merged")])


def test_the_verbs_need_no_optimizer(copy, tmp_path):
    out, step, _ = copy
    (step / "optimizer.pt").unlink()
    merge.main([str(out)])


def test_all_damaged_checkpoints_are_told(copy, tmp_path):
    out, step, resume = copy
    for other in checkpoint.steps_of(out):
        damaged(other / WEIGHTS, "empty", tmp_path)
    with pytest.raises(UserError, match="'bytes': 0,.*no older checkpoint in .*run is whole"):
        resume()


def test_tensors_of_other_shapes_are_named(copy):
    out, step, resume = copy
    forget_records(step)
    optimizer = torch.load(step / "optimizer.pt", weights_only=True)
    moments = optimizer["state"][0]
    moments["exp_avg"] = moments["exp_avg"][:1]
    torch.save(optimizer, step / "optimizer.pt")
    with pytest.raises(UserError, match="optimizer.pt does not fit the optimizer: exp_avg has the "
                       r"shape \(1, .*\), its parameter \("):
        resume()
    torch.save({"state": {}, "param_groups": []}, step / "optimizer.pt")
    with pytest.raises(UserError, match="optimizer.pt does not fit the optimizer"):
        resume()
    tensors = load_file(step / WEIGHTS)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:3].clone()
    save_file(tensors, step / WEIGHTS)
    with pytest.raises(UserError, match="the weights do not fit the model: .*model.norm.weight"):
        resume()


def test_a_state_of_another_form_is_named(copy):
    _, step, resume = copy
    state = json.loads((step / "state.json").read_text())
    for change in ({"step": "10"}, {"cycle": None}, {"config": []}, {"files": [1]},
                   {"files": {"optimizer.pt": 3}}, {"fp8_scales": [1]}, {"corpus": None}):
        (step / "state.json").write_text(json.dumps(state | change))
        with pytest.raises(UserError, match=f"state.json.*{next(iter(change))}.*step-00000005 is"):
            resume()


# ------------------------------------------------------------
# what is never saved, and what a save leaves

@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")))
def test_save_refuses_one_bad_number(trained, bad, tmp_path):
    model, tok, step = checkpoint.load(trained / "run")
    cfg = train.config.load([str(trained / "tiny.py"), f"--out={tmp_path}"], default=None)
    weights = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(weights.values())
    checkpoint.save(cfg, 1, 0, model, optimizer, tok)
    with torch.no_grad():
        weights["model.norm.weight"][3] = bad
    with pytest.raises(UserError, match="step 2: model.norm.weight holds nan or inf; "
                                        "the last good checkpoint is .*step-00000001"):
        checkpoint.save(cfg, 2, 0, model, optimizer, tok)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_state_records_every_file_beside_it(trained, tmp_path):
    """With a tokenizer of a folder its files too, the chat template among them."""
    model, _, _ = checkpoint.load(trained / "run")
    tok = chat_folder(tmp_path / "chat")
    cfg = train.config.load([str(trained / "tiny.py"), f"--out={tmp_path / 'out'}"], default=None)
    checkpoint.save(cfg, 1, 0, model, torch.optim.AdamW(model.parameters()), tok)
    step, = checkpoint.steps_of(tmp_path / "out")
    files = {path.relative_to(step).as_posix() for path in step.rglob("*") if path.is_file()}
    assert checkpoint.read_state(step)["files"].keys() == files - {"state.json"}
    assert {"base/tokenizer.json", "base/chat_template.jinja"} < files


@pytest.mark.parametrize("limit", (20_000, 45_000))
def test_a_full_disk_is_one_line_and_leaves_no_trace(trained, tmp_path, limit):
    """20 kB: the weights do not fit; 45 kB: they do, the optimizer's state does not."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(UserError, match="step-00000005 cannot be written: ") as caught:
            train.main([str(trained / "tiny.py"), f"--out={tmp_path / 'run'}"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path / "run")) == ["config.json", "log.jsonl"]


def test_two_merges_into_one_target_do_not_mix(copy, tmp_path, monkeypatch):
    """The other process finishes while this one writes."""
    out, _, _ = copy
    write = checkpoint.write_hugging_face

    def write_and_be_overtaken(folder, *arguments):
        write(folder, *arguments)
        (tmp_path / "target").mkdir()
        (tmp_path / "target" / "of_another").touch()

    monkeypatch.setattr(checkpoint, "write_hugging_face", write_and_be_overtaken)
    with pytest.raises(UserError, match="target cannot be written: .*Directory not empty"):
        merge.main([str(out), str(tmp_path / "target")])
    assert sorted(os.listdir(tmp_path)) == ["run", "target"]
    assert os.listdir(tmp_path / "target") == ["of_another"]


# ------------------------------------------------------------
# config.json and the index of any directory

ROPE = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
        "original_max_position_embeddings": 64}
WRONG = [
    ({"attention_bias": True}, "attention_bias True is not implemented"),
    ({"mlp_bias": True}, "mlp_bias True is not implemented"),
    ({"model_type": "gpt2"}, "model_type 'gpt2' is not implemented"),
    ({"model_type": ["llama"]}, "model_type .'llama'. is not implemented"),
    ({"quantization_config": {}}, "quantization_config {} is not implemented"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, "rope_type 'linear' is not impl"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type 'linear' is not implemented"),
    ({"rope_scaling": [1]}, "rope_scaling must be JSON objects, got {} and .1."),
    ({"rope_parameters": "x"}, "rope_parameters and .* must be JSON objects, got 'x'"),
    ({"rope_scaling": {"rope_type": "llama3"}}, "factor must be a number from .*, got None"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4,
                       "high_freq_factor": 4, "original_max_position_embeddings": 64}},
     "low_freq_factor 4 is not below"),
    *[(dict(zip(("rope_parameters", "rope_scaling"), pair, strict=True)) | more,
       "rope_parameters .* and rope_scaling .* differ: drop one$") for pair, more in (
        (({"rope_type": "default"}, ROPE), {}), ((ROPE, {"type": "default"}), {}),
        ((ROPE, ROPE | {"factor": 4}), {}), ((ROPE | {"rope_theta": 5e5}, ROPE), {}),
        ((ROPE, ROPE | {"rope_theta": 5e5}), {}))],
    ({"rope_scaling": {"rope_type": "linear"}, "rope_parameters": ROPE}, "rope_type 'linear' is"),
    ({"rope_theta": 0}, "rope_theta must be a number from 1e-30 to .*, got 0"),
    ({"rope_theta": "1e4"}, "rope_theta must be a number from 1e-30 to .*, got '1e4'"),
    ({"rope_theta": float("nan")}, "rope_theta must be a number from 1e-30 to .*, got nan"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps must be a number from 0 to .*, got -1e-06"),
    ({"rms_norm_eps": []}, "rms_norm_eps must be a number"),
    ({"num_attention_heads": 0}, "num_attention_heads must be a whole number from 1 to .*, got 0"),
    ({"num_key_value_heads": 3}, "num_attention_heads 2 must be a multiple of num_key_value_heads"),
    ({"hidden_size": "16"}, "hidden_size must be a whole number from 1 to .*, got '16'"),
    ({"hidden_size": 16.5}, "hidden_size must be a whole number"),
    ({"hidden_size": 18}, "hidden_size 18 must be an even multiple"),
    ({"hidden_size": True}, "hidden_size must be a whole number"),
    ({"hidden_size": 32, "head_dim": None},
     "the weights do not fit the model"),
    ({"head_dim": "8"}, "head_dim '8' is not implemented, only None and 8"),
    ({"vocab_size": -5}, "vocab_size must be a whole number from 1 to .*, got -5"),
    ({"vocab_size": 2 ** 28}, "the weights do not fit the model"),
    ({"vocab_size": 2 ** 28, "hidden_size": 2 ** 28, "head_dim": None},
     "the weights do not fit the model"),
    ({"vocab_size": 10 ** 30}, "vocab_size must be a whole number from 1 to 268435456, got 1000"),
    ({"intermediate_size": 2 ** 28 + 1}, "intermediate_size must be a whole number from 1 to"),
    ({"intermediate_size": None}, "intermediate_size must be a whole number .*, got None"),
    ({"num_hidden_layers": 10 ** 8}, "num_hidden_layers is 100000000, but the directory holds"),
    ({"num_hidden_layers": 3}, "the weights do not fit the model: .*Missing key"),
    ({"max_position_embeddings": {}}, "max_position_embeddings must be a whole number"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings 'false' is not implemented"),
    ({"tokenizer": 3}, "tokenizer must be a name, got 3"),
]


@pytest.fixture
def directory(trained, tmp_path):
    """A Hugging Face directory."""
    return shutil.copytree(checkpoint.steps_of(trained / "run")[-1] / "base", tmp_path / "model")


@pytest.mark.parametrize("change, line", WRONG, ids=[str(change)[:50] for change, _ in WRONG])
def test_wrong_values_in_config_json_are_named(directory, change, line):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=line) as caught:
        checkpoint.load(directory)
    assert str(directory) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("new, old", [
    (ROPE, ROPE), (ROPE | {"factor": 8.0, "rope_theta": 5e5}, ROPE),
    ({"rope_type": "default", "rope_theta": 5e5}, {"type": "default"})])
def test_rope_may_stand_in_both_places_if_they_agree(new, old):
    keys = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "vocab_size": 257,
            "num_hidden_layers": 1, "num_attention_heads": 2}
    alone, both = (checkpoint.llama_config(keys | {"rope_parameters": new} | more, "here")
                   for more in ({}, {"rope_scaling": old}))
    assert alone == both and alone.rope_theta == new.get("rope_theta", 10000)


def test_null_in_config_json_is_the_default(directory):
    file = directory / "config.json"
    nulls = dict.fromkeys(("tie_word_embeddings", "attention_bias", "rope_scaling", "head_dim"))
    file.write_text(json.dumps(json.loads(file.read_text()) | nulls))
    assert checkpoint.load(directory)[0].cfg.tie_word_embeddings is False


def test_config_json_of_another_form_is_named(directory):
    for text, line in (("[1, 2]", "must hold a JSON object"), ("{", "can ?not be read"),
                       ("", "can ?not be read"), ("[" * 100_000, "be read: maximum recursion")):
        (directory / "config.json").write_text(text)
        with pytest.raises(UserError, match=f"config.json.* {line}"):
            checkpoint.load(directory)


def test_an_index_of_another_form_is_named(directory):
    index = directory / "model.safetensors.index.json"
    index.write_text("[]")  # not read beside a whole file, as in transformers
    checkpoint.load(directory)
    (directory / "model.safetensors").unlink()
    for value in ([], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 3}},
                  {"weight_map": {"a": "../model.safetensors"}},
                  {"weight_map": {"a": "/etc/passwd"}}):
        index.write_text(json.dumps(value))
        with pytest.raises(UserError, match="index.json.*(JSON object|weight_map must)"):
            checkpoint.load(directory)
    index.write_text(json.dumps({"weight_map": {"a": "absent.safetensors"}}))
    with pytest.raises(UserError, match="absent.safetensors can ?not be read"):
        checkpoint.load(directory)


def test_rotations_in_an_older_directory_are_left_out(directory):
    """Older files of Llama hold them; transformers, too, computes them anew."""
    file, whole = directory / "model.safetensors", checkpoint.load(directory)[0].state_dict()
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    save_file(load_file(file) | old, file)
    torch.testing.assert_close(checkpoint.load(directory)[0].state_dict(), whole, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", (torch.int8, torch.bool, torch.complex64))
def test_weights_of_a_directory_that_are_no_floats_are_named(directory, dtype):
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(dtype)
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(UserError, match=f"model.norm.weight must be floats, got {dtype}$"):
        checkpoint.load(directory)


def test_weights_of_a_directory_that_are_not_finite_are_named(directory):
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"][1] = float("nan")
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(UserError, match=f"{directory}: model.norm.weight holds nan or inf"):
        checkpoint.load(directory)


def test_a_step_without_its_record_is_not_loaded(copy):
    """Without state.json nothing tells that adapter/ is missing."""
    _, step, _ = copy
    (step / "state.json").unlink()
    shutil.rmtree(step / "adapter")
    with pytest.raises(UserError, match="state.json cannot be read.*step-00000005 is whole: name"):
        checkpoint.load(step)


def test_seq_len_of_another_kind_is_named(directory, corpus):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"seq_len": "16"}))
    with pytest.raises(UserError, match="seq_len must be a whole number from 1 to .*, got '16'"):
        evaluate.main([str(directory), str(corpus)])


# ------------------------------------------------------------
# the best checkpoint

def save_steps(trained, out, losses, *words):
    """Save steps 1, 2, ... with these validation losses; returns the names of what is kept."""
    model, tok, _ = checkpoint.load(trained / "run")
    cfg = train.config.load([str(trained / "tiny.py"), f"--out={out}", "--keep=2", *words], None)
    optimizer = torch.optim.AdamW(model.parameters())
    for step, loss in enumerate(losses, 1):
        checkpoint.save(cfg, step, 0, model, optimizer, tok, loss)
    return [int(path.name[5:]) for path in checkpoint.steps_of(out)]


@pytest.mark.parametrize("losses, kept", [
    ((3.0, 1.0, 2.0, 2.5, 2.6), [2, 4, 5]), ((3.0, 2.0, 1.0), [2, 3]), ((None, None, None), [2, 3]),
    ((2.0, None, None, 1.0, None, None), [4, 5, 6]), ((float("nan"), 2.0, 3.0, 4.0), [2, 3, 4]),
], ids=str)
def test_the_best_is_kept_beside_the_newest(trained, tmp_path, losses, kept):
    assert save_steps(trained, tmp_path / "run", losses, "--keep_best") == kept


def test_without_keep_best_the_newest_are_kept(trained, tmp_path):
    assert save_steps(trained, tmp_path / "run", (1.0, 2.0, 3.0, 4.0)) == [3, 4]


def test_the_verbs_take_the_best(trained, tmp_path, corpus, capsys):
    out = tmp_path / "run"
    save_steps(trained, out, (3.0, 1.0, 2.0), "--keep_best")
    (out / "step-00000003" / "state.json").write_text("{")  # passed over, as it is not the best
    evaluate.main([str(out), str(corpus), "--best"])
    result = json.loads(capsys.readouterr().out)
    assert result["checkpoint"] == str(out / "step-00000002")
    sample.main([str(out), "--best", "--max_new_tokens=3"])
    merge.main([str(out), "--best"])
    assert (out / "merged" / "model.safetensors").exists()
    with pytest.raises(UserError, match="state.json can ?not be read.*step-00000002 is whole"):
        checkpoint.load(out)
    with pytest.raises(UserError, match="has no checkpoint with a validation loss"):
        save_steps(trained, tmp_path / "unscored", (None,))
        checkpoint.load(tmp_path / "unscored", best=True)


@pytest.mark.parametrize("method", ("lora", "full"))
def test_a_step_that_its_run_removes_while_it_is_read_is_whole_or_an_error(
        run, monkeypatch, method):
    """A base without its update, or without the length of its training, would give other scores."""
    def read_and_remove(folder):
        found = read(folder)
        shutil.rmtree(folder.parent)
        return found

    out, read = run(f"--method={method}", "--steps=2", "--warmup=1"), checkpoint.read_hugging_face
    monkeypatch.setattr(checkpoint, "read_hugging_face", read_and_remove)
    if method == "full":
        assert checkpoint.load(out)[0].trained_seq_len == 16
    else:
        with pytest.raises(UserError, match="adapter_config.json cannot be read"):
            checkpoint.load(out)
