"""check.py - do the documents keep their promises? Links, names, commands and figures of README.md, CONTRIBUTING.md,
docs/, data/README.md and course/; the commands in the header of every script.

    python docs/check.py               # reads and parses; runs nothing
    python docs/check.py --run         # besides runs the cheap commands (RUN), in a copy of the repository

A line for each problem, FILE:LINE: what is wrong, and exit status 1 where there is one.

A *span* is `code` within a line of text, a *block* what stands between two lines of ```.
"""
import argparse
import ast
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from functools import lru_cache
from importlib import import_module
from itertools import groupby
from pathlib import Path, PurePath
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import runs.waiting  # noqa: E402, F401  (before torch)
from runs.files import UserError  # noqa: E402
from runs.flags import cli  # noqa: E402

DOCUMENTS = ("*.md", "docs/*.md", "data/*.md", "course/**/*.md")
SCRIPTS = ("*.py", "*/check.py", "bench/*.py", "experiments/*.py", "runs/*.py", "course/**/*.py", "tests/fuzz.py")
OF_THE_PAST = "CHANGELOG.md"        # names what is gone: its links alone are checked
# what documents name and the reader, or a command, makes: no file of the repository
ELSEWHERE = ("mine.py", "solution.py", "setup.sh", "convert_hf_to_gguf.py", "course/setN/handout.html")
FLAGS_OF_OTHERS = {"help", "help-all", "include"}                     # outside of commands: argparse's, grep's
README_LINES = 200
# commands that --run runs, in this order and in one folder: as a document has it, what is run instead, seconds at most
QUESTION, ROW = "How do I paint a front door?", '{"prompt": "Hi.", "chosen": "Hello!", "rejected": "No."}'
SHORT = "--steps 2 --no-eval"
RUN = (
    ("python course/handout.py --out student-1-2 --sets 1 2", None, 60),
    ("python course/grade.py --adapters course.reference_adapters", None, 180),
    ("python bench/scaling.py", None, 60),
    ("python train_dpo.py --pref_dim 2", f"python train_dpo.py --pref_dim 2 {SHORT} --out out/a", 180),
    ("python train_sft.py --pref_dim 2", f"python train_sft.py --pref_dim 2 {SHORT}", 180),
    ("python train_reward.py --pref_dim 2", f"python train_reward.py --pref_dim 2 {SHORT} --rows 40", 180),
    ("python train_ppo.py --pref_dim 2", f"python train_ppo.py --pref_dim 2 {SHORT} --batch_size 32", 180),
    ("python train_hqd.py --pref_dim 2", f"python train_hqd.py --pref_dim 2 {SHORT} --lam 0.5 0.5 --pool 200 --near 10 "
                                         "--samples2 1", 180),
    ("python eval_front.py out/a", "python eval_front.py out/a --parts 2", 300),
    ("python eval_front.py --list", None, 60),
    ("python -m runs.plots out/a", None, 60),
    ("python export.py out/a --pref 0.3 0.7 --out DIR", "python export.py out/a --pref 0.3 0.7 --out exported", 60),
    ("python chat.py --init DIR --greedy", f"echo '{QUESTION}' | python chat.py --init exported --greedy", 60),
    ("python -m data.check FILE", f"echo '{ROW}' > FILE && python -m data.check helpful=FILE", 60),
)


# ---------------------------------------------------------------------------------------------------------------------
# Texts: every check yields (place in the text, what is wrong there or "") of all that it has looked at.

BLOCK = re.compile(r"^(?:> ?)?```(\w*)\n(.*?)^(?:> ?)?```", re.M | re.S)
SPAN = re.compile(r"`((?:(?!\n[> ]*\n)[^`])+)`")                  # may go over a line's end, not a paragraph's


def read(path):
    """The text of a file of the repository."""
    return (ROOT / path).read_text(encoding="utf-8")


def documents():
    """{name: text} of all documents, and of the scripts, for the commands in their headers."""
    files = [f for pattern in DOCUMENTS + SCRIPTS for f in sorted(ROOT.glob(pattern)) if "out" not in f.parts]
    return {f.relative_to(ROOT).as_posix(): read(f) for f in files}


