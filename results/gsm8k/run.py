"""GSM8K with a 135M model: every method, a search of rates, exact match on the test set.

    python results/gsm8k/run.py all OUT MODEL [SECONDS] [AT_ONCE]      every run of RUNS, AT_ONCE on each GPU, and OUT/results.jsonl
    python results/gsm8k/run.py one OUT MODEL METHOD RATE              one of them, in this process

MODEL: a Hugging Face directory; data/gsm8k: `python data.py sft gsm8k train.jsonl --val test.jsonl --tokenizer=MODEL --seq_len=576`.
No run starts when SECONDS are over, and none is waited for longer.
"""
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
METHODS = {
    "base": [],
    "fft": ["--method=full"],
    "lora": ["--method=lora", "--rank=8", "--alpha=16"],
    "mora_rotate_r8": ["--method=mora", "--rank=8", "--operator=rotate"],
    "mora_share_r256": ["--method=mora", "--rank=256", "--operator=share"],
    **{f"operator_{name}": ["--method=mora", "--rank=32", f"--operator={name}"] for name in ("truncate", "share", "decouple", "rotate")},
}
RUNS = [("base", 0), ("fft", 2e-5), ("lora", 2e-4), ("mora_rotate_r8", 3e-4), ("mora_share_r256", 5e-5),
        ("operator_truncate", 3e-4), ("operator_share", 3e-4), ("operator_decouple", 3e-4), ("operator_rotate", 3e-4),
        ("fft", 1e-4), ("lora", 1e-3), ("mora_rotate_r8", 1.2e-3), ("mora_share_r256", 2e-4),
        ("operator_truncate", 1.2e-3), ("operator_share", 1.2e-3), ("operator_decouple", 1.2e-3), ("operator_rotate", 1.2e-3)]


def one(out, model, method, rate, limit=0):
    """Train and score one run; adds a line to OUT/results.jsonl."""
    import checkpoint
    import config
    import evaluate
    import mora
    from samples import open_split
    from train import train

    device, folder, started = "cuda" if torch.cuda.is_available() else "cpu", f"{out}/{method}_{rate:g}", time.time()
    row = {"method": method, "lr": rate}
    if method != "base":
        rest = [] if method == "fft" else ["--train_rest=false"]
        options = [f"--init_from={model}", f"--out={folder}", f"--lr={rate}", "--compile=off", "--micro_batch=64", "--eval_every=1000000",
                   "--save_every=1000000"]
        cfg = config.load([str(ROOT / "configs/gsm8k.py"), *METHODS[method], *rest, *options, *os.environ.get("MORE", "").split()], "")
        train(cfg)
        log = [json.loads(line) for line in open(f"{folder}/log.jsonl")]
        row |= {"val_loss": [line["val_loss"] for line in log if "val_loss" in line], "train_seconds": time.time() - started,
                "trainable_parameters": log[0]["trainable_parameters"], "config": dataclasses.asdict(cfg)}
    model, tok, _ = checkpoint.load(folder if method != "base" else model)
    model = mora.merge(model) if mora.adapted_layers(model) else model
    model.compute_dtype = torch.bfloat16 if device == "cuda" else torch.float32
    started = time.time()
    row |= evaluate.answers(model.to(device), tok, open_split("data/gsm8k", "val", verify=False), 512, limit)
    row["answer_seconds"] = time.time() - started
    with open(f"{out}/results.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def all_of(out, model, seconds, at_once):
    """The runs of RUNS in order, AT_ONCE on each GPU."""
    Path(out).mkdir(parents=True, exist_ok=True)
    places = [gpu for gpu in range(max(1, torch.cuda.device_count())) for _ in range(at_once)]
    started, waiting, running = time.time(), list(RUNS), {}
    while waiting or running:
        for place in range(len(places)):
            if place in running and running[place].poll() is not None:
                del running[place]
            if place not in running and waiting and time.time() - started < seconds:
                method, rate = waiting.pop(0)
                command = [sys.executable, __file__, "one", out, model, method, str(rate)]
                environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(places[place]), "OMP_NUM_THREADS": "3"}
                running[place] = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.STDOUT,
                                                  stdout=open(f"{out}/{method}_{rate:g}.txt", "w"))
        if time.time() - started > seconds:
            waiting.clear()
            for process in running.values():
                process.kill()
        time.sleep(0.2)


if __name__ == "__main__":
    if sys.argv[1] == "all":
        all_of(sys.argv[2], sys.argv[3], float(sys.argv[4]) if len(sys.argv) > 4 else 1e9, int(sys.argv[5]) if len(sys.argv) > 5 else 1)
    else:
        one(*sys.argv[2:5], float(sys.argv[5]), int(os.environ.get("LIMIT", 0)))
