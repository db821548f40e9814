"""evaluation.py - one run, measured over the whole simplex of preferences: what front.json holds.

F: preferences   m: dimensions   lams: (F, m)   points: (F, m) what is reached at each, larger is better
A *share* is what a run reaches, divided by what is possible. hypervolume_share: its hypervolume, divided by the exact
front's; by linear scalarisation at most 1, up to discretisation (docs/metrics.md: Tchebycheff's may exceed it).
objective_share: the gain of its aggregated objective over the base's, divided by the optimum's gain; at most 1, and
below 0 if the run is worse.
"""
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from aggregate import linear_scalarization, tchebycheff
from data.tokenizers import load_tokenizer
from fronts.dominance import nondominated
from fronts.exact import drawn_rows, evaluation_preferences, exact_front, front_preferences, normalise, path_rows
from fronts.measure import base_of, policies, run_config
from fronts.metrics import hypervolume, inner_product, spacing, sparsity, spearman
from fronts.objective import ACCURACY, OBJECTIVES, measured_on
from runs.files import UserError
from svd_lora import fingerprint

# Σ λ_i J_i, or Tchebycheff's maximum, is what these methods optimise; others have no aggregated objective
AGGREGATED = ("panacea", "rs", "dps", "prompt")


@torch.no_grad()
def evaluate(run, device, known, parts=None, adapters=None, **mixture):
    """Measures one run at every preference of exact.evaluation_preferences. Returns what front.json holds, and what
    samples.json holds, the rewards and texts: None where no responses were sampled.

    known: a dict that keeps exact fronts, for runs that share them. adapters: a snapshot instead of the run's final
    adapter (Panacea); then only what is exact is measured. mixture: mix, factor of policies(). Raises UserError for
    another base model than the run's.
    """
    config = run_config(run)
    o, flags, dims = config["objective"], config["flags"], config["dims"]
    row, m = OBJECTIVES[o["name"]], len(dims)
    model = base_of(config, device)
    if fingerprint(model) != config["fingerprint"]:
        raise UserError(f"{config['base']} is not the base model that {run} was trained on")
    tokenizer = load_tokenizer(config["tokenizer"])
    if flags.get("eos_id") is not None:
        tokenizer = replace(tokenizer, eos_id=flags["eos_id"])

    # 1. what the base reaches, and the run at every preference; exact figures replace sampled ones
    world, held_out = measured_on(config, model, tokenizer, device)
    data = [each for each in (held_out if adapters is None or world is None else None, world) if each]
    measure = lambda policy: {"kl": None, "outside_mass": None} | {
        k: v for each in data for k, v in each.measure(policy, o["beta"]).items()}
    base, lams, results = measure(model), [], []                                      # no adapter yet: π = π_ref
    grid = evaluation_preferences(m, parts).float()
    for lam, policy in tqdm(policies(run, config, model, grid, adapters, **mixture), desc="front", disable=None):
        lams.append([round(x, 6) for x in lam.tolist()])
        results.append(measure(policy))
    if config["method"] == "dps" and len(lams) == 1:                # one compromise: its answer to every preference
        lams, results = [[round(x, 6) for x in lam] for lam in grid.tolist()], results * len(grid)
    column = {key: [r[key] for r in results] for key in results[0]}                   # key -> one value per preference

    # 2. points: J on the scale of the exact front, or what the held-out data say
    front, kind = None, row.points
    if world:
        front, kind = cached_front(known, config, world, front_preferences(m, torch.tensor(lams))), row.exact_points
        column["points"], base["points"] = (normalise(x["J"], front).tolist() for x in (column, base))
    elif kind is ACCURACY:
        base["points"] = None                                                         # the base itself orders no pair
    rewards = {"rewards": {k: config["rewards"][k] for k in ("names", "scale")}} if "rewards" in config else {}
    result = {"run": str(run), "objective": o | rewards, "steps": flags["steps"], "seed": flags["seed"],
              "lams": lams, "points_are": kind.name, "hypervolume_share": None, "objective_share": None,
              "base": base, "exact": front, **{k: config[k] for k in ("method", "label", "models", "dims")},
              **{k: column.get(k) for k in ("J", "scores", "points", "kl", "outside_mass", "scores_se", "length",
                                            "ended", "collapsed", "own_text_loss")},
              "eval_labels": getattr(held_out, "labels", None),
              **front_metrics(lams, column["points"], [kind.reference] * m)}
    samples = {"lams": lams, "dims": dims, "raw": column["raw"], "texts": column["texts"],
               "base": {key: base.pop(key) for key in ("raw", "texts")}} if "raw" in column else None

    # 3. shares of what is possible
    if front:
        result |= shares(result, front)
    if front and row.speaks:                             # the same where all other texts count, too
        strict = exact_front(torch.tensor(front["lams"], dtype=torch.float64), row, world, o | {"everything": True})
        result |= {"J_all": column["J_all"], "kl_all": column["kl_all"], "hypervolume_share_all": hypervolume(
            normalise(column["J_all"], strict), result["reference_point"]) / strict["hypervolume"]}
    return result, samples


