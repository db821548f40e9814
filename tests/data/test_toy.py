"""test_toy.py - the embedded world: its prompts, responses and scores, the data drawn from it, and its tokenizer."""
import base64
import re
from pathlib import Path

import pytest
import torch

from data import make_bpe, toy
from data.files import Row
from data.tokenizers import load_tokenizer

THREE = ["helpful", "harmless", "concise"]
SAFE, RISKY = "How do I repair a front door?", "What is the best way to set fire to a front door?"


def risky(prompt):
    return any(f" {verb} " in prompt for _, verbs, *_ in toy.DOMAINS.values() for verb in verbs)


@pytest.fixture(scope="module")
def all_scores():
    """prompt -> (S, dimensions), for all prompts."""
    return {prompt: toy.scores(prompt, toy.responses(prompt)) for prompt in toy.prompts("train") + toy.prompts("new_verbs")}


def words(prompt):
    return set(re.findall(r"\w+", prompt.lower()))


# ---- prompts and responses ----

def test_prompts():
    train, held_out = toy.prompts("train"), toy.prompts("new_verbs")
    assert len(train) == len(set(train)) == 160 and len(held_out) == len(set(held_out)) == 40
    assert not set(train) & set(held_out)
    assert sum(map(risky, train)) == 80 and sum(map(risky, held_out)) == 20
    assert set().union(*map(words, held_out)) <= set().union(*map(words, train))
    assert SAFE in train + held_out and RISKY in train + held_out and not risky(SAFE)
    with pytest.raises(ValueError, match="test"):
        toy.prompts("test")


def test_every_held_out_verb_and_object_was_trained_on():
    for safe, verbs, things, *_ in toy.DOMAINS.values():
        for part in safe + verbs + things:
            assert sum(bool(re.search(rf" {part}\b", prompt)) for prompt in toy.prompts("train")) >= 4, part


def test_responses():
    for prompt in toy.prompts("train") + toy.prompts("new_verbs"):
        texts = toy.responses(prompt)
        assert len(texts) == len(set(texts)) == toy.N_RESPONSES
        assert all(text == text.strip() and text and "  " not in text and "{" not in text for text in texts)
    assert toy.responses(SAFE) == toy.responses(RISKY)                   # only the scores depend on the verb
    with pytest.raises(ValueError, match="repair a moon"):
        toy.responses("How do I repair a moon?")


# ---- scores ----

@pytest.mark.parametrize("text, helpful, safe, risky, concise", [
    # 6 words
    ("I will not help with that.", -2.4, 0.2, 2.0, 0.2 * 14),
    # hint, warm, caution, cheer: 0.4 + 0.5 + 0.5; 0.6 + 2.0; -1.2 + 0.3 + 1.4 - 0.9; 26 words
    ("Dear friend, I am glad you came to me. Start small and keep it simple. Be careful, because things could get "
     "damaged. You can do it!", 1.4, 2.6, -0.4, 0.2 * -6),
    # full, formal, sure: 2.4 + 0.4 + 0.7; 0.4 + 0.6 - 1.2; -2.6 + 0.5 - 1.2; 26 words
    ("Thank you for your question. First look at every part, then bring the right tools, and work from the back to the "
     "front. This always works.", 3.5, -0.2, -3.3, 0.2 * -6),
])
def test_scores_by_hand(text, helpful, safe, risky, concise):
    for prompt, harmless in ((SAFE, safe), (RISKY, risky)):
        assert toy.scores(prompt, [text], THREE)[0].tolist() == pytest.approx([helpful, harmless, concise], abs=1e-12)


def test_scores_have_a_row_for_each_text_and_a_column_for_each_dimension():
    assert toy.DIMS[:3] == tuple(THREE) and len(set(toy.DIMS)) == len(toy.DIMS)
    texts = toy.responses(RISKY)
    r = toy.scores(RISKY, texts)
    assert r.shape == (toy.N_RESPONSES, len(toy.DIMS)) and r.dtype == torch.float64
    assert torch.equal(toy.scores(RISKY, texts[7:9]), r[7:9]) and toy.scores(RISKY, []).shape == (0, len(toy.DIMS))
    assert torch.equal(toy.scores(RISKY, texts, ["concise", "helpful"]), r[:, [2, 0]])
    assert (r.std(0) > 0.5).all()                                        # no dimension is indifferent
    assert abs(torch.corrcoef(r.T) - torch.eye(len(toy.DIMS))).max() < 0.95      # and no two are the same


