"""What a run learned, and how: spectra of dW, loss curves, learning-rate schedules.

    python analyze.py spectra out/250m_mora out/250m_remora          dW since the run's first weights, Figure 5 of the paper
    python analyze.py spectra CHECKPOINT --since=CHECKPOINT          dW between two checkpoints
    python analyze.py losses out/250m_lora out/250m_mora             training curves from log.jsonl, Figure 4
    python analyze.py schedule configs/250m_remora.py --steps=2000   the learning rate, step by step

Prints a table and writes --png=FILE (matplotlib).
"""
import argparse
import json
from pathlib import Path

import torch

import checkpoint
import mora
from config import Config, UserError, command_line, load
from model import Llama, LlamaConfig

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj")  # Figure 5's order


def weights(path):
    """{name: W + dW, float32} of the projections of a run, a step or a Hugging Face directory, and the folder they came from."""
    model, _, folder = checkpoint.load(path)
    model = mora.merge(model) if mora.adapted_layers(model) else model
    return _projections(model), folder


def first_weights(step):
    """The projections that the run of this checkpoint began with: drawn again from its seed, or those of its init_from."""
    if not (step / "state.json").exists():
        raise UserError(f"{step} is no step of a run, so its first weights are unknown: name them with --since")
    values = checkpoint.read_json(step / "state.json")["config"]
    cfg = Config(**values)
    if cfg.init_from:
        return weights(cfg.init_from)[0]
    vocabulary = checkpoint.read_json(step / "base" / "config.json")["vocab_size"]
    return _projections(Llama(LlamaConfig(vocab_size=vocabulary, **cfg.model()), seed=cfg.seed))


def _projections(model):
    return {n: w.detach() for n, w in model.state_dict().items() if n.split(".")[-2] in KINDS}


