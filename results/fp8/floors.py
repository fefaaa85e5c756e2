"""Lower bounds of a step's time with FP8, counted as in results/throughput_h200/floors.py.

    python results/fp8/floors.py    the table of floors.txt

Products of a frozen weight (full rank: y and dx) run at the FP8 rate, all others at the bfloat16
rate. An FP8 product's operands are cast: 3 bytes for each number of x and dy (bfloat16 read, e4m3
written), and per weight two casts of 5 bytes (float32 read, e4m3 written) in place of one of 6.
"""
import json
import runpy
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
FLOORS = runpy.run_path(str(FOLDER.parent / "throughput_h200" / "floors.py"))
FP8_RATE = 1500e12  # FLOP/s of the FP8 products in where_rows.txt
MATRIX_RATE = 756e12  # FLOP/s in bfloat16, about the least in bench.json
COPY_RATE = 3.35e12  # bytes/s, NVIDIA's figure for this card: not measured here


def floor(shape, method):
    """(TFLOP in bfloat16, TFLOP in FP8, GB, seconds at least) of a step with FP8 products."""
    cfg, model = FLOORS["build"](shape, method)
    tokens = FLOORS["bench"].SHAPES[shape][5] * FLOORS["SEQ_LEN"]
    linears = {name: p for name, p in model.named_parameters()
               if name.endswith("proj.weight")}
    weights = sum(p.numel() for p in linears.values())
    inputs_and_outputs = sum(sum(p.shape) for p in linears.values())
    fp8 = 4 * weights * tokens
    bf16 = FLOORS["bench"].needed_flops(model, cfg) * tokens - fp8
    moved = FLOORS["step_bytes"](shape, method, model)
    moved += 4 * weights + 3 * tokens * inputs_and_outputs
    seconds = bf16 / MATRIX_RATE + fp8 / FP8_RATE + moved / COPY_RATE
    return bf16 / 1e12, fp8 / 1e12, moved / 1e9, seconds


if __name__ == "__main__":
    metrics = json.loads((FOLDER / "metrics.json").read_text())
    for shape in ("1.3b", "250m"):
        tokens = FLOORS["bench"].SHAPES[shape][5] * FLOORS["SEQ_LEN"]
        print(f"\n{shape}, {tokens:,} tokens per step, FP8\n{'':6} {'TFLOP bf16':>11} "
              f"{'TFLOP FP8':>10} {'GB':>7} {'floor ms':>9} {'measured':>9} {'floor/measured':>15}")
        for method in ("full", "lora", "mora"):
            bf16, fp8, moved, seconds = floor(shape, method)
            measured = tokens / metrics[f"{shape}.{method}_fp8.tokens_per_s"]
            print(f"{method:6} {bf16:11.1f} {fp8:10.1f} {moved:7.1f} {1e3 * seconds:9.1f} "
                  f"{1e3 * measured:9.1f} {seconds / measured:15.2f}")
