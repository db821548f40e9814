"""test_pareto.py - pareto.py's algorithms against brute force: layers, hypervolumes of many dimensions, the selection.

    pytest tests/test_pareto.py          # seconds, one core

The metrics' own oracles and hand calculations are in test_metrics.py.
"""
import itertools

import numpy as np
import pytest

from fronts.dominance import nondominated, nondominated_layers
from fronts.metrics import hypervolume, spearman
from fronts.selection import direction_distance, score_ranges, select_high_quality

TIED = pytest.mark.parametrize("levels", [None, 4, 20])                   # None: no two scores are equal
CHK = [(.9, .1), (.8, .5), (.5, .8), (.1, .9), (.6, .6), (.2, .2)]       # papers.md 3.2, range 0.1 to 0.9
CHK_DISTANCES = {(.8, .2): (.2425, 0, .4548, .9701, .2729, .6367), (.5, .5): (.7071, .2652, .2652, .7071, 0, 0),
                 (.2, .8): (.9701, .4548, 0, .2425, .2729, .6367)}
GRID = np.stack([np.linspace(0, 1, 11), 1 - np.linspace(0, 1, 11)], 1)


def random_points(n, m, seed=0, levels=None):
    P = np.random.default_rng(seed).random((n, m))
    return P if levels is None else np.floor(levels * P) / levels


def sphere(n, m, seed=0):
    P = np.abs(np.random.default_rng(seed).normal(size=(n, m)))
    return P / np.linalg.norm(P, axis=1, keepdims=True)


def lattice(m, parts):
    chosen = itertools.combinations_with_replacement(range(m), parts)    # which dimension each part goes to
    return np.array([np.bincount(c, minlength=m) for c in chosen]) / parts


def simplex(n, m, seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(m), n)


def peel(P):
    """Non-dominated layers by their definition, pair by pair."""
    layer, t = np.full(len(P), -1), 0
    while (layer < 0).any():
        left = np.flatnonzero(layer < 0)
        dominated = [any((P[j] >= P[i]).all() and (P[j] > P[i]).any() for j in left) for i in left]
        layer[left[~np.array(dominated)]] = t
        t += 1
    return layer


def cells(P):
    """The hypervolume over 0 by its definition: cells of the grid through all coordinates, below some point."""
    edges = [np.unique(np.append(0, column)) for column in P.T]
    corners = np.stack(np.meshgrid(*[e[1:] for e in edges], indexing="ij"), -1).reshape(-1, P.shape[1])
    sizes = np.stack(np.meshgrid(*[np.diff(e) for e in edges], indexing="ij"), -1).reshape(corners.shape).prod(1)
    return sizes[(P[:, None] >= corners).all(2).any(0)].sum()


def inclusion_exclusion(P):
    """The same by all intersections of the boxes."""
    return sum((-1) ** (k + 1) * P[list(chosen)].min(0).prod()
               for k in range(1, len(P) + 1) for chosen in itertools.combinations(range(len(P)), k))


def slabs(P):
    """The same by slices between neighbouring values of the last coordinate."""
    P = P[np.argsort(-P[:, -1])]
    if P.shape[1] == 1:
        return P[0, 0]
    heights = -np.diff(P[:, -1], append=0.0)
    return sum(h * slabs(P[:i + 1, :-1]) for i, h in enumerate(heights) if h)


# ---- dominance ----

@TIED
@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_layers_equal_their_definition(m, levels):
    for seed in range(4):
        P = random_points(60, m, seed, levels)
        P = np.concatenate([P, P[:7]])                                   # duplicates share a layer
        expected = peel(P)
        assert (nondominated_layers(P) == expected).all() and nondominated_layers(P).dtype == np.int64
        assert (nondominated(P) == (expected == 0)).all()
        for most in range(1, 5):
            assert (nondominated_layers(P, most_layers=most) == np.where(expected < most, expected, -1)).all()
        held = np.cumsum(np.bincount(expected))
        for least in (1, held[0], held[0] + 1, 30, 67):                  # the first layer that brings them to `least`
            stop = next(t for t, count in enumerate(held) if count >= least)
            expected_pool = np.where(expected <= stop, expected, -1)
            assert (nondominated_layers(P, at_least=least) == expected_pool).all()
            both = np.where(expected < min(2, stop + 1), expected, -1)
            assert (nondominated_layers(P, at_least=least, most_layers=2) == both).all()
        assert (nondominated_layers(P, at_least=68) == expected).all()   # more than there are: all


