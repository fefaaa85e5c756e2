"""Checkpoints: directories of safetensors and JSON. Weights are never pickled.

    out/<run>/step-00002000/base/      a Hugging Face directory: the weights without the update
    out/<run>/step-00002000/adapter/   the update, see adapters.py; peft loads LoRA and DoRA
    out/<run>/step-00002000/           optimizer.pt, state.json

A directory appears whole or not at all: it is written under a temporary name and then renamed.
"""
import contextlib
import dataclasses
import json
import math
import os
import shutil
import warnings
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

import adapters
import mora
import tokenizer
from adapters import as_user_error, read_tensors
from config import TINY, Config, UserError, heads_fit, need, number, one_line, read_json, write_json
from model import Llama, LlamaConfig, fit_scales, fp8_scales
from shards import fingerprint

BEST = "of a run: the checkpoint of the lowest validation loss; default: the newest"
COUNTS = [field.name for field in dataclasses.fields(LlamaConfig) if field.type is int]
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# keys of config.json of which some values are implemented: (default, those values)
IMPLEMENTED = {"model_type": (None, ("llama",)), "hidden_act": ("silu", ("silu",)),
               "attention_bias": (False, (False,)), "mlp_bias": (False, (False,)),
               "quantization_config": (None, (None,)),
               "tie_word_embeddings": (False, (False, True))}
# keys of state.json and their types
STATE = {"step": int, "cycle": int, "config": dict, "corpus": str, "files": dict,
         "fp8_scales": dict}


# ---- Hugging Face directories

def write_hugging_face(folder, weights, model, tok, seq_len=None):
    """Write {name: tensor} as a directory that transformers loads; model gives the shape. tok (or
    None), seq_len (tokens per sequence in training, or None): transformers ignores both keys."""
    folder.mkdir(parents=True, exist_ok=True)
    on_cpu = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    save_file(on_cpu, folder / "model.safetensors", {"format": "pt"})
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    config = dataclasses.asdict(model.cfg) | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": dtype,
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "head_dim": model.cfg.head_dim, "bos_token_id": tok and tok.bos_ids[0],
        "eos_token_id": tok and tok.eos_id, "tokenizer": tok and tok.name, "seq_len": seq_len}
    if config["rope_scaling"]:
        config["rope_scaling"]["rope_type"] = "llama3"
    if tok:
        tok.copy_files(folder)
    special_tokens, generation_config = getattr(model, "inherited", ({}, None))
    if generation_config:
        write_json(folder / "generation_config.json", generation_config)
    write_json(folder / "config.json", config | special_tokens)


