"""What a run is: one flat, frozen dataclass, filled from a config file and the command line.

    python train.py [CONFIG.py [VARIANT]] [--key=value ...]
    python train.py --configs     lists the experiments, --help the keys

A config file is plain Python: assignments to the keys of Config. It may take over the keys of
another file with `from configs.c4_250m import *`; names that start with an underscore are private
to the file. `variants = {"name": dict(key=value, ...)}` makes several experiments of one file.
A variant overrides its file, and `--key=value` on the command line overrides both.
"""
import argparse
import contextlib
import dataclasses
import difflib
import errno
import fcntl
import itertools
import json
import os
import runpy
import signal
import sys
import textwrap
import time
import traceback
import types
from pathlib import Path
from typing import get_args

# Scripts import this module first: until command_line takes over, Ctrl-C ends them (status 130 in a
# shell), where a KeyboardInterrupt would print a traceback of the imports, which take seconds.
if Path(sys.argv[0]).resolve() in Path(__file__).resolve().parent.glob("*.py"):
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import lora
import mora

ROOT = Path(__file__).parent
LARGEST = 2 ** 32 - 1  # of all numbers: products of a few fit into 64 bits, and into float32
TINY = 1e-30           # the smallest number above 0: float32 holds it and LARGEST / TINY
FROM_1, ABOVE_0 = (1, LARGEST), (TINY, LARGEST)  # ranges; a number without one is from 0
UP_TO_1, BELOW_1 = (0, 1), (0, 0.999999)
WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a string",
         tuple[str, ...]: "names with commas between",
         tuple[int, ...]: "whole numbers with commas between"}
LORA, MORA, ADAPTERS = ("lora",), ("mora",), ("lora", "mora")


class UserError(argparse.ArgumentTypeError):
    """A mistake that the user can correct: one line on stderr and exit status 2, no traceback."""


def key(default, explanation, allowed=(), only=(), group=""):
    """A field of Config. allowed: the choices of a string ("" means unset), or (least, most) of a
    number. only: the methods that can have the key. group: heading of the keys from here on."""
    return dataclasses.field(default=default, metadata={
        "explanation": f"{', '.join(only)} only: {explanation}" if only else explanation,
        "allowed": allowed, "only": only, "group": group})


