"""Supervised fine-tuning data: rows of prompts and responses -> samples, of which the responses are learned (samples.py reads them).

    python data.py sft gsm8k train.jsonl --val test.jsonl --tokenizer=PATH --seq_len=512      too long: dropped; --long=truncate: cut
    python data.py tulu --tokenizer=PATH --seq_len=2048                                       allenai/tulu-v2-sft-mixture, streamed
    python data.py metamath --tokenizer=PATH --seq_len=512                                    meta-math/MetaMathQA, streamed
    python data.py uuid --tokenizer=PATH                                                      10,000 pairs of random UUIDs

The keys of the first row say what a file holds:

    messages                      chats, [{"role", "content"}]: the tokenizer's own chat template, or Tulu's; every answer is learned
    instruction, output, [input]  Alpaca's two templates
    question, answer              GSM8K:    Alpaca's template without input
    query, response               MetaMath: Alpaca's template without input
    prompt, response              as they stand

A sample is the tokens that open a document, the prompt, the response, end-of-text; the last two are learned. Prompt and response
are encoded apart, so that generation starts from just the tokens that were trained. On disk a token is 32 bits: its id, and two flags.
"""
import random
import uuid
import warnings
from functools import lru_cache, partial

import numpy as np

import shards
import tokenizer
from config import UserError
from shards import FIRST, LEARNED

ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
          "### Instruction:\n{instruction}\n\n### Response:")
ALPACA_INPUT = ("Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
                "appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:")
TULU = "<|role|>\ncontent\n"  # of every message; an answer ends with end-of-text

# name: (key of the prompt, of the response, template)
FORMATS = {
    "messages": ("messages", "messages", TULU),
    "alpaca": ("instruction", "output", ALPACA),
    "question": ("question", "answer", ALPACA),
    "query": ("query", "response", ALPACA),
    "prompt": ("prompt", "response", "{instruction}"),
}
HUB = {"tulu": ("allenai/tulu-v2-sft-mixture", "messages"), "metamath": ("meta-math/MetaMathQA", "query")}


class Refused(UserError):
    """A chat that the model's own template does not write, by its raise_exception."""


def format_of(row, where):
    """The name of a row's format, by its keys; raises UserError."""
    for name, (ask, answer, _) in FORMATS.items():
        if row.get(ask) is not None and row.get(answer) is not None:
            return name
    known = "; ".join(", ".join(dict.fromkeys(keys)) for *keys, _ in FORMATS.values())
    raise UserError(f"{where}: the first row has the keys {', '.join(row) or '(there is none)'}, of which no sample can be made. Known are: {known}")


# ---------------------------------------------------------------------------------------------------------------------
# rows -> samples

def encode(tok, rows, style, seq_len=0, long="drop"):
    """The samples of some rows, as data.encode: (words uint32, ends of the samples, bytes of what is learned, counts).

    style: a name in FORMATS. Samples of more than seq_len tokens (0: any) are dropped or truncated; one without anything to learn
    is dropped too, and a chat that the chat template refuses.
    """
    parts, sizes, truncated, refused = [], [], 0, 0
    for row in rows:
        try:
            ids, learned, size = chat(tok, row) if style == "messages" else pair(tok, row, style)
        except Refused as reason:  # one row of many is no reason to stop; each reason is said once
            warnings.warn(f"{reason} (such chats are left out and counted)")
            refused += 1
            continue
        if seq_len and len(ids) > seq_len:
            if long == "drop":
                continue
            ids, learned = ids[:seq_len], learned[:seq_len]
            truncated += any(learned[1:])
        if not any(learned[1:]):  # nothing predicts the first token
            continue
        words = np.array(ids, dtype=np.uint32) | np.array(learned, dtype=np.uint32) * np.uint32(LEARNED)
        words[0] |= np.uint32(FIRST)
        parts.append(words)
        sizes.append(size)
    words = np.concatenate(parts) if parts else np.zeros(0, np.uint32)
    lengths = [len(part) for part in parts]
    counts = {"learned": int((words >= LEARNED).sum()), "longest": max(lengths, default=0), "dropped": len(rows) - len(parts),
              "truncated": truncated, "refused": refused}
    return words, np.cumsum(lengths, dtype=np.int64), np.array(sizes, dtype=np.int64), counts


