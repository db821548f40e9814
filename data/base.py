"""base.py - the frozen base model that a training starts from, and its tokenizer."""
import hashlib
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

from data import toy
from data.tokenizers import load_tokenizer
from model import Transformer
from ops import fused
from runs.files import ROOT, UserError, read_json
from runs.processes import first_alone

SHIPPED = ROOT / "data" / "base"        # made by  python train_base.py --out data/base


def find_base(init, size, tokenizer, device):
    """The base model's directory and its tokenizer's name, from the flags --init, --size and --tokenizer.

    Without --init it is the embedded world's own: the tiny one ships with the code, another --size is made by
    train_base.py if it is not there.
    """
    if init is None and size is None and device.type == "cuda":
        print("the base model is the tiny one; --size 125m trains one of GPT-2's size")
    base = init or (SHIPPED if size in (None, "tiny") else first_alone(lambda: _world_base(size, str(device))))
    base = str(Path(base).resolve())                                   # a run finds it again from anywhere
    return base, tokenizer or ("toy" if is_world_base(base) else base)


@lru_cache
def world_fingerprint():
    """A short hash of the embedded world: every prompt with its split, its responses, and their scores to 6 digits."""
    digest = hashlib.sha256()
    for prompt, split in {x: split for split in toy.SPLITS for x in toy.prompts(split)}.items():
        texts = toy.responses(prompt)
        digest.update("\n".join([split, prompt, *texts]).encode())
        digest.update((toy.scores(prompt, texts) * 1e6).round().long().numpy().tobytes())
    return digest.hexdigest()[:16]


def is_world_base(path):
    """Whether train_base.py made this directory: a model that knows the embedded world and nothing else. Raises
    UserError where it knows another world than data/toy.py is now."""
    if not all(os.path.exists(Path(path) / name) for name in ("base.json", "config.json")):  # the last one comes last
        return False
    if (of := read_json(Path(path) / "base.json").get("world")) != world_fingerprint():
        raise UserError(f"{path} was made for another world than data/toy.py is now ({of}, not {world_fingerprint()}): "
                        f"make it again, python train_base.py --overwrite --out {path}")
    return True


def _world_base(size, device):
    out = f"out/base-{size}-seed0"
    if not is_world_base(out):
        command = ["train_base.py", "--size", size, "--device", device, *["--plain"] * (not fused.on("all"))]
        print(f"no base model in {out} yet: python {' '.join(command)} makes it (once)", flush=True)
        alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}    # of torchrun
        if code := subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], env=alone).returncode:
            raise UserError(f"{command[0]} ended with status {code}: there is no base model to start from")
    return out


def load_base(base, tokenizer_name, device, dtype, flags):
    """The frozen base model and its tokenizer, as a training's flags say. Raises UserError for a base of another world,
    and where the tokenizer has ids that the model has not."""
    is_world_base(base)
    model = Transformer.from_pretrained(base, dtype=dtype, device=device, quantize=flags.quantize).requires_grad_(False)
    model.checkpoint_blocks = flags.checkpoint
    tokenizer = load_tokenizer(tokenizer_name, flags.template, flags.system, getattr(flags, "eos_id", None))
    check_fit(tokenizer, model, base)
    return model, tokenizer


def check_fit(tokenizer, model, base):
    """Raises UserError where the tokenizer has ids that the model of the directory `base` has not."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, the base model {base} only "
                        f"{model.config.vocab_size}: name the model's own with --tokenizer")


def usual_rate(on_world, config):
    """The learning rate of an adapter where none is given: small models take larger steps."""
    return 2e-3 if on_world else 1e-3 if config.d_model < 512 else 2e-4
