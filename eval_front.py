"""eval_front.py - what a trained run achieves over the whole simplex of preferences, beside what is possible.

    python eval_front.py out/a                   # writes front.json and front.png into the run directory
    python eval_front.py out/a out/b out/c       # the same for each, and one table and picture of all (out/compare)
    python eval_front.py out/a --evolution       # the front at every snapshot of the training (Fig. 4)
    python eval_front.py out/a --stationarity    # how far an RLHF run is from Pareto-stationary, before and after

N: preferences   m: dimensions   lams: (N, m)   xi: (N, m) the point reached at each preference, larger is better
DPO: J_i = −L_DPO,i. RLHF: J_i = E r_i − β KL. On the embedded world both are exact expectations, normalised so that the
exact front's best value of a dimension (ideal) is 1 and its worst (nadir) is 0. Elsewhere xi is the implicit-reward
accuracy on held-out pairs (DPO), or the normalised mean reward of sampled responses (RLHF): measure.py.
"""
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from aggregate import simplex_lattice
from common import UserError, flag, pick_device, read_json, run_main, write_json
from data import optimum, toy
from data.rewards import TEXT_REWARDS
from data.tokenizers import load_tokenizer
from measure import PreferenceFiles, Samples, World, WorldRewards, policies
from model import Transformer
from pareto import hypervolume, inner_product, nondominated, sparsity, spacing, spearman
from plots import draw_evolution, draw_fronts, draw_histograms
from quantize import dense_state_dict
from rewards import Rewards, named_rewards, world_rewards
from svd_lora import fingerprint, merged_state_dict, read_adapter_header

# The hypervolume's reference point, the same in every dimension, for each kind of points
REFERENCE = {"normalised J": -0.1, "implicit-reward accuracy": 0.0, "normalised mean reward": -2.0}


# ---------------------------------------------------------------------------------------------------------------------
# 1. The exact front of the embedded world, and the scale that it sets.

def exact_dpo_front(dims, aggregate, ideal=None, split="eval"):
    """The best that any policy can do on `split`, for this objective and aggregation, on a fine grid of preferences.

    Returns dict: lams (N, m), J (N, m), ideal (m,), nadir (m,) (the best and worst J_i on the front of linear
    scalarisation), points (N, m) and hypervolume: normalised J and its volume, residual: the largest gradient entry
    (ls) or duality gap (tche) that is left, checked to be 0 but for rounding; and h: a tensor (N, prompts, S), the
    optimal policies as β log π/π_ref.
    """
    lams = fine_grid(len(dims))
    scores, w, problem = optimum.problems(toy.prompts(split), dims)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                              # small matrices: a second thread costs more than it gives
    J, h, residual = optimum.ls_front(lams, scores, w)
    best, worst = J.amax(0), J.amin(0)
    if aggregate == "tche":
        J, h, residual = optimum.tche_front(lams, scores, w, ideal)
    torch.set_num_threads(threads)
    assert residual < 1e-8, f"the exact front is not exact: residual {residual}"
    return _with_points(lams, J, best, worst) | {"residual": residual, "h": h[:, problem]}


def exact_rlhf_front(data, flags, everything=False):
    """The same for RLHF, in closed form. data: measure.WorldRewards after reference(); flags: the run's, a dict;
    everything: "any other text" is an outcome too.

    Returns dict as exact_dpo_front does, without the residual, and logps (N, X, S or O) in the place of h. Its scale is
    that of linear scalarisation for every aggregation. PAMA and MGDA know no preference: their runs stand beside LS's.
    """
    r, ref = (data.r_all, data.ref_all) if everything else (data.r, data.ref)
    lams, beta = fine_grid(r.shape[-1]), flags["kl_coeff"]
    J, logps = optimum.rlhf_front(lams, r, ref, beta)
    best, worst = J.amax(0), J.amin(0)
    if flags["aggregate"] == "tche":
        # a trained reward model's own largest rewards are not these: the true ones then
        ideal = r.amax((0, 1)) if flags["ideal"] is None else torch.tensor(flags["ideal"], dtype=torch.float64)
        J, logps = optimum.rlhf_front(lams, r, ref, beta, "tche", ideal, flags["smooth"])
    return _with_points(lams, J, best, worst) | {"logps": logps}


def _with_points(lams, J, best, worst):
    front = {"lams": lams.tolist(), "J": J.tolist(), "ideal": best.tolist(), "nadir": worst.tolist()}
    points = normalise(front["J"], front)
    reference = [REFERENCE["normalised J"]] * len(best)
    return front | {"points": points.tolist(), "hypervolume": hypervolume(points, reference)}


def normalise(J, exact):
    """J (…, m) on the scale of the exact front: 1 is its best value of a dimension, 0 its worst."""
    ideal, nadir = np.array(exact["ideal"]), np.array(exact["nadir"])
    return (np.array(J, dtype=float) - nadir) / (ideal - nadir)


