"""test_batches.py - means of losses over rows, preferences, micro-batches and processes."""
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from aggregate import linear_scalarization, tchebycheff
from data.batches import Batches, pad_to
from data.tokenizers import TokenRow
from data.trees import pack
from runs import processes
from runs.randomness import epoch_batch

CPU = torch.device("cpu")


def rows_of(n, m=2, seed=0):
    """n rows with 2 to 4 responses; uneven labels: some pairs have none for a dimension, some rows none at all."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high, *shape: torch.randint(low, high, shape, generator=g).tolist()
    rows, known = [], []
    for j in range(n):
        responses = [[1 + i, *draw(0, 60, 1 + (i + j) % 3)] for i in range(2 + j % 3)]
        pairs = [(a, b) for b in range(len(responses)) for a in range(b)]
        better = torch.tensor(draw(-1, 2, len(pairs), m))
        better[:, j % m] = -1 if j % 3 == 0 else better[:, j % m]
        rows.append(TokenRow(draw(0, 60, 2 + j % 4), responses, pairs, better.tolist()))
        known.append((better >= 0).float())
    return rows, known


def item_loss(row, item, i, weight):
    """A loss of one item for dimension i, linear in `weight`: which row and item it is of can be read off it."""
    return weight * (1 + 0.1 * row + 0.01 * item + 0.5 * i)


def losses_of(batch, known, weight):
    """The losses of all items of a Batch: (items, m)"""
    return torch.stack([torch.stack([item_loss(j, item, i, weight) for i in range(known[j].shape[1])])
                        for j in batch.rows for item in range(len(known[j]))])


def plain_mean(chosen, G, known, aggregate, weight):
    """L (G, m) by loops. ls: divided by how many labels a preference has on average over all rows, an epoch's mean;
    tche: by its own number."""
    m = known[0].shape[1]
    L = [[0.0] * m for _ in range(G)]
    for i in range(m):
        sums, counts = [0.0] * G, [0] * G
        for b, j in enumerate(chosen):
            g = b // (len(chosen) // G)
            for item in range(len(known[j])):
                if known[j][item, i]:
                    sums[g], counts[g] = sums[g] + item_loss(j, item, i, weight), counts[g] + 1
        for g in range(G):
            every = sum(x[:, i].sum().item() for x in known) / len(known) * len(chosen) / G
            by = every if aggregate == "ls" else counts[g]
            L[g][i] = sums[g] / by if by else -torch.inf
    return torch.stack([torch.stack([torch.as_tensor(x, dtype=torch.float32) for x in row]) for row in L])


def values(aggregate, L):
    """(G,) of L (G, m), as training has them; Tchebycheff's ideals are above some of the losses."""
    lam = torch.tensor([[0.3, 0.7], [0.6, 0.4], [1.0, 0.0], [0.5, 0.5]])[:len(L)]
    return linear_scalarization(L, lam) if aggregate == "ls" else tchebycheff(L, lam, [3.2, 2.0])


