"""Every mistake and every failure of the machine is one line, with the exit status of the table.

A row of the table: (files, command, words in the line, exit status). {"name": content} are the
files in the current folder; a content that is not text or bytes is written as JSON.
"""
import gzip
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import checkpoint
import data
import merge
import sft
import shards
import tokenizer
from config import UserError, at_least, command_line, lock, write_json
from model import Llama, LlamaConfig

ROOT = Path(__file__).parent.parent
GOOD = {"text": "some text"}
LINES = json.dumps(GOOD) + "\n"
PAIR = json.dumps({"prompt": "a", "response": "b"}) + "\n"
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
PACKED = gzip.compress((LINES * 500).encode())
SHARD = {"file": "train_00000.bin", "tokens": 4, "crc32": 0}
SPLIT = {"tokens": 4, "documents": 1, "bytes": 3, "shards": [SHARD]}
EMPTY = {"tokens": 0, "documents": 0, "bytes": 0, "shards": []}
MANIFEST = {"kind": "text", "request": {"source": "x", "tokenizer": "bytes"},
            "tokenizer": "bytes", "vocab_size": 257, "dtype": "uint16",
            "splits": {"train": SPLIT, "val": EMPTY}, "mb_per_s": 1.25}


def without(value, *path):
    """A copy of nested dicts without the key at this path."""
    value = json.loads(json.dumps(value))
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return value


def chat_model(template):
    """The files of a tokenizer directory `model` with this chat template, and one chat."""
    vocabulary = {chr(i): i for i in range(33, 127)} | {"</s>": 0}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "</s>"}
    return {"model/tokenizer.json": {"version": "1.0", "model": model, "added_tokens": []},
            "model/tokenizer_config.json": {"eos_token": "</s>", "chat_template": template},
            "c.jsonl": {"messages": CHAT}}


TEXT, SFT = "text n a.jsonl --tokenizer=bytes", "sft n a.jsonl --tokenizer=bytes"
CHATS = "sft n c.jsonl --tokenizer=model"
DOUBLED = ("{{% set ns = namespace(x='ab') %}}{{% for i in range(99) %}}{}{{% endfor %}}"
           "{{{{ ns.x }}}}")

