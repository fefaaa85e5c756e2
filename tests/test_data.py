"""Documents become tokens and tokens become batches, and nothing gets lost on the way."""
import gzip
import json

import numpy as np
import pytest

import data
import shards
import tokenizer
from batches import Batches, every_token_once
from shards import Tokens
from config import UserError

MIXED = ["plain text\n\n  indented", "naïve café — 日本語 🙂👩‍👩‍👧", "def f(x):\n\treturn x<|endoftext|>", "a" * 300 + " " * 50]


def prepare(folder, texts, request="test", **options):
    return data.prepare(folder, tokenizer.load("bytes"), {"source": request}, [(texts, data.every_100th)], **options)


def test_documents_come_back(tmp_path):
    documents = MIXED * 60 + ["lone \ud800 surrogate", ""]
    manifest = prepare(tmp_path / "d", lambda: iter([documents[:100], documents[100:]]))
    val = documents[99::100]
    train = [d for i, d in enumerate(documents) if i % 100 != 99 and d]
    for split, expected in (("train", train), ("val", val)):
        tokens = Tokens(tmp_path / "d", split)
        read = bytes(np.where(tokens.read(0, len(tokens)) == 256, 0, tokens.read(0, len(tokens))).astype(np.uint8))
        assert read == b"".join(d.encode("utf-8", "replace").replace(b"?", b"\xef\xbf\xbd" if "\ud800" in d else b"?") + b"\0" for d in expected)
        assert manifest["splits"][split]["documents"] == len(expected)


def test_files_of_every_kind(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"text": text, "url": "x"}) + "\n" for text in MIXED]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    with gzip.open(tmp_path / "b.json.gz", "wt") as file:
        file.writelines(rows)
    pyarrow.parquet.write_table(pyarrow.table({"text": MIXED}), tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text(MIXED[0])
    data.main(["text", "all", "a.jsonl", "b.json.gz", "c.parquet", "--val", "d.txt", "--tokenizer=bytes"])
    train, val = (Tokens("data/all", split) for split in ("train", "val"))
    once = b"".join(text.encode() + b"\0" for text in MIXED)
    assert bytes(np.where(train.read(0, len(train)) == 256, 0, train.read(0, len(train))).astype(np.uint8)) == once * 3
    assert bytes(val.read(0, len(val) - 1).astype(np.uint8)).decode() == MIXED[0]
    assert train.totals["bytes"] == 3 * sum(len(text.encode()) for text in MIXED)
    data.main(["check", "all"])
    for words, says in ((["k", "a.jsonl", "--tokenizer=bytes", "--key=body"], "no key 'body', its keys are text, url"), (["k", "e.jsonl"], "no file e.jsonl"), (["k"], "at least one file"),
                        (["all", "a.jsonl", "--tokenizer=bytes"], "holds another corpus"), (["k", "a.jsonl", "--tokenizer=gpt22"], "unknown tokenizer")):
        with pytest.raises(UserError, match=says):
            data.main(["text", *words])
    (tmp_path / "cut.json.gz").write_bytes((tmp_path / "b.json.gz").read_bytes()[:-20])
    (tmp_path / "bad.jsonl").write_text('{"text": 1}\n')
    (tmp_path / "empty.txt").write_text("")
    for name, says in (("cut.json.gz", "can not be read"), ("bad.jsonl", "holds int, not text"), ("empty.txt", "the corpus is empty")):
        with pytest.raises(UserError, match=says):
            data.main(["text", name.replace(".", "_"), name, "--tokenizer=bytes"])


@pytest.mark.parametrize("killed_at", (0, 5, 23))
def test_a_killed_preparation_goes_on_and_ends_the_same(tmp_path, monkeypatch, killed_at):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 500)
    chunks = [[f"document {i} of chunk {j} " * 5 for i in range(7)] for j in range(30)]
    whole = prepare(tmp_path / "whole", lambda: iter(chunks))

    def dies():
        yield from chunks[:killed_at]
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "killed", dies)
    assert not (tmp_path / "killed" / "manifest.json").exists()
    with pytest.raises(UserError, match="prepare them with"):
        Tokens(tmp_path / "killed", "train")
    again = prepare(tmp_path / "killed", lambda: iter(chunks))
    assert again["splits"] == whole["splits"] and len(whole["splits"]["train"]["shards"]) > 5
    for shard in whole["splits"]["train"]["shards"]:
        assert (tmp_path / "killed" / shard["file"]).read_bytes() == (tmp_path / "whole" / shard["file"]).read_bytes()
    assert not list((tmp_path / "killed").glob("*.tmp")) and not (tmp_path / "killed" / "progress.json").exists()


