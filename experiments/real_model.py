"""real_model.py - a real chat model aligned with two preferences at once: DPO on HelpSteer2, helpful and concise.

    python -m experiments.real_model --init DIR --data DIR     # a chat model's Hugging Face directory; a directory with
                                                               # helpsteer2_train.jsonl and helpsteer2_eval.jsonl

helpful: what HelpSteer2's raters found more helpful   concise: what they found less verbose. The two conflict in half
of the pairs that have both labels. Rows that do not fit --max_length are left out: a cut answer has no length.

Panacea, Panacea without shared singular values and rewarded soups are trained with equal steps, and then asked at
eleven λ, on rows that no training has seen:
accuracy    the part of the labelled pairs whose implicit rewards r = β (log π − log π_ref) are in the label's order
margin      the mean of r(better) − r(worse), in nats · β
length      tokens of a sampled answer, at most --max_new_tokens    collapsed: the part that is a loop or nearly empty
loss        nats per token of the rows' own answers: how far the model has left ordinary text
Each with its standard error, over pairs, prompts or answers. It writes real.json, real.png and the answers themselves.
"""
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.batches import pad_to
from data.files import as_json
from data.preferences import read_preferences
from data.text_rewards import collapsed
from data.tokenizers import load_tokenizer, spoken, tokenize, tokenizer_of
from data.trees import batch_logprobs, pack
from experiments.reproduce import call
from fronts.exact import evaluation_preferences
from fronts.measure import base_of, policies, run_config
from fronts.metrics import spearman
from fronts.pictures.shared import METHODS, OTHER, plt, save
from fronts.tables import plus_minus, shown, table
from model import generate
from runs.files import UserError, bar, read_json, write_json, write_jsonl
from runs.flags import flag, run_main
from runs.processes import pick_device
from runs.randomness import generator_for

DIMS = ["helpful", "concise"]
# what is trained: name -> (label, flags of train_dpo.py, its colour and marker)
CASES = {"panacea": ("Panacea, k = 8", ("--lr", 6e-4), METHODS["panacea"]),
         "k0": ("Panacea, k = 0: λ alone", ("--lora_dim", 0, "--lr", 6e-4), OTHER),
         "rs": ("rewarded soups", ("--method", "rs"), METHODS["rs"])}


@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    init: str = flag("", "Hugging Face directory of the chat model")
    data: str = flag("", "directory with helpsteer2_train.jsonl and helpsteer2_eval.jsonl")
    only: list[str] = flag(list(CASES), "these alone")
    steps: int = flag(100, "optimizer steps of each, in all", 1)
    max_length: int = flag(320, "tokens of a prompt with its longer answer; longer rows are left out", 2)
    max_new_tokens: int = flag(192, "a sampled answer's", 1)
    prompts: int = flag(55, "held-out prompts that are answered at every preference", 2)
    samples: int = flag(2, "answers to each of them", 1)
    precision: str = flag("auto", "of the frozen base: auto, fp32 or bf16")
    out: str = flag("out", "where the runs go")
    device: str = flag("auto", "cpu, cuda, or auto")


def main(flags):
    """Trains, measures, prints and draws. Returns what real.json holds."""
    out, device = Path(flags.out), pick_device(flags.device)[0]
    files = [fitting(flags, part, out / "helpsteer2") for part in ("train", "eval")]
    results = {}
    for name in flags.only:
        if name not in CASES:
            raise UserError(f"--only {name}: choose among {' '.join(CASES)}")
        label, more, _ = CASES[name]
        run = out / f"real-{name}"
        if not (run / "timing.json").exists():                         # it has not ended
            call(f"{name}: train_dpo.py", "train_dpo.py", "--init", flags.init, "--data", files[0], "--eval_data",
                 files[1], "--dims", *DIMS, *more, "--steps", flags.steps, "--max_length",
                 flags.max_length, "--precision", flags.precision, "--out", run, "--no-eval")
        if not (run / "real.json").exists():
            write_json(run / "real.json", measure(run, flags, device))
        results[name] = read_json(run / "real.json")
        print(f"\n{label}, {results[name]['steps']} steps\n" + table_of(results[name]))
    write_json(out / "real.json", results)
    draw(results, out / "real.png")
    return results


def fitting(flags, part, folder):
    """Writes the rows of a file whose prompt and longer answer fit --max_length. Returns its name."""
    source, file = Path(flags.data) / f"helpsteer2_{part}.jsonl", folder / f"{part}.jsonl"
    rows = read_preferences(str(source), DIMS)[0]
    tokens = tokenize(rows, load_tokenizer(flags.init), 10 ** 9)[0]
    kept = [row for row, t in zip(rows, tokens)
            if len(t.prompt) + max(map(len, t.responses)) <= flags.max_length]
    write_jsonl(file, [{"prompt": as_json(row.prompt), "response_0": row.responses[0], "response_1": row.responses[1],
                        "better": {d: b for d, b in zip(DIMS, row.better[0]) if b >= 0}} for row in kept])
    print(f"{file}: {len(kept)} of {len(rows)} rows fit {flags.max_length} tokens; labels: "
          + ", ".join(f"{d} {sum(row.better[0][i] >= 0 for row in kept)}" for i, d in enumerate(DIMS)))
    return file


