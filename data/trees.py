"""trees.py - batches in which the responses to one prompt share their common beginnings.

One row of a batch is a prompt with all its responses, packed as a tree of tokens: the prompt is the trunk, and two
responses part where they first differ. A token attends to its ancestors alone, so each response sees exactly what it
would see alone in a row, but the prompt and every shared beginning are computed once. (For two responses to a
prompt that is the prompt once instead of twice; for the embedded world's many short responses it is 3 to 6 times less.)

An example: the prompt 11 12 and the responses 21 22 0, 21 23 24 0 and 30 0, where 0 ends a response.

    node:token    0:11 -- 1:12 -+- 2:21 -+- 3:22 ---------- (0)
                                |        +- 4:23 -- 5:24 -- (0)
                                +- 6:30 ------------------- (0)

A *node* is a token that the model reads. The last token of a response, here (0), is a target and never an input, so it
has no node. An *edge* is a predicted token: it goes from the node that predicts it (parents) to that token (targets).
A *chain* (start, end, parent) is a run of nodes without a fork: nodes start to end - 1 follow each other, and the first
of them follows the node `parent` (-1: none). Each response adds at most one chain, the part that is new.

    chains       (0, 2, -1) (2, 4, 1) (4, 6, 2) (6, 7, 1)
    node          0  1  2  3  4  5  6
    tokens       11 12 21 22 23 24 30
    positions     0  1  2  3  3  4  2
    edge          0  1  2  3  4  5  6  7
    parents       1  2  3  2  4  5  1  6
    targets      21 22  0 23 24  0 30  0
    paths        0 1 2 8 / 0 3 4 5 / 6 7 8 8        one response after the other, as edges; N = 8 is padding

B: rows   T: nodes of the largest tree   R: responses   N: edges   L: tokens of the longest response   D: d_model
P: pairs   m: dimensions
"""
import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from objectives import response_logprobs
from ops.fused import linear_logprob


@dataclass
class TreeBatch:
    """B packed rows. All indices are int64 tensors."""
    tokens: torch.Tensor        # (B, T)          of the nodes, padded with 0
    positions: torch.Tensor     # (B, T)          depth in the tree = position in the sequence
    mask: torch.Tensor          # (B, 1, T, T)    True where a node may attend: itself and its ancestors
    parents: torch.Tensor       # (N,)            for each edge b·T + t, the node whose hidden state predicts the token
    targets: torch.Tensor       # (N,)            for each edge the predicted token
    paths: torch.Tensor         # (R, L)          each response's tokens as edges, indices into the N; N is padding
    pairs: torch.Tensor         # (P, 2)          the compared responses, as indices into the R
    pair_row: torch.Tensor      # (P,)            the row of each pair
    better: torch.Tensor        # (P, m)          0: the first is better, 1: the second, -1: no label
    nodes: list[int]            # (B,)            how many of the T of each row are nodes; the rest is padding

    def to(self, device):
        """The same batch on another device."""
        tensors = {name: x for name, x in vars(self).items() if torch.is_tensor(x)}
        return replace(self, **{name: x.to(device, non_blocking=True) for name, x in tensors.items()})

    @property
    def size(self):
        """How many tokens run through the blocks, and how many of them the head predicts."""
        return sum(self.nodes), len(self.targets)

    @property
    def on_path(self):
        """1 where a response has a token, 0 on its padding on the right. (R, L) fp32"""
        return (self.paths < len(self.targets)).float()

    def along(self, x):
        """x, values of the edges, (N,) or (N, …), laid out along the responses: (R, L) or (R, L, …), 0 on padding."""
        padded = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
        # not padded[paths]: its backward adds in a free order, and equal runs would differ in the last bits
        return padded.index_select(0, self.paths.flatten()).view(*self.paths.shape, *x.shape[1:])


class Tree(NamedTuple):
    """One row as a tree, in numpy. The names are those of the drawing above; its edges are counted from 0."""
    nodes: np.ndarray           # their tokens
    chains: list[tuple]
    parents: np.ndarray         # of the edges
    targets: np.ndarray         # of the edges
    paths: list[np.ndarray]     # of each response
    pairs: np.ndarray           # (P, 2)
    better: np.ndarray          # (P, m)


