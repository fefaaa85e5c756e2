"""The format of prepared data: shards of token ids and a manifest. Resumable writing, and reading.

    prepare("data/mine", tok, request, stages)    writes a corpus; continues after a kill
    train = open_split("data/mine", "train")      Tokens of a text, or Samples
    train.read(0, 512)                            the first 512 token ids

A corpus is a folder of shards, files of raw uint16 or uint32 words, and manifest.json. The manifest
is written last: a folder with a manifest is complete. In a text a word is a token id, and
end-of-text follows every document. In samples a word has 32 bits: a token id, FIRST and LEARNED.
"""
import hashlib
import json
import math
import os
import time
import zlib
from collections import deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import tokenizer
from config import lock, need, read_json, write_json

SHARD_TOKENS = 2 ** 26  # 128 MiB of uint16; a kill loses at most the work of one shard
CHUNK_DOCUMENTS = 256   # documents that one worker encodes at a time
LEARNED = 1 << 31       # flag of a sample's word: the token is learned
FIRST = 1 << 30         # flag of a sample's word: the token is the first one of its sample
PAD_TO = 8              # rows of samples are padded to a multiple of it

# counters of a split beside tokens, documents and bytes, and their names in a summary
COUNTERS = {"learned": "learned tokens", "longest": "tokens in the longest", "dropped": "dropped",
            "refused": "of them refused by the chat template", "truncated": "truncated",
            "missing": "left out without the key or an answer", "bad": "left out as no text",
            "empty": "left out as empty"}

# an example of each JSON file, see check_value
SPLIT = {"tokens": 0, "documents": 0, "bytes": 0, "shards": [{"file": "", "tokens": 0, "crc32": 0}]}
SPLITS = {"train": SPLIT, "val": SPLIT}
MANIFEST = {"kind": "", "request": {}, "tokenizer": "", "vocab_size": 0, "dtype": "",
            "splits": SPLITS, "mb_per_s": 0.0}
PROGRESS = {"request": {}, "stage": 0, "documents": 0, "seconds": 0.0, "splits": SPLITS}

# stands among the documents for a row that gives none; reason: its counter, "missing" or "bad"
LeftOut = namedtuple("LeftOut", "reason message")


def encode_text(tok, text):
    """(words, counters) of a document, which end-of-text follows."""
    if not text:
        return None, {"empty": 1}
    words = np.append(tok.encode(text), np.uint32(tok.eos_id))
    return words, {"bytes": len(text.encode("utf-8", "replace"))}


# ---- writing

def prepare(folder, tok, request, stages, limits=None, encode=encode_text, facts=None):
    """Write a corpus as shards and a manifest, and return the manifest.
    A killed preparation of the same request is continued, a finished one is not repeated. Raises
    UserError for a folder of another corpus, and for a corpus without a token. tok: see
    tokenizer.load. request: a JSON object that names the corpus; equal requests give equal shards.
    stages: [(read, into)]: read() yields documents, always in the same order, into the splits of
    these names; no name: every 100th is validation. limits: {split: tokens}, 0: none. encode(tok,
    document): (words uint32, counters), words None: left out. facts: more keys of the manifest."""
    folder, dtype = Path(folder), ("uint32" if facts or tok.vocab_size > 2 ** 16 else "uint16")
    manifest = {"kind": "text", **(facts or {}), "request": request | {"tokenizer": tok.name},
                "tokenizer": tok.name, "vocab_size": tok.vocab_size, "dtype": dtype}
    with lock(folder, "data preparation"):
        if (folder / "manifest.json").exists():
            written = read_manifest(folder)
            changed = changes(written["request"], manifest["request"])
            need(not changed, f"{folder} holds another corpus ({changed}): remove it or rename it")
            print(f"{folder} is prepared already: {summary(written)}")
            return written
        tok.copy_files(folder)
        try:
            write_corpus(folder, manifest, partial(encode, tok), stages, limits or {})
        except OSError as error:
            error.filename = error.filename or str(folder)  # writing to an open file names none
            raise
        finally:
            for stray in folder.glob("*.tmp"):
                stray.unlink()
    print(f"{folder}: {summary(manifest)}")
    return manifest


def changes(before, now):
    """Return "key was a, now b; ..." of the keys that differ, "" if none does."""
    return "; ".join(f"{key} was {before.get(key)}, now {now.get(key)}" for key in before | now
                     if before.get(key) != now.get(key))


