"""test_svd_lora.py - the layer against hand and oracle values, what λ does to a model, and adapter files."""
import json

import pytest
import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import TOKENS, adapted

from families import hf_names
from model import Transformer
from runs.files import UserError
from svd_lora import (
    SVDLoRALinear,
    adapter_state,
    adapters_off,
    export_peft,
    fingerprint,
    inject_svd_lora,
    load_adapter,
    merged,
    merged_state_dict,
    orthogonality_penalty,
    parameter_groups,
    read_adapter_header,
    save_adapter,
    set_preference,
    shared_base,
    soup,
    svd_lora_layers,
)

LAMS = [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.3, 0.7]]
families = pytest.mark.parametrize("family", ["gpt2", "llama"])


def at(model, lam, tokens=TOKENS):
    set_preference(model, lam)
    return model(tokens)


def layer_of(U, V, sigma, s, gain, W, b):
    """One SVDLoRALinear with the given values, m = r - k."""
    linear = nn.Linear(len(V), len(U)).to(W.dtype)
    linear.weight.data, linear.bias.data = W.clone(), b.clone()
    layer = SVDLoRALinear(linear, len(sigma), U.shape[1] - len(sigma), gain).to(W.dtype)
    layer.U.data, layer.V.data = U.clone(), V.clone()
    layer.sigma.data, layer.s.data = sigma.clone(), torch.as_tensor(s).to(W)
    return layer


# ---- the layer ----

def test_forward_by_hand():
    layer = layer_of(U=torch.tensor([[1.0, 2, 3]]), V=torch.tensor([[1.0, 0, 1], [0, 1, 1]]), sigma=torch.tensor([0.5]),
                     s=2.0, gain=10.0, W=torch.tensor([[1.0, 2]]), b=torch.tensor([3.0]))
    layer.lam = torch.tensor([0.25, 0.75])
    # x W + b = 1 + 4 + 3;  x V = (1, 2, 3);  d = (0.5, 2·0.25, 2·0.75);  (x V · d) Uᵀ = 0.5 + 2 + 13.5
    assert layer(torch.tensor([[1.0, 2]])).item() == 8 + 10 * 16
    assert torch.equal(layer.delta(layer.lam), 10 * torch.tensor([[0.5 + 4.5, 1 + 4.5]]))


@pytest.mark.parametrize("tag, k", [("k6_m2", 6), ("k8_m3", 8)])
def test_forward_and_gradients_equal_peft(oracle, close, tag, k):
    o = {key.removeprefix(tag + "_"): v for key, v in oracle("adalora").items() if key.startswith(tag)}
    layer = layer_of(o["B"], o["A"].T, o["sigma"], o["s"], o["scale"].item(), o["W"], o["b"])
    layer.lam, x = o["lam"], o["x"].requires_grad_(True)
    y = layer(x)
    assert close(y, o["y"], 1e-12) and close(layer.delta(o["lam"]), o["delta_W"], 1e-12)
    (y * o["up"]).sum().backward()
    expected = {"U": o["grad_B"], "V": o["grad_A"].T, "sigma": o["grad_e"][:k], "s": o["grad_e"][k:] @ o["lam"]}
    assert close(x.grad, o["grad_x"], 1e-12)
    for name, gradient in expected.items():
        assert close(getattr(layer, name).grad, gradient, 1e-12), name
    assert layer.weight.grad is None and layer.bias.grad is None
    layer.lam = o["lam"].flip(0)                                         # wrong: the preferences in another order
    assert not close(layer(x), o["y"], 0.01)


def test_gain_divides_by_the_learned_rank(tiny):
    layers = svd_lora_layers(inject_svd_lora(tiny(), k=8, m=2, lora_scaling=512)).values()
    assert {layer.gain for layer in layers} == {64.0}                    # not 512 / (8 + 2) = 51.2


def test_initialisation(tiny):
    model = inject_svd_lora(tiny(), generator=torch.Generator().manual_seed(3))
    again = inject_svd_lora(tiny(), generator=torch.Generator().manual_seed(3))
    other = inject_svd_lora(tiny(), generator=torch.Generator().manual_seed(4))
    UV = lambda model: torch.cat([p.flatten() for n, p in adapter_state(model).items() if n.endswith((".U", ".V"))])
    rest = [p for n, p in adapter_state(model).items() if n.endswith((".sigma", ".s"))]
    assert abs(UV(model).std() - 0.02) < 5 * 0.02 / (2 * UV(model).numel()) ** 0.5 and abs(UV(model).mean()) < 0.001
    assert all((p == 0).all() for p in rest)
    assert torch.equal(UV(model), UV(again)) and not torch.equal(UV(model), UV(other))


