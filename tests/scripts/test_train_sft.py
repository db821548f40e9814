"""test_train_sft.py - Panacea with the SFT objective, run for real: the first loss by hand, files, bad input."""
import numpy as np
import pytest
import torch
from running import BASE, ELSEWHERE, epoch_and_whole, go, gradients, metrics, read, refused, timeless, write_rows

from aggregate import sample_preference, tchebycheff
from data import toy
from data.tokenizers import load_tokenizer
from fronts.objective import sft_ideal
from model import Transformer
from runs.randomness import epoch_batch, generator_for


def test_run_directory_and_the_first_loss(sft_run):
    config, records = read(sft_run, "config.json"), metrics(sft_run)
    assert config["script"] == "train_sft.py" and config["dims"] == ["helpful", "harmless"]
    assert config["objective"] == {"name": "sft", "beta": None, "aggregate": "ls", "ideal": None}
    assert (config["method"], config["label"], config["loss_scale"]) == ("panacea", "Panacea", [1, 1])
    assert {"adapter.safetensors", "snapshots", "timing.json"} <= {f.name for f in sft_run.iterdir()}
    assert [r["step"] for r in records] == [1, 2, 3, 4] and np.shape(records[0]["lam"]) == (4, 2)
    # a fresh adapter is the base: the loss of step 1 from the same rows, one by one
    model, tokenizer = Transformer.from_pretrained(BASE), load_tokenizer("toy")
    rows, kinds = toy.sample_demonstrations("train", config["dims"], 16, 2, generator_for(0, "demos"))
    lam = sample_preference(4, 2, 1.0, 0.0, generator_for(0, "lambda", 0))
    L = torch.zeros(4, 2)
    for g, j in enumerate(epoch_batch(16, 4, 0, 0).tolist()):
        for text, kind in zip(rows[j].responses, kinds[j]):
            x, y = tokenizer.encode(rows[j].prompt), tokenizer.encode(text) + [tokenizer.eos_id]
            logits = model(torch.tensor([x + y]))[0, len(x) - 1:-1].log_softmax(-1)
            L[g, kind] -= logits[torch.arange(len(y)), torch.tensor(y)].sum().detach() / 2
    assert np.allclose(records[0]["losses"], L.mean(0), rtol=1e-5)
    assert np.isclose(records[0]["loss"], (lam * L).sum(1).mean(), rtol=1e-5)
    assert not np.isclose(records[0]["loss"], L.mean(), rtol=1e-4)     # wrong: λ forgotten
    assert records[-1]["loss"] != records[0]["loss"]


def test_tche_aims_at_the_entropies():
    run = go("train_sft", "sft-tche", aggregate="tche", steps=2, lams_per_step=1)
    record, z = metrics(run)[0], sft_ideal(["helpful", "harmless"], "train")
    L, lam = torch.tensor(record["losses"]), torch.tensor(record["lam"])              # one λ a step: the batch's means
    assert lam.shape == (1, 2) and np.isclose(record["loss"], tchebycheff(L, lam[0], z), rtol=1e-4)
    assert not np.isclose(record["loss"], tchebycheff(L, lam[0]), rtol=0.01)          # wrong: z = 0
    p = torch.stack([toy.demonstrator_probs(x, ["helpful", "harmless"]) for x in toy.prompts("train")])
    assert np.allclose(z, -(p * p.log()).sum(1).mean(0))
    given = metrics(go("train_sft", "sft-ideal", aggregate="tche", steps=1, lams_per_step=1, ideal=[1.0, 2.0]))[0]
    assert np.isclose(given["loss"], tchebycheff(L, lam[0], [1.0, 2.0]), rtol=1e-4)


def test_tche_learns_at_every_vertex():
    """Losses below z there leave a gradient, too: the other dimension's 0 · L is no larger term."""
    flags = dict(aggregate="tche", lams_per_step=1, vertex_share=1, ideal=[80, 80])
    steps = gradients("train_sft", "sft-vertices", **flags)
    records = metrics(go("train_sft", "sft-vertices", **flags))
    assert all(max(r["lam"][0]) == 1 and r["loss"] < 0 for r in records)
    assert steps.norm(dim=1).min() > 0 and all(r["grad_norm"] > 0 for r in records)


