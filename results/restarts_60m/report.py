"""From the files that run.py leaves in one or more folders: runs.jsonl, spectra.safetensors, metrics.json, table.md and two plots, here.

    python results/restarts_60m/report.py FOLDERS...
"""
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
import analyze

runs, spectra = [], {}
for folder in map(Path, sys.argv[1:]):
    runs += [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    spectra |= torch.load(folder / "spectra.pt")
(HERE / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
save_file({f"{label}/{kind}/{i}": values for label, kinds in spectra.items() for kind, layers in kinds.items() for i, values in enumerate(layers)},
          HERE / "spectra.safetensors")

metrics, best = {}, {}
rates = sorted({run["lr"] for run in runs})
table = ["| | " + " | ".join(f"lr {lr:g}" for lr in rates) + " | above 0.1 | rank | stable rank |", "|---" * (len(rates) + 4) + "|"]
for method in dict.fromkeys(run["method"] for run in runs):
    mine = {run["lr"]: run for run in runs if run["method"] == method}
    best[method] = min((run for run in mine.values() if run["ppl"]), key=lambda run: run["ppl"])
    measured = analyze.mean_measures(spectra[f"{method} {best[method]['lr']:g}"])
    metrics |= {f"{method}.ppl": best[method]["ppl"], f"{method}.lr": best[method]["lr"]} | {f"{method}.ppl_at_{lr:g}": run["ppl"] for lr, run in mine.items()}
    metrics |= {f"{method}.{key}": value for key, value in measured["all"].items()}
    metrics |= {f"{method}.{kind}.singular_above_0.1": row["singular_above_0.1"] for kind, row in measured.items() if kind != "all"}
    cells = [("**{:.1f}**" if run is best[method] else "{:.1f}").format(run["ppl"]) if (run := mine.get(lr)) else "-" for lr in rates]
    table.append(f"| {method} | {' | '.join(cells)} | {measured['all']['singular_above_0.1']:.0f} | {measured['all']['rank']:.0f} | {measured['all']['stable_rank']:.1f} |")
(HERE / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
(HERE / "table.md").write_text("\n".join(table) + "\n")
print("\n".join(table))
analyze.plot_spectra({method: spectra[f"{method} {run['lr']:g}"] for method, run in best.items()}, HERE / "spectra.png")
analyze.plot_losses({f"{method}, lr {run['lr']:g}": {"loss": run["loss"], "val_loss": []} for method, run in best.items()}, HERE / "losses.png")
