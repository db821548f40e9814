"""test_optimum.py - the exact front: its losses, Newton's solutions, the Tchebycheff dual, problems and lattices."""
import math

import pytest
import torch

from aggregate import simplex_lattice
from data import optimum, toy
from data.optimum import dpo_losses, label_probs, ls_front, minimise, tche_front
from objectives import dpo_loss


def world(Q=2, S=7, m=3, seed=0):
    """Random scores (Q, S, m), weights (Q,) and label probabilities, small enough for a hundred solves."""
    g = torch.Generator().manual_seed(seed)
    scores = 1.5 * torch.randn(Q, S, m, generator=g, dtype=torch.float64)
    w = torch.rand(Q, generator=g, dtype=torch.float64) + 0.5
    return scores, w / w.sum(), label_probs(scores)


def near(h, n=50, size=1e-3, seed=1):
    """n random neighbours of h."""
    return h + size * torch.randn(n, *h.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the losses ----

def test_losses_are_the_expectation_of_dpo_loss(close):
    scores, _, P = world()
    h, beta = torch.randn(2, 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64), 0.3
    expected = torch.zeros(2, 3, dtype=torch.float64)
    pairs = [(a, b) for a in range(7) for b in range(a)]
    for a, b in pairs:                                                   # every pair, every label, its probability
        for better, worse in ((a, b), (b, a)):
            loss = dpo_loss(h[:, better] / beta, h[:, worse] / beta, 0 * h[:, 0], 0 * h[:, 0], beta)[0]
            expected += torch.sigmoid(scores[:, better] - scores[:, worse]) * loss[:, None] / len(pairs)
    assert close(dpo_losses(h, P), expected, 1e-12)
    assert close(dpo_losses(torch.stack([h, 0 * h]), P)[0], expected, 1e-12)         # leading dimensions pass through
    assert close(dpo_losses(0 * h, P), math.log(2) * torch.ones(2, 3, dtype=torch.float64), 1e-12)
    assert close(dpo_losses(h + 3, P), expected, 1e-12)                  # a constant does not matter


def test_derivatives(close):
    _, _, P = world()
    h = torch.randn(2, 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda h: dpo_losses(h, P), h)
    grads, hessian = optimum._derivatives(h.detach(), P.sum(-1))
    for q in range(2):
        for i in range(3):
            loss = lambda x: dpo_losses(x[None], P[q:q + 1])[0, i]
            assert close(grads[q, i], torch.autograd.functional.jacobian(loss, h[q]), 1e-10)
            flat = hessian[q] - hessian[q].mean()                        # less the constant that fixes h's constant
            assert close(flat, torch.autograd.functional.hessian(loss, h[q]), 1e-10)      # the same for every i
    torch.linalg.cholesky(hessian)                                       # positive definite


# ---- linear scalarisation ----

def test_at_a_vertex_the_scores_are_the_optimum(close):
    scores, w, P = world()
    centred = scores - scores.mean(1, keepdim=True)
    for i, e in enumerate(torch.eye(3, dtype=torch.float64)):
        h = minimise(e, P, torch.zeros(2, 7, dtype=torch.float64))       # from zero: the front starts at the answer
        assert close(h - h.mean(1, keepdim=True), centred[..., i], 1e-8)
    J, h, residual = ls_front(torch.eye(3), scores, w)
    assert close(h.transpose(0, 1).transpose(1, 2), scores, 1e-12) and residual < 1e-12
    assert close(-J, torch.stack([w @ dpo_losses(scores[..., i], P) for i in range(3)]), 1e-12)


def test_two_responses_by_hand():
    scores, lam = torch.tensor([[[1.0, -2.0], [0.0, 0.0]]], dtype=torch.float64), torch.tensor([[0.25, 0.75]])
    p = 0.25 / (1 + math.exp(-1)) + 0.75 / (1 + math.exp(2))             # the mixed chance that the first is better
    J, h, _ = ls_front(lam, scores, torch.ones(1, dtype=torch.float64))
    assert (h[0, 0, 0] - h[0, 0, 1]).item() == pytest.approx(math.log(p / (1 - p)), rel=1e-10)
    assert (J @ lam[0].double()).item() == pytest.approx(p * math.log(p) + (1 - p) * math.log(1 - p), rel=1e-10)
    assert abs(math.log(p / (1 - p)) - (0.25 - 1.5)) > 0.1               # wrong: the weighted scores


def test_ls_front_is_the_minimum():
    scores, w, P = world()
    lams = simplex_lattice(3, 4)
    J, h, residual = ls_front(lams, scores, w)
    assert J.shape == (15, 3) and h.shape == (15, 2, 7) and residual < 1e-12
    for lam, j, h_lam in zip(lams, J, h):
        value = dpo_losses(h_lam, P) @ lam                               # (Q,): every problem has its own minimum
        assert (dpo_losses(near(h_lam), P) @ lam > value).all()
        assert -j @ lam == pytest.approx((w @ value).item(), rel=1e-12)
    assert (lams @ J.T <= (lams * J).sum(1)[:, None] + 1e-12).all()      # no other λ's solution is better for this λ


def test_minimise_raises_where_it_does_not_arrive():
    _, _, P = world()
    with pytest.raises(RuntimeError, match="gradient"):
        minimise(torch.eye(3, dtype=torch.float64)[0], P, torch.zeros(2, 7, dtype=torch.float64), tolerance=0.0)


# ---- Tchebycheff ----

CASES = [dict(m=2), dict(m=2, ideal=True), dict(m=3), dict(m=3, ideal=True)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tche_front_is_the_minimum(case):
    m = case["m"]
    scores, w, P = world(m=m)
    lams = torch.cat([simplex_lattice(m, 6), torch.tensor([[0.9, 0.1], [0.45, 0.55]] if m == 2 else [[0.3, 0.3, 0.4]])])
    J_ls, *_ = ls_front(simplex_lattice(m, 12), scores, w)
    own_best = -J_ls.max(0).values                                       # the least loss of every dimension
    z = 0.8 * own_best if case.get("ideal") else torch.zeros(m, dtype=torch.float64)
    J, h, gap = tche_front(lams, scores, w, ideal=z.tolist() if case.get("ideal") else None)
    assert gap < 1e-8 and J.shape == lams.shape and h.shape == (len(lams), 2, 7)
    value = lambda lam, losses: (lam * (losses - z)).amax(-1)
    balanced = 0
    for lam, j, h_lam in zip(lams, J, h):
        best, weighted = value(lam, -j), lam * (-j - z)
        assert torch.allclose(w @ dpo_losses(h_lam, P), -j, atol=1e-12)
        assert (value(lam, w @ dpo_losses(near(h_lam, size=1e-2), P)) >= best - 1e-9).all()
        assert (value(lam, -J_ls) >= best - 1e-9).all() and (value(lam, -J) >= best - 1e-9).all()
        active = weighted > best - 1e-7                                  # equal where more than one is active …
        balanced += active.sum() > 1
        if active.sum() == 1:                                            # … and one alone is as small as it can be
            assert (-j)[active].item() == pytest.approx(own_best[active].item(), abs=1e-6)
    assert balanced >= len(lams) / 3
    at_same_lam, *_ = ls_front(lams, scores, w)                          # wrong: linear scalarisation at the same λ
    assert (value(lams, -at_same_lam) > 1.02 * value(lams, -J)).any()


def test_tche_at_a_vertex_is_the_best_of_that_dimension(close):
    scores, w, _ = world()
    J, _, gap = tche_front(torch.eye(3), scores, w)
    best, *_ = ls_front(torch.eye(3), scores, w)
    assert close(J.diag(), best.diag(), 1e-8) and gap < 1e-8


def test_both_fronts_of_the_embedded_world():
    scores, w, _ = optimum.problems(toy.prompts("eval"), ["helpful", "harmless"])
    lams = torch.tensor([[0.0, 1.0], [0.4, 0.6], [0.6, 0.4]])
    J_ls, _, residual = ls_front(lams, scores, w)
    J, _, gap = tche_front(lams, scores, w)
    assert residual < 1e-12 and gap < 1e-8
    weighted = lams.double() * -J
    assert torch.allclose(weighted[1:, 0], weighted[1:, 1], atol=1e-7)   # both active, so both equal
    ls = lams.double() * -J_ls
    assert (ls[1:].amax(1) > weighted[1:].amax(1) + 0.01).all()         # which linear scalarisation's are not
    assert -J[0, 1] == pytest.approx(-J_ls[0, 1].item(), abs=1e-7)


# ---- problems and lattices ----

@pytest.mark.parametrize("dims", [["helpful", "harmless"], ["harmless", "concise", "warm"]])
def test_problems(dims):
    prompts = toy.prompts("eval")
    scores, w, index = optimum.problems(prompts, dims)
    assert w.sum().item() == pytest.approx(1, abs=1e-12)
    assert scores.shape == (len(w), 160, len(dims)) and len(w) < len(prompts)
    columns = [toy.DIMS.index(dim) for dim in dims]
    for x, q in zip(prompts, index):
        assert torch.equal(toy.scores(x, toy.responses(x))[:, columns], scores[q])
    assert torch.equal(index.bincount(minlength=len(w)) / len(prompts), w.float())
    assert len({tuple(s.flatten().tolist()) for s in scores}) == len(w)  # no problem twice


def test_label_probs_by_hand():
    P = label_probs(torch.tensor([[[2.0], [0.0]]], dtype=torch.float64))
    up = 1 / (1 + math.exp(-2))
    assert torch.allclose(P, torch.tensor([[[[0, up], [1 - up, 0]]]], dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("m, parts, count", [(2, 10, 11), (3, 10, 66), (4, 10, 286), (3, 5, 21)])
def test_lattice_equals_the_oracle(oracle, m, parts, count):
    integers = lambda points: {tuple(p) for p in (points * parts).round().long().tolist()}
    points = simplex_lattice(m, parts)
    assert points.shape == (count, m) and points.dtype == torch.float64 and count == math.comb(parts + m - 1, m - 1)
    assert len(integers(points)) == count and (points.sum(1) - 1).abs().max() < 1e-12 and points.min() == 0
    assert integers(points) == integers(oracle("pareto")[f"lattice_d{m}_p{parts}"])


def test_lattice_of_two_runs_from_one_end_to_the_other():
    assert simplex_lattice(2, 2).tolist() == [[0, 1], [0.5, 0.5], [1, 0]]
