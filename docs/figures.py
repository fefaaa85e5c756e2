"""The pictures that analyze.py draws (matplotlib): each function writes one to a file.

    python analyze.py operators --png=docs/operators.png
    python analyze.py schedule configs/250m_remora.py --png=docs/schedule.png
"""
import contextlib
from pathlib import Path

import numpy as np
import torch
from torch import nn

import mora
from config import UserError, as_user_error, load
from optimizer import learning_rate
from shards import open_split
from train import make_batches

# (in_features, out_features) of the layers of draw_operators: r_hat divides neither side
SQUARE, WIDE = (36, 36), (64, 36)


@contextlib.contextmanager
def picture(file, rows=1, columns=1, figsize=None, **options):
    """Give the axes (rows, columns) of a figure; after the `with` block write it to `file`."""
    with as_user_error("plots need matplotlib: pip install matplotlib", ImportError):
        from matplotlib.figure import Figure
    figure = Figure(figsize, layout="tight")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    yield axes
    for axis in axes.flat:
        _, labels = axis.get_legend_handles_labels()
        if labels:
            axis.grid(alpha=0.3)
            axis.legend(ncols=1 + len(labels) // 6)
    with as_user_error(f"--png={file} cannot be written", ValueError):  # no format of this ending
        figure.savefig(file, dpi=120, format=Path(file).suffix[1:] or "png")  # to this very file
    print(f"wrote {file}")


def draw_spectra(file, named):
    """Draw the bars of Figure 5 of the paper for {label: analyze.mean_measures}."""
    places, width = np.arange(len(mora.PROJECTIONS)), 0.8 / len(named)
    with picture(file, figsize=(8, 4)) as ((axis,),):
        for i, (label, means) in enumerate(named.items()):
            heights = [means[kind]["singular_above_0.1"] for kind in mora.PROJECTIONS]
            axis.bar(places + i * width, heights, width, label=label)
        axis.set_xticks(places + 0.4 - width / 2, mora.PROJECTIONS)
        axis.set_ylim(top=(1.2 + 0.06 * len(named)) * axis.get_ylim()[1])  # room for the legend
        axis.set(title="singular values of ΔW above 0.1, mean over layers", xlabel="kind of layer")


def draw_losses(file, named, x):
    """Draw {label: analyze.read_log(run, x)}: lines are training losses, dots validation losses."""
    with picture(file, figsize=(8, 5)) as ((axis,),):
        for label, curves in named.items():
            (line,) = axis.plot(*zip(*curves["loss"], strict=True), label=label, linewidth=1)
            if curves["val_loss"]:
                axis.plot(*zip(*curves["val_loss"], strict=True), "o", color=line.get_color(),
                          markersize=4)
        axis.set(xlabel=x, ylabel="loss, nats per token (dots: validation)")


def draw_schedule(file, words):
    """Draw the learning rate of every step of the run that `train.py words` would start."""
    cfg = load(words, None)
    if cfg.epochs:
        with as_user_error(f"epochs = {cfg.epochs:g} need the data, or set --steps=N", UserError):
            cfg, _ = make_batches(cfg, open_split(cfg.data, "train", verify=False), "cpu", 0, 1)
    rates = [learning_rate(step, cfg) for step in range(cfg.steps)]
    with picture(file, figsize=(8, 3)) as ((axis,),):
        axis.plot(rates, linewidth=1, label=f"restarts: {cfg.cycle(cfg.steps - 1)[0]}")
        axis.set(xlabel="step", ylabel="learning rate", ylim=(0, None))


# ---- dW of LoRA, of MoRA's operators, and of merged ReMoRA cycles

def example_delta(shape, method="mora", operator="share", groups="strided", cycle=0):
    """Return dW (out, in) of one adapted layer of rank 1 whose parameters are random numbers.

    shape: (in_features, out_features).
    """
    model = nn.ModuleDict({"layer": nn.Linear(*shape, bias=False)}).double()
    mora.adapt(model, method=method, rank=1, operator=operator, groups=groups, targets=("layer",),
               cycle=cycle)
    generator = torch.Generator().manual_seed(cycle)
    with torch.no_grad():
        for _, parameter in mora.adapter_parameters(model):
            parameter.normal_(generator=generator)
        return model["layer"].update.delta()


def merged_cycles(groups, cycles):
    """Return the sum of the updates of some ReMoRA cycles, what their merges add to W."""
    return sum(example_delta(SQUARE, groups=groups, cycle=cycle) for cycle in range(cycles))


def operator_panels():
    """Return the rows of the figure: [[(title, dW)]]."""
    operators = [[("LoRA, r = 1", example_delta(shape, "lora")),
                  *((f"{operator}, r̂ = {mora.r_hat(1, *shape)}",
                     example_delta(shape, operator=operator)) for operator in mora.OPERATORS)]
                 for shape in (SQUARE, WIDE)]
    cycles = [(f"{cycles} cycles, {groups}", merged_cycles(groups, cycles))
              for cycles in (2, 4) for groups in ("alternate", "permute")]
    return [*operators, [("ReMoRA, 1 cycle", merged_cycles("alternate", 1)), *cycles]]


def draw_operators(file):
    """Draw operator_panels() as heat maps, with the rank in each title."""
    rows = operator_panels()
    heights = [delta.shape[0] / delta.shape[1] for (_, delta), *_ in rows]
    with picture(file, len(rows), len(rows[0]), height_ratios=heights,
                 figsize=(12, 1.5 + 2.4 * sum(heights))) as axes:
        for line, panels in zip(axes, rows, strict=True):
            for axis, (title, delta) in zip(line, panels, strict=True):
                limit = float(delta.abs().max())
                axis.imshow(delta.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit,
                            interpolation="nearest")
                axis.set_title(f"{title}\nrank {int(torch.linalg.matrix_rank(delta))}", fontsize=10)
                axis.set(xticks=[], yticks=[])
            line[0].set_ylabel("ΔW, {} × {}".format(*panels[0][1].shape))
