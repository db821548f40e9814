"""experiment.py - what λ does: teach the base model to begin its answers as λ says, and look at it along λ.

    python -m course.set1.experiment --out out/k8                     # about half a CPU minute
    python -m course.set1.experiment --out out/k0 --k 0
    python -m course.set1.experiment --out out/ends --vertices        # only λ = (1, 0) and λ = (0, 1) are ever trained

An answer begins with the word "Dear" (warm) or "Ha" (humorous). The loss is the cross-entropy of the first word to λ:
it asks for "Dear" with probability λ_1 and "Ha" with probability λ_2. The last norm and the head are frozen, so other
words keep a part. So the share of "Dear" is plotted, p(Dear) / (p(Dear) + p(Ha)), which should be λ_1; what is left for
other words is printed. Each row of a batch has a preference of its own. Writes lambda.png and lambda.json to --out.
"""
import argparse
import importlib
import json
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F

from course.gpt import load_base
from course.world import TOKENIZER
from data import toy

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

WORDS = ("Dear", "Ha")


def last_logits(model, prompts):
    """The logits of the first word of the answer: (B, V)."""
    ids = [TOKENIZER.encode(x + "\n") for x in prompts]
    tokens = torch.tensor([x + [0] * (max(map(len, ids)) - len(x)) for x in ids])     # (B, T)
    return model(tokens)[torch.arange(len(ids)), torch.tensor([len(x) - 1 for x in ids])]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/set1", help="folder of the picture")
    parser.add_argument("--k", type=int, default=8, help="learned rank")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--gain", type=float, default=64.0)
    parser.add_argument("--vertices", action="store_true", help="train at the vertices alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--adapters", default="course.adapters")
    args = parser.parse_args()
    adapters, out = importlib.import_module(args.adapters), Path(args.out)
    generator = torch.Generator().manual_seed(args.seed)
    model, ids = load_base(), [TOKENIZER.encode(word)[0] for word in WORDS]
    adapters.inject(model, args.k, 2, args.gain, generator)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.0)

    train = toy.prompts("train")
    for step in range(args.steps):
        rows = torch.randint(len(train), (32,), generator=generator).tolist()
        first = torch.rand(32, generator=generator)
        first = first.round() if args.vertices else first
        lam = torch.stack([first, 1 - first], 1)                                      # (B, 2), one a row
        adapters.set_preference(model, lam)
        logits = last_logits(model, [train[j] for j in rows])
        target = torch.zeros_like(logits).index_add(1, torch.tensor(ids), lam)        # (B, V) probabilities
        loss = F.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 0 or step == args.steps - 1:
            print(f"step {step:4d}  cross-entropy {loss.item():.4f}", flush=True)

    test, along = toy.prompts("new_verbs"), torch.linspace(0, 1, 11)
    with torch.no_grad():
        said = []
        for first in along:
            adapters.set_preference(model, torch.stack([first, 1 - first]))
            said.append(last_logits(model, test).softmax(-1)[:, ids].mean(0))
    said = torch.stack(said)                                                          # (11, 2)
    share = said[:, 0] / said.sum(1)                                                  # (11,) of "Dear"
    values = {name: {"sigma": p["sigma"].tolist(), "s": p["s"].item(),
                     "s_u_v": [p["s"].abs().item() * (p["U"][:, j].norm() * p["V"][:, j].norm()).item()
                               for j in (args.k, args.k + 1)]}                        # the size of λ_1's and λ_2's part
              for name, p in adapters.parts(model).items()}
    out.mkdir(parents=True, exist_ok=True)
    (out / "lambda.json").write_text(json.dumps(
        {"lam_1": along.tolist(), "said": said.tolist(), "share": share.tolist(), "values": values}, indent=1))

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(along, share, "o-", label="share of “Dear”")
    left.plot([0, 1], [0, 1], ":", color="grey")
    left.plot(along, 1 - said.sum(1), "x-", label="probability of other words")
    left.set(xlabel="λ₁", ylabel="first word, new verbs", title=f"k = {args.k}; dotted: λ₁")
    left.legend()
    right.bar(range(len(values)), [sum(v["s_u_v"]) / 2 for v in values.values()], label="|s| ‖u‖ ‖v‖, mean of both")
    right.plot(range(len(values)), [abs(v["s"]) for v in values.values()], "k_", label="|s|")
    right.set(title="λ's part in every matrix", xticks=range(len(values)))
    right.set_xticklabels([name.removeprefix("blocks.") for name in values], rotation=90, fontsize=6)
    right.legend()
    figure.savefig(out / "lambda.png", dpi=120)
    for kind in sorted({name.split(".", 2)[2] for name in values}):                   # attn.k, …, mlp.up
        sizes = torch.tensor([v["s_u_v"] for name, v in values.items() if name.endswith(kind)])
        print(f"{kind:8s}  |s| ‖u‖ ‖v‖ {sizes.mean():.3f}")
    print(f"largest distance of the share from λ_1: {(share - along).abs().max():.3f}   "
          f"other words, at λ_1 = 0: {1 - said[0].sum():.3f}, at 1: {1 - said[-1].sum():.3f}   {out}/lambda.png")


if __name__ == "__main__":
    main()
