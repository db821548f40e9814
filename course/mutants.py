"""mutants.py - grades wrong answers that students write, and right ones: does the grader tell them apart?

    python course/mutants.py                    # of all sets: a CPU minute
    python course/mutants.py --sets 1

The reference and another right answer (setN/another.py) have to pass every test. A stub, an answer that returns
nothing, and one of zeros have to fail every test of their problem. Each mutant (setN/mutants.py) should fail one.
"""
import argparse
import sys
import types
from importlib import import_module
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

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
    zeros = import_module(f"course.set{n}.mutants").ZEROS
    kinds = {"stub": lambda name: getattr(adapters, name), "empty": lambda name: lambda *a, **k: None,
             "zeros": lambda name: zeros[name]}
    names = import_module(f"course.set{n}.grade").PROBLEMS[problem]
    return {kind: {name: of(name) for name in names} for kind, of in kinds.items()}


def table(n):
    """Prints the table of a set. Returns (mutants caught, mutants, whether all else is as it should be)."""
    mutants, another = import_module(f"course.set{n}.mutants").MUTANTS, import_module(f"course.set{n}.another")
    caught, total, fine = 0, 0, True
    for name, functions in (("reference", {}), ("another", vars(another))):
        results = graded(n, None, functions)
        fine &= passed(results) == len(results)
        print(f"set {n}, {name}: {passed(results)} of {len(results)} tests pass")
    print("\n| problem | tests | of stub, empty, zeros pass | mutants caught | not caught |\n|---|---|---|---|---|")
    for problem, wrong in mutants.items():
        bad = [graded(n, problem, functions) for functions in answers(n, problem).values()]
        results = {name: graded(n, problem, functions) for name, functions in wrong.items()}
        missed = [name for name, r in results.items() if passed(r) == len(r)]
        fine &= not any(map(passed, bad)) and len(wrong) >= 8
        caught, total = caught + len(wrong) - len(missed), total + len(wrong)
        print(f"| {problem} | {len(bad[0])} | {', '.join(str(passed(r)) for r in bad)} | "
              f"{len(wrong) - len(missed)} of {len(wrong)} | {'; '.join(missed)} |", flush=True)
    return caught, total, fine


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, nargs="+", default=SETS, choices=SETS, help="problem sets (default: all)")
    caught, total, fine = map(sum, zip(*(table(n) for n in parser.parse_args().sets)))
    print(f"\n{caught} of {total} mutants caught ({100 * caught / total:.1f} %)")
    return int(caught < 0.95 * total or fine < len(parser.parse_args().sets))


if __name__ == "__main__":
    sys.exit(main())
