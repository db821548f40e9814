"""test_layouts.py - every layout by hand and in data/README.md, the material's expected rows, and broken rows."""
import json
import re
from pathlib import Path

import pytest

from data import layouts
from data.files import Message, records
from data.layouts import LAYOUTS, read_examples
from data.preferences import read_preferences
from data.prompts import read_prompts
from runs.files import UserError

README = (Path(__file__).parents[2] / "data" / "README.md").read_text(encoding="utf-8")
ASK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"},
       {"role": "user", "content": 'Write "Assistant: yes".'}]
TURNS = tuple(Message(**message) for message in ASK)
ONE = TURNS[-1:]


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(tmp_path, *rows, **more):
    return read_examples(jsonl(tmp_path / "a.jsonl", *rows), **more).examples


def said(content, role="assistant"):
    return {"role": role, "content": content}


HH = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Write \"Assistant: yes\".\n\nAssistant:"
UF = [{"response": text, "annotations": {
    dim: {"Rating": rating, "Rationale": ""} for dim, rating in zip(("helpfulness", "honesty", "truthfulness"), rated)}}
      for text, rated in (("A", ("5", "N/A", "3")), ("B", ("2", "4", "3")), ("C", ("10", "5", "1")))]
PARTS = [said([{"type": "text", "text": text} for text in re.split("(?<=[ s])", x["content"])], x["role"]) for x in ASK]
PARQUET = {"type": "text", "text": "A", "index": None, "image_url": None}            # which has every key in every part
SCORES = dict(helpfulness=1, correctness=2, coherence=4, complexity=1)
ARENA = dict(conversation_a=[*ASK, said("A")], conversation_b=[*ASK, said("B")])
# name of the layout, rows, prompt, {dimension: ratings}; the responses are A and B
BY_HAND = [
    ("this project's", [dict(prompt=ASK, response_0="A", response_1="B", better=dict(warm=1, kind=None))],
     TURNS, dict(warm=(0, 1), kind=(None, None))),
    ("PKU-SafeRLHF", [dict(prompt=ONE[0].content, response_0="A", response_1="B", better_response_id=0,
                           safer_response_id=1)], ONE, dict(helpful=(1, 0), harmless=(0, 1))),
    ("HelpSteer2, pairs", [dict(prompt="Hi\n<extra_id_1>Assistant\nYes?\n<extra_id_1>User\nWrite \"Assistant: yes\".",
                                response_0="A", response_1="B", higher=dict(helpfulness=0, verbosity=1),
                                concise_response_id=0, better_response_id=0)],
     TURNS, dict(helpful=(1, 0), verbosity=(0, 1), concise=(1, 0))),
    ("two whole dialogues", [dict(chosen=HH + " A", rejected=HH + " B")], TURNS, {"*": (1, 0)}),
    ("two whole dialogues", [dict(chosen=[*ASK, said("A")], rejected=[*ASK, said("B")])], TURNS, {"*": (1, 0)}),
    ("chosen and rejected", [dict(prompt=HH, chosen=" A", rejected=" B")], TURNS, {"*": (1, 0)}),
    ("chosen and rejected", [dict(prompt=ASK, chosen=[said("A")], rejected=[said("B")])], TURNS, {"*": (1, 0)}),
    ("chosen and rejected", [dict(prompt=ONE[0].content, chosen=[*ASK, said("A")], rejected=[*ASK, said("B")],
                                  messages=[*ASK, said("A")], score_chosen=1.0)], TURNS, {"*": (1, 0)}),
    ("messages, chosen and rejected", [dict(messages=ASK, chosen="A", rejected="B")], TURNS, {"*": (1, 0)}),
    ("UltraFeedback", [dict(instruction=ONE[0].content, completions=UF[:2])],
     ONE, dict(helpfulness=(5, 2), honesty=(None, 4), truthfulness=(3, 3))),
    ("HelpSteer2", [dict(prompt="Hi", response="A", **SCORES | dict(helpfulness=4, complexity=2.5), verbosity=2),
                    dict(prompt="Hi", response="B", **SCORES)], TURNS[:1],
     dict(helpfulness=(4, 1), correctness=(2, 2), coherence=(4, 4), complexity=(2.5, 1), verbosity=(2, None))),
    ("HelpSteer2, preferences", [dict(prompt="Hi", response_1="A", response_2="B", preference_strength=-2)],
     TURNS[:1], {"*": (2, 0)}),
    ("HelpSteer3", [dict(context=ASK, response1="A", response2="B", overall_preference=1)], TURNS, {"*": (-1, 0)}),
    ("SHP", [dict(history="Hi", human_ref_A="A", human_ref_B="B", labels=1)], TURNS[:1], {"*": (1, 0)}),
    ("SHP", [dict(history="Hi", human_ref_A="A", human_ref_B="B", labels=0)], TURNS[:1], {"*": (0, 1)}),
    ("Chatbot Arena", [dict(winner="model_b", **ARENA)], TURNS, {"*": (0, 1)}),
    ("Chatbot Arena", [dict(winner="tie", **ARENA)], TURNS, {"*": (0, 0)}),
    ("OpenAI", [dict(input=dict(messages=ASK), preferred_output=[said("A")], non_preferred_output=[said("B")])],
     TURNS, {"*": (1, 0)}),
    ("OpenAI", [dict(input=dict(messages=PARTS, tools=[]), preferred_output=[said([PARQUET]) | dict(tool_calls=None)],
                     non_preferred_output=[said("B") | dict(tool_calls=[])])], TURNS, {"*": (1, 0)}),
    ("ShareGPT", [dict(system="Be kind.", conversations=[{"from": "human", "value": "Hi"}],
                       chosen={"from": "gpt", "value": "A"}, rejected={"from": "gpt", "value": "B"})],
     (Message("system", "Be kind."), *TURNS[:1]), {"*": (1, 0)}),
    ("Alpaca", [dict(instruction="Write", input='"Assistant: yes".', history=[["Hi", "Yes?"]], chosen="A",
                     rejected="B")], (*TURNS[:2], Message("user", 'Write\n"Assistant: yes".')), {"*": (1, 0)}),
    ("pairs without labels", [dict(prompt="Hi", response_0="A", response_1="B")], TURNS[:1], None),
]


