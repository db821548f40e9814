"""mutants.py - wrong answers to the problems of set 4 that students write. The grader has to see them.

MUTANTS: {problem: {what is wrong: {function of adapters.py: the wrong one}}}; all other functions are the reference's.
ZEROS: {function: one that does nothing, or returns zeros of the right shape}
"""
import torch
import torch.nn.functional as F

import course.reference_adapters as right


def logprobs(of=lambda x: x.log_softmax(-1), shift=1, pad=(1, 0), after=lambda x, mask: x * mask):
    """token_logprobs with one of its pieces replaced."""
    def wrong(logits, tokens, mask):
        T = tokens.shape[1]
        logps = of(logits)[:, :T - shift].gather(2, tokens[:, shift:, None])[..., 0]
        return after(F.pad(logps, pad) if shift == 1 else logps, mask)
    return {"token_logprobs": wrong}


def tidy(x, mask):
    """x (R, T) or (R, T, m) with 0 where mask is False, NaN or not."""
    return x.masked_fill(~mask.view(mask.shape + (1,) * (x.ndim - 2)), 0.0)


def end_of(mask):
    """1.0 on the last token of each response."""
    return (mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))).double()


def rewards(kl=lambda logp, ref, beta: -beta * (logp - ref), at=end_of, score=lambda s: s,
            join=lambda kl, last, c: (kl + last).clamp(-c, c), after=tidy,
            place=lambda share, s: torch.where(share > 0, share * s, 0.0)):
    """kl_penalized_rewards with one of its pieces replaced."""
    def wrong(s, logp, ref, mask, beta, c):
        kl_ = kl(logp, ref, beta)
        return after(join(kl_[..., None].expand(*mask.shape, s.shape[1]),
                          place(at(mask)[..., None], score(s)[:, None]), c), mask)
    return {"kl_penalized_rewards": wrong}


def estimate(values=tidy, rewards=tidy, delta=lambda r, after, v: r + after - v,
             join=lambda delta, d, later: delta + d * later, on=lambda mask: mask, last=lambda v: 0.0 * v[:, -1],
             back=lambda A, G: (A, G), over=reversed, step=1, in_place=False):
    """gae with one of its pieces replaced."""
    def wrong(r, v, mask, decay):
        r = r if in_place else rewards(r, mask).clone()
        inside, v = mask[..., None], values(v, mask)
        running, T = 0.0, r.shape[1]
        for t in over(range(T)):
            after = v[:, t + step] if 0 <= t + step < T else last(v)
            running = join(delta(r[:, t], after, v[:, t]), decay, running) * on(inside)[:, t]
            r[:, t] = running
        return back(r, (r + v) * inside)
    return {"gae": wrong}


def values(state=lambda s: F.pad(s[:, :-1], (0, 0, 1, 0)).detach(), lam=lambda lam: lam[:, None],
           order=lambda state, lam: torch.cat([state, lam], -1), out=lambda x, w, b: F.linear(x, w, b),
           after=lambda x, mask: x * mask[..., None]):
    """critic_values with one of its pieces replaced."""
    def wrong(states, weights, mask, weight, bias):
        each = lam(weights).expand(*mask.shape, -1)
        return after(out(order(state(states), each), weight, bias), mask)
    return {"critic_values": wrong}


def weighed(wrong):
    return {"aggregate_advantages": wrong}


def policy(log_ratio=lambda new, old: new - old, ratio=torch.exp, pick=torch.minimum, sign=-1,
           bounds=lambda e: (1 - e, 1 + e), pool=lambda x, mask: x[mask].mean(), A=lambda A, mask: A, before=tidy):
    """ppo_policy_loss with one of its pieces replaced."""
    def wrong(logp, old, advantages, mask, clip):
        logp, old, advantages = (before(x, mask) for x in (logp, old, advantages))
        rho, low_high, a = ratio(log_ratio(logp, old)), bounds(clip), A(advantages, mask)
        return sign * pool(pick(rho * a, rho.clamp(*low_high) * a), mask)
    return {"ppo_policy_loss": wrong}


