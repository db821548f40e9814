"""bench_pareto.py - what the geometry of fronts costs: exact hypervolumes, the selection among 100 000 scored points.

    python bench/bench_pareto.py                    # one thread of a CPU; two tables, about half a minute

m: dimensions   n: points   F: preferences of the lattice in steps of 1/10 (11 for m = 2, 66 for m = 3)
The fronts are concave: `lattice` is the square root of the Das-Dennis lattice of m dimensions (in 10, 4, 4, 4, 4 parts
for m = 3, 5, 7, 8, 10), where scores repeat; `sphere` is random points of the sphere's positive part, where no two are
alike and nearly all of a limit set has to be worked out. The reference is −0.1 for both.
The scores of the selection are normal with one correlation between all objectives, as reward models give them, or the
same rounded to steps of ⅓, so that most points have duplicates; `layers` and `pool` are what was sorted until 1000
points were in the pool, and k = 100 points are then chosen for each preference.
Times are medians over repeats; `MiB` is the most that numpy held at once in one more run. tests/fronts/ holds what is
timed to its definitions: hypervolumes to the cells of a grid, the selection to the rule written as loops.
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
from fronts.tables import table
from runs.flags import flag, run_main

LATTICES = {3: 10, 5: 4, 7: 4, 8: 4, 10: 4}                                               # m: parts
K = 100                                                                                   # points for a preference


@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    n: int = flag(100_000, "points that are selected from", K)
    repeats: int = flag(3, "the tables have medians over so many runs", 1)


def sphere(n, m, rng):
    """n points on the positive part of the sphere: (n, m)"""
    points = np.abs(rng.normal(size=(n, m)))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def scores(n, m, correlation, rng):
    """Normal scores (n, m) of which any two objectives have this correlation."""
    covariance = np.full((m, m), correlation) + (1 - correlation) * np.eye(m)
    return rng.multivariate_normal(np.zeros(m), covariance, n)


def measure(function, repeats):
    """function()'s result, the median time of so many runs of it, and the MiB of one more."""
    seconds = median_time(function, repeats)
    tracemalloc.start()
    result, peak = function(), tracemalloc.get_traced_memory()[1] / 2 ** 20
    tracemalloc.stop()
    return result, seconds, peak


def hypervolumes(flags, rng):
    """The rows of the first table."""
    for m, parts in LATTICES.items():
        fronts = [("lattice", simplex_lattice(m, parts).numpy() ** 0.5)]
        fronts += [("sphere", sphere(n, m, rng)) for n in (100, 300)]
        for name, points in fronts:
            value, seconds, peak = measure(lambda: hypervolume(points, np.full(m, -0.1)), flags.repeats)
            yield name, f"{m}", f"{len(points)}", f"{value:.6e}", f"{seconds:.4f}", f"{peak:.1f}"


def selections(flags, rng):
    """The rows of the second table."""
    for m in (2, 3):
        lams = simplex_lattice(m, 10).numpy()
        for correlation in (0.8, 0.0, -0.8 / (m - 1)):
            points = scores(flags.n, m, correlation, rng)
            for name, given in (("normal", points), ("rounded", np.round(3 * points) / 3)):
                sort = median_time(lambda: nondominated(given), flags.repeats)
                s, seconds, peak = measure(lambda: select_high_quality(given, lams, k=K), flags.repeats)
                yield (name, f"{m}", f"{correlation:.1f}", f"{len(lams)}", f"{s.layers}", f"{len(s.pool)}",
                       f"{s.overlap.mean():.2f}", f"{sort:.3f}", f"{seconds:.3f}", f"{peak:.1f}")


def main(flags):
    """Prints the two tables."""
    rng = np.random.default_rng(0)
    heads = ("front", "m", "n", "hypervolume", "seconds", "MiB")
    print(table(dict(zip(heads, zip(*hypervolumes(flags, rng))))), flush=True)
    heads = ("scores", "m", "corr.", "F", "layers", "pool", "overlap", "sort s", "select s", "MiB")
    print(f"\nn = {flags.n}, k = {K}")
    print(table(dict(zip(heads, zip(*selections(flags, rng))))))


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
