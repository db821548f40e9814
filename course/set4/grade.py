"""grade.py - the tests of set 4. They compare with hand calculations, with stored numbers and with properties."""
import math

import pytest
import torch

from course.grading import backward, check, numbers, problem, same, slope

PROBLEMS = {    # problem: the functions of adapters.py that it asks for
    "token_logprobs": ["token_logprobs"], "kl_penalized_rewards": ["kl_penalized_rewards"], "gae": ["gae"],
    "critic_values": ["critic_values"], "aggregate_advantages": ["aggregate_advantages"],
    "ppo_policy_loss": ["ppo_policy_loss"], "ppo_value_loss": ["ppo_value_loss"],
    "leave_one_out": ["group_advantages"], "normalised_groups": ["group_advantages"]}


def t(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def on(*rows):
    return torch.tensor(rows).bool()


# three rows: prompts of 2, 1 and 3 tokens, responses of 2, 4 and 1, padding behind
MASK = on([0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0], [0, 0, 0, 1, 0, 0])


def noisy(x, n=50.0):
    """x with large numbers wherever MASK is False."""
    return torch.where(MASK.view(MASK.shape + (1,) * (x.ndim - 2)), x, n * numbers(*x.shape, start=9.0))


def shaped(what, got, *shape):
    """Fails unless `got` is a tensor of this shape."""
    check(isinstance(got, torch.Tensor), f"{what}: expected a tensor of shape {shape}, got {type(got).__name__}")
    check(got.shape == shape, f"{what}: expected the shape {shape}, got {tuple(got.shape)}")


def no_gradient_outside(name, loss, x):
    """loss(noise) of x (R, T, …), in float32: no gradient where MASK is False, whatever the others hold there."""
    for what, noise in (("large numbers", lambda x, sign: noisy(x, 200.0 * sign)),
                        ("NaN", lambda x, sign: noisy(x, math.nan))):
        leaf = noise(x, 1).float().requires_grad_(True)
        loss(leaf, lambda y: noise(y, -1).float()).backward()
        same(f"float32, {what} at prompts and padding: the gradient to {name} there, plus 1", leaf.grad[~MASK] + 1,
             torch.ones_like(leaf.grad[~MASK]))
        check(bool(leaf.grad[MASK].isfinite().all() and leaf.grad[MASK].any()),
              f"float32, {what} at prompts and padding: expected a finite gradient to {name} in the responses, got "
              f"{leaf.grad[MASK].flatten().tolist()}")


# ---------------------------------------------------------------------------------------------------------------------
# token_logprobs

HAND_LOGITS = torch.tensor([[0.8, 0.1, 0.1], [0.25, 0.25, 0.5], [0.25, 0.7, 0.05], [0.3, 0.6, 0.1]],
                           dtype=torch.float64).log() + torch.tensor([[1.0], [2.0], [-1.0], [3.0]])    # (T, V)
HAND_TOKENS, HAND_MASK = torch.tensor([[0, 1, 2, 0]]), on([0, 0, 1, 1])


@problem("token_logprobs", 2)
def test_token_logprobs_by_hand(adapters):
    """Two prompt tokens, two response tokens, of probability 0.5 and 0.25."""
    log = math.log
    same("prompt 0 1, response 2 0", adapters.token_logprobs(HAND_LOGITS[None], HAND_TOKENS, HAND_MASK),
         [[0, 0, log(0.5), log(0.25)]], looks_like={
             "position t is asked for its own token instead of the next one": [[0, 0, log(0.05), log(0.3)]],
             "numbers stand at the place of the output, one before the token": [[0, log(0.5), log(0.25), 0]],
             "the prompt's tokens have a number too": [[0, log(0.1), log(0.5), log(0.25)]],
             "logits are taken for log-probabilities": [[0, 0, log(0.5) + 2, log(0.25) - 1]],
             "probabilities are returned": [[0, 0, 0.5, 0.25]], "it has the wrong sign": [[0, 0, log(2), log(4)]]})


@problem("token_logprobs", 2)
def test_token_logprobs_of_many_rows(adapters):
    """Rows with padding beside each of them alone, beside stored numbers and finite differences; large logits."""
    logits, tokens = 2 * numbers(3, 6, 7, start=1.0), torch.arange(18).view(3, 6) * 5 % 7
    got = adapters.token_logprobs(logits, tokens, MASK)
    shaped("three rows", got, 3, 6)
    same("three rows, the numbers of their responses", got[MASK], LOGPROBS)
    check(not got[~MASK].any(), "there are numbers at places where mask is False")
    logits.requires_grad_(True)
    value = lambda: adapters.token_logprobs(logits, tokens, MASK).sum()
    backward(value(), logits, "the logits")
    for index in ((0, 1, 2), (1, 3, 4), (1, 4, 0)):
        same(f"the gradient to logits{list(index)}, beside a finite difference", logits.grad[index],
             slope(value, logits, index), tolerance=1e-5)
    same("with logits of 0 and 2000, a token of probability e^-2000",
         adapters.token_logprobs(t([[2000, 0], [0, 0]]), torch.tensor([[0, 1]]), on([0, 1])), [[0, -2000]])


LOGPROBS = t(-4.70442004, -4.44030257, -1.33661334, -2.68344153, -1.57766025, -4.51677268, -1.28173061)

# ---------------------------------------------------------------------------------------------------------------------
# kl_penalized_rewards

SCORE, LOGP, REF = t([3, 1], [-2, 4]), t([9, -1, -2, 9], [-3, -1, -2, -4]), t([5, -1.5, -1, 7], [-1, -1, -4, -3])
TWO = on([0, 1, 1, 0], [1, 1, 1, 1])                                  # log-ratios 0.5 -1, and -2 0 2 -1
KL = t([0, -0.25, 0.5, 0], [1, 0, -1, 0.5])                           # for β = 0.5


def hand_rewards(kl=KL, at=((0, 2), (1, 3)), score=SCORE):
    """Rewards of KL terms (2, 4), or (2, 4, 2), and scores that stand at these places."""
    rewards = (kl[..., None] if kl.ndim == 2 else kl).expand(2, 4, 2).clone()
    for r, place in at:
        rewards[r, place] += score[r]
    return rewards


@problem("kl_penalized_rewards", 2)
def test_kl_penalized_rewards_by_hand(adapters):
    """Two rows of two and four tokens; one has a prompt before it, and padding; β = 0.5, nothing is clamped."""
    half = torch.stack([KL, 0 * KL], -1)
    every = hand_rewards(at=[(r, i) for r in range(2) for i in range(4) if TWO[r, i]])
    same("rewards, β = 0.5", adapters.kl_penalized_rewards(SCORE, LOGP, REF, TWO, 0.5, 50.0), hand_rewards(),
         looks_like={
             "the KL term has the wrong sign": hand_rewards(-KL), "the KL term is left out": hand_rewards(0 * KL),
             "β is left out": hand_rewards(2 * KL), "β divides": hand_rewards(4 * KL),
             "the score stands at the last position, padding or not": hand_rewards(at=((0, 3), (1, 3))),
             "the score stands at the last position, and is lost where that is padding": hand_rewards(at=((1, 3),)),
             "the score stands at the first token": hand_rewards(at=((0, 1), (1, 0))),
             "the score stands at every token": every,
             "the score is left out": hand_rewards(score=0 * SCORE),
             "the score stands at position (length of the response) − 1, as if no prompt came before":
                 hand_rewards(at=((0, 1), (1, 3))),
             "only the first column has the KL term": hand_rewards(half),
             "the KL term is shared out among the columns": hand_rewards(KL / 2),
             "the last token of the first row is taken for that of all": hand_rewards(at=((0, 2), (1, 2))),
             "prompt and padding have a KL term too": hand_rewards(-0.5 * (LOGP - REF))})


@problem("kl_penalized_rewards", 2)
def test_kl_penalized_rewards_add_up(adapters):
    """Over its tokens a column adds up to s_i − β log π_old/π_ref(y|x); weighed by λ the KL term stands once."""
    score, logp, ref = 3 * numbers(3, 4, start=2.0), numbers(3, 6, start=3.0) - 1, numbers(3, 6, start=4.0) - 1
    rewards = adapters.kl_penalized_rewards(score, logp, ref, MASK, 0.3, 50.0)
    kl = 0.3 * ((logp - ref) * MASK).sum(1, keepdim=True)
    shaped("rewards of four columns of scores", rewards, 3, 6, 4)
    same("four columns, summed over the tokens", rewards.sum(1), score - kl, looks_like={
        "the KL term has the wrong sign": score + kl, "the KL term is left out": score,
        "the mean of the KL terms is taken": score - kl / MASK.sum(1, keepdim=True)})
    lam = t(0.1, 0.2, 0.3, 0.4)
    same("Σ λ_i of the columns, beside the rewards of Σ λ_i s_i", rewards @ lam,
         adapters.kl_penalized_rewards((score @ lam)[:, None], logp, ref, MASK, 0.3, 50.0)[..., 0])


@problem("kl_penalized_rewards", 2)
def test_kl_penalized_rewards_clamp(adapters):
    """c = 2: log-ratios 0.5 -1, and -2 0 2 -1; β = 2; scores (3, 1) and (-2, 4)."""
    score, kl = SCORE[:, None], 4 * KL
    want, last = hand_rewards(kl).clamp(-2, 2), t([0, 0, 1, 0], [0, 0, 0, 1])[..., None]
    same("rewards, β = 2, c = 2", adapters.kl_penalized_rewards(SCORE, LOGP, REF, TWO, 2.0, 2.0), want, looks_like={
        "nothing is clamped": hand_rewards(kl), "the score alone is clamped": kl[..., None] + last * score.clamp(-2, 2),
        "the KL term alone is clamped": kl[..., None].clamp(-2, 2) + last * score,
        "score and KL term are clamped each, before the sum": kl[..., None].clamp(-2, 2) + last * score.clamp(-2, 2),
        "there is no lower bound": hand_rewards(kl).clamp(max=2),
        "there is no upper bound": hand_rewards(kl).clamp(min=-2)})
    broken = t([math.inf, 1], [-2, -math.inf])
    same("the same with the scores (inf, 1) and (-2, -inf)",
         adapters.kl_penalized_rewards(broken, LOGP, REF, TWO, 2.0, 2.0), hand_rewards(kl, score=broken).clamp(-2, 2))


@problem("kl_penalized_rewards", 2)
def test_kl_penalized_rewards_outside_the_response(adapters):
    """What stands at prompts and padding plays no part, and they have no reward."""
    score, logp, ref = 3 * numbers(3, 2, start=2.0), numbers(3, 6, start=3.0) - 1, numbers(3, 6, start=4.0) - 1
    clean = adapters.kl_penalized_rewards(score, logp, ref, MASK, 0.3, 50.0)
    shaped("rewards", clean, 3, 6, 2)
    check(bool(clean[MASK].any()), "the rewards of the tokens are zero everywhere")
    got = adapters.kl_penalized_rewards(score, noisy(logp), noisy(ref, -50.0), MASK, 0.3, 50.0)
    check(not got[~MASK].any(), "there are rewards at places where mask is False")
    same("rewards, with large numbers at prompts and padding", got, clean)
    same("rewards, with NaN at prompts and padding", adapters.kl_penalized_rewards(
        score, noisy(logp, math.nan), noisy(ref, math.nan), MASK, 0.3, 50.0), clean)


# ---------------------------------------------------------------------------------------------------------------------
# gae


def gae(adapters, *arguments):
    """(advantages, returns) of the student, checked for their number."""
    got = adapters.gae(*arguments)
    check(isinstance(got, tuple) and len(got) == 2, f"expected a tuple (advantages, returns), got {type(got).__name__}")
    return got


def column(*values):
    return t(values)[..., None]


@problem("gae", 2)
def test_gae_by_hand(adapters):
    """Three tokens: rewards 1 2 4, values 0.5 1 3, decay 0.5."""
    A, G = gae(adapters, column(1, 2, 4), column(0.5, 1, 3), on([1, 1, 1]), 0.5)
    same("advantages", A, column(3.75, 4.5, 1), looks_like={
        "decay is left out": column(6.5, 5, 1), "nothing comes from later tokens: A_t is δ_t": column(1.5, 4, 1),
        "the value after the last token is that of the last": column(4.5, 6, 4),
        "V_{t+1} is left out": column(1.25, 1.5, 1), "V_t is left out": column(5.5, 7, 4),
        "V_t is added": column(7.25, 9.5, 7), "γ is decay instead of 1": column(1.6875, 2.75, 1),
        "decay stands before V_{t+1} too": column(2.5, 3, 1), "decay stands before V_{t+1} alone": column(4.5, 3.5, 1),
        "the loop goes forwards": column(1.5, 4.75, 3.375),
        "returns and advantages have changed places": column(4.25, 5.5, 4),
        "V_{t+1} and V_t have changed places": column(2.25, 3.5, 7)})
    same("returns", G, column(4.25, 5.5, 4), looks_like={
        "they are the rewards from t on": column(7, 6, 4), "they are the advantages": column(3.75, 4.5, 1),
        "the value is subtracted": column(3.25, 3.5, -2)})


@problem("gae", 2)
@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_gae_at_its_ends(adapters, decay):
    """d = 1: G_t is the sum of the rewards from t on. d = 0: G_t is r_t + V_{t+1}."""
    rewards, values = 3 * numbers(1, 4, 2, start=2.0), numbers(1, 4, 2, start=3.0)
    A, G = gae(adapters, rewards, values, on([1, 1, 1, 1]), decay)
    want = rewards.flip(1).cumsum(1).flip(1) if decay else rewards + torch.cat([values[:, 1:], 0 * values[:, :1]], 1)
    same(f"decay = {decay}: returns", G, want)
    same(f"decay = {decay}: advantages", A, want - values)


@problem("gae", 2)
def test_gae_prompts_and_padding(adapters):
    """Three rows with prompts and padding, large numbers there: beside each row alone, and beside stored numbers."""
    rewards, values = noisy(numbers(3, 6, 2, start=2.0)), noisy(numbers(3, 6, 2, start=3.0))
    kept = rewards.clone(), values.clone()
    A, G = gae(adapters, rewards, values, MASK, 0.9)
    check(torch.equal(rewards, kept[0]) and torch.equal(values, kept[1]), "the inputs have been changed in place")
    for name, got, want in (("advantages", A, ADVANTAGES), ("returns", G, RETURNS)):
        shaped(name, got, 3, 6, 2)
        same(f"{name} of the responses' tokens", got[MASK], want, looks_like={
            "what stands behind a response is taken for its value after the last token": LEAKED[name]})
        check(not got[~MASK].any(), f"there are {name} at places where mask is False")
    hollow = gae(adapters, noisy(rewards, math.nan), noisy(values, math.nan), MASK, 0.9)
    for name, got, want in (("advantages", hollow[0], A), ("returns", hollow[1], G)):
        same(f"{name}, with NaN at prompts and padding", got, want)


@problem("gae", 2)
def test_gae_of_several_columns(adapters):
    """Every column by itself, and linear: Σ λ_i of the advantages is the advantage of Σ λ_i of rewards and values."""
    rewards, values, lam = numbers(3, 6, 3, start=4.0), numbers(3, 6, 3, start=5.0), t(0.2, 0.3, 0.5)
    together = gae(adapters, rewards, values, MASK, 0.7)
    summed = gae(adapters, (rewards @ lam)[..., None], (values @ lam)[..., None], MASK, 0.7)
    for j, name in enumerate(("advantages", "returns")):
        shaped(name, together[j], 3, 6, 3)
        check(bool(together[j][MASK].all()), f"{name}: there are zeros among those of the responses' tokens")
        for i in range(3):
            alone = gae(adapters, rewards[..., i:i + 1], values[..., i:i + 1], MASK, 0.7)[j]
            same(f"{name}, column {i} of three, beside this column alone", together[j][..., i:i + 1], alone)
        same(f"{name}: Σ λ_i of the columns, beside those of Σ λ_i rewards and values", together[j] @ lam,
             summed[j][..., 0])


@problem("gae", 2)
def test_gae_expects_nothing_of_a_perfect_critic(adapters):
    """Where the values are the rewards to come no token is better or worse than expected, whatever decay is; and where
    one reward is 1 larger, the tokens before it have the advantages 1, d, d² …"""
    rewards = numbers(3, 6, 2, start=6.0) * MASK[..., None]
    values = rewards.flip(1).cumsum(1).flip(1)
    A, G = gae(adapters, rewards, values, MASK, 0.6)
    same("perfect values: returns", G, values * MASK[..., None])
    same("perfect values: 1 + the advantages", 1 + A, torch.ones_like(A))
    surprise = torch.zeros_like(rewards)
    surprise[1, 4] = 1
    A = gae(adapters, rewards + surprise, values, MASK, 0.6)[0]
    same("one more at the last of four tokens: advantages", A[1, :, 0], [0, 0.216, 0.36, 0.6, 1, 0])


ADVANTAGES = t(-0.69159536, 1.04312211, -0.54560564, 0.93434875, 1.06139644, -0.45610807, 1.81231214, -0.59262047,
               1.40519368, -1.25113106, -0.52159885, 0.60459633, 0.74198184, -0.11923288).view(7, 2)
RETURNS = t(-1.66339381, 0.23410334, -0.99445962, 0.27005074, 1.24966846, -0.26696385, 2.15559876, 0.39786090,
            1.32030420, -0.37823739, 0.47557670, -0.37884171, -0.18487062, 0.81115472).view(7, 2)
LEAKED = {
    "advantages": t(-40.66887278, 43.02817917, -44.96480277, 47.58441215, -15.01235855, -24.86029365, -16.04741562,
                    -27.70838222, -18.43894829, -31.37975524, -22.57064547, -32.87165275, 48.34746342,
                    -50.11547008).view(7, 2),
    "returns": t(-41.64067123, 42.21916040, -45.41365675, 46.92011414, -14.82408653, -24.67114943, -15.70412901,
                 -26.71790085, -18.52383777, -30.50686156, -21.57346992, -33.85509079, 47.42061096,
                 -49.18508248).view(7, 2)}

# ---------------------------------------------------------------------------------------------------------------------
# critic_values


@problem("critic_values", 2)
def test_critic_values_by_hand(adapters):
    """States 5 7 9 of one number each; the second and third are those of a response; λ = (0.25, 0.75)."""
    same("weight (1 0 0), (0 1 2), bias (0, 10)",
         adapters.critic_values(column(5, 7, 9), t([0.25, 0.75]), on([0, 1, 1]), t([1, 0, 0], [0, 1, 2]), t(0, 10)),
         t([[0, 0], [5, 11.75], [7, 11.75]]), looks_like={
             "the state that has read the token itself is used": t([[0, 0], [7, 11.75], [9, 11.75]]),
             "the state after the next token is used": t([[0, 0], [9, 11.75], [0, 11.75]]),
             "mask is not used": t([[0, 11.75], [5, 11.75], [7, 11.75]]),
             "bias is left out": t([[0, 0], [5, 1.75], [7, 1.75]]),
             "λ is left out": t([[0, 0], [5, 10], [7, 10]]),
             "λ stands before the state": t([[0, 0], [0.25, 20.75], [0.25, 24.75]])})


@problem("critic_values", 2)
def test_critic_values_knows_the_row_and_what_came_before(adapters):
    """A λ a row, R = T = m = 3; the value of a token depends on the state before it and on no other."""
    lam, states, weight, bias = torch.eye(3).double(), numbers(3, 3, 2), numbers(3, 5, start=2.0), t(1, 2, 3)
    mask = on([0, 1, 1], [0, 0, 1], [0, 1, 0])
    values = adapters.critic_values(states, lam, mask, weight, bias)
    of_lam = weight.T[2:]                                             # what the three λ add: (3, m)
    other = lambda row: VALUES + (of_lam[torch.tensor(row)] - of_lam[:, None]) * mask[..., None]
    same("three rows, three dimensions", values, VALUES, looks_like={
        "the first λ counts for all rows": other([[0]]), "row t of lam is taken for token t": other([[0, 1, 2]]),
        "the mean of the preferences counts for all rows": (other([[0]]) + other([[1]]) + other([[2]])) / 3})
    for place in range(3):
        moved = states.clone()
        moved[:, place] += 1
        changed = (adapters.critic_values(moved, lam, mask, weight, bias) != values).any(0).any(1).nonzero()[:, 0]
        want = [place + 1] if place < 2 else []
        check(changed.tolist() == want, f"with the states at position {place} changed, expected other values at the "
              f"positions {want}, got other ones at {changed.tolist()}")


@problem("critic_values", 2)
def test_critic_values_gradient(adapters):
    """The critic's own numbers learn; the policy, whose states these are, does not."""
    states, weight, bias = (numbers(3, 6, 2).requires_grad_(True), numbers(2, 4, start=2.0).requires_grad_(True),
                            t(1, 2).requires_grad_(True))
    value = lambda: (adapters.critic_values(states, numbers(3, 2, start=3.0), MASK, weight, bias)
                     * numbers(3, 6, 2, start=4.0)).sum()
    got = value()
    check(got.requires_grad, "no gradient reaches weight and bias")
    got.backward()
    check(states.grad is None or not states.grad.any(), "a gradient reaches the states: learning values would move the "
          "policy")
    for name, x, index in (("weight", weight, (0, 1)), ("weight", weight, (1, 3)), ("bias", bias, (1,))):
        check(x.grad is not None, f"no gradient reaches {name}")
        same(f"the gradient to {name}{list(index)}, beside a finite difference", x.grad[index], slope(value, x, index),
             tolerance=1e-5)


VALUES = torch.zeros(3, 3, 3, dtype=torch.float64)
VALUES[0, 1], VALUES[0, 2] = t(1.64167071, 1.31183103, 4.41493098), t(1.11054445, 2.97702506, 2.99391032)
VALUES[1, 2], VALUES[2, 1] = t(2.97150603, 2.68214242, 3.23433814), t(-0.56545410, 2.62038606, 2.05705270)

# ---------------------------------------------------------------------------------------------------------------------
# aggregate_advantages


@problem("aggregate_advantages", 2)
def test_aggregate_advantages_by_hand(adapters):
    """Two rows, two tokens, two dimensions: every wrong way to broadcast fits too."""
    A, lam = t([[1, 10], [2, 20]], [[3, 30], [4, 40]]), t([1, 0], [0.5, 0.5])
    same("λ = (1, 0) and (0.5, 0.5)", adapters.aggregate_advantages(A, lam), t([1, 2], [16.5, 22]), looks_like={
        "row t of lam is taken for token t": t([1, 11], [3, 22]),
        "the first λ counts for all rows": t([1, 2], [3, 4]), "the λ of the other row counts": t([5.5, 11], [3, 4]),
        "λ is left out": t([11, 22], [33, 44]), "the sum is divided by m": t([0.5, 1], [8.25, 11]),
        "the mean of the columns is taken": t([5.5, 11], [16.5, 22]),
        "it has the wrong sign": -t([1, 2], [16.5, 22]), "the columns are those of another λ": t([10, 20], [16.5, 22]),
        "the mean of the preferences counts for all rows": t([3.25, 6.5], [9.75, 13])})


@problem("aggregate_advantages", 2)
def test_aggregate_advantages_of_other_shapes(adapters):
    """(3, 5, 4): at a vertex a row is one of its columns; rows do not mix."""
    A, lam = numbers(3, 5, 4), torch.eye(4, dtype=torch.float64)[[2, 0, 3]]
    got = adapters.aggregate_advantages(A, lam)
    same("three rows at three vertices", got, torch.stack([A[0, :, 2], A[1, :, 0], A[2, :, 3]]))
    lam = t([0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25])
    got = adapters.aggregate_advantages(A, lam)
    for r in range(3):
        same(f"row {r} of three, beside this row alone", got[r:r + 1],
             adapters.aggregate_advantages(A[r:r + 1], lam[r:r + 1]))


@problem("aggregate_advantages", 2)
def test_aggregate_advantages_has_what_all_columns_have_once(adapters):
    """Columns that differ from each other by nothing, and columns with a common part, as the KL term is."""
    common, own, lam = numbers(4, 4, start=1.0), numbers(4, 4, 3, start=2.0), t(
        [0.2, 0.3, 0.5], [1, 0, 0], [0, 0.5, 0.5], [0.6, 0.1, 0.3])
    got = adapters.aggregate_advantages(common[..., None].expand(4, 4, 3), lam)
    same("three equal columns", got, common, looks_like={
        "the common part stands three times": 3 * common, "the common part stands a third of a time": common / 3})
    same("a common part in every column, less the rest alone",
         adapters.aggregate_advantages(own + common[..., None], lam) - adapters.aggregate_advantages(own, lam), common)


# ---------------------------------------------------------------------------------------------------------------------
# ppo_policy_loss


@problem("ppo_policy_loss", 2)
def test_ppo_policy_loss_by_hand(adapters):
    """Five tokens in one call, so that no two mistakes lead to the same number; ε = 0.2."""
    ratio, A, want = t(1.5, 0.5, 1.5, 0.5, 1.1), t(2, 3, -4, -1, 1), (-2.4 - 1.5 + 6 + 0.8 - 1.1) / 5
    clamped, less = ratio.clamp(0.8, 1.2), torch.minimum
    loss = adapters.ppo_policy_loss(ratio.log()[None] - 1, -torch.ones(1, 5).double(), A[None], on([1] * 5), 0.2)
    same("ρ = 1.5 0.5 1.5 0.5 1.1, A = 2 3 -4 -1 1, ε = 0.2", loss, want, looks_like={
        "the larger of the two is taken instead of the smaller": -torch.stack([ratio * A, clamped * A]).amax(0).mean(),
        "nothing is clipped": -(ratio * A).mean(), "the clipped term alone counts": -(clamped * A).mean(),
        "it has the wrong sign": -want, "the sum is taken": 5 * want,
        "ρ is upside down": -less(A / ratio, (1 / ratio).clamp(0.8, 1.2) * A).mean(),
        "the log-ratio stands for the ratio": -less(ratio.log() * A, ratio.log().clamp(0.8, 1.2) * A).mean(),
        "the ratio is clipped to ±ε": -less(ratio * A, ratio.clamp(-0.2, 0.2) * A).mean()})


@problem("ppo_policy_loss", 2)
def test_ppo_policy_loss_gradient(adapters):
    """Beside finite differences; none where the token has moved far enough, but one where it went the wrong way."""
    old, A = t([-1, -1, -1, -1, -1, -1]), t([2, 2, -2, -2, 1, -1])
    logp = old + t([1.5, 0.5, 1.5, 0.5, 1.1, 0.9]).log()
    logp.requires_grad_(True)
    value = lambda: adapters.ppo_policy_loss(logp, old, A, on([1] * 6), 0.2)
    backward(value(), logp, "logp")
    same("ρ = 1.5 0.5 1.5 0.5 1.1 0.9, A = 2 2 -2 -2 1 -1: the gradient to logp", logp.grad,
         t([0, -1, 3, 0, -1.1, 0.9]) / 6, looks_like={
             "nothing is clipped": t([-3, -1, 3, 1, -1.1, 0.9]) / 6,
             "a token that has left the range has none, whichever way it went": t([0, 0, 0, 0, -1.1, 0.9]) / 6,
             "the larger of the two is taken instead of the smaller": t([-3, 0, 0, 1, -1.1, 0.9]) / 6,
             "ρ itself has none: A log π is differentiated": t([-2, -2, 2, 2, -1, 1]) / 6,
             "it has the wrong sign": -t([0, -1, 3, 0, -1.1, 0.9]) / 6})
    for i in range(6):
        same(f"the gradient to logp[0, {i}], beside a finite difference", logp.grad[0, i], slope(value, logp, (0, i)),
             tolerance=1e-5)


@problem("ppo_policy_loss", 2)
def test_ppo_policy_loss_is_a_mean_over_tokens(adapters):
    """Rows of 2, 4 and 1 tokens at ρ = 1, where the loss is minus the mean advantage; anything elsewhere."""
    old, A = numbers(3, 6, start=2.0) - 2, 3 * numbers(3, 6, start=3.0) + 1
    rows = (A * MASK).sum(1) / MASK.sum(1)
    looks_like = {"the mean of the rows' means is taken": -rows.mean(), "the sum is taken": -A[MASK].sum(),
                  "the divisor is the number of all positions": -A[MASK].sum() / 18,
                  "prompts and padding count": -A.mean(), "the divisor is the number of rows": -A[MASK].sum() / 3}
    same("seven tokens at ρ = 1", adapters.ppo_policy_loss(old, old, A, MASK, 0.2), -A[MASK].mean(), looks_like)
    same("the same, with large numbers at prompts and padding",
         adapters.ppo_policy_loss(noisy(old, 2.0), noisy(old, -2.0), noisy(A), MASK, 0.2), -A[MASK].mean())
    same("the same, with NaN there", adapters.ppo_policy_loss(
        noisy(old, math.nan), noisy(old, math.nan), noisy(A, math.nan), MASK, 0.2), -A[MASK].mean())
    no_gradient_outside("logp", lambda logp, noise: adapters.ppo_policy_loss(
        logp, noise(old), noise(A).where(MASK, -noise(A).abs()), MASK, 0.2), old)


@problem("ppo_policy_loss", 2)
def test_ppo_policy_loss_at_other_ratios(adapters):
    old, A = numbers(3, 6, start=4.0) - 2, 2 * numbers(3, 6, start=5.0)
    logp = old + 0.6 * numbers(3, 6, start=6.0)
    for clip, want in POLICY_LOSSES.items():
        same(f"seven tokens, ε = {clip}", adapters.ppo_policy_loss(logp, old, A, MASK, clip), want)


POLICY_LOSSES = {0.1: 0.32753487, 0.2: 0.2673134, 0.4: 0.14687046}

# ---------------------------------------------------------------------------------------------------------------------
# ppo_value_loss


@problem("ppo_value_loss", 2)
def test_ppo_value_loss_by_hand(adapters):
    """Five tokens in one call, so that no two mistakes lead to the same number; one head, ε = 0.5."""
    V, old, G = column(3, 3, 1.25, -2, -2), column(1, 1, 2, 1, 1), column(5, 1, 5, -4, 3)
    want, near = (6.125 + 2 + 7.03125 + 10.125 + 12.5) / 5, column(1.5, 1.5, 1.5, 0.5, 0.5)
    plain, clipped, more = (V - G).square(), (near - G).square(), torch.maximum
    same("V = 3 3 1.25 -2 -2, V_old = 1 1 2 1 1, G = 5 1 5 -4 3, ε = 0.5",
         adapters.ppo_value_loss(V, old, G, on([1] * 5), 0.5), want, looks_like={
             "the factor 1/2 is left out": 2 * want, "the sum is taken": 5 * want,
             "the smaller of the two is taken": torch.stack([plain, clipped]).amin(0).mean() / 2,
             "nothing is clipped": plain.mean() / 2, "the clipped term alone counts": clipped.mean() / 2,
             "V_old (1 ± ε) are the bounds": more(plain, (V.clamp(0.5 * old, 1.5 * old) - G).square()).mean() / 2,
             "errors are not squared": more(plain, clipped).sqrt().mean() / 2})


@problem("ppo_value_loss", 2)
def test_ppo_value_loss_is_a_mean_over_tokens_and_heads(adapters):
    """Rows of 2, 4 and 1 tokens, three heads (two would undo the 1/2); anything at prompts and padding."""
    V, G = 3 * numbers(3, 6, 3, start=2.0), 2 * numbers(3, 6, 3, start=3.0) + 1
    square = (V - G).square() / 2
    rows = torch.stack([square[r][MASK[r]].mean() for r in range(3)])
    same("V = V_old, seven tokens and three heads", adapters.ppo_value_loss(V, V, G, MASK, 0.5), square[MASK].mean(),
         looks_like={
             "the heads are summed": 3 * square[MASK].mean(), "the factor 1/2 is left out": 2 * square[MASK].mean(),
             "the mean of the rows' means is taken": rows.mean(),
             "everything is summed": square[MASK].sum(), "prompts and padding count": square.mean(),
             "the first head alone learns": square[MASK][:, 0].mean()})
    same("the same, with large numbers at prompts and padding",
         adapters.ppo_value_loss(noisy(V), noisy(V, -50.0), noisy(G), MASK, 0.5), square[MASK].mean())
    same("the same, with NaN there", adapters.ppo_value_loss(
        noisy(V, math.nan), noisy(V, math.nan), noisy(G, math.nan), MASK, 0.5), square[MASK].mean())
    no_gradient_outside("values", lambda values, noise: adapters.ppo_value_loss(
        values, noise(V), noise(G), MASK, 0.5), V)
    moved = V + numbers(3, 6, 3, start=4.0)
    same("V moved, ε = 0.3", adapters.ppo_value_loss(moved, V, G, MASK, 0.3), VALUE_LOSS)


@problem("ppo_value_loss", 2)
def test_ppo_value_loss_gradient(adapters):
    """(V − G) / N where the value's own error counts, none where the clipped one does; none to the returns is asked."""
    V, old, G = column(3, 3, 1.25, -2), column(1, 1, 1, 1), column(5, 1, 5, 3)
    V.requires_grad_(True)
    value = lambda: adapters.ppo_value_loss(V, old, G, on([1] * 4), 0.5)
    backward(value(), V, "the values")
    same("V = 3 3 1.25 -2, V_old = 1, G = 5 1 5 3: the gradient", V.grad, column(0, 2, -3.75, -5) / 4, looks_like={
        "nothing is clipped": column(-2, 2, -3.75, -5) / 4,
        "the smaller of the two is taken": column(-2, 0, -3.75, 0) / 4,
        "the clipped term alone counts": column(0, 0, -3.75, 0) / 4,
        "the factor 1/2 is left out": column(0, 2, -3.75, -5) / 2,
        "it has the wrong sign": -column(0, 2, -3.75, -5) / 4})
    for i in range(4):
        same(f"the gradient to values[0, {i}, 0], beside a finite difference", V.grad[0, i, 0],
             slope(value, V, (0, i, 0)), tolerance=1e-5)


VALUE_LOSS = 0.82148092

# ---------------------------------------------------------------------------------------------------------------------
# leave_one_out and normalised_groups

SCORES = t([1, 6], [2, 0], [6, 0], [0, 0], [0, 4], [3, 8])            # K = 3 responses to each of 2 prompts
LAM = t(*[[0.5, 0.5]] * 3, *[[0.25, 0.75]] * 3)                       # summed by λ: 3.5 1 3, 0 3 6.75
ONES = torch.ones(6, 1, dtype=torch.float64)
GRPO = t(0.75587181, -1.13380771, 0.37793590, -0.96095924, -0.07391994, 1.03487918)
SUMS = t(0.19938342, -0.47764190, 0.27825848, -0.89431048, -0.14432923, 1.03863972)    # GDPO's, not divided again


@problem("leave_one_out", 2)
def test_leave_one_out_by_hand(adapters):
    """Two prompts, three responses each; summed by λ the scores are 3.5 1 3, and 0 3 6.75."""
    want = t(1.5, -2.25, 0.75, -4.875, -0.375, 5.25)
    S = t(3.5, 1, 3, 0, 3, 6.75)
    same("advantages, K = 3", adapters.group_advantages(SCORES, LAM, 3, "rloo"), want, looks_like={
        "a response is in its own baseline": want * 2 / 3,
        "the baseline is the sum of the others": t(-0.5, -5.5, -1.5, -9.75, -3.75, 3.75),
        "the sum of the others is divided by K": S - (t(7.5, 7.5, 7.5, 9.75, 9.75, 9.75) - S) / 3,
        "all other responses of the batch are the baseline": 1.2 * (S - S.mean()),
        "there is no baseline": S, "it has the wrong sign": -want, "the sign is wrong, and a response is in its own "
        "baseline": -want * 2 / 3,
        "the responses to one prompt are looked for in every second row": t(0.5, -2.375, -0.25, -3.875, -0.25, 6.25),
        "λ is left out": 1.5 * t(7 - 5, 2 - 5, 6 - 5, 0 - 5, 4 - 5, 11 - 5),
        "the first λ counts for all rows": t(1.5, -2.25, 0.75, -3.75, -0.75, 4.5),
        "the group's standard deviation divides": want / t(*[1.75 ** 0.5] * 3, *[11.4375 ** 0.5] * 3)})


@problem("leave_one_out", 2)
def test_leave_one_out_is_not_in_its_own_baseline(adapters):
    """One more in a score: the response's own advantage rises by one, those of the K − 1 others fall by 1/(K − 1), and
    those of other prompts stay."""
    scores = numbers(8, 1, start=3.0)
    before, raised = adapters.group_advantages(scores, torch.ones(8, 1).double(), 4, "rloo"), scores.clone()
    raised[5] += 1
    shaped("advantages", before, 8)
    same("score 5 of 8 raised by 1, K = 4: the advantages' changes",
         adapters.group_advantages(raised, torch.ones(8, 1).double(), 4, "rloo") - before,
         [0, 0, 0, 0, -1 / 3, 1, -1 / 3, -1 / 3], looks_like={
             "a response is in its own baseline": [0, 0, 0, 0, -0.25, 0.75, -0.25, -0.25]})
    check(abs(before[:4].sum()) < 1e-9 and abs(before[4:].sum()) < 1e-9,
          "the advantages of the responses to a prompt should sum to 0")


@problem("leave_one_out", 2)
def test_leave_one_out_is_unbiased(adapters):
    """A policy of three responses, θ its logits: the mean of Σ_k A_k ∇ log π(y_k) / K over all pairs of responses, each
    with its probability, is the gradient of the mean score."""
    p, score, total = t(0.5, 0.3, 0.2), t(1, -2, 4), torch.zeros(3, dtype=torch.float64)
    for a in range(3):
        for b in range(3):
            A = adapters.group_advantages(score[[a, b]][:, None], ONES[:2], 2, "rloo")
            shaped("advantages", A, 2)
            for k, y in enumerate((a, b)):
                direction = -p.clone()
                direction[y] += 1                                     # ∇ log π(y)
                total += p[a] * p[b] * A[k] * direction / 2
    want = p * (score - p @ score)
    same("the mean estimate of the gradient", total, want, looks_like={
        "a response is in its own baseline": want / 2, "it has the wrong sign": -want})


@problem("normalised_groups", 2)
def test_normalised_groups_grpo_by_hand(adapters):
    """Summed by λ the scores are 3.5 1 3, and 0 3 6.75; their standard deviations the roots of 1.75 and 11.4375."""
    S, centred = t(3.5, 1, 3, 0, 3, 6.75), t(1, -1.5, 0.5, -3.25, -0.25, 3.5)
    std = t(*[1.75 ** 0.5] * 3, *[11.4375 ** 0.5] * 3)
    same("grpo, K = 3", adapters.group_advantages(SCORES, LAM, 3, "grpo"), GRPO, looks_like={
        "the standard deviation is divided by K instead of K − 1": centred / (std * (2 / 3) ** 0.5 + 1e-4),
        "1e-4 is not added": centred / std, "1e-4 is added to the variance": centred / (std ** 2 + 1e-4).sqrt(),
        "the variance divides": centred / (std ** 2 + 1e-4), "nothing divides": centred,
        "the baseline leaves the response out": 1.5 * centred / (std + 1e-4),
        "each dimension is divided before the sum": SUMS,
        "the standard deviation of the whole batch divides": centred / (S.std() + 1e-4),
        "mean and standard deviation are those of the whole batch": (S - S.mean()) / (S.std() + 1e-4),
        "the first λ counts for all rows":
            t(1, -1.5, 0.5, -2.5, -0.5, 3) / (t(*[1.75] * 3, *[7.75] * 3).sqrt() + 1e-4),
        "the mean is not subtracted": S / (std + 1e-4)})


@problem("normalised_groups", 2)
def test_normalised_groups_gdpo_by_hand(adapters):
    """The dimensions' standard deviations are the roots of 7 and 12, and of 3 and 16."""
    same("gdpo, K = 3", adapters.group_advantages(SCORES, LAM, 3, "gdpo"),
         t(0.29752833, -0.71275737, 0.41522903, -1.33452779, -0.21537417, 1.54990196), looks_like={
             "the sums are not divided again": SUMS, "λ sums first, as in GRPO": GRPO,
             "λ sums first, as in GRPO, and the sums are divided again": GRPO / (GRPO.std() + 1e-4),
             "standard deviations are divided by the number instead of the number less 1":
                 t(0.32593263, -0.78079895, 0.45486633, -1.46192582, -0.23593297, 1.69785880),
             "the sums are divided by their standard deviation in the group, not in the batch":
                 t(0.47971862, -1.14921149, 0.66949287, -0.91759524, -0.14808707, 1.06568231),
             "λ is left out": t(0.29979744, -0.71819323, 0.41839579, -1.18582604, -0.43403345, 1.61985948),
             "the first λ counts for all rows":
                 t(0.29977491, -0.71813924, 0.41836433, -1.18573689, -0.43400082, 1.61973771)})


@problem("normalised_groups", 2)
def test_normalised_groups_units(adapters):
    """One dimension in other units, 100 times as large: GDPO's advantages stay, GRPO's do not. All of it in other
    units: both stay."""
    scores, lam, units = 3 * numbers(8, 2, start=7.0), t(*[[0.5, 0.5]] * 4, *[[0.2, 0.8]] * 4), t(1, 100)
    for name, stays in (("gdpo", True), ("grpo", False)):
        before = adapters.group_advantages(scores, lam, 4, name)
        shaped(name, before, 8)
        check(float(before.abs().max()) > 0.5, f"{name}: expected numbers of about 1, got {before.tolist()}")
        off = float((adapters.group_advantages(units * scores, lam, 4, name) - before).abs().max())
        check((off < 1e-2) == stays, f"{name}: with the second dimension in other units the advantages "
              f"{'should stay' if stays else 'should follow that dimension'}; they differ by up to {off:.3g}")
        off = float((adapters.group_advantages(100 * scores, lam, 4, name) - before).abs().max())
        check(off < 1e-2, f"{name}: with all scores in other units the advantages should stay; they differ by up to "
              f"{off:.3g}")


@problem("normalised_groups", 2)
@pytest.mark.parametrize("name", ["grpo", "gdpo"])
def test_normalised_groups_with_equal_scores(adapters, name):
    """The first prompt's responses are all alike: nothing to learn. The other's are not."""
    scores = torch.cat([torch.full((3, 2), 0.1, dtype=torch.float64), SCORES[3:]])
    got = adapters.group_advantages(scores, LAM, 3, name)
    shaped(name, got, 6)
    same(f"{name}: advantages of the first prompt's responses, plus 1", got[:3] + 1, [1, 1, 1], looks_like={
        "0 is divided by 0": [math.nan] * 3})
    check(bool(got[3:].isfinite().all()) and bool(got[5] > 0.5) and bool(got[3] < -0.5),
          f"{name}: of the second prompt's responses the first is the worst and the last the best; got "
          f"{got[3:].tolist()}")
