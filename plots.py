"""plots.py - pictures of fronts, drawn from what eval_front.py writes into front.json.

results: a list of such dicts, one a run, the first in the foreground; points (N, m), larger is better; lams (N, m).
Colours are chosen to differ for colour-blind readers too.
"""
import matplotlib
import numpy as np

from common import write_whole

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen: no window is needed)

STYLE = {"panacea": ("#0072B2", "o", "Panacea: one model, every preference"), "rs": ("#D55E00", "s", "Rewarded soups"),
         "dps": ("#009E73", "^", "Discrete policy solutions"), "hqd": ("#000000", "P", "ParetoHqD"),
         "pama": ("#E69F00", "D", "PAMA: one policy, no preference"),
         "mgda": ("#56B4E9", "v", "MGDA: one policy, no preference")}


def draw_fronts(results, path):
    """Draws fronts: for m = 2 the plane of objectives and of mean scores, otherwise every pair of objectives."""
    dims = results[0]["dims"]
    fig = _picture_2d(results, dims) if len(dims) == 2 else _picture_pairs(results, dims)
    _save(fig, path)


def _label(r, results):
    """Colour, marker and legend text of one run among `results`; a result may bring its own "label"."""
    kind = lambda o: o["aggregate"] if o["aggregate"] in STYLE else o["method"]
    color, marker, text = STYLE[kind(r)]
    twins = [o for o in results if kind(o) == kind(r)]
    if len(twins) > 1:                                                                # several runs of one method
        color = matplotlib.colormaps["viridis"](0.9 * twins.index(r) / (len(twins) - 1))
        text = r.get("label", f"{text} ({r['aggregate'].upper()}, seed {r['seed']})")
    share = r["hypervolume_share"]
    return color, marker, text + (f": {share:.1%} of the exact hypervolume" if share is not None else "")


def _picture_2d(results, dims):
    first = results[0]
    world, sampled = first["exact"] is not None, first["points_are"] == "normalised mean reward"
    goal = "J = E r − β KL" if first["script"] == "train_ppo.py" else "−DPO loss"
    left = ("Objectives: 1 is the best that any policy can do, 0 the worst on the exact front" if world else
            "Mean rewards of sampled responses, ± standard error" if sampled else
            "Held-out accuracy of the implicit reward")
    key, right = (("scores", "What the model says: mean score of its responses") if world else
                  ("J", f"Held-out objective, {goal}"))
    fig, axes = plt.subplots(1, 2, figsize=(13, 5.8), layout="constrained")
    for ax, key, title in ((axes[0], "scores" if sampled else "points", left), (axes[1], key, right)):
        if world:                                             # on the right: the scores of the same optimal policies
            ax.plot(*np.array(first["exact"][key]).T, color="0.25", lw=1.5, zorder=1,
                    label="Exact front: the optimum over all policies")
        for j, r in enumerate(results):
            color, marker, text = _label(r, results)
            P = np.array(r[key])
            if key == "scores" and not world:
                error = np.array(r["scores_se"])
                ax.errorbar(P[:, 0], P[:, 1], error[:, 1], error[:, 0], color=color, lw=0.8, alpha=0.5, zorder=1)
            ax.plot(P[:, 0], P[:, 1], color=color, marker=marker, ms=6, lw=1, alpha=0.9, label=text, zorder=2 + j)
            if j == 0 and len(P) > 1:                                                 # λ along the first run's curve
                for lam, p in zip(r["lams"], P):
                    ax.annotate(f"{lam[0]:.1f}", p, xytext=(7, 5), textcoords="offset points", fontsize=8, color=color)
        if first["base"][key] is not None:
            ax.plot(*first["base"][key], marker="*", ms=15, color="#CC79A7", ls="",
                    label="Base model, before alignment", zorder=9)
        unit = {"points": f"normalised {goal}" if world else "share of pairs ordered as labelled",
                "scores": "reward" if sampled else "Bradley-Terry score",
                "J": "normalised reward − β KL" if sampled else goal}[key]
        ax.set_xlabel(f"{dims[0]}  ({unit}; right is better)")
        ax.set_ylabel(f"{dims[1]}  ({unit}; up is better)")
        ax.set_title(title, fontsize=11)
        ax.grid(alpha=0.25)
    axes[0].legend(fontsize=8.5, loc="lower left" if world else "best")
    if not world:
        axes[1].legend(fontsize=8.5, loc="best")
    fig.suptitle(f"One preference λ = (weight of {dims[0]}, weight of {dims[1]}) a point; "
                 f"small numbers: weight of {dims[0]}", fontsize=11)
    return fig


