"""README's commands of fine-tuning run, cut to two steps, on a tiny base model."""
import io
import json
import shlex
from pathlib import Path

import pytest
from test_sft import chat_folder
from test_verbs import write_model

import data
import evaluate
import merge
import sample
import tokenizer
import train

ROOT = Path(__file__).parent.parent
MAINS = {f"{module.__name__}.py": module.main for module in (data, evaluate, merge, sample, train)}
CUT = {"data.py uuid": ["--pairs=20"], "evaluate.py": ["--limit=2", "--max_new_tokens=4"],
       "sample.py": ["--max_new_tokens=4"],
       "train.py": ["--steps=2", "--batch_size=4", "--micro_batch=2", "--device=cpu"]}


def fine_tuning_commands():
    """[words after the interpreter] of the ```sh blocks of the section "Fine-tuning"."""
    section = (ROOT / "README.md").read_text().split("\n## Fine-tuning\n")[1].split("\n## ")[0]
    blocks = [part.partition("\n```")[0] for part in section.split("```sh\n")[1:]]
    commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
    return [words[1:] for words in commands if words[0] in ("python", "torchrun")]


@pytest.mark.filterwarnings("ignore:rank")
def test_fine_tuning_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    Path("models").mkdir()
    write_model(Path("models/base"), chat_folder(Path("models/base")))
    rows = [{"question": f"{i} + 1?", "answer": f"It is #### {i + 1}"} for i in range(8)]
    for name in ("train.jsonl", "test.jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    commands = fine_tuning_commands()
    assert {script for script, *_ in commands} == MAINS.keys()
    for words in commands:
        monkeypatch.setattr("sys.stdin", io.StringIO("How are you?\n"))
        tokenizer.load.cache_clear()
        cut = [word for start, more in CUT.items() if " ".join(words).startswith(start)
               for word in more]
        MAINS[words[0]]([*words[1:], *cut])
    printed = capsys.readouterr().out
    scores = [json.loads(line) for line in printed.splitlines() if line.startswith('{"checkpoint')]
    assert [line["answers"] for line in scores] == [2, 2]
    assert len(Path("answers.jsonl").read_text().splitlines()) == 2
    assert printed.count("2/2   loss") == 2