# ---- the orthogonality penalty ----

def test_penalty_by_hand():
    U, V = torch.tensor([[1.0, 1], [0, 1], [0, 1]]), 2 * torch.eye(2)
    net = nn.Sequential(layer_of(U, V, torch.zeros(2), 0.0, 1.0, torch.zeros(3, 2), torch.zeros(3)))
    # UᵀU - I = [[0, 1], [1, 2]]: 6;  VᵀV - I = 3I: 18.  Wrong: UUᵀ would give 7, the norms √6 + √18.
    assert orthogonality_penalty(net).item() == 24


def test_penalty_is_zero_for_orthonormal_columns_and_its_gradient_is_right(close):
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    layer = layer_of(torch.linalg.qr(normal(9, 4))[0], torch.linalg.qr(normal(7, 4))[0], normal(4), 0.0, 1.0,
                     normal(9, 7), normal(9))
    net = nn.Sequential(layer)
    assert orthogonality_penalty(net) < 1e-25
    layer.U.data = layer.U.data * 1.5
    assert close(orthogonality_penalty(net), torch.tensor(4 * 1.25 ** 2, dtype=torch.float64), 1e-12)
    layer.U.data, layer.V.data = normal(9, 4), normal(7, 4)
    orthogonality_penalty(net).backward()
    for P in (layer.U, layer.V):
        assert close(P.grad, 4 * P @ (P.T @ P - torch.eye(4)), 1e-12)


def test_penalty_of_the_oracle_matrices(oracle, close):
    o = oracle("adalora")
    A, B = [o[f"orth_{i:02d}"] for i in range(0, 8, 2)], [o[f"orth_{i:02d}"] for i in range(1, 8, 2)]
    off = [P.T @ P - torch.eye(5) for P in B] + [P @ P.T - torch.eye(5) for P in A]
    assert close(torch.stack([d.norm() for d in off]).mean(), o["orth_reg"].double(), 1e-6)      # peft's: mean of norms
    layers = [layer_of(b, a.T, torch.zeros(5).double(), 0.0, 1.0,
                       torch.zeros(len(b), 12).double(), torch.zeros(len(b)).double()) for a, b in zip(A, B)]
    ours = orthogonality_penalty(nn.ModuleList(layers))                                          # ours: sum of squares
    assert close(ours, torch.stack([d.norm() ** 2 for d in off]).sum(), 1e-12) and not close(ours, o["orth_reg"], 0.01)


# ---- the adapter in a model ----

@families
def test_all_and_only_the_linears_in_the_blocks(tiny, family):
    model = tiny(family)
    before = {name for name, mod in model.named_modules() if isinstance(mod, nn.Linear) and name.startswith("blocks.")}
    names = list(model.state_dict())
    inject_svd_lora(model)
    assert set(svd_lora_layers(model)) == before and len(before) == {"gpt2": 12, "llama": 14}[family]
    assert [type(mod) for _, mod in model.named_children()
            if not isinstance(mod, nn.ModuleList)].count(SVDLoRALinear) == 0
    assert set(names) <= set(model.state_dict())                         # a base checkpoint still fits
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.{part}" for name in before for part in ("U", "V", "sigma", "s")}


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_no_bit(tiny, family, dtype):
    model = tiny(family, dtype=dtype)
    base = model(TOKENS)
    inject_svd_lora(model)
    assert torch.equal(at(model, [0.3, 0.7]), base) and torch.equal(at(model, LAMS), base)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert base.dtype == dtype and base.std() > 0.1
    with torch.no_grad():
        next(iter(svd_lora_layers(model).values())).s.fill_(1.0)
    assert not torch.equal(at(model, [0.3, 0.7]), base)


