"""Rows become samples: the right text, the right ids, and of them the responses are learned."""
import json
import re
import uuid

import numpy as np
import pytest
from test_tokenizer import small_bpe

import data
import sft
import tokenizer
from config import UserError
from shards import open_split

BYTES = tokenizer.load("bytes")
CHATML = """{% for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system
Be brief<|im_end|>
' }}{% endif %}
    {{- '<|im_start|>' + message['role'] + '
' + message['content'] + eos_token + '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
CHAT = [{"role": "user", "content": "naïve <|im_end|> 1?"},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "  Zwei\n"},
        {"role": "user", "content": "unanswered"}]
# both as in Stanford Alpaca, written here a second time
TASK = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
ALPACA = f"Below is an instruction that describes a task. {TASK}{{}}\n\n### Response:"
ALPACA_INPUT = ("Below is an instruction that describes a task, paired with an input that provides "
                f"further context. {TASK}{{}}\n\n### Input:\n{{}}\n\n### Response:")


def sample(tok, row, **options):
    """(ids, which are learned) of one row."""
    words, counts = sft.encode(tok, row, sft.row_format([row], "here"), **options)
    assert counts["longest"] == len(words)
    assert (words[:1] & sft.FIRST).all() and not (words[1:] & sft.FIRST).any()
    return (words & (sft.FIRST - 1)).tolist(), (words >= sft.LEARNED).tolist()


def halves(tok, row):
    """(text that is not learned, text that is), end-of-text as ¶."""
    texts = {False: "", True: ""}
    for i, learned in zip(*sample(tok, row), strict=True):
        texts[learned] += "¶" if i == tok.eos_id else bytes([i]).decode("latin1")
    return texts[False], texts[True]


def chat_folder(folder, template=CHATML):
    """A tokenizer directory of bytes with ChatML's special tokens and a chat template."""
    from tokenizers import AddedToken, Tokenizer
    folder.mkdir()
    BYTES.export_files(folder)
    built = Tokenizer.from_file(str(folder / "tokenizer.json"))
    built.add_special_tokens([AddedToken(text, special=True, normalized=False)
                              for text in ("<|im_start|>", "<|im_end|>")])
    built.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>"}))
    (folder / "chat_template.jinja").write_text(template)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return tokenizer.load(str(folder))


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("row, prompt, response", [
    ({"prompt": "2 + {2} = ", "response": "4"}, "2 + {2} = ", "4"),
    ({"question": "Why?", "answer": "So.\n#### 3"}, ALPACA.format("Why?"), "So.\n#### 3"),
    ({"query": "Why?", "response": "So.", "type": "GSM_Rephrased", "original_question": "?"},
     ALPACA.format("Why?"), "So."),
    ({"question": "Why?", "answer": "So.", "input": "not of this format"},
     ALPACA.format("Why?"), "So."),
    ({"instruction": "Add {x}", "input": "", "output": "5"}, ALPACA.format("Add {x}"), "5"),
    ({"instruction": "Add", "output": "5"}, ALPACA.format("Add"), "5"),
    ({"instruction": "Add", "input": "2, 3", "output": ""}, ALPACA_INPUT.format("Add", "2, 3"), ""),
    ({"instruction": "Add", "output": "5", "system": "Be {b}.\n\nOr"},
     "Be {b}.\n\nOr\n\n### Instruction:\nAdd\n\n### Response:", "5"),
    ({"instruction": "A\n\nB", "input": "2, 3", "output": "5", "system": "Be brief."},
     "Be brief.\n\n### Instruction:\nA\n\nB\n\n### Input:\n2, 3\n\n### Response:", "5"),
    ({"instruction": "Add", "output": "5", "system": ""}, ALPACA.format("Add"), "5"),
    ({"query": "Why?", "response": "So.", "system": "", "history": []},
     ALPACA.format("Why?"), "So."),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_every_format_has_its_text_and_only_the_response_is_learned(row, prompt, response):
    assert halves(BYTES, row) == ("¶" + prompt, response + "¶")


def test_an_input_or_a_system_message_of_null_is_none():
    row = {"instruction": "Add", "input": None, "output": "5", "system": None}
    assert sft.usable(row, "alpaca") is row
    assert halves(BYTES, row) == ("¶" + ALPACA.format("Add"), "5¶")
    for key in ("input", "system"):
        bad = sft.usable(row | {key: 5}, "alpaca")
        assert isinstance(bad, sft.LeftOut) and bad.reason == "bad" and key in bad.message


@pytest.mark.parametrize("row, key", [
    ({"query": "Why?", "response": "So."}, "system"), ({"prompt": "1", "response": "2"}, "history"),
    ({"instruction": "Add", "output": "5", "system": "Be brief."}, "history"),
    ({"messages": CHAT}, "system"), ({"prompt": "1", "response": "2"}, "input"),
    ({"question": "1", "answer": "2"}, "context")])
def test_a_part_of_the_task_that_the_format_cannot_hold_makes_a_row_bad(row, key):
    bad = sft.usable(row | {key: "Be kind."}, sft.row_format([row], "here"))
    assert isinstance(bad, sft.LeftOut) and bad.reason == "bad"
    assert repr(key) in bad.message and "messages" in bad.message


def test_a_chat_without_a_template_is_tulus():
    ids, learned = sample(BYTES, {"messages": CHAT})
    assert bytes(i if i < 256 else 0 for i in ids).decode() == (
        "\0<|user|>\nnaïve <|im_end|> 1?\n<|assistant|>\nOne.\0\n"
        "<|user|>\nTwo?\n<|assistant|>\n  Zwei\n\0")
    assert halves(BYTES, {"messages": CHAT})[1] == "One.¶  Zwei\n¶" and learned[-1]


def test_prompt_and_response_are_encoded_separately():
    tok = small_bpe()
    ids, learned = sample(tok, {"prompt": "the de", "response": "f of"})
    prompt, response = tok.encode("the de").tolist(), tok.encode("f of").tolist()
    assert ids == [tok.eos_id, *prompt, *response, tok.eos_id]
    assert prompt + response != tok.encode("the def of").tolist()
    assert learned == [False] * (1 + len(prompt)) + [True] * (len(response) + 1)


def test_a_template_gives_transformers_ids_and_the_answers_are_learned(tmp_path):
    from transformers import AutoTokenizer
    tok = chat_folder(tmp_path / "chat")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "chat")
    ids, learned = sample(tok, {"messages": CHAT})
    start, end = theirs.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    text = theirs.apply_chat_template(CHAT[:4], tokenize=False)
    wanted = theirs(text, add_special_tokens=False).input_ids
    assert ids + tok.encode_part("\n").tolist() == wanted
    assert ids.count(start) == 5 and tok.eos_id == end and ids[-1] == end
    answers = [i for i, is_learned in zip(ids, learned, strict=True) if is_learned]
    assert answers == [*b"One.", end, *b"  Zwei\n", end]
    _, counts = sft.encode(tok, {"messages": CHAT}, "messages")
    assert counts["bytes"] == len("One.  Zwei\n")  # as of other formats: without end-of-text
    prompt = theirs.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    wanted = theirs(prompt, add_special_tokens=False).input_ids
    assert ids[:learned.index(True)] == wanted


def test_names_of_special_tokens_are_text_outside_templates(tmp_path):
    tok = chat_folder(tmp_path / "chat")
    start = tok.tokenizer.token_to_id("<|im_start|>")
    ids, _ = sample(tok, {"prompt": "<|im_start|>", "response": "<|im_end|>"})
    assert start not in ids and ids.count(tok.eos_id) == 2
    assert tok.decode([*b"One.", tok.eos_id]) == "One."


def test_a_template_that_rewrites_what_it_wrote_is_refused(tmp_path):
    template = ("{% for message in messages %}"
                "{{ message['content'] if loop.last else 'x' }}|{% endfor %}")
    tok = chat_folder(tmp_path / "chat", template)
    with pytest.raises(UserError, match="writes a message differently when others .*'One.'"):
        sample(tok, {"messages": CHAT})
    tok = chat_folder(tmp_path / "fails", "{{ messages[0].x.y }}")
    with pytest.raises(UserError, match="cannot write .*no attribute"):
        sample(tok, {"messages": CHAT})


def test_a_template_that_shortens_earlier_answers_is_refused(tmp_path):
    """As those of models that think: only the last answer keeps its thoughts."""
    tok = chat_folder(tmp_path / "chat", (
        "{% for m in messages %}{% if m['role'] == 'assistant' and loop.last %}<think>{% endif %}"
        "{{ m['content'] }}|{% endfor %}"))
    assert sample(tok, {"messages": CHAT[:2]})
    with pytest.raises(UserError, match="writes a message differently when others .*'  Zwei"):
        sample(tok, {"messages": CHAT})


def test_templates_are_compiled_with_transformers_options(tmp_path):
    from transformers import AutoTokenizer
    tok = chat_folder(tmp_path / "chat", """{% for m in messages %}
    {% if m['role'] == 'nobody' %}
        {% break %}
    {% endif %}
  {{ m['role'] }}:
    {% set text = m['content'] %}
{{ text }}
{{ (m | tojson) ~ (["<it's> & é"] | tojson(indent=2)) }}
{% endfor %}
{% if tools is not none or not documents is defined %}
tools or documents
{% endif %}
  {% if add_generation_prompt %}
assistant:
    {% endif %}
""")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "chat")
    for prompt in (False, True):
        wanted = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
        assert sft.render(tok, CHAT, prompt) == wanted


