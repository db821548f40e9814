"""train_ppo.py - RLHF for the whole front: PPO with Panacea (arXiv:2402.02030v1, Eq. (12), (13)), its baselines, PAMA.

    python train_ppo.py --pref_dim 2                        # the embedded world; trains its base model first
    python train_ppo.py --pref_dim 2 --aggregate tche       # Tchebycheff instead of linear scalarisation
    python train_ppo.py --pref_dim 2 --method rs            # rewarded soups; dps: one model a preference (MORLHF)
    python train_ppo.py --pref_dim 2 --aggregate pama       # PAMA: one policy, no preference; mgda: by gradients
    python train_ppo.py --rewards happy concise --init <Hugging Face directory> --prompts stories.txt

B: responses a step   L: tokens of the longest   N: response tokens   m: dimensions   n: advantages a token has
P: prompts a step   K: responses to each, so B = P K
lam: (P, m), one λ a prompt, fixed from the rollout through all updates on it   r: (B, m) rewards, normalised by the
mean and the standard deviation that they have under the reference policy   β: --kl_coeff
n is m for linear scalarisation, PAMA and MGDA: one critic head a dimension, every one of them with the whole KL term;
GAE is linear, so A_λ = Σ λ_i A_i is the advantage of Σ λ_i r_i − β KL. Tchebycheff is not: n = 1, for its own reward.
The reference is the same model with the adapter off. A killed run continues from its last checkpoint, bit for bit.
"""
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

import eval_front
from aggregate import (linear_scalarization, min_norm_weights, models_of, pama_advantages, sample_preference,
                       scalar_reward)
from runs.checkpoints import load_state, save_state
from runs.device import pick_device
from runs.directory import prepare_run, run_name, versions
from runs.files import UserError
from runs.flags import RunFlags, check_ranges, flag, run_main
from runs.log import Log
from runs.loop import learning_rate
from runs.randomness import epoch_batch, generator_for
from runs.speed import matmul_ceiling, model_flops, report_speed
from data import toy
from data.prompts import read_prompts, split
from data.text_rewards import collapsed
from data.tokenizers import TokenRow, spoken, tokenize
from data.trees import TreeBatch, batch_logprobs, pack, path_logprobs, predicting_states
from ops.heads import Critic
from model import generate
from objectives import gae, kl_penalized_rewards, noon, ppo_policy_loss, ppo_value_loss, sft_loss
from data.rewards import named_rewards, of_world, world_ideal, world_rewards
from svd_lora import adapters_off, fingerprint, inject_svd_lora, parameter_groups, save_adapter, set_preference
from train_base import find_base, load_base


