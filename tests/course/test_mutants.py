"""test_mutants.py - wrong answers are caught: all of them (slow), and some of one problem of a set at every run."""
import sys

import pytest

from course import mutants


@pytest.mark.parametrize("n, problem", [
    (1, "preference_per_row"), (2, "losses_on_pairs"), (3, "derivatives"),
    (4, "aggregate_advantages"), (5, "pama_weights"), (6, "tree_logprobs")])
def test_some_mutants(n, problem):
    wrong = mutants.import_module(f"course.set{n}.mutants").MUTANTS[problem]
    assert len(wrong) >= 8
    for name, functions in list(wrong.items())[:8]:
        results = mutants.graded(n, problem, functions)
        assert mutants.passed(results) < len(results), name
    for name, functions in mutants.answers(n, problem).items():
        assert mutants.passed(mutants.graded(n, problem, functions)) == 0, name
    assert mutants.passed(mutants.graded(n, problem, {})) == len(results)


@pytest.mark.slow
@pytest.mark.parametrize("n", mutants.SETS)
def test_all_mutants(n, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mutants.py", "--sets", str(n)])
    assert mutants.main() == 0, capsys.readouterr().out
