"""Rows become samples: the right text, the right ids, and of them the responses are learned."""
import json

import numpy as np
import pytest
from test_tokenizer import small_bpe

import data
import shards
import sft
import tokenizer
from shards import Tokens
from config import UserError
from shards import open_split

BYTES = tokenizer.load("bytes")
CHATML = """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system
Be brief<|im_end|>
' }}{% endif %}
    {{- '<|im_start|>' + message['role'] + '
' + message['content'] + eos_token + '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
CHAT = [{"role": "user", "content": "naïve <|im_end|> 1?"}, {"role": "assistant", "content": "One."}, {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "  Zwei\n"}, {"role": "user", "content": "unanswered"}]
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\n{}\n\n### Response:"


def sample(tok, row, **options):
    """(ids, which are learned) of one row."""
    style = sft.format_of(row, "here")
    words, ends, sizes, counts = sft.encode(tok, [row], style, **options)
    assert len(ends) <= 1 and counts["longest"] == len(words) and (words[:1] & sft.FIRST).all() and not (words[1:] & sft.FIRST).any()
    return (words & (sft.FIRST - 1)).tolist(), (words >= sft.LEARNED).tolist()


def halves(tok, row):
    """(text that is not learned, text that is), end-of-text as ¶."""
    ids, learned = sample(tok, row)
    text = lambda which: "".join("¶" if i == tok.end else bytes([i]).decode("latin1") for i, yes in zip(ids, learned) if yes == which)
    return text(False), text(True)


def chat_folder(folder, template=CHATML):
    """A tokenizer directory of bytes with ChatML's special tokens and a chat template."""
    from tokenizers import AddedToken, Tokenizer
    folder.mkdir()
    BYTES.export(folder)
    built = Tokenizer.from_file(str(folder / "tokenizer.json"))
    built.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<|im_start|>", "<|im_end|>")])
    built.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}))
    (folder / "chat_template.jinja").write_text(template)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return tokenizer.load(str(folder))


