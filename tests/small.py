"""small.py - what tests share about small models: the shapes of each family, tokens for them, random adapters. (The
models themselves are conftest's fixture `tiny`.)"""
import torch

from svd_lora import inject_svd_lora, svd_lora_layers

SHAPES = {"gpt2": dict(),
          "llama": dict(n_kv_head=2, d_ff=48, norm="rmsnorm", positions="rotary", activation="swiglu", qkv_bias=False,
                        out_bias=False, tied=False)}
SHAPES["qwen3"] = SHAPES["llama"] | dict(qk_norm=True)
SHAPES["gemma3"] = SHAPES["qwen3"] | dict(norm="rmsnorm1", activation="geglu", tied=True, post_norms=True,
                                          scaled_embedding=True, local_layers=(1,), local_theta=100.0)
TOKENS = torch.randint(0, 61, (4, 9), generator=torch.Generator().manual_seed(5))          # of the vocabulary of `tiny`


def adapted(model, k=4, m=2, seed=1, sigma=0.5, s=1.0, **more):
    """The model with a trained-looking adapter: U, V as injected, σ and s random, of these standard deviations."""
    generator = torch.Generator().manual_seed(seed)
    inject_svd_lora(model, k, m, generator=generator, **more)
    with torch.no_grad():
        for layer in svd_lora_layers(model).values():
            layer.sigma.normal_(0, sigma, generator=generator)
            layer.s.normal_(0, s, generator=generator)
    return model
