"""Any corpus -> token shards, which batches.py reads.

    python data.py stdlib                              the running Python's own sources, as bytes
    python data.py c4                                  allenai/c4 "en", streamed; about 5.3e9 tokens
    python data.py text NAME FILES... [--val FILES...]     text of .jsonl, .json, .parquet, .txt
    python data.py sft NAME FILES... [--val FILES...]      prompts and responses: see sft.py
    python data.py tulu, or metamath                   Tulu v2, or MetaMathQA, from the hub
    python data.py uuid --pairs=10000                  pairs of random UUIDs, to learn by heart
    python data.py check NAME                          read everything again: checksums, token ids

A corpus becomes the folder data/NAME (see shards.py). The same command continues after a kill.
Without --val every 100th document is validation. A .txt file is one document. .json and .jsonl
hold one object per line, or one array of objects, and may be compressed with gzip. A value that is
not text stops the preparation with the file and row; --skip_bad=5 leaves out up to 5 % of the rows.
Rows without the key and chats without an answer are left out; more than 1 % of them stop it too.
"""
import codecs
import gzip
import json
import platform
import sysconfig
from functools import partial
from itertools import islice
from pathlib import Path

from config import Arguments, UserError, at_least, command_line, need, one_line  # isort: skip

import sft
import tokenizer
from checkpoint import file_record
from shards import CHUNK_DOCUMENTS, LeftOut, open_split, prepare, read_manifest, summary

CHECKED_ROWS = 10_000     # from this number on, the share of unusable rows is checked


# ---- rows of a source, as they are written: dicts, or LeftOut for a row that cannot be read

def json_rows(path):
    """The rows of JSON lines, or of one JSON array, which is read at once; None for a blank line.
    Python's own parser reads each row by itself, so that no row changes how another one is read."""
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        if not file.peek(1).lstrip(codecs.BOM_UTF8 + b" \t\r\n").startswith(b"["):
            yield from (None if line.isspace() else parsed(line) for line in file)
        else:
            yield from map(as_object, json.loads(file.read().decode("utf-8-sig")))


