"""families.py - the shape of a model, and what its family calls it on disk: config.json, tensors, files of weights.

Config says which model model.py computes. A Hugging Face directory says the same in the words of its family (GPT-2,
Llama, Mistral, Qwen2, Qwen3, Gemma 3), with defaults for what it leaves out, and stores tensors under names of its own.
"""
import json
import math
from dataclasses import KW_ONLY, dataclass

import torch
from safetensors import SafetensorError, safe_open

from runs.files import UserError, bar, read_json


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
    norm: str = "layernorm"             # "layernorm" | "rmsnorm" | "rmsnorm1": RMSNorm times 1 + weight
    norm_eps: float = 1e-5
    positions: str = "learned"          # "learned" | "rotary"
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None    # "rope_type" and its numbers, as rope_scaling_from_hf makes it
    activation: str = "gelu_tanh"       # "gelu_tanh" | "gelu" | "swiglu" | "geglu": silu(gate) or gelu(gate) times up
    qkv_bias: bool = True
    out_bias: bool = True               # the biases of the attention output and of the MLP
    tied: bool = True                   # the head is the embedding matrix
    bos_id: int | None = None
    eos_id: int | None = None
    _: KW_ONLY                          # at their defaults, what follows is no part of svd_lora.fingerprint
    mlp_bias: bool | None = None        # where the MLP's are not as out_bias
    qk_norm: bool = False               # an RMSNorm on each head of q and k, before it is rotated
    post_norms: bool = False            # a norm also after attention and after the MLP
    scaled_embedding: bool = False      # times sqrt(d_model)
    local_layers: tuple = ()            # these rotate by local_theta, without rope_scaling
    local_theta: float = 10000.0

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.d_model // self.n_head
        self.d_ff = self.d_ff or 4 * self.d_model
        assert self.n_head % self.n_kv_head == 0, "n_head must be a multiple of n_kv_head"

    @property
    def family(self):
        """The family whose names and layout the weights have on disk: "gpt2", "gemma3" or "llama". Of the models that
        this file implements, GPT-2 alone has learned positions, and Gemma alone norms after attention and MLP."""
        return "gpt2" if self.positions == "learned" else "gemma3" if self.post_norms else "llama"

    @property
    def gated(self):
        """Whether the MLP has a third matrix, the gate."""
        return self.activation in ("swiglu", "geglu")


_LLAMA = dict(norm="rmsnorm", positions="rotary", activation="swiglu", qkv_bias=False, out_bias=False, tied=False)
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
# Tensors: their names, and the files that hold them.

# {family: {our name: Hugging Face's}}, for what stands outside the blocks and for what stands in one.
_HF_NAMES = {
    "gpt2": {"embed": "transformer.wte", "pos_embed": "transformer.wpe", "blocks": "transformer.h",
             "norm": "transformer.ln_f", "head": "lm_head", "norm1": "ln_1", "norm2": "ln_2",
             "attn.q": "attn.c_attn", "attn.k": "attn.c_attn", "attn.v": "attn.c_attn", "attn.o": "attn.c_proj",
             "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"},
    "llama": {"embed": "model.embed_tokens", "blocks": "model.layers", "norm": "model.norm", "head": "lm_head",
              "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
              "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj",
              "attn.o": "self_attn.o_proj", "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm",
              "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"}}
_HF_NAMES["gemma3"] = _HF_NAMES["llama"] | {"norm2": "pre_feedforward_layernorm",
                                            "post_norm1": "post_attention_layernorm",
                                            "post_norm2": "post_feedforward_layernorm"}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CONSTANTS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")              # not weights, but in some files


def is_transposed(name, config):
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


def hf_names(model):
    """{their tensor: [our parameters in it]}. Only GPT-2's c_attn has more than one of ours: q, k, v side by side."""
    out = {}
    for name in model.state_dict():
        out.setdefault(hf_name(name, model.config), []).append(name)
    return out


def weight_files(path):
    """The files to read: model.safetensors if there is one (as transformers does), else the index's, else all."""
    files = sorted(path.glob("[!.]*.safetensors"))                                    # [!.]: nothing half-written
    index = path / "model.safetensors.index.json"
    if path / "model.safetensors" in files:
        return [path / "model.safetensors"]
    if index.exists():
        named, there = read_json(index).get("weight_map"), {file.name for file in files}
        if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
            raise UserError(f"{index} has no \"weight_map\" from tensors to files: copy it anew")
        if missing := sorted(set(named.values()) - there):
            raise UserError(f"{path / missing[0]} does not exist, but {index.name} names it")
        files = [path / name for name in sorted(set(named.values()))]
    if not files:
        raise UserError(f"{path} holds no *.safetensors (pickled *.bin weights are not read: convert them first)")
    return files


