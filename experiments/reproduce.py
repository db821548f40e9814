"""reproduce.py - every figure and table of the README, each one command. Runs that are finished are used again.

    python reproduce.py results              # Panacea (LS, Tche), rewarded soups: 3 seeds, mean and standard deviation
    python reproduce.py three                # m = 3: Panacea (LS, 3 seeds; Tche), rewarded soups
    python reproduce.py dps                  # discrete policy solutions: 5 models, at 1 and at 5 times the steps
    python reproduce.py scaling              # Fig. 7: learned s against fixed ones
    python reproduce.py evolution            # Fig. 4: the front over the training steps
    python reproduce.py beta                 # what the paper's β = 0.1 does here
    python reproduce.py rlhf                 # PPO: Panacea (LS, Tche), rewarded soups: 3 seeds
    python reproduce.py pama                 # PPO: PAMA, MORLHF and MGDA, one policy each: 3 seeds
    python reproduce.py stories --stories_init DIR --stories_text FILE      # text rewards on a real tiny Llama
    python reproduce.py sft                  # the SFT objective, m = 2: Panacea (LS, Tche), rewarded soups
    python reproduce.py ten                  # m = 10 by SFT and by DPO
    python reproduce.py hhc                  # helpful, harmless, concise, by DPO and by RLHF
    python reproduce.py hqd                  # ParetoHqD and its ablations: 3 seeds
    python reproduce.py everything           # runs of all of the above with m = 2 in the one space of mean scores
    python reproduce.py labels               # Appendix A: pooled scalar labels
    python reproduce.py styles --styles_data DIR     # SFT on files: concise and verbose answers to the same prompts
"""
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import eval_front
from runs.device import pick_device
from runs.files import ROOT, UserError, read_json, write_json, write_whole
from runs.flags import flag, run_main
from data.preferences import read_preferences
from fronts.pictures import draw_comparison, draw_fronts


@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    what: list[str] = flag([], "one or several of the above", positional=True)
    seeds: int = flag(3, "seeds 0 to seeds - 1, where several are run")
    out: str = flag("out", "where the runs go")
    stories_init: str = flag("../shared/material/stories260K", "stories: Hugging Face directory of the base model")
    stories_text: str = flag("../shared/material/text/tinystories_sample.txt", "stories: a text file of stories")
    styles_data: str = flag("../shared/material/helpsteer2", "styles: directory with helpsteer2_{train,eval}.jsonl")
    stories_prompt: int = flag(3, "stories: which of the evaluation prompts is shown at five λ")


# found by trial; see docs/log.md
STORIES = ("--rewards", "dialogue", "narrative", "--eos_id", 1, "--max_new_tokens", 96, "--max_length", 144,
           "--batch_size", 48, "--steps", 100, "--kl_coeff", 0.1, "--ptx_coeff", 0.1)

# ten dimensions want more steps; by trial, see docs/log.md
TEN = {"sft": ("--steps", 2000, "--lr", 5e-3, "--vertex_share", 0.1), "dpo": ("--steps", 800)}

HHC_REWARDS = ("--rewards", "helpful", "harmless", "concise:12", "--steps", 200)


def run(out, name, *flags, script="train_dpo.py"):
    """Runs a script with these flags unless out/name is finished. Returns its front.json."""
    path = Path(out) / name
    if not (path / "front.json").exists():
        command = [sys.executable, str(ROOT / script), "--out", str(path), "--log_every", "100"]
        command += map(str, flags)
        print("$ python " + " ".join(command[1:]), flush=True)
        if (code := subprocess.run(command).returncode) != 0:
            raise UserError(f"{name}: {script} ended with status {code}")
    return read_json(path / "front.json")


def mean_of(x):
    """"mean ± standard deviation" of numbers; of one number there is no ±, and of None a dash."""
    if None in x:
        return "-"
    return f"{np.mean(x):.4f}" + (f" ± {np.std(x, ddof=1):.4f}" if len(x) > 1 else "")


def summary(rows):
    """Prints one line a method: mean ± standard deviation over its seeds. rows: {label: [front.json, …]}"""
    print(f"\n{'':34} {'HV share':>16} {'J share':>15} {'IP':>15} {'sparsity':>17} {'spacing':>17} {'min Spearman':>12} "
          f"{'max outside':>11} {'models':>6} {'steps':>6}")
    for label, fronts in rows.items():
        cells = []
        for key in ("hypervolume_share", "objective_share", "inner_product", "sparsity", "spacing"):
            cells.append(mean_of([f.get(key) for f in fronts]))
        print(f"{label:34} {cells[0]:>16} {cells[1]:>15} {cells[2]:>15} {cells[3]:>17} {cells[4]:>17} "
              f"{min(min(f['spearman']) for f in fronts):12.3f} {max(max(f['outside_mass']) for f in fronts):11.3f} "
              f"{fronts[0]['models']:6d} {fronts[0]['steps']:6d}")


