"""test_docs.py - what exists is named in the texts, excerpts are the code, and words that no text has. (That what they
name exists, and that their commands and figures are right: docs/check.py.)"""
import ast
import re
from pathlib import Path

import pytest

from docs.check import node_of

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("data", "ops", "fronts", "runs", "experiments", "bench")
FOLDERS = (*ROOMS, "course", "tests", "docs", ".ci")
CODE = [*sorted(ROOT.glob("*.py")), *(f for room in ROOMS for f in sorted((ROOT / room).rglob("*.py")))]
TEXTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def name_of(file):
    return file.relative_to(ROOT).as_posix()


# ---------------------------------------------------------------------------------------------------------------------
# README.md

EXCERPT = re.compile(r"`([\w/]+\.py)`:\n\n```python\n(.*?)\n```", re.S)


def squeezed(text):
    """Lines without what white space differs."""
    return [" ".join(line.split()) for line in text.splitlines()]


def stands_in(excerpt, text):
    """Whether the lines of an excerpt follow each other in a text."""
    lines, whole = squeezed(excerpt), squeezed(text)
    return any(whole[i:i + len(lines)] == lines for i in range(len(whole)))


def test_excerpts_are_the_code():
    method = read("README.md").split("## The method in seven steps")[1].split("\n## ")[0]
    found = EXCERPT.findall(method)
    assert len(found) == 7 == method.count("```python") == len(re.findall(r"^\*\*\d\.", method, re.M))
    for file, excerpt in found:
        assert 2 <= len(excerpt.splitlines()) <= 8
        assert stands_in(excerpt, read(file)), f"README.md: this is not in {file} (any more):\n{excerpt}"
        assert not stands_in(excerpt.replace("(", "((", 1), read(file))                # the check sees a changed letter


def test_the_file_map_is_complete():
    table = read("README.md").split("## Files")[1]
    named = set(re.findall(r"`([\w./-]+)`", "".join(re.findall(r"^\| (.*?) \|", table, re.M))))
    assert {f for f in named if not f.endswith("/")} >= {f.name for f in ROOT.glob("*.py")}
    assert {f.rstrip("/") for f in named if f.endswith("/")} == set(FOLDERS)
    for f in named:
        assert (ROOT / f).exists(), f


# ---------------------------------------------------------------------------------------------------------------------
# Words.

@pytest.mark.parametrize("words", [r"\.\./shared", r"/work\b", r"\bhis own\b", r"\btold\b(?!`)", r"best at its KL",
                                   r"python (?:reproduce|appendix_a)\.py"])
def test_words_that_no_text_has(words):
    for text in TEXTS:
        found = re.search(words, text.read_text(encoding="utf-8"))
        assert not found or text.name == "CHANGELOG.md", f"{name_of(text)}: {found[0]}"


# ---------------------------------------------------------------------------------------------------------------------
# docs/equations.md, both ways.

CITED = re.compile(r"(?:(Panacea|PAMA|ParetoHqD|IPO)(?:'s)?\s+)?Eq\.\s+(\(\d+\)(?:(?:,|\s+and|\s+or)\s+\(\d+\))*)")
SECTIONS = {"Panacea v1": "Panacea", "PAMA": "PAMA", "ParetoHqD": "ParetoHqD", "Beside": "IPO"}


def citations(text):
    """{(paper, number)}: "Eq. (6), (14)" without a name is Panacea v1's."""
    text = re.sub(r"\n\s*#?\s*", " ", text)                            # comments and docstrings break lines
    return {(paper or "Panacea", int(n)) for paper, group in CITED.findall(text) for n in re.findall(r"\d+", group)}


def table_rows():
    """(paper, number or None, [(file, name), …], [test, …]) of every row of docs/equations.md."""
    for section in read("docs/equations.md").split("\n## ")[2:]:
        paper = next(p for start, p in SECTIONS.items() if section.startswith(start))
        for line in section.splitlines():
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            if len(cells) < 3 or set(cells[0]) <= set("-") or cells[-1] == "test":
                continue
            number = re.match(r"(?:(?:PAMA|ParetoHqD|IPO) )?Eq\. \((\d+)\)", cells[0])
            yield (paper, number and int(number[1]), re.findall(r"`([\w/]+\.py): ([\w.]+)`", " ".join(cells[1:-1])),
                   re.findall(r"`(test_\w+)`", cells[-1]))


def source_of(file, name):
    """The source of a function, class, method ("Class.method") or constant of a file; None where there is none."""
    node = node_of(file, name)
    return node and ast.get_source_segment(read(file), node)


def test_every_numbered_equation_has_a_row():
    rows = [(paper, number) for paper, number, *_ in table_rows() if number]
    assert len(rows) == len(set(rows))
    assert {n for paper, n in rows if paper == "Panacea"} == set(range(1, 20))
    lines = re.findall(r"^\| ([\d, ]+): ", read("docs/equations.md"), re.M)
    assert sorted(int(n) for line in lines for n in line.split(",")) == list(range(1, 11))        # Algorithm 1


