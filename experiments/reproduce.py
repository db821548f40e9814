"""reproduce.py - every figure and table of docs/results.md, each one command. Runs that are finished are used again.

    python -m experiments.reproduce results      # Panacea (LS, Tche), rewarded soups: 3 seeds, mean ± deviation
    python -m experiments.reproduce three        # m = 3: Panacea (LS, 3 seeds; Tche), rewarded soups
    python -m experiments.reproduce dps          # discrete policy solutions: 5 models, at 1 and at 5 times the steps
    python -m experiments.reproduce scaling      # Fig. 7: learned s against fixed ones (the paper tries 1 to 1e-5)
    python -m experiments.reproduce beta         # what the paper's β = 0.1 does here
    python -m experiments.reproduce evolution    # Fig. 4: the front over the training steps
    python -m experiments.reproduce rlhf         # PPO: Panacea (LS, Tche), rewarded soups: 3 seeds; evolution
    python -m experiments.reproduce pama         # PPO: PAMA, MORLHF and MGDA, one policy each: 3 seeds
    python -m experiments.reproduce stories --stories_init DIR --stories_text FILE    # text rewards, a tiny Llama
    python -m experiments.reproduce sft          # the SFT objective, m = 2: Panacea (LS, Tche), rewarded soups
    python -m experiments.reproduce ten          # m = 10 by SFT and by DPO
    python -m experiments.reproduce hhc_dpo hhc_ppo     # helpful, harmless, concise: one, three and six models
    python -m experiments.reproduce hqd          # ParetoHqD and its ablations: 3 seeds
    python -m experiments.reproduce everything   # runs of all of the above with m = 2 in the one space of mean scores
    python -m experiments.reproduce labels       # Appendix A: pooled scalar labels
    python -m experiments.reproduce styles --stories_init DIR --styles_data DIR    # SFT on files: concise and verbose
"""
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import eval_front
from data.preferences import read_preferences
from experiments import labelers
from fronts.comparison import compare
from fronts.pictures import draw_comparison, draw_fronts
from fronts.stationarity import stationarity
from fronts.tables import shown, table
from runs.files import ROOT, UserError, read_json, write_json, write_whole
from runs.flags import flag, run_main
from runs.processes import pick_device


@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    what: list[str] = flag([], "one or several of the above", positional=True)
    seeds: int = flag(3, "seeds 0 to seeds - 1, where several are run", 1)
    out: str = flag("out", "where the runs go")
    stories_init: str | None = flag(None, "stories and styles: Hugging Face directory of the base model")
    stories_text: str | None = flag(None, "stories: a text file of stories")
    styles_data: str | None = flag(None, "styles: directory with helpsteer2_{train,eval}.jsonl")


RS, TCHE, FIVE = ("--method", "rs"), ("--aggregate", "tche"), ("--method", "dps", "--dps_parts", 4)
LS = ("m2-panacea-ls-seed0", "dpo")
# ten dimensions want more steps; stories' settings were found by trial, too: docs/log.md
TEN_SFT = ("--steps", 2000, "--lr", 5e-3, "--vertex_share", 0.1)
STORIES = ("--rewards", "dialogue", "narrative", "--eos_id", 1, "--max_new_tokens", 96, "--max_length", 144,
           "--batch_size", 48, "--steps", 100, "--kl_coeff", 0.1, "--ptx_coeff", 0.1)
