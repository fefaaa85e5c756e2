"""Adapter folders: peft's format, MoRA's own, and the format of the fork of MoRA's authors.

    adapter_config.json         peft_type LORA: r, lora_alpha, target_modules, ...: peft loads it
                                peft_type MORA: r, target_modules, operator, groups, seed, cycle
    adapter_model.safetensors   base_model.model.<layer>.lora_A.weight, .lora_B.weight,
                                .mora_M.weight, .lora_magnitude_vector (DoRA)

The tensors say which layers are adapted; the config says how. A key that is not implemented here is
refused by its name if it has a value.

For any torch model that mora.adapt adapted:

    adapters.save(model, folder)      write the adapter folder; peft loads it if it is LoRA or DoRA
    adapters.load(model, folder)      adapt a plain model with a folder, of peft too
    adapters.as_lora(model, folder)   write a MoRA adapter as a LoRA that peft and others load
"""
import json
import math
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import mora
from config import UserError, read_json, write_json
from lora import LowRank, Rescaled

PREFIX = "base_model.model."
BESIDE = "../base"  # the base model of a checkpoint's adapter, beside its folder
KEYS = {"A": "lora_A.weight", "B": "lora_B.weight", "M": "mora_M.weight",
        "magnitude": "lora_magnitude_vector"}  # {parameter of an update: end of its tensor's name}

# keys of adapter_config.json that are implemented
IMPLEMENTED = {
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
    "base_model_name_or_path", "bias", "init_lora_weights", "use_mora", "mora_type", "operator",
    "groups", "seed", "cycle", "fan_in_fan_out"}
# keys that do not change the trained function: how A started, what ran, with which versions
HARMLESS = {
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout",
    "task_type", "inference_mode", "auto_mapping", "peft_version", "revision", "megatron_core",
    "qalora_group_size", "runtime_config", "ensure_weight_tying", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config"}
# other values of `bias` and `init_lora_weights` change the biases or the base model itself
IMPLEMENTED_VALUES = {
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "operator": mora.OPERATORS, "groups": mora.GROUPS}


# ------------------------------------------------------------
# write

def write(folder, updates, *, method, rank, targets, cycle=0, base=None, alpha=0.0, rslora=False,
          dora=False, dropout=0.0, operator="share", groups="strided", seed=0, train_rest=False,
          lora_A="uniform", more_config=None, metadata=None):
    """Write an adapter folder.

    updates: {name of mora.adapter_parameters: tensor}. base: the Hugging Face directory of the
    adapted model, relative to the folder. The other arguments are those that mora.adapt was given;
    train_rest and lora_A concern training alone (what trained beside the update is in the base).
    more_config: keys of adapter_config.json beside those, or instead of them. metadata: strings for
    the head of the safetensors file.
    """
    config = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
              "r": rank, "lora_dropout": dropout, "target_modules": list(targets), "use_dora": dora}
    if method == "lora":
        lora_alpha = alpha or rank  # alpha 0 is scale 1
        if lora_alpha == int(lora_alpha):
            lora_alpha = int(lora_alpha)
        config |= {"peft_type": "LORA", "lora_alpha": lora_alpha, "use_rslora": rslora,
                   "bias": "none", "fan_in_fan_out": False}
    else:
        config |= {"peft_type": "MORA", "operator": operator, "groups": groups, "seed": seed,
                   "cycle": cycle}
    tensors = {}
    for name, tensor in updates.items():
        layer, _, key = name.partition(".update.")
        tensor_name = f"{PREFIX}{layer}.{KEYS[key.removeprefix('inner.')]}"
        tensors[tensor_name] = tensor.detach().cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "adapter_config.json", config | (more_config or {}))
    metadata = {"format": "pt"} | (metadata or {})
    save_file(tensors, folder / "adapter_model.safetensors", metadata)


