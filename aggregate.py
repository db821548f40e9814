"""aggregate.py - preferences, and how m losses become one (Panacea, arXiv:2402.02030v1, Sec. 4.1 and App. B; PAMA,
arXiv:2508.07768; MGDA, Désidéri 2012).

m: objectives   lam: λ on the simplex   losses: (…, m), smaller is better (J_i = −L_i)
Pure functions: the leading dimensions, for instance G preferences in one step, pass through. With a preference, linear
scalarisation and Tchebycheff weigh the objectives; without one, the min-norm weights of PAMA and MGDA look for a
direction that is good for all of them.
"""
import itertools

import torch


# ---------------------------------------------------------------------------------------------------------------------
# Preferences.

def simplex_lattice(m, parts):
    """All preferences with coordinates in {0, 1/parts, ..., 1} (Das-Dennis): (N, m), in lexicographic order."""
    points = [p for p in itertools.product(range(parts + 1), repeat=m - 1) if sum(p) <= parts]
    return torch.tensor([[*p, parts - sum(p)] for p in points], dtype=torch.float64) / parts


def vertex_paths(m, steps=4):
    """The centre of the simplex, then for each vertex `steps` preferences on the way there: (1 + m · steps, m)."""
    centre = torch.full((m,), 1 / m, dtype=torch.float64)
    along = torch.arange(1, steps + 1, dtype=torch.float64)[:, None] / steps                        # (steps, 1)
    return torch.cat([centre[None], *((1 - along) * centre + along * e for e in torch.eye(m, dtype=torch.float64))])


def sample_preference(n, m, alpha=1.0, vertex_share=0.25, generator=None):
    """n preferences λ ~ the simplex: with probability vertex_share a uniformly drawn vertex, else Dirichlet(alpha).

    Returns (n, m) fp32 on the CPU. # not in paper: v1 says only "randomly sample"; vertices are drawn more often,
    because a continuous distribution never reaches the ends of the front.
    """
    gamma = torch._standard_gamma(torch.full((n, m), float(alpha)), generator=generator)  # normalised gammas: Dirichlet
    dirichlet = gamma / gamma.sum(-1, keepdim=True)
    vertices = torch.eye(m)[torch.randint(m, (n,), generator=generator)]
    take_vertex = torch.rand(n, 1, generator=generator) < vertex_share
    return torch.where(take_vertex, vertices, dirichlet)


def models_of(method, dims, parts, lam=None):
    """The models that a method trains: a list of (name, the λ it is trained for, or None where λ is an input).

    panacea: one. rs: one a dimension, at the vertices. dps: one a preference, of the lattice of `parts` or `lam` alone.
    """
    if method == "panacea":
        return [("adapter", None)]
    if method == "rs":
        return [(f"adapter-{dim}", vertex) for dim, vertex in zip(dims, torch.eye(len(dims)))]
    grid = simplex_lattice(len(dims), parts).float() if lam is None else torch.tensor([lam])
    return [(f"adapter-{i:03d}", lam) for i, lam in enumerate(grid)]


# ---------------------------------------------------------------------------------------------------------------------
# With a preference.

def linear_scalarization(losses, lam):
    """Σ_i λ_i L_i, Eq. (6), (12) and (14). losses, lam: (…, m) -> (…)"""
    return (lam * losses).sum(-1)


def tchebycheff(losses, lam, ideal=None, smooth=0.0):
    """max_i λ_i (L_i − z_i), Eq. (7), (13) and, with z = 0, Eq. (16). losses, lam: (…, m) -> (…)

    ideal: (m,) the best reachable losses z (z_i = 0 for DPO by default: −log σ has infimum 0). In the paper's terms its
    z is −ideal. For DPO the losses are means over the batch, the maximum being of expectations; for RLHF they are −r of
    single responses, the maximum standing inside the expectation. The gradient is that of the largest term alone. A
    dimension with λ_i = 0 contributes 0 and is never the maximum of positive terms.
    smooth: μ > 0 takes μ log Σ_i exp(λ_i (L_i − z_i) / μ) instead, at most μ log m above the maximum.
    """
    if ideal is not None:
        losses = losses - torch.as_tensor(ideal, dtype=losses.dtype, device=losses.device)
    if smooth > 0:
        return smooth * (lam * losses / smooth).logsumexp(-1)
    return (lam * losses).amax(-1)


def denominators(known, aggregate):
    """Turns sums of losses into L_i. known: (G, m), how many labels (or responses) a dimension has under each of the G
    preferences of a step. Returns counts (G or 1, m) to divide the sums by, and absent, to add to the quotients.

    "ls" is linear: sharing the step's mean count weighs dimension i by λ_i however unevenly its data is spread. "tche"
    takes the maximum of each preference's own means; a dimension without data there cannot be it.
    """
    if aggregate == "ls":
        return (known.sum(0, keepdim=True) / len(known)).clamp(min=1e-9), 0.0
    return known.clamp(min=1e-9), -1e9 * (known == 0)


def scalar_reward(rewards, lam, aggregate, ideal=None, smooth=0.0):
    """The one reward of a response under λ: "ls" Σ λ_i r_i, Eq. (12); "tche" −max_i λ_i (z_i − r_i), Eq. (13).

    rewards, lam: (…, m)   ideal: (m,) the largest rewards z   smooth: as in tchebycheff  ->  (…)
    """
    if aggregate == "ls":
        return linear_scalarization(rewards, lam)
    return -tchebycheff(-rewards, lam, -ideal, smooth)