def blanked(text):
    """A text without its blocks, each letter in its place."""
    return BLOCK.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)


def spans(text):
    """(place, code) of every span."""
    for m in SPAN.finditer(blanked(text)):
        yield m.start(), " ".join(re.sub(r"\n> ?", "\n", m[1]).split())


def lines(text):
    """(place, line) of every line of the blocks without a language; a line that ends in \\ goes on."""
    for m in BLOCK.finditer(text):
        for line in re.finditer(r"(?:.*\\\n)*.*\n", m[2] if m[1] in ("", "bash", "sh") else ""):
            yield m.start(2) + line.start(), re.sub(r"^> ?", "", line[0].replace("\\\n", " "), flags=re.M).strip()


# ---------------------------------------------------------------------------------------------------------------------
# 1. Links and names.

@lru_cache
def everything():
    """All files and folders of the repository, as paths from its top."""
    found = [Path(folder) / name for top in ROOT.iterdir() if top.name not in ("out", ".git", ".whl") and top.is_dir()
             for folder, folders, files in os.walk(top) if "__pycache__" not in folder for name in (*folders, *files)]
    return [PurePath(f.relative_to(ROOT)) for f in (*ROOT.iterdir(), *found)]


@lru_cache
def found(path):
    """The files that a text can mean by a path, from the top or shorter. <name> and the N of setN stand for any."""
    pattern = re.sub(r"<\w+>", "*", path.rstrip("/")).replace("setN", "set*")
    return [f for f in everything() if f.match(pattern)]


