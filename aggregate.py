"""aggregate.py - preferences, and how m losses become one (Panacea, arXiv:2402.02030v1, Sec. 4.1 and App. B).

m: objectives   lam: λ on the simplex   losses: (…, m), smaller is better (J_i = −L_i)
Pure functions: the leading dimensions, for instance G preferences in one step, pass through.
"""
import torch


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


def linear_scalarization(losses, lam):
    """Σ_i λ_i L_i, Eq. (6) and (14). losses, lam: (…, m) -> (…)"""
    return (lam * losses).sum(-1)


def tchebycheff(losses, lam, ideal=None):
    """max_i λ_i (L_i − z_i), Eq. (7) and, with z = 0, Eq. (16). losses, lam: (…, m) -> (…)

    ideal: (m,) the best reachable losses z (z_i = 0 for DPO by default: −log σ has infimum 0). In the paper's terms its
    z is −ideal. The losses must be means over the batch, since the maximum is of expectations; the gradient is that of
    the largest term alone. A dimension with λ_i = 0 contributes 0 and is never the maximum of positive terms.
    """
    if ideal is not None:
        losses = losses - torch.as_tensor(ideal, dtype=losses.dtype, device=losses.device)
    return (lam * losses).amax(-1)
