"""optimum.py - the exact Pareto fronts of the embedded world: tabular policies, in float64. For DPO by Newton's method,
for RLHF in closed form.

Over all stochastic policies (Panacea's Assumption 4.1) a policy may put any probability on any response, so the only
unknowns of a prompt are  h_a = beta * log pi(a)/pi_ref(a)  for its S responses, up to a constant. With every pair of
responses equally likely and labels drawn by Bradley-Terry, the loss of dimension i is, averaged over prompts,

    L_i(h) = mean over pairs {a,b} of  -P_i(a,b) log sigmoid(h_a - h_b) - P_i(b,a) log sigmoid(h_b - h_a),
    P_i(a,b) = sigmoid(r_i(a) - r_i(b)),     J_i = -L_i,

convex in h. So linear scalarisation is one Newton iteration a preference, and Tchebycheff is its dual: the weights mu
on the simplex that maximise  min_h sum_i mu_i lam_i (L_i(h) - z_i);  at the optimum the duality gap is zero.

Q: problems (prompts with different scores)   S: responses   m: dimensions   w: (Q,) share of the prompts, sums to 1
"""
import itertools

import torch

from aggregate import scalar_reward, simplex_lattice
from data import toy


def label_probs(scores):
    """P_i(a,b) from scores (Q, S, m): returns (Q, m, S, S) with a zero diagonal (no response is paired with itself)."""
    r = scores.transpose(1, 2)                                                        # (Q, m, S)
    P = torch.sigmoid(r[..., :, None] - r[..., None, :])
    return P * (1 - torch.eye(P.shape[-1], dtype=P.dtype))


def problems(prompts, dims):
    """The distinct problems behind `prompts`: prompts with equal scores have equal optima, so each is solved once.

    Returns scores (Q, S, m) float64, w (Q,) and the index of every prompt's problem (len(prompts),).
    """
    columns = [toy.DIMS.index(dim) for dim in dims]
    every = torch.stack([toy.scores(x, toy.responses(x))[:, columns] for x in prompts])             # (prompts, S, m)
    scores, index, count = torch.unique(every, dim=0, return_inverse=True, return_counts=True)
    return scores, count.double() / len(prompts), index


def dpo_losses(h, P):
    """The DPO loss of every dimension, Eq. (2) and (14), as an exact expectation over all pairs and labels.

    h: (..., Q, S) beta * log-ratios   P: (Q, m, S, S)  ->  (..., Q, m)
    """
    S = h.shape[-1]
    delta = h[..., :, None] - h[..., None, :]                                         # (..., Q, S, S)
    nll = torch.nn.functional.softplus(-delta)                                        # -log sigmoid(h_a - h_b)
    return torch.einsum("...qab,qmab->...qm", nll, P) / (S * (S - 1) / 2)


def _derivatives(h, P):
    """Gradients (Q, m, S) of all L_i and the Hessian (Q, S, S), which the dimensions share: labels enter linearly."""
    S = h.shape[-1]
    off = 1 - torch.eye(S, dtype=h.dtype)
    p = torch.sigmoid(h[:, :, None] - h[:, None, :]) * off
    grad = (p[:, None] - P).sum(-1) / (S * (S - 1) / 2)                               # sum_b sigma(h_a - h_b) - P(a,b)
    curve = p * (1 - p) / (S * (S - 1) / 2)
    hessian = torch.diag_embed(curve.sum(-1)) - curve
    return grad, hessian + curve.mean() * torch.ones(S, S, dtype=h.dtype)             # + ones: fixes the free constant


def minimise(c, P, h, tolerance=1e-12):
    """argmin_h sum_i c_i L_i(h) for weights c (m,) on the simplex, by Newton from the start h (Q, S).

    Returns h (Q, S). Raises RuntimeError if the gradient does not vanish (the problem is convex, so it must).
    """
    for _ in range(50):
        grads, hessian = _derivatives(h, P)
        grad = torch.einsum("m,qms->qs", c, grads)                                    # (Q, S)
        if grad.abs().max() < tolerance:
            return h
        step = torch.cholesky_solve(grad[..., None], torch.linalg.cholesky(hessian))[..., 0]
        # a step of at most 4 nats never overshoots far
        h = h - step / (step.abs().amax(-1, keepdim=True) / 4).clamp(min=1)
    raise RuntimeError(f"Newton's method left a gradient of {grad.abs().max():.1e}")


def ls_front(lams, scores, w):
    """The exact optimum of linear scalarisation, Eq. (6), at every preference.

    lams: (N, m)   scores: (Q, S, m)   w: (Q,)  ->  J (N, m), h (N, Q, S), and the largest gradient entry left over.
    """
    P, J, hs, worst = label_probs(scores), [], [], 0.0
    for lam in lams.double():
        h = minimise(lam, P, scores @ lam)                    # the weighted scores: exact at vertices, near elsewhere
        worst = max(worst, torch.einsum("m,qms->qs", lam, _derivatives(h, P)[0]).abs().max().item())
        J.append(-(w @ dpo_losses(h, P)))
        hs.append(h)
    return torch.stack(J), torch.stack(hs), worst


