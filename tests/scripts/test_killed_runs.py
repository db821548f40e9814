"""test_killed_runs.py - a run that was killed, at any point, goes on and ends in the very same files.

Most kills are exceptions within a step, after its record was written and before its checkpoint: what a kill leaves. One
is a real SIGKILL.
"""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from killing import contents, kill_everywhere
from running import BASE, COMMON, ELSEWHERE, ROOT, SMALL, Killed, go, killed, metrics, own_rows, timeless, words

import eval_front
import train_base
import train_hqd
import train_ppo
from model import Transformer
from runs.directory import read_state_header
from runs.files import UserError
from runs.loop import Run


def same_files(run, whole):
    """Asserts that two runs hold the same files with the same bytes, but for what the clock or the name decides."""
    names = lambda run: {str(f.relative_to(run)) for f in run.rglob("*") if f.is_file()}
    made = {name for name in names(run) if not name.startswith(("front.", "evolution.", "stationarity.", "samples.",
                                                                "histograms."))}
    assert made == {name for name in names(whole) if name in made} and "adapter" in " ".join(made)
    for name in made - {"timing.json", "config.json", "metrics.jsonl"}:
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    assert timeless(run) == timeless(whole)
    assert not (run / "state.safetensors").exists() and not list(run.rglob(".*"))


TINY = dict(steps=2, rows=4, responses=2, batch_size=2, lams_per_step=2, save_every=1, snapshots=1)
EVERYWHERE = {
    "dpo": ("train_dpo", TINY), "rs": ("train_dpo", TINY | dict(method="rs")),
    "dps": ("train_dpo", TINY | dict(method="dps", dps_parts=2, steps=3)),
    "prompt": ("train_dpo", TINY | dict(method="prompt")),
    "tche": ("train_dpo", TINY | dict(aggregate="tche")),
    "evaluated": ("train_dpo", TINY | dict(eval=True)),
    "sft": ("train_sft", dict(steps=2, rows=4, responses=1, batch_size=2, save_every=1, snapshots=1)),
    "ppo": ("train_ppo", dict(steps=2, save_every=1, snapshots=1)), "hqd": ("train_hqd", dict(steps=2, steps2=1)),
    "reward": ("train_reward", dict(steps=2, save_every=1)),
    "base": ("train_base", dict(steps=2, batch_size=2, whole_steps=2, whole_batch=2, save_every=1))}


