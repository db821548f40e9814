"""adapters.py - where your code meets the grader.

Write your solution in files of your own, for instance solution.py in the folder above, with the names and the structure
that you like. Then let each function here call it, for instance

    def svd_lora_linear(x, weight, bias, U, V, sigma, s, lam, gain):
        return solution.svd_lora_linear(x, weight, bias, U, V, sigma, s, lam, gain)

Keep names, arguments and return values. The grader and the experiments call these functions and nothing else.

B: rows of a batch   T: tokens   m: dimensions (objectives)   k: learned rank   r = k + m   lam: preference λ
R: responses   P: pairs   V (of logits): vocabulary   D: width of a hidden state
"""
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------------------------
# Set 1: SVD-LoRA and one preference a row.


def svd_lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, U: Tensor, V: Tensor, sigma: Tensor, s: Tensor,
                    lam: Tensor, gain: float) -> Tensor:
    """The output of a linear layer with an SVD-LoRA branch. Set 1: svd_lora_forward, preference_per_row.

    x: (B, T, d_in)   weight: (d_out, d_in)   bias: (d_out,) or None   U: (d_out, r)   V: (d_in, r)
    sigma: (k,)   s: ()   lam: (m,), for all rows, or (B, m), one preference a row   ->  (B, T, d_out)
    """
    raise NotImplementedError


def inject(model: nn.Module, k: int, m: int, gain: float, generator=None) -> None:
    """Puts an SVD-LoRA branch on every nn.Linear inside model.blocks, and freezes all else, in place. Set 1: inject.

    generator: a torch.Generator for U and V
    """
    raise NotImplementedError


