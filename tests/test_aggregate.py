"""test_aggregate.py - scalarisations: values, gradients, vertices, symmetry; the distribution of preferences; the
min-norm weights of MGDA and PAMA against an oracle, by hand, by brute force and by the conditions of optimality."""

import pytest
import torch

from aggregate import (
    denominators,
    linear_scalarization,
    min_norm_weights,
    models_of,
    pama_advantages,
    pama_weights,
    sample_preference,
    scalar_reward,
    simplex_lattice,
    tchebycheff,
)
from objectives import noon

both = pytest.mark.parametrize("aggregate", [linear_scalarization, tchebycheff])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def value_and_gradient(aggregate, losses, lam, **more):
    losses = torch.tensor(losses, dtype=torch.float64, requires_grad=True)
    value = aggregate(losses, torch.tensor(lam, dtype=torch.float64), **more)
    return value.item(), torch.autograd.grad(value, losses)[0].tolist()


# ---- scalarisations ----

@pytest.mark.parametrize("lam, ls, tche, tche_gradient", [
    ((0.3, 0.7), 1.3, 0.7, (0, 0.7)),            # the largest WEIGHTED loss; unweighted arg-max: 0.6, (0.3, 0)
    ((0.5, 0.5), 1.5, 1.0, (0.5, 0)),
    ((1, 0), 2.0, 2.0, (1, 0)),
    ((0, 1), 1.0, 1.0, (0, 1)),                  # a zero weight is never active
])
def test_values_and_gradients_by_hand(lam, ls, tche, tche_gradient):
    value, gradient = value_and_gradient(linear_scalarization, (2, 1), lam)
    assert value == pytest.approx(ls, rel=1e-12) and gradient == pytest.approx(lam)
    value, gradient = value_and_gradient(tchebycheff, (2, 1), lam)
    assert value == pytest.approx(tche, rel=1e-12) and gradient == pytest.approx(tche_gradient)


def test_the_ideal_point_moves_the_maximum():
    # weighted losses (1, 0.5); less the ideal: 0.5·(2 - 1.8) = 0.1 and 0.5·(1 - 0.2) = 0.4
    value, gradient = value_and_gradient(tchebycheff, (2, 1), (0.5, 0.5), ideal=[1.8, 0.2])
    assert value == pytest.approx(0.4, rel=1e-12) and gradient == pytest.approx((0, 0.5))


def test_a_dimension_without_weight_is_never_the_maximum():
    """Also where the other terms are negative, as losses below the ideal are. Rules out: λ_i · L_i = 0 as the largest,
    which leaves no gradient; a NaN of 0 · ∞."""
    value, gradient = value_and_gradient(tchebycheff, (1, 1), (1, 0), ideal=[3, 0])
    assert value == -2 and gradient == [1, 0]
    value, gradient = value_and_gradient(tchebycheff, (1, 1, 9), (0.5, 0.5, 0), ideal=[2, 3, 0])
    assert value == -0.5 and gradient == [0.5, 0, 0]
    for nothing in (-1e9, -torch.inf, torch.inf):
        value, gradient = value_and_gradient(tchebycheff, (1, nothing), (1, 0), ideal=[3, 0])
        assert value == -2 and gradient == [1, 0]
    losses, lam = torch.full((5, 4, 2), -1.0), torch.tensor([0.0, 1.0])               # any leading dimensions, one λ
    assert (tchebycheff(losses, lam) == -1).all() and tchebycheff(losses.double(), lam.double()).dtype == torch.float64
    r, z = torch.tensor([[6.0, 1.0]]), torch.tensor([5.0, 4.0])          # a reward above its z
    assert scalar_reward(r, torch.tensor([[1.0, 0.0]]), "tche", z).tolist() == [1.0]


def test_equal_the_oracle(oracle, close):
    o = oracle("pareto")
    losses, lam = -o["scal_points"], o["scal_weights"]                   # the oracle maximises rewards
    assert close(-linear_scalarization(losses, lam), o["scal_weighted_sum"], 1e-12)
    assert close(tchebycheff(losses, lam, ideal=-o["scal_ideal"]), o["scal_tchebycheff"], 1e-12)
    assert close(tchebycheff(losses, lam, ideal=(-o["scal_ideal"]).tolist()), o["scal_tchebycheff"], 1e-12)
    unweighted = (losses + o["scal_ideal"]).argmax(-1, keepdim=True)     # wrong: arg-max first, weight after
    assert not close((lam * (losses + o["scal_ideal"])).gather(-1, unweighted)[:, 0], o["scal_tchebycheff"], 0.01)


