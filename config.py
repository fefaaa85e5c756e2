"""What a run is: one flat, frozen dataclass, filled from a config file and the command line.

    python train.py configs/250m_mora.py --rank=64 --steps=2000
    python train.py configs/metamath.py mora_r8 --lr=2e-4           a file with variants: name one
    python train.py --configs                                       lists the experiments
    python train.py --help                                          lists the keys

A config file is plain Python: assignments to the keys of Config. It may take over the keys of
another file with `from configs.c4_250m import *`; names that start with an underscore are private
to the file. `variants = {"name": dict(key=value, ...)}` makes several experiments of one file.
A variant overrides its file, and `--key=value` on the command line overrides both.
"""
import argparse
import ast
import contextlib
import dataclasses
import difflib
import errno
import io
import json
import os
import runpy
import signal
import socket
import sys
import textwrap
import time
import traceback
import types
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import lora
import mora

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ROOT = Path(__file__).parent
LARGEST = 2 ** 32 - 1  # whole number: products of seed, step and rank must fit into 64 bits
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class UserError(Exception):
    """A mistake that the user can correct: one line on stderr and exit status 2, no traceback."""


def key(default, explanation, choices=(), least=None, group=""):
    """A field of Config: its default, and what --help prints and check verifies.

    choices: the values allowed; "" among them means unset. least: the smallest number allowed.
    group: heading of the keys from here on.
    """
    details = {"explanation": explanation, "choices": choices, "least": least, "group": group}
    return dataclasses.field(default=default, metadata=details)


