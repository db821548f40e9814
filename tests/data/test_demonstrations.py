"""test_demonstrations.py - what the embedded world's writers say, and labels by people who weigh dimensions."""
import numpy as np
import torch

from data import toy

THREE = ["helpful", "harmless", "concise"]


def test_demonstrators_tilt_the_base_by_their_dimension():
    x = toy.prompts("train")[0]
    p, base, r = toy.demonstrator_probs(x, THREE), toy.base_probs(x), toy.scores(x, toy.responses(x))
    assert p.shape == (160, 3) and torch.allclose(p.sum(0), torch.ones(3, dtype=torch.float64))
    for i in range(3):
        ratio = (p[:, i] / base).log() - r[:, i]                       # log p/base = r + a constant
        assert (ratio - ratio[0]).abs().max() < 1e-9 and (p[:, i] @ r[:, i]) > base @ r[:, i] + 0.5


def test_sampled_demonstrations_are_the_writers():
    rows, kinds = toy.sample_demonstrations("train", ["concise", "formal"], 320, 10, torch.Generator().manual_seed(0))
    assert len(rows) == len(kinds) == 320 and kinds[0] == [0] * 10 + [1] * 10
    assert sorted(row.prompt for row in rows[:160]) == sorted(x + "\n" for x in toy.prompts("train"))
    found, wanted = [], []
    for row, kind in zip(rows, kinds):
        x = row.prompt[:-1]
        r = toy.scores(x, row.responses)[:, [2, 3]]
        found.append([r[torch.tensor(kind) == i, i].mean() for i in (0, 1)])
        wanted.append((toy.demonstrator_probs(x, ["concise", "formal"])
                       * toy.scores(x, toy.responses(x))[:, [2, 3]]).sum(0).tolist())
    found, wanted = np.array(found).mean(0), np.array(wanted).mean(0)
    assert np.abs(found - wanted).max() < 0.08                         # standard error: about 0.02
    assert np.abs(found[::-1] - wanted).max() > 0.5                    # wrong: the writers exchanged


def test_labelers_give_one_label_by_their_weighted_reward():
    one = toy.sample_pairs("train", THREE[:2], 40, 6, torch.Generator().manual_seed(1), torch.tensor([[0.5, 0.5]]))
    assert all(np.shape(row.better) == (15, 1) for row in one)
    agree = {name: 0 for name in ("sum", "first")}
    for row in one:
        r = toy.scores(row.prompt[:-1], row.responses)[:, :2]
        for (a, b), (label,) in zip(row.pairs, row.better):
            agree["sum"] += (r[a].sum() < r[b].sum()).item() == label
            agree["first"] += (r[a, 0] < r[b, 0]).item() == label
    assert agree["sum"] > 0.72 * 600 > agree["first"] + 20             # wrong: only the first dimension decides
