"""bench_families.py - every family that model.py reads, beside transformers: logits, greedy tokens, and the way back.

    python bench/bench_families.py                                 # the table of docs/models.md
    python bench/bench_families.py --write tests/families.json     # and transformers' logits, for tests without it

Tiny directories of random weights, stored in three dtypes, are read and computed in fp32 by both. Differences are the
largest one of the logits, divided by the largest logit. `written back`: the same for what save_pretrained writes, as
transformers reads it.
The peer: pip install transformers==5.23.0
"""
import json
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.turns import peer_model
from fronts.tables import shown, table
from model import Transformer, config_from_hf, generate
from runs.files import bar, write_json
from runs.flags import flag, run_main

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NEW = 8                                                       # greedy tokens
GPT2 = dict(model_type="gpt2", vocab_size=61, n_positions=48, n_embd=32, n_layer=2, n_head=4)
LLAMA = dict(model_type="llama", vocab_size=61, max_position_embeddings=48, hidden_size=32, intermediate_size=48,
             num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
GEMMA = LLAMA | dict(model_type="gemma3_text", num_hidden_layers=3, sliding_window_pattern=2, sliding_window=32,
                     head_dim=16, query_pre_attn_scalar=16)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=12)
ANOTHER_HEAD = "Llama, tied, with another head stored"
KINDS = ["gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma3_text"]
CASES = {   # name: config.json, in the spelling of transformers before 5 and since
    "GPT-2": GPT2,
    "GPT-2, exact GELU, untied": GPT2 | dict(activation_function="gelu", n_inner=48, tie_word_embeddings=False),
    "Llama": LLAMA,
    "Llama, attention_bias, mlp_bias": LLAMA | dict(attention_bias=True, mlp_bias=True, rms_norm_eps=0.1),
    "Llama, tied": LLAMA | dict(tie_word_embeddings=True, rope_theta=500.0, head_dim=12),
    ANOTHER_HEAD: LLAMA | dict(tie_word_embeddings=True),
    "Llama, rope linear": LLAMA | dict(rope_scaling=dict(type="linear", factor=4.0)),
    "Llama, rope dynamic": LLAMA | dict(rope_scaling=dict(type="dynamic", factor=4.0)),
    "Llama, rope llama3": LLAMA | dict(rope_parameters=LLAMA3 | dict(rope_theta=500.0)),
    "Llama, rope yarn": LLAMA | dict(rope_scaling=YARN, rope_theta=100.0, head_dim=24),
    "Llama, rope yarn, mscale": LLAMA | dict(head_dim=24, rope_parameters=YARN | dict(
        mscale=2.0, mscale_all_dim=0.5, beta_fast=0.8, beta_slow=0.05, truncate=False, rope_theta=100.0)),
    "Mistral": LLAMA | dict(model_type="mistral"),
    "Mistral, a window of 16": LLAMA | dict(model_type="mistral", sliding_window=16),
    "Qwen2": LLAMA | dict(model_type="qwen2", max_window_layers=2, use_sliding_window=True, sliding_window=8),
    "Qwen2, rope yarn": LLAMA | dict(model_type="qwen2", rope_scaling=YARN | dict(type="yarn")),
    "Qwen3": LLAMA | dict(model_type="qwen3", head_dim=16),
    "Qwen3, attention_bias": LLAMA | dict(model_type="qwen3", attention_bias=True, layer_types=["full_attention"] * 2),
    "Gemma 3": GEMMA,
    "Gemma 3, rope linear": GEMMA | dict(
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters=dict(full_attention=dict(rope_type="linear", factor=4.0, rope_theta=900.0),
                             sliding_attention=dict(rope_type="default", rope_theta=50.0))),
}


@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    write: str | None = flag(None, "a file for some of transformers' logits, and its configs' defaults")


def write_directory(path, name, dtype=torch.float32):
    """Writes a directory of random weights for a case, norms and biases too, with the case's own config.json."""
    config = config_from_hf(CASES[name])
    model = Transformer(replace(config, tied=config.tied and name != ANOTHER_HEAD))
    generator = torch.Generator().manual_seed(0)
    for key, p in model.named_parameters():
        centre = 1.0 if "norm" in key and key.endswith("weight") and config.norm != "rmsnorm1" else 0.0
        torch.nn.init.normal_(p, centre, 0.2, generator=generator)
    model.to(dtype).save_pretrained(path)
    (Path(path) / "config.json").write_text(json.dumps(CASES[name]))


def transformers_model(path):
    """transformers' model of a directory, in fp32 on the CPU."""
    return peer_model(path, torch.float32, torch.device("cpu"))


def tokens_of(config):
    """(2, T) tokens, as many as leave room for NEW more, at most 32."""
    T = min(32, config.context_length - NEW)
    return torch.randint(config.vocab_size, (2, T), generator=torch.Generator().manual_seed(5))


def difference(a, b):
    """The largest difference, over the largest entry of b."""
    return ((a - b).abs().max() / b.abs().max()).item()


def some_logits(logits):
    """What is stored of logits (2, T, V): their mean size, and eight of them."""
    return [logits.abs().mean().item(), *logits[0, -1, :4].tolist(), *logits[1, logits.shape[1] // 2, :4].tolist()]


@torch.no_grad()
def compare(name, dtype):
    """(difference of logits, whether the greedy tokens are equal, difference of what we write back, some_logits)."""
    with tempfile.TemporaryDirectory() as path:
        write_directory(path, name, dtype)
        ours, theirs = Transformer.from_pretrained(path, torch.float32), transformers_model(path)
        tokens = tokens_of(ours.config)
        logits = theirs(tokens).logits
        greedy = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW, do_sample=False,
                                 eos_token_id=-1, pad_token_id=0)
        equal = generate(ours, tokens.tolist(), NEW, temperature=0, eos_id=-1) == greedy[:, tokens.shape[1]:].tolist()
        ours.save_pretrained(path)
        again = transformers_model(path)(tokens).logits
        return difference(ours(tokens), logits), equal, difference(again, logits), some_logits(logits)


def full_config(kind):
    """Our Config of a config.json in which transformers has written all its defaults."""
    import transformers
    return config_from_hf(transformers.AutoConfig.for_model(kind).to_dict())


def main(flags):
    """Prints the table, and writes the file."""
    results = {name: [compare(name, dtype) for dtype in DTYPES.values()] for name in bar(CASES, "families")}
    columns = {"family": list(CASES)}
    for i, dtype in enumerate(DTYPES):
        columns[f"stored {dtype}"] = shown([rows[i][0] for rows in results.values()], ".1e")
    columns["greedy"] = ["equal" if all(row[1] for row in rows) else "differ" for rows in results.values()]
    columns["written back"] = shown([max(row[2] for row in rows) for rows in results.values()], ".1e")
    print(table(columns))
    if flags.write:
        logits = {name: [round(x, 6) for x in rows[0][3]] for name, rows in results.items()}
        defaults = {kind: asdict(full_config(kind)) for kind in KINDS}
        write_json(Path(flags.write), {"logits": logits, "defaults": defaults})


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
