"""test_model.py - the Transformer against transformers' stored values, its files, its refusals, its invariants."""
import json
import math
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from bench import bench_families
from bench.bench_families import ANOTHER_HEAD, CASES, DTYPES, KINDS, some_logits, tokens_of, write_directory
from data.tokenizers import TokenRow
from data.trees import batch_logprobs, pack
from model import SIZES, Config, Transformer, config_from_hf, config_to_hf, generate
from ops import fused
from ops.fused import rope_
from ops.generation import KVCache
from runs.files import UserError
from svd_lora import inject_svd_lora, set_preference, svd_lora_layers

SHARED = Path(__file__).parents[2] / "shared"
HF = SHARED / "oracles" / "data" / "hf"
STORIES = SHARED / "material" / "stories260K"
GOLDEN = ["gpt2", "gpt2_hub", "llama_bf16", "llama_gqa", "llama_gqa_tied", "llama_headdim", "llama_llama3rope",
          "llama_llama3rope_legacy", "llama_mha", "llama_sharded", "llama_theta500k", "llama_theta500k_legacy"]
needs_oracles = pytest.mark.skipif(not HF.exists(), reason="shared/oracles/data/hf is not beside the repository")
needs_material = pytest.mark.skipif(not STORIES.exists(), reason="shared/material is not beside the repository")
BIASES = "Llama, attention_bias, mlp_bias"
STORED = json.loads((Path(__file__).parent / "families.json").read_text())            # bench/bench_families.py --write
families = pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma3"])


def golden(name):
    """The fp32 model of a golden directory and what transformers computed with it."""
    expected = {k: torch.from_numpy(v) for k, v in np.load(HF / name / "expected.npz").items()}
    return Transformer.from_pretrained(HF / name, dtype=torch.float32), expected


def tokens_for(model, *shape, seed=5):
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------------------------------------------------------------
# Against transformers.

@needs_oracles
def test_every_golden_directory_is_listed():
    assert GOLDEN == sorted(d.name for d in HF.iterdir())


@needs_oracles
@pytest.mark.parametrize("name", GOLDEN)
@torch.no_grad()
def test_golden_forward(name, close):
    model, expected = golden(name)
    ids, logits = expected["ids"], model(expected["ids"])
    assert close(logits, expected["logits"], 1e-5)
    assert close(model(ids, return_hidden=True), expected["hidden"], 1e-5)
    assert close(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), expected["loss"], 1e-5)


@needs_oracles
@pytest.mark.parametrize("name", GOLDEN)
@torch.no_grad()
def test_golden_left_padding(name, close):
    model, expected = golden(name)
    ids, real = expected["padded_ids"], expected["padded_mask"].bool()                # (B, T), padding on the left
    T = ids.shape[1]
    mask = (torch.ones(T, T).tril().bool() & real[:, None]) | torch.eye(T).bool()     # padding sees itself
    positions = (real.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, positions, mask[:, None])
    assert close(logits[real], expected["padded_logits"][real], 1e-5)
    assert not close(model(ids)[real], expected["padded_logits"][real], 0.01)         # wrong: padding seen and counted


@needs_oracles
@torch.no_grad()
def test_stored_dtype_is_kept_unless_another_is_wanted(close):
    stored, wanted = Transformer.from_pretrained(HF / "llama_bf16"), golden("llama_bf16")[0]
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in wanted.parameters()} == {torch.float32}
    assert all(torch.equal(a.float(), b) for a, b in zip(stored.parameters(), wanted.parameters()))
    ids = golden("llama_bf16")[1]["ids"]
    assert close(stored(ids).float(), wanted(ids), 0.03)                              # bf16 keeps 8 bits, 0.4 %


@needs_material
@torch.no_grad()
def test_a_real_model():
    """stories260K: 1.297 nats/token is what llama2.c states; 5.2 with interleaved rotary pairs."""
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(str(STORIES / "tokenizer.json"))
    model = Transformer.from_pretrained(STORIES)
    assert sum(p.numel() for p in model.parameters()) == 260_032
    stories = re.split(r"(?<!\n)\n(?!\n)", (SHARED / "material/text/tinystories_sample.txt").read_text()[:40_000])[:-1]
    loss = tokens = 0
    for story in stories:
        ids = torch.tensor([[1] + tokenizer.encode(story, add_special_tokens=False).ids])[:, :512]
        loss += F.cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="sum").item()
        tokens += ids.numel() - 1
    assert tokens > 10_000 and loss / tokens == pytest.approx(1.297, abs=0.05)
    [story] = generate(model, [[1]], 80, temperature=0)
    assert tokenizer.decode(story).strip().startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw "
        "a big, red ball. She wanted to play with it, but it was too high.")


