"""A checkpoint with an update, or an adapter folder -> a plain Hugging Face directory.

    python merge.py out/tiny_mora                 the newest checkpoint of a run -> out/tiny_mora/merged
    python merge.py out/tiny_mora/step-00000400 TARGET --dtype=bfloat16
    python merge.py ADAPTER TARGET --base=MODEL   a folder with adapter_config.json, of peft or of MoRA's authors, and its base model

The sum W + dW is made in float32 and compared with the adapted model before anything is written.
"""
import argparse
import os
import shutil
from pathlib import Path

import torch

import checkpoint
import mora
from config import UserError, command_line


@torch.no_grad()
def largest_logit_difference(model, other, length=64):
    """The largest absolute difference of two models' float32 logits on random ids (2, length), and the largest logit."""
    ids = torch.randint(model.cfg.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    logits = model(ids)
    return (logits - other(ids)).abs().max().item(), logits.abs().max().item()


def merge_checkpoint(source, target=None, dtype=torch.float32, base=None):
    """Write the merged model of a run, a step or an adapter folder (on `base`); returns (target, largest difference of the logits before
    it is cast to dtype)."""
    model, tok, path = checkpoint.load(source, base)
    if not mora.adapted_layers(model):
        raise UserError(f"{path} holds no adapters: there is nothing to merge" +
                        (f"; {path / 'base'} is a Hugging Face directory already" if (path / "base").is_dir() else ""))
    target = Path(target) if target else path.parent / "merged"
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is not empty: remove it, or name another target")

    merged = mora.merge(checkpoint.load(path, base)[0])
    for _, layer in mora.adapted_layers(model):
        layer.merges = False  # W x + U(x), by the operator's own maps: what the written sum W + dW must equal
    difference, scale = largest_logit_difference(model, merged)
    if not difference <= 1e-3 * max(1.0, scale):
        raise UserError(f"merged and adapted logits differ by {difference:.2g} (logits up to {scale:.2g}): nothing was written; "
                        f"is {path} damaged?")
    beside = target.with_name(f".writing-{target.name}")
    shutil.rmtree(beside, ignore_errors=True)
    checkpoint.write_hugging_face(beside, {n: w.to(dtype) for n, w in merged.state_dict().items()}, merged.cfg, tok)
    if tok:
        tok.export(beside)
    os.replace(beside, target)
    return target, difference


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a run, one of its steps, or an adapter folder")
    parser.add_argument("target", nargs="?", help="an empty or new folder; default: merged, in the run's folder or beside the adapter's")
    parser.add_argument("--base", help="Hugging Face directory that the adapter folder adapts; default: the one that it names")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the written weights")
    args = parser.parse_args(argv)
    target, difference = merge_checkpoint(args.checkpoint, args.target, getattr(torch, args.dtype), args.base)
    print(f"merged into {target}: a Hugging Face directory; largest difference of the logits {difference:.2g}")


if __name__ == "__main__":
    command_line(main)
