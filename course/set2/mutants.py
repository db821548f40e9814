"""mutants.py - wrong answers to the problems of set 2 that students write. The grader has to see them.

MUTANTS: {problem: {what is wrong: {function of adapters.py: the wrong one}}}; all other functions are the reference's.
ZEROS: {function: one that does nothing, or returns zeros of the right shape}
"""
from contextlib import nullcontext

import torch
import torch.nn.functional as F

import course.reference_adapters as right


def logprobs(shift=1, pool=lambda x, mask: (x * mask).sum(1), of=lambda logits: logits.log_softmax(-1),
             mask=lambda mask: mask,
             row=lambda x: x):
    """response_logprobs with one of its pieces replaced."""
    def wrong(logits, tokens, on):
        T = tokens.shape[1]
        logps = of(logits)[:, :T - shift].gather(2, tokens[:, shift:, None])[..., 0]
        return row(pool(logps, mask(on)[:, shift:].to(logps)))
    return {"response_logprobs": wrong}


def first_of(mask):
    """mask without the first True of each row."""
    return mask & (mask.cumsum(1) > 1)


def last_of(mask):
    """mask without the last True of each row."""
    return mask & (mask.cumsum(1) < mask.sum(1, keepdim=True))


def dpo(h=lambda a, b, c, d, beta: beta * ((a - c) - (b - d)), loss=lambda h: -F.logsigmoid(h)):
    """dpo_loss from another h, or of another form."""
    return {"dpo_loss": lambda a, b, c, d, beta: loss(h(a, b, c, d, beta))}


def on_pairs(better=lambda better: better, after=lambda losses, known, better: (losses, known),
             index=lambda pairs: pairs,
             ref=lambda pi, ref: ref, beta=lambda beta: beta):
    """losses_on_pairs with other labels, pairs or results."""
    def wrong(pi, ref_, pairs, labels, b):
        return after(*right.losses_on_pairs(pi, ref(pi, ref_), index(pairs), better(labels), beta(b)), labels)
    return {"losses_on_pairs": wrong}


def counting(count):
    """expected_counts from one row's labels, (P_j, m), to its counts."""
    return {"expected_counts": lambda better, size: size * torch.stack([count(x).double() for x in better]).mean(0)}


def means(wrong):
    """mean_losses that is wrong both with expected counts and without."""
    return {"mean_losses": wrong}


def own(wrong):
    """mean_losses that is wrong without expected counts."""
    return {"mean_losses": lambda losses, known, expected: wrong(losses, known) if expected is None else
            right.mean_losses(losses, known, expected)}


def given(wrong):
    """mean_losses that is wrong with expected counts."""
    return {"mean_losses": lambda losses, known, expected: right.mean_losses(losses, known, None)
            if expected is None else
            wrong(losses, known, expected)}


def ls(wrong):
    return {"linear_scalarization": wrong}


def tche(term=lambda losses, lam, z: lam * (losses - z), pool=lambda x: x.amax(-1), gone=-torch.inf):
    """tchebycheff from other terms, another way to take the largest, or what a dimension without weight counts as."""
    def wrong(losses, lam, ideal=None):
        terms = term(losses, lam, torch.zeros_like(losses) if ideal is None else ideal)
        return pool(terms if gone is None else terms.masked_fill(lam == 0, gone))
    return {"tchebycheff": wrong}


def soft(losses, lam, ideal=None):
    return torch.logsumexp((lam * (losses if ideal is None else losses - ideal)).masked_fill(lam == 0, -torch.inf), -1)


def sampling(dirichlet=lambda n, m, alpha, g: right.sample_preference(n, m, alpha, 0.0, g),
             vertex=lambda n, m, g: torch.eye(m)[torch.randint(m, (n,), generator=g)],
             take=lambda n, share, g: torch.rand(n, 1, generator=g) < share):
    """sample_preference with one of its pieces replaced."""
    return {"sample_preference": lambda n, m, alpha, share, generator=None: torch.where(
        take(n, share, generator), vertex(n, m, generator), dirichlet(n, m, alpha, generator))}


def normalised(draw):
    """Non-negative numbers divided by their sum."""
    def dirichlet(n, m, alpha, generator):
        x = draw(n, m, alpha, generator)
        return x / x.sum(-1, keepdim=True)
    return dirichlet


