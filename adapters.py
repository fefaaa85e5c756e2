"""Adapter folders: peft's format, MoRA's own, and the format of the fork of MoRA's authors.

    adapter_config.json         peft_type LORA: r, lora_alpha, target_modules, ...: peft loads it
                                peft_type MORA: r, target_modules, operator, groups, seed, cycle
    adapter_model.safetensors   base_model.model.<layer>.lora_A.weight and others, see KEYS
"""
import json
import os
import re
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import mora
from config import UserError, as_user_error, need, read_json, write_json
from lora import LowRank, Rescaled

BESIDE = "../base"  # the base model of a checkpoint's adapter, beside its folder
PREFIX = "base_model.model."
# {tensor of an update: end of its name in a file}
KEYS = {"A": "lora_A.weight", "B": "lora_B.weight", "M": "mora_M.weight",
        "magnitude": "lora_magnitude_vector"}  # of DoRA

# keys of adapter_config.json, a regular expression of their JSON, and what that is in words
COUNT, TEXT = r"[1-9]\d{0,4}", r'"([^"\\]|\\.)*"'
SCALE = r"(?=[\d.]*[1-9])\d{1,300}(\.\d+)?(e[+-]\d+)?"
CHECKS = {key: check for keys, *check in (
    ("peft_type", '"LORA"|"MORA"'),
    ("use_rslora use_dora use_mora fan_in_fan_out", "true|false"),
    ("operator", "|".join(map(json.dumps, mora.OPERATORS))),
    ("groups", "|".join(map(json.dumps, mora.GROUPS))),
    ("mora_type", "1|2|3|4|6"),  # of the fork of MoRA's authors
    ("seed", r"-?\d+", "a whole number"),
    ("cycle", r"\d+", "a whole number from 0"),
    ("r lora_rank", COUNT, "a whole number from 1 to 99999"),
    ("lora_alpha", SCALE, "a finite number above 0"),
    ("rank_pattern", rf"{{({TEXT}: {COUNT}(, )?)*}}", "an object of whole numbers from 1 to 99999"),
    ("alpha_pattern", rf"{{({TEXT}: {SCALE}(, )?)*}}", "an object of finite numbers above 0"),
    ("base_model_name_or_path", TEXT, "text"),
    ("bias", '"none"'),
    ("init_lora_weights", 'true|false|"gaussian"|"eva"|"orthogonal"'),  # others change the base
    ("target_modules", rf"{TEXT}|\[({TEXT}(, )?)*\]", "text or a list of texts"),
    # not read: they do not change the trained function
    ("exclude_modules layers_pattern layers_to_transform task_type inference_mode "
     "lora_dropout auto_mapping peft_version revision megatron_core qalora_group_size loftq_config "
     "runtime_config ensure_weight_tying eva_config corda_config lora_ga_config", ".*"),
) for key in keys.split()}
AUTHORS_CHECKS = CHECKS | {"peft_type": ['"LORA"'], "use_dora": ["false"]}  # with use_mora
NOT_IMPLEMENTED = r'false|0|""|\[\]|{}', "left out: it is not implemented"
NEEDED = {"LORA": ("peft_type", "r", "lora_alpha"),
          "MORA": ("r", "operator", "groups", "seed", "cycle")}  # the others may be null or missing
PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}  # what layers have instead
LAST_PARTS = r"(.*\.)?({})"  # of a name: what the patterns match