def results(flags):
    """m = 2: Panacea by LS and by Tche; rewarded soups at the same total steps (one objective: LS and Tche agree)."""
    rows = {f"panacea {aggregate}": [run(flags.out, f"m2-panacea-{aggregate}-seed{s}", "--aggregate", aggregate,
                                         "--seed", s) for s in range(flags.seeds)]
            for aggregate in ("ls", "tche")}
    rows["rs"] = [run(flags.out, f"m2-rs-ls-seed{s}", "--method", "rs", "--seed", s) for s in range(flags.seeds)]
    summary(rows)
    draw_fronts([rows["panacea ls"][0], rows["rs"][0]], Path(flags.out) / "results.png")


def three(flags):
    """m = 3: Panacea by LS over the seeds; Tchebycheff and rewarded soups once."""
    m3 = ("--pref_dim", 3)
    rows = {"panacea ls, m = 3": [run(flags.out, f"m3-panacea-ls-seed{s}", *m3, "--seed", s)
                                  for s in range(flags.seeds)],
            "panacea tche, m = 3": [run(flags.out, "m3-panacea-tche-seed0", *m3, "--aggregate", "tche")],
            "rs, m = 3": [run(flags.out, "m3-rs-ls-seed0", *m3, "--method", "rs")]}
    summary(rows)
    draw_fronts(rows["panacea ls, m = 3"][:1], Path(flags.out) / "three.png")


def dps(flags):
    """One model a preference, for five of them: at Panacea's total steps, and with Panacea's steps for each."""
    steps = run(flags.out, "m2-panacea-ls-seed0")["steps"]
    five = ("--method", "dps", "--dps_parts", 4)
    rows = {"panacea": [run(flags.out, "m2-panacea-ls-seed0")],
            "rs": [run(flags.out, "m2-rs-ls-seed0", "--method", "rs")],
            "dps, equal total steps": [run(flags.out, "m2-dps-ls-seed0", *five, "--steps", steps)],
            "dps, 5 times the steps": [run(flags.out, "m2-dps5-ls-seed0", *five, "--steps", 5 * steps)]}
    summary(rows)
    draw_fronts([rows[k][0] for k in ("panacea", "rs", "dps, 5 times the steps")], Path(flags.out) / "dps.png")


def scaling(flags):
    """Fig. 7: the scale s of λ learned for each matrix, against one fixed value for all (the paper tries 1 to 1e-5)."""
    rows = {"s learned": [run(flags.out, "m2-panacea-ls-seed0", "--seed", 0)]}
    for s in (1.0, 0.1, 0.001):
        rows[f"s = {s:g} fixed"] = [run(flags.out, f"m2-panacea-s{s:g}-seed0", "--pref_scaling", s)]
    summary(rows)
    pictures = [row[0] | {"label": label} for label, row in rows.items()]
    draw_fronts(pictures, Path(flags.out) / "scaling.png")


def evolution(flags):
    """Fig. 4: the front at eight snapshots."""
    run(flags.out, "m2-panacea-ls-seed0")
    eval_front.main(eval_front.Flags(runs=[str(Path(flags.out) / "m2-panacea-ls-seed0")], evolution=True))


def beta(flags):
    """The paper's β = 0.1: the same objectives, reached only by ten times longer log-ratios."""
    summary({f"panacea β = {b:g}": [run(flags.out, "m2-panacea-ls-seed0" if b == 1 else f"m2-panacea-beta{b:g}-seed0",
                                        "--beta", b)] for b in (0.1, 1.0)})


def rlhf(flags):
    """PPO, m = 2: Panacea by LS and by Tche, and rewarded soups at the same total steps; the evolution of one front."""
    ppo = lambda name, *more: [run(flags.out, f"ppo-{name}-seed{s}", *more, "--seed", s, script="train_ppo.py")
                               for s in range(flags.seeds)]
    rows = {"panacea ppo ls": ppo("ls"), "panacea ppo tche": ppo("tche", "--aggregate", "tche"),
            "rs ppo": ppo("rs", "--method", "rs")}
    summary(rows)
    draw_fronts([rows["panacea ppo ls"][0], rows["rs ppo"][0]], Path(flags.out) / "rlhf.png")
    eval_front.main(eval_front.Flags(runs=[str(Path(flags.out) / "ppo-ls-seed0")], evolution=True))


