"""fused.py - the operations that training spends its time in, each beside its plain-PyTorch definition.

    linear              y = x W0ᵀ + b                                            through the faster library on a CPU
    svd_lora_linear     y = x W0ᵀ + b + ((x V) · d) Uᵀ,   Panacea Eq. (9)        keeps x alone for the backward pass
    linear_logprob      log softmax(h Wᵀ)[target]                                never holds the (N, V) logits
    rms_norm, rope_, swiglu                                                      one pass each over their tensors

B: rows of a batch   T: tokens of a row   N: tokens, (B, T) flattened; in linear_logprob the predicted ones
D: d_model   V: vocabulary   H: heads   C: head_dim   r = k + m: rank   W0 (d_out, d_in): frozen, maybe quantised
(quantize.py)   In the SVD-LoRA functions U: (d_out, r)   V: (d_in, r)   d: (r,), or (B, 1, r), one preference per row

Every `*_plain` function defines its operation; the tests compare the fused one with it in float64. The backward passes
are written by hand. On CUDA the parts that are bound by memory are Triton kernels (triton_kernels.py); large products
stay with the vendor's library, which no kernel of ours would beat. triton_kernels is imported by triton() alone, at the
first launch, since Triton need not be installed where there is no GPU.
"""
import functools
import time

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

ONEDNN_FROM = 2 ** 16       # products of matrices smaller than this lose more by oneDNN's overhead than they gain
COPY_FROM = 1024            # rows from which a wide W that lies column by column is copied: without AVX-512 oneDNN is
                            # slow with it as it lies, and with AVX-512 the copy pays for itself
# where a CPU has no instructions for bf16: rows of a bf16 matrix that are converted to fp32 at a time; and the fewest
TILE_ROWS, TILES_FROM = 256, 16                               # rows of the other that the conversion always pays for
ROWS, TILE = 1024, 1024     # linear_logprob on a CPU in bf16: tokens and vocabulary entries at a time, 4 MB of logits
GUESS = 256                 # vocabulary entries from which it estimates log Z beforehand
WIDE_ROWS, WIDE_LOGITS = 256, 2 ** 24   # in fp32: tokens at a time, and logits (64 MB) where the vocabulary is large
CUDA_LOGITS = 2 ** 26       # linear_logprob on CUDA: elements of the logits held at a time (256 MiB in fp32)


def use_kernels(x):
    """Whether the Triton kernels work on x: on CUDA, except in float64, since the kernels sum in fp32. (Tests replace
    this function to run the kernels in Triton's interpreter.)"""
    return x.is_cuda and x.dtype != torch.float64


def triton():
    """The module triton_kernels."""
    from ops import triton_kernels
    return triton_kernels


OFF = set()                 # what this process does without: names of kernels, "CUDA graph", or "all" of these


def on(name):
    """Whether nothing has turned this kernel, or "CUDA graph", off."""
    return not OFF & {name, "all"}


def kernel(name, x):
    """The launcher of this name in triton_kernels where it works on x, else None: then the definition does."""
    return getattr(triton(), name) if use_kernels(x) and on(name) else None


def first_line(error):
    """An exception as one line: its type, and what it says first."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def turn_off(name, device, why):
    """From here on this process does without a kernel, "CUDA graph" or "all" of these; one line says so, and why."""
    if on(name):
        OFF.add(name)
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else device
        print(f"{name} on {where}: {why}; goes on without it, by its plain definition", flush=True)


def dense(W, dtype):
    """A frozen weight as a (d_out, d_in) matrix: W itself, or a new dense copy of a QuantizedWeight."""
    return W if isinstance(W, torch.Tensor) else W.dense(dtype)


def wide(x):
    """x in fp32; in float64 it stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------------------------------------------------------------
# Linear layers.

def has_onednn(dtype):
    """Whether products of this dtype can go through oneDNN on a CPU. In fp32 it is up to twice as fast as F.linear's
    library on some processors, for thin matrices up to twenty times, at the same precision. The operator belongs to
    torch but is private; where it is missing, F.linear computes the same."""
    return (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
            and (dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
                 and not slow_bf16()))


