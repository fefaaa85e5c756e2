"""metrics.json of results/pretrain_60m and pretrain_250m: which runs a number comes from."""
import importlib.util
import json
import math
import runpy
from pathlib import Path

import grid
import pytest
import rates

FILE = Path(__file__).resolve().parent.parent / "results" / "pretrain_60m" / "metrics.py"


def load(file):
    """Return the module; both folders' files are called metrics.py."""
    spec = importlib.util.spec_from_file_location("pretrain_metrics", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def metrics():
    return load(FILE)


def made_up(method, ppl, lr=2e-3, rest_lr=3.2e-2, seed=1337, steps=1000, options="", **more):
    """A record; options: the end of its name."""
    config = {"seed": seed, "steps": steps, "batch_size": 64, "seq_len": 512, "optimizer": "muon",
              "matmul": "fp8" if "fp8" in options else "bf16", "lr": lr, "rest_lr": rest_lr,
              "num_hidden_layers": 1 if "one_block" in method else 8}
    return {"name": f"{method}-muon-{lr:g}-{rest_lr:g}-s{seed}{options}", "config": config,
            "val_ppl": ppl, "c4_sample_ppl": 5 * ppl, "bits_per_byte": 1.25, "peak_gib": seed / 100,
            "c4_sample_bits_per_byte": 1.5, "tokens_per_s": 1000.4 + seed, **more}


def longer(*args, steps=2000, options="", **more):
    return made_up(*args, steps=steps, options=f"{options}-steps{steps}", **more)


CROSS = [made_up("full", 40.0), made_up("full", 42.0, lr=1e-3), made_up("full", 43.0, lr=4e-3),
         made_up("full", 41.0, rest_lr=1.6e-2), made_up("full", 44.0, rest_lr=6.4e-2)]


def test_without_longer_runs_the_numbers_are_those_of_the_best_rates_of_the_grid(metrics):
    numbers = metrics.summarize([*CROSS, made_up("full", 38.0, seed=1)])
    expected = {"wiki_ppl_mean": 39.0, "wiki_ppl_std": 1.41, "c4_ppl_mean": 195.0, "lr": 2e-3,
                "rest_lr": 3.2e-2, "seeds": 2, "tokens_m": 33, "wiki_bits_per_byte_mean": 1.25,
                "c4_bits_per_byte_mean": 1.5, "peak_gib": 6.69, "tokens_per_s": 1001,
                "grid_ppl": 40.0, "rates_tried": 5, "bracketed": 1}
    assert numbers == {f"full.muon.{key}": value for key, value in expected.items()}


def test_a_pair_that_diverged_is_a_worse_neighbour_and_was_tried(metrics, tmp_path):
    """As in plan.py. A longer run that diverged has no number, nor one that failed otherwise."""
    error = {"error": "UserError: step 9: the loss is nan"}
    *others, last = [{key: run[key] for key in ("name", "config")} | error for run in (
        longer("full", 0.0), made_up("lora", 0.0), CROSS[-1])]
    runs = [*CROSS[:-1], *others, longer("lora", 30.0, lr=4e-3)]
    path = tmp_path / "sweep.jsonl"
    path.write_text("".join(json.dumps(run) + "\n" for run in [*runs, last]))
    numbers = metrics.summarize(metrics.pretraining.read_with_diverged(path))
    assert (numbers["full.muon.rates_tried"], numbers["full.muon.bracketed"]) == (5, 1)
    assert (numbers["full.muon.wiki_ppl_mean"], numbers["full.muon.tokens_m"]) == (40.0, 33)
    assert numbers["lora.muon.wiki_ppl_mean"] == 30.0 and "lora.muon.grid_ppl" not in numbers
    path.write_text("".join(json.dumps(run) + "\n"
                            for run in [*runs, last | {"error": "OutOfMemoryError"}]))
    numbers = metrics.summarize(metrics.pretraining.read_with_diverged(path))
    assert (numbers["full.muon.rates_tried"], numbers["full.muon.bracketed"]) == (4, 0)


@pytest.mark.parametrize("runs, place", [(CROSS, "inside"), (CROSS[:2], "at the edge of")])
def test_a_grid_is_printed_from_its_best_pair_of_rates_on(metrics, runs, place, capsys):
    metrics.summarize(runs)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"full muon best (0.002, 0.032) {place} its grid"
    assert printed[1] == "    lr 0.002, rest_lr 0.032: 40.00" and len(printed) == 1 + len(runs)


def test_one_longer_run_replaces_the_grid_but_not_the_numbers_about_it(metrics):
    numbers = metrics.summarize([*CROSS, longer("full", 30.0, lr=1e-3)])
    found = {key.removeprefix("full.muon."): value for key, value in numbers.items()}
    assert (found["wiki_ppl_mean"], found["tokens_m"], found["seeds"]) == (30.0, 66, 1)
    assert (found["lr"], found["grid_ppl"], found["rates_tried"]) == (1e-3, 40.0, 5)
    assert "wiki_ppl_std" not in found


def test_rates_with_more_seeds_win_then_the_better_ones(metrics):
    seeds = [longer("full", ppl, seed=seed) for seed, ppl in ((1337, 33.0), (1, 34.0), (2, 35.0))]
    other = [longer("full", 30.0, lr=4e-3), longer("full", 31.0, lr=4e-3, seed=1)]
    third = longer("full", 29.0, lr=4e-3, seed=2)
    before, after = metrics.summarize(seeds + other), metrics.summarize([*seeds, *other, third])
    assert (before["full.muon.wiki_ppl_mean"], before["full.muon.wiki_ppl_std"]) == (34.0, 1.0)
    assert (after["full.muon.wiki_ppl_mean"], after["full.muon.lr"]) == (30.0, 4e-3)


def test_seeds_on_different_cards_have_no_speed_in_common(metrics):
    cards = [longer("full", 30.0, seed=seed, device=card) for seed, card in enumerate("AAB")]
    assert metrics.summarize(cards[:2])["full.muon.tokens_per_s"] == 1000  # the slower one's
    assert "full.muon.tokens_per_s" not in metrics.summarize(cards)


def test_runs_of_131_m_tokens_have_their_own_names(metrics):
    numbers = metrics.summarize([longer("full", 25.0, steps=4000)])
    assert numbers == {"full.muon.131m.wiki_ppl": 25.0, "full.muon.131m.c4_ppl": 125.0}


@pytest.mark.parametrize("options, name", [
    ("", "lora.muon"), ("-matmulfp8", "lora.muon.fp8"),
    ("-restart_every50", "lora.restart_every50.muon")])
@pytest.mark.parametrize("make", (made_up, longer))
@pytest.mark.parametrize("seed", (1, 1337))
def test_options_of_a_name(metrics, make, options, name, seed):
    numbers = metrics.summarize([make("lora", 50.0, options=options, seed=seed)])
    if make is longer or seed == rates.SEED:
        assert {key.rpartition(".")[0] for key in numbers} == {name}
    else:
        assert numbers == {}  # a seed of a grid that has not run


def test_spectra_are_means_of_the_runs_that_have_them(metrics):
    measured = {"trainable_block_fraction": 0.0984}
    runs = [longer("lora", 40.0), longer("lora", 41.0, seed=1, **measured, spectrum={
        "singular_above_0.1": 20.0, "rank": 30.0}), longer("lora", 41.0, seed=2, spectrum={
            "singular_above_0.1": 21.0, "rank": 32.0}, **measured)]
    numbers = metrics.summarize([*runs, made_up("full", 40.0)])
    assert numbers["lora.muon.singular_above_0.1"] == 20.5 and numbers["lora.muon.rank"] == 31.0
    assert numbers["lora.trainable_block_fraction"] == 0.0984
    assert not any("full.muon.rank" in key or "full.trainable" in key for key in numbers)


def test_a_failed_run_is_left_out_and_printed_as_is_a_spectrum_that_failed(metrics, tmp_path,
                                                                         capsys):
    path = tmp_path / "sweep.jsonl"
    path.write_text('{"name": "a", "error": "UserError: nan"}\n'
                    '{"name": "b", "val_ppl": 1.0, "spectrum_error": "OutOfMemoryError"}\n')
    assert [run["name"] for run in metrics.pretraining.read_runs(path)] == ["b"]
    assert capsys.readouterr().out == ("a failed: UserError: nan\n"
                                       "b has no spectrum: OutOfMemoryError\n")


def test_gpu_seconds_are_those_of_the_processes_that_shared_the_gpu():
    """Alone a run had twice the speed of one of two: the same GPU seconds. Of seeds the slowest
    counts, if it had the card that most runs had."""
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots(1, 2)
    runs = {"alone": [longer("a", 9.0, tokens_per_s=2000.0, per_gpu=1)],
            "two": [longer("b", 9.0, tokens_per_s=1000.0, per_gpu=2)]}
    runs["two"] += [longer("b", 9.0, seed=seed, tokens_per_s=speed, per_gpu=2, device=card)
                    for seed, speed, card in ((1, 1500.0, "card"), (2, 10.0, "other"))]
    for run in [*runs["alone"], *runs["two"]]:
        run |= {"device": run.get("device", "card"), "val_losses": [[0, 9.0], [2000, 3.0]]}
    load(FILE.parent.parent / "pictures.py").draw_row(axes, runs, {name: name for name in runs}, {})
    (alone,), (two,) = (line.get_xdata() for line in axes[1].lines)  # of the evaluation at the end
    assert alone == two == 2000 * 64 * 512 / 2000


# ------------------------------------------------------------
# plan.py: what is missing

@pytest.fixture(scope="module")
def plan():
    return runpy.run_path(str(FILE.with_name("plan.py")))


def own_runs(plan, records, method="full"):
    runs = plan["plan"]({record["name"]: record for record in records})
    return [name for name in runs if name.startswith(f"{method}-muon-")]


@pytest.mark.parametrize("method", ("full", "relora"))
def test_a_grid_grows_around_its_best_until_it_is_closed(plan, method):
    """A loss with its least at lr 8e-3 and rest_lr 1.6e-2; one corner diverges."""
    records = []
    while missing := [name for name in own_runs(plan, records, method) if "steps" not in name]:
        assert len(missing) == len(own_runs(plan, records, method))  # no long run before the end
        lr, rest_lr = map(float, missing[0].split("-")[2:4])
        record = made_up(method, 40 + abs(lr / 8e-3 - 1) + abs(rest_lr / 1.6e-2 - 1), lr, rest_lr)
        if lr > 1e-2:
            record = {"name": record["name"], "error": "UserError: step 7: the loss is nan"}
        assert record["name"] == missing[0] and len(records) < 20
        records.append(record)
    longest = ["s1337-steps4000"] if method == "full" else []
    longer_runs = ["s1337-steps2000", *longest, "s1-steps2000", "s2-steps2000"]
    assert own_runs(plan, records, method) == [f"{method}-muon-0.008-0.016-{end}"
                                               for end in longer_runs]


def test_each_method_of_a_plan_starts_in_the_middle_of_its_grid(plan):
    first = plan["plan"]({})
    assert {method for method, _ in plan["CENTRES"]} == plan["METHODS"].keys()
    assert {plan["name_of"](group, (0, 0)) for group in plan["CENTRES"]} <= first.keys()
    assert not [name for name in first if "steps" in name]


def test_a_grid_lacks_the_neighbours_of_its_best_on_both_axes(metrics):
    """Not those at corners; a run that diverged is a worse neighbour."""
    def name_of(point):
        return f"{point}"

    records = {name_of((0, 0)): {"val_ppl": 40.0}, name_of((1, -1)): {"val_ppl": 39.0},
               name_of((2, -1)): {"error": "UserError: step 7: the loss is nan"}}
    best, missing = grid.search(name_of, records)
    assert best == (1, -1) and sorted(missing) == [(0, -1), (1, -2), (1, 0)]
    best, missing = grid.search(name_of, records, has_lr=False)
    assert best == (1, -1) and sorted(missing) == [(1, -2), (1, 0)]
    assert grid.rates_at((3.0, 5.0), (2, -1)) == (12.0, 2.5)
    diverged = {name_of(point): records[name_of((2, -1))]
                for point in ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))}
    assert grid.search(name_of, diverged) == ((-1, 0), [(-1, 1), (-1, -1), (-2, 0)])  # not closed
    del records[name_of((0, 0))]  # the centre was moved after runs elsewhere
    assert grid.search(name_of, records) == ((0, 0), [(0, 0)])


