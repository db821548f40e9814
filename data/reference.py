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
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data.trees import edge_logprobs, pack, predicting_states, row_lengths
from objectives import response_logprobs
from ops.fused import ROWS
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
    Rows are taken in the order of their lengths, so that little is padding; each process takes its share.
    """
    n, used, old = len(rows), list(range(len(rows)) if used is None else used), {}
    if kept:
        known, hashes = _read(kept), {j: [_hash(rows[j].prompt, y) for y in rows[j].responses] for j in used}
        there = torch.tensor([all(h in known for h in hashes[j]) for j in used], device=device).int()
        there = all_sum(there) == ranks()[1]            # in every process: on several nodes some may see no file
        old = {j: torch.tensor([known[h] for h in hashes[j]]) for j, here in zip(used, there.tolist()) if here}
        print(f"log π_ref, the reference's log-probs: {len(used) - len(old)} rows to compute, {len(old)} kept in {kept}"
              + f"; {n - len(used)} rows are not used in so many steps" * (n > len(used)))

    new = [j for j in used if j not in old]
    order = [new[i] for i in row_lengths([rows[j] for j in new]).argsort(stable=True).tolist()]
    logps, counts, tokens = {}, {}, {}

    @torch.no_grad()
    def look(own):
        """log π_ref of these rows; and with `least` how many tokens are likely at each edge, and which."""
        # no forward pass is empty: with fsdp the processes make it together
        batch_rows = [rows[j] for j in own or order[:1]]
        batch = pack(batch_rows, multiple).to(device)
        states = predicting_states(reference, batch)                                  # (N, D)
        pi = response_logprobs(edge_logprobs(reference, batch, states), batch.paths)  # (R,)
        edges = (batch.parents // batch.tokens.shape[1]).bincount(minlength=len(batch_rows)).tolist()  # of each row
        pi = pi.cpu().split([len(row.responses) for row in batch_rows])
        return own, pi, edges, None if least is None else _likely(states, reference.head_weight, least)

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
    everywhere = lambda own, dtype: gathered(own, n, dtype, device)
    logps = everywhere(logps, torch.float32)
    if kept and new:
        known |= {h: x for j in new for h, x in zip(hashes[j], logps[j].tolist())}
        columns = {"hashes": torch.tensor(list(known), dtype=torch.int64), "log_pi": torch.tensor(list(known.values()))}
        write_whole(kept, lambda f: save_file(columns, f))
    allowed = least and list(zip(everywhere(counts, torch.int32), everywhere(tokens, torch.int32)))
    return [old.get(j, logps[j]) for j in range(n)], allowed


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


def _likely(states, head_weight, least):
    """The tokens with a probability of at least `least`, and the likeliest: how many for each of the states (N, D), and
    which, in their order. int32, on the CPU."""
    counts, tokens = [], []
    for h in states.split(ROWS):
        logits = F.linear(h, head_weight).float()                                     # (n, V)
        least_logit = torch.minimum(logits.logsumexp(1) + math.log(least), logits.amax(1))
        likely = logits >= least_logit[:, None]
        counts.append(likely.sum(1).int().cpu())
        tokens.append(likely.nonzero()[:, 1].int().cpu())
    return torch.cat(counts), torch.cat(tokens)