TABLE = [
    # rows
    ({"a.jsonl": LINES * 2 + '{"text": 5}\n'}, TEXT,
     "a.jsonl, row 3: key 'text' holds 5, not", 2),
    ({"a.jsonl": LINES + '{"text": [1]}\n'}, TEXT, "a.jsonl, row 2: key 'text' holds [1]", 2),
    ({"a.jsonl": LINES + "{broken\n"}, TEXT,
     "a.jsonl, row 2: the line is not JSON in UTF-8 (JSONDecodeError: Expecting property", 2),
    ({"a.jsonl": LINES + "\n\n7\n"}, TEXT, "a.jsonl, row 4: the row is 7, not an object", 2),
    ({"a.jsonl": LINES + '"x"\n'}, TEXT, "a.jsonl, row 2: the row is 'x', not an object", 2),
    ({"a.jsonl": LINES + "[" * 10 ** 5 + "\n"}, TEXT,
     "row 2: the line is not JSON in UTF-8 (RecursionError: ", 2),
    ({"a.jsonl": LINES + '{"text": 1' + "0" * 5000 + "}\n"}, TEXT,
     "row 2: the line is not JSON in UTF-8 (ValueError: Exceeds the limit", 2),
    ({"a.jsonl": LINES.encode() + b'{"text": "\xff"}\n'}, TEXT,
     "row 2: the line is not JSON in UTF-8 (UnicodeDecodeError: 'utf-8' codec can't decode", 2),
    ({"a.jsonl": LINES.encode("utf-16")}, TEXT,
     "a.jsonl, row 1: the line is not JSON in UTF-8 (UnicodeDecodeError", 2),
    ({"a.jsonl": '{"text": null}\n' + LINES}, TEXT, "a.jsonl, row 1: key 'text' holds None, not",
     2),
    ({"a.jsonl": '{"body": "x"}\n'}, TEXT, "row 1: no key 'text', its keys are body: choose", 2),
    ({"a.jsonl": LINES}, TEXT + " --key=body", "1 of 1 rows cannot be used, more than 1 %", 2),
    ({"a.jsonl": LINES * 9 + '{"x": 1}\n'}, TEXT + " --skip_bad=5",
     "1 of 10 rows cannot be used", 2),
    ({"a.jsonl": LINES * 9 + "{\n"}, TEXT + " --skip_bad=10", None, 0),
    ({"a.jsonl": ""}, TEXT, "a.jsonl is empty: it holds no row", 2),
    ({"a.jsonl": "\n \n"}, TEXT, "a.jsonl is empty: it holds no row", 2),
    ({"a.jsonl": '{"text": ""}\n'}, TEXT,
     "no document was found: train 0 documents of 0 tokens (0.0 MB), 1 left out as empty", 2),
    # files
    ({"a.json.gz": PACKED[:-30]}, "text n a.json.gz --tokenizer=bytes",
     "cannot be read (EOFError", 2),
    ({"a.json.gz": LINES}, "text n a.json.gz --tokenizer=bytes",
     "a.json.gz, row 1 cannot be read", 2),
    ({"a.json.gz": b"\x1f\x8b\x08\0" + b"x" * 90}, "text n a.json.gz --tokenizer=bytes",
     "row 1", 2),
    ({"a.json": "[1, 2"}, "text n a.json --tokenizer=bytes",
     "a.json, row 1 cannot be read (JSONDecodeError: Expecting ',' delimiter", 2),
    ({"a.json": [GOOD, 5]}, "text n a.json --tokenizer=bytes",
     "a.json, row 2: the row is 5", 2),
    ({"a.json": []}, "text n a.json --tokenizer=bytes", "a.json is empty: it holds no row", 2),
    ({"a.json": json.dumps(GOOD, indent=1)}, "text n a.json --tokenizer=bytes",
     "a.json, row 1: the line is not JSON in UTF-8", 2),
    ({"a.txt": b"abc\xff"}, "text n a.txt --tokenizer=bytes",
     "a.txt, row 1 cannot be read (UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff", 2),
    ({"a.txt": ""}, "text n a.txt --tokenizer=bytes", "a.txt is empty: it holds no row", 2),
    ({"a.parquet": "x"}, "text n a.parquet --tokenizer=bytes",
     "a.parquet, row 1 cannot be read", 2),
    ({}, TEXT, "error: No such file or directory: a.jsonl", 2),
    ({"a.csv": "x"}, "text n a.csv --tokenizer=bytes",
     "a.csv: files may end in .json, .json.gz", 2),
    ({"a.txt": "x"}, "sft n a.txt --tokenizer=bytes", "a.txt: files may end in .json", 2),
    ({"d.jsonl/x": "x"}, "text n d.jsonl --tokenizer=bytes", "error: Is a directory: d.jsonl", 2),
    # prompts and responses
    ({"a.jsonl": PAIR + '{"prompt": "a", "response": 7}\n'}, SFT,
     "a.jsonl, row 2: key 'response' holds 7, not text", 2),
    ({"a.jsonl": '{"question": 1, "answer": "b"}\n'}, SFT, "row 1: key 'question' holds 1", 2),
    ({"a.jsonl": {"instruction": "a", "input": 3, "output": "b"}}, SFT,
     "key 'input' holds 3", 2),
    ({"a.jsonl": {"messages": "hello"}}, SFT, "row 1: messages must be a list of {'role'", 2),
    ({"a.jsonl": {"messages": [{"role": "user"}]}}, SFT, "row 1: messages must be a list of", 2),
    ({"a.jsonl": PAIR + '{"prompt": "a"}\n'}, SFT,
     "row 2: no key 'response', its keys are prompt", 2),
    ({"a.jsonl": "{}\n"}, SFT,
     "a.jsonl, row 1: no sample can be made of the keys (none); known are messages; ins", 2),
    ({"a.jsonl": "nonsense\n"}, SFT, "a.jsonl, row 1: the line is not JSON", 2),
    ({"a.jsonl": {"messages": CHAT[:1]}}, SFT, "1 of 1 rows cannot be used, more than 1 %; the "
     "first is a.jsonl, row 1: no message has the role 'assistant', got [{'role': 'user', ", 2),
    ({"a.jsonl": {"messages": []}}, SFT, "row 1: no message has the role 'assistant', got []", 2),
    ({"a.jsonl": PAIR}, SFT + " --seq_len=1",
     "no document of at most 1 tokens was found: train 0 samples of 0 tokens (0.0 MB), 1 ", 2),
    # the command line
    ({}, "", "the following arguments are required: command", 2),
    ({}, "tex n", "argument command: invalid choice: 'tex'", 2),
    ({}, "text", "the following arguments are required: name", 2),
    ({}, "text n", "name at least one file: python data.py text NAME FILES...", 2),
    ({"a.jsonl": LINES}, "text ../n a.jsonl", "argument name: must be a name inside data/", 2),
    ({"a.jsonl": LINES}, "text . a.jsonl",
     "argument name: must be a name inside data/, got '.'", 2),
    ({"a.jsonl": LINES}, TEXT + " --skip_bad=101", "--skip_bad: must be a number from 0 to 100", 2),
    ({"a.jsonl": LINES}, TEXT + " --skip_bad=nan", "--skip_bad: must be a number from 0 to 100", 2),
    ({"a.jsonl": LINES}, "text n a.jsonl --tokenizer=gpt22", "unknown tokenizer 'gpt22'", 2),
    ({"a.jsonl": LINES}, "text n a.jsonl --tokenizer=", "unknown tokenizer ''", 2),
    ({}, "uuid --pairs=-5", "argument --pairs: must be a whole number from 1 to", 2),
    ({}, "uuid --pairs=0", "argument --pairs: must be a whole number from 1 to", 2),
    ({}, "uuid --pairs=1e30", "argument --pairs: must be a whole number from 1 to", 2),
    ({}, "uuid --pairs=1.5", "--pairs: must be a whole number from 1 to 4294967295, got 1.5", 2),
    ({}, "uuid --pairs=many",
     "argument --pairs: must be a whole number from 1 to 4294967295, got 'many'", 2),
    ({}, "uuid --seed=-1", "argument --seed: must be a whole number from 0", 2),
    ({}, "uuid --pairs=1e1 --tokenizer=bytes", None, 0),
    ({}, "c4 --train_tokens=-1", "argument --train_tokens: must be a whole number from 0", 2),
    ({}, "c4 --val_tokens=inf",
     "argument --val_tokens: must be a whole number from 0 to 10000000000000, got inf", 2),
    ({"a.jsonl": PAIR}, SFT + " --seq_len=-1",
     "argument --seq_len: must be a whole number from 0", 2),
    ({"a.jsonl": PAIR}, SFT + " --long=cut", "argument --long: invalid choice: 'cut'", 2),
    # folders
    ({"data": "a file", "a.jsonl": LINES}, TEXT, "ot a directory: data", 2),
    ({"data/n": "a file", "a.jsonl": LINES}, TEXT, "File exists: data/n", 2),
    ({"data/n/manifest.json/x": "", "a.jsonl": LINES}, TEXT,
     "data/n/manifest.json cannot be read", 2),
    ({}, "check n", "no token shards in data/n: prepare them with data.py (python data.py --he", 2),
    ({"data": "a file"}, "check n", "no token shards in data/n", 2),
    ({"data/n/manifest.json": "{"}, "check n", "data/n/manifest.json cannot be read: Expecting", 2),
    ({"data/n/manifest.json": [1]}, "check n",
     "manifest.json must hold a JSON object, got [1]", 2),
    *[({"data/n/manifest.json": without(MANIFEST, *path)}, "check n",
       f"it has no key {'.'.join(path)}", 2) for path in (
           ("kind",), ("request",), ("mb_per_s",), ("tokenizer",), ("vocab_size",), ("dtype",),
           ("splits",), ("splits", "val"), ("splits", "train", "tokens"),
           ("splits", "train", "shards"))],
    ({"data/n/manifest.json": MANIFEST | {"dtype": "int8"}}, "check n",
     "kind 'text' with dtype 'int8' is unknown", 2),
    ({"data/n/manifest.json": MANIFEST | {"kind": "x"}}, "check n",
     "kind 'x' with dtype 'uint16' is unknown", 2),
    ({"data/n/manifest.json": MANIFEST | {"kind": "samples"}}, "check n", "has no key format", 2),
    # evaluate.py divides by it: all tokens in its place would give a wrong number
    ({"data/n/manifest.json": MANIFEST | {"kind": "samples", "format": "question"}}, "check n",
     "it has no key splits.train.learned", 2),
    ({"data/n/manifest.json": MANIFEST | {"vocab_size": True}}, "check n",
     "vocab_size must be of type int, is True", 2),
    ({"data/n/manifest.json": MANIFEST | {"vocab_size": "9"}}, "check n",
     "vocab_size must be of type int, is '9'", 2),
    ({"data/n/manifest.json": MANIFEST}, "check n",
     "train_00000.bin is damaged (it should hold 8 bytes and holds 0)", 2),
    ({"data/n/manifest.json": MANIFEST, "data/n/train_00000.bin": b"12345678"}, "check n",
     "train_00000.bin is damaged (its checksum is 2598427311, expected 0)", 2),
    ({"data/n/manifest.json": MANIFEST, "a.jsonl": LINES}, TEXT, "data/n holds another corpus", 2),
    ({"data/n/progress.json": "{", "a.jsonl": LINES}, TEXT,
     "data/n/progress.json cannot be read", 2),
    ({"data/n/progress.json": {}, "a.jsonl": LINES}, TEXT,
     "progress.json is damaged (it has no", 2),
    # tokenizers
    ({"a.jsonl": LINES, "m/tokenizer.json": "{"}, "text n a.jsonl --tokenizer=m",
     "m/tokenizer.json cannot be read", 2),
    ({"a.jsonl": LINES, "m/tokenizer.json": b"\xff"}, "text n a.jsonl --tokenizer=m",
     "m/tokenizer.json cannot be read", 2),
    ({**chat_model("x"), "model/tokenizer_config.json": [1]}, CHATS,
     "must hold a JSON object, got [1]", 2),
    ({**chat_model("x"), "model/tokenizer_config.json": "{"}, CHATS,
     "config.json cannot be read", 2),
    ({**chat_model("x"), "model/tokenizer_config.json": {}}, CHATS, "eos_token '' is no token", 2),
    ({**chat_model("x"), "model/tokenizer_config.json": {"eos_token": 5}}, CHATS,
     "eos_token must be text, is 5", 2),
    ({**chat_model("x"), "model/chat_template.jinja": b"\xff"}, CHATS,
     "model/chat_template.jinja cannot be read: 'utf-8' codec can't decode byte 0xff", 2),
    (chat_model(7), CHATS, "chat_template must be text, is 7", 2),
    (chat_model([{"name": "default", "template": 7}]), CHATS,
     "chat_template must be text, is 7", 2),
    # chat templates
    (chat_model("{% for"), CHATS, "the chat template of model cannot write", 2),
    (chat_model("{{ messages[9].x }}"), CHATS, "has no element 9", 2),
    (chat_model("{{ 1 / 0 }}"), CHATS, "division by zero", 2),
    (chat_model("{{ messages | nothing }}"), CHATS, "No filter named 'nothing'", 2),
    (chat_model("{{ messages | dictsort }}"), CHATS, "'list' object has no attribute 'items'", 2),
    (chat_model("{{ cycler() }}"), CHATS, "at least one item has to be provided", 2),
    (chat_model("{{ messages.__class__.__mro__ }}"), CHATS, "unsafe", 2),
    (chat_model("{% for i in range(10 ** 9) %}{% endfor %}"), CHATS, "Range too big", 2),
    (chat_model("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"),
     CHATS, "it takes more than 10,000 steps", 2),
    (chat_model("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}"), CHATS, "maximum recur", 2),
    (chat_model("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
                "{{ f(50) }}"), CHATS, "it takes more than 10,000 steps", 2),
    (chat_model("{{ 'a' * 10 ** 12 }}"), CHATS, "it takes more than 10,000,000 characters", 2),
    (chat_model("{{ 10 ** (10 ** 10) }}"), CHATS, "it takes more than 10,000,000 characters", 2),
    (chat_model("{{ '%99999999999d' % 1 }}"), CHATS, "more than 10,000,000 characters", 2),
    (chat_model(DOUBLED.format("{% set ns.x = ns.x + ns.x %}")), CHATS, "more than 10,000,000", 2),
    (chat_model(DOUBLED.format("{% set ns.x = ns.x ~ ns.x %}")), CHATS, "more than 10,000,000", 2),
    (chat_model(DOUBLED.format("{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}")), CHATS,
     "cannot write", 2),
    (chat_model("{% for i in range(99999) %}{{ messages[0].content * 999 }}{% endfor %}"), CHATS,
     "more than 10,000,000 characters", 2),
]


