"""The format of prepared data: shards of token ids and a manifest. Writing, resumable; reading, memory-mapped.

A corpus is a folder: shards of raw uint16 or uint32 ids, and manifest.json, written last: a folder with a manifest is whole.
A text's document is followed by end-of-text. A sample's token is 32 bits: its id and two flags.
"""
import json
import os
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from config import UserError, write_json

SHARD_TOKENS = 2 ** 26  # 128 MiB of uint16; also how much a kill can cost
LEARNED, FIRST = 1 << 31, 1 << 30  # flags: the token is learned; it is the first one of its sample
ALIGNED = 8   # rows are padded to a multiple of it


def encode(tok, texts):
    """The documents' ids, each followed by end-of-text: (ids uint32, ends of the documents in ids, their sizes in bytes)."""
    parts = [tok.encode(text) for text in texts]
    ends = np.cumsum([len(part) + 1 for part in parts], dtype=np.int64)
    ids = np.full(ends[-1] if len(ends) else 0, tok.end, dtype=np.uint32)
    for part, end in zip(parts, ends):
        ids[end - 1 - len(part):end - 1] = part
    return ids, ends, np.array([len(text.encode("utf-8", "replace")) for text in texts], dtype=np.int64)


class SplitWriter:
    """Appends ids to the shards of one split. A shard has another name until it is whole."""

    def __init__(self, folder, split, dtype, totals, limit=0):
        self.folder, self.split, self.dtype, self.limit = folder, split, dtype, limit
        self.totals = totals  # {"tokens", "documents", "bytes", "shards": [{"file", "tokens", "crc32"}]} of the whole shards
        self.open, self.pending = None, {key: 0 for key in totals if key != "shards"}

    @property
    def full(self):
        return self.limit and self.totals["tokens"] + self.pending["tokens"] >= self.limit

    def add(self, ids, ends, sizes, **counts):
        """Documents up to the one that reaches the limit; counts: more numbers of the totals."""
        if self.limit:
            room = self.limit - self.totals["tokens"] - self.pending["tokens"]
            count = min(int(np.searchsorted(ends, room)) + 1, len(ends)) if room > 0 else 0
            ids, ends, sizes = ids[:ends[count - 1] if count else 0], ends[:count], sizes[:count]
        counts |= {"tokens": len(ids), "documents": len(ends), "bytes": int(sizes.sum())}
        for key, more in counts.items():
            self.pending[key] = max(self.pending[key], more) if key == "longest" else self.pending[key] + more
        if not len(ids):
            return
        if self.open is None:
            self.open, self.crc = open(self.folder / f"{self.split}.tmp", "wb"), 0
        block = ids.astype(self.dtype).tobytes()
        self.open.write(block)
        self.crc = zlib.crc32(block, self.crc)

    def close_shard(self):
        if self.open is not None:
            self.open.close()
            name = f"{self.split}_{len(self.totals['shards']):05d}.bin"
            os.replace(self.folder / f"{self.split}.tmp", self.folder / name)
            self.totals["shards"].append({"file": name, "tokens": self.pending["tokens"], "crc32": self.crc})
            self.open = None
        for key, more in self.pending.items():
            self.totals[key] = max(self.totals[key], more) if key == "longest" else self.totals[key] + more
            self.pending[key] = 0


