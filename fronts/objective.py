"""objective.py - what a run optimises, described once: one row of OBJECTIVES per objective.

A run's config.json names its objective: {"name": a key of OBJECTIVES, "beta", "aggregate": "ls" | "tche", "ideal"}.
Whatever evaluates or draws the run asks this table: how its J is computed on the embedded world, which exact front
stands beside it, what it is measured on where the truth is not known, and what all of this is called. A new objective
is a loss in objectives.py, a choice in its training script, and here its functions and its row: see IPO.

F: preferences   lams: (F, m)   m: dimensions   X: prompts   S: the world's responses   O = S + 1: with "any other text"
Q: distinct problems among the prompts   world: measure.World after reference()   logps: (X, O) log π(y|x) of a policy
o: the objective's dict of config.json
"""
from dataclasses import dataclass, replace
from functools import partial
from typing import Callable

import torch

from aggregate import scalar_reward
from data import toy
from data.rewards import of_world, rewards_of, world_rewards
from data.text_rewards import TEXT_REWARDS
from fronts import optimum
from fronts.measure import DemonstrationFiles, PreferenceFiles, Samples, World, writers
from objectives import dpo_loss, ipo_loss

NATS = 2.0                      # mean scores are normalised by the front of what lies within so many nats of the base


@dataclass(frozen=True)
class Points:
    """What the points of a front are, larger is better.

    planes: what the picture for m = 2 shows, each plane a key of front.json, the unit on its axes, and a title; {} is
    the objective's label. Beside a single plane stands what each dimension reaches by its weight.
    """
    name: str                   # in front.json
    reference: float            # the hypervolume's reference point, the same in every dimension
    planes: tuple


HELD_OUT = "Held-out objective, J = {}"
NORMALISED_J = Points("normalised J", -0.1, (
    ("points", "normalised {}", "Objectives: 1 is the best that any policy can do, 0 the worst on the exact front"),
    ("scores", "Bradley-Terry score", "What the model says: mean scores (grey: of the optimal policies)")))
MEAN_SCORE = Points("normalised mean score", -0.1, (
    ("points", "normalised mean score",
     f"Mean scores: 0 and 1 are the ends of the exact front within {NATS:g} nats of the base"),))
ACCURACY = Points("implicit-reward accuracy", 0.0, (
    ("points", "part of the pairs ordered as labelled", "Held-out accuracy of the implicit reward"),
    ("J", "{}", HELD_OUT)))
GAIN = Points("gain in log-likelihood", -1.0, (
    ("points", "nats", "Gain in log-likelihood on held-out demonstrations"),))
MEAN_REWARD = Points("normalised mean reward", -2.0, (
    ("scores", "reward", "Mean rewards of sampled responses, ± standard error"), ("J", "normalised {}", HELD_OUT)))


@dataclass(frozen=True)
class Objective:
    """One row of the table."""
    short: str                  # in names: "Panacea, DPO"
    label: str                  # J, on axes
    marker: str                 # in pictures where several objectives meet
    J: Callable | None          # (world, logps, beta) -> (m,): exact, on the embedded world; None: mean scores
    optimum: Callable           # (lams, world, o) -> J (F, m) of the best policies, log π (F, X, O), its residual
    held_out: Callable          # (config, model, tokenizer, device, rewards) -> what measures it without a known truth
    points: Points              # …, and what its points are there
    least: Callable | None = None           # world -> Tchebycheff's z, the least losses; None: no function of J
    scale: Callable | None = None           # an optimum whose J have the best at 1 and the worst at 0; None: of "ls"
    exact_points: Points = NORMALISED_J     # what its points are on the embedded world
    speaks: bool = False                    # trained on what the policy says: sampled on the world too
    value: Callable | None = None           # (lams, J, logps (F, X, O), world, o) -> (F,), what is optimised at each
    #                                         λ; None: a function of J alone (evaluation.values)


# ---------------------------------------------------------------------------------------------------------------------
# DPO: J_i = −L_DPO,i, Eq. (2), the expectation over all pairs of listed responses and their Bradley-Terry labels. It
# compares responses with each other, so J does not see the outside mass; the best policies have none.

def listed_only(logps):
    """log π (…, X, S), up to a constant per prompt, of a policy that says nothing else -> (…, X, O)"""
    return optimum.with_outside(logps.log_softmax(-1))


def dpo_J(world, logps, beta):
    """J_i = −L_DPO,i, Eq. (2). (m,)"""
    return -optimum.dpo_losses(beta * (logps - world.ref)[:, :-1], world.wins[world.problems[2]]).mean(0)


