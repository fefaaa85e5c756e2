"""A preparation that is killed and run again ends with the files of one that was not."""
import json
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import data
import shards

COMMANDS = {"text": ["--key=prompt"], "sft": ["--seq_len=40", "--long=truncate"]}


def run_in_child(words, moment):
    """Run data.py in a child process that is killed at this moment; -9, or the number of moments.

    A moment comes before each change of the folder data: a file is opened for writing, gets its
    name or is removed. A file that is about to get its name loses its second half first, as if the
    kill had come while it was written.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = 0

    def watch(event, args):
        nonlocal count
        opens = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wa+")
        if not (opens or event in ("os.rename", "os.remove")) or "data/" not in str(args[0]):
            return
        count += 1
        if count == moment:
            if event == "os.rename":
                os.truncate(args[0], os.path.getsize(args[0]) // 2)
            os.kill(os.getpid(), 9)

    try:
        sys.addaudithook(watch)
        data.main(words)
    except BaseException:
        count = 0
    os._exit(count)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()
            if path.suffix == ".bin" or path.name == "manifest.json"}


@pytest.fixture
def small_shards(tmp_path, monkeypatch):
    """A folder with rows for a dozen shards; no time passes, so that manifests can be compared."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 2000)
    monkeypatch.setattr(shards, "time", SimpleNamespace(time=lambda: 0.0))
    monkeypatch.setattr(shards, "CHUNK_DOCUMENTS", 20)
    rows = [json.dumps({"prompt": f"{i} " * (i % 17 + 1), "response": "r" * (i % 9)})
            for i in range(1000)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_killed_preparation_ends_with_the_same_bytes(small_shards, command):
    def words(name):
        return [command, name, "rows.jsonl", "--tokenizer=bytes", *COMMANDS[command]]

    moments = run_in_child(words("whole"), 0)
    whole = contents("data/whole")
    assert moments > 40 and len(whole) > 8
    generator = random.Random(command)
    for moment in generator.sample(range(1, moments + 1), 7):
        name = f"killed_{moment}"
        assert run_in_child(words(name), moment) == -9
        # the run that continues may be killed too, or end before that moment
        run_in_child(words(name), generator.randint(1, moments))
        data.main(words(name))
        assert contents(f"data/{name}") == whole
        assert not list(Path("data", name).glob("*.tmp"))