def prepare(folder, tok, request, stages, limits=None, encode=encode, facts=None):
    """Write a corpus as shards and a manifest, or go on where the same request was killed; returns the manifest.

    tok: see tokenizer.load. request: a JSON-able dict that names the corpus: equal requests give equal shards.
    stages: [(texts, assign)], where texts() yields lists of documents and assign(list, index of its first) -> {split: documents}.
    limits: {split: tokens}, 0 for all. For samples (sft.py): how a list of rows is encoded, and what the manifest says besides.
    """
    folder, limits, request = Path(folder), limits or {}, request | {"tokenizer": tok.name}
    if (folder / "manifest.json").exists():
        manifest = read_manifest(folder)
        if manifest["request"] != request:
            raise UserError(f"{folder} holds another corpus ({manifest['request']}): remove it or choose another NAME")
        print(f"{folder} is prepared already: {summary(manifest)}")
        return manifest
    folder.mkdir(parents=True, exist_ok=True)
    tok.keep(folder)
    for stray in folder.glob("*.tmp"):
        stray.unlink()

    dtype = "uint16" if tok.size <= 2 ** 16 and not facts else "uint32"
    counted = ("tokens", "documents", "bytes") + (("learned", "longest", "dropped", "truncated", "refused") if facts else ())
    fresh = {"request": request, "stage": 0, "documents": 0, "seconds": 0.0, "splits": {
        split: {**dict.fromkeys(counted, 0), "shards": []} for split in ("train", "val")}}
    progress_file = folder / "progress.json"
    progress = json.loads(progress_file.read_text()) if progress_file.exists() else fresh
    if progress["request"] != request:
        progress = fresh
    writers = {split: SplitWriter(folder, split, dtype, totals, limits.get(split, 0)) for split, totals in progress["splits"].items()}

    started, spent = time.time(), progress["seconds"]
    bar = progress_bar(initial=sum(totals["bytes"] for totals in progress["splits"].values()))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for stage in range(progress["stage"], len(stages)):
            texts, assign = stages[stage]
            skip = progress["documents"] if stage == progress["stage"] else 0
            jobs = ((first + len(chunk), pool.submit(_encode_chunk, encode, tok, assign, chunk, first))
                    for first, chunk in _skipping(texts(), skip))
            for documents, parts in _in_order(jobs, ahead=4 * os.cpu_count()):
                for split, part in parts.items():
                    ids, ends, sizes, *counts = part
                    writers[split].add(ids, ends, sizes, **(counts[0] if counts else {}))
                    bar.update(int(part[2].sum()))
                if any(writer.pending["tokens"] >= SHARD_TOKENS for writer in writers.values()):
                    for writer in writers.values():
                        writer.close_shard()
                    progress.update(stage=stage, documents=documents, seconds=spent + time.time() - started)
                    write_json(progress_file, progress)
                if all(writers[split].full for split in parts):
                    break
    bar.close()
    for writer in writers.values():
        writer.close_shard()
    if not any(totals["tokens"] for totals in progress["splits"].values()):
        refused = sum(totals.get("refused", 0) for totals in progress["splits"].values())
        raise UserError(f"the corpus is empty: {request['source']} gave no {'sample' if facts else 'text'}" +
                        (f" of at most {request['seq_len']} tokens" if request.get("seq_len") else "") +
                        (f"; the chat template refused {refused:,} chats" if refused else ""))
    seconds = spent + time.time() - started
    size = sum(totals["bytes"] for totals in progress["splits"].values())
    manifest = {**(facts or {}), "request": request, "tokenizer": tok.name, "vocab_size": tok.size, "dtype": dtype,
                "splits": progress["splits"], "seconds": round(seconds, 3), "mb_per_s": round(size / 1e6 / seconds, 3)}
    write_json(folder / "manifest.json", manifest)
    progress_file.unlink(missing_ok=True)
    print(f"{folder}: {summary(manifest)}")
    return manifest


def _encode_chunk(encode, tok, assign, texts, first):
    return {split: encode(tok, [t for t in part if t]) for split, part in assign(texts, first).items()}


def _skipping(chunks, skip):
    """(index of the first document, documents) of each chunk, without the first `skip` documents."""
    first = 0
    for chunk in chunks:
        keep = chunk[max(0, skip - first):]
        if keep:
            yield first + len(chunk) - len(keep), keep
        first += len(chunk)


