"""flags.py - a dataclass becomes the flags of a script; what is wrong with them is one line, and exit status 2.

A script's Flags is a dataclass of its own flags that also takes in the groups below, which several scripts share.
"""
import argparse
import dataclasses
import difflib
import gc
import inspect
import os
import sys
import time
import traceback
import typing
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from runs.files import Stopped, UserError

# the flags of a training that --help shows; --help-all shows the others too
FIRST = ("pref_dim", "dims", "method", "aggregate", "beta", "kl_coeff", "init", "data", "eval_data", "prompts",
         "rewards", "steps", "out")
PLAIN = "on a GPU: no Triton kernels and no CUDA graphs, but their plain definitions"


def flag(default, text, valid=None, positional=False):
    """A dataclass field that is a command line flag.

    valid: the numbers that it takes: an integer n (at least n), "positive", "share" (0 to 1) or "not negative"; of a
    list, every entry. None, where a flag has no value yet, is always valid. positional: the flag has no dashes, and one
    value of a text, one or more of a list; "any": it may be left out.
    """
    metadata = {"help": text, "valid": valid, "positional": positional}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class RunFlags:
    """How a training runs, not what it trains."""

    out: str | None = flag(None, "run directory (default out/<what this run is>)")
    device: str = flag("auto", "cpu, cuda, or auto")
    plain: bool = flag(False, PLAIN)
    log_every: int = flag(20, "print a line every so many steps, and after the first", 1)
    save_every: int = flag(200, "write a checkpoint every so many steps", 1)
    eval: bool = flag(True, "evaluate at the end")
    overwrite: bool = flag(False, "replace the run that the directory holds")


@dataclasses.dataclass
class BaseFlags:
    """Which base model, how it is kept, and what it reads. Without --init it is the embedded world's own."""

    init: str | None = flag(None, "Hugging Face directory of the base model (default: the embedded world's)")
    size: str | None = flag(None, "size of the embedded world's base model (default tiny, which ships)")
    tokenizer: str | None = flag(
        None, "toy, gpt2, a *.tiktoken file or a directory with tokenizer.json (default: --init's)")
    template: str = flag("auto", "how the turns of a prompt become a text: hh (Human: … Assistant: …), none, a file of "
                                 "Jinja, or auto: the tokenizer's own chat template, else hh")
    system: str | None = flag(None, "a system turn in front of conversations that have none")
    max_length: int = flag(512, "tokens of prompt and response together; longer ones are cut and counted", 2)
    fields: list[str] | None = flag(None, "files of a layout that data/README.md does not list: what they call our "
                                          "fields, as prompt=question response_0=a response_1=b helpful=label")
    precision: Literal["auto", "fp32", "bf16"] = flag(
        "auto", "of the frozen base (auto: bf16 on a GPU, else fp32); what is trained is fp32 always")
    quantize: Literal["none", "int8", "nf4"] = flag(
        "none", "keep the matrices of the frozen base in 8 or 4 bits per weight: less memory, slower products")
    checkpoint: bool = flag(False, "keep only the input of each block for the backward pass and compute the rest "
                                   "again: less memory, about a third more time")


@dataclasses.dataclass
class AdapterFlags:
    """How the adapter learns (Panacea's Tables 1 and 2, where they name it)."""

    lora_dim: int = flag(8, "k, the learned rank; the whole rank is k + m, of baselines k + 1; 0: λ alone", 0)
    lora_scaling: float = flag(512.0, "the adapter's gain is lora_scaling / lora_dim (lora_dim 0: / 8)", "positive")
    lr: float | None = flag(None, "peak learning rate, then a cosine to 0 "
                                  "(default on the embedded world 2e-3, by DPO and SFT 3e-3; else 2e-4, 1e-3 below "
                                  "width 512)",
                      "positive")
    values_lr: float | None = flag(None, "learning rate of σ and s, as a multiple of --lr: they start at 0, and while "
                                         "they are small nothing reaches U and V (default 10 by DPO and SFT, else 1)",
                                   "positive")
    weight_decay: float = flag(0.05, "AdamW's, on U and V only", "not negative")
    warmup_ratio: float = flag(0.03, "share of the steps with a rising learning rate", "share")
    max_grad_norm: float = flag(1.0, "gradient clipping", "positive")
    batch_size: int = flag(8, "B: data rows per step", 1)
    steps: int | None = flag(None, "optimizer steps in all (embedded world: 240)", 1)
    seed: int = flag(0, "seed of adapter, data order, preferences and samples")


