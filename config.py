"""What a run is: one flat, frozen dataclass, filled from a config file and the command line.

    python train.py configs/250m_mora.py --rank=64 --steps=2000

A config file is plain Python assignments to the names below; names that start with an underscore are its own.
It may take another file's names with `from configs.c4_250m import *`. `--key=value` on the command line wins.
"""
import argparse
import ast
import contextlib
import dataclasses
import difflib
import errno
import inspect
import io
import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback
import types
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

METHODS = ("full", "frozen", "lora", "mora")
OPERATORS = ("truncate", "share", "decouple", "rotate")
GROUPS = ("strided", "contiguous", "alternate", "permute")
KINDS_OF_A = ("uniform", "orthogonal", "frozen")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CHOICES = {
    "method": METHODS, "operator": ("",) + OPERATORS, "groups": GROUPS, "schedule": ("cosine", "linear"),
    "device": ("auto", "cpu", "cuda", "mps"), "dtype": ("auto", "float32", "bfloat16"), "base_dtype": ("float32", "bfloat16"),
    "compile": ("auto", "on", "off"), "log_to": ("", "wandb", "tensorboard"),
    "lora_A": KINDS_OF_A,
}


class UserError(Exception):
    """A mistake that the user can mend: shown as one line, exit status 2, never as a traceback."""


@dataclass(frozen=True)
class Config:
    # the run
    out: str = ""                   # run folder; empty: out/<name of the config file>
    seed: int = 1337                # of the initial weights, the adapters' draws and the order of the data
    resume: bool = False            # go on from the newest whole checkpoint in `out`
    init_from: str = ""             # start from the weights of this checkpoint or Hugging Face folder, not at random
    # data
    data: str = "data/stdlib"       # folder of token shards, made by data.py: a text, or samples of prompts and responses
    seq_len: int = 512              # tokens a sequence; of samples: at most
    batch_size: int = 64            # sequences a step, over all processes: the experiment does not depend on them
    micro_batch: int = 0            # sequences a process pushes through at once; 0: all it has; accumulation follows
    # model (names are Hugging Face's)
    hidden_size: int = 512
    intermediate_size: int = 1376
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 0    # fewer than the heads: grouped-query attention; 0: as many
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    # method
    method: str = "mora"            # full (nothing frozen), frozen (embeddings, norms, head only), lora, mora
    rank: int = 8                   # LoRA's rank; MoRA spends the same budget on one square matrix
    operator: str = ""              # mora only: truncate, share, decouple, rotate; empty: share
    groups: str = "strided"         # mora only: strided, contiguous, alternate, permute
    alpha: float = 0.0              # lora only: the update is scaled by alpha / rank; 0: scale 1
    rslora: bool = False            # lora only: scaled by alpha / sqrt(rank) instead (rsLoRA)
    lora_A: str = "uniform"         # lora only: how A starts: uniform, orthogonal, frozen (orthogonal and not trained) (AsyLoRA)
    lora_plus_ratio: float = 1.0    # lora only: B learns so many times faster than A (LoRA+)
    dora: bool = False              # lora, mora: the rows of W + dW are rescaled to trained magnitudes (DoRA)
    dropout: float = 0.0            # on the adapters' input
    targets: tuple[str, ...] = PROJECTIONS    # names of the linear layers that are adapted
    train_rest: bool = True         # embeddings, norms and head train too (pretraining); False: adapters alone
    restart_every: int = 0          # merge the update and start it again every so many steps: ReLoRA, ReMoRA
    restart_steps: tuple[int, ...] = ()  # the same at these steps
    restart_keep: float = 0.0       # part of the adapters' first moments, the largest, that a restart leaves; 0: forget all
    # optimizer
    steps: int = 10000
    epochs: float = 0.0             # passes over the training data, instead of steps
    schedule: str = "cosine"        # of the learning rate after the warm-up: cosine, linear
    lr: float = 5e-4                # peak learning rate
    min_lr_ratio: float = 0.1       # the schedule ends at this part of lr
    warmup: int = 500               # steps of linear warm-up
    restart_warmup: int = 50        # steps of linear warm-up after each restart
    weight_decay: float = 0.0       # on matrices, not on norms
    beta1: float = 0.9
    beta2: float = 0.999
    grad_clip: float = 1.0          # largest gradient norm; 0: no clipping
    # what the run tells and keeps
    log_every: int = 10             # steps between log lines
    eval_every: int = 500           # steps between evaluations
    eval_tokens: int = 0            # validation tokens an evaluation reads; 0: all
    save_every: int = 500           # steps between checkpoints
    keep: int = 2                   # newest checkpoints kept; 0: all
    log_to: str = ""                # also to wandb or tensorboard
    # machine
    device: str = "auto"            # cuda, then mps, then cpu
    dtype: str = "auto"             # of the computation, parameters are float32: bfloat16 on cuda, else float32
    base_dtype: str = "float32"     # of the frozen weights; bfloat16 halves their memory, adapters then run two paths
    compile: str = "auto"           # torch.compile each block: on for cuda, else off

    def cycle(self, step):
        """(restarts up to and with this step, step of the latest or 0)."""
        if self.restart_every:
            return step // self.restart_every, step - step % self.restart_every
        done = [at for at in self.restart_steps if at <= step]
        return len(done), done[-1] if done else 0

    def model(self):
        """The fields that are a model's shape, under Hugging Face's names."""
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                 "tie_word_embeddings", "rope_theta", "rms_norm_eps")
        shape = {name: getattr(self, name) for name in names}
        return shape | {"num_key_value_heads": self.num_key_value_heads or self.num_attention_heads,
                        "max_position_embeddings": self.seq_len}

    def adapter(self):
        """The arguments of mora.adapt, or {} for full-rank training."""
        if self.method == "full":
            return {}
        names = ("method", "targets", "train_rest", "seed")
        names += ("rank", "dora", "dropout") if self.method in ("lora", "mora") else ()
        names += ("alpha", "rslora", "lora_A") if self.method == "lora" else ()
        names += ("operator", "groups") if self.method == "mora" else ()
        return {name: getattr(self, name) for name in names}


