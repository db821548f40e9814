"""test_handout.py - a student's repository: it runs by itself, and no solution is in it."""
import ast
import os
import re
import subprocess
import sys

import pytest
import torch

from course import handout
from course.grade import ROOT, SETS

# lines, and pieces of lines, by which a solution is known; the handouts themselves may not have them
TELLING = {1: ["self.s * lam", "cat([self.sigma", "x @ V", "* self.U", "layer.U.T @", ".enabled = False",
               "SVDLoRALinear", "svd_lora_linear_plain"],
           2: ["logsigmoid", "softplus", "log_softmax", ".gather(", "(lam * losses)", "lam == 0", "_standard_gamma(",
               "amax(-1)", "better == 1", "clamp(min=1e-9)", "gamma.sum(-1"],
           3: ["nondominated_layers", "bisect_right", "np.maximum.accumulate", "_staircase(", "linalg.cholesky",
               "linalg.solve", ".reciprocal_()", "1 - torch.eye(", "win_probs", "with_outside", "rlhf_closed_form",
               "gain[rows]"],
           4: ["log_softmax", ".gather(", "mask.cumsum(1) == mask.sum(1", "-kl_coeff *", "for t in reversed(",
               "gamma * after", "gamma * decay", "states.detach()", "(lam * losses).sum", "(lam * scores)", "(lam * A)",
               ".clamp(1 - clip", "torch.minimum(", "torch.maximum(", "(samples - 1)",
               "groups.std("],
           5: ["spread", "kkt", "c @ gram @ c - (gram @ c)", "A.argmin()", "A[high] <= 0", "rows @ rows.T", ".amin(-1)",
               "advantages.clamp(min=0)", "ratio <= 1 +"],
           6: ["_LinearLogprob", "torch.maximum(top", "scatter_add_", "W_target -", "_SVDLoRALinear", "a, e = _down(",
               "(flat(z)", "chains.append(", "np.logical_and.accumulate", "causal[:n, :n]", "np.maximum((offset",
               "nondominated_layers", "_smallest(", "torch.cdist(ends", "answers(model"]}
ALLOWED = {"handout.md": ["x @ V"], "handout.html": ["x @ V"],       # why (B, T, r) needs care
           "generation.py": ["log_softmax", ".gather("],             # of next tokens, not of responses
           "attention.py": [".gather("]}                             # of a mask


def shipped(sets):
    """{path: text} of the text files of a student's repository."""
    return {path: text if text is not None else (ROOT / path).read_text(encoding="utf-8")
            for path, text in handout.files(sets).items() if not path.endswith((".safetensors", ".tiktoken"))}


def leaks(texts, n):
    """The telling lines of set n in these files."""
    return [(path, line) for path, text in texts.items() for line in TELLING[n]
            if line in text and line not in ALLOWED.get(path.rpartition("/")[2], [])]


@pytest.mark.parametrize("sets", [SETS, *([n] for n in SETS)])
def test_no_solution_is_handed_out(sets):
    texts = shipped(sets)
    for n in sets:
        assert leaks(texts, n) == []
    assert not {path for path in texts if path.endswith(("mutants.py", "another.py", "reference_adapters.py",
                                                         "instructor.md"))}


@pytest.mark.parametrize("sets", [[n] for n in SETS if n < 6])
def test_no_solution_of_set_6_is_handed_out_before(sets):
    """ops/fused.py is, since set 1's reference runs on it: without what set 6 builds, and it still computes."""
    assert leaks(shipped(sets), 6) == []
    fused = {}
    exec(shipped([2])["ops/fused.py"], fused)
    x, W, U, V, d = (torch.ones(*shape) for shape in ((1, 3), (2, 3), (2, 2), (3, 2), (2,)))
    assert fused["svd_lora_linear"](x, W, U, V, d).tolist() == [[9.0, 9.0]]           # 3 + 2 · 3