STORY = 3                                     # which of the evaluation prompts is shown at five λ
HHC = {"dpo": ("--pref_dim", 3), "ppo": ("--rewards", "helpful", "harmless", "concise:12", "--steps", 200)}
# what -> {label: (the run's name, with {} where it is made for every seed; its script; its flags)}
TABLES = {
    "results": {"panacea ls": ("m2-panacea-ls-seed{}", "dpo"), "panacea tche": ("m2-panacea-tche-seed{}", "dpo", *TCHE),
                "rs": ("m2-rs-ls-seed{}", "dpo", *RS)},
    "three": {"panacea ls, m = 3": ("m3-panacea-ls-seed{}", "dpo", "--pref_dim", 3),
              "panacea tche, m = 3": ("m3-panacea-tche-seed0", "dpo", "--pref_dim", 3, *TCHE),
              "rs, m = 3": ("m3-rs-ls-seed0", "dpo", "--pref_dim", 3, *RS)},
    "dps": {"panacea": LS, "rs": ("m2-rs-ls-seed0", "dpo", *RS),
            "dps, equal total steps": ("m2-dps-ls-seed0", "dpo", *FIVE, "--steps", 400),
            "dps, 5 times the steps": ("m2-dps5-ls-seed0", "dpo", *FIVE, "--steps", 2000)},
    "scaling": {"s learned": LS} | {f"s = {s:g} fixed": (f"m2-panacea-s{s:g}-seed0", "dpo", "--pref_scaling", s)
                                    for s in (1.0, 0.1, 0.001)},
    "beta": {"panacea β = 0.1": ("m2-panacea-beta0.1-seed0", "dpo", "--beta", 0.1), "panacea β = 1": LS},
    "rlhf": {"panacea ppo ls": ("ppo-ls-seed{}", "ppo"), "panacea ppo tche": ("ppo-tche-seed{}", "ppo", *TCHE),
             "rs ppo": ("ppo-rs-seed{}", "ppo", *RS)},
    "sft": {"panacea sft ls": ("sft-ls-seed{}", "sft"), "panacea sft tche": ("sft-tche-seed0", "sft", *TCHE),
            "rs sft": ("sft-rs-seed{}", "sft", *RS)},
    "ten": {"m = 10, sft": ("m10-sft-ls-seed0", "sft", "--pref_dim", 10, *TEN_SFT),
            "m = 10, dpo": ("m10-dpo-ls-seed0", "dpo", "--pref_dim", 10, "--steps", 800)},
    **{f"hhc_{by}": {f"panacea {by}": (f"hhc-{by}-panacea", by, *more), f"rs {by}": (f"hhc-{by}-rs", by, *more, *RS),
                     f"dps {by}": (f"hhc-{by}-dps", by, *more, "--method", "dps", "--dps_parts", 2)}
       for by, more in HHC.items()},
    "hqd": {"ParetoHqD": ("hqd-seed{}", "hqd"), "stage 1 alone": ("hqd-stage1-seed{}", "hqd", "--no-stage2"),
            "linear scalarisation": ("hqd-linear-seed{}", "hqd", "--select", "linear"),
            "whole data set": ("hqd-all-seed0", "hqd", "--select", "all", "--no-stage2", "--parts", 2)},
    # one policy from the same base at equal steps; 75, since no front has to be learned
    "pama": {**{f"PAMA ({r})": (f"ppo-pama{r.lower()}-seed{{}}", "ppo", "--aggregate", "pama", "--pama_reading", r,
                                "--steps", 75) for r in "VTS"},
             "MORLHF (½, ½)": ("ppo-morlhf-seed{}", "ppo", "--method", "dps", "--lam", 0.5, 0.5, "--steps", 75),
             "MGDA": ("ppo-mgda-seed{}", "ppo", "--aggregate", "mgda", "--steps", 75)},
}
# picture -> whose first seeds are in it: (what, label)
PICTURES = {
    "results": [("results", "panacea ls"), ("results", "rs")], "three": [("three", "panacea ls, m = 3")],
    "dps": [("dps", "panacea"), ("dps", "rs"), ("dps", "dps, 5 times the steps")],
    "scaling": [("scaling", label) for label in TABLES["scaling"]],
    "rlhf": [("rlhf", "panacea ppo ls"), ("rlhf", "rs ppo")], "sft": [("sft", "panacea sft ls"), ("sft", "rs sft")],
    "ten_sft": [("ten", "m = 10, sft")], "ten_dpo": [("ten", "m = 10, dpo")],
    **{what: [(what, label) for label in TABLES[what]] for what in ("hhc_dpo", "hhc_ppo")},
}
# runs of all kinds in one space: label -> (what, label of its table)
EVERYTHING = {"Panacea, DPO": ("results", "panacea ls"), "Panacea, RLHF": ("rlhf", "panacea ppo ls"),
              "Panacea, SFT": ("sft", "panacea sft ls"), "RS, DPO": ("results", "rs"), "RS, RLHF": ("rlhf", "rs ppo"),
              "RS, SFT": ("sft", "rs sft"), "DPS, DPO": ("dps", "dps, equal total steps"),
              "PAMA (V)": ("pama", "PAMA (V)"), "PAMA (T)": ("pama", "PAMA (T)"), "MGDA": ("pama", "MGDA"),
              "ParetoHqD": ("hqd", "ParetoHqD")}


