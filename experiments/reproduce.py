"""reproduce.py - every figure and table of docs/results.md, each one command. Finished runs are used again, and a run
that was killed goes on.

    python -m experiments.reproduce results      # DPO: Panacea and its rivals, 3 bases x 3 seeds
    python -m experiments.reproduce ablations    # DPO: what each part of the method gives
    python -m experiments.reproduce three        # m = 3 by DPO: Panacea (LS, Tche), rewarded soups, six models
    python -m experiments.reproduce three_rlhf   # m = 3 by PPO: Panacea, rewarded soups, six models
    python -m experiments.reproduce dps          # discrete policy solutions: 5 models, at 1 and at 5 times the steps
    python -m experiments.reproduce evolution    # Fig. 4: the front over the training steps
    python -m experiments.reproduce rlhf         # PPO: Panacea (LS, Tche), rewarded soups: 3 bases; evolution
    python -m experiments.reproduce pama         # PPO: PAMA, MORLHF and MGDA, one policy each: 3 bases
    python -m experiments.reproduce stories --stories_init DIR --stories_text FILE    # text rewards, a tiny Llama
    python -m experiments.reproduce sft          # the SFT objective: Panacea (LS, Tche), rewarded soups: 3 bases
    python -m experiments.reproduce ten          # m = 10 by SFT and by DPO
    python -m experiments.reproduce hqd          # ParetoHqD and its ablations: 3 seeds
    python -m experiments.reproduce everything   # runs of all of the above with m = 2 in the one space of mean scores
    python -m experiments.reproduce labels       # Appendix A: pooled scalar labels
    python -m experiments.reproduce styles --stories_init DIR --styles_data DIR    # SFT on files: concise and verbose

Base 0 ships with the code; train_base.py makes the others, by the same recipe with another seed.
"""
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import eval_front
from data.base import is_world_base
from data.files import as_json
from data.preferences import read_preferences
from experiments import labelers
from fronts.comparison import compare
from fronts.pictures import draw_comparison, draw_fronts
from fronts.stationarity import stationarity
from fronts.tables import shown, table
from runs.files import ROOT, UserError, read_json, write_json, write_jsonl
from runs.flags import flag, run_main
from runs.processes import pick_device


@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    what: list[str] = flag([], "one or several of the above", positional=True)
    bases: int = flag(3, "base models of seeds 0 to bases - 1, where several are run", 1)
    seeds: int = flag(3, "seeds 0 to seeds - 1 for each base, where several are run", 1)
    out: str = flag("out", "where the runs go")
    made: bool = flag(False, "make nothing: tables and pictures of the runs that are finished")
    stories_init: str | None = flag(None, "stories and styles: Hugging Face directory of the base model")
    stories_text: str | None = flag(None, "stories: a text file of stories")
    styles_data: str | None = flag(None, "styles: directory with helpsteer2_{train,eval}.jsonl")


RS, TCHE, THREE = ("--method", "rs"), ("--aggregate", "tche"), ("--pref_dim", 3)
FIVE, SIX = ("--method", "dps", "--dps_parts", 4), (*THREE, "--method", "dps", "--dps_parts", 2)
# the rivals' best, found on the validation prompts (docs/log.md)
SOUP_FACTOR, MOD_FACTOR = 0.8, 0.8
TWICE = ("--steps", 480)
NO_VERTICES = ("--vertex_share", 0)
HALF = ("--method", "dps", "--lam", 0.5, 0.5)
LS = ("m2-panacea-base0-seed0", "dpo")
# ten dimensions want more steps; stories' settings were found by trial, too: docs/log.md
TEN_SFT = ("--steps", 2000, "--lr", 5e-3, "--vertex_share", 0.1)
STORIES = ("--rewards", "dialogue", "narrative", "--eos_id", 1, "--max_new_tokens", 96, "--max_length", 144,
           "--batch_size", 48, "--steps", 100, "--kl_coeff", 0.1, "--ptx_coeff", 0.1)
