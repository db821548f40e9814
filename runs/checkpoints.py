"""checkpoints.py - parameters and optimizer in one safetensors file, state.safetensors; nothing is pickled."""
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from runs.files import UserError, write_whole


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
