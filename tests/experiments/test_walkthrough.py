"""test_walkthrough.py - docs/walkthrough.md is what its script prints, and its numbers tell what they should."""
import re
from pathlib import Path

import pytest

from experiments import walkthrough

ROOT = Path(__file__).parents[2]
NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")


@pytest.fixture(scope="module")
def pages():
    kept = (ROOT / "docs/walkthrough.md").read_text(encoding="utf-8")
    return kept, walkthrough.filled(kept)


def same(a, b):
    """Whether two texts are equal but for rounding: words and signs to the letter, numbers to a hundredth (or 1e-5)."""
    close = all(abs(float(x) - float(y)) <= max(0.01 * abs(float(x)), 1e-5)
                for x, y in zip(NUMBER.findall(a), NUMBER.findall(b)))
    return NUMBER.sub("#", a) == NUMBER.sub("#", b) and close


def test_the_page_is_what_the_script_prints(pages):
    kept, printed = pages
    assert same(kept, printed), "run  python -m experiments.walkthrough"
    assert not same(kept, printed.replace("0.6931", "0.7031")) and not same(kept, printed.replace("EOS", "BOS", 1))


def test_the_numbers_tell_what_they_should(pages):
    text = pages[1]
    assert re.search(r"L +\(2, 2\)  \[\[0\.6931, 0\.6931\], \[0\.6931, 0\.6931\]\]", text)       # ln 2 at π = π_ref
    s = float(re.findall(r"^s +\(\)  \[(.+)\]", text, re.M)[1])
    assert abs(abs(s) - walkthrough.FLAGS.lr) < 1e-6                               # AdamW's first step
    last = re.search(r"last m of d +\(2, 2\)  \[\[(.+)\], \[(.+)\]\]", text)
    rows = [[float(x) for x in row.split(", ")] for row in last.groups()]
    preferences = ((0.3, 0.7), (1.0, 0.0))
    assert all(abs(d - s * lam) < 1e-6 for row, lams in zip(rows, preferences) for d, lam in zip(row, lams))
    before, after = (float(x) for x in re.findall(r"objective +\(\)  \[(.+)\]", text))
    assert after < before - 0.01
