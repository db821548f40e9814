"""pairs.py - random compared pairs of responses, for what measures a DPO step."""
import torch

from data.tokenizers import TokenRow
from data.trees import pack


def token_pairs(flags, vocabulary, seed):
    """(2, flags.pairs, flags.length) tokens: both responses of each pair, after a prompt of half the length."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (2, flags.pairs, flags.length), generator=g)
    ids[1, :, :flags.length // 2] = ids[0, :, :flags.length // 2]
    return ids


def pair_rows(ids, m):
    """Such pairs as TokenRows, with the first response the better one in all m dimensions."""
    half = ids.shape[2] // 2
    return [TokenRow(x[:half], [x[half:], y[half:]], [(0, 1)], [[0] * m]) for x, y in zip(*ids.tolist())]


def pack_pairs(ids, m):
    """Such pairs as a TreeBatch."""
    return pack(pair_rows(ids, m))
