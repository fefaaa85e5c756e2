"""Checkpoints: directories of safetensors and JSON. Weights are never pickled.

    out/<run>/step-00002000/base/      a Hugging Face directory: the weights without the update
    out/<run>/step-00002000/adapter/   the update, see adapters.py; peft loads LoRA and DoRA
    out/<run>/step-00002000/           optimizer.pt, state.json

A directory appears whole or not at all: it is written under a temporary name and then renamed.
"""
import dataclasses
import json
import math
import os
import shutil
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import adapters
import mora
import tokenizer
from adapters import read_tensors
from config import Config, UserError, read_json, write_json
from model import Llama, LlamaConfig, fp8_scales, load_fp8_scales
from shards import fingerprint

COUNTS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
          "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
BEST = "of a run: the checkpoint of the lowest validation loss; default: the newest"
SHAPE = (*COUNTS, "rms_norm_eps", "rope_theta", "tie_word_embeddings")
# keys of LLaMA-3's rope scaling
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# keys of config.json of which some values are implemented, with their default and those values
IMPLEMENTED = {
    "model_type": (None, ("llama",)),
    "hidden_act": ("silu", ("silu",)),
    "attention_bias": (False, (False,)),
    "mlp_bias": (False, (False,)),
    "quantization_config": (None, (None,)),
}


# ------------------------------------------------------------
# values of JSON files

def read_object(file):
    """The dict that a JSON file holds. Raises UserError for anything else."""
    try:
        value = read_json(file)
    except RecursionError:
        raise UserError(f"{file} cannot be read: it is nested too deeply") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} must hold a JSON object, got {str(value)[:60]}")
    return value


def count_of(values, key, where):
    """A whole number of at least 1, or a UserError that names the key."""
    if key not in values:
        raise UserError(f"{where} lacks a key: {key}")
    if type(values[key]) is not int or values[key] < 1:
        raise UserError(f"{where}: {key} must be a whole number of at least 1, got {values[key]!r}")
    return values[key]


def positive_of(values, key, where, or_zero=False):
    """A finite number above 0 (or 0), or a UserError that names the key."""
    if key not in values:
        raise UserError(f"{where} lacks a key: {key}")
    value = values[key]
    is_number = type(value) in (int, float) and 0 <= value < math.inf
    if not is_number or (value == 0 and not or_zero):
        least = "of at least 0" if or_zero else "above 0"
        raise UserError(f"{where}: {key} must be a number {least}, got {value!r}")
    return value


# ------------------------------------------------------------
# Hugging Face directories

