"""eval_front.py - what a trained run achieves over the whole simplex of preferences, beside what is possible.

    python eval_front.py out/a                   # writes front.json and front.png into the run directory
    python eval_front.py out/a out/b out/c       # the same for each, and one table and picture of all (out/compare);
                                                 # runs of different objectives meet in the space of mean scores
    python eval_front.py out/a --evolution       # the front at every snapshot of the training (Fig. 4)
    python eval_front.py out/a --stationarity    # how far an RLHF run is from Pareto-stationary, before and after

N: preferences   m: dimensions   lams: (N, m)   xi: (N, m) the point reached at each preference, larger is better
DPO: J_i = −L_DPO,i. RLHF: J_i = E r_i − β KL. SFT: J_i = E log π(y|x). ParetoHqD: J_i = E r_i. On the embedded world
all are exact expectations, normalised so that the exact front's best value of a dimension (ideal) is 1 and its worst
(nadir) is 0: exact.py. Elsewhere xi is the implicit-reward accuracy on held-out pairs (DPO), the normalised mean reward of
sampled responses (RLHF, ParetoHqD), or the gain in log-likelihood on held-out demonstrations (SFT): measure.py.
"""
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fronts import exact
from aggregate import linear_scalarization, simplex_lattice, tchebycheff
from runs.device import pick_device
from runs.files import UserError, read_json, write_json
from runs.flags import flag, run_main
from data import toy
from fronts import optimum
from data.text_rewards import TEXT_REWARDS
from data.tokenizers import load_tokenizer
from fronts.measure import (DemonstrationFiles, PreferenceFiles, Samples, World, WorldRewards, dpo_objective, policies,
                            sft_objective)
from model import Transformer
from fronts.dominance import nondominated
from fronts.metrics import hypervolume, inner_product, sparsity, spacing, spearman
from fronts.pictures import draw_comparison, draw_evolution, draw_fronts, draw_histograms
from ops.quantize import dense_state_dict
from data.rewards import Rewards, named_rewards, of_world, world_rewards
from svd_lora import fingerprint, merged_state_dict, read_adapter_header

# The hypervolume's reference point, the same in every dimension, for each kind of points
REFERENCE = {"normalised J": exact.REFERENCE, "normalised mean score": exact.REFERENCE,
             "implicit-reward accuracy": 0.0, "normalised mean reward": -2.0, "gain in log-likelihood": -1.0}


# ---------------------------------------------------------------------------------------------------------------------
# 1. Evaluating one run.

def measurements(config, model, tokenizer, device):
    """What a run is measured on: (exact or held-out data, Samples or None), by the script that made it."""
    flags, dims = config["flags"], config["dims"]
    if config["script"] == "train_dpo.py":
        return (World(dims, tokenizer, device, dpo_objective(dims)) if flags["data"] is None else
                PreferenceFiles(config, model, tokenizer, device)), None
    if config["script"] == "train_sft.py":
        return (World(dims, tokenizer, device, sft_objective(dims)) if flags["data"] is None else
                DemonstrationFiles(config, model, tokenizer, device)), None
    known, names = config["rewards"], flags["rewards"]
    on_world = of_world(names)
    truth_known = flags["prompts"] is None and set(dims) <= set(toy.DIMS) and not (
        set(names or []) & set(TEXT_REWARDS) - set(toy.DIMS))
    if config["script"] == "train_hqd.py" and truth_known:
        return World(dims, tokenizer, device), None
    rewards = (world_rewards(names or dims, known["scale"]) if on_world else
               named_rewards(names, known["scale"], model, device))
    rewards = Rewards(dims, rewards.raw, **known)             # the statistics that the run was trained with, always
    # for every preference of a large grid exact figures are enough
    samples = None if truth_known and len(dims) > 3 else Samples(config, rewards, model, tokenizer, device)
    if not truth_known:
        return samples, None
    return WorldRewards(rewards if on_world else world_rewards(dims, [1.0] * len(dims)), tokenizer, device), samples


def ceiling(data, config, lams):
    """The exact front of a run on the embedded world (exact.py), at `lams`; None where the truth is not known."""
    flags, dims, script = config["flags"], config["dims"], config["script"]
    if isinstance(data, WorldRewards):
        return exact.rlhf_front(lams, data, flags)
    if not isinstance(data, World):
        return None
    if script == "train_dpo.py":
        return exact.dpo_front(lams, dims, flags["aggregate"], data.ref, flags["beta"], flags["ideal"])
    if script == "train_sft.py":
        return exact.sft_front(lams, dims, flags["aggregate"], flags["ideal"])
    return exact.score_front(lams, data.scores, data.ref)


