"""test_preferences.py - dimensions and labels, the real files' counts, the swap, and what bad input says. The layouts
are in test_layouts.py."""
import json

import pytest

from data.files import Message, Row
from data.preferences import read_preferences
from runs.files import UserError

PAIR = dict(prompt="hi", response_0="A", response_1="B")


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def better(rows):
    return [row.better[0] for row in rows]


# ---- dimensions ----

def test_our_own_schema(tmp_path):
    path = jsonl(tmp_path / "own.jsonl",
                 PAIR | dict(better=dict(formal=1, harmless=0, helpful=1)),
                 PAIR | dict(better=dict(helpful=None, harmless=1)),
                 PAIR | dict(better=dict(formal=0)))
    rows, dims, dropped = read_preferences(path, seed=None)
    assert dims == ["helpful", "harmless", "formal"] and dropped == 0  # canonical order first
    assert rows[0] == Row((Message("user", "hi"),), ["A", "B"], [(0, 1)], [[1, 0, 1]])
    assert better(rows) == [[1, 0, 1], [-1, 1, -1], [-1, -1, 0]]
    rows, dims, dropped = read_preferences(path, pref_dim=2, seed=None)
    assert (dims, dropped, better(rows)) == (["helpful", "harmless"], 1, [[1, 0], [-1, 1]])
    rows, dims, dropped = read_preferences([str(path)], dims=("formal", "helpful"), pref_dim=7, seed=None)
    assert (dims, dropped, better(rows)) == (["formal", "helpful"], 1, [[1, 1], [0, -1]])


def test_saferlhf_schema(tmp_path):
    path = jsonl(tmp_path / "pku.jsonl",
                 PAIR | dict(better_response_id=0, safer_response_id=1, is_response_0_safe=False),
                 PAIR | dict(better_response_id=None, safer_response_id=0))
    rows, dims, _ = read_preferences(path, seed=None)
    assert dims == ["helpful", "harmless"] and better(rows) == [[0, 1], [-1, 0]]


def test_several_files_and_blank_lines(tmp_path):
    one = jsonl(tmp_path / "one.jsonl", PAIR | dict(better_response_id=0))
    two = tmp_path / "two.jsonl"
    two.write_text("\n" + json.dumps(PAIR | dict(better=dict(harmless=1))) + "\n  \n\n", encoding="utf-8-sig")
    rows, dims, _ = read_preferences([one, two], seed=None)
    assert dims == ["helpful", "harmless"] and better(rows) == [[0, -1], [-1, 1]]


# ---- the swap ----

def test_swap(tmp_path):
    path = jsonl(tmp_path / "own.jsonl", *[PAIR | dict(prompt=str(i), better=dict(helpful=0, formal=1) if i % 3 else
                                                       dict(helpful=0)) for i in range(300)])
    rows, _, _ = read_preferences(path, dims=["helpful", "formal"], seed=0)
    swapped = {row.prompt: row.responses == ["B", "A"] for row in rows}
    assert 120 <= sum(swapped.values()) <= 180  # 150 expected, standard deviation 8.7
    for number, row in enumerate(rows):
        expected = [1, 0 if number % 3 else -1] if swapped[row.prompt] else [0, 1 if number % 3 else -1]
        assert row.better == [expected] and row.pairs == [(0, 1)]  # labels flip with the responses, -1 stays
    assert rows == read_preferences(path, dims=["helpful", "formal"], seed=0)[0]
    assert rows != read_preferences(path, dims=["helpful", "formal"], seed=1)[0]
    other, _, dropped = read_preferences(path, dims=["formal"], seed=0)  # the same rows, whatever the dimensions
    assert dropped == 100 and all((row.responses == ["B", "A"]) == swapped[row.prompt] for row in other)


# ---- the real files ----

def test_pku_saferlhf(shared):
    path = shared("hh_safe", "pku_saferlhf_train.jsonl")
    rows, dims, dropped = read_preferences(path, pref_dim=2)
    assert (len(rows), dims, dropped) == (494, ["helpful", "harmless"], 0)
    assert sum(helpful != harmless for helpful, harmless in better(rows)) == 123  # the manifest's count
    assert 0.42 < sum(harmless for _, harmless in better(rows)) / 494 < 0.58
    as_given, _, _ = read_preferences(path, pref_dim=2, seed=None)
    assert sum(harmless for _, harmless in better(as_given)) == 274 + 80  # upstream: the second is safer in 72 %
    for row, given in zip(rows, as_given, strict=True):
        assert row.prompt == given.prompt
        assert row.responses[row.better[0][1]] == given.responses[given.better[0][1]]  # the safer one, swapped or not
        assert [message.role for message in row.prompt] == ["user"]


def test_pku_safer_only(shared):
    path = shared("hh_safe", "pku_safer_only_eval.jsonl")
    rows, dims, dropped = read_preferences(path)
    assert (len(rows), dims, dropped) == (318, ["harmless"], 0)
    with pytest.raises(UserError, match="labels found for harmless, but pref_dim is 2"):
        read_preferences(path, pref_dim=2)


def test_hh_helpful_and_harmless_together(shared):
    paths = [shared("hh_safe", f"hh_{kind}_train.jsonl") for kind in ("harmless", "helpful")]
    rows, dims, dropped = read_preferences(paths, pref_dim=2)
    assert (len(rows), dims, dropped) == (1476 + 1303, ["helpful", "harmless"], 0)      # one ends in an answer
    assert all(helpful == -1 and harmless in (0, 1) for helpful, harmless in better(rows)[:1476])
    assert all(helpful in (0, 1) and harmless == -1 for helpful, harmless in better(rows)[1476:])
    first = json.loads(paths[0].read_text(encoding="utf-8").split("\n", 1)[0])
    text = "".join("\n\n" + {"user": "Human: ", "assistant": "Assistant: "}[role] + x for role, x in rows[0].prompt)
    assert text + "\n\nAssistant:" == first["prompt"]
    assert {" " + x for x in rows[0].responses} == {first["response_0"], first["response_1"]}