def write_hugging_face(folder, weights, cfg, tok, seq_len=None, inherited=None):
    """Write a directory that transformers loads: model.safetensors and config.json.

    weights: {name: tensor}. cfg: LlamaConfig. tok: see tokenizer.load, or None if unknown.
    seq_len: tokens per sequence in training, or None. config.json holds the tokenizer's name and
    seq_len under two keys that transformers ignores. inherited: see inherited_of.
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
    if inherited:
        config |= inherited["config"]
        if inherited["generation_config"]:
            write_json(folder / "generation_config.json", inherited["generation_config"])
    write_json(folder / "config.json", config)


def inherited_of(model):
    """What the directory that a model was read from holds for other tools, or None without one.

    {"config": {key: value} of bos, eos and pad in its config.json, "generation_config": dict or
    None}. Training does not change it, so it goes into every directory written from the model.
    """
    return getattr(model, "inherited", None)


def read_inherited(config, folder):
    """inherited_of a model that is read from a folder with this config.json (a dict)."""
    file = folder / "generation_config.json"
    return {"config": {key: config[key] for key in SPECIAL_TOKENS if key in config},
            "generation_config": read_object(file) if file.exists() else None}


def llama_config(config, where):
    """The LlamaConfig of a Hugging Face config.json (a dict).

    Raises UserError that names `where` and the key that is missing, wrong or not implemented.
    """
    for key, (default, implemented) in IMPLEMENTED.items():
        must_be_implemented(key, config.get(key, default), implemented, where)
    given = {key: config[key] for key in SHAPE if config.get(key) is not None}
    given.setdefault("num_key_value_heads", given.get("num_attention_heads"))
    given.setdefault("max_position_embeddings", LlamaConfig.max_position_embeddings)
    given.setdefault("rms_norm_eps", LlamaConfig.rms_norm_eps)
    values = {key: count_of(given, key, where) for key in COUNTS}
    values["rms_norm_eps"] = positive_of(given, "rms_norm_eps", where, or_zero=True)
    values["tie_word_embeddings"] = given.get("tie_word_embeddings", False)
    if not isinstance(values["tie_word_embeddings"], bool):
        raise UserError(f"{where}: tie_word_embeddings must be true or false, got "
                        f"{values['tie_word_embeddings']!r}")
    values |= rope_config(config, where)
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    if hidden % (2 * heads):
        raise UserError(f"{where}: hidden_size {hidden} must be an even multiple of "
                        f"num_attention_heads {heads}")
    if heads % values["num_key_value_heads"]:
        raise UserError(f"{where}: num_attention_heads {heads} must be a multiple of "
                        f"num_key_value_heads {values['num_key_value_heads']}")
    if config.get("head_dim") not in (None, hidden // heads):
        raise UserError(f"{where}: head_dim {config['head_dim']!r} is not hidden_size / "
                        f"num_attention_heads = {hidden // heads}")
    return LlamaConfig(**values)


def must_be_implemented(key, value, implemented, where):
    if value not in implemented:
        listed = " and ".join(map(repr, implemented))
        raise UserError(f"{where}: {key} {value!r} is not implemented, only {listed}")


def rope_config(config, where):
    """{"rope_theta": number, "rope_scaling": dict or None} of a Hugging Face config.json.

    The keys stand at the top with `rope_scaling` beside them (transformers 4), or together in
    `rope_parameters` (transformers 5).
    """
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(key) or {}, dict):
            raise UserError(f"{where}: {key} must be a JSON object, got {config[key]!r}")
    rope = config.get("rope_parameters")
    if not rope:
        rope = {"rope_theta": config.get("rope_theta"), **(config.get("rope_scaling") or {})}
    if rope.get("rope_theta") is None:
        rope = rope | {"rope_theta": LlamaConfig.rope_theta}
    theta = positive_of(rope, "rope_theta", where)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    must_be_implemented("rope_type", rope_type, ("default", "llama3"), where)
    if rope_type == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    scaling = {key: positive_of(rope, key, where) for key in LLAMA3}
    if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError(f"{where}: low_freq_factor {scaling['low_freq_factor']} must be below "
                        f"high_freq_factor {scaling['high_freq_factor']}")
    return {"rope_theta": theta, "rope_scaling": scaling}


def read_hugging_face(folder):
    """(Llama in float32, tokenizer or None) of a Hugging Face directory."""
    file = folder / "config.json"
    config = read_object(file)
    cfg = llama_config(config, file)
    weights = base_weights(folder)
    if cfg.num_hidden_layers > len(weights):
        raise UserError(f"{file}: num_hidden_layers is {cfg.num_hidden_layers}, but the directory "
                        f"holds {len(weights)} tensors in all")
    try:
        with torch.device("meta"):  # wrong shapes are found before memory is taken for them
            model = Llama(cfg)
    except (RuntimeError, TypeError) as error:  # beyond 64 bits
        raise UserError(f"{file}: no tensor has such a size: {one_line(error)[:200]}") from None
    copies = {name: weight.to(torch.float32, copy=True) for name, weight in weights.items()}
    load_weights(model, copies, folder, assign=True)
    model.inherited = read_inherited(config, folder)
    name = config.get("tokenizer")
    if not isinstance(name, str | None):
        raise UserError(f"{file}: tokenizer must be a name, got {name!r}")
    if name:
        return model, tokenizer.load(name, folder)
    if (folder / "tokenizer.json").exists():
        return model, tokenizer.load(str(folder))
    return model, None


def base_weights(folder):
    """{name: tensor} of a Hugging Face directory: of one file, or of several with an index."""
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index}: weight_map must map names of tensors to files, got "
                            f"{str(weight_map)[:60]}")
        for file in weight_map.values():
            if not isinstance(file, str) or Path(file).name != file:
                raise UserError(f"{index}: weight_map must name files of the folder, got {file!r}")
        files = sorted(set(weight_map.values()))
    weights = {}
    for file in files:
        weights |= read_tensors(folder / file)
    return weights


def load_weights(model, weights, where, assign=False):
    """Load {name: tensor} into a model: copied, or as they are (assign).

    Raises UserError unless the names and shapes are exactly the model's.
    """
    if model.cfg.tie_word_embeddings:
        weights.pop("lm_head.weight", None)  # some directories hold the shared matrix twice
    # no file holds the extra state of adapted layers: adapter_config.json has it, and is compared
    own = model.state_dict()
    extra = {name: value for name, value in own.items() if not torch.is_tensor(value)}
    weights = {name: mora.as_sharded(weight, own.get(name)) for name, weight in weights.items()}
    try:
        model.load_state_dict(weights | extra, assign=assign)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: the weights do not fit the model: {reason[:400]}") from None


# ------------------------------------------------------------
# checkpoints of a run: writing

def save(cfg, step, cycle, model, optimizer, tok, val_loss=None, keep_best=False):
    """Write <out>/step-<step>/, then remove all but the newest cfg.keep steps (0: remove none).

    val_loss: the validation loss of these weights, or None if they were not evaluated; state.json
    names it. keep_best: the step of the lowest val_loss stays too. Every rank must call it, rank 0
    writes.
    Raises UserError, and leaves no trace, if a weight is not finite or the disk refuses.
    """
    out = Path(cfg.out)
    final = out / f"step-{step:08d}"
    if val_loss is not None and not math.isfinite(val_loss):
        val_loss = None  # JSON has no nan
    weights = {name: value for name, value in model.state_dict().items()
               if torch.is_tensor(value)}
    must_be_finite(weights, step, cfg)
    weights, state = gather(weights), gather(optimizer.state_dict())
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    remove_leftovers(out, ".*ing-step-*")
    updates = {name: weights.pop(name) for name, _ in mora.adapter_parameters(model)}
    beside = temporary(final, "writing")
    try:
        write_hugging_face(beside / "base", weights, model.cfg, tok, cfg.seq_len,
                           inherited_of(model))
        if updates:
            adapters.write(beside / "adapter", updates, cycle=cycle, base=adapters.BESIDE,
                           **cfg.adapter())
        write_optimizer(state, beside / "optimizer.pt")
        write_json(beside / "state.json", {
            "step": step, "cycle": cycle, "val_loss": val_loss,
            "config": dataclasses.asdict(cfg), "fp8_scales": fp8_scales(model),
            "corpus": fingerprint(cfg.data),
            "files": file_records(beside)})
        os.replace(beside, final)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{final} cannot be written: {one_line(error)}; "
                        f"{last_good(out)}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    if cfg.keep:
        best = best_of(out) if keep_best else None
        for old in steps_of(out)[:-cfg.keep]:
            if old != best:
                remove(old)


def gather(values):
    """Nested dicts of tensors, with the sharded ones gathered on the CPU of rank 0 (else None)."""
    if isinstance(values, dict):
        return {key: gather(value) for key, value in values.items()}
    if not hasattr(values, "full_tensor"):
        return values
    whole = values.full_tensor()
    return whole.cpu() if dist.get_rank() == 0 else None


def write_optimizer(state, file):
    try:
        torch.save(state, file)
    except RuntimeError as error:  # what torch raises when the disk is full
        raise OSError(one_line(error)) from error


def must_be_finite(weights, step, cfg):
    """Raise UserError if a tensor of {name: tensor} holds nan or inf.

    aminmax passes on nan, reads each weight once and needs no memory (9 GB/s on one CPU core).
    One tensor is read back from the device.
    """
    own = {name: weight.to_local() if hasattr(weight, "to_local") else weight
           for name, weight in weights.items()}  # of sharded weights: this rank's part
    names = [name for name, weight in own.items() if torch.is_tensor(weight) and weight.numel()]
    extremes = torch.stack([torch.stack(own[name].aminmax()).float() for name in names])
    finite = extremes.isfinite().all(dim=1).tolist()
    if not all(finite):
        raise UserError(f"step {step}: {names[finite.index(False)]} is not finite, so nothing was "
                        f"saved; {last_good(cfg.out)}; lower --lr (now {cfg.lr:g}) or lengthen "
                        f"--warmup ({cfg.warmup})")


def last_good(out):
    """Where to continue after a step that could not be saved, in words."""
    steps = steps_of(out)
    if steps:
        return f"the last good checkpoint is {steps[-1]}: continue from it with --resume"
    return "there is no checkpoint yet: start again"


def file_records(folder):
    """{path in the folder: {"bytes", "crc32"}} of all files of a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(file_record, files), strict=True))


