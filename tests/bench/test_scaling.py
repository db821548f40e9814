"""bench/scaling.py: its formulas against real models, and docs/scaling.md against its output."""
from dataclasses import replace

import pytest
import torch

from bench import scaling
from model import SIZES, Transformer
from ops.quantize import quantize_weight
from runs.files import ROOT
from svd_lora import inject_svd_lora

SMALL = {"gpt2": replace(SIZES["125m"], vocab_size=64, d_model=96, d_ff=384, head_dim=8),
         "llama": replace(SIZES["1b"], vocab_size=64, d_model=128, head_dim=4, d_ff=344)}


def test_the_table_of_the_docs_is_what_the_script_prints():
    text = (ROOT / "docs" / "scaling.md").read_text()
    for line in scaling.table(scaling.Flags()):
        assert line in text, f"docs/scaling.md lacks {line!r}: run python bench/scaling.py"


@pytest.mark.parametrize("family", list(SMALL))
@pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_what_a_block_keeps(family, dtype, size):
    flags = scaling.Flags(pairs=2, length=32)
    kept, formula = scaling.block_keeps(SMALL[family], dtype, flags), scaling.block_activations(SMALL[family], size)
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
