"""test_objectives.py - log-probs and DPO against the oracles: values, gradients, and the wrong forms they rule out."""
import math

import pytest
import torch
import torch.nn.functional as F

from ops.fused import linear_logprob
from objectives import dpo_loss, implicit_accuracy, response_logprobs, sft_loss

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