def test_the_steps_of_a_template_are_counted_anew_for_each_chat(tmp_path, monkeypatch):
    tok = chat_folder(tmp_path / "chat")
    monkeypatch.setattr(sft, "TEMPLATE_STEPS", 12)
    texts = {sft.render(tok, CHAT, True) for _ in range(5)}
    assert len(texts) == 1
    with pytest.raises(UserError, match="it takes more than 12 steps"):
        sft.render(tok, CHAT * 3, True)


def test_end_of_text_inside_an_answer_is_learned_as_what_follows_it(tmp_path):
    tok = chat_folder(tmp_path / "chat")
    chat = [CHAT[0], {"role": "assistant", "content": "a<|im_end|>b"}]
    ids, learned = sample(tok, {"messages": chat})
    answer = [i for i, is_learned in zip(ids, learned, strict=True) if is_learned]
    assert answer == [ord("a"), tok.eos_id, ord("b"), tok.eos_id]


def test_a_sample_of_which_the_first_token_alone_is_learned_is_dropped(tmp_path):
    """Nothing predicts it."""
    tok = chat_folder(tmp_path / "chat", "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    row = {"messages": CHAT[1:2]}
    assert sft.encode(tok, row, "messages", 1, "truncate") == (None, {"dropped": 1})
    words, counts = sft.encode(tok, row, "messages", 2, "truncate")
    assert (words >= sft.LEARNED).all() and counts["longest"] == 2


def test_a_chat_that_begins_with_an_answer_is_left_out_if_the_template_cannot(tmp_path):
    """As SmolLM2's: a system prompt of its own comes before the first message, if there is one."""
    tok = chat_folder(tmp_path / "chat", (
        "{% for m in messages %}{% if loop.first %}SYSTEM|{% endif %}{{ m['role'][0] }}:"
        "{{ m['content'] }}|{% endfor %}{% if add_generation_prompt %}a:{% endif %}"))
    with pytest.warns(UserWarning, match="cannot begin a chat with an answer"):
        words, counts = sft.encode(tok, {"messages": CHAT[1:]}, "messages")
    assert words is None and counts == {"dropped": 1, "refused": 1}
    assert sft.encode(tok, {"messages": CHAT[:2]}, "messages")[0] is not None


@pytest.mark.parametrize("file, before, after", [
    ("chat_template.jinja", "<|im_start|>", "<|im_start|> "),
    ("tokenizer_config.json", '"eos_token": "<|im_end|>"', '"eos_token": "<|im_start|>"'),
    ("tokenizer_config.json", '"bos_token": "<|im_start|>"', '"bos_token": "<|im_end|>"')])
def test_another_template_or_end_of_text_is_another_corpus(tmp_path, file, before, after):
    """The tokenizer's name, a checksum of tokenizer.json, is the same."""
    chat_folder(tmp_path / "chat")

    def prepare():
        return sft.prepare(tmp_path / "data", str(tmp_path / "chat"), {"source": "test"},
                           [(lambda: [{"messages": CHAT}], ["train"])], "messages")

    assert prepare()["splits"] == prepare()["splits"]
    path = tmp_path / "chat" / file
    path.write_text(path.read_text().replace(before, after))
    tokenizer.load.cache_clear()
    with pytest.raises(UserError, match="holds another corpus .template was"):
        prepare()


def test_a_chat_that_the_template_refuses_is_left_out_and_counted(tmp_path, capsys):
    chat_folder(tmp_path / "chat", (
        "{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ raise_exception('no system message') }}{% endif %}{{ m['content'] }}|{% endfor %}"))
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    refused = {"messages": [{"role": "system", "content": "0"}, *turns]}

    def prepare(name, rows):
        return sft.prepare(tmp_path / name, str(tmp_path / "chat"), {"source": "test"},
                           [(lambda: rows, ["train"])], "messages")

    with pytest.warns(UserWarning, match="refuses a chat: no system message"):
        totals = prepare("data", [{"messages": turns}, refused] * 3)["splits"]["train"]
    assert (totals["documents"], totals["refused"], totals["dropped"]) == (3, 3, 3)
    assert ", 3 dropped, 3 of them refused by the chat template;" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="refuses"):
        with pytest.raises(UserError, match="no document was found: train 0 samples .* 3 dropped, "
                                            "3 of them refused by the chat template"):
            prepare("none", [refused] * 3)


