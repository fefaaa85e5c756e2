"""Draw curves.png and spectra.png of the sweep's runs of 131 M tokens, those of metrics.json.

    python results/pretrain_250m/curves.py

curves.png: validation loss against tokens and GPU seconds. spectra.png, as Figure 5 of the paper:
how many singular values of a run's whole change dW are above 0.1, by kind of projection.
"""
import sys

from metrics import FOLDER, alone, by_length, long_runs, read_bench
from pictures import OPTIMIZERS, draw_curves
from pretraining import read_with_diverged

sys.path.append(str(FOLDER.parents[1]))
from docs.figures import draw_spectra  # noqa: E402

FROM = 500  # step; earlier losses would leave no room for the differences of later ones
LABELS = {"full": "full rank", "best": "pair of MoRA and LoRA", "lora": "LoRA",
          "mora_share": "MoRA, share", "remora_alternate": "ReMoRA, alternate"}


def drawn(run, benched):
    """Return a run with the speed that it has alone on a GPU, and without its first losses."""
    losses = [[step, loss] for step, loss in run["val_losses"] if step >= FROM]
    return run | benched | {"per_gpu": 1, "val_losses": losses}


def main():
    lengths = by_length(read_with_diverged(FOLDER / "sweep.jsonl"))
    runs, bench = {}, read_bench(FOLDER)
    for optimizer in OPTIMIZERS:
        for method in LABELS:
            seeds = long_runs(lengths, method, optimizer).get("")
            if seeds:
                benched = alone(bench, method, optimizer)
                if not benched:
                    raise SystemExit(f"bench.json lacks {method} with {optimizer}: see metrics.py")
                runs[method, optimizer] = [drawn(run, benched) for run in seeds]
    if not runs:
        raise SystemExit("sweep.jsonl has no run of 131 M tokens yet: plan.py makes them")
    draw_curves(FOLDER / "curves.png", runs, LABELS, "r = 128, FP8")
    spectra = {f"{LABELS[method]}, {OPTIMIZERS[optimizer]}": seeds[0]["spectra"]
               for (method, optimizer), seeds in runs.items() if "spectra" in seeds[0]}
    if spectra:
        draw_spectra(FOLDER / "spectra.png", spectra)


if __name__ == "__main__":
    main()
