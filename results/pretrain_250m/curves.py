"""Draw curves.png and spectra.png of the sweep's runs of 131 M tokens, those of metrics.json.

    python results/pretrain_250m/curves.py

curves.png, as Figure 4 of the paper: validation loss against tokens and GPU seconds. Runs at other
rates than the short runs chose have these in their labels; the older logs, of another card, are
drawn against tokens only. spectra.png, as Figure 5: how many singular values of a run's dW
are above 0.1, by kind of projection, at the rates of the short runs.
"""
import itertools
import json
import sys

from metrics import FOLDER, alone, by_length, long_runs, of_run, read_bench
from pictures import OPTIMIZERS, draw_curves
from pretraining import rates_of, read_with_diverged

sys.path.append(str(FOLDER.parents[1]))
from docs.figures import draw_spectra  # noqa: E402

FROM = 500  # step; earlier losses would leave no room for the differences of later ones
LABELS = {"full": "full rank", "best": "pair of MoRA and LoRA", "lora": "LoRA",
          "mora_share": "MoRA, share", "remora_alternate": "ReMoRA, alternate"}
BENCH_CARD = "NVIDIA H200"  # of bench.json, see bench.txt
SOLID, DASHED, DOTTED = ".-", ".--", ".:"  # the short runs' rates, other rates, the older logs
OLDER = {("full", "muon"): "full_fp8", ("mora_share", "muon"): "mora_fp8"}  # their logs


def late(losses):
    """Return [[step, loss]] from step FROM on, of pairs from step 0 on."""
    return [[step, loss] for step, loss in losses if step >= FROM]


def drawn(run, benched):
    """Return a run with the speed that it has alone on a GPU, and without its first losses."""
    return run | benched | {"device": BENCH_CARD, "per_gpu": 1,
                            "val_losses": late(run["val_losses"])}


def read_older(stem):
    """Return an older log as a run of the sweep; its card is not BENCH_CARD, so that draw_curves
    draws it against tokens only."""
    path = FOLDER / f"{stem}.jsonl"
    head = json.loads(path.read_text().splitlines()[0])
    _, config, losses, _ = of_run(path)
    return {"config": config, "device": head["device"], "val_losses": late(losses.items())}


def read_runs():
    """Return {(label, optimizer): [runs by seed]} of the long runs; see drawn."""
    lengths, bench = by_length(read_with_diverged(FOLDER / "sweep.jsonl")), read_bench(FOLDER)
    runs = {}
    for optimizer, (method, label) in itertools.product(OPTIMIZERS, LABELS.items()):
        benched = alone(bench, method, optimizer)
        for prefix, seeds in sorted(long_runs(lengths, method, optimizer).items()):
            if not benched:
                raise SystemExit(f"bench.json lacks {method} with {optimizer}: see metrics.py")
            rates = ", {:g} and {:g}".format(*rates_of(seeds[0])) if prefix else ""
            runs[f"{label}{rates}", optimizer] = [drawn(run, benched) for run in seeds]
        if (method, optimizer) in OLDER:
            run = read_older(OLDER[method, optimizer])
            rates = "{:g} and {:g}".format(*rates_of(run))
            runs[f"{label}, older, {rates}", optimizer] = [run]
    return runs


def look(label):
    """Return (the method's color, the line of its rates) of a label of read_runs."""
    names = [*LABELS.values()]
    name = next(name for name in names if label.startswith(name))
    rates = label.removeprefix(name)
    line = DASHED if rates else SOLID
    return f"C{names.index(name)}", DOTTED if "older" in rates else line


def main():
    runs = read_runs()
    labels = {label: label for label, _ in runs}
    draw_curves(FOLDER / "curves.png", runs, labels, "r = 128, FP8",
                {label: look(label) for label in labels})
    spectra = {f"{label}, {OPTIMIZERS[optimizer]}": seeds[0]["spectra"]
               for (label, optimizer), seeds in runs.items() if label in LABELS.values()}
    draw_spectra(FOLDER / "spectra.png", spectra)


if __name__ == "__main__":
    main()
