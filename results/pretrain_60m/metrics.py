"""Write metrics.json from sweep.jsonl: what every method reaches with either optimizer.

    python results/pretrain_60m/metrics.py

METHOD.OPTIMIZER.wiki_ppl_mean and the numbers beside it are those of the runs of 66 M tokens as
soon as there is one, else those of the best rates of the grid, 33 M: tokens_m tells which. Without
a second seed there is no wiki_ppl_std. grid_ppl (the least of one seed), rates_tried and bracketed
are always the grid's. Longer runs have names of their own: METHOD.OPTIMIZER.131m.wiki_ppl, and so
has the model of equal_time.py: equal_time.METHOD.wiki_ppl. METHOD.trainable_block_fraction is of
the shape's eight blocks. frozen.muon.* repeats frozen.adamw.*: frozen blocks leave Muon no matrix.
Prints the grids, and for each best whether it lies inside its grid on both axes.
"""
import json
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path[:0] = map(str, (FOLDER, FOLDER.parent))
import equal_time  # noqa: E402
import pretraining  # noqa: E402

GRID, HEADLINE = 33, 66  # million tokens
BLOCKS = 8  # of the shape
NOT_OF_METHOD = ("steps", "matmul")  # options that are no part of a method


def method_of(run):
    """Return the method of a run, whose name is METHOD-OPTIMIZER-LR-REST_LR-sSEED and options.

    Older runs have options that no method of plan.py has: remora_permute with -restart_every50 is
    the method remora_permute.restart_every50.
    """
    method = run["name"].split("-")[0]
    _, _, options = run["name"].partition(f"-s{run['config']['seed']}")
    for option in options.split("-")[1:]:
        if not option.startswith(NOT_OF_METHOD):
            method += f".{option}"
    return method


def groups(runs):
    """Return {(method, "OPTIMIZER", or "OPTIMIZER.fp8"): {million tokens: [runs]}}. Only a grid has
    those that diverged, see pretraining.read_with_diverged."""
    result = {}
    for run in runs:
        config = run["config"]
        if "error" in run and pretraining.tokens_of(run) != GRID:
            continue
        optimizer = config["optimizer"]
        if config["matmul"] != "bf16":
            optimizer += f".{config['matmul']}"
        group = result.setdefault((method_of(run), optimizer), {})
        group.setdefault(pretraining.tokens_of(run), []).append(run)
    return result


def of_group(title, by_tokens):
    """Return the numbers of {million tokens: [runs]}; prints the grid after the title."""
    short, about, headline = by_tokens.get(GRID, []), {}, []
    best = pretraining.best_of(short)
    if best:
        print(title, end=" ")
        about = {"grid_ppl": round(best["val_ppl"], 4)} | pretraining.of_grid(best, short)
        headline = pretraining.at_rates_of(best, short)
    if HEADLINE in by_tokens:
        headline = pretraining.with_most_seeds(by_tokens[HEADLINE])
    numbers = pretraining.of_seeds(headline, "_mean") if headline else {}
    numbers |= about
    for tokens in by_tokens.keys() - {GRID, HEADLINE}:
        longer = pretraining.with_most_seeds(by_tokens[tokens])
        numbers |= {f"{tokens}m.wiki_ppl": pretraining.average(longer, "val_ppl", 2),
                    f"{tokens}m.c4_ppl": pretraining.average(longer, "c4_sample_ppl", 1)}
    return numbers


def summarize(runs):
    """Return the flat numbers of all methods."""
    metrics, by_group = {}, groups(runs)
    for (method, optimizer), by_tokens in sorted(by_group.items()):
        numbers = of_group(f"{method} {optimizer}", by_tokens)
        for own in ("adamw", "muon") if method == "frozen" else (optimizer,):
            metrics |= {f"{method}.{own}.{key}": value for key, value in numbers.items()}
        for seeds in by_tokens.values():
            for run in seeds:
                if "trainable_block_fraction" in run:
                    part = run["trainable_block_fraction"] * run["config"]["num_hidden_layers"]
                    metrics[f"{method}.trainable_block_fraction"] = round(part / BLOCKS, 4)
    return metrics | equal_time.numbers(by_group)


def main():
    numbers = summarize(pretraining.read_with_diverged(FOLDER / "sweep.jsonl"))
    (FOLDER / "metrics.json").write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
