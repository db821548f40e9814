"""world.py - the embedded world's texts (data/toy.py) as batches of tokens, and what a policy makes of them.

R: responses   T: tokens of the longest one with its prompt   P: pairs   m: dimensions
"""
import torch

from data import toy
from data.tokenizers import load_tokenizer

TOKENIZER = load_tokenizer("toy")


def texts(prompts, responses):
    """Prompts and responses, two lists of R strings, as tokens (R, T), padded on the right, and mask (R, T), True on
    the tokens of the response, the one that ends it among them."""
    before = [TOKENIZER.encode(x + "\n") for x in prompts]
    after = [TOKENIZER.encode(y) + [TOKENIZER.eos_id] for y in responses]
    T = max(len(x) + len(y) for x, y in zip(before, after))
    tokens, mask = torch.zeros(len(before), T, dtype=torch.long), torch.zeros(len(before), T, dtype=torch.bool)
    for r, (x, y) in enumerate(zip(before, after)):
        tokens[r, :len(x) + len(y)] = torch.tensor(x + y)
        mask[r, len(x):len(x) + len(y)] = True
    return tokens, mask


def pairs(rows):
    """Data rows (toy.sample_pairs) as one batch: tokens, mask, pairs (P, 2), indices of responses, and better (P, m),
    0: the first is better, 1: the second."""
    tokens, mask = texts([row.prompt.strip() for row in rows for _ in row.responses],
                         [y for row in rows for y in row.responses])
    first = torch.tensor([0] + [len(row.responses) for row in rows]).cumsum(0).tolist()
    return {"tokens": tokens, "mask": mask,
            "pairs": torch.cat([torch.tensor(row.pairs) + r for row, r in zip(rows, first)]),
            "better": torch.cat([torch.tensor(row.better) for row in rows])}


@torch.no_grad()
def mean_scores(model, response_logprobs, prompts, dims):
    """E r_i(x, y), y ~ π(·|x), averaged over the prompts, exactly: all listed responses, and all other texts together,
    which have the score toy.OUTSIDE. -> (m,) float64, and the probability of all other texts"""
    total = outside = 0.0
    for x in prompts:
        listed = toy.responses(x)
        tokens, mask = texts([x] * len(listed), listed)
        p = response_logprobs(model(tokens), tokens, mask).double().exp()                             # (S,)
        other = 1 - p.sum()
        total, outside = total + p @ toy.scores(x, listed, dims) + other * toy.OUTSIDE, outside + other.item()
    return total / len(prompts), outside / len(prompts)