def test_a_leak_is_seen():
    """The telling lines are those of the solutions as they stand in this repository, and the reference fills in."""
    for n in SETS:
        solution = {path: (ROOT / path).read_text(encoding="utf-8") for path in handout.SOLVES[n]}
        assert {line for _, line in leaks(solution, n)} >= set(TELLING[n]) - {"softplus", "log_softmax", ".gather("}
    alone = shipped([2])
    assert leaks(alone, 1) and "svd_lora.py" in alone and "ops/fused.py" in alone
    assert "def linear_logprob" not in alone["ops/fused.py"] and "def svd_lora_linear" in alone["ops/fused.py"]
    assert "svd_lora.py" not in shipped([1]) and "svd_lora.py" not in shipped(SETS)


def test_graders_and_experiments_import_nothing_that_solves():
    """Of this repository they import what is handed out with all sets."""
    there = {path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in handout.files(SETS)}
    for path, text in shipped(SETS).items():
        for node in ast.walk(ast.parse(text)) if path.endswith(".py") else []:
            names = ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                     [node.module] if isinstance(node, ast.ImportFrom) else [])
            for name in names:
                top = name.partition(".")[0]
                ours = (ROOT / top).is_dir() or (ROOT / f"{top}.py").exists()
                assert not ours or name in there, (path, name)


def test_nothing_outside_imports_the_course():
    for path in (p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0] not in ("course", "tests", "out")):
        assert not re.search(r"^\s*(from|import) course\b", path.read_text(encoding="utf-8"), re.M), path


def test_cut():
    text = "import a\n\n\n@x\ndef f():\n    pass\n\n\nclass g:\n    y = 1\n\n\ndef h():\n    return f\n"
    assert handout.cut(text, ["f", "g"]) == "import a\n\n\n\n\n\n\ndef h():\n    return f\n"


def go(folder, *command):
    """Runs Python in a student's repository, which sees nothing of this one."""
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run([sys.executable, *command], cwd=folder, env=alone, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("sets", [SETS, *([n] for n in SETS)])
def test_it_runs_by_itself(tmp_path, sets):
    """Graders fail with NotImplementedError alone; a solution from the handout passes in it; experiments run."""
    folder = tmp_path / "student"
    handout.write(folder, sets)
    first = go(folder, "course/grade.py")
    assert first.returncode == 1 and re.search(r"^0 of \d+ points$", first.stdout, re.M)
    assert first.stdout.count("NotImplementedError") == len(re.findall(r"^  test_", first.stdout, re.M)) > 20
    assert go(folder, "course/grade.py", "--results", "r.json").stdout and '"score": 0' in (
        folder / "r.json").read_text()
    if max(sets) > 1:
        with_own = "stand-in" if 1 in sets else "reference"
        said = go(folder, "-c",
                  "import course.adapters as a; from course import earlier; print(earlier.adapter(a).name)")
        assert with_own in said.stdout
    adapters, stubs = folder / "course/adapters.py", (folder / "course/adapters.py").read_text()
    for n in sets:
        (folder / f"own{n}.py").write_text((ROOT / f"course/set{n}/another.py").read_text())
        stubs += f"\nfrom own{n} import *\n"
    adapters.write_text(stubs)
    then = go(folder, "course/grade.py")
    assert then.returncode == 0, then.stdout
    quick = {1: ["--steps", "2"], 2: ["--steps", "1", "--prompts", "1"],
             3: ["--lams", "3", "--prompts", "1"], 4: ["--steps", "1", "--prompts", "1"],
             5: ["--steps", "2"], 6: ["--most", "1000", "--responses", "2"]}
    for n in sets:
        done = go(folder, "-m", f"course.set{n}.experiment", "--out", f"out/{n}", *quick[n])
        assert done.returncode == 0 and list((folder / f"out/{n}").glob("*.png")), done.stderr


def test_a_folder_that_exists_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["handout.py", "--out", str(tmp_path)])
    assert handout.main() == 2 and "exists already" in capsys.readouterr().err and not list(tmp_path.iterdir())