def pair(tok, row, style):
    """(ids, which of them are learned, bytes of the response) of a row with one prompt and one response."""
    ask, answer, template = FORMATS[style]
    fields = {"instruction": row.get(ask), "input": (style == "alpaca" and row.get("input")) or "", "response": row.get(answer)}
    for key, name in (("instruction", ask), ("input", "input"), ("response", answer)):
        if not isinstance(fields[key], str):
            raise UserError(f"key {name!r} holds {type(fields[key]).__name__}, not text: {str(row)[:200]}")
    prompt = (ALPACA_INPUT if fields["input"] else template).format(**fields)
    return turns(tok, [(prompt, False), (fields["response"], True)], list(tok.start))


def chat(tok, row):
    """The same of a chat, by the tokenizer's template if it has one, by Tulu's otherwise. What follows the last answer is left out."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) and isinstance(m.get(key), str) for m in messages for key in ("role", "content")):
        raise UserError(f"messages must be a list of {{'role': text, 'content': text}}, got {str(messages)[:200]}")
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if tok.chat:
        return turns(tok, templated(tok, messages, answers), [], by_template=True)
    parts, done = [], 0
    for i in answers:
        before = "".join(f"<|{m['role']}|>\n{m['content']}\n" for m in messages[done:i])
        parts += [("\n" * (done > 0) + before + "<|assistant|>\n", False), (messages[i]["content"], True)]
        done = i + 1
    return turns(tok, parts, list(tok.start))


def templated(tok, messages, answers):
    """[(text, is it an answer?)] of a chat: every answer is what the template adds to the messages before it and the call for an answer."""
    parts, done = [], ""
    for i in answers:
        before, after = render(tok, messages[:i], True), render(tok, messages[:i + 1], False)
        if not (before.startswith(done) and after.startswith(before)):
            raise UserError(f"the chat template of {tok.folder} writes a message differently when others follow, so that answers can not be "
                            f"told from prompts: remove it from a copy of the folder, and Tulu's format is used. Seen at {messages[i]['content'][:100]!r}")
        parts += [(before[len(done):], False), (after[len(before):], True)]
        done = after
    return parts


def turns(tok, parts, ids, by_template=False):
    """(ids, which of them are learned, bytes of the answers) of [(text, is it an answer?)], after the ids that open a document.

    An answer ends with end-of-text, which is learned. A chat template writes it itself, or the last answer alone gets it; what the
    template writes after it (a line break) is not learned.
    """
    learned, size = [False] * len(ids), 0
    for at, (text, answer) in enumerate(parts):
        part = (tok.encode_template(text) if by_template else tok.encode_part(text)).tolist()
        if not answer:
            ids, learned = ids + part, learned + [False] * len(part)
            continue
        if not by_template or tok.end not in part and at == len(parts) - 1:
            part.append(tok.end)
        last = len(part) - part[::-1].index(tok.end) if tok.end in part else len(part)
        ids, learned, size = ids + part, learned + [True] * last + [False] * (len(part) - last), size + len(text.encode("utf-8", "replace"))
    stop = len(ids) - (learned[::-1].index(True) if True in learned else 0)
    return ids[:stop], learned[:stop], size


@lru_cache
def compiled(template):
    """A chat template as transformers compiles it, in jinja2's sandbox."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message):
        raise Refused(f"the chat template refuses a chat: {message}")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template)


def render(tok, messages, ask):
    """The text of some messages; ask: and of what opens an answer."""
    from jinja2 import TemplateError
    try:
        return compiled(tok.chat).render(messages=messages, add_generation_prompt=ask, **tok.words)
    except TemplateError as error:
        raise UserError(f"the chat template of {tok.folder} can not write {str(messages)[:200]}: {error}")


def uuid_pairs(pairs, seed):
    """Lists of pairs of random UUIDs (version 4, with hyphens): given the first, answer the second."""
    draw, done = random.Random(seed), 0
    one = lambda: str(uuid.UUID(int=draw.getrandbits(128), version=4))
    while done < pairs:
        chunk = min(256, pairs - done)
        yield [{"prompt": one() + "\n", "response": one()} for _ in range(chunk)]
        done += chunk


def prepare(folder, tokenizer_name, request, stages, style="", seq_len=0, long="drop"):
    """Samples as shards, as data.prepare; style: a name in FORMATS, or empty: as the first row says."""
    tok = tokenizer.load(tokenizer_name)
    style = style or format_of(next((rows[0] for read, _ in stages for rows in read() if rows), {}), folder)
    template = tok.chat if style == "messages" and tok.chat else FORMATS[style][2]
    facts = {"kind": "samples", "format": request.get("format", style), "template": template}
    facts |= {"template_with_input": ALPACA_INPUT} if style == "alpaca" else {}
    return shards.prepare(folder, tok, request | {"seq_len": seq_len, "long": long}, stages, facts=facts,
                        encode=partial(encode, style=style, seq_len=seq_len, long=long))
