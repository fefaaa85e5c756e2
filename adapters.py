"""Adapter folders: written for peft, read from here, from peft and from MoRA's authors' fork of it.

    adapter_config.json          peft_type LORA (DoRA: use_dora): r, lora_alpha, target_modules, ...: peft's own format, which it loads
                                 peft_type MORA: r, target_modules, operator, groups, seed, cycle: the same container, ours alone
    adapter_model.safetensors    base_model.model.<layer>.lora_A.weight, .lora_B.weight, .mora_M.weight, .lora_magnitude_vector

The tensors say which layers are adapted, the config says how. What a config asks for that is not implemented here
is refused by its key: a key that this file does not know must be empty.
"""
import math
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import mora
from config import UserError, read_json, write_json
from lora import LowRank, Rescaled

PREFIX = "base_model.model."
BESIDE = "../base"  # the base model of our own adapters, beside their folder
KEYS = {"A": "lora_A.weight", "B": "lora_B.weight", "M": "mora_M.weight", "magnitude": "lora_magnitude_vector"}

# keys of peft's that are implemented, and those that say nothing about the trained function (how A started, what ran, with what versions)
KNOWN = {"peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "base_model_name_or_path", "bias",
         "init_lora_weights", "use_mora", "mora_type", "operator", "groups", "seed", "cycle"}
HARMLESS = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "task_type", "inference_mode",
            "auto_mapping", "peft_version", "revision", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying",
            "loftq_config", "eva_config", "corda_config", "lora_ga_config"}
# other values of the first two change the biases or the base model itself
ONLY = {"bias": ("none", None), "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"), "operator": mora.OPERATORS,
        "groups": mora.GROUPS}


def write(folder, updates, *, method, rank, targets, cycle=0, base=None, alpha=0.0, rslora=False, dora=False, dropout=0.0,
          operator="share", groups="strided", seed=0, train_rest=False, lora_A="uniform"):
    """Write an adapter folder: {name: tensor} of mora.adapter_parameters, and the arguments that mora.adapt was given.

    base: the Hugging Face directory of the adapted model, relative to the folder. train_rest and lora_A concern training alone: what
    trained beside the update is in the base.
    """
    config = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True, "r": rank, "lora_dropout": dropout,
              "target_modules": list(targets), "use_dora": dora}
    if method == "lora":
        scale = alpha or rank  # alpha 0 is scale 1
        config |= {"peft_type": "LORA", "lora_alpha": int(scale) if scale == int(scale) else scale, "use_rslora": rslora, "bias": "none",
                   "fan_in_fan_out": False}
    else:
        config |= {"peft_type": "MORA", "operator": operator, "groups": groups, "seed": seed, "cycle": cycle}
    tensors = {}
    for name, tensor in updates.items():
        layer, _, key = name.partition(".update.")
        tensors[f"{PREFIX}{layer}.{KEYS[key.removeprefix('inner.')]}"] = tensor.detach().cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "adapter_config.json", config)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def read(folder):
    """(config, {layer: {"A": tensor, ...}}) of an adapter folder; raises UserError with the key that is not implemented."""
    config, file = read_json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    refuse(config, folder / "adapter_config.json")
    if not file.exists() and (folder / "adapter_model.bin").exists():
        raise UserError(f"{folder} holds a pickled adapter_model.bin, which is not read: save it again with safe_serialization=True")
    layers = {}
    for key, tensor in read_tensors(file).items():
        ours = next((ours for ours, theirs in KEYS.items() if key.startswith(PREFIX) and key.endswith(f".{theirs}")), None)
        if not ours:
            raise UserError(f"{file}: {key} is no part of an adapter of linear layers ({', '.join(KEYS.values())})")
        layers.setdefault(key[len(PREFIX):-len(KEYS[ours]) - 1], {})[ours] = tensor
    for name, tensors in layers.items() if config.get("use_mora") else ():
        again = tensors.pop("B", None)  # their lora_B is lora_A, saved twice
        if again is not None and not torch.equal(again, tensors.get("A", again)):
            raise UserError(f"{file}: {name} has a lora_B that is not its lora_A, as use_mora makes it")
    return config, layers


