"""Draw curves.png: share of right hex digits by step, of each method at its best rate.

    python results/uuid/curves.py

Lines are means over seeds; a run that ended early keeps its last digits. Dashed: AdamW; thin:
constant rates.
"""
import runpy
import sys
from pathlib import Path
from statistics import mean

from matplotlib import pyplot

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))
import rates  # noqa: E402

PANELS = {"r = 8": {"LoRA": "lora_r8", "MoRA": "mora_r8",
                    "MoRA, truncate, gradient": "truncate_gradient_r8",
                    "MoRA, share, gradient": "share_gradient_r8"},
          "full rank, r = 256": {"LoRA": "lora_r256", "MoRA": "mora_r256",
                                 "full fine-tuning": "fft"}}
STYLES = {("falling", "muon"): ("Muon", "-", 1.5), ("falling", "adamw"): ("AdamW", "--", 1.5),
          ("uuid", "muon"): ("Muon, constant", "-", 0.5),
          ("uuid", "adamw"): ("AdamW, constant", "--", 0.5)}


def curves_of(plan):
    """Return {(task, method, optimizer): [(step, mean share of right digits)]} at the best rate."""
    found = {}
    for group, records, _ in rates.report(plan["read"](), plan["GROUPS"], plan["score"]):
        curves = [record["curve"] for record in records]
        steps = sorted({step for curve in curves for step, _, _ in curve})
        first = max(curve[0][0] for curve in curves)
        found[group] = [(at, mean(plan["digits_at"](curve, at) for curve in curves))
                        for at in steps if at >= first]
    return found


def draw(curves, file):
    """Draw a panel per rank; curves: see curves_of."""
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(10, 5), layout="constrained",
                                   sharey=True)
    for axis, (title, methods) in zip(axes, PANELS.items(), strict=True):
        for color, (label, method) in enumerate(methods.items()):
            for (task, optimizer), (suffix, style, width) in STYLES.items():
                points = curves.get((task, method, optimizer))
                if points:
                    axis.plot(*zip(*points, strict=True), style, color=f"C{color}", marker=".",
                              linewidth=width, label=f"{label}, {suffix}")
        axis.axhline(0.99, color="gray", linewidth=0.5)
        axis.set(title=title, xlabel="step")
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    axes[0].set_ylabel("share of right digits")
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    draw(curves_of(runpy.run_path(str(FOLDER / "plan.py"))), FOLDER / "curves.png")
