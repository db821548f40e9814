"""grade.py - the tests of set 3. They compare with hand calculations, with stored numbers and with properties."""
import math

import pytest
import torch

from course.grading import check, numbers, problem, same, slope
from data import toy

PROBLEMS = {    # problem: the functions of adapters.py that it asks for
    "nondominated": ["nondominated"], "hypervolume_2d": ["hypervolume_2d"], "hypervolume": ["hypervolume"],
    "everything_counts": ["rlhf_objectives"], "tilt": ["rlhf_optimum"], "exact_losses": ["exact_losses"],
    "derivatives": ["derivatives"], "newton": ["dpo_optimum"], "tchebycheff_point": ["tche_optimum"],
    "regret": ["regret"]}


def t(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def win(gap):
    """How often the better one of two responses is labelled so, where their scores differ by `gap`."""
    return 1 / (1 + math.exp(-gap))


# ---------------------------------------------------------------------------------------------------------------------
# nondominated

STAIRS = t([2, 4], [0, 5], [6, 1], [1, 5], [4, 1], [4, 3], [2, 3], [4, 2])            # 0, 2, 3, 5 are the front


def mask(adapters, points):
    """The student's answer, checked for its kind: numbers that index instead of a mask pass unseen otherwise."""
    got = adapters.nondominated(points.clone())
    check(isinstance(got, torch.Tensor) and got.dtype == torch.bool and got.shape == (len(points),),
          f"expected a bool tensor of shape ({len(points)},), got "
          f"{(str(got.dtype), tuple(got.shape)) if isinstance(got, torch.Tensor) else type(got).__name__}")
    return got


@problem("nondominated", 2)
def test_nondominated_by_hand(adapters):
    same("which of (2, 4) (0, 5) (6, 1) (1, 5) (4, 1) (4, 3) (2, 3) (4, 2) are kept", mask(adapters, STAIRS),
         [1, 0, 1, 1, 0, 1, 0, 0], looks_like={
             "a point dominates only if it is better in every dimension: (1, 5) dominates (0, 5)": [1] * 8,
             "smaller is better": [0, 1, 0, 0, 1, 0, 1, 0], "the dominated points are marked": [0, 1, 0, 0, 1, 0, 1, 1],
             "a point dominates as soon as it is better in one dimension": [0] * 8})
    same("one point alone", mask(adapters, t([3, 3])), [1])


@problem("nondominated", 2)
def test_nondominated_equal_points(adapters):
    """Equal points do not dominate each other: all of them are kept, or all are not."""
    same("which of (1, 5) (2, 4) (2, 3) (1, 5) (2, 3) are kept",
         mask(adapters, t([1, 5], [2, 4], [2, 3], [1, 5], [2, 3])), [1, 1, 0, 1, 0], looks_like={
             "equal points dominate each other": [0, 1, 0, 0, 0], "one of two equal points is kept": [1, 1, 0, 0, 0],
             "the later one of two equal points is kept": [0, 1, 0, 1, 0]})
    same("three equal points", mask(adapters, t([2, 2, 1], [2, 2, 1], [2, 2, 1])), [1, 1, 1])


@problem("nondominated", 2)
def test_nondominated_many_dimensions(adapters):
    """30 points with small whole numbers as coordinates, many of them equal, in three and in four dimensions."""
    for m, want in FRONTS.items():
        points = (4 * numbers(30, m, start=float(m))).round()
        got = mask(adapters, points)
        same(f"which of 30 points in {m} dimensions are kept", got,
             torch.zeros(30).index_fill(0, torch.tensor(want), 1.0))
        same("the same points in reverse order", mask(adapters, points.flip(0)).flip(0), got)


FRONTS = {3: [3, 4, 5, 6, 13, 15, 16, 22, 23], 4: [3, 4, 6, 8, 10, 11, 15, 17, 18, 19, 22, 25, 28]}

# ---------------------------------------------------------------------------------------------------------------------
# hypervolume_2d and hypervolume

FRONT = t([4, 3], [1, 5], [6, 1], [2, 4])
USELESS = t([2, 3], [4, 3], [-1, 9], [7, -2], [0, 8], [3, 0])         # dominated, equal, or not above (0, 0)


@problem("hypervolume_2d", 2)
def test_hypervolume_2d_by_hand(adapters):
    same("(4, 3) (1, 5) (6, 1) (2, 4) above (0, 0)", adapters.hypervolume_2d(FRONT, t(0, 0)), 17.0, looks_like={
        "the boxes are added, and their overlaps count twice": 31.0, "the box around all points is taken": 30.0,
        "the steps are taken on the wrong side of the points": 9.0, "points are joined by straight lines": 15.5,
        "the largest box alone counts": 12.0})
    same("the same above (-1, -2)", adapters.hypervolume_2d(FRONT, t(-1, -2)), 36.0, looks_like={
        "the reference is left out": 17.0, "the two coordinates of the reference have changed places": 35.0})


@problem("hypervolume_2d", 2)
def test_hypervolume_2d_useless_points(adapters):
    """Points that are dominated, or equal, or not above the reference in both dimensions, add nothing."""
    same("with six points that add nothing", adapters.hypervolume_2d(torch.cat([USELESS, FRONT]), t(0, 0)), 17.0)
    for p in USELESS:
        same(f"with ({p[0]:g}, {p[1]:g}), which adds nothing", adapters.hypervolume_2d(torch.cat([FRONT, p[None]]),
                                                                                       t(0, 0)), 17.0)
    same("none above (6, 6)", adapters.hypervolume_2d(FRONT, t(6, 6)), 0.0)
    same("(2, 3) twice", adapters.hypervolume_2d(t([2, 3], [2, 3]), t(1, 1)), 2.0)


@problem("hypervolume", 2)
def test_hypervolume_by_hand(adapters):
    same("(2, 2, 1) and (1, 1, 3) above (0, 0, 0)", adapters.hypervolume(t([2, 2, 1], [1, 1, 3]), t(0, 0, 0)), 6.0,
         looks_like={"the boxes are added, and their overlap counts twice": 7.0,
                     "the box around all points is taken": 12.0, "the largest box alone counts": 4.0,
                     "the overlap is taken off twice": 5.0, "the overlap alone counts": 1.0})
    same("the same above (-1, 0, -2)", adapters.hypervolume(t([2, 2, 1], [1, 1, 3]), t(-1, 0, -2)), 22.0, looks_like={
        "the reference is left out": 6.0})
    same("m = 1: 3, 5 and 4 above 1", adapters.hypervolume(t([3], [5], [4]), t(1)), 4.0)
    same("m = 2: the staircase", adapters.hypervolume(FRONT, t(0, 0)), 17.0)


@problem("hypervolume", 2)
@pytest.mark.parametrize("m, F", [(3, 12), (4, 10), (5, 8)])
def test_hypervolume_of_many_points(adapters, m, F):
    same(f"{F} points in {m} dimensions", adapters.hypervolume(*many(m, F)), VOLUMES[m])


def many(m, F):
    """F points with equal coordinates among them, some of which are not above the reference."""
    return (4 * numbers(F, m, start=float(m))).round(), torch.full((m,), -2.5, dtype=torch.float64)


@problem("hypervolume", 2)
def test_hypervolume_useless_points(adapters):
    points, reference = t([2, 2, 1], [1, 1, 3]), t(0, 0, 0)
    for p in ([2, 1, 1], [1, 1, 3], [9, 9, 0], [-4, 5, 5], [5, -4, -4]):
        same(f"the two points and {tuple(p)}, which adds nothing",
             adapters.hypervolume(torch.cat([points, t(p)]), reference), 6.0)
    same("none above (3, 0, 0)", adapters.hypervolume(points, t(3, 0, 0)), 0.0)


@problem("hypervolume", 2)
def test_hypervolume_symmetries(adapters):
    """Dimensions in another order change nothing; one more dimension, equal for all, multiplies; shifts are free."""
    points, reference = many(3, 9)
    volume = adapters.hypervolume(points, reference)
    check(float(volume) > 1, f"nine points, most of them above the reference: got {float(volume):g}")
    same("the dimensions in another order", adapters.hypervolume(points[:, [2, 0, 1]], reference), volume)
    same("points and reference shifted by 10", adapters.hypervolume(points + 10, reference + 10), volume)
    for at in (0, 3):
        thick = lambda x, value, at=at: torch.cat([x[..., :at], torch.full_like(x[..., :1], value), x[..., at:]], -1)
        same(f"one more dimension as number {at}, from -1 to 2 for all points",
             adapters.hypervolume(thick(points, 2.0), thick(reference, -1.0)), 3 * float(volume))


VOLUMES = {3: 168.875, 4: 95.0625, 5: 79.21875}

# ---------------------------------------------------------------------------------------------------------------------
# everything_counts and tilt

# one prompt, two responses, two dimensions: π says something else with 0.25, π_ref with 0.5
PI, REF = t([0.5, 0.25]).log(), t([0.125, 0.375]).log()
TWO = t([2, 0], [1, 4])[None]                                                         # (X, S, m)


def policies(X, S, start, *outside):
    """Log-probabilities (X, S) with this outside mass: one number, or one for each prompt."""
    x = 2 * numbers(X, S, start=start)
    return x - x.logsumexp(1, keepdim=True) + (1 - t(*outside)).log()[:, None]


@problem("everything_counts", 2)
def test_everything_counts_by_hand(adapters):
    J = lambda scores, kl, beta=0.5: [scores[0] - beta * kl, scores[1] - beta * kl]
    listed = 0.5 * math.log(4) + 0.25 * math.log(2 / 3)
    kl, alone = listed + 0.25 * math.log(1 / 2), 2 / 3 * math.log(8 / 3) + 1 / 3 * math.log(4 / 9)
    same("one prompt, two responses, outside mass 0.25", adapters.rlhf_objectives(PI, REF, TWO, -6.0, 0.5),
         J((-0.25, -0.5), kl), looks_like={
             "other texts have no score": J((1.25, 1.0), kl), "other texts have no score and no KL":
             J((1.25, 1.0), listed), "other texts are left out of KL": J((-0.25, -0.5), listed),
             "probabilities are divided by their sum over the listed responses": J((5 / 3, 4 / 3), alone),
             "KL is taken from π_ref to π": J((-0.25, -0.5), 0.125 * math.log(1 / 4) + 0.375 * math.log(3 / 2)
                                             + 0.5 * math.log(2)),
             "KL is added": J((-0.25, -0.5), -kl), "β is left out": J((-0.25, -0.5), kl, 1.0),
             "KL is left out": [-0.25, -0.5], "KL is divided by β": J((-0.25, -0.5), kl, 2.0),
             "the base model's scores are taken": J((-2.375, -1.5), kl)})


@problem("everything_counts", 2)
def test_everything_counts_without_outside_mass(adapters):
    """Probabilities that sum to 1 but for rounding, and β = 0: plain mean scores."""
    ref, scores, worst = policies(3, 40, 2.0, 0.02), numbers(3, 40, 2, start=3.0), 0.0
    for start in range(8):
        got = adapters.rlhf_objectives(policies(3, 40, float(start), 0.0), ref, scores, -6.0, 0.5)
        check(isinstance(got, torch.Tensor) and got.shape == (2,), "expected a tensor of shape (2,)")
        check(bool(got.isfinite().all()), "the listed responses' probabilities sum to 1 but for rounding, so that the "
              f"rest is 0 or ±1e-16: got {got.tolist()}")
        worst = max(worst, (got - WITHOUT[start]).abs().max().item())
    check(worst < 1e-6, f"policies without outside mass: J is off by {worst:.3g}")


@problem("everything_counts", 1)
def test_everything_counts_over_prompts(adapters):
    """The mean over prompts; and at π = π_ref there is no KL."""
    pi, ref = policies(3, 5, 1.0, 0.1, 0.2, 0.05), policies(3, 5, 2.0, 0.02, 0.01, 0.03)
    scores = numbers(3, 5, 3, start=3.0)
    each = [adapters.rlhf_objectives(pi[x:x + 1], ref[x:x + 1], scores[x:x + 1], -6.0, 0.5) for x in range(3)]
    got = adapters.rlhf_objectives(pi, ref, scores, -6.0, 0.5)
    check(all(isinstance(x, torch.Tensor) and x.shape == (3,) for x in [got, *each]), "expected a tensor of shape (3,)")
    same("three prompts together, beside the mean of three calls", got, torch.stack(each).mean(0), looks_like={
        "the prompts are summed": torch.stack(each).sum(0)})
    same("three prompts", got, OVER_PROMPTS)
    same("π = π_ref, at two β", adapters.rlhf_objectives(ref, ref, scores, -6.0, 5.0)
         - adapters.rlhf_objectives(ref, ref, scores, -6.0, 0.5) + 1, [1, 1, 1])


@problem("everything_counts", 1)
def test_everything_counts_price_of_the_outside(adapters):
    """With β = 0, one percent of mass that leaves the list costs a hundredth of (mean score − outside score)."""
    inside, leaky = (policies(2, 6, 1.0, outside) for outside in (0.01, 0.02))
    scores, ref = torch.ones(2, 6, 1, dtype=torch.float64), policies(2, 6, 4.0, 0.02)
    price = (adapters.rlhf_objectives(inside, ref, scores, -6.0, 0.0)
             - adapters.rlhf_objectives(leaky, ref, scores, -6.0, 0.0))
    same("all listed responses have the score 1, other texts -6: what one percent of outside mass costs", price, [0.07],
         looks_like={"other texts have no score": [0.01], "what is said besides is forgiven": [0.0]})


@problem("tilt", 1)
def test_tilt_by_hand(adapters):
    """β = 0.5, λ = (0.25, 0.75): the first response's odds are multiplied by 4, those of other texts by 1/4."""
    ln2 = math.log(2)
    scores = t([4 * ln2 - 3 * ln2, ln2], [0, 0])[None]                                # λ·r = ln 2 and 0
    got = adapters.rlhf_optimum(t(0.25, 0.75), t([0.25, 0.25]).log(), scores, -ln2, 0.5)
    parts = t(0.25 * 4, 0.25, 0.5 / 4)
    log = lambda parts: (parts / parts.sum())[None, :2].log()
    same("π_ref = (0.25, 0.25), odds times 4 and 1, and 1/4 for other texts", got, log(parts), looks_like={
        "Z is the sum over the listed responses alone": log(parts[:2]),
        "nothing is divided by Z": parts[None, :2].log(), "probabilities are returned, not their logarithms":
        log(parts).exp(), "β multiplies instead of dividing": log(t(0.25 * 2 ** 0.5, 0.25, 0.5 * 2 ** -0.5)),
        "β is left out": log(t(0.5, 0.25, 0.25)), "π_ref is left out": log(t(4, 1, 0.25)),
        "other texts are not tilted": log(t(1, 0.25, 0.5)), "the sign of the scores is wrong":
        log(t(0.25 / 4, 0.25, 0.5 * 4))})


@problem("tilt", 1)
def test_tilt_uses_lambda(adapters):
    ref, scores = policies(1, 5, 2.0, 0.02), 2 * numbers(1, 5, 2, start=3.0)
    for lam, want in TILTED.items():
        same(f"five responses, λ = {lam}", adapters.rlhf_optimum(t(*lam), ref, scores, -6.0, 0.5), [want])


@problem("tilt", 1)
def test_tilt_over_prompts(adapters):
    """Every prompt has its own Z."""
    ref, scores, lam = policies(3, 5, 2.0, 0.1, 0.2, 0.3), numbers(3, 5, 2, start=3.0), t(0.3, 0.7)
    got = adapters.rlhf_optimum(lam, ref, scores, -1.0, 0.7)
    alone = torch.cat([adapters.rlhf_optimum(lam, ref[x:x + 1], scores[x:x + 1], -1.0, 0.7) for x in range(3)])
    same("three prompts together, beside each of them alone", got, alone)
    same("their outside mass", 1 - got.exp().sum(1), OUTSIDE_MASS)


@problem("tilt", 1)
def test_tilt_at_the_ends_of_beta(adapters):
    ref, scores = policies(2, 5, 2.0, 0.1), 4 * numbers(2, 5, 2, start=5.0)
    same("β = 1e9: the base model", adapters.rlhf_optimum(t(0.5, 0.5), ref, scores, -6.0, 1e9), ref)
    cold = adapters.rlhf_optimum(t(0.5, 0.5), ref, scores, -6.0, 0.001)
    check(isinstance(cold, torch.Tensor) and cold.shape == (2, 5), "expected a tensor of shape (2, 5)")
    check(bool(cold.isfinite().all()), f"β = 0.001: expected finite log-probabilities, got {cold[0].tolist()}")
    same("β = 0.001: the probabilities, all on the response with the largest λ·r", cold.exp(),
         torch.nn.functional.one_hot(scores.mean(2).argmax(1), 5))


WITHOUT = t(-0.88767899, -0.92672756, -0.31327806, -0.48967487, -0.15893716, -0.28592181, -0.48198828,
            -0.34559400, -1.07813043, -0.98157970, -1.46741690, -1.44347444, -1.07627181, -1.04369023,
            -0.44250371, -0.60608888).view(8, 2)
OVER_PROMPTS, OUTSIDE_MASS = t(-1.06425518, -1.45173228, -0.83437244), t(0.04782999, 0.03052004, 0.05524079)
TILTED = {(1.0, 0.0): [-1.38690735, -0.32255140, -6.06984030, -3.75348868, -9.14209125],
          (0.3, 0.7): [-3.85589685, -0.09709469, -5.12264605, -3.86532083, -3.11319266]}

# ---------------------------------------------------------------------------------------------------------------------
# exact_losses and derivatives

ODDS = t([math.log(3), 0], [0, 0])[None]                              # the first wins 0.75 and 0.5 of the labels


def entropy(p, q=None):
    """−p log q − (1 − p) log(1 − q), in nats."""
    q = p if q is None else q
    return -p * math.log(q) - (1 - p) * math.log(1 - q)


@problem("exact_losses", 2)
def test_exact_losses_by_hand(adapters):
    h = t([math.log(4), 0])                                                           # sigmoid: 0.8
    want = [[entropy(0.75, 0.8), entropy(0.5, 0.8)]]
    same("two responses, labels 0.75 and 0.5, the policy prefers the first with 0.8", adapters.exact_losses(h, ODDS),
         want, looks_like={
             "the first is always labelled better": [[-math.log(0.8)] * 2],
             "both orders of the pair are added": [[2 * x for x in want[0]]],
             "the sum over all a and b is divided by S²": [[x / 2 for x in want[0]]],
             "the response beside itself counts as a pair": [[(x + math.log(2)) / 2 for x in want[0]]],
             "the sign is wrong": [[-x for x in want[0]]],
             "labels and policy have changed places": [[entropy(0.8, 0.75), entropy(0.8, 0.5)]],
             "the labels are those of the worse response": [[entropy(0.25, 0.8), entropy(0.5, 0.8)]],
             "the other order of the pair is forgotten": [[-0.75 * math.log(0.8), -0.5 * math.log(0.8)]]})


@problem("exact_losses", 1)
def test_exact_losses_of_many_pairs(adapters):
    h, scores = 2 * numbers(2, 5, start=1.0), 3 * numbers(2, 5, 3, start=2.0)
    got = adapters.exact_losses(h, scores)
    same("two prompts, five responses, three dimensions", got, LOSSES, looks_like={
        "the prompts are averaged": LOSSES.mean(0), "pairs are summed, not averaged": 10 * LOSSES,
        "both orders of a pair are added": 2 * LOSSES})
    same("the same policy: a constant added to each prompt's h", adapters.exact_losses(h + t([3], [-5]), scores), got)
    same("h = 0: ln 2 everywhere", adapters.exact_losses(0 * h, scores), torch.full((2, 3), math.log(2)))


@problem("exact_losses", 2)
def test_exact_losses_least_at_the_scores(adapters):
    """No h has a smaller L_i than r_i: its slopes are zero there, and it is the labels' own entropy."""
    scores = 2 * numbers(1, 4, 2, start=5.0)
    for i in (0, 1):
        h = scores[:, :, i].clone()
        value = lambda: float(adapters.exact_losses(h, scores)[0, i])
        check(isinstance(adapters.exact_losses(h, scores), torch.Tensor), "expected a tensor")
        at_best = value()
        check(0.1 < at_best < math.log(2) - 0.01,
              f"L_{i + 1} at h = r_{i + 1}: expected something between 0 and ln 2, got {at_best:.6g}")
        for a in range(4):
            got = slope(value, h, (0, a))
            check(abs(got) < 1e-6, f"at h = r_{i + 1} the slope of L_{i + 1} in h[{a}] should be 0, it is {got:.6g}")


@problem("exact_losses", 1)
def test_exact_losses_far_away(adapters):
    """The first response is labelled better with 0.75: −0.75 log sigmoid(±2000) − 0.25 log sigmoid(∓2000)."""
    same("h = (2000, 0) and (0, 2000)", adapters.exact_losses(t([2000, 0], [0, 2000]), ODDS.expand(2, 2, 2)),
         [[500, 1000], [1500, 1000]])


def both(adapters, h, scores, lam):
    """(gradient, Hessian) of the student, checked for their number and shapes."""
    got, (X, S) = adapters.derivatives(h, scores, lam), h.shape
    check(isinstance(got, tuple) and len(got) == 2, f"expected a tuple (gradient, Hessian), got {type(got).__name__}")
    shapes = [tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__ for x in got]
    check(shapes == [(X, S), (X, S, S)], f"expected the shapes {(X, S)} and {(X, S, S)}, got {shapes[0]} and "
          f"{shapes[1]}")
    return got


@problem("derivatives", 2)
def test_derivatives_by_hand(adapters):
    """Two responses: the policy prefers the first with 0.9; under λ = (0.4, 0.6) the labels do with 0.6."""
    gradient, hessian = both(adapters, t([math.log(9), 0]), ODDS, t(0.4, 0.6))
    same("gradient", gradient, [[0.3, -0.3]], looks_like={
        "the sign is wrong": [[-0.3, 0.3]], "the labels are left out, or count as one half": [[0.4, -0.4]],
        "the labels are those of the worse response": [[0.5, -0.5]],
        "λ is left out, and the dimensions are added": [[0.55, -0.55]],
        "both orders of the pair are added": [[0.6, -0.6]],
        "both orders of the pair count in the divisor": [[0.15, -0.15]],
        "a response beside itself counts for the policy, and not for the labels": [[0.8, 0.2]],
        "λ·r makes the labels, instead of λ·P": [[0.9 - win(0.4 * math.log(3)), win(0.4 * math.log(3)) - 0.9]]})
    same("Hessian", hessian, [[[0.09, -0.09], [-0.09, 0.09]]], looks_like={
        "it is taken at the labels, instead of the policy": [[[0.24, -0.24], [-0.24, 0.24]]],
        "the diagonal is left out": [[[0, -0.09], [-0.09, 0]]],
        "the off-diagonal entries are left out": [[[0.09, 0], [0, 0.09]]],
        "the sign is wrong": [[[-0.09, 0.09], [0.09, -0.09]]],
        "the off-diagonal entries have the wrong sign": [[[0.09, 0.09], [0.09, 0.09]]],
        "both orders of the pair are added": [[[0.18, -0.18], [-0.18, 0.18]]],
        "the response beside itself counts as a pair": [[[0.34, -0.09], [-0.09, 0.34]]]})


@problem("derivatives", 2)
def test_derivatives_of_many_pairs(adapters):
    h, scores, lam = 2 * numbers(2, 4, start=1.0), 3 * numbers(2, 4, 3, start=2.0), t(0.2, 0.3, 0.5)
    gradient, hessian = both(adapters, h, scores, lam)
    same("two prompts, four responses, three dimensions: gradient", gradient, GRADIENT, looks_like={
        "it is of the sum over pairs, not of their mean": 6 * GRADIENT, "the sign is wrong": -GRADIENT,
        "it is divided by the number of prompts": GRADIENT / 2})
    same("Hessian", hessian, HESSIAN, looks_like={
        "it is of the sum over pairs, not of their mean": 6 * HESSIAN, "the sign is wrong": -HESSIAN,
        "it is divided by the number of prompts": HESSIAN / 2})


@problem("derivatives", 2)
def test_derivatives_fit_each_other(adapters):
    """The Hessian's columns are the slopes of the gradient; a constant in h changes nothing."""
    h, scores, lam = 3 * numbers(1, 5, start=4.0), 3 * numbers(1, 5, 2, start=6.0), t(0.3, 0.7)
    gradient, hessian = both(adapters, h, scores, lam)
    check(gradient.abs().max() > 1e-3 and hessian.abs().max() > 1e-3, "gradient or Hessian is zero everywhere")
    for a in (0, 3):
        for b in (0, 1):
            same(f"Hessian[0, {b}, {a}], beside the slope of your gradient[0, {b}] in h[0, {a}]", hessian[0, b, a],
                 slope(lambda: both(adapters, h, scores, lam)[0][0, b], h, (0, a)), tolerance=1e-4)
    check(gradient.sum().abs() < 1e-9, "the gradient's entries should sum to 0, because a constant in h changes "
          f"nothing; they sum to {float(gradient.sum()):.6g}")
    check(hessian.sum(2).abs().max() < 1e-9, "the Hessian's rows should sum to 0, because a constant in h changes "
          f"nothing; the first sums to {float(hessian[0, 0].sum()):.6g}. What makes it invertible belongs into newton.")


LOSSES = t(0.49895222, 1.13288440, 0.64105666, 1.93885318, 0.88189993, 1.43141193).view(2, 3)
GRADIENT = t(0.02521142, 0.17190134, -0.02841158, -0.16870118, -0.05271497, 0.02415867, -0.26189083,
             0.29044713).view(2, 4)
HESSIAN = t(0.08705225, -0.04128686, -0.01958111, -0.02618428, -0.04128686, 0.09294787, -0.02240973,
            -0.02925128, -0.01958111, -0.02240973, 0.08176697, -0.03977613, -0.02618428, -0.02925128,
            -0.03977613, 0.09521169, 0.07420923, -0.02705074, -0.02280863, -0.02434986, -0.02705074, 0.07598973,
            -0.00757175, -0.04136724, -0.02280863, -0.00757175, 0.03686505, -0.00648467, -0.02434986,
            -0.04136724, -0.00648467, 0.07220176).view(2, 4, 4)

# ---------------------------------------------------------------------------------------------------------------------
# newton


@problem("newton", 2)
def test_newton_two_responses(adapters):
    half = lambda d: [[d / 2, -d / 2]]
    same("gaps of 4 and 0 in the two dimensions, λ = (0.5, 0.5)",
         adapters.dpo_optimum(t([4, 0], [0, 0])[None], t(0.5, 0.5)), half(1.05120849), looks_like={
             "λ·r is taken: the best policy of RLHF": half(2.0),
             "Newton's method stops after one step": half(0.96402758),
             "the first response has h = 0: the mean is not taken off": [[0, -1.05120849]],
             "the second response has h = 0: the mean is not taken off": [[1.05120849, 0]],
             "λ is left out, and the first dimension counts alone": half(4.0),
             "it goes uphill": half(-1.05120849), "probabilities are returned": [[0.74100690, 0.25899310]]})
    same("gaps of 1 and -2, λ = (0.3, 0.7)", adapters.dpo_optimum(t([1, 0], [0, 2])[None], t(0.3, 0.7)),
         half(-0.83419108), looks_like={"λ_1 and λ_2 have changed places": half(0.19058229)})


@problem("newton", 2)
def test_newton_at_a_vertex(adapters):
    """The labels of dimension i come from r_i: so h = r_i. Also where the scores are strong: gaps of 10."""
    for scale in (1.0, 5.0):
        scores = scale * numbers(2, 5, 2, start=3.0)
        for i, lam in enumerate((t(1, 0), t(0, 1))):
            want = scores[:, :, i] - scores[:, :, i].mean(1, keepdim=True)
            same(f"scores up to {scores.abs().max():.1f}, λ = {lam.tolist()}", adapters.dpo_optimum(scores, lam), want,
                 looks_like={"the mean is not taken off": scores[:, :, i], "the mean of all prompts is taken off":
                             scores[:, :, i] - scores[:, :, i].mean()})


@problem("newton", 3)
def test_newton_between(adapters):
    scores, lam = 3 * numbers(2, 4, 3, start=2.0), t(0.2, 0.3, 0.5)
    got = adapters.dpo_optimum(scores, lam)
    mean = (scores * lam).sum(2)
    same("two prompts, four responses, λ = (0.2, 0.3, 0.5)", got, BETWEEN, looks_like={
        "λ·r is taken: the best policy of RLHF": mean - mean.mean(1, keepdim=True),
        "Newton's method stops after one step": ONE_STEP, "Newton's method stops after two steps": TWO_STEPS})
    same("the first prompt alone", adapters.dpo_optimum(scores[:1], lam), BETWEEN[:1])


@problem("newton", 3)
def test_newton_in_the_world(adapters):
    """160 responses to two prompts of the world."""
    prompts, dims = toy.prompts("new_verbs")[::20], ["helpful", "harmless"]
    scores = torch.stack([toy.scores(x, toy.responses(x), dims) for x in prompts])
    ends = adapters.dpo_optimum(scores, t(1, 0))
    same("λ = (1, 0)", ends, scores[:, :, 0] - scores[:, :, 0].mean(1, keepdim=True))
    got = adapters.dpo_optimum(scores, t(0.5, 0.5))
    check(got.shape == (2, 160), f"expected the shape (2, 160), got {tuple(got.shape)}")
    same("λ = (0.5, 0.5), responses 0, 40, 80, 120", got[:, ::40], WORLD)


BETWEEN = t(0.63872498, -0.52157145, -0.72718454, 0.61003101, 0.05658756, 0.64894424, 0.37689079,
            -1.08242258).view(2, 4)
ONE_STEP = t(0.56527804, -0.46629814, -0.63997307, 0.54099317, 0.03419401, 0.56108982, 0.32322883,
             -0.91851266).view(2, 4)
TWO_STEPS = t(0.63601774, -0.51959278, -0.72392123, 0.60749627, 0.05462618, 0.64435762, 0.37361766,
              -1.07260145).view(2, 4)
WORLD = t(0.65396712, -0.36274657, -0.26810770, -1.32964377, -0.09832846, -0.30034188, -0.49568714,
          -0.63669818).view(2, 4)

# ---------------------------------------------------------------------------------------------------------------------
# tchebycheff_point

CONFLICT = t([4, 0], [0, 2])[None]                                    # the first: better by 4, worse by 2


@problem("tchebycheff_point", 2)
def test_tchebycheff_point_two_responses(adapters):
    got, lam = adapters.tche_optimum(CONFLICT, t(0.6, 0.4)), (0.6, 0.4)
    half = lambda d: [[d / 2, -d / 2]]
    same("better by 4 and worse by 2, λ = (0.6, 0.4)", got, half(POINT), looks_like={
        "linear scalarisation's point at λ is taken": half(0.56188873),
        "λ_1 and λ_2 have changed places": half(POINT_TURNED), "the losses are made equal, without λ": [[0.0, 0.0]],
        "the mean is not taken off": [[POINT, 0]], "a constant is left in h": [[0, -POINT]]})
    terms = [share * entropy(win(gap), win(2 * float(got[0, 0]))) for share, gap in zip(lam, (4.0, -2.0))]
    check(abs(terms[0] - terms[1]) < 1e-6, f"the two terms should be equal there: {terms[0]:.6g} and {terms[1]:.6g}")


@problem("tchebycheff_point", 2)
def test_tchebycheff_point_at_an_end(adapters):
    """The larger term stays the larger one even where it is smallest: then the best is that dimension's own policy."""
    for lam, gap, which in ((t(0.1, 0.9), -2.0, "second"), (t(1, 0), 4.0, "first"), (t(0, 1), -2.0, "second"),
                            (t(0.99, 0.01), 4.0, "first")):
        same(f"λ = {lam.tolist()}: the {which} term is the larger one everywhere on the front",
             adapters.tche_optimum(CONFLICT, lam), [[gap / 2, -gap / 2]])


@problem("tchebycheff_point", 2)
def test_tchebycheff_point_over_prompts(adapters):
    """The largest of the mean losses, not the mean of the largest."""
    scores, lam = 3 * numbers(3, 4, 2, start=2.0), t(0.4, 0.6)
    same("three prompts, four responses, λ = (0.4, 0.6)", adapters.tche_optimum(scores, lam), POINTS, looks_like={
        "every prompt has its own maximum": POINTS_ALONE, "linear scalarisation's point at λ is taken": POINTS_LS})


POINT, POINT_TURNED = 0.31974138, -0.33572152
POINTS = t(-0.60289703, 1.59355283, -0.66838330, -0.32227251, -0.07886664, 0.95982685, 1.71927711, -2.60023731,
           1.95469457, 0.60497207, -0.56548105, -1.99418559).view(3, 4)
POINTS_ALONE = t(-0.69864202, 1.63296855, -0.66061642, -0.27371010, 0.26417282, 1.25232298, 1.79247169,
                 -3.30896749, 1.18146024, 0.51265075, -0.46273518, -1.23137581).view(3, 4)
POINTS_LS = t(-0.17632254, 1.45079956, -0.71938343, -0.55509358, -0.26001962, 0.82151547, 1.76403850,
              -2.32553436, 1.68109396, 0.56791053, -0.52565418, -1.72335031).view(3, 4)

# ---------------------------------------------------------------------------------------------------------------------
# regret

LAMS = t([1, 0], [0.5, 0.5], [0, 1])
BASE, BEST = t(1, 2), t([5, 0], [4, 4], [0, 2.75])                    # possible gains: 4, 2.5, 0.75
MODEL = t([4, 0], [3, 4], [2, 2])                                     # gains: 3, 2, 0


def measured(adapters, *arguments):
    """The student's three values, checked for their number, as (regret, worst, preference)."""
    got = adapters.regret(*arguments)
    check(isinstance(got, tuple) and len(got) == 3,
          f"expected a tuple (regret, largest regret, its preference), got {type(got).__name__}")
    return got


@problem("regret", 2)
def test_regret_by_hand(adapters):
    got, worst, lam = measured(adapters, LAMS, MODEL, BASE, BEST)
    same("gains of 3, 2 and 0 where 4, 2.5 and 0.75 are possible: regret", got, 1 - 5 / 7.25, looks_like={
        "the mean of the quotients is taken": (0.25 + 0.2 + 1) / 3, "what is reached is returned": 5 / 7.25,
        "the base is left out": 1 - 9.5 / 11.75, "the missing gain is not divided": 2.25,
        "the mean of the missing gains is taken": 0.75, "λ is left out": 1 - 6 / 6.75})
    same("largest regret of a single preference", worst, 1.0, looks_like={
        "the smallest one is taken": 0.2, "the mean is taken": (0.25 + 0.2 + 1) / 3})
    same("its preference", lam, [0, 1], looks_like={
        "the preference with the smallest regret is returned": [0.5, 0.5],
        "the preference with the largest missing gain is returned, not with the largest share of it": [1, 0]})


@problem("regret", 1)
def test_regret_of_base_and_optimum(adapters):
    same("the base model itself: regret", measured(adapters, LAMS, BASE.expand(3, 2), BASE, BEST)[0], 1.0, looks_like={
        "what is reached is returned": 0.0})
    got, worst, _ = measured(adapters, LAMS, BEST, BASE, BEST)
    same("the optimal policies: regret, and the largest one", t(float(got), float(worst)) + 1, [1, 1])
    worse = measured(adapters, LAMS, BASE.expand(3, 2) - 1, BASE, BEST)
    same("a model that loses 1 everywhere: regret", worse[0], 1 + 3 / 7.25, looks_like={
        "it is cut at 1": 1.0, "absolute values are taken": 1 - 3 / 7.25})


@problem("regret", 2)
def test_regret_where_nothing_can_be_gained(adapters):
    """At λ = (0, 1) the base is optimal. Its loss there counts in the sums, and it has no regret of its own."""
    best, model = t([5, 0], [4, 4], [0, 2]), t([4, 0], [3, 4], [2, 1])
    got, worst, lam = measured(adapters, LAMS, model, BASE, best)
    same("possible gains 4, 2.5 and 0, gains 3, 2 and -1: regret", got, 1 - 4 / 6.5, looks_like={
        "the preference without a possible gain is left out of the sums": 1 - 5 / 6.5})
    same("largest regret of a single preference", worst, 0.25)
    same("its preference", lam, [1, 0])


@problem("regret", 1)
def test_regret_does_not_depend_on_units(adapters):
    lams, J, base, best = (numbers(6, 3, start=float(i)) for i in range(4))
    lams, base = lams.abs() / lams.abs().sum(1, keepdim=True), base[0] - 3
    got, worst, lam = measured(adapters, lams, J, base, best + 2)
    check(abs(float(got)) > 1e-3, f"six preferences, three dimensions: expected a regret, got {float(got):.6g}")
    same("six preferences, three dimensions: regret, and the largest one", t(float(got), float(worst)), SIX[:2])
    same("its preference", lam, lams[int(SIX[2])])
    shift = t(7, -2, 1)
    same("the same with other zeros and another unit", measured(adapters, lams, 3 * J + shift, 3 * base + shift,
                                                                3 * (best + 2) + shift)[0], float(got))


SIX = t(0.46025540, 0.61454972, 3)
