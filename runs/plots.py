"""plots.py - the curves of trainings: any key of metrics.jsonl (docs/metrics.md), a panel a key, a line a run.

    python -m runs.plots out/a                              # what matters for its kind, into out/a/curves.png
    python -m runs.plots out/a out/b --keys loss kl --x tokens --out curves.png
    python -m runs.plots out/a --list                       # the keys that there are

Faint: the values as they are logged; lines: means of neighbours. A key with a number for each of m dimensions has as
many lines. The models of one run (rewarded soups, ParetoHqD) stand one after the other. n: records
"""
import runs.waiting  # noqa: F401  # isort: skip
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib import figure, lines, rcParams, ticker

from runs.directory import read_config, read_log
from runs.files import UserError, write_whole
from runs.flags import flag, run_main

USUAL = "loss losses accuracy grad_norm", "rewards objective kl length explained_variance grad_norm"     # 1: of RLHF
COLORS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #882255 #999933".split()      # told apart by everybody
DASHES = ["-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1))]


@dataclass
class Flags:
    """The command's flags, with defaults and --help texts."""

    runs: list[str] = flag([], "run directories", positional=True)
    keys: list[str] | None = flag(None, "keys of metrics.jsonl (default: what matters for the kind of run)")
    x: Literal["step", "tokens", "seconds"] = flag("step", "what the curves are drawn over")
    smooth: int | None = flag(None, "a line is the mean of so many neighbours (default: a tenth of a training)", 1)
    out: str | None = flag(None, "the picture, .png, .svg or .pdf (default RUN/curves.png; of several out/curves.png)")
    list: bool = flag(False, "instead: the keys that there are")


def read_run(run, over):
    """(the dimensions' names, {key: (n, 1) or (n, m)}, the records' places on the x axis (n,), the records of each
    model: a list of indices)."""
    records = [record for _, record in read_log(run / "metrics.jsonl")]
    if not records:
        raise UserError(f"{run}: no metrics.jsonl with a step is there; name a run that has begun to train")
    dims = [] if (run / "base.json").exists() else read_config(run)["dims"]           # a base model has none
    columns = {key: values for key in {key: 0 for record in records for key in record}
               if (values := column([record.get(key) for record in records], len(dims))) is not None}
    step = columns["step"][:, 0]
    more = np.diff(step, prepend=0)                                    # not positive where the next model begins
    each = np.where(more > 0, more, step) if over == "step" else np.nan_to_num(columns.get(over, columns["step"])[:, 0])
    return dims, columns, np.cumsum(each), np.split(np.arange(len(step)), np.flatnonzero(more[1:] <= 0) + 1)


def column(values, m):
    """The values of a key: numbers (n, 1), or lists of m numbers (n, m); NaN for None. None for all that is not so."""
    width = max((len(x) for x in values if isinstance(x, list)), default=1)
    try:
        numbers = np.array([x if isinstance(x, list) else [x] * width for x in values], dtype=float)
    except (ValueError, TypeError):                                    # texts, lists of several lengths
        return None
    return numbers if numbers.shape == (len(values), width) and width in (1, m) and np.isfinite(numbers).any() else None


def mean_of(values, neighbours):
    """The mean of each number (n,) with its neighbours, so many in all, but NaN; near ones weigh more."""
    known, weights = np.isfinite(values), np.hanning(min(neighbours | 1, len(values)) + 2)[1:-1]
    total, weight = (np.convolve(x, weights, "same") for x in (np.where(known, values, 0), known))
    return np.where(weight > 1e-9, total / np.maximum(weight, 1e-9), np.nan)


def draw(runs, keys, flags):
    """A figure: a run has a color, and a dimension a dash, of one run a color. runs: {name: what read_run returns}"""
    several, every = len(runs) > 1, list(dict.fromkeys(dim for dims, *_ in runs.values() for dim in dims))
    rcParams.update({"axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False})
    across, down = min(len(keys), 2), -(-len(keys) // 2)
    fig = figure.Figure((1.4 + 3 * across, 0.9 + 2.4 * down), layout="constrained")
    legend = {name: dict(color=COLORS[i % len(COLORS)]) for i, name in enumerate(runs) if several}
    for at, key in enumerate(keys, 1):
        ax = fig.add_subplot(down, across, at)
        for name, (dims, columns, x, models) in runs.items():
            for j, values in enumerate(columns.get(key, np.empty((len(x), 0))).T):
                look = legend.get(name, dict(color="0.25"))
                if len(columns[key].T) > 1:
                    d = every.index(dims[j])
                    of_dim = dict(ls=DASHES[d % len(DASHES)]) if several else dict(color=COLORS[d % len(COLORS)])
                    look, legend[dims[j] + " "] = look | of_dim, dict(color="0.25") | of_dim       # no run's name
                for model in models:
                    ax.plot(x[model], values[model], color=look["color"], lw=0.7, alpha=0.25)
                    ax.plot(x[model], mean_of(values[model], flags.smooth or len(model) // 10), lw=1.8,
                            marker="." * (len(model) < 9), **look)
        low, high = np.nanpercentile(np.hstack([c[key].ravel() for _, c, *_ in runs.values() if key in c]), [1, 99])
        ax.set_ylim(low - 0.15 * (high - low or 1), high + 0.15 * (high - low or 1))           # a spike leaves it
        ax.set_title(key, loc="left", fontweight="bold")
        ax.xaxis.set(major_formatter=ticker.EngFormatter(sep=""), major_locator=ticker.MaxNLocator(5, integer=True))
    fig.legend([lines.Line2D([], [], lw=2, **look) for look in legend.values()], list(legend), ncols=4, frameon=False,
               loc="outside upper left")
    fig.supxlabel(flags.x + " (faint: as logged; lines: means of neighbours)", fontsize=10)
    return fig


def main(flags):
    """Draws the runs and returns the picture's path, or prints their keys."""
    runs = {run: read_run(Path(run), flags.x) for run in flags.runs}
    there = {key: 0 for _, columns, *_ in runs.values() for key in columns}
    if flags.list:
        return print("\n".join(there))
    keys = list(dict.fromkeys(flags.keys or (key for key in USUAL["objective" in there].split() if key in there)))
    if unknown := [key for key in keys if key not in there]:
        raise UserError(f"--keys {unknown[0]}: there are {' '.join(there)}")
    path = Path(flags.out or Path(flags.runs[0] if len(runs) == 1 else "out") / "curves.png")
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--out {path}: the picture's name ends in .png, .svg or .pdf")
    write_whole(path, lambda file: draw(runs, keys, flags).savefig(file, dpi=130))
    print(f"picture: {path}")
    return path


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
