"""Measure and draw runs, schedules and updates.

    python analyze.py spectra out/250m_mora out/250m_remora   spectra of dW since the first weights
    python analyze.py spectra CHECKPOINT --since=CHECKPOINT   spectra of dW between two checkpoints
    python analyze.py losses out/250m_lora out/250m_mora      loss curves from log.jsonl
    python analyze.py losses RUN... --x=seconds               the same over training time, or tokens
    python analyze.py schedule configs/250m_remora.py --steps=2000     the learning rate per step
    python analyze.py operators                               dW of LoRA and of MoRA's operators

Every command writes a picture, --png=FILE, with matplotlib; `spectra` also prints a table.
"""
import json
import runpy
from pathlib import Path
from statistics import fmean

from config import ROOT, Arguments, Config, command_line, need, read_json  # first; isort: skip

import numpy as np
import torch

import checkpoint
import mora
from model import Llama, LlamaConfig


def weights(path):
    """({name: W + dW} of what checkpoint.load takes, the folder it found)."""
    model, _, folder = checkpoint.load(path)
    return mora.merged_weights(model), folder


def first_weights(step):
    """{name: W} at step 0 of the run that wrote `step`: of its `init_from`, or drawn again."""
    need((step / "state.json").exists(), f"{step} is no checkpoint of a run, so its first weights "
         "are unknown: set --since to the checkpoint to compare with")
    cfg = Config(**checkpoint.read_state(step)["config"])
    if cfg.init_from:
        need(not checkpoint.steps_of(cfg.init_from), f"{step} began with a step of the "
             f"run {cfg.init_from}, not known which: name it, as --since={cfg.init_from}/step-...")
        return weights(cfg.init_from)[0]
    vocab_size = read_json(step / "base" / "config.json")["vocab_size"]
    shape = LlamaConfig(vocab_size=vocab_size, **cfg.model())
    return Llama(shape, cfg.seed, cfg.residual_init).state_dict()


def spectra(after, before):
    """{name: singular values of dW, descending} of the projections' dW = after - before."""
    values, device = {}, ("cuda" if torch.cuda.is_available() else "cpu")
    for name, weight in after.items():
        if name.split(".")[-2] not in mora.PROJECTIONS:
            continue
        need(name in before and before[name].shape == weight.shape, f"{name}, "
             f"{tuple(weight.shape)}, is missing or has another shape in the other checkpoint")
        delta = weight.to(device) - before[name].to(device)
        tall = delta if len(delta) > delta.shape[1] else delta.T  # LAPACK needs half the time
        values[name] = torch.linalg.svdvals(tall).cpu()
    return values


def measures(values):
    """Summarize the singular values (descending) of one dW; Figure 5 counts those above 0.1."""
    squares, largest = values.square(), values[0].item()
    total = squares.sum()
    return {"singular_above_0.1": int((values > 0.1).sum()),
            "rank": int((values > 1e-3 * largest).sum()),
            "stable_rank": float(total / squares[0].clamp(min=1e-30)),
            "energy_90": int((squares.cumsum(0) < 0.9 * total).sum()) + 1, "largest": largest}


def mean_measures(values_by_name):
    """{kind: {measure: mean over layers}}; the key "all" is the mean over all layers."""
    rows = {name: measures(values) for name, values in values_by_name.items()}
    parts = {kind: [row for name, row in rows.items() if kind in name] for kind in mora.PROJECTIONS}
    parts["all"] = [*rows.values()]
    return {kind: {key: fmean(row[key] for row in part) for key in part[0]}
            for kind, part in parts.items()}


def print_spectra(path, since=None):
    """Print and return mean_measures of what a run trained, or of the change since a checkpoint."""
    after, folder = weights(path)
    before = weights(since)[0] if since else first_weights(folder)
    means = mean_measures(spectra(after, before))
    print(f"{path}\n{'':10}", *(f"{key.replace('_', ' '):>18}" for key in means["all"]))
    for kind, row in means.items():
        print(f"{kind:10}", *(f"{value:18.3f}" for value in row.values()))
    return means