@pytest.mark.parametrize("m", [2, 3, 4])
def test_layers_of_several_blocks(m, monkeypatch):
    P = random_points(300, m, 1, 12)
    whole = nondominated_layers(P)
    assert len(set(whole)) > 5 and (whole == peel(P)).all()
    monkeypatch.setattr("pareto.BLOCK", 16)                              # fronts of more than one block, too
    assert (nondominated_layers(P) == whole).all()
    for least in (1, 30, 100, 299):
        part = nondominated_layers(P, at_least=least)
        assert (part == np.where(whole <= part.max(), whole, -1)).all()
        assert (part >= 0).sum() >= least > (whole < part.max()).sum()


@pytest.mark.parametrize("tag", [f"d{d}_n{n}" for d in range(2, 7) for n in (8, 40)] + ["nds"])
def test_layers_equal_the_oracle(oracle, tag):
    o = oracle("pareto")
    P, rank = o[f"{tag}_points"].numpy(), o[f"{tag}_rank"].numpy()
    assert (nondominated_layers(P) == rank).all()
    assert tag != "nds" or rank.max() > 3


@pytest.mark.parametrize("m, levels", [(2, None), (2, 30), (3, None), (3, 15), (5, 6)])
def test_layers_equal_pymoo(m, levels):
    sorting = pytest.importorskip("pymoo.util.nds.non_dominated_sorting")
    P = random_points(2000, m, 3, levels)
    rank = np.full(len(P), -1)
    for t, front in enumerate(sorting.NonDominatedSorting().do(-P)):
        rank[front] = t
    assert (nondominated_layers(P) == rank).all()


def test_layers_depend_on_the_order_of_scores_alone():
    for m in (2, 3):
        P = random_points(200, m, 5, 10)
        layer, order = nondominated_layers(P), np.random.default_rng(0).permutation(200)
        assert (nondominated_layers(P[order]) == layer[order]).all()
        assert (nondominated_layers(P[:, ::-1]) == layer).all()
        assert (nondominated_layers(np.exp(3 * P) * 10.0 ** np.arange(m)) == layer).all()
        assert not (nondominated_layers(-P) == layer).all()              # wrong: smaller is better
    assert nondominated_layers([(0, 0), (-np.inf, 1), (-np.inf, 0)]).tolist() == [0, 0, 1]
    assert len(nondominated_layers(np.empty((0, 3)))) == 0
    with pytest.raises(ValueError, match="NaN"):
        nondominated_layers([(0, 1), (np.nan, 1)])


def test_a_hundred_thousand_points():
    chain = np.arange(100_000.0)
    assert (nondominated_layers(np.stack([chain, chain], 1)) == chain[::-1]).all()       # as many layers as points
    P = np.random.default_rng(0).normal(size=(100_000, 3))
    layer = nondominated_layers(P, at_least=1000)
    pool = P[layer >= 0]
    assert 1000 <= len(pool) < 2000 and (layer[layer >= 0] == nondominated_layers(pool)).all()
    behind = P[layer < 0][::99]                                          # each is under a point of the last layer
    assert all((P[layer == layer.max()] >= p).all(1).any() for p in behind)


# ---- hypervolume ----

@pytest.mark.parametrize("m, n", [(1, 9), (2, 30), (3, 14), (4, 9), (5, 6), (6, 4)])
@TIED
def test_hypervolume_equals_cells_of_a_grid(m, n, levels):
    for seed in range(3):
        P = random_points(n, m, seed, levels) + 0.05
        assert hypervolume(P, np.zeros(m)) == pytest.approx(cells(P), rel=1e-12)


@pytest.mark.parametrize("m", [4, 5, 6, 8, 10])
def test_hypervolume_equals_inclusion_and_exclusion(m, monkeypatch):
    for P in (sphere(11, m), random_points(11, m, 1, 3) + 0.3, random_points(11, m, 2) ** 3):
        value = inclusion_exclusion(P)
        assert hypervolume(P, np.zeros(m)) == pytest.approx(value, rel=1e-11)
        for few in (1, 3):                                               # the recursion down to the smallest sets
            monkeypatch.setattr("pareto.FEW", few)
            assert hypervolume(P, np.zeros(m)) == pytest.approx(value, rel=1e-11)
        monkeypatch.undo()
        assert inclusion_exclusion(P[:6]) < 0.99 * value