@families
def test_first_step_moves_only_sigma_and_s(tiny, family):
    model = inject_svd_lora(tiny(family))
    at(model, [0.3, 0.7])[..., 7].sum().backward()
    for name, layer in svd_lora_layers(model).items():
        assert (layer.U.grad == 0).all() and (layer.V.grad == 0).all(), name
        assert (layer.sigma.grad != 0).all() and layer.s.grad != 0, name
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@families
def test_merged_equals_adapter(tiny, close, family):
    model = adapted(tiny(family))
    with adapters_off(model):
        base = model(TOKENS)
    plain = Transformer(model.config)
    for lam in LAMS:
        plain.load_state_dict(merged_state_dict(model, lam))
        assert close(at(model, lam), plain(TOKENS), 1e-5) and not close(base, plain(TOKENS), 0.1)


def test_merged_weights_are_affine_in_lam(tiny, close):
    model = adapted(tiny(), m=3)
    merged = lambda lam: merged_state_dict(model, lam)
    ends, inside = [merged(e) for e in torch.eye(3)], merged([0.2, 0.5, 0.3])
    for name in svd_lora_layers(model):
        W = [end[name + ".weight"] for end in ends]
        assert close(inside[name + ".weight"], 0.2 * W[0] + 0.5 * W[1] + 0.3 * W[2], 1e-5)
        assert not close(W[0], W[1], 0.01)


def test_merging_leaves_the_model_alone(tiny):
    model = adapted(tiny())
    before, logits = {name: p.clone() for name, p in model.state_dict().items()}, at(model, [0.3, 0.7])
    merged = merged_state_dict(model, [1.0, 0.0])
    for p in merged.values():
        p.zero_()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert torch.equal(model(TOKENS), logits)                            # and the preference is what it was


def test_merged_bf16_base_stays_bf16(tiny):
    model = adapted(tiny(dtype=torch.bfloat16))
    assert {p.dtype for p in merged_state_dict(model, [0.5, 0.5]).values()} == {torch.bfloat16}
    assert at(model, [0.5, 0.5]).dtype == torch.bfloat16


def test_merged_policy(tiny, close):
    """Where it is one policy in fp32; else the model itself."""
    model = tiny()
    assert merged(model) is model
    logits = at(adapted(model), [0.3, 0.7])
    plain = merged(model)
    assert not svd_lora_layers(plain) and close(plain(TOKENS), logits, 1e-5)
    assert not close(plain(TOKENS), at(model, [0.7, 0.3]), 0.01) and not close(merged(model)(TOKENS), logits, 0.01)
    with adapters_off(model):
        assert merged(model) is model
    set_preference(model, torch.tensor(LAMS))
    assert merged(model) is model
    rounded = adapted(tiny(dtype=torch.bfloat16))
    at(rounded, [0.5, 0.5])
    assert merged(rounded) is rounded


@families
def test_rows_with_their_own_lam(tiny, close, family):
    model = adapted(tiny(family))
    together = at(model, LAMS)
    for b, lam in enumerate(LAMS):
        assert close(together[b], at(model, lam)[b], 1e-5)
    assert not close(together[0], at(model, LAMS[1])[0], 0.01)           # wrong: another row's preference


def test_adapters_off_is_the_base_and_restores_after_an_exception(tiny):
    base = tiny()(TOKENS)
    model = adapted(tiny())
    logits = at(model, [0.3, 0.7])
    with pytest.raises(KeyError):
        with adapters_off(model) as off:
            assert off is model and torch.equal(model(TOKENS), base)
            raise KeyError
    assert torch.equal(model(TOKENS), logits) and not torch.equal(logits, base)


@families
def test_shared_base_is_the_same_memory_without_the_adapter(tiny, family):
    base = tiny(family)(TOKENS)
    model = adapted(tiny(family))
    logits = at(model, [0.3, 0.7])
    twin = shared_base(model)
    assert torch.equal(twin(TOKENS), base) and not svd_lora_layers(twin)             # wrong: a twin with the adapter
    ours, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    frozen = set(ours) - set(adapter_state(model))
    assert set(theirs) == frozen and all(theirs[n].data_ptr() == ours[n].data_ptr() for n in frozen)   # wrong: a copy
    assert not any(p.requires_grad for p in theirs.values())
    assert all(ours[n].requires_grad for n in adapter_state(model) if n in ours)     # ours still trains
    adapted(twin, k=2, m=0, seed=2)                                      # another adapter on the same weights
    assert not torch.equal(twin(TOKENS), base) and torch.equal(model(TOKENS), logits)
    with adapters_off(twin):
        assert torch.equal(twin(TOKENS), base) and torch.equal(model(TOKENS), logits)