def test_a_grid_is_closed_by_a_rate_on_each_side_with_the_other_rate_fixed(metrics):
    bracketed = metrics.pretraining.bracketed
    cross = [(2, 3), (1, 3), (4, 3), (2, 1.5), (2, 6)]
    assert bracketed(cross, (2, 3))
    for pair in cross[1:]:
        others = [other for other in cross if other != pair]
        assert not bracketed(others, (2, 3))
        corner = (pair[0] if pair[0] != 2 else 1, pair[1] if pair[1] != 3 else 1.5)
        assert not bracketed([*others, corner], (2, 3)), pair
        assert bracketed(others, (2, 3), has_lr=False) == (pair[0] != 2)
        # one further out leaves open whether the rate between, which failed say, is better
        further = (2 * (pair[0] / 2) ** 2, 3 * (pair[1] / 3) ** 2)
        assert not bracketed([*others, further], (2, 3)), further


def test_a_run_that_failed_otherwise_is_no_score(plan):
    name = "full-muon-0.002-0.032-s1337"
    _, missing = plan["search"](("full", "muon"), {name: {"name": name, "error": "CUDA"}})
    assert (0, 0) in missing


def test_frozen_blocks_have_one_rate(plan):
    _, missing = plan["search"](("frozen", "adamw"), {})
    assert missing == [(0, 0), (0, 1), (0, -1)]


