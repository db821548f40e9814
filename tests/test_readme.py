"""test_readme.py - the README keeps its promises: what it names exists, and what exists is named."""
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCES = [f for f in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py")] if f.name != "__init__.py"]


def equations(text):
    """The numbers in "Eq. (5)", "Eq. (6) and (14)", "Eq. (6), (14)"."""
    found = re.findall(r"Eq\. (\(\d+\)(?:(?:,| and) \(\d+\))*)", text)
    return {int(n) for group in found for n in re.findall(r"\d+", group)}


def test_every_equation_in_the_code_stands_in_the_table_and_back():
    table = README.split("## From the paper's equations to the code")[1].split("\n## ")[0]
    in_code = set().union(*(equations(f.read_text(encoding="utf-8")) for f in SOURCES))
    assert len(in_code) >= 7 and equations(table) == in_code


def test_every_function_and_test_in_the_table_exists():
    table = README.split("## From the paper's equations to the code")[1].split("\n## ")[0]
    cells = re.findall(r"`([\w/]+\.py): (\w+)`", table)
    assert len(cells) >= 12
    for file, name in cells:
        assert re.search(rf"(def|class) {name}\b", (ROOT / file).read_text(encoding="utf-8")), f"{file} has no {name}"
    for file in re.findall(r"`(tests/\w+\.py)`", table):
        assert (ROOT / file).exists()


def test_the_file_map_is_complete():
    files = set(re.findall(r"`([\w/]+\.py)`", README.split("## Files")[1].split("\n## ")[0]))
    assert files == {str(f.relative_to(ROOT)) for f in SOURCES}


def test_flags_and_pictures_that_the_texts_name_exist():
    code = "".join(f.read_text(encoding="utf-8") for f in [*SOURCES, *ROOT.glob("bench/*.py")])
    for text in (README, (ROOT / "docs/log.md").read_text(encoding="utf-8")):
        for flag in set(re.findall(r"--(\w+)", text)):
            assert re.search(rf"^    {flag}: ", code, re.M) or flag in ("help", "nproc_per_node"), flag
    for picture in re.findall(r"\]\((docs/[\w/.]+)\)", README):
        assert (ROOT / picture).exists(), picture
    assert "@" not in re.sub(r"\S+@\S+\.\S+", "", README)             # no figure is left to fill in


def test_the_pinned_requirements_are_the_packages_in_use():
    wanted = {line.split("==")[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if line}
    used = set()
    for f in [*SOURCES, *ROOT.glob("tests/*.py")]:
        used |= set(re.findall(r"^\s*(?:import|from) (\w+)", f.read_text(encoding="utf-8"), re.M))
    assert wanted <= used | {"pytest"} and all("==" in line for line in (ROOT / "requirements.txt").read_text().split())