def objective_share(J, base, best, lams, aggregate, z):
    """How much of the way from the base's aggregated objective to the optimum's a run has gone: the mean over lams.

    J, best (N, m): what the run and the optimal policies reach; base (m,); lams (N, m). Linear scalarisation:
    Σ λ_i J_i; Tchebycheff: −max λ_i (−J_i − z_i), Eq. (7), (16). Preferences for which the base is optimal already do not count;
    None where it is for all.
    """
    lams, (J, base, best) = torch.tensor(lams), (torch.tensor(x) for x in (J, base, best))
    value = lambda J: (-tchebycheff(-J, lams, z) if aggregate == "tche" else linear_scalarization(J, lams))
    way, whole = value(J) - value(base), value(best) - value(base)
    return (way / whole)[whole > 1e-9].mean().item() if (whole > 1e-9).any() else None


def base_of(config, device):
    """The base model of a run, as it was trained on: in the same precision, quantised or not."""
    flags = config["flags"]
    _, dtype = pick_device(str(device), flags.get("precision") or "auto")
    return Transformer.from_pretrained(config["base"], dtype, device, flags.get("quantize"))


def evaluate(run, device, parts=None, adapters=None, front=None):
    """Measures one run at every preference of exact.evaluation_preferences. Returns what front.json holds.

    adapters: a snapshot instead of the run's final adapter (Panacea). front: its exact front, if it is known already.
    """
    config = read_json(run / "config.json")
    flags, dims, script = config["flags"], config["dims"], config["script"]
    m, beta = len(dims), flags.get("kl_coeff" if script == "train_ppo.py" else "beta")
    model = base_of(config, device)
    if fingerprint(model) != config["fingerprint"]:
        raise UserError(f"{config['base']} is not the base model that {run} was trained on")
    tokenizer = load_tokenizer(config["tokenizer"])
    if flags.get("eos_id") is not None:
        tokenizer = replace(tokenizer, eos_id=flags["eos_id"])
    data, samples = measurements(config, model, tokenizer, device)
    if adapters is not None:                                  # along the training, what is exact is enough
        samples = None
    measure = lambda policy: (samples.measure(policy, beta) if samples else {}) | data.measure(policy, beta)
    for each in (data, samples):
        if each:
            each.reference(model)
    base = measure(model)                                                             # no adapter yet: π = π_ref
    lams, results = [], []
    grid = exact.evaluation_preferences(m, parts)
    for lam, policy in tqdm(policies(run, config, model, grid.float(), adapters), desc="front", disable=None):
        lams.append([round(x, 6) for x in lam.tolist()])
        results.append(measure(policy))
    column = {key: [r[key] for r in results] for key in results[0]}                   # key -> one value a preference
    J, scores = column["J"], column["scores"]
    front = front or ceiling(data, config, exact.front_preferences(m, torch.tensor(lams)))
    if front:
        points, points_are = exact.normalise(J, front), "normalised J"
        if script == "train_hqd.py":                          # there the scores themselves are what is aimed at
            points_are = "normalised mean score"
        base["points"] = exact.normalise(base["J"], front).tolist()
    elif isinstance(data, Samples):
        points, points_are = data.rewards.normalise(torch.tensor(scores, dtype=torch.float64)).numpy(), \
            "normalised mean reward"
        base["points"] = data.rewards.normalise(torch.tensor(base["scores"], dtype=torch.float64)).tolist()
    else:
        points = np.array(scores)
        points_are = "implicit-reward accuracy" if script == "train_dpo.py" else "gain in log-likelihood"
        # a policy equal to its reference orders no pair
        base["points"] = None if script == "train_dpo.py" else base["scores"]
    reference = [REFERENCE[points_are]] * m
    result = {"run": str(run), "dims": dims, "lams": lams, "J": J, "scores": scores, "points": points.tolist(),
              "points_are": points_are, "hypervolume_share": None, "objective_share": None,
              **metrics(lams, points, reference), "base": base, "exact": None,
              "eval_labels": getattr(data, "labels", None), "models": config["models"], "script": script, "beta": beta,
              **{k: flags[k] for k in ("method", "aggregate", "steps", "seed")},
              **{k: column.get(k) for k in ("kl", "outside_mass", "scores_se", "length", "ended", "collapsed", "told")}}
    if "raw" in column:                                       # the sampled responses, for samples.json and histograms
        result["samples"] = {"base": {key: base.pop(key) for key in ("raw", "texts")},
                             **{key: column[key] for key in ("raw", "texts")}}
    if front:
        # what the optimum itself would score with these few points, from the exact front's nearest preferences
        nearest = [int(np.abs(np.array(front["lams"]) - lam).sum(1).argmin()) for lam in lams]
        same = hypervolume(np.array(front["points"])[nearest], reference) / front["hypervolume"]
        result |= {"hypervolume_share": result["hypervolume"] / front["hypervolume"],
                   "exact": front | {"scores": data.mean_scores(front["logps"]).tolist(), "share_at_these_lams": same}}
        # Tchebycheff's objective for RLHF is no function of J: its maximum stands inside the expectation
        if flags["aggregate"] in ("ls", "tche") and (flags["aggregate"] == "ls" or front["z"]):
            drawn = slice(1 + 4 * m, None) if on_paths(lams) else slice(None)        # the random preferences, for m > 3
            result["objective_share"] = objective_share(J[drawn], base["J"], [front["J"][i] for i in nearest[drawn]],
                                                        lams[drawn], flags["aggregate"], front["z"])
    if front and isinstance(data, WorldRewards):              # the same share, with all other texts in it
        strict = exact.rlhf_front(torch.tensor(front["lams"]), data, flags, everything=True)
        result |= {"J_all": column["J_all"], "kl_all": column["kl_all"], "hypervolume_share_all": hypervolume(
            exact.normalise(column["J_all"], strict), reference) / strict["hypervolume"]}
    return result