def test_a_template_without_end_of_text_gets_one_at_the_end(tmp_path):
    tok = chat_folder(tmp_path / "chat", (
        "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"))
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    ids, learned = sample(tok, {"messages": turns * 2})
    assert bytes(ids[:-1]).decode().split() == ["u:1", "a:2", "u:1", "a:2"]
    assert ids[-1] == tok.eos_id and ids.count(tok.eos_id) == 1 and learned[-1]


def test_long_samples_are_dropped_or_cut_and_counted():
    sizes = (1, 4, 5, 7, 9, 10)  # samples of 7, 10, 11, 13, 15 and 16 tokens
    rows = [{"prompt": "p" * size, "response": "r" * 4} for size in sizes]
    for too_long, lengths, learned, truncated in (
            ("drop", [7, 10], [5, 5], [0, 0]),
            ("truncate", [7, 10, 10, 10], [5, 5, 4, 2], [0, 0, 1, 1])):
        encoded = [sft.encode(BYTES, row, "prompt", 10, too_long) for row in rows]
        kept = [(words, counts) for words, counts in encoded if words is not None]
        assert [len(words) for words, _ in kept] == lengths
        assert [counts for _, counts in kept] == [
            {"bytes": min(4, learned[i]), "learned": learned[i], "longest": lengths[i],
             "truncated": truncated[i]} for i in range(len(kept))]  # a byte is a token here
        dropped = [counts for words, counts in encoded if words is None]
        assert dropped == [{"dropped": 1}] * (6 - len(kept))
    last = kept[-1][0][-1]  # no end-of-text where the response did not end
    assert last & 0xff == ord("r") and last >= sft.LEARNED
    assert sft.encode(BYTES, {"messages": CHAT[:1]}, "messages") == (None, {"dropped": 1})