def read_records(path):
    """The records of a log.jsonl, a list of dicts, without the incomplete last line of a kill."""
    lines, records = path.read_text(errors="replace").splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            records.append({**json.loads(line)})
        except (ValueError, TypeError):  # no JSON, or JSON that is no object
            need(number == len(lines), f"{path}, line {number} is not a JSON object: "
                 f"{line[:40]!r}; repair or remove this line")
            print(f"note: {path}, line {number} is incomplete and was left out")
    return records


def read_log(run, x="step"):
    """The loss curves of a run: {"loss": [(place, value)], "val_loss": [(place, value)]}.
    run: a run folder, or a log.jsonl, of which later lines of one step replace earlier ones. x:
    "step", "tokens" (of samples: steps times the mean) or "seconds" (of training alone)."""
    path = Path(run) / "log.jsonl" if Path(run).is_dir() else Path(run)
    records = read_records(path)
    for number, record in enumerate(records, 1):
        losses = [record[key] for key in ("loss", "val_loss") if key in record]
        need(not losses or all(type(n) in (int, float) for n in [record.get("step"), *losses]),
             f"{path}, line {number}: a loss and its step must be numbers, got {record!s:.80}")
    lines = {key: {r["step"]: r for r in records if key in r} for key in ("loss", "val_loss")}
    logged = sorted(lines["loss"])
    need(logged, f"{path} has no training loss yet: a run writes one per log_every steps")
    headers = [record for record in records if "tokens_per_step" in record]
    speeds = [lines["loss"][step].get("tokens_per_s") for step in logged]
    need(x == "step" or headers and (x == "tokens" or all(speeds)),
         f"{path} lacks tokens_per_step or a tokens_per_s: use --x=step, not {x}")
    # a validation can follow the last logged loss: it is placed at the last speed
    places = steps = np.array([0, *logged, max([logged[-1], *lines["val_loss"]]) + 1])
    if x != "step":
        places = steps * headers[-1]["tokens_per_step"]
    if x == "seconds":
        places = np.cumsum([0, *np.diff(places) / np.array([*speeds, speeds[-1]])])
    return {key: [(float(np.interp(step, steps, places)), line[key])
                  for step, line in sorted(part.items())] for key, part in lines.items()}


def main(argv):
    parser = Arguments(__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("command", choices=("spectra", "losses", "schedule", "operators"))
    add("paths", nargs="*", help="runs, their steps, or Hugging Face directories; runs or "
        "log.jsonl files; a config file and more words as for train.py; none for operators")
    add("--png", help="file of the picture; default: COMMAND.png")
    add("--since", help="of spectra: the weights to subtract; default: each run's first weights")
    add("--x", choices=("step", "tokens", "seconds"), default="step", help="of losses")
    args, rest = parser.parse_known_args(argv)
    png = args.png or f"{args.command}.png"
    need(bool(args.paths) == (args.command != "operators"), "operators takes no path, the other "
         f"commands at least one, got {args.command} {' '.join(args.paths)}")
    need(not args.since or args.command == "spectra", "--since belongs to spectra alone")
    need(args.x == "step" or args.command == "losses", "--x belongs to losses alone")
    if rest and args.command != "schedule":
        parser.error(f"unknown arguments: {' '.join(rest)}")
    draw = runpy.run_path(str(ROOT / "docs" / "figures.py"))[f"draw_{args.command}"]
    if args.command == "operators":
        draw(png)
    elif args.command == "schedule":
        draw(png, [*args.paths, *rest])
    elif args.command == "losses":
        draw(png, {run: read_log(run, args.x) for run in args.paths}, args.x)
    else:
        for path in args.paths:  # the singular values of each can take minutes
            need(Path(path).exists(), f"{path} does not exist")
        draw(png, {path: print_spectra(path, args.since) for path in args.paths})


if __name__ == "__main__":
    command_line(main)