def test_at_250m_alternate_groups_run_long_at_the_best_rates_of_mora_share():
    """Short runs end before the first restart."""
    plan = runpy.run_path(str(FILE.parent.parent / "pretrain_250m" / "plan.py"))
    for group, other in plan["GRID_OF"].items():
        assert plan["CENTRES"][group] == plan["CENTRES"][other]  # a point means the same rates
    records = {}
    while missing := [name for name in plan["plan"](records)
                      if name.startswith("mora_share-muon") and name.endswith("steps200")]:
        assert not [name for name in plan["plan"](records) if name.startswith("remora")]
        lr, rest_lr = map(float, missing[0].split("-muon-")[1].split("-s1337")[0].split("-"))
        records[missing[0]] = {"val_ppl": 40 + abs(lr / 4e-3 - 1) + abs(rest_lr / 1.6e-2 - 1)}
    runs = [name for name in plan["plan"](records)
            if name.startswith(("remora", "mora")) and "-muon-" in name]
    assert runs == [f"{method}-muon-0.004-0.016-s1337-steps2000"
                    for method in ("mora_share", "remora_alternate")]
    further = [name for name in plan["RUNS"] if name.startswith("lora-muon-0.002-0.016")]
    assert further == ["lora-muon-0.002-0.016-s1337-steps2000"]


