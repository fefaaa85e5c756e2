"""What is published comes from the records: metrics.json from metrics.py, runs from their plans."""
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parent.parent / "results"
FOLDERS = sorted(file.parent.name for file in RESULTS.glob("*/metrics.py"))
DRAWN = {"low": 0.005, "high": 0.005, "p": 0.06}  # gsm8k's comparisons draw: allowed differences


def load(folder, name):
    """The module of a folder's script; more than one folder has a metrics.py."""
    file = RESULTS / folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{folder}_{name}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def path(monkeypatch):
    """Scripts of results put their folders into sys.path."""
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.parametrize("folder", FOLDERS)
def test_metrics_json_is_what_metrics_py_gives(folder, monkeypatch):
    """If records were added, run metrics.py and tables.py; if not, a script has changed numbers."""
    metrics, written = load(folder, "metrics"), {}
    monkeypatch.setattr(Path, "write_text", lambda path, text: written.update({path: text}))
    monkeypatch.setattr(subprocess, "run", lambda *words, **options: None)  # draws losses.png
    monkeypatch.setattr(metrics, "DRAWS", 1000, raising=False)  # 20,000 take three seconds
    metrics.main()
    (file, text), = written.items()
    assert file == RESULTS / folder / "metrics.json"
    found, committed = json.loads(text), json.loads(file.read_text())
    assert found.keys() == committed.keys()
    for name, value in found.items():
        error = DRAWN.get(name.rpartition(".")[2], 0)
        assert value == pytest.approx(committed[name], rel=1e-12, abs=error), name
