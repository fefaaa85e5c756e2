"""What is published comes from the records: metrics.json from metrics.py, runs from their plans."""
import dataclasses
import importlib.util
import json
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path
from statistics import stdev

import pytest
import rates
import tables

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


def test_gsm8k_compares_only_the_runs_of_the_published_numbers(monkeypatch):
    """A new rate that is best so far, of one seed: the earlier program's three seeds stay."""
    metrics, plan = load("gsm8k", "metrics"), load("gsm8k", "plan")
    records = rates.read(RESULTS / "gsm8k" / "sweep.jsonl")
    old = rates.name_of(("gsm8k", "lora", "adamw"), rates.SEED, 1e-2)
    new = rates.name_of(("gsm8k", "lora", "adamw"), rates.SEED, 3e-3)
    records[new] = records[old] | {"name": new, "gsm8k_dev_ppl": 1.0}
    monkeypatch.setattr(rates, "read", lambda path: dict(records))
    monkeypatch.setattr(metrics, "DRAWS", 1000)
    numbers = metrics.summarize(vars(plan))
    assert (numbers["lora.seeds"], numbers["lora.lr"]) == (3, 1e-2)
    assert "mora_share_r256.vs.fft.p" in numbers
    assert not [name for name in numbers if name.startswith("mora_rotate_r8.vs.lora.")]


def test_the_rates_beside_the_best_of_a_grid_are_its_own():
    """The table pretrain_60m/grids has grid_ppl beside lr and rest_lr, those of the longer runs. A
    grid that has found a better pair since then needs longer runs there."""
    metrics = load("pretrain_60m", "metrics")
    published = json.loads((RESULTS / "pretrain_60m" / "metrics.json").read_text())
    runs = metrics.pretraining.read_runs(RESULTS / "pretrain_60m" / "sweep.jsonl")
    for group, by_tokens in metrics.groups(runs).items():
        best = metrics.pretraining.best_of(by_tokens.get(metrics.GRID, []))
        if best:
            name = ".".join(group)
            rates_of_best = published[f"{name}.lr"], published[f"{name}.rest_lr"]
            assert metrics.pretraining.rates_of(best) == rates_of_best, name


@pytest.mark.parametrize("folder", ("pretrain_60m", "pretrain_250m"))
def test_pretraining_runs_of_one_group_differ_in_their_seeds_and_rates_alone(folder):
    """Groups follow names; most names of earlier sweeps are no longer in a plan."""
    metrics = load(folder, "metrics")
    records = rates.read(RESULTS / folder / "sweep.jsonl").values()
    if folder == "pretrain_60m":
        groups = [runs for by_tokens in metrics.groups(records).values()
                  for runs in by_tokens.values()]
    else:
        groups = metrics.by_length(records).values()
    defaults = dataclasses.asdict(config.Config())  # of keys that are younger than a record
    for runs in groups:
        settings = [{**defaults, **run["config"]} for run in runs if "error" not in run]
        for cfg in settings:
            for key in ("seed", "lr", "rest_lr", "out"):
                del cfg[key]
            if cfg["method"] != "mora":
                del cfg["operator"]
        assert all(cfg == settings[0] for cfg in settings), runs[0]["name"]


@pytest.mark.parametrize("best, seeds, above", [
    (1e-2, 3, 3e-2), (3e-3, 3, 1e-2), (5.5e-3, 3, 1e-2), (1.7e-2, 3, 3e-2),
    (5.5e-3, 1, 3e-2),  # half way, one seed: 1e-2 and the rate above it stay
    (3e-3, 1, None)])  # one seed: the row keeps the earlier program's 1e-2; 1e-2 is not above it
def test_gsm8k_has_the_rate_above_the_published_one(best, seeds, above, monkeypatch):
    """The grid of the sweep may find another best rate than the earlier program's."""
    records = rates.read(RESULTS / "gsm8k" / "sweep.jsonl")
    group = ("gsm8k", "lora", "adamw")
    for seed in rates.SEEDS:
        for lr in (1e-3, 3e-3, 5.5e-3, 1e-2, 1.7e-2, 3e-2):
            old, name = (rates.name_of(group, seed, rate) for rate in (1e-2, lr))
            ppl = 1.0 + abs(math.log(lr / best))
            record = records[old] | {"name": name, "gsm8k_dev_ppl": ppl}
            record["config"] = records[old]["config"] | {"lr": lr}
            if lr != best or seed in rates.SEEDS[:seeds]:
                records[name] = record
    monkeypatch.setattr(rates, "read", lambda path: dict(records))
    metrics, plan = load("gsm8k", "metrics"), load("gsm8k", "plan")
    monkeypatch.setattr(metrics, "DRAWS", 1000)
    numbers = metrics.summarize(vars(plan))
    assert numbers["lora.lr"] == (best if seeds == 3 else 1e-2)
    assert numbers.get("lora.above.lr") == above


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


