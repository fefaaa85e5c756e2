"""Checkpoints: directories of safetensors and JSON. Weights are never pickled; a directory appears whole or not at all.

    out/<run>/step-00002000/base/       a Hugging Face directory: the weights without the update
    out/<run>/step-00002000/adapter/    the update, as adapters.py has it: what peft loads, if it is LoRA or DoRA
    out/<run>/step-00002000/            optimizer.pt, state.json
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

SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings")
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")  # keys of its rope scaling


def write_hugging_face(folder, weights, cfg, tok):
    """A directory that transformers loads: {name: tensor} as model.safetensors, LlamaConfig as config.json.

    tok (see tokenizer.load; None: unknown) is named in one key more, which transformers ignores.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if tok:
        tok.keep(folder)
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    save_file({name: w.detach().cpu().contiguous() for name, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": dtype, "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "head_dim": cfg.head_dim,
        "bos_token_id": tok and tok.start[0], "eos_token_id": tok and tok.end,
        "tokenizer": tok and tok.name, **{key: getattr(cfg, key) for key in SHAPE},
        "rope_scaling": cfg.rope_scaling and {"rope_type": "llama3", **cfg.rope_scaling}})


def llama_config(config, where):
    """LlamaConfig of a Hugging Face config.json (a dict), old or new style; raises UserError with the key that is not implemented.

    RoPE's keys lie at the top with `rope_scaling` beside them (transformers 4) or together in `rope_parameters` (transformers 5).
    """
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0), **(config.get("rope_scaling") or {})}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    only = (("model_type", config.get("model_type"), ("llama",)), ("hidden_act", config.get("hidden_act", "silu"), ("silu",)),
            ("attention_bias", config.get("attention_bias", False), (False,)), ("mlp_bias", config.get("mlp_bias", False), (False,)),
            ("quantization_config", config.get("quantization_config"), (None,)), ("rope_type", rope_type, ("default", "llama3")))
    for key, value, known in only:
        if value not in known:
            raise UserError(f"{where}: {key} {value!r} is not implemented, only {' and '.join(map(repr, known))}")
    values = {key: config[key] for key in SHAPE if config.get(key) is not None}
    values["rope_theta"] = rope.get("rope_theta", 10000.0)
    values.setdefault("num_key_value_heads", config.get("num_attention_heads"))
    try:
        if rope_type == "llama3":
            values["rope_scaling"] = {key: rope[key] for key in LLAMA3}
        cfg = LlamaConfig(**values)
    except (KeyError, TypeError) as error:
        raise UserError(f"{where} lacks a key: {error}")
    if (config.get("head_dim") or cfg.head_dim) != cfg.head_dim:
        raise UserError(f"{where}: head_dim {config['head_dim']} is not hidden_size / num_attention_heads = {cfg.head_dim}")
    return cfg


def read_hugging_face(folder):
    """(Llama in float32, tokenizer or None) of a Hugging Face directory, its weights in one file or in several with an index."""
    config = read_json(folder / "config.json")
    model = Llama(llama_config(config, folder / "config.json"))
    load_weights(model, base_weights(folder), folder)
    if config.get("tokenizer"):
        return model, tokenizer.load(config["tokenizer"], folder)
    return model, tokenizer.load(str(folder)) if (folder / "tokenizer.json").exists() else None


def base_weights(folder):
    """{name: tensor} of a Hugging Face directory."""
    index, weights = folder / "model.safetensors.index.json", {}
    for name in sorted(set(read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]:
        weights |= read_tensors(folder / name)
    return weights


def load_weights(model, weights, where):
    """Copy {name: tensor} into a model; they must be all it has, and no more."""
    if model.cfg.tie_word_embeddings:
        weights.pop("lm_head.weight", None)  # some directories hold the shared matrix twice
    # no file holds the extra state of adapted layers: adapter_config.json has it, and is compared
    own = {name: value for name, value in model.state_dict().items() if not torch.is_tensor(value)}
    try:
        model.load_state_dict(weights | own)
    except RuntimeError as error:
        raise UserError(f"{where}: the weights do not fit the model: {' '.join(str(error).split())}")


def save(cfg, step, cycle, model, optimizer, tok):
    """Write <out>/step-<step>/, then remove all but the newest cfg.keep (0: keep all)."""
    final, beside = Path(cfg.out) / f"step-{step:08d}", Path(cfg.out) / f".writing-step-{step:08d}"
    for stray in Path(cfg.out).glob(".*ing-step-*"):  # what a kill left half written or half removed
        shutil.rmtree(stray)
    weights = {name: value for name, value in model.state_dict().items() if torch.is_tensor(value)}
    updates = {name: weights.pop(name) for name, _ in mora.adapter_parameters(model)}
    write_hugging_face(beside / "base", weights, model.cfg, tok)
    if updates:
        adapters.write(beside / "adapter", updates, cycle=cycle, base=adapters.BESIDE, **cfg.adapter())
    torch.save(optimizer.state_dict(), beside / "optimizer.pt")
    write_json(beside / "state.json", {"step": step, "cycle": cycle, "config": dataclasses.asdict(cfg)})
    os.replace(beside, final)
    for old in steps_of(cfg.out)[:-cfg.keep] if cfg.keep else []:
        gone = old.with_name(f".removing-{old.name}")
        os.replace(old, gone)
        shutil.rmtree(gone)


def steps_of(run):
    """The whole checkpoints of a run folder, oldest first."""
    return sorted(Path(run).glob("step-" + "[0-9]" * 8))


def resume(path, model, optimizer):
    """Load a checkpoint of the same shape and method into a model and its optimizer, in place; returns its state.json."""
    weights = base_weights(path / "base")
    if (path / "adapter").is_dir():
        weights |= adapters.weights(path / "adapter")
    load_weights(model, weights, path)
    try:
        optimizer.load_state_dict(torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{path / 'optimizer.pt'} can not be loaded: {error}")
    return read_json(path / "state.json")


def load(path, base=None):
    """(model in float32, tokenizer or None, its folder) of a run, of one of its steps, of a Hugging Face directory, or of an adapter folder.

    A checkpoint with an update comes back adapted, and so does an adapter folder, on `base`, a Hugging Face directory (None: the one
    that it names).
    """
    path = Path(path)
    if steps_of(path):
        path = steps_of(path)[-1]
    if (path / "adapter_config.json").exists():
        model, tok = read_hugging_face(adapters.base_of(path, base))
        return adapters.attach(model, path), tok, path
    if base:
        raise UserError(f"{path} is no adapter folder (it holds no adapter_config.json), so it takes no base, got {base}")
    if (path / "config.json").exists() and list(path.glob("model.safetensors*")):
        return *read_hugging_face(path), path
    if not (path / "base").is_dir():
        what = "holds no checkpoint: expected step-00000000/, base/, adapter_config.json, or config.json and model.safetensors"
        raise UserError(f"{path} {what if path.exists() else 'does not exist'}")
    model, tok = read_hugging_face(path / "base")
    return adapters.attach(model, path / "adapter") if (path / "adapter").is_dir() else model, tok, path