def test_files_become_a_folder_whose_manifest_describes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"{i}?", "answer": "y" * i + f"\n#### {i}"} for i in range(300)]
    write_rows(tmp_path / "a.jsonl", rows)
    write_rows(tmp_path / "b.jsonl", rows[:5])
    data.main(["sft", "q", "a.jsonl", "--val", "b.jsonl", "--tokenizer=bytes", "--seq_len=350"])
    assert "val 5 samples" in capsys.readouterr().out
    manifest = data.read_manifest("data/q")
    totals = manifest["splits"]["train"]
    facts = [manifest[key] for key in ("kind", "format", "template")]
    assert facts == ["samples", "question", sft.ALPACA]
    assert totals["documents"] + totals["dropped"] == 300 and totals["dropped"] > 50
    train = open_split("data/q", "train")
    assert len(train.lengths) == totals["documents"]
    assert 340 < train.lengths.max() == totals["longest"] <= 350
    assert train.learned.sum() == totals["learned"]
    ids, learned = train.sample(7)
    assert bytes(ids[learned][:-1].astype(np.uint8)).decode() == rows[7]["answer"]
    data.main(["check", "q"])
    data.main(["sft", "cut", "a.jsonl", "--val", "b.jsonl", "--tokenizer=bytes", "--seq_len=350",
               "--long=truncate"])
    cut = data.read_manifest("data/cut")["splits"]["train"]
    assert (cut["documents"], cut["truncated"]) == (300, totals["dropped"]) and "dropped" not in cut


