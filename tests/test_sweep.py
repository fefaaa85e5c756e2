"""Records of results/sweep.py hold what a run changed in the blocks."""
import importlib.util
import signal
from pathlib import Path

import pytest
import torch

import analyze
import mora
import train

RESULTS = Path(__file__).resolve().parent.parent / "results"
spec = importlib.util.spec_from_file_location("sweep", RESULTS / "sweep.py")
sweep = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sweep)


@pytest.fixture
def swept(config, tmp_path, monkeypatch):
    """swept("--key=value", ...): (record, {name: dW of a projection}) of a run of the sweep."""
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    original_train, original_build, seen = train.train, train.build_model, {}

    def build(*args):
        cfg, model = original_build(*args)
        seen.setdefault("first", {k: v.clone() for k, v in model.state_dict().items()})
        return cfg, model

    def run(cfg):
        seen["model"] = original_train(cfg)
        return seen["model"]

    def start(*words):
        record = sweep.run_one("name", [str(config), *words], [], tmp_path)
        last = mora.merged_weights(seen["model"])
        return record, {name: last[name] - first for name, first in seen["first"].items()
                        if name.split(".")[-2] in mora.PROJECTIONS}

    monkeypatch.setattr(train, "build_model", build)
    monkeypatch.setattr(train, "train", run)
    yield start
    for name, handler in handlers.items():
        signal.signal(name, handler)


@pytest.mark.parametrize("words", [
    ("--method=full", "--residual_init=true"), ("--groups=permute", "--restart_every=7"),
    ("--method=lora", "--dora=true"), ("--method=lora", "--matmul=fp8")],
    ids=("full", "ReMoRA", "DoRA", "FP8"))
def test_the_spectrum_is_that_of_the_change_since_the_first_weights(swept, words):
    record, changes = swept(*words)
    assert len(changes) == 2 * len(mora.PROJECTIONS)
    values = {name: torch.linalg.svdvals(change.double()) for name, change in changes.items()}
    expected = analyze.mean_measures(values)["all"]
    assert expected["rank"] > 1 and expected["singular_above_0.1"] > 0
    assert record["spectrum"] == pytest.approx(expected, rel=1e-3)


def test_the_trainable_share_of_the_blocks(swept):
    record, changes = swept("--method=full", "--steps=2")
    assert record["trainable_block_fraction"] == 1
    record, _ = swept("--method=lora", "--steps=2")
    lora = sum(2 * sum(change.shape) for change in changes.values())  # of rank 2
    total = sum(change.numel() for change in changes.values())
    assert record["trainable_block_fraction"] == pytest.approx(lora / total, abs=1e-4)


def test_frozen_blocks_change_by_nothing(swept):
    record, _ = swept("--method=frozen")
    assert record["trainable_block_fraction"] == 0
    assert record["spectrum"]["largest"] == record["spectrum"]["rank"] == 0


def test_the_change_of_a_run_from_a_checkpoint_is_since_that_checkpoint(run, swept):
    before = run("--method=lora", "--lr=0.03")
    record, _ = swept(f"--init_from={before}", "--lr=1e-30", "--steps=2")
    assert record["spectrum"]["largest"] < 1e-6


def test_the_rounding_of_a_bfloat16_base_is_no_change(swept):
    record, _ = swept("--base_dtype=bfloat16", "--train_rest=false", "--lr=1e-30", "--steps=2",
                      "--warmup=0")
    assert record["spectrum"]["largest"] < 1e-20


def test_a_float8_base_changes_by_its_update():
    linear = torch.nn.Linear(32, 16, bias=False)
    layer = mora.AdaptedLinear(linear, mora.Square(32, 16, 2, "share", "strided"))
    torch.nn.init.ones_(layer.update.M)
    layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)
    torch.testing.assert_close(sweep.change_of(layer, None), layer.update.delta())
