"""How well a checkpoint predicts a text: perplexity and bits per byte.

    python evaluate.py out/60m_mora data/wiki                  validation split, the newest checkpoint of the run
    python evaluate.py out/60m_mora/merged data/c4_sample      any Hugging Face directory of the LLaMA architecture

Non-overlapping windows over the whole split, every token once, end-of-text included.
"""
import argparse
import json
import math

import torch
import torch.distributed as dist

import checkpoint
from batches import Tokens, every_token_once
from config import command_line


@torch.no_grad()
def perplexity(model, tokens, seq_len, batch, rank=0, world=1, limit=0):
    """{"loss" (nats a token), "ppl", "bits_per_byte", "tokens"} of a model on a split, weighted by tokens.

    Every rank of `world` must call it, on the unwrapped model; each takes a part, and all return the same. limit: see every_token_once.
    """
    device = next(model.parameters()).device
    total = torch.zeros(2, dtype=torch.float64, device=device if device.type != "mps" else "cpu")  # nats, tokens
    was_training = model.training
    model.eval()
    for inputs, targets in every_token_once(tokens, seq_len, batch, rank, world, limit):
        count = int((targets != -100).sum())
        loss = model(inputs.to(device), targets.to(device))
        total += torch.stack((loss.to(total) * count, torch.tensor(float(count)).to(total)))
    model.train(was_training)
    if world > 1:
        dist.all_reduce(total)
    nats, count = total.tolist()
    loss = nats / count
    bytes_a_token = tokens.totals["bytes"] / tokens.totals["tokens"]
    return {"loss": loss, "ppl": math.exp(min(loss, 700)), "bits_per_byte": loss / math.log(2) / bytes_a_token, "tokens": int(count)}


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a run, one of its steps, or a Hugging Face directory")
    parser.add_argument("data", help="folder of token shards, as data/wiki")
    parser.add_argument("--split", default="val", choices=("val", "train"))
    parser.add_argument("--seq_len", type=int, default=0, help="window; default: what the model was trained on")
    parser.add_argument("--batch", type=int, default=16, help="windows at once")
    parser.add_argument("--tokens", type=int, default=0, help="stop after so many; default: the whole split")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the computation")
    args = parser.parse_args(argv)
    model, tok, path = checkpoint.load(args.checkpoint)
    tokens = Tokens(args.data, args.split)
    tokens.must_suit(model, tok, path)
    model.compute_dtype = getattr(torch, args.dtype)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    result = perplexity(model, tokens, args.seq_len or model.cfg.max_position_embeddings, args.batch, limit=args.tokens)
    print(json.dumps({"checkpoint": str(path), "data": args.data, "split": args.split, **result}))


if __name__ == "__main__":
    command_line(main)