@dataclasses.dataclass
class PreferenceFlags:
    """Panacea and its baselines, rewarded soups and discrete policy solutions: dpo, sft, ppo."""

    pref_dim: int = flag(2, "m: the number of preference dimensions, the first m of the data's")
    dims: list[str] | None = flag(None, "these dimensions instead, in this order")
    method: Literal["panacea", "rs", "dps"] = flag(
        "panacea", "Panacea; rewarded soups: one model per dimension; discrete policy solutions: one per preference")
    aggregate: Literal["ls", "tche"] = flag("ls", "linear scalarisation, Σ λ_i L_i, or Tchebycheff, max_i λ_i L_i")
    ideal: list[float] | None = flag(None, "Tchebycheff: the lowest loss that each dimension can reach, −z of Eq. (7); "
                                           "RLHF: the highest reward, z (default: known on the embedded world; else 0, "
                                           "and in RLHF the highest reward so far)")
    lams_per_step: int | None = flag(None, "G: preferences per step, each with its part of the batch; 1 is the paper's "
                                           "(default for ls the greatest divisor of batch_size and of 8; for tche 1: "
                                           "its maximum is of batch means)", 1)
    vertex_share: float = flag(0.25, "share of the preferences that are vertices of the simplex; the others are drawn "
                                     "evenly from it", "share")
    dps_parts: int = flag(10, "dps: the simplex is cut into so many parts; m = 2: parts + 1 models", 1)
    lam: list[float] | None = flag(None, "dps: one model at this preference, not a lattice of them; evaluated as its "
                                         "answer to every preference")
    snapshots: int = flag(8, "adapters kept along the way, for the front's evolution", 0)


@dataclasses.dataclass
class ProcessFlags:
    """Several processes: dpo, sft, reward, ppo."""

    parallel: Literal["ddp", "fsdp"] = flag(
        "ddp", "under torchrun: a copy of the base in every process, or shares of it (it is whole where --eval reads "
               "it, and in PPO's rollouts)")


@dataclasses.dataclass
class RewardFlags:
    """What is learned from rewards of texts: ppo, hqd."""

    pref_dim: int = flag(2, "m: the number of preference dimensions, the first m of the embedded world's")
    dims: list[str] | None = flag(None, "these dimensions of the embedded world instead, in this order")
    rewards: list[str] | None = flag(None, "other rewards: names of text rewards, directories of train_reward.py "
                                           "(directory:dimension for one of several), your own functions as "
                                           "file.py:function, or, on the embedded world, its dimensions and "
                                           "concise:WORDS")
    prompt_words: int = flag(12, "stories are cut into a prompt of so many words and the rest, its response", 1)
    eos_id: int | None = flag(None, "the token that ends a response (default: the one of the chat template, else the "
                                     "tokenizer's EOS; sampling also stops at other ends that the model names)")


