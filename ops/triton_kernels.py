"""triton_kernels.py - the Triton kernels that ops/ launches on CUDA, each with a thin launcher.

    svd_lora_down         h = (x V) · d                            svd_lora_up_         y += h Uᵀ, in place
    svd_lora_decode       x Wᵀ + b + ((x V) · d) Uᵀ of a few rows: whole layers in one launch, W maybe quantised
    logprob_rows          log-probabilities from rows of logits, with their gradient, two passes over them
    rms_norm_forward/backward        rotate_, in place             swiglu_forward/backward
    dequantize_int8       codes · scale of the row                 dequantize_4bit      level[nibble] · scale of a group

N: tokens, (B, T) flattened   D: width   r: rank   C: head_dim   H: heads   V: the vocabulary's size; in the SVD-LoRA
kernels the matrix V (d_in, r)   In the names of kernel arguments, B…: a block's size, s…: a stride in elements
A program is one instance of a kernel, as in Triton: programs run in parallel, each on its block of the result.

All of these are bound by memory: the aim is to touch every tensor once, in long runs, with enough programs to keep a
GPU's memory busy. Products of many rows are left to the vendor's library. All kernels accept fp32 and bf16, any sizes,
rows with gaps between them, and no rows at all. Arithmetic and sums are in fp32, in an order that never changes, so
equal runs give equal bits. Block sizes are fixed: a search for better ones gains little where memory is the bound, and
would time candidates at every new shape.

With TRITON_INTERPRET=1 in the environment before the import, all of it runs on CPU tensors
(tests/ops/test_triton_kernels.py).
"""
import os

import torch
import triton
import triton.language as tl

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
FLAT_BLOCK = 1024           # elementwise: 8 elements per thread, which in bf16 is one load of 16 bytes
VOCAB_BLOCK = 8192          # logits at a time
FEW_ROWS, MANY_ROWS = 2 ** 12, 2 ** 14                        # svd_lora_down: below these, a program takes 16, 32 rows
PARTIAL_SUMS = 512          # programs of rms_norm_backward: enough for any GPU, few beside its rows
DECODE_ROWS, DECODE_RANK = 64, 64                             # the most that svd_lora_decode takes
DECODE_OUTPUTS = 2 ** 14    # of one launch of it: below that, d_in is split


def _launch(kernel, programs, tensor, *args, **constants):
    """Runs so many programs of a kernel, maybe none, on the device of its first argument. (By itself Triton launches on
    the current device.)"""
    if programs > 0:
        with torch.cuda.device_of(tensor):
            kernel[(programs,)](tensor, *args, **constants)


