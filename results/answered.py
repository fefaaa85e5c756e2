"""Greedy answers of runs of results/sweep.py, for plans whose task is scored by them.

A plan's PREPARE returns at_the_end(name), during(name) or losses(): a context manager in which the
run happens and that yields a dict for the run's line. Answers come from a merged copy with bfloat16
matrices on a GPU, as those of evaluate.py. Losses are computed without torch.compile, which would
compile for every number of rows and every length. The last step writes no checkpoint, which saves
up to six seconds per run: with save_every = steps a run does only if it is stopped. Such a run goes
on with its answers if the plan says RESUMES = True.
"""
import contextlib
import copy
import functools
import json
import lzma
import math
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import checkpoint
import evaluate
import tokenizer
import train
from sample import merge_for_reading
from shards import open_split

ALL_RIGHT = 0.999  # share of right digits at which a run of UUID pairs has nothing more to learn
SOME, ALL = 1000, 10000  # UUID pairs that are answered at each evaluation, and where a run ends


def eager(function):
    """Return a function that calls this one without torch.compile."""
    @functools.wraps(function)
    def call(*arguments, **options):
        with torch.compiler.set_stance("force_eager"):
            return function(*arguments, **options)
    return call


def unless_last(save):
    """Return a function that calls checkpoint.save at every step but the last one."""
    def call(cfg, step, *state):
        if step < cfg.steps:
            save(cfg, step, *state)
    return call


def answers(model, samples, limit=0, batch=512):
    """Return evaluate.answers of a model in training, which is not changed."""
    model = copy.deepcopy(model)
    merge_for_reading(model)
    tok = tokenizer.load(samples.tokenizer, samples.folder)
    return evaluate.answers(model, tok, samples, batch, limit)


@contextlib.contextmanager
def at_the_end(name):
    """Answer the validation questions after training: {"numbers": share of right ones, "right":
    "0110...", "answers": [number or None], "answer_seconds"}. OUT/answers-NAME.jsonl.xz has the
    texts; the run's own folder is OUT/runs/NAME."""
    original_train, found = train.train, {}

    def train_and_answer(cfg):
        model, started = original_train(cfg), time.time()
        samples = open_split(cfg.data, "val", verify=False)
        records = answers(model, samples)
        text = "".join(json.dumps(record) + "\n" for record in records).encode()
        folder = Path(cfg.out).parents[1]
        (folder / f"answers-{name}.jsonl.xz").write_bytes(lzma.compress(text))
        given = [evaluate.number(record["answer"]) for record in records]
        right = [evaluate.number(record["reference"]) for record in records]
        is_right = [a is not None and a == b for a, b in zip(given, right, strict=True)]
        found["numbers"] = evaluate.scores(records, samples.format)["numbers"]
        found["right"] = "".join("1" if yes else "0" for yes in is_right)
        found["answers"] = [None if number is None else str(number) for number in given]
        found["answer_seconds"] = round(time.time() - started, 1)
        return model

    with losses(), patch.object(train, "train", train_and_answer):
        yield found


@contextlib.contextmanager
def losses():
    """Give no answers; compute losses without torch.compile."""
    loss = eager(evaluate.perplexity)
    with (patch.object(train, "perplexity", loss), patch.object(evaluate, "perplexity", loss),
          patch.object(checkpoint, "save", unless_last(checkpoint.save))):
        yield


@contextlib.contextmanager
def during(name):
    """Answer SOME of the UUIDs at each evaluation, and ALL where the run ends: at its last step, or
    where nearly all digits are right. Yields {"curve": [[step, share of right digits, pairs]]}.
    The run's folder has the curve too, in curve.json, for a run that is stopped and goes on."""
    original_train, loss = train.train, eager(evaluate.perplexity)
    save = unless_last(checkpoint.save)
    run, curve = SimpleNamespace(cfg=None, evaluations=0, right_model=None), []

    def answer(model, samples, *settings):
        """Return the scores of an evaluation, and answer pairs at each but that of step 0."""
        scores = loss(model, samples, *settings)
        # perplexity() is not given the step, so its calls are counted
        step = min(run.evaluations * run.cfg.eval_every, run.cfg.steps)
        run.evaluations += 1
        if step == 0:
            return scores
        digits, pairs = share(model, samples, SOME), SOME
        if digits >= ALL_RIGHT or step == run.cfg.steps:
            digits, pairs = share(model, samples, ALL), ALL
        curve.append([step, digits, pairs])
        (Path(run.cfg.out) / "curve.json").write_text(json.dumps(curve))
        print(f"digits {digits:.4f} of {pairs}", flush=True)
        if digits >= ALL_RIGHT and step < run.cfg.steps:
            run.right_model = model
            # train.py stops; where it does already, it has no handler, and a signal would kill it
            if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
                os.kill(os.getpid(), signal.SIGTERM)
        return scores

    def train_until_right(cfg):
        run.cfg = cfg
        run.evaluations, curve[:] = evaluated(cfg)
        try:
            return original_train(cfg)
        except SystemExit:
            if run.right_model is None:  # the signal was not ours
                raise
            return run.right_model

    def save_if_stopped(cfg, step, *state):
        """Save a run that another process stops, not one whose digits are right."""
        if run.right_model is None:
            save(cfg, step, *state)

    with (patch.object(train, "train", train_until_right),
          patch.object(train, "perplexity", answer),
          patch.object(checkpoint, "save", save_if_stopped)):
        yield {"curve": curve}


def evaluated(cfg):
    """Return (how many evaluations a run has behind it, their curve), from its newest checkpoint;
    the first is that of step 0. One at the checkpoint's own step comes again."""
    steps = checkpoint.steps_of(cfg.out)
    if not steps:
        return 0, []
    evaluations = math.ceil(checkpoint.read_state(steps[-1])["step"] / cfg.eval_every)
    curve = json.loads((Path(cfg.out) / "curve.json").read_text()) if evaluations > 1 else []
    return evaluations, [line for line in curve if line[0] < evaluations * cfg.eval_every]


def share(model, samples, pairs):
    """Return the share of right digits in the answers to the first pairs."""
    records = answers(model, samples, pairs, batch=1000)
    return evaluate.scores(records, "uuid")["digits"]
