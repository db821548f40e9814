"""test_objectives.py - log-probs, DPO and IPO, PPO's pieces against stored oracles and by hand: values, gradients, and
the wrong forms that they rule out."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from objectives import (
    dpo_loss,
    gae,
    group_advantages,
    implicit_accuracy,
    ipo_loss,
    kl_penalized_rewards,
    losses_on_pairs,
    masked_mean,
    noon,
    ppo_policy_loss,
    ppo_value_loss,
    response_logprobs,
    sft_loss,
    support_loss,
)
from ops.fused import linear_logprob

betas = pytest.mark.parametrize("beta", [0.1, 0.5])


def paths_of(mask):
    """The (B, L) paths of response_logprobs for a (B, T) mask over B·T flat tokens; B·T pads."""
    where = [(b * mask.shape[1] + mask[b].nonzero()[:, 0]).tolist() for b in range(len(mask))]
    longest = max(map(len, where))
    return torch.tensor([w + [mask.numel()] * (longest - len(w)) for w in where])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- log-probs ----

def test_linear_logprob_by_hand():
    hidden, weight = torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([[math.log(3), 0], [0, 0], [0, math.log(2)]])
    logps = linear_logprob(hidden, weight, torch.tensor([0, 2]))         # softmax (3, 1, 1) / 5 and (1, 1, 4) / 6
    assert logps.dtype == torch.float32 and torch.allclose(logps, torch.tensor([3 / 5, 4 / 6]).log(), atol=1e-6)
    assert linear_logprob(hidden.bfloat16(), weight.bfloat16(), torch.tensor([0, 2])).dtype == torch.float32


def test_response_logprobs_by_hand():
    tokens = torch.tensor([-1.0, -2, -4, -8])
    assert response_logprobs(tokens, torch.tensor([[0, 2, 4], [1, 4, 4], [3, 3, 0]])).tolist() == [-5, -2, -17]
    assert sft_loss(torch.tensor([-5.0, -2])).tolist() == [5, 2]


def test_sequence_logprobs_and_gradients_equal_the_oracle(oracle, close):
    o = oracle("seq_logprob")
    hidden = o["hidden"].requires_grad_(True)
    tokens = linear_logprob(hidden[:, :-1].flatten(0, 1), o["head"], o["ids"][:, 1:].flatten())
    mask = o["completion_mask"][:, 1:]
    logps = response_logprobs(tokens, paths_of(mask))
    assert close(tokens.view(4, 8), o["token_logps"], 1e-6) and close(logps, o["seq_logps"], 1e-6)
    (gradient,) = torch.autograd.grad(logps @ torch.tensor([1.0, -2.0, 0.5, 3.0]).to(logps), hidden)
    assert close(gradient, o["grad_hidden_for_weights_1_m2_half_3"], 1e-5)
    predicts = F.pad(mask, (0, 1)).bool()                                # the positions that predict a response token
    assert (gradient[~predicts] == 0).all() and (gradient[predicts].norm(dim=-1) > 0.01).all()
    # wrong: a mean over tokens; the prompt's tokens too; the mask not shifted to the predicting position
    assert not close(o["mean_logps"], o["seq_logps"], 0.1)
    assert not close(response_logprobs(tokens, paths_of(torch.ones_like(mask))), o["seq_logps"], 0.01)
    assert not close(response_logprobs(tokens, paths_of(o["completion_mask"][:, :-1])), o["seq_logps"], 0.01)


def test_gradients_against_finite_differences():
    paths = torch.tensor([[0, 1, 2], [3, 5, 5], [0, 4, 5]])              # a shared token, padding
    assert torch.autograd.gradcheck(lambda x: response_logprobs(x, paths), normal(5).requires_grad_(True))
    pi, ref = [normal(6, 2, seed=s).requires_grad_(True) for s in (1, 2)], [normal(6, 2, seed=s) for s in (3, 4)]
    assert torch.autograd.gradcheck(lambda a, b: dpo_loss(a, b, *ref, 0.7)[0], pi)


# ---- DPO ----

@betas
def test_dpo_equals_the_oracle(oracle, close, beta):
    o = oracle("dpo_loss")
    mask = o["completion_mask"][:, 1:]
    tokens = o["policy_token_logps"].requires_grad_(True)
    pi = response_logprobs(tokens.flatten(), paths_of(mask)).chunk(2)
    ref = response_logprobs(o["ref_token_logps"].flatten(), paths_of(mask)).chunk(2)
    loss, chosen, rejected = dpo_loss(*pi, *ref, beta)
    near = lambda a, key, tolerance=1e-12: close(a, o[f"beta{beta}_{key}"], tolerance)
    assert near(loss, "per_pair_loss") and near(loss.mean(), "loss")
    assert near(chosen.mean(), "chosen_reward_mean") and near(rejected.mean(), "rejected_reward_mean")
    assert implicit_accuracy(chosen, rejected).mean() == o[f"beta{beta}_acc"]
    assert not chosen.requires_grad and not rejected.requires_grad
    (gradient,), everywhere = torch.autograd.grad(loss.mean(), tokens), o[f"beta{beta}_grad_policy_token_logps"]
    assert close(gradient, everywhere * mask, 1e-12)                     # the oracle masks its inputs before the loss
    # wrong: means of log-probs; no reference; chosen and rejected the other way round; another beta
    mean = lambda logps: [x / n for x, n in zip(logps, mask.sum(1).chunk(2))]
    wrong = [dpo_loss(*mean(pi), *mean(ref), beta), dpo_loss(*pi, *map(torch.zeros_like, ref), beta),
             dpo_loss(*pi[::-1], *ref[::-1], beta), dpo_loss(*pi, *ref, 2 * beta)]
    assert not any(near(loss.mean(), "loss", 0.01) for loss, *_ in wrong)


def test_dpo_by_hand():
    loss, chosen, rejected = dpo_loss(*torch.tensor([[-1.0], [-5.0], [-2.0], [-3.0]]), beta=0.5)
    assert chosen.item() == 0.5 and rejected.item() == -1.0              # 0.5·(-1 + 2) and 0.5·(-5 + 3)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1.5)), rel=1e-6)


@betas
def test_dpo_at_the_reference_is_ln_2(close, beta):
    pi = [normal(5, 3, seed=s).requires_grad_(True) for s in (1, 2)]
    loss, chosen, rejected = dpo_loss(*pi, *[x.detach() for x in pi], beta)
    assert torch.allclose(loss, torch.full((5, 3), math.log(2), dtype=torch.float64), atol=1e-12)
    gradients = torch.autograd.grad(loss.sum(), pi)                      # −β σ(0) for the chosen, +β σ(0) for the other
    half = beta / 2 * torch.ones(5, 3, dtype=torch.float64)
    assert close(gradients[0], -half) and close(gradients[1], half)
    assert (implicit_accuracy(chosen, rejected) == 0).all()              # a tie counts as wrong
    assert implicit_accuracy(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])).tolist() == [1, 0]


def test_dpo_of_m_dimensions_is_dpo_of_each():
    pi, ref = [normal(6, 3, seed=s) for s in (1, 2)], [normal(6, 3, seed=s) for s in (3, 4)]
    together = dpo_loss(*pi, *ref, 0.3)
    for i in range(3):
        alone = dpo_loss(*[x[:, i] for x in pi + ref], 0.3)
        assert all(a.shape == (6,) and torch.equal(t[:, i], a) for t, a in zip(together, alone))


def test_dpo_does_not_overflow():
    loss, *_ = dpo_loss(*torch.tensor([[-3e3, 0.0], [0.0, -3e3], [0.0, 0.0], [0.0, 0.0]]), beta=1.0)
    assert loss.tolist() == [3000, 0]


# ---- IPO ----

def test_ipo_by_hand():
    pi = torch.tensor([-1.0, -5.0]).requires_grad_(True)
    loss, chosen, rejected = ipo_loss(pi[0], pi[1], torch.tensor(-2.0), torch.tensor(-3.0), beta=0.5)
    assert chosen == 0.5 and rejected == -1.0                            # as in DPO
    assert loss == 4                                                     # (1 − (−2) − 1 / (2 · 0.5))²
    assert torch.autograd.grad(loss, pi)[0].tolist() == [4, -4]          # beyond 1 / (2β) the gap is pulled back
    at_reference = ipo_loss(*torch.zeros(4, 1), beta=0.5)[0]
    assert at_reference.item() == 1                                      # wrong: 0; and 1 / (2β)² for another beta
    assert ipo_loss(*torch.zeros(4, 1), beta=0.25)[0].item() == 4


@pytest.mark.parametrize("loss", [dpo_loss, ipo_loss])
def test_losses_on_pairs_are_those_of_every_label(loss):
    pi, ref = normal(4, seed=1), normal(4, seed=2)
    pairs, better = torch.tensor([[0, 1], [2, 3], [3, 0]]), torch.tensor([[0, 1], [1, -1], [-1, 0]])
    losses, correct, known = losses_on_pairs(loss, pi, ref, pairs, better, 0.3)
    assert known.tolist() == [[1, 1], [1, 0], [0, 1]]
    for p, i in known.nonzero().tolist():
        w, l = pairs[p] if better[p, i] == 0 else pairs[p].flip(0)
        expected, chosen, rejected = loss(pi[w], pi[l], ref[w], ref[l], 0.3)
        assert losses[p, i] == expected and correct[p, i] == (chosen > rejected)
    swapped = losses_on_pairs(loss, pi, ref, pairs, 1 - better.clamp(min=0), 0.3)[0]     # wrong: 0 means the second
    assert not torch.isclose(swapped, losses)[known.bool()].any()


MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.float64)       # R = 3, L = 4, 7 tokens


def tensor(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.fixture
def o(oracle):
    """The oracle's arrays, and its coefficients by name."""
    arrays = oracle("ppo")
    return arrays | dict(zip(("beta", "gamma", "decay", "eps", "eps_v"), arrays["params"].tolist()))