def save(model, folder, base=None):
    """Write the updates of an adapted torch model as an adapter folder.

    base: name or path of the base model; None: what transformers loaded it from, if it did. Raises
    UserError if the folder could not give the model back: parameters beside the updates trained, or
    the layers have updates of several kinds.
    """
    layers = mora.adapted_layers(model)
    if not layers:
        raise UserError("the model has no adapted layers to save")
    updates = dict(mora.adapter_parameters(model))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    rest = [name for name in trained if name not in updates]
    if rest:
        raise UserError(f"{len(rest)} parameters train beside the updates (first {rest[0]}), and "
                        "an adapter folder does not hold them: merge the model and save all of it, "
                        "or freeze them")
    options = [options_of(name, layer) for name, layer in layers]
    ranks = {name: each.pop("rank") for (name, _), each in zip(layers, options, strict=True)}
    alphas = {name: each.pop("alpha", 0.0) or ranks[name]  # alpha 0 is scale 1
              for (name, _), each in zip(layers, options, strict=True)}
    different = next((each for each in options if each != options[0]), None)
    if different:
        raise UserError(f"one adapter folder cannot hold {layers[0][0]} with {options[0]} and "
                        f"another layer with {different}")
    rank, alpha = max(ranks.values()), max(alphas.values())
    more_config = config_for_any_model(model)
    if options[0]["method"] == "lora":
        more_config["alpha_pattern"] = patterns_of(alphas, alpha)
        options[0]["alpha"] = alpha
    more_config["rank_pattern"] = patterns_of(ranks, rank)
    write(Path(folder), updates, rank=rank, targets=targets_of(model),
          base=base or getattr(model, "name_or_path", None), more_config=more_config, **options[0])


def options_of(name, layer):
    """The arguments of `write` that one adapted layer fixes."""
    dora = isinstance(layer.update, Rescaled)
    update = layer.update.inner if dora else layer.update
    options = {"dora": dora, "dropout": layer.dropout}
    if isinstance(update, LowRank):
        return options | {"method": "lora", "rank": update.rank, "alpha": update.alpha,
                          "rslora": update.rslora}
    if isinstance(update, mora.Square):
        return options | {"method": "mora", "rank": update.rank, **layer.get_extra_state()}
    raise UserError(f"{name}: an update of the kind {type(update).__name__} has no adapter format: "
                    "merge the model and save all of it")


def config_for_any_model(model):
    """The keys of adapter_config.json that depend on the model rather than on the update."""
    transposed = any(layer.transposed for _, layer in mora.adapted_layers(model))
    generates = hasattr(model, "prepare_inputs_for_generation")
    return {"task_type": "CAUSAL_LM" if generates else None, "fan_in_fan_out": transposed}


def targets_of(model):
    """peft's target_modules: the last parts of names, or whole names if those match more layers."""
    names = {name for name, _ in mora.adapted_layers(model)}
    ends = sorted({name.rpartition(".")[2] for name in names})
    is_ambiguous = any(name.rpartition(".")[2] in ends for name in mora.find_linears(model))
    return sorted(names) if is_ambiguous else ends


def patterns_of(values, default):
    """peft's pattern dict, {regular expression: value}, of the layers {name: value} that differ."""
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != default}


# ------------------------------------------------------------
# read

def read(folder):
    """(config, {layer: {"A": tensor, ...}}) of an adapter folder.

    Raises UserError for a file that cannot be read and for a key that is not implemented.
    """
    config_file, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config = read_json(config_file, dict)
    refuse(config, config_file)
    if not file.exists() and (folder / "adapter_model.bin").exists():
        raise UserError(f"{folder} holds a pickled adapter_model.bin, which is not read: save it "
                        "again with safe_serialization=True")
    layers = {}
    for name, tensor in read_tensors(file).items():
        layer, key = layer_and_key(name, file)
        layers.setdefault(layer, {})[key] = tensor
    if config.get("use_mora"):
        drop_second_copies(layers, file)
    return lora_as_mora(config, layers, file)


def layer_and_key(name, file):
    """("model.layers.0.self_attn.q_proj", "A") of the name of a tensor."""
    for key, end in KEYS.items():
        if name.startswith(PREFIX) and name.endswith(f".{end}"):
            return name[len(PREFIX):-len(end) - 1], key
    raise UserError(f"{file}: {name} is no part of an adapter of linear layers "
                    f"({', '.join(KEYS.values())})")


