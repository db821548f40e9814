"""generation.py - continues prompts: reads them once (prefill), then adds one token to each per decode step.

B: rows that still continue   T: tokens in this call   M: slots of the KV cache   V: vocabulary   H: query heads
K: key/value heads   C: head_dim   r: rank of an adapter
In the SVD-LoRA factors V: (d_in, r)   d: gain · cat(σ, s·λ), (r,) or (B, 1, r); svd_lora.py's d is without the gain
U: (d_out, r), Ut its transpose

Where λ enters: fast_copy asks every SVDLoRALinear for its factors, once per call of generate(), and FastLinear
multiplies with them. So λ must be set before the call, and a change of λ during the call has no effect.

What makes it fast: on a GPU every step attends to all slots of the cache under a mask. The tensors then never change
their shape, and the step is replayed as one CUDA graph. A CPU attends to the slots that are filled. On CUDA, a layer
with an adapter or quantised weights is one launch; q, k, v together are one, and gate, up. On a CPU the weights are
copied into oneDNN's layout for the duration of the call, rows that have ended are dropped, and of a tiny model each
core continues rows of its own. Several answers to one prompt under one λ read it once. A token costs one random number,
not V.
"""
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

from ops import fused
from ops.fused import dense, has_onednn
from ops.quantize import GROUP, LEVELS, QuantizedLinear, QuantizedWeight
from ops.threads import side_by_side

PACK_FROM = 2 ** 16         # weights smaller than this lose more by oneDNN's overhead than they gain
PACK_STEPS = 16             # repacking costs about as much as this many steps save
KEEP = 0.9                  # on a CPU, ended rows are dropped where so many of the rows, at most, still continue
TINY = 256                  # width of a model whose weights fit in a core's caches, so that each core reads all of them
SYNC_EVERY = 16             # on a GPU, steps between two checks whether all rows have ended: a check stalls the device


class KVCache:
    """Keys and values of all layers for up to `capacity` tokens, allocated once."""

    def __init__(self, config, batch, capacity, dtype, device):
        shape = (config.n_layer, batch, config.n_kv_head, capacity, config.head_dim)
        self.k, self.v = torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device)
        self.length = 0                                       # tokens held; Transformer.forward advances it
        self.slot = None                                      # a tensor (1,): where the one token of a decode step goes
        self.seen = capacity                                  # slots that a decode step attends to, the first ones

    def layer(self, i):
        """The view that layer i appends to."""
        return _LayerCache(self, i)


class _LayerCache:
    def __init__(self, cache, i):
        self.cache, self.i, self.decoding = cache, i, cache.slot is not None

    def append(self, k, v):                                   # (B, K, T, C) -> everything held so far, (B, K, M, C)
        start, end = self.cache.length, self.cache.length + k.shape[2]
        assert end <= self.cache.k.shape[3], f"the KV cache has room for {self.cache.k.shape[3]} tokens, not {end}"
        keys, values = self.cache.k[self.i, :, :, :end], self.cache.v[self.i, :, :, :end]
        keys[:, :, start:], values[:, :, start:] = k, v
        return keys, values

    def attend(self, q, k, v, bias):
        """One token per row, q (B, H, 1, C), over the first M = cache.seen slots: k and v (B, K, 1, C) go into
        cache.slot; bias (B, 1, 1, M) is 0 where a slot is seen, else -inf. Returns (B, H, 1, C)."""
        # Not F.scaled_dot_product_attention: for a single query it is slower on a CPU, much slower in bf16. The H / K
        # query heads that share keys are the rows of one matrix, so grouped queries need no copies of the keys.
        seen = self.cache.seen
        keys, values = self.cache.k[self.i, :, :, :seen], self.cache.v[self.i, :, :, :seen]           # (B, K, M, C)
        keys.index_copy_(2, self.cache.slot, k)
        values.index_copy_(2, self.cache.slot, v)
        rows = q.reshape(*keys.shape[:2], -1, keys.shape[3]) * keys.shape[3] ** -0.5  # (B, K, H / K, C)
        weights = (rows @ keys.transpose(2, 3) + bias).softmax(-1)                    # (B, K, H / K, M)
        return (weights @ values).view(q.shape)