class SplitWriter:
    """Counts the documents of one split and writes their words as shards. totals: as SPLIT.
    limit: stop with the document that reaches this number of tokens; 0: no limit."""

    def __init__(self, folder, split, dtype, totals, limit):
        self.folder, self.split, self.dtype, self.totals = folder, split, dtype, totals
        self.limit, self.words, self.waiting = limit or math.inf, [], 0  # tokens of self.words

    def full(self):
        return self.totals["tokens"] >= self.limit

    def add(self, words, counts):
        """Count a document and take its words, if it has some, unless the limit is reached."""
        if self.full():
            return
        if words is not None:
            counts = {"tokens": len(words), "documents": 1} | counts
            self.words.append(words)
            self.waiting += len(words)
        for key, value in counts.items():
            before = self.totals.get(key, 0)
            self.totals[key] = max(before, value) if key == "longest" else before + value

    def write_shard(self):
        """Write the words that wait as a shard, whole or not at all."""
        if self.words:
            words = np.concatenate(self.words, dtype=self.dtype, casting="unsafe")
            name = f"{self.split}_{len(self.totals['shards']):05d}.bin"
            temporary = self.folder / f"{name}.tmp"
            temporary.write_bytes(words)
            os.replace(temporary, self.folder / name)
            shard = {"file": name, "tokens": len(words), "crc32": zlib.crc32(words)}
            self.totals["shards"].append(shard)
        self.words, self.waiting = [], 0


def write_corpus(folder, manifest, encode, stages, limits):
    """Write the shards of what is left of the stages, complete the manifest and write it."""
    progress_file, request = folder / "progress.json", manifest["request"]
    empty = {split: SPLIT | {"shards": []} for split in SPLITS}
    progress = PROGRESS | {"request": request, "splits": empty}
    if progress_file.exists():
        stored = read_json(progress_file)
        check_value(stored, PROGRESS, progress_file)
        if not changes(stored["request"], request):
            progress = stored | {"request": request}
    splits, started = progress["splits"], time.time() - progress["seconds"]
    writers = {split: SplitWriter(folder, split, manifest["dtype"], totals, limits.get(split, 0))
               for split, totals in splits.items()}
    bar = tqdm(initial=total(splits, "bytes"), unit="B", unit_scale=True, desc="tokenizing",
               disable=None)
    with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        for stage, (read, into) in list(enumerate(stages))[progress["stage"]:]:
            for chunk, end in encoded(pool, encode, read, into, progress["documents"]):
                for split, words, counts in chunk:
                    writers[split].add(words, counts)
                bar.update(total(splits, "bytes") - bar.n)
                if any(writer.waiting >= SHARD_TOKENS for writer in writers.values()):
                    for writer in writers.values():
                        writer.write_shard()
                    # all that is counted is on disk now
                    progress |= {"stage": stage, "documents": end, "seconds": time.time() - started}
                    write_json(progress_file, progress)
                if all(writers[split].full() for split, _, _ in chunk):
                    break
            progress["documents"] = 0  # of the next stage
    for writer in writers.values():
        writer.write_shard()
    seconds = max(time.time() - started, 1e-3)
    manifest |= {"splits": splits, "seconds": round(seconds, 3),
                 "mb_per_s": round(total(splits, "bytes") / 1e6 / seconds, 3)}
    longest = f" of at most {request['seq_len']} tokens" if request.get("seq_len") else ""
    need(total(splits, "tokens"), f"no document{longest} was found: {summary(manifest)}")
    write_json(folder / "manifest.json", manifest)
    progress_file.unlink(missing_ok=True)


def total(splits, counter):
    return sum(totals[counter] for totals in splits.values())


def encoded(pool, encode, read, into, first):
    """Yield ([(split, words, counters)], index after them) of chunks of documents from `first`."""
    def encode_chunk(chunk):
        parts = []
        for index, document in chunk:
            left_out = isinstance(document, LeftOut)
            words, counts = (None, {document.reason: 1}) if left_out else encode(document)
            every_100th = ["val" if index % 100 == 99 else "train"]
            parts += [(split, words, counts) for split in into or every_100th]
        return parts, index + 1

    documents, jobs = islice(enumerate(read()), first, None), deque()
    for chunk in iter(lambda: list(islice(documents, CHUNK_DOCUMENTS)), []):
        jobs.append(pool.submit(encode_chunk, chunk))
        if len(jobs) == 4 * os.cpu_count():
            yield jobs.popleft().result()
    while jobs:
        yield jobs.popleft().result()