@dataclass(frozen=True)
class Config:
    out: str = key("", "run folder; empty: out/<config file>, with _<variant> if there is one",
                   group="run")
    seed: int = key(1337, "seed of initial weights, adapters and data order", least=0)
    resume: bool = key(False, "continue from the newest whole checkpoint in out")
    init_from: str = key("", "checkpoint or Hugging Face directory to start from; "
                         "empty: random weights")

    data: str = key("data/stdlib", "folder of token shards, prepared by data.py", group="data")
    seq_len: int = key(512, "tokens per sequence; for samples: at most so many", least=1)
    batch_size: int = key(64, "sequences per step, over all processes", least=1)
    micro_batch: int = key(0, "sequences per forward pass per process; 0: the process's "
                           "whole share", least=0)

    hidden_size: int = key(512, "width of the residual stream", least=1,
                           group="model (names as in Hugging Face's config.json)")
    intermediate_size: int = key(1376, "width of the feed-forward layers", least=1)
    num_hidden_layers: int = key(8, "transformer blocks", least=1)
    num_attention_heads: int = key(8, "query heads", least=1)
    num_key_value_heads: int = key(0, "key and value heads (grouped-query attention); 0: as many "
                                   "as query heads", least=0)
    tie_word_embeddings: bool = key(False, "the head is the embedding matrix")
    rope_theta: float = key(10000.0, "base of the rotary position embedding")
    rms_norm_eps: float = key(1e-6, "epsilon of RMSNorm", least=0)
    residual_init: bool = key(False, "draw o_proj and down_proj with standard deviation "
                              "0.02 / sqrt(2 num_hidden_layers); without init_from")

    method: str = key("mora", "what trains: full: every parameter; frozen: embeddings, norms and "
                      "head; lora, mora: these (see train_rest) and an update of each target",
                      ("full", *mora.METHODS), group="method")
    rank: int = key(8, "rank of LoRA; MoRA has one square matrix with at most as many parameters",
                    least=0)
    operator: str = key("", "mora only: how inputs and outputs are folded; empty: share",
                        ("", *mora.OPERATORS))
    groups: str = key("strided", "mora only: which inputs, and which outputs, form a group",
                      mora.GROUPS)
    alpha: float = key(0.0, "lora only: the update is scaled by alpha / rank; 0: scale 1", least=0)
    rslora: bool = key(False, "lora only: the scale is alpha / sqrt(rank) (rsLoRA)")
    lora_A: str = key("uniform", "lora only: how A is drawn; frozen: orthogonal, not trained "
                      "(AsyLoRA)", lora.KINDS_OF_A)
    lora_plus_ratio: float = key(1.0, "lora only: learning rate of B over that of A (LoRA+)")
    dora: bool = key(False, "lora, mora: rescale the rows of W + dW to trained magnitudes (DoRA)")
    dropout: float = key(0.0, "dropout on the input of the adapters")
    targets: tuple[str, ...] = key(PROJECTIONS, "names of the linear layers to adapt")
    train_rest: bool = key(True, "embeddings, norms and head train too; False: adapters only")
    restart_every: int = key(0, "steps between restarts, which merge the update and start a new "
                             "one (ReLoRA, ReMoRA); 0: none", least=0)
    restart_steps: tuple[int, ...] = key((), "steps of restarts, instead of restart_every")
    restart_keep: float = key(0.0, "fraction of the adapters' first moments that a restart keeps, "
                              "the largest ones; 0: optimizer state is dropped")

    steps: int = key(10000, "optimizer steps", least=1, group="optimizer")
    epochs: float = key(0.0, "passes over the training data, instead of steps; 0: steps", least=0)
    optimizer: str = key("adamw", "muon: the matrices of the update (full rank: of the blocks) "
                         "learn by Muon, everything else by AdamW", ("adamw", "muon"))
    schedule: str = key("cosine", "learning rate after the warm-up", ("cosine", "linear"))
    lr: float = key(5e-4, "peak learning rate")
    rest_lr: float = key(0.0, "peak learning rate of embeddings, head and norms; 0: lr", least=0)
    min_lr_ratio: float = key(0.1, "final learning rate as a fraction of lr")
    warmup: int = key(500, "steps of linear warm-up", least=0)
    restart_warmup: int = key(50, "steps of linear warm-up after each restart", least=0)
    weight_decay: float = key(0.0, "weight decay of matrices; norms have none", least=0)
    beta1: float = key(0.9, "AdamW's decay of the first moment")
    beta2: float = key(0.999, "AdamW's decay of the second moment")
    grad_clip: float = key(1.0, "largest gradient norm; 0: no clipping", least=0)

    log_every: int = key(10, "steps between log lines", least=1, group="log and checkpoints")
    eval_every: int = key(500, "steps between evaluations", least=1)
    eval_tokens: int = key(0, "validation tokens per evaluation; 0: all", least=0)
    save_every: int = key(500, "steps between checkpoints", least=1)
    keep: int = key(2, "checkpoints kept, the newest; 0: all", least=0)
    keep_best: bool = key(False, "also keep the checkpoint of the lowest validation loss")
    log_to: str = key("", "second log; empty: none", ("", "wandb", "tensorboard"))

    device: str = key("auto", "auto: cuda, else mps, else cpu", ("auto", "cpu", "cuda", "mps"),
                      group="machine")
    dtype: str = key("auto", "dtype of the computation, parameters are float32; auto: bfloat16 on "
                     "cuda, else float32", ("auto", "float32", "bfloat16"))
    base_dtype: str = key("float32", "dtype of the frozen weights; bfloat16 halves their memory "
                          "and computes W x and the update apart", ("float32", "bfloat16"))
    matmul: str = key("bf16", "fp8: products with frozen weights in FP8, on devices that have it",
                      ("bf16", "fp8"))
    shard: bool = key(False, "each process holds a part of the parameters, gradients and optimizer "
                      "state (torch's fully_shard), not a copy of them (DDP)")
    checkpoint_blocks: bool = key(False, "keep only the inputs of blocks for backward and compute "
                                  "the blocks again: less memory, more time")
    compile: str = key("auto", "torch.compile of each block; auto: on for cuda, else off",
                       ("auto", "on", "off"))

    def cycle(self, step):
        """(number of restarts up to and including this step, step of the latest one or 0)."""
        if self.restart_every:
            return step // self.restart_every, step - step % self.restart_every
        done = [restart for restart in self.restart_steps if restart <= step]
        return len(done), done[-1] if done else 0

    def model(self):
        """The shape of the model, under Hugging Face's names."""
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "tie_word_embeddings", "rope_theta", "rms_norm_eps")
        shape = {name: getattr(self, name) for name in names}
        shape["num_key_value_heads"] = self.num_key_value_heads or self.num_attention_heads
        return shape | {"max_position_embeddings": self.seq_len}

    def adapter(self):
        """The arguments of mora.adapt, or {} for full-rank training."""
        if self.method == "full":
            return {}
        names = ["method", "targets", "train_rest", "seed"]
        if self.method in ("lora", "mora"):
            names += ["rank", "dora", "dropout"]
        if self.method == "lora":
            names += ["alpha", "rslora", "lora_A"]
        if self.method == "mora":
            names += ["operator", "groups"]
        return {name: getattr(self, name) for name in names}