@needs_oracles
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "llama_gqa_tied", "llama_bf16"])
def test_files_are_the_same_after_reading_and_writing(name, tmp_path):
    Transformer.from_pretrained(HF / name).save_pretrained(tmp_path)
    ours, theirs = load_file(tmp_path / "model.safetensors"), load_file(HF / name / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(ours[k].dtype == theirs[k].dtype and torch.equal(ours[k], theirs[k]) for k in ours)


# ---------------------------------------------------------------------------------------------------------------------
# Every family: the random directories of bench/bench_families.py, whose logits transformers 5.23 computed.

@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_stored_logits_of_every_family(name, tmp_path, close):
    write_directory(tmp_path, name)
    model = Transformer.from_pretrained(tmp_path)
    assert close(some_logits(model(tokens_of(model.config))), STORED["logits"][name], 1e-5)


@pytest.mark.parametrize("name, wrong", [
    ("GPT-2, exact GELU, untied", dict(activation="gelu_tanh")), (ANOTHER_HEAD, dict(tied=True)),
    (BIASES, dict(qkv_bias=False)), (BIASES, dict(out_bias=False, mlp_bias=True)), (BIASES, dict(mlp_bias=False)),
    (BIASES, dict(norm_eps=1e-6)), ("Llama, tied", dict(rope_theta=10000.0)),
    ("Llama, rope linear", dict(rope_scaling=None)), ("Llama, rope llama3", dict(rope_scaling=None)),
    ("Llama, rope yarn", dict(rope_scaling=dict(attention_factor=1.0))),
    ("Llama, rope yarn", dict(rope_scaling=dict(rope_type="linear"))),
    ("Llama, rope yarn, mscale", dict(rope_scaling=dict(attention_factor=0.1 * math.log(4) + 1))),
    ("Llama, rope yarn, mscale", dict(rope_scaling=dict(truncate=True))),
    ("Llama, rope yarn, mscale", dict(rope_scaling=dict(beta_fast=32.0))), ("Qwen2", dict(qkv_bias=False)),
    ("Qwen3", dict(qk_norm=False)), ("Qwen3, attention_bias", dict(out_bias=False)), ("Gemma 3", dict(norm="rmsnorm")),
    ("Gemma 3", dict(post_norms=False)), ("Gemma 3", dict(scaled_embedding=False)), ("Gemma 3", dict(qk_norm=False)),
    ("Gemma 3", dict(activation="swiglu")), ("Gemma 3", dict(local_layers=())),
    ("Gemma 3, rope linear", dict(rope_scaling=None)), ("Gemma 3, rope linear", dict(local_theta=900.0))])
@torch.no_grad()
def test_stored_logits_tell_each_switch(name, wrong, tmp_path, close):
    write_directory(tmp_path, name)
    model = Transformer.from_pretrained(tmp_path)
    config = model.config
    if wrong.get("rope_scaling"):
        wrong = dict(rope_scaling=config.rope_scaling | wrong["rope_scaling"])
    other = Transformer(replace(config, **wrong))
    other.load_state_dict(model.state_dict(), strict=False)
    assert not close(some_logits(other(tokens_of(config))), STORED["logits"][name], 5e-5)


@torch.no_grad()
def test_q_and_k_are_normed_before_they_are_rotated(tmp_path, close, monkeypatch):
    write_directory(tmp_path, "Qwen3")
    model = Transformer.from_pretrained(tmp_path)
    norms = [norm for block in model.blocks for norm in (block.attn.q_norm, block.attn.k_norm)]
    for block in model.blocks:
        block.attn.q_norm = block.attn.k_norm = torch.nn.Identity()
    tokens, rotated = tokens_of(model.config), []

    def first(x, cos, sin):                                   # wrong: rotated, then normed
        rotated.append(norms[len(rotated)](rope_(x, cos, sin).unflatten(-1, (-1, 16))).flatten(2))
        return rotated[-1]

    monkeypatch.setattr(fused, "rope_", first)
    logits = model(tokens)
    assert len(rotated) == len(norms) == 4 and not close(some_logits(logits), STORED["logits"]["Qwen3"], 1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_transformers_agrees_about_every_family(name, dtype):
    """Logits, greedy tokens through the KV cache, and what we write, read by transformers."""
    pytest.importorskip("transformers")
    logits, greedy, back, some = bench_families.compare(name, DTYPES[dtype])
    assert logits < 1e-5 and greedy and back < 1e-5
    assert dtype != "fp32" or some == pytest.approx(STORED["logits"][name], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_config_json_leaves_out_is_transformers_default(kind):
    ours = config_from_hf(dict(model_type=kind))
    assert json.loads(json.dumps(asdict(ours))) == STORED["defaults"][kind]
    if kind != "gpt2":                                        # an empty config.json, but for a key that it has as null
        assert config_from_hf(dict(model_type=kind, eos_token_id=None)) == replace(ours, eos_id=None)
    assert config_from_hf(dict(model_type=kind, sliding_window_pattern=None, rope_local_base_freq=None)) == ours


@pytest.mark.parametrize("kind", KINDS)
def test_stored_defaults_are_those_of_transformers(kind):
    pytest.importorskip("transformers")
    assert json.loads(json.dumps(asdict(bench_families.full_config(kind)))) == STORED["defaults"][kind]


@pytest.mark.parametrize("name", ["Mistral, a window of 16", "Gemma 3"])
@torch.no_grad()
def test_the_context_ends_with_the_window(name, tmp_path, close):
    """Wrong: the window ignored, which is right up to its length alone."""
    pytest.importorskip("transformers")
    write_directory(tmp_path, name)
    ours, theirs = Transformer.from_pretrained(tmp_path), bench_families.transformers_model(tmp_path)
    window = CASES[name]["sliding_window"]
    tokens = tokens_for(ours, 2, 48)
    with pytest.raises(AssertionError, match=f"{window + 1} tokens, context {window}"):
        ours(tokens[:, :window + 1])
    ours.config.context_length = 48
    ours, theirs = ours(tokens), theirs(tokens).logits
    assert close(ours[:, :window], theirs[:, :window], 1e-5) and not close(ours[:, window:], theirs[:, window:], 0.01)


@torch.no_grad()
def test_dynamic_rope_changes_nothing_within_the_context(close):
    """transformers' NTK formula at the original length is the plain one; we end there."""
    config = config_from_hf(CASES["Llama, rope dynamic"])
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0))
    plain = Transformer(replace(config, rope_scaling=None))
    plain.load_state_dict(model.state_dict())
    tokens = tokens_for(model, 2, 48)
    assert close(model(tokens), plain(tokens), 0)
    assert config_to_hf(config)["rope_scaling"] == dict(rope_type="dynamic", factor=4.0)
    with pytest.raises(AssertionError, match="49 tokens, context 48"):
        model(tokens_for(model, 1, 49))


@torch.no_grad()
def test_a_tied_head_that_is_stored(tiny, tmp_path, close):
    """Another matrix counts, an equal one is dropped, and one without an embedding is both: as transformers has it."""
    model = tiny("gemma3")
    embedding, name, head = "model.embed_tokens.weight", "lm_head.weight", torch.randn(61, 32)

    def read(edit):
        model.save_pretrained(tmp_path)
        return Transformer.from_pretrained(edited(tmp_path, edit))

    other = read(lambda tensors: tensors.update({name: head}))
    assert not other.config.tied and torch.equal(other.head_weight, head)
    assert not close(other.head_weight, model.head_weight, 0.1) and torch.equal(other.embed.weight, model.embed.weight)
    same = read(lambda tensors: tensors.update({name: tensors[embedding].clone()}))
    assert same.config == model.config and same_weights(same, model)
    both = read(lambda tensors: tensors.update({name: tensors.pop(embedding)}))
    assert both.config == model.config and same_weights(both, model)
    with pytest.raises(UserError, match="lm_head.weight' has shape"):
        read(lambda tensors: tensors.update({name: head[1:].clone()}))


def test_both_spellings_of_rope_scaling():
    new = dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=50.0))
    old = dict(rope_theta=50.0, rope_scaling=dict(type="linear", factor=2.0))
    assert config_from_hf(LLAMA | new) == config_from_hf(LLAMA | old) != config_from_hf(LLAMA)
    # rope_scaling goes before rope_parameters, and the original context is that of the file, its window aside
    both = LLAMA | dict(model_type="mistral", sliding_window=8, rope_scaling=dict(rope_type="yarn", factor=4.0)) | new
    scaling = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=32, beta_slow=1,
                   truncate=True, attention_factor=0.1 * math.log(4) + 1)
    assert config_from_hf(both).rope_scaling == scaling
    both["rope_scaling"]["original_max_position_embeddings"] = 16
    assert config_from_hf(both).rope_scaling == scaling | dict(original_max_position_embeddings=16)
    outside = both | dict(original_max_position_embeddings=24)                        # and there goes before all
    assert config_from_hf(outside).rope_scaling == scaling | dict(original_max_position_embeddings=24)


