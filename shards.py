"""The format of prepared data: shards of token ids and a manifest. Resumable writing, and reading.

    prepare("data/mine", tok, request, stages)    writes a corpus; continues after a kill
    train = open_split("data/mine", "train")      Tokens of a text, or Samples
    train.read(0, 512)                            the first 512 token ids

A corpus is a folder of shards, files of raw uint16 or uint32 words, and manifest.json. The manifest
is written last: a folder with a manifest is complete. In a text a word is a token id, and
end-of-text follows every document. In samples a word has 32 bits: a token id and the flags FIRST
and LEARNED. Shards are mapped into memory, not loaded.
"""
import contextlib
import hashlib
import json
import operator
import os
import time
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from config import UserError, lock, read_json, write_json

SHARD_TOKENS = 2 ** 26  # 128 MiB of uint16; a kill loses at most the work of one shard
LEARNED = 1 << 31       # flag of a sample's word: the token is learned
FIRST = 1 << 30         # flag of a sample's word: the token is the first one of its sample
ALIGNED = 8             # rows of samples are padded to a multiple of it
JOBS_AHEAD = 4          # chunks per processor that are encoded ahead of the writer
CHECKED_ROWS = 10_000   # from this number of rows on, the share of unusable rows is checked
ALLOWED = 0.01          # share of unusable rows that does not stop a preparation

# why a row gives no document: counters of a split; its totals hold those that are not 0
UNUSABLE = {"missing": "without the key", "bad": "not text"}
LEFT_OUT = UNUSABLE | {"empty": "empty"}


# --------------------------------------------------------------------------------------------------
# the two formats

class Encoded(NamedTuple):
    """The words of a list of documents (or samples)."""
    words: np.ndarray            # (words,) uint32
    ends: np.ndarray             # (documents,) int64: where each document ends in words
    document_bytes: np.ndarray   # (documents,) int64: of the text, of a sample's responses; UTF-8
    counts: dict                 # the format's other counters


class LeftOut(NamedTuple):
    """Stands among the documents for a row that gives none."""
    reason: str    # a key of UNUSABLE
    message: str   # where the row is, and what is wrong


@dataclass(frozen=True)
class Format:
    """What differs between a corpus of text and a corpus of samples."""
    name: str
    smallest_dtype: str    # of a word
    counters: dict         # {counter of a split: how the values of two parts combine}
    describe: Callable     # (split, its totals) -> one clause of the summary
    reason_empty: Callable  # (request, counters over all splits) -> why nothing was prepared

    @property
    def required_counters(self):
        """Those that the manifests of all versions have."""
        return [counter for counter in self.counters if counter != "refused"]


def describe_text(split, totals):
    megabytes = totals["bytes"] / 1e6
    return (f"{split} {totals['tokens']:,} tokens of {totals['documents']:,} documents "
            f"({megabytes:.1f} MB)")


def describe_samples(split, totals):
    learned = totals["learned"] / max(1, totals["tokens"])
    text = (f"{split} {totals['documents']:,} samples of {totals['tokens']:,} tokens, "
            f"{learned:.0%} of them learned, the longest sample {totals['longest']:,}; "
            f"{totals['dropped']:,} dropped")
    if totals.get("refused"):
        text += f" ({totals['refused']:,} of them refused by the chat template)"
    return text + f", {totals['truncated']:,} truncated"


def reason_no_text(request, counts):
    return f"{request['source']} gave no text"


def reason_no_sample(request, counts):
    reason = f"{request['source']} gave no sample"
    if request.get("seq_len"):
        reason += f" of at most {request['seq_len']} tokens"
    if counts["refused"]:
        reason += f"; the chat template refused {counts['refused']:,} chats"
    return reason


TEXT = Format("text", "uint16", dict.fromkeys(("tokens", "documents", "bytes"), operator.add),
              describe_text, reason_no_text)
SAMPLES = Format("samples", "uint32",
                 TEXT.counters | {"learned": operator.add, "longest": max, "dropped": operator.add,
                                  "truncated": operator.add, "refused": operator.add},
                 describe_samples, reason_no_sample)
FORMATS = {form.name: form for form in (TEXT, SAMPLES)}


def describe_left_out(totals):
    """A clause on the rows that gave no document; empty if there is none."""
    counts = [f"{totals[reason]:,} {words}" for reason, words in LEFT_OUT.items()
              if totals.get(reason)]
    return f", left out: {', '.join(counts)}" if counts else ""


