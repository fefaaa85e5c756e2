"""What fine-tuning a 135M model costs (SmolLM2's shape, random weights): lengths that change, prompts, greedy answers; one GPU.

    python results/finetune_h200/speed.py [mora_r8 lora_r8 fft ...]      a JSON line a measurement
"""
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import mora
from bench import seconds
from evaluate import merged_copy
from generate import greedy
from model import Llama, LlamaConfig

METHODS = {"mora_r8": dict(method="mora", rank=8), "lora_r8": dict(method="lora", rank=8, alpha=16.0), "fft": None,
           "mora_rotate_r8": dict(method="mora", rank=8, operator="rotate")}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
SIZE = (576, 1536, 30, 9, 3) if GPU else (36, 48, 2, 2, 1)  # hidden, FFN, layers, heads, key/value heads; without a GPU a rehearsal
ROWS, REPEATS = (500, 8) if GPU else (4, 2)
VOCABULARY = 49152


def build(method):
    hidden, ffn, layers, heads, pairs = SIZE
    torch.manual_seed(0)
    with DEVICE:
        model = Llama(LlamaConfig(VOCABULARY, hidden, ffn, layers, heads, pairs, tie_word_embeddings=True), seed=None)
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.02)
    if METHODS[method]:
        mora.adapt(model, **METHODS[method])
    model.compute_dtype = torch.bfloat16 if GPU else torch.float32
    model.compile_parts()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=GPU)


def stepper(model, optimizer, rows, length, learned=0.5):
    """A step on random tokens, of which the last part of each row is learned."""
    ids = torch.randint(VOCABULARY, (rows, length), device=DEVICE)
    targets = ids.masked_fill(torch.arange(length, device=DEVICE) < length * (1 - learned), -100)

    def step():
        model(ids, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def say(**numbers):
    print(json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in numbers.items()}), flush=True)


def measure(method):
    model, optimizer = build(method)
    median = lambda step: 1e3 * statistics.median(seconds(step, DEVICE) for _ in range(REPEATS))
    static = stepper(model, optimizer, ROWS, 72)
    say(method=method, what="72 tokens, static", first_s=seconds(static, DEVICE), ms=median(static))
    other = stepper(model, optimizer, ROWS, 64)
    say(method=method, what="64 tokens, symbolic", first_s=seconds(other, DEVICE), ms=median(other))
    say(method=method, what="72 tokens, symbolic", ms=median(static), gib=torch.cuda.max_memory_allocated() / 2 ** 30 if GPU else 0.0)
    whole = stepper(model, optimizer, ROWS, 72, learned=1.0)
    whole()
    say(method=method, what="72 tokens, all learned", ms=median(whole))
    lengths = torch.randperm(19, generator=torch.Generator().manual_seed(0)).mul(16).add(120).tolist()
    for rows in (64, 128) if GPU else (4,):
        first, again = ([1e3 * seconds(stepper(model, optimizer, rows, length), DEVICE) for length in lengths] for _ in range(2))
        say(method=method, what=f"{rows} rows of 19 lengths, 120-408", first_ms=statistics.mean(first), ms=statistics.mean(again),
            tokens_per_s=1e3 * rows * sum(lengths) / sum(again))


def answer():
    """10,000 UUIDs; 1,319 answers of 416 tokens to prompts of 54-213, as GSM8K's."""
    model = merged_copy(build("mora_r8")[0])
    for what, count, shortest, spread, new in (("10,000 x 38", 10000, 29, 8, 38), ("1,319 x 416", 1319, 54, 160, 416)) if GPU else (("8 x 9", 8, 3, 4, 9),):
        prompts = [torch.randint(VOCABULARY - 2, (shortest + i % spread,)).tolist() for i in range(count)]
        say(what=f"answers {what}", s=seconds(lambda: greedy(model, prompts, VOCABULARY - 1, new, VOCABULARY - 1, 2500), DEVICE))


if __name__ == "__main__":
    say(torch=str(torch.__version__), device=torch.cuda.get_device_name() if GPU else "cpu")
    answer()
    for name in sys.argv[1:] or METHODS:
        torch._dynamo.reset()
        measure(name)
