"""svd_lora.py - layers whose singular values hold the preference (Panacea, arXiv:2402.02030v1, Sec. 4.1, Eq. (5), (9)).

    y = x W0ᵀ + b + gain · ((x V) · d) Uᵀ,     d = cat(σ, s·λ)          W(λ) = W0 + gain · U diag(d) Vᵀ

m: number of objectives   k: learned rank   r = k + m   lam: preference λ on the simplex, (m,) or one per row (B, m)
U: (d_out, r)   V: (d_in, r)   sigma: (k,) learned   s: () learned, one per matrix, scales λ   gain: lora_scaling / k
W0, b are frozen. σ = s = 0 at the start, so a fresh adapter changes nothing; U, V ~ N(0, 0.02²).
W0 may be quantised (a QuantizedWeight, ops/quantize.py).

λ enters a model in two places, both by way of SVDLoRALinear.scaled_values: in training and evaluation through forward,
in generation through factors, which ops/generation.py asks for (fast_copy → FastLinear.factors).
Because λ enters through d alone, rows of one batch can have different preferences: d is then (B, 1, r).
Not in paper: gain (from the reference hyper-parameter lora_scaling = 512 at k = 8; the divisor is k, not r).
m = 0 is a plain SVD-LoRA of rank k: rewarded soups and discrete policy solutions use it with rank k + 1, a prompted λ
with rank k + m. k = 0 (ablation): λ alone, nothing that all preferences share.
"""
import hashlib
import json
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import Transformer, hf_name
from ops import fused
from ops.quantize import QuantizedLinear, dense_state_dict, quantize_like
from runs.files import UserError, bar, write_json, write_whole


class SVDLoRALinear(nn.Module):
    """A frozen Linear with an SVD-LoRA branch. `lam` is set by set_preference and never trained."""

    def __init__(self, linear, k, m, gain, fixed_s=None, generator=None):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias                    # same names: base state dicts still fit
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        device = self.weight.device
        self.U, self.V = (nn.Parameter(torch.empty(n, k + m).normal_(0, 0.02, generator=generator).to(device))
                          for n in linear.weight.shape)                               # (d_out, r), (d_in, r)
        self.sigma = nn.Parameter(torch.zeros(k, device=device))
        # Sec. 5.2's ablation fixes s; a fixed one is not a Parameter, so no optimizer ever sees it.
        self.s = (nn.Parameter(torch.zeros((), device=device)) if fixed_s is None else
                  torch.tensor(float(fixed_s), device=device))
        self.k, self.m, self.gain = k, m, gain
        self.lam, self.enabled = None, True

    def singular_values(self, lam):
        """d = cat(σ, s·λ), Eq. (9): (r,) for lam (m,), or (B, 1, r) for lam (B, m). fp32"""
        if self.m == 0:
            return self.sigma
        if lam.ndim == 1:
            return torch.cat([self.sigma, self.s * lam])
        return torch.cat([self.sigma.expand(len(lam), -1), self.s * lam], dim=1)[:, None, :]           # (B, 1, r)

    def forward(self, x):                                             # (B, T, d_in) -> (B, T, d_out)
        if not self.enabled:
            return fused.linear(x, self.weight, self.bias)
        return fused.svd_lora_linear(x, self.weight, self.U, self.V, self.scaled_values(), self.bias)

    def scaled_values(self):
        """gain · d at the preference that is set: (r,), or (B, 1, r) for one preference per row."""
        if self.lam is None and self.m > 0:
            raise RuntimeError("no preference is set: call set_preference(model, lam) first")
        return self.gain * self.singular_values(self.lam)

    def factors(self, dtype):
        """What forward multiplies with, for generation: V (d_in, r), gain · d (r,) or (B, 1, r), and Uᵀ (r, d_out)."""
        return self.V.to(dtype), self.scaled_values().to(dtype), self.U.T.to(dtype)

    def delta(self, lam):
        """gain · U diag(d) Vᵀ for one preference (m,): (d_out, d_in) in fp32."""
        return (self.gain * self.U * self.singular_values(lam)) @ self.V.T


