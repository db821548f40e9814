"""directory.py - run directories: their names, what config.json says, the state that a killed run goes on from, and how
a run ends. state.safetensors holds all trainable parameters and the optimizers' states, and in its header the step and
the model it belongs to; nothing is pickled.

Nothing is lost: wherever a run is killed, the same command goes on, or begins again where there is nothing yet to go on
from. --overwrite alone replaces what another command made.
"""
import dataclasses
import hashlib
import json
import os
import re
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from runs.files import (
    UserError,
    digest,
    file_name,
    left_over,
    named,
    read_json,
    read_lines,
    write_json,
    write_text,
    write_whole,
    writing,
)
from runs.processes import barrier, ranks
from runs.speed import report_speed
from svd_lora import fingerprint

# flags that change nothing of what is trained, but for the last bits
UNTRAINED = {"out", "device", "plain", "log_every", "save_every", "snapshots", "eval", "checkpoint", "parallel",
             "overwrite"}
FILES = ("data", "eval_data", "prompts")    # flags that name files
NAMED = {*FILES, "rewards", "init", "tokenizer", "template"}       # what is in what they name is compared, not the name
TRAINED = "trained"             # open_run's answer, in the place of a state, where nothing is left to train
# of what kind config.json's values are, and those of its flags; a script may have no value for what may be None
NONE = type(None)
CONFIG = {"script": str, "flags": dict, "dims": list, "base": str, "tokenizer": str, "fingerprint": str,
          "day": str | NONE, "method": str | NONE, "label": str | NONE, "models": int | NONE, "objective": dict | NONE,
          "rewards": dict | NONE, "prompts": list | NONE}
FLAGS = {"steps": int, "seed": int, "batch_size": int, "max_length": int, "precision": str | NONE,
         "quantize": str | NONE, "template": str | NONE, "system": str | NONE, "eos_id": int | NONE,
         "fields": list | NONE, "data": list | NONE, "eval_data": list | NONE, "prompt_words": int | NONE,
         "max_new_tokens": int | NONE}
LOCKS = {}                      # run directory -> its lock file, open as long as this process trains in it
# methods as tables and pictures call them
LABELS = {"panacea": "Panacea", "rs": "Rewarded soups", "dps": "Discrete policy solutions", "prompt": "Prompted λ",
          "pama": "PAMA", "mgda": "MGDA"}


def run_name(parts, flags, named):
    """out/<parts joined by dashes>, followed by every flag that is not at its default and not among `named`. What such
    a name cannot tell apart (folders of a path, capitals, lists, whatever is too long), a hash at its end does."""
    given = {f.name: getattr(flags, f.name) for f in dataclasses.fields(flags)
             if f.name not in UNTRAINED | {"dims", "pref_dim"} and getattr(flags, f.name) != f.default}
    words = [*parts, *(f"{name}={Path(value).name if isinstance(value, str) else value}"
                       for name, value in given.items() if name not in named)]
    name = re.sub(r"[^a-z0-9_.=-]+", "_", "-".join(words).lower())
    plain = all(re.fullmatch(r"[a-z0-9_.=]+", word) for word in words) and not any("=" in part for part in parts)
    if plain and not NAMED & set(given) and len(name) <= 150:
        return f"out/{name}"
    return f"out/{name[:140]}-{digest([words, given])}"


def adapter_file(out, name):
    """The file of a run's adapter, which may be called as a dimension is: by any text."""
    return out / f"{file_name(name)}.safetensors"


def run_directory(parts, named, given, flags, dims):
    """The run directory: --out, or the name that run_name makes of parts, dims and `given` flags."""
    return Path(flags.out or run_name([*parts, *dims], given, named))


def open_run(script, out, flags, dims, model, base, tokenizer, method=None, done="timing.json", **more):
    """Makes the run directory `out` and its config.json. Returns what prepare_run returns.

    done: the file whose presence means that the training has ended   more: what only some scripts say there: label
    (default: as the method is called), models, rewards, …, and objective, {"name", "beta", "aggregate", "ideal"}: what
    the run optimises, and fronts/objective.py knows what it means.
    """
    values = dataclasses.asdict(flags)
    config = {"script": script, "flags": values, "dims": list(dims), "base": str(base), "tokenizer": tokenizer.name,
              "day": tokenizer.template.day, "fingerprint": fingerprint(model),
              "content": contents(values, tokenizer.name),
              "python": sys.version.split()[0], "torch": torch.__version__, "method": method,
              "label": LABELS.get(method), **more}
    # whole paths, so that an evaluation finds them from anywhere
    for place, name in ((values, "data"), (values, "eval_data"), (values, "prompts"), (config, "prompts")):
        if place.get(name):
            place[name] = [whole_path(file) for file in place[name]]
    if os.path.isfile(values.get("template") or ""):
        values["template"] = str(Path(values["template"]).resolve())
    if "rewards" in config:
        config["rewards"] = more["rewards"] | {"names": list(map(absolute, more["rewards"]["names"]))}
    return prepare_run(out, config, flags.overwrite, done=done)


