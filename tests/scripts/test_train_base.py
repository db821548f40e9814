"""test_train_base.py - the embedded world's base model: it learns, is written whole, is made where it is missing."""
import math
import subprocess

import pytest
import torch
from running import BASE, metrics, read, refused

import train_base
from data import base
from runs.files import UserError


def test_it_learns_and_writes_a_model_directory(work):
    losses, report = [record["loss"] for record in metrics(work / BASE)], read(work, BASE, "base.json")
    assert abs(losses[0] - math.log(835)) < 0.3 and losses[-1] < 1     # ln V at random weights, then far less
    assert {f.name for f in (work / BASE).iterdir()} == {"config.json", "model.safetensors", "base.json",
                                                        "metrics.jsonl", "timing.json"}
    assert report["outside_mass"] < 0.2 and 0 < report["kl_data_to_base"] < 0.5 and report["tokenizer"] == "toy"


def test_same_seed_same_weights(work, monkeypatch, capsys):
    make = lambda name, seed: train_base.main(train_base.Flags(steps=2, batch_size=2, seed=seed, device="cpu",
                                                               out=f"out/{name}"))
    monkeypatch.setattr(train_base, "SIZES", {"tiny": train_base.Transformer.from_pretrained(BASE).config})
    one, two, other = ((make(name, seed) / "model.safetensors").read_bytes() for name, seed in
                       (("base-a", 0), ("base-b", 0), ("base-c", 1)))
    assert one == two != other and "outside mass" in capsys.readouterr().out


@pytest.mark.parametrize("flags, text", [({"size": "huge"}, "--size huge: choose one of"),
                                         ({"steps": 0}, "--steps 0: must be at least 1"),
                                         ({"lr": "nan"}, "--lr nan: must be positive")])
def test_bad_input(monkeypatch, capsys, flags, text):
    monkeypatch.setattr("running.COMMON", {"device": "cpu"})
    refused("train_base", flags, text, monkeypatch, capsys)


def test_a_missing_base_is_made_once_by_its_script(work, tmp_path, monkeypatch, capsys):
    calls = []

    def run(command, env):
        calls.append(command[1:])
        (tmp_path / BASE).mkdir(parents=True)
        (tmp_path / BASE / "base.json").write_text("{}")
        assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(env)     # it is one process
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(base.subprocess, "run", run)
    find = lambda: base.find_base(None, None, None, torch.device("cpu"))
    assert find() == find() == (BASE, "toy") and len(calls) == 1
    assert calls[0][0].endswith("train_base.py") and calls[0][1:] == ["--size", "tiny", "--device", "cpu"]
    assert "it (once)" in capsys.readouterr().out
    assert base.find_base("elsewhere", None, None, torch.device("cpu")) == ("elsewhere", "elsewhere")
    assert base.find_base(BASE, None, "gpt2", torch.device("cpu")) == (BASE, "gpt2")
    monkeypatch.setattr(base.subprocess, "run", lambda command, env: subprocess.CompletedProcess(command, 3))
    with pytest.raises(UserError, match="train_base.py ended with status 3"):
        base.find_base(None, "125m", None, torch.device("cpu"))
