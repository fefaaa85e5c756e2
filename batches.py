"""Token shards -> batches: memory-mapped, a pure function of (seed, step), the same for any number of processes."""
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from config import UserError
from data import read_manifest


class Tokens:
    """One split as one long, memory-mapped sequence of token ids."""
    kind, id_bits = "text", 0xffffffff

    def __init__(self, folder, split, verify=True):
        """verify: compare every shard with its checksum (a few GB/s); sizes are always compared."""
        self.folder, self.split, manifest = Path(folder), split, read_manifest(folder)
        self.totals, self.vocab_size, self.tokenizer = manifest["splits"][split], manifest["vocab_size"], manifest["tokenizer"]
        shards, dtype = self.totals["shards"], np.dtype(manifest["dtype"])
        self.manifest, found = manifest, manifest.get("kind", "text")
        if found != self.kind:
            raise UserError(f"{folder} holds {found}, {self.kind} is needed: `python data.py text` prepares text, `python data.py sft` samples")
        if not shards:
            raise UserError(f"{folder} has no {split} documents" + (": prepare it again with --val FILES" if split == "val" else ""))
        for shard in shards:
            path = self.folder / shard["file"]
            expected, found = shard["tokens"] * dtype.itemsize, path.stat().st_size if path.exists() else "none"
            if found != expected:
                raise UserError(f"{path} should hold {expected} bytes and holds {found}: {self._advice()}")
        self.shards = [np.memmap(self.folder / shard["file"], dtype, mode="r") for shard in shards]
        self.starts = np.cumsum([0] + [len(shard) for shard in self.shards])
        if verify:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for shard, crc in zip(shards, pool.map(_crc32, self.shards)):
                    if crc != shard["crc32"]:
                        raise UserError(f"{self.folder / shard['file']} is corrupt (checksum {crc}, expected {shard['crc32']}): "
                                        f"{self._advice()}")

    def must_suit(self, model, tok, where):
        """Raise UserError if a model, or the tokenizer it speaks (None: unknown), can not be used with these tokens."""
        if tok and tok.name != self.tokenizer:
            raise UserError(f"{where} speaks {tok.name}, {self.folder} is written in {self.tokenizer}: prepare the text again, "
                            f"with --tokenizer={where if tok.name.startswith('tokenizer.json:') else tok.name}")
        if self.vocab_size > model.cfg.vocab_size:
            raise UserError(f"{self.folder} has a vocabulary of {self.vocab_size}, {where} knows {model.cfg.vocab_size} tokens")

    def _advice(self):
        return f"remove {self.folder} and prepare it again"

    def __len__(self):
        return int(self.starts[-1])

    def read(self, start, count):
        """Ids start ... start + count - 1 as int64, across shards."""
        ids = self.words(start, count).astype(np.int64) & self.id_bits
        if ids.max() >= self.vocab_size:
            raise UserError(f"{self.folder}: token id {ids.max()} lies outside the vocabulary of {self.vocab_size}: {self._advice()}")
        return ids

    def words(self, start, count):
        """The same as they are stored."""
        parts, shard = [], int(np.searchsorted(self.starts, start, "right")) - 1
        while count > 0:
            offset = start - self.starts[shard]
            part = self.shards[shard][offset:offset + count]
            parts.append(part)
            start, count, shard = start + len(part), count - len(part), shard + 1
        return np.concatenate(parts)


def _crc32(shard, block=2 ** 26):
    crc = 0
    for start in range(0, len(shard), block):
        crc = zlib.crc32(shard[start:start + block], crc)
    return crc


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