FIELDS = {field.name: field.type for field in dataclasses.fields(Config)}


# ---- from the command line to a Config

def load(argv, default):
    """The Config of a command line, `[FILE.py [VARIANT]] [--key=value ...]`. Raises UserError.

    default: the config file of a command line that names none. --help and --configs print their
    text and raise SystemExit.
    """
    for word, text in (("--help", help_text), ("-h", help_text), ("--configs", experiments_text)):
        if word in argv:
            print(text())
            raise SystemExit(0)
    words = [word for word in argv if not word.startswith("-")]
    if len(words) > 2:
        raise UserError(f"one config file and one variant at a time, got {' '.join(words)}; "
                        "overrides are written --key=value")
    path = Path(words[0] if words else default)
    variant = words[1] if len(words) == 2 else None
    values = settings(path, variant)
    for word in argv:
        if word.startswith("-"):
            override(values, *read_override(word))
    if not values.get("out"):
        values["out"] = f"out/{path.stem}_{variant}" if variant else f"out/{path.stem}"
    if values.get("method", Config.method) == "mora" and not values.get("operator"):
        values["operator"] = "share"
    cfg = Config(**values)
    check(cfg)
    return cfg


def settings(path, variant=None):
    """{key: value} of a config file and of the variant named, if the file has variants."""
    _, values, variants = read_file(path)
    if not variants and variant is None:
        return values
    if not variants:
        raise UserError(f"{path} has no variants, so it takes no second word, got {variant!r}; "
                        "overrides are written --key=value")
    if variant not in variants:
        raise UserError(_choose_variant(path, variant, variants))
    for name, value in variants[variant].items():
        override(values, name, value)
    return values


def override(values, name, value):
    """Set a key. A later `steps` replaces the `epochs` of the file, which would win otherwise."""
    values[name] = value
    if name == "steps":
        values.pop("epochs", None)


def read_override(word):
    """(key, value) of a word `--key=value`; `--key` alone sets a switch."""
    name, equals, text = word.lstrip("-").partition("=")
    known(name, "on the command line")
    if not equals and FIELDS[name] is not bool:
        raise UserError(f"--{name} needs a value: --{name}={_shown(getattr(Config, name))}")
    return name, parse(name, text if equals else "true")


def read_file(path):
    """(first docstring line, {key: value}, {variant: {key: value}}) of a config file."""
    if not path.is_file():
        raise UserError(_missing_file(path))
    names = _run_file(path)
    lines = (names.get("__doc__") or "").strip().splitlines()
    variants = names.pop("variants", {})
    named = variants.items() if isinstance(variants, dict) else [(None, variants)]
    if not all(isinstance(name, str) and isinstance(values, dict) for name, values in named):
        raise UserError(f'variants in {path} must be {{"name": dict(key=value, ...), ...}}')
    public = {name: value for name, value in names.items()
              if not name.startswith("_") and not isinstance(value, types.ModuleType)}
    return (lines[0] if lines else "", _cast_all(public, f"in {path}"),
            {name: _cast_all(values, f"in variant {name!r} of {path}")
             for name, values in variants.items()})


def _cast_all(values, where):
    return {known(name, where): cast(name, value, where) for name, value in values.items()}