def on_paths(lams):
    """Whether these are exact.evaluation_preferences for m > 3: the paths to the vertices first, then random ones."""
    m = len(lams[0])
    usual = exact.evaluation_preferences(m)
    return m > 3 and len(lams) == len(usual) and np.allclose(lams, usual, atol=1e-4)


def metrics(lams, points, reference):
    """The metrics of pareto.py of the points (N, m) that were reached at lams (N, m)."""
    points, m, N = np.asarray(points), len(reference), len(lams)
    kept = nondominated(points)
    # all preferences, or the path from the centre to vertex i
    way = lambda i: [0, *range(1 + 4 * i, 5 + 4 * i)] if on_paths(lams) else range(N)
    return {"hypervolume": hypervolume(points, reference), "reference_point": list(reference),
            "inner_product": inner_product(lams, points), "sparsity": sparsity(points[kept]),
            "spacing": spacing(points[kept]), "nondominated": int(kept.sum()),
            "spearman": [spearman([lams[n][i] for n in way(i)], points[list(way(i)), i]) for i in range(m)]}


# ---------------------------------------------------------------------------------------------------------------------
# 2. Runs of every kind in one space.

BUDGETS = (0.1, 0.25, 0.5, 1.0, exact.NATS)     # nats from the reference that the picture has limits for


