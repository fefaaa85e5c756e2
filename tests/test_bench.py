"""The bench measures what it prints."""
import json

import pytest
import torch

import bench
from config import UserError
from train import prepare_model

SMALL = ["--shape=tiny", "--steps=1", "--repeats=1", "--seq_len=16", "--batch=2"]
KEYS = {"tokens_per_s", "tokens_per_step", "slowest_over_fastest", "mfu", "gemm_tflops",
        "trainable_parameters"}


def test_a_method_is_measured(capsys):
    bench.main([*SMALL, "--child=mora"])
    numbers = json.loads(capsys.readouterr().out)
    assert set(numbers) == KEYS | {"restart_ms"}
    assert numbers["tokens_per_s"] > 0 and numbers["restart_ms"] > 0 and 0 < numbers["mfu"] < 1.5
    assert numbers["trainable_parameters"] == 223_308  # train.py's for tiny_mora


@pytest.mark.parametrize("world", (1, 2))
def test_tokens_of_all_batches_and_processes_of_a_step_count(monkeypatch, capsys, world):
    """A step of one second; three seconds for a matrix product."""
    shapes = []

    def three_seconds(work, repeats):
        work()
        return [3.0] * 13 if repeats == 13 else [4.0, 2.0, 3.0]

    monkeypatch.setattr(bench, "optimizer_step", lambda model, optimizer, ids, *rest:
                        shapes.append((*ids.shape,)))
    monkeypatch.setattr(bench, "seconds", three_seconds)
    monkeypatch.setattr(bench, "join_processes", lambda cfg: (0, world, torch.device("cpu")))
    monkeypatch.setattr(bench, "data_parallel", lambda model: model)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    bench.main([*SMALL, "--steps=3", "--accumulate=5", "--child=full"])
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["tokens_per_s"] == numbers["tokens_per_step"] == world * 5 * 2 * 16
    assert shapes == [(2, 5, 2, 16)] * 6  # the warm-up's three steps, then a block of three
    flops = 160 * 6 * (4 * (4 * 128 * 128 + 3 * 128 * 352) + 128 * 257 + 16 * 128 * 4)
    peak = 2 * 512 ** 3 / 3
    assert numbers["gemm_tflops"] == pytest.approx(peak / 1e12)
    assert numbers["mfu"] == pytest.approx(flops / peak)  # of one process
    assert numbers["slowest_over_fastest"] == 2


@pytest.mark.parametrize("method, merges", (("mora", True), ("mora_two_paths", False)))
def test_two_paths_are_measured_unmerged(monkeypatch, capsys, method, merges):
    def step(model, *rest):
        found.extend(layer.merges for _, layer in bench.mora.adapted_layers(model))

    found = []
    monkeypatch.setattr(bench, "optimizer_step", step)
    bench.main([*SMALL, "--quick", f"--child={method}"])
    assert {*found} == {merges}


def test_two_processes_are_measured_together(tmp_path, capsys):
    file = tmp_path / "bench.json"
    file.write_text('{"before": 1}')
    bench.main([*SMALL, "--methods=full", "--processes=2", f"--json={file}"])
    keys = {f"ddp2.tiny.full.{key}" for key in KEYS}
    assert set(json.loads(file.read_text())) == keys | {"before"}
    head, row = capsys.readouterr().out.splitlines()[1:]
    assert head.split()[:4] == ["method", "tokens/s", "to", "first"]
    assert row.split()[0] == "full" and row.split()[2] == "1.000" and row.split()[4] == "nan"
    assert len(head) == len(row)


def test_a_method_that_fails_is_named_and_has_no_numbers(tmp_path, monkeypatch, capsys):
    child = tmp_path / "child.py"
    child.write_text("import sys\nsys.exit(f'out of memory: {sys.argv[1:]}')")
    monkeypatch.setattr(bench, "__file__", str(child))
    assert bench.run_child(["--shape=tiny"], "mora", 1) is None
    assert capsys.readouterr().out == ("mora             failed: out of memory: "
                                       "['--shape=tiny', '--child=mora']\n")


def test_a_failed_method_fails_the_command_after_the_others_are_measured(monkeypatch, capsys):
    row = {"tokens_per_s": 5.0}
    monkeypatch.setattr(bench, "run_child", lambda argv, name, processes:
                        None if name in ("full", "lora") else row)
    with pytest.raises(UserError, match="^full, lora failed$"):
        bench.main([*SMALL, "--methods=full,mora,lora,frozen"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["mora", "frozen"]


def test_speeds_are_relative_to_the_first_method(monkeypatch, capsys):
    speeds = {"full_muon_fp8": 4.0, "mora": 5.0, "full": 2.0}
    monkeypatch.setattr(bench, "run_child", lambda argv, name, processes:
                        {"tokens_per_s": speeds[name]} if name in speeds else None)
    bench.main([*SMALL, f"--methods={','.join(speeds)}"])
    with pytest.raises(UserError):
        bench.main([*SMALL, "--methods=lora,mora"])
    ratios = [line.split()[2] for line in capsys.readouterr().out.splitlines()
              if line.split()[0] in speeds]
    assert ratios == ["1.000", "1.250", "0.500", "nan"]  # without the first there is none


def test_a_missing_folder_of_json_is_named_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "run_child", None)
    with pytest.raises(UserError, match="--json=.*absent/x.json: no such folder"):
        bench.main([*SMALL, "--methods=full", f"--json={tmp_path / 'absent' / 'x.json'}"])


def test_the_reason_is_the_error_of_the_process_not_the_last_line_of_torchrun(monkeypatch, capsys):
    done = bench.subprocess.CompletedProcess([], 1, "", "note\nerror: no memory\nTraceback\n====\n")
    monkeypatch.setattr(bench.subprocess, "run", lambda *words, **options: done)
    assert bench.run_child([], "mora", 2) is None
    assert capsys.readouterr().out == "mora             failed: error: no memory\n"


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
