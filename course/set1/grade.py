"""grade.py - the tests of set 1. They compare with hand calculations, with stored numbers and with properties."""
import pytest
import torch
from torch.nn.functional import linear

from course.gpt import GPT, small
from course.grading import backward, check, numbers, problem, raises, same, slope

PROBLEMS = {    # problem: the functions of adapters.py that it asks for
    "svd_lora_forward": ["svd_lora_linear"], "preference_per_row": ["svd_lora_linear"], "inject": ["inject", "parts"],
    "set_preference": ["set_preference"], "adapters_off": ["adapters_off"], "merge": ["merged_state_dict"],
    "orthogonality": ["orthogonality_penalty"]}

TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9]])           # (B, T), of the 23 of small()
LAMS = torch.tensor([[1.0, 0.0], [0.25, 0.75], [0.5, 0.5]])                          # (B, m)
MATRICES = sorted(f"blocks.{i}.{name}" for i in range(2) for name in
                  ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down"))


def layer(k=3, m=2, B=3, T=2, d_in=4, d_out=5):
    """The arguments of svd_lora_linear but lam, in float64."""
    names = {"x": (B, T, d_in), "weight": (d_out, d_in), "bias": (d_out,), "U": (d_out, k + m), "V": (d_in, k + m),
             "sigma": (k,), "s": ()}
    return {name: numbers(*shape, start=i + 1.0) for i, (name, shape) in enumerate(names.items())} | {"gain": 4.0}


def adapted(adapters, lam=(0.25, 0.75), gain=4.0, trained=True):
    """(small model, with branches, at this preference; its plain twin). trained: σ and s are not zero.

    lam: None leaves set_preference alone
    """
    model, plain = small(), small()
    adapters.inject(model, 3, 2, gain, torch.Generator().manual_seed(1))
    learned = adapters.parts(model)
    check(isinstance(learned, dict) and sorted(learned) == MATRICES,
          f"parts(model): expected a dict with the {len(MATRICES)} linear layers of the blocks, {MATRICES[0]} to "
          f"{MATRICES[-1]}; got {sorted(learned) if isinstance(learned, dict) else type(learned).__name__}")
    if trained:
        with torch.no_grad():
            for i, p in enumerate(learned.values()):
                p["sigma"].copy_(numbers(3, start=i))
                p["s"].fill_(1 + 0.1 * i)
                p["U"].mul_(10)
                p["V"].mul_(10)
    if lam is not None:
        adapters.set_preference(model, torch.tensor(lam))
    return model, plain


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(tokens)


# ---------------------------------------------------------------------------------------------------------------------
# svd_lora_forward


@problem("svd_lora_forward", 2)
def test_svd_lora_forward_by_hand(adapters):
    """k = 1, m = 2, x V = (1, 2, 3)."""
    t = lambda *rows: torch.tensor(rows, dtype=torch.float64)
    got = adapters.svd_lora_linear(x=t([[1, 2]]), weight=t([1, 0], [1, 1]), bias=t(10, 20), U=t([1, 0, 1], [0, 1, -1]),
                                   V=t([1, 0, 1], [0, 1, 1]), sigma=t(2), s=torch.tensor(4.0, dtype=torch.float64),
                                   lam=t(0.25, 0.75), gain=0.5)
    same("one token, by hand", got, [[[16.5, 19.5]]], looks_like={
        "the gain is left out": [[[22, 16]]], "the bias is left out": [[[6.5, -0.5]]],
        "λ stands before σ": [[[14.5, 23]]], "s is left out": [[[13.125, 22.125]]],
        "U and V have changed places": [[[10.5, 22.5]]], "the branch is left out": [[[11, 23]]],
        "s multiplies σ too": [[[19.5, 19.5]]], "W0 is not transposed": [[[18.5, 18.5]]]})


@problem("svd_lora_forward", 2)
def test_svd_lora_forward_shapes(adapters):
    """d_in, d_out, k, m, T all differ; no bias."""
    got = adapters.svd_lora_linear(**layer() | {"bias": None}, lam=torch.tensor([0.25, 0.75], dtype=torch.float64))
    same("3 x 2 tokens, without a bias", got, FORWARD)


@problem("svd_lora_forward", 2)
def test_svd_lora_forward_is_W0_without_values(adapters):
    a = layer() | {"sigma": torch.zeros(3, dtype=torch.float64)}
    lam = torch.tensor([0.25, 0.75], dtype=torch.float64)
    want = linear(a["x"], a["weight"], a["bias"])
    same("with σ = 0 and s = 0", adapters.svd_lora_linear(**a | {"s": torch.zeros_like(a["s"])}, lam=lam), want)
    moved = adapters.svd_lora_linear(**a, lam=lam) - want
    check(moved.abs().max() > 1e-3, "with σ = 0 and s ≠ 0 the output is W0's alone: λ has no effect")


@problem("svd_lora_forward", 2)
@pytest.mark.parametrize("name", ["x", "U", "V", "sigma", "s"])
def test_svd_lora_forward_gradients(adapters, name):
    a, lam = layer(), torch.tensor([0.25, 0.75], dtype=torch.float64)
    value = lambda: (adapters.svd_lora_linear(**a, lam=lam) * numbers(3, 2, 5, start=9.0)).sum()
    a[name].requires_grad_(True)
    backward(value(), a[name], f"{name}: is it detached, or made a number, on the way?")
    index = (0,) * a[name].ndim
    same(f"the gradient to {name}, beside a finite difference", a[name].grad[index], slope(value, a[name], index),
         tolerance=1e-5)


FORWARD = torch.tensor([
    -1.33791574, -3.16071319, 1.02032306, 2.88581217, -3.92367947, 0.36472757, -1.24021538, -0.64969971, -0.48270969,
    -2.52923793, 3.29737435, -1.25995042, 2.75927930, 1.74088335, -0.03338765, -9.78512701, 5.70306710, -12.04335225,
    -7.61784785, 0.79376506, 0.11440653, -3.28763423, 4.44671395, 5.34585646, -1.61628660, -1.56591045, -0.19971490,
    -0.56965809, -0.23669059, -0.78364097,
], dtype=torch.float64).view(3, 2, 5)

# ---------------------------------------------------------------------------------------------------------------------
# preference_per_row


@problem("preference_per_row", 2)
def test_preference_per_row_numbers(adapters):
    got = adapters.svd_lora_linear(**layer(), lam=LAMS.double())
    alone = lambda lam: adapters.svd_lora_linear(**layer(), lam=lam.double())
    same("three rows under three preferences", got, PER_ROW, looks_like={
        "every row is under the first row's preference": alone(LAMS[0]),
        "every row is under the mean of the preferences": alone(LAMS.mean(0)),
        "a row is under the preference of the row before": torch.stack([alone(LAMS[i - 1])[i] for i in range(3)]),
        "every row is under the last row's preference": alone(LAMS[2])})


@problem("preference_per_row", 2)
@pytest.mark.parametrize("B, T, m", [(3, 3, 3), (2, 1, 2), (1, 4, 2), (4, 2, 4)])
def test_preference_per_row_is_separate_passes(adapters, B, T, m):
    """Also where B, T, m and r are equal, so that a wrong axis raises no error."""
    a, lam = layer(k=2, m=m, B=B, T=T), numbers(B, m, start=3.0).softmax(1)
    apart = torch.cat([adapters.svd_lora_linear(**a | {"x": a["x"][b:b + 1]}, lam=lam[b]) for b in range(B)])
    check(apart.abs().max() > 1e-3, "the output is zero everywhere")
    same(f"a batch of B = {B}, T = {T}, m = {m} beside its rows in passes of their own",
         adapters.svd_lora_linear(**a, lam=lam), apart)


@problem("preference_per_row", 2)
def test_preference_per_row_keeps_rows_apart(adapters):
    lam = LAMS.double().requires_grad_(True)
    y = adapters.svd_lora_linear(**layer(), lam=lam)
    check(y.requires_grad, "no gradient reaches λ")
    touched = torch.autograd.grad(y[1].square().sum(), lam)[0].abs().sum(1).nonzero().flatten().tolist()
    check(touched == [1], f"row 1 of the output should depend on row 1 of λ alone; it depends on the rows {touched}")


PER_ROW = torch.tensor([
    -1.06910950, -3.56270465, 2.24269546, 4.34521737, -5.08895439, 0.11096843, -1.19976142, 1.60105481, 1.70909452,
    -4.78178693, 3.43849435, -2.17611636, 3.70000986, 2.58663018, -1.00518609, -9.64400700, 4.78690117, -11.10262170,
    -6.77210101, -0.17803338, 0.51670869, -4.29156957, 4.98766738, 5.99541864, -2.14306169, -1.37433052, -1.27421492,
    0.17276128, 0.39107852, -1.56514783,
], dtype=torch.float64).view(3, 2, 5)

# ---------------------------------------------------------------------------------------------------------------------
# inject


@problem("inject", 2)
def test_inject_changes_nothing_at_first(adapters):
    model, plain = adapted(adapters, trained=False)
    for lam in LAMS:
        adapters.set_preference(model, lam)
        same(f"the logits of a fresh adapter at λ = {lam.tolist()}, beside the model before", logits(model),
             logits(plain))


@problem("inject", 2)
def test_inject_trains_the_branches_alone(adapters):
    model, plain = adapted(adapters, lam=None, trained=False)
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    learned = {id(x): f"{name}.{part}" for name, p in adapters.parts(model).items() for part, x in p.items()}
    count = sum(map(len, adapters.parts(model).values()))
    check(len(learned) == count, f"parts(model) has {count} tensors, but only {len(learned)} different ones: two "
          "matrices share one")
    both = set(trained) & set(learned)
    check(both or not trained, "no tensor of parts(model) is a parameter of the model: does parts return copies?")
    check(set(trained) == set(learned), f"expected {len(learned)} parameters that require a gradient, those of "
          f"parts(model); got {len(trained)}, {len(trained) - len(both)} of them not in parts(model), "
          f"{len(learned) - len(both)} of parts(model) missing, for instance "
          f"{next(iter([(trained | learned)[i] for i in set(trained) ^ set(learned)]), None)}")
    same("the number of trained numbers (k = 3, m = 2)", sum(p.numel() for p in model.parameters() if p.requires_grad),
         2928)
    kept = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        if name in kept:
            check(torch.equal(p, kept[name]), f"the base's {name} has changed")


@problem("inject", 2)
def test_inject_shapes_and_start(adapters):
    model, plain = adapted(adapters, lam=None, trained=False)
    U0 = None
    for name, p in adapters.parts(model).items():
        d_out, d_in = plain.get_submodule(name).weight.shape
        want = {"U": (d_out, 5), "V": (d_in, 5), "sigma": (3,), "s": ()}
        check({key: tuple(x.shape) for key, x in p.items()} == want,
              f"{name}: expected the shapes {want}, got { {key: tuple(x.shape) for key, x in p.items()} }")
        check(p["sigma"].abs().max() == 0 and p["s"] == 0, f"{name}: σ and s should start at 0")
        for key in "UV":
            std = p[key].std().item()
            check(0.014 < std < 0.026,
                  f"{name}.{key}: expected random numbers of standard deviation 0.02, got {std:.4f}")
        check(U0 is None or not torch.equal(U0, p["U"].flatten()[:9]), "two layers begin with the same U")
        U0 = p["U"].detach().flatten()[:9]
    twin, _ = adapted(adapters, lam=None, trained=False)
    check(torch.equal(adapters.parts(twin)[MATRICES[0]]["U"], adapters.parts(model)[MATRICES[0]]["U"]),
          "the same generator gives another U: all random numbers should come from it")


@problem("inject", 2)
def test_inject_first_gradients(adapters):
    """At the start σ and s have a gradient, U and V have none: the step after they do."""
    model, _ = adapted(adapters, trained=False)
    model(TOKENS).square().mean().backward()
    for name, p in adapters.parts(model).items():
        for key in ("sigma", "s"):
            check(p[key].grad is not None and p[key].grad.abs().max() > 0,
                  f"{name}.{key} gets no gradient at the start: it would never learn")
        for key in "UV":
            check(p[key].grad is None or p[key].grad.abs().max() == 0,
                  f"{name}.{key}: with σ = s = 0 its gradient should be 0")


@problem("inject", 2)
def test_inject_gain_and_layers(adapters):
    """Twice the gain is twice the branch, in every layer."""
    (one, plain), (two, _) = adapted(adapters, gain=2.0), adapted(adapters, gain=4.0)
    with torch.no_grad():                                             # own random numbers are not this test's affair
        for name, p in adapters.parts(two).items():
            for key in "UV":
                p[key].copy_(adapters.parts(one)[name][key])
    for name in MATRICES:
        x = numbers(3, 2, plain.get_submodule(name).in_features, start=2.0)
        before, first, second = (model.get_submodule(name)(x).detach() for model in (plain, one, two))
        check((first - before).abs().max() > 1e-4, f"{name}: a branch with σ, s ≠ 0 changes nothing")
        same(f"{name}: what the branch adds, with gain 4 beside twice that with gain 2", second - before,
             2 * (first - before), tolerance=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# set_preference


@problem("set_preference", 2)
def test_set_preference_reaches_every_layer(adapters):
    for chosen in MATRICES:
        model, _ = adapted(adapters)
        with torch.no_grad():
            for name, p in adapters.parts(model).items():
                p["s"].fill_(float(name == chosen))
        seen = []
        for lam in ([1.0, 0.0], [0.0, 1.0]):
            adapters.set_preference(model, lam)
            seen.append(logits(model))
        check((seen[0] - seen[1]).abs().max() > 1e-6,
              f"s ≠ 0 in {chosen} alone: λ = (1, 0) and λ = (0, 1) give the same "
              "logits, so λ does not reach that layer")
    with torch.no_grad():
        for p in adapters.parts(model).values():
            p["sigma"].zero_()
            p["V"][:, 4].zero_()                                      # the column of λ_2
    seen = []
    for lam in ([1.0, 0.0], [0.0, 1.0]):
        adapters.set_preference(model, lam)
        seen.append(logits(model))
    base = logits(small())
    swapped = {"λ_1 and λ_2 have changed places": seen[1]} if torch.allclose(seen[0], base) else None
    same("σ = 0, the last column of every V is 0, λ = (0, 1): the logits beside those of the model before inject",
         seen[1], base, looks_like=swapped)


@problem("set_preference", 2)
def test_set_preference_one_a_row(adapters):
    model, _ = adapted(adapters)
    adapters.set_preference(model, LAMS)
    together, apart = logits(model), []
    for b, lam in enumerate(LAMS):
        adapters.set_preference(model, lam)
        apart.append(logits(model, TOKENS[b:b + 1]))
    check((apart[0] - logits(model, TOKENS[:1])).abs().max() > 1e-6, "setting another preference changes nothing")
    same("one batch with a preference a row, beside three passes", together, torch.cat(apart), tolerance=1e-5)
    adapters.set_preference(model, LAMS[0])
    same("the first row, after other preferences were set", logits(model, TOKENS[:1]), apart[0])


@problem("set_preference", 2)
@pytest.mark.parametrize("lam, why", [
    ([1.0], "one weight for two dimensions"), ([0.5, 0.25, 0.25], "three weights for two dimensions"),
    ([1.5, -0.5], "a negative weight"), ([0.5, 0.6], "the sum is 1.1"),
    ([[0.5, 0.5], [0.9, 0.3]], "the sum of row 1 is 1.2"),
    ([0.0, 0.0], "the sum is 0"), ([[0.5, 0.5], [1.25, -0.25]], "a negative weight in row 1")])
def test_set_preference_refuses(adapters, lam, why):
    model, _ = adapted(adapters)
    before = logits(model)
    raises(ValueError, lambda: adapters.set_preference(model, torch.tensor(lam)), f"set_preference with {lam}: {why}")
    same("the logits after a refused preference: the one before is in place", logits(model), before)
    adapters.set_preference(model, [0.75, 0.25])
    check((logits(model) - before).abs().max() > 1e-6, "a list that is a preference, [0.75, 0.25], has no effect")


# ---------------------------------------------------------------------------------------------------------------------
# adapters_off


@problem("adapters_off", 2)
def test_adapters_off_is_the_base(adapters):
    model, plain = adapted(adapters)
    with adapters.adapters_off(model):
        inside = logits(model)
    same("the logits within adapters_off, beside the model before inject", inside, logits(plain),
         looks_like={"the branches are still on": logits(model)})


@problem("adapters_off", 2)
def test_adapters_off_ends(adapters):
    model, plain = adapted(adapters)
    want = logits(model)
    adapters.set_preference(model, [1.0, 0.0])
    before = logits(model)
    with adapters.adapters_off(model):
        pass
    same("the logits after adapters_off, beside those before", logits(model), before,
         looks_like={"the branches stay off": logits(plain)})
    with adapters.adapters_off(model):
        adapters.set_preference(model, [0.25, 0.75])
        check((logits(model) - logits(plain)).abs().max() < 1e-9,
              "a preference that is set inside turns the branches on")
    same("the logits after adapters_off, at the preference that was set inside", logits(model), want,
         looks_like={"the preference from before the block comes back": before})
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    check(trained == {id(x) for p in adapters.parts(model).values() for x in p.values()},
          "after adapters_off other tensors require a gradient than before")


@problem("adapters_off", 2)
def test_adapters_off_ends_after_an_error(adapters):
    model, plain = adapted(adapters)
    before, inside = logits(model), None
    try:
        with adapters.adapters_off(model):
            inside = logits(model)
            raise KeyError("an error inside")
    except KeyError:
        pass
    same("the logits within", inside, logits(plain))
    same("the logits after an error inside adapters_off", logits(model), before,
         looks_like={"the branches stay off": logits(plain)})


@problem("adapters_off", 2)
def test_adapters_off_nested(adapters):
    model, plain = adapted(adapters)
    before = logits(model)
    with adapters.adapters_off(model):
        with adapters.adapters_off(model):
            pass
        inside = logits(model)
    same("the logits in the outer adapters_off, after an inner one has ended", inside, logits(plain),
         looks_like={"the inner one turns the branches on": before})
    same("the logits after both", logits(model), before)


# ---------------------------------------------------------------------------------------------------------------------
# merge


def loaded(weights):
    """A plain model with these weights."""
    plain = GPT(*small().shape).double()
    check(isinstance(weights, dict), f"expected a dict of tensors, got {type(weights).__name__}")
    keys, want = set(weights), set(plain.state_dict())
    check(keys == want, f"expected the {len(want)} names of a plain model; {len(want - keys)} are missing, "
          f"{len(keys - want)} are too many, for instance {next(iter(keys ^ want), None)}")
    plain.load_state_dict(weights)
    return plain


@problem("merge", 2)
@pytest.mark.parametrize("lam", LAMS.tolist())
def test_merge_computes_the_same(adapters, lam):
    model, plain = adapted(adapters, lam)
    want = logits(model)
    merged = loaded(adapters.merged_state_dict(model, torch.tensor(lam)))
    same(f"the merged model's logits at λ = {lam}", logits(merged), want,
         looks_like={"nothing is merged": logits(plain)}, tolerance=1e-5)


@problem("merge", 2)
def test_merge_at_another_preference_than_the_set_one(adapters):
    model, _ = adapted(adapters, [1.0, 0.0])
    set_before = logits(model)
    adapters.set_preference(model, [0.3, 0.7])
    want = logits(model)
    adapters.set_preference(model, [1.0, 0.0])
    merged = loaded(adapters.merged_state_dict(model, [0.3, 0.7]))
    same("merged at the list [0.3, 0.7] while (1, 0) is set", logits(merged), want, tolerance=1e-5,
         looks_like={"the preference that is set is merged": set_before})
    same("merged at the list [0.3, 0.7], beside the branches at this list, in float64: is λ rounded in one of the two?",
         logits(merged), want, tolerance=1e-9)


@problem("merge", 2)
def test_merge_leaves_the_model_alone(adapters):
    model, _ = adapted(adapters)
    before, state = logits(model), {name: x.clone() for name, x in model.state_dict().items()}
    weights = adapters.merged_state_dict(model, torch.tensor([1.0, 0.0]))
    check((logits(loaded(weights)) - logits(small())).abs().max() > 1e-6 and any(x.any() for x in weights.values()),
          "nothing is merged")
    for name, x in model.state_dict().items():
        check(torch.equal(x, state[name]), f"merging has changed the model's own {name}")
    same("the model's logits after merging", logits(model), before)
    for x in weights.values():
        check(not x.requires_grad, "the merged weights require a gradient")
        x.fill_(0.0)
    same("the model's logits after the returned tensors were overwritten: they should be copies", logits(model), before)


# ---------------------------------------------------------------------------------------------------------------------
# orthogonality


def orthonormal(adapters, U=1.0, V=1.0):
    """A model whose U and V have orthogonal columns of these lengths."""
    model, _ = adapted(adapters)
    with torch.no_grad():
        for p in adapters.parts(model).values():
            for key, length in (("U", U), ("V", V)):
                p[key].copy_(length * torch.linalg.qr(numbers(*p[key].shape, start=5.0))[0])
    return model


@problem("orthogonality", 2)
@pytest.mark.parametrize("U, V, want", [(2.0, 1.0, 540.0), (1.0, 2.0, 540.0), (0.0, 3.0, 3900.0)])
def test_orthogonality_by_hand(adapters, U, V, want):
    """12 matrices, 5 orthogonal columns each."""
    same("orthonormal columns", adapters.orthogonality_penalty(orthonormal(adapters)) + 1.0, 1.0)
    same(f"orthogonal columns, of length {U:.0f} in U and {V:.0f} in V",
         adapters.orthogonality_penalty(orthonormal(adapters, U, V)), want, looks_like={
             "the mean over matrices is taken": want / 12, "the mean over all entries is taken": want / 25,
             "the norm is not squared": 12 * 5 ** 0.5 * (abs(U ** 2 - 1) + abs(V ** 2 - 1))})


@problem("orthogonality", 1)
def test_orthogonality_of_equal_columns(adapters):
    model = orthonormal(adapters)
    with torch.no_grad():
        U = adapters.parts(model)[MATRICES[3]]["U"]
        U[:, 1] = U[:, 0]
    same("one matrix with two equal columns, of length 1", adapters.orthogonality_penalty(model), 2.0, looks_like={
        "lengths alone count, not angles": 0.0, "the norm is not squared": 2 ** 0.5, "each pair counts once": 1.0})


@problem("orthogonality", 1)
def test_orthogonality_gradient(adapters):
    model = orthonormal(adapters, 1.5, 0.5)
    value = lambda: adapters.orthogonality_penalty(model)
    for name in (MATRICES[0], MATRICES[-1]):
        for key in "UV":
            x = adapters.parts(model)[name][key]
            with torch.no_grad():
                x[:, 1] += 0.5 * x[:, 0]                              # two columns that are not orthogonal
            x.grad = None
            got = value()
            check(got.requires_grad, "no gradient reaches U and V")
            got.backward()
            check(x.grad is not None, f"no gradient reaches {name}.{key}")
            same(f"the gradient to {name}.{key}, beside a finite difference", x.grad[2, 1], slope(value, x, (2, 1)),
                 tolerance=1e-4)
