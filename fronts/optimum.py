"""optimum.py - the best that any policy can do on the embedded world: solvers on tensors, tabular policies, float64.

Over all stochastic policies (Panacea's Assumption 4.1, arXiv:2402.02030v1) a policy may put any probability on any
response, so every objective is a concave function of S unknowns per prompt. Linear scalarisation is then one convex
minimisation per preference: Newton's method for DPO, a mixture for SFT, a closed form for RLHF. Tchebycheff is solved
by its dual: the weights μ on the simplex that maximise min_π Σ_i μ_i λ_i (L_i(π) − z_i); at the optimum the duality
gap is zero. So both need only, for any weights c, the policy that minimises Σ_i c_i L_i. Which solver belongs to which
objective of a run stands in objective.py.

F: preferences   lams: (F, m)   m: dimensions   X: prompts   Q: distinct problems among them   S: responses to a prompt
O = S + 1: outcomes, the last one "any other text"   w: (Q,) each problem's part of the prompts, Σ w = 1
z: (m,) ideal losses   J_i = −L_i   natural logarithms
"""
import math

import torch

from aggregate import scalar_reward, tchebycheff
from runs.files import bar

NEWTON_STEPS = 50
AT_ONCE = 2 ** 20                                             # numbers in one (F, X, S) tensor: bounds the memory
CACHE = 2 ** 17                                               # … in one (Q, S, S) tensor: fits a core's cache
NEAREST, WIDTH = 24, 0.3                                      # known optima in a guess, and how far each one counts

# ---------------------------------------------------------------------------------------------------------------------
# DPO. The unknowns of a prompt are  h_a = beta * log pi(a)/pi_ref(a)  for its S responses, up to a constant. With every
# pair of responses equally likely and labels drawn by Bradley-Terry, the loss of dimension i is, averaged over prompts,
#
#     L_i(h) = mean over pairs {a,b} of  -win_i(a,b) log sigmoid(h_a - h_b) - win_i(b,a) log sigmoid(h_b - h_a),
#     win_i(a,b) = sigmoid(r_i(a) - r_i(b)).
#
# As win_i(a,b) + win_i(b,a) = 1 and softplus(d) = softplus(-d) + d, the labels enter linearly and by one number per
# response, wins_i(a) = sum_b win_i(a,b), how many of the others it is expected to beat:
#
#     L_i(h) = ( 1/2 sum_{a,b} softplus(h_b - h_a) - sum_a h_a (wins_i(a) - (S-1)/2) ) / (S (S-1)/2),        a != b,
#
# and the gradient is sum_b sigmoid(h_a - h_b) - wins_i(a): at the optimum the policy's wins are the labels' wins.

def win_probs(scores):
    """The probability that a is labelled better than b on dimension i. scores: (Q, S, m) -> (Q, m, S, S), with a
    zero diagonal: no response is paired with itself."""
    r = scores.transpose(1, 2)                                                        # (Q, m, S)
    win_prob = torch.sigmoid(r[..., :, None] - r[..., None, :])
    return win_prob * (1 - torch.eye(r.shape[-1], dtype=r.dtype))


def problems(scores):
    """The distinct problems among prompts: prompts with equal scores have equal optima, so each is solved once.

    scores: (X, S, m) -> the distinct ones (Q, S, m), their parts w (Q,), and the index of every prompt's problem (X,).
    """
    distinct, index, count = torch.unique(scores, dim=0, return_inverse=True, return_counts=True)
    return distinct, count.double() / len(scores), index


def dpo_losses(h, wins):
    """The DPO loss of every dimension, Eq. (2), as an exact expectation over all pairs and labels.

    h: (…, Q, S) β · log-ratios, up to a constant per prompt   wins: (Q, m, S), win_probs summed over b  ->  (…, Q, m)
    """
    pairs = torch.nn.functional.softplus(h[..., None, :] - h[..., :, None], threshold=40)   # exact in float64 so far
    return _losses(h, wins, pairs.sum((-2, -1)))


