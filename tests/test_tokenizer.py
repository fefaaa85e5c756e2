"""The same text gives the same ids, here and in transformers."""
import json
from functools import lru_cache
from pathlib import Path

import pytest
import tiktoken
import tokenizers
import torch

import checkpoint
import data
import merge
import mora
import sample
import tokenizer
from config import UserError
from model import Llama, LlamaConfig
from shards import open_split

MIXED = ["plain text\n\n  indented", "naïve café — 日本語 🙂👩‍👩‍👧", "it's  we'll", " ", "",
         "def f(x):\n\treturn x  # 12345\r\n\n", "a" * 300 + " " * 50]


@lru_cache
def small_bpe():
    """A byte-pair encoding of 400 tokens, trained here, with GPT-2's pattern.

    The files of gpt2 itself need a download.
    """
    from tiktoken._educational import bpe_train
    pattern = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$"
               r"|\s+(?!\S)|\s")
    text = Path(tokenizer.__file__).read_text(encoding="utf-8")
    ranks = bpe_train(text, 400, pattern, visualise=None)
    encoding = tiktoken.Encoding("small", pat_str=pattern, mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": len(ranks)})
    return tokenizer.Tiktoken(encoding)


def gpt2():
    try:
        return tokenizer.load("gpt2")
    except UserError as error:
        pytest.skip(str(error))


def test_bytes_are_tokens():
    tok = tokenizer.load("bytes")
    assert (tok.eos_id, tok.vocab_size) == (256, 257)
    for text in MIXED + ["<|endoftext|>"]:
        assert tok.encode(text).tolist() == list(text.encode())


@pytest.mark.parametrize("make", (small_bpe, gpt2, lambda: tokenizer.load("bytes")),
                         ids=("small", "gpt2", "bytes"))
def test_the_exported_tokenizer_gives_tiktokens_ids(tmp_path, make):
    from transformers import AutoTokenizer
    tok = make()
    tok.export_files(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs, exported = AutoTokenizer.from_pretrained(tmp_path), tokenizer.load(str(tmp_path))
    for text in MIXED + [Path(json.__file__).read_text(encoding="utf-8")]:
        ids = tok.encode(text).tolist()
        assert theirs(text).input_ids == ids == exported.encode(text).tolist()
        assert theirs.decode(ids) == text
        stream = exported.decoder()
        assert "".join(stream(i) for i in ids).rstrip("\ufffd") == text
    assert theirs.eos_token_id == tok.eos_id == exported.eos_id
    padded = theirs(["a", "a longer text"], padding=True).input_ids
    short, long = (tok.encode(text).tolist() for text in ("a", "a longer text"))
    assert padded == [short + [tok.eos_id] * (len(long) - len(short)), long]
    assert exported.vocab_size == tok.vocab_size
    # the one known difference: transformers takes the name of a special token for the token
    assert theirs("<|endoftext|>").input_ids == [tok.eos_id]
    assert tok.encode("<|endoftext|>").tolist() != [tok.eos_id]
    if tok.name != "bytes":
        special = tok.encode("<|endoftext|>").tolist()
        assert exported.encode("<|endoftext|>").tolist() == special


def test_a_directorys_tokenizer_goes_with_data_checkpoints_and_merged_models(
        run, tmp_path, capsys, monkeypatch):
    from transformers import AutoTokenizer
    monkeypatch.chdir(tmp_path)
    small_bpe().export_files(tmp_path)
    rows = [json.dumps({"text": f"document {i} is short"}) + "\n" for i in range(400)]
    (tmp_path / "text.jsonl").write_text("".join(rows))
    data.main(["text", "mine", "text.jsonl", f"--tokenizer={tmp_path}"])
    (tmp_path / "tokenizer.json").unlink()  # the data folder has its own copy
    out = run("--data=data/mine", "--steps=10")
    merge.main([str(out)])
    tok = checkpoint.load(out)[1]
    assert tok.name.startswith("tokenizer.json:")
    assert tok.name == checkpoint.load(out / "merged")[1].name
    theirs = AutoTokenizer.from_pretrained(out / "merged")
    assert theirs("a document").input_ids == tok.encode("a document").tolist()
    capsys.readouterr()
    sample.main([str(out / "merged"), "--prompt=document", "--max_new_tokens=5"])
    assert capsys.readouterr().out.startswith("document")
    with pytest.raises(UserError, match="has the tokenizer tokenizer.json:.* prepared with bytes"):
        run(f"--init_from={out}", "--out=other")


def test_a_changed_copy_of_the_tokenizer_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_bpe().export_files(tmp_path)
    (tmp_path / "text.jsonl").write_text('{"text": "a document"}\n' * 400)
    data.main(["text", "mine", "text.jsonl", f"--tokenizer={tmp_path}"])
    copy = tmp_path / "data" / "mine" / "tokenizer.json"
    copy.write_text(copy.read_text() + "\n")
    tokenizer.load.cache_clear()
    with pytest.raises(UserError, match="was changed or replaced"):
        run("--data=data/mine", "--steps=10", "--out=another")


def test_data_of_another_end_of_text_is_refused(run, tmp_path, monkeypatch):
    """As of a base and its chat model, which have one tokenizer.json."""
    monkeypatch.chdir(tmp_path)
    for folder, end in (("base", "<|endoftext|>"), ("chat", "a")):
        (tmp_path / folder).mkdir()
        small_bpe().export_files(tmp_path / folder)
        (tmp_path / folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    (tmp_path / "text.jsonl").write_text('{"text": "a document"}\n' * 400)
    data.main(["text", "mine", "text.jsonl", "--tokenizer=base"])
    out = run("--data=data/mine", "--steps=2")
    tok = tokenizer.load("base")
    model = checkpoint.load(out)[0]
    checkpoint.write_hugging_face(tmp_path / "other", mora.merged_weights(model), model, tok)
    run("--data=data/mine", "--init_from=other", "--steps=2", "--out=same")
    tokenizer.load("chat").copy_files(tmp_path / "other")
    tokenizer.load.cache_clear()
    with pytest.raises(UserError, match="other ends a text with the id .*, data/mine with .*again"):
        run("--data=data/mine", "--init_from=other", "--steps=2", "--out=mixed")


def test_mistakes_are_named(tmp_path):
    for name in ("gpt22", "tokenizer.json:0123456789ab"):  # the latter as a manifest names it
        with pytest.raises(UserError, match=f"unknown tokenizer '{name}'"):
            tokenizer.load(name)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        tokenizer.load(str(tmp_path))
    tokenizer.load("bytes").export_files(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    with pytest.raises(UserError, match="eos_token '<end>' is no token"):
        tokenizer.load(str(tmp_path))
    # or Tulu's format would silently replace the model's own
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "eos_token": "<|endoftext|>", "chat_template": {"default": "{{ messages }}"}}))
    with pytest.raises(UserError, match="chat_template must be text, is {'default'"):
        tokenizer.load(str(tmp_path))


@pytest.mark.parametrize("form, opening", [("<s> $A </s>", ["<s>"]), ("<s> $A", ["<s>"]),
                                           ("$A </s>", ["</s>"]), ("$A", ["</s>"])])
def test_a_document_opens_without_the_token_that_ends_it(form, opening, tmp_path):
    """A template may add both: `</s>` of the empty text would stand before every document."""
    tokens = {"<s>": 0, "</s>": 1, "a": 2, "[UNK]": 3}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(tokens, unk_token="[UNK]"))
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single=form, special_tokens=[("<s>", 0), ("</s>", 1)])
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    tok, model = tokenizer.load(str(tmp_path)), Llama(LlamaConfig(4, 8, 8, 1, 2, 2))
    assert tok.bos_ids == [tokens[token] for token in opening]
    checkpoint.write_hugging_face(tmp_path / "model", model.state_dict(), model, tok)
    config = checkpoint.read_json(tmp_path / "model" / "config.json")
    assert ([config["bos_token_id"]], config["eos_token_id"]) == (tok.bos_ids, tokens["</s>"])