# ---------------------------------------------------------------------------------------------------------------------
# The model as it is during one call of generate().

class FastLinear(nn.Module):
    """A Linear or SVDLoRALinear that is not trained: x Wᵀ + b, with factors (V, d, Uᵀ) plus ((x V) · d) Uᵀ, Eq. (9).

    pack: copy the weights into the layout that is multiplied fastest; Vᵀ is stacked under W, so one product gives both.
    A QuantizedWeight is dequantised once, into that copy, or without `pack` at every step. gelu: "tanh" or "none", the
    approximation of GPT-2's GELU, makes it gelu(x Wᵀ + b), in the same pass where it is packed.
    """

    def __init__(self, weight, bias=None, factors=None, pack=False, gelu=None):
        super().__init__()
        self.gelu = gelu
        if pack and isinstance(weight, QuantizedWeight):
            weight = weight.dense()
        self.d_out, self.folded, self.factors = weight.shape[0], pack and factors is not None, factors
        if self.folded:
            weight = torch.cat([weight, factors[0].T])                                # (d_out + r, d_in)
            bias = F.pad(bias, (0, len(weight) - self.d_out)) if bias is not None else None
        self.packed = (pack and weight.device.type == "cpu" and weight.numel() >= PACK_FROM and has_onednn(weight.dtype)
                       and hasattr(torch.ops.mkldnn, "_reorder_linear_weight"))
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self.packed else weight
        self.bias = bias

    def forward(self, x):                                                             # (B, T, d_in) -> (B, T, d_out)
        if self.packed:
            after = ("gelu", [], self.gelu) if self.gelu else ("none", [], "")
            y = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *after)
        else:
            y = fused.product(x, dense(self.weight, x.dtype), self.bias)
            y = F.gelu(y, approximate=self.gelu) if self.gelu else y
        if self.factors is None:
            return y
        V, d, Ut = self.factors                                                       # d: (r,) or (B, 1, r)
        h = y[..., self.d_out:] if self.folded else x @ V                             # (B, T, r)
        y = y[..., :self.d_out].flatten(0, -2)                                        # (B·T, d_out)
        return torch.addmm(y, (h * d).to(y.dtype).flatten(0, -2), Ut).view(*x.shape[:-1], self.d_out)


class OneToken(nn.Module):
    """One to three FastLinears of one input: x -> their outputs, by one launch where x has one token per row
    (triton_kernels.svd_lora_decode).

    It holds copies of their factors, laid out as the kernel reads them; the layers keep views of these.
    """

    def __init__(self, layers):
        super().__init__()
        self.layers, weights = nn.ModuleList(layers), [layer.weight for layer in layers]
        quantized, dtype = isinstance(weights[0], QuantizedWeight), weights[0].dtype
        self.W = [w.codes if quantized else w for w in weights]
        self.quantized = {"scales": [w.scales for w in weights], "group": GROUP} if quantized else {}
        if quantized and weights[0].kind == "nf4":            # in bf16, a level is rounded far less than a weight is
            self.quantized["table"] = torch.tensor(LEVELS, dtype=torch.float16 if dtype == torch.bfloat16 else dtype,
                                                   device=self.W[0].device)
        biases, self.V, self.U = [layer.bias for layer in layers], None, None
        self.bias = None if biases[0] is None else biases[0] if len(biases) == 1 else torch.cat(biases)
        self.finished = torch.zeros(sum(map(len, self.W)), dtype=torch.int32, device=self.W[0].device)
        if layers[0].factors is not None:
            r = layers[0].factors[0].shape[1]
            more = max(16, 1 << (r - 1).bit_length()) - r                             # up to a power of two
            self.V = torch.stack([F.pad(layer.factors[0].T, (0, 0, 0, more)) for layer in layers])  # (layers, BR, d_in)
            self.U = torch.cat([F.pad(layer.factors[2].T, (0, more)) for layer in layers])            # (all d_out, BR)
            for layer, V, U in zip(layers, self.V, self.U.split([layer.d_out for layer in layers])):
                layer.factors = V[:r].T, layer.factors[1], U[:, :r].T
        self.stack_d()

    @staticmethod
    def can(layer):
        """Whether this layer gains by the kernel and fits it. A dense one without factors is one launch already."""
        W, quantized = layer.weight, isinstance(layer.weight, QuantizedWeight)
        launch = fused.kernel("svd_lora_decode", W.codes if quantized else W)
        if not launch or not (quantized or layer.factors) or layer.gelu:
            return False
        return (W.dtype in (torch.float32, torch.bfloat16) and (quantized or W.stride(1) == 1)
                and (layer.factors is None or layer.factors[0].shape[1] <= fused.triton().DECODE_RANK))

    @staticmethod
    def can_join(layers):
        """Whether layers of one input, each of which fits the kernel, can share a launch: they are of one kind."""
        kind = lambda layer: (getattr(layer.weight, "kind", "dense"), layer.weight.dtype, layer.weight.shape[1],
                              layer.bias is None, layer.factors and (layer.factors[0].shape, layer.factors[1].shape))
        return len({kind(layer) for layer in layers}) == 1

    def stack_d(self):
        """Copies the d of its layers."""
        ds = [layer.factors[1] for layer in self.layers if layer.factors]
        self.d = torch.stack([d[:, 0] if d.ndim == 3 else d for d in ds]) if ds else None    # (layers, [B,] r)

    def forward(self, x):                                     # (B, T, d_in) -> (B, T, d_out), a tuple of several layers
        launch = fused.kernel("svd_lora_decode", x)
        if launch and x.shape[1] == 1 and len(x) <= fused.triton().DECODE_ROWS:
            outputs = [y[:, None] for y in launch(x[:, 0], self.W, self.V, self.d, self.U, self.bias, self.finished,
                                                  **self.quantized)]
        else:
            outputs = [layer(x) for layer in self.layers]
        return tuple(outputs) if len(outputs) > 1 else outputs[0]


