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

from fused import linear_logprob
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


def pack(rows):
    """Packs TokenRows (data.tokenizers) into one TreeBatch. Every prompt has at least one token."""
    trees = [_tree(row.prompt, row.responses) for row in rows]
    B, T = len(rows), max(len(tokens) for tokens, *_ in trees)
    tokens, positions = np.zeros((B, T), np.int64), np.zeros((B, T), np.int64)
    mask = np.zeros((B, 1, T, T), bool)
    mask[:, 0, np.arange(T), np.arange(T)] = True                             # padding sees itself: no softmax is empty
    parents, targets, paths, pairs, pair_row, better = [], [], [], [], [], []
    for b, (row, (nodes, parent, edges, row_paths)) in enumerate(zip(rows, trees)):
        tokens[b, :len(nodes)] = nodes
        for t, p in enumerate(parent):                                        # a parent stands before its children
            if p >= 0:
                positions[b, t] = positions[b, p] + 1
                mask[b, 0, t] |= mask[b, 0, p]
        offset = len(targets)
        parents += [b * T + node for node, _ in edges]
        targets += [token for _, token in edges]
        pairs += [(len(paths) + first, len(paths) + second) for first, second in row.pairs]
        pair_row += [b] * len(row.pairs)
        better += row.better
        paths += [[offset + e for e in path] for path in row_paths]
    N, L = len(targets), max(map(len, paths))
    tensor = lambda x, *shape: torch.tensor(x, dtype=torch.int64).reshape(*shape)
    return TreeBatch(torch.from_numpy(tokens), torch.from_numpy(positions), torch.from_numpy(mask),
                     tensor(parents, N), tensor(targets, N), tensor([p + [N] * (L - len(p)) for p in paths], -1, L),
                     tensor(pairs, -1, 2), tensor(pair_row, -1),
                     tensor(better, len(better), -1 if better else 0))


def _tree(prompt, responses):
    """One prompt and its responses as a tree.

    Returns nodes (their tokens), parent (of each node, -1 at the root), edges (predicting node, token), and for each
    response its list of edges. A token that nothing follows is predicted but never read: it is an edge and no node.
    """
    nodes, parent = list(prompt), list(range(-1, len(prompt) - 1))
    edges, edge_of, child = [], {}, {}
    paths = []
    for response in responses:
        at, path = len(prompt) - 1, []                                        # at: the node predicting the next token
        for i, token in enumerate(response):
            if (at, token) not in edge_of:
                edge_of[at, token] = len(edges)
                edges.append((at, token))
            path.append(edge_of[at, token])
            if i + 1 < len(response):
                if (at, token) not in child:
                    child[at, token] = len(nodes)
                    nodes.append(token)
                    parent.append(at)
                at = child[at, token]
        paths.append(path)
    return nodes, parent, edges, paths


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