STORY = 3                                     # which of the evaluation prompts is shown at five λ
# what -> {label: (the run's name, its script, its flags)}. {b} and {s} in a name: one run for each base and each seed.
# Behind @ stands how a run of specialists is evaluated: mod, mod-FACTOR or weights-FACTOR (eval_front.py --mix)
TABLES = {
    "results": {"Panacea, LS": ("m2-panacea-base{b}-seed{s}", "dpo"),
                "Panacea, Tche": ("m2-tche-base{b}-seed0", "dpo", *TCHE),
                "soups, equal total steps": (f"m2-rs-base{{b}}-seed{{s}}@weights-{SOUP_FACTOR}", "dpo", *RS),
                "soups as published": ("m2-rs-base{b}-seed{s}", "dpo", *RS),
                "soups, full steps a model": (f"m2-rs2-base{{b}}-seed0@weights-{SOUP_FACTOR}", "dpo", *RS, *TWICE),
                "MOD, equal total steps": (f"m2-rs-base{{b}}-seed{{s}}@mod-{MOD_FACTOR}", "dpo", *RS),
                "MOD, full steps a model": (f"m2-rs2-base{{b}}-seed0@mod-{MOD_FACTOR}", "dpo", *RS, *TWICE),
                "λ in the prompt": ("m2-prompt-base{b}-seed{s}", "dpo", "--method", "prompt"),
                "one compromise, λ = (½, ½)": ("m2-half-base{b}-seed0", "dpo", *HALF)},
    "ablations": {"Panacea": LS, "one compromise": ("m2-half-base0-seed0", "dpo", *HALF),
                  "k = 0, the preference part alone": ("m2-k0-base0-seed0", "dpo", "--lora_dim", 0),
                  "one λ a batch, no vertices": ("m2-paper-base0-seed0", "dpo", "--lams_per_step", 1, *NO_VERTICES),
                  "no vertices": ("m2-v0-base0-seed0", "dpo", *NO_VERTICES),
                  **{f"s = {x:g} fixed": (f"m2-s{x:g}-base0-seed0", "dpo", "--pref_scaling", x)
                     for x in (1, 0.1, 0.001)},
                  "one learning rate for all": ("m2-lr1-base0-seed0", "dpo", "--values_lr", 1),
                  **{f"G = {G}": (f"m2-G{G}-base0-seed0", "dpo", "--lams_per_step", G) for G in (1, 2)},
                  **{f"G = {G}, 32 rows a step, a quarter of the steps":
                     (f"m2-G{G}-base0-seed0", "dpo", "--lams_per_step", G, "--batch_size", 32, "--steps", 60)
                     for G in (8, 16, 32)}},
    "three": {"panacea ls, m = 3": ("m3-panacea-base0-seed0", "dpo", *THREE),
              "panacea tche, m = 3": ("m3-tche-base0-seed0", "dpo", *THREE, *TCHE),
              "rs, m = 3": (f"m3-rs-base0-seed0@weights-{SOUP_FACTOR}", "dpo", *THREE, *RS),
              "dps, m = 3": ("m3-dps-base0-seed0", "dpo", *SIX)},
    "dps": {"panacea": LS, "dps, equal total steps": ("m2-dps-base0-seed0", "dpo", *FIVE),
            "dps, 5 times the steps": ("m2-dps5-base0-seed0", "dpo", *FIVE, "--steps", 1200)},
    "rlhf": {"panacea ppo ls": ("ppo-ls-base{b}-seed0", "ppo"),
             **{f"the same by {x}": (f"ppo-{x}-base{{b}}-seed0", "ppo", "--estimator", x)
                for x in ("gae", "rloo", "gdpo")},
             "the same, 250 rollouts": ("ppo-ls250-base0-seed0", "ppo", "--steps", 250),
             "panacea ppo tche": ("ppo-tche-base{b}-seed0", "ppo", *TCHE),
             "rs ppo": ("ppo-rs-base{b}-seed0", "ppo", *RS),           # factors of 1 are the best here
             "MOD ppo": ("ppo-rs-base{b}-seed0@mod", "ppo", *RS)},
    "three_rlhf": {"panacea ppo, m = 3": ("ppo3-ls-base0-seed0", "ppo", *THREE),
                   "rs ppo, m = 3": ("ppo3-rs-base0-seed0", "ppo", *THREE, *RS),
                   "dps ppo, m = 3": ("ppo3-dps-base0-seed0", "ppo", *SIX)},
    "sft": {"panacea sft ls": ("sft-ls-base{b}-seed0", "sft"),
            "panacea sft tche": ("sft-tche-base{b}-seed0", "sft", *TCHE),
            "rs sft": (f"sft-rs-base{{b}}-seed0@weights-{SOUP_FACTOR}", "sft", *RS),
            "MOD sft": (f"sft-rs-base{{b}}-seed0@mod-{MOD_FACTOR}", "sft", *RS)},
    "ten": {"m = 10, sft": ("m10-sft-base0-seed0", "sft", "--pref_dim", 10, *TEN_SFT),
            "m = 10, dpo": ("m10-dpo-base0-seed0", "dpo", "--pref_dim", 10, "--steps", 540)},
    # of one base: `together` measures them in one space
    "hqd": {"ParetoHqD": ("hqd-base0-seed{s}", "hqd"),
            "stage 1 alone": ("hqd-stage1-base0-seed{s}", "hqd", "--no-stage2"),
            "linear scalarisation": ("hqd-linear-base0-seed{s}", "hqd", "--select", "linear"),
            "whole data set": ("hqd-all-base0-seed0", "hqd", "--select", "all", "--no-stage2", "--parts", 2)},
    # one policy from the same base at equal steps; 50, since no front has to be learned
    "pama": {**{f"PAMA ({r})": (f"ppo-pama{r.lower()}-base{{b}}-seed0", "ppo", "--aggregate", "pama", "--pama_reading",
                                r, "--steps", 50) for r in "VTS"},
             "MORLHF (½, ½)": ("ppo-morlhf-base{b}-seed0", "ppo", *HALF, "--estimator", "gae", "--steps", 50),
             "MGDA": ("ppo-mgda-base{b}-seed0", "ppo", "--aggregate", "mgda", "--steps", 50)},
}
# picture -> whose first runs are in it: (what, label)
PICTURES = {
    "results": [("results", label) for label in ("Panacea, LS", "soups, equal total steps", "MOD, equal total steps",
                                                 "λ in the prompt")],
    "three": [("three", "panacea ls, m = 3")],
    "dps": [("dps", "panacea"), ("dps", "dps, 5 times the steps")],
    "rlhf": [("rlhf", "panacea ppo ls"), ("rlhf", "rs ppo")], "sft": [("sft", "panacea sft ls"), ("sft", "rs sft")],
    "ten_sft": [("ten", "m = 10, sft")], "ten_dpo": [("ten", "m = 10, dpo")],
    "three_rlhf": [("three_rlhf", "panacea ppo, m = 3")],
}
# runs of all kinds in one space: label -> (what, label of its table)
EVERYTHING = {"Panacea, DPO": ("results", "Panacea, LS"), "Panacea, RLHF": ("rlhf", "panacea ppo ls"),
              "Panacea, SFT": ("sft", "panacea sft ls"), "RS, DPO": ("results", "soups, equal total steps"),
              "RS, RLHF": ("rlhf", "rs ppo"), "RS, SFT": ("sft", "rs sft"),
              "DPS, DPO": ("dps", "dps, equal total steps"),
              "PAMA (V)": ("pama", "PAMA (V)"), "PAMA (T)": ("pama", "PAMA (T)"), "MGDA": ("pama", "MGDA"),
              "ParetoHqD": ("hqd", "ParetoHqD")}


