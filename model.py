"""model.py - one decoder-only Transformer for two families, GPT-2 and Llama, chosen by switches in one Config.

B: batch   T: tokens in this call   S: tokens attended to (cached ones included)   D: d_model   V: vocabulary
H: query heads   K: key/value heads (K < H: grouped-query attention)   C: head_dim

            norm        positions              MLP                     biases           head
GPT-2       LayerNorm   learned table          GELU (tanh form)        everywhere       tied
Llama       RMSNorm     rotary, half-split     SwiGLU, three matrices  none             tied or not
Mistral = Llama.  Qwen2 = Llama with biases on q, k, v.

Weights are read from and written to Hugging Face directories (config.json + *.safetensors). The rotary layout is
theirs: the two halves of a head are rotated against each other, not neighbouring pairs (Meta's original layout).
"""
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from common import UserError, write_whole


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
    rope_scaling: dict | None = None    # Llama 3's: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings
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


_LLAMA = dict(norm="rmsnorm", positions="rotary", activation="swiglu", qkv_bias=False, out_bias=False, tied=False)
SIZES = {   # vocab_size and, for GPT-2 shapes, the token ids are replaced by those of the tokenizer in use
    "tiny": Config(1024, 256, n_layer=4, n_head=4, d_model=128),                                        # 1.0M
    "125m": Config(50257, 1024, n_layer=12, n_head=12, d_model=768),                                    # GPT-2: 124M
    "350m": Config(50257, 1024, n_layer=24, n_head=16, d_model=1024),                                   # GPT-2 medium
    "1b": Config(32000, 2048, 22, 32, 2048, n_kv_head=4, d_ff=5632, **_LLAMA),                          # TinyLlama: 1.1B
    "llama2-7b": Config(32000, 4096, 32, 32, 4096, d_ff=11008, bos_id=1, eos_id=2, **_LLAMA),
    "llama2-13b": Config(32000, 4096, 40, 40, 5120, d_ff=13824, bos_id=1, eos_id=2, **_LLAMA),
    "llama2-70b": Config(32000, 4096, 80, 64, 8192, n_kv_head=8, d_ff=28672, bos_id=1, eos_id=2, **_LLAMA),
    "llama3-8b": Config(128256, 8192, 32, 32, 4096, n_kv_head=8, d_ff=14336, rope_theta=500000.0,
                        bos_id=128000, eos_id=128001, **_LLAMA),
}


# ---------------------------------------------------------------------------------------------------------------------
# The network.

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
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_frequencies(config):
    """Rotary frequencies theta^(-2j/C), j < C/2, with Llama 3's scaling where the config has it. Returns (C/2,)."""
    freq = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    if (s := config.rope_scaling) is None:
        return freq
    # Llama 3: slow rotations (wavelength beyond the original context) are slowed by `factor`, fast ones are kept, and
    # between the two bands the frequency is interpolated.
    wavelength = 2 * math.pi / freq
    turns = s["original_max_position_embeddings"] / wavelength
    smooth = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
    return (1 - smooth) * freq / s["factor"] + smooth * freq