def read_config(folder):
    """The adapter_config.json of a folder. Raises UserError that names a wrong key and value."""
    file = folder / "adapter_config.json"
    config = read_json(file)
    checks = AUTHORS_CHECKS if config.get("use_mora") else CHECKS
    needed = NEEDED["MORA" if config.get("peft_type") == "MORA" else "LORA"]
    for key in (*needed, *config):
        text, (form, *words) = json.dumps(config.get(key)), checks.get(key, NOT_IMPLEMENTED)
        must_be = words[0] if words else form.replace("|", " or ")
        need(re.fullmatch(form, text) or text == "null" and key not in needed,
             f"{file}: {key} must be {must_be}, got {text[:80]}")
    for pattern in PATTERNS.values():
        for text in config.get(pattern) or ():
            with as_user_error(f"{file}: {pattern} holds {text!r:.80}, no regular expression",
                               re.error, OverflowError, RecursionError):
                re.compile(LAST_PARTS.format(text))
    lora_rank, ranks = config.get("lora_rank"), [*(config.get("rank_pattern") or {}).values()]
    need(not lora_rank or config["peft_type"] == "MORA" and not config.get("use_dora")
         and lora_rank < min([config["r"], *ranks]), f"{file}: lora_rank must be less than r and "
         f"each rank of rank_pattern, of peft_type MORA without use_dora, got {lora_rank}")
    return config


def save(model, folder, base=None):
    """Write the updates of an adapted torch model as an adapter folder.
    base: name or path of the base model; None: what transformers loaded it from, if it did. Raises
    UserError if other parameters train, updates are of several kinds, or a restart changed W."""
    config, updates = config_of(model, base), mora.gather(dict(mora.adapter_parameters(model)))
    parameters = mora.unwrapped(model).named_parameters()
    rest = [name for name, p in parameters if p.requires_grad and name not in updates]
    need(not rest, f"{len(rest)} parameters train beside the updates ({', '.join(rest[:2])}) and "
         "do not fit into an adapter folder: merge the model and save all of it, or freeze them")
    if None not in updates.values():  # of a sharded model rank 0 has the tensors, and writes
        write(Path(folder), config, updates)


def write(folder, config, updates, metadata=None):
    """Write {name of mora.adapter_parameters: tensor}; metadata: strings for the file's head."""
    tensors = {}
    for name, tensor in updates.items():
        layer, _, key = name.partition(".update.")
        end = KEYS[re.sub(r"^(inner|low_rank)\.", "", key)]
        tensors[f"{PREFIX}{layer}.{end}"] = tensor.detach().cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "adapter_config.json", config)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"} | (metadata or {}))


def config_of(model, base=None):
    """The adapter_config.json of an adapted model, a dict; see `save`."""
    config, ranks, alphas, model = {}, {}, {}, mora.unwrapped(model)
    for name, layer in mora.adapted_layers(model):
        dora = isinstance(layer.update, Rescaled)
        update = layer.update.inner if dora else layer.update
        need(isinstance(update, mora.Square | LowRank), f"{name}: an update of the kind "
             f"{type(update).__name__} has no adapter format: merge the model and save all of it")
        own = {"use_dora": dora, "lora_dropout": layer.dropout, "fan_in_fan_out": layer.transposed}
        if isinstance(update, mora.Square):
            own |= {"peft_type": "MORA", **layer.get_extra_state()}
        else:
            own |= {"peft_type": "LORA", "use_rslora": update.rslora}
            alpha = update.alpha or update.rank  # alpha 0 is scale 1
            alphas[name] = int(alpha) if alpha == int(alpha) else alpha
        need(base or not layer.restarted, "restarts added updates to the weights, which the base "
             "model lacks: save the merged model, or name the folder of these weights with base=")
        ranks[name], config = update.rank, config or own
        need(own == config, f"one adapter folder cannot hold layers with {config} and {own}")
    need(config, "the model has no adapted layers to save")
    for key, values in {"r": ranks, "lora_alpha": alphas}.items():
        if values:
            config[key] = most = max(values.values())
            config[PATTERNS[key]] = {f"^{re.escape(n)}": v for n, v in values.items() if v != most}
    last_parts = {name.rpartition(".")[2] for name in ranks}
    is_ambiguous = any(name.rpartition(".")[2] in last_parts for name in mora.find_linears(model))
    return config | {
        "base_model_name_or_path": str(base) if base else getattr(model, "name_or_path", None),
        "target_modules": sorted(ranks if is_ambiguous else last_parts),
        "task_type": "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
        "inference_mode": True, "bias": "none"}


