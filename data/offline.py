"""offline.py - offline sets: (prompt, response) pairs that exist before training, for methods that select among them.

JSONL rows of one response or of two (then both count, and labels do not), and .txt files of stories, each cut into its
first words and the rest (data.files). A prompt may come with many responses; the same pair is kept once. The embedded
world's set is drawn from what its base model was trained on.
"""
import torch

from data import toy
from data.files import Row, paths_of, read_file
from runs.files import UserError


def read_offline(paths, prompt_words=None):
    """paths: one .jsonl or .txt file or a list of them -> (rows, dropped): a Row(prompt, [response]) for each pair.

    prompt_words: how many words of a story are its prompt (.txt only). dropped: {"short": stories of fewer than
    2 · prompt_words words, "empty": pairs whose response is nothing but white space, "duplicate": pairs that were there
    before}. Raises UserError for a file, row or field that is not as described.
    """
    pairs, short = [], 0
    for path in paths_of(paths):
        examples, too_short = read_file(path, "pair of prompt and response", prompt_words)
        for example in examples:
            if not example.responses:
                raise UserError(f'{example.where}: field "response" is missing; give prompt and response, '
                                f'or response_0 and response_1')
            pairs += [(example.prompt, response) for response in example.responses]
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
    """[(prompt, response), …] -> (rows, {"empty": …, "duplicate": how many were dropped}), the order kept."""
    filled = [pair for pair in pairs if pair[1].strip()]
    kept = dict.fromkeys(filled)
    return [Row(x, [y]) for x, y in kept], {"empty": len(pairs) - len(filled), "duplicate": len(filled) - len(kept)}
