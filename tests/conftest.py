"""conftest.py - what several test files need: the repository on the path, tiny random models, the stored oracles."""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")       # tiny models: a second thread waits more than it works

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from model import Config, Transformer

SHARED = Path(__file__).parents[2] / "shared"
SHAPES = {"gpt2": dict(),
          "llama": dict(n_kv_head=2, d_ff=48, norm="rmsnorm", positions="rotary", activation="swiglu", qkv_bias=False,
                        out_bias=False, tied=False)}


@pytest.fixture
def tiny():
    """tiny(family, seed, dtype): a two-layer Transformer; every weight is random, norms and biases too."""
    def build(family="gpt2", seed=0, dtype=torch.float32):
        model = Transformer(Config(61, 32, n_layer=2, n_head=4, d_model=32, **SHAPES[family]))
        generator = torch.Generator().manual_seed(seed)
        for name, p in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            torch.nn.init.normal_(p, centre, 0.2, generator=generator)
        return model.to(dtype)
    return build


@pytest.fixture
def oracle():
    """oracle(name): the arrays of shared/oracles/data/name.npz as tensors; skips the test where they are not there."""
    def load(name):
        path = SHARED / "oracles" / "data" / f"{name}.npz"
        if not path.exists():
            pytest.skip(f"{path.name} is not beside the repository")
        return {key: torch.as_tensor(value) for key, value in np.load(path).items() if value.dtype.kind in "fi"}
    return load


@pytest.fixture
def close():
    """close(a, b, tolerance): equal shapes, and no entry further apart than tolerance times the largest one."""
    def compare(a, b, tolerance=1e-6):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max())
    return compare
