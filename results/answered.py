"""Greedy answers of runs of results/sweep.py, for plans whose task is scored by them.

A plan has `PREPARE = answered.at_the_end`, or `answered.during`: a context that the run is in and
that yields a dict, for the run's line. Answers come from a merged copy with bfloat16 matrices on a
GPU, as those of evaluate.py. Losses are computed without torch.compile: other numbers of rows or
lengths would be compiled for one or two passes. No checkpoints are written, which takes up to six
seconds a run: a sweep starts such runs anew, since a checkpoint lacks what the context collects.
"""
import contextlib
import copy
import functools
import json
import lzma
import os
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import checkpoint
import evaluate
import tokenizer
import train
from sample import merge_for_reading
from shards import open_split

# shares of right digits of UUID pairs: where a run has nothing more to learn, where it has learned
ALL_RIGHT, LEARNED = 0.999, 0.99


@contextlib.contextmanager
def replaced(module, **functions):
    """Functions of a module that are others inside a `with` block."""
    before = {name: getattr(module, name) for name in functions}
    try:
        for name, function in functions.items():
            setattr(module, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)


def eager(function):
    """A function that is called without torch.compile."""
    @functools.wraps(function)
    def call(*arguments, **options):
        with torch.compiler.set_stance("force_eager"):
            return function(*arguments, **options)
    return call


def unsaved(*arguments):
    """What checkpoint.save is in these contexts."""


def answers(model, samples, limit=0, batch=512):
    """Return evaluate.answers of a model in training, which stays as it is."""
    model = copy.deepcopy(model)
    merge_for_reading(model)
    tok = tokenizer.load(samples.tokenizer, samples.folder)
    return evaluate.answers(model, tok, samples, batch, limit)


@contextlib.contextmanager
def at_the_end(name):
    """Answer the validation questions after training: {"numbers": share of right ones, "right":
    "0110...", "answers": [number or None], "answer_seconds"}. OUT/answers-NAME.jsonl.xz has the
    texts; the run's own folder is OUT/runs/NAME."""
    run, found = train.train, {}

    def train_and_answer(cfg):
        model, started = run(cfg), time.time()
        samples = open_split(cfg.data, "val", verify=False)
        records = answers(model, samples, limit=LIMIT)
        text = "".join(json.dumps(record) + "\n" for record in records).encode()
        folder = Path(cfg.out).parents[1]
        (folder / f"answers-{name}.jsonl.xz").write_bytes(lzma.compress(text))
        own, right = ([evaluate.number(record[key]) for record in records]
                      for key in ("answer", "reference"))
        found.update(numbers=evaluate.scores(records, samples.format)["numbers"],
                     right="".join(str(int(a == b is not None))
                                   for a, b in zip(own, right, strict=True)),
                     answers=[a if a is None else str(a) for a in own],
                     answer_seconds=round(time.time() - started, 1))
        return model

    with losses(), replaced(train, train=train_and_answer):
        yield found


@contextlib.contextmanager
def losses():
    """No answers; losses without torch.compile."""
    loss = eager(evaluate.perplexity)
    with (replaced(train, perplexity=loss), replaced(evaluate, perplexity=loss),
          replaced(checkpoint, save=unsaved)):
        yield


def why_over(digits, before, is_beaten):
    """Return why a run may end at these digits, or "". before: those of the evaluation before."""
    if digits >= ALL_RIGHT:
        return "all right"
    if min(digits, before) >= LEARNED:
        return "stays learned"
    return "" if digits >= LEARNED or not is_beaten else "beaten"


@contextlib.contextmanager
def during(name, beaten=lambda step: False):
    """Answer SOME of the UUIDs at each evaluation, and ALL where the run ends: {"curve": [[step,
    share of right digits, pairs]], "ended": why it ended before its last step, or ""}.

    It ends where nearly all digits are right, where 99 % are at two evaluations in a row, or where
    they are not and beaten(step) says that another run has had them by now.
    """
    run, loss, state, curve = train.train, eager(evaluate.perplexity), {}, []
    found = {"curve": curve, "ended": ""}

    def look(model, samples, *settings):
        """Scores of an evaluation; evaluations are counted, since they do not know their step."""
        scores, cfg = loss(model, samples, *settings), state["cfg"]
        step = min(state["evaluations"] * cfg.eval_every, cfg.steps)
        state["evaluations"] += 1
        if step:
            before = curve[-1][1] if curve else 0.0
            digits, pairs, is_beaten = share(model, samples, SOME), SOME, beaten(step)
            why = why_over(digits, before, is_beaten)
            if why or step == cfg.steps:
                digits, pairs = share(model, samples, ALL), ALL
                why = why_over(digits, before, is_beaten)  # of all it may be less
            curve.append([step, digits, pairs])
            print(f"digits {digits:.4f} of {pairs} {why}", flush=True)
            if why and step < cfg.steps:
                state["model"], found["ended"] = model, why
                os.kill(os.getpid(), signal.SIGTERM)  # train.py stops
        return scores

    def train_until_right(cfg):
        state.update(cfg=cfg, evaluations=0)
        try:
            model = run(cfg)
        except SystemExit:
            if "model" not in state:  # somebody else stopped it
                raise
            model = state["model"]
        return model

    with (replaced(train, train=train_until_right, perplexity=look),
          replaced(checkpoint, save=unsaved)):
        yield found


def share(model, samples, pairs):
    records = answers(model, samples, pairs, batch=1000)
    return evaluate.scores(records, "uuid")["digits"]


LIMIT, SOME, ALL = (int(os.environ.get(key, default)) for key, default in
                    (("LIMIT", 0), ("SOME", 1000), ("ALL", 10000)))  # smaller ones for trials