@pytest.mark.parametrize("name, rows, prompt, ratings", BY_HAND, ids=[f"{i}-{x[0]}" for i, x in enumerate(BY_HAND)])
def test_layouts_by_hand(tmp_path, name, rows, prompt, ratings):
    (example,) = read(tmp_path, *rows)
    assert (example.layout, example.prompt, example.responses, example.ratings) == (name, prompt, ["A", "B"], ratings)


def test_the_higher_rating_is_better_and_ties_are_no_labels(tmp_path):
    (example,) = read(tmp_path, dict(instruction="Hi", completions=UF))
    assert dict(example.compared()) == {(0, 1): dict(helpfulness=0),                 # no honesty: "N/A" is not 0
                                        (0, 2): dict(helpfulness=1, truthfulness=0),   # texts would say "10" < "5"
                                        (1, 2): dict(helpfulness=1, honesty=1, truthfulness=0)}
    rows, dims, dropped = read_preferences(tmp_path / "a.jsonl", ["honesty", "truthfulness"], seed=None)
    assert [(row.pairs, row.better) for row in rows] == [([(0, 2), (1, 2)], [[-1, 0], [1, 0]])] and dropped == 0
    turned = [read_preferences(tmp_path / "a.jsonl", ["honesty", "truthfulness"], seed=i)[0][0] for i in range(9)]
    assert {"".join(row.responses) for row in turned} == {"ABC", "CBA"}
    for row in turned:                                               # whoever stands first, the same ones are better
        assert {(row.responses[pair[label]], row.responses[pair[1 - label]], i) for pair, labels in
                zip(row.pairs, row.better) for i, label in enumerate(labels) if label >= 0} == {
                    ("C", "B", 0), ("A", "C", 1), ("B", "C", 1)}


def test_one_row_a_response_meets_its_neighbours_alone(tmp_path):
    row = lambda prompt, text, n: dict(prompt=prompt, response=text, helpfulness=n)
    rows = [row("x", "A", 1), row("x", "B", 2), row("y", "C", 3), *[row("z", str(i), i) for i in range(3)],
            row("x", "D", 4)]
    assert [(x.responses, x.ratings["helpfulness"]) for x in read(tmp_path, *rows)] == [
        (["A", "B"], (1, 2)), (["C"], (3,)), (["0", "1", "2"], (0, 1, 2)), (["D"], (4,))]


def test_the_material(shared):
    """Every file of the material beside the repository, as expected.json says."""
    expected = json.loads(shared("formats", "expected.json").read_text(encoding="utf-8"))
    assert len(expected) == 18
    for name, file in expected.items():
        found = read_examples(shared("formats", name)).examples
        assert [{"messages": [message._asdict() for message in x.prompt], "responses": x.responses, "better": labels}
                for x in found for _, labels in x.compared()] == file["rows"], name
        assert file["dimension_named_by_the_command"] == all("*" in x.ratings for x in found)


