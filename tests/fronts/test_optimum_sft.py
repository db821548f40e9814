"""test_optimum_sft.py - the exact SFT fronts: mixtures of demonstrators, and their Tchebycheff weights."""
import math

import pytest
import torch

from aggregate import simplex_lattice
from data import toy
from fronts.optimum import sft_entropies, sft_losses, sft_ls, sft_tche


def demonstrators(X=3, S=8, m=3, seed=0, sharp=1.5):
    """Random demonstrators p_i(y|x): (X, S, m), positive, each column a distribution."""
    g = torch.Generator().manual_seed(seed)
    return (sharp * torch.randn(X, S, m, generator=g, dtype=torch.float64)).softmax(1)


def entropies(demos):
    """mean over prompts of H(p_i(.|x)), the least loss of every dimension. (m,)"""
    return -(demos * demos.log()).sum(1).mean(0)


def near(logps, n=60, seed=1):
    """n policies around logps (X, S) at each of three sizes of noise: (3 n, X, S)."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, n, *logps.shape, generator=g, dtype=torch.float64)
    sizes = torch.tensor([1e-3, 0.1, 2.0], dtype=torch.float64)[:, None, None, None]
    return (logps + sizes * noise).flatten(0, 1).log_softmax(-1)


def preferences(m, seed=3):
    """Vertices, faces and the inside of the simplex, among them the centre and a nearly forgotten dimension."""
    g = torch.Generator().manual_seed(seed)
    some = torch.rand(4, m, generator=g, dtype=torch.float64)
    face = torch.rand(2, m, generator=g, dtype=torch.float64)
    face[:, 0] = 0
    uneven = torch.ones(1, m, dtype=torch.float64)
    uneven[0, -1] = 1e-3
    lams = torch.cat([torch.eye(m, dtype=torch.float64), torch.ones(1, m, dtype=torch.float64), some, face, uneven])
    return lams / lams.sum(1, keepdim=True)


# ---- the losses ----

def test_losses_against_loops(close):
    demos = demonstrators()
    logps = demonstrators(seed=1)[..., :2].movedim(-1, 0).log() - 0.7                # half of the mass lies elsewhere
    by_hand = [[-sum(demos[x, y, i].item() * logps[n, x, y].item() for x in range(3) for y in range(8)) / 3
                for i in range(3)] for n in range(2)]
    assert close(sft_losses(logps, demos), torch.tensor(by_hand, dtype=torch.float64), 1e-12)
    assert close(sft_losses(logps[0], demos), torch.tensor(by_hand[0], dtype=torch.float64), 1e-12)
    assert close(sft_losses(demos[..., 1].log(), demos)[1], entropies(demos)[1], 1e-12)
    normalised = sft_losses(logps.log_softmax(-1), demos)                            # wrong: renormalised to the set
    assert close(sft_losses(logps, demos) - normalised, torch.full((2, 3), 0.7, dtype=torch.float64), 1e-12)


def test_a_response_that_the_policy_lacks():
    demos = torch.tensor([[[1.0, 0.5], [0.0, 0.5]]], dtype=torch.float64)            # the first never says the second
    assert sft_losses(demos[..., 0].log(), demos).tolist() == [0.0, math.inf]
    assert sft_losses(demos[..., 1].log(), demos).tolist() == pytest.approx([math.log(2)] * 2)


# ---- linear scalarisation ----

def test_the_mixture_is_the_optimum_of_ls():
    demos, lams = demonstrators(), simplex_lattice(3, 4)
    J, logps = sft_ls(lams, demos)
    assert J.shape == (15, 3) and logps.shape == (15, 3, 8)
    assert (logps.exp().sum(-1) - 1).abs().max() < 1e-12
    assert torch.allclose(-J, sft_losses(logps, demos), atol=1e-12)
    for lam, j, policy in zip(lams, J, logps):
        assert (sft_losses(near(policy), demos) @ lam > -j @ lam).all()
    assert (lams @ J.T <= (lams * J).sum(1)[:, None] + 1e-12).all()      # nor is another λ's optimum better
    geometric = (lams[:, None, None] * demos.log()).sum(-1).log_softmax(-1)          # wrong: the mean of the logs
    assert (((sft_losses(geometric, demos) + J) * lams).sum(1) > 0.01).sum() == 12   # all but the vertices


def test_numerical_optimisation_finds_the_mixture(close):
    demos, lam = demonstrators(seed=2), torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    logits = torch.zeros(3, 8, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-10, tolerance_change=0,
                                  line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = sft_losses(logits.log_softmax(-1), demos) @ lam[0]
        value.backward()
        return value

    optimizer.step(loss)
    J, logps = sft_ls(lam, demos)
    assert close(logits.detach().softmax(-1), logps[0].exp(), 1e-6)
    assert close(-sft_losses(logits.detach().log_softmax(-1), demos), J[0], 1e-6)


def test_preferences_in_single_precision_still_give_policies():
    lams = torch.full((1, 3), 1 / 3) * (1 + 1e-6)
    demos = demonstrators()
    for J, logps, *_ in (sft_ls(lams, demos), sft_tche(lams, demos, entropies(demos))):
        assert J.dtype == torch.float64 and (logps.exp().sum(-1) - 1).abs().max() < 1e-12


# ---- Tchebycheff ----

@pytest.mark.parametrize("zero", [False, True], ids=["z=entropies", "z=0"])
@pytest.mark.parametrize("m", [2, 3, 5, 10])
def test_tche_is_the_minimum(m, zero):
    demos, lams = demonstrators(m=m, sharp=1.0), preferences(m)
    z = torch.zeros(m, dtype=torch.float64) if zero else entropies(demos)
    J, logps, gap = sft_tche(lams, demos, z.tolist() if zero else sft_entropies(demos))
    assert 0 <= gap + 1e-15 and gap < 1e-9
    assert J.shape == (len(lams), m) and logps.shape == (len(lams), 3, 8)
    assert (logps.exp().sum(-1) - 1).abs().max() < 1e-12 and torch.allclose(-J, sft_losses(logps, demos), atol=1e-12)
    value = lambda lam, losses: (lam * (losses - z)).amax(-1)
    several = 0
    for lam, j, policy in zip(lams, J, logps):
        best, terms = value(lam, -j), lam * (-j - z)
        assert (value(lam, sft_losses(near(policy), demos)) >= best - 1e-9).all()
        assert (value(lam, -J) >= best - 1e-9).all()
        # it is a mixture of the demonstrators whose terms are as large as the largest
        weights = torch.linalg.lstsq(demos.flatten(0, 1), policy.exp().flatten()[:, None]).solution[:, 0]
        assert (demos @ weights - policy.exp()).abs().max() < 1e-9 and weights.min() > -1e-9
        assert (terms[(weights > 1e-6) & (lam > 0)] > best - 1e-7).all()
        several += (weights > 1e-6).sum() > 1
    assert several >= (2 if zero else 6)
    at_same_lam = sft_losses(sft_ls(lams, demos)[1], demos)           # wrong: linear scalarisation at the same λ
    assert (value(lams, at_same_lam) > 1.02 * value(lams, -J)).sum() >= (2 if zero else 4)


def test_vertices_are_the_demonstrators(close):
    demos = demonstrators(m=4)
    for J, logps, *_ in (sft_ls(torch.eye(4), demos), sft_tche(torch.eye(4), demos, entropies(demos))):
        assert close(logps.exp().movedim(0, -1), demos, 1e-12)
        assert close(-J.diagonal(), entropies(demos), 1e-12)


def blahut_arimoto(demos, steps):
    """The capacity of the channel i -> y with one use a prompt and the same input at each: max over c of the mean
    over prompts of I(i; y), by the algorithm of Blahut and Arimoto. Returns the capacity in nats and c (m,)."""
    c = torch.full((demos.shape[-1],), 1 / demos.shape[-1], dtype=torch.float64)
    for _ in range(steps):
        divergence = (demos * (demos / (demos @ c)[..., None]).log()).sum(1).mean(0)  # KL(p_i ‖ mixture), (m,)
        c = c * divergence.exp()
        c = c / c.sum()
    return (c @ divergence).item(), c


@pytest.mark.parametrize("m", [2, 3])
def test_at_equal_preferences_it_is_the_channel_capacity(m, close):
    demos = demonstrators(m=m)
    capacity, c = blahut_arimoto(demos, 3000)
    J, logps, gap = sft_tche(torch.full((1, m), 1 / m), demos, entropies(demos))
    terms = -J[0] - entropies(demos)                                     # KL(p_i ‖ π): the radius, the same for all
    assert terms.max().item() == pytest.approx(capacity, rel=1e-7)
    assert close(logps[0].exp(), demos @ c, 1e-4) and c.min() > 0.05
    at_lam = (demos * (demos / demos.mean(-1, keepdim=True)).log()).sum(1).mean(0)   # wrong: the mixture at c = λ
    assert at_lam.mean() < capacity - 1e-6 and at_lam.max() > capacity + 1e-3


def test_the_maximum_is_of_means_over_prompts():
    """Wrong: each prompt its own weights. It solves max per prompt, and is worse where one weight serves all."""
    demos, lam = demonstrators(seed=4), torch.tensor([[0.5, 0.2, 0.3]], dtype=torch.float64)
    z = entropies(demos)
    value = lambda logps: (lam[0] * (sft_losses(logps, demos) - z)).amax(-1)
    right = sft_tche(lam, demos, z)[1][0]
    alone = torch.cat([sft_tche(lam, demos[x:x + 1], entropies(demos[x:x + 1]))[1][0] for x in range(3)])
    assert value(alone) > value(right) + 1e-3
    without = sft_tche(lam, demos, [0, 0, 0])[1][0]       # wrong: without z
    assert value(without) > value(right) + 1e-2


def test_a_dimension_without_preference_takes_no_part(close):
    demos, lams = demonstrators(m=4), torch.tensor([[0.3, 0.0, 0.7, 0.0], [0.0, 0.5, 0.5, 0.0]], dtype=torch.float64)
    J, logps, _ = sft_tche(lams, demos, entropies(demos))
    for n, kept in enumerate(([0, 2], [1, 2])):
        few, policy, _ = sft_tche(lams[n:n + 1, kept], demos[..., kept], entropies(demos[..., kept]))
        assert close(J[n, kept], few[0], 1e-8) and close(logps[n].exp(), policy[0].exp(), 1e-6)


def test_demonstrators_that_are_equal_or_share_nothing():
    demos = demonstrators(m=3)
    twice = torch.cat([demos, demos[..., :2]], dim=-1)                   # dimensions 3 and 4 are 0 and 1 again
    lams = torch.cat([torch.full((1, 5), 0.2), torch.tensor([[0.1, 0.2, 0.3, 0.1, 0.3]])]).double()
    J, _, gap = sft_tche(lams, twice, entropies(twice))
    assert gap < 1e-9 and torch.allclose(J[:, :2], J[:, 3:], atol=1e-12)
    apart = torch.eye(3, dtype=torch.float64)[None]                      # each has one response of its own
    lams = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 2, 4]]) / torch.tensor([[3], [2], [7]])
    J, logps, gap = sft_tche(lams, apart, [0, 0, 0])
    assert gap < 1e-9 and torch.allclose(logps[0].exp(), torch.full((1, 3), 1 / 3, dtype=torch.float64))
    assert J[1].tolist() == pytest.approx([-math.inf, -math.log(2), -math.log(2)])
    terms = torch.tensor([1, 2, 4]) * -J[2]                              # λ_i log(1 / π_i), all the same
    assert terms.max() - terms.min() < 1e-8


@pytest.mark.parametrize("sharp, towards_the_centre", [(1, 0.5), (3, 0.75)])
def test_all_ten_dimensions_of_the_embedded_world(sharp, towards_the_centre):
    """Demonstrators that tilt the base model's texts towards one score each, so that some nearly lack what others say.
    Among the preferences are some whose dual is so steep that D is at its maximum, but for rounding, before the gap is
    closed."""
    prompts = toy.prompts("new_verbs")[::2]
    scores = torch.stack([toy.scores(x, toy.responses(x)) for x in prompts])         # (20, 160, 10)
    demos = (torch.stack([toy.base_probs(x) for x in prompts]).log()[..., None] + sharp * scores).softmax(1)
    eye = torch.eye(10, dtype=torch.float64)
    lams = torch.cat([preferences(10), eye + towards_the_centre * (0.1 - eye)])
    for z in (entropies(demos), torch.zeros(10)):
        J, _, gap = sft_tche(lams, demos, z)
        terms = lams * (-J - z)
        assert gap < 1e-9 and J.isfinite().all() and (terms >= -1e-12).all()
    J, _, _ = sft_tche(lams[:11], demos, sft_entropies(demos))
    terms = lams[:11] * (-J - entropies(demos))
    assert (terms[:10].amax(1) < 1e-9).all()                             # vertices: nothing is lost
    assert terms[10].max() - terms[10].topk(3).values.min() < 1e-8       # the centre: several hold each other
