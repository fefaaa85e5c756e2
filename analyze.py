"""Measure and draw runs, schedules and updates.

    python analyze.py spectra out/250m_mora out/250m_remora   spectra of dW since the first weights
    python analyze.py spectra CHECKPOINT --since=CHECKPOINT   spectra of dW between two checkpoints
    python analyze.py losses out/250m_lora out/250m_mora      loss curves from log.jsonl
    python analyze.py losses RUN... --x=seconds               the same over training time, or tokens
    python analyze.py schedule configs/250m_remora.py --steps=2000     the learning rate per step
    python analyze.py operators                               dW of LoRA and of MoRA's operators

Every command writes a picture, --png=FILE (matplotlib). `spectra` also prints a table. dW is the
change of a weight, not a gradient. Figures 4 and 5 of the paper (arXiv 2405.12130) are loss curves
and spectra.
"""
import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

import checkpoint
import mora
from batches import Batches, SampleBatches
from config import Config, UserError, command_line, load
from model import Llama, LlamaConfig
from optimizer import learning_rate
from shards import Samples, open_split

# the order of Figure 5
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj")
AXES = {"step": "step", "tokens": "tokens", "seconds": "seconds of training"}
# (in_features, out_features) of the layers that `operators` draws: r_hat divides neither side
SQUARE, WIDE = (36, 36), (64, 36)


# ---------------------------------------------------------------------------------------------
# spectra

def weights(path):
    """Load the projections of a checkpoint with their updates merged.

    path: a run, one of its steps, or a Hugging Face directory. Returns ({name: W + dW, float32},
    the folder that holds them).
    """
    model, _, folder = checkpoint.load(path)
    if mora.adapted_layers(model):
        model = mora.merge(model)
    return _projections(model), folder


def first_weights(step):
    """Return the projections at step 0 of the run that wrote the checkpoint `step`.

    They are drawn again from the run's seed, or read from its `init_from`.
    """
    if not (step / "state.json").exists():
        raise UserError(f"{step} is no checkpoint of a run, so its first weights are unknown: "
                        "set --since to the checkpoint to compare with")
    cfg = Config(**checkpoint.read_json(step / "state.json")["config"])
    if cfg.init_from:
        return weights(cfg.init_from)[0]
    vocab_size = checkpoint.read_json(step / "base" / "config.json")["vocab_size"]
    return _projections(Llama(LlamaConfig(vocab_size=vocab_size, **cfg.model()), seed=cfg.seed))


def _projections(model):
    state = model.state_dict()
    return {name: weight.detach() for name, weight in state.items() if _kind(name) in KINDS}


def _kind(name):
    """The kind of layer of a weight: "q_proj" of "model.layers.0.self_attn.q_proj.weight"."""
    return name.split(".")[-2]