@pytest.mark.parametrize("words, message", [
    (["bad", "bad.jsonl"], "bad.jsonl, row 1: key 'prompt' holds 1, not text"),
    (["odd", "odd.jsonl"], "row 1: no sample can be made of the keys body; known are"),
    (["none"], "data.py sft NAME"),
    (["t", "a.txt"], "files may end in .json"),
    (["short", "a.jsonl", "--seq_len=20"], "no document of at most 20 tokens was found"),
])
def test_mistakes_on_the_command_line_are_named(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "a.jsonl", [{"question": "Why?", "answer": "So."}])
    write_rows(tmp_path / "bad.jsonl", [{"prompt": 1, "response": "x"}])
    write_rows(tmp_path / "odd.jsonl", [{"body": "x"}])
    with pytest.raises(UserError, match=message):
        data.main(["sft", *words, "--tokenizer=bytes"])


def test_the_recipes_stream_from_the_hub(tmp_path, monkeypatch):
    import datasets
    monkeypatch.chdir(tmp_path)
    requests = []

    def load_dataset(name, config, split, streaming):
        requests.append((name, config, split, streaming))
        rows = [{"query": f"{i}?", "response": "y", "text": split[0] * 99} if i % 50 else
                {"query": None, "response": "y", "text": None} for i in range(200)]
        if "tulu" in name:
            rows = [{"messages": CHAT[:2], "id": str(i)} for i in range(200)]
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name, count in (("tulu", 198), ("metamath", 194)):
        data.main([name, "--tokenizer=bytes", "--seq_len=2048", "--long=truncate", "--skip_bad=5"])
        counts = [len(open_split(f"data/{name}", split).lengths) for split in ("train", "val")]
        request = data.read_manifest(f"data/{name}")["request"]
        assert counts == [count, 2] and (request["seq_len"], request["long"]) == (2048, "truncate")
    with pytest.raises(UserError, match="4 of 200 rows cannot be used, .* --skip_bad=PERCENT"):
        data.main(["c4", "--tokenizer=bytes"])
    requests.pop()
    data.main(["c4", "--tokenizer=bytes", "--train_tokens=1e4", "--val_tokens=1050",
               "--skip_bad=5"])
    splits = [open_split("data/c4", split) for split in ("train", "val")]
    assert [len(split) for split in splits] == [10_000, 1100]
    assert [chr(split.read(0, 1)[0]) for split in splits] == ["t", "v"]  # train and validation
    with pytest.raises(UserError, match="another corpus .val_tokens was 1050, now 1060"):
        data.main(["c4", "--tokenizer=bytes", "--train_tokens=1e4", "--val_tokens=1060"])
    assert requests == [("allenai/tulu-v2-sft-mixture", None, "train", True),
                        ("meta-math/MetaMathQA", None, "train", True),
                        ("allenai/c4", "en", "validation", True),
                        ("allenai/c4", "en", "train", True)]


def test_a_hub_out_of_reach_is_named(tmp_path, monkeypatch):
    import datasets

    def load_dataset(*args, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="ConnectionError: no route.*check the network"):
        data.main(["metamath", "--tokenizer=bytes", "--long=truncate"])