def anchors(text):
    """The anchors of a document's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+?)\s*$", blanked(text), re.M)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\[(.+?)\]\(.+?\)", r"\1", head).lower()).replace(" ", "-")
            for head in heads}


def links(name, text):
    """Relative links and pictures, and their anchors."""
    for m in re.finditer(r'\]\(([^)\s]+)\)|<img src="([^"]+)"', blanked(text)):
        target, _, anchor = (m[1] or m[2]).partition("#")
        if "://" in target or name.endswith(".py"):
            continue
        file = (ROOT / name).parent / target if target else ROOT / name
        there = text if not target else read(file) if anchor and file.is_file() else ""
        yield m.start(), (f"{target} does not exist" if not file.exists() else
                          f"{target or name} has no heading #{anchor}" if anchor and anchor not in anchors(there) else
                          "")


@lru_cache
def node_of(file, name):
    """The syntax tree of a function, class, method or field ("Class.method") or constant of a file; None: there is
    none. Of the name "" that of the file."""
    if not name:
        return ast.parse(read(file))
    of, _, last = name.rpartition(".")
    for n in getattr(node_of(file, of), "body", ()):
        target = n.targets[0] if isinstance(n, ast.Assign) else getattr(n, "target", None)
        if last in (getattr(n, "name", None), getattr(target, "id", None)):
            return n


def names(name, text):
    """Spans that are a path of the repository, and those that are `file.py: function`."""
    tops = {f.parts[0] for f in everything() if (ROOT / f.parts[0]).is_dir()}
    for place, span in spans(text if name.endswith(".md") else ""):
        is_path = re.fullmatch(r"[\w.<>*-]+(/[\w.<>*-]*)*", span) and (
            "/" in span and span.split("/")[0] in tops or re.search(r"\w\.(py|md|html|ini|toml|sh)$", span))
        if m := re.fullmatch(r"([\w/<>]+\.py): ([\w., ]+)", span):
            for each in m[2].split(", "):
                yield place, "" if any(node_of(f, each) for f in found(m[1])) else f"{m[1]} has no {each}"
        elif is_path and span not in ELSEWHERE:
            yield place, "" if found(span) else f"{span} does not exist"


# ---------------------------------------------------------------------------------------------------------------------
# 2. Commands.

COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:(?:python3?|torchrun|bash|pip|[\w/]+\.py) |pytest\b)")


def calls(name, text):
    """(place, words) of every command in a document's blocks and spans, or in a script's header."""
    if name.endswith(".py"):
        said = [(m.start(1), m[1]) for m in re.finditer(r"^ {4}((?:[A-Z_]+=\S+ )?(?:python|torchrun) .*)", text, re.M)]
    else:
        said = [*lines(text), *((place, span) for place, span in spans(text) if COMMAND.match(span))]
    return [(place, words) for place, line in said for words in split(line)]


def commands(name, text):
    """Every command, by the parser of the script that it calls."""
    for place, words in calls(name, text):
        if (problem := called(words)) is not None:
            yield place, problem and f"{shlex.join(words)}: {problem}"


def split(line):
    """The commands of a line, which &&, | and ; part, as lists of words; [] for what is no shell's. <…> is any word, N
    a number."""
    try:
        words = shlex.split(re.sub(r"<[^<>]+>", "DIR", line.removeprefix("$ ")), comments=True)
        words = ["2" if word == "N" else word for word in words]
    except ValueError:
        return []
    parts = (list(part) for between, part in groupby(words, lambda word: word in ("&&", "|", ";")) if not between)
    return [words[next((i for i, w in enumerate(words) if not re.match(r"[A-Z_]+=|srun$", w)), 0):] for words in parts]


def called(words):
    """What is wrong with a command: "" for nothing, None where it calls nothing of this repository."""
    program, *rest = words
    if program == "torchrun":
        from torch.distributed.run import get_args_parser
        with refusing():
            try:
                given = get_args_parser().parse_args(rest)
            except UserError as e:
                return str(e)
        program, rest = given.training_script, given.training_script_args
        if (ROOT / program).exists() and "several=True" not in read(program):
            return f"{program} is one process, not for torchrun"
    elif program in ("python", "python3") and rest:
        program, rest = (rest[1].replace(".", "/") + ".py", rest[2:]) if rest[0] == "-m" else (rest[0], rest[1:])
    elif program == "pytest":
        markers = read("pytest.ini")
        wrong = [word for before, word in zip(words, rest) if before == "-m" and f"    {word}:" not in markers
                 or before not in ("-m", "-k") and word not in ("-m", "-k", "-x", "-q") and not found(word)]
        return f"what is {wrong[0]}?" if wrong else ""
    elif program in ("bash", "pip"):
        files = [word for before, word in zip(words, rest) if program == "bash" or before == "-r"]
        return next((f"{file} does not exist" for file in files if not (ROOT / file).exists()), "") if files else None
    if not program.endswith(".py") or "*" in program or {"--help", "--help-all"} & set(rest):
        return None
    if not (ROOT / program).exists():
        return f"{program} does not exist"
    wrong = [parsed(program, filled) for filled in fillings(rest)]
    return "" if "" in wrong else wrong[0]


def fillings(words):
    """Ways to fill in words with …, which stands for a value or for nothing. A last flag may lack its value."""
    some = ["1" if word == "…" else word.removesuffix("…") for word in words]
    few = [new for before, word, new in zip(["", *words], words, some) if word != "…" or before.startswith("--")]
    return [few, some, *([[*few, "1"]] if words and words[-1].startswith("--") else [])]


def parsed(script, words):
    """What the script's own parser says against these words, "" for nothing. Nothing is run."""
    try:
        module = import_module(script.removesuffix(".py").replace("/", "."))
        if hasattr(module, "Flags"):
            given = vars(cli(module.Flags, "", words))
        elif "parse_args" in read(script):
            given = arguments(module, words)
        else:
            return f"{script} takes no arguments" if words else ""
    except (UserError, ImportError) as e:
        return str(e).partition("; ")[0]
    unknown = [word for flag, known in CHOICES.get(script, {}).items() for word in given[flag] or ()
               if word not in known() and word not in ("1", "none", "NAME")]
    return f"there is no {unknown[0]}" if unknown else ""


