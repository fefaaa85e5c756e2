"""What bench.py does not show, on one GPU: compiled gradients against two paths, one block of a 7B model, the loss head, profiles.

    python results/throughput_h200/measure.py FILE.json
    python results/throughput_h200/measure.py profile 1.3b:mora 1.3b:full
"""
import json
import statistics
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
import loss
import mora
from bench import SHAPES, seconds, settings
from model import Block, Llama, LlamaConfig, rope
from train import next_step, prepare_model

DEVICE = torch.device("cuda", 0)
METHODS = {"lora": dict(method="lora"), "share": {}, "share_permute": dict(groups="permute"), "decouple": dict(operator="decouple"),
           "rotate": dict(operator="rotate"), "rotate_permute": dict(operator="rotate", groups="permute")}


def gradient_errors():
    """{name: |g - g_exact| / |g_exact|} over all adapter gradients: compiled merged bf16, and eager two paths bf16, against float32 two paths."""
    cfg = LlamaConfig(vocab_size=1000, hidden_size=1024, intermediate_size=2752, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=16)
    numbers = {}
    for name, options in METHODS.items():
        torch.manual_seed(0)
        model = mora.adapt(Llama(cfg, seed=0).to(DEVICE), rank=16, cycle=1, **options)
        parameters = [p for _, p in mora.adapter_parameters(model)]
        for p in parameters:
            torch.nn.init.normal_(p, std=0.02)
        ids = torch.randint(1000, (8, 513), device=DEVICE)

        def gradients(dtype, merges):
            model.compute_dtype = dtype
            for _, layer in mora.adapted_layers(model):
                layer.merges = merges
            model.zero_grad()
            model(ids[:, :-1], ids[:, 1:]).backward()
            return torch.cat([p.grad.flatten() for p in parameters]).double()

        exact, plain = gradients(torch.float32, False), gradients(torch.bfloat16, False)
        model.compile_parts()
        for kind, g in (("two_paths_bf16", plain), ("compiled_bf16", gradients(torch.bfloat16, True))):
            numbers[f"gradient_error.{name}.{kind}"] = ((g - exact).norm() / exact.norm()).item()
        torch._dynamo.reset()
    return numbers


def block_times(hidden=4096, ffn=11008, heads=32, sequences=16, length=512):
    """{name: ms} of forward and backward of one compiled block at 8k tokens: dx alone is asked of the frozen one."""
    cfg = LlamaConfig(vocab_size=8, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=heads)
    numbers = {}
    for base in (torch.float32, torch.bfloat16):
        for name in ("frozen", "rotate", "lora"):
            torch.manual_seed(0)
            block = Block(cfg).to(DEVICE)
            for p in block.parameters():
                p.requires_grad_(False)
            if name != "frozen":
                mora.adapt(block, method="mora" if name == "rotate" else name, operator="rotate" if name == "rotate" else "share", rank=8, cycle=1)
            for p in block.parameters():
                p.data = p.data if p.requires_grad else p.data.to(base)
            block.compile(dynamic=False)
            cos, sin = rope(0, length, cfg, DEVICE)
            x = torch.randn(sequences, length, hidden, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
            dy = torch.randn_like(x)

            def step():
                block(x, cos, sin).backward(dy)
                x.grad = None
                block.zero_grad()

            numbers[f"block_{str(base)[6:]}.{name}.ms"] = timed(step)
            torch._dynamo.reset()
    return numbers


def loss_times(hidden=2048, vocabulary=50304):
    """{name: ms, GiB above the inputs} of the loss head's forward and backward: torch's on all logits, eager and compiled, and chunked."""
    weight, numbers = (torch.randn(vocabulary, hidden, device=DEVICE) * 0.02).requires_grad_(), {}
    for tokens in (16384, 65536):
        x = torch.randn(tokens, hidden, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.randint(vocabulary, (tokens,), device=DEVICE)

        def plain():
            return F.cross_entropy(F.linear(x, weight.to(x.dtype)).float(), targets)

        kernel = torch.compile(loss.softmax_gradient, dynamic=False)
        heads = {"plain": plain, "plain_compiled": torch.compile(plain), "chunked": lambda: loss.cross_entropy(x, weight, targets, kernel)}
        for name, head in heads.items():
            def step():
                head().backward()
                x.grad = weight.grad = None

            step()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            numbers[f"loss_{tokens}.{name}.ms"] = timed(step, repeats=10)
            numbers[f"loss_{tokens}.{name}.gib"] = (torch.cuda.max_memory_allocated() - before) / 2 ** 30
        torch._dynamo.reset()
    return numbers


def timed(step, warm_up=5, repeats=30):
    for _ in range(warm_up):
        step()
    return 1e3 * statistics.median(seconds(step, DEVICE) for _ in range(repeats))


def print_kernels(shape, method, steps=3):
    """The kernels of one training step, those that take the longest first."""
    cfg = settings(shape, method, 0, 512, 0)
    with DEVICE:
        model = Llama(LlamaConfig(vocab_size=SHAPES[shape][4], **cfg.model()))
    optimizer = prepare_model(cfg, model, DEVICE, cycle=1)
    trainable = [p for p in model.parameters() if p.requires_grad]
    ids = torch.randint(SHAPES[shape][4], (2, 1, cfg.batch_size, 512), device=DEVICE)

    def step():
        next_step(model, ids, 1, DEVICE)
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    ms = timed(step, warm_up=3, repeats=5)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    rows = [(e.self_device_time_total / 1e3 / steps, e.count / steps, e.key) for e in profile.key_averages()
            if e.device_type == torch.autograd.DeviceType.CUDA]
    print(f"\n{shape} {method}: {ms:.1f} ms a step, kernels {sum(row[0] for row in rows):.1f}\n{'ms':>8} {'launches':>8} {'us each':>8}")
    for total, count, key in sorted(rows, reverse=True)[:45]:
        print(f"{total:8.2f} {count:8.0f} {1e3 * total / count:8.1f} {key[:110]}")


if __name__ == "__main__":
    if sys.argv[1] == "profile":
        for name in sys.argv[2:]:
            print_kernels(*name.split(":"))
            torch._dynamo.reset()
            torch.cuda.empty_cache()
    else:
        numbers = gradient_errors() | block_times() | loss_times()
        for key, value in numbers.items():
            print(f"{key:50} {value:10.5g}")
        Path(sys.argv[1]).write_text(json.dumps(numbers, indent=1) + "\n")
