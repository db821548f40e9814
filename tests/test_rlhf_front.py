"""test_rlhf_front.py - the exact RLHF front in closed form, and WorldRewards, which measures policies against it."""
import math

import pytest
import torch

from fronts import measure
from aggregate import simplex_lattice
from data import toy
from fronts.optimum import rlhf_front, rlhf_objectives, with_outside
from data.tokenizers import load_tokenizer, tokenize
from data.trees import batch_logprobs
from model import Config, Transformer
from data.rewards import Rewards, world_rewards

BETA = 0.4
AGGREGATES = {"ls": {}, "tche": {}, "smooth": {"smooth": 0.3}}
SLOTS = dict(OPENINGS=("plain", "formal", "joke", "warm"), BODIES=("full", "hint", "safer", "refuse"),
             CAUTIONS=("none",), CLOSINGS=("none", "cheer"))


def problem(X=3, O=7, m=3, seed=0):
    """Random log π_ref (X, O) and rewards (X, O, m), the last outcome the worst, and ideal rewards z above all."""
    g = torch.Generator().manual_seed(seed)
    ref = (1.5 * torch.randn(X, O, generator=g, dtype=torch.float64)).log_softmax(-1)
    rewards = torch.randn(X, O, m, generator=g, dtype=torch.float64)
    rewards[:, -1] = -2.5
    return ref, rewards, rewards.amax((0, 1)) + 0.2


def one_reward(rewards, lam, z, aggregate, smooth=0.0):
    """R_λ by the papers' formulas. (X, O, m) -> (X, O)"""
    if aggregate == "ls":
        return sum(w * rewards[..., i] for i, w in enumerate(lam.tolist()))
    short = torch.stack([w * (z[i] - rewards[..., i]) for i, w in enumerate(lam.tolist())])
    return -short.amax(0) if not smooth else -smooth * (short / smooth).exp().sum(0).log()


def front(lams, ref, rewards, z, aggregate):
    return rlhf_front(lams, rewards, ref, BETA, "ls" if aggregate == "ls" else "tche", z, **AGGREGATES[aggregate])


def soft_value(R, ref):
    """The largest possible E R − β KL: β log Σ π_ref exp(R / β), the mean over prompts."""
    return BETA * (ref.exp() * (R / BETA).exp()).sum(-1).log().mean()


def shrink(monkeypatch, every, **slots):
    """Cuts the embedded world down, for as long as monkeypatch lasts: each `every`-th prompt of a split, and of each
    slot the options given. Call toy._world.cache_clear() after monkeypatch.undo()."""
    prompts, probs = toy.prompts, toy.base_probs
    for name, kept in slots.items():
        monkeypatch.setattr(toy, name, {key: getattr(toy, name)[key] for key in kept})
    monkeypatch.setattr(toy, "N_RESPONSES", math.prod(map(len, slots.values())))
    monkeypatch.setattr(toy, "prompts", lambda split: prompts(split)[::every[split]])
    monkeypatch.setattr(toy, "base_probs", lambda prompt: probs(prompt) / probs(prompt).sum())
    toy._world.cache_clear()


# ---- the closed form ----

def test_with_outside_by_hand():
    logps = torch.tensor([[0.5, 0.2], [0.25, 0.75]], dtype=torch.float64).log()
    p = with_outside(logps).exp()
    assert torch.allclose(p[0], torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64), atol=1e-12)
    assert torch.equal(with_outside(logps)[:, :2], logps)                # wrong: renormalised to the set
    assert p[1, 2] <= 1e-11 and with_outside(logps + 1e-7).isfinite().all()          # rounding above 1 does no harm