def file_record(path):
    """{"bytes": size, "crc32": checksum (3.5 GB/s on one CPU core)} of a file."""
    size, crc = 0, 0
    with open(path, "rb") as file:
        while block := file.read(2 ** 24):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return {"bytes": size, "crc32": crc}


def temporary(target, doing):
    """The name under which this process writes or removes `target`, beside it."""
    return target.with_name(f".{doing}-{target.name}.{os.getpid()}")


def remove_leftovers(folder, pattern):
    """Remove the temporary directories of killed processes, and of older versions without id."""
    for leftover in folder.glob(pattern):
        process = leftover.name.rpartition(".")[2]
        if not (process.isdecimal() and is_running(int(process))):
            shutil.rmtree(leftover, ignore_errors=True)


def is_running(process):
    """Whether another process of this machine has this id. (Other machines cannot be asked.)"""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def remove(step):
    """Remove a checkpoint. It is renamed first, so that a kill leaves no half checkpoint behind."""
    hidden = temporary(step, "removing")
    os.replace(step, hidden)
    shutil.rmtree(hidden)


# ------------------------------------------------------------
# checkpoints of a run: reading

def steps_of(run):
    """The checkpoints of a run folder, oldest first."""
    return sorted(Path(run).glob("step-" + "[0-9]" * 8))