@pytest.mark.parametrize("m, n", [(3, 60), (4, 30), (5, 20)])
@TIED
def test_hypervolume_equals_slabs(m, n, levels):
    for P in (sphere(n, m) if levels is None else np.ceil(levels * sphere(n, m)), random_points(n, m, 0, levels) + 0.1):
        assert hypervolume(P, np.zeros(m)) == pytest.approx(slabs(P), rel=1e-11)


def test_hypervolume_equals_monte_carlo_in_ten_dimensions():
    reference, rng = np.full(10, -4.0), np.random.default_rng(0)
    for P in (sphere(60, 10), random_points(60, 10)):
        x, inside = rng.random((40_000, 10)) * (P.max(0) - reference) + reference, np.zeros(40_000, dtype=bool)
        for p in P:
            inside |= (x <= p).all(1)
        volume, share = (P.max(0) - reference).prod(), inside.mean()
        error = (share * (1 - share) / len(x)) ** 0.5
        assert error < 0.01 * share and abs(hypervolume(P, reference) / volume - share) < 4 * error
        assert abs(hypervolume(P[:20], reference) / volume - share) > 8 * error          # two thirds of them are missed


@pytest.mark.parametrize("m, n", [(4, 200), (6, 60), (8, 40), (10, 30)])
def test_hypervolume_of_many_points_depends_on_the_set_alone(m, n, monkeypatch):
    P, zero, rng = sphere(n, m), np.zeros(m), np.random.default_rng(1)
    value = hypervolume(P, zero)
    same = lambda points, factor=1.0: hypervolume(points, zero) == pytest.approx(factor * value, rel=1e-11)
    assert same(P[rng.permutation(n)]) and same(P[:, rng.permutation(m)])
    assert same(np.concatenate([P, P * rng.random((n, m)), P[:5]]))      # dominated points and duplicates
    assert same(P * np.arange(1, m + 1), np.arange(1.0, m + 1).prod())
    assert hypervolume(P[1:], zero) < value * (1 - 1e-9) < value < hypervolume(np.append(P, [[0.9] * m], 0), zero)
    monkeypatch.setattr("pareto.CHUNK", 4096)                            # batches are cut
    assert same(P)
    monkeypatch.setattr("pareto.MOST_PENDING", 100)                      # small sets go first
    assert same(P)


@pytest.mark.parametrize("m, parts, n", [(10, 3, 220), (7, 4, 210), (4, 12, 455)])
def test_hypervolume_of_a_lattice(m, parts, n):
    """λ^½ has parts + 1 levels a dimension: all cells of that grid are marked with running maxima."""
    lams, edges = lattice(m, parts), np.linspace(0, 1, parts + 1) ** 0.5 + 0.1           # from the reference −0.1
    covered = np.zeros((parts + 1,) * m)
    covered[tuple(np.round(parts * lams).astype(int).T)] = 1
    for axis in range(m):
        covered = np.flip(np.maximum.accumulate(np.flip(covered, axis), axis), axis)
    for _ in range(m):
        covered = np.diff(edges, prepend=0.0) @ covered.reshape(parts + 1, -1)
    assert len(lams) == n and hypervolume(lams ** 0.5, [-0.1] * m) == pytest.approx(covered.item(), rel=1e-11)


def test_hypervolume_refuses_too_many_dimensions():
    assert hypervolume(np.full((1, 64), 2.0), np.ones(64)) == 1
    assert hypervolume(np.eye(20) + 1, np.zeros(20)) == pytest.approx(21, rel=1e-12)      # 1 + 20 · 1
    with pytest.raises(ValueError, match="64"):
        hypervolume(np.full((1, 65), 2.0), np.ones(65))


# ---- the selection ----

