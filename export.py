"""export.py - a run at one preference λ, or at several, as what other programs load.

    python export.py out/a --pref 0.3 0.7 --out DIR         # a whole model: transformers, vLLM, this project's --init
    python export.py out/a --pref helpful=0.3 harmless=0.7 --to peft --out DIR       # a LoRA adapter for PEFT
    python export.py out/a --to grid --parts 4 --out DIR    # an adapter for every λ of a lattice, over one base: for
                                                            # servers that choose an adapter for each request

merged: W(λ) = W0 + gain · U diag(σ, s·λ) Vᵀ, under the base's own config.json
peft:   the same as W0 + B A; rewarded soups are one adapter too, of the specialists' ranks together
Where a run has a model for each of its own preferences (dps, ParetoHqD, PAMA, MGDA), the nearest to λ is exported.
Tokenizer, chat template, the tokens that end a response and a model card go with it.
"""
import runs.waiting  # noqa: F401  # isort: skip
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from aggregate import simplex_lattice
from data import toy
from data.tokenizer_json import tokenizer_json
from data.tokenizers import EOS, encoding_of, tokenize, tokenizer_of
from families import stored_tensors, weight_files
from fronts.measure import base_of, load_trained, nearest, policies, run_config
from fronts.tables import table
from model import Transformer
from runs.directory import check_ended
from runs.files import UserError, bar, read_json, whole_directory, write_json, write_text
from runs.flags import flag, preferences_of, run_main
from runs.processes import pick_device
from svd_lora import (
    adapter_state,
    export_peft,
    inject_svd_lora,
    load_adapter,
    merged_state_dict,
    set_preference,
    svd_lora_layers,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NO_PREFERENCE = ("pama", "mgda")        # methods of one model, that has none
SHARD = 5 * 10 ** 9                     # bytes of one file of weights
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "tokenizer.model", "vocab.json", "merges.txt")
# the plain form of data/chat.py in Jinja
HH = ("{% for m in messages %}{{ {'user': '\n\nHuman: ', 'assistant': '\n\nAssistant: '}.get(m['role'], '') + "
      "m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}")


@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    run: str = flag(None, "run directory", positional=True)
    out: str | None = flag(None, "the directory that is made")
    pref: list[str] | None = flag(None, "λ: one number per dimension, in the run's order, or dimension=number; for a "
                                        "grid one λ after the other")
    to: Literal["merged", "peft", "grid"] = flag("merged", "a whole model, a PEFT adapter, or a folder of these")
    parts: int | None = flag(None, "grid: cut the simplex into so many parts (default 4)", 1)
    dtype: Literal["base", "fp32", "bf16"] = flag("base", "merged: of the weights (base: as the base is stored)")
    device: str = flag("auto", "cpu, cuda, or auto")


def main(flags):
    """Writes --out, whole or not at all, and says what is in it. Returns its path."""
    run = Path(flags.run)
    config = run_config(run)
    lams = preferences(flags, run, config)
    device, _ = pick_device(flags.device)
    tell = lambda text: print(f"{text} …", flush=True)                 # what follows may take long
    tell(f"reading the base {config['base']}")
    tokenizer, model = tokenizer_of(config), base_of(config, device)
    dtype = DTYPES.get(flags.dtype) or next(stored_tensors(weight_files(Path(config["base"]))[0], "cpu"))[1].dtype
    load = lambda path: Transformer.from_pretrained(path, model.embed.weight.dtype, device)
    quantised = config["flags"].get("quantize", "none") != "none"
    whole = load(config["base"]) if quantised and flags.to != "merged" else None
    out, adapters = Path(flags.out).resolve(), {}
    with whole_directory(out) as folder:
        write_tokenizer(config, tokenizer, folder)
        for lam, policy in models_at(run, config, model, lams):
            name = "-".join(f"{x:.4g}" for x in lam.tolist()).replace(".", "_")       # PEFT's names have no dots
            place = folder / name if flags.to == "grid" else folder
            if flags.to == "merged":
                tell("merging and writing the weights")
                write_merged(policy, lam, config["base"], dtype, place)
                tell("reading them again, beside the run's own model")
                off = difference(policy, load(place), tokenizer)
            else:
                adapters[name] = export_peft(policy, lam, place, Path(config["base"]).resolve()), lam
                off = difference(policy, same_adapter(whole, policy, lam), tokenizer) if quantised else None
            what, exact = said(config, lam, lams), exactness(flags.to, config, dtype, off)
            template = (folder / "chat_template.jinja").exists()
            write_text(place / "README.md", card(flags, run, config, lam, what, tokenizer, exact, template))
            print(f"λ = {what}: {exact}")
        if flags.to == "grid":
            text = grid_card(run, config, adapters, out, (folder / "chat_template.jinja").exists())
            write_text(folder / "README.md", text)
            print(text)
    print(f"exported {run}: {out}")
    return out


