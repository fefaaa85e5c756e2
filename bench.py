"""Measure how fast each method trains here: tokens/s, MFU and peak memory, side by side.

    python bench.py                                        a small shape on a CPU, 250m on a GPU
    python bench.py --shape=1.3b --methods=full,mora,lora  on one GPU
    python bench.py --shape=250m --processes=2             DDP
    python bench.py --shape=7b --methods=mora,lora         fine-tuning of a bfloat16 base, rank 8

Each method runs in a new process on random tokens. The figure is the median of blocks of train.py's
steps after a warm-up block. MFU is (FLOPs that the method needs) / time / (FLOP/s of an 8192-cubed
matrix product in the same dtype, measured here).
"""
import argparse
import json
import math
import os
import subprocess
import sys
import timeit
from pathlib import Path
from statistics import median

from config import (  # before torch: Ctrl-C; isort: skip
    Arguments, Config, at_least, command_line, need, read_json, write_json)

import torch
from torch.utils.benchmark import timer

import mora
from model import Llama, LlamaConfig
from optimizer import optimizer_step
from train import data_parallel, join_processes, prepare_model

# hidden size, FFN size, layers, heads, vocabulary, sequences per GPU and step, rank
SHAPES = {
    "tiny": (128, 352, 4, 4, 257, 8, 16),
    "60m": (512, 1376, 8, 8, 50304, 128, 128),
    "250m": (768, 2560, 24, 16, 50304, 64, 128),
    "1.3b": (2048, 5504, 24, 32, 50304, 32, 128),
    "7b": (4096, 11008, 32, 32, 32000, 16, 8),
}
METHODS = {name: {"method": name} for name in ("full", "frozen", "lora", "mora")}
METHODS |= {"mora_two_paths": {"method": "mora"},
            "mora_rotate": {"method": "mora", "operator": "rotate"},
            "remora_permute": {"method": "mora", "groups": "permute"},
            "mixed": {"method": "mora", "groups": "permute"}}  # half of the rank is a LoRA
METHODS |= {f"{name}_muon": METHODS[name] | {"optimizer": "muon"}
            for name in ("full", "lora", "mora", "remora_permute", "mixed")}
METHODS |= {f"{name}_fp8": keys | {"matmul": "fp8"} for name, keys in METHODS.items()}
METHODS["mora_fp8_base"] = {"method": "mora", "base_dtype": "float8"}
# columns of the table: title, key of the numbers, width, format
COLUMNS = (("tokens/s", "tokens_per_s", 10, ",.0f"), ("to first", "to_first", 8, ".3f"),
           ("MFU", "mfu", 6, ".3f"), ("peak GiB", "peak_gib", 9, ".2f"),
           ("trainable", "trainable_parameters", 14, ","), ("restart ms", "restart_ms", 10, ".1f"))


