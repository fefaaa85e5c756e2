"""Score a checkpoint: perplexity and bits per byte of a text, accuracy of answers to samples.

    python evaluate.py out/60m_mora data/wiki                  the run's newest checkpoint
    python evaluate.py out/60m_mora/merged data/c4_sample      any LLaMA in Hugging Face's format
    python evaluate.py out/gsm8k_mora_r8 data/gsm8k --answers --out=answers.jsonl   greedy answers

Text is cut into windows that do not overlap: each token is predicted once, end-of-text included. Of
samples the learned tokens are. Answers: whether the texts are equal, and the right digits of UUIDs
or, where references name numbers after ####, whether the numbers are equal.
"""
import json
import math
import re
import sys
from decimal import Decimal
from statistics import fmean

from config import Arguments, as_user_error, at_least, command_line, need  # first; isort: skip

import torch

import checkpoint
import tokenizer
from batches import every_sample_once, every_token_once
from sample import greedy, merge_for_reading
from shards import Samples, open_split


@torch.no_grad()
def perplexity(model, tokens, seq_len, batch, rank=0, world=1, limit=0):
    """{"loss" (nats per token), "ppl", "bits_per_byte", "tokens"} of a model on a split.
    Every rank of `world` must call it, on the unwrapped model; all return the same mean over
    tokens, of samples over learned ones. limit: stop after this many tokens, 0: never."""
    device, was_training = next(model.parameters()).device, model.training
    # nats and tokens; mps has no float64
    totals = torch.zeros(2, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    model.eval()
    batches = every_sample_once if isinstance(tokens, Samples) else every_token_once
    for inputs, targets in batches(tokens, seq_len, batch, rank, world, limit):
        count = (targets != -100).sum().to(totals)
        loss = model(inputs.to(device), targets.to(device))
        totals += torch.stack((torch.where(count > 0, loss.to(totals) * count, 0), count))
    model.train(was_training)
    if world > 1:
        torch.distributed.all_reduce(totals)
    nats, count = totals.tolist()
    loss = nats / count
    tokens_per_byte = tokens.totals.get("learned", tokens.totals["tokens"]) / tokens.totals["bytes"]
    return {"loss": loss, "ppl": math.exp(min(loss, 700)),
            "bits_per_byte": loss / math.log(2) * tokens_per_byte, "tokens": int(count)}


def answers(model, tok, samples, batch=512, limit=0, max_new_tokens=0):
    """[{"question", "answer", "reference"}]: greedy answers to the prompts of a split, as texts.
    A prompt ends before the first learned token of a sample; the reference is the first learned
    part. limit: the first samples, 0: all. max_new_tokens 0: one more than the longest has."""
    prompts, references = [], []
    for i in range(len(samples.lengths[:limit or None])):
        ids, learned = (part.tolist() for part in samples.sample(i))
        first = learned.index(True)
        need(first, f"{samples.folder}: sample {i} has no prompt before its answer")
        after = [*learned, False].index(False, first)
        prompts.append(ids[:first])
        references.append([token for token in ids[first:after] if token != tok.eos_id])
    written = greedy(model, prompts, min(tok.vocab_size, model.cfg.vocab_size),
                     max_new_tokens or max(map(len, references)) + 1, tok.eos_id, batch, tok.gaps)
    opening = tok.decode(tok.bos_ids)
    return [{"question": tok.decode(prompt).removeprefix(opening), "answer": tok.decode(answer),
             "reference": tok.decode(reference)}
            for prompt, answer, reference in zip(prompts, written, references, strict=True)]


def scores(records, format_name):
    """{"answers": count, "exact", "digits" (format "uuid") or "numbers": shares} of answers()."""
    pairs = [(record["answer"].strip(), record["reference"].strip()) for record in records]
    result = {"answers": len(pairs), "exact": fmean(a == b for a, b in pairs)}
    if format_name == "uuid":
        # of 32 hex digits, at their position; at random 9.8 %: one is always 4, another one of four
        digits = [(a.replace("-", ""), b.replace("-", "")) for a, b in pairs]
        result["digits"] = fmean(sum(map(str.__eq__, a, b)) / len(b) for a, b in digits)
    numbers = [(number(a), number(b)) for a, b in pairs if "####" in b]
    if len(numbers) == len(pairs) and any(b is not None for _, b in numbers):
        result["numbers"] = fmean(a is not None and a == b for a, b in numbers)
    return result


def number(text):
    """The Decimal after the last "####" or, without one, after the last "The answer is:"; or None.
    "1,234", "$1234.00." and "$ 1234" are equal; "1/2", "2^3", "12:30" and "1e3" are no number."""
    tails = re.split("####" if "####" in text else "[Tt]he answer is:?", text)[1:]
    found = re.match(r"[\s$*]*(-?)[\s$]*((?:\d[\d,]*)?(?:\.\d+)?)"
                     r"(?![\d.,]*\s*[/:^]|[eE]\d|[.,]?\d)", tails[-1] if tails else "")
    return Decimal(found[1] + found[2].replace(",", "")) if found and found[2] else None


def main(argv):
    parser = Arguments(__doc__)
    add, count = parser.add_argument, {"type": at_least(0), "default": 0}
    add("checkpoint", help="a run, one of its steps, or a Hugging Face directory")
    add("data", help="folder of token shards, as data/wiki")
    add("--best", action="store_true", help=checkpoint.BEST)
    add("--split", default="val", choices=("val", "train"))
    add("--answers", action="store_true", help="of samples: compare greedy answers with responses")
    add("--out", help="of answers: a file for each question, answer and reference, as JSON lines")
    add("--limit", **count, help="answer the first samples, this many; default: all")
    add("--max_new_tokens", **count, help="default: one more than the longest response")
    add("--seq_len", **count, help="of a window; default: as in training, or the longest sample")
    add("--batch", **count, help="windows at once, default 16, or answers, default 512")
    add("--tokens", **count, help="stop after this many (with the whole split's bytes per token)")
    add("--dtype", choices=("float32", "bfloat16"), help="default: of answers on a GPU bfloat16")
    args = parser.parse_args(argv)
    need(args.answers or not (args.out or args.limit or args.max_new_tokens),
         "--out, --limit and --max_new_tokens are of answers: add --answers")
    need(not args.answers or not (args.seq_len or args.tokens),
         "--seq_len and --tokens are of losses: leave them out, or --answers")
    model, tok, folder = checkpoint.load(args.checkpoint, best=args.best)
    tokens = open_split(args.data, args.split)
    tokens.must_suit(model, tok, folder)
    is_samples, on_gpu = isinstance(tokens, Samples), torch.cuda.is_available()
    need(is_samples or not args.answers, f"{args.data} is text: answers need the prompts and "
         "responses of `python data.py sft`, tulu, metamath or uuid")
    default = "bfloat16" if args.answers and on_gpu else "float32"
    model.compute_dtype = getattr(torch, args.dtype or default)
    merge_for_reading(model)
    rows, file = [], open(args.out or "/dev/null", "w")  # opened first: answers take long
    if args.answers:
        tok = tok or tokenizer.load(tokens.tokenizer, tokens.folder)
        rows = answers(model, tok, tokens, args.batch or 512, args.limit, args.max_new_tokens)
        result = scores(rows, tokens.format)
        result["truncated"] = tokens.totals.get("truncated", 0)  # references of the split, cut
    else:
        trained = model.trained_seq_len or model.cfg.max_position_embeddings
        window = int(tokens.lengths.max()) if is_samples else trained
        seq_len = min(args.seq_len or window, len(tokens))
        if seq_len > trained:
            print(f"note: windows of {seq_len} tokens, training had {trained}: scores beyond that "
                  "length are not comparable", file=sys.stderr)
        batch = min(args.batch or 16, len(tokens) // seq_len + 1)
        result = perplexity(model, tokens, seq_len, batch, limit=args.tokens)
    print(json.dumps({"checkpoint": str(folder), "data": args.data, "split": args.split, **result}))
    with as_user_error(f"{args.out} cannot be written; free some space", OSError), file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    command_line(main)
