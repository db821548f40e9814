"""experiment.py - five ways to raise two objectives at once, on the embedded world, with a table for a policy.

    python -m course.set5.experiment --out out/five                   # less than half a CPU minute
    python -m course.set5.experiment --out out/seed1 --seed 1
    python -m course.set5.experiment --out out/times5 --scale 5       # the second reward times 5

The policy is a softmax over the S = 160 listed answers to each of X = 40 prompts, so J_i = E r_i − β KL is exact, and
so is the critic. A step samples some answers to every prompt and climbs: the equally weighted advantages (LS), MGDA by
your mgda_backward, or what your noon and pama_advantages make of the advantages (PAMA in the readings V, T and S).
Each answer counts as one token. Writes five.png and five.json to --out: for each method J, the distance to
Pareto-stationary (your mgda_backward of the exact −J_i) as a part of what it was at first, and the weights c, of every
step; and the front, by linear scalarisation.
"""
import argparse
import importlib
import json
import time
from pathlib import Path

import matplotlib
import torch

from data import toy

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

METHODS = {"LS": "LS, λ = (½, ½)", "MGDA": "MGDA", "V": "PAMA (V)", "T": "PAMA (T)", "S": "PAMA (S)"}


def log_probs(logits):
    return logits - logits.logsumexp(-1, keepdim=True)


def objectives(logits, ref, r, beta):
    """J (m,), exactly; the mean over prompts."""
    logp = log_probs(logits)
    return (logp.exp()[..., None] * (r - beta * (logp - ref)[..., None])).sum(1).mean(0)


def step_losses(method, logits, ref, r, beta, samples, generator, adapters):
    """The losses whose gradients a step goes down: one, or for MGDA one for each objective; and PAMA's c."""
    logp = log_probs(logits)                                                          # (X, S)
    p = logp.detach().exp()
    score = r - beta * (logp.detach() - ref)[..., None]                               # (X, S, m), the KL's part in it
    A = score - (p[..., None] * score).sum(1, keepdim=True)                           # a perfect critic
    drawn = torch.multinomial(p, samples, replacement=True, generator=generator)      # (X, samples)
    A, logp = A.take_along_dim(drawn[..., None], 1), logp.take_along_dim(drawn, 1)
    climb = lambda a: -(a * logp).sum() / samples
    if method == "MGDA":
        return [climb(a) for a in A.unbind(-1)], None
    if method == "LS":
        return [climb(A.mean(-1))], None
    one = torch.ones(logp.numel(), 1)                                                 # (R, 1): R answers of one token
    a, c = adapters.pama_advantages(adapters.noon(A.flatten(0, 1)[:, None], one, 0.2), one, method)
    return [climb(a.view_as(logp))], c


def train(method, ref, r, args, adapters):
    """One method from the start on: {J, distance, c} of every step."""
    logits, generator = ref.clone().requires_grad_(True), torch.Generator().manual_seed(args.seed)
    said = {"J": [], "distance": [], "c": []}
    for _ in range(args.steps + 1):
        J = objectives(logits, ref, r, args.beta)
        _, distance = adapters.mgda_backward(list(-J), [logits])
        losses, c = step_losses(method, logits, ref, r, args.beta, args.samples, generator, adapters)
        if method == "MGDA":
            c, _ = adapters.mgda_backward(losses, [logits])
        else:
            logits.grad = None
            losses[0].backward()
        with torch.no_grad():
            logits -= args.lr * logits.grad
        for key, x in (("J", J), ("distance", distance), ("c", c)):
            said[key].append(None if x is None else x.tolist())
    said["distance"] = [x / said["distance"][0] for x in said["distance"]]
    return said


def front(ref, r, beta, lams):
    """The best J for each λ, by gradient ascent on Σ λ_i J_i: (F, m)"""
    logits = ref.expand(len(lams), -1, -1).clone().requires_grad_(True)               # (F, X, S), all λ side by side
    optimizer = torch.optim.Adam([logits], 0.1)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 200)
        J = torch.stack([objectives(each, ref, r, beta) for each in logits])          # (F, m)
        optimizer.zero_grad()
        (-(lams * J).sum()).backward()
        optimizer.step()
    return J.detach()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/set5", help="folder of the picture")
    parser.add_argument("--dims", nargs=2, default=["helpful", "harmless"], choices=toy.DIMS)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--samples", type=int, default=16, help="answers to each prompt in a step")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the second reward")
    parser.add_argument("--beta", type=float, default=0.5)
    parser.add_argument("--lr", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0, help="of the sampled answers")
    parser.add_argument("--adapters", default="course.adapters")
    args = parser.parse_args()
    adapters, out, start = importlib.import_module(args.adapters), Path(args.out), time.process_time()
    prompts = toy.prompts("seen")
    ref = torch.stack([toy.base_probs(x) for x in prompts]).log()                     # (X, S), the first policy
    r = torch.stack([toy.scores(x, toy.responses(x), args.dims) for x in prompts])    # (X, S, m)
    p = ref.exp()[..., None] / len(prompts)
    r = r - (p * r).sum((0, 1))                                                       # mean 0 and deviation 1 at first
    r = r / (p * r.square()).sum((0, 1)).sqrt() * torch.tensor([1.0, args.scale])

    runs = {}
    for method in METHODS:
        runs[method] = train(method, ref, r, args, adapters)
        J, best, still = runs[method]["J"][-1], torch.tensor(runs[method]["J"]).amax(0), runs[method]["distance"][-1]
        print(f"{METHODS[method]:16s} J {J[0]:+.3f} {J[1]:+.3f}  best on the way {best[0]:+.3f} {best[1]:+.3f}  "
              f"distance {still:.2f} of the first  {time.process_time() - start:.0f} CPU seconds", flush=True)
    lams = torch.linspace(0, 1, 11, dtype=torch.float64)
    best = front(ref, r, args.beta, torch.stack([lams, 1 - lams], 1))
    out.mkdir(parents=True, exist_ok=True)
    (out / "five.json").write_text(json.dumps({"dims": args.dims, "scale": args.scale, "seed": args.seed,
                                               "samples": args.samples, "front": best.tolist()} | runs))

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    left.plot(*best.T, "k:", label="front")
    for method, label in METHODS.items():
        J = torch.tensor(runs[method]["J"])
        (line,) = left.plot(*J.T, label=label)
        left.plot(*J[-1], "o", color=line.get_color())
        right.semilogy(runs[method]["distance"], label=label, color=line.get_color())
    left.plot(0, 0, "ks")
    left.set(xlabel=f"J: {args.dims[0]}", ylabel=f"J: {args.dims[1]}" + f" (reward times {args.scale:g})" * (
        args.scale != 1), title="from the base (square) to the last policy (dots)")
    left.legend(fontsize=8)
    right.set(xlabel="step", ylabel="‖Σ c ∇J‖, 1 at first", title="distance to Pareto-stationary")
    figure.savefig(out / "five.png", dpi=120)
    print(f"{out}/five.png")


if __name__ == "__main__":
    main()
