"""test_processes.py - the arithmetic of several processes, and what a device is called."""
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from small import adapted
from threads import in_processes

from aggregate import linear_scalarization, tchebycheff
from model import generate
from runs import processes
from runs.files import UserError
from runs.processes import (
    all_max,
    barrier,
    check_shares,
    first_alone,
    generate_all,
    in_shares,
    pick_device,
    ranks,
    reduce_gradients,
    shard,
    sharded,
    share,
    sum_of_all,
    variance,
    whole,
    whole_rows,
    with_value,
)
from svd_lora import adapters_off, set_preference

CPU = torch.device("cpu")


@pytest.mark.parametrize("n, slow", [(2, 0), (3, 0.2)])
def test_a_thread_that_waits_for_one_that_has_ended_is_told(n, slow):
    """Wrong: it waits for ever; or for a time, which a busy machine may need where nothing is wrong."""
    def process():
        if ranks()[0] == 0:
            time.sleep(slow)
            barrier()

    start = time.time()
    with pytest.raises(threading.BrokenBarrierError):
        in_processes(n, process)
    assert time.time() - start < 30
    assert in_processes(n, lambda: [barrier() for _ in range(99)] and ranks()) == [(rank, n) for rank in range(n)]


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


@pytest.mark.parametrize("n", [1, 2, 3])
def test_what_processes_share_out_is_whole_in_all_of_them(n):
    """7 items, or fewer than there are processes: values as one process has them."""
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    calls = []

    def process():
        mine = list(range(7))[share()]
        square = lambda a, b: calls.append(len(a)) or torch.tensor([[p * p, q] for p, q in zip(a, b)])
        return (mine, whole_rows(x[mine], mine, 7, CPU), variance(x[share()]), all_max(x[share()].amax()),
                in_shares(square, [list(range(7)), list(range(7, 14))], CPU), in_shares(square, [[3], [4]], CPU))

    results = in_processes(n, process)
    assert sorted(sum((r[0] for r in results), [])) == list(range(7))
    for _, rows, var, largest, squares, one in results:
        assert torch.equal(rows, x) and largest == x.max() and one.tolist() == [[9, 4]]
        assert torch.allclose(var, x.var(0), rtol=1e-12) and not torch.allclose(var, x.var(0, correction=0), rtol=1e-2)
        assert squares.tolist() == [[i * i, i + 7] for i in range(7)]
    assert set(calls) == {-(-7 // n), 1} and len(calls) == 2 * n       # the same in each: with fsdp they go together


def test_a_sum_of_all_has_its_value_and_one_s_own_gradient():
    x = torch.tensor([2.0, 3.0])

    def process():
        own = x[share()].clone().requires_grad_(True)
        loss = sum_of_all((own ** 2).sum())
        loss.backward()
        return loss.item(), own.grad.tolist()

    assert in_processes(2, process) == [(13.0, [4.0]), (13.0, [6.0])]


@pytest.mark.parametrize("prompts", [[[3], [4, 5, 6], [11, 12], [3, 4], [9, 9]], [[3, 4]]])
def test_shared_out_prompts_get_the_tokens_of_one_process(tiny, prompts):
    lam = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5], [0.2, 0.8], [0.9, 0.1]])[:len(prompts)]
    seeded = lambda: torch.Generator().manual_seed(7)
    model = adapted(tiny())
    set_preference(model, lam)
    one = generate(model, prompts, 12, eos_id=5, generator=seeded())

    def process():
        model = adapted(tiny())
        set_preference(model, lam[share()])
        return generate_all(model, prompts, 12, 5, seeded())

    assert in_processes(2, process) == [one, one]
    assert len(set(map(tuple, one))) == len(prompts)


def test_items_that_do_not_divide_are_refused(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    flags = lambda **more: SimpleNamespace(**dict(parallel="ddp", quantize="none") | more)
    check_shares(flags(), 6, "--batch_size 6", 3), check_shares(SimpleNamespace(), 6, "--batch_size 6", 3)
    for args, text in (((flags(), 7, "--batch_size 7", 3), "^--batch_size 7 must be a multiple of the 3 processes"),
                       ((flags(parallel="fsdp"), 6, "", 1), "start it with torchrun")):
        with pytest.raises(UserError, match=text):
            check_shares(*args)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="does not go with --quantize"):
        check_shares(flags(parallel="fsdp", quantize="nf4"), 6, "", 1)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_sharded_model_generates_as_a_whole_one(tiny, tmp_path, family):
    """With its adapter and its λ, or without; before and after a backward pass. (One process: its share is all.)"""
    prompts, lam, model = [[3, 4], [5, 6, 7]], torch.tensor([[0.0, 1.0], [0.7, 0.3]]), adapted(tiny(family))
    sampled = lambda model: generate(model, prompts, 10, eos_id=-1, generator=torch.Generator().manual_seed(0))
    set_preference(model, lam)
    assert not sharded(model) and whole(model) is model
    right = sampled(model)
    with adapters_off(model):
        plain = sampled(model)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        assert ranks() == (0, 1)
        shard(model, CPU)
        assert sharded(model)
        for _ in range(2):
            assert sampled(whole(model)) == right != plain
            with adapters_off(model):
                assert sampled(whole(model)) == plain
            model(torch.tensor(prompts[1:] * 2)).sum().backward()
        trained = lambda model: [p for p in model.parameters() if p.requires_grad]
        assert all(p is q for p, q in zip(trained(whole(model)), trained(model), strict=True))
    finally:
        dist.destroy_process_group()


def test_devices():
    assert pick_device("cpu") == (torch.device("cpu"), torch.float32)
    assert pick_device("cpu", "bf16")[1] == torch.bfloat16
    assert pick_device("auto")[0].type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("tpu9", "cuda:99"):
        with pytest.raises(UserError, match=f"^--device {name}: [^\n]*$"):
            pick_device(name)
