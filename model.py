"""model.py - one decoder-only Transformer for two families, GPT-2 and Llama, chosen by switches in one Config.

B: rows of a batch   T: tokens in this call   M: tokens attended to, those in the KV cache included   D: d_model
V: vocabulary   H: query heads   K: key/value heads (K < H: grouped-query attention)   C: head_dim

            norm        positions              MLP                     biases           head
GPT-2       LayerNorm   learned table          GELU (tanh form)        everywhere       tied
Llama       RMSNorm     rotary, half-split     SwiGLU, three matrices  none             tied or not
Mistral = Llama.  Qwen2 = Llama with biases on q, k, v.

Weights are read from and written to Hugging Face directories (config.json + *.safetensors). The rotary layout is
theirs: the two halves of a head are rotated against each other, not neighbouring pairs (Meta's original layout).

A new family needs in this file (elsewhere: CONTRIBUTING.md): a line in the table above; where it computes something
new, a switch in Config and its branch in Norm, Attention, MLP or Transformer.forward (one product may stand in the
place of Attention.project and MLP.inner: generation.fast_copy); its names on disk in _HF_NAMES and in Config.family, if
they are neither GPT-2's nor Llama's; its config.json in config_from_hf and config_to_hf. Then a test like
test_golden_forward.
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ops import fused
from ops.check import replace_broken
from ops.generation import generate  # noqa: F401  not used here: part of the interface of this file
from ops.quantize import KINDS, QuantizedLinear, quantize_weight
from runs.files import UserError, read_json, write_json, write_whole


@dataclass
class Config:
    """The shape of a Transformer. None for n_kv_head, head_dim, d_ff means n_head, d_model / n_head, 4 d_model."""
    vocab_size: int
    context_length: int
    n_layer: int
    n_head: int
    d_model: int
    n_kv_head: int | None = None
    head_dim: int | None = None
    d_ff: int | None = None
    norm: str = "layernorm"             # "layernorm" | "rmsnorm"
    norm_eps: float = 1e-5
    positions: str = "learned"          # "learned" | "rotary"
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None    # Llama 3's, with the keys _LLAMA3_ROPE
    activation: str = "gelu_tanh"       # "gelu_tanh" | "gelu" | "swiglu"
    qkv_bias: bool = True
    out_bias: bool = True               # the biases of the attention output and of the MLP
    tied: bool = True                   # the head is the embedding matrix
    bos_id: int | None = None
    eos_id: int | None = None

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.d_model // self.n_head
        self.d_ff = self.d_ff or 4 * self.d_model
        assert self.n_head % self.n_kv_head == 0, "n_head must be a multiple of n_kv_head"

    @property
    def family(self):
        """The family whose names and layout the weights have on disk: "gpt2" or "llama". Of the models that this file
        implements, GPT-2 alone has learned positions."""
        return "gpt2" if self.positions == "learned" else "llama"


_LLAMA = dict(norm="rmsnorm", positions="rotary", activation="swiglu", qkv_bias=False, out_bias=False, tied=False)
_LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
SIZES = {   # vocab_size, bos_id and eos_id are replaced by those of the tokenizer in use
    "tiny": Config(1024, 256, n_layer=4, n_head=4, d_model=128),                                        # 1.0M
    "125m": Config(50257, 1024, n_layer=12, n_head=12, d_model=768),                                    # GPT-2: 124M
    "350m": Config(50257, 1024, n_layer=24, n_head=16, d_model=1024),                                   # GPT-2 medium
    "1b": Config(32000, 2048, 22, 32, 2048, n_kv_head=4, d_ff=5632, bos_id=1, eos_id=2, **_LLAMA),      # TinyLlama
    "llama2-7b": Config(32000, 4096, 32, 32, 4096, d_ff=11008, bos_id=1, eos_id=2, **_LLAMA),
    "llama2-13b": Config(32000, 4096, 40, 40, 5120, d_ff=13824, bos_id=1, eos_id=2, **_LLAMA),
    "llama2-70b": Config(32000, 4096, 80, 64, 8192, n_kv_head=8, d_ff=28672, bos_id=1, eos_id=2, **_LLAMA),
    "llama3-8b": Config(128256, 8192, 32, 32, 4096, n_kv_head=8, d_ff=14336, rope_theta=500000.0,
                        bos_id=128000, eos_id=128001, **_LLAMA),
}


# ---------------------------------------------------------------------------------------------------------------------
# The network.

class Linear(nn.Linear):
    """nn.Linear by way of fused.linear, as all linear layers here."""

    def reset_parameters(self):
        """Nothing: init_weights or a file fills them, and torch's own start costs seconds of imports on "meta"."""

    def forward(self, x):
        return fused.linear(x, self.weight, self.bias)


