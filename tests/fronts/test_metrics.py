"""test_metrics.py - the metrics of a front: the oracles, papers.md's test vector, and what must not change them."""
import itertools

import numpy as np
import pytest
from brute import TIED, random_points, sphere

from fronts import metrics
from fronts.dominance import nondominated
from fronts.metrics import hypervolume, inner_product, spacing, sparsity, spearman

CHK = [(1, 5), (2, 4), (4, 3), (6, 1)]
CHK_LAMS = [(0, 1), (1 / 3, 2 / 3), (2 / 3, 1 / 3), (1, 0)]
sets = pytest.mark.parametrize("tag", [f"d{d}_n{n}" for d in range(2, 7) for n in (1, 8, 40)])


@pytest.fixture
def front(oracle):
    """front(tag): points and expected values of one of the oracle's sets."""
    def load(tag):
        return {key.removeprefix(tag + "_"): v.numpy()
                for key, v in oracle("pareto").items() if key.startswith(tag + "_")}
    return load


def lattice(m, parts):
    chosen = itertools.combinations_with_replacement(range(m), parts)    # which dimension each part goes to
    return np.array([np.bincount(c, minlength=m) for c in chosen]) / parts


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


# ---- the oracles ----

@sets
def test_hypervolume_equals_the_oracle(front, tag):
    o = front(tag)
    d = o["points"].shape[1]
    assert hypervolume(o["points"], np.zeros(d)) == pytest.approx(o["hv"], rel=1e-10)
    assert hypervolume(o["points"] + 3, np.full(d, 3)) == pytest.approx(o["hv"], rel=1e-10)      # both are moved


@sets
def test_sparsity_equals_the_oracle_and_spacing_its_definition(front, tag):
    o = front(tag)
    m = o["points"].shape[1]
    assert m * sparsity(o["points"]) == pytest.approx(o["sparsity"], rel=1e-10)      # morl-baselines has no 1/m
    by_hand = [min(sum((a - b) ** 2) ** 0.5 for j, b in enumerate(o["points"]) if j != i) if len(o["points"]) > 1 else 0
               for i, a in enumerate(o["points"])]                       # pymoo's takes another distance
    assert spacing(o["points"]) == pytest.approx(np.std(by_hand), rel=1e-10)
    if len(o["points"]) > 1:                                             # wrong: without 1/m
        assert sparsity(o["points"]) != pytest.approx(o["sparsity"], rel=0.01)


# ---- by hand ----

def test_vector_of_papers_md():
    assert hypervolume(CHK, (0, 0)) == 17
    assert inner_product(CHK_LAMS, CHK) == pytest.approx(4.5, rel=1e-12)
    assert sparsity(CHK) == 2.5
    assert spacing(CHK) == pytest.approx(0.596960, abs=5e-7)
    nearest = np.array([2, 2, 5, 8]) ** 0.5
    assert spacing(CHK) == pytest.approx(nearest.std(), rel=1e-12)
    assert spacing(CHK) != pytest.approx(nearest.std(ddof=1), rel=0.1)   # wrong: the unbiased variance


def test_sparsity_of_nondominated_pairs_is_of_their_distances():
    x = np.sort(random_points(20, 1)[:, 0])
    P = np.stack([x, 1 - x ** 2], 1)
    assert sparsity(P[::-1]) == pytest.approx((np.diff(P, axis=0) ** 2).sum() / (2 * 19), rel=1e-12)


def test_spacing_of_an_even_front_is_zero():
    P = np.stack([np.arange(6.0), 5 - np.arange(6.0)], 1)
    assert spacing(P) < 1e-12 and spacing(P ** 2) > 0.1


def test_inner_product_follows_the_preferences():
    P = random_points(10, 2)
    assert inner_product([[1, 0]] * 10, P) == pytest.approx(P[:, 0].mean(), rel=1e-12)
    assert inner_product(CHK_LAMS[::-1], CHK) < 0.8 * inner_product(CHK_LAMS, CHK)