def read_config(run):
    """config.json of a run directory. Raises UserError where there is none, and where a value is of another kind than a
    training writes."""
    if not (run / "config.json").exists():
        raise UserError(f"{run} is no run; python eval_front.py --list shows those in out/")
    config = read_json(run / "config.json")
    for kinds, values in ((CONFIG, config), (FLAGS, config.get("flags"))):
        for key, kind in kinds.items():
            if not isinstance(values.get(key), kind):
                raise UserError(f"{run}/config.json: {key} cannot be {json.dumps(values.get(key))[:60]}; the training "
                                f"wrote something else there, or an older version wrote it: train the run again")
    texts = [*config["dims"], *(x for key in ("fields", "data", "eval_data") for x in config["flags"].get(key) or ())]
    if not all(isinstance(x, str) for x in [*texts, *(config.get("prompts") or ())]):
        raise UserError(f"{run}/config.json: dims, prompts, data, eval_data and fields are lists of texts")
    if config["flags"]["batch_size"] < 1 or config["flags"]["max_length"] < 2:
        raise UserError(f"{run}/config.json: no training has this batch_size and max_length")
    return config


def check_ended(run):
    """Raises UserError for a run whose training has not ended."""
    if not (run / "timing.json").exists():
        raise UserError(f"{run}: the training has not ended; run its command again to resume it")


def prepare_run(out, config, overwrite=False, file="config.json", done="timing.json"):
    """open_run without a name; the config is written into out/file. Returns the header of the state to resume from,
    None for a fresh start, or TRAINED. Raises UserError for a directory that holds something else than a run of this
    script, for one with another run, unless that is to be overwritten, and where another process is at work."""
    state = lambda: TRAINED if (out / done).exists() else read_state_header(out / "state.safetensors")
    if ranks()[0] > 0:                                                 # the first process sees to it, below
        barrier()
        return state()
    with writing(out):
        there = out.exists() and any(f.name[0] != "." for f in out.iterdir())
    before = read_json(out / file) if there and (out / file).exists() else {}
    if there and before.get("script") != config["script"]:
        raise UserError(f"{out} exists and holds no run of {config['script']}: choose another --out, or empty it")
    if there and not overwrite and (other := differences(before, config)):
        raise UserError(f"{out} holds a run with {'; '.join(other)}: choose another --out, or replace it (--overwrite)")
    for f in out.rglob(".*"):
        if left_over(f.name):
            f.unlink(missing_ok=True)
    if (out / done).exists() and not overwrite:
        print(f"{out}: its training has ended before; --overwrite trains it anew")
        barrier()
        return TRAINED
    lock(out)
    resume = None if overwrite else state()
    if resume is None:
        clear(out, file, done)
    else:
        at = resume["member"], resume["step"]
        truncate_log(out / "metrics.jsonl", lambda record: (record["member"], record["step"]) <= at)
        of = f" of model {at[0] + 1}" if at[0] > 0 or (config.get("models") or 1) > 1 else ""
        print(f"{out}: continuing after step {at[1]}{of}")
    write_json(out / file, config)
    barrier()
    return resume


def clear(out, file, done):
    """Removes what an earlier run left, so that nothing is mixed; first what would let it pass for a whole one."""
    names = "*.json*", "*.safetensors", "*.png", "snapshots/*", "mod*/*", "weights-*/*", "validation/**/*"
    old = [f for name in names for f in out.glob(name) if f.is_file() and f.name[0] != "." and f != out / file]
    for f in sorted(old, key=lambda f: f not in (out / done, out / "state.safetensors")):
        f.unlink(missing_ok=True)


def differences(before, config):
    """What makes the run of a stored config another one than `config` describes: a list of texts, [] for the same."""
    said = lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value)
    flags, aside = before["flags"], UNTRAINED | NAMED | {"dims", "pref_dim"}
    other = [f"--{name} {said(flags.get(name))}, not {said(value)}" for name, value in config["flags"].items()
             if name not in aside and flags.get(name) != value]
    if before.get("dims") != config.get("dims"):
        other.append(f"the dimensions {said(before.get('dims'))}, not {said(config.get('dims'))}")
    known, here = before.get("content", {}), config.get("content", {})
    other += [f"other content of --{name}" for name in here if known.get(name) != here[name]]
    return other + [text for key, text in (("fingerprint", "other base weights"), ("world", "another world"))
                    if before.get(key) != config.get(key)]


def reward_run(name):
    """A name of --rewards, directory, directory:dimension or file.py:function -> (the run of train_reward.py or the
    file, what stands behind it)."""
    for path, rest in ((name, ""), name.rpartition(":")[::2]):
        if path and os.path.exists(Path(path) / "reward.json") or path.endswith(".py") and os.path.isfile(path):
            return Path(path), rest
    return None, name


def absolute(name):
    """A name of --rewards by its whole path, so that an evaluation finds it from anywhere."""
    run, rest = reward_run(name)
    return name if run is None else f"{run.resolve()}{rest and ':' + rest}"


def whole_path(file):
    """FILE, or dimension=FILE, by its whole path."""
    name, file = named(file)
    return f"{name}=" * (name is not None) + str(Path(file).resolve())


