"""Text <-> token ids: tiktoken's encodings, plain bytes, Hugging Face's tokenizer.json.

    tok = load("gpt2")           or "bytes", or the path of a directory
    tok.encode("some text")      the ids of a document, uint32
    tok.decode(ids)

A tokenizer has these attributes:

    name              equal names give equal ids
    size              all ids are below it
    end               the end-of-text id
    start             the ids that open a document
    folder            its directory; None: the name is enough to load it
    chat              the chat template as text, or None
    words             the names of special tokens that a chat template may use

and these methods:

    encode(text)           the ids (uint32) of a document
    encode_part(text)      the ids of a text inside a document
    encode_template(text)  the same; the names of special tokens in the text become these tokens
    decode(ids)            the text
    decoder()              a streaming decoder, a function id -> text; buffers incomplete UTF-8
    keep(folder)           copy the files that load(name, folder) needs
    export(folder)         write the files that transformers and vLLM read
"""
import codecs
import hashlib
import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
import tiktoken

from config import UserError, read_json, write_json

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "chat_template.jinja")


@lru_cache
def load(name, folder=None):
    """A tokenizer by its name, or by the path of its directory. Raises UserError.

    folder: where a tokenizer is kept whose name is the hash of its tokenizer.json.
    """
    if name == "bytes":
        return Tiktoken(byte_encoding())
    if name.startswith("tokenizer.json:"):
        tok = Json(Path(folder))
        if tok.name != name:
            raise UserError(f"{folder}/tokenizer.json is {tok.name}, expected {name}: the file was "
                            "changed or replaced")
        return tok
    if (Path(name) / "tokenizer.json").exists():
        return Json(Path(name))
    names = tiktoken.list_encoding_names()
    if name not in names:
        raise UserError(f"unknown tokenizer {name!r}: take bytes, {', '.join(names)}, or a folder "
                        "with a tokenizer.json")
    try:
        return Tiktoken(tiktoken.get_encoding(name))
    except OSError as error:  # the exceptions of requests are OSErrors
        raise UserError(f"tokenizer {name} could not be downloaded ({type(error).__name__}): run "
                        "once with a network, or set TIKTOKEN_CACHE_DIR to a tiktoken cache that "
                        "holds it") from None


def byte_encoding():
    """tiktoken's encoding in which a byte is a token, and 256 is end-of-text."""
    return tiktoken.Encoding("bytes", pat_str=r"[\s\S]{1,64}",
                             mergeable_ranks={bytes([i]): i for i in range(256)},
                             special_tokens={"<|endoftext|>": 256})


