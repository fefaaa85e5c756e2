"""Write metrics.json: validation perplexities of the tiny probe, and at 60m of wiki and c4.

    python results/close_gap/metrics.py
"""
import json
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))
import rates  # noqa: E402


def flat(name):
    return name.replace(" ", ".")


def summarize(tiny, runs):
    numbers = {flat(name): round(run["val_ppl"], 4) for name, run in tiny.items()}
    for name, run in runs.items():
        numbers |= {f"60m.{flat(name)}.wiki_ppl": round(run["val_ppl"], 2),
                    f"60m.{flat(name)}.c4_ppl": round(run["c4_sample_ppl"], 1)}
    return numbers


if __name__ == "__main__":
    tiny, runs = (rates.read(folder / "sweep.jsonl") for folder in (FOLDER / "tiny", FOLDER))
    numbers = summarize(tiny, runs)
    (FOLDER / "metrics.json").write_text(json.dumps(numbers, indent=1) + "\n")
