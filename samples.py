"""Samples (sft.py) -> batches: single samples a row, a pure function of (seed, step), the same for any number of processes.

Rows are padded at their end. Attention is causal, so a token never sees what comes after it: padding needs no mask, and samples
can not see each other. What padding costs is kept small by batches of similar lengths, and is arithmetic: SampleBatches.padding.
"""
from functools import lru_cache

import numpy as np
import torch

from batches import Ahead, Tokens
from config import UserError
from data import read_manifest
from sft import FIRST, LEARNED

WINDOW = 32   # steps whose samples are sorted by length together
ALIGNED = 8   # rows are padded to a multiple of it


def open_split(folder, split, verify=True):
    """One split of a prepared folder, as Samples or as Tokens."""
    return (Samples if read_manifest(folder).get("kind") == "samples" else Tokens)(folder, split, verify)


class Samples(Tokens):
    """One split of samples: their first tokens, lengths, and how many of their tokens are learned."""
    kind, id_bits = "samples", FIRST - 1

    def __init__(self, folder, split, verify=True):
        super().__init__(folder, split, verify)
        self.format, first, self.learned = self.manifest["format"], [], []
        for shard, start in zip(self.shards, self.starts):
            at = np.flatnonzero(shard & FIRST)
            if not len(at) or at[0]:
                raise UserError(f"{self.folder}: a shard of {split} does not start with a sample: {self._advice()}")
            learned = shard >= LEARNED
            learned[at] = False  # nothing predicts a first token
            self.learned.append(np.add.reduceat(learned, at, dtype=np.int64))
            first.append(at + start)
        self.first = np.concatenate([*first, [len(self)]])
        self.learned, self.lengths = np.concatenate(self.learned), np.diff(self.first)

    def sample(self, i):
        """(ids, which of them are learned) of sample i."""
        start, count = int(self.first[i]), int(self.lengths[i])
        return self.read(start, count), self.words(start, count) >= LEARNED

    def rows(self, which, length, count=0):
        """(inputs, targets), each (samples or count, length) int64, of some samples: targets that are not learned are -100."""
        inputs = np.zeros((max(count, len(which)), length), dtype=np.int64)
        targets = np.full_like(inputs, -100)
        for row, i in enumerate(which):
            ids, learned = self.sample(i)
            inputs[row, :len(ids) - 1] = ids[:-1]
            targets[row, :len(ids) - 1] = np.where(learned, ids, -100)[1:]
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def padded(self, longest, seq_len):
        """The length that rows get whose longest sample is this; inputs lack a sample's last token."""
        return np.minimum(-(-(longest - 1) // ALIGNED) * ALIGNED, seq_len)

    def must_fit(self, seq_len):
        if self.lengths.max() > seq_len:
            raise UserError(f"{self.folder} has a {self.split} sample of {self.lengths.max()} tokens, seq_len is {seq_len}: take --seq_len="
                            f"{self.lengths.max()}, or prepare it again with --seq_len={seq_len}, which drops longer ones (--long=truncate: cuts)")


class SampleBatches(Ahead):
    """Training batches of whole samples: every sample once an epoch, but for the rest that fills no batch, another one every epoch.

    An epoch is shuffled, the samples of every WINDOW steps are sorted by length and cut into global batches, which are shuffled
    again. The micro-batches of a step hold neighbours in length, over all processes.
    """

    def __init__(self, samples, seed, seq_len, batch_size, micro_batch, device="cpu", rank=0, world=1):
        super().__init__(device)
        samples.must_fit(seq_len)
        self.samples, self.seed, self.seq_len, self.batch_size = samples, seed, seq_len, batch_size
        self.micro_batch, self.rank, self.world = micro_batch, rank, world
        self.steps_an_epoch = len(samples.lengths) // batch_size
        if not self.steps_an_epoch:
            raise UserError(f"{samples.folder} has {len(samples.lengths)} {samples.split} samples, fewer than batch_size {batch_size}")
        self.plan = lru_cache(2)(self._plan)
        self.tokens_a_step = float(samples.lengths[self.plan(0)].sum(1).mean()) - batch_size
        self.padding = 1 - self.tokens_a_step * self.steps_an_epoch / float(self._shapes(self.plan(0)).sum() * micro_batch)
        self.says = f"{batch_size} samples, {self.tokens_a_step:,.0f} tokens on average and {self.padding:.1%} of padding,"

    def _plan(self, epoch):
        """(steps, batch_size) indices of samples."""
        random, size = np.random.default_rng((self.seed, epoch)), self.batch_size
        order, parts = random.permutation(len(self.samples.lengths))[:self.steps_an_epoch * size], []
        for start in range(0, len(order), WINDOW * size):
            window = order[start:start + WINDOW * size]
            window = window[np.argsort(self.samples.lengths[window], kind="stable")].reshape(-1, size)
            parts.append(random.permutation(window))
        return np.concatenate(parts)

    def _shapes(self, which):
        """Padded length of every micro-batch of (..., batch_size) samples."""
        return self.samples.padded(self.samples.lengths[which].reshape(-1, self.micro_batch).max(1), self.seq_len)

    def step(self, step):
        """Indices of a step's samples, over all processes."""
        epoch, at = divmod(step, self.steps_an_epoch)
        return self.plan(epoch)[at]

    def size(self, step):
        """Tokens of a step, over all processes, without padding."""
        return int(self.samples.lengths[self.step(step)].sum()) - self.batch_size

    def load(self, step):
        """(inputs, targets, weights) of this step and rank by micro-batch.

        A weight is a micro-batch's number of learned tokens over the average micro-batch's, so that the mean of weighted losses,
        over micro-batches and processes, is the loss of the global batch's learned tokens, however it is split.
        """
        every = self.step(step)
        micros = every.reshape(-1, self.world, self.micro_batch)
        average = self.samples.learned[every].sum() / (micros.shape[0] * self.world)
        mine = micros[:, self.rank]
        pairs = [self.samples.rows(which, int(length)) for which, length in zip(mine, self._shapes(mine))]
        inputs, targets = ([self.to_device(ids) for ids in column] for column in zip(*pairs))
        return inputs, targets, (self.samples.learned[mine].sum(1) / average).tolist()


def every_sample_once(samples, seq_len, batch, rank=0, world=1, limit=0):
    """(inputs, targets) over the whole split, shortest samples first, each (batch, padded length) int64. Ranks take turns.

    limit: only the first samples of the split, up to so many tokens, 0 for all.
    """
    samples.must_fit(seq_len)
    count = max(1, int(np.searchsorted(samples.first[1:], limit, "right"))) if limit else len(samples.lengths)
    order = np.argsort(samples.lengths[:count], kind="stable")
    for first in range(rank * batch, count, world * batch):
        which = order[first:first + batch]
        yield samples.rows(which, int(samples.padded(samples.lengths[which[-1]], seq_len)), batch)
