"""Spectra, log reading and schedules report what was put in."""
import json
import runpy
from pathlib import Path

import pytest
import torch

import analyze
import checkpoint
from config import UserError, load
from mora import OPERATORS


def write_log(path, *records, tail=""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


@pytest.fixture
def log(tmp_path):
    """A log of 40 steps of 100 tokens: 20 at 50 tokens/s, 20 at 200 tokens/s."""
    return write_log(
        tmp_path / "log.jsonl", {"config": {}, "start": 0, "tokens_per_step": 100},
        {"step": 0, "val_loss": 5.0}, {"step": 20, "loss": 4.0, "tokens_per_s": 50.0},
        {"step": 30, "val_loss": 3.5}, {"step": 40, "loss": 3.0, "tokens_per_s": 200.0},
        {"step": 40, "val_loss": 3.0})


# ---------------------------------------------------------------------------------------------
# spectra

def test_measures_of_a_known_spectrum():
    row = analyze.measures(torch.tensor([2.0, 1.0, 0.5, 0.05, 1e-4, 0.0]))
    assert row["singular_above_0.1"] == 3
    assert row["rank"] == 4
    assert row["largest"] == 2.0
    assert row["stable_rank"] == pytest.approx((4 + 1 + 0.25 + 0.0025 + 1e-8) / 4)
    assert row["energy_90"] == 2
    nothing = analyze.measures(torch.zeros(5))
    assert nothing["rank"] == nothing["largest"] == nothing["stable_rank"] == 0


def test_measures_are_means_over_the_layers_of_a_kind():
    values = {f"layers.{i}.{kind}.weight": torch.tensor([1.0 + i + j, 0.0])
              for i in range(3) for j, kind in enumerate(analyze.mora.PROJECTIONS)}
    means = analyze.mean_measures(values)
    assert [row["largest"] for row in means.values()] == [2, 3, 4, 5, 6, 7, 8, 5]
    assert [*means] == [*analyze.mora.PROJECTIONS, "all"]


def layers(out_features, in_features, delta=0.0):
    """One weight per kind of layer, all equal to delta."""
    return {f"model.layers.0.{kind}.weight": torch.full((out_features, in_features), delta)
            for kind in analyze.mora.PROJECTIONS}


def test_spectra_compare_weights_of_the_same_shape(tmp_path):
    values = analyze.spectra(layers(3, 4, 0.5), layers(3, 4))
    for part in values.values():  # a constant matrix has the one singular value c sqrt(12)
        torch.testing.assert_close(part, torch.tensor([3 ** 0.5, 0.0, 0.0]), rtol=0, atol=1e-6)
    for other in (layers(4, 3), {}):
        with pytest.raises(UserError, match=r"0\.q_proj\.weight, \(3, 4\), is missing or has"):
            analyze.spectra(layers(3, 4), other)
    with pytest.raises(UserError, match="is no checkpoint of a run.*set --since"):
        analyze.first_weights(tmp_path)


@pytest.mark.parametrize(("restarts", "rank"), [
    ((), 2), (("--restart_every=7", "--restart_warmup=1", "--residual_init=true"), 6)],
    ids=("LoRA", "ReLoRA"))
def test_spectra_of_a_run_count_its_rank(run, restarts, rank):
    """LoRA of rank 2 adds rank 2, ReLoRA of three cycles rank 6, since the seed's weights."""
    out = run("--method=lora", "--lr=0.03", *restarts)
    file = checkpoint.steps_of(out)[-1] / "state.json"
    state = json.loads(file.read_text())  # of a version with a key more
    file.write_text(json.dumps(state | {"config": state["config"] | {"former": 1}}))
    before = analyze.first_weights(file.parent)
    values = analyze.spectra(analyze.weights(out)[0], before)
    assert len(values) == 2 * len(analyze.mora.PROJECTIONS)
    means = analyze.mean_measures(values)
    assert means["q_proj"]["rank"] == means["down_proj"]["rank"] == rank


def test_the_first_weights_of_a_run_that_began_with_another_one(run, tmp_path):
    """The other run may have gone on since: the weights of its newest step are not those."""
    first = run("--steps=10", f"--out={tmp_path / 'first'}")
    begun = checkpoint.steps_of(first)[-1]
    words = "--steps=2", "--method=full"
    of_run = run(*words, f"--init_from={first}", f"--out={tmp_path / 'second'}")
    of_step = run(*words, f"--init_from={begun}", f"--out={tmp_path / 'third'}")
    run("--steps=12", f"--out={first}", "--resume")
    step = checkpoint.steps_of(of_run)[-1]
    with pytest.raises(UserError, match=f"{step} began with a step of the run {first}, not known "
                                        f"which: name it, as --since={first}/step-...$"):
        analyze.first_weights(step)
    before, weights = analyze.weights(begun)[0], analyze.first_weights
    torch.testing.assert_close(weights(checkpoint.steps_of(of_step)[-1]), before, rtol=0, atol=0)


def test_a_run_that_is_missing_is_found_before_the_others_are_computed(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(analyze, "spectra", None)
    with pytest.raises(UserError, match="absent does not exist"):
        analyze.main(["spectra", str(tmp_path), str(tmp_path / "absent")])


# ---------------------------------------------------------------------------------------------
# loss curves

def test_the_x_axis_is_steps_tokens_or_seconds(log):
    assert analyze.read_log(log) == {
        "loss": [(20, 4.0), (40, 3.0)], "val_loss": [(0, 5.0), (30, 3.5), (40, 3.0)]}
    tokens = analyze.read_log(log, "tokens")
    assert tokens["loss"] == [(2000, 4.0), (4000, 3.0)]
    assert tokens["val_loss"] == [(0, 5.0), (3000, 3.5), (4000, 3.0)]
    seconds = analyze.read_log(log, "seconds")  # 2000 / 50 = 40 s, then 2000 / 200 = 10 s
    assert seconds["loss"] == [(40.0, 4.0), (50.0, 3.0)]
    assert seconds["val_loss"] == [(0.0, 5.0), (45.0, 3.5), (50.0, 3.0)]


def test_validation_beyond_the_last_logged_loss_is_placed_at_the_last_speed(log):
    with log.open("a") as file:
        file.write(json.dumps({"step": 46, "val_loss": 2.0}) + "\n")
    assert analyze.read_log(log, "seconds")["val_loss"][-1] == (pytest.approx(53.0), 2.0)


def test_lines_of_a_resumed_run_replace_the_earlier_ones(log):
    with log.open("a") as file:
        file.write(json.dumps({"config": {}, "start": 20, "tokens_per_step": 100}) + "\n")
        file.write(json.dumps({"step": 40, "loss": 2.5, "tokens_per_s": 400.0}) + "\n")
    assert analyze.read_log(log, "seconds")["loss"] == [(40.0, 4.0), (45.0, 2.5)]


@pytest.mark.parametrize("ending", ["", "\n"])
def test_an_incomplete_last_line_is_left_out_with_a_note(log, ending, capsys):
    whole = analyze.read_log(log)
    with log.open("a") as file:
        file.write('{"step": 60, "lo' + ending)
    assert analyze.read_log(log) == whole
    assert f"{log}, line 7 is incomplete" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ['{"step": 25, "lo', "25", "\0\0\0"])
def test_a_damaged_line_elsewhere_is_an_error_with_its_number(log, damage):
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*lines[:3], damage, *lines[3:]]) + "\n")
    with pytest.raises(UserError, match=r"log\.jsonl, line 4 is not a JSON object"):
        analyze.read_log(log)


