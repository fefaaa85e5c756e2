"""Which part of full fine-tuning's first gradient, and of what it changes, an update can hold.

    python results/continual/held.py held.json --out=OUT [--key=value ...]    train.py's keys

Trains the full model on biomedical text, at its best rate unless keys say otherwise (those of
held.json: 60 steps at 3e-4). G is the gradient on four validation batches before training, dW what
training changed. For each way to choose the groups the numbers are the squared norm of the part of
G, or of dW, that lies in the update's space, over that of the whole: the mean over all layers.
LoRA's are those of the best matrix of its rank. Groups chosen by the gradient come from the first
four training batches, as in the runs of them.
"""
import copy
import json
import sys
from pathlib import Path
from statistics import fmean

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER.parents[1]), str(FOLDER.parent)]
import torch  # noqa: E402

import mora  # noqa: E402
import train  # noqa: E402
from config import load  # noqa: E402
from shards import open_split  # noqa: E402

WORDS = ["configs/continual.py", "fft", "--data=data/biomed", "--lr=1e-3", "--seq_len=1024",
         "--batch_size=32", "--micro_batch=16", "--steps=212", "--warmup=20", "--eval_every=212",
         "--save_every=212", "--keep=1"]
RANKS = (8, 32)
GRADIENT_STEPS = 4  # the first ones, whose batches give a gradient
KINDS = (("truncate", "strided"), ("truncate", "gradient"), ("share", "strided"),
         ("share", "permute"), ("share", "gradient"))


def targets(model):
    """Return {name: linear layer} of the blocks' projections."""
    return mora.find_targets(model, mora.PROJECTIONS)


def gradients(model, batches):
    """Return {name: gradient of a block's weight, (out, in)} on the batches of a few steps."""
    model.zero_grad()
    for step in range(GRADIENT_STEPS):
        for inputs, labels in zip(*batches.load(step), strict=True):
            model(inputs, labels).backward()
    return {name: linear.weight.grad.cpu() for name, linear in targets(model).items()}


def sort_features(update, gradient):
    """Sort inputs and outputs by the norms of a gradient's columns and rows, the largest first."""
    update.fold_in = copy.deepcopy(update.fold_in)  # other layers have the same one
    for fold, norms in ((update.fold_in, gradient.norm(dim=0)),
                        (update.fold_out, gradient.norm(dim=1))):
        order = norms.argsort(descending=True, stable=True)
        fold.order.copy_(order)
        fold.inverse.copy_(order.argsort())


def held(update, matrix):
    """Return the part of a matrix's squared norm that lies in the space of share or truncate."""
    fold_in, fold_out = update.fold_in, update.fold_out
    inside = fold_out(fold_in(matrix)[:, 0].T)[:, 0].T  # F_out matrix F_in^T, (r^, r^)
    members_in = fold_in(torch.ones(1, fold_in.features))[0, 0]
    members_out = fold_out(torch.ones(1, fold_out.features))[0, 0]
    sizes = members_out[:, None] * members_in
    return (inside.square() / sizes).sum() / matrix.square().sum()


def measure(model, chosen_by, matrices):
    """Return {"KIND_rRANK.WHAT": mean over layers}.

    chosen_by: {name: gradient} that chooses the groups; matrices: {WHAT: {name: matrix}}.
    """
    numbers = {}
    for what, by_name in matrices.items():
        squares = [torch.linalg.svdvals(matrix).square() for matrix in by_name.values()]
        for rank in RANKS:
            numbers[f"lora_best_r{rank}.{what}"] = fmean(s[:rank].sum() / s.sum() for s in squares)
    for rank in RANKS:
        for operator, groups in KINDS:
            adapted = copy.deepcopy(model)
            mora.adapt(adapted, rank=rank, operator=operator,
                       groups="permute" if groups == "gradient" else groups)
            updates = {name: layer.update for name, layer in mora.adapted_layers(adapted)}
            if groups == "gradient":
                for name, update in updates.items():
                    sort_features(update, chosen_by[name])
            for what, by_name in matrices.items():
                numbers[f"{operator}_{groups}_r{rank}.{what}"] = fmean(
                    held(updates[name], matrix) for name, matrix in by_name.items())
    return {name: round(number, 4) for name, number in numbers.items()}


def main(file, *words):
    cfg = load([*WORDS, *words], None)
    splits = [open_split(cfg.data, split, verify=False) for split in ("train", "val")]
    cfg, model = train.build_model(cfg, splits[0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seen, held_out = (train.make_batches(cfg, tokens, device, 0, 1)[1] for tokens in splits)
    first = copy.deepcopy(model).to(device)
    first.checkpoint_blocks = True  # not compiled: its activations would take much memory
    matrices = {"gradient": gradients(first, held_out)}
    chosen_by = gradients(first, seen)
    before, after = targets(model), targets(train.train(cfg))
    matrices["change"] = {name: (after[name].weight.cpu() - before[name].weight).detach()
                          for name in before}
    numbers = measure(model, chosen_by, matrices)
    Path(file).write_text(json.dumps(numbers, indent=1) + "\n")
    print("\n".join(f"{name}: {number}" for name, number in numbers.items()))


if __name__ == "__main__":
    main(*sys.argv[1:])