@pytest.mark.parametrize("change, context", [
    (dict(max_window_layers=1), 8), (dict(max_window_layers=2), 32), (dict(use_sliding_window=False), 32),
    (dict(layer_types=["full_attention"] * 2, max_window_layers=0), 32),
    (dict(layer_types=["full_attention", "sliding_attention"]), 8)])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_qwen_has_a_window_where_a_layer_has_one(kind, change, context):
    qwen = LLAMA | dict(model_type=kind, use_sliding_window=True, sliding_window=8) | change
    assert config_from_hf(qwen).context_length == context


# ---------------------------------------------------------------------------------------------------------------------
# Files of others.

@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_refused_by_name(bad, dtype, tiny, tmp_path):
    model = tiny("llama", dtype=dtype)
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"):
        model.save_pretrained(tmp_path)
        with pytest.raises(UserError, match=f"tensor '{name}' holds NaN or infinite values"):
            Transformer.from_pretrained(edited(tmp_path, lambda tensors: tensors[name].view(-1)[-1:].fill_(bad)))
    model.save_pretrained(tmp_path)                           # the largest finite values are fine
    edited(tmp_path, lambda tensors: tensors[name].fill_(torch.finfo(dtype).max))
    assert Transformer.from_pretrained(tmp_path).norm.weight.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# Reading and writing.