def parts(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The learned tensors themselves (no copies) of every layer that inject has changed. Set 1: inject.

    ->  {"blocks.0.attn.q": {"U": (d_out, r), "V": (d_in, r), "sigma": (k,), "s": ()}, …}, by the layers' names
    """
    raise NotImplementedError


def set_preference(model: nn.Module, lam) -> None:
    """The preference of the forward passes to come. Raises ValueError if it is none. Set 1: set_preference.

    lam: (m,), for all rows, or (B, m), one a row; a tensor or a list
    """
    raise NotImplementedError


def adapters_off(model: nn.Module):
    """A context manager: within it, the model computes what it did before inject. Set 1: adapters_off."""
    raise NotImplementedError


def merged_state_dict(model: nn.Module, lam) -> dict[str, Tensor]:
    """The weights of a plain model without branches that computes the same at this one preference. Set 1: merge.

    lam: (m,)   ->  a state dict for GPT(*model.shape); the model itself is as before
    """
    raise NotImplementedError


def orthogonality_penalty(model: nn.Module) -> Tensor:
    """How far the columns of all U and V are from orthonormal, a scalar. Set 1: orthogonality."""
    raise NotImplementedError


# ---------------------------------------------------------------------------------------------------------------------
# Set 2: DPO on several dimensions.


def response_logprobs(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """log π(y|x) of every response. Set 2: response_logprobs.

    logits: (R, T, V), the model's at `tokens`   tokens: (R, T), prompt, response and padding
    mask: (R, T) bool, True on the tokens of the response   ->  (R,)
    """
    raise NotImplementedError


def dpo_loss(pi_chosen: Tensor, pi_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """DPO's loss of every pair. Set 2: dpo_loss.

    Four tensors of one shape: log-probabilities of responses under π and π_ref   ->  a tensor of that shape
    """
    raise NotImplementedError


def losses_on_pairs(pi: Tensor, ref: Tensor, pairs: Tensor, better: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """DPO's loss of every pair in every dimension. Set 2: losses_on_pairs.

    pi, ref: (R,) log-probabilities   pairs: (P, 2) indices of responses
    better: (P, m), 0: the first of the pair is better, 1: the second is, -1: nobody said
    ->  losses (P, m), 0 where there is no label; known (P, m), 1.0 where there is a label, else 0.0
    """
    raise NotImplementedError


def expected_counts(better: list[Tensor], batch_size: int) -> Tensor:
    """How many labels of each dimension a batch has on average. Set 2: uneven_labels.

    better: one (P_j, m) tensor of labels for each row of the data   batch_size: rows in a batch   ->  (m,)
    """
    raise NotImplementedError


def mean_losses(losses: Tensor, known: Tensor, expected: Tensor | None) -> Tensor:
    """The losses of the dimensions. Set 2: uneven_labels.

    losses, known: (P, m), from losses_on_pairs   expected: (m,), from expected_counts; None: the batch's own counts
    ->  (m,)
    """
    raise NotImplementedError


def linear_scalarization(losses: Tensor, lam: Tensor) -> Tensor:
    """losses, lam: (…, m)  ->  (…). Set 2: linear_scalarization."""
    raise NotImplementedError


def tchebycheff(losses: Tensor, lam: Tensor, ideal: Tensor | None = None) -> Tensor:
    """losses, lam: (…, m)   ideal: (m,), None: zeros  ->  (…). Set 2: tchebycheff."""
    raise NotImplementedError


def sample_preference(n: int, m: int, alpha: float, vertex_share: float, generator=None) -> Tensor:
    """n preferences: with probability vertex_share a vertex, else Dirichlet(alpha). Set 2: sample_preference.

    generator: a torch.Generator; all randomness comes from it   ->  (n, m)
    """
    raise NotImplementedError


def training_step(model: nn.Module, adapters_off, optimizer, tokens: Tensor, mask: Tensor, pairs: Tensor,
                  better: Tensor, lam: Tensor, beta: float, expected: Tensor, aggregate: str) -> Tensor:
    """One step of Algorithm 1, lines 6 to 8, under one preference that is set already. Set 2: training_step.

    model(tokens) -> logits (R, T, V)   adapters_off(model): a context manager   aggregate: "ls" or "tche"
    tokens, mask: (R, T)   pairs, better: as in losses_on_pairs   lam: (m,)   expected: (m,)
    ->  the losses of the dimensions before the step, (m,), detached
    """
    raise NotImplementedError


# ---------------------------------------------------------------------------------------------------------------------
# Set 4: RLHF. mask: (R, T) bool, True on the tokens of the response; prompts come before them, padding behind.


def token_logprobs(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """log π(y_t|x, y_<t) of every token of a response, at its own place, and 0 elsewhere. Set 4: token_logprobs.

    logits: (R, T, V), the model's at `tokens`   tokens, mask: (R, T)   ->  (R, T)
    """
    raise NotImplementedError


def kl_penalized_rewards(score: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, kl_coeff: float,
                         clip: float) -> Tensor:
    """The rewards of the tokens, one column a dimension. Set 4: kl_penalized_rewards.

    score: (R, m)   logp, ref_logp: (R, T), of π_old and π_ref   clip: a reward lies within ± this   ->  (R, T, m)
    """
    raise NotImplementedError


def gae(rewards: Tensor, values: Tensor, mask: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation with γ = 1, every column by itself. Set 4: gae.

    rewards, values: (R, T, m)   decay: between 0 and 1   ->  advantages and returns, both (R, T, m)
    """
    raise NotImplementedError


def critic_values(states: Tensor, lam: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear critic with one head a dimension. Set 4: critic_values.

    states: (R, T, D), the one at position t has read the tokens up to t   lam: (R, m), one preference a row
    weight: (m, D + m)   bias: (m,)   ->  (R, T, m)
    """
    raise NotImplementedError


def aggregate_advantages(advantages: Tensor, lam: Tensor) -> Tensor:
    """advantages: (R, T, m)   lam: (R, m), one preference a row   ->  (R, T). Set 4: aggregate_advantages."""
    raise NotImplementedError


def ppo_policy_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> Tensor:
    """PPO's clipped loss of the policy, a scalar. Set 4: ppo_policy_loss.

    logp, old_logp: (R, T), of π and π_old   advantages: (R, T)   clip: how far the ratio counts
    """
    raise NotImplementedError


def ppo_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """PPO's clipped loss of the critic, a scalar. Set 4: ppo_value_loss.

    values, old_values, returns: (R, T, m)   clip: how far a value counts as moved
    """
    raise NotImplementedError


def group_advantages(scores: Tensor, lam: Tensor, samples: int, estimator: str) -> Tensor:
    """One advantage for each response, from the others to its prompt. Set 4: leave_one_out, normalised_groups.

    scores: (R, m), the responses to a prompt in `samples` rows that follow each other   lam: (R, m), equal in these
    estimator: "rloo", "grpo" or "gdpo"   ->  (R,)
    """
    raise NotImplementedError
