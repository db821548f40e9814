"""plots.py - pictures of fronts, drawn from what eval_front.py writes into front.json and compare.json.

N: preferences   m: dimensions   lams: (N, m)   points: (N, m) what is reached at each, larger is better
results: a list of front.json, one a run, the first in the foreground. Functions named *_figure return the figure, which
draw_fronts, draw_comparison, draw_evolution and draw_histograms write into a file. Colours differ for colour-blind
readers too (Okabe and Ito, Tol); a hue is a method, everywhere.
"""
from pathlib import Path

import matplotlib
import numpy as np

from runs.files import write_whole
from fronts.exact import NATS

matplotlib.use("Agg")
from matplotlib import colors, patheffects, pyplot as plt, ticker, tri  # noqa: E402  (after the backend)

STYLE = {"panacea": ("#0072B2", "o", "Panacea"), "rs": ("#D55E00", "s", "Rewarded soups"),
         "dps": ("#009E73", "^", "Discrete policy solutions"), "hqd": ("#000000", "P", "ParetoHqD"),
         "pama": ("#E69F00", "D", "PAMA"), "mgda": ("#A6611A", "v", "MGDA")}
OBJECTIVE = {"train_dpo.py": ("−DPO loss", "o"), "train_ppo.py": ("E r − β KL", "s"),
             "train_sft.py": ("E log π(y|x)", "^"), "train_hqd.py": ("mean score", "P")}       # J, marker among others
EXACT, BASE = "0.45", "#CC79A7"
CORNERS = np.array([colors.to_rgb(c) for c in ("#D55E00", "#009E73", "#0072B2")])       # m = 3: all weight on one
DIMENSION = ("#332288", "#DDAA33", "#44AA99", "#CC6677", "#117733", "#88CCEE", "#882255", "#999933", "#AA4499",
             "#000000")                                                                   # m > 3: a colour a dimension
PAIRS = ((0, 1), (0, 2), (1, 2))
OUTLINE = [patheffects.withStroke(linewidth=2.5, foreground="white")]


# ---------------------------------------------------------------------------------------------------------------------
# 1. What all pictures share.

def arrays(r, key="points"):
    """lams and points (or J, or scores) of a run or of an exact front, along λ_1: two arrays (N, m)."""
    lams, P = np.array(r["lams"]), np.array(r[key])
    order = np.argsort(lams[:, 0], kind="stable")
    return lams[order], P[order]


def way_to(lams, i):
    """The rows of lams (N, m) between "nothing on i" and "all on i", the others weighing the same; along λ_i.

    Of the usual preferences for m > 3 those are the centre and the four on the way to the vertex i; for m = 2 all.
    """
    way = np.flatnonzero(np.ptp(np.delete(lams, i, axis=1), axis=1) < 1e-4)
    return way[np.argsort(lams[way, i])]


def nearest(lams, target):
    """The row of lams (N, m) nearest to the preference `target` (m,)."""
    return int(np.abs(lams - target).sum(1).argmin())


def edge_of(lams, i, j):
    """The rows of lams (N, m) with all weight on i and j, along λ_i; for m = 2 all."""
    edge = np.flatnonzero(lams[:, i] + lams[:, j] > 1 - 1e-4)
    return edge[np.argsort(lams[edge, i])]


