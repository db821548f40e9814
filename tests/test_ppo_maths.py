"""test_ppo_maths.py - PPO's pieces against verl's stored values and by hand: token rewards, GAE, both losses, Noon."""
import math

import pytest
import torch
import torch.nn.functional as F

from objectives import gae, kl_penalized_rewards, masked_mean, noon, ppo_policy_loss, ppo_value_loss

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.float64)       # B = 3, L = 4, 7 tokens


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensor(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.fixture
def o(oracle):
    """The oracle's arrays, and its coefficients by name."""
    arrays = oracle("ppo")
    return arrays | dict(zip(("beta", "gamma", "lam", "eps", "eps_v"), arrays["params"].tolist()))


# ---- means ----

def test_masked_mean_is_over_the_whole_batch():
    x = tensor([1, 2, 3, 6], [5, 1, 9, 9], [10, 7, 7, 7])
    assert masked_mean(x, MASK) == 4                                     # 28 / 7
    assert masked_mean(x, MASK) != ((x * MASK).sum(1) / MASK.sum(1)).mean()              # wrong: each row's mean first
    assert masked_mean(x, MASK) != (x * MASK).mean()                     # wrong: padding counted as zeros


# ---- token rewards ----

def test_token_rewards_equal_the_oracle(o, close):
    arguments = (o["score"], o["old_logp"], o["ref_logp"], o["mask"], o["beta"])
    rewards = kl_penalized_rewards(*arguments)
    assert close(rewards, o["token_rewards"], 1e-12)
    without = kl_penalized_rewards(o["score"] * 0, *arguments[1:])
    assert close(without, -o["beta"] * o["kl_k1"] * o["mask"], 1e-12)
    # wrong: the other sign; k2 or k3 instead of k1; the score one token late where there is room
    other_sign = kl_penalized_rewards(o["score"], o["ref_logp"], o["old_logp"], o["mask"], o["beta"])
    late = without.index_put((torch.arange(5), o["lengths"].clamp(max=9)), o["score"], accumulate=True)
    wrong = [other_sign, late, *(rewards + (o["kl_k1"] - o[k]) * o["mask"] * o["beta"] for k in ("kl_k2", "kl_k3"))]
    assert not any(close(w, o["token_rewards"], 0.005) for w in wrong)


def test_token_rewards_by_hand(close):
    logp = tensor([-1, -2, -3, -4], [-1, -1, 9, 9], [-2, 9, 9, 9])
    ref = tensor([-2, -2, -2, -2], [-1, -3, 5, 5], [-1, 5, 5, 5])
    rewards = kl_penalized_rewards(tensor(10, 20, 30), logp, ref, MASK, 0.5)
    assert close(rewards, tensor([-0.5, 0, 0.5, 11], [0, 19, 0, 0], [30.5, 0, 0, 0]), 1e-12)


def test_every_column_of_token_rewards_carries_the_whole_kl(close):
    score, logp, ref, lam = normal(3, 2), normal(3, 4, seed=1), normal(3, 4, seed=2), tensor(0.3, 0.7)
    rewards = kl_penalized_rewards(score, logp, ref, MASK, 0.1)
    assert rewards.shape == (3, 4, 2)
    for i in range(2):
        assert close(rewards[..., i], kl_penalized_rewards(score[:, i], logp, ref, MASK, 0.1), 1e-12)
    assert close(rewards @ lam, kl_penalized_rewards(score @ lam, logp, ref, MASK, 0.1), 1e-12)   # one KL, not two
    assert not close(rewards.sum(-1), kl_penalized_rewards(score.sum(-1), logp, ref, MASK, 0.1), 0.01)


def test_token_rewards_are_clamped_after_adding():
    logp, ref, ones = tensor([4, 1]), tensor([0, 0]), torch.ones(1, 2)
    rewards = lambda score, **more: kl_penalized_rewards(tensor(score), logp, ref, ones, 1.0, **more).tolist()
    assert rewards(10) == [[-4, 9]]
    assert rewards(10, clip_range_score=3) == [[-3, 3]]                  # wrong: the score clamped first, 3 − 1 = 2
    assert rewards(-10, clip_range_score=3) == [[-3, -3]]                # wrong: −3 − 1; and the KL of others unclamped


# ---- advantages ----

def test_advantages_and_returns_equal_the_oracle(o, close):
    advantages, returns = gae(o["token_rewards"], o["values"], o["mask"], o["gamma"], o["lam"])
    assert close(advantages, o["advantages"], 1e-12) and close(returns, o["returns"], 1e-12)
    assert not close(advantages, o["advantages_whitened"], 0.01)         # wrong: whitened
    # wrong: no discount; λ = 1; values of padding taken for the value after the last token
    for gamma, lam in [(1.0, o["lam"]), (o["gamma"], 1.0)]:
        assert not close(gae(o["token_rewards"], o["values"], o["mask"], gamma, lam)[0], o["advantages"], 0.01)
    leaky = gae(o["token_rewards"], o["values"], torch.ones_like(o["mask"]), o["gamma"], o["lam"])[0] * o["mask"]
    assert not close(leaky, o["advantages"], 0.01)


def test_gae_by_hand(close):
    rewards, values = tensor([0, 0, 8]), tensor([1, 2, 4])
    advantages, returns = gae(rewards, values, torch.ones(1, 3), gamma=0.5, lam=0.5)
    # δ = (0 + 1 − 1, 0 + 2 − 2, 8 + 0 − 4) = (0, 0, 4), and γλ = 1/4
    assert close(advantages, tensor([0.25, 1, 4]), 1e-12) and close(returns, tensor([1.25, 3, 8]), 1e-12)


def test_gae_at_its_ends(close):
    rewards, values = normal(3, 4) * MASK, normal(3, 4, seed=1)
    after = F.pad((values * MASK)[:, 1:], (0, 1))
    td_error = (rewards + 0.9 * after - values) * MASK
    assert close(gae(rewards, values, MASK, 0.9, 0.0)[0], td_error, 1e-12)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    advantages, returns = gae(rewards, values, MASK, 1.0, 1.0)    # Monte Carlo: the returns are the rewards to go
    assert close(returns, to_go * MASK, 1e-12) and close(advantages, (to_go - values) * MASK, 1e-12)


def test_gae_of_n_values_is_gae_of_each_and_is_linear(close):
    rewards, values, lam = normal(3, 4, 5), normal(3, 4, 5, seed=1), normal(5, seed=2).softmax(0)
    together = gae(rewards, values, MASK, 0.9, 0.8)
    for i in range(5):
        alone = gae(rewards[..., i], values[..., i], MASK, 0.9, 0.8)
        assert all(close(t[..., i], a, 1e-12) for t, a in zip(together, alone))
    summed = gae(rewards @ lam, values @ lam, MASK, 0.9, 0.8)            # LS of advantages = advantages of LS
    assert all(close(t @ lam, s, 1e-12) for t, s in zip(together, summed))


def test_padding_has_no_part_in_advantages():
    rewards, values = normal(3, 4), normal(3, 4, seed=1)
    noise = (1 - MASK) * 100 * normal(3, 4, seed=2)
    clean, noisy = gae(rewards * MASK, values, MASK), gae(rewards + noise, values + noise, MASK)
    for a, b in zip(clean, noisy):
        assert torch.equal(a, b) and (a * (1 - MASK) == 0).all() and (a[MASK.bool()] != 0).all()
    cut = gae(rewards[1:2, :2], values[1:2, :2], MASK[1:2, :2])          # the row of two tokens by itself
    assert torch.equal(cut[0], clean[0][1:2, :2]) and torch.equal(cut[1], clean[1][1:2, :2])


# ---- the policy's loss ----

def test_policy_loss_equals_the_oracle(o, close):
    logp = o["new_logp"].requires_grad_(True)
    arguments = (logp, o["old_logp"], o["advantages_whitened"], o["mask"])
    loss, clipped, kl = ppo_policy_loss(*arguments, o["eps"])
    (gradient,) = torch.autograd.grad(loss, logp)
    # the oracle divides by the number of tokens + 1e-8
    assert close(loss, o["policy_loss"], 1e-8) and close(gradient, o["grad_policy"], 1e-8)
    assert close(clipped, o["policy_clipfrac"], 1e-8) and not clipped.requires_grad and not kl.requires_grad
    assert close(kl, masked_mean(o["old_logp"] - o["new_logp"], o["mask"]), 1e-12)
    # wrong: no clip; another ε; the larger of the two; a row's mean first; advantages that are not whitened
    ratio, A = (o["new_logp"] - o["old_logp"]).exp(), o["advantages_whitened"]
    larger = -masked_mean(torch.maximum(ratio * A, ratio.clamp(1 - o["eps"], 1 + o["eps"]) * A), o["mask"])
    token = torch.minimum(ratio * A, ratio.clamp(1 - o["eps"], 1 + o["eps"]) * A) * o["mask"]
    wrong = [ppo_policy_loss(*arguments, 1e9)[0], ppo_policy_loss(*arguments, 0.1)[0], larger,
             -(token.sum(1) / o["mask"].sum(1)).mean(),
             ppo_policy_loss(logp, o["old_logp"], o["advantages"], o["mask"], o["eps"])[0]]
    assert not any(close(w, o["policy_loss"], 0.01) for w in wrong)


@pytest.mark.parametrize("ratio, advantage, loss, slope, active", [
    (1.5, 1.0, -1.2, 0, 1), (1.5, -1.0, 1.5, 1.5, 0),                    # up: pays to 1 + ε; punishes without end
    (0.5, 1.0, -0.5, -0.5, 0), (0.5, -1.0, 0.8, 0, 1),                   # down: the other way round
    (1.1, 2.0, -2.2, -2.2, 0), (0.9, -2.0, 1.8, 1.8, 0)])                # inside: not clipped
def test_policy_loss_of_one_token_by_hand(ratio, advantage, loss, slope, active):
    logp = tensor([math.log(ratio) - 3]).requires_grad_(True)
    value, clipped, kl = ppo_policy_loss(logp, tensor([-3]), tensor([advantage]), torch.ones(1, 1), 0.2)
    assert value.item() == pytest.approx(loss) and clipped == active and kl.item() == pytest.approx(-math.log(ratio))
    assert torch.autograd.grad(value, logp)[0].item() == pytest.approx(slope, abs=1e-12)     # d ρ / d log π = ρ


def test_before_any_step_the_loss_is_minus_the_mean_advantage(close):
    logp, advantages = normal(3, 4).requires_grad_(True), normal(3, 4, seed=1)
    loss, clipped, kl = ppo_policy_loss(logp, logp.detach(), advantages, MASK)
    assert close(loss, -masked_mean(advantages, MASK), 1e-12) and clipped == 0 and kl == 0
    assert close(torch.autograd.grad(loss, logp)[0], -advantages * MASK / 7, 1e-12)          # −A ∇ log π, padding 0


def test_padding_has_no_part_in_the_losses():
    noise = (1 - MASK) * 1000 * normal(3, 4, seed=9)                     # log-ratios beyond 20 among them
    inputs = [normal(3, 4, seed=s) for s in range(3)]
    for loss in (lambda *x: ppo_policy_loss(*x, MASK)[0], lambda *x: ppo_value_loss(*x, MASK, 0.3)):
        assert torch.equal(loss(*inputs), loss(*[x + noise for x in inputs]))
        x = (inputs[0] + noise).requires_grad_(True)
        gradient = torch.autograd.grad(loss(x, *inputs[1:]), x)[0]
        assert (gradient * (1 - MASK) == 0).all() and gradient.abs().sum() > 0.01
    figures = [ppo_policy_loss(inputs[0] + n, *inputs[1:], MASK)[1:] for n in (0, noise)]
    assert figures[0] == figures[1] and figures[0][0] > 0


def test_policy_loss_does_not_overflow():
    logp = tensor([0, -3000.0]).requires_grad_(True)
    loss, _, _ = ppo_policy_loss(logp, tensor([-3000, 0.0]), tensor([-1, -1]), torch.ones(1, 2))
    assert loss.isfinite() and torch.autograd.grad(loss, logp)[0].isfinite().all()


# ---- the critic's loss ----

def test_value_loss_equals_the_oracle(o, close):
    values = o["vpred"].requires_grad_(True)
    loss = ppo_value_loss(values, o["values"], o["returns"], o["mask"], o["eps_v"])
    (gradient,) = torch.autograd.grad(loss, values)
    assert close(loss, o["value_loss"], 1e-8) and close(gradient, o["grad_value"], 1e-8)
    # wrong: no clip; no ½; the smaller of the two; a clip around the returns
    clip = lambda x, centre: centre + (x - centre).clamp(-o["eps_v"], o["eps_v"])
    squares = [(values - o["returns"]).square(), (clip(values, o["values"]) - o["returns"]).square()]
    wrong = [ppo_value_loss(values, o["values"], o["returns"], o["mask"], 1e9), 2 * loss,
             0.5 * masked_mean(torch.minimum(*squares), o["mask"]),
             ppo_value_loss(values, o["returns"], o["returns"], o["mask"], o["eps_v"])]
    assert not any(close(w, o["value_loss"], 0.01) for w in wrong)


@pytest.mark.parametrize("value, old, goal, loss, slope", [
    (1.0, 0.0, 3.0, 3.125, 0),                   # clipped to 0.5: the error 2.5 counts and nothing pulls further
    (1.0, 0.0, -3.0, 8.0, 4.0),                  # clipping would hide a step in the wrong direction: 4, not 3.5
    (0.25, 0.0, 3.0, 3.78125, -2.75)])           # inside the range
def test_value_loss_of_one_token_by_hand(value, old, goal, loss, slope):
    value = tensor([value]).requires_grad_(True)
    result = ppo_value_loss(value, tensor([old]), tensor([goal]), torch.ones(1, 1), 0.5)
    assert result.item() == loss and torch.autograd.grad(result, value)[0].item() == slope


def test_value_loss_of_n_heads_is_the_mean_over_heads(close):
    values, old, returns = (normal(3, 4, 5, seed=s) for s in range(3))
    alone = [ppo_value_loss(values[..., i], old[..., i], returns[..., i], MASK, 0.3) for i in range(5)]
    assert close(ppo_value_loss(values, old, returns, MASK, 0.3), torch.stack(alone).mean(), 1e-12)


def test_gradients_against_finite_differences():
    x, old, A, G = (normal(3, 4, seed=s) for s in range(4))
    x.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: ppo_policy_loss(x, old, A, MASK)[0], x)
    assert torch.autograd.gradcheck(lambda x: ppo_value_loss(x, old, G, MASK, 0.3), x)


