"""eval_front.py - what a trained run achieves over the whole simplex of preferences, beside what is possible.

    python eval_front.py out/a                   # writes front.json and front.png into the run directory
    python eval_front.py out/a out/b out/c       # the same for each, and one table and picture of all (out/compare);
                                                 # runs of different objectives meet in the space of mean scores
    python eval_front.py out/a --evolution       # the front at every snapshot of the training (Fig. 4)
    python eval_front.py out/rs --mix logprobs   # MOD: the specialists of rewarded soups mixed by their log-probs
    python eval_front.py out/a --stationarity    # how far an RLHF run is from Pareto-stationary, before and after
    python eval_front.py --list                  # the runs under out/, or DIR (--list DIR): a line each; --tsv, --json

F: preferences   m: dimensions   lams: (F, m)   points: (F, m) what is reached at each preference, larger is better
What J is, and what it is measured on, stands in fronts/objective.py, one row per objective. On the embedded world
(data/toy.py) J is an exact expectation, normalised so that the exact front's best value of a dimension is 1 and its
worst 0. Elsewhere the points are the accuracy on held-out pairs, the gain in log-likelihood on held-out demonstrations,
or the normalised mean reward of sampled responses.
"regret": of the way from the base to the optimum, the part that is missing; "share": hypervolume, divided by the exact
front's; fronts/evaluation.py defines both.
"outside": outside mass, the probability that a policy gives to texts other than the world's listed responses.
"""
import runs.waiting  # noqa: F401  # isort: skip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from data import toy
from fronts.comparison import compare
from fronts.dominance import nondominated
from fronts.evaluation import SPLITS, evaluate
from fronts.measure import run_config
from fronts.metrics import hypervolume, inner_product, spacing, sparsity
from fronts.objective import NATS, OBJECTIVES, same_objective
from fronts.pictures import draw_comparison, draw_evolution, draw_fronts, draw_histograms
from fronts.stationarity import stationarity
from fronts.tables import shown, table
from runs.directory import check_ended, close_run, end_training
from runs.files import UserError, read_json, write_json
from runs.flags import PLAIN, check_valid, flag, run_main
from runs.listing import RECORD, age, runs_under
from runs.processes import pick_device, ranks
from svd_lora import read_adapter_header

__all__ = ["hypervolume", "inner_product", "sparsity", "spacing", "nondominated"]     # may be imported from here


@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    runs: list[str] = flag([], "run directories", positional="any")
    parts: int | None = flag(None, "cut the simplex into so many parts (default 10 for m = 2 and 3; beyond, paths from "
                                   "the centre to the vertices and 100 random preferences instead)", 1)
    out: str = flag("out/compare", "where the comparison of several runs is written")
    validation: bool = flag(False, "measure on the embedded world's validation prompts, on which everything is tuned; "
                                   "written beside the other results, into validation/")
    evolution: bool = flag(False, "evaluate every snapshot of the (one) run instead")
    stationarity: bool = flag(False, "RLHF runs on the embedded world, instead: min ‖Σ c_i ∇J_i‖ of their models, and "
                                     "of the base before")
    mix: Literal["weights", "logprobs"] = flag("weights", "runs of --method rs: average the specialists' weights, or, "
                                                          "as MOD, their log-probs at every token")
    factor: float = flag(1.0, "runs of --method rs: what the specialists change in the base, mixed, times this",
                         "positive")
    device: str = flag("auto", "cpu, cuda, or auto")
    plain: bool = flag(False, PLAIN)
    list: bool = flag(False, "instead: the runs under out/, or under the directories that are named")
    tsv: bool = flag(False, "of --list: for scripts, a line of tab-separated fields each")
    json: bool = flag(False, "of --list: for scripts, one JSON array")