@dataclasses.dataclass(frozen=True)
class Config:
    out: str = key("", "run folder; empty: out/<config file>[_<variant>]", group="run")
    seed: int = key(1337, "seed of initial weights, adapters and data order")
    resume: bool = key(False, "continue from the newest whole checkpoint in out")
    init_from: str = key("", "checkpoint or Hugging Face directory; empty: random weights")

    data: str = key("data/stdlib", "folder of token shards, prepared by data.py", group="data")
    seq_len: int = key(512, "tokens per sequence; for samples: at most so many", FROM_1)
    batch_size: int = key(64, "sequences per step, over all processes", FROM_1)
    micro_batch: int = key(0, "sequences per forward pass per process; 0: its whole share")

    hidden_size: int = key(512, "width of the residual stream", FROM_1,
                           group="model (names as in Hugging Face's config.json)")
    intermediate_size: int = key(1376, "width of the feed-forward layers", FROM_1)
    num_hidden_layers: int = key(8, "transformer blocks", FROM_1)
    num_attention_heads: int = key(8, "query heads", FROM_1)
    num_key_value_heads: int = key(0, "heads of keys and values; 0: as many as query heads")
    tie_word_embeddings: bool = key(False, "the head is the embedding matrix")
    rope_theta: float = key(10000.0, "base of the rotary position embedding", ABOVE_0)
    rms_norm_eps: float = key(1e-6, "epsilon of RMSNorm")
    residual_init: bool = key(False, "std of o_proj and down_proj: 0.02 / sqrt(2 layers)")

    method: str = key("mora", "full: all trains; frozen: embeddings, norms, head; lora, mora: an "
                      "update of each target, too", ("full", *mora.METHODS), group="method")
    rank: int = key(8, "rank of LoRA; MoRA's matrix has at most as many parameters", FROM_1)
    operator: str = key("share", "how inputs and outputs are folded", mora.OPERATORS, MORA)
    groups: str = key("strided", "which inputs, and which outputs, form a group", mora.GROUPS, MORA)
    lora_rank: int = key(0, "part of the rank that is a LoRA, which no restart touches", only=MORA)
    alpha: float = key(0.0, "the update is scaled by alpha / rank; 0: scale 1", only=LORA)
    rslora: bool = key(False, "the scale is alpha / sqrt(rank) (rsLoRA)", only=LORA)
    lora_A: str = key("uniform", "how A is drawn; frozen: as AsyLoRA", lora.KINDS_OF_A, LORA)
    lora_plus_ratio: float = key(1.0, "learning rate of B over that of A (LoRA+)", ABOVE_0, LORA)
    dora: bool = key(False, "train the magnitudes of the rows of W + dW (DoRA)", only=ADAPTERS)
    dropout: float = key(0.0, "dropout on the input of the adapters (slower)", BELOW_1, ADAPTERS)
    targets: tuple[str, ...] = key(mora.PROJECTIONS, "names of the linear layers to adapt")
    train_rest: bool = key(True, "embeddings, norms and head train too; False: adapters only")
    restart_every: int = key(0, "steps between merging restarts (ReLoRA, ReMoRA); 0: none")
    restart_steps: tuple[int, ...] = key((), "steps of restarts, instead of restart_every")
    restart_keep: float = key(0.0, "fraction of the first moments that a restart keeps", UP_TO_1)

    steps: int = key(10000, "optimizer steps", FROM_1, group="optimizer")
    epochs: float = key(0.0, "passes over the training data, instead of steps; 0: steps")
    optimizer: str = key("adamw", "muon: Muon for matrices, AdamW for the rest", ("adamw", "muon"))
    schedule: str = key("cosine", "learning rate after the warm-up", ("cosine", "linear"))
    lr: float = key(5e-4, "peak learning rate", ABOVE_0)
    rest_lr: float = key(0.0, "peak learning rate of embeddings, head and norms; 0: lr")
    min_lr_ratio: float = key(0.1, "final learning rate as a fraction of lr", UP_TO_1)
    warmup: int = key(500, "steps of linear warm-up")
    restart_warmup: int = key(50, "steps of linear warm-up after each restart")
    weight_decay: float = key(0.0, "weight decay of matrices; norms have none")
    beta1: float = key(0.9, "AdamW's decay of the first moment", BELOW_1)
    beta2: float = key(0.999, "AdamW's decay of the second moment", BELOW_1)
    grad_clip: float = key(1.0, "largest gradient norm; 0: no clipping")

    log_every: int = key(10, "steps between log lines", FROM_1, group="log and checkpoints")
    eval_every: int = key(500, "steps between evaluations", FROM_1)
    eval_tokens: int = key(0, "validation tokens per evaluation; 0: all")
    save_every: int = key(500, "steps between checkpoints", FROM_1)
    keep: int = key(2, "checkpoints kept, the newest; 0: all")
    keep_best: bool = key(False, "also keep the checkpoint of the lowest validation loss")
    log_to: str = key("", "second log; empty: none", ("", "wandb", "tensorboard"))

    device: str = key("auto", "auto: cuda, else mps, else cpu", ("auto", "cpu", "cuda", "mps"),
                      group="machine")
    dtype: str = key("auto", "dtype of the computation; auto: bfloat16 on cuda, else float32",
                     ("auto", "float32", "bfloat16"))
    base_dtype: str = key("float32", "dtype of the frozen weights; float8: with FP8 products",
                          ("float32", "bfloat16", "float8"))
    matmul: str = key("bf16", "fp8: training's products W x and dy W in FP8", ("bf16", "fp8"))
    shard: bool = key(False, "a part of the weights, gradients and optimizer state per GPU (FSDP)")
    checkpoint_blocks: bool = key(False, "compute blocks again backward: less memory, more time")
    compile: str = key("auto", "torch.compile; auto: on for cuda", ("auto", "on", "off"))

    def cycle(self, step):
        """(number of restarts up to and including this step, step of the latest one or 0)."""
        every, steps = self.restart_every, self.restart_steps
        done = range(every, step + 1, every) if every else [s for s in steps if s <= step]
        return len(done), (done[-1] if done else 0)

    def model(self):
        """The shape of the model, under Hugging Face's names."""
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "tie_word_embeddings", "rope_theta", "rms_norm_eps")
        heads = self.num_key_value_heads or self.num_attention_heads
        return {name: getattr(self, name) for name in names} | {
            "num_key_value_heads": heads, "max_position_embeddings": self.seq_len}

    def adapter(self):
        """The arguments of mora.adapt, or {} for full-rank training."""
        names = ("method", "rank", "operator", "groups", "lora_rank", "alpha", "rslora", "lora_A",
                 "dora", "dropout", "targets", "train_rest", "seed")
        return {} if self.method == "full" else {name: getattr(self, name) for name in names}


