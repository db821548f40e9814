"""reference.py - log π_ref(y|x), once: of the rows that a training will use, kept on disk for the next training.

The reference is the model with its adapter off, so log π_ref depends on the base and on the tokens alone: a seed sweep,
or another way to draw λ, asks for what is known. Two numbers are kept for each response: a hash of its tokens with its
prompt's, and log π_ref.

N: edges, predicted tokens   D: d_model   V: vocabulary   R: responses
"""
import hashlib
import math

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data.tokenizers import TokenRow
from data.trees import edge_logprobs, pack, predicting_states, row_lengths, tree_of
from objectives import response_logprobs
from ops.fused import ROWS, log_partition, product
from ops.generation import frozen, is_tiny
from ops.threads import side_by_side
from runs.files import UserError, bar, write_whole
from runs.processes import all_sum, gathered, ranks, share
from svd_lora import adapters_off, fingerprint


@torch.no_grad()
def reference_logprobs(model, rows, batch_size, multiple, device, least=None, used=None, kept=None):
    """log π_ref of every response, by the model with its adapter off: a list with one (responses,) CPU tensor per row.

    Beside it, where `least` is given, the tokens to which π_ref gives at least this probability at the edges of each
    row (data/trees.py), the likeliest in any case: a list of (counts (edges,), tokens). Else None.
    used: the rows that are asked for, the others' tensors are empty (default: all rows)
    kept: a file of this base (kept_file) that is read, and written with what is new; not together with `least`
    A response that several rows have after the same prompt is computed once. Trees are taken in the order of their
    lengths, so that little is padding; each process takes its share.
    """
    n, used = len(rows), list(range(len(rows)) if used is None else used)
    hashes = {j: [_hash(rows[j].prompt, y) for y in rows[j].responses] for j in used}
    known = {}
    if kept:
        in_file, asked = _read(kept), sorted({h for j in used for h in hashes[j]})
        # what every process knows: on several nodes some may see no file
        there = all_sum(torch.tensor([h in in_file for h in asked], device=device).int()) == ranks()[1]
        known = {h: in_file[h] for h, everywhere in zip(asked, there.tolist()) if everywhere}
    new = [j for j in used if not all(h in known for h in hashes[j])]
    if kept:
        print(f"log π_ref, the reference's log-probs: {len(new)} rows to compute, {len(used) - len(new)} kept in {kept}"
              + f"; {n - len(used)} rows are not used in so many steps" * (n > len(used)))

    trees = _distinct([rows[j] for j in new], [hashes[j] for j in new], known)
    order = row_lengths([row for row, _ in trees]).argsort(stable=True).tolist()
    logps, counts, tokens = {}, {}, {}

    @torch.no_grad()
    def look(own):
        """log π_ref of these trees; and with `least` how many tokens are likely at each edge, and which."""
        # no forward pass is empty: with fsdp the processes make it together
        batch_rows = [trees[i][0] for i in own or order[:1]]
        batch = pack(batch_rows, multiple).to(device)
        states = predicting_states(reference, batch)                                  # (N, D)
        logp = edge_logprobs(reference, batch, states)                                # (N,)
        pi = response_logprobs(logp, batch.paths)                                     # (R,)
        edges = (batch.parents // batch.tokens.shape[1]).bincount(minlength=len(batch_rows)).tolist()  # of each tree
        pi = pi.cpu().split([len(row.responses) for row in batch_rows])
        likely = None if least is None else _likely(states, reference.head_weight, batch.targets, logp, least)
        return own, pi, edges, likely

    with adapters_off(model):
        shares = [order[i:i + batch_size][share()] for i in range(0, len(order), batch_size)]
        alone = is_tiny(model) and ranks()[1] == 1
        reference = frozen(model, pack=True) if alone else model
        for own, pi, edges, likely in bar(side_by_side(look, shares) if alone else map(look, shares), "log π_ref",
                                          len(shares)):
            logps |= zip(own, pi)
            if likely:
                count, token = likely
                counts |= zip(own, count.split(edges))
                tokens |= zip(own, token.split([each.sum().item() for each in count.split(edges)]))
    everywhere = lambda own, dtype: gathered(own, len(trees), dtype, device)
    for (_, ids), own in zip(trees, everywhere(logps, torch.float32)):
        known |= zip(ids, own.tolist())
    if kept and new:
        known = in_file | known
        columns = {"hashes": torch.tensor(list(known), dtype=torch.int64), "log_pi": torch.tensor(list(known.values()))}
        write_whole(kept, lambda f: save_file(columns, f))
    allowed = least and _allowed(rows, hashes, trees, everywhere(counts, torch.int32), everywhere(tokens, torch.int32))
    return [torch.tensor([known[h] for h in hashes.get(j, ())]) for j in range(n)], allowed


def _distinct(rows, hashes, known):
    """The responses of the rows, each once after its prompt, without those that are known: as new TokenRows no longer
    than the longest of the rows, in lexicographic order, in which neighbours share most. -> [(TokenRow, hashes)]
    """
    by_prompt = {}
    for row, ids in zip(rows, hashes):
        found = by_prompt.setdefault(tuple(row.prompt), {})
        found |= {h: y for h, y in zip(ids, row.responses) if h not in known}
    longest, trees = max(row_lengths(rows).tolist(), default=0), []
    for prompt, found in by_prompt.items():
        room = -1
        for h, y in sorted(found.items(), key=lambda item: item[1]):
            if len(y) > room:
                trees.append((list(prompt), [], []))
                room = longest - len(prompt)
            trees[-1][1].append(y), trees[-1][2].append(h)
            room -= len(y)
    return [(TokenRow(prompt, responses), ids) for prompt, responses, ids in trees]


def _allowed(rows, hashes, trees, counts, tokens):
    """For each row that has hashes the (counts, tokens) of its own tree's edges, from those of the trees: the t-th edge
    on a response's path is the same prediction in either tree. Edges are numbered through all trees."""
    starts = np.cumsum([0, *map(len, counts)])                          # edges before each tree
    path_of = {h: start + path for (row, ids), start in zip(trees, starts) for h, path in zip(ids, tree_of(row).paths)}
    none = torch.zeros(0, dtype=torch.int32)
    counts, tokens = torch.cat([none, *counts]), torch.cat([none, *tokens])
    first, allowed = counts.cumsum(0) - counts, [(none, none)] * len(rows)            # first: of each edge's tokens
    for j, ids in hashes.items():
        own = tree_of(rows[j])
        edge = np.empty(len(own.targets), np.int64)                     # the number of each edge of the row
        for h, path in zip(ids, own.paths):
            edge[path] = path_of[h]
        n = counts[edge]
        place = (first[edge] - (n.cumsum(0) - n)).repeat_interleave(n) + torch.arange(int(n.sum()))
        allowed[j] = n, tokens[place]
    return allowed


def kept_file(out, model, dtype, quantize):
    """Where log π_ref of this base is kept, in this precision: beside the run directory `out`, for all runs there."""
    return out.parent / "reference" / f"{fingerprint(model)}-{str(dtype).removeprefix('torch.')}-{quantize}.safetensors"


def _hash(prompt, response):
    """64 bits of token ids, as a signed integer."""
    ids = np.array([len(prompt), *prompt, *response], np.int32)
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little", signed=True)


def _read(path):
    """{hash: log π_ref} of a file, or of none."""
    if not path.exists():
        return {}
    try:
        columns = load_file(path)
        return dict(zip(columns["hashes"].tolist(), columns["log_pi"].tolist()))
    except (SafetensorError, KeyError, OSError):
        raise UserError(f"{path} is no file of log π_ref; delete it, and it is made anew") from None


def _likely(states, head_weight, targets, logps, least):
    """The tokens with a probability of at least `least`, and the likeliest: how many for each of the states (N, D), and
    which, in their order. int32, on the CPU. targets, logps: (N,), a token of each state and its log-prob."""
    counts, tokens = [], []
    for h, y, logp in zip(*(t.split(ROWS) for t in (states, targets, logps))):
        logits = product(h, head_weight).float()                                      # (n, V)
        least_logit = torch.minimum(log_partition(h, head_weight, y, logp) + math.log(least), logits.amax(1))
        likely = logits >= least_logit[:, None]
        counts.append(likely.sum(1).int().cpu())
        tokens.append(likely.nonzero()[:, 1].int().cpu())
    return torch.cat(counts), torch.cat(tokens)