def zero(world):
    """No loss of pairs is below 0. -> m floats"""
    return [0.0] * len(world.dims)


def dpo_optimum(lams, world, o):
    """Eq. (14) and (16), over all policies: Newton's method, π* ∝ π_ref exp(h/β)."""
    scores, w, problem = world.problems
    J, h, left = (optimum.dpo_ls(lams, scores, w) if o["aggregate"] == "ls" else
                  optimum.dpo_tche(lams, scores, w, o["ideal"]))
    return J, listed_only(world.ref[:, :-1] + h[:, problem] / o["beta"]), left


# ---------------------------------------------------------------------------------------------------------------------
# IPO Eq. (17) (arXiv:2310.12036): J_i = −L_IPO,i, the expectation over the same pairs and labels. With h = log π/π_ref
# and win_i(a,b) the probability that a is labelled better,
#
#     L_i(h) = mean over pairs {a,b} of (h_a − h_b)² − (h_a − h_b) (2 win_i(a,b) − 1) / β, + 1/(4β²),
#
# a least-squares problem on the complete graph of responses. Its solution for dimension i alone is
# x_i(a) = (1/S) Σ_b (2 win_i(a,b) − 1) / (2β), and labels enter linearly: for weights c it is h = Σ_i c_i x_i.

def ipo_losses(h, wins, beta):
    """L_i of every problem, IPO Eq. (17). h: (…, Q, S)   wins: (Q, m, S), Σ_b win_i(a,b)  ->  (…, Q, m)"""
    S = h.shape[-1]
    h = h - h.mean(-1, keepdim=True)
    pull = torch.einsum("...qs,qms->...qm", h, 2 * wins - (S - 1)) / beta
    return (S * h.square().sum(-1, keepdim=True) - pull) / (S * (S - 1) / 2) + 1 / (4 * beta ** 2)


def ipo_J(world, logps, beta):
    """J_i = −L_IPO,i, (m,)"""
    return -ipo_losses((logps - world.ref)[:, :-1], world.wins[world.problems[2]], beta).mean(0)


def ipo_optimum(lams, world, o):
    """Of IPO Eq. (17): linear scalarisation in closed form; Tchebycheff by its dual, of quadratic functions of c."""
    (_, w, problem), wins, beta, S = world.problems, world.wins, o["beta"], world.wins.shape[-1]
    x = (2 * wins - (S - 1)) / (2 * beta * S)                                                          # (Q, m, S)

    def solve(c, _=None):
        h = torch.einsum("...m,qms->...qs", c, x)
        apart = (x - h[..., None, :]) * w[:, None, None].sqrt()
        return h, w @ ipo_losses(h, wins, beta), -4 / (S - 1) * torch.einsum("qis,qjs->ij", apart, apart)

    if o["aggregate"] == "tche":
        J, h, left = optimum.by_the_dual(lams, torch.tensor(o["ideal"]).double(), solve)
    else:
        h, losses, _ = zip(*map(solve, lams.double() / lams.double().sum(-1, keepdim=True)))
        J, left = -torch.stack(losses), 0.0
    return J, listed_only(world.ref[:, :-1] + torch.stack(h)[:, problem]), left


# ---------------------------------------------------------------------------------------------------------------------
# SFT: J_i = E log π(y|x), y from the writer of dimension i. Other texts count: log π(y|x) is not renormalised.

def sft_J(world, logps, beta):
    """J_i = E log π(y|x), (m,)"""
    return -optimum.sft_losses(logps[..., :-1], world.writers)


def sft_ideal(dims, split):
    """The least losses L_i that any policy can have at the prompts of a split: the writers' entropies, m floats."""
    return optimum.sft_entropies(writers(dims, split)).tolist()


def sft_optimum(lams, world, o):
    """Mixtures of the writers' distributions, whatever the aggregation."""
    J, logps, left = ((*optimum.sft_ls(lams, world.writers), 0.0) if o["aggregate"] == "ls" else
                      optimum.sft_tche(lams, world.writers, o["ideal"]))
    return J, listed_only(logps), left


# ---------------------------------------------------------------------------------------------------------------------
# RLHF: J_i = E r_i − β KL(π ‖ π_ref), Eq. (1), over everything that can be said, as PPO is trained.

def rlhf_J(world, logps, beta):
    """J_i = E r_i − β KL, Eq. (1), (m,)"""
    return optimum.rlhf_objectives(logps, world.ref, world.r, beta)[0]


