"""Draw curves.png: loss on the held-out questions by learning rate, AdamW and Muon.

    python results/gsm8k/curves.py

One seed (1337); losses above 0.8 (LoRA at 3e-2) are left out. AdamW's rates of the first four
methods that sweep.jsonl lacks are those of runs.jsonl.
"""
import json
import runpy
import sys
from pathlib import Path

from matplotlib import pyplot

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))
import rates  # noqa: E402

LABELS = {"fft": "full fine-tuning", "lora": "LoRA, r = 8", "mora_rotate_r8": "MoRA, rotate, r = 8",
          "mora_share_r256": "MoRA, share, r = 256",
          "truncate_gradient_r8": "truncate, r = 8, gradient",
          "share_gradient_r8": "share, r = 8, gradient",
          "truncate_gradient_r32": "truncate, r = 32, gradient",
          "share_gradient_r32": "share, r = 32, gradient"}


def loss_grids(plan):
    """Return {(method, optimizer): {rate: loss}}."""
    found = {}
    for line in (FOLDER / "runs.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["seed"] == rates.SEED:
            found.setdefault((record["method"], "adamw"), {})[record["lr"]] = record["dev_loss"]
    records = rates.read(FOLDER / "sweep.jsonl")
    for group in plan["SEARCHED"]:
        scores = rates.scores_of(records, group, plan["score"])
        losses = {lr: score[0] for lr, score in scores.items() if score != rates.WORST}
        if losses:
            found.setdefault(group[1:], {}).update(losses)
    return found


def draw(grids, file):
    """Draw a line per method and optimizer; grids: see loss_grids."""
    figure, axis = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for color, (method, label) in enumerate(LABELS.items()):
        for optimizer, name, style in (("adamw", "AdamW", "--"), ("muon", "Muon", "-")):
            losses = grids.get((method, optimizer), {})
            points = [(lr, loss) for lr, loss in sorted(losses.items()) if loss < 0.8]
            if points:
                axis.plot(*zip(*points, strict=True), style, color=f"C{color}",
                          marker=".", label=f"{label}, {name}")
    axis.set(xscale="log", xlabel="learning rate", ylabel="nats per token, held-out questions")
    axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    draw(loss_grids(runpy.run_path(str(FOLDER / "plan.py"))), FOLDER / "curves.png")
