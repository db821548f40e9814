"""offline.py - offline sets: (prompt, response) pairs that somebody said once, for methods that select among them.

JSONL files with rows of two schemas, told apart row by row by their keys:
  `prompt`, `response`                    one pair (data.prompts)
  `prompt`, `response_0`, `response_1`    a row of a preference file: both responses count, and labels do not
and .txt files of stories, each cut into its first words and the rest. A prompt may come with many responses; what does
not come twice is the pair of both. The embedded world's set is drawn from what its base model was trained on.
"""
from pathlib import Path

import torch

from runs.files import UserError
from data import toy
from data.preferences import Row, _as_dialogue, _json_object, _need_texts
from data.prompts import _cut, _read_text, _stories


def read_offline(paths, prompt_words=None):
    """paths: .jsonl and .txt files -> (rows, dropped): a Row(prompt, [response]) for each pair, in order, in HH-RLHF's
    form as everywhere (data.preferences).

    prompt_words: a story's words that are its prompt (.txt only). dropped: {"short": stories of fewer than
    2 · prompt_words words, "empty": pairs with nothing but white space as response, "duplicate": pairs that were there
    before}. Raises UserError for a file, row or field that is not so.
    """
    pairs, short = [], 0
    for path in map(Path, paths):
        text = _read_text(path)
        if path.suffix == ".jsonl":
            found = [pair for number, line in enumerate(text.split("\n"), start=1) if line.strip()
                     for pair in _read_row(line, f"{path}, row {number}")]
        elif path.suffix == ".txt":
            stories = _stories(text)
            long = [_cut(story, prompt_words) for story in stories if len(story.split()) >= 2 * prompt_words]
            found, short = [(row.prompt, row.responses[0]) for row in long], short + len(stories) - len(long)
        else:
            raise UserError(f"{path}: give .jsonl files with prompt and response, or a .txt file of stories")
        if not found:
            raise UserError(f"{path}: there is no pair of prompt and response in it")
        pairs += found
    rows, dropped = distinct(pairs)
    return rows, {"short": short} | dropped


def draw_world(n, generator):
    """n pairs of the embedded world, train prompts in turn, responses drawn from toy.base_probs -> (rows, dropped)."""
    prompts = toy.prompts("train")
    probs = torch.stack([toy.base_probs(x) for x in prompts])                                          # (X, S)
    order = list(toy.in_turn(range(len(prompts)), n, generator))
    drawn = torch.multinomial(probs[order], 1, generator=generator)[:, 0].tolist()
    worlds = [toy.responses(x) for x in prompts]
    return distinct([(toy.as_row(prompts[x], []).prompt, worlds[x][s]) for x, s in zip(order, drawn)])


def distinct(pairs):
    """[(prompt, response), …] -> (rows, {"empty": …, "duplicate": how many were dropped}), the order kept."""
    said = [pair for pair in pairs if pair[1].strip()]
    kept = dict.fromkeys(said)
    return ([Row(x, [y], [], []) for x, y in kept],
            {"empty": len(pairs) - len(said), "duplicate": len(said) - len(kept)})


def _read_row(line, where):
    """One line of a JSONL file -> its one or two (prompt, response). where: file and row, for the error."""
    row = _json_object(line, where)
    fields = ("prompt", "response_0", "response_1") if "response_0" in row else ("prompt", "response")
    _need_texts(row, fields, where, "give prompt and response, or response_0 and _1")
    prompt, responses = _as_dialogue(row["prompt"], [row[field] for field in fields[1:]], "higher" in row)
    return [(prompt, response) for response in responses]
