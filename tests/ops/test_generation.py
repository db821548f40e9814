"""test_generation.py - generate() against recomputation, the decode step, packed weights, the sampling distribution."""
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.fx.experimental.proxy_tensor import make_fx

from model import SIZES, Transformer, generate
from ops import fused, generation
from ops.generation import KEEP, Decoder, FastLinear, Mixture, sample_token, stream
from ops.threads import side_by_side
from svd_lora import SVDLoRALinear, adapters_off, inject_svd_lora, set_preference, svd_lora_layers

HF = Path(__file__).parents[3] / "shared" / "oracles" / "data" / "hf"
families = pytest.mark.parametrize("family", ["gpt2", "llama"])
all_families = pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
PROMPTS = [[3], [4, 5, 6, 7, 8, 9, 10], [11, 12, 13], [3, 4]]
LAM = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5], [0.2, 0.8]])                  # one preference for each prompt


@pytest.fixture
def talker(tiny):
    """A random model that says various things: a tied head would echo the input. In float64 no tie turns on noise."""
    def build(family, adapter=False):
        model = Transformer(replace(tiny(family).config, tied=False)).init_weights(torch.Generator().manual_seed(0))
        for p in model.parameters():
            p.data *= 20 if p.ndim == 2 else 1
        if adapter:
            inject_svd_lora(model, k=2, m=2, lora_scaling=2.0, generator=torch.Generator().manual_seed(1))
            for layer in svd_lora_layers(model).values():
                for p in (layer.U, layer.V):
                    p.data *= 50
                layer.sigma.data.fill_(0.1), layer.s.data.fill_(0.5)
        return model.double()
    return build


@torch.no_grad()
def naive(model, prompt, n):
    """Greedy, everything recomputed for every token."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
    return tokens[len(prompt):]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------------------
# generate() against recomputation.

@pytest.mark.parametrize("own", [[1], [0, 2], [3, 1], [0, 1, 2, 3], []])
def test_some_of_the_prompts_get_the_tokens_that_they_have_among_all(talker, own):
    """Each with its λ, and with rows that end and are dropped."""
    model, new = talker("llama", adapter=True), 20
    set_preference(model, LAM)
    whole = generate(model, PROMPTS, new, eos_id=5, generator=seeded(3))
    lengths = {len(y) for y in whole}
    set_preference(model, LAM[own] if own else LAM)
    assert generate(model, PROMPTS, new, eos_id=5, generator=seeded(3), own=own) == [whole[j] for j in own]
    assert len(lengths) > 1
    if own == [3, 1]:                                                                 # wrong: numbers of its own
        assert generate(model, [PROMPTS[j] for j in own], new, eos_id=5, generator=seeded(3)) != [whole[3], whole[1]]


@pytest.fixture
def cores():
    """Lets torch have a number of threads, and what it had afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_in_parts_side_by_side_get_the_same_tokens(talker, cores, temperature):
    """Each with its λ; the generator has drawn what the longest part has drawn, as with one part."""
    model, said = talker("llama", adapter=True), {}
    set_preference(model, LAM.double())
    cores(1)
    full = generate(model, PROMPTS, 20, temperature, eos_id=-1, generator=seeded(5))
    for n in (1, 2, 3):
        cores(n)
        g = seeded(5)
        tokens = generate(model, PROMPTS, 20, temperature, eos_id=[full[0][4], full[3][9]], generator=g)
        said[n] = tokens, g.get_state().tolist(), torch.get_num_threads()
    assert said[1][:2] == said[2][:2] == said[3][:2] and [said[n][2] for n in said] == [1, 2, 3]
    lengths = list(map(len, said[1][0]))
    assert len(set(lengths)) > 1, "all rows end together: dropping and the longest part are not tried"


