"""test_directory.py - run directories: names, what is resumed, whole files, the state of a killed run."""
import json
from types import SimpleNamespace

import pytest
import torch

from runs.directory import (
    close_run,
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
        flags = Flags(**flags)
        return run_name(["dpo", *files, flags.method, flags.aggregate, "helpful", "harmless", f"seed{flags.seed}"],
                        flags, {"method", "aggregate", "data", "eval_data"})

    names = {name(), name(lr=1e-3), name(seed=1), name(method="rs"), name(loss="ipo"),
             name("pku", data=["a/pku.jsonl"], init="x/stories260K")}
    assert len(names) == 6 and "out/dpo-panacea-ls-helpful-harmless-seed0" in names
    assert "out/dpo-pku-panacea-ls-helpful-harmless-seed0-initstories260K" in names
    assert name(out="elsewhere", log_every=7, eval=False) == name()    # these do not make another run


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


@pytest.mark.parametrize("change, said", [({"flags": {"lr": 0.2, "steps": 4, "log_every": 1}}, "other lr"),
                                          ({"fingerprint": "g"}, "other base weights")])
def test_a_killed_run_with_other_flags_is_not(tmp_path, capsys, change, said):
    unfinished(tmp_path)
    for folder in ("mod", "mod-1.5", "weights-1.5", "snapshots"):
        write_json(tmp_path / folder / "front.json", {})
    assert prepare_run(tmp_path, CONFIG | change) is None and said in capsys.readouterr().out
    assert [f.name for f in tmp_path.rglob("*") if f.is_file()] == ["config.json"]    # nothing of the two is mixed


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
    def pair(seed):
        torch.manual_seed(seed)
        model = torch.nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1), torch.optim.SGD(model.parameters(), 0.1, 0.9)

    model, *optimizers = pair(0)
    for optimizer in optimizers:
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
    save_state(tmp_path / "state.safetensors", model.named_parameters(), *optimizers, step=7, kept={"z": [1.5]})
    other, *others = pair(1)
    load_state(tmp_path / "state.safetensors", other.named_parameters(), *others)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    for a, b in zip(optimizers, others):
        a, b = (o.state_dict()["state"] for o in (a, b))
        assert a.keys() == b.keys() and all(torch.equal(a[i][key], b[i][key]) for i in a for key in a[i])
    assert read_state_header(tmp_path / "state.safetensors") == {"step": 7, "kept": {"z": [1.5]}}
    assert read_state_header(tmp_path / "none") is None
    (tmp_path / "bad").write_bytes(b"text")
    with pytest.raises(UserError, match="bad is not a state file; delete it to start afresh"):
        read_state_header(tmp_path / "bad")


def test_the_log_is_cut_where_it_was_being_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    truncate_log(path, lambda record: record["step"] < 3)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
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


def test_what_is_no_json(tmp_path):
    (tmp_path / "a").write_text("{")
    (tmp_path / "b").write_bytes(b"\xff\xfe")
    for name, text in (("a", "a is not JSON"), ("b", "b is not JSON"), ("c", "c does not exist"),
                       ("", "cannot be read")):
        with pytest.raises(UserError, match=text) as error:
            read_json(tmp_path / name)
        assert "\n" not in str(error.value)
