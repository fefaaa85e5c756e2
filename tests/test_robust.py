"""Every mistake and every failure of the machine is one line, with the exit status of the table.

A row of the table: (files, command, words in the line, exit status). {"name": content} are the
files in the current folder; a content that is not text or bytes is written as JSON.
"""
import gzip
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data
import sft
import shards
import tokenizer
from config import UserError, at_least, command_line, lock, write_json

ROOT = Path(__file__).parent.parent
GOOD = {"text": "some text"}
LINES = json.dumps(GOOD) + "\n"
PAIR = json.dumps({"prompt": "a", "response": "b"}) + "\n"
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
PACKED = gzip.compress((LINES * 500).encode())
SHARD = {"file": "train_00000.bin", "tokens": 4, "crc32": 0}
SPLIT = {"tokens": 4, "documents": 1, "bytes": 3, "shards": [SHARD]}
EMPTY = {"tokens": 0, "documents": 0, "bytes": 0, "shards": []}
MANIFEST = {"request": {"source": "x", "tokenizer": "bytes"}, "tokenizer": "bytes",
            "vocab_size": 257, "dtype": "uint16", "splits": {"train": SPLIT, "val": EMPTY}}


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
     "a.jsonl, row 3: key 'text' holds int 5, not", 2),
    ({"a.jsonl": LINES + '{"text": [1]}\n'}, TEXT, "a.jsonl, row 2: key 'text' holds list [1]", 2),
    ({"a.jsonl": LINES + "{broken\n"}, TEXT, "a.jsonl, row 2: the line is not JSON (Expecting", 2),
    ({"a.jsonl": LINES + "\n\n7\n"}, TEXT, "a.jsonl, row 4: the row is int 7, not an object", 2),
    ({"a.jsonl": LINES + '"x"\n'}, TEXT, "a.jsonl, row 2: the row is str 'x', not an object", 2),
    ({"a.jsonl": LINES + "[" * 10 ** 5 + "\n"}, TEXT, "row 2: the line is nested too deeply", 2),
    ({"a.jsonl": LINES + '{"text": 1' + "0" * 5000 + "}\n"}, TEXT,
     "row 2: the line is not JSON", 2),
    ({"a.jsonl": LINES.encode() + b'{"text": "\xff"}\n'}, TEXT, "row 2: the line is not UTF-8", 2),
    ({"a.jsonl": LINES.encode("utf-16")}, TEXT, "a.jsonl, row 1: the line is not UTF-8", 2),
    ({"a.jsonl": '{"text": null}\n' + LINES}, TEXT, "a.jsonl, row 1: key 'text' holds null", 2),
    ({"a.jsonl": '{"body": "x"}\n'}, TEXT, "row 1: no key 'text', its keys are body: choose", 2),
    ({"a.jsonl": LINES}, TEXT + " --key=body", "1 of 1 rows cannot be used, more than 1 %", 2),
    ({"a.jsonl": LINES * 9 + '{"x": 1}\n'}, TEXT + " --skip_bad=5",
     "1 of 10 rows cannot be used", 2),
    ({"a.jsonl": LINES * 9 + "{\n"}, TEXT + " --skip_bad=10", None, 0),
    ({"a.jsonl": ""}, TEXT, "a.jsonl is empty: it holds no row", 2),
    ({"a.jsonl": "\n \n"}, TEXT, "a.jsonl is empty: it holds no row", 2),
    ({"a.jsonl": '{"text": ""}\n'}, TEXT, "the corpus is empty", 2),
    # files
    ({"a.json.gz": PACKED[:-30]}, "text n a.json.gz --tokenizer=bytes",
     "cannot be read (EOFError", 2),
    ({"a.json.gz": LINES}, "text n a.json.gz --tokenizer=bytes",
     "a.json.gz, row 1 cannot be read", 2),
    ({"a.json.gz": b"\x1f\x8b\x08\0" + b"x" * 90}, "text n a.json.gz --tokenizer=bytes",
     "row 1", 2),
    ({"a.json": "[1, 2"}, "text n a.json --tokenizer=bytes",
     "a.json is no JSON array (Expecting", 2),
    ({"a.json": [GOOD, 5]}, "text n a.json --tokenizer=bytes",
     "a.json, row 2: the row is int 5", 2),
    ({"a.json": []}, "text n a.json --tokenizer=bytes", "a.json is empty: it holds no row", 2),
    ({"a.json": json.dumps(GOOD, indent=1)}, "text n a.json --tokenizer=bytes",
     "a.json, row 1: the line is not JSON", 2),
    ({"a.txt": b"abc\xff"}, "text n a.txt --tokenizer=bytes", "a.txt is not UTF-8 (byte 4: ", 2),
    ({"a.txt": ""}, "text n a.txt --tokenizer=bytes", "a.txt is empty", 2),
    ({"a.parquet": "x"}, "text n a.parquet --tokenizer=bytes",
     "a.parquet, row 1 cannot be read", 2),
    ({}, TEXT, "no file a.jsonl", 2),
    ({"a.csv": "x"}, "text n a.csv --tokenizer=bytes",
     "a.csv: files may end in .json, .json.gz", 2),
    ({"a.txt": "x"}, "sft n a.txt --tokenizer=bytes", "a.txt: files may end in .json", 2),
    ({"d.jsonl/x": "x"}, "text n d.jsonl --tokenizer=bytes", "no file d.jsonl", 2),
    # prompts and responses
    ({"a.jsonl": PAIR + '{"prompt": "a", "response": 7}\n'}, SFT,
     "a.jsonl, row 2: key 'response' holds int 7, not text", 2),
    ({"a.jsonl": '{"question": 1, "answer": "b"}\n'}, SFT, "row 1: key 'question' holds int 1", 2),
    ({"a.jsonl": {"instruction": "a", "input": 3, "output": "b"}}, SFT,
     "key 'input' holds int 3", 2),
    ({"a.jsonl": {"messages": "hello"}}, SFT, "row 1: messages must be a list of {'role'", 2),
    ({"a.jsonl": {"messages": [{"role": "user"}]}}, SFT, "row 1: messages must be a list of", 2),
    ({"a.jsonl": PAIR + '{"prompt": "a"}\n'}, SFT,
     "row 2: no key 'response', the keys are prompt", 2),
    ({"a.jsonl": "{}\n"}, SFT,
     "a.jsonl, row 1: the row has the keys (none), of which no sample", 2),
    ({"a.jsonl": "nonsense\n"}, SFT, "a.jsonl, row 1: the line is not JSON", 2),
    ({"a.jsonl": {"messages": CHAT[:1]}}, SFT, "gave no sample", 2),
    ({"a.jsonl": PAIR}, SFT + " --seq_len=1", "gave no sample of at most 1 tokens", 2),
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
    ({}, "check n", "no token shards in data/n: prepare them with `python data.py text n", 2),
    ({"data": "a file"}, "check n", "no token shards in data/n", 2),
    ({"data/n/manifest.json": "{"}, "check n", "data/n/manifest.json cannot be read: Expecting", 2),
    ({"data/n/manifest.json": [1]}, "check n",
     "manifest.json is damaged (its content must be an", 2),
    *[({"data/n/manifest.json": without(MANIFEST, *path)}, "check n",
       f"it has no key {'.'.join(path)}", 2) for path in (
           ("request",), ("tokenizer",), ("vocab_size",), ("dtype",), ("splits",),
           ("splits", "val"), ("splits", "train", "tokens"), ("splits", "train", "shards"))],
    ({"data/n/manifest.json": MANIFEST | {"dtype": "int8"}}, "check n",
     "dtype must be uint16 or", 2),
    ({"data/n/manifest.json": MANIFEST | {"kind": "x"}}, "check n",
     "kind must be one of text, samp", 2),
    ({"data/n/manifest.json": MANIFEST | {"kind": "samples"}}, "check n", "has no key format", 2),
    ({"data/n/manifest.json": MANIFEST | {"vocab_size": "9"}}, "check n",
     "vocab_size must be a whole number, is '9'", 2),
    ({"data/n/manifest.json": MANIFEST}, "check n",
     "train_00000.bin should hold 8 bytes and hol", 2),
    ({"data/n/manifest.json": MANIFEST, "data/n/train_00000.bin": b"12345678"}, "check n",
     "train_00000.bin is corrupt (checksum", 2),
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
     "must hold an object, holds", 2),
    ({**chat_model("x"), "model/tokenizer_config.json": "{"}, CHATS,
     "config.json cannot be read", 2),
    ({**chat_model("x"), "model/tokenizer_config.json": {}}, CHATS, "eos_token '' is no token", 2),
    ({**chat_model("x"), "model/tokenizer_config.json": {"eos_token": 5}}, CHATS,
     "eos_token must be text, is 5", 2),
    ({**chat_model("x"), "model/chat_template.jinja": b"\xff"}, CHATS, "jinja is not UTF-8", 2),
    (chat_model(7), CHATS, "chat_template must be text, is 7", 2),
    (chat_model([{"name": "default", "template": 7}]), CHATS,
     "chat_template must be text, is 7", 2),
    # chat templates
    (chat_model("{% for"), CHATS, "the chat template of model cannot write", 2),
    (chat_model("{{ messages[9].x }}"), CHATS, "has no element 9", 2),
    (chat_model("{{ 1 / 0 }}"), CHATS, "division by zero", 2),
    (chat_model("{{ messages | nothing }}"), CHATS, "No filter named 'nothing'", 2),
    (chat_model("{{ messages.__class__.__mro__ }}"), CHATS, "unsafe", 2),
    (chat_model("{% for i in range(10 ** 9) %}{% endfor %}"), CHATS, "Range too big", 2),
    (chat_model("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"),
     CHATS, "it takes more than 1,000,000 steps", 2),
    (chat_model("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}"), CHATS, "calls itself", 2),
    (chat_model("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
                "{{ f(50) }}"), CHATS, "it takes more than 1,000,000 steps", 2),
    (chat_model("{{ 'a' * 10 ** 12 }}"), CHATS, "a text of more than 10,000,000 characters", 2),
    (chat_model("{{ 10 ** (10 ** 10) }}"), CHATS, "a text of more than 10,000,000 characters", 2),
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


def test_a_closed_pipe_ends_without_a_traceback(command, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:  # closing it flushes again, as the end of Python does
        monkeypatch.setattr(sys, "stdout", stdout)
        assert command(lambda argv: print("some words"), []) == (1, "")
        monkeypatch.undo()


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
        yield ["text"] * 200

    stages = [(read, data.every_100th)]
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
    ours.environment.state.steps = 0
    theirs = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    assert ours.render(messages=CHAT) == theirs.from_string(template).render(messages=CHAT)


def test_manifests_of_before_are_read(tmp_path):
    """Without a speed, without checksums, and samples without a count of refused chats."""
    write_json(tmp_path / "manifest.json", MANIFEST)
    assert shards.summary(shards.read_manifest(tmp_path)).endswith("tokenizer bytes")
    split = SPLIT | {"learned": 2, "longest": 4, "dropped": 0, "truncated": 0}
    samples = MANIFEST | {"kind": "samples", "format": "prompt", "dtype": "uint32",
                          "splits": {"train": split, "val": EMPTY}}
    write_json(tmp_path / "manifest.json", samples)
    assert "1 samples of 4 tokens, 50% of them" in shards.summary(shards.read_manifest(tmp_path))
