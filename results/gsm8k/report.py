"""From OUT/results.jsonl of run.py: metrics.json, table.md. runs.jsonl here is the results.jsonl of the published runs.

    python results/gsm8k/report.py OUT
"""
import json
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]
import runner

METHODS = ("base", "fft", "lora", "mora_rotate_r8", "mora_share_r256", *(f"operator_{name}" for name in ("truncate", "share", "decouple", "rotate")))


def main(out, here=HERE):
    found = list(runner.latest(runner.rows(out)).values())
    metrics = {}
    table = ["| | parameters trained | lr: loss of the dev set | test: exact match, seed by seed | mean | loss |", "|---|---|---|---|---|---|"]
    for method in METHODS:
        mine = [row for row in found if row["method"] == method and "dev_loss" in row]
        searched = sorted((row for row in mine if row["seed"] == runner.SEED), key=lambda row: row["lr"])
        best = min(searched, key=lambda row: row["dev_loss"], default={})
        chosen = [row for row in mine if row["lr"] == best.get("lr") and "numbers" in row]
        mean = lambda key: statistics.mean(row[key] for row in chosen) if chosen else None
        metrics |= {f"{method}.exact_match": mean("numbers"), f"{method}.seeds": len(chosen), f"{method}.lr": best.get("lr"),
                    f"{method}.test_loss": mean("test_loss"), f"{method}.dev_loss": best.get("dev_loss")}
        rates = ", ".join(("**{:g}: {:.4f}**" if row is best else "{:g}: {:.4f}").format(row["lr"], row["dev_loss"]) for row in searched)
        seeds = ", ".join(f"{row['numbers']:.2%}" for row in sorted(chosen, key=lambda row: row["seed"]))
        table.append(f"| {method} | {best.get('trainable_parameters', 0):,} | {rates} | {seeds} | "
                     + (f"{mean('numbers'):.2%} | {mean('test_loss'):.4f} |" if chosen else "- | - |"))
    (here / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    (here / "table.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main(sys.argv[1])
