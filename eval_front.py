"""eval_front.py - what a trained run achieves over the whole simplex of preferences, beside what is possible.

    python eval_front.py out/a                   # writes front.json and front.png into the run directory
    python eval_front.py out/a out/b out/c       # the same for each, and one table and picture of all (out/compare);
                                                 # runs of different objectives meet in the space of mean scores
    python eval_front.py out/a --evolution       # the front at every snapshot of the training (Fig. 4)
    python eval_front.py out/a --stationarity    # how far an RLHF run is from Pareto-stationary, before and after

F: preferences   m: dimensions   lams: (F, m)   points: (F, m) what is reached at each preference, larger is better
What J is, and what it is measured on, stands in fronts/objective.py, one row per objective. On the embedded world
(data/toy.py) J is an exact expectation, normalised so that the exact front's best value of a dimension is 1 and its
worst 0. Elsewhere the points are the accuracy on held-out pairs, the gain in log-likelihood on held-out demonstrations,
or the normalised mean reward of sampled responses. "share": what is reached, divided by what is possible; fronts/
evaluation.py defines each.
"outside": outside mass, the probability that a policy gives to texts other than the world's listed responses.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import toy
from fronts.comparison import compare
from fronts.dominance import nondominated
from fronts.evaluation import evaluate
from fronts.measure import run_config
from fronts.metrics import hypervolume, inner_product, spacing, sparsity
from fronts.objective import NATS, same_objective
from fronts.pictures import draw_comparison, draw_evolution, draw_fronts, draw_histograms
from fronts.stationarity import stationarity
from fronts.tables import shown, table
from runs.files import UserError, read_json, write_json
from runs.flags import flag, run_main
from runs.processes import pick_device
from svd_lora import read_adapter_header

__all__ = ["hypervolume", "inner_product", "sparsity", "spacing", "nondominated"]     # may be imported from here


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
    check(flags, runs)
    if flags.evolution:
        return evolution(runs[0], device, flags.parts)
    if flags.stationarity:
        return [how_stationary(run, device) for run in runs]

    # 1. every run alone: measured; its files and pictures
    results, known = [], {}
    for run in runs:
        r = evaluate(run, device, flags.parts, known=known)
        if samples := r.pop("samples", None):
            samples = {"lams": r["lams"], "dims": r["dims"], **samples}
            write_json(run / "samples.json", samples)
            draw_histograms(samples, run / "histograms.png")
        write_json(run / "front.json", r)
        draw_fronts([r], run / "front.png")
        results.append(r)

    # 2. the tables
    first = results[0]
    if len(results) == 1 and len(first["dims"]) <= 3:
        print(front_table(first))
    print(run_table(results))
    for r in results:
        if "hypervolume_share_all" in r:
            print(f"{Path(r['run']).name}: share {r['hypervolume_share_all']:.4f} where all other texts count too, "
                  f"with the score {toy.OUTSIDE:g}")
    if first["exact"]:
        print(f"HV share: hypervolume divided by the exact front's {first['exact']['hypervolume']:.4f} on "
              f"{len(first['exact']['lams'])} preferences; the exact front itself has, at these "
              f"{len(first['lams'])}: {first['exact']['share_at_these_lams']:.4f}. J share: gain of the aggregated "
              f"objective over the base's, divided by the optimum's gain")
    print(f"reference point {first['reference_point']} in {first['points_are']}; pictures: "
          + ", ".join(str(run / "front.png") for run in runs))

    # 3. several runs: in one picture if they share an objective, else in the space of what they say
    out = Path(flags.out)
    if len(results) > 1 and same_objective(results):
        write_json(out / "front.json", results)
        draw_fronts(results, out / "front.png")
        print(f"all of them: {out / 'front.png'}")
    elif len(results) > 1:
        c = compare(results, device)
        write_json(out / "compare.json", c)
        draw_comparison(c, out / "compare.png")
        print(comparison_table(c))
        print(f"mean scores of what the runs say, 0 and 1 being the ends of the front of what any policy can reach "
              f"within {NATS:g} nats of the base; HV share: hypervolume divided by that of the front without a limit; "
              f"gain share: gain in λ·scores divided by the largest possible gain at the same KL; picture: "
              f"{out / 'compare.png'}")
    return results


def check(flags, runs):
    """Raises UserError for flags that do not fit together, and for runs that cannot be evaluated together."""
    if not runs:
        raise UserError("name the directory of at least one run")
    if flags.evolution and len(runs) > 1:
        raise UserError("--evolution takes one run")
    if flags.parts is not None and flags.parts < 1:
        raise UserError(f"--parts {flags.parts}: must be at least 1")
    configs = [run_config(run) for run in runs]
    for run, config in zip(runs, configs):
        if not (run / "timing.json").exists():
            raise UserError(f"{run}: the training has not ended; run its command again to resume it")
        if flags.evolution and config["method"] != "panacea":
            raise UserError(f"{run}: --evolution takes a finished run of method panacea")
        if config["dims"] != configs[0]["dims"] and not flags.stationarity:
            raise UserError(f"{run} has the dimensions {' '.join(config['dims'])}, {runs[0]} has "
                            f"{' '.join(configs[0]['dims'])}: their fronts lie in different spaces")


# ---------------------------------------------------------------------------------------------------------------------
# Tables.

def metric_columns(results):
    """The metrics of fronts/metrics.py, of the runs' points."""
    keys = {"HV": "hypervolume", "HV share": "hypervolume_share", "IP": "inner_product", "sparsity": "sparsity",
            "spacing": "spacing"}
    return {head: shown([r[key] for r in results], ".4f") for head, key in keys.items()}


