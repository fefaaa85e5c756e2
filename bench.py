"""Measure how fast each method trains here: tokens/s, MFU and peak memory, side by side.

    python bench.py                                        a small shape on a CPU, 250m on a GPU
    python bench.py --shape=1.3b --methods=full,mora,lora  on one GPU
    python bench.py --shape=250m --processes=2             DDP
    python bench.py --shape=7b --methods=mora,lora         fine-tuning: rank 8, operator rotate,
                                                           bfloat16 base, adapters alone train
    python bench.py --json=FILE                            add the numbers to a file

Each method runs in a new process on random tokens. The figure is the median of repeated blocks of
steps after a warm-up block. A step is train.py's: forward, backward, clipping, AdamW. MFU is (FLOPs
that the method needs) / time / (FLOP/s of an 8192-cubed matrix product in the same dtype, measured
here on random data).
"""
import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from config import Config, UserError, at_least, command_line, read_json, write_json  # isort: skip

import torch

import mora
from model import Llama, LlamaConfig
from optimizer import optimizer_step
from train import data_parallel, join_processes, prepare_model

# hidden size, FFN size, layers, heads, vocabulary, sequences per GPU and step
SHAPES = {
    "tiny": (128, 352, 4, 4, 257, 8),
    "60m": (512, 1376, 8, 8, 50304, 128),
    "250m": (768, 2560, 24, 16, 50304, 64),
    "1.3b": (2048, 5504, 24, 32, 50304, 32),
    "7b": (4096, 11008, 32, 32, 32000, 16),
}
RANKS = {"7b": 8, "tiny": 16}  # other shapes: 128
METHODS = {
    "full": {"method": "full"},
    "frozen": {"method": "frozen"},
    "lora": {"method": "lora"},
    "mora": {"method": "mora"},
    "mora_two_paths": {"method": "mora"},
    "mora_rotate": {"method": "mora", "operator": "rotate"},
    "remora_permute": {"method": "mora", "groups": "permute"},
    "full_fp8": {"method": "full", "matmul": "fp8"},
    "lora_fp8": {"method": "lora", "matmul": "fp8"},
    "mora_fp8": {"method": "mora", "matmul": "fp8"},
    "remora_permute_fp8": {"method": "mora", "groups": "permute", "matmul": "fp8"},
    "full_muon": {"method": "full", "optimizer": "muon"},
    "lora_muon": {"method": "lora", "optimizer": "muon"},
    "mora_muon": {"method": "mora", "optimizer": "muon"},
}
COLUMNS = ("method", "tokens/s", "to full", "MFU", "peak GiB", "trainable", "restart ms")
HEADER = "{:18} {:>10} {:>8} {:>6} {:>9} {:>14} {:>10}"
ROW = "{:18} {:10,.0f} {:8.3f} {:6.3f} {:9.2f} {:14,} {:10.1f}"


def settings(shape, name, rank, seq_len, batch):
    """The Config of one method at one shape; rank 0 and batch 0: the defaults of the shape."""
    hidden, ffn, layers, heads, _, sequences = SHAPES[shape]
    options = dict(METHODS[name])
    if options["method"] in ("lora", "mora"):
        options["rank"] = rank or RANKS.get(shape, 128)
    if options["method"] == "mora":
        options.setdefault("operator", "rotate" if shape == "7b" else "share")
    if shape == "7b":
        options["train_rest"] = False
        options["base_dtype"] = "float32" if name == "full" else "bfloat16"
    return Config(hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
                  num_attention_heads=heads, seq_len=seq_len, batch_size=batch or sequences,
                  **options)


