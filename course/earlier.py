"""earlier.py - what a set takes from an earlier one, so that every set can be started first.

Set 1's adapter is yours, if you have it; or the reference's, where the course has handed it out; or a stand-in that
learns one vector for each dimension and block: λ-weighted, they are added to what the block gives. That is no SVD-LoRA,
and reaches less.
"""
import importlib
from contextlib import contextmanager
from types import SimpleNamespace

import torch

from course.gpt import small


def adapter(adapters):
    """inject, set_preference and adapters_off, as in adapters.py, and their `name`."""
    try:
        adapters.inject(small(), 2, 2, 1.0)
        return SimpleNamespace(name="your SVD-LoRA", inject=adapters.inject, set_preference=adapters.set_preference,
                               adapters_off=adapters.adapters_off)
    except NotImplementedError:
        pass
    try:
        svd_lora = importlib.import_module("svd_lora")
    except ImportError:
        return SimpleNamespace(name="the stand-in", inject=inject, set_preference=set_preference,
                               adapters_off=adapters_off)
    return SimpleNamespace(
        name="the reference's SVD-LoRA", set_preference=svd_lora.set_preference, adapters_off=svd_lora.adapters_off,
        inject=lambda model, k, m, gain, generator=None: svd_lora.inject_svd_lora(model, k, m, gain=gain,
                                                                                  generator=generator))


# ---------------------------------------------------------------------------------------------------------------------
# The stand-in.

def inject(model, k, m, gain, generator=None):
    """Freezes the model and adds the vectors, zero at first: (blocks, m, D). k and generator play no part."""
    model.requires_grad_(False)
    model.vectors = torch.nn.Parameter(torch.zeros(len(model.blocks), m, model.shape[-1]))
    model.steer = None
    for i, block in enumerate(model.blocks):                          # what the MLP gives is added to the block's x
        block.mlp.register_forward_hook(lambda mlp, inputs, x, i=i: x if model.steer is None else
                                        x + gain * (model.steer @ model.vectors[i])[..., None, :])


def set_preference(model, lam):
    """lam: (m,), or (B, m), one a row"""
    model.steer = torch.as_tensor(lam, dtype=torch.float32)


@contextmanager
def adapters_off(model):
    """Within it the vectors are not added."""
    kept, model.steer = model.steer, None
    yield model
    model.steer = kept
