"""bench_pareto.py - what the geometry of fronts costs: exact hypervolumes, the selection among 100 000 scored points.

    python bench/bench_pareto.py                    # one thread of a CPU; two tables, about half a minute

m: dimensions   n: points   F: preferences of the lattice in steps of 1/10 (11 for m = 2, 66 for m = 3)
The fronts are concave: `lattice` is the square root of the Das-Dennis lattice of m dimensions (in 10, 4, 4, 4, 4 parts
for m = 3, 5, 7, 8, 10), where scores repeat; `sphere` is random points of the sphere's positive part, where no two are
alike and nearly all of a limit set has to be worked out. The reference is −0.1 for both.
The scores of the selection are normal with one correlation between all objectives, as reward models give them, or the
same rounded to steps of ⅓, so that most points have duplicates; `layers` and `pool` are what was sorted until 1000
points were in the pool, and k = 100 points are then chosen for each preference.
What is timed is checked first: hypervolumes against a sum over all cells of a grid, the selection against the rule
written as loops. Times are medians over repeats; `MiB` is the most that numpy held at once in one more run.
"""
import sys
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from aggregate import simplex_lattice
from bench.turns import median_time
from fronts.dominance import nondominated
from fronts.metrics import hypervolume
from fronts.selection import select_high_quality
from runs.files import UserError
from runs.flags import flag, run_main

LATTICES = {3: 10, 5: 4, 7: 4, 8: 4, 10: 4}                                               # m: parts


@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    m: list[int] = flag([3, 5, 7, 8, 10], "dimensions of the hypervolumes, of 3, 5, 7, 8, 10")
    random: list[int] = flag([100, 300], "random points on the sphere", 1)
    n: int = flag(100_000, "points that are selected from", 1)
    k: int = flag(100, "points for a preference", 1)
    repeats: int = flag(3, "the tables have medians over so many runs", 1)
    seed: int = flag(0, "seed of the points")


def sphere(n, m, rng):
    """n points on the positive part of the sphere: (n, m)"""
    points = np.abs(rng.normal(size=(n, m)))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def scores(n, m, correlation, rng):
    """Normal scores (n, m) of which any two objectives have this correlation."""
    covariance = np.full((m, m), correlation) + (1 - correlation) * np.eye(m)
    return rng.multivariate_normal(np.zeros(m), covariance, n)


def cells(points):
    """The hypervolume over 0 as the sum of all cells of the grid through the points' coordinates."""
    edges = [np.unique(np.append(0, column)) for column in points.T]
    corners = np.stack(np.meshgrid(*[e[1:] for e in edges], indexing="ij"), -1).reshape(-1, points.shape[1])
    sizes = np.stack(np.meshgrid(*[np.diff(e) for e in edges], indexing="ij"), -1).reshape(corners.shape).prod(1)
    return sizes[(points[:, None] >= corners).all(2).any(0)].sum()


def check(rng):
    """Asserts that what is timed is right."""
    for n, m in ((30, 2), (14, 3), (9, 4), (6, 5), (4, 6)):
        points = sphere(n, m, rng)
        assert abs(hypervolume(points, np.zeros(m)) - cells(points)) < 1e-12 * cells(points), "the hypervolume is wrong"
    for m in (2, 3):
        points, lams = scores(60, m, 0.0, rng), simplex_lattice(m, 4).numpy()
        chosen, left, pool = select_high_quality(points, lams, k=5, at_least=20), list(range(60)), []
        while len(pool) < 20:
            dominates = lambda a, b: (a >= b).all() and (a > b).any()
            front = [i for i in left if not any(dominates(points[j], points[i]) for j in left)]
            pool, left = sorted(pool + front), [i for i in left if i not in front]
        X = (points - points.min(0)) / (points.max(0) - points.min(0)) - 1
        distance = lambda u, v: np.linalg.norm(u - max(0, u @ v / (v @ v)) * v)
        for lam, index in zip(lams, chosen.index):
            nearest = sorted(pool, key=lambda i: distance(X[i], lam - 1))[:5]
            assert index.tolist() == nearest, "the selection is wrong"


def measure(function, repeats):
    """function()'s result, the median time of so many runs of it, and the MiB of one more."""
    seconds = median_time(function, repeats)
    tracemalloc.start()
    result, peak = function(), tracemalloc.get_traced_memory()[1] / 2 ** 20
    tracemalloc.stop()
    return result, seconds, peak


def main(flags):
    """Checks, then prints the two tables."""
    if flags.k > flags.n:
        raise UserError(f"--k {flags.k} --n {flags.n}: k is at most n")
    if not set(flags.m) <= set(LATTICES):
        raise UserError(f"--m is of {' '.join(map(str, LATTICES))}")
    rng = np.random.default_rng(flags.seed)
    check(rng)

    print(f"{'front':>10} {'m':>3} {'n':>5} | {'hypervolume':>13} {'seconds':>9} {'MiB':>7}")
    for m in flags.m:
        fronts = [("lattice", simplex_lattice(m, LATTICES[m]).numpy() ** 0.5)]
        fronts += [("sphere", sphere(n, m, rng)) for n in flags.random]
        for name, points in fronts:
            value, seconds, peak = measure(lambda: hypervolume(points, np.full(m, -0.1)), flags.repeats)
            print(f"{name:>10} {m:3d} {len(points):5d} | {value:13.6e} {seconds:9.4f} {peak:7.1f}", flush=True)

    print(f"\nn = {flags.n}, k = {flags.k}")
    print(f"{'scores':>10} {'m':>3} {'corr.':>6} {'F':>3} | {'layers':>6} {'pool':>6} {'overlap':>7} | "
          f"{'sort s':>8} {'select s':>8} {'MiB':>7}")
    for m in (2, 3):
        lams = simplex_lattice(m, 10).numpy()
        for correlation in (0.8, 0.0, -0.8 / (m - 1)):
            points = scores(flags.n, m, correlation, rng)
            for name, given in (("normal", points), ("rounded", np.round(3 * points) / 3)):
                sort = median_time(lambda: nondominated(given), flags.repeats)
                s, seconds, peak = measure(lambda: select_high_quality(given, lams, k=flags.k), flags.repeats)
                print(f"{name:>10} {m:3d} {correlation:6.1f} {len(lams):3d} | {s.layers:6d} {len(s.pool):6d} "
                      f"{s.overlap.mean():7.2f} | {sort:8.3f} {seconds:8.3f} {peak:7.1f}", flush=True)


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