FIELDS = {field.name: field for field in dataclasses.fields(Config)}


# ---- from the command line to a Config

def load(argv, default):
    """The Config of a command line, `[FILE.py [VARIANT]] [--key=value ...]`; default: FILE.py if it
    names none. Raises UserError, and SystemExit after --help and --configs."""
    for word, text in (("--help", help_text), ("-h", help_text), ("--configs", experiments_text)):
        if word in argv:
            print(text())
            raise SystemExit(0)
    overrides = [read_override(word) for word in argv if word.startswith("-")]
    words = [word for word in argv if not word.startswith("-")]
    need(len(words) <= 2, f"one config file and one variant at a time, got {' '.join(words)}; "
         "overrides are written --key=value")
    path, variant = Path(words[0] if words else default), words[1] if len(words) == 2 else None
    _, values, variants = read_file(path)
    need(variants or variant is None, f"{path} has no variants, so it takes no second word, got "
         f"{variant!r}; overrides are written --key=value")
    need(not variants or variant in variants, f"{path} has variants, name one of "
         f"{', '.join(variants)}: torchrun train.py {path} NAME, got {variant or 'none'}"
         f"{hint(variant, variants)}")
    for name, value in [*variants.get(variant, {}).items(), *overrides]:
        values[name] = value
        if name == "steps":
            values.pop("epochs", None)  # those of the file would win over later steps
    values["out"] = values.get("out") or f"out/{path.stem}{f'_{variant}' if variant else ''}"
    cfg = Config(**values)
    check(cfg)
    need(cfg.method in ADAPTERS or "rank" not in dict(overrides),  # a file has one for all
         f"method {cfg.method} takes no rank, got {cfg.rank}; only lora and mora can have it")
    return cfg


def read_override(word):
    """(key, value) of a word `--key=value`; `--key` alone sets a switch."""
    name, equals, text = word.lstrip("-").partition("=")
    kind, value = (FIELDS[name].type if name in FIELDS else str), text
    if kind is bool:
        value = {"": True, "true": True, "false": False}.get(text.lower(), text)
    elif kind in (int, float):
        value = to_number(text)
    elif kind is not str:
        parts = [part.strip() for part in text.strip("()[]").split(",") if part.strip()]
        value = tuple(parts if kind == tuple[str, ...] else map(to_number, parts))
    need(equals or kind is bool or name not in FIELDS,
         f"--{name} needs a value: --{name}={_shown(getattr(Config, name, ''))}")
    return name, cast(name, value)


