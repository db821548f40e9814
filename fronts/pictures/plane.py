"""plane.py - m = 2: the front in the plane of the two objectives."""
import numpy as np

from fronts.objective import ACCURACY, OBJECTIVES, POINTS
from fronts.pictures.shared import EXACT, OUTLINE, arrays, draw_tracking, finish_plane, legend_text, looks, plt, save


def draw_plane(results, path):
    """m = 2: the plane of objectives, and that of mean scores; where these are the same, what each dimension reaches as
    its weight grows instead."""
    first, dims = results[0], results[0]["dims"]
    world, kind = first["exact"], POINTS[first["points_are"]]
    goal = OBJECTIVES[first["objective"]["name"]].label
    fig, axes = plt.subplot_mosaic("AAB;AAC" if len(kind.planes) == 1 else "AB", figsize=(13, 6))
    for i, ax in enumerate(list(axes.values())[1:] if len(kind.planes) == 1 else []):
        draw_tracking(ax, i, results)
        ax.set_ylabel(kind.planes[0][1])
    for ax, (key, unit, title) in zip(axes.values(), kind.planes):
        if world:                                             # on the right: the scores of the same optimal policies
            ax.plot(*arrays(world, key)[1].T, color=EXACT, lw=1.5, zorder=1,
                    label="Exact front: the optimum over all policies")
        for j, (r, look) in enumerate(zip(results, looks(results))):
            if world and r["objective"]["aggregate"] == "tche":           # its own optima, at the run's preferences
                ax.plot(*np.array(r["exact"]["at_lams"][key]).T, "x", color=look["color"], ms=6, zorder=1,
                        label=f"Optima of {look['name']}" if look["alpha"] == 1 else None)
            lams, Y = arrays(r, key)
            if key == "scores" and not world:
                error = arrays(r, "scores_se")[1]
                ax.errorbar(*Y.T, error[:, 1], error[:, 0], color=look["color"], lw=0.8, alpha=0.4, ls="", zorder=1)
            ax.plot(*Y.T, color=look["color"], marker=look["marker"], ms=6, lw=1, alpha=look["alpha"],
                    label=legend_text(look), zorder=2 + len(results) - j)
            moves = j == 0 and (Y != Y[0]).any()              # λ along the first run, unless it is one point
            for n in range(0, len(Y) if moves else 0, -(-len(Y) // 11)):
                ax.annotate(f"{lams[n, 0]:.2g}", Y[n], xytext=(7, 5), textcoords="offset points", fontsize=8,
                            color=look["color"], path_effects=OUTLINE, zorder=1.5)
            if j == 0 and not moves and len(Y) > 1:
                ax.annotate("at every λ", Y[0], xytext=(7, 5), textcoords="offset points", fontsize=8,
                            color=look["color"])
        if kind is ACCURACY and key == "points":              # none is below 0 or above 1
            ax.set(xlim=np.clip(ax.get_xlim(), -0.02, 1.02), ylim=np.clip(ax.get_ylim(), -0.02, 1.02))
        finish_plane(ax, dims, unit.format(goal), first["base"][key])
        ax.set_title(title.format(goal))
    handles = {label: h for ax in (axes["B"], axes["A"]) for h, label in zip(*ax.get_legend_handles_labels())}
    fig.legend(handles.values(), handles, loc="outside lower center", ncols=3)
    fig.suptitle(f"Each point is one preference λ = (weight of {dims[0]}, weight of {dims[1]}); "
                 f"small numbers: weight of {dims[0]}")
    return save(fig, path)
