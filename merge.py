"""Merge a checkpoint's update, or an adapter folder, into a plain Hugging Face directory.

    python merge.py out/tiny_mora                 its newest checkpoint -> out/tiny_mora/merged
    python merge.py out/tiny_mora/step-00000400 TARGET --dtype=bfloat16
    python merge.py ADAPTER TARGET --base=MODEL   a folder with adapter_config.json, as peft or the
                                                  authors of MoRA write it, and its base model
    python merge.py out/tiny_mora TARGET --as_lora    its MoRA as a LoRA in peft's format (share,
                                                      truncate; others with --rank=R, by an SVD)

W + dW is computed in float32, and written if its logits equal the adapted model's to rounding.
"""
import contextlib
import copy
import shutil
from pathlib import Path

from config import Arguments, as_user_error, at_least, command_line, lock, need  # isort: skip

import torch
from safetensors import SafetensorError

import adapters
import checkpoint
import mora


@torch.no_grad()
def merged_model(model, folder):
    """(merged copy of a model, largest difference of their logits of random ids), or UserError."""
    need(mora.adapted_layers(model), f"{folder} holds no adapters: there is nothing to merge. The "
         "base/ of a checkpoint is a Hugging Face directory already")
    merged = mora.merge(copy.deepcopy(model))
    for _, layer in mora.adapted_layers(model):
        layer.merges = False  # compute W x + U(x) by the operator's maps, independent of the sum
    ids = torch.randint(model.cfg.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    logits = model(ids)
    difference, scale = (logits - merged(ids)).abs().max().item(), logits.abs().max().item()
    need(difference <= 1e-3 * max(1.0, scale), f"merged and adapted logits (up to {scale:.2g}) "
         f"differ by {difference:.2g}: nothing was written; is {folder} damaged?")
    return merged, difference


@contextlib.contextmanager
def written_whole(target):
    """A path to write in a `with` block, which then becomes `target`, whole or not at all. Raises
    UserError if target is not free, cannot be written, or is written by another process."""
    need(not target.exists() or target.is_dir() and not any(target.iterdir()),
         f"{target} exists and is not empty: remove it, or name another target")
    place = target.resolve()
    need(not any(path in checkpoint.steps_of(path.parent) for path in place.parents), f"{target} "
         "lies in a step, which its run may remove (see --keep): name another target")
    new = place.with_name(f".writing-{place.name}") / "new"
    with (as_user_error(f"{target} cannot be written", OSError, SafetensorError),
          lock(new.parent, f"merging into {target}")):
        try:
            shutil.rmtree(new, ignore_errors=True)  # of a killed process
            yield new
            new.replace(place)  # fails if target has been filled meanwhile
        finally:
            shutil.rmtree(new, ignore_errors=True)


def main(argv):
    parser = Arguments(__doc__)
    add = parser.add_argument
    add("checkpoint", help="a run, one of its steps, or an adapter folder")
    add("target", nargs="?", type=Path, help="a new or empty folder; default: merged/ of the run")
    add("--best", action="store_true", help=checkpoint.BEST)
    add("--base", help="base model of the adapter folder; default: the one that it names")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of what is written")
    add("--as_lora", action="store_true", help="write MoRA's update as a LoRA that peft loads")
    add("--rank", type=at_least(1), default=0, help="of --as_lora, by an SVD; default: exact")
    args = parser.parse_args(argv)
    need(args.as_lora or not args.rank, f"--rank={args.rank} needs --as_lora: a merge is exact")
    need(args.target or not args.as_lora, "--as_lora needs a TARGET folder: name one")
    model, tok, folder = checkpoint.load(args.checkpoint, args.base, args.best)
    run = folder.resolve().parent
    run = run.parent if (run / "state.json").exists() else run  # not in a step: it may be removed
    target, dtype = args.target or run / "merged", getattr(torch, args.dtype)
    is_adapter = (folder / "adapter_config.json").exists()
    base = (adapters.base_of(folder, args.base) if is_adapter else folder / "base").resolve()
    with written_whole(target) as new:
        if args.as_lora:
            made = adapters.as_lora(model, new, dtype, args.rank, args.base or base)
            text = (f"a LoRA of rank {made['rank']}, {made['bytes']:,} bytes, relative error of an "
                    f"update at most {made['error']:.2g}")
        else:
            merged, difference = merged_model(model, folder)
            weights = merged.to(dtype).state_dict()
            checkpoint.write_hugging_face(new, weights, merged, tok, model.trained_seq_len)
            if tok:
                tok.export_files(new)
            text = f"a Hugging Face directory; difference of the logits {difference:.2g} in float32"
            if (folder / "base").is_symlink():
                text += f"; the update was added to the weights of {base}, not to their float8 copy"
    print(f"wrote {target}: {text}")


if __name__ == "__main__":
    command_line(main)