def read_file(path):
    """(first docstring line, {key: value}, {variant: {key: value}}) of a config file."""
    if not path.is_file() or path.suffix != ".py":  # lines of JSON are valid Python
        typed = {file.stem: str(file) for file in _shipped()}
        typed |= {f"{stem}_{variant}": f"{file} {variant}" for stem, file in typed.items()
                  for variant in read_file(Path(file))[2]}
        close = difflib.get_close_matches(path.stem, typed, 1, 0.5)
        advice = f"did you mean {typed[close[0]]}?" if close else "--configs lists them"
        raise UserError(f"no config file {path}; {advice}")
    try:
        names = runpy.run_path(str(path))
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = error if isinstance(error, SyntaxError) else frames[-1]
        text = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{place.filename or path}, line {place.lineno}: {text}") from error
    variants = names.pop("variants", {})
    need(isinstance(variants, dict) and all(isinstance(variant, str) and isinstance(own, dict)
                                            for variant, own in variants.items()),
         f'variants in {path} must be {{"name": dict(key=value, ...), ...}}')
    values = {name: cast(name, value, f"in {path}") for name, value in names.items()
              if not name.startswith("_") and not isinstance(value, types.ModuleType)}
    variants = {variant: {name: cast(name, value, f"in variant {variant!r} of {path}")
                          for name, value in own.items()} for variant, own in variants.items()}
    return (names.get("__doc__") or "").strip().partition("\n")[0], values, variants


def _shipped():
    """The files of configs/, relative to the current folder, as they are typed."""
    return [Path(os.path.relpath(path)) for path in sorted((ROOT / "configs").glob("*.py"))]


def hint(word, words):
    """The end of an error line: `; did you mean X?`, if one of `words` is like `word`."""
    close = difflib.get_close_matches(str(word), words, 1, 0.5)
    return f"; did you mean {close[0]}?" if close else ""


def to_number(text):
    """The int or float that a text is, else the text itself."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def number(subject, value, kind=int, least=0, most=LARGEST):
    """`value` as an int or a float (kind) from least to most, 0 if it is nearer to 0 than TINY, so
    that no inverse overflows; 1e4 is a whole number too. UserError begins with the subject."""
    fits = type(value) in (int, float) and least <= value <= most and kind(value) == value
    need(fits, f"{subject} must be {WORDS[kind]} from {least} to {most}, got {value!r:.80}".strip())
    return kind(value if abs(value) >= TINY else 0)


def cast(name, value, where=""):
    """`value` as the type of the key `name`, if it is in its range or among its choices."""
    if name not in FIELDS:
        where = where or "on the command line"
        raise UserError(f"unknown key {name!r} {where}{hint(name, FIELDS)}")
    kind, allowed = FIELDS[name].type, FIELDS[name].metadata["allowed"]
    subject = f"{name} {where}".strip()
    if kind in (int, float):
        return number(subject, value, kind, *allowed)
    fits = kind in (bool, str) and isinstance(value, kind)
    if get_args(kind) and isinstance(value, (tuple, list)):
        value, fits = tuple(value), all(type(part) is get_args(kind)[0] for part in value)
    need(fits, f"{subject} must be {WORDS[kind]}, got {value!r:.80}")
    need(not allowed or value in allowed, f"{subject} must be one of "
         f"{', '.join(filter(None, allowed))}, got {value!r}{hint(value, allowed)}")
    return os.path.expanduser(value) if kind is str else value  # bash leaves ~ in --out=~/run


def one_line(error):
    """The text of an exception in one line."""
    return " ".join(str(error).split())


# ---- what can run

def need(condition, message):
    """Raise UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


@contextlib.contextmanager
def as_user_error(where, *errors):
    """Turn these errors of a `with` block into a UserError: one line that begins with `where`."""
    try:
        yield
    except errors as error:
        raise UserError(f"{where}: {one_line(error) or type(error).__name__:.400}") from error


def check(cfg):
    """Raise UserError, with the numbers, for a config that cannot run."""
    for name, field in FIELDS.items():
        value, only = cast(name, getattr(cfg, name)), field.metadata["only"]
        need(not only or cfg.method in only or value == field.default, f"method {cfg.method} takes "
             f"no {name}, got {value!r}; only {' and '.join(only)} can have it")
    heads_fit(cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads)
    for conflict, message in conflicts(cfg):
        need(not conflict, message)


def heads_fit(hidden_size, heads, kv_heads, where=""):
    """Raise UserError unless the heads divide hidden_size. kv_heads 0: as many as heads."""
    need(hidden_size % (2 * heads) == 0, f"{where}hidden_size {hidden_size} must be an even "
         f"multiple of num_attention_heads {heads}")
    need(heads % (kv_heads or heads) == 0, f"{where}num_attention_heads {heads} must be a multiple "
         f"of num_key_value_heads {kv_heads}")


