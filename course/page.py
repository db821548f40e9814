"""page.py - a handout as one HTML page: no network, no JavaScript. Equations are inline SVG, by matplotlib's mathtext.

Understands the Markdown that the handouts use: headings, paragraphs, lists, tables, fenced code, quotes (the problem
boxes), **bold**, *italic*, `code`, [links](…), $…$ and $$ … $$. mathtext is a part of LaTeX: no \\begin, no \\text.
"""
import html
import re
from functools import lru_cache

from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import MathTextParser
from matplotlib.path import Path
from matplotlib.textpath import TextPath

STYLE = """body { max-width: 46em; margin: 2em auto; padding: 0 1em; font: 16px/1.5 sans-serif; }
pre, code { font-family: monospace; font-size: 14px; background: #f3f3f3; } pre { padding: .6em; overflow-x: auto; }
blockquote { margin: 1.2em 0; padding: .4em 1em; border: 2px solid #36c; border-radius: 6px; }
table { border-collapse: collapse; } td, th { border: 1px solid #bbb; padding: .2em .6em; text-align: left; }
.equation { text-align: center; } svg { overflow: visible; }"""
ITEM = r"- |\d+\. "                                                   # how an item of a list begins
SIZE = 13.0                                                           # of the equations' font, in points


@lru_cache(None)
def equation(tex):
    """One equation as an inline SVG. Raises ValueError for what mathtext does not know."""
    font = FontProperties(size=SIZE, math_fontfamily="stix")
    width, height, depth, *_ = MathTextParser("path").parse(f"${tex}$", dpi=72, prop=font)
    path = TextPath((0, 0), f"${tex}$", size=SIZE, prop=font)
    draw = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C", Path.CLOSEPOLY: "Z"}
    d = "".join(draw[code] + ("" if code == Path.CLOSEPOLY else " ".join(f"{v:.2f}" for v in points))
                for points, code in path.iter_segments(curves=True))
    return (f'<svg role="img" aria-label="{html.escape(tex)}" width="{width:.2f}pt" height="{height:.2f}pt" '
            f'viewBox="0 {depth - height:.2f} {width:.2f} {height:.2f}" style="vertical-align:{-depth:.2f}pt">'
            f'<path transform="scale(1,-1)" fill="currentColor" d="{d}"/></svg>')


def inline(text):
    """Markdown within a line."""
    parts = re.split(r"(`[^`]+`|\$[^$]+\$)", text)                    # code and equations are taken as they are
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = f"<code>{html.escape(part[1:-1])}</code>" if part[0] == "`" else equation(part[1:-1])
        else:
            part = html.escape(part, quote=False)
            part = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", part)
            part = re.sub(r"\*(.+?)\*", r"<i>\1</i>", part)
            parts[i] = re.sub(r"\[(.+?)\]\((.+?)\)", r'<a href="\2">\1</a>', part)
    return "".join(parts)


def blocks(lines):
    """Markdown lines as HTML, block by block."""
    out, lines = [], list(lines)

    def take(belongs):
        """Takes the lines up to the first that does not belong."""
        n = next((i for i, x in enumerate(lines) if not belongs(x)), len(lines))
        taken, lines[:n] = lines[:n], []
        return taken

    while lines:
        line = lines[0]
        if not line.strip():
            lines.pop(0)
        elif line.startswith("```"):
            lines.pop(0)
            code = take(lambda x: not x.startswith("```"))
            lines.pop(0)
            out.append(f"<pre>{html.escape(chr(10).join(code))}</pre>")
        elif line.strip() == "$$":
            lines.pop(0)
            tex = " ".join(take(lambda x: x.strip() != "$$"))
            lines.pop(0)
            out.append(f'<p class="equation">{equation(tex)}</p>')
        elif heading := re.match(r"(#+) (.*)", line):
            lines.pop(0)
            level = len(heading[1])
            out.append(f"<h{level}>{inline(heading[2])}</h{level}>")
        elif line.startswith(">"):
            quoted = take(lambda x: x.startswith(">"))
            out.append(f"<blockquote>{blocks(x[1:].removeprefix(' ') for x in quoted)}</blockquote>")
        elif line.startswith("|"):
            rows = [[cell.strip() for cell in x.strip()[1:-1].split("|")] for x in take(lambda x: x.startswith("|"))]
            cells = lambda row, tag: "<tr>" + "".join(f"<{tag}>{inline(cell)}</{tag}>" for cell in row) + "</tr>"
            out.append("<table>" + cells(rows[0], "th") + "".join(cells(row, "td") for row in rows[2:]) + "</table>")
        elif re.match(ITEM, line):
            points, (kind, mark) = [], ("ul", "- ") if line[0] == "-" else ("ol", r"\d+\. ")
            for x in take(lambda x: x.startswith("  ") or re.match(mark, x)):
                if re.match(mark, x):
                    points.append(x.partition(" ")[2])
                else:
                    points[-1] += " " + x.strip()
            out.append(f"<{kind}>" + "".join(f"<li>{inline(x)}</li>" for x in points) + f"</{kind}>")
        else:
            text = take(lambda x: x.strip() and not re.match(rf"```|\$\$|#+ |>|\||{ITEM}", x))
            out.append(f"<p>{inline(' '.join(text))}</p>")
    return "\n".join(out)


def page(markdown):
    """A handout as one HTML page."""
    title = markdown.partition("\n")[0].lstrip("# ")
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
            f"<style>{STYLE}</style></head><body>\n{blocks(markdown.splitlines())}\n</body></html>\n")
