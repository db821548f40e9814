"""pictures - pictures of fronts, drawn from what eval_front.py writes: one file per kind of picture.

results: a list of front.json, one per run, the first in the foreground. Functions named *_figure return the figure;
those here write it into the file `path`. A new kind of picture is a file with its *_figure, and a line here.
"""
from fronts.objective import same_objective
from fronts.pictures.comparison import comparison_figure
from fronts.pictures.evolution import evolution_figure
from fronts.pictures.histograms import histograms_figure
from fronts.pictures.labelers import labelers_figure
from fronts.pictures.parallel import parallel_figure
from fronts.pictures.plane import plane_figure
from fronts.pictures.shared import save
from fronts.pictures.triangle import triangle_figure
from runs.files import UserError


def draw_fronts(results, path):
    """The fronts of one run, or of several of one objective: by the number of dimensions, a plane, triangles, or
    parallel coordinates. Raises UserError for runs whose points do not mean the same."""
    if not same_objective(results):
        raise UserError("runs of different objectives have no picture of their own points: " + ", ".join(
            f"{r['run']} ({r['objective']['name']}, β = {r['objective']['beta']})" for r in results))
    save({2: plane_figure, 3: triangle_figure}.get(len(results[0]["dims"]), parallel_figure)(results), path)


def draw_comparison(c, path):
    """Runs of every kind in the space of mean scores. c: what fronts.comparison.compare returns."""
    save(comparison_figure(c), path)


def draw_evolution(steps, results, path):
    """Fig. 4: how the front moves out over the training steps. results: front.json after each of the steps."""
    save(evolution_figure(steps, results), path)


def draw_histograms(samples, path):
    """Fig. 3: the rewards of sampled responses before and after. samples: samples.json."""
    save(histograms_figure(samples), path)


def draw_labelers(r, path):
    """Appendix A: what pooled labels make of a model. r: labelers.json of experiments/labelers.py, m = 2."""
    save(labelers_figure(r), path)