def preferences(flags, run, config):
    """The preferences to export, (n, m). Raises UserError for flags that do not fit the run, or each other."""
    dims = config["dims"]
    if flags.out is None:
        raise UserError("--out names the directory that is made")
    check_ended(run)
    if config["method"] == "prompt":
        raise UserError(f"{run}: --method prompt says λ in the prompt, so that there are no weights of a λ to export")
    if flags.dtype != "base" and flags.to != "merged":
        raise UserError("--dtype is of --to merged: adapters are in fp32")
    if flags.parts is not None and (flags.to != "grid" or flags.pref):
        raise UserError("--parts is of --to grid, in the place of --pref")
    if flags.pref is None and config["method"] in NO_PREFERENCE:
        return torch.full((1, len(dims)), 1 / len(dims))
    if flags.pref is None and flags.to == "grid":
        return simplex_lattice(len(dims), flags.parts or 4).float()
    if flags.pref is None or flags.to != "grid" and len(flags.pref) > len(dims):
        raise UserError(f"--to {flags.to} takes one preference: --pref and {len(dims)} numbers, for {' '.join(dims)}")
    return preferences_of(flags.pref, dims, "--pref").float()


def models_at(run, config, model, lams):
    """Yields (λ, model) as fronts.measure.policies; of a run with a model for each of its own preferences, those that
    are nearest to one of lams, with the λ that they were trained for."""
    if config["method"] in ("panacea", "rs"):
        yield from policies(run, config, model, lams)
    else:
        _, files = load_trained(run, config, model)
        for own in dict.fromkeys(nearest(files, lam) for lam in lams):
            load_adapter(model, files[own], config["dims"])
            yield torch.tensor(own), model


# ---------------------------------------------------------------------------------------------------------------------
# What is written.

def write_merged(model, lam, base, dtype, folder):
    """The model at λ as a Hugging Face directory: weights in `dtype`, and the config.json of the directory `base`."""
    with torch.device("meta"):
        plain = Transformer(model.config)
    weights = merged_state_dict(model, lam, torch.float32)
    plain.load_state_dict({name: weights[name].to(dtype) for name in list(weights)}, assign=True)
    del weights
    plain.save_pretrained(folder, SHARD)
    settings = read_json(Path(base) / "config.json")                   # not ours: a Mistral stays one
    settings["dtype" if "dtype" in settings else "torch_dtype"] = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", settings)


def write_tokenizer(config, tokenizer, folder):
    """The tokenizer's files, of tiktoken's own ones as tokenizer.json; the chat template that the run's prompts were
    written by; and a generation_config.json that stops where the run's responses end."""
    if encoding := encoding_of(config["tokenizer"]):
        tokenizer_json(encoding).save(str(folder / "tokenizer.json"))
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS,
                                                      "clean_up_tokenization_spaces": False})
    else:
        for file in (Path(config["tokenizer"]) / name for name in TOKENIZER_FILES):
            if file.exists():
                shutil.copyfile(file, folder / file.name)
    template = tokenizer.template
    if template.source or template.name == "hh" and files_of(config):
        bos = "{{ bos_token }}" if tokenizer.bos_id is not None else ""
        write_text(folder / "chat_template.jinja", template.source or bos + HH)
    settings = Path(config["base"]) / "generation_config.json"
    ends = list(tokenizer.ends) if tokenizer.more_ends else tokenizer.eos_id
    write_json(folder / settings.name, (read_json(settings) if settings.exists() else {}) | {"eos_token_id": ends})


def files_of(config):
    """The names of the data files that a run has read, without their folders; [] on the embedded world."""
    return [Path(name).name for name in config["flags"].get("data") or config.get("prompts") or []]


