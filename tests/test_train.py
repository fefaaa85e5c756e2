"""A run that was stopped, split or continued is the run that was not."""
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import data
import tokenizer
import train
from config import Config, UserError, lock

ROOT = Path(__file__).parent.parent


def records(run, key="loss"):
    """{step: value} of log.jsonl; a resumed run's later line wins."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line and "step" in line}


def contents(step):
    """Every tensor of a checkpoint, the optimizer's too."""
    tensors = {}
    for file in sorted(step.rglob("*.safetensors")):
        tensors |= load_file(file)
    optimizer = torch.load(step / "optimizer.pt", weights_only=True)
    for i, state in optimizer["state"].items():
        tensors |= {f"{i} {key}": value for key, value in state.items()}
    return tensors


def same(a, b):
    a, b = contents(a), contents(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


METHODS = {
    "full": ["--method=full"],
    "rotate": ["--operator=rotate", "--tie_word_embeddings=true"],
    "remora": ["--groups=permute", "--restart_every=7", "--restart_warmup=2"],
    "relora": ["--method=lora", "--restart_every=10"],
    "pruned": ["--restart_steps=3,12", "--restart_keep=0.5"],
    "lora+": ["--method=lora", "--lora_plus_ratio=4", "--dora=true", "--dropout=0.1"],
    "asylora": ["--method=lora", "--lora_A=frozen", "--rslora=true", "--alpha=4",
                "--restart_every=7"],
    "dora": ["--dora=true", "--groups=permute", "--restart_every=7"],
}


@pytest.mark.filterwarnings("ignore:dropout")
@pytest.mark.parametrize("method", METHODS)
def test_resume_is_bitwise_identical(run, method):
    whole = run(*METHODS[method])
    out = str(whole.with_name("parts"))
    half = run(*METHODS[method], f"--out={out}", "--keep=0")
    for step in checkpoint.steps_of(half)[1:]:  # as if it had been killed right after step 10
        step.rename(step.with_name(".lost"))
    assert run(*METHODS[method], f"--out={out}", "--resume") == half
    assert same(whole / "step-00000020", half / "step-00000020")
    assert records(whole) == records(half)
    assert records(whole, "val_loss") == records(half, "val_loss")


def test_a_killed_process_resumes_bitwise(run, config):
    overrides = ["--groups=permute", "--restart_every=7"]
    whole, killed = run(*overrides), config.parent / "killed"
    command = [sys.executable, "train.py", str(config), *overrides, f"--out={killed}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (killed / "step-00000010").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = [step.name for step in checkpoint.steps_of(killed)]
    assert saved in (["step-00000010"], ["step-00000010", "step-00000020"])
    run(*overrides, f"--out={killed}", "--resume")
    assert same(whole / "step-00000020", killed / "step-00000020")


def test_ctrl_c_saves_before_it_stops(run, config):
    command = [sys.executable, "train.py", str(config), "--steps=100000", "--save_every=100000"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if " loss " in line and "validation" not in line:
            break
    process.send_signal(signal.SIGINT)
    rest = process.communicate()[0]
    newest = checkpoint.steps_of(config.parent / "run")[-1]
    step = int(newest.name.removeprefix("step-"))
    assert process.returncode == 130 and f"stopped and saved at step {step}" in rest
    assert json.loads((newest / "state.json").read_text())["step"] == step


# train.py, with every rank's tensors (buffers too: the groups) left in a file at each evaluation
SPY = """
import os, signal, sys, torch, train
learning_rate = train.learning_rate
def interrupt(step, cfg):  # on one rank only, as when a cluster takes a node away
    if str(step) == os.environ.get("INTERRUPT") and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return learning_rate(step, cfg)
train.learning_rate = interrupt
perplexity = train.perplexity
def spy(model, *args):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    torch.save(tensors, f"{sys.argv[2]}/rank{os.environ['RANK']}.pt")
    return perplexity(model, *args)
train.perplexity = spy
train.main(sys.argv[1:2] + sys.argv[3:])
"""


def torchrun(config, *overrides, **environment):
    folder = config.parent
    (folder / "spy.py").write_text(SPY)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(folder / "spy.py"), str(config), str(folder), *overrides]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60,
                          env=variables)


@pytest.mark.parametrize("method", ("remora", "relora"))
def test_two_processes_equal_one(run, config, method):
    """The losses are equal to float32 rounding, across two restarts; ranks agree bit for bit."""
    one, two = run(*METHODS[method], "--restart_every=7"), config.parent / "two"
    done = torchrun(config, *METHODS[method], "--restart_every=7", f"--out={two}")
    assert done.returncode == 0, done.stderr
    for key in ("loss", "val_loss", "grad_norm"):
        assert records(two, key) == pytest.approx(records(one, key), rel=1e-5), key
    first, second = (torch.load(config.parent / f"rank{rank}.pt") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    assert any(key.endswith("fold_in.order") for key in first) == (method == "remora")
    assert records(two, "restart") == {7: 1, 14: 2}


def test_a_signal_to_one_rank_stops_all_together(config):
    out = config.parent / "stopped"
    done = torchrun(config, f"--out={out}", "--log_every=4", "--steps=1000", INTERRUPT="5")
    assert "stopped and saved at step 8" in done.stdout
    assert [step.name for step in checkpoint.steps_of(out)] == ["step-00000008"]


def test_accumulation_equals_big_batch(run):
    big = run("--micro_batch=8", "--steps=5")
    small = run("--micro_batch=1", "--steps=5", f"--out={big.with_name('small')}")
    assert records(small) == pytest.approx(records(big), rel=1e-5)


def test_loss_falls(run):
    losses = records(run("--steps=60", "--eval_every=60", "--save_every=60"))
    assert losses[60] < losses[1] - 1


def test_the_frozen_weights_stay_and_the_rest_moves(run):
    a, b = (load_file(step / "base" / "model.safetensors") for step in checkpoint.steps_of(run()))
    for name in a:
        assert torch.equal(a[name], b[name]) == ("_proj" in name), name


def test_only_the_newest_are_kept_and_nothing_half_written(run, config):
    (config.parent / "run" / ".writing-step-00000003" / "base").mkdir(parents=True)
    (config.parent / "run" / ".removing-step-00000001").mkdir()
    out = run("--save_every=3", "--keep=2")
    names = sorted(path.name for path in out.iterdir())
    assert names == ["config.json", "log.jsonl", "step-00000018", "step-00000020"]


def test_a_loss_that_is_not_finite_stops_the_run(run, config):
    """The error names the first such step, which need not be the one of a log line."""
    huge = ["--lr=4e9", "--grad_clip=0", "--steps=60", "--log_every=7", "--save_every=10"]
    with pytest.raises(UserError, match=r"^step 2: loss .*nothing was saved: start again with a "
                                        r"lower --lr \(now 4e\+09\)"):
        run(*huge)
    run("--steps=10")
    with pytest.raises(UserError, match=r"^step 1[12]: loss .*the last good checkpoint is "
                                        r"\S*step-00000010: continue from it with --resume and "
                                        r"a lower --lr \(now 4e\+09\)"):
        run(*huge, "--resume")
    assert [step.name for step in checkpoint.steps_of(config.parent / "run")] == ["step-00000010"]


def test_two_runs_do_not_mix(run):
    run("--steps=10")
    with pytest.raises(UserError, match="reached step-00000010: continue it with --resume"):
        run("--steps=10")
    with pytest.raises(UserError, match="dora was False, now True; rank was 2, now 4"):
        run("--steps=20", "--resume", "--rank=4", "--dora=true")
    with pytest.raises(UserError, match=r"step-00000010 is past the last step: steps is 9; take "
                                        r"--steps=10 or more$"):
        run("--steps=9", "--resume")
    assert max(records(run("--steps=12", "--resume"))) == 12  # the same run may become longer


def test_a_folder_in_use_is_refused(run, config):
    """The lock names the process that holds it; a lock file that a dead process left is free."""
    out = config.parent / "run"
    out.mkdir()
    with lock(out, "a test"), pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
        run("--steps=1")
    assert list(out.iterdir()) == []
    (out / ".lock").write_text("process 1 on nowhere\n")
    run("--steps=1")
    assert not (out / ".lock").exists()


def test_a_corpus_that_changed_is_noticed_on_resume(run, tmp_path):
    folder = tmp_path / "corpus"
    for text in ("one", "two"):
        def texts(text=text):
            return [f"{text} {i}" * 20 for i in range(200)]
        data.prepare(folder, tokenizer.load("bytes"), {"source": text},
                     [(texts, data.every_100th)])
        if text == "one":
            run(f"--data={folder}", "--steps=10")
            run(f"--data={folder}", "--steps=11", "--resume")
            shutil.rmtree(folder)
    with pytest.raises(UserError, match="the tokens in .*corpus changed since"):
        run(f"--data={folder}", "--steps=12", "--resume")


def test_full_rank_warm_start(run):
    """init_from: adapters on the weights of a full-rank run; the loss is that of its end."""
    warm = run("--method=full", "--steps=60", "--eval_every=60", "--save_every=60")
    out = run(f"--init_from={warm}", f"--out={warm.with_name('adapted')}", "--steps=5",
              "--hidden_size=32")
    assert records(out, "val_loss")[0] == pytest.approx(records(warm, "val_loss")[60], rel=1e-5)
    assert json.loads((out / "config.json").read_text())["hidden_size"] == 16


def test_learning_rate_golden():
    """Values computed by hand from ReLoRA's jagged schedule, around its warm-ups and restarts."""
    golden = {0: 0.01, 49: 0.5, 99: 1.0, 100: 1.0, 299: 0.89572759, 300: 0.08844152,
              304: 0.44220759, 309: 0.88441517, 310: 0.88441517, 599: 0.47340573, 600: 0.04564397,
              609: 0.45643974, 610: 0.45643974, 999: 0.10000274}
    cfg = Config(lr=1.0, steps=1000, warmup=100, restart_every=300, restart_warmup=10)
    rates = {step: train.learning_rate(step, cfg) for step in golden}
    assert rates == pytest.approx(golden, abs=1e-7)
    plain = dataclasses.replace(cfg, restart_every=0)
    assert train.learning_rate(300, plain) == pytest.approx(0.89472, abs=1e-5)
    assert train.learning_rate(1000, plain) == pytest.approx(0.1)
    constant = dataclasses.replace(plain, min_lr_ratio=1.0, warmup=0)
    assert train.learning_rate(500, constant) == 1.0
    line = dataclasses.replace(plain, schedule="linear", min_lr_ratio=0.2)
    golden = {49: 0.5, 99: 1.0, 100: 1.0, 550: 0.6, 1000: 0.2}
    rates = {step: train.learning_rate(step, line) for step in golden}
    assert rates == pytest.approx(golden)