FIELDS = {field.name: field.type for field in dataclasses.fields(Config)}


def load(argv, default):
    """The Config of a command line: `[FILE.py] [--key=value ...]`. Raises UserError."""
    if "--help" in argv or "-h" in argv:
        print(f"usage: python train.py [CONFIG.py] [--key=value ...]\n\nkeys and their defaults:\n{_fields_as_text()}")
        raise SystemExit(0)
    files = [word for word in argv if not word.startswith("-")]
    if len(files) > 1:
        raise UserError(f"one config file at a time, got {' and '.join(files)} (write overrides as --key=value)")
    path = Path(files[0] if files else default)
    values = read_file(path)
    for word in argv:
        if word.startswith("-"):
            key, equals, text = word.lstrip("-").partition("=")
            known(key, "on the command line")
            if not equals and FIELDS[key] is not bool:
                raise UserError(f"--{key} needs a value: --{key}={getattr(Config, key)}")
            values[key] = parse(key, text if equals else "true")
            if key == "steps":
                values.pop("epochs", None)
    values.setdefault("out", f"out/{path.stem}")
    cfg = Config(**values)
    if cfg.method == "mora" and not cfg.operator:
        cfg = dataclasses.replace(cfg, operator="share")
    check(cfg)
    return cfg


def read_file(path):
    """{key: value} of a config file, cast to the fields' types."""
    if not path.is_file():
        near = difflib.get_close_matches(str(path), [str(p) for p in path.parent.glob("*.py")], 1, 0.0)
        raise UserError(f"no config file {path}" + (f", did you mean {near[0]}?" if near else ""))
    root = str(Path(__file__).parent)
    sys.path[:0] = [] if root in sys.path else [root]
    try:
        names = runpy.run_path(str(path))
    except Exception as error:
        line = next((f.lineno for f in reversed(traceback.extract_tb(error.__traceback__)) if f.filename == str(path)),
                    getattr(error, "lineno", "?"))
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {error}")
    names = {k: v for k, v in names.items() if not k.startswith("_") and not isinstance(v, types.ModuleType)}
    return {known(key, f"in {path}"): cast(key, value) for key, value in names.items()}