@dataclass
class Flags(RunFlags):
    """The script's flags, with defaults and --help texts."""

    # what is trained
    pref_dim: int = flag(2, "m: the number of preference dimensions, the first m of the embedded world's")
    dims: list[str] | None = flag(None, "these dimensions of the embedded world instead, in this order")
    rewards: list[str] | None = flag(None, "other rewards: names of text rewards, directories of train_reward.py "
                                           "(directory:dimension for one of several), or, on the embedded world, its "
                                           "dimensions and concise:WORDS")
    reward_scale: list[float] | None = flag(None, "factors on the normalised rewards (the paper's harmless × 5), "
                                                    "beside a reward model's own")
    method: Literal["panacea", "rs", "dps"] = flag("panacea", "Panacea, rewarded soups, or discrete policy solutions")
    aggregate: Literal["ls", "tche", "pama", "mgda"] = flag(
        "ls", "linear scalarisation, Eq. (12); Tchebycheff, Eq. (13); or, without any preference, PAMA or MGDA")
    ideal: list[float] | None = flag(None, "Tchebycheff's z, in normalised rewards (default: the embedded world's "
                                           "largest rewards; elsewhere the largest seen so far)")
    smooth: float = flag(0.0, "μ > 0: Tchebycheff's maximum as μ log Σ exp(·/μ)")
    pama_reading: Literal["V", "T", "S"] = flag(
        "V", "what PAMA minimises: the norm of the vector over tokens, each token alone, or the batch means")
    lam: list[float] | None = flag(None, "dps: one model at this preference, instead of a lattice of them")
    # prompts and base model
    init: str | None = flag(None, "Hugging Face directory of the base model (default: the embedded world's)")
    size: str | None = flag(None, "size of the embedded world's base model (default tiny; 125m on a GPU)")
    prompts: list[str] | None = flag(None, "prompt files, JSONL or stories in .txt (default: the embedded world's)")
    prompt_words: int = flag(12, "stories are cut into a prompt of so many words and the rest, which is text for PTX")
    tokenizer: str | None = flag(
        None, "toy, gpt2, a *.tiktoken file or a directory with tokenizer.json (default: --init's)")
    eos_id: int | None = flag(None, "the token that ends a response (default: the tokenizer's EOS)")
    max_length: int = flag(512, "tokens of prompt and response together")
    max_new_tokens: int = flag(64, "a response that has not ended by then is cut off there, and counted")
    # the paper's hyper-parameters (Table 1)
    kl_coeff: float | None = flag(None, "β of Eq. (12) (default 0.5 on the embedded world, 0.02 otherwise)")
    clip_range_ratio: float = flag(0.2, "ε of PPO's clipped ratio")
    clip_range_score: float = flag(50.0, "a token's reward, KL term and all, is clamped to ± this")
    clip_range_value: float = flag(5.0, "how far the critic may move from its value at the rollout")
    ptx_coeff: float = flag(0.0, "weight of the SFT loss beside PPO's (Table 1: 16, for its own scale of rewards)")
    ptx_samples: int = flag(4, "embedded world: responses a prompt drawn for PTX from what the base was trained on")
    update_iters: int = flag(1, "passes of the policy over a rollout")
    critic_iters: int = flag(4, "passes of the critic over it")
    lr: float = flag(2e-3, "peak learning rate of the adapter, then a cosine to 0")
    critic_lr: float = flag(3e-3, "learning rate of the critic, constant (Table 1: 1e-3, for a whole language model)")
    weight_decay: float = flag(0.01, "AdamW's, on U and V only")
    warmup_ratio: float = flag(0.03, "share of the steps with a rising learning rate")
    lora_dim: int = flag(8, "k, the learned rank; the whole rank is k + m, and k + 1 where λ is no input")
    lora_scaling: float = flag(512.0, "the adapter's gain is lora_scaling / lora_dim")
    seed: int = flag(0, "seed of adapter, prompts, preferences and sampling")
    # beside the paper
    steps: int = flag(300, "rollouts in all, shared evenly by the models of rs and dps")
    batch_size: int = flag(128, "B: responses a rollout")
    samples: int | None = flag(None, "K: responses to each prompt, under one λ (default 16 on the embedded world, "
                                     "where they share most of their computation; else 1, the paper's)")
    minibatch: int | None = flag(None, "responses an optimizer step (default: half of a rollout, where it divides)")
    lams_per_step: int | None = flag(None, "G: preferences a rollout, each on the same number of prompts; 1 is the "
                                           "paper's (default: one a prompt)")
    dirichlet_alpha: float = flag(1.0, "preferences are drawn from Dirichlet(alpha) …")
    vertex_share: float = flag(0.25, "… or, this share of them, from the vertices of the simplex")
    dps_parts: int = flag(10, "dps: the simplex is cut in so many parts; m = 2: parts + 1 models")
    gae_lambda: float = flag(0.95, "λ of generalised advantage estimation; γ is 1")
    max_grad_norm: float = flag(1.0, "gradient clipping, of the adapter and of the critic")
    reference_samples: int = flag(256, "responses of the reference policy that text rewards are normalised on")
    # running; more in common.RunFlags
    save_every: int = flag(100, "write a checkpoint every so many steps")
    snapshots: int = flag(8, "adapters kept along the way, for the front's evolution")


