"""pareto.py - the geometry of fronts: pure functions on sets of points, larger is better. No model, no file.

    dominance     nondominated, nondominated_layers: fronts, and the fronts behind them, of 100 000 points
    metrics       hypervolume (exact), inner_product, sparsity, spacing, spearman
    selection     score_ranges, direction_distance, select_high_quality: which points of a data set serve a preference
                  (ParetoHqD, arXiv:2504.16628: preference directions and Pareto high-quality data)

N: points   m: dimensions   points: (N, m)   lams: (N, m) the preference that each point was reached at
In the selection: G preferences lams (G, m) on the simplex, k points for each, X: points normalised so that 1 is ideal.
"""
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

# ---------------------------------------------------------------------------------------------------------------------
# Dominance. p dominates q: at least as good everywhere and better somewhere.

BLOCK = 512             # points that are compared with a front at once: the table of comparisons stays in the cache


def nondominated(points):
    """Which points no other dominates (at least as good everywhere and better somewhere). (N, m) -> (N,) bool.

    Equal points do not dominate each other: duplicates of a non-dominated point are all kept. The cost, and the
    ValueError for a NaN, are those of nondominated_layers.
    """
    return nondominated_layers(points, most_layers=1) == 0


def nondominated_layers(points, at_least=None, most_layers=None):
    """Non-dominated sorting: 0 for the first front, 1 for the front of what is left then, ... (N, m) -> (N,) int64

    The peeling stops after the first layer that brings the peeled points to `at_least`, or after `most_layers` layers,
    whichever is first; the points behind get -1. Duplicates share a layer. Raises ValueError if a point has a NaN.

    m ≤ 2: one sweep gives all layers, O(N log N). m ≥ 3: blocks of points in an order in which nobody dominates an
    earlier point, against the layers so far (efficient non-dominated sort, Zhang et al., IEEE TEC 19(2), 2015):
    O(N m · points in the layers asked for) at worst. With `at_least` or `most_layers` nearly all points fall to a
    single comparison with the last layer that is asked for.
    """
    P = np.asarray(points, dtype=float)
    if np.isnan(P).any():
        raise ValueError("a point has a NaN: it can neither dominate nor be dominated")
    if len(P) == 0:
        return np.zeros(0, dtype=np.int64)
    # Dominance asks for the order of the values alone, so small integers will do. Equal points are sorted once.
    ranks = np.stack([np.unique(column, return_inverse=True)[1] for column in P.T], 1).astype(np.int32)     # (N, m)
    order = np.lexsort(ranks.T[::-1])
    first = np.append(True, (np.diff(ranks[order], axis=0) != 0).any(1))
    which = np.empty(len(P), dtype=np.int64)
    which[order] = first.cumsum() - 1                                                   # point -> distinct point
    ranks, copies = ranks[order[first]], np.bincount(which)

    layer = _sweep_layers(ranks) if P.shape[1] <= 2 else _block_layers(ranks, copies, at_least, most_layers)
    layer[layer >= _layers_asked_for(np.bincount(layer[layer >= 0], copies[layer >= 0]), at_least, most_layers)] = -1
    return layer[which]


def _layers_asked_for(sizes, at_least, most_layers):
    """How many of the layers with these sizes are peeled; infinity where they are too few to tell."""
    enough = np.inf if most_layers is None else most_layers
    held = np.cumsum(sizes)
    if at_least is not None and len(held) and held[-1] >= at_least:
        enough = min(enough, np.searchsorted(held, at_least) + 1)
    return enough


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


def _block_layers(ranks, copies, at_least, most_layers):
    """The layers that are asked for, of n distinct points: ranks (n, m), how many copies (n,) -> (n,), -1 behind."""
    layer, fronts = np.full(len(ranks), -1), []                               # fronts: the members of every layer
    order = np.argsort(-ranks.sum(1), kind="stable")                          # who dominates has the larger sum
    columns, stop = np.ascontiguousarray(ranks.T), _layers_asked_for([], at_least, most_layers)
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
        stop = _layers_asked_for([copies[front].sum() for front in fronts], at_least, most_layers)
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


# ---------------------------------------------------------------------------------------------------------------------
# Hypervolume.

