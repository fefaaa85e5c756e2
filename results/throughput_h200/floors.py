"""The two numbers of a training step: FLOPs over the matrix rate and bytes over the copy rate, and the time they allow together.

    python results/throughput_h200/floors.py

FLOPs: bench.needed_flops. Bytes of activations (bfloat16, N tokens, widths D and F, a layer): forward 18 D + 3 F (norms 4, rotary 4,
attention 4, residuals 6; SwiGLU 3), backward 23 D + 5 F (norms 11, rotary 4, attention 8; SwiGLU 5); of weights 6 a parameter (float32 read,
bfloat16 written), of an optimizer's step 44 a trained parameter (gradient written, norm, scaling, AdamW), of the head 6 V a token; of the
update: LoRA reads x and dy twice; MoRA reads x and dy once and writes and reads what it folded. What a matrix product reads is left out.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import torch

import mora
from bench import METHODS, SHAPES, needed_flops, settings
from model import Llama, LlamaConfig

RATE, COPY = 770e12, 4.3e12  # measured here (bench.py); recorded for such machines (a large device-to-device copy), not measured here
MEASURED = {"1.3b": {"full": 64750, "frozen": 90920, "lora": 75716, "mora": 81716}, "250m": {"full": 277328, "frozen": 346362, "lora": 273458, "mora": 291749}}

for shape in MEASURED:
    D, F, layers, _, V, sequences = SHAPES[shape]
    N = sequences * 512
    print(f"\n{shape}, {N:,} tokens a step\n{'':8} {'TFLOP':>7} {'ms':>6} {'GB':>7} {'ms':>6} {'floor':>7} {'measured':>9} {'to full: floor':>15} {'measured':>9}")
    rows = {}
    for name in MEASURED[shape]:
        cfg = settings(shape, name, 0, 512, 0)
        with torch.device("meta"):
            model = Llama(LlamaConfig(vocab_size=V, **cfg.model()))
        if name != "full":
            mora.adapt(model, METHODS[name]["method"], rank=cfg.rank, train_rest=True)
        size = 2 * N
        bytes_ = size * layers * (41 * D + 8 * F) + 6 * size / 2 * V
        bytes_ += 6 * sum(p.numel() for n, p in model.named_parameters() if "proj.weight" in n)
        bytes_ += 44 * sum(p.numel() for p in model.parameters() if p.requires_grad)
        inputs, outputs = [D, D, D + F], 4 * D + 2 * F + D  # q, k, v share an input, so do gate and up
        if name == "lora":
            bytes_ += size * layers * 2 * (5 * D + F + outputs + D)
        if name == "mora":
            width = {layer: module.update.fold_in.width for layer, module in mora.adapted_layers(model)}
            a, b = width["model.layers.0.self_attn.q_proj"], width["model.layers.0.mlp.gate_proj"]
            bytes_ += size * layers * (sum(inputs) + outputs + 2 * (2 * a + 2 * b) + 2 * (4 * a + 3 * b))
        flops = needed_flops(model, cfg) * N
        rows[name] = flops / RATE + bytes_ / COPY, N / MEASURED[shape][name]
        print(f"{name:8} {flops / 1e12:7.1f} {1e3 * flops / RATE:6.1f} {bytes_ / 1e9:7.1f} {1e3 * bytes_ / COPY:6.1f} {1e3 * rows[name][0]:7.1f} "
              f"{1e3 * rows[name][1]:9.1f} {rows['full'][0] / rows[name][0]:15.3f} {rows['full'][1] / rows[name][1]:9.3f}")