def format_of(manifest):
    """The Format of a manifest. Text is the default: its manifests have no key "kind"."""
    return FORMATS[manifest.get("kind", "text")]


def encode_text(tok, texts):
    """The Encoded form of some documents, each followed by end-of-text."""
    parts = [tok.encode(text) for text in texts]
    ends = np.cumsum([len(part) + 1 for part in parts], dtype=np.int64)
    words = np.full(ends[-1] if len(ends) else 0, tok.end, dtype=np.uint32)
    for part, end in zip(parts, ends, strict=True):
        words[end - 1 - len(part):end - 1] = part
    document_bytes = [len(text.encode("utf-8", "replace")) for text in texts]
    return Encoded(words, ends, np.array(document_bytes, dtype=np.int64), {})


# --------------------------------------------------------------------------------------------------
# writing

class SplitWriter:
    """Appends words to the shards of one split. A shard gets its name when it is complete."""

    def __init__(self, folder, split, dtype, counters, totals, limit=0):
        """totals: of the complete shards: counters, and "shards": [{"file", "tokens", "crc32"}].

        limit: stop with the document that reaches this number of tokens; 0: no limit.
        """
        self.folder, self.split, self.dtype, self.limit = folder, split, dtype, limit
        self.counters = counters | dict.fromkeys(LEFT_OUT, operator.add)
        self.totals = totals
        self.pending = {"tokens": 0}  # counters of the open shard
        self.temporary = folder / f"{split}.{os.getpid()}.tmp"
        self.file, self.crc32 = None, 0

    @property
    def room(self):
        """Tokens until the limit."""
        return self.limit - self.totals["tokens"] - self.pending["tokens"]

    @property
    def full(self):
        return bool(self.limit) and self.room <= 0

    def add(self, part):
        """Append the documents of an Encoded part, up to the one that reaches the limit."""
        words, document_bytes, documents = part.words, part.document_bytes, len(part.ends)
        if self.full:
            return
        if self.limit:
            documents = min(int(np.searchsorted(part.ends, self.room)) + 1, documents)
            document_bytes = document_bytes[:documents]
            words = words[:part.ends[documents - 1] if documents else 0]
        own = {"tokens": len(words), "documents": documents, "bytes": int(document_bytes.sum())}
        self._count(self.pending, part.counts | own)
        if len(words):
            self._write(words.astype(self.dtype).tobytes())

    def _count(self, counts, more):
        for key, value in more.items():
            counts[key] = self.counters[key](counts.get(key, 0), value)

    def _write(self, block):
        if self.file is None:
            self.file, self.crc32 = open(self.temporary, "wb"), 0
        self.file.write(block)
        self.crc32 = zlib.crc32(block, self.crc32)

    def discard(self):
        """Remove the open shard, if there is one."""
        if self.file is not None:
            with contextlib.suppress(OSError):  # a full disk: close() writes what is buffered
                self.file.close()
            self.temporary.unlink(missing_ok=True)

    def close_shard(self):
        """Give the open shard its name, and add its counters to the totals."""
        if self.file is not None:
            self.file.close()
            self.file = None
            name = f"{self.split}_{len(self.totals['shards']):05d}.bin"
            os.replace(self.temporary, self.folder / name)
            shard = {"file": name, "tokens": self.pending["tokens"], "crc32": self.crc32}
            self.totals["shards"].append(shard)
        self._count(self.totals, self.pending)
        self.pending = {"tokens": 0}


