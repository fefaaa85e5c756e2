"""README's tables are what results/*/metrics.json gives, and every results folder is complete."""
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tables

ROOT = Path(__file__).resolve().parent.parent

FOLDERS = sorted(file.name for file in (ROOT / "results").iterdir()
                 if file.is_dir() and file.name != "__pycache__")


@pytest.fixture
def copy(tmp_path):
    """A project of README.md, results/tables.py and each metrics.json, to be spoiled."""
    shutil.copy(ROOT / "README.md", tmp_path)
    for file in [ROOT / "results" / "tables.py", *(ROOT / "results").glob("*/metrics.json")]:
        target = tmp_path / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    return tmp_path


def run_tables(project, *arguments):
    command = [sys.executable, project / "results" / "tables.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def change_metric(project, folder, name, value):
    """Set a metric; remove it if the value is None."""
    file = project / "results" / folder / "metrics.json"
    metrics = json.loads(file.read_text())
    assert name in metrics
    metrics[name] = value
    if value is None:
        del metrics[name]
    file.write_text(json.dumps(metrics))


def test_readme_has_the_tables_that_the_metrics_give():
    text = (ROOT / "README.md").read_text()
    assert tables.update(text) == (text, [])


@pytest.mark.parametrize("name", tables.TABLES)
def test_table_lines_have_at_most_100_columns_once_all_runs_are_done(name, tmp_path):
    rows, columns = tables.TABLES[name]
    values = {"rate": 3e-4, "{}": 1000, "{:,}": 134515008, "{:,.0f}": 250249}
    numbers = {column.metric.format(row): values.get(column.form, 0.99987)
               for column in columns if isinstance(column, tables.Column) for row in rows.values()}
    file = tmp_path / name.split("/")[0] / "metrics.json"
    file.parent.mkdir()
    file.write_text(json.dumps(numbers))
    lines = tables.render(name, tmp_path).splitlines()
    assert len(lines) == 2 + len(rows) and max(map(len, lines)) <= 100


def test_rows_and_tables_without_any_number_are_left_out(tmp_path):
    file = tmp_path / "continual" / "metrics.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"biomed.tokens": 5}))
    assert tables.render("continual", tmp_path) == ""
    file.write_text(json.dumps({"biomed.lora_r8.bits_per_byte": 0.8, "biomed.lora_r8.lr": 1e-2}))
    lines = tables.render("continual", tmp_path).splitlines()
    assert lines[2:] == ["| LoRA, r = 8 | 0.8000 | - | 1e-2 | - | - | - | 52.3, 64.0 |"]


def test_a_run_that_ended_before_a_shown_step_says_so(tmp_path):
    """All digits can be right at step 200 or 400 of 500, and no metric is of a later step."""
    file = tmp_path / "uuid" / "metrics.json"
    file.parent.mkdir()
    file.write_text(json.dumps({f"fft.falling.{key}": value for key, value in {
        "accuracy_final": 0.9995, "steps_to_99": 200, "lr": 3e-4, "seeds": 3}.items()}))
    lines = tables.render("uuid", tmp_path).splitlines()
    assert lines[2:] == ["| full rank, AdamW | 3e-4 | ended | ended | ended | ended | 100.0% | 200 "
                         "| 3 |"]


def test_a_share_that_was_not_measured_is_no_share_of_zero(tmp_path):
    file = tmp_path / "pretrain_60m" / "metrics.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"lora.muon.wiki_ppl_mean": 40.0, "frozen.muon.wiki_ppl_mean": 50.0,
                                "frozen.trainable_block_fraction": 0.0}))
    frozen, lora = sorted(tables.render("pretrain_60m", tmp_path).splitlines()[2:],
                          key=lambda line: "LoRA" in line)
    assert frozen.startswith("| frozen blocks, AdamW | 0.0% |") and lora.startswith("| LoRA | - |")


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_results_folder_has_a_readme_and_flat_finite_metrics(folder):
    assert (ROOT / "results" / folder / "README.md").read_text().strip()
    assert tables.load_metrics(ROOT / "results" / folder / "metrics.json")


@pytest.mark.parametrize("name, folder, metric", [
    ("pretrain_60m/grids", "pretrain_60m", "remora_permute.muon.grid_ppl"),
    ("throughput_h200", "throughput_h200", "1.3b.mora.to_full"),
    ("uuid/constant", "uuid", "lora_r8.accuracy_at_900"),
    ("gsm8k", "gsm8k", "operator_rotate.test_loss"),
])
def test_a_changed_number_fails_the_check_until_the_table_is_rewritten(copy, name, folder, metric):
    assert run_tables(copy, "--check").returncode == 0
    before = (copy / "README.md").read_text()
    change_metric(copy, folder, metric, 0.4321)
    check = run_tables(copy, "--check")
    assert check.returncode == 1 and f"in {name};" in check.stderr
    assert (copy / "README.md").read_text() == before
    assert run_tables(copy).returncode == 0
    assert (copy / "README.md").read_text() != before
    assert run_tables(copy, "--check").returncode == 0


def test_a_number_edited_in_readme_fails_the_check(copy):
    readme = copy / "README.md"
    assert readme.read_text().count("| 81,716 |") == 1
    readme.write_text(readme.read_text().replace("| 81,716 |", "| 91,716 |"))
    check = run_tables(copy, "--check")
    assert check.returncode == 1 and "throughput_h200" in check.stderr


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "12", True, [1.0], {"a": 1.0}])
def test_a_metric_that_is_no_finite_number_is_an_error(copy, value):
    change_metric(copy, "uuid", "fft.steps", value)
    failed = run_tables(copy)
    assert failed.returncode == 1 and "metrics.json: fft.steps is" in failed.stderr


def test_a_metric_that_a_table_lacks_is_an_error(copy):
    change_metric(copy, "gsm8k", "base.test_loss", None)
    failed = run_tables(copy)
    assert failed.returncode == 1 and "no metric 'base.test_loss'" in failed.stderr


@pytest.mark.parametrize("old, new, message", [
    ("<!-- table: uuid -->", "", "'<!-- table: uuid -->'"),
    ("<!-- table: uuid -->", "<!-- table: uuids -->", "table 'uuids' is marked"),
    ("<!-- end -->", "", "'<!-- table: "),
])
def test_a_lost_or_misspelt_marker_is_an_error(copy, old, new, message):
    readme = copy / "README.md"
    readme.write_text(readme.read_text().replace(old, new, 1))
    failed = run_tables(copy)
    assert failed.returncode == 1 and message in failed.stderr
    assert "Traceback" not in failed.stderr


def test_rates_are_written_in_full():
    column = tables.Column("rate", "{}.lr", "rate")
    rates = {1e-2: "1e-2", 3e-4: "3e-4", 1.5e-3: "1.5e-3", 0.0: "-"}
    for value, text in rates.items():
        assert tables.cell(column, "mora", {"mora.lr": value}, "metrics.json") == text


@pytest.mark.parametrize("name", ("throughput_h200", "fp8"))
def test_floors_prints_the_published_table(name, capsys):
    folder = ROOT / "results" / name
    runpy.run_path(str(folder / "floors.py"), run_name="__main__")
    assert capsys.readouterr().out == (folder / "floors.txt").read_text()
