"""Checkpoints: directories of safetensors and JSON. Weights are never pickled.

    out/<run>/step-00002000/base/      a Hugging Face directory: the weights without the update
    out/<run>/step-00002000/adapter/   the update, see adapters.py; peft loads LoRA and DoRA
    out/<run>/step-00002000/           optimizer.pt, state.json

A directory appears whole or not at all: it is written under a temporary name and then renamed.
"""
import dataclasses
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

import adapters
import mora
import tokenizer
from adapters import read_tensors
from config import UserError, read_json, write_json
from model import Llama, LlamaConfig

SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
         "rope_theta", "tie_word_embeddings")
# keys of LLaMA-3's rope scaling
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# keys of config.json of which some values are implemented, with their default and those values
IMPLEMENTED = {
    "model_type": (None, ("llama",)),
    "hidden_act": ("silu", ("silu",)),
    "attention_bias": (False, (False,)),
    "mlp_bias": (False, (False,)),
    "quantization_config": (None, (None,)),
}


# ------------------------------------------------------------
# Hugging Face directories

def write_hugging_face(folder, weights, cfg, tok, seq_len=None):
    """Write a directory that transformers loads: model.safetensors and config.json.

    weights: {name: tensor}. cfg: LlamaConfig. tok: see tokenizer.load, or None if unknown.
    seq_len: tokens per sequence in training, or None. config.json holds the tokenizer's name and
    seq_len under two keys that transformers ignores.
    """
    folder.mkdir(parents=True, exist_ok=True)
    on_cpu = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    save_file(on_cpu, folder / "model.safetensors", {"format": "pt"})
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": dtype,
              "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
              "head_dim": cfg.head_dim, "bos_token_id": None, "eos_token_id": None,
              "tokenizer": None, "seq_len": seq_len}
    if tok:
        tok.keep(folder)
        config |= {"bos_token_id": tok.start[0], "eos_token_id": tok.end, "tokenizer": tok.name}
    config |= {key: getattr(cfg, key) for key in SHAPE}
    config["rope_scaling"] = None
    if cfg.rope_scaling:
        config["rope_scaling"] = {"rope_type": "llama3", **cfg.rope_scaling}
    write_json(folder / "config.json", config)


def llama_config(config, where):
    """The LlamaConfig of a Hugging Face config.json (a dict).

    The keys of RoPE stand at the top with `rope_scaling` beside them (transformers 4), or
    together in `rope_parameters` (transformers 5). Raises UserError that names `where` and the key
    that is missing or not implemented.
    """
    def must_be(key, value, implemented):
        if value not in implemented:
            listed = " and ".join(map(repr, implemented))
            raise UserError(f"{where}: {key} {value!r} is not implemented, only {listed}")

    for key, (default, implemented) in IMPLEMENTED.items():
        must_be(key, config.get(key, default), implemented)
    rope = config.get("rope_parameters")
    if not rope:
        rope = {"rope_theta": config.get("rope_theta", 10000.0)}
        rope |= config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    must_be("rope_type", rope_type, ("default", "llama3"))
    values = {key: config[key] for key in SHAPE if config.get(key) is not None}
    values["rope_theta"] = rope.get("rope_theta", 10000.0)
    values.setdefault("num_key_value_heads", config.get("num_attention_heads"))
    try:
        if rope_type == "llama3":
            values["rope_scaling"] = {key: rope[key] for key in LLAMA3}
        cfg = LlamaConfig(**values)
    except (KeyError, TypeError) as error:
        raise UserError(f"{where} lacks a key: {error}") from None
    head_dim = config.get("head_dim") or cfg.head_dim
    if head_dim != cfg.head_dim:
        raise UserError(f"{where}: head_dim {head_dim} is not hidden_size / num_attention_heads = "
                        f"{cfg.head_dim}")
    return cfg


def read_hugging_face(folder):
    """(Llama in float32, tokenizer or None) of a Hugging Face directory."""
    config = read_json(folder / "config.json")
    model = Llama(llama_config(config, folder / "config.json"))
    load_weights(model, base_weights(folder), folder)
    if config.get("tokenizer"):
        return model, tokenizer.load(config["tokenizer"], folder)
    if (folder / "tokenizer.json").exists():
        return model, tokenizer.load(str(folder))
    return model, None


