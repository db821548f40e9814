"""attention.py - attention in a tree of tokens, where each sees few of the others.

In a batch of trees (data/trees.py) a token attends to its ancestors alone: to some thirty of some four hundred. Plain
attention computes all T x T scores and throws most of them away. Here Q neighbours are one block of queries, and a
block is given only the keys that at least one of them sees. Neighbours lie on the same branch (pack goes through a
tree branch by branch), so a block of 32 sees about 60 keys, not 400.

B: rows   T: tokens of a row   H: heads   G: key heads   C: head_dim   n: blocks of all rows   K: keys of a block
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ops.fused import wide

Q = 32                      # queries of a block
LEAST = 2                   # how many times fewer the keys must be, for the copies of keys that blocks make


@dataclass
class Blocks:
    """A mask by blocks of queries. The last block of a row may have queries too many: they see a key, to no effect."""
    keys: torch.Tensor      # (n, K)          each block's keys, as indices b·T + t into the B·T tokens
    mask: torch.Tensor      # (n, 1, Q, K)    additive: 0 where a query sees the key, else -inf; fp32, or float64


def additive(mask, dtype):
    """What attention() takes for a bool mask (…, T, M), True where a token may attend: 0 there and -inf elsewhere; or
    the same as Blocks, on a CPU and where that leaves out enough keys."""
    blocks = None
    if mask.device.type == "cpu" and mask.shape[-1] == mask.shape[-2] > LEAST * Q and not torch.compiler.is_compiling():
        blocks = by_blocks(mask, dtype)
    return blocks or filled(mask, dtype)


def filled(mask, dtype):
    """0 where a bool mask is True, else -inf."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def by_blocks(mask, dtype):
    """Blocks of a bool mask (B, 1, T, T); None where more than T / LEAST keys would be left."""
    B, T = mask.shape[0], mask.shape[-1]
    mask = F.pad(mask.view(B, T, T), (0, 0, 0, -T % Q)).view(-1, Q, T)                # (B, T, T) -> (n, Q, T)
    seen = mask.any(1)                                                                # (n, T)
    K = max(1, int(seen.sum(1).max()))
    if LEAST * K > T:
        return None
    keys = seen.byte().sort(dim=1, descending=True, stable=True).indices[:, :K]       # those that are seen, in order
    sees = mask.gather(2, keys[:, None].expand(-1, Q, -1))                            # (n, Q, K)
    sees[..., 0] |= ~sees.any(-1)                                                     # no softmax is empty
    row = torch.arange(B).repeat_interleave(len(keys) // B)                           # (n,)
    return Blocks(row[:, None] * T + keys, filled(sees[:, None], torch.promote_types(dtype, torch.float32)))


def attention(q, k, v, mask=None):
    """Scaled dot-product attention, causal without a mask. q: (B, H, T, C), k and v: (B, G, M, C) -> (B, H, T, C)
    mask: as additive() gives it."""
    if not isinstance(mask, Blocks):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                              enable_gqa=k.shape[1] != q.shape[1])
    (B, H, T, C), (n, K), dtype = q.shape, mask.keys.shape, q.dtype
    q, k, v = (wide(t) for t in (q, k, v))                    # on so few keys a CPU is quicker in fp32 than in bf16
    tokens = lambda t: t.transpose(1, 2).flatten(0, 1)                                # (B, G, T, C) -> (B·T, G, C)
    # index_select and not [ ]: its backward adds in a fixed order
    chosen = lambda t: tokens(t).index_select(0, mask.keys.flatten()).view(n, K, -1, C).transpose(1, 2)
    q = F.pad(q.transpose(1, 2), (0, 0, 0, 0, 0, -T % Q)).view(n, Q, H, C).transpose(1, 2)
    y = F.scaled_dot_product_attention(q, chosen(k), chosen(v), attn_mask=mask.mask, enable_gqa=k.shape[1] != H)
    return y.to(dtype).transpose(1, 2).reshape(B, -1, H, C)[:, :T].transpose(1, 2)    # (n, H, Q, C) -> (B, H, T, C)
