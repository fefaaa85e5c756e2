"""How well a checkpoint predicts a text: perplexity and bits per byte. How well it answers: accuracy on samples.

    python evaluate.py out/60m_mora data/wiki                  validation split, the newest checkpoint of the run
    python evaluate.py out/60m_mora/merged data/c4_sample      any Hugging Face directory of the LLaMA architecture
    python evaluate.py out/gsm8k_mora_r8 data/gsm8k --answers  answers, decoded greedily, to the prompts of `python data.py sft ...`
    python evaluate.py out/uuid_mora_r8 data/uuid --answers    how many hex digits of the second UUIDs are right

Text: non-overlapping windows over the whole split, every token once, end-of-text included. Samples: their learned tokens, every
sample once. Answers: of pairs of UUIDs the share of right digits; where the reference names a number after ####, as GSM8K's do,
whether it is the same number; otherwise whether it is the same text.
"""
import argparse
import json
import math
import re
from decimal import Decimal

import torch
import torch.distributed as dist

import checkpoint
import mora
import tokenizer
from batches import every_token_once
from config import UserError, command_line
from sample import greedy
from model import Llama
from batches import every_sample_once
from shards import Samples, open_split


@torch.no_grad()
def perplexity(model, tokens, seq_len, batch, rank=0, world=1, limit=0):
    """{"loss" (nats a token), "ppl", "bits_per_byte", "tokens"} of a model on a split, weighted by tokens.

    Every rank of `world` must call it, on the unwrapped model; each takes a part, and all return the same. limit: see
    every_token_once. Of samples only what is learned counts, its bytes too.
    """
    device = next(model.parameters()).device
    total = torch.zeros(2, dtype=torch.float64, device=device if device.type != "mps" else "cpu")  # nats, tokens
    was_training = model.training
    model.eval()
    once = every_sample_once if isinstance(tokens, Samples) else every_token_once
    for inputs, targets in once(tokens, seq_len, batch, rank, world, limit):
        count = int((targets != -100).sum())
        loss = model(inputs.to(device), targets.to(device))
        total += torch.stack((loss.to(total) * count, torch.tensor(float(count)).to(total)))
    model.train(was_training)
    if world > 1:
        dist.all_reduce(total)
    nats, count = total.tolist()
    loss = nats / count
    bytes_a_token = tokens.totals["bytes"] / tokens.totals.get("learned", tokens.totals["tokens"])
    return {"loss": loss, "ppl": math.exp(min(loss, 700)), "bits_per_byte": loss / math.log(2) / bytes_a_token, "tokens": int(count)}


@torch.no_grad()
def merged_copy(model):
    """A plain Llama with a model's updates merged and its matrices in its compute_dtype: what writes a token with the fewest kernels."""
    weights = {name: w.to(model.compute_dtype) if w.ndim > 1 else w for name, w in mora.merged_weights(model).items()}
    with torch.device("meta"):
        copy = Llama(model.cfg)
    copy.load_state_dict(weights, assign=True)
    copy.compute_dtype = model.compute_dtype
    return copy.eval()


def answers(model, tok, samples, batch=512, limit=0, max_new_tokens=0):
    """{"answers", "exact", ...}: a model's greedy answers to the prompts of a split, against the references; see the top of the file.

    A prompt is what comes before a sample's first learned token, the reference that answer. In a run it may be called between two
    steps, on one rank, on the unwrapped model: a merged copy of it writes. limit: the first so many samples. max_new_tokens, 0: the longest reference's.
    """
    prompts, references = [], []
    for i in range(min(limit or len(samples.lengths), len(samples.lengths))):
        ids, learned = samples.sample(i)
        start = int(learned[1:].argmax()) + 1
        stop = start + int((~learned[start:]).argmax()) if not learned[start:].all() else len(ids)
        prompts.append(ids[:start].tolist())
        references.append([token for token in ids[start:stop].tolist() if token != tok.end])
    longest = max_new_tokens or max(map(len, references)) + 1
    written = greedy(merged_copy(model), prompts, min(tok.size, model.cfg.vocab_size), longest, tok.end, batch)
    return scores([tok.decode(ids) for ids in written], [tok.decode(ids) for ids in references], samples.format)


def scores(found, wanted, style):
    """The numbers of `answers`: texts against references. style "uuid" counts digits."""
    mean = lambda values: sum(values) / len(wanted)
    result = {"answers": len(wanted), "exact": mean(a.strip() == b.strip() for a, b in zip(found, wanted))}
    if style == "uuid":
        return result | {"digits": mean(right_digits(a, b) for a, b in zip(found, wanted))}
    if all("####" in text for text in wanted):
        return result | {"numbers": mean(number(b) is not None and number(a) == number(b) for a, b in zip(found, wanted))}
    return result


def right_digits(found, wanted):
    """The share of a UUID's 32 hex digits that stand at their position; hyphens do not count, missing digits are wrong.

    A guess is right at 1 of 16. One who has learned the form alone gets 9.8 %: a digit is always 4, another one of four.
    """
    found, wanted = (text.strip().replace("-", "") for text in (found, wanted))
    return sum(a == b for a, b in zip(found, wanted)) / len(wanted)


def number(text):
    """The number after the last "####", or MetaMath's "The answer is:", as a Decimal: 1,234 and $1234.00. are equal; None if there is none."""
    places = list(re.finditer(r"####|[Tt]he answer is:?", text))
    marked = [place for place in places if place.group() == "####"] or places
    found = marked and re.match(r"[\s$]*(-?)[\s$]*((?:\d[\d,]*)?(?:\.\d+)?)", text[marked[-1].end():])
    return Decimal(found[1] + found[2].replace(",", "")) if found and found[2] else None


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a run, one of its steps, or a Hugging Face directory")
    parser.add_argument("data", help="folder of token shards, as data/wiki")
    parser.add_argument("--split", default="val", choices=("val", "train"))
    parser.add_argument("--answers", action="store_true", help="of samples: decode greedily and compare with the responses")
    parser.add_argument("--limit", type=int, default=0, help="answer the first so many samples; default: all")
    parser.add_argument("--max_new_tokens", type=int, default=0, help="of an answer; default: as the longest response")
    parser.add_argument("--seq_len", type=int, default=0, help="window; default: what the model was trained on, or the longest sample")
    parser.add_argument("--batch", type=int, default=0, help="windows at once, default 16, or answers, default 512")
    parser.add_argument("--tokens", type=int, default=0, help="stop after so many; default: the whole split")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the computation; default float32, answers on a GPU bfloat16")
    args = parser.parse_args(argv)
    model, tok, path = checkpoint.load(args.checkpoint)
    tokens = open_split(args.data, args.split)
    tokens.must_suit(model, tok, path)
    if args.answers and not isinstance(tokens, Samples):
        raise UserError(f"{args.data} is text: answers need the prompts and responses of `python data.py sft`, tulu, metamath or uuid")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.compute_dtype = getattr(torch, args.dtype or ("bfloat16" if args.answers and device == "cuda" else "float32"))
    model.to(device)
    if args.answers:
        tok = tok or tokenizer.load(tokens.tokenizer, tokens.folder)
        result = answers(model, tok, tokens, args.batch or 512, args.limit, args.max_new_tokens)
    else:
        seq_len = args.seq_len or (int(tokens.lengths.max()) if isinstance(tokens, Samples) else model.cfg.max_position_embeddings)
        result = perplexity(model, tokens, seq_len, args.batch or 16, limit=args.tokens)
    print(json.dumps({"checkpoint": str(path), "data": args.data, "split": args.split, **result}))


if __name__ == "__main__":
    command_line(main)