# ---- means ----

def test_masked_mean_is_over_the_whole_batch():
    x = tensor([1, 2, 3, 6], [5, 1, 9, 9], [10, 7, 7, 7])
    assert masked_mean(x, MASK) == 4                                     # 28 / 7
    assert masked_mean(x, MASK) != ((x * MASK).sum(1) / MASK.sum(1)).mean()              # wrong: each row's mean first
    assert masked_mean(x, MASK) != (x * MASK).mean()                     # wrong: padding counted as zeros


def test_parts_of_a_batch_add_up_to_its_means(close):
    """Given the whole number of tokens, each part's loss is its share of the mean; heads are counted once each."""
    g, tokens = torch.Generator().manual_seed(0), MASK.sum()
    draw = lambda *shape: torch.randn(*MASK.shape, *shape, generator=g, dtype=torch.float64)
    for loss, inputs in ((lambda *x: ppo_policy_loss(*x[:3], x[3], 0.2, *x[4:])[0], [draw(), draw(), draw(), MASK]),
                         (lambda *x: ppo_value_loss(*x[:3], x[3], 0.3, *x[4:]), [draw(3), draw(3), draw(3), MASK]),
                         (lambda *x: ppo_value_loss(*x[:3], x[3], 0.3, *x[4:]), [draw(), draw(), draw(), MASK])):
        whole, parts = loss(*inputs), [[x[i:i + 1] for x in inputs] for i in range(len(MASK))]
        assert close(sum(loss(*part, tokens) for part in parts), whole, 1e-12)
        assert not close(sum(loss(*part) for part in parts) / len(parts), whole, 1e-2)     # wrong: means of own means


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
    assert rewards(float("inf"), clip_range_score=3) == [[-3, 3]]        # wrong: 0 · inf, NaN, at the first token
    assert rewards(-10, clip_range_score=3) == [[-3, -3]]                # wrong: −3 − 1; and the KL of others unclamped