@pytest.mark.parametrize("lam", CHK_DISTANCES)
def test_vector_of_papers_md(lam):
    P = np.array(CHK)
    low, high = score_ranges(P)
    assert low.tolist() == [.1, .1] and high.tolist() == [.9, .9]
    X, expected = (P - low) / (high - low), np.array(CHK_DISTANCES[lam])
    assert np.abs(direction_distance(X, lam) - expected).max() < 5.1e-5          # four decimals are given
    assert np.abs(direction_distance(P, lam) - expected).max() > 0.05            # wrong: scores are not normalised
    s = select_high_quality(P, [lam], k=2, most_layers=1)
    pool = [0, 1, 2, 3, 4]                                               # (.2, .2) is dominated, (.6, .6) is not
    assert s.pool.tolist() == pool and s.layers == 1
    assert s.index.tolist() == [sorted(pool, key=lambda i: (round(expected[i], 3), i))[:2]]
    assert np.abs(s.distance[0] - expected[s.index[0]]).max() < 5.1e-5


def test_dominated_points_would_be_chosen_without_the_sorting():
    best = select_high_quality(CHK, [(.5, .5)], k=2, most_layers=1)
    everyone = select_high_quality(CHK, [(.5, .5)], k=2)                 # peels until 20 points: all of them
    assert 5 not in best.index and everyone.layers == 2
    assert set(everyone.index[0]) == {4, 5}                              # (.2, .2): on the ray, and bad


def nearest_on_ray(X, lam):
    """The distance to the ray from 1 through lam, by ternary search along it."""
    a, b = np.zeros(len(X)), np.full(len(X), 50.0)
    at = lambda t: np.linalg.norm(X - (1 + t[:, None] * (lam - 1)), axis=1)
    for _ in range(120):
        p, q = a + (b - a) / 3, b - (b - a) / 3
        left = at(p) < at(q)
        a, b = np.where(left, a, p), np.where(left, q, b)
    return at((a + b) / 2)


@pytest.mark.parametrize("m", range(2, 11))
def test_distance_is_to_the_nearest_point_of_the_ray(m):
    X = np.random.default_rng(m).random((50, m)) * 1.6 - 0.2             # some beyond the ideal
    for lam in [*np.eye(m), np.full(m, 1 / m), *simplex(3, m)]:
        d = direction_distance(X, lam)
        assert np.abs(d - nearest_on_ray(X, lam)).max() < 1e-6           # a flat minimum: √ε
        on_it = 1 + np.array([[0.0], [0.3], [1], [2]]) * (lam - 1)
        assert np.abs(direction_distance(on_it, lam)).max() < 1e-12      # the ideal, a point between, W(λ), behind it
        order = np.random.default_rng(0).permutation(m)
        assert np.allclose(direction_distance(X[:, order], lam[order]), d, rtol=1e-12)
    for j, vertex in enumerate(np.eye(m)):                               # m = 2: the edge X_j = 1
        if m == 2:
            inside = np.minimum(X, 1)
            assert np.allclose(direction_distance(inside, vertex), 1 - inside[:, j], rtol=0, atol=1e-12)


def test_distance_is_to_a_ray_not_to_a_line():
    beyond = np.array([[1.3, 1.3], [1.1, 1.4]])
    assert direction_distance(beyond, (.5, .5)) == pytest.approx(np.linalg.norm(beyond - 1, axis=1), rel=1e-12)
    line = abs(beyond[:, 0] - beyond[:, 1]) / 2 ** 0.5
    assert (direction_distance(beyond, (.5, .5)) > line + 0.1).all()


@pytest.mark.parametrize("lam", [(.5, .6), (-.1, 1.1), (1,), (.2, .3, .5), (np.nan, 1)])
def test_distance_wants_a_preference(lam):
    with pytest.raises(ValueError, match="not a preference"):
        direction_distance(np.ones((3, 2)), lam)
    with pytest.raises(ValueError):
        select_high_quality(random_points(30, 2), [lam], k=3)


