"""mutants.py - wrong answers to the problems of set 3 that students write. The grader has to see them.

MUTANTS: {problem: {what is wrong: {function of adapters.py: the wrong one}}}; all other functions are the reference's.
ZEROS: {function: one that does nothing, or returns zeros of the right shape}
"""
from itertools import combinations

import torch
import torch.nn.functional as F

import course.reference_adapters as right


def front(dominates=lambda q, p: (q >= p).all(-1) & (q > p).any(-1), after=lambda keep, points: keep):
    """nondominated from another dominates(q, p), or with something done to the mask afterwards."""
    return {"nondominated": lambda points: after(~dominates(points[None], points[:, None]).any(1), points)}


def first_of_equals(keep, points):
    """Of equal points only the first stays."""
    same = (points[:, None] == points[None]).all(-1) & torch.ones(len(points), len(points)).tril(-1).bool()
    return keep & ~same.any(1)


def swept(points):
    """The sweep for two dimensions: from the right to the left by the first coordinate, the last one has to rise."""
    keep, top = torch.zeros(len(points), dtype=torch.bool), -torch.inf
    for i in points[:, 0].argsort(descending=True).tolist():
        if points[i, -1] > top:
            keep[i], top = True, float(points[i, -1])
    return keep


def neighbours(points):
    """Each point is compared with the next one alone, after sorting."""
    order = points.sum(1).argsort(descending=True)
    keep = torch.ones(len(points), dtype=torch.bool)
    for better, p in zip(order[:-1], order[1:]):
        keep[p] = not bool((points[better] >= points[p]).all() and (points[better] > points[p]).any())
    return keep


def area(height=lambda y, top: y - top, width=lambda x, before, reference: x - reference[0],
         keep=lambda points, reference: points[(points > reference).all(1)],
         order=lambda points: sorted(points.tolist(), reverse=True), rises=True, start=None, of=float):
    """hypervolume_2d: a staircase from the right to the left, with one of its pieces replaced."""
    def wrong(points, reference):
        total, before = 0.0, reference[0]
        top = reference[1] if start is None else start
        for x, y in order(keep(points, reference)):
            if y > top or not rises:
                total, top, before = total + width(x, before, reference) * height(y, top), y, x
        return of(total)
    return {"hypervolume_2d": wrong}


def box(points, reference):
    """The product of the sides of the box from the reference to each point."""
    return (points - reference).prod(-1)


def above(points, reference):
    return points[(points > reference).all(1)]


def volume(slices=lambda levels, floor: (levels - torch.cat([levels[1:], floor[None]])),
           taken=lambda points, level: points[points[:, -1] >= level][:, :-1], keep=above,
           levels=lambda points: points[:, -1].unique().flip(0)):
    """hypervolume by slices, down to two dimensions, with one of its pieces replaced."""
    def wrong(points, reference):
        points = keep(points, reference)
        if len(points) == 0:
            return 0.0
        if points.shape[1] <= 2:
            return float(right.hypervolume(points, reference))
        found = levels(points)
        return sum(float(d) * wrong(taken(points, level), reference[:-1])
                   for d, level in zip(slices(found, reference[-1]), found))
    return {"hypervolume": wrong}


def included(most=12, clip=True):
    """hypervolume by inclusion and exclusion, up to sets of `most` boxes."""
    def wrong(points, reference):
        points, total = above(points, reference) if clip else points, 0.0
        for size in range(1, 1 + min(most, len(points))):
            for some in combinations(points, size):
                total -= (-1) ** size * float(box(torch.stack(some).amin(0), reference))
        return total
    return {"hypervolume": wrong}


def sampled(points, reference):
    g = torch.Generator().manual_seed(0)
    if len(points := above(points, reference)) == 0:
        return 0.0
    top = points.amax(0)
    x = reference + (top - reference) * torch.rand(20000, len(top), generator=g, dtype=torch.float64)
    return float((x[:, None] <= points).all(-1).any(1).double().mean() * (top - reference).prod())


