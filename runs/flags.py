"""flags.py - a dataclass becomes the flags of a script; what is wrong with them is one line, and exit status 2."""
import argparse
import dataclasses
import inspect
import os
import sys
import time
import typing
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from runs.files import UserError, read_json


def flag(default, text, **metadata):
    """A dataclass field that is a command line flag: default, help text."""
    metadata |= {"help": text}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class RunFlags:
    """Flags about how a training runs, not what it trains. Scripts' Flags inherit them."""

    out: str | None = flag(None, "run directory (default out/<what this run is>)")
    device: str = flag("auto", "cpu, cuda, or auto")
    precision: Literal["auto", "fp32", "bf16"] = flag(
        "auto", "of the frozen base (auto: bf16 on a GPU, else fp32); what is trained is fp32 always")
    quantize: Literal["none", "int8", "nf4"] = flag(
        "none", "keep the matrices of the frozen base in 8 or 4 bits a weight: less memory, slower products")
    checkpoint: bool = flag(False, "keep only the input of each block for the backward pass and compute the rest "
                                   "again: less memory, about a third more time")
    log_every: int = flag(20, "print a line every so many steps")
    save_every: int = flag(200, "write a checkpoint every so many steps")
    eval: bool = flag(True, "evaluate at the end")


def check_ranges(flags, at_least, positive=(), shares=(), not_negative=()):
    """Raises UserError for the first flag out of its range. None, where a flag has no value yet, is always in it.

    at_least: {name: lowest integer}; names of numbers that are positive, between 0 and 1, or not negative.
    """
    given = lambda names: [(name, value) for name in names if (value := getattr(flags, name)) is not None]
    for name, value in given(at_least):
        if value < at_least[name]:
            raise UserError(f"--{name} {value}: must be at least {at_least[name]}")
    for name, value in given(positive):
        if not 0 < value < float("inf"):
            raise UserError(f"--{name} {value}: must be positive")
    for name, value in given(shares):
        if not 0 <= value <= 1:
            raise UserError(f"--{name} {value}: must be between 0 and 1")
    for name, value in given(not_negative):
        if not 0 <= value < float("inf"):
            raise UserError(f"--{name} {value}: must not be negative")


def cli(cls, doc, argv=None):
    """Parses sys.argv into the dataclass `cls`, one `--field` for each of its fields.

    Types come from the annotations: bool becomes --x/--no-x, Literal its choices, list[T] takes several values, and
    T | None a T; a flag with positional=True has no dashes. `--config file.json` is read first: its keys become
    defaults, and an unknown key is an error.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--config", help="JSON file with defaults for the flags below")
    hints = typing.get_type_hints(cls)
    own = inspect.get_annotations(cls)
    for f in sorted(dataclasses.fields(cls), key=lambda f: f.name not in own):        # inherited ones stand last
        kind = hints[f.name]
        options = [a for a in typing.get_args(kind) if a is not type(None)]
        optional = type(None) in typing.get_args(kind)
        if optional and len(options) == 1:                                            # T | None
            kind, options = options[0], typing.get_args(options[0])
        default = f.default_factory() if f.default is dataclasses.MISSING else f.default
        more = dict(default=default, help=f.metadata.get("help"))
        if kind is bool:
            more |= dict(action=argparse.BooleanOptionalAction)
        elif typing.get_origin(kind) is typing.Literal:
            more |= dict(choices=options, type=type(options[0]))
        elif typing.get_origin(kind) is list:
            more |= dict(nargs="+", type=options[0], metavar=f.name.upper())
        else:
            more |= dict(type=kind)
        if f.metadata.get("positional"):
            parser.add_argument(f.name, nargs="+", help=more["help"])
        else:
            parser.add_argument("--" + f.name, **more)
    known, _ = parser.parse_known_args(argv)
    if known.config:
        preset = read_json(known.config)
        unknown = sorted(set(preset) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise UserError(f"{known.config}: unknown key {unknown[0]!r}; see --help for the flags")
        for action in parser._actions:
            if action.choices and action.dest in preset and preset[action.dest] not in action.choices:
                raise UserError(f"{known.config}: {action.dest} is {preset[action.dest]!r}; choose among "
                                f"{', '.join(map(str, action.choices))}")
        parser.set_defaults(**preset)
    args = vars(parser.parse_args(argv))
    args.pop("config")
    return cls(**args)


def run_main(main, cls, doc, several=False):
    """Parses the flags, runs main(flags); a UserError becomes one line on stderr and exit status 2.

    several: the script may be started by torchrun, as several processes; then the first one alone prints.
    """
    rank = int(os.environ.get("RANK", 0))
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not several:
            raise UserError(f"{Path(sys.argv[0]).name} is one process: start it with python, not with torchrun")
        main(cli(cls, doc))
    except UserError as e:
        if rank > 0:
            time.sleep(5)       # the first process found the same and said it: torchrun ends this one before it speaks
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