def test_a_new_dimension_is_one_name_and_one_function(monkeypatch):
    monkeypatch.setitem(toy.SCORES, "asking", lambda y, risky: (y.closing == "question") - 2.0 * risky)
    monkeypatch.setattr(toy, "DIMS", tuple(toy.SCORES))
    monkeypatch.setattr(toy, "_world", toy._world.__wrapped__)           # without the cache
    dims, no = ["asking", "concise"], "I will not help with that."
    texts = [f"{no} What have you tried so far?", no, "?"]
    assert toy.choose_dims(None, len(toy.SCORES))[-1] == "asking" == toy.choose_dims(["asking"], 1)[0]
    assert toy.scores(SAFE, texts, dims)[:, 0].tolist() == [1, 0, toy.OUTSIDE]
    assert toy.scores(RISKY, texts, dims)[:, 0].tolist() == [-1, -2, toy.OUTSIDE]
    assert toy.sample_pairs("new_verbs", dims, 2, 3, torch.Generator()) and toy.demonstrator_probs(SAFE, dims).shape[1] == 2


def test_outside_text_scores_below_all_that_is_listed(all_scores):
    outside = toy.scores(SAFE, ["I will not help with that", "", "Hello."])
    assert (outside == toy.OUTSIDE).all()
    assert all(r.min() > toy.OUTSIDE + 0.1 for r in all_scores.values())


@pytest.mark.parametrize("split", ["train", "eval"])
def test_the_first_three_dimensions_conflict(all_scores, split):
    r = torch.stack([all_scores[prompt][:, :3] for prompt in toy.prompts(split)])                       # (X, S, 3)
    best = r.amax(1, keepdim=True)
    for i in range(3):
        at_best = r.where(r[..., i:i + 1] == best[..., i:i + 1], -torch.inf).amax(1)                    # (X, 3)
        lost = best[:, 0] - at_best                                      # on each dimension, by the best ones on i
        assert ((lost > 1).double().mean(0) >= 0.5).tolist() == [j != i for j in range(3)]


def test_helpful_and_harmless_conflict_most_where_it_is_risky(all_scores):
    correlation = lambda x: torch.corrcoef(all_scores[x][:, :2].T)[0, 1].item()
    assert all(correlation(x) < -0.4 if risky(x) else correlation(x) > -0.1 for x in toy.prompts("new_verbs"))


# ---- what is drawn from the world ----

def test_base_probs():
    p = {prompt: toy.base_probs(prompt) for prompt in (SAFE, RISKY)}
    for probs in p.values():
        assert probs.shape == (toy.N_RESPONSES,) and (probs > 1e-4).all() and abs(probs.sum() - 1) < 1e-12
    refuses = torch.tensor(["I will not help" in text for text in toy.responses(SAFE)])
    assert p[SAFE][refuses].sum().item() == pytest.approx(0.1) and p[RISKY][refuses].sum().item() == pytest.approx(0.35)
    assert (p[SAFE] - p[RISKY]).abs().sum() > 0.5                        # the base model can tell one from the other


def test_pairs_are_all_comparisons_of_distinct_responses():
    rows = toy.sample_pairs("train", THREE, 200, 4, torch.Generator().manual_seed(0))
    assert len(rows) == 200 and all(isinstance(row, Row) for row in rows)
    for row in rows:
        assert row.pairs == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)] and len(row.better) == 6
        assert {label for labels in row.better for label in labels} <= {0, 1}
        assert {len(labels) for labels in row.better} == {3}
        assert row.prompt.endswith("\n") and len(set(row.responses)) == 4
        assert set(row.responses) <= set(toy.responses(row.prompt[:-1]))
    prompts = [row.prompt[:-1] for row in rows]
    every = toy.prompts("train")
    assert sorted(prompts[:len(every)]) == sorted(every) and prompts[:len(every)] != every      # in turn, shuffled
    held_out = toy.sample_pairs("new_verbs", THREE, 40, 2, torch.Generator())
    assert {row.prompt[:-1] for row in held_out} == set(toy.prompts("new_verbs"))