def test_score_ranges():
    P = random_points(1001, 3) * (1, 10, 100) - 5
    low, high = score_ranges(P)
    assert (low == P.min(0)).all() and (high == P.max(0)).all()
    low, high = score_ranges(P, 0.01)
    assert (low == np.sort(P, 0)[10]).all() and (high == np.sort(P, 0)[990]).all()       # of 1001: no interpolation
    P[:, 1] = 2.5
    with pytest.raises(ValueError, match="objective 1 .*2.5"):
        score_ranges(P)
    mostly = random_points(1000, 2)
    mostly[20:, 0] = 0.5                                                 # varies, but its quantiles do not
    assert (score_ranges(mostly)[0] < score_ranges(mostly)[1]).all()
    with pytest.raises(ValueError, match="objective 0"):
        score_ranges(mostly, 0.05)
    mostly[0, 1] = np.nan
    with pytest.raises(ValueError, match="objective 1 .*finite"):
        score_ranges(mostly)
    for wrong in (-0.1, 0.5):
        with pytest.raises(ValueError, match="quantile"):
            score_ranges(P, wrong)
    with pytest.raises(ValueError, match="no points"):
        score_ranges(np.empty((0, 2)))


def brute_selection(P, lams, k, layers):
    """ParetoHqD's rule in loops: the pool, and k indices for each preference."""
    low, high = P.min(0), P.max(0)
    pool, index = np.flatnonzero(peel(P) < layers).tolist(), []
    for lam in lams:
        v, distance = lam - 1, {}
        for i in pool:
            u = (P[i] - low) / (high - low) - 1
            t = max(0.0, sum(u * v) / sum(v * v))
            distance[i] = sum((u - t * v) ** 2) ** 0.5
        index.append(sorted(pool, key=lambda i: (round(distance[i], 9), i))[:k])
    return pool, index


@TIED
@pytest.mark.parametrize("m", [2, 3, 4])
def test_selection_equals_its_definition(m, levels):
    for seed in range(3):
        P = random_points(80, m, seed, levels) * np.arange(1, m + 1) ** 3
        P = np.concatenate([P, P[:9]])
        lams = np.concatenate([np.eye(m), simplex(4, m, seed)])
        s = select_high_quality(P, lams, k=5, at_least=30)
        pool, index = brute_selection(P, lams, 5, s.layers)
        assert s.pool.tolist() == pool and len(pool) >= 30 > (peel(P) < s.layers - 1).sum()
        assert s.index.tolist() == index and s.index.dtype == np.int64
        X = (P - s.low) / (s.high - s.low)
        for lam, chosen, distance in zip(lams, s.index, s.distance):
            assert (distance == direction_distance(X[chosen], lam)).all() and (np.diff(distance) > -1e-12).all()
        shares = [len(set(a) & set(b)) / 5 for a, b in zip(index, index[1:])]
        assert s.overlap == pytest.approx(shares) and len(s.overlap) == m + 3
        raw = [np.argsort(direction_distance(P[pool], lam), kind="stable")[:5] for lam in lams]
        assert not all(set(s.pool[r]) == set(i) for r, i in zip(raw, index))             # wrong: no normalisation


def test_selection_does_not_depend_on_order_or_scale():
    P, lams = random_points(200, 3, 2), simplex(5, 3)
    s, order = select_high_quality(P, lams, k=10), np.random.default_rng(1).permutation(200)
    moved = select_high_quality(P[order], lams, k=10)
    assert (order[moved.index] == s.index).all()
    scaled = select_high_quality(P * (1, 50, 0.01) + (3, -7, 0), lams, k=10)
    assert (scaled.index == s.index).all() and np.allclose(scaled.distance, s.distance, atol=1e-12)
    turned = select_high_quality(P[:, ::-1], lams[:, ::-1], k=10)
    assert (turned.index == s.index).all()
    first = select_high_quality(P, lams, k=5, most_layers=1)
    worse = np.concatenate([P, np.maximum(P[first.pool] - 0.001, P.min(0))])     # dominated, and within the ranges
    again = select_high_quality(worse, lams, k=5, most_layers=1)
    assert (again.index == first.index).all() and (again.pool == first.pool).all()


def test_of_equal_points_the_first_are_chosen():
    P = np.repeat(random_points(40, 2, 4, 6), 25, 0)
    P = P[np.random.default_rng(0).permutation(len(P))]
    s = select_high_quality(P, GRID, k=10)
    for chosen in s.index:
        equal = [np.flatnonzero((P == P[i]).all(1)).tolist() for i in chosen]
        for i, twins in zip(chosen, equal):
            assert set(twins[:twins.index(i)]) <= set(chosen)


