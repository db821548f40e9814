"""comparison.py - runs of every kind in the one space that they share: the mean scores of what they say.

F: preferences   m: dimensions   X: prompts   O: outcomes, the listed responses and any other text
All are exact expectations over everything that can be said on the embedded world. 0 and 1 are the worst and the best
value of a dimension on the front of what any policy within NATS nats of the base can reach. hypervolume_share:
hypervolume divided by that of the front without any limit. gain_share: the gain in λ·scores over the base, divided by
the largest possible gain at the same KL; the mean over λ. Both are at most 1, up to the grid's discretisation.
"""
from pathlib import Path

import torch

from aggregate import linear_scalarization
from data.text_rewards import is_concise
from data.tokenizers import load_tokenizer
from fronts import optimum
from fronts.evaluation import front_metrics
from fronts.exact import front_preferences, normalise
from fronts.measure import World, base_of, run_config
from fronts.metrics import hypervolume
from fronts.objective import MEAN_SCORE, NATS, OBJECTIVES
from runs.files import UserError, read_json

BUDGETS = (0.1, 0.25, 0.5, 1.0, NATS, None)     # nats from the base that the picture has limits for; None: no limit


def compare(results, device):
    """results: front.json of each run, of equal dims and base. Returns a dict: limits, the exact fronts of the largest
    mean scores within each of BUDGETS nats of the base; base; runs: label, points (F, m), KL (F), metrics, gain_share.
    Raises UserError for runs that do not lie in this space."""
    configs = [run_config(Path(r["run"])) for r in results]
    for r, config in zip(results, configs):
        # RLHF's scores are the world's own unless a text reward stands among them
        if not r["exact"] or any(map(is_concise, config.get("rewards", {}).get("names", []))):
            raise UserError(f"{r['run']} has no exact mean scores of the embedded world's dimensions: only runs that "
                            f"have them, or runs of one objective and one beta, can be compared")
        if config["fingerprint"] != configs[0]["fingerprint"]:
            raise UserError(f"{r['run']} has another base model than {results[0]['run']}: not comparable")
    dims = results[0]["dims"]
    world = World(dims, load_tokenizer(configs[0]["tokenizer"]), device)
    world.reference(base_of(configs[0], device))
    before = world.mean_scores(world.ref)
    grid = front_preferences(len(dims))
    limits, *_ = optimum.most_scores(grid, world.scores, world.ref, BUDGETS)                           # (b, F, m)
    scale = limits[BUDGETS.index(NATS)]
    scale = {"ideal": scale.amax(0).tolist(), "nadir": scale.amin(0).tolist()}
    reference = [MEAN_SCORE.reference] * len(dims)
    whole = hypervolume(normalise(limits[-1], scale), reference)

    runs = []
    for r in results:
        lams, scores, kl = (torch.tensor(r[key], dtype=torch.float64) for key in ("lams", "scores", "kl"))
        best = optimum.best_at_kl(lams, kl, world.scores, world.ref)                                   # (F,)
        gain = linear_scalarization(scores - before, lams) / (best - linear_scalarization(before, lams))
        points, short = normalise(scores, scale), OBJECTIVES[r["objective"]["name"]].short
        metrics = front_metrics(r["lams"], points, reference)
        runs.append({**{k: r[k] for k in ("run", "objective", "method", "seed", "models", "steps", "lams", "kl",
                                          "outside_mass")},
                     "label": f"{r['label']}, {short}", "points": points.tolist(), "gain_share": gain.mean().item(),
                     **metrics, "hypervolume_share": metrics["hypervolume"] / whole,
                     "train_seconds": read_json(Path(r["run"]) / "timing.json")["train_seconds"]})
    return {"dims": dims, "points_are": MEAN_SCORE.name, "base": normalise(before, scale).tolist(), **scale,
            "limits": [{"kl": k, "points": normalise(J, scale).tolist()} for k, J in zip(BUDGETS, limits)],
            "limit_lams": grid.tolist(), "runs": runs}
