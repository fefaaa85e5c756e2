"""Write metrics.json from sweep.jsonl: what every method reaches with either optimizer.

    python results/pretrain_60m/metrics.py

METHOD.OPTIMIZER.wiki_ppl_mean and the numbers beside it are those of the runs of 66 M tokens as
soon as there is one, else those of the best rates of the grid, 33 M: tokens_m tells which. Without
a second seed there is no wiki_ppl_std. grid_ppl (the least of one seed), rates_tried and bracketed
are always the grid's. Longer runs have names of their own: METHOD.OPTIMIZER.131m.wiki_ppl.
Prints the grids, and for each best whether it lies inside its grid on both axes.
"""
import json
import sys
from pathlib import Path
from statistics import mean, median, stdev

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))
import rates  # noqa: E402

GRID_SEED, GRID, HEADLINE = 1337, 33, 66  # of the grids, million tokens
OF_NO_METHOD = ("steps", "eval_every", "save_every", "matmul")
MEANS = {"wiki_ppl_mean": ("val_ppl", 2), "c4_ppl_mean": ("c4_sample_ppl", 1),
         "wiki_bits_per_byte_mean": ("bits_per_byte", 4),
         "c4_bits_per_byte_mean": ("c4_sample_bits_per_byte", 4)}  # {name: (key of a run, digits)}


def method_of(run):
    """Return the method of a run, whose name is METHOD-OPTIMIZER-LR-REST_LR-sSEED and options.

    Options are what METHOD lacks in plan.py: lora and -rank80 are the method lora_r80, other
    restarts are remora_permute.restart_every50.
    """
    method = run["name"].split("-")[0]
    _, _, options = run["name"].partition(f"-s{run['config']['seed']}")
    for option in filter(None, options.split("-")):
        if option.startswith("rank"):
            method += "_" + option.replace("rank", "r")
        elif not option.startswith(OF_NO_METHOD):
            method += f".{option}"
    return method


def groups(runs):
    """Return {(method, "OPTIMIZER", or "OPTIMIZER.fp8"): {million tokens: [runs]}}."""
    result = {}
    for run in runs:
        config = run["config"]
        tokens = round(config["steps"] * config["batch_size"] * config["seq_len"] / 1e6)
        products = "" if config["matmul"] == "bf16" else f".{config['matmul']}"
        group = result.setdefault((method_of(run), config["optimizer"] + products), {})
        group.setdefault(tokens, []).append(run)
    return result


def rates_of(run):
    return run["config"]["lr"], run["config"]["rest_lr"]


def average(runs, key, digits):
    return round(mean(run[key] for run in runs), digits)


def with_most_seeds(runs):
    """Return the runs at the rates that have the most seeds, the best of several such."""
    by_rates = {}
    for run in runs:
        by_rates.setdefault(rates_of(run), []).append(run)
    return max(by_rates.values(), key=lambda seeds: (len(seeds), -average(seeds, "val_ppl", 9)))


def bracketed(grid, best):
    """Return whether the grid holds a lower and a higher value of each rate, the other fixed."""
    lr, rest_lr = best
    return all(min(line) < rate < max(line) for rate, line in (
        (lr, [a for a, b in grid if b == rest_lr]), (rest_lr, [b for a, b in grid if a == lr])))


def of_grid(grid):
    """Return (numbers of a grid of one seed, its best rates)."""
    ordered = sorted(grid, key=lambda run: run["val_ppl"])
    best, rate_pairs = rates_of(ordered[0]), [rates_of(run) for run in grid]
    inside = bracketed(rate_pairs, best)
    print("best", best, "inside its grid" if inside else "at the edge of its grid")
    for run in ordered:
        print("    lr {:g}, rest_lr {:g}:".format(*rates_of(run)), f"{run['val_ppl']:.2f}")
    return {"grid_ppl": round(ordered[0]["val_ppl"], 2), "rates_tried": len(set(rate_pairs)),
            "bracketed": int(inside)}, best


def of_seeds(runs, tokens):
    """Return the numbers of runs that differ in their seeds."""
    lr, rest_lr = rates_of(runs[0])
    numbers = {name: average(runs, *source) for name, source in MEANS.items()}
    if len(runs) > 1:
        numbers["wiki_ppl_std"] = round(stdev(run["val_ppl"] for run in runs), 2)
    numbers |= {"lr": lr, "rest_lr": rest_lr, "seeds": len(runs), "tokens_m": tokens,
                "tokens_per_s": round(median(run["tokens_per_s"] for run in runs)),
                "peak_gib": round(median(run["peak_gib"] for run in runs), 2)}
    spectra = [run["spectrum"] for run in runs if "spectrum" in run]
    if spectra:
        numbers |= {key: average(spectra, key, 1) for key in ("singular_above_0.1", "rank")}
    return numbers


def summarize(runs):
    """Return the flat numbers of all methods."""
    metrics = {}
    for (method, optimizer), by_tokens in sorted(groups(runs).items()):
        short, numbers, headline = by_tokens.get(GRID, []), {}, []
        grid = [run for run in short if run["config"]["seed"] == GRID_SEED]
        if grid:
            print(method, optimizer, end=" ")
            numbers, best = of_grid(grid)
            headline = [run for run in short if rates_of(run) == best]
        if HEADLINE in by_tokens:
            headline = with_most_seeds(by_tokens[HEADLINE])
        if headline:
            numbers = of_seeds(headline, HEADLINE if HEADLINE in by_tokens else GRID) | numbers
        for tokens in by_tokens.keys() - {GRID, HEADLINE}:
            longer = with_most_seeds(by_tokens[tokens])
            numbers |= {f"{tokens}m.wiki_ppl": average(longer, "val_ppl", 2),
                        f"{tokens}m.c4_ppl": average(longer, "c4_sample_ppl", 1)}
        metrics |= {f"{method}.{optimizer}.{key}": value for key, value in numbers.items()}
        for run in sum(by_tokens.values(), []):
            if "trainable_block_fraction" in run:
                metrics[f"{method}.trainable_block_fraction"] = run["trainable_block_fraction"]
    return metrics


def read_runs(path):
    """Return the runs of a file of JSON lines that ended; prints those that failed."""
    records = rates.read(path).values()
    for record in records:
        if "error" in record:
            print(f"{record['name']} failed: {record['error']}")
    return [record for record in records if "error" not in record]


if __name__ == "__main__":
    numbers = summarize(read_runs(FOLDER / "sweep.jsonl"))
    (FOLDER / "metrics.json").write_text(json.dumps(numbers, indent=1) + "\n")
