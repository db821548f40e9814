"""threads.py - a CPU's cores as workers side by side, each with operations of its own.

Several cores on one operation meet at its end, and the operations of a tiny model are over before that pays. Batches
and rows that do not depend on each other need no meeting: every thread takes its own and computes it on one core
(Python's lock is free while torch computes).
"""
from concurrent.futures import ThreadPoolExecutor

import torch


def side_by_side(work, parts):
    """Yields work(part) of all parts, in their order, computed by as many threads as torch would give one operation.

    work may neither train nor set a λ: the threads share the model. Settings of a thread, such as torch.no_grad, are
    to be made inside work.
    """
    n = torch.get_num_threads()
    if n == 1 or len(parts) == 1:
        yield from map(work, parts)
        return
    try:
        with ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(work, parts)
    finally:
        torch.set_num_threads(n)                              # a library has this setting once for all threads
