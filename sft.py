"""Supervised fine-tuning data: rows with prompts and responses -> samples.

    python data.py sft gsm8k train.jsonl --val test.jsonl --tokenizer=PATH --seq_len=512

The keys of the first complete row decide the format of all rows, see ROW_FORMATS.
A sample holds the tokens that open a document, the prompt, the response and end-of-text. The last
two are learned. Prompt and response are encoded apart, so that generation starts as in training.
"""
import io
import itertools
import json
import random
import re
import threading
import uuid
import warnings
import zlib
from functools import lru_cache, partial

import numpy as np
from jinja2 import TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

import shards
import tokenizer
from config import UserError, as_user_error, need
from shards import FIRST, LEARNED, LeftOut

ALPACA = ("Below is an instruction that describes a task. "
          "Write a response that appropriately completes the request.\n\n"
          "### Instruction:\n{instruction}\n\n### Response:")
ALPACA_INPUT = ("Below is an instruction that describes a task, paired with an input that provides "
                "further context. Write a response that appropriately completes the request.\n\n"
                "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:")
ROW_FORMATS = {  # name: (key of the prompt, key of the response, template of the prompt)
    # chats, [{"role", "content"}], in the tokenizer's own chat template or, without one, in Tulu's
    "messages": ("messages", "messages", "<|role|>\ncontent\n"),
    "alpaca": ("instruction", "output", ALPACA),  # ALPACA_INPUT with an input; system: encode_row
    "question": ("question", "answer", ALPACA),   # GSM8K
    "query": ("query", "response", ALPACA),       # MetaMath
    "prompt": ("prompt", "response", "{instruction}"),
}
HUB = {  # command: (dataset on the hub, format of its rows)
    "tulu": ("allenai/tulu-v2-sft-mixture", "messages"),
    "metamath": ("meta-math/MetaMathQA", "query"),
}


class RefusedChat(UserError):
    """A chat that the model's own chat template refuses, by calling raise_exception."""


def row_format(rows, where):
    """The name of the format of the first row that has the keys of one. where: the file."""
    for row in rows:
        for name, (prompt_key, response_key, _) in ROW_FORMATS.items():
            if row.get(prompt_key) is not None and row.get(response_key) is not None:
                return name
    known = "; ".join(", ".join(dict.fromkeys(keys[:2])) for keys in ROW_FORMATS.values())
    keys = ", ".join(rows[0] if rows else ()) or "(none)"
    raise UserError(f"{where}, row 1: no sample can be made of the keys {keys}; known are {known}")


def left_out(row, keys, advice=""):
    """The LeftOut of a row in which a key is missing or holds something else than text, or None."""
    for key in keys:
        if key not in row:
            return LeftOut("missing", f"no key {key!r}, its keys are {', '.join(row)}{advice}")
        if not isinstance(row[key], str):
            reason = "missing" if row[key] is None else "bad"
            return LeftOut(reason, f"key {key!r} holds {row[key]!r:.80}, not text")
    return None


def usable(row, format_name):
    """Return the row, or a LeftOut if a text of it is missing, is no text or has no place."""
    more = ("input", "system") if format_name == "alpaca" else ()
    given = [key for key in more if row.get(key) is not None]
    for key in ("system", "history", "input", "context"):  # they change the task
        if row.get(key) and key not in given:
            return LeftOut("bad", f"key {key!r} has no place in the format {format_name!r}, got "
                           f"{row[key]!r:.80}: write it into messages")
    messages = row.get("messages")
    if format_name == "messages" and messages is not None:
        valid = isinstance(messages, list) and all(
            isinstance(message, dict) and isinstance(message.get(key), str)
            for message in messages for key in ("role", "content"))
        if valid and all(message["role"] != "assistant" for message in messages):
            return LeftOut("missing", f"no message has the role 'assistant', got {messages!r:.80}")
        return row if valid else LeftOut("bad", "messages must be a list of {'role': text, "
                                         f"'content': text}}, got {messages!r:.80}")
    return left_out(row, [*ROW_FORMATS[format_name][:2], *given]) or row


