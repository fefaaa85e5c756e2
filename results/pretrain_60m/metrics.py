"""Write metrics.json from runs.jsonl: the best rates of every method and optimizer.

    python results/pretrain_60m/metrics.py

Prints the grids, and for each best whether it lies inside its grid on both axes.
"""
import json
import sys
from pathlib import Path
from statistics import mean

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))
from rates import spread  # noqa: E402

GRID_SEED, GRID_STEPS = 1337, 1000


def groups(records):
    """Return {(method, optimizer, matmul): [records]}.

    A run's name is method-optimizer-lr-rest_lr-seed, and then the options that the method lacks in
    plan.py: other restarts, say, which make it another method here. So do more tokens: full.66m.
    """
    result = {}
    for record in records:
        config, (method, *_, last) = record["config"], record["name"].split("-")
        if config["steps"] != GRID_STEPS:
            method = f"{method}.{config['steps'] * 32768 / 1e6:.0f}m"
        elif not last.startswith("s") and "matmul" not in last:
            method = f"{method}.{last}"
        key = (method, config["optimizer"], config["matmul"])
        result.setdefault(key, []).append(record)
    return result


def bracketed(grid, best):
    """Return whether the grid holds a lower and a higher value of each rate, the other fixed."""
    for key, other in (("lr", "rest_lr"), ("rest_lr", "lr")):
        line = [config[key] for config in grid if config[other] == best[other]]
        if not min(line) < best[key] < max(line):
            return False
    return True


def summarize(records):
    """Return the flat numbers of all methods in bf16."""
    numbers = {}
    for (method, optimizer, matmul), runs in sorted(groups(records).items()):
        grid = [run for run in runs if run["config"]["seed"] == GRID_SEED]
        best = min(grid, key=lambda run: run["val_ppl"])["config"]
        rates = (best["lr"], best["rest_lr"])
        seeds = [run for run in runs
                 if (run["config"]["lr"], run["config"]["rest_lr"]) == rates]
        perplexities = [run["val_ppl"] for run in seeds]
        inside = bracketed([run["config"] for run in grid], best)
        name = f"{method}.{optimizer}" + (f".{matmul}" if matmul != "bf16" else "")
        numbers |= {f"{name}.wiki_ppl_mean": round(mean(perplexities), 2),
                    f"{name}.wiki_ppl_std": round(spread(perplexities), 2),
                    f"{name}.c4_ppl_mean": round(mean(run["c4_sample_ppl"] for run in seeds), 1),
                    f"{name}.lr": rates[0], f"{name}.rest_lr": rates[1],
                    f"{name}.seeds": len(seeds), f"{name}.rates_tried": len(grid),
                    f"{name}.bracketed": int(inside)}
        print(name, "best", rates, "inside its grid" if inside else "at the edge of its grid")
        for run in sorted(grid, key=lambda run: run["val_ppl"]):
            config = run["config"]
            print(f"    lr {config['lr']:g}, rest_lr {config['rest_lr']:g}: {run['val_ppl']:.2f}")
    return numbers


if __name__ == "__main__":
    lines = (FOLDER / "runs.jsonl").read_text().splitlines()
    metrics = summarize([json.loads(line) for line in lines])
    (FOLDER / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