@functools.cache
def slow_bf16():
    """Whether this CPU multiplies bf16 so slowly that by_tiles is faster. Tried once, for some milliseconds of this
    thread's own time, which other processes do not lengthen. The two are a factor of two apart at least, one way with
    instructions for bf16 and the other way without, so the answer, and with it the bits of a run, does not change."""
    x, W, seconds = torch.ones(64, 512, dtype=torch.bfloat16), torch.ones(512, 512, dtype=torch.bfloat16), {}
    for way in (F.linear, by_tiles) * 3:
        start = time.thread_time()
        way(x, W)
        seconds[way] = min(seconds.get(way, 1.0), time.thread_time() - start)
    return seconds[by_tiles] < seconds[F.linear]


def by_tiles(x, W, bias=None, y=None):
    """product() of bf16 in fp32: W is converted some rows at a time, and a sum is rounded once. x: (N, d_in). With y,
    (N, d_out) bf16, the product is added to it in place."""
    wide, out = x.float(), torch.empty(len(x), len(W), dtype=x.dtype) if y is None else y
    for i in range(0, len(W), TILE_ROWS):
        rows = slice(i, i + TILE_ROWS)
        part = product(wide, W[rows].float(), bias if bias is None else bias[rows].float())
        out[:, rows] = part if y is None else part + y[:, rows]
    return out


def onednn_takes(x, W):
    """Whether x Wᵀ goes through oneDNN: on a CPU, where the matrices are large enough."""
    return large_on_cpu(x, W) and has_onednn(x.dtype)


def tiles_take(x, W):
    """Whether x Wᵀ goes through by_tiles. (For few rows F.linear is quick where W lies row by row, but slow, up to a
    hundred times, where it lies column by column.)"""
    return (large_on_cpu(x, W) and x.dtype == torch.bfloat16 and slow_bf16()
            and (x.numel() >= TILES_FROM * x.shape[-1] or W.stride(-1) > 1))


def large_on_cpu(x, W):
    """Whether F.linear has rivals for x Wᵀ: on a CPU, where the matrices are large enough."""
    if torch.compiler.is_compiling():                         # inductor has its own way of multiplying
        return False
    return (x.device.type == "cpu" and max(x.numel(), W.numel()) >= ONEDNN_FROM and x.numel() > 0
            and x.dtype == W.dtype)


