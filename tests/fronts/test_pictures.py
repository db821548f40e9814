"""test_pictures.py - pictures show the points they are given, for any number of dimensions, of one run and of many.

Everything is drawn from small made-up results: the front that reaches √λ_i in dimension i, and runs short of it.
"""
import numpy as np
import pytest
import torch

from fronts import exact, pictures
from fronts.objective import OBJECTIVES
from fronts.pictures import shared, triangle
from runs.files import write_whole

DIMS = [f"dim{i}" for i in range(13)]
LABELS = {"panacea": "Panacea", "rs": "Rewarded soups", "dps": "Discrete policy solutions", "pama": "PAMA"}


def result(m, lams=None, exact_front=True, level=0.9, method="panacea", aggregate="ls", objective="dpo", seed=0,
           beta=1.0):
    """What front.json holds of a run that reaches `level` times the exact front."""
    lams = exact.evaluation_preferences(m) if lams is None else torch.tensor(lams, dtype=torch.float64)
    points, fine, row = level * lams.sqrt(), exact.front_preferences(m), OBJECTIVES[objective]
    keys = lambda points: {"points": points.tolist(), "scores": (3 * points).tolist(), "J": (points - 1).tolist()}
    return {"run": f"out/{method}-{seed}", "dims": DIMS[:m], "lams": lams.tolist(), **keys(points),
            "points_are": (row.exact_points if exact_front else row.points).name,
            "objective": {"name": objective, "beta": beta, "aggregate": aggregate}, "method": method,
            "label": LABELS.get(method, method), "seed": seed, "steps": 100, "models": 1, "hypervolume": 0.5,
            "hypervolume_share": level if exact_front else None, "regret": 0.75 - level / 2 if exact_front else None,
            "kl": [0.5] * len(lams), "scores_se": (0.1 + 0 * points).tolist(),
            "base": keys(torch.full((m,), 0.2)) | ({} if exact_front else {"points": None}),
            "exact": {"lams": fine.tolist(), **keys(fine.sqrt()), "hypervolume": 1.0,
                      "at_lams": keys(0.95 * lams.sqrt())} if exact_front else None}


def comparison(m, runs):
    """What fronts.comparison.compare returns of such runs."""
    grid = exact.front_preferences(m)
    limits = [{"kl": kl, "points": (level * grid.sqrt()).tolist()} for kl, level in ((0.5, 0.5), (None, 1.0))]
    runs = [r | {"label": f"{r['label']}, {r['objective']['name']}", "gain_share": 0.8} for r in runs]
    return {"dims": DIMS[:m], "points_are": "normalised mean score", "base": [0.2] * m, "limits": limits,
            "limit_lams": grid.tolist(), "runs": runs}


def figure(results):
    return pictures.draw_fronts(results, "front.png")


def drawn(ax):
    """Every line's and every scatter's points in a panel: arrays (n, 2)."""
    return [line.get_xydata() for line in ax.lines] + [np.asarray(dots.get_offsets()) for dots in ax.collections]


def shows(ax, points):
    """Whether some line or scatter of the panel is of exactly these points, in any order."""
    points = np.array(sorted(map(tuple, points)))
    same = lambda Y: len(Y) == len(points) and np.allclose(sorted(map(tuple, Y)), points)
    return any(same(np.asarray(Y, dtype=float)) for Y in drawn(ax))


@pytest.fixture(autouse=True)
def unwritten(monkeypatch):
    """No picture becomes a file: laying it out takes most of the time."""
    monkeypatch.setattr(shared, "write_whole", lambda path, write: None)


# ---- what pictures are made of ----

def test_the_ternary_transform_sends_corners_to_corners_and_the_centre_to_the_centre():
    corners = triangle.ternary(np.eye(3))
    sides = np.linalg.norm(corners - np.roll(corners, 1, axis=0), axis=1)
    assert np.allclose(sides, 1) and np.allclose(corners[:2], [[0, 0], [1, 0]])
    assert np.allclose(triangle.ternary([1 / 3] * 3), corners.mean(0))
    assert np.allclose(triangle.ternary([0.5, 0.5, 0]), [0.5, 0])                         # an edge stays on its side


def test_preferences_fill_a_triangle_or_have_no_triangulation():
    lattice = exact.evaluation_preferences(3, 7).numpy().round(6)                       # as front.json holds it
    assert len(triangle.triangulated(lattice).triangles) == 49               # 7²: all small triangles
    assert triangle.triangulated(lattice[:1]) is None
    assert triangle.triangulated(lattice[lattice[:, 0] == 0]) is None                     # all on one side


@pytest.mark.parametrize("m", [2, 4, 10])
def test_the_way_to_a_vertex_is_found_in_any_order(m):
    lams = exact.evaluation_preferences(m).numpy()[::-1]
    for i in range(m):
        way = lams[shared.way_to(lams, i)]
        assert len(way) == (11 if m == 2 else 5) and (np.diff(way[:, i]) > 0).all() and way[-1, i] == 1
        assert np.allclose(np.delete(way, i, 1), (1 - way[:, [i]]) / (m - 1))


