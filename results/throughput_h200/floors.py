"""Lower bound of a training step's time: FLOPs at the matrix rate plus bytes at the copy rate.

    python results/throughput_h200/floors.py    the table in floors.txt, beside the measured times

FLOPs come from bench.needed_flops. The bytes are counted for bfloat16 activations of N tokens in
layers of width D and FFN width F:

    activations, per token and layer   forward   18 D + 3 F numbers (norms 4, rotary embedding 4,
                                                 attention 4, residuals 6; SwiGLU 3)
                                       backward  23 D + 5 F numbers (norms 11, rotary embedding 4,
                                                 attention 8; SwiGLU 5)
    weights                            6 bytes per parameter (float32 read, bfloat16 written)
    optimizer step                     44 bytes per trained parameter (gradient written, norm,
                                       scaling, AdamW)
    head                               6 bytes per token and entry of the vocabulary
    update                             LoRA reads x and dy twice. MoRA reads x and dy once, and
                                       writes and reads what it folded.

The operands that a matrix product reads are not counted.
"""
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import bench
import mora
from model import Llama, LlamaConfig

MATRIX_RATE = 770e12  # FLOP/s, measured in these runs by bench.py
# bytes/s of a large device-to-device copy; recorded for such machines, not measured in these runs
COPY_RATE = 4.3e12
SEQ_LEN = 512
METHODS = ("full", "frozen", "lora", "mora")


def build(shape, method):
    """(config, model on the meta device) of a shape and method of bench.py."""
    cfg = bench.settings(shape, method, 0, SEQ_LEN, 0)
    with torch.device("meta"):
        model = Llama(LlamaConfig(vocab_size=bench.SHAPES[shape][4], **cfg.model()))
    if method != "full":
        mora.adapt(model, bench.METHODS[method]["method"], rank=cfg.rank, train_rest=True)
    return cfg, model


def step_bytes(shape, method, model):
    """Bytes that a step must move, as counted at the top of this file."""
    width, ffn, layers, _, vocabulary, sequences, _ = bench.SHAPES[shape]
    tokens = sequences * SEQ_LEN
    per_number = 2 * tokens  # bytes of one bfloat16 number per token
    total = layers * per_number * (41 * width + 8 * ffn)
    total += 6 * tokens * vocabulary
    total += 6 * sum(p.numel() for name, p in model.named_parameters() if "proj.weight" in name)
    total += 44 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    # q, k and v share an input, and so do gate and up: an input is folded once
    inputs = width + width + (width + ffn)
    outputs = 4 * width + 2 * ffn + width
    if method == "lora":
        total += layers * per_number * 2 * (5 * width + ffn + outputs + width)
    if method == "mora":
        folded = {name: layer.update.fold_in.width for name, layer in mora.adapted_layers(model)}
        attention = folded["model.layers.0.self_attn.q_proj"]
        mlp = folded["model.layers.0.mlp.gate_proj"]
        written_and_read = 2 * (2 * attention + 2 * mlp) + 2 * (4 * attention + 3 * mlp)
        total += layers * per_number * (inputs + outputs + written_and_read)
    return total


def print_shape(shape, metrics):
    """Print FLOPs, bytes, the floor and the measured time of each method, in ms per step."""
    tokens = bench.SHAPES[shape][5] * SEQ_LEN
    print(f"\n{shape}, {tokens:,} tokens per step")
    print(f"{'':8} {'TFLOP':>7} {'ms':>6} {'GB':>7} {'ms':>6} {'floor':>7} {'measured':>9} "
          f"{'to full: floor':>15} {'measured':>9}")
    rows = {}
    for method in METHODS:
        cfg, model = build(shape, method)
        flops = bench.needed_flops(model, cfg) * tokens
        moved = step_bytes(shape, method, model)
        floor = flops / MATRIX_RATE + moved / COPY_RATE
        measured = tokens / metrics[f"{shape}.{method}.tokens_per_s"]
        rows[method] = floor, measured
        full_floor, full_measured = rows["full"]
        print(f"{method:8} {flops / 1e12:7.1f} {1e3 * flops / MATRIX_RATE:6.1f} "
              f"{moved / 1e9:7.1f} {1e3 * moved / COPY_RATE:6.1f} "
              f"{1e3 * floor:7.1f} {1e3 * measured:9.1f} "
              f"{full_floor / floor:15.3f} {full_measured / measured:9.3f}")


if __name__ == "__main__":
    numbers = json.loads(Path(__file__).with_name("metrics.json").read_text())
    for shape in ("1.3b", "250m"):
        print_shape(shape, numbers)
