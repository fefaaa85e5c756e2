"""Draw docs/operators.png: dW of LoRA, of MoRA's operators, and of merged ReMoRA cycles.

    python docs/operators.py
"""
import sys
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mora  # noqa: E402
from analyze import picture  # noqa: E402

# (in_features, out_features) of the layers: r_hat divides neither side
SQUARE, WIDE = (36, 36), (64, 36)


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


def draw(file):
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


if __name__ == "__main__":
    draw(ROOT / "docs" / "operators.png")
