"""labelers.py - why one scalar label is not enough (Panacea, Appendix A)."""
import numpy as np

from fronts.pictures.shared import BASE, EXACT, METHODS, plt


def labelers_figure(r):
    """Left the plane of mean scores: each labeler's best policy, and what he gets; right how well it serves him."""
    labelers, scores, served = np.array(r["labelers"]), r["scores"], r["served"]
    style = {"a model of his own": (EXACT, "*"), "Panacea (DPO), trained": (METHODS["panacea"][0], "o"),
             "pooled DPO, trained": (METHODS["rs"][0], "X"), "pooled RLHF, exact: λ^opt": (METHODS["dps"][0], "s")}
    fig, (plane, bars) = plt.subplots(1, 2, figsize=(12.5, 5.2), layout="constrained")
    for name, (color, marker) in style.items():
        Y = np.array(scores[name])
        one = np.ptp(Y, axis=0).max() < 1e-9                                          # one model for all of them
        plane.plot(*(Y[:1] if one else Y).T, marker=marker, ms=11, lw=0 if one else 1, color=color, label=name)
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
