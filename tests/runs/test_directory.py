"""test_directory.py - run directories: names, what is resumed, whole files, the state of a killed run."""
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train_hqd
from runs.directory import (
    TRAINED,
    absolute,
    adapter_file,
    close_run,
    contents,
    load_state,
    models_left,
    prepare_run,
    read_state_header,
    run_name,
    save_state,
    steps_each,
    truncate_log,
)
from runs.files import UserError, read_json, write_json, write_whole
from train_dpo import Flags


def test_default_names_do_not_collide():
    def name(*files, **flags):
        return run_name(["dpo", *files, "helpful", "harmless"], Flags(**flags), {"data", "eval_data"})

    assert name() == "out/dpo-helpful-harmless"
    assert name(loss="ipo", lr=1e-3) == name() + "-lr=0.001-loss=ipo"
    assert name(out="elsewhere", log_every=7, eval=False, overwrite=True) == name()   # these do not make another run
    assert name(method="rs", seed=1) == name() + "-method=rs-seed=1"
    assert name("pku", data=["a/pku.jsonl"], init="x/llama").startswith("out/dpo-pku-helpful-harmless-init=llama-")
    names = [name(), name(seed=1), name(method="rs"), name(aggregate="tche"), name(lr=1e-3), name(lr=1e-2),
             name(steps=21), *(name("pku", data=[file], init=init) for file in ("a/pku.jsonl", "b/pku.jsonl")
                               for init in ("x/llama", "y/llama", "x/Llama", "../x/llama")),
             name("pku", data=["a/pku.jsonl"], eval_data=["a"]),
             name("pku", data=["a/pku.jsonl"], eval_data=["b"]), name(ideal=[0.1, 0.2]), name(ideal=[0.10, 0.3])]
    hqd = lambda **flags: run_name(["hqd"], train_hqd.Flags(**flags), {"data", "rewards"})
    names += [hqd(), hqd(select="all"), hqd(steps=21), hqd(steps2=1),
              hqd(rewards=["concise:12"]), hqd(rewards=["concise:10"]), hqd(stage2=False),
              run_name(["dpo", "a"], Flags(method="rs"), set()), *(run_name(["dpo", *dims], Flags(), set()) for dims in
              (("a", "method=rs"), ("a-b", "c"), ("a", "b-c"), ("A", "b"), ("a", "b"), ("a b",), ("a/b",), ("ä", "b"),
               ("..",), ("x" * 300,), ("x" * 300 + "y",)))]
    assert len({name.lower() for name in names}) == len(names)         # also where capitals are no other letters
    for each in names:                                                 # one folder of out, on every system
        assert re.fullmatch(r"out/[a-z0-9][a-z0-9_.=-]*", each) and len(each) <= 200, each


def test_file_names():
    """Any text, for itself alone, whatever the system makes of letters."""
    texts = ["helpful", "demos.helpful", "demos.humorous", "Helpful", "HELPFUL", "a/b", "a_b", "a b", "..", ".", "",
             "ä", "a" * 300, "a" * 301, "con:1", "λ"]
    names = [adapter_file(Path("run"), f"adapter-{text}").name for text in texts]
    assert len({name.lower() for name in names}) == len(texts) and max(map(len, names)) < 200
    assert all(re.fullmatch(r"adapter-[a-z0-9_.-]*\.safetensors", name) for name in names)
    assert names[:3] == ["adapter-helpful.safetensors", "adapter-demos.helpful.safetensors",
                         "adapter-demos.humorous.safetensors"]


CONFIG = {"script": "train_x.py", "flags": {"lr": 0.1, "steps": 4, "log_every": 1}, "fingerprint": "f"}


def unfinished(out, **changes):
    """A run that was killed after step 2 of its second model."""
    write_json(out / "config.json", CONFIG | changes)
    save_state(out / "state.safetensors", [("w", torch.ones(2))], step=2, member=1, kept={})
    (out / "metrics.jsonl").write_text("".join(json.dumps({"member": i, "step": s}) + "\n" for i in (0, 1)
                                               for s in (1, 2, 3)) + '{"member": 1, "st')
    (out / "front.json").write_text("{}")