def refuse(config, config_file):
    """Raise UserError if a key of adapter_config.json asks for what is not implemented."""
    kind = config.get("peft_type")
    if kind not in ("LORA", "MORA"):
        raise UserError(f"{config_file}: peft_type {kind!r} is not implemented, only LORA (with "
                        "DoRA, rsLoRA) and MORA")
    needed = ("r", "lora_alpha") if kind == "LORA" else ("r", "operator", "groups", "seed", "cycle")
    for key in needed:
        if config.get(key) is None or (key == "lora_alpha" and config[key] == 0):
            raise UserError(f"{config_file}: {key} is {config.get(key)}, so the update is unknown")
    for key, value in config.items():
        values = IMPLEMENTED_VALUES.get(key)
        if values and value not in values:
            raise UserError(f"{config_file}: {key} = {value!r} is not implemented, only "
                            f"{', '.join(map(repr, values))}")
        if key not in IMPLEMENTED | HARMLESS and value:
            raise UserError(f"{config_file}: {key} = {value!r} is not implemented")
    if config.get("use_mora"):
        refuse_authors(config, config_file)


def weights(folder):
    """{name of mora.adapter_parameters: tensor} of an adapter folder."""
    config, layers = read(folder)
    named = {}
    for layer, tensors in layers.items():
        for key, tensor in tensors.items():
            is_inner = config.get("use_dora") and key != "magnitude"
            named[f"{layer}.update.{'inner.' if is_inner else ''}{key}"] = tensor
    return named


def base_of(folder, base=None):
    """The Hugging Face directory that an adapter folder adapts: `base`, or the one that it names.

    The name is looked up from the folder, then from the working directory. BESIDE is looked up from
    the folder alone: in the working directory it may be another model.
    """
    named = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if base:
        places = [Path(base)]
    elif named == BESIDE:
        places = [folder / named]
    else:
        places = [folder / named, Path(named)] if named else []
    for place in places:
        if (place / "config.json").exists():
            return place
    raise UserError(f"{folder}: its base model {str(base or named)!r} is no Hugging Face directory "
                    "here: name one with --base=...")


def load(model, folder):
    """Adapt a plain torch model with the adapter of a folder, in place; returns the model.

    The updates train and the rest is frozen, as after mora.adapt. Dropout is off. Raises UserError
    for a folder that does not fit the model.
    """
    if mora.adapted_layers(model):
        raise UserError("the model is adapted already: merge it first")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return attach(model, Path(folder), exclude=())


@torch.no_grad()
def attach(model, folder, exclude=("lm_head",)):
    """Adapt a plain model with the adapter of a folder, in place; returns the model.

    exclude: names of layers whose weight the model reads itself; model.py's loss does so with
    lm_head. Raises UserError for layers that do not fit.
    """
    config, layers = read(folder)
    linears = {name: linear for name, linear in mora.find_linears(model).items()
               if name not in exclude}
    if config.get("fan_in_fan_out") and not any(map(mora.is_transposed, linears.values())):
        raise UserError(f"{folder}: fan_in_fan_out is of models with transposed weights (GPT-2)")
    try:
        fitting = {name: linears[name] for name in layers if name in linears}
        mora.refuse_unfit(model, fitting)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from None
    for name in layers:
        if name not in linears:
            raise UserError(f"{folder} adapts {name}, which is no linear layer of the base model's "
                            "blocks: is it of another base model?")
        try:
            update = update_of(config, name, linears[name])
        except ValueError as error:
            raise UserError(f"{folder}: {name}: {error}") from None
        dora = bool(config.get("use_dora"))
        model.set_submodule(name, mora.AdaptedLinear(linears[name], update, dora=dora))
    adapted = mora.adapted_layers(model)
    if config["peft_type"] == "MORA":
        mora.start_cycle(adapted, config["seed"], config["cycle"])  # the groups of its cycle
    for name, layer in adapted:
        parameters = {key.removeprefix("inner."): parameter
                      for key, parameter in layer.update.named_parameters()}
        given, needed = shapes_of(layers[name]), shapes_of(parameters)
        if given != needed:
            raise UserError(f"{folder}: {name} has {given}, but here it takes {needed}: is it of "
                            "another base model?")
        for key, parameter in parameters.items():
            parameter.copy_(layers[name][key])
    mora.save_pretrained_merged(model)
    return model


