"""shared.py - the look that all pictures share: how runs are drawn, colours, legends, and how a picture is saved.

F: preferences   m: dimensions   lams: (F, m)   points: (F, m), larger is better
r: a run's front.json   Colours differ for colour-blind readers too (Okabe and Ito, Tol); a hue is a method, everywhere.
"""
from pathlib import Path

import matplotlib
import numpy as np

from fronts.objective import OBJECTIVES
from runs.files import write_whole

matplotlib.use("Agg")
from matplotlib import colors, patheffects  # noqa: E402  (after the backend)
from matplotlib import pyplot as plt

plt.rcParams.update({"figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.25, "axes.titlesize": 11,
                     "figure.titlesize": 11, "legend.fontsize": 9})
METHODS = {"panacea": ("#0072B2", "o"), "rs": ("#D55E00", "s"), "dps": ("#009E73", "^"), "hqd": ("#000000", "P"),
           "pama": ("#E69F00", "D"), "mgda": ("#A6611A", "v"), "prompt": ("#F0E442", "h")}       # hue and marker
OTHER = ("#56B4E9", "*")                                                                 # of any other method
EXACT, BASE = "0.45", "#CC79A7"
DIMENSION = ("#332288", "#DDAA33", "#44AA99", "#CC6677", "#117733", "#88CCEE", "#882255", "#999933", "#AA4499",
             "#000000")
PAIRS = ((0, 1), (0, 2), (1, 2))
OUTLINE = [patheffects.withStroke(linewidth=2.5, foreground="white")]


def dimension_color(i):
    """The colour of dimension i: the first ten by name, then hues a golden angle apart, so that no two are equal."""
    return DIMENSION[i] if i < len(DIMENSION) else colors.hsv_to_rgb([0.618034 * i % 1, 1, 0.8 - 0.3 * (i % 2)])


def arrays(r, key="points"):
    """lams and points (or J, or scores) of a run or of an exact front, along λ_1: two arrays (F, m)."""
    lams, points = np.array(r["lams"]), np.array(r[key])
    order = np.argsort(lams[:, 0], kind="stable")
    return lams[order], points[order]


def way_to(lams, i):
    """The rows of lams (F, m) between "nothing on i" and "all on i", the others weighing the same; along λ_i.

    Of the usual preferences for m > 3 those are the centre and the four on the way to the vertex i; for m = 2 all.
    """
    way = np.flatnonzero(np.ptp(np.delete(lams, i, axis=1), axis=1) < 1e-4)
    return way[np.argsort(lams[way, i])]


def nearest(lams, target):
    """The row of lams (F, m) nearest to the preference `target` (m,)."""
    return int(np.abs(lams - target).sum(1).argmin())


def edge_of(lams, i, j):
    """The rows of lams (F, m) with all weight on i and j, along λ_i; for m = 2 all."""
    edge = np.flatnonzero(lams[:, i] + lams[:, j] > 1 - 1e-4)
    return edge[np.argsort(lams[edge, i])]


def looks(runs):
    """How each run is drawn: a list of dicts with color, marker, alpha, name, and seeds: the runs of its name.

    A name is the run's "label", and its aggregation where that is not linear. Runs of one name that differ in their
    seeds share a colour, the first alone is opaque; names of one method are shades of its hue, with other markers:
    where several objectives meet, the marker tells which was trained for.
    """
    names = [r["label"] + " (Tchebycheff)" * (r["objective"]["aggregate"] == "tche") for r in runs]
    for name in set(names):
        same = [r for r, n in zip(runs, names) if n == name]
        if len({r["seed"] for r in same}) < len(same) or len({r["steps"] for r in same}) > 1:   # other settings then
            names = [f"{n} [{Path(r['run']).name}]" if n == name else n for r, n in zip(runs, names)]
    several, result = len({r["objective"]["name"] for r in runs}) > 1, []
    styles = [METHODS.get(r["method"], OTHER) for r in runs]
    for j, (r, style, name) in enumerate(zip(runs, styles, names)):
        shades = list(dict.fromkeys(n for n, other in zip(names, styles) if other == style))
        k, color = shades.index(name), np.array(colors.to_rgb(style[0]))
        t = np.linspace(-0.3 if color.any() else 0, 0.42, len(shades))[k] if len(shades) > 1 else 0
        color = (1 - abs(t)) * color + max(t, 0)                                          # towards black or white
        marker = OBJECTIVES[r["objective"]["name"]].marker if several else (style[1] + "X<ph>8")[k % 7]
        result.append({"color": color, "marker": marker, "alpha": 0.3 if name in names[:j] else 1.0, "name": name,
                       "seeds": [q for q, n in zip(runs, names) if n == name]})
    return result


def legend_text(look):
    """Its name, its models, the mean regret of its seeds; None for every seed but the first, which has no entry."""
    regrets, n = [r["regret"] for r in look["seeds"]], look["seeds"][0]["models"]
    seeds = f" ({len(regrets)} runs)" if len(regrets) > 1 else ""
    regret = f": regret {np.mean(regrets):.3f}" if None not in regrets else ""
    return f"{look['name']}, {n} model{'s' * (n > 1)}{regret}{seeds}" if look["alpha"] == 1 else None


def finish_plane(ax, dims, unit, base):
    """Two dimensions' names on the axes of a plane, and the base model (2,) as a star; None where it has no place."""
    ax.set(xlabel=f"{dims[0]}  ({unit}; right is better)", ylabel=f"{dims[1]}  ({unit}; up is better)")
    if base is not None:
        ax.plot(*base, marker="*", ms=15, color=BASE, ls="", label="Base model", zorder=98)


def draw_tracking(ax, i, results):
    """What dimension i reaches, against its weight λ_i: the runs, the exact front, the base. A line where the other
    dimensions weigh the same (way_to), or a dot for every preference where few such are known."""
    front, base, dim = results[0]["exact"], results[0]["base"]["points"], results[0]["dims"][i]
    if front:
        E_lams, E = arrays(front)
        way = way_to(E_lams, i)
        ax.plot(E_lams[way, i], E[way, i], color=EXACT, lw=1.5, label="Exact front")
    for j, (r, look) in enumerate(zip(results, looks(results))):
        lams, Y = arrays(r)
        way = way_to(lams, i)
        way, line = (way, "-") if len(way) > 2 else (slice(None), "")
        ax.plot(lams[way, i], Y[way, i], ls=line, marker=look["marker"], ms=5, color=look["color"], alpha=look["alpha"],
                label=look["name"] if look["alpha"] == 1 else None, zorder=2 + len(results) - j)
    if base is not None:
        ax.axhline(base[i], color=BASE, ls="--", lw=1.2, label="Base model")
    ax.set_xlabel(f"λ of {dim}")
    ax.set_title(dim, color=dimension_color(i), fontweight="bold")


def save(fig, path):
    """Writes a figure as a picture, whole or not at all, and closes it. Returns the figure."""
    write_whole(path, lambda f: fig.savefig(f, dpi=130))
    plt.close(fig)
    return fig