# lists of words that are chosen among some, which a script looks at itself: {script: {flag: what there is}}
CHOICES = {
    "bench/bench_ops.py": {"only": lambda: import_module("bench.bench_ops").OPS,
                           "peers": lambda: import_module("bench.bench_ops").PEERS},
    "bench/bench_waiting.py": {"settings": lambda: import_module("bench.bench_waiting").SETTINGS},
    "course/grade.py": {"problems": lambda: {
        name for n in import_module("course.grade").SETS for name in import_module(f"course.set{n}.grade").PROBLEMS}},
    "experiments/reproduce.py": {"what": lambda: " ".join(re.findall(
        r"experiments\.reproduce ([a-z_ ]+)", import_module("experiments.reproduce").__doc__)).split()},
}


def refusing():
    """Within it argparse's errors are UserErrors, not the end."""
    def error(parser, message):
        raise UserError(message)
    return mock.patch.object(argparse.ArgumentParser, "error", error)


def arguments(module, words):
    """The arguments that the parser in a script's main() makes of these words, a dict; main() ends there."""
    class Parsed(Exception):
        pass

    def parse(parser, argv=None):
        raise Parsed(vars(usual(parser, words)))

    usual = argparse.ArgumentParser.parse_args
    with refusing(), mock.patch.object(argparse.ArgumentParser, "parse_args", parse):
        try:
            module.main()
        except Parsed as e:
            return e.args[0]


@lru_cache
def declared():
    """The flags of all scripts."""
    texts = "".join(read(f) for pattern in SCRIPTS for f in ROOT.glob(pattern))
    return {a or b for a, b in re.findall(r'^ {4}(\w+): .* = flag\(|add_argument\("--([\w-]+)"', texts, re.M)}


def flags(name, text):
    """Every --flag of a text that stands in no block and in no command is one of some script."""
    prose = SPAN.sub(lambda m: " " * len(m[0]) if COMMAND.match(m[1]) else m[0], blanked(text))
    for m in re.finditer(r"(?<![\w-])--(?:no-)?([a-z][\w-]*)", prose if name.endswith(".md") else ""):
        yield m.start(), "" if m[1] in declared() | FLAGS_OF_OTHERS else f"no script has the flag {m[0]}"


# ---------------------------------------------------------------------------------------------------------------------
# 3. Figures.

WORDS = dict(zip("one two three four five six seven eight nine ten eleven twelve".split(), range(1, 13)))
WORDS |= {"½": 0.5, "¼": 0.25, "quarter": 0.25}
NUMBER = rf"(\d+(?:,\d{{3}})*(?:\.\d+)*(?:e-?\d+)?|\b(?i:{'|'.join(WORDS)})\b|[½¼])"


def stated(phrase, text):
    """[(place, the numbers as texts)] wherever a phrase stands: # is a number, ~ anything short, a space any space."""
    pattern = re.escape(phrase).replace("\\#", NUMBER).replace("\\~", r"(?:(?!\n\s*\n)[\s\S]){0,200}?")
    return [(m.start(), m.groups()) for m in re.finditer(re.sub(r"(?:\\ )+", r"[\\s>]+", pattern), text)]


def said(path, phrase):
    """The number, or numbers, that stand in a file of the repository in the place of # in a phrase."""
    places = stated(phrase, read(path))
    if not places:
        raise UserError(f"docs/check.py looks for {phrase!r} in {path}, and it is not there any more")
    values = [value(x) for x in places[0][1]]
    return values[0] if len(values) == 1 else tuple(values)


def value(text):
    """A number as a text -> as a number; a version, 3.9.0, stays a text."""
    text = text.lower().replace(",", "")
    return WORDS[text] if text in WORDS else text if text.count(".") > 1 else float(text)


def agrees(text, truth):
    """Whether a number in a text is the truth: rounded, where it has decimals, to as many."""
    decimals = len(text.partition(".")[2])
    if isinstance(truth, str) or not decimals:
        return value(text) == truth
    return abs(value(text) - truth) <= 0.5000001 * 10.0 ** -decimals


