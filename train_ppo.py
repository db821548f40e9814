"""train_ppo.py - RLHF for the whole front: PPO with Panacea (arXiv:2402.02030v1, Eq. (12), (13)), its baselines, PAMA.

    python train_ppo.py --pref_dim 2                        # the embedded world
    python train_ppo.py --pref_dim 2 --aggregate tche       # Tchebycheff instead of linear scalarisation
    python train_ppo.py --pref_dim 2 --method rs            # rewarded soups; dps: one model per preference (MORLHF)
    python train_ppo.py --pref_dim 2 --aggregate pama       # PAMA: one policy, no preference; mgda: by gradients
    python train_ppo.py --pref_dim 2 --estimator gae        # with a critic, as the paper has it
    python train_ppo.py --rewards happy concise --init <Hugging Face directory> --prompts stories.txt
    torchrun --nproc_per_node 4 train_ppo.py …              # the same on several GPUs; --parallel fsdp: a sharded base

m: dimensions   X: prompts per step, each with --samples responses   R: responses (--batch_size), R' of a minibatch
L: tokens of the longest   β: --kl_coeff   lam: (X, m), one λ per prompt, fixed from the rollout through all its updates
r: (R, m) rewards, normalised by the mean and the standard deviation that they have under the reference policy
A: (R', L, n) advantages. n = m for linear scalarisation, PAMA and MGDA: one critic head per dimension, and every head's
token rewards have the full KL penalty. The weights λ_i sum to 1 and GAE is linear, so A_λ = Σ λ_i A_i is the advantage
of Σ λ_i r_i − β KL, with the penalty once. Tchebycheff is not linear: n = 1, for its own reward. Without a critic
(--estimator) the advantage is a response's, the same for all its tokens, and already summed by λ: n = 1.
The reference is the same model with the adapter off. Several processes share out the prompts of every minibatch, and
means are over all of them (runs/processes.py). A killed run continues from its last checkpoint, bit for bit.
"""
import runs.waiting  # noqa: F401  # isort: skip
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

import eval_front
from aggregate import (
    linear_scalarization,
    min_norm_weights,
    models_of,
    pama_advantages,
    sample_preference,
    scalar_reward,
)
from data import toy
from data.base import find_base, load_base
from data.batches import pad_to
from data.chat import announce
from data.files import plain_name
from data.prompts import read_prompts, split
from data.rewards import of_world, world_ideal
from data.sources import check_rewards, rewards_in, room_for_prompts
from data.text_rewards import collapsed
from data.tokenizers import TokenRow, as_begun, spoken, tokenize
from data.trees import TreeBatch, batch_logprobs, pack, path_logprobs, predicting_states
from objectives import gae, group_advantages, kl_penalized_rewards, noon, ppo_policy_loss, ppo_value_loss, sft_loss
from ops.heads import Critic
from runs.directory import TRAINED, adapter_file, models_left, open_run, run_directory, steps_each
from runs.files import UserError, bar
from runs.flags import (
    AdapterFlags,
    BaseFlags,
    PreferenceFlags,
    ProcessFlags,
    RewardFlags,
    RunFlags,
    check_lam,
    flag,
    run_main,
)
from runs.loop import Run, adamw, add_adapter
from runs.processes import (
    all_max,
    all_sum,
    check_shares,
    generate_all,
    in_shares,
    init_distributed,
    pick_device,
    reduce_gradients,
    shard,
    sharded,
    share,
    sum_of_all,
    variance,
    whole_rows,
)
from runs.randomness import epoch_batch, generator_for
from runs.speed import matmul_ceiling
from svd_lora import adapters_off, save_adapter, set_preference

REFERENCE_SAMPLES = 256     # responses of the reference policy that text rewards are normalised on
PTX_SAMPLES = 4             # embedded world: responses per prompt drawn for PTX from what the base was trained on