def base_weights(folder):
    """{name: tensor} of a Hugging Face directory: of one file, or of several with an index."""
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        files = sorted(set(read_json(index)["weight_map"].values()))
    weights = {}
    for file in files:
        weights |= read_tensors(folder / file)
    return weights


def load_weights(model, weights, where):
    """Copy {name: tensor} into a model. The names must be exactly the model's."""
    if model.cfg.tie_word_embeddings:
        weights.pop("lm_head.weight", None)  # some directories hold the shared matrix twice
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: the weights do not fit the model: {reason}") from None


# ------------------------------------------------------------
# checkpoints of a run

def save(cfg, step, cycle, model, optimizer, tok):
    """Write <out>/step-<step>/, then remove all but the newest cfg.keep steps (0: remove none)."""
    out = Path(cfg.out)
    for leftover in out.glob(".*ing-step-*"):  # a killed process left it half written or removed
        shutil.rmtree(leftover)
    final = out / f"step-{step:08d}"
    beside = out / f".writing-{final.name}"
    weights = model.state_dict()
    updates = {name: weights.pop(name) for name, _ in mora.adapter_parameters(model)}
    write_hugging_face(beside / "base", weights, model.cfg, tok, cfg.seq_len)
    if updates:
        adapters.write(beside / "adapter", updates, cycle=cycle, base=adapters.BESIDE,
                       **cfg.adapter())
    torch.save(optimizer.state_dict(), beside / "optimizer.pt")
    write_json(beside / "state.json",
               {"step": step, "cycle": cycle, "config": dataclasses.asdict(cfg)})
    os.replace(beside, final)
    if cfg.keep:
        for old in steps_of(out)[:-cfg.keep]:
            remove(old)


def remove(step):
    """Remove a checkpoint. It is renamed first, so that a kill leaves no half checkpoint behind."""
    hidden = step.with_name(f".removing-{step.name}")
    os.replace(step, hidden)
    shutil.rmtree(hidden)


def steps_of(run):
    """The checkpoints of a run folder, oldest first."""
    return sorted(Path(run).glob("step-" + "[0-9]" * 8))


def resume(path, model, optimizer):
    """Load a checkpoint into a model of the same shape and method, and into its optimizer.

    Returns the checkpoint's state.json.
    """
    weights = base_weights(path / "base")
    if (path / "adapter").is_dir():
        weights |= adapters.weights(path / "adapter")
    load_weights(model, weights, path)
    file = path / "optimizer.pt"
    try:
        optimizer.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{file} cannot be loaded: {error}") from None
    return read_json(path / "state.json")


def load(path, base=None):
    """(model in float32, tokenizer or None, folder) of what a command line names.

    path: a run (its newest step is taken), a step, a Hugging Face directory, or an adapter folder.
    A step with an update returns an adapted model; so does an adapter folder, on `base`, a Hugging
    Face directory (None: the one that the folder names).
    """
    path = Path(path)
    if steps_of(path):
        path = steps_of(path)[-1]
    if (path / "adapter_config.json").exists():
        model, tok = read_hugging_face(adapters.base_of(path, base))
        return adapters.attach(model, path), tok, path
    if base:
        raise UserError(f"{path} is not an adapter folder (it has no adapter_config.json), so it "
                        f"takes no base, got {base}")
    if (path / "config.json").exists() and list(path.glob("model.safetensors*")):
        return *read_hugging_face(path), path
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if not (path / "base").is_dir():
        raise UserError(f"{path} holds no checkpoint: expected step-00000000/, base/, "
                        "adapter_config.json, or config.json and model.safetensors")
    model, tok = read_hugging_face(path / "base")
    if (path / "adapter").is_dir():
        model = adapters.attach(model, path / "adapter")
    return model, tok, path


def trained_seq_len(folder):
    """The tokens per sequence that a model was trained on, or None if nothing records them.

    folder: as load() returns it. max_position_embeddings is another number after --init_from.
    """
    step = folder.parent if folder.name in ("base", "adapter") else folder
    if (step / "state.json").exists():
        return read_json(step / "state.json")["config"]["seq_len"]
    if (folder / "config.json").exists():
        return read_json(folder / "config.json").get("seq_len")
    return None