def _losses(h, wins, softplus):
    """dpo_losses where the sum of softplus(h_b − h_a) over all a and b is known: (…, Q)"""
    S = h.shape[-1]
    nll = softplus - S * math.log(2)                                                                        # a != b
    return (nll[..., None] / 2 - torch.einsum("...qs,qms->...qm", h, wins - (S - 1) / 2)) / (S * (S - 1) / 2)


# The solvers meet thousands of h. With E_a = exp h_a, h centred, and R_ab = 1 / (E_a + E_b), which takes S exponentials
# in place of S²,
#
#     sigmoid(h_a − h_b) = E_a R_ab,    its slope = E_a E_b R_ab²,    sum_{a,b} softplus(h_b − h_a) = −sum log R_ab.
#
# Gradients and Hessians below are those of the loss times the number of pairs, S (S-1)/2: they count wins.

def _exponentials(h):
    """E (Q, S) and R (Q, S, S) of h (Q, S)."""
    E = (h - h.mean(-1, keepdim=True)).exp()
    return E, (E[:, :, None] + E[:, None, :]).reciprocal_()


def _gradients(E, R, wins):
    """The policy's wins less the labels', of every dimension. wins: (Q, m, S)  ->  (Q, m, S)"""
    return (E * R.sum(-1) - 0.5)[:, None] - wins                                      # E_a R_aa = 1/2


def _hessian(E, R):
    """The Hessian (Q, S, S), which the dimensions share: labels enter linearly."""
    curve = (R * E[:, None, :]).mul_(R).mul_(E[:, :, None])
    diagonal = curve.sum(-1)                                  # the curve's own diagonal cancels: it is no pair
    hessian = diagonal.mean(-1)[:, None, None] / E.shape[-1] - curve                  # + ones: fixes the free constant
    hessian.diagonal(dim1=1, dim2=2).add_(diagonal)
    return hessian