def test_spearman_by_hand():
    assert spearman([1, 2, 3, 4, 5], [5, 6, 7, 8, 7]) == pytest.approx(0.8207826817, rel=1e-9)    # 7 and 7 share a rank
    assert spearman([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5, rel=1e-12)
    assert spearman([1, 1, 2, 2], [1, 2, 3, 4]) == pytest.approx(2 / 5 ** 0.5, rel=1e-12)
    x = random_points(20, 1)[:, 0]
    assert spearman(x, np.exp(5 * x)) == pytest.approx(1) and spearman(x, -x ** 3) == pytest.approx(-1)
    assert spearman(x, np.ones(20)) == 0


# ---- what must and must not change a hypervolume ----

@pytest.mark.parametrize("m", [2, 3, 4, 5])
def test_hypervolume_depends_on_the_set_alone(m):
    P, zero = random_points(15, m), np.zeros(m)
    value = hypervolume(P, zero)
    order = np.random.default_rng(1).permutation(15)
    assert value > 0.01 and hypervolume(P[order], zero) == pytest.approx(value, rel=1e-12)
    assert hypervolume(P[:, ::-1], zero) == pytest.approx(value, rel=1e-12)          # nor on the objectives' order
    assert hypervolume(np.concatenate([P, P[:7]]), zero) == pytest.approx(value, rel=1e-12)
    assert hypervolume(P[nondominated(P)], zero) == pytest.approx(value, rel=1e-12)
    below = P.copy()
    below[:, 0] = -1                                                     # not better than the reference everywhere
    assert hypervolume(np.concatenate([P, below, 0 * P]), zero) == pytest.approx(value, rel=1e-12)
    scale = np.arange(1, m + 1)
    assert hypervolume(P * scale, zero) == pytest.approx(value * scale.prod(), rel=1e-12)
    ties = np.round(P * 3) / 3 + 0.1                                     # many equal coordinates
    cells = np.stack(np.meshgrid(*[[0, 1, 2, 3]] * m, indexing="ij"), -1).reshape(-1, m)         # each of one level
    widths = np.array([0.1, 1 / 3, 1 / 3, 1 / 3])
    inside = ((np.round(P * 3)[:, None] >= cells).all(-1)).any(0)
    assert hypervolume(ties, zero) == pytest.approx(widths[cells][inside].prod(1).sum(), rel=1e-12)


@pytest.mark.parametrize("m", [2, 3, 4])
def test_hypervolume_grows_with_every_nondominated_point(m):
    P, zero = random_points(12, m, seed=3), np.zeros(m)
    values = [hypervolume(P[:n], zero) for n in range(13)]
    for n in range(12):
        new = nondominated(P[:n + 1])[n]
        assert values[n + 1] > values[n] + 1e-6 if new else values[n + 1] == pytest.approx(values[n], rel=1e-12)
    assert hypervolume(P, zero) < hypervolume(P, zero - 0.1) < hypervolume(P + 0.01, zero - 0.1)


def test_few_points():
    none = np.empty((0, 3))
    assert hypervolume(none, np.zeros(3)) == 0 and len(nondominated(none)) == 0
    assert sparsity(none) == spacing(none) == sparsity([(1, 2)]) == spacing([(1, 2)]) == 0
    assert hypervolume([(2, 3, 4)], (1, 1, 1)) == 6 and hypervolume([(2, 1, 4)], (1, 1, 1)) == 0


# ---- many dimensions ----

@pytest.mark.parametrize("m, n", [(1, 9), (2, 30), (3, 14), (4, 9), (5, 6), (6, 4)])
@TIED
def test_hypervolume_equals_cells_of_a_grid(m, n, levels):
    for seed in range(2):
        P = random_points(n, m, seed, levels) + 0.05
        assert hypervolume(P, np.zeros(m)) == pytest.approx(cells(P), rel=1e-12)


@pytest.mark.parametrize("m", [4, 5, 6, 8, 10])
def test_hypervolume_equals_inclusion_and_exclusion(m, monkeypatch):
    for P in (sphere(11, m), random_points(11, m, 1, 3) + 0.3, random_points(11, m, 2) ** 3):
        value = inclusion_exclusion(P)
        assert hypervolume(P, np.zeros(m)) == pytest.approx(value, rel=1e-11)
        for few in (1, 3):                                               # the recursion down to the smallest sets
            monkeypatch.setattr(metrics, "FEW", few)
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
        x, inside = rng.random((20_000, 10)) * (P.max(0) - reference) + reference, np.zeros(20_000, dtype=bool)
        for p in P:
            inside |= (x <= p).all(1)
        volume, share = (P.max(0) - reference).prod(), inside.mean()
        error = (share * (1 - share) / len(x)) ** 0.5
        assert error < 0.02 * share and abs(hypervolume(P, reference) / volume - share) < 4 * error
        assert abs(hypervolume(P[:20], reference) / volume - share) > 6 * error          # two thirds of them are missed


@pytest.mark.parametrize("m, n", [(4, 200), (6, 60), (8, 40), (10, 30)])
def test_hypervolume_of_many_points_depends_on_the_set_alone(m, n, monkeypatch):
    P, zero, rng = sphere(n, m), np.zeros(m), np.random.default_rng(1)
    value = hypervolume(P, zero)
    same = lambda points, factor=1.0: hypervolume(points, zero) == pytest.approx(factor * value, rel=1e-11)
    assert same(P[rng.permutation(n)]) and same(P[:, rng.permutation(m)])
    assert same(np.concatenate([P, P * rng.random((n, m)), P[:5]]))      # dominated points and duplicates
    assert same(P * np.arange(1, m + 1), np.arange(1.0, m + 1).prod())
    assert hypervolume(P[1:], zero) < value * (1 - 1e-9) < value < hypervolume(np.append(P, [[0.9] * m], 0), zero)
    monkeypatch.setattr(metrics, "CHUNK", 4096)                            # batches are cut
    assert same(P)
    monkeypatch.setattr(metrics, "MOST_PENDING", 100)                      # small sets go first
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


def test_spearman_of_ties():
    x, y = random_points(200, 2, 1, 7).T
    mean_rank = lambda v: np.array([(v < a).sum() + ((v == a).sum() - 1) / 2 for a in v])
    expected = np.corrcoef(mean_rank(x), mean_rank(y + x))[0, 1]
    assert 0.3 < expected < 0.9 and spearman(x, y + x) == pytest.approx(expected, rel=1e-12)
    assert spearman(x, y + x) != pytest.approx(np.corrcoef(x.argsort().argsort(), (y + x).argsort().argsort())[0, 1],
                                               rel=1e-3)                 # wrong: ties in the order of the data