@families
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_equal(family, tied, dtype, tiny, tmp_path):
    model = Transformer(replace(tiny(family).config, tied=tied, bos_id=3, eos_id=7)).to(dtype)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    model.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    assert again.config == model.config and same_weights(model, again)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert same_weights(Transformer.from_pretrained(tmp_path, dtype=torch.float64), model.double())


@families
def test_shards_that_we_write(family, tiny, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path, shard_bytes=20_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and all(f.stat().st_size < 25_000 for f in files)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert {k: f.name for f in files for k in load_file(f)} == index["weight_map"]
    assert same_weights(model, Transformer.from_pretrained(tmp_path))
    files[1].rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=files[1].name):
        Transformer.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)                           # as one file again: nothing of the shards is left
    assert [f.name for f in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert same_weights(model, Transformer.from_pretrained(tmp_path))


def test_memory_is_taken_once(tiny, tmp_path):
    """From bf16 to fp32, so that every tensor is made anew; built on the CPU first it would be twice that."""
    class Allocations(TorchDispatchMode):
        bytes_at = {}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.device.type != "meta":
                self.bytes_at[out.untyped_storage().data_ptr()] = out.untyped_storage().nbytes()
            return out

    tiny("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    with Allocations() as allocations:
        model = Transformer.from_pretrained(tmp_path, dtype=torch.float32)
    size = sum(p.numel() * 4 for p in model.parameters())
    assert all(p.device.type == "cpu" and p.requires_grad for p in model.parameters())
    assert size <= sum(allocations.bytes_at.values()) <= 1.6 * size                   # 1, and 0.5 for the bf16 tensors


def test_a_tied_head_is_the_embedding(tiny):
    tied, untied = tiny("gpt2"), tiny("llama")
    assert tied.head_weight is tied.embed.weight and "head.weight" not in tied.state_dict()
    assert untied.head_weight is untied.head.weight
    tied(tokens_for(tied, 1, 4)).sum().backward()
    assert tied.embed.weight.grad.abs().min(-1).values.gt(0).all()                    # each row: through the head


def shard(path, index=True):
    """Cuts model.safetensors in two, with an index or without."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({k: tensors[k] for k in keys}, path / file)
    if index:
        text = json.dumps({"weight_map": {k: file for file, keys in parts.items() for k in keys}})
        (path / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize("index", [True, False])
def test_shards_of_others(index, tiny, tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    shard(tmp_path, index)
    assert same_weights(Transformer.from_pretrained(tmp_path), model)
    (tmp_path / ".b.safetensors.17.tmp.safetensors").write_bytes(b"a run was killed while it wrote this")
    assert same_weights(Transformer.from_pretrained(tmp_path), model)
    other = tiny("llama", seed=1)                                                     # written beside the old shards
    other.save_pretrained(tmp_path)
    assert same_weights(Transformer.from_pretrained(tmp_path), other)


def test_a_missing_shard_is_named(tiny, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    shard(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"b\.safetensors does not exist, but model\.safetensors\.index\.json names it"):
        Transformer.from_pretrained(tmp_path)


def edited(path, edit):
    """Applies `edit` to the tensors (a dict) of model.safetensors."""
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")
    return path


@families
def test_a_missing_tensor_is_named(family, tiny, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path)
    for name in load_file(tmp_path / "model.safetensors"):
        model.save_pretrained(tmp_path)
        with pytest.raises(UserError, match=f"1 tensors.*missing.*'{re.escape(name)}'"):
            Transformer.from_pretrained(edited(tmp_path, lambda tensors: tensors.pop(name)))


@pytest.mark.parametrize("family, name", [
    ("gpt2", "transformer.h.2.ln_1.weight"), ("gpt2", "transformer.h.0.attn.c_attn.scale"), ("gpt2", "lm_head.bias"),
    ("gpt2", "blocks.0.attn.q.weight"), ("llama", "model.layers.2.input_layernorm.weight"),
    ("llama", "model.layers.0.x"), ("llama", "model.layers.0.self_attn.q_proj.bias"), ("llama", "model.norm.bias"),
    ("llama", "head.weight"), ("llama", "model.layers.0.self_attn.q_proj.weight_scale"), ("llama", "score.weight")])
def test_an_unexpected_tensor_is_named(family, name, tiny, tmp_path):
    tiny(family).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"unexpected tensor '{re.escape(name)}'"):
        Transformer.from_pretrained(edited(tmp_path, lambda tensors: tensors.update({name: torch.zeros(32)})))


def test_constants_in_files_are_no_weights(tiny, tmp_path):
    """Mask buffers and rotary frequencies that older files carry."""
    for family, names in [("gpt2", ["transformer.h.0.attn.bias", "h.1.attn.masked_bias"]),
                          ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq"])]:
        model = tiny(family)
        model.save_pretrained(tmp_path)
        edited(tmp_path, lambda tensors: tensors.update({name: torch.zeros(3) for name in names}))
        assert same_weights(Transformer.from_pretrained(tmp_path), model)


@families
def test_a_wrong_shape_is_named(family, tiny, tmp_path):
    """Too long by one, and transposed where that is a difference."""
    model = tiny(family)
    model.save_pretrained(tmp_path)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        wrong = [torch.cat([tensor, tensor[:1]]), tensor[:1], tensor[None]]
        wrong += [tensor.T.contiguous()] if tensor.ndim == 2 and tensor.shape[0] != tensor.shape[1] else []
        for x in wrong:
            model.save_pretrained(tmp_path)
            with pytest.raises(UserError) as error:
                Transformer.from_pretrained(edited(tmp_path, lambda tensors: tensors.update({name: x})))
            message = f"tensor {name!r} has shape {tuple(x.shape)}, config.json asks {tuple(tensor.shape)}"
            assert message in str(error.value)


@pytest.mark.parametrize("change, message", [
    (dict(model_type="mamba"), "model_type 'mamba'"), (dict(model_type=None), "model_type None"),
    (dict(rope_scaling={"type": "linear"}), "lacks 'factor'"),
    (dict(rope_scaling={"type": "yarn", "factor": None}), "lacks 'factor'"),
    (dict(rope_parameters={"rope_type": "longrope", "factor": 2.0}), "rope type 'longrope'"),
    (dict(rope_parameters={"full_attention": {"rope_type": "linear", "factor": 2.0}}), "rope_parameters by layer type"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor"), (dict(num_key_value_heads=3), "3 key/value heads"),
    (dict(model_type="mistral", sliding_window=[4, 8]), r"sliding_window cannot be \[4, 8\]"),
    (dict(model_type="qwen3", layer_types=["chunked_attention"]), r"layer_types \['chunked_attention'\]"),
    (dict(model_type="gemma3_text", head_dim=16), "query_pre_attn_scalar"),
    (dict(model_type="gemma3_text", head_dim=256, final_logit_softcapping=30.0), "final_logit_softcapping"),
    (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "lacks 'low_freq_factor'"),
    (dict(hidden_act="gelu"), "activation 'gelu'"), (dict(model_type="gpt2", activation_function="relu"), "'relu'"),
    (dict(model_type="gpt2", scale_attn_weights=False), "scale_attn_weights"),
    (dict(model_type="gpt2", scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx")])
def test_other_architectures_are_refused(change, message, tiny, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({k: v for k, v in (json.loads(file.read_text()) | change).items() if v is not ...}))
    with pytest.raises(UserError, match=message) as error:
        Transformer.from_pretrained(tmp_path)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("change, message", [
    (dict(vocab_size="61"), "vocab_size cannot be \"61\"; its usual value is 32000"),
    (dict(hidden_size=32.0), "hidden_size cannot be 32.0"), (dict(hidden_size=True), "hidden_size cannot be true"),
    (dict(num_attention_heads=0), "num_attention_heads cannot be 0"), (dict(num_hidden_layers=10 ** 6), "layers"),
    (dict(intermediate_size=2 ** 40), "intermediate_size cannot be"), (dict(model_type=["llama"]), "model_type"),
    (dict(rms_norm_eps=math.nan), "rms_norm_eps cannot be NaN"), (dict(rope_theta=0), "rope_theta cannot be 0"),
    (dict(eos_token_id=[]), "eos_token_id cannot be"), (dict(tie_word_embeddings=None), "tie_word_embeddings"),
    (dict(rope_local_base_freq={}), "rope_local_base_freq cannot be {}"),
    (dict(hidden_act=["silu"]), "hidden_act cannot be"), (dict(rope_scaling=[8.0]), "rope_scaling cannot be"),
    (dict(rope_scaling={"type": "linear", "factor": "2"}), "factor \"2\" in rope_scaling"),
    (dict(model_type="gemma3_text", head_dim=256, rope_parameters=dict(sliding_attention=3)), "each type of layer"),
    (dict(head_dim=7), "4 heads of 7 entries"), (dict(layer_types=[{}]), "layer_types cannot be"),
    (dict(max_position_embeddings=1), "a context of 1 token")])
def test_values_of_another_kind_are_refused(change, message, tiny, tmp_path):
    """Wrong: a traceback of torch, a model of a million layers, a frequency of 0."""
    test_other_architectures_are_refused(change, message, tiny, tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": ["a"]}, {"weight_map": {"x": 3}}])
def test_an_index_of_another_kind_is_refused(index, tiny, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match='index.json has no "weight_map" from tensors to files'):
        Transformer.from_pretrained(tmp_path)


def test_broken_directories(tiny, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "whole")

    def attempt(name, change):
        path = shutil.copytree(tmp_path / "whole", tmp_path / name)
        change(path)
        with pytest.raises(UserError) as error:
            Transformer.from_pretrained(path)
        return str(error.value)

    assert "config.json does not exist" in attempt("no config", lambda path: (path / "config.json").unlink())
    assert "is not JSON" in attempt("bad config", lambda path: (path / "config.json").write_text("{"))
    assert "no *.safetensors" in attempt("no weights", lambda path: (path / "model.safetensors").unlink())
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    for n in (0, 7, 1000, len(whole) - 1):                                            # a download that broke off
        message = attempt(f"cut {n}", lambda path: (path / "model.safetensors").write_bytes(whole[:n]))
        assert "model.safetensors is damaged" in message
    with pytest.raises(UserError, match="nowhere.config.json does not exist"):
        Transformer.from_pretrained(tmp_path / "nowhere")


def test_what_has_no_hugging_face_form_is_not_written(tiny, tmp_path):
    base = tiny("gpt2").config
    for change in (dict(norm="rmsnorm"), dict(positions="rotary"), dict(n_kv_head=2), dict(head_dim=16),
                   dict(qkv_bias=False), dict(activation="swiglu"), dict(rope_scaling={"factor": 8.0})):
        with pytest.raises((ValueError, UserError)):
            Transformer(replace(base, **change)).save_pretrained(tmp_path / "none")
    adapted = tiny("gpt2")
    adapted.blocks[1].attn.q.U = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="blocks.1.attn.q.U.*merge"):
        adapted.save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none" / "config.json").exists() and not list(tmp_path.rglob("*.safetensors"))


# ---------------------------------------------------------------------------------------------------------------------
# Configs.

LLAMA = dict(model_type="llama", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, rms_norm_eps=1e-6,
             bos_token_id=1, eos_token_id=2)


def test_config_of_a_llama():
    assert config_from_hf(LLAMA) == Config(
        61, 32, 2, 4, 32, n_kv_head=2, head_dim=8, d_ff=48, norm="rmsnorm", norm_eps=1e-6, positions="rotary",
        rope_theta=10000.0, rope_scaling=None, activation="swiglu", qkv_bias=False, out_bias=False, tied=False,
        bos_id=1, eos_id=2)
    without = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    assert config_from_hf(without).n_kv_head == 4
    assert config_from_hf(LLAMA | dict(eos_token_id=[5, 6])).eos_id == 5
    assert config_from_hf(LLAMA | dict(rope_theta=5e5)).rope_theta == 5e5
    assert config_from_hf(LLAMA | dict(rope_theta=1.0, rope_parameters=dict(rope_theta=5e5))).rope_theta == 5e5


def test_config_of_a_gpt2():
    published = dict(model_type="gpt2", vocab_size=50257, n_ctx=1024, n_positions=1024, n_embd=768, n_layer=12,
                     n_head=12, layer_norm_epsilon=1e-5, activation_function="gelu_new", bos_token_id=50256,
                     eos_token_id=50256)
    assert config_from_hf(published) == replace(SIZES["125m"], bos_id=50256, eos_id=50256)
    assert config_from_hf(published | dict(n_inner=100, activation_function="gelu")).d_ff == 100
    assert config_from_hf(published | dict(activation_function="gelu")).activation == "gelu"


@pytest.mark.parametrize("window, context", [(16, 16), (32, 32), (4096, 32), (None, 32)])
def test_a_sliding_window_shortens_the_context(window, context):
    """Within its window such a model is a plain Llama; beyond it, it is not one: the context ends there."""
    assert config_from_hf(LLAMA | dict(model_type="mistral", sliding_window=window)).context_length == context
    qwen2 = LLAMA | dict(model_type="qwen2", sliding_window=window, max_window_layers=0)
    assert config_from_hf(qwen2).context_length == 32                                 # use_sliding_window is off
    assert config_from_hf(qwen2 | dict(use_sliding_window=True)).context_length == context


def test_qwen2_has_biases_on_q_k_v_alone():
    model = Transformer(config_from_hf(LLAMA | dict(model_type="qwen2")))
    biased = {name.removeprefix("blocks.0.") for name, _ in model.named_parameters() if name.endswith("bias")}
    assert {name for name in biased if not name.startswith("blocks")} == {"attn.q.bias", "attn.k.bias", "attn.v.bias"}


LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)


@pytest.mark.parametrize("change", [
    dict(), dict(model_type="mistral", sliding_window=16), dict(model_type="qwen2"), dict(head_dim=24),
    dict(tie_word_embeddings=True), dict(rope_theta=5e5, rope_scaling=LLAMA3), dict(eos_token_id=None),
    dict(rope_parameters=LLAMA3 | dict(rope_theta=5e5)), dict(attention_bias=True), dict(mlp_bias=True),
    dict(model_type="qwen3", attention_bias=True), dict(rope_scaling=dict(type="yarn", factor=2.0))])
def test_configs_survive_the_round_trip(change):
    config = config_from_hf(LLAMA | change)
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config
    assert (config == config_from_hf(LLAMA)) == (not change)                          # and each change was seen


def test_sizes():
    for name, config in SIZES.items():
        assert config_from_hf(config_to_hf(config)) == config
    with torch.device("meta"):
        count = {name: sum(p.numel() for p in Transformer(config).parameters()) for name, config in SIZES.items()}
    assert count.pop("tiny") == pytest.approx(1e6, rel=0.1)
    assert count == {"125m": 124_439_808, "350m": 354_823_168, "1b": 1_100_048_384, "llama2-7b": 6_738_415_616,
                     "llama2-13b": 13_015_864_320, "llama2-70b": 68_976_648_192, "llama3-8b": 8_030_261_248}


def test_initial_weights(tiny):
    config = replace(tiny("gpt2").config, d_model=256, n_layer=8)
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0))
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert (p == (1 if "norm" in name and name.endswith("weight") else 0)).all()
        else:
            std = 0.02 / 4 if name.endswith(("attn.o.weight", "mlp.down.weight")) else 0.02           # sqrt(2 · 8) = 4
            assert abs(p.std() / std - 1) < 5 / math.sqrt(2 * p.numel())                              # 5 sigma
    again = Transformer(config).init_weights(torch.Generator().manual_seed(0))
    assert same_weights(model, again)


# ---------------------------------------------------------------------------------------------------------------------
# The network.

@families
@torch.no_grad()
def test_causality(family, tiny, close):
    model = tiny(family)
    tokens = tokens_for(model, 2, 12)
    logits = model(tokens)
    for t in range(12):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 61
        other = model(changed)
        assert close(other[:, :t], logits[:, :t]) if t else True
        assert (other[:, t:] - logits[:, t:]).abs().amax((0, 2)).min() > 1e-3         # every later token saw it


def test_rotary_layout_is_half_split(close):
    """Entries j and j + C/2 are one complex number, turned by its angle: not entries 2j and 2j + 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 8, generator=generator)                                  # (B, T, H, C)
    angle = torch.rand(1, 5, 4, generator=generator) * 6
    turn = torch.polar(torch.ones_like(angle), angle)[:, :, None]                     # exp(i · angle)
    turned = torch.complex(x[..., :4], x[..., 4:]) * turn
    rotate = lambda x: rope_(x.flatten(2).clone(), angle.cos(), angle.sin()).view(x.shape)
    y = rotate(x)
    assert close(y, torch.cat([turned.real, turned.imag], dim=-1))
    interleaved = torch.view_as_real(torch.complex(x[..., ::2], x[..., 1::2]) * turn)
    assert not close(y, interleaved.flatten(-2), 0.1)
    assert rotate(x.bfloat16()).dtype == torch.bfloat16
    assert close(rotate(x.bfloat16().float()).bfloat16(), rotate(x.bfloat16()), 0)    # bf16 is rounded once, at the end


@torch.no_grad()
def test_rotary_positions_are_relative(tiny, close):
    llama, gpt2 = tiny("llama"), tiny("gpt2")
    tokens, positions = tokens_for(llama, 2, 9), torch.arange(9)
    assert close(llama(tokens, positions + 7), llama(tokens), 1e-5)
    assert not close(llama(tokens, positions * 2), llama(tokens), 0.01)
    assert not close(gpt2(tokens, positions + 7), gpt2(tokens), 0.01)


@torch.no_grad()
def test_grouped_heads_equal_repeated_ones(tiny, close):
    """Query heads 0, 1 share key/value head 0, and 2, 3 share head 1."""
    grouped = tiny("llama")
    config = grouped.config
    weights, tokens = grouped.state_dict(), tokens_for(grouped, 2, 10)

    def repeated(repeat):
        full = Transformer(replace(config, n_kv_head=config.n_head))
        full.load_state_dict({name: repeat(w.view(2, 8, 32)).reshape(32, 32) if "attn.k" in name or "attn.v" in name
                              else w for name, w in weights.items()})
        return full(tokens)

    assert close(grouped(tokens), repeated(lambda w: w.repeat_interleave(2, 0)), 1e-5)
    assert not close(grouped(tokens), repeated(lambda w: w.repeat(2, 1, 1)), 0.01)    # wrong: 0, 2 and 1, 3


@families
@torch.no_grad()
def test_a_tree_of_tokens_equals_separate_rows(family, tiny, close):
    """Two continuations of [5, 6, 7] in one row: each token attends to its ancestors alone."""
    model = tiny(family)
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])                                  # 5 6 7 (8 9 | 10 11)
    parent, positions = [-1, 0, 1, 2, 3, 2, 5], torch.tensor([[0, 1, 2, 3, 4, 3, 4]])
    mask = torch.eye(7, dtype=torch.bool)
    for t, p in enumerate(parent):
        mask[t] |= mask[p] if p >= 0 else False
    tree = model(tokens, positions, mask[None, None])
    left, right = model(tokens[:, [0, 1, 2, 3, 4]]), model(tokens[:, [0, 1, 2, 5, 6]])
    assert close(tree[:, [0, 1, 2, 3, 4]], left, 1e-5) and close(tree[:, [0, 1, 2, 5, 6]], right, 1e-5)
    assert not close(model(tokens)[:, 5:], right[:, 3:], 0.01)                        # wrong: a chain