def test_uuids_are_pairs_by_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data.main(["uuid", "--pairs=300", "--tokenizer=bytes"])
    train, val = open_split("data/uuid", "train"), open_split("data/uuid", "val")
    assert train.format == "uuid" and (train.learned == 37).all() and len(train.lengths) == 300
    assert (train.read(0, len(train)) == val.read(0, len(val))).all()
    texts = [bytes(train.sample(i)[0][1:-1].astype(np.uint8)).decode().split("\n")
             for i in range(300)]
    words = [text for pair in texts for text in pair]
    assert len(set(words)) == 600
    assert all(uuid.UUID(text).version == 4 and re.fullmatch("[0-9a-f-]{36}", text)
               for text in words)
    first = next(sft.uuid_pairs(300, 0))
    assert first == {"prompt": texts[0][0] + "\n", "response": texts[0][1]}
    assert list(sft.uuid_pairs(300, 0)) == list(sft.uuid_pairs(300, 0))
    assert list(sft.uuid_pairs(300, 0)) != list(sft.uuid_pairs(300, 1))
    with pytest.raises(UserError, match="another corpus .seed was 0, now 1.: remove it"):
        data.main(["uuid", "--pairs=300", "--tokenizer=bytes", "--seed=1"])


@pytest.mark.parametrize("row, message", [
    ({"prompt": "a", "response": 7}, "key 'response' holds 7, not text"),
    ({"prompt": ["a"], "response": "7"}, "key 'prompt' holds .'a'."),
    ({"prompt": "a", "response": False}, "key 'response' holds False"),
])
def test_one_bad_row_changes_no_other_row(tmp_path, monkeypatch, row, message):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i} =", "response": f'"{i}"\n'} for i in range(300)]
    write_rows(tmp_path / "a.jsonl", rows[:200] + [row] + rows[200:])
    with pytest.raises(UserError, match=f"a.jsonl, row 201: {message}"):
        data.main(["sft", "strict", "a.jsonl", "--tokenizer=bytes"])
    data.main(["sft", "skip", "a.jsonl", "--tokenizer=bytes", "--skip_bad=1"])
    train = open_split("data/skip", "train")
    assert train.totals["bad"] == 1
    responses = []
    for i in range(len(train.lengths)):
        ids, learned = train.sample(i)
        responses.append(bytes(ids[learned][:-1].astype(np.uint8)).decode())
    of_train = [i for i in range(300) if i not in (99, 199, 298)]  # the bad row shifts the last one
    assert responses == [rows[i]["response"] for i in of_train]


@pytest.mark.parametrize("message", [
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {"role": "user", "content": None},
    {"role": "user"},
    "hi",
])
def test_a_chat_that_is_not_of_texts_is_named(tmp_path, monkeypatch, message):
    monkeypatch.chdir(tmp_path)
    chats = [{"messages": CHAT[:2]}] * 5 + [{"messages": [message, CHAT[1]]}]
    write_rows(tmp_path / "a.jsonl", chats)
    with pytest.raises(UserError, match="a.jsonl, row 6: messages must be a list of"):
        data.main(["sft", "chats", "a.jsonl", "--tokenizer=bytes"])
    data.main(["sft", "chats", "a.jsonl", "--tokenizer=bytes", "--skip_bad=20"])
    assert len(open_split("data/chats", "train").lengths) == 5


def test_a_first_row_of_nulls_does_not_decide_the_format(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"messages": None, "prompt": None, "response": "x"}]
    rows += [{"prompt": "a", "response": "b"}] * 150
    write_rows(tmp_path / "a.jsonl", rows)
    data.main(["sft", "first", "a.jsonl", "--tokenizer=bytes"])
    assert open_split("data/first", "train").totals["missing"] == 1


def test_a_split_of_empty_responses_is_refused(tmp_path):
    """It has no byte to share the loss: bits per byte divided by zero."""
    full, empty = ([{"prompt": "a", "response": text}] for text in ("b", ""))
    stages = [(lambda: full, ["train"]), (lambda: empty * 2, ["val"])]
    sft.prepare(tmp_path / "pairs", "bytes", {"source": "test"}, stages, "prompt")
    assert len(open_split(tmp_path / "pairs", "train")) == 4
    with pytest.raises(UserError, match="pairs: the responses of all 2 val samples are empty: pre"):
        open_split(tmp_path / "pairs", "val")
