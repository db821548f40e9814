"""test_dominance.py - non-dominated layers against their definition, the oracle, and pymoo where it is installed."""
import numpy as np
import pytest
from brute import TIED, peel, random_points

from fronts import dominance
from fronts.dominance import nondominated, nondominated_layers


@TIED
@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_layers_equal_their_definition(m, levels):
    for seed in range(2):
        P = random_points(40, m, seed, levels)
        P = np.concatenate([P, P[:7]])                                   # duplicates share a layer
        expected = peel(P)
        assert (nondominated_layers(P) == expected).all() and nondominated_layers(P).dtype == np.int64
        assert (nondominated(P) == (expected == 0)).all()
        held = np.cumsum(np.bincount(expected))
        for least in (1, held[0], held[0] + 1, 20, 47):                  # the first layer that brings them to `least`
            stop = next(t for t, count in enumerate(held) if count >= least)
            expected_pool = np.where(expected <= stop, expected, -1)
            assert (nondominated_layers(P, at_least=least) == expected_pool).all()
        assert (nondominated_layers(P, at_least=48) == expected).all()   # more than there are: all


@pytest.mark.parametrize("m", [2, 3, 4])
def test_layers_of_several_blocks(m, monkeypatch):
    P = random_points(200, m, 1, 12)
    whole = nondominated_layers(P)
    assert len(set(whole)) > 5 and (whole == peel(P)).all()
    monkeypatch.setattr(dominance, "BLOCK", 16)                              # fronts of more than one block, too
    assert (nondominated_layers(P) == whole).all()
    for least in (1, 30, 100, 199):
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


def test_nondominated_by_hand():
    P = [(1, 5), (1, 4), (2, 4), (2, 4), (0, 5), (3, 0)]                 # weakly dominated, a duplicate pair, an end
    assert nondominated(P).tolist() == [True, False, True, True, False, True]
