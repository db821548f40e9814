"""reference_adapters.py - the solution of every set: this repository's functions, as course/adapters.py wants them."""
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import aggregate
import objectives
import svd_lora
import train_hqd
from data import trees
from data.offline import distinct
from data.tokenizers import TokenRow
from fronts import dominance, evaluation, metrics, optimum, selection
from ops import fused

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
# Set 3.


def nondominated(points):
    return torch.from_numpy(dominance.nondominated(points))


def hypervolume(points, reference):
    return metrics.hypervolume(points, reference)


hypervolume_2d = hypervolume


def everything(ref, scores, outside):
    """log π_ref (X, S + 1) and scores (X, S + 1, m) with "any other text" as the last outcome."""
    return optimum.with_outside(ref), torch.cat([scores, torch.full_like(scores[:, :1], outside)], 1)


def rlhf_objectives(logps, ref, scores, outside, beta):
    return optimum.rlhf_objectives(optimum.with_outside(logps), *everything(ref, scores, outside), beta)[0]


def rlhf_optimum(lam, ref, scores, outside, beta):
    ref, rewards = everything(ref, scores, outside)
    return optimum.rlhf_closed_form(lam[None], rewards, ref, beta)[1][0, :, :-1]


def exact_losses(h, scores):
    return optimum.dpo_losses(h, optimum.win_probs(scores).sum(-1))


def derivatives(h, scores, lam):
    E, R = optimum._exponentials(h)
    pairs, curve = h.shape[1] * (h.shape[1] - 1) / 2, optimum._hessian(E, R)
    gradient = optimum._gradients(E, R, (lam @ optimum.win_probs(scores).sum(-1))[:, None])[:, 0]
    return gradient / pairs, (curve - curve.mean(-1, keepdim=True)) / pairs           # the mean: fixes the constant


def dpo_optimum(scores, lam):
    h = optimum.dpo_ls(lam[None], scores, evenly(scores))[1][0]
    return h - h.mean(1, keepdim=True)


def tche_optimum(scores, lam):
    h = optimum.dpo_tche(lam[None], scores, evenly(scores), [0.0, 0.0])[1][0]
    return h - h.mean(1, keepdim=True)


def evenly(scores):
    """Equal weights of the prompts, (X,)."""
    return torch.full((len(scores),), 1 / len(scores), dtype=torch.float64)


def regret(lams, J, J_base, J_best):
    none = torch.zeros(len(lams))                                     # J says it all: log-probabilities play no part
    said = evaluation.regret({"J": J_base, "logps": 0.0}, {"J": J.tolist(), "logps": list(none)},
                             {"J": J_best, "logps": none, "z": None}, lams.tolist(), None, SimpleNamespace(value=None),
                             {"aggregate": "ls"})
    return said["regret"], said["regret_worst"], torch.tensor(said["worst_lam"], dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# Set 4.


def inside(mask, *tensors):
    """The tensors (R, T) or (R, T, m) with 0 where mask is False: a product with the mask would keep NaN."""
    return [x.masked_fill(~mask.view(mask.shape + (1,) * (x.ndim - 2)), 0.0) for x in tensors]


def kl_penalized_rewards(score, logp, ref_logp, mask, kl_coeff, clip):
    return objectives.kl_penalized_rewards(score, *inside(mask, logp, ref_logp), mask, kl_coeff, clip)


def ppo_value_loss(values, old_values, returns, mask, clip):
    return objectives.ppo_value_loss(*inside(mask, values, old_values, returns), mask, clip)


def token_logprobs(logits, tokens, mask):
    logps = logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]     # (R, T - 1)
    return F.pad(logps, (1, 0)) * mask


def gae(rewards, values, mask, decay):
    return objectives.gae(*inside(mask, rewards, values), mask, 1.0, decay)


def critic_values(states, lam, mask, weight, bias):
    before = F.pad(states.detach()[:, :-1], (0, 0, 1, 0))             # what was read before each token
    each = lam[:, None].expand(-1, mask.shape[1], -1)                 # (R, T, m)
    return F.linear(torch.cat([before, each], -1), weight, bias) * mask[..., None]


