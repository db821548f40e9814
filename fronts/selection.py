"""selection.py - Pareto high-quality data (ParetoHqD, arXiv:2504.16628): which of R scored responses a preference is
trained on.

R: responses, each a point   m: dimensions   points: (R, m) scores, larger is better
F: preferences lams (F, m) on the simplex   k: points per preference   unit: (R, m) points, 1 being the ideal
"""
from dataclasses import dataclass

import numpy as np

from fronts.dominance import nondominated_layers


@dataclass
class Selection:
    """What select_high_quality returns: k points for each of F preferences ("all": R in the place of k)."""

    index: np.ndarray       # (F, k) int64: the chosen points, the best first
    distance: np.ndarray    # (F, k): from each of them to its preference's direction, in normalised scores
    pool: np.ndarray        # int64, ascending: the points that were chosen from
    layers: int             # how many non-dominated layers the pool holds; 0 where nothing was sorted
    low: np.ndarray         # (m,) the score that is normalised to 0
    high: np.ndarray        # (m,) to 1: the ideal point
    overlap: np.ndarray     # (F − 1,) the part of their points that neighbouring preferences have in common


def score_ranges(points):
    """The least and the largest score of every objective -> low (m,), high (m,). Raises ValueError for no points, and
    where an objective does not vary."""
    Y = np.asarray(points, dtype=float)
    if len(Y) == 0:
        raise ValueError("no points: they have no range")
    low, high = Y.min(0), Y.max(0)
    for j in np.flatnonzero(~((low < high) & np.isfinite(high - low))):
        raise ValueError(f"objective {j} has no range: its scores go from {low[j]:g} to {high[j]:g}")
    return low, high


def direction_distance(unit, lam):
    """The distance of normalised points from a preference's direction. unit (R, m), lam (m,) -> (R,)

    The direction is the ray from the ideal point 1 through W(λ) = λ, so v = λ − 1 (r^max and W of the paper after
    (R − r^min) / (r^max − r^min)). The paper has no formula for the distance; # not in paper: the natural one is

        t = max(0, (unit − 1)·v / ‖v‖²),   d = ‖(unit − 1) − t v‖₂

    A point beyond the ideal is as far as it is from the ideal point: a ray, not a line.
    Raises ValueError unless m ≥ 2 and lam is on the simplex.
    """
    unit, lam = np.asarray(unit, dtype=float), np.asarray(lam, dtype=float)
    if lam.shape != unit.shape[1:] or len(lam) < 2 or lam.min() < 0 or not abs(lam.sum() - 1) < 1e-6:
        raise ValueError(f"{lam.tolist()} is not a preference among {unit.shape[-1]} objectives: as many weights, two "
                         "or more, none of them negative, that sum to 1")
    v, offset = lam - 1, unit - 1
    t = np.maximum((offset * v).sum(1) / (v ** 2).sum(), 0)       # not offset @ v: equal rows must give equal numbers
    return np.linalg.norm(offset - t[:, None] * v, axis=1)


def select_high_quality(points, lams, k=100, at_least=None, rule="directions"):
    """The k points that each preference is trained on. points: scores (R, m), lams (F, m) -> Selection

    rule "directions" is ParetoHqD: of the first non-dominated layers of all points (the pool), the k nearest to the
    preference's direction, in scores that are normalised by score_ranges. How many layers the paper does not say; # not
    in paper: layers are peeled until the pool has `at_least` points (default 10 k), and never fewer than k.
    The paper's ablations: "linear" takes the k points of all R with the largest Σ λ_i unit_i; "all" takes every point,
    in the order of the data, for every preference: index is then (F, R), a read-only view.
    Of equally good points (to 12 decimals) those of lower index come first. Raises ValueError if R < k, for an unknown
    rule, a NaN, an objective without a range, or lams that are no preferences.
    """
    Y, lams = np.asarray(points, dtype=float), np.atleast_2d(np.asarray(lams, dtype=float))
    n = len(Y)
    if not 1 <= k <= n and rule != "all":
        raise ValueError(f"k = {k} points for a preference out of {n}")
    low, high = score_ranges(Y)
    unit = (Y - low) / (high - low)
    pool, layers = np.arange(n), 0
    if rule == "directions":
        layer = nondominated_layers(Y, max(k, at_least or 10 * k))
        pool, layers = np.flatnonzero(layer >= 0), int(layer.max()) + 1
        index = np.stack([pool[_smallest(direction_distance(unit[pool], lam), k)] for lam in lams])
    elif rule == "linear":
        index = np.stack([_smallest(-(unit * lam).sum(1), k) for lam in lams])
    elif rule == "all":
        index = np.broadcast_to(pool, (len(lams), n))
    else:
        raise ValueError(f"rule is {rule!r}, must be 'directions', 'linear' or 'all'")
    distance = np.stack([direction_distance(unit[chosen], lam) for chosen, lam in zip(index, lams)])
    overlap = np.array([np.isin(a, b).mean() for a, b in zip(index, index[1:])])
    return Selection(index, distance, pool, layers, low, high, overlap)


def _smallest(values, k):
    """The indices of the k smallest values, in ascending order; of equal values (to 12 decimals) the first."""
    values = np.round(values, 12)                             # what is equal but for rounding errors is equal
    candidates = np.flatnonzero(values <= np.partition(values, k - 1)[k - 1])
    return candidates[np.argsort(values[candidates], kind="stable")[:k]]
