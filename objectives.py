"""objectives.py - the training objectives as pure functions: tensors in, tensors out, no model and no file.

B: responses or pairs   N: predicted tokens   D: hidden size   V: vocabulary   m: objectives
π: policy, ref: reference; log π(y|x) is always the SUM over the response's tokens (its EOS among them), never a mean:
the DPO derivation is about the probability of the whole response. Prompt and padding take no part.
Equations are those of Panacea, arXiv:2402.02030v1.
"""
import torch
import torch.nn.functional as F


def token_logprobs(hidden, weight, target):
    """log p(target) under softmax(hidden · weightᵀ). hidden (N, D), weight (V, D), target (N,) -> (N,) fp32."""
    logits = hidden.float() @ weight.float().T      # (N, V): logits rounded to bf16 would cost 0.03 nats a response
    return logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1)


def response_logprobs(token_logps, paths):
    """log π(y|x) = Σ_t log π(y_t | x, y_<t): sums every response's own tokens.

    token_logps: (N,)   paths: (B, L) int64, the indices of a response's tokens in token_logps; N pads.  ->  (B,)
    """
    padded = torch.cat([token_logps, token_logps.new_zeros(1)])                           # index N adds nothing
    # not padded[paths]: its backward adds in a free order, and equal runs would differ in the last bits
    return padded.index_select(0, paths.flatten()).view(paths.shape).sum(1)


def sft_loss(logps):
    """−log π(y|x) for each response, its J_SFT = E log π(y|x) negated. logps: (B,) from response_logprobs -> (B,)"""
    return -logps


def dpo_loss(pi_chosen, pi_rejected, ref_chosen, ref_rejected, beta):
    """DPO, Eq. (2): −log σ( β log π(y_w|x)/π_ref(y_w|x) − β log π(y_l|x)/π_ref(y_l|x) ), for every pair.

    Four tensors of one shape, (B,) or (B, m), of summed response log-probs; beta > 0 is the KL coefficient.
    Returns (loss, chosen_reward, rejected_reward), each of that shape; the rewards β log π/π_ref are detached. At
    π = π_ref the loss is ln 2.
    """
    chosen = beta * (pi_chosen - ref_chosen)                                              # β log π(y_w|x)/π_ref(y_w|x)
    rejected = beta * (pi_rejected - ref_rejected)
    return -F.logsigmoid(chosen - rejected), chosen.detach(), rejected.detach()


def implicit_accuracy(chosen_reward, rejected_reward):
    """Whether the implicit reward orders the pair as its label does; a tie counts as wrong. -> float, same shape"""
    return (chosen_reward > rejected_reward).float()


def dpo_on_pairs(pi, ref, pairs, better, beta):
    """DPO on compared responses, for every dimension at once: they share the log-probs and differ in their labels.

    pi, ref: (R,) log-probs of responses; pairs: (P, 2) indices into them; better: (P, m), 0 where the first of the pair
    is better, 1 the second, -1 no label. Returns loss (P, m); correct (P, m), whether the implicit reward agrees with
    the label; known (P, m), 0 where there is no label (there the other two mean nothing).
    """
    first, second = pairs.T                                                               # (P,)
    flip = better == 1                                                                    # (P, m)
    chosen = torch.where(flip, second[:, None], first[:, None])                           # (P, m): the preferred one
    rejected = torch.where(flip, first[:, None], second[:, None])
    take = lambda x, index: x.index_select(0, index.flatten()).view(index.shape)
    loss, good, bad = dpo_loss(take(pi, chosen), take(pi, rejected), take(ref, chosen), take(ref, rejected), beta)
    return loss, implicit_accuracy(good, bad), (better >= 0).float()