def parts_for(m):
    """Into how many parts an evaluation cuts the simplex: 11 preferences for m = 2, 66 for m = 3, then 21 to 55."""
    return {1: 1, 2: 10, 3: 10, 4: 4, 5: 3}.get(m, 2)


def fine_grid(m):
    """The preferences of the exact front: 101 for m = 2, 861 for m = 3."""
    return simplex_lattice(m, {2: 100, 3: 40}.get(m, parts_for(m) * 2))


# ---------------------------------------------------------------------------------------------------------------------
# 2. Evaluating runs.

def measurements(config, model, tokenizer, device):
    """What a run is measured on: (exact or held-out data, Samples or None), by the script that made it."""
    flags, dims = config["flags"], config["dims"]
    if config["script"] == "train_dpo.py":
        return (World(dims, tokenizer, device) if flags["data"] is None else
                PreferenceFiles(config, model, tokenizer, device)), None
    known = config["rewards"]
    rewards = (world_rewards(dims, known["scale"]) if flags["rewards"] is None else
               named_rewards(flags["rewards"], known["scale"], model, device))
    rewards = Rewards(dims, rewards.raw, **known)             # the statistics that the run was trained with, always
    samples = Samples(config, rewards, model, tokenizer, device)
    text = set(flags["rewards"] or []) & set(TEXT_REWARDS)                            # "concise" is in both
    if flags["prompts"] is None and set(dims) <= set(toy.DIMS) and not text:          # the truth is known
        true = rewards if flags["rewards"] is None else world_rewards(dims, [1.0] * len(dims))
        return WorldRewards(dims, true, tokenizer, device), samples
    return samples, None


def base_of(config, device):
    """The base model of a run, as it was trained on: in the same precision, quantised or not."""
    flags = config["flags"]
    _, dtype = pick_device(str(device), flags.get("precision") or "auto")
    return Transformer.from_pretrained(config["base"], dtype, device, flags.get("quantize"))


def evaluate(run, device, parts=None, adapters=None, exact=None):
    """Measures one run at every preference of the lattice. Returns what front.json holds.

    adapters: a snapshot instead of the run's final adapter (Panacea). exact: the exact front, if it is known already.
    """
    config = read_json(run / "config.json")
    flags, dims = config["flags"], config["dims"]
    m, rlhf = len(dims), config["script"] == "train_ppo.py"
    beta = flags["kl_coeff" if rlhf else "beta"]
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
    grid = simplex_lattice(m, parts or parts_for(m)).float()
    for lam, policy in tqdm(policies(run, config, model, grid, adapters), desc="front", disable=None):
        lams.append([round(x, 6) for x in lam.tolist()])
        results.append(measure(policy))
    column = {key: [r[key] for r in results] for key in results[0]}                   # key -> one value a preference
    J, scores = column["J"], column["scores"]
    if isinstance(data, World):
        exact = exact or exact_dpo_front(dims, flags["aggregate"], flags["ideal"])
        exact_scores = data.mean_scores(data.ref + exact["h"] / beta)                 # π* ∝ π_ref exp(h/β)
    elif isinstance(data, WorldRewards):
        exact = exact or exact_rlhf_front(data, flags)
        exact_scores = data.mean_scores(exact["logps"])
    if exact:
        points, points_are = normalise(J, exact), "normalised J"
        base["points"] = normalise(base["J"], exact).tolist()
    elif rlhf:
        points, points_are = data.rewards.normalise(torch.tensor(scores, dtype=torch.float64)).numpy(), \
            "normalised mean reward"
        base["points"] = data.rewards.normalise(torch.tensor(base["scores"], dtype=torch.float64)).tolist()
    else:
        points, points_are = np.array(scores), "implicit-reward accuracy"
        base["points"] = None                                 # a policy equal to its reference orders no pair
    reference = [REFERENCE[points_are]] * m
    front = points[nondominated(points)]
    result = {"run": str(run), "dims": dims, "lams": lams, "J": J, "scores": scores, "points": points.tolist(),
              "points_are": points_are,
              "hypervolume": hypervolume(points, reference), "hypervolume_share": None,
              "inner_product": inner_product(lams, points), "sparsity": sparsity(front), "spacing": spacing(front),
              "reference_point": reference, "nondominated": int(nondominated(points).sum()),
              "spearman": [spearman([lam[i] for lam in lams], points[:, i]) for i in range(m)],
              "base": base, "exact": None, "eval_labels": getattr(data, "labels", None), "models": config["models"],
              "script": config["script"], "beta": beta,
              **{k: flags[k] for k in ("method", "aggregate", "steps", "seed")},
              **{k: column.get(k) for k in ("kl", "outside_mass", "scores_se", "length", "ended", "collapsed", "told")}}
    if "raw" in column:                                       # the sampled responses, for samples.json and histograms
        result["samples"] = {"base": {key: base.pop(key) for key in ("raw", "texts")},
                             **{key: column[key] for key in ("raw", "texts")}}
    if exact:
        # what the optimum itself would score with these few points, from the lattice's nearest preferences
        nearest = [int(np.abs(np.array(exact["lams"]) - lam).sum(1).argmin()) for lam in lams]
        same = hypervolume(np.array(exact["points"])[nearest], reference) / exact["hypervolume"]
        result |= {"hypervolume_share": result["hypervolume"] / exact["hypervolume"],
                   "exact": exact | {"scores": exact_scores.tolist(), "share_at_these_lams": same}}
    if exact and rlhf:                                        # the same share, with all other texts in it
        strict = exact_rlhf_front(data, flags, everything=True)
        result |= {"J_all": column["J_all"], "kl_all": column["kl_all"], "hypervolume_share_all": hypervolume(
            normalise(column["J_all"], strict), reference) / strict["hypervolume"]}
    return result


