"""Documents become tokens and tokens become batches, and nothing is lost on the way."""
import contextlib
import copy
import gzip
import itertools
import json
import os
import types
import zlib
from pathlib import Path

import numpy as np
import pytest

import data
import shards
import tokenizer
from batches import Batches, every_token_once
from config import UserError
from shards import Tokens

MIXED = ["plain text\n\n  indented", "naïve café — 日本語 🙂👩‍👩‍👧",
         "def f(x):\n\treturn x<|endoftext|>", "a" * 300 + " " * 50]


def prepare(folder, read, source="test", **options):
    """A corpus of bytes, every 100th document validation."""
    stages = [(read, [])]
    return data.prepare(folder, tokenizer.load("bytes"), {"source": source}, stages, **options)


def stored(folder, split):
    """The bytes of a split, with 0 for end-of-text."""
    tokens = Tokens(folder, split)
    ids = tokens.read(0, len(tokens))
    return bytes(np.where(ids == 256, 0, ids).astype(np.uint8))


def expected(documents):
    return b"".join(document.encode() + b"\0" for document in documents)


def test_documents_come_back(tmp_path):
    documents = MIXED * 60 + ["lone \ud800 surrogate", ""]
    manifest = prepare(tmp_path / "d", lambda: documents)
    written = [document.replace("\ud800", "\ufffd") for document in documents]
    splits = {"val": written[99::100],
              "train": [text for i, text in enumerate(written) if i % 100 != 99 and text]}
    for split, kept in splits.items():
        assert stored(tmp_path / "d", split) == expected(kept)
        assert manifest["splits"][split]["documents"] == len(kept)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The current folder, with the same documents in a file of every type."""
    import pyarrow
    import pyarrow.parquet
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"text": text, "url": "x"}) + "\n" for text in MIXED]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    with gzip.open(tmp_path / "b.json.gz", "wt") as file:
        file.writelines(rows)
    pyarrow.parquet.write_table(pyarrow.table({"text": MIXED}), tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text(MIXED[0])
    return tmp_path


def test_files_of_every_type(files):
    data.main(["text", "all", "a.jsonl", "b.json.gz", "c.parquet", "--val", "d.txt",
               "--tokenizer=bytes"])
    assert stored("data/all", "train") == expected(MIXED * 3)
    assert stored("data/all", "val") == expected(MIXED[:1])
    size = Tokens("data/all", "train").totals["bytes"]
    assert size == 3 * sum(len(text.encode()) for text in MIXED)
    data.main(["check", "all"])


def test_files_of_every_val_are_read(files):
    for name in ("one", "two"):  # files of one command do not stay for the next
        data.main(["text", name, "a.jsonl", "--val", "d.txt", "--val=c.parquet",
                   "--tokenizer=bytes"])
        assert stored(f"data/{name}", "val") == expected(MIXED[:1] + MIXED)


@pytest.mark.parametrize("words, message", [
    (["k", "a.jsonl", "--tokenizer=bytes", "--key=body"],
     "a.jsonl, row 1: no key 'body', its keys are text, url: choose one with --key"),
    (["k"], "at least one file"),
    (["k", "a.jsonl", "--tokenizer=gpt22"], "unknown tokenizer"),
])
def test_mistakes_on_the_command_line_are_named(files, words, message):
    with pytest.raises(UserError, match=message):
        data.main(["text", *words])


def test_another_corpus_is_not_overwritten(files):
    data.main(["text", "one", "a.jsonl", "--tokenizer=bytes"])
    with pytest.raises(UserError, match="holds another corpus .*: remove it or rename it$"):
        data.main(["text", "one", "a.jsonl", "b.json.gz", "--tokenizer=bytes"])
    with pytest.raises(UserError, match="another corpus .key was text, now url"):
        data.main(["text", "one", "a.jsonl", "--tokenizer=bytes", "--key=url"])


def test_the_library_of_another_python_is_another_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "stdlib_texts", lambda: MIXED * 50)
    data.prepare_stdlib(tmp_path / "stdlib")
    monkeypatch.setattr(data.platform, "python_version", lambda: "3.99")
    with pytest.raises(UserError, match="another corpus .source was Python .*, now Python 3.99 "):
        data.prepare_stdlib(tmp_path / "stdlib")


def test_one_changed_letter_in_the_middle_of_a_file_is_another_corpus(files):
    rows = [json.dumps({"text": "plain text" * 3000}) + "\n"] * 100  # 3 MB
    (files / "a.jsonl").write_text("".join(rows))
    data.main(["text", "one", "a.jsonl", "--tokenizer=bytes"])
    data.main(["text", "one", "a.jsonl", "--tokenizer=bytes"])
    rows[50] = rows[0].replace("plain", "plaim", 1)
    (files / "a.jsonl").write_text("".join(rows))
    with pytest.raises(UserError, match="holds another corpus .crc32 was"):
        data.main(["text", "one", "a.jsonl", "--tokenizer=bytes"])


def test_a_copy_both_of_training_and_of_validation_is_noted(files, capsys):
    (files / "copy.jsonl").write_bytes((files / "a.jsonl").read_bytes())
    for name, val in (("two", "copy.jsonl"), ("three", "c.parquet")):
        data.main(["text", name, "a.jsonl", "--val", "d.txt", val, "--tokenizer=bytes"])
        noted = "note: a file of --val is a training file too" in capsys.readouterr().out
        assert noted == (name != "three")


def test_a_file_that_is_named_twice_is_refused(files):
    """It would count twice, or as new text in validation."""
    (files / "link.jsonl").symlink_to(files / "a.jsonl")
    for words in ("text k a.jsonl a.jsonl", f"text k d.txt {files}/a.jsonl ./a.jsonl",
                  "text k a.jsonl link.jsonl", "text k a.jsonl --val d.txt a.jsonl",
                  "text k d.txt --val a.jsonl --val=./a.jsonl", "sft k a.jsonl --val a.jsonl"):
        with pytest.raises(UserError, match="(a|link).jsonl is named twice: name each file once$"):
            data.main([*words.split(), "--tokenizer=bytes"])


def test_a_fingerprint_is_of_the_tokens(files):
    data.main(["text", "one", "a.jsonl", "--tokenizer=bytes"])
    data.main(["text", "same", "a.jsonl", "--tokenizer=bytes", "--skip_bad=5"])
    (files / "a.jsonl").write_text((files / "a.jsonl").read_text().replace("plain", "other"))
    data.main(["text", "other", "a.jsonl", "--tokenizer=bytes"])
    one, same, other = (shards.fingerprint(f"data/{name}") for name in ("one", "same", "other"))
    assert one == same != other and len(one) == 16
    file = files / "data" / "same" / "manifest.json"
    manifest = json.loads(file.read_text())
    other_val = manifest["splits"] | {"val": manifest["splits"]["train"]}
    for change in ({"tokenizer": "gpt2"}, {"vocab_size": 300}, {"kind": "samples", "format": ""},
                   {"dtype": "uint32"}, {"splits": other_val}):
        for totals in manifest["splits"].values():
            totals["learned"] = 0
        file.write_text(json.dumps(manifest | change))
        assert shards.fingerprint("data/same") != one, change


@pytest.mark.parametrize("vocab_size, fits", ((256, False), (257, True), (300, True)))
def test_a_model_needs_a_row_for_every_token(corpus, vocab_size, fits):
    model = types.SimpleNamespace(cfg=types.SimpleNamespace(vocab_size=vocab_size))
    with contextlib.nullcontext() if fits else pytest.raises(UserError, match="vocabulary of 257"):
        Tokens(corpus, "train").must_suit(model, None, "here")


def test_one_bad_row_changes_no_other_row(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [f"line {i}\nand 'quotes' \"{i}\"" for i in range(3000)]
    rows = [{"text": text} for text in texts]
    rows[2000] = {"text": 5}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="a.jsonl, row 2001: key 'text' holds 5, not text"):
        data.main(["text", "strict", "a.jsonl", "--tokenizer=bytes"])
    data.main(["text", "skip", "a.jsonl", "--tokenizer=bytes", "--skip_bad=1"])
    train = [text for i, text in enumerate(texts) if i % 100 != 99 and i != 2000]
    assert stored("data/skip", "train") == expected(train)
    assert Tokens("data/skip", "train").totals["bad"] == 1


def test_rows_without_the_key_are_counted_and_more_than_1_percent_stop(files, capsys):
    rows = ['{"text": "a"}\n'] * 997 + ['{"body": "b"}\n', '{"text": null}\n', '{"text": ""}\n']
    (files / "few.jsonl").write_text("".join(rows))
    data.main(["text", "few", "few.jsonl", "--tokenizer=bytes"])
    totals = Tokens("data/few", "train").totals
    assert (totals["documents"], totals["missing"]) == (988, 2) and "empty" not in totals
    out = capsys.readouterr().out
    assert "MB), 2 left out without the key or an answer; val" in out
    assert "MB), 1 left out as empty;" in out
    (files / "many.jsonl").write_text("".join(rows[980:]))
    with pytest.raises(UserError, match="2 of 20 rows cannot be used, more than 1 %; the first is "
                                        "many.jsonl, row 18: no key 'text', its keys are body"):
        data.main(["text", "many", "many.jsonl", "--tokenizer=bytes"])
    data.main(["text", "many", "many.jsonl", "--tokenizer=bytes", "--skip_bad=10"])
    assert Tokens("data/many", "train").totals["missing"] == 2


def test_the_share_of_unusable_rows_is_checked_long_before_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHECKED_ROWS", 1000)
    rows = itertools.cycle([{"text": "a"}] * 9 + [{"body": "b"}])
    sources = [("endless", "", lambda: rows)]
    with pytest.raises(UserError, match="100 of 1,000 rows .* first is endless, row 10: no key"):
        prepare(tmp_path / "d", lambda: data.documents(sources, data.text_of))


def test_an_array_holds_rows_like_lines(files):
    rows = [{"text": text} for text in MIXED]
    (files / "array.json").write_text("\ufeff\n" + json.dumps(rows, indent=2))
    (files / "lines.jsonl").write_text("\ufeff" + "\n".join(map(json.dumps, rows)) + "\n\n")
    for name in ("array.json", "lines.jsonl"):
        data.main(["text", name.partition(".")[0], name, "--tokenizer=bytes"])
        assert stored(f"data/{name.partition('.')[0]}", "train") == expected(MIXED)


def test_a_text_keeps_its_line_breaks(files):
    (files / "d.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    data.main(["text", "breaks", "d.txt", "--tokenizer=bytes"])
    assert stored("data/breaks", "train") == b"one\r\ntwo\rthree\n\0"


def test_an_interrupted_preparation_continues_and_ends_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 500)
    monkeypatch.setattr(shards, "CHUNK_DOCUMENTS", 7)
    documents = [f"document {i} of 210 " * 5 for i in range(210)]
    whole = prepare(tmp_path / "whole", lambda: documents)

    def dies():
        yield from documents[:165]
        raise KeyboardInterrupt

    killed = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        prepare(killed, dies)
    assert not (killed / "manifest.json").exists()
    with pytest.raises(UserError, match="prepare them with"):
        Tokens(killed, "train")
    again = prepare(killed, lambda: documents)
    assert again["splits"] == whole["splits"]
    assert len(whole["splits"]["train"]["shards"]) > 5
    for shard in whole["splits"]["train"]["shards"]:
        one, other = tmp_path / "whole" / shard["file"], killed / shard["file"]
        assert one.read_bytes() == other.read_bytes()
    assert not list(killed.glob("*.tmp")) and not (killed / "progress.json").exists()


@pytest.mark.parametrize("last", (40, 130))
def test_an_interruption_in_any_stage_ends_the_same(tmp_path, monkeypatch, last):
    """Of 70 documents for training and 90 for validation; it goes on after the `last` one."""
    monkeypatch.setattr(shards, "SHARD_TOKENS", 200)
    monkeypatch.setattr(shards, "CHUNK_DOCUMENTS", 3)
    documents, encoded = [f"document {i} " * 5 for i in range(160)], []

    def encode(tok, text):
        encoded.append(text)
        return shards.encode_text(tok, text)

    def prepare_until(folder, end):
        def read(part):
            for i in range(160)[part]:
                if i == end:
                    raise KeyboardInterrupt
                yield documents[i]
        stages = [(lambda: read(slice(70)), ["train"]), (lambda: read(slice(70, 160)), ["val"])]
        return data.prepare(folder, tokenizer.load("bytes"), {"source": "s"}, stages, encode=encode)

    whole = prepare_until(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        prepare_until(tmp_path / "killed", last)
    encoded.clear()
    assert prepare_until(tmp_path / "killed", None)["splits"] == whole["splits"]
    assert 160 - last <= len(encoded) < 160
    assert stored(tmp_path / "killed", "val") == expected(documents[70:])
    sizes = [shard["tokens"] for shard in whole["splits"]["train"]["shards"]]
    assert len(sizes) > 5 and min(sizes[:-1]) >= 200


def test_what_was_prepared_of_another_request_is_not_continued(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 100)
    monkeypatch.setattr(shards, "CHUNK_DOCUMENTS", 3)

    def dies():
        yield from ["of the first request"] * 50
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "d", dies, source="first")
    assert (tmp_path / "d" / "progress.json").exists()
    prepare(tmp_path / "d", lambda: ["of the second"] * 50, source="second")
    assert stored(tmp_path / "d", "train") == expected(["of the second"] * 50)


@pytest.mark.parametrize("vocab_size, dtype", ((2 ** 16, "uint16"), (2 ** 16 + 1, "uint32")))
def test_a_word_holds_the_largest_id(tmp_path, vocab_size, dtype):
    tok = copy.copy(tokenizer.load("bytes"))
    tok.vocab_size, tok.eos_id = vocab_size, vocab_size - 1
    manifest = data.prepare(tmp_path / "d", tok, {}, [(lambda: ["ab"], ["train"])])
    assert manifest["dtype"] == dtype
    assert Tokens(tmp_path / "d", "train").read(0, 3).tolist() == [97, 98, vocab_size - 1]


def test_a_full_split_ends_the_reading_when_the_others_are_full_too(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "CHUNK_DOCUMENTS", 100)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)  # of chunks that are read ahead
    read = []

    def documents():
        for i in range(10_000):
            read.append(i)
            yield "x" * 9

    both = prepare(tmp_path / "both", documents, limits={"val": 15, "train": 1500})["splits"]
    assert [both[split]["tokens"] for split in ("val", "train")] == [20, 1500]
    assert len(read) < 2000
    one = prepare(tmp_path / "one", lambda: ["x" * 9] * 400, limits={"val": 15})["splits"]
    assert [one[split]["tokens"] for split in ("val", "train")] == [20, 3960]


def test_a_token_limit_ends_with_a_whole_document(tmp_path):
    stages = [(lambda: ["x" * 9] * 4000, ["train"])]
    manifest = data.prepare(tmp_path / "d", tokenizer.load("bytes"), {"source": "s"}, stages,
                            limits={"train": 1234})
    totals = manifest["splits"]["train"]
    assert (totals["tokens"], totals["documents"]) == (1240, 124)


def test_damage_is_seen(tmp_path):
    prepare(tmp_path / "d", lambda: MIXED * 50)
    shard = tmp_path / "d" / "train_00000.bin"
    good = shard.read_bytes()
    shard.write_bytes(good[:-2])
    with pytest.raises(UserError, match="should hold .* bytes and holds"):
        Tokens(tmp_path / "d", "train")
    shard.write_bytes(good[:100] + b"\x07" + good[101:])
    with pytest.raises(UserError, match="train_00000.bin is damaged .its checksum is"):
        Tokens(tmp_path / "d", "train")
    shard.write_bytes(good[:101] + b"\x07" + good[102:])
    with pytest.raises(UserError, match="outside the vocabulary of 257"):
        Tokens(tmp_path / "d", "train", verify=False).read(0, 100)
    shard.write_bytes(good[:100] + b"\x01\x01" + good[102:])  # 257
    with pytest.raises(UserError, match="token id 257 lies outside the vocabulary of 257"):
        Tokens(tmp_path / "d", "train", verify=False).read(0, 100)
    shard.unlink()
    with pytest.raises(UserError, match="should hold .* bytes and holds 0"):
        Tokens(tmp_path / "d", "train")


def test_check_reads_the_ids_of_every_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 300)
    monkeypatch.setattr(shards, "CHUNK_DOCUMENTS", 4)
    monkeypatch.chdir(tmp_path)
    manifest = prepare(Path("data/d"), lambda: MIXED * 50)
    data.main(["check", "d"])
    last = manifest["splits"]["train"]["shards"][2]
    file = tmp_path / "data/d" / last["file"]
    words = file.read_bytes()[:-2] + b"\x01\x01"  # 257
    file.write_bytes(words)
    last["crc32"] = zlib.crc32(words)
    Path("data/d/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="token id 257 lies outside the vocabulary of 257"):
        data.main(["check", "d"])


def test_windows_cross_shards(tmp_path, monkeypatch):
    prepare(tmp_path / "one", lambda: MIXED * 50)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 300)
    monkeypatch.setattr(shards, "CHUNK_DOCUMENTS", 4)
    prepare(tmp_path / "many", lambda: MIXED * 50)
    one, many = Tokens(tmp_path / "one", "train"), Tokens(tmp_path / "many", "train")
    assert len(many.shards) > 10 and len(one.shards) == 1 and len(one) == len(many)
    for position, count in ((0, len(one)), (250, 900), (len(one) - 1, 1)):
        assert (one.read(position, count) == many.read(position, count)).all()


def test_a_read_past_the_end_has_the_tokens_that_are_left(corpus):
    tokens = Tokens(corpus, "val")
    rest = tokens.read(5, len(tokens) - 5)
    assert (tokens.read(5, len(tokens)) == rest).all() and len(rest) == len(tokens) - 5


def test_every_window_once_per_epoch_and_shuffled(corpus):
    tokens = Tokens(corpus, "train")
    batches = Batches(tokens, seed=1, seq_len=16, batch_size=8, micro_batch=8)
    count = batches.windows
    first, second = ([batches.window(epoch * count + i).tobytes() for i in range(count)]
                     for epoch in range(2))
    in_order = [tokens.read(i * 16, 17).tobytes() for i in range(count)]
    assert sorted(first) == sorted(second) == sorted(in_order)
    assert first != second and first != in_order and second != in_order
    inputs, targets = batches(3)
    assert (inputs[..., 1:] == targets[..., :-1]).all() and inputs.shape == (1, 8, 16)


def test_the_order_of_an_epoch_is_as_before(corpus):
    """Golden: a resumed run continues the order of its first part."""
    batches = Batches(Tokens(corpus, "train"), seed=1, seq_len=16, batch_size=8, micro_batch=8)
    orders = [batches.epoch_order(epoch)[:5].tolist() for epoch in (0, 1)]
    assert orders == [[659, 467, 154, 89, 528], [126, 627, 566, 441, 51]]


@pytest.mark.parametrize("count, windows", ((32, 1), (33, 2), (48, 2), (49, 3)))
def test_a_window_needs_the_target_of_its_last_token(tmp_path, count, windows):
    prepare(tmp_path / "d", lambda: ["x" * (count - 1)])
    tokens = Tokens(tmp_path / "d", "train")
    batches = Batches(tokens, seed=1, seq_len=16, batch_size=2, micro_batch=2)
    assert (len(tokens), batches.windows) == (count, windows)
    assert batches.steps_per_epoch == windows / 2
    inputs, targets = batches(0)
    assert inputs.shape == targets.shape == (1, 2, 16)


@pytest.mark.parametrize("micro_batch", (1, 2, 4))
def test_batches_are_a_pure_function_of_the_step_for_any_number_of_processes(corpus, micro_batch):
    tokens = Tokens(corpus, "train")
    whole = Batches(tokens, 1, 16, 8, 8)
    for world in (1, 2):
        parts = [Batches(tokens, 1, 16, 8, micro_batch, rank=rank, world=world)
                 for rank in range(world)]
        for step in (5, 0, 1, 1, 2):  # in any order, prefetched or not
            rows = sorted(row.tolist() for part in parts for row in part(step)[0].flatten(0, 1))
            assert rows == sorted(row.tolist() for row in whole.load(step)[0][0])


@pytest.mark.parametrize("world", (1, 3))
@pytest.mark.parametrize("limit", (0, 500))
def test_evaluation_counts_every_token_once(corpus, world, limit):
    tokens = Tokens(corpus, "train")
    ranks = [list(every_token_once(tokens, 16, 4, rank, world, limit)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1  # all-gathers of sharded models
    targets = [targets[targets != -100] for batches in ranks for _, targets in batches]
    read = tokens.read(1, limit or len(tokens) - 1)
    assert sorted(np.concatenate(targets).tolist()) == sorted(read.tolist())


def test_ids_are_the_tokenizers_with_end_of_text_between():
    tok = tokenizer.load("bytes")
    for text in MIXED:
        words, counts = shards.encode_text(tok, text)
        assert words.tolist() == [*text.encode(), 256] and counts == {"bytes": len(text.encode())}
