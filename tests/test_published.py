"""What is published comes from the records: metrics.json from metrics.py, runs from their plans."""
import dataclasses
import importlib.util
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import rates

import config

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


# ------------------------------------------------------------
# plan.py: the words of a run

SWEPT = sorted(file.parent.name for file in RESULTS.glob("*/plan.py"))
OF_BASE = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
           "num_key_value_heads", "tie_word_embeddings", "rope_theta", "rms_norm_eps"}


@pytest.fixture(scope="module")
def planned():
    """planned(folder): {name of a run of its plan: its settings}, without a look at their files."""
    found = {}

    def settings(words):
        cfg = dataclasses.asdict(config.load(words, None))
        return json.loads(json.dumps(cfg))  # lists for tuples, as in a record

    def of(folder):
        if folder not in found:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(RESULTS.parent)
                patch.setattr(config, "check", lambda cfg: None)  # there is no models/base
                plan = runpy.run_path(str(RESULTS / folder / "plan.py"))
                found[folder] = {name: settings([file, *words])
                                 for name, (file, words) in plan["RUNS"].items()}
        return found[folder]
    return of


def settings_that_matter(cfg):
    """Settings of a record without those that another one decides."""
    left_out = {"out"}
    if cfg.get("init_from"):
        left_out |= OF_BASE  # the record has those of the base model
    if cfg.get("epochs"):
        left_out.add("steps")
    if cfg["min_lr_ratio"] == 1:
        left_out.add("schedule")
    if cfg["method"] == "lora":
        left_out.add("operator")
    return {key: value for key, value in cfg.items() if key not in left_out}


@pytest.mark.parametrize("folder", SWEPT)
def test_a_recorded_run_had_the_settings_that_its_plan_gives_to_its_name(folder, planned):
    records = rates.read(RESULTS / folder / "sweep.jsonl")
    for name, cfg in planned(folder).items():
        if "config" in records.get(name, {}):
            recorded = settings_that_matter(records[name]["config"])
            assert recorded == {key: cfg[key] for key in recorded}, name


@pytest.mark.parametrize("folder", ("continual", "gsm8k", "uuid"))
def test_a_name_of_fine_tuning_has_its_task_method_optimizer_seed_and_rate(folder, planned):
    for name, cfg in planned(folder).items():
        if name.endswith("-base"):
            continue
        (task, method, optimizer), seed, lr = rates.parts_of(name)
        assert (cfg["optimizer"], cfg["seed"], cfg["lr"]) == (optimizer, seed, lr)
        for rank in re.findall(r"_r(\d+)$", method):
            assert cfg["rank"] == int(rank)
        if method in ("fft", "base"):
            assert cfg["method"] == "full"
        else:
            assert cfg["method"] == ("lora" if re.match("lora|dora", method) else "mora")
        if folder == "uuid":
            assert cfg["min_lr_ratio"] == (task == "uuid") and cfg["save_every"] == cfg["steps"]
            assert cfg["steps"] == (1000 if task == "uuid" or method.endswith("_r8") else 500)


@pytest.mark.parametrize("folder", ("pretrain_60m", "pretrain_250m"))
def test_a_name_of_pretraining_has_its_optimizer_rates_seed_and_steps(folder, planned):
    for name, cfg in planned(folder).items():
        method = name.partition("-")[0]
        start = "{}-{optimizer}-{lr:g}-{rest_lr:g}-s{seed}".format(method, **cfg)
        assert name == f"{start}-steps{cfg['steps']}" or (name, cfg["steps"]) == (start, 1000)
        kind = "full" if method.startswith("full") else method.partition("_")[0]
        kinds = {"full": "full", "frozen": "frozen", "lora": "lora", "relora": "lora"}
        assert cfg["method"] == kinds.get(kind, "mora"), name


@pytest.mark.parametrize("folder, other", [("pretrain_60m", set()), (
    "pretrain_250m", {"data", "batch_size", "steps", "warmup", "matmul"})])
def test_the_best_method_of_a_plan_is_that_of_the_published_config_file(folder, other, planned):
    """other: settings in which the check of the method differs from what the file is for."""
    file = f"configs/{folder.removeprefix('pretrain_')}_best.py"
    expected = dataclasses.asdict(config.load([str(RESULTS.parent / file)], None))
    cfg = next(cfg for name, cfg in planned(folder).items() if name.startswith("best-muon"))
    other = {*other, "out", "micro_batch", "log_every", "eval_every", "save_every", "keep",
             "restart_steps", "targets"}
    for key in cfg.keys() - other:
        assert cfg[key] == expected[key], key