@pytest.mark.parametrize("folder", [*SWEPT, "close_gap/tiny"])
def test_a_run_has_one_line(folder):
    """Of two, the last would count, be it the older one or that of a failure."""
    lines = (RESULTS / folder / "sweep.jsonl").read_text().splitlines()
    assert len(lines) == len(rates.read(RESULTS / folder / "sweep.jsonl"))


@pytest.mark.parametrize("folder", SWEPT)
def test_a_recorded_run_has_scores_on_the_data_of_its_plan(folder):
    plan = runpy.run_path(str(RESULTS / folder / "plan.py"))
    for name, record in rates.read(RESULTS / folder / "sweep.jsonl").items():
        if name in plan["RUNS"] and "error" not in record:
            assert {f"{Path(data).name}_ppl" for data in plan["EVALUATE"]} <= record.keys(), name


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
            assert (cfg["schedule"], cfg["warmup"], cfg["seq_len"]) == ("linear", 20, 75)
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
    "pretrain_250m", {"data", "batch_size", "steps", "warmup", "matmul", "lr", "rest_lr"})])
def test_the_best_method_of_a_plan_is_that_of_the_published_config_file(folder, other, planned):
    """other: settings in which the check of the method differs from what the file is for."""
    file = f"configs/{folder.removeprefix('pretrain_')}_best.py"
    expected = dataclasses.asdict(config.load([str(RESULTS.parent / file)], None))
    cfg = next(cfg for name, cfg in planned(folder).items() if name.startswith("best-muon"))
    other = {*other, "out", "micro_batch", "log_every", "eval_every", "save_every", "keep",
             "restart_steps", "targets"}
    for key in cfg.keys() - other:
        assert cfg[key] == expected[key], key


def searched_by(plan):
    """{group: the rate in its middle} of the searches of a plan of fine-tuning."""
    return plan.get("SEARCHED") or plan.get("FALLING") or plan["GROUPS"]


def followed(folder, patch):
    """(values of a plan.py, its runs) once each run that it asked for has a record. The best rate
    of every search is the one in its middle."""
    records = {}
    patch.setattr(rates, "read", lambda path: dict(records))
    while True:
        plan = runpy.run_path(str(RESULTS / folder / "plan.py"))
        searched, missing = searched_by(plan), plan["RUNS"].keys() - records.keys()
        if not missing:
            return plan, records.keys()
        for name in missing:
            loss = 1.0
            if not name.endswith("-base"):
                group, _, lr = rates.parts_of(name)
                loss += abs(math.log(lr / searched.get(group, lr)))
            curve = [[100, 0.5, 1000], [200 + round(100 * loss), 0.995, 1000]]
            # gsm8k's validation split is the test, which chooses nothing
            records[name] = {"gsm8k_dev_ppl": math.exp(loss), "curve": curve,
                             "val_loss": -loss if folder == "gsm8k" else loss}
        assert len(records) < 500


@pytest.mark.parametrize("folder", ("continual", "gsm8k", "uuid"))
def test_a_plan_of_fine_tuning_followed_to_its_end(folder, monkeypatch):
    """A rate to each side of the best, three seeds of it; and what the plan has besides."""
    plan, runs = followed(folder, monkeypatch)
    searched = searched_by(plan)
    expected = {(group, rates.SEED, rates.beside(lr, side))
                for group, lr in searched.items() for side in (-1, 1)}
    expected |= {(group, seed, lr) for group, lr in searched.items() for seed in rates.SEEDS}
    refined, untrained = [], set()
    if folder == "continual":
        refined, untrained = plan["REFINED"], {"biomed-base", "finance-base"}
        assert len(refined) == len(set(refined)) == 13
    elif folder == "gsm8k":
        refined, untrained = plan["ADAMW"], {plan["BASE"]}
        above = plan["ADAMW"] | plan["MUON"]
        expected |= {(group, seed, rates.beside(lr, 1)) for group, lr in above.items()
                     for seed in rates.SEEDS}
        expected |= {((base, "mora_rotate_r8", "adamw"), seed, 1e-2)
                     for base in ("bfloat16", "float8") for seed in rates.SEEDS}
    else:
        refined = plan["REFINED"]
        expected |= {(group, rates.SEED, lr) for group, lr in plan["CONSTANT"].items()}
    expected |= {(group, rates.SEED, float(f"{math.sqrt(lr * rates.beside(lr, side)):.2g}"))
                 for group in refined for lr in [searched[group]] for side in (-1, 1)}
    names = {rates.name_of(*run) for run in expected}
    assert runs == {name for name in names if "_gradient_" not in name} | untrained


