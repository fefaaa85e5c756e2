"""results/sweep.py: records hold what a run changed in the blocks; workers share growing plans."""
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import answered
import pytest
import rates
import sweep
import torch
from conftest import stopped_copy

import analyze
import checkpoint
import data
import mora
import sft
import tokenizer
import train
from config import Config
from model import Llama, LlamaConfig, block_linears


@pytest.fixture
def handlers():
    """Signals are handled after a test as before it."""
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


@pytest.fixture
def swept(config, tmp_path, monkeypatch, handlers):
    """swept("--key=value", ...): (record, {name: dW of a projection}) of a run of the sweep."""
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
    return start


@pytest.mark.parametrize("words", [
    ("--method=full", "--residual_init=true"), ("--groups=permute", "--restart_every=7"),
    ("--method=lora", "--dora=true"), ("--method=lora", "--matmul=fp8")],
    ids=("full", "ReMoRA", "DoRA", "FP8"))
def test_the_spectrum_is_that_of_the_change_since_the_first_weights(swept, words):
    record, changes = swept(*words)
    assert len(changes) == 2 * len(mora.PROJECTIONS)
    values = {name: torch.linalg.svdvals(change.double()) for name, change in changes.items()}
    expected = analyze.mean_measures(values)
    assert expected["all"]["rank"] > 1 and expected["all"]["singular_above_0.1"] > 0
    assert record["spectrum"] == pytest.approx(expected.pop("all"), rel=1e-3)
    assert record["spectra"].keys() == expected.keys()
    for kind, measures in expected.items():
        assert record["spectra"][kind] == pytest.approx(measures, rel=1e-3)