def looks(runs):
    """How each run is drawn: a list of dicts with color, marker, alpha, name, and seeds: the runs of its name.

    A name is a method (and an aggregation), or the run's own "label". Runs of one name that differ in their seeds share
    a colour, the first alone is opaque; names of one method are shades of its hue, with other markers: where several
    objectives meet, the marker tells which was trained for.
    """
    family = [r["aggregate"] if r["aggregate"] in STYLE else r["method"] for r in runs]
    names = [r.get("label") or STYLE[f][2] + {"ls": "", "directions": "", f: "", "tche": " (Tchebycheff)"}.get(
        r["aggregate"], f" ({r['aggregate']})") for r, f in zip(runs, family)]
    for name in set(names):
        same = [r for r, n in zip(runs, names) if n == name]
        if len({r["seed"] for r in same}) < len(same) or len({r["steps"] for r in same}) > 1:   # other settings then
            names = [f"{n} [{Path(r['run']).name}]" if n == name else n for r, n in zip(runs, names)]
    several, result = len({r["script"] for r in runs}) > 1, []
    for j, (r, f, name) in enumerate(zip(runs, family, names)):
        shades = list(dict.fromkeys(n for n, g in zip(names, family) if g == f))
        k, color = shades.index(name), np.array(colors.to_rgb(STYLE[f][0]))
        t = np.linspace(-0.3 if color.any() else 0, 0.42, len(shades))[k] if len(shades) > 1 else 0
        color = (1 - abs(t)) * color + max(t, 0)                                          # towards black or white
        marker = (OBJECTIVE[r["script"]][1] if several and f in ("panacea", "rs", "dps") else
                  (STYLE[f][1] + "X<ph>8")[k % 7])
        result.append({"color": color, "marker": marker, "alpha": 0.3 if name in names[:j] else 1.0, "name": name,
                       "seeds": [q for q, n in zip(runs, names) if n == name]})
    return result


def legend_text(look):
    """Its name, its models, the mean share of its seeds; None for every seed but the first, which has no entry."""
    shares, n = [r["hypervolume_share"] for r in look["seeds"]], look["seeds"][0]["models"]
    seeds = f" ({len(shares)} seeds)" if len(shares) > 1 else ""
    share = f": {np.mean(shares):.1%} of the exact hypervolume" if None not in shares else ""
    return f"{look['name']}, {n} model{'s' * (n > 1)}{share}{seeds}" if look["alpha"] == 1 else None


def draw_tracking(ax, i, results):
    """What dimension i reaches, against its weight λ_i: the runs, the exact front at the same preferences, the base.

    A line where the other dimensions weigh the same (way_to), or a dot for every preference where few such are known.
    """
    front, base = results[0]["exact"], results[0]["base"]["points"]
    if front:
        E_lams, E = arrays(front)
        way = way_to(E_lams, i)
        ax.plot(E_lams[way, i], E[way, i], color=EXACT, lw=1.5, label="Exact front")
    for j, (r, look) in enumerate(zip(results, looks(results))):
        lams, P = arrays(r)
        way, lone = way_to(lams, i), len(way_to(lams, i)) < 3
        if lone:
            way = np.arange(len(lams))
            if front and j == 0:
                same = [nearest(E_lams, lam) for lam in lams]
                ax.plot(E_lams[same, i], E[same, i], ls="", marker="_", ms=7, color=EXACT)
        ax.plot(lams[way, i], P[way, i], ls="" if lone else "-", marker=look["marker"], ms=5, color=look["color"],
                alpha=look["alpha"], label=look["name"] if look["alpha"] == 1 else None, zorder=2 + len(results) - j)
    if base is not None:
        ax.axhline(base[i], color=BASE, ls="--", lw=1.2, label="Base model")
    dim = results[0]["dims"][i]
    ax.set(xlabel=f"λ of {dim}", title=dim)
    ax.grid(alpha=0.25)


# ---------------------------------------------------------------------------------------------------------------------
# 2. The front of one run, or of several that have the same objectives.

def draw_fronts(results, path):
    """Draws fronts into the file `path`: one of the three figures below, by the number of dimensions."""
    save({2: plane_figure, 3: triangle_figure}.get(len(results[0]["dims"]), parallel_figure)(results), path)