def main(flags):
    """Evaluates the runs, prints the tables, writes the JSON files and pictures. Returns the results."""
    if flags.list:
        return print_list(flags)
    device, _ = pick_device(flags.device, plain=flags.plain)
    runs = [Path(run) for run in flags.runs]
    check(flags, runs)
    if flags.evolution:
        return evolution(runs[0], device, flags.parts)
    if flags.stationarity:
        return [how_stationary(run, device) for run in runs]

    # 1. every run alone: measured; its files and pictures
    results, known = [], {}
    for run in runs:
        r, samples = evaluate(run, device, known, flags.parts, None, ("validation",) if flags.validation else SPLITS,
                              mix=flags.mix, factor=flags.factor)
        r["label"], beside = mixture_label(flags, r["label"]), run / folder(flags)
        if samples:
            write_json(beside / "samples.json", samples)
            draw_histograms(samples, beside / "histograms.png")
        draw_fronts([r], beside / "front.png")
        write_json(beside / "front.json", r)                           # last: where it is, all is
        results.append(r)

    # 2. the tables
    print_tables(results)
    print("pictures: " + ", ".join(str(run / folder(flags) / "front.png") for run in runs))

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
        print(run_table(c["runs"]))
        print(f"mean scores of what the runs say, 0 and 1 being the ends of the front of what any policy can reach "
              f"within {NATS:g} nats of the base; HV share: hypervolume divided by that of the front without a limit; "
              f"gain share: gain in λ·scores divided by the largest possible gain at the same KL; picture: "
              f"{out / 'compare.png'}")
    return results


def finish(out, what, flags, device, dtype, processes=1):
    """Ends a run whose models are trained: sums up its speed, and shows its result. Training scripts call it.
    what: what was trained, for one line   flags: the run's   Returns the run directory."""
    if ranks()[0] == 0:
        end_training(out, what, device, dtype, processes)
    return show(out, flags)


def show(out, flags):
    """The result of a run whose training has ended: the evaluation, or where there has been one, its tables again. Then
    nothing is left to resume. The first process does it. flags: the run's   Returns the run directory."""
    if ranks()[0] > 0:
        return out
    if flags.eval and (out / "front.json").exists():
        try:
            print_tables([read_json(out / "front.json") | {"run": str(out)}])
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            raise UserError(f"{out}/front.json is damaged: python eval_front.py {out} makes it anew") from None
    elif flags.eval:
        main(Flags(runs=[str(out)], device=flags.device))
    close_run(out)
    return out


def print_tables(results):
    """The tables of what front.json holds, of one run or of several, and what their words mean."""
    first, exact = results[0], results[0]["exact"]
    if len(results) == 1 and len(first["dims"]) <= 3:
        print(front_table(first))
    print(run_table(results))
    if exact:
        print(split_table(results))
        print(f"regret: of the way from the base's aggregated objective to the optimum's, the part that is missing, "
              f"over all {len(first['lams'])} preferences, and at the worst of them. All other texts count, with the "
              f"score {toy.OUTSIDE:g}")
    if exact and exact["at_lams"]["hypervolume_share"]:
        print(f"HV share: hypervolume divided by the exact front's {exact['hypervolume']:.4f} on {len(exact['lams'])} "
              f"preferences; the optimal policies themselves have, at these {len(first['lams'])}: "
              f"{exact['at_lams']['hypervolume_share']:.4f}; the base model: "
              f"{hypervolume([first['base']['points']], first['reference_point']) / exact['hypervolume']:.4f}")
    print(f"reference point {first['reference_point']} in {first['points_are']}")


