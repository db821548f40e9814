"""Ways to run the blocks that must not change what they compute: checkpointing, padding, compilation."""
import pytest
import torch

from data.tokenizers import TokenRow
from data.trees import batch_logprobs, pack
from svd_lora import inject_svd_lora, set_preference
from train_dpo import compile_blocks

FAMILIES = pytest.mark.parametrize("family", ["gpt2", "llama"])
LAM = torch.tensor([[1.0, 0.0], [0.3, 0.7], [0.5, 0.5]])
ROWS = [TokenRow([3, 4, 5][:n + 1], [[6, 7, 8, 9], [6, 7, 10], [11, 12]]) for n in range(3)]


def adapted(tiny, family, **more):
    """A tiny model with an adapter that is not fresh."""
    model = inject_svd_lora(tiny(family, **more), 4, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and p.ndim < 2:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.01)
    return model


def step(model, multiple=1, lam=LAM):
    """(log-probs, {name: gradient}) of one step."""
    set_preference(model, lam)
    logps = batch_logprobs(model, pack(ROWS, multiple))
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return logps.detach(), gradients


def same(a, b, close, tolerance=1e-5):
    return close(a[0], b[0], tolerance) and all(close(a[1][name], b[1][name], tolerance) for name in b[1])


@FAMILIES
def test_checkpointing_changes_no_bit_and_keeps_less(family, tiny, close):
    model = adapted(tiny, family)
    kept = {}
    for model.checkpoint_blocks in (False, True):
        sizes = kept.setdefault(model.checkpoint_blocks, [])
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.nbytes), t)[1], lambda t: t):
            result = step(model)
        if not model.checkpoint_blocks:
            expected = result
    assert same(result, expected, close, 0)
    assert not same(step(model, lam=LAM.flip(1)), expected, close, 1e-3)              # the comparison can fail
    assert sum(kept[True]) < sum(kept[False]) / 3


@FAMILIES
def test_padding_to_a_multiple_changes_nothing(family, tiny, close):
    model = adapted(tiny, family)
    assert pack(ROWS, 8).tokens.shape[1] % 8 == 0 != pack(ROWS).tokens.shape[1] % 8
    assert same(step(model, 8), step(model), close, 1e-4)             # sums over keys in another order


@pytest.mark.slow
@FAMILIES
def test_compiled_blocks_compute_the_same_for_every_preference(family, tiny, close):
    model, compiled = adapted(tiny, family), adapted(tiny, family)
    compile_blocks(compiled)
    for lam in (LAM, LAM.flip(1)):
        assert same(step(compiled, 8, lam), step(model, 8, lam), close, 1e-4)
