"""trees.py - batches in which the responses to one prompt share their common beginnings.

One row of a batch is a prompt with all its responses, packed as a tree of tokens: the prompt is the trunk, and two
responses part where they first differ. A token attends to its ancestors alone, so each response sees exactly what it
would see in a row of its own, but the prompt and every shared beginning are computed once. (For two responses to a
prompt that is the prompt once instead of twice; for the embedded world's many short responses it is 3 to 6 times less.)

B: rows   T: nodes of the largest tree   R: responses   N: predicted tokens (edges)   L: tokens of the longest response
P: pairs   m: dimensions
"""
from dataclasses import dataclass, fields

import numpy as np
import torch

from ops.fused import linear_logprob
from objectives import response_logprobs


@dataclass
class TreeBatch:
    """B packed rows. All indices are int64 tensors."""
    tokens: torch.Tensor        # (B, T)          padded with 0
    positions: torch.Tensor     # (B, T)          depth in the tree = position in the sequence
    mask: torch.Tensor          # (B, 1, T, T)    True where a token may attend: itself and its ancestors
    parents: torch.Tensor       # (N,)            b·T + t of the node whose hidden state predicts the token
    targets: torch.Tensor       # (N,)            the predicted token
    paths: torch.Tensor         # (R, L)          each response's tokens as indices into the N; N pads
    pairs: torch.Tensor         # (P, 2)          the compared responses, as indices into the R
    pair_row: torch.Tensor      # (P,)            the row of each pair
    better: torch.Tensor        # (P, m)          0: the first is better, 1: the second, -1: no label
    nodes: torch.Tensor         # (B,)            how many of a row's T are nodes; the others are padding

    def to(self, device):
        """The same batch on another device."""
        return TreeBatch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    @property
    def rows(self):
        """The row of each predicted token. (N,)"""
        return self.parents // self.tokens.shape[1]

    @property
    def on_path(self):
        """1 where a response has a token, 0 on its padding on the right. (R, L) fp32"""
        return (self.paths < len(self.targets)).float()

    def along(self, x):
        """What belongs to predicted tokens, (N,) or (N, n), laid out by responses: (R, L) or (R, L, n); 0: padding."""
        padded = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
        # not padded[paths]: its backward adds in a free order, and equal runs would differ in the last bits
        return padded.index_select(0, self.paths.flatten()).view(*self.paths.shape, *x.shape[1:])