# ---------------------------------------------------------------------------------------------------------------------
# Without one: weights c on the simplex that make ‖Σ c_i a_i‖ smallest.

def min_norm_weights(gram):
    """argmin over the simplex of cᵀ G c, the point of the convex hull nearest to 0. gram: (n, n) G_ij = ⟨a_i, a_j⟩.

    n = 2: c_1 = clip( (G_22 − G_12) / (G_11 + G_22 − 2 G_12), 0, 1 ), ½ where the two vectors are equal. Otherwise
    Wolfe's algorithm (1976), exact after finitely many steps: take in the vertex that points most against the current
    point; solve without signs on the vertices held; drop those whose weight would turn negative. Returns (n,) float64.
    MGDA takes the gradients of the objectives for a_i, PAMA their advantages. Raises ValueError for a Gram matrix with
    an infinity or a NaN in it. Where several c are optimal it returns one of them.
    """
    G = torch.as_tensor(gram, dtype=torch.float64).cpu()
    if not G.isfinite().all():
        raise ValueError("the Gram matrix is not finite")
    n = len(G)
    if n == 2:
        spread = (G[0, 0] + G[1, 1] - 2 * G[0, 1]).item()
        first = 0.5 if spread <= 1e-15 * G.diagonal().sum() else (G[1, 1] - G[0, 1]).item() / spread
        return torch.tensor([min(max(first, 0.0), 1.0), 1 - min(max(first, 0.0), 1.0)], dtype=torch.float64)
    c = torch.zeros(n, dtype=torch.float64)
    c[G.diagonal().argmin()] = 1.0
    held = [int(G.diagonal().argmin())]
    for _ in range(20 * n):
        j = int((G @ c).argmin())
        if j in held or c @ G @ c - (G @ c)[j] <= 1e-12 * G.diagonal()[held + [j]].max():
            return c                                          # no vertex lies on this side: the point is the nearest
        held.append(j)
        while True:
            # the nearest point of the affine hull of the vertices held: G y = −ν 1, Σ y = 1
            kkt = torch.ones(len(held) + 1, len(held) + 1, dtype=torch.float64)
            scale = G[held][:, held].diagonal().mean()
            kkt[:-1, :-1], kkt[-1, -1] = G[held][:, held] / scale, 0.0
            right = torch.zeros(len(held) + 1, dtype=torch.float64)
            right[-1] = 1.0
            y = torch.linalg.lstsq(kkt, right[:, None], driver="gelsd").solution[:-1, 0]
            if (y > 0).all():
                c = torch.zeros_like(c).index_put((torch.tensor(held),), y / y.sum())
                break
            now = c[held]                                     # walk towards y until the first weight is 0; drop it
            steps = torch.where(y <= 0, now / (now - y).clamp(min=1e-300), torch.inf)
            mixed = now + min(steps.min().item(), 1.0) * (y - now)
            mixed[steps.argmin()] = 0.0
            c = torch.zeros_like(c).index_put((torch.tensor(held),), mixed.clamp(min=0) / mixed.clamp(min=0).sum())
            held = [i for i in held if c[i] > 0]
    return c


def pama_weights(advantages):
    """PAMA's weights c, min over the simplex of ‖Σ_i c_i A_i‖², from advantages instead of gradients of parameters.

    advantages (n,), one number an objective: the closed form of Theorem 1 (arXiv:2508.07768) in O(n). Σ c_i A_i is 0
    projected onto [min A, max A]: all weight on the smallest if all are positive, on the largest if all are negative,
    otherwise the two ends are mixed to 0. Where all are equal the weights are equal.
    advantages (n, N), one vector over N tokens an objective: the same bound for a batch (Cauchy-Schwarz), by the Gram
    matrix; O(n² N). Both cost nothing that grows with the number of parameters. Returns (n,) float64.

    With "no negative" advantages the first form is one-hot on the smallest mean: it improves what has improved least.
    """
    A = torch.as_tensor(advantages).detach().double()
    if not A.isfinite().all():
        raise ValueError("the advantages are not finite")
    if A.ndim == 2:
        return min_norm_weights(A @ A.T)
    low, high = A.argmin(), A.argmax()
    c = torch.zeros(len(A), dtype=torch.float64)
    if A[low] == A[high]:
        return c + 1 / len(A)
    if A[low] >= 0:
        c[low] = 1.0
    elif A[high] <= 0:
        c[high] = 1.0
    else:
        c[high], c[low] = -A[low] / (A[high] - A[low]), A[high] / (A[high] - A[low])
    return c


def pama_advantages(advantages, mask, reading="V"):
    """The one advantage of a token that PAMA trains on, from its "no negative" ones (objectives.noon).

    advantages: (B, L, n)   mask: (B, L)   ->  (B, L) and the weights c (n,), or None where every token has its own.
    The paper solves for scalars A_i and does not say over what. "V": over all tokens at once, A_t = Σ c_i A_{i,t} with
    the c that makes the vector (A_t)_t shortest; tight for its bound, and keeps each token's credit. "T": Theorem 1 for
    each token alone, which for A_i >= 0 is A_t = min_i A_{i,t}. "S": Theorem 1 for the batch means, which puts all
    weight on the objective that improves least.
    """
    if reading == "T":
        return advantages.amin(-1), None
    rows = advantages[mask.bool()].T                                                  # (n, N)
    c = pama_weights(rows if reading == "V" else rows.mean(1))
    return linear_scalarization(advantages, c.to(advantages)), c