def _run_file(path):
    """{name: value} of a config file that is run as Python, with this folder on the path."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    try:
        return runpy.run_path(str(path))
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if frame.filename == str(path)]
        line = lines[-1] if lines else getattr(error, "lineno", "?")
        message = " ".join(str(error).split())
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {message}") from error


def _shipped():
    """The files of configs/, relative to the current folder, as they are typed."""
    return [Path(os.path.relpath(path)) for path in sorted((ROOT / "configs").glob("*.py"))]


def _missing_file(path):
    """One line for a config file that does not exist: its new command, or the nearest file."""
    shipped = _shipped()
    for file in shipped:
        variants = read_file(file)[2] if path.stem.startswith(f"{file.stem}_") else {}
        variant = path.stem.removeprefix(f"{file.stem}_")
        if variant in variants:
            return (f"{path} is now a variant of {file}: "
                    f"torchrun train.py {file} {variant} [--key=value ...]")
        if variants:
            return f"no config file {path}; {_choose_variant(file, variant, variants)}"
    beside = [] if path.parent.resolve() == ROOT else path.parent.glob("*.py")
    files = {file.stem: file for file in [*shipped, *beside]}
    close = nearest(path.stem, files)
    hint = f"did you mean {files[close]}?" if close else "python train.py --configs lists them"
    return f"no config file {path}; {hint}"


def _choose_variant(path, variant, variants):
    """One line that lists the variants of a file, for a command line without a right one."""
    listed = ", ".join(variants)
    if variant is None:
        return (f"{path} has variants, name one of {listed}: "
                f"torchrun train.py {path} {list(variants)[-1]}")
    close = nearest(variant, variants, 0.0)
    return f"{path} has no variant {variant!r}, only {listed}; did you mean {close}?"


def nearest(word, words, cutoff=0.5):
    """The one of `words` that is most like `word`, or None if none is like enough."""
    matches = difflib.get_close_matches(word, words, 1, cutoff)
    return matches[0] if matches else None


def known(name, where):
    """`name`, if it is a key; where: for the message. Raises UserError."""
    if name not in FIELDS:
        close = nearest(name, FIELDS) if isinstance(name, str) else None
        hint = f", did you mean {close}?" if close else "; python train.py --help lists the keys"
        raise UserError(f"unknown key {name!r} {where}{hint}")
    return name


def parse(name, text):
    """The value of `--name=text`."""
    kind = FIELDS[name]
    if kind is str:
        return text
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        return cast(name, words.get(text.lower(), text))
    if get_args(kind) and not text.startswith(("(", "[")):
        parts = tuple(part.strip() for part in text.split(",") if part.strip())
        if kind == tuple[str, ...]:
            return parts
        text = f"({','.join(parts)},)" if parts else "()"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    return cast(name, value)


def cast(name, value, where=""):
    """`value` as the key's type: whole numbers may be written 1e4, numbers without a point."""
    kind = FIELDS[name]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int and is_number and value == value // 1:
        return int(value)
    if kind is float and is_number and abs(value) <= sys.float_info.max:
        return float(value)
    if kind in (bool, str) and isinstance(value, kind):
        return value
    if get_args(kind) and isinstance(value, (tuple, list)):
        if all(type(part) is get_args(kind)[0] for part in value):
            return tuple(value)
    types_in_words = {
        int: "a whole number", float: "a finite number", bool: "True or False", str: "a string",
        tuple[str, ...]: "names with commas between",
        tuple[int, ...]: "whole numbers with commas between",
    }
    subject = f"{name} {where}".strip()
    raise UserError(f"{subject} must be {types_in_words[kind]}, got {_short(value)}")


def _short(value):
    """repr, cut to a length that fits on a line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ---- what can run

def need(condition, message):
    """Raise UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def check(cfg):
    """Raise UserError, with the numbers, for a config that cannot run."""
    for field in dataclasses.fields(cfg):
        _check_value(field, getattr(cfg, field.name))
    for name in ("lr", "lora_plus_ratio", "rope_theta"):
        need(getattr(cfg, name) > 0, f"{name} must be above 0, got {getattr(cfg, name)}")
    for name in ("min_lr_ratio", "restart_keep"):
        need(0 <= getattr(cfg, name) <= 1,
             f"{name} must lie between 0 and 1, got {getattr(cfg, name)}")
    for name in ("dropout", "beta1", "beta2"):
        need(0 <= getattr(cfg, name) < 1, f"{name} must lie in [0, 1), got {getattr(cfg, name)}")
    _check_model(cfg)
    _check_method(cfg)
    _check_restarts(cfg)
    _check_optimizer(cfg)
    _check_precision(cfg)


