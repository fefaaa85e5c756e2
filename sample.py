"""Generate text from a checkpoint and print it as it is generated.

    python sample.py out/tiny_mora --prompt="def "
    python sample.py out/tiny_mora/merged --prompt="def " --temperature=0.7 --max_new_tokens=300
    python sample.py MODEL --chat --system="Answer briefly."   each line of input is a message

A chat has the format of the model's chat template, or of Tulu where it has none, as in training.
Ctrl-D ends it. evaluate.py uses greedy(), which answers many prompts at once.
"""
import sys
import time
from contextlib import suppress

from config import Arguments, as_user_error, at_least, command_line, need  # first; isort: skip

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import checkpoint
import mora
import sft
import tokenizer

# cuDNN's attention is left out: it plans anew for each length, and a cache grows at each token.
GROWING = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def merge_for_reading(model):
    """Merge a model that no longer trains, store its matrices in compute_dtype, take a GPU."""
    if mora.adapted_layers(model):
        mora.merge(model)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.to(model.compute_dtype)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@torch.no_grad()
def generate(model, ids, vocab_size, max_new_tokens, temperature=1.0, top_k=0, stop=None,
             generator=None, gaps=()):
    """Yield token ids one by one after the prompt `ids`, drawn with a key/value cache. Ids from
    vocab_size on and those of gaps are never drawn. temperature 0: the likeliest. top_k: draw among
    so many, 0: all. stop: the token that ends the text, not yielded. generator: on the CPU."""
    cache, gaps = model.new_cache(), [i for i in gaps if i < min(vocab_size, model.cfg.vocab_size)]
    inputs = torch.tensor([ids], device=next(model.parameters()).device)
    for _ in range(max_new_tokens):
        logits = model.logits(model.hidden(inputs, cache)[0, -1])[:vocab_size].cpu()
        logits[gaps] = -torch.inf
        likeliest = logits.topk(min(top_k or len(logits), len(logits)))
        token = likeliest.indices[0]
        if temperature:
            probabilities = torch.softmax(likeliest.values / temperature, -1)
            token = likeliest.indices[torch.multinomial(probabilities, 1, generator=generator)]
        if token == stop:
            return
        yield int(token)
        inputs = token.reshape(1, 1).to(inputs.device)


def greedy(model, prompts, vocab_size, max_new_tokens, stop, batch=512, gaps=()):
    """The likeliest continuation of each prompt (a list of ids), cut before the first `stop`."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths together
    answers = []
    for first in range(0, len(order), batch):
        rows = [prompts[i] for i in order[first:first + batch]]
        answers += greedy_batch(model, rows, vocab_size, max_new_tokens, stop, gaps)
    return [answer for _, answer in sorted(zip(order, answers, strict=True))]


@torch.no_grad()
def greedy_batch(model, prompts, vocab_size, max_new_tokens, stop, gaps):
    """greedy() of one batch, without padding and without a mask: all rows advance in lockstep.
    The first forward pass reads as many tokens as the shortest prompt has, each later pass one. At
    a position inside its prompt a row takes the prompt's token, after it the likeliest."""
    lengths = [len(prompt) for prompt in prompts]
    end = max(lengths) + max_new_tokens
    ids = torch.tensor([[*prompt] + [stop] * (end - len(prompt)) for prompt in prompts],
                       device=next(model.parameters()).device)
    prompt_ends = torch.tensor(lengths, device=ids.device)
    rows = torch.arange(len(ids), device=ids.device)  # the rows of ids still in the batch
    ended = torch.zeros_like(rows, dtype=torch.bool)
    gaps = ids.new_tensor([gap for gap in gaps if gap < vocab_size])  # its copy to a GPU: once
    cache, inputs = model.new_cache(), ids[:, :min(lengths)]
    # eager, because compiled blocks would be compiled again for each length of the cache
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(GROWING):
        for position in range(min(lengths), end):
            logits = model.logits(model.hidden(inputs, cache)[:, -1])[:, :vocab_size]
            logits[:, gaps] = -torch.inf
            count = position - prompt_ends[rows]  # of new tokens so far; negative inside a prompt
            tokens = torch.where(count < 0, ids[rows, position], logits.argmax(-1))
            ids[rows, position] = tokens
            ended |= (count >= 0) & (tokens == stop) | (count == max_new_tokens - 1)
            inputs = tokens[:, None]
            if position % 16:  # reading which rows have ended synchronizes with the GPU
                continue
            remaining = (~ended).nonzero()[:, 0]
            if not len(remaining):
                break
            if len(remaining) <= len(rows) // 2:
                rows, ended, inputs = rows[remaining], ended[remaining], inputs[remaining]
                for past in cache:
                    past.both = past.both[:, remaining]
    answers = (row[length:length + max_new_tokens] + [stop]
               for row, length in zip(ids.tolist(), lengths, strict=True))
    return [answer[:answer.index(stop)] for answer in answers]