def compare(results, device):
    """All runs in the one space that they share, the mean scores of what they say: exact expectations over the embedded
    world's responses. 0 and 1 are the worst and the best value of a dimension on the front of what any policy within
    exact.NATS nats of the reference can reach; a hypervolume's share is of the front without any limit.

    results: front.json of each, of equal dims and base. Returns a dict: limits, the exact fronts of the largest mean
    scores within each of BUDGETS nats of the reference and without any limit; base; runs: label, points (N, m), KL (N),
    metrics, and of_best: how much of the way from the base's λ·scores to the largest at the same KL a policy goes, the
    mean over preferences. Raises UserError for runs that do not lie in this space.
    """
    configs = [read_json(Path(r["run"]) / "config.json") for r in results]
    for r, config in zip(results, configs):
        # RLHF's scores are the world's own unless a text reward stands among them
        if not r["exact"] or any(":" in name for name in config["flags"].get("rewards") or []):
            raise UserError(f"{r['run']} has no exact mean scores of the embedded world's dimensions: only runs that "
                            f"have them, or runs of one script and one beta, can be compared")
        if config["fingerprint"] != configs[0]["fingerprint"]:
            raise UserError(f"{r['run']} has another base model than {results[0]['run']}: not comparable")
    dims = results[0]["dims"]
    world = World(dims, load_tokenizer(configs[0]["tokenizer"]), device)
    world.reference(base_of(configs[0], device))
    ref, before = world.ref.log_softmax(-1), world.mean_scores(world.ref)
    grid = exact.front_preferences(len(dims), torch.empty(0, len(dims)))
    limits, *_ = optimum.score_front(grid, world.scores, ref, [*BUDGETS, None])                        # (K, N, m)
    scale = {"ideal": limits[BUDGETS.index(exact.NATS)].amax(0).tolist(),
             "nadir": limits[BUDGETS.index(exact.NATS)].amin(0).tolist()}
    place = lambda scores: exact.normalise(scores, scale)
    reference = [exact.REFERENCE] * len(dims)
    whole = hypervolume(place(limits[-1]), reference)
    runs = []
    for r in results:
        lams, scores = torch.tensor(r["lams"], dtype=torch.float64), torch.tensor(r["scores"], dtype=torch.float64)
        best = optimum.best_at_kl(lams, torch.tensor(r["kl"], dtype=torch.float64), world.scores, ref)       # (N,)
        gain = linear_scalarization(scores - before, lams) / (best - linear_scalarization(before, lams))
        points = place(scores)
        runs.append({**{k: r[k] for k in ("run", "script", "method", "aggregate", "seed", "models", "steps", "lams", "kl",
                                          "outside_mass")},
                     "label": kind_of(r), "points": points.tolist(), "of_best": gain.mean().item(),
                     **metrics(r["lams"], points, reference),
                     "hypervolume_share": hypervolume(points, reference) / whole,
                     "train_seconds": read_json(Path(r["run"]) / "timing.json")["train_seconds"]})
    return {"dims": dims, "points_are": "normalised mean score", "base": place(before).tolist(), **scale,
            "limits": [{"kl": k, "points": place(J).tolist()} for k, J in zip([*BUDGETS, None], limits)],
            "limit_lams": grid.tolist(), "runs": runs}


def kind_of(r):
    """What a run is called in comparisons: its method, and the objective it was trained with."""
    objective = {"train_dpo.py": "DPO", "train_ppo.py": "RLHF", "train_sft.py": "SFT", "train_hqd.py": ""}[r["script"]]
    if r["script"] == "train_hqd.py":
        return "ParetoHqD" if r["aggregate"] == "directions" else f"HqD, {r['aggregate']}"
    if r["aggregate"] in ("pama", "mgda"):
        return r["aggregate"].upper()
    method = {"panacea": "Panacea", "rs": "RS", "dps": "DPS"}[r["method"]]
    return f"{method}, {objective}" + (" Tche" if r["aggregate"] == "tche" else "")