def spectra(after, before):
    """Return {kind: [singular values of each layer's dW, descending]}, dW = after - before.

    after, before: {name: weight}. The computation runs on the GPU if there is one.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = {kind: [] for kind in KINDS}
    for name, weight in after.items():
        shape = tuple(before[name].shape) if name in before else "missing"
        if shape != tuple(weight.shape):
            raise UserError(f"{name} is {tuple(weight.shape)} in one checkpoint and {shape} in "
                            "the other")
        delta = weight.to(device) - before[name].to(device)
        if delta.shape[0] < delta.shape[1]:  # LAPACK needs half the time for a tall matrix
            delta = delta.T
        values[_kind(name)].append(torch.linalg.svdvals(delta).cpu())
    return values


def measures(values):
    """Summarize the singular values (descending) of one dW.

    singular_above_0.1: how many exceed 0.1 (Figure 5); rank: how many exceed 1e-3 of the largest;
    stable_rank: squared Frobenius norm over squared spectral norm; energy_90: how many of the
    largest hold 90 % of the sum of squares; largest: the spectral norm.
    """
    squares = values.square()
    energy = squares.cumsum(0) / squares.sum().clamp(min=1e-30)
    row = {"singular_above_0.1": int((values > 0.1).sum()), "rank": 0, "stable_rank": 0.0,
           "energy_90": int((energy < 0.9).sum()) + 1, "largest": values[0].item()}
    if row["largest"]:
        row["rank"] = int((values > 1e-3 * row["largest"]).sum())
        row["stable_rank"] = float(squares.sum() / row["largest"] ** 2)
    return row


def mean_measures(spectra_by_kind):
    """Return {kind: {measure: mean over layers}}; the key "all" is the mean over all layers."""
    rows = {kind: [measures(values) for values in layers]
            for kind, layers in spectra_by_kind.items() if layers}
    rows["all"] = [row for layers in rows.values() for row in layers]
    return {kind: {key: sum(row[key] for row in layers) / len(layers) for key in layers[0]}
            for kind, layers in rows.items()}


def print_measures(label, means):
    print(f"{label}\n{'':10} {'above 0.1':>10} {'rank':>8} {'stable rank':>12} "
          f"{'90 % energy':>12} {'largest':>9}")
    for kind, row in means.items():
        print(f"{kind:10} {row['singular_above_0.1']:10.1f} {row['rank']:8.1f} "
              f"{row['stable_rank']:12.2f} {row['energy_90']:12.1f} {row['largest']:9.3f}")


def plot_spectra(named, file):
    """Draw {label: spectra}: left the bars of Figure 5, right the energy of the mean spectrum."""
    figure, (bars, curves) = pyplot().subplots(1, 2, figsize=(12, 4))
    width = 0.8 / len(named)
    for i, (label, spectra_by_kind) in enumerate(named.items()):
        means = mean_measures(spectra_by_kind)
        kinds = [kind for kind in KINDS if kind in means]
        bars.bar([x + i * width for x in range(len(kinds))],
                 [means[kind]["singular_above_0.1"] for kind in kinds], width, label=label)
        squares = [values.square() / values.square().sum().clamp(min=1e-30)
                   for layers in spectra_by_kind.values() for values in layers]
        length = min(len(square) for square in squares)
        energy = torch.stack([square[:length] for square in squares]).mean(0).cumsum(0)
        curves.plot(range(1, length + 1), energy.numpy(), label=label)
    bars.set_xticks([x + 0.4 - width / 2 for x in range(len(kinds))],
                    [kind.removesuffix("_proj") for kind in kinds])
    bars.set(title="singular values of ΔW above 0.1, mean over layers", xlabel="kind of layer")
    curves.set(title="energy of ΔW in its largest singular values", xlabel="singular values",
               xscale="log", ylim=(0, 1))
    _save(figure, (bars, curves), file)


# ---------------------------------------------------------------------------------------------
# loss curves

def read_records(path):
    """Return the records of a log.jsonl, a list of dicts.

    A killed run can leave an incomplete last line: it is left out, with a note. A damaged line
    elsewhere raises UserError.
    """
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif number == len(lines):
            print(f"note: {path}, line {number} is incomplete and was left out")
        else:
            raise UserError(f"{path}, line {number} is not a JSON object: {line[:40]!r}; "
                            "repair or remove this line")
    return records


def read_log(run, x="step"):
    """Read the loss curves of a run: {"loss": [(x, value)], "val_loss": [(x, value)]}.

    run: a run folder, or a log.jsonl. x: "step", "tokens", or "seconds" (see step_to_x). A resumed
    run repeats some steps: the later line of a step replaces the earlier one.
    """
    path = Path(run) / "log.jsonl" if Path(run).is_dir() else Path(run)
    records = read_records(path)
    curves = {"loss": {}, "val_loss": {}}
    for record in records:
        for key, points in curves.items():
            if key in record and "step" in record:
                points[record["step"]] = record[key]
    if not curves["loss"]:
        raise UserError(f"{path} has no training loss yet: the run writes one every log_every "
                        "steps")
    to_x = step_to_x(records, path, x)
    return {key: [(to_x(step), value) for step, value in sorted(points.items())]
            for key, points in curves.items()}


def step_to_x(records, path, x):
    """Return the function from a step to its place on the x axis.

    tokens: step * tokens_per_step of the header, which is a mean for samples of several lengths.
    seconds: the sum of steps * tokens_per_step / tokens_per_s over the intervals between log
    lines. The first interval contains compilation; none contains evaluation or saving.
    """
    if x == "step":
        return lambda step: step
    headers = [record for record in records if "tokens_per_step" in record]
    if not headers:
        raise UserError(f"{path} has no header with tokens_per_step, so --x={x} is unknown: "
                        "use --x=step")
    tokens_per_step = headers[-1]["tokens_per_step"]
    if x == "tokens":
        return lambda step: step * tokens_per_step
    speeds = {record["step"]: record.get("tokens_per_s") for record in records if "loss" in record}
    steps, seconds = [0], [0.0]
    for step, speed in sorted(speeds.items()):
        if not speed:
            raise UserError(f"{path}, step {step} has no tokens_per_s, so --x=seconds is unknown: "
                            "use --x=step or --x=tokens")
        seconds.append(seconds[-1] + (step - steps[-1]) * tokens_per_step / speed)
        steps.append(step)
    # a validation can follow the last logged loss: it is placed at the last speed
    beyond = max(record.get("step", 0) for record in records) + 1
    seconds.append(seconds[-1] + (beyond - steps[-1]) * tokens_per_step / speed)
    steps.append(beyond)
    return lambda step: float(np.interp(step, steps, seconds))


def plot_losses(named, file, x="step"):
    """Draw {label: read_log(run, x)}: lines are training losses, dots validation losses."""
    figure, axes = pyplot().subplots(figsize=(8, 5))
    for label, curves in named.items():
        places, values = zip(*curves["loss"], strict=True)
        (line,) = axes.plot(places, values, label=label, linewidth=1)
        if curves["val_loss"]:
            places, values = zip(*curves["val_loss"], strict=True)
            axes.plot(places, values, "o", color=line.get_color(), markersize=4)
    axes.set(xlabel=AXES[x], ylabel="loss, nats per token (dots: validation)")
    _save(figure, (axes,), file)


# ---------------------------------------------------------------------------------------------
# the learning rate

def with_steps(cfg):
    """Return the config with the number of steps that train.py derives from `epochs`."""
    if not cfg.epochs:
        return cfg
    folder = Path(cfg.data)
    if not (folder / "manifest.json").exists():
        raise UserError(f"epochs = {cfg.epochs:g} over {folder}, which is not prepared, so the "
                        "number of steps is unknown: set it with --steps=N")
    split = open_split(folder, "train", verify=False)
    make_batches = SampleBatches if isinstance(split, Samples) else Batches
    batches = make_batches(split, cfg.seed, cfg.seq_len, cfg.batch_size, cfg.batch_size)
    return dataclasses.replace(cfg, steps=max(1, round(cfg.epochs * batches.steps_per_epoch)))


def plot_schedule(cfg, file):
    """Draw the learning rate of every step of a run."""
    cfg = with_steps(cfg)
    figure, axes = pyplot().subplots(figsize=(8, 3))
    rates = [learning_rate(step, cfg) for step in range(cfg.steps)]
    axes.plot(rates, linewidth=1, label=f"restarts: {cfg.cycle(cfg.steps - 1)[0]}")
    axes.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    _save(figure, (axes,), file)


# ---------------------------------------------------------------------------------------------
# the updates themselves

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
        return model["layer"].delta()


def merged_cycles(groups, cycles):
    """Return the sum of the updates of some ReMoRA cycles, what their merges add to W."""
    return sum(example_delta(SQUARE, groups=groups, cycle=cycle) for cycle in range(cycles))


def operator_panels():
    """Return the rows of the figure of `operators`: [[(title, dW)]]."""
    rows = []
    for shape in (SQUARE, WIDE):
        width = mora.r_hat(1, *shape)
        rows.append([("LoRA, r = 1", example_delta(shape, "lora"))])
        rows[-1] += [(f"{operator}, r̂ = {width}", example_delta(shape, operator=operator))
                     for operator in mora.OPERATORS]
    rows.append([("ReMoRA, 1 cycle", merged_cycles("alternate", 1))])
    for cycles in (2, 4):
        rows[-1] += [(f"{cycles} cycles, {groups}", merged_cycles(groups, cycles))
                     for groups in ("alternate", "permute")]
    return rows


def plot_operators(file):
    """Draw operator_panels() as heat maps, with the rank in each title."""
    rows = operator_panels()
    heights = [delta.shape[0] / delta.shape[1] for (_, delta), *_ in rows]
    figure, axes = pyplot().subplots(len(rows), len(rows[0]), height_ratios=heights,
                                     figsize=(12, 1.5 + 2.4 * sum(heights)))
    for line, panels in zip(axes, rows, strict=True):
        for axis, (title, delta) in zip(line, panels, strict=True):
            limit = float(delta.abs().max())
            axis.imshow(delta.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit,
                        interpolation="nearest")
            axis.set_title(f"{title}\nrank {int(torch.linalg.matrix_rank(delta))}", fontsize=10)
            axis.set(xticks=[], yticks=[])
        out_features, in_features = panels[0][1].shape
        line[0].set_ylabel(f"ΔW, {out_features} × {in_features}")
    figure.tight_layout()
    _write(figure, file)


# ---------------------------------------------------------------------------------------------
# pictures and the command line

def pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")  # write files, open no window
    import matplotlib.pyplot
    return matplotlib.pyplot


def _save(figure, axes, file):
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[-1].legend()
    figure.tight_layout()
    _write(figure, file)


def _write(figure, file):
    try:
        figure.savefig(file, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"--png={file} cannot be written: {error}") from error
    print(f"wrote {file}")


def command_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    parts = {}
    for name in ("spectra", "losses", "schedule", "operators"):
        png = f"{name}.png"
        if name == "operators" and Path("docs").is_dir():
            png = "docs/operators.png"
        parts[name] = commands.add_parser(name, allow_abbrev=False)
        parts[name].add_argument("--png", default=png, help=f"default: {png}")
    parts["spectra"].add_argument("checkpoints", nargs="+",
                                  help="runs, their steps, or Hugging Face directories")
    parts["spectra"].add_argument("--since", help="the weights to subtract; default: those that "
                                                  "each run began with")
    parts["losses"].add_argument("runs", nargs="+", help="run folders, or log.jsonl files")
    parts["losses"].add_argument("--x", choices=AXES, default="step", help="default: step")
    parts["schedule"].add_argument("config", help="a config file; more words as for train.py")
    return parser


def main(argv):
    args, rest = command_parser().parse_known_args(argv)
    if args.command == "schedule":
        return plot_schedule(load([args.config, *rest], None), args.png)
    if rest:
        raise UserError(f"unknown arguments: {' '.join(rest)}; see python analyze.py --help")
    if args.command == "losses":
        named = {run: read_log(run, args.x) for run in args.runs}
        return plot_losses(named, args.png, args.x)
    if args.command == "operators":
        return plot_operators(args.png)
    named = {}
    for path in args.checkpoints:
        after, folder = weights(path)
        before = weights(args.since)[0] if args.since else first_weights(folder)
        named[path] = spectra(after, before)
        print_measures(path, mean_measures(named[path]))
    plot_spectra(named, args.png)


if __name__ == "__main__":
    command_line(main)
