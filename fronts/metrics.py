"""metrics.py - what is said of a front in one number: hypervolume (exact), inner product, sparsity, spacing, Spearman.

F: points   m: dimensions   points: (F, m), larger is better   lams: (F, m), the preference of each point
"""
import numpy as np

from fronts.dominance import nondominated

# ---------------------------------------------------------------------------------------------------------------------
# Hypervolume.

FEW = 8                 # a union of so many boxes is written out: 2⁸ − 1 intersections cost less than the recursion
CHUNK = 1 << 18         # entries of the tables that are made at once
MOST_PENDING = 1 << 22  # points in sets that wait: above it, small sets are finished before large ones are split


def hypervolume(points, reference):
    """The volume that is dominated by `points` and dominates `reference`: HV = measure of ∪_i [reference, ξ^i].

    points (F, m), reference (m,); exact, m ≤ 64 (above: ValueError). Points not better than the reference everywhere
    add nothing. m = 2 is a staircase, m = 3 one staircase a slice, and from m = 4 the algorithm is WFG (While,
    Bradstreet, Barone: A fast way of calculating exact hypervolumes, IEEE TEC 16(1), 2012), see _boxes.
    The cost grows exponentially with m, and depends on the front: hundreds of points at m = 10 are seconds.
    """
    Y, z = np.asarray(points, dtype=float), np.asarray(reference, dtype=float)
    Y = Y[(Y > z).all(1)] - z
    if len(Y) == 0:
        return 0.0
    m = Y.shape[1]
    if m > 64:
        raise ValueError(f"hypervolume of {m} dimensions: 64 are the most")
    Y = np.unique(Y[nondominated(Y)], axis=0)                                 # ascending in the first dimension
    if m == 2:
        return float(_staircase(Y))
    if m == 3:        # a slice between neighbouring values of the first dimension: the points above, in the other two
        return float(sum(height * _staircase(Y[i:, 1:]) for i, height in enumerate(np.diff(Y[:, 0], prepend=0.0))))
    return float(_boxes(Y))


def _staircase(Y):
    """The area over the origin that points (n, 2) dominate."""
    Y = Y[np.argsort(-Y[:, 0])]
    return (Y[:, 0] * np.diff(np.maximum.accumulate(Y[:, 1]), prepend=0.0)).sum()


def _boxes(Y):
    """The volume of the union of the boxes [0, p] for distinct non-dominated points Y (n, m), by WFG.

    In any order of the points, each adds its box less what the later points cover of it:

        HV({p_1 … p_n}) = Σ_i ( vol(p_i) − HV(limit set of i) ),   limit set = non-dominated of { min(p_i, p_j), j > i }

    so HV = Σ ± vol over a tree of sets. The sets shrink quickly, for most of a limit set is dominated:
    * In ascending order of one dimension the whole limit set has one value there (p_i's), hence a dimension less to
      differ in. The dimension is chosen for each set: where the fewest of its points have been cut to one value.
    * With bits(a, b) = {dimensions in which a ≤ b} as one integer, min(p_i, p_j) ≤ min(p_i, p_l) everywhere if and only
      if bits(p_i, p_l) | bits(p_j, p_l) is full: one operation, not m, for every i, j, l.
    A set is the indices of its points in Y and one corner `clip`, (m,), that they are cut to. All sets of one size are
    worked on at once, the largest size first, so that those of a size have gathered when it is their turn.
    """
    n, m = Y.shape
    total, pending, waiting = 0.0, {n: [(np.arange(n)[None], Y.max(0)[None], np.ones(1))]}, n     # size -> batches
    while pending:
        size = max(pending) if waiting < MOST_PENDING else min(pending)
        most = 1 + CHUNK // (size ** 2 if size > FEW else 2 ** size)
        sets = [np.concatenate(parts) if len(parts) > 1 else parts[0] for parts in zip(*pending.pop(size))]
        if len(sets[0]) > most:
            pending[size] = [[part[most:] for part in sets]]
        which, clip, sign = (part[:most] for part in sets)                    # (B, size), (B, m), (B,)
        waiting -= which.size
        if size <= FEW:
            total += sign @ _union_of_few(Y, which, clip)
            continue
        Q = np.minimum(Y[which], clip[:, None])                               # (B, size, m)
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


def _union_of_few(Y, which, clip):
    """Inclusion and exclusion: Σ over all A ≠ ∅ of (−1)^(|A|+1) vol(min of A). which (B, size), clip (B, m) -> (B,)"""
    size = which.shape[1]
    corner, volume, parity = np.empty((2 ** size, len(which))), 1.0, -np.ones(1)
    for values, bound in zip(Y.T, clip.T):
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
    """IP = (1/F) Σ_i ⟨λ^i, ξ^i⟩: whether the points follow the preferences."""
    return float((np.asarray(lams) * np.asarray(points)).sum(1).mean())


def sparsity(points):
    """1/(m(F−1)) Σ_j Σ_i (gap between neighbours on objective j)²; smaller is denser.

    For m = 2 and non-dominated points this is 1/(m(F−1)) Σ_i ‖ξ^i − ξ^{i+1}‖²; the form by objectives carries over to
    m > 2, where points have no one order. Dominated points are not removed here. 0 for a single point.
    """
    Y = np.sort(np.asarray(points, dtype=float), axis=0)
    return float((np.diff(Y, axis=0) ** 2).sum() / (Y.shape[1] * (len(Y) - 1))) if len(Y) > 1 else 0.0


def spacing(points):
    """sqrt( (1/F) Σ_i (d_i − d̄)² ), d_i the Euclidean distance to the nearest other point; 0 when evenly spread."""
    Y = np.asarray(points, dtype=float)
    if len(Y) < 2:
        return 0.0
    distance = np.linalg.norm(Y[:, None] - Y[None], axis=-1) + np.diag(np.full(len(Y), np.inf))
    return float(distance.min(1).std())


def spearman(x, y):
    """Rank correlation; ties share their mean rank. 0 where one of the two is constant."""
    def ranks(values):
        _, which, copies = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(copies) - (copies + 1) / 2)[which]
    a, b = ranks(x), ranks(y)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else 0.0