def _picture_pairs(results, dims):
    """Every pair of objectives; a point's colour mixes red, green, blue as its λ weighs the first three dimensions."""
    m, world = len(dims), results[0]["exact"] is not None
    pairs = [(i, j) for i in range(m) for j in range(i + 1, m)][:6]
    columns = min(3, len(pairs))
    fig, axes = plt.subplots(-(-len(pairs) // columns), columns,
                             figsize=(5.2 * columns, 5.4 * -(-len(pairs) // columns)),
                             layout="constrained", squeeze=False)
    for ax, (i, j) in zip(axes.flat, pairs):
        if world:
            E = np.array(results[0]["exact"]["points"])
            ax.scatter(E[:, i], E[:, j], s=7, color="0.82", label="Exact front (all preferences)", zorder=1)
        for n, r in enumerate(results):
            _, marker, text = _label(r, results)
            P, lam = np.array(r["points"]), np.array(r["lams"])
            rgb = np.clip(np.pad(lam, ((0, 0), (0, max(0, 3 - m))))[:, :3], 0, 1) ** 0.7
            ax.scatter(P[:, i], P[:, j], s=34, c=rgb, marker=marker, edgecolors="k", linewidths=0.4,
                       label=text, zorder=2 + n)
        if world:
            b = results[0]["base"]["points"]
            ax.plot(b[i], b[j], marker="*", ms=15, color="#CC79A7", ls="",
                    label="Base model, before alignment", zorder=9)
        ax.set_xlabel(f"{dims[i]}  ({results[0]['points_are']}; right is better)")
        ax.set_ylabel(f"{dims[j]}  (up is better)")
        ax.grid(alpha=0.25)
    axes[0, 0].legend(fontsize=8, loc="lower left")
    fig.suptitle("Colour is the preference: "
                 + ", ".join(f"{c} = all weight on {d}" for c, d in zip(("red", "green", "blue"), dims))
                 + "; mixtures between", fontsize=11)
    return fig


def draw_comparison(c, path):
    """Runs of every kind in one space: what eval_front.compare returns."""
    fig, ax = plt.subplots()
    for r in c["runs"]:
        P = np.array(r["points"])
        ax.plot(P[:, 0], P[:, 1], marker="o", label=r["label"])
    _save(fig, path)


def draw_histograms(result, path):
    """Fig. 3: the rewards of sampled responses before alignment and under a few preferences, a column a dimension.

    result: with "samples", {"raw": (N, responses, m), "base": {"raw": (responses, m)}}, raw rewards.
    """
    dims, lams, raw = result["dims"], np.array(result["lams"]), np.array(result["samples"]["raw"])
    before = np.array(result["samples"]["base"]["raw"])
    order = np.argsort(-lams[:, 0], kind="stable")
    shown = order[np.unique(np.linspace(0, len(order) - 1, min(5, len(order))).round().astype(int))]
    fig, axes = plt.subplots(len(shown), len(dims), figsize=(4.6 * len(dims), 1.5 * len(shown) + 1),
                             layout="constrained", squeeze=False, sharex="col", sharey="col")
    for column, dim in enumerate(dims):
        low, high = (f(min(raw[..., column].min(), before[:, column].min()), max(raw[..., column].max(),
                                                                                 before[:, column].max()))
                     for f in (min, max))
        bins = np.linspace(low, high + 1e-9, 25)
        for row, i in enumerate(shown):
            ax, share = axes[row, column], lambda x: np.full(len(x), 1 / len(x))
            ax.hist(before[:, column], bins, weights=share(before), color="0.75", label="base model, before")
            ax.hist(raw[i, :, column], bins, weights=share(raw[i]), histtype="step", lw=1.8, color="#0072B2",
                    label="after")
            ax.axvline(before[:, column].mean(), color="0.45", lw=1, ls=":")
            ax.axvline(raw[i, :, column].mean(), color="#0072B2", lw=1, ls="--")
            if column == 0:
                ax.set_ylabel("λ = (" + ", ".join(f"{x:.2g}" for x in lams[i]) + ")", fontsize=9)
        axes[-1, column].set_xlabel(f"reward: {dim}")
    axes[0, 0].legend(fontsize=8, loc="upper left")
    fig.suptitle("Rewards of sampled responses (share of them; dashed and dotted: means)", fontsize=11)
    _save(fig, path)


def draw_evolution(steps, results, path):
    """Fig. 4: how the front moves out over the training steps, and the share of the hypervolume it has reached."""
    dims, world = results[0]["dims"], results[0]["exact"] is not None
    fig, axes = plt.subplots(1, 2, figsize=(12, 5.4), layout="constrained")
    colors = matplotlib.colormaps["viridis"](np.linspace(0.9, 0.0, len(results)))
    if world:
        E = np.array(results[0]["exact"]["points"])
        axes[0].plot(E[:, 0], E[:, 1], color="0.25", lw=1.5, label="Exact front")
    for step, r, color in zip(steps, results, colors):
        P = np.array(r["points"])
        axes[0].plot(P[:, 0], P[:, 1], marker="o", ms=4, lw=1, color=color, label=f"step {step}")
    axes[0].set_xlabel(f"{dims[0]}  ({results[0]['points_are']}; right is better)")
    axes[0].set_ylabel(f"{dims[1]}  (up is better)")
    axes[0].legend(fontsize=8.5)
    value = [r["hypervolume_share"] if world else r["hypervolume"] for r in results]
    axes[1].plot(steps, value, marker="o", color="#0072B2")
    axes[1].set_xlabel("optimizer steps")
    axes[1].set_ylabel("share of the exact front's hypervolume" if world else "hypervolume of the accuracies")
    for ax in axes:
        ax.grid(alpha=0.25)
    _save(fig, path)


def _save(fig, path):
    write_whole(path, lambda f: fig.savefig(f, dpi=130))
    plt.close(fig)
