"""running.py - how tests run the scripts: in this process, in a small world, with a small base model and few steps.

Everything trained goes through the command line's parser, so that flags are checked as a user's are.
"""
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train_base
import train_hqd
import train_ppo
import train_reward
from data import base, toy
from model import SIZES
from runs import loop
from runs.directory import LOCKS
from runs.flags import cli, run_main
from runs.loop import Log

ROOT, SHARED = Path(__file__).parents[1], Path(__file__).parents[2] / "shared"
BASE = "out/base-tiny-seed0"
ELSEWHERE = dict(init="out/base-of-no-world", tokenizer="toy")        # the same, for processes in whose world it is not

# flags that make a run of a second; beside them constants of the scripts
COMMON = dict(device="cpu", eval=False, log_every=1)
SMALL = {
    "train_dpo": dict(steps=4, rows=24, responses=4, batch_size=4, lams_per_step=4, snapshots=2, keep=0.0,
                      values_lr=1.0),
    "train_sft": dict(steps=4, rows=16, responses=2, batch_size=4, snapshots=2),
    "train_ppo": dict(steps=3, batch_size=8, samples=4, minibatch=8, kl_coeff=0.2, max_new_tokens=24, snapshots=2,
                      estimator="gae"),
    "train_hqd": dict(pool=400, near=12, steps=4, steps2=3, batch_size=3, parts=2, samples2=3, max_new_tokens=24,
                      save_every=1),
    "train_base": {},
    "train_reward": dict(rows=24, responses=4, batch_size=4, steps=20, max_new_tokens=8, reward_scale=[1.0, 5.0])}
CONSTANTS = {train_hqd: dict(MOST_PROMPTS=10), train_ppo: dict(REFERENCE_SAMPLES=16),
             train_reward: dict(EVAL_ROWS=4, N_REFERENCE=12)}
USUAL = {(module, name): getattr(module, name) for module, constants in CONSTANTS.items() for name in constants}


@contextmanager
def small_world():
    """The embedded world with 20 train prompts, 4 of each evaluation split, and 8 responses to each; instead of the
    base model that ships, the one of make_base. Within another: no change."""
    if toy.N_RESPONSES == 8:
        yield
        return
    prompts, probs, every = toy.prompts, toy.base_probs, dict(train=8, base=8)
    slots = dict(OPENINGS=("plain", "formal"), BODIES=("hint", "refuse"), CAUTIONS=("none",),
                 CLOSINGS=("none", "cheer"))
    with pytest.MonkeyPatch.context() as patch:
        for name, kept in slots.items():
            patch.setattr(toy, name, {key: getattr(toy, name)[key] for key in kept})
        patch.setattr(toy, "N_RESPONSES", math.prod(map(len, slots.values())))
        patch.setattr(toy, "prompts", lambda split: prompts(split)[::every.get(split, 10)])
        patch.setattr(toy, "base_probs", lambda prompt: probs(prompt) / probs(prompt).sum())
        patch.setattr(base, "SHIPPED", Path(BASE))
        forget = lambda: [f.cache_clear() for f in (toy._responses, toy._scores, base.world_fingerprint)]
        forget()
        yield
    forget()


@contextmanager
def inside(cwd):
    """The small world, and the working directory `cwd`."""
    before = os.getcwd()
    os.chdir(cwd)
    try:
        with small_world():
            yield
    finally:
        os.chdir(before)


def make_base():
    """Trains a base model of two layers that knows the small world: mass 0.9 on the listed responses."""
    small = replace(SIZES["tiny"], n_layer=2, d_model=64, n_head=2, n_kv_head=2, head_dim=32, d_ff=256)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_base, "SIZES", {"tiny": small})
        train_base.main(train_base.Flags(steps=100, batch_size=4, whole_steps=10, lr=6e-3, device="cpu", out=BASE))
    shutil.copytree(BASE, ELSEWHERE["init"], ignore=shutil.ignore_patterns("base.json"))


def words(flags):
    """Flags as a command line: {"steps": 4, "eval": False, "dims": ["a", "b"], "lr": None} -> ["--steps", "4",
    "--no-eval", "--dims", "a", "b"]"""
    out = []
    for name, value in flags.items():
        if isinstance(value, bool):
            out.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            out += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return out


