"""grade.py - grades the functions in adapters.py: points, and for each test that fails, what it looks like.

    python course/grade.py                          # all problems of all sets that are here
    python course/grade.py --sets 1
    python course/grade.py svd_lora_forward         # one problem, or several, of any set: without --sets
    python course/grade.py --results results.json   # besides, the file that Gradescope reads
"""
import argparse
import json
import os
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)                                           # the folder above this file's, for `course`
os.environ.setdefault("OMP_NUM_THREADS", "1")                         # small tensors: a second thread only waits

import pytest  # noqa: E402

SETS = sorted(int(f.parent.name.removeprefix("set")) for f in (ROOT / "course").glob("set*/grade.py"))


class Recorder:
    """A pytest plugin: what every test was worth and how it went."""

    def __init__(self, problems):
        self.problems, self.results, self.worth = problems, {}, {}

    def pytest_configure(self, config):
        config.option.tbstyle = "native"                              # no lines of source, which take time to find

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if not self.problems or item.function.problem[0] in self.problems]
        self.worth = {item.nodeid: item.function.problem for item in items}

    def pytest_runtest_logreport(self, report):
        name, points = self.worth[report.nodeid]
        test = report.nodeid.split("::")[1].partition("[")[0]         # all its parameters have to pass
        result = self.results.setdefault(test, {"problem": name, "name": test, "score": points, "max_score": points,
                                                "output": ""})
        if not report.passed:
            result["score"], result["output"] = 0, result["output"] or message(report)


def message(report):
    """Why a test failed: the grader's message, or the exception that the student's code raised, and where."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is None:
        return str(report.longrepr).strip()
    return crash.message.removeprefix("Failed: ") + ("" if Path(crash.path).name == "grading.py" else
                                                     f"\n  {Path(crash.path).name}, line {crash.lineno}")


def run(sets, adapters="course.adapters", problems=()):
    """The results of all tests of these problems ((): all), a list of {problem, name, score, max_score, output}.

    adapters: the name of a module that can be imported
    """
    recorder = Recorder(problems)
    files = [str(ROOT / "course" / f"set{n}" / "grade.py") for n in sets]
    # the two others look for threads and warnings at the end of a session, which takes longer than the tests
    off = [word for name in ("terminal", "cacheprovider", "unraisableexception", "threadexception")
           for word in ("-p", f"no:{name}")]
    pytest.main([*files, "--adapters", adapters, "-o", "addopts=", *off], plugins=[recorder])
    return list(recorder.results.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", help="problems (default: all)")
    parser.add_argument("--sets", type=int, nargs="+", default=SETS, choices=SETS, help="problem sets (default: all)")
    parser.add_argument("--adapters", default="course.adapters", help="the module with the functions to grade")
    parser.add_argument("--results", help="write this JSON file too, as Gradescope reads it")
    args = parser.parse_args()
    known = {name for n in SETS for name in import_module(f"course.set{n}.grade").PROBLEMS}
    if unknown := [name for name in args.problems if name not in known]:
        parser.error(f"no problem {unknown[0]}; there are: {' '.join(sorted(known))}")

    results = run(SETS if args.problems else args.sets, args.adapters, args.problems)
    for name in dict.fromkeys(r["problem"] for r in results):
        tests = [r for r in results if r["problem"] == name]
        print(f"{name}: {sum(r['score'] for r in tests)} of {sum(r['max_score'] for r in tests)} points")
        for r in tests:
            if r["output"]:
                print(f"  {r['name']}\n    " + r["output"].replace("\n", "\n    "))
    score, most = (sum(r[key] for r in results) for key in ("score", "max_score"))
    print(f"{score} of {most} points")
    if args.results:
        shown = [{key: r[key] for key in ("name", "score", "max_score", "output")} for r in results]
        Path(args.results).write_text(json.dumps({"score": score, "tests": shown}, indent=1) + "\n")
    return int(score < most)


if __name__ == "__main__":
    sys.exit(main())
