"""mutants.py - wrong answers to the problems of set 1 that students write. The grader has to see them.

MUTANTS: {problem: {what is wrong: {function of adapters.py: the wrong one}}}; all other functions are the reference's.
ZEROS: {function: one that does nothing, or returns zeros of the right shape}
"""
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

import course.reference_adapters as right
from svd_lora import check_preference, svd_lora_layers


def branch(d=lambda sigma, s, lam: torch.cat([sigma, s * lam]), up=lambda h, U: h @ U.T, keep=lambda x: x,
           scale=lambda gain, k: gain):
    """svd_lora_linear for one preference, with one of its pieces replaced."""
    def wrong(x, weight, bias, U, V, sigma, s, lam, gain):
        if lam.ndim == 2:
            return right.svd_lora_linear(x, weight, bias, U, V, sigma, s, lam, gain)
        y = x @ weight.T + (0 if bias is None else bias)
        return keep(y) + scale(gain, len(sigma)) * up((x @ V) * d(sigma, s, lam), U)
    return {"svd_lora_linear": wrong}


def shuffled(change):
    """svd_lora_linear that changes the preferences of a batch first."""
    return {"svd_lora_linear": lambda lam, **others: right.svd_lora_linear(
        lam=change(lam) if lam.ndim == 2 else lam, **others)}


def per_row(d):
    """svd_lora_linear for one preference a row, with another d(sigma, s, lam), which multiplies x V, (B, T, r)."""
    def wrong(x, weight, bias, U, V, sigma, s, lam, gain):
        if lam.ndim == 1:
            return right.svd_lora_linear(x, weight, bias, U, V, sigma, s, lam, gain)
        y = x @ weight.T + (0 if bias is None else bias)
        return y + gain * ((x @ V) * d(sigma, s, lam)) @ U.T
    return {"svd_lora_linear": wrong}


def injected(after=lambda model, learned: None, **fixed):
    """inject, with other arguments, or something done to the model afterwards."""
    def wrong(model, k, m, gain, generator=None):
        right.inject(model, *(fixed.get(name, value) for name, value in
                              (("k", k), ("m", m), ("gain", gain), ("generator", generator))))
        after(model, right.parts(model))
    return {"inject": wrong}


@torch.no_grad()
def change(*keys, by):
    def after(model, learned):
        for p in learned.values():
            for key in keys:
                p[key].data.copy_(by(p[key].data))
    return after


def one_for_all(model, learned):
    layers = list(svd_lora_layers(model).values())
    for layer in layers:
        layer.s = layers[0].s


def plain_again(which):
    def after(model, learned):
        for name, layer in svd_lora_layers(model).items():
            if which(name):
                linear = nn.Linear(layer.weight.shape[1], layer.weight.shape[0]).to(layer.weight)
                linear.weight, linear.bias = layer.weight, layer.bias
                model.set_submodule(name, linear)
    return after


def detached(model, learned):
    for layer in svd_lora_layers(model).values():
        layer.singular_values = lambda lam, layer=layer: torch.cat([layer.sigma, layer.s.detach() * lam])


def preference(change=lambda lam: lam, layers=lambda found: found, refuse=True):
    """set_preference that changes λ, sets some layers alone (the others have equal weights), or refuses nothing."""
    def wrong(model, lam):
        lam, found = torch.as_tensor(lam, dtype=torch.float64), list(svd_lora_layers(model).values())
        if refuse:
            check_preference(lam, 2)
        chosen = layers(found)
        for layer in found:
            layer.lam = change(lam) if layer in chosen else torch.tensor([0.5, 0.5]) if layer.lam is None else layer.lam
    return {"set_preference": wrong}


def checked(rule):
    """set_preference that refuses what rule(lam) finds, and nothing else."""
    def wrong(model, lam):
        lam = torch.as_tensor(lam, dtype=torch.float64)
        if not rule(lam):
            raise ValueError("no preference")
        for layer in svd_lora_layers(model).values():
            layer.lam = lam
    return {"set_preference": wrong}


def off(enter, leave=None, safe=True):
    """adapters_off from what is done to every layer on the way in and out. safe: also after an error."""
    def wrong(model):
        layers = list(svd_lora_layers(model).values())
        for layer in layers:
            enter(layer)
        if not safe:
            yield model
        try:
            if safe:
                yield model
        finally:
            for layer in layers if leave else []:
                leave(layer)
    return {"adapters_off": contextmanager(wrong)}


@contextmanager
def off_in_place(model):
    for p in right.parts(model).values():
        p["s"].data.zero_()
        p["sigma"].data.zero_()
    yield model


@contextmanager
def s_off(model):
    kept = {name: p["s"].data.clone() for name, p in right.parts(model).items()}
    for p in right.parts(model).values():
        p["s"].data.zero_()
    try:
        yield model
    finally:
        for name, p in right.parts(model).items():
            p["s"].data.copy_(kept[name])