def content(path):
    """A hash of a file, or of a tokenizer's or a reward model's files in a directory; of another name, the name."""
    path = Path(path)
    if os.path.isfile(path):                                           # pathlib's raises where a name is too long
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()[:16]
    files = [path / f for f in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "reward.json",
                                "adapter.safetensors", "heads.safetensors")]
    return digest([content(f) for f in files if f.exists()]) if os.path.isdir(path) else str(path)


def contents(flags, tokenizer):
    """What is in all that a run reads, hashed: {flag: a list}. flags: a dict"""
    read = {name: [[dim, content(file)] for dim, file in map(named, flags.get(name) or [])] for name in FILES}
    rewards = [[content(run) if run else None, rest] for run, rest in map(reward_run, flags.get("rewards") or [])]
    return read | {"rewards": rewards, "tokenizer": [content(x) for x in (tokenizer, flags.get("template", ""))]}


def lock(out):
    """Makes the directory, for this process alone until it ends, however it ends: the system holds the lock. Raises
    UserError where another process has it."""
    path = (out / ".lock").resolve()
    if path in LOCKS:
        return
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    try:
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:                                            # Windows
            import msvcrt
            file.seek(1000)                                            # behind the number, which stays readable
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise UserError(f"{out}: process {file.read() or '?'} is at work there; wait for its end, or choose another "
                        f"--out") from None
    except (ImportError, OSError):
        pass                                                           # a system, or a file system, without locks
    LOCKS[path] = file
    with writing(path):
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()


def steps_each(flags, models):
    """The optimizer steps of each model of a run: they share --steps evenly. Raises UserError for fewer than one."""
    if flags.steps < len(models):
        raise UserError(f"--steps {flags.steps} are shared by {len(models)} models of method {flags.method}")
    return flags.steps // len(models)


def models_left(models, resume, first=0):
    """Yields (number, model, the state to resume from or None) for those models of a run that are still to be trained.
    models: a list of anything   resume: what prepare_run returned   first: the number of models[0] in the run"""
    killed = resume["member"] if resume else first                     # the model that was being trained
    for i, model in enumerate(models, first):
        if i >= killed:
            yield i, model, resume if i == killed else None


def end_training(out, what, device, dtype, processes=1):
    """Sums up the speed of a run whose training has ended: timing.json and one line."""
    print(f"trained {what} in {report_speed(out, device, dtype, processes):.0f} s: {out}")


def close_run(out):
    """The run is whole, evaluation and all: nothing is left to resume."""
    (out / "state.safetensors").unlink(missing_ok=True)
    if file := LOCKS.pop((out / ".lock").resolve(), None):
        file.close()
    (out / ".lock").unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# The state that a killed run goes on from.

def read_log(path):
    """(line, record) of every line of metrics.jsonl, but for a last one that was cut short; of none where there is no
    file. Raises UserError for another line that is no record of a step."""
    lines, found = read_lines(path) if Path(path).exists() else [], []
    for number, line in enumerate(lines, 1):
        try:
            record = {"member": 0} | json.loads(line)
            if not type(record["step"]) is type(record["member"]) is int:
                raise ValueError
            found.append((line, record))
        except (ValueError, KeyError, TypeError, RecursionError):
            if number < len(lines):                         # else: it was being written when the run was killed
                raise UserError(f"{path}, line {number}: damaged; remove the line, or begin anew with --overwrite"
                                ) from None
    return found


def truncate_log(path, keep):
    """Drops the records of metrics.jsonl for which keep(record) is false, and a last line that was cut short."""
    write_text(path, "".join(line + "\n" for line, record in read_log(path) if keep(record)))


def save_state(path, named_parameters, *optimizers, **header):
    """Writes all trainable parameters, the optimizers' states and `header` (JSON values, model and step among them)."""
    tensors = {f"param.{name}": p.detach().cpu().contiguous() for name, p in named_parameters}
    for o, optimizer in enumerate(optimizers):
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{o}.{i}.{key}": torch.as_tensor(value).cpu().contiguous()
                        for key, value in state.items()}
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    state = json.dumps(header | {"check": digest([header, shapes])})   # one entry: several come in any order
    write_whole(path, lambda f: save_file(tensors, f, metadata={"state": state}))


def read_state_header(path):
    """The header of a state file, or None where there is none. Raises UserError for a file that save_state has not
    written so."""
    if not Path(path).exists():
        return None
    try:
        with safe_open(path, framework="pt") as f:
            header, stored = json.loads(f.metadata()["state"]), {name: f.get_slice(name) for name in f.keys()}
            check, shapes = header.pop("check"), {name: tensor.get_shape() for name, tensor in stored.items()}
            if check != digest([header, shapes]) or {x.get_dtype() for x in stored.values()} != {"F32"}:
                raise ValueError
        return header
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError):
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
                # a copy: Windows replaces no file that is mapped
                states[int(o)].setdefault(int(i), {})[name] = f.get_tensor(key).clone()
    for optimizer, state in zip(optimizers, states):
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