def stored(result):
    """The result as front.json holds it: without the optimal policies themselves and without the samples."""
    exact = result["exact"] and {key: value for key, value in result["exact"].items() if key not in ("h", "logps")}
    return {key: value for key, value in result.items() if key != "samples"} | {"exact": exact}


def table(results):
    """One line a run; the metrics are those of pareto.py, on result["points"]."""
    head = (f"{'run':46} {'HV share':>8} {'HV':>7} {'IP':>7} {'sparsity':>8} {'spacing':>7} {'Spearman':>8} "
            f"{'outside':>7} {'collapse':>8} {'models':>6} {'steps':>6} {'train s':>7}")
    lines = [head, "-" * len(head)]
    for r in results:
        share, outside, collapse = (
            f"{x:{width}}" if x is not None else f"{'-':>{int(width.split('.')[0])}}" for x, width in
            ((r["hypervolume_share"], "8.4f"), (max(r["outside_mass"], key=lambda x: x or 0), "7.3f"),
             (max(r["collapsed"]) if r["collapsed"] else None, "8.3f")))
        lines.append(f"{Path(r['run']).name:46} {share} {r['hypervolume']:7.4f} {r['inner_product']:7.4f} "
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
    parts: int | None = flag(None, "cut the simplex into so many parts (default 10 for m = 2 and 3)")
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
                  + [config["flags"].get(k) for k in ("aggregate", "ideal", "smooth", "kl_coeff", "quantize")])
        r = evaluate(run, device, flags.parts, exact=fronts.get(key))
        fronts[key] = r["exact"]
        if results and any(r[k] != results[0][k] for k in ("script", "points_are", "beta")):
            raise UserError(f"{run} and {runs[0]} were measured on other data or with another beta: not comparable")
        if results and r["dims"] != results[0]["dims"]:
            raise UserError(f"{run} has the dimensions {' '.join(r['dims'])}, {runs[0]} has "
                            f"{' '.join(results[0]['dims'])}: their fronts lie in different spaces")
        if "samples" in r:
            write_json(run / "samples.json", {"lams": r["lams"], "dims": r["dims"], **r["samples"]})
            draw_histograms(r, run / "histograms.png")
        write_json(run / "front.json", stored(r))
        draw_fronts([r], run / "front.png")
        results.append(r)
    if len(results) == 1:
        print(front_table(results[0]))
    print(table(results))
    for r in results:
        if "hypervolume_share_all" in r:
            print(f"{Path(r['run']).name}: share {r['hypervolume_share_all']:.4f} where all other texts count too, "
                  f"with the score {toy.OUTSIDE:g}")
    if results[0]["exact"]:
        print(f"HV share: of the exact front's hypervolume {results[0]['exact']['hypervolume']:.4f} on "
              f"{len(results[0]['exact']['lams'])} preferences; the exact front itself, at these "
              f"{len(results[0]['lams'])}: {results[0]['exact']['share_at_these_lams']:.4f}")
    if len(results) > 1:
        write_json(Path(flags.out) / "front.json", [stored(r) for r in results])
        draw_fronts(results, Path(flags.out) / "front.png")
    print(f"reference point {results[0]['reference_point']} in {results[0]['points_are']}; pictures: "
          + ", ".join(str(run / "front.png") for run in (runs if len(runs) == 1 else [Path(flags.out)])))
    return results


def evolution(run, device, parts):
    """Evaluates every snapshot of one Panacea run: evolution.json and evolution.png in its directory."""
    config = read_json(run / "config.json")
    if config["flags"]["method"] != "panacea" or not (run / "timing.json").exists():
        raise UserError(f"{run}: --evolution takes a finished run of method panacea")
    files = sorted((run / "snapshots").glob("adapter-*.safetensors"))
    steps = [read_adapter_header(f)["step"] for f in files] + [config["flags"]["steps"]]
    results, exact = [], None
    for step, file in zip(steps, files + [run / "adapter.safetensors"]):
        results.append(evaluate(run, device, parts, file, exact))
        exact = results[-1]["exact"]
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
