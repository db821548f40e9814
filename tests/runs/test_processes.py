"""test_processes.py - the arithmetic of several processes, and what a device is called."""
import pytest
import torch

from aggregate import linear_scalarization, tchebycheff
from runs import processes
from runs.files import UserError
from runs.processes import first_alone, pick_device, reduce_gradients, with_value


@pytest.mark.parametrize("aggregate", [linear_scalarization, tchebycheff])
def test_gradient_of_an_aggregate_of_sums(aggregate):
    """Each process differentiates the aggregate at the value of the sum, with respect to its own part."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(6, generator=g, requires_grad=True)
    A = torch.randn(2, 3, 6, generator=g)                     # parts of three losses, linear in x, in two processes
    lam = torch.tensor([0.3, 0.3, 0.4])
    A[0, 0] += 3 * torch.sign(x.detach())                     # the largest of the first process …
    A[1, 0] -= 3 * torch.sign(x.detach())                     # … and the smallest of the second
    gradient = lambda value: torch.autograd.grad(value, x)[0]
    right = gradient(aggregate(A.sum(0) @ x, lam))
    whole = (A.sum(0) @ x).detach()
    parts = [gradient(aggregate(with_value(A[rank] @ x, whole), lam)) for rank in range(2)]
    assert torch.allclose(sum(parts), right, rtol=1e-5)
    assert all(torch.equal(with_value(A[rank] @ x, whole), whole) for rank in range(2))
    assert not torch.allclose(sum(parts) / 2, right, rtol=1e-2)                       # wrong: averaged
    local = sum(gradient(aggregate(A[rank] @ x, lam)) for rank in range(2))           # wrong: each its own maximum
    assert torch.allclose(local, right, rtol=1e-5) == (aggregate is linear_scalarization)


def test_gradients_are_summed_where_some_process_has_none(monkeypatch):
    parameters = [torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(3))]
    parameters[0].grad = torch.ones(2, 2)
    reduce_gradients(parameters)
    assert parameters[1].grad is None                         # one process: nothing to do
    monkeypatch.setattr(processes, "ranks", lambda: (0, 2))
    monkeypatch.setattr(processes, "all_sum", lambda x: x + torch.arange(7.0))       # what the other one has
    reduce_gradients(parameters)
    assert parameters[0].grad.tolist() == [[1, 2], [3, 4]] and parameters[1].grad.tolist() == [4, 5, 6]


@pytest.mark.parametrize("rank, order", [(0, ["work", "barrier"]), (1, ["barrier", "work"])])
def test_the_first_process_works_before_the_others(monkeypatch, rank, order):
    calls = []
    monkeypatch.setattr(processes, "ranks", lambda: (rank, 2))
    monkeypatch.setattr(processes, "barrier", lambda: calls.append("barrier"))
    assert first_alone(lambda: calls.append("work") or "done") == "done" and calls == order


def test_devices():
    assert pick_device("cpu") == (torch.device("cpu"), torch.float32)
    assert pick_device("cpu", "bf16")[1] == torch.bfloat16
    assert pick_device("auto")[0].type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("tpu9", "cuda:99"):
        with pytest.raises(UserError, match=f"^--device {name}: [^\n]*$"):
            pick_device(name)