def stored_tensors(file, device):
    """Yields (name, tensor) of a safetensors file, one after the other."""
    try:
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            for key in bar(tensors.keys(), f"reading {file.name}"):
                yield key, tensors.get_tensor(key)
    except (SafetensorError, OSError) as e:
        raise UserError(f"{file} is damaged or not a safetensors file: {e}") from None


# ---------------------------------------------------------------------------------------------------------------------
# config.json.

# What transformers' config classes take for a key that config.json leaves out (5.23).
_LLAMA_KEYS = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=None, head_dim=None, hidden_act="silu", max_position_embeddings=2048, rms_norm_eps=1e-6,
    bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, rope_theta=10000.0)
_QWEN_KEYS = _LLAMA_KEYS | dict(
    vocab_size=151936, intermediate_size=22016, num_key_value_heads=32, max_position_embeddings=32768,
    bos_token_id=None, eos_token_id=None, sliding_window=4096, max_window_layers=28)
_DEFAULTS = {
    "gpt2": dict(vocab_size=50257, n_positions=1024, n_layer=12, n_head=12, n_embd=768, n_inner=None,
                 layer_norm_epsilon=1e-5, activation_function="gelu_new", bos_token_id=50256, eos_token_id=50256,
                 tie_word_embeddings=True),
    "llama": _LLAMA_KEYS,
    "mistral": _LLAMA_KEYS | dict(intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=2 ** 17,
                                  sliding_window=4096),
    "qwen2": _QWEN_KEYS,
    "qwen3": _QWEN_KEYS | dict(head_dim=128),
    "gemma3_text": _LLAMA_KEYS | dict(
        vocab_size=262208, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256, hidden_activation="gelu_pytorch_tanh", max_position_embeddings=2 ** 17,
        bos_token_id=2, eos_token_id=1, tie_word_embeddings=True, sliding_window=4096, query_pre_attn_scalar=256,
        rope_theta=1e6, rope_local_base_freq=10000.0)}
# The key of the activation, and what its values are here.
_ACTIVATIONS = dict.fromkeys(_DEFAULTS, ("hidden_act", {"silu": "swiglu"})) | {
    "gpt2": ("activation_function", {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}),
    "gemma3_text": ("hidden_activation", {"gelu_pytorch_tanh": "geglu"})}
_ROPE_KEYS = {"linear": ("factor",), "dynamic": ("factor",),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
              "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate",
                       "attention_factor")}
_ROPE_NUMBERS = {*_ROPE_KEYS["llama3"], *_ROPE_KEYS["yarn"], "mscale", "mscale_all_dim", "rope_theta"} - {"truncate"}
# Keys without a default in _DEFAULTS, and a value of their kind.
_OPTIONAL = dict(sliding_window=4096, sliding_window_pattern=6, original_max_position_embeddings=2048, layer_types=[""],
                 rope_scaling={}, rope_parameters={}, rope_local_base_freq=10000.0)
_NULLABLE = {*_OPTIONAL, "num_key_value_heads", "head_dim", "n_inner", "bos_token_id", "eos_token_id"}
MOST, MOST_LAYERS = 2 ** 24, 1000       # what a size, and the number of layers, may be: more is a mistake


def _is_number(x):
    """Whether a JSON value is a number above 0, with room to compute with."""
    return type(x) in (int, float) and 1e-30 < x < 1e30


def _is_like(value, usual, least):
    """Whether a value of config.json is of the kind of this usual one; integers are from `least` to MOST."""
    if type(usual) is float:
        return _is_number(value)
    if type(usual) is int:
        return type(value) is int and least <= value <= MOST
    return type(value) is type(usual) and (not isinstance(usual, list) or all(isinstance(x, str) for x in value))


def _check_kinds(c, usual, path):
    """Raises UserError for a key of config.json that has a value of another kind than usual."""
    for key, example in (usual | _OPTIONAL).items():
        value, example = c.get(key), 1 if example is None else example
        least = 0 if key == "max_window_layers" or key.endswith("_id") else 1
        each = value if key == "eos_token_id" and isinstance(value, list) and value else [value]
        if not all(_is_like(x, example, least) for x in each) and not (value is None and key in _NULLABLE):
            raise UserError(f"{path}: {key} cannot be {json.dumps(value)[:60]}; its usual value is "
                            f"{json.dumps(example)}")


