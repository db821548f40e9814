"""test_optimum_rlhf.py - the exact RLHF front in closed form."""
import math

import pytest
import torch

from aggregate import simplex_lattice
from fronts.optimum import rlhf_closed_form, rlhf_objectives, with_outside

BETA = 0.4
AGGREGATES = ("ls", "tche")


def problem(X=3, O=7, m=3, seed=0):
    """Random log π_ref (X, O) and rewards (X, O, m), the last outcome the worst, and ideal rewards z above all."""
    g = torch.Generator().manual_seed(seed)
    ref = (1.5 * torch.randn(X, O, generator=g, dtype=torch.float64)).log_softmax(-1)
    rewards = torch.randn(X, O, m, generator=g, dtype=torch.float64)
    rewards[:, -1] = -2.5
    return ref, rewards, rewards.amax((0, 1)) + 0.2


def one_reward(rewards, lam, z, aggregate):
    """R_λ by the papers' formulas. (X, O, m) -> (X, O)"""
    if aggregate == "ls":
        return sum(w * rewards[..., i] for i, w in enumerate(lam.tolist()))
    short = torch.stack([w * (z[i] - rewards[..., i]) for i, w in enumerate(lam.tolist())])
    return -short.amax(0)


def front(lams, ref, rewards, z, aggregate):
    return rlhf_closed_form(lams, rewards, ref, BETA, aggregate, z)


def soft_value(R, ref):
    """The largest possible E R − β KL: β log Σ π_ref exp(R / β), the mean over prompts."""
    return BETA * (ref.exp() * (R / BETA).exp()).sum(-1).log().mean()


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
        R = one_reward(rewards, lam, z, aggregate)
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
    R = one_reward(rewards, lam[0], z, aggregate)
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
    other = {"ls": "tche", "tche": "ls"}[aggregate]                      # wrong: another aggregation …
    assert not close(found.exp(), front(lam, ref, rewards, z, other)[1][0].exp(), 1e-2)
    assert not close(found.exp(), (ref + R).softmax(-1), 1e-2)                       # … and β left out


def test_no_policy_beats_the_front():
    ref, rewards, _ = problem()
    lams = simplex_lattice(3, 4)
    J, logps = rlhf_closed_form(lams, rewards, ref, BETA)
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
    J, logps = rlhf_closed_form(torch.eye(3), rewards, ref, BETA)
    every = rlhf_closed_form(simplex_lattice(3, 10), rewards, ref, BETA)[0]
    for i in range(3):
        p = ref.exp() * (rewards[..., i] / BETA).exp()
        assert close(logps[i].exp(), p / p.sum(-1, keepdim=True), 1e-12)
        assert J[i, i] >= every[:, i].max() - 1e-12 and J[i, i] > J[(i + 1) % 3, i] + 0.1


def test_any_other_text_is_an_outcome():
    """Half of the mass lies outside: the optimum takes most of it away, and pays KL for that."""
    inside, rewards, _ = problem()
    ref = with_outside(inside[:, :-1].log_softmax(-1) + math.log(0.5))
    lam = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    J, logps = rlhf_closed_form(lam, rewards, ref, BETA)
    R = rewards @ lam[0]
    Z = (ref.exp() * (R / BETA).exp()).sum(-1)
    assert torch.allclose(logps[0, :, -1].exp(), 0.5 * (R[:, -1] / BETA).exp() / Z, rtol=1e-10)
    assert 0 < logps[0, :, -1].exp().max() < 0.02
    # wrong: renormalised to the set, where the same policy seems to cost nothing for leaving the other texts
    narrow, _ = rlhf_closed_form(lam, rewards[:, :-1], ref[:, :-1].log_softmax(-1), BETA)
    assert (narrow - J).min() > 0.9 * BETA * math.log(2)


def mixed(logps, ref, lam, A=1.0):
    """log_softmax(log π_ref + A Σ λ_i (log π_i − log π_ref)) over the last axis: MOD (ops/generation.py: Mixture)."""
    return (ref + A * sum(w * (logp - ref) for w, logp in zip(lam, logps))).log_softmax(-1)


def test_mixed_optimal_specialists_are_the_optimum_of_linear_scalarisation():
    """As distributions over whole responses; with the factor A it is the optimum for β / A."""
    ref, rewards, _ = problem()
    lam = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    _, specialists = rlhf_closed_form(torch.eye(3), rewards, ref, BETA)
    for A in (1.0, 1.6):
        _, (best,) = rlhf_closed_form(lam[None], rewards, ref, BETA / A)
        assert (mixed(specialists, ref, lam, A) - best).abs().max() < 1e-12
    assert (mixed(specialists, ref, lam) - best).abs().max() > 0.1       # wrong: the factor forgotten
    soup = (lam[:, None, None] * specialists.exp()).sum(0).log()         # wrong: probabilities mixed
    _, (best,) = rlhf_closed_form(lam[None], rewards, ref, BETA)
    assert (soup - best).abs().max() > 0.1


def test_mixed_token_by_token_they_are_not_quite():
    """Responses of two tokens out of three: the second token's normaliser differs from one first token to the next."""
    ref, rewards, _ = problem(X=1, O=9, m=2)
    lam = torch.tensor([0.4, 0.6], dtype=torch.float64)
    _, both = rlhf_closed_form(torch.eye(2), rewards, ref, BETA)
    _, (best,) = rlhf_closed_form(lam[None], rewards, ref, BETA)

    def tokens(logps):                                                   # log π(y_1) (3,), log π(y_2 | y_1) (3, 3)
        first = logps.view(3, 3).logsumexp(1)
        return first, logps.view(3, 3) - first[:, None]

    (r1, r2), (a1, a2), (b1, b2) = tokens(ref), tokens(both[0]), tokens(both[1])
    by_token = mixed((a1, b1), r1, lam)[:, None] + mixed((a2, b2), r2, lam)
    assert abs(by_token.exp().sum().item() - 1) < 1e-12                  # a policy, but another one
    assert (by_token.flatten() - best[0]).abs().max() > 0.01
    second = tokens(best[0])[1]
    assert torch.allclose(mixed((a2, b2), r2, lam), second, atol=1e-12)  # the last token's law is the optimum's


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
    lumped = rlhf_closed_form(lams, few, lump(ref), BETA)[0]
    assert torch.allclose(lumped, rlhf_closed_form(lams, rewards, ref, BETA)[0], atol=1e-10)


def test_the_front_is_monotone_in_the_preference():
    ref, rewards, _ = problem(m=2)
    J, logps = rlhf_closed_form(simplex_lattice(2, 20), rewards, ref, BETA)                # λ_0 ascending
    assert (J[:, 0].diff() > 0).all() and (J[:, 1].diff() < 0).all()
    policy = lambda b: rlhf_closed_form(torch.tensor([[0.5, 0.5]]), rewards, ref, b)[1]
    kl = torch.stack([rlhf_objectives(policy(b), ref, rewards, b)[1][0]
                      for b in (0.1, 0.4, 1.6)])
    assert (kl.diff() < 0).all()                         # a larger β keeps the policy nearer to its reference