def refuse(config, where):
    """Raise UserError for an adapter_config.json whose function would not be computed as it is meant, with the key."""
    kind = config.get("peft_type")
    if kind not in ("LORA", "MORA"):
        raise UserError(f"{where}: peft_type {kind!r} is not implemented, only LORA (with DoRA, rsLoRA) and MORA")
    for key in ("r", "lora_alpha") if kind == "LORA" else ("r", "operator", "groups", "seed", "cycle"):
        if config.get(key) is None or key == "lora_alpha" and not config[key]:
            raise UserError(f"{where}: {key} is {config.get(key)}, so it does not say what the update is")
    for key, value in config.items():
        if key in ONLY and value not in ONLY[key]:
            raise UserError(f"{where}: {key} = {value!r} is not implemented, only {', '.join(map(repr, ONLY[key]))}")
        if key not in KNOWN | HARMLESS and value:
            raise UserError(f"{where}: {key} = {value!r} is not implemented")
    theirs = config.get("mora_type", 1)
    if config.get("use_mora") and (theirs not in AUTHORS_TYPES or config.get("use_dora")):
        raise UserError(f"{where}: use_mora with mora_type {theirs} and use_dora {config.get('use_dora', False)} is not implemented, only "
                        f"mora_type {', '.join(map(str, AUTHORS_TYPES))} without DoRA")


def weights(folder):
    """{name of mora.adapter_parameters: tensor} of an adapter folder."""
    config, layers = read(folder)
    inner = {key: "inner." * bool(config.get("use_dora") and key != "magnitude") for key in KEYS}
    return {f"{layer}.update.{inner[key]}{key}": tensor for layer, tensors in layers.items() for key, tensor in tensors.items()}


def base_of(folder, base=None):
    """The Hugging Face directory that an adapter folder adapts: `base`, or what it names, from there or from here.

    BESIDE is looked for from there alone: beside here another model may lie under that name.
    """
    named = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    places = [Path(base)] if base else [folder / named, Path(named)][:1 if named == BESIDE else 2] if named else []
    found = [place for place in places if (place / "config.json").exists()]
    if not found:
        raise UserError(f"{folder}: its base model {str(base or named)!r} is no Hugging Face directory here: name one with --base=...")
    return found[0]


@torch.no_grad()
def attach(model, folder):
    """Adapt a plain model with the adapter of a folder, in place; returns it. Raises UserError for layers that do not fit."""
    config, layers = read(folder)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"}
    for name in layers:
        if name not in linears:
            raise UserError(f"{folder} adapts {name}, which is no linear layer of the base model's blocks: is it of another base model?")
        try:
            mora.replace(model, name, mora.AdaptedLinear(linears[name], update_of(config, name, linears[name])))
        except ValueError as error:
            raise UserError(f"{folder}: {name}: {error}")
    if config["peft_type"] == "MORA":
        mora.start(mora.adapted_layers(model), config["seed"], config["cycle"])  # the groups of its cycle
    for name, layer in mora.adapted_layers(model):
        parameters = {key.removeprefix("inner."): parameter for key, parameter in layer.update.named_parameters()}
        shapes, needed = ({key: tuple(t.shape) for key, t in some.items()} for some in (layers[name], parameters))
        if shapes != needed:
            raise UserError(f"{folder}: {name} has {as_text(shapes)}, but here it takes {as_text(needed)}: is it of another base model?")
        for key, parameter in parameters.items():
            parameter.copy_(layers[name][key])
    return model


def as_text(shapes):
    return ", ".join(f"{KEYS[key]} {' x '.join(map(str, shape))}" for key, shape in sorted(shapes.items())) or "nothing"