def _in_order(jobs, ahead):
    """The results of (tag, future) pairs in order, with at most `ahead` of them under way: memory stays bounded."""
    waiting = deque()
    for tag, job in jobs:
        waiting.append((tag, job))
        if len(waiting) >= ahead:
            tag, job = waiting.popleft()
            yield tag, job.result()
    while waiting:
        tag, job = waiting.popleft()
        yield tag, job.result()


def progress_bar(**options):
    from tqdm import tqdm
    return tqdm(unit="B", unit_scale=True, mininterval=0.5, desc="tokenizing", disable=None, **options)


def read_manifest(folder):
    """The manifest of a prepared corpus; raises UserError that names the command to run."""
    folder = Path(folder)
    try:
        return json.loads((folder / "manifest.json").read_text())
    except FileNotFoundError:
        ready = folder.name in ("c4", "stdlib", "tulu", "metamath", "uuid")
        command = f"python data.py {folder.name if ready else f'text {folder.name} FILES...'}"
        raise UserError(f"no token shards in {folder}: prepare them with `{command}`")
    except ValueError as error:
        raise UserError(f"{folder / 'manifest.json'} is not JSON ({error}): remove the folder and prepare it again")


def summary(manifest):
    if "kind" in manifest:
        parts = [f"{split} {t['documents']:,} samples of {t['tokens']:,} tokens, {t['learned'] / max(1, t['tokens']):.0%} of them learned, the "
                 f"longest sample {t['longest']:,}; {t['dropped']:,} dropped" +
                 f" ({t['refused']:,} of them refused by the chat template)" * bool(t.get("refused")) + f", {t['truncated']:,} truncated"
                 for split, t in manifest["splits"].items() if t["documents"] or t["dropped"]]
    else:
        parts = [f"{split} {t['tokens']:,} tokens of {t['documents']:,} documents ({t['bytes'] / 1e6:.1f} MB)"
                 for split, t in manifest["splits"].items() if t["tokens"]]
    return f"{', '.join(parts)}; tokenizer {manifest['tokenizer']}, {manifest['mb_per_s']:.1f} MB/s"


def open_split(folder, split, verify=True):
    """One split of a prepared folder, as Samples or as Tokens."""
    return (Samples if read_manifest(folder).get("kind") == "samples" else Tokens)(folder, split, verify)


class Tokens:
    """One split as one long, memory-mapped sequence of token ids."""
    kind, id_bits = "text", 0xffffffff

    def __init__(self, folder, split, verify=True):
        """verify: compare every shard with its checksum (a few GB/s); sizes are always compared."""
        self.folder, self.split, manifest = Path(folder), split, read_manifest(folder)
        self.totals, self.vocab_size, self.tokenizer = manifest["splits"][split], manifest["vocab_size"], manifest["tokenizer"]
        shards, dtype = self.totals["shards"], np.dtype(manifest["dtype"])
        self.manifest, found = manifest, manifest.get("kind", "text")
        if found != self.kind:
            raise UserError(f"{folder} holds {found}, {self.kind} is needed: `python data.py text` prepares text, `python data.py sft` samples")
        if not shards:
            raise UserError(f"{folder} has no {split} documents" + (": prepare it again with --val FILES" if split == "val" else ""))
        for shard in shards:
            path = self.folder / shard["file"]
            expected, found = shard["tokens"] * dtype.itemsize, path.stat().st_size if path.exists() else "none"
            if found != expected:
                raise UserError(f"{path} should hold {expected} bytes and holds {found}: {self._advice()}")
        self.shards = [np.memmap(self.folder / shard["file"], dtype, mode="r") for shard in shards]
        self.starts = np.cumsum([0] + [len(shard) for shard in self.shards])
        if verify:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for shard, crc in zip(shards, pool.map(_crc32, self.shards)):
                    if crc != shard["crc32"]:
                        raise UserError(f"{self.folder / shard['file']} is corrupt (checksum {crc}, expected {shard['crc32']}): "
                                        f"{self._advice()}")

    def must_suit(self, model, tok, where):
        """Raise UserError if a model, or the tokenizer it speaks (None: unknown), can not be used with these tokens."""
        if tok and tok.name != self.tokenizer:
            raise UserError(f"{where} speaks {tok.name}, {self.folder} is written in {self.tokenizer}: prepare the text again, "
                            f"with --tokenizer={where if tok.name.startswith('tokenizer.json:') else tok.name}")
        if self.vocab_size > model.cfg.vocab_size:
            raise UserError(f"{self.folder} has a vocabulary of {self.vocab_size}, {where} knows {model.cfg.vocab_size} tokens")

    def _advice(self):
        return f"remove {self.folder} and prepare it again"

    def __len__(self):
        return int(self.starts[-1])

    def read(self, start, count):
        """Ids start ... start + count - 1 as int64, across shards."""
        ids = self.words(start, count).astype(np.int64) & self.id_bits
        if ids.max() >= self.vocab_size:
            raise UserError(f"{self.folder}: token id {ids.max()} lies outside the vocabulary of {self.vocab_size}: {self._advice()}")
        return ids

    def words(self, start, count):
        """The same as they are stored."""
        parts, shard = [], int(np.searchsorted(self.starts, start, "right")) - 1
        while count > 0:
            offset = start - self.starts[shard]
            part = self.shards[shard][offset:offset + count]
            parts.append(part)
            start, count, shard = start + len(part), count - len(part), shard + 1
        return np.concatenate(parts)


