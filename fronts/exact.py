"""exact.py - the exact front: what the best of all policies reaches on the embedded world, at which preferences, and
the scale that it gives. The optima themselves stand in optimum.py; which one belongs to an objective, in objective.py.

F: preferences   m: dimensions   X: prompts   S: responses
"""
import numpy as np
import torch

from aggregate import sample_preference, simplex_lattice, vertex_paths
from fronts.metrics import hypervolume
from runs.randomness import generator_for


def exact_front(lams, row, world, o):
    """The front of all policies for the objective `row` (objective.OBJECTIVES) of a run with the settings `o`.

    lams: (F, m)   world: measure.World after reference()   o["everything"]: all other texts count as one more response
    Returns a dict: lams; J (F, m); ideal and nadir (m,), the best and the worst J_i on the front that gives the scale,
    which is that of linear scalarisation where the objective names no other; points (F, m), J with ideal at 1 and
    nadir at 0; their hypervolume; scores (F, m), the mean scores of the optimal policies; z (m,), the losses that
    Tchebycheff aims at, or None; residual: what the solver left of a gradient or a duality gap, checked to be 0 but for
    rounding.
    """
    z = row.least and (o["ideal"] or row.least(world))
    o = o | ({"ideal": z} if z else {})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                    # for many small matrices a second thread costs more than it gives
    J, logps, residual = row.optimum(lams, world, o)
    own = o["aggregate"] == "ls" and not row.scale
    scale = J if own else (row.scale or row.optimum)(lams, world, o | {"aggregate": "ls"})[0]
    torch.set_num_threads(threads)
    if not residual < 1e-8:
        raise RuntimeError(f"the exact front is not exact: residual {residual}")
    front = {"lams": lams.tolist(), "J": J.tolist(), "ideal": scale.amax(0).tolist(), "nadir": scale.amin(0).tolist(),
             "z": z, "residual": residual}
    points = normalise(front["J"], front)
    volume = hypervolume(points, [row.exact_points.reference] * points.shape[1])
    return front | {"points": points.tolist(), "hypervolume": volume,
                    "scores": world.mean_scores(logps[..., :world.scores.shape[1]]).tolist()}


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


def front_preferences(m, evaluated):
    """The preferences of the exact front, those evaluated among them: 101 for m = 2, 861 for m = 3; for more dimensions
    evaluation_preferences and, for models that have their own, these too. (F, m)"""
    grid = simplex_lattice(m, {2: 100, 3: 40}[m]) if m <= 3 else evaluation_preferences(m)
    new = [lam for lam in evaluated.double() if (grid - lam).abs().amax(1).min() > 1e-5]
    return torch.cat([grid, torch.stack(new)]) if new and m > 3 else grid


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
