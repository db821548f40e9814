"""gpt.py - the embedded world's base model: GPT-2 in plain PyTorch, small enough to read in one go.

B: rows   T: tokens   D: width   V: vocabulary   H: heads
All matrices inside the blocks are nn.Linear, so that an adapter can take their place: q, k, v, o, up, down.
"""
import json
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

BASE = Path(__file__).resolve().parents[1] / "data" / "base"


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, mask=None):                                  # (B, T, D) -> (B, T, D)
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return self.o(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width, heads), MLP(width)

    def forward(self, x, mask=None):
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """tokens (B, T) -> logits (B, T, V). Attention is causal: a token's logits depend on nothing right of it.

    mask: (T, T) bool instead, True where a token (row) may look (column). positions: (T,) instead of 0 1 2 …
    """

    def __init__(self, vocabulary, context, layers, heads, width):
        super().__init__()
        self.shape = (vocabulary, context, layers, heads, width)      # GPT(*model.shape) is one of the same shape
        self.embed, self.pos_embed = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def states(self, tokens, positions=None, mask=None):
        """What the head reads: (B, T, D)."""
        x = self.embed(tokens) + self.pos_embed(torch.arange(tokens.shape[1]) if positions is None else positions)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)

    def forward(self, tokens, positions=None, mask=None):
        return self.states(tokens, positions, mask) @ self.embed.weight.T     # the head is the embedding: (B, T, V)


def load_base(path=BASE):
    """The world's base model, from the files of a Hugging Face GPT-2."""
    config = json.loads((path / "config.json").read_text())
    model = GPT(*(config[key] for key in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")))
    stored, ours = load_file(path / "model.safetensors"), {}
    for name, x in stored.items():
        for theirs, here in NAMES.items():
            name = name.replace(theirs, here)
        if x.ndim == 2 and "blocks" in name:
            x = x.T                                                   # GPT-2 keeps its matrices as (d_in, d_out)
        if "c_attn" in name:                                          # q, k and v are one matrix there
            ours |= {name.replace("c_attn", part): y for part, y in zip("qkv", x.chunk(3))}
        else:
            ours[name] = x
    model.load_state_dict(ours)
    return model.eval()


NAMES = {"transformer.h.": "blocks.", "transformer.": "", "wte": "embed", "wpe": "pos_embed", "ln_1": "norm1",
         "ln_2": "norm2", "ln_f": "norm", "attn.c_proj": "attn.o", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}


def small(seed=0, layers=2, heads=2, width=16, vocabulary=23, context=12):
    """A random model for tests, in float64: every weight is N(0, 0.3²), norms are around 1."""
    model, generator = GPT(vocabulary, context, layers, heads, width), torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        nn.init.normal_(p, float("norm" in name and name.endswith("weight")), 0.3, generator=generator)
    return model.double().eval()