def pack(rows, multiple=1):
    """Packs TokenRows (data.tokenizers) into one TreeBatch. Every prompt has at least one token.

    multiple: T is padded up to a multiple of it, so that few different shapes occur.
    """
    trees = [tree_of(row) for row in rows]
    B, longest = len(rows), max(len(tree.nodes) for tree in trees)
    T = -(-longest // multiple) * multiple
    N, R = sum(len(tree.targets) for tree in trees), sum(len(tree.paths) for tree in trees)
    L = max((len(path) for tree in trees for path in tree.paths), default=0)
    tokens, positions = np.zeros((B, T), np.int64), np.zeros((B, T), np.int64)
    mask = np.zeros((B, 1, T, T), bool)
    mask[:, 0, np.arange(T), np.arange(T)] = True                             # padding sees itself: no softmax is empty
    causal = np.tri(longest, dtype=bool)
    paths = np.full((R, L), N, np.int64)
    parents, pairs = [], []
    edges = r = 0                                                             # how many the rows before this one have
    for b, tree in enumerate(trees):
        tokens[b, :len(tree.nodes)] = tree.nodes
        for start, end, parent in tree.chains:                                # a parent comes before its children
            n = end - start
            if parent >= 0:
                positions[b, start:end] = positions[b, parent] + 1
                mask[b, 0, start:end] = mask[b, 0, parent]                    # what the parent sees …
            positions[b, start:end] += np.arange(n)
            mask[b, 0, start:end, start:end] = causal[:n, :n]                 # … and the chain up to the node itself
        parents.append(b * T + tree.parents)
        pairs.append(r + tree.pairs)
        for path in tree.paths:
            paths[r, :len(path)] = edges + path
            r += 1
        edges += len(tree.targets)
    # a row without pairs does not know m: its labels are (0, 0), and fit beside no others
    better = [tree.better for tree in trees if len(tree.better)] or [trees[0].better]
    arrays = (tokens, positions, mask, np.concatenate(parents), np.concatenate([tree.targets for tree in trees]), paths,
              np.concatenate(pairs), np.repeat(np.arange(B), [len(tree.pairs) for tree in trees]),
              np.concatenate(better))
    return TreeBatch(*map(torch.from_numpy, arrays), [len(tree.nodes) for tree in trees])


def with_prefix(batch, ids):
    """The TreeBatch whose prompts begin with other tokens: ids (B, n), n more in front of every row, or (n,), the same
    for all. Equal to packing the longer prompts."""
    (B, T), device = batch.tokens.shape, batch.tokens.device
    ids = ids.to(device).expand(B, -1)
    n = ids.shape[1]
    real = torch.arange(T, device=device) < torch.tensor(batch.nodes, device=device)[:, None]      # (B, T) not padding
    mask = torch.zeros(B, 1, n + T, n + T, dtype=torch.bool, device=device)
    mask[:, :, :n, :n] = torch.ones(n, n, dtype=torch.bool, device=device).tril()
    mask[:, 0, n:, :n] = real[:, :, None]                                             # every node descends from all n
    mask[:, :, n:, n:] = batch.mask
    row, node = batch.parents // T, batch.parents % T
    positions = torch.cat([torch.arange(n, device=device).expand(B, n), batch.positions + n * real], dim=1)
    return replace(batch, tokens=torch.cat([ids, batch.tokens], dim=1), positions=positions, mask=mask,
                   parents=row * (n + T) + n + node, nodes=[n + nodes for nodes in batch.nodes])


@functools.lru_cache(maxsize=512)               # for rows that soon come back: those of the embedded world's training
def tree_of(row):
    """The Tree of a TokenRow, without a loop over tokens."""
    prompt, responses = row.prompt, row.responses
    R, L = len(responses), max(map(len, responses), default=0)
    ids = np.full((R, L), -1, np.int64)                                       # -1 - r: padding equals no token
    for r, response in enumerate(responses):
        ids[r, :len(response)], ids[r, len(response):] = response, -1 - r
    nodes, chains, n = [np.array(prompt, np.int64)], [(0, len(prompt), -1)], len(prompt)       # n: nodes so far
    parents, targets, e = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0                  # e: edges so far
    node_of, edge_of = np.zeros((R, L), np.int64), np.zeros((R, L), np.int64)  # of each token of each response
    order = sorted(range(R), key=responses.__getitem__)                       # as in a dictionary: branch by branch
    for s, r in zip([None, *order], order):                                   # s: the response before r
        # 1. what r shares with s, and so with any earlier one: edges for the first `old_edges` tokens, nodes for the
        #    first `old_nodes`. The second may be one less: the last token of a response has an edge, but no node
        length, old_edges, old_nodes = len(responses[r]), 0, 0
        if s is not None:
            old_edges = int(np.logical_and.accumulate(ids[s] == ids[r]).sum())
            old_nodes = max(0, min(old_edges, len(responses[s]) - 1))
            edge_of[r, :old_edges], node_of[r, :old_nodes] = edge_of[s, :old_edges], node_of[s, :old_nodes]

        # 2. number the new ones; the last token of the response gets no node
        new = max(0, length - 1 - old_nodes)
        node_of[r, old_nodes:old_nodes + new] = np.arange(n, n + new)
        edge_of[r, old_edges:length] = np.arange(e, e + length - old_edges)

        # 3. add them; before[t] is the node that predicts the response's token t
        before = np.concatenate([[len(prompt) - 1], node_of[r, :max(0, length - 1)]])     # (length,)
        if new:
            nodes.append(ids[r, old_nodes:old_nodes + new])
            chains.append((n, n + new, int(before[old_nodes])))
        parents.append(before[old_edges:length])
        targets.append(ids[r, old_edges:length])
        n, e = n + new, e + length - old_edges
    return Tree(np.concatenate(nodes), chains, np.concatenate(parents), np.concatenate(targets),
                [edge_of[r, :len(response)] for r, response in enumerate(responses)],
                np.array(row.pairs, np.int64).reshape(-1, 2),
                np.array(row.better, np.int64).reshape(len(row.better), -1 if row.better else 0))


def pack_ends(rows, multiple=1):
    """TokenRows -> (TreeBatch, last). last (R,) holds the index b·T + t of the last token of every response: what a
    reward model reads. multiple: as in pack.

    The last token of a response has no node. So one more token is put behind every response: that one is now the last,
    and the node that predicts it is the response's true last token.
    """
    batch = pack([replace(row, responses=[ids + [0] for ids in row.responses]) for row in rows], multiple)
    lengths = (batch.paths < len(batch.targets)).sum(1, keepdim=True)                 # (R, 1)
    return batch, batch.parents[batch.paths.gather(1, lengths - 1)[:, 0]]


def row_lengths(rows):
    """About how many nodes the tree of each TokenRow has: (n,)."""
    return torch.tensor([len(row.prompt) + sum(map(len, row.responses)) for row in rows])


def predicting_states(model, batch):
    """The hidden states that predict the N edges of a TreeBatch: (N, D)."""
    hidden = model(batch.tokens, batch.positions, batch.mask, return_hidden=True)     # (B, T, D)
    # index_select and not [ ]: its backward adds in a fixed order, so that runs repeat bit for bit
    return hidden.flatten(0, 1).index_select(0, batch.parents)                        # (B·T, D) -> (N, D)


def edge_logprobs(model, batch, states=None):
    """log π(y_t | x, y_<t) of every edge: (N,) fp32. states: what predicting_states gives, where it is computed
    already."""
    states = predicting_states(model, batch) if states is None else states
    return linear_logprob(states, model.head_weight, batch.targets)


def path_logprobs(model, batch, states=None):
    """log π(y_t | x, y_<t) of every token of every response: (R, L) fp32, 0 on padding. states: as above."""
    return batch.along(edge_logprobs(model, batch, states))


def batch_logprobs(model, batch):
    """log π(y|x) of every response of a TreeBatch: (R,) fp32."""
    return response_logprobs(edge_logprobs(model, batch), batch.paths)