@both
def test_gradients_against_finite_differences(aggregate):
    losses = torch.rand(4, 5, 3, generator=generator(), dtype=torch.float64).requires_grad_(True)
    lam = sample_preference(5, 3, generator=generator(1)).double()
    assert torch.autograd.gradcheck(lambda x: aggregate(x, lam), losses)
    assert aggregate(losses, lam).shape == (4, 5) and aggregate(losses, lam).min() > 0


@both
def test_permuting_objectives_and_lam_together_changes_nothing(aggregate, close):
    losses, lam = torch.rand(7, 4, generator=generator()), sample_preference(7, 4, generator=generator(1))
    order = [2, 0, 3, 1]
    assert close(aggregate(losses[:, order], lam[:, order]), aggregate(losses, lam), 1e-6)
    assert not close(aggregate(losses[:, order], lam), aggregate(losses, lam), 0.01)      # wrong: the losses alone


def test_tchebycheff_is_of_batch_means():
    pairs, lam = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0.5, 0.5])
    assert tchebycheff(pairs.mean(0), lam) == 0.25                       # wrong: a maximum for every pair has mean 0.5
    assert tchebycheff(pairs, lam).mean() == 0.5


def test_tchebycheff_of_rewards_is_the_papers(close):
    # RLHF: −max_i λ_i (z_i − r_i), with losses −r and the ideal loss −z; larger is better
    r, z, lam = torch.tensor([[1.0, 3.0], [4.0, 0.0]]), torch.tensor([5.0, 4.0]), torch.tensor([0.25, 0.75])
    value = -tchebycheff(-r, lam, ideal=-z)
    assert value.tolist() == [-1.0, -3.0]                                # max(¼·4, ¾·1) and max(¼·1, ¾·4)
    assert close(value, -(lam * (z - r)).amax(-1)) and not close(-tchebycheff(-r, lam), value, 0.01)
    assert not close(-tchebycheff(-r, lam, ideal=z), value, 0.01)        # wrong: the ideal's sign


# ---- preferences ----

@pytest.mark.parametrize("m", [2, 3, 10])
def test_preferences_lie_on_the_simplex(m):
    lam = sample_preference(1000, m, generator=generator())
    assert lam.shape == (1000, m) and lam.dtype == torch.float32
    assert (lam >= 0).all() and torch.allclose(lam.sum(1), torch.ones(1000), atol=1e-6)
    assert sample_preference(0, m).shape == (0, m)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_share_of_vertices(share):
    n, m = 40_000, 3
    vertex = sample_preference(n, m, vertex_share=share, generator=generator()) == 1
    assert abs(vertex.any(1).float().mean() - share) <= 5 * (share * (1 - share) / n) ** 0.5
    each = vertex.float().mean(0)                                        # and every vertex is as likely as the others
    assert (abs(each - share / m) <= 5 * (share / m * (1 - share / m) / n) ** 0.5).all()


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_dirichlet_moments(alpha):
    n, m = 400_000, 3
    variance = (1 / m) * (1 - 1 / m) / (m * alpha + 1)
    lam = sample_preference(n, m, alpha, vertex_share=0.0, generator=generator()).double()
    assert (abs(lam.mean(0) - 1 / m) < 5 * (variance / n) ** 0.5).all()
    assert (abs(lam.var(0) / variance - 1) < 0.01).all()
    uniform = torch.rand(n, m, generator=generator())                    # wrong: uniform numbers divided by their sum
    assert ((uniform / uniform.sum(1, keepdim=True)).var(0) < 0.8 * variance).all()


def test_preferences_come_from_the_generator_alone():
    draw = lambda seed: sample_preference(50, 3, generator=generator(seed))
    first = draw(1)
    torch.manual_seed(123)
    assert torch.equal(first, draw(1)) and not torch.equal(first, draw(2))
    g = generator(1)
    one, two = [sample_preference(50, 3, generator=g) for _ in range(2)]
    assert torch.equal(one, first) and not torch.equal(two, first)


# ---- the point of a convex hull nearest to 0 ----

CASES = ["random_m2", "corner_m2", "random_m3", "conflict_m3", "scaled_m4", "random_m5", "random_m10"]


def vectors(n, d, seed=0):
    return torch.randn(n, d, generator=generator(seed), dtype=torch.float64)


