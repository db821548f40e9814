"""test_labels.py - Appendix A: what pooled labels make of a model, run for real and against plain loops."""
import json
import os

import pytest
import torch

from experiments import labelers as appendix_a
import train_base
import train_dpo
from runs.files import UserError
from runs.flags import cli
from data import toy
from fronts.measure import World


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A directory with a base model and a Panacea run of a few steps; eight evaluation prompts instead of forty."""
    cwd, every, before = tmp_path_factory.mktemp("labels"), toy.prompts, os.getcwd()
    toy.prompts = lambda split: every(split)[::5] if split == "eval" else every(split)
    os.chdir(cwd)
    train_base.main(train_base.Flags(device="cpu", steps=12, batch_size=4))
    train_dpo.main(cli(train_dpo.Flags, "", "--steps 4 --rows 24 --responses 4 --no-eval --out out/panacea".split()))
    yield cwd
    os.chdir(before)
    toy.prompts = every


def test_exact_policies_of_pooled_labels():
    """RLHF gets the mean λ; DPO the policy whose win rates are the labelers' mean; both serve nobody fully."""
    world = World.__new__(World)
    x = toy.prompts("eval")
    world.scores = torch.stack([toy.scores(p, toy.responses(p))[:, :2] for p in x])
    ref = torch.stack([toy.base_probs(p).log() for p in x])
    labelers = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    best = appendix_a.optimal(world, ref, labelers, ["helpful", "harmless"])
    middle = (ref + world.scores.mean(-1)).log_softmax(-1)
    assert torch.allclose(best["pooled RLHF, exact: λ^opt"][0].log_softmax(-1), middle)
    h = (best["pooled DPO, exact"][0] - ref)[0]
    r = world.scores[0]
    wins = sum(torch.sigmoid(r[:, None, i] - r[None, :, i]) for i in (0, 1)) / 2
    assert torch.allclose(torch.sigmoid(h[:, None] - h).sum(1), wins.sum(1), atol=1e-8)
    assert not torch.allclose(torch.sigmoid(h[:, None] - h), torch.sigmoid(r.mean(1)[:, None] - r.mean(1)), atol=0.05)
    # at a vertex Panacea's DPO optimum is the labeler's own
    assert torch.allclose(best["Panacea (DPO), exact"].log_softmax(-1), best["a model of his own"].log_softmax(-1),
                          atol=1e-6)


def test_the_script(work, capsys):
    r = appendix_a.main(appendix_a.Flags(panacea="out/panacea", labelers=[1.0, 0.2], steps=4, device="cpu"))
    assert (work / "out/appendix-a/labelers.png").stat().st_size > 10_000
    assert json.loads((work / "out/appendix-a/labelers.json").read_text()) == r
    assert r["labelers"] == [[1.0, 0.0], [0.2, 0.8]]
    assert r["served"]["a model of his own"] == pytest.approx([1, 1])
    assert max(r["served"]["pooled RLHF, exact: λ^opt"]) < 0.98 and r["served"]["Panacea (DPO), exact"][0] > 0.999
    assert r["scores"]["pooled DPO, trained"][0] == r["scores"]["pooled DPO, trained"][1]       # one model for all
    assert r["scores"]["Panacea (DPO), trained"][0] != r["scores"]["Panacea (DPO), trained"][1]
    # served, by hand, for the pooled RLHF policy and the first labeler
    from data.tokenizers import load_tokenizer
    from eval_front import base_of
    world = World(r["dims"], load_tokenizer("toy"), "cpu")
    world.reference(base_of(json.loads((work / "out/panacea/config.json").read_text()), torch.device("cpu")))
    ref, U = world.ref.log_softmax(-1), []
    for weight in (0.0, 0.6, 1.0):                            # base; the mean of the weights of helpful; labeler 1
        lam = torch.tensor([weight, 1 - weight], dtype=torch.float64)
        logp = ref if weight == 0 else (ref + world.scores @ lam).log_softmax(-1)
        U.append(((logp.exp() * world.scores[..., 0]).sum(1) - (logp.exp() * (logp - ref)).sum(1)).mean().item())
    assert r["served"]["pooled RLHF, exact: λ^opt"][0] == pytest.approx((U[1] - U[0]) / (U[2] - U[0]), rel=1e-6)
    assert "how well each labeler is served" in capsys.readouterr().out


def test_bad_input(work):
    for flags, text in (({"panacea": "out/none"}, "config.json does not exist"),
                        ({"panacea": "out/panacea", "labelers": [1.5]}, "between 0 and 1")):
        with pytest.raises(UserError, match=text):
            appendix_a.main(appendix_a.Flags(device="cpu", **flags))
    (work / "out/half").mkdir(exist_ok=True)
    (work / "out/half/config.json").write_text((work / "out/panacea/config.json").read_text())
    with pytest.raises(UserError, match="no finished Panacea run"):
        appendix_a.main(appendix_a.Flags(panacea="out/half", device="cpu"))
