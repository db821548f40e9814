"""test_evaluation.py - where a run is evaluated, its metrics and shares, exact fronts that runs share, and tables."""
import types

import numpy as np
import pytest
import torch

import eval_front
from fronts import evaluation
from fronts.evaluation import cached_front, front_metrics, objective_share
from fronts.exact import drawn_rows, evaluation_preferences, front_preferences, path_rows
from fronts.tables import shown, table


def test_preferences_of_an_evaluation():
    ten = evaluation_preferences(10)
    assert ten.shape == (141, 10) and torch.equal(ten, evaluation_preferences(10)) and (ten >= 0).all()
    assert len(evaluation_preferences(2)) == 11 and len(evaluation_preferences(3)) == 66
    assert len(evaluation_preferences(10, 1)) == 10
    assert (ten.sum(1) - 1).abs().max() < 1e-12
    own = torch.tensor([[0.9, 0.1, 0.0, 0.0], [0.25] * 4])               # of models that have their own: one is known
    assert len(front_preferences(4, own)) == len(evaluation_preferences(4)) + 1
    assert len(front_preferences(2, own[:, :2])) == 101


def test_paths_and_drawn_preferences():
    lams = evaluation_preferences(5).tolist()
    assert path_rows(lams, 0) == [0, 1, 2, 3, 4] and path_rows(lams, 2) == [0, 9, 10, 11, 12]
    assert lams[12] == [0, 0, 1, 0, 0] and len(lams[drawn_rows(lams)]) == 100
    few = evaluation_preferences(5, 2).tolist()                          # another grid, and m = 2: all of them
    assert path_rows(few, 1) == list(range(15)) and few[drawn_rows(few)] == few
    assert path_rows([[0.5, 0.5], [1.0, 0.0]], 1) == [0, 1]


def test_spearman_is_along_the_paths():
    lams = evaluation_preferences(5)
    points = np.asarray(lams) ** 2
    points[21:] = 0.5                                                    # the drawn ones play no part
    assert front_metrics(lams.tolist(), points, [-0.1] * 5)["spearman"] == pytest.approx([1] * 5)
    points[[0, 5, 6, 7, 8], 1] = 0.3
    assert front_metrics(lams.tolist(), points, [-0.1] * 5)["spearman"][1] == pytest.approx(0)


def test_objective_share():
    base, best = [0.0, -4.0], [[2.0, -4.0], [0.0, 0.0]]
    J, lams = [[1.0, -4.0], [0.0, -0.8]], [[1.0, 0.0], [0.0, 1.0]]
    assert objective_share(J, base, best, lams, "ls", None) == pytest.approx((0.5 + 0.8) / 2)
    assert objective_share(best, base, best, lams, "ls", None) == pytest.approx(1)
    assert objective_share([base, base], base, best, lams, "tche", [0.0, 0.0]) == pytest.approx(0)
    assert objective_share(J, base, [best[0], base], lams, "ls", None) == pytest.approx(0.5)     # one can gain
    assert objective_share(J, base, [base, base], lams, "ls", None) is None
    tche = lambda z: objective_share([[-1.0, -2.0]], [-1.0, -4.0], [[-1.0, -1.0]], [[0.5, 0.5]], "tche", z)
    assert tche([0.0, 0.0]) == pytest.approx(2 / 3)                      # of losses 4, 2 and 1
    assert tche([0.0, 1.0]) == pytest.approx(1)                          # of 3, 1 and 1: the other one is the maximum


def test_runs_of_one_objective_and_base_share_their_exact_front(monkeypatch):
    solved = []
    monkeypatch.setattr(evaluation, "exact_front", lambda lams, row, world, o: solved.append(o) or {"n": len(solved)})
    lams, known = torch.eye(2), {}
    config = {"objective": {"name": "dpo", "beta": 1.0}, "dims": ["a", "b"], "fingerprint": "x", "flags": {"steps": 5}}
    assert cached_front(known, config, None, lams) == cached_front(known, config | {"flags": {"steps": 9}}, None, lams)
    for other in ({"objective": {"name": "dpo", "beta": 0.1}}, {"objective": {"name": "ipo", "beta": 1.0}},
                  {"fingerprint": "y"}, {"rewards": {"names": ["a"]}}, {"flags": {"quantize": "nf4"}}):
        before = len(solved)
        cached_front(known, config | other, None, lams)
        assert len(solved) == before + 1
    cached_front(known, config, None, lams[:1])
    assert len(solved) == 7


@pytest.mark.parametrize("second, together", [({"name": "dpo", "beta": 1.0, "aggregate": "tche"}, True),
                                              ({"name": "ipo", "beta": 1.0, "aggregate": "ls"}, False),
                                              ({"name": "dpo", "beta": 0.1, "aggregate": "ls"}, False)])
def test_who_meets_in_one_picture(second, together, monkeypatch, tmp_path, capsys):
    objectives = iter([{"name": "dpo", "beta": 1.0, "aggregate": "ls"}, second])
    drawn = types.SimpleNamespace(fronts=[], compared=[])
    numbers = dict.fromkeys(("hypervolume", "inner_product", "sparsity", "spacing"), 0.5)
    missing = dict.fromkeys(("exact", "outside_mass", "collapsed", "objective_share", "hypervolume_share"))
    result = lambda run, *_, **__: {
        "run": str(run), "dims": ["a", "b"], "lams": [[1, 0]], "points_are": "normalised J", "models": 1, "steps": 3,
        "objective": next(objectives), "reference_point": [0, 0], "spearman": [1, 1], **numbers, **missing}
    monkeypatch.setattr(eval_front, "evaluate", lambda *args: (result(*args), None))
    monkeypatch.setattr(eval_front, "draw_fronts", lambda results, path: drawn.fronts.append(len(results)))
    monkeypatch.setattr(eval_front, "compare",
                        lambda results, device: drawn.compared.append(len(results)) or {"runs": results})
    monkeypatch.setattr(eval_front, "draw_comparison", lambda c, path: None)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"objective": {}, "dims": ["a", "b"]}')
        (tmp_path / name / "timing.json").write_text('{"train_seconds": 1}')
    eval_front.main(eval_front.Flags(runs=[str(tmp_path / n) for n in ("one", "two")], device="cpu",
                                     out=str(tmp_path / "out")))
    assert (drawn.fronts, drawn.compared) == (([1, 1, 2], []) if together else ([1, 1], [2]))


def test_tables_are_as_wide_as_their_widest_text():
    text = table({"run": ["short", "a longer one"], "HV": shown([0.5, None], ".4f"), "models": shown([1, 11], "d")})
    assert text.split("\n") == ["run               HV  models", "-" * 28,
                                "short         0.5000       1", "a longer one       -      11"]