def test_a_spectrum_counts_singular_values_of_a_thousandth_of_the_largest():
    """Their squares are a millionth of its square, which float32 tells from others only roughly."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1}
    first, last = (Llama(LlamaConfig(vocab_size=8, **shape), seed=0) for _ in range(2))
    for layer, start in zip(block_linears(last).values(), block_linears(first).values(),
                            strict=True):
        torch.nn.init.zeros_(start.weight)
        u, values, v = torch.linalg.svd(torch.randn(layer.weight.shape), full_matrices=False)
        values[:] = 0.98e-3
        values[:5] = torch.tensor([1.0, *[1.02e-3] * 4])
        layer.weight.data = u * values @ v
    assert sweep.measure_blocks(last, first)["spectrum"]["rank"] == 5


def test_the_trainable_share_of_the_blocks(swept):
    record, changes = swept("--method=full", "--steps=2")
    assert record["trainable_block_fraction"] == 1
    record, _ = swept("--method=lora", "--steps=2")
    lora = sum(2 * sum(change.shape) for change in changes.values())  # of rank 2
    total = sum(change.numel() for change in changes.values())
    assert record["trainable_block_fraction"] == pytest.approx(lora / total, abs=1e-4)
    assert record["trainable_parameters"] == lora + (2 * 257 + 5) * 16  # embeddings, head, norms


def test_frozen_blocks_change_by_nothing(swept):
    record, _ = swept("--method=frozen")
    assert record["trainable_block_fraction"] == 0
    assert record["spectrum"]["largest"] == record["spectrum"]["rank"] == 0


def test_the_change_of_a_run_from_a_checkpoint_is_since_that_checkpoint(run, swept):
    before = run("--method=lora", "--lr=0.03")
    record, _ = swept(f"--init_from={before}", "--lr=1e-30", "--steps=2")
    assert record["spectrum"]["largest"] < 1e-6


def test_a_stopped_run_continues_from_its_checkpoint(run, swept, tmp_path, capsys):
    words = ("--groups=permute", "--restart_every=7", "--micro_batch=8")
    whole, _ = swept(*words)
    stopped = run(*words, "--save_every=10")
    stopped_copy(stopped, 10, tmp_path / "runs" / "name")
    shutil.copy(stopped / "log.jsonl", tmp_path / "runs" / "name")  # steps 11 to 20 come again
    record, _ = swept(*words)
    assert capsys.readouterr().out.count("20/20   loss") == 3 and record["val_losses"][0][0] == 0
    assert [step for step, _ in record["losses"]] == [*range(1, 21)]
    for key in ("val_ppl", "losses", "val_losses", "spectrum"):
        assert record[key] == whole[key], key
    assert whole.keys() - record.keys() == {"seconds", "peak_gib"}  # those of its last part
    assert record["resumed"] and "resumed" not in whole and record["config"] == whole["config"]


@pytest.mark.parametrize("tokens", (0, 64))
def test_another_evaluation_on_the_same_data_gives_the_same_scores(config, corpus, tmp_path, tokens,
                                                                   handlers):
    words, other = [str(config), "--steps=2", f"--eval_tokens={tokens}"], tmp_path / "other"
    data.prepare(other, tokenizer.load("bytes"), {"source": "test"},
                 [(lambda: ["another text"] * 200, [])])
    record = sweep.run_one("name", words, [corpus, other], tmp_path, spectra=False)
    assert record["other_ppl"] != pytest.approx(record["val_ppl"], rel=1e-3)
    assert record["small_ppl"] == pytest.approx(record["val_ppl"], rel=1e-5)
    assert record["small_bits_per_byte"] == pytest.approx(record["bits_per_byte"], rel=1e-5)
    assert record["config"]["out"] == record["name"] == "name" and record["peak_gib"] == 0
    assert record["seconds"] > 0 and "spectrum" not in record
    assert not (tmp_path / "runs" / "name").exists()


def test_a_record_has_the_last_scores_and_the_median_speed_of_a_log(tmp_path):
    head = {"config": {"out": "/machine/path", "lr": 0.5}, "device": "H100", "torch": "2",
            "trainable_parameters": 7, "step": 0}
    steps = [{"step": step, "loss": 5 - step + 1e-6, "tokens_per_s": speed}
             for step, speed in ((1, 10.0), (2, 70.0), (3, 90.0), (4, 80.0))]
    scores = [{"step": step, "val_loss": 1 / loss, "val_ppl": loss, "val_bits_per_byte": -loss}
              for step, loss in ((0, 9.0), (2, 2.0), (4, 3.0))]
    lines = [head, scores[0], *steps, *scores[1:]]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert sweep.record("name", tmp_path, {"more": 1}) == {
        "name": "name", "val_ppl": 3.0, "val_loss": 1 / 3, "bits_per_byte": -3.0, "more": 1,
        "tokens_per_s": 80.0, "losses": [[1, 4.0], [2, 3.0], [3, 2.0], [4, 1.0]],
        "val_losses": [[0, 0.1111], [2, 0.5], [4, 0.3333]], "trainable_parameters": 7,
        "device": "H100", "torch": "2", "config": {"out": "name", "lr": 0.5}}


def test_the_speed_of_a_resumed_run_is_of_the_card_that_ended_it(tmp_path):
    """Ten times as fast as the first: a median over both would be of neither. Its step 3 is logged
    twice; its end has no step of its own, which tells nothing about a third card."""
    head = {"config": {}, "torch": "2", "trainable_parameters": 7}
    score = {"step": 4, "val_loss": 1.0, "val_ppl": 2.0, "val_bits_per_byte": 1.0}
    lines = [head | {"device": "slow"}, *({"step": n, "loss": 9.0, "tokens_per_s": 10.0}
                                          for n in (1, 2, 3)),
             head | {"device": "fast"}, *({"step": n, "loss": 8.0, "tokens_per_s": 100.0}
                                          for n in (3, 4)), head | {"device": "third"}, score]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = sweep.record("name", tmp_path, {})
    assert (record["device"], record["tokens_per_s"]) == ("fast", 100.0)
    assert record["losses"] == [[1, 9.0], [2, 9.0], [3, 8.0], [4, 8.0]]


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


@pytest.mark.parametrize("prepare, style, row", [
    ("at_the_end", "prompt", {"prompt": "1 + 1", "response": "#### 2"}),
    ("during", "uuid", {"prompt": "0" * 8, "response": "1" * 8})])
def test_answers_are_in_the_record(config, tmp_path, monkeypatch, handlers, prepare, style, row):
    folder = tmp_path / "answers"
    sft.prepare(folder, "bytes", {"source": "test", "format": style},
                [(lambda: [row] * 8, ["train", "val"])], "prompt")
    plan = {"EVALUATE": [], "PREPARE": getattr(answered, prepare), "SPECTRA": (),
            "RUNS": {"name": (str(config), [f"--data={folder}", "--seq_len=64",
                                            "--save_every=20"])}}
    monkeypatch.setattr(checkpoint, "write_hugging_face", None)  # a save would call it and fail
    record = sweep.attempt("name", plan, tmp_path)
    assert "spectrum" not in record and "spectrum_error" not in record
    if prepare == "during":
        step, digits, pairs = record["curve"][-1]  # all are right at step 10, or it is the last
        assert pairs == answered.ALL and (digits >= answered.ALL_RIGHT or step == 20)
    else:
        assert len(record["answers"]) == len(record["right"]) == 8
        assert record["numbers"] == record["right"].count("1") / 8
        assert (tmp_path / "answers-name.jsonl.xz").exists()


@pytest.mark.parametrize("prepare, style, stopped_in", [
    ("during", "uuid", 13), ("at_the_end", "prompt", 3)])
def test_answers_of_a_stopped_run_are_those_of_an_unbroken_one(
        config, tmp_path, monkeypatch, handlers, prepare, style, stopped_in):
    folder, step_of = tmp_path / "pairs", train.optimizer_step
    sft.prepare(folder, "bytes", {"source": "test", "format": style},
                [(lambda: [{"prompt": "0" * 8, "response": "#### 123"}] * 8, ["train", "val"])],
                "prompt")
    words = [f"--data={folder}", "--seq_len=64", "--eval_every=5", "--save_every=20", "--keep=1"]
    plan = {"EVALUATE": [], "PREPARE": getattr(answered, prepare), "SPECTRA": (),
            "RESUMES": True, "RUNS": {"name": (str(config), words)}}
    monkeypatch.setattr(answered, "ALL_RIGHT", 2)  # the run goes to its last step
    whole, calls = sweep.attempt("name", plan, tmp_path), []

    def step_and_stop(*arguments):
        calls.append(0)
        if len(calls) == stopped_in:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_of(*arguments)

    monkeypatch.setattr(train, "optimizer_step", step_and_stop)
    with pytest.raises(SystemExit):
        sweep.attempt("name", plan, tmp_path)
    assert [step.name for step in checkpoint.steps_of(tmp_path / "runs" / "name")] == [
        f"step-{stopped_in:08d}"]
    again = sweep.attempt("name", plan, tmp_path)
    key = "curve" if prepare == "during" else "answers"
    assert len(calls) == 20 and again[key] == whole[key] and again["losses"] == whole["losses"]
    assert [step for step, *_ in whole.get("curve", [])] in ([], [5, 10, 15, 20])
    assert not (tmp_path / "runs" / "name").exists()


def test_a_run_that_diverges_has_the_worst_score(config, tmp_path, handlers):
    name = rates.name_of(("task", "lora", "muon"), 1337, 1e9)
    plan = {"EVALUATE": [], "RUNS": {name: (str(config), ["--lr=1e9", "--warmup=0"])}}
    records = {name: sweep.attempt(name, plan, tmp_path)}
    cfg = records[name]["config"]
    assert (cfg["lr"], cfg["warmup"], cfg["out"]) == (1e9, 0, name)  # that counts it in its grid
    scores = rates.scores_of(records, ("task", "lora", "muon"), len)
    assert scores == {1e9: rates.WORST}


GROWING = """
from pathlib import Path
EVALUATE, RUNS = [], {"a": ("config", [])}
if Path(__file__).with_name("sweep.jsonl").exists():
    RUNS |= {"b": ("config", []), "c": ("config", [])}
