"""test_aggregate.py - scalarisations: values, gradients, vertices, symmetry; and the distribution of preferences."""
import pytest
import torch

from aggregate import linear_scalarization, sample_preference, tchebycheff

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
