"""test_optimum.py - the exact DPO front: its losses, Newton's solutions, the Tchebycheff dual, problems and lattices;
the best scores within a KL budget."""
import math

import pytest
import torch

from aggregate import simplex_lattice
from data import toy
from fronts import optimum
from fronts.optimum import (
    best_at_kl,
    dpo_losses,
    dpo_ls,
    dpo_tche,
    most_scores,
    newton,
    problems,
    rlhf_closed_form,
    rlhf_objectives,
    win_probs,
)
from objectives import dpo_loss


def world(Q=2, S=7, m=3, seed=0):
    """Random scores (Q, S, m), weights (Q,) and wins (Q, m, S), small enough for a hundred solves."""
    g = torch.Generator().manual_seed(seed)
    scores = 1.5 * torch.randn(Q, S, m, generator=g, dtype=torch.float64)
    w = torch.rand(Q, generator=g, dtype=torch.float64) + 0.5
    return scores, w / w.sum(), win_probs(scores).sum(-1)


def world_scores(dims):
    """Scores of the embedded world's evaluation prompts: (X, S, m)"""
    return torch.stack([toy.scores(x, toy.responses(x), dims) for x in toy.prompts("new_verbs")])


def near(h, n=50, size=1e-3, seed=1):
    """n random neighbours of h."""
    return h + size * torch.randn(n, *h.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the losses ----

def test_losses_are_the_expectation_of_dpo_loss(close):
    scores, _, wins = world()
    h, beta = torch.randn(2, 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64), 0.3
    expected = torch.zeros(2, 3, dtype=torch.float64)
    pairs = [(a, b) for a in range(7) for b in range(a)]
    for a, b in pairs:                                                   # every pair, every label, its probability
        for better, worse in ((a, b), (b, a)):
            loss = dpo_loss(h[:, better] / beta, h[:, worse] / beta, 0 * h[:, 0], 0 * h[:, 0], beta)[0]
            expected += torch.sigmoid(scores[:, better] - scores[:, worse]) * loss[:, None] / len(pairs)
    assert close(dpo_losses(h, wins), expected, 1e-12)
    assert close(dpo_losses(torch.stack([h, 0 * h]), wins)[0], expected, 1e-12)     # leading dimensions pass through
    assert close(dpo_losses(0 * h, wins), math.log(2) * torch.ones(2, 3, dtype=torch.float64), 1e-12)
    assert close(dpo_losses(h + 3, wins), expected, 1e-12)                  # a constant does not matter


def test_derivatives(close):
    _, _, wins = world()
    h = torch.randn(2, 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda h: dpo_losses(h, wins), h)
    E, R = optimum._exponentials(h.detach() + 3)                         # a constant does not matter
    grads, hessian = optimum._gradients(E, R, wins) / 21, optimum._hessian(E, R) / 21           # 7 · 6 / 2 pairs
    assert close(optimum._losses(h, wins, -R.log().sum((-2, -1))), dpo_losses(h, wins), 1e-12)
    for q in range(2):
        for i in range(3):
            loss = lambda x: dpo_losses(x[None], wins[q:q + 1])[0, i]
            assert close(grads[q, i], torch.autograd.functional.jacobian(loss, h[q]), 1e-10)
            flat = hessian[q] - hessian[q].mean()                        # less the constant that fixes h's constant
            assert close(flat, torch.autograd.functional.hessian(loss, h[q]), 1e-10)      # the same for every i
    torch.linalg.cholesky(hessian)                                       # positive definite


def slowly(loss, *shape):
    """The least loss that LBFGS finds from zero, and where."""
    h = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([h], max_iter=1000, tolerance_grad=1e-11, tolerance_change=0,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(h)
        value.backward()
        return value

    optimizer.step(closure)
    return loss(h).item(), (h - h.mean(-1, keepdim=True)).detach()


# ---- linear scalarisation ----

def test_at_a_vertex_the_scores_are_the_optimum(close):
    scores, w, wins = world()
    centred = scores - scores.mean(1, keepdim=True)
    for i, e in enumerate(torch.eye(3, dtype=torch.float64)):
        h = newton(torch.einsum("m,qms->qs", e, wins), torch.zeros(2, 7, dtype=torch.float64))
        assert close(h - h.mean(1, keepdim=True), centred[..., i], 1e-8)
    J, h, residual = dpo_ls(torch.eye(3), scores, w)
    assert close(h.transpose(0, 1).transpose(1, 2), scores, 1e-12) and residual < 1e-12
    assert close(-J, torch.stack([w @ dpo_losses(scores[..., i], wins) for i in range(3)]), 1e-12)


def test_two_responses_by_hand():
    scores, lam = torch.tensor([[[1.0, -2.0], [0.0, 0.0]]], dtype=torch.float64), torch.tensor([[0.25, 0.75]])
    p = 0.25 / (1 + math.exp(-1)) + 0.75 / (1 + math.exp(2))             # the mixed chance that the first is better
    J, h, _ = dpo_ls(lam, scores, torch.ones(1, dtype=torch.float64))
    assert (h[0, 0, 0] - h[0, 0, 1]).item() == pytest.approx(math.log(p / (1 - p)), rel=1e-10)
    assert (J @ lam[0].double()).item() == pytest.approx(p * math.log(p) + (1 - p) * math.log(1 - p), rel=1e-10)
    assert abs(math.log(p / (1 - p)) - (0.25 - 1.5)) > 0.1               # wrong: the weighted scores


def test_ls_front_is_the_minimum():
    scores, w, wins = world()
    lams = simplex_lattice(3, 4)
    J, h, residual = dpo_ls(lams, scores, w)
    assert J.shape == (15, 3) and h.shape == (15, 2, 7) and residual < 1e-12
    for lam, j, h_lam in zip(lams, J, h):
        value = dpo_losses(h_lam, wins) @ lam                               # (Q,): every problem has its own minimum
        assert (dpo_losses(near(h_lam), wins) @ lam > value).all()
        assert -j @ lam == pytest.approx((w @ value).item(), rel=1e-12)
    assert (lams @ J.T <= (lams * J).sum(1)[:, None] + 1e-12).all()      # no other λ's solution is better for this λ


def test_a_slow_solver_finds_the_same_front(close):
    """LBFGS on the definition; for Tchebycheff on smooth maxima, which lie above the maximum by less and less."""
    scores, w, wins = world(m=4)
    lams = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.55, 0.15, 0.3, 0.0]], dtype=torch.float64)
    J, h, _ = dpo_ls(lams, scores, w)
    for n, lam in enumerate(lams):
        value, where = slowly(lambda h: w @ dpo_losses(h, wins) @ lam, 2, 7)
        assert value == pytest.approx(-(J[n] @ lam).item(), abs=1e-11)
        assert close(where, h[n] - h[n].mean(-1, keepdim=True), 1e-5)
    from_zero = newton(torch.einsum("fm,qms->fqs", lams, wins), 0 * h)                 # leading dimensions pass through
    assert close(from_zero, h - h.mean(-1, keepdim=True), 1e-6)
    z = torch.tensor([0.1, 0.3, 0.2, 0.0], dtype=torch.float64)
    J, _, _ = dpo_tche(lams, scores, w, z)
    for n, lam in enumerate(lams):
        best = (lam * (-J[n] - z)).amax().item()
        for mu in (3e-2, 3e-3):
            value, _ = slowly(lambda h: mu * (lam * (w @ dpo_losses(h, wins) - z) / mu).logsumexp(-1), 2, 7)
            assert best - 1e-10 <= value <= best + mu * math.log(4)