def _check_value(field, value):
    """One key by itself: type, choices, range. Numbers are finite."""
    name, choices, least = field.name, field.metadata["choices"], field.metadata["least"]
    cast(name, value)
    if choices and value not in choices:
        listed = ", ".join(choice for choice in choices if choice)
        close = nearest(value, choices)
        hint = f"; did you mean {close}?" if close else ""
        raise UserError(f"{name} must be one of {listed}, got {value!r}{hint}")
    if field.type is int:
        need(value <= LARGEST, f"{name} must be at most {LARGEST}, got {_short(value)}")
    if least == 0:
        need(value >= 0, f"{name} must not be negative, got {_short(value)}")
    elif least is not None:
        need(value >= least, f"{name} must be at least {least}, got {_short(value)}")


def _check_model(cfg):
    heads = cfg.num_attention_heads
    kv_heads = cfg.num_key_value_heads or heads
    need(cfg.hidden_size % (2 * heads) == 0,
         f"hidden_size {cfg.hidden_size} must be an even multiple of num_attention_heads {heads}")
    need(heads % kv_heads == 0,
         f"num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}")
    need(not (cfg.residual_init and cfg.init_from),
         f"residual_init draws new weights, but init_from {cfg.init_from} loads them: "
         "remove one of the two")


def _check_method(cfg):
    """The keys that only some methods have."""
    adapts = cfg.method in ("lora", "mora")
    owners = {"operator": ("mora",), "groups": ("mora",), "alpha": ("lora",), "rslora": ("lora",),
              "lora_A": ("lora",), "lora_plus_ratio": ("lora",), "dora": ("lora", "mora"),
              "dropout": ("lora", "mora")}
    for name, methods in owners.items():
        value = getattr(cfg, name)
        need(cfg.method in methods or value == getattr(Config, name),
             f"method {cfg.method} takes no {name}, got {value!r}; only {' and '.join(methods)} "
             "can have it")
    need(not adapts or cfg.rank >= 1,
         f"rank must be at least 1 for method {cfg.method}, got {cfg.rank}")
    need(not adapts or cfg.targets,
         f"targets names no layer, so method {cfg.method} has nothing to adapt")
    need("lm_head" not in cfg.targets,
         "targets may not name lm_head: the loss reads only its weight, so an update of it would "
         "never train")
    need(cfg.alpha or not cfg.rslora,
         "rslora scales the update by alpha / sqrt(rank): give it an alpha, got 0")


def _check_restarts(cfg):
    restarts = bool(cfg.restart_every or cfg.restart_steps)
    given = f"restart_every {cfg.restart_every}, restart_steps {cfg.restart_steps}"
    need(cfg.method in ("lora", "mora") or not restarts,
         f"method {cfg.method} has no update to restart, got {given}")
    need(not (cfg.restart_every and cfg.restart_steps), f"{given}: give one of them")
    rising = sorted({step for step in cfg.restart_steps if step > 0})
    need(list(cfg.restart_steps) == rising,
         f"restart_steps must rise from 1, got {cfg.restart_steps}")
    need(not (restarts and cfg.base_dtype == "bfloat16"),
         "restarts merge small updates, which base_dtype bfloat16 would round away: use float32")


def _check_optimizer(cfg):
    need(not cfg.rest_lr or cfg.train_rest or cfg.method == "full",
         f"rest_lr {cfg.rest_lr:g} has no effect with train_rest False: embeddings, head and "
         "norms do not train")
    muon = cfg.optimizer == "muon"
    need(not (muon and cfg.method == "frozen"),
         "optimizer muon has no matrix to train with method frozen: use adamw")
    need(not (muon and cfg.restart_keep),
         f"restart_keep {cfg.restart_keep:g} keeps first moments of AdamW, which optimizer muon "
         "does not have: use restart_keep 0 or adamw")


