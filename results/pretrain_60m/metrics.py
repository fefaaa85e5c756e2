"""Write metrics.json from sweep.jsonl: what every method reaches with either optimizer.

    python results/pretrain_60m/metrics.py

METHOD.OPTIMIZER.wiki_ppl_mean and the numbers beside it are those of the runs of 66 M tokens as
soon as there is one, else those of the best rates of the grid, 33 M: tokens_m tells which. Without
a second seed there is no wiki_ppl_std. grid_ppl (the least of one seed), rates_tried and bracketed
are always the grid's. Longer runs have names of their own: METHOD.OPTIMIZER.131m.wiki_ppl, and so
has the model of equal_time.py: equal_time.METHOD.wiki_ppl.
Prints the grids, and for each best whether it lies inside its grid on both axes.
"""
import json
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path[:0] = map(str, (FOLDER, FOLDER.parent))
import equal_time  # noqa: E402
import pretraining  # noqa: E402

GRID_SEED, GRID, HEADLINE = 1337, 33, 66  # of the grids, million tokens
OF_NO_METHOD = ("steps", "eval_every", "save_every", "matmul")


def method_of(run):
    """Return the method of a run, whose name is METHOD-OPTIMIZER-LR-REST_LR-sSEED and options.

    Options are what METHOD lacks in plan.py: lora and -rank80 are the method lora_r80, other
    restarts are remora_permute.restart_every50.
    """
    method = run["name"].split("-")[0]
    _, _, options = run["name"].partition(f"-s{run['config']['seed']}")
    for option in filter(None, options.split("-")):
        if option.startswith("rank"):
            method += "_" + option.replace("rank", "r")
        elif not option.startswith(OF_NO_METHOD):
            method += f".{option}"
    return method


def groups(runs):
    """Return {(method, "OPTIMIZER", or "OPTIMIZER.fp8"): {million tokens: [runs]}}."""
    result = {}
    for run in runs:
        config = run["config"]
        products = "" if config["matmul"] == "bf16" else f".{config['matmul']}"
        group = result.setdefault((method_of(run), config["optimizer"] + products), {})
        group.setdefault(pretraining.tokens_of(run), []).append(run)
    return result


def summarize(runs):
    """Return the flat numbers of all methods."""
    metrics = {}
    for (method, optimizer), by_tokens in sorted(groups(runs).items()):
        short, numbers, headline = by_tokens.get(GRID, []), {}, []
        grid = [run for run in short if run["config"]["seed"] == GRID_SEED]
        if grid:
            print(method, optimizer, end=" ")
            best, about = pretraining.of_grid(grid)
            numbers = {"grid_ppl": round(best["val_ppl"], 2), **about}
            headline = [run for run in short
                        if pretraining.rates_of(run) == pretraining.rates_of(best)]
        if HEADLINE in by_tokens:
            headline = pretraining.with_most_seeds(by_tokens[HEADLINE])
        if headline:
            numbers = pretraining.of_seeds(headline, "_mean") | numbers
        for tokens in by_tokens.keys() - {GRID, HEADLINE}:
            longer = pretraining.with_most_seeds(by_tokens[tokens])
            numbers |= {f"{tokens}m.wiki_ppl": pretraining.average(longer, "val_ppl", 2),
                        f"{tokens}m.c4_ppl": pretraining.average(longer, "c4_sample_ppl", 1)}
        metrics |= {f"{method}.{optimizer}.{key}": value for key, value in numbers.items()}
        for run in sum(by_tokens.values(), []):
            if "trainable_block_fraction" in run:
                metrics[f"{method}.trainable_block_fraction"] = run["trainable_block_fraction"]
    return metrics | equal_time.numbers(groups(runs))


if __name__ == "__main__":
    numbers = summarize(pretraining.read_runs(FOLDER / "sweep.jsonl"))
    (FOLDER / "metrics.json").write_text(json.dumps(numbers, indent=1) + "\n")
