"""Token shards -> batches: memory-mapped, a pure function of (seed, step), the same for any number of processes."""
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch

from config import UserError


WINDOW = 32   # steps whose samples are sorted by length together


class Ahead:
    """batches(step) = self.load(step), and while that step computes, the next batch is loaded and copied to the device."""

    def __init__(self, device):
        self.device, self.pool, self.ahead = torch.device(device), ThreadPoolExecutor(1), {}

    def to_device(self, ids):
        if self.device.type == "cuda":
            return ids.pin_memory().to(self.device, non_blocking=True)
        return ids.to(self.device)

    def __call__(self, step):
        batch = self.ahead.pop(step).result() if step in self.ahead else self.load(step)
        self.ahead = {step + 1: self.pool.submit(self.load, step + 1)}
        return batch


class Batches(Ahead):
    """Training batches, a pure function of (seed, step): window by window, every window once an epoch, shuffled.

    Window i is tokens[i * seq_len : (i + 1) * seq_len], its targets lie one token further. Sequence i of a step is the same for
    any number of processes; a process gets its own.
    """

    def __init__(self, tokens, seed, seq_len, batch_size, micro_batch, device="cpu", rank=0, world=1):
        super().__init__(device)
        self.tokens, self.seed, self.seq_len, self.batch_size = tokens, seed, seq_len, batch_size
        self.micro_batch, self.rank, self.world = micro_batch, rank, world
        self.windows = (len(tokens) - 1) // seq_len
        if self.windows < 1:
            raise UserError(f"{tokens.folder} has {len(tokens)} {tokens.split} tokens, fewer than one window of seq_len {seq_len} + 1")
        self.order = lru_cache(2)(lambda epoch: np.random.default_rng((seed, epoch)).permutation(self.windows))
        self.steps_an_epoch, self.tokens_a_step = self.windows / batch_size, batch_size * seq_len
        self.says = f"{batch_size} x {seq_len} = {self.tokens_a_step:,} tokens"

    def size(self, step):
        """Tokens of a step, over all processes."""
        return self.tokens_a_step

    def window(self, index):
        """The index-th window of the run, an index that counts across epochs: (seq_len + 1,) ids."""
        epoch, position = divmod(index, self.windows)
        return self.tokens.read(int(self.order(epoch)[position]) * self.seq_len, self.seq_len + 1)

    def load(self, step):
        """(inputs, targets) of this step and rank, each (accumulation, micro_batch, seq_len) int64 on the device."""
        first = step * self.batch_size
        # rows of micro-step a on rank r: (a * world + r) * micro_batch onwards, so that ranks share a micro-step's neighbours
        rows = np.arange(self.batch_size).reshape(-1, self.world, self.micro_batch)[:, self.rank]
        ids = torch.from_numpy(np.stack([self.window(first + row) for row in rows.ravel()])).unflatten(0, rows.shape)
        ids = self.to_device(ids)
        return ids[..., :-1].contiguous(), ids[..., 1:].contiguous()


def every_token_once(tokens, seq_len, batch, rank=0, world=1, limit=0):
    """(inputs, targets) over the whole split in order, each (batch, seq_len) int64: every token but the first is a target once.

    What lies past the end is filled with targets of -100, so that shapes never change. Ranks take turns. limit: stop after so
    many tokens, 0 for all.
    """
    total = min(len(tokens) - 1, limit or len(tokens))
    windows = range(0, total, seq_len)
    for first in range(rank * batch, len(windows), world * batch):
        rows = np.full((batch, seq_len + 1), -100, dtype=np.int64)
        for row, start in zip(rows, windows[first:first + batch]):
            count = min(seq_len, total - start) + 1
            row[:count] = tokens.read(start, count)
        ids = torch.from_numpy(rows)
        yield ids[:, :-1].clamp(min=0), ids[:, 1:]


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