def assert_nearest(A, c):
    """c is on the simplex, and Σ c_i a_i = d is the hull's nearest point to 0: ⟨a_i, d⟩ ≥ ‖d‖² for every i."""
    nearest = c @ A
    assert c.dtype == torch.float64 and (c >= 0).all() and abs(c.sum() - 1) < 1e-12
    assert (A @ nearest - nearest @ nearest).min() >= -1e-12 * A.square().sum(1).max()


@pytest.mark.parametrize("case", CASES)
def test_min_norm_weights_equal_the_oracle(oracle, close, case):
    o = oracle("min_norm")
    A, expected = o[case + "_G"], o[case + "_alpha"]                     # the oracle calls the gradients G
    c = min_norm_weights(A @ A.T)
    assert close(c, expected, 1e-6) and close((c @ A).square().sum(), o[case + "_sqnorm"], 1e-9)
    assert_nearest(A, c)
    # wrong: equal weights; the shortest gradient alone; the minimum on the hyperplane Σ c = 1, then clipped
    assert not close(torch.full((len(A),), 1 / len(A)).double(), expected, 1e-4)         # wrong: equal weights
    shortest = torch.eye(len(A)).double()[A.square().sum(1).argmin()]    # wrong: the shortest gradient alone
    assert close(shortest, expected, 1e-4) == (case == "corner_m2")
    if case == "conflict_m3":                                            # wrong: solved without signs, then clipped
        free = torch.linalg.solve(A @ A.T, torch.ones(3).double()).clamp(min=0)
        assert not close(free / free.sum(), expected, 1e-4)


@pytest.mark.parametrize("a, b, first", [
    ((1, 0), (0, 1), 0.5), ((2, 0), (0, 1), 0.2),        # orthogonal: inversely to the squared lengths
    ((1, 0), (3, 0), 1.0), ((3, 1), (1, 0), 0.0),        # the shorter alone, where the other is longer along it
    ((1, 0), (-3, 0), 0.75),                             # opposite: they cancel
    ((1, 0.01), (1, -0.03), 0.75),                       # nearly equal: still to the axis
    ((2, 1), (2, 1), 0.5), ((0, 0), (0, 0), 0.5), ((0, 0), (1, 1), 1.0)])
def test_min_norm_of_two_by_hand(a, b, first):
    A = torch.tensor([a, b], dtype=torch.float64)
    assert min_norm_weights(A @ A.T).tolist() == pytest.approx([first, 1 - first], abs=1e-12)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_min_norm_weights_of_permuted_and_of_scaled_vectors(close, n):
    A, order = vectors(n, 20, seed=n) + 0.2, torch.randperm(n, generator=generator(n))
    c = min_norm_weights(A @ A.T)
    assert close(min_norm_weights(A[order] @ A[order].T), c[order], 1e-12)
    for scale in (1e-6, 1e6):
        assert close(min_norm_weights(scale ** 2 * (A @ A.T)), c, 1e-12)
    A[0] *= 10                                                           # one vector alone does change them
    assert not close(min_norm_weights(A @ A.T), c, 0.01)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 16, 32, 64])
def test_min_norm_weights_are_optimal(n):
    for d in (1, 2, n, 4 * n):                                           # d < n: 0 may lie inside the hull
        for seed in range(4):
            normal = vectors(n, d, seed)
            for A in (normal, normal + 1, normal.clamp(min=0)):  # in all directions, conflict-free, "no negative"
                assert_nearest(A, min_norm_weights(A @ A.T))
    A = vectors(n, 4 * n)
    for wrong in (torch.full((n,), 1 / n), torch.eye(n)[0]) if n > 1 else ():
        with pytest.raises(AssertionError):
            assert_nearest(A, wrong.double())


