"""Draw curves.png: validation loss of the runs of 66 M tokens against tokens and GPU seconds.

    python results/pretrain_60m/curves.py

Lines are means over seeds, bands reach from the lowest to the highest seed; the runs are those of
metrics.json.
"""
from metrics import FOLDER, HEADLINE, groups
from pictures import OPTIMIZERS, draw_curves
from pretraining import read_runs, with_most_seeds

PER_GPU = 3  # processes that shared a GPU, of runs that do not say how many
LABELS = {"full": "full rank", "best": "MoRA and LoRA (60m_best)",
          "remora_permute": "ReMoRA, permute", "lora": "LoRA", "mora_share": "MoRA, share",
          "remora_alternate": "ReMoRA, alternate", "relora": "ReLoRA"}

if __name__ == "__main__":
    runs = {}
    for (method, optimizer), by_tokens in groups(read_runs(FOLDER / "sweep.jsonl")).items():
        if HEADLINE in by_tokens and optimizer in OPTIMIZERS:
            runs[method, optimizer] = [{"per_gpu": PER_GPU} | run
                                       for run in with_most_seeds(by_tokens[HEADLINE])]
    if not runs:
        raise SystemExit("sweep.jsonl has no run of 66 M tokens yet: plan.py makes them")
    draw_curves(FOLDER / "curves.png", runs, LABELS, "r = 32")
