"""histograms.py - the rewards of sampled responses (Panacea, Fig. 3)."""
import numpy as np

from fronts.pictures.shared import METHODS, plt, save


def draw_histograms(samples, path):
    """Raw rewards before alignment and under a few preferences, one column per dimension.

    samples: samples.json, with "dims", "lams" (F, m), "raw" (F, R, m) and "base": {"raw": (R, m)}.
    """
    dims, lams, raw, before = samples["dims"], *map(np.array, (samples["lams"], samples["raw"], samples["base"]["raw"]))
    order = np.argsort(-lams[:, 0], kind="stable")
    shown = order[np.unique(np.linspace(0, len(order) - 1, 5).round().astype(int))]           # five, or all if fewer
    fig, axes = plt.subplots(len(shown), len(dims), figsize=(4.6 * len(dims), 1.5 * len(shown) + 1), squeeze=False,
                             sharex="col", sharey="col")
    for row, i in enumerate(shown):
        for column, ax in enumerate(axes[row]):
            bins = np.histogram_bin_edges(np.append(before[:, column], raw[..., column]), 24)
            for rewards, color, kind, label in ((before, "0.45", "stepfilled", "base model, before"),
                                                (raw[i], METHODS["panacea"][0], "step", "after")):
                ax.hist(rewards[:, column], bins, weights=np.full(len(rewards), 1 / len(rewards)), histtype=kind,
                        lw=1.8, color=color, label=label, alpha=0.7)
                ax.axvline(rewards[:, column].mean(), color=color, lw=1, ls="--")
        axes[row, 0].set_ylabel("λ = (" + ", ".join(f"{x:.2g}" for x in lams[i]) + ")", fontsize=9)
    for ax, dim in zip(axes[-1], dims):
        ax.set_xlabel(f"reward: {dim}")
    axes[0, 0].legend(loc="upper left")
    fig.suptitle("Rewards of sampled responses (part of the responses; dashed: means)")
    return save(fig, path)