def check(flags, runs):
    """Raises UserError for flags that do not fit together, and for runs that cannot be evaluated together."""
    check_valid(flags)
    if not runs:
        raise UserError("name the directory of at least one run")
    if flags.evolution and len(runs) > 1:
        raise UserError("--evolution takes one run")
    configs = [run_config(run) for run in runs]
    for run, config in zip(runs, configs):
        check_ended(run)
        if config["objective"].get("name") not in list(OBJECTIVES) or not isinstance(train_seconds(run), float):
            raise UserError(f"{run}: no training has written this config.json and timing.json: train the run again")
        if mixture_folder(flags) and (config["method"] != "rs" or flags.stationarity):
            raise UserError(f"{run}: --mix and --factor are ways to evaluate a run of --method rs")
        if flags.evolution and config["method"] != "panacea":
            raise UserError(f"{run}: --evolution takes a finished run of method panacea")
        if config["dims"] != configs[0]["dims"] and not flags.stationarity:
            raise UserError(f"{run} has the dimensions {' '.join(config['dims'])}, {runs[0]} has "
                            f"{' '.join(configs[0]['dims'])}: their fronts lie in different spaces")


def train_seconds(run):
    """How long the training of a run took, as its timing.json says."""
    return read_json(Path(run) / "timing.json").get("train_seconds")


def mixture_folder(flags):
    """Where in a run the results of --mix and --factor go: "" for rewarded soups themselves, mod, weights-1.3, …"""
    factor = f"-{flags.factor:g}" if flags.factor != 1 else ""
    return "mod" + factor if flags.mix == "logprobs" else "weights" + factor if factor else ""


def folder(flags):
    """Where in a run its results go: validation/ and what mixture_folder says, or the run's directory itself."""
    return Path("validation" if flags.validation else "") / mixture_folder(flags)


def mixture_label(flags, label):
    """What tables and pictures call it: "MOD", "Rewarded soups, factor 1.3", …"""
    return ("MOD" if flags.mix == "logprobs" else label) + (f", factor {flags.factor:g}" if flags.factor != 1 else "")


# ---------------------------------------------------------------------------------------------------------------------
# Tables.

# head -> key, and how its number is shown; a list is one value per dimension or preference
COLUMNS = {"what": ("label", str), "regret": ("regret", "{:.4f}".format), "worst": ("regret_worst", "{:.4f}".format),
           "HV": ("hypervolume", "{:.4f}".format), "HV share": ("hypervolume_share", "{:.4f}".format),
           "of these": ("hypervolume_share_at_lams", "{:.4f}".format),
           "IP": ("inner_product", "{:.4f}".format), "sparsity": ("sparsity", "{:.4f}".format),
           "spacing": ("spacing", "{:.4f}".format), "Spearman": ("spearman", lambda x: f"{min(x):.3f}"),
           "KL mean": ("kl", lambda x: f"{np.mean(x):.3f}"), "KL max": ("kl", lambda x: f"{max(x):.3f}"),
           "gain share": ("gain_share", "{:.3f}".format), "outside": ("outside_mass", lambda x: f"{max(x):.3f}"),
           "collapse": ("collapsed", lambda x: f"{max(x):.3f}"), "models": ("models", str), "steps": ("steps", str),
           "train s": ("train_seconds", "{:.0f}".format)}


def run_table(runs):
    """One line per run, of front.json's or of fronts.comparison.compare's; columns of what no run has are left out.

    Spearman: the least of the dimensions; outside, collapse: the largest at any preference (collapse: the part of the
    responses that fell into a loop).
    """
    known = lambda x: x is not None and not (isinstance(x, list) and None in x)
    runs = [{key: x for key, x in (r | {"train_seconds": train_seconds(r["run"])}).items() if known(x)} for r in runs]
    return table({"run": [Path(r["run"]).name for r in runs]} | {
        head: [say(r[key]) if key in r else "-" for r in runs]
        for head, (key, say) in COLUMNS.items() if any(key in r for r in runs)})


def split_table(runs):
    """One line per run and split of the embedded world's prompts: what fronts/evaluation.py keeps in "splits"."""
    lines = [(Path(r["run"]).name, split, x) for r in runs for split, x in r["splits"].items()]
    return table({"run": [run for run, *_ in lines], "prompts": [split for _, split, _ in lines],
                  "regret": [f"{x['regret']:.4f}" for *_, x in lines],
                  "worst": [f"{x['regret_worst']:.4f}" for *_, x in lines],
                  "at λ": [" ".join(f"{v:.2g}" for v in x["worst_lam"]) for *_, x in lines],
                  "outside": [f"{max(x['outside_mass']):.4f}" for *_, x in lines]})


