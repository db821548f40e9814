"""directory.py - run directories: their names, what may be resumed, and what an earlier run left."""
import dataclasses
import sys
from pathlib import Path

import torch

from runs.checkpoints import read_state_header
from runs.files import UserError, read_json, write_json
from runs.log import truncate_log
from runs.processes import barrier, ranks


# flags that change nothing of what is trained, but for the last bits
UNTRAINED = {"out", "device", "log_every", "eval", "checkpoint", "compile", "parallel"}


def run_name(parts, flags, named):
    """out/<parts joined by dashes>, followed by every flag that is not at its default and not among `named`."""
    named = named | UNTRAINED | {"dims", "pref_dim", "seed", "save_every", "snapshots"}
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
    if ranks()[0] > 0:                                                 # the first process sees to it, below
        barrier()
        return read_state_header(out / "state.safetensors")
    if out.exists() and any(out.iterdir()) and not ((out / "config.json").exists() and
                                                    read_json(out / "config.json").get("script") == config["script"]):
        raise UserError(f"{out} exists and holds no run of {config['script']}: choose another --out, or empty it")
    state = read_state_header(out / "state.safetensors")
    if state is not None:
        before = read_json(out / "config.json")
        changed = [k for k, v in config["flags"].items()
                   if before["flags"].get(k) != v and k not in UNTRAINED]
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
    barrier()
    return state


def versions():
    """The versions a run depends on, for config.json."""
    return {"python": sys.version.split()[0], "torch": torch.__version__}