def test_ids_may_leave_gaps(tmp_path):
    """A shard of 16 bits would hold the largest id of this vocabulary modulo 65536."""
    tokens = {"</s>": 0, "a": 1, "b": 2 ** 16 + 1}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(tokens, unk_token="</s>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    tok = tokenizer.load(str(tmp_path))
    data.prepare(tmp_path / "d", tok, {"source": "test"}, [(lambda: ["a b"], ["train"])])
    assert open_split(tmp_path / "d", "train").read(0, 3).tolist() == [1, 2 ** 16 + 1, 0]
    assert tok.vocab_size == 2 ** 16 + 2 and tok.gaps == [*range(2, 2 ** 16 + 1)]


def test_ids_in_gaps_are_never_drawn(tmp_path):
    """tiktoken's larger encodings have gaps around end-of-text, which it does not decode."""
    bytes_of = {bytes([i]): i for i in range(256)}
    tok = tokenizer.Tiktoken(tiktoken.Encoding("gaps", pat_str=r"[\s\S]", mergeable_ranks=bytes_of,
                                               special_tokens={"<|endoftext|>": 258, "<|x|>": 260}))
    assert tok.gaps == [256, 257, 259] and tok.vocab_size == 261
    assert tokenizer.load("bytes").gaps == []
    for vocab_size in (261, 258):  # the model may have fewer rows
        model = Llama(LlamaConfig(vocab_size, 8, 8, 1, 1, 1, tie_word_embeddings=True), seed=0)
        with torch.no_grad():
            model.model.embed_tokens.weight[[3, 256, 257]] *= 100  # likely: 3 after 3
        for options in ({"temperature": 0.0}, {"temperature": 9.0, "top_k": 3}):
            for size in (vocab_size, tok.vocab_size):
                drawn = sample.generate(model, [3], size, 40, gaps=tok.gaps, **options)
                assert not {*drawn} & {*tok.gaps}
        for answer in sample.greedy(model, [[3], [3, 256]], vocab_size, 40, 0, gaps=tok.gaps):
            assert len(answer) == 40 and not {*answer} & {*tok.gaps}


def test_a_tokenizer_neither_cuts_nor_pads(tmp_path):
    """transformers saves the truncation and the padding of its last call into tokenizer.json."""
    tokenizer.load("bytes").export_files(tmp_path)
    built = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    built.enable_truncation(4)
    built.enable_padding(length=8)
    built.save(str(tmp_path / "tokenizer.json"))
    tok = tokenizer.load(str(tmp_path))
    for text in ("a", "a text of more than 4 bytes"):
        for encode in (tok.encode, tok.encode_part, tok.encode_template):
            assert encode(text).tolist() == list(text.encode())


def test_a_text_with_a_million_spaces():
    """tiktoken's regular expressions run out of stack at the end of such a run."""
    tok, spaces = small_bpe(), " " * 10 ** 6
    with pytest.raises(ValueError, match="stack"):
        tok.encoding.encode_to_numpy(f"a{spaces}x")
    ids = [*tok.encode("a"), *tok.encode(spaces[1:]), *tok.encode(" x\n\ufffd")]
    assert tok.encode(f"a{spaces}x\n\ud800").tolist() == ids
    assert tok.encode("x").dtype == tok.encode(f"{spaces}x").dtype == "uint32"