def test_what_fails_in_one_part_fails(cores):
    cores(2)
    with pytest.raises(ZeroDivisionError):
        list(side_by_side(lambda x: 1 // x, [1, 0, 2]))
    assert list(side_by_side(lambda x: torch.get_num_threads() + x, [0, 1, 2])) == [1, 2, 3]
    assert torch.get_num_threads() == 2


def test_the_stream_is_what_generate_says(talker):
    """Token by token, until every row has ended; a prompt that is there twice draws the same numbers."""
    model, said, going = talker("llama"), [[] for _ in PROMPTS], []
    whole = generate(model, PROMPTS, 20, eos_id=5, generator=seeded(3))
    for rows, token in stream(model, PROMPTS, 20, eos_id=5, generator=seeded(3)):
        going.append(len(rows))
        for row, t in zip(rows.tolist(), token.tolist()):
            said[row].append(t)
    assert [y[:len(x)] for x, y in zip(whole, said)] == whole and len(going) == max(map(len, whole))
    assert going[0] == len(PROMPTS) > going[-1]                                       # rows that have ended are dropped
    twice = generate(model, PROMPTS, 20, eos_id=-1, generator=seeded(3), own=[1, 1])
    assert twice[0] == twice[1] and len(set(twice[0])) > 1
    alone = generate(model, [PROMPTS[1]] * 2, 20, eos_id=-1, generator=seeded(3))     # wrong: numbers of its own
    assert alone[0] != alone[1]


@pytest.mark.skipif(not HF.exists(), reason="shared/oracles/data/hf is not beside the repository")
@pytest.mark.parametrize("name", sorted(d.name for d in HF.iterdir()) if HF.exists() else ["none"])
def test_golden_generation(name, monkeypatch):
    """The stored path is greedy over the vocabulary without EOS, which min_new_tokens excluded; so it is here."""
    model = Transformer.from_pretrained(HF / name, dtype=torch.float32)
    expected = {k: torch.from_numpy(v) for k, v in np.load(HF / name / "expected.npz").items()}
    eos = torch.arange(model.config.vocab_size) == 2
    monkeypatch.setattr(generation, "sample_token",
                        lambda logits, *args, **kw: sample_token(logits.masked_fill(eos, -1e9), *args, **kw))
    prompts = [row[real].tolist() for row, real in zip(expected["prompt"], expected["prompt_mask"].bool())]
    assert len(prompts[0]) != len(prompts[1])
    assert generate(model, prompts, 32, temperature=0) == expected["greedy"].tolist()


@all_families
def test_generation_equals_recomputation(family, talker):
    """Wrong: padding counted as positions or seen, a key written to a neighbouring slot, a slot seen too early."""
    model = talker(family)
    expected = [naive(model, prompt, 20) for prompt in PROMPTS]
    assert len({tuple(row) for row in expected}) == 4 and len(set(sum(expected, []))) > 10
    assert generate(model, PROMPTS, 20, temperature=0) == expected
    assert [generate(model, [prompt], 20, temperature=0)[0] for prompt in PROMPTS] == expected


@families
@pytest.mark.parametrize("pack", [False, True])
def test_every_row_has_its_own_preference(family, pack, talker):
    """Wrong: the first row's λ for all rows, the adapter left out, λ not cut down with the rows."""
    model = talker(family, adapter=True)
    alone = []
    for prompt, lam in zip(PROMPTS, LAM):
        set_preference(model, lam)
        alone.append(naive(model, prompt, 12))
        assert generate(model, [prompt], 12, temperature=0, pack=pack) == alone[-1:]          # d is (r,)
    set_preference(model, LAM)
    assert generate(model, PROMPTS, 12, temperature=0, pack=pack) == alone               # d is (B, 1, r)
    for eos in set(sum(alone, [])):                                                   # rows end early in various orders
        assert generate(model, PROMPTS, 12, temperature=0, pack=pack, eos_id=eos) == [cut(row, eos) for row in alone]
    set_preference(model, LAM.flip(0))
    assert generate(model, PROMPTS, 12, temperature=0, pack=pack) != alone
    with adapters_off(model):
        base = generate(model, PROMPTS, 12, temperature=0, pack=pack)
        assert base == [naive(model, prompt, 12) for prompt in PROMPTS] != alone


@families
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("factor", [1.0, 1.5])
@torch.no_grad()
def test_a_mixture_is_the_definition(family, pack, factor, talker, close):
    """MOD by full forwards: log_softmax(log π_ref + A Σ λ_i (log π_i − log π_ref)). Wrong: another λ, no factor, a
    specialist alone, probabilities mixed, one cache for all."""
    models, lam = [talker(family), talker(family, adapter=True), talker(family, adapter=True)], (0.3, 0.7)
    for model, end in zip(models[1:], torch.eye(2)):
        set_preference(model, end)
        for layer in svd_lora_layers(model).values():
            layer.U.data *= 2

    def definition(tokens, lam=lam, A=factor):
        ref, *logps = (model(tokens).log_softmax(-1) for model in models)
        return (ref + A * sum(w * (logp - ref) for w, logp in zip(lam, logps))).log_softmax(-1)

    mixture = Mixture(models, [1 - factor, factor * lam[0], factor * lam[1]])
    assert len(mixture.models) == (2 if factor == 1 else 3)              # the base has no weight then
    tokens = torch.tensor([PROMPTS[1]])
    logps, expected = mixture(tokens).log_softmax(-1), definition(tokens)
    assert close(logps, expected, 1e-10)
    probs = sum(w * model(tokens).softmax(-1) for w, model in zip(lam, models[1:])).log()
    for wrong in (definition(tokens, lam[::-1]), definition(tokens, A=2.5 - factor), probs, models[1](tokens)):
        assert not close(wrong.log_softmax(-1), expected, 1e-3)

    greedy = [naive(definition, prompt, 12) for prompt in PROMPTS]
    assert generate(mixture, PROMPTS, 12, temperature=0, pack=pack) == greedy
    assert greedy not in [[naive(model, prompt, 12) for prompt in PROMPTS] for model in models]
    for eos in set(sum(greedy, [])):                                     # rows leave all caches together
        assert generate(mixture, PROMPTS, 12, temperature=0, pack=pack, eos_id=eos) == [cut(row, eos) for row in greedy]


@torch.no_grad()
def test_a_mixture_in_bf16_keeps_small_updates(talker, close, monkeypatch):
    """What two specialists in bf16 change together of the base's log-probs is what the exact sum of their states, or
    in generation of their logits, says. Wrong: that sum in bf16; or rounded to bf16 at its end."""
    models = [talker("llama"), talker("llama", adapter=True), talker("llama", adapter=True)]
    for model, end in zip(models[1:], torch.eye(2)):
        set_preference(model, end)
        for layer in svd_lora_layers(model).values():
            layer.U.data *= 0.001
    models, w = [model.bfloat16() for model in models], (0.4, 0.18, 0.42)
    mixture, head = Mixture(models, w), models[0].head_weight
    tokens, targets = torch.tensor([PROMPTS[1] * 4]), torch.arange(28) % 61
    states = [model(tokens, return_hidden=True)[0] for model in models]
    logp = lambda states: fused.linear_logprob_plain(states.double(), head.double(), targets)
    exact, base = sum(x * each.double() for x, each in zip(w, states)), logp(states[0])
    expected = logp(exact) - base
    assert 0.02 < expected.abs().max() < 0.2                                          # an update, and a small one
    hidden = mixture(tokens, return_hidden=True)[0]
    assert close(fused.linear_logprob(hidden, head, targets).double() - base, expected, 1e-4)
    logits = mixture(tokens)[0].double().log_softmax(-1)
    assert close(logits.gather(1, targets[:, None])[:, 0] - base, expected, 1e-4)
    for wrong in (sum(x * each for x, each in zip(w, states)), exact.bfloat16(), states[0]):
        assert not close(logp(wrong) - base, expected, 0.02)

    seen = []
    monkeypatch.setattr(generation, "sample_token", lambda logits, *args: seen.append(logits) or logits.argmax(-1))
    for policy in (mixture, *models):
        generate(policy, PROMPTS[:1], 1, temperature=0)
    ours, *each = seen
    assert close(ours.double(), sum(x * one.double() for x, one in zip(w, each)), 1e-6)
    assert not close(sum(x * one.bfloat16() for x, one in zip(w, each)).double(), ours.double(), 1e-4)


@pytest.mark.parametrize("pack", [False, True])
def test_a_prompt_with_several_answers_is_read_once(pack, talker, monkeypatch):
    """Neighbours with one prompt and one λ, padded and not; the same prompt under another λ is read again."""
    model, read, forward = talker("llama", adapter=True), [], Transformer.forward
    one_by_one = []
    order = [0, 0, 1, 1, 1, 1, 3]                                                     # of PROMPTS and of LAM, but
    lam = LAM[order].double()
    lam[4:6] = LAM[2].double()                                                        # prompt 1 has two λ
    for j, x in zip(order, lam):
        set_preference(model, x)
        one_by_one += generate(model, [PROMPTS[j]], 20, temperature=0)

    def record(self, tokens, *args, **kwargs):
        read.append(tuple(tokens.shape))
        return forward(self, tokens, *args, **kwargs)

    monkeypatch.setattr(Transformer, "forward", record)
    set_preference(model, lam)
    assert generate(model, [PROMPTS[j] for j in order], 20, temperature=0, pack=pack, show=list) == one_by_one
    assert read[0] == (4, 7) and set(read[1:]) == {(7, 1)} and len(set(map(tuple, one_by_one))) == 4


def test_a_preference_must_be_set(talker):
    with pytest.raises(RuntimeError, match="set_preference"):
        generate(talker("llama", adapter=True), PROMPTS, 4)


def test_generation_leaves_the_model_alone(talker):
    """Wrong: Linears replaced in the model itself, or its tensors repacked in place."""
    model = talker("gpt2", adapter=True)
    set_preference(model, LAM)
    modules, weights = list(model.modules()), {k: (v.data_ptr(), v.clone()) for k, v in model.state_dict().items()}
    generate(model, PROMPTS, 20)
    assert list(map(id, model.modules())) == list(map(id, modules))
    assert all(v.data_ptr() == weights[k][0] and torch.equal(v, weights[k][1]) for k, v in model.state_dict().items())
    assert model(torch.tensor([[1], [2], [3], [4]])).requires_grad                    # still to be trained


def cut(row, eos):
    return row[:row.index(eos) + 1] if eos in row else row


@families
def test_generation_stops_at_eos(family, talker):
    model = talker(family)
    full = generate(model, PROMPTS, 20, temperature=0)
    assert model.config.eos_id is None and {len(row) for row in full} == {20}
    eos = full[1][4]
    expected = [cut(row, eos) for row in full]
    assert len(expected[1]) <= 5 and len({len(row) for row in expected}) > 1
    assert generate(model, PROMPTS, 20, temperature=0, eos_id=eos) == expected
    model.config.eos_id = eos                                                         # the default
    assert generate(model, PROMPTS, 20, temperature=0) == expected
    assert generate(model, PROMPTS, 20, temperature=0, eos_id=-1) == full


@families
def test_any_of_several_ends_stops(family, talker):
    model = talker(family)
    full = generate(model, PROMPTS, 20, temperature=0)
    ends = (full[1][4], full[2][6], full[0][2])
    expected = [row[:min([row.index(end) for end in ends if end in row], default=20) + 1] for row in full]
    assert len({row[-1] for row in expected}) > 1 and expected != [cut(row, ends[0]) for row in full]
    assert generate(model, PROMPTS, 20, temperature=0, eos_id=ends) == expected


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("temperature, top_p", [(0, 1.0), (1.0, 1.0), (1.0, 0.9)])
def test_no_padded_row_of_the_vocabulary_is_drawn(talker, temperature, top_p, graph, monkeypatch):
    """Ids from 40 on are those that no text has; here they are the likeliest. Also where the step is replayed, as on a
    GPU."""
    if graph:
        monkeypatch.setattr(generation, "Decoder", lambda *args: replayed(Decoder(*args)))
    model = talker("llama")
    model.head_weight.data[40:] = 3 * model.head_weight.data[:21]
    draw = lambda **more: generate(model, PROMPTS * 8, 12, temperature, top_p, eos_id=-1, generator=seeded(0), **more)
    assert max(map(max, draw(vocab_size=40))) < 40 < max(map(max, draw()))
    assert draw(vocab_size=61) == draw()


def replayed(decoder):
    """The decoder with what stands for a graph: a step that writes its logits into one tensor."""
    def replay():
        decoder.logits.copy_(decoder._step())

    def capture():
        decoder.logits, decoder.graph = decoder._step(), types.SimpleNamespace(replay=replay)
    decoder.wants_graph, decoder._capture, decoder.cache.seen = True, capture, decoder.cache.k.shape[3]
    decoder.cache.k.zero_(), decoder.cache.v.zero_()                                  # as where a graph is wanted
    return decoder


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_an_error(talker, bad):
    """Wrong: ids of a damaged model, or an index past the vocabulary, which a GPU dies of."""
    logits = torch.zeros(2, 7)
    logits[0, 3] = bad
    for temperature, top_p in ((0, 1.0), (1.0, 1.0), (1.0, 0.9)):
        assert all(0 <= token < 7 for token in sample_token(logits, temperature, top_p, torch.rand(2)).tolist())
        model = talker("llama")
        model.head_weight.data[3] = bad
        with pytest.raises(FloatingPointError, match="the model's logits are not finite"):
            generate(model, PROMPTS, 20, temperature, top_p)
    model.head_weight.data[3] = 0
    assert generate(model, PROMPTS, 20)                                               # -inf alone would be no error
    assert sample_token(torch.tensor([[0.0, -torch.inf]]), 1.0, 1.0, torch.tensor([0.9])).tolist() == [0]


def test_dropping_rows_changes_no_sample(talker, monkeypatch):
    """Rows that have ended leave the batch; the others continue with their own random numbers, keys and values.
    Wrong: as many numbers per step as rows are left; the cache, padding or last tokens not cut down alike."""
    sizes, keep = [], Decoder.keep
    monkeypatch.setattr(Decoder, "keep", lambda self, rows: (sizes.append(len(rows)), keep(self, rows)))
    model = talker("llama")
    for seed in range(5):
        full = generate(model, PROMPTS * 4, 20, eos_id=-1, generator=seeded(seed))
        eos = full[0][3]
        assert generate(model, PROMPTS * 4, 20, eos_id=eos, generator=seeded(seed)) == [cut(row, eos) for row in full]
    assert sizes and max(sizes) <= KEEP * len(PROMPTS * 4)


def test_generation_does_no_more_than_it_must(talker, cores, monkeypatch):
    """The prompts once, then one token per step, until all rows are done; and every query has something to look at."""
    calls, forward = [], Transformer.forward
    cores(1)

    def record(self, tokens, positions, mask, *args, **kwargs):
        calls.append((tokens.shape, mask))
        return forward(self, tokens, positions, mask, *args, **kwargs)

    monkeypatch.setattr(Transformer, "forward", record)
    model = talker("llama")
    full = generate(model, PROMPTS[:2], 20, temperature=0)
    assert [shape for shape, _ in calls] == [(2, 7)] + [(2, 1)] * 19
    assert calls[0][1].any(-1).all() and all((mask == 0).any(-1).all() for _, mask in calls[1:])      # else NaN
    calls.clear()
    generate(model, [PROMPTS[1]], 20, temperature=0, eos_id=full[1][4])
    assert len(calls) == full[1].index(full[1][4]) + 1 < 20
    assert calls[0][1] is None                                                        # nothing padded: no mask is built


def test_generation_refuses_what_does_not_fit(tiny):
    model = tiny("gpt2")
    assert generate(model, [[1], [2, 3]], 0) == [[], []]
    assert len(generate(model, [[1] * 12], 20)[0]) == 20                              # exactly the context of 32
    for prompts in ([[1] * 13], [[1], []]):
        with pytest.raises(ValueError, match="1 to 12 tokens"):
            generate(model, prompts, 20)


# ---------------------------------------------------------------------------------------------------------------------
# The decode step.

@torch.no_grad()
def forced(model, decoder, tokens):
    """The decoder's logits before and after each of `tokens` (B, n), (B, n + 1, V), and what full forwards give."""
    logits = [decoder.prefill()] + [decoder.step(column) for column in tokens.T]
    rows = [torch.tensor([prompt + row]) for prompt, row in zip(PROMPTS, tokens.tolist())]
    return (torch.stack([x.clone() for x in logits], dim=1),
            torch.stack([model(row)[0, -1 - tokens.shape[1]:] for row in rows]))


@all_families
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_the_decode_step_equals_a_forward(family, pack, dtype, tolerance, tiny, close, monkeypatch):
    """All slots under a mask, against a plain forward of each row alone."""
    monkeypatch.setattr(generation, "PACK_FROM", 0)                                   # these weights are small
    model = tiny(family, dtype=dtype)
    tokens = torch.randint(61, (4, 20), generator=seeded(0))
    ours, theirs = forced(model, Decoder(model, PROMPTS, 20, pack=pack), tokens)
    assert close(ours.float(), theirs.float(), tolerance)
    assert not close(ours[:, 1:].float(), theirs[:, :-1].float(), 0.3)                # wrong: one position behind


@all_families
def test_the_decode_step_can_be_replayed(family, tiny, close):
    """What a CUDA graph needs, without CUDA: the operations of one step, recorded and run again, are all later steps,
    and to run a step before its time does no harm. Wrong: a position, a slot or a length that is a Python number."""
    class Replay:
        def __init__(self, decoder):
            with torch.no_grad():
                decoder._step(), decoder._step()                                      # as before a capture
                self.recorded, self.decoder = make_fx(lambda: decoder._step())(), decoder

        def replay(self):
            self.decoder.logits = self.recorded()

    model = tiny(family)
    inject_svd_lora(model, k=2, m=2, lora_scaling=2.0, generator=seeded(1))
    for layer in svd_lora_layers(model).values():
        layer.sigma.data.fill_(1.0), layer.s.data.fill_(1.0)
    set_preference(model, LAM)
    tokens = torch.randint(61, (4, 8), generator=seeded(0))
    with torch.no_grad():
        decoder, plain = Decoder(model, PROMPTS, 8, graph=True), Decoder(model, PROMPTS, 8)
        decoder._capture = lambda: setattr(decoder, "graph", Replay(decoder))
        assert close(decoder.prefill(), plain.prefill())
        for column in tokens.T:
            assert close(decoder.step(column), plain.step(column))
    assert decoder.graph is not None and plain.graph is None


# ---------------------------------------------------------------------------------------------------------------------
# Fast products.

def layers(dtype):
    """A Linear, one without bias, an SVDLoRALinear with one λ per row and one with one for all; and x (4, 3, 256)."""
    torch.manual_seed(0)
    plain, bare = nn.Linear(256, 300).to(dtype), nn.Linear(256, 300, bias=False).to(dtype)
    rows, shared = (SVDLoRALinear(x, 8, 2, 64.0) for x in (plain, bare))
    for layer, lam in ((rows, LAM), (shared, LAM[2])):
        layer.sigma.data.normal_(), layer.s.data.fill_(2.0)
        layer.lam = lam
    return (plain, bare, rows, shared), torch.randn(4, 3, 256).to(dtype)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.01), (torch.float64, 1e-12)])