def test_the_answers_of_gsm8k_are_kept_but_on_other_bases():
    plan = runpy.run_path(str(RESULTS / "gsm8k" / "plan.py"))
    for name, record in rates.read(RESULTS / "gsm8k" / "sweep.jsonl").items():
        context = plan["PREPARE"](name).func.__name__
        assert context == ("at_the_end" if "right" in record else "losses"), name


def test_the_score_of_uuids_is_the_step_with_99_percent_then_the_last_digits():
    plan = runpy.run_path(str(RESULTS / "uuid" / "plan.py"))
    slow = [[100, 0.1, 1000], [200, 0.99, 1000], [300, 1.0, 10000]]
    fast, never = [[100, 0.992, 1000], [200, 0.5, 1000]], [[100, 0.1, 1000], [1000, 0.98, 10000]]
    better = [[100, 0.2, 1000], [200, 0.995, 1000], [300, 1.0, 10000]]
    worse = [[100, 0.2, 1000], [200, 0.995, 1000], [300, 0.999, 10000]]
    assert [plan["steps_to_99"](curve) for curve in (slow, fast, never)] == [200, 100, None]
    assert [plan["digits_at"](slow, at) for at in (100, 199, 200, 1000)] == [0.1, 0.1, 0.99, 1.0]
    scores = [plan["score"]({"curve": curve}) for curve in (fast, better, worse, never)]
    assert scores == sorted(scores) and len(set(scores)) == 4
    assert plan["score"]({"curve": slow}) == scores[1]


def test_numbers_of_uuids_are_means_over_seeds_and_the_step_of_the_slowest():
    metrics, plan = load("uuid", "metrics"), runpy.run_path(str(RESULTS / "uuid" / "plan.py"))
    curves = {1337: [[100, 0.1, 1000], [200, 0.99, 1000], [300, 1.0, 10000]],
              1338: [[100, 0.2, 1000], [200, 0.7, 1000], [500, 0.995, 10000]],
              1339: [[100, 0.3, 1000], [200, 0.5, 1000], [500, 0.5, 10000]]}
    group = ("falling", "lora_r8", "muon")
    records = {rates.name_of(group, seed, 1e-2): {
        "curve": curve, "config": {"lr": 1e-2}, "trainable_parameters": 7}
        for seed, curve in curves.items()}
    plan |= {"read": lambda: dict(records), "GROUPS": {group: 1e-2}}
    name = "lora_r8.muon"
    numbers = metrics.summarize(plan)
    assert all(key.startswith(f"{name}.") for key in numbers)
    numbers = {key.removeprefix(f"{name}."): value for key, value in numbers.items()}
    assert "steps_to_99" not in numbers and "accuracy_at_700" not in numbers
    assert (numbers["seeds"], numbers["steps"], numbers["bracketed"]) == (3, 500, 0)
    expected = {"accuracy_at_100": 0.2, "accuracy_at_300": 2.2 / 3, "accuracy_at_500": 2.495 / 3,
                "accuracy_final": 2.495 / 3, "accuracy_final_std": stdev([1.0, 0.995, 0.5])}
    assert {key: numbers[key] for key in expected} == pytest.approx(expected)
    del records[rates.name_of(group, 1339, 1e-2)]
    assert metrics.summarize(plan)[f"{name}.steps_to_99"] == 500


def test_earlier_runs_of_uuids_count_if_they_went_to_the_end_or_reached_99_percent():
    plan = runpy.run_path(str(RESULTS / "uuid" / "plan.py"))
    found, lines = plan["read_earlier"](), (RESULTS / "uuid" / "runs.jsonl").read_text()
    curves = [json.loads(line)["curve"] for line in lines.splitlines()]
    whole = [curve for curve in curves
             if curve[-1][0] == 1000 or max(right for _, right, _ in curve) >= 0.99]
    assert 0 < len(found) == len(whole) < len(curves)
    for name, record in found.items():
        (task, method, optimizer), seed, lr = rates.parts_of(name)
        cfg = record["config"]
        assert (task, optimizer, seed, lr) == ("uuid", "adamw", cfg["seed"], cfg["lr"])
        assert record["method"] == method
        assert record["steps_to_99"] == plan["steps_to_99"](record["curve"])


