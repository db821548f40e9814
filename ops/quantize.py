"""quantize.py - a frozen base in one byte or half a byte per weight, dequantised each time it is multiplied.

    int8    w ≈ q · s,            q in -127..127, s: the row's largest |w| / 127                  8    bits per weight
    nf4     w ≈ LEVELS[q] · s,    q in 0..15,     s: the largest |w| of 64 neighbours in a row    4.25 bits per weight

NF4 is QLoRA's data type (arXiv:2305.14314, Sec. 3, Appendix E): normally distributed weights use its 16 levels about
equally often. Differs from the paper: a group's scale is kept as bf16, where the paper quantises the scales again.

codes: all q    scales: all s    levels: (16,)
int8: codes (d_out, d_in) int8, scales (d_out,) fp32
nf4:  codes (d_out, ceil(d_in / 2)) uint8, two in a byte, the even column in the low four bits; scales
      (d_out, ceil(d_in / 64)) bf16
dense() is level · scale in fp32, then rounded to the dtype asked for.

Transformer.from_pretrained(path, quantize="nf4") quantises every Linear inside the blocks while it reads them. Only
adapters can train on such a base: gradients reach x and biases, and the backward pass keeps the codes alone.
"""
from functools import cache
from statistics import NormalDist

import torch
import torch.nn as nn
import torch.nn.functional as F

from ops import fused

KINDS = ("int8", "nf4")
GROUP = 64                  # neighbours in a row that share one nf4 scale
CHUNK = 2 ** 18             # weights dequantised at a time on a CPU: what is in between stays in its cache
CHUNK_IN = 2 ** 18          # weights quantised at a time
CELLS = 2048                # parts of [0, 1] in which the level of a number is looked up


def nf4_levels():
    """The 16 levels, ascending: quantiles of N(0, 1) at even steps of probability, divided by the largest.

    Eight above the median, seven below it and the median itself, 0, so that zero weights stay zero.
    """
    last = 1 - (1 / 32 + 1 / 30) / 2              # the outermost probability: the mean of those that fit 8 and 7 levels
    half = lambda n: [NormalDist().inv_cdf(last + (0.5 - last) * i / n) for i in range(n)]    # n levels, without 0
    quantiles = sorted([-q for q in half(7)] + [0.0] + half(8))
    return [q / quantiles[-1] for q in quantiles]


LEVELS = nf4_levels()


@cache
@torch.inference_mode(False)                                  # it is cached, so it must be usable in any mode
def _levels(device):
    return torch.tensor(LEVELS, dtype=torch.float32, device=device)


@cache
@torch.inference_mode(False)
def _cells(device):
    """Of the cells [i / CELLS, (i + 1) / CELLS) from -1 to 1: how many of the 15 borders between levels lie below each,
    uint8, and the next border, fp32. No cell is so wide that two borders lie in it. (2 CELLS + 1,) each"""
    levels = _levels("cpu")
    borders = (levels[1:] + levels[:-1]) / 2
    edges = torch.arange(-CELLS, CELLS + 1) / CELLS
    below = (borders < edges[:, None]).sum(1)
    return below.to(torch.uint8).to(device), F.pad(borders, (0, 1), value=torch.inf)[below].to(device)