@dataclass
class Flags(RunFlags, BaseFlags, AdapterFlags, PreferenceFlags, RewardFlags, ProcessFlags):
    """The script's flags, with defaults and --help texts; more in runs/flags.py."""

    reward_scale: list[float] | None = flag(None, "factors on the normalised rewards (the paper's harmless × 5), "
                                                  "beside a reward model's own", "positive")
    aggregate: Literal["ls", "tche", "pama", "mgda"] = flag(
        "ls", "linear scalarisation, Eq. (12); Tchebycheff, Eq. (13); or, without any preference, PAMA or MGDA")
    estimator: Literal["gae", "rloo", "grpo", "gdpo"] | None = flag(
        None, "advantages: GAE with a critic, the paper's; or, without one (its flags have no effect), a response "
              "beside the others to its prompt (--samples, at least 2): leave-one-out, GRPO, GDPO (default grpo where "
              "a prompt has several responses, gae for pama and mgda)")
    pama_reading: Literal["V", "T", "S"] = flag(
        "V", "what PAMA minimises: the norm of the vector over tokens, each token alone, or the batch means")
    prompts: list[str] | None = flag(None, "prompt files: rows of any layout of data/README.md, or stories in .txt "
                                           "(default: the embedded world's)")
    max_new_tokens: int = flag(64, "a response that has not ended by then is cut off there, and counted", 1)
    # Table 1
    kl_coeff: float | None = flag(
        None, "β of Eq. (12) (default 0.5 on the embedded world, 0.02 otherwise)", "positive")
    clip_range_ratio: float = flag(0.2, "ε of PPO's clipped ratio", "positive")
    clip_range_score: float = flag(50.0, "a token's reward, KL term and all, is clamped to ± this", "positive")
    clip_range_value: float = flag(5.0, "how far the critic may move from its value at the rollout", "positive")
    ptx_coeff: float = flag(0.0, "weight of the SFT loss beside PPO's (Table 1: 16, for its own scale of rewards)",
                            "not negative")
    update_iters: int = flag(1, "passes of the policy over a rollout", 1)
    critic_iters: int = flag(4, "passes of the critic over it", 1)
    critic_lr: float = flag(3e-3, "learning rate of the critic, constant (Table 1: 1e-3, for a whole language model)",
                            "positive")
    weight_decay: float = flag(0.01, "AdamW's, on U and V only", "not negative")
    # beside the paper
    lr: float = flag(2e-3, "peak learning rate of the adapter, then a cosine to 0", "positive")
    steps: int = flag(100, "rollouts in all, shared evenly by the models of rs and dps", 1)
    batch_size: int = flag(256, "R: responses per rollout", 1)
    samples: int | None = flag(None, "responses to each prompt, under one λ (default 16 on the embedded world, where "
                                     "they share most of their computation; else 1, the paper's)", 1)
    minibatch: int | None = flag(None, "responses per optimizer step (default: a quarter of a rollout, where it "
                                       "divides)", 1)
    lams_per_step: int | None = flag(None, "G: preferences per rollout, each on the same number of prompts; 1 is the "
                                           "paper's (default: one per prompt)", 1)
    gae_lambda: float = flag(0.95, "λ of generalised advantage estimation; γ is 1", "share")
    save_every: int = flag(100, "write a checkpoint every so many steps", 1)


