"""test_quantize.py - codes and scales by hand and by brute force, quantised models beside dense ones, what is kept."""
import math
import weakref
from functools import partial

import pytest
import small
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from small import TOKENS
from torch.utils._python_dispatch import TorchDispatchMode

from fronts.measure import policies
from model import Config, Transformer, generate
from ops import quantize
from ops.quantize import GROUP, KINDS, LEVELS, QuantizedLinear, QuantizedWeight, dense_state_dict, quantize_weight
from runs.files import UserError
from svd_lora import (
    SVDLoRALinear,
    adapter_state,
    adapters_off,
    export_peft,
    fingerprint,
    inject_svd_lora,
    load_adapter,
    merged_state_dict,
    save_adapter,
    set_preference,
    shared_base,
    svd_lora_layers,
)

PUBLISHED = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
             -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
             0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
SHAPES = [(5, 64), (3, 7), (4, 65), (2, 129), (1, 1), (6, 192), (3, 126)]             # odd; no multiple of a group
adapted = partial(small.adapted, sigma=0.05, s=0.05)                               # small: quantised or not is seen
kinds = pytest.mark.parametrize("kind", KINDS)
families = pytest.mark.parametrize("family", ["gpt2", "llama"])
shapes = pytest.mark.parametrize("shape", SHAPES)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uneven(*shape, seed=0):
    """Random weights whose size differs from column to column by orders of magnitude, so that groups differ too."""
    return random(*shape, seed=seed) * 2.0 ** (torch.arange(shape[1]) // 40 * 3 - 6)


def unpacked(w):
    """The nf4 codes of a QuantizedWeight, one by one, in Python: [[0..15]]."""
    return [[int(w.codes[i, j // 2]) >> (4 if j % 2 else 0) & 15 for j in range(w.shape[1])] for i in range(w.shape[0])]


@pytest.fixture
def pair(tiny, tmp_path):
    """pair(kind, family): a model read quantised from a directory, and a plain one with its dequantised weights."""
    def build(kind="nf4", family="gpt2", dtype=None):
        tiny(family).save_pretrained(tmp_path / family)
        model = Transformer.from_pretrained(tmp_path / family, dtype=dtype, quantize=kind)
        plain = Transformer(model.config).to(model.embed.weight)
        plain.load_state_dict(dense_state_dict(model))
        return model, plain
    return build


# ---------------------------------------------------------------------------------------------------------------------
# One matrix.

def test_levels_are_the_published_ones():
    assert len(LEVELS) == 16 and max(abs(a - b) for a, b in zip(LEVELS, PUBLISHED)) < 3e-7
    assert LEVELS[7] == 0 and LEVELS[0] == -1 and LEVELS[15] == 1
    assert max(abs(a + b) for a, b in zip(LEVELS, LEVELS[::-1])) > 0.05               # wrong: symmetric, without 0


def test_int8_by_hand():
    w = quantize_weight(torch.tensor([[1.27, -0.634, 0.004, 0.0], [0.0, 0.0, -254.0, 3.1]]), "int8")
    assert w.codes.tolist() == [[127, -63, 0, 0], [0, 0, -127, 2]] and w.codes.dtype == torch.int8
    assert torch.allclose(w.scales, torch.tensor([0.01, 2.0])) and w.scales.dtype == torch.float32
    assert torch.allclose(w.dense(), torch.tensor([[1.27, -0.63, 0.0, 0.0], [0.0, 0.0, -254.0, 4.0]]))
    assert (w.shape, w.kind, w.dtype, w.device.type) == ((2, 4), "int8", torch.float32, "cpu")


def test_nf4_by_hand():
    w = quantize_weight(torch.tensor([[2.0, -2.0, 0.0, 1.0, -0.5]]), "nf4")           # scale 2: 1, -1, 0, 0.5, -0.25
    # 0.5 lies below (0.4407 + 0.5626) / 2, so it is level 12; -0.25 above (-0.2844 - 0.1848) / 2 in size: level 4
    assert w.codes.tolist() == [[15 | 0 << 4, 7 | 12 << 4, 4]] and w.codes.dtype == torch.uint8      # the even one low
    assert w.scales.tolist() == [[2.0]] and w.scales.dtype == torch.bfloat16
    assert torch.allclose(w.dense(), torch.tensor([[2.0, -2.0, 0.0, 0.8814197, -0.5688828]]))
    swapped = QuantizedWeight(w.codes >> 4 | w.codes << 4, w.scales, "nf4", w.shape, w.dtype)
    assert torch.allclose(swapped.dense()[:, :4], torch.tensor([[-2.0, 2.0, 0.8814197, 0.0]]))       # wrong: nibbles


@shapes
def test_int8_is_within_half_a_step(shape):
    x = uneven(*shape)
    w = quantize_weight(x, "int8")
    step = x.abs().amax(1, keepdim=True) / 127
    assert ((w.dense() - x).abs() <= step / 2 * (1 + 1e-5)).all() and w.codes.min() >= -127
    assert torch.equal(w.codes.float().abs().amax(1), torch.full((shape[0],), 127.0))
    if shape[1] > 7:
        assert ((w.codes.float() - 1) * w.scales[:, None] - x).abs().gt(step / 2).any()              # wrong: truncated


@shapes
def test_nf4_is_the_nearest_level_of_its_own_group(shape):
    x = uneven(*shape)
    w = quantize_weight(x, "nf4")
    codes, dense = unpacked(w), w.dense()
    assert w.codes.shape == (shape[0], math.ceil(shape[1] / 2))
    assert w.scales.shape == (shape[0], math.ceil(shape[1] / GROUP))
    for i in range(shape[0]):
        for g in range(math.ceil(shape[1] / GROUP)):
            columns = range(g * GROUP, min((g + 1) * GROUP, shape[1]))
            scale = w.scales[i, g].item()
            largest = x[i, columns.start:columns.stop].abs().max().item()
            assert abs(scale - largest) <= largest / 256                              # a bf16 has 8 significant bits
            for j in columns:
                assert math.isclose(dense[i, j], LEVELS[codes[i][j]] * scale, rel_tol=1e-6)
                best = min(abs(level * scale - x[i, j].item()) for level in LEVELS)
                assert abs(dense[i, j].item() - x[i, j].item()) <= best + 1e-6 * scale
    if w.scales.shape[1] > 1:
        wrong = QuantizedWeight(w.codes, w.scales.roll(1, 1), "nf4", w.shape, w.dtype)
        assert not torch.allclose(wrong.dense(), x, rtol=0.5)                         # wrong: the neighbouring group's


@shapes
def test_what_can_be_represented_comes_back_bit_by_bit(shape):
    generator = torch.Generator().manual_seed(1)
    q = torch.randint(0, 16, shape, generator=generator)
    q[:, ::GROUP] = 15                                                                # each group has its largest one
    scales = random(shape[0], math.ceil(shape[1] / GROUP), seed=2).abs().bfloat16().float() + 0.5
    scales = scales.bfloat16().float()
    x = torch.tensor(LEVELS)[q] * scales.repeat_interleave(GROUP, 1)[:, :shape[1]]
    w = quantize_weight(x, "nf4")
    assert torch.equal(w.dense(), x) and unpacked(w) == q.tolist()
    q = torch.randint(-126, 127, shape, generator=generator)
    q[:, 0] = 127
    x = q * 2.0 ** torch.arange(-3, shape[0] - 3)[:, None]
    w = quantize_weight(x, "int8")
    assert torch.equal(w.dense(), x) and torch.equal(w.codes, q.to(torch.int8))
    assert torch.equal(quantize_weight(w.dense(), "int8").codes, w.codes)


@kinds
def test_zeros_stay_zeros(kind):
    x = random(4, 130)
    x[1], x[2, 64:128], x[3] = 0, 0, 1e-30
    w = quantize_weight(x, kind)
    dense = w.dense()
    assert dense.isfinite().all() and (dense[x == 0] == 0).all() and torch.allclose(dense[3], x[3], rtol=0.01)
    assert (dense[0] != 0).any()
    assert (w.codes[1] == (0 if kind == "int8" else 7 | 7 << 4)).all()                # wrong: 0 / 0 and then any code


def test_nf4_at_borders_and_at_the_edges_of_cells():
    """One group for each number, whose scale is 1: the level is the nearest one, also a bit beside a border."""
    levels = torch.tensor(LEVELS, dtype=torch.float32)
    borders, edges = (levels[1:] + levels[:-1]) / 2, torch.arange(-quantize.CELLS, quantize.CELLS + 1) / quantize.CELLS
    up, down = torch.tensor(2.0), torch.tensor(-2.0)
    x = torch.cat([borders, borders.nextafter(up), borders.nextafter(down), edges, edges.nextafter(up).clamp(max=1),
                   edges.nextafter(down).clamp(min=-1)])
    w = torch.zeros(len(x), GROUP)
    w[:, 0], w[:, 2] = x, 1.0
    codes = quantize_weight(w, "nf4").codes[:, 0] & 15
    assert torch.equal(codes.long(), (x[:, None] > borders).sum(1))
    assert not torch.equal(codes.long(), (x[:, None] >= borders).sum(1))                 # wrong: a border goes up


@kinds
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(kind, bad):
    x = random(3, 70)
    x[1, 69] = bad
    with pytest.raises(ValueError, match="holds NaN or infinite values"):
        quantize_weight(x, kind)


@kinds
@pytest.mark.parametrize("shape", [(40, 131), (7, 128)])
def test_chunks_change_nothing(kind, shape, monkeypatch):
    x = uneven(*shape)
    whole = quantize_weight(x, kind)
    dense = whole.dense()
    for size in (1, 300):                                                             # a row at a time, or a few
        monkeypatch.setattr(quantize, "CHUNK", size)
        monkeypatch.setattr(quantize, "CHUNK_IN", size)
        parts = quantize_weight(x, kind)
        assert torch.equal(parts.codes, whole.codes) and torch.equal(parts.scales, whole.scales)
        assert torch.equal(parts.dense(), dense)


@kinds
def test_dtypes(kind):
    x = uneven(9, 100)
    w = quantize_weight(x, kind, torch.bfloat16)
    codes, scales, dense = w.codes.clone(), w.scales.clone(), w.dense(torch.float32)
    assert w.dense().dtype == torch.bfloat16 and torch.equal(w.dense(), dense.bfloat16())            # rounded once
    assert torch.equal(w.dense(torch.float64), dense.double())
    for dtype in (torch.float16, torch.float64, torch.float32):
        assert w.to(dtype).dtype == dtype and w.dense().dtype == dtype
        assert w.scales.dtype == scales.dtype
        assert torch.equal(w.scales, scales) and torch.equal(w.codes, codes)          # wrong: rounded on the way
    other = quantize_weight(torch.zeros_like(x), kind)
    other.load_state_dict(w.state_dict())
    assert torch.equal(other.dense(), dense) and dense.abs().max() > 1


@pytest.mark.parametrize("kind, most", [("int8", 8.04), ("nf4", 4.25)])
def test_bits_a_weight(kind, most):
    w = quantize_weight(random(64, 1024), kind)
    bits = 8 * sum(b.numel() * b.element_size() for b in w.buffers()) / (64 * 1024)
    assert most - 0.05 < bits <= most


@pytest.mark.parametrize("kind, most", [("int8", 0.010), ("nf4", 0.095)])
def test_error_on_normal_weights(kind, most):
    """int8: a step is 2 · 3.2σ / 127 or so, its uniform error 1/√12 of that, 0.7 % of σ. nf4: 9.2 %."""
    x = random(64, 1024)
    error = (quantize_weight(x, kind).dense() - x).norm() / x.norm()
    assert most / 2 < error < most


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@kinds
@shapes
def test_cuda_has_the_same_codes_and_the_same_matrix(kind, shape):
    x = uneven(*shape)
    here, there = quantize_weight(x, kind), quantize_weight(x.cuda(), kind)
    assert torch.equal(there.codes.cpu(), here.codes) and torch.equal(there.scales.cpu(), here.scales)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(there.dense(dtype).cpu(), here.dense(dtype))
    assert torch.equal(here.to("cuda").dense().cpu(), there.dense().cpu())


# ---------------------------------------------------------------------------------------------------------------------
# Gradients.

@kinds
@pytest.mark.parametrize("shape, dtype", [((5, 70), torch.float64), ((300, 257), torch.float64),
                                          ((300, 257), torch.float32)])
def test_gradients_are_those_of_the_dense_layer(kind, shape, dtype, close):
    layer = QuantizedLinear(quantize_weight(random(*shape), kind), nn.Parameter(random(shape[0], seed=1))).to(dtype)
    x = random(2, 3, shape[1], seed=2, dtype=dtype).requires_grad_()
    y = layer(x)
    g = random(*y.shape, seed=3, dtype=dtype)
    y.backward(g)
    ours, x.grad = (y, x.grad, layer.bias.grad), None
    bias, W = layer.bias.detach().requires_grad_(), layer.weight.dense(dtype)
    y = F.linear(x, W, bias)
    y.backward(g)
    for a, b in zip(ours, (y, x.grad, bias.grad)):
        assert close(a, b, 1e-12 if dtype == torch.float64 else 1e-5) and b.abs().max() > 0.1
    assert not close(ours[1], g @ W.roll(1, 1), 0.1)


@kinds
def test_the_dense_matrix_is_not_kept(kind):
    kept = []
    layer = QuantizedLinear(quantize_weight(random(300, 260), kind), nn.Parameter(random(300)))
    adapter = SVDLoRALinear(layer, 4, 0, 1.0)
    x = random(2, 3, 260, seed=2).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x), adapter(x)
        ours = max((t.numel() for t in kept), default=0)
        F.linear(x, layer.weight.dense())                                             # wrong: what autograd would keep
        theirs = max(t.numel() for t in kept)
    assert ours < 0.1 * 300 * 260 and theirs == 300 * 260


@kinds
def test_an_adapter_on_a_quantised_layer(kind, close):
    """Output and gradients of SVDLoRALinear are those over a Linear with the dequantised matrix."""
    quantised = QuantizedLinear(quantize_weight(random(300, 260), kind), nn.Parameter(random(300)))
    dense = nn.Linear(260, 300)
    dense.load_state_dict({"weight": quantised.weight.dense(), "bias": quantised.bias.detach()})
    results = []
    for linear in (quantised, dense):
        layer = SVDLoRALinear(linear, 3, 2, 16.0, generator=torch.Generator().manual_seed(4))
        with torch.no_grad():
            layer.sigma.fill_(2.0), layer.s.fill_(3.0)
        layer.lam = torch.tensor([[0.3, 0.7], [1.0, 0.0]])
        x = random(2, 5, 260, seed=2).requires_grad_()
        y = layer(x)
        y.backward(random(*y.shape, seed=3))
        results.append([y, x.grad] + [p.grad for p in (layer.U, layer.V, layer.sigma, layer.s)])
        assert not any(p.requires_grad for p in linear.parameters())
    for a, b in zip(*results):
        assert close(a, b, 1e-5) and b.abs().max() > 0.1


# ---------------------------------------------------------------------------------------------------------------------
# Models.

@families
@kinds
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_reading_a_directory_quantised(tiny, tmp_path, family, kind, dtype):
    dense = tiny(family)
    dense.save_pretrained(tmp_path)
    model = Transformer.from_pretrained(tmp_path, dtype=dtype, quantize=kind)
    ours, linears = model.state_dict(), 0
    # wrong: a view of the file, which then stays in memory as a whole
    assert all(t.untyped_storage().nbytes() <= t.nbytes + 64 for t in ours.values())
    for name, mod in dense.named_modules():
        if isinstance(mod, nn.Linear) and name.startswith("blocks."):
            w = quantize_weight(mod.weight, kind)                                     # from what is stored: fp32
            assert torch.equal(ours.pop(f"{name}.weight.codes"), w.codes), name
            assert torch.equal(ours.pop(f"{name}.weight.scales"), w.scales), name
            assert model.get_submodule(name).weight.dtype == (dtype or torch.float32)
            linears += 1
    assert linears == {"gpt2": 12, "llama": 14}[family]
    rest = {name: p.to(dtype or p.dtype) for name, p in dense.state_dict().items() if name in ours}
    assert len(rest) == len(ours) and all(ours[name].dtype == p.dtype and torch.equal(ours[name], p)
                                          for name, p in rest.items())
    assert {"embed.weight", "norm.weight", "blocks.0.norm1.weight"} <= set(ours)      # these stay dense
    assert model(TOKENS).dtype == (dtype or torch.float32)


def test_gpt2_as_published_and_shards(tiny, tmp_path):
    """No prefix in the names, and the biases of the blocks in another file than their weights, read before or after."""
    dense = tiny("gpt2")
    dense.save_pretrained(tmp_path)
    tensors = {key.removeprefix("transformer."): t for key, t in load_file(tmp_path / "model.safetensors").items()}
    (tmp_path / "model.safetensors").unlink()
    expected = None
    for first in (True, False):
        biases = {key: t for key, t in tensors.items() if key.endswith("bias")}
        others = {key: t for key, t in tensors.items() if key not in biases}
        for file, part in zip("ab", (biases, others) if first else (others, biases)):
            save_file(part, tmp_path / f"{file}.safetensors")
        logits = Transformer.from_pretrained(tmp_path, quantize="nf4")(TOKENS)
        expected = logits if expected is None else expected
        assert torch.equal(logits, expected) and logits.std() > 0.1


def test_quantise_none_and_what_there_is_not(tiny, tmp_path):
    tiny().save_pretrained(tmp_path)
    for none in (None, "none"):
        model = Transformer.from_pretrained(tmp_path, quantize=none)
        assert list(model.state_dict()) == list(tiny().state_dict()) and torch.equal(model(TOKENS), tiny()(TOKENS))
    with pytest.raises(UserError, match="none, int8 or nf4, not 'int4'"):
        Transformer.from_pretrained(tmp_path, quantize="int4")
    with torch.no_grad():
        model.blocks[1].mlp.up.weight[3, 4] = math.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model.safetensors: tensor 'transformer.h.1.mlp.c_fc.weight' holds NaN"):
        Transformer.from_pretrained(tmp_path, quantize="nf4")
    model.blocks[1].mlp.up = QuantizedLinear(quantize_weight(torch.ones(128, 32), "nf4"))
    with pytest.raises(ValueError, match="up.weight.codes has no place .* dequantise"):
        model.save_pretrained(tmp_path / "out")                                       # wrong: a file without weights


def test_no_second_copy_while_reading(tmp_path):
    """What lives at once never exceeds the quantised model and a few tensors: no dense model, not even for a moment."""
    class Live(TorchDispatchMode):
        tensors, peak = [], 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            Live.tensors += [weakref.ref(t) for t in (out if isinstance(out, (list, tuple)) else [out])
                             if isinstance(t, torch.Tensor) and t.device.type != "meta"]
            Live.tensors, size = [ref for ref in self.tensors if ref() is not None], {}
            for t in (ref() for ref in self.tensors):         # views of one storage count once, as the largest of them
                key = t.untyped_storage().data_ptr()
                size[key] = max(size.get(key, 0), t.numel() * t.element_size())
            Live.peak = max(Live.peak, sum(size.values()))
            return out

    config = Config(61, 32, n_layer=12, n_head=4, d_model=64)
    Transformer(config).init_weights(torch.Generator().manual_seed(0)).save_pretrained(tmp_path)
    with Live():
        model = Transformer.from_pretrained(tmp_path, quantize="nf4")
    held = sum(p.numel() * p.element_size() for p in model.state_dict().values())
    dense = sum(p.numel() * p.element_size() for p in dense_state_dict(model).values())
    largest = 4 * 64 * 256
    assert held < 0.25 * dense and held < Live.peak < held + 6 * largest < 0.5 * dense


@families
@pytest.mark.parametrize("kind, most", [("int8", 0.05), ("nf4", 0.5)])
def test_logits_stay_near_the_dense_ones(tiny, pair, family, kind, most):
    """Root mean squares, relative; twice to four times what was measured. The tiny models' weights are ten times larger
    than trained ones, so each layer passes on the whole error of those before."""
    model, plain = pair(kind, family)
    logits, dense = model(TOKENS), tiny(family)(TOKENS)
    error = lambda a: ((a - dense).norm() / dense.norm()).item()
    assert most / 50 < error(logits) < most
    assert torch.allclose(logits, plain(TOKENS), atol=1e-4)                           # and are those of the dense twin
    w = model.blocks[0].attn.v.weight
    w.codes = w.codes >> 4 | w.codes << 4 if kind == "nf4" else w.codes.roll(1, 1)
    assert error(model(TOKENS)) > 2 * error(logits)                                   # wrong: nibbles, columns


def test_an_adapter_learns_on_an_nf4_base(pair):
    model, _ = pair("nf4", "llama")
    inject_svd_lora(model, 4, 2, generator=torch.Generator().manual_seed(0))
    frozen = {name: p.clone() for name, p in model.state_dict().items() if name not in adapter_state(model)}
    set_preference(model, [0.3, 0.7])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(model(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in model.state_dict().items() if name in frozen)
    assert any(name.endswith(".codes") for name in frozen)
    with adapters_off(model):
        assert F.cross_entropy(model(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten()).item() == losses[0]


@families
@kinds
@pytest.mark.parametrize("pack", [False, True])
def test_generation_is_that_of_the_dense_weights(pair, family, kind, pack, monkeypatch):
    monkeypatch.setattr("ops.generation.PACK_FROM", 0)                                # so that the tiny weights pack
    model, plain = pair(kind, family)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    go = lambda m, temperature: generate(m, prompts, 10, temperature, eos_id=-1, pack=pack,
                                         generator=torch.Generator().manual_seed(0))
    for temperature in (0, 1.0):
        assert go(model, temperature) == go(plain, temperature)
    lam = [0.3, 0.7]
    set_preference(adapted(model), lam)
    base = go(plain, 0)
    plain.load_state_dict(merged_state_dict(model, lam))
    assert go(model, 0) == go(plain, 0) != base
    with adapters_off(model):
        assert go(model, 0) == base


@families
@kinds
def test_shared_base_has_the_very_same_codes(pair, family, kind):
    model, _ = pair(kind, family)
    base = model(TOKENS)
    for twin in (shared_base(model), shared_base(adapted(model))):                    # without an adapter, and with
        assert torch.equal(twin(TOKENS), base) and not svd_lora_layers(twin)
        ours, theirs = model.state_dict(), twin.state_dict()
        assert set(theirs) == set(ours) - set(adapter_state(model))
        assert all(theirs[name].data_ptr() == ours[name].data_ptr() for name in theirs)              # wrong: a copy
        assert not any(p.requires_grad for p in twin.parameters())
    assert not torch.equal(adapted(twin, k=2, m=0, seed=2)(TOKENS), base)             # another adapter, same codes
    with adapters_off(model):
        assert torch.equal(model(TOKENS), base)


@families
def test_merged_weights_are_dense(pair, close, family):
    for dtype in (None, torch.bfloat16):
        model, plain = pair("nf4", family, dtype)
        base = plain(TOKENS)
        set_preference(adapted(model), [0.3, 0.7])
        merged = merged_state_dict(model, [0.3, 0.7])
        assert {p.dtype for p in merged.values()} == {dtype or torch.float32}
        assert set(merged) == set(plain.state_dict())
        plain.load_state_dict(merged)
        assert close(model(TOKENS), plain(TOKENS), 1e-5 if dtype is None else 0.1)
        assert dtype or not close(base, plain(TOKENS), 0.02)


def test_fingerprints_and_adapter_files(tiny, pair, tmp_path):
    path, marks = tmp_path / "a.safetensors", set()
    for kind in (None, *KINDS):
        model = pair(kind)[0]
        marks.add(fingerprint(model))
        assert fingerprint(model) == fingerprint(pair(kind, dtype=torch.bfloat16)[0]) == fingerprint(adapted(model))
    assert len(marks) == 3
    save_adapter(model, path, ["helpful", "harmless"])                                # on nf4
    other = pair("nf4")[0]
    load_adapter(other, path, ["helpful", "harmless"])
    for each in (model, other):
        set_preference(each, [0.3, 0.7])
    assert torch.equal(model(TOKENS), other(TOKENS))
    for wrong in (None, "int8"):
        with pytest.raises(UserError, match="another base model"):
            load_adapter(pair(wrong)[0], path)


def test_export_peft_needs_no_base(pair, tmp_path):
    model = adapted(pair("nf4", "llama")[0])
    export_peft(model, [0.3, 0.7], tmp_path / "peft")
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.model.layers.1.mlp.up_proj.lora_{x}.weight"] for x in "AB")
    W = model.blocks[1].mlp.up.weight.dense()
    assert torch.allclose(W + B @ A, merged_state_dict(model, [0.3, 0.7])["blocks.1.mlp.up.weight"], atol=1e-6)
    assert (B @ A).abs().max() > 0.01


def test_rewarded_soups_on_a_quantised_base(pair, tmp_path, close):
    model, ends = pair("nf4")[0], []
    for i, dim in enumerate(["a", "b"]):
        adapted(model, m=0, seed=i + 1)
        save_adapter(model, tmp_path / f"adapter-{dim}.safetensors", ["a", "b"])
        ends.append(model(TOKENS))
    config = {"method": "rs", "dims": ["a", "b"], "flags": {}}
    lams = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    for lam, policy in policies(tmp_path, config, pair("nf4")[0], lams):
        logits = policy(TOKENS)
        assert isinstance(policy.blocks[0].attn.q.weight, QuantizedWeight)            # nothing was dequantised
        if lam.max() == 1:
            assert close(logits, ends[lam.argmax()], 1e-5) and not close(logits, ends[lam.argmin()], 0.01)
        else:
            assert not close(logits, ends[0], 0.01) and not close(logits, ends[1], 0.01)
