"""test_data_check.py - what data.check says of a file, its example in data/README.md, and --json on the material."""
import json
import re
import sys
from pathlib import Path

import pytest

from data import check
from data.layouts import read_examples
from runs.files import UserError
from runs.flags import cli, run_main

README = (Path(__file__).parents[2] / "data" / "README.md").read_text(encoding="utf-8")
ROWS = [("How do I paint a door?", "Sand it first.", "No.", dict(helpful=0, harmless=1)),
        ("How do I paint a door?", "No.", "Sand it first.", dict(helpful=1, harmless=0)),        # the first again
        ("How do I open a lock?", "Rake it, my friend, and turn.", "Call a locksmith.", dict(helpful=0, harmless=1)),
        ("How do I boil an egg?", "In water.", "Seven minutes.", dict(helpful=1, harmless=None)),
        ("How do I boil an egg?", "In water.", "No.", dict(helpful=0, harmless=0))]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def run(capsys, *argv):
    check.main(cli(check.Flags, "", argv))
    return capsys.readouterr().out


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [dict(prompt=x, response_0=a, response_1=b, better=better) for x, a, b, better in ROWS * 5]
    write(tmp_path / "train.jsonl", rows[:12] + [rows[0] | dict(response_1="")] + rows[12:])
    write(tmp_path / "eval.jsonl", [rows[3], rows[0] | dict(prompt="How do I knit?")])


def test_a_file_by_hand(files, capsys):
    said = run(capsys, "train.jsonl", "--eval_data", "eval.jsonl", "--max_length", "24")
    for line in ("train.jsonl: 1 of 26 rows left out: an empty response (first: row 13)",
                 "train.jsonl: training, 26 rows, 1 left out; read as this project's (25)",
                 "  helpful: 25 labels; the second response is better in 40.0%",
                 "  harmless: 20 labels; the second response is better in 50.0%",
                 "  helpful and harmless: 20 pairs have both labels; 75.0% of them conflict",
                 "  21 rows are there a second time; 3 different prompts",                 # whoever stands first
                 "evaluation: 1 of its 2 prompts are among the training's",
                 "train.jsonl, row 14, as the model reads it; the better response is, for helpful: 0, harmless: 1"):
        assert line in said.splitlines(), (line, said)
    assert re.search(r"--max_length 24: \d+ of 25 prompts and \d+ of 50 responses are cut", said)
    assert '  0: " Sand it first.<|endoftext|>"' in said and said.count("as the model reads it") == 3
    assert "harmless" not in run(capsys, "train.jsonl", "--dims", "helpful").partition("as the model")[0]
    with pytest.raises(UserError, match="--dims: no labels for kind; found are helpful, harmless"):
        run(capsys, "train.jsonl", "--dims", "kind")


def test_the_readme_s_example(files, capsys):
    shown = README.split("## What data.check says")[1]
    command, said = re.search(r"\$ python -m data.check (.*?)\n(.*?)```", shown, re.S).groups()
    assert run(capsys, *command.split()) == said


def test_lines_of_json(files, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["check.py", "train.jsonl", "--json"])
    run_main(check.main, check.Flags, "")
    out, err = capsys.readouterr()
    assert "1 of 26 rows left out" in err                                    # not among the lines
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == 25 and lines[3] == dict(
        messages=[dict(role="user", content="How do I boil an egg?")], responses=["In water.", "Seven minutes."],
        better=dict(helpful=1))
    said = [dict(response=x, annotations=dict(kind=dict(Rating=n))) for x, n in (("A", "1"), ("B", "1"), ("C", "2"))]
    write(Path("uf.jsonl"), [dict(instruction="Human: x\n\nAssistant:", completions=said)])
    assert [json.loads(line) for line in run(capsys, "uf.jsonl", "--json").splitlines()] == [
        dict(prompt="Human: x\n\nAssistant:", responses=[x, "C"], better=dict(kind=1)) for x in "AB"]


def test_json_of_the_material(shared, capsys):
    expected = json.loads(shared("formats", "expected.json").read_text(encoding="utf-8"))
    for name, file in expected.items():
        lines = run(capsys, str(shared("formats", name)), "--json").splitlines()
        assert list(map(json.loads, lines)) == file["rows"], name
        said = run(capsys, str(shared("formats", name)))
        assert f"{len(file['rows'])} labels" in said
        assert ("helpful=FILE" in said) == file["dimension_named_by_the_command"]


def test_long_texts_are_shortened(tmp_path, capsys):
    file = write(tmp_path / "a.jsonl", [dict(prompt="x" * 3000, chosen="y" * 900, rejected="z")])
    said = run(capsys, f"kind={file}", "--max_length", "9999")
    (example,) = read_examples(file).examples
    assert "xxx [… " in said and "yyy [… " in said and "the better response is, for kind: 0" in said
    assert len(said) < 3000 < len(example.prompt[0].content) + 1
