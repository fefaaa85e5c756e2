"""Write metrics.json from sweep.jsonl and the logs beside this file, and losses.png of the logs.

    python results/pretrain_250m/metrics.py

METHOD.OPTIMIZER.short.wiki_ppl and the numbers beside it are those of the best pair of rates on 200
steps. rates_tried counts the pairs, with those that diverged; bracketed is 1 if the best has worse
ones on both sides of both rates. METHOD.OPTIMIZER.wiki_ppl and the numbers beside it are those of
2,000 steps (131 M tokens) at these rates, METHOD.OPTIMIZER.at_LR_RESTLR.wiki_ppl at others; of
several seeds, means. wiki_ppl is the last validation, best_ppl the lowest, at best_step.

Two runs shared a GPU in the sweep. Short runs therefore have no tokens_per_s, and long runs have
tokens_per_s (restarts included) and peak_gib of a run that is alone on a GPU, from bench.json; what
bench.py printed is in bench.txt:

    M=full_muon_fp8,mora_muon_fp8,lora_muon_fp8,mixed_muon_fp8,full_fp8,mora_fp8,lora_fp8
    python bench.py --shape=250m --accumulate=2 --methods=$M \
        --json=results/pretrain_250m/bench.json

The logs are older: one run each, at rates 2e-3 and 1.6e-2. METHOD_fp8 trained with --matmul=fp8,
as the sweep's runs did; .loss_difference_STEP is its validation loss minus that of METHOD_bf16.
"""
import json
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path
from statistics import mean, median, stdev

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))
import pretraining  # noqa: E402

PLAN = runpy.run_path(str(FOLDER / "plan.py"))
LONG, SHORT, GRID_OF = PLAN["LONG"], PLAN["SHORT"], PLAN["GRID_OF"]
# {method: (its name in bench.py, steps between restarts or 0)}
BENCHED = {"full": ("full", 0), "mora_share": ("mora", 0), "lora": ("lora", 0),
           "best": ("mixed", 10), "remora_alternate": ("mora", 400)}
NAME = re.compile(r"(\w+)-(\w+)-.+-steps(\d+)")  # as plan.py writes it


def of_run(path):
    """Return (name, config, {step: validation loss}, median of tokens/s) of a log.jsonl."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    config = records[0]["config"]
    losses = {record["step"]: record["val_loss"] for record in records if "val_loss" in record}
    speeds = [record["tokens_per_s"] for record in records if "tokens_per_s" in record]
    return f"{path.stem}.{config['optimizer']}", config, losses, median(speeds)


def of_losses(seeds):
    """Return the numbers of {step: validation loss} of each seed."""
    losses = {step: mean(seed[step] for seed in seeds) for step in seeds[0]}
    best = min(losses, key=losses.get)
    return {"wiki_loss": losses[max(losses)], "best_step": best,
            "best_ppl": mean(math.exp(seed[best]) for seed in seeds),
            **{f"val_loss_{step}": loss for step, loss in losses.items()}}


def of_model(folder, stem):
    """Return the numbers of an older run's last checkpoint, on c4_sample and of its spectra; {} if
    it was not measured before its machine went back."""
    numbers = {}
    c4, spectra = (folder / f"{stem}_{what}.json" for what in ("c4", "spectra"))
    if c4.exists():
        scores = json.loads(c4.read_text())
        numbers |= {"c4_ppl": scores["ppl"], "c4_bits_per_byte": scores["bits_per_byte"]}
    if spectra.exists():
        measures = json.loads(spectra.read_text())["measures"]["all"]
        numbers |= {key: measures[key] for key in ("singular_above_0.1", "rank")}
    return numbers


def logs(folder):
    """Return the paths of the older runs' logs."""
    return sorted(set(folder.glob("*.jsonl")) - {folder / "sweep.jsonl"})


def of_logs(folder):
    """Return {METHOD.OPTIMIZER: its numbers}, with the differences that FP8 makes."""
    numbers, runs = {}, {}
    for path in logs(folder):
        name, config, losses, speed = of_run(path)
        runs[name] = losses
        numbers[name] = {"wiki_ppl": math.exp(losses[max(losses)]), **of_losses([losses]),
                         "lr": config["lr"], "rest_lr": config["rest_lr"],
                         "tokens_per_s": speed, **of_model(folder, path.stem)}
    for name, losses in runs.items():
        in_fp8 = name.replace("_bf16.", "_fp8.")
        if in_fp8 != name and in_fp8 in runs:
            differences = {step: runs[in_fp8][step] - loss for step, loss in losses.items() if step}
            own = numbers[in_fp8]
            own |= {f"loss_difference_{step}": value for step, value in differences.items()}
            own["loss_difference_std"] = stdev(differences.values())
    return {name: {key: round(number, 4) for key, number in part.items()}
            for name, part in numbers.items()}


