"""adapters.py - where your code meets the grader.

Write your solution in files of your own, for instance solution.py in the folder above, with the names and the structure
that you like. Then let each function here call it, for instance

    import solution

    def svd_lora_linear(x, weight, bias, U, V, sigma, s, lam, gain):
        return solution.svd_lora_linear(x, weight, bias, U, V, sigma, s, lam, gain)

Keep names, arguments and return values. The grader and the experiments call these functions and nothing else.

B: rows of a batch   T: tokens   m: dimensions (objectives)   k: learned rank   r = k + m   lam: preference λ
R: responses   P: pairs   V (of logits): vocabulary
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

    lam: (m,), a tensor or a list   ->  a state dict for GPT(*model.shape); the model itself is as before
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

    losses, known: (P, m); where known is 0, losses may hold any number, which does not count
    expected: (m,), from expected_counts; None: the batch's own counts
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
    """One step of Algorithm 1, lines 6 to 8, under one preference that the model has already. Set 2: training_step.

    model(tokens) -> logits (R, T, V)   adapters_off(model): a context manager   aggregate: "ls" or "tche"
    tokens, mask: (R, T)   pairs, better: as in losses_on_pairs   lam: (m,)   expected: (m,)
    ->  the losses of the dimensions before the step, (m,), detached
    """
    raise NotImplementedError


# ---------------------------------------------------------------------------------------------------------------------
# Set 3: fronts. F: points, preferences   X: prompts   S: listed responses. All numbers are float64.


def nondominated(points: Tensor) -> Tensor:
    """Which points no other dominates; larger is better. Set 3: nondominated.

    points: (F, m)  ->  (F,) bool
    """
    raise NotImplementedError


def hypervolume_2d(points: Tensor, reference: Tensor) -> Tensor | float:
    """The area that the points dominate above the reference. Set 3: hypervolume_2d.

    points: (F, 2)   reference: (2,)  ->  a number
    """
    raise NotImplementedError


def hypervolume(points: Tensor, reference: Tensor) -> Tensor | float:
    """The volume that the points dominate above the reference, for any m. Set 3: hypervolume.

    points: (F, m)   reference: (m,)  ->  a number
    """
    raise NotImplementedError


def rlhf_objectives(logps: Tensor, ref: Tensor, scores: Tensor, outside: float, beta: float) -> Tensor:
    """J_i = E r_i − β KL(π ‖ π_ref), where everything that is said counts; mean over prompts. Set 3: everything_counts.

    logps, ref: (X, S) log-probabilities of the listed responses, which need not sum to 1   scores: (X, S, m)
    outside: the score of all other texts, in every dimension  ->  (m,)
    """
    raise NotImplementedError


def rlhf_optimum(lam: Tensor, ref: Tensor, scores: Tensor, outside: float, beta: float) -> Tensor:
    """log π* of the listed responses, for the policy with the largest Σ λ_i J_i of rlhf_objectives. Set 3: tilt.

    lam: (m,)   ref, scores, outside, beta: as in rlhf_objectives  ->  (X, S)
    """
    raise NotImplementedError


def exact_losses(h: Tensor, scores: Tensor) -> Tensor:
    """DPO's loss of every prompt in every dimension, expected over all pairs and labels. Set 3: exact_losses.

    h: (X, S), β log π/π_ref up to a constant for each prompt   scores: (X, S, m)  ->  (X, m)
    """
    raise NotImplementedError


def derivatives(h: Tensor, scores: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian of every prompt's Σ λ_i L_i in its h. Set 3: derivatives.

    h: (X, S)   scores: (X, S, m)   lam: (m,)  ->  (X, S), (X, S, S)
    """
    raise NotImplementedError


def dpo_optimum(scores: Tensor, lam: Tensor) -> Tensor:
    """The h with the smallest Σ λ_i L_i, by Newton's method. Set 3: newton.

    scores: (X, S, m)   lam: (m,)  ->  (X, S), each row with the mean 0
    """
    raise NotImplementedError


def tche_optimum(scores: Tensor, lam: Tensor) -> Tensor:
    """The h with the smallest max λ_i L_i for m = 2, L_i being means over the prompts. Set 3: tchebycheff_point.

    scores: (X, S, 2)   lam: (2,)  ->  (X, S), each row with the mean 0
    """
    raise NotImplementedError


def regret(lams: Tensor, J: Tensor, J_base: Tensor, J_best: Tensor) -> tuple[float, float, Tensor]:
    """The share of the possible gain in Σ λ_i J_i that is missing. Set 3: regret.

    lams: (F, m)   J: (F, m), of a model at these preferences   J_base: (m,)   J_best: (F, m), of the optimal policies
    ->  the regret over all preferences, the largest of a single one, and this preference (m,)
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


# ---------------------------------------------------------------------------------------------------------------------
# Set 5: min-norm weights. R: responses   T: tokens of the longest one


def min_norm_pair(a: Tensor, b: Tensor) -> Tensor:
    """The weights of the shortest point between two vectors. Set 5: min_norm_pair.

    a, b: (d,)   ->  (2,), the weight of a and that of b; ½ each if they are equal
    """
    raise NotImplementedError


def min_norm_weights(gram: Tensor) -> Tensor:
    """Weights c of the shortest mean of m vectors. Raises ValueError if gram is not finite. Set 5: min_norm_weights.

    gram: (m, m) float64, the vectors' scalar products   ->  (m,) float64
    """
    raise NotImplementedError


def mgda_backward(losses: list[Tensor], parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Writes the shortest Σ c_i ∇L_i into the parameters' .grad, over what is there. Set 5: mgda_backward.

    losses: m scalars   ->  c (m,) and the length of Σ c_i ∇L_i, (), both detached
    """
    raise NotImplementedError


