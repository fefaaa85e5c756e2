"""Supervised fine-tuning data: rows with prompts and responses -> samples.

    python data.py sft gsm8k train.jsonl --val test.jsonl --tokenizer=PATH --seq_len=512
    python data.py tulu --tokenizer=PATH --seq_len=2048        allenai/tulu-v2-sft-mixture
    python data.py metamath --tokenizer=PATH --seq_len=512     meta-math/MetaMathQA
    python data.py uuid --tokenizer=PATH                       10,000 pairs of random UUIDs

The keys of the first complete row decide the format of all rows:

    messages                      chats, [{"role", "content"}]: the tokenizer's own chat template,
                                  or Tulu's; every answer is learned
    instruction, output, [input]  Alpaca's two templates
    question, answer              GSM8K: Alpaca's template without input
    query, response               MetaMath: Alpaca's template without input
    prompt, response              both as they are

A sample holds the tokens that open a document, the prompt, the response and end-of-text. The
response and end-of-text are learned. Prompt and response are encoded separately, so that generation
starts from exactly the tokens of training. Samples of more than --seq_len tokens are dropped, or
cut with --long=truncate.
"""
import random
import re
import threading
import uuid
import warnings
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np

import shards
import tokenizer
from config import UserError
from shards import ALLOWED, FIRST, LEARNED, SAMPLES, Encoded, LeftOut

ALPACA = ("Below is an instruction that describes a task. "
          "Write a response that appropriately completes the request.\n\n"
          "### Instruction:\n{instruction}\n\n### Response:")
ALPACA_INPUT = ("Below is an instruction that describes a task, paired with an input that provides "
                "further context. Write a response that appropriately completes the request.\n\n"
                "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:")
TULU = "<|role|>\ncontent\n"  # of every message; an answer ends with end-of-text


class RowFormat(NamedTuple):
    prompt_key: str
    response_key: str
    template: str   # of the prompt


ROW_FORMATS = {
    "messages": RowFormat("messages", "messages", TULU),
    "alpaca": RowFormat("instruction", "output", ALPACA),
    "question": RowFormat("question", "answer", ALPACA),
    "query": RowFormat("query", "response", ALPACA),
    "prompt": RowFormat("prompt", "response", "{instruction}"),
}
HUB = {  # command: (dataset on the hub, format of its rows)
    "tulu": ("allenai/tulu-v2-sft-mixture", "messages"),
    "metamath": ("meta-math/MetaMathQA", "query"),
}


class RefusedChat(UserError):
    """A chat that the model's own chat template refuses, by calling raise_exception."""


def row_format(rows, where):
    """The name of the format of a file, by the keys of its first rows; raises UserError.

    The first row that has the keys of a format decides. where: the file, for the message.
    """
    for row in rows:
        for name, (prompt_key, response_key, _) in ROW_FORMATS.items():
            if row.get(prompt_key) is not None and row.get(response_key) is not None:
                return name
    known = "; ".join(", ".join(dict.fromkeys(keys[:2])) for keys in ROW_FORMATS.values())
    keys = ", ".join(rows[0]) if rows else ""
    raise UserError(f"{where}, row 1: the row has the keys {keys or '(none)'}, of which no sample "
                    f"can be made. Known are: {known}")


def usable(row, format_name):
    """The row, or a LeftOut if its keys are missing or hold something else than text."""
    prompt_key, response_key, _ = ROW_FORMATS[format_name]
    for key in dict.fromkeys((prompt_key, response_key)):
        if row.get(key) is None:
            return LeftOut("missing", f"no key {key!r}, the keys are {', '.join(row)}"
                           if key not in row else f"key {key!r} holds null")
    if format_name == "messages":
        if is_chat(row["messages"]):
            return row
        return LeftOut("bad", "messages must be a list of {'role': text, 'content': text}, got "
                       f"{excerpt(row['messages'])}")
    for key in (prompt_key, response_key, "input"):
        value = row.get(key)
        optional = key == "input" and (format_name != "alpaca" or value is None)
        if not optional and not isinstance(value, str):
            return LeftOut("bad", f"key {key!r} holds {excerpt(value)}, not text")
    return row


def is_chat(messages):
    return isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get(key), str)
        for message in messages for key in ("role", "content"))


def excerpt(value):
    """The type of a value and its first characters, for messages."""
    text = repr(value)
    return f"{type(value).__name__} {text[:80]}{'...' if len(text) > 80 else ''}"


def prepare(folder, tokenizer_name, request, stages, format_name, seq_len=0, too_long="drop",
            allowed=ALLOWED):
    """Samples as shards; see shards.prepare.

    The rows of the stages are `usable`. format_name: of ROW_FORMATS. seq_len, too_long: see encode.
    """
    tok = tokenizer.load(tokenizer_name)
    template = ROW_FORMATS[format_name].template
    if format_name == "messages" and tok.chat:
        template = tok.chat
    facts = {"kind": SAMPLES.name, "format": request.get("format", format_name),
             "template": template}
    if format_name == "alpaca":
        facts["template_with_input"] = ALPACA_INPUT
    request = request | {"seq_len": seq_len, "long": too_long}
    encode_rows = partial(encode, format_name=format_name, seq_len=seq_len, too_long=too_long)
    return shards.prepare(folder, tok, request, stages, form=SAMPLES, encode=encode_rows,
                          facts=facts, allowed=allowed)


