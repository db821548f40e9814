"""real_rlhf.py - RLHF on a real chat model: Panacea beside PAMA, MORLHF and MGDA, towards happy and short answers.

    python -m experiments.real_rlhf --init DIR --prompts FILE    # a chat model's Hugging Face directory; prompts of any
                                                                 # layout of data/README.md

It is PAMA's experiment (sentiment and length, three methods that end in one policy each) with Panacea beside it.
sentiment   VADER's compound score, -1 to 1 (experiments/sentiment.py; --sentiment: another function of one's own)
concise     data/text_rewards.py, "concise:12": 4 up to 12 words, 1 less for every 12 more

# differs from PAMA: it pays for *long* answers. Here answers are cut at --max_new_tokens, and cannot grow. Being short
conflicts with sentiment, whose score grows with every happy word.
# differs from PAMA: all advantages are leave-one-out among --samples answers to one prompt, without value heads: few
rollouts do not teach a critic.

Every run has the same rollouts, and train_ppo.py's own evaluation measures it: sampled answers to held-out prompts, at
eleven λ for Panacea. It writes real_rlhf.json (figures and answers), real_rlhf.png, and prints a table and answers.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.chat import question
from data.files import as_json
from data.own_rewards import own_reward
from data.prompts import read_prompts, split
from data.tokenizers import load_tokenizer, tokenize
from experiments.reproduce import HALF, call
from fronts.pictures.shared import BASE, METHODS, OUTLINE, finish_plane, plt, save
from fronts.tables import plus_minus, shown, table
from runs.files import ROOT, UserError, read_json, write_json, write_jsonl
from runs.flags import flag, run_main

PAMA = METHODS["pama"][0]
# what is trained: name -> (label, flags of train_ppo.py, its colour and marker)
CASES = {"panacea": ("Panacea", (), METHODS["panacea"]),
         **{f"pama{r.lower()}": (f"PAMA ({r})", ("--aggregate", "pama", "--pama_reading", r), (PAMA, marker))
            for r, marker in zip("VTS", "DXp")},
         "morlhf": ("MORLHF (½, ½)", HALF, METHODS["dps"]),
         "mgda": ("MGDA", ("--aggregate", "mgda"), METHODS["mgda"])}
FIGURES = "scores", "scores_se", "J", "kl", "length", "ended", "collapsed"
SHOWN = 5               # prompts, and preferences, in the table of answers


@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    init: str = flag("", "Hugging Face directory of the chat model")
    prompts: str = flag("", "a file of prompts")
    rows: int = flag(300, "short prompts of it, the first; a tenth is held out, and has four answers each", 20)
    sentiment: str = flag(str(ROOT / "experiments/sentiment.py:sentiment"), "the first reward, FILE.py:function")
    only: list[str] = flag(list(CASES), "these alone")
    system: str = flag("You are a friendly assistant. Answer in one sentence.", "the system turn: without it hardly an "
                       "answer of a small model ends in time, and a reward for ending finds nothing to reward")
    max_prompt: int = flag(40, "tokens of a prompt with its template; longer ones are left out", 1)
    max_new_tokens: int = flag(32, "an answer's", 1)
    steps: int = flag(12, "rollouts of each, in all", 1)
    batch_size: int = flag(32, "answers per rollout", 1)
    samples: int = flag(4, "answers to one prompt, under one λ", 2)
    lr: float = flag(2e-3, "peak learning rate", "positive")
    kl_coeff: float = flag(0.1, "β, the price of a nat", "positive")
    precision: str = flag("auto", "of the frozen base: auto, fp32 or bf16")
    out: str = flag("out", "where the runs go")
    device: str = flag("auto", "cpu, cuda, or auto")


def main(flags):
    """Trains, measures, prints and draws. Returns what real_rlhf.json holds."""
    out = Path(flags.out)
    own_reward(flags.sentiment)                                        # now: it may need a package
    prompts = short_prompts(flags, out / "rlhf-prompts.jsonl")
    runs, base = {}, None
    for name in flags.only:
        if name not in CASES:
            raise UserError(f"--only {name}: choose among {' '.join(CASES)}")
        run = out / f"rlhf-{name}"
        if not (run / "front.json").exists():                          # it has not ended, or is not measured
            call(f"{name}: train_ppo.py", "train_ppo.py", *CASES[name][1], "--init", flags.init, "--prompts", prompts,
                 "--system", flags.system, "--rewards", flags.sentiment, "concise:12", "--estimator", "rloo",
                 "--max_length", flags.max_prompt + flags.max_new_tokens, "--max_new_tokens", flags.max_new_tokens,
                 "--steps", flags.steps, "--batch_size", flags.batch_size, "--samples", flags.samples, "--lr", flags.lr,
                 "--kl_coeff", flags.kl_coeff, "--precision", flags.precision, "--device", flags.device,
                 "--save_every", 5, "--snapshots", 0, "--out", run)
        runs[name], base = of_run(run)
    held_out = split(read_prompts([str(prompts)])[0])[1]               # as the evaluation has them, in order
    r = {"dims": read_json(run / "front.json")["dims"], "base": base, "runs": runs,
         "prompts": [question(row.prompt) for row in held_out[:len(base["texts"])]]}
    write_json(out / "real_rlhf.json", r)
    print("\n" + table_of(r))
    if "panacea" in runs:
        print("Spearman along λ: " + ", ".join(map("{} {:.3f}".format, r["dims"], runs["panacea"]["spearman"])))
        print("\n" + answers_of(r))
    draw(r, out / "real_rlhf.png")
    return r


def short_prompts(flags, file):
    """Writes the first --rows prompts of at most --max_prompt tokens. Returns the file's name."""
    rows = read_prompts([flags.prompts])[0]
    tokens = tokenize(rows, load_tokenizer(flags.init, system=flags.system), 10 ** 9)[0]
    kept = [row for row, t in zip(rows, tokens) if len(t.prompt) <= flags.max_prompt][:flags.rows]
    if not kept:
        raise UserError(f"{flags.prompts}: no prompt has at most {flags.max_prompt} tokens (--max_prompt)")
    write_jsonl(file, [{"prompt": as_json(row.prompt)} for row in kept])
    print(f"{file}: {len(kept)} of {len(rows)} prompts, the first of at most {flags.max_prompt} tokens")
    return file


