"""another.py - set 4 solved once more from its handout alone: loops over rows and tokens, plain formulas."""
import torch


def places(mask):
    """(row, the positions of its response) of every row."""
    return [(r, on.nonzero().flatten().tolist()) for r, on in enumerate(mask)]


def token_logprobs(logits, tokens, mask):
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    first = losses.new_zeros(len(losses), 1)
    return torch.where(mask, -torch.cat([first, losses], 1), torch.zeros_like(logits[..., 0]))


def kl_penalized_rewards(score, logp, ref_logp, mask, kl_coeff, clip):
    rewards = torch.zeros(*mask.shape, score.shape[1], dtype=score.dtype)
    for r, at in places(mask):
        for t in at:
            r_t = kl_coeff * (ref_logp[r, t] - logp[r, t]) + (score[r] if t == at[-1] else torch.zeros_like(score[r]))
            rewards[r, t] = torch.clip(r_t, -clip, clip)
    return rewards


def gae(rewards, values, mask, decay):
    A, G = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for r, at in places(mask):
        next_value, next_A = 0, 0
        for t in at[::-1]:
            next_A = rewards[r, t] + next_value - values[r, t] + decay * next_A
            next_value = values[r, t]
            A[r, t], G[r, t] = next_A, next_A + values[r, t]
    return A, G


def critic_values(states, lam, mask, weight, bias):
    known, D = states.detach().roll(1, dims=1), states.shape[-1]      # no response begins at position 0
    values = torch.einsum("rtd,md->rtm", known, weight[:, :D]) + (lam @ weight[:, D:].T + bias).unsqueeze(1)
    return values.masked_fill(~mask.unsqueeze(-1), 0)


def aggregate_advantages(advantages, lam):
    return torch.einsum("rtm,rm->rt", advantages, lam)


def ppo_policy_loss(logp, old_logp, advantages, mask, clip):
    A, ratio = advantages[mask], torch.exp(logp[mask] - old_logp[mask])
    bound = torch.where(A > 0, torch.full_like(A, 1 + clip), torch.full_like(A, 1 - clip))
    return torch.where(A > 0, -A * torch.min(ratio, bound), -A * torch.max(ratio, bound)).mean()


def ppo_value_loss(values, old_values, returns, mask, clip):
    V, old, G = values[mask], old_values[mask], returns[mask]         # (N, m)
    near = torch.min(torch.max(V, old - clip), old + clip)
    return torch.max((V - G).abs(), (near - G).abs()).pow(2).mean() / 2


def group_advantages(scores, lam, samples, estimator):
    def normalised(x):
        return (x - x.mean()) / (x.std() + 1e-4)
    A = torch.zeros_like(scores[:, 0])
    for first in range(0, len(scores), samples):
        s, w = scores[first:first + samples], lam[first:first + samples]
        S = (s * w).sum(1)
        if estimator == "rloo":
            A[first:first + samples] = S - (S.sum() - S) / (samples - 1)
        elif estimator == "grpo":
            A[first:first + samples] = normalised(S)
        else:
            A[first:first + samples] = (w * torch.stack([normalised(x) for x in s.T], 1)).sum(1)
    return A / (A.std() + 1e-4) if estimator == "gdpo" else A