def test_the_fraction_of_one_block_is_of_all_blocks(metrics):
    numbers = metrics.summarize([made_up(name, 50.0, trainable_block_fraction=1.0)
                                 for name in ("full", "full_one_block")])
    assert numbers["full.trainable_block_fraction"] == 1
    assert numbers["full_one_block.trainable_block_fraction"] == 0.125


def test_frozen_blocks_have_the_same_numbers_under_both_optimizers_and_a_grid_of_one_rate(metrics):
    runs = [made_up("frozen", ppl, rest_lr=rate) for ppl, rate in ((52, .1), (50, .2), (51, .4))]
    for run in runs:
        run["config"] |= {"optimizer": "adamw", "method": "frozen"}
    numbers = metrics.summarize(runs)
    assert numbers["frozen.adamw.wiki_ppl_mean"] == numbers["frozen.muon.wiki_ppl_mean"] == 50
    assert numbers["frozen.adamw.bracketed"] == 1
    assert metrics.summarize(runs[:2])["frozen.adamw.bracketed"] == 0


# ------------------------------------------------------------
# results/pretrain_60m/equal_time.py

def test_equal_time_reads_perplexity_between_the_two_lengths(metrics):
    at_ratio = metrics.equal_time.at_ratio
    by_tokens = {33: [made_up("lora", 50.0), made_up("lora", 40.0, lr=1e-3)],
                 66: [made_up("lora", 32.0, steps=2000)]}
    assert at_ratio(by_tokens, 1) == 50.0 and at_ratio(by_tokens, 2) == pytest.approx(32.0)
    assert at_ratio(by_tokens, 2 ** 0.5) == pytest.approx(40.0)
    assert at_ratio({66: by_tokens[66]}, 1) is None and at_ratio({33: by_tokens[33]}, 1) is None
    assert at_ratio(by_tokens, 2.1) is at_ratio(by_tokens, 0.9) is None  # no run is so long, short


