"""parallel.py - m > 3: parallel coordinates, the conflicts between dimensions, each dimension against its weight."""
import numpy as np

from fronts.pictures.shared import BASE, arrays, dimension_color, draw_tracking, looks, nearest, plt


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
            ax.set_title(dims[i], color=dimension_color(i), fontweight="bold")
        else:
            ax.axis("off")
    for ax in axes[:, 0]:
        ax.set_ylabel(results[0]["points_are"])
    axes[0, 0].legend(fontsize=8)
    return fig


def draw_parallel(ax, r):
    """Parallel coordinates of one run: one axis per dimension, one line per preference; bold: vertices."""
    lams, Y = arrays(r)
    m, x, base = lams.shape[1], np.arange(lams.shape[1]), r["base"]["points"]
    shown = np.vstack([Y] + ([base] if base is not None else []))
    low, high = shown.min(), shown.max()
    if r["exact"]:                                            # its lower end may be far below what a short run moves
        E = np.array(r["exact"]["points"])
        ax.fill_between(x, E.min(0), E.max(0), color="0.93", zorder=0, label="Range of the exact front")
        high = max(high, E.max())
    ax.set_ylim(low - 0.05 * (high - low) - 1e-9, high + 0.16 * (high - low) + 1e-9)        # room for the legend
    ax.plot(x, Y.T, color="0.6", lw=0.6, alpha=min(0.7, max(0.08, 40 / len(Y))), zorder=1)
    for i in range(m):
        n, color = nearest(lams, np.eye(m)[i]), dimension_color(i)
        ax.plot(x, Y[n], color=color, lw=1.8, zorder=3)
        ax.plot(i, Y[n, i], color=color, marker="o", ms=10, markeredgecolor="white", zorder=4)
    if base is not None:
        ax.plot(x, base, color=BASE, ls="--", lw=2, zorder=5, label="Base model")
    if len(Y) > m:
        ax.plot([], [], color="0.6", lw=1, label="Other preferences")
    ax.set_xticks(x, r["dims"], rotation=25 if m > 6 else 0)
    for i, label in enumerate(ax.get_xticklabels()):
        label.set(color=dimension_color(i), fontweight="bold")
    ax.set(ylabel=r["points_are"], title=looks([r])[0]["name"] + (": one policy" if len(Y) == 1 else
                                                                  ". Bold, with a dot: all weight on that dimension"))
    ax.grid(axis="x", alpha=0.4)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=9, loc="upper center", ncols=3)


def draw_heat(ax, r):
    """What the preference for one dimension (a row) does to every dimension (a column): the change against the base."""
    lams, Y = arrays(r)
    m, base = lams.shape[1], r["base"]["points"]
    rows = list(dict.fromkeys(nearest(lams, vertex) for vertex in np.eye(m)))
    change = Y[rows] - (Y.mean(0) if base is None else base)                                # (m, m), or fewer rows
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