def spoken(rest=lambda p: (1 - p.sum(-1)).clamp(min=0), policy=lambda p: p, kl_of=lambda p, ref: (p, ref),
           rest_in_kl=True, rest_in_score=True, kl=None, price=lambda beta, kl: beta * kl, over=lambda x: x.mean(0),
           tiny=1e-15):
    """rlhf_objectives with one of its pieces replaced."""
    def wrong(logps, ref, scores, outside, beta):
        p, q = policy(logps.exp()), policy(ref.exp())
        o, o_ref = rest(p), rest(q)
        score = (p[..., None] * scores).sum(1) + (o[:, None] * outside if rest_in_score else 0)       # (X, m)
        p, q = (torch.cat([a, b[:, None]], 1) if rest_in_kl else a for a, b in ((p, o), (q, o_ref)))
        ratio = (p.clamp(min=tiny) / q.clamp(min=tiny)).log() if tiny else p.log() - q.log()
        each = kl(p, q, ratio) if kl else (p * ratio).sum(1)                                          # (X,)
        return over(score - price(beta, each)[:, None])
    return {"rlhf_objectives": wrong}


def tilted(R=lambda scores, lam: scores @ lam, times=lambda R, beta: R / beta, ref=lambda ref: ref,
           rest=lambda ref, outside, beta: (1 - ref.exp().sum(1, keepdim=True)).log() + outside / beta,
           norm=lambda both: both.logsumexp(1, keepdim=True), after=lambda y: y):
    """rlhf_optimum with one of its pieces replaced."""
    def wrong(lam, base, scores, outside, beta):
        y = ref(base) + times(R(scores, lam), beta)
        return after(y - norm(torch.cat([y, rest(base, outside, beta)], 1)))
    return {"rlhf_optimum": wrong}


def expected(labels=lambda P, scores: P, minus=lambda gap: F.softplus(-gap), plus=lambda gap: F.softplus(gap),
             divide=lambda S: S * (S - 1), pairs=lambda S: 1 - torch.eye(S), after=lambda L: L, h=lambda h: h):
    """exact_losses over all ordered pairs, with one of its pieces replaced."""
    def wrong(h_, scores):
        S, x = h_.shape[1], h(h_)
        gap = x[:, :, None] - x[:, None, :]
        P = labels(torch.sigmoid(scores[:, :, None] - scores[:, None, :]), scores)                    # (X, S, S, m)
        each = P * minus(gap)[..., None] + (1 - P) * plus(gap)[..., None]
        return after((each * pairs(S)[..., None]).sum((1, 2)) / divide(S))
    return {"exact_losses": wrong}


def derived(gradient=lambda g: g, hessian=lambda H: H, policy=lambda gap: torch.sigmoid(gap),
            labels=lambda scores, lam: (torch.sigmoid(scores[:, :, None] - scores[:, None, :]) * lam).sum(-1),
            curve=lambda p, P: p * (1 - p), off=lambda S: 1 - torch.eye(S, dtype=torch.float64),
            pairs=lambda S: S * (S - 1) / 2, whole=None):
    """derivatives with one of its pieces replaced."""
    def wrong(h, scores, lam):
        S = h.shape[1]
        p, P = policy(h[:, :, None] - h[:, None, :]), labels(scores, lam)
        c = curve(p, P) * off(S)
        g, H = ((p - P) * off(S)).sum(2) / pairs(S), (torch.diag_embed(c.sum(2)) - c) / pairs(S)
        return whole(gradient(g), hessian(H)) if whole else (gradient(g), hessian(H))
    return {"derivatives": wrong}


def newton(steps=60, start=lambda scores: torch.zeros_like(scores[..., 0]), fix=lambda S: 1 / S ** 2,
           step=lambda H, g: torch.linalg.solve(H, g), rate=1.0, weights=lambda lam: lam,
           derivatives=lambda h, scores, lam: right.derivatives(h, scores, lam),
           after=lambda h: h - h.mean(1, keepdim=True), until=0.0):
    """dpo_optimum with one of its pieces replaced."""
    def wrong(scores, lam):
        h = start(scores)
        for _ in range(steps):
            g, H = derivatives(h, scores, weights(lam))
            if g.abs().max() <= until:
                break
            h = h - rate * step(H + fix(h.shape[1]), g)
        return after(h)
    return {"dpo_optimum": wrong}