def rotate(x, cos, sin):
    """Rotary position embedding, half-split layout. x: (B, H, T, C), cos and sin: (B or 1, 1, T, C/2)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal multi-head attention with grouped key/value heads and an optional KV cache."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        q_dim, kv_dim = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        self.q = nn.Linear(config.d_model, q_dim, bias=config.qkv_bias)
        self.k = nn.Linear(config.d_model, kv_dim, bias=config.qkv_bias)
        self.v = nn.Linear(config.d_model, kv_dim, bias=config.qkv_bias)
        self.o = nn.Linear(q_dim, config.d_model, bias=config.out_bias)

    def forward(self, x, rope, mask, cache):
        B, T, _ = x.shape
        q = self.q(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)          # (B, H, T, C)
        k = self.k(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)       # (B, K, T, C)
        v = self.v(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(k, v)                                                 # (B, K, T, C) -> (B, K, S, C)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           enable_gqa=self.n_kv_head != self.n_head)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """down(gelu(up x)) or down(silu(gate x) * up x)."""

    def __init__(self, config):
        super().__init__()
        self.activation = config.activation
        if self.activation == "swiglu":
            self.gate = nn.Linear(config.d_model, config.d_ff, bias=config.out_bias)
        self.up = nn.Linear(config.d_model, config.d_ff, bias=config.out_bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=config.out_bias)

    def forward(self, x):
        if self.activation == "swiglu":
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down(F.gelu(self.up(x), approximate="tanh" if self.activation == "gelu_tanh" else "none"))


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
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        if config.positions == "learned":
            self.pos_embed = nn.Embedding(config.context_length, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = Norm(config)
        if not config.tied:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def init_weights(self, generator):
        """GPT-2's initialisation: N(0, 0.02²); what is added to the residual stream, smaller by sqrt(2 n_layer)."""
        for name, p in self.named_parameters():
            if p.ndim == 2:
                residual = name.endswith(("attn.o.weight", "mlp.down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02, generator=generator)
            else:
                nn.init.ones_(p) if "norm" in name and name.endswith("weight") else nn.init.zeros_(p)
        return self

    @property
    def head_weight(self):
        """The output matrix (V, D)."""
        return self.embed.weight if self.config.tied else self.head.weight

    def forward(self, tokens, positions=None, mask=None, cache=None, return_hidden=False):
        """tokens (B, T) -> logits (B, T, V), or the hidden states (B, T, D) that the head would read.

        positions: (B, T) or (T,), default 0..T-1 (after what the cache holds).
        mask: (B, 1, T, S) bool, True where a token may attend; default causal.
        cache: a KVCache, filled as a side effect.
        """
        T = tokens.shape[1]
        if positions is None:
            positions = torch.arange(T, device=tokens.device) + (cache.length if cache else 0)
        x = self.embed(tokens)                                                        # (B, T) -> (B, T, D)
        rope = None
        if self.config.positions == "learned":
            x = x + self.pos_embed(positions)
        else:
            angle = positions[..., None].float() * rope_frequencies(self.config).to(x.device)         # (…, T, C/2)
            angle = angle.view(-1, 1, T, angle.shape[-1])                                              # (B or 1, 1, T, C/2)
            rope = angle.cos(), angle.sin()
        for i, block in enumerate(self.blocks):
            x = block(x, rope, mask, cache.layer(i) if cache else None)
        if cache:
            cache.length += T
        x = self.norm(x)
        return x if return_hidden else F.linear(x, self.head_weight)

    # -------------------------------------------------------------------------------------------- reading and writing

    @classmethod
    def from_pretrained(cls, path, dtype=None, device="cpu"):
        """Reads a Hugging Face directory: config.json and every *.safetensors (one file, or shards with an index).

        The model is built without memory (meta device) and filled tensor by tensor, so only one extra tensor exists at
        a time. dtype: None keeps the stored one. Raises UserError naming the tensor if one is missing, unexpected or
        of the wrong shape, and for architectures that are not one of the table at the top of this file.
        """
        path = Path(path)
        config = config_from_hf(_read_json(path / "config.json"), path)
        with torch.device("meta"):
            model = cls(config)
        missing = {name: p.shape for name, p in model.named_parameters()}
        for file in _weight_files(path):
            with safe_open(file, framework="pt", device=str(device)) as tensors:
                for key in tensors.keys():
                    for name, tensor in _from_hf(key, tensors, config):
                        if name not in missing:
                            raise UserError(f"{file}: unexpected tensor {key!r}: config.json describes no such weight")
                        if tensor.shape != missing[name]:
                            raise UserError(f"{file}: tensor {key!r} has shape {tuple(tensor.shape)} where config.json "
                                            f"asks for {tuple(missing[name])}")
                        owner, _, leaf = name.rpartition(".")
                        tensor = tensor.to(dtype or tensor.dtype).contiguous()
                        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))
                        del missing[name]
        if missing:
            raise UserError(f"{path}: {len(missing)} tensors are missing from the *.safetensors, the first is "
                            f"{_hf_keys(next(iter(missing)), config)!r}")
        return model

    def save_pretrained(self, path):
        """Writes config.json and model.safetensors as Hugging Face's GPT2LMHeadModel or LlamaForCausalLM reads them."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        weights = {k: v.detach().cpu() for k, v in self.state_dict().items()}
        tensors = _to_hf(weights, self.config)
        write_whole(path / "model.safetensors", lambda f: save_file(tensors, f, metadata={"format": "pt"}))
        dtype = str(self.embed.weight.dtype).removeprefix("torch.")
        text = json.dumps(config_to_hf(self.config) | {"torch_dtype": dtype}, indent=2)
        write_whole(path / "config.json", lambda f: Path(f).write_text(text + "\n"))


def _read_json(file):
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file} does not exist: a model directory needs config.json and *.safetensors") from None
    except json.JSONDecodeError as e:
        raise UserError(f"{file} is not JSON (line {e.lineno}: {e.msg})") from None


def _weight_files(path):
    index = path / "model.safetensors.index.json"
    names = sorted(set(_read_json(index)["weight_map"].values())) if index.exists() else sorted(
        f.name for f in path.glob("*.safetensors"))
    if not names:
        raise UserError(f"{path} holds no *.safetensors (pickled *.bin weights are not read: convert them first)")
    for name in names:
        if not (path / name).exists():
            raise UserError(f"{path / name} does not exist, but {index.name} names it")
    return [path / name for name in names]


# Our name -> theirs, for what lies in a block and what does not. GPT-2 keeps q, k, v in one matrix, and stores its
# matrices transposed, (in, out).
_GPT2 = {"embed": "wte", "pos_embed": "wpe", "norm": "ln_f", "norm1": "ln_1", "norm2": "ln_2",
         "attn.q": "attn.c_attn", "attn.k": "attn.c_attn", "attn.v": "attn.c_attn", "attn.o": "attn.c_proj",
         "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
_HF_LLAMA = {"embed": "embed_tokens", "norm": "norm", "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
             "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj",
             "attn.o": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"}


def _is_gpt2(config):
    return config.positions == "learned"


def _hf_keys(name, config):
    """Our parameter name -> Hugging Face's: "blocks.3.attn.q.weight" -> "model.layers.3.self_attn.q_proj.weight"."""
    stem, _, leaf = name.rpartition(".")
    if stem == "head":
        return "lm_head." + leaf
    prefix, layers, table = ("transformer.", "h", _GPT2) if _is_gpt2(config) else ("model.", "layers", _HF_LLAMA)
    if stem.startswith("blocks."):
        _, i, stem = stem.split(".", 2)
        return f"{prefix}{layers}.{i}.{table[stem]}.{leaf}"
    return f"{prefix}{table[stem]}.{leaf}"


