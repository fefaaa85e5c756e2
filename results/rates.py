"""What sweeps of fine-tuning share: names of runs, rates tried until the best is inside, its seeds.

A plan calls runs(); metrics.py calls report(). Both read sweep.jsonl beside them, so a plan gets
more runs while sweep.py adds lines there. First every method runs at its centre and at one rate
beside it, then at what the best of these lacks: worse ones on both sides. So a grid closes after
three runs if the centre or the second rate is best. More seeds at the best rate follow.
A run's name is TASK-METHOD-OPTIMIZER-sSEED-RATE; rates are 1 or 3 times a power of ten.
"""
import contextlib
import json
import math
from statistics import stdev

SEED, MORE_SEEDS = 1337, (1338, 1339)
MOST_RATES = 7
WORST = (math.inf,)  # score of a run that diverged; those of others are tuples too, less is better


def read(path):
    """Return the records of a file of JSON lines by run name, {} if the file does not exist."""
    *lines, last = path.read_text().split("\n") if path.exists() else [""]
    with contextlib.suppress(ValueError):  # another process may be writing the last one
        lines += [last] if last and json.loads(last) else []
    return {record["name"]: record for record in map(json.loads, lines)}


def spread(values):
    """Return the standard deviation of a sample, 0 of a single value."""
    return stdev(values) if len(values) > 1 else 0.0


def name_of(group, seed, lr):
    """Return the name of a run; group: (task, method, optimizer)."""
    return "-".join((*group, f"s{seed}", f"{lr:g}"))


def parts_of(name):
    """Return ((task, method, optimizer), seed, rate) of a run's name."""
    task, method, optimizer, seed, lr = name.split("-", 4)
    return (task, method, optimizer), int(seed[1:]), float(lr)


def operator_words(method):
    """Return a variant and keys of a method OPERATOR_GROUPS_rRANK, as truncate_gradient_r8."""
    operator, groups, rank = method.split("_")
    return ["mora_r8", f"--rank={rank[1:]}", f"--operator={operator}", f"--groups={groups}"]


def beside(lr, count):
    """Return the rate that is `count` places after lr on the grid 1, 3, 10, 30, ..."""
    exponent, is_three = divmod(round(2 * math.log10(lr)) + count, 2)
    return float(f"{3 if is_three else 1}e{exponent}")


def scores_of(records, group, score, seed=SEED):
    """Return {rate: score} of a group's runs with one seed. A run that failed otherwise than by
    diverging (see checkpoint.diverged) has no score: remove its line, and it runs again."""
    found = {}
    for name, record in records.items():
        own, own_seed, lr = parts_of(name)
        if own == group and own_seed == seed and (diverged(record) or "error" not in record):
            found[lr] = WORST if diverged(record) else score(record)
    return found


def diverged(record):
    return record.get("error", "").startswith("UserError: step ")


def best(scores):
    """Return (the rate with the least score or None, whether worse ones lie on both sides)."""
    if not scores or min(scores.values()) == WORST:
        return None, False
    rate = min(scores, key=scores.get)
    return rate, min(scores) < rate < max(scores)


def rates_to_run(centre, scores, side):
    """Return rates in the order in which they should run, those with a score among them.

    side: where the second rate lies, -1 or 1. No third one is chosen before both have a score:
    if the second is better, the rate on the centre's other side is not needed.
    """
    rates = [centre, beside(centre, side)]
    rates += [lr for lr in scores if lr not in rates]
    rate, is_inside = best(scores)
    if set(rates) <= set(scores) and not is_inside and len(rates) < MOST_RATES:
        rate = rate or min(rates)  # where all diverged, lower
        rates.append(beside(rate, 1 if rate == max(rates) else -1))
    return rates


def runs(groups, records, score, make):
    """Return {name: make(group, lr, seed)}: the runs of a plan, the most informative first.

    groups: {(task, method, optimizer): rate in the middle}, the most important first. The second
    rate is a higher one with Muon, whose best rates were AdamW's or twice those (pretrain_60m).
    """
    stages = {}
    for group, centre in groups.items():
        scores = scores_of(records, group, score)
        rate, is_inside = best(scores)
        tried = rates_to_run(centre, scores, 1 if group[2] == "muon" else -1)
        wanted = [(i, lr, SEED) for i, lr in enumerate(tried)]
        wanted += [(MOST_RATES + i, rate, seed) for i, seed in enumerate(MORE_SEEDS) if is_inside]
        for stage, lr, seed in wanted:
            stages.setdefault(stage, {})[name_of(group, seed, lr)] = make(group, lr, seed)
    return {name: run for stage in sorted(stages) for name, run in stages[stage].items()}


def report(records, groups, score):
    """Yield (group, records of its best rate by seed, whether that is inside); prints the grids."""
    for name, record in records.items():
        if "error" in record:
            print(f"{name} failed: {record['error']}")
    for group in groups:
        scores = scores_of(records, group, score)
        rate, is_inside = best(scores)
        if rate is None:
            continue
        print(*group, f"best {rate:g},", "inside its grid" if is_inside else "AT THE EDGE")
        for lr, value in sorted(scores.items()):
            print(f"    {lr:g}:", *(f"{number:.4f}" for number in value))
        names = (name_of(group, seed, rate) for seed in (SEED, *MORE_SEEDS))
        yield group, [records[name] for name in names
                      if name in records and "error" not in records[name]], is_inside
