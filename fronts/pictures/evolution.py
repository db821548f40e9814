"""evolution.py - one run over time (Panacea, Fig. 4)."""
import matplotlib
import numpy as np

from fronts.pictures.shared import EXACT, METHODS, arrays, plt


def evolution_figure(steps, results):
    """Left the first two dimensions' plane, right the hypervolume."""
    first, dims, world = results[0], results[0]["dims"], results[0]["exact"] is not None
    fig, axes = plt.subplots(1, 2, figsize=(12, 5.4), layout="constrained")
    shades = matplotlib.colormaps["viridis"](np.linspace(0.9, 0.0, len(results)))
    if world:
        axes[0].plot(*arrays(first["exact"])[1].T[:2], color=EXACT, lw=1.5, label="Exact front")
    for step, r, color in zip(steps, results, shades):
        axes[0].plot(*arrays(r)[1].T[:2], marker="o", ms=4, lw=1, color=color, label=f"step {step}")
    axes[0].set(xlabel=f"{dims[0]}  ({first['points_are']}; right is better)", ylabel=f"{dims[1]}  (up is better)")
    axes[0].legend(fontsize=8.5)
    axes[1].plot(steps, [r["hypervolume_share" if world else "hypervolume"] for r in results], marker="o",
                 color=METHODS["panacea"][0])
    axes[1].set(xlabel="optimizer steps", ylabel="share of the exact front's hypervolume" if world else
                f"hypervolume of the {first['points_are']}")
    for ax in axes:
        ax.grid(alpha=0.25)
    return fig