def test_seeds_share_a_colour_and_other_settings_do_not():
    runs = [result(2, seed=s, method=method, aggregate=aggregate) for method, aggregate, s in
            (("panacea", "ls", 0), ("panacea", "ls", 1), ("panacea", "tche", 0), ("rs", "ls", 0), ("pama", "ls", 0))]
    first, seed, tche, rs, pama = shared.looks(runs)
    assert (first["color"] == seed["color"]).all() and (first["alpha"], seed["alpha"]) == (1, 0.3)
    assert shared.legend_text(seed) is None and "regret 0.300 (2 runs)" in shared.legend_text(first)
    assert "Tchebycheff" in tche["name"] and (tche["color"] != first["color"]).any()
    assert tche["marker"] != first["marker"] and (rs["name"], pama["name"]) == ("Rewarded soups", "PAMA")
    other = shared.looks([runs[0], runs[0] | {"run": "out/larger"}])                     # no seed: the same one
    assert "larger" in other[1]["name"] and other[1]["alpha"] == 1
    new = shared.looks([result(2, method="mine"), result(2, method="yours")])           # methods without a style
    assert new[0]["name"] == "mine" and (new[0]["color"] != new[1]["color"]).any()


# ---- fronts ----

def test_two_dimensions_show_the_points_and_the_scores_along_the_preference():
    r = result(2, lams=[[0.9, 0.1], [0.1, 0.9], [0.5, 0.5]])
    fig = figure([r, result(2, method="rs", level=0.7)])
    for ax, key in zip(fig.axes, ("points", "scores")):
        Y = np.array(r[key])
        assert any(np.allclose(line.get_xydata(), Y[[1, 2, 0]]) for line in ax.lines if len(line.get_xydata()) == 3)
        assert shows(ax, r["exact"][key]) and shows(ax, [r["base"][key]])
        assert {t.get_text() for t in ax.texts} == {"0.1", "0.5", "0.9"}                # of the first run alone
    assert len(fig.axes) == 2


def test_tchebycheff_has_its_own_optima_beside_the_front():
    """At the run's preferences, in both planes. Wrong: none, or those of linear scalarisation too."""
    ls, tche = result(2), result(2, aggregate="tche", level=0.8)
    fig = figure([ls, tche])
    for ax, key in zip(fig.axes, ("points", "scores")):
        crosses = [line.get_xydata() for line in ax.lines if line.get_marker() == "x"]
        assert len(crosses) == 1 and np.allclose(crosses[0], tche["exact"]["at_lams"][key])


@pytest.mark.parametrize("objective, exact_front, panels, words", [
    ("sft", True, 2, "log π(y|x)"), ("ipo", True, 2, "−IPO loss"), ("rlhf", True, 2, "E r − β KL"),
    ("scores", True, 3, "Mean scores"), ("dpo", False, 2, "accuracy"), ("ipo", False, 2, "accuracy"),
    ("rlhf", False, 2, "standard error"), ("sft", False, 3, "nats")])
def test_two_dimensions_name_what_every_objective_reaches(objective, exact_front, panels, words):
    fig = figure([result(2, exact_front=exact_front, objective=objective)])
    assert len(fig.axes) == panels
    assert words in fig.axes[0].get_title() + fig.axes[0].get_xlabel()
    if panels == 3:                                                                     # each dimension by its weight
        lams = np.array(result(2)["lams"])
        assert shows(fig.axes[2], np.stack([lams[:, 1], 0.9 * np.sqrt(lams[:, 1])], 1))


def test_three_dimensions_show_space_triangles_and_planes():
    r = result(3)
    fig = figure([r, result(3, lams=[[1 / 3] * 3], method="pama")])
    space, triangles, planes = fig.axes[0], fig.axes[1:4], fig.axes[4:7]
    assert len(fig.axes) == 8 and space.name == "3d"                                    # the last: a colour bar
    x, y, z = [c for c in space.collections if c.get_label().startswith("Panacea")][0]._offsets3d
    assert np.allclose(sorted(np.stack([x, y, z], 1).tolist()), sorted(r["points"]))
    for i, ax in enumerate(triangles):
        assert np.allclose(ax.collections[0].get_array(), shared.arrays(r)[1][:, i])
    Y, E, E_lams = np.array(r["points"]), np.array(r["exact"]["points"]), np.array(r["exact"]["lams"])
    for ax, (i, j) in zip(planes, ((0, 1), (0, 2), (1, 2))):
        without = np.delete(E_lams, [i, j], 1)[:, 0] == 0
        assert shows(ax, Y[:, [i, j]]) and shows(ax, E[without][:, [i, j]])


@pytest.mark.parametrize("m", [4, 12])
def test_more_dimensions_show_lines_conflicts_and_every_dimension(m):
    r, soup = result(m), result(m, method="rs", level=0.6)
    fig = figure([r, soup])
    parallel, heat, small = fig.axes[0], fig.axes[1], [ax for ax in fig.axes if ax.get_xlabel().startswith("λ of")]
    bold = [line for line in parallel.lines if line.get_linewidth() == 1.8]
    assert np.allclose([line.get_ydata() for line in bold], 0.9 * np.eye(m))            # all weight on one: √1, else 0
    assert [line.get_markevery() for line in bold] == [[i] for i in range(m)]           # its dot
    assert np.allclose(heat.images[0].get_array(), 0.9 * np.eye(m) - 0.2)
    assert len(small) == m
    for i, ax in enumerate(small):
        way = np.array(r["lams"])[[0, *range(1 + 4 * i, 5 + 4 * i)], i]
        for level in (0.9, 0.6, 1.0):
            assert shows(ax, np.stack([way, level * np.sqrt(way)], 1))