def test_pool_size():
    P = random_points(3000, 2, 6)
    layer = nondominated_layers(P)
    default = select_high_quality(P, GRID)
    assert len(default.pool) >= 1000 > (layer < default.layers - 1).sum()
    assert (default.pool == np.flatnonzero(layer < default.layers)).all()
    fixed = select_high_quality(P, GRID, k=20, most_layers=5)
    assert (fixed.pool == np.flatnonzero(layer < 5)).all() and fixed.layers == 5
    both = select_high_quality(P, GRID, k=5, at_least=12, most_layers=5)
    assert len(both.pool) >= 12 and both.layers < 5
    few = select_high_quality(P, GRID, k=500, most_layers=1)             # one layer is too few: as many as k needs
    assert len(few.pool) >= 500 > (layer < few.layers - 1).sum() and few.index.shape == (11, 500)
    assert len(select_high_quality(P, GRID, k=50, at_least=10).pool) >= 50
    everything = select_high_quality(P[:60], GRID, k=60)
    assert all(sorted(chosen) == list(range(60)) for chosen in everything.index) and (everything.overlap == 1).all()
    for k in (61, 0):
        with pytest.raises(ValueError, match=f"{k} points .* 60"):
            select_high_quality(P[:60], GRID, k=k)


def test_outliers_move_directions_unless_ranges_are_robust():
    P = random_points(2000, 2, 7)
    P = P / np.linalg.norm(P, axis=1, keepdims=True) * random_points(2000, 1, 8) ** 0.2
    with_outlier = np.concatenate([P, [(30, -1)]])
    clean = select_high_quality(P, GRID[1:-1], k=20, quantile=0.005)
    robust = select_high_quality(with_outlier, GRID[1:-1], k=20, quantile=0.005)
    naive = select_high_quality(with_outlier, GRID[1:-1], k=20)
    shared = lambda s: np.mean([np.isin(a, b).mean() for a, b in zip(s.index, clean.index)])
    assert shared(robust) > 0.9 and shared(naive) < 0.6


def test_linear_rule():
    P, lams = random_points(300, 3, 9, 8) * (1, 5, 20), simplex(4, 3)
    s = select_high_quality(P, lams, k=15, rule="linear")
    X = (P - P.min(0)) / (P.max(0) - P.min(0))
    for lam, chosen in zip(lams, s.index):
        score = [round(sum(x * lam), 12) for x in X]
        assert chosen.tolist() == sorted(range(300), key=lambda i: (-score[i], i))[:15]
    assert s.pool.tolist() == list(range(300)) and s.layers == 0
    # On a concave set (a front that bends towards the origin) linear scores find the ends alone, directions all of it.
    x = np.linspace(0, 1, 2001)
    front = np.stack([x, (1 - x ** 0.5) ** 2], 1)
    ends = select_high_quality(front, [(.5, .5)], k=100, rule="linear").index
    middle = select_high_quality(front, [(.5, .5)], k=100).index
    assert (np.abs(x[ends] - 0.5) > 0.4).all() and np.abs(front[middle] - 0.25).max() < 0.06


def test_all_rule():
    P = random_points(50, 2)
    s = select_high_quality(P, GRID, rule="all")                         # k = 100 plays no part
    assert (s.index == np.arange(50)).all() and s.index.shape == s.distance.shape == (11, 50)
    assert (s.overlap == 1).all() and len(s.pool) == 50
    with pytest.raises(ValueError, match="'nearest'"):
        select_high_quality(P, GRID, k=5, rule="nearest")


# ---- ranks ----

def test_spearman_of_ties():
    x, y = random_points(200, 2, 1, 7).T
    mean_rank = lambda v: np.array([(v < a).sum() + ((v == a).sum() - 1) / 2 for a in v])
    expected = np.corrcoef(mean_rank(x), mean_rank(y + x))[0, 1]
    assert 0.3 < expected < 0.9 and spearman(x, y + x) == pytest.approx(expected, rel=1e-12)
    assert spearman(x, y + x) != pytest.approx(np.corrcoef(x.argsort().argsort(), (y + x).argsort().argsort())[0, 1],
                                               rel=1e-3)                 # wrong: ties in the order of the data