def inject_svd_lora(model, k=8, m=2, lora_scaling=512.0, pref_scaling=None, generator=None, gain=None):
    """Replaces every Linear inside `model.blocks` by an SVDLoRALinear and freezes all else, in place. Where there is an
    adapter already, a fresh one takes its place.

    k: learned rank; m: objectives; gain: lora_scaling / k, where none is given (k = 0 needs one); pref_scaling: a fixed
    s (ablation), None: s is learned.
    generator: a CPU torch.Generator for U and V. Returns the model.
    """
    gain = lora_scaling / k if gain is None else gain
    model.requires_grad_(False)
    for block in model.blocks:
        for name, linear in [(n, mod) for n, mod in block.named_modules()
                             if isinstance(mod, (nn.Linear, QuantizedLinear, SVDLoRALinear))]:
            block.set_submodule(name, SVDLoRALinear(linear, k, m, gain, pref_scaling, generator))
    return model


def svd_lora_layers(model):
    """{name: SVDLoRALinear}, in order."""
    return {name: mod for name, mod in model.named_modules() if isinstance(mod, SVDLoRALinear)}


def check_preference(lam, m):
    """λ as fp32 (m,) or (B, m), validated: right length, non-negative, sums to 1 (to 1e-4). Raises ValueError."""
    lam = torch.as_tensor(lam, dtype=torch.float32)
    if lam.ndim not in (1, 2) or lam.shape[-1] != m:
        raise ValueError(f"a preference needs {m} weights, got shape {tuple(lam.shape)}")
    if not ((lam >= -1e-6).all() and ((lam.sum(-1) - 1).abs() < 1e-4).all()):
        raise ValueError(f"a preference must be non-negative and sum to 1, got {lam.tolist()}")
    return lam.clamp(min=0)


def _preference_of(layers, lam):
    """One checked λ for {name: layer}, on their device; None where m = 0."""
    first = next(iter(layers.values()))
    return None if first.m == 0 else check_preference(lam, first.m).to(first.sigma.device)


def set_preference(model, lam):
    """Embeds λ into every adapted matrix: lam (m,) for all rows, or (B, m), one per row of the batches to come.

    λ is set here and nowhere else. Raises ValueError for a λ off the simplex or of the wrong length.
    """
    layers = list(svd_lora_layers(model).values())
    if not layers:
        raise ValueError("the model has no adapter: call inject_svd_lora or load_adapter first")
    lam = check_preference(lam, layers[0].m).to(layers[0].sigma.device)
    for layer in layers:
        layer.lam = lam


def shared_base(model):
    """A second Transformer with the very same frozen tensors, for another adapter: no second copy in memory."""
    adapter = set(adapter_state(model))
    with torch.device("meta"):
        twin = quantize_like(Transformer(model.config), model)
    base = {name: p for name, p in model.state_dict(keep_vars=True).items() if name not in adapter}
    twin.load_state_dict(base, assign=True)
    return twin.requires_grad_(False)


@contextmanager
def adapters_off(model):
    """Within it the model is its frozen base: the reference policy π_ref, without a second copy in memory."""
    layers = [layer for layer in svd_lora_layers(model).values() if layer.enabled]   # [] in a nested call
    for layer in layers:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer in layers:
            layer.enabled = True


def orthogonality_penalty(model):
    """AdaLoRA's regulariser: Σ over matrices of ‖UᵀU − I‖²_F + ‖VᵀV − I‖²_F, a scalar; 0 iff columns are orthonormal.

    Panacea Eq. (5) comes with it, but without a coefficient; the training scripts add it when asked.
    """
    total = 0.0
    for layer in svd_lora_layers(model).values():
        eye = torch.eye(layer.U.shape[1], device=layer.U.device)
        total = total + (layer.U.T @ layer.U - eye).square().sum() + (layer.V.T @ layer.V - eye).square().sum()
    return total


def parameter_groups(model, weight_decay, values_lr=1.0):
    """Optimizer groups: U, V with weight decay; σ, s without (decay on s would pull the model back to ignoring λ), and
    with values_lr times the learning rate ("times", runs/loop.py)."""
    layers = svd_lora_layers(model).values()
    values = [p for layer in layers for p in (layer.sigma, layer.s) if isinstance(p, nn.Parameter)]
    return [{"params": [p for layer in layers for p in (layer.U, layer.V)], "weight_decay": weight_decay},
            {"params": values, "weight_decay": 0.0, "times": values_lr}]


@torch.no_grad()
def merged_state_dict(model, lam=None, dtype=None):
    """A copy of the weights with the adapter merged at λ (m,): W(λ) = W0 + gain·U diag(σ, s·λ) Vᵀ, Eq. (9).

    It loads into a plain Transformer of the same config: a quantised W0 becomes dense. The model itself is not changed.
    lam: None where m = 0. dtype: of the adapted matrices. The default is the base's own: W0 + ΔW is rounded to it, and
    in bf16 an update below 2⁻⁹ |W0| is gone.
    """
    layers = svd_lora_layers(model)
    lam, adapter = _preference_of(layers, lam), set(adapter_state(model))
    dense = dense_state_dict(model, lambda weights: bar(weights, "dequantising"))
    weights = {name: p for name, p in dense.items() if name not in adapter}
    for name, layer in bar(layers.items(), "merging"):
        W0 = weights[name + ".weight"]
        weights[name + ".weight"] = (W0.float() + layer.delta(lam)).to(dtype or W0.dtype)
    return weights


