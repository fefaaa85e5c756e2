"""Spectra say what was put in."""
import pytest
import torch

import analyze
import checkpoint
from config import UserError


def test_measures_of_a_known_spectrum():
    row = analyze.measures(torch.tensor([2.0, 1.0, 0.5, 0.05, 1e-4, 0.0]))
    assert row["singular_above_0.1"] == 3 and row["rank"] == 4 and row["largest"] == 2.0
    assert row["stable_rank"] == pytest.approx((4 + 1 + 0.25 + 0.0025 + 1e-8) / 4) and row["energy_90"] == 2
    assert analyze.measures(torch.zeros(5))["rank"] == 0


def test_spectra_of_a_run_count_its_rank(run, capsys, tmp_path):
    """LoRA of rank 2 adds rank 2; ReLoRA of three cycles rank 6; first weights come back from the seed."""
    for restarts, rank in (([], 2), (["--restart_every=7", "--restart_warmup=1"], 6)):
        out = run("--method=lora", "--lr=0.03", *restarts, f"--out={tmp_path / str(rank)}")
        found = analyze.spectra(analyze.weights(out)[0], analyze.first_weights(checkpoint.steps_of(out)[-1]))
        assert all(len(layers) == 2 for layers in found.values())
        means = analyze.mean_measures(found)
        assert means["q_proj"]["rank"] == means["down_proj"]["rank"] == rank
    steps = checkpoint.steps_of(out)
    assert analyze.mean_measures(analyze.spectra(analyze.weights(steps[1])[0], analyze.weights(steps[1])[0]))["all"]["largest"] == 0.0
    with pytest.raises(UserError, match="--since"):
        analyze.first_weights(steps[0] / "base")


def test_commands_draw(run, config, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = run()
    for words in (["spectra", str(out)], ["losses", str(out), str(out / "log.jsonl")], ["schedule", str(config), "--restart_every=5"]):
        png = tmp_path / f"{words[0]}.png"
        analyze.main([*words, f"--png={png}"])
        assert png.read_bytes()[:4] == b"\x89PNG"
    assert "stable rank" in capsys.readouterr().out
    with pytest.raises(UserError, match="can not be read"):
        analyze.main(["losses", str(tmp_path / "nothing")])
