"""test_triton_kernels.py - every Triton kernel against its definition in float64, and test_fused.py once more on top of
the kernels: in Triton's interpreter, which needs no GPU, and on the GPU where there is one.

A check is a generator of cases (got, want, tolerance, wrong ones): the relative error of `got` is below the tolerance,
and that of zeros and of every wrong one is not: so the comparison would have noticed. Triton decides at its import
whether it interprets, so the checks run in a process of their own:

    TRITON_INTERPRET=1 python tests/ops/test_triton_kernels.py interpreter     or: cuda; prints what failed, as JSON

With "compile" nothing is computed: every launch is compiled to a cubin for a GPU that need not be there.
The interpreter's time is that of its Python calls, so what counts is the number of programs and loop turns, not sizes.
"""
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
SAME_BITS = 1e-30
ROOT = Path(__file__).resolve().parents[2]


class Inputs:
    """Fresh random tensors of one dtype on one device."""

    def __init__(self, device, dtype):
        self.generator, self.device, self.dtype, self.tolerance = torch.Generator(), device, dtype, TOLERANCE[dtype]
        self.rounds = device == "cuda" or dtype == torch.float32      # the interpreter cuts fp32 to bf16, unrounded

    def randn(self, *shape, dtype=None):
        return torch.randn(shape, generator=self.generator).to(dtype or self.dtype).to(self.device)

    def randint(self, low, high, shape, dtype=torch.int64):
        return torch.randint(low, high, shape, generator=self.generator).to(dtype).to(self.device)