def pama(flags):
    """One policy from the same base at equal steps: PAMA, MORLHF (λ = ½, ½) and MGDA; both rewards, J, KL, and the
    Pareto-stationarity measure before and after. 75 steps, since no front has to be learned."""
    kinds = {**{f"PAMA ({r})": (f"pama{r.lower()}", ("--aggregate", "pama", "--pama_reading", r), flags.seeds)
                for r in "VTS"},
             "MORLHF (½, ½)": ("morlhf", ("--method", "dps", "--lam", 0.5, 0.5), flags.seeds),
             "MGDA": ("mgda", ("--aggregate", "mgda"), flags.seeds)}
    lines = []
    for label, (short, more, seeds) in kinds.items():
        names = [f"ppo-{short}-seed{s}" for s in range(seeds)]
        fronts = [run(flags.out, name, *more, "--steps", 75, "--seed", s, script="train_ppo.py")
                  for s, name in enumerate(names)]
        still = [eval_front.stationarity(Path(flags.out) / name, pick_device("auto")[0]) for name in names]
        columns = [*np.array([f["scores"][0] for f in fronts]).T, *np.array([f["J"][0] for f in fronts]).T,
                   np.array([f["kl"][0] for f in fronts]), np.array([s["before"][0][0] for s in still]),
                   np.array([s["after"][0][0] for s in still])]
        lines.append(f"{label:16}" + "".join(
            f" {x.mean():8.3f}" + (f" ± {x.std(ddof=1):.3f}" if len(x) > 1 else " " * 8) for x in columns))
    base, dims = fronts[0]["base"], fronts[0]["dims"]
    heads = [*("score_" + d[:8] for d in dims), *("J_" + d[:8] for d in dims), "KL", "‖Σc∇J‖ before", "after"]
    print("\n" + " " * 16 + "".join(f"{head:>17}" for head in heads))
    print(f"{'base model':16}" + "".join(f" {x:8.3f}" + " " * 8 for x in [*base["scores"], *base["J"], base["kl"]]))
    print("\n".join(lines))


