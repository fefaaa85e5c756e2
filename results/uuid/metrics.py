"""Write metrics.json: digits right of every method, from runs.jsonl and sweep.jsonl.

    python results/uuid/metrics.py

Prints the grids: a rate's first step with 99 % (10,000: none) and minus its digits at the end.
"""
import json
import runpy
import sys
from pathlib import Path
from statistics import mean

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))
import rates  # noqa: E402

SHOWN = (100, 300, 500, 700, 900)  # steps
# without a suffix: constant rates with AdamW, the first runs, and what was searched with Muon
SUFFIXES = {("uuid", "adamw"): "", ("falling", "muon"): "",
            ("uuid", "muon"): ".constant", ("falling", "adamw"): ".falling"}


def of_seeds(name, records, is_inside, plan):
    """Return the flat numbers of the runs of one rate, means over seeds. steps_to_99 is the slowest
    seed's, and is left out if one never gets there. A run that ended early keeps its last digits.
    """
    curves = [record["curve"] for record in records]
    final = [curve[-1][1] for curve in curves]
    firsts = [plan["steps_to_99"](curve) for curve in curves]
    last = max(curve[-1][0] for curve in curves)
    numbers = {f"{name}.accuracy_final": mean(final)}
    numbers |= rates.spread(f"{name}.accuracy_final", final)
    if all(firsts):
        numbers[f"{name}.steps_to_99"] = max(firsts)
    numbers |= {f"{name}.lr": records[0]["config"]["lr"], f"{name}.steps": last,
                f"{name}.parameters": records[0]["trainable_parameters"],
                f"{name}.seeds": len(records), f"{name}.bracketed": int(is_inside)}
    for at in SHOWN:
        if at <= last:
            numbers[f"{name}.accuracy_at_{at}"] = mean(
                plan["digits_at"](curve, at) for curve in curves)
    return numbers


def summarize(plan):
    """Return the flat numbers of all methods."""
    numbers = {}
    found = rates.report(plan["read"](), plan["GROUPS"], plan["score"])
    for (task, method, optimizer), seeds, is_inside in found:
        name = rates.name_in_metrics(method, optimizer) + SUFFIXES[task, optimizer]
        numbers |= of_seeds(name, seeds, is_inside, plan)
    return numbers


def main():
    metrics = summarize(runpy.run_path(str(FOLDER / "plan.py")))
    (FOLDER / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")


if __name__ == "__main__":
    main()