def read_tensors(file):
    """({name: tensor}, metadata) of a safetensors file."""
    broken = as_user_error(f"{file} cannot be read", OSError, SafetensorError)
    with broken, safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}


def read(folder):
    """(config, {layer: {name of a parameter of its update: tensor}}) of an adapter folder."""
    config, file = read_config(folder), folder / "adapter_model.safetensors"
    inner = "inner." if config.get("use_dora") else ""
    need(file.exists() or not (folder / "adapter_model.bin").exists(), f"{folder} holds a pickled "
         "adapter_model.bin, which is not read: save with safe_serialization=True")
    layers, (tensors, metadata) = {}, read_tensors(file)
    for name, tensor in tensors.items():
        key = next((key for key, end in KEYS.items() if name.endswith(f".{end}")), None)
        need(key and name.startswith(PREFIX), f"{file}: {name} is no part of an adapter of linear "
             f"layers ({', '.join(KEYS.values())})")
        need(tensor.is_floating_point() and tensor.float().isfinite().all(),
             f"{file}: {name} ({tensor.dtype}) must hold finite real numbers")
        layer = name.removeprefix(PREFIX).removesuffix(f".{KEYS[key]}")
        part = "low_rank." if config.get("lora_rank") and key in "AB" else inner
        layers.setdefault(layer, {})[key if key == "magnitude" else part + key] = tensor
    need(layers, f"{file} holds no tensors, so it adapts nothing")
    for name, matrices in (layers.items() if config.get("use_mora") else ()):
        B = matrices.pop("B", None)  # the fork saves lora_A there again
        need(B is None or torch.equal(B, matrices.get("A", B)),
             f"{file}: {name} has a lora_B that is not its lora_A, as in use_mora")
    text, alpha = metadata.get("mora"), config.get("lora_alpha")
    is_scaled = alpha != config["r"] or config.get("use_rslora") or config.get("alpha_pattern")
    if text and not is_scaled and metadata.get("crc32") == checksum(text, tensors.values()):
        config = json.loads(text) | {"from_lora": True}  # nobody changed it since as_lora
    return config, layers


def checksum(text, tensors):
    """A number, as text, that changes if the text or one of the tensors does."""
    blocks = (tensor.detach().cpu().contiguous().view(torch.uint8) for tensor in tensors)
    return str(sum((zlib.crc32(block.numpy()) for block in blocks), zlib.crc32(text.encode())))


def base_of(folder, base=None):
    """The Hugging Face directory that an adapter folder adapts: `base`, or the one that it names,
    from the folder or (but not BESIDE, which may be another model there) the working directory."""
    named = read_config(folder).get("base_model_name_or_path")
    places = [Path(base)] if base else ([folder / named, Path(named)] if named else [])
    for place in (places[:1] if named == BESIDE else places):
        if os.path.isfile(place / "config.json"):  # Path.is_file raises for too long a name
            return place
    raise UserError(f"{folder}: its base model {base or named!r:.80} is no Hugging Face directory "
                    "here: name one with --base=...")