class Norm(nn.Module):
    """LayerNorm (weight, bias) or RMSNorm (weight alone) over the last dimension."""

    def __init__(self, config):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.bias = nn.Parameter(torch.zeros(config.d_model)) if config.norm == "layernorm" else None

    def forward(self, x):
        if self.bias is not None:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return fused.rms_norm(x, self.weight, self.eps)


def rope_frequencies(config, device=None):
    """Rotary frequencies theta^(-2j/C), j < C/2, with Llama 3's scaling where the config has it. Returns (C/2,)."""
    freq = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim)
    if (s := config.rope_scaling) is None:
        return freq
    # Llama 3: slow rotations (wavelength beyond the original context) are slowed by `factor`, fast ones are kept, and
    # between the two bands the frequency is interpolated.
    wavelength = 2 * math.pi / freq
    turns = s["original_max_position_embeddings"] / wavelength
    smooth = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
    return (1 - smooth) * freq / s["factor"] + smooth * freq


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

    def project(self, x):                                             # (B, T, D) -> (B, T, H·C), (B, T, K·C) twice
        return self.q(x), self.k(x), self.v(x)

    def forward(self, x, rope, mask, cache):
        B, T, _ = x.shape
        q, k, v = self.project(x)
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
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                               enable_gqa=k.shape[1] != self.n_head)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """down(gelu(up x)) or down(silu(gate x) * up x)."""

    def __init__(self, config):
        super().__init__()
        self.gelu = {"gelu_tanh": "tanh", "gelu": "none", "swiglu": None}[config.activation]    # its approximation
        if self.gelu is None:
            self.gate = Linear(config.d_model, config.d_ff, bias=config.out_bias)
        self.up = Linear(config.d_model, config.d_ff, bias=config.out_bias)
        self.down = Linear(config.d_ff, config.d_model, bias=config.out_bias)

    def inner(self, x):                                               # (B, T, D) -> (B, T, d_ff)
        return F.gelu(self.up(x), approximate=self.gelu) if self.gelu else fused.swiglu(self.gate(x), self.up(x))

    def forward(self, x):
        return self.down(self.inner(x))


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = Norm(config), Attention(config), Norm(config), MLP(config)

    def forward(self, x, rope, mask, cache):
        x = x + self.attn(self.norm1(x), rope, mask, cache)
        return x + self.mlp(self.norm2(x))


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
            else:
                nn.init.constant_(p, 1.0 if name.endswith("weight") else 0.0)         # norms; biases
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
            mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill_(~mask, -torch.inf)
        rope = None
        if self.config.positions == "learned":
            x = x + self.pos_embed(positions)
        else:
            angle = positions[..., None] * rope_frequencies(self.config, x.device)    # (T,) or (B, T) -> (…, T, C/2)
            angle = angle.view(-1, T, angle.shape[-1])                                # (B or 1, T, C/2)
            rope = angle.cos(), angle.sin()
        for i, block in enumerate(self.blocks):
            if self.checkpoint_blocks and torch.is_grad_enabled():   # keep x alone, compute the rest again in backward
                x = torch.utils.checkpoint.checkpoint(block, x, rope, mask, None, use_reentrant=False)
            else:
                x = block(x, rope, mask, cache.layer(i) if cache is not None else None)
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
        missing, unexpected, of the wrong shape or not finite where it is to be quantised, and for architectures that
        are not in the table at the top of this file. On CUDA the kernels are then looked at (ops/check.py).
        """
        path, kind = Path(path), None if quantize == "none" else quantize
        if kind not in (None, *KINDS):
            raise UserError(f"quantize is none, int8 or nf4, not {quantize!r}")
        config = config_from_hf(read_json(path / "config.json"), path / "config.json")
        with torch.device("meta"):
            model = cls(config)
        missing = _hf_names(model)
        for file in _weight_files(path):
            for key, tensor in _stored_tensors(file, device):
                if key.endswith(_CONSTANTS) or (key == "lm_head.weight" and config.tied):
                    continue
                names = missing.pop(key, None) or missing.pop("transformer." + key, None)     # gpt2 as published
                if names is None:
                    raise UserError(f"{file}: unexpected tensor {key!r}: config.json describes none, or it came before")
                rows, *columns = model.get_parameter(names[0]).shape
                shape, transposed = (len(names) * rows, *columns), _is_transposed(names[0], config)
                shape = shape[::-1] if transposed else shape
                if tensor.shape != shape:
                    raise UserError(f"{file}: tensor {key!r} has shape {tuple(tensor.shape)}, config.json asks {shape}")
                tensor = tensor.T if transposed else tensor
                for name, part in zip(names, tensor.chunk(len(names))):               # q, k, v of GPT-2's c_attn
                    owner, _, leaf = name.rpartition(".")
                    layer, as_dtype = model.get_submodule(owner), dtype or part.dtype
                    if kind and isinstance(layer, nn.Linear) and owner.startswith("blocks.") and leaf == "weight":
                        try:
                            weight = quantize_weight(part, kind, as_dtype)
                        except ValueError as e:
                            raise UserError(f"{file}: tensor {key!r} {e}") from None
                        model.set_submodule(owner, QuantizedLinear(weight, layer.bias))
                    else:
                        setattr(layer, leaf, nn.Parameter(part.to(as_dtype).contiguous()))
                del tensor, part                                                      # before the next one is read
        if missing:
            raise UserError(f"{path}: {len(missing)} tensors that config.json asks for are missing, the first is "
                            f"{next(iter(missing))!r}")
        replace_broken(model.embed.weight.device, model.embed.weight.dtype, kind)
        return model

    def save_pretrained(self, path, shard_bytes=None):
        """Writes config.json and model.safetensors, which transformers reads as GPT-2, Llama or Qwen2.

        shard_bytes: start a new file, model-0000i-of-0000n.safetensors, where one would get larger; only one file's
        tensors are copied at a time, and an index names the file of each. None: one file.
        """
        path, weights, shards, size = Path(path), self.state_dict(), [{}], 0
        text = json.dumps(config_to_hf(self.config, self.embed.weight.dtype), indent=2)
        for key, names in _hf_names(self).items():
            n = sum(weights[name].nbytes for name in names)
            if shard_bytes and shards[-1] and size + n > shard_bytes:
                shards.append({})
                size = 0
            shards[-1][key], size = names, size + n
        files = ["model.safetensors"] if len(shards) == 1 else [
            f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        for file, shard in zip(files, shards):
            tensors = {}
            for key, names in shard.items():
                parts = [weights[name].T if _is_transposed(name, self.config) else weights[name] for name in names]
                tensors[key] = (torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]).cpu().contiguous()
            write_whole(path / file, lambda f: save_file(tensors, f, metadata={"format": "pt"}))
        for old in {*path.glob("model*.safetensors*")} - {path / file for file in files}:     # of an earlier writing
            old.unlink()
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())},
                     "weight_map": {key: file for file, shard in zip(files, shards) for key in shard}}
            write_json(path / "model.safetensors.index.json", index)
        write_whole(path / "config.json", lambda f: Path(f).write_text(text + "\n", encoding="utf-8"))


# {family: {our name: Hugging Face's}}, for what stands outside the blocks and for what stands in one.
_HF_NAMES = {
    "gpt2": {"embed": "transformer.wte", "pos_embed": "transformer.wpe", "blocks": "transformer.h",
             "norm": "transformer.ln_f", "head": "lm_head", "norm1": "ln_1", "norm2": "ln_2",
             "attn.q": "attn.c_attn", "attn.k": "attn.c_attn", "attn.v": "attn.c_attn", "attn.o": "attn.c_proj",
             "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"},
    "llama": {"embed": "model.embed_tokens", "blocks": "model.layers", "norm": "model.norm", "head": "lm_head",
              "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
              "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj",
              "attn.o": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj",
              "mlp.down": "mlp.down_proj"}}
_CONSTANTS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")              # not weights, but in some files


def _is_transposed(name, config):
    """GPT-2 stores the matrices of its blocks as (in, out)."""
    return config.family == "gpt2" and name.startswith("blocks.") and name.endswith(".weight") and ".norm" not in name


def hf_name(name, config):
    """Our parameter's name -> Hugging Face's: "blocks.3.attn.q.weight" -> "model.layers.3.self_attn.q_proj.weight"."""
    table = _HF_NAMES[config.family]
    stem, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        raise ValueError(f"{name} has no place in a Hugging Face directory: merge adapters, dequantise weights first")
    if not stem.startswith("blocks."):
        return f"{table[stem]}.{leaf}"
    blocks, i, part = stem.split(".", 2)
    return f"{table[blocks]}.{i}.{table[part]}.{leaf}"


def _hf_names(model):
    """{their tensor: [our parameters in it]}. Only GPT-2's c_attn has more than one of ours: q, k, v side by side."""
    out = {}
    for name in model.state_dict():
        out.setdefault(hf_name(name, model.config), []).append(name)
    return out