def test_objectives_against_a_loop(close):
    ref, rewards, _ = problem()
    logps = problem(seed=1)[0]
    J, kl = rlhf_objectives(torch.stack([logps, ref]), ref, rewards, BETA)
    by_hand = torch.zeros(3, dtype=torch.float64)
    total = sum(math.exp(logps[x, o]) * (logps[x, o] - ref[x, o]).item() for x in range(3) for o in range(7)) / 3
    for i in range(3):
        gain = sum(math.exp(logps[x, o]) * rewards[x, o, i] for x in range(3) for o in range(7)) / 3
        by_hand[i] = gain - BETA * total
    assert close(J[0], by_hand, 1e-12) and kl[0].item() == pytest.approx(total, rel=1e-12) and total > 0.1
    assert kl[1].abs() < 1e-12 and close(J[1], (ref.exp()[..., None] * rewards).sum(1).mean(0), 1e-12)
    assert not close(J[0], by_hand + BETA * total * 2 / 3, 1e-2)         # wrong: a third of the KL to each


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_the_optimal_value_is_the_soft_maximum(aggregate):
    ref, rewards, z = problem()
    lams = torch.cat([simplex_lattice(3, 4), torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64)])
    J, logps = front(lams, ref, rewards, z, aggregate)
    assert J.shape == (16, 3) and logps.shape == (16, 3, 7)
    assert (logps.exp().sum(-1) - 1).abs().max() < 1e-12
    kl = rlhf_objectives(logps, ref, rewards, BETA)[1]
    of_means = 0
    for n, lam in enumerate(lams):
        R = one_reward(rewards, lam, z, aggregate, **AGGREGATES[aggregate])
        value = (logps[n].exp() * R).sum(-1).mean() - BETA * kl[n]
        assert value.item() == pytest.approx(soft_value(R, ref).item(), rel=1e-10)
        if aggregate == "ls":
            assert (lam @ J[n]).item() == pytest.approx(value.item(), rel=1e-10)     # λ sums to 1: one whole KL
        mean_r = (logps[n].exp()[..., None] * rewards).sum(1).mean(0)
        of_means += -(lam * (z - mean_r)).amax() - BETA * kl[n] > value + 0.01
    assert aggregate == "ls" or of_means >= 10           # wrong: the maximum outside of the expectation


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_numerical_optimisation_finds_the_same_policy(aggregate, close):
    ref, rewards, z = problem(seed=2)
    lam = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    J, logps = front(lam, ref, rewards, z, aggregate)
    R = one_reward(rewards, lam[0], z, aggregate, **AGGREGATES[aggregate])
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_(True)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-10, tolerance_change=0,
                                  line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        policy = logits.log_softmax(-1)
        value = -(policy.exp() * (R - BETA * (policy - ref))).sum(-1).mean()
        value.backward()
        return value

    optimizer.step(loss)
    found = logits.detach().log_softmax(-1)
    assert close(found.exp(), logps[0].exp(), 1e-5)
    assert close(rlhf_objectives(found, ref, rewards, BETA)[0], J[0], 1e-6)
    other = {"ls": "tche", "tche": "smooth", "smooth": "tche"}[aggregate]            # wrong: another aggregation …
    assert not close(found.exp(), front(lam, ref, rewards, z, other)[1][0].exp(), 1e-2)
    assert not close(found.exp(), (ref + R).softmax(-1), 1e-2)                       # … and β left out


def test_no_policy_beats_the_front():
    ref, rewards, _ = problem()
    lams = simplex_lattice(3, 4)
    J, logps = rlhf_front(lams, rewards, ref, BETA)
    best = (lams * J).sum(1)
    g = torch.Generator().manual_seed(5)
    for size in (1e-2, 0.3, 3.0):                        # neighbours of every optimum, and far from it
        noise = size * torch.randn(40, *logps.shape, generator=g, dtype=torch.float64)
        others = rlhf_objectives((logps + noise).log_softmax(-1), ref, rewards, BETA)[0]
        assert ((others * lams).sum(-1) < best).all()
    assert (lams @ J.T <= best[:, None] + 1e-12).all()   # nor does another λ's optimum
    assert (J[:, None] > J[None]).all(-1).sum() == 0     # none dominates another


def test_vertices(close):
    ref, rewards, _ = problem()
    J, logps = rlhf_front(torch.eye(3), rewards, ref, BETA)
    every = rlhf_front(simplex_lattice(3, 10), rewards, ref, BETA)[0]
    for i in range(3):
        p = ref.exp() * (rewards[..., i] / BETA).exp()
        assert close(logps[i].exp(), p / p.sum(-1, keepdim=True), 1e-12)
        assert J[i, i] >= every[:, i].max() - 1e-12 and J[i, i] > J[(i + 1) % 3, i] + 0.1


def test_any_other_text_is_an_outcome():
    """Half of the mass lies outside: the optimum takes most of it away, and pays KL for that."""
    inside, rewards, _ = problem()
    ref = with_outside(inside[:, :-1].log_softmax(-1) + math.log(0.5))
    lam = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    J, logps = rlhf_front(lam, rewards, ref, BETA)
    R = rewards @ lam[0]
    Z = (ref.exp() * (R / BETA).exp()).sum(-1)
    assert torch.allclose(logps[0, :, -1].exp(), 0.5 * (R[:, -1] / BETA).exp() / Z, rtol=1e-10)
    assert 0 < logps[0, :, -1].exp().max() < 0.02
    # wrong: renormalised to the set, where the same policy seems to cost nothing for leaving the other texts
    narrow, _ = rlhf_front(lam, rewards[:, :-1], ref[:, :-1].log_softmax(-1), BETA)
    assert (narrow - J).min() > 0.9 * BETA * math.log(2)


