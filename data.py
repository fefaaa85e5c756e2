"""Any corpus -> token shards, which batches.py reads.

    python data.py stdlib                              the running Python's own sources, as bytes
    python data.py c4                                  allenai/c4 "en", streamed; about 5.3e9 tokens
    python data.py text NAME FILES... [--val FILES...]     text of .jsonl, .json, .parquet, .txt
    python data.py sft NAME FILES... [--val FILES...]      prompts and responses: see sft.py
    python data.py tulu                                Tulu v2 from the hub
    python data.py metamath                            MetaMathQA from the hub
    python data.py uuid --pairs=10000                  pairs of random UUIDs, to learn by heart
    python data.py check NAME                          read everything again: checksums, token ids

A corpus becomes the folder data/NAME (see shards.py). The same command continues after a kill.
Without --val every 100th document is validation. A .txt file is one document. .json and .jsonl
hold one object per line, or one array of objects, and may be compressed with gzip. A value that is
not text stops the preparation with the file and row; --skip_bad=5 leaves out up to 5 % of the rows.
Rows without the key are left out; more than 1 % of them stop the preparation too.
"""
import argparse
import codecs
import gzip
import hashlib
import json
import sys
import sysconfig
import zlib
from functools import partial
from pathlib import Path

from config import Arguments, UserError, at_least, command_line  # first, for Ctrl-C; isort: skip

import sft
import tokenizer
from shards import (
    ALLOWED,
    SHARD_TOKENS,
    LeftOut,
    open_split,
    prepare,
    read_manifest,
    summary,
)

CHUNK_DOCUMENTS = 256     # documents that one worker encodes at a time
ARRAY_BYTES = 2 ** 30     # largest .json file that is one array, uncompressed: it is read at once
CHECKSUM_BYTES = 2 ** 20  # of a file's beginning and end
JSON_ENDINGS = (".json", ".json.gz", ".jsonl", ".jsonl.gz")
HUB_ADVICE = "check the network, or set HF_ENDPOINT to a mirror; with the files at hand: "


# --------------------------------------------------------------------------------------------------
# rows of a source: (number from 1, a dict, or LeftOut if it cannot be read), as they are written

def rows_of(path):
    """The rows of a local file; in JSON lines the number is the line's. Raises UserError."""
    count = 0
    read = json_rows if ending(path) in JSON_ENDINGS else parquet_rows
    for number, row in read(path):
        count += 1
        yield number, row
    if not count:
        raise UserError(f"{path} is empty: it holds no row")


def ending(path):
    """.json.gz of a.b.json.gz, .txt of a.b.txt"""
    return "".join(path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:])


def json_rows(path):
    """The rows of JSON lines, or of one JSON array. Python's own parser: no value changes another.

    Blank lines hold no row.
    """
    number = 0
    try:
        with open_binary(path) as file:
            if file.peek(1).lstrip(codecs.BOM_UTF8 + b" \t\r\n").startswith(b"["):
                yield from array_rows(path, file)
                return
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    yield number, parsed(line)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}, row {number + 1} cannot be read ({first_line(error)}): is the "
                        "file complete?") from None


def open_binary(path):
    """A buffered file, decompressed if its name ends in .gz."""
    return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")


