"""experiment.py - two fronts: linear scalarisation beside Tchebycheff, on the embedded world.

    python -m course.set2.experiment --out out/fronts                 # about five CPU minutes
    python -m course.set2.experiment --out out/quick --steps 20       # does it run?

Trains one model per aggregation with your training_step, a new preference every step, and measures the mean scores of
everything that it can say, for prompts with new verbs, at several λ. Writes fronts.png and fronts.json to --out.
"""
import argparse
import importlib
import json
import time
from pathlib import Path

import matplotlib
import torch

from course import earlier
from course.gpt import load_base
from course.world import mean_scores, pairs
from data import toy

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/set2", help="folder of the picture")
    parser.add_argument("--dims", nargs=2, default=["helpful", "harmless"], choices=toy.DIMS)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--beta", type=float, default=1.0)
    parser.add_argument("--prompts", type=int, default=8, help="prompts to measure on")
    parser.add_argument("--seed", type=int, default=0, help="of the data, the adapter, λ and the batches")
    parser.add_argument("--adapters", default="course.adapters")
    args = parser.parse_args()
    adapters, out = importlib.import_module(args.adapters), Path(args.out)
    layer = earlier.adapter(adapters)
    print(f"adapter: {layer.name}")
    rows = toy.sample_pairs("train", args.dims, 320, 8, torch.Generator().manual_seed(args.seed))
    expected = adapters.expected_counts([torch.tensor(row.better) for row in rows], 8)
    test = toy.prompts("new_verbs")[::len(toy.prompts("new_verbs")) // args.prompts][:args.prompts]
    lams = torch.linspace(0, 1, 7)
    lams = torch.stack([lams, 1 - lams], 1)

    base, fronts = mean_scores(load_base(), adapters.response_logprobs, test, args.dims), {}
    for aggregate in ("ls", "tche"):
        generator, start, model = torch.Generator().manual_seed(args.seed + 1), time.process_time(), load_base()
        layer.inject(model, 8, 2, 64.0, generator)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.0)
        for step in range(args.steps):
            optimizer.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)
            lam = adapters.sample_preference(1, 2, 1.0, 0.25, generator)[0]
            layer.set_preference(model, lam)
            batch = pairs([rows[j] for j in torch.randint(len(rows), (8,), generator=generator).tolist()])
            L = adapters.training_step(model, layer.adapters_off, optimizer, lam=lam, beta=args.beta, expected=expected,
                                       aggregate=aggregate, **batch)
            if step % 25 == 0 or step == args.steps - 1:
                print(f"{aggregate} step {step:4d}  λ {lam[0]:.2f} {lam[1]:.2f}  losses {L[0]:.3f} {L[1]:.3f}  "
                      f"{time.process_time() - start:.0f} CPU seconds", flush=True)
        points = []
        for lam in lams:
            layer.set_preference(model, lam)
            points.append(mean_scores(model, adapters.response_logprobs, test, args.dims))
        fronts[aggregate] = {"scores": [p.tolist() for p, _ in points], "outside": [outside for _, outside in points]}
    out.mkdir(parents=True, exist_ok=True)
    (out / "fronts.json").write_text(json.dumps({"dims": args.dims, "lam": lams.tolist(),
                                                 "base": base[0].tolist()} | fronts, indent=1))

    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    for aggregate, front in fronts.items():
        x, y = zip(*front["scores"])
        axes.plot(x, y, "o-", label={"ls": "linear scalarisation", "tche": "Tchebycheff"}[aggregate])
        for lam, *point in zip(lams, x, y):
            axes.annotate(f"{lam[0]:.2f}", point, fontsize=7)
    axes.plot(*base[0], "ks", label="base model")
    axes.set(xlabel=f"mean score: {args.dims[0]}", ylabel=f"mean score: {args.dims[1]}",
             title=f"numbers: λ of “{args.dims[0]}”")
    axes.legend()
    figure.savefig(out / "fronts.png", dpi=120)
    print(f"{out}/fronts.png")


if __name__ == "__main__":
    main()
