"""prompts.py - prompts to sample from, demonstrations for SFT, and a preference as a text in front of a prompt.

Prompts are the first words of stories (.txt) or the prompts of JSONL rows; data.files says how both are read. They take
the same form as the prompts of preference files, so that policy and reward model see the same text.
"""
import hashlib

import torch

from data.files import Row, paths_of, read_file, read_rows
from runs.files import UserError

HELD_OUT = 0.1          # the part of the prompts that split() keeps for evaluation


def read_prompts(paths, prompt_words=None):
    """paths: one .txt or .jsonl file or a list of them -> (rows, dropped): Row(prompt, [response] or []) in order.

    prompt_words: how many words of a story are its prompt (.txt only). Prompt and response joined are the story, spaces
    and line breaks as they were. dropped: {"short": stories of fewer than 2 · prompt_words words, "duplicate": rows
    whose prompt was there before}; many stories begin alike. Raises UserError for what cannot be read.
    """
    rows, short, read = {}, 0, 0
    for path in paths_of(paths):
        examples, too_short = read_file(path, "prompt", prompt_words)
        for example in examples:
            own = example.responses if len(example.responses) == 1 else []       # of two, none is the prompt's own
            rows.setdefault(example.prompt, Row(example.prompt, own))
        short, read = short + too_short, read + len(examples)
    if not rows:
        raise UserError("no prompt file given; name at least one .txt or .jsonl file")
    return list(rows.values()), {"short": short, "duplicate": read - len(rows)}


def read_demonstrations(paths):
    """One JSONL file per dimension, rows with `prompt` and `response` -> (rows, kinds): a Row(prompt, responses) for
    each prompt, in order, and which file each of its responses is from, list[list[int]].

    Equal prompts of several files become one row, so that what they share is computed once. Raises UserError for a
    file, row or field that is not as described.
    """
    rows, kinds = {}, {}
    for i, path in enumerate(paths_of(paths)):
        for example in read_rows(path, "demonstration"):
            if len(example.responses) != 1:
                raise UserError(f'{example.where}: field "response" is missing; a demonstration needs it')
            rows.setdefault(example.prompt, Row(example.prompt)).responses.extend(example.responses)
            kinds.setdefault(example.prompt, []).append(i)
    return list(rows.values()), list(kinds.values())


def split(rows):
    """-> (train, eval): a row goes to eval where its prompt's SHA-256, as a fraction of its range, is below HELD_OUT.
    So a prompt is never in both, and stays where it is whatever other rows there are."""
    fraction = lambda row: int(hashlib.sha256(row.prompt.encode("utf-8", "surrogatepass")).hexdigest(), 16) / 2 ** 256
    return [row for row in rows if fraction(row) >= HELD_OUT], [row for row in rows if fraction(row) < HELD_OUT]


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