def run(flags, name, by, *more):
    """Runs train_<by>.py with these flags unless the run is finished, and evaluates it as the name says behind @.
    Returns its front.json; None with --made for what is not there."""
    name, _, mixture = name.partition("@")
    path, script = Path(flags.out) / name, f"train_{by}.py"
    if flags.made and not (path / mixture / "front.json").exists():
        return None
    if not (path / "front.json").exists():
        call(f"{name}: {script}", script, "--out", path, "--log_every", 100, *more)
    if mixture and not (path / mixture / "front.json").exists():
        mix, _, factor = mixture.partition("-")
        call(f"{name}: eval_front.py", "eval_front.py", path, "--mix", "logprobs" if mix == "mod" else mix, "--factor",
             factor or 1)
    return read_json(path / mixture / "front.json")


def call(what, script, *more):
    """Runs a script of the repository. Raises UserError where it fails."""
    command = [sys.executable, str(ROOT / script), *map(str, more)]
    print("$ python " + " ".join(command[1:]), flush=True)
    if (code := subprocess.run(command).returncode) != 0:
        raise UserError(f"{what} ended with status {code}")


def of_each(flags, name, by, *more):
    """front.json of a run, or of one for each base and seed, where its name has {b} and {s}."""
    results = []
    for b in range(flags.bases if "{b}" in name else 1):
        if b and not flags.made and not is_world_base(f"out/base-tiny-seed{b}"):
            call(f"base {b}: train_base.py", "train_base.py", "--seed", b)
        base = ("--init", f"out/base-tiny-seed{b}") if b else ()
        for s in range(flags.seeds if "{s}" in name else 1):
            results.append(run(flags, name.format(b=b, s=s), by, *base, *more, "--seed", s))
    return [r for r in results if r]