def product(x, W, bias=None):
    """x Wᵀ + b without autograd. x: (…, d_in), W: (d_out, d_in), of any strides -> (…, d_out)"""
    flat = x.flatten(0, -2)                                                           # (N, d_in)
    if len(flat) >= COPY_FROM and len(W) > W.shape[1] and W.stride(-1) > 1 and onednn_takes(x, W):
        W = W.contiguous()
    y = (torch.ops.mkldnn._linear_pointwise(flat, W, bias, "none", [], "") if onednn_takes(x, W) else
         by_tiles(flat, W, bias) if tiles_take(x, W) else F.linear(flat, W, bias))
    # not a view: autograd forbids in-place changes of a view that a Function returned, and rope_ works in place
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], len(W)))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, bias):
        ctx.W = None if isinstance(W, torch.Tensor) else W                   # quantised: backward dequantises again
        trained = ctx.W is None and W.requires_grad                                   # a frozen W0 needs no x
        ctx.save_for_backward(x if trained else None, W if ctx.W is None else None)
        return product(x, dense(W, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):                                                             # (…, d_out)
        x, W = ctx.saved_tensors
        dx = dW = db = None
        if ctx.needs_input_grad[0]:
            dx = product(g, dense(ctx.W if W is None else W, g.dtype).T)              # g W: (…, d_in)
        if ctx.needs_input_grad[1]:
            dW = product(g.flatten(0, -2).T, x.flatten(0, -2).T)                      # gᵀ x: (d_out, d_in)
        if ctx.needs_input_grad[2]:
            db = g.flatten(0, -2).sum(0)
        return dx, dW, db


def linear(x, W, bias=None):
    """y = x Wᵀ + b. x: (…, d_in), W: (d_out, d_in) or a QuantizedWeight, bias: (d_out,) or None -> (…, d_out)

    Computes what F.linear computes, and calls it where nothing is faster. Gradients for x, W (unless quantised) and
    bias; with a frozen W, x is not kept for the backward pass.
    """
    if isinstance(W, torch.Tensor) and not onednn_takes(x, W) and not tiles_take(x, W):
        return F.linear(x, W, bias)
    return _Linear.apply(x, W, bias)


def svd_lora_linear_plain(x, W, U, V, d, bias=None):
    """The definition, Panacea Eq. (9) with gain · cat(σ, s·λ) in d: x W0ᵀ + b + ((x V) · d) Uᵀ."""
    return F.linear(x, W, bias) + ((x @ V.to(x.dtype)) * d.to(x.dtype)) @ U.T.to(x.dtype)


class _SVDLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, U, V, d, bias):
        ctx.W = None if isinstance(W, torch.Tensor) else W
        ctx.save_for_backward(x, W if ctx.W is None else None, U, V, d)               # x is the layer's input: no copy
        y = product(x, dense(W, x.dtype), bias)                                       # (B, T, d_out)
        return _up_(y, _down(x, V, d), U)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):                                                             # (B, T, d_out)
        x, W, U, V, d = ctx.saved_tensors
        a, e = _down(x, V), _down(g, U)                                               # x V and g U: (B, T, r)
        z = e * d                                                                     # in d's fp32
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _up_(product(g, dense(ctx.W if W is None else W, g.dtype).T), z, V)  # g W0 + ((g U) · d) Vᵀ
        flat = lambda t: t.flatten(0, -2)                                             # (B, T, n) -> (N, n)
        # gᵀ ((x V) · d), (d_out, r), and xᵀ ((g U) · d), (d_in, r); both transposed, as a CPU is faster at them
        dU = product(flat(a * d).to(g.dtype).T, flat(g).T).T.to(U.dtype)
        dV = product(flat(z).to(x.dtype).T, flat(x).T).T.to(V.dtype)
        dd = a.to(d.dtype) * e.to(d.dtype)                                            # Σ over tokens of (g U) · (x V):
        dd = flat(dd).sum(0) if d.ndim == 1 else dd.sum(1, keepdim=True)              # (r,), or (B, 1, r)
        return dx, None, dU, dV, dd, None


def _down(x, V, d=None):
    """(x V) · d: (…, d_in) -> (…, r)."""
    if launch := kernel("svd_lora_down", x):
        rows = x.shape[-2] if d is not None and d.ndim > 1 else 1
        d = d if d is None or d.ndim == 1 else d.flatten(0, -2)                       # (r,) or (B, r)
        return launch(x.flatten(0, -2), V, d, rows).view(*x.shape[:-1], V.shape[1])
    h = product(x, V.T.to(x.dtype))
    return h if d is None else h * d


def _up_(y, h, U):
    """y + h Uᵀ, in place. y: (…, d_out), h: (…, r)"""
    flat = y.flatten(0, -2)
    if launch := kernel("svd_lora_up_", y):
        launch(flat, h.flatten(0, -2), U)
    elif tiles_take(flat, flat):                              # thin as it is, this product would be the slowest of all
        by_tiles(h.flatten(0, -2), U, y=flat)
    else:
        flat.addmm_(h.flatten(0, -2).to(y.dtype), U.T.to(y.dtype))
    return y


