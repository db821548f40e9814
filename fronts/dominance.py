"""dominance.py - which points of a set no other beats: pure functions on sets of points, larger is better.

p dominates q: p is at least as good as q in every dimension and better in one.
F: points   m: dimensions   points: (F, m)
"""
from bisect import bisect_right

import numpy as np

BLOCK = 512             # points that are compared with a front at once: the table of comparisons stays in the cache


def nondominated(points):
    """Which points no other dominates (at least as good everywhere and better somewhere). (F, m) -> (F,) bool.

    Equal points do not dominate each other: duplicates of a non-dominated point are all kept. The cost, and the
    ValueError for a NaN, are those of nondominated_layers.
    """
    return nondominated_layers(points, at_least=1) == 0


def nondominated_layers(points, at_least=None):
    """Non-dominated sorting: 0 for the first front, 1 for the front of what is left then, ... (F, m) -> (F,) int64

    The peeling stops after the first layer that brings the peeled points to `at_least`; the points behind get -1.
    Duplicates share a layer. Raises ValueError if a point has a NaN.

    m ≤ 2: one sweep gives all layers, O(F log F). m ≥ 3: blocks of points in an order in which nobody dominates an
    earlier point, against the layers so far (efficient non-dominated sort, Zhang et al., IEEE TEC 19(2), 2015):
    O(F m · points in the layers asked for) at worst. With `at_least` nearly all points fall to a single comparison with
    the last layer that is asked for.
    """
    Y = np.asarray(points, dtype=float)
    if np.isnan(Y).any():
        raise ValueError("a point has a NaN: it can neither dominate nor be dominated")
    if len(Y) == 0:
        return np.zeros(0, dtype=np.int64)
    # Dominance asks for the order of the values alone, so small integers will do. Equal points are sorted once.
    ranks = np.stack([np.unique(column, return_inverse=True)[1] for column in Y.T], 1).astype(np.int32)     # (F, m)
    order = np.lexsort(ranks.T[::-1])
    first = np.append(True, (np.diff(ranks[order], axis=0) != 0).any(1))
    which = np.empty(len(Y), dtype=np.int64)
    which[order] = first.cumsum() - 1                                                   # point -> distinct point
    ranks, copies = ranks[order[first]], np.bincount(which)

    layer = _sweep_layers(ranks) if Y.shape[1] <= 2 else _block_layers(ranks, copies, at_least)
    layer[layer >= _layers_asked_for(np.bincount(layer[layer >= 0], copies[layer >= 0]), at_least)] = -1
    return layer[which]


def _layers_asked_for(sizes, at_least):
    """How many of the layers with these sizes are peeled; infinity where they are too few to tell."""
    held = np.cumsum(sizes)
    enough = at_least is not None and len(held) and held[-1] >= at_least
    return np.searchsorted(held, at_least) + 1 if enough else np.inf


def _sweep_layers(ranks):
    """All layers of distinct points in ascending lexicographic order, m ≤ 2. (n, m) -> (n,)

    From the right to the left, a point is dominated by a layer if the layer's top is as high as the point. Each top
    is above the tops of the layers behind it, so the first layer that does not dominate is found by bisection.
    """
    layer, below_zero = np.empty(len(ranks), dtype=np.int64), []              # -top of every layer, ascending
    for i, y in zip(range(len(ranks) - 1, -1, -1), ranks[::-1, -1].tolist()):
        t = bisect_right(below_zero, -y)
        below_zero[t:t + 1] = [-y]                                            # the layer's new top, or a new layer
        layer[i] = t
    return layer


def _block_layers(ranks, copies, at_least):
    """The layers that are asked for, of n distinct points: ranks (n, m), how many copies (n,) -> (n,), -1 behind."""
    layer, fronts = np.full(len(ranks), -1), []                               # fronts: the members of every layer
    order = np.argsort(-ranks.sum(1), kind="stable")                          # who dominates has the larger sum
    columns, stop = np.ascontiguousarray(ranks.T), np.inf
    for start in range(0, len(order), BLOCK):
        rest, t = order[start:start + BLOCK], 0
        if len(fronts) >= stop:                                               # behind the last layer: out at once
            rest = rest[~_under(columns, rest, fronts[stop - 1])]
        while len(rest) and t < stop:
            if t == len(fronts):
                fronts.append(rest[:0])
            behind = _under(columns, rest, fronts[t])
            free = rest[~behind]                        # of these, those that another of the block dominates go behind
            behind[~behind] = inner = _under(columns, free, free)
            layer[free[~inner]] = t
            fronts[t] = np.append(fronts[t], free[~inner])
            rest, t = rest[behind], t + 1
        stop = _layers_asked_for([copies[front].sum() for front in fronts], at_least)
    return layer


def _under(columns, some, others):
    """Which of `some` distinct points are dominated by one of `others`. columns: (m, n), indices (a,), (b,) -> (a,)"""
    under = np.zeros(len(some), dtype=bool)
    for start in range(0, len(others), BLOCK):
        left = np.flatnonzero(~under)
        a, b = some[left], others[start:start + BLOCK]
        table = a[:, None] != b                                               # (a, b)
        for column in columns:
            table &= column[a][:, None] <= column[b]
        under[left] = table.any(1)
    return under