def pack(rows, multiple=1):
    """Packs TokenRows (data.tokenizers) into one TreeBatch. Every prompt has at least one token.

    multiple: T is padded up to a multiple of it, so that few different shapes occur.
    """
    trees = [_tree(row.prompt, row.responses) for row in rows]
    B, longest = len(rows), max(len(tokens) for tokens, *_ in trees)
    T = -(-longest // multiple) * multiple
    N, R = sum(len(targets) for *_, targets, _ in trees), sum(len(row.responses) for row in rows)
    L = max((len(path) for *_, row_paths in trees for path in row_paths), default=0)
    tokens, positions = np.zeros((B, T), np.int64), np.zeros((B, T), np.int64)
    mask = np.zeros((B, 1, T, T), bool)
    mask[:, 0, np.arange(T), np.arange(T)] = True                             # padding sees itself: no softmax is empty
    causal = np.tri(longest, dtype=bool)
    paths = np.full((R, L), N, np.int64)
    parents, targets, pairs, pair_row, better, edges, r = [], [], [], [], [], 0, 0
    for b, (row, (nodes, chains, predicting, predicted, row_paths)) in enumerate(zip(rows, trees)):
        tokens[b, :len(nodes)] = nodes
        for start, end, parent in chains:                                     # a parent stands before its children
            n = end - start
            if parent >= 0:
                positions[b, start:end] = positions[b, parent] + 1
                mask[b, 0, start:end] = mask[b, 0, parent]                    # what the parent sees …
            positions[b, start:end] += np.arange(n)
            mask[b, 0, start:end, start:end] = causal[:n, :n]                 # … and the chain up to the node itself
        parents.append(b * T + predicting)
        targets.append(predicted)
        pairs += [(r + first, r + second) for first, second in row.pairs]
        pair_row += [b] * len(row.pairs)
        better += row.better
        for path in row_paths:
            paths[r, :len(path)] = edges + path
            r += 1
        edges += len(predicted)
    tensor = lambda x, *shape: torch.tensor(x, dtype=torch.int64).reshape(*shape)
    return TreeBatch(torch.from_numpy(tokens), torch.from_numpy(positions), torch.from_numpy(mask),
                     torch.from_numpy(np.concatenate(parents)), torch.from_numpy(np.concatenate(targets)),
                     torch.from_numpy(paths), tensor(pairs, -1, 2), tensor(pair_row, -1),
                     tensor(better, len(better), -1 if better else 0), tensor([len(nodes) for nodes, *_ in trees], -1))


def _tree(prompt, responses):
    """One prompt and its responses as a tree, in numpy: no loop over tokens.

    Returns nodes (their tokens); chains, a list of (start, end, parent): nodes start to end − 1 follow each other, the
    first of them after the node `parent` (-1: the root); of each edge the predicting node and the predicted token; and
    for each response its edges. A token that nothing follows is predicted but never read: it is an edge and no node.
    """
    R, L = len(responses), max(map(len, responses), default=0)
    lengths = np.array([len(response) for response in responses], np.int64)
    ids = np.full((R, L), -1, np.int64)                                       # -1 - r: padding equals no token
    for r, response in enumerate(responses):
        ids[r, :len(response)], ids[r, len(response):] = response, -1 - r
    nodes, chains, n = [np.array(prompt, np.int64)], [(0, len(prompt), -1)], len(prompt)
    node_of, edge_of = np.zeros((R, L), np.int64), np.zeros((R, L), np.int64)  # of each token of each response
    predicting, predicted, e = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for r, length in enumerate(lengths.tolist()):
        edges = held = 0                                # how many of its first tokens have an edge, and a node, already
        if r:
            common = np.logical_and.accumulate(ids[:r] == ids[r], axis=1).sum(1)          # (r,) with each one before it
            edges, held = int(common.max()), max(0, int(np.minimum(common, lengths[:r] - 1).max()))
            edge_of[r, :edges] = edge_of[common.argmax(), :edges]
            node_of[r, :held] = node_of[np.minimum(common, lengths[:r] - 1).argmax(), :held]
        new = max(0, length - 1 - held)
        node_of[r, held:held + new] = np.arange(n, n + new)
        edge_of[r, edges:length] = np.arange(e, e + length - edges)
        before = np.concatenate([[len(prompt) - 1], node_of[r, :max(0, length - 1)]])     # the node before each token
        if new:
            nodes.append(ids[r, held:held + new])
            chains.append((n, n + new, int(before[held])))
        predicting.append(before[edges:length])
        predicted.append(ids[r, edges:length])
        n, e = n + new, e + length - edges
    return (np.concatenate(nodes), chains, np.concatenate(predicting), np.concatenate(predicted),
            [edge_of[r, :length] for r, length in enumerate(lengths)])


def row_lengths(rows):
    """About how many nodes the tree of each TokenRow has: (n,)."""
    return torch.tensor([len(row.prompt) + sum(map(len, row.responses)) for row in rows])


def predicting_states(model, batch):
    """The hidden states that predict the N tokens of a TreeBatch: (N, D)."""
    hidden = model(batch.tokens, batch.positions, batch.mask, return_hidden=True)     # (B, T, D)
    # index_select and not [ ]: its backward adds in a fixed order, so that runs repeat bit for bit
    return hidden.flatten(0, 1).index_select(0, batch.parents)                        # (B·T, D) -> (N, D)


def path_logprobs(model, batch, states=None):
    """log π(y_t | x, y_<t) of every response's every token: (R, L) fp32, 0 on padding. states: (N, D), if at hand."""
    states = predicting_states(model, batch) if states is None else states
    return batch.along(linear_logprob(states, model.head_weight, batch.targets))


def batch_logprobs(model, batch):
    """log π(y|x) of every response of a TreeBatch: (R,) fp32."""
    return response_logprobs(linear_logprob(predicting_states(model, batch), model.head_weight, batch.targets),
                             batch.paths)
