"""test_best.py - set 4's experiment: the stored scores of the best policies, and rollouts with keys and values kept."""
import pytest
import torch

from course import earlier, reference_adapters
from course.gpt import load_base
from course.set4.experiment import BEST, BETA, DIMS, LAMS, TEST, read, rollout
from course.world import TOKENIZER, texts
from data import toy
from fronts.optimum import rlhf_closed_form


def logprobs(model, prompts, responses):
    tokens, mask = texts(prompts, responses)
    return reference_adapters.token_logprobs(model(tokens), tokens, mask).sum(1).double()


@pytest.mark.slow
@torch.no_grad()
def test_best_policies():
    """They are π_ref exp(Σ λ_i s_i / β), normalised, over the listed responses and all other texts together."""
    base, ref, scores = load_base(), [], []
    for x in TEST:
        p = logprobs(base, [x] * toy.N_RESPONSES, toy.responses(x))
        ref.append(torch.cat([p, torch.log1p(-p.exp().sum())[None]]))
        scores.append(torch.cat([toy.scores(x, toy.responses(x), DIMS), torch.full((1, 2), toy.OUTSIDE).double()]))
    ref, scores = torch.stack(ref), torch.stack(scores)
    logps = rlhf_closed_form(LAMS, scores, ref, BETA)[1]
    found = torch.einsum("fxo,xom->fm", logps.exp(), scores) / len(TEST)
    assert (found - torch.tensor(BEST)).abs().max() < 1e-3
    assert (found - torch.einsum("fxo,xom->fm", rlhf_closed_form(LAMS, scores, ref, 1.0)[1].exp(), scores) / len(TEST)
            ).abs().max() > 0.1                                       # wrong: another β


@torch.no_grad()
def test_rollouts_and_what_is_read():
    """Keys and values that are kept change nothing; a response ends with EOS or has no text; λ is a row's own."""
    model, prompts = load_base(), [TEST[0], TEST[3], TEST[0]]
    tokens, mask, said = rollout(model, prompts, torch.Generator().manual_seed(0))
    assert (read(model, tokens) @ model.embed.weight.T - model(tokens)).abs().max() < 1e-4
    past = []
    pieces = torch.cat([read(model, part, past) for part in (tokens[:, :9], tokens[:, 9:10], tokens[:, 10:11])], 1)
    assert (pieces - read(model, tokens)[:, :11]).abs().max() < 1e-4
    again, mask_again = texts(prompts, said)
    assert torch.equal(again, tokens[:, :again.shape[1]]) and torch.equal(mask_again, mask[:, :again.shape[1]])
    assert rollout(model, prompts, torch.Generator().manual_seed(0), longest=3)[2] == ["", "", ""]
    assert all(TOKENIZER.encode(y)[:2] for y in said)
    # of the stand-in a row's λ moves that row alone
    earlier.inject(model, 8, 2, 1.0)
    model.vectors.data.normal_(generator=torch.Generator().manual_seed(1))
    earlier.set_preference(model, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]))
    rows = model(tokens)
    for r, lam in enumerate(([1.0, 0.0], [0.0, 1.0])):
        earlier.set_preference(model, lam)
        assert (model(tokens)[r] - rows[r]).abs().max() < 1e-3 < (model(tokens)[1 - r] - rows[1 - r]).abs().max()
