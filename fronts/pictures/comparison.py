"""comparison.py - runs of every kind in one space: the mean scores of what they say.

c: what fronts.comparison.compare returns
"""
import numpy as np
from matplotlib import ticker

from fronts.pictures.shared import BASE, OUTLINE, PAIRS, arrays, edge_of, looks, nearest, plt


def comparison_figure(c):
    """Runs of every kind in the space of mean scores, beside what any policy can reach within so many nats of the base:
    m = 2 and 3, in every plane; more, each dimension where it has all the weight, and where all weigh the same. And two
    summaries: hypervolume, and gain against distance."""
    m, styles = len(c["dims"]), looks(c["runs"])
    layout = {2: "AAX;AAY", 3: "ABC;XXY"}.get(m, "AAX;BBY")
    fig, axes = plt.subplot_mosaic(layout, figsize=(15, 8.4) if m == 2 else (17, 10), layout="constrained")
    if m <= 3:
        for key, (i, j) in zip("ABC"[:2 * m - 3], PAIRS):
            draw_limits_plane(axes[key], c, styles, i, j)
    else:
        draw_limits_parallel(axes["A"], c, styles, np.eye(m), "all weight on the dimension itself")
        draw_limits_parallel(axes["B"], c, styles, np.full((m, m), 1 / m), "equal weights")
    draw_summaries(axes["X"], axes["Y"], c["runs"], styles)
    fig.suptitle("What the runs say. Grey: the most that any policy reaches within so many nats of the base")
    return fig


def draw_limits_plane(ax, c, styles, i, j):
    """Dimensions i and j: runs, and in grey the largest mean scores within each budget of nats. For m = 3 these are the
    curves without weight on the third dimension, the ends of what can be reached in this plane; the runs' points at
    such preferences are joined, the others faint."""
    edge = edge_of(np.array(c["limit_lams"]), i, j)
    for limit in c["limits"]:
        Y = np.array(limit["points"])[edge][:, [i, j]]
        free = limit["kl"] is None
        ax.plot(*Y.T, color="0.35" if free else "0.6", lw=1.6 if free else 0.8, zorder=1)
        ax.annotate("no limit" if free else f"{limit['kl']:g}", Y[-1], xytext=(0, -3), textcoords="offset points",
                    fontsize=8, color="0.35", ha="center", va="top", path_effects=OUTLINE, zorder=98)
    for n, (r, look) in enumerate(zip(c["runs"], styles)):
        lams, Y = arrays(r)
        on = edge_of(lams, i, j) if len(Y) > 1 else np.array([0])
        off = np.setdiff1d(range(len(lams)), on)
        front = dict(color=look["color"], marker=look["marker"], alpha=look["alpha"], zorder=3 + len(styles) - n)
        ax.plot(Y[off, i], Y[off, j], **front | {"alpha": 0.3 * look["alpha"]}, ls="", ms=3)
        ax.plot(Y[on, i], Y[on, j], **front, ms=9 if len(Y) == 1 else 6, lw=1.2)
    ax.plot(c["base"][i], c["base"][j], marker="*", ms=15, color=BASE, ls="", zorder=99)
    ax.annotate("base", (c["base"][i], c["base"][j]), xytext=(0, -9), textcoords="offset points", fontsize=9,
                color=BASE, ha="center", va="top", path_effects=OUTLINE)
    ax.set(xlabel=f"{c['dims'][i]}  ({c['points_are']}; right is better)",
           ylabel=f"{c['dims'][j]}  ({c['points_are']}; up is better)")
    ax.margins(0.08)
    ax.grid(alpha=0.25)


def draw_limits_parallel(ax, c, styles, targets, what):
    """Parallel coordinates: what each run, and any policy within each budget, reaches in dimension i at the preference
    targets[i], (m, m), where the run has it; a single policy is drawn in any case."""
    x = np.arange(len(c["dims"]))
    reached = lambda lams, Y: [Y[n, i] if len(Y) == 1 or np.abs(lams[n] - target).max() < 0.01 else np.nan
                               for i, target in enumerate(targets) for n in [nearest(lams, target)]]
    for limit in c["limits"]:
        y = reached(np.array(c["limit_lams"]), np.array(limit["points"]))
        free = limit["kl"] is None
        ax.plot(x, y, color="0.35" if free else "0.6", lw=1.6 if free else 0.8, zorder=1)
        ax.annotate("no limit" if free else f"{limit['kl']:g} nats", (x[-1], y[-1]), xytext=(5, 0), va="center",
                    textcoords="offset points", fontsize=8, color="0.35")
    for n, (r, look) in enumerate(zip(c["runs"], styles)):
        ax.plot(x, reached(*arrays(r)), color=look["color"], marker=look["marker"], alpha=look["alpha"], lw=1.4,
                zorder=3 + len(styles) - n)
    ax.plot(x, c["base"], color=BASE, ls="--", lw=1.8)
    ax.annotate("base", (x[-1], c["base"][-1]), xytext=(5, 0), va="center", textcoords="offset points", fontsize=8,
                color=BASE)
    ax.set_xlim(-0.3, x[-1] + 0.08 * len(x))                                             # room for the texts behind
    ax.set_xticks(x, c["dims"], rotation=25 if len(x) > 6 else 0)
    ax.set_title(f"Reached with {what}", fontsize=10)
    ax.set_ylabel(c["points_are"])
    ax.grid(axis="x", alpha=0.4)


def draw_summaries(shares, distances, runs, styles):
    """shares: the hypervolume that each name has, divided by that without a limit, one dot per seed; it is the legend
    of the whole picture, too. distances: gain in λ·scores divided by the largest possible at equal KL, against KL."""
    names = [look for look in styles if look["alpha"] == 1]
    for y, look in enumerate(names):
        x = [r["hypervolume_share"] for r in look["seeds"]]
        shares.plot([0, np.mean(x)], [y, y], color=look["color"], lw=5, alpha=0.2, solid_capstyle="butt")
        shares.plot(x, [y] * len(x), ls="", marker=look["marker"], ms=8, color=look["color"], alpha=0.7)
        shares.annotate(f"{np.mean(x):.1%}", (max(x), y), xytext=(9, 0), textcoords="offset points", va="center")
    models = [look["seeds"][0]["models"] for look in names]
    shares.set_yticks(range(len(names)),
                      [f"{look['name']}  ({n} model{'s' * (n > 1)})" for look, n in zip(names, models)])
    for label, look in zip(shares.get_yticklabels(), names):
        label.set(color=look["color"], fontweight="bold")
    shares.set(xlim=(0, 1.2 * max(r["hypervolume_share"] for r in runs) or 1), ylim=(len(names) - 0.4, -0.6),
               xlabel="hypervolume divided by that without a limit", title="How much of the front")
    for r, look in zip(runs, styles):
        distances.plot(np.mean(r["kl"]), r["gain_share"], marker=look["marker"], ms=9, color=look["color"], alpha=0.8)
    distances.axhline(1, color="0.35", lw=1.6)
    distances.set(xscale="log", xlabel="mean KL to the base, nats", ylabel="gain in λ·scores / largest at this KL",
                  title="How well the distance is used")
    distances.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    distances.xaxis.set_major_formatter("{x:g}")
    distances.xaxis.set_minor_formatter(ticker.NullFormatter())
    distances.margins(0.15)
    for ax in (shares, distances):
        ax.grid(axis="x", alpha=0.25)