@torch.no_grad()
def test_packed_products_are_the_same(dtype, tolerance, close):
    """Wrong: a bias left out or cut, V's product taken for outputs, d of another row."""
    for layer in layers(dtype)[0]:
        x = layers(dtype)[1]
        for pack in (False, True):
            fast = generation.fast_copy(layer, pack)
            assert close(fast(x).double(), layer(x).double(), tolerance)
            assert not fast.packed or (pack and dtype != torch.float64)
        if dtype == torch.float32 and torch.backends.mkldnn.is_available():
            assert fast.packed                                                        # or this test tests nothing


@torch.no_grad()
def test_private_operators_may_be_missing(monkeypatch, close):
    (plain, *_, shared), x = layers(torch.float32)
    packed = [generation.fast_copy(layer, True)(x) for layer in (plain, shared)]
    monkeypatch.setattr(torch.ops, "mkldnn", types.SimpleNamespace())
    for layer, before in zip((plain, shared), packed):
        fast = generation.fast_copy(layer, True)
        assert not fast.packed and close(fast(x), before, 1e-5)


def test_small_weights_and_short_calls_are_not_packed(tiny, monkeypatch):
    made = []
    monkeypatch.setattr(generation, "Decoder", lambda *args: made.append(Decoder(*args)) or made[-1])
    model = Transformer(replace(SIZES["tiny"], n_layer=1)).init_weights(seeded(0))
    for new in (generation.PACK_STEPS - 1, generation.PACK_STEPS):
        generate(model, PROMPTS, new)
    short, long = ([m.packed for m in decoder.model.modules() if isinstance(m, FastLinear)] for decoder in made)
    assert not any(short)
    if torch.backends.mkldnn.is_available():
        assert long == [False] * 2 + [True] * 2                                       # q k v, o; up, down


