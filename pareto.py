"""pareto.py - the geometry of fronts: pure functions on sets of points, larger is better. No model, no file.

N: points   m: dimensions   points: (N, m)   lams: (N, m) the preference that each point was reached at
"""
import numpy as np


def nondominated(points):
    """Which points no other dominates (at least as good everywhere and better somewhere). (N, m) -> (N,) bool.

    Equal points do not dominate each other: duplicates of a non-dominated point are all kept.
    """
    P = np.asarray(points, dtype=float)
    keep = np.ones(len(P), dtype=bool)
    for i, p in enumerate(P):
        keep[i] = not ((P >= p).all(1) & (P > p).any(1)).any()
    return keep


def hypervolume(points, reference):
    """The volume that is dominated by `points` and dominates `reference`: HV = measure of ∪_i [reference, ξ^i].

    points (N, m), reference (m,); exact, for any m. Points not better than the reference everywhere add nothing.
    """
    P, z = np.asarray(points, dtype=float), np.asarray(reference, dtype=float)
    P = P[(P > z).all(1)] - z
    return float(_volume(P[nondominated(P)])) if len(P) else 0.0


def _volume(P):
    """Hypervolume over the origin of non-dominated points, slicing off one dimension at a time (m ≤ 2: of any points).

    In ascending order of the last coordinate, what point p adds to the points after it is a slab of height p_m: its
    box in the other m − 1 dimensions, less the part of that box which the later points cover (all of them are taller).
    """
    if P.shape[1] == 1:
        return P.max()
    if P.shape[1] == 2:                                                               # a staircase
        P = P[np.lexsort((-P[:, 1], -P[:, 0]))]
        top = np.maximum.accumulate(P[:, 1])
        return (P[:, 0] * np.diff(top, prepend=0.0)).sum()
    P, total = P[np.argsort(P[:, -1], kind="stable")], 0.0
    for i, p in enumerate(P):
        covered = np.minimum(P[i + 1:, :-1], p[:-1])
        if len(p) > 3:                                                                # the staircase needs no filter
            covered = covered[nondominated(covered)]
        total += p[-1] * (p[:-1].prod() - (_volume(covered) if len(covered) else 0.0))
    return total


def inner_product(lams, points):
    """IP = (1/N) Σ_i ⟨λ^i, ξ^i⟩: whether the points follow the preferences."""
    return float((np.asarray(lams) * np.asarray(points)).sum(1).mean())


def sparsity(points):
    """1/(m(N−1)) Σ_j Σ_i (gap between neighbours on objective j)²; smaller is denser.

    For m = 2 and non-dominated points this is 1/(m(N−1)) Σ_i ‖ξ^i − ξ^{i+1}‖²; the form by objectives carries over to
    m > 2, where points have no one order. Dominated points are not removed here. 0 for a single point.
    """
    P = np.sort(np.asarray(points, dtype=float), axis=0)
    return float((np.diff(P, axis=0) ** 2).sum() / (P.shape[1] * (len(P) - 1))) if len(P) > 1 else 0.0


def spacing(points, p=2):
    """sqrt( (1/N) Σ_i (d_i − d̄)² ), d_i the distance to the nearest other point (p-norm); 0 when evenly spread."""
    P = np.asarray(points, dtype=float)
    if len(P) < 2:
        return 0.0
    distance = np.linalg.norm(P[:, None] - P[None], ord=p, axis=-1) + np.diag(np.full(len(P), np.inf))
    return float(distance.min(1).std())


def spearman(x, y):
    """Rank correlation; ties share their mean rank. 0 where one of the two is constant."""
    rank = lambda v: np.array([(v < a).sum() + ((v == a).sum() - 1) / 2 for a in v])
    a, b = rank(np.asarray(x)), rank(np.asarray(y))
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else 0.0