@lru_cache
def table():
    """{document: [(a phrase of it, the truth of each # in it)]}. A truth comes from the code itself, or by said() from
    a line of it, or from the document that has the figure first."""
    import chat
    import families
    import train_dpo
    import train_ppo
    import train_reward
    from bench import scaling
    from data import layouts, text_rewards, toy
    from experiments import real_rlhf, reproduce
    from fronts import comparison, exact, objective
    from fronts.measure import Samples
    base, dpo, ppo = json.loads(read("data/base/base.json")), train_dpo.Flags(), train_ppo.Flags()
    chat_model = real_rlhf.Flags()
    known = base["splits"]["new_verbs"]
    S, D, bad = toy.N_RESPONSES, len(toy.SCORES), -toy.OUTSIDE
    prompts = {split: len(toy.prompts(split)) for split in toy.SPLITS}
    splits = tuple(prompts[split] for split in ("train", "validation", "seen", "new_verbs"))
    F, dense = len(exact.evaluation_preferences(2)), tuple(len(exact.front_preferences(m)) for m in (2, 3))
    results = lambda phrase: said("docs/results.md", phrase)
    optimal = results("*the optimal policies at these 11 preferences* | | *0* | *0* | *0* | *#*")
    steps = said("train_dpo.py", "flags.steps = flags.steps or (# if on_world")
    beta, file_beta = said("train_dpo.py", "flags.beta or (# if on_world else #)")
    rate, small_rate, width, large_rate = said(
        "data/base.py", "return # if on_world else # if config.d_model < # else #")
    dpo_rate = said("train_dpo.py", "flags.lr or (# if on_world")
    batch, faster = said("train_dpo.py", "flags.batch_size or (# if on_world else 8), flags.values_lr or #")
    kl_coeff = said("train_ppo.py", "flags.kl_coeff or (# if truth_known")
    loop = said("data/text_rewards.py", "return len(tokens) < # or len(set(grams)) / len(grams) < #")[::-1]
    stories = dict(zip(*[iter(reproduce.STORIES[3:])] * 2))
    trains = [node.end_lineno - node.lineno + 1 for f in ROOT.glob("train_*.py") if (node := node_of(f, "train"))]
    worth = {name: points for n in (1, 2) for name, (points, _) in boxes(n).items()}
    ruff = tomllib.loads(read("pyproject.toml"))["tool"]["ruff"]
    return {
        "README.md": [
            ("One #M-parameter model with a rank-# adapter leaves # of",
             (base["parameters"] / 1e6, dpo.lora_dim + 2, results("| **Panacea**, LS | 1 | #"))),
            ("MOD leaves #", results("| MOD, factor 0.8, equal total steps | 2 | #")),
            ("rewarded soups #)", results("| Rewarded soups, factor 0.8, equal total steps | 2 | #")),
            ("| `python train_dpo.py --pref_dim 2` | # to # | # |",
             (None, None, results("| Panacea: k = 8, one λ a row, a quarter of them vertices | #"))),
            ("`pip install triton==#`", said(".ci/run", "triton==#")),
            ("(any of #)", D),
            ("how risky the task is, in # grades", len(toy.DOMAINS["home"][0])),
            ("fills # slots", len(toy.Slots._fields) - 1),
            ("That makes # plain English responses", S),
            ("# short functions", D),
            ("# prompts train, # validate, and results are of # unseen ~ of # prompts", splits),
            ("the same # preferences #", (F, optimal)),
            ("with the score −#", bad),
        ],
        "CONTRIBUTING.md": [
            ("at most # lines, its steps numbered", math.ceil(max(trains) / 5) * 5),
            ("Lines of at most # columns", ruff["line-length"]),
        ],
        "data/README.md": [("More than # % of a file stop", 100 * layouts.MOST_BROKEN)],
        "docs/chat.md": [
            ("(`--temperature #`, `--top_p #`)", (chat.Flags.temperature, chat.Flags.top_p)),
            ("stand the # likeliest ones", chat.likeliest.__defaults__[0]),
            ("keeps a λ, up to #, beside", chat.MOST - 1),
        ],
        "docs/differences.md": [
            ("G = # preferences per step", math.gcd(8, int(batch))),
            ("vertex with probability #", dpo.vertex_share),
            ("the reference gives at least # (", train_dpo.LEAST),
            ("kl_coeff is # on the embedded world", kl_coeff),
            ("(learning rate #), not a second", ppo.critic_lr),
            ("`--orth_coeff`, default #", dpo.orth_coeff),
            ("with lora_scaling = # as", dpo.lora_scaling),
            ("**β** = # and learning rate # (DPO #) on the embedded world; Table 2's # with # (# below width #)",
             (beta, rate, dpo_rate, file_beta, large_rate, small_rate, width)),
            ("until they hold # k pairs", said("train_hqd.py", "k, # * flags.near")),
            ("k / # pairs and a # of the steps", (said("train_hqd.py", "flags.near // #"),
                                                  1 / said("train_hqd.py", "flags.steps // #"))),
            ("(distinct 4-grams < #), has fewer than # tokens", loop),
        ],
        "docs/log.md": [
            ("# rows of # responses, # a step, # steps and × # are the default",
             (dpo.rows, dpo.responses, batch, steps, faster)),
            ("then # on all responses to # prompts with the listed mass: train_base.py | # | # |",
             (base["flags"]["whole_steps"], base["flags"]["whole_batch"], known["kl_data_to_base"],
              known["outside_mass"])),
            ("With # in four (`--batch_size # --minibatch #`)", (ppo.batch_size, ppo.batch_size, ppo.batch_size / 4)),
            ("# rollouts with GRPO are the default", ppo.steps),
        ],
        "docs/metrics.md": [
            ("lists all S = # responses", S),
            ("with the score −# on every dimension", bad),
            ("`train` (#), `validation` (#; ~ `seen` (#: ~ `new_verbs` (#:", splits),
            ("on the split `base` (#)", prompts["base"]),
            ("are over the # drawn preferences", said("fronts/exact.py", "sample_preference(#, m, alpha")),
            ("(# preferences for m = 2, # for m = 3)", dense),
            ("with the reference points −# and −# of files",
             (-objective.GAIN.reference, -objective.MEAN_REWARD.reference)),
            ("of the hypervolume: −# (normalised J or score), # (accuracy), −# (normalised mean reward), −# (gain",
             (-objective.NORMALISED_J.reference, objective.ACCURACY.reference, -objective.MEAN_REWARD.reference,
              -objective.GAIN.reference)),
            ("within # nats of the base", objective.NATS),
            ("for each `kl` of #, #, #, #, # and `null`", comparison.BUDGETS[:-1]),
            ("that is left, below #)", said("fronts/exact.py", "residual < #")),
            ("(distinct 4-grams < #) or has fewer than # tokens", loop),
            ("(status #, #)", (128 + signal.SIGINT, 128 + signal.SIGTERM)),
            ("ln 2 = # for DPO", math.log(2)),
        ],
        "docs/models.md": [
            ("`sliding_window` (# where the file has none)", families._DEFAULTS["mistral"]["sliding_window"]),
        ],
        "docs/results.md": [
            ("# prompts train. ~ was on # **validation** prompts. Results are of # prompts ~ and of # prompts", splits),
            ("the # responses that the world has", S),
            ("with the score −# on every dimension", bad),
            ("reference point −#, J", -objective.NORMALISED_J.reference),
            ("on # preferences (m = 2) or # (m = 3)", dense),
            ("a convex problem in # unknowns", S),
            ("#M parameters, β = #, # steps *in all* (rewarded soups and MOD: # for each of their # specialists",
             (base["parameters"] / 1e6, beta, steps, steps / 2, 2)),
            ("have rank # + m, the others rank #", (dpo.lora_dim, dpo.lora_dim + 1)),
            ("| m = 2, # preferences", F),
            ("KL(data ‖ base), is #,", known["kl_data_to_base"]),
            ("Taking only # of the mixture's way", reproduce.SOUP_FACTOR),
            ("β = #. A step draws # prompts and one λ for each, samples # responses",
             (kl_coeff, ppo.batch_size / 16, said("train_ppo.py", "flags.samples or (#"))),
            ("one seed each, # rollouts;", reproduce.TABLES["pama"]["MGDA"][-1]),
            ("preferences, # steps |", said("train_sft.py", "flags.steps or (# if on_world")),
            ("at most # of one speech", text_rewards.MOST_IN_PART),
            ("# rollouts of #, β = #, PTX", (stories["--steps"], stories["--batch_size"], stories["--kl_coeff"])),
            ("On # held-out prompts, # samples each", (Samples.most, Samples.per_prompt)),
            ("cut at # tokens)", stories["--max_new_tokens"]),
            ("has # rollouts of # answers, # to a prompt, β = #, learning rate #",
             (chat_model.steps, chat_model.batch_size, chat_model.samples, chat_model.kl_coeff, chat_model.lr)),
            ("These are cut at # tokens", chat_model.max_new_tokens),
        ],
        "docs/scaling.md": [
            ("with # pairs of # tokens, half of each the prompt, rank # + #",
             (scaling.Flags.pairs, scaling.Flags.length, dpo.lora_dim, 2)),
            ("sustains # TFLOP/s", scaling.Flags.tflops),
            ("nf4 takes # bits", 8 * scaling.BYTES["nf4"]),
            ("its # reference responses", train_reward.N_REFERENCE),
            ("# GiB for Llama-2 7B", said("docs/scaling.md", "| llama2-7b | bf16 | no | 1 | #")),
        ],
        "docs/walkthrough.md": [
            ("k + m = # + #, the gain lora_scaling / k = #", (dpo.lora_dim, 2, dpo.lora_scaling / dpo.lora_dim)),
        ],
        "course/set1/handout.md": [
            ("holds the base model in # lines",
             round(len(read("course/gpt.py").splitlines()), -1)),
        ],
        "course/instructor.md": [
            ("(at least # for each problem)", said("course/mutants.py", "len(wrong) >= #")),
            ("That is # + # and # + # points",
             (total(1, "implement") - worth["merge"] - worth["orthogonality"],
              total(1, "think") + total(1, "experiment"),
              total(2, "implement") - worth["uneven_labels"],
              total(2, "think") - worth["why_expected"] + total(2, "experiment"))),
            ("n = 32, D = 4096, r = 10: #.", 32 * (18 * 4096 * 10 + 6 * 9)),
        ],
    }