def of_run(run):
    """What the evaluation says of a run's policies (F of Panacea, 1 of the others) and of the base: two dicts. texts:
    one answer to each prompt."""
    front, samples = read_json(run / "front.json"), read_json(run / "samples.json")
    F = len(front["lams"]) if front["method"] == "panacea" else 1
    return ({key: front[key][:F] for key in ("lams", *FIGURES)} | {"texts": samples["texts"][:F]}
            | {key: front[key] for key in ("steps", "spearman")}
            | {"train_seconds": read_json(run / "timing.json")["train_seconds"]},
            {key: front["base"][key] for key in FIGURES} | {"texts": samples["base"]["texts"]})


def table_of(r):
    """One line for each policy: the base's, Panacea's along λ, the others'."""
    lines = {"base model": r["base"]} | {
        CASES[name][0] + f", λ {lam[0]:.1f}" * (name == "panacea"): {key: x[key][i] for key in FIGURES}
        for name, x in r["runs"].items() for i, lam in enumerate(x["lams"])}
    of = {key: np.array([x[key] for x in lines.values()]) for key in FIGURES}
    columns = {"": list(lines)} | {dim: plus_minus(of["scores"][:, i], of["scores_se"][:, i], ".3f")
                                   for i, dim in enumerate(r["dims"])}
    columns |= {"tokens": shown(of["length"], ".1f"), "ended": shown(of["ended"], ".3f"),
                "collapsed": shown(of["collapsed"], ".3f"), "KL": shown(of["kl"], ".2f"),
                "J at (½, ½)": shown(of["J"].mean(1), ".3f")}
    return table(columns)


def answers_of(r):
    """The base's and Panacea's answers to the first prompts, unedited, as a table in Markdown."""
    lines, x = ["| prompt | λ " + r["dims"][0] + " | answer |", "|---|---|---|"], r["runs"]["panacea"]
    some = np.linspace(0, len(x["lams"]) - 1, SHOWN).round().astype(int)
    policies = {"base": r["base"]["texts"]} | {f"{x['lams'][i][0]:.1f}": x["texts"][i] for i in some}
    for j, prompt in enumerate(r["prompts"][:SHOWN]):
        for name, texts in policies.items():
            cells = (prompt if name == "base" else "", name, texts[j])
            lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ⏎ ") for cell in cells) + " |")
    return "\n".join(lines)


def draw(r, path):
    """Mean rewards of sampled answers in their plane, with bars of one standard error; Panacea's joined along λ."""
    figure, ax = plt.subplots(figsize=(8, 6))
    for name, x in r["runs"].items():
        Y, se, (label, _, (color, marker)) = np.array(x["scores"]), np.array(x["scores_se"]), CASES[name]
        ax.errorbar(*Y.T, se[:, 1], se[:, 0], color=color, marker=marker, ms=7, ls="-" * (len(Y) > 1), label=label,
                    ecolor=(color, 0.4), elinewidth=1)
        for lam, y in zip(x["lams"] if name == "panacea" else (), Y):
            ax.annotate(f"{lam[0]:.1f}", y, xytext=(6, 5), textcoords="offset points", fontsize=8, color=color,
                        path_effects=OUTLINE)
    base, se = r["base"]["scores"], r["base"]["scores_se"]
    ax.errorbar(*base, se[1], se[0], ecolor=(BASE, 0.4), elinewidth=1)
    finish_plane(ax, r["dims"], "mean reward", base)
    ax.set_title(f"Rewards of sampled answers, ± one standard error; numbers: Panacea's λ of {r['dims'][0]}")
    ax.legend()
    save(figure, path)


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