def main(flags):
    """Trains one run (one adapter, or the several of rs and dps) and evaluates its front. Returns the run directory."""
    device, dtype = pick_device(flags.device, flags.precision)
    given = replace(flags)
    check(flags)
    matmul_ceiling(device, dtype)                                      # now, while nothing else runs
    base, tokenizer_name = find_base(flags.init, flags.size, flags.tokenizer, device)
    model, tokenizer = load_base(base, tokenizer_name, flags, device, dtype)
    if flags.eos_id is not None:
        tokenizer = replace(tokenizer, eos_id=flags.eos_id)
    on_world = flags.prompts is None and of_world(flags.rewards)
    rewards = (world_rewards(flags.rewards or toy.choose_dims(flags.dims, flags.pref_dim), flags.reward_scale)
               if on_world else named_rewards(flags.rewards, flags.reward_scale, model, device))
    check_lengths(flags, rewards.dims)
    defaults(flags, rewards, on_world)
    prompts = [toy.as_row(x, toy.responses(x) if flags.ptx_coeff else []) for x in toy.prompts("train")]
    weights = [toy.base_probs(x) for x in toy.prompts("train")]        # of those responses, where PTX draws some
    if flags.prompts is not None:
        (prompts, dropped), weights = read_prompts(flags.prompts, flags.prompt_words), None
        prompts, held_out = split(prompts)
        print(f"{' '.join(flags.prompts)}: {len(prompts)} prompts to train on, {len(held_out)} held out; dropped: "
              + ", ".join(f"{n} {why}" for why, n in dropped.items()))
        if not prompts or len(held_out) < 2:
            raise UserError(f"{' '.join(flags.prompts)}: too few prompts: some are held out for the evaluation")
    length = min(flags.max_length, model.config.context_length)
    if flags.max_new_tokens >= length:
        raise UserError(f"--max_new_tokens {flags.max_new_tokens} leave no room for a prompt in {length} tokens")
    rows, cut = tokenize(prompts, tokenizer, length, max_prompt=length - flags.max_new_tokens)
    print("prompts: {prompts}, {prompts_cut} cut".format(**cut))
    if flags.ptx_coeff and not all(row.responses for row in rows):
        raise UserError("--ptx_coeff needs prompts that all have their own text: stories, or a field \"response\"")

    m, single = len(rewards.dims), flags.aggregate in ("pama", "mgda")  # single: one policy, without a preference
    if single:
        flags.method, flags.lam = "dps", [1 / m] * m
    parts = [Path(f.partition(":")[0]).stem for f in (flags.prompts or []) + (flags.rewards or []) if "/" in f]
    out = Path(flags.out or run_name(["ppo", *parts, flags.method, flags.aggregate, *rewards.dims, f"seed{flags.seed}"],
                                     given, {"method", "aggregate", "prompts", "rewards"}))
    members = models_of(flags.method, rewards.dims, flags.dps_parts, flags.lam)
    if flags.steps < len(members):
        raise UserError(f"--steps {flags.steps} are shared by {len(members)} models of method {flags.method}")
    if None in rewards.mean:
        measure_rewards(rewards, model, prompts, rows, tokenizer, flags)
    kind = flags.aggregate if single else flags.method
    config = {"script": "train_ppo.py", "method": kind,
              "label": {"panacea": "Panacea", "rs": "Rewarded soups", "dps": "Discrete policy solutions", "pama": "PAMA",
                        "mgda": "MGDA"}[kind],
              "objective": {"name": "rlhf", "beta": flags.kl_coeff, "aggregate": "ls" if single else flags.aggregate,
                            "ideal": flags.ideal, "smooth": flags.smooth},
              "prompts": flags.prompts,
              "models": len(members), "flags": asdict(flags), "dims": rewards.dims,
              "rewards": {"names": flags.rewards or rewards.dims, "mean": rewards.mean, "std": rewards.std, "scale": rewards.scale},
              "base": str(base), "tokenizer": tokenizer_name, "fingerprint": fingerprint(model), **versions()}
    resume = prepare_run(out, config)
    steps = flags.steps // len(members)
    for i, (name, lam) in enumerate(members):
        if resume is None or resume["member"] <= i:
            train(model, out / name, lam, prompts, rows, weights, rewards, tokenizer, flags, steps, i, resume, device)
            resume = None
    seconds = report_speed(out, device, dtype)
    print(f"trained {len(members)} adapter(s) of {steps} steps in {seconds:.0f} s: {out}")
    if flags.eval:
        eval_front.main(eval_front.Flags(runs=[str(out)], device=flags.device))
    (out / "state.safetensors").unlink(missing_ok=True)                # the run is whole: nothing is left to resume
    return out


