"""results/rates.py, gsm8k/metrics.py: which runs follow from which, paired tests; a variant."""
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import rates

RESULTS = Path(rates.__file__).parent
GROUP = ("task", "method", "muon")


def score(record):
    return (record["loss"],)


def planned(losses, centre=1e-2):
    """Names' ends ("s1337-0.01") of the runs that follow from {name's end: loss or error}."""
    records = {f"task-method-muon-{end}": {"error": loss} if isinstance(loss, str) else
               {"loss": loss} for end, loss in losses.items()}
    found = rates.runs({GROUP: centre}, records, score, lambda *run: run)
    return [name.removeprefix("task-method-muon-") for name in found]


def test_the_grid_has_two_rates_per_power_of_ten():
    assert [rates.beside(1e-3, count) for count in range(-3, 4)] == [
        3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
    assert rates.beside(3e-4, 1) == 1e-3 and rates.beside(0.3, 2) == 3.0


def test_names_are_read_back():
    name = rates.name_of(GROUP, 7, 3e-5)
    assert rates.parts_of(name) == (GROUP, 7, 3e-5)


def test_the_middle_rate_runs_first_then_one_beside_it_then_what_the_best_lacks():
    assert planned({}) == ["s1337-0.01", "s1337-0.03"]
    assert planned({"s1337-0.01": 2.0}) == ["s1337-0.01", "s1337-0.03"]
    assert planned({"s1337-0.01": 2.0, "s1337-0.03": 3.0})[2:] == ["s1337-0.003"]
    assert planned({"s1337-0.01": 2.0, "s1337-0.03": 1.0})[2:] == ["s1337-0.1"]
    adamw = rates.runs({(*GROUP[:2], "adamw"): 1e-2}, {}, score, lambda *run: run)
    assert [rates.parts_of(name)[2] for name in adamw] == [0.01, 0.003]


def test_a_best_rate_at_the_edge_is_followed_further_out():
    first = {"s1337-0.01": 2.0, "s1337-0.003": 3.0, "s1337-0.03": 1.0}
    assert planned(first)[3:] == ["s1337-0.1"]
    assert planned(first | {"s1337-0.1": 0.5})[4:] == ["s1337-0.3"]
    assert planned({"s1337-0.01": 2.0, "s1337-0.03": 1.0, "s1337-0.1": 3.0})[3:] == [
        "s1338-0.03", "s1339-0.03"]
    diverged = dict.fromkeys(("s1337-0.01", "s1337-0.03"), "UserError: step 9: loss nan")
    assert planned(diverged)[2:] == ["s1337-0.003"]


def test_a_best_rate_inside_gets_seeds_and_a_run_that_diverged_is_the_worst():
    losses = {"s1337-0.01": 2.0, "s1337-0.003": 3.0, "s1337-0.03": "UserError: step 9: loss nan"}
    assert planned(losses)[3:] == ["s1338-0.01", "s1339-0.01"]
    for error in ("OutOfMemoryError: no memory", "UserError: data/stdlib is in use by process 9"):
        assert planned(losses | {"s1337-0.03": error})[3:] == []


def test_a_rate_that_was_left_out_keeps_a_grid_open():
    """The centre was moved from 1e-3 after three runs: 3e-3 may be better than all others."""
    moved = {"s1337-0.01": 3.0, "s1337-0.03": 4.0, "s1337-0.0003": 2.0, "s1337-0.001": 1.0}
    assert planned(moved)[4:] == ["s1337-0.003"]
    assert planned(moved | {"s1337-0.003": 2.0})[5:] == ["s1338-0.001", "s1339-0.001"]


def test_rates_half_way_follow_a_closed_grid_and_are_not_halved_again():
    def halves(**losses):
        names = {rates.name_of(GROUP, rates.SEED, float(lr)): {"loss": loss}
                 for lr, loss in losses.items()}
        return rates.halves(names, GROUP, score)

    closed = {"0.003": 3.0, "0.01": 2.0, "0.03": 4.0}
    assert halves(**closed) == halves(**closed, **{"0.0055": 1.0}) == [0.0055, 0.017]
    assert halves(**{"0.003": 3.0, "0.01": 2.0}) == halves() == []
    # the best of all gets the seeds, also if it is half way
    ends = {f"s1337-{lr}": loss for lr, loss in (closed | {"0.0055": 1.0}).items()}
    assert planned(ends)[4:] == ["s1338-0.0055", "s1339-0.0055"]


def test_a_search_ends_after_seven_rates():
    """The higher the rate, the lower the loss."""
    losses = {}
    while missing := [end for end in planned(losses) if end not in losses]:
        assert len(missing) <= 2
        losses |= {end: -float(end.removeprefix("s1337-")) for end in missing}
    assert sorted(losses) == [f"s1337-{lr}" for lr in
                              ("0.01", "0.03", "0.1", "0.3", "1", "10", "3")]


def test_of_several_groups_each_gets_its_next_rate_before_any_its_second_next():
    groups = {("task", method, "adamw"): 1e-2 for method in "ab"}
    found = rates.runs(groups, {}, score, lambda group, lr, seed: (group[1], lr, seed))
    assert [*found.values()] == [("a", 1e-2, 1337), ("b", 1e-2, 1337),
                                 ("a", 3e-3, 1337), ("b", 3e-3, 1337)]


def test_scores_are_of_one_group_and_one_seed():
    others = [("other", "method", "muon"), ("task", "other", "muon"), ("task", "method", "adamw")]
    records = {rates.name_of(group, rates.SEED, 1e-2): {"loss": 1.0} for group in others}
    records |= {rates.name_of(GROUP, seed, 1e-2): {"loss": float(seed)} for seed in rates.SEEDS}
    assert rates.scores_of(records, GROUP, score) == {1e-2: (1337.0,)}
    assert rates.scores_of(records, GROUP, score, seed=1339) == {1e-2: (1339.0,)}


def test_a_report_has_the_seeds_of_the_best_rate_that_ended(capsys):
    ends = {(1339, 1e-2): {"loss": 3.0}, (1337, 1e-2): {"loss": 1.0}, (1337, 3e-2): {"loss": 2.0},
            (1338, 3e-2): {"loss": 0.0}, (1338, 1e-2): {"error": "OutOfMemoryError"}}
    records = {(name := rates.name_of(GROUP, *end)): {"name": name} | record
               for end, record in ends.items()}
    other = ("task", "other", "muon")
    (group, seeds, is_inside), = rates.report(records, {GROUP: 1e-2, other: 1e-2}, score)
    assert group == GROUP and not is_inside
    assert [record["loss"] for record in seeds] == [1.0, 3.0]
    printed = capsys.readouterr().out
    assert "s1338-0.01 failed: OutOfMemoryError" in printed
    assert "best 0.01, AT THE EDGE\n    0.01: 1.0000\n    0.03: 2.0000\n" in printed


def test_a_better_rate_half_way_is_reported_once_it_has_all_seeds():
    """Its one seed is the least of more rates; until then, what was published stays."""
    losses = {3e-3: 3.0, 1e-2: 2.0, 3e-2: 4.0, 5.5e-3: 1.0}
    records = {rates.name_of(GROUP, rates.SEED, lr): {"loss": loss} for lr, loss in losses.items()}
    records |= {rates.name_of(GROUP, seed, 1e-2): {"loss": 2.5} for seed in rates.SEEDS[1:]}

    def reported():
        named = {name: {"name": name} | record for name, record in records.items()}
        (_, seeds, is_inside), = rates.report(named, {GROUP: 1e-2}, score)
        assert is_inside
        return [record["loss"] for record in seeds]

    assert reported() == [2.0, 2.5, 2.5]
    records |= {rates.name_of(GROUP, seed, 5.5e-3): {"loss": 1.5} for seed in rates.SEEDS[1:]}
    assert reported() == [1.0, 1.5, 1.5]


def test_the_deviation_of_a_sample_and_none_of_one_value():
    assert rates.spread("loss", [1.0, 3.0]) == {"loss_std": pytest.approx(2 ** 0.5)}
    assert rates.spread("loss", [1.0]) == {}


def test_half_a_last_line_is_left_out_and_half_a_line_before_it_is_an_error(tmp_path):
    path, line = tmp_path / "sweep.jsonl", '{"name": "%s"}'
    assert rates.read(path) == {}
    path.write_text(line % "a" + "\n" + line % "b")
    assert list(rates.read(path)) == ["a", "b"]
    path.write_text(line % "a" + '\n{"name": ')
    assert list(rates.read(path)) == ["a"]
    path.write_text('{"name": \n' + line % "b" + "\n")
    with pytest.raises(ValueError):
        rates.read(path)


def test_gsm8k_runs_one_rate_above_each_best_one_and_muons_once_its_grid_is_closed():
    above = runpy.run_path(str(RESULTS / "gsm8k" / "plan.py"))["above"]
    adamw, muon = ("gsm8k", "fft", "adamw"), ("gsm8k", "fft", "muon")
    losses = {1e-4: 9.0, 3e-4: 8.0, 1e-3: 8.5}
    records = {rates.name_of(muon, rates.SEED, lr): {"gsm8k_dev_ppl": loss}
               for lr, loss in losses.items()}
    assert above({})[adamw] == 1e-3 and muon not in above({})
    assert above(records)[muon] == 1e-3
    half = {rates.name_of(muon, seed, 1.7e-4): {"gsm8k_dev_ppl": 7.0} for seed in rates.SEEDS}
    assert above(records | dict([*half.items()][:2]))[muon] == 1e-3  # as in metrics.json
    assert above(records | half)[muon] == 3e-4
    del records[rates.name_of(muon, rates.SEED, 1e-3)]
    assert muon not in above(records)


@pytest.mark.parametrize("a, b, low, high", [
    ([1] * 30 + [0] * 70, [0] * 30 + [0] * 70, 0, 1e-3),  # 30 questions for A, none for B
    ([1, 0] * 50, [0, 1] * 50, 0.9, 1),                   # 50 each
    ([1] * 8 + [0] * 92, [0] * 7 + [0] * 93, 0.005, 0.011),  # McNemar's exact p is 2 / 2 ** 8
])
def test_the_paired_test(a, b, low, high, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    paired = runpy.run_path(str(RESULTS / "gsm8k" / "metrics.py"))["paired"]
    result = paired(np.array(a, float), np.array(b, float), np.random.default_rng(0))
    assert result["difference"] == pytest.approx(np.mean(a) - np.mean(b))
    assert low <= result["p"] <= high
    assert result["low"] <= result["difference"] <= result["high"]


def test_the_bounds_of_a_difference_hold_95_percent(monkeypatch):
    """Of 400 questions each program answers another half: the mean's deviation is 1 / 20."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    paired = runpy.run_path(str(RESULTS / "gsm8k" / "metrics.py"))["paired"]
    a = np.array([1.0, 0.0] * 200)
    result = paired(a, 1 - a, np.random.default_rng(0))
    assert result["high"] == pytest.approx(1.96 / 20, abs=0.006)
    assert result["low"] == pytest.approx(-1.96 / 20, abs=0.006)


def test_a_variant_that_starts_at_full_rank_still_runs(run):
    variants = runpy.run_path(str(RESULTS / "close_gap" / "variants.py"))
    with variants["applied"]("warm=3"):
        run("--groups=permute", "--steps=6")