# ---- advantages ----

def test_advantages_and_returns_equal_the_oracle(o, close):
    advantages, returns = gae(o["token_rewards"], o["values"], o["mask"], o["gamma"], o["decay"])
    assert close(advantages, o["advantages"], 1e-12) and close(returns, o["returns"], 1e-12)
    assert not close(advantages, o["advantages_whitened"], 0.01)         # wrong: whitened
    # wrong: no discount; decay = 1; values of padding taken for the value after the last token
    for gamma, decay in [(1.0, o["decay"]), (o["gamma"], 1.0)]:
        assert not close(gae(o["token_rewards"], o["values"], o["mask"], gamma, decay)[0], o["advantages"], 0.01)
    leaky = gae(o["token_rewards"], o["values"], torch.ones_like(o["mask"]), o["gamma"], o["decay"])[0] * o["mask"]
    assert not close(leaky, o["advantages"], 0.01)


def test_gae_by_hand(close):
    rewards, values = tensor([0, 0, 8]), tensor([1, 2, 4])
    advantages, returns = gae(rewards, values, torch.ones(1, 3), gamma=0.5, decay=0.5)
    # δ = (0 + 1 − 1, 0 + 2 − 2, 8 + 0 − 4) = (0, 0, 4), and γ · decay = 1/4
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