def plain_newton(lams, wins):
    """The optimum at every preference as a textbook has it: from zero, with sigmoids of all pairs and fresh Hessians,
    one problem after the other. lams: (F, m)   wins: (Q, m, S)   ->  h (F, Q, S), its means zero"""
    S, hs = wins.shape[-1], []
    for labels in torch.einsum("fm,qms->fqs", lams, wins).flatten(0, 1):
        h = torch.zeros(S, dtype=torch.float64)
        for _ in range(40):
            p = torch.sigmoid(h[:, None] - h)
            curve = p * p.T
            grad = p.sum(1) - 0.5 - labels
            step = torch.linalg.solve(torch.diag(curve.sum(1)) - curve + 1 / S, grad)           # 1/S: fixes a constant
            h = h - step / max(1, step.abs().max().item() / 4)
        hs.append(h)
    return torch.stack(hs).view(len(lams), len(wins), S)


@pytest.mark.parametrize("kind, m, parts", [("embedded", 2, 10), ("embedded", 3, 4),
                                            ("random", 2, 10), ("sharp", 3, 4)])
def test_plain_newton_finds_the_same_front(monkeypatch, kind, m, parts):
    scores, w, _ = problems(world_scores(["helpful", "harmless", "humorous"][:m]))
    if kind != "embedded":                                               # no equal rows, no slots
        scores, w, _ = world(Q=3, S=40, m=m)
        scores = scores * (3 if kind == "sharp" else 1)
    lams, wins = simplex_lattice(m, parts), win_probs(scores).sum(-1)
    expected = -torch.einsum("q,fqm->fm", w, dpo_losses(plain_newton(lams, wins), wins))
    J, h, residual = dpo_ls(lams, scores, w)
    assert residual < 1e-12 and (J - expected).abs().max() < 1e-9
    assert (J + torch.einsum("q,fqm->fm", w, dpo_losses(h, wins))).abs().max() < 1e-11         # J is that of h
    backwards = dpo_ls(lams.flip(0), scores, w)[0].flip(0)               # the way there does not matter
    assert (backwards - expected).abs().max() < 1e-9
    monkeypatch.setattr(optimum, "newton", lambda wins, h: h)            # wrong: the guess alone, whose weights are r's
    J, _, residual = dpo_ls(lams, scores, w)
    assert residual > 1e-6 and (J - expected).abs().max() > 1e-3


