"""mutants.py - wrong answers to the problems of set 5 that students write. The grader has to see them.

MUTANTS: {problem: {what is wrong: {function of adapters.py: the wrong one}}}; all other functions are the reference's.
ZEROS: {function: one that does nothing, or returns zeros of the right shape}
"""
import torch

import course.reference_adapters as right


def pair(share=lambda aa, ab, bb: (bb - ab) / (aa + bb - 2 * ab), clip=lambda x: x.clamp(0, 1),
         equal=lambda aa, ab, bb: aa + bb - 2 * ab <= 1e-15 * (aa + bb), both=lambda x: torch.stack([x, 1 - x])):
    """min_norm_pair with one of its pieces replaced: the weight of a, how it is clipped, what counts as equal."""
    def wrong(a, b):
        aa, ab, bb = a @ a, a @ b, b @ b
        return both(torch.tensor(0.5).to(a) if equal(aa, ab, bb) else clip(share(aa, ab, bb)))
    return {"min_norm_pair": wrong}


def solved(gram):
    """Weights of sum 1 and of any sign that make the mean shortest."""
    y = torch.linalg.pinv(gram) @ torch.ones(len(gram)).to(gram)
    return y / y.sum()


def frank_wolfe(steps, start="shortest", precise=True):
    """min_norm_weights by Frank-Wolfe, for so many steps. precise: by line search, else by 2 / (step + 2)."""
    def wrong(gram):
        m = len(gram)
        c = torch.full((m,), 1 / m, dtype=torch.float64) if start == "mean" else one_hot(gram.diagonal().argmin(), m)
        for step in range(steps):
            toward = one_hot((gram @ c).argmin(), m)
            way = toward - c
            length = way @ gram @ way
            move = ((-(c @ gram @ way) / length).clamp(0, 1) if length > 0 else 0.0) if precise else 2 / (step + 2)
            c = c + move * way
        return c
    return weighing(wrong)


def descending(steps, rate, project):
    """min_norm_weights by gradient descent on c, and a way back to the simplex after each step."""
    def wrong(gram):
        c = torch.full((len(gram),), 1 / len(gram), dtype=torch.float64)
        for _ in range(steps):
            c = project(c, rate / max(float(gram.trace()), 1e-300) * (gram @ c))
        return c
    return weighing(wrong)


def one_hot(i, m):
    return torch.eye(m, dtype=torch.float64)[i]


def weighing(wrong, refuse=True):
    """min_norm_weights that is wrong for matrices that are finite."""
    def checked(gram):
        if refuse and not gram.isfinite().all():
            raise ValueError("not finite")
        return wrong(gram)
    return {"min_norm_weights": checked}


def without_going_back(gram):
    """Drops all negative weights at once, and solves again for the rest, until none is negative."""
    held = list(range(len(gram)))
    while True:
        y = solved(gram[held][:, held])
        if (y >= 0).all() or len(held) == 1:
            return torch.zeros(len(gram), dtype=torch.float64).index_put((torch.tensor(held),), y)
        held = [i for i, w in zip(held, y) if w > 0] or held[:1]


def best_pair(gram):
    """The best mean of two vectors, and never of three."""
    m, found = len(gram), []
    for i in range(m):
        for j in range(i, m):
            held = [i, j]
            c = torch.zeros(m, dtype=torch.float64).index_add(
                0, torch.tensor(held), right.min_norm_weights(gram[held][:, held]))
            found.append((float(c @ gram @ c), i, j, c))
    return min(found, key=lambda each: each[:3])[3]


def stepping(weigh=right.min_norm_weights, direction=lambda c, flat: c @ flat, norm=lambda c, flat: (c @ flat).norm(),
             put=lambda p, g: setattr(p, "grad", g), prepare=lambda flat: flat, keep=lambda x: x):
    """mgda_backward with one of its pieces replaced. flat: (m, all numbers of the parameters)"""
    def wrong(losses, parameters):
        grads = [torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True) for loss in losses]
        flat = torch.stack([torch.cat([g.flatten() for g in grad]) for grad in grads]).double()
        c = weigh((x := prepare(flat)) @ x.T)
        parts = direction(c, flat).split([p.numel() for p in parameters])
        for p, part in zip(parameters, parts):
            put(p, part.view_as(p).to(p))
        return keep(c), norm(c, flat)
    return {"mgda_backward": wrong}


