"""comparison.py - runs of every kind in one space: the mean scores of what they say.

c: what fronts.comparison.compare returns
"""
import numpy as np
from matplotlib import ticker

from fronts.pictures.shared import OUTLINE, PAIRS, arrays, edge_of, finish_plane, looks, plt, save


def draw_comparison(c, path):
    """Runs of every kind in the space of mean scores: for m = 2 and 3 every plane, beside what any policy can reach
    within so many nats of the base; for any m two summaries, hypervolume, and gain against distance."""
    styles = looks(c["runs"])
    panels, size = {2: ("AAX;AAY", (15, 8.4)), 3: ("ABC;XXY", (17, 10))}.get(len(c["dims"]), ("XXY", (17, 5)))
    fig, axes = plt.subplot_mosaic(panels, figsize=size)
    for key, (i, j) in zip("ABC", PAIRS):
        if key in axes:
            draw_limits_plane(axes[key], c, styles, i, j)
    draw_summaries(axes["X"], axes["Y"], c["runs"], styles)
    fig.suptitle("What the runs say. Grey: the most that any policy reaches within so many nats of the base, the star")
    return save(fig, path)


def draw_limits_plane(ax, c, styles, i, j):
    """Dimensions i and j: runs, and in grey the largest mean scores within each budget of nats. For m = 3 these are the
    curves without weight on the third dimension, the ends of what can be reached in this plane; the runs' points at
    such preferences are joined, the others faint."""
    edge = edge_of(np.array(c["limit_lams"]), i, j)
    for limit in c["limits"]:
        Y = np.array(limit["points"])[edge][:, [i, j]]
        ax.plot(*Y.T, color="0.6", lw=0.8 if limit["kl"] else 1.6, zorder=1)
        ax.annotate(f"{limit['kl']:g}" if limit["kl"] else "no limit", Y[-1], xytext=(0, -3), fontsize=8, color="0.35",
                    textcoords="offset points", ha="center", va="top", path_effects=OUTLINE, zorder=98)
    for n, (r, look) in enumerate(zip(c["runs"], styles)):
        lams, Y = arrays(r)
        on = edge_of(lams, i, j) if len(Y) > 1 else [0]
        front = dict(color=look["color"], marker=look["marker"], zorder=3 + len(styles) - n)
        ax.plot(Y[:, i], Y[:, j], ls="", ms=3, alpha=0.3 * look["alpha"], **front)
        ax.plot(Y[on, i], Y[on, j], ms=9 if len(Y) == 1 else 6, lw=1.2, alpha=look["alpha"], **front)
    finish_plane(ax, [c["dims"][i], c["dims"][j]], c["points_are"], [c["base"][i], c["base"][j]])
    ax.margins(0.08)


def draw_summaries(shares, distances, runs, styles):
    """shares: the hypervolume that each name has, divided by that without a limit, one dot per seed; it is the legend
    of the whole picture, too. distances: gain in λ·scores divided by the largest possible at equal KL, against KL."""
    names = [look for look in styles if look["alpha"] == 1]
    for y, look in enumerate(names):
        x = [r["hypervolume_share"] for r in look["seeds"]]
        shares.barh(y, np.mean(x), 0.1, color=look["color"], alpha=0.2)
        shares.plot(x, [y] * len(x), ls="", marker=look["marker"], ms=8, color=look["color"], alpha=0.7)
        shares.annotate(f"{np.mean(x):.1%}", (max(x), y), xytext=(9, 0), textcoords="offset points", va="center")
    shares.set_yticks(range(len(names)), [f"{look['name']}  (models: {look['seeds'][0]['models']})" for look in names])
    for label, look in zip(shares.get_yticklabels(), names):
        label.set(color=look["color"], fontweight="bold")
    shares.set(xlabel="hypervolume divided by that without a limit", title="How much of the front")
    shares.margins(x=0.25)
    shares.invert_yaxis()
    for r, look in zip(runs, styles):
        distances.plot(np.mean(r["kl"]), r["gain_share"], marker=look["marker"], ms=9, color=look["color"], alpha=0.8)
    distances.axhline(1, color="0.35", lw=1.6)
    distances.set(xscale="log", xlabel="mean KL to the base, nats", ylabel="gain in λ·scores / largest at this KL",
                  title="How well the distance is used")
    distances.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    distances.xaxis.set_major_formatter("{x:g}")
    distances.xaxis.set_minor_formatter(ticker.NullFormatter())
    distances.margins(0.15)
