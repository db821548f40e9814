"""preferences.py - human preference files, read to one form: a prompt, its responses, a label per pair and dimension.

data.layouts lists what is understood.
m: number of dimensions   label: 0 the first response of the pair is better, 1 the second, -1 missing
"""
import random
from dataclasses import replace

from data.files import Row, paths_of
from data.layouts import Broken, read_examples
from runs.files import UserError

CANONICAL = ("helpful", "harmless", "concise")  # the papers' order; other dimensions follow as they appear


def read_preferences(paths, dims=None, pref_dim=None, seed=0, fields=None):
    """paths: one file or a list of them, "dimension=file" for a file whose one label has no name -> (rows, dims,
    dropped): list[Row], list[str], int. fields: what the files call our fields (data.layouts.read_examples).

    dims: these dimensions, in this order (pref_dim is then ignored); else the first `pref_dim` that the files have
    (None: all), ordered helpful, harmless, concise, then others by first appearance. dropped: how many rows had no
    label in any of them. Of more than two responses all pairs with a label count. Files often put the better response
    first. So the responses of each row are turned round with probability 1/2 by a generator of this `seed` (None:
    never), the same rows whatever the dimensions.
    Raises UserError for a file or dimension that is not as it should be.
    """
    paths = paths_of(paths)
    if not paths:
        raise UserError("no preference file given; name at least one")
    coin, rows = random.Random(seed), []
    for path in paths:
        examples = read_compared(path, fields).examples
        if any("*" in example.ratings for example in examples):
            raise UserError(f"{path}: its label has no name; give the dimension, as in --data helpful={path}")
        for example in examples:
            rows.append(_turned(example) if seed is not None and coin.random() < 0.5 else example)
    names = dict.fromkeys(dim for example in rows for _, labels in example.compared() for dim in labels)
    found = [dim for dim in CANONICAL if dim in names] + [dim for dim in names if dim not in CANONICAL]
    dims = _choose(found, dims, pref_dim, ", ".join(map(str, paths)))
    labelled = [row for row in (_row(example, dims) for example in rows) if row.pairs]
    return labelled, dims, len(rows) - len(labelled)


def read_compared(path, fields=None):
    """A data.layouts.File whose examples all have two responses or more, and a place for labels."""
    def use(example):
        if len(example.responses) < 2:
            raise Broken("one response or none: a preference needs two; name the fields of other layouts with --fields")
        if example.ratings is None:
            raise Broken('no field with labels; give "better": {"helpful": 0, "harmless": 1}, or name it with --fields')
    return read_examples(path, fields, use)


def _turned(example):
    """The example with its responses in the other order."""
    ratings = {dim: x[::-1] for dim, x in example.ratings.items()}
    return replace(example, responses=example.responses[::-1], ratings=ratings)


def _row(example, dims):
    """The Row of an example: its pairs that have a label in one of dims."""
    better = {pair: [labels.get(dim, -1) for dim in dims] for pair, labels in example.compared()
              if any(dim in labels for dim in dims)}
    return Row(example.prompt, example.responses, list(better), list(better.values()))


def _choose(found, dims, pref_dim, where):
    """The chosen dimensions, a list, out of the `found` ones."""
    has = f"{where}: labels found for {', '.join(found) or 'no dimension'}"
    if dims is not None:
        missing = [dim for dim in dims if dim not in found]
        if missing or len(set(dims)) != len(dims) or not dims:
            wrong = f"none for {', '.join(missing)}" if missing else f"but dims names {', '.join(dims) or 'nothing'}"
            raise UserError(f"{has}, {wrong}; choose dims among the found ones, each once, or add a file")
        return list(dims)
    if not found:
        raise UserError(f"{has}; add a file with labels")
    if pref_dim is not None and not 1 <= pref_dim <= len(found):
        raise UserError(f"{has}, but pref_dim is {pref_dim}; lower it or add a file")
    return found[:pref_dim]
