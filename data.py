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
import sys
import sysconfig
from functools import partial
from pathlib import Path

import tokenizer
import sft
from config import UserError, command_line
from shards import SHARD_TOKENS, open_split, prepare, read_manifest, summary

CHUNK_DOCUMENTS = 256   # documents that one worker encodes at a time
BUILDERS = {".json.gz": "json", ".json": "json", ".jsonl": "json", ".jsonl.gz": "json", ".txt": "text", ".parquet": "parquet"}


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


def rows_of(files):
    """Lists of the rows of local files, in order."""
    for path in files:
        for table in tables(path, BUILDERS[kind(path)], data_files=[str(path)]):
            yield table.to_pylist()


def rows_of_hub(name):
    """Lists of the rows of a dataset on the hub."""
    advice = "check the network, or set HF_ENDPOINT to a mirror; with the files at hand: python data.py sft NAME FILES..."
    for table in tables(name, name, advice=advice):
        yield table.to_pylist()


def prepare_samples(args):
    """`python data.py sft | tulu | metamath | uuid`, its words parsed."""
    if args.command == "uuid":
        # the pairs are learned by heart: what is asked in the end is what was trained, so both splits hold them
        read = partial(sft.uuid_pairs, args.pairs, args.seed)
        request = {"source": "uuid", "format": "uuid", "pairs": args.pairs, "seed": args.seed}
        stages = [(read, lambda rows, first: {"train": rows, "val": rows})]
        return sft.prepare("data/uuid", args.tokenizer, request, stages, "prompt")
    options = {"seq_len": args.seq_len, "long": args.long}
    if args.command == "sft":
        source, stages = of_files(args.files, args.val, rows_of, "sft", ("json", "parquet"))
        return sft.prepare(f"data/{args.name}", args.tokenizer, {"source": source}, stages, **options)
    name, style = sft.HUB[args.command]
    return sft.prepare(f"data/{args.command}", args.tokenizer, {"source": name}, [(partial(rows_of_hub, name), every_100th)], style, **options)


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
        prepare_samples(args)
    else:
        manifest = read_manifest(f"data/{args.name}")
        for split in [split for split, totals in manifest["splits"].items() if totals["tokens"]]:
            tokens = open_split(f"data/{args.name}", split)
            for start in range(0, len(tokens), SHARD_TOKENS):
                tokens.read(start, min(SHARD_TOKENS, len(tokens) - start))
        print(f"data/{args.name} is whole: {summary(manifest)}")


if __name__ == "__main__":
    command_line(main)
