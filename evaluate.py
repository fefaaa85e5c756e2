"""Score a checkpoint: perplexity and bits per byte of a text, accuracy of answers to samples.

    python evaluate.py out/60m_mora data/wiki                  the run's newest checkpoint
    python evaluate.py out/60m_mora/merged data/c4_sample      any LLaMA in Hugging Face's format
    python evaluate.py out/gsm8k_mora_r8 data/gsm8k --answers --out=answers.jsonl
                                                               greedy answers, compared and kept
    python evaluate.py out/uuid_mora_r8 data/uuid --answers    right hex digits of second UUIDs

The validation split is scored. Text: non-overlapping windows over the whole split; each token is
predicted once, end-of-text included. Samples: their learned tokens, each sample once. Answers: of
UUIDs the share of right digits; where each reference names a number after ####, as GSM8K's do,
whether the numbers are equal; for every format, whether the texts are equal.
"""
import argparse
import json
import math
import re
from contextlib import nullcontext
from decimal import Decimal

import torch
import torch.distributed as dist

import checkpoint
import mora
import tokenizer
from batches import every_sample_once, every_token_once
from config import UserError, at_least, command_line
from model import Llama
from sample import greedy
from shards import Samples, open_split


@torch.no_grad()
def perplexity(model, tokens, seq_len, batch, rank=0, world=1, limit=0):
    """{"loss" (nats per token), "ppl", "bits_per_byte", "tokens"} of a model on a split.

    Every rank of `world` must call it, on the unwrapped model. Each rank scores its part of the
    split, and all return the same mean over tokens. limit: stop after this many tokens, 0 for
    all. Of samples only the learned tokens count, and only their bytes.
    """
    device = next(model.parameters()).device
    sum_device = "cpu" if device.type == "mps" else device  # mps has no float64
    totals = torch.zeros(2, dtype=torch.float64, device=sum_device)  # nats, tokens
    was_training = model.training
    model.eval()
    batches = every_sample_once if isinstance(tokens, Samples) else every_token_once
    for inputs, targets in batches(tokens, seq_len, batch, rank, world, limit):
        count = (targets != -100).sum().to(totals)
        loss = model(inputs.to(device), targets.to(device))
        totals += torch.stack((torch.where(count > 0, loss.to(totals) * count, 0), count))
    model.train(was_training)
    if world > 1:
        dist.all_reduce(totals)
    nats, count = totals.tolist()
    loss = nats / count
    scored_tokens = tokens.totals.get("learned", tokens.totals["tokens"])
    bytes_per_token = tokens.totals["bytes"] / scored_tokens
    return {"loss": loss, "ppl": math.exp(min(loss, 700)),
            "bits_per_byte": loss / math.log(2) / bytes_per_token, "tokens": int(count)}


@torch.no_grad()
def merged_copy(model):
    """A plain Llama with a model's updates merged and its matrices in the model's compute_dtype.

    It generates with the fewest kernels per token.
    """
    weights = {name: weight.to(model.compute_dtype) if weight.ndim > 1 else weight
               for name, weight in mora.merged_weights(model).items()}
    with torch.device("meta"):
        copy = Llama(model.cfg)
    copy.load_state_dict(weights, assign=True)
    copy.compute_dtype = model.compute_dtype
    return copy.eval()


def prompt_and_reference(samples, i, end):
    """(prompt ids, reference ids) of sample i, without the end-of-text id `end`.

    The prompt is what precedes the first learned token; the reference is the first learned part.
    """
    ids, learned = samples.sample(i)
    first = int(learned[1:].argmax()) + 1  # the first token of a sample is never learned
    unlearned = (~learned[first:]).nonzero()[0]
    after = first + int(unlearned[0]) if len(unlearned) else len(ids)
    return ids[:first].tolist(), [token for token in ids[first:after].tolist() if token != end]


def answers(model, tok, samples, batch=512, limit=0, max_new_tokens=0, file=None):
    """{"answers", "exact", ...}: scores of the model's greedy answers to the prompts of a split.

    limit: the first samples, this many; 0 for all. max_new_tokens of an answer; 0: one more than
    the longest reference. file: an open file for {"question", "answer", "reference"} as JSON
    lines. A training loop may call it between two steps, on one rank, on the unwrapped model: a
    merged copy generates.
    """
    count = min(limit or len(samples.lengths), len(samples.lengths))
    parts = [prompt_and_reference(samples, i, tok.end) for i in range(count)]
    prompts = [prompt for prompt, _ in parts]
    references = [reference for _, reference in parts]
    longest = max_new_tokens or max(map(len, references)) + 1
    vocab_size = min(tok.size, model.cfg.vocab_size)
    written = greedy(merged_copy(model), prompts, vocab_size, longest, tok.end, batch)
    questions = [question_text(tok, prompt) for prompt in prompts]
    written = [tok.decode(ids) for ids in written]
    references = [tok.decode(ids) for ids in references]
    if file:
        for texts in zip(questions, written, references, strict=True):
            record = dict(zip(("question", "answer", "reference"), texts, strict=True))
            file.write(json.dumps(record) + "\n")
    return scores(written, references, samples.format)