def aggregate_advantages(advantages, lam):
    return linear_scalarization(advantages, lam[:, None])


def ppo_policy_loss(logp, old_logp, advantages, mask, clip):
    return objectives.ppo_policy_loss(*inside(mask, logp, old_logp, advantages), mask, clip)[0]


def group_advantages(scores, lam, samples, estimator):
    return objectives.group_advantages(scores, samples, estimator, lam)[:, 0]


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


# ---------------------------------------------------------------------------------------------------------------------
# Set 6.


@contextmanager
def blocks(N, V, block):
    """Within it, ops.fused takes `block` words at a time, as it does in bf16, and as many places as keep the logits
    below N · block."""
    before = {name: getattr(fused, name) for name in ("ROWS", "TILE", "GUESS", "_logprob_rows_fp32")}
    vars(fused).update(ROWS=max(1, N * block // V), TILE=block, GUESS=min(block, fused.GUESS),
                       _logprob_rows_fp32=fused._logprob_rows_bf16)
    try:
        yield
    finally:
        vars(fused).update(before)


class LinearLogprob(fused._LinearLogprob):
    """The reference's, with `block` as an argument."""

    @staticmethod
    def forward(ctx, hidden, weight, target, block):
        ctx.sizes = len(hidden), len(weight), block
        with blocks(*ctx.sizes):
            return fused._LinearLogprob.forward(ctx, hidden, weight, target)

    @staticmethod
    def backward(ctx, g):
        with blocks(*ctx.sizes):
            return *fused._LinearLogprob.backward(ctx, g), None


def linear_logprob(hidden, weight, target, block):
    return LinearLogprob.apply(hidden, weight, target, block)


def pack_tree(prompt, responses):
    # the reference has no node for the last token of a response: one more token, the same behind all, makes it one
    tree = trees.tree_of(TokenRow(prompt, [y + [-1] for y in responses]))
    parents = torch.arange(len(tree.nodes)) - 1
    for start, _, parent in tree.chains:
        parents[start] = parent
    return torch.from_numpy(tree.nodes), parents, [tree.parents[path[1:]].tolist() for path in tree.paths]


def tree_attention(parents):
    paths = [[]]                                                      # from the root to each node: a response each
    for node, parent in enumerate(parents.tolist()[1:], 1):
        paths.append(paths[parent] + [node])
    tree = trees.pack([TokenRow([0], [path + [0] for path in paths[1:]])])
    place = tree.tokens[0].argsort()                                  # the tree's tokens are the nodes' numbers
    return tree.positions[0, place], tree.mask[0, 0][place][:, place]


def tree_logprobs(hidden, weight, tokens, parents, paths):
    padded = torch.full((len(paths), max(map(len, paths))), len(tokens))                              # (R, L)
    for row, path in zip(padded, paths):
        row[:len(path)] = torch.tensor(path)
    return objectives.response_logprobs(fused.linear_logprob(hidden[parents], weight, tokens), padded)


def svd_lora_by_hand(x, weight, bias, U, V, d, gain):
    return fused.svd_lora_linear(x, weight, U, V, gain * d[:, None], bias)


def direction_distance(unit, lam):
    return torch.from_numpy(selection.direction_distance(unit.numpy(), lam.numpy()))


def select_pareto(scores, lams, k, at_least):
    return torch.from_numpy(selection.select_high_quality(scores.numpy(), lams.numpy(), k, at_least).index)


representatives = train_hqd.representatives


def select_answers(answers, ended, scores, lams, k, at_least):
    good = [i for i, (_, y) in enumerate(answers) if ended[i] and y.strip()]
    first = {answers[i]: i for i in reversed(good)}
    rows, _ = distinct([answers[i] for i in good])
    pool = torch.tensor([first[row.prompt, row.responses[0]] for row in rows])
    return pool[select_pareto(scores[pool], lams, max(1, k // 2), at_least)]