def best_of(run):
    """The checkpoint of the lowest validation loss in a run folder, or None if none has a loss.

    Damaged checkpoints are passed over, and so are losses that are not finite.
    """
    losses = {}
    for step in steps_of(run):
        try:
            loss = read_state(step).get("val_loss")
        except UserError:
            continue
        if isinstance(loss, float) and math.isfinite(loss):
            losses[step] = loss
    return min(losses, key=losses.get, default=None)


def read_state(step):
    """The state.json of a checkpoint. Keys that its config lacks get their defaults.

    Raises UserError if the file is damaged.
    """
    file = step / "state.json"
    state = read_object(file)
    for key, kind in (("step", int), ("cycle", int), ("config", dict)):
        if type(state.get(key)) is not kind:
            raise UserError(f"{file}: {key} is {state.get(key)!r}, which no run writes")
    defaults = json.loads(json.dumps(dataclasses.asdict(Config())))
    return state | {"config": defaults | state["config"]}


def damage(step, resuming):
    """The first damage of a checkpoint in words, or None if it is whole.

    resuming: optimizer.pt is needed too. Sizes and checksums are those of state.json; where an
    older version recorded none, the headers of the files are read.
    """
    try:
        records = read_state(step).get("files")
        if records is None:
            check_headers(step, resuming)
            return None
        for name, record in records.items():
            if resuming or name != "optimizer.pt":
                check_file(step / name, record)
    except UserError as error:
        return str(error)
    except (AttributeError, TypeError):
        return f"{step / 'state.json'}: files has a form that no run writes"
    return None


def check_file(path, record):
    """Raise UserError if a file is not the one of its record."""
    try:
        size = path.stat().st_size
        found = file_record(path) if size == record.get("bytes") else {"bytes": size}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if found["bytes"] != record.get("bytes"):
        raise UserError(f"{path} has {found['bytes']:,} bytes, {record.get('bytes'):,} were saved")
    if found != record:
        raise UserError(f"{path} has changed since it was saved (its checksum differs)")


def check_headers(step, resuming):
    """Raise UserError if a file of a checkpoint without records cannot be opened."""
    read_object(step / "base" / "config.json")
    files = [step / "base" / "model.safetensors"]
    if (step / "adapter").is_dir():
        read_object(step / "adapter" / "adapter_config.json")
        files.append(step / "adapter" / "adapter_model.safetensors")
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read: {one_line(error)}") from None
    if resuming:
        read_optimizer(step / "optimizer.pt")


# A damaged newest checkpoint is an error; the older one is named, not taken. Steps would be lost
# without a decision, a damaged disk would stay unseen, and the damaged folder would be in the way
# of the checkpoint that the run writes at the same step.
@contextmanager
def explain_damage(step, resuming):
    """Add to a UserError of a damaged checkpoint which older one is whole, and what to type."""
    try:
        yield
    except UserError as error:
        steps = steps_of(step.parent)
        if step not in steps:
            raise
        older = reversed(steps[:steps.index(step)])
        whole = next((other for other in older if not damage(other, resuming)), None)
        if not whole:
            advice = f"no older checkpoint in {step.parent} is whole"
        elif resuming:
            newer = " ".join(str(other) for other in steps[steps.index(whole) + 1:])
            advice = (f"{whole} is whole: `rm -r {newer}`, and the same command continues from "
                      f"{whole.name}")
        else:
            advice = f"{whole} is whole: name it instead"
        raise UserError(f"{error}; {advice}") from None


