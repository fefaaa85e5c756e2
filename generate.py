"""Text from a model, one token after another: for one prompt as it comes, or greedily for many prompts at once."""
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

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