def prepare(folder, tokenizer_name, request, stages, format_name, seq_len=0, too_long="drop"):
    """Samples as shards, of stages of `usable` rows; see shards.prepare, ROW_FORMATS and encode."""
    tok = tokenizer.load(tokenizer_name)
    own_template = format_name == "messages" and tok.chat_template
    template = own_template or ROW_FORMATS[format_name][2]
    facts = {"kind": "samples", "format": request.get("format", format_name), "template": template}
    encode_rows = partial(encode, format_name=format_name, seq_len=seq_len, too_long=too_long)
    request = {**request, "seq_len": seq_len, "long": too_long,
               "template": zlib.crc32(f"{template}{tok.special_tokens}{tok.eos_id}".encode())}
    return shards.prepare(folder, tok, request, stages, encode=encode_rows, facts=facts)


def uuid_pairs(count, seed):
    """Yield rows: a random UUID (version 4, with hyphens) as prompt, another as response."""
    generator = random.Random(seed)
    for _ in range(count):
        first, second = (uuid.UUID(int=generator.getrandbits(128), version=4) for _ in range(2))
        yield {"prompt": f"{first}\n", "response": str(second)}


# ---- rows -> samples

def encode(tok, row, format_name, seq_len=0, too_long="drop"):
    """(words, counters) of a row. A sample of more than seq_len tokens (0: no limit) is dropped, or
    cut if too_long is "truncate". Samples without a learned token and refused chats are dropped."""
    try:
        words, size = encode_row(tok, row, format_name)
    except RefusedChat as reason:  # one row of many; each reason is printed once
        warnings.warn(f"{reason} (such chats are left out and counted)", stacklevel=1)
        return None, {"dropped": 1, "refused": 1}
    cut = bool(seq_len) and len(words) > seq_len
    words = np.array(words[:seq_len or None], dtype=np.uint32)
    learned = words >= LEARNED
    if cut and too_long == "drop" or not learned[1:].any():  # nothing predicts the first token
        return None, {"dropped": 1}
    size = len(tok.decode(words[learned] & (FIRST - 1)).encode()) if cut else size
    words[0] |= np.uint32(FIRST)
    return words, {"bytes": size, "learned": int(learned.sum()), "longest": len(words),
                   "truncated": int(cut)}


def encode_row(tok, row, format_name):
    """(ids with the flag LEARNED, bytes of the responses without end-of-text) of a row.
    If a chat template writes no end-of-text, the last answer alone gets one. Text after end-of-text
    (a line break) is not learned, and what follows the last learned token is left out."""
    by_template = format_name == "messages" and tok.chat_template
    if by_template:
        turns = template_turns(tok, row["messages"])
    elif format_name == "messages":
        turns = tulu_turns(row["messages"])
    else:
        prompt_key, response_key, template = ROW_FORMATS[format_name]
        task_input = row.get("input") if format_name == "alpaca" else None
        template = ALPACA_INPUT if task_input else template
        prompt = template.format(instruction=row[prompt_key], input=task_input)
        if format_name == "alpaca" and row.get("system"):
            prompt = row["system"] + prompt[prompt.index("\n\n"):]
        turns = [(prompt, False), (row[response_key], True)]
    encode_turn = tok.encode_template if by_template else tok.encode_part
    words = [] if by_template else list(tok.bos_ids)
    for i, (text, is_answer) in enumerate(turns, 1):
        part = encode_turn(text).tolist()
        if is_answer and (not by_template or i == len(turns) and tok.eos_id not in part):
            part.append(tok.eos_id)
        after_end = part[::-1].index(tok.eos_id) if tok.eos_id in part else 0
        learned = len(part) - after_end if is_answer else 0
        words += [token | LEARNED for token in part[:learned]] + part[learned:]
    while words and words[-1] < LEARNED:
        words.pop()
    end = by_template and tok.special_tokens["eos_token"]
    answers = [text.partition(end)[0] if end else text for text, is_answer in turns if is_answer]
    return words, len("".join(answers).encode("utf-8", "replace"))