def rlhf_ideal(world, o):
    """z of Eq. (13), (m,). A trained reward model's own largest rewards are not known: the true ones then."""
    return world.r.amax((0, 1)) if o["ideal"] is None else torch.tensor(o["ideal"], dtype=torch.float64)


def rlhf_optimum(lams, world, o):
    """Eq. (12), (13), in closed form."""
    return *optimum.rlhf_closed_form(lams, world.r, world.ref, o["beta"], o["aggregate"], rlhf_ideal(world, o)), 0.0


def rlhf_value(lams, J, logps, world, o):
    """E R_λ − β KL (F,), what Eq. (12) and (13) maximise: of Tchebycheff no function of J, for its maximum stands
    inside the expectation. logps: (F, X, O)"""
    R = scalar_reward(world.r, lams.double()[:, None, None], o["aggregate"], rlhf_ideal(world, o))    # (F, X, O)
    return torch.stack([optimum.rlhf_objectives(logp, world.ref, r[..., None], o["beta"])[0][0]
                        for logp, r in zip(logps, R)])


# ---------------------------------------------------------------------------------------------------------------------
# Mean scores, what ParetoHqD aims at: J_i = E r_i. Points have the scale of what lies within NATS of the base: without
# a limit the base itself, and all that stays near it, can lie below the worst that is on the front.

def score_optimum(lams, world, o, budget=None):
    """The largest mean scores that a policy can have, at most `budget` nats from the reference (None: at any distance):
    the outer limit of every method."""
    (J,), _, (beta,) = optimum.most_scores(lams, world.scores, world.ref, [budget])
    tilt = torch.einsum("xsm,fm->fxs", world.scores, lams.double()) / beta[:, None, None]
    return J, (world.ref + tilt).log_softmax(-1), 0.0


# ---------------------------------------------------------------------------------------------------------------------

OBJECTIVES = {
    "dpo": Objective("DPO", "−DPO loss", "o", dpo_J, dpo_optimum, partial(PreferenceFiles, dpo_loss), ACCURACY, zero),
    "ipo": Objective("IPO", "−IPO loss", "h", ipo_J, ipo_optimum, partial(PreferenceFiles, ipo_loss), ACCURACY, zero),
    "rlhf": Objective("RLHF", "E r − β KL", "s", rlhf_J, rlhf_optimum, Samples, MEAN_REWARD, speaks=True,
                      value=rlhf_value),
    "sft": Objective("SFT", "E log π(y|x)", "^", sft_J, sft_optimum, DemonstrationFiles, GAIN,
                     lambda world: optimum.sft_entropies(world.writers).tolist()),
    "scores": Objective("scores", "mean score", "P", None, score_optimum, Samples, MEAN_REWARD,
                        scale=partial(score_optimum, budget=NATS), exact_points=MEAN_SCORE)}
POINTS = {kind.name: kind for row in OBJECTIVES.values() for kind in (row.points, row.exact_points)}


def same_objective(results):
    """Whether runs (front.json) may meet in one picture of their own points: what J means is the same for all of them.
    Other aggregations of one objective do meet: each has its own exact front."""
    meaning = lambda r: [r["points_are"], *(r["objective"].get(key) for key in ("name", "beta", "rewards"))]
    return all(meaning(r) == meaning(results[0]) for r in results)


@torch.no_grad()
def measured_on(config, model, tokenizer, device, splits=("new_verbs",)):
    """What a run is measured on: (a World of each split, none where the truth is not known; held-out data or samples,
    or None). All have measured the model, which is still without an adapter."""
    row, dims = OBJECTIVES[config["objective"]["name"]], config["dims"]
    if "rewards" not in config:
        known, rewards, true_rewards = config["flags"]["data"] is None, None, None
    else:
        names, on_world = config["rewards"]["names"], config["prompts"] is None
        rewards = rewards_of(names, config["rewards"]["scale"], on_world, model, device)
        rewards = replace(rewards, **config["rewards"])       # the statistics that the run was trained with, always
        known = on_world and set(dims) <= set(toy.DIMS) and not set(names) & set(TEXT_REWARDS) - set(toy.DIMS)
        # behind a trained reward model stand the world's own scores
        true_rewards = rewards if of_world(names) else world_rewards(dims, None) if known else None
    # for every preference of a large grid exact figures are enough
    sampled = not known or row.speaks and len(dims) <= 3
    worlds = [World(dims, tokenizer, device, row.J, true_rewards, split) for split in splits] if known else []
    for world in worlds:
        world.reference(model)
    return worlds, row.held_out(config, model, tokenizer, device, rewards) if sampled else None
