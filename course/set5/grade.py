"""grade.py - the tests of set 5. They compare with hand calculations, with stored numbers and with properties."""
import math

import pytest
import torch

from course.grading import brief, check, numbers, problem, raises, same

PROBLEMS = {    # problem: the functions of adapters.py that it asks for
    "min_norm_pair": ["min_norm_pair"], "min_norm_weights": ["min_norm_weights"], "mgda_backward": ["mgda_backward"],
    "noon": ["noon"], "pama_weights": ["pama_weights"], "pama_advantages": ["pama_advantages"]}


def t(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def on_simplex(what, c, m):
    """The student's weights in float64, checked for their shape, sign and sum."""
    check(isinstance(c, torch.Tensor), f"{what}: expected a tensor of {m} weights, got {type(c).__name__}. Does your "
          "function return its result?")
    check(c.shape == (m,), f"{what}: expected weights of the shape ({m},), got {tuple(c.shape)}")
    c = c.detach().double()
    check(bool(c.isfinite().all()), f"{what}: the weights {brief(c)} have NaN or infinite numbers among them")
    check(bool((c >= -1e-9).all()) and abs(c.sum() - 1) < 1e-6,
          f"{what}: expected weights that are not negative and sum to 1, got {brief(c)} with the sum {c.sum():.6g}")
    return c


def nearest(what, c, gram):
    """Fails unless the weights c fulfil condition (2) of the handout. Returns them in float64."""
    c = on_simplex(what, c, len(gram))
    along, own = gram @ c, c @ gram @ c
    j = int(along.argmin())
    check(along[j] >= own - 1e-9 * gram.diagonal().max(),
          f"{what}: expected that every vector reaches at least as far along d as d itself, condition (2). With your "
          f"weights {brief(c)}, ‖d‖² is {own:.6g}, and vector {j} reaches {along[j]:.6g}: there are shorter means")
    return c


# ---------------------------------------------------------------------------------------------------------------------
# min_norm_pair


@problem("min_norm_pair", 2)
def test_min_norm_pair_by_hand(adapters):
    same("a = (2, 0), b = (0, 1)", adapters.min_norm_pair(t(2, 0), t(0, 1)), [0.2, 0.8], looks_like={
        "the two weights have changed places": [0.8, 0.2], "lengths are taken instead of their squares": [1 / 3, 2 / 3],
        "the weights are equal": [0.5, 0.5]})
    same("a = (3, 1), b = (-1, 2)", adapters.min_norm_pair(t(3, 1), t(-1, 2)), [6 / 17, 11 / 17], looks_like={
        "the two weights have changed places": [11 / 17, 6 / 17],
        "the scalar product of a and b is left out": [1 / 3, 2 / 3],
        "the scalar product counts once in the denominator": [6 / 16, 10 / 16],
        "a wrong sign stands before the scalar product": [4 / 13, 9 / 13]})


@problem("min_norm_pair", 2)
@pytest.mark.parametrize("a, b, want, free", [((1, 0), (3, 1), [1, 0], [1.4, -0.4]),
                                              ((4, -3), (2, -1), [0, 1], [-0.75, 1.75]),
                                              ((1, 1), (2, 2), [1, 0], [2, -1])])
def test_min_norm_pair_at_an_end(adapters, a, b, want, free):
    """The nearest point of the line lies outside the segment."""
    same(f"a = {a}, b = {b}", adapters.min_norm_pair(t(*a), t(*b)), want, looks_like={
        "the weights are those of the whole line: one is negative": free,
        "the wrong end is taken": want[::-1],
        "0.999 and 0.001 are taken instead of 1 and 0": [0.001 + 0.998 * w for w in want],
        "weights are made positive, then divided by their sum": [abs(w) / sum(map(abs, free)) for w in free]})


@problem("min_norm_pair", 2)
@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e8])
def test_min_norm_pair_is_nearest(adapters, scale):
    """Pairs of vectors in seven dimensions, in every unit; also in the other order."""
    for start in range(6):
        a, b = scale * numbers(7, start=start), scale * (numbers(7, start=start + 0.5) + start / 4)
        c = nearest(f"two vectors of length around {a.norm():.1g}", adapters.min_norm_pair(a, b),
                    torch.stack([a, b]) @ torch.stack([a, b]).T)
        same("the two in the other order", adapters.min_norm_pair(b, a), c.flip(0))