@torch.no_grad()
def measure(run, flags, device):
    """{"steps", "lams": (F, 2), "prompts", a figure: F values or pairs of values, figure + "_se", "texts": F lists, and
    "base": the same of the base model}."""
    config = run_config(run)
    model, tokenizer = base_of(config, device), tokenizer_of(config)
    rows = read_preferences(config["flags"]["eval_data"], DIMS)[0]
    tokens = tokenize(rows, tokenizer, flags.max_length)[0]
    batches = [pack(tokens[i:i + 8], pad_to(device)).to(device) for i in range(0, len(tokens), 8)]
    ref = [batch_logprobs(model, batch) for batch in bar(batches, "log π_ref")]
    asked = [row.prompt for row in tokens[:flags.prompts] for _ in range(flags.samples)]
    lams, beta = evaluation_preferences(2).float(), config["flags"]["beta"]
    look = lambda policy: held_out(policy, batches, ref, beta) | answers(policy, asked, tokenizer, flags)
    base = look(model)
    each = [look(policy) for _, policy in bar(policies(run, config, model, lams), "λ", len(lams))]
    return {"steps": config["flags"]["steps"], "lams": lams.tolist(), "base": base,
            "prompts": [as_json(row.prompt) for row in rows[:flags.prompts] for _ in range(flags.samples)],
            **{key: [x[key] for x in each] for key in base}}


def held_out(policy, batches, ref, beta):
    """Accuracy and margin of each dimension and the loss, on rows that training has not seen."""
    r, better, nats = [], [], []
    for batch, before in bar(zip(batches, ref), "held-out pairs", len(ref)):
        now = batch_logprobs(policy, batch)                                           # (R,)
        first, second = (beta * (now - before))[batch.pairs].T                        # (P,)
        r.append(first - second)
        better.append(batch.better)
        nats.append(torch.stack([-now, batch.on_path.sum(1)], dim=1))                 # (R, 2)
    r, better, nats = torch.cat(r)[:, None].double().cpu(), torch.cat(better).cpu(), torch.cat(nats).double().cpu()
    margins = [(r * (1 - 2 * better))[better[:, i] >= 0, i] for i in range(len(DIMS))]       # > 0: in the label's order
    ratio = (nats[:, 0].sum() / nats[:, 1].sum()).item()
    off = nats[:, 0] - ratio * nats[:, 1]                                             # a ratio of sums, over answers
    return {**mean_se("accuracy", [(x > 0).double() + 0.5 * (x == 0) for x in margins]), **mean_se("margin", margins),
            "loss": ratio, "loss_se": (off.std() * len(off) ** 0.5 / nats[:, 1].sum()).item()}


def answers(policy, prompts, tokenizer, flags):
    """Sampled answers to the prompts: their lengths, what of them has collapsed, and the texts."""
    ids = generate(policy, prompts, flags.max_new_tokens, eos_id=tokenizer.ends, vocab_size=tokenizer.vocab_size,
                   generator=generator_for(0, "evaluation"),
                   show=lambda steps: bar(steps, "sampling", flags.max_new_tokens))
    lengths = torch.tensor([float(len(x)) for x in ids]).double().view(-1, flags.samples).mean(1)      # of each prompt
    return {"length": lengths.mean().item(), "length_se": (lengths.std() / math.sqrt(len(lengths))).item(),
            "collapsed": sum(map(collapsed, ids)) / len(ids), "texts": spoken(ids, tokenizer)[0]}


def mean_se(key, columns):
    """{key: the mean of each column, key_se: its standard error}. columns: m tensors, of any lengths"""
    return {key: [x.mean().item() for x in columns],
            key + "_se": [(x.std() / math.sqrt(len(x))).item() for x in columns]}


def table_of(r):
    """One line for each λ, along λ_1, and one for the base model."""
    each = lambda key, *i: np.array([*r[key], r["base"][key]])[:, *i]
    with_se = lambda key, form, *i: plus_minus(each(key, *i), each(key + "_se", *i), form)
    columns = {"λ " + DIMS[0]: [*shown([lam[0] for lam in r["lams"]], ".1f"), "base"]}
    for i, dim in enumerate(DIMS):
        for key in ("accuracy", "margin"):
            columns[f"{key}, {dim}"] = with_se(key, ".3f", i)
    columns |= {"length": with_se("length", ".0f"), "loss": with_se("loss", ".3f"),
                "collapsed": shown([*r["collapsed"], r["base"]["collapsed"]], ".3f")}
    rank = spearman(np.array([lam[0] for lam in r["lams"]]), np.array(r["length"]))
    return table(columns) + (f"\nlength along λ {DIMS[0]}: Spearman {rank:.3f}, from {r['length'][0]:.0f} to "
                             f"{r['length'][-1]:.0f} tokens")


def draw(results, path):
    """Margins and lengths along λ, a band of one standard error."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6))
    for name, r in results.items():
        x, (label, _, (color, marker)) = [lam[0] for lam in r["lams"]], CASES[name]
        for ax, key, i in ((axes[0], "margin", 0), (axes[1], "margin", 1), (axes[2], "length", None)):
            pick = lambda values: np.array(values) if i is None else np.array(values)[:, i]
            y, se = pick(r[key]), pick(r[key + "_se"])
            ax.plot(x, y, color=color, marker=marker, markersize=4, label=label)
            ax.fill_between(x, y - se, y + se, color=color, alpha=0.15, linewidth=0)
    for ax, title in zip(axes, (*(f"held-out margin, {dim}" for dim in DIMS), "tokens of a sampled answer")):
        ax.set(xlabel=f"λ {DIMS[0]}   (λ {DIMS[1]} = 1 − λ {DIMS[0]})", title=title)
    for ax in axes[:2]:
        ax.axhline(0, color="0.45", linestyle=":", linewidth=1)
    axes[2].axhline(r["base"]["length"], color="0.45", linestyle=":", linewidth=1)
    axes[2].annotate("base model", (x[0], r["base"]["length"]), textcoords="offset points", xytext=(2, -11), fontsize=8)
    axes[0].legend(loc="lower right")
    save(figure, path)


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
