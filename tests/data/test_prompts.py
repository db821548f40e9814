"""test_prompts.py - prompts cut from stories, those of JSONL rows, the split; and what else reads such files."""
import json
from types import SimpleNamespace

import pytest
import torch

from data import toy
from data.files import Message, Row
from data.prompts import read_demonstrations, read_prompts, split, written
from data.tokenizers import load_tokenizer
from runs.files import UserError


def write(path, text):
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_stories_are_cut_after_their_first_words(tmp_path):
    path = write(tmp_path / "stories.txt", "One  two three four.\n\nFive six.\nThe cat  sat on\n \nthe mat. \n"
                                           "Too short a.\n\tA,\nb c d\n")
    rows, dropped = read_prompts(path, prompt_words=2)
    assert rows == [Row("One  two", [" three four.\n\nFive six."]),
                    Row("The cat", ["  sat on\n \nthe mat."])]   # a line of one space is a blank line
    assert dropped == {"short": 3, "duplicate": 0}                       # "Too short a.", "A," and "b c d"
    rows, dropped = read_prompts([str(path)], prompt_words=3)            # 6 words each: just enough
    assert [row.prompt for row in rows] == ["One  two three", "The cat  sat"] and dropped["short"] == 3
    write(path, "one two\r\n\r\nthree four\r\nfive six seven\r\n")     # line ends of another system
    assert read_prompts(path, prompt_words=1)[0] == [Row("one", [" two\n\nthree four"]),
                                                     Row("five", [" six seven"])]


def test_prompts_of_rows_take_the_form_of_preference_files(tmp_path):
    lines = [dict(prompt="hi"), dict(prompt="ho", response="A"), dict(prompt="Human: x\n\nAssistant:", response="B"),
             dict(messages=[dict(role="user", content="he"), dict(role="assistant", content="C")]),
             dict(prompt="ha", chosen="A", rejected="B")]                # of two, none is the prompt's own
    path = write(tmp_path / "p.jsonl", "".join(json.dumps(line) + "\n\n" for line in lines))
    ask = lambda text: (Message("user", text),)
    rows, dropped = read_prompts(path)
    assert rows == [Row(ask("hi")), Row(ask("ho"), ["A"]), Row("Human: x\n\nAssistant:", ["B"]), Row(ask("he"), ["C"]),
                    Row(ask("ha"))] and dropped == {"short": 0, "duplicate": 0}


def test_equal_prompts_are_kept_once(tmp_path):
    stories = write(tmp_path / "s.txt", "A cat sat down.\nA cat ran off.\nA dog ran off.\n")
    rows, dropped = read_prompts(stories, prompt_words=2)
    assert [(row.prompt, row.responses) for row in rows] == [("A cat", [" sat down."]), ("A dog", [" ran off."])]
    assert dropped == {"short": 0, "duplicate": 1}
    rows, dropped = read_prompts([stories, stories], prompt_words=2)     # across files too
    assert len(rows) == 2 and dropped == {"short": 0, "duplicate": 4}