def figures(name, text):
    """Each row of the table, wherever its phrase stands in the document; the length of the README."""
    for phrase, truth in table().get(name, ()):
        truths, places = truth if isinstance(truth, tuple) else (truth,), stated(phrase, text)
        if not places:
            yield 0, f"{phrase!r} does not stand here any more: change the table of docs/check.py"
        for place, numbers in places:
            for number, true in zip(numbers, truths, strict=True):
                if true is not None:
                    true_text = true if isinstance(true, str) else f"{true:.6g}"
                    yield place, "" if agrees(number, true) else f"{number} in {phrase!r}: it is {true_text}"
    if name == "README.md" and (n := len(text.splitlines())) > README_LINES:
        yield len(text) - 1, f"{n} lines are more than {README_LINES}"


@lru_cache
def boxes(n):
    """{problem: (points, its kind)} of the boxes of set n: implement where it is graded, experiment in the section of
    that name, else think."""
    text = read(f"course/set{n}/handout.md")
    graded = import_module(f"course.set{n}.grade").PROBLEMS
    return {m[1]: (int(m[2]), "implement" if m[1] in graded else "experiment" if "xperiment" in section else "think")
            for section, body in re.findall(r"^##? (.*)\n((?:(?!##? ).*\n)*)", text, re.M)
            for m in re.finditer(r"\*\*Problem \((\w+)\): .* \((\d+) points?\)", body)}


