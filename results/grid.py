"""Grids of two rates that grow until their best point has worse neighbours, for plans of sweep.py.

A point (i, j) is 2^i times the centre's lr and 2^j times its rest_lr. A method's matrices learn at
lr, embeddings, head and norms at rest_lr.
"""
import itertools
import math

import rates

REACH = range(-5, 6)


def rates_at(centre, point):
    """Return (lr, rest_lr) of a point; centre: those of (0, 0)."""
    return tuple(rate * 2.0 ** step for rate, step in zip(centre, point, strict=True))


def tried(name_of, records):
    """Return {point: perplexity} of the runs that ended, infinite if one diverged; name_of(point):
    the name of its run; records: {name: record}."""
    perplexities = {}
    for point in itertools.product(REACH, REACH):
        record = records.get(name_of(point), {})
        if rates.diverged(record):
            perplexities[point] = math.inf
        elif "val_ppl" in record:
            perplexities[point] = record["val_ppl"]
    return perplexities


def neighbours(point, has_lr=True):
    """Return the points that close a grid around its best; has_lr: whether lr trains anything."""
    i, j = point
    beside = [(i, j + 1), (i, j - 1)]
    if has_lr:
        beside += [(i + 1, j), (i - 1, j)]
    return beside


def search(name_of, records, has_lr=True):
    """Return (the best point, those of it and its neighbours that have not been tried); before the
    centre has been tried, only the centre."""
    perplexities = tried(name_of, records)
    if perplexities and (0, 0) not in perplexities:  # the centre was moved
        return (0, 0), [(0, 0)]
    best = min(perplexities, key=perplexities.get, default=(0, 0))  # all diverged: the lowest lr
    cross = [best, *neighbours(best, has_lr)]
    return best, [point for point in cross if point not in perplexities]
