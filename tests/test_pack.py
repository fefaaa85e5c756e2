"""results/pack_base.py: weights of 4 and 8 bits come back bit for bit, and so do others."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

SCRIPT = Path(__file__).resolve().parent.parent / "results" / "pack_base.py"


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True,
                          timeout=120)


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    d = ((1 + torch.rand(40, 6, 1)) / 50).half().float()
    m = (d * (7 + torch.rand(40, 6, 1))).half().float()
    codes = torch.randint(0, 16, (40, 6, 32))
    codes[..., 3], codes[..., 8] = 0, 15
    four = d * codes - m
    eight = torch.randint(-126, 127, (8, 3, 32)).float()
    eight[..., 5] = 127
    eight = eight * (torch.rand(8, 3, 1) / 100).half().float()
    weights = {"four": four.flatten(1), "eight": eight.flatten(1), "zero": torch.zeros(2, 32),
               "other": torch.randn(4, 64), "norm": torch.randn(7)}
    (tmp_path / "base").mkdir()
    save_file({name: weight.bfloat16() for name, weight in weights.items()},
              tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}\n")
    return tmp_path / "base"


def test_a_packed_model_comes_back_bit_for_bit(base, tmp_path):
    packed = run("pack", base, tmp_path / "part", "2")
    assert "2 q4, 1 q8, 2 raw" in packed.stdout, packed
    parts = [tmp_path / "part.0", tmp_path / "part.1"]
    assert run("unpack", tmp_path / "again", *parts).returncode == 0
    before, after = (load_file(folder / "model.safetensors")
                     for folder in (base, tmp_path / "again"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert torch.equal(weight.view(torch.int16), after[name].view(torch.int16)), name
    assert (tmp_path / "again" / "config.json").read_text() == "{}\n"


def test_a_lost_part_is_noticed(base, tmp_path):
    run("pack", base, tmp_path / "part", "2")
    assert run("unpack", tmp_path / "again", tmp_path / "part.0").returncode != 0
