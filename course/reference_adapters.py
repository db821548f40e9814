"""reference_adapters.py - the solution of every set: this repository's functions, as course/adapters.py wants them."""
import torch

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
# Set 5.


min_norm_weights, noon = aggregate.min_norm_weights, objectives.noon
pama_weights, pama_advantages = aggregate.pama_weights, aggregate.pama_advantages


def min_norm_pair(a, b):
    both = torch.stack([a, b])
    return min_norm_weights(both @ both.T)


def mgda_backward(losses, parameters):
    grads = [torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True) for loss in losses]
    flat = torch.stack([torch.cat([g.flatten() for g in grad]) for grad in grads]).double()        # (m, parameters)
    c = min_norm_weights(flat @ flat.T)
    for p, *each in zip(parameters, *grads):
        p.grad = sum(w * g for w, g in zip(c.tolist(), each))
    return c, (c @ flat).norm()
