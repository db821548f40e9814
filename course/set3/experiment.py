"""experiment.py - six ways to steer by λ, without a model: policies are tables, and the best of all is known.

    python -m course.set3.experiment --out out/ways                   # seconds to a few CPU minutes, by your functions
    python -m course.set3.experiment --out out/quick --prompts 1 --lams 3       # does it run?

Takes prompts of the embedded world with their listed responses, steers in six ways by your functions, and judges each
way by DPO's and by RLHF's objectives. Writes ways.png and ways.json to --out.

F: preferences   X: prompts   S: listed responses   m = 2 dimensions   a policy: log-probabilities (X, S)
"""
import argparse
import importlib
import json
import math
import sys
from pathlib import Path

import matplotlib
import torch

from data import toy

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

BEST = {"dpo": "newton", "rlhf": "tilt"}                              # which way should be the best one
BELOW = -0.1                                                          # where hypervolume begins, ends being 0 and 1
LOOKS = {"newton": {"color": "0.75", "linewidth": 5}, "tche": {"color": "#E69F00"}, "tilt": {"color": "#0072B2"},
         "coin": {"color": "#D55E00"}, "one for all": {"color": "#CC79A7", "markersize": 9, "linestyle": ""},
         "leaky": {"color": "#009E73", "linestyle": ":"}}


def listed(x):
    """Log-probabilities of a policy that says nothing but listed responses, from numbers up to a constant."""
    return x - x.logsumexp(-1, keepdim=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/set3", help="folder of the picture")
    parser.add_argument("--dims", nargs=2, default=["helpful", "harmless"], choices=toy.DIMS)
    parser.add_argument("--beta", type=float, default=1.0)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--lams", type=int, default=11, help="preferences")
    parser.add_argument("--outside", type=float, default=1.4e-4, help="outside mass of the base (default: data/base's)")
    parser.add_argument("--trained", help="fronts.json of set 2's experiment: its models beside the tables")
    parser.add_argument("--adapters", default="course.adapters")
    args = parser.parse_args()
    adapters, out, beta = importlib.import_module(args.adapters), Path(args.out), args.beta
    trained = json.loads(Path(args.trained).read_text()) if args.trained else None
    if trained and trained["dims"] != args.dims:
        print(f"{args.trained} is of {' '.join(trained['dims'])}: give --dims the same", file=sys.stderr)
        return 2
    prompts = toy.prompts("new_verbs")[::len(toy.prompts("new_verbs")) // args.prompts][:args.prompts]
    scores = torch.stack([toy.scores(x, toy.responses(x), args.dims) for x in prompts])               # (X, S, m)
    ref = torch.stack([toy.base_probs(x) for x in prompts]).log() + math.log1p(-args.outside)         # (X, S)
    first = torch.linspace(0, 1, args.lams, dtype=torch.float64)
    lams = torch.stack([first, 1 - first], 1)                                                         # (F, m)

    # 1. the policies of each way, (F, X, S)
    best = torch.stack([adapters.dpo_optimum(scores, lam) for lam in lams])           # h; from here to log π
    newton = listed(ref + best / beta)
    ends = newton[[-1, 0]]                                                            # λ = (1, 0) and (0, 1)
    middle = listed(ref + adapters.dpo_optimum(scores, torch.full((2,), 0.5, dtype=torch.float64)) / beta)
    ways = {"newton": newton,
            "tche": listed(ref + torch.stack([adapters.tche_optimum(scores, lam) for lam in lams]) / beta),
            "tilt": torch.stack([adapters.rlhf_optimum(lam, ref, scores, toy.OUTSIDE, beta) for lam in lams]),
            "coin": torch.stack([(lam.log()[:, None, None] + ends).logsumexp(0) for lam in lams]),
            "one for all": middle.expand_as(newton), "leaky": newton + math.log(0.9)}

    # 2. what they reach: J (m,) of a policy by either objective, and its mean scores
    judges = {"dpo": lambda logps: -adapters.exact_losses(beta * (logps - ref), scores).mean(0),
              "rlhf": lambda logps: adapters.rlhf_objectives(logps, ref, scores, toy.OUTSIDE, beta),
              "scores": lambda logps: adapters.rlhf_objectives(logps, ref, scores, toy.OUTSIDE, 0.0)}
    base = {name: judge(ref) for name, judge in judges.items()}
    J = {name: {way: torch.stack([judge(logps) for logps in policies]) for way, policies in ways.items()}
         for name, judge in judges.items()}
    report = {"dims": args.dims, "beta": beta, "lam": lams.tolist(), "trained": trained,
              "base": {name: x.tolist() for name, x in base.items()},
              "points": {name: {way: x.tolist() for way, x in each.items()} for name, each in J.items()}}

    # 3. how good that is
    print(f"{'':20s}regret   worst   at λ         hypervolume share   not dominated by any of all")
    for name, optimal in BEST.items():
        low, high = J[name][optimal].amin(0), J[name][optimal].amax(0)
        scaled = {way: (x - low) / (high - low) for way, x in J[name].items()}        # 0 and 1: ends of the best front
        volume = {way: float(adapters.hypervolume_2d(x, torch.full((2,), BELOW, dtype=torch.float64)))
                  for way, x in scaled.items()}
        kept = adapters.nondominated(torch.cat(list(scaled.values())).round(decimals=6)).view(len(ways), -1).sum(1)
        report[name] = {"scaled": {way: x.tolist() for way, x in scaled.items()},
                        "base": ((base[name] - low) / (high - low)).tolist()}
        for way, n in zip(ways, kept.tolist()):
            regret, worst, lam = adapters.regret(lams, J[name][way], base[name], J[name][optimal])
            regret = round(float(regret), 6) + 0.0                                    # no "-0.000"
            single = [adapters.regret(lams[f:f + 1], J[name][way][f:f + 1], base[name], J[name][optimal][f:f + 1])[0]
                      for f in range(len(lams))]
            report[name] |= {way: {"regret": regret, "worst": float(worst), "worst_lam": lam.tolist(),
                                   "each": [float(x) for x in single], "nondominated": n,
                                   "hypervolume_share": volume[way] / volume[optimal]}}
            print(f"{name:6s}{way:13s}{regret:7.3f} {worst:7.3f}   {lam[0]:.2f} {lam[1]:.2f}   "
                  f"{volume[way] / volume[optimal]:17.3f}   {n:3d} of {len(lams)}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "ways.json").write_text(json.dumps(report, indent=1))

    figure, panels = plt.subplots(1, 3, figsize=(14, 4.5), layout="constrained")
    shown = {"dpo": (report["dpo"], "DPO's J; 0, 1: ends of the best front"),
             "rlhf": (report["rlhf"], "RLHF's J, scaled in the same way"),
             "scores": ({"scaled": report["points"]["scores"], "base": base["scores"].tolist()}, "mean scores")}
    for axes, (points, title) in zip(panels, shown.values()):
        for way, look in LOOKS.items():
            axes.plot(*zip(*points["scaled"][way]), **{"marker": "o", "markersize": 4, "label": way} | look)
        axes.plot(*points["base"], "ks", label="base")
        axes.set(xlabel=args.dims[0], ylabel=args.dims[1], title=title)
    for aggregate in ("ls", "tche") if trained else ():
        panels[2].plot(*zip(*trained[aggregate]["scores"]), {"ls": "kx--", "tche": "k+:"}[aggregate],
                       label=f"trained, {aggregate}")
    panels[2].legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(out / "ways.png", dpi=120)
    print(f"{out}/ways.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