def test_a_token_of_equal_time_has_its_share_of_a_restart(metrics):
    bench = {"1.3b.mora_muon_fp8.tokens_per_s": 1000, "1.3b.mora_muon_fp8.tokens_per_step": 2000,
             "1.3b.mora_muon_fp8.restart_ms": 500.0}
    seconds = metrics.equal_time.pretraining.token_seconds
    assert seconds(bench, "1.3b.mora_muon_fp8") == 1e-3
    assert seconds(bench, "1.3b.mora_muon_fp8", every=10) == pytest.approx((2 + 0.5 / 10) / 2000)
    assert seconds(bench, "1.3b.mora_muon") is None
    del bench["1.3b.mora_muon_fp8.restart_ms"]  # bench.py --quick
    assert seconds(bench, "1.3b.mora_muon_fp8") == 1e-3
    assert seconds(bench, "1.3b.mora_muon_fp8", every=10) is None


# ------------------------------------------------------------
# results/pretrain_250m/metrics.py: the sweep's runs of two lengths beside older logs

def swept(ppl, steps, lr=2e-3, rest_lr=1.6e-2):
    losses = [[0, 11.0], [steps // 2, 3.0], [steps, 3.5]]
    return made_up("full", ppl, lr, rest_lr, steps=steps, options=f"-steps{steps}",
                   val_losses=losses, trainable_block_fraction=1.0)


@pytest.fixture
def numbers_of(tmp_path):
    """numbers_of(records): full rank's numbers of a folder with a sweep and an older log in FP8."""
    lines = [{"config": {"optimizer": "muon", "lr": 1e-3, "rest_lr": 1e-2}},
             {"step": 7, "val_loss": 2.0}, {"step": 7, "tokens_per_s": 5.0}]
    (tmp_path / "full_fp8.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    module = load(FILE.parent.parent / "pretrain_250m" / "metrics.py")

    def numbers_of(records):
        path = tmp_path / "sweep.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        found = module.summarize(tmp_path)
        assert found["full_fp8.muon.wiki_ppl"] == 7.3891 and found["full_fp8.muon.val_loss_7"] == 2
        return {name.removeprefix("full.muon."): number for name, number in found.items()
                if not name.startswith("full_fp8.muon.")}
    return numbers_of


def test_short_runs_and_older_logs_give_no_headline(numbers_of):
    numbers = numbers_of([swept(40.0, 200), swept(39.0, 200, lr=6.25e-5)])
    assert "wiki_ppl" not in numbers
    assert (numbers["short.wiki_ppl"], numbers["short.lr"]) == (39.0, 6.25e-5)
    assert (numbers["short.rates_tried"], numbers["short.bracketed"]) == (2, 0)
    assert "short.wiki_loss" not in numbers


def test_a_long_run_gives_the_headline(numbers_of):
    numbers = numbers_of([swept(40.0, 200), swept(50.0, 2000)])
    assert (numbers["wiki_ppl"], numbers["c4_ppl"], numbers["lr"]) == (50.0, 250.0, 2e-3)
    assert (numbers["best_step"], numbers["wiki_loss"], numbers["tokens_m"]) == (1000, 3.5, 66)
    assert "val_loss_7" not in numbers and numbers["short.wiki_ppl"] == 40.0
    assert numbers["trainable_block_fraction"] == 1.0
    assert "rates_tried" not in numbers and "bracketed" not in numbers  # one pair is no grid


def test_long_runs_at_other_rates_than_the_short_ones_chose_have_these_in_their_names(numbers_of):
    """Runs at different rates are never averaged, nor is one of them the headline."""
    short = [swept(40.0, 200), swept(41.0, 200, rest_lr=6.4e-2)]
    numbers = numbers_of([*short, swept(30.0, 2000), swept(29.0, 2000, rest_lr=6.4e-2)])
    assert (numbers["wiki_ppl"], numbers["rest_lr"]) == (30.0, 1.6e-2)
    other = "at_0.002_0.064."
    assert (numbers[other + "wiki_ppl"], numbers[other + "rest_lr"]) == (29.0, 6.4e-2)
    assert numbers[other + "best_step"] == 1000
    numbers = numbers_of([*short, swept(29.0, 2000, rest_lr=6.4e-2), swept(28.0, 2000, 4e-3)])
    assert "wiki_ppl" not in numbers and numbers[other + "wiki_ppl"] == 29.0
    assert numbers["at_0.004_0.016.wiki_ppl"] == 28.0


def test_only_runs_that_differ_in_their_seeds_alone_have_a_mean(metrics):
    first, second = made_up("full", 30.0), made_up("full", 29.0, seed=1)
    second["config"] |= {"out": "elsewhere", "resume": True}
    assert metrics.pretraining.of_seeds([first, second])["wiki_ppl"] == 29.5
    for key, value in (("rest_lr", 6.4e-2), ("steps", 7), ("matmul", "fp8")):
        other = second | {"config": second["config"] | {key: value}}
        with pytest.raises(ValueError, match=f"-s1 has {key} {value}, .*-s1337 has"):
            metrics.pretraining.of_seeds([first, other])
    with pytest.raises(ValueError, match="one seed counts once"):
        metrics.pretraining.of_seeds([first, second, second])


def test_alternate_groups_have_the_short_runs_of_mora_share():
    module = load(FILE.parent.parent / "pretrain_250m" / "metrics.py")
    runs = [("mora_share", 200, 2e-3), ("mora_share", 200, 4e-3), ("remora_alternate", 2000, 2e-3),
            ("remora_alternate", 2000, 4e-3)]
    lengths = module.by_length([made_up(method, 40.0 + lr, lr, steps=steps, val_losses=[],
                                        options=f"-steps{steps}") for method, steps, lr in runs])
    found = module.long_runs(lengths, "remora_alternate", "muon")
    assert {prefix: [run["config"]["lr"] for run in seeds] for prefix, seeds in found.items()} == {
        "": [2e-3], "at_0.004_0.032.": [4e-3]}


def test_of_short_runs_one_seed_chooses_the_rates_that_all_its_numbers_are_of(numbers_of):
    worse = swept(41.0, 200, rest_lr=3.2e-2)
    again = json.loads(json.dumps(worse).replace("1337", "1"))
    numbers = numbers_of([swept(40.0, 200), worse, again | {"val_ppl": 39.0}])
    assert (numbers["short.wiki_ppl"], numbers["short.rest_lr"]) == (40.0, 1.6e-2)
    assert (numbers["short.rates_tried"], numbers["short.seeds"]) == (2, 1)


def test_a_long_run_has_the_speed_of_the_bench_with_its_restarts(tmp_path, numbers_of):
    runs = [swept(40.0, 200), swept(50.0, 2000)]
    assert not {"tokens_per_s", "peak_gib"} & numbers_of(runs).keys()  # two runs shared a GPU
    bench = {"250m.full_muon_fp8.tokens_per_s": 1e6, "250m.full_muon_fp8.peak_gib": 7.0,
             "250m.mixed_muon_fp8.tokens_per_s": 2000, "250m.mixed_muon_fp8.peak_gib": 8.0,
             "250m.mixed_muon_fp8.tokens_per_step": 2000, "250m.mixed_muon_fp8.restart_ms": 1e3}
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    assert (numbers_of(runs)["tokens_per_s"], numbers_of(runs)["peak_gib"]) == (1e6, 7.0)
    module = load(FILE.parent.parent / "pretrain_250m" / "metrics.py")
    assert module.alone(bench, "best", "muon") == {"tokens_per_s": round(2000 / 1.1),
                                                   "peak_gib": 8.0}
    assert module.alone(bench, "full", "adamw") == {}


def test_the_difference_of_fp8_is_to_the_run_in_bf16(tmp_path):
    module = load(FILE.parent.parent / "pretrain_250m" / "metrics.py")
    for name, loss in (("full_bf16", 2.0), ("full_fp8", 2.25), ("mora_fp8", 3.0)):
        lines = [{"config": {"optimizer": "muon", "lr": 1e-3, "rest_lr": 1e-2}},
                 {"step": 7, "val_loss": loss}, {"step": 8, "val_loss": loss - 0.5},
                 {"step": 8, "tokens_per_s": 5.0}]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {name: number for name, number in module.summarize(tmp_path).items()
             if "difference" in name}
    name = "full_fp8.muon.loss_difference"
    assert found == {f"{name}_7": 0.25, f"{name}_8": 0.25, f"{name}_std": 0.0}


def test_losses_of_long_runs_are_means_over_seeds(numbers_of):
    runs = [made_up("full", 50.0, rest_lr=1.6e-2, seed=seed, steps=2000, options="-steps2000",
                    val_losses=[[0, 11.0], [1000, loss], [2000, 3.0]])
            for seed, loss in ((1337, 3.5), (1, 2.0), (2, 2.3))]
    numbers = numbers_of([swept(40.0, 200), *runs])
    assert (numbers["val_loss_1000"], numbers["best_step"], numbers["seeds"]) == (2.6, 1000, 3)
    perplexities = [math.exp(loss) for loss in (3.5, 2.0, 2.3)]  # their mean, as in wiki_ppl
    assert numbers["best_ppl"] == pytest.approx(sum(perplexities) / 3, abs=1e-4)
    assert "trainable_block_fraction" not in numbers


def test_rates_that_diverged_close_a_grid_and_other_failures_do_not(numbers_of):
    cross = [swept(40.0, 200), swept(41.0, 200, 1e-3), swept(41.0, 200, rest_lr=8e-3),
             swept(41.0, 200, rest_lr=3.2e-2)]
    failed = {key: value for key, value in swept(0.0, 200, 4e-3).items()
              if key in ("name", "config")} | {"error": "UserError: step 9: nan"}
    numbers = numbers_of([*cross, failed])
    assert (numbers["short.rates_tried"], numbers["short.bracketed"]) == (5, 1)
    numbers = numbers_of([*cross, {**failed, "error": "OutOfMemoryError"}])
    assert (numbers["short.rates_tried"], numbers["short.bracketed"]) == (4, 0)
    assert numbers_of([failed]) == numbers_of([])  # all diverged: no numbers