def plane_figure(results):
    """m = 2: the plane of objectives, and that of mean scores; where these are the same, what each dimension reaches as
    its weight grows instead."""
    first, dims = results[0], results[0]["dims"]
    world, are, goal = first["exact"] is not None, first["points_are"], OBJECTIVE[first["script"]][0]
    sampled = are == "normalised mean reward"
    panels = [{"normalised J": ("points", f"normalised {goal}",
                                "Objectives: 1 is the best that any policy can do, 0 the worst on the exact front"),
               "normalised mean score": ("points", are, "Mean scores: 0 and 1 are the ends of the exact front within "
                                                        f"{NATS:g} nats of the base"),
               "normalised mean reward": ("scores", "reward", "Mean rewards of sampled responses, ± standard error"),
               "implicit-reward accuracy": ("points", "share of pairs ordered as labelled",
                                            "Held-out accuracy of the implicit reward"),
               "gain in log-likelihood": ("points", "nats", "Gain in log-likelihood on held-out demonstrations")}[are]]
    if are in ("normalised mean score", "gain in log-likelihood"):
        fig, axes = plt.subplot_mosaic("AAB;AAC", figsize=(12.5, 6.2), layout="constrained")
        for i, ax in enumerate((axes["B"], axes["C"])):
            draw_tracking(ax, i, results)
            ax.set_ylabel(panels[0][1])
        axes = [axes["A"]]
    else:
        fig, axes = plt.subplots(1, 2, figsize=(13, 5.8), layout="constrained")
        panels.append(
            ("scores", "Bradley-Terry score", "What the model says: mean scores (grey: of the optimal policies)")
            if world else ("J", f"normalised {goal}" if sampled else goal, f"Held-out objective, J = {goal}"))
    for ax, (key, unit, title) in zip(axes, panels):
        if world:                                             # on the right: the scores of the same optimal policies
            ax.plot(*arrays(first["exact"], key)[1].T, color=EXACT, lw=1.5, zorder=1,
                    label="Exact front: the optimum over all policies")
        for j, (r, look) in enumerate(zip(results, looks(results))):
            if world and abs(r["exact"]["hypervolume"] - first["exact"]["hypervolume"]) > 1e-3:    # another aggregation
                ax.plot(*arrays(r["exact"], key)[1].T, color=look["color"], lw=1.2, ls=":", zorder=1,
                        label=f"Exact front of {look['name']}" if look["alpha"] == 1 else None)
            lams, P = arrays(r, key)
            if key == "scores" and not world:
                error = arrays(r, "scores_se")[1]
                ax.errorbar(*P.T, error[:, 1], error[:, 0], color=look["color"], lw=0.8, alpha=0.4, ls="", zorder=1)
            ax.plot(*P.T, color=look["color"], marker=look["marker"], ms=6, lw=1, alpha=look["alpha"],
                    label=legend_text(look), zorder=2 + len(results) - j)
            for n in range(0, len(P) if j == 0 and len(P) > 1 else 0, -(-len(P) // 11)):    # λ along the first run
                ax.annotate(f"{lams[n, 0]:.2g}", P[n], xytext=(7, 5), textcoords="offset points", fontsize=8,
                            color=look["color"], path_effects=OUTLINE, zorder=1.5)
        if first["base"][key] is not None:
            ax.plot(*first["base"][key], marker="*", ms=15, color=BASE, ls="", label="Base model, before alignment",
                    zorder=98)
        ax.set(xlabel=f"{dims[0]}  ({unit}; right is better)", ylabel=f"{dims[1]}  ({unit}; up is better)")
        ax.set_title(title, fontsize=11)
        ax.grid(alpha=0.25)
        if ax is axes[0] or not world:
            ax.legend(fontsize=8.5)
    fig.suptitle(f"One preference λ = (weight of {dims[0]}, weight of {dims[1]}) a point; "
                 f"small numbers: weight of {dims[0]}", fontsize=11)
    return fig


def ternary(lams):
    """Preferences (…, 3) as points of an equilateral triangle with sides 1, (…, 2): the corners λ_1 = 1 below left,
    λ_2 = 1 below right, λ_3 = 1 on top."""
    return np.asarray(lams) @ np.array([[0, 0], [1, 0], [0.5, 0.75 ** 0.5]])


def triangulated(lams):
    """The triangulation of preferences (N, 3); None where they all lie on a line, or are fewer than three."""
    if len(lams) < 3 or np.linalg.matrix_rank(lams - lams[0], tol=1e-3) < 2:
        return None
    return tri.Triangulation(*ternary(lams).T)


def mixed(lams):
    """The colour of preferences (N, 3): CORNERS mixed by λ, brightened: (N, 3)"""
    return np.clip(np.asarray(lams) @ CORNERS, 0, 1) ** 0.8


def triangle_figure(results):
    """m = 3: the front in space, in the colours of λ; for each dimension what it reaches over the triangle of
    preferences (first run); and the three planes, with the exact front's edge where the third weighs nothing."""
    first, dims, styles = results[0], results[0]["dims"], looks(results)
    front, base = first["exact"], first["base"]["points"]
    fig = plt.figure(figsize=(17.5, 7.6), layout="constrained")
    grid = fig.add_gridspec(2, 4, width_ratios=(2, 1, 1, 1))
    space = fig.add_subplot(grid[:, 0], projection="3d", elev=28, azim=42)              # from outside: better is nearer
    triangles, planes = ([fig.add_subplot(grid[row, 1 + i]) for i in range(3)] for row in (0, 1))
    if front:
        E_lams, E = arrays(front)
        tenths = (np.abs(E_lams * 10 - np.round(E_lams * 10)) < 1e-6).all(1)                  # a net over the surface
        for at, look in ((slice(None), dict(color="0.8", alpha=0.35, lw=0)),
                         (tenths, dict(color=(0, 0, 0, 0), shade=False, lw=0.6, edgecolor="0.55"))):
            space.plot_trisurf(*E[at].T, triangles=triangulated(E_lams[at]).triangles, **look)
    for n, (r, look) in enumerate(zip(results, styles)):
        lams, P = arrays(r)
        dots = dict(c=mixed(lams), marker=look["marker"], edgecolors="k", linewidths=0.5, alpha=look["alpha"])
        space.scatter(*P.T, s=44, depthshade=False, label=legend_text(look), **dots)
        for ax, (i, j) in zip(planes, PAIRS):
            ax.scatter(P[:, i], P[:, j], s=20, zorder=2 + len(results) - n, **dots)
    if base is not None:
        space.plot(*[[x] for x in base], marker="*", ms=15, color=BASE, ls="", label="Base model, before alignment")
    for ax, (i, j) in zip(planes, PAIRS):
        if front:
            edge = edge_of(E_lams, i, j)
            ax.plot(E[edge, i], E[edge, j], color=EXACT, lw=1.5, zorder=0)
        if base is not None:
            ax.plot(base[i], base[j], marker="*", ms=13, color=BASE, ls="")
        ax.set(xlabel=f"{dims[i]}  (right is better)", ylabel=f"{dims[j]}  (up is better)")
        ax.grid(alpha=0.25)
    images = [draw_triangle(ax, i, first) for i, ax in enumerate(triangles)]
    fig.colorbar(images[0], ax=triangles, shrink=0.7, label=first["points_are"])
    space.set_box_aspect((1, 1, 1), zoom=0.97)
    space.set(xlabel=dims[0], ylabel=dims[1], zlabel=dims[2], title=f"The front: {first['points_are']}")
    fig.legend(*space.get_legend_handles_labels(), fontsize=9, loc="outside lower center", ncols=3)
    fig.suptitle("Points have the colour of their λ, as at the corners of the triangles; white lines: levels that "
                 f"{styles[0]['name']} reaches" + (", dotted: the exact front" if front else ""), fontsize=11)
    return fig


def draw_triangle(ax, i, r):
    """A heat map of what dimension i reaches over the triangle of preferences; dots where they do not fill it."""
    lams, P = arrays(r)
    low, high = (min(0, P.min()), max(1, P.max())) if r["exact"] else (P.min(), P.max() + 1e-9)
    shade = dict(vmin=low, vmax=high, cmap="cividis")
    if triangulated(lams) is None:
        image = ax.scatter(*ternary(lams).T, c=P[:, i], s=90, edgecolors="k", zorder=3, **shade)
    else:
        image = ax.tripcolor(triangulated(lams), P[:, i], shading="gouraud", **shade)
        for at, values, style in [(lams, P, "solid")] + ([(*arrays(r["exact"]), "dotted")] if r["exact"] else []):
            levels = [x for x in np.linspace(low, high, 6) if values[:, i].min() < x < values[:, i].max()]
            drawn = ax.tricontour(triangulated(at), values[:, i], levels, colors="white", linewidths=1.1,
                                  linestyles=style)
            if style == "solid":
                ax.clabel(drawn, fontsize=8, fmt="%.2g")
    corners = ternary(np.eye(3))
    ax.plot(*corners[[0, 1, 2, 0]].T, color="0.3", lw=1)
    for corner, dim, color, dy in zip(corners, r["dims"], CORNERS, (-0.08, -0.08, 0.08)):
        ax.text(corner[0], corner[1] + dy, dim, color=color, ha="center", va="center", fontsize=10, fontweight="bold")
    ax.set(title=f"{r['dims'][i]} by λ", aspect="equal", xlim=(-0.2, 1.2), ylim=(-0.12, 0.98))
    ax.axis("off")
    return image


def parallel_figure(results):
    """m > 3: all dimensions at once and what the preference for one does to the others (first run), and for each
    dimension what it reaches as its weight grows (all runs)."""
    dims, m = results[0]["dims"], len(results[0]["dims"])
    rows = -(-m // 5)
    columns = -(-m // rows)
    fig = plt.figure(figsize=(17, 6 + 2.9 * rows), layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=(5.6, 2.9 * rows))
    left, right = top.subplots(1, 2, width_ratios=(1.7, 1))
    draw_parallel(left, results[0])
    draw_heat(right, results[0])
    axes = bottom.subplots(rows, columns, sharey=True, squeeze=False)
    for i, ax in enumerate(axes.flat):
        if i < m:
            draw_tracking(ax, i, results)
            ax.set_title(dims[i], color=DIMENSION[i % len(DIMENSION)], fontweight="bold")
        else:
            ax.axis("off")
    for ax in axes[:, 0]:
        ax.set_ylabel(results[0]["points_are"])
    axes[0, 0].legend(fontsize=8)
    return fig


def draw_parallel(ax, r):
    """Parallel coordinates of one run: an axis a dimension, a line a preference; bold those nearest to the vertices."""
    lams, P = arrays(r)
    m, x, base = lams.shape[1], np.arange(lams.shape[1]), r["base"]["points"]
    shown = np.vstack([P] + ([base] if base is not None else []))
    low, high = shown.min(), shown.max()
    if r["exact"]:                                            # its lower end may be far below what a short run moves
        E = np.array(r["exact"]["points"])
        ax.fill_between(x, E.min(0), E.max(0), color="0.93", zorder=0, label="Range of the exact front")
        high = max(high, E.max())
    ax.set_ylim(low - 0.05 * (high - low) - 1e-9, high + 0.05 * (high - low) + 1e-9)
    ax.plot(x, P.T, color="0.6", lw=0.6, alpha=min(0.7, max(0.08, 40 / len(P))), zorder=1)
    for i in range(m):
        n, color = nearest(lams, np.eye(m)[i]), DIMENSION[i % len(DIMENSION)]
        ax.plot(x, P[n], color=color, lw=1.8, zorder=3)
        ax.plot(i, P[n, i], color=color, marker="o", ms=10, markeredgecolor="white", zorder=4)
    if base is not None:
        ax.plot(x, base, color=BASE, ls="--", lw=2, zorder=5, label="Base model")
    if len(P) > m:
        ax.plot([], [], color="0.6", lw=1, label="Other preferences")
    ax.set_xticks(x, r["dims"], rotation=25 if m > 6 else 0)
    for i, label in enumerate(ax.get_xticklabels()):
        label.set(color=DIMENSION[i % len(DIMENSION)], fontweight="bold")
    ax.set(ylabel=r["points_are"], title=looks([r])[0]["name"] + (": one policy" if len(P) == 1 else
                                                                  ". Bold, with a dot: all weight on that dimension"))
    ax.grid(axis="x", alpha=0.4)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=9)


def draw_heat(ax, r):
    """What the preference for one dimension (a row) does to every dimension (a column): the change against the base."""
    lams, P = arrays(r)
    m, base = lams.shape[1], r["base"]["points"]
    rows = list(dict.fromkeys(nearest(lams, vertex) for vertex in np.eye(m)))
    change = P[rows] - (P.mean(0) if base is None else base)                                # (m, m), or fewer rows
    aside = change[~np.eye(m, dtype=bool)] if len(rows) == m else change
    bound = np.abs(aside).max() or 1.0                                # the diagonal would leave the others no colour
    image = ax.imshow(change, cmap="RdBu", vmin=-bound, vmax=bound, aspect="auto")
    for i, j in np.ndindex(change.shape):
        ax.text(j, i, f"{change[i, j]:+.2f}", ha="center", va="center", fontsize=9 if m < 8 else 7,
                color="white" if abs(change[i, j]) > 0.6 * bound else "black")
    ax.set_xticks(range(m), r["dims"], rotation=40 if m > 4 else 0, ha="right" if m > 4 else "center")
    ax.set_yticks(range(len(rows)), ["its policy"] if len(lams) == 1 else [
        r["dims"][i] + (f" ({lams[n, i]:.2f})" if lams[n, i] < 0.99 else "") for n in rows for i in [lams[n].argmax()]])
    ax.set(ylabel="all weight on" if len(lams) > 1 else "",
           title="Change of each dimension against " + ("the mean of all preferences" if base is None else "the base"))
    ax.figure.colorbar(image, ax=ax, shrink=0.8, extend="both")


# ---------------------------------------------------------------------------------------------------------------------
# 3. Runs of every kind in one space, and one run over time.

def draw_comparison(c, path):
    """Draws into the file `path` what eval_front.compare returns."""
    save(comparison_figure(c), path)


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
        P = np.array(limit["points"])[edge][:, [i, j]]
        free = limit["kl"] is None
        ax.plot(*P.T, color="0.35" if free else "0.6", lw=1.6 if free else 0.8, zorder=1)
        ax.annotate("no limit" if free else f"{limit['kl']:g}", P[-1], xytext=(0, -3), textcoords="offset points",
                    fontsize=8, color="0.35", ha="center", va="top", path_effects=OUTLINE, zorder=98)
    for n, (r, look) in enumerate(zip(c["runs"], styles)):
        lams, P = arrays(r)
        on = edge_of(lams, i, j) if len(P) > 1 else np.array([0])
        off = np.setdiff1d(range(len(lams)), on)
        front = dict(color=look["color"], marker=look["marker"], alpha=look["alpha"], zorder=3 + len(styles) - n)
        ax.plot(P[off, i], P[off, j], **front | {"alpha": 0.3 * look["alpha"]}, ls="", ms=3)
        ax.plot(P[on, i], P[on, j], **front, ms=9 if len(P) == 1 else 6, lw=1.2)
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
    reached = lambda lams, P: [P[n, i] if len(P) == 1 or np.abs(lams[n] - target).max() < 0.01 else np.nan
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
    ax.plot(x, c["base"], color=BASE, ls="--", lw=1.8, label="Base model")
    ax.set_xticks(x, c["dims"], rotation=25 if len(x) > 6 else 0)
    ax.set_title(f"Reached with {what}", fontsize=10)
    ax.set_ylabel(c["points_are"])
    ax.grid(axis="x", alpha=0.4)
    ax.legend(fontsize=9)


def draw_summaries(shares, distances, runs, styles):
    """shares: how much of the hypervolume each name has, a dot a seed; it is the legend of the whole picture, too.
    distances: the gain in λ·scores, as a share of the largest at the same KL, against the KL: means."""
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
               xlabel="share of the hypervolume without a limit", title="How much of the front")
    for r, look in zip(runs, styles):
        distances.plot(np.mean(r["kl"]), r["of_best"], marker=look["marker"], ms=9, color=look["color"], alpha=0.8)
    distances.axhline(1, color="0.35", lw=1.6)
    distances.set(xscale="log", xlabel="mean KL to the base, nats", ylabel="gain in λ·scores / largest at this KL",
                  title="How well the distance is used")
    distances.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    distances.xaxis.set_major_formatter("{x:g}")
    distances.xaxis.set_minor_formatter(ticker.NullFormatter())
    distances.margins(0.15)
    for ax in (shares, distances):
        ax.grid(axis="x", alpha=0.25)


def draw_evolution(steps, results, path):
    """Fig. 4: how the front moves out over the training steps, and the share of the hypervolume it has reached."""
    save(evolution_figure(steps, results), path)


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
                 color=STYLE["panacea"][0])
    axes[1].set(xlabel="optimizer steps", ylabel="share of the exact front's hypervolume" if world else
                f"hypervolume of the {first['points_are']}")
    for ax in axes:
        ax.grid(alpha=0.25)
    return fig


def draw_labelers(r, path):
    """Appendix A: what pooled labels make of a model. r: labelers.json of appendix_a.py, m = 2."""
    save(labelers_figure(r), path)


def labelers_figure(r):
    """Left the plane of mean scores: each labeler's best policy, and what he gets; right how well it serves him."""
    labelers, scores, served = np.array(r["labelers"]), r["scores"], r["served"]
    style = {"a model of his own": (EXACT, "*"), "Panacea (DPO), trained": (STYLE["panacea"][0], "o"),
             "pooled DPO, trained": (STYLE["rs"][0], "X"), "pooled RLHF, exact: λ^opt": (STYLE["dps"][0], "s")}
    fig, (plane, bars) = plt.subplots(1, 2, figsize=(12.5, 5.2), layout="constrained")
    for name, (color, marker) in style.items():
        P = np.array(scores[name])
        one = np.ptp(P, axis=0).max() < 1e-9                                          # one model for all of them
        plane.plot(*(P[:1] if one else P).T, marker=marker, ms=11, lw=0 if one else 1, color=color, label=name)
    for lam, point in zip(labelers, np.array(scores["a model of his own"])):
        plane.annotate(f"λ = ({lam[0]:g}, {lam[1]:g})", point, xytext=(8, 6), textcoords="offset points", fontsize=8)
    plane.plot(*r["base"], marker="P", ms=11, ls="", color=BASE, label="Base model")
    plane.set(xlabel=f"mean score of {r['dims'][0]}", ylabel=f"mean score of {r['dims'][1]}",
              title="What the models say")
    plane.margins(0.15)
    plane.legend(fontsize=8.5)
    names = [name for name in style if name != "a model of his own"]
    for j, name in enumerate(names):
        x = np.arange(len(labelers)) + (j - 1) * 0.27
        bars.bar(x, served[name], 0.25, color=style[name][0], label=name)
        for a, value in zip(x, served[name]):
            bars.text(a, max(value, 0) + 0.015, f"{value:.2f}", ha="center", fontsize=8)
    bars.axhline(1, color=EXACT, lw=1.2)
    bars.set_xticks(range(len(labelers)), [f"({a:g}, {b:g})" for a, b in labelers])
    bars.set(xlabel=f"labeler's λ = ({', '.join(r['dims'])})", title="How well each is served (own model 1, base 0)",
             ylim=(min(0, min(map(min, served.values()))) - 0.02, 1.12))
    for ax in (plane, bars):
        ax.grid(alpha=0.25)
    return fig


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
    save(fig, path)


def save(fig, path):
    """Writes a figure as a picture, whole or not at all, and closes it."""
    write_whole(path, lambda f: fig.savefig(f, dpi=130))
    plt.close(fig)