def uuid_pairs(count, seed):
    """Lists of rows: a random UUID (version 4, with hyphens) as prompt, another as response."""
    generator = random.Random(seed)

    def draw():
        return str(uuid.UUID(int=generator.getrandbits(128), version=4))

    for first in range(0, count, 256):
        rows = min(256, count - first)
        yield [{"prompt": draw() + "\n", "response": draw()} for _ in range(rows)]


# --------------------------------------------------------------------------------------------------
# rows -> samples

def encode(tok, rows, format_name, seq_len=0, too_long="drop"):
    """The Encoded form of some rows.

    Samples of more than seq_len tokens (0: no limit) are dropped, or cut if too_long is "truncate".
    A sample without a learned token is dropped, and so is a chat that the chat template refuses.
    """
    samples, response_bytes, truncated, refused = [], [], 0, 0
    for row in rows:
        try:
            ids, learned, size = encode_row(tok, row, format_name)
        except RefusedChat as reason:  # one row of many; each reason is printed once
            warnings.warn(f"{reason} (such chats are left out and counted)", stacklevel=1)
            refused += 1
            continue
        cut = bool(seq_len) and len(ids) > seq_len
        if cut and too_long == "drop":
            continue
        if cut:
            ids, learned = ids[:seq_len], learned[:seq_len]
        if not any(learned[1:]):  # nothing predicts the first token
            continue
        truncated += cut
        samples.append(with_flags(ids, learned))
        response_bytes.append(size)
    words = np.concatenate(samples) if samples else np.zeros(0, np.uint32)
    lengths = [len(sample) for sample in samples]
    counts = {"learned": int((words >= LEARNED).sum()), "longest": max(lengths, default=0),
              "dropped": len(rows) - len(samples), "truncated": truncated, "refused": refused}
    ends = np.cumsum(lengths, dtype=np.int64)
    return Encoded(words, ends, np.array(response_bytes, dtype=np.int64), counts)


def with_flags(ids, learned):
    """A sample's words (uint32): its ids with the flags LEARNED and FIRST."""
    words = np.array(ids, dtype=np.uint32)
    words[np.array(learned)] |= np.uint32(LEARNED)
    words[0] |= np.uint32(FIRST)
    return words


def encode_row(tok, row, format_name):
    """(ids, which of them are learned, bytes of the responses) of a row."""
    if format_name == "messages":
        return encode_chat(tok, row)
    return encode_pair(tok, row, format_name)


def encode_pair(tok, row, format_name):
    """encode_row of a row with one prompt and one response."""
    prompt_key, response_key, template = ROW_FORMATS[format_name]
    task_input = row.get("input") if format_name == "alpaca" else None
    if task_input:
        template = ALPACA_INPUT
    prompt = template.format(instruction=row[prompt_key], input=task_input)
    return join_turns(tok, [(prompt, False), (row[response_key], True)])


def encode_chat(tok, row):
    """encode_row of a chat, by the tokenizer's template if it has one, by Tulu's otherwise.

    Messages after the last answer are left out.
    """
    messages = row["messages"]
    if tok.chat:
        return join_turns(tok, template_turns(tok, messages), by_template=True)
    return join_turns(tok, tulu_turns(messages))


def answers_of(messages):
    """The indices of a chat's answers."""
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def tulu_turns(messages):
    """[(text, is it an answer?)] of a chat in Tulu's format."""
    turns, done = [], 0
    for i in answers_of(messages):
        before = "".join(f"<|{m['role']}|>\n{m['content']}\n" for m in messages[done:i])
        line_break = "\n" if done else ""  # after the answer before
        turns.append((f"{line_break}{before}<|assistant|>\n", False))
        turns.append((messages[i]["content"], True))
        done = i + 1
    return turns


def template_turns(tok, messages):
    """[(text, is it an answer?)] of a chat by the tokenizer's chat template.

    An answer is what the template adds to the messages before it and the generation prompt.
    """
    turns, done = [], ""
    for i in answers_of(messages):
        before, after = render(tok, messages[:i], True), render(tok, messages[:i + 1], False)
        if not (before.startswith(done) and after.startswith(before)):
            content = messages[i]["content"][:100]
            raise UserError(
                f"the chat template of {tok.folder} writes a message differently when others "
                "follow, so that answers cannot be told from prompts: remove the template from a "
                f"copy of the folder, and Tulu's format is used. Seen at {content!r}")
        turns += [(before[len(done):], False), (after[len(before):], True)]
        done = after
    return turns