class Preparation:
    """A corpus that is being written: its writers, and how far its sources have been read."""

    def __init__(self, folder, tok, request, form, encode, limits, allowed):
        self.folder, self.tok, self.request = folder, tok, request
        self.form, self.encode, self.allowed = form, encode, allowed
        self.dtype = form.smallest_dtype if tok.size <= 2 ** 16 else "uint32"
        self.progress_file = folder / "progress.json"
        self.progress = self._read_progress()
        self.splits = self.progress["splits"]
        self.writers = {
            split: SplitWriter(folder, split, self.dtype, form.counters, totals,
                               limits.get(split, 0))
            for split, totals in self.splits.items()}
        self.seconds_before, self.started = self.progress["seconds"], time.time()
        self.first_left_out = None  # LeftOut

    def _read_progress(self):
        """Where an earlier preparation of the same request was stopped, or the beginning."""
        if self.progress_file.exists():
            progress = read_json(self.progress_file)
            check_keys(progress, PROGRESS_KEYS, self.progress_file)
            if same_corpus(progress["request"], self.request):
                return progress | {"request": self.request}
        splits = {split: dict.fromkeys(self.form.counters, 0) | {"shards": []}
                  for split in ("train", "val")}
        return {"request": self.request, "stage": 0, "documents": 0, "seconds": 0.0,
                "splits": splits}

    @property
    def seconds(self):
        return self.seconds_before + time.time() - self.started

    def total(self, *counters):
        """The sum of counters over all splits, open shards included."""
        return sum(counts.get(counter, 0) for writer in self.writers.values()
                   for counts in (writer.totals, writer.pending) for counter in counters)

    def check_left_out(self, fewest_rows=1):
        """Raise UserError if too many of the rows so far are unusable."""
        rows, unusable = self.total("documents", "dropped", *LEFT_OUT), self.total(*UNUSABLE)
        if rows < fewest_rows or unusable <= self.allowed * rows:
            return
        example = f"; the first is {self.first_left_out.message}" if self.first_left_out else ""
        raise UserError(f"{unusable:,} of {rows:,} rows cannot be used, more than "
                        f"{100 * self.allowed:g} %{example}; --skip_bad=PERCENT allows more")

    def run(self, stages):
        """Read the stages that are left, and write their shards."""
        with progress_bar(initial=self.total("bytes")) as bar:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for stage in range(self.progress["stage"], len(stages)):
                    self._run_stage(stage, *stages[stage], pool, bar)
        for writer in self.writers.values():
            writer.close_shard()

    def _run_stage(self, stage, read, assign, pool, bar):
        done = self.progress["documents"] if stage == self.progress["stage"] else 0
        jobs = ((index + len(documents), pool.submit(self._encode_chunk, assign, documents, index))
                for index, documents in without_first(read(), done))
        for position, (parts, left_out) in in_order(jobs, ahead=JOBS_AHEAD * os.cpu_count()):
            self.first_left_out = self.first_left_out or left_out
            for split, part in parts.items():
                self.writers[split].add(part)
                bar.update(int(part.document_bytes.sum()))
            self.check_left_out(CHECKED_ROWS)
            if any(writer.pending["tokens"] >= SHARD_TOKENS for writer in self.writers.values()):
                self._close_shards(stage, position)
            if all(self.writers[split].full for split in parts):
                return

    def _encode_chunk(self, assign, documents, index):
        """({split: Encoded} of some documents, the first LeftOut or None)."""
        parts = {}
        for split, assigned in assign(documents, index).items():
            usable, counts = without_left_out(assigned)
            part = self.encode(self.tok, usable)
            parts[split] = part._replace(counts=part.counts | counts)
        left_out = [document for document in documents if isinstance(document, LeftOut)]
        return parts, left_out[0] if left_out else None

    def _close_shards(self, stage, position):
        """Complete all open shards, and note that `position` documents of the stage are in them."""
        for writer in self.writers.values():
            writer.close_shard()
        self.progress.update(stage=stage, documents=position, seconds=self.seconds)
        write_json(self.progress_file, self.progress)

    def finish(self, facts):
        """Write the manifest and return it. Raises UserError if nothing was prepared."""
        self.check_left_out()
        if not self.total("tokens"):
            counts = {counter: self.total(counter) for counter in self.form.counters}
            reason = self.form.reason_empty(self.request, counts)
            raise UserError(f"the corpus is empty: {reason}")
        seconds = max(self.seconds, 1e-3)
        speed = self.total("bytes") / 1e6 / seconds
        manifest = {**facts, "request": self.request, "tokenizer": self.tok.name,
                    "vocab_size": self.tok.size, "dtype": self.dtype, "splits": self.splits,
                    "seconds": round(seconds, 3), "mb_per_s": round(speed, 3)}
        write_json(self.folder / "manifest.json", manifest)
        self.progress_file.unlink(missing_ok=True)
        return manifest


