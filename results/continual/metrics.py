"""Write metrics.json from sweep.jsonl: bits per byte at the best rate of every method.

    python results/continual/metrics.py

Prints the grids. Means are over the seeds at the best rate; `seeds` says how many there are.
"""
import json
import runpy
import sys
from pathlib import Path
from statistics import mean

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))
import rates  # noqa: E402


def summarize(records, plan):
    """Return the flat numbers of each domain's data, of the untrained model and every method."""
    numbers = {}
    for domain, setting in plan["DOMAINS"].items():
        tokens = setting["steps"] * setting["batch_size"] * plan["SEQ_LEN"]
        numbers |= {f"{domain}.tokens": setting["tokens"], f"{domain}.tokens_trained": tokens}
        base = records.get(f"{domain}-base")
        if base and "error" not in base:
            numbers |= {f"{domain}.base.bits_per_byte": base["bits_per_byte"],
                        f"{domain}.base.wiki_bits_per_byte": base["wiki_val_bits_per_byte"],
                        f"{domain}.base.lr": 0.0}
        elif base:
            rates.print_failures([base])
    for group, seeds, is_inside in rates.report(plan["RECORDS"], plan["GROUPS"], plan["score"]):
        domain, method, optimizer = group
        name = f"{domain}.{rates.name_in_metrics(method, optimizer)}"
        learned = [record["bits_per_byte"] for record in seeds]
        numbers |= {f"{name}.bits_per_byte": mean(learned),
                    f"{name}.wiki_bits_per_byte": mean(record["wiki_val_bits_per_byte"]
                                                       for record in seeds),
                    f"{name}.lr": seeds[0]["config"]["lr"], f"{name}.bracketed": int(is_inside),
                    f"{name}.seeds": len(seeds),
                    f"{name}.parameters": seeds[0]["trainable_parameters"]}
        numbers |= rates.spread(f"{name}.bits_per_byte", learned)
    return numbers


def main():
    plan = runpy.run_path(str(FOLDER / "plan.py"))
    metrics = summarize(rates.read(FOLDER / "sweep.jsonl"), plan)
    (FOLDER / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")


if __name__ == "__main__":
    main()