FEW = 8                 # a union of so many boxes is written out: 2⁸ − 1 intersections cost less than the recursion
CHUNK = 1 << 18         # entries of the tables that are made at once
MOST_PENDING = 1 << 22  # points in sets that wait: above it, small sets are finished before large ones are split


def hypervolume(points, reference):
    """The volume that is dominated by `points` and dominates `reference`: HV = measure of ∪_i [reference, ξ^i].

    points (N, m), reference (m,); exact, m ≤ 64 (above: ValueError). Points not better than the reference everywhere
    add nothing. m = 2 is a staircase, m = 3 one staircase a slice, and from m = 4 the algorithm is WFG (While,
    Bradstreet, Barone: A fast way of calculating exact hypervolumes, IEEE TEC 16(1), 2012), see _boxes.
    The cost grows exponentially with m, and depends on the front: hundreds of points at m = 10 are seconds.
    """
    P, z = np.asarray(points, dtype=float), np.asarray(reference, dtype=float)
    P = P[(P > z).all(1)] - z
    if len(P) == 0:
        return 0.0
    m = P.shape[1]
    if m > 64:
        raise ValueError(f"hypervolume of {m} dimensions: 64 are the most")
    P = np.unique(P[nondominated(P)], axis=0)                                 # ascending in the first dimension
    if m == 1:
        return float(P.max())
    if m == 2:
        return float(_staircase(P))
    if m == 3:        # a slice between neighbouring values of the first dimension: the points above, in the other two
        return float(sum(height * _staircase(P[i:, 1:]) for i, height in enumerate(np.diff(P[:, 0], prepend=0.0))))
    return float(_boxes(P))


def _staircase(P):
    """The area over the origin that points (n, 2) dominate."""
    P = P[np.argsort(-P[:, 0])]
    return (P[:, 0] * np.diff(np.maximum.accumulate(P[:, 1]), prepend=0.0)).sum()


def _boxes(P):
    """The volume of the union of the boxes [0, p] for distinct non-dominated points P (n, m), by WFG.

    In any order of the points, each adds its box less what the later points cover of it:

        HV({p_1 … p_n}) = Σ_i ( vol(p_i) − HV(limit set of i) ),   limit set = non-dominated of { min(p_i, p_j), j > i }

    so HV = Σ ± vol over a tree of sets. The sets shrink quickly, for most of a limit set is dominated:
    * In ascending order of one dimension the whole limit set has one value there (p_i's), hence a dimension less to
      differ in. The dimension is chosen for each set: where the fewest of its points have been cut to one value.
    * With bits(a, b) = {dimensions in which a ≤ b} as one integer, min(p_i, p_j) ≤ min(p_i, p_l) everywhere if and only
      if bits(p_i, p_l) | bits(p_j, p_l) is full: one operation, not m, for every i, j, l.
    A set is the indices of its points in P and one corner `clip`, (m,), that they are cut to. All sets of one size are
    worked on at once, the largest size first, so that those of a size have gathered when it is their turn.
    """
    n, m = P.shape
    total, pending, waiting = 0.0, {n: [(np.arange(n)[None], P.max(0)[None], np.ones(1))]}, n     # size -> batches
    while pending:
        size = max(pending) if waiting < MOST_PENDING else min(pending)
        most = 1 + CHUNK // (size ** 2 if size > FEW else 2 ** size)
        which, clip, sign = _take(pending, size, most)                        # (B, size), (B, m), (B,)
        waiting -= which.size
        if size <= FEW:
            total += sign @ _union_of_few(P, which, clip)
            continue
        Q = np.minimum(P[which], clip[:, None])                               # (B, size, m)
        dimension = (Q == Q.max(1, keepdims=True)).sum(1).argmin(1)
        order = np.take_along_axis(Q, dimension[:, None, None], 2)[..., 0].argsort(1)
        which, Q = np.take_along_axis(which, order, 1), np.take_along_axis(Q, order[..., None], 1)
        total += sign @ Q.prod(2).sum(1)
        for i, keep in enumerate(_limit_sets(Q)):                             # keep: (B, size − 1 − i)
            sizes, rest = keep.sum(1), which[:, i + 1:]
            for s in np.flatnonzero(np.bincount(sizes)).tolist():
                b = np.flatnonzero(sizes == s)
                pending.setdefault(s, []).append((rest[b][keep[b]].reshape(-1, s), Q[b, i], -sign[b]))
                waiting += len(b) * s
    return total