def llama_config(config, where):
    """The LlamaConfig of a config.json, a dict. where: the file, for the UserError."""
    config = {key: value for key, value in config.items() if value is not None}
    for key, (default, implemented) in IMPLEMENTED.items():
        must_be_implemented(key, config.get(key, default), implemented, where)
    given = {"num_key_value_heads": config.get("num_attention_heads"), "rms_norm_eps": 1e-6,
             "max_position_embeddings": LlamaConfig.max_position_embeddings} | config
    # at most 2 ** 28, so that no size of a matrix exceeds 64 bits
    shape = {key: number(f"{where}: {key}", given.get(key), int, 1, 2 ** 28) for key in COUNTS}
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    heads_fit(hidden, heads, shape["num_key_value_heads"], f"{where}: ")
    must_be_implemented("head_dim", config.get("head_dim"), (None, hidden // heads), where)
    return LlamaConfig(**shape, **rope_config(config, where),
                       rms_norm_eps=number(f"{where}: rms_norm_eps", given["rms_norm_eps"], float),
                       tie_word_embeddings=config.get("tie_word_embeddings", False))


def must_be_implemented(key, value, implemented, where):
    need(value in implemented, f"{where}: {key} {value!r} is not implemented, only "
         f"{' and '.join(map(repr, implemented))}")


def rope_config(config, where):
    """{"rope_theta": number, "rope_scaling": dict or None} of a config.json, which has them in
    `rope_parameters` (transformers 5), or at the top and in `rope_scaling` (4)."""
    new, old = (config.get(key) or {} for key in ("rope_parameters", "rope_scaling"))
    need(isinstance(new, dict) and isinstance(old, dict), f"{where}: rope_parameters and "
         f"rope_scaling must be JSON objects, got {new!r} and {old!r}")
    if new and old:  # read each one alone; rope_theta may stand in new for both
        config = {"rope_theta": new.get("rope_theta", LlamaConfig.rope_theta)} | config
        one, two = (rope_config(config | {key: None}, where)
                    for key in ("rope_scaling", "rope_parameters"))
        need(one == two, f"{where}: rope_parameters {new} and rope_scaling {old} differ: drop one")
    rope = {"rope_theta": config.get("rope_theta", LlamaConfig.rope_theta)} | (new or old)
    theta = number(f"{where}: rope_theta", rope["rope_theta"], float, TINY)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    must_be_implemented("rope_type", rope_type, ("default", "llama3"), where)
    scaling = {key: rope.get(key) for key in LLAMA3} if rope_type == "llama3" else None
    if scaling:
        _, low, high, _ = (number(f"{where}: {key}", scaling[key], float, TINY) for key in LLAMA3)
        need(low < high, f"{where}: low_freq_factor {low:g} is not below high_freq_factor {high:g}")
    return {"rope_theta": theta, "rope_scaling": scaling}


def read_hugging_face(folder):
    """(Llama in float32, tokenizer or None) of a Hugging Face directory. model.inherited goes into
    every directory written from the model: (special tokens, generation_config.json or None).
    model.trained_seq_len: tokens per sequence in training, or None. --init_from can change it."""
    file, generation = folder / "config.json", folder / "generation_config.json"
    config = read_json(file)
    cfg, weights = llama_config(config, file), base_weights(folder)
    need(cfg.num_hidden_layers <= len(weights), f"{file}: num_hidden_layers is "
         f"{cfg.num_hidden_layers}, but the directory holds {len(weights)} tensors in all")
    for name, weight in weights.items():  # a cast would take quantised integers for weights
        need(weight.is_floating_point(), f"{folder}: {name} must be floats, got {weight.dtype}")
    with torch.device("meta"):  # wrong shapes are found before memory is taken for them
        model = Llama(cfg)
    copies = {name: weight.to(torch.float32, copy=True) for name, weight in weights.items()
              if not name.endswith("rotary_emb.inv_freq")}  # older files store what is computed
    load_weights(model, copies, folder, assign=True)
    must_be_finite(copies, lambda reason: UserError(f"{folder}: {reason}"))
    model.inherited = ({key: config[key] for key in SPECIAL_TOKENS if key in config},
                       read_json(generation) if generation.exists() else None)
    seq_len = config.get("seq_len")
    model.trained_seq_len = seq_len and number(f"{file}: seq_len", seq_len, int, 1)
    own = str(folder) if (folder / "tokenizer.json").exists() else None
    name = config.get("tokenizer") or own
    need(isinstance(name, str | None), f"{file}: tokenizer must be a name, got {name!r}")
    return model, (tokenizer.load(name, folder) if name else None)


def base_weights(folder):
    """{name: tensor} of a Hugging Face directory: of one file, else of several with an index."""
    index, files = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists() and not (folder / files[0]).exists():  # as transformers
        weight_map = read_json(index).get("weight_map")
        files = list(weight_map.values()) if isinstance(weight_map, dict) else []
        need(files and all(isinstance(file, str) and Path(file).name == file for file in files),
             f"{index}: weight_map must map tensors to files of the folder, got {weight_map!s:.60}")
    weights = {}
    for file in sorted(set(files)):
        weights |= read_tensors(folder / file)[0]
    return weights


def load_weights(model, weights, where, assign=False):
    """Copy {name: tensor} into a model, or assign them; UserError unless names and shapes fit."""
    if model.cfg.tie_word_embeddings:
        head = weights.pop("lm_head.weight", None)  # some directories hold the shared matrix twice
        need(head is None or torch.equal(head, weights.get("model.embed_tokens.weight", head)),
             f"{where}: lm_head.weight is a matrix of its own: set tie_word_embeddings to false")
    # no file holds the extra state of adapted layers: adapter_config.json has it, and is compared
    own = model.state_dict()
    extra = {name: value for name, value in own.items()
             if not torch.is_tensor(value) or value.dtype == torch.float8_e4m3fn}  # see save
    weights = {name: mora.as_sharded(weight, own.get(name)) for name, weight in weights.items()}
    with as_user_error(f"{where}: the weights do not fit the model", RuntimeError):
        model.load_state_dict(weights | extra, assign=assign)


# ---- checkpoints of a run: writing

def save(cfg, step, cycle, model, optimizer, tok, val_loss=None):
    """Write <out>/step-<step>/, then remove all but the newest cfg.keep steps and cfg.keep_best's.
    val_loss: of these weights, or None. Every rank must call it; rank 0, which holds the lock of
    the run, writes. UserError, and no trace, if a weight is not finite or the disk refuses."""
    out, final = Path(cfg.out), Path(cfg.out) / f"step-{step:08d}"
    val_loss = val_loss if math.isfinite(val_loss or 0) else None  # JSON has no nan
    weights = mora.gather({k: v for k, v in model.state_dict().items() if torch.is_tensor(v)})
    optimizer_state = mora.gather(optimizer.state_dict())
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    must_be_finite(weights, diverged, cfg, step)
    updates = {name: weights.pop(name) for name, _ in mora.adapter_parameters(model)}
    beside = out / f".writing-{final.name}"
    try:
        if cfg.base_dtype == "float8":  # the model holds W rounded; init_from holds W
            beside.mkdir(parents=True)
            (beside / "base").symlink_to(Path(cfg.init_from).resolve())
        else:
            write_hugging_face(beside / "base", weights, model, tok, cfg.seq_len)
        if updates:
            config = adapters.config_of(model, adapters.BESIDE) | {"task_type": "CAUSAL_LM"}
            adapters.write(beside / "adapter", config, updates)
        torch.save(optimizer_state, beside / "optimizer.pt")
        endings = "*.pt", "*/*.json", "*/*.jinja", "*/*.safetensors"  # init_from may hold more
        records = {path.relative_to(beside).as_posix(): file_record(path)
                   for ending in endings for path in sorted(beside.glob(ending))}
        write_json(beside / "state.json", {
            "step": step, "cycle": cycle, "val_loss": val_loss, "config": dataclasses.asdict(cfg),
            "fp8_scales": {name: float(scale) for name, scale in fp8_scales(model).items()},
            "corpus": fingerprint(cfg.data), "files": records})
        os.replace(beside, final)
    except (OSError, SafetensorError, RuntimeError) as error:  # of torch, when the disk is full
        raise UserError(f"{final} cannot be written: {one_line(error)}; {last_good(out)}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    best = best_of(out) if cfg.keep_best else None
    for old in (steps_of(out)[:-cfg.keep] if cfg.keep else []):
        if old != best:
            # renamed first, so that a kill leaves no half checkpoint behind
            shutil.rmtree(old.rename(out / f".removing-{old.name}"))


def must_be_finite(weights, error, *about):
    """Raise error(*about, reason) if a tensor of {name: tensor} holds nan or inf."""
    for name, weight in weights.items():
        own = weight.to_local() if hasattr(weight, "to_local") else weight  # this rank's part
        is_checked = torch.is_tensor(own) and own.numel() and own.dtype != torch.float8_e4m3fn
        # aminmax passes on nan, reads each weight once and needs no memory (9 GB/s on one CPU core)
        if is_checked and not torch.stack(own.aminmax()).isfinite().all():
            raise error(*about, f"{name} holds nan or inf")


def diverged(cfg, step, reason):
    """The UserError of a run whose numbers are no longer finite."""
    return UserError(f"step {step}: {reason}; {last_good(cfg.out)}; lower --lr (now {cfg.lr:g}) or "
                     f"--grad_clip ({cfg.grad_clip:g}), or lengthen --warmup ({cfg.warmup})")


def last_good(out):
    """Where to continue after a step that could not be saved, in words."""
    if steps_of(out):
        return f"the last good checkpoint is {steps_of(out)[-1]}: continue from it with --resume"
    return "there is no checkpoint yet: start again"


def file_record(path):
    """{"bytes": size, "crc32": checksum (3.5 GB/s on one CPU core)} of a file."""
    size, crc = 0, 0
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(2 ** 24), b""):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return {"bytes": size, "crc32": crc}


# ---- checkpoints of a run: reading

def steps_of(run):
    """The checkpoints of a run folder, oldest first."""
    return sorted(Path(run).glob("step-" + "[0-9]" * 8))


def best_of(run):
    """The checkpoint of a run with the lowest validation loss; damaged ones are left out."""
    losses = {}
    for path in steps_of(run):
        with contextlib.suppress(UserError):
            losses[path] = read_state(path).get("val_loss")
    scored = [path for path, loss in losses.items() if isinstance(loss, float)]
    return min(scored, key=losses.get, default=None)


def read_state(path):
    """The state.json of a checkpoint. Keys of Config that its config lacks have their defaults."""
    state = read_json(path / "state.json")
    for key, kind in STATE.items():
        need(type(state.get(key)) is kind,
             f"{path / 'state.json'}: {key} is {state.get(key)!r}, which no run writes")
    defaults = json.loads(json.dumps(dataclasses.asdict(Config())))
    return state | {"config": {key: state["config"].get(key, defaults[key]) for key in defaults}}


def damage(path, resuming):
    """The first damage of a checkpoint in words, or None; of optimizer.pt only if `resuming`."""
    try:
        for name, record in read_state(path)["files"].items():
            if resuming or name != "optimizer.pt":
                found = file_record(os.path.realpath(path / name))  # the error names the real one
                need(found == record, f"{path / name} has changed since it was saved: it is "
                     f"{found}, but state.json has in files {record}")
    except (UserError, OSError) as error:
        return str(error)
    return None


def verify(path, resuming=True):
    """Raise UserError if a checkpoint is damaged. It names the newest older one that is whole.
    No older one is taken automatically: steps would be lost without a decision, a damaged disk
    would stay unseen, and the damaged folder would be in the way when the run saves this step."""
    reason, steps = damage(path, resuming), steps_of(path.parent)
    if not reason:
        return
    older = (other for other in reversed(steps) if other < path and not damage(other, resuming))
    whole = next(older, None)
    need(whole, f"{reason}; no older checkpoint in {path.parent} is whole")
    newer = " ".join(str(other) for other in steps if other > whole)
    advice = f"`rm -r {newer}`, and the same command continues from it"
    raise UserError(f"{reason}; {whole} is whole: {advice if resuming else 'name it instead'}")


def resume(path, model, optimizer):
    """Load a checkpoint into a model of its shape and method, and into the model's optimizer, whose
    rates, decay and betas stay. Returns its state.json."""
    weights, file = base_weights(path / "base"), path / "optimizer.pt"
    layers = adapters.read(path / "adapter")[1] if (path / "adapter").is_dir() else {}
    for layer, tensors in layers.items():
        weights |= {f"{layer}.update.{key}": tensor for key, tensor in tensors.items()}
    load_weights(model, weights, path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol of foreign files
            # mapped, so that the processes of one machine do not hold a copy each
            optimizer_state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file raises almost anything
        # torch's own text is left out: it recommends weights_only=False, which would run the file
        raise UserError(f"{file} cannot be loaded ({type(error).__name__}): it is no state of an "
                        "optimizer that this program wrote") from None
    # a file of another form raises almost anything
    with as_user_error(f"{file} does not fit the optimizer", Exception):
        numbers = [i for group in optimizer_state["param_groups"] for i in group["params"]]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for i, p in zip(numbers, parameters, strict=True):
            for key, value in optimizer_state["state"].get(i, {}).items():
                need(value.shape in ((), p.shape), f"{key} has the shape {tuple(value.shape)}, "
                     f"its parameter {tuple(p.shape)}")
                own = mora.as_sharded(value, p) if value.ndim else value
                optimizer.state[p][key] = own.to(p.device)
    state = read_state(path)
    fit_scales(model)  # a run that was started without FP8 and goes on with it has stored none
    for name, scale in fp8_scales(model).items():  # powers of two, so exact in JSON
        scale.fill_(state["fp8_scales"].get(name, scale))
    return state


def load(path, base=None, best=False):
    """(model in float32, tokenizer or None, folder) of what a command line names.
    path: a run (its newest step, or with `best` the one of the lowest validation loss), a step, a
    Hugging Face directory, or an adapter folder, which takes `base`, a Hugging Face directory
    (None: the one that it names). The model of a step with an update is adapted."""
    need(str(path), "the path of the checkpoint is empty")
    run, path = path, Path(path)
    if best:
        path = best_of(path)
        need(path, f"{run} has no checkpoint with a validation loss, so none is the best")
    elif steps_of(path):
        path = steps_of(path)[-1]
    folder, adapter, adapts = path / "base", path / "adapter", (path / "adapter").is_dir()
    if (path / "adapter_config.json").exists():
        folder, adapter, adapts = adapters.base_of(path, base), path, True
    else:
        need(not base, f"{path} is no adapter folder, so it takes no base, got {base}")
        if (path / "config.json").exists() and list(path.glob("model.safetensors*")):
            return *read_hugging_face(path), path
        is_name = len(path.parts) == 2 and not path.parent.exists()  # of a model on the hub
        advice = f"; if it is on the hub, first `hf download {path} --local-dir DIR`"
        need(path.exists(), f"{path} does not exist{advice if is_name else ''}")
        need(folder.is_dir() or (path / "state.json").exists(), f"{path} holds no checkpoint: "
             "expected step-00000000/, base/, adapter_config.json, or config.json and "
             "model.safetensors")
        verify(path, resuming=False)
    is_step = (folder.parent / "state.json").exists()  # base/ may be a link to init_from: see save
    seq_len = read_state(folder.parent)["config"]["seq_len"] if is_step else None
    model, tok = read_hugging_face(folder)  # last: its run may remove the step meanwhile
    model.trained_seq_len = seq_len or model.trained_seq_len
    if adapts:
        model = adapters.load(model, adapter, freeze=False, exclude=("lm_head",))
    return model, tok, path