def total(n, kind):
    """The points of a kind of boxes of set n."""
    return sum(points for points, of in boxes(n).values() if of == kind)


def points(name, text):
    """The instructor's tables and rubrics beside the boxes of the handouts: every sum and every part."""
    if name != "course/instructor.md":
        return
    sets = [int(f.parts[1].removeprefix("set")) for f in everything() if f.match("course/set*/handout.md")]
    rows = {int(m[1]): m for m in re.finditer(r"^\| (\d+) \|.*?((?:\| \d+ ){3})\| (\d+) points \|", text, re.M)}
    for n in sets:
        true = [total(n, kind) for kind in ("implement", "think", "experiment")]
        given = [int(x) for x in re.findall(r"\d+", rows[n][2] + rows[n][3])] if n in rows else "nothing"
        yield rows[n].start() if n in rows else 0, "" if given == [*true, sum(true)] else (
            f"set {n} has {given}; its boxes have {[*true, sum(true)]} (implement, think, experiment, sum)")
        for problem, (worth, kind) in boxes(n).items():
            rubric = re.search(rf"^\*\*{problem}\*\* \((\d+): ((?:[^()]|\([^()]*\))*)\)", text, re.M)
            if kind != "implement":
                parts = [int(x) for x in re.findall(r" (\d+)(?=[,;:]|$)", rubric[2])] if rubric else []
                yield rubric.start() if rubric else 0, (
                    f"{problem} has no rubric" if not rubric else
                    f"{problem} has {rubric[1]} points here, {worth} in its box" if int(rubric[1]) != worth else
                    f"the parts of {problem}, {parts}, are not {worth}" if parts and sum(parts) != worth else "")