def join_turns(tok, turns, by_template=False):
    """(ids, which of them are learned, bytes of the answers) of [(text, is it an answer?)].

    An answer ends with end-of-text, which is learned. A chat template writes end-of-text itself; if
    it does not, only the last answer gets one. Text that the template writes after end-of-text (a
    line break) is not learned, and what follows the last learned token is left out.
    """
    encode_turn = tok.encode_template if by_template else tok.encode_part
    ids = [] if by_template else list(tok.start)
    learned, answer_bytes = [False] * len(ids), 0
    for i, (text, is_answer) in enumerate(turns):
        part = encode_turn(text).tolist()
        if is_answer:
            is_last = i == len(turns) - 1
            if not by_template or is_last and tok.end not in part:
                part.append(tok.end)
            answer_bytes += len(text.encode("utf-8", "replace"))
        learned_count = up_to_last(part, tok.end) if is_answer else 0
        ids += part
        learned += [True] * learned_count + [False] * (len(part) - learned_count)
    count = up_to_last(learned, True) if True in learned else len(ids)
    return ids[:count], learned[:count], answer_bytes


def up_to_last(values, value):
    """The number of values up to the last one that equals value; all of them if there is none."""
    return len(values) - values[::-1].index(value) if value in values else len(values)


# --------------------------------------------------------------------------------------------------
# chat templates: programs in jinja2, written by others

TEMPLATE_STEPS = 1_000_000      # iterations of loops and calls while one chat is written
TEMPLATE_LENGTH = 10_000_000    # characters of a string


class TemplateLimit(Exception):
    """A chat template that runs or grows beyond the limits."""


@lru_cache
def compiled(template):
    """A chat template, compiled in jinja2's sandbox with the options of transformers."""
    def refuse(message):
        raise RefusedChat(f"the chat template refuses a chat: {message}")

    environment = limited_sandbox()(trim_blocks=True, lstrip_blocks=True,
                                    extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template)


@lru_cache
def limited_sandbox():
    """jinja2's sandbox with limits on the number of steps and on the length of strings."""
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class LimitedSandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("+", "*", "**", "%"))
        state = threading.local()  # chats are written in several threads

        def _parse(self, source, name, filename):
            """The syntax tree, with calls of `counted` around what loops iterate over, and of
            `joined` in place of `a ~ b`."""
            tree = super()._parse(source, name, filename)
            for loop in list(tree.find_all(nodes.For)):
                counted = nodes.EnvironmentAttribute("counted")
                loop.iter = nodes.Call(counted, [loop.iter], [], None, None)
            for tilde in list(tree.find_all(nodes.Concat)):
                joined = nodes.EnvironmentAttribute("joined")
                tilde.nodes = [nodes.Call(joined, tilde.nodes, [], None, None)]
            return tree

        def counted(self, values):
            for value in values:
                self.count_step()
                yield value

        def joined(self, *values):
            return self.concat([str(value) for value in values])

        def count_step(self):
            self.state.steps = getattr(self.state, "steps", 0) + 1
            if self.state.steps > TEMPLATE_STEPS:
                raise TemplateLimit(f"it takes more than {TEMPLATE_STEPS:,} steps")

        def call(self, context, function, *args, **options):
            self.count_step()
            return super().call(context, function, *args, **options)

        def call_binop(self, context, operator, left, right):
            if result_length(operator, left, right) > TEMPLATE_LENGTH:
                raise too_large()
            return super().call_binop(context, operator, left, right)

        @staticmethod
        def concat(parts):
            """The output of a block or a macro."""
            text, length = [], 0
            for part in parts:
                text.append(part)
                length += len(part)
                if length > TEMPLATE_LENGTH:
                    raise too_large()
            return "".join(text)

    return LimitedSandbox


def too_large():
    return TemplateLimit(f"it makes a text of more than {TEMPLATE_LENGTH:,} characters")


def result_length(operator, left, right):
    """A bound on the length of a template's `left operator right`; of a number: its digits."""
    sizes = [len(value) if hasattr(value, "__len__") else 0 for value in (left, right)]
    numbers = [abs(value) if isinstance(value, int) else 0 for value in (left, right)]
    if operator == "*":
        return max(sizes[0] * numbers[1], sizes[1] * numbers[0])
    if operator == "**":
        return numbers[1] * max(1, numbers[0].bit_length())
    if operator == "%" and isinstance(left, str):  # "%9999999d" % 1
        return max(map(int, re.findall(r"\d+", left)), default=0) + sum(sizes)
    return sum(sizes)


def render(tok, messages, generation_prompt):
    """The text of some messages, with the prompt that opens an answer if generation_prompt."""
    from jinja2 import TemplateError
    try:
        template = compiled(tok.chat)
        template.environment.state.steps = 0
        return template.render(messages=messages, add_generation_prompt=generation_prompt,
                               **tok.words)
    except RecursionError:
        reason = "it calls itself without end"
    except MemoryError:
        reason = "it needs more memory than there is"
    except (TemplateError, TemplateLimit, ArithmeticError, LookupError, TypeError,
            ValueError) as error:
        reason = str(error) or type(error).__name__
    raise UserError(f"the chat template of {tok.folder} cannot write {str(messages)[:200]}: "
                    f"{reason}")