def question_text(tok, prompt):
    """The text of a prompt's ids, without the ids that open a document."""
    if prompt[:len(tok.start)] == tok.start:
        prompt = prompt[len(tok.start):]
    return tok.decode(prompt)


def scores(written, references, style):
    """The numbers of answers(): texts against reference texts. style "uuid" counts digits."""
    texts = list(zip(written, references, strict=True))

    def mean(compare):
        return sum(compare(answer, reference) for answer, reference in texts) / len(texts)

    result = {"answers": len(texts), "exact": mean(same_text)}
    if style == "uuid":
        result["digits"] = mean(right_digits)
    elif all("####" in reference for reference in references):
        result["numbers"] = mean(same_number)
    return result


def same_text(answer, reference):
    return answer.strip() == reference.strip()


def same_number(answer, reference):
    return number(reference) is not None and number(answer) == number(reference)


def right_digits(answer, reference):
    """The share of a UUID's 32 hex digits that are right at their position.

    Hyphens do not count; missing digits are wrong. A random digit is right once in 16. An answer
    that has the form of a UUID scores 9.8 % by chance: one digit is always 4, another one of four.
    """
    answer, reference = (text.strip().replace("-", "") for text in (answer, reference))
    right = sum(a == b for a, b in zip(answer, reference, strict=False))
    return right / len(reference)


def number(text):
    """The Decimal after the last "####" or, without one, after the last "The answer is:"; or None.

    "1,234", "$1234.00." and "$ 1234" are equal.
    """
    marks = list(re.finditer("####", text)) or list(re.finditer("[Tt]he answer is:?", text))
    if not marks:
        return None
    match = re.match(r"[\s$]*(-?)[\s$]*((?:\d[\d,]*)?(?:\.\d+)?)", text[marks[-1].end():])
    sign, digits = match.groups()
    return Decimal(sign + digits.replace(",", "")) if digits else None


def window_of(model, folder, tokens):
    """The default of --seq_len: what the run was trained and validated on, or the longest sample.

    A directory that does not record it is scored with the model's whole context.
    """
    if isinstance(tokens, Samples):
        return int(tokens.lengths.max())
    return checkpoint.trained_seq_len(folder) or model.cfg.max_position_embeddings


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a run, one of its steps, or a Hugging Face directory")
    parser.add_argument("data", help="folder of token shards, as data/wiki")
    parser.add_argument("--best", action="store_true", help=checkpoint.BEST)
    parser.add_argument("--split", default="val", choices=("val", "train"))
    parser.add_argument("--answers", action="store_true",
                        help="of samples: answer greedily and compare with the responses")
    parser.add_argument("--out", help="of answers: write each question, answer and reference to "
                        "this file, as JSON lines")
    parser.add_argument("--limit", type=at_least(0), default=0,
                        help="answer the first samples, this many; default: all")
    parser.add_argument("--max_new_tokens", type=at_least(0), default=0,
                        help="of an answer; default: one more than the longest response")
    parser.add_argument("--seq_len", type=at_least(0), default=0,
                        help="tokens per window; default: as in training, or the longest sample")
    parser.add_argument("--batch", type=at_least(0), default=0,
                        help="windows at once, default 16, or answers, default 512")
    parser.add_argument("--tokens", type=at_least(0), default=0,
                        help="stop after this many; default: the whole split")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the computation; "
                        "default: float32, of answers on a GPU bfloat16")
    args = parser.parse_args(argv)
    if args.out and not args.answers:
        raise UserError("--out keeps answers: add --answers")
    return args


def open_output(name):
    """The file to write to, opened before minutes of work, or a stand-in for None."""
    if not name:
        return nullcontext()
    try:
        return open(name, "w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{name} cannot be written: {error.strerror}") from None


def main(argv):
    args = parse_arguments(argv)
    model, tok, folder = checkpoint.load(args.checkpoint, best=args.best)
    tokens = open_split(args.data, args.split)
    tokens.must_suit(model, tok, folder)
    if args.answers and not isinstance(tokens, Samples):
        raise UserError(f"{args.data} is text: answers need the prompts and responses of "
                        "`python data.py sft`, tulu, metamath or uuid")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    default = "bfloat16" if args.answers and device == "cuda" else "float32"
    model.compute_dtype = getattr(torch, args.dtype or default)
    model.to(device)
    if args.answers:
        tok = tok or tokenizer.load(tokens.tokenizer, tokens.folder)
        with open_output(args.out) as file:
            result = answers(model, tok, tokens, args.batch or 512, args.limit,
                             args.max_new_tokens, file)
    else:
        seq_len = min(args.seq_len or window_of(model, folder, tokens), len(tokens))
        batch = min(args.batch or 16, len(tokens) // seq_len + 1)
        result = perplexity(model, tokens, seq_len, batch, limit=args.tokens)
    print(json.dumps({"checkpoint": str(folder), "data": args.data, "split": args.split, **result}))


if __name__ == "__main__":
    command_line(main)