def critic(near=lambda V, old, G, e: old + (V - old).clamp(-e, e), error=torch.square, pick=torch.maximum, factor=0.5,
           pool=lambda x, mask: x[mask].mean(), V=lambda V: V, before=tidy):
    """ppo_value_loss with one of its pieces replaced."""
    def wrong(new, old, G, mask, clip):
        new, old, G = (before(x, mask) for x in (new, old, G))
        return factor * pool(pick(error(V(new) - G), error(near(V(new), old, G, clip) - G)), mask)
    return {"ppo_value_loss": wrong}


def grouped(which, make):
    """group_advantages that is wrong for one estimator: make(scores in groups (X, K, m), lam in groups) -> (X, K)."""
    def wrong(scores, lam, samples, estimator):
        if estimator != which:
            return right.group_advantages(scores, lam, samples, estimator)
        return make(*(x.unflatten(0, (-1, samples)) for x in (scores, lam))).flatten()
    return {"group_advantages": wrong}


def changed(which, inputs):
    """group_advantages that is right for one estimator, but of other scores, preferences and samples."""
    return {"group_advantages": lambda scores, lam, samples, estimator: right.group_advantages(
        *(inputs(scores, lam, samples) if estimator == which else (scores, lam, samples)), estimator)}


def rloo(make):
    """From S (X, K) alone."""
    return grouped("rloo", lambda s, lam: make((lam * s).sum(-1)))


def grpo(make):
    return grouped("grpo", lambda s, lam: make((lam * s).sum(-1)))


def z(x, axis=1, eps=1e-4, correction=1):
    """x less its mean over this axis, divided by its standard deviation."""
    return (x - x.mean(axis, keepdim=True)) / (x.std(axis, keepdim=True, correction=correction) + eps)


def all_z(B, eps=1e-4, correction=1):
    return B / (B.std(correction=correction) + eps)


def strided(scores, lam, samples):
    """The rows of a prompt taken for every (R / K)-th one."""
    turn = lambda x: x.unflatten(0, (samples, -1)).transpose(0, 1).flatten(0, 1)
    return turn(scores), turn(lam), samples


def back_in_place(which):
    """Groups of every (R / K)-th row, with the results at the rows that they belong to."""
    def wrong(scores, lam, samples, estimator):
        if estimator != which:
            return right.group_advantages(scores, lam, samples, estimator)
        A = right.group_advantages(*strided(scores, lam, samples), estimator)
        return A.unflatten(0, (-1, samples)).T.flatten()
    return {"group_advantages": wrong}


