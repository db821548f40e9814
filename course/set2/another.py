"""another.py - set 2 solved once more from its handout alone: loops, plain formulas, numpy-like indexing."""
import torch


def response_logprobs(logits, tokens, mask):
    rows = []
    for l, y, on in zip(logits, tokens, mask):
        total = l.new_zeros(())
        for t in on.nonzero().flatten().tolist():
            total = total + l[t - 1, y[t]] - torch.logsumexp(l[t - 1], 0)
        rows.append(total)
    return torch.stack(rows)


def dpo_loss(pi_chosen, pi_rejected, ref_chosen, ref_rejected, beta):
    return torch.nn.functional.softplus(beta * (pi_rejected - pi_chosen - ref_rejected + ref_chosen))


def losses_on_pairs(pi, ref, pairs, better, beta):
    a, b = pairs[:, 0], pairs[:, 1]
    first = dpo_loss(pi[a], pi[b], ref[a], ref[b], beta)[:, None]                     # where the first is better
    second = dpo_loss(pi[b], pi[a], ref[b], ref[a], beta)[:, None]
    return first * (better == 0) + second * (better == 1), (better != -1).to(pi)


def expected_counts(better, batch_size):
    labels = torch.cat(better)
    return (labels > -1).double().sum(0) / len(better) * batch_size


def mean_losses(losses, known, expected):
    out = []
    for i in range(losses.shape[1]):
        total, n = losses[known[:, i] > 0, i].sum(), known[:, i].sum()
        if expected is None:
            out.append(total / n if n > 0 else total - torch.inf)
        else:
            out.append(total / expected[i] if expected[i] > 0 else total)
    return torch.stack(out)


def linear_scalarization(losses, lam):
    return torch.einsum("...i,...i->...", losses, lam.to(losses))


def tchebycheff(losses, lam, ideal=None):
    gap = losses if ideal is None else losses - ideal
    terms = torch.where(lam > 0, lam * gap, torch.full_like(gap, -torch.inf))
    return terms.max(-1).values


def sample_preference(n, m, alpha, vertex_share, generator=None):
    rows = []
    for _ in range(n):
        if torch.rand((), generator=generator) < vertex_share:
            rows.append(torch.eye(m)[int(torch.randint(m, (), generator=generator))])
        else:
            g = torch._standard_gamma(torch.full((m,), float(alpha), dtype=torch.float64), generator=generator).float()
            rows.append(g / g.sum())
    return torch.stack(rows)


def training_step(model, adapters_off, optimizer, tokens, mask, pairs, better, lam, beta, expected, aggregate):
    pi = response_logprobs(model(tokens), tokens, mask)
    with adapters_off(model):
        ref = response_logprobs(model(tokens).detach(), tokens, mask)
    losses, known = losses_on_pairs(pi, ref, pairs, better, beta)
    if aggregate == "ls":
        L = mean_losses(losses, known, expected)
        loss = linear_scalarization(L, lam)
    else:
        L = mean_losses(losses, known, None)
        loss = tchebycheff(L, lam)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return L.detach()
