"""exact.py - the ceilings: what the best of all policies reaches on the embedded world, as an evaluation needs it.

N: preferences   m: dimensions   X: prompts   S: responses   O = S + 1: with "any other text"
Every function returns a dict: lams (N, m); J (N, m), the objectives of the optimal policies; ideal and nadir (m,), the
best and the worst J_i on the front of linear scalarisation; points (N, m), J with ideal at 1 and nadir at 0;
hypervolume of these; logps (N, X, ·), the optimal policies themselves; and z (m,), the losses that Tchebycheff aims at,
or None. The mathematics is data/optimum.py's.
"""
import numpy as np
import torch

from aggregate import sample_preference, simplex_lattice, vertex_paths
from runs.randomness import generator_for
from data import toy
from fronts import optimum
from fronts.metrics import hypervolume

REFERENCE = -0.1                # the hypervolume's reference point in every dimension of normalised points
NATS = 2.0                      # mean scores are normalised by the front of what lies within so many nats


def dpo_front(lams, dims, aggregate, ref, beta, ideal=None, split="eval"):
    """Eq. (14), (16) by Newton's method. ref: (X, S) log π_ref. Also residual: the largest gradient entry (ls) or
    duality gap (tche) that is left, checked to be 0 but for rounding."""
    scores, w, problem = optimum.problems(toy.prompts(split), dims)
    with one_thread():
        J, h, residual = optimum.ls_front(lams, scores, w)
        best, worst = J.amax(0), J.amin(0)
        if aggregate == "tche":
            J, h, residual = optimum.tche_front(lams, scores, w, ideal)
    assert residual < 1e-8, f"the exact front is not exact: residual {residual}"
    return _front(lams, J, best, worst, ref + h[:, problem] / beta,                   # π* ∝ π_ref exp(h/β)
                  ideal or [0.0] * len(dims)) | {"residual": residual}


def sft_front(lams, dims, aggregate, ideal=None, split="eval"):
    """The SFT objective: a mixture of the writers' distributions, whatever the aggregation. Also residual, as above."""
    demos = torch.stack([toy.demonstrator_probs(x, dims) for x in toy.prompts(split)])             # (X, S, m)
    with one_thread():
        J, logps, residual = optimum.sft_front(lams, demos)
        best, worst = J.amax(0), J.amin(0)
        if aggregate == "tche":
            J, logps, residual = optimum.sft_front(lams, demos, "tche", ideal)
    assert residual < 1e-8, f"the exact front is not exact: residual {residual}"
    return _front(lams, J, best, worst, logps, ideal or sft_ideal(dims, split)) | {"residual": residual}


def sft_ideal(dims, split="eval"):
    """The smallest losses L_i that any policy can have, (m,): the entropies of the writers, each alone."""
    demos = torch.stack([toy.demonstrator_probs(x, dims) for x in toy.prompts(split)])
    return optimum.sft_losses(demos.log().movedim(-1, 0), demos).diagonal().tolist()   # L_j of p_i: (m, m)


def rlhf_front(lams, data, flags, everything=False):
    """Eq. (12), (13), in closed form. data: measure.WorldRewards after reference(); flags: the run's, a dict;
    everything: "any other text" is an outcome too.

    The scale is that of linear scalarisation for every aggregation. PAMA and MGDA know no preference: their runs stand
    beside LS's.
    """
    r, ref = (data.r_all, data.ref_all) if everything else (data.r, data.ref)
    J, logps = optimum.rlhf_front(lams, r, ref, flags["kl_coeff"])
    best, worst = J.amax(0), J.amin(0)
    if flags["aggregate"] == "tche":
        # a trained reward model's own largest rewards are not these: the true ones then
        ideal = r.amax((0, 1)) if flags["ideal"] is None else torch.tensor(flags["ideal"], dtype=torch.float64)
        J, logps = optimum.rlhf_front(lams, r, ref, flags["kl_coeff"], "tche", ideal, flags["smooth"])
    return _front(lams, J, best, worst, logps, None)


def score_front(lams, scores, ref, budget=None):
    """The largest mean scores that a policy can have, at most `budget` nats from the reference (None: at any distance):
    the outer limit of every method. scores: (X, S, m)   ref: (X, S) log π_ref. J are mean scores.

    Points of every budget have one scale, that of NATS: without a limit the base itself, and all that stays near it,
    can lie below the worst that is on the front.
    """
    J, _, beta = optimum.score_front(lams, scores, ref.log_softmax(-1), [budget, NATS])
    logps = (ref + torch.einsum("xsm,nm->nxs", scores, lams.double()) / beta[0][:, None, None]).log_softmax(-1)
    return _front(lams, J[0], J[1].amax(0), J[1].amin(0), logps, None)


def _front(lams, J, best, worst, logps, z):
    front = {"lams": lams.tolist(), "J": J.tolist(), "ideal": best.tolist(), "nadir": worst.tolist(), "z": z}
    points = normalise(front["J"], front)
    return front | {"points": points.tolist(), "hypervolume": hypervolume(points, [REFERENCE] * len(best)),
                    "logps": logps}


def normalise(J, exact):
    """J (…, m) on the scale of the exact front: 1 is its best value of a dimension, 0 its worst."""
    ideal, nadir = np.array(exact["ideal"]), np.array(exact["nadir"])
    return (np.asarray(J, dtype=float) - nadir) / (ideal - nadir)


class one_thread:
    """Within it torch computes on one thread: for many small matrices a second one costs more than it gives."""

    def __enter__(self):
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_):
        torch.set_num_threads(self.threads)


# ---------------------------------------------------------------------------------------------------------------------
# At which preferences.

def evaluation_preferences(m, parts=None):
    """The preferences that a run is evaluated at: (N, m) float64.

    m ≤ 3, or with `parts`: the lattice that cuts the simplex into so many (default 10: 11 preferences for m = 2, 66 for
    m = 3). Beyond, where lattices are coarse or huge: the paths from the centre to the vertices (1 + 4 m preferences),
    and 100 drawn evenly, always the same.
    """
    if parts is not None or m <= 3:
        return simplex_lattice(m, parts or (10 if m > 1 else 1))
    drawn = sample_preference(100, m, alpha=1.0, vertex_share=0.0, generator=generator_for(0, "evaluation")).double()
    return torch.cat([vertex_paths(m), drawn / drawn.sum(-1, keepdim=True)])


def front_preferences(m, evaluated):
    """The preferences of the exact front, those evaluated among them: 101 for m = 2, 861 for m = 3; for more dimensions
    evaluation_preferences and, for models that have their own, these too. (N, m)"""
    grid = simplex_lattice(m, {2: 100, 3: 40}[m]) if m <= 3 else evaluation_preferences(m)
    new = [lam for lam in evaluated.double() if (grid - lam).abs().amax(1).min() > 1e-5]
    return torch.cat([grid, torch.stack(new)]) if new and m > 3 else grid
