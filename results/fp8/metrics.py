"""Write metrics.json from the logs beside this file and the records of other folders' runs.

    python results/fp8/metrics.py

SHAPE.METHOD.over_full: tokens per second over those of full rank in bf16 of the same file; so
peak_over_full. 65k_rRANK: the 1.3b shape, 65,536 tokens per step, over full rank of
bench_65k_r128.json. loss_difference: FP8 minus bf16, nats per token of the validation split.
Deviations are those of a sample.
"""
import json
import re
import sys
from pathlib import Path
from statistics import mean, stdev

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER.parent
sys.path.insert(0, str(RESULTS))
import rates  # noqa: E402

BASES = {"float32": "gsm8k", "bfloat16": "bfloat16", "float8": "float8"}  # {base: task in a name}
BASES_LR = 1e-2  # of these runs; results/gsm8k has more rates on the float32 base


def read_table(file, shape):
    """Return {(method, "tokens_per_s" or "peak_gib"): number} of a shape in bench.py's output."""
    numbers, current = {}, ""
    for line in file.read_text().splitlines():
        words = line.replace(",", "").split()
        if ", 1 x " in line:  # the line above the rows of a shape
            current = words[0]
        elif current == shape and words[1].isdigit():
            numbers |= {(words[0], "tokens_per_s"): int(words[1]),
                        (words[0], "peak_gib"): float(words[4])}
    return numbers


def of_shape(shape, file):
    """Return the flat numbers of a table and each method's ratio to full rank in bf16."""
    table, numbers = read_table(file, shape), {}
    for (method, key), value in table.items():
        ratio = "over_full" if key == "tokens_per_s" else "peak_over_full"
        numbers |= {f"{shape}.{method}.{key}": value,
                    f"{shape}.{method}.{ratio}": round(value / table["full", key], 4)}
    for method, other in (("mora_fp8", "full_fp8"), ("remora_permute_fp8", "mora_fp8")):
        ratio = table[method, "tokens_per_s"] / table[other, "tokens_per_s"]
        numbers[f"{shape}.{method}.over_{other}"] = round(ratio, 3)
    return numbers


def of_65k():
    """Return the flat numbers of steps of 65,536 tokens with Muon, at 10 and 25 % of the blocks."""
    benches = {name: json.loads((FOLDER / f"bench_65k_{name}.json").read_text())
               for name in ("r128", "r320")}
    full, numbers = benches["r128"]["1.3b.full_muon.tokens_per_s"], {}
    for name, bench in benches.items():
        for key, value in bench.items():
            _, method, kind = key.rsplit(".", 2)
            if kind in ("peak_gib", "restart_ms"):
                numbers[f"65k_{name}.{method}.{kind}"] = round(value, 2)
            elif kind == "tokens_per_s":
                numbers |= {f"65k_{name}.{method}.tokens_per_s": round(value),
                            f"65k_{name}.{method}.over_full": round(value / full, 4)}
    return numbers


def of_7b():
    """Return the flat numbers of the rows of 7b in where_first.txt."""
    rows = re.findall(r"^7b (\S+) (.*?): ([\d,]+) tokens/s, .*?, ([\d.]+) GiB",
                      (FOLDER / "where_first.txt").read_text(), re.MULTILINE)
    numbers, speeds = {}, {}
    for method, changes, speed, peak in rows:
        if method == "mora_fp8" and "float32" not in changes:
            method = "mora_fp8_base"  # its name since that run
        speeds[method] = int(speed.replace(",", ""))
        numbers |= {f"7b.{method}.tokens_per_s": speeds[method],
                    f"7b.{method}.peak_gib": float(peak)}
    return numbers | {f"7b.{name}.over_mora": round(speed / speeds["mora"], 3)
                      for name, speed in speeds.items()}


def of_60m():
    """Return the flat numbers of three seeds with and without FP8."""
    records, numbers = rates.read(RESULTS / "pretrain_60m" / "sweep.jsonl"), {}
    for name, method in (("mora", "mora_share"), ("full", "full")):
        names = [f"{method}-muon-0.002-0.016-s{seed}" for seed in (1337, 1, 2)]
        bf16 = [records[run] for run in names]
        fp8 = [records[f"{run}-matmulfp8"] for run in names]
        for key, runs in ((name, bf16), (f"{name}_fp8", fp8)):
            values = [run["val_ppl"] for run in runs]
            numbers |= {f"60m.{key}.ppl_mean": round(mean(values), 2),
                        f"60m.{key}.ppl_std": round(stdev(values), 2),
                        f"60m.{key}.seeds": len(values)}
        changes = [b["val_loss"] - a["val_loss"] for a, b in zip(bf16, fp8, strict=True)]
        numbers |= {f"60m.{name}_fp8.loss_difference_mean": round(mean(changes), 4),
                    f"60m.{name}_fp8.loss_difference_std": round(stdev(changes), 4)}
    return numbers


def others():
    """Return the differences at 250m, the errors of gradients, the losses on three bases."""
    losses = json.loads((RESULTS / "pretrain_250m" / "metrics.json").read_text())
    errors = json.loads((FOLDER / "gradients.json").read_text())["mora"]
    numbers = {}
    for name in ("mora_fp8", "full_fp8"):
        for key in (1500, 2000, "std"):
            difference = losses[f"{name}.muon.loss_difference_{key}"]
            numbers[f"250m.{name}.loss_difference_{key}"] = difference
    numbers |= {f"gradient_error_{key}": round(error, 4) for key, error in errors.items()}
    records = rates.read(RESULTS / "gsm8k" / "sweep.jsonl")
    for base, task in BASES.items():
        seeds = rates.ended(records, (task, "mora_rotate_r8", "adamw"), BASES_LR)
        values = [record["val_loss"] for record in seeds]
        numbers |= {f"gsm8k.{base}.test_loss_mean": round(mean(values), 4),
                    f"gsm8k.{base}.test_loss_std": round(stdev(values), 4),
                    f"gsm8k.{base}.seeds": len(values)}
    return numbers


def main():
    metrics = (of_shape("1.3b", FOLDER / "bench.txt")
               | of_65k() | of_shape("250m", FOLDER / "bench_250m_7b.txt") | of_7b() | of_60m()
               | others())
    (FOLDER / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")


if __name__ == "__main__":
    main()
