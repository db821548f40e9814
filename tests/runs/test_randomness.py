"""test_randomness.py - batches and random numbers are functions of seed and step; batches of rows of one length."""
import pytest
import torch

from data.tokenizers import TokenRow
from data.trees import pack, row_lengths
from runs import randomness
from runs.randomness import epoch_batch, generator_for, items_of_steps


def test_every_stream_and_step_has_numbers_of_its_own():
    draw = lambda *key: tuple(torch.rand(4, generator=generator_for(*key)).tolist())
    keys = [(0, "lambda", 0), (0, "lambda", 1), (1, "lambda", 0), (0, "batch", 0), (0, "lambda", 1 << 32)]
    assert len({draw(*key) for key in keys}) == 5 and draw(*keys[0]) == draw(0, "lambda")


@pytest.mark.parametrize("n, size", [(103, 8), (64, 8), (1000, 4), (3, 8), (9, 8)])
@pytest.mark.parametrize("by_length", [True, False])
def test_every_row_comes_once_an_epoch(n, size, by_length):
    lengths = torch.randint(1, 500, (n,), generator=torch.Generator().manual_seed(0)) if by_length else None
    batches = [epoch_batch(n, size, 0, step, lengths) for step in range(5 * n // size)]
    seen = torch.cat(batches).tolist()
    for epoch in range(len(seen) // n):
        assert sorted(seen[epoch * n:(epoch + 1) * n]) == list(range(n))
    # a function of seed and step alone, whatever was asked before
    randomness._epoch_order.cache_clear()
    assert all(torch.equal(epoch_batch(n, size, 0, step, lengths), batches[step]) for step in (len(batches) - 1, 0))
    assert n < 20 or not torch.equal(epoch_batch(n, size, 1, 0, lengths), batches[0])
    assert n < 20 or not torch.equal(batches[0], batches[n // size])                  # another epoch, another order
    for steps in (1, 2, n // size, n // size + 1):
        assert items_of_steps(n, size, 0, steps, lengths) == sorted(set(torch.cat(
            [epoch_batch(n, size, 0, step, lengths) for step in range(steps)] or [torch.zeros(0)]).tolist()))


def test_batches_are_of_one_length_and_in_no_order():
    lengths = torch.randint(10, 500, (800,), generator=torch.Generator().manual_seed(1))
    spread = lambda lengths_used: torch.tensor([
        (lengths[b].max() - lengths[b].min()).item() for b in
        (epoch_batch(800, 8, 0, step, lengths_used) for step in range(100))]).float()
    assert spread(lengths).mean() < 20 < 300 < spread(None).mean()
    first = torch.tensor([lengths[epoch_batch(800, 8, 0, step, lengths)].float().mean() for step in range(64)])
    assert abs(torch.corrcoef(torch.stack([first, torch.arange(64.0)]))[0, 1]) < 0.4  # wrong: the short ones first


def test_row_lengths_bound_the_trees():
    rows = [TokenRow([1, 2, 3], [[4, 5, 6], [4, 7]]), TokenRow([1], [[2]])]
    assert list(row_lengths(rows)) == [8, 2] and pack(rows).nodes == [5, 1]
