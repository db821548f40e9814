"""check.py - every Triton kernel once on small inputs, beside its plain definition.

    python -m ops.check                          # on a GPU: the whole table, at shapes of a small model
    TRITON_INTERPRET=1 python -m ops.check       # without one, in Triton's interpreter: its times mean nothing

A run on CUDA begins with replace_broken(): what raises or differs is off for that run, its definition takes its place.

N: tokens, B rows of them   D: width   r: rank   C: head_dim   the difference of two tensors: the largest one of their
entries, divided by the largest entry. (A norm would hide one wrong entry among thousands.)
"""
import functools
import os
import statistics
import sys
import time

import torch
from torch.autograd.functional import vjp

from ops import fused
from ops.generation import FastLinear, OneToken
from ops.quantize import GROUP, KINDS, LEVELS, quantize_weight

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
EPS = 1e-5


def cases(device, dtype, B=3, T=5, D=192, r=10, C=16):
    """[(name, function, definition, inputs)]. The name begins with the kernel's, and the function launches that one and
    no other. Function and definition take the inputs and return a tensor or several; the definition in float64 too."""
    k, generator, N = fused.triton(), torch.Generator().manual_seed(0), B * T

    def randn(*shape, dtype=dtype, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    fp32 = dict(dtype=torch.float32)
    x, g, W, bias = randn(N, D), randn(N, D), randn(D + 1, D, scale=D ** -0.5), randn(D + 1)
    U, V, d, angle = randn(D + 1, r, **fp32), randn(D, r, **fp32), randn(B, r, **fp32), randn(1, T, C // 2, **fp32)
    target = torch.randint(D + 1, (N,), generator=generator).to(device)
    rstd = (x.float().square().mean(1) + EPS).rsqrt()
    int8, nf4 = (quantize_weight(W, kind) for kind in KINDS)
    levels = torch.tensor(LEVELS, device=device)

    def of_int8(codes, scales):
        return codes * scales[:, None]

    def of_nf4(codes, scales):
        q = torch.stack([codes % 16, codes // 16], dim=2).flatten(1).long()           # (d_out, D), D even
        return levels.to(scales)[q] * scales.repeat_interleave(GROUP, 1)[:, :D]

    def of_rms(x, w):
        return fused.rms_norm_plain(x, w, EPS), (x.square().mean(1) + EPS).rsqrt()

    def of_layer(x, W, bias, U, V, d):
        return fused.svd_lora_linear_plain(x, W, U, V, d, bias)

    def decode(weight, dense):                                # B rows of one token, laid out as a decode step has it
        layer = OneToken([FastLinear(weight, bias, (V.to(dtype), d[:, None], U.T.to(dtype)))])
        return lambda x, *_: layer(x[:, None])[:, 0], of_layer, (x[:B], dense.to(dtype), bias, U, V, d)

    return [
        ("svd_lora_down", lambda x, V, d: k.svd_lora_down(x, V, d, T),
         lambda x, V, d: (x @ V.to(x.dtype)) * d.repeat_interleave(T, 0), (x, V, d)),
        ("svd_lora_up_", lambda y, h, U: k.svd_lora_up_(y.clone(), h, U), lambda y, h, U: y + (h @ U.T).to(y.dtype),
         (randn(N, D + 1), randn(N, r, **fp32), U)),
        ("svd_lora_decode", *decode(W, W)),
        ("svd_lora_decode of int8", *decode(int8, of_int8(int8.codes, int8.scales))),
        ("svd_lora_decode of nf4", *decode(nf4, of_nf4(nf4.codes, nf4.scales.float()))),
        ("logprob_rows", lambda logits, y: k.logprob_rows(logits.clone(), y, True, dtype),
         lambda logits, y: fused.logprob_rows_plain(logits, y, True, logits.dtype), (randn(N, D + 1, **fp32), target)),
        ("rms_norm_forward", lambda x, w: k.rms_norm_forward(x, w, EPS), of_rms, (x, bias[:D])),
        ("rms_norm_backward", lambda g, x, w: k.rms_norm_backward(g, x, w, rstd, True),
         lambda g, x, w: vjp(lambda *xw: fused.rms_norm_plain(*xw, EPS), (x, w), g)[1], (g, x, bias[:D])),
        ("rotate_", lambda x, cos, sin: k.rotate_(x.clone(), cos, sin, 1), fused.rope_plain,
         (x.view(B, T, -1, C), angle.cos(), angle.sin())),
        ("swiglu_forward", k.swiglu_forward, fused.swiglu_plain, (x, g)),
        ("swiglu_backward", k.swiglu_backward, lambda g, x, y: vjp(fused.swiglu_plain, (x, y), g)[1],
         (g, x, randn(N, D))),
        ("dequantize_int8", lambda c, s: k.dequantize_int8(c, s, dtype), of_int8, (int8.codes[:37], int8.scales[:37])),
        ("dequantize_4bit of nf4", lambda c, s: k.dequantize_4bit(c, s, levels, GROUP, D, dtype), of_nf4,
         (nf4.codes[:37], nf4.scales[:37])),
    ]


def difference(function, definition, inputs):
    """The difference of function(*inputs) from its definition in float64; NaN where a result has one."""
    both = function(*inputs), definition(*(t.double() if t.is_floating_point() else t for t in inputs))
    got, want = (y if isinstance(y, tuple) else (y,) for y in both)
    each = [(a.double() - b).abs().max() / b.abs().max() for a, b in zip(got, want, strict=True)]
    return torch.stack(each).max().item()


@functools.cache
def replace_broken(device, dtype, quantize=None):
    """Runs every kernel that a base of this dtype, maybe quantised ("int8", "nf4"), has use for on this device, once in
    a process, and turns off those that raise or differ, each with one line. Does nothing on a CPU, which has none.

    Raises RuntimeError where one has left the device unusable, as a wrong address does: then nothing here can go on.
    """
    if dtype not in TOLERANCE or not fused.use_kernels(torch.empty(0, dtype=dtype, device=device)):
        return
    try:
        every = cases(device, dtype)
    except ImportError as e:
        return fused.turn_off("all", device, fused.first_line(e))
    for name, *case in every:
        if not fused.on(name.split()[0]) or any(kind in name for kind in KINDS if kind != quantize):
            continue
        try:
            error = difference(*case)
            why = f"differs from its definition by {error:.1e} of the largest value"
        except Exception as e:                                # of torch, CUDA or Triton
            error, why = float("nan"), fused.first_line(e)
            try:
                torch.zeros(1, device=device).item()
            except RuntimeError:
                raise RuntimeError(f"kernel {name} has left {device} unusable ({why}): start again with --plain") from e
        if not error <= TOLERANCE[dtype]:                     # NaN is not below
            fused.turn_off(name.split()[0], device, f"{why} ({name}, {dtype})".replace("torch.", ""))


def milliseconds(function, inputs):
    """The median of five calls; on a CPU, where the interpreter's time says nothing, one call."""
    wait, calls, seconds = (torch.cuda.synchronize, 5, []) if inputs[0].is_cuda else (lambda: None, 1, [])
    for _ in range(calls):
        wait()
        start = time.perf_counter()
        function(*inputs)
        wait()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def main():
    """Prints the table; returns 1 where a kernel raises or differs or none was run, else 0."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        print("no CUDA device here: no kernel runs, every operation is its plain definition")
        if os.environ.get("TRITON_INTERPRET") != "1":
            print("TRITON_INTERPRET=1 python -m ops.check runs them in Triton's interpreter (pip install triton)")
            return 1
        fused.use_kernels = lambda x: x.dtype != torch.float64
    large, failed = dict(B=8, T=512, D=2048, C=64) if device.type == "cuda" else {}, 0
    print(f"{'kernel':23} {'dtype':8} {'shape of each input':50} {'error':>8} {'ms':>8} {'plain ms':>8}")
    for dtype in TOLERANCE:
        for name, function, definition, inputs in cases(device, dtype, **large):
            shapes = " ".join("x".join(map(str, t.shape)) for t in inputs)
            start = f"{name:23} {str(dtype).removeprefix('torch.'):8} {shapes:50}"
            try:
                error = difference(function, definition, inputs)
                start += f" {error:8.1e} {milliseconds(function, inputs):8.3f} {milliseconds(definition, inputs):8.3f}"
                wrong = "" if error <= TOLERANCE[dtype] else "differs"
            except Exception as e:                            # the other kernels are still looked at
                wrong = fused.first_line(e)
            failed += bool(wrong)
            print(start, wrong)
    print(f"{failed} raise or differ: a run on this device goes on without them" if failed else "all are right")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