@pytest.mark.parametrize("aggregate", ["ls", "tche"])
@pytest.mark.parametrize("G, parts", [(1, 1), (4, 1), (2, 2), (4, 4)])
def test_means_equal_a_plain_loop(aggregate, G, parts):
    """For each step: the value, and with micro-batches the sum of their values and gradients."""
    rows, known = rows_of(13)
    flags = SimpleNamespace(batch_size=8, seed=3, aggregate=aggregate)
    data = Batches(rows, known, flags, G, CPU, first=5, parts=parts)
    for step in range(4):
        chosen = epoch_batch(13, 8, 3, 5 + step).tolist()
        plain = torch.tensor(2.0, requires_grad=True)
        L = plain_mean(chosen, G, known, aggregate, plain)
        values(aggregate, L).mean().backward()
        weight, taken, groups, value, total = torch.tensor(2.0, requires_grad=True), [], [], 0.0, 0.0
        for part in range(parts):
            batch = data.take(step, part)
            mean = batch.mean(losses_of(batch, known, weight))
            taken, groups = taken + batch.rows, groups + batch.group.tolist()
            loss = batch.over_preferences(values(aggregate, mean))
            loss.backward()
            value, total = value + loss.item(), total + mean.detach()
            assert torch.equal(batch.tree.tokens, pack([rows[j] for j in batch.rows]).tokens)
            assert torch.equal(batch.known, torch.cat([known[j] for j in batch.rows]))
        assert taken == chosen and groups == [b // (8 // G) for b in range(8)]
        assert value == pytest.approx(values(aggregate, L).mean().item(), rel=1e-5)
        assert torch.allclose(total[L > -1e8], L[L > -1e8], rtol=1e-5) and (total[L < -1e8] < -1e8).all()
        assert weight.grad.item() == pytest.approx(plain.grad.item(), rel=1e-5)


@pytest.mark.parametrize("aggregate", ["ls", "tche"])
def test_two_processes_have_the_value_of_all_and_the_gradients_of_their_own(monkeypatch, aggregate):
    rows, known = rows_of(13)
    flags = SimpleNamespace(batch_size=8, seed=0, aggregate=aggregate)
    chosen = epoch_batch(13, 8, 0, 2).tolist()
    plain = torch.tensor(2.0, requires_grad=True)
    L = plain_mean(chosen, 2, known, aggregate, plain)
    values(aggregate, L).mean().backward()

    def process(rank, all_sum):
        monkeypatch.setattr(processes, "ranks", lambda: (rank, 2))
        monkeypatch.setattr(processes, "all_sum", all_sum)
        weight = torch.tensor(2.0, requires_grad=True)
        batch = Batches(rows, known, flags, 2, CPU).take(2)
        mean = batch.mean(losses_of(batch, known, weight))
        batch.over_preferences(values(aggregate, mean)).backward()
        return batch.rows, mean.detach(), weight.grad

    local = []                                           # first what each contributes, then with what all have together
    for rank in range(2):
        process(rank, lambda x: local.append(x) or x)
    (own, mean, grad), (others, same, more) = (process(rank, lambda x: local[0] + local[1]) for rank in range(2))
    assert own == chosen[::2] and others == chosen[1::2]
    assert torch.allclose(mean, L, rtol=1e-5) and torch.equal(mean, same)
    assert (grad + more).item() == pytest.approx(plain.grad.item(), rel=1e-5)


def test_a_dimension_without_labels_is_never_tchebycheff_s_maximum():
    rows, known = rows_of(8)
    known = [torch.cat([torch.ones(len(k), 1), torch.zeros(len(k), 1)], dim=1) for k in known]
    batch = Batches(rows, known, SimpleNamespace(batch_size=4, seed=0, aggregate="tche"), 2, CPU).take(0)
    mean = batch.mean(torch.ones(len(batch.known), 2))
    assert mean[:, 0].tolist() == [1, 1] and (mean[:, 1] < -1e8).all()
    batch = Batches(rows, known, SimpleNamespace(batch_size=4, seed=0, aggregate="ls"), 2, CPU).take(0)
    assert (batch.mean(torch.ones(len(batch.known), 2))[:, 1] == 0).all()


def test_a_preference_without_labels_of_what_it_weighs_teaches_nothing():
    """Its value is 0, no infinity, and its gradient is no NaN."""
    rows, known = rows_of(8)
    known = [torch.cat([torch.ones(len(k), 1), torch.zeros(len(k), 1)], dim=1) for k in known]
    batch = Batches(rows, known, SimpleNamespace(batch_size=4, seed=0, aggregate="tche"), 2, CPU).take(0)
    losses = torch.full((len(batch.known), 2), 0.5, requires_grad=True)
    loss = batch.over_preferences(tchebycheff(batch.mean(losses), torch.tensor([[0.0, 1.0], [0.5, 0.5]]), [1.0, 0.0]))
    loss.backward()
    assert loss.item() == pytest.approx((0 + 0.5 * (0.5 - 1)) / 2)
    weighed = (batch.item_group == 1).float()
    assert torch.allclose(losses.grad, torch.stack([weighed / weighed.sum() / 4, 0 * weighed], dim=1))
    assert batch.over_preferences(torch.tensor([torch.nan, 1.0])).isnan()             # what is wrong stays visible


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("G, parts", [(1, 1), (4, 1), (1, 2)])
def test_an_epoch_s_mean_gradient_is_that_of_all_data(close, by_length, G, parts):
    """Of Σ λ_i L_i, with L_i the mean over all labels of i, also where one row in 20 has labels of a dimension, and
    these are the longest. Rules out: division by what the batch itself has."""
    rows, known = rows_of(80)
    rows = [replace(row, prompt=row.prompt * (4 if j % 20 == 7 else 1 + j % 3)) for j, row in enumerate(rows)]
    known = [torch.stack([x[:, 0], torch.full((len(x),), float(j % 20 == 7))], dim=1) for j, x in enumerate(known)]
    g, lam = torch.Generator().manual_seed(1), torch.tensor([0.3, 0.7], dtype=torch.float64)
    features = [torch.randn(len(x), 2, 5, generator=g, dtype=torch.float64) for x in known]
    weights = torch.randn(5, generator=g, dtype=torch.float64).requires_grad_(True)
    losses = lambda chosen: torch.cat([F.softplus(features[j] @ weights) for j in chosen])           # (items, 2)
    gradient = lambda loss: torch.autograd.grad(loss, weights)[0]
    labelled = torch.cat(known)
    whole = gradient(lam @ ((losses(range(80)) * labelled).sum(0) / labelled.sum(0)))
    data = Batches(rows, known, SimpleNamespace(batch_size=4, seed=0, aggregate="ls"), G, CPU, by_length=by_length,
                   parts=parts)
    mean, own = 0.0, 0.0
    for step in range(20):
        labels = data.labels[epoch_batch(80, 4, 0, step, data.lengths)].sum(0, keepdim=True)
        for part in range(parts):
            batch = data.take(step, part)
            for wrong in (False, True):
                batch = replace(batch, counts=labels.clamp(min=1e-9) / G) if wrong else batch
                L = batch.mean(losses(batch.rows))
                step_s = gradient(batch.over_preferences(linear_scalarization(L, lam))) / 20
                mean, own = mean + step_s * (not wrong), own + step_s * wrong
    assert close(mean, whole, 1e-5) and not close(own, whole, 0.1)


def test_batches_by_length_and_shapes():
    rows, known = rows_of(160)
    rows = [TokenRow(row.prompt * (1 + j % 5), row.responses, row.pairs, row.better) for j, row in enumerate(rows)]
    flags = SimpleNamespace(batch_size=4, seed=0, aggregate="ls")
    spread = lambda data: sum(max(len(rows[j].prompt) for j in data.take(s).rows)
                              - min(len(rows[j].prompt) for j in data.take(s).rows) for s in range(40))
    alike, mixed = Batches(rows, known, flags, 1, CPU, by_length=True), Batches(rows, known, flags, 1, CPU)
    assert spread(alike) < 0.7 * spread(mixed)
    assert pad_to(CPU) == 1 and pad_to(torch.device("cuda")) == 64