def _from_hf(key, tensors, config):
    """One stored tensor -> the (our name, tensor) pairs it fills: none, one, or for GPT-2's c_attn three."""
    buffers = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")              # constants some files carry
    if key.endswith(buffers) or (key == "lm_head.weight" and config.tied):
        return []
    if key == "lm_head.weight":
        return [("head.weight", tensors.get_tensor(key))]
    stem, _, leaf = key.removeprefix("transformer." if _is_gpt2(config) else "model.").rpartition(".")
    block, layers, table = "", "h" if _is_gpt2(config) else "layers", _GPT2 if _is_gpt2(config) else _HF_LLAMA
    if stem.startswith(layers + "."):
        _, i, stem = stem.split(".", 2)
        block = f"blocks.{i}."
    ours = [name for name, theirs in table.items() if theirs == stem]
    if not ours:
        return [(key, torch.empty(0))]                                                # no such place: reported as unexpected
    tensor = tensors.get_tensor(key)
    if _is_gpt2(config) and leaf == "weight" and ("attn" in stem or "mlp" in stem):
        tensor = tensor.T                                                             # (in, out) -> (out, in)
    return [(f"{block}{name}.{leaf}", part) for name, part in zip(ours, tensor.chunk(len(ours)))]


def _to_hf(weights, config):
    """The inverse of _from_hf for a whole state dict."""
    out = {}
    for name, tensor in weights.items():
        if _is_gpt2(config) and name.endswith(".weight") and (".attn." in name or ".mlp." in name):
            tensor = tensor.T
        out.setdefault(_hf_keys(name, config), []).append(tensor)                     # q, k, v meet under c_attn, in order
    return {key: torch.cat(parts, dim=-1).contiguous() for key, parts in out.items()}


