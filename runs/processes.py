"""processes.py - where a run computes: its device, and the processes that torchrun started, one per GPU.

All processes compute the same batch, λ and counts, for these are functions of seed and step, and each takes its part of
the rows. Nothing of the frozen base is ever reduced.
rank, processes: which of how many processes this one is, 0 of 1 unless torchrun started several
"""
import datetime
import os

import torch
import torch.distributed as dist

from ops import fused
from ops.check import replace_broken
from ops.generation import generate
from runs.files import UserError
from svd_lora import some_values


def pick_device(name, precision="auto", plain=False):
    """"auto" is CUDA where there is a GPU. Returns (torch.device, dtype of the frozen base: "auto" is bf16 on CUDA).
    plain: from here on this process launches no Triton kernel and records no CUDA graph."""
    if plain:
        fused.OFF.add("all")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name}: {str(e).splitlines()[0]}") from None
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    if precision not in ("fp32", "bf16"):
        raise UserError(f"precision is auto, fp32 or bf16, not {precision!r}")
    return device, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def init_distributed(device):
    """Joins the processes that torchrun started, if it did. Returns (rank, processes, the device of this process)."""
    if "RANK" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        here = int(os.environ["LOCAL_RANK"])
        if here >= torch.cuda.device_count():
            raise UserError(f"torchrun started more processes than there are GPUs: {torch.cuda.device_count()}")
        device = torch.device("cuda", here)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # the others wait while the first one trains a base model
        backend, own = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=12), device_id=own)
    return *ranks(), device


def ranks():
    """(rank, processes); (0, 1) where there is one process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share():
    """Which of some items this process takes, as a slice: items[share()]. All of them where there is one process."""
    rank, processes = ranks()
    return slice(rank, None, processes)


def check_shares(flags, n, what, processes):
    """Raises UserError where n items, whose flags are `what`, do not divide among the processes, and for a --parallel
    that does not fit."""
    if n % processes:
        raise UserError(f"{what} must be a multiple of the {processes} processes")
    if getattr(flags, "parallel", "ddp") == "fsdp" and "RANK" not in os.environ:
        raise UserError("--parallel fsdp shares the base among processes: start it with torchrun --nproc_per_node N")
    if getattr(flags, "parallel", "ddp") == "fsdp" and flags.quantize != "none":
        raise UserError("--parallel fsdp does not go with --quantize: use --parallel ddp")


def barrier():
    """Waits until all processes are here."""
    if ranks()[1] > 1:
        dist.barrier()


def first_alone(work):
    """work(), in the first process before all others: they find what it has written."""
    if ranks()[0] > 0:
        barrier()
        return work()
    result = work()
    barrier()
    return result


def all_sum(x):
    """The sum of a tensor over all processes, in place: the same bits everywhere."""
    if ranks()[1] > 1:
        dist.all_reduce(x)
    return x


def all_max(x):
    """The same with the maximum."""
    if ranks()[1] > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def variance(x):
    """The variance over the rows of all processes: x (rows, n), this one's, -> (n,)"""
    n = all_sum(x.new_tensor(len(x)))
    mean = all_sum(x.sum(0)) / n
    return all_sum((x - mean).square().sum(0)) / (n - 1)


def gathered(own, n, dtype, device):
    """What each process has of n rows, in every one of them: a list of n CPU tensors (k_j,), some of any length.

    own: {j: (k_j,) tensor}, this process's rows; no two processes have the same.
    """
    if n == 0:
        return []
    sizes = all_sum(torch.tensor([len(own[j]) if j in own else 0 for j in range(n)], device=device)).tolist()
    flat = torch.cat([own[j].to(dtype) if j in own else torch.zeros(size, dtype=dtype) for j, size in enumerate(sizes)])
    return list(all_sum(flat.to(device)).cpu().split(sizes))


def whole_rows(own, index, n, device):
    """The n rows of a tensor, of which this process has own (k, …), those with these indices; (n, …) in all of them."""
    rows = torch.zeros(n, *own.shape[1:], dtype=own.dtype, device=device)
    rows[index] = own.to(device)
    return all_sum(rows).to(own.device)