def test_the_kl_of_lumped_outcomes_is_a_lower_bound_and_exact_at_the_optimum():
    g = torch.Generator().manual_seed(6)
    ref = torch.randn(4, 20, generator=g, dtype=torch.float64).log_softmax(-1)
    policy = torch.randn(50, 4, 20, generator=g, dtype=torch.float64).log_softmax(-1)
    rewards = torch.cat([torch.randn(4, 8, 2, generator=g, dtype=torch.float64),
                         torch.full((4, 12, 2), -1.5, dtype=torch.float64)], dim=1)  # the last 12 share one reward
    lump = lambda logps: with_outside(logps[..., :8])
    few = rewards[:, :9]
    J, kl = rlhf_objectives(policy, ref, rewards, BETA)
    J_lumped, kl_lumped = rlhf_objectives(lump(policy), lump(ref), few, BETA)
    assert (kl_lumped < kl - 0.01).all() and (kl_lumped > 0).all()
    assert torch.allclose(J_lumped + BETA * kl_lumped[:, None], J + BETA * kl[:, None], atol=1e-10)  # E r is the same
    lams = simplex_lattice(2, 5)
    lumped = rlhf_front(lams, few, lump(ref), BETA)[0]
    assert torch.allclose(lumped, rlhf_front(lams, rewards, ref, BETA)[0], atol=1e-10)


def test_the_front_is_monotone_in_the_preference():
    ref, rewards, _ = problem(m=2)
    J, logps = rlhf_front(simplex_lattice(2, 20), rewards, ref, BETA)                # λ_0 ascending
    assert (J[:, 0].diff() > 0).all() and (J[:, 1].diff() < 0).all()
    kl = torch.stack([rlhf_objectives(rlhf_front(torch.tensor([[0.5, 0.5]]), rewards, ref, b)[1], ref, rewards, b)[1][0]
                      for b in (0.1, 0.4, 1.6)])
    assert (kl.diff() < 0).all()                         # a larger β keeps the policy nearer to its reference


# ---- WorldRewards on a small world ----

@pytest.fixture(scope="module")
def small():
    """A world of 2 prompts, one of them risky, and 32 responses; a tiny base model that knows it roughly."""
    patch = pytest.MonkeyPatch()
    shrink(patch, dict(train=80, eval=23), **SLOTS)
    tokenizer = load_tokenizer("toy")
    prompts = toy.prompts("eval")
    assert [toy._tasks()[x][0].risky for x in prompts] == [False, True]
    config = Config(tokenizer.vocab_size, 64, n_layer=2, n_head=2, d_model=32)
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    (batch,) = measure.world_batches(prompts, tokenizer, "cpu")
    probs = torch.stack([toy.base_probs(x) for x in prompts]).float()
    for _ in range(120):
        loss = -(probs * batch_logprobs(model, batch).view(2, 32)).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    raw = world_rewards(["helpful", "harmless"], None).raw
    rewards = Rewards(["helpful", "harmless"], raw, [0.3, -0.2], [1.5, 2.0], [1.0, 3.0])
    yield model, rewards, tokenizer
    patch.undo()
    toy._world.cache_clear()


def world(small):
    """A fresh WorldRewards, the base measured, and a policy that differs from the base."""
    model, rewards, tokenizer = small
    data = measure.WorldRewards(rewards, tokenizer, "cpu")
    data.reference(model)
    policy = Transformer(model.config)
    g = torch.Generator().manual_seed(1)
    policy.load_state_dict({k: v + 0.01 * torch.randn(v.shape, generator=g) for k, v in model.state_dict().items()})
    return data, policy


def by_loops(policy, model, small):
    """J (m,), mean scores (m,), KL and outside mass, one response after the other: the gradient reaches the policy."""
    _, rewards, tokenizer = small
    J, scores, kl, outside = [0.0, 0.0], [0.0, 0.0], 0.0, 0.0
    prompts = toy.prompts("eval")
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
            inside = sum(p.exp() * s[i].item() for p, s in zip(logps["pi"][:-1], raw))
            scores[i] += (inside / sum(p.exp() for p in logps["pi"][:-1])).item() / len(prompts)
    return torch.stack(J), scores, kl, outside