@torch.no_grad()
def load(model, folder, freeze=True, exclude=()):
    """Adapt a plain torch model with the adapter of a folder, in place; returns the model.
    The updates train, without dropout; freeze: nothing else does. exclude: layers whose weight the
    model reads itself, as model.py's loss does lm_head. Raises UserError if they do not fit."""
    need(not mora.adapted_layers(model), "the model is adapted already: merge it first")
    (config, layers), linears = read(Path(folder)), mora.find_linears(model)
    for name in layers:
        need(name in linears and name not in exclude, f"{folder} adapts {name}, which is no linear "
             "layer of the base model's blocks: is it of another base model?")
    texts = config.get("target_modules") or ()
    form = texts if isinstance(texts, str) else LAST_PARTS.format("|".join(map(re.escape, texts)))
    if config.get("layers_to_transform") is None and not config.get("exclude_modules"):
        with as_user_error(f"{folder}: target_modules", re.error, OverflowError, RecursionError):
            missing = [n for n in linears if n not in layers and re.fullmatch(form, n)]
        need(not missing, f"{folder} lacks {len(missing)} of the layers that its target_modules "
             f"names ({', '.join(missing[:2])}): is it whole, and of this base model?")
    with as_user_error(folder, ValueError):
        mora.refuse_unfit(model, {name: linears[name] for name in layers})
    if freeze:
        model.requires_grad_(False)
    for name, tensors in layers.items():
        with as_user_error(f"{folder}: {name}", ValueError), linears[name].weight.device:
            update = update_of(config, name, linears[name])
        layer = mora.AdaptedLinear(linears[name], update, dora=bool(config.get("use_dora")))
        if config["peft_type"] == "MORA":  # the groups of its cycle
            mora.start_cycle([(name, layer)], config["seed"], config["cycle"])
        if "from_lora" in config:
            restore(update, tensors)
        with as_user_error(f"{folder}: {name} does not fit the base model", RuntimeError):
            layer.update.load_state_dict(tensors)
        model.set_submodule(name, layer)
    mora.save_pretrained_merged(model)
    return model


def update_of(config, name, linear):
    """The update that a config describes for one layer, to be filled; DoRA's inner one."""
    def value_of(key):  # of the first of peft's patterns that matches, else the default
        for text, value in (config.get(PATTERNS[key]) or {}).items():
            if re.fullmatch(LAST_PARTS.format(text), name):
                return value
        return config[key]

    shape = *mora.features_of(linear), value_of("r")
    if config.get("use_mora"):
        return AuthorsSquare(*shape, config.get("mora_type") or 1)
    if config["peft_type"] == "MORA":
        options = config["operator"], config["groups"]
        if config.get("lora_rank"):
            return mora.Mixed(*shape, *options, config["lora_rank"])
        return mora.Square(*shape, *options)
    return LowRank(*shape, value_of("lora_alpha"), bool(config.get("use_rslora")))


# ---- MoRA as LoRA
# With one block (share, truncate) dW = (F_out^T M) F_in is a LoRA of rank r^: A = F_in is a matrix
# of zeros and ones, B = F_out^T M. With m blocks (decouple, rotate) the rank is up to m r^.

@torch.no_grad()
def as_lora(model, folder, dtype=torch.float32, rank=0, base=None):
    """Write the MoRA adapter of a model as a LoRA in peft's format (a DoRA, if it is one).
    rank 0: exact, for share and truncate alone; `load` makes a MoRA of it again. Otherwise an SVD
    cuts every dW to this rank. All layers get the largest rank, filled with zeros, and scale 1.
    Returns {"rank", "bytes", "error": the largest relative Frobenius error of a dW}."""
    folder, config, error = Path(folder), config_of(model, base), 0.0
    need(config["peft_type"] == "MORA", "the model has no MoRA adapter to write as a LoRA")
    squares = {name: getattr(m.update, "inner", m.update) for name, m in mora.adapted_layers(model)}
    updates = {name: p for name, p in mora.adapter_parameters(model) if name.endswith("magnitude")}
    common_rank = rank or max(len(s.M) + getattr(s, "lora_rank", 0) for s in squares.values())
    for name, square in squares.items():
        dW = square.delta()
        need(rank or square.fold_in.blocks == 1, f"{name}: {square.operator} makes a dW of rank up "
             f"to {min(dW.shape)}: no LoRA of rank r^ equals it; name a rank, or merge it")
        if rank:
            U, S, Vh = torch.linalg.svd(dW.double(), full_matrices=False)
            A, B = S[:rank].sqrt()[:, None] * Vh[:rank], U[:, :rank] * S[:rank].sqrt()
        else:
            identity = torch.eye(dW.shape[1], dtype=dW.dtype, device=dW.device)
            A, B = square.fold_in(identity)[:, 0].T, square.fold_out.adjoint(square.M.T[:, None]).T
            if config.get("lora_rank"):
                A = torch.cat((A, square.low_rank.A))
                B = torch.cat((B, square.low_rank.B), dim=1)
        A, B = A.to(dtype), B.to(dtype)
        lost = dW - B.to(dW.dtype) @ A.to(dW.dtype)
        error = max(error, (lost.norm() / dW.norm().clamp_min(1e-30)).item())
        updates[f"{name}.update.A"] = F.pad(A, (0, 0, 0, common_rank - len(A)))
        updates[f"{name}.update.B"] = F.pad(B, (0, common_rank - len(A)))
    text = json.dumps(config)
    # a LoRA's tensors do not tell where M ends and the LoRA beside it begins
    restorable = not rank and not config.get("lora_rank")
    metadata = {"mora": text, "crc32": checksum(text, updates.values())} if restorable else {}
    config = {key: value for key, value in config.items() if key not in mora.SETTINGS}
    config |= {"peft_type": "LORA", "r": common_rank, "lora_alpha": common_rank, "rank_pattern": {}}
    write(folder, config, updates, metadata)
    size = (folder / "adapter_model.safetensors").stat().st_size
    return {"rank": common_rank, "bytes": size, "error": error}