def check(flags):
    """Raises UserError for flags that do not fit together."""
    check_ranges(flags, dict(batch_size=1, samples=1, minibatch=1, lams_per_step=1, steps=1, lora_dim=1, dps_parts=1,
                             update_iters=1, critic_iters=1, ptx_samples=1, snapshots=0, save_every=1, log_every=1,
                             max_length=2, max_new_tokens=1, prompt_words=1, reference_samples=2),
                 positive=("kl_coeff", "clip_range_ratio", "clip_range_score", "clip_range_value", "lr", "critic_lr",
                           "lora_scaling", "max_grad_norm", "dirichlet_alpha"),
                 shares=("vertex_share", "warmup_ratio", "gae_lambda"),
                 not_negative=("ptx_coeff", "smooth", "weight_decay"))
    if flags.rewards is None and len(flags.dims or [0] * flags.pref_dim) < 2:
        raise UserError("a front needs at least 2 dimensions: --pref_dim 2, or two names after --dims")
    if flags.prompts is not None and (flags.init is None or flags.rewards is None):
        raise UserError("--prompts needs --init and --rewards: "
                        "the embedded world's model and scores know no other text")
    if flags.init is not None and flags.prompts is None and not (Path(flags.init) / "base.json").exists():
        raise UserError("--init needs --prompts (and --rewards): this model knows nothing of the embedded world")
    if flags.aggregate in ("pama", "mgda") and flags.method != "panacea":
        raise UserError(f"--aggregate {flags.aggregate} trains one policy without a preference: leave --method away")
    if flags.lam is not None and flags.method != "dps":
        raise UserError("--lam is the one preference of --method dps; panacea learns all of them")
    if flags.aggregate != "tche" and (flags.ideal is not None or flags.smooth):
        raise UserError("--ideal and --smooth belong to --aggregate tche")


def check_lengths(flags, dims):
    """Raises UserError for lists that do not have one entry a dimension."""
    for name in ("reward_scale", "ideal", "lam"):
        if (value := getattr(flags, name)) is not None and len(value) != len(dims):
            raise UserError(f"--{name} takes {len(dims)} numbers, for {' '.join(dims)}; got {len(value)}")
    if len(dims) < 2:
        raise UserError("a front needs at least 2 dimensions: name two rewards after --rewards")
    if flags.reward_scale is not None and not all(0 < x < float("inf") for x in flags.reward_scale):
        raise UserError("--reward_scale takes positive numbers")
    if flags.lam is not None and (min(flags.lam) < 0 or abs(sum(flags.lam) - 1) > 1e-4):
        raise UserError(f"--lam {' '.join(map(str, flags.lam))}: a preference is not negative and sums to 1")