def test_a_token_limit_ends_with_a_whole_document(tmp_path):
    chunks = lambda: iter([["x" * 9] * 40] * 100)
    manifest = data.prepare(tmp_path / "d", tokenizer.load("bytes"), {"source": "s"}, [(chunks, data.all_to("train"))], {"train": 1234})
    assert manifest["splits"]["train"]["tokens"] == 1240 and manifest["splits"]["train"]["documents"] == 124


def test_damage_is_seen(tmp_path):
    prepare(tmp_path / "d", lambda: iter([MIXED * 50]))
    shard = tmp_path / "d" / "train_00000.bin"
    good = shard.read_bytes()
    shard.write_bytes(good[:-2])
    with pytest.raises(UserError, match="should hold .* bytes and holds"):
        Tokens(tmp_path / "d", "train")
    shard.write_bytes(good[:100] + b"\x07" + good[101:])
    with pytest.raises(UserError, match="corrupt"):
        Tokens(tmp_path / "d", "train")
    shard.write_bytes(good[:101] + b"\x07" + good[102:])
    with pytest.raises(UserError, match="outside the vocabulary of 257"):
        Tokens(tmp_path / "d", "train", verify=False).read(0, 100)
    shard.unlink()
    with pytest.raises(UserError, match="holds none"):
        Tokens(tmp_path / "d", "train")


def test_windows_cross_shards(tmp_path, monkeypatch):
    prepare(tmp_path / "one", lambda: iter([MIXED] * 50))
    monkeypatch.setattr(shards, "SHARD_TOKENS", 300)
    prepare(tmp_path / "many", lambda: iter([MIXED] * 50))
    one, many = Tokens(tmp_path / "one", "train"), Tokens(tmp_path / "many", "train")
    assert len(many.shards) > 10 and len(one.shards) == 1 and len(one) == len(many)
    for start, count in ((0, len(one)), (250, 900), (len(one) - 1, 1)):
        assert (one.read(start, count) == many.read(start, count)).all()


def test_every_window_once_an_epoch_and_shuffled(corpus):
    tokens = Tokens(corpus, "train")
    batches = Batches(tokens, seed=1, seq_len=16, batch_size=8, micro_batch=8)
    epochs = [[batches.window(e * batches.windows + i).tobytes() for i in range(batches.windows)] for e in range(2)]
    in_order = [tokens.read(i * 16, 17).tobytes() for i in range(batches.windows)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(in_order)
    assert epochs[0] != epochs[1] != in_order
    inputs, targets = batches(3)
    assert (inputs[..., 1:] == targets[..., :-1]).all() and inputs.shape == (1, 8, 16)


@pytest.mark.parametrize("micro", (1, 2, 4))
def test_batches_are_a_pure_function_of_the_step_for_any_number_of_processes(corpus, micro):
    tokens = Tokens(corpus, "train")
    whole = Batches(tokens, 1, 16, 8, 8)
    for world in (1, 2):
        for step in (5, 0, 1, 2):  # in any order, read ahead or not
            parts = [Batches(tokens, 1, 16, 8, micro, rank=rank, world=world)(step)[0] for rank in range(world)]
            rows = sorted(row.tolist() for part in parts for row in part.flatten(0, 1))
            assert rows == sorted(row.tolist() for row in whole(step)[0][0])


@pytest.mark.parametrize("world", (1, 3))
@pytest.mark.parametrize("limit", (0, 500))
def test_evaluation_counts_every_token_once(corpus, world, limit):
    tokens = Tokens(corpus, "train")
    targets = [t[t != -100] for rank in range(world) for _, t in every_token_once(tokens, 16, 4, rank, world, limit)]
    found = sorted(np.concatenate(targets).tolist())
    assert found == sorted(tokens.read(1, limit or len(tokens) - 1).tolist())


def test_ids_are_the_tokenizers_with_end_of_text_between():
    tok = tokenizer.load("bytes")
    ids, ends, sizes = shards.encode(tok, MIXED)
    assert ids.tolist() == [i for text in MIXED for i in tok.encoding.encode_ordinary(text) + [256]]
    assert ends.tolist() == np.cumsum([len(t.encode()) + 1 for t in MIXED]).tolist() and sizes.sum() == sum(len(t.encode()) for t in MIXED)