def _few(S, *tensors):
    """Tensors (Q, …) a few problems at a time, so that (Q, S, S) tensors stay in a core's cache."""
    return zip(*(t.split(max(1, CACHE // S ** 2)) for t in tensors))


def newton(wins, h):
    """argmin_h of the mean DPO loss for labels with these wins (…, S), by Newton's method from the start h (…, S).

    At the minimum the policy wins as often as the labels do. Returns h. Raises RuntimeError if the gradient does not
    vanish (the problem is convex, so it must).
    """
    done, S = [], h.shape[-1]
    for wins_few, h_few in _few(S, wins.reshape(-1, 1, S), h.reshape(-1, S)):
        before = 0.0
        for _ in range(NEWTON_STEPS):
            E, R = _exponentials(h_few)
            grad = _gradients(E, R, wins_few)
            left = grad.abs().max().item() / (S * (S - 1) / 2)
            if left < 1e-13:                                  # each J_i, of first order in h, is then exact to 1e-11
                break
            if not left < before / 100:                       # else the factor at hand is good for one more step
                factor = torch.linalg.cholesky(_hessian(E, R))
            before = left
            step = torch.cholesky_solve(grad.mT, factor)[..., 0]
            # a step of at most 4 nats never overshoots far
            h_few = h_few - step / (step.abs().amax(-1, keepdim=True) / 4).clamp(min=1)
        else:
            raise RuntimeError(f"Newton's method left a gradient of {left:.1e}")
        done.append(h_few)
    return torch.cat(done).view_as(h)


def _near(c, known, hs, scores):
    """A guess of the optimum for weights c (m,), from K optima: known (K, m) their weights, hs K tensors (Q, S).

    h(c) − c·r is zero at the vertices and smooth between them. It is guessed from its values at the nearest of the
    known weights, by regression with a Gaussian kernel: Σ_k part_k (h_k − c_k·r). Far from all of them that is zero.
    scores: (Q, S, m)  ->  (Q, S)
    """
    distance, near = (known - c).norm(dim=-1).topk(min(len(known), NEAREST), largest=False)
    kernel = lambda d: torch.exp(-d.square() / (2 * WIDTH ** 2))
    known, hs = known[near], [hs[k] for k in near]
    trace = 1e-10 * torch.eye(len(near), dtype=torch.float64)                         # of noise: equal weights may meet
    part = torch.linalg.solve(kernel(torch.cdist(known, known)) + trace, kernel(distance))
    return sum((p * h for p, h in zip(part, hs)), scores @ (c - part @ known))


def dpo_ls(lams, scores, w):
    """The exact DPO optimum under linear scalarisation, Eq. (6), (14), at every preference.

    lams: (F, m)   scores: (Q, S, m)   w: (Q,)  ->  J (F, m), h (F, Q, S), and the largest gradient entry left over.
    """
    lams = lams.double() / lams.double().sum(-1, keepdim=True)                        # fp32 sums to 1 + 1e-7
    wins, (Q, S, _), worst, J = win_probs(scores).sum(-1), scores.shape, 0.0, []
    hs = torch.empty(len(lams), Q, S, dtype=torch.float64)
    for n, lam in enumerate(bar(lams, "exact front")):
        hs[n] = newton(lam @ wins, _near(lam, lams[:n], hs[:n], scores))
        losses = []
        for h, wins_few in _few(S, hs[n], wins):
            E, R = _exponentials(h)
            worst = max(worst, (lam @ _gradients(E, R, wins_few)).abs().max().item() / (S * (S - 1) / 2))
            losses.append(_losses(h, wins_few, -R.log_().sum((-2, -1))))
        J.append(-w @ torch.cat(losses))
    return torch.stack(J), hs, worst


def dpo_tche(lams, scores, w, z):
    """The exact DPO optimum under Tchebycheff, Eq. (16) for z = 0, else Eq. (7), at every preference, by the dual.

    lams: (F, m)   scores: (Q, S, m)   w: (Q,)   z: (m,)  ->  J (F, m), h (F, Q, S), and the largest duality gap left.
    A dimension with λ_i = 0 takes no part.
    """
    (_, S, m), wins, z = scores.shape, win_probs(scores).sum(-1), torch.as_tensor(z, dtype=torch.float64)

    # what is solved so far, to start from: first linear scalarisation at the vertices and at the centre
    cs = [*torch.eye(m, dtype=torch.float64), torch.full((m,), 1 / m, dtype=torch.float64)]
    J, hs, _ = dpo_ls(torch.stack(cs), scores, w)
    all_losses, hs = list(-J), list(hs)                                               # (m,), (Q, S)

    def solve(c):
        h, losses, slopes = newton(c @ wins, _near(c, torch.stack(cs), hs, scores)), 0, 0
        for h_few, wins_few, w_few in _few(S, h, wins, w):
            E, R = _exponentials(h_few)
            grads = _gradients(E, R, wins_few)
            dh = -torch.cholesky_solve(grads.mT, torch.linalg.cholesky(_hessian(E, R)))         # dh/dc, (Q, S, m)
            slopes = slopes + torch.einsum("q,qis,qsj->ij", w_few, grads, dh) / (S * (S - 1) / 2)
            losses = losses + w_few @ _losses(h_few, wins_few, -R.log_().sum((-2, -1)))
        cs.append(c), hs.append(h), all_losses.append(losses)
        return h, losses, slopes

    def start(lam):
        """The weights of the best so far in λ's eyes."""
        return cs[tchebycheff(torch.stack(all_losses), lam, z).argmin()]

    J, hs_best, worst = by_the_dual(lams, z, solve, start)
    return J, torch.stack(hs_best), worst


# ---------------------------------------------------------------------------------------------------------------------
# The dual of Tchebycheff.

def by_the_dual(lams, z, solve, start=lambda lam: (lam > 0).double()):
    """The Tchebycheff optimum, Eq. (7), of every preference, for any objective with convex losses.

    lams: (F, m)   z: (m,)   solve(c): for weights c, Σ c = 1, the policy that minimises Σ c_i L_i, in any form; its
    losses (m,); and dL_i/dc_j (m, m) along such policies, for which a common factor of all c does not matter.
    start(lam): the weights to begin with; by default equal weights of all dimensions with λ_i > 0.
    Returns J (F, m), the policies, and the largest duality gap left over.
    """
    policies, losses, gaps = zip(*(
        _dual_ascent(lam, z, start(lam), solve) for lam in bar(lams.double(), "exact front")))
    return -torch.stack(losses), policies, max(gaps)


def _dual_ascent(lam, z, c, solve):
    """max over μ in the simplex of D(μ) = min_π Σ_i μ_i λ_i (L_i(π) − z_i): Newton, kept inside the simplex.

    lam, z: (m,)   c: (m,) weights μλ to start from   Returns the last policy, its losses and the duality gap.
    """
    on = lam > 0
    lam, z, mu = lam[on], z[on], c[on] / lam[on]
    mu = mu / mu.sum() if mu.sum() > 0 else torch.full_like(mu, 1 / len(mu))

    def dual(mu):
        """What solve returns, then the gradient and the Hessian of D."""
        c = torch.zeros(len(on), dtype=torch.float64)
        c[on] = mu * lam / (mu @ lam)
        policy, losses, slopes = solve(c)
        # equal dimensions leave D flat, but for rounding: a trace of curvature decides where a Newton step goes
        slopes = slopes[on][:, on] - 1e-12 * torch.eye(len(lam), dtype=torch.float64)
        return policy, losses, lam * (losses[on] - z), torch.outer(lam, lam) * slopes / (mu @ lam)

    gap = lambda mu, g: (g.max() - mu @ g).item()             # primal value − dual value: zero at the optimum
    policy, losses, g, D2 = dual(mu)
    for _ in range(100):
        if gap(mu, g) < 1e-9:
            break
        target = _quadratic_on_simplex(g - D2 @ mu, D2, mu)
        for t in (0.5 ** k for k in range(12)):
            mu_new = (1 - t) * mu + t * target
            new = dual(mu_new)
            # The first step that raises D, or halves the gap: a steep D is at its maximum, but for rounding, before its
            # slopes are. A loss is infinite where the policy gives 0 to a response that a dimension without weight
            # needs; then a shorter step is tried.
            g_new = new[2]
            if g_new.isfinite().all() and (mu_new @ g_new >= mu @ g - 1e-15 or gap(mu_new, g_new) < gap(mu, g) / 2):
                mu, (policy, losses, g, D2) = mu_new, new
                break
        else:
            break                                             # no step does: the caller checks the gap that is left
    return policy, losses, gap(mu, g)


def _quadratic_on_simplex(b, A, y):
    """argmax over the simplex of b·y + yᵀAy/2, A (m, m) negative definite, from a point y (m,): an active set.

    On the face of the weights held the maximum is a linear system, A y + b = ν 1, Σ y = 1. Walk there; where a weight
    reaches zero on the way, drop it and solve again. Once there, hold the weight that would raise the value most, or
    stop where none would. The value rises from face to face, so no face is seen twice.
    """
    held = (y > 0).nonzero()[:, 0].tolist()
    for _ in range(20 * len(b)):
        k = len(held)
        kkt, right = torch.zeros(k + 1, k + 1, dtype=A.dtype), torch.ones(k + 1, dtype=A.dtype)
        kkt[:k, :k], kkt[:k, k], kkt[k, :k], right[:k] = A[held][:, held], -1, 1, -b[held]
        solution = torch.linalg.solve(kkt, right)
        now, best, nu = y[held], solution[:k], solution[k]
        if (best < 0).any():
            walk = torch.where(best < 0, now / (now - best), torch.inf)
            y = torch.zeros_like(y).index_put((torch.tensor(held),), (now + walk.min() * (best - now)).clamp(min=0))
            y[held[walk.argmin()]] = 0
            held.remove(held[walk.argmin()])
            continue
        y = torch.zeros_like(y).index_put((torch.tensor(held),), best / best.sum())
        gain = (b + A @ y - nu).index_fill(0, torch.tensor(held), 0.0)
        if gain.max() <= 1e-13:
            break
        held.append(int(gain.argmax()))
    return y


# ---------------------------------------------------------------------------------------------------------------------
# SFT. Dimension i has a demonstrator, a distribution p_i(.|x) over a prompt's responses, and J_i = E log π(y|x) with
# y ~ p_i, every prompt alike (the SFT objective of Panacea's second version). For any weights c on the simplex, at
# every prompt,
#
#     Σ_i c_i L_i = −Σ_y p_c log π = H(p_c) + KL(p_c ‖ π),     p_c = Σ_i c_i p_i,
#
# and KL ≥ 0 with equality at π = p_c alone (Gibbs' inequality): the optimum is the mixture of the demonstrators. So all
# of the front is mixtures, and Tchebycheff's is the one whose weights c ∝ μλ solve the dual. With z_i = inf L_i its
# terms are λ_i KL(p_i ‖ π): at equal λ the radius of the demonstrators, which is the capacity of the channel i -> y.

def sft_losses(logps, demos):
    """The SFT loss of every dimension, −mean over prompts of Σ_y p_i(y|x) log π(y|x), in nats a response.

    logps: (…, X, S) log π(y|x), which need not sum to 1 over the S: other texts may have mass   demos: (X, S, m)
    p_i(y|x)  ->  (…, m). It is inf where π lacks a response that demonstrator i gives.
    """
    never = logps == -torch.inf
    losses = -torch.einsum("...xs,xsm->...m", logps.masked_fill(never, 0).to(demos.dtype), demos) / len(demos)
    return losses.masked_fill(torch.einsum("...xs,xsm->...m", never.to(demos.dtype), demos) > 0, torch.inf)


def sft_entropies(demos):
    """The smallest losses L_i that any policy can have, the entropies of the demonstrators. (X, S, m) -> (m,)"""
    return sft_losses(demos.movedim(-1, 0).log(), demos).diagonal()


def sft_ls(lams, demos):
    """The exact SFT optimum under linear scalarisation, Eq. (6): the mixtures. lams: (F, m)   demos: (X, S, m) p_i(y|x)
    ->  J (F, m), log π* (F, X, S). J_i is −inf where π* lacks a response that demonstrator i gives."""
    lams = lams.double()
    logps = torch.einsum("fm,xsm->fxs", lams / lams.sum(-1, keepdim=True), demos).log()
    return -sft_losses(logps, demos), logps


def sft_tche(lams, demos, z):
    """The exact SFT optimum under Tchebycheff, Eq. (7), by the dual. z: (m,)   ->  J, log π* as sft_ls, and the largest
    duality gap left over. A dimension with λ_i = 0 takes no part in the maximum."""
    def solve(c):
        mixture = demos @ c                                                           # (X, S)
        ratios = torch.where(mixture[..., None] > 0, demos / mixture[..., None], 0.0).flatten(0, 1)
        logps = mixture.log()
        return logps, sft_losses(logps, demos), 1 - ratios.T @ demos.flatten(0, 1) / len(demos)

    J, logps, worst = by_the_dual(lams, torch.as_tensor(z, dtype=torch.float64), solve)
    return J, torch.stack(logps), worst


# ---------------------------------------------------------------------------------------------------------------------
# RLHF. All texts that are not the world's are one more outcome: they share one reward, so the optimum treats them
# alike, and nothing is lost. X: prompts   O = S + 1 outcomes, the last one "any other text".

def with_outside(logps):
    """Adds the log-probability of "any other text": (…, S) -> (…, O), natural logs."""
    rest = (1 - logps.exp().sum(-1, keepdim=True)).clamp(min=1e-12)
    return torch.cat([logps, rest.log()], dim=-1)


def rlhf_objectives(logps, ref, rewards, beta):
    """J_i = E r_i − β KL(π ‖ π_ref), Eq. (1), for every dimension, exactly; means over prompts.

    logps: (…, X, O)   ref: (X, O)   rewards: (X, O, m)  ->  J (…, m), KL (…) in nats. The KL is of the O outcomes: of
    what a policy changes among other texts it sees nothing, so it is at most the whole one.
    """
    p = logps.exp()
    kl = (p * (logps - ref)).sum(-1).mean(-1)                                         # (…,)
    return torch.einsum("...xo,xom->...m", p, rewards) / len(ref) - beta * kl[..., None], kl


def rlhf_closed_form(lams, rewards, ref, beta, aggregate="ls", ideal=None):
    """The optimum of Eq. (12) or (13) over all policies, in closed form: π* ∝ π_ref exp(R_λ / β), R_λ = scalar_reward.

    lams: (F, m)   rewards: (X, O, m)   ref: (X, O) log π_ref  ->  J (F, m), log π* (F, X, O)
    """
    R = scalar_reward(rewards, lams.double()[:, None, None], aggregate, ideal)   # (F, X, O)
    logps = (ref + R / beta).log_softmax(-1)
    return rlhf_objectives(logps, ref, rewards, beta)[0], logps


# ---------------------------------------------------------------------------------------------------------------------
# The limits in the space of mean scores: whatever a policy was trained for, at its KL it cannot score higher.


def most_scores(lams, scores, ref, budgets):
    """The largest Σ λ_i E r_i over all policies with mean over prompts KL(π ‖ π_ref) <= κ, for every λ and budget κ.

    It is π* ∝ π_ref exp(λ·r / β) with one β for all prompts (the budget's Lagrange multiplier), so that a prompt where
    KL buys more score gets more of it. KL falls in β: β is found by bisection.

    lams: (F, m)   scores: (X, S, m)   ref: (X, S) log π_ref, normalised over the S responses   budgets: list of b
    budgets in nats; None or inf: no limit. Returns the mean scores E r (b, F, m), the KL spent (b, F) in nats and β
    (b, F): inf for κ = 0, where π* = π_ref; for no limit, or one that the maximum does not need, 1e-8 of the range of
    λ·r, which stands for β -> 0 and costs at most that times log(1 / smallest π_ref) in score.
    """
    each = [at_kl(lams, [math.inf if budget is None else budget] * len(lams), scores, ref) for budget in budgets]
    return tuple(map(torch.stack, zip(*each)))


def best_at_kl(lams, kls, scores, ref):
    """The largest λ·E r of any policy that spends at most KL κ, for F pairs of λ (F, m) and κ (F,) in nats: (F,)."""
    return (lams.double() * at_kl(lams, kls, scores, ref)[0]).sum(-1)


def at_kl(lams, kls, scores, ref):
    """most_scores for F pairs of λ (F, m) and budget κ (F,): mean scores (F, m), KL (F,), β (F,)."""
    pairs = torch.cat([lams.double(), torch.as_tensor(kls, dtype=torch.float64)[:, None]], 1)         # (F, m + 1)
    parts = [_at_kl(part[:, :-1], part[:, -1], scores, ref)
             for part in bar(pairs.split(max(1, AT_ONCE // ref.numel())), "largest scores")]
    return tuple(map(torch.cat, zip(*parts)))


def _at_kl(lams, kappa, scores, ref):
    """at_kl for so few pairs that the (F, X, S) tensors fit into the memory."""
    R = torch.einsum("fm,xsm->fxs", lams, scores)
    R = R - R.amax(-1, keepdim=True)                                                  # a constant per prompt is free
    spread = -R.amin((-2, -1))

    def policy(beta):
        tilt = R / beta[:, None, None]
        log_Z = (ref + tilt).logsumexp(-1, keepdim=True)
        p = (ref + tilt - log_Z).exp()
        return p, ((p * tilt).sum(-1) - log_Z[..., 0]).mean(-1).clamp(min=0)          # KL = E R/β − log Z, (F,)

    # KL <= (spread / β)² / 8: its slope in t = 1/β is t Var(R), and no variance is above spread² / 4
    least = 1e-8 * spread.clamp(min=1e-300)
    most = torch.maximum(spread / (8 * kappa).sqrt(), least)                          # inf for κ = 0
    low, high = least.log(), most.clamp(max=1e30).log()
    for _ in range(40):                                                               # to 1e-10 of β and finer
        middle = (low + high) / 2
        over = policy(middle.exp())[1] > kappa
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    beta = torch.where(policy(least)[1] <= kappa, least, torch.where(kappa > 0, high.exp(), torch.inf))
    p, kl = policy(beta)
    return torch.einsum("fxs,xsm->fm", p, scores) / len(ref), kl, beta