@problem("min_norm_pair", 2)
def test_min_norm_pair_of_equal_vectors(adapters):
    same("a = b = (2, 1)", adapters.min_norm_pair(t(2, 1), t(2, 1)), [0.5, 0.5])
    same("a = b = (0, 0)", adapters.min_norm_pair(t(0, 0), t(0, 0)), [0.5, 0.5])
    same("a = (0, 0), b = (1, 1)", adapters.min_norm_pair(t(0, 0), t(1, 1)), [1, 0])
    same("a = (1, 0.01), b = (1, -0.03), which are nearly equal", adapters.min_norm_pair(t(1, 0.01), t(1, -0.03)),
         [0.75, 0.25], looks_like={"nearly equal vectors are taken for equal ones": [0.5, 0.5]})


# ---------------------------------------------------------------------------------------------------------------------
# min_norm_weights


@problem("min_norm_weights", 2)
def test_min_norm_weights_by_hand(adapters):
    same("orthogonal vectors of the squared lengths 1, 2, 4", adapters.min_norm_weights(torch.diag(t(1, 2, 4))),
         [4 / 7, 2 / 7, 1 / 7], looks_like={
             "the shortest vector alone is taken": [1, 0, 0], "the weights are equal": [1 / 3] * 3,
             "the longest has the largest weight": [1 / 7, 2 / 7, 4 / 7],
             "lengths are taken instead of their squares": t(2, 2 ** 0.5, 1) / (3 + 2 ** 0.5)})
    same("the vectors (2, 0, 0), (0, 1, 0), (2, 1, 1)", adapters.min_norm_weights(t([4, 0, 4], [0, 1, 1], [4, 1, 6])),
         [0.2, 0.8, 0], looks_like={
             "the signs are ignored: a weight is negative": [5 / 9, 8 / 9, -4 / 9],
             "negative weights are set to 0 in the end, and the rest divided by its sum": [5 / 13, 8 / 13, 0]})
    same("one vector", adapters.min_norm_weights(t([5])), [1])


@problem("min_norm_weights", 2)
def test_min_norm_weights_are_nearest(adapters):
    """m vectors with d coordinates: in all directions, in one half-space, and with zeros in them."""
    for m, d in ((2, 3), (3, 2), (3, 8), (4, 4), (5, 3), (5, 20), (6, 12)):
        x = numbers(m, d, start=m + d / 3)
        for kind, A in (("in all directions", x), ("that all point the same way, about", x + 0.8),
                        ("with no negative numbers", x.clamp(min=0))):
            gram = A @ A.T
            nearest(f"m = {m} vectors with {d} coordinates {kind}", adapters.min_norm_weights(gram), gram)


@problem("min_norm_weights", 2)
def test_min_norm_weights_of_singular_matrices(adapters):
    x = numbers(3, 5, start=2.0)
    apart = x.clone()
    apart[1] = 0
    for what, A in (("the first of three vectors twice", x[[0, 1, 2, 0]]), ("all vectors twice", x.repeat(2, 1)),
                    ("one vector, four times", x[:1].repeat(4, 1)), ("three zeros", torch.zeros_like(x)),
                    ("a zero between two vectors", apart), ("a vector and half of it", t([2, 4], [1, 2])),
                    ("four vectors on a line through 0", t([-1], [0.5], [2], [3]) * x[:1]),
                    ("six vectors in the plane", numbers(6, 2, start=5.0) + 0.3)):
        gram = A @ A.T
        c = nearest(what, adapters.min_norm_weights(gram), gram)
        if what == "a zero between two vectors":
            same(what, c, [0, 1, 0])