@pytest.mark.parametrize("row, prompt, response", [
    ({"prompt": "2 + {2} = ", "response": "4"}, "2 + {2} = ", "4"),
    ({"question": "Why?", "answer": "So.\n#### 3"}, ALPACA.format("Why?"), "So.\n#### 3"),
    ({"query": "Why?", "response": "So.", "type": "GSM_Rephrased", "original_question": "?"}, ALPACA.format("Why?"), "So."),
    ({"instruction": "Add {x}", "input": "", "output": "5"}, ALPACA.format("Add {x}"), "5"),
    ({"instruction": "Add", "output": "5"}, ALPACA.format("Add"), "5"),
    ({"instruction": "Add", "input": "2, 3", "output": ""}, "Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
     "that appropriately completes the request.\n\n### Instruction:\nAdd\n\n### Input:\n2, 3\n\n### Response:", ""),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_every_format_has_its_text_and_only_the_response_is_learned(row, prompt, response):
    assert halves(BYTES, row) == ("¶" + prompt, response + "¶")


def test_a_chat_without_a_template_is_tulus():
    ids, learned = sample(BYTES, {"messages": CHAT})
    assert bytes(i if i < 256 else 0 for i in ids).decode() == (
        "\0<|user|>\nnaïve <|im_end|> 1?\n<|assistant|>\nOne.\0\n<|user|>\nTwo?\n<|assistant|>\n  Zwei\n\0")
    assert halves(BYTES, {"messages": CHAT})[1] == "One.¶  Zwei\n¶" and learned[-1]


def test_prompt_and_response_are_encoded_apart():
    tok, row = small_bpe(), {"prompt": "the de", "response": "f of"}
    ids, learned = sample(tok, row)
    assert ids == [tok.end, *tok.encode("the de"), *tok.encode("f of"), tok.end] and ids[1:-1] != tok.encode("the def of").tolist()
    assert learned == [False] * (1 + len(tok.encode("the de"))) + [True] * (len(tok.encode("f of")) + 1)


def test_a_template_gives_transformers_ids_and_the_answers_are_learned(tmp_path):
    from transformers import AutoTokenizer
    tok = chat_folder(tmp_path / "chat")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "chat")
    ids, learned = sample(tok, {"messages": CHAT})
    start, end = theirs.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    expected = theirs.apply_chat_template(CHAT[:4], tokenize=False)
    assert ids + tok.encode_part("\n").tolist() == theirs(expected, add_special_tokens=False).input_ids
    assert ids.count(start) == 5 and tok.end == end and ids[-1] == end
    assert [i for i, yes in zip(ids, learned) if yes] == [*b"One.", end, *b"  Zwei\n", end]
    prompt = theirs.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert ids[:learned.index(True)] == theirs(prompt, add_special_tokens=False).input_ids
    # what is no template stays text
    assert start not in sample(tok, {"prompt": "<|im_start|>", "response": "<|im_end|>"})[0] and tok.decode([*b"One.", end]) == "One."


def test_a_template_that_rewrites_what_it_wrote_is_refused(tmp_path):
    tok = chat_folder(tmp_path / "chat", "{% for message in messages %}{{ message['content'] if loop.last else 'x' }}|{% endfor %}")
    with pytest.raises(UserError, match="writes a message differently when others follow.*'One.'"):
        sample(tok, {"messages": CHAT})
    with pytest.raises(UserError, match="can not write .*no attribute"):
        sample(chat_folder(tmp_path / "fails", "{{ messages[0].x.y }}"), {"messages": CHAT})


def test_a_chat_that_the_template_refuses_is_left_out_and_counted(tmp_path, capsys):
    template = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}{{ m['content'] }}|{% endfor %}"
    chat_folder(tmp_path / "chat", template)
    plain = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}
    rows = [plain, {"messages": [{"role": "system", "content": "0"}, *plain["messages"]]}] * 3
    with pytest.warns(UserWarning, match="refuses a chat: no system message"):
        manifest = sft.prepare(tmp_path / "data", str(tmp_path / "chat"), {"source": "test"}, [(lambda: [rows], lambda rows, first: {"train": rows})])
    totals = manifest["splits"]["train"]
    assert (totals["documents"], totals["refused"], totals["dropped"]) == (3, 3, 3)
    assert "3 dropped (3 of them refused by the chat template)" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="refuses"), pytest.raises(UserError, match="gave no sample; the chat template refused 3 chats"):
        sft.prepare(tmp_path / "none", str(tmp_path / "chat"), {"source": "test"}, [(lambda: [rows[1::2]], lambda rows, first: {"train": rows})])


def test_a_template_without_end_of_text_gets_one_at_the_end_alone(tmp_path):
    tok = chat_folder(tmp_path / "chat", "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}")
    ids, learned = sample(tok, {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}] * 2})
    assert bytes(ids[:-1]).decode().split() == ["u:1", "a:2", "u:1", "a:2"]
    assert ids[-1] == tok.end and ids.count(tok.end) == 1 and learned[-1]


def test_long_samples_are_dropped_or_truncated_and_counted():
    rows = [{"prompt": "p" * size, "response": "r" * 4} for size in (1, 4, 5, 7, 9, 10)]  # 7, 10, 11, 13, 15, 16 tokens
    words, ends, _, counts = sft.encode(BYTES, rows, "prompt", seq_len=10)
    assert counts == {"learned": 10, "longest": 10, "dropped": 4, "truncated": 0, "refused": 0} and ends.tolist() == [7, 17]
    words, ends, _, counts = sft.encode(BYTES, rows, "prompt", seq_len=10, long="truncate")
    assert counts == {"learned": 10 + 4 + 2, "longest": 10, "dropped": 2, "truncated": 2, "refused": 0} and ends.tolist() == [7, 17, 27, 37]
    assert (words[-1] & 0xff, words[-1] >= sft.LEARNED) == (ord("r"), True)  # no end-of-text where it did not end
    assert sft.encode(BYTES, [{"messages": CHAT[:1]}], "messages")[3]["dropped"] == 1