def write_files(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def command(monkeypatch, capsys):
    """command(main, words): (exit status, stderr) of a script in this process."""
    handler = signal.getsignal(signal.SIGINT)

    def call(main, words):
        monkeypatch.setattr(sys, "argv", ["script", *words])
        tokenizer.load.cache_clear()
        capsys.readouterr()
        try:
            command_line(main)
        except SystemExit as end:
            return end.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    yield call
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("files, words, message, status", TABLE)
def test_a_mistake_is_one_line(command, tmp_path, monkeypatch, files, words, message, status):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sft, "TEMPLATE_STEPS", 10_000)  # a million take seconds
    write_files(tmp_path, files)
    code, err = command(data.main, words.split())
    assert code == status, err
    if message:
        assert err.startswith("error: ") and err.count("\n") == 1 and message in err
        assert len(err) < 1000


@pytest.fixture
def file_size_limit():
    """A function that limits the size of files, as a full disk does."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_the_same_command_works_later(
        command, tmp_path, monkeypatch, file_size_limit):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text " * 10 ** 5)
    words = ["text", "n", "a.txt", "--tokenizer=bytes"]
    file_size_limit(100_000)
    assert command(data.main, words) == (
        2, "error: File too large: data/n; free some space and run the same command again\n")
    assert not list((tmp_path / "data" / "n").glob("*.tmp"))
    file_size_limit(10 ** 9)
    assert command(data.main, words) == (0, "")
    assert shards.read_manifest(tmp_path / "data" / "n")["splits"]["train"]["tokens"] == 500_001


def test_a_full_disk_under_a_log_names_it_and_the_run_continues_later(
        run, file_size_limit, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # pytest's is a file, too
    log = run("--steps=3", "--save_every=2") / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    shutil.rmtree(log.parent)
    for size, name in ((1000, "run"),  # not even config.json fits
                       (sum(map(len, lines[:3])) - 50, "run/log.jsonl")):
        file_size_limit(size)
        line = f"/{name} cannot be written; free some space.*: .Errno 27. File too large"
        with pytest.raises(UserError, match=line):
            run("--steps=3")
        file_size_limit(10 ** 9)
    run("--steps=3", "--resume")
    assert len(log.read_bytes().splitlines()) == len(lines)


def test_a_closed_pipe_ends_without_a_traceback(command, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:  # closing it flushes again, as the end of Python does
        monkeypatch.setattr(sys, "stdout", stdout)
        assert command(lambda argv: print("some words"), []) == (1, "")
        monkeypatch.undo()


def test_a_closed_stdout_is_no_error(command, monkeypatch):
    """Python has None for it, as after `>&-`, and print writes nothing."""
    monkeypatch.setattr(sys, "argv", ["script"])
    monkeypatch.setattr(sys, "stdout", None)
    written = []
    command_line(lambda argv: written.append(print("some words")))
    assert written == [None]


def test_an_ascii_terminal_gets_question_marks(command, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    assert command(lambda argv: print("data/日: 5 tokens"), []) == (0, "")
    assert written.getvalue() == b"data/?: 5 tokens\n"


def hold(folder, held):
    with lock(folder, "a test"):
        held.set()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path / "n"."""
    (tmp_path / "n").mkdir()
    fork = multiprocessing.get_context("fork")
    held = fork.Event()
    process = fork.Process(target=hold, args=(tmp_path / "n", held))
    process.start()
    assert held.wait(60)
    yield process
    process.kill()
    process.join()


