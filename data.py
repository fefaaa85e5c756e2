"""Any corpus -> token shards (batches.py reads them).

    python data.py stdlib                                        the running Python's own sources, bytes as tokens
    python data.py c4 --train_tokens=5.3e9 --val_tokens=1e7      allenai/c4 "en", streamed, GPT-2 tokens
    python data.py text NAME FILES... [--val FILES...]           .json.gz .json .jsonl .txt .parquet, GPT-2 tokens
    python data.py sft NAME FILES... [--val FILES...]            prompts and responses: see sft.py, for these three as well
    python data.py tulu | metamath                               Tulu v2, MetaMathQA from the hub
    python data.py uuid --pairs=10000                            pairs of random UUIDs to learn by heart
    python data.py check NAME                                    read everything again: checksums and token ids

A corpus becomes the folder data/NAME: shards of raw uint16 or uint32 token ids, every document followed by end-of-text,
and manifest.json, written last: a folder with a manifest is whole. The same command goes on after a kill.
Without --val every 100th document is validation. A .txt file is one document.
"""
import argparse
import json
import os
import sys
import sysconfig
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

import tokenizer
from config import UserError, command_line, write_json

SHARD_TOKENS = 2 ** 26  # 128 MiB of uint16; also how much a kill can cost
CHUNK_DOCUMENTS = 256   # documents that one worker encodes at a time
BUILDERS = {".json.gz": "json", ".json": "json", ".jsonl": "json", ".jsonl.gz": "json", ".txt": "text", ".parquet": "parquet"}


