"""evaluation.py - one run, measured over the whole simplex of preferences: what front.json holds.

F: preferences   m: dimensions   lams: (F, m)   points: (F, m) what is reached at each, larger is better
*regret*: of the way from the base's aggregated objective to the optimum's, the share that is missing, summed over the
preferences before dividing: 0 is optimal, 1 the base model, above 1 worse than the base. It asks at every λ for what
the run was trained for, Eq. (6) or (7).
*share*: a run's hypervolume, divided by that of the exact front of linear scalarisation, on a lattice so dense that no
policy has more; for m > 3 no lattice is dense. Beside it stands the same divided by what the optimal policies have at
the very preferences of the run (at_lams): few points, so that a run can have more.
"""
import numpy as np
import torch

from aggregate import linear_scalarization, tchebycheff
from data.tokenizers import tokenizer_of
from fronts.dominance import nondominated
from fronts.exact import (
    best,
    dense,
    drawn_rows,
    evaluation_preferences,
    exact_front,
    front_preferences,
    normalise,
    path_rows,
)
from fronts.measure import base_of, policies, run_config
from fronts.metrics import hypervolume, inner_product, spacing, sparsity, spearman
from fronts.objective import ACCURACY, OBJECTIVES, measured_on
from runs.files import UserError, bar
from svd_lora import fingerprint

SPLITS = ("seen", "new_verbs")         # of the embedded world; the last one is the headline's


@torch.no_grad()
def evaluate(run, device, known, parts=None, adapters=None, splits=SPLITS, **mixture):
    """Measures one run at every preference of exact.evaluation_preferences. Returns what front.json holds, and what
    samples.json holds, the rewards and texts: None where no responses were sampled.

    known: a dict that keeps exact fronts, for runs that share them. adapters: a snapshot instead of the run's final
    adapter (Panacea); then only what is exact is measured. splits: of the embedded world; all but "splits" is of the
    last one. mixture: mix, factor of policies(). Raises UserError for another base model than the run's.
    """
    config = run_config(run)
    o, flags, dims = config["objective"], config["flags"], config["dims"]
    row, m = OBJECTIVES[o["name"]], len(dims)
    model = base_of(config, device)
    if fingerprint(model) != config["fingerprint"]:
        raise UserError(f"{config['base']} is not the base model that {run} was trained on")
    tokenizer = tokenizer_of(config)

    # 1. what the base reaches, and the run at every preference: exactly on every split, and by what is held out
    worlds, held_out = measured_on(config, model, tokenizer, device, splits)
    sources = {world.split: world for world in worlds} | (
        {"held out": held_out} if held_out and not (adapters and worlds) else {})
    grid = evaluation_preferences(m, parts).float()
    n = len(grid) if config["method"] in ("panacea", "prompt", "rs") else config["models"]
    each = bar(policies(run, config, model, grid, adapters, **mixture), "front", n)
    base, lams, columns = measured(sources, model, grid, each, o["beta"])

    # 2. of the embedded world's splits: regret; exact figures of the last one replace sampled ones
    exact = {world.split: cached(known, config, world, best, lams) for world in worlds}
    by_split = {world.split: regret(base[world.split], columns[world.split], exact[world.split], lams, world, row, o)
                | {key: columns[world.split][key] for key in ("J", "outside_mass")} for world in worlds}
    shown = [name for name in ("held out", splits[-1]) if name in sources]
    column = {"kl": None, "outside_mass": None} | {k: v for name in shown for k, v in columns[name].items()}
    base = {"kl": None, "outside_mass": None} | {k: v for name in shown for k, v in base[name].items()}

    # 3. points: J on the scale of the exact front, or what the held-out data say
    front, kind = None, row.points
    if worlds:
        kind, front = row.exact_points, cached(known, config, worlds[-1], exact_front, front_preferences(m).tolist())
        column["points"], base["points"] = (normalise(x["J"], front).tolist() for x in (column, base))
    elif kind is ACCURACY:
        base["points"] = None                                                         # the base itself orders no pair
    rewards = {"rewards": {k: config["rewards"][k] for k in ("names", "scale")}} if "rewards" in config else {}
    result = {"run": str(run), "objective": o | rewards, "steps": flags["steps"], "seed": flags["seed"],
              "lams": lams, "points_are": kind.name, "split": splits[-1] if worlds else None,
              "hypervolume_share": None, "hypervolume_share_at_lams": None,
              **{k: by_split[splits[-1]][k] if worlds else None for k in ("regret", "regret_worst", "worst_lam")},
              "splits": by_split, "base": {k: v for k, v in base.items() if k not in ("raw", "texts", "logps")},
              "exact": front, **{k: config[k] for k in ("method", "label", "models", "dims")},
              **{k: column.get(k) for k in ("J", "scores", "points", "kl", "outside_mass", "scores_se", "length",
                                            "ended", "collapsed", "own_text_loss")},
              "eval_labels": getattr(held_out, "labels", None),
              **front_metrics(lams, column["points"], [kind.reference] * m)}
    if front:
        result |= shares(result, exact[splits[-1]], worlds[-1])
    samples = {"lams": lams, "dims": dims, "raw": column["raw"], "texts": column["texts"],
               "base": {key: base[key] for key in ("raw", "texts")}} if "raw" in column else None
    return result, samples