@contextmanager
def freezes(model):
    with right.adapters_off(model):
        yield model
    for p in model.parameters():
        p.requires_grad_(False)


@contextmanager
def old_preference(model):
    kept = {layer: layer.lam for layer in svd_lora_layers(model).values()}
    with right.adapters_off(model):
        yield model
    for layer, lam in kept.items():
        layer.lam = lam


@contextmanager
def some_off(model):
    layers = list(svd_lora_layers(model).values())[:-1]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def merging(weight=lambda W, p, d, gain: W + gain * p["U"] * d @ p["V"].T,
            values=lambda p, lam: torch.cat([p["sigma"], p["s"] * lam])):
    """merged_state_dict from the merged matrix and d."""
    def wrong(model, lam):
        weights = right.merged_state_dict(model, lam)
        for name, p in right.parts(model).items():
            p, layer = {key: x.detach() for key, x in p.items()}, model.get_submodule(name)
            weights[name + ".weight"] = weight(layer.weight.detach(), p, values(p, torch.as_tensor(lam).double()),
                                               layer.gain)
        return weights
    return {"merged_state_dict": wrong}


def merge_in_place(model, lam):
    weights = right.merged_state_dict(model, lam)
    model.load_state_dict(weights, strict=False)
    return weights


def aliases(model, lam):
    weights, state = right.merged_state_dict(model, lam), model.state_dict()
    matrices = {name + ".weight" for name in right.parts(model)}
    return {name: x if name in matrices else state[name] for name, x in weights.items()}


def penalty(each, over=lambda p: (p["U"], p["V"]), pool=sum):
    """orthogonality_penalty from the term of one matrix, the matrices of a layer, and how they are pooled."""
    return {"orthogonality_penalty": lambda model: pool([each(M) for p in right.parts(model).values()
                                                         for M in over(p)])}


def gram(M):
    return M.T @ M - torch.eye(M.shape[1]).to(M)


