"""Text from a checkpoint, as it comes.

    python sample.py out/tiny_mora --prompt="def "
    python sample.py out/tiny_mora/merged --prompt="def " --temperature=0.7 --max_new_tokens=300
"""
import argparse
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import checkpoint
import mora
import tokenizer
from config import UserError, command_line

GROWING = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # cuDNN plans anew for every length of a cache


@torch.no_grad()
def generate(model, ids, vocab_size, max_new_tokens, temperature=1.0, top_k=0, stop=None, generator=None):
    """Yield one token id after another, drawn with a key/value cache.

    vocab_size: ids from here on do not exist for the tokenizer and are never drawn. temperature 0: the likeliest token.
    """
    cache = model.new_cache()
    ids = torch.tensor([ids], device=next(model.parameters()).device)
    for _ in range(max_new_tokens):
        logits = model.logits(model.hidden(ids, cache)[0, -1])[:vocab_size].cpu()
        if top_k:
            logits[logits < logits.topk(min(top_k, vocab_size)).values[-1]] = -torch.inf
        if temperature:
            token = int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator))
        else:
            token = int(logits.argmax())
        if token == stop:
            return
        yield token
        ids = torch.tensor([[token]], device=ids.device)


def greedy(model, prompts, vocab_size, max_new_tokens, stop, batch=512):
    """The likeliest continuations of many prompts (lists of ids), each without `stop` and what follows it.

    Prompts of similar length go through together.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [None] * len(prompts)
    for first in range(0, len(order), batch):
        some = order[first:first + batch]
        for i, answer in zip(some, continuations(model, [prompts[i] for i in some], vocab_size, max_new_tokens, stop)):
            answers[i] = answer
    return answers


@torch.no_grad()
def continuations(model, prompts, vocab_size, max_new_tokens, stop):
    """greedy for one batch, without padding and without a mask: all rows stand at the same position, always.

    The tokens that every prompt has go through at once, then one position at a time: a row whose prompt is longer is given its own
    next token, the others write. Rows that have ended are dropped from the batch when they are half of it.
    """
    device, lengths = next(model.parameters()).device, torch.tensor([len(prompt) for prompt in prompts])
    shortest, end = int(lengths.min()), int(lengths.max()) + max_new_tokens
    ids = torch.full((len(prompts), end), stop)
    for row, prompt in zip(ids, prompts):
        row[:len(prompt)] = torch.tensor(prompt)
    ids, given, cache = ids.to(device), lengths.to(device), model.new_cache()
    rows, ended = torch.arange(len(prompts), device=device), torch.zeros(len(prompts), dtype=torch.bool, device=device)
    inputs = ids[:, :shortest]
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(GROWING):  # the cache grows: every token would be a shape of its own
        for at in range(shortest, end):
            likeliest = model.logits(model.hidden(inputs, cache)[:, -1])[:, :vocab_size].argmax(-1)
            tokens = torch.where(at < given[rows], ids[rows, at], likeliest)
            ids[rows, at] = tokens
            ended |= (at >= given[rows]) & ((tokens == stop) | (at + 1 >= given[rows] + max_new_tokens))
            inputs = tokens[:, None]
            if at % 16 == 0 and (left := int((~ended).sum())) <= len(rows) // 2:  # asking waits for the device: now and then
                if not left:
                    break
                keep = (~ended).nonzero()[:, 0]
                rows, ended, inputs = rows[keep], ended[keep], inputs[keep]
                for past in cache:
                    past.keep(keep)
    answers = [row[length:length + max_new_tokens] for row, length in zip(ids.tolist(), lengths.tolist())]
    return [answer[:answer.index(stop)] if stop in answer else answer for answer in answers]


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a run, one of its steps, or a Hugging Face directory")
    parser.add_argument("--prompt", default="", help="default: the start of a document")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top_k", type=int, default=200, help="draw among so many likeliest tokens, 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", help="tiktoken's name, bytes, or a folder with a tokenizer.json, for a directory that does not say")
    args = parser.parse_args(argv)
    if args.temperature < 0 or args.top_k < 0:
        raise UserError(f"temperature {args.temperature} and top_k {args.top_k} must not be negative")
    model, tok, path = checkpoint.load(args.checkpoint)
    tok = tokenizer.load(args.tokenizer) if args.tokenizer else tok
    if not tok:
        raise UserError(f"{path} does not say which tokenizer it speaks: add --tokenizer=gpt2 (or another of tiktoken's, bytes, or a "
                        "folder with a tokenizer.json)")
    model = mora.merge(model) if mora.adapted_layers(model) else model  # a sum once, not for every token
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    prompt = tok.encode(args.prompt).tolist()
    prompt = prompt if prompt[:1] == tok.start[:1] else tok.start + prompt
    text = tok.decoder()
    print(args.prompt, end="", flush=True)
    start, count = time.time(), 0
    generator = torch.Generator().manual_seed(args.seed)
    for token in generate(model, prompt, tok.size, args.max_new_tokens, args.temperature, args.top_k, tok.end, generator):
        print(text(token), end="", flush=True)
        count += 1
    print(f"\n[{count} tokens, {count / (time.time() - start):.0f} tokens/s]")


if __name__ == "__main__":
    command_line(main)