# ---- prompts ----

@pytest.mark.parametrize("text, prompt", [
    ("hi", (Message("user", "hi"),)), ("", (Message("user", ""),)),
    (HH, TURNS), (HH.replace("Human: Hi", "Human:  Hi\n"), (Message("user", " Hi\n"), *TURNS[1:])),      # one space
    (HH.replace("Human: Hi", "Human: Hi\n\nHuman:  ho"), (Message("user", "Hi\n\nHuman:  ho"), *TURNS[1:])),
    ("Say: Assistant: x", (Message("user", "Say: Assistant: x"),)),
    ("\n\nHuman: hi", (Message("user", "\n\nHuman: hi"),)),
    ("Human: hi\n\nAssistant:", "Human: hi\n\nAssistant:"), ("[INST] hi [/INST]", "[INST] hi [/INST]"),
    ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",) * 2])
def test_strings_as_prompts(tmp_path, text, prompt):
    (example,) = read(tmp_path, dict(prompt=text, response="  A"))
    assert example.prompt == prompt
    assert example.responses == ["  A" if isinstance(prompt, str) else " A"]


def test_dialogues_share_all_up_to_their_last_answer(tmp_path):
    """Not up to the first "Assistant:", nor to the last that one of them has."""
    for answers in ((" Assistant: yes", " No."), (" The same beginning.", " The same end."), (" A", " A B")):
        (example,) = read(tmp_path, dict(chosen=HH + answers[0], rejected=HH + answers[1]))
        assert example.prompt == TURNS and example.responses == [x[1:] for x in answers]
    more = "\n\nHuman: Go on.\n\nAssistant: B"
    for a, b in ((HH + " A\n\nAssistant: more", HH + " B"), (HH + " A" + more, HH + " A"), ([], []),
                 (HH + " A" + more, HH + " C" + more), ("\n\nHuman: x" + HH, HH),
                 ([*ASK, said("A"), *ASK], [*ASK, said("B"), *ASK]), ([*ASK, said("A")], [ASK[0], said("A")])):
        with pytest.raises(UserError, match='row 1: "chosen" and "rejected" part before their last answers'):
            read(tmp_path, dict(chosen=a, rejected=b))


# ---- names ----

def test_the_command_names_what_the_file_does_not(tmp_path):
    a, b = (jsonl(tmp_path / f"{x}.jsonl", dict(prompt="p" + x, chosen="A", rejected="B")) for x in "ab")
    rows, dims, _ = read_preferences([f"kind={b}", f"helpful={a}"], seed=None)
    assert dims == ["helpful", "kind"] and [row.better for row in rows] == [[[-1, 0]], [[0, -1]]]
    with pytest.raises(UserError, match=f"^{a}: its label has no name; give .* helpful={a}$"):
        read_preferences([f"kind={b}", a])
    own = jsonl(tmp_path / "own.jsonl", dict(prompt="p", response_0="A", response_1="B", better=dict(warm=0)))
    with pytest.raises(UserError, match="own.jsonl names its dimensions itself, warm: give it without helpful="):
        read_preferences(f"helpful={own}")
    assert len(read_prompts([f"x={a}", b])[0]) == 2                           # of no use here, and no harm


@pytest.mark.parametrize("name", ["a\\b", "\\ud800", "a/b", "", " ", "a\nb", "a=b"])
def test_names_that_are_none(tmp_path, name):
    path = jsonl(tmp_path / "a.jsonl", dict(prompt="p", response_0="A", response_1="B", better={"x": 0}))
    path.write_text(path.read_text().replace('"x"', json.dumps(name).replace("\\\\ud800", "\\ud800")))
    with pytest.raises(UserError, match="cannot be the name of a dimension") as error:
        read_preferences(path)
    str(error.value).encode()
    assert "\n" not in str(error.value)


def test_fields_of_other_names(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", dict(question="hi", a="A", b="B", label=1, prompt="no", note=None),
                 dict(question="ho", a="C", b="D", label=None, prompt="no", note=0))
    fields = ["prompt=question", "response_0=a", "response_1=b", "helpful=label", "warm=note"]
    rows, dims, _ = read_preferences(path, seed=None, fields=fields)
    assert dims == ["helpful", "warm"] and [(row.prompt[0].content, row.responses, row.better) for row in rows] == [
        ("hi", ["A", "B"], [[1, -1]]), ("ho", ["C", "D"], [[-1, 0]])]
    rows, dims, _ = read_preferences(f"kind={path}", seed=None, fields=["prompt=question", "chosen=b", "rejected=a"])
    assert dims == ["kind"] and rows[0].responses == ["B", "A"] and rows[0].better == [[0]]
    with pytest.raises(UserError, match='row 1: field "nothing" is missing'):
        read_preferences(path, fields=["prompt=nothing"])
    for wrong in (["prompt"], ["=a"], ["prompt="], ["prompt=a", "prompt=b"]):
        with pytest.raises(UserError, match="^--fields .*give OURS=THEIRS"):
            read_preferences(path, fields=wrong)


# ---- broken rows ----

GOOD = dict(prompt="p", response_0="A", response_1="B", better=dict(helpful=0))


def test_broken_rows_are_counted_by_cause(tmp_path, capsys):
    path = jsonl(tmp_path / "a.jsonl", *[GOOD] * 30, GOOD | dict(response_1=" \n"), *[GOOD] * 30,
                 GOOD | dict(response_0=3), GOOD | dict(response_0=""), *[GOOD] * 30)
    file = read_examples(path)
    assert (len(file.examples), file.rows) == (90, 93)
    assert file.left_out == {"an empty response": 2, 'field "response_0" must be a string': 1}
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: 2 of 93 rows left out: an empty response (first: row 31)",
        f'{path}: 1 of 93 rows left out: field "response_0" must be a string, not 3 (first: row 62)']
    assert len(read_preferences(path)[0]) == 90


@pytest.mark.parametrize("good, stops", [(19, False), (18, True)])
def test_more_than_a_twentieth_stops(tmp_path, good, stops):
    path = jsonl(tmp_path / "a.jsonl", *[GOOD] * good, GOOD | dict(response_1=""))
    if not stops:
        assert len(read_examples(path).examples) == good
    else:
        with pytest.raises(UserError, match=r"row 19: an empty response \(1 of 19 rows are broken: too many\)$"):
            read_examples(path)


def test_the_arena_s_conversations_may_part(tmp_path, capsys):
    two = [said("Go on", "user"), said("C")]
    row = dict(winner="model_a", **ARENA)
    parted = row | {name: conversation + two for name, conversation in ARENA.items()}
    assert len(read(tmp_path, row, parted)) == 1 and "1 of 2 rows left out" in capsys.readouterr().out


CALL = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}]
PART = {"type": "image_url", "image_url": {"url": "https://x"}}


