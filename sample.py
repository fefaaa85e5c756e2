"""Text from a checkpoint, as it comes.

    python sample.py out/tiny_mora --prompt="def "
    python sample.py out/tiny_mora/merged --prompt="def " --temperature=0.7 --max_new_tokens=300
"""
import argparse
import time

import torch

import checkpoint
import mora
import tokenizer
from config import UserError, command_line
from generate import generate


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
