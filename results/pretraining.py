"""Numbers of pretraining runs from the records of sweep.py, for metrics.py of several folders."""
import math
from statistics import mean, median, stdev

import grid
import rates

SCORES = {"wiki_ppl": ("val_ppl", 2), "c4_ppl": ("c4_sample_ppl", 1),
          "wiki_bits_per_byte": ("bits_per_byte", 4),
          "c4_bits_per_byte": ("c4_sample_bits_per_byte", 4)}  # {name: (key of a run, digits)}


def read_runs(path):
    """Return the runs of a file of JSON lines that ended; prints those that failed."""
    records = rates.read(path).values()
    rates.print_failures(records)
    return [record for record in records if "error" not in record]


def read_with_diverged(path):
    """Return read_runs, and with infinite perplexity the runs that diverged once they had begun."""
    return read_runs(path) + [record | {"val_ppl": math.inf} for record in rates.read(path).values()
                              if rates.diverged(record) and "config" in record]


def rates_of(run):
    """Return (lr, rest_lr)."""
    return run["config"]["lr"], run["config"]["rest_lr"]


def tokens_of(run):
    """Return the tokens of a run's training in millions."""
    config = run["config"]
    return round(config["steps"] * config["batch_size"] * config["seq_len"] / 1e6)


def average(runs, key, digits):
    """Return the rounded mean of a number of runs."""
    return round(mean(run[key] for run in runs), digits)


def with_most_seeds(runs):
    """Return the runs at one pair of rates: that with the most seeds, of these the best."""
    by_rates = {}
    for run in runs:
        by_rates.setdefault(rates_of(run), []).append(run)
    return max(by_rates.values(), key=lambda seeds: (len(seeds), -average(seeds, "val_ppl", 9)))


def best_of(runs):
    """Return the best run of a grid, None if none ended. Those of other seeds do not choose."""
    ended = [run for run in runs if run["config"]["seed"] == rates.SEED and "error" not in run]
    return min(ended, key=lambda run: run["val_ppl"], default=None)


def at_rates_of(best, runs):
    """Return the runs that ended at the rates of one of them."""
    return [run for run in runs if rates_of(run) == rates_of(best) and "error" not in run]


def bracketed(pairs, best, has_lr=True):
    """Return whether the (lr, rest_lr) pairs have all neighbours of the best one, see grid.py."""
    return all(grid.rates_at(best, step) in pairs for step in grid.neighbours((0, 0), has_lr))


def of_grid(best, runs):
    """Return the numbers about a grid, whose best_of is given; prints it. The perplexity of a run
    that diverged is infinite."""
    searched = [run for run in runs if run["config"]["seed"] == rates.SEED]
    pairs = {rates_of(run) for run in searched}
    is_inside = bracketed(pairs, rates_of(best), best["config"].get("method") != "frozen")
    print("best", rates_of(best), "inside its grid" if is_inside else "at the edge of its grid")
    for run in sorted(searched, key=lambda run: run["val_ppl"]):
        print("    lr {:g}, rest_lr {:g}:".format(*rates_of(run)), f"{run['val_ppl']:.2f}")
    return {"rates_tried": len(pairs), "bracketed": int(is_inside)}


def token_seconds(bench, name, every=0):
    """Return the seconds per token of SHAPE.METHOD in the numbers of bench.py, or None without it;
    every: steps between two restarts, 0 without them."""
    speed = bench.get(f"{name}.tokens_per_s")
    restart_ms = bench.get(f"{name}.restart_ms") if every else 0.0
    if not speed or restart_ms is None:  # bench.py --quick times no restarts
        return None
    seconds = 1 / speed
    if every:
        seconds += restart_ms / 1000 / every / bench[f"{name}.tokens_per_step"]
    return seconds


def of_seeds(runs, suffix=""):
    """Return the numbers of runs that differ in their seeds alone; suffix: of the names of scores.
    The speed is the slowest seed's, if all had the same card: others had fewer processes beside
    them."""
    first, seeds = runs[0], [run["config"]["seed"] for run in runs]
    for run in runs:
        for key, value in run["config"].items():
            if key not in ("seed", "out", "resume") and value != first["config"].get(key, value):
                raise ValueError(f"{run['name']} has {key} {value}, {first['name']} has "
                                 f"{first['config'][key]}, so that they have no mean")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{first['name']} and others have seeds {seeds}: one seed counts once")
    lr, rest_lr = rates_of(first)
    numbers = {}
    for name, (key, digits) in SCORES.items():
        numbers[name + suffix] = average(runs, key, digits)
    if len(runs) > 1:
        numbers["wiki_ppl_std"] = round(stdev(run["val_ppl"] for run in runs), 2)
    numbers |= {"lr": lr, "rest_lr": rest_lr, "seeds": len(runs), "tokens_m": tokens_of(runs[0])}
    if len({run.get("device") for run in runs}) == 1:
        numbers["tokens_per_s"] = round(min(run["tokens_per_s"] for run in runs))
    peaks = [run["peak_gib"] for run in runs if "peak_gib" in run]  # a resumed run has none
    if peaks:
        numbers["peak_gib"] = round(median(peaks), 2)
    spectra = [run["spectrum"] for run in runs if "spectrum" in run]
    if spectra:
        for key in ("singular_above_0.1", "rank"):
            numbers[key] = average(spectra, key, 1)
    return numbers