def test_a_second_holder_is_told_the_first(tmp_path, holder):
    message = f"n is in use by process {holder.pid} on .*: training needs it alone"
    with pytest.raises(UserError, match=message):
        with lock(tmp_path / "n", "training"):
            pass


def test_the_lock_of_a_dead_process_does_not_block(tmp_path, holder):
    holder.kill()
    holder.join()
    assert (tmp_path / "n" / ".lock").exists()
    with lock(tmp_path / "n", "training"):
        assert f"process {os.getpid()} on " in (tmp_path / "n" / ".lock").read_text()
    assert not (tmp_path / "n" / ".lock").exists()


def test_two_preparations_of_one_folder_do_not_mix(tmp_path):
    def read():
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()}"):
            data.prepare(tmp_path / "d", tokenizer.load("bytes"), {"source": "s"}, [])
        yield from ["text"] * 200

    stages = [(read, [])]
    manifest = data.prepare(tmp_path / "d", tokenizer.load("bytes"), {"source": "s"}, stages)
    assert manifest["splits"]["train"]["documents"] == 198
    assert not (tmp_path / "d" / ".lock").exists()


def test_a_failed_write_of_json_leaves_nothing(tmp_path):
    write_json(tmp_path / "a.json", [1])
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", object())
    (tmp_path / "b.json").mkdir()
    with pytest.raises(OSError):
        write_json(tmp_path / "b.json", [1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == [1]


@pytest.mark.parametrize("error, line", [
    (PermissionError(13, "Permission denied", "x/y"), "error: Permission denied: x/y\n"),
    (OSError(28, "No space left on device"), "error: No space left on device; free some space and "
                                             "run the same command again\n"),
    (IsADirectoryError(21, "Is a directory", "x"), "error: Is a directory: x\n"),
    (TimeoutError(), "error: TimeoutError\n"),
    (UserError("a mistake"), "error: a mistake\n"),
    (MemoryError("Unable to allocate 32.0 GiB"), "error: Unable to allocate 32.0 GiB\n"),
    (RuntimeError("CUDA out of memory.\nTried to allocate 9 GiB"),
     "error: CUDA out of memory. Tried to allocate 9 GiB\n"),
])
def test_failures_of_the_machine_are_one_line(command, error, line):
    def main(argv):
        raise error
    assert command(main, []) == (2, line)


def test_other_errors_keep_their_traceback(command):
    def main(argv):
        raise RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        command(main, [])


def test_an_interrupt_ends_with_130_and_a_second_one_at_once(command):
    def main(argv):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert command(main, []) == (130, "")
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


@pytest.mark.parametrize("name", "train data merge evaluate sample bench analyze".split())
def test_an_interrupt_of_the_imports_ends_without_a_traceback(name, tmp_path):
    """A torch that takes long to import. A shell reports death by SIGINT as status 130."""
    (tmp_path / "torch.py").write_text("print('importing', flush=True); open(0).read()")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / f"{name}.py")], text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (-signal.SIGINT, "")


