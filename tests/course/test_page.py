"""test_page.py - handouts as HTML pages."""
import re
from html.parser import HTMLParser

import pytest

from course.grade import ROOT, SETS
from course.page import blocks, equation, inline, page


class Tags(HTMLParser):
    """Checks that tags are closed in order; counts them."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("n", SETS)
def test_a_handout_as_a_page(n):
    markdown = (ROOT / f"course/set{n}/handout.md").read_text(encoding="utf-8")
    html = page(markdown)
    tags = Tags(html)
    assert tags.open == [] and tags.seen.count("blockquote") == markdown.count("**Problem (")
    text = re.sub(r"`[^`]+`", "", markdown)
    equations = len(re.findall(r"\$\$\n", text)) // 2 + len(re.findall(r"\$[^$\n]+\$", text))
    assert tags.seen.count("svg") == equations > 20
    text = re.sub(r"<svg.*?</svg>|<code>.*?</code>|<[^>]+>", "", html, flags=re.S)
    assert not re.search(r"\*\*|\$|```|\\[a-z]", text)                # no Markdown and no LaTeX is left over
    assert "<script" not in html and not re.search(r'(src|href)="(?!https://arxiv)', html)


def test_blocks():
    assert blocks(["# A *b*", "", "one", "`two`", "- x", "- y", "  z", "1. u"]) == (
        "<h1>A <i>b</i></h1>\n<p>one <code>two</code></p>\n<ul><li>x</li><li>y z</li></ul>\n<ol><li>u</li></ol>")
    assert blocks(["> **q**", ">", "> r", "", "| a | b |", "|---|---|", "| 1 | 2 |"]) == (
        "<blockquote><p><b>q</b></p>\n<p>r</p></blockquote>\n"
        "<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>")
    assert "<tr><td></td><td>1</td><td></td></tr>" in blocks(["| a | b | c |", "|---|---|---|", "| | 1 | |"])
    assert blocks(["```", "a < b", "```"]) == "<pre>a &lt; b</pre>"
    assert inline("a < b [c](d)") == 'a &lt; b <a href="d">c</a>' and inline("`*a*`") == "<code>*a*</code>"


def test_equation():
    low, high = (float(re.search(r"vertical-align:(-?[\d.]+)pt", equation(tex))[1]) for tex in ("x_{i_j}", "x"))
    assert low < high <= 0 and 'aria-label="x"' in equation("x")
    with pytest.raises(ValueError):
        equation(r"\nosuchthing")
