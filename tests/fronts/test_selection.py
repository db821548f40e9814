"""test_selection.py - ParetoHqD's selection against its definition in loops, and papers.md's test vector."""
import numpy as np
import pytest
from brute import TIED, peel, random_points

from fronts.dominance import nondominated_layers
from fronts.selection import direction_distance, score_ranges, select_high_quality

CHK = [(.9, .1), (.8, .5), (.5, .8), (.1, .9), (.6, .6), (.2, .2)]       # papers.md 3.2, range 0.1 to 0.9
CHK_DISTANCES = {(.8, .2): (.2425, 0, .4548, .9701, .2729, .6367), (.5, .5): (.7071, .2652, .2652, .7071, 0, 0),
                 (.2, .8): (.9701, .4548, 0, .2425, .2729, .6367)}
GRID = np.stack([np.linspace(0, 1, 11), 1 - np.linspace(0, 1, 11)], 1)


def simplex(n, m, seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(m), n)


@pytest.mark.parametrize("lam", CHK_DISTANCES)
def test_vector_of_papers_md(lam):
    P = np.array(CHK)
    low, high = score_ranges(P)
    assert low.tolist() == [.1, .1] and high.tolist() == [.9, .9]
    X, expected = (P - low) / (high - low), np.array(CHK_DISTANCES[lam])
    assert np.abs(direction_distance(X, lam) - expected).max() < 5.1e-5          # four decimals are given
    assert np.abs(direction_distance(P, lam) - expected).max() > 0.05            # wrong: scores are not normalised
    s = select_high_quality(P, [lam], k=2, at_least=2)
    pool = [0, 1, 2, 3, 4]                                               # (.2, .2) is dominated, (.6, .6) is not
    assert s.pool.tolist() == pool and s.layers == 1
    assert s.index.tolist() == [sorted(pool, key=lambda i: (round(expected[i], 3), i))[:2]]
    assert np.abs(s.distance[0] - expected[s.index[0]]).max() < 5.1e-5


def test_dominated_points_would_be_chosen_without_the_sorting():
    best = select_high_quality(CHK, [(.5, .5)], k=2, at_least=2)
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
    P[:, 1] = 2.5
    with pytest.raises(ValueError, match="objective 1 .*2.5"):
        score_ranges(P)
    for wrong in (np.nan, np.inf):
        P[0, 1] = wrong
        with pytest.raises(ValueError, match="objective 1 .*(nan|inf)"):
            score_ranges(P)
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
    for seed in range(2):
        P = random_points(50, m, seed, levels) * np.arange(1, m + 1) ** 3
        P = np.concatenate([P, P[:9]])
        lams = np.concatenate([np.eye(m), simplex(4, m, seed)])
        s = select_high_quality(P, lams, k=5, at_least=20)
        pool, index = brute_selection(P, lams, 5, s.layers)
        assert s.pool.tolist() == pool and len(pool) >= 20 > (peel(P) < s.layers - 1).sum()
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
    first = select_high_quality(P, lams, k=5, at_least=5)
    worse = np.concatenate([P, np.maximum(P[first.pool] - 0.001, P.min(0))])     # dominated, and within the ranges
    again = select_high_quality(worse, lams, k=5, at_least=5)
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
    few = select_high_quality(P, GRID, k=500, at_least=1)                # one layer is too few: as many as k needs
    assert len(few.pool) >= 500 > (layer < few.layers - 1).sum() and few.index.shape == (11, 500)
    assert len(select_high_quality(P, GRID, k=50, at_least=10).pool) >= 50
    everything = select_high_quality(P[:60], GRID, k=60)
    assert all(sorted(chosen) == list(range(60)) for chosen in everything.index) and (everything.overlap == 1).all()
    for k in (61, 0):
        with pytest.raises(ValueError, match=f"{k} points .* 60"):
            select_high_quality(P[:60], GRID, k=k)


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
