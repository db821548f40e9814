r"""preferences.py - human preference files, read to one form: a prompt, its responses, a label per pair and dimension.

Four JSONL schemas, told apart row by row by their keys; each row has `prompt`, `response_0`, `response_1`, and
  PKU-SafeRLHF, BeaverTails, HH-RLHF  better_response_id -> helpful, safer_response_id -> harmless
  HelpSteer2                          higher: {dimension: label}; helpfulness -> helpful, concise_response_id -> concise
  ours                                better: {dimension: label}, e.g. {"helpful": 0, "harmless": 1}
where a label is 0, 1 (this response is the better one), null or absent (nobody said).
m: number of dimensions   label: 0 the first response of the pair is better, 1 the second, -1 nobody said (missing)

All files are made to look alike, in HH-RLHF's form: a prompt that does not yet end in "Assistant:" is wrapped as
"\n\nHuman: {prompt}\n\nAssistant:", its responses begin with one space, and HelpSteer2's turn markers become the same
Human and Assistant turns. Prompts that end in "Assistant:" are kept as they are, and so are their responses."""
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from runs.files import UserError

CANONICAL = ("helpful", "harmless", "concise")  # the papers' order; other dimensions follow as they appear


@dataclass
class Row:
    """One prompt with its responses. A row from a file has two responses and one pair; the embedded world has many."""
    prompt: str
    responses: list[str]
    pairs: list[tuple[int, int]]  # indices into responses: (first, second)
    better: list[list[int]]  # one per pair, m entries each: 0 first is better, 1 second is better, -1 no label


def read_preferences(paths, dims=None, pref_dim=None, seed=0):
    """paths: one JSONL file or a list of them -> (rows, dims, dropped).

    dims: these dimensions, in this order (then pref_dim is not looked at); else the first `pref_dim` that the files
    have (None: all), ordered helpful, harmless, concise, then others by first appearance. dropped: how many rows had
    no label in any of them. Files often put the better response second: the two responses of each row, and its labels,
    are swapped with probability 1/2 by a generator of this `seed` (None: never), the same rows whatever the dimensions.
    Raises UserError for a file, row, field or dimension that is not as it should be."""
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not paths:
        raise UserError("no preference file given; name at least one JSONL file")
    coin = None if seed is None else random.Random(seed)
    read, names = [], {}  # names: a dict keeps the order of first appearance
    for path in paths:
        for prompt, responses, labels in _read_file(path):
            if coin and coin.random() < 0.5:
                responses, labels = responses[::-1], {dim: 1 - label for dim, label in labels.items()}
            read.append((prompt, responses, labels))
            names.update(dict.fromkeys(labels))
    found = [dim for dim in CANONICAL if dim in names] + [dim for dim in names if dim not in CANONICAL]
    dims = _choose(found, dims, pref_dim, ", ".join(map(str, paths)))
    rows = [Row(prompt, responses, [(0, 1)], [[labels.get(dim, -1) for dim in dims]])
            for prompt, responses, labels in read if any(dim in labels for dim in dims)]
    return rows, dims, len(read) - len(rows)


def write_preferences(path, rows, dims):
    """Writes rows (labels in the order of dims) in our own schema, one line per pair; missing labels are left out.
    read_preferences(path, dims, seed=None) gives them back, if each prompt ends in "Assistant:"; others get wrapped."""
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            for (first, second), better in zip(row.pairs, row.better, strict=True):
                line = dict(prompt=row.prompt, response_0=row.responses[first], response_1=row.responses[second],
                            better={dim: label for dim, label in zip(dims, better, strict=True) if label != -1})
                file.write(json.dumps(line) + "\n")


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


def _read_file(path):
    """Yields (prompt, [response_0, response_1], {dimension: 0 or 1}) for each row of one file."""
    empty = True
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    empty = False
                    yield _read_row(line, f"{path}, row {number}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; give JSONL, one JSON object per line") from None
    if empty:
        raise UserError(f"{path}: the file is empty; give JSONL, one JSON object per line")


def _json_object(line, where):
    """One line of a JSONL file as a dict. where: file and row, for the error."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: not JSON; give one JSON object per line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object; give one JSON object per line")
    return row


def _need_texts(row, fields, where, advice):
    """Raises UserError for a field that the row has not, or that is no string."""
    for field in fields:
        if field not in row:
            raise UserError(f'{where}: field "{field}" is missing; {advice}')
        if not isinstance(row[field], str):
            raise UserError(f'{where}: field "{field}" must be a string, not {json.dumps(row[field])[:40]}')


def _read_row(line, where):
    """One line of a file, to what _read_file yields. where: file and row, for the error."""
    row = _json_object(line, where)
    _need_texts(row, ("prompt", "response_0", "response_1"), where, "every row needs it")
    prompt, responses = _as_dialogue(row["prompt"], [row["response_0"], row["response_1"]], "higher" in row)
    return prompt, responses, _labels(row, where)


def _labels(row, where):
    """{dimension: 0 or 1}, the labels that are there, by the row's schema."""
    if "better" in row:
        given = _table(row, "better", where)
    elif "higher" in row:
        ratings = _table(row, "higher", where)
        given = {"helpful" if dim == "helpfulness" else dim: value for dim, value in ratings.items()}
        if "concise_response_id" in row:
            given["concise"] = ("concise_response_id", row["concise_response_id"])
    elif "better_response_id" in row or "safer_response_id" in row:
        given = {"helpful": ("better_response_id", row.get("better_response_id")),
                 "harmless": ("safer_response_id", row.get("safer_response_id"))}
    else:
        raise UserError(f'{where}: field with labels is missing; give "better": {{"helpful": 0, "harmless": 1}}, or '
                        f'better_response_id and safer_response_id, or higher')
    for field, value in given.values():
        if type(value) is not int and value is not None or value not in (0, 1, None):  # True == 1, so look at the type
            raise UserError(f'{where}: field "{field}" must be 0, 1 or null, not {json.dumps(value)[:40]}')
    return {dim: value for dim, (_, value) in given.items() if value is not None}


def _table(row, field, where):
    """row[field] as {dimension: (field's full name, value)}."""
    if not isinstance(row[field], dict):
        raise UserError(f'{where}: field "{field}" must be an object like {{"helpful": 0}}, '
                        f'not {json.dumps(row[field])[:40]}')
    return {dim: (f"{field}.{dim}", value) for dim, value in row[field].items()}


def _as_dialogue(prompt, responses, markers):
    """(prompt, responses) in HH-RLHF's form (see the top). markers: the prompt may have HelpSteer2's turn markers."""
    if prompt.endswith("Assistant:"):
        return prompt, responses
    if markers:
        prompt = re.sub(r"\n<extra_id_1>(User|Assistant)\n",
                        lambda turn: "\n\nHuman: " if turn[1] == "User" else "\n\nAssistant: ", prompt)
    return f"\n\nHuman: {prompt}\n\nAssistant:", [" " + text.lstrip(" ") for text in responses]
