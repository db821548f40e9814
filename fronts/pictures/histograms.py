"""histograms.py - the rewards of sampled responses (Panacea, Fig. 3)."""
import numpy as np

from fronts.pictures.shared import METHODS, plt


def histograms_figure(samples):
    """Raw rewards before alignment and under a few preferences, one column per dimension.

    samples: samples.json, with "dims", "lams" (F, m), "raw" (F, R, m) and "base": {"raw": (R, m)}.
    """
    dims, lams, raw = samples["dims"], np.array(samples["lams"]), np.array(samples["raw"])
    before, color = np.array(samples["base"]["raw"]), METHODS["panacea"][0]
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
            ax, part = axes[row, column], lambda x: np.full(len(x), 1 / len(x))
            ax.hist(before[:, column], bins, weights=part(before), color="0.75", label="base model, before")
            ax.hist(raw[i, :, column], bins, weights=part(raw[i]), histtype="step", lw=1.8, color=color,
                    label="after")
            ax.axvline(before[:, column].mean(), color="0.45", lw=1, ls=":")
            ax.axvline(raw[i, :, column].mean(), color=color, lw=1, ls="--")
            if column == 0:
                ax.set_ylabel("λ = (" + ", ".join(f"{x:.2g}" for x in lams[i]) + ")", fontsize=9)
        axes[-1, column].set_xlabel(f"reward: {dim}")
    axes[0, 0].legend(fontsize=8, loc="upper left")
    fig.suptitle("Rewards of sampled responses (part of the responses; dashed and dotted: means)", fontsize=11)
    return fig