def conflicts(cfg):
    """Yield (whether some keys contradict each other, the line that explains it)."""
    method, adapts, muon = cfg.method, cfg.method in ADAPTERS, cfg.optimizer == "muon"
    base, small, fp8 = cfg.base_dtype, cfg.base_dtype != "float32", cfg.matmul == "fp8"
    restarts, listed = cfg.restart_every or cfg.restart_steps, list(cfg.restart_steps)
    given = f"restart_every {cfg.restart_every}, restart_steps {cfg.restart_steps}"
    yield (cfg.residual_init and cfg.init_from, "residual_init draws new weights, but init_from "
           f"{cfg.init_from} loads them: remove one of the two")
    yield adapts and not cfg.targets, f"targets names no layer for method {method} to adapt"
    yield "lm_head" in cfg.targets, "targets may not name lm_head: the loss reads its weight alone"
    yield cfg.rslora and not cfg.alpha, "rslora scales by alpha / sqrt(rank): give it an alpha"
    yield restarts and not adapts, f"method {method} has no update to restart, got {given}"
    yield cfg.restart_every and cfg.restart_steps, f"{given}: give one of them"
    yield (listed != sorted({step for step in listed if step > 0}),
           f"restart_steps must rise from 1, got {cfg.restart_steps}")
    yield restarts and small, f"restarts merge small updates, which base_dtype {base} rounds away"
    yield (cfg.rest_lr and not cfg.train_rest and method != "full",
           f"rest_lr {cfg.rest_lr:g} has no effect with train_rest False: use rest_lr 0")
    yield muon and method == "frozen", "muon has no matrix to train with method frozen: use adamw"
    yield method == "frozen" and not cfg.train_rest, "frozen without train_rest trains nothing"
    yield muon and cfg.restart_keep, f"restart_keep {cfg.restart_keep:g} needs optimizer adamw"
    yield (cfg.restart_keep and not restarts, f"restart_keep {cfg.restart_keep:g} has no effect "
           "without restart_every or restart_steps: use restart_keep 0")
    yield small and method == "full", "method full freezes nothing: use base_dtype float32"
    yield small and cfg.dora, f"dora rescales rows by a little, which base_dtype {base} rounds away"
    yield small and fp8, f"matmul fp8 needs float32 weights to round from, got base_dtype {base}"
    yield (fp8 or base == "float8") and cfg.shard, "shard has no FP8 products: drop shard or FP8"
    yield (cfg.keep_best and cfg.eval_every % cfg.save_every, "keep_best needs a save at each "
           f"evaluation: eval_every {cfg.eval_every} is no multiple of save_every {cfg.save_every}")
    yield (base == "float8" and (cfg.train_rest or not cfg.init_from or not list(
           Path(cfg.init_from).glob("model.safetensors*"))),
           "base_dtype float8 keeps no whole weights, so it needs train_rest False and init_from a "
           f"Hugging Face directory, got {cfg.init_from!r}")
    yield (fp8 and cfg.dropout, "matmul fp8 needs W and the update merged, but dropout "
           f"{cfg.dropout:g} computes them apart: use dropout 0 or matmul bf16")


def schedule_warnings(cfg):
    """Yield a line for restarts and warm-ups that do not fit into cfg.steps, which is final."""
    steps, every = cfg.steps, cfg.restart_every
    if cfg.warmup >= steps:
        yield (f"warmup {cfg.warmup} is not below steps {steps}: the learning rate ends at "
               f"{cfg.lr * steps / cfg.warmup:.3g} (lr is {cfg.lr:g})")
    planned = range(every, max(steps, every + 1), every) if every else cfg.restart_steps
    restarts = [step for step in planned if step < steps]
    late = planned[len(restarts):]
    if late:
        yield (f"restarts at {', '.join(map(str, late))} are not below steps {steps}: {len(late)} "
               f"of {len(planned)} do not happen")
    short = [(start, end - start) for start, end in itertools.pairwise([*restarts, steps])
             if start >= cfg.warmup and end - start <= cfg.restart_warmup]
    if short:
        yield (f"restart_warmup {cfg.restart_warmup} is not below the {short[0][1]} steps after "
               f"the restart at step {short[0][0]}: {len(short)} of {len(restarts)} restarts are "
               "followed by warm-up alone")