def run(flags, name, by, *more):
    """Runs train_<by>.py with these flags unless the run is finished. Returns its front.json."""
    path, script = Path(flags.out) / name, f"train_{by}.py"
    if not (path / "front.json").exists():
        command = [sys.executable, str(ROOT / script), "--out", str(path), "--log_every", "100", *map(str, more)]
        print("$ python " + " ".join(command[1:]), flush=True)
        if (code := subprocess.run(command).returncode) != 0:
            raise UserError(f"{name}: {script} ended with status {code}")
    return read_json(path / "front.json")


def of_seeds(flags, name, by, *more):
    """front.json of a run, or where its name has {} of one for each seed."""
    return ([run(flags, name.format(s), by, *more, "--seed", s) for s in range(flags.seeds)] if "{}" in name else
            [run(flags, name, by, *more)])


def mean_of(x):
    """"mean ± standard deviation" of numbers; of one number there is no ±, and of None a dash."""
    if None in x:
        return "-"
    return f"{np.mean(x):.4f}" + (f" ± {np.std(x, ddof=1):.4f}" if len(x) > 1 else "")


METRICS = {"regret": "regret", "worst": "regret_worst", "HV share": "hypervolume_share", "IP": "inner_product",
           "sparsity": "sparsity", "spacing": "spacing"}


def summary(rows):
    """Prints one line per method: mean ± standard deviation over its seeds. rows: {label: [front.json, …]}"""
    columns = {"": list(rows)} | {head: [mean_of([f[key] for f in fronts]) for fronts in rows.values()]
                                  for head, key in METRICS.items()}
    columns["min Spearman"] = shown([min(min(f["spearman"]) for f in fronts) for fronts in rows.values()], ".3f")
    columns["max outside"] = shown([max(max(f["outside_mass"]) for f in fronts) for fronts in rows.values()], ".3f")
    print("\n" + table(columns | {key: shown([fronts[0][key] for fronts in rows.values()], "d")
                                  for key in ("models", "steps")}))


def one_policy(rows):
    """Prints of runs without a front: both rewards, J, KL, and the Pareto-stationarity before and after."""
    cells = []
    for fronts in rows.values():
        still = [stationarity(Path(f["run"]), pick_device("auto")[0]) for f in fronts]
        cells.append([mean_of(x) for x in zip(*([*f["scores"][0], *f["J"][0], f["kl"][0], s["before"][0][0],
                                                 s["after"][0][0]] for f, s in zip(fronts, still)))])
    base, dims = fronts[0]["base"], fronts[0]["dims"]
    cells.append([mean_of([x]) for x in [*base["scores"], *base["J"], base["kl"]]] + ["-", "-"])
    heads = [*("score " + d for d in dims), *("J " + d for d in dims), "KL", "‖Σc∇J‖ before", "after"]
    print("\n" + table({"": [*rows, "base model"]} | dict(zip(heads, zip(*cells)))))