def apart(x):
    """The same values, in rows that lie apart; what lies between them is 7."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 3), 7)
    wide[..., 2:2 + x.shape[-1]] = x
    return wide[..., 2:2 + x.shape[-1]]


def turned(x):
    """The same values, stored column by column."""
    return x.mT.contiguous().mT


def untouched(x):
    """Whether what lies between the rows of a tensor from `apart` is still 7."""
    wide = x._base.clone()
    wide[..., 2:2 + x.shape[-1]] = 7
    return bool((wide == 7).all())


def gradients(f, g, *inputs):
    """The gradients of f(*inputs) for the output gradient g, by autograd in float64."""
    inputs = [x.double().requires_grad_() for x in inputs]
    return torch.autograd.grad(f(*inputs), inputs, g.double())


# ---------------------------------------------------------------------------------------------------------------------
# The checks.

def svd_lora_down(kernels, new):
    for r in (1, 20):
        B, rows, d_in = 5, 4, 70
        x, d = new.randn(B * rows, d_in), new.randn(B, r, dtype=torch.float32)
        for V in (new.randn(d_in, r), new.randn(d_in, r, dtype=torch.float32)):
            plain = x.double() @ V.double()
            # V is rounded to x's dtype; where it is of it already, the products are exact and the sums in fp32
            tolerance = 1e-5 if V.dtype == x.dtype else new.tolerance
            of_token = d.double().repeat_interleave(rows, 0)
            yield kernels.svd_lora_down(x, V, None, 1), plain, tolerance, plain.roll(1, 0)
            yield kernels.svd_lora_down(apart(x), V, d[2], 0), plain * d[2], tolerance, plain, plain * d[3]
            yield (kernels.svd_lora_down(turned(x), apart(V), apart(d), rows), plain * of_token, tolerance, plain,
                   plain * of_token.roll(rows, 0), plain * d.double().repeat(rows, 1), plain * of_token.roll(1, 0))
    few, many = kernels.FEW_ROWS, kernels.MANY_ROWS
    for kernels.FEW_ROWS, kernels.MANY_ROWS in ((0, many), (0, 0)):                   # larger blocks, as for many rows
        x, V, d = new.randn(132, 9), new.randn(9, 3), new.randn(33, 3, dtype=torch.float32)
        plain = x.double() @ V.double()
        yield kernels.svd_lora_down(x, V, d, 4), plain * d.double().repeat_interleave(4, 0), 1e-5, plain
    kernels.FEW_ROWS, kernels.MANY_ROWS = few, many
    try:
        kernels.svd_lora_down(x, V, d, 3)
    except AssertionError:
        return
    raise ValueError("d of another batch was taken")


def svd_lora_up_(kernels, new):
    for r in (1, 10, 33):
        y, h, U = new.randn(66, 70), new.randn(66, r, dtype=torch.float32), new.randn(70, r, dtype=torch.float32)
        added = h.double() @ U.double().T
        wrong = [y.double() + added.roll(1, 0), y.double() + added.roll(1, 1), added, y.double() - added]
        for form in (torch.clone, apart, turned):
            out, args = form(y), (h, U) if form is torch.clone else (turned(h), apart(U))
            assert kernels.svd_lora_up_(out, *args) is out and (form is not apart or untouched(out))
            yield out, y.double() + added, new.tolerance, y, *wrong


def logprob_rows(kernels, new):
    kernels.VOCAB_BLOCK = 128                                                         # so that 301 entries are 3 blocks
    offset = new.randn(6, 1) * 20
    logits, target = new.randn(6, 301) * 3 + offset, new.randint(0, 301, (6,))
    logits[3, 5:200], target[3:6] = -float("inf"), torch.tensor([0, 200, 300])
    logps = logits.double().clamp(min=-1e4).log_softmax(1)                            # as good as −inf, but no NaN here
    onehot = F.one_hot(target, 301).double()
    logp, dlogp = (logps * onehot).sum(1), onehot - logps.exp()
    wrong_logp = logps.gather(1, (target[:, None] + 1) % 301)[:, 0]
    for grad_dtype in DTYPES.values():
        for want_grad in (False, True):
            for form in (apart, turned):
                given = form(logits)
                got, grad = kernels.logprob_rows(given, target, want_grad, grad_dtype)
                assert (grad is not None) == want_grad and (form is not apart or untouched(given))
                yield got, logp, 1e-5, wrong_logp, logp + 1e-3
                if want_grad:
                    assert grad.dtype == grad_dtype
                    assert (grad is given) == (logits.dtype == grad_dtype and form is apart)
                    yield grad, dlogp, TOLERANCE[grad_dtype], -dlogp, -logps.exp(), dlogp.roll(1, 1)


def rms_norm(kernels, new):
    kernels.PARTIAL_SUMS = 2                                                          # so that 3 rows are 2 programs
    for D in (3, 300):
        x, weight, g, eps = new.randn(3, D), 1 + 0.5 * new.randn(D, dtype=torch.float32), new.randn(3, D), 0.1
        f = lambda x, weight: F.rms_norm(x, (D,), weight, eps)
        y, (dx, dweight) = f(x.double(), weight.double()), gradients(f, g, x, weight)
        rstd = (x.double().square().mean(1) + eps).rsqrt()
        no_projection = g.double() * weight.double() * rstd[:, None]
        for form in (torch.clone, apart, turned):
            out, scale = kernels.rms_norm_forward(form(x), weight, eps)
            assert out.dtype == x.dtype
            yield out, y, new.tolerance, f(x.double(), torch.ones_like(weight).double()), x.double() * weight, -y
            yield scale, rstd, 1e-5, 1 / rstd, rstd.roll(1, 0)
            for want in (False, True):
                grads = kernels.rms_norm_backward(form(g), form(x), weight, rstd.float(), want)
                assert grads[0].dtype == x.dtype and (grads[1] is not None) == want
                yield grads[0], dx, new.tolerance, no_projection, -dx
                if want:
                    first_rows = gradients(f, g[:2], x[:2], weight)[1]
                    yield grads[1], dweight, 1e-5, first_rows, -dweight
                    again = kernels.rms_norm_backward(form(g), form(x), weight, rstd.float(), True)[1]
                    yield again, grads[1], SAME_BITS


def rotate_(kernels, new):
    for B, T, H, C in ((2, 2, 3, 6), (1, 2, 40, 128)):
        for rows in {1, B}:
            angle = new.randn(rows, T, C // 2, dtype=torch.float32) * 3
            turn = torch.polar(torch.ones_like(angle).double(), angle.double())[:, :, None]                  # of a + ib
            projection = new.randn(B, T, 3 * H * C)                                   # q, k and v side by side: k is x
            x = projection[..., H * C:2 * H * C].view(B, T, H, C)
            complex_x = torch.complex(*x.double().chunk(2, -1))
            pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous()) * turn
            halves = lambda z: torch.cat([z.real, z.imag], -1)
            want, back = halves(complex_x * turn), halves(complex_x * turn.conj())
            whole = projection.double()
            whole[..., H * C:2 * H * C] = want.flatten(2)
            other_layout = torch.view_as_real(pairs).flatten(-2)
            for sign, right, wrong in ((1, want, back), (-1, back, want)):
                heads = x.transpose(1, 2).contiguous().transpose(1, 2)
                kernels.rotate_(heads, angle.cos(), turned(angle.sin()), sign)
                yield heads, right, new.tolerance, wrong, x, other_layout
            assert kernels.rotate_(x, angle.cos(), angle.sin(), 1) is x
            yield projection, whole, new.tolerance
            yield kernels.rotate_(x, angle.cos(), angle.sin(), -1), halves(complex_x), new.tolerance, want


def swiglu(kernels, new):
    f = lambda gate, up: F.silu(gate) * up
    gate, up, g = new.randn(5, 300) * 2, new.randn(5, 300), new.randn(5, 300)
    dgate, dup = gradients(f, g, gate, up)
    y = f(gate.double(), up.double())
    for form in (torch.clone, apart, turned):
        yield kernels.swiglu_forward(form(gate), up), y, new.tolerance, f(up.double(), gate.double()), gate * up
        got = kernels.swiglu_backward(g, gate, form(up))
        yield got[0], dgate, new.tolerance, dup, g.double() * up.double() * gate.double().sigmoid()
        yield got[1], dup, new.tolerance, dgate, g.double() * gate.double().sigmoid()
    far = torch.tensor([-200.0, 200.0], device=new.device, dtype=new.dtype)
    yield kernels.swiglu_forward(far, far), F.silu(far.double()) * far.double(), new.tolerance
    yield kernels.swiglu_backward(torch.ones_like(far), far, far)[0], far.double().relu(), new.tolerance


def dequantize_int8(kernels, new):
    for d_out, d_in in ((13, 301), (3, 4099)):
        codes, scales = new.randint(-127, 128, (d_out, d_in), torch.int8), new.randn(d_out, dtype=torch.float32).abs()
        want = codes.double() * scales.double()[:, None]
        for form in (torch.clone, apart, turned):
            out = kernels.dequantize_int8(form(codes), scales, new.dtype)
            assert out.dtype == new.dtype
            yield out, want, new.tolerance, codes.double() * scales.double().roll(1)[:, None], -want
            if new.rounds:
                yield out, (codes * scales[:, None]).to(new.dtype), SAME_BITS


def dequantize_4bit(kernels, new):
    for d_out, d_in, group, kind in ((13, 301, 64, torch.bfloat16), (13, 300, 10, torch.float16),
                                     (3, 4099, 64, torch.float32)):
        codes = new.randint(0, 256, (d_out, (d_in + 1) // 2), torch.uint8)
        scales, table = new.randn(d_out, -(-d_in // group), dtype=kind).abs(), new.randn(16, dtype=torch.float32)
        low, high = table[(codes % 16).long()], table[(codes // 16).long()]
        interleaved = lambda a, b: torch.stack([a, b], 2).flatten(1)[:, :d_in]
        of_column = scales.float().repeat_interleave(group, 1)
        want, swapped = (interleaved(*x) * of_column[:, :d_in] for x in ((low, high), (high, low)))
        for form in (torch.clone, apart, turned):
            out = kernels.dequantize_4bit(form(codes), form(scales), table, group, d_in, new.dtype)
            assert out.dtype == new.dtype
            yield (out, want, new.tolerance, swapped, interleaved(low, high) * of_column.roll(2, 1)[:, :d_in],
                   torch.cat([low, high], 1)[:, :d_in] * of_column[:, :d_in])
            if new.rounds:
                yield out, want.to(new.dtype), SAME_BITS


def quantised(new, kind, sizes, d_in):
    """Random (W, their dense matrices, wrong dense matrices, what the kernel wants besides) of layers of one input."""
    dense = [new.randn(n, d_in) for n in sizes]
    if kind == "dense":
        return dense, dense, [], {}
    if kind == "int8":
        W = [new.randint(-127, 128, (n, d_in), torch.int8) for n in sizes]
        scales = [new.randn(n, dtype=torch.float32) / 64 for n in sizes]
        dense, other_row = ([w * s.roll(by)[:, None] for w, s in zip(W, scales)] for by in (0, 1))
        return W, dense, [other_row], dict(scales=scales)
    W = [new.randint(0, 256, (n, (d_in + 1) // 2), torch.uint8) for n in sizes]
    scales = [new.randn(n, -(-d_in // 64), dtype=torch.bfloat16) for n in sizes]
    table = new.randn(16, dtype=torch.float16 if new.dtype == torch.bfloat16 else torch.float32)

    def unpack(order, by):
        values = ([table.float()[(w % 16).long()], table.float()[(w // 16).long()]][::order] for w in W)
        columns = [s.float().roll(by, 1).repeat_interleave(64, 1)[:, :d_in] for s in scales]
        return [torch.stack(v, 2).flatten(1)[:, :d_in] * s for v, s in zip(values, columns)]

    return W, unpack(1, 0), [unpack(-1, 0), unpack(1, 1)], dict(scales=scales, table=table, group=64)


def svd_lora_decode(kernels, new):
    outputs = kernels.DECODE_OUTPUTS
    for sizes, N, d_in, r, one_d, bias, form, split in (
            ((37,), 5, 151, 10, False, True, turned, True), ((66, 40), 1, 70, 16, True, True, apart, True),
            ((37, 130, 16), 64, 72, 20, False, False, torch.clone, True),
            ((70,), 20, 130, 1, False, True, apart, False), ((50,), 3, 80, 0, False, True, torch.clone, False)):
        kernels.DECODE_OUTPUTS = outputs if split else 1
        layers, rank, all_out = len(sizes), 32 if r > 16 else 16, sum(sizes)
        for kind in ("dense", "int8", "nf4") if r > 0 else ("int8", "nf4"):
            W, dense, others, more = quantised(new, kind, sizes, d_in)
            x, b = new.randn(N, d_in), new.randn(all_out) * 30 if bias else None
            product = lambda W: torch.cat([x.double() @ w.double().T for w in W], 1) + (b if bias else 0)
            branch, without = torch.zeros_like(product(dense)), []
            if r > 0:
                V, U = new.randn(layers, d_in, r), new.randn(all_out, r)
                d = 0.5 + new.randn(*((layers, r) if one_d else (layers, N, r)), dtype=torch.float32).abs()
                added = lambda V, d: torch.cat([((x.double() @ v.double()) * e) @ u.double().T
                                                for v, e, u in zip(V, d.double(), U.split(sizes))], 1)
                branch, without = added(V, d), [branch]
                without += [added(V, d.roll(1, -1))] if r > 1 else []                 # d of another singular value
                without += [added(V, d.roll(1, 1))] if N > 1 else []                  # of the neighbouring row
                without += [added(V.roll(1, 0), d)] if layers > 1 else []             # V of another layer
                factors = F.pad(V.mT, (0, 0, 0, rank - r)).contiguous(), d, F.pad(U, (0, rank - r))
            right = product(dense) + branch
            wrong = [product(other) + branch for other in others] + [product(dense) + other for other in without]
            wrong += [right - b] if bias else []
            finished = new.randint(0, 1, (all_out,), torch.int32)
            given = [w.clone() if form is turned else form(w) for w in W]             # columns of W lie side by side
            args = *(factors if r > 0 else (None,) * 3), b, finished
            run = lambda: kernels.svd_lora_decode(form(x), given, *args, **more)
            got = run()
            assert len(got) == layers and not finished.any()
            assert all(y.is_contiguous() and y.dtype == x.dtype for y in got)
            for y, again, *parts in zip(got, run(), *(want.split(sizes, 1) for want in (right, *wrong))):
                yield y, parts[0], new.tolerance, *parts[1:]
                yield again, y, SAME_BITS
    kernels.DECODE_OUTPUTS = outputs


def decode_steps(kernels, new):
    """Steps of tiny models with one preference per row, before and after a row is dropped, by the kernels and without.
    The prompts are read by the kernels too in fp32 alone."""
    from small import SHAPES

    from model import Config, Transformer
    from ops import fused
    from ops.generation import Decoder
    from ops.quantize import QuantizedLinear, quantize_weight
    from svd_lora import inject_svd_lora, set_preference
    on_kernels, launches, launch = fused.use_kernels, [], kernels.svd_lora_decode
    kernels.svd_lora_decode = lambda x, W, *args, **kw: (launches.append(len(W)), launch(x, W, *args, **kw))[1]
    lam = torch.tensor([[0.0, 1.0], [0.7, 0.3], [0.5, 0.5]])
    for family, kind in (("llama", None), ("llama", "nf4"), ("gpt2", None), ("gpt2", "int8"), ("gemma3", "nf4")):
        model, generator = Transformer(Config(61, 32, 1, 4, 16, **SHAPES[family])), torch.Generator().manual_seed(0)
        for p in model.parameters():
            torch.nn.init.normal_(p, 0.5 if p.ndim == 1 else 0.0, 0.2, generator=generator)
        model = model.to(new.device, new.dtype)
        for name, layer in list(model.blocks.named_modules()) if kind else []:
            if isinstance(layer, torch.nn.Linear):
                weight = quantize_weight(layer.weight.detach(), kind)
                model.blocks.set_submodule(name, QuantizedLinear(weight, layer.bias))
        inject_svd_lora(model, 2, 2, 2.0, generator=generator)
        for layer in (m for m in model.modules() if hasattr(m, "sigma")):
            layer.U.data.mul_(20), layer.V.data.mul_(20), layer.sigma.data.fill_(0.3), layer.s.data.fill_(1.0)

        @torch.no_grad()
        def logits(kernels, lam):
            fused.use_kernels = lambda x: kernels
            set_preference(model, lam)
            decoder = Decoder(model, [[3], [4, 5, 6], [7, 8]], 2)
            fused.use_kernels = lambda x: kernels and new.dtype == torch.float32
            decoder.prefill()
            fused.use_kernels = lambda x: kernels
            first = decoder.step(torch.tensor([9, 10, 11]).to(new.device)).clone()
            decoder.keep(torch.tensor([2, 0]).to(new.device))
            return torch.cat([first, decoder.step(torch.tensor([12, 13]).to(new.device))])

        want, wrong = logits(False, lam), logits(False, lam.roll(1, 0))               # the neighbour's preference
        assert not launches
        got = logits(True, lam)
        assert launches == [3, 1, 1 if family == "gpt2" else 2, 1] * 2                # q k v, o, gate up, down
        launches.clear()
        yield got, want, 1e-5 if new.dtype == torch.float32 else 0.03, wrong
    fused.use_kernels, kernels.svd_lora_decode = on_kernels, launch


def no_rows(kernels, new):
    D, r = 24, 5
    x, row = new.randn(0, D), new.randn(D)
    V, empty = new.randn(D, r), new.randn(0)
    shapes = lambda *tensors: [tuple(t.shape) for t in tensors]
    assert shapes(kernels.svd_lora_down(x, V, new.randn(0, r), 3), kernels.svd_lora_down(x, V, None, 1)) == [(0, r)] * 2
    assert shapes(kernels.svd_lora_up_(x, new.randn(0, r), V)) == [(0, D)]
    assert shapes(*kernels.logprob_rows(x, new.randint(0, D, (0,)), True, new.dtype)) == [(0,), (0, D)]
    factors = new.randn(2, 16, D), new.randn(2, 0, r), new.randn(2 * D, 16)
    assert shapes(*kernels.svd_lora_decode(x, [new.randn(D, D)] * 2, *factors, None, None)) == [(0, D)] * 2
    assert shapes(*kernels.rms_norm_forward(x, row, 1e-5)) == [(0, D), (0,)]
    dx, dweight = kernels.rms_norm_backward(x, x, row, empty, True)
    assert shapes(dx, dweight) == [(0, D), (D,)] and not dweight.any()
    kernels.rotate_(new.randn(0, 3, 2, 8), new.randn(1, 3, 4), new.randn(1, 3, 4), 1)
    assert shapes(kernels.swiglu_forward(x, x), *kernels.swiglu_backward(x, x, x)) == [(0, D)] * 3
    assert shapes(kernels.dequantize_int8(new.randint(0, 9, (0, D), torch.int8), empty, new.dtype)) == [(0, D)]
    codes = new.randint(0, 9, (0, D // 2), torch.uint8)
    assert shapes(kernels.dequantize_4bit(codes, new.randn(0, 1), new.randn(16), 64, D, new.dtype)) == [(0, D)]
    return iter(())


CHECKS = [svd_lora_down, svd_lora_up_, svd_lora_decode, decode_steps, logprob_rows, rms_norm, rotate_, swiglu,
          dequantize_int8, dequantize_4bit, no_rows]


# ---------------------------------------------------------------------------------------------------------------------
# Running them.

def error(got, want):
    """‖got − want‖ / ‖want‖, in float64."""
    assert got.shape == want.shape, f"{tuple(got.shape)} where {tuple(want.shape)} is wanted"
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


def judge(got, want, tolerance, *wrong):
    found = error(got, want)
    assert found < tolerance, f"relative error {found:.1e}, allowed {tolerance:.0e}"                 # NaN is not below
    for i, bad in enumerate((torch.zeros_like(want), *wrong)):
        assert not error(bad, want) < 2 * tolerance, f"wrong variant {i} passes"


def compile_only():
    """Makes every launch compile its kernel for an sm_90 and do no more, and fail where its shared memory is more than
    there is. By Triton's internals: it has no other way."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    run = jit.JITFunction.run

    def compile(self, *args, grid, warmup, **kw):
        kernel = run(self, *args, grid=grid, warmup=True, **kw)
        assert kernel.metadata.shared <= 227 * 1024, f"{kernel.metadata.shared} bytes of shared memory"
        return kernel

    driver.set_active(Driver())
    jit.JITFunction.run = compile


