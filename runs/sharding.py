"""sharding.py - FSDP2: a frozen base that is too large for one GPU, shared out among the processes."""
from runs.processes import ranks
from svd_lora import some_values


def shard(model, device):
    """FSDP2, in place: each process keeps its share of the frozen base on `device` and gathers a block when it computes
    with it. What is trained, the adapter, stays whole everywhere. The base may come from the CPU's memory."""
    from torch.distributed.device_mesh import init_device_mesh         # here: slow to import, and few runs need it
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh(device.type, (ranks()[1],))
    trained = {p for p in model.parameters() if p.requires_grad}
    # what a fingerprint (svd_lora.py) reads of a base is kept: no process has all of it later
    seen = {name: some_values(p.detach()) for name, p in model.named_parameters() if p not in trained}
    for p in trained:
        p.data = p.data.to(device)
    for module in [*model.blocks, model]:
        fully_shard(module, mesh=mesh, ignored_params=trained)
    model.register_state_dict_post_hook(lambda module, state, prefix, local: state.update(seen))