def spectra(after, before):
    """{kind: [singular values of each layer's dW, descending]}; uses the GPU when there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {kind: [] for kind in KINDS}
    for name, weight in after.items():
        if name not in before or before[name].shape != weight.shape:
            other = tuple(before[name].shape) if name in before else "missing"
            raise UserError(f"{name} is {tuple(weight.shape)} in one checkpoint and {other} in the other")
        delta = weight.to(device) - before[name].to(device)
        tall = delta if delta.shape[0] >= delta.shape[1] else delta.T  # LAPACK takes half the time
        found[name.split(".")[-2]].append(torch.linalg.svdvals(tall).cpu())
    return found


def measures(values):
    """Of one dW's singular values: how many exceed 0.1 (Figure 5), numerical rank (above 1e-3 of the largest), stable rank
    (squared Frobenius over squared spectral norm), and how many carry 90 % of the energy (sum of squares)."""
    energy = values.square().cumsum(0) / values.square().sum().clamp(min=1e-30)
    largest = values[0].item()
    return {"singular_above_0.1": int((values > 0.1).sum()), "rank": int((values > 1e-3 * largest).sum()) if largest else 0,
            "stable_rank": float(values.square().sum() / largest ** 2) if largest else 0.0,
            "energy_90": int((energy < 0.9).sum()) + 1, "largest": largest}


def mean_measures(found):
    """{kind: {measure: mean over its layers}}, and the mean over all layers under "all"."""
    rows = {kind: [measures(values) for values in layers] for kind, layers in found.items() if layers}
    rows["all"] = [row for layers in rows.values() for row in layers]
    return {kind: {key: sum(row[key] for row in layers) / len(layers) for key in layers[0]} for kind, layers in rows.items()}


def read_log(run):
    """{"loss": [(step, value)], "val_loss": [...]} of a run's log.jsonl; lines that a resumed run wrote again replace the earlier ones."""
    path = Path(run) / "log.jsonl" if Path(run).is_dir() else Path(run)
    curves = {"loss": {}, "val_loss": {}}
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"{path} can not be read: {error.strerror}")
    for line in filter(None, lines):
        record = json.loads(line)
        for key, points in curves.items():
            if key in record and "step" in record:
                points[record["step"]] = record[key]
    return {key: sorted(points.items()) for key, points in curves.items()}


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise UserError("plots need matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def plot_spectra(named, file):
    """named: {label: {kind: [singular values]}}. Left Figure 5's bars, right the energy of the mean spectrum."""
    figure, (bars, curves) = pyplot().subplots(1, 2, figsize=(12, 4))
    for i, (label, found) in enumerate(named.items()):
        means = mean_measures(found)
        kinds = [kind for kind in KINDS if kind in means]
        width = 0.8 / len(named)
        bars.bar([x + i * width for x in range(len(kinds))], [means[kind]["singular_above_0.1"] for kind in kinds], width, label=label)
        squares = [values.square() / values.square().sum().clamp(min=1e-30) for layers in found.values() for values in layers]
        length = min(len(square) for square in squares)
        curves.plot(range(1, length + 1), torch.stack([square[:length] for square in squares]).mean(0).cumsum(0), label=label)
    bars.set_xticks([x + 0.4 - 0.4 / len(named) for x in range(len(kinds))], [kind.removesuffix("_proj") for kind in kinds])
    bars.set(title="singular values of ΔW above 0.1, mean over layers", xlabel="kind of layer")
    curves.set(title="energy of ΔW in its largest singular values", xlabel="singular values", xscale="log", ylim=(0, 1))
    _save(figure, (bars, curves), file)


def plot_losses(named, file):
    """named: {label: read_log(...)}. Solid: training; dots: validation."""
    figure, axes = pyplot().subplots(figsize=(8, 5))
    for label, curves in named.items():
        line, = axes.plot(*zip(*curves["loss"]), label=label, linewidth=1)
        if curves["val_loss"]:
            axes.plot(*zip(*curves["val_loss"]), "o", color=line.get_color(), markersize=4)
    axes.set(xlabel="step", ylabel="loss, nats a token (dots: validation)")
    _save(figure, (axes,), file)


def plot_schedule(cfg, file):
    from optimizer import learning_rate
    figure, axes = pyplot().subplots(figsize=(8, 3))
    axes.plot([learning_rate(step, cfg) for step in range(cfg.steps)], linewidth=1, label=f"restarts: {cfg.cycle(cfg.steps - 1)[0]}")
    axes.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    _save(figure, (axes,), file)


def _save(figure, axes, file):
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[-1].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    print(f"wrote {file}")


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    spectra_, losses, schedule = commands.add_parser("spectra"), commands.add_parser("losses"), commands.add_parser("schedule")
    spectra_.add_argument("checkpoints", nargs="+", help="runs, steps, or Hugging Face directories")
    spectra_.add_argument("--since", help="the weights to subtract; default: those that each run began with")
    losses.add_argument("runs", nargs="+", help="run folders, or log.jsonl files")
    schedule.add_argument("config", help="a config file")
    for command in (spectra_, losses, schedule):
        command.add_argument("--png", help=f"default: {command.prog.split()[-1]}.png", default=f"{command.prog.split()[-1]}.png")
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "schedule":
        parser.error(f"unknown arguments {' '.join(rest)}")
    if args.command == "schedule":
        return plot_schedule(load([args.config, *rest], None), args.png)
    if args.command == "losses":
        return plot_losses({run: read_log(run) for run in args.runs}, args.png)
    named = {}
    for path in args.checkpoints:
        after, folder = weights(path)
        named[path] = spectra(after, weights(args.since)[0] if args.since else first_weights(folder))
        print(f"{path}\n{'':10} {'above 0.1':>10} {'rank':>8} {'stable rank':>12} {'90 % energy':>12} {'largest':>9}")
        for kind, row in mean_measures(named[path]).items():
            print(f"{kind:10} {row['singular_above_0.1']:10.1f} {row['rank']:8.1f} {row['stable_rank']:12.2f} {row['energy_90']:12.1f} "
                  f"{row['largest']:9.3f}")
    plot_spectra(named, args.png)


if __name__ == "__main__":
    command_line(main)