def known(key, where):
    if key not in FIELDS:
        near = difflib.get_close_matches(key, FIELDS, 1, 0.5)
        hint = f", did you mean {near[0]}?" if near else "; python train.py --help lists the keys"
        raise UserError(f"unknown key {key!r} {where}{hint}")
    return key


def parse(key, text):
    """The value of `--key=text`."""
    if FIELDS[key] is str:
        return text
    if FIELDS[key] == tuple[str, ...] and not text.startswith(("(", "[")):
        return tuple(part for part in text.split(",") if part)
    if FIELDS[key] == tuple[int, ...] and not text.startswith(("(", "[")):
        text = f"({text},)" if text else "()"
    if FIELDS[key] is bool:
        text = {"true": "True", "false": "False", "yes": "True", "no": "False", "1": "True", "0": "False"}.get(text.lower(), text)
    try:
        return cast(key, ast.literal_eval(text))
    except (ValueError, SyntaxError):
        return cast(key, text)


def cast(key, value):
    """`value` as the field's type; integers may be written 1e4, floats as integers."""
    kind = FIELDS[key]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int and number and float(value).is_integer():
        return int(value)
    if kind is float and number:
        return float(value)
    if kind in (tuple[str, ...], tuple[int, ...]) and isinstance(value, (tuple, list)) and all(type(v) is get_args(kind)[0] for v in value):
        return tuple(value)
    if kind in (bool, str) and isinstance(value, kind):
        return value
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "a string",
             tuple[str, ...]: "names with commas between", tuple[int, ...]: "whole numbers with commas between"}
    raise UserError(f"{key} must be {names[kind]}, got {value!r}")


