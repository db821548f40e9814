"""another.py - set 3 solved once more from its handout alone: loops over points, outer products, a bisection."""
import math

import torch
import torch.nn.functional as F


def nondominated(points):
    keep = []
    for p in points:
        as_good, better = (points >= p).all(1), (points > p).any(1)
        keep.append(not bool((as_good & better).any()))
    return torch.tensor(keep)


def hypervolume_2d(points, reference):
    area, top = 0.0, float(reference[1])
    for x, y in sorted((points - 0.0).tolist(), reverse=True):
        if x > reference[0] and y > top:
            area, top = area + (x - float(reference[0])) * (y - top), y
    return area


def hypervolume(points, reference):
    points = points[(points > reference).all(1)]
    if len(points) == 0:
        return 0.0
    if points.shape[1] == 1:
        return float(points.max() - reference[0])
    below, volume = float(reference[-1]), 0.0
    for level in points[:, -1].unique().tolist():                     # ascending
        volume += (level - below) * hypervolume(points[points[:, -1] >= level][:, :-1], reference[:-1])
        below = level
    return volume


def rlhf_objectives(logps, ref, scores, outside, beta):
    J = torch.zeros(scores.shape[2], dtype=torch.float64)
    for x in range(len(logps)):
        p, q = logps[x].exp(), ref[x].exp()
        kl = (p * (logps[x] - ref[x])).sum()
        rest, rest_of_ref = float(1 - p.sum()), float(1 - q.sum())
        if rest > 1e-12:
            kl = kl + rest * math.log(rest / rest_of_ref)
        J += (p[:, None] * scores[x]).sum(0) + max(rest, 0.0) * outside - beta * kl
    return J / len(logps)


def rlhf_optimum(lam, ref, scores, outside, beta):
    tilted = ref + (scores * lam).sum(2) / beta
    rest = (1 - ref.exp().sum(1, keepdim=True)).clamp(min=0).log() + outside * lam.sum() / beta
    return tilted - torch.cat([tilted, rest], 1).logsumexp(1, keepdim=True)


def exact_losses(h, scores):
    S = h.shape[1]
    a, b = torch.triu_indices(S, S, 1)
    gap, wins = h[:, a] - h[:, b], torch.sigmoid(scores[:, a] - scores[:, b])                 # (X, P), (X, P, m)
    return (wins * F.softplus(-gap)[..., None] + (1 - wins) * F.softplus(gap)[..., None]).mean(1)


def derivatives(h, scores, lam):
    S = h.shape[1]
    pairs, off = S * (S - 1) / 2, 1 - torch.eye(S, dtype=torch.float64)
    policy = torch.sigmoid(h[:, :, None] - h[:, None, :])                             # (X, S, S): how often a beats b
    labels = (torch.sigmoid(scores[:, :, None] - scores[:, None, :]) * lam).sum(-1)
    slope = policy * (1 - policy) * off
    return ((policy - labels) * off).sum(2) / pairs, (torch.diag_embed(slope.sum(2)) - slope) / pairs


def dpo_optimum(scores, lam):
    X, S, _ = scores.shape
    h, ones = torch.zeros(X, S, dtype=torch.float64), torch.full((S, S), 1 / S ** 2, dtype=torch.float64)
    for _ in range(100):
        gradient, hessian = derivatives(h, scores, lam)
        if gradient.abs().max() < 1e-13:
            break
        h = h - torch.linalg.solve(hessian + ones, gradient)
    return h - h.mean(1, keepdim=True)


def tche_optimum(scores, lam):
    low, high = 0.0, 1.0                                              # of the weight of dimension 1
    for _ in range(45):
        c = (low + high) / 2
        h = dpo_optimum(scores, torch.tensor([c, 1 - c], dtype=torch.float64))
        first, second = lam * exact_losses(h, scores).mean(0)
        low, high = (c, high) if first > second else (low, c)
    return h


def regret(lams, J, J_base, J_best):
    gain = [float(lam @ (j - J_base)) for lam, j in zip(lams, J)]
    possible = [float(lam @ (j - J_base)) for lam, j in zip(lams, J_best)]
    each = [1 - g / p if p > 1e-9 else 0.0 for g, p in zip(gain, possible)]
    worst = max(range(len(each)), key=lambda f: each[f])
    return 1 - sum(gain) / sum(possible), each[worst], lams[worst]