def test_a_script_of_the_user_keeps_its_interrupt_handler(tmp_path):
    """Also one that has the name of ours."""
    (tmp_path / "train.py").write_text(
        f"import signal, sys; sys.path.append({str(ROOT)!r}); import config\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler")
    subprocess.run([sys.executable, str(tmp_path / "train.py")], check=True)


@pytest.mark.parametrize("text, value", [("5", 5), ("1e4", 10_000), ("5.0", 5), ("+7", 7)])
def test_whole_numbers_may_be_written_with_an_exponent(text, value):
    number = at_least(1)(text)
    assert number == value and isinstance(number, int)


def test_templates_within_the_limits_write_what_jinja_writes():
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    template = ("{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}"
                "{{ m.role ~ ':' ~ m.content * 2 ~ loop.index }}{{ '%5d' % 3 }}"
                "{% if not loop.last %}{{ loop.nextitem.role }}{% endif %}{% endfor %}"
                "{% set x %}a{{ 2 ** 3 }}{% endset %}{{ x + x }}"
                "{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% else %}none{% endfor %}"
                "{% for m in messages recursive %}{{ m.role }}{% endfor %}")
    ours = sft.compiled(template)
    sft.LimitedSandbox.state.steps = itertools.count(1)
    theirs = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    assert ours.render(messages=CHAT) == theirs.from_string(template).render(messages=CHAT)


