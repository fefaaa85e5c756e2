"""Draw the validation losses of pretraining runs, for curves.py of several folders."""
from statistics import mean, median

import matplotlib
from matplotlib import pyplot

OPTIMIZERS = ("muon", "adamw")


def curve(seeds, per_gpu):
    """Return (steps, [losses by seed], tokens of a step, GPU seconds of a step) of a run's seeds.

    GPU seconds are a run's seconds of training over the processes that shared a GPU, the median.
    """
    steps = [step for step, _ in seeds[0]["val_losses"] if step]
    losses = [[dict(run["val_losses"])[step] for step in steps] for run in seeds]
    tokens = seeds[0]["config"]["batch_size"] * seeds[0]["config"]["seq_len"]
    return steps, losses, tokens, tokens / per_gpu / median(run["tokens_per_s"] for run in seeds)


def draw_row(axes, runs, optimizer, labels, per_gpu):
    for color, (method, label) in enumerate(labels.items()):
        if (method, optimizer) not in runs:
            continue
        steps, losses, tokens, seconds = curve(runs[method, optimizer], per_gpu)
        columns = list(zip(*losses, strict=True))
        for axis, unit in zip(axes, (tokens / 1e6, seconds), strict=True):
            places = [step * unit for step in steps]
            axis.plot(places, [mean(column) for column in columns], ".-", color=f"C{color}",
                      label=label, linewidth=1.2)
            axis.fill_between(places, [min(column) for column in columns],
                              [max(column) for column in columns], color=f"C{color}", alpha=0.2)


def draw_curves(file, runs, labels, per_gpu, title):
    """Draw a row per optimizer, against tokens and GPU seconds; bands reach over the seeds.

    runs: {(method, optimizer): [runs of one pair of rates by seed]}; labels: {method: its label}.
    """
    matplotlib.use("agg")
    optimizers = [name for name in OPTIMIZERS if any(name == own for _, own in runs)]
    figure, axes = pyplot.subplots(len(optimizers), 2, figsize=(10, 4.5 * len(optimizers)),
                                   layout="constrained", squeeze=False, sharey=True)
    for row, optimizer in zip(axes, optimizers, strict=True):
        draw_row(row, runs, optimizer, labels, per_gpu)
        row[0].set(title=f"{optimizer}, {title}", ylabel="validation loss, nats per token")
        row[0].legend()
    for axis, label in zip(axes[-1], ("million tokens", "GPU seconds, one H100"), strict=True):
        axis.set_xlabel(label)
    figure.savefig(file, dpi=100)