def kills(name, script, flags):
    """killing.kill_everywhere of a script's run."""
    run = Path("out", f"everywhere-{name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_base, "SIZES", {"tiny": Transformer.from_pretrained(BASE).config})
        return kill_everywhere(lambda: go(script, run.name, **flags), run)


def test_a_kill_anywhere_loses_nothing():
    """DPO, one step. Wrong: a directory with nothing but a temporary file holds no run; what a dead process left stays.
    """
    assert kills("one step", "train_dpo", TINY | dict(steps=1, snapshots=0)) >= 20


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_kill_anywhere_loses_nothing_in_any_training(name):
    """Wrong, beside that: the log is ahead of the checkpoint and is not cut."""
    assert kills(name, *EVERYWHERE[name]) >= 25


AT = lambda member, step: lambda record: (record["member"], record["step"]) == (member, step)
LONG = dict(steps=12, method="rs", save_every=2)


@pytest.mark.parametrize("script, flags, at, since", [
    ("train_dpo", LONG, (0, 4), 2), ("train_dpo", LONG, (1, 4), 2), ("train_sft", LONG, (1, 5), 4),
    ("train_dpo", LONG | dict(method="panacea", accumulate=2, aggregate="tche", lams_per_step=2), (0, 7), 6),
    ("train_ppo", dict(steps=6, save_every=2, method="rs"), (1, 2), 3),
    ("train_ppo", dict(steps=6, save_every=2, estimator="rloo"), (0, 5), 4),
    ("train_reward", dict(save_every=4), (0, 10), 8)])
def test_it_goes_on_bit_for_bit(capsys, script, flags, at, since):
    name = f"{script}-{flags.get('method', '')}-{flags.get('aggregate', '')}"
    whole = go(script, f"{name}-whole", **flags)
    run = killed(script, f"{name}-killed{at[0]}", AT(*at), **flags)
    if script == "train_reward":
        assert not (run / "reward.json").exists()
    else:
        with pytest.raises(UserError, match="training has not ended"):                # half a run is not evaluated
            eval_front.main(eval_front.Flags(runs=[str(run)], device="cpu"))
    capsys.readouterr()
    # where no checkpoint of its own exists yet, a model goes on from the end of the one before
    assert go(script, run.name, **flags) == run
    after, member = (since, at[0]) if since < at[1] else (since, at[0] - 1)
    of = f" of model {member + 1}" if flags.get("method") == "rs" else ""
    assert f"continuing after step {after}{of}\n" in capsys.readouterr().out
    same_files(run, whole)


def test_tchebycheff_s_ideal_comes_back(monkeypatch):
    """RLHF on text rewards: z is the largest reward so far. Here rewards rise for three steps and fall ever after, so
    a run that has forgotten z would find a smaller one."""
    at, rollout, rewards_in = {}, train_ppo.rollout, train_ppo.rewards_in

    def tracked(model, rows, tokenizer, flags, draw, run):
        at["draw"] = draw
        return rollout(model, rows, tokenizer, flags, draw, run)

    def tilted(*args):
        rewards, at["draw"] = rewards_in(*args), 0                     # 0 while their mean is measured
        raw = rewards.raw
        rewards.raw = lambda *texts: raw(*texts) + 10.0 * (2 - abs(at["draw"] - 2))
        return rewards

    monkeypatch.setattr(train_ppo, "rollout", tracked)
    monkeypatch.setattr(train_ppo, "rewards_in", tilted)
    flags = dict(rewards=["length", "narrative"], aggregate="tche", steps=8, save_every=2)
    whole = go("train_ppo", "ideal-whole", **flags)
    run = killed("train_ppo", "ideal-killed", AT(0, 5), **flags)
    header, ideals = read_state_header(run / "state.safetensors"), [r["ideal"] for r in metrics(run)]
    assert header["step"] == 4 and header["kept"]["ideal"] == ideals[3]
    go("train_ppo", "ideal-killed", **flags)
    same_files(run, whole)
    ideals = np.array([r["ideal"] for r in metrics(run)])
    assert (np.diff(ideals[:3], axis=0) > 0).all() and (ideals[3:] == ideals[2]).all()
    best = np.array([r["normalised"] for r in metrics(run)])
    assert (best[4:] < ideals[4:]).all()                               # what the resumed steps alone have seen is less


@pytest.mark.parametrize("at", [(1, 0, 3), (1, 1, 2), (2, 3, 0), (2, 4, 2)])
def test_both_stages_of_hqd(hqd_run, monkeypatch, at):
    """In stage 1, in its first model and in a later one; after the answers of stage 2; within its training."""
    name = "hqd-killed-" + "-".join(map(str, at))
    run = killed("train_hqd", name, lambda r: (r["stage"], r["member"], r["step"]) == at)
    said, generate = [], train_hqd.generate_all
    monkeypatch.setattr(train_hqd, "generate_all", lambda *a, **k: said.append(1) or generate(*a, **k))
    assert go("train_hqd", name) == run
    assert bool(said) == (at != (2, 4, 2))               # answers are made once, and then read
    same_files(run, hqd_run[0])


def test_a_run_that_is_killed_in_its_evaluation_trains_nothing_again(monkeypatch, panacea, capsys):
    def stop(flags):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(eval_front, "main", stop)
        go("train_dpo", "not-evaluated", eval=True)
    capsys.readouterr()
    seen = []
    monkeypatch.setattr(eval_front, "main", lambda flags: seen.append(flags.runs))
    run = go("train_dpo", "not-evaluated", eval=True)
    assert seen == [["out/not-evaluated"]] and "step 00001" not in capsys.readouterr().out
    same_files(run, panacea)


def test_an_unfinished_run_with_other_flags_is_not_lost(work, capsys):
    """Refused with the difference, and gone on with where nothing that matters differs. Wrong: starting afresh."""
    run = killed("train_dpo", "changed", AT(0, 3), save_every=1, steps=9)
    before = (run / "state.safetensors").read_bytes()
    with pytest.raises(UserError, match="out/changed holds a run with --lr 0.003, not 0.001; --steps 9, not 4: choose"):
        go("train_dpo", "changed", save_every=1, lr=1e-3)
    assert (run / "state.safetensors").read_bytes() == before
    assert go("train_dpo", "changed", save_every=1, steps=9, log_every=3) == run
    assert "continuing after step 2" in capsys.readouterr().out and len(metrics(run)) == 9
    run = killed("train_dpo", "changed-state", AT(0, 3), save_every=1)
    (run / "state.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="state.safetensors is not a state file; delete it to start afresh"):
        go("train_dpo", "changed-state", save_every=1)


def test_other_data_in_the_same_file_is_refused(work):
    """Wrong: a comparison of file names."""
    flags = dict(init=BASE, data=["edited.jsonl"])
    own_rows("edited.jsonl", 24)
    run = go("train_dpo", "edited", **flags)
    own_rows("edited.jsonl", 25)
    with pytest.raises(UserError, match="out/edited holds a run with other content of --data: choose another"):
        go("train_dpo", "edited", **flags)
    own_rows("moved.jsonl", 24)
    assert go("train_dpo", "edited", init=BASE, data=["moved.jsonl"]) == run


RUNS = {"train_dpo": dict(method="rs", eval=True), "train_sft": {}, "train_ppo": {}, "train_hqd": {},
        "train_reward": {}, "train_base": dict(steps=2, batch_size=2, whole_steps=2, whole_batch=2)}


@pytest.mark.parametrize("script", RUNS)
def test_a_finished_run_is_shown_and_not_trained_again(work, monkeypatch, capsys, script):
    """Its tables come again, in no time; other flags are refused; --overwrite trains it anew, to the same files."""
    monkeypatch.setattr(train_base, "SIZES", {"tiny": Transformer.from_pretrained(BASE).config})
    name, flags = f"twice-{script}", RUNS[script]
    run = go(script, name, **flags)
    lines = lambda: [line for line in capsys.readouterr().out.splitlines() if "  " in line and "step" not in line[:5]]
    before, table = {f: f.stat().st_mtime_ns for f in run.rglob("*")}, lines()
    with monkeypatch.context() as patch:
        patch.setattr(Run, "steps", lambda run: pytest.fail("it is trained again"))
        assert go(script, name, **flags) == run
    assert {f: f.stat().st_mtime_ns for f in run.rglob("*")} == before
    again = lines()
    assert set(again) <= set(table) and bool(again) == (script in ("train_dpo", "train_reward", "train_base"))
    with pytest.raises(UserError, match="holds a run with --seed 0, not 1: choose another --out, or replace it"):
        go(script, name, **flags | {"seed": 1})
    if script == "train_dpo":
        was = contents(run)
        (run / "snapshots/of-another.safetensors").write_text("old")
        assert go(script, name, **flags, overwrite=True) == run
        assert contents(run) | {"config.json": 0} == was | {"config.json": 0}


def test_a_run_without_an_evaluation_is_evaluated_by_its_command(monkeypatch, panacea):
    """Whether it was killed then or had --no-eval; nothing else is done."""
    run = go("train_dpo", "late")
    monkeypatch.setattr(Run, "steps", lambda run: pytest.fail("it is trained again"))
    assert go("train_dpo", "late", eval=True) == run and (run / "front.json").exists()
    same_files(run, panacea)


def test_sigkill(work, capsys):
    """On files, since the world of another process is the whole one."""
    own_rows(work / "kill.jsonl", 24)
    flags = dict(**ELSEWHERE, data=["kill.jsonl"], steps=400, save_every=5, method="rs")
    argv = words(COMMON | SMALL["train_dpo"] | flags | {"out": "out/sigkill"})
    run = work / "out/sigkill"
    process = subprocess.Popen([sys.executable, str(ROOT / "train_dpo.py"), *argv], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while not ((run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= 12):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    header, done = read_state_header(run / "state.safetensors"), len(metrics_of_a_killed(run))
    assert header["member"] == 0 and 10 <= header["step"] <= done < 200 and not (run / "timing.json").exists()
    # it goes on as the first model of a run that is killed, in this process, 20 steps later: state against state
    at = header["step"] + 20 - header["step"] % 5
    states = []
    for name in ("sigkill", "sigkill-never"):
        states.append(killed("train_dpo", name, AT(0, at + 1), **flags) / "state.safetensors")
    assert "continuing after step" in capsys.readouterr().out
    assert read_state_header(states[0]) == read_state_header(states[1]) and header["step"] < at
    assert states[0].read_bytes() == states[1].read_bytes()
    assert timeless(run) == timeless(work / "out/sigkill-never")


def metrics_of_a_killed(run):
    """The whole lines of a metrics.jsonl whose last one may be cut short."""
    return (run / "metrics.jsonl").read_text().split("\n")[:-1]
