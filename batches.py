"""Token shards -> batches: pure functions of (seed, step), the same for any number of processes.

    batches = Batches(open_split("data/c4", "train"), seed, seq_len, batch_size, micro_batch)
    inputs, targets = batches(step)                # of SampleBatches: inputs, targets, weights
"""
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch

from config import need

SORTED_STEPS = 32  # their samples are sorted by length, so that a micro-batch holds similar ones


class Prefetcher:
    """batches(step) returns self.load(step), this process's part; a thread loads the next step."""

    def __init__(self, data, seed, seq_len, batch_size, micro_batch, device="cpu", rank=0, world=1):
        self.data, self.seed, self.seq_len, self.batch_size = data, seed, seq_len, batch_size
        self.micro_batch, self.rank, self.world = micro_batch, rank, world
        self.device, self.pool, self.loading = torch.device(device), ThreadPoolExecutor(1), {}
        self.epoch_order = lru_cache(2)(self._epoch_order)

    def own_rows(self, rows):
        """This process's part (accumulation, micro_batch) of the (batch_size,) rows of a step."""
        # the rows of a micro-step are consecutive, over all processes
        return rows.reshape(-1, self.world, self.micro_batch)[:, self.rank]

    def to_device(self, ids):
        if self.device.type == "cuda":
            return ids.pin_memory().to(self.device, non_blocking=True)
        return ids.to(self.device)

    def __call__(self, step):
        future = self.loading.get(step) or self.pool.submit(self.load, step)
        self.loading = {step + 1: self.pool.submit(self.load, step + 1)}
        return future.result()


class Batches(Prefetcher):
    """Training batches of text: in every epoch all windows of seq_len tokens once, shuffled."""

    def __init__(self, tokens, *settings, **options):
        super().__init__(tokens, *settings, **options)
        self.windows = (len(tokens) - 1) // self.seq_len
        need(self.windows > 0, f"{tokens.folder} has {len(tokens)} {tokens.split} tokens, fewer "
             f"than one window of seq_len {self.seq_len} + 1")
        self.steps_per_epoch = self.windows / self.batch_size
        self.tokens_per_step = self.batch_size * self.seq_len
        self.description = f"{self.batch_size} x {self.seq_len} = {self.tokens_per_step:,} tokens"

    def _epoch_order(self, epoch):
        return np.random.default_rng((self.seed, epoch)).permutation(self.windows)

    def count_tokens(self, step):
        return self.tokens_per_step

    def window(self, index):
        """The ids (seq_len + 1,) of the index-th window of the run; index counts across epochs."""
        epoch, position = divmod(index, self.windows)
        window = int(self.epoch_order(epoch)[position])
        return self.data.read(window * self.seq_len, self.seq_len + 1)

    def load(self, step):
        """(inputs, targets) of this process, each (accumulation, micro_batch, seq_len) int64."""
        indices = self.own_rows(step * self.batch_size + np.arange(self.batch_size))
        windows = np.stack([self.window(int(index)) for index in indices.ravel()])
        ids = self.to_device(torch.from_numpy(windows).unflatten(0, indices.shape))
        return ids[..., :-1].contiguous(), ids[..., 1:].contiguous()


class SampleBatches(Prefetcher):
    """Training batches of whole samples, each at most once per epoch. Every epoch is shuffled anew
    and, SORTED_STEPS at a time, sorted by length; its last, incomplete batch is left out."""

    def __init__(self, samples, *settings, **options):
        super().__init__(samples, *settings, **options)
        samples.must_fit(self.seq_len)
        self.steps_per_epoch = len(samples.lengths) // self.batch_size
        need(self.steps_per_epoch, f"{samples.folder} has {len(samples.lengths)} {samples.split} "
             f"samples, fewer than batch_size {self.batch_size}")
        first = self.epoch_order(0)
        self.tokens_per_step = float(samples.lengths[first].sum(1).mean()) - self.batch_size
        longest = samples.lengths[first].reshape(-1, self.micro_batch).max(1)
        padded_tokens = float(samples.padded_length(longest, self.seq_len).sum() * self.micro_batch)
        self.padding = 1 - self.tokens_per_step * self.steps_per_epoch / padded_tokens
        self.description = (f"{self.batch_size} samples, {self.tokens_per_step:,.0f} tokens on "
                            f"average and {self.padding:.1%} of padding,")

    def _epoch_order(self, epoch):
        """The samples (steps_per_epoch, batch_size) of an epoch, as indices."""
        generator, lengths = np.random.default_rng((self.seed, epoch)), self.data.lengths
        shuffled = generator.permutation(len(lengths))[:self.steps_per_epoch * self.batch_size]
        parts, size = [], SORTED_STEPS * self.batch_size
        for part in (shuffled[i:i + size] for i in range(0, len(shuffled), size)):
            by_length = part[np.argsort(lengths[part], kind="stable")]
            parts.append(generator.permutation(by_length.reshape(-1, self.batch_size)))
        return np.concatenate(parts)

    def samples_of(self, step):
        """The samples (batch_size,) of a step over all processes, as indices."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self.epoch_order(epoch)[position]

    def count_tokens(self, step):
        """Tokens of a step over all processes, without padding."""
        return int(self.data.lengths[self.samples_of(step)].sum()) - self.batch_size

    def load(self, step):
        """(inputs, targets, weights) of this process: lists with one entry per micro-batch.
        Inputs and targets are (micro_batch, padded length) int64. A weight is the micro-batch's
        number of learned tokens, divided by the mean over the step's micro-batches: so the mean
        weighted loss is that of the global batch's learned tokens, whatever the micro-batches."""
        every, learned = self.samples_of(step), self.data.learned
        own = self.own_rows(every)
        mean_learned = learned[every].sum() / (self.batch_size // self.micro_batch)
        rows = (self.data.rows(which, self.seq_len) for which in own)
        inputs, targets = ([*map(self.to_device, parts)] for parts in zip(*rows, strict=True))
        return inputs, targets, (learned[own].sum(1) / mean_learned).tolist()


def every_token_once(tokens, seq_len, batch, rank=0, world=1, limit=0):
    """Yield (inputs, targets) of a whole split in order, each (batch, seq_len) int64.
    Every token but the first is a target once. Shapes never change: what lies past the end has the
    target -100. Processes take turns and get equally many. limit: of tokens; 0: no limit."""
    total = min(len(tokens) - 1, limit or len(tokens))
    windows = range(0, total, seq_len)
    for index in range(rank * batch, len(windows) + rank * batch, world * batch):
        ids = torch.full((batch, seq_len + 1), -100)
        for row, position in enumerate(windows[index:index + batch]):
            count = min(seq_len, total - position) + 1
            ids[row, :count] = torch.from_numpy(tokens.read(position, count))
        yield ids[:, :-1].clamp(min=0), ids[:, 1:]


def every_sample_once(samples, seq_len, batch, rank=0, world=1, limit=0):
    """Yield (inputs, targets) of a whole split, each (batch, padded length) int64, shortest first.
    Processes take turns and get equally many. limit: of the first samples' tokens; 0: no limit."""
    samples.must_fit(seq_len)
    count = max(1, int(np.searchsorted(samples.sample_starts[1:], limit or len(samples), "right")))
    order = np.argsort(samples.lengths[:count], kind="stable")
    for index in range(rank * batch, count + rank * batch, world * batch):
        yield samples.rows(order[index:index + batch], seq_len, batch)
