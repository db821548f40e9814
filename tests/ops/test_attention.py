"""Attention by blocks of queries: against plain attention under the whole mask, values and gradients, in float64."""
import pytest
import torch
import torch.nn.functional as F

from data import toy
from data.tokenizers import tokenize
from data.trees import pack
from ops import attention as module
from ops.attention import Blocks, additive, attention


def trees(rows=3, responses=24, seed=0):
    """The mask of some rows of the embedded world."""
    from data.tokenizers import load_tokenizer
    g = torch.Generator().manual_seed(seed)
    data = toy.sample_pairs("train", ["helpful", "harmless"], rows, responses, g)
    return pack(tokenize(data, load_tokenizer("toy"), 256)[0]).mask


def inputs(mask, heads=4, key_heads=4, dtype=torch.float64, seed=0):
    """Random q, k, v as the model has them, (B, T, H, C) seen as (B, H, T, C), and a gradient for what comes out."""
    g, (B, T) = torch.Generator().manual_seed(seed), (len(mask), mask.shape[-1])
    leaves = [torch.randn(B, T, h, 8, generator=g, dtype=dtype).requires_grad_() for h in (heads, key_heads, key_heads)]
    return leaves, torch.randn(B, heads, T, 8, generator=g, dtype=dtype)


def run(mask, leaves, upstream):
    """What attention gives and its gradients to q, k, v."""
    y = attention(*(t.transpose(1, 2) for t in leaves), mask)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


@pytest.mark.parametrize("key_heads", (4, 2))
@pytest.mark.parametrize("seed", range(3))
def test_blocks_equal_plain_attention(close, seed, key_heads):
    mask = trees(seed=seed)
    leaves, upstream = inputs(mask, key_heads=key_heads, seed=seed)
    blocks, plain = additive(mask, torch.float64), module.filled(mask, torch.float64)
    assert isinstance(blocks, Blocks) and blocks.keys.shape[1] * module.LEAST <= mask.shape[-1]
    for ours, expected in zip(run(blocks, leaves, upstream), run(plain, leaves, upstream)):
        assert close(ours, expected, 1e-12) and not close(torch.zeros_like(ours), expected, 0.1)
    # wrong: keys of the row before, and every key of a block seen by all of its queries
    shifted = Blocks(blocks.keys.roll(1, 0), blocks.mask)
    open_ = Blocks(blocks.keys, torch.zeros_like(blocks.mask))
    for wrong in (shifted, open_):
        assert not close(run(wrong, leaves, upstream)[0], run(plain, leaves, upstream)[0], 0.01)


def test_blocks_give_few_keys_and_repeat_bit_for_bit():
    mask = trees(rows=8)
    blocks = additive(mask, torch.float32)
    assert blocks.keys.shape[1] <= 100 and mask.shape[-1] >= 350
    leaves, upstream = inputs(mask, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(run(blocks, leaves, upstream), run(blocks, leaves, upstream)))


def test_bf16(close):
    mask = trees()
    leaves, upstream = inputs(mask)
    narrow = [t.detach().bfloat16().requires_grad_() for t in leaves]
    exact = run(module.filled(mask, torch.float64), [t.detach().double().requires_grad_() for t in narrow], upstream)
    for ours, expected in zip(run(additive(mask, torch.bfloat16), narrow, upstream.bfloat16()), exact):
        assert close(ours.double(), expected, 0.02)


@pytest.mark.parametrize("shape", ((2, 1, 200, 200), (1, 1, 8, 8), (1, 1, 5, 200)))
def test_a_mask_that_leaves_out_little_stays_whole(shape):
    mask = torch.ones(shape, dtype=torch.bool).tril(shape[-1] - shape[-2])
    whole = additive(mask, torch.float32)
    assert torch.equal(whole, module.filled(mask, torch.float32)) and (whole[mask] == 0).all()
    assert (whole[~mask] == -torch.inf).all()


def test_padding_has_a_key():
    mask = trees()
    mask = F.pad(mask, (0, 37, 0, 37))                                # rows longer than their trees; all False there
    i = torch.arange(mask.shape[-1])
    mask[..., i, i] = True
    leaves, upstream = inputs(mask)
    blocks = additive(mask, torch.float64)
    assert isinstance(blocks, Blocks) and all(x.isfinite().all() for x in run(blocks, leaves, upstream))