@problem("min_norm_weights", 2)
def test_min_norm_weights_of_many_vectors_in_any_unit(adapters):
    A = numbers(12, 40, start=3.0) + 0.2
    gram = A @ A.T
    c = nearest("m = 12", adapters.min_norm_weights(gram), gram)
    check((c > 0.01).sum() > 3, f"m = 12: several vectors should have weight, yours are {brief(c)}")
    order = torch.tensor([5, 2, 7, 0])
    part = adapters.min_norm_weights(gram[order][:, order])
    for scale in (1e-12, 1e12):
        same(f"a Gram matrix times {scale:g}, beside the matrix itself",
             adapters.min_norm_weights(scale * gram[order][:, order]), part)
    same("four vectors in another order", adapters.min_norm_weights(gram[order.flip(0)][:, order.flip(0)]),
         nearest("four vectors", part, gram[order][:, order]).flip(0))


@problem("min_norm_weights", 2)
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_min_norm_weights_refuses(adapters, wrong):
    for m in (2, 3):
        gram = torch.eye(m, dtype=torch.float64)
        gram[0, 1] = gram[1, 0] = wrong
        raises(ValueError, lambda: adapters.min_norm_weights(gram), f"a Gram matrix of {m} vectors with {wrong} in it")
    nearest("a Gram matrix that is finite", adapters.min_norm_weights(torch.eye(3).double()), torch.eye(3).double())


# ---------------------------------------------------------------------------------------------------------------------
# mgda_backward


def backward(adapters, losses, parameters):
    """(c, ‖d‖) of the student, checked for their kind; the parameters have a .grad that an earlier pass has left."""
    for p in parameters:
        p.grad = torch.full_like(p, 7.0)
    got = adapters.mgda_backward(losses, parameters)
    check(isinstance(got, tuple) and len(got) == 2, f"expected a tuple (c, norm), got {type(got).__name__}")
    return got


def leaf(*shape, start=0.0):
    """A parameter with these numbers."""
    return numbers(*shape, start=start).requires_grad_(True)


@problem("mgda_backward", 3)
def test_mgda_backward_by_hand(adapters):
    theta = t(5, 6).requires_grad_(True)
    c, norm = backward(adapters, [2 * theta[0], theta[1]], [theta])
    same("losses 2 θ_0 and θ_1: the weights", c, [0.2, 0.8], looks_like={
        "the two weights have changed places": [0.8, 0.2], "the weights are equal": [0.5, 0.5]})
    same("the same: .grad", theta.grad, [0.4, 0.8], looks_like={
        "the old gradient is still in it": [7.4, 7.8], "only the old gradient is there": [7, 7],
        "the gradients are added without weights": [2, 1],
        "the weights are equal": [1, 0.5], "the sign is turned: the optimizer does that": [-0.4, -0.8],
        "it is divided by its length": [0.2 ** 0.5, 0.8 ** 0.5],
        "nothing but the last loss's gradient is there": [0, 1]})
    same("the same: ‖d‖", norm, 0.8 ** 0.5, looks_like={
        "the square is not taken out of the root": 0.8, "the lengths of the gradients are weighted": 1.2,
        "it is the length of the plain sum": 5 ** 0.5, "it is the length of the mean": 1.25 ** 0.5})


@problem("mgda_backward", 3)
def test_mgda_backward_has_one_c_for_all_parameters(adapters):
    """Two parameters of different shapes and a forward pass that the losses share; each loss uses both."""
    a, b = leaf(2, 3, start=1.0), leaf(3, start=2.0)
    hidden = (a @ b.tanh()).square()                                                  # shared by the three losses
    losses = [hidden.sum() + b.sum(), (2 * hidden[0] - b[1]).exp(), (a * numbers(2, 3, start=4.0)).sum() - hidden[1]]
    c, norm = backward(adapters, losses, [a, b])
    same("three losses of two parameters: the weights", c, MGDA_C, looks_like={
        "the weights are those of the first parameter alone": MGDA_FIRST_C,
        "the weights are those of the last parameter alone": MGDA_LAST_C,
        "gradients are divided by their lengths first": MGDA_UNIT_C, "the weights are equal": [1 / 3] * 3})
    same("the same: .grad of the first parameter", a.grad, MGDA_GRAD_A, looks_like={
        "the old gradient is still in it": MGDA_GRAD_A + 7})
    same("the same: .grad of the second parameter", b.grad, MGDA_GRAD_B, looks_like={
        "the old gradient is still in it": MGDA_GRAD_B + 7})
    same("the same: ‖d‖, of both parameters together", norm, torch.cat([MGDA_GRAD_A.flatten(), MGDA_GRAD_B]).norm())
    check(isinstance(norm, torch.Tensor) and not (norm.requires_grad or c.requires_grad),
          "c and ‖d‖ should be tensors and detached")


