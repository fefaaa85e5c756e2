"""Measure shard = true (fully_shard) against DDP on two GPUs, on random tokens; write metrics.json.

    torchrun --nproc_per_node=2 results/shard_2gpu/run.py [FOLDER]          two GPUs of 80 GB
    torchrun --nproc_per_node=2 results/shard_2gpu/run.py --tiny FOLDER     a trial on a CPU

A step is train.py's, in bfloat16 with float32 parameters and optimizer state. The figure is the
median of four blocks of three steps, after one block. A case that fails is named and left out.
"""
import faulthandler
import gc
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from config import Config, write_json  # noqa: E402
from model import Llama, LlamaConfig  # noqa: E402
from optimizer import optimizer_step  # noqa: E402
from train import data_parallel, join_processes, prepare_model  # noqa: E402

# hidden size, FFN size, layers, heads, vocabulary, sequences of 512 tokens per GPU and step
SHAPES = {"1.3b": (2048, 5504, 24, 32, 50304, 32), "7b": (4096, 11008, 32, 32, 32000, 8)}
TINY = (64, 96, 2, 4, 257, 2)
MORA = {"method": "mora", "operator": "share", "rank": 128}
CASES = {
    "1.3b.full.ddp": {"method": "full"},
    "1.3b.full.shard": {"method": "full", "shard": True},
    "7b.full": {"method": "full", "shard": True, "checkpoint_blocks": True},
    "1.3b.mora.ddp": MORA,
    "1.3b.mora.shard": {**MORA, "shard": True},
    "1.3b.mora.checkpoint_blocks": {**MORA, "checkpoint_blocks": True},  # with DDP
}


def measure(shape, keys, rank, world, device):
    """Return {"tokens_per_s" of all GPUs together, "peak_gib" of one GPU} of one case."""
    hidden, ffn, layers, heads, vocab_size, sequences = shape
    cfg = Config(hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
                 num_attention_heads=heads, seq_len=512, batch_size=sequences * world, **keys)
    torch.manual_seed(0)
    with device:  # the weights are drawn on the GPU, equal on all
        model = Llama(LlamaConfig(vocab_size=vocab_size, **cfg.model()))
    optimizer = prepare_model(cfg, model, device, cycle=1)
    parallel = model if cfg.shard else data_parallel(model)
    torch.manual_seed(rank)
    ids = torch.randint(vocab_size, (2, 1, sequences, 512), device=device)
    times = []
    for _ in range(5):  # the first compiles
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        for _ in range(3):
            loss, _ = optimizer_step(parallel, optimizer, ids, 1e-5, 1.0)
        loss.item()  # waits for the GPU
        times.append(time.perf_counter() - begun)
    return {"tokens_per_s": 3 * 512 * cfg.batch_size / statistics.median(times[1:]),
            "peak_gib": torch.cuda.max_memory_allocated() / 2 ** 30}


def main():
    words, metrics = [word for word in sys.argv[1:] if word != "--tiny"], {}
    rank, world, device = join_processes(Config())
    for name, keys in CASES.items():
        faulthandler.dump_traceback_later(100, exit=True)  # if the other process failed alone
        begun, numbers, shape = time.perf_counter(), {}, SHAPES[name[:name.index("b.") + 1]]
        try:
            numbers = measure(TINY if "--tiny" in sys.argv else shape, keys, rank, world, device)
        except Exception as error:  # out of memory, say: the other cases count
            print(f"rank {rank}: {name} failed: {type(error).__name__}: {error}"[:600], flush=True)
        metrics |= {f"{name}.{key}": value for key, value in numbers.items()}
        ddp = metrics.get(f"{name.replace('shard', 'ddp')}.tokens_per_s")
        if name.endswith(".shard") and numbers and ddp:
            metrics[f"{name}_over_ddp"] = numbers["tokens_per_s"] / ddp
        if rank == 0:
            print(name, numbers, f"{time.perf_counter() - begun:.0f} s in all", flush=True)
            write_json(Path(*words or [HERE]) / "metrics.json", metrics)
        gc.collect()
        torch.compiler.reset()
        torch.cuda.empty_cache()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