def test_a_summary_names_what_a_manifest_counts(tmp_path):
    write_json(tmp_path / "manifest.json", MANIFEST)
    assert shards.summary(shards.read_manifest(tmp_path)) == (
        "train 1 documents of 4 tokens (0.0 MB); tokenizer bytes; 1.2 MB/s")
    split = SPLIT | {"learned": 2, "longest": 4, "dropped": 0, "truncated": 0}
    samples = MANIFEST | {"kind": "samples", "format": "prompt", "dtype": "uint32",
                          "splits": {"train": split, "val": EMPTY}}
    write_json(tmp_path / "manifest.json", samples)
    assert shards.summary(shards.read_manifest(tmp_path)) == (
        "train 1 samples of 4 tokens (0.0 MB), 2 learned tokens, 4 tokens in the longest; "
        "tokenizer bytes; 1.2 MB/s")


# ------------------------------------------------------------
# adapter folders and merge.py: rows (files, words of the command, words in the line, exit status)
#
# The folder `base` holds a Hugging Face directory of one block, 16 features wide.

SHAPE = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 2}
BASE = {"model_type": "llama"} | SHAPE
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
A, B, M = f"{Q_PROJ}.lora_A.weight", f"{Q_PROJ}.lora_B.weight", f"{Q_PROJ}.mora_M.weight"
PAIR_OF_2 = {A: torch.ones(2, 16), B: torch.ones(16, 2)}
NAMED = {"base_model_name_or_path": "../base", "r": 2}
MERGE, NAN = "a out", float("nan")
UNFIT = "q_proj does not fit the base model: Error(s) in loading state_dict for "


def folder(config, tensors):
    """The files of an adapter folder `a`; tensors: {name: tensor}, or the bytes of the file."""
    content = tensors if isinstance(tensors, bytes) else save(tensors)
    return {"a/adapter_config.json": config, "a/adapter_model.safetensors": content}


def lora(tensors=PAIR_OF_2, **changes):
    return folder({"peft_type": "LORA", "lora_alpha": 4} | NAMED | changes, tensors)


SQUARE = {"peft_type": "MORA", "operator": "share", "groups": "permute", "seed": 0, "cycle": 1}


def square(**changes):
    return folder(SQUARE | NAMED | changes, {M: torch.ones(8, 8)})


def authors(second_copy=1.0, **changes):
    config = {"peft_type": "LORA", "lora_alpha": 4, "use_mora": True, "mora_type": 1}
    return folder(config | NAMED | changes,
                  {A: torch.ones(8, 8), B: torch.full((8, 8), second_copy)})


def sizes(key, given, needed):
    """torch's words for a tensor of another shape."""
    return (f"size mismatch for {key}: copying a param with shape torch.Size({given}) from "
            f"checkpoint, the shape in current model is torch.Size({needed})")


def base_with(**changes):
    return lora() | {"base/config.json": BASE | changes}


