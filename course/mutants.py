"""mutants.py - grades wrong answers that students write, and right ones: does the grader tell them apart?

    python course/mutants.py                    # of all sets: about two minutes
    python course/mutants.py --sets 1

The reference and another right answer (setN/another.py) have to pass every test. A stub, an answer that returns nothing,
and one of zeros have to fail every test of their problem. Of the mutants (setN/mutants.py) each should fail one.
"""
import argparse
import sys
import types
from importlib import import_module
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1]) if __name__ == "__main__" else sys.path[0]

from course import adapters, reference_adapters  # noqa: E402
from course.grade import SETS, run  # noqa: E402


def graded(n, problem, functions):
    """The results of a problem's tests where these functions ({name: function}) take the place of the reference's."""
    module = types.ModuleType("course.under_test")
    vars(module).update(vars(reference_adapters) | functions)
    sys.modules[module.__name__] = module
    return run([n], module.__name__, [problem] if problem else ())


def passed(results):
    """How many tests of these results have passed."""
    return sum(r["score"] == r["max_score"] for r in results)


def answers(n, problem):
    """{what it is: functions} of the answers to a problem that have to fail every test."""
    names, zeros = import_module(f"course.set{n}.grade").PROBLEMS[problem], import_module(f"course.set{n}.mutants").ZEROS
    return {"stub": {name: getattr(adapters, name) for name in names}, "empty": {name: lambda *a, **k: None for name in names},
            "zeros": {name: zeros[name] for name in names}}


def table(n):
    """Prints the table of a set. Returns (mutants caught, mutants, whether all else is as it should be)."""
    wrong, another = import_module(f"course.set{n}.mutants").MUTANTS, import_module(f"course.set{n}.another")
    caught, total, fine = 0, 0, True
    for name, functions in (("reference", {}), ("another", vars(another))):
        results = graded(n, None, functions)
        fine &= passed(results) == len(results)
        print(f"set {n}, {name}: {passed(results)} of {len(results)} tests pass")
    print("\n| problem | tests | stub, empty, zeros: tests that pass | mutants caught | not caught |\n|---|---|---|---|---|")
    for problem in import_module(f"course.set{n}.grade").PROBLEMS:
        got = [graded(n, problem, functions) for functions in answers(n, problem).values()]
        fine &= not any(map(passed, got)) and len(wrong[problem]) >= 8
        missed = [name for name, functions in wrong[problem].items()
                  if passed(results := graded(n, problem, functions)) == len(results)]
        caught, total = caught + len(wrong[problem]) - len(missed), total + len(wrong[problem])
        print(f"| {problem} | {len(got[0])} | {', '.join(str(passed(g)) for g in got)} | {len(wrong[problem]) - len(missed)} of "
              f"{len(wrong[problem])} | {'; '.join(missed)} |", flush=True)
    return caught, total, fine


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, nargs="+", default=SETS, choices=SETS, help="problem sets (default: all)")
    caught, total, fine = map(sum, zip(*(table(n) for n in parser.parse_args().sets)))
    print(f"\n{caught} of {total} mutants caught ({100 * caught / total:.1f} %)")
    return int(caught < 0.95 * total or fine < len(parser.parse_args().sets))


if __name__ == "__main__":
    sys.exit(main())