# ---- advantages without a critic ----

SCORES = tensor([1, 6], [2, 0], [6, 0], [0, 0], [0, 4], [3, 8])          # K = 3 responses to each of 2 prompts, n = 2
LAM = tensor(*[[0.5, 0.5]] * 3, *[[0.25, 0.75]] * 3)
EACH = tensor([-2, 4], [-1, -2], [3, -2], [-1, -4], [-1, 0], [2, 4])     # less the prompt's mean: (3, 2) and (1, 4)
STD = torch.cat([tensor([7, 12]).sqrt().expand(3, 2), tensor([3, 16]).sqrt().expand(3, 2)])      # ((4 + 1 + 9) / 2)½ …


def test_group_advantages_by_hand(close):
    assert close(group_advantages(SCORES, 3, "rloo"), 1.5 * EACH, 1e-12)               # 1 − (2 + 6) / 2 = −3
    assert close(group_advantages(SCORES, 3, "rloo", LAM), 1.5 * (LAM * EACH).sum(1, keepdim=True), 1e-12)
    assert close(group_advantages(SCORES, 3, "grpo"), EACH / STD, 1e-4)                # 1e-4 is added to a deviation
    summed = tensor([1], [-1.5], [0.5], [-3.25], [-0.25], [3.5])                       # Σ λ_i s_i less the mean
    std = torch.cat([tensor([1.75]).sqrt().expand(3, 1), tensor([11.4375]).sqrt().expand(3, 1)])
    after = (LAM * EACH / STD).sum(1, keepdim=True)
    grpo, gdpo = (group_advantages(SCORES, 3, name, LAM) for name in ("grpo", "gdpo"))
    assert close(grpo, summed / std, 1e-4) and close(gdpo, after / after.std(), 3e-4)
    # wrong: the deviation of the population; prompts and responses the other way round; the batch for the group
    population, swapped, batch = STD * (2 / 3) ** 0.5, SCORES.view(2, 3, 2).transpose(0, 1).flatten(0, 1), SCORES
    for wrong in (EACH / population, group_advantages(swapped, 3, "grpo"), group_advantages(batch, 6, "grpo")):
        assert not close(wrong, EACH / STD, 0.01)
    # wrong: GRPO with the sum after the division; GDPO with it before, or without the batch's deviation
    assert not close(after, grpo, 0.01)
    assert not close(grpo / grpo.std(), gdpo, 0.01) and not close(after, gdpo, 0.01)