@pytest.mark.parametrize("folder", ("continual", "gsm8k", "uuid"))
def test_a_search_that_has_begun_has_a_run_in_its_middle(folder):
    """A changed middle would make a plan ask for runs that its search does not need."""
    plan = runpy.run_path(str(RESULTS / folder / "plan.py"))
    records = rates.read(RESULTS / folder / "sweep.jsonl")
    begun = {rates.parts_of(name)[0] for name in records if not name.endswith("-base")}
    for group, lr in searched_by(plan).items():
        assert lr == rates.beside(lr, 0), group
        assert group not in begun or rates.name_of(group, rates.SEED, lr) in records, group


def test_a_grid_of_pretraining_that_has_begun_has_a_run_in_its_middle():
    plan = runpy.run_path(str(RESULTS / "pretrain_60m" / "plan.py"))
    records = rates.read(RESULTS / "pretrain_60m" / "sweep.jsonl")
    begun = {tuple(name.split("-")[:2]) for name in records}
    for group in plan["CENTRES"]:
        assert group not in begun or plan["name_of"](group, (0, 0)) in records, group


def test_at_250m_all_is_in_fp8_at_a_quarter_of_the_blocks_from_the_best_rates_of_60m():
    plan = runpy.run_path(str(RESULTS / "pretrain_250m" / "plan.py"))
    best = json.loads((RESULTS / "pretrain_60m" / "metrics.json").read_text())
    for group, centre in plan["CENTRES"].items():
        name, part = ".".join(plan["GRID_OF"].get(group, group)), 1
        if group == ("lora", "adamw"):  # begun at 60m's lr, then continued from a quarter of it
            part = 4
        assert centre == (best[f"{name}.lr"] / part, best[f"{name}.rest_lr"]), group
        for steps, warmup in ((200, 40), (2000, 200)):
            (file, words), = plan["run"](group, centre, steps).values()
            cfg = config.load([str(RESULTS.parent / file), *words], None)
            assert (cfg.matmul, cfg.warmup, cfg.eval_every) == ("fp8", warmup, 250)
            assert cfg.method == "full" or cfg.rank == 128, group
            assert cfg.steps * cfg.batch_size * cfg.seq_len == steps * 65536
            restarts = {"best": (10, 0), "remora_alternate": (400, 10)}.get(group[0], (0, 50))
            assert (cfg.restart_every, cfg.restart_warmup) == restarts


def test_every_long_run_at_250m_is_a_row_of_the_table():
    """A run at rates without a row would vanish, say when another short run becomes the best."""
    metrics = json.loads((RESULTS / "pretrain_250m" / "metrics.json").read_text())
    long_runs = {name.removesuffix(".best_ppl") for name in metrics if name.endswith(".best_ppl")}
    rows, _ = tables.TABLES["pretrain_250m"]
    assert long_runs - {*rows.values()} == {"full_bf16.muon", "mora_bf16.muon"}


def test_equal_time_has_the_ranks_and_restarts_of_the_runs_at_60m(monkeypatch, planned):
    monkeypatch.syspath_prepend(str(RESULTS / "pretrain_60m"))
    for method, (rank, name, every) in load("pretrain_60m", "equal_time").SPEEDS.items():
        cfg = next(cfg for run, cfg in planned("pretrain_60m").items()
                   if run.startswith(f"{method}-muon-"))
        assert cfg["restart_every"] == every
        assert cfg["method"] == "full" or 4 * cfg["rank"] == rank  # width 2048 for 512
        kind = "mixed" if cfg["lora_rank"] else cfg["method"]
        assert name in (kind, f"re{kind}_{cfg['groups']}")


@pytest.mark.parametrize("folder, names, end", [
    ("uuid", ("uuid",), ".falling"), ("gsm8k", ("gsm8k",), ""),
    ("continual", ("continual", "continual/groups"), "")])
def test_a_search_has_a_row_in_a_table_and_a_row_its_search(folder, names, end):
    """end: the suffix of AdamW's names."""
    plan = runpy.run_path(str(RESULTS / folder / "plan.py"))
    found = {rates.name_in_metrics(*group[1:]) + end * (group[2] == "adamw")
             for group in searched_by(plan)}
    rows = {row for name in names for row in tables.TABLES[name][0].values()}
    earlier = {row for row in rows if row.startswith("operator_")} | {"base"}
    assert found == rows - earlier


def test_uuids_with_constant_rates_and_muon_are_done():
    plan = runpy.run_path(str(RESULTS / "uuid" / "plan.py"))
    records = rates.read(RESULTS / "uuid" / "sweep.jsonl")
    assert {rates.name_of(group, rates.SEED, lr) for group, lr in plan["CONSTANT"].items()} == {
        name for name in records if name.startswith("uuid-")}
