"""Token shards -> batches: pure functions of (seed, step), the same for any number of processes.

    batches = Batches(open_split("data/c4", "train"), seed, seq_len, batch_size, micro_batch)
    inputs, targets = batches(step)

    samples = open_split("data/gsm8k", "train")
    batches = SampleBatches(samples, seed, seq_len, batch_size, micro_batch)
    inputs, targets, weights = batches(step)

every_token_once and every_sample_once read a whole split for an evaluation.
"""
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch

from config import UserError

SORTED_STEPS = 32  # the samples of this many steps are sorted by length together


class Prefetcher:
    """batches(step) returns self.load(step); a thread loads the next step meanwhile.

    rank, world: this process's number, and the number of processes.
    """

    def __init__(self, seed, seq_len, batch_size, micro_batch, device, rank, world):
        self.seed, self.seq_len, self.batch_size = seed, seq_len, batch_size
        self.micro_batch, self.rank, self.world = micro_batch, rank, world
        self.device, self.pool, self.loading = torch.device(device), ThreadPoolExecutor(1), {}

    def own_rows(self, rows):
        """This process's part (accumulation, micro_batch) of the (batch_size,) rows of a step.

        The rows of a micro-step are consecutive, over all processes.
        """
        return rows.reshape(-1, self.world, self.micro_batch)[:, self.rank]

    def to_device(self, ids):
        if self.device.type == "cuda":
            return ids.pin_memory().to(self.device, non_blocking=True)
        return ids.to(self.device)

    def __call__(self, step):
        future = self.loading.pop(step, None)
        batch = future.result() if future else self.load(step)
        self.loading = {step + 1: self.pool.submit(self.load, step + 1)}
        return batch


class Batches(Prefetcher):
    """Training batches of text: in every epoch all windows, each once, shuffled.

    Window i is tokens[i * seq_len : (i + 1) * seq_len]; its targets are one token further.
    """

    def __init__(self, tokens, seed, seq_len, batch_size, micro_batch, device="cpu", rank=0,
                 world=1):
        super().__init__(seed, seq_len, batch_size, micro_batch, device, rank, world)
        self.tokens, self.windows = tokens, (len(tokens) - 1) // seq_len
        if self.windows < 1:
            raise UserError(f"{tokens.folder} has {len(tokens)} {tokens.split} tokens, fewer than "
                            f"one window of seq_len {seq_len} + 1")
        self.order = lru_cache(2)(self._order)
        self.steps_an_epoch = self.windows / batch_size
        self.tokens_a_step = batch_size * seq_len
        self.description = f"{batch_size} x {seq_len} = {self.tokens_a_step:,} tokens"

    def _order(self, epoch):
        return np.random.default_rng((self.seed, epoch)).permutation(self.windows)

    def size(self, step):
        """Tokens of a step, over all processes."""
        return self.tokens_a_step

    def window(self, index):
        """The ids (seq_len + 1,) of the index-th window of the run; index counts across epochs."""
        epoch, position = divmod(index, self.windows)
        return self.tokens.read(int(self.order(epoch)[position]) * self.seq_len, self.seq_len + 1)

    def load(self, step):
        """(inputs, targets) of this process, each (accumulation, micro_batch, seq_len) int64."""
        indices = self.own_rows(step * self.batch_size + np.arange(self.batch_size))
        windows = np.stack([self.window(int(index)) for index in indices.ravel()])
        ids = self.to_device(torch.from_numpy(windows).unflatten(0, indices.shape))
        return ids[..., :-1].contiguous(), ids[..., 1:].contiguous()


def every_token_once(tokens, seq_len, batch, rank=0, world=1, limit=0):
    """Yield (inputs, targets) of a whole split in order, each (batch, seq_len) int64.

    Every token but the first is a target once. Shapes never change: what lies past the end has the
    target -100. Processes take turns. limit: stop after this number of tokens; 0: no limit.
    """
    total = min(len(tokens) - 1, limit or len(tokens))
    windows = range(0, total, seq_len)
    for index in range(rank * batch, len(windows) + rank * batch, world * batch):
        ids = np.full((batch, seq_len + 1), -100, dtype=np.int64)
        for row, position in enumerate(windows[index:index + batch]):
            count = min(seq_len, total - position) + 1
            ids[row, :count] = tokens.read(position, count)
        ids = torch.from_numpy(ids)
        yield ids[:, :-1].clamp(min=0), ids[:, 1:]


