"""test_evaluation.py - where a run is evaluated, its metrics, regret and shares, what is exact and shared, tables."""
import json
import types

import numpy as np
import pytest
import torch

import eval_front
from fronts import evaluation
from fronts.evaluation import front_metrics
from fronts.exact import dense, drawn_rows, evaluation_preferences, front_preferences, path_rows
from fronts.metrics import hypervolume
from fronts.objective import OBJECTIVES
from fronts.tables import shown, table


def test_preferences_of_an_evaluation():
    ten = evaluation_preferences(10)
    assert ten.shape == (141, 10) and torch.equal(ten, evaluation_preferences(10)) and (ten >= 0).all()
    assert len(evaluation_preferences(2)) == 11 and len(evaluation_preferences(3)) == 66
    assert len(evaluation_preferences(10, 1)) == 10
    assert (ten.sum(1) - 1).abs().max() < 1e-12
    assert len(front_preferences(2)) == 101 and len(front_preferences(3)) == 861 and dense(3) and not dense(4)
    assert torch.equal(front_preferences(4), evaluation_preferences(4))


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


def regret_of(J, base, best, lams, aggregate="ls", z=None):
    """evaluation.regret of an objective that is a function of J: (regret, the worst λ's, that λ)."""
    nothing = torch.zeros(1, 1)                                          # what they say plays no part
    got = evaluation.regret({"J": base, "logps": nothing}, {"J": J, "logps": [nothing] * len(lams)},
                            {"J": torch.tensor(best, dtype=torch.float64), "logps": nothing, "z": z}, lams, None,
                            OBJECTIVES["dpo"], {"aggregate": aggregate})
    return got["regret"], got["regret_worst"], got["worst_lam"]