"""
FORK = multiprocessing.get_context("fork")


def fake(name, words, folders, out, spectra):
    """A run of no time."""
    return {"name": name, "pid": os.getpid(), "losses": [[sweep.planned_steps(words), 1.0]]}


def fail(name, words, folders, out, spectra):
    raise RuntimeError(f"{words[0]} of {name}")


class Sweep:
    """A plan of fake runs in a folder of its own, and its workers."""

    def __init__(self, folder, monkeypatch):
        self.plan, self.out, self.patch = folder / "plan.py", folder / "out", monkeypatch
        (self.out / "claims").mkdir(parents=True)
        monkeypatch.setattr(sweep, "LOOK_EVERY", 0.005)

    def write(self, names, more=""):
        """Write a plan of runs whose config file is called CONFIG."""
        runs = {name: ("CONFIG", []) for name in names}
        self.plan.write_text(f"EVALUATE, RUNS = [], {runs}\n{more}")

    def work(self, run_one=fake, seconds=10):
        """Be a worker."""
        self.patch.setattr(sweep, "run_one", run_one)
        sweep.work(self.plan, self.out, time.time() + seconds)

    def fork(self, count, run_one=fake):
        """Start workers, each a process."""
        workers = [FORK.Process(target=self.work, args=(run_one,)) for _ in range(count)]
        for worker in workers:
            worker.start()
        return workers

    def records(self):
        """The lines of sweep.jsonl without losses, pids and per_gpu, and the pids by name."""
        lines = [*rates.read(self.plan.with_name("sweep.jsonl")).values()]
        for line in lines:
            for key in ("losses", "per_gpu"):
                line.pop(key, None)
        return lines, {line["name"]: line.pop("pid", None) for line in lines}


@pytest.fixture
def sweeping(tmp_path, monkeypatch):
    return Sweep(tmp_path, monkeypatch)


def join(workers):
    for worker in workers:
        worker.join(20)
    codes = [worker.exitcode for worker in workers]
    for worker in workers:
        worker.kill()
    assert codes == [0] * len(workers)


def test_a_plan_grows_with_its_runs(sweeping):
    sweeping.plan.write_text(GROWING)
    sweeping.work()
    assert list(sweeping.records()[1]) == ["a", "b", "c"]


def test_a_worker_without_a_run_waits_for_those_that_may_follow(sweeping, monkeypatch):
    is_running, looked, both = sweep.is_running, FORK.Event(), FORK.Barrier(2)

    def look(path):
        if is_running(path):
            looked.set()
        return is_running(path)

    def run_one(name, *rest):
        if name == "a":
            assert looked.wait(10)
        else:
            both.wait(10)  # b and c are in two processes
        return fake(name, *rest)

    monkeypatch.setattr(sweep, "is_running", look)
    sweeping.plan.write_text(GROWING)
    join(sweeping.fork(2, run_one))
    lines, pids = sweeping.records()
    assert sorted(pids) == ["a", "b", "c"] and not any("error" in line for line in lines)
    assert pids["b"] != pids["c"]


def test_no_run_runs_twice(sweeping):
    names = [str(i) for i in range(40)]
    sweeping.write(names)
    join(sweeping.fork(4))
    lines = sweeping.plan.with_name("sweep.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["name"] for line in lines) == sorted(names)


def test_a_sweep_whose_runs_all_fail_ends(sweeping):
    """Without its base model it would write an error for every run of the plan."""
    sweeping.write("a")
    sweeping.work()  # an earlier sweep
    sweeping.write("abcdef")
    sweeping.work(fail)
    assert list(sweeping.records()[1]) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("name", ["works", "diverges"])
def test_a_sweep_whose_runs_fail_now_and_then_goes_on(sweeping, name):
    def run_one(name, *rest):
        if name == "diverges":
            raise checkpoint.diverged(Config(), 3, "loss nan")
        return (fake if name == "works" else fail)(name, *rest)

    names = ["a", "b", name, "c", "d"]
    sweeping.write(names)
    sweeping.work(run_one)
    assert list(sweeping.records()[1]) == names


def test_a_sweep_goes_on_if_a_run_succeeds_after_three_failed(sweeping):
    """A worker whose runs fail at once is not lost while longer runs are under way."""
    done, both = sweeping.plan.with_name("sweep.jsonl"), FORK.Barrier(2)

    def run_one(name, *rest):
        if name in "bcd":
            fail(name, *rest)
        while name == "a" and len(rates.read(done)) < 3:
            time.sleep(0.002)
        if name in "ef":
            both.wait(10)  # they are in two processes
        return fake(name, *rest)

    sweeping.write("abcdef")
    join(sweeping.fork(2, run_one))
    lines, pids = sweeping.records()
    assert [line["name"] for line in lines if "error" in line] == ["b", "c", "d"]
    assert sorted(pids) == list("abcdef") and pids["e"] != pids["f"]


def test_a_dead_workers_claim_blocks_its_run_alone(sweeping):
    dead = FORK.Process(target=str)
    dead.start(), dead.join()
    sweeping.write("ab")
    (sweeping.out / "claims" / "a").write_text(str(dead.pid))
    join(sweeping.fork(1))
    assert list(sweeping.records()[1]) == ["b"]


def test_a_worker_waits_no_longer_than_the_other_one_lives(sweeping):
    other = FORK.Process(target=time.sleep, args=(60,))
    other.start()
    sweeping.write("a")
    (sweeping.out / "claims" / "a").write_text(str(other.pid))
    worker, = sweeping.fork(1)
    worker.join(0.1)
    assert worker.is_alive()
    other.kill(), other.join()
    join([worker])


def test_a_worker_that_is_killed_does_not_make_the_others_wait(tmp_path):
    """With the command itself: a dead child that nobody has waited for still has its pid."""
    plan = tmp_path / "plan.py"
    plan.write_text("""
