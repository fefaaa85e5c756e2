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
hold one object per line, and may be compressed with gzip.
"""
import argparse
import sys
import sysconfig
from functools import partial
from pathlib import Path

import sft
import tokenizer
from config import UserError, command_line
from shards import SHARD_TOKENS, open_split, prepare, read_manifest, summary

CHUNK_DOCUMENTS = 256   # documents that one worker encodes at a time
FILE_TYPES = {".json": "json", ".json.gz": "json", ".jsonl": "json", ".jsonl.gz": "json",
              ".txt": "text", ".parquet": "parquet"}
HUB_ADVICE = "check the network, or set HF_ENDPOINT to a mirror; with the files at hand: "


# --------------------------------------------------------------------------------------------------
# sources: generators of lists of documents, in an order that is always the same

def stdlib_texts():
    """The files of the running Python's standard library without its tests, in order of name."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        if not left_out & set(path.relative_to(root).parts):
            yield [path.read_text(encoding="utf-8", errors="replace")]


def file_texts(files, key):
    """The documents of local files, in order."""
    for path in files:
        file_type = FILE_TYPES[ending(path)]
        options = {"data_files": [str(path)]}
        if file_type == "text":
            options["sample_by"] = "document"
        column = "text" if file_type == "text" else key
        yield from column_texts(path, file_type, column, **options)


def ending(path):
    """.json.gz of a.b.json.gz, .txt of a.b.txt"""
    return "".join(path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:])


def c4_texts(split):
    """allenai/c4 "en", streamed from the hub."""
    advice = HUB_ADVICE + "python data.py text c4 c4-train.*.json.gz --val c4-validation.*.json.gz"
    yield from column_texts("allenai/c4", "allenai/c4", "text", name="en", split=split,
                            advice=advice)


def column_texts(where, dataset, column, **options):
    """Lists of texts of one streamed dataset; raises UserError for a wrong column."""
    for table in tables(where, dataset, **options):
        if column not in table.column_names:
            keys = ", ".join(table.column_names)
            raise UserError(f"{where} has no key {column!r}, its keys are {keys}: choose one with "
                            "--key")
        texts = table[column].to_pylist()
        for text in texts:
            if text is not None and not isinstance(text, str):
                raise UserError(f"{where}: key {column!r} holds {type(text).__name__}, not text: "
                                "choose another with --key")
        yield [text or "" for text in texts]


def file_rows(files):
    """Lists of the rows of local files, in order."""
    for path in files:
        for table in tables(path, FILE_TYPES[ending(path)], data_files=[str(path)]):
            yield table.to_pylist()


def hub_rows(name):
    """Lists of the rows of a dataset on the hub."""
    for table in tables(name, name, advice=HUB_ADVICE + "python data.py sft NAME FILES..."):
        yield table.to_pylist()


def tables(where, dataset, split="train", advice="is the file complete?", **options):
    """Arrow tables of one streamed dataset; raises UserError for an unreadable source."""
    from datasets import load_dataset  # slow to import, and only preparing needs it
    try:
        stream = load_dataset(dataset, split=split, streaming=True, **options)
        yield from stream.with_format("arrow").iter(CHUNK_DOCUMENTS)
    except Exception as error:  # datasets and pyarrow raise many types
        reason = str(error).partition("\n")[0]
        colon = ": " if reason else ""
        raise UserError(f"{where} cannot be read ({type(error).__name__}{colon}{reason}): "
                        f"{advice}") from None


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


def prepare_text(args):
    check_files(args, tuple(FILE_TYPES))
    request = {"source": source_of(args), "key": args.key}
    stages = file_stages(args, partial(file_texts, key=args.key))
    return prepare(f"data/{args.name}", tokenizer.load(args.tokenizer), request, stages)


def prepare_sft(args):
    check_files(args, tuple(end for end, file_type in FILE_TYPES.items() if file_type != "text"))
    return sft.prepare(f"data/{args.name}", args.tokenizer, {"source": source_of(args)},
                       file_stages(args, file_rows), seq_len=args.seq_len, too_long=args.long)


def prepare_hub(args):
    name, format_name = sft.HUB[args.command]
    stages = [(partial(hub_rows, name), every_100th)]
    return sft.prepare(f"data/{args.command}", args.tokenizer, {"source": name}, stages,
                       format_name, seq_len=args.seq_len, too_long=args.long)


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


def source_of(args):
    """{split: [[name, bytes] of each file]}, the "source" of a request."""
    return {split: [[path.name, path.stat().st_size] for path in files]
            for split, files in (("train", args.files), ("val", args.val))}


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

def whole_number(word):
    """An argparse type that takes 5.3e9 too."""
    return int(float(word))


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, function, *add_options):
        words = commands.add_parser(name)
        words.set_defaults(function=function)
        for add in add_options:
            add(words)

    command("stdlib", lambda args: prepare_stdlib())
    command("c4", prepare_c4, add_tokenizer, add_c4_options)
    command("text", prepare_text, add_tokenizer, add_files, add_key)
    command("sft", prepare_sft, add_tokenizer, add_files, add_sample_options)
    command("tulu", prepare_hub, add_tokenizer, add_sample_options)
    command("metamath", prepare_hub, add_tokenizer, add_sample_options)
    command("uuid", prepare_uuid, add_tokenizer, add_uuid_options)
    command("check", check, add_name)
    return parser.parse_args(argv)


def add_tokenizer(parser):
    parser.add_argument("--tokenizer", default="gpt2",
                        help="bytes, a name of tiktoken's (default gpt2), or a folder with a "
                             "tokenizer.json")


def add_name(parser):
    parser.add_argument("name", help="of the folder, data/NAME")


def add_files(parser):
    add_name(parser)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--val", nargs="+", type=Path, default=[], help="files of validation")


def add_key(parser):
    parser.add_argument("--key", default="text", help="of the text in .json, .jsonl and .parquet")


def add_c4_options(parser):
    parser.add_argument("--train_tokens", type=whole_number, default=5_300_000_000,
                        help="default 5.3e9, slightly more than 10,000 steps x 1024 x 512; 0: all")
    parser.add_argument("--val_tokens", type=whole_number, default=10_000_000,
                        help="default 1e7; 0: all")


def add_sample_options(parser):
    parser.add_argument("--seq_len", type=whole_number, default=0,
                        help="length of the longest sample in tokens; default: no limit")
    parser.add_argument("--long", default="drop", choices=("drop", "truncate"),
                        help="drop or truncate samples of more than seq_len tokens; default: drop")


def add_uuid_options(parser):
    parser.add_argument("--pairs", type=whole_number, default=10_000, help="default 10,000")
    parser.add_argument("--seed", type=int, default=0, help="of the random UUIDs")


def main(argv):
    args = parse_arguments(argv)
    args.function(args)


if __name__ == "__main__":
    command_line(main)
