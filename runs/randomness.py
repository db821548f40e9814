"""randomness.py - random numbers and the order of the data, as functions of a seed and a step.

Step t of a run draws everything from its own generator, seeded by (seed, stream, t). So a resumed run needs no stored
random state and continues bit for bit, and several processes draw the same numbers.
"""
import functools
import hashlib

import torch


def generator_for(seed, stream, step=0):
    """A CPU generator of its own for (seed, stream, step); stream names what it is for ("lambda", "batch", …)."""
    # hashed to 32 bits: that is all torch's CPU generator looks at, and step << 32 would be the same seed every step
    digest = hashlib.sha256(f"{seed}/{stream}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def epoch_batch(n, size, seed, step, lengths=None):
    """The indices of batch number `step` when n items are shuffled anew each epoch and cut into batches of `size`;
    a batch may straddle two epochs. Returns (size,) int64.

    lengths: (n,), where the items are not alike; then the items of a batch are about equally long, so that little of it
    is padding. Every item still comes once an epoch, and batches come in a random order.
    """
    first, last = step * size // n, ((step + 1) * size - 1) // n
    order = torch.cat([_epoch_order(n, size, seed, epoch, lengths) for epoch in range(first, last + 1)])
    return order[step * size - first * n:][:size]


def items_of_steps(n, size, seed, steps, lengths=None):
    """The items, in rising order, that the first `steps` batches of epoch_batch hold: all n from one epoch on."""
    return sorted(_epoch_order(n, size, seed, 0, lengths)[:steps * size].tolist())


@functools.lru_cache(maxsize=4)                         # a step asks for the epoch that the step before asked for
def _epoch_order(n, size, seed, epoch, lengths):
    """The order of one epoch, (n,). With lengths: windows of 64 batches are sorted, each cut into batches."""
    order = torch.randperm(n, generator=generator_for(seed, "epoch", epoch))
    head = -epoch * n % size                            # what the last batch of the epoch before still takes
    whole = max(0, n - head) // size                    # batches that lie within this epoch
    if lengths is None or whole == 0:
        return order
    window = max(1, min(64, whole // 4))                # several, or each epoch would have the same batches
    windows = order[head:head + whole * size].split(window * size)
    batches = torch.cat([w[lengths[w].argsort(stable=True)].view(-1, size) for w in windows])         # (whole, size)
    shuffled = batches[torch.randperm(whole, generator=generator_for(seed, "batches", epoch))]
    return torch.cat([order[:head], shuffled.flatten(), order[head + whole * size:]])