import os, signal, time
from pathlib import Path
import __main__
EVALUATE, RUNS = [], {name: ("config", []) for name in "ab"}
KILLED = Path(__file__).with_name("killed")

def run_one(name, words, folders, out, spectra):
    if os.environ["CUDA_VISIBLE_DEVICES"] == "1":
        KILLED.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    while not KILLED.exists():
        time.sleep(0.01)
    return {"name": name, "losses": [[1, 1.0]]}

__main__.run_one, __main__.LOOK_EVERY = run_one, 0.01
""")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1"}
    done = subprocess.run([sys.executable, sweep.__file__, plan, tmp_path / "out"],
                          env=environment, timeout=30, capture_output=True, text=True)
    assert done.returncode == 1
    log, left = done.stdout.splitlines()
    assert log == f"a worker ended with exit status -9, see {tmp_path / 'out' / 'worker1.log'}"
    assert left == "1 of 2 runs are left; failed: none"
    (record,) = rates.read(tmp_path / "sweep.jsonl").values()
    assert record["per_gpu"] == 1
    assert len((tmp_path / "sweep.jsonl").read_text().splitlines()) == 1


def test_each_gpu_has_its_workers_whose_lines_tell_how_many_share_it(sweeping, monkeypatch,
                                                                     handlers):
    """The speed of a run is that of a process with a part of the GPU."""
    commands, cards = [], []

    def start(command, env, **options):
        commands.append([*map(str, command[1:])])
        cards.append(env["CUDA_VISIBLE_DEVICES"])
        return SimpleNamespace(poll=lambda: 0, returncode=0)

    sweeping.write("a")
    words = [sweep.__file__, str(sweeping.plan), str(sweeping.out), "--per_gpu=2"]
    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(sweep, "run_one", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for visible, expected in ((None, "0101"), ("3,5", "3535")):
        cards.clear()
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setattr(sys, "argv", [*words, "--gpus=2"])
        with pytest.raises(SystemExit) as end:
            sweep.main()
        assert "".join(cards) == expected and not end.value.code
    monkeypatch.setattr(sys, "argv", commands[0])
    sweep.main()
    (line,) = rates.read(sweeping.plan.with_name("sweep.jsonl")).values()
    assert line["per_gpu"] == 2


def test_a_sweep_that_is_stopped_leaves_no_worker(tmp_path):
    """One would go on with the next run, and its lines would be of a sweep that has ended."""
    plan, started = tmp_path / "plan.py", tmp_path / "started"
    plan.write_text(f"""
