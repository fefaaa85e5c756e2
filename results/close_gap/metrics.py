"""Write metrics.json: validation perplexities of the tiny probe, and at 60m of wiki and c4.

    python results/close_gap/metrics.py
"""
import json
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))
from pretraining import read_runs  # noqa: E402


def main():
    numbers = {}
    for run in read_runs(FOLDER / "tiny" / "sweep.jsonl"):
        numbers[run["name"].replace(" ", ".")] = round(run["val_ppl"], 4)
    for run in read_runs(FOLDER / "sweep.jsonl"):
        key = f"60m.{run['name'].replace(' ', '.')}"
        numbers |= {f"{key}.wiki_ppl": round(run["val_ppl"], 2),
                    f"{key}.c4_ppl": round(run["c4_sample_ppl"], 1)}
    (FOLDER / "metrics.json").write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