# ---------------------------------------------------------------------------------------------------------------------
# How exact it is.

def same_adapter(whole, model, lam):
    """`whole`, a base of the same shape, with the adapter of `model`: at λ, or as it is where it has none."""
    layer = next(iter(svd_lora_layers(model).values()))
    inject_svd_lora(whole, layer.k, layer.m, gain=layer.gain)
    whole.load_state_dict(adapter_state(model), strict=False)
    if layer.m:
        set_preference(whole, lam)
    return whole


@torch.no_grad()
def difference(model, other, tokenizer):
    """How two models differ on four of the embedded world's prompts, which are plain questions: (the largest difference
    of a logit, the largest logit of the first, at how many places the likeliest token is another, of how many)."""
    rows = [toy.as_row(prompt, []) for prompt in toy.prompts("new_verbs")[:4]]
    prompts = [torch.tensor([row.prompt]) for row in tokenize(rows, tokenizer, model.config.context_length)[0]]
    logits = lambda m: torch.cat([m(x.to(m.embed.weight.device))[0].float() for x in bar(prompts, "comparing logits")])
    a, b = logits(model), logits(other)                                               # (places, vocabulary) each
    another = (a.argmax(1) != b.argmax(1)).sum().item()
    return (a - b).abs().max().item(), a.abs().max().item(), another, len(a)


def exactness(to, config, dtype, off):
    """A sentence on what was exported, beside the run's own model. off: difference()'s answer, or None."""
    name, kind = str(dtype).removeprefix("torch."), config["flags"].get("quantize", "none")
    if off is None:
        return "the run's own factors, in fp32: exact on the same base"
    most, largest, another, places = off
    same = f"another at {another} of {places} places" if another else f"the same at all {places} places"
    differs = (f"a logit differs from the run's own by up to {most:.2g} on four prompts, {100 * most / largest:.2g} % "
               f"of the largest; the likeliest token is {same}")
    if to == "merged":
        more = f", the {kind} base as dense weights" if kind != "none" else ""
        rounded = "" if dtype == torch.float32 else f"; that is what {name} rounds, and --dtype fp32 does not"
        return f"weights in {name}{more}; {differs}{rounded}"
    return (f"trained on a base in {kind}: on the whole base, which PEFT loads, {differs}; --to merged has the base "
            f"that it was trained on")


# ---------------------------------------------------------------------------------------------------------------------
# What a reader is told.

def said(config, lam, lams=None):
    """λ in words: "helpful 0.3, harmless 0.7"; where none of lams, which were asked for, is it, the nearest of them
    too."""
    if config["method"] in NO_PREFERENCE:
        return "none, for this method balances the objectives by itself"
    words = ", ".join(f"{dim} {x:.4g}" for dim, x in zip(config["dims"], lam.tolist()))
    asked = lam if lams is None else lams[torch.cdist(lams, lam[None]).argmin()]
    if torch.allclose(asked, lam, atol=1e-4):
        return words
    return f"{words} (asked for: {said(config, asked)}; the run's nearest model was trained for this)"


def card(flags, run, config, lam, what, tokenizer, exact, template):
    """The model card of what was exported at λ, `what` in words. template: whether there is a chat_template.jinja."""
    given, o = config["flags"], config["objective"]
    files, turns = files_of(config), tokenizer.template
    rows = {"preference λ": what,
            "method": f"{config['label'] or config['method']}, {o['name']}, {o['aggregate']}, {given['steps']} steps, "
                      f"seed {given['seed']}",
            "data": ", ".join(files) or "a small synthetic world of prompts and responses, which are plain texts",
            "base": f"{Path(config['base']).resolve().name}, fingerprint {config['fingerprint']}",
            "this directory": exact,
            "reached": measured(run, lam)}
    if files:
        name = f"chat_template.jinja{' of the folder above' * (flags.to == 'grid')}" if template else turns.name
        rows["turns"] = f"written by the template {name}" + (f", system turn: {turns.system}" if turns.system else "")
    if "rewards" in config:
        rows["rewards"] = ", ".join(Path(name).name for name in config["rewards"]["names"])
    given = {"--pref": flags.pref, "--parts": flags.parts and [flags.parts], "--to": [flags.to], "--out": [flags.out],
             "--dtype": [flags.dtype] if flags.to == "merged" else None}
    command = shlex.join(["python", "export.py", str(run), *(str(x) for flag, values in given.items() if values
                                                             for x in (flag, *values))])
    library = "transformers" if flags.to == "merged" else "peft"
    return (f"---\nlibrary_name: {library}\n---\n# {run.name}\n\nA language model aligned to "
            f"{len(lam)} objectives, at one preference λ between them.\n\n| | |\n|---|---|\n"
            + "".join(f"| {key} | {' '.join(value.replace('|', '/').split())} |\n" for key, value in rows.items())
            + f"\n```python\n{snippet(flags.to)}\n```\n"
            + "\n`base_model_name_or_path` in `adapter_config.json` is a path of the machine that made this: put the "
              "base's name on the hub there before you give it to others.\n" * (library == "peft")
            + f"\nMade by `{command}`.\n\nIt serves this λ alone: another one is another export. Nothing was measured "
              f"but what stands above; it is not a claim of safety.\n")