def test_set_preference_refuses_what_is_off_the_simplex(tiny):
    model = adapted(tiny())
    with pytest.raises(RuntimeError, match="set_preference"):
        model(TOKENS)
    logits = at(model, [0.3, 0.7])
    for bad in ([1.0], [0.2, 0.3, 0.5], [-0.1, 1.1], [0.5, 0.6], [0.3, 0.3], [[0.5, 0.5], [0.9, 0.9]],
                [float("nan"), 1.0], [[[0.5, 0.5]]]):
        with pytest.raises(ValueError):
            set_preference(model, bad)
        with pytest.raises(ValueError):
            merged_state_dict(model, bad)
    assert torch.equal(model(TOKENS), logits)                            # refused ones leave the last one in place
    assert not torch.equal(at(model, [0.7, 0.3]), logits)


def test_without_objectives_it_is_a_plain_svd_lora(tiny, close):
    model = adapted(tiny(), k=5, m=0)
    assert {layer.U.shape[1] for layer in svd_lora_layers(model).values()} == {5}
    plain, base = Transformer(model.config), tiny()
    plain.load_state_dict(merged_state_dict(model))
    assert close(model(TOKENS), plain(TOKENS), 1e-5) and not close(model(TOKENS), base(TOKENS), 0.1)


def test_fixed_s_is_no_parameter(tiny, close):
    model = inject_svd_lora(tiny(), k=4, m=2, pref_scaling=0.1)
    assert not any(name.endswith(".s") for name, _ in model.named_parameters())
    grouped = {id(p) for group in parameter_groups(model, 0.1) for p in group["params"]}
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}
    logits = at(model, [0.3, 0.7])
    logits.square().sum().backward()
    assert all(not layer.s.requires_grad and layer.s == torch.tensor(0.1) for layer in svd_lora_layers(model).values())
    assert not close(logits, tiny()(TOKENS), 1e-4)                       # s acts from the start, unlike a learned one


def test_parameter_groups(tiny):
    model = adapted(tiny())
    decayed, free = parameter_groups(model, 0.01)
    layers = svd_lora_layers(model).values()
    assert decayed["weight_decay"] == 0.01 and free["weight_decay"] == 0
    ids = lambda params: sorted(map(id, params))
    assert ids(decayed["params"]) == ids(p for layer in layers for p in (layer.U, layer.V))
    assert ids(free["params"]) == ids(p for layer in layers for p in (layer.sigma, layer.s))
    assert ids(decayed["params"] + free["params"]) == ids(p for p in model.parameters() if p.requires_grad)


def test_injecting_again_starts_afresh(tiny):
    model = adapted(tiny())
    set_preference(model, [0.3, 0.7])
    inject_svd_lora(model, k=3, m=3)
    assert torch.equal(at(model, [0.2, 0.3, 0.5]), tiny()(TOKENS))
    assert {(layer.k, layer.m) for layer in svd_lora_layers(model).values()} == {(3, 3)}


# ---- files ----

@pytest.mark.parametrize("inject_first", [True, False])
def test_adapter_file_round_trip(tiny, tmp_path, inject_first):
    model, other, path = adapted(tiny(), seed=1), tiny(), tmp_path / "a.safetensors"
    save_adapter(model, path, ["helpful", "harmless"], step=7)
    if inject_first:
        adapted(other, seed=2, lora_scaling=64.0)                        # other values, and another gain
    header = load_adapter(other, path, ["helpful", "harmless"])
    assert header == read_adapter_header(path)
    assert {key: header[key] for key in ("k", "m", "gain", "dims", "fixed_s", "step")} == dict(
        k=4, m=2, gain=128.0, dims=["helpful", "harmless"], fixed_s=False, step=7)
    saved, loaded = adapter_state(model), adapter_state(other)
    assert list(saved) == list(loaded) and all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert torch.equal(at(model, [0.3, 0.7]), at(other, [0.3, 0.7]))
    with safe_open(path, framework="pt") as f:
        assert set(f.keys()) == set(saved)                               # the adapter alone, no base weight


