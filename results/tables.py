"""Write README.md's tables of results from the metrics.json of each results folder.

    python results/tables.py            rewrite the tables in README.md
    python results/tables.py --check    change nothing; exit 1 and name each table that differs

A table stands in README.md between `<!-- table: NAME -->` and `<!-- end -->`. A new table is one
entry of TABLES and one pair of these comments. metrics.json maps names to finite numbers. A row
without any number is left out until its runs are done, and so is a table without rows.
"""
import json
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).resolve().parent
MARKED_TABLE = re.compile(r"<!-- table: (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)


class Column(NamedTuple):
    header: str
    metric: str        # name of the metric; {} stands for the row
    form: str          # how str.format writes it; "rate": 0.0003 as 3e-4, 0 as -; "yes/no": 1, 0
    missing: str = ""  # the cell of a row that lacks the metric; "": the metric must exist


class Paper(NamedTuple):
    """The paper's own numbers for some rows: of LLaMA-2 7B, so not to be compared with ours."""
    header: str
    cells: dict  # {the row's part of the metrics' names: text}


def score_columns(title):
    """The columns of one optimizer in pretrain_60m."""
    name = f"{{}}.{title.lower()}"
    return (Column(f"{title}: wiki", f"{name}.wiki_ppl_mean", "{:.2f}", missing="not run"),
            Column("±", f"{name}.wiki_ppl_std", "{:.2f}", missing="-"),
            Column("c4", f"{name}.c4_ppl_mean", "{:.0f}", missing="-"),
            Column("seeds", f"{name}.seeds", "{}", missing="-"))


def grid_columns(title):
    """The columns of one optimizer in pretrain_60m/grids."""
    name = f"{{}}.{title.lower()}"
    return (Column(f"{title}: wiki", f"{name}.grid_ppl", "{:.1f}", missing="not run"),
            Column("lr", f"{name}.lr", "rate", missing="-"),
            Column("rest_lr", f"{name}.rest_lr", "rate", missing="-"),
            Column("rates", f"{name}.rates_tried", "{}", missing="-"),
            Column("closed", f"{name}.bracketed", "yes/no", missing="-"))


DIGITS = (Column("rate", "{}.lr", "rate"),
          *(Column(f"{at}", f"{{}}.accuracy_at_{at}", "{:.1%}", missing="ended")
            for at in (300, 500, 700, 900)),
          Column("last", "{}.accuracy_final", "{:.1%}"),
          Column("99 % at", "{}.steps_to_99", "{}", missing="-"))

# NAME: ({label in README: the row's part of the metrics' names}, columns). NAME is a folder of
# results/, or FOLDER/ANYTHING for a further table from the same folder.
TABLES = {
    "pretrain_60m": ({
        "full rank": "full", "MoRA and LoRA (60m_best)": "best",
        "ReMoRA, permute": "remora_permute", "MoRA, share": "mora_share", "LoRA": "lora",
        "ReMoRA, alternate": "remora_alternate", "ReLoRA": "relora",
        "frozen blocks, AdamW": "frozen",
        "one-block model, full rank": "full_one_block",
        "MoRA and LoRA, r = 80": "best_r80", "MoRA, share, r = 80": "mora_share_r80",
        "LoRA, r = 80": "lora_r80", "ReMoRA, alternate, r = 80": "remora_alternate_r80",
    }, (
        Column("trained", "{}.trainable_block_fraction", "{:.1%}", missing="-"),
        Column("rank", "{}.muon.rank", "{:.0f}", missing="-"),
        *score_columns("Muon"), *score_columns("AdamW"),
    )),
    "pretrain_60m/tokens": ({
        "full rank": "full", "MoRA and LoRA (60m_best)": "best", "MoRA, share": "mora_share",
        "LoRA": "lora",
    }, (
        Column("33 M: wiki", "{}.muon.grid_ppl", "{:.2f}"),
        Column("66 M: wiki", "{}.muon.wiki_ppl_mean", "{:.2f}"),
        Column("c4", "{}.muon.c4_ppl_mean", "{:.0f}"),
        Column("131 M: wiki", "{}.muon.131m.wiki_ppl", "{:.2f}"),
        Column("c4", "{}.muon.131m.c4_ppl", "{:.0f}"),
    )),
    "pretrain_60m/grids": ({
        "full rank": "full", "one-block model, full rank": "full_one_block",
        "MoRA and LoRA (60m_best)": "best", "ReMoRA, permute": "remora_permute",
        "MoRA, permute, no restarts": "mora_permute", "LoRA": "lora", "MoRA, share": "mora_share",
        "ReMoRA, alternate": "remora_alternate",
        "alternate, warm-up 50 of 200": "remora_alternate_warmup50",
        "ReLoRA": "relora", "ReLoRA, warm-up 50 of 200": "relora_warmup50",
        "frozen blocks, AdamW": "frozen", "MoRA, share, r = 80": "mora_share_r80",
        "MoRA and LoRA, r = 80": "best_r80", "LoRA, r = 80": "lora_r80",
        "ReMoRA, alternate, r = 80": "remora_alternate_r80",
    }, (*grid_columns("Muon"), *grid_columns("AdamW"))),
    "pretrain_250m": ({
        "full rank": "full.muon", "full rank, older": "full_fp8.muon",
        "MoRA, share": "mora_share.muon", "MoRA, older": "mora_fp8.muon",
        "LoRA": "lora.muon", "LoRA, 2nd": "lora.muon.at_0.002_0.016",
        "pair": "best.muon", "pair, 2nd": "best.muon.at_0.002_0.016",
        "alternate": "remora_alternate.muon",
        "full, AdamW": "full.adamw", "full, AdamW, 2nd": "full.adamw.at_0.0005_0.032",
        "share, AdamW": "mora_share.adamw",
        "share, AdamW, 2nd": "mora_share.adamw.at_0.0005_0.016",
        "LoRA, AdamW": "lora.adamw", "alternate, AdamW": "remora_alternate.adamw",
    }, (
        Column("lr", "{}.lr", "rate"), Column("rest_lr", "{}.rest_lr", "rate"),
        Column("lowest", "{}.best_ppl", "{:.2f}"), Column("at step", "{}.best_step", "{}"),
        Column("last", "{}.wiki_ppl", "{:.2f}"),
        Column("bits/byte", "{}.wiki_bits_per_byte", "{:.3f}", missing="-"),
        Column("c4", "{}.c4_ppl", "{:.0f}", missing="-"),
        Column("tokens/s", "{}.tokens_per_s", "{:,.0f}"),
        Column("GiB", "{}.peak_gib", "{:.1f}", missing="-"),
        Column("> 0.1", "{}.singular_above_0.1", "{:.0f}", missing="-"),
    )),
    "pretrain_250m/rates": ({
        "full rank, Muon": "full.muon", "MoRA and LoRA (250m_best), Muon": "best.muon",
        "MoRA, share, Muon": "mora_share.muon", "LoRA, Muon": "lora.muon",
        "full rank, AdamW": "full.adamw", "MoRA, share, AdamW": "mora_share.adamw",
        "LoRA, AdamW": "lora.adamw",
    }, (
        Column("wiki", "{}.short.wiki_ppl", "{:.2f}"), Column("c4", "{}.short.c4_ppl", "{:.0f}"),
        Column("lr", "{}.short.lr", "rate"), Column("rest_lr", "{}.short.rest_lr", "rate"),
        Column("rates", "{}.short.rates_tried", "{}"),
        Column("closed", "{}.short.bracketed", "yes/no"),
    )),
    "fp8/65k": ({
        "full rank, bf16": "full_muon", "full rank, FP8": "full_muon_fp8",
        "LoRA, FP8": "lora_muon_fp8", "**MoRA, FP8**": "mora_muon_fp8",
        "ReMoRA permute, FP8": "remora_permute_muon_fp8",
        "MoRA and LoRA (1.3b_best), FP8": "mixed_muon_fp8",
    }, (
        Column("10 %: tokens/s", "65k_r128.{}.tokens_per_s", "{:,.0f}"),
        Column("/ full, bf16", "65k_r128.{}.over_full", "{:.2f}"),
        Column("ms per restart", "65k_r128.{}.restart_ms", "{:.0f}", missing="-"),
        Column("25 %: tokens/s", "65k_r320.{}.tokens_per_s", "{:,.0f}", missing="-"),
        Column("/ full, bf16", "65k_r320.{}.over_full", "{:.2f}", missing="-"),
    )),
    "throughput_h200": ({
        "full rank": "full", "frozen (embeddings, norms, head alone)": "frozen",
        "LoRA": "lora", "**MoRA**": "mora",
        "MoRA, two paths": "mora_two_paths", "ReMoRA, permute": "remora_permute",
    }, (
        Column("1.3b tokens/s", "1.3b.{}.tokens_per_s", "{:,.0f}"),
        Column("/ full", "1.3b.{}.to_full", "{:.2f}"),
        Column("peak GiB", "1.3b.{}.peak_gib", "{:.1f}"),
        Column("/ full", "1.3b.{}.peak_to_full", "{:.2f}"),
        Column("250m tokens/s", "250m.{}.tokens_per_s", "{:,.0f}"),
        Column("/ full", "250m.{}.to_full", "{:.2f}"),
        Column("peak GiB", "250m.{}.peak_gib", "{:.1f}"),
    )),
    "fp8": ({
        "full rank, bf16": "full", "full rank, FP8": "full_fp8", "LoRA, FP8": "lora_fp8",
        "**MoRA, FP8**": "mora_fp8", "ReMoRA permute, FP8": "remora_permute_fp8",
    }, (
        Column("1.3b tokens/s", "1.3b.{}.tokens_per_s", "{:,.0f}"),
        Column("/ full, bf16", "1.3b.{}.over_full", "{:.2f}"),
        Column("peak GiB", "1.3b.{}.peak_gib", "{:.2f}"),
        Column("/ full, bf16", "1.3b.{}.peak_over_full", "{:.2f}"),
        Column("250m tokens/s", "250m.{}.tokens_per_s", "{:,.0f}"),
        Column("/ full, bf16", "250m.{}.over_full", "{:.2f}"),
    )),
    "uuid": ({
        "full rank, AdamW": "fft.falling", "full rank, Muon": "fft.muon",
        "LoRA, r = 8, AdamW": "lora_r8.falling", "LoRA, r = 8, Muon": "lora_r8.muon",
        "MoRA, r = 8, AdamW": "mora_r8.falling", "MoRA, r = 8, Muon": "mora_r8.muon",
        "truncate, gradient, Muon": "truncate_gradient_r8.muon",
        "share, gradient, Muon": "share_gradient_r8.muon",
        "LoRA, r = 256, AdamW": "lora_r256.falling",
        "LoRA, r = 256, Muon": "lora_r256.muon",
        "MoRA, r = 256, AdamW": "mora_r256.falling",
        "MoRA, r = 256, Muon": "mora_r256.muon",
    }, (*DIGITS, Column("seeds", "{}.seeds", "{}"))),
    "uuid/constant": ({
        "full rank, AdamW": "fft",
        "LoRA, r = 8, AdamW": "lora_r8", "LoRA, r = 8, Muon": "lora_r8.muon.constant",
        "MoRA, r = 8, AdamW": "mora_r8", "MoRA, r = 8, Muon": "mora_r8.muon.constant",
        "LoRA, r = 256, AdamW": "lora_r256", "LoRA, r = 256, Muon": "lora_r256.muon.constant",
        "MoRA, r = 256, AdamW": "mora_r256", "MoRA, r = 256, Muon": "mora_r256.muon.constant",
    }, (*DIGITS, Paper("paper, 500 to 900", {
        "fft": "100, 100, 100", "lora_r8": "10, 11, 54", "mora_r8": "16, 87, 100",
        "lora_r256": "71, 100, 100", "mora_r256": "100, 100, 100"}))),
    "gsm8k": ({
        "untrained": "base", "full fine-tuning": "fft", "full fine-tuning, Muon": "fft.muon",
        "LoRA, r = 8": "lora", "LoRA, r = 8, Muon": "lora.muon",
        "MoRA, rotate, r = 8": "mora_rotate_r8", "MoRA, rotate, r = 8, Muon": "mora_rotate_r8.muon",
        "MoRA, truncate, r = 8, gradient": "truncate_gradient_r8",
        "MoRA, share, r = 8, gradient": "share_gradient_r8",
        "MoRA, share, r = 8, permuted": "share_permute_r8",
        "MoRA, share, r = 8": "share_strided_r8",
        "MoRA, share, r = 256": "mora_share_r256",
        "MoRA, share, r = 256, Muon": "mora_share_r256.muon",
        "MoRA, truncate, r = 32": "operator_truncate",
        "MoRA, truncate, r = 32, gradient": "truncate_gradient_r32",
        "MoRA, share, r = 32": "operator_share",
        "MoRA, share, r = 32, permuted": "share_permute_r32",
        "MoRA, share, r = 32, gradient": "share_gradient_r32",
        "MoRA, decouple, r = 32": "operator_decouple", "MoRA, rotate, r = 32": "operator_rotate",
    }, (
        Column("parameters", "{}.parameters", "{:,}", missing="0"),
        Column("rate", "{}.lr", "rate", missing="-"),
        Column("seeds", "{}.seeds", "{}"), Column("exact match", "{}.exact_match", "{:.1%}"),
        Column("test loss", "{}.test_loss", "{:.4f}"),
        Column("±", "{}.test_loss_std", "{:.4f}", missing="-"),
        Paper("paper, 7B", {
            "fft": "66.6%", "lora": "64.6%", "mora_rotate_r8": "64.2%", "mora_share_r256": "67.9%",
            "operator_truncate": "59.5% (r = 8)", "operator_share": "62.5% (r = 8)",
            "operator_decouple": "63.6% (r = 8)", "operator_rotate": "64.2% (r = 8)"}),
    )),
    "gsm8k/above": ({
        "full fine-tuning": "fft", "full fine-tuning, Muon": "fft.muon",
        "LoRA, r = 8": "lora", "LoRA, r = 8, Muon": "lora.muon",
        "MoRA, rotate, r = 8": "mora_rotate_r8", "MoRA, rotate, r = 8, Muon": "mora_rotate_r8.muon",
        "MoRA, share, r = 256": "mora_share_r256",
        "MoRA, share, r = 256, Muon": "mora_share_r256.muon",
    }, (
        Column("rate", "{}.lr", "rate"), Column("exact match", "{}.exact_match", "{:.1%}"),
        Column("test loss", "{}.test_loss", "{:.4f}"),
        Column("one above", "{}.above.lr", "rate", missing="not run"),
        Column("exact match", "{}.above.exact_match", "{:.1%}", missing="-"),
        Column("seeds", "{}.above.seeds", "{}", missing="-"),
        Column("test loss", "{}.above.test_loss", "{:.4f}", missing="-"),
    )),
    "continual": ({
        "untrained": "base", "full fine-tuning": "fft",
        "LoRA, r = 8": "lora_r8", "DoRA, r = 8": "dora_r8", "MoRA, rotate, r = 8": "mora_r8",
        "LoRA, r = 256": "lora_r256", "MoRA, share, r = 256": "mora_r256",
        "LoRA, r = 8, Muon": "lora_r8.muon", "MoRA, rotate, r = 8, Muon": "mora_r8.muon",
    }, (
        Column("biomed", "biomed.{}.bits_per_byte", "{:.4f}", missing="-"),
        Column("wiki", "biomed.{}.wiki_bits_per_byte", "{:.4f}", missing="-"),
        Column("rate", "biomed.{}.lr", "rate", missing="-"),
        Column("finance", "finance.{}.bits_per_byte", "{:.4f}", missing="-"),
        Column("wiki", "finance.{}.wiki_bits_per_byte", "{:.4f}", missing="-"),
        Column("rate", "finance.{}.lr", "rate", missing="-"),
        Paper("paper, 7B, %", {
            "fft": "56.4, 69.6", "lora_r8": "52.3, 64.0", "mora_r8": "53.3, 67.1",
            "lora_r256": "54.1, 67.3", "mora_r256": "55.4, 68.7"}),
    )),
    "continual/groups": ({
        "LoRA, r = 8": "lora_r8", "MoRA, rotate, r = 8": "mora_r8",
        "MoRA, share, r = 8": "share_strided_r8",
        "MoRA, share, r = 8, permuted": "share_permute_r8",
        "MoRA, share, r = 8, gradient": "share_gradient_r8",
        "MoRA, truncate, r = 8, gradient": "truncate_gradient_r8",
        "LoRA, r = 32": "lora_r32", "MoRA, rotate, r = 32": "rotate_strided_r32",
        "MoRA, share, r = 32": "share_strided_r32",
        "MoRA, share, r = 32, permuted": "share_permute_r32",
        "MoRA, share, r = 32, gradient": "share_gradient_r32",
        "MoRA, truncate, r = 32, gradient": "truncate_gradient_r32",
    }, (
        Column("biomed", "biomed.{}.bits_per_byte", "{:.4f}"),
        Column("wiki", "biomed.{}.wiki_bits_per_byte", "{:.4f}"),
        Column("rate", "biomed.{}.lr", "rate"), Column("seeds", "biomed.{}.seeds", "{}"),
    )),
}


def load_metrics(file):
    """Return the numbers of a metrics.json by name; ValueError if one is not a finite number."""
    if not file.exists():
        raise ValueError(f"{file} does not exist; it must hold the numbers of the table")
    metrics = json.loads(file.read_text())
    for name, value in metrics.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise ValueError(f"{file}: {name} is {value!r}; write a finite number or leave it out")
    return metrics


def cell(column, row, metrics, file):
    """Return one cell as text. ValueError if the metric is missing and must exist."""
    if isinstance(column, Paper):
        return column.cells.get(row, "")
    name = column.metric.format(row)
    if name not in metrics:
        if not column.missing:
            raise ValueError(f"{file}: no metric {name!r}; add it, or correct TABLES in tables.py")
        return column.missing
    value = metrics[name]
    if column.form == "yes/no":
        return "yes" if value else "no"
    if column.form != "rate":
        return column.form.format(value)
    if value == 0:
        return "-"
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def render(name, results=RESULTS):
    """Return a table of TABLES in Markdown, each line with a newline; "" if it has no rows."""
    rows, columns = TABLES[name]
    file = Path(results) / name.split("/")[0] / "metrics.json"
    metrics = load_metrics(file)
    names = [column.metric for column in columns if isinstance(column, Column)]
    lines = [["", *(column.header for column in columns)], ["---"] * (len(columns) + 1)]
    for label, row in rows.items():
        if any(name.format(row) in metrics for name in names):
            lines.append([label, *(cell(column, row, metrics, file) for column in columns)])
    if len(lines) == 2:
        return ""
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def update(text, results=RESULTS):
    """Return (text with its marked tables rendered again, names of the tables that differed)."""
    found, changed = [], []

    def replace(match):
        name, before = match.groups()
        if name not in TABLES:
            raise ValueError(f"table {name!r} is marked, but TABLES has only {', '.join(TABLES)}")
        found.append(name)
        after = render(name, results)
        if after != before:
            changed.append(name)
        return f"<!-- table: {name} -->\n{after}<!-- end -->"

    text = MARKED_TABLE.sub(replace, text)
    for name in TABLES:
        count = found.count(name)
        if count != 1:
            raise ValueError(f"'<!-- table: {name} -->' to '<!-- end -->': {count} times, not once")
    return text, changed


def main(arguments):
    if arguments not in ([], ["--check"]):
        raise ValueError(f"unknown arguments {' '.join(arguments)}; the only one is --check")
    readme = RESULTS.parent / "README.md"
    text, changed = update(readme.read_text())
    if changed and arguments:
        raise ValueError(f"README.md differs from metrics.json in {', '.join(changed)}; "
                         "run python results/tables.py")
    if changed:
        readme.write_text(text)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"tables.py: {error}")