@pytest.mark.parametrize("turns, says", [
    ([said("x", "user"), said(None) | dict(tool_calls=CALL), said("4", "tool"), said("y", "user")], "a tool's turn"),
    ([said("x", "user"), said("Wait") | dict(tool_calls=CALL), said("y", "user")], "a tool's turn"),
    ([said("x", "user"), said(None) | dict(function_call=CALL[0]["function"]), said("y", "user")], "a tool's turn"),
    ([{"from": "human", "value": "x"}, {"from": "observation", "value": "4"}], "a tool's turn"),
    ([said([{"type": "text", "text": "What is this?"}, PART], "user")], "a part must be a text, not {\"type\": "),
    ([said([{"type": "image", "text": None}], "user")], "a part must be a text"),
    ([said(["What is this?"], "user")], "a part must be a text"), ([said([{"type": "text"}], "user")], "a part must")])
def test_images_and_tools_are_left_out_and_do_not_count(tmp_path, capsys, turns, says):
    """Wrong: a call dropped and the rest read; a file with some of them refused; one of nothing else read as empty."""
    rows = [dict(prompt=ASK, chosen="A", rejected="B"), dict(prompt=turns, chosen="A", rejected="B")]
    assert len(read(tmp_path, *rows, rows[1])) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert "2 of 3 rows left out: field " in line and says in line and line.endswith("(first: row 2)")
    if "tool" in says:                                                                # nor may an answer be a call
        answer = dict(prompt=ASK, chosen=[turns[1]], rejected=[said("B")])
        assert len(read(tmp_path, answer, rows[0])) == 1
    with pytest.raises(UserError, match=r"row 1: field .*\(1 of 1 rows are broken: too many\)$"):
        read(tmp_path, rows[1])