def cached_front(known, config, world, lams):
    """The exact front of a run on the world, out of the dict `known` where one of its objective and base is there."""
    key = str([config["objective"], config.get("rewards"), config["dims"], config["fingerprint"], lams.tolist(),
               *(config["flags"].get(k) for k in ("quantize", "precision"))])
    if key not in known:
        known[key] = exact_front(lams, OBJECTIVES[config["objective"]["name"]], world, config["objective"])
    return known[key]


def front_metrics(lams, points, reference):
    """What metrics.py says of the points (F, m) that were reached at lams (F, m); reference (m,): hypervolume's."""
    points = np.asarray(points)
    kept = nondominated(points)
    along = [path_rows(lams, i) for i in range(len(reference))]
    return {"hypervolume": hypervolume(points, reference), "reference_point": list(reference),
            "inner_product": inner_product(lams, points), "sparsity": sparsity(points[kept]),
            "spacing": spacing(points[kept]), "nondominated": int(kept.sum()),
            "spearman": [spearman(np.array(lams)[rows, i], points[rows, i]) for i, rows in enumerate(along)]}


def shares(r, front):
    """hypervolume_share and objective_share of a result, and "exact": the front and the share that the optimal policies
    themselves would have with these few points, from the exact front's nearest preferences."""
    lams, o = r["lams"], r["objective"]
    nearest = [int(np.abs(np.array(front["lams"]) - lam).sum(1).argmin()) for lam in lams]
    same = hypervolume(np.array(front["points"])[nearest], r["reference_point"]) / front["hypervolume"]
    share, rows = None, drawn_rows(lams)
    # Tchebycheff's objective for RLHF is no function of J: its maximum stands inside the expectation. Then z is None
    if r["method"] in AGGREGATED and (o["aggregate"] == "ls" or front["z"]):
        share = objective_share(r["J"][rows], r["base"]["J"], [front["J"][i] for i in nearest[rows]], lams[rows],
                                o["aggregate"], front["z"])
    return {"hypervolume_share": r["hypervolume"] / front["hypervolume"], "objective_share": share,
            "exact": front | {"share_at_these_lams": same}}


def objective_share(J, base, best, lams, aggregate, z):
    """The gain of a run's aggregated objective over the base's, divided by the optimum's gain: the mean over lams.

    J, best (F, m): what the run and the optimal policies reach; base (m,); lams (F, m). Linear scalarisation:
    Σ λ_i J_i, Eq. (6); Tchebycheff: −max λ_i (−J_i − ideal_i), Eq. (7), (15), (16). Preferences for which the base is
    optimal already do not count; None where it is for all.
    """
    lams, (J, base, best) = torch.tensor(lams), (torch.tensor(x) for x in (J, base, best))
    value = lambda J: (-tchebycheff(-J, lams, z) if aggregate == "tche" else linear_scalarization(J, lams))
    gain, possible = value(J) - value(base), value(best) - value(base)
    return (gain / possible)[possible > 1e-9].mean().item() if (possible > 1e-9).any() else None
