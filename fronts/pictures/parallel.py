"""parallel.py - m > 3: parallel coordinates, the conflicts between dimensions, each dimension against its weight."""
import numpy as np

from fronts.pictures.shared import BASE, arrays, dimension_color, draw_tracking, looks, nearest, plt, save


def draw_parallel(results, path):
    """m > 3: all dimensions at once and what the preference for one does to the others (first run), and for each
    dimension what it reaches as its weight grows (all runs)."""
    first, m = results[0], len(results[0]["dims"])
    rows = -(-m // 5)
    fig = plt.figure(figsize=(17, 6 + 2.9 * rows))
    top, bottom = fig.subfigures(2, 1, height_ratios=(5.6, 2.9 * rows))
    left, right = top.subplots(1, 2, width_ratios=(1.7, 1))
    draw_lines(left, first)
    draw_heat(right, first)
    axes = bottom.subplots(rows, -(-m // rows), sharey=True, squeeze=False).flat
    for i in range(m):
        draw_tracking(axes[i], i, results)
    for ax in axes[m:]:
        ax.axis("off")
    bottom.supylabel(first["points_are"], fontsize=10)
    axes[0].legend(fontsize=8)
    return save(fig, path)


def draw_lines(ax, r):
    """Parallel coordinates of one run: one axis per dimension, one line per preference; bold: vertices."""
    (lams, Y), dims, base = arrays(r), r["dims"], r["base"]["points"]
    ax.margins(y=0.16)                                                                      # room for the legend
    if r["exact"]:
        E = np.array(r["exact"]["points"])
        ax.fill_between(dims, E.min(0), E.max(0), color="0.93", zorder=0, label="Range of the exact front")
    ax.plot(dims, Y.T, color="0.6", lw=0.6, alpha=max(0.08, 0.7 - len(Y) / 200), zorder=1,
            label=["One preference"] + [""] * (len(Y) - 1))
    for i, vertex in enumerate(np.eye(len(dims))):
        n = nearest(lams, vertex)
        ax.plot(dims, Y[n], color=dimension_color(i), lw=1.8, zorder=3, marker="o", ms=10, markevery=[i],
                markeredgecolor="white")
    if base is not None:
        ax.plot(dims, base, color=BASE, ls="--", lw=2, zorder=5, label="Base model")
    low = min([Y.min(), *(base or [])])       # the exact front's lower end may be far below what a short run moves
    ax.set_ylim(bottom=low - 0.05 * (ax.get_ylim()[1] - low))
    ax.tick_params(axis="x", rotation=25 if len(dims) > 6 else 0)
    for i, label in enumerate(ax.get_xticklabels()):
        label.set(color=dimension_color(i), fontweight="bold")
    ax.set(ylabel=r["points_are"], title=f"{looks([r])[0]['name']}. Bold, with a dot: most weight on that dimension")
    for handle in ax.legend(loc="upper center", ncols=3).legend_handles:
        handle.set_alpha(1)                                              # a single faint line would not be seen


def draw_heat(ax, r):
    """What the preference for one dimension (a row) does to every dimension (a column): the change against the base, or
    where it has no place, against the mean of all preferences."""
    (lams, Y), dims, base = arrays(r), r["dims"], r["base"]["points"]
    rows = list(dict.fromkeys(nearest(lams, vertex) for vertex in np.eye(len(dims))))
    change = Y[rows] - (Y.mean(0) if base is None else base)                                # (m, m), or fewer rows
    aside = change[~np.eye(*change.shape, dtype=bool)]                # the diagonal would leave the others no colour
    bound = np.abs(aside).max() or 1.0
    image = ax.imshow(change, cmap="RdBu", vmin=-bound, vmax=bound, aspect="auto")
    for (i, j), value in np.ndenumerate(change):
        ax.text(j, i, f"{value:+.2f}", ha="center", va="center", fontsize=9 if len(dims) < 8 else 7,
                color="white" if abs(value) > 0.6 * bound else "black")
    ax.set_xticks(range(len(dims)), dims, rotation=40, ha="right")
    ax.set_yticks(range(len(rows)), [f"{lams[n].max():.2g} on {dims[lams[n].argmax()]}" for n in rows])
    ax.set(ylabel="weight", title="Change of each dimension against " + (
        "the mean of all preferences" if base is None else "the base"))
    ax.grid(False)
    ax.figure.colorbar(image, ax=ax, shrink=0.8, extend="both")
