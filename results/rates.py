"""What sweeps of fine-tuning share: names of runs, the search for the best rate, its seeds.

A plan calls runs(); metrics.py calls report(). Both read sweep.jsonl beside them, so a plan gets
more runs while sweep.py adds lines there. Every method runs at its centre and at one rate beside
it, then at rates further out until the best one has worse rates on both sides. A grid closes after
three runs if the centre or the second rate is best. More seeds at the best rate follow.
A run's name is TASK-METHOD-OPTIMIZER-sSEED-RATE; rates are 1 or 3 times a power of ten.
"""
import contextlib
import json
import math
from statistics import stdev

SEEDS = (1337, 1338, 1339)
SEED = SEEDS[0]  # of the search for the best rate
MOST_RATES = 7
WORST = (math.inf,)  # score of a run that diverged; scores are tuples, the least is the best


def read(path):
    """Return the records of a file of JSON lines by run name, {} if the file does not exist."""
    if not path.exists():
        return {}
    *lines, last = path.read_text().split("\n")
    records = [json.loads(line) for line in lines]
    with contextlib.suppress(ValueError):  # empty, or another process is writing it
        records.append(json.loads(last))
    return {record["name"]: record for record in records}


def print_failures(records):
    """Print the error of each record that has one, and of its spectrum alone."""
    for record in records:
        for key, what in (("error", "failed"), ("spectrum_error", "has no spectrum")):
            if key in record:
                print(f"{record['name']} {what}: {record[key]}")


def spread(name, values):
    """Return {NAME_std: the standard deviation of a sample}, {} of a single value."""
    return {f"{name}_std": stdev(values)} if len(values) > 1 else {}


def name_of(group, seed, lr):
    """Return the name of a run; group: (task, method, optimizer)."""
    return "-".join((*group, f"s{seed}", f"{lr:g}"))


def parts_of(name):
    """Return ((task, method, optimizer), seed, rate) of a run's name."""
    task, method, optimizer, seed, lr = name.split("-", 4)
    return (task, method, optimizer), int(seed[1:]), float(lr)


def name_in_metrics(method, optimizer):
    """Return METHOD for AdamW, METHOD.muon for Muon."""
    return f"{method}.muon" if optimizer == "muon" else method


def operator_words(method):
    """Return the words of a method OPERATOR_GROUPS_rRANK, for example share_permute_r8."""
    operator, groups, rank = method.split("_")
    return ["mora_r8", f"--rank={rank[1:]}", f"--operator={operator}", f"--groups={groups}"]


def beside(lr, count):
    """Return the rate that is `count` places after lr on the grid 1, 3, 10, 30, ..."""
    exponent, is_three = divmod(round(2 * math.log10(lr)) + count, 2)
    return float(f"{3 if is_three else 1}e{exponent}")


def scores_of(records, group, score, seed=SEED):
    """Return {rate: score} of a group's runs with one seed. A run that failed for another reason
    than diverging has no score: remove its line, and it runs again."""
    scores = {}
    for name, record in records.items():
        run_group, run_seed, lr = parts_of(name)
        if run_group != group or run_seed != seed:
            continue
        if diverged(record):
            scores[lr] = WORST
        elif "error" not in record:
            scores[lr] = score(record)
    return scores


def diverged(record):
    """Return whether a run ended with the error of checkpoint.diverged."""
    return record.get("error", "").startswith("UserError: step ")


def best(scores):
    """Return (the rate with the least score or None, whether worse ones lie beside it on both
    sides: at most a place of the grid away, a factor of 3 to 3.4)."""
    if not scores or min(scores.values()) == WORST:
        return None, False
    rate = min(scores, key=scores.get)
    near = [lr for lr in scores if rate / 4 < lr < 4 * rate]
    return rate, min(near) < rate < max(near)


def rates_to_run(centre, scores, side):
    """Return rates in the order in which they should run, those with a score among them.

    side: where the second rate lies, -1 or 1. No third one is chosen before both have a score:
    if the second is better, the rate on the centre's other side is not needed.
    """
    wanted = [centre, beside(centre, side)]
    wanted += [lr for lr in scores if lr not in wanted]
    edge, is_inside = best(scores)
    if is_inside or len(wanted) >= MOST_RATES or any(lr not in scores for lr in wanted):
        return wanted
    if edge is None:  # all diverged
        edge = min(wanted)
    return wanted + [lr for lr in (beside(edge, -1), beside(edge, 1)) if lr not in wanted]


def halves(records, group, score):
    """Return the rates half way from a group's best rate to its neighbours on the grid 1, 3, 10,
    ..., once both of these are worse, else []."""
    scores = scores_of(records, group, score)
    lr, is_inside = best({lr: scores[lr] for lr in scores if lr == beside(lr, 0)})
    sides = (-1, 1) if is_inside else ()
    return [float(f"{math.sqrt(lr * beside(lr, side)):.2g}") for side in sides]


def half_way(groups, records, score, make):
    """Return {name: make(group, lr, seed)} of the halves of groups."""
    return {name_of(group, SEED, lr): make(group, lr, SEED)
            for group in groups for lr in halves(records, group, score)}


def runs(groups, records, score, make):
    """Return {name: make(group, lr, seed)}: the runs of a plan, the most informative first.

    groups: {(task, method, optimizer): rate in the middle}, the most important first. The second
    rate is a higher one with Muon, whose best rates were one to four times AdamW's (pretrain_60m).
    """
    wanted = []  # (stage, group, rate, seed)
    for group, centre in groups.items():
        if "_gradient_" in group[1]:  # the code no longer has these groups; their records count
            continue
        scores = scores_of(records, group, score)
        side = 1 if group[2] == "muon" else -1
        for stage, lr in enumerate(rates_to_run(centre, scores, side)):
            wanted.append((stage, group, lr, SEED))
        rate, is_inside = best(scores)
        if is_inside:
            for stage, seed in enumerate(SEEDS[1:], MOST_RATES):
                wanted.append((stage, group, rate, seed))
    wanted.sort(key=lambda run: run[0])  # a stable sort: within a stage the order of groups stays
    return {name_of(group, seed, lr): make(group, lr, seed) for _, group, lr, seed in wanted}


def ended(records, group, lr):
    """Return the records of a group's runs at one rate that ended, by seed."""
    found = [records.get(name_of(group, seed, lr)) for seed in SEEDS]
    return [record for record in found if record and "error" not in record]


def settled(records, group, score):
    """Return scores_of a group without rates half way that have not ended with all seeds: such a
    rate takes the place of a better known one only then."""
    scores = scores_of(records, group, score)
    return {lr: numbers for lr, numbers in scores.items()
            if lr == beside(lr, 0) or len(ended(records, group, lr)) == len(SEEDS)}


def report(records, groups, score):
    """Yield (group, records of its best rate by seed, whether that is inside); prints the grids."""
    print_failures(records.values())
    for group in groups:
        scores = scores_of(records, group, score)
        rate, is_inside = best(settled(records, group, score))
        if rate is None:
            continue
        print(*group, f"best {rate:g},", "inside its grid" if is_inside else "AT THE EDGE")
        for lr, numbers in sorted(scores.items()):
            print(f"    {lr:g}:", *(f"{number:.4f}" for number in numbers))
        yield group, ended(records, group, rate), is_inside