@problem("mgda_backward", 3)
def test_mgda_backward_where_a_parameter_is_not_in_every_loss(adapters):
    """Multi-task learning: a shared parameter and one for each loss, in float32."""
    shared, one, two, idle = (leaf(2, start=s).detach().float().requires_grad_(True) for s in (1.0, 2.0, 3.0, 4.0))
    c, norm = backward(adapters, [(shared * t(3, 0).float()).sum() + one[0], 2 * two[1] - shared[1]],
                       [shared, one, two, idle])
    same("gradients of the squared lengths 10 and 5: the weights", c, [1 / 3, 2 / 3])
    same("the same: ‖d‖", norm, (10 / 3) ** 0.5)
    for name, p, want in (("the shared parameter", shared, [1, -2 / 3]), ("the first loss's own", one, [1 / 3, 0]),
                          ("the second loss's own", two, [0, 4 / 3])):
        check(p.grad is not None and p.grad.dtype == p.dtype, f".grad of {name}: expected float32 numbers, got "
              f"{None if p.grad is None else p.grad.dtype}")
        same(f".grad of {name}", p.grad, want)
    check(idle.grad is None or not idle.grad.any(), "a parameter that is in no loss should have no gradient, or zeros; "
          f"it has {None if idle.grad is None else brief(idle.grad)}")


@problem("mgda_backward", 3)
def test_mgda_backward_is_the_distance_to_the_pareto_set(adapters):
    """L_i = ½ ‖θ − p_i‖²: the Pareto-stationary points are the triangle of the p_i."""
    corners = t([0, 0, 0], [4, 0, 0], [0, 4, 0])
    for at, want, grad in (((1, 1, 2), 2.0, [0, 0, 2]), ((5, -3, 0), 10 ** 0.5, [1, -3, 0]),
                           ((3, 3, 1), 3 ** 0.5, [1, 1, 1]), ((1, 2, 0), 0.0, [0, 0, 0])):
        theta = t(*at).requires_grad_(True)
        c, norm = backward(adapters, [0.5 * (theta - p).square().sum() for p in corners], [theta])
        same(f"θ = {at}, the triangle (0, 0, 0), (4, 0, 0), (0, 4, 0): ‖d‖ is the distance", norm, want,
             looks_like={"the square is not taken out of the root": want ** 2})
        same(f"θ = {at}: .grad leads from the triangle's nearest point to θ", theta.grad, grad)
        on_simplex(f"θ = {at}: the weights", c, 3)


MGDA_C = t(0.37766145, 0.04301693, 0.57932162)
MGDA_FIRST_C = t(0.61625756, 0.00000000, 0.38374244)
MGDA_LAST_C = t(0.17350850, 0.00000000, 0.82649150)
MGDA_UNIT_C = t(0.44730582, 0.07611102, 0.47658316)
MGDA_GRAD_A = t(-0.10939019, -0.55356980, 0.43063399, -0.18193083, -0.14873698, -0.71069861).view(2, 3)
MGDA_GRAD_B = t(0.54565219, 0.58824207, 0.22917506)

# ---------------------------------------------------------------------------------------------------------------------
# noon


