"""aggregate.py - preferences, and how m losses become one (Panacea, arXiv:2402.02030v1, Sec. 4.1 and App. B; PAMA,
arXiv:2508.07768; MGDA, Désidéri 2012).

m: objectives   lam: preference λ on the simplex   losses: (…, m), smaller is better (J_i = −L_i)
G: preferences in a training step   R: responses   L: tokens of the longest one   N: predicted tokens   A: advantages
n: advantages of a token, one per objective   c: weights on the simplex, (n,)
Pure functions: leading dimensions, for instance the G preferences of a step, stay as they are. With a preference,
linear scalarisation and Tchebycheff weigh the objectives by it; without one, the min-norm weights of PAMA and MGDA look
for a direction that is good for all objectives.
"""
import itertools

import torch

# ---------------------------------------------------------------------------------------------------------------------
# Preferences.

def simplex_lattice(m, parts):
    """All preferences with coordinates in {0, 1/parts, ..., 1} (Das-Dennis): (F, m), in lexicographic order."""
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

    panacea, prompt: one. rs: one per dimension, at the vertices. dps: one per preference, those of the lattice of
    `parts`, or `lam` alone.
    """
    if method in ("panacea", "prompt"):
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


def tchebycheff(losses, lam, ideal=None):
    """max_i λ_i (L_i − ideal_i), Eq. (7), (13), (15) and, without ideal, Eq. (16). losses, lam: (…, m) -> (…)

    ideal: (m,) the best reachable losses; None: 0, which is DPO's, since −log σ has infimum 0. The paper's z are values
    of J = −L, so its z is −ideal. Eq. (15) and (16) take the maximum of expectations: there the losses are means over
    the batch. Eq. (13) has the maximum inside the expectation: there they are −r of single responses. The gradient is
    that of the largest term alone. A dimension with λ_i = 0 takes no part: its term is −inf. (Its 0 would be the
    largest, and leave no gradient, wherever the others are better than their ideal.)
    """
    if ideal is not None:
        losses = losses - torch.as_tensor(ideal, dtype=losses.dtype, device=losses.device)
    return (lam * losses).masked_fill(lam == 0, -torch.inf).amax(-1)


def denominators(known, expected, aggregate):
    """What sums of losses are divided by, to become the means L_i of Eq. (14), (15) and (16).

    known: (G, m), how many labels (or responses) each dimension has under each of the step's G preferences
    expected: (m,), how many it has under one on average over all data   aggregate: "ls" or "tche"
    ->  counts (1 or G, m), and `absent`, to be added to the quotients: L = sums / counts + absent
    "ls": every sum is divided by the expected count. LS is linear: over an epoch all labels of dimension i then weigh
    the same, and the mean gradient is that of Σ λ_i L_i over all data. (Divided by the batch's own count, dimension i
    would weigh λ_i · P(a batch has a label of i), and a label that is alone in its batch more than one in company.)
    "tche": every preference's sum is divided by its own count. Here it is the values that decide which term is the
    largest, and an own mean is near L_i however many labels there are; a sum over the expected count is small just
    because the labels are few. A maximum of noisy means is not the maximum of the L_i, and no divisor makes it so: only
    larger batches do. Where a preference has no label of dimension i, nothing is known of L_i, and −inf leaves i out.
    """
    if aggregate == "ls":
        return expected[None].clamp(min=1e-9), 0.0
    return known.clamp(min=1e-9), torch.zeros_like(known).masked_fill(known == 0, -torch.inf)


def scalar_reward(rewards, lam, aggregate, ideal=None):
    """The one reward of a response under λ: "ls" Σ_i λ_i r_i, Eq. (12); "tche" −max_i λ_i (z_i − r_i), Eq. (13).

    rewards, lam: (…, m)   ideal: (m,) the largest rewards z  ->  (…)
    (For "ls" train_ppo.py trains on Σ_i λ_i A_i, which GAE makes equal to the advantages of this reward.)
    """
    if aggregate == "ls":
        return linear_scalarization(rewards, lam)
    return -tchebycheff(-rewards, lam, -ideal)


# ---------------------------------------------------------------------------------------------------------------------
# Without a preference: weights c on the simplex that make ‖Σ c_i a_i‖ smallest.

def min_norm_weights(gram):
    """argmin over the simplex of cᵀ Q c, the point of the convex hull of the a_i nearest to 0.

    gram: (n, n) Q_ij = ⟨a_i, a_j⟩   ->  c (n,) float64, one of them where several are optimal
    n = 2: c_1 = clip( (Q_22 − Q_12) / (Q_11 + Q_22 − 2 Q_12), 0, 1 ), ½ where the two vectors are equal. Otherwise
    Wolfe's algorithm (1976), exact after finitely many steps: add the vertex that points most against the current
    point; solve on the vertices held, ignoring signs; drop a vertex whose weight would become negative.
    MGDA takes the gradients of the objectives for a_i, PAMA their advantages. Raises ValueError for a Gram matrix with
    an infinity or a NaN in it.
    """
    gram = torch.as_tensor(gram, dtype=torch.float64).cpu()
    if not gram.isfinite().all():
        raise ValueError("the Gram matrix is not finite")
    n = len(gram)
    if n == 2:
        spread = (gram[0, 0] + gram[1, 1] - 2 * gram[0, 1]).item()
        first = 0.5 if spread <= 1e-15 * gram.diagonal().sum() else (gram[1, 1] - gram[0, 1]).item() / spread
        return torch.tensor([min(max(first, 0.0), 1.0), 1 - min(max(first, 0.0), 1.0)], dtype=torch.float64)
    c = torch.zeros(n, dtype=torch.float64)
    held = [int(gram.diagonal().argmin())]
    c[held] = 1.0
    for _ in range(20 * n):
        j = int((gram @ c).argmin())
        if j in held or c @ gram @ c - (gram @ c)[j] <= 1e-12 * gram.diagonal()[held + [j]].max():
            return c                                          # no vertex lies on this side: c is the nearest
        held.append(j)
        while True:
            # the nearest point of the affine hull of the vertices held: Q y = −ν 1, Σ y = 1
            kkt = torch.ones(len(held) + 1, len(held) + 1, dtype=torch.float64)
            inner = gram[held][:, held]
            kkt[:-1, :-1], kkt[-1, -1] = inner / inner.diagonal().mean(), 0.0
            right = torch.zeros(len(held) + 1, dtype=torch.float64)
            right[-1] = 1.0
            y = torch.linalg.lstsq(kkt, right[:, None], driver="gelsd").solution[:-1, 0]
            if (y > 0).all():
                c = torch.zeros_like(c).index_put((torch.tensor(held),), y / y.sum())
                break
            now = c[held]                                     # go towards y until the first weight is 0; drop it
            steps = torch.where(y <= 0, now / (now - y).clamp(min=1e-300), torch.inf)
            mixed = now + min(steps.min().item(), 1.0) * (y - now)
            mixed[steps.argmin()] = 0.0
            c = torch.zeros_like(c).index_put((torch.tensor(held),), mixed.clamp(min=0) / mixed.clamp(min=0).sum())
            held = [i for i in held if c[i] > 0]
    return c


def pama_weights(advantages):
    """PAMA's weights c, argmin over the simplex of ‖Σ_i c_i A_i‖², PAMA Eq. (10): advantages, not gradients.

    advantages (n,), one number per objective: the closed form of Theorem 1 (arXiv:2508.07768) in O(n). Σ c_i A_i is 0
    projected onto [min A, max A]: all weight is on the smallest if all are positive, on the largest if all are
    negative, else the smallest and the largest are mixed so that the sum is 0. Equal advantages give equal weights.
    advantages (n, N), one vector over N tokens per objective: the same bound for a batch (Cauchy-Schwarz), by the Gram
    matrix, in O(n² N). Neither cost grows with the number of parameters. Returns (n,) float64.

    With "no negative" advantages the first form puts all weight on the objective with the smallest mean advantage.
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


def pama_advantages(advantages, mask, reading="V", total=lambda x: x):
    """The one advantage of a token that PAMA trains on, from its n "no negative" ones (objectives.noon), PAMA Eq. (10).

    advantages: (R, L, n)   mask: (R, L)   ->  (R, L) and the weights c (n,), or None where every token has its own.
    total: where these are not all responses, sums a tensor over all of them (runs.processes.all_sum).
    The paper solves for scalars A_i and does not say what they are taken over. Three readings:
    "V" (vector): all tokens at once, A_t = Σ c_i A_{i,t} with the c that makes the vector (A_t)_t shortest. The paper's
    bound is tight for it, and every token keeps its credit.
    "T" (token): Theorem 1 for each token alone, which for A_i >= 0 is A_t = min_i A_{i,t}.
    "S" (scalar): Theorem 1 for the batch means, which puts all weight on the objective with the smallest mean.
    """
    if reading == "T":
        return advantages.amin(-1), None
    rows = advantages[mask.bool()].T.double()                                         # (n, N)
    c = (min_norm_weights(total(rows @ rows.T)) if reading == "V" else
         pama_weights(total(rows.sum(1)) / total(mask.sum())))
    return linear_scalarization(advantages, c.to(advantages)), c
