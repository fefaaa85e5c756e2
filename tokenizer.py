"""Text <-> token ids: tiktoken's encodings, plain bytes, and the tokenizer.json of Hugging Face directories.

    load("gpt2"), load("bytes"), load("path/of/a/directory")

All have: name (equal names, equal ids), size (ids are below it), end (the end-of-text id), start (ids that open a document),
encode(text) -> uint32 array of a document, encode_part(text) -> of a text inside one, decode(ids) -> text, decoder() -> a function
id -> text that may hold a part of a character back, keep(folder) (so that load(name, folder) finds it again), export(folder) (the
files that transformers and vLLM read) and chat, the chat template as text, or None; encode_template(text) is for what it renders.
"""
import codecs
import hashlib
import json
import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
import tiktoken

from config import UserError, write_json

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@lru_cache
def load(name, folder=None):
    """A tokenizer by name; folder is where one named by the hash of its tokenizer.json is kept. Raises UserError."""
    if name == "bytes":
        return Tiktoken(tiktoken.Encoding("bytes", pat_str=r"[\s\S]{1,64}", mergeable_ranks={bytes([i]): i for i in range(256)},
                                          special_tokens={"<|endoftext|>": 256}))
    if name.startswith("tokenizer.json:"):
        found = Json(Path(folder))
        if found.name != name:
            raise UserError(f"{folder}/tokenizer.json is {found.name}, expected {name}: the file was changed or replaced")
        return found
    if (Path(name) / "tokenizer.json").exists():
        return Json(Path(name))
    if name not in tiktoken.list_encoding_names():
        raise UserError(f"unknown tokenizer {name!r}: take bytes, {', '.join(tiktoken.list_encoding_names())}, or a folder with "
                        "a tokenizer.json")
    try:
        return Tiktoken(tiktoken.get_encoding(name))
    except OSError as error:  # requests' exceptions are OSErrors
        raise UserError(f"tokenizer {name} could not be downloaded ({type(error).__name__}): run once with a network, or point "
                        "TIKTOKEN_CACHE_DIR at a cache of tiktoken's that holds it")


class Tiktoken:
    chat = None

    def __init__(self, encoding):
        self.encoding, self.name, self.size, self.end = encoding, encoding.name, encoding.n_vocab, encoding.eot_token
        self.start = [self.end]

    def encode(self, text):
        """Ids of plain text: what looks like a special token is text too."""
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # a lone surrogate, as "\ud800" in JSON
            return self.encoding.encode_to_numpy(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), disallowed_special=())

    encode_part = encode

    def decode(self, ids):
        return self.encoding.decode(ids)

    def decoder(self):
        characters = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a token may end inside a character
        return lambda token: characters.decode(self.encoding.decode_single_token_bytes(token))

    def keep(self, folder):
        pass  # the name is enough

    def export(self, folder):
        """tokenizer.json with the same ids, but for the literal text of special tokens, which transformers takes for the token."""
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
        letters = byte_letters()
        spell = lambda token: "".join(letters[byte] for byte in token)
        by_id = lambda ids: sorted(ids.items(), key=lambda item: item[1])
        ranks, special = self.encoding._mergeable_ranks, by_id(self.encoding._special_tokens)
        merges = [tuple(map(spell, merged_parts(ranks, token, rank))) for token, rank in by_id(ranks) if len(token) > 1]
        tokenizer = Tokenizer(models.BPE(vocab={spell(token): rank for token, rank in ranks.items()}, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(self.encoding._pat_str), "isolated"),
                                                           pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text, _ in special])
        end = self.encoding.decode([self.end])
        if tokenizer.token_to_id(end) != self.end:
            raise UserError(f"tokenizer {self.name} leaves gaps between its ids, which tokenizer.json can not say")
        tokenizer.save(str(Path(folder) / "tokenizer.json"))
        write_json(Path(folder) / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end,
            "pad_token": end, "clean_up_tokenization_spaces": False})


class Json:
    """The tokenizer.json of a folder, through the `tokenizers` library; its end of text is tokenizer_config.json's eos_token."""

    def __init__(self, folder):
        from tokenizers import Tokenizer
        self.folder = Path(folder)
        try:
            text = (self.folder / "tokenizer.json").read_bytes()
            self.tokenizer = Tokenizer.from_str(text.decode())
            config = json.loads((self.folder / "tokenizer_config.json").read_text())
        except Exception as error:  # tokenizers raises bare Exceptions
            raise UserError(f"the tokenizer of {self.folder} can not be read: {error}")
        end = config.get("eos_token")
        end = end["content"] if isinstance(end, dict) else end
        self.end = self.tokenizer.token_to_id(end) if end else None
        if self.end is None:
            raise UserError(f"{self.folder / 'tokenizer_config.json'}: eos_token {end!r} is no token of tokenizer.json")
        self.tokenizer.encode_special_tokens = True  # what looks like a special token is text too
        self.name, self.size = f"tokenizer.json:{hashlib.sha256(text).hexdigest()[:12]}", self.tokenizer.get_vocab_size()
        self.start = self.tokenizer.encode("").ids or [self.end]
        self.with_specials = Tokenizer.from_str(text.decode())  # an object of its own: threads share both
        file, inline = self.folder / "chat_template.jinja", config.get("chat_template")
        if isinstance(inline, list):  # several templates, by name
            inline = next((choice["template"] for choice in inline if choice["name"] == "default"), None)
        self.chat = file.read_text() if file.exists() else inline
        content = lambda token: token["content"] if isinstance(token, dict) else token or ""
        self.words = {key: content(config.get(key)) for key in ("bos_token", "eos_token")}  # what a chat template may name

    def encode(self, text):
        """Ids of plain text, after the tokens that the tokenizer itself puts before a document (LLaMA's begin-of-text, say)."""
        ids = self.tokenizer.encode(text.encode("utf-8", "replace").decode()).ids
        return np.array(ids[:-1] if ids[-1:] == [self.end] else ids, dtype=np.uint32)

    def encode_part(self, text):
        """Ids of plain text with nothing before it."""
        return np.array(self.tokenizer.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False).ids, dtype=np.uint32)

    def encode_template(self, text):
        """Ids of text in which the names of special tokens are these tokens, with nothing before it."""
        return np.array(self.with_specials.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False).ids, dtype=np.uint32)

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def decoder(self):
        from tokenizers.decoders import DecodeStream
        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self.tokenizer, token) or ""

    def keep(self, folder):
        for name in FILES:
            if (self.folder / name).exists() and Path(folder).resolve() != self.folder.resolve():
                shutil.copy(self.folder / name, folder)

    export = keep


def byte_letters():
    """GPT-2's letter for each byte: printable ones stand for themselves, the others for the letters from 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def merged_parts(ranks, token, rank):
    """The two tokens that byte-pair encoding joins last to make this one: merge by rank, lowest first, all below its own."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
        if ranks.get(parts[best] + parts[best + 1], rank) >= rank:
            break
        parts[best:best + 2] = [parts[best] + parts[best + 1]]
    return parts
