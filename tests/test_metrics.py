"""test_metrics.py - the metrics of a front: the oracles, papers.md's test vector, and what must not change them."""
import numpy as np
import pytest

from fronts.dominance import nondominated
from fronts.metrics import hypervolume, inner_product, sparsity, spacing, spearman

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


def random_points(n, m, seed=0):
    return np.random.default_rng(seed).random((n, m))


# ---- the oracles ----

@sets
def test_hypervolume_equals_the_oracle(front, tag):
    o = front(tag)
    d = o["points"].shape[1]
    assert hypervolume(o["points"], np.zeros(d)) == pytest.approx(o["hv"], rel=1e-10)
    assert hypervolume(o["points"] + 3, np.full(d, 3)) == pytest.approx(o["hv"], rel=1e-10)      # both are moved


@pytest.mark.parametrize("tag", [f"d{d}_n{n}" for d in range(2, 7) for n in (1, 8, 40)] + ["nds"])
def test_nondominated_equals_the_oracle(front, tag):
    o = front(tag)
    assert (nondominated(o["points"]) == (o["rank"] == 0)).all()         # the 8-point sets hold a duplicate


@sets
def test_sparsity_and_spacing_equal_the_oracle(front, tag):
    o = front(tag)
    m = o["points"].shape[1]
    assert m * sparsity(o["points"]) == pytest.approx(o["sparsity"], rel=1e-10)      # morl-baselines has no 1/m
    assert spacing(o["points"], p=1) == pytest.approx(o["spacing_pymoo"], rel=1e-10)
    if len(o["points"]) > 1:                                             # wrong: without 1/m; the Euclidean distance
        assert sparsity(o["points"]) != pytest.approx(o["sparsity"], rel=0.01)
        assert spacing(o["points"]) != pytest.approx(o["spacing_pymoo"], rel=0.01)


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


def test_nondominated_by_hand():
    P = [(1, 5), (1, 4), (2, 4), (2, 4), (0, 5), (3, 0)]                 # weakly dominated, a duplicate pair, an end
    assert nondominated(P).tolist() == [True, False, True, True, False, True]


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