def front_table(r):
    """One line per preference: λ, J, the mean scores (accuracies for preference files) and, where they are sampled,
    ± their standard errors, KL, outside mass, the loss on the prompts' own texts in nats per token, tokens, collapse
    rate."""
    scores, error = np.array(r["scores"]), None if r["exact"] else r["scores_se"]
    if r["eval_labels"]:
        error = (scores * (1 - scores) / r["eval_labels"]) ** 0.5
    base, m = r["base"], len(r["dims"])
    of_base = {"λ": ["base"] * m, "J": shown(base["J"], ".4f"),
               "score": shown([None] * m if r["eval_labels"] else base["scores"], ".3f")}
    columns = {f"{name}_{dim[:8]}": [*shown(values, form), of_base.get(name, ["-"] * m)[i]]
               for name, points, form in (("λ", r["lams"], ".2f"), ("J", r["J"], ".4f"),
                                          ("acc" if r["eval_labels"] else "score", scores, ".3f"), ("±", error, ".3f"))
               if points is not None for i, (dim, values) in enumerate(zip(r["dims"], zip(*points)))}
    for head, key, form in (("KL", "kl", ".3f"), ("outside", "outside_mass", ".3f"),
                            ("own text", "own_text_loss", ".3f"), ("tokens", "length", ".1f"),
                            ("collapse", "collapsed", ".3f")):
        if r[key]:
            columns[head] = shown([*r[key], base.get(key)], form)
    if not r["eval_labels"]:
        return table(columns)
    of = ", ".join(f"{dim} {n}" for dim, n in zip(r["dims"], r["eval_labels"]))
    return f"{table(columns)}\nacc: the part of the held-out labels that is met; there are {of}"


# ---------------------------------------------------------------------------------------------------------------------
# What else can be asked of runs.

def print_list(flags):
    """Prints the runs under the directories that are named, as a table or for scripts. Returns runs_under's records."""
    folders = flags.runs or ["out"]
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"{folder} is not a directory")
    records = [record for folder in folders for record in runs_under(folder)]
    if flags.json:
        print(json.dumps(records, indent=1))
    elif flags.tsv:
        words = lambda value: " ".join(value) if isinstance(value, list) else "" if value is None else str(value)
        for line in [RECORD, *(map(words, record.values()) for record in records)]:
            print("\t".join(line))
    else:
        print(table({"run": [r["run"] for r in records], "method": [r["method"] or r["script"] for r in records],
                     "dimensions": [" ".join(r["dims"]) for r in records],
                     "steps": [str(r["steps"]) if r["finished"] else f"{r['step']} of {r['steps']}" for r in records],
                     "trained": ["yes" if r["finished"] else "no" for r in records],
                     "measure": [r["measure"] or "not evaluated" for r in records],
                     "result": shown([r["result"] for r in records], ".4f"),
                     "written": [age(r["written"]) for r in records]}))
    return records



def evolution(run, device, parts):
    """Evaluates every snapshot of one Panacea run: evolution.json and evolution.png in its directory."""
    files = sorted((run / "snapshots").glob("adapter-*.safetensors"))
    steps = [read_adapter_header(f)["step"] for f in files] + [run_config(run)["flags"]["steps"]]
    results, known = [], {}
    for step, file in zip(steps, files + [run / "adapter.safetensors"]):
        r, _ = evaluate(run, device, known, parts, file)
        results.append(r)
        print(f"step {step:06d} | hypervolume {r['hypervolume']:.4f} | regret {shown([r['regret']], '.4f')[0]}")
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