def svd_lora_linear(x, W, U, V, d, bias=None):
    """y = x W0ᵀ + b + ((x V) · d) Uᵀ, Panacea Eq. (9); the gain is in d.

    x: (B, T, d_in), or (N, d_in) for a shared d   W: (d_out, d_in) or a QuantizedWeight, never trained   U: (d_out, r)
    V: (d_in, r)   d: (r,), or (B, 1, r) with one preference per row   bias: (d_out,) or None, never trained
    Returns (…, d_out). Gradients for x, U, V and d. The backward pass keeps x and the parameters alone: it computes x V
    and g U, (B, T, r) each, again, which is a hundredth of the layer's work.
    """
    return _SVDLoRALinear.apply(x, W, U, V, d, bias)


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities of tokens.

def linear_logprob_plain(hidden, weight, target):
    """The definition: log softmax(h Wᵀ)[target], by way of all (N, V) logits."""
    logps = (wide(hidden) @ wide(weight).T).log_softmax(-1)                           # (N, V)
    return logps.gather(1, target[:, None])[:, 0]


class _LinearLogprob(torch.autograd.Function):
    """For each token, with its logits l_v = h·W_v and p = softmax(l):

        log p(target) = l_target − log Z        its gradient to h: W_target − Σ_v p_v W_v

    Σ_v p_v W_v is softmax(h Wᵀ) W. So it is summed in the same pass as log Z, for some rows at a time, in bf16 tile by
    tile of the vocabulary, as in flash attention. The forward pass keeps this gradient, (N, D); the backward pass
    multiplies it by g, and computes no logit a second time.
    """

    @staticmethod
    def forward(ctx, hidden, weight, target):
        rows = (_logprob_rows_cuda if use_kernels(hidden) else
                _logprob_rows_fp32 if hidden.dtype == torch.float32 else _logprob_rows_bf16)
        logp, dlogp = rows(hidden, weight, target, ctx.needs_input_grad[0])
        ctx.save_for_backward(dlogp, *((hidden, weight, target) if ctx.needs_input_grad[1] else ()))
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx, g):                                                             # (N,)
        dlogp, *rest = ctx.saved_tensors
        dh = dW = None
        if ctx.needs_input_grad[0]:
            dh = g.to(dlogp.dtype)[:, None] * dlogp
        if ctx.needs_input_grad[1]:                           # a trained head: Σ_n g_n (onehot − p) hᵀ, logits again
            hidden, weight, target = rest
            dW = torch.zeros_like(weight, dtype=torch.float32)
            for rows in torch.arange(len(hidden), device=hidden.device).split(ROWS):
                h = hidden[rows]
                logits = product(h, weight).float()                                   # (rows, V)
                p = (logits - logits.logsumexp(1, keepdim=True)).exp_().mul_(-g[rows, None])
                p.scatter_add_(1, target[rows, None], g[rows, None].float())
                dW += product(p.to(h.dtype).T, h.T)                                   # (V, D)
            dW = dW.to(weight.dtype)
        return dh, dW, None


