"""common.py - what every script needs once: flags from a dataclass, run directories, randomness, checkpoints, logs.

Nothing here belongs to one paper. Randomness: step t of a run draws everything from its own generator, seeded by
(seed, stream, t), so a resumed run needs no stored random state and continues bit for bit.
"""
import argparse
import dataclasses
import hashlib
import json
import math
import os
import sys
import time
import typing
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent


class UserError(Exception):
    """Bad input. Its message is one line: what is wrong, where, and what to do; scripts print it and exit with 2."""


# ---------------------------------------------------------------------------------------------------------------------
# Flags.

def flag(default, text, **metadata):
    """A dataclass field that is a command line flag: default, help text."""
    metadata |= {"help": text}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def cli(cls, doc, argv=None):
    """Parses sys.argv into the dataclass `cls`, one `--field` for each of its fields.

    Types come from the annotations: bool becomes --x/--no-x, Literal its choices, list[T] takes several values, and
    T | None a T; a flag with positional=True has no dashes. `--config file.json` is read first: its keys become
    defaults, and an unknown key is an error.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--config", help="JSON file with defaults for the flags below")
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
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


def run_main(main, cls, doc):
    """Parses the flags, runs main(flags); a UserError becomes one line on stderr and exit status 2."""
    try:
        main(cli(cls, doc))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


# ---------------------------------------------------------------------------------------------------------------------
# Files: written whole or not at all.

def write_whole(path, write):
    """Calls write(temporary path), then renames it to `path`: a killed run leaves the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        os.chmod(temporary, 0o644)                          # safetensors writes 0600
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Writes `value` as JSON, whole or not at all."""
    text = json.dumps(value, indent=1, allow_nan=False)
    write_whole(path, lambda f: Path(f).write_text(text + "\n"))


def read_json(path):
    """Reads a JSON file. Raises UserError where there is none or it does not parse."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not JSON: {e}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Device, randomness, schedule.

def pick_device(name):
    """"auto" is CUDA where there is a GPU. Returns (torch.device, dtype of the frozen base: bf16 on CUDA)."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name}: {str(e).splitlines()[0]}") from None
    return device, torch.bfloat16 if device.type == "cuda" else torch.float32


def generator_for(seed, stream, step=0):
    """A CPU generator of its own for (seed, stream, step); stream names what it is for ("lambda", "batch", …)."""
    # hashed to 32 bits: that is all torch's CPU generator looks at, and step << 32 would be the same seed every step
    digest = hashlib.sha256(f"{seed}/{stream}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def learning_rate(step, steps, peak, warmup_ratio):
    """Linear warm-up over warmup_ratio · steps, then a cosine from peak to 0. step counts from 0."""
    warmup = max(1, round(warmup_ratio * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def epoch_batch(n, size, seed, step):
    """The indices of batch number `step` when n items are shuffled anew each epoch and cut into batches of `size`;
    a batch may straddle two epochs. Returns (size,) int64."""
    first, last = step * size // n, ((step + 1) * size - 1) // n
    order = torch.cat([torch.randperm(n, generator=generator_for(seed, "epoch", e)) for e in range(first, last + 1)])
    return order[step * size - first * n:][:size]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: parameters and optimizer in one safetensors file; nothing is pickled.

def save_state(path, named_parameters, *optimizers, **header):
    """Writes all trainable parameters, the optimizers' states and `header` (JSON values, the step among them)."""
    tensors = {f"param.{name}": p.detach().cpu().contiguous() for name, p in named_parameters}
    for o, optimizer in enumerate(optimizers):
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{o}.{i}.{key}": torch.as_tensor(value).cpu().contiguous()
                        for key, value in state.items()}
    write_whole(path, lambda f: save_file(tensors, f, metadata={"state": json.dumps(header)}))


def read_state_header(path):
    """The header of a state file, or None where there is none."""
    if not Path(path).exists():
        return None
    try:
        with safe_open(path, framework="pt") as f:
            return json.loads(f.metadata()["state"])
    except (SafetensorError, KeyError, TypeError):
        raise UserError(f"{path} is not a state file; delete it to start afresh") from None