def test_group_advantages_of_equal_scores_are_0():
    for name in ("rloo", "grpo", "gdpo"):
        assert (group_advantages(torch.full((6, 2), -3.5), 3, name, LAM.float()) == 0).all()
    assert group_advantages(tensor([5], [5]), 2, "grpo").tolist() == [[0], [0]]        # wrong: 0 / 0
    equal = torch.tensor([[1000.1, -333.37]] * 3)                                      # float32: their mean is rounded
    for name in ("grpo", "gdpo"):                                                      # wrong: rounding / 1e-4
        assert (group_advantages(equal, 3, name, LAM[:1].float().expand(3, 2)) == 0).all()


def test_leave_one_out_is_the_gradient_of_J(close):
    """Two prompts, three responses, two rewards: the mean over all samples of two responses, by enumeration."""
    theta, ref, r = normal(2, 3).requires_grad_(True), normal(2, 3, seed=1).log_softmax(1), normal(2, 3, 2, seed=2)
    lam, beta, logp = tensor([0.3, 0.7], [0.8, 0.2]), 0.4, theta.log_softmax(1)
    J = (logp.exp() * ((lam[:, None] * r).sum(-1) - beta * (logp - ref))).sum() / 2                # Eq. (12)
    (exact,) = torch.autograd.grad(J, theta, retain_graph=True)
    penalty = -beta * (logp - ref).detach()

    def expected(estimator, factor=1.0, kl=1.0):
        surrogate = 0.0
        for y in itertools.product(range(3), repeat=4):                  # two responses to each of the two prompts
            picked = (torch.tensor([0, 0, 1, 1]), torch.tensor(y))
            scores = r[picked] + kl * penalty[picked][:, None]
            A = group_advantages(scores, 2, estimator, lam[picked[0]])[:, 0]
            surrogate = surrogate + logp[picked].sum().exp().detach() * (A * logp[picked]).sum() * factor / 4
        return torch.autograd.grad(surrogate, theta, retain_graph=True)[0]

    assert close(expected("rloo"), exact, 1e-12)
    assert close(expected("rloo", 0.5), exact / 2, 1e-12)                # Dr. GRPO: (K − 1) / K of it
    along = lambda g: g * ((g * exact).sum() / g.square().sum())         # the best multiple of it
    for wrong in (expected("grpo"), expected("gdpo"), expected("rloo", kl=0.0)):
        assert not close(along(wrong), exact, 0.05)


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


def test_gradients_of_ppo_against_finite_differences():
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


def test_support_loss_by_hand():
    """−log of what is left for the tokens to which the reference gives at least 0.1; no choice among them costs."""
    # ref [0.6, 0.35, 0.05] allows the first two of three tokens, ref [0.02, 0.9, 0.08] the second
    logits = torch.tensor([[0.2, 0.3, 0.5], [0.3, 0.6, 0.1]]).log().requires_grad_()
    of = lambda logits: support_loss(logits.log_softmax(1)[[0, 0, 1], [0, 1, 1]], torch.tensor([0, 0, 1]), 2)
    loss = of(logits + 7.0)
    assert loss.tolist() == pytest.approx([-math.log(0.5), -math.log(0.6)], rel=1e-5)
    assert loss.tolist() != pytest.approx([-math.log(0.5), -math.log(0.9)], rel=0.01)     # wrong: allowed by π
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    # towards the allowed tokens, in the ratio that π has there
    assert grad[0].tolist() == pytest.approx([0.2 - 0.4, 0.3 - 0.6, 0.5], rel=1e-4)
    # nothing is lost where π has left all that is allowed, and nothing costs where it stays there
    far = torch.tensor([[-200.0, -201.0, 0.0], [-100.0, 5.0, -100.0]], requires_grad=True)
    assert of(far).tolist() == pytest.approx([200 - math.log(1 + math.exp(-1)), 0], rel=1e-5, abs=1e-6)
    assert torch.autograd.grad(of(far).sum(), far)[0][0, 2].item() == pytest.approx(1)