@pytest.mark.parametrize("split, count, both, conflict, neither, five", [
    ("train", 3381, 717, 385, 1219, [1502, 1520, 1365, 949, 1377]),
    ("eval", 485, 101, 50, 174, [218, 221, 188, 121, 194]),
])
def test_helpsteer2(shared, split, count, both, conflict, neither, five):
    path = shared("helpsteer2", f"helpsteer2_{split}.jsonl")
    dims = ["helpful", "correctness", "coherence", "complexity", "verbosity", "concise"]
    rows, _, dropped = read_preferences(path, dims)
    labels = better(rows)
    assert (len(rows), dropped) == (count, 0) and not any("<extra_id_1>" in str(row.prompt) for row in rows)
    assert [sum(x[i] != -1 for x in labels) for i in range(5)] == five
    pairs = [(x[0], x[5]) for x in labels]
    assert sum(pair == (-1, -1) for pair in pairs) == neither and sum(-1 not in pair for pair in pairs) == both
    assert sum(sorted(pair) == [0, 1] for pair in pairs) == conflict
    assert all(x[4] + x[5] in (1, -2) for x in labels)       # concise is the lower verbosity
    if split == "eval":
        rows, _, dropped = read_preferences(path, ["helpful", "concise"])
        assert (len(rows), dropped) == (count - neither, neither)


# ---- bad input ----

GOOD = json.dumps(PAIR | dict(better=dict(helpful=0)))


@pytest.mark.parametrize("line, says", [
    (json.dumps(dict(prompt="p", response_0="A", better={})), 'field "response_1" is missing'),
    (json.dumps(PAIR | dict(prompt=3, better={})), 'field "prompt" must be a string, not 3'),
    (json.dumps(PAIR | dict(response_0=None, better={})), 'field "response_0" must be a string, not null'),
    (json.dumps(PAIR), "no field with labels"),
    (json.dumps(dict(prompt="p", response="A")), "one response or none: a preference needs two"),
    (json.dumps(PAIR | dict(better=[0])), 'field "better" must be an object like {"helpful": 0}, not [0]'),
    (json.dumps(PAIR | dict(better=dict(helpful=2))), 'field "better.helpful" must be 0, 1 or null, not 2'),
    (json.dumps(PAIR | dict(better=dict(helpful=True))), 'field "better.helpful" must be 0, 1 or null, not true'),
    (json.dumps(PAIR | dict(better=dict(helpful="0"))), 'field "better.helpful" must be 0, 1 or null, not "0"'),
    (json.dumps(PAIR | dict(higher=7)), 'field "higher" must be an object like {"helpful": 0}, not 7'),
    (json.dumps(PAIR | dict(higher=dict(coherence=-1))), 'field "higher.coherence" must be 0, 1 or null, not -1'),
    (json.dumps(PAIR | dict(higher={}, concise_response_id=1.0)), 'field "concise_response_id" must be 0, 1 or null'),
    (json.dumps(PAIR | dict(better_response_id=[])), 'field "better_response_id" must be 0, 1 or null, not []'),
    (json.dumps(PAIR | dict(safer_response_id=3)), 'field "safer_response_id" must be 0, 1 or null, not 3'),
])
def test_bad_row(tmp_path, line, says, capsys):
    """Alone among few it stops; among many it is left out and counted."""
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")  # the blank line counts: an editor shows it as row 2
    with pytest.raises(UserError) as error:
        read_preferences(path)
    assert str(error.value).startswith(f"{path}, row 3: {says}") and "\n" not in str(error.value)
    path.write_text(f"{line}\n" + 19 * f"{GOOD}\n")
    assert len(read_preferences(path)[0]) == 19
    assert capsys.readouterr().out.startswith(f"{path}: 1 of 20 rows left out: {says}")


def test_bad_file(tmp_path):
    path = tmp_path / "file.jsonl"
    with pytest.raises(UserError, match="file.jsonl: cannot be read .*; check the path"):
        read_preferences(path)
    path.write_text(f"{GOOD}\n" * 50 + "{\n")
    with pytest.raises(UserError, match="file.jsonl, row 51: not JSON"):      # one row or not: the file is broken
        read_preferences(path)
    with pytest.raises(UserError, match="no preference file given"):
        read_preferences([])


@pytest.mark.parametrize("choice, says", [
    (dict(dims=["helpful", "witty"]), "labels found for helpful, harmless, none for witty"),
    (dict(dims=["helpful", "helpful"]), "but dims names helpful, helpful"),
    (dict(dims=[]), "but dims names nothing"),
    (dict(pref_dim=3), "labels found for helpful, harmless, but pref_dim is 3"),
    (dict(pref_dim=0), "but pref_dim is 0"),
])
def test_bad_choice_of_dimensions(tmp_path, choice, says):
    path = jsonl(tmp_path / "own.jsonl", PAIR | dict(better=dict(harmless=0, helpful=1)))
    with pytest.raises(UserError) as error:
        read_preferences(path, **choice)
    assert str(path) in str(error.value) and says in str(error.value)


def test_no_label_at_all(tmp_path):
    path = jsonl(tmp_path / "pku.jsonl", PAIR | dict(better_response_id=None))
    with pytest.raises(UserError, match="labels found for no dimension"):
        read_preferences(path)