COUNTS, SCALES = "an object of whole numbers from 1 to 99999", "an object of finite numbers above 0"
FLAG = "true or false"
# (form of the adapter, key, values, what the key must be)
WRONG_VALUES = [
    (lora, "r", (0, -2, "16", 2.5, 1e12, 10 ** 12, True, None, [2]),
     "a whole number from 1 to 99999"),
    (lora, "lora_alpha", ("16", NAN, -1, 0, 0.0, float("inf"), None, 10 ** 400, True),
     "a finite number above 0"),
    (lora, "rank_pattern", ([1], "q_proj", {"q_proj": 0}, {"q_proj": "2"}, {"q": 1, "k": 2.5}),
     COUNTS),
    (lora, "alpha_pattern", (4, {"q": -1}, {"q": NAN}, {"q": 0, "k": 1}, {"q": [1]}), SCALES),
    (lora, "modules_to_save", (["lm_head"], 5), "left out: it is not implemented"),
    (lora, "key_of_tomorrow", ("x" * 5000,), "left out: it is not implemented"),
    (lora, "base_model_name_or_path", (5, ["x"]), "text"),
    (lora, "use_rslora", ("no",), FLAG), (lora, "use_dora", ("no", 1), FLAG),
    (lora, "use_mora", ("yes",), FLAG), (lora, "fan_in_fan_out", ("no",), FLAG),
    (lora, "bias", ("all",), '"none"'),
    (lora, "init_lora_weights", ("pissa",),
     'true or false or "gaussian" or "eva" or "orthogonal"'),
    (lora, "peft_type", ("LOHA", None, ["LORA"]), '"LORA" or "MORA"'),
    (square, "operator", ("twist", 5, None),
     '"truncate" or "share" or "decouple" or "rotate"'),
    (square, "groups", (1, "strided ", "gradient"),
     '"strided" or "contiguous" or "alternate" or "permute"'),
    (square, "seed", ("0", 1.5, None), "a whole number"),
    (square, "cycle", ("1", -1, True), "a whole number from 0"),
    (authors, "mora_type", (5, "1", True), "1 or 2 or 3 or 4 or 6"),
    (authors, "use_dora", (True,), "false"),
]
ADAPTERS = [
    *[(files, MERGE, None, 0) for files in (
        lora(), square(), authors(), lora(bias=None, target_modules="q_proj|v", loftq_config={}),
        lora(target_modules="(", layers_to_transform=[0.5], fan_in_fan_out=True),  # not read
        lora(rank_pattern={"x": 1}, alpha_pattern={r".*\.q_proj": 1e-5}), base_with())],
    # values of adapter_config.json
    *[(form(**{key: value}), MERGE, f"a/adapter_config.json: {key} must be {must_be}, got "
       f"{json.dumps(value)[:80]}", 2)
      for form, key, values, must_be in WRONG_VALUES for value in values],
    *[(lora(**{key: value}), MERGE, f"a/adapter_config.json: {key} holds {text!r}, no "
       "regular expression: ", 2) for key, value, text in (
           ("rank_pattern", {"(": 2}, "("), ("alpha_pattern", {"[": 1}, "["),
           ("rank_pattern", {"a{99999999999}": 2}, "a{99999999999}"))],
    (square(use_mora=True), MERGE, 'peft_type must be "LORA", got "MORA"', 2),
    (authors(r=1000), MERGE, "q_proj: mora_type 1 wraps 16 inputs around once", 2),
    (authors(second_copy=2.0), MERGE, "q_proj has a lora_B that is not its lora_A", 2),
    (lora(base_model_name_or_path="no"), MERGE, "base model 'no' is no Hugging Face directory", 2),
    (lora(base_model_name_or_path="n" * 5000), MERGE, "name one with --base=", 2),
    (lora(base_model_name_or_path="a\0b"), MERGE, "name one with --base=", 2),
    (lora(base_model_name_or_path=None), MERGE, "name one with --base=", 2),
    (lora(r=3), MERGE, f"{UNFIT}LowRank: {sizes('A', [2, 16], [3, 16])}", 2),
    (lora(use_dora=True), MERGE, f'{UNFIT}Rescaled: Missing key(s) in state_dict: "magnitude"', 2),
    (square(r=99999), MERGE, f"{UNFIT}Square: {sizes('M', [8, 8], [1788, 1788])}", 2),
    # adapter_config.json as a whole
    *[(lora() | {"a/adapter_config.json": content}, MERGE, f"a/adapter_config.json {line}", 2)
      for content, line in (
          ([1], "must hold a JSON object, got [1]"), ("null", "must hold a JSON object, got None"),
          ('"x"', "must hold a JSON object, got 'x'"), ("", "cannot be read: Expecting value"),
          ("{", "cannot be read: Expecting"), (b"\xff{}", "cannot be read: 'utf-8' codec"),
          ("[" * 10 ** 5, "cannot be read: "), ("1" * 5000, "cannot be read: Exceeds"))],
    # adapter_model.safetensors
    *[(lora(content), MERGE, f"a/adapter_model.safetensors cannot be read: {line}", 2)
      for content, line in (
          (b"", ""), (b"garbage", ""), (save(PAIR_OF_2)[:-9], ""), (save(PAIR_OF_2)[:40], ""),
          (save(PAIR_OF_2) + b"x", ""), (b"\xff" * 90, ""), (b"\x02" + b"\0" * 7 + b"[]", ""))],
    *[(lora(PAIR_OF_2 | tensors), MERGE, line, 2) for tensors, line in (
        ({A: torch.ones(3, 16)}, f"{UNFIT}LowRank: {sizes('A', [3, 16], [2, 16])}"),
        ({A: torch.ones(16, 2)}, f"{UNFIT}LowRank: {sizes('A', [16, 2], [2, 16])}"),
        ({A: torch.ones(2)}, f"{UNFIT}LowRank: {sizes('A', [2], [2, 16])}"),
        ({B: torch.ones(17, 2)}, f"{UNFIT}LowRank: {sizes('B', [17, 2], [16, 2])}"),
        ({M: torch.ones(8, 8)}, f'{UNFIT}LowRank: Unexpected key(s) in state_dict: "M"'),
        ({A: torch.full((2, 16), NAN)}, f"{A} (torch.float32) must hold finite real numbers"),
        ({B: torch.full((16, 2), -float("inf"))}, f"{B} (torch.float32) must hold finite"),
        ({A: torch.ones(2, 16, dtype=torch.int32)}, f"{A} (torch.int32) must hold finite real"),
        ({"x": torch.ones(1)}, "x is no part of an adapter of linear layers"),
        ({f"{Q_PROJ}.weight": torch.ones(16, 16)}, "weight is no part of an adapter"),
        ({"base_model.model.lm_head.lora_A.weight": torch.ones(2, 16)}, "a adapts lm_head, which"),
        ({A.replace("layers.0", "layers.1"): torch.ones(2, 16)}, "adapts model.layers.1.self_"))],
    (lora({A: PAIR_OF_2[A]}), MERGE, f'{UNFIT}LowRank: Missing key(s) in state_dict: "B"', 2),
    (lora({}), MERGE, "holds no tensors, so it adapts nothing", 2),
    *[({"a/adapter_config.json": lora()["a/adapter_config.json"], file: "x"}, MERGE, line, 2)
      for file, line in (
          ("a/x", "a/adapter_model.safetensors cannot be read: No such file"),
          ("a/adapter_model.safetensors/x", "a/adapter_model.safetensors cannot be read: "),
          ("a/adapter_model.bin", "a holds a pickled adapter_model.bin"))],
    ({"a/adapter_config.json/x": "x"}, MERGE, "a/adapter_config.json cannot be read: ", 2),
    # the base model
    *[(base_with() | {"base/config.json": content}, MERGE, line, 2) for content, line in (
        ([1], "base/config.json must hold a JSON object"), ("{", "base/config.json cannot be read"),
        (b"\xff", "base/config.json cannot be read"))],
    *[(base_with(**{key: value}), MERGE, line, 2) for key, value, line in (
        ("hidden_size", "16", "base/config.json: hidden_size must be a whole number"),
        ("hidden_size", 0, "base/config.json: hidden_size must be a whole number"),
        ("hidden_size", 32, "the weights do not fit the model"),
        ("num_hidden_layers", 10 ** 9, "base/config.json: num_hidden_layers "),
        ("model_type", "gpt2", "model_type 'gpt2' is not implemented"),
        ("rope_theta", NAN, "base/config.json: rope_theta must be a number "),
        ("tokenizer", 5, "base/config.json: tokenizer must be a name, got 5"))],
    (base_with() | {"base/model.safetensors": b"x"}, MERGE, "model.safetensors cannot be read", 2),
    # the command line of merge.py
    (lora() | {"out/x": "x"}, MERGE, "out exists and is not empty: remove it, or name another", 2),
    (lora() | {"out": "x"}, MERGE, "out exists and is not empty", 2),
    (lora() | {"o": "x"}, "a o/out", "o/out cannot be written", 2),
    (lora(), "", "the following arguments are required: checkpoint", 2),
    (lora(), "b out", "error: b does not exist\n", 2),
    (lora(), "a/b out", "error: a/b does not exist\n", 2),
    (lora(), "b/c/d out", "error: b/c/d does not exist\n", 2),
    (lora(), "some/Model-1.5B out", "some/Model-1.5B does not exist; if it is on the hub, first "
     "`hf download some/Model-1.5B --local-dir DIR`\n", 2),
    ({"a/x": "x"}, MERGE, "a holds no checkpoint", 2),
    (lora(), "base out", "base holds no adapters: there is nothing to merge", 2),
    (lora(), "base out --base=base", "base is no adapter folder", 2),
    (lora(), "a out --base=nowhere", "its base model 'nowhere' is no Hugging Face directory", 2),
    (lora(), "a out --best", "a has no checkpoint with a validation loss", 2),
    (lora(), "a out --dtype=int8", "argument --dtype: invalid choice: 'int8'", 2),
    (lora(), "a out --rank=4", "--rank=4 needs --as_lora", 2),
    (square(), "a out --as_lora --rank=0", "argument --rank: must be a whole number from 1", 2),
    (square(), "a --as_lora", "--as_lora needs a TARGET folder", 2),
    (lora(), "a out --as_lora", "the model has no MoRA adapter to write as a LoRA", 2),
    (square(), "a out --as_lora", None, 0), (square(), "a out --as_lora --rank=3", None, 0),
]