def tulu_turns(messages):
    """[(text, is it an answer?)] of a chat."""
    turns, prompt = [], ""
    for message in messages:
        if message["role"] == "assistant":
            turns += [(f"{prompt}<|assistant|>\n", False), (message["content"], True)]
            prompt = "\n"
        else:
            prompt += f"<|{message['role']}|>\n{message['content']}\n"
    return turns


def template_turns(tok, messages):
    """[(text, is it an answer?)] of a chat; an answer is what the template adds to its prompt."""
    turns, done = [], ""
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = render(tok, messages[:i], True), render(tok, messages[:i + 1], False)
            is_kept = before.startswith(done) and after.startswith(before)
            if i == 0 and not is_kept:
                raise RefusedChat("the chat template cannot begin a chat with an answer")
            need(is_kept, f"the chat template of {tok.folder} writes a message differently when "
                 "others follow, so that answers cannot be told from prompts: without it, in a "
                 f"copy of the folder, the format is Tulu's. Seen at {message['content']!r:.99}")
            turns += [(before[len(done):], False), (after[len(before):], True)]
            done = after
    return turns


# ---- chat templates: programs in jinja2, written by others

TEMPLATE_STEPS = 1_000_000      # iterations of loops and calls while one chat is written
TEMPLATE_LENGTH = 10_000_000    # characters of a string


class LimitedSandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with limits on the number of steps and on the length of strings."""
    intercepted_binops = frozenset(("+", "*", "**", "%"))
    state = threading.local()  # .steps counts those of the chat that this thread writes

    def _parse(self, source, name, filename):
        """The syntax tree, in which loops iterate over `counted`, and `concat` computes `a ~ b`."""
        def call(method, argument):
            return nodes.Call(nodes.EnvironmentAttribute(method), [argument], [], None, None)

        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = call("counted", loop.iter)
        for tilde in list(tree.find_all(nodes.Concat)):
            tilde.nodes = [call("concat", nodes.List(tilde.nodes))]
        return tree

    def counted(self, values):
        for value in values:
            limit(next(self.state.steps), TEMPLATE_STEPS, "steps")
            yield value

    def call(self, context, function, *args, **options):
        limit(next(self.state.steps), TEMPLATE_STEPS, "steps")
        return super().call(context, function, *args, **options)

    def call_binop(self, context, operator, left, right):
        """Limits the result's length before it is computed; a number is as long as its digits."""
        sizes = [len(value) if hasattr(value, "__len__") else 0 for value in (left, right)]
        numbers = [abs(value) if isinstance(value, int) else 0 for value in (left, right)]
        widths = re.findall(r"\d+", left) if isinstance(left, str) else []  # "%9999999d" % 1
        length = {"+": sum(sizes), "*": max(sizes) * max(numbers),
                  "**": numbers[1] * max(1, numbers[0].bit_length()),
                  "%": sum(sizes) + max(map(int, widths), default=0)}[operator]
        limit(length, TEMPLATE_LENGTH, "characters")
        return super().call_binop(context, operator, left, right)

    @staticmethod
    def concat(parts):
        """The output of a block or a macro."""
        text = io.StringIO()
        for part in parts:
            text.write(str(part))
            limit(text.tell(), TEMPLATE_LENGTH, "characters")
        return text.getvalue()


def limit(amount, most, what):
    if amount > most:
        raise SecurityError(f"it takes more than {most:,} {what}")


@lru_cache
def compiled(template):
    """A chat template, compiled in jinja2's sandbox with the options of transformers."""
    def refuse(message):
        raise RefusedChat(f"the chat template refuses a chat: {message}")

    environment = LimitedSandbox(trim_blocks=True, lstrip_blocks=True,
                                 extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # jinja2's escapes HTML
    return environment.from_string(template)


def render(tok, messages, generation_prompt):
    """The text of some messages, with the prompt that opens an answer if generation_prompt."""
    with as_user_error(f"the chat template of {tok.folder} cannot write {str(messages)[:200]}",
                       TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError,
                       RuntimeError, TypeError, ValueError):
        template = compiled(tok.chat_template)
        LimitedSandbox.state.steps = itertools.count(1)
        return template.render(messages=messages, add_generation_prompt=generation_prompt,
                               tools=None, documents=None, **tok.special_tokens)
