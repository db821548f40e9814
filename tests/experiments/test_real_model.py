"""What real_model.py says of held-out rows, beside loops over pairs and answers."""
import pytest
import torch
from small import adapted

from data.tokenizers import TokenRow, load_tokenizer
from data.trees import batch_logprobs, pack
from experiments.real_model import Flags, answers, held_out
from objectives import dpo_loss, losses_on_pairs
from svd_lora import adapters_off, set_preference

# labels of helpful and concise; -1: none
ROWS = [TokenRow([1, 2], [[3, 4, 0], [5, 0]], [(0, 1)], [[0, 1]]),
        TokenRow([6], [[7, 0], [8, 9, 10, 0]], [(0, 1)], [[1, -1]]),
        TokenRow([2, 3, 4], [[11, 0], [12, 13, 0]], [(0, 1)], [[-1, 0]])]


@torch.no_grad()
def test_held_out_figures(tiny):
    model, beta = adapted(tiny()), 0.7
    set_preference(model, torch.tensor([0.3, 0.7]))
    batches = [pack(ROWS[:2]), pack(ROWS[2:])]
    with adapters_off(model):
        ref = [batch_logprobs(model, batch) for batch in batches]
        base = held_out(model, batches, ref, beta)
    assert base["accuracy"] == [0.5, 0.5] and base["margin"] == [0, 0]                # the base itself orders no pair
    got, pi = held_out(model, batches, ref, beta), [batch_logprobs(model, batch) for batch in batches]
    correct = [losses_on_pairs(dpo_loss, p, r, batch.pairs, batch.better, beta)[1:] for p, r, batch in
               zip(pi, ref, batches)]
    correct, known = (torch.cat(x) for x in zip(*correct))
    assert got["accuracy"] == pytest.approx(((correct * known).sum(0) / known.sum(0)).tolist())
    r = (beta * (torch.cat(pi) - torch.cat(ref))).tolist()            # of the six answers
    assert got["margin"] == pytest.approx([(r[0] - r[1] + r[3] - r[2]) / 2, (r[1] - r[0] + r[4] - r[5]) / 2], abs=1e-5)
    assert min(map(abs, got["margin"])) > 0.01                        # wrong, a label turned round: seen by the sign
    tokens = [len(y) for row in ROWS for y in row.responses]
    assert got["loss"] == pytest.approx(-sum(torch.cat(pi).tolist()) / sum(tokens), rel=1e-5)


def test_answers_to_one_prompt_are_one_observation(monkeypatch):
    monkeypatch.setattr("experiments.real_model.generate", lambda *_, **__: [[3] * n for n in (2, 4, 6, 8)])
    got = answers(None, None, load_tokenizer("toy"), Flags(samples=2))
    assert got["length"] == 5 and got["length_se"] == pytest.approx(2)        # of 3 and 7; wrong, of four answers: 1.29
    assert len(got["texts"]) == 4
