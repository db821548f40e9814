"""triangle.py - m = 3: the front in space, over the triangle of preferences, and in its three planes."""
import numpy as np
from matplotlib import colors, tri

from fronts.pictures.shared import BASE, EXACT, PAIRS, arrays, edge_of, finish_plane, legend_text, looks, plt, save

CORNERS = np.array([colors.to_rgb(c) for c in ("#D55E00", "#009E73", "#0072B2")])       # all weight on one dimension


def ternary(lams):
    """Preferences (…, 3) as points of an equilateral triangle with sides 1, (…, 2): the corners λ_1 = 1 below left,
    λ_2 = 1 below right, λ_3 = 1 on top."""
    return np.asarray(lams) @ np.array([[0, 0], [1, 0], [0.5, 0.75 ** 0.5]])


def triangulated(lams):
    """The triangulation of preferences (F, 3); None where they all lie on a line, or are fewer than three."""
    if len(lams) < 3 or np.linalg.matrix_rank(lams - lams[0], tol=1e-3) < 2:
        return None
    return tri.Triangulation(*ternary(lams).T)


def mixed(lams):
    """The colour of preferences (F, 3): CORNERS mixed by λ, brightened: (F, 3)"""
    return np.clip(np.asarray(lams) @ CORNERS, 0, 1) ** 0.8


def draw_triangles(results, path):
    """m = 3: the front in space, in the colours of λ; for each dimension what it reaches over the triangle of
    preferences (first run); and the three planes, with the exact front's edge where the third weighs nothing."""
    first, dims, styles = results[0], results[0]["dims"], looks(results)
    front, base, unit = first["exact"], first["base"]["points"], first["points_are"]
    fig = plt.figure(figsize=(17.5, 7.6))
    grid = fig.add_gridspec(2, 4, width_ratios=(2, 1, 1, 1))
    space = fig.add_subplot(grid[:, 0], projection="3d", elev=28, azim=42)              # from outside: better is nearer
    triangles, planes = ([fig.add_subplot(grid[row, 1 + i]) for i in range(3)] for row in (0, 1))
    if front:
        E_lams, E = arrays(front)
        net = (np.abs(E_lams * 10 - np.round(E_lams * 10)) < 1e-6).all(1)
        space.plot_trisurf(*E[net].T, triangles=triangulated(E_lams[net]).triangles, color="0.8", alpha=0.35, lw=0.6,
                           edgecolor="0.55")
    for n, (r, look) in enumerate(zip(results, styles)):
        lams, Y = arrays(r)
        dots = dict(c=mixed(lams), marker=look["marker"], edgecolors="k", linewidths=0.5, alpha=look["alpha"])
        space.scatter(*Y.T, s=44, depthshade=False, label=legend_text(look), **dots)
        for ax, (i, j) in zip(planes, PAIRS):
            ax.scatter(Y[:, i], Y[:, j], s=20, zorder=2 + len(results) - n, **dots)
    if base is not None:
        space.plot(*[[x] for x in base], marker="*", ms=15, color=BASE, ls="", label="Base model, before alignment")
    for ax, (i, j) in zip(planes, PAIRS):
        if front:
            ax.plot(*E[edge_of(E_lams, i, j)][:, [i, j]].T, color=EXACT, lw=1.5, zorder=0)
        finish_plane(ax, [dims[i], dims[j]], unit, base and [base[i], base[j]])
    images = [draw_triangle(ax, i, first) for i, ax in enumerate(triangles)]
    fig.colorbar(images[0], ax=triangles, shrink=0.7, label=unit)
    space.set_box_aspect((1, 1, 1), zoom=0.9)
    space.set(xlabel=dims[0], ylabel=dims[1], zlabel=dims[2], title=f"The front: {unit}")
    fig.legend(*space.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    fig.suptitle("Points have the colour of their λ, as at the corners of the triangles; white lines: levels that "
                 f"{styles[0]['name']} reaches" + (", dotted: the exact front" if front else ""))
    return save(fig, path)


def draw_triangle(ax, i, r):
    """A heat map of what dimension i reaches over the triangle of preferences; dots where they do not fill it."""
    lams, Y = arrays(r)
    low, high = (min(0, Y.min()), max(1, Y.max())) if r["exact"] else (Y.min(), Y.max() + 1e-9)
    shade = dict(vmin=low, vmax=high, cmap="cividis")
    if triangulated(lams) is None:
        image = ax.scatter(*ternary(lams).T, c=Y[:, i], s=90, edgecolors="k", zorder=3, **shade)
    else:
        image = ax.tripcolor(triangulated(lams), Y[:, i], shading="gouraud", **shade)
        for (at, values), style in zip([(lams, Y)] + [arrays(r["exact"])] * bool(r["exact"]), ("solid", "dotted")):
            levels = [x for x in np.linspace(low, high, 6) if values[:, i].min() < x < values[:, i].max()]
            lines = ax.tricontour(triangulated(at), values[:, i], levels, colors="white", linestyles=style)
            if style == "solid":
                ax.clabel(lines, fontsize=8, fmt="%.2g")
    corners = ternary(np.eye(3))
    ax.plot(*corners[[0, 1, 2, 0]].T, color="0.3", lw=1)
    for corner, dim, color, dy in zip(corners, r["dims"], CORNERS, (-0.08, -0.08, 0.08)):
        ax.text(corner[0], corner[1] + dy, dim, color=color, ha="center", va="center", fontsize=10, fontweight="bold")
    ax.set(title=f"{r['dims'][i]} by λ", aspect="equal", xlim=(-0.2, 1.2), ylim=(-0.12, 0.98))
    ax.axis("off")
    return image