def parsed(line):
    try:
        return as_object(json.loads(line.decode("utf-8-sig")))
    except (ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        return LeftOut("bad", f"the line is not JSON in UTF-8 ({reason})")


def as_object(row):
    if isinstance(row, dict):
        return row
    return LeftOut("bad", f"the row is {row!r:.80}, not an object of keys and values")


def parquet_rows(path):
    from pyarrow.parquet import ParquetFile
    with ParquetFile(path) as file:
        for batch in file.iter_batches(CHUNK_DOCUMENTS):
            yield from batch.to_pylist()


def text_rows(path):
    """The text of a .txt file, with its line breaks: a document already; None for an empty file."""
    yield path.read_bytes().decode("utf-8-sig") or None


READERS = dict.fromkeys((".json", ".json.gz", ".jsonl", ".jsonl.gz"), json_rows) | {
    ".parquet": parquet_rows, ".txt": text_rows}


# ---- documents, in an order that is always the same

def stdlib_texts():
    """The files of the running Python's standard library without its tests, in order of name."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        if not left_out & set(path.relative_to(root).parts):
            yield path.read_text(encoding="utf-8", errors="replace")


def documents(sources, make, skip_bad=None):
    """Yield make(row), or LeftOut, of sources [(name, advice on errors, function to yield rows)].
    skip_bad: the percentage of rows that may be unusable; UserError if more are. None: 1 % may lack
    the key, and a row that holds something else than text raises UserError at once."""
    percent, count, unusable, first = (1 if skip_bad is None else skip_bad), 0, 0, ""

    def check_share():
        need(unusable <= count * percent / 100, f"{unusable:,} of {count:,} rows cannot be used, "
             f"more than {percent:g} %; the first is {first}; --skip_bad=PERCENT allows more")

    for where, advice, read in sources:
        for number, row in numbered(where, read(), advice):
            document = make(row) if isinstance(row, dict) else row
            count += 1
            if isinstance(document, LeftOut):
                message = f"{where}, row {number}: {document.message}"
                need(document.reason != "bad" or skip_bad is not None,
                     f"{message} (--skip_bad=PERCENT leaves such rows out)")
                first, unusable = first or message, unusable + 1
                if count >= CHECKED_ROWS:
                    check_share()
            yield document
    check_share()


def numbered(where, rows, advice):
    """Yield (number from 1, row), without blank lines; raises UserError if rows cannot be read."""
    number, has_rows = 0, False
    try:
        for number, row in enumerate(rows, 1):
            if row is not None:
                has_rows = True
                yield number, row
    except Exception as error:  # gzip, zlib, pyarrow and datasets raise many types
        raise UserError(f"{where}, row {number + 1} cannot be read ({type(error).__name__}: "
                        f"{one_line(error):.300}): {advice}") from None
    need(has_rows, f"{where} is empty: it holds no row")


def text_of(row, key="text"):
    """The text of a row, or LeftOut."""
    return sft.left_out(row, [key], ": choose one with --key") or row[key]


# ---- stages: (a function that yields documents, the splits that hold them; see shards.prepare)

def hub_stage(name, local, make, splits, skip_bad=None, config=None, split="train"):
    """The stage of a dataset on the hub, streamed. local: the arguments to read it from files."""
    def rows():
        from datasets import load_dataset  # slow to import, and only preparing needs it
        stream = load_dataset(name, config, split=split, streaming=True)
        for table in stream.with_format("arrow").iter(CHUNK_DOCUMENTS):
            yield from table.to_pylist()

    advice = f"check the network, set HF_ENDPOINT to a mirror, or use files: python data.py {local}"
    return partial(documents, [(name, advice, rows)], make, skip_bad), splits


def file_sources(paths):
    return [(path, "is the file complete?", partial(read, path)) for path in paths
            for ending, read in READERS.items() if path.name.endswith(ending)]


def check_files(args, *endings):
    """Raise UserError for a file with another ending or named twice, and for no file."""
    places = [str(path.resolve()) for path in args.files + args.val]
    for path in args.files + args.val:
        need(path.name.endswith(endings), f"{path}: files may end in {', '.join(endings)}")
        need(places.count(str(path.resolve())) == 1, f"{path} is named twice: name each file once")
    need(args.files or args.val, "name at least one file: "
         f"python data.py {args.command} NAME FILES... [--val FILES...]")


def file_stages(args, make):
    """(the part of the request that names the files, their stages); make(row) gives a document.
    The request is {"source": names and sizes, "crc32": checksums} of each split."""
    files = {"train": args.files, "val": args.val}
    splits = {"train": ["train"] if args.val else [], "val": ["val"]}
    request = {"source": {split: [[path.name, path.stat().st_size] for path in paths]
                          for split, paths in files.items()},
               "crc32": {split: [file_record(path)["crc32"] for path in paths]
                         for split, paths in files.items()}}
    if {*request["crc32"]["train"]} & {*request["crc32"]["val"]}:
        print("note: a file of --val is a training file too, so its loss is not that of new text")
    return request, [(partial(documents, file_sources(paths), make, args.skip_bad), splits[split])
                     for split, paths in files.items() if paths]


def prepare_stdlib(folder="data/stdlib"):
    request = {"source": f"Python {platform.python_version()} standard library"}
    return prepare(folder, tokenizer.load("bytes"), request, [(stdlib_texts, [])])


def prepare_c4(args):
    limits = {"train": args.train_tokens, "val": args.val_tokens}
    request = {"source": "allenai/c4 en"} | {f"{split}_tokens": n for split, n in limits.items()}
    local = "text c4 c4-train.*.json.gz --val c4-validation.*.json.gz"
    stages = [hub_stage("allenai/c4", local, text_of, [split], args.skip_bad, "en", hub_split)
              for hub_split, split in (("validation", "val"), ("train", "train"))]
    return prepare("data/c4", tokenizer.load(args.tokenizer), request, stages, limits)


def prepare_text(args):
    check_files(args, *READERS)
    request, stages = file_stages(args, partial(text_of, key=args.key))
    return prepare(f"data/{args.name}", tokenizer.load(args.tokenizer), request | {"key": args.key},
                   stages)


def prepare_sft(args):
    check_files(args, *[ending for ending in READERS if ending != ".txt"])
    files = args.files + args.val
    rows = islice(documents(file_sources(files), dict, args.skip_bad), CHUNK_DOCUMENTS)
    format_name = sft.row_format([row for row in rows if isinstance(row, dict)], files[0])
    request, stages = file_stages(args, partial(sft.usable, format_name=format_name))
    return sft.prepare(f"data/{args.name}", args.tokenizer, request, stages, format_name,
                       args.seq_len, args.long)


def prepare_hub(args):
    name, format_name = sft.HUB[args.command]
    make = partial(sft.usable, format_name=format_name)
    stages = [hub_stage(name, "sft NAME FILES...", make, [], args.skip_bad)]
    return sft.prepare(f"data/{args.command}", args.tokenizer, {"source": name}, stages,
                       format_name, args.seq_len, args.long)


def prepare_uuid(args):
    """Both splits hold all pairs: a run is scored on the pairs that it learned by heart."""
    request = {"source": "uuid", "format": "uuid", "pairs": args.pairs, "seed": args.seed}
    stages = [(partial(sft.uuid_pairs, args.pairs, args.seed), ["train", "val"])]
    return sft.prepare("data/uuid", args.tokenizer, request, stages, "prompt")


def check(args):
    folder = f"data/{args.name}"
    manifest = read_manifest(folder)
    for split, totals in manifest["splits"].items():
        if totals["tokens"]:
            tokens = open_split(folder, split)
            for position, shard in zip(tokens.shard_starts[:-1], tokens.shards, strict=True):
                tokens.read(position, len(shard))
    print(f"{folder} is complete: {summary(manifest)}")


def folder_name(word):
    """An argparse type: the name of a folder inside data/."""
    need(Path(word).name == word and word[:1] not in ".-",
         f"must be a name inside data/, got {word!r}")
    return word


TOKENS = at_least(0, largest=10 ** 13)
OPTIONS = {
    "name": dict(type=folder_name, help="of the folder, data/NAME"),
    "files": dict(nargs="*", type=Path),
    "--val": dict(nargs="+", action="extend", type=Path, default=[], help="files of validation"),
    "--tokenizer": dict(default="gpt2", help="bytes, a name of tiktoken's (default gpt2), or a "
                        "folder with a tokenizer.json"),
    "--key": dict(default="text", help="of the text in .json, .jsonl and .parquet"),
    "--skip_bad": dict(type=at_least(0, float, 100), metavar="PERCENT",
                       help="leave out up to this percentage of the rows, if they are unusable"),
    "--train_tokens": dict(type=TOKENS, default=5_300_000_000, help="default 5.3e9, slightly more "
                           "than 10,000 steps x 1024 x 512; 0: all"),
    "--val_tokens": dict(type=TOKENS, default=10_000_000, help="default 1e7; 0: all"),
    "--seq_len": dict(type=at_least(0), default=0, help="of the longest sample; default 0: any"),
    "--long": dict(default="drop", choices=("drop", "truncate"), help="longer ones; default: drop"),
    "--pairs": dict(type=at_least(1), default=10_000, help="default 10,000"),
    "--seed": dict(type=at_least(0), default=0, help="of the random UUIDs"),
}
SAMPLE_OPTIONS = "--tokenizer --seq_len --long --skip_bad"
COMMANDS = {  # (function, its options)
    "stdlib": (lambda args: prepare_stdlib(), ""),
    "c4": (prepare_c4, "--tokenizer --train_tokens --val_tokens --skip_bad"),
    "text": (prepare_text, "name files --val --tokenizer --key --skip_bad"),
    "sft": (prepare_sft, "name files --val " + SAMPLE_OPTIONS),
    **{name: (prepare_hub, SAMPLE_OPTIONS) for name in sft.HUB},
    "uuid": (prepare_uuid, "--tokenizer --pairs --seed"),
    "check": (check, "name"),
}


def main(argv):
    parser = Arguments(__doc__, prog="data.py")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, options) in COMMANDS.items():
        command = commands.add_parser(name)
        for option in options.split():
            command.add_argument(option, **OPTIONS[option])
    args = parser.parse_args(argv)
    COMMANDS[args.command][0](args)


if __name__ == "__main__":
    command_line(main)