class SampleBatches(Prefetcher):
    """Training batches of whole samples, each sample at most once per epoch.

    An epoch is shuffled. Its last, incomplete batch is left out, a different one each epoch. The
    samples of every SORTED_STEPS steps are sorted by length and cut into batches, and these are
    shuffled again. So the micro-batches of a step hold samples of similar length.
    """

    def __init__(self, samples, seed, seq_len, batch_size, micro_batch, device="cpu", rank=0,
                 world=1):
        super().__init__(seed, seq_len, batch_size, micro_batch, device, rank, world)
        samples.must_fit(seq_len)
        self.samples, self.steps_an_epoch = samples, len(samples.lengths) // batch_size
        if not self.steps_an_epoch:
            raise UserError(f"{samples.folder} has {len(samples.lengths)} {samples.split} samples, "
                            f"fewer than batch_size {batch_size}")
        self.plan = lru_cache(2)(self._plan)
        first_epoch = self.plan(0)
        self.tokens_a_step = float(samples.lengths[first_epoch].sum(1).mean()) - batch_size
        padded_tokens = float(self._padded_lengths(first_epoch).sum() * micro_batch)
        self.padding = 1 - self.tokens_a_step * self.steps_an_epoch / padded_tokens
        self.description = (f"{batch_size} samples, {self.tokens_a_step:,.0f} tokens on average "
                            f"and {self.padding:.1%} of padding,")

    def _plan(self, epoch):
        """The samples (steps, batch_size) of an epoch, as indices."""
        generator = np.random.default_rng((self.seed, epoch))
        shuffled = generator.permutation(len(self.samples.lengths))
        used, together = self.steps_an_epoch * self.batch_size, SORTED_STEPS * self.batch_size
        parts = []
        for position in range(0, used, together):
            part = shuffled[position:min(position + together, used)]
            by_length = part[np.argsort(self.samples.lengths[part], kind="stable")]
            parts.append(generator.permutation(by_length.reshape(-1, self.batch_size)))
        return np.concatenate(parts)

    def _padded_lengths(self, which):
        """The padded length of each micro-batch of the samples (..., batch_size)."""
        longest = self.samples.lengths[which].reshape(-1, self.micro_batch).max(1)
        return self.samples.padded(longest, self.seq_len)

    def step(self, step):
        """The samples (batch_size,) of a step over all processes, as indices."""
        epoch, position = divmod(step, self.steps_an_epoch)
        return self.plan(epoch)[position]

    def size(self, step):
        """Tokens of a step over all processes, without padding."""
        return int(self.samples.lengths[self.step(step)].sum()) - self.batch_size

    def load(self, step):
        """(inputs, targets, weights) of this process: lists with one entry per micro-batch.

        Inputs and targets are (micro_batch, padded length) int64. A weight is the micro-batch's
        number of learned tokens, divided by the mean over the step's micro-batches. So the mean of
        the weighted losses, over micro-batches and processes, is the mean loss of the global
        batch's learned tokens, whatever the split into micro-batches.
        """
        every, learned = self.step(step), self.samples.learned
        own = self.own_rows(every)
        mean_learned = learned[every].sum() / (self.batch_size // self.micro_batch)
        inputs, targets = [], []
        for which, length in zip(own, self._padded_lengths(own), strict=True):
            micro_inputs, micro_targets = self.samples.rows(which, int(length))
            inputs.append(self.to_device(micro_inputs))
            targets.append(self.to_device(micro_targets))
        return inputs, targets, (learned[own].sum(1) / mean_learned).tolist()


def every_sample_once(samples, seq_len, batch, rank=0, world=1, limit=0):
    """Yield (inputs, targets) of a whole split, shortest samples first.

    Each is (batch, padded length) int64. Processes take turns. limit: only the first samples of the
    split, up to this number of tokens; 0: no limit.
    """
    samples.must_fit(seq_len)
    count = len(samples.lengths)
    if limit:
        count = max(1, int(np.searchsorted(samples.sample_starts[1:], limit, "right")))
    order = np.argsort(samples.lengths[:count], kind="stable")
    for index in range(rank * batch, count + rank * batch, world * batch):
        which = order[index:index + batch]
        length = int(samples.padded(samples.lengths[order[:index + batch][-1]], seq_len))
        yield samples.rows(which, length, batch)
