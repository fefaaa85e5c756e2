"""Draw the learning rate of every step of a run.

    python analyze.py schedule configs/250m_remora.py --png=docs/schedule.png
"""
import dataclasses

from analyze import picture
from batches import Batches, SampleBatches
from config import UserError, as_user_error, load
from optimizer import learning_rate
from shards import Samples, open_split


def with_steps(cfg):
    """The config with the number of steps that train.py derives from `epochs`."""
    if not cfg.epochs:
        return cfg
    with as_user_error(f"epochs = {cfg.epochs:g} need the data, or set --steps=N", UserError):
        split = open_split(cfg.data, "train", verify=False)
    make_batches = SampleBatches if isinstance(split, Samples) else Batches
    batches = make_batches(split, cfg.seed, cfg.seq_len, cfg.batch_size, cfg.batch_size)
    return dataclasses.replace(cfg, steps=max(1, round(cfg.epochs * batches.steps_per_epoch)))


def draw(file, words):
    """Draw the schedule of the run that `train.py words` would start."""
    cfg = with_steps(load(words, None))
    rates = [learning_rate(step, cfg) for step in range(cfg.steps)]
    with picture(file, figsize=(8, 3)) as ((axis,),):
        axis.plot(rates, linewidth=1, label=f"restarts: {cfg.cycle(cfg.steps - 1)[0]}")
        axis.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
