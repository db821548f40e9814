"""bench/scaling.py: its formulas against real models, and docs/scaling.md against its output."""
from dataclasses import replace

import pytest
import torch

from bench import scaling
from bench.pairs import pack_pairs, token_pairs
from model import SIZES, Transformer
from ops.quantize import quantize_weight
from runs.files import ROOT
from svd_lora import inject_svd_lora, set_preference

SMALL = {"gpt2": replace(SIZES["125m"], vocab_size=64, d_model=96, d_ff=384, head_dim=8),
         "llama": replace(SIZES["1b"], vocab_size=64, d_model=128, head_dim=4, d_ff=344)}


def test_the_table_of_the_docs_is_what_the_script_prints():
    text = (ROOT / "docs" / "scaling.md").read_text()
    for line in scaling.table(scaling.Flags()):
        assert line in text, f"docs/scaling.md lacks {line!r}: run python bench/scaling.py"


def kept_bytes(model, batch):
    """Bytes that a forward pass keeps for the backward pass, each memory once and parameters left out."""
    parameters = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}
    def keep(t):
        if t.untyped_storage().data_ptr() not in parameters:
            kept[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t)
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(batch.tokens, batch.positions, batch.mask, return_hidden=True)
    return sum(n for n, _ in kept.values())


def block_keeps(config, dtype, flags):
    """Bytes per token that one block really keeps: what three layers keep more than two."""
    g = torch.Generator().manual_seed(0)
    batch = pack_pairs(token_pairs(flags, config.vocab_size, 0), m=2)
    totals = []
    for layers in (2, 3):
        model = Transformer(replace(config, n_layer=layers)).init_weights(g).to(dtype)
        inject_svd_lora(model, flags.rank - 2, 2, generator=g)
        set_preference(model, torch.tensor([0.5, 0.5]))
        totals.append(kept_bytes(model, batch))
    return (totals[1] - totals[0]) / batch.tokens.numel()


@pytest.mark.parametrize("family", list(SMALL))
@pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_what_a_block_keeps(family, dtype, size):
    flags = scaling.Flags(pairs=2, length=32)
    kept, formula = block_keeps(SMALL[family], dtype, flags), scaling.block_activations(SMALL[family], size)
    assert abs(formula / kept - 1) < 0.01, (kept, formula)
    wrong = replace(SMALL[family], d_ff=2 * SMALL[family].d_ff)
    assert scaling.block_activations(wrong, size) / kept > 1.2


@pytest.mark.parametrize("family", list(SMALL))
def test_weights_and_adapter(family):
    config = replace(SMALL[family], n_layer=3)
    model = Transformer(config).bfloat16()
    blocks, tables = scaling.weight_bytes(config, "bf16")
    real = sum(p.nbytes for p in model.parameters() if p.ndim == 2)
    assert blocks + tables == real
    inject_svd_lora(model, 8, 2)
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert abs(scaling.adapter_parameters(config, 10) / adapter - 1) < 0.01


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_bytes(kind):
    weight = quantize_weight(torch.randn(96, 256), kind)
    codes = sum(t.nbytes for t in weight.buffers())
    assert abs(scaling.BYTES[kind] * 96 * 256 / codes - 1) < 0.02      # int8 has a scale an output besides