def tche(weights=lambda lam: lam, losses=lambda L: L.mean(0), compare=lambda a, b: a > b, bounds=(0.0, 1.0), steps=45,
         after=lambda h, c, scores, lam: h):
    """tche_optimum by bisection of the weight of dimension 1, with one of its pieces replaced."""
    def wrong(scores, lam):
        low, high = bounds
        for _ in range(steps):
            c = (low + high) / 2
            h = right.dpo_optimum(scores, torch.tensor([c, 1 - c], dtype=torch.float64))
            terms = weights(lam) * losses(right.exact_losses(h, scores))
            low, high = (c, high) if compare(*terms.tolist()) else (low, c)
        return after(h, c, scores, lam)
    return {"tche_optimum": wrong}


def subgradient(scores, lam):
    """Gradient steps on the largest term."""
    h = torch.zeros_like(scores[..., 0])
    for n in range(400):
        i = int((lam * right.exact_losses(h, scores).mean(0)).argmax())
        g, _ = right.derivatives(h, scores, torch.eye(2, dtype=torch.float64)[i])
        h = h - 2 / (1 + 0.05 * n) * lam[i] * g
    return h


def best_of_grid(scores, lam):
    grid = [right.dpo_optimum(scores, torch.tensor([c, 1 - c], dtype=torch.float64)) for c in torch.linspace(0, 1, 51)]
    return min(grid, key=lambda h: float((lam * right.exact_losses(h, scores).mean(0)).max()))


def missing(value=lambda lams, J: (lams * J).sum(1), before=lambda lams, base: (lams * base).sum(1),
            total=lambda gain, possible: 1 - gain.sum() / possible.sum(), none=1e-9,
            each=lambda gain, possible: 1 - gain / possible, worst=lambda each, gain, possible: int(each.argmax()),
            which=lambda lams, f: lams[f], after=lambda regret, worst, lam: (regret, worst, lam)):
    """regret with one of its pieces replaced."""
    def wrong(lams, J, base, best):
        gain, possible = (value(lams, x) - before(lams, base) for x in (J, best))
        single = torch.where(possible > none, each(gain, possible), 0.0)
        f = worst(single, gain, possible)
        return after(float(total(gain, possible)), float(single[f]), which(lams, f))
    return {"regret": wrong}


def on(possible):
    return possible > 1e-9


