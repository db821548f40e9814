"""test_offline.py - (prompt, response) pairs from files and from the embedded world, and what bad files say."""
import json

import numpy as np
import pytest
import torch

from data import toy
from data.offline import draw_world, read_offline
from runs.files import UserError


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_pairs_of_several_layouts(tmp_path):
    file = write(tmp_path / "a.jsonl", [
        {"prompt": "How?", "response": "So."}, {"prompt": "How?", "response": "Not so."},            # one prompt twice
        {"prompt": "How?", "response": "So.", "source": "again"},
        {"prompt": "Why?", "response_0": "Because.", "response_1": "So."},                            # no label needed
        {"prompt": "\n\nHuman: Who?\n\nAssistant:", "response_0": " I.", "response_1": " You.", "better": {"warm": 1}},
        {"chosen": "\n\nHuman: Who?\n\nAssistant: We.", "rejected": "\n\nHuman: Who?\n\nAssistant: I."}])
    rows, dropped = read_offline([file])
    assert [(row.prompt[0].content, *row.responses) for row in rows] == [
        ("How?", "So."), ("How?", "Not so."), ("Why?", "Because."), ("Why?", "So."), ("Who?", "I."), ("Who?", "You."),
        ("Who?", "We.")]
    assert dropped == {"short": 0, "duplicate": 2}                       # wrong: by the prompt alone, as for rollouts


def test_stories_are_cut_into_pairs(tmp_path):
    (tmp_path / "s.txt").write_text("One two three four.\nToo short.\nFive six seven eight nine.\nOne two three four.")
    rows, dropped = read_offline([tmp_path / "s.txt"], prompt_words=2)
    assert [(row.prompt, *row.responses) for row in rows] == [("One two", " three four."),
                                                              ("Five six", " seven eight nine.")]
    assert dropped == {"short": 1, "duplicate": 1}


@pytest.mark.parametrize("name, text, message", [
    ("a.jsonl", '{"prompt": "x"}', "a.jsonl, row 1: no response"), ("a.jsonl", "\n", "a.jsonl: the file is empty"),
    ("a.txt", "short", "a.txt: no story in it has 24 words")])
def test_files_that_hold_no_pairs(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_offline([tmp_path / name], 12)


def test_the_world_s_offline_set_is_what_its_base_was_trained_on():
    prompts = toy.prompts("train")
    rows, dropped = draw_world(25 * len(prompts), torch.Generator().manual_seed(0))
    assert len(rows) + dropped["duplicate"] == 25 * len(prompts)
    assert dropped["duplicate"] > 200
    pairs = {(row.prompt, row.responses[0]) for row in rows}
    assert len(pairs) == len(rows) and {x for x, _ in pairs} == {x + "\n" for x in prompts}
    # how often a pair is among the distinct ones: 1 − (1 − p)^25, because each prompt came 25 times
    probs = [dict(zip(toy.responses(x), toy.base_probs(x).tolist())) for x in prompts]
    harmless = [i for i in range(len(prompts)) if list(probs[i].values()) == list(probs[0].values())]
    for least in (0.005, 0.02):
        expected = sum(1 - (1 - p) ** 25 for p in probs[0].values() if p > least)
        found = np.mean([sum((prompts[i] + "\n", y) in pairs for y, p in probs[i].items() if p > least)
                         for i in harmless])
        assert abs(found - expected) < 0.1 * expected                    # wrong: uniform over the listed responses
    assert draw_world(4000, torch.Generator().manual_seed(0))[0] == rows
    assert draw_world(4000, torch.Generator().manual_seed(1))[0] != rows