def prepare(folder, tok, request, stages, limits=None, form=TEXT, encode=encode_text, facts=None,
            allowed=ALLOWED):
    """Write a corpus as shards and a manifest, and return the manifest.

    A preparation of the same request that was killed is continued, a finished one is not repeated.

    tok: see tokenizer.load. request: a dict that names the corpus, of values that JSON can hold;
    equal requests give equal shards. stages: [(read, assign)]: read() yields lists of documents,
    and assign(documents, index of the first one) returns {split: documents}. limits:
    {split: tokens}, 0: no limit. form, encode: the Format, and encode(tok, documents) -> Encoded.
    facts: more keys of the manifest. A LeftOut among the documents is counted; allowed: the largest
    share of such rows.

    Raises UserError for a folder that holds another corpus, for a corpus without a token, and for
    too many unusable rows.
    """
    folder, request = Path(folder), request | {"tokenizer": tok.name}
    if (folder / "manifest.json").exists():
        return prepared_already(folder, request)
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder, "data preparation"):
        if (folder / "manifest.json").exists():  # another process was faster
            return prepared_already(folder, request)
        tok.keep(folder)
        for stray in folder.glob("*.tmp"):
            stray.unlink()
        preparation = Preparation(folder, tok, request, form, encode, limits or {}, allowed)
        try:
            preparation.run(stages)
            manifest = preparation.finish(facts or {})
        except OSError as error:
            error.filename = error.filename or str(folder)  # writing to an open file names none
            raise
        finally:
            for writer in preparation.writers.values():
                writer.discard()
    print(f"{folder}: {summary(manifest)}")
    return manifest


def prepared_already(folder, request):
    """The manifest of a finished corpus; raises UserError if it is another one."""
    manifest = read_manifest(folder)
    check_request(folder, manifest["request"], request)
    print(f"{folder} is prepared already: {summary(manifest)}")
    return manifest


def same_corpus(before, now):
    """Whether two requests name the same corpus.

    "content", the checksums of files, is compared if both have it: older requests do not.
    """
    if "content" not in before:
        now = {key: value for key, value in now.items() if key != "content"}
    return before == now


def check_request(folder, before, now):
    """Raise UserError if two requests name different corpora."""
    if not same_corpus(before, now):
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        changes = "; ".join(f"{key} was {before.get(key)}, now {now.get(key)}" for key in keys)
        raise UserError(f"{folder} holds another corpus ({changes}): remove it or choose another "
                        "NAME")
    if "content" in now and "content" not in before:
        print(f"note: {folder} has no checksums of its files; their names and sizes agree")


def without_left_out(documents):
    """(the documents that are to be encoded, {reason: number of the others})."""
    counts = {}
    usable = []
    for document in documents:
        if document and not isinstance(document, LeftOut):
            usable.append(document)
            continue
        reason = document.reason if isinstance(document, LeftOut) else "empty"
        counts[reason] = counts.get(reason, 0) + 1
    return usable, counts


def without_first(chunks, count):
    """Yield (index of its first document, documents) of each chunk, without `count` documents."""
    index = 0
    for documents in chunks:
        skipped = min(max(0, count - index), len(documents))
        if skipped < len(documents):
            yield index + skipped, documents[skipped:]
        index += len(documents)


def in_order(jobs, ahead):
    """Yield (tag, result) of (tag, future) pairs in order; at most `ahead` are in memory."""
    waiting = deque()
    for tag, future in jobs:
        waiting.append((tag, future))
        if len(waiting) >= ahead:
            tag, future = waiting.popleft()
            yield tag, future.result()
    for tag, future in waiting:
        yield tag, future.result()


def progress_bar(**options):
    from tqdm import tqdm
    return tqdm(unit="B", unit_scale=True, mininterval=0.5, desc="tokenizing", disable=None,
                **options)


# --------------------------------------------------------------------------------------------------
# reading

SHARD_KEYS = {"file": str, "tokens": int, "crc32": int}
SPLIT_KEYS = {"tokens": int, "documents": int, "bytes": int, "shards": list}
MANIFEST_KEYS = {"request": dict, "tokenizer": str, "vocab_size": int, "dtype": str, "splits": dict}
PROGRESS_KEYS = {"request": dict, "stage": int, "documents": int, "seconds": float, "splits": dict}
TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", list: "a list",
              dict: "an object"}


def read_manifest(folder):
    """The manifest of a prepared corpus; raises UserError that names the command, or a key."""
    folder = Path(folder)
    path = folder / "manifest.json"
    if not path.exists():
        named = folder.name in ("c4", "stdlib", "tulu", "metamath", "uuid")
        words = folder.name if named else f"text {folder.name} FILES..."
        raise UserError(f"no token shards in {folder}: prepare them with "
                        f"`python data.py {words}`")
    manifest = read_json(path)
    check_keys(manifest, MANIFEST_KEYS, path)
    if manifest["dtype"] not in ("uint16", "uint32"):
        raise damaged(path, f"dtype must be uint16 or uint32, is {manifest['dtype']!r}")
    if manifest.get("kind", "text") not in FORMATS:
        raise damaged(path, f"kind must be one of {', '.join(FORMATS)}, is {manifest['kind']!r}")
    form = format_of(manifest)
    if form is SAMPLES:
        check_keys(manifest, {"format": str}, path)
    for split in ("train", "val"):
        check_keys(manifest["splits"], {split: dict}, path, "splits")
        totals = manifest["splits"][split]
        check_keys(totals, SPLIT_KEYS, path, f"splits.{split}")
        for shard in totals["shards"]:
            check_keys(shard, SHARD_KEYS, path, f"splits.{split}.shards")
        if totals["documents"]:
            check_keys(totals, dict.fromkeys(form.required_counters, int), path, f"splits.{split}")
    return manifest


