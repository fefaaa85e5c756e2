"""How fast each method trains on the machine at hand: tokens/s, MFU, peak memory, side by side.

    python bench.py                                        a small shape on a CPU, 250m on a GPU
    python bench.py --shape=1.3b --methods=full,mora,lora  on one GPU
    python bench.py --shape=250m --processes=2             DDP
    python bench.py --shape=7b --methods=mora,lora         fine-tuning shape: r = 8 rotate, bfloat16 base, adapters alone train
    python bench.py --json=FILE                            also as flat names to numbers

A fresh process a method; random tokens; the median of repeated blocks of steps after a warm-up. Steps are train.py's: forward,
backward, clipping, AdamW. MFU is (FLOPs that the method must do) / time / (rate of an 8192-cubed matrix product in the same dtype,
measured here on random data).
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import mora
from config import Config, UserError, command_line, write_json
from model import Llama, LlamaConfig
from train import data_parallel, distributed, next_step, prepare_model

# hidden, FFN, layers, heads, vocabulary, sequences at once on a GPU
SHAPES = {
    "tiny": (128, 352, 4, 4, 257, 8),
    "60m": (512, 1376, 8, 8, 50304, 128),
    "250m": (768, 2560, 24, 16, 50304, 64),
    "1.3b": (2048, 5504, 24, 32, 50304, 32),
    "7b": (4096, 11008, 32, 32, 32000, 16),
}
METHODS = {
    "full": dict(method="full"),
    "frozen": dict(method="frozen"),
    "lora": dict(method="lora"),
    "mora": dict(method="mora"),
    "mora_two_paths": dict(method="mora"),
    "mora_rotate": dict(method="mora", operator="rotate"),
    "remora_permute": dict(method="mora", groups="permute"),
}


def settings(shape, name, rank, seq_len, batch):
    """The Config of one method at one shape."""
    hidden, ffn, layers, heads, _, sequences = SHAPES[shape]
    sequences = batch or sequences
    options = METHODS[name]
    if options["method"] in ("lora", "mora"):
        options = options | dict(rank=rank or {"7b": 8, "tiny": 16}.get(shape, 128))
    if options["method"] == "mora":
        options = dict(operator="rotate" if shape == "7b" else "share") | options
    if shape == "7b":
        options = options | dict(train_rest=False, base_dtype="float32" if name == "full" else "bfloat16")
    return Config(hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads, seq_len=seq_len,
                  batch_size=sequences, **options)


def matrix_rate(device, dtype, size=8192):
    """FLOP/s of a square matrix product on random data, the median of ten."""
    size = size if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = [seconds(lambda: a @ b, device) for _ in range(13)][3:]
    return 2 * size ** 3 / statistics.median(times)


def seconds(work, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def needed_flops(model, cfg):
    """FLOPs a token of one training step: 2 a parameter of a linear layer forward, 2 for dx, 2 for each gradient that is asked for (of M as
    compressed: r^ x r^ a block), and causal attention (half of QK^T and AV, forward and twice backward). Embeddings do not count."""
    total = 0
    for name, module in model.named_modules():
        if isinstance(module, mora.AdaptedLinear):
            blocks = module.update.fold_in.blocks if hasattr(module.update, "M") else 2
            total += 4 * module.weight.numel() + 2 * blocks * sum(p.numel() for p in module.update.parameters())
        elif isinstance(module, torch.nn.Linear):
            total += (6 if module.weight.requires_grad else 4) * module.weight.numel()
    return total + 6 * cfg.seq_len * cfg.hidden_size * cfg.num_hidden_layers


def measure(args):
    """One method in this process (of torchrun's group, if there is one): a dict of numbers."""
    cfg = settings(args.shape, args.child, args.rank, args.seq_len, args.batch)
    rank, world, device = distributed(cfg)
    vocabulary = SHAPES[args.shape][4]
    torch.manual_seed(0)
    with device:
        model = Llama(LlamaConfig(vocab_size=vocabulary, **cfg.model()))
    optimizer = prepare_model(cfg, model, device, cycle=1)
    for _, layer in mora.adapted_layers(model):
        layer.merges = args.child != "mora_two_paths"
    parallel = data_parallel(model, device) if world > 1 else model
    trainable = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator(device).manual_seed(rank)
    ids = torch.randint(vocabulary, (2, 1, cfg.batch_size, cfg.seq_len), device=device, generator=generator)

    def block():
        for _ in range(args.steps):
            next_step(parallel, ids, 1, device)
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    block()  # compiles, and makes the optimizer's state
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [seconds(block, device) / args.steps for _ in range(args.repeats)]
    rate = matrix_rate(device, model.compute_dtype)
    tokens = cfg.batch_size * cfg.seq_len * world
    flops = needed_flops(model, cfg)
    result = {"tokens_per_s": tokens / statistics.median(times), "slowest_over_fastest": max(times) / min(times),
              "mfu": flops * tokens / world / statistics.median(times) / rate, "gemm_tflops": rate / 1e12,
              "trainable_parameters": sum(p.numel() for p in trainable),
              "reduced_mb_a_step": sum(p.numel() for p in trainable) * 4 / 1e6 if world > 1 else 0.0}
    if device.type == "cuda":
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2 ** 30
    if cfg.method == "mora" and not args.quick:
        result["restart_ms"] = 1e3 * statistics.median(seconds(lambda: restart(model, cycle), device) for cycle in (2, 3, 4))
    return result if rank == 0 else None


def restart(model, cycle):
    """What a restart does to a model, without an optimizer's states."""
    layers = mora.adapted_layers(model)
    for _, layer in layers:
        layer.merge_()
    mora.start_cycle(layers, seed=0, cycle=cycle)


def child(args, name):
    """Run one method in a process of its own; returns its numbers, or None if it fails (out of memory, say)."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.processes}"]
    passed = [f"--{key}={getattr(args, key)}" for key in ("shape", "steps", "repeats", "rank", "seq_len", "batch")]
    command = [sys.executable] + torchrun * (args.processes > 1) + [__file__, f"--child={name}", *passed] + ["--quick"] * args.quick
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "8")})
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        print(f"{name:16} failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    return json.loads(lines[-1]) if lines else None


def main(argv):
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="250m" if gpu else "tiny", choices=SHAPES)
    parser.add_argument("--methods", default="full,frozen,lora,mora,mora_two_paths,remora_permute", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--rank", type=int, default=0, help="default: 128; at 7b 8, at tiny 16")
    parser.add_argument("--seq_len", type=int, default=512 if gpu else 64)
    parser.add_argument("--batch", type=int, default=0, help="sequences a process and step; default: by shape")
    parser.add_argument("--steps", type=int, default=10 if gpu else 2, help="steps a block")
    parser.add_argument("--repeats", type=int, default=5, help="blocks, of which the median counts")
    parser.add_argument("--processes", type=int, default=1, help="GPUs (or CPU processes) of this machine")
    parser.add_argument("--quick", action="store_true", help="do not time restarts")
    parser.add_argument("--json", type=Path, help="add the numbers to this file, as SHAPE.METHOD.NAME")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        result = measure(args)
        if result:
            print(json.dumps(result), flush=True)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return
    names = args.methods.split(",")
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise UserError(f"unknown method {unknown[0]!r}: take of {', '.join(METHODS)}")

    numbers, full = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}, None
    machine = f"{args.processes} x {torch.cuda.get_device_name() if gpu else 'cpu'}"
    print(f"{args.shape}, {machine}, torch {torch.__version__}, {args.seq_len} tokens a sequence\n"
          f"{'method':16} {'tokens/s':>10} {'to full':>8} {'MFU':>6} {'peak GiB':>9} {'trainable':>14} {'restart ms':>10}")
    for name in names:
        row = child(args, name)
        if row is None:
            continue
        full = row["tokens_per_s"] if name == "full" else full
        print(f"{name:16} {row['tokens_per_s']:10,.0f} {row['tokens_per_s'] / full if full else float('nan'):8.3f} {row['mfu']:6.3f} "
              f"{row.get('peak_gib', float('nan')):9.2f} {row['trainable_parameters']:14,} {row.get('restart_ms', float('nan')):10.1f}",
              flush=True)
        prefix = f"ddp{args.processes}." if args.processes > 1 else ""
        numbers |= {f"{prefix}{args.shape}.{name}.{key}": value for key, value in row.items()}
        if args.json:
            write_json(args.json, numbers)


if __name__ == "__main__":
    command_line(main)