def snippet(to):
    """The lines that load what was exported, in its directory."""
    tokenizer = "AutoTokenizer.from_pretrained(" + ("'..'" if to == "grid" else "'.'") + ")"
    if to == "merged":
        return ("from transformers import AutoModelForCausalLM, AutoTokenizer\n"
                f"model = AutoModelForCausalLM.from_pretrained('.')      # this directory\ntokenizer = {tokenizer}")
    return ("from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n"
            f"model, tokenizer = AutoPeftModelForCausalLM.from_pretrained('.'), {tokenizer}      # this directory")


def measured(run, lam):
    """What the run's front.json says of the preference that is nearest to λ, and what it was measured on."""
    if not (run / "front.json").exists():
        return "not evaluated"
    r = read_json(run / "front.json")
    i = torch.cdist(torch.tensor(r["lams"]).float(), lam[None]).argmin().item()
    named = lambda values: ", ".join(f"{dim} {x:.3f}" for dim, x in zip(r["dims"], values))
    regret = "" if r["regret"] is None else f"; regret over all preferences {r['regret']:.4f} (0: optimal, 1: the base)"
    on = ""
    if r.get("eval_labels"):
        on = " (held-out rows with a label: " + ", ".join(map("{} {}".format, r["dims"], r["eval_labels"])) + ")"
    elif r.get("split"):
        on = f" (exactly, on {len(toy.prompts(r['split']))} held-out prompts of the world)"
    elif (run / "samples.json").exists():
        on = f" (on {len(read_json(run / 'samples.json')['texts'][i])} sampled responses)"
    return f"{r['points_are']} at λ = {named(r['lams'][i])}: {named(r['points'][i])}{on}{regret}"


def grid_card(run, config, adapters, out, template):
    """README.md of a folder of adapters: what they are, and how a server is started with them.

    adapters: {name: (rank, λ)}   out: where the folder will be   template: whether there is a chat template
    """
    base, ranks = str(Path(config["base"]).resolve()), [rank for rank, _ in adapters.values()]
    served = read_json(Path(config["base"]) / "config.json")["model_type"] != "gpt2"
    chat = ["--chat-template", str(out / "chat_template.jinja")] if template else []
    command = shlex.join(["vllm", "serve", base, "--tokenizer", str(out), *chat, "--enable-lora", "--max-lora-rank",
                          str(max(8, 1 << (max(ranks) - 1).bit_length())), "--max-loras", str(len(adapters)),
                          "--lora-modules", *(f"{name}={out / name}" for name in adapters)])
    first, *others = adapters
    listing = table({"adapter": list(adapters), "λ": [said(config, lam) for _, lam in adapters.values()]})
    return (f"# {run.name}: {len(adapters)} adapters over one base\n\n```\n{listing}\n```\n\n"
            + (f"vLLM, where a request's \"model\" is the name of an adapter:\n\n```\n{command}\n```\n" if served else
               "vLLM serves no adapters of GPT-2: use PEFT, or `--to merged`.\n")
            + f"\nPEFT:\n\n```python\nmodel = AutoPeftModelForCausalLM.from_pretrained({str(out / first)!r}, "
              f"adapter_name={first!r})\n"
            + "".join(f"model.load_adapter({str(out / name)!r}, adapter_name={name!r})\n" for name in others[:1])
            + f"model.set_adapter({(others or [first])[0]!r})\n```\n")


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