def check_keys(value, types, path, where=""):
    """Raise UserError unless a dict has these keys, of these types.

    where: the place of the dict in the file.
    """
    if not isinstance(value, dict):
        raise damaged(path, f"{where or 'its content'} must be an object, is {value!r:.80}")
    for key, expected in types.items():
        name = f"{where}.{key}" if where else key
        if key not in value:
            raise damaged(path, f"it has no key {name}")
        accepted = (int, float) if expected is float else expected
        if not isinstance(value[key], accepted) or isinstance(value[key], bool):
            raise damaged(path, f"{name} must be {TYPE_NAMES[expected]}, is {value[key]!r:.80}")


def damaged(path, reason):
    """The UserError for a file of a prepared folder."""
    return UserError(f"{path} is damaged ({reason}): remove {path.parent} and prepare it again")


def summary(manifest):
    """One line: what a prepared corpus holds, and how fast it was prepared."""
    form = format_of(manifest)
    clauses = [form.describe(split, totals) + describe_left_out(totals)
               for split, totals in manifest["splits"].items()
               if totals["documents"] or totals.get("dropped")]
    text = f"{', '.join(clauses)}; tokenizer {manifest['tokenizer']}"
    if "mb_per_s" in manifest:
        text += f", {manifest['mb_per_s']:.1f} MB/s"
    return text


