"""pictures - pictures of fronts, drawn from what eval_front.py writes: one file per kind of picture.

results: a list of front.json, one per run, the first in the foreground. Every draw_* function writes its picture into
the file `path` and returns the figure. A new kind of picture is a file with its draw_* function, and a name here.
"""
from fronts.pictures.comparison import draw_comparison
from fronts.pictures.evolution import draw_evolution
from fronts.pictures.histograms import draw_histograms
from fronts.pictures.labelers import draw_labelers
from fronts.pictures.parallel import draw_parallel
from fronts.pictures.plane import draw_plane
from fronts.pictures.triangle import draw_triangles

__all__ = ["draw_comparison", "draw_evolution", "draw_fronts", "draw_histograms", "draw_labelers"]


def draw_fronts(results, path):
    """The fronts of one run, or of several of one objective (objective.same_objective): by the number of dimensions, a
    plane, triangles, or parallel coordinates."""
    return {2: draw_plane, 3: draw_triangles}.get(len(results[0]["dims"]), draw_parallel)(results, path)
