"""exact.py - the exact front: what the best of all policies reaches on the embedded world, at which preferences, and
the scale that it gives. The optima themselves stand in optimum.py; which one belongs to an objective, in objective.py.

F: preferences   m: dimensions   X: prompts   S: responses
"""
import numpy as np
import torch

from aggregate import sample_preference, simplex_lattice, vertex_paths
from fronts.metrics import hypervolume
from runs.randomness import generator_for


def best(lams, row, world, o):
    """What the best of all policies reach at each preference, for the objective `row` (objective.OBJECTIVES) of a run
    with the settings `o`.

    lams: (F, m)   world: measure.World after reference()   ->  a dict of tensors: J (F, m), log π `logps` (F, X, O),
    and of z, the losses that Tchebycheff aims at, or None; residual: what the solver left of a gradient or a duality
    gap, checked to be 0 but for rounding.
    """
    z = row.least and (o["ideal"] or row.least(world))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                    # for many small matrices a second thread costs more than it gives
    J, logps, residual = row.optimum(lams, world, o | ({"ideal": z} if z else {}))
    torch.set_num_threads(threads)
    if not residual < 1e-8:
        raise RuntimeError(f"the exact front is not exact: residual {residual}")
    return {"J": J, "logps": logps, "z": z, "residual": residual}


def exact_front(lams, row, world, o):
    """The yardstick: the front of all policies by linear scalarisation, which is the limit of J whatever a run's own
    aggregation is.

    Arguments as of best(). Returns a dict of lists: lams; J (F, m); ideal and nadir (m,), the best and the worst J_i on
    the front that gives the scale, this one where the objective names no other; points (F, m), J with ideal at 1 and
    nadir at 0; their hypervolume; scores (F, m), the mean scores of the optimal policies; residual.
    """
    o = o | {"aggregate": "ls"}
    front = best(lams, row, world, o)
    J = front["J"]
    scale = row.scale(lams, world, o)[0] if row.scale else J
    front = {"lams": lams.tolist(), "J": J.tolist(), "ideal": scale.amax(0).tolist(), "nadir": scale.amin(0).tolist(),
             "residual": front["residual"], "scores": world.mean_scores(front["logps"]).tolist()}
    points = normalise(front["J"], front)
    return front | {"points": points.tolist(),
                    "hypervolume": hypervolume(points, [row.exact_points.reference] * points.shape[1])}


def normalise(J, scale):
    """J (…, m) on the scale of an exact front: 1 is its best value of a dimension ("ideal"), 0 its worst ("nadir")."""
    ideal, nadir = np.array(scale["ideal"]), np.array(scale["nadir"])
    return (np.asarray(J, dtype=float) - nadir) / (ideal - nadir)


# ---------------------------------------------------------------------------------------------------------------------
# At which preferences.

PATH = 4                        # preferences on the way from the centre to a vertex, the centre not counted


def evaluation_preferences(m, parts=None):
    """The preferences that a run is evaluated at: (F, m) float64.

    m ≤ 3, or with `parts`: the lattice that cuts the simplex into so many (default 10: 11 preferences for m = 2, 66 for
    m = 3). Beyond, where lattices are coarse or huge: the paths from the centre to the vertices (1 + 4 m preferences),
    and 100 drawn evenly, always the same.
    """
    if parts is not None or m <= 3:
        return simplex_lattice(m, parts or 10)
    drawn = sample_preference(100, m, alpha=1.0, vertex_share=0.0, generator=generator_for(0, "evaluation")).double()
    return torch.cat([vertex_paths(m, PATH), drawn / drawn.sum(-1, keepdim=True)])


def dense(m):
    """Whether lattices of m dimensions can be so dense that their hypervolume is the front's own."""
    return m <= 3


def front_preferences(m):
    """The preferences of the exact front: 101 for m = 2, 861 for m = 3. Beyond no lattice is dense: those that runs are
    evaluated at. (F, m)"""
    return simplex_lattice(m, {2: 100, 3: 40}[m]) if dense(m) else evaluation_preferences(m)


def path_rows(lams, i):
    """Which rows of lams (F, m) show how dimension i follows its weight: those on the path from the centre to vertex i,
    where lams are evaluation_preferences for m > 3; else all."""
    return [0, *range(1 + PATH * i, 1 + PATH * (i + 1))] if on_paths(lams) else list(range(len(lams)))


def drawn_rows(lams):
    """Which rows of lams (F, m) stand evenly for the simplex: the drawn ones, where others lie on paths; else all."""
    return slice(1 + PATH * len(lams[0]) if on_paths(lams) else 0, None)


def on_paths(lams):
    """Whether these are evaluation_preferences for m > 3: the paths to the vertices first, then drawn ones."""
    m = len(lams[0])
    return m > 3 and len(lams) == 101 + PATH * m and np.allclose(lams, evaluation_preferences(m), atol=1e-4)