def shapes_of(tensors):
    """The names and shapes of {"A": tensor, ...} as text."""
    listed = [f"{KEYS[key]} {' x '.join(map(str, tensor.shape))}"
              for key, tensor in sorted(tensors.items())]
    return ", ".join(listed) or "nothing"


def update_of(config, name, linear):
    """The update that a config describes for one layer, to be filled; DoRA's inner one."""
    rank = value_for(name, config.get("rank_pattern"), config["r"])
    shape = mora.update_shape(linear) | {"rank": rank}
    if config.get("use_mora"):
        return AuthorsSquare(**shape, mora_type=config.get("mora_type", 1))
    if config["peft_type"] == "LORA":
        alpha = value_for(name, config.get("alpha_pattern"), config["lora_alpha"])
        return LowRank(**shape, alpha=alpha, rslora=bool(config.get("use_rslora")))
    return mora.Square(**shape, operator=config["operator"], groups=config["groups"])


def value_for(name, patterns, default):
    """The value of the first of peft's patterns that matches a layer, else the default.

    patterns: {regular expression of the end of a name: value}, or None.
    """
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return default


def read_tensors(file):
    """{name: tensor} of a safetensors file."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None


# ------------------------------------------------------------
# MoRA as LoRA
#
# With one block (share, truncate) dW = (F_out^T M) F_in is a LoRA of rank r^: A = F_in is a matrix
# of zeros and ones, B = F_out^T M. With m blocks (decouple, rotate) the rank is up to m r^.

@torch.no_grad()
def as_lora(model, folder, dtype=torch.float32, rank=0, base=None):
    """Write the MoRA adapter of a model as a LoRA in peft's format (a DoRA, if it is one).

    rank 0: exact, for share and truncate alone. Otherwise every dW is cut to this rank by an SVD.
    All layers get the largest rank, filled with zeros, and scale 1: not all tools that load LoRA
    take a rank or a scale per layer. base: as in `save`.

    Returns {"rank": of the LoRA, "bytes": of its file, "error": the largest relative Frobenius
    error of a layer's dW}. Raises UserError if the model has no MoRA, or no exact LoRA.
    """
    layers = mora.adapted_layers(model)
    options = [options_of(name, layer) for name, layer in layers]
    if not options or any(each["method"] != "mora" for each in options):
        raise UserError("the model has no MoRA adapter to write as a LoRA")
    factors, magnitudes = {}, {}
    for name, layer in layers:
        square = layer.update
        if isinstance(square, Rescaled):
            magnitudes[f"{name}.update.magnitude"] = square.magnitude
            square = square.inner
        if not rank and square.fold_in.blocks > 1:
            limit = min(square.fold_in.features, square.fold_out.features)
            raise UserError(f"{name}: {square.operator} makes a dW of rank up to {limit}, so no "
                            "LoRA of rank r^ equals it: name a rank to cut it to, or merge it")
        A, B = cut_factors(square, rank) if rank else exact_factors(square)
        factors[name] = (square.delta(), A.to(dtype), B.to(dtype))
    width = max(len(A) for _, A, _ in factors.values())
    updates, errors = dict(magnitudes), []
    for name, (dW, A, B) in factors.items():
        error = (dW - B.to(dW.dtype) @ A.to(dW.dtype)).norm() / dW.norm().clamp_min(1e-30)
        errors.append(float(error))
        updates[f"{name}.update.A"] = F.pad(A, (0, 0, 0, width - len(A)))
        updates[f"{name}.update.B"] = F.pad(B, (0, width - len(A)))
    metadata = {}
    if not rank:
        settings = {key: options[0][key] for key in ("rank", "operator", "groups", "seed", "cycle")}
        metadata = {"mora": json.dumps(settings)}
    write(Path(folder), updates, method="lora", rank=width, targets=targets_of(model),
          dora=bool(magnitudes), base=base or getattr(model, "name_or_path", None),
          more_config=config_for_any_model(model), metadata=metadata)
    size = (Path(folder) / "adapter_model.safetensors").stat().st_size
    return {"rank": width, "bytes": size, "error": max(errors)}


def exact_factors(square):
    """(A, B) with B A = dW of a Square of one block: A = F_in (r^, in), B = F_out^T M (out, r^)."""
    fold, M = square.fold_in, square.M
    identity = torch.eye(fold.features, dtype=M.dtype, device=M.device)
    A = fold(identity)[:, 0].T
    B = square.fold_out.adjoint(M.T[:, None]).T
    return A, B


def cut_factors(square, rank):
    """(A, B) of the matrix of this rank that is nearest to dW."""
    U, S, Vh = torch.linalg.svd(square.delta().double(), full_matrices=False)
    root = S[:rank].sqrt()
    return (root[:, None] * Vh[:rank]).to(square.M), (U[:, :rank] * root).to(square.M)


@torch.no_grad()
def lora_as_mora(config, layers, file):
    """(config, layers) of the MoRA that `as_lora` wrote as this LoRA, or of the LoRA itself.

    It is a MoRA if A and B are bit for bit what as_lora makes of one: nothing trained since.
    """
    with safe_open(file, "pt") as opened:
        settings = json.loads((opened.metadata() or {}).get("mora", "null"))
    if not settings or config["peft_type"] != "LORA":
        return config, layers
    squares = {}
    for name, tensors in layers.items():
        A, B = tensors["A"], tensors["B"]
        dtype = torch.promote_types(B.dtype, torch.float32)
        square = mora.Square(A.shape[1], B.shape[0], settings["rank"], settings["operator"],
                             settings["groups"], dtype=dtype)
        linear = nn.Linear(A.shape[1], B.shape[0], bias=False, device="meta")
        layer = mora.AdaptedLinear(linear, square)
        mora.start_cycle([(name, layer)], settings["seed"], settings["cycle"])
        width, order = len(square.M), square.fold_out.order
        rows = min(width, B.shape[0])
        first_members = torch.arange(rows) if order is None else order[:rows].long()
        square.M[:rows] = B[first_members, :width].to(square.M)
        expected_A, expected_B = exact_factors(square)
        padding = len(A) - width
        if padding < 0 or not torch.equal(A.to(dtype), F.pad(expected_A, (0, 0, 0, padding))):
            return config, layers
        if not torch.equal(B.to(dtype), F.pad(expected_B, (0, padding))):
            return config, layers
        kept = {key: tensor for key, tensor in tensors.items() if key == "magnitude"}
        squares[name] = kept | {"M": square.M.to(B.dtype)}
    own = {"peft_type": "MORA", "r": settings["rank"]}
    own |= {key: settings[key] for key in ("operator", "groups", "seed", "cycle")}
    return config | own, squares


# ------------------------------------------------------------
# the fork of MoRA's authors (kongds/MoRA): read, never written
#
# Its folders have peft_type LORA, use_mora true, a mora_type, and M under the name lora_A, with a
# second copy as lora_B. Its maps differ from mora.py's where r^ does not divide the features: the
# last piece of the inputs is filled with the first inputs again, where mora.py pads with zeros.
#
#     mora_type   1: share; 2: share, groups of neighbours; 3: the inputs alone in groups of
#                 neighbours; 4: the outputs alone; 6: rotate

AUTHORS_TYPES = (1, 2, 3, 4, 6)


def refuse_authors(config, config_file):
    """Raise UserError for a use_mora config that is not implemented."""
    mora_type, dora = config.get("mora_type", 1), config.get("use_dora", False)
    if mora_type not in AUTHORS_TYPES or dora:
        types = ", ".join(map(str, AUTHORS_TYPES))
        raise UserError(f"{config_file}: use_mora with mora_type {mora_type} and use_dora {dora} "
                        f"is not implemented, only mora_type {types} without DoRA")


def drop_second_copies(layers, file):
    """Remove lora_B from {layer: {"A": tensor, ...}}: the fork saves lora_A there again."""
    for name, tensors in layers.items():
        copy = tensors.pop("B", None)
        if copy is not None and not torch.equal(copy, tensors.get("A", copy)):
            raise UserError(f"{file}: {name} has a lora_B that is not its lora_A, as use_mora "
                            "makes it")


def authors_r_hat(rank, in_features, out_features, mora_type):
    """Their width: sqrt(rank (in + out)) rounded to nearest; even for type 6."""
    width = int(math.sqrt((in_features + out_features) * rank) + 0.5)
    return width - width % 2 if mora_type == 6 else width


def check_authors_width(mora_type, width, in_features):
    """Raise ValueError for a width on which their forward fails: no such adapter can exist."""
    if mora_type not in (2, 3) and width > 2 * in_features:
        raise ValueError(f"mora_type {mora_type} wraps {in_features} inputs around once and cannot "
                         f"fill r^ = {width} of them")
    if mora_type == 6 and width % 2:
        raise ValueError(f"mora_type 6 rotates pairs and needs an even r^, got {width}")


def authors_delta(mora_type, M, in_features, out_features):
    """dW (out, in) of a square M (r^, r^)."""
    width = len(M)
    check_authors_width(mora_type, width, in_features)
    pieces = -(-in_features // width)
    input_at = torch.arange(pieces * width, device=M.device) % in_features  # of every position
    if mora_type in (1, 4):
        rows = M.new_zeros(width, in_features).index_add(1, input_at, M.repeat(1, pieces))
    elif mora_type in (2, 3):
        rows = M[:, neighbour_groups(in_features, width, M.device)]
    else:
        diagonal = torch.block_diag(*rotated_blocks(M, pieces))
        rows = M.new_zeros(len(diagonal), in_features).index_add(1, input_at, diagonal)
    if mora_type in (2, 4):
        return rows[neighbour_groups(out_features, width, M.device)]
    return rows[torch.arange(out_features, device=M.device) % len(rows)]


def neighbour_groups(features, width, device):
    """(features,): groups of neighbours; the first features mod width groups are one larger."""
    groups = torch.arange(width, device=device)
    sizes = features // width + (groups < features % width)
    return groups.repeat_interleave(sizes)


def rotated_blocks(M, pieces):
    """[M R_p]: R_p rotates the pairs (j, j + r^/2) by p * 10000^(-2j/r^)."""
    width = len(M)
    pair = torch.arange(0, width, 2, device=M.device, dtype=torch.float64)
    theta = 10000.0 ** (-pair / width)
    first, second = M.chunk(2, dim=1)
    blocks = []
    for piece in range(pieces):
        cos, sin = (piece * theta).cos().to(M), (piece * theta).sin().to(M)
        blocks.append(torch.cat((first * cos + second * sin, second * cos - first * sin), dim=1))
    return blocks


class AuthorsSquare(nn.Module):
    """An update of theirs. `A` (r^, r^) is M, under the name that their files have for it."""

    def __init__(self, in_features, out_features, rank, mora_type, device=None, dtype=None):
        super().__init__()
        self.mora_type, self.features = mora_type, (in_features, out_features)
        width = authors_r_hat(rank, in_features, out_features, mora_type)
        check_authors_width(mora_type, width, in_features)
        self.A = nn.Parameter(torch.zeros(width, width, device=device, dtype=dtype))

    def delta(self):
        """dW, (out, in)."""
        return authors_delta(self.mora_type, self.A, *self.features)

    def forward(self, x):
        """dW x, (..., in) -> (..., out), in x's dtype."""
        return F.linear(x, self.delta().to(x.dtype))