def encode(tok, texts):
    """The documents' ids, each followed by end-of-text: (ids uint32, ends of the documents in ids, their sizes in bytes)."""
    parts = [tok.encode(text) for text in texts]
    ends = np.cumsum([len(part) + 1 for part in parts], dtype=np.int64)
    ids = np.full(ends[-1] if len(ends) else 0, tok.end, dtype=np.uint32)
    for part, end in zip(parts, ends):
        ids[end - 1 - len(part):end - 1] = part
    return ids, ends, np.array([len(text.encode("utf-8", "replace")) for text in texts], dtype=np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# corpora: generators of lists of texts, in an order that is always the same

def stdlib_texts():
    """The running Python's standard library without its tests, file by file in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = sorted(p for p in root.rglob("*.py") if not left_out & set(p.relative_to(root).parts))
    for path in files:
        yield [path.read_text(encoding="utf-8", errors="replace")]


def file_texts(files, key):
    """The documents of local files, through `datasets`, in order."""
    for path in files:
        builder = BUILDERS[kind(path)]
        options = {"data_files": [str(path)]} | ({"sample_by": "document"} if builder == "text" else {})
        yield from _stream(path, builder, "text" if builder == "text" else key, **options)


def kind(path):
    """.json.gz of a.b.json.gz, .txt of a.b.txt"""
    return "".join(path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:])


def c4_texts(split):
    """allenai/c4 "en", streamed from the hub."""
    yield from _stream("allenai/c4", "allenai/c4", "text", name="en", split=split, advice="check the network, or set HF_ENDPOINT to a "
                       "mirror; with the files at hand: python data.py text c4 c4-train.*.json.gz --val c4-validation.*.json.gz")


def _stream(where, dataset, column, **options):
    """Lists of texts of one streamed dataset; raises UserError for a wrong column or an unreadable source."""
    for table in tables(where, dataset, **options):
        if column not in table.column_names:
            raise UserError(f"{where} has no key {column!r}, its keys are {', '.join(table.column_names)}: choose one with --key")
        texts = table[column].to_pylist()
        wrong = next((text for text in texts if text is not None and not isinstance(text, str)), None)
        if wrong is not None:
            raise UserError(f"{where}: key {column!r} holds {type(wrong).__name__}, not text: choose another with --key")
        yield [text or "" for text in texts]


def tables(where, dataset, split="train", advice="is the file whole, and what its name says?", **options):
    """Arrow tables of some rows of one streamed dataset; raises UserError for an unreadable source."""
    from datasets import load_dataset  # slow to import, and only preparing needs it
    try:
        yield from load_dataset(dataset, split=split, streaming=True, **options).with_format("arrow").iter(CHUNK_DOCUMENTS)
    except Exception as error:  # bad JSON, a cut gzip, a lost connection: datasets and pyarrow raise many kinds
        reason = str(error).partition("\n")[0]
        raise UserError(f"{where} can not be read ({type(error).__name__}{': ' + reason if reason else ''}): {advice}")


def every_100th(texts, first):
    """Assign the documents first, first + 1, ... to the splits: every 100th is validation."""
    return {"train": [t for i, t in enumerate(texts, first) if i % 100 != 99],
            "val": [t for i, t in enumerate(texts, first) if i % 100 == 99]}


def all_to(split):
    return lambda texts, first: {split: texts}


# ---------------------------------------------------------------------------------------------------------------------
# writing shards

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


# ---------------------------------------------------------------------------------------------------------------------
# the command line

def prepare_stdlib(folder="data/stdlib"):
    version = ".".join(map(str, sys.version_info[:3]))
    return prepare(folder, tokenizer.load("bytes"), {"source": f"Python {version} standard library"}, [(stdlib_texts, every_100th)])


def of_files(train, val, read, command="text", builders=("json", "text", "parquet")):
    """(request's source, stages) of local files; read(files) yields lists of documents. Raises UserError for a wrong name."""
    for path in train + val:
        if not path.is_file():
            raise UserError(f"no file {path}")
        if BUILDERS.get(kind(path)) not in builders:
            raise UserError(f"{path}: files may end in {', '.join(ending for ending, builder in BUILDERS.items() if builder in builders)}")
    if not train and not val:
        raise UserError(f"name at least one file: python data.py {command} NAME FILES... [--val FILES...]")
    sizes = {split: [[path.name, path.stat().st_size] for path in paths] for split, paths in (("train", train), ("val", val))}
    stages = [(partial(read, train), all_to("train") if val else every_100th)] if train else []
    return sizes, stages + ([(partial(read, val), all_to("val"))] if val else [])


def prepare_files(name, train, val, key, tokenizer_name):
    sizes, stages = of_files(train, val, partial(file_texts, key=key))
    return prepare(f"data/{name}", tokenizer.load(tokenizer_name), {"source": sizes, "key": key}, stages)


def prepare_c4(train_tokens, val_tokens, tokenizer_name):
    request = {"source": "allenai/c4 en", "train_tokens": train_tokens, "val_tokens": val_tokens}
    stages = [(partial(c4_texts, "validation"), all_to("val")), (partial(c4_texts, "train"), all_to("train"))]
    return prepare("data/c4", tokenizer.load(tokenizer_name), request, stages, {"train": train_tokens, "val": val_tokens})


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("stdlib")
    c4, text, rows, tulu, metamath, uuid, check = map(commands.add_parser, ("c4", "text", "sft", "tulu", "metamath", "uuid", "check"))
    count = lambda word: int(float(word))
    c4.add_argument("--train_tokens", type=count, default=5_300_000_000, help="10k steps x 1024 x 512, the default, and a little")
    c4.add_argument("--val_tokens", type=count, default=10_000_000)
    for command in (text, rows):
        command.add_argument("name")
        command.add_argument("files", nargs="*", type=Path)
        command.add_argument("--val", nargs="+", type=Path, default=[])
    text.add_argument("--key", default="text", help="of the text in .json and .parquet")
    for command in (rows, tulu, metamath):
        command.add_argument("--seq_len", type=count, default=0, help="longest sample in tokens; default: no limit")
        command.add_argument("--long", default="drop", choices=("drop", "truncate"), help="what happens to longer ones")
    uuid.add_argument("--pairs", type=count, default=10_000)
    uuid.add_argument("--seed", type=int, default=0)
    for command in (c4, text, rows, tulu, metamath, uuid):
        command.add_argument("--tokenizer", default="gpt2", help="tiktoken's name, bytes, or a folder with a tokenizer.json")
    check.add_argument("name")
    args = parser.parse_args(argv)
    if args.command == "stdlib":
        prepare_stdlib()
    elif args.command == "c4":
        prepare_c4(args.train_tokens, args.val_tokens, args.tokenizer)
    elif args.command == "text":
        prepare_files(args.name, args.files, args.val, args.key, args.tokenizer)
    elif args.command in ("sft", "tulu", "metamath", "uuid"):
        import sft
        sft.command(args)
    else:
        from samples import open_split
        manifest = read_manifest(f"data/{args.name}")
        for split in [split for split, totals in manifest["splits"].items() if totals["tokens"]]:
            tokens = open_split(f"data/{args.name}", split)
            for start in range(0, len(tokens), SHARD_TOKENS):
                tokens.read(start, min(SHARD_TOKENS, len(tokens) - start))
        print(f"data/{args.name} is whole: {summary(manifest)}")


if __name__ == "__main__":
    command_line(main)
