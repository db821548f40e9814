"""model.py - one decoder-only Transformer for GPT-2, Llama and their like, chosen by switches in one Config.

B: rows of a batch   T: tokens in this call   M: tokens attended to, those in the KV cache included   D: d_model
V: vocabulary   H: query heads   K: key/value heads (K < H: grouped-query attention)   C: head_dim

            norm        positions              MLP                     biases           head
GPT-2       LayerNorm   learned table          GELU (tanh form)        everywhere       tied
Llama       RMSNorm     rotary, half-split     SwiGLU, three matrices  none             tied or not
Mistral = Llama.  Qwen2 = Llama with biases on q, k, v.  Qwen3 = Llama with an RMSNorm on every head of q and k.
Gemma 3 (text) = Qwen3 with RMSNorms of 1 + weight, two more of them in a block, GELU as the gate, an embedding times
sqrt(D), and other rotary frequencies in its local layers.
Attention is to all earlier tokens: where a family has sliding windows, the context ends with the window.

Weights are read from and written to Hugging Face directories (config.json + *.safetensors). The rotary layout is
theirs: the two halves of a head are rotated against each other, not neighbouring pairs (Meta's original layout).

A new family needs (more: CONTRIBUTING.md) a line in the table above; where it computes something new, a switch in
families.py: Config and its branch in Norm, Attention, MLP or Transformer.forward (one product may stand in the place of
Attention.project and MLP.inner: generation.fast_copy). In families.py it needs its names on disk, if they are neither
GPT-2's nor Llama's, and its config.json. Then a row of CASES in bench/bench_families.py, whose logits
tests/test_model.py compares.
"""
import json
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from safetensors.torch import save_file

from families import (
    CONSTANTS,
    DTYPES,
    SIZES,  # noqa: F401  not used here, as generate: part of the interface of this file
    Config,  # noqa: F401
    config_from_hf,
    config_to_hf,
    hf_name,
    hf_names,
    is_transposed,
    stored_tensors,
    weight_files,
)
from ops import fused
from ops.attention import additive, attention
from ops.check import replace_broken
from ops.generation import generate  # noqa: F401
from ops.quantize import KINDS, QuantizedLinear, quantize_weight
from runs.files import UserError, bar, read_json, write_json, write_whole

# ---------------------------------------------------------------------------------------------------------------------
# The network.

class Linear(nn.Linear):
    """nn.Linear by way of fused.linear, as all linear layers here."""

    def reset_parameters(self):
        """Nothing: init_weights or a file fills them, and torch's own start costs seconds of imports on "meta"."""

    def forward(self, x):
        return fused.linear(x, self.weight, self.bias)


class Norm(nn.Module):
    """LayerNorm (weight, bias) or RMSNorm (weight alone) over the last dimension, of d_model entries or so many."""

    def __init__(self, config, width=None):
        super().__init__()
        self.eps, self.one_more, width = config.norm_eps, config.norm == "rmsnorm1", width or config.d_model
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if config.norm == "layernorm" else None

    def forward(self, x):
        if self.bias is not None:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        if self.one_more:                                     # in bf16, 1 + weight would be rounded
            return fused.rms_norm(x, 1 + fused.wide(self.weight), self.eps)
        return fused.rms_norm(x, self.weight, self.eps)


def rope_frequencies(theta, scaling, head_dim, device=None):
    """Rotary frequencies theta^(-2j/C), j < C/2, scaled as transformers does for this Config.rope_scaling: (C/2,)."""
    freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    if scaling is None or scaling["rope_type"] == "dynamic":  # NTK: changes nothing up to where our context ends
        return freq
    kept, original = 0.0, scaling.get("original_max_position_embeddings")             # linear keeps none
    if scaling["rope_type"] == "llama3":                      # by the turns that a pair makes in the original context
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((original / (2 * math.pi / freq) - low) / (high - low)).clamp(0, 1)
    if scaling["rope_type"] == "yarn":                        # by j, between those that make beta_fast, beta_slow turns
        low, high = (head_dim * math.log(original / (2 * math.pi * scaling[beta])) / (2 * math.log(theta))
                     for beta in ("beta_fast", "beta_slow"))
        if scaling["truncate"]:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        kept = 1 - ((torch.arange(len(freq), device=device) - low) / (high - low or 0.001)).clamp(0, 1)
    return (1 - kept) * freq / scaling["factor"] + kept * freq