def test_what_the_code_cites_stands_in_the_table_with_that_file():
    table = {(paper, number, file) for paper, number, places, _ in table_rows() for file, _ in places}
    code = {(*cited, name_of(f)) for f in CODE for cited in citations(f.read_text(encoding="utf-8"))}
    assert len(code) > 20
    assert not sorted(code - table), "docs/equations.md lacks these files in the rows of these equations"


def test_the_tests_that_the_table_names_exist():
    all_tests = "".join(f.read_text(encoding="utf-8") for f in (ROOT / "tests").rglob("test_*.py"))
    for paper, number, _, tests in table_rows():
        for test in tests:
            assert re.search(rf"def {test}\(", all_tests), f"{paper} ({number}): there is no {test}"


def test_what_the_table_names_cites_its_equation():
    """In its own source, in a line that names it (a caller's comment), or for a class or main in its file's header."""
    lines = [line for f in CODE for line in f.read_text(encoding="utf-8").splitlines()]
    for paper, number, places, _ in table_rows():
        for file, name in places if number else []:
            short = re.compile(rf"\b{name.split('.')[-1]}\b")
            own = source_of(file, name) or ""
            of_file = own.startswith("class ") or "." in name or name == "main"
            header = ast.get_docstring(ast.parse(read(file))) if of_file else ""
            assert (paper, number) in citations(own + "\n" + header) or any(
                (paper, number) in citations(line) for line in lines if short.search(line)), \
                f"{file}: {name} does not cite {paper} Eq. ({number}), and no comment names both"


def test_a_made_up_citation_would_be_seen():
    assert citations("as in Eq. (6), (14) and PAMA Eq. (5), and IPO Eq. (17)") == {
        ("Panacea", 6), ("Panacea", 14), ("PAMA", 5), ("IPO", 17)}
    assert citations("    # Theorem A.4, Eq.\n    # (11))") == {("Panacea", 11)}


# ---------------------------------------------------------------------------------------------------------------------
# docs/metrics.md

def keys_of(file, name, least=2):
    """The keys of the dicts that a function builds: those of `least` or more string keys."""
    for node in ast.walk(ast.parse(source_of(file, name))):
        if isinstance(node, ast.Dict):
            keys = [k.value for k in node.keys if isinstance(k, ast.Constant) and isinstance(k.value, str)]
            if len(keys) >= least:
                yield from keys


@pytest.mark.parametrize("file, name", [("runs/speed.py", "report_speed"), ("fronts/evaluation.py", "evaluate"),
                                        ("fronts/evaluation.py", "front_metrics"), ("fronts/evaluation.py", "shares"),
                                        ("fronts/evaluation.py", "regret"), ("fronts/exact.py", "exact_front"),
                                        ("fronts/comparison.py", "compare"), ("train_base.py", "main")])
def test_keys_that_are_written_are_explained(file, name):
    explained = set(re.findall(r"`(\w+)`", read("docs/metrics.md")))
    keys = set(keys_of(file, name))
    assert keys and not keys - explained, f"{file}: {name}: {sorted(keys - explained)}"


def test_keys_that_are_gone_are_explained_no_more():
    explained = set(re.findall(r"`(\w+)`", read("docs/metrics.md")))
    assert not explained & {"objective_share", "hypervolume_share_all", "J_all", "kl_all", "share_at_these_lams"}


def logged_by(script):
    """The keys that a training script gives to Run.log (runs/loop.py), each as a keyword or in `means`."""
    for call in ast.walk(ast.parse(read(script))):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "log":
            for keyword in call.keywords:
                if keyword.arg == "means":
                    yield from (key.value for key in keyword.value.keys)
                elif keyword.arg not in (None, "show"):
                    yield keyword.arg


def test_keys_of_every_step_are_explained():
    part = read("docs/metrics.md").split("## metrics.jsonl")[1].split("\n## ")[0]
    keys = set(keys_of("runs/loop.py", "Run.log")) | set(keys_of("train_ppo.py", "policy_loss"))
    for script in sorted(f.name for f in ROOT.glob("train_*.py")):
        keys |= set(logged_by(script))
    assert len(keys) > 20 and not keys - set(re.findall(r"`(\w+)`", part))


# ---------------------------------------------------------------------------------------------------------------------
# Requirements.

def test_the_pinned_requirements_are_the_packages_in_use():
    lines = [line for line in read("requirements.txt").splitlines() if line]
    used = set()
    for f in [*CODE, *(ROOT / "tests").rglob("*.py")]:
        used |= set(re.findall(r"^\s*(?:import|from) (\w+)", f.read_text(encoding="utf-8"), re.M))
    assert {line.split("==")[0] for line in lines} <= used | {"pytest"} and all("==" in line for line in lines)