def test_the_preference_part_alone(tiny, tmp_path):
    """k = 0: W(λ) = W0 + gain · s Σ λ_i u_i v_iᵀ, at every preference, and through a file."""
    model, other = adapted(tiny(), k=0, gain=3.0), tiny()
    layer = svd_lora_layers(model)["blocks.0.mlp.up"]
    assert layer.U.shape[1] == 2 and layer.sigma.shape == (0,) and layer.gain == 3.0
    lam = torch.tensor([0.25, 0.75])
    expected = 3.0 * layer.s * sum(w * torch.outer(layer.U[:, i], layer.V[:, i]) for i, w in enumerate(lam))
    assert torch.allclose(layer.delta(lam), expected, atol=1e-7) and expected.abs().max() > 1e-4
    plain = Transformer(model.config)
    plain.load_state_dict(merged_state_dict(model, lam))
    assert torch.allclose(at(model, [0.25, 0.75]), plain(TOKENS), atol=1e-5)
    assert not torch.allclose(at(model, [0.75, 0.25]), plain(TOKENS), atol=1e-3)        # wrong: λ reversed
    with pytest.raises(ZeroDivisionError):
        inject_svd_lora(tiny(), k=0)                                     # lora_scaling / k is no gain
    save_adapter(model, tmp_path / "a.safetensors", ["a", "b"])
    assert load_adapter(other, tmp_path / "a.safetensors")["gain"] == 3.0
    assert torch.equal(at(other, [0.25, 0.75]), at(model, [0.25, 0.75]))


def test_adapter_file_keeps_a_fixed_s(tiny, tmp_path):
    model, other = adapted(tiny(), pref_scaling=0.1), tiny()
    save_adapter(model, tmp_path / "a.safetensors", ["a", "b"])
    assert load_adapter(other, tmp_path / "a.safetensors")["fixed_s"]
    assert torch.equal(at(model, [0.3, 0.7]), at(other, [0.3, 0.7]))
    assert not any(name.endswith(".s") for name, _ in other.named_parameters())


def test_what_a_wrong_adapter_file_says(tiny, tmp_path):
    path, model = tmp_path / "a.safetensors", adapted(tiny())
    save_adapter(model, path, ["helpful", "harmless"])

    def refused(model, match, dims=None, path=path):
        before = {name: p.clone() for name, p in model.state_dict().items()}
        with pytest.raises(UserError, match=match) as error:
            load_adapter(model, path, dims)
        assert path.name in str(error.value) and "\n" not in str(error.value)
        assert list(model.state_dict()) == list(before)
        assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())    # nothing is half loaded

    refused(tiny(seed=1), "another base model")                          # the same architecture, other weights
    refused(tiny("llama"), "another base model")
    refused(adapted(tiny(), seed=2), "helpful harmless, not for harmless helpful", ["harmless", "helpful"])
    refused(adapted(tiny(), k=5, m=2, seed=2), "k = 4, m = 2; .* k = 5, m = 2")
    refused(adapted(tiny(), k=3, m=3, seed=2), "k = 4, m = 2; .* k = 3, m = 3")               # U and V would fit
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors", metadata={"state": json.dumps({})})
    (tmp_path / "text.safetensors").write_text("no tensors here")
    for name, match in [("other", "not an adapter"), ("text", "not an adapter"), ("absent", "does not exist")]:
        refused(tiny(), match, path=tmp_path / f"{name}.safetensors")


def test_a_damaged_adapter_is_refused_before_it_is_loaded(tiny, tmp_path):
    """Wrong: broadcast into place, memory for the rank that the header says, a traceback."""
    path, whole = tmp_path / "a.safetensors", adapted(tiny())
    save_adapter(whole, path, ["helpful", "harmless"])
    header, tensors, name = read_adapter_header(path), load_file(path), "blocks.1.attn.q"

    def refused(match, header=header, **changed):
        stored = tensors | {f"{name}.{part}": x for part, x in changed.items()}
        save_file(stored, path, metadata={"panacea": header if isinstance(header, str) else json.dumps(header)})
        model = tiny()
        with pytest.raises(UserError, match=match):
            load_adapter(model, path)
        return model

    for change in (dict(k=-1), dict(k=True), dict(m="2"), dict(gain=None), dict(dims="ab"), dict(dims=[1, 2])):
        refused("is damaged, or not an adapter", header | change)
    for text in ("[" * 10_000, "[]", "null", "{"):
        refused("is damaged, or not an adapter", text)
    assert not svd_lora_layers(refused(r"not of rank 1000000000 \+ 2", header | dict(k=10 ** 9)))
    for changed in (dict(s=torch.zeros(1)), dict(sigma=torch.zeros(1)), dict(sigma=torch.zeros(4, dtype=torch.int32)),
                    dict(U=torch.zeros(1, 6))):
        refused(f"is damaged: {name}.{next(iter(changed))} is", **changed)