def update_of(config, name, linear):
    """The update that a config describes for one layer, still to be filled."""
    shape = dict(in_features=linear.in_features, out_features=linear.out_features, device=linear.weight.device,
                 dtype=torch.promote_types(linear.weight.dtype, torch.float32))
    rank = pattern(config, "rank_pattern", name, config["r"])
    if config.get("use_mora"):
        return AuthorsSquare(**shape, rank=rank, kind=config.get("mora_type", 1))
    if config["peft_type"] == "LORA":
        alpha = pattern(config, "alpha_pattern", name, config["lora_alpha"])
        update = LowRank(**shape, rank=rank, alpha=alpha, rslora=bool(config.get("use_rslora")))
    else:
        update = mora.Square(**shape, rank=rank, operator=config["operator"], groups=config["groups"])
    return Rescaled(linear, update) if config.get("use_dora") else update


def pattern(config, key, name, default):
    """The value of the first of peft's patterns, regular expressions of the ends of names, that matches a layer."""
    return next((value for end, value in (config.get(key) or {}).items() if re.fullmatch(rf"(.*\.)?({end})", name)), default)


def read_tensors(file):
    """{name: tensor} of a safetensors file."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} can not be read: {error}")


# ------------------------------------------------------------
# the fork of MoRA's authors

AUTHORS_TYPES = (1, 2, 3, 4, 6)


def authors_r_hat(rank, in_features, out_features, kind):
    """Their width: sqrt(rank (in + out)) rounded to nearest; even for type 6."""
    width = int(math.sqrt((in_features + out_features) * rank) + 0.5)
    return width - width % 2 if kind == 6 else width


def authors_check(kind, width, in_features):
    """Raise ValueError for a width on which their forward fails: no such adapter was ever trained."""
    if kind not in (2, 3) and width > 2 * in_features:
        raise ValueError(f"mora_type {kind} wraps {in_features} inputs around once and can not fill r^ = {width} of them")
    if kind == 6 and width % 2:
        raise ValueError(f"mora_type 6 rotates pairs and needs an even r^, got {width}")


def authors_delta(kind, M, in_features, out_features):
    """dW (out, in) of a square M (r^, r^)."""
    width = M.shape[0]
    authors_check(kind, width, in_features)
    padded = -(-in_features // width) * width
    inputs = torch.arange(padded, device=M.device) % in_features  # the input that lies at each position of the pieces
    if kind in (1, 4):
        compressed = M.new_zeros(width, in_features).index_add(1, inputs, M.repeat(1, padded // width))
    elif kind in (2, 3):
        compressed = M[:, contiguous(in_features, width, M.device)]
    else:
        compressed = M.new_zeros(padded, in_features).index_add(1, inputs, torch.block_diag(*rotated(M, padded // width)))
    if kind in (2, 4):
        return compressed[contiguous(out_features, width, M.device)]
    return compressed[torch.arange(out_features, device=M.device) % len(compressed)]


def contiguous(features, width, device):
    """The group of every feature: neighbours, the first features mod width groups one larger."""
    groups = torch.arange(width, device=device)
    return groups.repeat_interleave(features // width + (groups < features % width))


def rotated(M, pieces):
    """[M R_p]: R_p turns the pairs (j, j + r^/2) by p * 10000^(-2j/r^)."""
    width = M.shape[0]
    theta = 10000.0 ** (-torch.arange(0, width, 2, device=M.device, dtype=torch.float64) / width)
    angles = torch.arange(pieces, device=M.device)[:, None] * theta
    first, second = M.chunk(2, dim=1)
    return [torch.cat((first * cos + second * sin, second * cos - first * sin), dim=1)
            for cos, sin in zip(angles.cos().to(M), angles.sin().to(M))]


class AuthorsSquare(nn.Module):
    """An update of theirs. A is what their files call M."""

    def __init__(self, in_features, out_features, rank, kind, device=None, dtype=None):
        super().__init__()
        self.kind, self.shape = kind, (in_features, out_features)
        width = authors_r_hat(rank, in_features, out_features, kind)
        authors_check(kind, width, in_features)
        self.A = nn.Parameter(torch.zeros(width, width, device=device, dtype=dtype))

    def delta(self):
        return authors_delta(self.kind, self.A, *self.shape)

    def forward(self, x):
        return F.linear(x, self.delta().to(x.dtype))