def _logprob_rows_fp32(hidden, weight, target, want_grad):
    """log p(target) (N,) fp32 and its gradient to hidden, (N, D) or None, on a CPU. No autograd."""
    logps, dlogps, weight = [], [], weight.float()
    for h, y in zip(*(t.split(min(WIDE_ROWS, max(1, WIDE_LOGITS // len(weight)))) for t in (hidden, target))):
        logits = product(h, weight)                                                   # (n, V)
        l_target, top = logits.gather(1, y[:, None])[:, 0], logits.amax(1, keepdim=True)
        e = logits.sub_(top).exp_()
        Z = e.sum(1)
        logps.append(l_target - top[:, 0] - Z.log())
        if want_grad:
            dlogps.append(weight[y] - product(e, weight.T).div_(Z[:, None]))          # (n, D)
    return torch.cat(logps), torch.cat(dlogps) if want_grad else None


def _logprob_rows_bf16(hidden, weight, target, want_grad):
    """The same in bf16, tile by tile of the vocabulary."""
    N, V = len(hidden), len(weight)
    logp, dlogp = torch.empty(N), torch.empty_like(hidden) if want_grad else None
    for i in range(0, N, ROWS):
        h, here = hidden[i:i + ROWS], slice(i, i + ROWS)                              # (n, D), n = ROWS or the rest
        W_target = weight[target[here]].to(h.dtype)
        # An estimate c of log Z is subtracted inside the product, as its bias. So what bf16 rounds is l − c, a small
        # number, and not l. The estimate is from the target and some of the vocabulary; any c gives the same sums.
        l_target = (h.float() * W_target.float()).sum(1)                              # (n,) fp32
        c = torch.logaddexp(l_target, product(h, weight[:GUESS]).float().logsumexp(1))
        top, Z = torch.zeros(len(h)), torch.zeros(len(h))     # running maximum of l − c (or 0), Σ exp(l − c − top)
        sum_W = torch.zeros(h.shape) if want_grad else None   # Σ exp(l − c − top) W
        for j in range(0, V, TILE):
            W = weight[j:j + TILE]                                                    # (v, D)
            l = (product(W, h, -c) if onednn_takes(W, h) else W.float() @ h.float().T - c).float()            # (v, n)
            higher = torch.maximum(top, l.amax(0))
            shrink = (top - higher).exp()
            e = l.sub_(higher).exp_()                                                 # (v, n)
            Z = Z * shrink + e.sum(0)
            if want_grad:
                sum_W = sum_W.mul_(shrink[:, None]).add_(product(e.T.to(W.dtype), W.T))                       # (n, D)
            top = higher
        logp[here] = l_target - c - (top + Z.log())
        if want_grad:
            dlogp[here] = W_target - sum_W.div_(Z[:, None])
    return logp, dlogp


def logprob_rows_plain(logits, target, want_grad, grad_dtype):
    """The definition of triton_kernels.logprob_rows: (log p(target) (N,), onehot − p (N, V) in grad_dtype or None)."""
    logps = logits.log_softmax(1)
    logp = logps.gather(1, target[:, None])
    return logp[:, 0], logps.exp_().neg_().scatter_add_(1, target[:, None], torch.ones_like(logp)).to(
        grad_dtype) if want_grad else None


def _logprob_rows_cuda(hidden, weight, target, want_grad):
    """The same, for some rows and the whole vocabulary at a time: the kernel replaces the logits by the gradient to
    them, in one pass, and a product with W makes it the gradient to hidden."""
    logps, dlogps = [], []
    for h, y in zip(*(t.split(max(1, CUDA_LOGITS // len(weight))) for t in (hidden, target))):
        logits = (torch.mm(h, weight.T, out_dtype=torch.float32) if h.is_cuda and h.dtype != torch.float32 else
                  h.float() @ weight.float().T)                                       # (n, V) fp32
        rows = kernel("logprob_rows", h) or logprob_rows_plain
        logp, dlogits = rows(logits, y, want_grad, h.dtype)
        logps.append(logp)
        if want_grad:
            dlogps.append(dlogits @ weight.to(h.dtype))                               # (n, D)
    return torch.cat(logps), torch.cat(dlogps) if want_grad else None


def linear_logprob(hidden, weight, target):
    """log p(target) under softmax(hidden · weightᵀ), without ever holding the (N, V) logits.

    hidden: (N, D)   weight: (V, D), hidden's dtype; frozen, also a narrower one   target: (N,) int64
    -> (N,) fp32, in nats
    Gradients for hidden, and for weight where it is trained. Sums are in fp32; float64 inputs take the definition.
    """
    if hidden.dtype == torch.float64 or len(hidden) == 0:
        return linear_logprob_plain(hidden, weight, target)
    return _LinearLogprob.apply(hidden, weight, target)


def log_partition(hidden, weight, target, logp):
    """log Z = log Σ_v exp(h·W_v) of every token, by h·W_target − log p(target), the latter of linear_logprob:
    without a second sum over the vocabulary, and with no logit rounded to bf16. -> (N,) fp32"""
    return (hidden.float() * weight[target].float()).sum(1) - logp


# ---------------------------------------------------------------------------------------------------------------------
# RMSNorm, rotary embedding, SwiGLU: Llama's parts between the linear layers.

def rms_norm_plain(x, weight, eps):
    """The definition: x / sqrt(mean x² + ε) · weight, over the last dimension."""
    return F.rms_norm(x, weight.shape, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        flat = x.flatten(0, -2)
        if launch := kernel("rms_norm_forward", x):
            y, rstd = launch(flat, weight, eps)
        else:
            wide = flat.float()
            rstd = wide.square().mean(-1).add_(eps).rsqrt_()                          # (N,)
            y = (wide * rstd[:, None]).mul_(weight).to(x.dtype)
        ctx.save_for_backward(x, weight, rstd)
        return torch.ops.aten._unsafe_view(y, x.shape)         # not a view, as in product(): rope_ may follow

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, weight, rstd = ctx.saved_tensors
        flat, gflat, want = x.flatten(0, -2), g.flatten(0, -2), ctx.needs_input_grad[1]
        if launch := kernel("rms_norm_backward", x):
            dx, dweight = launch(gflat, flat, weight, rstd, want)
        else:
            # with n = x·rstd and q = g·weight:  dx = rstd (q − n · mean(q n))
            n, q = flat.float() * rstd[:, None], gflat.float() * weight
            dweight = (gflat.float() * n).sum(0) if want else None
            dx = q.addcmul_(n, (q * n).mean(-1, keepdim=True), value=-1).mul_(rstd[:, None]).to(x.dtype)
        return dx.view(x.shape), dweight.to(weight.dtype) if want else None, None


def rms_norm(x, weight, eps):
    """RMSNorm over the last dimension, computed in fp32. x: (…, D), weight: (D,) -> (…, D), x's dtype. Keeps x and one
    number per token for the backward pass. In float64 it is the definition itself."""
    return rms_norm_plain(x, weight, eps) if x.dtype == torch.float64 else _RMSNorm.apply(x, weight, eps)


def rope_plain(x, cos, sin):
    """The definition: rotary embedding, half-split layout. x: (B, T, H, C), cos and sin: (B or 1, T, C/2) fp32."""
    (a, b), cos, sin = x.chunk(2, dim=-1), cos[:, :, None], sin[:, :, None]           # bf16 · fp32 is computed in fp32
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        ctx.mark_dirty(x)
        return _rotate_(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return _rotate_(g.clone(), *ctx.saved_tensors, -1), None, None                # the transpose rotates back


def _rotate_(x, cos, sin, sign):
    heads = x.unflatten(-1, (-1, 2 * cos.shape[-1]))                                  # (B, T, H·C) -> (B, T, H, C)
    if launch := kernel("rotate_", x):
        launch(heads, cos, sin, sign)
    elif x.dtype == torch.float32:
        (a, b), cos, sin = heads.chunk(2, dim=-1), cos[:, :, None], sign * sin[:, :, None]
        turned = (a * cos).addcmul_(b, sin, value=-1)
        b.mul_(cos).addcmul_(a, sin)
        a.copy_(turned)
    else:
        heads.copy_(rope_plain(heads, cos, sign * sin))
    return x


def rope_(x, cos, sin):
    """Rotary position embedding in place. x: (B, T, H·C), the projection of H heads; cos, sin: (B or 1, T, C/2) fp32.
    Nothing of x is kept: the backward pass rotates back."""
    return _Rope.apply(x, cos, sin)


def swiglu_plain(gate, up):
    """The definition: silu(gate) · up."""
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        launch = kernel("swiglu_forward", gate)
        return launch(gate, up) if launch else F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        gate, up = ctx.saved_tensors
        if launch := kernel("swiglu_backward", gate):
            return launch(g, gate, up)
        return torch.ops.aten.silu_backward(g * up, gate), F.silu(gate).mul_(g)


def swiglu(gate, up):
    """silu(gate) · up, elementwise, tensors of one shape. The backward pass keeps gate and up, and not silu(gate)."""
    return _SwiGLU.apply(gate, up)