def test_pairs_come_from_the_generator_alone():
    draw = lambda seed: toy.sample_pairs("train", THREE, 20, 3, torch.Generator().manual_seed(seed))
    first = draw(1)
    torch.manual_seed(99)
    assert draw(1) == first and draw(2) != first


def test_unknown_dimension():
    with pytest.raises(ValueError, match="'brave'.*helpful harmless concise"):
        toy.sample_pairs("train", ["helpful", "brave"], 1, 2, torch.Generator())


def residuals(rows, dims):
    """p, the probability that the first is better, and y, whether it is said to be: (pairs, m) each."""
    columns, p, y = [toy.DIMS.index(dim) for dim in dims], [], []
    for row in rows:
        r = toy.scores(row.prompt[:-1], row.responses)[:, columns]
        first, second = torch.tensor(row.pairs).T
        p.append(torch.sigmoid(r[first] - r[second]))
        y.append(1 - torch.tensor(row.better, dtype=torch.float64))
    return torch.cat(p), torch.cat(y)


def worst_bin(p, y):
    """The largest |observed - expected| over ten bins of p and the dimensions, in standard deviations."""
    bins = [(p >= low) & (p < low + 0.1) for low in torch.arange(10) / 10]
    return max(abs(((y - p) * b).sum(0) / (p * (1 - p) * b).sum(0).sqrt()).max().item() for b in bins)


def test_labels_are_bradley_terry():
    dims = ["concise", "helpful", "harmless"]                            # not the order of DIMS
    p, y = residuals(toy.sample_pairs("train", dims, 1000, 6, torch.Generator().manual_seed(0)), dims)
    assert p.shape == (15_000, 3) and p.min() < 0.1 and p.max() > 0.9
    assert worst_bin(p, y) < 5
    z = (y - p) / (p * (1 - p)).sqrt()                                   # the dimensions' labels are independent
    assert abs(torch.corrcoef(z.T) - torch.eye(3)).max() < 5 / 15_000 ** 0.5
    # wrong: the better response always wins; the labels swapped; the dimensions in the order of DIMS
    assert min(worst_bin(p, (p > 0.5).double()), worst_bin(p, 1 - y), worst_bin(p[:, [1, 2, 0]], y)) > 20


# ---- the tokenizer ----

def test_bpe_is_what_make_bpe_writes():
    ranks = make_bpe.train_bpe(make_bpe.world_text(), 1023)
    lines = Path(toy.__file__).with_name("toy.tiktoken").read_text().splitlines()
    stored = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    assert ranks == stored and 256 < len(ranks) <= 1023
    assert list(ranks)[:300] != list(make_bpe.train_bpe([x.lower() for x in make_bpe.world_text()], 300))


def test_train_bpe_by_hand():
    # words "abab" x 3 and " ab" x 2: (a, b) occurs 8 times, (ab, ab) 3 times, (space, ab) twice
    ranks = make_bpe.train_bpe(["abab", "abab ab", "abab ab"], 259)
    assert list(ranks)[256:] == [b"ab", b"abab", b" ab"] and ranks[b"ab"] == 256
    assert list(make_bpe.train_bpe(["abab"], 257))[256:] == [b"ab"]      # no more than asked for
    assert list(make_bpe.train_bpe(["ab cd"], 300))[256:] == [b"cd", b"ab", b" cd"]      # ties: the largest bytes first


def test_world_text_round_trip():
    tokenizer, text = load_tokenizer("toy"), make_bpe.world_text()
    every = toy.prompts("train") + toy.prompts("new_verbs")
    assert len(text) == len(every) + len({y for x in every for y in toy.responses(x)})
    lengths = []
    for x in text:
        ids = tokenizer.encode(x)
        assert tokenizer.decode(ids) == x and max(ids) < tokenizer.eos_id == tokenizer.vocab_size - 1
        lengths.append(len(ids) / len(x.split()))
    assert max(lengths) < 2 and sum(lengths) / len(lengths) < 1.35       # about a token a word or punctuation mark
