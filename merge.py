"""Merge a checkpoint's update, or an adapter folder, into a plain Hugging Face directory.

    python merge.py out/tiny_mora                 its newest checkpoint -> out/tiny_mora/merged
    python merge.py out/tiny_mora/step-00000400 TARGET --dtype=bfloat16
    python merge.py ADAPTER TARGET --base=MODEL   a folder with adapter_config.json, as peft or the
                                                  authors of MoRA write it, and its base model
    python merge.py out/tiny_mora TARGET --as_lora    its MoRA as a LoRA in peft's format (share,
                                                      truncate; others with --rank=R, by an SVD)

The sum W + dW is computed in float32. Its logits are compared with the adapted model's before
anything is written.
"""
import argparse
import copy
import os
import shutil
from pathlib import Path

from config import UserError, at_least, command_line  # first, for Ctrl-C; isort: skip

import torch
from safetensors import SafetensorError

import adapters
import checkpoint
import mora


@torch.no_grad()
def largest_logit_difference(model, other, length=64):
    """(largest absolute difference of two models' float32 logits, largest absolute logit).

    Both models read the same random ids (2, length).
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.cfg.vocab_size, (2, length), generator=generator)
    logits = model(ids)
    return (logits - other(ids)).abs().max().item(), logits.abs().max().item()


def merged_model(source, base=None, best=False):
    """(merged model in float32, tokenizer, folder, largest difference of logits) of a checkpoint.

    Raises UserError if there is nothing to merge, or if merged and adapted model differ.
    """
    model, tok, folder = checkpoint.load(source, base, best)
    if not mora.adapted_layers(model):
        message = f"{folder} holds no adapters: there is nothing to merge"
        if (folder / "base").is_dir():
            message += f"; {folder / 'base'} is a Hugging Face directory already"
        raise UserError(message)
    merged = mora.merge(copy.deepcopy(model))
    for _, layer in mora.adapted_layers(model):
        layer.merges = False  # compute W x + U(x) by the operator's maps, independent of the sum
    difference, scale = largest_logit_difference(model, merged)
    if not difference <= 1e-3 * max(1.0, scale):
        raise UserError(f"merged and adapted logits differ by {difference:.2g} (logits up to "
                        f"{scale:.2g}): nothing was written; is {folder} damaged?")
    return merged, tok, folder, difference


def merge_checkpoint(source, target=None, dtype=torch.float32, base=None, best=False):
    """Write the merged model of a run, a step, or an adapter folder (on `base`).

    best: of a run, the step of the lowest validation loss instead of the newest.

    Returns (target, largest difference of the logits before the cast to dtype).
    """
    if target:
        must_be_free(Path(target))
    merged, tok, folder, difference = merged_model(source, base, best)
    target = Path(target) if target else folder.parent / "merged"
    must_be_free(target)
    checkpoint.remove_leftovers(target.parent, f".writing-{target.name}*")
    beside = checkpoint.temporary(target, "writing")
    weights = {name: weight.to(dtype) for name, weight in merged.state_dict().items()}
    try:  # creates the folders above target, too
        seq_len = checkpoint.trained_seq_len(folder)
        checkpoint.write_hugging_face(beside, weights, merged, tok, seq_len)
        if tok:
            tok.export(beside)
        must_be_free(target)  # another process may have written it by now
        os.replace(beside, target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{target} cannot be written: {checkpoint.one_line(error)}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target, difference


def write_lora(source, target, dtype=torch.float32, base=None, best=False, rank=0):
    """Write the MoRA of a checkpoint as a LoRA for any tool; see adapters.as_lora."""
    if not target:
        raise UserError("--as_lora needs a TARGET folder: python merge.py CHECKPOINT TARGET "
                        "--as_lora")
    target = Path(target)
    must_be_free(target)
    model, _, folder = checkpoint.load(source, base, best)
    beside = (folder / "base").resolve()
    base_model = base or (str(beside) if beside.is_dir() else None)
    return adapters.as_lora(model, target, dtype, rank, base_model)


def must_be_free(target):
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not empty: remove it, or name another target")


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a run, one of its steps, or an adapter folder")
    parser.add_argument("target", nargs="?", help="an empty or new folder; default: merged, in "
                        "the run's folder or beside the adapter folder")
    parser.add_argument("--best", action="store_true", help=checkpoint.BEST)
    parser.add_argument("--base", help="Hugging Face directory that the adapter folder adapts; "
                        "default: the one that it names")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"),
                        help="of the written weights")
    parser.add_argument("--as_lora", action="store_true", help="write MoRA's update as a LoRA that "
                        "peft loads, and leave the base model as it is")
    parser.add_argument("--rank", type=at_least(1), default=0, help="of --as_lora: cut every "
                        "update to this rank; default: exact")
    args = parser.parse_args(argv)
    if args.rank and not args.as_lora:
        raise UserError(f"--rank={args.rank} needs --as_lora: a merge is exact")
    if args.as_lora:
        report = write_lora(args.checkpoint, args.target, getattr(torch, args.dtype), args.base,
                            args.best, args.rank)
        print(f"wrote {args.target}: a LoRA of rank {report['rank']}, {report['bytes']:,} bytes, "
              f"relative error of an update at most {report['error']:.2g}")
        return
    target, difference = merge_checkpoint(args.checkpoint, args.target, getattr(torch, args.dtype),
                                          args.base, args.best)
    print(f"merged into {target}: a Hugging Face directory; "
          f"largest difference of the logits {difference:.2g}")


if __name__ == "__main__":
    command_line(main)