def defaults(flags, rewards, on_world):
    """Fills in the flags whose defaults depend on others, and checks that the batch divides."""
    if flags.kl_coeff is None:
        flags.kl_coeff = 0.5 if on_world else 0.02
    if flags.samples is None:
        flags.samples = 16 if flags.prompts is None else 1
    if flags.aggregate == "tche" and flags.ideal is None and on_world:
        flags.ideal = world_ideal(rewards).tolist()
    if flags.minibatch is None:
        flags.minibatch = flags.batch_size // (1 if flags.batch_size // flags.samples % 2 else 2)
    P = flags.batch_size // flags.samples
    if flags.batch_size % flags.samples or P % (flags.lams_per_step or 1):
        raise UserError(f"--batch_size {flags.batch_size} must be a multiple of --samples {flags.samples}, and their "
                        f"quotient one of --lams_per_step {flags.lams_per_step}")
    if flags.minibatch % flags.samples:
        raise UserError(f"--minibatch {flags.minibatch} must be a multiple of --samples {flags.samples}")


@torch.no_grad()
def measure_rewards(rewards, model, prompts, rows, tokenizer, flags):
    """Fills in the mean and the standard deviation of rewards that bring none: over responses of the base model to
    prompts in turn. Raises UserError for a reward that is the same for all of them."""
    order = [j % len(rows) for j in range(flags.reference_samples)]
    responses = []
    for i in range(0, len(order), flags.batch_size):
        responses += generate(model, [rows[j].prompt for j in order[i:i + flags.batch_size]], flags.max_new_tokens,
                              eos_id=tokenizer.eos_id, generator=generator_for(flags.seed, "reference", i))
    texts, finished = spoken(responses, tokenizer)
    raw = rewards.raw([prompts[j].prompt for j in order], texts, finished)                # (samples, m)
    for i, dim in enumerate(rewards.dims):
        if rewards.mean[i] is None:
            rewards.mean[i], rewards.std[i] = raw[:, i].mean().item(), raw[:, i].std().item()
        if not rewards.std[i] > 0:
            raise UserError(f"reward {dim}: {rewards.mean[i]:g} for every response of the base model; it cannot be "
                            f"normalised, and PPO would find no signal")
    print("rewards of the base model: " + ", ".join(
        f"{d} {mean:.3f} ± {std:.3f}" for d, mean, std in zip(rewards.dims, rewards.mean, rewards.std)))