def seconds(work, device):
    """Seconds that work() takes, the GPU's part included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def matrix_rate(device, dtype):
    """FLOP/s of a square matrix product on random data: the median of ten, after three."""
    width = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    times = [seconds(lambda: a @ b, device) for _ in range(13)][3:]
    return 2 * width ** 3 / statistics.median(times)


def needed_flops(model, cfg):
    """FLOPs per token that one training step needs.

    A linear layer: 2 per parameter forward, 2 for dx, and 2 for each gradient that is trained (for
    M as compressed: r^ x r^ per block). Causal attention: half of QK^T and AV, forward and twice
    backward. Embeddings do not count.
    """
    total = 0
    for module in model.modules():
        if isinstance(module, mora.AdaptedLinear):
            blocks = module.update.fold_in.blocks if hasattr(module.update, "M") else 2
            trained = sum(p.numel() for p in module.update.parameters())
            total += 4 * module.weight.numel() + 2 * blocks * trained
        elif isinstance(module, torch.nn.Linear):
            total += (6 if module.weight.requires_grad else 4) * module.weight.numel()
    return total + 6 * cfg.seq_len * cfg.hidden_size * cfg.num_hidden_layers


def measure(args):
    """The numbers of one method, measured in this process or in torchrun's group.

    Every rank returns a dict with `tokens_per_s` of all ranks together and `mfu` of one.
    """
    cfg = settings(args.shape, args.child, args.rank, args.seq_len, args.batch)
    rank, world, device = join_processes(cfg)
    vocab_size = SHAPES[args.shape][4]
    torch.manual_seed(0)
    with device:
        model = Llama(LlamaConfig(vocab_size=vocab_size, **cfg.model()))
    optimizer = prepare_model(cfg, model, device, cycle=1)
    for _, layer in mora.adapted_layers(model):
        layer.merges = args.child != "mora_two_paths"
    parallel = data_parallel(model, device) if world > 1 else model
    trainable = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator(device).manual_seed(rank)
    ids = torch.randint(vocab_size, (2, 1, cfg.batch_size, cfg.seq_len), device=device,
                        generator=generator)  # inputs and targets of one micro-batch

    def block():
        for _ in range(args.steps):
            optimizer_step(parallel, optimizer, ids, cfg.lr, cfg.grad_clip)

    block()  # the warm-up: it compiles, and it allocates the optimizer's state
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [seconds(block, device) / args.steps for _ in range(args.repeats)]
    median = statistics.median(times)
    flops_per_s = matrix_rate(device, model.compute_dtype)
    tokens = cfg.batch_size * cfg.seq_len  # per process and step
    trained = sum(p.numel() for p in trainable)
    result = {"tokens_per_s": tokens * world / median,
              "slowest_over_fastest": max(times) / min(times),
              "mfu": needed_flops(model, cfg) * tokens / median / flops_per_s,
              "gemm_tflops": flops_per_s / 1e12, "trainable_parameters": trained,
              "reduced_mb_a_step": trained * 4 / 1e6 if world > 1 else 0.0}
    if device.type == "cuda":
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2 ** 30
    if cfg.method == "mora" and not args.quick:
        result["restart_ms"] = 1e3 * restart_seconds(model, device)
    return result


def restart_seconds(model, device):
    """Median time of a restart of the layers, without the optimizer's states."""
    layers = mora.adapted_layers(model)

    def restart(cycle):
        for _, layer in layers:
            layer.merge_()
        mora.start_cycle(layers, seed=0, cycle=cycle)

    return statistics.median(seconds(partial(restart, cycle), device) for cycle in (2, 3, 4))


def run_child(argv, name, processes):
    """Measure one method in a new process: its numbers, or None if it fails (out of memory, say).

    The child gets this process's arguments and prints its numbers as its last line.
    """
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [__file__, *argv, f"--child={name}"]
    environment = {"OMP_NUM_THREADS": "8", **os.environ}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    reason = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    print(f"{name:16} failed: {reason[-1]}")
    return None


def parse_arguments(argv):
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="250m" if gpu else "tiny", choices=SHAPES)
    parser.add_argument("--methods", default="full,frozen,lora,mora,mora_two_paths,remora_permute",
                        help=f"some of {', '.join(METHODS)}")
    parser.add_argument("--rank", type=at_least(0), default=0,
                        help="default: 128; at 7b 8, at tiny 16")
    parser.add_argument("--seq_len", type=at_least(1), default=512 if gpu else 64)
    parser.add_argument("--batch", type=at_least(0), default=0,
                        help="sequences per process and step; default: by shape")
    parser.add_argument("--steps", type=at_least(1), default=10 if gpu else 2,
                        help="steps per block")
    parser.add_argument("--repeats", type=at_least(1), default=5,
                        help="blocks, of which the median counts")
    parser.add_argument("--processes", type=at_least(1), default=1,
                        help="GPUs (or CPU processes) of this machine")
    parser.add_argument("--quick", action="store_true", help="do not time restarts")
    parser.add_argument("--json", type=Path,
                        help="add the numbers to this file, as SHAPE.METHOD.NAME")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name in args.methods.split(","):
        if name not in METHODS:
            raise UserError(f"unknown method {name!r}: choose from {', '.join(METHODS)}")
    return args


def compare(args, argv):
    """Measure the methods one after another; print a table and write --json."""
    numbers = {}
    if args.json and args.json.exists():
        numbers = read_json(args.json, dict)
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"{args.shape}, {args.processes} x {machine}, torch {torch.__version__}, "
          f"{args.seq_len} tokens per sequence")
    print(HEADER.format(*COLUMNS))
    prefix = f"ddp{args.processes}." if args.processes > 1 else ""
    full = math.nan  # tokens/s of full rank, if it was measured
    for name in args.methods.split(","):
        row = run_child(argv, name, args.processes)
        if row is None:
            continue
        if name == "full":
            full = row["tokens_per_s"]
        print(ROW.format(name, row["tokens_per_s"], row["tokens_per_s"] / full, row["mfu"],
                         row.get("peak_gib", math.nan), row["trainable_parameters"],
                         row.get("restart_ms", math.nan)), flush=True)
        numbers |= {f"{prefix}{args.shape}.{name}.{key}": value for key, value in row.items()}
        if args.json:
            write_json(args.json, numbers)


def main(argv):
    args = parse_arguments(argv)
    if not args.child:
        return compare(args, argv)
    try:
        result = measure(args)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    command_line(main)