MUTANTS = {
    "token_logprobs": {
        "no shift": logprobs(shift=0),
        "one place too early": logprobs(pad=(0, 1)),
        "one place too early, mask and all": logprobs(pad=(0, 1), after=lambda x, mask: x * mask.roll(-1, 1)),
        "the mask is not used": logprobs(after=lambda x, mask: x),
        "padding counts": logprobs(after=lambda x, mask: x * (mask.cumsum(1) > 0)),
        "the prompt counts": logprobs(after=lambda x, mask: x * (mask.flip(1).cumsum(1).flip(1) > 0)),
        "T - 1 columns": logprobs(pad=(0, 0), after=lambda x, mask: x * mask[:, 1:]),
        "logits without a softmax": logprobs(of=lambda x: x),
        "probabilities": logprobs(of=lambda x: x.softmax(-1)),
        "softmax over tokens": logprobs(of=lambda x: x.log_softmax(1)),
        "log of softmax": logprobs(of=lambda x: x.softmax(-1).log()),
        "log of softmax, with an epsilon": logprobs(of=lambda x: (x.softmax(-1) + 1e-6).log()),
        "detached": logprobs(of=lambda x: x.detach().log_softmax(-1)),
        "summed over the response": logprobs(after=lambda x, mask: (x * mask).sum(1)),
        "negative": logprobs(after=lambda x, mask: -x * mask),
        "the largest log-probability instead of the token's": {"token_logprobs": lambda logits, tokens, mask: F.pad(
            logits.log_softmax(-1).amax(-1)[:, :-1], (1, 0)) * mask}},
    "kl_penalized_rewards": {
        "the sign of the KL term": rewards(kl=lambda p, q, beta: beta * (p - q)),
        "no KL term": rewards(kl=lambda p, q, beta: 0 * p),
        "without β": rewards(kl=lambda p, q, beta: q - p),
        "divided by β": rewards(kl=lambda p, q, beta: (q - p) / beta),
        "the absolute log-ratio": rewards(kl=lambda p, q, beta: -beta * (p - q).abs()),
        "the k3 estimate of the KL": rewards(kl=lambda p, q, beta: -beta * ((q - p).exp() - 1 - (q - p))),
        "a ratio instead of a log-ratio": rewards(kl=lambda p, q, beta: -beta * (p - q).exp()),
        "half the square of the log-ratio": rewards(kl=lambda p, q, beta: -beta * (p - q).square() / 2),
        "the KL of the whole response at every token": rewards(
            kl=lambda p, q, beta: -beta * (p - q).sum(1, keepdim=True).expand_as(p)),
        "the score at every token": rewards(at=lambda mask: mask.double()),
        "the score shared out among the tokens": rewards(at=lambda mask: mask / mask.sum(1, keepdim=True)),
        "the score at the first token": rewards(at=lambda mask: (mask & (mask.cumsum(1) == 1)).double()),
        "the score at the last position": rewards(
            at=lambda mask: (torch.arange(mask.shape[1]) == mask.shape[1] - 1).double().expand(mask.shape)),
        "the score at position (length − 1)": rewards(
            at=lambda mask: F.one_hot(mask.sum(1) - 1, mask.shape[1]).double()),
        "the score behind the last token": rewards(at=lambda mask: end_of(mask).roll(1, 1)),
        "the last token of the first row for all": rewards(at=lambda mask: end_of(mask)[:1].expand(mask.shape)),
        "the last token of a row ends the loop over rows": rewards(
            at=lambda mask: end_of(mask) * (torch.arange(len(mask)) == 0)[:, None]),
        "the KL term in the first column alone": rewards(join=lambda kl, last, c: (
            kl * (torch.arange(kl.shape[-1]) == 0) + last).clamp(-c, c)),
        "the KL term shared out among the columns": rewards(join=lambda kl, last, c: (
            kl / kl.shape[-1] + last).clamp(-c, c)),
        "no KL term at the last token": rewards(join=lambda kl, last, c: torch.where(last != 0, last, kl).clamp(-c, c)),
        "the scores' mean in every column": rewards(score=lambda s: s.mean(1, keepdim=True).expand_as(s)),
        "the scores of another row": rewards(score=lambda s: s.flip(0)),
        "nothing is clamped": rewards(join=lambda kl, last, c: kl + last),
        "the score alone is clamped": rewards(join=lambda kl, last, c: kl + last.clamp(-c, c)),
        "the KL term alone is clamped": rewards(join=lambda kl, last, c: kl.clamp(-c, c) + last),
        "both clamped before the sum": rewards(join=lambda kl, last, c: kl.clamp(-c, c) + last.clamp(-c, c)),
        "no lower bound": rewards(join=lambda kl, last, c: (kl + last).clamp(max=c)),
        "the mask is not used": rewards(after=lambda x, mask: x),
        "multiplied by the mask": rewards(after=lambda x, mask: x * mask[..., None]),
        "the score multiplied by whether the token is the last": rewards(place=lambda share, s: share * s),
        "padding has a reward": rewards(after=lambda x, mask: tidy(x, mask.cumsum(1) > 0)),
        "the prompt has a reward": rewards(after=lambda x, mask: tidy(x, mask.flip(1).cumsum(1).flip(1) > 0))},
    "gae": {
        "no mask": {"gae": lambda r, v, mask, d: right.gae(r, v, torch.ones_like(mask), d)},
        "no mask, but zeros outside": {"gae": lambda r, v, mask, d: tuple(
            x * mask[..., None] for x in right.gae(r, v, torch.ones_like(mask), d))},
        "rewards multiplied by the mask": estimate(rewards=lambda r, mask: r * mask[..., None]),
        "values multiplied by the mask": estimate(values=lambda v, mask: v * mask[..., None]),
        "bootstrapping past the end": estimate(values=lambda v, mask: v),
        "bootstrapping past the end, at the end of the row too": estimate(last=lambda v: v[:, -1]),
        "the running sum is not stopped at padding": estimate(on=torch.ones_like, back=lambda A, G: (A, G)),
        "no V_{t+1}": estimate(delta=lambda r, after, v: r - v),
        "no V_t": estimate(delta=lambda r, after, v: r + after),
        "V_t added": estimate(delta=lambda r, after, v: r + after + v),
        "V_{t+1} and V_t exchanged": estimate(delta=lambda r, after, v: r - after + v),
        "V_{t−1} for V_{t+1}": estimate(step=-1),
        "V_{t+2} for V_{t+1}": estimate(step=2),
        "decay left out": estimate(join=lambda delta, d, later: delta + later),
        "decay at δ": estimate(join=lambda delta, d, later: d * delta + later),
        "1 − decay": estimate(join=lambda delta, d, later: delta + (1 - d) * later),
        "a running mean": estimate(join=lambda delta, d, later: (1 - d) * delta + d * later),
        "δ alone": estimate(join=lambda delta, d, later: delta),
        "forwards": estimate(over=iter),
        "γ = decay": {"gae": lambda r, v, mask, d: right.objectives.gae(r, v, mask, d, d)},
        "γ = 0.99": {"gae": lambda r, v, mask, d: right.objectives.gae(r, v, mask, 0.99, d)},
        "γ = decay and decay 1": {"gae": lambda r, v, mask, d: right.objectives.gae(r, v, mask, d, 1.0)},
        "advantages and returns exchanged": estimate(back=lambda A, G: (G, A)),
        "advantages alone": estimate(back=lambda A, G: A),
        "returns are A − V": {"gae": lambda r, v, mask, d: (
            right.gae(r, v, mask, d)[0], right.gae(r, v, mask, d)[0] - v * mask[..., None])},
        "returns are the rewards from t on": {"gae": lambda r, v, mask, d: (
            right.gae(r, v, mask, d)[0], (r * mask[..., None]).flip(1).cumsum(1).flip(1) * mask[..., None])},
        "returns outside the mask": {"gae": lambda r, v, mask, d: (
            right.gae(r, v, mask, d)[0], right.gae(r, v, mask, d)[0] + v)},
        "whitened": estimate(back=lambda A, G: ((A - A.mean()) / A.std(), G)),
        "the mean of the columns' values": {"gae": lambda r, v, mask, d: right.gae(
            r, v.mean(-1, keepdim=True).expand_as(v), mask, d)},
        "the first column for all": {"gae": lambda r, v, mask, d: tuple(
            x[..., :1].expand_as(x) for x in right.gae(r, v, mask, d))},
        "the first row's mask for all": {"gae": lambda r, v, mask, d: right.gae(r, v, mask[:1].expand_as(mask), d)},
        "rewards overwritten": estimate(in_place=True)},
    "critic_values": {
        "the state that has read the token": values(state=lambda s: s.detach()),
        "the state after the next token": values(state=lambda s: F.pad(s[:, 1:], (0, 0, 0, 1)).detach()),
        "two tokens before": values(state=lambda s: F.pad(s[:, :-2], (0, 0, 2, 0)).detach()),
        "the values shifted, not the states": {"critic_values": lambda s, lam, mask, w, b: right.critic_values(
            s, lam, mask.roll(1, 1), w, b).roll(-1, 1) * mask[..., None]},
        "the first state for all tokens": values(state=lambda s: s[:, :1].expand_as(s).detach()),
        "not detached": values(state=lambda s: F.pad(s[:, :-1], (0, 0, 1, 0))),
        "everything detached": values(out=lambda x, w, b: F.linear(x, w, b).detach()),
        "the weight detached": values(out=lambda x, w, b: F.linear(x, w.detach(), b)),
        "no λ": values(lam=lambda lam: 0 * lam[:, None]),
        "λ of the first row": values(lam=lambda lam: lam[:1, None]),
        "the mean λ": values(lam=lambda lam: lam.mean(0).view(1, 1, -1)),
        "λ of row t at token t": values(lam=lambda lam: lam[None] if lam.shape == (3, 3) else lam[:, None]),
        "λ in reverse": values(lam=lambda lam: lam.flip(1)[:, None]),
        "λ before the state": values(order=lambda s, lam: torch.cat([lam, s], -1)),
        "no bias": values(out=lambda x, w, b: F.linear(x, w)),
        "the mask is not used": values(after=lambda x, mask: x),
        "padding has values": values(after=lambda x, mask: x * (mask.cumsum(1) > 0)[..., None]),
        "one head for all": values(after=lambda x, mask: (x * mask[..., None]).mean(-1, keepdim=True).expand_as(x)),
        "weighed by λ already": {"critic_values": lambda s, lam, mask, w, b: right.critic_values(
            s, lam, mask, w, b) * lam[:, None]}},
    "aggregate_advantages": {
        "λ of row t at token t": weighed(
            lambda A, lam: (A * (lam if len(lam) == A.shape[1] else lam[:, None])).sum(-1)),
        "λ of the first row": weighed(lambda A, lam: A @ lam[0]),
        "λ of another row": weighed(lambda A, lam: (A * lam.flip(0)[:, None]).sum(-1)),
        "the mean λ": weighed(lambda A, lam: A @ lam.mean(0)),
        "no λ": weighed(lambda A, lam: A.sum(-1)),
        "the mean of the columns": weighed(lambda A, lam: A.mean(-1)),
        "the mean of the weighed columns": weighed(lambda A, lam: (A * lam[:, None]).mean(-1)),
        "summed over tokens too": weighed(lambda A, lam: (A * lam[:, None]).sum((1, 2))),
        "not summed": weighed(lambda A, lam: A * lam[:, None]),
        "λ in reverse": weighed(lambda A, lam: (A * lam.flip(1)[:, None]).sum(-1)),
        "softmax over λ": weighed(lambda A, lam: (A * lam.softmax(-1)[:, None]).sum(-1)),
        "the largest column": weighed(lambda A, lam: (A * lam[:, None]).amax(-1)),
        "the column with the largest weight": weighed(
            lambda A, lam: A.gather(2, lam.argmax(1)[:, None, None].expand(*A.shape[:2], 1))[..., 0]),
        "λ twice": weighed(lambda A, lam: (A * lam[:, None].square()).sum(-1)),
        "every row with every λ": weighed(lambda A, lam: torch.einsum("rtm,sm->rst", A, lam)),
        "the wrong sign": weighed(lambda A, lam: -(A * lam[:, None]).sum(-1)),
        "normalised over the batch": weighed(lambda A, lam: (
            x := (A * lam[:, None]).sum(-1)) - x.mean())},
    "ppo_policy_loss": {
        "max for min": policy(pick=torch.maximum),
        "no clip": policy(pick=lambda plain, clipped: plain),
        "the clipped term alone": policy(pick=lambda plain, clipped: clipped),
        "the mean of both": policy(pick=lambda plain, clipped: (plain + clipped) / 2),
        "no upper bound": policy(bounds=lambda e: (1 - e, None)),
        "no lower bound": policy(bounds=lambda e: (None, 1 + e)),
        "clipped to ±ε": policy(bounds=lambda e: (-e, e)),
        "clipped between 1/(1 + ε) and 1 + ε": policy(bounds=lambda e: (1 / (1 + e), 1 + e)),
        "ε is 0.2 whatever is asked for": policy(bounds=lambda e: (0.8, 1.2)),
        "the wrong sign": policy(sign=1),
        "the ratio upside down": policy(log_ratio=lambda new, old: old - new),
        "the log-ratio for the ratio": policy(ratio=lambda x: x),
        "1 + the log-ratio": policy(ratio=lambda x: 1 + x),
        "the policy detached": policy(log_ratio=lambda new, old: new.detach() - old),
        "old_logp is logp without a gradient: the ratio is always 1": policy(
            log_ratio=lambda new, old: new - new.detach()),
        "log π instead of the ratio": {"ppo_policy_loss": lambda logp, old, A, mask, clip: -(logp * A)[mask].mean()},
        "the ratio of whole responses": policy(
            log_ratio=lambda new, old: (new - old).sum(1, keepdim=True).expand_as(new)),
        "the sum": policy(pool=lambda x, mask: x[mask].sum()),
        "the mean over all positions": policy(pool=lambda x, mask: (x * mask).mean()),
        "the mean of the rows' means": policy(pool=lambda x, mask: ((x * mask).sum(1) / mask.sum(1)).mean()),
        "the mean over rows of the rows' sums": policy(pool=lambda x, mask: (x * mask).sum(1).mean()),
        "no mask": policy(pool=lambda x, mask: x.mean(), before=lambda x, mask: x),
        "multiplied by the mask": policy(pool=lambda x, mask: (x * mask).sum() / mask.sum(), before=lambda x, mask: x),
        "the mask after exp": policy(before=lambda x, mask: x),
        "the mask after exp, log-ratios bounded": policy(
            log_ratio=lambda new, old: (new - old).nan_to_num().clamp(-20, 20), before=lambda x, mask: x),
        "one loss a row": policy(pool=lambda x, mask: (x * mask).sum(1) / mask.sum()),
        "advantages whitened": policy(A=lambda A, mask: (A - A[mask].mean()) / (A[mask].std(correction=0) + 1e-8)),
        "the advantage's sign alone": policy(A=lambda A, mask: A.sign()),
        "negative advantages dropped": policy(A=lambda A, mask: A.clamp(min=0))},
    "ppo_value_loss": {
        "min for max": critic(pick=torch.minimum),
        "no clip": critic(pick=lambda plain, clipped: plain),
        "the clipped term alone": critic(pick=lambda plain, clipped: clipped),
        "no factor 1/2": critic(factor=1.0),
        "the mean of both": critic(pick=lambda plain, clipped: (plain + clipped) / 2),
        "clipped around the return": critic(near=lambda V, old, G, e: G + (V - G).clamp(-e, e)),
        "clipped to ±ε around 0": critic(near=lambda V, old, G, e: V.clamp(-e, e)),
        "clipped to V_old (1 ± ε)": critic(near=lambda V, old, G, e: torch.minimum(torch.maximum(
            V, old * (1 - e)), old * (1 + e))),
        "the change is not added to V_old": critic(near=lambda V, old, G, e: (V - old).clamp(-e, e)),
        "no lower bound": critic(near=lambda V, old, G, e: old + (V - old).clamp(max=e)),
        "no upper bound": critic(near=lambda V, old, G, e: old + (V - old).clamp(min=-e)),
        "absolute errors": critic(error=torch.abs),
        "the error is clipped": {"ppo_value_loss": lambda V, old, G, mask, e: 0.5 * (
            V - G).clamp(-e, e)[mask].square().mean()},
        "old and new exchanged": {
            "ppo_value_loss": lambda V, old, G, mask, e: right.ppo_value_loss(old, V, G, mask, e)},
        "returns and old values exchanged": {
            "ppo_value_loss": lambda V, old, G, mask, e: right.ppo_value_loss(V, G, old, mask, e)},
        "the values detached": critic(V=lambda V: V.detach()),
        "the sum": critic(pool=lambda x, mask: x[mask].sum()),
        "heads summed": critic(pool=lambda x, mask: x[mask].sum(-1).mean()),
        "the first head alone": critic(pool=lambda x, mask: x[mask][:, 0].mean()),
        "no mask": critic(pool=lambda x, mask: x.mean(), before=lambda x, mask: x),
        "multiplied by the mask": critic(pool=lambda x, mask: (x * mask[..., None]).sum() / (mask.sum() * x.shape[-1]),
                                         before=lambda x, mask: x),
        "the mask after the squares": critic(before=lambda x, mask: x),
        "the mean over all positions": critic(pool=lambda x, mask: (x * mask[..., None]).mean()),
        "the mean of the rows' means": critic(pool=lambda x, mask: (
            (x * mask[..., None]).sum((1, 2)) / mask.sum(1) / x.shape[-1]).mean()),
        "the larger of the two means": {"ppo_value_loss": lambda V, old, G, mask, e: 0.5 * torch.maximum(
            (V - G)[mask].square().mean(), (old + (V - old).clamp(-e, e) - G)[mask].square().mean())},
        "one loss a head": critic(pool=lambda x, mask: x[mask].mean(0))},
    "leave_one_out": {
        "the own score in the mean": rloo(lambda S: S - S.mean(1, keepdim=True)),
        "the own score in the mean, K for K − 1": rloo(lambda S: (S - S.mean(1, keepdim=True)) * (S.shape[1] + 1)
                                                      / S.shape[1]),
        "the sum of the others": rloo(lambda S: S - (S.sum(1, keepdim=True) - S)),
        "the sum of the others by K": rloo(lambda S: S - (S.sum(1, keepdim=True) - S) / S.shape[1]),
        "the sum of all by K − 1": rloo(lambda S: S - S.sum(1, keepdim=True) / (S.shape[1] - 1)),
        "the best of the others": rloo(lambda S: torch.stack([
            S[:, k] - torch.cat([S[:, :k], S[:, k + 1:]], 1).amax(1) for k in range(S.shape[1])], 1)),
        "the next response alone": rloo(lambda S: S - S.roll(-1, 1)),
        "the first response is the baseline": rloo(lambda S: S - S[:, :1]),
        "no baseline": rloo(lambda S: S),
        "the batch's mean": rloo(lambda S: S - S.mean()),
        "all others of the batch": rloo(lambda S: (S - S.mean()) * S.numel() / (S.numel() - 1)),
        "the mean over prompts": rloo(lambda S: S - (S.mean(0, keepdim=True))),
        "the wrong sign": rloo(lambda S: S.mean(1, keepdim=True) - S),
        "divided by the standard deviation": rloo(z),
        "every (R / K)-th row is the group": back_in_place("rloo"),
        "every (R / K)-th row is the group, results in that order": changed("rloo", strided),
        "the mean of the scores, λ left out": changed("rloo", lambda s, lam, K: (
            s, torch.full_like(lam, 1 / lam.shape[1]), K)),
        "scores summed, λ left out": changed("rloo", lambda s, lam, K: (s, torch.ones_like(lam), K)),
        "λ of the first row": changed("rloo", lambda s, lam, K: (s, lam[:1].expand_as(lam), K)),
        "λ of another prompt": changed("rloo", lambda s, lam, K: (s, lam.roll(K, 0), K)),
        "λ in reverse": changed("rloo", lambda s, lam, K: (s, lam.flip(1), K)),
        "one advantage a dimension": {"group_advantages": lambda s, lam, K, name: right.objectives.group_advantages(
            s, K, "rloo")}},
    "normalised_groups": {
        "GRPO: the population's deviation": grpo(lambda S: z(S, correction=0)),
        "GRPO: no 1e-4": grpo(lambda S: z(S, eps=0.0)),
        "GRPO: 1e-4 in the variance": grpo(lambda S: (S - S.mean(1, keepdim=True))
                                           / (S.var(1, keepdim=True) + 1e-4).sqrt()),
        "GRPO: the variance divides": grpo(lambda S: (S - S.mean(1, keepdim=True)) / (S.var(1, keepdim=True) + 1e-4)),
        "GRPO: the batch's deviation": grpo(lambda S: (S - S.mean(1, keepdim=True)) / (S.std() + 1e-4)),
        "GRPO: the batch's mean": grpo(lambda S: (S - S.mean()) / (S.std(1, keepdim=True) + 1e-4)),
        "GRPO: mean and deviation of the batch": grpo(lambda S: (S - S.mean()) / (S.std() + 1e-4)),
        "GRPO: over prompts": grpo(lambda S: z(S, axis=0)),
        "GRPO: the deviation over dimensions": grouped("grpo", lambda s, lam: (
            (lam * (s - s.mean(1, keepdim=True))).sum(-1) / (s.std(2) + 1e-4))),
        "GRPO: no division": grpo(lambda S: S - S.mean(1, keepdim=True)),
        "GRPO: leave-one-out, then divided": grpo(lambda S: z(S) * S.shape[1] / (S.shape[1] - 1)),
        "GRPO: each before the sum": grouped("grpo", lambda s, lam: (lam * z(s)).sum(-1)),
        "GRPO: divided again over the batch": grpo(lambda S: all_z(z(S))),
        "GRPO: every (R / K)-th row": back_in_place("grpo"),
        "GRPO: λ of the first row": changed("grpo", lambda s, lam, K: (s, lam[:1].expand_as(lam), K)),
        "GDPO: after the sum": grouped("gdpo", lambda s, lam: all_z(z((lam * s).sum(-1)))),
        "GDPO: is GRPO": grouped("gdpo", lambda s, lam: z((lam * s).sum(-1))),
        "GDPO: not divided again": grouped("gdpo", lambda s, lam: (lam * z(s)).sum(-1)),
        "GDPO: divided again in the group": grouped("gdpo", lambda s, lam: z((lam * z(s)).sum(-1))),
        "GDPO: the population's deviations": grouped("gdpo", lambda s, lam: all_z(
            (lam * z(s, correction=0)).sum(-1), correction=0)),
        "GDPO: the population's deviation of the batch": grouped("gdpo", lambda s, lam: all_z(
            (lam * z(s)).sum(-1), correction=0)),
        "GDPO: one deviation for all dimensions": grouped("gdpo", lambda s, lam: all_z((lam * (
            s - s.mean(1, keepdim=True)) / (s.flatten(1).std(1)[:, None, None] + 1e-4)).sum(-1))),
        "GDPO: the batch's deviation of each dimension": grouped("gdpo", lambda s, lam: all_z((lam * (
            s - s.mean(1, keepdim=True)) / (s.flatten(0, 1).std(0) + 1e-4)).sum(-1))),
        "GDPO: no 1e-4": grouped("gdpo", lambda s, lam: all_z((lam * z(s, eps=0.0)).sum(-1), eps=0.0)),
        "GDPO: λ weighs before the division": grouped("gdpo", lambda s, lam: all_z(z(lam * s).sum(-1))),
        "GDPO: λ left out": grouped("gdpo", lambda s, lam: all_z(z(s).sum(-1))),
        "GDPO: λ of the first row": changed("gdpo", lambda s, lam, K: (s, lam[:1].expand_as(lam), K)),
        "GDPO: leave-one-out, then divided": grouped("gdpo", lambda s, lam: (lam * z(s)).sum(-1) * 3 / 2)},
}
ZEROS = {"token_logprobs": lambda logits, tokens, mask: torch.zeros_like(logits[..., 0]),
         "kl_penalized_rewards": lambda score, logp, *rest: torch.zeros(*logp.shape, score.shape[1]).double(),
         "gae": lambda rewards, *rest: (torch.zeros_like(rewards), torch.zeros_like(rewards)),
         "critic_values": lambda states, lam, mask, *rest: torch.zeros(*mask.shape, lam.shape[1]).double(),
         "aggregate_advantages": lambda advantages, lam: torch.zeros_like(advantages[..., 0]),
         "ppo_policy_loss": lambda *arguments: torch.tensor(0.0, dtype=torch.float64),
         "ppo_value_loss": lambda *arguments: torch.tensor(0.0, dtype=torch.float64),
         "group_advantages": lambda scores, *rest: torch.zeros_like(scores[:, 0])}