def config_from_hf(c, path="config.json"):
    """Hugging Face's config.json, as a dict -> Config. Raises UserError for what this file does not implement."""
    kind = c.get("model_type")
    eos = c.get("eos_token_id")
    ids = dict(bos_id=c.get("bos_token_id"), eos_id=eos[0] if isinstance(eos, list) else eos)
    if kind == "gpt2":
        act = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}.get(c.get("activation_function", "gelu_new"))
        if act is None or c.get("scale_attn_by_inverse_layer_idx"):
            raise UserError(f"{path}: a GPT-2 with activation {c.get('activation_function')!r} or "
                            f"scale_attn_by_inverse_layer_idx is not implemented")
        return Config(c["vocab_size"], c["n_positions"], c["n_layer"], c["n_head"], c["n_embd"], d_ff=c.get("n_inner"),
                      norm_eps=c["layer_norm_epsilon"], activation=act, tied=c.get("tie_word_embeddings", True), **ids)
    if kind not in ("llama", "mistral", "qwen2"):
        raise UserError(f"{path}: model_type is {kind!r}; implemented are gpt2, llama, mistral, qwen2")
    rope = dict(c.get("rope_parameters") or c.get("rope_scaling") or {})              # transformers 5 writes rope_parameters
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    context = c["max_position_embeddings"]
    # A sliding window longer than the sequence masks nothing: such a model is a Llama up to that length.
    if c.get("sliding_window") and (kind == "mistral" or c.get("use_sliding_window")):
        context = min(context, c["sliding_window"])
    if rope_type not in ("default", "llama3") or c.get("hidden_act", "silu") != "silu" or c.get("mlp_bias") \
            or (kind == "llama" and c.get("attention_bias")):
        raise UserError(f"{path}: rope type {rope_type!r}, hidden_act {c.get('hidden_act')!r} or llama biases are not implemented")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return Config(c["vocab_size"], context, c["num_hidden_layers"], c["num_attention_heads"], c["hidden_size"],
                  n_kv_head=c.get("num_key_value_heads"), head_dim=c.get("head_dim"), d_ff=c["intermediate_size"],
                  norm_eps=c["rms_norm_eps"], rope_theta=float(rope.get("rope_theta") or c.get("rope_theta") or 10000.0),
                  rope_scaling={k: rope[k] for k in keys} if rope_type == "llama3" else None,
                  **(_LLAMA | dict(qkv_bias=kind == "qwen2", tied=c.get("tie_word_embeddings", False))), **ids)


