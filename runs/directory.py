"""directory.py - run directories: their names, what config.json says, the state that a killed run goes on from, and how
a run ends. state.safetensors holds all trainable parameters and the optimizers' states, and in its header the step and
the model it belongs to; nothing is pickled.
"""
import dataclasses
import json
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from runs.files import UserError, read_json, write_json, write_whole
from runs.processes import barrier, ranks
from runs.speed import report_speed
from svd_lora import fingerprint

# flags that change nothing of what is trained, but for the last bits
UNTRAINED = {"out", "device", "plain", "log_every", "save_every", "snapshots", "eval", "checkpoint", "parallel"}
# methods as tables and pictures call them
LABELS = {"panacea": "Panacea", "rs": "Rewarded soups", "dps": "Discrete policy solutions", "prompt": "Prompted λ",
          "pama": "PAMA", "mgda": "MGDA"}


def run_name(parts, flags, named):
    """out/<parts joined by dashes>, followed by every flag that is not at its default and not among `named`."""
    named = named | UNTRAINED | {"dims", "pref_dim", "seed"}
    parts = list(parts)
    for f in dataclasses.fields(flags):
        value, default = getattr(flags, f.name), f.default
        if f.name not in named and value != default:
            parts.append(f"{f.name}{Path(value).name[:40] if isinstance(value, str) else value}")
    return "out/" + "-".join(parts).replace(" ", "").replace("/", "_")


def open_run(script, parts, named, given, flags, dims, model, base, tokenizer, method=None, **more):
    """Makes the run directory, --out or the name that run_name makes of parts and `given` flags, and its config.json.

    more: what only some scripts say there: label (default: as the method is called), models, rewards, …, and objective,
    {"name", "beta", "aggregate", "ideal"}: what the run optimises, and fronts/objective.py knows what it means.
    Returns the directory, and the header of the state to resume from, or None for a fresh start. Raises UserError for
    a directory that holds something else than a run of this script.
    """
    out = Path(flags.out or run_name([*parts, *dims, f"seed{flags.seed}"], given, named))
    config = {"script": script, "flags": dataclasses.asdict(flags), "dims": list(dims), "base": str(base),
              "tokenizer": tokenizer, "fingerprint": fingerprint(model), "python": sys.version.split()[0],
              "torch": torch.__version__, "method": method, "label": LABELS.get(method), **more}
    return out, prepare_run(out, config)


def prepare_run(out, config):
    """open_run without a name: the header of the state to resume from, or None for a fresh start."""
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
        for old in [f for name in ("*.json*", "*.safetensors", "*.png", "snapshots/*", "mod*/*", "weights-*/*")
                    for f in out.glob(name)]:
            old.unlink()                                               # what an earlier run left: nothing is mixed
    else:
        at = state["member"], state["step"]
        truncate_log(out / "metrics.jsonl", lambda record: (record["member"], record["step"]) <= at)
        print(f"{out}: continuing after step {state['step']} of model {state['member'] + 1}")
    write_json(out / "config.json", config)
    barrier()
    return state


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


# ---------------------------------------------------------------------------------------------------------------------
# The state that a killed run goes on from.

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
