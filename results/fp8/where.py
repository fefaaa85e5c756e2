"""Where a training step's time goes on a GPU: tokens/s, peak memory, milliseconds by kernel.

    python results/fp8/where.py 1.3b mora_fp8
    python results/fp8/where.py 7b mora_fp8 operator=share    other keys of the config

The model, the batch and the step are bench.py's. The times are sums over one step, so they are a
little less than the step takes.
"""
import dataclasses
import os
import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from torch.profiler import ProfilerActivity, profile

import bench
from model import Llama, LlamaConfig
from optimizer import optimizer_step
from train import join_processes, prepare_model


def main(shape, method, *changes):
    cfg = bench.settings(shape, method, 0, 512, 0)
    cfg = dataclasses.replace(cfg, **dict(change.split("=") for change in changes))
    device, vocab_size = join_processes(cfg)[2], bench.SHAPES[shape][4]
    torch.manual_seed(0)
    with device:
        model = Llama(LlamaConfig(vocab_size=vocab_size, **cfg.model()))
        ids = torch.randint(vocab_size, (2, 1, cfg.batch_size, cfg.seq_len))
    optimizer = prepare_model(cfg, model, device, cycle=1)
    if "AGAIN" in os.environ:  # compute_again of Llama.compile_parts: AGAIN=0 or 1
        torch._functorch.config.ban_recompute_materialized_backward = os.environ["AGAIN"] == "0"

    def block(steps=5):
        for _ in range(steps):
            optimizer_step(model, optimizer, ids, cfg.lr, cfg.grad_clip)

    block()
    torch.cuda.reset_peak_memory_stats()
    step = median(bench.seconds(block, 5)) / 5
    speed = cfg.batch_size * cfg.seq_len / step
    print(f"{shape} {method} {' '.join(changes)}: {speed:,.0f} tokens/s, "
          f"{1e3 * step:.1f} ms per step, {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB, "
          f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        block(1)
        torch.cuda.synchronize()
    kernels = sorted(((event.self_device_time_total / 1e3, event.count, event.key)
                      for event in profiler.key_averages()), reverse=True)
    print(f"kernels: {sum(time for time, *_ in kernels):.1f} ms")
    for time, count, name in kernels[:60]:
        print(f"{time:8.2f} ms {count:5}  {name[:160]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