def test_neighbours_foretell_the_optimum(monkeypatch):
    """On a lattice nearly every solution takes one Hessian. From the weighted scores alone they take several."""
    scores, w, _ = problems(world_scores(["helpful", "harmless"]))
    lams, hessian, seen = simplex_lattice(2, 100), optimum._hessian, []
    monkeypatch.setattr(optimum, "_hessian", lambda E, R: seen.append(len(E)) or hessian(E, R))
    J, h, _ = dpo_ls(lams, scores, w)
    assert sum(seen) < 1.2 * len(lams) * len(w)
    others, lam, own = torch.arange(101) != 50, lams[50], h[50]
    off = lambda guess: (guess - own).abs().max()
    assert off(optimum._near(lam, lams[others], h[others], scores)) < 1e-4 * off(scores @ lam)
    assert optimum._near(lam, lams[:0], [], scores).equal(scores @ lam)                        # nothing is known yet
    assert torch.allclose(optimum._near(lam, lams[50:51].expand(2, 2), h[[50, 50]], scores), own, atol=1e-8)
    seen.clear()
    monkeypatch.setattr(optimum, "_near", lambda c, known, hs, scores: scores @ c)             # wrong: nothing learned
    again, *_ = dpo_ls(lams, scores, w)
    assert sum(seen) > 2 * len(lams) * len(w) and (J - again).abs().max() < 1e-10


def test_single_precision_preferences_do_not_stall_newton(close):
    scores, w, _ = world()
    lam = torch.full((1, 3), 1 / 3) * (1 + 1e-6)
    J, _, residual = dpo_ls(lam, scores, w)
    assert residual < 1e-12 and close(J, dpo_ls(torch.full((1, 3), 1 / 3, dtype=torch.float64), scores, w)[0], 1e-7)


def test_newton_raises_where_it_does_not_arrive(monkeypatch):
    _, _, wins = world()
    monkeypatch.setattr(optimum, "NEWTON_STEPS", 1)
    with pytest.raises(RuntimeError, match="gradient"):
        newton(wins[:, 0], torch.zeros(2, 7, dtype=torch.float64))


# ---- Tchebycheff ----

