"""make_bpe.py - trains the byte-pair encoding of the embedded world and writes data/toy.tiktoken.

    python -m data.make_bpe

Byte-pair encoding: start from single bytes; while some word is more than one token, merge the most frequent
neighbouring pair of tokens everywhere into a new one. The file has tiktoken's format, lines of base64(token) and rank.
"""
import base64
from collections import Counter
from pathlib import Path

import regex

from data import toy
from data.tokenizers import PATTERN
from runs.files import write_text


def train_bpe(texts, vocab_size):
    """-> {token bytes: rank}, at most vocab_size of them. Of equally frequent pairs the one with the largest bytes is
    merged, so the result is unique."""
    words = Counter(word for text in texts for word in regex.findall(PATTERN, text))
    words = {tuple(bytes([b]) for b in word.encode()): n for word, n in words.items()}
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < vocab_size:
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        if not pairs:
            break                                                       # every word is one token already
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[left + right] = len(ranks)
        words = {_merge(word, left, right): n for word, n in words.items()}
    return ranks


def _merge(word, left, right):
    out, i = [], 0
    while i < len(word):
        both = i + 1 < len(word) and word[i] == left and word[i + 1] == right
        out.append(left + right if both else word[i])
        i += 2 if both else 1
    return tuple(out)


def world_text():
    """Every prompt of the world and every different listed response, each as the model sees it."""
    prompts = [prompt for split in toy.SPLITS[1:] for prompt in toy.prompts(split)]
    rows = [toy.as_row(prompt, toy.responses(prompt)) for prompt in prompts]
    return [row.prompt for row in rows] + sorted({text for row in rows for text in row.responses})


if __name__ == "__main__":
    ranks = train_bpe(world_text(), vocab_size=1023)                    # and one more for EOS
    lines = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    out = Path(__file__).with_name("toy.tiktoken")
    write_text(out, lines)
    print(f"{out.name}: {len(ranks)} tokens, the longest {max(ranks, key=len)!r}")