def noon(advantages: Tensor, ratio: Tensor, epsilon: float) -> Tensor:
    """PAMA's "no negative" advantages. Set 5: noon.

    advantages: (R, T, m)   ratio: (R, T), π/π_old   epsilon: of PPO's clip   ->  (R, T, m)
    """
    raise NotImplementedError


def pama_weights(advantages: Tensor) -> Tensor:
    """Weights c that bring Σ c_i A_i nearest to 0, PAMA's Theorem 1. Set 5: pama_weights.

    advantages: (m,), numbers of any sign   ->  (m,); equal weights if all numbers are equal
    """
    raise NotImplementedError


def pama_advantages(advantages: Tensor, mask: Tensor, reading: str) -> tuple[Tensor, Tensor | None]:
    """The one advantage of each token that PAMA trains on. Set 5: pama_advantages.

    advantages: (R, T, m), not negative   mask: (R, T), 1.0 on tokens, 0.0 on padding   reading: "V", "S" or "T"
    ->  (R, T), anything at padding; c (m,), None for "T"
    """
    raise NotImplementedError


# ---------------------------------------------------------------------------------------------------------------------
# Set 6: fast and large.   N: places   D: width   V: vocabulary, or a factor of the branch   T: nodes of a tree
# F: preferences   n, A: scored responses


def linear_logprob(hidden: Tensor, weight: Tensor, target: Tensor, block: int) -> Tensor:
    """log p(target) under softmax(hidden · weightᵀ), `block` words at a time. Set 6: logprob_forward, logprob_backward.

    hidden: (N, D)   weight: (V, D)   target: (N,) int64   ->  (N,)
    """
    raise NotImplementedError


def pack_tree(prompt: list[int], responses: list[list[int]]) -> tuple[Tensor, Tensor, list[list[int]]]:
    """A prompt and its R responses as a tree that has every shared beginning once. Set 6: pack_tree.

    ->  tokens (T,) int64; parents (T,) int64, the node before each node, -1 for the first; paths, R lists of nodes
    """
    raise NotImplementedError


def tree_attention(parents: Tensor) -> tuple[Tensor, Tensor]:
    """Where nodes stand and what they see. Set 6: tree_attention.

    parents: (T,) int64   ->  positions (T,) int64; mask (T, T) bool, True where the node of the row may look
    """
    raise NotImplementedError


def tree_logprobs(hidden: Tensor, weight: Tensor, tokens: Tensor, parents: Tensor, paths: list[list[int]]) -> Tensor:
    """log π(y|x) of every response of a tree. Set 6: tree_logprobs.

    hidden: (T, D), the model's states at the nodes   weight: (V, D)   the others: from pack_tree   ->  (R,)
    """
    raise NotImplementedError


def svd_lora_by_hand(x: Tensor, weight: Tensor, bias: Tensor | None, U: Tensor, V: Tensor, d: Tensor,
                     gain: float) -> Tensor:
    """A linear layer with an SVD-LoRA branch, singular values for each row, and its own backward. Set 6:
    svd_lora_backward.

    x: (B, T, d_in)   weight: (d_out, d_in) and bias: (d_out,) or None, both frozen   U: (d_out, r)   V: (d_in, r)
    d: (B, r)   ->  (B, T, d_out)
    """
    raise NotImplementedError


def direction_distance(unit: Tensor, lam: Tensor) -> Tensor:
    """How far points are from a preference's direction. Set 6: direction_distance.

    unit: (n, m), scores on a scale from 0, the worst, to 1, the best   lam: (m,)   ->  (n,)
    """
    raise NotImplementedError


def select_pareto(scores: Tensor, lams: Tensor, k: int, at_least: int) -> Tensor:
    """The k responses that each preference is trained on, stage 1. Set 6: pareto_selection.

    scores: (n, m)   lams: (F, m)   at_least: points that the pool has at the least   ->  (F, k) int64
    """
    raise NotImplementedError


def representatives(lams: Tensor) -> list[int]:
    """Which preferences' models answer prompts in stage 2: indices into lams, (F, m). Set 6: stage_two."""
    raise NotImplementedError


def select_answers(answers: list[tuple[str, str]], ended: Tensor, scores: Tensor, lams: Tensor, k: int,
                   at_least: int) -> Tensor:
    """The k // 2 answers that each preference goes on with, stage 2. Set 6: stage_two.

    answers: A pairs (prompt, response)   ended: (A,) bool   scores: (A, m)   lams: (F, m)   ->  (F, k // 2) int64
    """
    raise NotImplementedError