def measured(sources, model, grid, policies, beta):
    """What every source (a name -> what has measure()) says of the base `model`, which has no adapter yet, and of a
    run's policies: base {name: {key: value}}, the preferences (F, m), and columns {name: {key: F values}}. A run of one
    policy answers every preference of the grid (F, m) with it. Raises UserError for a J that is no number."""
    measure = lambda policy: {name: source.measure(policy, beta) for name, source in sources.items()}
    base, lams, results = measure(model), [], []
    for lam, policy in policies:
        lams.append(lam)
        results.append(measure(policy))
        if not all(np.isfinite(r["J"]).all() for r in results[-1].values()):
            raise UserError(f"J is not finite at λ = {' '.join(f'{x:.2f}' for x in lam.tolist())}: the training has "
                            f"diverged; train again with a lower --lr (and --overwrite)")
    if len(lams) == 1 < len(grid):
        lams, results = grid, results * len(grid)
    return (base, [[round(x, 6) for x in lam.tolist()] for lam in lams],
            {name: {key: [r[name][key] for r in results] for key in base[name]} for name in sources})


def cached(known, config, world, exact, lams):
    """exact.best or exact.exact_front of a run's objective at lams (F, m), a list, out of the dict `known` where it has
    been computed for the same objective, base and split."""
    o = config["objective"] if exact is best else config["objective"] | {"aggregate": "ls", "ideal": None}
    key = str([exact.__name__, o, config.get("rewards"), config["dims"], config["fingerprint"], world.split, lams,
               *(config["flags"].get(k) for k in ("quantize", "precision"))])
    if key not in known:
        known[key] = exact(torch.tensor(lams, dtype=torch.float64), OBJECTIVES[o["name"]], world, o)
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


def shares(r, exact, world):
    """hypervolume_share and hypervolume_share_at_lams of a result, and "exact": the front, and of the optimal policies
    at the run's own preferences (exact.best) their J, points and scores, and the share that they have."""
    front, reference = r["exact"], r["reference_point"]
    at = {"J": exact["J"].tolist(), "points": normalise(exact["J"], front).tolist(), "z": exact["z"],
          "scores": world.mean_scores(exact["logps"]).tolist()}
    volume, share = hypervolume(at["points"], reference), dense(len(reference))
    at["hypervolume_share"] = volume / front["hypervolume"] if share else None
    return {"hypervolume_share": r["hypervolume"] / front["hypervolume"] if share else None,
            "hypervolume_share_at_lams": r["hypervolume"] / volume if volume else None,
            "exact": front | {"at_lams": at}}


def regret(base, columns, exact, lams, world, row, o):
    """regret = 1 − Σ_λ gain / Σ_λ possible gain, the largest 1 − gain / possible gain of a single λ, and that λ.

    base, columns: what measure() says of the base, and lists of it over lams; exact: exact.best at lams. The gains are
    those of the aggregated objective over the base's. Where preferences lie on paths (m > 3), the sums are over those
    that were drawn. Preferences for which the base is optimal already have no regret of their own.
    """
    lams, rows, at = torch.tensor(lams, dtype=torch.float64), drawn_rows(lams), row.value or values
    value = lambda J, logps: at(lams, J, logps, world, o | {"z": exact["z"]})
    repeat = lambda x: torch.as_tensor(x, dtype=torch.float64).expand(len(lams), *torch.as_tensor(x).shape)
    before = value(repeat(base["J"]), repeat(base["logps"]))
    gain = value(torch.tensor(columns["J"], dtype=torch.float64), torch.stack(columns["logps"])) - before
    possible = value(exact["J"], exact["logps"]) - before                                             # (F,)
    each = torch.where(possible > 1e-9, 1 - gain / possible.clamp(min=1e-9), 0.0)
    worst = int(each.argmax())
    return {"regret": (1 - gain[rows].sum() / possible[rows].sum()).item(), "regret_worst": each[worst].item(),
            "worst_lam": lams[worst].tolist()}


def values(lams, J, logps, world, o):
    """The aggregated objective at every λ, (F,), larger is better: Σ λ_i J_i, Eq. (6), or Tchebycheff's
    −max λ_i (−J_i − z_i), Eq. (7), (15), (16). lams, J: (F, m)   o["z"]: (m,)"""
    return -tchebycheff(-J, lams, o["z"]) if o["aggregate"] == "tche" else linear_scalarization(J, lams)