def test_an_epoch_weighs_a_rare_style_by_lambda(close):
    """One of 20 prompts has an answer of the second style. Rules out: division by the batch's own count."""
    plain = [{"prompt": f"What is {i}?", "response": f"It is {i}."} for i in range(20)]
    files = [write_rows("plain.jsonl", plain), write_rows("rare.jsonl", [plain[7] | {"response": "Oh, my friend!"}])]
    few, whole, records = epoch_and_whole("train_sft", 3, data=files, method="dps", dps_parts=2, lams_per_step=1)
    for mean, all_rows in zip(few, whole):
        assert all_rows.norm() > 0 and close(mean, all_rows, 1e-5)
    assert [sum(r["losses"][i] is None for r in records) for i in (0, 1)] == [0, 12]


def test_same_seed_same_adapter(sft_run):
    again, other = go("train_sft", "sft-again"), go("train_sft", "sft-seed", seed=1)
    adapter = lambda run: (run / "adapter.safetensors").read_bytes()
    assert adapter(again) == adapter(sft_run) != adapter(other) and timeless(again) == timeless(sft_run)


def test_files():
    """Two styles of answers to one set of prompts: λ chooses the style, also on prompts that were held out."""
    styles = {"terse": "Yes. It is {}.", "chatty": "Oh what a fine thing to ask, my friend: it is {}, I am sure of it."}
    for part, numbers in (("train", range(20)), ("eval", range(20, 26))):
        for style, text in styles.items():
            write_rows(f"{style}-{part}.jsonl", [{"prompt": f"What is {n} and {n}?", "response": text.format(2 * n)}
                                                 for n in numbers])
    files = [f"{style}-{part}.jsonl" for part in ("train", "eval") for style in styles]
    run = go("train_sft", "sft-files", init=BASE, data=files[:2], eval_data=files[2:], dims=["terse", "chatty"],
             epochs=12, steps=None, lr=2e-3, eval=True)
    r = read(run, "front.json")
    assert r["dims"] == ["terse", "chatty"] and r["points_are"] == "gain in log-likelihood" and r["exact"] is None
    assert np.allclose(r["base"]["scores"], 0) and np.array(r["points"]).max() > 0.3            # nats per token
    points = np.array(r["points"])                                     # λ from all chatty to all terse, in 11 steps
    assert points[0, 1] > points[-1, 1] and points[-1, 0] > points[0, 0]
    assert min(r["spearman"]) > 0.7                                    # each style rises with its weight
    scale = read(run, "config.json")["loss_scale"]
    assert scale[0] > 1.5 * scale[1] and len(metrics(run)) == 60       # divided by the mean lengths


BAD = {"one file": (dict(data=["a.jsonl"], init="x"), "at least 2 dimensions"),
       "no init": (dict(data=["a.jsonl", "b.jsonl"]), "--data needs --init"),
       "eval files": (dict(data=["a.jsonl", "b.jsonl"], init="x", eval_data=["a.jsonl"], eval=True),
                      "as many --eval_data"),
       "groups": (dict(batch_size=6, lams_per_step=4), "must be a multiple of --lams_per_step"),
       "ideal": (dict(ideal=[1, 1]), "only with --aggregate tche"),
       "world": (dict(init=ELSEWHERE["init"]), "--init needs --data: out/base-of-no-world does not know the"),
       "names": (dict(data=["x/a.jsonl", "y/a.jsonl"], init="x"), "2 different names"),
       "dims": (dict(dims=["helpful", "kind"]), "choose each once"),
       "no file": (dict(data=["a.jsonl", "b.jsonl"], init=BASE), "a.jsonl: cannot be read"),
       "steps": (dict(method="rs", steps=1), "shared by 2 models"),
       "out": (dict(out=BASE), "holds no run of train_sft.py")}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(monkeypatch, capsys, case):
    refused("train_sft", *BAD[case], monkeypatch, capsys)