def cost_columns(results):
    """Models, steps and seconds of the training."""
    seconds = [read_json(Path(r["run"]) / "timing.json")["train_seconds"] for r in results]
    return {"models": shown([r["models"] for r in results], "d"), "steps": shown([r["steps"] for r in results], "d"),
            "train s": shown(seconds, ".0f")}


def run_table(results):
    """One line per run; collapse: the largest part of its responses, at any preference, that fell into a loop."""
    most = lambda values: max((x for x in values or [] if x is not None), default=None)
    return table({"run": [Path(r["run"]).name for r in results],
                  "J share": shown([r["objective_share"] for r in results], ".4f"), **metric_columns(results),
                  "Spearman": shown([min(r["spearman"]) for r in results], ".3f"),
                  "outside": shown([most(r["outside_mass"]) for r in results], ".3f"),
                  "collapse": shown([most(r["collapsed"]) for r in results], ".3f"), **cost_columns(results)})


def front_table(r):
    """One line per preference: λ, J, the mean scores (± standard error where they are sampled; accuracies for
    preference files), KL, outside mass, the loss on the prompts' own texts in nats per token, tokens, collapse rate."""
    scores, none = np.array(r["scores"]), [None] * len(r["lams"])
    error = ((scores * (1 - scores) / r["eval_labels"]) ** 0.5 if r["eval_labels"] else
             np.array(r["scores_se"]) if r["scores_se"] and not r["exact"] else None)
    what, columns = "acc" if r["eval_labels"] else "score", {}
    for name, values, form in (("λ", r["lams"], ".2f"), ("J", r["J"], ".4f")):
        columns |= {f"{name}_{d[:8]}": shown(column, form) for d, column in zip(r["dims"], zip(*values))}
    for i, dim in enumerate(r["dims"]):
        columns[f"{what}_{dim[:8]}"] = [f"{x:.3f}" + ("" if error is None else f" ± {error[n, i]:.3f}")
                                        for n, x in enumerate(scores[:, i])]
    for head, key, form in (("KL", "kl", ".3f"), ("outside", "outside_mass", ".3f"),
                            ("own text", "own_text_loss", ".3f"), ("tokens", "length", ".1f"),
                            ("collapse", "collapsed", ".3f")):
        columns[head] = shown(r[key] or none, form)
    return table(columns)


def comparison_table(c):
    """One line per run of what fronts.comparison.compare returns."""
    runs = c["runs"]
    return table({"run": [Path(r["run"]).name for r in runs], "what": [r["label"] for r in runs],
                  **metric_columns(runs), "KL mean": shown([np.mean(r["kl"]) for r in runs], ".3f"),
                  "KL max": shown([max(r["kl"]) for r in runs], ".3f"),
                  "gain share": shown([r["gain_share"] for r in runs], ".3f"),
                  "outside": shown([max(r["outside_mass"]) for r in runs], ".3f"), **cost_columns(runs)})


# ---------------------------------------------------------------------------------------------------------------------
# What else can be asked of a run.

def evolution(run, device, parts):
    """Evaluates every snapshot of one Panacea run: evolution.json and evolution.png in its directory."""
    files = sorted((run / "snapshots").glob("adapter-*.safetensors"))
    steps = [read_adapter_header(f)["step"] for f in files] + [run_config(run)["flags"]["steps"]]
    results, known = [], {}
    for step, file in zip(steps, files + [run / "adapter.safetensors"]):
        r = evaluate(run, device, parts, file, known)
        r.pop("samples", None)
        results.append(r)
        print(f"step {step:06d} | hypervolume {r['hypervolume']:.4f} | share {r['hypervolume_share']}")
    write_json(run / "evolution.json", {"steps": steps, "fronts": results})
    draw_evolution(steps, results, run / "evolution.png")
    return results


def how_stationary(run, device):
    """Pareto-stationarity of every model of a run, and of its base before: stationarity.json, and one line each."""
    result, dims = stationarity(run, device), run_config(run)["dims"]
    for when, entries in result.items():
        for norm, c, norms in entries:
            print(f"{run.name} | {when} | min norm {norm:.4f} | c " + " ".join(f"{x:.3f}" for x in c) + " | norms "
                  + " ".join(f"{d} {x:.4f}" for d, x in zip(dims, norms)))
    write_json(run / "stationarity.json", result)
    return result


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
