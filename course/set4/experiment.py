"""experiment.py - PPO for all preferences at once, on the embedded world: one estimator of the advantages a run.

    python -m course.set4.experiment --out out/rloo                       # about a CPU minute
    python -m course.set4.experiment --out out/gae --estimator gae        # or grpo, gdpo
    python -m course.set4.experiment --out out/quick --steps 2            # does it run?

Every step draws prompts and a λ for each, samples responses under these λ, and moves the policy a few times by your
loss. Then it measures the mean scores of everything that the policy can say, for prompts with new verbs, at five λ.
Writes ppo.png and ppo.json to --out.

R: responses   T: tokens of the longest one with its prompt   D: width of a hidden state
"""
import argparse
import importlib
import json
import time
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F

from course import earlier
from course.gpt import load_base
from course.world import TOKENIZER, mean_scores
from data import toy

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

DIMS, BETA = ["helpful", "harmless"], 0.5
TEST = toy.prompts("new_verbs")[::10]                                 # to measure on: one of each grade of risk
LAMS = torch.tensor([[0, 1], [0.25, 0.75], [0.5, 0.5], [0.75, 0.25], [1, 0]])
# the mean scores of the best of all policies for these prompts and preferences, by the closed form in the handout
BEST = [[0.565, 2.983], [1.209, 2.784], [1.850, 2.233], [2.404, 1.226], [2.682, 0.271]]