def without_surrogates(text):
    """The text with U+FFFD for lone surrogates, which JSON can hold ("\\ud800"), UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Tiktoken:
    folder = chat = None
    words = {}

    def __init__(self, encoding):
        self.encoding, self.name = encoding, encoding.name
        self.size, self.end = encoding.n_vocab, encoding.eot_token
        self.start = [self.end]

    def encode(self, text):
        """Ids of plain text: the names of special tokens are text too."""
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            return self.encoding.encode_to_numpy(without_surrogates(text), disallowed_special=())

    encode_part = encode

    def decode(self, ids):
        return self.encoding.decode(ids)

    def decoder(self):
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda token: utf8.decode(self.encoding.decode_single_token_bytes(token))

    def keep(self, folder):
        """Copy nothing: the name is enough."""

    def export(self, folder):
        """Write a tokenizer.json with the same ids.

        One difference remains: transformers takes the name of a special token for the token.
        """
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
        ranks, special_tokens = self.encoding._mergeable_ranks, self.encoding._special_tokens
        vocabulary = {in_letters(token): rank for token, rank in ranks.items()}
        merges = [tuple(in_letters(part) for part in merged_parts(ranks, token, ranks[token]))
                  for token in sorted(ranks, key=ranks.get) if len(token) > 1]
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(self.encoding._pat_str), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)
                                      for text in sorted(special_tokens, key=special_tokens.get)])
        end = self.encoding.decode([self.end])
        if tokenizer.token_to_id(end) != self.end:
            raise UserError(f"tokenizer {self.name} leaves gaps between its ids, which "
                            "tokenizer.json cannot express")
        tokenizer.save(str(Path(folder) / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end,
                  "pad_token": end, "clean_up_tokenization_spaces": False}
        write_json(Path(folder) / "tokenizer_config.json", config)


class Json:
    """The tokenizer.json of a folder, through the `tokenizers` library.

    Its end of text is eos_token of tokenizer_config.json.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        text, config = self._read()
        from tokenizers import Tokenizer
        self.tokenizer = Tokenizer.from_str(text)
        self.tokenizer.encode_special_tokens = True  # the names of special tokens are text too
        self.with_specials = Tokenizer.from_str(text)  # a second object: threads share both
        digest = hashlib.sha256(text.encode()).hexdigest()
        self.name, self.size = f"tokenizer.json:{digest[:12]}", self.tokenizer.get_vocab_size()
        self.words = {key: self._token_text(key, config.get(key))
                      for key in ("bos_token", "eos_token")}
        self.end = self.tokenizer.token_to_id(self.words["eos_token"])
        if self.end is None:
            raise UserError(f"{self.folder / 'tokenizer_config.json'}: eos_token "
                            f"{self.words['eos_token']!r} is no token of tokenizer.json")
        self.start = self.tokenizer.encode("").ids or [self.end]
        self.chat = self._chat_template(config.get("chat_template"))

    def _read(self):
        """(the text of tokenizer.json, tokenizer_config.json as a dict); raises UserError."""
        from tokenizers import Tokenizer
        path = self.folder / "tokenizer.json"
        try:
            text = path.read_bytes().decode()
            Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises bare Exceptions
            raise UserError(f"{path} cannot be read: {error}") from None
        config_file = self.folder / "tokenizer_config.json"
        config = read_json(config_file)
        if not isinstance(config, dict):
            raise UserError(f"{config_file} must hold an object, holds {config!r:.80}")
        return text, config

    def _chat_template(self, inline):
        """The chat template: a file of its own, or the one inside tokenizer_config.json."""
        file = self.folder / "chat_template.jinja"
        if file.exists():
            try:
                return file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{file} is not UTF-8 ({error.reason})") from None
        template = inline
        if isinstance(inline, list):  # several templates, by name
            default = [choice for choice in inline
                       if isinstance(choice, dict) and choice.get("name") == "default"]
            template = default[0].get("template") if default else None
        if template is not None and not isinstance(template, str):
            raise UserError(f"{self.folder / 'tokenizer_config.json'}: chat_template must be text, "
                            f"is {template!r:.80}")
        return template

    def _token_text(self, key, token):
        """The text of a special token: in the file it is a string, null or {"content": string}."""
        text = token.get("content") if isinstance(token, dict) else token
        if text is None:
            return ""
        if not isinstance(text, str):
            raise UserError(f"{self.folder / 'tokenizer_config.json'}: {key} must be text, is "
                            f"{token!r:.80}")
        return text

    def encode(self, text):
        """Ids of plain text, after the tokens that open a document (LLaMA's begin-of-text, say)."""
        ids = self.tokenizer.encode(valid_utf8(text)).ids
        if ids[-1:] == [self.end]:
            ids = ids[:-1]
        return np.array(ids, dtype=np.uint32)

    def encode_part(self, text):
        """Ids of plain text with nothing before it."""
        ids = self.tokenizer.encode(valid_utf8(text), add_special_tokens=False).ids
        return np.array(ids, dtype=np.uint32)

    def encode_template(self, text):
        """encode_part, but the names of special tokens in the text are these tokens."""
        ids = self.with_specials.encode(valid_utf8(text), add_special_tokens=False).ids
        return np.array(ids, dtype=np.uint32)

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def decoder(self):
        from tokenizers.decoders import DecodeStream
        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self.tokenizer, token) or ""

    def keep(self, folder):
        if Path(folder).resolve() == self.folder.resolve():
            return
        for name in FILES:
            if (self.folder / name).exists():
                shutil.copy(self.folder / name, folder)

    export = keep


def valid_utf8(text):
    """The text with "?" for lone surrogates, which `tokenizers` refuses."""
    return text.encode("utf-8", "replace").decode()


@lru_cache
def byte_letters():
    """GPT-2's letter for each byte: printable bytes keep theirs, the others get U+0100 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
                 *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(others)}


def in_letters(token):
    """The bytes of a token in GPT-2's letters."""
    return "".join(byte_letters()[byte] for byte in token)


def merged_parts(ranks, token, rank):
    """The two tokens that byte-pair encoding joins last to make this token.

    Pairs are merged by rank, lowest first, as long as the rank is below the token's own.
    """
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pair_ranks = [ranks.get(left + right, rank)
                      for left, right in zip(parts, parts[1:], strict=False)]
        best = pair_ranks.index(min(pair_ranks))
        if pair_ranks[best] >= rank:
            break
        parts[best:best + 2] = [parts[best] + parts[best + 1]]
    return parts