def stories(flags):
    """Text rewards on a real tiny Llama: dialogue against narrative, prompts cut from stories (files of one's own)."""
    run(flags.out, "ppo-stories-seed0", "--init", flags.stories_init, "--prompts", flags.stories_text, *STORIES,
        script="train_ppo.py")
    samples = read_json(Path(flags.out) / "ppo-stories-seed0" / "samples.json")
    for lam, texts in list(zip(samples["lams"], samples["texts"]))[::max(1, (len(samples["lams"]) - 1) // 4)]:
        print(f"λ = {lam}: {texts[flags.stories_prompt]}\n")


def of_seeds(flags, script, names, *more):
    """front.json of a run for each seed; names: with {} for the seed."""
    return [run(flags.out, names.format(s), *more, "--seed", s, script=script) for s in range(flags.seeds)]


def sft(flags):
    """The SFT objective, m = 2: Panacea by LS and by Tche, rewarded soups at the same total steps."""
    rows = {"panacea sft ls": of_seeds(flags, "train_sft.py", "sft-ls-seed{}"),
            "panacea sft tche": [run(flags.out, "sft-tche-seed0", "--aggregate", "tche", script="train_sft.py")],
            "rs sft": of_seeds(flags, "train_sft.py", "sft-rs-seed{}", "--method", "rs")}
    summary(rows)
    draw_fronts([rows["panacea sft ls"][0], rows["rs sft"][0]], Path(flags.out) / "sft.png")


def ten(flags):
    """Ten dimensions in one model, by SFT and by DPO."""
    rows = {f"m = 10, {name}": [run(flags.out, f"m10-{name}-ls-seed0", "--pref_dim", 10, *TEN[name],
                                    script=f"train_{name}.py")] for name in ("sft", "dpo")}
    summary(rows)
    for name, (front,) in rows.items():
        draw_fronts([front], Path(flags.out) / f"ten_{name.split()[-1]}.png")


def hhc(flags):
    """Helpful, harmless, concise: Panacea, rewarded soups and six single models (at Panacea's total steps), by DPO on
    the world's labels and by RLHF with the conciseness reward of the paper's second version, c = 12 words."""
    few = ("--method", "dps", "--dps_parts", 2)
    for name, script, more in (("dpo", "train_dpo.py", ("--pref_dim", 3)),
                               ("ppo", "train_ppo.py", HHC_REWARDS)):
        rows = {f"panacea {name}": [run(flags.out, f"hhc-{name}-panacea", *more, script=script)],
                f"rs {name}": [run(flags.out, f"hhc-{name}-rs", *more, "--method", "rs", script=script)],
                f"dps {name}": [run(flags.out, f"hhc-{name}-dps", *more, *few, script=script)]}
        summary(rows)
        draw_fronts([row[0] for row in rows.values()], Path(flags.out) / f"hhc_{name}.png")


def hqd(flags):
    """ParetoHqD, without its second stage, with linear scalarisation for directions, and on the whole data set."""
    script = "train_hqd.py"
    rows = {"ParetoHqD": of_seeds(flags, script, "hqd-seed{}"),
            "stage 1 alone": of_seeds(flags, script, "hqd-stage1-seed{}", "--no-stage2"),
            "linear scalarisation": of_seeds(flags, script, "hqd-linear-seed{}", "--select", "linear"),
            "whole data set": [run(flags.out, "hqd-all-seed0", "--select", "all", "--no-stage2", "--parts", 2,
                                   script=script)]}
    summary(rows)
    compare_all({label: [f["run"] for f in fronts] for label, fronts in rows.items()}, Path(flags.out) / "hqd")


def everything(flags):
    """All methods in the space of mean scores, m = 2: runs of results, dps, rlhf, pama, sft and hqd."""
    seeds = lambda name: [str(Path(flags.out) / name.format(s)) for s in range(flags.seeds)]
    compare_all({"Panacea, DPO": seeds("m2-panacea-ls-seed{}"), "Panacea, RLHF": seeds("ppo-ls-seed{}"),
                 "Panacea, SFT": seeds("sft-ls-seed{}"), "RS, DPO": seeds("m2-rs-ls-seed{}"),
                 "RS, RLHF": seeds("ppo-rs-seed{}"), "RS, SFT": seeds("sft-rs-seed{}"),
                 "DPS, DPO": [str(Path(flags.out) / "m2-dps-ls-seed0")],
                 "PAMA (V)": seeds("ppo-pamav-seed{}"), "PAMA (T)": seeds("ppo-pamat-seed{}"),
                 "MGDA": seeds("ppo-mgda-seed{}"), "ParetoHqD": seeds("hqd-seed{}")}, Path(flags.out) / "everything")


def compare_all(groups, out):
    """eval_front.compare of finished runs, {label: [run directory, …]}: a line a label, compare.json, compare.png."""
    missing = [run for runs in groups.values() for run in runs if not (Path(run) / "front.json").exists()]
    if missing:
        raise UserError(f"{missing[0]} is not there: run the part of reproduce.py that makes it first")
    fronts = [(label, read_json(Path(run) / "front.json") | {"run": run}) for label, runs in groups.items()
              for run in runs]
    c = eval_front.compare([front for _, front in fronts], pick_device("auto")[0])
    for r, (label, _) in zip(c["runs"], fronts):
        r["label"] = label
    write_json(out / "compare.json", c)
    draw_comparison(c, out / "compare.png")
    keys = ("hypervolume", "hypervolume_share", "inner_product", "sparsity", "spacing", "of_best")
    print(f"\n{'':24} {'models':>6}" + "".join(f"{key:>18}" for key in (*keys, "KL mean", "KL max", "train s")))
    for label in groups:
        of = [r for r in c["runs"] if r["label"] == label]
        cells = [mean_of([r[key] for r in of]) for key in keys]
        cells += [mean_of([f(r["kl"]) for r in of]) for f in (np.mean, np.max)]
        cells += [f"{np.mean([r['train_seconds'] for r in of]):.0f}"]
        print(f"{label:24} {of[0]['models']:6d}" + "".join(f"{cell:>18}" for cell in cells))


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
    r = run(flags.out, "sft-styles-seed0", "--init", flags.stories_init, "--data", *files[:2], "--eval_data",
            *files[2:], "--dims", "concise", "verbose", script="train_sft.py")
    print(eval_front.front_table(r))


def labels(flags):
    """Appendix A, against the Panacea run of `results`."""
    from experiments import labelers as appendix_a                                                  # here: it trains too
    panacea = run(flags.out, "m2-panacea-ls-seed0")["run"]
    appendix_a.main(appendix_a.Flags(panacea=panacea, out=str(Path(flags.out) / "appendix-a")))


def main(flags):
    """Runs what was asked for, in order."""
    parts = {f.__name__: f for f in (results, three, dps, scaling, evolution, beta, rlhf, pama, stories, sft,
                                      ten, hhc, hqd, everything, labels, styles)}
    for what in flags.what:
        if what not in parts:
            raise UserError(f"{what!r}: choose among {', '.join(parts)}")
        parts[what](flags)


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
