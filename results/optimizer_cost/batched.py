"""Time Muon's step on all matrices of a model: ours in batches of one shape, torch's one by one.

    python results/optimizer_cost/batched.py [FILE]    prints milliseconds; a small shape on a CPU

Gradients are random. Both run five Newton-Schulz steps in bfloat16 on a GPU; ours in float32 on a
CPU.
"""
import json
import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

import bench
import mora
from model import Llama, LlamaConfig
from optimizer import AdamWMuon


def matrices(shape, method):
    """Shapes of the matrices that Muon moves, with bench.py's ranks."""
    cfg = bench.settings(shape, method, 0, 512, 0)
    with torch.device("meta"):
        model = Llama(LlamaConfig(vocab_size=256, **cfg.model()))
        if cfg.adapter():
            mora.adapt(model, **cfg.adapter())
            return [p.shape for _, p in mora.adapter_parameters(model)]
    return [p.shape for name, p in model.named_parameters() if name.endswith("proj.weight")]


def milliseconds(build, shapes, device):
    parameters = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer = build(parameters)
    optimizer.step()
    return 1e3 * median(bench.seconds(optimizer.step, 5))


def ours(parameters):
    return AdamWMuon([{"params": parameters, "muon": True, "weight_decay": 0.0}], lr=1e-3)


def torchs(parameters):
    return torch.optim.Muon(parameters, lr=1e-3, momentum=0.95, nesterov=True, weight_decay=0.0,
                            adjust_lr_fn="match_rms_adamw")


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}: ms per step, ours and torch.optim.Muon")
    numbers = {}
    for shape in ("60m", "250m", "1.3b") if device == "cuda" else ("tiny",):
        for method in ("mora", "lora", "full"):
            shapes = matrices(shape, method)
            pair = [milliseconds(build, shapes, device) for build in (ours, torchs)]
            print(f"{shape:5} {method:5} {len(shapes):4} matrices {pair[0]:8.2f} {pair[1]:8.2f}",
                  flush=True)
            numbers |= {f"{shape}.{method}.muon_batched_ms": round(pair[0], 2),
                        f"{shape}.{method}.torch_muon_ms": round(pair[1], 2)}
    if sys.argv[1:]:
        Path(sys.argv[1]).write_text(json.dumps(numbers, indent=1) + "\n")