def check_valid(flags):
    """Raises UserError for the first flag with a number that its declaration does not allow, or that nobody means."""
    for f in dataclasses.fields(flags):
        valid, given = f.metadata.get("valid"), getattr(flags, f.name)
        for value in given if isinstance(given, list) else [given]:
            if not isinstance(value, (int, float)):
                continue
            if isinstance(valid, int) and value < valid:
                raise UserError(f"--{f.name} {value}: must be at least {valid}")
            if valid == "positive" and not 0 < value < float("inf"):
                raise UserError(f"--{f.name} {value}: must be positive")
            if valid == "share" and not 0 <= value <= 1:
                raise UserError(f"--{f.name} {value}: must be between 0 and 1")
            if valid == "not negative" and not 0 <= value < float("inf"):
                raise UserError(f"--{f.name} {value}: must not be negative")
            if not abs(value) < 2 ** 31:                               # nor NaN
                raise UserError(f"--{f.name} {value}: must be between -2^31 and 2^31")


def preferences_of(words, dims, flag="--lam"):
    """The words of --lam, or of another flag, one preference after the other: (n, m) float64. Each is m numbers in the
    order of dims, or dimension=number in any order. Raises UserError for what is none."""
    m, given = len(dims), f"{flag} " + " ".join(map(str, words))
    if not any("," in dim for dim in dims):                            # 0.3,0.7 is meant as 0.3 0.7
        words = [part for word in words for part in str(word).split(",") if part]
    pairs = [str(word).rpartition("=")[::2] for word in words]
    if unknown := [name for name, _ in pairs if name and name not in dims]:
        raise UserError(f"{given}: {unknown[0]} is none of the dimensions, {' '.join(dims)}")
    if not words or len(words) % m:
        raise UserError(f"{flag} takes {m} numbers per preference, for {' '.join(dims)}; got {len(words)}")
    numbers = []
    for each in (pairs[i:i + m] for i in range(0, len(pairs), m)):
        if any(name for name, _ in each):
            if sorted(name for name, _ in each) != sorted(dims):
                raise UserError(f"{given}: the dimensions are {' '.join(dims)}, each once")
            each = sorted(each, key=lambda pair: dims.index(pair[0]))
        numbers += [number for _, number in each]
    try:
        lams = torch.tensor([float(x) for x in numbers], dtype=torch.float64).view(-1, m)
    except ValueError:
        raise UserError(f"{given}: a preference is numbers, or dimension=number") from None
    if not ((lams >= 0).all() and ((lams.sum(1) - 1).abs() < 1e-4).all()):
        raise UserError(f"{given}: a preference is not negative and sums to 1")
    return lams / lams.sum(1, keepdim=True)


def check_lam(flags, dims):
    """Raises UserError where --lam is not one preference for --method dps."""
    if flags.lam is None:
        return
    if flags.method != "dps":
        raise UserError(f"--lam is the one preference of --method dps; {flags.method} serves all of them")
    if len(preferences_of(flags.lam, dims)) != 1:
        raise UserError(f"--lam takes {len(dims)} numbers, for {' '.join(dims)}; got {len(flags.lam)}")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind the texts, where there is one; the docstring of a script as it is."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Its errors are one line, without the dozens of flags that argparse would repeat above it."""

    def error(self, message):
        raise UserError(f"{message}; {self.prog} --help-all lists the flags")

    def refuse(self, word, before):
        """The error for a word that argparse can place nowhere. before: the words in front of it."""
        flags = self._option_string_actions
        if word.startswith("-"):
            near = difflib.get_close_matches(word.partition("=")[0], flags, 1)
            self.error(f"there is no flag {word}" + "".join(f"; {name} is the nearest" for name in near))
        last = [name for name in (word.partition("=")[0] for word in before) if name in flags][-1:]
        takes = "".join(f": {name} takes {'one value' if flags[name].nargs is None else 'none'}" for name in last)
        longer = [name for name in flags for short in last if flags[short].nargs == 0 and name.startswith(short + "_")]
        self.error(f"{word} belongs to no flag{takes}" + "".join(f"; {name} does" for name in longer[:1]))