class Stacked(nn.Module):
    """Several linear layers of one input without adapters, as one product: x -> their outputs."""

    def __init__(self, layers):
        super().__init__()
        self.sizes = [len(layer.weight) for layer in layers]
        bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
        self.linear = FastLinear(torch.cat([layer.weight for layer in layers]), bias, pack=True)

    def forward(self, x):
        return self.linear(x).split(self.sizes, dim=-1)


def bare(layer):
    """Whether a layer is a dense matrix without an adapter in use."""
    return isinstance(layer.weight, torch.Tensor) and not getattr(layer, "enabled", False)


def fast_copy(module, pack):
    """A copy of `module` that shares its tensors and has a FastLinear in the place of every linear layer.

    With `pack` and no adapter, q, k, v become one product, and GPT-2's GELU a part of its product; layers of one input
    that fit the kernel become one launch. The joined layer then stands in the place of the method that called its parts
    one by one: Attention.project, MLP.inner (model.py). λ enters here, inside d of Eq. (9), once per copy."""
    if hasattr(module, "factors") or isinstance(module, (nn.Linear, QuantizedLinear)):
        factors = module.factors(module.weight.dtype) if getattr(module, "enabled", False) else None    # SVDLoRALinear
        if factors is not None and fused.use_kernels(module.V):
            factors = factors[0], module.scaled_values(), factors[2]                  # d in fp32, as in training
        fast = FastLinear(module.weight, module.bias, factors, pack)
        return OneToken([fast]) if OneToken.can(fast) else fast
    twin = copy.copy(module)
    children, joined = dict(module._modules), {}
    if pack and hasattr(module, "project") and all(bare(layer) for layer in (module.q, module.k, module.v)):
        joined["project"] = Stacked([children.pop(name) for name in "qkv"])
    if pack and getattr(module, "gelu", None) and module.gate is None and bare(module.up):
        up = children.pop("up")
        joined["inner"] = FastLinear(up.weight, up.bias, pack=True, gelu=module.gelu)
    twin._modules = joined | {name: fast_copy(child, pack) for name, child in children.items()}
    twin.__dict__.update(joined)                              # found before the methods of the same names
    for method, names in (("project", ("q", "k", "v")), ("inner", ("gate", "up"))):
        parts = [twin._modules.get(name) for name in names]
        if all(isinstance(part, OneToken) for part in parts) and OneToken.can_join([part.layers[0] for part in parts]):
            twin._modules[method] = launch = OneToken([twin._modules.pop(name).layers[0] for name in names])
            twin.__dict__[method] = launch if method == "project" else lambda x: module.joined(*launch(x))
    return twin


