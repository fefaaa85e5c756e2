"""From OUT/results.jsonl of run.py: metrics.json, table.md, runs.jsonl here.

    python results/gsm8k/report.py OUT
"""
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]
import runner

METHODS = ("base", "fft", "lora", "mora_rotate_r8", "mora_share_r256", *(f"operator_{name}" for name in ("truncate", "share", "decouple", "rotate")))

def main(out, here=HERE):
    found = list(runner.latest(runner.rows(out)).values())
    metrics, table = {}, ["| | lr: exact match | parameters trained | training loss |", "|---|---|---|---|"]
    for method in METHODS:
        mine = sorted((row for row in found if row["method"] == method and "numbers" in row), key=lambda row: row["lr"])
        best = max(mine, key=lambda row: row["numbers"], default=None)
        metrics |= {f"{method}.exact_match": best and best["numbers"], f"{method}.lr": best and best["lr"]}
        cells = ", ".join(("**{:g}: {:.1%}**" if row is best else "{:g}: {:.1%}").format(row["lr"], row["numbers"]) for row in mine)
        size, loss = (best or {}).get("trainable_parameters"), (best or {}).get("loss")
        table.append(f"| {method} | {cells or '-'} | {f'{size:,}' if size else '-'} | {f'{loss[-1][1]:.3f}' if loss else '-'} |")
    (here / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    (here / "table.md").write_text("\n".join(table) + "\n")
    (here / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    print("\n".join(table))


if __name__ == "__main__":
    main(sys.argv[1])