def rope_scaling_from_hf(rope, context):
    """Hugging Face's rope_scaling or rope_parameters, as a dict -> {"rope_type", …} with all numbers of this type, also
    those that have a default; None for no scaling. context: the default of the original one. Raises KeyError."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    given = {name: value for name, value in rope.items() if value is not None}
    given = dict(original_max_position_embeddings=context, beta_fast=32, beta_slow=1, truncate=True) | given
    if kind == "yarn" and "attention_factor" not in given:
        mscale = lambda times: 0.1 * times * math.log(given["factor"]) + 1 if given["factor"] > 1 else 1.0
        one, all_dims = given.get("mscale"), given.get("mscale_all_dim")
        given["attention_factor"] = mscale(one) / mscale(all_dims) if one and all_dims else mscale(1)
    return {"rope_type": kind} | {name: given[name] for name in _ROPE_KEYS[kind]}


def _sliding_layers(c):
    """The layers with a sliding window, by the rules of transformers' config classes."""
    layers, kind, types = range(c["num_hidden_layers"]), c["model_type"], c.get("layer_types")
    if kind in ("llama", "mistral"):
        return tuple(layers) if kind == "mistral" else ()
    if types:
        return tuple(i for i, each in enumerate(types) if each == "sliding_attention")
    if kind == "gemma3_text":
        return tuple(i for i in layers if (i + 1) % (c.get("sliding_window_pattern") or 6))
    return tuple(i for i in layers if c.get("use_sliding_window") and i >= c["max_window_layers"])


def _ropes(c, path):
    """The rotary settings of config.json, and those of Gemma's local layers: two dicts."""
    if c["model_type"] != "gemma3_text":
        return c.get("rope_scaling") or c.get("rope_parameters") or {}, {}            # before transformers 5, or since
    by_type = c.get("rope_parameters") or {}                                          # one for each type of layer
    full, local = by_type.get("full_attention") or {}, by_type.get("sliding_attention") or {}
    if not isinstance(local, dict) or not isinstance(full, dict):
        raise UserError(f"{path}: rope_parameters needs an object for each type of layer")
    return full | (c.get("rope_scaling") or {}), local


