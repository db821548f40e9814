"""test_measure.py - World measures policies exactly: against loops over responses, on a small world; stationarity."""
import copy
import math

import pytest
import torch

from aggregate import simplex_lattice
from data import toy
from data.rewards import Rewards, world_rewards
from data.tokenizers import load_tokenizer, tokenize
from data.trees import batch_logprobs
from fronts import measure
from fronts.objective import OBJECTIVES
from fronts.optimum import rlhf_closed_form, rlhf_objectives, with_outside
from fronts.stationarity import min_norm
from model import Config, Transformer
from svd_lora import inject_svd_lora

BETA = 0.4


@pytest.fixture(scope="module")
def small():
    """A world of 4 prompts, some of them risky, and 8 responses; a tiny base model that knows it roughly."""
    from running import small_world
    with small_world():
        tokenizer, prompts = load_tokenizer("toy"), toy.prompts("new_verbs")
        config = Config(tokenizer.vocab_size, 64, n_layer=2, n_head=2, d_model=32)
        model = Transformer(config).init_weights(torch.Generator().manual_seed(0))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        (batch,) = measure.world_batches(prompts, tokenizer, "cpu")
        probs = torch.stack([toy.base_probs(x) for x in prompts]).float()
        for _ in range(60):
            loss = -(probs * batch_logprobs(model, batch).view(4, 8)).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        raw = world_rewards(["helpful", "harmless"], None).raw
        rewards = Rewards(["helpful", "harmless"], ["helpful", "harmless"], raw, [0.3, -0.2], [1.5, 2.0], [1.0, 3.0])
        yield model, rewards, tokenizer


def world(small):
    """A fresh World for RLHF, the base measured, and a policy that differs from the base."""
    model, rewards, tokenizer = small
    data = measure.World(rewards.dims, tokenizer, "cpu", OBJECTIVES["rlhf"].J, rewards)
    data.reference(model)
    policy = Transformer(model.config)
    g = torch.Generator().manual_seed(1)
    policy.load_state_dict({k: v + 0.01 * torch.randn(v.shape, generator=g) for k, v in model.state_dict().items()})
    return data, policy


def by_loops(policy, model, small):
    """J (m,), mean scores (m,), KL and outside mass, one response after the other: the gradient reaches the policy."""
    _, rewards, tokenizer = small
    J, scores, kl, outside = [0.0, 0.0], [0.0, 0.0], 0.0, 0.0
    prompts = toy.prompts("new_verbs")
    for x in prompts:
        (row,), _ = tokenize([toy.as_row(x, toy.responses(x))], tokenizer, 64)
        logps = {}
        for key, net in (("pi", policy), ("ref", model)):
            each = []
            for y in row.responses:
                every = net(torch.tensor([row.prompt + y]))[0, len(row.prompt) - 1:-1].log_softmax(-1)
                each.append(every[torch.arange(len(y)), torch.tensor(y)].double().sum())
            rest = 1 - sum(v.exp() for v in each)
            logps[key] = [*each, rest.log()]
        raw = [toy.scores(x, [text])[0] for text in [*toy.responses(x), "anything else"]]
        cost = sum(p.exp() * (p - q.detach()) for p, q in zip(logps["pi"], logps["ref"]))
        kl, outside = kl + cost / len(prompts), outside + logps["pi"][-1].exp() / len(prompts)
        for i, (mean, std, scale) in enumerate(zip(rewards.mean, rewards.std, rewards.scale)):
            r = [scale * (s[i].item() - mean) / std for s in raw]
            J[i] = J[i] + (sum(p.exp() * v for p, v in zip(logps["pi"], r)) - BETA * cost) / len(prompts)
            scores[i] += sum(p.exp() * s[i].item() for p, s in zip(logps["pi"], raw)).item() / len(prompts)
    return torch.stack(J), scores, kl, outside