@families
@torch.no_grad()
def test_the_cache_changes_nothing(family, tiny, close):
    """Tokens given in pieces, one token among them, see what they would see in one call."""
    model = tiny(family)
    tokens = tokens_for(model, 3, 14)
    cache = KVCache(model.config, 3, 14, torch.float32, "cpu")
    pieces = [model(piece, cache=cache) for piece in tokens.split([6, 1, 4, 1, 2], dim=1)]
    assert cache.length == 14 and close(torch.cat(pieces, dim=1), model(tokens), 1e-5)
    with pytest.raises(AssertionError, match="room for 14 tokens, not 15"):
        model(tokens[:, :1], cache=cache)


@families
def test_the_context_ends(family, tiny):
    model = tiny(family)
    model(tokens_for(model, 1, 32))
    with pytest.raises(AssertionError, match="33 tokens, context 32"):
        model(tokens_for(model, 1, 33))


# ---------------------------------------------------------------------------------------------------------------------
# Ways to run the blocks that must not change what they compute: checkpointing, padding, compilation.

LAM = torch.tensor([[1.0, 0.0], [0.3, 0.7], [0.5, 0.5]])
ROWS = [TokenRow([3, 4, 5][:n + 1], [[6, 7, 8, 9], [6, 7, 10], [11, 12]]) for n in range(3)]