def _weight_files(path):
    """The files to read: model.safetensors if there is one (as transformers does), else the index's, else all."""
    files = sorted(path.glob("[!.]*.safetensors"))                                    # [!.]: nothing half-written
    index = path / "model.safetensors.index.json"
    if path / "model.safetensors" in files:
        return [path / "model.safetensors"]
    if index.exists():
        files = [path / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    for file in files:
        if not file.exists():
            raise UserError(f"{file} does not exist, but {index.name} names it")
    if not files:
        raise UserError(f"{path} holds no *.safetensors (pickled *.bin weights are not read: convert them first)")
    return files


def _stored_tensors(file, device):
    """Yields (name, tensor) of a safetensors file, one after the other."""
    try:
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            for key in tensors.keys():
                yield key, tensors.get_tensor(key)
    except SafetensorError as e:
        raise UserError(f"{file} is damaged or not a safetensors file: {e}") from None


def config_from_hf(c, path="config.json"):
    """Hugging Face's config.json, as a dict -> Config. Raises UserError for what this file does not implement."""
    kind, eos = c.get("model_type"), c.get("eos_token_id")
    ids = dict(bos_id=c.get("bos_token_id"), eos_id=eos[0] if isinstance(eos, list) else eos)
    act = c.get("activation_function", "gelu_new") if kind == "gpt2" else c.get("hidden_act", "silu")
    gelu = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}                    # transformers 5, or before
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    # A sliding window longer than the sequence masks nothing: such a model is a Llama up to that length.
    window = c.get("sliding_window") if kind == "mistral" or c.get("use_sliding_window") else None
    refused = {
        f"model_type {kind!r} (only gpt2, llama, mistral, qwen2)": kind not in ("gpt2", "llama", "mistral", "qwen2"),
        f"activation {act!r}": act not in (gelu if kind == "gpt2" else ["silu"]),
        f"rope type {rope_type!r}": rope_type not in ("default", "llama3"),
        "attention_bias": kind == "llama" and c.get("attention_bias"),
        "mlp_bias": c.get("mlp_bias"),
        "scale_attn_weights = false": not c.get("scale_attn_weights", True),
        "scale_attn_by_inverse_layer_idx": c.get("scale_attn_by_inverse_layer_idx"),
    }
    for what, found in refused.items():
        if found:
            raise UserError(f"{path}: {what} is not implemented")
    try:
        if kind == "gpt2":
            return Config(c["vocab_size"], c["n_positions"], c["n_layer"], c["n_head"], c["n_embd"],
                          d_ff=c.get("n_inner"), norm_eps=c["layer_norm_epsilon"], activation=gelu[act],
                          tied=c.get("tie_word_embeddings", True), **ids)
        context = c["max_position_embeddings"]
        switches = _LLAMA | dict(qkv_bias=kind == "qwen2", tied=c.get("tie_word_embeddings", False))
        return Config(c["vocab_size"], min(context, window or context), c["num_hidden_layers"],
                      c["num_attention_heads"], c["hidden_size"], n_kv_head=c.get("num_key_value_heads"),
                      head_dim=c.get("head_dim"), d_ff=c["intermediate_size"], norm_eps=c["rms_norm_eps"],
                      rope_theta=float(rope.get("rope_theta") or c.get("rope_theta") or 10000.0),
                      rope_scaling={k: rope[k] for k in _LLAMA3_ROPE} if rope_type == "llama3" else None,
                      **switches, **ids)
    except KeyError as e:
        raise UserError(f"{path} lacks {e}") from None