import os, time
from pathlib import Path
import __main__
EVALUATE, RUNS = [], {{"a": ("config", [])}}

def run_one(name, words, folders, out, spectra):
    Path({str(started)!r}).write_text(f"{{os.getpid()}}\\n")
    time.sleep(60)

__main__.run_one = run_one
""")
    process = subprocess.Popen([sys.executable, sweep.__file__, plan, tmp_path / "out"])
    while not started.exists() or not started.read_text().endswith("\n"):
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=30) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


def test_a_worker_that_takes_no_notice_of_a_stop_is_killed(monkeypatch):
    """As one that evaluates: the handler of train.py outlives its run."""
    monkeypatch.setattr(sweep, "SAVE_WITHIN", 0.2)
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=1); time.sleep(60)"
    worker = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE,
                              start_new_session=True)
    worker.stdout.readline()
    with pytest.raises(SystemExit):
        sweep.stop([worker])
    assert worker.wait(timeout=5) == -signal.SIGKILL


def test_what_prepare_yields_is_in_the_record(sweeping):
    sweeping.write("ab", """
import contextlib
@contextlib.contextmanager
def PREPARE(name):
    found = {} if name == "a" else None
    yield found
    if found is not None:
        found["answers"] = [1, None]
""")
    sweeping.work()
    assert sweeping.records()[0] == [{"name": "a", "answers": [1, None]}, {"name": "b"}]


@pytest.mark.parametrize("more", ["", """
import contextlib
PREPARE = contextlib.nullcontext
"""])
def test_a_context_sees_a_run_from_its_beginning(sweeping, more):
    """What it collects is in no checkpoint. Without one a stopped run goes on."""
    folder = sweeping.out / "runs" / "a"
    (folder / "step-00000010").mkdir(parents=True)
    sweeping.write("a", more)
    sweeping.work()
    assert folder.exists() == (not more)


def test_an_error_is_recorded_and_its_run_not_repeated(sweeping):
    sweeping.write("ab")
    sweeping.work(fail)
    shutil.rmtree(sweeping.out)  # started again
    (sweeping.out / "claims").mkdir(parents=True)
    sweeping.work()
    assert sweeping.records()[0] == [
        {"name": name, "error": f"RuntimeError: CONFIG of {name}"} for name in "ab"]


def test_after_a_cuda_error_another_worker_may_run_it(sweeping):
    sweeping.write(["CUDA error"])
    with pytest.raises(RuntimeError):
        sweeping.work(fail)
    assert sweeping.records()[0] == []
    sweeping.work()
    assert sweeping.records()[0] == [{"name": "CUDA error"}]


def test_no_run_starts_that_would_end_after_the_deadline(sweeping):
    def run_one(*arguments):
        time.sleep(0.3)
        return fake(*arguments)

    sweeping.write("abc")
    sweeping.work(run_one, seconds=0.5)
    assert list(sweeping.records()[1]) == ["a"]


def test_a_short_run_starts_where_a_long_one_would_end_late(sweeping):
    """A step of 0.1 s: after the first run 16 steps would end too late, 5 do not."""
    def run_one(name, words, folders, out, spectra):
        time.sleep(0.1 * sweep.planned_steps(words))
        return fake(name, words, folders, out, spectra)

    runs = {name: ("CONFIG", ["--steps=9", f"--steps={steps}"])
            for name, steps in (("first", 4), ("long", 16), ("short", 5))}
    sweeping.plan.write_text(f"EVALUATE, RUNS = [], {runs}")
    started = time.time()
    sweeping.work(run_one, seconds=1.5)
    assert list(sweeping.records()[1]) == ["first", "short"]
    assert time.time() - started < 1.4  # nobody waits for a run that nobody runs


@pytest.mark.parametrize("end", [{"losses": [[3, 1.0]]}, {"error": "UserError: step 3: nan"}])
def test_a_run_that_ended_early_is_no_measure_of_whole_ones(sweeping, end):
    """Three steps of 0.3 s: "whole", of 12, would end too late; the time of 12 was not measured."""
    def run_one(name, words, folders, out, spectra):
        time.sleep(0.3 if name == "early" else 1.2)
        return {"name": name, "losses": [[12, 1.0]]} | (end if name == "early" else {})

    runs = {name: ("CONFIG", ["--steps=12"]) for name in ("early", "whole")}
    sweeping.plan.write_text(f"EVALUATE, RUNS = [], {runs}")
    before = {"name": "earlier", "config": {"steps": 12}, "seconds": 1.2, "losses": [[12, 1.0]]}
    sweeping.plan.with_name("sweep.jsonl").write_text(json.dumps(before) + "\n")
    sweeping.work(run_one, seconds=1.4)
    assert list(sweeping.records()[1]) == ["earlier", "early"]


def test_the_last_part_of_a_run_is_no_measure_of_whole_ones(sweeping):
    """It took 0.5 s, a whole run takes 3: a second one would end too late."""
    def run_one(*arguments):
        time.sleep(0.5)
        return fake(*arguments) | {"resumed": True}

    sweeping.write(["stopped", "whole"])
    before = {"name": "earlier", "seconds": 3, "losses": [[1, 1.0]]}
    sweeping.plan.with_name("sweep.jsonl").write_text(json.dumps(before) + "\n")
    sweeping.work(run_one, seconds=3.4)
    assert list(sweeping.records()[1]) == ["earlier", "stopped"]


def test_what_is_left_of_a_stopped_run_starts_where_a_whole_one_would_end_late(sweeping):
    """12 steps take 100 s; of "stopped" 3 are left, so 25 s. A context begins its run anew."""
    runs = {name: ("CONFIG", ["--steps=12"]) for name in ("whole", "stopped")}
    before = {"name": "earlier", "seconds": 100, "losses": [[12, 1.0]]}
    sweeping.plan.with_name("sweep.jsonl").write_text(json.dumps(before) + "\n")
    for step in (6, 9):
        (sweeping.out / "runs" / "stopped" / f"step-{step:08d}").mkdir(parents=True)
    begin = f"import contextlib\nEVALUATE, RUNS = [], {runs}\n"
    sweeping.plan.write_text(begin + "PREPARE = contextlib.nullcontext\n")
    sweeping.work(seconds=50)
    assert list(sweeping.records()[1]) == ["earlier"]
    sweeping.plan.write_text(begin + "PREPARE, RESUMES = contextlib.nullcontext, True\n")
    sweeping.work(seconds=20)
    assert list(sweeping.records()[1]) == ["earlier"]
    sweeping.work(lambda *arguments: fake(*arguments) | {"resumed": True}, seconds=50)
    assert list(sweeping.records()[1]) == ["earlier", "stopped"]


def test_the_time_of_one_step_tells_nothing_about_a_long_run():
    """Of which compilation and evaluation take most."""
    assert sweep.would_take(212, [(1, 40)], [(1, 30)]) == 40  # it takes as long, at least
    assert sweep.would_take(212, [], [(1000, 300)]) == 0
    assert sweep.would_take(212, [(1, 40), (200, 60), (209, 60)], [(212, 9)]) == pytest.approx(63.6)
    assert sweep.would_take(2000, [], [(1000, 100), (1000, 140), (1000, 110)]) == 220


@pytest.mark.parametrize("last, names", [('{"name": "b"}', "ab"), ('{"name": "b", "lo', "a")])
def test_a_last_line_without_a_newline_counts_if_it_is_whole(tmp_path, last, names):
    """A worker may be writing it."""
    path = tmp_path / "sweep.jsonl"
    path.write_text('{"name": "a"}\n' + last)
    assert rates.read(path) == {name: {"name": name} for name in names}


@pytest.mark.parametrize("last, kept", [(b'{"name": "c"}', b'{"name": "c"}\n'),
                                        (b'{"name": "c", "lo', b""), (b"", b"")])
def test_a_start_after_a_crash_changes_no_line_but_half_a_last_one(sweeping, last, kept):
    """Written anew, the file would lose all lines in a second crash, and repeated names at once."""
    sweeping.write("")
    path, before = sweeping.plan.with_name("sweep.jsonl"), b'{"name":"a"}\n{"name": "a"}\n'
    path.write_bytes(before + last)
    inode = path.stat().st_ino
    done = subprocess.run([sys.executable, sweep.__file__, sweeping.plan, sweeping.out], timeout=30)
    assert done.returncode == 0
    assert path.read_bytes() == before + kept and path.stat().st_ino == inode