def rope_tables(theta, scaling, head_dim, positions):
    """cos and sin of the angles position · frequency, (B or 1, T, C/2) fp32, for positions (T,) or (B, T). yarn
    (arXiv:2309.00071, Sec. 3.4) scales both, and so the scores by its attention factor squared."""
    angle = positions[..., None] * rope_frequencies(theta, scaling, head_dim, positions.device)       # (…, T, C/2)
    angle, factor = angle.view(-1, *angle.shape[-2:]), (scaling or {}).get("attention_factor", 1.0)
    return angle.cos() * factor, angle.sin() * factor


class Attention(nn.Module):
    """Causal multi-head attention with grouped key/value heads and an optional KV cache."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        q_dim, kv_dim = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        self.q = Linear(config.d_model, q_dim, bias=config.qkv_bias)
        self.k = Linear(config.d_model, kv_dim, bias=config.qkv_bias)
        self.v = Linear(config.d_model, kv_dim, bias=config.qkv_bias)
        self.o = Linear(q_dim, config.d_model, bias=config.out_bias)
        self.q_norm = Norm(config, self.head_dim) if config.qk_norm else None
        self.k_norm = Norm(config, self.head_dim) if config.qk_norm else None

    def project(self, x):                                             # (B, T, D) -> (B, T, H·C), (B, T, K·C) twice
        return self.q(x), self.k(x), self.v(x)

    def forward(self, x, rope, mask, cache):
        B, T, _ = x.shape
        q, k, v = self.project(x)
        if self.q_norm is not None:
            heads = lambda t: t.view(B, T, -1, self.head_dim)                         # (B, T, H·C) -> (B, T, H, C)
            q, k = self.q_norm(heads(q)).flatten(2), self.k_norm(heads(k)).flatten(2)
        if rope is not None:
            q, k = fused.rope_(q, *rope), fused.rope_(k, *rope)
        # (B, T, H·C) -> (B, H, T, C), and with K for H
        q, k, v = (t.view(B, T, -1, self.head_dim).transpose(1, 2) for t in (q, k, v))
        if cache is not None and cache.decoding:
            y = cache.attend(q, k, v, mask)                                           # T = 1, all M slots
        else:
            if cache is not None:
                k, v = cache.append(k, v)                                             # (B, K, T, C) -> (B, K, M, C)
            if mask is not None and q.is_cuda and self.n_kv_head != self.n_head:
                # with a mask, CUDA's memory-efficient kernel wants a key head for each query head
                k, v = (t.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for t in (k, v))
            y = attention(q, k, v, mask)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """down(gelu(up x)), or with a gate down(silu(gate x) * up x), down(gelu(gate x) * up x)."""

    def __init__(self, config):
        super().__init__()
        self.gelu = {"gelu": "none", "swiglu": None}.get(config.activation, "tanh")             # its approximation
        bias = config.out_bias if config.mlp_bias is None else config.mlp_bias
        self.gate = Linear(config.d_model, config.d_ff, bias=bias) if config.gated else None
        self.up = Linear(config.d_model, config.d_ff, bias=bias)
        self.down = Linear(config.d_ff, config.d_model, bias=bias)

    def inner(self, x):                                               # (B, T, D) -> (B, T, d_ff)
        if self.gate is None:
            return F.gelu(self.up(x), approximate=self.gelu)
        return self.joined(self.gate(x), self.up(x))

    def joined(self, gate, up):
        return F.gelu(gate, approximate=self.gelu) * up if self.gelu else fused.swiglu(gate, up)

    def forward(self, x):
        return self.down(self.inner(x))


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x); Gemma norms what is added, too."""

    def __init__(self, config):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = Norm(config), Attention(config), Norm(config), MLP(config)
        self.post_norm1, self.post_norm2 = (Norm(config) if config.post_norms else nn.Identity() for _ in range(2))

    def forward(self, x, rope, mask, cache):
        x = x + self.post_norm1(self.attn(self.norm1(x), rope, mask, cache))
        return x + self.post_norm2(self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    """The language model. It knows nothing of preferences: svd_lora.py changes its Linears from outside."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpoint_blocks = False                        # True: activations of one block in memory, 3/2 the work
        table = lambda n: nn.Embedding(n, config.d_model, _weight=torch.empty(n, config.d_model))
        self.embed = table(config.vocab_size)
        if config.positions == "learned":
            self.pos_embed = table(config.context_length)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = Norm(config)
        if not config.tied:
            self.head = Linear(config.d_model, config.vocab_size, bias=False)

    def init_weights(self, generator):
        """GPT-2's initialisation: N(0, 0.02²), with a std smaller by sqrt(2 n_layer) for the matrices whose output is
        added to the residual stream."""
        for name, p in self.named_parameters():
            if name.endswith(("attn.o.weight", "mlp.down.weight")):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer), generator=generator)
            elif p.ndim == 2:
                nn.init.normal_(p, std=0.02, generator=generator)
            else:                                                                     # norms; biases
                nn.init.constant_(p, 1.0 if name.endswith("weight") and self.config.norm != "rmsnorm1" else 0.0)
        return self

    @property
    def head_weight(self):
        """The output matrix (V, D)."""
        return self.embed.weight if self.config.tied else self.head.weight

    def forward(self, tokens, positions=None, mask=None, cache=None, return_hidden=False):
        """tokens (B, T) -> logits (B, T, V), or the hidden states (B, T, D) that the head would read.

        positions: (B, T) or (T,), default 0..T-1 (after what the cache holds).
        mask: (B, 1, T, M) bool, True where a token may attend (at least one in each row); default causal.
        cache: a KVCache, filled as a side effect. (In the decode steps of generation.py, cache.slot says where the one
        token goes, and mask is additive: 0 or -inf.)
        """
        T, held = tokens.shape[1], cache.length if cache is not None else 0
        if positions is None:
            assert held + T <= self.config.context_length, f"{held + T} tokens, context {self.config.context_length}"
            positions = torch.arange(held, held + T, device=tokens.device)
        if mask is None and held > 0:           # SDPA's own causal mask would align the first query with the first key
            mask = torch.ones(T, held + T, dtype=torch.bool, device=tokens.device).tril(held)         # (T, M)
        x = self.embed(tokens)                                                        # (B, T) -> (B, T, D)
        if mask is not None and mask.dtype == torch.bool:     # here once: each layer would make and keep a copy
            mask = additive(mask, x.dtype)
        c, rope, local_rope = self.config, None, None
        if c.scaled_embedding:
            x = x * torch.tensor(c.d_model ** 0.5).to(x.dtype)                        # rounded, as Gemma was trained
        if c.positions == "learned":
            x = x + self.pos_embed(positions)
        else:
            rope = rope_tables(c.rope_theta, c.rope_scaling, c.head_dim, positions)
        if c.local_layers:
            local_rope = rope_tables(c.local_theta, None, c.head_dim, positions)
        for i, block in enumerate(self.blocks):
            turn = local_rope if i in c.local_layers else rope
            if self.checkpoint_blocks and torch.is_grad_enabled():   # keep x alone, compute the rest again in backward
                x = torch.utils.checkpoint.checkpoint(block, x, turn, mask, None, use_reentrant=False)
            else:
                x = block(x, turn, mask, cache.layer(i) if cache is not None else None)
        if cache is not None:
            cache.length += T
        x = self.norm(x)
        return x if return_hidden else fused.linear(x, self.head_weight)

    # -------------------------------------------------------------------------------------------- reading and writing

    @classmethod
    def from_pretrained(cls, path, dtype=None, device="cpu", quantize=None):
        """Reads a Hugging Face directory: config.json and its *.safetensors (one file, or shards).

        The model is built without memory (meta device) and filled tensor by tensor, so only one extra tensor exists at
        a time. dtype: None keeps the stored one. quantize: "int8" or "nf4" for every Linear in the blocks, on `device`
        and from the values as they are stored; None or "none": dense. Raises UserError naming the tensor if one is
        missing, unexpected, of the wrong shape or not finite, and for architectures that are not in the table at the
        top of this file. A head that is stored though config.json ties it counts where it is another matrix, as in
        transformers. On CUDA the kernels are then looked at (ops/check.py).
        """
        path, kind = Path(path), None if quantize == "none" else quantize
        if kind not in (None, *KINDS):
            raise UserError(f"quantize is none, int8 or nf4, not {quantize!r}")
        config = config_from_hf(read_json(path / "config.json"), path / "config.json")
        with torch.device("meta"):
            model = cls(config)
        missing, said_tied = hf_names(model), config.tied
        for file in weight_files(path):
            for key, tensor in stored_tensors(file, device):
                if key.endswith(CONSTANTS):
                    continue
                if key == "lm_head.weight" and config.tied:
                    config.tied, missing[key] = False, ["head.weight"]
                    model.head = Linear(config.d_model, config.vocab_size, bias=False, device="meta")
                names = missing.pop(key, None) or missing.pop("transformer." + key, None)     # gpt2 as published
                if names is None:
                    raise UserError(f"{file}: unexpected tensor {key!r}: config.json describes none, or it came before")
                rows, *columns = model.get_parameter(names[0]).shape
                shape, transposed = (len(names) * rows, *columns), is_transposed(names[0], config)
                shape = shape[::-1] if transposed else shape
                if tensor.shape != shape:
                    raise UserError(f"{file}: tensor {key!r} has shape {tuple(tensor.shape)}, config.json asks {shape}")
                if tensor.dtype not in DTYPES:
                    raise UserError(f"{file}: tensor {key!r} is stored as {tensor.dtype}, which is not read")
                # the sum is the fastest way to see one; as it may overflow, it does not decide
                if not tensor.sum().isfinite() and not tensor.isfinite().all():
                    raise UserError(f"{file}: tensor {key!r} holds NaN or infinite values")
                tensor = tensor.T if transposed else tensor
                for name, part in zip(names, tensor.chunk(len(names))):               # q, k, v of GPT-2's c_attn
                    owner, _, leaf = name.rpartition(".")
                    layer, as_dtype = model.get_submodule(owner), dtype or part.dtype
                    if kind and isinstance(layer, nn.Linear) and owner.startswith("blocks.") and leaf == "weight":
                        model.set_submodule(owner, QuantizedLinear(quantize_weight(part, kind, as_dtype), layer.bias))
                    else:
                        # beside quantised weights a copy: a view would hold the whole file in memory
                        setattr(layer, leaf, nn.Parameter(part.to(as_dtype, copy=kind is not None).contiguous()))
                del tensor, part                                                      # before the next one is read
        if said_tied and not config.tied:
            if missing.pop(hf_name("embed.weight", config), None):                    # the one that there is, is both
                model.embed.weight = model.head.weight
            if torch.equal(model.head.weight, model.embed.weight.to(model.head.weight.dtype)):        # a second copy
                config.tied = True
                del model.head
        if missing:
            raise UserError(f"{path}: {len(missing)} tensors that config.json asks for are missing, the first is "
                            f"{next(iter(missing))!r}")
        replace_broken(model.embed.weight.device, model.embed.weight.dtype, kind)
        return model

    def save_pretrained(self, path, shard_bytes=None):
        """Writes config.json and model.safetensors, which transformers reads as what it was (a Mistral as a Llama).

        shard_bytes: start a new file, model-0000i-of-0000n.safetensors, where one would get larger; only one file's
        tensors are copied at a time, and an index names the file of each. None: one file.
        """
        path, weights, shards, size = Path(path), self.state_dict(), [{}], 0
        text = json.dumps(config_to_hf(self.config, self.embed.weight.dtype), indent=2)
        for key, names in hf_names(self).items():
            n = sum(weights[name].nbytes for name in names)
            if shard_bytes and shards[-1] and size + n > shard_bytes:
                shards.append({})
                size = 0
            shards[-1][key], size = names, size + n
        files = ["model.safetensors"] if len(shards) == 1 else [
            f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        for file, shard in bar(zip(files, shards), "writing", len(files)):
            tensors = {}
            for key, names in shard.items():
                parts = [weights[name].T if is_transposed(name, self.config) else weights[name] for name in names]
                tensors[key] = (torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]).cpu().contiguous()
            write_whole(path / file, lambda f: save_file(tensors, f, metadata={"format": "pt"}))
        for old in {*path.glob("model*.safetensors*")} - {path / file for file in files}:     # of an earlier writing
            old.unlink()
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())},
                     "weight_map": {key: file for file, shard in zip(files, shards) for key in shard}}
            write_json(path / "model.safetensors.index.json", index)
        write_whole(path / "config.json", lambda f: Path(f).write_text(text + "\n", encoding="utf-8"))
