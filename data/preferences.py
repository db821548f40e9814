"""preferences.py - human preference files, read to one form: a prompt, its responses, a label per pair and dimension.

data.files lists the layouts of files that are understood.
m: number of dimensions   label: 0 the first response of the pair is better, 1 the second, -1 missing
"""
import json
import random

from data.files import Row, paths_of, read_rows
from runs.files import UserError

CANONICAL = ("helpful", "harmless", "concise")  # the papers' order; other dimensions follow as they appear


def read_preferences(paths, dims=None, pref_dim=None, seed=0):
    """paths: one JSONL file or a list of them -> (rows, dims, dropped): list[Row], list[str], int.

    dims: these dimensions, in this order (pref_dim is then ignored); else the first `pref_dim` that the files have
    (None: all), ordered helpful, harmless, concise, then others by first appearance. dropped: how many rows had no
    label in any of them. Files often put the better response second. So the two responses of each row, and its labels,
    are swapped with probability 1/2 by a generator of this `seed` (None: never), the same rows whatever the dimensions.
    Raises UserError for a file, row, field or dimension that is not as it should be.
    """
    paths = paths_of(paths)
    if not paths:
        raise UserError("no preference file given; name at least one JSONL file")
    coin = None if seed is None else random.Random(seed)
    read, names = [], {}  # names: a dict keeps the order of first appearance
    for example in (example for path in paths for example in read_rows(path, "preference")):
        responses, labels = example.responses, _labels(example)
        if coin and coin.random() < 0.5:
            responses, labels = responses[::-1], {dim: 1 - label for dim, label in labels.items()}
        read.append((example.prompt, responses, labels))
        names.update(dict.fromkeys(labels))
    found = [dim for dim in CANONICAL if dim in names] + [dim for dim in names if dim not in CANONICAL]
    dims = _choose(found, dims, pref_dim, ", ".join(map(str, paths)))
    rows = [Row(prompt, responses, [(0, 1)], [[labels.get(dim, -1) for dim in dims]])
            for prompt, responses, labels in read if any(dim in labels for dim in dims)]
    return rows, dims, len(read) - len(rows)


def _labels(example):
    """{dimension: 0 or 1} of an example of two responses: the labels that are there."""
    if len(example.responses) != 2:
        raise UserError(f'{example.where}: field "response_0" is missing; a preference needs two responses')
    if example.labels is None:
        raise UserError(f'{example.where}: field with labels is missing; give "better": {{"helpful": 0, '
                        f'"harmless": 1}}, or better_response_id and safer_response_id, or higher')
    for name, value in example.labels.values():
        if type(value) is not int and value is not None or value not in (0, 1, None):  # True == 1, so look at the type
            raise UserError(f'{example.where}: field "{name}" must be 0, 1 or null, not {json.dumps(value)[:40]}')
    return {dim: value for dim, (_, value) in example.labels.items() if value is not None}


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
