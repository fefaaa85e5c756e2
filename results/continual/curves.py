"""Draw curves.png: bits per byte of the domain against those of Wikipedia, learned and forgotten.

    python results/continual/curves.py

AdamW. Each point is a rate with seed 1337, lines join a method's rates in order, a ring is its best
rate. Further left is more learned of the domain, lower is less forgotten. Rates that are worse than
no training at all are left out, and so is Wikipedia above HIGHEST.
"""
import runpy
import sys
from pathlib import Path

from matplotlib import pyplot

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))
import rates  # noqa: E402

HIGHEST = 1.11  # bits per byte
LABELS = {"fft": "full fine-tuning", "lora_r8": "LoRA, r = 8", "dora_r8": "DoRA, r = 8",
          "mora_r8": "MoRA, rotate, r = 8", "lora_r256": "LoRA, r = 256",
          "mora_r256": "MoRA, share, r = 256"}


def both(record):
    """Return bits per byte of (the domain, Wikipedia)."""
    return record["bits_per_byte"], record["wiki_val_bits_per_byte"]


def draw_domain(axis, domain, records):
    """Draw a line per method, and a dotted one for the untrained model if it has run."""
    trained = {name: record for name, record in records.items() if not name.endswith("-base")}
    base = records.get(f"{domain}-base")
    if base and "error" in base:
        base = None
    title = domain
    if base:
        axis.axhline(both(base)[1], color="black", ls=":", label="untrained")
        title += f" (untrained: {both(base)[0]:.3f})"
    for color, (method, label) in enumerate(LABELS.items()):
        scores = rates.scores_of(trained, (domain, method, "adamw"), both)
        points = [point for _, point in sorted(scores.items()) if point[-1] <= HIGHEST]
        if base:
            points = [point for point in points if point[0] < both(base)[0]]
        if points:
            axis.plot(*zip(*points, strict=True), ".-", color=f"C{color}", label=label)
            axis.plot(*min(points), "o", color=f"C{color}", fillstyle="none")
    axis.set(title=title, xlabel="domain's validation, bits per byte")


def draw(domains, records, file):
    """Draw a panel per domain."""
    figure, axes = pyplot.subplots(1, len(domains), figsize=(10, 5), layout="constrained")
    for axis, domain in zip(axes, domains, strict=True):
        draw_domain(axis, domain, records)
    axes[0].set_ylabel("Wikipedia, bits per byte")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    found = rates.read(FOLDER / "sweep.jsonl")
    if not found:
        raise SystemExit("sweep.jsonl has no run yet: plan.py makes them")
    draw(runpy.run_path(str(FOLDER / "plan.py"))["DOMAINS"], found, FOLDER / "curves.png")