def config_to_hf(config):
    """Config -> Hugging Face's config.json, as a dict."""
    ids = dict(bos_token_id=config.bos_id, eos_token_id=config.eos_id, tie_word_embeddings=config.tied)
    if _is_gpt2(config):
        act = {"gelu_tanh": "gelu_new", "gelu": "gelu"}[config.activation]
        return dict(architectures=["GPT2LMHeadModel"], model_type="gpt2", vocab_size=config.vocab_size,
                    n_positions=config.context_length, n_embd=config.d_model, n_layer=config.n_layer, n_head=config.n_head,
                    n_inner=config.d_ff, layer_norm_epsilon=config.norm_eps, activation_function=act,
                    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **ids)
    kind = "qwen2" if config.qkv_bias else "llama"
    scaling = None if config.rope_scaling is None else {"rope_type": "llama3", **config.rope_scaling}
    return dict(architectures=[{"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[kind]], model_type=kind,
                vocab_size=config.vocab_size, max_position_embeddings=config.context_length, hidden_size=config.d_model,
                num_hidden_layers=config.n_layer, num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head,
                head_dim=config.head_dim, intermediate_size=config.d_ff, rms_norm_eps=config.norm_eps, hidden_act="silu",
                rope_theta=config.rope_theta, rope_scaling=scaling, **ids)


# ---------------------------------------------------------------------------------------------------------------------
# Generation.

class KVCache:
    """Keys and values of all layers for up to `capacity` tokens, allocated once."""

    def __init__(self, config, batch, capacity, dtype, device):
        shape = (config.n_layer, batch, config.n_kv_head, capacity, config.head_dim)
        self.k, self.v = torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0                                       # tokens held; the Transformer advances it after its last layer

    def layer(self, i):
        """The view that layer i appends to."""
        return _LayerCache(self, i)


@dataclass
class _LayerCache:
    cache: KVCache
    i: int

    def append(self, k, v):                                   # (B, K, T, C) -> everything held so far, (B, K, S, C)
        start, end = self.cache.length, self.cache.length + k.shape[2]
        self.cache.k[self.i, :, :, start:end], self.cache.v[self.i, :, :, start:end] = k, v
        return self.cache.k[self.i, :, :, :end], self.cache.v[self.i, :, :, :end]


def sample_token(logits, temperature, top_p, generator=None):
    """One token a row from logits (B, V): the best one for temperature 0, else from the nucleus of mass top_p. -> (B,)"""
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        ordered, ids = probs.sort(-1, descending=True)
        # keep the smallest set of best tokens that reaches top_p: a token is dropped if those before it already do
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
        return ids.gather(-1, torch.multinomial(ordered, 1, generator=generator))[:, 0]
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=1.0, top_p=1.0, eos_id=None, generator=None):
    """Continues every prompt until EOS or max_new_tokens. temperature 0 is greedy.

    prompts: list of token lists, of any lengths >= 1. They are padded on the left, so that all rows write the same slot
    of the KV cache; padding is masked and does not count as a position, so a row's result does not depend on the others.
    eos_id: default the config's; -1 never stops. Returns a list of token lists; one that ends in EOS stopped by itself.
    """
    config, device = model.config, model.embed.weight.device
    eos_id = config.eos_id if eos_id is None else eos_id
    longest = max(map(len, prompts))
    if min(map(len, prompts)) < 1 or longest + max_new_tokens > config.context_length:
        raise ValueError(f"prompts of 1 to {config.context_length - max_new_tokens} tokens are needed for {max_new_tokens} "
                         f"new ones in a context of {config.context_length}; the longest given has {longest}")
    pad = torch.tensor([longest - len(p) for p in prompts], device=device)                             # (B,)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)       # (B, T)
    cache = KVCache(config, len(prompts), longest + max_new_tokens, model.embed.weight.dtype, device)
    slot = torch.arange(longest + max_new_tokens, device=device)
    real = slot >= pad[:, None]                                                                        # (B, S)
    out, done = [], torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for _ in range(max_new_tokens):
        start, end = cache.length, cache.length + tokens.shape[1]
        # a query in slot t sees the real slots up to t; padding queries see themselves, so that no row is empty
        mask = (real[:, None, None, :end] | (slot[start:end, None] == slot[:end])) & (slot[:end] <= slot[start:end, None])
        positions = (slot[start:end] - pad[:, None]).clamp(min=0)
        hidden = model(tokens, positions, mask, cache, return_hidden=True)
        token = sample_token(F.linear(hidden[:, -1], model.head_weight), temperature, top_p, generator)
        out.append(token.masked_fill(done, -1))                                                        # -1: after the end
        done |= token == eos_id
        if done.all():
            break
        tokens = token[:, None]
    return [[t for t in row if t >= 0] for row in torch.stack(out, 1).tolist()]