def config_to_hf(config, dtype=torch.float32):
    """Config -> Hugging Face's config.json, as a dict. Raises ValueError if no architecture there is this Config."""
    common = dict(vocab_size=config.vocab_size, bos_token_id=config.bos_id, eos_token_id=config.eos_id,
                  tie_word_embeddings=config.tied, torch_dtype=str(dtype).removeprefix("torch."))
    if config.family == "gpt2":
        out = dict(architectures=["GPT2LMHeadModel"], model_type="gpt2", n_positions=config.context_length,
                   n_embd=config.d_model, n_layer=config.n_layer, n_head=config.n_head, n_inner=config.d_ff,
                   layer_norm_epsilon=config.norm_eps, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **common,
                   activation_function="gelu" if config.activation == "gelu" else "gelu_new")
    else:
        kind, name = ("qwen2", "Qwen2") if config.qkv_bias else ("llama", "Llama")
        scaling = config.rope_scaling and {"rope_type": "llama3", **config.rope_scaling}
        out = dict(architectures=[name + "ForCausalLM"], model_type=kind, max_position_embeddings=config.context_length,
                   hidden_size=config.d_model, num_hidden_layers=config.n_layer, num_attention_heads=config.n_head,
                   num_key_value_heads=config.n_kv_head, head_dim=config.head_dim, intermediate_size=config.d_ff,
                   rms_norm_eps=config.norm_eps, hidden_act="silu", rope_theta=config.rope_theta,
                   rope_scaling=scaling, **common)
    if config_from_hf(out) != config:
        raise ValueError(f"no Hugging Face architecture is {config}")
    return out
