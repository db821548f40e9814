"""brute.py - sets of points, and layers by their definition, for several of the tests here."""
import numpy as np
import pytest

TIED = pytest.mark.parametrize("levels", [None, 4, 20])                   # None: no two scores are equal


def random_points(n, m, seed=0, levels=None):
    P = np.random.default_rng(seed).random((n, m))
    return P if levels is None else np.floor(levels * P) / levels


def sphere(n, m, seed=0):
    P = np.abs(np.random.default_rng(seed).normal(size=(n, m)))
    return P / np.linalg.norm(P, axis=1, keepdims=True)


def peel(P):
    """Non-dominated layers by their definition, pair by pair."""
    layer, t = np.full(len(P), -1), 0
    while (layer < 0).any():
        left = np.flatnonzero(layer < 0)
        dominated = [any((P[j] >= P[i]).all() and (P[j] > P[i]).any() for j in left) for i in left]
        layer[left[~np.array(dominated)]] = t
        t += 1
    return layer