def go(script, name, **flags):
    """Trains out/<name> with a script's small flags and these; returns its directory as an absolute path."""
    module = importlib.import_module(script)
    with pytest.MonkeyPatch.context() as patch:
        for (target, constant), usual in USUAL.items():
            if getattr(target, constant) == usual:                     # where a test has set its own, that stays
                patch.setattr(target, constant, CONSTANTS[target][constant])
        common = {k: v for k, v in COMMON.items() if k != "eval" or script != "train_base"}
        argv = words(common | SMALL[script] | flags | {"out": f"out/{name}"})
        return Path(module.main(cli(module.Flags, "", argv))).resolve()


def gradients(script, name, **flags):
    """Trains out/<name>; the gradient of every optimizer step, before it is clipped: (steps, parameters) float64."""
    seen, reduce = [], loop.reduce_gradients

    def keep(parameters):
        reduce(parameters)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        seen.append(torch.cat([grad.double().flatten() for grad in grads]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "reduce_gradients", keep)
        go(script, name, **flags)
    return torch.stack(seen)


def epoch_and_whole(script, models, **flags):
    """What 20 rows teach at the base model: the mean gradient over an epoch of 5 batches, and that of all rows at once,
    (models, parameters) each; and what the steps of the first logged. The learning rate leaves the model where it is.
    """
    flags = dict(init=BASE, lr=1e-9) | flags
    few = gradients(script, f"few-{script}", batch_size=4, steps=5 * models, **flags)
    whole = gradients(script, f"whole-{script}", batch_size=20, steps=models, **flags)
    return few.view(models, 5, -1).mean(1), whole, metrics(Path(f"out/few-{script}"))


def one_label_in_twenty(path):
    """A file of 20 preference rows that all have a label for helpful; one of them has one for harmless."""
    return write_rows(path, [
        {"prompt": f"How do I clean a bicycle{' and a car' * (i % 4)}?", "response_0": "First look at every part.",
         "response_1": "I will not help with that.",
         "better": {"helpful": i % 3 % 2} | ({"harmless": 0} if i == 7 else {})} for i in range(20)])


def command(script, *argv, cwd, status=0):
    """Runs a script of the project as a user does; returns the finished process, whose exit status must be `status`."""
    done = subprocess.run([sys.executable, str(ROOT / f"{script}.py"), *map(str, argv)], cwd=cwd, capture_output=True,
                          text=True)
    assert done.returncode == status, f"{argv}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done


def refused(script, flags, text, monkeypatch, capsys, **run):
    """Asserts that the script, called with these flags in this directory, says `text` in one line, exits with 2, and
    writes nothing."""
    module, before = importlib.import_module(script), sorted(Path("out").rglob("*"))
    argv = words(COMMON | SMALL.get(script, {}) | {"out": "out/bad"} | flags)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *argv])
    with pytest.raises(SystemExit) as end:
        run_main(module.main, module.Flags, "", **run)
    error = capsys.readouterr().err
    assert end.value.code == 2 and text in error and error.count("\n") == 1 and error.startswith("error: "), error
    assert sorted(Path("out").rglob("*")) == before


class Killed(Exception):
    """Ends a training in the middle, as a kill does: nothing is cleaned up."""


@contextmanager
def killing(when):
    """Within it a training ends when the record of a step for which when(record) holds is in its log."""
    step = Log.step

    def stop(log, record, line):
        step(log, record, line)
        if when(record):
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Log, "step", stop)
        yield
    let_go()


def let_go():
    """What the system does for a process that was killed: its locks are free."""
    for file in LOCKS.values():
        file.close()
    LOCKS.clear()


def killed(script, name, when, **flags):
    """Trains out/<name> so far as killing() lets it. Returns its directory."""
    with killing(when):
        go(script, name, **flags)
    run = Path(f"out/{name}").resolve()
    assert not (run / "timing.json").exists()
    return run


def read(*parts):
    """The JSON file at this path."""
    return json.loads(Path(*parts).read_text())


def metrics(run):
    """The records of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def timeless(run):
    """The same without what the clock decides."""
    return [{k: v for k, v in record.items() if "second" not in k} for record in metrics(run)]


def write_rows(path, rows):
    """Writes a JSONL file; returns its path as a string."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def own_rows(path, n):
    """A file with n preference rows in the project's own schema; every third has no label for harmless."""
    return write_rows(path, [
        {"prompt": f"How do I clean a bicycle number {i}?", "response_0": "First look at every part.",
         "response_1": "I will not help with that.",
         "better": {"helpful": i % 2} | ({"harmless": (i // 2) % 2} if i % 3 else {})} for i in range(n)])