def test_the_base_has_no_kl_and_its_mean_reward(small):
    data, _ = world(small)
    got = data.measure(small[0], BETA)
    assert got["kl"] == got["kl_all"] == 0 and 0.02 < got["outside_mass"] < 0.6
    for J, ref, r in ((got["J"], data.ref, data.r), (got["J_all"], data.ref_all, data.r_all)):
        assert torch.allclose(ref.exp().sum(-1), torch.ones(2, dtype=torch.float64))
        assert J == pytest.approx((ref.exp()[..., None] * r).sum(1).mean(0).tolist(), rel=1e-9)
    assert (data.r_all[:, -1] < data.r.amin((0, 1))).all()               # "any other text" is the worst there is


def test_measure_equals_a_loop_over_responses(small):
    data, policy = world(small)
    got = data.measure(policy, BETA)
    J, scores, kl, outside = by_loops(policy, small[0], small)
    assert got["J_all"] == pytest.approx(J.tolist(), rel=1e-4)
    assert got["scores"] == pytest.approx(scores, rel=1e-4)              # of the world's responses, in raw units
    assert got["kl_all"] == pytest.approx(kl.item(), rel=1e-3) and kl > 0.05
    assert got["outside_mass"] == pytest.approx(outside.item(), rel=1e-3)
    narrow = small[1].normalise(torch.tensor(got["scores"]))             # over the world's own responses alone
    assert (torch.tensor(got["J"]) + BETA * got["kl"]).tolist() == pytest.approx(narrow.tolist(), rel=1e-5)
    free = torch.tensor(got["J_all"]) + BETA * got["kl_all"]             # wrong: the one for the other
    assert ((free - narrow).abs() > 0.05 * narrow.abs()).all()


def test_no_policy_is_measured_above_the_exact_front(small):
    data, policy = world(small)
    lams = simplex_lattice(2, 10)
    for key, r, ref in (("J", data.r, data.ref), ("J_all", data.r_all, data.ref_all)):
        J, logps = rlhf_front(lams, r, ref, BETA)
        for net in (policy, small[0]):
            reached = torch.tensor(data.measure(net, BETA)[key], dtype=torch.float64)
            assert (lams @ reached < (lams * J).sum(1) - 0.01).all()
        assert torch.allclose(rlhf_objectives(logps, ref, r, BETA)[0], J)


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
    data.batches = measure.world_batches(toy.prompts("eval"), small[2], "cpu", rows=rows)
    assert len(data.batches) == (1 if rows == 40 else 2)
    norm, c, single = data.stationarity(policy, BETA)
    G, matrices = gradients(policy, small)
    assert close(single, G.norm(dim=1), 1e-3) and min(single) > 0.01
    # the gradients themselves, by finite differences along a random direction
    direction = torch.randn(G.shape[1], generator=torch.Generator().manual_seed(2)).double()
    moved, eps = [], 1e-3
    for sign in (1, -2):                                                 # to +ε, and from there to −ε
        with torch.no_grad():
            for p, step in zip(matrices, direction.split([p.numel() for p in matrices])):
                p += sign * eps * step.view(p.shape)
        moved.append(torch.tensor(data.measure(policy, BETA)["J_all"]).double())
    assert close((moved[0] - moved[1]) / (2 * eps), G @ direction, 0.02)
    # c solves the problem: no other mixture of the gradients is shorter
    mixtures = (simplex_lattice(2, 1000) @ G).norm(dim=1)
    mixed = (torch.tensor(c, dtype=torch.float64) @ G).norm().item()
    assert norm <= mixtures.min() * (1 + 1e-3) and norm == pytest.approx(mixed, rel=1e-3)
    assert min(c) >= 0 and sum(c) == pytest.approx(1) and norm < 0.9 * mixtures[500]     # wrong: equal weights


def test_stationarity_falls_towards_the_front(small):
    data, policy = world(small)
    before, *_ = data.stationarity(policy, BETA)
    matrices = [p for p in policy.blocks.parameters() if p.ndim == 2]
    optimizer = torch.optim.Adam(matrices, lr=3e-3)
    (batch,) = data.batches
    for step in range(80):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 80)
        logps = with_outside(batch_logprobs(policy, batch).double().view(2, 32))
        loss = -rlhf_objectives(logps, data.ref_all, data.r_all, BETA)[0].mean()
        grads = torch.autograd.grad(loss, matrices)
        for p, g in zip(matrices, grads):
            p.grad = g
        optimizer.step()
    assert data.stationarity(policy, BETA)[0] < 0.3 * before