@problem("noon", 2)
def test_noon_by_hand(adapters):
    got = adapters.noon(t([[2, -1], [3, 0.5]], [[-4, 2], [1, 5]]), t([1, 1.1], [0.5, 1.3]), 0.2)
    want = t([[2, 0], [3, 0.5]], [[0, 2], [0, 0]])
    same("two responses of two tokens, ratios 1, 1.1 and 0.5, 1.3, ε = 0.2", got, want, looks_like={
        "negative advantages are kept": t([[2, -1], [3, 0.5]], [[-4, 2], [0, 0]]),
        "the ratio plays no part": t([[2, 0], [3, 0.5]], [[0, 2], [1, 5]]),
        "ratios below 1 − ε are dropped too": t([[2, 0], [3, 0.5]], [[0, 0], [0, 0]]),
        "ratios below 1 − ε are dropped, and those above 1 + ε are not": t([[2, 0], [3, 0.5]], [[0, 0], [1, 5]]),
        "ratios above 1 + ε are kept and others dropped": t([[0, 0], [0, 0]], [[0, 0], [1, 5]]),
        "the sign is lost: absolute values": t([[2, 1], [3, 0.5]], [[4, 2], [0, 0]]),
        "the advantage is multiplied by the ratio": t([[2, 0], [3.3, 0.55]], [[0, 1], [0, 0]]),
        "the clipped ratio is multiplied, and nothing dropped": t([[2, 0], [3.3, 0.55]], [[0, 1.6], [1.2, 6]]),
        "a token counts only if it is good for all objectives": t([[0, 0], [3, 0.5]], [[0, 0], [0, 0]])})


@problem("noon", 2)
def test_noon_one_mask(adapters):
    """Which tokens are dropped depends on the ratio alone, for every objective in the same way, and on one side."""
    ratio = t([0.1, 0.79, 1.0, 1.2], [1.21, 1.25, 1.31, 4.0])
    A = numbers(2, 4, 3, start=2.0).abs() + 0.1
    for epsilon, kept in ((0.2, [4, 0]), (0.3, [4, 2]), (0.05, [3, 0])):
        got = adapters.noon(A, ratio, epsilon)
        want = A * (torch.arange(4) < torch.tensor(kept)[:, None])[..., None]
        same(f"ratios {brief(ratio.flatten())} 4, ε = {epsilon}, positive advantages", got, want, looks_like={
            "ratios below 1 − ε are dropped too": A * ((ratio - 1).abs() <= epsilon)[..., None],
            "ratios above 1 + ε are kept and others dropped": A - want,
            "a ratio of exactly 1 + ε is dropped": A * (ratio < 1 + epsilon)[..., None],
            "ε of 0.2 is taken whatever is asked for": A * (ratio <= 1.2)[..., None]})


@problem("noon", 2)
def test_noon_leaves_its_arguments_alone(adapters):
    A, ratio = numbers(3, 5, 2, start=1.0), 1 + 0.5 * numbers(3, 5, start=4.0)
    kept, r = A.clone(), ratio.clone()
    got = adapters.noon(A, ratio, 0.25)
    check(torch.equal(A, kept) and torch.equal(ratio, r), "the arguments have changed: they are needed again")
    same("three responses of five tokens, two objectives, ε = 0.25", got, NOON)
    same("twice the advantages", adapters.noon(2 * A, ratio, 0.25), 2 * NOON)


NOON = t(0.84147098, 0.74570521, 0.00000000, 0.13323204, 0.18998668, 0.87114000, 0.00000000, 0.95611609, 0.58347552,
         0.00000000, 0.00000000, 0.93922552, 0.00000000, 0.00000000, 0.00000000, 0.00000000, 0.71118241, 0.00000000,
         0.00000000, 0.00000000, 0.00000000, 0.00000000, 0.95212806, 0.00000000, 0.86273016, 0.17164310, 0.15344833,
         0.00000000, 0.00000000, 0.00000000).view(3, 5, 2)

# ---------------------------------------------------------------------------------------------------------------------
# pama_weights


@problem("pama_weights", 2)
def test_pama_weights_of_both_signs(adapters):
    for A, want in ((t(2, -1), [1 / 3, 2 / 3]), (t(-1, 4), [0.8, 0.2]), (t(-0.5, 0.5), [0.5, 0.5])):
        same(f"A = {A.tolist()}", adapters.pama_weights(A), want, looks_like={
            "the two weights have changed places": want[::-1], "the weights are equal": [0.5, 0.5],
            "all weight is on the smallest": (A == A.min()).double(),
            "all weight is on the largest": (A == A.max()).double()})