def frozen(model, pack):
    """A copy of a Transformer, on the same tensors, whose blocks are fast_copy's: for forward passes without gradients,
    with the adapter and λ of this moment."""
    twin = copy.copy(model)
    twin._modules = model._modules | {"blocks": fast_copy(model.blocks, pack)}
    return twin


class Decoder:
    """The state of one generate() call. prefill() and step() give the logits (B, V) of the next token of every row.

    Neighbouring rows with one prompt and one λ are several answers to it, and it is read once: B' of the B rows are."""

    def __init__(self, model, prompts, max_new_tokens, graph=False, pack=False, rows=None):
        """rows: (B,) which of the model's preferences, one per row, are those of the prompts; None: all, in order."""
        device, dtype = model.embed.weight.device, model.embed.weight.dtype
        B, longest = len(prompts), max(map(len, prompts))
        self.model = frozen(model, pack)
        if rows is not None:
            self.keep_preferences(rows)
        new = torch.tensor([i == 0 or prompts[i] != prompts[i - 1] for i in range(B)], device=device)
        for layer in self.model.modules():
            if isinstance(layer, FastLinear) and layer.factors is not None and layer.factors[1].ndim == 3:
                d = layer.factors[1]                                                  # (B, 1, r)
                new[1:] |= (d[1:] != d[:-1]).any(-1)[:, 0]
        self.read = new.nonzero()[:, 0]                       # (B',) the rows whose prompts are read
        self.reads = new.cumsum(0) - 1                        # (B,) which of these each row is
        self.head = FastLinear(model.head_weight, pack=pack)
        # Padded on the left, so that all rows write the same slot; padding is masked and is not counted as a position.
        self.prompts = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)    # (B, T)
        self.padding = torch.tensor([[longest - len(p)] for p in prompts], device=device)                    # (B, 1)
        self.padded = min(map(len, prompts)) < longest
        self.cache = KVCache(model.config, B, longest + max_new_tokens, dtype, device)
        self.slots = torch.arange(longest + max_new_tokens, device=device)                                   # (M,)
        self.token = torch.zeros(B, 1, dtype=torch.int64, device=device)
        self.slot = self.slots[longest:longest + 1].clone()                                                  # (1,)
        self.graph, self.wants_graph = None, graph
        if graph:
            self.cache.k.zero_(), self.cache.v.zero_()        # all slots are attended to, and 0 · NaN would be NaN
        else:
            self.cache.seen = longest                         # one more with every step

    def prefill(self):
        """Reads the prompts into the cache. Returns the logits (B, V) of every row's first new token."""
        T, (tokens, padding) = self.prompts.shape[1], (x[self.read] for x in (self.prompts, self.padding))
        positions = mask = None                               # the model's own where no row is padded: 0..T-1, causal
        if self.padded:
            slot = self.slots[:T]
            positions = (slot - padding).clamp(min=0)                                 # (B', T)
            # padding sees itself, so that no row of the mask is empty
            real = (slot >= padding)[:, None, None] | torch.eye(T, dtype=torch.bool, device=slot.device)
            mask = real & (slot <= slot[:, None])                                     # (B', 1, T, T)
        if len(tokens) == len(self.prompts):
            hidden = self.model(tokens, positions, mask, self.cache, return_hidden=True)
        else:
            self.keep_preferences(self.read)
            once = KVCache(self.model.config, len(tokens), T, self.cache.k.dtype, tokens.device)
            hidden = self.model(tokens, positions, mask, once, return_hidden=True)
            self.cache.k[:, :, :, :T], self.cache.v[:, :, :, :T] = once.k[:, self.reads], once.v[:, self.reads]
            self.keep_preferences(self.reads)                                         # B' -> B, as they were
        self.cache.slot = self.slot
        return self.head(hidden[:, -1])[self.reads]

    def _step(self):
        """The decode step as a function of the tensors token, slot, padding and cache alone."""
        slots = self.slots[:self.cache.seen]
        seen = (slots >= self.padding) & (slots <= self.slot)                         # (B, M)
        bias = torch.zeros_like(seen, dtype=self.cache.k.dtype).masked_fill_(~seen, -torch.inf)
        hidden = self.model(self.token, self.slot - self.padding, bias[:, None, None], self.cache, return_hidden=True)
        return self.head(hidden[:, 0])

    def step(self, token):
        """token (B,): the last one of each row. Returns the next one's logits (B, V)."""
        self.token.copy_(token[:, None])
        if self.wants_graph and self.graph is None:
            try:
                self._capture()
            except Exception as e:                            # of torch, CUDA or Triton: the step below raises it again
                fused.turn_off("CUDA graph", self.token.device, fused.first_line(e))      # where the step is at fault
                self.wants_graph, self.cache.seen = False, self.prompts.shape[1]
        if not self.wants_graph:
            self.cache.seen += 1
        if self.graph is None:
            logits = self._step()
        else:
            self.graph.replay()
            logits = self.logits
        self.slot += 1
        return logits

    def _capture(self):
        """Records _step once. It runs before that, because libraries allocate memory and choose algorithms on their
        first call, which cannot be recorded; it may, because a repeated step only writes the same slot again."""
        with torch.cuda.device(self.token.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.logits = self._step()
        self.graph = graph

    def keep(self, rows):
        """Drops all rows but these, (n,) indices: the i-th becomes row i, and is either there already or comes from
        behind the n-th, so that few keys and values are copied."""
        self.token, self.padding, n = self.token[rows], self.padding[rows], len(rows)
        to = (rows != torch.arange(n, device=rows.device)).nonzero()[:, 0]
        for name in ("k", "v"):
            held = getattr(self.cache, name)                                          # (layers, B, K, M, C)
            held[:, to, :, :self.cache.seen] = held[:, rows[to], :, :self.cache.seen]
            setattr(self.cache, name, held[:, :n])
        self.keep_preferences(rows)

    def keep_preferences(self, rows):
        """Of a model with one preference per row: gives it those of these rows, (n,) indices."""
        for layer in self.model.modules():
            if isinstance(layer, FastLinear) and layer.factors is not None:
                V, d, Ut = layer.factors
                layer.factors = V, d[rows] if d.ndim == 3 else d, Ut
        for layer in self.model.modules():
            if isinstance(layer, OneToken):
                layer.stack_d()


# ---------------------------------------------------------------------------------------------------------------------
# Sampling.

class Mixture(nn.Module):
    """Several models as one policy, token by token: log π(y_t | …) = log_softmax_V(Σ_i w_i log π_i(y_t | …)). It takes
    a Transformer's place in log-probs (data/trees.py) and in generate().

    With w = (1 − A, A λ_1, …, A λ_m) of π_ref and m specialists it is MOD, multi-objective decoding (Shi et al.,
    arXiv:2406.18853), with a factor A: log π = log_softmax(log π_ref + A Σ_i λ_i (log π_i − log π_ref)). Under linear
    scalarisation, RLHF's specialists π_i ∝ π_ref exp(r_i / β) mixed so *as distributions over whole responses* are, for
    A = 1, the optimum π_ref exp(Σ λ_i r_i / β) itself. Token by token they are not: log π_i of a token has a normaliser
    that depends on the tokens before it, and these do not cancel.

    The softmax ignores what is equal for all tokens of the vocabulary, so logits may stand for log-probs; these are
    linear in the last hidden state, and the models share the head, because adapters stand inside the blocks alone. So
    the mixture's hidden state is the weighted sum of theirs, and nothing of size V is mixed. The sum stays in fp32:
    models that differ a little are few steps of bf16 apart, and it would round away what lies between them.
    """

    def __init__(self, models, weights):
        """models: of one config and one head   weights: one number for each, Σ = 1; models of weight 0 are left out."""
        super().__init__()
        kept = [(model, w) for model, w in zip(models, weights, strict=True) if w]
        self.models, self.weights = nn.ModuleList(model for model, _ in kept), [w for _, w in kept]
        self.config, self.embed, self.head_weight = models[0].config, models[0].embed, models[0].head_weight

    def forward(self, tokens, positions=None, mask=None, return_hidden=False):        # (B, T) -> (B, T, V) or (B, T, D)
        parts = zip(self.models, self.weights)
        hidden = sum(w * fused.wide(model(tokens, positions, mask, return_hidden=True)) for model, w in parts)
        return hidden if return_hidden else fused.linear(hidden, self.head_weight.to(hidden.dtype))


def sample_token(logits, temperature, top_p, uniform=None):
    """One token per row from logits (B, V): the best for temperature 0, else from the nucleus of mass top_p. -> (B,)

    uniform: (B,) random numbers in [0, 1); not needed for temperature 0. Logits that are not finite give some token.
    """
    assert temperature >= 0 and 0 < top_p <= 1
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        probs, ids = probs.sort(-1, descending=True)
    # Inverse distribution function: the first token whose cumulated mass exceeds u · total. There always is one, with
    # any rounding, since u <= 1 - 2^-24; and it is never a token without mass.
    mass = probs.cumsum(-1)                                                           # (B, V)
    # the nucleus is the smallest set of best tokens that reaches top_p: its last token is the first to reach it
    last = (mass < top_p).sum(-1, keepdim=True).clamp(max=mass.shape[-1] - 1) if top_p < 1 else None
    total = mass[:, -1:] if top_p == 1 else mass.gather(-1, last)
    drawn = torch.searchsorted(mass, total * uniform[:, None], right=True)            # (B, 1)
    drawn = drawn.clamp(max=mass.shape[-1] - 1)                                       # V, where the masses are NaN
    return (drawn if top_p == 1 else ids.gather(-1, drawn))[:, 0]


def generate(model, prompts, max_new_tokens, temperature=1.0, top_p=1.0, eos_id=None, generator=None, own=None,
             show=iter, **more):
    """Continues every prompt until EOS or max_new_tokens. temperature 0 is greedy.

    The arguments are those of stream(), and so are the errors. Returns a list of token lists, the new tokens alone; one
    that ends in EOS stopped by itself. show: is given the steps, and gives them back one by one (a bar). A tiny model
    continues the rows in as many parts as there are cores, side by side: these are the same random numbers.
    """
    ends, own = ends_of(model, eos_id), range(len(prompts)) if own is None else own
    out = torch.zeros(len(own), max_new_tokens, dtype=torch.int64, device=model.embed.weight.device)
    seeded = temperature == 0 or generator is not None and generator.device.type == "cpu"
    n = torch.get_num_threads() if is_tiny(model) and seeded and show is iter else 1
    parts = torch.arange(len(own)).chunk(n)                                           # of the rows

    @torch.inference_mode()
    def work(part):
        g, i = generator if len(parts) == 1 or generator is None else generator.clone_state(), 0
        steps = stream(model, prompts, max_new_tokens, temperature, top_p, ends, g, own=[own[j] for j in part],
                       rows=None if len(parts) == 1 else part, **more)
        for i, (rows, token) in enumerate(show(steps)):
            out[part[rows.cpu()], i] = token
        return i, g

    _, last = max(side_by_side(work, parts), key=lambda done: done[0])                # the part with the most steps
    if last is not generator:
        generator.set_state(last.get_state())
    return [row[:next((i + 1 for i, token in enumerate(row) if token in ends), None)] for row in out.tolist()]


def is_tiny(model):
    """Whether each core of a CPU is to compute rows of its own by the whole model, side by side (ops/threads.py)."""
    return model.embed.weight.device.type == "cpu" and model.config.d_model <= TINY


def ends_of(model, eos_id):
    """The tokens that end a row: eos_id, one or several; None: the config's; -1: none."""
    if eos_id is None:
        eos_id = -1 if model.config.eos_id is None else model.config.eos_id
    return [i for i in ([eos_id] if isinstance(eos_id, int) else eos_id) if i >= 0]


@torch.inference_mode()
def stream(model, prompts, max_new_tokens, temperature=1.0, top_p=1.0, eos_id=None, generator=None, pack=None,
           own=None, vocab_size=None, rows=None):
    """generate(), token by token: yields (rows, token), both (B,): the rows that still continue, and what each says
    next. A row that has ended may go on for some steps, until it is dropped.

    model: a Transformer, or a Mixture: every model of it keeps its own KV cache and reads the one token that is drawn.
    prompts: list of token lists, of any lengths >= 1; a row's logits do not depend on the others. eos_id: as in
    ends_of(). generator: on any device; the same seed gives the same tokens.
    pack: copy the weights into a faster layout for this call, which takes their memory once more, for a quantised base
    that of the dense weights (None: on a CPU, if max_new_tokens is large enough to gain by it).
    own: indices of prompts: these alone are continued, by the random numbers that they have among all. So several
    processes that share the prompts out sample what one would; and a prompt that is there twice is answered by the same
    numbers.
    rows: where each row has a λ of its own, which of them are those of own (None: all, in order).
    vocab_size: only smaller ids are drawn. Models have more where their matrices are padded: no text has those.
    Raises ValueError where prompt and new tokens exceed the context, and at the end FloatingPointError where the
    model's logits were not finite.
    """
    config, device = model.config, model.embed.weight.device
    ends, shortest, longest = ends_of(model, eos_id), min(map(len, prompts)), max(map(len, prompts))
    if shortest < 1 or longest + max_new_tokens > config.context_length:
        raise ValueError(f"{max_new_tokens} new tokens in a context of {config.context_length} need prompts of 1 to "
                         f"{config.context_length - max_new_tokens} tokens; these have {shortest} to {longest}")
    drawn, own = len(prompts), range(len(prompts)) if own is None else own
    prompts = [prompts[j] for j in own]
    if max_new_tokens == 0 or not prompts:
        return
    if generator is not None and generator.device.type != device.type:
        seed = torch.randint(2 ** 62, (), generator=generator, device=generator.device).item()
        generator = torch.Generator(device).manual_seed(seed)
    on_cpu, B = device.type == "cpu", len(prompts)
    pack = on_cpu and max_new_tokens >= PACK_STEPS if pack is None else pack
    models, weights = (model.models, model.weights) if isinstance(model, Mixture) else ([model], [1.0])
    graph = device.type == "cuda" and fused.on("CUDA graph")
    decoders = [Decoder(each, prompts, max_new_tokens, graph, pack, rows) for each in models]
    # (B, V): the mixture's log-probs, but for a number that all tokens share
    mixed = lambda logits: sum(w * fused.wide(each) for w, each in zip(weights, logits))
    logits = mixed(decoder.prefill() for decoder in decoders)
    rows = torch.arange(B, device=device)                                             # those still in the batch
    own = torch.tensor(own, device=device)                                            # (B,)
    done = torch.zeros(B, dtype=torch.bool, device=device)
    stop, finite = torch.tensor(ends, device=device), torch.ones((), dtype=torch.bool, device=device)
    for i in range(max_new_tokens):
        # a number for every prompt in every step, also for rows that were dropped: so dropping rows changes no sample
        uniform = torch.rand(drawn, generator=generator, device=device)[own[rows]] if temperature > 0 else None
        logits = logits[:, :vocab_size]
        finite &= logits.amax(dim=1).isfinite().all()                                 # read when all is done
        token = sample_token(logits, temperature, top_p, uniform)
        yield rows, token
        if i + 1 == max_new_tokens:
            break
        done |= (token[:, None] == stop).any(-1)
        if ends and (on_cpu or i % SYNC_EVERY == SYNC_EVERY - 1):
            left = len(done) - int(done.sum())
            if left == 0:
                break
            if on_cpu and left <= KEEP * len(done):
                going = torch.arange(left)                    # the first rows, and in place of ended ones those behind
                going[done[:left]] = left + (~done[left:]).nonzero()[:, 0]
                for decoder in decoders:
                    decoder.keep(going)
                token, rows, done = token[going], rows[going], done[going]
        logits = mixed(decoder.step(token) for decoder in decoders)
    if not finite:
        raise FloatingPointError("the model's logits are not finite: its weights are damaged, or too large for their "
                                 "precision (--precision fp32), or a training has diverged")
