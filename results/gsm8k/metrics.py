"""Write metrics.json: losses, exact match and paired tests, from the logs beside this file.

    python results/gsm8k/metrics.py

runs.jsonl is an earlier program's and has no answers. sweep.jsonl is plan.py's; a method that has
as many seeds there takes its numbers from there.
METHOD.above is of the rate above METHOD's, whose loss is higher.
A.vs.B.difference is A's exact match minus B's, a mean over seeds; low and high bound 95 % of a
bootstrap over questions; p is that of a sign-flip test of the questions (McNemar's null hypothesis,
for several seeds): the chance of so large a difference if A and B answered every question alike.
Both take the runs as given and do not measure how much seeds differ.
"""
import json
import math
import runpy
import sys
from pathlib import Path
from statistics import mean

import numpy as np

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))
import rates  # noqa: E402

DRAWS = 20_000
PAIRS = [("mora_rotate_r8", "lora"), ("mora_share_r256", "lora"), ("mora_share_r256", "fft"),
         ("mora_rotate_r8", "fft"), ("mora_rotate_r8.muon", "lora.muon"),
         ("mora_share_r256.muon", "fft.muon"), ("mora_share_r256.muon", "mora_rotate_r8.muon"),
         ("truncate_gradient_r8", "lora"), ("truncate_gradient_r8", "mora_rotate_r8"),
         ("share_gradient_r8", "mora_rotate_r8"), ("mora_rotate_r8.muon", "mora_rotate_r8"),
         ("lora.muon", "lora"), ("mora_share_r256.muon", "mora_share_r256"), ("fft.muon", "fft"),
         *((f"{method}.muon.above", f"{method}.above")
           for method in ("lora", "mora_rotate_r8", "mora_share_r256", "fft"))]


def earlier(path):
    """Return the flat numbers of runs.jsonl: of each method the seeds at its best rate."""
    methods, numbers = {}, {}
    for record in map(json.loads, path.read_text().splitlines()):
        methods.setdefault(record["method"], []).append(record)
    for method, records in methods.items():
        searched = [record for record in records if record["seed"] == rates.SEED]
        best = min(searched, key=lambda record: record["dev_loss"])
        seeds = [record for record in records if record["lr"] == best["lr"]]
        losses = [record["test_loss"] for record in seeds]
        numbers |= {f"{method}.exact_match": mean(record["numbers"] for record in seeds),
                    f"{method}.seeds": len(seeds), f"{method}.lr": best["lr"],
                    f"{method}.test_loss": mean(losses), f"{method}.dev_loss": best["dev_loss"]}
        numbers |= rates.spread(f"{method}.test_loss", losses)
        if "trainable_parameters" in best:
            numbers[f"{method}.parameters"] = best["trainable_parameters"]
    del numbers["base.lr"]  # the untrained model has no rate
    return numbers


def of_seeds(name, records):
    """Return the flat numbers of the runs of one rate; the first run is that of the search."""
    losses = [record["val_loss"] for record in records]
    numbers = {f"{name}.test_loss": mean(losses),
               f"{name}.dev_loss": math.log(records[0]["gsm8k_dev_ppl"]),
               f"{name}.seeds": len(records), f"{name}.lr": records[0]["config"]["lr"],
               f"{name}.parameters": records[0]["trainable_parameters"]}
    numbers |= rates.spread(f"{name}.test_loss", losses)
    if all("numbers" in record for record in records):
        shares = [record["numbers"] for record in records]
        numbers[f"{name}.exact_match"] = mean(shares)
        numbers |= rates.spread(f"{name}.exact_match", shares)
    return numbers


def right_answers(records):
    """Return, for each question, the share of the runs that answered it right, an array."""
    return np.mean([[int(digit) for digit in record["right"]] for record in records], axis=0)


def paired(a, b, generator):
    """Return the numbers of A.vs.B; a, b: for each question the share of right runs."""
    difference = a - b
    observed, moved = difference.mean(), difference[difference != 0]
    means, flips = [], []
    for _ in range(DRAWS // 1000):  # in parts, for less memory
        drawn = generator.integers(len(difference), size=(1000, len(difference)))
        means.append(difference[drawn].mean(axis=1))
        signs = generator.integers(2, size=(1000, len(moved))) * 2 - 1
        flips.append(signs @ moved / len(difference))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    as_large = (np.abs(np.concatenate(flips)) >= abs(observed) - 1e-12).sum()
    return {"difference": observed, "low": low, "high": high, "p": (as_large + 1) / (DRAWS + 1)}


def methods_of(records, plan):
    """Return {name in metrics.json: (records by seed, whether its rate is inside its grid)}."""
    rows = [(group, rates.ended(records, group, lr), True) for group, lr in plan["BASES"].items()]
    rows += rates.report(records, plan["SEARCHED"], plan["score"])
    methods = {}
    for (task, method, optimizer), seeds, is_inside in rows:
        name = rates.name_in_metrics(method, optimizer)
        if task != "gsm8k":  # a base of another type
            name += f".{task}"
        if seeds:
            methods[name] = seeds, is_inside
    for group, lr in plan["ABOVE"].items():
        seeds = rates.ended(records, group, lr)
        if seeds:
            methods[f"{rates.name_in_metrics(*group[1:])}.above"] = seeds, False
    return methods


def compare(methods):
    """Return the flat numbers of PAIRS, as far as all runs of both methods have answers; methods:
    {name in metrics.json: records by seed}."""
    numbers, generator = {}, np.random.default_rng(0)
    answered = {name: seeds for name, seeds in methods.items()
                if all("right" in record for record in seeds)}
    for first, second in PAIRS:
        if first not in answered or second not in answered:
            continue
        result = paired(right_answers(answered[first]), right_answers(answered[second]), generator)
        for key, value in result.items():
            numbers[f"{first}.vs.{second}.{key}"] = round(float(value), 6)
        print(first, "vs", second, *(f"{key} {value:.4f}" for key, value in result.items()))
    return numbers


def summarize(plan):
    """Return the flat numbers of both files."""
    numbers, records = earlier(FOLDER / "runs.jsonl"), rates.read(FOLDER / "sweep.jsonl")
    base = records.pop(plan["BASE"], None)
    compared = {}
    for name, (seeds, is_inside) in methods_of(records, plan).items():
        if len(seeds) < numbers.get(f"{name}.seeds", 0):
            continue  # the search is not over: the earlier program's numbers stay
        published = numbers.get(f"{name.removesuffix('.above')}.lr")
        if name.endswith(".above") and seeds[0]["config"]["lr"] != rates.beside(published, 1):
            continue  # nor is the rate above known
        numbers = {key: value for key, value in numbers.items() if key.rpartition(".")[0] != name}
        numbers |= of_seeds(name, seeds) | {f"{name}.bracketed": int(is_inside)}
        compared[name] = seeds
    if base and "error" in base:
        rates.print_failures([base])
    elif base:
        numbers |= {"base.exact_match": base["numbers"], "base.test_loss": base["val_loss"],
                    "base.dev_loss": math.log(base["gsm8k_dev_ppl"])}
    return numbers | compare(compared)


def main():
    metrics = summarize(runpy.run_path(str(FOLDER / "plan.py")))
    (FOLDER / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")


if __name__ == "__main__":
    main()