@torch.no_grad()
def soup(model, adapted, weights):
    """Writes W0 + Σ_i w_i ΔW_i into `model` and returns it; ΔW_i is what the adapter (m = 0) of the i-th of the models
    `adapted`, on the same base, changes. The sum is one adapter too: their factors side by side, gain = 1 and
    d = cat_i(w_i gain_i σ_i). So nothing is added to W0, which may be in bf16 or quantised. An adapter that the model
    has must be an earlier soup of the same."""
    layers = [svd_lora_layers(each) for each in adapted]
    if not svd_lora_layers(model):
        rank = sum(next(iter(each.values())).k for each in layers)
        inject_svd_lora(model, rank, 0, gain=1.0, generator=torch.Generator())
    for name, layer in svd_lora_layers(model).items():
        parts = [each[name] for each in layers]
        layer.U.copy_(torch.cat([part.U for part in parts], dim=1))
        layer.V.copy_(torch.cat([part.V for part in parts], dim=1))
        layer.sigma.copy_(torch.cat([w * part.gain * part.sigma for w, part in zip(weights, parts, strict=True)]))
    return model


def merged(model):
    """The same policy as a plain Transformer: its adapter merged at the preference that is set. The model itself where
    there is nothing to merge, where rows have preferences of their own, and in bf16, which would round the adapter."""
    layer = next(iter(svd_lora_layers(model).values()), None)
    if (layer is None or not layer.enabled or layer.weight.dtype != torch.float32
            or layer.lam is not None and layer.lam.ndim > 1):
        return model
    with torch.device("meta"):
        plain = Transformer(model.config)
    plain.load_state_dict(merged_state_dict(model, layer.lam), assign=True)
    return plain.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Files.

def adapter_state(model):
    """{name: tensor} of everything learned: U, V, sigma, s of every layer (s as a constant where it is fixed)."""
    return {f"{name}.{part}": getattr(layer, part).detach()
            for name, layer in svd_lora_layers(model).items() for part in ("U", "V", "sigma", "s")}