def _check_precision(cfg):
    half, fp8 = cfg.base_dtype == "bfloat16", cfg.matmul == "fp8"
    need(not (half and cfg.method == "full"),
         "method full freezes nothing, so base_dtype must be float32, got bfloat16")
    need(not (half and cfg.dora),
         "dora rescales rows by a little, which base_dtype bfloat16 would round away: use float32")
    need(not (fp8 and cfg.shard), "shard True has no FP8 products: use matmul bf16")
    need(not (fp8 and half),
         "matmul fp8 needs float32 weights to round from, got base_dtype bfloat16")
    need(not (fp8 and cfg.dropout),
         f"matmul fp8 needs W and the update merged, but dropout {cfg.dropout:g} computes them "
         "apart: use dropout 0 or matmul bf16")


def schedule_warnings(cfg):
    """Lines about restarts and warm-ups that do not fit into the steps of the run.

    None of them stops a run: a trial of a few steps is normal. cfg.steps must be final, so call
    it after epochs were turned into steps.
    """
    notes, steps = [], cfg.steps
    if cfg.warmup >= steps:
        notes.append(f"warmup {cfg.warmup} is not below steps {steps}: the whole run is warm-up, "
                     f"and the learning rate ends at {cfg.lr * steps / cfg.warmup:.3g} "
                     f"(lr is {cfg.lr:g})")
    if cfg.restart_every >= steps:
        notes.append(f"restart_every {cfg.restart_every} is not below steps {steps}: "
                     "no restart happens")
    late = [step for step in cfg.restart_steps if step >= steps]
    if late:
        notes.append(f"restart_steps {', '.join(map(str, late))} are not below steps {steps}: "
                     f"{len(late)} of {len(cfg.restart_steps)} restarts do not happen")
    restarts = [step for step in cfg.restart_steps if step < steps]
    if cfg.restart_every:
        restarts = list(range(cfg.restart_every, steps, cfg.restart_every))
    ends = [*restarts[1:], steps]
    short = [(start, end - start) for start, end in zip(restarts, ends, strict=False)
             if end - start <= cfg.restart_warmup]
    if short:
        first, length = short[0]
        notes.append(f"restart_warmup {cfg.restart_warmup} is not below the {length} steps after "
                     f"the restart at step {first}: {len(short)} of {len(restarts)} restarts are "
                     "followed by warm-up alone")
    return notes


def accumulation(cfg, processes):
    """(sequences per forward pass, forward passes per step) of each process.

    The global batch is fixed, so the number of processes does not change the experiment. Raises
    UserError if it does not divide.
    """
    if cfg.batch_size % processes:
        raise UserError(f"batch_size {cfg.batch_size} does not divide among {processes} "
                        f"processes: use a multiple of {processes}")
    share = cfg.batch_size // processes
    micro = cfg.micro_batch or share
    if share % micro:
        raise UserError(f"batch_size {cfg.batch_size} over {processes} processes is {share} "
                        f"sequences each, which micro_batch {micro} does not divide")
    return micro, share // micro


def differences(cfg, base=None):
    """{key: value} of what differs from another config, or from the defaults."""
    base = base or Config()
    return {name: getattr(cfg, name) for name in FIELDS
            if getattr(cfg, name) != getattr(base, name)}


# ---- what is printed

def help_text():
    """The keys with their defaults and explanations, in groups."""
    lines = ["usage: python train.py [CONFIG.py [VARIANT]] [--key=value ...]",
             "       python train.py --configs     lists the experiments", "",
             "keys and their defaults:"]
    for field in dataclasses.fields(Config):
        details = field.metadata
        if details["group"]:
            lines += ["", details["group"]]
        explanation = details["explanation"]
        if details["choices"]:
            choices = ", ".join(choice for choice in details["choices"] if choice)
            explanation += f" [{choices}]"
        lines += _columns(f"  --{field.name}={_shown(field.default)}", explanation)
    return "\n".join(lines)