def _take(pending, size, most):
    """At most `most` sets of a size out of `pending`, the youngest batches first."""
    batches, taken, count = pending[size], [], 0
    while batches and count < most:
        taken.append(batches.pop())
        count += len(taken[-1][0])
    which, clip, sign = (np.concatenate(arrays) for arrays in zip(*taken))
    if count > most:
        batches.append((which[most:], clip[most:], sign[most:]))
    if not batches:
        del pending[size]
    return which[:most], clip[:most], sign[:most]


def _union_of_few(P, which, clip):
    """Inclusion and exclusion: Σ over all A ≠ ∅ of (−1)^(|A|+1) vol(min of A). which (B, size), clip (B, m) -> (B,)"""
    size = which.shape[1]
    corner, volume, parity = np.empty((2 ** size, len(which))), 1.0, -np.ones(1)
    for values, bound in zip(P.T, clip.T):
        corner[0] = bound
        for j in range(size):                                 # A with point j is A without it, cut once more
            np.minimum(corner[:1 << j], values[which[:, j]], out=corner[1 << j:2 << j])
        volume = volume * corner[1:]
    for j in range(size):
        parity = np.append(parity, -parity)
    return parity[1:] @ volume


def _limit_sets(Q):
    """For every i in turn, which points j > i are left in i's limit set. Q (B, size, m) -> yields (B, size − 1 − i)

    The tables have the sets last: all work is then along B, however small the sets are.
    """
    size, m = Q.shape[1:]
    dtype = np.min_scalar_type((1 << m) - 1)
    full, bits = dtype.type((1 << m) - 1), np.zeros((size, size, len(Q)), dtype=dtype)
    for d, values in enumerate(np.ascontiguousarray(Q.T)):                    # (size, B)
        bits |= (values[:, None] <= values).astype(dtype) << dtype.type(d)    # bits[j, l]: where p_j ≤ p_l
    for i in range(size - 1):
        under = (bits[i + 1:, i + 1:] | bits[i, i + 1:]) == full              # (j, l, B): cut by p_i, j is under l
        # Every point is under itself, and of equal ones each is under all: the last of them stays.
        under &= ~(under.transpose(1, 0, 2) & np.tri(size - 1 - i, dtype=bool)[..., None])
        yield ~under.any(1).T


# ---------------------------------------------------------------------------------------------------------------------
# What else is said of a front.

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
    def ranks(values):
        _, which, copies = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(copies) - (copies + 1) / 2)[which]
    a, b = ranks(x), ranks(y)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Pareto high-quality data (ParetoHqD, arXiv:2504.16628): which of N scored responses a preference is trained on.

@dataclass
class Selection:
    """What select_high_quality returns; G preferences, k points for each ("all": N in the place of k)."""

    index: np.ndarray       # (G, k) int64: the chosen points, the best first
    distance: np.ndarray    # (G, k): from each of them to its preference's direction, in normalised scores
    pool: np.ndarray        # int64, ascending: the points that were chosen from
    layers: int             # how many non-dominated layers the pool holds; 0 where nothing was sorted
    low: np.ndarray         # (m,) the score that is normalised to 0
    high: np.ndarray        # (m,) to 1: the ideal point
    overlap: np.ndarray     # (G − 1,) the share of their points that neighbouring preferences have in common


def score_ranges(points, quantile=0.0):
    """The ends of every objective: its least and largest score, or its quantiles q and 1 − q. -> low (m,), high (m,)

    # not in paper: quantiles (0.005, say), because with q = 0 a single outlier moves the ideal point, and with it every
    direction. Raises ValueError for a quantile outside [0, 1/2), for no points, and where an objective does not vary.
    """
    if not 0 <= quantile < 0.5:
        raise ValueError(f"quantile is {quantile}, must be in [0, 0.5)")
    P = np.asarray(points, dtype=float)
    if len(P) == 0:
        raise ValueError("no points: they have no range")
    low, high = np.quantile(P, [quantile, 1 - quantile], axis=0)
    for j in np.flatnonzero(~(low < high)):
        raise ValueError(f"objective {j} has no range: low and high are both {low[j]:g}" if low[j] == high[j] else
                         f"objective {j} has no range: a score is not a finite number")
    return low, high