def parsed(line):
    """The dict of a line of JSON, or LeftOut."""
    try:
        row = json.loads(line.removeprefix(codecs.BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        return LeftOut("bad", f"the line is not UTF-8 (byte {error.start + 1}: {error.reason})")
    except RecursionError:
        return LeftOut("bad", "the line is nested too deeply")
    except ValueError as error:
        return LeftOut("bad", f"the line is not JSON ({error})")
    return row if isinstance(row, dict) else no_object(row)


def no_object(row):
    return LeftOut("bad", f"the row is {sft.excerpt(row)}, not an object of keys and values")


def array_rows(path, file):
    """The rows of a file that is one JSON array."""
    content = file.read(ARRAY_BYTES + 1)
    if len(content) > ARRAY_BYTES:
        raise UserError(f"{path} is one JSON array of more than {ARRAY_BYTES:,} bytes: convert it "
                        "to JSON lines, one object per line")
    try:
        rows = json.loads(content.removeprefix(codecs.BOM_UTF8).decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON array ({error})") from None
    for number, row in enumerate(rows, 1):
        yield number, row if isinstance(row, dict) else no_object(row)


def parquet_rows(path):
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile
    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(CHUNK_DOCUMENTS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}, row {number + 1} cannot be read ({first_line(error)}): is the "
                        "file complete?") from None


def hub_rows(name, advice, split="train", columns=None, **options):
    """The rows of a dataset on the hub, streamed."""
    from datasets import load_dataset  # slow to import, and only preparing needs it
    number = 0
    try:
        stream = load_dataset(name, split=split, streaming=True, **options)
        if columns:
            stream = stream.select_columns(columns)
        for table in stream.with_format("arrow").iter(CHUNK_DOCUMENTS):
            for row in table.to_pylist():
                number += 1
                yield number, row
    except Exception as error:  # datasets and pyarrow raise many types
        raise UserError(f"{name} cannot be read ({first_line(error)}): {advice}") from None


def first_line(error):
    """The type of an exception and the first line of its message."""
    message = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


# --------------------------------------------------------------------------------------------------
# documents: generators of lists of them, in an order that is always the same

def stdlib_texts():
    """The files of the running Python's standard library without its tests, in order of name."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        if not left_out & set(path.relative_to(root).parts):
            yield [path.read_text(encoding="utf-8", errors="replace")]


def file_texts(files, key, skip_bad):
    """The documents of local files. A .txt file is one."""
    for path in files:
        if ending(path) == ".txt":
            yield [whole_text(path)]
        else:
            yield from documents(path, rows_of(path), partial(text_of, key=key), skip_bad)


def file_samples(files, format_name, skip_bad):
    """The rows of local files."""
    for path in files:
        make = partial(sft.usable, format_name=format_name)
        yield from documents(path, rows_of(path), make, skip_bad)


def documents(where, rows, make, skip_bad):
    """Lists of make(row). Raises UserError for a bad row, or keeps its LeftOut if skip_bad."""
    chunk = []
    for number, row in rows:
        document = row if isinstance(row, LeftOut) else make(row)
        if isinstance(document, LeftOut):
            message = f"{where}, row {number}: {document.message}"
            if document.reason == "bad" and not skip_bad:
                raise UserError(f"{message} (--skip_bad=PERCENT leaves such rows out)")
            document = LeftOut(document.reason, message)
        chunk.append(document)
        if len(chunk) == CHUNK_DOCUMENTS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def text_of(row, key):
    """The text of a row, or LeftOut."""
    text = row.get(key)
    if isinstance(text, str):
        return text
    if key not in row:
        keys = ", ".join(row)
        return LeftOut("missing", f"no key {key!r}, its keys are {keys}: choose one with --key")
    if text is None:
        return LeftOut("missing", f"key {key!r} holds null")
    return LeftOut("bad", f"key {key!r} holds {sft.excerpt(text)}, not text")


def whole_text(path):
    content = path.read_bytes()
    if not content:
        raise UserError(f"{path} is empty")
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start + 1}: {error.reason})") from None


# --------------------------------------------------------------------------------------------------
# which split a document belongs to

def every_100th(documents, first):
    """Documents number first, first + 1, ... to the splits: every 100th is validation."""
    splits = {"train": [], "val": []}
    for i, document in enumerate(documents, first):
        splits["val" if i % 100 == 99 else "train"].append(document)
    return splits


def all_to(split):
    """An assignment of all documents to one split."""
    return lambda documents, first: {split: documents}


def both_splits(documents, first):
    return {"train": documents, "val": documents}


# --------------------------------------------------------------------------------------------------
# commands

def prepare_stdlib(folder="data/stdlib"):
    """Prepare the standard library; returns the manifest."""
    version = ".".join(str(number) for number in sys.version_info[:3])
    request = {"source": f"Python {version} standard library"}
    return prepare(folder, tokenizer.load("bytes"), request, [(stdlib_texts, every_100th)])


def prepare_c4(args):
    limits = {"train": args.train_tokens, "val": args.val_tokens}
    request = {"source": "allenai/c4 en", "train_tokens": args.train_tokens,
               "val_tokens": args.val_tokens}
    stages = [(partial(c4_texts, "validation"), all_to("val")),
              (partial(c4_texts, "train"), all_to("train"))]
    return prepare("data/c4", tokenizer.load(args.tokenizer), request, stages, limits)


def c4_texts(split):
    """allenai/c4 "en", streamed from the hub."""
    advice = HUB_ADVICE + "python data.py text c4 c4-train.*.json.gz --val c4-validation.*.json.gz"
    rows = hub_rows("allenai/c4", advice, split, columns=["text"], name="en")
    yield from documents("allenai/c4", rows, partial(text_of, key="text"), skip_bad=False)


def prepare_text(args):
    check_files(args, (*JSON_ENDINGS, ".txt", ".parquet"))
    request = {"source": names_and_sizes(args), "key": args.key, "content": checksums(args)}
    read = partial(file_texts, key=args.key, skip_bad=args.skip_bad is not None)
    return prepare(f"data/{args.name}", tokenizer.load(args.tokenizer), request,
                   file_stages(args, read), allowed=allowed_share(args))


def prepare_sft(args):
    check_files(args, (*JSON_ENDINGS, ".parquet"))
    first_file = (args.files + args.val)[0]
    skip_bad = args.skip_bad is not None
    first_rows = next(documents(first_file, rows_of(first_file), lambda row: row, skip_bad))
    format_name = sft.row_format([row for row in first_rows if isinstance(row, dict)], first_file)
    read = partial(file_samples, format_name=format_name, skip_bad=skip_bad)
    request = {"source": names_and_sizes(args), "content": checksums(args)}
    return sft.prepare(f"data/{args.name}", args.tokenizer, request, file_stages(args, read),
                       format_name, args.seq_len, args.long, allowed_share(args))


def prepare_hub(args):
    name, format_name = sft.HUB[args.command]
    stages = [(partial(hub_samples, name, format_name, args.skip_bad is not None), every_100th)]
    return sft.prepare(f"data/{args.command}", args.tokenizer, {"source": name}, stages,
                       format_name, args.seq_len, args.long, allowed_share(args))


def hub_samples(name, format_name, skip_bad):
    """The rows of a dataset on the hub."""
    rows = hub_rows(name, HUB_ADVICE + "python data.py sft NAME FILES...")
    yield from documents(name, rows, partial(sft.usable, format_name=format_name), skip_bad)


def allowed_share(args):
    """The share of unusable rows that does not stop the preparation."""
    return ALLOWED if args.skip_bad is None else args.skip_bad / 100


def prepare_uuid(args):
    """Both splits hold all pairs: a run is scored on the pairs that it learned by heart."""
    request = {"source": "uuid", "format": "uuid", "pairs": args.pairs, "seed": args.seed}
    stages = [(partial(sft.uuid_pairs, args.pairs, args.seed), both_splits)]
    return sft.prepare("data/uuid", args.tokenizer, request, stages, "prompt")


def check(args):
    """Read every shard of a prepared folder: checksums and token ids."""
    folder = f"data/{args.name}"
    manifest = read_manifest(folder)
    for split, totals in manifest["splits"].items():
        if totals["tokens"]:
            tokens = open_split(folder, split)
            for position in range(0, len(tokens), SHARD_TOKENS):
                tokens.read(position, min(SHARD_TOKENS, len(tokens) - position))
    print(f"{folder} is complete: {summary(manifest)}")


def check_files(args, endings):
    """Raise UserError for a file that does not exist or has another ending, and for no file."""
    for path in args.files + args.val:
        if not path.is_file():
            raise UserError(f"no file {path}")
        if ending(path) not in endings:
            raise UserError(f"{path}: files may end in {', '.join(endings)}")
    if not args.files and not args.val:
        raise UserError("name at least one file: "
                        f"python data.py {args.command} NAME FILES... [--val FILES...]")


def names_and_sizes(args):
    """{split: [[name, bytes] of each file]}, the "source" of a request."""
    return {split: [[path.name, path.stat().st_size] for path in files]
            for split, files in (("train", args.files), ("val", args.val))}


def checksums(args):
    """{split: [checksum of each file]}, the "content" of a request."""
    return {split: [checksum(path) for path in files]
            for split, files in (("train", args.files), ("val", args.val))}


def checksum(path):
    """A short checksum of a file's size, first and last megabyte: reads little of a large file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        digest = hashlib.sha256(str(size).encode() + file.read(CHECKSUM_BYTES))
        file.seek(max(0, size - CHECKSUM_BYTES))
        digest.update(file.read(CHECKSUM_BYTES))
    return digest.hexdigest()[:16]


def file_stages(args, read):
    """The stages of local files; read(files) yields lists of documents."""
    stages = []
    if args.files:
        stages.append((partial(read, args.files), all_to("train") if args.val else every_100th))
    if args.val:
        stages.append((partial(read, args.val), all_to("val")))
    return stages


# --------------------------------------------------------------------------------------------------
# the command line

def parse_arguments(argv):
    parser = Arguments(prog="data.py", description=__doc__,
                       formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, function, *add_options):
        words = commands.add_parser(name)
        words.set_defaults(function=function)
        for add in add_options:
            add(words)

    command("stdlib", lambda args: prepare_stdlib())
    command("c4", prepare_c4, add_tokenizer, add_c4_options)
    command("text", prepare_text, add_tokenizer, add_files, add_key, add_skip_bad)
    command("sft", prepare_sft, add_tokenizer, add_files, add_sample_options, add_skip_bad)
    command("tulu", prepare_hub, add_tokenizer, add_sample_options, add_skip_bad)
    command("metamath", prepare_hub, add_tokenizer, add_sample_options, add_skip_bad)
    command("uuid", prepare_uuid, add_tokenizer, add_uuid_options)
    command("check", check, add_name)
    return parser.parse_args(argv)


def add_tokenizer(parser):
    parser.add_argument("--tokenizer", default="gpt2",
                        help="bytes, a name of tiktoken's (default gpt2), or a folder with a "
                             "tokenizer.json")


def folder_name(word):
    """An argparse type: the name of a folder inside data/."""
    if Path(word).name != word or word.startswith((".", "-")):
        raise argparse.ArgumentTypeError(f"must be a name inside data/, got {word!r}")
    return word


def add_name(parser):
    parser.add_argument("name", type=folder_name, help="of the folder, data/NAME")


def add_files(parser):
    add_name(parser)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--val", nargs="+", type=Path, default=[], help="files of validation")


def add_key(parser):
    parser.add_argument("--key", default="text", help="of the text in .json, .jsonl and .parquet")


def add_skip_bad(parser):
    parser.add_argument("--skip_bad", type=at_least(0, float, 100), metavar="PERCENT",
                        help="leave out rows that hold something else than text, or lack the key, "
                             "up to this percentage; default: the former stop the preparation, the "
                             "latter are left out up to 1 percent")


def add_c4_options(parser):
    parser.add_argument("--train_tokens", type=at_least(0, largest=10 ** 13), default=5_300_000_000,
                        help="default 5.3e9, slightly more than 10,000 steps x 1024 x 512; 0: all")
    parser.add_argument("--val_tokens", type=at_least(0, largest=10 ** 13), default=10_000_000,
                        help="default 1e7; 0: all")


def add_sample_options(parser):
    parser.add_argument("--seq_len", type=at_least(0), default=0,
                        help="length of the longest sample in tokens; default 0: no limit")
    parser.add_argument("--long", default="drop", choices=("drop", "truncate"),
                        help="drop or truncate samples of more than seq_len tokens; default: drop")


def add_uuid_options(parser):
    parser.add_argument("--pairs", type=at_least(1), default=10_000, help="default 10,000")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the random UUIDs")


def main(argv):
    args = parse_arguments(argv)
    args.function(args)


if __name__ == "__main__":
    command_line(main)
