"""test_grade.py - the graders: the reference passes, stubs fail, points add up, messages name mistakes."""
import json
import re
import sys

import pytest
import torch

from course import grade, mutants
from course.grading import brief, numbers, same, slope
from course.set1 import grade as set1
from course.set2 import grade as set2
from course.set3 import grade as set3
from course.set4 import grade as set4
from course.set5 import grade as set5
from course.set6 import grade as set6

HANDOUTS = {n: (grade.ROOT / f"course/set{n}/handout.md").read_text(encoding="utf-8") for n in grade.SETS}
GRADERS = {1: set1, 2: set2, 3: set3, 4: set4, 5: set5, 6: set6}


@pytest.mark.parametrize("n", grade.SETS)
def test_boxes_match_the_tests(n):
    """Every problem that is graded has a box with its points, its command and its functions' signatures."""
    boxes = {name: int(points) for name, points in re.findall(
        r"\*\*Problem \((\w+)\): .+ \((\d+) points\) \(\d+ CPU minutes?\)\*\*",
                                                              HANDOUTS[n])}
    assert len(boxes) == HANDOUTS[n].count("**Problem (")
    points = {}
    for test in vars(GRADERS[n]).values():
        if hasattr(test, "problem"):
            points[test.problem[0]] = points.get(test.problem[0], 0) + test.problem[1]
    assert points == {name: boxes[name] for name in GRADERS[n].PROBLEMS}
    for name, functions in GRADERS[n].PROBLEMS.items():
        assert f"`python course/grade.py {name}`" in HANDOUTS[n] and all(f"{f}(" in HANDOUTS[n] for f in functions)
        assert all(hasattr(module, f) for f in functions for module in (mutants.adapters, mutants.reference_adapters))
    written = (grade.ROOT / "course/instructor.md").read_text(encoding="utf-8")
    for name in set(boxes) - set(GRADERS[n].PROBLEMS):
        assert f"**{name}**" in written, f"{name} has no rubric"
    assert f"{sum(boxes.values())} points" in written


@pytest.mark.parametrize("adapters, share", [("reference_adapters", 1), ("adapters", 0), ("set{n}.another", 1)])
@pytest.mark.parametrize("n", grade.SETS)
def test_right_answers_pass_and_stubs_fail(n, adapters, share):
    results = grade.run([n], "course." + adapters.format(n=n))
    assert len(results) > 20 and all(r["score"] == share * r["max_score"] for r in results)
    assert all(r["output"].startswith("" if share else "NotImplementedError") for r in results)