def test_files_become_a_folder_that_says_what_it_holds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"{i}?", "answer": "y" * i + f"\n#### {i}"} for i in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))
    data.main(["sft", "q", "a.jsonl", "--val", "b.jsonl", "--tokenizer=bytes", "--seq_len=350"])
    assert "val 5 samples" in capsys.readouterr().out
    manifest = data.read_manifest("data/q")
    totals = manifest["splits"]["train"]
    assert (manifest["kind"], manifest["format"], manifest["template"]) == ("samples", "question", sft.ALPACA)
    assert totals["documents"] + totals["dropped"] == 300 and totals["dropped"] > 50 and 340 < totals["longest"] <= 350
    train = open_split("data/q", "train")
    assert len(train.lengths) == totals["documents"] and train.lengths.max() == totals["longest"] and train.learned.sum() == totals["learned"]
    ids, learned = train.sample(7)
    assert bytes(ids[learned][:-1].astype(np.uint8)).decode() == rows[7]["answer"]
    data.main(["check", "q"])
    with pytest.raises(UserError, match="data/q holds samples, text is needed"):
        Tokens("data/q", "train")
    (tmp_path / "bad.jsonl").write_text('{"prompt": 1, "response": "x"}\n')
    (tmp_path / "odd.jsonl").write_text('{"body": "x"}\n')
    for words, says in ((["bad", "bad.jsonl"], "'prompt' holds int"), (["odd", "odd.jsonl"], "has the keys body, of which no sample"), (["none"], "data.py sft NAME"),
                        (["t", "a.txt"], "no file"), (["short", "a.jsonl", "--seq_len=20"], "no sample of at most 20 tokens")):
        with pytest.raises(UserError, match=says):
            data.main(["sft", *words, "--tokenizer=bytes"])


def test_a_killed_preparation_counts_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 400)
    chunks = [[{"prompt": "p" * (i + j), "response": "r" * j} for i in range(7)] for j in range(20)]
    whole = sft.prepare(tmp_path / "whole", "bytes", {"source": "s"}, [(lambda: iter(chunks), data.every_100th)], "prompt", 30, "truncate")

    def dies():
        yield from chunks[:13]
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        sft.prepare(tmp_path / "killed", "bytes", {"source": "s"}, [(dies, data.every_100th)], "prompt", 30, "truncate")
    again = sft.prepare(tmp_path / "killed", "bytes", {"source": "s"}, [(lambda: iter(chunks), data.every_100th)], "prompt", 30, "truncate")
    assert again["splits"] == whole["splits"] and whole["splits"]["train"]["truncated"] > 10 and len(whole["splits"]["train"]["shards"]) > 3


def test_the_recipes_stream_from_the_hub(tmp_path, monkeypatch):
    import datasets
    monkeypatch.chdir(tmp_path)
    asked = []

    def load_dataset(name, split, streaming):
        asked.append((name, split, streaming))
        rows = [{"messages": CHAT[:2], "id": str(i)} if "tulu" in name else {"query": f"{i}?", "response": "y", "type": "t"} for i in range(200)]
        return datasets.Dataset.from_list(rows).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("tulu", "metamath"):
        data.main([name, "--tokenizer=bytes", "--seq_len=2048"])
        assert [len(open_split(f"data/{name}", split).lengths) for split in ("train", "val")] == [198, 2]
    assert asked == [("allenai/tulu-v2-sft-mixture", "train", True), ("meta-math/MetaMathQA", "train", True)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    monkeypatch.chdir(tmp_path / "data")
    with pytest.raises(UserError, match="check the network"):
        data.main([name, "--tokenizer=bytes", "--long=truncate"])


def test_uuids_are_pairs_by_seed(tmp_path, monkeypatch):
    import re
    import uuid
    monkeypatch.chdir(tmp_path)
    data.main(["uuid", "--pairs=300", "--tokenizer=bytes"])
    train, val = open_split("data/uuid", "train"), open_split("data/uuid", "val")
    assert train.format == "uuid" and (train.read(0, len(train)) == val.read(0, len(val))).all() and len(train.lengths) == 300
    texts = [bytes(train.sample(i)[0][1:-1].astype(np.uint8)).decode().split("\n") for i in range(300)]
    assert all(uuid.UUID(text).version == 4 and re.fullmatch("[0-9a-f-]{36}", text) for pair in texts for text in pair)
    assert len({text for pair in texts for text in pair}) == 600 and (train.learned == 37).all()
    assert list(sft.uuid_pairs(300, 0)) == list(sft.uuid_pairs(300, 0)) != list(sft.uuid_pairs(300, 1))
    assert [texts[0][0] + "\n", texts[0][1]] == list(next(sft.uuid_pairs(300, 0))[0].values())
