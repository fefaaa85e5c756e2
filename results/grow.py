"""Run a plan that grows with its own runs (see rates.py) until its time is over or all is done.

    python results/grow.py results/gsm8k out/gsm8k 500 --gpus=2 --per_gpu=2

Runs of earlier starts are those of sweep.jsonl and scores.jsonl in the plan's folder, the first
argument; both are brought up to date there after each pass of sweep.py, whose options follow.
"""
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

FILES = {"runs.jsonl": "sweep.jsonl", "scores.jsonl": "scores.jsonl"}  # {in OUT: in the folder}


def copy(source, target):
    if source.exists():
        shutil.copy(source, target)


def main(folder, out, seconds, *options):
    folder, out, end, before = Path(folder), Path(out), time.time() + float(seconds), None
    out.mkdir(parents=True, exist_ok=True)
    for here, there in FILES.items():
        if not (out / here).exists():
            copy(folder / there, out / here)
    while True:
        for here, there in FILES.items():
            copy(out / here, folder / there)
        runs = out / "runs.jsonl"
        records = [*map(json.loads, runs.read_text().splitlines())] if runs.exists() else []
        left, longest = end - time.time(), max((r.get("seconds", 0) for r in records), default=0)
        if len(records) == before or left < longest:  # (a pass starts a run in any case)
            break
        before = len(records)
        subprocess.run([sys.executable, Path(__file__).parent / "sweep.py", folder / "plan.py", out,
                        f"--seconds={left}", *options])


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