# ---------------------------------------------------------------------------------------------------------------------

CHECKS = {"links": links, "names": names, "commands": commands, "flags": flags, "figures": figures, "points": points}


def problems(texts):
    """(["FILE:LINE: what is wrong", …], {kind: how many were looked at}) of {name: text}."""
    wrong, counts = [], dict.fromkeys(CHECKS, 0)
    for name, text in texts.items():
        for kind, check in CHECKS.items():
            if name != OF_THE_PAST or check is links:
                for place, problem in check(name, text):
                    counts[kind] += 1
                    wrong += [f"{name}:{text.count(chr(10), 0, place) + 1}: {problem}"] if problem else []
    return wrong, counts


def run_cheap(texts):
    """Runs the commands of RUN in a copy of the repository. Yields what is wrong, and prints the seconds of each."""
    stand = {shlex.join(words) for name, text in texts.items() for _, words in calls(name, text)}
    environment = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(ROOT, Path(folder) / "copy", ignore=shutil.ignore_patterns("out", ".git", "__pycache__"))
        for written, run, seconds in RUN:
            if written not in stand:
                yield f"docs/check.py: no document has the command {written!r} that --run runs"
            began, pipe = time.monotonic(), subprocess.PIPE
            process = subprocess.Popen(run or written, shell=True, cwd=copy, env=environment, stdin=subprocess.DEVNULL,
                                       stdout=pipe, stderr=pipe, text=True, start_new_session=True)
            try:
                out, error = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)                 # the shell, and what it has started
                process.communicate()
                yield f"docs/check.py: {run or written!r} takes more than {seconds} s"
                continue
            if process.returncode:
                last = (error.strip() or out.strip() or "nothing").splitlines()[-1]
                yield f"docs/check.py: {run or written!r} ended with status {process.returncode}: {last}"
            print(f"{time.monotonic() - began:6.1f} s  {run or written}", flush=True)


def main(argv=None):
    """Prints a line for each problem and the counts. Returns 1 where there is a problem, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="besides, run the cheap commands, in a copy")
    run, texts = parser.parse_args(argv).run, documents()
    try:
        wrong, counts = problems(texts)
    except UserError as e:                                             # the table asks for what is not there any more
        print(e)
        return 1
    ran = list(run_cheap(texts)) if run else []
    print("\n".join([*wrong, *ran, f"{len(texts)} files: " + ", ".join(f"{n} {kind}" for kind, n in counts.items())
                     + f", {len(RUN) * run} commands run; {len(wrong) + len(ran)} problems"]))
    return int(bool(wrong or ran))


if __name__ == "__main__":
    sys.exit(main())
