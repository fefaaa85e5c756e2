"""The bench measures what it prints."""
import json

import pytest
import torch

import bench
from config import UserError
from train import prepare_model


def test_a_method_is_measured_in_its_own_process(tmp_path, capsys):
    file = tmp_path / "bench.json"
    bench.main(["--shape=tiny", "--methods=mora", "--steps=1", "--repeats=1", "--seq_len=16",
                "--batch=2", f"--json={file}"])
    numbers = json.loads(file.read_text())
    assert numbers["tiny.mora.tokens_per_s"] > 0 and numbers["tiny.mora.restart_ms"] > 0
    assert 0 < numbers["tiny.mora.mfu"] < 1.5
    assert numbers["tiny.mora.trainable_parameters"] == 223_308  # train.py's for tiny_mora
    assert "to full" in capsys.readouterr().out


def test_two_processes_are_measured_together(tmp_path):
    file = tmp_path / "bench.json"
    bench.main(["--shape=tiny", "--methods=full", "--steps=1", "--repeats=1", "--seq_len=16",
                "--batch=2", "--processes=2", f"--json={file}"])
    assert set(json.loads(file.read_text())) == {f"ddp2.tiny.full.{key}" for key in (
        "tokens_per_s", "slowest_over_fastest", "mfu", "gemm_tflops", "trainable_parameters",
        "reduced_mb_a_step")}


def test_a_method_that_fails_is_named_and_has_no_numbers(capsys):
    assert bench.run_child(["--shape=tiny", "--rank=many"], "mora", 1) is None
    assert "mora             failed: " in capsys.readouterr().out


def test_an_unknown_method_is_named():
    with pytest.raises(UserError, match="unknown method 'moar': choose from full, "):
        bench.main(["--methods=full,moar"])


@pytest.mark.parametrize("name", ("full", "frozen", "lora", "mora"))
def test_needed_flops_equal_a_count_by_hand(name):
    cfg = bench.settings("tiny", name, 16, 64, 2)
    model = bench.Llama(bench.LlamaConfig(vocab_size=257, **cfg.model()))
    prepare_model(cfg, model, torch.device("cpu"), 0)
    frozen = 4 * (4 * 128 * 128 + 3 * 128 * 352)
    layers = {"full": 6 * frozen,
              "frozen": 4 * frozen,
              "lora": 4 * frozen + 4 * 4 * (4 * 16 * 256 + 3 * 16 * 480),
              "mora": 4 * frozen + 2 * 4 * (4 * 64 ** 2 + 3 * 87 ** 2)}[name]
    head, attention = 6 * 128 * 257, 6 * 64 * 128 * 4
    assert bench.needed_flops(model, cfg) == layers + head + attention