def test_a_killed_run_is_resumed(tmp_path, capsys):
    unfinished(tmp_path)
    state = prepare_run(tmp_path, CONFIG | {"flags": CONFIG["flags"] | {"log_every": 7}})
    assert state == {"step": 2, "member": 1, "kept": {}}
    assert "continuing after step 2 of model 2" in capsys.readouterr().out
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()      # the step after the checkpoint is made again
    assert [(json.loads(x)["member"], json.loads(x)["step"]) for x in lines] == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)]
    assert read_json(tmp_path / "config.json")["flags"]["log_every"] == 7
    close_run(tmp_path)
    close_run(tmp_path)
    assert read_state_header(tmp_path / "state.safetensors") is None


@pytest.mark.parametrize("change, said", [
    ({"flags": CONFIG["flags"] | {"lr": 0.2}}, "--lr 0.1, not 0.2"), ({"fingerprint": "g"}, "other base weights"),
    ({"dims": ["a", "b"]}, "the dimensions None, not a b"), ({"content": {"data": ["h"]}}, "other content of --data")])
@pytest.mark.parametrize("finished", [False, True])
def test_another_run_is_not_lost(tmp_path, change, said, finished):
    """Refused in one line that names the difference, and nothing is touched; --overwrite replaces all of it."""
    unfinished(tmp_path)
    for folder in ("mod", "mod-1.5", "weights-1.5", "snapshots", "validation/mod"):
        write_json(tmp_path / folder / "front.json", {})
    if finished:
        (tmp_path / "timing.json").write_text("{}")
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    with pytest.raises(UserError) as error:
        prepare_run(tmp_path, CONFIG | change)
    assert str(error.value) == (f"{tmp_path} holds a run with {said}: choose another --out, or replace it "
                                f"(--overwrite)")
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before
    assert prepare_run(tmp_path, CONFIG | change, overwrite=True) is None
    assert sorted(f.name for f in tmp_path.rglob("*") if f.is_file()) == [".lock", "config.json"]
    assert read_json(tmp_path / "config.json") == CONFIG | change
    close_run(tmp_path)


def test_a_trained_run_is_not_trained_again(tmp_path, capsys):
    unfinished(tmp_path)
    write_json(tmp_path / "timing.json", {})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert prepare_run(tmp_path, CONFIG | {"flags": CONFIG["flags"] | {"log_every": 3}}) == TRAINED
    assert f"{tmp_path}: its training has ended before; --overwrite" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_what_is_read_is_compared_by_its_content(tmp_path, monkeypatch):
    """Bytes, not names: another path to the same is the same; an edited file is not. Of a reward model its files."""
    monkeypatch.chdir(tmp_path)
    for name, text in (("a/x.jsonl", "one"), ("b/x.jsonl", "one"), ("c/x.jsonl", "two"), ("r/reward.json", "{}"),
                       ("r/heads.safetensors", "h"), ("t/tokenizer.json", "t")):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    of = lambda tokenizer="toy", **flags: contents(flags, tokenizer)
    assert of(data=["a/x.jsonl"]) == of(data=["b/x.jsonl"]) != of(data=["c/x.jsonl"]) != of(eval_data=["c/x.jsonl"])
    assert of(data=["a/x.jsonl", "c/x.jsonl"]) != of(data=["c/x.jsonl", "a/x.jsonl"])
    assert of("t") != of("toy") != of("gpt2")
    first = of(rewards=["r", "r:kind", "concise:12"])
    assert first != of(rewards=["r", "r:warm", "concise:12"]) and first != of(rewards=["r", "r:kind", "concise:11"])
    assert first == of(rewards=[str(tmp_path / "r"), "r:kind", "concise:12"])
    Path("r/heads.safetensors").write_text("other")
    assert first != of(rewards=["r", "r:kind", "concise:12"])
    assert list(map(absolute, ["r", "r:kind", "concise:12", "happy"])) == [
        str(tmp_path / "r"), f"{tmp_path / 'r'}:kind", "concise:12", "happy"]