def comparison_table(c):
    """One line a run of what compare() returns."""
    head = (f"{'run':38} {'what':20} {'models':>6} {'HV':>7} {'HV share':>8} {'IP':>7} {'sparsity':>8} {'spacing':>7} "
            f"{'KL mean':>7} {'KL max':>7} {'of best':>7} {'outside':>7} {'train s':>7}")
    lines = [head, "-" * len(head)]
    for r in c["runs"]:
        lines.append(f"{Path(r['run']).name:38} {r['label']:20} {r['models']:6d} {r['hypervolume']:7.4f} "
                     f"{r['hypervolume_share']:8.4f} {r['inner_product']:7.4f} {r['sparsity']:8.4f} {r['spacing']:7.4f} "
                     f"{np.mean(r['kl']):7.3f} {max(r['kl']):7.3f} {r['of_best']:7.3f} {max(r['outside_mass']):7.3f} "
                     f"{r['train_seconds']:7.0f}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Tables and files.

def stored(result):
    """The result as front.json holds it: without the optimal policies themselves and without the samples."""
    front = result["exact"] and {key: value for key, value in result["exact"].items() if key != "logps"}
    return {key: value for key, value in result.items() if key != "samples"} | {"exact": front}


def table(results):
    """One line a run; the metrics are those of pareto.py, on result["points"]."""
    head = (f"{'run':46} {'HV share':>8} {'J share':>7} {'HV':>7} {'IP':>7} {'sparsity':>8} {'spacing':>7} {'Spearman':>8} "
            f"{'outside':>7} {'collapse':>8} {'models':>6} {'steps':>6} {'train s':>7}")
    lines = [head, "-" * len(head)]
    for r in results:
        share, way, outside, collapse = (
            f"{x:{width}}" if x is not None else f"{'-':>{int(width.split('.')[0])}}" for x, width in
            ((r["hypervolume_share"], "8.4f"), (r["objective_share"], "7.4f"),
             (max(r["outside_mass"], key=lambda x: x or 0), "7.3f"),
             (max(r["collapsed"]) if r["collapsed"] else None, "8.3f")))
        lines.append(f"{Path(r['run']).name:46} {share} {way} {r['hypervolume']:7.4f} {r['inner_product']:7.4f} "
                     f"{r['sparsity']:8.4f} {r['spacing']:7.4f} {min(r['spearman']):8.3f} {outside} {collapse} "
                     f"{r['models']:6d} {r['steps']:6d} "
                     f"{read_json(Path(r['run']) / 'timing.json')['train_seconds']:7.0f}")
    return "\n".join(lines)


def front_table(r):
    """One line a preference: λ, J, the mean scores (± standard error where they are sampled; accuracies for preference
    files), KL, the mass outside the world or the loss on the prompts' own texts, length and collapse rate."""
    what = "acc" if r["eval_labels"] else "score"
    head = " ".join([f"{'λ_' + d[:8]:>10}" for d in r["dims"]] + [f"{'J_' + d[:8]:>10}" for d in r["dims"]]
                    + [f"{what + '_' + d[:8]:>15}" for d in r["dims"]]
                    + [f"{'KL':>7} {'outside':>7} {'told':>6} {'tokens':>6} {'collapse':>8}"])
    lines = [head, "-" * len(head)]
    cell = lambda key, i, form: f"{r[key][i]:{form}}" if r.get(key) and r[key][i] is not None else "-".rjust(
        int(form.split(".")[0]))
    for i, (lam, J, scores) in enumerate(zip(r["lams"], r["J"], r["scores"])):
        error = ([(x * (1 - x) / n) ** 0.5 for x, n in zip(scores, r["eval_labels"])] if r["eval_labels"] else
                 r["scores_se"][i] if r["scores_se"] and not r["exact"] else None)
        shown = [f"{x:.3f}" + (f" ± {error[j]:.3f}" if error else "") for j, x in enumerate(scores)]
        lines.append(" ".join([f"{x:10.2f}" for x in lam] + [f"{x:10.4f}" for x in J] + [f"{x:>15}" for x in shown]
                              + [cell("kl", i, "7.3f"), cell("outside_mass", i, "7.3f"), cell("told", i, "6.3f"),
                                 cell("length", i, "6.1f"), cell("collapsed", i, "8.3f")]))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    runs: list[str] = flag([], "run directories", positional=True)
    parts: int | None = flag(None, "cut the simplex into so many parts (default 10 for m = 2 and 3; beyond, paths from "
                                   "the centre to the vertices and 100 random preferences instead)")
    out: str = flag("out/compare", "where the comparison of several runs is written")
    evolution: bool = flag(False, "evaluate every snapshot of the (one) run instead")
    stationarity: bool = flag(False, "RLHF runs on the embedded world, instead: min ‖Σ c_i ∇J_i‖ of their models, and "
                                     "of the base before")
    device: str = flag("auto", "cpu, cuda, or auto")


def main(flags):
    """Evaluates the runs, prints the tables, writes the JSON files and pictures. Returns the results."""
    device, _ = pick_device(flags.device)
    runs = [Path(run) for run in flags.runs]
    if flags.evolution and len(runs) > 1:
        raise UserError("--evolution takes one run")
    if flags.parts is not None and flags.parts < 1:
        raise UserError(f"--parts {flags.parts}: must be at least 1")
    if flags.evolution:
        return evolution(runs[0], device, flags.parts)
    if flags.stationarity:
        return [stationarity(run, device) for run in runs]
    results, fronts = [], {}
    for run in runs:
        config = read_json(run / "config.json")
        if not (run / "timing.json").exists():
            raise UserError(f"{run}: the training has not ended; run its command again to resume it")
        # runs that share all of this share their exact front
        key = str([config[k] for k in ("script", "base", "dims")]
                  + [config["flags"].get(k) for k in ("aggregate", "ideal", "smooth", "kl_coeff", "beta", "rewards",
                                                      "quantize", "lam") + ("method",) * (len(config["dims"]) > 3)])
        r = evaluate(run, device, flags.parts, front=fronts.get(key))
        fronts[key] = r["exact"]
        if results and r["dims"] != results[0]["dims"]:
            raise UserError(f"{run} has the dimensions {' '.join(r['dims'])}, {runs[0]} has "
                            f"{' '.join(results[0]['dims'])}: their fronts lie in different spaces")
        if "samples" in r:
            write_json(run / "samples.json", {"lams": r["lams"], "dims": r["dims"], **r["samples"]})
            draw_histograms(r, run / "histograms.png")
        write_json(run / "front.json", stored(r))
        draw_fronts([r], run / "front.png")
        results.append(r)
    if len(results) == 1 and len(results[0]["dims"]) <= 3:
        print(front_table(results[0]))
    print(table(results))
    for r in results:
        if "hypervolume_share_all" in r:
            print(f"{Path(r['run']).name}: share {r['hypervolume_share_all']:.4f} where all other texts count too, "
                  f"with the score {toy.OUTSIDE:g}")
    if results[0]["exact"]:
        print(f"HV share: of the exact front's hypervolume {results[0]['exact']['hypervolume']:.4f} on "
              f"{len(results[0]['exact']['lams'])} preferences; the exact front itself, at these "
              f"{len(results[0]['lams'])}: {results[0]['exact']['share_at_these_lams']:.4f}. J share: of the way from "
              f"the base's aggregated objective to the optimum's")
    print(f"reference point {results[0]['reference_point']} in {results[0]['points_are']}; pictures: "
          + ", ".join(str(run / "front.png") for run in runs))
    out = Path(flags.out)
    if len(results) > 1 and all(r[k] == results[0][k] for r in results for k in ("script", "points_are", "beta")):
        write_json(out / "front.json", [stored(r) for r in results])
        draw_fronts(results, out / "front.png")
        print(f"all of them: {out / 'front.png'}")
    elif len(results) > 1:                                    # trained for different things: what do they say?
        c = compare(results, device)
        write_json(out / "compare.json", c)
        draw_comparison(c, out / "compare.png")
        print(comparison_table(c))
        print(f"mean scores of what the runs say, 0 and 1 being the ends of the front of what any policy can reach "
              f"within {exact.NATS:g} nats of the base; HV share: of the front without a limit; of best: of the largest "
              f"gain in λ·scores at the same KL; picture: {out / 'compare.png'}")
    return results


def evolution(run, device, parts):
    """Evaluates every snapshot of one Panacea run: evolution.json and evolution.png in its directory."""
    config = read_json(run / "config.json")
    if config["flags"]["method"] != "panacea" or not (run / "timing.json").exists():
        raise UserError(f"{run}: --evolution takes a finished run of method panacea")
    files = sorted((run / "snapshots").glob("adapter-*.safetensors"))
    steps = [read_adapter_header(f)["step"] for f in files] + [config["flags"]["steps"]]
    results, front = [], None
    for step, file in zip(steps, files + [run / "adapter.safetensors"]):
        results.append(evaluate(run, device, parts, file, front))
        front = results[-1]["exact"]
        print(f"step {step:06d} | hypervolume {results[-1]['hypervolume']:.4f} | "
              f"share {results[-1]['hypervolume_share']}")
    write_json(run / "evolution.json", {"steps": steps, "fronts": [stored(r) for r in results]})
    draw_evolution(steps, results, run / "evolution.png")
    return results


def stationarity(run, device):
    """Pareto-stationarity of every model of a run, at its own λ, and of its base: stationarity.json and one line each.

    At a Pareto-stationary policy some c on the simplex has Σ c_i ∇J_i = 0 (PAMA, Theorem 2). Raises UserError for a run
    that is not RLHF on the embedded world.
    """
    config = read_json(run / "config.json")
    model = base_of(config, device)
    data, _ = measurements(config, model, load_tokenizer(config["tokenizer"]), device)
    if not isinstance(data, WorldRewards):
        raise UserError(f"{run}: --stationarity takes runs of train_ppo.py on the embedded world's own dimensions")
    data.reference(model)
    beta, plain, result = config["flags"]["kl_coeff"], Transformer(model.config).to(model.embed.weight), {}
    plain.load_state_dict(dense_state_dict(model))
    result["before"] = [data.stationarity(plain, beta)]
    result["after"] = []
    for lam, policy in policies(run, config, model, simplex_lattice(len(config["dims"]), 2).float()):
        if config["flags"]["method"] != "rs":                                         # a soup is merged already
            plain.load_state_dict(merged_state_dict(policy, lam if config["flags"]["method"] == "panacea" else None))
        result["after"].append(data.stationarity(policy if config["flags"]["method"] == "rs" else plain, beta))
    for when, entries in result.items():
        for norm, c, norms in entries:
            print(f"{run.name} | {when} | min norm {norm:.4f} | c " + " ".join(f"{x:.3f}" for x in c) + " | norms "
                  + " ".join(f"{d} {x:.4f}" for d, x in zip(config["dims"], norms)))
    write_json(run / "stationarity.json", result)
    return result


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