def train(model, path, fixed_lam, prompts, rows, weights, rewards, tokenizer, flags, steps, member, resume, device):
    """Algorithm 1 with PPO for one adapter, written to `path`.safetensors. fixed_lam: None for Panacea, else (m,)."""
    m, B, K, out = len(rewards.dims), flags.batch_size, flags.samples, path.parent
    n, P = 1 if flags.aggregate == "tche" else m, B // K
    G = (flags.lams_per_step or P) if fixed_lam is None else 1
    k, pref_m = (flags.lora_dim, m) if fixed_lam is None else (flags.lora_dim + 1, 0)
    # inject divides by its rank: scaled so that the gain is lora_scaling / lora_dim for every method
    inject_svd_lora(model, k, pref_m, flags.lora_scaling / flags.lora_dim * k,
                    generator=generator_for(flags.seed, "adapter", member))
    critic = Critic(model.config.d_model, m, n, generator_for(flags.seed, "critic", member)).to(device)
    adapter = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    adapter_size = sum(p.numel() for _, p in adapter if p.ndim == 2)
    everything = adapter + [(f"critic.{name}", p) for name, p in critic.named_parameters()]
    optimizer = torch.optim.AdamW(parameter_groups(model, flags.weight_decay), lr=flags.lr, betas=(0.9, 0.99),
                                  fused=True)                          # one pass over many small tensors
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=flags.critic_lr, weight_decay=0.0, fused=True)
    ideal, first_step = flags.ideal, 0                        # z of Eq. (13): given, or the largest rewards so far
    if resume is not None:
        load_state(out / "state.safetensors", everything, optimizer, critic_optimizer)
        first_step, ideal = resume["step"], resume["ideal"]
    multiple = 64 if device.type == "cuda" else 1             # T in multiples: few shapes, few sets of kernels
    snapshot_steps = {round(steps * (j + 1) / flags.snapshots) for j in range(flags.snapshots)}
    log = Log(out / "metrics.jsonl", steps, first_step, flags.log_every, path.name)

    for step in range(first_step, steps):
        t0 = time.time()
        # 1. preferences λ, fixed from here to the end of the step: J_i is an expectation over this λ's own responses
        lam = (fixed_lam.expand(G, m) if fixed_lam is not None else
               sample_preference(G, m, flags.dirichlet_alpha, flags.vertex_share,
                                 generator_for(flags.seed, "lambda", step)))
        lam = lam.repeat_interleave(P // G, dim=0).to(device)                         # (P, m), one a prompt
        use = (lambda lam: set_preference(model, lam)) if pref_m else lambda lam: None
        # 2. rollout: K responses y ~ π_{θ,λ} to each of P prompts
        draw = member * steps + step
        chosen = epoch_batch(len(rows), P, flags.seed, draw).tolist()
        use(lam.repeat_interleave(K, dim=0))
        responses = generate(model, [rows[j].prompt for j in chosen for _ in range(K)], flags.max_new_tokens,
                             eos_id=tokenizer.eos_id, generator=generator_for(flags.seed, "rollout", draw))
        if flags.ptx_coeff:
            g = generator_for(flags.seed, "ptx", draw)
            texts_told = [some_responses(rows[j], weights and weights[j], flags.ptx_samples, g) for j in chosen]
        # 3. rewards r (B, m), and the scores (B, n) that PPO is run on
        texts, finished = spoken(responses, tokenizer)
        raw = rewards.raw([prompts[j].prompt for j in chosen for _ in range(K)], texts, finished)
        r, lam_of = rewards.normalise(raw), lam.repeat_interleave(K, dim=0).cpu()    # (B, m) each: λ of each response
        if flags.aggregate == "tche" and flags.ideal is None:
            ideal = torch.tensor([*r.tolist(), ideal or r[0].tolist()]).amax(0).tolist()
        R = scalar_reward(r, lam_of, "tche" if n == 1 else "ls", ideal and torch.tensor(ideal), flags.smooth)     # (B,)
        score = (r if n == m else R[:, None]).float().to(device)
        count = lambda tokens, predicted, base: model_flops(model.config, tokens, predicted, adapter_size, base)
        drawn = sum(map(len, responses))
        flops = count(drawn + K * sum(len(rows[j].prompt) for j in chosen), drawn, 2)
        # 4. log-probs of policy and reference, values, advantages: in the minibatches of the update, whose forward pass
        #    then gives the very same numbers, so that the first ratio is exactly 1
        parts = []
        for index in torch.arange(P).split(flags.minibatch // K):
            batch = pack([TokenRow(rows[chosen[p]].prompt, responses[p * K:(p + 1) * K]) for p in index], multiple)
            tokens, predicted = int(batch.nodes.sum()), len(batch.targets)
            # policy and reference forward, then the updates
            flops += 2 * count(tokens, predicted, 2) + flags.update_iters * count(tokens, predicted, 4)
            batch = batch.to(device)
            use(lam[index])
            of_part = slice(index[0] * K, (index[-1] + 1) * K)                        # its responses among the B
            parts.append(experience(model, critic, batch, lam_of[of_part].to(device), score[of_part], index, flags))
        # 5. updates of the policy
        first_ratio = None
        for e in parts * flags.update_iters:
            use(lam[e.index])
            logp = path_logprobs(model, e.batch)                                      # (b, L)
            first_ratio = first_ratio or (logp - e.old).abs().max().exp().item()      # of the step: 1
            surrogate = lambda A: ppo_policy_loss(logp, e.old, A, e.mask, flags.clip_range_ratio)
            if flags.aggregate == "mgda":
                c = mgda_backward([surrogate(e.advantages[..., i])[0] for i in range(m)], [p for _, p in adapter])
                policy_loss, clipped, moved = surrogate(linear_scalarization(e.advantages, c.to(e.advantages)))
            else:
                A, c = aggregated(e, logp, flags)                                     # (b, L)
                policy_loss, clipped, moved = surrogate(A)
                policy_loss.backward()
            if flags.ptx_coeff:                               # under the λ in place, on texts that are not sampled
                told = pack([texts_told[p] for p in e.index], multiple)
                flops += count(int(told.nodes.sum()), len(told.targets), 4)
                told = told.to(device)
                ptx = sft_loss(batch_logprobs(model, told)).sum() / told.on_path.sum()         # nats a token
                (flags.ptx_coeff * ptx).backward()
            for g in optimizer.param_groups:
                g["lr"] = learning_rate(step, steps, flags.lr, flags.warmup_ratio)
            norm = torch.nn.utils.clip_grad_norm_([p for _, p in adapter], flags.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        # 6. updates of the critic: the policy's states are at hand, so a pass over them costs next to nothing
        value_loss = update_critic(critic, critic_optimizer, parts * flags.critic_iters, flags)
        # 7. log
        kl = sum(((e.old - e.ref) * e.mask).sum().item() for e in parts) / B
        if not (math.isfinite(kl) and math.isfinite(norm.item())):
            raise UserError(f"step {step + 1}: KL is {kl}, the gradient's norm {norm}; lower --lr or --lora_scaling")
        lengths, seconds, mean = [len(y) for y in responses], time.time() - t0, raw.mean(0).tolist()    # left of them
        record = {"step": step + 1, "member": member, "rewards": mean, "normalised": r.mean(0).tolist(), "kl": kl,
                  "objective": R.mean().item() - flags.kl_coeff * kl, "policy_loss": policy_loss.item(),
                  "value_loss": value_loss,
                  "explained_variance": explained_variance(parts), "first_ratio": first_ratio,
                  "clip_fraction": clipped.item(), "moved": moved.item(),
                  "ptx": ptx.item() if flags.ptx_coeff else 0.0, "weights": None if c is None else c.tolist(),
                  "ideal": ideal, "lam": lam.tolist(), "length": sum(lengths) / B, "finished": sum(finished) / B,
                  "collapsed": sum(map(collapsed, responses)) / B, "grad_norm": norm.item(),
                  "lr": optimizer.param_groups[0]["lr"], "tokens": sum(lengths), "flops": flops,
                  "tokens_per_second": sum(lengths) / seconds, "seconds": seconds}
        log.step(record, line(record, rewards.dims, steps))
        # 8. save
        if step + 1 in snapshot_steps and step + 1 < steps:
            save_adapter(model, out / "snapshots" / f"{path.name}-{step + 1:06d}.safetensors", rewards.dims,
                         step=step + 1)
        if (step + 1) % flags.save_every == 0 or step + 1 == steps:
            save_state(out / "state.safetensors", everything, optimizer, critic_optimizer,
                       step=step + 1, member=member, ideal=ideal)
    log.close()
    save_adapter(model, path.with_suffix(".safetensors"), rewards.dims, method=flags.method, beta=flags.kl_coeff,
                 lam=None if fixed_lam is None else fixed_lam.tolist())


@dataclass
class Experience:
    """What one minibatch of a rollout keeps for its updates. p: prompts   b = p K: responses"""
    batch: TreeBatch
    index: torch.Tensor             # (p,) which of the P prompts
    lam: torch.Tensor               # (b, m)
    mask: torch.Tensor              # (b, L)
    states: torch.Tensor            # (b, L, D) hidden states of the policy
    old: torch.Tensor               # (b, L) log π_old
    ref: torch.Tensor               # (b, L) log π_ref
    values: torch.Tensor            # (b, L, n)
    advantages: torch.Tensor        # (b, L, n)
    returns: torch.Tensor           # (b, L, n)


@torch.no_grad()
def experience(model, critic, batch, lam, score, index, flags):
    """Looks at one minibatch of a rollout before anything is updated. lam (b, m), score (b, n) -> Experience"""
    states = predicting_states(model, batch)                                          # (N, D)
    old = path_logprobs(model, batch, states)                                         # (b, L)
    with adapters_off(model):
        ref = path_logprobs(model, batch)
    states = batch.along(states)                                                      # (b, L, D)
    values = critic(states, old, lam)                                                 # (b, L, n)
    token_rewards = kl_penalized_rewards(score, old, ref, batch.on_path, flags.kl_coeff, flags.clip_range_score)
    advantages, returns = gae(token_rewards, values, batch.on_path, 1.0, flags.gae_lambda)
    return Experience(batch, index, lam, batch.on_path, states, old, ref, values, advantages, returns)


def update_critic(critic, optimizer, parts, flags):
    """One step on each of the parts, a list of Experience. Returns the last value loss."""
    for e in parts:
        V = critic(e.states, e.old, e.lam)                                            # (b, L, n)
        loss = ppo_value_loss(V, e.values, e.returns, e.mask, flags.clip_range_value)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(critic.parameters(), flags.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def explained_variance(parts):
    """1 − Var(G − V) / Var(G) over all tokens, the mean over the n heads; 0 where all returns are equal."""
    tokens = lambda key: torch.cat([getattr(e, key)[e.mask.bool()] for e in parts])                # (N', n)
    returns, values = tokens("returns"), tokens("values")
    spread, missed = returns.var(0), (returns - values).var(0)                                     # (n,)
    return torch.where(spread > 1e-9, 1 - missed / spread.clamp(min=1e-9), 0.0).mean().item()


def aggregated(e, logp, flags):
    """The one advantage of a token, (b, L), from its n; and the weights c (n,), where PAMA chose some."""
    if flags.aggregate == "pama":
        positive = noon(e.advantages, (logp - e.old).detach().exp(), flags.clip_range_ratio)
        return pama_advantages(positive, e.mask, flags.pama_reading)
    if flags.aggregate == "ls":
        return linear_scalarization(e.advantages, e.lam[:, None]), None               # A_λ = Σ λ_i A_i
    return e.advantages[..., 0], None                                                 # tche: of its one reward


def some_responses(row, weights, n, generator):
    """The TokenRow with n of its responses, drawn by their weights (None: all of them)."""
    if weights is None:
        return row
    drawn = torch.multinomial(weights, n, replacement=True, generator=generator).tolist()
    return replace(row, responses=[row.responses[s] for s in drawn])


def mgda_backward(losses, parameters):
    """Writes Σ c_i ∇L_i into the parameters' .grad, with the c of the shortest such sum. Returns c (m,) float64."""
    grads = [torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True) for loss in losses]
    flat = torch.stack([torch.cat([g.flatten() for g in grad]) for grad in grads]).double()    # (m, d)
    c = min_norm_weights(flat @ flat.T)
    for p, *each in zip(parameters, *grads):
        p.grad = sum(w * g for w, g in zip(c.tolist(), each))
    return c


def line(r, dims, steps):
    """One record of metrics.jsonl as a line for people."""
    return (f"step {r['step']:05d}/{steps:05d} | " + " ".join(f"{d} {x:.3f}" for d, x in zip(dims, r["rewards"]))
            + f" | kl {r['kl']:.3f} | objective {r['objective']:.3f} | critic {r['explained_variance']:.2f}"
            + f" | clip {r['clip_fraction']:.3f}"
            + (" | c " + " ".join(f"{x:.2f}" for x in r["weights"]) if r["weights"] else "")
            + f" | {r['length']:.1f} tokens, {r['finished']:.2f} ended | grad {r['grad_norm']:.2f} | "
            f"{r['seconds']:.2f} s")


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