def fingerprint(folder):
    """A short checksum of a prepared corpus: equal for equal tokens in equal order."""
    manifest = read_manifest(folder)
    facts = {key: manifest[key] for key in ("tokenizer", "vocab_size", "dtype")}
    shards = {split: totals["shards"] for split, totals in manifest["splits"].items()}
    text = json.dumps([format_of(manifest).name, facts, shards], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def open_split(folder, split, verify=True):
    """One split of a prepared folder, as Samples or as Tokens."""
    reader = {"text": Tokens, "samples": Samples}[format_of(read_manifest(folder)).name]
    return reader(folder, split, verify)


class Tokens:
    """One split as one long, memory-mapped sequence of token ids."""
    kind = "text"
    id_bits = 0xffffffff  # of a word

    def __init__(self, folder, split, verify=True):
        """verify: compare every shard with its checksum (a few GB/s); sizes are always compared."""
        self.folder, self.split, self.manifest = Path(folder), split, read_manifest(folder)
        self.vocab_size, self.tokenizer = self.manifest["vocab_size"], self.manifest["tokenizer"]
        self.totals = self.manifest["splits"][split]
        held = format_of(self.manifest).name
        if held != self.kind:
            raise UserError(f"{folder} holds {held}, {self.kind} is needed: `python data.py text` "
                            "prepares text, `python data.py sft` samples")
        if not self.totals["shards"]:
            advice = ": prepare it again with --val FILES" if split == "val" else ""
            raise UserError(f"{folder} has no {split} documents{advice}")
        self.shards = self._map_shards(np.dtype(self.manifest["dtype"]))
        self.shard_starts = np.cumsum([0] + [len(shard) for shard in self.shards])
        if verify:
            self._verify()

    def _map_shards(self, dtype):
        """One read-only memory map per shard, of the size that the manifest states."""
        for shard in self.totals["shards"]:
            path, expected = self.folder / shard["file"], shard["tokens"] * dtype.itemsize
            held = path.stat().st_size if path.exists() else "none"
            if held != expected:
                raise UserError(f"{path} should hold {expected} bytes and holds {held}: "
                                f"{self._advice()}")
        return [np.memmap(self.folder / shard["file"], dtype, mode="r")
                for shard in self.totals["shards"]]

    def _verify(self):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            checksums = list(pool.map(crc32, self.shards))
        for shard, checksum in zip(self.totals["shards"], checksums, strict=True):
            if checksum != shard["crc32"]:
                raise UserError(f"{self.folder / shard['file']} is corrupt (checksum {checksum}, "
                                f"expected {shard['crc32']}): {self._advice()}")

    def _advice(self):
        return f"remove {self.folder} and prepare it again"

    def must_suit(self, model, tok, where):
        """Raise UserError if a model cannot be used with these tokens.

        tok: the model's tokenizer, None if unknown. where: the path of the model, for the message.
        """
        if tok and tok.name != self.tokenizer:
            choice = where if tok.name.startswith("tokenizer.json:") else tok.name
            raise UserError(f"{where} has the tokenizer {tok.name}, {self.folder} was prepared "
                            f"with {self.tokenizer}: prepare it again with --tokenizer={choice}")
        if self.vocab_size > model.cfg.vocab_size:
            raise UserError(f"{self.folder} has a vocabulary of {self.vocab_size} tokens, {where} "
                            f"has {model.cfg.vocab_size}")

    def __len__(self):
        return int(self.shard_starts[-1])

    def read(self, position, count):
        """Token ids (count,) int64 from a position on. Raises UserError for an invalid id."""
        ids = self.words(position, count).astype(np.int64) & self.id_bits
        if ids.max() >= self.vocab_size:
            raise UserError(f"{self.folder}: token id {ids.max()} lies outside the vocabulary of "
                            f"{self.vocab_size}: {self._advice()}")
        return ids

    def words(self, position, count):
        """The words (count,) as they are stored, across shards."""
        shard = int(np.searchsorted(self.shard_starts, position, "right")) - 1
        parts = []
        while count > 0:
            offset = position - self.shard_starts[shard]
            part = self.shards[shard][offset:offset + count]
            parts.append(part)
            position, count, shard = position + len(part), count - len(part), shard + 1
        return np.concatenate(parts)


def crc32(shard, block=2 ** 26):
    """The checksum of a memory map, read block by block."""
    checksum = 0
    for position in range(0, len(shard), block):
        checksum = zlib.crc32(shard[position:position + block], checksum)
    return checksum


class Samples(Tokens):
    """One split of samples, with arrays of one number per sample:

    sample_starts (and the end of the last one), lengths in tokens, learned tokens.
    """
    kind = "samples"
    id_bits = FIRST - 1

    def __init__(self, folder, split, verify=True):
        super().__init__(folder, split, verify)
        self.format = self.manifest["format"]
        sample_starts, learned_counts = [], []
        for shard, shard_start in zip(self.shards, self.shard_starts[:-1], strict=True):
            offsets = np.flatnonzero(shard & FIRST)
            if not len(offsets) or offsets[0]:
                raise UserError(f"{self.folder}: a shard of {split} does not start with a sample: "
                                f"{self._advice()}")
            learned = shard >= LEARNED
            learned[offsets] = False  # nothing predicts a first token
            learned_counts.append(np.add.reduceat(learned, offsets, dtype=np.int64))
            sample_starts.append(offsets + shard_start)
        self.sample_starts = np.concatenate([*sample_starts, [len(self)]])
        self.learned = np.concatenate(learned_counts)
        self.lengths = np.diff(self.sample_starts)

    def sample(self, i):
        """(ids int64, which of them are learned) of sample i."""
        position, count = int(self.sample_starts[i]), int(self.lengths[i])
        return self.read(position, count), self.words(position, count) >= LEARNED

    def rows(self, which, length, count=0):
        """(inputs, targets) of some samples, each (max(samples, count), length) int64.

        Targets are -100 where they are not learned, in the padding, and in rows without a sample.
        """
        inputs = np.zeros((max(count, len(which)), length), dtype=np.int64)
        targets = np.full_like(inputs, -100)
        for row, i in enumerate(which):
            ids, learned = self.sample(i)
            inputs[row, :len(ids) - 1] = ids[:-1]
            targets[row, :len(ids) - 1] = np.where(learned, ids, -100)[1:]
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def padded(self, longest, seq_len):
        """The length of rows whose longest sample has so many tokens, for numbers and arrays.

        Inputs lack a sample's last token, so this is longest - 1, rounded up, and at most seq_len.
        """
        return np.minimum(-(-(longest - 1) // ALIGNED) * ALIGNED, seq_len)

    def must_fit(self, seq_len):
        """Raise UserError if a sample is longer than seq_len."""
        longest = self.lengths.max()
        if longest > seq_len:
            raise UserError(
                f"{self.folder} has a {self.split} sample of {longest} tokens, seq_len is "
                f"{seq_len}: take --seq_len={longest}, or prepare it again with "
                f"--seq_len={seq_len}, which drops longer samples (--long=truncate cuts them)")
