"""Small corpora and runs of a second that the tests share."""
import faulthandler
import gc
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS.parent), str(TESTS.parent / "results")]
os.environ["OMP_NUM_THREADS"] = "1"  # of torch, here and in the processes that tests start
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, which runs inherit

TINY = """
seq_len, batch_size, micro_batch = 16, 8, 4
hidden_size, intermediate_size, num_hidden_layers = 16, 24, 2
num_attention_heads, num_key_value_heads = 2, 1
rank, lr, warmup, steps = 2, 1e-2, 4, 20
log_every, eval_every, save_every, keep = 1, 10, 10, 0
device, compile = "cpu", "off"
"""


def texts(count=200):
    return [f"document {i}: {i * i} é\n" * 3 for i in range(count)]


def freeze_imports():
    """Exclude what modules hold, a million objects, from all later garbage collections.

    A collection writes to every object, and a forked process copies the pages that are written to.
    """
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)  # fewer collections than Python's 700, 10, 10: tests are short
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Collect no garbage while test files are imported.

    This file does not import torch at its top, since the first process of pytest -n runs no test.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        freeze_imports()


def pytest_collection_modifyitems(items):
    """The slowest tests first, so that no worker of pytest -n is left alone with them in the end.

    Tests of several processes come before all others, so that one worker runs most of them and
    starts the server of their processes.
    """
    items.sort(key=lambda item: ("group" not in item.fixturenames,
                                 item.path.name != "test_train.py"))


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers whatever ran before it."""
    import torch
    torch.default_generator.manual_seed(0)  # torch.manual_seed looks for GPUs: 0.5 ms


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A small corpus of bytes, every 100th document validation."""
    import data
    import tokenizer
    folder = tmp_path_factory.mktemp("data") / "small"
    data.prepare(folder, tokenizer.load("bytes"), {"source": "test"}, [(texts, [])])
    return folder


@pytest.fixture
def config(corpus, tmp_path):
    """Path of a config file for a run of a second, on the small corpus."""
    path = tmp_path / "tiny.py"
    path.write_text(TINY + f"data, out = {str(corpus)!r}, {str(tmp_path / 'run')!r}\n")
    return path


@pytest.fixture
def run(config):
    """run("--key=value", ...) trains in this process and returns the run's folder."""
    import train
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {name: signal.getsignal(name) for name in names}

    def start(*overrides):
        train.main([str(config), *overrides])
        out = [word.removeprefix("--out=") for word in overrides if word.startswith("--out=")]
        return Path(out[0]) if out else config.parent / "run"

    yield start
    for name, handler in handlers.items():
        signal.signal(name, handler)


def train_in_group(words, output, environment, kill_after):
    """Run train.py as one process of a group, with its output in a file; see group."""
    import config
    import train
    descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    faulthandler.enable()  # a crash leaves its stack in the output
    os.environ |= environment
    signal.setitimer(signal.ITIMER_REAL, kill_after)  # SIGALRM ends the process, 0: never
    config.time = SimpleNamespace(sleep=str)  # no wait: rank 1 sleeps 3 s before it prints an error
    sys.argv[1:] = words
    config.command_line(train.main)


@pytest.fixture
def group(config, monkeypatch):
    """group(world, "--key=value", ...) starts that many processes of train.py and returns them.

    Each has .output, the file of what it prints. They are forked from a server that has imported
    torch, so that a start takes milliseconds. kill_after: seconds until a signal kills them.
    """
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (TESTS.parent, TESTS))))
    server, started = multiprocessing.get_context("forkserver"), []
    server.set_forkserver_preload(["server"])

    def start(world, *overrides, kill_after=0.0):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(world):
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
            environment = {name: str(value) for name, value in names.items()}
            environment["MASTER_ADDR"] = "127.0.0.1"
            output = config.parent / f"output{len(started)}"
            process = server.Process(target=train_in_group, args=(
                [str(config), *overrides], output, environment, kill_after))
            process.output = output
            output.write_text("")
            process.start()
            started.append(process)
        return started[-world:]

    yield start
    for process in started:
        process.kill()
        process.join()


def wait_for(process, done):
    """Wait until done() is true while a process of a group runs."""
    while not done():
        assert process.is_alive(), process.output.read_text()
        time.sleep(0.002)


def finish(processes):
    """Wait for processes of a group; return (exit codes, outputs)."""
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes], [p.output.read_text() for p in processes]


def prompts(count=103):
    """Rows with prompts and responses of many lengths; some responses are empty."""
    import numpy as np
    generator = np.random.default_rng(0)
    rows = []
    for i in range(count):
        prompt = f"{i}" * generator.integers(1, 6)
        response = "abcdefgh"[:generator.integers(0, 8)] * generator.integers(1, 6)
        rows.append({"prompt": prompt, "response": response})
    return rows


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A folder of 103 samples of many lengths; every 10th is validation too."""
    import sft
    folder = tmp_path_factory.mktemp("data") / "pairs"

    stages = [(prompts, ["train"]), (lambda: prompts()[::10], ["val"])]
    sft.prepare(folder, "bytes", {"source": "test"}, stages, "prompt")
    return folder


@pytest.fixture
def fit(run, pairs):
    """run, on these samples."""
    return lambda *words: run(f"--data={pairs}", "--seq_len=64", *words)


def stopped_copy(out, step, copy):
    """A copy of a run that was stopped at a step: no later checkpoints, nothing in its log yet."""
    shutil.copytree(out, copy)
    (copy / "log.jsonl").unlink()
    for later in copy.glob("step-*"):
        if int(later.name.removeprefix("step-")) > step:
            shutil.rmtree(later)
    return copy