@pytest.mark.parametrize("record", [
    {"loss": 3.0, "epoch": 1}, {"val_loss": 3.0, "step": None}, {"loss": 3.0, "step": "60"},
    {"loss": "3.0", "step": 60}, {"loss": 3.0, "val_loss": [3.0], "step": 60}])
def test_a_line_of_another_programs_log_is_an_error_with_its_number(log, record):
    write_log(log, {"step": 20, "loss": 4.0}, {"epoch": 1}, {"step": 40, "loss": float("nan")})
    assert [step for step, _ in analyze.read_log(log)["loss"]] == [20, 40]
    write_log(log, {"step": 20, "loss": 4.0}, {"epoch": 1}, record, {"step": 40, "loss": 3.0})
    with pytest.raises(UserError, match=r"log\.jsonl, line 3: a loss and its step must be numbers, "
                                        "got {'"):
        analyze.read_log(log)


def test_a_log_that_lacks_what_an_axis_needs_is_an_error(tmp_path):
    path = tmp_path / "log.jsonl"
    with pytest.raises(FileNotFoundError, match="log.jsonl"):
        analyze.main(["losses", str(path)])
    write_log(path, {"tokens_per_step": 100}, {"step": 0, "val_loss": 5.0})
    with pytest.raises(UserError, match="no training loss yet"):
        analyze.read_log(path)
    write_log(path, {"step": 10, "loss": 5.0, "tokens_per_s": 1.0})
    with pytest.raises(UserError, match="log.jsonl lacks tokens_per_step.*--x=step, not tokens"):
        analyze.read_log(path, "tokens")
    write_log(path, {"tokens_per_step": 100}, {"step": 10, "loss": 5.0})
    assert analyze.read_log(path, "tokens")["loss"] == [(1000, 5.0)]
    with pytest.raises(UserError, match="lacks .*tokens_per_s: use --x=step, not seconds"):
        analyze.read_log(path, "seconds")


def test_seconds_of_a_real_run_are_its_tokens_over_its_speed(run):
    out = run("--log_every=5")
    records = analyze.read_records(out / "log.jsonl")
    speeds = [record["tokens_per_s"] for record in records if "tokens_per_s" in record]
    tokens = 5 * 8 * 16  # steps, batch_size, seq_len
    expected = sum(tokens / speed for speed in speeds)
    assert analyze.read_log(out, "seconds")["loss"][-1][0] == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------