CASES = [dict(m=2), dict(m=2, ideal=True), dict(m=3), dict(m=3, ideal=True)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tche_front_is_the_minimum(case):
    m = case["m"]
    scores, w, wins = world(m=m)
    lams = torch.cat([simplex_lattice(m, 6), torch.tensor([[0.9, 0.1], [0.45, 0.55]] if m == 2 else [[0.3, 0.3, 0.4]])])
    J_ls, *_ = dpo_ls(simplex_lattice(m, 12), scores, w)
    own_best = -J_ls.max(0).values                                       # the least loss of every dimension
    z = 0.8 * own_best if case.get("ideal") else torch.zeros(m, dtype=torch.float64)
    J, h, gap = dpo_tche(lams, scores, w, z.tolist())
    assert gap < 1e-8 and J.shape == lams.shape and h.shape == (len(lams), 2, 7)
    value = lambda lam, losses: (lam * (losses - z)).amax(-1)
    balanced = 0
    for lam, j, h_lam in zip(lams, J, h):
        best, weighted = value(lam, -j), lam * (-j - z)
        assert torch.allclose(w @ dpo_losses(h_lam, wins), -j, atol=1e-12)
        assert (value(lam, w @ dpo_losses(near(h_lam, size=1e-2), wins)) >= best - 1e-9).all()
        assert (value(lam, -J_ls) >= best - 1e-9).all() and (value(lam, -J) >= best - 1e-9).all()
        active = weighted > best - 1e-7                                  # equal where more than one is active …
        balanced += active.sum() > 1
        if active.sum() == 1:                                            # … and one alone is as small as it can be
            assert (-j)[active].item() == pytest.approx(own_best[active].item(), abs=1e-6)
    assert balanced >= len(lams) / 3
    at_same_lam, *_ = dpo_ls(lams, scores, w)                          # wrong: linear scalarisation at the same λ
    assert (value(lams, -at_same_lam) > 1.02 * value(lams, -J)).any()


def test_tche_at_a_vertex_is_the_best_of_that_dimension(close):
    scores, w, _ = world()
    J, _, gap = dpo_tche(torch.eye(3), scores, w, [0] * 3)
    best, *_ = dpo_ls(torch.eye(3), scores, w)
    assert close(J.diag(), best.diag(), 1e-8) and gap < 1e-8


def test_both_fronts_of_the_embedded_world():
    scores, w, _ = problems(world_scores(["helpful", "harmless"]))
    lams = torch.tensor([[0.0, 1.0], [0.4, 0.6], [0.6, 0.4]])
    J_ls, _, residual = dpo_ls(lams, scores, w)
    J, _, gap = dpo_tche(lams, scores, w, [0.0] * lams.shape[1])
    assert residual < 1e-12 and gap < 1e-8
    weighted = lams.double() * -J
    assert torch.allclose(weighted[1:, 0], weighted[1:, 1], atol=1e-7)   # both active, so both equal
    ls = lams.double() * -J_ls
    assert (ls[1:].amax(1) > weighted[1:].amax(1) + 0.01).all()         # which linear scalarisation's are not
    assert -J[0, 1] == pytest.approx(-J_ls[0, 1].item(), abs=1e-7)


def test_a_dimension_without_preference_takes_no_part(close):
    scores, w, _ = world(m=4)
    z = torch.tensor([0.6, 0.1, 0.6, 0.2], dtype=torch.float64)          # above what dimensions 0 and 2 reach
    J, _, gap = dpo_tche(torch.tensor([[0.3, 0.0, 0.7, 0.0]]), scores, w, z)
    few, _, _ = dpo_tche(torch.tensor([[0.3, 0.7]]), scores[..., [0, 2]], w, z[[0, 2]])
    assert gap < 1e-9 and close(J[0, [0, 2]], few[0], 1e-7)


def test_equal_dimensions():
    scores, w, _ = world()
    twice = torch.cat([scores, scores[..., :2]], dim=-1)
    J, _, gap = dpo_tche(torch.tensor([[0.2, 0.2, 0.2, 0.2, 0.2], [0.1, 0.2, 0.3, 0.3, 0.1]]), twice, w, [0] * 5)
    assert gap < 1e-9 and torch.allclose(J[:, :2], J[:, 3:], atol=1e-12)


@pytest.mark.parametrize("m, rank", [(2, 1), (5, 2), (6, 6), (10, 4)])
def test_the_quadratic_on_the_simplex(m, rank):
    """The conditions for a maximum: no weight would gain more than those held, whatever the start."""
    g = torch.Generator().manual_seed(m)
    supports = set()
    for trial in range(20):
        B = torch.randn(m, rank, generator=g, dtype=torch.float64)
        A = -B @ B.T * 10.0 ** (trial % 5) - 1e-9 * torch.eye(m, dtype=torch.float64)
        b = torch.randn(m, generator=g, dtype=torch.float64)
        found = []
        for start in (torch.full((m,), 1 / m, dtype=torch.float64), torch.eye(m, dtype=torch.float64)[trial % m]):
            y = optimum._quadratic_on_simplex(b, A, start)
            gradient = b + A @ y
            assert y.min() >= 0 and abs(y.sum() - 1) < 1e-12
            assert gradient.max() - gradient[y > 0].min() < 1e-7
            found.append((b @ y + y @ A @ y / 2).item())
            supports.add(tuple((y > 0).tolist()))
        assert found[0] == pytest.approx(found[1], rel=1e-9, abs=1e-9)
    assert len(supports) > 2 or m == 2                                   # vertices, faces and the inside occur


def test_all_ten_dimensions():
    """The embedded world on all its dimensions: vertices, the centre, between them, and one face, for both fronts."""
    scores, w, _ = problems(world_scores(toy.DIMS))
    centre, eye = torch.full((1, 10), 0.1, dtype=torch.float64), torch.eye(10, dtype=torch.float64)
    face = torch.tensor([[0.2, 0, 0.1, 0, 0.3, 0, 0, 0.25, 0, 0.15]], dtype=torch.float64)
    lams = torch.cat([eye[:2], (eye[:3] + centre) / 2, centre, face])
    J_ls, h, residual = dpo_ls(lams, scores, w)
    J, _, gap = dpo_tche(lams, scores, w, [0.0] * lams.shape[1])
    assert residual < 1e-12 and gap < 1e-8 and h.shape == (len(lams), len(w), 160)
    assert ((lams @ J_ls.T).amax(1) <= (lams * J_ls).sum(1) + 1e-12).all()           # no other is better for this λ
    value = lambda lam, J: (lam * -J).amax(-1)
    for lam, j in zip(lams, J):
        assert (value(lam, torch.cat([J, J_ls])) >= value(lam, j) - 1e-9).all()
    assert torch.allclose(J[:2].diagonal(), J_ls[:2].diagonal(), atol=1e-8)
    assert ((lams * -J)[5] > value(lams[5], J[5]) - 1e-7).sum() > 1      # several hold each other at the centre


# ---- the best scores within a KL budget ----

def kl_problem(X=3, S=7, m=3, seed=0):
    """Random scores (X, S, m) and log π_ref (X, S). The prompts differ in how much there is to gain."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(X, S, m, generator=g, dtype=torch.float64) * torch.tensor([0.5, 1.0, 3.0])[:X, None, None]
    return scores, torch.randn(X, S, generator=g, dtype=torch.float64).log_softmax(-1)


def test_score_front_meets_its_budgets_and_rises_with_them(close):
    scores, ref = kl_problem()
    lams, budgets = simplex_lattice(3, 3), [0, 1e-4, 0.02, 0.1, 0.3, 1.0, 50.0, None]
    r, kl, beta = most_scores(lams, scores, ref, budgets)
    assert r.shape == (8, 10, 3) and kl.shape == beta.shape == (8, 10)
    value = torch.einsum("knm,nm->kn", r, lams)
    assert (value.diff(dim=0) >= -1e-12).all() and (value[:6].diff(dim=0) > 1e-3).all()
    assert (beta.diff(dim=0) <= 0).all()
    for k in (1, 2, 3, 4):                                               # within the attainable: spent to the last nat
        assert (kl[k] - budgets[k]).abs().max() < 1e-9 and (kl[k] <= budgets[k]).all()
    assert close(r[0], (ref.exp()[..., None] * scores).sum(1).mean(0).expand(10, 3), 1e-12)
    assert kl[0].max() == 0 and beta[0].min() == math.inf                # no budget: the reference
    highest = torch.einsum("nm,xsm->nxs", lams, scores).amax(-1).mean(-1)
    for k in (6, 7):                                                     # more than the maximum needs: the maximum
        assert torch.allclose(value[k], highest, atol=1e-7) and (kl[k] < 50).all()
    assert torch.equal(most_scores(lams, scores, ref, [math.inf])[0][0], r[7])


def test_score_front_is_the_rlhf_optimum_at_its_beta(close):
    scores, ref = kl_problem()
    lams = simplex_lattice(3, 3)
    r, kl, beta = most_scores(lams, scores, ref, [0.2])
    for n, lam in enumerate(lams):
        J, logps = rlhf_closed_form(lam[None], scores, ref, beta[0, n].item())
        free, spent = rlhf_objectives(logps, ref, scores, 0.0)
        assert close(r[0, n], free[0], 1e-9) and spent.item() == pytest.approx(0.2, abs=1e-6)


def test_no_policy_scores_higher_within_the_budget():
    scores, ref = kl_problem()
    lams, budget = simplex_lattice(3, 3), 0.2
    r, _, beta = most_scores(lams, scores, ref, [budget])
    best = (lams * r[0]).sum(1)
    optima = torch.stack([rlhf_closed_form(lam[None], scores, ref, b.item())[1][0] for lam, b in zip(lams, beta[0])])
    g = torch.Generator().manual_seed(5)
    within = 0
    for size in (1e-3, 0.1, 1.0):
        others = (optima + size * torch.randn(200, *optima.shape, generator=g, dtype=torch.float64)).log_softmax(-1)
        reached, spent = rlhf_objectives(others, ref, scores, 0.0)       # (200, N, m), (200, N)
        ok = spent <= budget
        within += ok.sum()
        assert ((reached * lams).sum(-1) <= best + 1e-12)[ok].all()
        # and whatever they spend, best_at_kl knows a policy that is better
        flat = best_at_kl(lams.repeat(20, 1), spent[:20].flatten(), scores, ref)
        assert (flat > (reached[:20] * lams).sum(-1).flatten()).all()
    assert within > 500
    # wrong: the same budget for every prompt
    alone = torch.stack([most_scores(lams, scores[x:x + 1], ref[x:x + 1], [budget])[0][0] for x in range(3)]).mean(0)
    assert ((alone * lams).sum(1) < best - 0.03).all()


def test_few_preferences_at_once(monkeypatch):
    scores, ref = kl_problem()
    lams, budgets = simplex_lattice(3, 3), [0.1, 1.0, None]
    whole = most_scores(lams, scores, ref, budgets), best_at_kl(lams, [0.3] * 10, scores, ref)
    monkeypatch.setattr(optimum, "AT_ONCE", 4 * ref.numel())             # 4, 4 and 2 preferences
    for a, b in zip(whole[0], most_scores(lams, scores, ref, budgets)):
        assert torch.allclose(a, b, rtol=1e-9, atol=0)
    assert torch.allclose(whole[1], best_at_kl(lams, [0.3] * 10, scores, ref))


def test_best_at_kl(close):
    scores, ref = kl_problem()
    lams, kls = simplex_lattice(3, 3)[:4], torch.tensor([0.0, 0.05, 0.5, 1e3])
    r, _, _ = most_scores(lams, scores, ref, kls.tolist())
    assert close(best_at_kl(lams, kls, scores, ref), (r.diagonal().T * lams).sum(1), 1e-12)
    assert best_at_kl(lams.float(), kls.tolist(), scores, ref).dtype == torch.float64
    flat = torch.ones(3, 7, 3, dtype=torch.float64)                      # nothing to gain, nothing to spend
    r, kl, _ = most_scores(lams, flat, ref, [0, 1.0, None])
    assert torch.allclose(r, torch.ones_like(r)) and kl.abs().max() == 0


# ---- problems and lattices ----

@pytest.mark.parametrize("dims, distinct", [(["helpful", "harmless"], 120), (["harmless", "concise", "warm"], 104)])
def test_problems(dims, distinct):
    prompts = toy.prompts("train")                                       # some tasks there want the same
    scores, w, index = problems(torch.stack([toy.scores(x, toy.responses(x), dims) for x in prompts]))
    assert w.sum().item() == pytest.approx(1, abs=1e-12)
    assert scores.shape == (len(w), 160, len(dims)) and len(w) == distinct < len(prompts) == 160
    for x, q in zip(prompts, index):
        assert torch.equal(toy.scores(x, toy.responses(x), dims), scores[q])
    assert torch.allclose(index.bincount(minlength=len(w)) / len(prompts), w.float())
    assert len({tuple(s.flatten().tolist()) for s in scores}) == len(w)  # no problem twice


def test_win_probs_by_hand():
    win_prob = win_probs(torch.tensor([[[2.0], [0.0]]], dtype=torch.float64))
    up = 1 / (1 + math.exp(-2))
    assert torch.allclose(win_prob, torch.tensor([[[[0, up], [1 - up, 0]]]], dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("m, parts, count", [(2, 10, 11), (3, 10, 66), (4, 10, 286), (3, 5, 21)])
def test_lattice_equals_the_oracle(oracle, m, parts, count):
    integers = lambda points: {tuple(p) for p in (points * parts).round().long().tolist()}
    points = simplex_lattice(m, parts)
    assert points.shape == (count, m) and points.dtype == torch.float64 and count == math.comb(parts + m - 1, m - 1)
    assert len(integers(points)) == count and (points.sum(1) - 1).abs().max() < 1e-12 and points.min() == 0
    assert integers(points) == integers(oracle("pareto")[f"lattice_d{m}_p{parts}"])


def test_lattice_of_two_runs_from_one_end_to_the_other():
    assert simplex_lattice(2, 2).tolist() == [[0, 1], [0.5, 0.5], [1, 0]]
