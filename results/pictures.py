"""Draw the validation losses of pretraining runs, for curves.py of several folders."""
from statistics import mean, mode

from matplotlib import pyplot

OPTIMIZERS = {"muon": "Muon", "adamw": "AdamW"}


def draw_line(axis, places, losses, look, label):
    """Draw the mean over seeds and a band from the lowest to the highest; losses: by seed, look:
    (matplotlib's color, format of line and points)."""
    columns = list(zip(*losses, strict=True))
    color, form = look
    axis.plot(places, [mean(column) for column in columns], form, color=color, label=label,
              linewidth=1.2)
    axis.fill_between(places, [min(column) for column in columns],
                      [max(column) for column in columns], color=color, alpha=0.2)


def draw_row(axes, runs, labels, looks):
    """Draw the methods of one optimizer: left against tokens, right against GPU seconds.

    GPU seconds are a run's seconds divided by its per_gpu, the processes that shared the GPU, at
    the speed of the slowest seed on the row's most frequent card: at the end of a sweep others had
    a GPU with fewer. A method without a seed on that card is drawn left only.
    """
    device = mode(run["device"] for seeds in runs.values() for run in seeds)
    for i, (method, label) in enumerate(labels.items()):
        seeds = runs.get(method)
        if not seeds:
            continue
        steps = [step for step, _ in seeds[0]["val_losses"] if step]
        losses = [[dict(run["val_losses"])[step] for step in steps] for run in seeds]
        look = looks.get(method, (f"C{i}", ".-"))
        tokens = seeds[0]["config"]["batch_size"] * seeds[0]["config"]["seq_len"]
        draw_line(axes[0], [step * tokens / 1e6 for step in steps], losses, look, label)
        speeds = [run["tokens_per_s"] * run["per_gpu"] for run in seeds
                  if run["device"] == device]  # of a whole GPU
        if speeds:
            seconds = tokens / min(speeds)
            draw_line(axes[1], [step * seconds for step in steps], losses, look, label)
    axes[0].set_xlabel("million tokens")
    axes[1].set_xlabel(f"GPU seconds, one {device}")


def draw_curves(file, runs, labels, title, looks=()):
    """Draw a row per optimizer, against tokens and GPU seconds.

    runs: {(method, optimizer): [runs of one pair of rates by seed]}; labels: {method: its label};
    looks: {method: see draw_line}, for those that do not take the next color and a solid line.
    """
    found = {optimizer for _, optimizer in runs}
    optimizers = [optimizer for optimizer in OPTIMIZERS if optimizer in found]
    figure, axes = pyplot.subplots(len(optimizers), 2, figsize=(10, 4.5 * len(optimizers)),
                                   layout="constrained", squeeze=False, sharey=True)
    for row, optimizer in zip(axes, optimizers, strict=True):
        by_method = {method: seeds for (method, used), seeds in runs.items() if used == optimizer}
        draw_row(row, by_method, labels, dict(looks))
        name = OPTIMIZERS[optimizer]
        row[0].set(title=f"{name}, {title}", ylabel="validation loss, nats per token")
        row[0].legend()
    figure.savefig(file, dpi=100)