def micro_batch_size(cfg, processes):
    """Sequences per forward pass of each process; the global batch is the same for any number."""
    share, rest = divmod(cfg.batch_size, processes)
    need(not rest, f"batch_size {cfg.batch_size} does not divide among {processes} processes")
    micro = cfg.micro_batch or share
    need(share % micro == 0, f"batch_size {cfg.batch_size} over {processes} processes is {share} "
         f"sequences each, which micro_batch {micro} does not divide")
    return micro


# ---- command lines

def help_text():
    """The keys with their defaults and explanations, in groups."""
    lines = [__doc__, "keys and their defaults:"]
    for name, field in FIELDS.items():
        details = field.metadata
        if details["group"]:
            lines += ["", details["group"]]
        explanation = details["explanation"]
        if field.type is str and details["allowed"]:
            explanation += f" [{', '.join(filter(None, details['allowed']))}]"
        left = f"  --{name}={_shown(field.default)}".ljust(29) + " "
        lines += textwrap.wrap(explanation, 100, initial_indent=left, break_on_hyphens=False,
                               subsequent_indent=" " * 30)
    return "\n".join(lines)


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


def command_line(main):
    """Run `main(argv)` as a script: a mistake or a failure of the machine is one line on stderr and
    status 2, Ctrl-C is 130 (a second one ends the process at once), a closed pipe 1."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # ASCII terminals
    signal.signal(signal.SIGINT, _interrupt)
    try:
        main(sys.argv[1:])
        print(end="", flush=True)  # sys.stdout is None if a shell closed it
    except BrokenPipeError:
        # Python flushes stdout again when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise  # torch raises a RuntimeError where Python raises a MemoryError
        # torchrun's processes usually raise the same error: rank 0 prints it, the others are ended
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            time.sleep(3)
        where, text = ("" if rank == "0" else f" on rank {rank}"), one_line(error)
        if isinstance(error, OSError):
            text = error.strerror or text or type(error).__name__
            text += f": {error.filename}" if error.filename is not None else ""
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                text += "; free some space and run the same command again"
        print(f"error{where}: {text}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _interrupt(number, frame):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt


class Arguments(argparse.ArgumentParser):
    """An ArgumentParser whose description is a script's docstring and whose errors are one line."""

    def __init__(self, doc=None, **options):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                         **options)

    def error(self, message):
        raise UserError(f"{message} (python {self.prog} --help lists the options)")


def at_least(minimum, kind=int, largest=LARGEST):
    """An argparse type, see number. argparse puts the name of the option before the UserError."""
    return lambda text: number("", to_number(text), kind, minimum, largest)


def read_text(path, parse=str):
    """parse(text) of a file in UTF-8; raises UserError."""
    with as_user_error(f"{path} cannot be read", Exception):  # tokenizers raises bare Exceptions
        return parse(path.read_bytes().decode())


def read_json(path):
    """The dict in a JSON file. Raises UserError if the file holds something else."""
    value = read_text(path, json.loads)
    need(isinstance(value, dict), f"{path} must hold a JSON object, got {value!r:.80}")
    return value


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
    """Hold the lock of a folder, the file .lock in it, or raise UserError: it names the process and
    the host that hold it, and `doing`, what needs it. A process that has ended does not block.
    A missing folder is made; an empty one is removed in the end."""
    path = Path(folder) / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the holder before may have removed the file between open and flock
            held = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            held = False
        file.seek(0)
        need(held, f"{folder} is in use by {file.read().strip() or 'another process'}: {doing} "
             "needs it alone; wait for that process, or end it")
        try:
            path.write_text(f"process {os.getpid()} on {os.uname().nodename}\n")
            yield
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty
                path.parent.rmdir()
