"""another.py - set 5 solved once more from its handout alone: projections, all supports in turn, loops over tokens."""
from itertools import combinations

import torch


def min_norm_pair(a, b):
    along = b - a
    length = along @ along
    share = (-(a @ along) / length).clamp(0, 1) if length > 0 else a.new_tensor(0.5)          # of b
    return torch.stack([1 - share, share])


def min_norm_weights(gram):
    if gram.isnan().any() or gram.isinf().any():
        raise ValueError("not a Gram matrix")
    m, scale = len(gram), float(gram.diagonal().max()) or 1.0
    best, least = None, float("inf")
    for size in range(1, m + 1):
        of = torch.tensor(list(combinations(range(m), size)))                         # (supports, size)
        system = torch.ones(len(of), size + 1, size + 1, dtype=torch.float64)
        system[:, :size, :size] = gram[of[:, :, None], of[:, None, :]] / scale
        system[:, size, size] = 0
        right = torch.zeros(size + 1, dtype=torch.float64)
        right[size] = 1
        y = (torch.linalg.pinv(system) @ right)[:, :size]
        for support, weights in zip(of, y):
            if weights.min() >= -1e-12 and abs(weights.sum() - 1) < 1e-9:
                c = torch.zeros(m, dtype=torch.float64).index_add(0, support, weights.clamp(min=0))
                if c @ gram @ c < least:
                    best, least = c / c.sum(), c @ gram @ c
    return best


def mgda_backward(losses, parameters):
    columns = []
    for loss in losses:
        for p in parameters:
            p.grad = None
        loss.backward(retain_graph=True)
        columns.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters])
    inner = lambda x, y: sum((u.double() * v.double()).sum() for u, v in zip(x, y))
    gram = torch.stack([torch.stack([inner(x, y) for y in columns]) for x in columns])
    c = min_norm_weights(gram)
    for i, p in enumerate(parameters):
        p.grad = sum(c[j].to(p) * column[i] for j, column in enumerate(columns))
    mine = [p.grad for p in parameters]
    return c, inner(mine, mine).sqrt()


def noon(advantages, ratio, epsilon):
    keep = (advantages > 0) & (ratio <= 1 + epsilon).unsqueeze(2)
    return torch.where(keep, advantages, torch.zeros_like(advantages))


def pama_weights(advantages):
    order = torch.argsort(advantages.double())
    low, high = advantages.double()[order[0]], advantages.double()[order[-1]]
    if low == high:
        return torch.full((len(advantages),), 1 / len(advantages), dtype=torch.float64)
    share = ((0 - low) / (high - low)).clamp(0, 1)                                    # of the largest
    c = torch.zeros(len(advantages), dtype=torch.float64)
    c[order[0]], c[order[-1]] = 1 - share, share
    return c


def pama_advantages(advantages, mask, reading):
    tokens = [(r, t) for r in range(len(mask)) for t in range(mask.shape[1]) if mask[r, t]]
    vectors = torch.stack([advantages[r, t] for r, t in tokens]).double()             # (tokens, m)
    if reading == "T":
        out = torch.zeros_like(mask, dtype=advantages.dtype)
        for r, t in tokens:
            out[r, t] = pama_weights(advantages[r, t]).to(advantages) @ advantages[r, t]
        return out, None
    c = min_norm_weights(vectors.T @ vectors) if reading == "V" else pama_weights(vectors.mean(0))
    return torch.einsum("rtm,m->rt", advantages, c.to(advantages)), c