def test_the_base_is_not_measured_again(small, monkeypatch):
    """But the same model with an adapter is: wrong would be the base's numbers for every preference."""
    data, seen, look = world(small)[0], [], measure.world_logprobs
    monkeypatch.setattr(measure, "world_logprobs", lambda model, batches: seen.append(model) or look(model, batches))
    data.measure(small[0], BETA)
    assert seen == []
    data.base = adapted = copy.deepcopy(small[0])
    inject_svd_lora(adapted, 2, 0, generator=torch.Generator().manual_seed(0))
    data.measure(adapted, BETA)
    assert seen == [adapted]


def test_the_base_has_no_kl_and_its_mean_reward(small):
    data, _ = world(small)
    got = data.measure(small[0], BETA)
    assert got["kl"] == 0 and 0.02 < got["outside_mass"] < 0.6
    assert data.ref.shape == (4, 9) and torch.allclose(data.ref.exp().sum(-1), torch.ones(4, dtype=torch.float64))
    assert got["J"] == pytest.approx((data.ref.exp()[..., None] * data.r).sum(1).mean(0).tolist(), rel=1e-9)
    assert (data.scores[:, -1] == toy.OUTSIDE).all()                     # "any other text" is the worst there is
    assert (data.r[:, -1] < data.r[:, :-1].amin((0, 1))).all()


def test_everything_said_counts_by_hand(monkeypatch):
    """A policy that says 0.5, 0.2 and, of all other texts together, 0.3. Wrong: renormalised to what is listed."""
    data = measure.World.__new__(measure.World)
    data.J, data.batches = OBJECTIVES["rlhf"].J, None
    data.scores = data.r = torch.tensor([[[1.0, 2.0], [3.0, 0.0], [-6.0, -6.0]]], dtype=torch.float64)
    data.ref = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64).log()
    listed = torch.tensor([[0.5, 0.2]], dtype=torch.float64).log()
    monkeypatch.setattr(measure, "world_logprobs", lambda model, batches: listed)
    got, kl = data.measure(None, BETA), 0.5 * math.log(5 / 6) + 0.2 * math.log(2 / 3) + 0.3 * math.log(3)
    assert got["outside_mass"] == pytest.approx(0.3) and got["kl"] == pytest.approx(kl) and 0.157 < kl < 0.158
    assert got["scores"] == pytest.approx([0.5 + 0.6 - 1.8, 1.0 - 1.8])
    assert got["J"] == pytest.approx([-0.7 - BETA * kl, -0.8 - BETA * kl])
    p, q = torch.tensor([5 / 7, 2 / 7]), torch.tensor([2 / 3, 1 / 3])
    assert abs((p * (p / q).log()).sum() - kl) > 0.1 and abs(11 / 7 - got["scores"][0]) > 1


def test_the_worlds_of_two_splits_differ_in_prompts_and_writers(small):
    seen, new = (measure.World(["helpful", "harmless"], small[2], "cpu", split=split) for split in
                 ("seen", "new_verbs"))
    for data in (seen, new):
        assert data.scores.shape == (4, 9, 2)
        for x, r in zip(toy.prompts(data.split), data.scores):
            assert torch.equal(r[:-1], toy.scores(x, toy.responses(x), data.dims))
        assert torch.equal(data.writers[0], toy.demonstrator_probs(toy.prompts(data.split)[0], data.dims))
        assert data.problems[0].shape[1:] == (8, 2)                      # pairs are of listed responses alone
    assert not torch.equal(seen.scores, new.scores) and not torch.equal(seen.writers, new.writers)


