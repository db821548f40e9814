"""batches.py - the rows of a training step, each under one of G preferences, and the means of losses over them.

B: rows of a batch   G: preferences in a step   R: responses   P: compared pairs   m: dimensions   N: predicted tokens
items: what a loss is a mean of: the P pairs (DPO), the R responses (SFT)
known: (items, m) 1 where an item counts for a dimension: a pair with a label for it, a response that demonstrates it
"""
from dataclasses import dataclass

import torch

from aggregate import denominators
from data.trees import TreeBatch, pack, row_lengths
from runs.processes import share, sum_of_all
from runs.randomness import epoch_batch


def pad_to(device):
    """The multiple that T is padded to: few shapes where each new one costs a fresh set of kernels."""
    return 64 if device.type == "cuda" else 1


@dataclass
class Batch:
    """What one process computes at once: its rows of one micro-batch."""
    rows: list[int]             # (B,) which rows of the data
    group: torch.Tensor         # (B,) which of the G preferences each is under
    tree: TreeBatch
    known: torch.Tensor         # (items, m)
    item_group: torch.Tensor    # (items,) the preference that each item is under
    counts: torch.Tensor        # (G or 1, m) what sums are divided by, and
    absent: torch.Tensor        # (G, m) what is added to the quotients: aggregate.denominators of the whole step
    here: torch.Tensor          # (G,) whether a preference has rows in this micro-batch, in any process

    def mean(self, losses):
        """L (G, m), the mean loss of each dimension under each preference. losses: (items, m)

        The value is the mean over the rows of all processes. The gradient reaches this process's rows alone, and
        runs.processes.reduce_gradients adds up the gradients later. A micro-batch counts the rows of others as 0:
        linear scalarisation is additive, and with Tchebycheff no preference is split between micro-batches.
        """
        G, m = self.absent.shape
        own = losses.new_zeros(G, m).index_add(0, self.item_group, losses * self.known) / self.counts
        return sum_of_all(own) + self.absent

    def over_preferences(self, values):
        """The mean over the G preferences. values: (G,), each one's losses aggregated  ->  ()

        0 counts for a preference whose rows are in other micro-batches: its max λ_i (0 − ideal_i) is no loss. So it
        does with Tchebycheff where no dimension that λ weighs has a label: the value is −inf, and nothing is learned.
        """
        nothing = ~self.here | (values == -torch.inf)
        return values.masked_fill(nothing, 0.0).sum() / len(values)


class Batches:
    """Cuts rows into batches, in an order that is a function of seed and step (runs.randomness.epoch_batch)."""

    def __init__(self, rows, known, flags, G, device, first=0, by_length=False, parts=1):
        """rows: list of TokenRow   known: for each its items, (items, m)   flags: batch_size, seed, aggregate
        first: the number of the batch that step 0 takes   by_length: batches of rows of about one length
        parts: micro-batches per step
        """
        self.rows, self.known, self.flags, self.device = rows, known, flags, device
        self.first, self.parts = first, parts
        self.group = torch.arange(flags.batch_size) // (flags.batch_size // G)        # (B,)
        self.labels, self.G = torch.stack([x.sum(0) for x in known]), G               # (rows, m)
        self.expected = self.labels.mean(0) * (flags.batch_size // G)                 # (m,) under one preference
        self.lengths = row_lengths(rows) if by_length else None
        self.multiple = pad_to(device)

    def take(self, step, part=0):
        """The Batch of a step; with micro-batches one part of it, with several processes this one's rows of that."""
        flags = self.flags
        chosen = epoch_batch(len(self.rows), flags.batch_size, flags.seed, self.first + step, self.lengths)    # (B,)
        labels = torch.zeros(self.G, self.labels.shape[1]).index_add(0, self.group, self.labels[chosen])       # (G, m)
        counts, absent = denominators(labels.to(self.device), self.expected.to(self.device), flags.aggregate)
        whole = torch.arange(flags.batch_size).chunk(self.parts)[part]                # of all processes
        here, mine = torch.isin(torch.arange(self.G), self.group[whole]), whole[share()]
        rows, group = chosen[mine].tolist(), self.group[mine]
        tree, known = pack([self.rows[j] for j in rows], self.multiple), [self.known[j] for j in rows]
        item_group = group.repeat_interleave(torch.tensor([len(x) for x in known]))
        return Batch(rows, group, tree.to(self.device), torch.cat(known).to(self.device), item_group.to(self.device),
                     counts, absent + torch.zeros_like(labels, device=self.device), here.to(self.device))