@problem("pama_weights", 2)
def test_pama_weights_of_one_sign(adapters):
    for A, want, free in (([0.5, 2, 3], [1, 0, 0], [1.2, 0, -0.2]), ([3, 2, 0.5], [0, 0, 1], [-0.2, 0, 1.2]),
                          ([-3, -1], [0, 1], [-0.5, 1.5]), ([-1, -5, -3], [1, 0, 0], [1.25, -0.25, 0]),
                          ([0, 2], [1, 0], [1, 0]), ([-2, 0], [0, 1], [0, 1]), ([7], [1], [1]),
                          ([1e-9, 3e-9], [1, 0], [1.5, -0.5])):
        A = t(A)[0]
        same(f"A = {A.tolist()}", adapters.pama_weights(A), want, looks_like={
            "the weights are not clipped: one is negative": free,
            "the objective with the largest absolute value is taken": (A.abs() == A.abs().max()).double(),
            "the weights are equal": torch.full_like(A, 1 / len(A)),
            "all weight is on the smallest, whatever the signs": (A == A.min()).double(),
            "all weight is on the largest, whatever the signs": (A == A.max()).double()})


@problem("pama_weights", 2)
def test_pama_weights_of_many_numbers(adapters):
    """Both signs, m > 2: many c are right, and all of them give a sum of 0."""
    for A in (t(2, -1, 0.5), t(-3, 1, -2, 5), numbers(9, start=1.0), 1e-6 * numbers(5, start=3.0), t(4, -4, 0, 1)):
        c = on_simplex(f"A = {brief(A)}", adapters.pama_weights(A), len(A))
        check(abs(c @ A) <= 1e-9 * A.abs().max(), f"A = {brief(A)} has both signs: expected Σ c_i A_i = 0, got "
              f"{c @ A:.6g} with the weights {brief(c)}")


@problem("pama_weights", 2)
def test_pama_weights_of_equal_numbers(adapters):
    for A in (t(7, 7, 7, 7), t(0, 0), t(-2, -2, -2)):
        same(f"A = {A.tolist()}: equal weights", adapters.pama_weights(A), [1 / len(A)] * len(A))


# ---------------------------------------------------------------------------------------------------------------------
# pama_advantages

# tokens (1, 0), (0, 3) of the first response, (2, 1) of the second; (50, 50) and (9, 0) are padding
HAND, HAND_MASK = t([[1, 0], [0, 3], [9, 0]], [[2, 1], [50, 50], [50, 50]]), t([1, 1, 0], [1, 0, 0])


def combined(adapters, advantages, mask, reading):
    """(the advantages of the tokens under the mask, c) of the student, checked for their kind."""
    got = adapters.pama_advantages(advantages, mask, reading)
    check(isinstance(got, tuple) and len(got) == 2, f"reading {reading}: expected a tuple (advantages, c), got "
          f"{type(got).__name__}")
    A, c = got
    check(isinstance(A, torch.Tensor) and A.shape == mask.shape, f"reading {reading}: expected advantages of the shape "
          f"{tuple(mask.shape)}, got {tuple(A.shape) if isinstance(A, torch.Tensor) else type(A).__name__}")
    check((c is None) == (reading == "T"), f"reading {reading}: expected c to be "
          + ("None: every token has its own" if reading == "T" else "a tensor, got None"))
    return A[mask.bool()], c


@problem("pama_advantages", 2)
def test_pama_advantages_vector(adapters):
    A, c = combined(adapters, HAND, HAND_MASK, "V")
    same("V, three tokens: c", c, [8 / 11, 3 / 11], looks_like={
        "the two weights have changed places": [3 / 11, 8 / 11], "padding counts": [8 / 92, 84 / 92],
        "means, or a response's sums, are taken first": [1, 0],
        "the vectors are divided by their lengths first": [0.5, 0.5]})
    same("V, three tokens: their advantages", A, [8 / 11, 9 / 11, 19 / 11], looks_like={
        "each token has its smallest advantage (that is T)": [0, 0, 1],
        "the weights are equal": [0.5, 1.5, 1.5]})