# ---------------------------------------------------------------------------------------------------------------------
# Sampling.

def test_generation_draws_from_its_generator(talker):
    model = talker("llama")
    draw = lambda seed, **kw: generate(model, PROMPTS, 20, generator=seeded(seed), **kw)
    assert draw(1) == draw(1) != draw(2)
    assert draw(1, top_p=0.5) == draw(1, top_p=0.5) != draw(1)
    assert draw(1, temperature=0.5) != draw(1)
    assert draw(1, top_p=1e-6) == draw(2, temperature=0)                              # the best token alone
    state = torch.random.get_rng_state()
    draw(1)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(3)                                                              # None: torch's own
    assert generate(model, PROMPTS, 20) == (torch.manual_seed(3), generate(model, PROMPTS, 20))[1] != draw(1)


def chi_square(tokens, p):
    """Pearson's statistic over the tokens expected at least 5 times, and its number of degrees of freedom."""
    expected = p * len(tokens)
    often = expected >= 5
    terms = (tokens.bincount(minlength=len(p)) - expected).square() / expected
    return terms[often].sum().item(), often.sum().item()


@families
@torch.no_grad()
def test_tokens_are_distributed_as_the_model_says(family, tiny):
    """First token, and the second given the first. Wrong: the same random numbers in every step (the second token would
    hang on the first beyond the model), logits of another position, a temperature applied twice or not at all."""
    model = tiny(family)
    model.head_weight.data *= 0.5                                                     # spread over many tokens
    n = 10_000
    drawn = torch.tensor(generate(model, [[5, 6]] * n, 2, temperature=0.5, generator=seeded(0)))      # (n, 2)
    first = drawn[:, 0].bincount().argmax().item()
    seconds = drawn[drawn[:, 0] == first, 1]
    for tokens, prefix in ((drawn[:, 0], [5, 6]), (seconds, [5, 6, first])):
        statistic, free = chi_square(tokens, (model(torch.tensor([prefix]))[0, -1] / 0.5).softmax(-1))
        assert free > 5 and statistic < free + 5 * (2 * free) ** 0.5                 # 5 sigma
        statistic, free = chi_square(tokens, model(torch.tensor([prefix]))[0, -1].softmax(-1))
        assert statistic > free + 5 * (2 * free) ** 0.5                               # wrong: temperature 1


