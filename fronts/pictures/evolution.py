"""evolution.py - one run over time (Panacea, Fig. 4)."""
import matplotlib
import numpy as np

from fronts.pictures.shared import EXACT, METHODS, arrays, finish_plane, plt, save


def draw_evolution(steps, results, path):
    """How the front moves out over the training steps: left the first two dimensions' plane, right the regret, where
    it is known, else the hypervolume. results: front.json after each of the steps."""
    first, fig, (plane, measured) = results[0], *plt.subplots(1, 2, figsize=(12, 5.4))
    if first["exact"]:
        plane.plot(*arrays(first["exact"])[1].T[:2], color=EXACT, label="Exact front")
    for step, r, color in zip(steps, results, matplotlib.colormaps["viridis"](np.linspace(0.9, 0.0, len(results)))):
        plane.plot(*arrays(r)[1].T[:2], marker="o", ms=4, lw=1, color=color, label=f"step {step}")
    finish_plane(plane, first["dims"], first["points_are"], first["base"]["points"] and first["base"]["points"][:2])
    plane.legend()
    key = "regret" if first["exact"] else "hypervolume"
    measured.plot(steps, [r[key] for r in results], marker="o", color=METHODS["panacea"][0])
    measured.set(xlabel="optimizer steps",
                 ylabel="regret (0: optimal)" if first["exact"] else f"hypervolume, {first['points_are']}")
    measured.set_ylim(bottom=0)
    return save(fig, path)
