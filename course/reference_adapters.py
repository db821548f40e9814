"""reference_adapters.py - the solution of every set: this repository's functions, as course/adapters.py wants them."""
import torch
import torch.nn.functional as F

import aggregate
import objectives
import svd_lora

# ---------------------------------------------------------------------------------------------------------------------
# Set 1.


adapters_off, merged_state_dict = svd_lora.adapters_off, svd_lora.merged_state_dict
orthogonality_penalty, set_preference = svd_lora.orthogonality_penalty, svd_lora.set_preference


def svd_lora_linear(x, weight, bias, U, V, sigma, s, lam, gain):
    layer = svd_lora.SVDLoRALinear(torch.nn.Linear(1, 1), len(sigma), lam.shape[-1], gain)
    del layer.U, layer.V, layer.sigma, layer.s                        # Parameters: plain tensors may not replace them
    layer.weight, layer.bias = (None if p is None else torch.nn.Parameter(p, False) for p in (weight, bias))
    layer.U, layer.V, layer.sigma, layer.s, layer.lam = U, V, sigma, s, lam
    return layer(x)


def inject(model, k, m, gain, generator=None):
    svd_lora.inject_svd_lora(model, k, m, gain=gain, generator=generator)
    model.to(model.embed.weight.dtype)


def parts(model):
    return {name: {part: getattr(layer, part) for part in ("U", "V", "sigma", "s")}
            for name, layer in svd_lora.svd_lora_layers(model).items()}


# ---------------------------------------------------------------------------------------------------------------------
# Set 2.


def response_logprobs(logits, tokens, mask):
    logps = logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]     # (R, T - 1)
    token = mask[:, 1:].flatten().nonzero()[:, 0]                                     # (N,) those of responses
    row = token // (tokens.shape[1] - 1)
    paths = torch.full(mask.shape, len(token))                                        # (R, T), N pads
    paths[row, torch.cat([torch.arange(n) for n in row.bincount(minlength=len(mask))])] = torch.arange(len(token))
    return objectives.response_logprobs(logps.flatten()[token], paths)


def dpo_loss(pi_chosen, pi_rejected, ref_chosen, ref_rejected, beta):
    return objectives.dpo_loss(pi_chosen, pi_rejected, ref_chosen, ref_rejected, beta)[0]


def losses_on_pairs(pi, ref, pairs, better, beta):
    losses, _, known = objectives.losses_on_pairs(objectives.dpo_loss, pi, ref, pairs, better, beta)
    return losses * known, known.to(losses)


def expected_counts(better, batch_size):
    return batch_size * torch.stack([(x >= 0).double().sum(0) for x in better]).mean(0)


def mean_losses(losses, known, expected):
    counts, absent = aggregate.denominators(known.sum(0, keepdim=True), expected, "tche" if expected is None else "ls")
    return ((losses * known).sum(0) / counts + absent)[0]


linear_scalarization, tchebycheff = aggregate.linear_scalarization, aggregate.tchebycheff


def sample_preference(n, m, alpha, vertex_share, generator=None):
    return aggregate.sample_preference(n, m, alpha, vertex_share, generator)


def training_step(model, adapters_off, optimizer, tokens, mask, pairs, better, lam, beta, expected, aggregate):
    with torch.no_grad(), adapters_off(model):
        ref = response_logprobs(model(tokens), tokens, mask)
    losses, known = losses_on_pairs(response_logprobs(model(tokens), tokens, mask), ref, pairs, better, beta)
    L = mean_losses(losses, known, expected if aggregate == "ls" else None)
    optimizer.zero_grad()
    (linear_scalarization if aggregate == "ls" else tchebycheff)(L, lam).backward()
    optimizer.step()
    return L.detach()


# ---------------------------------------------------------------------------------------------------------------------
# Set 4.


kl_penalized_rewards, ppo_value_loss = objectives.kl_penalized_rewards, objectives.ppo_value_loss


def token_logprobs(logits, tokens, mask):
    logps = logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]     # (R, T - 1)
    return F.pad(logps, (1, 0)) * mask


def gae(rewards, values, mask, decay):
    return objectives.gae(rewards, values, mask, 1.0, decay)


def critic_values(states, lam, mask, weight, bias):
    before = F.pad(states.detach()[:, :-1], (0, 0, 1, 0))             # what was read before each token
    each = lam[:, None].expand(-1, mask.shape[1], -1)                 # (R, T, m)
    return F.linear(torch.cat([before, each], -1), weight, bias) * mask[..., None]


def aggregate_advantages(advantages, lam):
    return linear_scalarization(advantages, lam[:, None])


def ppo_policy_loss(logp, old_logp, advantages, mask, clip):
    return objectives.ppo_policy_loss(logp, old_logp, advantages, mask, clip)[0]


def group_advantages(scores, lam, samples, estimator):
    return objectives.group_advantages(scores, samples, estimator, lam)[:, 0]