def direction_distance(X, lam):
    """The distance of normalised points from a preference's direction. X (N, m), lam (m,) -> (N,)

    The direction is the ray from the ideal point 1 through W(λ) = λ, so v = λ − 1 (r^max and W of the paper after
    (R − r^min) / (r^max − r^min)). The paper has no formula for the distance; # not in paper: the natural one is

        t = max(0, (X − 1)·v / ‖v‖²),   d = ‖(X − 1) − t v‖₂

    A point beyond the ideal (robust ranges allow X > 1) is as far as it is from the ideal point: a ray, not a line.
    Raises ValueError unless m ≥ 2 and lam is on the simplex.
    """
    X, lam = np.asarray(X, dtype=float), np.asarray(lam, dtype=float)
    if lam.shape != X.shape[1:] or len(lam) < 2 or lam.min() < 0 or not abs(lam.sum() - 1) < 1e-6:
        raise ValueError(f"{lam.tolist()} is not a preference among {X.shape[-1]} objectives: as many weights, two or "
                         "more, none of them negative, that sum to 1")
    v, offset = lam - 1, X - 1
    t = np.maximum((offset * v).sum(1) / (v ** 2).sum(), 0)       # not offset @ v: equal rows must give equal numbers
    return np.linalg.norm(offset - t[:, None] * v, axis=1)


def select_high_quality(points, lams, k=100, at_least=None, most_layers=None, quantile=0.0, rule="directions"):
    """The k points that each preference is trained on. points: scores (N, m), lams (G, m) -> Selection

    rule "directions" is ParetoHqD: of the first non-dominated layers of all points (the pool), the k nearest to the
    preference's direction, in scores that are normalised by score_ranges(points, quantile). How many layers the paper
    does not say; # not in paper: layers are peeled until the pool has `at_least` points (default 10 k), or, where
    `most_layers` is given, that many (with both: whichever is first). A pool of fewer than k points takes further
    layers until it has k.
    The paper's ablations: "linear" takes the k points of all N with the largest Σ λ_i X_i; "all" takes every point, in
    the order of the data, for every preference: index is then (G, N), a read-only view.
    Of equally good points (to 12 decimals) those of lower index come first. Raises ValueError if N < k, for an unknown
    rule, a NaN, an objective without a range, or lams that are no preferences.
    """
    P, lams = np.asarray(points, dtype=float), np.atleast_2d(np.asarray(lams, dtype=float))
    n = len(P)
    if not 1 <= k <= n and rule != "all":
        raise ValueError(f"k = {k} points for a preference out of {n}")
    low, high = score_ranges(P, quantile)
    X = (P - low) / (high - low)
    pool, layers = np.arange(n), 0
    if rule == "directions":
        at_least = 10 * k if at_least is None and most_layers is None else at_least
        layer = nondominated_layers(P, at_least, most_layers)
        if (layer >= 0).sum() < k:
            layer = nondominated_layers(P, k)
        pool, layers = np.flatnonzero(layer >= 0), int(layer.max()) + 1
        index = np.stack([pool[_smallest(direction_distance(X[pool], lam), k)] for lam in lams])
    elif rule == "linear":
        index = np.stack([_smallest(-(X * lam).sum(1), k) for lam in lams])
    elif rule == "all":
        index = np.broadcast_to(pool, (len(lams), n))
    else:
        raise ValueError(f"rule is {rule!r}, must be 'directions', 'linear' or 'all'")
    distance = np.stack([direction_distance(X[chosen], lam) for chosen, lam in zip(index, lams)])
    overlap = np.array([np.isin(a, b).mean() for a, b in zip(index, index[1:])])
    return Selection(index, distance, pool, layers, low, high, overlap)


def _smallest(values, k):
    """The indices of the k smallest values, in ascending order; of equal values (to 12 decimals) the first."""
    values = np.round(values, 12)                             # what is equal but for rounding errors is equal
    candidates = np.flatnonzero(values <= np.partition(values, k - 1)[k - 1])
    return candidates[np.argsort(values[candidates], kind="stable")[:k]]
