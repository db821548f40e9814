"""offline.py - offline sets: (prompt, response) pairs that exist before training, for methods that select among them.

Rows of any layout with a response or more (data.layouts; all of them count, and labels do not), and .txt files of
stories, each cut into its first words and the rest (data.files). A prompt may come with many responses; the same pair
is kept once. The embedded world's set is drawn from what its base model was trained on.
"""
import torch

from data import toy
from data.files import Row, paths_of
from data.prompts import read_texts


def read_offline(paths, prompt_words=None, fields=None):
    """paths: one file or a list of them -> (rows, dropped): a Row(prompt, [response]) for each pair.

    prompt_words: how many words of a story are its prompt (.txt only). fields: what other files call our fields
    (data.layouts.read_examples). dropped: {"short": stories of fewer than 2 · prompt_words words, "duplicate": pairs
    that were there before}. Raises UserError for a file that is not as described.
    """
    pairs, short = [], 0
    for path in paths_of(paths):
        found, too_short = read_texts(path, prompt_words, fields, least=1)
        pairs += [(prompt, response) for prompt, responses in found for response in responses]
        short += too_short
    rows, dropped = distinct(pairs)
    return rows, {"short": short} | dropped


def draw_world(n, generator):
    """n pairs of the embedded world, train prompts in turn, responses drawn from toy.base_probs -> (rows, dropped)."""
    prompts = toy.prompts("train")
    probs = torch.stack([toy.base_probs(x) for x in prompts])                                          # (X, S)
    order = list(toy.in_turn(range(len(prompts)), n, generator))
    drawn = torch.multinomial(probs[order], 1, generator=generator)[:, 0].tolist()
    listed = [toy.responses(x) for x in prompts]
    return distinct([(toy.as_row(prompts[x], []).prompt, listed[x][s]) for x, s in zip(order, drawn)])


def distinct(pairs):
    """[(prompt, response), …] -> (rows, {"duplicate": how many were dropped}), the order kept."""
    kept = dict.fromkeys(pairs)
    return [Row(x, [y]) for x, y in kept], {"duplicate": len(pairs) - len(kept)}