@pytest.mark.parametrize("temperature, top_p, expected", [
    (1.0, 1.0, [0.15, 0.5, 0.05, 0.3]), (1.0, 0.81, [0.15, 0.5, 0, 0.3]), (1.0, 0.79, [0, 0.5, 0, 0.3]),
    (1.0, 0.51, [0, 0.5, 0, 0.3]), (1.0, 0.49, [0, 1, 0, 0]), (0.5, 1.0, [0.0225, 0.25, 0.0025, 0.09]),
    (0.5, 0.9, [0, 0.25, 0, 0.09]), (0.5, 0.6, [0, 1, 0, 0])])
def test_sampling(temperature, top_p, expected):
    """The exact support of the nucleus, and frequencies within 5 sigma. Halving the temperature squares the ratios, and
    a nucleus is one of the tempered distribution."""
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().expand(20_000, 4) + 3
    drawn = sample_token(logits, temperature, top_p, torch.rand(20_000, generator=seeded(0)))
    assert drawn.shape == (20_000,)
    p = torch.tensor(expected) / sum(expected)
    frequency = drawn.bincount(minlength=4) / 20_000
    assert torch.equal(frequency > 0, p > 0)
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / 20_000).sqrt()).all()


def test_the_ends_of_the_distribution():
    """The smallest and the largest random number there are. Wrong: <= for < (draws a token without mass), an index past
    the last token where the masses sum to a little less than 1."""
    ends = torch.tensor([0.0, 1 - 2 ** -24])
    for seed in range(20):
        logits = torch.randn(1, 50_000, generator=seeded(seed)).expand(2, -1).clone()
        logits[:, :7] = logits[:, -9:] = -torch.inf
        for top_p in (1.0, 0.9):
            low, high = sample_token(logits, 1.0, top_p, uniform=ends).tolist()
            assert 7 <= low < 50_000 - 9 and 7 <= high < 50_000 - 9
        assert sample_token(logits, 1.0, 1.0, uniform=ends).tolist() == [7, 50_000 - 10]


def test_rows_are_sampled_from_their_own_logits():
    logits = torch.tensor([[0.0, 9, 1], [9, 0, 1], [0, 1, 9]]) * 10
    for temperature, top_p in ((0, 1.0), (1.0, 1.0), (1.0, 0.9)):
        assert sample_token(logits, temperature, top_p, torch.rand(3)).tolist() == [1, 0, 2]
    for temperature, top_p in ((-1.0, 1.0), (1.0, 0.0), (1.0, 1.1)):
        with pytest.raises(AssertionError):
            sample_token(logits, temperature, top_p)
