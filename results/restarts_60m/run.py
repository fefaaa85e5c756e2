"""LoRA, ReLoRA, MoRA and two ReMoRAs at several learning rates, same data order and steps: perplexities, logs and spectra.

    python results/restarts_60m/run.py OUT SECONDS [SKIP]

Runs what fits into SECONDS, in the order below, leaving out the first SKIP; writes OUT/runs.jsonl (a line a run: method, lr, perplexity, seconds, loss curve) and
OUT/spectra.pt ({"method lr": {kind: singular values of dW}}). Spectra are computed on the CPU while the next run trains.
"""
import gc
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
import analyze
import train
from config import UserError, load

METHODS = {
    "lora": ["--method=lora"],
    "relora": ["--method=lora", "--restart_every=200"],
    "mora": ["--method=mora"],
    "remora_alternate": ["--method=mora", "--groups=alternate", "--restart_every=200"],
    "remora_permute": ["--method=mora", "--groups=permute", "--restart_every=200"],
    "full": ["--method=full"],
}
RUNS = [(method, lr) for lr in (4e-3, 2e-3) for method in METHODS if method != "full"] + [("lora", 8e-3), ("relora", 8e-3)]
RUNS += [(method, 1e-3) for method in ("lora", "mora", "remora_permute", "remora_alternate", "relora")] + [("full", lr) for lr in (2e-3, 1e-3)]


def spectra(run, file):
    after, folder = analyze.weights(run)
    torch.save(analyze.spectra(after, analyze.first_weights(folder)), file)


def one(method, lr, out):
    """(record of the run, its folder): trained in this process."""
    folder = Path(tempfile.mkdtemp()) / f"{method}_{lr:g}"
    start, record = time.time(), {"method": method, "lr": lr}
    try:
        train.train(load([str(HERE / "config.py"), *METHODS[method], f"--lr={lr}", f"--out={folder}"], None))
    except UserError as error:
        record["stopped"] = str(error)
    curves = analyze.read_log(folder)
    record |= {"ppl": math.exp(curves["val_loss"][-1][1]) if "stopped" not in record else None, "seconds": time.time() - start, "loss": curves["loss"],
               "header": json.loads((folder / "log.jsonl").read_text().splitlines()[0])}
    with open(out / "runs.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    return record, folder


def collect(jobs, out, timeout):
    """Write the spectra that are there, or wait for them."""
    found = {}
    for label, file, folder, job in jobs:
        if timeout or job.poll() is not None:
            job.wait(timeout or 1)
            found[label] = torch.load(file)
            shutil.rmtree(folder, ignore_errors=True)
    torch.save(found, out / "spectra.pt")


def main(out, limit, skip):
    began, longest, jobs = time.time(), 0, []
    for method, lr in RUNS[skip:]:
        if time.time() - began + longest + 12 > limit:
            break
        record, folder = one(method, lr, out)
        collect(jobs, out, timeout=0)
        longest = max(longest, record["seconds"]) if not jobs else record["seconds"] + 5
        if "stopped" not in record:
            file = folder.with_suffix(".pt")
            jobs.append((f"{method} {lr:g}", file, folder, subprocess.Popen([sys.executable, __file__, "spectra", str(folder), str(file)],
                                                                              env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "6"})))
    collect(jobs, out, timeout=60)
    for line in (out / "runs.jsonl").read_text().splitlines():
        record = json.loads(line)
        print(f"{record['method']:18} lr {record['lr']:g}  ppl {record['ppl']}  {record['seconds']:.0f} s")


if __name__ == "__main__":
    if sys.argv[1] == "spectra":
        spectra(*sys.argv[2:])
    else:
        main(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