# ---- the manifest

def read_manifest(folder):
    """The manifest of a prepared corpus. Raises UserError if it is missing or damaged."""
    path = Path(folder) / "manifest.json"
    need(path.exists(), f"no token shards in {folder}: prepare them with data.py (python data.py "
         "--help lists the corpora)")
    manifest = read_json(path)
    check_value(manifest, MANIFEST, path)
    kind, dtype = manifest["kind"], manifest["dtype"]
    intact(kind in ("text", "samples") and dtype in ("uint16", "uint32"), path,
           f"kind {kind!r} with dtype {dtype!r} is unknown")
    learned = {split: {"learned": 0} for split in SPLITS if manifest["splits"][split]["tokens"]}
    check_value(manifest, {"format": "", "splits": learned} if kind == "samples" else {}, path)
    return manifest


def check_value(value, example, path, where=""):
    """Raise UserError unless a value of a JSON file has the types and keys of an example."""
    intact(type(value) is type(example), path,
           f"{where} must be of type {type(example).__name__}, is {value!r:.80}")
    if isinstance(example, list):
        for entry in value:
            check_value(entry, example[0], path, where)
    if isinstance(example, dict):
        for key in example:
            name = f"{where}.{key}".lstrip(".")
            intact(key in value, path, f"it has no key {name}")
            check_value(value[key], example[key], path, name)


def intact(condition, path, reason):
    """Raise UserError with the reason, for a file of prepared data, unless the condition holds."""
    need(condition, f"{path} is damaged ({reason}): remove {path.parent} and prepare it again")


def summary(manifest):
    """One line: what a prepared corpus holds, and how fast it was prepared."""
    clauses, documents = [], ("documents" if manifest["kind"] == "text" else "samples")
    for split, totals in manifest["splits"].items():
        if any(totals.values()):
            counts = "".join(f", {totals[counter]:,} {name}" for counter, name in COUNTERS.items()
                             if totals.get(counter))
            clauses.append(f"{split} {totals['documents']:,} {documents} of {totals['tokens']:,} "
                           f"tokens ({totals['bytes'] / 1e6:.1f} MB){counts}")
    clauses += [f"tokenizer {manifest['tokenizer']}", f"{manifest['mb_per_s']:.1f} MB/s"]
    return "; ".join(clauses)


def fingerprint(folder):
    """A short checksum of a prepared corpus: equal for equal tokens in equal order."""
    manifest = read_manifest(folder)
    facts = [manifest["kind"], {key: manifest[key] for key in ("tokenizer", "vocab_size", "dtype")},
             {split: totals["shards"] for split, totals in manifest["splits"].items()}]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


# ---- reading

def open_split(folder, split, verify=True):
    """One split of a prepared folder, as Samples or as Tokens."""
    reader = Samples if read_manifest(folder)["kind"] == "samples" else Tokens
    return reader(folder, split, verify)