# ---- Noon ----

def test_noon_by_hand():
    advantages, ratio = tensor([2, -1, 3, 0.5], [1, 1, 1, 1]), tensor([1, 1, 1.21, 0.1], [1.2, 1.3, 0.7, 1.19])
    assert noon(advantages, ratio).tolist() == [[2, 0, 0, 0.5], [1, 0, 1, 1]]
    # wrong: a clip on both sides loses the tokens below 1 − ε; clamping the ratio alone keeps the negative one
    assert noon(advantages, ratio, 0.3).tolist() == [[2, 0, 3, 0.5], [1, 1, 1, 1]]
    assert torch.equal(advantages, tensor([2, -1, 3, 0.5], [1, 1, 1, 1]))                  # its argument is not changed


def test_noon_of_n_objectives_shares_one_mask():
    advantages, ratio = normal(3, 4, 5), 1 + 0.5 * normal(3, 4, seed=1)
    together = noon(advantages, ratio)
    for i in range(5):
        assert torch.equal(together[..., i], noon(advantages[..., i], ratio))
    assert (together >= 0).all() and ((together > 0) == (advantages > 0) & (ratio <= 1.2)[..., None]).all()


def test_noon_is_what_the_clipped_objective_keeps(close):
    # with A >= 0 the gradient of PPO's loss for log π is −I(A) ρ / tokens: the lower clip never binds
    old, logp = normal(3, 4), (normal(3, 4) + 0.4 * normal(3, 4, seed=1)).requires_grad_(True)
    A, ratio = normal(3, 4, seed=2), (logp - old).exp().detach()
    gradient = torch.autograd.grad(ppo_policy_loss(logp, old, A.clamp(min=0), MASK)[0], logp)[0]
    assert close(gradient, -noon(A, ratio) * ratio * MASK / 7, 1e-12) and (ratio[MASK.bool()] < 0.8).any()
    signed = torch.autograd.grad(ppo_policy_loss(logp, old, A, MASK)[0], logp)[0]
    assert not close(signed, gradient, 0.01)