def stepping(reference="off", after_off=None, losses=right.losses_on_pairs, counts=None, sign=1, clear=True, step=True,
             aggregate=None, lam=lambda lam: lam, back=lambda L: L.detach(), detach=lambda pi: pi,
             mask=lambda mask: mask,
             beta=lambda beta: beta, off_at_end=False):
    """training_step with one of its pieces replaced."""
    def wrong(model, adapters_off, optimizer, tokens, on, pairs, better, weights, b, expected, kind):
        pi = right.response_logprobs(model(tokens), tokens, mask(on))
        with (torch.set_grad_enabled(reference == "with gradient"),
              nullcontext() if reference == "on" else adapters_off(model)):
            ref = right.response_logprobs(model(tokens), tokens, mask(on))
        ref = {"none": torch.zeros_like(ref), "pi": pi}.get(reference, ref)
        each, known = losses(detach(pi), ref, pairs, better, beta(b))
        divide = counts or (lambda each, known: right.mean_losses(each, known, expected if kind == "ls" else None))
        L = divide(each, known)
        function = aggregate or (right.linear_scalarization if kind == "ls" else right.tchebycheff)
        if clear:
            optimizer.zero_grad()
        (sign * function(L, lam(weights))).backward()
        if step:
            optimizer.step()
        if off_at_end:
            model.share = 0.0
        return back(L)
    names = ("model", "adapters_off", "optimizer", "tokens", "mask", "pairs", "better", "lam", "beta", "expected",
             "aggregate")
    return {"training_step": lambda *a, **k: wrong(*a, *(k[name] for name in names[len(a):]))}


def both_off(model, adapters_off, optimizer, tokens, mask, pairs, better, lam, beta, expected, aggregate):
    with adapters_off(model):
        return right.training_step(model, lambda model: nullcontext(), optimizer, tokens, mask, pairs, better, lam,
                                   beta, expected, aggregate)