def train(model, out, name, fixed_lam, prompts, rows, weights, rewards, tokenizer, flags, steps, member, resume,
          device):
    """Algorithm 1 with PPO for one adapter, written to out/name. fixed_lam: None for Panacea, else (m,)."""
    m, each, X = len(rewards.dims), flags.samples, flags.batch_size // flags.samples
    n, G = 1 if flags.aggregate == "tche" else m, (flags.lams_per_step or X) if fixed_lam is None else 1
    add_adapter(model, flags, m if fixed_lam is None else 0, member)
    if flags.parallel == "fsdp":
        shard(model, device)
    critic, critic_optimizer = add_critic(model, m, n, flags, member, device)        # None, None but for gae
    run = Run(model, adamw(model, flags, (0.9, 0.99)), out, name, flags, steps, rewards.dims, member, resume,
              critic=critic, critic_optimizer=critic_optimizer)
    set_lam = (lambda lam: set_preference(model, lam)) if fixed_lam is None else lambda lam: None

    for step in run.steps():
        # Algorithm 1, line 5: a batch of prompts
        draw = member * steps + step
        chosen = epoch_batch(len(rows), X, flags.seed, draw).tolist()
        batch_rows = [rows[j] for j in chosen]

        # line 6: a λ for each, fixed to the end of the step: J_i is an expectation over this λ's own responses
        lam = (fixed_lam.expand(G, m) if fixed_lam is not None else
               sample_preference(G, m, vertex_share=flags.vertex_share,
                                 generator=generator_for(flags.seed, "lambda", step)))
        lam = lam.repeat_interleave(X // G, dim=0).to(device)                         # (G, m) -> (X, m)
        lam_of = lam.repeat_interleave(each, dim=0)                                   # (R, m), the λ of each response

        # rollout: `each` responses y ~ π_λ(·|x) to every prompt, and their rewards r_i(x, y)
        set_lam(lam_of[share()])                                                      # d = cat(σ, s·λ), Eq. (9)
        responses = rollout(model, batch_rows, tokenizer, flags, draw, run)           # R lists of tokens
        texts, finished = spoken(responses, tokenizer)
        asked = [prompts[j].prompt for j in chosen for _ in range(each)]
        raw = in_shares(rewards.raw, [asked, texts, finished], device)                # (R, m)
        r, r_lam, score = scores(raw, lam_of.cpu(), rewards, run, flags)              # (R, m), (R,), (R, n)

        # line 7: a token's reward is −β (log π − log π_ref), the KL term of Eq. (1); the last one's score comes on top
        parts = []
        for index in torch.arange(X).split(flags.minibatch // each):
            index = index[share()]                                                    # with torchrun, this process's
            set_lam(lam[index])
            e = observe(model, batch_rows, responses, index, run, flags, device)      # log π and log π_ref: (R', L)
            e.lam = lam_of[e.responses]                                               # R' responses of this minibatch
            e.rewards = kl_penalized_rewards(score[e.responses].to(device), e.old, e.ref, e.mask, flags.kl_coeff,
                                             flags.clip_range_score)                  # (R', L, n)
            parts.append(e)
        estimate_advantages(parts, critic, lam_of, flags)                             # (R', L, n)

        # line 8: the policy climbs the clipped surrogate of the aggregated advantage; the critic learns the returns
        own, first_ratio, ptx = own_texts(batch_rows, chosen, weights, flags, draw), None, None
        for e in parts * flags.update_iters:
            set_lam(lam[e.index])
            logp = path_logprobs(model, e.batch)                                      # (R', L)
            first_ratio = first_ratio or all_max((logp - e.old).abs().max()).exp().item()     # 1: observe()'s numbers
            loss, figures = policy_loss(e, logp, run, flags)                          # figures: for the log
            if own:                                                                   # --ptx_coeff: SFT beside PPO
                ptx = ptx_loss(model, [own[x] for x in e.index], run, device)
                loss = flags.ptx_coeff * ptx + (0 if loss is None else loss)
            run.update(loss)
        value_loss = update_critic(critic, critic_optimizer, parts * flags.critic_iters, flags)
        log(run, parts, raw, r, r_lam, lam, responses, finished, flags, **figures, first_ratio=first_ratio,
            value_loss=value_loss, ptx=0.0 if ptx is None else ptx.item())
    save_adapter(model, adapter_file(out, name), rewards.dims, method=flags.method, beta=flags.kl_coeff,
                 lam=None if fixed_lam is None else fixed_lam.tolist())


# ---------------------------------------------------------------------------------------------------------------------
# The parts of a step.

def add_critic(model, m, n, flags, member, device):
    """A fresh critic and its optimizer; None and None for an --estimator without one."""
    if flags.estimator != "gae":
        return None, None
    critic = Critic(model.config.d_model, m, n, generator_for(flags.seed, "critic", member)).to(device)
    return critic, torch.optim.AdamW(critic.parameters(), lr=flags.critic_lr, weight_decay=0.0, fused=True)


def rollout(model, rows, tokenizer, flags, draw, run):
    """Samples --samples responses to each row's prompt from the model as it is: a list of R token lists."""
    prompts = [row.prompt for row in rows for _ in range(flags.samples)]
    responses = generate_all(model, prompts, flags.max_new_tokens, tokenizer.ends,
                             generator_for(flags.seed, "rollout", draw), tokenizer.vocab_size)
    drawn = sum(map(len, responses[share()]))
    run.work(drawn + sum(map(len, prompts[share()])), drawn, base=2)
    return responses


def scores(raw, lam, rewards, run, flags):
    """Rewards and what PPO is run on. raw, lam: (R, m) -> r (R, m) normalised; r_lam (R,), the one reward of Eq. (12)
    or (13); score (R, n): r itself for linear scalarisation, whose advantages are weighed later, else r_lam.

    Tchebycheff's z is --ideal, or the largest rewards so far; a resumed run goes on with those.
    """
    r, tche, ideal = rewards.normalise(raw), flags.aggregate == "tche", run.kept.get("ideal", flags.ideal)
    if tche and flags.ideal is None:
        ideal = torch.tensor([*r.tolist(), ideal or r[0].tolist()]).amax(0).tolist()
    run.kept["ideal"] = ideal
    r_lam = scalar_reward(r, lam, "tche" if tche else "ls", None if ideal is None else torch.tensor(ideal))
    return r, r_lam, (r_lam[:, None] if tche else r).float()


@dataclass
class Experience:
    """What one minibatch of a rollout keeps for its updates: R' responses to some of the step's X prompts, of this
    process."""
    batch: TreeBatch
    index: torch.Tensor             # which of the X prompts
    responses: torch.Tensor         # (R',) which of the R responses
    tokens: torch.Tensor            # () how many all processes have in it: what means are over
    mask: torch.Tensor              # (R', L)
    states: torch.Tensor            # (R', L, D) hidden states of the policy
    old: torch.Tensor               # (R', L) log π_old
    ref: torch.Tensor               # (R', L) log π_ref
    lam: torch.Tensor = None        # (R', m)
    rewards: torch.Tensor = None    # (R', L, n)
    values: torch.Tensor = None     # (R', L, n)
    advantages: torch.Tensor = None     # (R', L, n), or (R', L, 1) where they are summed by λ already
    returns: torch.Tensor = None    # (R', L, n)


@torch.no_grad()
def observe(model, rows, responses, index, run, flags, device):
    """Log-probs of the responses to the prompts `index` under policy and reference, and the policy's states.

    It packs the minibatch as its update will, whose forward pass then gives the very same numbers: the first ratio
    π/π_old is exactly 1.
    """
    each = flags.samples
    batch = pack([TokenRow(rows[x].prompt, responses[x * each:(x + 1) * each]) for x in index],
                 pad_to(device)).to(device)
    for base in (2, 2, *[4] * flags.update_iters):    # FLOPs: policy and reference forward, then the updates
        run.work(*batch.size, base)
    states = predicting_states(model, batch)                                          # (N, D)
    old = path_logprobs(model, batch, states)                                         # (R', L)
    with adapters_off(model):
        ref = path_logprobs(model, batch)
    of = (index[:, None] * each + torch.arange(each)).flatten()                       # (R',)
    return Experience(batch, index, of, all_sum(batch.on_path.sum()), batch.on_path, batch.along(states), old, ref)


def estimate_advantages(parts, critic, lam_of, flags):
    """Writes the advantages of every token into the parts of a rollout, a list of Experience. lam_of: (R, m)

    With a critic by GAE, and the returns that it is to learn. Else relative to the group: a response's tokens all have
    the advantage of its whole reward, Σ_t of their token rewards; linear scalarisation sums by λ here.
    """
    if critic is not None:
        for e in parts:
            e.values = critic(e.states, e.old, e.lam).detach()                        # (R', L, n)
            e.advantages, e.returns = gae(e.rewards, e.values, e.mask, 1.0, flags.gae_lambda)
        return
    lam = lam_of if flags.aggregate == "ls" else None
    scores = whole_rows(torch.cat([e.rewards.sum(1) for e in parts]), torch.cat([e.responses for e in parts]),
                        len(lam_of), lam_of.device)                                   # (R, n), with their KL
    A = group_advantages(scores, flags.samples, flags.estimator, lam)                 # (R, 1) or (R, n)
    for e in parts:
        e.advantages = A[e.responses, None].expand(-1, e.mask.shape[1], -1)           # (R', L, 1) or (R', L, n)


def policy_loss(e, logp, run, flags):
    """The clipped surrogate of a minibatch under its aggregated advantage, and figures for the log.

    ls: A_λ = Σ λ_i A_i, Eq. (12). tche: the advantage of its one reward, Eq. (13). pama: the combination of the "no
    negative" advantages (PAMA Eq. (5)) that has the smallest norm. mgda: the gradients of all m surrogates are combined
    instead, and are in place already: the loss is None.
    """
    surrogate, c = lambda A: ppo_policy_loss(logp, e.old, A, e.mask, flags.clip_range_ratio, e.tokens), None
    if flags.aggregate == "mgda":
        losses = [surrogate(A)[0] for A in e.advantages.unbind(-1)]
        c = mgda_backward(losses, [p for _, p in run.trained])
        A = linear_scalarization(e.advantages, c.to(e.advantages))
    elif flags.aggregate == "pama":
        positive = noon(e.advantages, (logp - e.old).detach().exp(), flags.clip_range_ratio)
        A, c = pama_advantages(positive, e.mask, flags.pama_reading, all_sum)
    elif e.advantages.shape[-1] > 1:
        A = linear_scalarization(e.advantages, e.lam[:, None])                        # (R', L, n) -> (R', L)
    else:
        A = e.advantages[..., 0]
    loss, clipped, moved = map(sum_of_all, surrogate(A))
    figures = {"loss": loss.item(), "clip_fraction": clipped.item(), "moved": moved.item(),
               "weights": None if c is None else c.tolist()}
    return None if flags.aggregate == "mgda" else loss, figures


def mgda_backward(losses, parameters):
    """Writes Σ c_i ∇L_i into the parameters' .grad, with the c of the shortest such sum. Returns c (m,) float64.

    c is that of all processes' gradients; .grad is this one's part, and Run.update adds the parts up.
    """
    grads = [torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True) for loss in losses]
    flat = torch.stack([torch.cat([g.flatten() for g in grad]) for grad in grads])             # (m, parameters)
    flat = all_sum(flat).double()
    c = min_norm_weights(flat @ flat.T)
    for p, *each in zip(parameters, *grads):
        p.grad = sum(w * g for w, g in zip(c.tolist(), each))
    return c


def own_texts(rows, chosen, weights, flags, draw):
    """The rows with texts of their own to learn by SFT beside PPO, none without --ptx_coeff. weights: of the embedded
    world's responses, of which some are drawn; None: all."""
    if not flags.ptx_coeff or weights is None:
        return rows if flags.ptx_coeff else []
    g, own = generator_for(flags.seed, "ptx", draw), []
    for row, j in zip(rows, chosen):
        drawn = torch.multinomial(weights[j], PTX_SAMPLES, replacement=True, generator=g).tolist()
        own.append(replace(row, responses=[row.responses[s] for s in drawn]))
    return own


def ptx_loss(model, rows, run, device):
    """The SFT loss, nats per token, of rows with texts of their own, under the λ in place."""
    batch = pack(rows, pad_to(device)).to(device)
    run.work(*batch.size, base=4)
    return sum_of_all(sft_loss(batch_logprobs(model, batch)).sum() / all_sum(batch.on_path.sum()))


def update_critic(critic, optimizer, parts, flags):
    """One step on each of the parts, a list of Experience. Returns the last value loss; None without a critic."""
    if critic is None:
        return None
    for e in parts:
        V = critic(e.states, e.old, e.lam)                                            # (R', L, n)
        loss = sum_of_all(ppo_value_loss(V, e.values, e.returns, e.mask, flags.clip_range_value, e.tokens))
        loss.backward()
        reduce_gradients(list(critic.parameters()))
        torch.nn.utils.clip_grad_norm_(critic.parameters(), flags.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def explained_variance(parts):
    """1 − Var(returns − values) / Var(returns) over all tokens, the mean over the n heads; 0 for equal returns, None
    without a critic."""
    if parts[0].returns is None:
        return None
    tokens = lambda key: torch.cat([getattr(e, key)[e.mask.bool()] for e in parts])                # (tokens, n)
    returns, values = tokens("returns"), tokens("values")
    spread, missed = variance(returns), variance(returns - values)                                 # (n,)
    return torch.where(spread > 1e-9, 1 - missed / spread.clamp(min=1e-9), 0.0).mean().item()


def log(run, parts, raw, r, r_lam, lam, responses, finished, flags, **figures):
    """The record of a step (docs/metrics.md)."""
    n, lengths = len(responses), [len(y) for y in responses]
    kl = all_sum(sum(((e.old - e.ref) * e.mask).sum().double() for e in parts)).item() / n
    run.log(sum(lengths[share()]), None,
            ("rewards", "kl", "objective", "explained_variance", "clip_fraction", "weights", "length", "finished"),
            rewards=raw.mean(0).tolist(), normalised=r.mean(0).tolist(), kl=kl,
            objective=r_lam.mean().item() - flags.kl_coeff * kl, explained_variance=explained_variance(parts),
            ideal=run.kept["ideal"], lam=lam.tolist(), length=sum(lengths) / n, finished=sum(finished) / n,
            collapsed=sum(map(collapsed, responses)) / n, **figures)


# ---------------------------------------------------------------------------------------------------------------------

def main(flags):
    """Trains one run (one adapter, or the several of rs and dps) and evaluates its front. Returns the run directory."""
    device, dtype = pick_device(flags.device, flags.precision, flags.plain)
    _, processes, device = init_distributed(device)
    given = replace(flags)
    check(flags)
    matmul_ceiling(device, dtype)                                      # now, while nothing else runs
    base, tokenizer_name = find_base(flags.init, flags.size, flags.tokenizer, device)
    load = lambda: load_base(base, tokenizer_name, device, dtype, flags)
    model, tokenizer = load()
    rewards = rewards_in(flags, flags.prompts, flags.reward_scale, model, device)
    check_lengths(flags, rewards.dims)
    defaults(flags, rewards, processes)
    prompts, weights = training_prompts(flags)
    length = room_for_prompts(flags, model.config)
    m, single = len(rewards.dims), flags.aggregate in ("pama", "mgda")  # single: one policy, without a preference
    if single:
        flags.method, flags.lam = "dps", [1 / m] * m
    parts = [plain_name(f.partition(":")[0]) for f in (flags.prompts or []) + (flags.rewards or []) if "/" in f]
    out = run_directory(["ppo", *parts], {"prompts", "rewards", "fields"}, given, flags, rewards.dims)
    tokenizer = as_begun(tokenizer, out, flags.overwrite)
    announce(tokenizer.template, [row.prompt for row in prompts])
    rows, cut = tokenize(prompts, tokenizer, length, max_prompt=length - flags.max_new_tokens)
    print("prompts: {prompts}, {prompts_cut} cut".format(**cut))
    if flags.ptx_coeff and not all(row.responses for row in rows):
        raise UserError("--ptx_coeff needs prompts that all have their own text: stories, or a field \"response\"")

    models = models_of(flags.method, rewards.dims, flags.dps_parts, flags.lam)
    steps = steps_each(flags, models)
    if None in rewards.mean:
        measure_rewards(rewards, model, prompts, rows, tokenizer, flags, device)
    method = flags.aggregate if single else flags.method
    objective = {"name": "rlhf", "beta": flags.kl_coeff, "aggregate": "tche" if flags.aggregate == "tche" else "ls",
                 "ideal": flags.ideal}
    resume = open_run("train_ppo.py", out, flags, rewards.dims, model, base, tokenizer, method, objective=objective,
                      models=len(models), rewards=rewards.description(), prompts=flags.prompts)
    if resume == TRAINED:
        return eval_front.show(out, flags)
    for i, (name, lam), state in models_left(models, resume):
        if sharded(model):                                             # by the adapter before
            model, _ = load()
        train(model, out, name, lam, prompts, rows, weights, rewards, tokenizer, flags, steps, i, state, device)
    return eval_front.finish(out, f"{len(models)} adapter(s) of {steps} steps", flags, device, dtype, processes)


def check(flags):
    """Raises UserError for flags that do not fit together."""
    check_rewards(flags, "prompts")
    if flags.aggregate in ("pama", "mgda") and flags.method != "panacea":
        raise UserError(f"--aggregate {flags.aggregate} trains one policy without a preference: leave --method away")
    if flags.estimator == "gdpo" and flags.aggregate != "ls":
        raise UserError("--estimator gdpo divides each reward before Σ λ_i: it belongs to --aggregate ls; take grpo")
    if flags.aggregate != "tche" and flags.ideal is not None:
        raise UserError("--ideal belongs to --aggregate tche")


def check_lengths(flags, dims):
    """Raises UserError for lists that do not have one entry per dimension."""
    check_lam(flags, dims)
    for name in ("reward_scale", "ideal"):
        if (value := getattr(flags, name)) is not None and len(value) != len(dims):
            raise UserError(f"--{name} takes {len(dims)} numbers, for {' '.join(dims)}; got {len(value)}")


def defaults(flags, rewards, processes):
    """Fills in the flags whose defaults depend on others, and checks that the batch divides."""
    truth_known = flags.prompts is None and of_world(flags.rewards)    # rewards are the embedded world's own
    flags.kl_coeff = flags.kl_coeff or (0.5 if truth_known else 0.02)
    flags.samples = flags.samples or (16 if flags.prompts is None else 1)
    grouped = flags.samples > 1 and flags.aggregate in ("ls", "tche")
    flags.estimator = flags.estimator or ("grpo" if grouped else "gae")
    if flags.estimator != "gae" and flags.samples < 2:
        raise UserError(f"--estimator {flags.estimator} compares responses to one prompt: --samples must be at least 2")
    if flags.aggregate == "tche" and flags.ideal is None and truth_known:
        flags.ideal = world_ideal(rewards).tolist()
    X, rest = divmod(flags.batch_size, flags.samples)
    flags.minibatch = flags.minibatch or flags.batch_size // math.gcd(X, 4)
    if rest or X % (flags.lams_per_step or 1):
        raise UserError(f"--batch_size {flags.batch_size} must be a multiple of --samples {flags.samples}, and their "
                        f"quotient one of --lams_per_step {flags.lams_per_step}")
    if flags.minibatch % flags.samples:
        raise UserError(f"--minibatch {flags.minibatch} must be a multiple of --samples {flags.samples}")
    for name in ("batch_size", "minibatch"):                           # prompts are shared out, with their responses
        prompts = getattr(flags, name) // flags.samples
        check_shares(flags, prompts, f"--{name} / --samples, {prompts} prompts,", processes)


def training_prompts(flags):
    """The prompts as rows, with the texts that PTX learns from, and on the embedded world their probabilities."""
    if flags.prompts is None:
        world = toy.prompts("train")
        return ([toy.as_row(x, toy.responses(x) if flags.ptx_coeff else []) for x in world],
                [toy.base_probs(x) for x in world])
    prompts, dropped = read_prompts(flags.prompts, flags.prompt_words, flags.fields)
    prompts, held_out = split(prompts)
    print(f"{' '.join(flags.prompts)}: {len(prompts)} prompts to train on, {len(held_out)} held out; dropped: "
          + ", ".join(f"{n} {why}" for why, n in dropped.items()))
    if not prompts or len(held_out) < 2:
        raise UserError(f"{' '.join(flags.prompts)}: too few prompts: some are held out for the evaluation")
    return prompts, None


@torch.no_grad()
def measure_rewards(rewards, model, prompts, rows, tokenizer, flags, device):
    """Measures rewards that bring no statistics on responses of the base model to prompts in turn."""
    order, responses = [j % len(rows) for j in range(REFERENCE_SAMPLES)], []
    for i in bar(range(0, len(order), flags.batch_size), "rewards of the base"):
        responses += generate_all(model, [rows[j].prompt for j in order[i:i + flags.batch_size]], flags.max_new_tokens,
                                  tokenizer.ends, generator_for(flags.seed, "reference", i), tokenizer.vocab_size)
    raw = in_shares(rewards.raw, [[prompts[j].prompt for j in order], *spoken(responses, tokenizer)], device)
    rewards.measure(raw, "of the base model")
    print("rewards of the base model: " + ", ".join(
        f"{d} {mean:.3f} ± {std:.3f}" for d, mean, std in zip(rewards.dims, rewards.mean, rewards.std)))


if __name__ == "__main__":
    run_main(main, Flags, __doc__, several=True)