@problem("pama_advantages", 2)
def test_pama_advantages_token(adapters):
    A, _ = combined(adapters, HAND, HAND_MASK, "T")
    same("T, three tokens: their advantages", A, [0, 0, 1], looks_like={
        "each token has its largest advantage": [1, 3, 2], "each token has its mean advantage": [0.5, 1.5, 1.5],
        "one c is used for all tokens": [8 / 11, 9 / 11, 19 / 11]})
    many = numbers(3, 4, 3, start=6.0).abs()
    A, _ = combined(adapters, many, torch.ones(3, 4, dtype=torch.float64), "T")
    same("T, twelve tokens of three objectives", A, PAMA_T)


@problem("pama_advantages", 2)
def test_pama_advantages_scalar(adapters):
    A, c = combined(adapters, HAND, HAND_MASK, "S")
    same("S, three tokens: c", c, [1, 0], looks_like={
        "the larger mean has the weight, or padding counts": [0, 1],
        "the weights are equal, or the mean is one of the responses' own means": [0.5, 0.5],
        "the norm of the vector is made small (that is V)": [8 / 11, 3 / 11]})
    same("S, three tokens: their advantages", A, [1, 0, 2], looks_like={
        "all tokens have the mean as their advantage": [1, 1, 1], "the larger mean has the weight": [0, 3, 1]})
    same("S, one response with the advantages (2, 0.75), (0, 0.75), (0, 0.75): c",
         combined(adapters, t([[2, 0.75], [0, 0.75], [0, 0.75]]), t([1, 1, 1]), "S")[1], [1, 0], looks_like={
             "lengths are compared, and not means": [0, 1]})
    # objective 0 has the larger mean over tokens (13/5 to 12/5), the smaller one over responses' means (2 to 2.25)
    long = t([[3, 2.5], [3, 2.5], [3, 2.5], [3, 2.5]], [[1, 2], [0, 5], [0, 5], [0, 5]])
    mask = t([1, 1, 1, 1], [1, 0, 0, 0])
    A, c = combined(adapters, long, mask, "S")
    same("S, a response of four tokens and one of one: c", c, [0, 1], looks_like={
        "the mean is one of the responses' own means": [1, 0], "padding counts in the mean": [1, 0]})
    same("S, their advantages", A, [2.5, 2.5, 2.5, 2.5, 2])


@problem("pama_advantages", 2)
def test_pama_advantages_of_three_objectives(adapters):
    """V: no other mean is shorter; and padding has no influence, in every reading."""
    A, mask = numbers(4, 3, 3, start=9.0).clamp(min=0), t([1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1])
    vectors = A[mask.bool()].T                                                        # (m, tokens)
    got, c = combined(adapters, A, mask, "V")
    c = nearest("V, nine tokens of three objectives", c, vectors @ vectors.T)
    same("V: the advantages beside Σ c_i A_i", got, c @ vectors)
    scaled, d = combined(adapters, A * t(10, 1, 1), mask, "V")
    nearest("V, the first objective times 10", d, vectors @ vectors.T * t(10, 1, 1) * t(10, 1, 1)[:, None])
    other = A + 100 * (1 - mask)[..., None] * t(1, 2, 3)
    for reading in "VTS":
        got, c = combined(adapters, A, mask, reading)
        then, d = combined(adapters, other, mask, reading)
        same(f"{reading}: the advantages, with other numbers at padding", then, got)
        if c is not None:
            same(f"{reading}: c, with other numbers at padding", d, on_simplex(f"{reading}: c", c, 3))


PAMA_T = t(0.27941550, 0.71797459, 0.55216738, 0.06277668, 0.04779154, 0.04867866, 0.05657067, 0.55800224, 0.72961797,
           0.25459488, 0.86459689, 0.54018816)