MUTANTS = {
    "response_logprobs": {
        "the mean over tokens": logprobs(pool=lambda x, mask: (x * mask).sum(1) / mask.sum(1).clamp(min=1)),
        "no shift": logprobs(shift=0),
        "shifted by two": logprobs(shift=2),
        "the mask is not used": logprobs(mask=torch.ones_like),
        "padding counts": logprobs(mask=lambda mask: mask.cumsum(1) > 0),
        "the prompt counts": logprobs(mask=lambda mask: mask.flip(1).cumsum(1).flip(1) > 0),
        "the mask is not shifted": {"response_logprobs": lambda logits, tokens, mask: (
            logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0] * mask[:, :-1]).sum(1)},
        "the first token is left out": logprobs(mask=first_of),
        "the last token is left out": logprobs(mask=last_of),
        "logits without a softmax": logprobs(of=lambda logits: logits),
        "probabilities are added": logprobs(of=lambda logits: logits.softmax(-1)),
        "softmax over tokens": logprobs(of=lambda logits: logits.log_softmax(1)),
        "log of softmax": logprobs(of=lambda logits: logits.softmax(-1).log()),
        "log of softmax, with an epsilon": logprobs(of=lambda logits: (logits.softmax(-1) + 1e-6).log()),
        "detached": logprobs(row=lambda x: x.detach()),
        "summed over the batch": logprobs(row=lambda x: x.sum()),
        "negative log-likelihood": logprobs(row=lambda x: -x)},
    "dpo_loss": {
        "chosen and rejected exchanged": dpo(lambda a, b, c, d, beta: beta * ((b - d) - (a - c))),
        "without β": dpo(lambda a, b, c, d, beta: (a - c) - (b - d)),
        "divided by β": dpo(lambda a, b, c, d, beta: ((a - c) - (b - d)) / beta),
        "without the reference": dpo(lambda a, b, c, d, beta: beta * (a - b)),
        "the reference is added": dpo(lambda a, b, c, d, beta: beta * ((a + c) - (b + d))),
        "ref_chosen and ref_rejected exchanged": dpo(lambda a, b, c, d, beta: beta * ((a - d) - (b - c))),
        "β on the chosen alone": dpo(lambda a, b, c, d, beta: beta * (a - c) - (b - d)),
        "the mean of the pairs": dpo(loss=lambda h: -F.logsigmoid(h).mean()),
        "without the logarithm": dpo(loss=lambda h: -h.sigmoid()),
        "without the minus": dpo(loss=F.logsigmoid),
        "log of sigmoid": dpo(loss=lambda h: -h.sigmoid().log()),
        "a hinge": dpo(loss=lambda h: (1 - h).clamp(min=0)),
        "the rejected detached": dpo(lambda a, b, c, d, beta: beta * ((a - c) - (b.detach() - d))),
        "the policy detached": dpo(lambda a, b, c, d, beta: beta * ((a - c) - (b - d)).detach()),
        "IPO": dpo(lambda a, b, c, d, beta: (a - c) - (b - d) - 1 / (2 * beta), torch.square),
        "ratios instead of log-ratios": dpo(lambda a, b, c, d, beta: beta * ((a - c).exp() - (b - d).exp()))},
    "losses_on_pairs": {
        "labels ignored": on_pairs(torch.zeros_like),
        "0 and 1 exchanged": on_pairs(lambda better: torch.where(better < 0, better, 1 - better)),
        "a missing label counts as 0": on_pairs(lambda better: better.clamp(min=0)),
        "a missing label counts as 1": on_pairs(lambda better: better.abs()),
        "the first dimension's labels for all": on_pairs(lambda better: better[:, :1].expand_as(better)),
        "dimensions in reverse": on_pairs(lambda better: better.flip(1)),
        "missing losses are not zero": on_pairs(after=lambda losses, known, better: (
            losses + (1 - known) * 0.6931, known)),
        "NaN where a label is missing": on_pairs(after=lambda losses, known, better: (losses / known, known)),
        "known of the ones alone": on_pairs(after=lambda losses, known, better: (losses, (better == 1).to(losses))),
        "the mean over pairs": on_pairs(after=lambda losses, known, better: (losses.mean(0), known)),
        "the mean over dimensions": on_pairs(after=lambda losses, known, better: (
            losses.mean(1, keepdim=True).expand_as(losses), known)),
        "the reference is not looked up": on_pairs(ref=lambda pi, ref: ref.roll(1)),
        "without the reference": on_pairs(ref=lambda pi, ref: torch.zeros_like(ref)),
        "the reference is the policy, with gradient": on_pairs(ref=lambda pi, ref: pi),
        "the first response against the next, whatever the pairs": on_pairs(index=lambda pairs: torch.stack(
            [torch.arange(len(pairs)), torch.arange(len(pairs)) + 1], 1)),
        "known is bool": on_pairs(after=lambda losses, known, better: (losses, known.bool())),
        "known alone": {"losses_on_pairs": lambda *a: right.losses_on_pairs(*a)[1]},
        "rows without all labels dropped": on_pairs(after=lambda losses, known, better: (
            losses * known.amin(1, keepdim=True), known * known.amin(1, keepdim=True)))},
    "uneven_labels": {
        "missing labels are counted": counting(lambda x: x.new_full((x.shape[1],), len(x))),
        "ones are counted": counting(lambda x: (x == 1).sum(0)),
        "without the batch size": {"expected_counts": lambda better, size: right.expected_counts(better, 1)},
        "of the whole data": {"expected_counts": lambda better, size: right.expected_counts(better, len(better))},
        "per pair instead of per row": {
            "expected_counts": lambda better, size: size * (torch.cat(better) >= 0).double().mean(0)},
        "rounded": {"expected_counts": lambda better, size: right.expected_counts(better, size).round()},
        "the mean of rows' shares": counting(lambda x: (x >= 0).double().mean(0)),
        "one count for all dimensions": {
            "expected_counts": lambda better, size: right.expected_counts(better, size).mean().expand(2)},
        "own counts although expected ones are given": given(lambda losses, known, expected: torch.nan_to_num(
            right.mean_losses(losses, known, None), neginf=0.0)),
        "the number of pairs divides": means(lambda losses, known, expected: (losses * known).mean(0)),
        "the plain mean, labels ignored": means(lambda losses, known, expected: losses.mean(0)),
        "sums are not divided": means(lambda losses, known, expected: (losses * known).sum(0)),
        "unlabelled losses count": given(lambda losses, known, expected: losses.sum(0) / expected),
        "NaN where nothing is expected": given(lambda losses, known, expected: (losses * known).sum(0) / expected),
        "0 instead of −inf": own(lambda losses, known: (losses * known).sum(0) / known.sum(0).clamp(min=1)),
        "NaN in the gradient": own(lambda losses, known: torch.where(
            known.sum(0) > 0, (losses * known).sum(0) / known.sum(0), -torch.inf)),
        "NaN instead of −inf": own(lambda losses, known: (losses * known).sum(0) / known.sum(0)),
        "+inf instead of −inf": own(lambda losses, known: ((losses * known).sum(0) / known.sum(0)).nan_to_num(
            torch.inf)),
        "the expected counts are taken at least 1 each": given(
            lambda losses, known, expected: (losses * known).sum(0) / expected.clamp(min=2)),
        "detached": given(lambda losses, known, expected: right.mean_losses(losses, known, expected).detach())},
    "linear_scalarization": {
        "the mean": ls(lambda losses, lam: (lam * losses).mean(-1)),
        "summed over everything": ls(lambda losses, lam: (lam * losses).sum()),
        "without λ": ls(lambda losses, lam: losses.sum(-1)),
        "λ not broadcast": ls(lambda losses, lam: losses @ (lam if lam.ndim == 1 else lam[0])),
        "λ of another row": ls(lambda losses, lam: (losses * (lam.flip(0) if lam.ndim == 2 else lam)).sum(-1)),
        "the wrong sign": ls(lambda losses, lam: -(lam * losses).sum(-1)),
        "the largest term": ls(lambda losses, lam: (lam * losses).amax(-1)),
        "λ in reverse": ls(lambda losses, lam: (lam.flip(-1) * losses).sum(-1)),
        "softmax over λ": ls(lambda losses, lam: (lam.softmax(-1) * losses).sum(-1)),
        "over the first axis": ls(lambda losses, lam: (lam * losses).sum(0)),
        "detached losses": ls(lambda losses, lam: (lam * losses.detach()).sum(-1)),
        "every row with every λ": ls(lambda losses, lam: losses @ lam.T),
        "λ twice": ls(lambda losses, lam: (lam * lam * losses).sum(-1))},
    "tchebycheff": {
        "linear scalarisation": tche(pool=lambda x: x.nan_to_num(neginf=0.0).sum(-1)),
        "the smallest term": tche(pool=lambda x: x.amin(-1), gone=torch.inf),
        "without λ": tche(lambda losses, lam, z: losses - z),
        "λ chooses, but does not weigh": {"tchebycheff": lambda losses, lam, ideal=None: (
            gap := losses if ideal is None else losses - ideal).gather(-1, (lam * gap).broadcast_to(gap.shape).argmax(
                -1, keepdim=True))[..., 0]},
        "the largest loss is weighed": {"tchebycheff": lambda losses, lam, ideal=None: (lam * (
            gap := losses if ideal is None else losses - ideal)).gather(-1, gap.argmax(-1, keepdim=True))[..., 0]},
        "a weight of zero takes part": tche(gone=None),
        "the ideal is left out": tche(lambda losses, lam, z: lam * losses),
        "the ideal is added": tche(lambda losses, lam, z: lam * (losses + z)),
        "the ideal is not weighed": tche(lambda losses, lam, z: lam * losses - z),
        "absolute values": tche(lambda losses, lam, z: lam * (losses - z).abs()),
        "clamped at the ideal": tche(lambda losses, lam, z: lam * (losses - z).clamp(min=0)),
        "the maximum over all rows": tche(pool=lambda x: x.max()),
        "λ of the first row for all": {"tchebycheff": lambda losses, lam, ideal=None: right.tchebycheff(
            losses, lam if lam.ndim == 1 else lam[:1], ideal)},
        "a soft maximum": {"tchebycheff": soft},
        "divided by λ": tche(lambda losses, lam, z: (losses - z) / lam.clamp(min=1e-9)),
        "the wrong sign": tche(pool=lambda x: -x.amax(-1)),
        "without a gradient": tche(pool=lambda x: x.amax(-1).detach())},
    "sample_preference": {
        "uniform numbers, normalised": sampling(normalised(lambda n, m, alpha, g: torch.rand(n, m, generator=g))),
        "normal numbers, softmax": sampling(lambda n, m, alpha, g: torch.randn(n, m, generator=g).softmax(-1)),
        "absolute normal numbers, normalised": sampling(normalised(
            lambda n, m, alpha, g: torch.randn(n, m, generator=g).abs())),
        "α is ignored": sampling(lambda n, m, alpha, g: right.sample_preference(n, m, 1.0, 0.0, g)),
        "1/α": sampling(lambda n, m, alpha, g: right.sample_preference(n, m, 1 / alpha, 0.0, g)),
        "not normalised": sampling(lambda n, m, alpha, g: torch._standard_gamma(
            torch.full((n, m), float(alpha)), generator=g)),
        "no vertices": sampling(take=lambda n, share, g: torch.zeros(n, 1, dtype=torch.bool)),
        "vertices where it should be Dirichlet": sampling(
            take=lambda n, share, g: torch.rand(n, 1, generator=g) > share),
        "the first vertex alone": sampling(vertex=lambda n, m, g: torch.eye(m)[torch.zeros(n, dtype=torch.long)]),
        "the last vertex never": sampling(vertex=lambda n, m, g: torch.eye(m)[torch.randint(m - 1, (n,), generator=g)]),
        "the same number of vertices in each call": sampling(take=lambda n, share, g: (
            torch.randperm(n, generator=g) < round(n * share))[:, None]),
        "one coin for all": sampling(take=lambda n, share, g: (torch.rand(1, 1, generator=g) < share).expand(n, 1)),
        "one λ for all": {"sample_preference": lambda n, m, alpha, share, g=None: right.sample_preference(
            1, m, alpha, share, g).expand(n, m)},
        "the global generator": {"sample_preference": lambda n, m, alpha, share, g=None: right.sample_preference(
            n, m, alpha, share, None)},
        "a seed of its own": {"sample_preference": lambda n, m, alpha, share, g=None: right.sample_preference(
            n, m, alpha, share, torch.Generator().manual_seed(0))},
        "torch.manual_seed inside": {"sample_preference": lambda n, m, alpha, share, g=None: (
            torch.manual_seed(0), right.sample_preference(n, m, alpha, share, g))[1]},
        "(m, n)": {"sample_preference": lambda n, m, alpha, share, g=None: right.sample_preference(
            n, m, alpha, share, g).T},
        "a grid": {"sample_preference": lambda n, m, alpha, share, g=None: F.pad(
            torch.linspace(0, 1, n)[:, None].expand(n, 2) * torch.tensor([1.0, -1.0]) + torch.tensor([0.0, 1.0]),
            (0, m - 2))}},
    "training_step": {
        "the reference with the adapter on": stepping("on"),
        "the reference with a gradient": stepping("with gradient"),
        "no reference": stepping("none"),
        "the reference is π itself": stepping("pi"),
        "π is computed with the adapter off": {"training_step": both_off},
        "the policy is detached": stepping(detach=lambda pi: pi.detach().requires_grad_(True)),
        "uphill": stepping(sign=-1),
        "old gradients are kept": stepping(clear=False),
        "no step": stepping(step=False),
        "own counts for ls too": stepping(counts=lambda each, known: right.mean_losses(each, known, None)),
        "the number of pairs divides": stepping(counts=lambda each, known: (each * known).mean(0)),
        "ls whatever is asked for": stepping(aggregate=right.linear_scalarization),
        "tche whatever is asked for": stepping(aggregate=right.tchebycheff),
        "λ in reverse": stepping(lam=lambda lam: lam.flip(0)),
        "equal weights": stepping(lam=lambda lam: torch.full_like(lam, 1 / len(lam))),
        "without β": stepping(beta=lambda beta: 1.0),
        "padding counts": stepping(mask=lambda mask: mask.cumsum(1) > 0),
        "L is not detached": stepping(back=lambda L: L),
        "the aggregated loss is returned": stepping(back=lambda L: L.sum().detach()),
        "the adapter stays off": stepping(off_at_end=True)},
}
ZEROS = {"response_logprobs": lambda logits, tokens, mask: logits.new_zeros(len(tokens)),
         "dpo_loss": lambda a, *rest: torch.zeros_like(a),
         "losses_on_pairs": lambda pi, ref, pairs, better, beta: (pi.new_zeros(better.shape),) * 2,
         "expected_counts": lambda better, size: torch.zeros(better[0].shape[1], dtype=torch.float64),
         "mean_losses": lambda losses, known, expected: torch.zeros_like(losses[0]),
         "linear_scalarization": lambda losses, lam: torch.zeros_like(losses[..., 0]),
         "tchebycheff": lambda losses, lam, ideal=None: torch.zeros_like(losses[..., 0]),
         "sample_preference": lambda n, m, *rest: torch.zeros(n, m),
         "training_step": lambda model, off, optimizer, *rest, lam=None, **named: torch.zeros(2, dtype=torch.float64)}