def _check_implemented(c, activation, rope, local, path):
    """Raises UserError for what this file does not implement. activation: ours, None where there is none   rope, local:
    of _ropes"""
    kind = c["model_type"]
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    types = set(c.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    layers, heads, kv_heads = ((c["n_layer"], c["n_head"], None) if kind == "gpt2" else
                               (c["num_hidden_layers"], c["num_attention_heads"], c["num_key_value_heads"]))
    width = 2 if kind == "gpt2" else c["head_dim"] or c["hidden_size"] // heads
    numbers = [(name, x) for each in (rope, local) for name, x in each.items() if name in _ROPE_NUMBERS]
    wrong = next((f"{name} {json.dumps(x)[:60]}" for name, x in numbers
                  if not (_is_number(x) or x is None or x == 0 and name.startswith("mscale"))), None)
    refused = {
        f"activation {c[_ACTIVATIONS[kind][0]]!r}": activation is None,
        f"rope type {rope_type!r}": rope_type not in ("default", *_ROPE_KEYS),
        "a rope type for local layers": local.get("rope_type", "default") != "default",
        "rope_parameters by layer type": any(isinstance(value, dict) for value in rope.values()),
        "partial_rotary_factor": (rope.get("partial_rotary_factor") or c.get("partial_rotary_factor") or 1) != 1,
        f"{wrong} in rope_scaling": wrong,
        f"{heads} heads of {width} entries": width % 2 or not 0 < heads * width <= MOST,
        f"{layers} layers": layers > MOST_LAYERS,
        "a context of 1 token": 1 in (c.get("n_positions"), c.get("max_position_embeddings"), c.get("sliding_window")),
        f"layer_types {sorted(types)[:3]}": types,
        f"{kv_heads} key/value heads for {heads} heads": kv_heads and heads % kv_heads,
        "query_pre_attn_scalar, where it is not head_dim,": (kind == "gemma3_text"
                                                             and c["query_pre_attn_scalar"] != c["head_dim"]),
        "scale_attn_weights = false": not c.get("scale_attn_weights", True),
    } | {name: c.get(name) for name in ("scale_attn_by_inverse_layer_idx", "attn_logit_softcapping",
                                        "final_logit_softcapping", "use_bidirectional_attention")}
    for what, found in refused.items():
        if found:
            raise UserError(f"{path}: {what} is not implemented")


def config_from_hf(c, path="config.json"):
    """Hugging Face's config.json, as a dict -> Config. A key that is not there has the default that transformers gives
    it. Raises UserError for what this file does not implement."""
    kind = c.get("model_type")
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        raise UserError(f"{path}: model_type {kind!r} (only {', '.join(_DEFAULTS)}) is not implemented")
    c, gemma = _DEFAULTS[kind] | c, kind == "gemma3_text"
    _check_kinds(c, _DEFAULTS[kind], path)
    (rope, local), (key, ours) = _ropes(c, path), _ACTIVATIONS[kind]
    activation, eos = ours.get(c[key]), c["eos_token_id"]
    _check_implemented(c, activation, rope, local, path)
    ids = dict(bos_id=c["bos_token_id"], eos_id=eos[0] if isinstance(eos, list) else eos, tied=c["tie_word_embeddings"])
    if kind == "gpt2":
        return Config(c["vocab_size"], c["n_positions"], c["n_layer"], c["n_head"], c["n_embd"], d_ff=c["n_inner"],
                      norm_eps=c["layer_norm_epsilon"], activation=activation, **ids)
    context, sliding, window = c["max_position_embeddings"], _sliding_layers(c), c.get("sliding_window")
    if original := c.get("original_max_position_embeddings"):                         # outside, it goes first
        rope = rope | dict(original_max_position_embeddings=original)
    try:
        scaling = rope_scaling_from_hf(rope, context)
    except KeyError as e:
        raise UserError(f"{path} lacks {e}") from None
    if sliding and window:                 # up to its length a window masks nothing, so no mask of its own is needed
        context = min(context, window)
    bias = bool(c.get("attention_bias")) and kind in ("llama", "qwen3", "gemma3_text")
    mlp_bias = bool(c.get("mlp_bias")) and kind == "llama"
    return Config(c["vocab_size"], context, c["num_hidden_layers"], c["num_attention_heads"], c["hidden_size"],
                  n_kv_head=c["num_key_value_heads"], head_dim=c["head_dim"], d_ff=c["intermediate_size"],
                  norm="rmsnorm1" if gemma else "rmsnorm", norm_eps=c["rms_norm_eps"], positions="rotary",
                  rope_theta=float(rope.get("rope_theta") or c["rope_theta"]), rope_scaling=scaling,
                  activation=activation, qkv_bias=bias or kind == "qwen2", out_bias=bias,
                  mlp_bias=None if mlp_bias == bias else mlp_bias, qk_norm=gemma or kind == "qwen3", post_norms=gemma,
                  scaled_embedding=gemma, local_layers=sliding if gemma else (),
                  local_theta=float(local.get("rope_theta") or c.get("rope_local_base_freq") or 10000.0), **ids)


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
        kind, name = (("gemma3_text", "Gemma3") if config.post_norms else ("qwen3", "Qwen3") if config.qk_norm else
                      ("qwen2", "Qwen2") if config.qkv_bias and not config.out_bias else ("llama", "Llama"))
        out = dict(architectures=[name + "ForCausalLM"], model_type=kind, max_position_embeddings=config.context_length,
                   hidden_size=config.d_model, num_hidden_layers=config.n_layer, num_attention_heads=config.n_head,
                   num_key_value_heads=config.n_kv_head, head_dim=config.head_dim, intermediate_size=config.d_ff,
                   rms_norm_eps=config.norm_eps, hidden_act="silu", attention_bias=config.out_bias,
                   mlp_bias=config.out_bias if config.mlp_bias is None else config.mlp_bias,
                   rope_theta=config.rope_theta, rope_scaling=config.rope_scaling, **common)
        if config.post_norms:
            out |= dict(hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=config.head_dim,
                        rope_local_base_freq=config.local_theta, sliding_window=config.context_length,
                        layer_types=["sliding_attention" if i in config.local_layers else "full_attention"
                                     for i in range(config.n_layer)])
    if config_from_hf(out) != config:
        raise ValueError(f"no Hugging Face architecture is {config}")
    return out
