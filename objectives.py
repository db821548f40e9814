"""objectives.py - the training objectives as pure functions: tensors in, tensors out, no model and no file.

R: responses   P: compared pairs   N: predicted tokens   L: tokens of the longest response   m: dimensions
n: critic heads, and advantages of a token   λ is the preference; GAE's own λ is called decay
π: policy, ref: reference; log π(y|x) is always the SUM over the response's tokens (its EOS among them), never a mean:
the DPO derivation is about the probability of the whole response. Prompt and padding take no part.
Equations are those of Panacea, arXiv:2402.02030v1, unless another paper is named.
"""

import torch
import torch.nn.functional as F


def response_logprobs(token_logps, paths):
    """log π(y|x) = Σ_t log π(y_t | x, y_<t): sums every response's own tokens.

    token_logps: (N,)   paths: (R, L) int64, the indices of a response's tokens in token_logps; N pads.  ->  (R,)
    """
    padded = torch.cat([token_logps, token_logps.new_zeros(1)])                           # index N adds nothing
    # not padded[paths]: its backward adds in no fixed order, and equal runs would differ in the last bits
    return padded.index_select(0, paths.flatten()).view(paths.shape).sum(1)


def sft_loss(logps):
    """−log π(y|x) of every response; J_SFT = E log π(y|x). logps: (R,) from response_logprobs -> (R,)"""
    return -logps


def dpo_loss(pi_chosen, pi_rejected, ref_chosen, ref_rejected, beta):
    """DPO, Eq. (2): −log σ( β log π(y_w|x)/π_ref(y_w|x) − β log π(y_l|x)/π_ref(y_l|x) ), for every pair.

    Four tensors of one shape, (P,) or (P, m), of summed response log-probs; beta > 0 is the KL coefficient.
    Returns (loss, chosen_reward, rejected_reward), each of that shape; the rewards β log π/π_ref are detached. At
    π = π_ref the loss is ln 2.
    """
    chosen = beta * (pi_chosen - ref_chosen)                                              # β log π(y_w|x)/π_ref(y_w|x)
    rejected = beta * (pi_rejected - ref_rejected)
    return -F.logsigmoid(chosen - rejected), chosen.detach(), rejected.detach()


def ipo_loss(pi_chosen, pi_rejected, ref_chosen, ref_rejected, beta):
    """IPO Eq. (17) (arXiv:2310.12036): (log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x) − 1/(2β))².

    The same tensors, and the same kind of return values, as dpo_loss; beta is the paper's τ. The gap of log-ratios is
    pulled to 1/(2β) and no further, however clear the label. At π = π_ref the loss is 1/(2β)².
    """
    chosen, rejected = beta * (pi_chosen - ref_chosen), beta * (pi_rejected - ref_rejected)
    return ((chosen - rejected) / beta - 1 / (2 * beta)).square(), chosen.detach(), rejected.detach()


def support_loss(logps, token, n):
    """−log Σ_{v ∈ A_t} π(v | x, y_<t) of every token, A_t: the tokens that the reference allows there, those to which
    it gives at least some small probability.

    # not in paper: DPO compares responses with each other, so nothing in it holds the probability of all the others
    down. This term does, and asks for nothing else: among the allowed tokens every choice costs 0, so the optimum of
    DPO stays where it is, if it says nothing that the reference rules out.
    logps: (M,) log π(v | x, y_<t) of every allowed v, of all tokens t   token: (M,) int64, the t of each   n: how many
    tokens there are; each has at least one allowed v  ->  (n,)
    """
    top = logps.new_full((n,), -torch.inf).scatter_reduce(0, token, logps.detach(), "amax")   # so that no exp is 0
    mass = logps.new_zeros(n).index_add(0, token, (logps - top.index_select(0, token)).exp())
    return -(top + mass.log())


def implicit_accuracy(chosen_reward, rejected_reward):
    """Whether the implicit reward orders the pair as its label does; a tie counts as wrong. -> float, same shape"""
    return (chosen_reward > rejected_reward).float()