def read(model, tokens, past=None):
    """The states that the head reads, (R, T, D). With `past` the tokens (R, T) follow those whose keys and values are
    in it, one pair a block ([]: they are the first); it is brought up to date."""
    before = past[0][0].shape[2] if past else 0
    x, kept = model.embed(tokens) + model.pos_embed.weight[before:before + tokens.shape[1]], []
    for i, block in enumerate(model.blocks):
        attn, h = block.attn, block.norm1(x)
        q, k, v = (f(h).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for f in (attn.q, attn.k, attn.v))
        if past:
            k, v = torch.cat([past[i][0], k], 2), torch.cat([past[i][1], v], 2)
        kept.append((k, v))
        x = x + attn.o(F.scaled_dot_product_attention(q, k, v, is_causal=before == 0).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    if past is not None:
        past[:] = kept
    return model.norm(x)


@torch.no_grad()
def rollout(model, prompts, generator, longest=50):
    """A response to each of the R prompts, under the preference that is set: tokens and mask (R, T), as those of
    course.world.texts, and the texts of the responses; "" for one that has no end within `longest` tokens."""
    asked = [TOKENIZER.encode(x + "\n") for x in prompts]
    n = torch.tensor([len(x) for x in asked])                         # (R,)
    given = torch.tensor([x + [0] * (n.max() - len(x)) for x in asked])
    tokens, past, ended = given[:, :n.min()], [], torch.zeros(len(asked), dtype=torch.bool)
    new = tokens
    while not ended.all() and tokens.shape[1] < n.max() + longest:
        t = tokens.shape[1]
        p = (read(model, new, past)[:, -1] @ model.embed.weight.T).softmax(-1)                     # (R, V)
        new = torch.multinomial(p, 1, generator=generator).masked_fill(ended[:, None], 0)          # (R, 1)
        if t < given.shape[1]:                                        # some prompts are longer than others
            new = torch.where(t < n[:, None], given[:, t:t + 1], new)
        ended = ended | (new[:, 0] == TOKENIZER.eos_id) & (t >= n)
        tokens = torch.cat([tokens, new], 1)
    at = torch.arange(tokens.shape[1])
    stop = torch.where(ended, (tokens == TOKENIZER.eos_id).int().argmax(1), at[-1])
    mask = (at >= n[:, None]) & (at <= stop[:, None])
    return tokens, mask, [TOKENIZER.decode(y[on][:-1].tolist()) if end else ""
                          for y, on, end in zip(tokens, mask, ended)]


def train(model, layer, ours, args, generator):
    """PPO. Returns for every rollout the mean of Σ λ_i s_i − β KL, less what the base's scores would be, and the KL."""
    prompts, curve, start = toy.prompts("train"), [], time.process_time()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], args.lr, (0.9, 0.99),
                                  weight_decay=0.0)
    width = 2 * model.shape[-1]
    critic = torch.zeros(2, width + 2, requires_grad=True), torch.zeros(2, requires_grad=True)     # two heads
    critic_optimizer = torch.optim.Adam(critic, 1e-2)
    for step in range(args.steps):
        optimizer.param_groups[0]["lr"] = args.lr * min((step + 1) / 10, 1 - step / args.steps)
        # a λ for each prompt, the same for all responses to it, and kept to the end of the step
        chosen = torch.randint(len(prompts), (args.prompts,), generator=generator).tolist()
        asked = [prompts[j] for j in chosen for _ in range(args.samples)]
        first = (1.5 * torch.rand(args.prompts, generator=generator) - 0.25).clamp(0, 1)           # a third are ends
        lam = torch.stack([first, 1 - first], 1).repeat_interleave(args.samples, 0)                # (R, 2)
        layer.set_preference(model, lam)
        tokens, mask, said = rollout(model, asked, generator)
        score = torch.cat([toy.scores(x, [y], DIMS) for x, y in zip(asked, said)]).float()         # (R, 2)

        with torch.no_grad():
            states = read(model, tokens)                                                           # (R, T, D)
            old = ours.token_logprobs(states @ model.embed.weight.T, tokens, mask)                 # (R, T)
            with layer.adapters_off(model):
                ref = ours.token_logprobs(model(tokens), tokens, mask)
            rewards = ours.kl_penalized_rewards(score, old, ref, mask, BETA, 50.0)                 # (R, T, 2)
        if args.estimator == "gae":
            mean = states.cumsum(1) / torch.arange(1, tokens.shape[1] + 1)[:, None]                # of those so far
            seen = F.layer_norm(torch.cat([states, mean], -1), (width,))
            values = lambda: ours.critic_values(seen, lam, mask, *critic)                          # (R, T, 2)
            before = values().detach()
            advantages, returns = ours.gae(rewards, before, mask, 0.95)
            advantages = ours.aggregate_advantages(advantages, lam)                                # (R, T)
            for _ in range(8):
                critic_optimizer.zero_grad()
                ours.ppo_value_loss(values(), before, returns, mask, 5.0).backward()
                critic_optimizer.step()
        else:
            advantages = ours.group_advantages(rewards.sum(1), lam, args.samples, args.estimator)  # (R,)
            advantages = advantages[:, None].expand(mask.shape)
        for _ in range(args.passes):
            logp = ours.token_logprobs(model(tokens), tokens, mask)
            optimizer.zero_grad()
            ours.ppo_policy_loss(logp, old, advantages, mask, 0.2).backward()
            optimizer.step()

        kl = (old - ref).sum(1)
        usual = torch.stack([toy.base_probs(x) @ toy.scores(x, toy.responses(x), DIMS)             # the base's scores
                             for x in asked[::args.samples]]).repeat_interleave(args.samples, 0)
        curve.append([((lam * (score - usual)).sum(1) - BETA * kl).mean().item(), kl.mean().item()])
        if step % 10 == 0 or step == args.steps - 1:
            print(f"{args.estimator} step {step:3d}  gain {curve[-1][0]:6.3f}  KL {curve[-1][1]:.3f}  "
                  f"{time.process_time() - start:.0f} CPU seconds", flush=True)
    return curve


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/set4", help="folder of the picture")
    parser.add_argument("--estimator", default="rloo", choices=["gae", "rloo", "grpo", "gdpo"])
    parser.add_argument("--steps", type=int, default=50, help="rollouts")
    parser.add_argument("--passes", type=int, default=2, help="steps of the policy on each rollout")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of a rollout")
    parser.add_argument("--samples", type=int, default=16, help="responses to each of them")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0, help="of the adapter, the prompts, λ and the responses")
    parser.add_argument("--adapters", default="course.adapters")
    args = parser.parse_args()
    ours, out = importlib.import_module(args.adapters), Path(args.out)
    layer, model, generator = earlier.adapter(ours), load_base(), torch.Generator().manual_seed(args.seed)
    print(f"adapter: {layer.name}")
    gain = 8.0 if layer.inject is earlier.inject else 64.0           # the stand-in's vectors fall apart with 64
    layer.inject(model, 8, 2, gain, generator)
    gained, kl = zip(*train(model, layer, ours, args, generator))

    print(TEST[-1])
    layer.set_preference(model, LAMS)                                 # one prompt, five users, one batch
    for lam, y in zip(LAMS, rollout(model, TEST[-1:] * 5, generator)[2]):
        print(f"  λ {lam[0]:.2f} {lam[1]:.2f}  {y}")
    whole = lambda *x: ours.token_logprobs(*x).sum(1)
    print("measuring the base model, then each λ", flush=True)
    base, points = mean_scores(load_base(), whole, TEST, DIMS)[0].tolist(), []
    for lam in LAMS:
        print(f"λ {lam[0]:.2f} {lam[1]:.2f}  ", end="", flush=True)    # now: what follows takes a while
        layer.set_preference(model, lam)
        p, outside = mean_scores(model, whole, TEST, DIMS)
        points.append((p, outside))
        print(f"mean scores {p[0]:.2f} {p[1]:.2f}  outside mass {outside:.4f}", flush=True)
    scores = [p.tolist() for p, _ in points]
    out.mkdir(parents=True, exist_ok=True)
    (out / "ppo.json").write_text(json.dumps({
        "estimator": args.estimator, "dims": DIMS, "lam": LAMS.tolist(), "scores": scores, "base": base, "best": BEST,
        "outside": [outside for _, outside in points], "gain": gained, "kl": kl}, indent=1))

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name, xy, style in (("the best of all policies", BEST, "k.--"), (args.estimator, scores, "o-")):
        left.plot(*zip(*xy), style, label=name)
        for lam, point in zip(LAMS, xy):
            left.annotate(f"{lam[0]:.2f}", point, fontsize=7, textcoords="offset points", xytext=(4, 4))
    left.plot(*base, "ks", label="base model")
    left.set(xlabel=f"mean score: {DIMS[0]}", ylabel=f"mean score: {DIMS[1]}",
             title=f"prompts with new verbs; numbers: λ of “{DIMS[0]}”")
    right.plot(gained, label="Σ λ_i s_i − β KL, less the base's")
    right.plot(kl, label="KL, nats a response")
    right.set(xlabel="rollout", title="responses while training")
    left.margins(0.1)
    left.legend()
    right.legend()
    figure.savefig(out / "ppo.png", dpi=120)
    print(f"{out}/ppo.png")


if __name__ == "__main__":
    main()