def _rows(x):
    """x if its last dimension is contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# The SVD-LoRA branch. r is no multiple of anything: it is padded with zeros to what tl.dot takes.

@triton.jit
def _dot(a, b, dtype: tl.constexpr):
    """a b, summed in fp32. bf16 tensors are multiplied as bf16, all others as true fp32 (not TF32)."""
    if dtype == tl.bfloat16 and not INTERPRET:                # the interpreter would multiply the bit patterns of bf16
        a, b = a.to(tl.bfloat16), b.to(tl.bfloat16)
    else:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _down_kernel(x, V, d, h, N, d_in, r, rows, sx, sV, sd, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr):
    i, j = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BR)
    x_rows = x + i[:, None].to(tl.int64) * sx                                         # (BN, 1)
    acc = tl.zeros((BN, BR), tl.float32)
    for start in range(0, d_in, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(x_rows + k[None, :], mask=(i[:, None] < N) & (k[None, :] < d_in), other=0.0)            # (BN, BK)
        b = tl.load(V + k[:, None] * sV + j[None, :], mask=(k[:, None] < d_in) & (j[None, :] < r), other=0.0)
        acc += _dot(a, b, x.dtype.element_ty)                                         # (BN, BK) (BK, BR)
    mask = (i[:, None] < N) & (j[None, :] < r)
    if d is not None:
        acc *= tl.load(d + (i // rows)[:, None] * sd + j[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(h + i[:, None].to(tl.int64) * r + j[None, :], acc, mask=mask)


def svd_lora_down(x, V, d, rows):
    """h = (x V) · d. x: (N, d_in), V: (d_in, r), d: (r,), or (B, r) where token n belongs to row n // rows, or None for
    x V alone  ->  (N, r) fp32"""
    (N, d_in), r = x.shape, V.shape[1]
    h = torch.empty(N, r, dtype=torch.float32, device=x.device)
    x, V, d = _rows(x), _rows(V), d if d is None else _rows(d)
    per_row = d is not None and d.ndim == 2
    assert not per_row or len(d) * rows == N, f"{N} tokens are not {len(d)} rows of {rows}"
    # Where there are few rows, a program gets few, so that there are enough programs; where there are many it gets
    # more, since every program reads all of V.
    block = 16 if N < FEW_ROWS else 32 if N < MANY_ROWS else 64
    BR = max(16, triton.next_power_of_2(r))
    _launch(_down_kernel, triton.cdiv(N, block), x, V, d, h, N, d_in, r, rows if per_row else 1, x.stride(0),
            V.stride(0), d.stride(0) if per_row else 0, BN=block, BK=max(32, 4096 // (BR * x.element_size())), BR=BR,
            num_stages=4)                                     # shared memory: 92 KB at most
    return h


@triton.jit
def _up_kernel(y, h, U, N, d_out, r, sy, sy_column, sh, sU, BN: tl.constexpr, BD: tl.constexpr):
    tiles = tl.cdiv(d_out, BD)                                # neighbouring programs share rows of y and h
    i = tl.program_id(0) // tiles * BN + tl.arange(0, BN)
    j = tl.program_id(0) % tiles * BD + tl.arange(0, BD)
    tile = y + i[:, None].to(tl.int64) * sy + j[None, :].to(tl.int64) * sy_column
    mask = (i[:, None] < N) & (j[None, :] < d_out)
    new = tl.load(tile, mask=mask, other=0.0).to(tl.float32)                          # (BN, BD)
    h_rows = h + i[:, None].to(tl.int64) * sh                                         # (BN, 1)
    for start in range(0, r, 16):                             # 16 at a time, to save registers
        k = start + tl.arange(0, 16)
        a = tl.load(h_rows + k[None, :], mask=(i[:, None] < N) & (k[None, :] < r), other=0.0)               # (BN, 16)
        b = tl.load(U + j[None, :] * sU + k[:, None], mask=(j[None, :] < d_out) & (k[:, None] < r), other=0.0)
        new += _dot(a, b, y.dtype.element_ty)                                         # (BN, 16) (16, BD)
    tl.store(tile, new.to(y.dtype.element_ty), mask=mask)


def svd_lora_up_(y, h, U):
    """y += h Uᵀ, in place. y: (N, d_out) of any strides, h: (N, r), U: (d_out, r)."""
    (N, d_out), h, U = y.shape, _rows(h), _rows(U)
    tile = 64                                                 # 16 elements per thread: they stay in its registers
    _launch(_up_kernel, triton.cdiv(N, tile) * triton.cdiv(d_out, tile), y, h, U, N, d_out, U.shape[1], *y.stride(),
            h.stride(0), U.stride(0), BN=tile, BD=tile, num_warps=8)
    return y


# ---------------------------------------------------------------------------------------------------------------------
# The linear layers of a decode step. A few rows multiply each matrix, so a step takes as long as reading W.
#
# A program computes a strip of outputs. It reads its strip of W once and, from the L2 cache, all of x and V: that every
# program computes x V for itself is cheaper than one more launch. It reads rows / strip times as much of x as of W, and
# the cache of a large GPU is only a little faster than its memory: so strips are wide, 128 outputs, which are rows of
# the product W xᵀ. A matrix of 4096 outputs has too few such strips to occupy a GPU: then several programs share a
# strip and each takes a part of d_in, down to about one program per multiprocessor. A layer with its branch is linear
# in x, so each program gets a whole y from its part of d_in. The last one to finish a strip adds them, in their order.

@triton.jit
def _4bit_tile(W_rows, scale_rows, is_output, start, d_in, GROUP: tl.constexpr, BK: tl.constexpr):
    i, g = start // 2 + tl.arange(0, BK // 2), start // GROUP + tl.arange(0, BK // GROUP)
    bytes = tl.load(W_rows + i[None, :], mask=is_output & (2 * i[None, :] < d_in), other=0)                 # (BO, BK/2)
    return bytes, tl.load(scale_rows + g[None, :], mask=is_output & (GROUP * g[None, :] < d_in), other=0.0)


@triton.jit
def _decode_kernel(x, W, W1, W2, scales, scales1, scales2, table, V, d, U, bias, y, parts, finished, N, d_out, d_out1,
                   d_out2, d_in, r, steps, sx, sW, ss, sd_layer, sd_row, SPLITS: tl.constexpr, GROUP: tl.constexpr,
                   BN: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr):
    dtype: tl.constexpr = x.dtype.element_ty
    slot, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    strip, layer, before = slot, 0, 0                         # of this layer; the layer; outputs of those before it
    if W1 is not None:
        strips = tl.cdiv(d_out, BO)
        if strip >= strips:
            strip, layer, before, W, d_out = strip - strips, 1, d_out, W1, d_out1
            if scales is not None:
                scales = scales1
    if W2 is not None:
        strips1 = tl.cdiv(d_out1, BO)
        if (layer == 1) & (strip >= strips1):
            strip, layer, before, W, d_out = strip - strips1, 2, before + d_out1, W2, d_out2
            if scales is not None:
                scales = scales2
    n, o, c = tl.arange(0, BN), strip * BO + tl.arange(0, BO), tl.arange(0, BR)
    is_row, is_output = n[:, None] < N, o[:, None] < d_out
    W_rows = W + o[:, None].to(tl.int64) * sW                                         # (BO, 1)
    first = split * steps * BK
    if W.dtype.element_ty == tl.uint8:
        scale_rows = scales + o[:, None].to(tl.int64) * ss
        next_bytes, next_scale = _4bit_tile(W_rows, scale_rows, is_output, first, d_in, GROUP, BK)
    acc, h = tl.zeros((BO, BN), tl.float32), tl.zeros((BN, BR), tl.float32)            # W xᵀ, transposed; x V
    for start in tl.range(first, tl.minimum(first + steps * BK, d_in), BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        a = tl.load(x + n[:, None] * sx + k[None, :], mask=is_row & (k[None, :] < d_in), other=0.0)         # (BN, BK)
        if W.dtype.element_ty == tl.uint8:
            # One tile ahead by hand: Triton reads no index ahead, which the codes are.
            bytes, scale = next_bytes.to(tl.int32), next_scale.to(tl.float32)         # (BO, BK/2), (BO, BK/GROUP)
            next_bytes, next_scale = _4bit_tile(W_rows, scale_rows, is_output, start + BK, d_in, GROUP, BK)
            scale = tl.broadcast_to(scale[:, :, None], (BO, BK // GROUP, GROUP // 2)).reshape(BO, BK // 2)
            even = tl.load(table + (bytes & 15)).to(tl.float32) * scale
            odd = tl.load(table + (bytes >> 4)).to(tl.float32) * scale
            w = tl.interleave(even.to(dtype), odd.to(dtype))                          # (BO, BK)
        else:
            w = tl.load(W_rows + k[None, :], mask=is_output & (k[None, :] < d_in), other=0)
        acc += _dot(w, a.T, dtype)                                                    # (BO, BK) (BK, BN)
        if V is not None:
            v = tl.load(V + (layer * BR + c[:, None]) * d_in + k[None, :], mask=k[None, :] < d_in, other=0.0)
            h += _dot(a, v.T, dtype)                                                  # (BN, BK) (BK, BR)
    if W.dtype.element_ty == tl.int8:
        acc *= tl.load(scales + o[:, None], mask=is_output, other=0.0).to(tl.float32)
    if V is not None:
        d_rows = d + layer * sd_layer + n[:, None] * sd_row
        h *= tl.load(d_rows + c[None, :], mask=is_row & (c[None, :] < r), other=0.0).to(tl.float32)
        u = tl.load(U + (before + o[:, None]) * BR + c[None, :], mask=is_output, other=0.0)
        acc += _dot(u, h.T, dtype)                                                    # (BO, BR) (BR, BN)
    last = True
    if SPLITS > 1:
        here = tl.arange(0, BO)[:, None] * BN + n[None, :]
        ours = parts + slot.to(tl.int64) * SPLITS * BO * BN
        tl.store(ours + split * BO * BN + here, acc)
        tl.debug_barrier()                                    # all threads have stored before one of them says so
        last = tl.atomic_add(finished + slot, 1, sem="acq_rel") == SPLITS - 1
        if last:
            acc = tl.zeros((BO, BN), tl.float32)
            for i in range(SPLITS):
                acc += tl.load(ours + i * BO * BN + here, cache_modifier=".cg")       # not what L1 may hold of before
            tl.store(finished + slot, 0)                      # for the next launch
    if last:
        if bias is not None:
            acc += tl.load(bias + before + o[:, None], mask=is_output, other=0.0).to(tl.float32)
        tile = y + before * N + n[:, None] * d_out + o[None, :]          # one layer's y after the other's
        tl.store(tile, acc.T.to(dtype), mask=is_row & (o[None, :] < d_out))


def svd_lora_decode(x, W, V, d, U, bias, finished, scales=None, table=None, group=64):
    """y = x Wᵀ + b + ((x V) · d) Uᵀ for one to three layers of one input, in one launch.

    x: (N, d_in), N <= DECODE_ROWS   W: a tuple of (d_out, d_in), one matrix per layer   V: (layers, BR, d_in), each
    layer's V transposed and padded with zeros to a rank BR that is a power of two from 16 to DECODE_RANK, contiguous;
    or None, then d and U too   d: (layers, r) or (layers, N, r), r <= BR   U: (all d_out, BR), the layers' stacked,
    padded alike   bias: (all d_out,) or None   finished: (all d_out,) int32 zeros, which the kernel leaves zero; two
    launches that may run at the same time must not share them.
    Quantised: W int8, scales a tuple of (d_out,); or W uint8, two codes in a byte, the even column in the low four
    bits, scales a tuple of (d_out, ceil(d_in / group)), and table (16,), the codes' values. With bf16, a table of 16
    bits is much faster: Triton would copy wider values to shared memory one by one. No dequantised W is written.
    Returns a tuple of (N, d_out) in x's dtype, each contiguous.
    """
    (N, d_in), sizes, x = x.shape, [len(w) for w in W], _rows(x)
    assert N <= DECODE_ROWS and len(W) <= 3 and all(w.stride() == W[0].stride() and w.stride(1) == 1 for w in W)
    BR, r = (16, 0) if V is None else (V.shape[1], d.shape[-1])
    assert d is None or d.ndim == 2 or d.shape[1] == N, f"d of {d.shape[1]} rows for {N}"
    assert BR <= DECODE_RANK and (V is None or V.is_contiguous() and U.is_contiguous() and len(U) == sum(sizes))
    d, bias = (t if t is None else t.contiguous() for t in (d, bias))
    y = torch.empty(N * sum(sizes), dtype=x.dtype, device=x.device)
    if len(y) > 0:
        # Strip, columns of W at a time, stages, warps: three or four tiles of W of 16 KB are on their way to every
        # multiprocessor, as many bytes as arrive during one read's latency. Unpacking 4 bits takes registers, so those
        # strips are half as wide. fp32 does not use tensor cores, and needs the registers of 8 warps.
        BO, BK, stages, warps = {
            (2, torch.int8): (128, 128, 3, 8), (2, torch.uint8): (64, 128, 3, 8), (2, x.dtype): (128, 64, 4, 4),
            (4, torch.int8): (64, 64, 2, 8), (4, torch.uint8): (64, 64, 2, 8), (4, x.dtype): (64, 32, 3, 8),
        }[x.element_size(), W[0].dtype]
        assert BK % group == 0 or W[0].dtype != torch.uint8, f"groups of {group} do not make {BK} columns"
        strips, tiles = sum(triton.cdiv(n, BO) for n in sizes), triton.cdiv(d_in, BK)
        steps = triton.cdiv(tiles, min(8, triton.cdiv(DECODE_OUTPUTS, sum(sizes))))
        splits, BN = triton.cdiv(tiles, steps), max(16, triton.next_power_of_2(N))
        parts = torch.empty(strips * splits * BO * BN if splits > 1 else 0, dtype=torch.float32, device=x.device)
        assert len(finished) >= strips
        three = lambda seq, rest=None: (*seq, *[rest] * (3 - len(seq)))
        _launch(_decode_kernel, strips * splits, x, *three(W), *three(scales or ()), table, V, d, U, bias, y, parts,
                finished, N, *three(sizes, 0), d_in, r, steps, x.stride(0), W[0].stride(0),
                scales[0].stride(0) if scales else 0, 0 if d is None else d.stride(0),
                d.stride(1) if d is not None and d.ndim == 3 else 0, SPLITS=splits, GROUP=group, BN=BN, BO=BO, BK=BK,
                BR=BR, STAGES=stages, num_warps=warps)
    return tuple(part.view(N, n) for part, n in zip(y.split([N * n for n in sizes]), sizes))


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities. For a row l of logits and p = softmax(l):
#     log p(target) = l_target − log Z        ∂/∂l = onehot(target) − p

@triton.jit
def _logprob_kernel(logits, target, logp, grad, V, sl, sg, BV: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)                       # rows · V may exceed 2³¹
    logits += row * sl
    y = tl.load(target + row)
    l_target = tl.load(logits + y).to(tl.float32)             # now: grad may be written over the logits
    # The running maximum starts at a finite number: with −inf, a first block of −inf alone would give exp(inf − inf).
    top, Z = -3.0e38, 0.0                                     # maximum, Σ exp(l − top)
    for start in range(0, V, BV):
        v = start + tl.arange(0, BV)
        l = tl.load(logits + v, mask=v < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(l, axis=0))
        Z = tl.exp(top - higher) * Z + tl.sum(tl.exp(l - higher), axis=0)
        top = higher
    tl.store(logp + row, l_target - top - tl.log(Z))
    if grad is not None:
        for start in range(0, V, BV):
            v = start + tl.arange(0, BV)
            l = tl.load(logits + v, mask=v < V, other=-float("inf")).to(tl.float32) - top
            p = tl.exp(l) / Z
            tl.store(grad + row * sg + v, (tl.where(v == y, 1.0, 0.0) - p).to(grad.dtype.element_ty), mask=v < V)


def logprob_rows(logits, target, want_grad, grad_dtype):
    """log p(target) in every row of logits, in nats, and its gradient to the logits.

    logits: (N, V)   target: (N,) int64   ->  logp (N,) fp32 and ∂logp/∂logits (N, V) in grad_dtype, or None
    Where grad_dtype is the logits' own, the gradient overwrites the logits.
    """
    N, V = logits.shape
    logits, target = _rows(logits), target.contiguous()
    logp = torch.empty(N, dtype=torch.float32, device=logits.device)
    grad = None
    if want_grad:
        grad = logits if logits.dtype == grad_dtype else torch.empty(N, V, dtype=grad_dtype, device=logits.device)
    # Many warps for each row: then few rows are read at a time, and the second pass finds them in the L2 cache.
    _launch(_logprob_kernel, N, logits, target, logp, grad, V, logits.stride(0), grad.stride(0) if want_grad else 0,
            BV=min(VOCAB_BLOCK, triton.next_power_of_2(V)), num_warps=16)
    return logp, grad


# ---------------------------------------------------------------------------------------------------------------------
# RMSNorm, a row in one block. With n = x · rstd and q = g · weight:  y = n · weight,  dx = rstd (q − n · mean(q n)).

@triton.jit
def _rms_forward_kernel(x, weight, y, rstd, D, eps, sx, BD: tl.constexpr):
    row, j = tl.program_id(0).to(tl.int64), tl.arange(0, BD)
    a = tl.load(x + row * sx + j, mask=j < D, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(a * a, axis=0) / D + eps)
    w = tl.load(weight + j, mask=j < D, other=0.0).to(tl.float32)
    tl.store(y + row * D + j, (a * scale * w).to(y.dtype.element_ty), mask=j < D)
    tl.store(rstd + row, scale)


@triton.jit
def _rms_backward_kernel(g, x, weight, rstd, dx, partial, N, D, rows, sg, sx, BD: tl.constexpr):
    j = tl.arange(0, BD)
    w = tl.load(weight + j, mask=j < D, other=0.0).to(tl.float32)
    dw = tl.zeros((BD,), tl.float32)
    first = tl.program_id(0).to(tl.int64) * rows
    for row in range(first, tl.minimum(first + rows, N)):
        scale = tl.load(rstd + row)
        n = tl.load(x + row * sx + j, mask=j < D, other=0.0).to(tl.float32) * scale
        b = tl.load(g + row * sg + j, mask=j < D, other=0.0).to(tl.float32)
        q = b * w
        a = scale * (q - n * (tl.sum(q * n, axis=0) / D))
        tl.store(dx + row * D + j, a.to(dx.dtype.element_ty), mask=j < D)
        dw += b * n
    if partial is not None:
        tl.store(partial + tl.program_id(0).to(tl.int64) * D + j, dw, mask=j < D)


def _row_block(D):
    """A block that holds D elements, and warps for 16 of them per thread."""
    block = triton.next_power_of_2(D)
    return dict(BD=block, num_warps=min(16, max(1, block // 512)))


def rms_norm_forward(x, weight, eps):
    """y = x · rstd · weight and rstd = 1 / sqrt(mean x² + ε). x: (N, D), weight: (D,)  ->  y (N, D) in x's dtype and
    rstd (N,) fp32. One row is one block: meant for D up to 8192."""
    N, D = x.shape
    x, weight = _rows(x), weight.contiguous()
    y, rstd = torch.empty(N, D, dtype=x.dtype, device=x.device), torch.empty(N, dtype=torch.float32, device=x.device)
    _launch(_rms_forward_kernel, N, x, weight, y, rstd, D, eps, x.stride(0), **_row_block(D))
    return y, rstd


def rms_norm_backward(g, x, weight, rstd, want_weight):
    """g: (N, D), the gradient of y; x, weight, rstd: of the forward pass  ->  dx (N, D) in x's dtype, dweight (D,) fp32
    or None. For dweight every program sums over its rows, and torch sums over programs: always in the same order."""
    N, D = x.shape
    g, x, weight, rstd = _rows(g), _rows(x), weight.contiguous(), rstd.contiguous()
    dx = torch.empty(N, D, dtype=x.dtype, device=x.device)
    rows = max(1, triton.cdiv(N, PARTIAL_SUMS)) if want_weight else 1
    programs = triton.cdiv(N, rows)
    partial = torch.empty(programs, D, dtype=torch.float32, device=x.device) if want_weight else None
    _launch(_rms_backward_kernel, programs, g, x, weight, rstd, dx, partial, N, D, rows, g.stride(0), x.stride(0),
            **_row_block(D))
    return dx, partial.sum(0) if want_weight else None


# ---------------------------------------------------------------------------------------------------------------------
# Rotary embedding, half-split: a program takes one token and a block of its heads.

@triton.jit
def _rotate_kernel(x, cos, sin, T, H, half, sign, sb, st, sh, s_cos, BH: tl.constexpr, BC: tl.constexpr):
    blocks = tl.cdiv(H, BH)
    token = tl.program_id(0) // blocks
    batch, t = (token // T).to(tl.int64), (token % T).to(tl.int64)
    heads = tl.program_id(0) % blocks * BH + tl.arange(0, BH)
    c = tl.arange(0, BC)
    cosine = tl.load(cos + batch * s_cos + t * half + c, mask=c < half, other=0.0).to(tl.float32)[None, :]  # (1, BC)
    sine = tl.load(sin + batch * s_cos + t * half + c, mask=c < half, other=0.0).to(tl.float32)[None, :] * sign
    first = x + batch * sb + t * st + heads[:, None] * sh + c[None, :]                # the half a; b lies `half` on
    mask = (heads[:, None] < H) & (c[None, :] < half)
    a = tl.load(first, mask=mask, other=0.0).to(tl.float32)                           # (BH, BC)
    b = tl.load(first + half, mask=mask, other=0.0).to(tl.float32)
    tl.store(first, (a * cosine - b * sine).to(x.dtype.element_ty), mask=mask)
    tl.store(first + half, (b * cosine + a * sine).to(x.dtype.element_ty), mask=mask)


def rotate_(x, cos, sin, sign):
    """(a, b) -> (a cos − sign · b sin, b cos + sign · a sin) in place, a and b the halves of the last dimension.

    x: (B, T, H, C) of any strides, the last dimension contiguous   cos, sin: (B or 1, T, C/2) fp32   sign: 1, or −1 to
    rotate back. Returns x.
    """
    (B, T, H), half = x.shape[:3], x.shape[-1] // 2
    assert x.stride(-1) == 1 and cos.shape == sin.shape and cos.shape[1:] == (T, half), "see the docstring"
    cos, sin, BC = cos.contiguous(), sin.contiguous(), triton.next_power_of_2(half)
    BH = min(triton.next_power_of_2(H), max(1, 2048 // BC))                           # at most 16 pairs per thread
    _launch(_rotate_kernel, B * T * triton.cdiv(H, BH), x, cos, sin, T, H, half, sign, *x.stride()[:3],
            T * half if cos.shape[0] > 1 else 0, BH=BH, BC=BC)
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Elementwise activations, on flattened tensors.

@triton.jit
def _block(n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return i, i < n


@triton.jit
def _swiglu_forward_kernel(gate, up, y, n, BLOCK: tl.constexpr):
    i, mask = _block(n, BLOCK)
    a, b = tl.load(gate + i, mask=mask).to(tl.float32), tl.load(up + i, mask=mask).to(tl.float32)
    tl.store(y + i, (a * tl.sigmoid(a) * b).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward_kernel(g, gate, up, dgate, dup, n, BLOCK: tl.constexpr):
    i, mask = _block(n, BLOCK)
    a, b = tl.load(gate + i, mask=mask).to(tl.float32), tl.load(up + i, mask=mask).to(tl.float32)
    c, s = tl.load(g + i, mask=mask).to(tl.float32), tl.sigmoid(a)
    tl.store(dgate + i, (c * b * s * (1 + a * (1 - s))).to(dgate.dtype.element_ty), mask=mask)
    tl.store(dup + i, (c * a * s).to(dup.dtype.element_ty), mask=mask)


def _elementwise(kernel, inputs, n_out):
    """Launches kernel(*inputs, *outputs, n) over tensors of one shape. Returns new outputs like the last input."""
    assert all(t.shape == inputs[-1].shape for t in inputs), "inputs of one shape"
    inputs, n = [t.contiguous() for t in inputs], inputs[0].numel()
    outputs = [torch.empty_like(inputs[-1]) for _ in range(n_out)]
    _launch(kernel, triton.cdiv(n, FLAT_BLOCK), *inputs, *outputs, n, BLOCK=FLAT_BLOCK)
    return outputs


def swiglu_forward(gate, up):
    """silu(gate) · up, for tensors of any one shape."""
    return _elementwise(_swiglu_forward_kernel, [gate, up], 1)[0]


def swiglu_backward(g, gate, up):
    """The gradients of gate and of up, from g, the gradient of silu(gate) · up."""
    return tuple(_elementwise(_swiglu_backward_kernel, [g, gate, up], 2))


# ---------------------------------------------------------------------------------------------------------------------
# Quantised weights: a program writes a piece of one row.

@triton.jit
def _int8_kernel(codes, scales, out, d_in, sc, BD: tl.constexpr):
    blocks = tl.cdiv(d_in, BD)
    row, j = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    w = tl.load(codes + row * sc + j, mask=j < d_in, other=0).to(tl.float32) * tl.load(scales + row).to(tl.float32)
    tl.store(out + row * d_in + j, w.to(out.dtype.element_ty), mask=j < d_in)


def dequantize_int8(codes, scales, dtype):
    """codes · scale of the row. codes: (d_out, d_in) int8, scales: (d_out,) fp32  ->  (d_out, d_in) in dtype"""
    (d_out, d_in), codes, scales = codes.shape, _rows(codes), scales.contiguous()
    out = torch.empty(d_out, d_in, dtype=dtype, device=codes.device)
    BD = min(2048, triton.next_power_of_2(d_in))                                      # 16 codes per thread: one load
    _launch(_int8_kernel, d_out * triton.cdiv(d_in, BD), codes, scales, out, d_in, codes.stride(0), BD=BD)
    return out


@triton.jit
def _4bit_kernel(codes, scales, table, out, d_in, n_bytes, sc, ss, GROUP: tl.constexpr, BB: tl.constexpr):
    blocks = tl.cdiv(n_bytes, BB)
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    i = block * BB + tl.arange(0, BB)                                                 # bytes; columns 2i and 2i + 1
    byte = tl.load(codes + row * sc + i, mask=i < n_bytes, other=0).to(tl.int32)
    scale = tl.load(scales + row * ss + i // (GROUP // 2), mask=i < n_bytes, other=0.0).to(tl.float32)
    w = tl.interleave(tl.load(table + (byte & 15)) * scale, tl.load(table + (byte >> 4)) * scale)           # (2 BB,)
    j = block * 2 * BB + tl.arange(0, 2 * BB)
    tl.store(out + row * d_in + j, w.to(out.dtype.element_ty), mask=j < d_in)


def dequantize_4bit(codes, scales, table, group, d_in, dtype):
    """table[nibble] · scale of its group, the product in fp32.

    codes: (d_out, ceil(d_in / 2)) uint8, the even column in the low four bits   scales: (d_out, ceil(d_in / group))
    table: (16,) fp32   group: even, so that the two values of a byte share their scale  ->  (d_out, d_in) in dtype
    """
    assert group % 2 == 0, "with odd groups, the two values of a byte may have different scales"
    codes, scales, table = _rows(codes), _rows(scales), table.contiguous()
    d_out, n_bytes = codes.shape
    out = torch.empty(d_out, d_in, dtype=dtype, device=codes.device)
    BB = min(1024, triton.next_power_of_2(n_bytes))
    _launch(_4bit_kernel, d_out * triton.cdiv(n_bytes, BB), codes, scales, table, out, d_in, n_bytes, codes.stride(0),
            scales.stride(0), GROUP=group, BB=BB)
    return out
