"""Draw losses.png: MoRA and full rank with and without FP8, at 60m and 250m.

    python results/fp8/losses.py

Above: training losses, three seeds at 60m (sweep.jsonl of results/pretrain_60m), one run at 250m
(results/pretrain_250m). Below: FP8 minus bf16, seed by seed; dots are validation losses.
"""
import json
from pathlib import Path

from matplotlib import pyplot

RESULTS = Path(__file__).resolve().parents[1]
COLORS = {("full", False): "C0", ("full", True): "C1", ("mora", False): "C2", ("mora", True): "C3"}


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def curves():
    """Return {"60m", "250m": {(method, is FP8): [(losses, validation losses) by seed]}}, losses
    being {step: nats per token}."""
    records = {record["name"]: record for record in read(RESULTS / "pretrain_60m" / "sweep.jsonl")}
    found = {"60m": {}, "250m": {}}
    for method, is_fp8 in COLORS:
        run = "mora_share" if method == "mora" else method  # its name in pretrain_60m
        end, file = ("-matmulfp8", f"{method}_fp8") if is_fp8 else ("", method)
        seeds = [records[f"{run}-muon-0.002-0.016-s{seed}{end}"] for seed in (1337, 1, 2)]
        found["60m"][method, is_fp8] = [(dict(seed["losses"]), dict(seed["val_losses"]))
                                        for seed in seeds]
        lines = read(RESULTS / "pretrain_250m" / f"{file}.jsonl")
        losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
        scores = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
        found["250m"][method, is_fp8] = [(losses, scores)]
    return found


def draw(shape, runs, above, below):
    """Draw the losses of one shape above, FP8's minus bf16's below."""
    for (method, is_fp8), seeds in runs.items():
        label = f"{'MoRA' if method == 'mora' else 'full rank'}, {'FP8' if is_fp8 else 'bf16'}"
        color, style = COLORS[method, is_fp8], "--" if is_fp8 else "-"
        for i, (losses, scores) in enumerate(seeds):
            above.plot(*zip(*losses.items(), strict=True), style, color=color, linewidth=1,
                       label=label if i == 0 else None)
            if not is_fp8:
                continue
            bf16_losses, bf16_scores = runs[method, False][i]
            for fp8, bf16, mark in ((losses, bf16_losses, "-"), (scores, bf16_scores, "o")):
                steps = [step for step in fp8 if step in bf16 and step > 0]
                below.plot(steps, [fp8[step] - bf16[step] for step in steps], mark,
                           color=color, linewidth=0.7, markersize=4)
    above.set(title=shape, ylim=(1.9, 7))
    above.legend()
    below.axhline(0, color="black", linewidth=0.5)
    below.set(xlabel="step", ylim=(-0.04, 0.04))


if __name__ == "__main__":
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for (shape, runs), column in zip(curves().items(), axes.T, strict=True):
        draw(shape, runs, *column)
    axes[0, 0].set_ylabel("loss, nats per token")
    axes[1, 0].set_ylabel("FP8 - bf16")
    figure.savefig(Path(__file__).with_name("losses.png"), dpi=100)