def _columns(left, right, width=29):
    """Lines with `left` in a column of this width and `right` wrapped beside it."""
    wrapped = textwrap.wrap(right, 100 - width - 1)
    if len(left) > width:
        return [left, *(" " * (width + 1) + line for line in wrapped)]
    first = f"{left:{width}} {wrapped[0]}"
    return [first, *(" " * (width + 1) + line for line in wrapped[1:])]


def _shown(value):
    """A default as it is written on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def experiments_text():
    """The shipped config files with their first docstring line, and the variants of each."""
    lines = ["torchrun train.py CONFIG.py [VARIANT] [--key=value ...]", ""]
    for file in _shipped():
        doc, _, variants = read_file(file)
        lines.append(f"{file}{' VARIANT' if variants else ''}".ljust(29) + f" {doc}")
        for variant, values in variants.items():
            pairs = [f"{name}={_shown(values[name])}" for name in FIELDS if name in values]
            lines.append(f"    {variant}".ljust(29) + f" {' '.join(pairs)}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# command lines

def command_line(main):
    """Run `main(argv)` as a script: a mistake or a failure of the machine is one line on stderr.

    Exit status: 2 for a UserError or an OSError, 130 for Ctrl-C, 1 if the reader of stdout is gone.
    A second Ctrl-C ends the process at once.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # ASCII terminals
    signal.signal(signal.SIGINT, _interrupt)
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout again when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (UserError, OSError) as error:
        _print_error(os_error_text(error) if isinstance(error, OSError) else error)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _interrupt(number, frame):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt


def os_error_text(error):
    """One line on an OSError: what failed, the file, and for a full disk what to do."""
    text = error.strerror or str(error).partition("\n")[0] or type(error).__name__
    if error.filename is not None:
        text += f": {error.filename}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        text += "; free some space and run the same command again"
    return text


def _print_error(error):
    """Print an error once. Under torchrun all processes usually raise the same one.

    Those above rank 0 wait before they print: torchrun ends them when rank 0 has exited.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(3)
    where = "" if rank == "0" else f" on rank {rank}"
    print(f"error{where}: {error}", file=sys.stderr, flush=True)


class Arguments(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message):
        raise UserError(f"{message} (python {self.prog} --help lists the options)")


def at_least(minimum, kind=int, largest=None):
    """An argparse type: a number of this kind, finite and not below the minimum.

    Whole numbers may be written as 1e4. largest: by default 2 ** 32 - 1 for whole numbers.
    """
    name = "a whole number" if kind is int else "a number"
    if largest is None:
        largest = 2 ** 32 - 1 if kind is int else sys.float_info.max

    def parse(text):
        try:
            value = float(text)
            if kind is int:
                value = int(text) if text.strip().lstrip("+-").isdigit() else int(value)
                if value != float(text):
                    raise ValueError
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"must be {name}, got {text!r}") from None
        if not minimum <= value <= largest:
            raise argparse.ArgumentTypeError(f"must be {name} from {minimum} to {largest}, "
                                             f"got {text}")
        return value

    return parse


# --------------------------------------------------------------------------------------------------
# files

def read_json(path):
    """The value of a JSON file; raises UserError."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def write_json(path, value):
    """Write JSON so that the file appears whole or not at all."""
    beside = Path(f"{path}.{os.getpid()}.tmp")
    try:
        beside.write_text(json.dumps(value, indent=1) + "\n")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(folder, doing):
    """Hold the lock of a folder, the file .lock in it, in a `with` block.

    Raises UserError that names the process and the host if another process holds it. The lock of a
    process that has ended does not block. Without fcntl (Windows) nothing is locked.
    doing: what needs the folder, for the message.
    """
    if fcntl is None:
        yield
        return
    path = Path(folder) / ".lock"
    file = _locked_file(path, doing)
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _locked_file(path, doing):
    """The open and locked file of this path; raises UserError if another process holds it."""
    while True:
        file = open(path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise UserError(f"{path.parent} is in use by {holder}: {doing} needs it alone; wait "
                            "for that process, or end it") from None
        # the holder before may have removed the file between open and flock
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()