BASE, BEST, VERTICES = [0.0, -4.0], [[2.0, -4.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]


def test_regret_by_hand():
    """Gains of 1 of 2 and of 3.2 of 4: 1 − 4.2 / 6. Wrong: 1 less the mean of ratios, 0.35."""
    J = [[1.0, -4.0], [0.0, -0.8]]
    assert regret_of(J, BASE, BEST, VERTICES) == (pytest.approx(0.3), pytest.approx(0.5), [1.0, 0.0])
    assert regret_of(J[::-1], BASE, BEST[::-1], VERTICES[::-1])[1:] == (pytest.approx(0.5), [1.0, 0.0])
    assert regret_of(BEST, BASE, BEST, VERTICES)[:2] == (0, 0)
    assert regret_of([BASE, BASE], BASE, BEST, VERTICES)[:2] == (1, 1)
    worse = regret_of([[-1.0, -4.0], [0.0, 0.0]], BASE, BEST, VERTICES)  # 1 lost, 4 gained
    assert worse == (pytest.approx(1 - 3 / 6), pytest.approx(1.5), [1.0, 0.0])
    # nothing to gain at one preference: only what is lost there counts, and it is never the worst
    assert regret_of([BASE, [0.0, -0.8]], BASE, [BASE, BEST[1]], VERTICES) == (
        pytest.approx(0.2), pytest.approx(0.2), [0.0, 1.0])
    # between the vertices: Σ λ_i J_i of −2, −0.5 and 1
    assert regret_of([[1.0, -2.0]], BASE, [[2.0, 0.0]], [[0.5, 0.5]])[0] == pytest.approx(1 - 1.5 / 3)


@pytest.mark.parametrize("z, expected", [([0.0, 0.0], 1 / 3),        # λ (L − z) at most: 2, 1 and 0.5
                                         ([0.0, 1.0], 0.0),          # 1.5, 0.5 and 0.5: the other loss is the maximum
                                         ([0.0, 0.5], 0.2)])         # 1.75, 0.75 and 0.5
def test_regret_by_tchebycheff_by_hand(z, expected):
    """Of the base, with losses 1 and 4, the run, 1 and 2, and the optimum, 1 and 1. Wrong: z left away."""
    got = regret_of([[-1.0, -2.0]], [-1.0, -4.0], [[-1.0, -1.0]], [[0.5, 0.5]], "tche", z)
    assert got == (pytest.approx(expected), pytest.approx(expected), [0.5, 0.5])


def test_regret_sums_over_drawn_preferences_and_looks_for_the_worst_at_all():
    lams = [[round(x, 6) for x in lam] for lam in evaluation_preferences(5).float().tolist()]     # as in front.json
    best = torch.ones(len(lams), 5).tolist()
    J = [[0.0] * 5] * 21 + [[0.75] * 5] * 100                            # on the paths the base, else near the best
    J[3] = [-1.0] * 5
    got = regret_of(J, [0.0] * 5, best, lams)
    assert got[:2] == (pytest.approx(0.25, abs=1e-6), pytest.approx(2, abs=1e-5))
    assert got[2] == pytest.approx(lams[3])
    few = evaluation_preferences(5, 1).tolist()                          # of another grid all count
    assert regret_of([[0.5] * 5] * 5, [0.0] * 5, [[1.0] * 5] * 5, few)[0] == pytest.approx(0.5)


def test_no_share_of_a_front_that_no_lattice_fills():
    """m = 10: only what the optima have at the same preferences is a yardstick."""
    m = 10
    world = types.SimpleNamespace(mean_scores=lambda logps: torch.zeros(len(logps), m))
    exact = {"J": 2.0 * torch.eye(m), "logps": torch.zeros(m, 1, 1), "z": None}
    front = {"ideal": [2.0] * m, "nadir": [0.0] * m, "hypervolume": 1.0, "lams": []}
    own = hypervolume(np.eye(m), [-0.1] * m)
    r = {"exact": front, "reference_point": [-0.1] * m, "hypervolume": own / 4}
    got = evaluation.shares(r, exact, world)
    assert got["hypervolume_share"] is None and got["exact"]["at_lams"]["hypervolume_share"] is None
    assert got["hypervolume_share_at_lams"] == pytest.approx(0.25)
    # the optima below the reference point
    below = evaluation.shares(r, exact | {"J": torch.full((m, m), -1.0)}, world)
    assert below["hypervolume_share_at_lams"] is None


def test_runs_of_one_objective_and_base_share_what_is_exact(monkeypatch):
    solved = []
    for name in ("best", "exact_front"):
        def solve(lams, row, world, o):
            solved.append(o)
            return len(solved)
        solve.__name__ = name
        monkeypatch.setattr(evaluation, name, solve)
    lams, known, seen = VERTICES, {}, types.SimpleNamespace(split="seen")
    config = {"objective": {"name": "dpo", "beta": 1.0, "aggregate": "ls", "ideal": None}, "dims": ["a", "b"],
              "fingerprint": "x", "flags": {"steps": 5}}
    ask = lambda more, exact=evaluation.best, world=seen, at=lams: evaluation.cached(known, config | more, world, exact,
                                                                                      at)
    assert ask({}) == ask({"flags": {"steps": 9}}) == 1
    other = lambda **more: {"objective": config["objective"] | more}
    different = (other(beta=0.1), other(name="ipo"), other(aggregate="tche"), {"fingerprint": "y"},
                 {"rewards": {"names": ["a"]}}, {"flags": {"quantize": "nf4"}})
    assert [ask(more) for more in different] == [2, 3, 4, 5, 6, 7]
    assert ask({}, at=lams[:1]) == 8 and ask({}, world=types.SimpleNamespace(split="new_verbs")) == 9
    # the front is linear scalarisation's, whatever a run's own aggregation is
    assert ask({}, evaluation.exact_front) == ask(different[2], evaluation.exact_front) == 10
    assert ask({}) == 1 and solved[-1]["aggregate"] == "ls"


CONFIG = {"script": "train_dpo.py", "dims": ["a", "b"], "base": "b", "tokenizer": "toy", "fingerprint": "f",
          "method": "panacea", "label": "Panacea", "models": 1,
          "objective": {"name": "dpo", "beta": 1.0, "aggregate": "ls", "ideal": None},
          "flags": {"steps": 3, "seed": 0, "batch_size": 2, "max_length": 9}}


@pytest.mark.parametrize("second, together", [({"name": "dpo", "beta": 1.0, "aggregate": "tche"}, True),
                                              ({"name": "ipo", "beta": 1.0, "aggregate": "ls"}, False),
                                              ({"name": "dpo", "beta": 0.1, "aggregate": "ls"}, False)])
def test_who_meets_in_one_picture(second, together, monkeypatch, tmp_path, capsys):
    objectives = iter([{"name": "dpo", "beta": 1.0, "aggregate": "ls"}, second])
    drawn = types.SimpleNamespace(fronts=[], compared=[])
    numbers = dict.fromkeys(("hypervolume", "inner_product", "sparsity", "spacing"), 0.5)
    missing = dict.fromkeys(("exact", "outside_mass", "collapsed", "regret", "regret_worst", "hypervolume_share",
                             "hypervolume_share_at_lams"))
    result = lambda run, *_, **__: {
        "run": str(run), "label": "x", "dims": ["a", "b"], "lams": [[1, 0]], "points_are": "normalised J", "models": 1,
        "steps": 3,
        "objective": next(objectives), "reference_point": [0, 0], "spearman": [1, 1], **numbers, **missing}
    monkeypatch.setattr(eval_front, "evaluate", lambda *args, **more: (result(*args), None))
    monkeypatch.setattr(eval_front, "draw_fronts", lambda results, path: drawn.fronts.append(len(results)))
    monkeypatch.setattr(eval_front, "compare",
                        lambda results, device: drawn.compared.append(len(results)) or {"runs": results})
    monkeypatch.setattr(eval_front, "draw_comparison", lambda c, path: None)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIG))
        (tmp_path / name / "timing.json").write_text('{"train_seconds": 1.5}')
    eval_front.main(eval_front.Flags(runs=[str(tmp_path / n) for n in ("one", "two")], device="cpu",
                                     out=str(tmp_path / "out")))
    assert (drawn.fronts, drawn.compared) == (([1, 1, 2], []) if together else ([1, 1], [2]))


def test_tables_are_as_wide_as_their_widest_text():
    text = table({"run": ["short", "a longer one"], "HV": shown([0.5, None], ".4f"), "models": shown([1, 11], "d")})
    assert text.split("\n") == ["run               HV  models", "-" * 28,
                                "short         0.5000       1", "a longer one       -      11"]