def adapted(tiny, family, **more):
    """A tiny model with an adapter that is not fresh."""
    model = inject_svd_lora(tiny(family, **more), 4, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and p.ndim < 2:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.01)
    return model


def step(model, multiple=1, lam=LAM):
    """(log-probs, {name: gradient}) of one step."""
    set_preference(model, lam)
    logps = batch_logprobs(model, pack(ROWS, multiple))
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    # s is one number, a sum whose terms may nearly cancel: in fp32 it is then off by 1e-4 of itself, here and there by
    # other rounding. Its scale is that of σ's, which are sums of such terms without λ
    for name in svd_lora_layers(model):
        gradients[f"{name}.d"] = torch.cat([gradients.pop(f"{name}.{part}").view(-1) for part in ("sigma", "s")])
    model.zero_grad()
    return logps.detach(), gradients


def same(a, b, close, tolerance=1e-5):
    return close(a[0], b[0], tolerance) and all(close(a[1][name], b[1][name], tolerance) for name in b[1])


@families
def test_checkpointing_changes_no_bit_and_keeps_less(family, tiny, close):
    model = adapted(tiny, family)
    kept = {}
    for model.checkpoint_blocks in (False, True):
        sizes = kept.setdefault(model.checkpoint_blocks, [])
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.nbytes), t)[1], lambda t: t):
            result = step(model)
        if not model.checkpoint_blocks:
            expected = result
    assert same(result, expected, close, 0)
    assert not same(step(model, lam=LAM.flip(1)), expected, close, 1e-3)              # the comparison can fail
    assert sum(kept[True]) < sum(kept[False]) / 3


@families
def test_padding_to_a_multiple_changes_nothing(family, tiny, close):
    model = adapted(tiny, family)
    assert pack(ROWS, 8).tokens.shape[1] % 8 == 0 != pack(ROWS).tokens.shape[1] % 8
    assert same(step(model, 8), step(model), close, 2e-5)             # sums over keys in another order


@pytest.mark.slow
@families
def test_compiled_blocks_compute_the_same_for_every_preference(family, tiny, close):
    """Wrong: the first λ kept in the compiled code."""
    model, compiled, expected = adapted(tiny, family), adapted(tiny, family), []
    for block in compiled.blocks:
        block.compile(dynamic=False)                          # as train_dpo.py --compile does
    for lam in (LAM, LAM.flip(1)):
        expected.append(step(model, 8, lam))
        assert same(step(compiled, 8, lam), expected[-1], close, 2e-5)
    assert not same(*expected, close, 1e-3)