@pytest.mark.parametrize("row, says", [
    ({"question": "x", "good": "A"}, 'its fields are of no known layout; name them with --fields (data/README.md), not '
                                     '["question", "good"]'),
    (dict(prompt=[], response="A"), "the last turn of the prompt is not the user's"),
    (dict(prompt=ASK[:2], response="A"), "the last turn of the prompt is not the user's"),
    (dict(prompt=[said("x", "critic")]), 'field "prompt": a role must be system, user or assistant, not "critic"'),
    (dict(prompt=[said("x", ["user"])]), 'field "prompt": a role must be system, user or assistant, not ["user"]'),
    (dict(prompt=["x"]), 'field "prompt": a message must be an object, not "x"'),
    (dict(prompt=[said(None, "user")]), 'field "content" must be a string, not null'),
    (dict(prompt="x", chosen=[said("A"), said("B")], rejected="C"), 'field "rejected" must be a list, not "C"'),
    (dict(prompt="x", chosen="A"), 'field "rejected" is missing'),
    (dict(chosen="A", rejected=3), 'field "chosen" must be a list, not "A"'),
    (dict(prompt="x", chosen="A", rejected=[]), 'field "rejected" must be a string, not []'),
    (dict(instruction="x", completions="A"), 'field "completions" must be a list, not "A"'),
    (dict(instruction="x", completions=["A"]), 'field "annotations" is missing'),
    (dict(instruction="x", completions=[dict(response="A", annotations=dict(kind={"Rating": "good"}))]),
     'field "Rating" must be a number, not "good"'),
    (dict(prompt="x", response="A", helpfulness=True), 'field "helpfulness" must be a number, not true'),
    (dict(context=ASK, response1="A", response2="B", overall_preference="left"),
     'field "overall_preference" must be a number, not "left"'),
    (dict(history="x", human_ref_A="A", human_ref_B="B", labels=2), 'field "labels" must be 0, 1 or null, not 2'),
    (dict(winner="me", conversation_a=ASK, conversation_b=ASK), 'field "winner" must be model_a, model_b, tie'),
    (dict(winner=["model_a"], conversation_a=ASK, conversation_b=ASK), 'field "winner" must be a string'),
    (dict(instruction="x", history=3, output="A"), 'field "history" must be a list, not 3'),
    (dict(instruction="x", history=["Hi"], output="A"), 'field "history" must be a list of [question, answer]'),
    (dict(input="x", preferred_output=[], non_preferred_output=[]), 'field "input" must be an object, not "x"'),
    (dict(conversations=[{"from": "human", "value": "x"}], chosen={"from": "me"}, rejected="B"),
     'field "chosen": a role must be'),
])
def test_what_is_wrong_with_a_row(tmp_path, row, says):
    with pytest.raises(UserError) as error:
        read(tmp_path, row)
    assert f"a.jsonl, row 1: {says}" in str(error.value)
    assert "\n" not in str(error.value) and "(1 of 1 rows are broken: too many)" in str(error.value)


# ---- one line a layout ----

def test_a_layout_is_one_line_of_a_table(tmp_path, monkeypatch):
    new = ("new", "question good", lambda row: (row["question"], [row["good"], row["bad"]], {"helpful": (1, 0)}))
    monkeypatch.setattr(layouts, "LAYOUTS", (new, *LAYOUTS))
    path = jsonl(tmp_path / "a.jsonl", dict(question="hi", good="A", bad="B"), GOOD)
    rows, dims, _ = read_preferences(path, seed=None)
    assert dims == ["helpful"] and [(row.prompt, row.responses) for row in rows] == [
        ("hi", ["A", "B"]), ((Message("user", "p"),), ["A", "B"])]
    assert [row.prompt for row in read_prompts(path)[0]] == [row.prompt for row in rows]        # all readers know it


def test_the_readme_has_every_layout(tmp_path):
    """Each heading is a layout's name, and the rows under it are read as that layout."""
    shown = re.findall(r"^### (.*?)\n(.*?)^```json\n(.*?)^```", README, re.M | re.S)
    assert sorted(name for name, _, _ in shown) == sorted(name for name, _, _ in LAYOUTS) and len(shown) == len(LAYOUTS)
    for name, text, block in shown:
        assert "###" not in text
        (tmp_path / "a.jsonl").write_text(block, encoding="utf-8")
        found = read_examples(tmp_path / "a.jsonl").examples
        assert found and {x.layout for x in found} == {name}
        assert len(list(records(tmp_path / "a.jsonl"))) == len(block.splitlines())