def losses_on_pairs(loss, pi, ref, pairs, better, beta):
    """A loss of pairs, as Eq. (2), in every dimension at once: dimensions share log-probs and differ in their labels.

    loss: dpo_loss or ipo_loss   pi, ref: (R,) log-probs of responses   pairs: (P, 2) indices into them
    better: (P, m), 0 where the first of the pair is better, 1 the second, -1 no label   ->  losses (P, m); correct
    (P, m), 1.0 where the implicit reward agrees with the label; known (P, m), 0 where there is no label (there the
    other two mean nothing)
    """
    first, second = pairs.T                                                               # (P,)
    flip = better == 1                                                                    # (P, m)
    chosen = torch.where(flip, second[:, None], first[:, None])                           # (P, m): the preferred one
    rejected = torch.where(flip, first[:, None], second[:, None])
    take = lambda x, index: x.index_select(0, index.flatten()).view(index.shape)
    losses, good, bad = loss(take(pi, chosen), take(pi, rejected), take(ref, chosen), take(ref, rejected), beta)
    return losses, implicit_accuracy(good, bad), (better >= 0).float()


# ---------------------------------------------------------------------------------------------------------------------
# RLHF. R: sampled responses, shorter ones padded on the right   mask: (R, L), 1: token, 0: padding

def bradley_terry_loss(chosen, rejected):
    """−log σ(r(x, y_w) − r(x, y_l)), the Bradley-Terry likelihood: what a reward model is trained with (Sec. 3.1).

    chosen, rejected: rewards, (P,) or (P, m), of the response that is better on a dimension and of the other one.
    Returns the loss in the same shape; only differences count, so rewards are fixed up to a constant.
    """
    return -F.logsigmoid(chosen - rejected)


def masked_mean(x, mask, count=None):
    """Mean of x over all entries where mask is 1, not the mean over rows of each row's mean. -> scalar

    count: how many entries there are, where these are not all of them: the result is then their part of the mean.
    """
    return (x * mask).sum() / (mask.sum() if count is None else count)


def kl_penalized_rewards(score, logp, ref_logp, mask, kl_coeff, clip_range_score=float("inf")):
    """Token rewards, Eq. (1): −β (log π_old − log π_ref), the KL term, plus the response's score on its last token.

    score: (R, n), one column per reward, or (R,)   logp, ref_logp, mask: (R, L)   kl_coeff: β   ->  (R, L, n), (R, L)
    Each column contains the whole KL term; Σ λ_i = 1, so the weighted sum Σ_i λ_i · column_i contains it once, as in
    Eq. (12). The sum of both is clamped to ±clip_range_score, as in the reference implementation; padding gets 0.
    """
    last = mask * (mask.cumsum(1) == mask.sum(1, keepdim=True))                           # (R, L): 1 on the last token
    kl = -kl_coeff * (logp - ref_logp)                                                    # (R, L)
    if score.ndim == 2:
        last, kl, mask = last[..., None], kl[..., None], mask[..., None]
    score = torch.where(last > 0, score[:, None], 0.0)                    # not a product: 0 · inf is NaN
    return (kl + score).clamp(-clip_range_score, clip_range_score) * mask


def gae(rewards, values, mask, gamma=1.0, decay=0.95):
    """Generalised advantage estimation (Schulman et al. 2016), backwards over the tokens:

        δ_t = r_t + γ V_{t+1} − V_t,     A_t = δ_t + γ · decay · A_{t+1},     returns G_t = A_t + V_t

    rewards, values: (R, L) or (R, L, n)   mask: (R, L)   decay: λ in that paper; here λ is the preference
    The value after the last token is 0. Returns advantages and returns in the shape of rewards, 0 on padding. Linear in
    rewards and values: that is why one value head per dimension and Σ λ_i V_i serve every preference. No whitening.
    """
    mask = mask if rewards.ndim == 2 else mask[..., None]
    values = values * mask                                                                # V after the last token is 0
    advantages, running = torch.zeros_like(rewards), 0.0
    for t in reversed(range(rewards.shape[1])):
        after = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        delta = rewards[:, t] + gamma * after - values[:, t]
        running = (delta + gamma * decay * running) * mask[:, t]
        advantages[:, t] = running
    return advantages, (advantages + values) * mask