def together(rows, out):
    """Prints and draws runs of all kinds in the space of mean scores (fronts/comparison.py): compare.json, .png."""
    labels = [label for label, fronts in rows.items() for _ in fronts]
    c = compare([f for fronts in rows.values() for f in fronts], pick_device("auto")[0])
    for r, label in zip(c["runs"], labels):
        r["label"] = label
    write_json(out / "compare.json", c)
    draw_comparison(c, out / "compare.png")
    of = [[r for r in c["runs"] if r["label"] == label] for label in rows]
    columns = {"": list(rows), "models": [str(runs[0]["models"]) for runs in of]}
    columns |= {key: [mean_of([r[key] for r in runs]) for runs in of] for key in (
        "hypervolume", "hypervolume_share", "inner_product", "sparsity", "spacing", "gain_share")}
    columns |= {f"KL {f.__name__}": [mean_of([f(r["kl"]) for r in runs]) for runs in of] for f in (np.mean, np.max)}
    print("\n" + table(columns | {"train s": [f"{np.mean([r['train_seconds'] for r in runs]):.0f}" for runs in of]}))


def evolution(flags, name, by):
    """The front of one run at its snapshots."""
    run(flags, name, by)
    eval_front.main(eval_front.Flags(runs=[str(Path(flags.out) / name)], evolution=True))


def stories(flags):
    """Text rewards on a real tiny Llama: dialogue against narrative, prompts cut from stories (files of one's own)."""
    name = "ppo-stories-seed0"
    run(flags, name, "ppo", "--init", flags.stories_init, "--prompts", flags.stories_text, *STORIES)
    samples = read_json(Path(flags.out) / name / "samples.json")
    for lam, texts in list(zip(samples["lams"], samples["texts"]))[::max(1, (len(samples["lams"]) - 1) // 4)]:
        print(f"λ = {lam}: {texts[STORY]}\n")


def styles(flags):
    """SFT on files of one's own: of each HelpSteer2 pair the terser answer is a demonstration of one style, the wordier
    of the other: one prompt set, two answers (the chat experiment of the paper's second version, in small)."""
    files = []
    for part in ("train", "eval"):
        rows, *_ = read_preferences(Path(flags.styles_data) / f"helpsteer2_{part}.jsonl", ["concise"])
        for style in (0, 1):                                           # better: 0 where the first is the terser one
            files.append(Path(flags.out) / "styles" / f"{('concise', 'verbose')[style]}_{part}.jsonl")
            lines = [json.dumps({"prompt": row.prompt, "response": row.responses[row.better[0][0] ^ style]})
                     for row in rows]
            write_whole(files[-1], lambda f: Path(f).write_text("\n".join(lines) + "\n"))
    r = run(flags, "sft-styles-seed0", "sft", "--init", flags.stories_init, "--data", *files[:2], "--eval_data",
            *files[2:], "--dims", "concise", "verbose")
    print(eval_front.front_table(r))


def main(flags):
    """Makes what was asked for, in order."""
    needs = {"stories": ("stories_init", "stories_text"), "styles": ("stories_init", "styles_data")}
    out, rows_of = Path(flags.out), lambda what: {k: of_seeds(flags, *v) for k, v in TABLES[what].items()}
    for what in flags.what:
        for name in needs.get(what, ()):
            if getattr(flags, name) is None:
                raise UserError(f"{what} needs --{name}")
        if what in TABLES:
            rows = rows_of(what)
            (one_policy if what == "pama" else summary)(rows)
            if what == "hqd":
                together(rows, out / "hqd")
        for picture, runs in PICTURES.items():
            if runs[0][0] == what:
                draw_fronts([rows[label][0] | ({"label": label} if what == "scaling" else {}) for _, label in runs],
                            out / f"{picture}.png")
        if what in ("evolution", "rlhf"):
            evolution(flags, *(LS if what == "evolution" else ("ppo-ls-seed0", "ppo")))
        elif what == "everything":
            rows = {label: of_seeds(flags, *TABLES[a][b]) for label, (a, b) in EVERYTHING.items()}
            together(rows, out / "everything")
        elif what == "labels":
            labelers.main(labelers.Flags(panacea=run(flags, *LS)["run"], out=str(out / "appendix-a")))
        elif what in needs:
            {"stories": stories, "styles": styles}[what](flags)
        elif what not in TABLES:
            raise UserError(f"{what!r}: choose among {' '.join([*TABLES, 'evolution everything labels', *needs])}")


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