def patch_once():
    """Lets the interpreter replace the functions of triton.language once, for good, and not at every call of a function
    with @triton.jit, which takes a third of its time. By Triton's internals; where they are others, nothing is done."""
    from triton.runtime import interpreter
    patch, done = getattr(interpreter, "_patch_lang", None), set()

    class Kept:
        restore = staticmethod(lambda: None)

    def patch_module(fn):
        if id(fn.__globals__) not in done:
            done.add(id(fn.__globals__))
            patch(fn)
        return Kept

    interpreter._patch_lang = patch_module


def main(mode):
    """Runs all checks; prints {"name dtype": "" or what went wrong}."""
    if mode == "compile":
        compile_only()
    if mode == "interpreter":
        patch_once()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from ops import triton_kernels as kernels
    results = {}
    for check in CHECKS:
        for name, dtype in DTYPES.items():
            cases = 0
            try:
                for case in check(kernels, Inputs("cuda" if mode == "cuda" else "cpu", dtype)):
                    cases += 1
                    if mode != "compile":
                        judge(*case)
                assert cases > 0 or check is no_rows
                message = ""
            except Exception:
                message = f"case {cases}: {traceback.format_exc()}"
            results[f"{check.__name__} {name}"] = message
    if mode == "interpreter":
        os.environ["FUSED_THROUGH_KERNELS"] = "1"
        with contextlib.redirect_stdout(io.StringIO()) as said:
            failed = pytest.main(["-p", "no:cacheprovider", str(ROOT / "tests" / "ops" / "test_fused.py")])
        results["fused"] = said.getvalue()[-3000:] if failed or " passed" not in said.getvalue() else ""
    print(json.dumps(results))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """results(mode): what main(mode) prints, run once."""
    found = {}

    def get(mode):
        if mode == "interpreter" and version("triton") < (3, 7) and version("numpy") >= (2, 4):
            pytest.skip("the interpreter of triton before 3.7 fails on numpy from 2.4 on")
        if mode not in found:
            env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            env |= {"interpreter": {"TRITON_INTERPRET": "1"}, "cuda": {},
                    "compile": {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}}[mode]
            run = subprocess.run([sys.executable, __file__, mode], env=env, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
            found[mode] = json.loads(run.stdout.splitlines()[-1])
        return found[mode]
    return get


def version(package):
    return tuple(int(n) for n in importlib.metadata.version(package).split(".")[:2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
@pytest.mark.parametrize("mode", ["interpreter"] + ["cuda"] * torch.cuda.is_available())
def test_kernels_equal_their_definitions(results, mode, check, dtype):
    message = results(mode)[f"{check} {dtype}"]
    assert not message, message


def test_the_fused_ops_on_top_of_them(results):
    """test_fused.py once more, now as fused.py runs on CUDA."""
    assert not results("interpreter")["fused"], results("interpreter")["fused"]


@pytest.mark.slow
def test_every_launch_compiles_for_a_gpu(results):
    assert not any(results("compile").values()), next(filter(None, results("compile").values()))


if __name__ == "__main__":
    main(sys.argv[1])
