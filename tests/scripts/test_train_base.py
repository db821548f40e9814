"""test_train_base.py - the embedded world's base model: it learns, is written whole, is made where it is missing."""
import math
import subprocess

import pytest
import running
import torch
from running import BASE, metrics, read, refused

import train_base
from data import base, toy
from data.tokenizers import TokenRow, load_tokenizer
from data.trees import batch_logprobs, pack
from model import Transformer
from runs.files import UserError, write_json


def test_it_learns_and_writes_a_model_directory(work):
    losses, report = [record["loss"] for record in metrics(work / BASE)], read(work, BASE, "base.json")
    assert abs(losses[0] - math.log(888)) < 0.3 and losses[-1] < 1     # ln V at random weights, then far less
    assert {f.name for f in (work / BASE).iterdir()} == {"config.json", "model.safetensors", "base.json",
                                                        "metrics.jsonl", "timing.json"}
    assert report["tokenizer"] == "toy" and set(report["splits"]) == set(toy.SPLITS)
    model, tokenizer = Transformer.from_pretrained(BASE), load_tokenizer("toy")
    for split, measured in report["splits"].items():                   # by a loop over prompts and responses
        loss, kl, outside = [], [], []
        for x in toy.prompts(split):
            row = TokenRow(tokenizer.encode(x + "\n"),
                           [tokenizer.encode(y) + [tokenizer.eos_id] for y in toy.responses(x)])
            with torch.no_grad():
                logps = batch_logprobs(model, pack([row])).double()
            loss.append(-(toy.base_probs(x) * logps).sum().item())
            kl.append((toy.base_probs(x) * (toy.base_probs(x).log() - logps)).sum().item())
            outside.append(1 - logps.exp().sum().item())
        assert measured == {"loss": pytest.approx(sum(loss) / len(loss), rel=1e-4),
                            "kl_data_to_base": pytest.approx(sum(kl) / len(kl), rel=1e-4),
                            "outside_mass": pytest.approx(sum(outside) / len(outside), rel=1e-4),
                            "outside_mass_worst": pytest.approx(max(outside), rel=1e-4)}
        assert 0 < measured["kl_data_to_base"] < 0.5 and measured["outside_mass"] < measured["outside_mass_worst"] < 0.2


def test_it_is_trained_on_the_base_split(work, monkeypatch):
    """Wrong: train prompts alone, without the new verbs."""
    given = []
    monkeypatch.setattr(train_base, "train", lambda model, out, trees, probs, *more: given.append((trees, probs)))
    monkeypatch.setattr(train_base, "end_training", lambda *args: None)
    monkeypatch.setattr(train_base, "SIZES", {"tiny": Transformer.from_pretrained(BASE).config})
    train_base.main(train_base.Flags(device="cpu", out="out/base-split"))
    (trees, probs), tokenizer = given[0], load_tokenizer("toy")
    asked = [{tokenizer.decode(row.prompt) for row in rows} for rows in trees]
    assert asked == [{x + "\n"} for x in toy.prompts("base")]
    texts = [[tokenizer.decode(y[:-1]) for row in rows for y in row.responses] for rows in trees]
    assert texts == [toy.responses(x) for x in toy.prompts("base")]    # in the order of their probabilities
    assert all(torch.equal(p, toy.base_probs(x)) for p, x in zip(probs, toy.prompts("base"), strict=True))


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


LARGE = "out/base-125m-seed0"


def test_a_missing_base_is_made_once_by_its_script(work, tmp_path, monkeypatch, capsys):
    calls = []

    def run(command, env):
        calls.append(command[1:])
        write_json(tmp_path / LARGE / "base.json", {"world": base.world_fingerprint()})
        write_json(tmp_path / LARGE / "config.json", {})
        assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(env)     # it is one process
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(base.subprocess, "run", run)
    find = lambda: base.find_base(None, "125m", None, torch.device("cpu"))
    assert find() == find() == (str(tmp_path / LARGE), "toy") and len(calls) == 1
    assert calls[0][0].endswith("train_base.py") and calls[0][1:] == ["--size", "125m", "--device", "cpu"]
    assert "it (once)" in capsys.readouterr().out
    monkeypatch.setattr(base.subprocess, "run", lambda command, env: subprocess.CompletedProcess(command, 3))
    with pytest.raises(UserError, match="train_base.py ended with status 3"):
        base.find_base(None, "350m", None, torch.device("cpu"))


def test_which_base_a_training_starts_from(work, monkeypatch, capsys):
    """The one that ships, on every device, unless a size or a directory is named. Wrong: 125m on a GPU; a path that
    is another one in another working directory."""
    BASE, elsewhere = str(work / running.BASE), str(work / "elsewhere")
    monkeypatch.setattr(base, "_world_base", lambda *args: pytest.fail("nothing is trained"))
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert base.find_base(None, None, None, cpu) == base.find_base(None, "tiny", None, cuda) == (BASE, "toy")
    assert base.find_base("elsewhere", None, None, cuda) == (elsewhere, elsewhere)
    assert base.find_base(BASE, None, "gpt2", cpu) == (BASE, "gpt2")
    assert capsys.readouterr().out == ""
    assert base.find_base(None, None, None, cuda) == (BASE, "toy")
    assert capsys.readouterr().out.count("\n") == 1
