"""fused.py against its own plain definitions in float64: values and every gradient, and what is kept in memory."""
import os
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ops import fused
from ops.fused import (
    linear,
    linear_logprob,
    linear_logprob_plain,
    log_partition,
    rms_norm,
    rms_norm_plain,
    rope_,
    rope_plain,
    svd_lora_linear,
    svd_lora_linear_plain,
    swiglu,
    swiglu_plain,
)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = list(TOLERANCE)
# Set by test_triton_kernels.py, which runs this file in Triton's interpreter: everything then runs as it does on CUDA.
# Large cases would take minutes there, and it cuts numbers to bf16 instead of rounding them: so small cases in fp32.
if KERNELS := os.environ.get("FUSED_THROUGH_KERNELS") == "1":
    fused.use_kernels = lambda x: x.dtype != torch.float64
    DTYPES = [torch.float32]


@pytest.fixture(autouse=True)
def seeded():
    """The same random inputs in every run: bounds of a hundredth on small tensors would fail once in twenty runs."""
    torch.manual_seed(0)


def normal(*shape, scale=1.0, dtype=torch.float32):
    """Fresh random numbers, rounded to dtype."""
    return (torch.randn(shape) * scale).to(dtype)


def error(x, expected):
    """‖x − expected‖ / ‖expected‖ in float64."""
    return ((x.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def compare(op, plain, tensors, constants=(), dtype=torch.float32):
    """Runs op on `tensors` (leaves with a gradient) and plain on float64 copies of them, with one upstream gradient.
    Returns the relative errors of the value and of every gradient; and the float64 results.

    The upstream gradient is random, and half of it y itself, as a squared loss would have it: the few gradients of d
    are sums over all tokens, which would cancel under pure noise and leave the rounding of bf16 alone.
    """
    leaves = [t.detach().clone().as_strided(t.shape, t.stride()) if t.is_contiguous() else t.detach() for t in tensors]
    leaves = [t.requires_grad_(True) for t in leaves]
    y = op(*leaves, *constants)
    g = torch.randn_like(y) + (y / y.detach().float().norm() * y.numel() ** 0.5).detach()
    gradients = torch.autograd.grad(y, leaves, g)
    wide = [t.detach().double().requires_grad_(True) for t in tensors]
    y64 = plain(*wide, *(c.double() if torch.is_tensor(c) and c.is_floating_point() else c for c in constants))
    gradients64 = torch.autograd.grad(y64, wide, g.double())
    assert y.dtype == (torch.float32 if op is linear_logprob else dtype)
    return [error(y, y64)] + [error(a, b) for a, b in zip(gradients, gradients64)], (y, y64.detach(), gradients64)


# (B, T, d_in, d_out, r): small and odd; above and below the size from which oneDNN multiplies; rank 1
SHAPES = [(3, 7, 33, 17, 10), (2, 9, 300, 257, 4), (1, 61, 129, 512, 1), (4, 45, 384, 130, 20)]
SHAPES = [(3, 7, 33, 17, 10), (2, 9, 70, 67, 20), (1, 9, 33, 65, 1)] if KERNELS else SHAPES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_svd_lora_linear(shape, per_row, dtype):
    B, T, d_in, d_out, r = shape
    x, W = normal(B, T, d_in, dtype=dtype), normal(d_out, d_in, scale=0.05, dtype=dtype)
    U, V, bias = normal(d_out, r), normal(d_in, r), normal(d_out, dtype=dtype)
    d = (1 + torch.rand(B, 1, r) if per_row else 1 + torch.rand(r)) * torch.randn(r).sign()   # none near 0
    op = lambda x, U, V, d: svd_lora_linear(x, W, U, V, d, bias)
    plain = lambda x, U, V, d: svd_lora_linear_plain(x, W.double(), U, V, d, bias.double())
    errors, (y, y64, _) = compare(op, plain, (x, U, V, d), dtype=dtype)
    assert max(errors) < TOLERANCE[dtype], errors
    assert error(torch.zeros_like(y), y64) > 0.9
    if per_row and B > 1:                                     # wrong: every row with its neighbour's preference
        assert error(op(x, U, V, d.roll(1, 0)), y64) > 0.02
    assert error(op(x, U, V, torch.zeros_like(d)), y64) > 0.1                         # wrong: no adapter


@pytest.mark.parametrize("dtype", DTYPES)
def test_svd_lora_linear_takes_any_strides_and_no_rows(dtype):
    d_in, d_out, T = (70, 67, 7) if KERNELS else (384, 257, 40)
    x = normal(d_in, T, 3, dtype=dtype).permute(2, 1, 0)                              # (B, T, d_in), not contiguous
    W, U, V = normal(d_out, d_in, scale=0.05, dtype=dtype), normal(10, d_out).T, normal(10, d_in).T
    d = normal(3, 1, 10)
    errors, _ = compare(lambda *a: svd_lora_linear(a[0], W, *a[1:]),
                        lambda *a: svd_lora_linear_plain(a[0], W.double(), *a[1:]), (x, U, V, d), dtype=dtype)
    assert max(errors) < TOLERANCE[dtype], errors
    x = torch.zeros(2, 0, d_in, dtype=dtype, requires_grad=True)
    U, V, d = (t.detach().clone().requires_grad_(True) for t in (U, V, normal(10)))
    y = svd_lora_linear(x, W, U, V, d)
    assert y.shape == (2, 0, d_out)
    gradients = torch.autograd.grad(y.sum(), (x, U, V, d))
    assert [g.shape for g in gradients] == [x.shape, U.shape, V.shape, d.shape]
    assert all((g == 0).all() for g in gradients)


def saved_by(f):
    """The tensors that f() keeps for its backward pass."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        f()
    return saved


def test_svd_lora_linear_keeps_nothing_but_its_inputs():
    x, W, bias = normal(2, 50, 384).requires_grad_(True), normal(300, 384), normal(300)
    U, V, d = (normal(*s).requires_grad_(True) for s in ((300, 10), (384, 10), (2, 1, 10)))
    ours = {t.data_ptr() for t in saved_by(lambda: svd_lora_linear(x, W, U, V, d, bias))}
    assert ours == {t.data_ptr() for t in (x, W, U, V, d)}
    plain = saved_by(lambda: svd_lora_linear_plain(x, W, U, V, d, bias))
    assert any(t.shape == (2, 50, 10) for t in plain)         # the definition keeps x V, and this test would see it


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(dtype):
    x, W, b = normal(3, 30, 384, dtype=dtype), normal(257, 384, scale=0.05, dtype=dtype), normal(257, dtype=dtype)
    errors, _ = compare(linear, torch.nn.functional.linear, (x, W, b), dtype=dtype)
    assert max(errors) < TOLERANCE[dtype], errors
    errors, _ = compare(linear, torch.nn.functional.linear, (x[:, ::2], W[:, :], b), dtype=dtype)
    assert max(errors) < TOLERANCE[dtype], errors
    x.requires_grad_(True)
    assert [t.data_ptr() for t in saved_by(lambda: linear(x, W, b))] == [W.data_ptr()]          # frozen: no x


@pytest.mark.skipif(KERNELS, reason="a way of CPUs")
@pytest.mark.parametrize("T", [40, 5])                        # and too few tokens, for which nothing is converted
def test_bf16_by_tiles(T, monkeypatch):
    """A CPU without instructions for bf16. Wrong: a weight of another tile; a result that is rounded more than once."""
    d_in, d_out, bf16, taken = 300, 2 * fused.TILE_ROWS + 90, torch.bfloat16, []
    x, W, b = normal(3, T, d_in, dtype=bf16), normal(d_out, d_in, scale=0.05, dtype=bf16), normal(d_out, dtype=bf16)
    U, V, d = normal(d_out, 10, scale=0.1), normal(d_in, 10, scale=0.1), normal(10)
    native, _ = compare(linear, torch.nn.functional.linear, (x, W, b), dtype=bf16)
    by_tiles = fused.by_tiles
    monkeypatch.setattr(fused, "slow_bf16", lambda: True)
    monkeypatch.setattr(fused, "by_tiles", lambda *a, **k: taken.append(a[1].shape) or by_tiles(*a, **k))
    errors, (_, y64, _) = compare(linear, torch.nn.functional.linear, (x, W, b), dtype=bf16)
    assert ((d_out, d_in) in taken) == ((d_in, d_out) in taken) == (3 * T >= fused.TILES_FROM)      # forward, backward
    assert max(errors) < 2 ** -8 and all(a < 1.05 * b for a, b in zip(errors, native))
    assert error(linear(x, W.roll(fused.TILE_ROWS, 0), b), y64) > 0.5
    assert error(linear(x, W, b.roll(fused.TILE_ROWS, 0)), y64) > 0.1
    errors, (_, y64, _) = compare(lambda x, *a: svd_lora_linear(x, W, *a, b), lambda x, *a: svd_lora_linear_plain(
        x, W.double(), *a, b.double()), (x, U, V, d), dtype=bf16)
    assert max(errors) < TOLERANCE[bf16], errors
    assert error(svd_lora_linear(x, W, U.roll(fused.TILE_ROWS, 0), V, d, b), y64) > 0.05
    h, y = x.flatten(0, 1), torch.randint(d_out, (3 * T,))
    assert max(compare(linear_logprob, linear_logprob_plain, (h,), (W, y), bf16)[0]) < TOLERANCE[bf16]


@pytest.mark.parametrize("native, tiles, slow", [(8e-3, 2e-3, True), (2e-3, 8e-3, False)])
def test_the_faster_way_of_bf16_is_taken(native, tiles, slow, monkeypatch):
    def working(seconds):
        def way(x, W):
            end = time.thread_time() + seconds
            while time.thread_time() < end:
                pass
        return way

    monkeypatch.setattr(fused.F, "linear", working(native))
    monkeypatch.setattr(fused, "by_tiles", working(tiles))
    assert fused.slow_bf16.__wrapped__() is slow


# (N, D, V): fewer and more tokens than a chunk, vocabularies that are no multiple of a tile; one token
VOCABULARIES = [(37, 96, 501), (1, 33, 7)] + [(1100, 16, 2100)] * (not KERNELS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, D, V", VOCABULARIES)
def test_linear_logprob(N, D, V, dtype):
    h, W, y = normal(N, D, dtype=dtype), normal(V, D, scale=3 * D ** -0.5, dtype=dtype), torch.randint(V, (N,))
    errors, (logp, logp64, _) = compare(linear_logprob, linear_logprob_plain, (h, ), (W, y), dtype)
    assert max(errors) < TOLERANCE[dtype], errors
    assert error(torch.zeros_like(logp), logp64) > 0.9
    if N > 1:                                                                         # else it may be close by chance
        assert error(linear_logprob(h, W, (y + 1) % V), logp64) > 0.1                 # wrong: the next token's


@pytest.mark.skipif(KERNELS, reason="which cut bf16 instead of rounding it")
def test_linear_logprob_of_states_wider_than_the_head():
    """States in fp32 (a Mixture's) under a head in bf16. Wrong: the states rounded to bf16."""
    h, W, y = normal(1100, 16), normal(2100, 16, dtype=torch.bfloat16), torch.randint(2100, (1100,))
    errors, (_, logp64, _) = compare(linear_logprob, linear_logprob_plain, (h,), (W, y))
    assert max(errors) < 1e-5, errors
    assert error(linear_logprob(h.bfloat16(), W, y), logp64) > 1e-4


def test_linear_logprob_of_a_trained_head():
    N = 20 if KERNELS else 1100
    h, W, y = normal(N, 40), normal(333, 40), torch.randint(333, (N,))
    errors, _ = compare(linear_logprob, linear_logprob_plain, (h, W), (y,))
    assert max(errors) < 1e-5, errors


def test_linear_logprob_survives_large_and_shifted_logits():
    """Logits around −3000, as GPT-2's can be large: in bf16 they are relative to log Z before they are rounded."""
    h, W, y = normal(50, 64), normal(300, 64), torch.randint(300, (50,))
    for dtype in DTYPES:
        hb, Wb = (10 * h).to(dtype), W.to(dtype)
        hb, Wb = torch.cat([hb, torch.full((50, 1), 64.0, dtype=dtype)], 1), torch.cat([Wb, torch.full((300, 1), -48.0,
                                                                                                      dtype=dtype)], 1)
        expected = linear_logprob_plain(hb.double(), Wb.double(), y)
        assert error(linear_logprob(hb, Wb, y), expected) < TOLERANCE[dtype]
        if dtype == torch.bfloat16:                           # wrong: rounded first, off by up to 8 nats
            rounded = (hb @ Wb.T).float().log_softmax(-1).gather(1, y[:, None])[:, 0]
            assert error(rounded, expected) > 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_partition(dtype):
    """log Z is the same by any target of a state. Wrong, in bf16: by its logit as the product rounds it."""
    h, W = normal(50, 64, dtype=dtype), normal(300, 64, dtype=dtype)
    log_Z = (h.double() @ W.double().T).logsumexp(1)
    for y in torch.randint(300, (3, 50)):
        logp = linear_logprob(h, W, y)
        assert error(log_partition(h, W, y, logp), log_Z) < 1e-5
        if dtype == torch.bfloat16:
            assert error((h @ W.T).float().gather(1, y[:, None])[:, 0] - logp, log_Z) > 1e-4


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation returns, and how many products there are."""

    def __init__(self):
        super().__init__()
        self.elements = self.products = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        if "linear_pointwise" in str(f) or f in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.products += 1
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(t):
                self.elements = max(self.elements, t.numel())
        return out


@pytest.mark.skipif(KERNELS, reason="on CUDA some rows of the logits are held")
def test_linear_logprob_never_holds_the_logits_and_makes_none_twice():
    N, D, V = 2100, 16, 2100
    h, W, y = normal(N, D).requires_grad_(True), normal(V, D), torch.randint(V, (N,))
    with Largest() as forward:
        logp = linear_logprob(h, W, y)
    with Largest() as backward:
        logp.sum().backward()
    assert forward.elements <= fused.ROWS * fused.TILE < N * V / 4
    assert backward.products == 0 and backward.elements <= N * D
    with Largest() as plain:
        linear_logprob_plain(h, W, y)
    assert plain.elements == N * V


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype):
    for x in (normal(3, 5, 77, dtype=dtype), normal(77, 5, 3, dtype=dtype).permute(2, 1, 0)):
        errors, (y, y64, _) = compare(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: rms_norm_plain(x, w, 1e-5),
                                      (x, normal(77, dtype=dtype)), dtype=dtype)
        assert max(errors) < TOLERANCE[dtype], errors
        assert error(torch.nn.functional.layer_norm(x, (77,)), y64) > 0.1             # wrong: the other norm
    assert rms_norm(torch.zeros(0, 77, dtype=dtype), torch.ones(77, dtype=dtype), 1e-5).shape == (0, 77)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_in_place(dtype):
    B, T, H, C = 2, 5, 3, 8
    angle = torch.rand(B, T, C // 2) * 6
    op = lambda x: rope_(1 * x, angle.cos(), angle.sin()).view(B, T, H, C)
    plain = lambda x: rope_plain(x.view(B, T, H, C), angle.double().cos(), angle.double().sin())
    x = normal(B, T, H * C, dtype=dtype)
    errors, (y, y64, _) = compare(op, plain, (x,), dtype=dtype)
    assert max(errors) < TOLERANCE[dtype], errors
    assert error(rope_(1 * x, angle.cos(), -angle.sin()).view(B, T, H, C), y64) > 0.1           # wrong: backwards
    address, rotated = x.data_ptr(), rope_(x, angle.cos(), angle.sin())
    assert rotated.data_ptr() == address and torch.equal(x.view(B, T, H, C), y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype):
    gate, up = normal(3, 5, 41, dtype=dtype), normal(41, 5, 3, dtype=dtype).permute(2, 1, 0)
    errors, (y, y64, _) = compare(swiglu, swiglu_plain, (gate, up), dtype=dtype)
    assert max(errors) < TOLERANCE[dtype], errors
    assert error(swiglu(up, gate), y64) > 0.1                 # wrong: the two exchanged
    assert len(saved_by(lambda: swiglu(gate.requires_grad_(True), up))) == 2
