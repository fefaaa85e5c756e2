"""Grids of two rates that grow until their best point has worse neighbours, for plans of sweep.py.

A point (i, j) is 2^i times the centre's lr and 2^j times its rest_lr. A method's matrices learn at
lr, embeddings, head and norms at rest_lr.
"""
import math

import rates

REACH = range(-5, 6)


def rates_at(centre, point):
    """Return (lr, rest_lr) of a point; centre: those of (0, 0)."""
    return tuple(rate * 2.0 ** step for rate, step in zip(centre, point, strict=True))


def tried(name_of, records):
    """Return {point: perplexity} of the runs that ended, infinite if one diverged.

    name_of(point): the name of its run in the grid. records: {name: record}.
    """
    names = {(i, j): name_of((i, j)) for i in REACH for j in REACH}
    found = {point: records[name] for point, name in names.items() if name in records}
    return {point: record.get("val_ppl", math.inf) for point, record in found.items()
            if rates.diverged(record) or "error" not in record}


def search(name_of, records, has_lr=True):
    """Return (the best point, those of it and its neighbours that have not been tried)."""
    scores = tried(name_of, records)
    i, j = best = min(scores, key=scores.get, default=(0, 0))
    cross = [best, (i, j + 1), (i, j - 1)] + has_lr * [(i + 1, j), (i - 1, j)]
    return best, [point for point in cross if point not in scores]
