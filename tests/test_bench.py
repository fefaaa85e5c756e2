"""The bench measures what it says."""
import json

import torch

import bench
from train import prepare_model


def test_a_method_is_measured_in_a_process_of_its_own(tmp_path, capsys):
    bench.main(["--shape=tiny", "--methods=mora", "--steps=1", "--repeats=1", "--seq_len=16", "--batch=2", f"--json={tmp_path / 'b.json'}"])
    numbers = json.loads((tmp_path / "b.json").read_text())
    assert numbers["tiny.mora.tokens_per_s"] > 0 and numbers["tiny.mora.restart_ms"] > 0 and 0 < numbers["tiny.mora.mfu"] < 1.5
    assert numbers["tiny.mora.trainable_parameters"] == 223_308  # as train.py says of configs/tiny_mora.py
    assert "to full" in capsys.readouterr().out


def test_needed_flops_are_those_of_the_hand():
    cfg = bench.settings("tiny", "full", 0, 64, 2)
    linear = 4 * (4 * 128 * 128 + 3 * 128 * 352)
    head, attention = 128 * 257, 6 * 64 * 128 * 4
    for name, layers in (("full", 6 * linear), ("frozen", 4 * linear), ("mora", None), ("lora", None)):
        cfg = bench.settings("tiny", name, 16, 64, 2)
        model = bench.Llama(bench.LlamaConfig(vocab_size=257, **cfg.model()))
        prepare_model(cfg, model, torch.device("cpu"), 0)
        if layers is None:  # the frozen products, and those that give the update's gradients
            squares = 4 * (4 * (16 * 256) + 3 * (16 * 480)) if name == "lora" else 4 * (4 * 64 ** 2 + 3 * 87 ** 2)
            layers = 4 * linear + (4 if name == "lora" else 2) * squares
        assert bench.needed_flops(model, cfg) == layers + 6 * head + attention, name