def test_fingerprint_knows_the_base_and_nothing_else(tiny):
    model = tiny()
    mark = fingerprint(model)
    assert fingerprint(adapted(model)) == mark == fingerprint(tiny().bfloat16())
    assert len({mark, fingerprint(tiny(seed=1)), fingerprint(tiny("llama"))}) == 3
    llama = tiny("llama")
    assert (mark, fingerprint(llama)) == ("0c1d3fe38dd1d030", "5c75b5e6b64265e5")     # adapters on disk name it: not to
    llama.config.qk_norm = True                               # be changed by a new switch, unless the switch is in use
    assert fingerprint(llama) != "5c75b5e6b64265e5"


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma3"])
def test_export_peft_is_the_merged_matrix(tiny, tmp_path, family):
    """PEFT's W0 + (alpha / r) B A equals merged_state_dict, for every matrix, under Hugging Face's names. Wrong: one
    rank for all of GPT-2's, or their B below each other, so that q's A moves k."""
    model = adapted(tiny(family), k=3)
    lam = torch.tensor([0.3, 0.7])
    assert export_peft(model, lam, tmp_path, "a/base") == (15 if family == "gpt2" else 5)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    merged, before = merged_state_dict(model, lam), model.state_dict()
    assert config["base_model_name_or_path"] == "a/base" and config["fan_in_fan_out"] == (family == "gpt2")
    matrices = {key: names for key, names in hf_names(tiny(family)).items()
                if key.endswith(".weight") and all(f"{name.removesuffix('weight')}U" in before for name in names)}
    assert len(tensors) == 2 * len(matrices) == 2 * 2 * (4 if family == "gpt2" else 7)
    for key, names in matrices.items():
        module = key.removesuffix(".weight")
        A, B = (tensors[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
        leaf = module.rpartition(".")[2]
        r, alpha = (config[f"{x}_pattern"].get(leaf, config[default]) for x, default in (("rank", "r"),
                                                                                       ("alpha", "lora_alpha")))
        assert leaf in config["target_modules"] and len(A) == B.shape[1] == r
        moved = torch.cat([merged[name] - before[name] for name in names])
        assert torch.allclose(alpha / r * B @ A, moved, atol=1e-5) and moved.abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_soup_rounds_nothing(tiny, dtype):
    """Σ w_i ΔW_i beside W0, against the definition in double precision. Of untrained adapters it is the base, to the
    bit. Wrong: W0 + ΔW_i rounded to bf16 and averaged in bf16."""
    base = tiny(dtype=dtype).requires_grad_(False)
    members = [inject_svd_lora(shared_base(base), 3, 0, 6.0) for _ in range(2)]
    weights, tokens = [0.3, 0.6], torch.tensor([[1, 2, 3, 4]])
    mixed = shared_base(base)
    assert torch.equal(soup(mixed, members, weights)(tokens), base(tokens))
    for i, member in enumerate(members):
        for layer in svd_lora_layers(member).values():
            layer.sigma.copy_(torch.tensor([0.5, -1.0, 2.0]) * (i + 1) / 100)
    soup(mixed, members, weights)
    for name, layer in svd_lora_layers(mixed).items():
        parts = [svd_lora_layers(member)[name] for member in members]
        expected = sum(w * part.gain * (part.U.double() * part.sigma.double()) @ part.V.double().T
                       for w, part in zip(weights, parts))
        assert (layer.delta(None) - expected).abs().max() < 1e-6 * expected.abs().max()
        W0 = layer.weight.float()
        rounded = sum(w * ((W0 + part.delta(None)).to(dtype).float() - W0) for w, part in zip(weights, parts))
        wrong = rounded - expected
        assert dtype is torch.float32 or wrong.abs().max() > 0.01 * expected.abs().max()
    fine = merged_state_dict(mixed, dtype=torch.float32)               # and merging can keep it
    for name, layer in svd_lora_layers(mixed).items():
        assert torch.equal(fine[name + ".weight"], layer.weight.float() + layer.delta(None))