def chat_ids(tok, messages):
    """The ids of a chat [{"role", "content"}], up to where the next answer begins."""
    if not tok.chat_template:  # as in training on Tulu's format: an empty answer, no end-of-text
        empty_answer = {"role": "assistant", "content": ""}
        words, _ = sft.encode_row(tok, {"messages": [*messages, empty_answer]}, "messages")
        return [word & (sft.FIRST - 1) for word in words[:-1]]
    ids = tok.encode_template(sft.render(tok, messages, True)).tolist()
    need(ids, f"the chat template of {tok.folder} writes nothing")
    return ids


def chat(write, tok, system):
    """Answer the lines of standard input. write(ids) prints a continuation and returns its ids."""
    messages = [{"role": "system", "content": system}] if system else []
    with suppress(EOFError), as_user_error("standard input is no text", UnicodeDecodeError):
        while True:
            line = input("> " if sys.stdin.isatty() else "")
            if line.strip():
                messages.append({"role": "user", "content": line})
                answer = write(chat_ids(tok, messages))
                print()
                messages.append({"role": "assistant", "content": tok.decode(answer)})


def main(argv):
    parser = Arguments(__doc__)
    add = parser.add_argument
    add("checkpoint", help="a run, one of its steps, or a Hugging Face directory")
    add("--best", action="store_true", help=checkpoint.BEST)
    add("--prompt", default="", help="default: the start of a document")
    add("--chat", action="store_true", help="answer the lines of standard input")
    add("--system", default="", help="the system message of a chat")
    add("--max_new_tokens", type=at_least(0), default=200)
    add("--temperature", type=at_least(0.0, float), default=0.8)
    add("--top_k", type=at_least(0), default=200, help="draw among the likeliest; 0: among all")
    add("--seed", type=at_least(0), default=0)
    add("--tokenizer", help="an encoding of tiktoken, bytes, or a folder with a tokenizer.json")
    args = parser.parse_args(argv)
    need(not args.chat or not args.prompt, "--chat reads standard input: leave out --prompt")
    need(args.chat or not args.system, "--system is the first message of a chat: add --chat")
    model, tok, folder = checkpoint.load(args.checkpoint, best=args.best)
    tok = tokenizer.load(args.tokenizer) if args.tokenizer else tok
    need(tok, f"{folder} names no tokenizer: name one with --tokenizer (gpt2, bytes, a folder)")
    merge_for_reading(model)
    generator = torch.Generator().manual_seed(args.seed)
    # those of the base model, after --init_from; a run on longer sequences has more
    trained = max(model.cfg.max_position_embeddings, model.trained_seq_len or 0)
    notes = [f"note: the model was trained on {trained} positions: text beyond them may be worse"]

    def write(ids):
        """Print a continuation of ids as it is generated; returns its ids."""
        need(max(ids) < model.cfg.vocab_size, f"the tokenizer {tok.name} gives the id {max(ids)}, "
             f"the model has {model.cfg.vocab_size} tokens: is it the model's tokenizer?")
        decode, written = tok.decoder(), []
        for token in generate(model, ids, tok.vocab_size, args.max_new_tokens, args.temperature,
                              args.top_k, tok.eos_id, generator, tok.gaps):
            print(decode(token), end="", flush=True)
            written.append(token)
        if len(ids) + len(written) > trained and notes:  # once per chat
            print(f"\n{notes.pop()}", file=sys.stderr)
        return written

    if args.chat:
        return chat(write, tok, args.system)
    print(args.prompt, end="", flush=True)
    begun = time.time()
    count = len(write(tok.bos_ids + tok.encode_part(args.prompt).tolist()))
    print(f"\n[{count} tokens, {count / (time.time() - begun):.0f} tokens/s]")


if __name__ == "__main__":
    command_line(main)