def by_length(runs):
    """Return {(method, optimizer, steps): [runs]}; one that diverged has infinite perplexity."""
    result = {}
    for run in runs:
        method, optimizer, steps = NAME.fullmatch(run["name"]).groups()
        result.setdefault((method, optimizer, int(steps)), []).append(run)
    return result


def long_runs(lengths, method, optimizer):
    """Return {"": [seeds at the rates that short runs chose], "at_LR_RESTLR.": [at others]}. A
    method without short runs has those of another, by GRID_OF."""
    group = GRID_OF.get((method, optimizer), (method, optimizer))
    best = pretraining.best_of(lengths.get((*group, SHORT), []))
    result = {}
    for run in lengths.get((method, optimizer, LONG), []):
        if "error" in run:
            continue
        pair = pretraining.rates_of(run)
        chosen = best and pair == pretraining.rates_of(best)
        prefix = "" if chosen else "at_{:g}_{:g}.".format(*pair)
        result.setdefault(prefix, []).append(run)
    return result


def alone(bench, method, optimizer):
    """Return {"tokens_per_s", "peak_gib"} of a method that has a GPU for itself, {} if bench, of
    bench.json, lacks it."""
    method, every = BENCHED[method]
    name = f"250m.{method}_muon_fp8" if optimizer == "muon" else f"250m.{method}_fp8"
    seconds = pretraining.token_seconds(bench, name, every)
    if not seconds:
        return {}
    return {"tokens_per_s": round(1 / seconds), "peak_gib": round(bench[f"{name}.peak_gib"], 2)}


def read_bench(folder):
    """Return the numbers of bench.json, {} without it."""
    path = folder / "bench.json"
    return json.loads(path.read_text()) if path.exists() else {}


def of_short(title, runs):
    """Return the numbers of a grid of short runs; prints it after the title."""
    best = pretraining.best_of(runs)
    if best is None:  # no run, or all diverged
        return {}
    print(title, end=" ")
    numbers = pretraining.of_seeds(pretraining.at_rates_of(best, runs))
    numbers.pop("tokens_per_s", None)  # two runs shared a GPU
    return numbers | pretraining.of_grid(best, runs)


def of_long(seeds, benched):
    """Return the numbers of long runs at one pair of rates; benched: see alone."""
    numbers = pretraining.of_seeds(seeds)
    for key in ("tokens_per_s", "peak_gib"):  # two runs shared a GPU, and resumed ones have no peak
        numbers.pop(key, None)
    numbers |= benched
    if "trainable_block_fraction" in seeds[0]:
        numbers["trainable_block_fraction"] = seeds[0]["trainable_block_fraction"]
    losses = of_losses([dict(run["val_losses"]) for run in seeds])
    return numbers | {key: round(value, 4) for key, value in losses.items()}


def of_sweep(runs, bench):
    """Return {METHOD.OPTIMIZER: its numbers}; prints the grids of short runs."""
    lengths, numbers = by_length(runs), {}
    for method, optimizer in sorted({name[:2] for name in lengths}):
        own = numbers[f"{method}.{optimizer}"] = {}
        short = of_short(f"{method}.{optimizer}", lengths.get((method, optimizer, SHORT), []))
        own |= {f"short.{key}": value for key, value in short.items()}
        benched = alone(bench, method, optimizer)
        for prefix, seeds in long_runs(lengths, method, optimizer).items():
            own |= {f"{prefix}{key}": value for key, value in of_long(seeds, benched).items()}
    return numbers


def summarize(folder):
    """Return the flat numbers."""
    runs = pretraining.read_with_diverged(folder / "sweep.jsonl")
    numbers = of_logs(folder) | of_sweep(runs, read_bench(folder))
    return {f"{name}.{key}": number for name, own in numbers.items() for key, number in own.items()}


def main():
    (FOLDER / "metrics.json").write_text(json.dumps(summarize(FOLDER), indent=1) + "\n")
    names = [path.name for path in logs(FOLDER)]
    subprocess.run([sys.executable, FOLDER.parents[1] / "analyze.py", "losses", *names,
                    "--png=losses.png"], cwd=FOLDER, check=True)


if __name__ == "__main__":
    main()