def cli(cls, doc, argv=None):
    """Parses sys.argv into the dataclass `cls`, one `--field` for each of its fields. Raises UserError for what is no
    flag or no value of one, and for a number out of its range.

    Types come from the annotations: bool becomes --x/--no-x, Literal its choices, list[T] takes several values, and
    T | None a T. The classes that declare the fields are the groups of --help.
    """
    argv = sys.argv[1:] if argv is None else argv
    short = issubclass(cls, RunFlags) and "--help-all" not in argv
    parser = Parser(description=doc, formatter_class=HelpFormatter, add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="help", help="the flags that matter first" if short else "this text")
    parser.add_argument("--help-all", action="help", help=f"all {len(dataclasses.fields(cls))} flags")
    hints, groups = typing.get_type_hints(cls), {}
    declares = lambda f: next(c for c in reversed(cls.__mro__) if f.name in inspect.get_annotations(c))
    for f in sorted(dataclasses.fields(cls), key=lambda f: declares(f) is not cls):   # shared ones stand last
        if (place := declares(f)) not in groups:
            groups[place] = parser.add_argument_group(
                "this script" if place is cls else place.__doc__.split("\n")[0].rstrip("."))
        kind = hints[f.name]
        options = [a for a in typing.get_args(kind) if a is not type(None)]
        if type(None) in typing.get_args(kind):                                       # T | None
            kind, options = options[0], typing.get_args(options[0])
        default = f.default_factory() if f.default is dataclasses.MISSING else f.default
        hidden = short and f.name not in FIRST
        more = dict(default=default, help=argparse.SUPPRESS if hidden else f.metadata["help"])
        if kind is bool:
            more |= dict(action=argparse.BooleanOptionalAction)
        elif typing.get_origin(kind) is typing.Literal:
            more |= dict(choices=options, type=type(options[0]))
        elif typing.get_origin(kind) is list:
            more |= dict(nargs="+", type=options[0], metavar=f.name.upper())
        else:
            more |= dict(type=kind)
        if f.metadata["positional"]:
            one, several = {"any": ("?", "*")}.get(f.metadata["positional"], (None, "+"))
            groups[place].add_argument(f.name, nargs=one if kind is str else several, help=more["help"])
        else:
            groups[place].add_argument("--" + f.name, **more)
    given, rest = parser.parse_known_args(argv)
    if rest:
        parser.refuse(rest[0], argv[:argv.index(rest[0])])
    flags = cls(**vars(given))
    check_valid(flags)
    return flags


def run_main(main, cls, doc, several=False):
    """Parses the flags, runs main(flags); a UserError, or generate()'s FloatingPointError, becomes one line on stderr
    and exit status 2.

    several: the script may be started by torchrun, as several processes; then the first one alone prints. A process
    that fails ends at once: torchrun then ends the others, wherever they wait for it.
    """
    gc.freeze()             # what imports have made stays: looking at it again and again costs half a second or more
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")                       # a terminal without λ shows a ? in its place
    if rank > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    try:
        if processes > 1 and not several:
            raise UserError(f"{Path(sys.argv[0]).name} is one process: start it with python, not with torchrun")
        main(cli(cls, doc))
        if dist.is_initialized():
            dist.destroy_process_group()
    except (UserError, FloatingPointError) as e:
        if rank > 0:
            time.sleep(5)       # the first process found the same and said it: torchrun ends this one before it speaks
        print(f"error: {e}", file=sys.stderr, flush=True)
        _end(2)
    except KeyboardInterrupt as e:
        training = "overwrite" in {f.name for f in dataclasses.fields(cls)}           # evaluation and all: it goes on
        stopped = "stopped" + "; the same command goes on" * training, 130
        said, status = e.args if isinstance(e, Stopped) else stopped
        print(said, file=sys.stderr, flush=True)
        _end(status)
    except Exception:
        if not dist.is_initialized():
            raise
        time.sleep(5)           # another one failed, and this one lost its connection: only the reason is to be seen
        traceback.print_exc()
        _end(1)


def _end(status):
    """Ends this process. One of several does so without a goodbye, which could wait for those that wait for it."""
    if dist.is_initialized():
        os._exit(status)
    sys.exit(status)