@torch.no_grad()
def load_state(path, named_parameters, *optimizers):
    """Restores what save_state wrote, in place."""
    states = [{} for _ in optimizers]
    with safe_open(path, framework="pt") as f:
        for name, p in named_parameters:
            p.copy_(f.get_tensor(f"param.{name}"))
        for key in f.keys():
            if key.startswith("optimizer."):
                _, o, i, name = key.split(".")
                states[int(o)].setdefault(int(i), {})[name] = f.get_tensor(key)
    for optimizer, state in zip(optimizers, states):
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


# ---------------------------------------------------------------------------------------------------------------------
# Run directories.

def run_name(parts, flags, named):
    """out/<parts joined by dashes>, followed by every flag that is not at its default and not among `named`."""
    named = named | {"dims", "pref_dim", "seed", "out", "device", "log_every", "save_every", "snapshots", "eval"}
    parts = list(parts)
    for f in dataclasses.fields(flags):
        value, default = getattr(flags, f.name), f.default
        if f.name not in named and value != default:
            parts.append(f"{f.name}{Path(value).name if isinstance(value, str) else value}")
    return "out/" + "-".join(parts).replace(" ", "").replace("/", "_")


def prepare_run(out, config):
    """Makes the run directory. Returns the header of the state to resume from, or None for a fresh start.

    Raises UserError for a directory that holds something else than a run of this script.
    """
    if out.exists() and any(out.iterdir()) and not ((out / "config.json").exists() and
                                                    read_json(out / "config.json").get("script") == config["script"]):
        raise UserError(f"{out} exists and holds no run of {config['script']}: choose another --out, or empty it")
    state = read_state_header(out / "state.safetensors")
    if state is not None:
        before = read_json(out / "config.json")
        changed = [k for k, v in config["flags"].items()
                   if before["flags"].get(k) != v and k not in ("log_every", "eval", "out", "device")]
        if changed or before["fingerprint"] != config["fingerprint"]:
            print(f"{out} holds an unfinished run with other {', '.join(changed) or 'base weights'}: starting afresh")
            (out / "state.safetensors").unlink()
            state = None
    if state is None:
        for old in [*out.glob("*.json*"), *out.glob("*.safetensors"), *out.glob("*.png"), *out.glob("snapshots/*")]:
            old.unlink()                                               # what an earlier run left: nothing is mixed
    else:
        at = state["member"], state["step"]
        truncate_log(out / "metrics.jsonl", lambda record: (record["member"], record["step"]) <= at)
        print(f"{out}: continuing after step {state['step']} of model {state['member'] + 1}")
    write_json(out / "config.json", config)
    return state


# ---------------------------------------------------------------------------------------------------------------------
# The log: metrics.jsonl, a progress bar, and one line a step that grep can read.

class Log:
    """Appends one JSON object a step to metrics.jsonl and prints it as a line every `every` steps, above the bar."""

    def __init__(self, path, steps, first_step=0, every=1, desc=""):
        self.path, self.every, self.started, self.steps = Path(path), every, time.time(), steps
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.bar = tqdm(total=steps, initial=first_step, desc=desc, disable=None, dynamic_ncols=True)

    def step(self, record, line):
        """record: {"step": …, …} for the file; line: the same for people."""
        with self.path.open("a") as f:
            f.write(json.dumps(record) + "\n")
        if record["step"] % self.every == 0 or record["step"] == self.steps:
            self.bar.write(line)
        self.bar.update()

    def close(self):
        """Ends the bar; returns the seconds since the log was opened."""
        self.bar.close()
        return time.time() - self.started


def truncate_log(path, keep):
    """Drops the records of metrics.jsonl for which keep(record) is false, and a last line that was cut short."""
    lines = []
    for line in Path(path).read_text().splitlines() if Path(path).exists() else []:
        try:
            if keep(json.loads(line)):
                lines.append(line)
        except json.JSONDecodeError:
            break                                           # the line that was being written when the run was killed
    write_whole(path, lambda f: Path(f).write_text("".join(line + "\n" for line in lines)))


def versions():
    """The versions a run depends on, for config.json."""
    return {"python": sys.version.split()[0], "torch": torch.__version__}
