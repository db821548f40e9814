"""test_labelers.py - Appendix A: what pooled labels make of a model, run for real and against plain loops."""
import json

import pytest
import torch
from running import read

from data import toy
from data.tokenizers import load_tokenizer
from experiments import labelers
from fronts.measure import World, base_of
from fronts.optimum import with_outside
from runs.files import UserError


@pytest.fixture(autouse=True)
def place(in_small_world):
    """Every test here runs in the small world."""


def world_of(base):
    """The world of two dimensions; base: (X, O) log-probs of the reference."""
    world = World(["helpful", "harmless"], load_tokenizer("toy"), "cpu")
    world.ref = base
    return world


def test_exact_policies_of_pooled_labels():
    """RLHF gets the mean λ; DPO the policy whose win rates are the labelers' mean; both serve nobody fully."""
    base = torch.stack([0.9 * toy.base_probs(x) for x in toy.prompts("new_verbs")]).log()
    world = world_of(with_outside(base))
    people = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    best = labelers.optimal(world, people)
    middle = (world.ref + world.scores.mean(-1)).log_softmax(-1)
    assert torch.allclose(best["pooled RLHF, exact: λ^opt"][0], middle) and middle[:, -1].exp().max() < 0.01
    assert all(torch.allclose(logps.exp().sum(-1), torch.ones(2, 4).double()) for logps in best.values())
    h, r = (best["pooled DPO, exact"][0] - world.ref)[0, :-1], world.scores[0, :-1]
    wins = sum(torch.sigmoid(r[:, None, i] - r[None, :, i]) for i in (0, 1)) / 2
    assert torch.allclose(torch.sigmoid(h[:, None] - h).sum(1), wins.sum(1), atol=1e-8)
    assert not torch.allclose(torch.sigmoid(h[:, None] - h), torch.sigmoid(r.mean(1)[:, None] - r.mean(1)), atol=0.02)
    # at a vertex Panacea's DPO optimum is the labeler's own
    listed = lambda logps: logps[..., :-1].log_softmax(-1)
    assert torch.allclose(listed(best["Panacea (DPO), exact"]), listed(best["for this labeler alone"]), atol=1e-6)


def test_the_script(work, panacea, capsys):
    r = labelers.main(labelers.Flags(panacea=str(panacea), labelers=[1.0, 0.2], steps=4, device="cpu"))
    assert (work / "out/appendix-a/labelers.png").stat().st_size > 10_000
    assert read("out/appendix-a/labelers.json") == r and r["labelers"] == [[1.0, 0.0], [0.2, 0.8]]
    assert r["served"]["for this labeler alone"] == pytest.approx([1, 1])
    assert max(r["served"]["pooled RLHF, exact: λ^opt"]) < 0.99 and r["served"]["Panacea (DPO), exact"][0] > 0.999
    assert r["scores"]["pooled DPO, trained"][0] == r["scores"]["pooled DPO, trained"][1]       # one model for all
    assert r["scores"]["Panacea (DPO), trained"][0] != r["scores"]["Panacea (DPO), trained"][1]
    # served, by hand, for the pooled RLHF policy and the first labeler
    world = world_of(None)
    world.reference(base_of(read(panacea, "config.json"), torch.device("cpu")))
    ref, U = world.ref, []
    for weight in (0.0, 0.6, 1.0):                        # base; the mean of the weights of helpful; labeler 1
        lam = torch.tensor([weight, 1 - weight], dtype=torch.float64)
        logp = ref if weight == 0 else (ref + world.scores @ lam).log_softmax(-1)
        U.append(((logp.exp() * world.scores[..., 0]).sum(1) - (logp.exp() * (logp - ref)).sum(1)).mean().item())
    assert r["served"]["pooled RLHF, exact: λ^opt"][0] == pytest.approx((U[1] - U[0]) / (U[2] - U[0]), rel=1e-6)
    assert "how well each labeler is served" in capsys.readouterr().out


def test_the_model_of_pooled_labels_learns(panacea, work):
    """Its labels follow the labelers' mean λ: with labelers who all care for one dimension, it serves these."""
    r = labelers.main(labelers.Flags(panacea=str(panacea), labelers=[1.0, 1.0], steps=40, device="cpu",
                                     out="out/appendix-one"))
    losses = [json.loads(line)["loss"] for line in (work / "out/appendix-one/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 40 and abs(losses[0] - 0.6931) < 1e-3 and sum(losses[-8:]) / 8 < 0.66
    assert r["scores"]["pooled DPO, trained"][0][0] > r["base"][0] + 0.1


def test_bad_input(work, panacea, sft_run):
    for run, text in (("out/none", "out/none is no run"), (str(sft_run), "no finished Panacea run")):
        with pytest.raises(UserError, match=text):
            labelers.main(labelers.Flags(device="cpu", panacea=run))
    (work / "out/half").mkdir(exist_ok=True)
    (work / "out/half/config.json").write_text((panacea / "config.json").read_text())
    with pytest.raises(UserError, match="no finished Panacea run"):
        labelers.main(labelers.Flags(panacea="out/half", device="cpu"))
