"""grade.py - the tests of set 2. They compare with hand calculations, with stored numbers and with properties."""
import math
from contextlib import contextmanager
from itertools import product

import pytest
import torch

from course.grading import backward, check, numbers, problem, same, slope

PROBLEMS = {    # problem: the functions of adapters.py that it asks for
    "response_logprobs": ["response_logprobs"], "dpo_loss": ["dpo_loss"], "losses_on_pairs": ["losses_on_pairs"],
    "uneven_labels": ["expected_counts", "mean_losses"], "linear_scalarization": ["linear_scalarization"],
    "tchebycheff": ["tchebycheff"], "sample_preference": ["sample_preference"], "training_step": ["training_step"]}


def t(*rows):
    return torch.tensor(rows, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# response_logprobs

HAND_LOGITS = torch.tensor([[0.8, 0.1, 0.1], [0.25, 0.25, 0.5], [0.25, 0.7, 0.05], [0.3, 0.6, 0.1]],
                           dtype=torch.float64).log() + torch.tensor([[1.0], [2.0], [-1.0], [3.0]])    # (T, V)
HAND_TOKENS, HAND_MASK = torch.tensor([[0, 1, 2, 0]]), torch.tensor([[False, False, True, True]])


@problem("response_logprobs", 2)
def test_response_logprobs_by_hand(adapters):
    """Two prompt tokens, two response tokens, of probability 0.5 and 0.25."""
    same("prompt 0 1, response 2 0", adapters.response_logprobs(HAND_LOGITS[None], HAND_TOKENS, HAND_MASK),
         [math.log(0.125)], looks_like={
             "the mean over tokens is taken": [math.log(0.125) / 2],
             "position t is asked for its own token instead of the next one": [math.log(0.05 * 0.3)],
             "the prompt's tokens count too": [math.log(0.1 * 0.125)],
             "the last token of the response is left out, or the mean over all places is taken": [math.log(0.5)],
             "the first token of the response is left out": [math.log(0.25)],
             "logits are taken for log-probabilities": [math.log(0.125) + 1.0],
             "probabilities are added instead of their logarithms": [0.75]})


@problem("response_logprobs", 2)
def test_response_logprobs_of_all_responses_sum_to_one(adapters):
    """Every response of two tokens to one prompt, under a table of logits: their probabilities sum to 1."""
    table, total = 3 * numbers(3, 3, start=2.0), 0.0                                  # (token before, V)
    for response in product(range(3), repeat=2):
        tokens = torch.tensor([[1, *response]])
        total += float(adapters.response_logprobs(table[tokens], tokens, torch.tensor([[False, True, True]])).exp())
    same("the sum of the probabilities of all responses", total, 1.0)


@problem("response_logprobs", 2)
def test_response_logprobs_ignores_padding(adapters):
    """Rows of different lengths, padded, beside each row alone."""
    lengths, prompts = [6, 4, 5], [2, 1, 3]
    logits, tokens = 2 * numbers(3, 6, 7, start=1.0), torch.arange(18).view(3, 6) * 5 % 7
    mask = torch.tensor([[p <= i < n for i in range(6)] for p, n in zip(prompts, lengths)])
    got = adapters.response_logprobs(logits, tokens, mask)
    alone = torch.cat([adapters.response_logprobs(logits[r:r + 1, :n], tokens[r:r + 1, :n], mask[r:r + 1, :n])
                       for r, n in enumerate(lengths)])
    same("three rows together, beside each of them without padding", got, alone)
    same("their values", got, LOGPROBS)


@problem("response_logprobs", 2)
def test_response_logprobs_gradient_and_large_logits(adapters):
    logits = HAND_LOGITS[None].clone().requires_grad_(True)
    value = lambda: adapters.response_logprobs(logits, HAND_TOKENS, HAND_MASK).sum()
    backward(value(), logits, "the logits")
    for index in ((0, 1, 2), (0, 2, 1)):
        same(f"the gradient to logits{list(index)}, beside a finite difference", logits.grad[index],
             slope(value, logits, index), tolerance=1e-5)
    same("with logits of 0 and 2000, a response of probability e^-2000",
         adapters.response_logprobs(t([[2000, 0], [0, 0]]), torch.tensor([[0, 1]]), torch.tensor([[False, True]])),
         [-2000])


LOGPROBS = t(-15.05245254, -5.59771512, -3.68003008)

# ---------------------------------------------------------------------------------------------------------------------
# dpo_loss


@problem("dpo_loss", 2)
def test_dpo_loss_by_hand(adapters):
    soft = lambda h: [math.log1p(math.exp(-h)), math.log1p(math.exp(-h / 2))]
    same("two pairs, the gap of β log π/π_ref is 0.75 and 0.375",
         adapters.dpo_loss(t(-1, -5), t(-3, -2), t(-2, -6), t(-2.5, -2.25), 0.5), soft(0.75), looks_like={
             "the gap's sign is turned: chosen and rejected have changed places, or policy and reference": soft(-0.75),
             "β is left out": soft(1.5), "the reference is left out": [soft(1.0)[0], soft(-3.0)[1]],
             "it has the wrong sign": [-x for x in soft(0.75)],
             "the loss is divided by β": [2 * x for x in soft(0.75)]})
    same("the same at four times the β", adapters.dpo_loss(t(-1, -5), t(-3, -2), t(-2, -6), t(-2.5, -2.25), 2.0),
         soft(3.0))


@problem("dpo_loss", 2)
def test_dpo_loss_at_the_reference(adapters):
    a, b = numbers(4, 3, start=1.0), numbers(4, 3, start=2.0)
    same("π = π_ref, a (4, 3) tensor of pairs: ln 2 each", adapters.dpo_loss(a, b, a, b, 0.3),
         torch.full((4, 3), math.log(2)))


@problem("dpo_loss", 2)
def test_dpo_loss_gradient(adapters):
    x = [5 * numbers(3, start=float(i)) for i in range(4)]
    for i in (0, 1):
        x[i].requires_grad_(True)
    value = lambda: adapters.dpo_loss(*x, 0.7).sum()
    got = value()
    check(got.requires_grad, "no gradient reaches the policy's log-probabilities")
    got.backward()
    for i, name in enumerate(("pi_chosen", "pi_rejected")):
        check(x[i].grad is not None, f"no gradient reaches {name}")
        same(f"the gradient to {name}, beside a finite difference", x[i].grad[1], slope(value, x[i], (1,)),
             tolerance=1e-5)
    check(x[0].grad.max() < 0,
          "a step against the gradient should make the chosen response more likely; this one makes it less")


@problem("dpo_loss", 2)
def test_dpo_loss_far_away(adapters):
    same("gaps of 2000 and -2000", adapters.dpo_loss(t(0, -2000), t(-2000, 0), t(0, 0), t(0, 0), 1.0), [0, 2000])


# ---------------------------------------------------------------------------------------------------------------------
# losses_on_pairs

PI, REF = t(-2, -1, 2, 9), t(-2, -2, -1, 4)                                           # log π/π_ref = 0, 1, 3, 5
PAIRS, BETTER = torch.tensor([[0, 1], [2, 0]]), torch.tensor([[0, 1], [1, -1]])


def pairs(adapters, *arguments):
    """(losses, known) of the student, checked for their number."""
    got = adapters.losses_on_pairs(*arguments)
    check(isinstance(got, tuple) and len(got) == 2, f"expected a tuple (losses, known), got {type(got).__name__}")
    return got


@problem("losses_on_pairs", 2)
def test_losses_on_pairs_by_hand(adapters):
    losses, known = pairs(adapters, PI, REF, PAIRS, BETTER, 1.0)
    soft = lambda *gaps: t(*gaps).neg().exp().log1p()
    want = soft(-1, 1, -3, torch.inf).view(2, 2)
    same("two pairs, two dimensions, one label missing: losses", losses, want, looks_like={
        "labels are ignored, the first is always the better one": soft(-1, -1, 3, 3).view(2, 2),
        "0 and 1 have changed places": soft(1, -1, 3, torch.inf).view(2, 2),
        "a missing label counts as 0": soft(-1, 1, -3, 3).view(2, 2),
        "a missing label counts as 1": soft(-1, 1, -3, -3).view(2, 2),
        "the first dimension's labels count for all": soft(-1, -1, -3, -3).view(2, 2)})
    same("known", known, [[1, 1], [1, 0]])
    check(known.is_floating_point(), f"known: expected 1.0 and 0.0, got a tensor of {known.dtype}")


@problem("losses_on_pairs", 2)
def test_losses_on_pairs_symmetries(adapters):
    better = torch.tensor([[0, 1, -1], [1, 1, 0], [-1, 0, 0], [0, -1, 1]])
    some = torch.tensor([[0, 1], [2, 0], [3, 1], [2, 3]])
    losses, known = pairs(adapters, PI, REF, some, better, 0.3)
    check(losses.shape == (4, 3) and (losses > 0).sum() == 9,
          "four pairs, three dimensions, nine labels: expected nine "
          f"losses above 0 in a (4, 3) tensor, got {int((losses > 0).sum())} in {tuple(losses.shape)}")
    order = torch.tensor([2, 0, 1])
    for name, want, got in zip(("losses", "known"), (losses, known),
                               pairs(adapters, PI, REF, some, better[:, order], 0.3)):
        same(f"{name}, with the dimensions in another order", got, want[:, order])
    turned = torch.where(better < 0, better, 1 - better)
    same("losses, with every pair turned round and its labels too",
         pairs(adapters, PI, REF, some.flip(1), turned, 0.3)[0], losses)


@problem("losses_on_pairs", 2)
def test_losses_on_pairs_gradient(adapters):
    pi = PI.clone().requires_grad_(True)
    value = lambda: pairs(adapters, pi, REF, PAIRS, BETTER, 0.5)[0].sum()
    backward(value(), pi, "π's log-probabilities")
    check(pi.grad[3] == 0, "response 3 is in no pair, and has a gradient")
    for r in range(3):
        same(f"the gradient to pi[{r}], beside a finite difference", pi.grad[r], slope(value, pi, (r,)), tolerance=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# uneven_labels

# a data set of four rows: the labels of their pairs in two dimensions
ROWS = [torch.tensor([[0, 1], [1, 1]]), torch.tensor([[1, -1]]), torch.tensor([[0, -1], [0, 0], [1, -1]]),
        torch.tensor([[1, -1], [0, -1]])]
LOSSES = numbers(8, 2, start=4.0) + 2                                                 # of the eight pairs


@problem("uneven_labels", 2)
def test_uneven_labels_expected_counts(adapters):
    same("8 and 3 labels in 4 rows, batches of 3 rows", adapters.expected_counts(ROWS, 3), [6, 2.25], looks_like={
        "missing labels are counted": [6, 6], "the batch size is left out": [2, 0.75],
        "the labels of the whole data set are counted": [8, 3], "the labels of a pair are counted": [3, 1.125],
        "the ones are counted, not the labels": [3, 1.5]})
    same("batches of 2 rows", adapters.expected_counts(ROWS, 2), [4, 1.5])


@problem("uneven_labels", 2)
def test_uneven_labels_is_unbiased(adapters):
    """Over all batches of an epoch the mean of L_i is the mean over all labels of i."""
    owner = torch.tensor([0, 0, 1, 2, 2, 2, 3, 3])
    known = (torch.cat(ROWS) >= 0).double()
    total = torch.zeros(2, dtype=torch.float64)
    for batch in ([0, 1], [2, 3]):
        mine = torch.isin(owner, torch.tensor(batch))
        total = total + adapters.mean_losses(LOSSES[mine], known[mine], t(4, 1.5)) / 2
    same("the mean of L over the two batches of an epoch", total, UNBIASED)


@problem("uneven_labels", 2)
def test_uneven_labels_own_counts(adapters):
    known = t([1, 1], [1, 0], [1, 0], [1, 1])
    losses = t([1, 6], [2, 9], [3, 9], [6, 2])
    same("expected = None: four labels and two", adapters.mean_losses(losses, known, None), [3, 4],
         looks_like={"a loss counts where known is 0": [3, 13], "pairs without a label count": [3, 6.5],
                     "the divisor is the number of pairs": [3, 2],
                     "sums are not divided": [12, 8]})
    losses = t([1, 6], [2, 9]).requires_grad_(True)
    got = adapters.mean_losses(losses, t([1, 0], [1, 0]), None)
    same("expected = None: no label of the second dimension", got, [1.5, -math.inf])
    check(got.requires_grad, "no gradient reaches the losses")
    got[0].backward()
    same("expected = None: the gradient of the first mean, where the second dimension has no label", losses.grad,
         [[0.5, 0], [0.5, 0]])


@problem("uneven_labels", 2)
def test_uneven_labels_no_label_in_a_batch(adapters):
    """With expected counts a dimension without a label gives 0; and only known losses have a gradient."""
    losses = t([1, 6], [2, 9]).requires_grad_(True)
    got = adapters.mean_losses(losses, t([1, 0], [1, 0]), t(4, 1.5))
    same("L with expected counts 4 and 1.5", got, [0.75, 0], looks_like={"a loss counts where known is 0": [0.75, 10]})
    check(got.requires_grad, "no gradient reaches the losses")
    got.sum().backward()
    same("the gradient to the losses", losses.grad, [[0.25, 0], [0.25, 0]])
    same("expected counts of 2 and 0: nobody labels the second dimension",
         adapters.mean_losses(losses.detach(), t([1, 0], [1, 0]), t(2, 0)), [1.5, 0])


UNBIASED = t(2.14925829, 1.92848132)

# ---------------------------------------------------------------------------------------------------------------------
# linear_scalarization and tchebycheff


@problem("linear_scalarization", 2)
def test_linear_scalarization_by_hand(adapters):
    losses, lam = t([2, 1, 4], [3, 5, 1]), t([0.25, 0.5, 0.25], [0, 0, 1])
    same("one preference", adapters.linear_scalarization(losses[0], lam[0]), 2.0, looks_like={
        "the mean is taken": 2 / 3, "λ is left out": 7.0, "the largest term is taken": 1.0, "the sign is wrong": -2.0})
    same("two preferences", adapters.linear_scalarization(losses, lam), [2.0, 1.0], looks_like={
        "everything is summed": 3.0, "the first λ counts for both": [2.0, 3.5],
        "the λ of the other row counts": [4.0, 3.5]})
    same("one λ for (2, 2, 3) losses", adapters.linear_scalarization(losses.expand(2, 2, 3), lam[0]), [[2.0, 3.5]] * 2)


@problem("linear_scalarization", 2)
def test_linear_scalarization_gradient(adapters):
    losses, lam = t(2, 1, 4).requires_grad_(True), t(0.2, 0.3, 0.5)
    backward(adapters.linear_scalarization(losses, lam), losses, "the losses")
    for i in range(3):
        same(f"the gradient to loss {i}, beside a finite difference", losses.grad[i],
             slope(lambda: adapters.linear_scalarization(losses, lam), losses, (i,)), tolerance=1e-5)


@problem("tchebycheff", 2)
def test_tchebycheff_by_hand(adapters):
    losses, lam = t([2, 1, 4], [3, 5, 1]), t([0.5, 0.375, 0.125], [0.1, 0.1, 0.8])
    same("one preference, no ideal", adapters.tchebycheff(losses[0], lam[0]), 1.0, looks_like={
        "the terms are added": 1.875, "the largest loss is taken, without its λ": 4.0,
        "the smallest term is taken": 0.375,
        "λ divides": 32.0})
    same("two preferences", adapters.tchebycheff(losses, lam), [1.0, 0.8], looks_like={
        "the maximum is taken over all rows": 1.0, "the first λ counts for both": [1.0, 1.875]})
    same("with the ideal (1, 0, 1)", adapters.tchebycheff(losses, lam, t(1, 0, 1)), [0.5, 0.5], looks_like={
        "the ideal is left out": [1.0, 0.8], "the ideal is added": [1.5, 1.6],
        "the ideal is not weighted": [0.375, 0.5]})


@problem("tchebycheff", 2)
def test_tchebycheff_gradient(adapters):
    losses, lam = t(2, 1).requires_grad_(True), t(0.3, 0.7)
    backward(adapters.tchebycheff(losses, lam), losses, "the losses")
    same("the gradient at losses (2, 1), λ = (0.3, 0.7)", losses.grad, [0, 0.7], looks_like={
        "the largest loss is looked for without its λ": [1, 0], "λ chooses the term, but does not weigh it": [0, 1],
        "the sign is wrong": [0, -0.7], "all terms have a gradient": [0.3, 0.7]})


@problem("tchebycheff", 2)
def test_tchebycheff_weight_zero(adapters):
    """A dimension with λ_i = 0 takes no part, also where the others are better than their ideal."""
    losses = t(1, 5).requires_grad_(True)
    got = adapters.tchebycheff(losses, t(1, 0), t(2, 2))
    same("losses (1, 5), λ = (1, 0), ideal (2, 2)", got, -1.0, looks_like={
        "the term 0 · (5 − 2) of the dimension without weight is the largest": 0.0,
        "the largest gap is taken without its λ": 3.0})
    backward(got, losses, "the losses")
    same("the gradient", losses.grad, [1, 0])


@problem("tchebycheff", 2)
def test_tchebycheff_without_labels(adapters):
    """L_i = −inf: a batch without a label of dimension i (uneven_labels)."""
    same("losses (−inf, 0.5), λ = (0.75, 0.25)", adapters.tchebycheff(t(-math.inf, 0.5), t(0.75, 0.25)), 0.125)
    same("losses (−inf, 0.5), λ = (0, 1)", adapters.tchebycheff(t(-math.inf, 0.5), t(0, 1)), 0.5)


# ---------------------------------------------------------------------------------------------------------------------
# sample_preference


def drawn(adapters, n, m, alpha, share, seed=0):
    lam = adapters.sample_preference(n, m, alpha, share, torch.Generator().manual_seed(seed))
    check(isinstance(lam, torch.Tensor) and lam.shape == (n, m), f"expected a ({n}, {m}) tensor, got "
          f"{tuple(lam.shape) if isinstance(lam, torch.Tensor) else type(lam).__name__}")
    check(bool((lam >= 0).all()) and (lam.sum(1) - 1).abs().max() < 1e-5,
          f"a preference is not negative and sums to 1; among yours is {lam[(lam.sum(1) - 1).abs().argmax()].tolist()}")
    return lam.double()


@problem("sample_preference", 2)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_sample_preference_vertices(adapters, share):
    lam = drawn(adapters, 3000, 3, 1.0, share)
    vertex = lam.max(1).values > 1 - 1e-6
    check(abs(vertex.double().mean() - share) < 0.035,
          f"vertex_share = {share}: expected about this part of vertices, got "
          f"{vertex.double().mean():.3f}")
    if share:
        counts = lam[vertex].mean(0)
        check((counts - 1 / 3).abs().max() < 0.06,
              f"vertices should be drawn evenly; the parts of the three are {brief3(counts)}")


@problem("sample_preference", 2)
@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_sample_preference_dirichlet(adapters, alpha):
    """Mean and variance of a Dirichlet(α) in m = 3 dimensions: 1/3, and 2 / (9 (3α + 1))."""
    lam = drawn(adapters, 3000, 3, alpha, 0.0)
    check((lam.mean(0) - 1 / 3).abs().max() < 0.03,
          f"α = {alpha}: expected the mean 1/3 everywhere, got {brief3(lam.mean(0))}")
    want, got = 2 / (9 * (3 * alpha + 1)), lam.var(0).mean().item()
    check(abs(got / want - 1) < 0.12, f"α = {alpha}: expected the variance {want:.4f}, got {got:.4f}"
          + (": uniform numbers divided by their sum are no Dirichlet(1)" if abs(got - 0.0284) < 0.003 else ""))
    # of Dirichlet(1), P(λ_1 > 1/2) is 1/4: the squares of both legs of a triangle
    if alpha == 1:
        share = (lam > 0.5).double().mean(0)
        check((share - 0.25).abs().max() < 0.035,
              f"α = 1: λ_i > 1/2 should happen in 1/4 of the draws, happens in {brief3(share)}")


@problem("sample_preference", 2)
def test_sample_preference_generator(adapters):
    torch.rand(1)                                                     # torch's own state is some state in use
    state = torch.get_rng_state()
    first, again, other = (drawn(adapters, 50, 2, 1.0, 0.3, seed) for seed in (1, 1, 2))
    check(torch.equal(first, again), "the same generator gives other preferences: all randomness should come from it")
    check(not torch.equal(first, other), "another seed gives the same preferences")
    vertices = {int((drawn(adapters, 50, 2, 1.0, 0.3, seed).amax(1) > 1 - 1e-6).sum()) for seed in range(8)}
    check(len(vertices) > 1, f"every call draws {min(vertices)} vertices; each row should be one independently")
    check(len(first.unique(dim=0)) > 20, "the preferences of one call are not drawn independently")
    check(torch.equal(state, torch.get_rng_state()), "torch's global random state was used")


def brief3(x):
    return " ".join(f"{v:.3f}" for v in x.tolist())


# ---------------------------------------------------------------------------------------------------------------------
# training_step


class Table(torch.nn.Module):
    """A language model of 3 tokens that looks at the token before alone: logits = base + delta, a frozen table and a
    learned one that adapters_off switches off. It notes how it was called."""

    def __init__(self, trained):
        super().__init__()
        self.base = torch.nn.Parameter(numbers(3, 3, start=1.0), requires_grad=False)
        self.delta = torch.nn.Parameter(numbers(3, 3, start=8.0) * trained)
        self.share, self.calls, self.reached = 1.0, [], False

    def forward(self, tokens):
        self.calls.append(self.share == 1)
        logits = (self.base + self.share * self.delta)[tokens]
        if self.share == 0 and logits.requires_grad:
            logits.register_hook(self.reach)
        return logits

    def reach(self, gradient):
        self.reached = True

    @contextmanager
    def off(self):
        self.share = 0.0
        yield
        self.share = 1.0


STEP = {"tokens": torch.tensor([[0, 1, 2, 0], [0, 2, 1, 1], [0, 1, 1, 0], [0, 2, 2, 2]]),
        "mask": torch.tensor([[False, True, True, True], [False, True, True, False], [False, True, False, False],
                              [False, True, True, True]]),
        "pairs": torch.tensor([[0, 1], [1, 2], [2, 3]]), "better": torch.tensor([[0, 1], [1, -1], [1, -1]]),
        "beta": 0.5, "expected": t(2, 1.6), "lam": t(0.25, 0.75)}


def step(adapters, aggregate="ls", trained=1.0, lr=0.1, **changed):
    """(L that the student's step returns, the model after it)"""
    model = Table(trained)
    optimizer = torch.optim.SGD([model.delta], lr)
    model.delta.grad = torch.ones_like(model.delta)                   # what an earlier backward pass has left behind
    L = adapters.training_step(model, Table.off, optimizer, aggregate=aggregate, **STEP | changed)
    return L, model


@problem("training_step", 2)
def test_training_step_losses(adapters):
    fresh = [3 * math.log(2) / 2, math.log(2) / 1.6]
    same("L of a fresh adapter: ln 2 times labels over expected labels", step(adapters, trained=0.0)[0], fresh,
         looks_like={
             "the batch's own counts divide": [math.log(2)] * 2,
             "the number of pairs divides": [math.log(2), math.log(2) / 3]})
    same("L of a trained adapter", step(adapters)[0], STEP_LOSSES, looks_like={
        "the reference is computed with the adapter on": fresh})
    check(not step(adapters)[0].requires_grad, "the returned losses should be detached")


@problem("training_step", 3)
@pytest.mark.parametrize("aggregate", ["ls", "tche"])
def test_training_step_moves_the_adapter(adapters, aggregate):
    before, model = Table(1.0), step(adapters, aggregate)[1]
    moved, want = model.delta.detach() - before.delta.detach(), STEP_MOVED[aggregate]
    same(f"{aggregate}: how far SGD with learning rate 0.1 moves the adapter, from a gradient of ones that an earlier "
         "pass has left behind", moved, want, looks_like={
             "nothing is learned: was the step taken?": torch.zeros(3, 3), "the step goes uphill": -want,
             **({"the expected counts divide": 1.5 * want} if aggregate == "tche" else {}),
             "the old gradient is not cleared": want - 0.1, "only the old gradient is used": torch.full((3, 3), -0.1)})
    check(torch.equal(model.base, before.base), "the frozen base has changed")


@problem("training_step", 2)
@pytest.mark.parametrize("lam, i", [(t(1, 0), 0), (t(0, 1), 1)])
def test_training_step_at_a_vertex(adapters, lam, i):
    """At a vertex the step goes down the loss of one dimension: beside finite differences of the student's own L."""
    def own(model_delta):
        model = Table(1.0)
        model.delta.data.copy_(model_delta)
        L = adapters.training_step(model, Table.off, torch.optim.SGD([model.delta], 0.0), aggregate="ls",
                                   **STEP | {"lam": lam})
        return L[i]
    before, model = Table(1.0), step(adapters, lam=lam)[1]
    moved, delta = model.delta.detach() - before.delta.detach(), before.delta.detach().clone()
    check(moved.abs().max() > 1e-4, "the step moves nothing")
    for index in ((0, 1), (2, 2)):
        same(f"λ = {lam.tolist()}: the step at delta{list(index)}, beside −lr times the slope of L_{i}", moved[index],
             -0.1 * slope(lambda: own(delta), delta, index), tolerance=1e-4)


@problem("training_step", 2)
def test_training_step_reference(adapters):
    """π_ref is the same model with the adapter off; it needs no gradient and the adapter is on again afterwards."""
    _, model = step(adapters)
    check(True in model.calls and False in model.calls,
          "expected one pass with the adapter on and one within adapters_off; "
          f"the model was called with the adapter {' '.join('on' if on else 'off' for on in model.calls) or 'never'}")
    check(not model.reached, "a gradient goes through the reference's pass")
    check(model.share == 1, "after the step the adapter is off")
    check(model.base.grad is None, "the frozen base has got a gradient")


@problem("training_step", 2)
def test_training_step_tche_leaves_out_what_has_no_label(adapters):
    better = torch.tensor([[0, -1], [1, -1], [1, -1]])
    L, model = step(adapters, "tche", better=better)
    same("tche, no label of the second dimension: L", L, [STEP_LOSSES[0] * 2 / 3, -math.inf])
    moved = model.delta.detach() - Table(1.0).delta.detach()
    check(bool(moved.isfinite().all()) and moved.abs().max() > 1e-4,
          "the step should learn from the first dimension; the adapter "
          + ("stays where it is" if bool(moved.isfinite().all()) else
             "has become NaN or infinite: what is the gradient of mean_losses, where a count is 0?"))


STEP_LOSSES = t(1.47111873, 0.19914784)
STEP_MOVED = {
    "ls": t(0.00000000, -0.00141496, 0.00141496, 0.00069050, 0.00020868, -0.00089918, -0.00194145, -0.00386755,
            0.00580901).view(3, 3),
    "tche": t(0.00000000, 0.00332013, -0.00332013, -0.00113050, -0.00034166, 0.00147215, 0.00296914, -0.00684181,
              0.00387267).view(3, 3),
}
