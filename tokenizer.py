"""Text <-> token ids: tiktoken's encodings, plain bytes, Hugging Face's tokenizer.json.

load(name) returns a tokenizer; the name is "gpt2", "bytes" or the path of a directory. It has

    name, vocab_size       equal names give equal ids; all are below vocab_size
    gaps                   a list of the numbers below vocab_size that are no id
    eos_id, bos_ids        end-of-text; the ids that open a document
    folder                 its directory; None: the name is enough to load it
    chat_template          as text, or None; special_tokens: {"bos_token", "eos_token"} for it
    encode(text)           the ids (uint32) of a document; names of special tokens are text
    encode_part(text)      the ids of a text inside a document
    encode_template(text)  the same; the names of special tokens in the text become these tokens
    decode(ids)            the text
    decoder()              a streaming decoder, a function id -> text; buffers incomplete UTF-8
    copy_files(folder)     copies the files that load(name, folder) needs
    export_files(folder)   writes the files that transformers and vLLM read
"""
import codecs
import hashlib
import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
import tiktoken

from config import as_user_error, need, read_json, read_text, write_json

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "chat_template.jinja")
# GPT-2 writes a printable byte as its Latin-1 letter, and the n-th of the other bytes as U+0100 + n
LETTERS = {byte: 256 + n for n, byte in enumerate([*range(33), *range(127, 161), 173])}


@lru_cache
def load(name, folder=None):
    """A tokenizer by its name, or by the path of its directory. Raises UserError.
    folder: holds the files of a tokenizer whose name is the hash of its tokenizer.json."""
    if name == "bytes":  # a byte is a token, and 256 is end-of-text
        return Tiktoken(tiktoken.Encoding(
            "bytes", pat_str=r"[\s\S]{1,64}", special_tokens={"<|endoftext|>": 256},
            mergeable_ranks={bytes([i]): i for i in range(256)}))
    if folder and name.startswith("tokenizer.json:"):
        tok = Json(folder)
        need(tok.name == name, f"{folder}/tokenizer.json is {tok.name}, expected {name}: the file "
             "was changed or replaced")
        return tok
    if (Path(name) / "tokenizer.json").exists():
        return Json(name)
    names = tiktoken.list_encoding_names()
    need(name in names, f"unknown tokenizer {name!r}: take bytes, {', '.join(names)}, or a folder "
         "with a tokenizer.json")
    with as_user_error(f"tokenizer {name} could not be downloaded (run once with a network, or "
                       "set TIKTOKEN_CACHE_DIR to a cache of it)", OSError):  # requests raises it
        return Tiktoken(tiktoken.get_encoding(name))


def without_surrogates(text):
    """The text with U+FFFD for lone surrogates, which JSON can hold ("\\ud800"), UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Tiktoken:
    folder = chat_template = None
    special_tokens = {}

    def __init__(self, encoding):
        self.encoding, self.name = encoding, encoding.name
        self.vocab_size, self.eos_id = encoding.n_vocab, encoding.eot_token
        self.bos_ids, self.decode = [self.eos_id], encoding.decode
        ids = {*encoding._mergeable_ranks.values(), *encoding._special_tokens.values()}
        self.gaps = [i for i in range(self.vocab_size) if i not in ids]

    def encode(self, text):
        text = without_surrogates(text)
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # its own regex runs out of stack in a million spaces, Python's does not
            return np.array(self.encoding._encode_only_native_bpe(text), dtype=np.uint32)

    encode_part = encode

    def decoder(self):
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda token: utf8.decode(self.encoding.decode_single_token_bytes(token))

    def copy_files(self, folder):
        """Copy nothing: the name is enough."""

    def export_files(self, folder):
        """Write a tokenizer.json with the same ids.
        One difference remains: transformers takes the name of a special token for the token."""
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
        ranks, special_tokens = self.encoding._mergeable_ranks, self.encoding._special_tokens
        letters = {token: token.decode("latin1").translate(LETTERS) for token in ranks}
        vocabulary = {letters[token]: rank for token, rank in ranks.items()}
        # tiktoken merges any two neighbours that make a token, the lowest rank first
        merges = [(letters[token[:i]], letters[token[i:]])
                  for token in sorted(ranks, key=ranks.get) for i in range(1, len(token))
                  if token[:i] in ranks and token[i:] in ranks]
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(self.encoding._pat_str), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)
                                      for text in sorted(special_tokens, key=special_tokens.get)])
        end = self.decode([self.eos_id])
        need(tokenizer.token_to_id(end) == self.eos_id, f"tokenizer {self.name} leaves gaps "
             "between its ids, which tokenizer.json cannot express")
        tokenizer.save(str(Path(folder) / "tokenizer.json"))
        tokens = dict.fromkeys(("bos_token", "eos_token", "pad_token"), end)
        write_json(Path(folder) / "tokenizer_config.json", tokens | {
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False})


class Json:
    """The tokenizer.json of a folder; its end of text is eos_token of tokenizer_config.json."""

    def __init__(self, folder):
        from tokenizers import Tokenizer
        self.folder = Path(folder)
        file, self.config_file, _, template_file = (self.folder / name for name in FILES)
        self.name = f"tokenizer.json:{hashlib.sha256(read_text(file).encode()).hexdigest()[:12]}"
        # two objects, since threads share them
        self.tokenizer, self.with_specials = (read_text(file, Tokenizer.from_str) for _ in range(2))
        for own in (self.tokenizer, self.with_specials):  # a file can hold those of its last use
            own.no_truncation()
            own.no_padding()
        self.tokenizer.encode_special_tokens = True  # the names of special tokens are text
        ids = {*self.tokenizer.get_vocab().values()}
        self.vocab_size = max(ids, default=0) + 1
        self.gaps = [i for i in range(self.vocab_size) if i not in ids]
        self.config = read_json(self.config_file)
        self.special_tokens = {key: self._text(key) or "" for key in ("bos_token", "eos_token")}
        end = self.special_tokens["eos_token"]
        self.eos_id = self.tokenizer.token_to_id(end)
        need(self.eos_id is not None,
             f"{self.config_file}: eos_token {end!r} is no token of tokenizer.json")
        self.bos_ids = self.encode("").tolist() or [self.eos_id]
        own_file = template_file.exists()
        self.chat_template = read_text(template_file) if own_file else self._text("chat_template")

    def _text(self, key):
        """A text of tokenizer_config.json or None; also of {"content": text} or named templates."""
        value = self.config.get(key)
        if isinstance(value, list):
            named = {choice.get("name"): choice for choice in value if isinstance(choice, dict)}
            value = named.get("default", {}).get("template")
        text = value.get("content", value) if isinstance(value, dict) else value
        need(isinstance(text, str | None),
             f"{self.config_file}: {key} must be text, is {text!r:.80}")
        return text

    def encode(self, text):
        ids = self.tokenizer.encode(without_surrogates(text)).ids
        return np.array(ids[:-1] if ids[-1:] == [self.eos_id] else ids, dtype=np.uint32)

    def encode_part(self, text, tokenizer=None):
        tokenizer = tokenizer or self.tokenizer
        ids = tokenizer.encode(without_surrogates(text), add_special_tokens=False).ids
        return np.array(ids, dtype=np.uint32)

    def encode_template(self, text):
        return self.encode_part(text, self.with_specials)

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def decoder(self):
        from tokenizers.decoders import DecodeStream
        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self.tokenizer, token) or ""

    def copy_files(self, folder):
        for name in FILES:
            source, copy = self.folder / name, Path(folder) / name
            if source.exists() and source.resolve() != copy.resolve():
                shutil.copy(source, copy)

    export_files = copy_files
