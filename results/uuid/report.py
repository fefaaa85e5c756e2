"""From OUT/results.jsonl of run.py: metrics.json, table.md, and docs/uuid.png. runs.jsonl here is the results.jsonl of the published runs.

    python results/uuid/report.py OUT
"""
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]
import runner

NAMES = {"fft": "full fine-tuning", "lora_r8": "LoRA, r = 8", "mora_r8": "MoRA, r = 8", "lora_r256": "LoRA, r = 256", "mora_r256": "MoRA, r = 256"}


def best(runs):
    """The run that reached 99 % first, or else got furthest, and there has most digits right."""
    return min(runs, key=lambda run: (run.get("steps_to_99") or 1e9, -run["step"], -run["digits"]))


def main(out, here=HERE, plot=HERE.parents[1] / "docs" / "uuid.png"):
    runs, metrics, chosen = [row for row in runner.latest(runner.rows(out)).values() if "digits" in row], {}, {}
    steps = sorted({point[0] for run in runs for point in run["curve"]})
    steps = [step for step in steps if step % 100 == 0 and step // 100 % 2] or steps
    table = ["| | trained | lr | step | digits right | 99 % at step | " + " | ".join(f"at {step}" for step in steps) + " |", "|---" * (6 + len(steps)) + "|"]
    for method in NAMES:
        mine = [run for run in runs if run["method"] == method]
        chosen[method] = run = best(mine) if mine else None
        for key, name in (("accuracy_final", "digits"), ("steps_to_99", "steps_to_99"), ("lr", "lr")):
            metrics[f"{method}.{key}"] = run and run[name]
        if run:
            metrics |= {f"{method}.steps": run["step"]}
            curve = {at: share for at, share, _ in run["curve"]}
            reached = run["status"] == "reached"
            at = [f"{curve[step]:.1%}" if step in curve else "done" if reached and step > run["step"] else "-" for step in steps]
            size = f"{run['trainable_parameters'] / 1e6:.1f} M"
            table.append(f"| {NAMES[method]} | {size} | {run['lr']:g} | {run['step']} | {run['digits']:.1%} | {run['steps_to_99'] or '-'} | {' | '.join(at)} |")
    (here / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    (here / "table.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))
    figure3({NAMES[method]: run["loss"] for method, run in chosen.items() if run}, plot)


def figure3(curves, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, loss in curves.items():
        axes.plot(*zip(*loss), label=name, linewidth=1.2)
    axes.set(xlabel="step (1,000 pairs each)", ylabel="training loss, nats a token")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main(sys.argv[1])