def in_shares(work, columns, device):
    """work(*columns), a tensor with a row for each of n items: every process computes its share, and all have all.

    columns: lists of length n. Each process works on equally many, some of them for nothing, so that models whose base
    is sharded are called equally often.
    """
    n, mine = len(columns[0]), list(range(len(columns[0])))[share()]
    even = mine + [0] * (-(-n // ranks()[1]) - len(mine))
    part = work(*([column[j] for j in even] for column in columns))
    return whole_rows(part[:len(mine)], mine, n, device)


def generate_all(model, prompts, max_new_tokens, eos_id, generator, vocab_size=None):
    """generate(), the prompts shared out: each process has all responses, the tokens that one process would sample.

    Where each prompt has a λ of its own, those of prompts[share()] are to be set before.
    """
    n, mine = len(prompts), range(len(prompts))[share()]
    new = generate(whole(model), prompts, max_new_tokens, eos_id=eos_id, generator=generator, own=mine,
                   vocab_size=vocab_size)
    own = {j: torch.tensor(y) for j, y in zip(mine, new)}
    return [y.tolist() for y in gathered(own, n, torch.int64, model.embed.weight.device)]


def with_value(local, whole):
    """Forward: `whole`, the sum over all processes. Backward: the gradient goes to `local`, this process's part of it.

    For a function f of the sum, each process then gets f'(whole) · ∂local, and the gradients add up to the right one.
    With f(local) it would be f'(local): wrong where f is not linear, as Tchebycheff's maximum is not.
    """
    return whole + (local - local.detach())


def sum_of_all(local):
    """Forward: the sum over all processes. Backward: the gradient goes to `local`, this process's part of it."""
    return with_value(local, all_sum(local.detach().clone()))


def reduce_gradients(parameters):
    """Sums the gradients over all processes: one flat buffer, for the adapter alone has gradients."""
    if ranks()[1] == 1:
        return
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    flat = all_sum(torch.cat([p.grad.flatten() for p in parameters]))
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(part.view_as(p))


def shard(model, device):
    """FSDP2, in place: each process keeps its share of the frozen base on `device` and gathers a block when it computes
    with it. What is trained, the adapter, stays whole everywhere. The base may come from the CPU's memory."""
    from torch.distributed.device_mesh import init_device_mesh  # here: slow to import, and few runs need it
    from torch.distributed.fsdp import fully_shard
    replace_broken(device, model.embed.weight.dtype)                   # the base was read on a CPU, which has none
    mesh = init_device_mesh(device.type, (ranks()[1],))
    trained = {p for p in model.parameters() if p.requires_grad}
    # what a fingerprint (svd_lora.py) reads of a base is kept: no process has all of it later
    seen = {name: some_values(p.detach()) for name, p in model.named_parameters() if p not in trained}
    for p in trained:
        p.data = p.data.to(device)
    for module in [*model.blocks, model]:
        fully_shard(module, mesh=mesh, ignored_params=trained)
    model.register_state_dict_post_hook(lambda module, state, prefix, local: state.update(seen))


def sharded(model):
    """Whether `shard` has seen this model: it then takes no other adapter."""
    return hasattr(model, "unshard")                          # FSDP's classes have it


def whole(model):
    """A model to generate with: the model itself, or of a sharded one a copy with the whole base, which every process
    holds as long as it keeps the copy. Adapter and λ are the model's own.

    A decode step reads each weight for a few tokens alone. To gather the base anew for every token would take longer
    than the step, and all processes would have to take equally many steps; so it is gathered once, before the first.
    """
    if not sharded(model):
        return model
    from torch.distributed.fsdp import FSDPModule
    full = lambda p: p.full_tensor() if hasattr(p, "full_tensor") else p

    def copied(module):                                       # copy.copy() does not know FSDP's classes and hooks
        twin = object.__new__(next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule)))
        twin.__dict__ = module.__dict__ | {
            "_parameters": {name: full(p) for name, p in module._parameters.items()},
            "_modules": {name: copied(child) for name, child in module._modules.items()},
            "_forward_hooks": {}, "_forward_pre_hooks": {}}
        return twin

    with torch.no_grad():
        return copied(model)