@cache
@torch.inference_mode(False)
def _pairs(device):
    """(256,) int64: the two levels of every byte, two fp32 numbers side by side. One look-up finds both."""
    byte = torch.arange(256, device=device)
    return torch.stack([_levels(device)[byte % 16], _levels(device)[byte // 16]], dim=1).view(torch.int64)[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Weights.

class QuantizedWeight(nn.Module):
    """A matrix (d_out, d_in) as codes and scales. It is a Module in the place of a Parameter, so that state dicts name
    its parts `….weight.codes` and `….weight.scales`. dtype: what dense() returns by default, the model's dtype."""

    def __init__(self, codes, scales, kind, shape, dtype):
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.kind, self.shape, self.dtype = kind, torch.Size(shape), dtype

    @property
    def device(self):
        return self.codes.device

    def extra_repr(self):
        return f"{self.kind}, {tuple(self.shape)}, dtype={self.dtype}"

    def dense(self, dtype=None):
        """The matrix it stands for, (d_out, d_in), computed again at every call."""
        dtype, d_in = dtype or self.dtype, self.shape[1]
        name, more = (("dequantize_int8", ()) if self.kind == "int8" else
                      ("dequantize_4bit", (_levels(self.device), GROUP, d_in)))
        if launch := fused.kernel(name, self.codes):
            return launch(self.codes, self.scales, *more, dtype)
        out, rows = torch.empty(self.shape, dtype=dtype, device=self.device), max(1, CHUNK // d_in)
        for codes, scales, part in zip(self.codes.split(rows), self.scales.split(rows), out.split(rows)):
            if self.kind == "int8":
                part.copy_(codes * scales[:, None])                                   # the product is fp32
                continue
            values = _pairs(self.device).index_select(0, codes.flatten().int()).view(torch.float32)
            values = values.view(len(codes), -1)                                      # (n, d_in), or one more if odd
            short = GROUP * scales.shape[1] - values.shape[1]
            values = F.pad(values, (0, short)) if short else values
            values.view(len(codes), -1, GROUP).mul_(scales[:, :, None])
            part.copy_(values[:, :d_in])
        return out

    def _apply(self, fn, recurse=True):
        """.to(dtype) changes what dense() returns. Scales are moved, and not rounded to dtype: `fn` sees integers."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[self.scales.dtype]
        self.codes, self.scales = fn(self.codes), fn(self.scales.view(bits)).view(self.scales.dtype)
        return self


@torch.no_grad()
def quantize_weight(weight, kind, dtype=None):
    """A floating-point matrix (d_out, d_in) -> QuantizedWeight, on its device. kind: "int8" or "nf4". dtype: dense()'s,
    None: the matrix's. The same codes on every device. Raises ValueError for NaN and infinite values."""
    rows = max(1, CHUNK_IN // weight.shape[1])
    quantize = {"int8": _int8, "nf4": _nf4}[kind]
    codes, scales = zip(*(quantize(part.float()) for part in weight.split(rows)))
    codes, scales = torch.cat(codes), torch.cat(scales)
    if not scales.isfinite().all():                           # a scale is the largest |w|: NaN or ∞ where a weight is
        raise ValueError("holds NaN or infinite values, which cannot be quantised")
    return QuantizedWeight(codes, scales, kind, weight.shape, dtype or weight.dtype)


def _int8(w):                                                                         # (n, d_in) -> (n, d_in), (n,)
    largest = w.abs().amax(1)
    scales = largest / torch.full_like(largest, 127)     # for a Python number, CUDA would multiply by 1/127: other bits
    return (w / _nonzero(scales)[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales


def _nf4(w):                                                             # (n, d_in) -> (n, ceil(d_in / 2)), (n, G)
    n, d_in = w.shape
    grouped = F.pad(w, (0, -d_in % GROUP)).view(n, -1, GROUP)                         # (n, G, 64)
    scales = grouped.abs().amax(2).bfloat16()
    # divided by the scale as it is stored, so that the level found is the nearest one
    unit = (grouped / _nonzero(scales.float())[:, :, None]).view(n, -1)[:, :d_in].flatten()
    # the nearest level is number Σ (unit > border): looked up up to the one border that may lie in its cell
    below, border = _cells(w.device)
    cell = (unit * CELLS + CELLS).int().clamp_(0, 2 * CELLS)
    codes = below.index_select(0, cell) + (unit > border.index_select(0, cell))
    codes = F.pad(codes.view(n, d_in), (0, d_in % 2))
    return codes[:, 0::2] | codes[:, 1::2] << 4, scales


def _nonzero(scales):
    """The scales with 1 for 0: where a scale is 0, all its weights are 0, and 0 / 1 = 0."""
    return scales.where(scales != 0, 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Layers and models.

class QuantizedLinear(nn.Module):
    """x Wᵀ + b with a frozen QuantizedWeight W. The backward pass dequantises it again instead of keeping it."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x):                                                             # (…, d_in) -> (…, d_out)
        return fused.linear(x, self.weight, self.bias)


def quantize_like(twin, model):
    """Gives `twin`, a Transformer of the same config, the quantised layers of `model`, with the very same tensors."""
    for name, w in _quantized(model).items():
        layer = name.removesuffix(".weight")
        weight = QuantizedWeight(w.codes, w.scales, w.kind, w.shape, w.dtype)
        twin.set_submodule(layer, QuantizedLinear(weight, twin.get_submodule(layer).bias))
    return twin


@torch.no_grad()
def dense_state_dict(model, show=iter):
    """A copy of the model's state dict with every quantised weight dequantised, under the name a dense one has.
    show: is given these weights, and gives them back one by one (a bar)."""
    weights = _quantized(model)
    return {name: p.clone() for name, p in model.state_dict().items() if name.rpartition(".")[0] not in weights} | {
        name: weight.dense() for name, weight in show(weights.items())}


def _quantized(model):
    return {name: mod for name, mod in model.named_modules() if isinstance(mod, QuantizedWeight)}