@pytest.fixture(scope="session")
def base_files():
    """The files of `base`."""
    weights = Llama(LlamaConfig(**SHAPE), 0).state_dict()
    return {"base/config.json": BASE, "base/model.safetensors": save(weights)}


@pytest.mark.parametrize("files, words, message, status", ADAPTERS)
def test_a_mistake_in_an_adapter_is_one_line(command, base_files, tmp_path, monkeypatch, files,
                                             words, message, status):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, base_files | files)
    code, err = command(merge.main, words.split())
    assert code == status and not list(tmp_path.glob(".*")), err
    if message is None:
        assert err == "" and (tmp_path / "out").is_dir()
    else:
        assert err.startswith("error: ") and err.count("\n") == 1 and message in err, err
        assert len(err) < 1000


def test_a_second_merge_into_one_target_is_told_the_first(command, base_files, tmp_path,
                                                          monkeypatch):
    """While the first writes; the first one's target is whole, and its lock is gone."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, base_files | lora())
    write, second = checkpoint.write_hugging_face, []

    def write_while_another_comes(*arguments):
        write(*arguments)
        monkeypatch.setattr(checkpoint, "write_hugging_face", write)
        second.append(command(merge.main, ["a", "out"]))

    monkeypatch.setattr(checkpoint, "write_hugging_face", write_while_another_comes)
    assert command(merge.main, ["a", "out"]) == (0, "")
    (code, err), = second
    holder = f"in use by process {os.getpid()} on {socket.gethostname()}: merging into out"
    assert code == 2 and holder in err and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base", "out"]
    assert checkpoint.load("out")[0].cfg.hidden_size == 16


def test_a_merge_takes_over_what_a_killed_one_left(command, base_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, base_files | lora() | {".writing-out/.lock": "process 1 on x",
                                                 ".writing-out/new/model.safetensors": "half"})
    assert command(merge.main, ["a", "out"]) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base", "out"]