def settings(shape, name, rank, seq_len, batch):
    """The Config of one method at one shape; rank 0 and batch 0: the defaults of the shape."""
    hidden, ffn, layers, heads, _, sequences, default_rank = SHAPES[shape]
    options = {"rank": rank or default_rank} | METHODS[name]
    if name.startswith("mixed"):
        options["lora_rank"] = max(1, options["rank"] // 2)
    if shape == "7b":
        options = {"operator": "rotate", "train_rest": False} | options
        if options["method"] != "full" and "matmul" not in options:
            options = {"base_dtype": "bfloat16"} | options
    return Config(**options, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
                  num_attention_heads=heads, seq_len=seq_len, batch_size=batch or sequences)


def seconds(work, repeats):
    """[seconds of each of `repeats` calls of work()]; timer() waits for the GPU."""
    collects = "import gc; gc.enable()"  # as in training; timeit turns the garbage collector off
    return timeit.repeat(work, collects, timer, repeat=repeats, number=1)


def needed_flops(model, cfg):
    """FLOPs per token of a training step. A linear layer: 2 per parameter forward, 2 for dx, 2 for
    each gradient that is trained (for M as compressed: r^ x r^ per block). Causal attention: half
    of QK^T and AV, forward and twice backward. Embeddings do not count."""
    total = 6 * cfg.seq_len * cfg.hidden_size * cfg.num_hidden_layers
    for module in model.modules():
        if isinstance(module, mora.AdaptedLinear):
            total += 4 * module.weight.numel()
            for name, p in module.update.named_parameters():
                total += (2 * module.update.fold_in.blocks if name == "M" else 4) * p.numel()
        elif isinstance(module, torch.nn.Linear):
            total += (6 if module.weight.requires_grad else 4) * module.weight.numel()
    return total


def measure(args):
    """Print the numbers of one method in JSON: tokens_per_s of all torchrun's ranks, mfu of one."""
    cfg = settings(args.shape, args.child, args.rank, args.seq_len, args.batch)
    rank, world, device = join_processes(cfg)
    vocab_size = SHAPES[args.shape][4]
    torch.manual_seed(0)
    with device:
        model = Llama(LlamaConfig(vocab_size=vocab_size, **cfg.model()))
    optimizer, layers = prepare_model(cfg, model, device, cycle=1), mora.adapted_layers(model)
    for _, layer in layers:
        layer.merges = not args.child.startswith("mora_two_paths")
    parallel = data_parallel(model) if world > 1 else model
    batch = torch.randint(vocab_size, (2, args.accumulate, cfg.batch_size, cfg.seq_len),
                          device=device, generator=torch.Generator(device).manual_seed(rank))

    def block():
        for _ in range(args.steps):
            optimizer_step(parallel, optimizer, batch, cfg.lr, cfg.grad_clip)

    def restart():  # without the optimizer's states
        for _, layer in layers:
            layer.merge_(restarts=True)
        mora.start_cycle(layers, seed=0, cycle=2)

    block()  # the warm-up: it compiles, and it allocates the optimizer's state
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = seconds(block, args.repeats)
    speed = args.steps * batch[0].numel() / median(times)  # of one process
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    width = 8192 if device.type == "cuda" else 512  # of the matrix product that MFU compares with
    a, b = torch.randn(2, width, width, device=device, dtype=model.compute_dtype)
    peak = 2 * width ** 3 / median(seconds(lambda: a @ b, 13)[3:])  # FLOP/s
    result = {"tokens_per_s": speed * world, "tokens_per_step": batch[0].numel() * world,
              "slowest_over_fastest": max(times) / min(times), "trainable_parameters": trainable,
              "mfu": needed_flops(model, cfg) * speed / peak, "gemm_tflops": peak / 1e12}
    if device.type == "cuda":
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2 ** 30
    if cfg.method == "mora" and not args.quick:
        result["restart_ms"] = 1e3 * median(seconds(restart, 3))
    if rank == 0:
        print(json.dumps(result), flush=True)
    if world > 1:
        torch.distributed.destroy_process_group()


def run_child(argv, name, processes):
    """Measure one method in a new process: the numbers of its last line, or None if it fails."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), __file__, *argv]
    done = subprocess.run([*command, f"--child={name}"], capture_output=True, text=True,
                          env={"OMP_NUM_THREADS": "8", **os.environ})
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = [f"exit status {done.returncode}", *done.stderr.strip().splitlines()]
    errors = [line for line in lines if line.startswith("error")]
    print(f"{name:16} failed:", (errors or lines)[-1])
    return None


def compare(args, argv):
    """Measure the methods one after another; print a table and write --json."""
    numbers = read_json(args.json) if args.json and args.json.exists() else {}
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"{args.shape}, {args.processes} x {machine}, torch {torch.__version__}, "
          f"{args.seq_len} tokens per sequence")
    print(f"{'method':24}", *(f"{title:>{width}}" for title, _, width, _ in COLUMNS))
    prefix = f"ddp{args.processes}." if args.processes > 1 else ""
    names = args.methods.split(",")
    first, failed = math.nan, []  # tokens/s of the first method; the names of those that failed
    for name in names:
        row = run_child(argv, name, args.processes)
        if row is None:
            failed.append(name)
            continue
        if name == names[0]:
            first = row["tokens_per_s"]
        shown = row | {"to_first": row["tokens_per_s"] / first}
        print(f"{name:24}", *(f"{shown.get(key, math.nan):{width}{style}}"
                              for _, key, width, style in COLUMNS), flush=True)
        numbers |= {f"{prefix}{args.shape}.{name}.{key}": value for key, value in row.items()}
        if args.json:
            write_json(args.json, numbers)
    need(not failed, f"{', '.join(failed)} failed")


def main(argv):
    gpu, parser, count = torch.cuda.is_available(), Arguments(__doc__), at_least(1)
    add = parser.add_argument
    add("--shape", default="250m" if gpu else "tiny", choices=SHAPES)
    add("--methods", default="full,frozen,lora,mora,mora_two_paths,remora_permute",
        help=f"some of {', '.join(METHODS)}")
    add("--rank", type=at_least(0), default=0, help="default: 128; at 7b 8, at tiny 16")
    add("--seq_len", type=count, default=512 if gpu else 64)
    add("--batch", type=at_least(0), default=0, help="sequences at once; default: by shape")
    add("--accumulate", type=count, default=1, help="batches per process and step")
    add("--steps", type=count, default=10 if gpu else 2, help="steps per block")
    add("--repeats", type=count, default=5, help="blocks, of which the median counts")
    add("--processes", type=count, default=1, help="GPUs (or CPU processes) of this machine")
    add("--quick", action="store_true", help="do not time restarts")
    add("--json", type=Path, help="add the numbers to this file, as SHAPE.METHOD.NAME")
    add("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name in args.methods.split(","):
        need(name in METHODS, f"unknown method {name!r}: choose from {', '.join(METHODS)}")
    need(not args.json or args.json.parent.is_dir(), f"--json={args.json}: no such folder")
    return measure(args) if args.child else compare(args, argv)


if __name__ == "__main__":
    command_line(main)