def verify(step, resuming=True):
    """Raise UserError if a file of a checkpoint is not what was saved; see damage()."""
    with explain_damage(step, resuming):
        reason = damage(step, resuming)
        if reason:
            raise UserError(reason)


def read_optimizer(file):
    """The state dict in optimizer.pt, read without running what a pickle names."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol of foreign files
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises almost anything
        # torch's own text is left out: it recommends weights_only=False, which would run the file
        raise UserError(f"{file} cannot be loaded ({type(error).__name__}): it is no state of an "
                        "optimizer that this program wrote") from None


def load_optimizer(optimizer, file):
    """Load optimizer.pt. Raises UserError unless its tensors have the shapes of the parameters."""
    state = read_optimizer(file)
    try:
        numbers = [i for group in state["param_groups"] for i in group["params"]]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for i, p in zip(numbers, parameters, strict=True):
            values = state["state"].get(i, {})
            values.update({k: mora.as_sharded(v, p) for k, v in values.items() if v.ndim})
        optimizer.load_state_dict(state)
    except Exception as error:  # a file of another form raises almost anything
        raise UserError(f"{file} does not fit the optimizer: {one_line(error)}") from None
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if torch.is_tensor(value) and value.ndim and value.shape != parameter.shape:
                raise UserError(f"{file}: {key} of shape {tuple(value.shape)} does not fit a "
                                f"parameter of shape {tuple(parameter.shape)}")


def resume(path, model, optimizer):
    """Load a checkpoint into a model of the same shape and method, and into its optimizer.

    Returns the checkpoint's state.json.
    """
    with explain_damage(path, resuming=True):
        state = read_state(path)
        weights = base_weights(path / "base")
        if (path / "adapter").is_dir():
            weights |= adapters.weights(path / "adapter")
        load_weights(model, weights, path)
        load_optimizer(optimizer, path / "optimizer.pt")
    load_fp8_scales(model, state.get("fp8_scales", {}))
    return state


def load(path, base=None, best=False):
    """(model in float32, tokenizer or None, folder) of what a command line names.

    path: a run (its newest step is taken, or with `best` the one of the lowest validation loss), a
    step, a Hugging Face directory, or an adapter folder.
    A step with an update returns an adapted model; so does an adapter folder, on `base`, a Hugging
    Face directory (None: the one that the folder names).
    """
    if not str(path):
        raise UserError("the path of the checkpoint is empty")
    path = Path(path)
    if best:
        run, path = path, best_of(path)
        if not path:
            raise UserError(f"{run} has no checkpoint with a validation loss, so none is the best")
    elif steps_of(path):
        path = steps_of(path)[-1]
    if (path / "adapter_config.json").exists():
        model, tok = read_hugging_face(adapters.base_of(path, base))
        return adapters.attach(model, path), tok, path
    if base:
        raise UserError(f"{path} is no adapter folder (it has no adapter_config.json), so it "
                        f"takes no base, got {base}")
    if (path / "config.json").exists() and list(path.glob("model.safetensors*")):
        return *read_hugging_face(path), path
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if not (path / "base").is_dir() and not (path / "state.json").exists():
        raise UserError(f"{path} holds no checkpoint: expected step-00000000/, base/, "
                        "adapter_config.json, or config.json and model.safetensors")
    return *read_step(path), path


def read_step(step):
    """(model, tokenizer or None) of a checkpoint of a run, adapted if it holds an update."""
    if (step / "state.json").exists():
        verify(step, resuming=False)
    with explain_damage(step, resuming=False):
        model, tok = read_hugging_face(step / "base")
        if (step / "adapter").is_dir():
            model = adapters.attach(model, step / "adapter")
    return model, tok


def trained_seq_len(folder):
    """The tokens per sequence that a model was trained on, or None if nothing records them.

    folder: as load() returns it. max_position_embeddings is another number after --init_from.
    """
    step = folder.parent if folder.name in ("base", "adapter") else folder
    if (step / "state.json").exists():
        return count_of(read_state(step)["config"], "seq_len", step / "state.json")
    file = folder / "config.json"
    if file.exists():
        config = read_object(file)
        if config.get("seq_len") is not None:
            return count_of(config, "seq_len", file)
    return None


def one_line(error):
    """The text of an exception in one line."""
    return " ".join(str(error).split())