def mean_of(x):
    """"mean ± standard deviation" of numbers; of one number there is no ±, and of None a dash."""
    if None in x:
        return "-"
    return f"{np.mean(x):.4f}" + (f" ± {np.std(x, ddof=1):.4f}" if len(x) > 1 else "")


def summary(rows):
    """Prints one line per method: mean ± standard deviation over its bases and seeds. rows: {label: [front.json, …]}

    Spearman: the least, outside: the largest of any run, dimension and preference."""
    of = lambda get: [mean_of([get(f) for f in fronts]) for fronts in rows.values()]
    columns = {"": list(rows), "regret, new verbs": of(lambda f: f["regret"]),
               "at worst": of(lambda f: f["regret_worst"]),
               "regret, seen verbs": of(lambda f: f["splits"]["seen"]["regret"])}
    columns |= {head: of(lambda f: f[key]) for head, key in (("HV share", "hypervolume_share"), ("IP", "inner_product"),
                                                             ("sparsity", "sparsity"), ("spacing", "spacing"))}
    columns["min Spearman"] = shown([min(min(f["spearman"]) for f in fronts) for fronts in rows.values()], ".3f")
    columns["max outside"] = shown([max(max(f["outside_mass"]) for f in fronts) for fronts in rows.values()], ".4f")
    print("\n" + table(columns | {key: shown([fronts[0][key] for fronts in rows.values()], "d")
                                  for key in ("models", "steps")} | {"runs": [str(len(f)) for f in rows.values()]}))


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


def evolution(flags, name, by, *more):
    """The front of one run at its snapshots."""
    run(flags, name, by, *more)
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
            write_jsonl(files[-1], [{"prompt": as_json(row.prompt), "response": row.responses[row.better[0][0] ^ style]}
                                    for row in rows])
    r = run(flags, "sft-styles-seed0", "sft", "--init", flags.stories_init, "--data", *files[:2], "--eval_data",
            *files[2:], "--dims", "concise", "verbose")
    print(eval_front.front_table(r))


def main(flags):
    """Makes what was asked for, in order."""
    needs = {"stories": ("stories_init", "stories_text"), "styles": ("stories_init", "styles_data")}
    out = Path(flags.out)
    rows_of = lambda table: {label: made for label, row in table.items() if (made := of_each(flags, *row))}
    for what in flags.what:
        for name in needs.get(what, ()):
            if getattr(flags, name) is None:
                raise UserError(f"{what} needs --{name}")
        if flags.made and what not in (*TABLES, "everything"):
            raise UserError(f"--made shows the tables of finished runs; {what} has none")
        if what in TABLES:
            rows = rows_of(TABLES[what])
            if not rows:
                raise UserError(f"{what}: no run of it is finished in {out}")
            (one_policy if what == "pama" else summary)(rows)
            if what == "hqd":
                together(rows, out / "hqd")
        for picture, runs in PICTURES.items():
            if runs[0][0] == what and (there := [rows[label][0] for _, label in runs if label in rows]):
                draw_fronts(there, out / f"{picture}.png")
        if what in ("evolution", "rlhf") and not flags.made:
            evolution(flags, *(LS if what == "evolution" else ("ppo-ls-base0-seed0", "ppo")))
        elif what == "everything":
            rows = rows_of({label: TABLES[a][b] for label, (a, b) in EVERYTHING.items()})
            together({label: made[:1] for label, made in rows.items()}, out / "everything")
        elif what == "labels":
            labelers.main(labelers.Flags(panacea=run(flags, *LS)["run"], out=str(out / "appendix-a")))
        elif what in needs:
            {"stories": stories, "styles": styles}[what](flags)
        elif what not in TABLES:
            raise UserError(f"{what!r}: choose among {' '.join([*TABLES, 'evolution everything labels', *needs])}")


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