class Tokens:
    """One split as one long, memory-mapped sequence of token ids."""
    id_bits = 0xffffffff  # of a word

    def __init__(self, folder, split, verify=True):
        """verify: compare every shard with its checksum (a few GB/s); sizes are always compared."""
        self.folder, self.split, self.verify = Path(folder), split, verify
        self.manifest = read_manifest(folder)
        self.vocab_size, self.tokenizer = self.manifest["vocab_size"], self.manifest["tokenizer"]
        self.totals = self.manifest["splits"][split]
        need(self.totals["shards"], f"{folder} has no {split} documents: prepare it again with "
             "more text, or with --val FILES")
        need(self.totals["bytes"], f"{folder}: the responses of all {self.totals['documents']} "
             f"{split} samples are empty: prepare it again with others")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            self.shards = list(pool.map(self._map_shard, self.totals["shards"]))
        self.shard_starts = np.cumsum([0] + [len(shard) for shard in self.shards])

    def _map_shard(self, shard):
        path, dtype = self.folder / shard["file"], np.dtype(self.manifest["dtype"])
        size = path.stat().st_size if path.exists() else 0
        expected = shard["tokens"] * dtype.itemsize
        intact(size == expected, path, f"it should hold {expected} bytes and holds {size}")
        words = np.memmap(path, dtype, mode="r")
        crc = zlib.crc32(words) if self.verify else shard["crc32"]
        intact(crc == shard["crc32"], path, f"its checksum is {crc}, expected {shard['crc32']}")
        return words

    def must_suit(self, model, tok, where):
        """Raise UserError if the model of the path `where` does not fit. tok: its own, or None."""
        if tok:
            advice = f"remove it, prepare it again: --tokenizer={where if tok.folder else tok.name}"
            need(tok.name == self.tokenizer, f"{where} has the tokenizer {tok.name}, {self.folder} "
                 f"was prepared with {self.tokenizer}: {advice}")
            end = tokenizer.load(self.tokenizer, self.folder).eos_id
            need(tok.eos_id == end, f"{where} ends a text with the id {tok.eos_id}, {self.folder} "
                 f"with {end}: {advice}")
        need(self.vocab_size <= model.cfg.vocab_size, f"{self.folder} has a vocabulary of "
             f"{self.vocab_size} tokens, {where} has {model.cfg.vocab_size}")

    def __len__(self):
        return int(self.shard_starts[-1])

    def read(self, position, count):
        """Token ids, (count,) int64, fewer at the end. Raises UserError for an invalid id."""
        ids = self.words(position, count).astype(np.int64) & self.id_bits
        largest = ids.max()
        intact(largest < self.vocab_size, self.folder / "manifest.json",
               f"token id {largest} lies outside the vocabulary of {self.vocab_size}")
        return ids

    def words(self, position, count):
        """The words (count,) as they are stored, across shards."""
        end = position + count
        first, last = np.searchsorted(self.shard_starts, [position, end - 1], "right") - 1
        return np.concatenate([
            shard[max(0, position - start):end - start] for shard, start in
            zip(self.shards[first:last + 1], self.shard_starts[first:], strict=False)])


class Samples(Tokens):
    """One split of samples. sample_starts (and the end), lengths, learned: tokens per sample."""
    id_bits = FIRST - 1

    def __init__(self, folder, split, verify=True):
        super().__init__(folder, split, verify)
        self.format = self.manifest["format"]
        starts = [np.flatnonzero(shard & FIRST) for shard in self.shards]
        # nothing predicts a first token, so it does not count as learned
        learned = [np.add.reduceat(shard & (FIRST | LEARNED) == LEARNED, first, dtype=np.int64)
                   for shard, first in zip(self.shards, starts, strict=True)]
        self.sample_starts = np.concatenate([*map(np.add, starts, self.shard_starts), [len(self)]])
        self.learned, self.lengths = np.concatenate(learned), np.diff(self.sample_starts)

    def sample(self, i):
        """(ids int64, which of them are learned) of sample i."""
        position, count = int(self.sample_starts[i]), int(self.lengths[i])
        return self.read(position, count), self.words(position, count) >= LEARNED

    def rows(self, which, seq_len, count=0):
        """(inputs, targets) of some samples, each (max(samples, count), padded length) int64.
        Targets are -100 where nothing is learned, in the padding, and in rows without a sample."""
        length = self.padded_length(self.lengths[which].max(initial=2), seq_len)
        inputs = torch.zeros((max(count, len(which)), length), dtype=torch.int64)
        targets = torch.full_like(inputs, -100)
        for row, i in enumerate(which):
            ids, learned = map(torch.from_numpy, self.sample(i))
            inputs[row, :len(ids) - 1] = ids[:-1]
            targets[row, :len(ids) - 1] = ids.where(learned, -100)[1:]
        return inputs, targets

    def padded_length(self, longest, seq_len):
        """The length of rows whose longest sample has so many tokens, for numbers and arrays."""
        # inputs lack a sample's last token
        return np.minimum(-(-(longest - 1) // PAD_TO) * PAD_TO, seq_len)

    def must_fit(self, seq_len):
        """Raise UserError if a sample is longer than seq_len."""
        longest = self.lengths.max()
        need(longest <= seq_len, f"{self.folder} has a {self.split} sample of {longest} tokens, "
             f"seq_len is {seq_len}: take --seq_len={longest}, or prepare it again with "
             f"--seq_len={seq_len}, which drops longer samples (--long=truncate cuts them)")