@pytest.mark.parametrize("n, problem, name, says", [
    (1, "svd_lora_forward", "the gain is left out", "when the gain is left out"),
    (1, "preference_per_row", "the mean of the preferences", "under the mean of the preferences"),
    (1, "adapters_off", "never on again", "the branches stay off"),
    (1, "merge", "the preference that is set", "the preference that is set is merged"),
    (2, "response_logprobs", "the mean over tokens", "the mean over tokens is taken"),
    (2, "dpo_loss", "chosen and rejected exchanged", "chosen and rejected have changed places"),
    (2, "uneven_labels", "missing labels are counted", "missing labels are counted"),
    (2, "tchebycheff", "λ chooses, but does not weigh", "does not weigh it"),
    (2, "training_step", "the reference with the adapter on", "the reference is computed with the adapter on"),
    (3, "nondominated", "equal points dominate each other", "equal points dominate each other"),
    (3, "everything_counts", "other texts have no score", "other texts have no score"),
    (3, "newton", "λ·r", "λ·r is taken"),
    (3, "tchebycheff_point", "a prompt at a time", "every prompt has its own maximum"),
    (3, "regret", "the mean of quotients", "the mean of the quotients is taken"),
    (4, "kl_penalized_rewards", "the sign of the KL term", "the KL term has the wrong sign"),
    (4, "gae", "bootstrapping past the end", "behind a response is taken for its value after the last token"),
    (4, "gae", "advantages and returns exchanged", "advantages: not the expected numbers\n  expected 3.75 4.5 1\n"
     "  got      4.25 5.5 4\n  this is what comes out when returns and advantages have changed places"),
    (4, "ppo_value_loss", "no factor 1/2", "the factor 1/2 is left out"),
    (4, "aggregate_advantages", "λ of row t at token t", "row t of lam is taken for token t"),
    (4, "ppo_policy_loss", "max for min", "the larger of the two is taken"),
    (4, "leave_one_out", "the own score in the mean", "a response is in its own baseline"),
    (4, "normalised_groups", "GDPO: after the sum", "λ sums first, as in GRPO"),
    (5, "min_norm_pair", "not clipped", "the weights are those of the whole line"),
    (5, "min_norm_weights", "Frank-Wolfe, 250 steps", "there are shorter means"),
    (5, "mgda_backward", "a c for each parameter", "the weights are those of the last parameter alone"),
    (5, "noon", "dropped on both sides", "ratios below 1 − ε are dropped too"),
    (5, "pama_advantages", "S: padding counts", "or padding counts"),
    (6, "logprob_forward", "the old sum is not rescaled", "the old sum is kept as it is"),
    (6, "logprob_backward", "without the 1 at the target", "the term of the target is missing"),
    (6, "pack_tree", "the responses share the prompt alone", "the responses share the prompt alone"),
    (6, "tree_attention", "positions are the nodes' numbers", "positions are the nodes' numbers"),
    (6, "tree_logprobs", "the node to the left", "the node to the left is asked"),
    (6, "svd_lora_backward", "d: the gain is left out", "the gain is left out"),
    (6, "pareto_selection", "the scale is that of the pool", "the scale is that of the pool"),
    (6, "stage_two", "repetitions stay", "repetitions are not dropped")])
def test_messages_name_the_mistake(n, problem, name, says):
    wrong = mutants.import_module(f"course.set{n}.mutants").MUTANTS[problem][name]
    failed = [r for r in mutants.graded(n, problem, wrong) if r["score"] == 0]
    assert any(says in r["output"] and "expected" in r["output"] for r in failed), failed


def test_results_are_what_gradescope_reads(tmp_path, monkeypatch, capsys):
    file = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["grade.py", "linear_scalarization", "orthogonality", "--adapters",
                                      "course.reference_adapters", "--results", str(file)])
    assert grade.main() == 0
    assert "orthogonality: 4 of 4 points" in capsys.readouterr().out
    results = json.loads(file.read_text())
    assert results["score"] == 8 == sum(x["score"] for x in results["tests"])
    assert all(set(x) == {"name", "score", "max_score", "output"} for x in results["tests"])
    monkeypatch.setattr(sys, "argv", ["grade.py", "no_such_problem"])
    with pytest.raises(SystemExit) as stop:
        grade.main()
    assert stop.value.code == 2


def test_same():
    same("x", torch.tensor([1.0, -torch.inf]), [1, -torch.inf])
    for got, says in ((torch.tensor([2.0, 2.0]), "is doubled"), (torch.tensor([1.0]), r"shape \(2,\), got \(1,\)"),
                      (torch.zeros(2), "zero everywhere"), (None, "return its result"),
                      (torch.tensor([1.0, torch.nan]), "NaN"),
                      (torch.tensor([1.0, 1.001]), "expected 1 1")):
        with pytest.raises(pytest.fail.Exception, match=says):
            same("x", got, [1.0, 1.0], {"it is doubled": [2.0, 2.0]})
    x = torch.tensor([1.0, 3.0], dtype=torch.float64)
    assert abs(slope(lambda: x[1] ** 2, x, (1,)) - 6) < 1e-6 and x.tolist() == [1, 3]
    assert numbers(2, 3).unique().numel() == 6 and brief(torch.arange(9.0)).endswith("…")