def test_more_dimensions_with_other_preferences_show_every_point():
    lattice = exact.evaluation_preferences(5, 2).tolist()
    fig = figure([result(5, lams=lattice, method="hqd", objective="scores")])
    ax = [ax for ax in fig.axes if ax.get_xlabel().startswith("λ of")][2]
    lam = np.array(lattice)[:, 2]
    assert shows(ax, np.stack([lam, 0.9 * np.sqrt(lam)], 1))


# ---- files: every number of dimensions, one run and several, with and without the truth, and a single policy ----

@pytest.mark.parametrize("m, runs", [(2, 1), (3, 2), (4, 1)])
def test_fronts_of_few_preferences_are_drawn(m, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "write_whole", write_whole)
    known = dict(exact_front=runs == 2, objective="rlhf")
    one = result(m, [[1 / m] * m], method="pama", **known)
    two = result(m, np.eye(m)[:2].tolist(), seed=1, **known)
    pictures.draw_fronts([two, one] if runs == 2 else [one], tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 15_000


# ---- runs of every kind in one space ----

@pytest.mark.parametrize("m, panels", [(2, 3), (3, 5), (5, 2)])
def test_a_comparison_shows_runs_and_limits(m, panels):
    runs = [result(m), result(m, objective="sft", level=0.6), result(m, objective="sft", level=0.6, seed=1),
            result(m, [[1 / m] * m], method="pama", objective="rlhf", level=0.3)]
    c = comparison(m, runs)
    fig = pictures.draw_comparison(c, "compare.png")
    assert len(fig.axes) == panels
    main, names = fig.axes[0], [ax for ax in fig.axes if ax.get_title() == "How much of the front"][0]
    if m <= 3:
        edge = [n for n, lam in enumerate(c["limit_lams"]) if lam[0] + lam[1] == 1]
        assert shows(main, np.array(c["limits"][0]["points"])[edge][:, :2]) and shows(main, [[0.2, 0.2]])
        edge = [n for n, lam in enumerate(runs[0]["lams"]) if lam[0] + lam[1] > 1 - 1e-9]
        assert shows(main, np.array(runs[0]["points"])[edge][:, :2])
        large = [line.get_xydata() for line in main.lines if line.get_markersize() == 9]
        assert [runs[3]["points"][0][:2]] in [xy.tolist() for xy in large]              # one policy, wherever it is
    assert len(names.get_yticks()) == 3                                                 # two seeds share a line
    assert shows(names, [(0.9, 0)]) and shows(names, [(0.6, 1), (0.6, 1)])


def test_histograms_show_a_row_per_preference_and_a_column_per_dimension():
    raw = np.random.default_rng(0).normal(size=(11, 20, 2))
    samples = {"dims": DIMS[:2], "lams": [[i / 10, 1 - i / 10] for i in range(11)], "raw": raw.tolist(),
               "base": {"raw": raw[0].tolist()}}
    fig = pictures.draw_histograms(samples, "histograms.png")
    assert len(fig.axes) == 10
    means = [line.get_xdata()[0] for line in fig.axes[0].lines]
    assert np.allclose(means, [raw[0, :, 0].mean(), raw[10, :, 0].mean()])              # λ_1 = 1 comes first


def test_the_evolution_shows_every_step():
    results = [result(2, level=level) for level in (0.5, 0.8)]
    fig = pictures.draw_evolution([10, 20], results, "evolution.png")
    assert all(shows(fig.axes[0], r["points"]) for r in results) and shows(fig.axes[1], [(10, 0.5), (20, 0.35)])


def test_labelers_show_what_each_gets_from_every_model():
    names = ["for this labeler alone", "Panacea (DPO), trained", "pooled DPO, trained", "pooled RLHF, exact: λ^opt"]
    r = {"dims": DIMS[:2], "labelers": [[1, 0], [0.2, 0.8]], "base": [0.1, 0.2],
         "scores": {name: [[k, 1.0], [2.0, k]] for k, name in enumerate(names)},
         "served": {name: [1 - 0.2 * k, 1 - 0.3 * k] for k, name in enumerate(names)}}
    plane, served = pictures.draw_labelers(r, "labelers.png").axes
    assert shows(plane, [r["base"]]) and all(shows(plane, scores) for scores in r["scores"].values())
    for k, name in enumerate(names):
        assert any(list(line.get_ydata()) == r["served"][name] for line in served.lines)


def test_every_dimension_has_a_colour_of_its_own():
    colours = [tuple(np.round(shared.colors.to_rgb(shared.dimension_color(i)), 3)) for i in range(25)]
    assert len(set(colours)) == 25