def test_measure_equals_a_loop_over_responses(small):
    data, policy = world(small)
    got = data.measure(policy, BETA)
    J, scores, kl, outside = by_loops(policy, small[0], small)
    assert got["J"] == pytest.approx(J.tolist(), rel=1e-4)
    assert got["scores"] == pytest.approx(scores, rel=1e-4)              # in raw units
    assert got["kl"] == pytest.approx(kl.item(), rel=1e-3) and kl > 0.005
    assert got["outside_mass"] == pytest.approx(outside.item(), rel=1e-3)
    rewards = small[1].normalise(torch.tensor(got["scores"], dtype=torch.float64))
    assert (torch.tensor(got["J"]) + BETA * got["kl"]).tolist() == pytest.approx(rewards.tolist(), rel=1e-5)
    p = got["logps"][:, :-1].softmax(-1)                                 # wrong: over the listed responses alone
    narrow = (p[..., None] * data.scores[:, :-1]).sum(1).mean(0)
    assert ((narrow - torch.tensor(scores)).abs() > 0.1).all()


def test_no_policy_is_measured_above_the_exact_front(small):
    data, policy = world(small)
    lams = simplex_lattice(2, 10)
    J, logps = rlhf_closed_form(lams, data.r, data.ref, BETA)
    for net in (policy, small[0]):
        reached = torch.tensor(data.measure(net, BETA)["J"], dtype=torch.float64)
        assert (lams @ reached < (lams * J).sum(1) - 0.01).all()
    assert torch.allclose(rlhf_objectives(logps, data.ref, data.r, BETA)[0], J)


def gradients(policy, small):
    """∇J_i with respect to the blocks' matrices, by autograd through the loop. (m, d)"""
    matrices = [p for p in policy.blocks.parameters() if p.ndim == 2]
    policy.requires_grad_(True)
    J, *_ = by_loops(policy, small[0], small)
    return torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(value, matrices, retain_graph=True)])
                        for value in J]).double(), matrices


@pytest.mark.parametrize("rows", [40, 1])
def test_stationarity(small, rows, close):
    data, policy = world(small)
    data.batches = measure.world_batches(toy.prompts("new_verbs"), small[2], "cpu", rows=rows)
    assert len(data.batches) == (1 if rows == 40 else 4)
    norm, c, single = min_norm(data, policy, BETA)
    G, matrices = gradients(policy, small)
    assert close(single, G.norm(dim=1), 1e-3) and min(single) > 0.01
    # the gradients themselves, by finite differences along a random direction
    direction = torch.randn(G.shape[1], generator=torch.Generator().manual_seed(2)).double()
    moved, eps = [], 1e-3
    for sign in (1, -2):                                                 # to +ε, and from there to −ε
        with torch.no_grad():
            for p, step in zip(matrices, direction.split([p.numel() for p in matrices])):
                p += sign * eps * step.view(p.shape)
        moved.append(torch.tensor(data.measure(policy, BETA)["J"]).double())
    assert close((moved[0] - moved[1]) / (2 * eps), G @ direction, 0.02)
    # c solves the problem: no other mixture of the gradients is shorter
    mixtures = (simplex_lattice(2, 1000) @ G).norm(dim=1)
    mixed = (torch.tensor(c, dtype=torch.float64) @ G).norm().item()
    assert norm <= mixtures.min() * (1 + 1e-3) and norm == pytest.approx(mixed, rel=1e-3)
    assert min(c) >= 0 and sum(c) == pytest.approx(1) and norm < 0.9 * mixtures[500]     # wrong: equal weights


def test_stationarity_falls_towards_the_front(small):
    data, policy = world(small)
    before, *_ = min_norm(data, policy, BETA)
    matrices = [p for p in policy.blocks.parameters() if p.ndim == 2]
    optimizer = torch.optim.Adam(matrices, lr=3e-3)
    (batch,) = data.batches
    for step in range(80):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 80)
        logps = with_outside(batch_logprobs(policy, batch).double().view(4, 8))
        loss = -rlhf_objectives(logps, data.ref, data.r, BETA)[0].mean()
        grads = torch.autograd.grad(loss, matrices)
        for p, g in zip(matrices, grads):
            p.grad = g
        optimizer.step()
    assert min_norm(data, policy, BETA)[0] < 0.3 * before