def restore(square, tensors):
    """Replace the A and B that as_lora made of a Square by its M, unless the features differ."""
    (A_name, A), (B_name, B) = sorted(tensors.items())[:2]  # then comes the magnitude of DoRA
    if (A.shape[1], len(B)) == (square.fold_in.features, square.fold_out.features):
        B = B.to(square.M.device, torch.float64)  # sums of equal float32 numbers are exact
        sums, counts = square.fold_out(B.T)[:, 0], square.fold_out(torch.ones_like(B[:, 0]))[0]
        tensors[A_name.replace("A", "M")] = (sums / counts.clamp_min(1)).T[:, :len(counts)]
        del tensors[A_name], tensors[B_name]


# ---- the fork of MoRA's authors (kongds/MoRA): read, never written

class AuthorsSquare(nn.Module):
    """An update of theirs, as Square: M (r^, r^), under the name lora_A, with a copy as lora_B. Its
    last piece of inputs is filled with the first inputs again, where mora.py pads with zeros."""

    def __init__(self, in_features, out_features, rank, mora_type):
        super().__init__()
        groups_in = "contiguous" if mora_type in (2, 3) else "strided"
        groups_out = "contiguous" if mora_type in (2, 4) else "strided"
        rotates = mora_type == 6
        width = int(((in_features + out_features) * rank) ** 0.5 + 0.5)
        width -= width % 2 if rotates else 0
        pieces_in, pieces_out = -(-in_features // width), -(-out_features // width)
        filled = pieces_in * width if groups_in == "strided" else in_features
        if filled > 2 * in_features:
            raise ValueError(f"mora_type {mora_type} wraps {in_features} inputs around once and "
                             f"cannot fill r^ = {width} of them")
        self.in_features, self.A = in_features, nn.Parameter(torch.zeros(width, width))
        blocks = pieces_in if rotates else 1
        self.fold_in = mora.Fold(filled, width, blocks, pieces_in, rotates, groups_in)
        self.fold_out = mora.Fold(out_features, width, blocks, pieces_out, False, groups_out)
        for fold in (self.fold_in, self.fold_out):
            fold.move(cycle=0, seed=0)

    def forward(self, x):
        filled = torch.arange(self.fold_in.features, device=x.device) % self.in_features
        return self.fold_out.adjoint(F.linear(self.fold_in(x[..., filled]), self.A.to(x.dtype)))

    def delta(self):
        return self(torch.eye(self.in_features, dtype=self.A.dtype, device=self.A.device)).T