def check(cfg):
    """Raise UserError, with the numbers, for a combination that can not run."""
    def need(condition, message):
        if not condition:
            raise UserError(message)

    for key, choices in CHOICES.items():
        value = getattr(cfg, key)
        if value not in choices:
            near = difflib.get_close_matches(value, choices, 1, 0.5)
            listed = ", ".join(choice for choice in choices if choice)
            raise UserError(f"{key} must be one of {listed}, got {value!r}" + (f"; did you mean {near[0]}?" if near else ""))
    for key in ("seq_len", "batch_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "steps", "log_every", "eval_every", "save_every"):
        need(getattr(cfg, key) >= 1, f"{key} must be at least 1, got {getattr(cfg, key)}")
    for key in ("seed", "micro_batch", "num_key_value_heads", "warmup", "restart_warmup", "restart_every", "eval_tokens", "keep",
                "alpha", "weight_decay", "grad_clip"):
        need(getattr(cfg, key) >= 0, f"{key} must not be negative, got {getattr(cfg, key)}")
    need(0 <= cfg.epochs < float("inf"), f"epochs must not be negative, got {cfg.epochs}")
    need(cfg.lr > 0, f"lr must be above 0, got {cfg.lr}")
    need(0 <= cfg.min_lr_ratio <= 1, f"min_lr_ratio must lie between 0 and 1, got {cfg.min_lr_ratio}")
    need(0 <= cfg.dropout < 1, f"dropout must lie in [0, 1), got {cfg.dropout}")
    for key in ("beta1", "beta2"):
        need(0 <= getattr(cfg, key) < 1, f"{key} must lie in [0, 1), got {getattr(cfg, key)}")

    heads, pairs = cfg.num_attention_heads, cfg.num_key_value_heads or cfg.num_attention_heads
    need(cfg.hidden_size % (2 * heads) == 0, f"hidden_size {cfg.hidden_size} must be an even multiple of num_attention_heads {heads}")
    need(heads % pairs == 0, f"num_attention_heads {heads} must be a multiple of num_key_value_heads {pairs}")

    adapts, mora = cfg.method in ("lora", "mora"), cfg.method == "mora"
    need(not adapts or cfg.rank >= 1, f"rank must be at least 1 for method {cfg.method}, got {cfg.rank}")
    need(not adapts or cfg.targets, f"targets names no layer: method {cfg.method} has nothing to adapt")
    need(mora or not cfg.operator, f"method {cfg.method} takes no operator, got {cfg.operator!r}; operators are mora's")
    need(mora or cfg.groups == "strided", f"method {cfg.method} takes no groups, got {cfg.groups!r}; groups are mora's")
    for key in ("alpha", "rslora", "lora_A", "lora_plus_ratio"):
        need(cfg.method == "lora" or getattr(cfg, key) == getattr(Config, key),
             f"method {cfg.method} takes no {key}, got {getattr(cfg, key)!r}; it is LoRA's" + "; MoRA's scale is 1" * (key == "alpha"))
    need(cfg.alpha or not cfg.rslora, "rslora scales the update by alpha / sqrt(rank): give it an alpha, got 0")
    need(cfg.lora_plus_ratio > 0, f"lora_plus_ratio must be above 0, got {cfg.lora_plus_ratio}")
    restarts, half = bool(cfg.restart_every or cfg.restart_steps), cfg.base_dtype == "bfloat16"
    need(adapts or not cfg.dora, f"method {cfg.method} takes no dora: it rescales what lora and mora adapt")
    need(not (cfg.dora and half), "dora rescales rows by a little, which base_dtype bfloat16 would round away: take float32")
    need("lm_head" not in cfg.targets, "targets may not name lm_head: the loss reads its weight alone, so an update of it would never train")
    need(cfg.method != "full" or not half, f"method full freezes nothing, so base_dtype must be float32, got {cfg.base_dtype}")
    need(not (restarts and half), "restarts merge small updates, which base_dtype bfloat16 would round away: take float32")
    need(adapts or not cfg.dropout, f"method {cfg.method} takes no dropout, got {cfg.dropout}: it is on the adapters' input")
    need(adapts or not restarts,
         f"method {cfg.method} has no update to restart, got restart_every {cfg.restart_every}, restart_steps {cfg.restart_steps}")
    need(not (cfg.restart_every and cfg.restart_steps),
         f"restart_every {cfg.restart_every} and restart_steps {cfg.restart_steps}: give one of them")
    need(list(cfg.restart_steps) == sorted({step for step in cfg.restart_steps if step > 0}),
         f"restart_steps must rise from 1, got {cfg.restart_steps}")
    need(0 <= cfg.restart_keep <= 1, f"restart_keep must lie between 0 and 1, got {cfg.restart_keep}")


def accumulation(cfg, processes):
    """(sequences a process pushes through at once, times it does so a step). The global batch is the knob."""
    if cfg.batch_size % processes:
        raise UserError(f"batch_size {cfg.batch_size} does not divide among {processes} processes: "
                        f"take a multiple of {processes}")
    share = cfg.batch_size // processes
    micro = cfg.micro_batch or share
    if share % micro:
        raise UserError(f"batch_size {cfg.batch_size} over {processes} processes is {share} sequences each, which "
                        f"micro_batch {micro} does not divide")
    return micro, share // micro


def differences(cfg, base=Config()):
    """{key: value} of what differs from the defaults (or from another config)."""
    return {key: getattr(cfg, key) for key in FIELDS if getattr(cfg, key) != getattr(base, key)}


def _fields_as_text():
    lines = inspect.getsource(Config).split("    def ")[0].splitlines()[2:]
    return "\n".join(lines).rstrip()


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
