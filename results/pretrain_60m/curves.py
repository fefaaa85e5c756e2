"""Draw curves.png: validation loss of the runs of 66 M tokens against tokens and GPU seconds.

    python results/pretrain_60m/curves.py

Lines are means over seeds, bands reach from the lowest to the highest seed; the runs are those of
metrics.json. A run's GPU seconds are a third of its seconds of training, since three processes
shared a GPU; the median over seeds.
"""
from statistics import mean, median

import matplotlib
from matplotlib import pyplot
from metrics import FOLDER, HEADLINE, groups
from pretraining import read_runs, with_most_seeds

PER_GPU = 3
LABELS = {"full": "full rank", "best": "MoRA and LoRA (60m_best)", "remora_permute":
          "ReMoRA, permute", "lora": "LoRA", "mora_share": "MoRA, share",
          "remora_alternate": "ReMoRA, alternate", "relora": "ReLoRA"}


def curves(runs):
    """Return {(method, optimizer): (steps, [losses by seed], tokens, GPU seconds of a step)}."""
    result = {}
    for group, by_tokens in groups(runs).items():
        if HEADLINE not in by_tokens:
            continue
        seeds = with_most_seeds(by_tokens[HEADLINE])
        steps = [step for step, _ in seeds[0]["val_losses"] if step]
        losses = [[dict(run["val_losses"])[step] for step in steps] for run in seeds]
        tokens = seeds[0]["config"]["batch_size"] * seeds[0]["config"]["seq_len"]
        speed = median(run["tokens_per_s"] for run in seeds) * PER_GPU
        result[group] = steps, losses, tokens, tokens / speed
    return result


def draw(axes, lines, optimizer):
    for color, (method, label) in enumerate(LABELS.items()):
        if (method, optimizer) not in lines:
            continue
        steps, seeds, tokens, seconds = lines[method, optimizer]
        columns = list(zip(*seeds, strict=True))
        for axis, unit in zip(axes, (tokens / 1e6, seconds), strict=True):
            places = [step * unit for step in steps]
            axis.plot(places, [mean(column) for column in columns], color=f"C{color}",
                      label=label, linewidth=1.2)
            axis.fill_between(places, [min(column) for column in columns],
                              [max(column) for column in columns], color=f"C{color}", alpha=0.2)
    axes[0].set(title=f"{optimizer}, r = 32", ylabel="validation loss, nats per token")
    axes[0].legend()


if __name__ == "__main__":
    lines = curves(read_runs(FOLDER / "sweep.jsonl"))
    optimizers = [name for name in ("muon", "adamw") if any(name == own for _, own in lines)]
    if not optimizers:
        raise SystemExit("sweep.jsonl has no run of 66 M tokens yet: plan.py makes them")
    matplotlib.use("agg")
    figure, axes = pyplot.subplots(len(optimizers), 2, figsize=(10, 4.5 * len(optimizers)),
                                   layout="constrained", squeeze=False, sharey=True)
    for row, optimizer in zip(axes, optimizers, strict=True):
        draw(row, lines, optimizer)
    for axis, label in zip(axes[-1], ("million tokens", "GPU seconds, one H100"), strict=True):
        axis.set_xlabel(label)
    figure.savefig(FOLDER / "curves.png", dpi=100)