MUTANTS = {
    "svd_lora_forward": {
        "the gain is left out": branch(scale=lambda gain, k: 1.0),
        "the gain is divided by k": branch(scale=lambda gain, k: gain / k),
        "λ before σ": branch(d=lambda sigma, s, lam: torch.cat([s * lam, sigma])),
        "s left out": branch(d=lambda sigma, s, lam: torch.cat([sigma, lam])),
        "s on σ too": branch(d=lambda sigma, s, lam: s * torch.cat([sigma, lam])),
        "σ and λ in reverse": branch(d=lambda sigma, s, lam: torch.cat([sigma, s * lam.flip(0)])),
        "the base is left out": branch(keep=torch.zeros_like),
        "the bias is left out": {"svd_lora_linear": lambda bias, **others: right.svd_lora_linear(bias=None, **others)},
        "U and V exchanged where square": {"svd_lora_linear": lambda U, V, **others: right.svd_lora_linear(
            **(dict(U=V, V=U) if U.shape == V.shape else dict(U=U, V=V)), **others)},
        "s as a Python number": branch(d=lambda sigma, s, lam: torch.cat([sigma, float(s) * lam])),
        "σ detached": branch(d=lambda sigma, s, lam: torch.cat([sigma.detach(), s * lam])),
        "d²": branch(d=lambda sigma, s, lam: torch.cat([sigma, s * lam]).square()),
        "softmax over λ": branch(d=lambda sigma, s, lam: torch.cat([sigma, s * lam.softmax(-1)])),
        "the branch under no_grad": branch(up=lambda h, U: (h @ U.T).detach())},
    "preference_per_row": {
        "the mean of the preferences": shuffled(lambda lam: lam.mean(0)),
        "the first row's for all": shuffled(lambda lam: lam[0]),
        "the preference of the row before": shuffled(lambda lam: lam.roll(1, 0)),
        "rows in reverse": shuffled(lambda lam: lam.flip(0)),
        "along T instead of B, where they are equal": per_row(
            lambda sigma, s, lam: torch.cat([sigma.expand(len(lam), -1), s * lam], 1)),
        "transposed where square": shuffled(lambda lam: lam.T if lam.shape[0] == lam.shape[1] else lam),
        "σ for the first row alone": per_row(lambda sigma, s, lam: torch.cat(
            [torch.cat([sigma[None], sigma.new_zeros(len(lam) - 1, len(sigma))]), s * lam], 1)[:, None]),
        "λ before σ": per_row(lambda sigma, s, lam: torch.cat([s * lam, sigma.expand(len(lam), -1)], 1)[:, None]),
        "s left out": per_row(lambda sigma, s, lam: torch.cat([sigma.expand(len(lam), -1), lam], 1)[:, None]),
        "normalised over rows": shuffled(lambda lam: lam / lam.sum(0)),
        "λ detached into numbers": shuffled(lambda lam: torch.tensor(lam.tolist(), dtype=lam.dtype)),
        "a row mixes with the next": shuffled(lambda lam: 0.5 * lam + 0.5 * lam.roll(-1, 0)),
        "the last row's for all": shuffled(lambda lam: lam[-1])},
    "inject": {
        "the base is not frozen": injected(lambda model, learned: [p.requires_grad_(True) for p in model.parameters()]),
        "norms stay trainable": injected(lambda model, learned: model.norm.requires_grad_(True)),
        "embeddings stay trainable": injected(lambda model, learned: model.embed.requires_grad_(True)),
        "s does not require a gradient": injected(
            lambda model, learned: [p["s"].requires_grad_(False) for p in learned.values()]),
        "s starts at 1": injected(change("s", by=torch.ones_like)),
        "σ starts at 1": injected(change("sigma", by=torch.ones_like)),
        "U starts at 0": injected(change("U", by=torch.zeros_like)),
        "U and V with standard deviation 1": injected(change("U", "V", by=lambda x: x / 0.02)),
        "σ random": injected(change("sigma", by=torch.randn_like)),
        "one s for all layers": injected(one_for_all),
        "the gain is 1": injected(gain=1.0),
        "k and m exchanged": {
            "inject": lambda model, k, m, gain, generator=None: right.inject(model, m, k, gain, generator)},
        "the generator is not used": injected(generator=None),
        "attention alone": injected(plain_again(lambda name: "mlp" in name)),
        "the first block alone": injected(plain_again(lambda name: "blocks.0" not in name)),
        "s is cut off from the gradient": injected(detached),
        "the branch merged into the base's weight": injected(
            lambda model, learned: [layer.weight.data.add_(0.01 * layer.U @ layer.V.T)
                                    for layer in svd_lora_layers(model).values()]),
        "parts returns copies": {"parts": lambda model: {name: {key: x.detach().clone() for key, x in p.items()}
                                                         for name, p in right.parts(model).items()}},
        "all layers from one seed": {"inject": lambda model, k, m, gain, generator=None: (
            right.inject(model, k, m, gain, generator),
            [x.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(0)) for p in right.parts(model).values()
             for x in (p["U"], p["V"])])}},
    "set_preference": {
        "the first layer alone": preference(layers=lambda found: found[:1]),
        "all but the last layer": preference(layers=lambda found: found[:-1]),
        "rows are averaged": preference(lambda lam: lam.mean(0) if lam.ndim == 2 else lam),
        "the first row for all": preference(lambda lam: lam[0] if lam.ndim == 2 else lam),
        "nothing is refused": checked(lambda lam: True),
        "negative weights are not refused": checked(
            lambda lam: lam.shape[-1] == 2 and ((lam.sum(-1) - 1).abs() < 1e-4).all()),
        "the sum is not checked": checked(lambda lam: lam.shape[-1] == 2 and (lam >= 0).all()),
        "the length is not checked": checked(lambda lam: (lam >= 0).all() and ((lam.sum(-1) - 1).abs() < 1e-4).all()),
        "the sum of all rows together": checked(
            lambda lam: lam.shape[-1] == 2 and (lam >= 0).all()
            and abs(lam.sum() - (len(lam) if lam.ndim == 2 else 1)) < 0.25),
        "the first row alone is checked": checked(lambda lam: lam.shape[-1] == 2 and (
            (first := lam.view(-1, 2)[0]) >= 0).all() and abs(first.sum() - 1) < 1e-4),
        "normalises instead of refusing": preference(
            lambda lam: lam.abs() / lam.abs().sum(-1, keepdim=True).clamp(min=1e-9), refuse=False),
        "the first call stays": preference(layers=lambda found: [layer for layer in found if layer.lam is None]),
        "set before it is checked": {"set_preference": lambda model, lam: (
            [setattr(layer, "lam", torch.as_tensor(lam).double()) for layer in svd_lora_layers(model).values()],
            right.set_preference(model, lam))},
        "in reverse order": preference(lambda lam: lam.flip(-1))},
    "adapters_off": {
        "never on again": off(lambda layer: setattr(layer, "enabled", False)),
        "not after an error": off(lambda layer: setattr(layer, "enabled", False),
                                  lambda layer: setattr(layer, "enabled", True), safe=False),
        "a nested one turns on": off(lambda layer: setattr(layer, "enabled", False),
                                     lambda layer: setattr(layer, "enabled", True)),
        "σ and s overwritten": {"adapters_off": off_in_place},
        "s alone is off, σ stays": {"adapters_off": s_off},
        "all layers but the last": {"adapters_off": some_off},
        "the old preference comes back": {"adapters_off": old_preference},
        "freezes the adapter for good": {"adapters_off": freezes},
        "λ is deleted": off(lambda layer: setattr(layer, "enabled", False), lambda layer: (
            setattr(layer, "enabled", True), setattr(layer, "lam", None))),
        "an equal preference instead of none": {"adapters_off": contextmanager(lambda model: (
            x for x in [right.set_preference(model, [0.5, 0.5])]))},
        "no_grad instead": {"adapters_off": lambda model: torch.no_grad()}},
    "merge": {
        "the gain is left out": merging(lambda W, p, d, gain: W + p["U"] * d @ p["V"].T),
        "s left out": merging(values=lambda p, lam: torch.cat([p["sigma"], lam])),
        "λ before σ": merging(values=lambda p, lam: torch.cat([p["s"] * lam, p["sigma"]])),
        "σ alone": merging(values=lambda p, lam: torch.cat([p["sigma"], 0 * lam])),
        "the base is left out": merging(lambda W, p, d, gain: gain * p["U"] * d @ p["V"].T),
        "subtracted": merging(lambda W, p, d, gain: W - gain * p["U"] * d @ p["V"].T),
        "nothing is merged": merging(lambda W, p, d, gain: W.clone()),
        "transposed where square": merging(lambda W, p, d, gain: W + gain * (
            p["V"] * d @ p["U"].T if W.shape[0] == W.shape[1] else p["U"] * d @ p["V"].T)),
        "the preference that is set": {"merged_state_dict": lambda model, lam: right.merged_state_dict(
            model, svd_lora_layers(model)["blocks.0.attn.q"].lam)},
        "the model itself is merged": {"merged_state_dict": merge_in_place},
        "norms and embeddings are not copied": {"merged_state_dict": aliases},
        "the branch's tensors stay in": {"merged_state_dict": lambda model, lam: right.merged_state_dict(model, lam) | {
            "blocks.0.attn.q.U": right.parts(model)["blocks.0.attn.q"]["U"]}},
        "a list becomes float32": preference() | {"merged_state_dict": right.merged_state_dict},
        "matrices alone": {"merged_state_dict": lambda model, lam: {
            name: x for name, x in right.merged_state_dict(model, lam).items() if "blocks" in name}},
        "the first block alone": {"merged_state_dict": lambda model, lam: right.merged_state_dict(model, lam) | {
            name + ".weight": model.get_submodule(name).weight.detach().clone() for name in right.parts(model)
            if "blocks.1" in name}},
        "still in the graph": {"merged_state_dict": lambda model, lam: {
            name: x + 0 * model.get_submodule("blocks.0.attn.q").s
            for name, x in right.merged_state_dict(model, lam).items()}}},
    "orthogonality": {
        "the norm is not squared": penalty(lambda M: gram(M).norm()),
        "the mean of the entries": penalty(lambda M: gram(M).square().mean()),
        "the mean over matrices": penalty(lambda M: gram(M).square().sum(), pool=lambda terms: sum(terms) / len(terms)),
        "U alone": penalty(lambda M: gram(M).square().sum(), over=lambda p: (p["U"],)),
        "V alone": penalty(lambda M: gram(M).square().sum(), over=lambda p: (p["V"],)),
        "the last layer alone": penalty(lambda M: gram(M).square().sum(), pool=lambda terms: terms[-1] + terms[-2]),
        "rows instead of columns": penalty(lambda M: gram(M.T).square().sum()),
        "without the identity": penalty(lambda M: (M.T @ M).square().sum()),
        "the diagonal alone": penalty(lambda M: gram(M).diagonal().square().sum()),
        "off the diagonal alone": penalty(lambda M: (M.T @ M - torch.diag((M.T @ M).diagonal())).square().sum()),
        "absolute values": penalty(lambda M: gram(M).abs().sum()),
        "detached": penalty(lambda M: gram(M).square().sum().detach()),
        "U against V": penalty(lambda M: gram(M).square().sum(), over=lambda p: (p["U"], p["U"]))},
}


def equal_weights(model, lam):
    """Whatever is asked for."""
    for layer in svd_lora_layers(model).values():
        layer.lam = torch.tensor([0.5, 0.5])


ZEROS = {"svd_lora_linear": lambda x, weight, **others: x.new_zeros(*x.shape[:-1], len(weight)),
         "inject": lambda *arguments: None, "parts": lambda model: {}, "set_preference": equal_weights,
         "adapters_off": lambda model: nullcontext(model),
         "merged_state_dict": lambda model, lam: {name: torch.zeros_like(x) for name, x in model.state_dict().items()
                                                  if name.rpartition(".")[2] in ("weight", "bias")},
         "orthogonality_penalty": lambda model: torch.tensor(0.0, dtype=torch.float64)}