MUTANTS = {
    "nondominated": {
        "better everywhere is asked for": front(lambda q, p: (q > p).all(-1)),
        "equal points dominate each other": front(lambda q, p: (q >= p).all(-1) & ~torch.eye(
            q.shape[1], dtype=torch.bool)),
        "every point dominates itself": front(lambda q, p: (q >= p).all(-1)),
        "better somewhere is enough": front(lambda q, p: (q > p).any(-1)),
        "as good somewhere, better somewhere": front(lambda q, p: (q >= p).any(-1) & (q > p).any(-1)),
        "smaller is better": front(lambda q, p: (q <= p).all(-1) & (q < p).any(-1)),
        "the dominated ones": front(after=lambda keep, points: ~keep),
        "one of equal points": front(after=first_of_equals),
        "the first two dimensions alone": front(lambda q, p: (q >= p)[..., :2].all(-1) & (q > p)[..., :2].any(-1)),
        "compared by the sum": front(lambda q, p: q.sum(-1) > p.sum(-1)),
        "the sweep for two dimensions": {"nondominated": swept},
        "neighbours alone": {"nondominated": neighbours},
        "better in most dimensions": front(lambda q, p: (q > p).sum(-1) > (q < p).sum(-1)),
        "indices": front(after=lambda keep, points: keep.nonzero()[:, 0]),
        "the points": front(after=lambda keep, points: points[keep]),
        "0 and 1": front(after=lambda keep, points: keep.long())},
    "hypervolume_2d": {
        "boxes are added": area(height=lambda y, top: y, rises=False),
        "not sorted": area(order=lambda points: points.tolist(), rises=False),
        "dominated points lower the top": area(rises=False),
        "not sorted, dominated left out": area(order=lambda points: points.tolist()),
        "sorted by the second coordinate": area(order=lambda points: sorted(points.tolist(), key=lambda p: p[1])),
        "ascending": area(order=lambda points: sorted(points.tolist())),
        "the box around all": {"hypervolume_2d": lambda points, reference: float(box(
            points.amax(0), reference).clamp(min=0))},
        "the largest box": {"hypervolume_2d": lambda points, reference: float(box(points, reference).max())},
        "the inner staircase": area(width=lambda x, before, reference: x - before, height=lambda y, top: y),
        "the reference is zero": {"hypervolume_2d": lambda points, reference: right.hypervolume(
            points, torch.zeros_like(reference))},
        "the reference in reverse": {"hypervolume_2d": lambda points, reference: right.hypervolume(
            points, reference.flip(0))},
        "points below the reference count": area(keep=lambda points, reference: points),
        "one coordinate above the reference is enough": area(
            keep=lambda points, reference: points[(points > reference).any(1)]),
        "steps from zero": area(start=0.0),
        "trapezoids": {"hypervolume_2d": lambda points, reference: float(torch.trapezoid(*(
            points[points[:, 0].argsort()] - reference).flip(1).T))},
        "points below are lifted to the reference": area(
            keep=lambda points, reference: points.maximum(reference) + 1e-3),
        "absolute sides": {"hypervolume_2d": lambda points, reference: right.hypervolume(
            reference + (points - reference).abs(), reference)},
        "none left is an error": {"hypervolume_2d": lambda points, reference: right.hypervolume(points, reference)
                                  if len(above(points, reference)) else above(points, reference).amax()}},
    "hypervolume": {
        "boxes are added": {"hypervolume": lambda points, reference: float(box(
            above(points, reference), reference).sum())},
        "boxes of the front are added": {"hypervolume": lambda points, reference: float(box(
            (p := above(points, reference))[right.nondominated(p)], reference).sum()) if len(
                above(points, reference)) else 0.0},
        "pairs of boxes are taken off, and no more": included(most=2),
        "points below the reference count": included(clip=False),
        "the box around all": {"hypervolume": lambda points, reference: float(box(points.amax(0), reference).clamp(
            min=0))},
        "sampled": {"hypervolume": sampled},
        "the first two dimensions alone": {"hypervolume": lambda points, reference: right.hypervolume(
            points[:, :2], reference[:2])},
        "slices with the points of one height alone": volume(taken=lambda points, level: points[
            points[:, -1] == level][:, :-1]),
        "slices without the points at their top": volume(taken=lambda points, level: points[
            points[:, -1] > level][:, :-1]),
        "slices with the points below": volume(taken=lambda points, level: points[points[:, -1] <= level][:, :-1]),
        "the last slice is left out": volume(slices=lambda levels, floor: levels[:-1] - levels[1:]),
        "slices from zero": volume(slices=lambda levels, floor: levels - torch.cat([levels[1:], 0 * floor[None]])),
        "slices as high as the point": volume(slices=lambda levels, floor: levels - floor),
        "equal heights give a slice each, of the height to the one before the last": volume(
            slices=lambda levels, floor: levels - torch.cat([levels[1:], floor[None]]).roll(1)),
        "dominated points are looked for in the first two dimensions": {
            "hypervolume": lambda points, reference: right.hypervolume(
                points[right.nondominated(points[:, :2])], reference)},
        "three dimensions at most": {"hypervolume": lambda points, reference: right.hypervolume(
            points[:, :3], reference[:3])},
        "two dimensions at least": {"hypervolume": lambda points, reference: right.hypervolume(points, reference)
                                    if points.shape[1] > 1 else float((points - reference).sum())}},
    "everything_counts": {
        "other texts have no score": spoken(rest_in_score=False),
        "other texts are not in KL": spoken(rest_in_kl=False),
        "listed responses alone": spoken(rest_in_score=False, rest_in_kl=False),
        "renormalised": spoken(policy=lambda p: p / p.sum(1, keepdim=True)),
        "KL in reverse": spoken(kl=lambda p, q, ratio: -(q * ratio).sum(1)),
        "KL is added": spoken(price=lambda beta, kl: -beta * kl),
        "without β": spoken(price=lambda beta, kl: kl),
        "without KL": spoken(price=lambda beta, kl: 0 * kl),
        "KL over β": spoken(price=lambda beta, kl: kl / beta if beta else 0 * kl),
        "KL is a mean over outcomes": spoken(kl=lambda p, q, ratio: (p * ratio).mean(1)),
        "KL is not weighed by π": spoken(kl=lambda p, q, ratio: ratio.sum(1)),
        "KL squared": spoken(kl=lambda p, q, ratio: (p * ratio ** 2).sum(1)),
        "prompts are summed": spoken(over=lambda x: x.sum(0)),
        "no mean over prompts": spoken(over=lambda x: x),
        "one number": spoken(over=lambda x: x.mean()),
        "0 log 0 is NaN": spoken(rest=lambda p: 1 - p.sum(1), tiny=0.0),
        "other texts have at least 0.001": spoken(rest=lambda p: (1 - p.sum(1)).clamp(min=1e-3)),
        "the outside mass of all prompts together": spoken(rest=lambda p: (1 - p.sum(1).mean()).expand(len(p))),
        "other texts add their score": spoken(rest=lambda p: p.sum(1) - 1)},
    "tilt": {
        "Z over the listed responses": tilted(norm=lambda both: both[:, :-1].logsumexp(1, keepdim=True)),
        "without Z": tilted(norm=lambda both: 0.0),
        "β multiplies": tilted(times=lambda R, beta: R * beta, rest=lambda ref, outside, beta: (
            1 - ref.exp().sum(1, keepdim=True)).log() + outside * beta),
        "without β": tilted(times=lambda R, beta: R,
                            rest=lambda ref, outside, beta: (1 - ref.exp().sum(1, keepdim=True)).log() + outside),
        "without π_ref": tilted(ref=lambda ref: 0 * ref,
                                rest=lambda ref, outside, beta: 0 * ref[:, :1] + outside / beta),
        "other texts are not tilted": tilted(rest=lambda ref, outside, beta: (
            1 - ref.exp().sum(1, keepdim=True)).log()),
        "other texts keep their mass": tilted(norm=lambda both: both[:, :-1].logsumexp(1, keepdim=True),
                                              after=lambda y: y + torch.tensor(0.9).log()),
        "the wrong sign": tilted(times=lambda R, beta: -R / beta, rest=lambda ref, outside, beta: (
            1 - ref.exp().sum(1, keepdim=True)).log() - outside / beta),
        "probabilities": tilted(after=lambda y: y.exp()),
        "equal weights": tilted(R=lambda scores, lam: scores.mean(-1)),
        "λ in reverse": tilted(R=lambda scores, lam: scores @ lam.flip(0)),
        "one Z for all prompts": tilted(norm=lambda both: both.exp().mean(0).sum().log()),
        "exp overflows": tilted(norm=lambda both: both.exp().sum(1, keepdim=True).log()),
        "clamped at e^20": tilted(norm=lambda both: both.clamp(max=20).logsumexp(1, keepdim=True)),
        "Tchebycheff's reward": tilted(R=lambda scores, lam: (lam * scores).amin(-1)),
        "all outcomes are returned": {"rlhf_optimum": lambda lam, ref, scores, outside, beta: F.pad(
            right.rlhf_optimum(lam, ref, scores, outside, beta), (0, 1))}},
    "exact_losses": {
        "both orders are added": expected(divide=lambda S: S * (S - 1) / 2),
        "divided by S²": expected(divide=lambda S: S * S),
        "a response beside itself counts": expected(pairs=lambda S: torch.ones(S, S), divide=lambda S: S * S),
        "summed over pairs": expected(divide=lambda S: 2.0),
        "hard labels": expected(labels=lambda P, scores: (P > 0.5).double()),
        "the other order is forgotten": expected(plus=lambda gap: 0 * gap, pairs=lambda S: torch.ones(S, S).triu(1),
                                                 divide=lambda S: S * (S - 1) / 2),
        "the labels of the other one": expected(labels=lambda P, scores: 1 - P),
        "labels of the scores' ratio": expected(labels=lambda P, scores: torch.sigmoid(
            scores[:, :, None] / (scores[:, None, :].abs() + 1))),
        "the wrong sign": expected(after=lambda L: -L),
        "without the logarithm": expected(minus=lambda gap: torch.sigmoid(-gap), plus=torch.sigmoid),
        "log of sigmoid": expected(minus=lambda gap: -torch.sigmoid(gap).log(),
                                   plus=lambda gap: -torch.sigmoid(-gap).log()),
        "log of sigmoid, with an epsilon": expected(minus=lambda gap: -(torch.sigmoid(gap) + 1e-9).log(),
                                                    plus=lambda gap: -(torch.sigmoid(-gap) + 1e-9).log()),
        "the mean over prompts": expected(after=lambda L: L.mean(0)),
        "the mean over dimensions": expected(after=lambda L: L.mean(1)),
        "one dimension's labels for all": expected(labels=lambda P, scores: P[..., :1].expand_as(P)),
        "(m, X)": expected(after=lambda L: L.T),
        "h normalised": expected(h=lambda h: h.log_softmax(1).exp()),
        "the first response against all others": {"exact_losses": lambda h, scores: torch.stack([right.exact_losses(
            h[:, [0, b]], scores[:, [0, b]]) for b in range(1, h.shape[1])]).mean(0)}},
    "derivatives": {
        "the gradient's sign": derived(gradient=lambda g: -g),
        "the Hessian's sign": derived(hessian=lambda H: -H),
        "of the sum over pairs": derived(pairs=lambda S: 1.0),
        "both orders count in the divisor": derived(pairs=lambda S: S * (S - 1)),
        "divided by S²": derived(pairs=lambda S: S * S / 2),
        "divided by the number of prompts": derived(gradient=lambda g: g / len(g), hessian=lambda H: H / len(H)),
        "a response beside itself has a label of 0": derived(
            off=lambda S: torch.ones(S, S, dtype=torch.float64), labels=lambda scores, lam: (torch.sigmoid(
                scores[:, :, None] - scores[:, None, :]) * lam).sum(-1) * (1 - torch.eye(scores.shape[1]))),
        "the diagonal without the sum": derived(hessian=lambda H: H - torch.diag_embed(H.diagonal(dim1=1, dim2=2))),
        "the diagonal alone": derived(hessian=lambda H: torch.diag_embed(H.diagonal(dim1=1, dim2=2))),
        "positive off the diagonal": derived(hessian=lambda H: H.abs()),
        "the constant is fixed in it": derived(hessian=lambda H: H + 1 / H.shape[1] ** 2),
        "a ridge in it": derived(hessian=lambda H: H + 1e-3 * torch.eye(H.shape[1], dtype=torch.float64)),
        "the labels' curvature": derived(curve=lambda p, P: P * (1 - P)),
        "the curvature is σ": derived(curve=lambda p, P: p),
        "λ·r makes the labels": derived(labels=lambda scores, lam: torch.sigmoid(
            (scores @ lam)[:, :, None] - (scores @ lam)[:, None, :])),
        "λ is left out": derived(labels=lambda scores, lam: torch.sigmoid(
            scores[:, :, None] - scores[:, None, :]).mean(-1)),
        "λ is left out, dimensions are added": derived(whole=lambda g, H: (2 * g, 2 * H)),
        "the labels are left out": derived(labels=lambda scores, lam: torch.full(
            (len(scores), scores.shape[1], scores.shape[1]), 0.5, dtype=torch.float64)),
        "turned labels": derived(labels=lambda scores, lam: (torch.sigmoid(
            scores[:, None, :] - scores[:, :, None]) * lam).sum(-1)),
        "the gradient alone": derived(whole=lambda g, H: g),
        "Hessian first": derived(whole=lambda g, H: (H, g)),
        "the mean of the prompts' Hessians": derived(hessian=lambda H: H.mean(0))},
    "newton": {
        "one step": newton(steps=1),
        "two steps": newton(steps=2),
        "three steps": newton(steps=3),
        "seven steps": newton(steps=7),
        "stops at a gradient of 1e-4": newton(until=1e-4),
        "half steps, ten of them": newton(steps=10, rate=0.5),
        "uphill": newton(rate=-1.0, steps=1),
        "gradient descent": newton(step=lambda H, g: g, steps=60),
        "the Hessian's diagonal alone": newton(step=lambda H, g: g / H.diagonal(dim1=1, dim2=2)),
        "a ridge, and few steps": newton(step=lambda H, g: torch.linalg.solve(
            H + 0.05 * torch.eye(g.shape[1], dtype=torch.float64), g), steps=15),
        "the mean is not taken off": newton(after=lambda h: h - h[:, :1]),
        "the mean of all prompts is taken off": newton(after=lambda h: h + 0.1 * torch.arange(len(h))[:, None]
                                                       - (h + 0.1 * torch.arange(len(h))[:, None]).mean()),
        "log-probabilities": newton(after=lambda h: h.log_softmax(1)),
        "λ·r": {"dpo_optimum": lambda scores, lam: (y := scores @ lam) - y.mean(1, keepdim=True)},
        "λ in reverse": newton(weights=lambda lam: lam.flip(0)),
        "equal weights": newton(weights=lambda lam: torch.full_like(lam, 1 / len(lam))),
        "the vertices' optima are mixed by their losses": newton(weights=lambda lam: lam ** 2 / (lam ** 2).sum()),
        "the largest weight alone": newton(weights=lambda lam: F.one_hot(lam.argmax(), len(lam)).double()),
        "λ·r makes the labels": newton(derivatives=lambda h, scores, lam: right.derivatives(
            h, (scores @ lam)[..., None], torch.ones(1, dtype=torch.float64))),
        "one h for all prompts": {"dpo_optimum": lambda scores, lam: right.dpo_optimum(scores, lam).mean(
            0, keepdim=True).expand(len(scores), -1)},
        "the first prompt's Hessian for all": newton(
            step=lambda H, g: torch.linalg.solve(H[:1].expand_as(H), g), steps=6)},
    "tchebycheff_point": {
        "linear scalarisation": {"tche_optimum": lambda scores, lam: right.dpo_optimum(scores, lam)},
        "λ in reverse": tche(weights=lambda lam: lam.flip(0)),
        "equal losses": tche(weights=lambda lam: torch.ones_like(lam)),
        "λ divides": tche(weights=lambda lam: 1 / lam.clamp(min=1e-9)),
        "a prompt at a time": {"tche_optimum": lambda scores, lam: torch.cat([right.tche_optimum(scores[x:x + 1], lam)
                                                                              for x in range(len(scores))])},
        "the losses of the first prompt": tche(losses=lambda L: L[0]),
        "the largest loss of all prompts": tche(losses=lambda L: L.amax(0)),
        "the wrong half": tche(compare=lambda a, b: a < b),
        "five steps": tche(steps=5),
        "ten steps": tche(steps=10),
        "never at an end": tche(bounds=(0.05, 0.95)),
        "a grid of weights": {"tche_optimum": best_of_grid},
        "subgradient steps": {"tche_optimum": subgradient},
        "1/λ as weights of linear scalarisation": {"tche_optimum": lambda scores, lam: right.dpo_optimum(
            scores, (w := 1 / lam.clamp(min=1e-9)) / w.sum())},
        "the ends' policies are mixed": tche(after=lambda h, c, scores, lam: c * right.dpo_optimum(
            scores, torch.tensor([1.0, 0.0], dtype=torch.float64)) + (1 - c) * right.dpo_optimum(
                scores, torch.tensor([0.0, 1.0], dtype=torch.float64))),
        "the weight is returned": tche(after=lambda h, c, scores, lam: torch.tensor([c, 1 - c], dtype=torch.float64)),
        "the mean is not taken off": tche(after=lambda h, c, scores, lam: h - h[:, :1]),
        "vertices fail": tche(weights=lambda lam: torch.where(lam > 0, lam, torch.nan))},
    "regret": {
        "the mean of quotients": missing(total=lambda gain, possible: (1 - gain / possible)[on(possible)].mean()),
        "what is reached": missing(total=lambda gain, possible: gain.sum() / possible.sum()),
        "without the base": missing(before=lambda lams, base: 0.0),
        "without λ": missing(value=lambda lams, J: J.sum(1), before=lambda lams, base: base.sum()),
        "not divided": missing(total=lambda gain, possible: (possible - gain).sum()),
        "the model's gain divides": missing(total=lambda gain, possible: 1 - possible.sum() / gain.sum()),
        "cut at 1": missing(total=lambda gain, possible: (1 - gain.sum() / possible.sum()).clamp(max=1)),
        "absolute gains": missing(total=lambda gain, possible: 1 - gain.abs().sum() / possible.sum()),
        "negative gains count as none": missing(
            total=lambda gain, possible: 1 - gain.clamp(min=0).sum() / possible.sum()),
        "where nothing can be gained is left out": missing(total=lambda gain, possible: (
            1 - gain[on(possible)].sum() / possible[on(possible)].sum())),
        "where nothing can be gained is infinite": missing(none=-torch.inf),
        "a tiny number in the divisor": missing(
            none=-torch.inf, each=lambda gain, possible: 1 - gain / (possible + 1e-9)),
        "the smallest": missing(worst=lambda each, gain, possible: int(each.argmin())),
        "the largest missing gain": missing(worst=lambda each, gain, possible: int((possible - gain).argmax())),
        "the mean instead of the worst": missing(after=lambda regret, worst, lam: (regret, regret, lam)),
        "the index": missing(which=lambda lams, f: f),
        "the preference with the largest weight": missing(which=lambda lams, f: lams[lams[:, 0].argmax()]),
        "two values": missing(after=lambda regret, worst, lam: (regret, worst)),
        "Tchebycheff's gain": missing(value=lambda lams, J: (lams * J).amin(1),
                                      before=lambda lams, base: (lams * base).amin(1)),
        "λ of the first preference": missing(value=lambda lams, J: J @ lams[0],
                                             before=lambda lams, base: base @ lams[0])},
}
ZEROS = {"nondominated": lambda points: torch.zeros(len(points), dtype=torch.bool),
         "hypervolume_2d": lambda points, reference: 0.0, "hypervolume": lambda points, reference: 0.0,
         "rlhf_objectives": lambda logps, ref, scores, outside, beta: torch.zeros_like(scores[0, 0]),
         "rlhf_optimum": lambda lam, ref, scores, outside, beta: torch.zeros_like(ref),
         "exact_losses": lambda h, scores: torch.zeros_like(scores[:, 0]),
         "derivatives": lambda h, scores, lam: (torch.zeros_like(h), torch.zeros_like(h[:, :, None] * h[:, None, :])),
         "dpo_optimum": lambda scores, lam: torch.zeros_like(scores[..., 0]),
         "tche_optimum": lambda scores, lam: torch.zeros_like(scores[..., 0]),
         "regret": lambda lams, J, J_base, J_best: (0.0, 0.0, torch.zeros_like(lams[0]))}