def tche_front(lams, scores, w, ideal=None, tolerance=1e-9):
    """The exact optimum of Tchebycheff, Eq. (16) (with ideal losses z, Eq. (7)), at every preference, by its dual.

    lams: (N, m)   ideal: (m,) losses z, default 0  ->  J (N, m), h (N, Q, S), and the largest duality gap left over.
    """
    P, m = label_probs(scores), lams.shape[1]
    z = torch.zeros(m, dtype=torch.float64) if ideal is None else torch.as_tensor(ideal, dtype=torch.float64)
    from_ls = simplex_lattice(m, 40 if m == 2 else 8 if m == 3 else 2)                # starting points for mu
    J_ls, h_ls, _ = ls_front(from_ls, scores, w)
    J, hs, worst = [], [], 0.0
    for lam in lams.double():
        j = (lam * (-J_ls - z)).amax(-1).argmin()                                     # the best of LS in Tche's eyes
        mu = torch.where(lam > 0, from_ls[j] / lam.clamp(min=1e-12), 0.0)             # its weights c = mu * lam
        mu = mu / mu.sum() if mu.sum() > 0 else (lam > 0).double() / (lam > 0).sum()
        mu, h, gap = _dual_ascent(lam, mu, z, P, w, h_ls[j], tolerance)
        worst = max(worst, gap)
        J.append(-(w @ dpo_losses(h, P)))
        hs.append(h)
    return torch.stack(J), torch.stack(hs), worst


def _dual_ascent(lam, mu, z, P, w, h, tolerance):
    """max over mu in the simplex of D(mu) = min_h sum_i mu_i lam_i (L_i(h) - z_i): Newton, kept inside the simplex."""
    def solve(mu, h):
        c = mu * lam
        h = minimise(c / c.sum(), P, h)
        return h, lam * (w @ dpo_losses(h, P) - z)                                    # g = gradient of D

    h, g = solve(mu, h)
    for _ in range(60):
        gap = (g.max() - mu @ g).item()                       # primal value - dual value: zero at the optimum
        if gap < tolerance:
            break
        grads, hessian = _derivatives(h, P)
        # dL_i/dmu_j through h: the weighted Hessian of problem q carries the factor w_q * sum(c), like its gradients
        inner = torch.cholesky_solve(grads.transpose(1, 2), torch.linalg.cholesky(hessian))   # (Q, S, m)
        D2 = -torch.einsum("q,qis,qsj->ij", w, grads, inner) * torch.outer(lam, lam) / (mu @ lam)
        target = _quadratic_on_simplex(g - D2 @ mu, D2)
        for t in (1.0, 0.5, 0.25, 0.1, 0.02):                                         # the first step that raises D
            mu_new = (1 - t) * mu + t * target
            if mu_new @ lam <= 0:
                continue
            h_new, g_new = solve(mu_new, h)
            if mu_new @ g_new >= mu @ g - 1e-15:
                mu, h, g = mu_new, h_new, g_new
                break
        else:
            break                                             # no step does: the caller checks the gap that is left
    return mu, h, (g.max() - mu @ g).item()


def _quadratic_on_simplex(b, A):
    """argmax over the simplex of b.y + y.A.y/2 (A negative semidefinite, m small): every support is tried."""
    m, best, best_value = len(b), None, -float("inf")
    A = A - 1e-14 * torch.eye(m, dtype=A.dtype)
    for size in range(1, m + 1):
        for support in map(list, itertools.combinations(range(m), size)):
            kkt = torch.zeros(size + 1, size + 1, dtype=A.dtype)
            kkt[:size, :size], kkt[:size, size], kkt[size, :size] = A[support][:, support], -1, 1
            right = torch.cat([-b[support], torch.ones(1, dtype=A.dtype)])
            y = torch.zeros(m, dtype=A.dtype)
            y[support] = torch.linalg.lstsq(kkt, right[:, None]).solution[:size, 0]
            value = b @ y + y @ A @ y / 2
            if y.min() >= -1e-12 and value > best_value:
                best, best_value = y.clamp(min=0) / y.clamp(min=0).sum(), value
    return best



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


def rlhf_front(lams, rewards, ref, beta, aggregate="ls", ideal=None, smooth=0.0):
    """The optimum of Eq. (12) or (13) over all policies, in closed form: π* ∝ π_ref exp(R_λ / β), R_λ = scalar_reward.

    lams: (N, m)   rewards: (X, O, m)   ref: (X, O) log π_ref  ->  J (N, m), log π* (N, X, O)
    """
    R = scalar_reward(rewards, lams.double()[:, None, None], aggregate, ideal, smooth)   # (N, X, O)
    logps = (ref + R / beta).log_softmax(-1)
    return rlhf_objectives(logps, ref, rewards, beta)[0], logps