def some_values(tensor):
    """Up to 64 evenly spaced values of a tensor, to tell two apart without reading all. Idempotent: of 64, all."""
    flat = tensor.reshape(-1)
    n = min(64, len(flat))                                             # in integers: the same on every device
    return flat[torch.arange(n, device=flat.device) * (len(flat) - 1) // max(1, n - 1)]


@torch.no_grad()
def fingerprint(model):
    """A short hash of the base: its config and 64 values from every frozen tensor. They are hashed as bf16, so that it
    does not depend on the dtype in use. Two different checkpoints of one architecture get different fingerprints."""
    adapter = set(adapter_state(model))
    config = {f.name: getattr(model.config, f.name) for f in fields(model.config)      # a switch not in use is left out
              if not f.kw_only or getattr(model.config, f.name) != f.default}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, p in model.state_dict().items():
        if name not in adapter:
            digest.update(name.encode() + some_values(p).bfloat16().view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_adapter(model, path, dims=(), **extra):
    """Writes a safetensors file with the adapter, its shape, the dimension names in order and the base's fingerprint.

    dims: m names (for m = 0 whatever the adapter was trained for); extra: JSON values kept in the header.
    """
    layer = next(iter(svd_lora_layers(model).values()))
    header = dict(format="svd-lora-1", k=layer.k, m=layer.m, gain=layer.gain, dims=list(dims), base=fingerprint(model),
                  fixed_s=not isinstance(layer.s, nn.Parameter), **extra)
    tensors = {name: t.cpu().contiguous() for name, t in adapter_state(model).items()}
    write_whole(path, lambda f: save_file(tensors, f, metadata={"panacea": json.dumps(header)}))


def read_adapter_header(path):
    """The header that save_adapter wrote, as a dict. Raises UserError if save_adapter did not write the file."""
    try:
        with safe_open(path, framework="pt") as f:
            header = json.loads((f.metadata() or {})["panacea"])
        kinds = {"k": int, "m": int, "gain": float, "dims": list, "base": str, "fixed_s": bool}
        if (not all(type(header[key]) is kind for key, kind in kinds.items()) or min(header["k"], header["m"]) < 0
                or not all(isinstance(dim, str) for dim in header["dims"])):
            raise ValueError
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError):
        raise UserError(f"{path} is damaged, or not an adapter written by save_adapter") from None
    return header


@torch.no_grad()
def load_adapter(model, path, dims=None):
    """Loads an adapter file into `model`, injecting the layers first if it has none. Returns the header (a dict).

    dims: names that the file must have, in this order. Raises UserError for an adapter of another base, with other
    dimensions, or of another rank than the layers already there.
    """
    header = read_adapter_header(path)
    if dims is not None and list(dims) != header["dims"]:
        raise UserError(f"{path} was trained for the dimensions {' '.join(header['dims'])}, not for {' '.join(dims)}")
    if header["base"] != fingerprint(model):
        raise UserError(f"{path} belongs to another base model (fingerprint {header['base']}, "
                        f"this one has {fingerprint(model)})")
    with safe_open(path, framework="pt") as f:
        stored = {name: (f.get_slice(name).get_dtype(), *f.get_slice(name).get_shape()) for name in f.keys()}
        if not all(x[-1] == header["k"] + header["m"] for name, x in stored.items() if name.endswith((".U", ".V"))):
            raise UserError(f"{path} is damaged: its matrices are not of rank {header['k']} + {header['m']}")
        if not svd_lora_layers(model):
            inject_svd_lora(model, header["k"], header["m"], pref_scaling=0.0 if header["fixed_s"] else None,
                            gain=header["gain"])
        ours, layer = adapter_state(model), next(iter(svd_lora_layers(model).values()))
        if (layer.k, layer.m) != (header["k"], header["m"]):
            raise UserError(f"{path} has k = {header['k']}, m = {header['m']}; "
                            f"the model's adapter has k = {layer.k}, m = {layer.m}")
        if set(stored) != set(ours):
            raise UserError(f"{path} adapts other layers: {sorted(set(stored) ^ set(ours))[0]} is not in both")
        if wrong := [name for name, tensor in ours.items() if stored[name] != ("F32", *tensor.shape)]:
            raise UserError(f"{path} is damaged: {wrong[0]} is {stored[wrong[0]]}")
        for name, tensor in ours.items():
            tensor.copy_(f.get_tensor(name))
    for layer in svd_lora_layers(model).values():
        layer.gain = header["gain"]
    return header


@torch.no_grad()
def export_peft(model, lam, path, base=""):
    """Writes the adapter at one λ as a plain LoRA for PEFT, Eq. (4): W0 + B A with A = diag(d) Vᵀ, B = gain · U.

    path: a directory, gets adapter_config.json and adapter_model.safetensors (fp32); rank k + m, alpha = rank, so that
    PEFT's own factor is 1. lam: (m,), None where m = 0. base: where the base is, which is not written. Returns the
    largest rank. GPT-2's q, k, v are one matrix on disk, c_attn, and their adapters one of three times the rank: the A
    one below the other, (3r, d_in), and the B in the blocks of a diagonal, (3 d_out, 3r).
    """
    layers, factors, tensors, ranks = svd_lora_layers(model), {}, {}, {}
    lam = _preference_of(layers, lam)
    for name, layer in layers.items():
        theirs = hf_name(name + ".weight", model.config).removesuffix(".weight")
        A, B = (layer.V * layer.singular_values(lam)).T, layer.gain * layer.U         # (r, d_in), (d_out, r)
        factors.setdefault(theirs, []).append((A, B))
    for theirs, parts in factors.items():
        A, B = (torch.cat([A for A, _ in parts]), torch.block_diag(*(B for _, B in parts)))
        ranks[theirs.rpartition(".")[2]] = len(A)
        for part, matrix in (("A", A), ("B", B)):
            tensors[f"base_model.model.{theirs}.lora_{part}.weight"] = matrix.cpu().contiguous()
    r = min(ranks.values())
    other = {module: rank for module, rank in ranks.items() if rank != r}
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=str(base), r=r, lora_alpha=r,
                  rank_pattern=other, alpha_pattern=other, lora_dropout=0.0, bias="none", inference_mode=True,
                  fan_in_fan_out=model.config.family == "gpt2", target_modules=sorted(ranks))
    write_whole(Path(path) / "adapter_model.safetensors", lambda f: save_file(tensors, f, metadata={"format": "pt"}))
    write_json(Path(path) / "adapter_config.json", config)
    return max(ranks.values())