def own_weights(losses, parameters):
    """One c for each parameter."""
    for p in parameters:
        grads = torch.stack([torch.autograd.grad(loss, p, retain_graph=True, materialize_grads=True)[0].flatten()
                             for loss in losses])
        c = right.min_norm_weights(grads.double() @ grads.double().T)
        p.grad = (c.to(grads) @ grads).view_as(p)
    return c, torch.cat([p.grad.flatten() for p in parameters]).norm()


def by_backward(losses, parameters):
    """losses' .backward() one after the other, without clearing .grad in between."""
    flat = []
    for p in parameters:
        p.grad = None
    for loss in losses:
        loss.backward(retain_graph=True)
        flat.append(torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten().clone()
                               for p in parameters]))
    flat = torch.stack(flat).double()
    c = right.min_norm_weights(flat @ flat.T)
    for p, part in zip(parameters, (c @ flat).split([p.numel() for p in parameters])):
        p.grad = part.view_as(p).to(p)
    return c, (c @ flat).norm()


def graph_freed(losses, parameters):
    grads = [torch.autograd.grad(loss, parameters, materialize_grads=True) for loss in losses]
    flat = torch.stack([torch.cat([g.flatten() for g in grad]) for grad in grads]).double()
    c = right.min_norm_weights(flat @ flat.T)
    for p, *each in zip(parameters, *grads):
        p.grad = sum(w * g for w, g in zip(c.tolist(), each))
    return c, (c @ flat).norm()


def first_alone(losses, parameters):
    """The parameters after the first have no part in the weights."""
    c, _ = right.mgda_backward(losses, parameters[:1])
    for p in parameters[1:]:
        p.grad = sum(w * g[0] for w, g in zip(c.tolist(), (
            torch.autograd.grad(loss, [p], retain_graph=True, materialize_grads=True) for loss in losses)))
    return c, torch.cat([p.grad.flatten() for p in parameters]).norm()


def dropping(keep=lambda ratio, epsilon: ratio <= 1 + epsilon, part=lambda A: A.clamp(min=0),
             factor=lambda ratio, epsilon: 1.0):
    """noon with another mask of tokens, another part of the advantages, or a factor."""
    def wrong(A, ratio, epsilon):
        mask = keep(ratio, epsilon)
        by = factor(ratio, epsilon)
        by = by[..., None] if torch.is_tensor(by) else by
        return part(A) * (mask if mask.ndim == 3 else mask[..., None]) * by
    return {"noon": wrong}


def in_place(A, ratio, epsilon):
    A.clamp_(min=0)
    A[ratio > 1 + epsilon] = 0
    return A


def both_sides(A, ratio, epsilon):
    """As the clip of signed advantages: those that are negative are dropped on the other side, too."""
    return torch.where(A > 0, A * (ratio <= 1 + epsilon)[..., None], A * (ratio >= 1 - epsilon)[..., None])


def theorem(low=lambda A: A.argmin(), high=lambda A: A.argmax(), share=lambda a, b: (-a / (b - a)).clamp(0, 1),
            equal=None, tie=lambda A: A.min() == A.max(), take=lambda A: A.double()):
    """pama_weights from the objectives that are mixed, and the weight of the higher one from the two numbers."""
    def wrong(A):
        A = take(A)
        if tie(A):
            return equal(A) if equal else torch.full_like(A, 1 / len(A))
        c = torch.zeros_like(A)
        w = share(A[low(A)], A[high(A)])
        c[low(A)] += 1 - w
        c[high(A)] += w
        return c
    return {"pama_weights": wrong}


def reading(**wrong):
    """pama_advantages with other functions for some readings: V=…, S=…, T=…"""
    return {"pama_advantages": lambda A, mask, name: wrong.get(name, lambda A, mask: right.pama_advantages(
        A, mask, name))(A, mask)}


def weighed(weigh, vectors=lambda A, mask: A[mask.bool()].T.double(), combine=lambda A, c: (A * c.to(A)).sum(-1)):
    """A reading from weights of the tokens' advantages (m, tokens)."""
    def of(A, mask):
        c = weigh(vectors(A, mask))
        return combine(A, c), c
    return of


def gram_weights(x):
    return right.min_norm_weights(x @ x.T)


def every(A, mask):
    """The advantages (m, tokens) with those at padding."""
    return A.flatten(0, 1).T.double()


def unit(x):
    return x / x.norm(dim=1, keepdim=True).clamp(min=1e-300)


def smallest(means):
    return (means == means.min()).double() / (means == means.min()).sum()


def own_means(A, mask):
    """The mean over responses of their own means."""
    return ((A * mask[..., None]).sum(1) / mask.sum(1)[:, None]).mean(0)


