"""threads.py - several processes as threads of this one, which start at once: what the project uses of
torch.distributed (but not FSDP), with the threads as ranks."""
import threading
import time

import pytest
import torch
import torch.distributed as dist


def in_processes(n, work):
    """work() in n threads, each of which is one of n processes for runs/processes.py. Returns their results. Where one
    waits for another that has ended, it gets a BrokenBarrierError; none is hurried."""
    here, meeting, slots, results, errors = threading.local(), threading.Barrier(n), [None] * n, {}, []

    def all_reduce(x, op=dist.ReduceOp.SUM):
        slots[here.rank] = x.clone()
        meeting.wait()
        whole = torch.stack(slots).sum(0) if op == dist.ReduceOp.SUM else torch.stack(slots).amax(0)
        meeting.wait()                                        # all have read: the slots may be filled again
        x.copy_(whole)

    def process(rank):
        here.rank = rank
        try:
            results[rank] = work()
        except BaseException as e:
            errors.append(e)
            meeting.abort()                                   # nobody waits for it

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "0")                             # init_distributed sees torchrun by it
        for name, function in {"is_initialized": lambda: hasattr(here, "rank"), "get_rank": lambda: here.rank,
                               "get_world_size": lambda: n, "all_reduce": all_reduce, "barrier": meeting.wait}.items():
            patch.setattr(dist, name, function)
        threads = [threading.Thread(target=process, args=(rank,)) for rank in range(n)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.01)
            if results and meeting.n_waiting:                 # for a thread that will never come
                meeting.abort()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return [results[rank] for rank in range(n)]
