"""labelers.py - why one scalar label is not enough (Panacea, Appendix A)."""
import numpy as np

from fronts.pictures.shared import EXACT, METHODS, finish_plane, plt, save

STYLE = {"for this labeler alone": (EXACT, "*"), "Panacea (DPO), trained": METHODS["panacea"],
         "pooled DPO, trained": METHODS["rs"], "pooled RLHF, exact: λ^opt": METHODS["dps"]}


def draw_labelers(r, path):
    """Left the plane of mean scores: what each labeler gets from each model; right how well it serves each of them.

    r: labelers.json of experiments/labelers.py, m = 2. Models that answer all labelers alike are one point.
    """
    names = [f"({a:g}, {b:g})" for a, b in r["labelers"]]
    fig, (plane, served) = plt.subplots(1, 2, figsize=(12.5, 5.2))
    for name, (color, marker) in STYLE.items():
        for ax, xy in ((plane, np.array(r["scores"][name]).T), (served, (names, r["served"][name]))):
            ax.plot(*xy, marker=marker, ms=11, lw=1, color=color, label=name)
    for name, point in zip(names, r["scores"]["for this labeler alone"]):
        plane.annotate(f"λ = {name}", point, xytext=(8, 6), textcoords="offset points", fontsize=8)
    finish_plane(plane, r["dims"], "mean score", r["base"])
    plane.legend()
    plane.set_title("What the models say")
    served.axhline(0, color="0.6", lw=1)
    served.set(xlabel=f"labeler's λ = ({', '.join(r['dims'])})", title="How well each is served (own model 1, base 0)")
    return save(fig, path)