MUTANTS = {
    "min_norm_pair": {
        "the weights exchanged": pair(both=lambda x: torch.stack([1 - x, x])),
        "not clipped": pair(clip=lambda x: x),
        "clipped above alone": pair(clip=lambda x: x.clamp(max=1)),
        "clipped below alone": pair(clip=lambda x: x.clamp(min=0)),
        "the scalar product is left out": pair(lambda aa, ab, bb: bb / (aa + bb).clamp(min=1e-300)),
        "the scalar product counts once": pair(lambda aa, ab, bb: (bb - ab) / (aa + bb - ab)),
        "the scalar product with the wrong sign": pair(lambda aa, ab, bb: (bb + ab) / (aa + bb + 2 * ab)),
        "lengths instead of squares": pair(lambda aa, ab, bb: bb.sqrt() / (aa.sqrt() + bb.sqrt())),
        "an epsilon in the denominator": pair(lambda aa, ab, bb: (bb - ab) / (aa + bb - 2 * ab + 1e-8)),
        "NaN for equal vectors": pair(equal=lambda aa, ab, bb: False),
        "all weight on a for equal vectors": {"min_norm_pair": lambda a, b: torch.tensor([1.0, 0.0]) if torch.equal(
            a, b) else right.min_norm_pair(a, b)},
        "nearly equal counts as equal": pair(equal=lambda aa, ab, bb: aa + bb - 2 * ab <= 0.01),
        "0.999 and 0.001": pair(clip=lambda x: x.clamp(0.001, 0.999)),
        "always on the segment's inside": pair(clip=lambda x: x.sigmoid()),
        "absolute values, normalised": pair(both=lambda x: (y := torch.stack([x, 1 - x]).abs()) / y.sum(),
                                            clip=lambda x: x),
        "the shorter vector": pair(lambda aa, ab, bb: (aa <= bb).to(aa)),
        "the point instead of the weights": {"min_norm_pair": lambda a, b: torch.stack([a, b]).T.double()
                                             @ right.min_norm_pair(a, b)},
        "normalised vectors": {"min_norm_pair": lambda a, b: right.min_norm_pair(*unit(torch.stack([a, b])))}},
    "min_norm_weights": {
        "equal weights": weighing(lambda gram: torch.full((len(gram),), 1 / len(gram)).double()),
        "the shortest vector alone": weighing(lambda gram: one_hot(gram.diagonal().argmin(), len(gram))),
        "inverse squared lengths": weighing(lambda gram: (
            y := 1 / gram.diagonal().clamp(min=1e-12)) / y.sum()),
        "signs ignored": weighing(solved),
        "signs ignored, then negative ones set to 0": weighing(
            lambda gram: (y := solved(gram).clamp(min=0)) / y.sum()),
        "signs ignored, then softmax": weighing(lambda gram: solved(gram).softmax(0)),
        "negative ones dropped at once, for good": weighing(without_going_back),
        "the best pair": weighing(best_pair),
        "Frank-Wolfe, 20 steps": frank_wolfe(20),
        "Frank-Wolfe, 250 steps": frank_wolfe(250),
        "Frank-Wolfe without line search": frank_wolfe(500, precise=False),
        "Frank-Wolfe from the mean": frank_wolfe(300, "mean"),
        "descent, clipped and divided by the sum": descending(
            300, 1.0, lambda c, step: (y := (c - step).clamp(min=0)) / y.sum().clamp(min=1e-12)),
        "descent on logits of a softmax": descending(300, 5.0, lambda c, step: (c.log() - step).softmax(0)),
        "nothing is refused": weighing(lambda gram: right.min_norm_weights(gram.nan_to_num(0.0, 0.0, 0.0)),
                                       refuse=False),
        "NaN alone is refused": {"min_norm_weights": lambda gram: right.min_norm_weights(
            gram.where(~gram.isinf(), 1.0))},
        "a singular matrix raises": weighing(lambda gram: (
            torch.linalg.inv(gram), right.min_norm_weights(gram))[1]),
        "a small number on the diagonal": weighing(
            lambda gram: right.min_norm_weights(gram + 1e-3 * torch.eye(len(gram)).double())),
        "stops at a gap of 1e-6, whatever the unit": weighing(lambda gram: right.min_norm_weights(
            gram) if gram.diagonal().max() > 1e-6 else one_hot(gram.diagonal().argmin(), len(gram))),
        "in float32": weighing(lambda gram: right.min_norm_weights(gram.float()))},
    "mgda_backward": {
        "equal weights": stepping(lambda gram: torch.full((len(gram),), 1 / len(gram)).double()),
        "the sum of the gradients": stepping(direction=lambda c, flat: flat.sum(0)),
        "uphill": stepping(direction=lambda c, flat: -(c @ flat)),
        "divided by its length": stepping(direction=lambda c, flat: (c @ flat) / (c @ flat).norm()),
        "weights in reverse": stepping(direction=lambda c, flat: c.flip(0) @ flat),
        "normalised gradients decide": stepping(prepare=unit),
        "normalised gradients are added": stepping(direction=lambda c, flat: c @ unit(flat)),
        "the squared length": stepping(norm=lambda c, flat: (c @ flat).square().sum()),
        "the weighted mean of the lengths": stepping(norm=lambda c, flat: c @ flat.norm(dim=1)),
        "the length of the mean gradient": stepping(norm=lambda c, flat: flat.mean(0).norm()),
        "the shortest gradient's length": stepping(norm=lambda c, flat: flat.norm(dim=1).min()),
        "added to the old gradient": stepping(put=lambda p, g: p.grad.add_(g)),
        "nothing is written": stepping(put=lambda p, g: None),
        "a step is taken instead": stepping(put=lambda p, g: p.data.sub_(0.1 * g)),
        "a c for each parameter": {"mgda_backward": own_weights},
        "the first parameter decides": {"mgda_backward": first_alone},
        "gradients pile up in .grad": {"mgda_backward": by_backward},
        "the graph is freed after the first loss": {"mgda_backward": graph_freed},
        "a number instead of a tensor": stepping(norm=lambda c, flat: float((c @ flat).norm())),
        "c alone": {"mgda_backward": lambda *a: right.mgda_backward(*a)[0]},
        "one step of Frank-Wolfe": stepping(frank_wolfe(1)["min_norm_weights"])},
    "noon": {
        "negative ones are kept": dropping(part=lambda A: A),
        "positive ones are dropped": dropping(part=lambda A: A.clamp(max=0)),
        "absolute values": dropping(part=torch.abs),
        "the ratio plays no part": dropping(lambda ratio, epsilon: torch.ones_like(ratio)),
        "dropped on both sides": dropping(lambda ratio, epsilon: (ratio - 1).abs() <= epsilon),
        "dropped below, not above": dropping(lambda ratio, epsilon: ratio >= 1 - epsilon),
        "the wrong side": dropping(lambda ratio, epsilon: ratio > 1 + epsilon),
        "1 + ε itself is dropped": dropping(lambda ratio, epsilon: ratio < 1 + epsilon),
        "ε instead of 1 + ε": dropping(lambda ratio, epsilon: ratio <= epsilon),
        "ε = 0.2 whatever is given": dropping(lambda ratio, epsilon: ratio <= 1.2),
        "times the ratio": dropping(factor=lambda ratio, epsilon: ratio),
        "times the clipped ratio": dropping(lambda ratio, epsilon: torch.ones_like(ratio),
                                            factor=lambda ratio, epsilon: ratio.clamp(1 - epsilon, 1 + epsilon)),
        "in place": {"noon": in_place},
        "only signs": dropping(part=lambda A: (A > 0).to(A)),
        "a token counts if it is good for all": dropping(part=lambda A: A * (A.amin(-1, keepdim=True) > 0)),
        "a token counts if it is good for one": dropping(part=lambda A: A * (A.amax(-1, keepdim=True) > 0)),
        "the mean is subtracted first": dropping(part=lambda A: (A - A.mean()).clamp(min=0)),
        "clipped as signed advantages are": {"noon": both_sides},
        "PPO's advantage at the end of the clip": dropping(part=lambda A: A.clamp(min=0, max=1))},
    "pama_weights": {
        "the weights exchanged": theorem(share=lambda a, b: 1 - (-a / (b - a)).clamp(0, 1)),
        "always the smallest": theorem(share=lambda a, b: 0.0 * a),
        "always the largest": theorem(share=lambda a, b: 0.0 * a + 1),
        "the largest of positive ones": theorem(share=lambda a, b: -a / (b - a) if a < 0 < b else (a >= 0).double()),
        "not clipped": theorem(share=lambda a, b: -a / (b - a)),
        "equal weights": {"pama_weights": lambda A: torch.full((len(A),), 1 / len(A)).double()},
        "½ and ½ for both signs": theorem(share=lambda a, b: 0 * a + 0.5 if a < 0 < b else (b <= 0).double()),
        "NaN for equal numbers": theorem(tie=lambda A: False),
        "the first of equal numbers": theorem(equal=lambda A: one_hot(0, len(A))),
        "an epsilon in the denominator": theorem(share=lambda a, b: (-a / (b - a + 1e-8)).clamp(0, 1)),
        "nearly equal counts as equal": theorem(tie=lambda A: A.max() - A.min() < 1e-6),
        "the smallest absolute value": {"pama_weights": lambda A: one_hot(A.abs().argmin(), len(A))},
        "the two smallest absolute values": theorem(low=lambda A: A.abs().argsort()[0],
                                                    high=lambda A: A.abs().argsort()[1 if len(A) > 1 else 0]),
        "the first two": theorem(low=lambda A: 0, high=lambda A: 1 if len(A) > 1 else 0),
        "softmax of −A": {"pama_weights": lambda A: (-A.double()).softmax(0)},
        "inversely to A": {"pama_weights": lambda A: (y := 1 / A.double().abs().clamp(min=1e-9)) / y.sum()},
        "absolute values": theorem(take=lambda A: A.double().abs()),
        "the sum instead of the weights": {"pama_weights": lambda A: right.pama_weights(A) @ A.double()}},
    "pama_advantages": {
        "V: padding counts": reading(V=weighed(gram_weights, every)),
        "V: Theorem 1 of the means": reading(V=weighed(lambda x: right.pama_weights(x.mean(1)))),
        "V: normalised vectors": reading(V=weighed(lambda x: gram_weights(unit(x)))),
        "V: the Gram matrix of tokens": reading(V=weighed(lambda x: gram_weights(x.T)[:len(x)])),
        "V: equal weights": reading(V=weighed(lambda x: torch.full((len(x),), 1 / len(x)).double())),
        "V: weights in reverse": reading(V=weighed(lambda x: gram_weights(x).flip(0))),
        "V: centred first": reading(V=weighed(lambda x: gram_weights(x - x.mean(1, keepdim=True)))),
        "V: of a response's sums": reading(V=weighed(gram_weights, lambda A, mask: (A * mask[..., None]).sum(1).T)),
        "V: a c for each response": reading(V=lambda A, mask: (torch.stack(
            [right.pama_advantages(A[r:r + 1], mask[r:r + 1], "V")[0][0] for r in range(len(A))]),
            right.pama_advantages(A, mask, "V")[1])),
        "V: the weights divide": reading(V=weighed(gram_weights, combine=lambda A, c: (
            A * c.to(A)).sum(-1) / c.square().sum())),
        "T: the largest": reading(T=lambda A, mask: (A.amax(-1), None)),
        "T: the mean": reading(T=lambda A, mask: (A.mean(-1), None)),
        "T: the product": reading(T=lambda A, mask: (A.prod(-1), None)),
        "T: the smallest of the response": reading(T=lambda A, mask: (
            A.amin((1, 2))[:, None].expand(mask.shape), None)),
        "T: the objective that is smallest on the whole": reading(T=lambda A, mask: (
            right.pama_advantages(A, mask, "S")[0], None)),
        "T: returns the weights of V": reading(T=lambda A, mask: (
            A.amin(-1), right.pama_advantages(A, mask, "V")[1])),
        "S: the larger mean": reading(S=weighed(lambda x: one_hot(x.mean(1).argmax(), len(x)))),
        "S: padding counts": reading(S=weighed(lambda x: right.pama_weights(x.mean(1)), every)),
        "S: the mean of responses' means": reading(S=lambda A, mask: (
            (A * (c := smallest(own_means(A, mask))).to(A)).sum(-1), c)),
        "S: one advantage for all tokens": reading(S=lambda A, mask: (
            right.pama_advantages(A, mask, "S")[0][mask.bool()].mean().expand(mask.shape),
            right.pama_advantages(A, mask, "S")[1])),
        "S: the shortest vector": reading(S=weighed(lambda x: right.pama_weights(x.norm(dim=1)))),
        "S as V": reading(S=lambda A, mask: right.pama_advantages(A, mask, "V")),
        "the advantages alone": {"pama_advantages": lambda *a: right.pama_advantages(*a)[0]}},
}


def zero_gradients(losses, parameters):
    for p in parameters:
        p.grad = torch.zeros_like(p)
    return torch.zeros(len(losses), dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)


ZEROS = {"min_norm_pair": lambda a, b: a.new_zeros(2), "min_norm_weights": lambda gram: gram.new_zeros(len(gram)),
         "mgda_backward": zero_gradients, "noon": lambda A, ratio, epsilon: torch.zeros_like(A),
         "pama_weights": lambda A: torch.zeros_like(A),
         "pama_advantages": lambda A, mask, name: (torch.zeros_like(mask), None if name == "T" else A.new_zeros(
             A.shape[-1]))}