# the learning rate

@pytest.fixture
def drawn_steps(monkeypatch):
    """drawn_steps(words) is the number of steps that `analyze.py schedule` draws."""
    figures = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *args, **kw: drawn.append(self))

    def count(*words):
        analyze.main(["schedule", *words])
        (axis,) = drawn.pop().axes
        (line,) = axis.lines
        return len(line.get_xdata())

    return count


@pytest.mark.parametrize("samples", [False, True], ids=("text", "samples"))
def test_the_schedule_of_epochs_has_the_steps_that_training_takes(run, config, pairs, samples,
                                                                  drawn_steps):
    words = ["--epochs=0.02", "--warmup=1", "--eval_every=100", "--save_every=100"]
    if samples:
        words += ["--epochs=0.3", "--seq_len=64", f"--data={pairs}"]
    records = analyze.read_records(run(*words) / "log.jsonl")
    steps = max(record.get("step", 0) for record in records)
    assert drawn_steps(str(config), *words) == steps > 1
    assert steps != drawn_steps(str(config)) == 20  # the steps that the config file sets


def test_the_schedule_of_epochs_without_data_asks_for_steps(config, tmp_path, drawn_steps):
    words = [str(config), "--epochs=3", f"--data={tmp_path / 'absent'}"]
    with pytest.raises(UserError, match=r"epochs = 3 need.*--steps=N: no .*absent") as caught:
        drawn_steps(*words)
    assert "\n" not in str(caught.value)
    assert drawn_steps(*words, "--steps=50") == 50


def test_schedule_passes_all_other_words_to_config(config, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    words = []

    def remember(argv, default):
        words.extend(argv)
        return load([str(config)], default)

    monkeypatch.setattr("config.load", remember)
    analyze.main(["schedule", "configs/task.py", "mora_r8", f"--png={tmp_path / 'x.png'}",
                  "--lr=1e-3"])
    assert words == ["configs/task.py", "mora_r8", "--lr=1e-3"]


# ---------------------------------------------------------------------------------------------
# pictures

def test_every_command_draws_and_a_checkpoint_equals_itself(run, config, log, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = run("--steps=1", "--warmup=1")
    (step,) = checkpoint.steps_of(out)
    for words in (["spectra", str(out), str(step / "base"), f"--since={out}"],
                  ["losses", str(out), str(log), "--x=seconds"],
                  ["schedule", str(config), "--restart_every=5"], ["operators"]):
        png = tmp_path / f"{words[0]}.png"
        analyze.main([*words, f"--png={png}"])
        assert png.read_bytes()[:4] == b"\x89PNG"
    lines = capsys.readouterr().out.splitlines()
    titles = next(line for line in lines if "stable rank" in line)
    assert "singular above 0.1" in titles and "energy 90" in titles
    means = next(line.split() for line in lines if line.startswith("all  "))
    assert {*means[1:4], means[5]} == {"0.000"}  # all but energy_90


def test_a_png_that_cannot_be_written_and_unknown_words_are_one_line(log, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(FileNotFoundError, match="absent"):
        analyze.main(["losses", str(log), f"--png={tmp_path / 'absent' / 'x.png'}"])
    with pytest.raises(UserError, match="--png=x.tex cannot be written"):
        analyze.main(["losses", str(log), "--png=x.tex"])
    for words, line in ((["losses", "x", "--nonsense"], "unknown arguments: --nonsense"),
                        (["losses"], "at least one, got losses"),
                        (["operators", "x"], "operators takes no path, .* got operators x")):
        with pytest.raises(UserError, match=line):
            analyze.main(words)


def test_a_picture_is_written_to_the_very_file(log, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "curve.png").write_text("of another run")
    analyze.main(["losses", str(log), f"--png={tmp_path / 'curve'}"])
    assert capsys.readouterr().out == f"wrote {tmp_path / 'curve'}\n"
    assert (tmp_path / "curve").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "curve.png").read_text() == "of another run"


def test_the_figure_of_operators_has_the_ranks_of_the_algebra():
    figure = runpy.run_path(Path(__file__).parent.parent / "docs" / "figures.py")
    square, wide, merged = figure["operator_panels"]()

    def ranks(panels):
        return [int(torch.linalg.matrix_rank(delta)) for _, delta in panels]

    assert [title.split(",")[0] for title, _ in square] == ["LoRA", *OPERATORS]
    assert ranks(square) == [1, 8, 8, 36, 36]
    assert ranks(wide) == [1, 10, 10, 36, 36]
    assert ranks(merged) == [8, 15, 15, 15, 29]


@pytest.mark.parametrize(("words", "line"), [
    (["losses", "RUN", "--since=absent"], "^--since belongs to spectra alone$"),
    (["schedule", "CONFIG", "--x=tokens"], "^--x belongs to losses alone$")])
def test_an_option_of_another_command_is_refused(words, line):
    with pytest.raises(UserError, match=line):
        analyze.main(words)