def _crc32(shard, block=2 ** 26):
    crc = 0
    for start in range(0, len(shard), block):
        crc = zlib.crc32(shard[start:start + block], crc)
    return crc


class Samples(Tokens):
    """One split of samples: their first tokens, lengths, and how many of their tokens are learned."""
    kind, id_bits = "samples", FIRST - 1

    def __init__(self, folder, split, verify=True):
        super().__init__(folder, split, verify)
        self.format, first, self.learned = self.manifest["format"], [], []
        for shard, start in zip(self.shards, self.starts):
            at = np.flatnonzero(shard & FIRST)
            if not len(at) or at[0]:
                raise UserError(f"{self.folder}: a shard of {split} does not start with a sample: {self._advice()}")
            learned = shard >= LEARNED
            learned[at] = False  # nothing predicts a first token
            self.learned.append(np.add.reduceat(learned, at, dtype=np.int64))
            first.append(at + start)
        self.first = np.concatenate([*first, [len(self)]])
        self.learned, self.lengths = np.concatenate(self.learned), np.diff(self.first)

    def sample(self, i):
        """(ids, which of them are learned) of sample i."""
        start, count = int(self.first[i]), int(self.lengths[i])
        return self.read(start, count), self.words(start, count) >= LEARNED

    def rows(self, which, length, count=0):
        """(inputs, targets), each (samples or count, length) int64, of some samples: targets that are not learned are -100."""
        inputs = np.zeros((max(count, len(which)), length), dtype=np.int64)
        targets = np.full_like(inputs, -100)
        for row, i in enumerate(which):
            ids, learned = self.sample(i)
            inputs[row, :len(ids) - 1] = ids[:-1]
            targets[row, :len(ids) - 1] = np.where(learned, ids, -100)[1:]
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def padded(self, longest, seq_len):
        """The length that rows get whose longest sample is this; inputs lack a sample's last token."""
        return np.minimum(-(-(longest - 1) // ALIGNED) * ALIGNED, seq_len)

    def must_fit(self, seq_len):
        if self.lengths.max() > seq_len:
            raise UserError(f"{self.folder} has a {self.split} sample of {self.lengths.max()} tokens, seq_len is {seq_len}: take --seq_len="
                            f"{self.lengths.max()}, or prepare it again with --seq_len={seq_len}, which drops longer ones (--long=truncate: cuts)")