@pytest.mark.parametrize("n", [2, 3, 7, 16])
def test_min_norm_weights_of_degenerate_grams(n):
    A = vectors(n, 5)
    one_zero, rank_1 = A.clone(), torch.linspace(1, 2, n).double()[:, None] * A[:1]
    one_zero[n // 2] = 0
    crossing = torch.linspace(-1, 2, n).double()[:, None] * A[:1]        # on a line through 0, which is in the hull
    doubled = torch.cat([A, A])
    for B in (one_zero, rank_1, crossing, doubled, A[:1].expand(n, -1), torch.zeros(n, 5).double(), A * 1e-100):
        assert_nearest(B, min_norm_weights(B @ B.T))
    assert min_norm_weights(one_zero @ one_zero.T)[n // 2] == 1
    assert min_norm_weights(rank_1 @ rank_1.T)[0] == 1
    c = min_norm_weights(crossing @ crossing.T)
    assert (c @ crossing).norm() < 1e-7 * A[0].norm()
    c, alone = min_norm_weights(doubled @ doubled.T), min_norm_weights(A @ A.T)
    assert ((c[:n] + c[n:] - alone) @ A).norm() < 1e-7 * A.norm()        # a vector given twice shares its weight


# ---- PAMA ----

@pytest.mark.parametrize("A, c", [
    ((2, -1), (1 / 3, 2 / 3)), ((-1, 2), (2 / 3, 1 / 3)),                # mixed signs: to 0. wrong: weights swapped
    ((0.5, 2, 3), (1, 0, 0)), ((3, 2, 0.5), (0, 0, 1)),                  # all positive: the smallest
    ((-3, -1), (0, 1)), ((-1, -5, -3), (1, 0, 0)),                       # all negative: the largest
    ((0, 2), (1, 0)), ((-2, 0), (0, 1)), ((0, 0), (0.5, 0.5)), ((7, 7, 7, 7), (0.25,) * 4), ((4,), (1,))])
def test_theorem_1_by_hand(A, c):
    weights = pama_weights(torch.tensor(A, dtype=torch.float32))
    assert weights.dtype == torch.float64 and weights.tolist() == pytest.approx(c, abs=1e-12)


@pytest.mark.parametrize("n, parts", [(2, 1000), (3, 100)])
def test_pama_weights_beat_a_fine_grid(n, parts):
    grid = simplex_lattice(n, parts)                                     # (points, n)
    for seed in range(20):
        A = vectors(n, 1, seed)[:, 0] + (seed % 3 - 1)                   # scalars of all sign patterns
        best = (grid @ A).abs().min()
        reached = abs(pama_weights(A) @ A)
        assert reached <= best + 1e-12 and best - reached <= (A.max() - A.min()) / parts
        A = vectors(n, 6, seed).clamp(min=0)                             # vectors over 6 tokens
        norms = (grid @ A).norm(dim=1)
        c = pama_weights(A)
        assert (c @ A).norm() <= norms.min() + 1e-12 and (c - grid[norms.argmin()]).abs().max() <= 2 * n / parts


def test_pama_weights_of_vectors_by_hand(close):
    A = torch.tensor([[1.0, 0, 2], [0, 3, 1]])                           # Gram matrix (5, 2; 2, 10)
    c = pama_weights(A)
    assert c.tolist() == pytest.approx([8 / 11, 3 / 11])
    assert (c @ A.double()).tolist() == pytest.approx([8 / 11, 9 / 11, 19 / 11])
    # wrong: Theorem 1 for the means, which takes the first alone; weights of the normalised vectors
    assert pama_weights(A.mean(1)).tolist() == [1, 0]
    unit = A / A.norm(dim=1, keepdim=True)
    assert not close(pama_weights(unit), c, 0.05)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_one_token_is_theorem_1(close, n):
    for seed in range(12):
        A = vectors(n, 1, seed) + (seed % 3 - 1)
        assert abs((pama_weights(A) - pama_weights(A[:, 0])) @ A[:, 0]) < 1e-7           # the same s*
        if A.min() > 0 or A.max() < 0 or n == 2:                         # there the weights are unique
            assert close(pama_weights(A), pama_weights(A[:, 0]), 1e-9)


def test_with_noon_pama_improves_the_smallest_mean():
    advantages, ratio = torch.randn(6, 9, 5, generator=generator()), torch.ones(6, 9)
    means = noon(advantages, ratio).mean((0, 1))
    c = pama_weights(means)
    assert (means > 0).all() and c @ means.double() == means.min() and c.max() == 1      # s* = min_i A_i, one-hot
    means[3] = 0                                                         # nothing to gain on one: nothing is done
    assert pama_weights(means) @ means.double() == 0
    signed = advantages.mean((0, 1))                                     # wrong: without Noon the ends cancel to s* = 0
    assert signed.min() < 0 < signed.max() and abs(pama_weights(signed) @ signed.double()) < 1e-9


def test_pama_weights_take_no_gradient():
    A = vectors(3, 8).requires_grad_(True)
    assert not pama_weights(A).requires_grad and not pama_weights(A[:, 0]).requires_grad


def test_readings_of_pama_by_hand():
    A = torch.tensor([[[1.0, 0], [0, 3]], [[2, 1], [50, 50]]])           # tokens (1, 0), (0, 3), (2, 1), and padding
    mask = torch.tensor([[1.0, 1], [1, 0]])
    combined, c = pama_advantages(A, mask, "V")
    assert c.tolist() == pytest.approx([8 / 11, 3 / 11])                 # wrong: with padding in the Gram matrix
    assert combined.shape == (2, 2) and combined[mask.bool()].tolist() == pytest.approx([8 / 11, 9 / 11, 19 / 11])
    combined, c = pama_advantages(A, mask, "S")                          # means 1 and 4/3: all weight on the first
    assert c.tolist() == [1, 0] and combined[mask.bool()].tolist() == [1, 0, 2]
    combined, c = pama_advantages(A, mask, "T")
    assert c is None and combined[mask.bool()].tolist() == [0, 0, 1]
    # one row of two, and `total` adds what the other has: the weights are those of both
    others = {"V": [torch.tensor([[4.0, 2], [2, 1]])], "S": [torch.tensor([2.0, 1]), torch.tensor(1.0)]}
    for reading, weights in (("V", [8 / 11, 3 / 11]), ("S", [1, 0])):
        c = pama_advantages(A[:1], mask[:1], reading, lambda x: x + others[reading].pop(0))[1]
        assert c.tolist() == pytest.approx(weights) and not others[reading]
    assert pama_advantages(A[:1], mask[:1], "V")[1].tolist() == pytest.approx([0.9, 0.1])      # wrong: its own alone


# ---- from sums to means, one reward of several, and the models of a method ----

def test_denominators_by_hand():
    known = torch.tensor([[2.0, 0.0], [4.0, 6.0]])                       # labels under two preferences
    sums, lam = torch.tensor([[6.0, 0.0], [2.0, 9.0]]), torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    expected = torch.tensor([4.0, 1.5])                                  # of all data, under one preference
    counts, absent = denominators(known, expected, "ls")
    assert counts.tolist() == [[4, 1.5]] and absent == 0
    # every label of i weighs λ_i / (2 · expected_i), under whichever preference it is. wrong: the step's own count
    assert linear_scalarization(sums / counts + absent, lam).mean().item() == pytest.approx(
        (0.5 * 6 + 0.25 * 2) / 8 + 0.75 * 9 / 3)
    counts, absent = denominators(known, expected, "tche")
    L = sums / counts + absent
    assert L[0, 0] == 3 and L[1].tolist() == [0.5, 1.5]                  # means over each preference's own labels
    assert tchebycheff(L, lam).tolist() == [1.5, 1.125]                  # wrong: 0 / 0 where no label is
    below = torch.tensor([[-5.0, 0.0]])                                  # also where the other loss is negative
    assert tchebycheff(below + absent[:1], lam[:1]) == -2.5


def test_scalar_reward_by_hand():
    r, z, lam = torch.tensor([[1.0, 3.0], [4.0, 0.0]]), torch.tensor([5.0, 4.0]), torch.tensor([0.25, 0.75])
    assert scalar_reward(r, lam, "ls").tolist() == [2.5, 1.0]
    assert scalar_reward(r, lam, "tche", z).tolist() == [-1.0, -3.0]     # wrong: the ideal's sign, or a minimum of λ r
    both = torch.stack([lam, lam.flip(0)])                               # a λ for every response
    assert scalar_reward(r, both, "ls").tolist() == [2.5, 3.0]


def test_models_of_a_method():
    assert models_of("panacea", ["a", "b"], 2) == models_of("prompt", ["a", "b"], 2) == [("adapter", None)]
    soups = models_of("rs", ["a", "b"], 2)
    assert [(name, lam.tolist()) for name, lam in soups] == [("adapter-a", [1, 0]), ("adapter-b", [0, 1])]
    lattice = models_of("dps", ["a", "b"], 2)
    assert [(name, lam.tolist()) for name, lam in lattice] == [
        ("adapter-000", [0, 1]), ("adapter-001", [0.5, 0.5]), ("adapter-002", [1, 0])]
    ((name, lam),) = models_of("dps", ["a", "b"], 2, [0.25, 0.75])
    assert name == "adapter-000" and lam.tolist() == [0.25, 0.75]