def group_advantages(scores, samples, estimator, lam=None):
    """Advantages without a critic: a response beside the K others to the same prompt, one number for all its tokens.

        rloo   A_k = s_k − mean of the other K − 1 scores               leave-one-out, arXiv:2402.14740
        grpo   A_k = (s_k − mean_k s) / std_k s                         arXiv:2402.03300, outcome supervision
        gdpo   A_k = (Σ_i λ_i (s_ik − mean_k s_i) / std_k s_i) / std over the batch                 arXiv:2601.05242

    scores: (R, n), the scores of response k to prompt x in row x·K + k, its whole KL penalty −β log π/π_ref(y|x) among
    each   samples: K, at least 2   lam: (R, n), equal for the K responses to a prompt, or None   ->  (R, 1) with lam:
    of Σ_i λ_i s_i, Eq. (12), summed before (rloo, grpo) or after (gdpo) the division; (R, n) without: of each alone.
    s − β log π/π_ref is what J = E r − β KL, Eq. (1), is the mean of, and no response is in its own baseline: with rloo
    E[A ∇ log π] is ∇J exactly. rloo is K/(K − 1) · (s_k − mean_k s), so "Dr. GRPO" (arXiv:2503.20783) but for the
    factor. A division by std weighs prompts by 1/std, and for gdpo objectives too: another objective than J.
    # inferred: std is the sample's (K − 1) and 1e-4 is added to it, as in the GDPO authors' code. gdpo's batch mean is
    not subtracted: it is 0, since each group's is. # differs: GRPO's paper adds its KL to the loss, not to the score.
    """
    if lam is not None and estimator != "gdpo":
        scores, lam = (lam * scores).sum(-1, keepdim=True), None
    groups = scores.unflatten(0, (-1, samples))                                           # (X, K, n)
    A = groups - groups.mean(1, keepdim=True)
    A = A * (samples / (samples - 1)) if estimator == "rloo" else A / (groups.std(1, keepdim=True) + 1e-4)
    A = A * (groups != groups[:, :1]).any(1, keepdim=True)          # equal scores: 0, not the rounding of their mean
    A = A.flatten(0, 1)                                                                   # (R, n)
    if lam is not None:
        A = (lam * A).sum(-1, keepdim=True)
        A = A / (A.std() + 1e-4)
    return A


def ppo_policy_loss(logp, old_logp, advantages, mask, clip_range_ratio=0.2, tokens=None):
    """PPO's clipped surrogate, −mean_t min(ρ_t A_t, clip(ρ_t, 1 ± ε) A_t) with ρ = π/π_old; the mean is over tokens.

    All (R, L). Returns the loss and two detached numbers: the fraction of tokens whose clip is active, and the mean of
    log π_old − log π. Log-ratios are clamped to ±20, so that exp does not overflow. tokens: as count in masked_mean.
    """
    log_ratio = (logp - old_logp).clamp(-20, 20)
    ratio = log_ratio.exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip_range_ratio, 1 + clip_range_ratio) * advantages
    loss, active, moved = (masked_mean(x, mask, tokens) for x in (torch.minimum(plain, clipped),
                                                                  (clipped < plain).float(), log_ratio))
    return -loss, active.detach(), -moved.detach()


def ppo_value_loss(values, old_values, returns, mask, clip_range_value=5.0, tokens=None):
    """½ mean_t max( (V − G)², (clip(V, V_old ± ε) − G)² ), the mean over tokens (and heads). (R, L) or (R, L, n)

    tokens: as count in masked_mean."""
    clipped = old_values + (values - old_values).clamp(-clip_range_value, clip_range_value)
    loss = torch.maximum((values - returns).square(), (clipped - returns).square())
    mask = mask if values.ndim == 2 else mask[..., None].expand_as(values)
    heads = values[0, 0].numel()
    return 0.5 * masked_mean(loss, mask, None if tokens is None else tokens * heads)


def noon(advantages, ratio, clip_range_ratio=0.2):
    """PAMA's "no negative" advantages: I(A_t) = max(A_t, 0) where ρ_t ≤ 1 + ε, else 0; PAMA Eq. (5).

    advantages: (R, L) or (R, L, n)   ratio: ρ = π/π_old, (R, L). With A ≥ 0 PPO's lower clip has no effect, so whether
    a token counts depends on ρ alone and is the same for every objective: for one token all gradients have the same
    direction and differ by the factor I(A_i). The price: a token that was worse than expected is never made less likely
    by itself, only by others becoming more likely.
    """
    inside = ratio <= 1 + clip_range_ratio
    return advantages.clamp(min=0) * (inside if advantages.ndim == 2 else inside[..., None])