@pytest.mark.parametrize("name, text, message", [
    ("p.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', r'p.jsonl, row 2: field "prompt" must be a string, not 3'),
    ("p.jsonl", '{"prompt": "a"}\n\n{"response": "x"}\n', r"p.jsonl, row 3: its fields are of no known layout"),
    ("p.jsonl", '{"prompt": "a", "response": ["b"]}\n', r'p.jsonl, row 1: field "response" must be a string'),
    ("p.jsonl", '{"prompt": "a"}\n{"prompt"', r"p.jsonl, row 2: not JSON"),
    ("p.jsonl", "\n", r"p.jsonl: the file is empty"),
    ("s.txt", "too short\n", r"s.txt: no story in it has 4 words"),
    ("s.txt", b"\xff\xfe", r"s.txt: not UTF-8 text"),
    ("s.csv", "a", r"s.csv, row 1: not JSON"),
])
def test_bad_files_name_file_row_and_field(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / name, prompt_words=2)


def test_what_else_cannot_be_read(tmp_path):
    path = write(tmp_path / "s.txt", "a b c d\n")
    for arguments, message in [((path,), "give the number of words"), ((path, 0), "give the number of words"),
                               ((tmp_path / "none.txt", 2), "none.txt: cannot be read"), (([], 2), "no prompt file")]:
        with pytest.raises(UserError, match=message):
            read_prompts(*arguments)


def test_split_is_by_the_prompt_alone():
    rows = [Row(f"prompt {i}") for i in range(2000)]
    train, held_out = split(rows)
    assert len(train) + len(held_out) == 2000 and not {r.prompt for r in train} & {r.prompt for r in held_out}
    assert abs(len(held_out) - 200) < 5 * (2000 * 0.1 * 0.9) ** 0.5      # binomial
    assert [r.prompt for r in held_out[:3]] == ["prompt 14", "prompt 15", "prompt 19"]    # wrong: hash(), shuffles
    assert split(rows[::-1])[1] == held_out[::-1]
    assert split(rows[500:600])[1] == [row for row in held_out if row in rows[500:600]]
    assert [] in split([Row("prompt 0", ["a"]), Row("prompt 0", ["b"])])     # together, whatever their responses
    turns = [Row((Message("system", "s"), Message("user", f"prompt {i}"))) for i in range(40)]
    assert [turns.index(r) for r in split(turns)[1]] == [3, 7, 13, 25, 29]   # wrong: repr(), the last turn alone


@pytest.mark.parametrize("prompt_words", [4, 12])
def test_real_stories_round_trip(shared, prompt_words):
    path = shared("text", "tinystories_sample.txt")
    text = path.read_text(encoding="utf-8")
    rows, dropped = read_prompts(path, prompt_words)
    assert len({row.prompt for row in rows}) == len(rows) > 300 and dropped["duplicate"] > 0
    for row in rows:
        assert row.prompt + row.responses[0] in text                     # wrong: words joined by single spaces
        assert len(row.prompt.split()) == prompt_words <= len(row.responses[0].split())
        assert row.prompt == row.prompt.strip() and row.responses[0][0].isspace() and row.responses[0][-1:].strip()


def test_demonstrations_are_one_file_per_dimension(tmp_path):
    put = lambda name, rows: (tmp_path / name).write_text("\n".join(map(json.dumps, rows)) + "\n")
    put("short.jsonl", [{"prompt": "Hi?", "response": "Yes."}, {"prompt": "Who?", "response": "Me."}])
    put("long.jsonl", [{"prompt": "Hi?", "response": "Good day to you."}, {"prompt": "Hi?", "response": "Well met."}])
    rows, kinds = read_demonstrations([tmp_path / "short.jsonl", tmp_path / "long.jsonl"])
    assert [row.responses for row in rows] == [["Yes.", "Good day to you.", "Well met."], ["Me."]]
    assert kinds == [[0, 1, 1], [0]] and rows[0].prompt == (Message("user", "Hi?"),)
    put("talk.jsonl", [{"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yo."}]}])
    assert read_demonstrations(["a=" + str(tmp_path / "talk.jsonl")])[0] == [Row(rows[0].prompt, ["Yo."])]
    put("bad.jsonl", [{"prompt": "Hi?", "response": "Yes."}, {"prompt": "Who?"}])
    with pytest.raises(UserError, match="bad.jsonl, row 2: 0 responses: a demonstration has one"):
        read_demonstrations([tmp_path / "bad.jsonl"])
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="empty.jsonl: the file is empty"):
        read_demonstrations([tmp_path / "empty.jsonl"])


# ---- a preference as a text ----

def test_preferences_are_written_with_two_decimals():
    tokenizer = load_tokenizer("toy")
    ids = written(torch.tensor([[0.3, 0.7], [1.0, 0.0], [0.996, 0.004]]), tokenizer)
    assert [tokenizer.decode(x) for x in ids.tolist()] == [
        "0.30 0.70\n", *["1.00 0.00\n"] * 2]
    assert ids.dtype == torch.int64 and not torch.equal(ids[0], ids[1])


@pytest.mark.parametrize("m", [2, 3, len(toy.DIMS)])
def test_all_preferences_have_equally_many_tokens(m):
    lams = torch.zeros(101, m)
    lams[:, 0] = torch.arange(101) / 100
    lams[:, -1] = 1 - lams[:, 0]
    assert len(written(lams, load_tokenizer("toy")).unique(dim=0)) == 101


def test_a_tokenizer_of_other_lengths_is_refused():
    uneven = SimpleNamespace(name="uneven", encode=lambda text: list(range(text.count("0"))))
    with pytest.raises(UserError, match="^tokenizer uneven: --method prompt needs"):
        written(torch.tensor([[0.25, 0.75], [1.0, 0.0]]), uneven)