def test_only_one_process_trains_in_a_directory(tmp_path):
    """Until it ends, however it ends. Wrong: a lock that outlives a process that was killed."""
    pytest.importorskip("fcntl")
    code = ("import fcntl, os, time; f = open('.lock', 'w'); f.write(str(os.getpid())); f.flush(); "
            "fcntl.flock(f, fcntl.LOCK_EX); print('mine', flush=True); time.sleep(60)")       # as lock() does
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(UserError, match=f"process {other.pid} is at work there; wait for its end, or choose"):
            prepare_run(tmp_path, CONFIG)
        assert not (tmp_path / "config.json").exists()
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    assert prepare_run(tmp_path, CONFIG) is None and prepare_run(tmp_path, CONFIG) is None       # its own again
    assert (tmp_path / ".lock").read_text() == str(os.getpid())
    close_run(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["config.json"]


def test_what_the_dead_left_is_swept(tmp_path):
    """Wrong: a directory that holds nothing but a temporary file is somebody else's; a live process's file is swept."""
    dead, mine = f".config.json.{2 ** 22 + 1}.tmp.json", f".front.png.{os.getpid()}.tmp.png"
    for name in (dead, mine, "snapshots/" + dead, ".hidden", ".x.tmp.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half")
    shutil.rmtree(tmp_path / "snapshots")
    assert prepare_run(tmp_path, CONFIG) is None
    close_run(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {mine, ".hidden", ".x.tmp.json", "config.json"}
    write_json(tmp_path / "timing.json", {})
    (tmp_path / dead).write_text("half")
    assert prepare_run(tmp_path, CONFIG) == TRAINED and not (tmp_path / dead).exists()


def test_a_directory_of_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("…")
    with pytest.raises(UserError, match="holds no run of train_x.py"):
        prepare_run(tmp_path, CONFIG)
    write_json(tmp_path / "config.json", CONFIG | {"script": "train_y.py"})
    with pytest.raises(UserError, match="holds no run of train_x.py"):
        prepare_run(tmp_path, CONFIG)
    assert (tmp_path / "thesis.tex").exists() and read_json(tmp_path / "config.json")["script"] == "train_y.py"
    assert prepare_run(tmp_path / "new" / "run", CONFIG) is None and (tmp_path / "new/run/config.json").exists()


def test_steps_and_models():
    flags = SimpleNamespace(steps=10, method="dps")
    assert steps_each(flags, ["a"] * 3) == 3
    with pytest.raises(UserError, match="--steps 10 are shared by 11 models of method dps"):
        steps_each(flags, ["a"] * 11)
    models, state = ["a", "b", "c"], {"member": 1, "step": 4}
    assert list(models_left(models, None)) == [(0, "a", None), (1, "b", None), (2, "c", None)]
    assert list(models_left(models, state)) == [(1, "b", state), (2, "c", None)]


# ---- state ----

def test_a_state_comes_back(tmp_path):
    """With what these functions know of an optimizer: torch's own (test_killed_runs.py) import code for seconds.
    Wrong: the one's moments for the other's, or for another parameter's."""
    def optimizer(state):
        return SimpleNamespace(state_dict=lambda: {"state": state},
                               load_state_dict=lambda new: state.update(new["state"]))

    def trained(seed):
        torch.manual_seed(seed)
        adam = {i: dict(step=1.0 + seed + i, exp_avg=torch.randn(2, 3)) for i in range(2)}
        return torch.nn.Linear(3, 2), optimizer(adam), optimizer({0: dict(momentum_buffer=torch.randn(2, 3))})

    model, *optimizers = trained(0)
    save_state(tmp_path / "state.safetensors", model.named_parameters(), *optimizers, step=7, kept={"z": [1.5]})
    other, *others = trained(1)
    load_state(tmp_path / "state.safetensors", other.named_parameters(), *others)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    for a, b in zip(optimizers, others):
        a, b = (o.state_dict()["state"] for o in (a, b))
        assert a.keys() == b.keys()
        assert all(torch.equal(torch.as_tensor(x), b[i][key]) for i in a for key, x in a[i].items())
    assert read_state_header(tmp_path / "state.safetensors") == {"step": 7, "kept": {"z": [1.5]}}
    assert read_state_header(tmp_path / "none") is None
    (tmp_path / "bad").write_bytes(b"text")
    with pytest.raises(UserError, match="bad is not a state file; delete it to start afresh"):
        read_state_header(tmp_path / "bad")
    tensors, metadata = load_file(tmp_path / "state.safetensors"), {}
    with safe_open(tmp_path / "state.safetensors", "pt") as f:
        metadata = f.metadata()
    for other, more in ((dict(weight=torch.zeros(1, 3)), {}), (dict(weight=torch.zeros(2, 3).int()), {}),
                        (dict(x=torch.ones(1)), {}), ({}, dict(state="{}")),
                        ({}, dict(state=metadata["state"].replace("7", "8")))):
        save_file(tensors | {f"param.{name}": x for name, x in other.items()}, tmp_path / "bad", metadata | more)
        with pytest.raises(UserError, match="bad is not a state file"):
            read_state_header(tmp_path / "bad")


def test_the_log_is_cut_where_it_was_being_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    truncate_log(path, lambda record: record["step"] < 3)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    for damaged in ("[1]", '{"ste', "3"):                     # wrong: dropped with all that follows it; a traceback
        path.write_text(f'{{"step": 1}}\n{damaged}\n{{"step": 2}}\n')
        with pytest.raises(UserError, match="metrics.jsonl, line 2: damaged"):
            truncate_log(path, lambda record: record["step"] < 3)
    truncate_log(tmp_path / "none", lambda record: True)
    assert (tmp_path / "none").read_text() == ""


# ---- files ----

def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    write_whole(path, lambda f: f.write_text("one"))

    def half(f):
        f.write_text("tw")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, half)
    assert path.read_text() == "one" and [f.name for f in path.parent.iterdir()] == ["a.txt"]
    assert path.stat().st_mode & 0o777 == 0o644
    with pytest.raises(ValueError):
        write_json(path, {"x": float("nan")})                          # not JSON
    assert path.read_text() == "one"


def test_what_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    """A full disk, a file in the place of a folder, a system's own folder: UserError, and nothing half-written."""
    (tmp_path / "file").write_text("mine")
    places = [tmp_path / "file" / "run" / "a.json", tmp_path / "file" / "a.json"]
    places += [Path("/proc/nowhere/a.json")] if Path("/proc").exists() else []
    for path in places:
        with pytest.raises(UserError, match=f"^{path} cannot be written: [^\n]+$"):
            write_json(path, {})
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=f"^{out} cannot be written: [^\n]+$"):
            prepare_run(out, CONFIG)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="a.json cannot be written: No space left on device"):
        write_json(tmp_path / "a.json", {})
    with pytest.raises(UserError, match="b cannot be written: .*No such file"):       # safetensors has its own error
        write_whole(tmp_path / "b", lambda f: save_file({"x": torch.ones(1)}, f.parent / "none" / "x"))
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_what_is_no_json(tmp_path):
    (tmp_path / "a").write_text("{")
    (tmp_path / "b").write_bytes(b"\xff\xfe")
    for name, text in (("a", "a is not JSON"), ("b", "b is not JSON"), ("c", "c does not exist"),
                       ("", "cannot be read")):
        with pytest.raises(UserError, match=text) as error:
            read_json(tmp_path / name)
        assert "\n" not in str(error.value)
