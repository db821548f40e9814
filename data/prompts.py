"""prompts.py - prompts to sample from, demonstrations for SFT, and a preference as a text in front of a prompt.

Prompts are the first words of stories (.txt, data.files) or the prompts of rows of any layout (data.layouts). They take
the same form as the prompts of preference files, so that policy and reward model see the same text.
"""
import hashlib
import json

import torch

from data.files import Row, is_text, paths_of, read_stories
from data.layouts import Broken, read_examples
from runs.files import UserError

HELD_OUT = 0.1          # the part of the prompts that split() keeps for evaluation


def read_prompts(paths, prompt_words=None, fields=None):
    """paths: one file or a list of them -> (rows, dropped): Row(prompt, [response] or []) in order.

    prompt_words: how many words of a story are its prompt (.txt only). Prompt and response joined are the story, spaces
    and line breaks as they were. fields: what other files call our fields (data.layouts.read_examples).
    dropped: {"short": stories of fewer than 2 · prompt_words words, "duplicate": rows whose prompt was there before};
    many stories begin alike. Raises UserError for what cannot be read.
    """
    rows, short, read = {}, 0, 0
    for path in paths_of(paths):
        found, too_short = read_texts(path, prompt_words, fields)
        for prompt, responses in found:
            own = responses if len(responses) == 1 else []                       # of two, none is the prompt's own
            rows.setdefault(prompt, Row(prompt, own))
        short, read = short + too_short, read + len(found)
    if not rows:
        raise UserError("no prompt file given; name at least one")
    return list(rows.values()), {"short": short, "duplicate": read - len(rows)}


def read_texts(path, prompt_words=None, fields=None, least=0):
    """A text of stories, or rows of any layout -> ([(prompt, responses), …], how many stories were too short).
    least: rows with fewer responses are broken."""
    if is_text(path):
        stories, short = read_stories(path, prompt_words)
        return [(prompt, [response]) for prompt, response in stories], short

    def use(example):
        if len(example.responses) < least:
            raise Broken("no response; name the fields of other layouts with --fields")
    return [(x.prompt, x.responses) for x in read_examples(path, fields, use).examples], 0


def read_demonstrations(paths, fields=None):
    """One file per dimension, rows with one response -> (rows, kinds): a Row(prompt, responses) for each prompt, in
    order, and which file each of its responses is from, list[list[int]].

    Equal prompts of several files become one row, so that what they share is computed once. Raises UserError for a
    file that is not as described.
    """
    def use(example):
        if len(example.responses) != 1:
            raise Broken(f"{len(example.responses)} responses: a demonstration has one")
    rows, kinds = {}, {}
    for i, path in enumerate(paths_of(paths)):
        for example in read_examples(path, fields, use).examples:
            rows.setdefault(example.prompt, Row(example.prompt)).responses.extend(example.responses)
            kinds.setdefault(example.prompt, []).append(i)
    return list(rows.values()), list(kinds.values())


def split(rows):
    """-> (train, eval): a row goes to eval where its prompt's SHA-256, as a fraction of its range, is below HELD_OUT.
    So a prompt is never in both, and stays where it is whatever other rows there are, and whatever template is used."""
    def fraction(row):
        text = row.prompt if isinstance(row.prompt, str) else json.dumps(row.prompt)
        return int(hashlib.sha256(text.encode()).hexdigest(), 16) / 2 ** 256
    held_out = [fraction(row) < HELD_OUT for row in rows]
    return [row for row, out in zip(rows, held_out) if not out], [row for row, out in zip(rows, held_out) if out]


def written(lams, tokenizer):
    """Preferences as texts, "0.30 0.70" and a line break: lams (n, m) -> ids (n, tokens), int64.

    Two decimals: rows of one length, of which the model sees λ rounded. The numbers alone, in the order of the
    dimensions, so that prompts begin near the positions where the base model knows them. Raises UserError where the
    tokenizer makes texts of different lengths of them.
    """
    ids = [tokenizer.encode(" ".join(f"{x:.2f}" for x in lam) + "\n") for lam in lams.tolist()]
    if len({len(x) for x in ids}) > 1:
        raise UserError(f"tokenizer {tokenizer.name}: --method prompt needs one that writes every preference in as "
                        f"many tokens")
    return torch.tensor(ids)
