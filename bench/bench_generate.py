"""bench_generate.py - tokens/s of generate() beside transformers' generate() of the same weights, and the memory limit.

    python bench/bench_generate.py                                 # GPT-2 124M shape, 16 prompts of 64, 64 new, fp32
    python bench/bench_generate.py --dtype bf16 --adapter          # ours with an SVD-LoRA and one λ per row
    python bench/bench_generate.py --world --adapter --peer none   # the rollout of RL: 128 prompts, up to 56 tokens
    python bench/bench_generate.py --size llama2-7b --dtype bf16 --device cuda --batch 64 --adapter --peer none
    python bench/bench_generate.py --size llama2-7b --dtype bf16 --device cuda --quantize nf4 --adapter --peer none

First what both compute is compared: every token that ours calls the best must be the best of transformers' logits, up
to rounding. Then runs take turns (turns.py); the median of the runs is printed, and the median of the ratios. Sampled
at temperature 1 from the whole distribution. transformers runs without an adapter. `pip install transformers==5.23.0`,
or --peer none. OMP_NUM_THREADS sets the threads.

The limit: a decode step must read every weight but the input embeddings once, as codes where it is quantised (which a
CPU, multiplying dense copies, does not), the adapters, and keys and values of all slots. Its bytes over the copy
bandwidth of this device, measured here, is the least time a step can take.
"""
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.turns import DTYPES, alternate, clock
from data import toy
from data.base import find_base
from data.tokenizers import load_tokenizer, tokenize
from model import SIZES, Transformer, generate
from ops.generation import Decoder
from ops.quantize import QuantizedLinear, quantize_weight
from runs.files import UserError
from runs.flags import flag, run_main
from runs.processes import pick_device
from svd_lora import inject_svd_lora, set_preference


@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    size: Literal[tuple(SIZES)] = flag("125m", "model size, random weights")
    world: bool = flag(False, "the embedded world's base model (tiny) and prompts, up to EOS; 128 prompts, 56 new")
    batch: int | None = flag(None, "prompts (default 16)", 1)
    prompt: int = flag(64, "tokens in each prompt", 1)
    new: int | None = flag(None, "new tokens for each prompt (default 64)", 16)
    dtype: Literal["fp32", "bf16"] = flag("fp32", "of the weights")
    quantize: Literal["none", "int8", "nf4"] = flag("none", "the blocks' matrices (without a peer)")
    device: str = flag("cpu", "cpu, cuda, or auto")
    adapter: bool = flag(False, "ours with SVD-LoRA k = 8, m = 2 and one λ per row")
    runs: int = flag(5, "timed runs of each, after one to warm up", 1)
    peer: Literal["transformers", "none"] = flag("transformers", "what to compare with")


def random_model(config, dtype, device, quantize):
    """A Transformer of random weights, made on the device and quantised one by one: there is no other copy of them."""
    generator = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        model = Transformer(config)
    for name, p in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        layer, value = model.get_submodule(owner), torch.empty(p.shape, dtype=dtype, device=device)
        if p.ndim == 2:
            value.normal_(0, 0.02, generator=generator)
        else:
            value.fill_(leaf == "weight")                                             # norms; biases
        if quantize != "none" and p.ndim == 2 and isinstance(layer, nn.Linear) and owner.startswith("blocks."):
            model.set_submodule(owner, QuantizedLinear(quantize_weight(value, quantize), layer.bias))
        else:
            setattr(layer, leaf, nn.Parameter(value))
    return model


def load(flags, device, dtype):
    """(model, prompts as token lists, eos_id)."""
    if flags.world:
        base, name = find_base(None, "tiny", None, torch.device("cpu"))
        tokenizer, model = load_tokenizer(name), Transformer.from_pretrained(base, dtype, device, flags.quantize)
        tasks = [toy.as_row(x, toy.responses(x)) for x in toy.prompts("train")]
        prompts = [list(row.prompt) for row in tokenize(tasks, tokenizer, model.config.context_length)[0]]
        return model, (prompts * (flags.batch // len(prompts) + 1))[:flags.batch], tokenizer.eos_id
    config = replace(SIZES[flags.size], eos_id=None)
    if flags.prompt + flags.new > config.context_length:
        raise UserError(f"--prompt {flags.prompt} --new {flags.new}: the context is {config.context_length} tokens")
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, config.vocab_size, (flags.batch, flags.prompt), generator=generator)
    return random_model(config, dtype, device, flags.quantize), prompts.tolist(), -1


def load_peer(model, directory, dtype, device, eos_id):
    """transformers' model of the same weights, read from a directory that ours wrote."""
    try:
        import transformers
    except ImportError:
        raise UserError("transformers is not installed: pip install transformers==5.23.0, or --peer none") from None
    transformers.logging.set_verbosity_error()
    model.save_pretrained(directory)
    peer = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()
    peer.generation_config.eos_token_id = None if eos_id < 0 else eos_id
    peer.generation_config.pad_token_id = 0
    return peer


@torch.inference_mode()
def check(model, peer, prompts):
    """Every greedy token of ours is the best of theirs, or as good as the best up to rounding (a tie)."""
    tolerance = 0.03 if model.embed.weight.dtype == torch.bfloat16 else 1e-4
    for prompt, new in zip(prompts, generate(model, prompts, 16, temperature=0, eos_id=-1)):
        tokens = torch.tensor([prompt + new], device=peer.device)
        logits = peer(input_ids=tokens).logits[0, len(prompt) - 1:-1].float()         # (16, V)
        chosen = logits.gather(1, tokens[0, len(prompt):, None])[:, 0]
        worst = (logits.amax(1) - chosen).max() / logits.abs().max()
        assert worst <= tolerance, f"a greedy token of ours is {worst:.1e} of the largest logit below their best"


def copy_bandwidth(device):
    """Bytes/s read and written by a copy of 256 MB, the best of 10."""
    a = torch.ones(2 ** 26, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / min(alternate({"": lambda: b.copy_(a)}, 10, device)[""])


@torch.inference_mode()
def decode_step(model, prompts, new, device):
    """(median seconds of a greedy decode step with all rows in it, bytes of weights, bytes of cache it must read)."""
    decoder, seconds = Decoder(model, prompts, new, device.type == "cuda", device.type == "cpu"), []
    token = decoder.prefill().argmax(-1)
    for _ in range(new - 1):
        start = clock(device)
        token = decoder.step(token).argmax(-1)
        seconds.append(clock(device) - start)
    # U and V are stored in fp32 and read as copies in the model's dtype
    weights = model.head_weight.nbytes + sum(
        t.numel() * (model.head_weight if name.endswith((".U", ".V")) else t).itemsize
        for name, t in model.blocks.state_dict().items())
    return statistics.median(seconds[2:]), weights, decoder.cache.k.nbytes + decoder.cache.v.nbytes


def main(flags):
    """Checks, times, prints."""
    flags.batch = flags.batch or (128 if flags.world else 16)
    flags.new = flags.new or (56 if flags.world else 64)
    if flags.quantize != "none" and flags.peer != "none":
        raise UserError(f"--quantize {flags.quantize} needs --peer none: the peer's weights would not be quantised")
    device, _ = pick_device(flags.device)
    dtype = DTYPES[flags.dtype]
    model, prompts, eos_id = load(flags, device, dtype)
    with tempfile.TemporaryDirectory() as directory:
        peer = load_peer(model, directory, dtype, device, eos_id) if flags.peer == "transformers" else None
    if flags.adapter:
        inject_svd_lora(model, k=8, m=2, generator=torch.Generator().manual_seed(1))
        weight = torch.linspace(0, 1, len(prompts))
        set_preference(model, torch.stack([weight, 1 - weight], dim=1))
    if peer is not None:
        check(model, peer, prompts)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)

    def ours():
        return sum(map(len, generate(model, prompts, flags.new, eos_id=eos_id)))

    @torch.inference_mode()
    def theirs():
        rows = peer.generate(input_ids=ids, attention_mask=mask, max_new_tokens=flags.new, do_sample=True, top_k=0,
                             top_p=1.0)[:, longest:].tolist()
        return sum(row.index(eos_id) + 1 if eos_id in row else len(row) for row in rows)

    tokens, contestants = {}, {"ours": ours} | ({"transformers": theirs} if peer is not None else {})
    count = {name: lambda name=name, run=run: tokens.setdefault(name, []).append(run())
             for name, run in contestants.items()}
    seconds = alternate(count, flags.runs, device, warmup=1)
    speed = {name: [n / s for n, s in zip(tokens[name][1:], seconds[name])] for name in contestants}
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    precision = flags.dtype if flags.quantize == "none" else f"{flags.dtype} and {flags.quantize}"
    print(f"{'world' if flags.world else flags.size}, {precision}, {device}{threads}: {len(prompts)} prompts of "
          f"{min(map(len, prompts))} to {longest} tokens, up to {flags.new} new"
          f"{', ours with an adapter and one λ per row' if flags.adapter else ''}")
    for name, values in speed.items():
        print(f"{name:14} {statistics.median(values):10.0f} tokens/s   [{min(values):.0f} .. {max(values):.0f}]")
    if peer is not None:
        ratios = [a / b for a, b in zip(*speed.values())]
        print(f"{'ratio':14} {statistics.median(ratios):10.2f}            [{min(ratios):.2f} .. {max(ratios):.2f}]")
    seconds, weights, cache = decode_step(model, prompts, flags.new, device)
    bandwidth = copy_bandwidth(device)
    print(f"decode step    {seconds * 1e3:10.2f} ms         {weights / 1e6:.0f} MB of weights + {cache / 1e6:.0f} MB "
          f"of cache: {(weights + cache) / bandwidth / seconds:.0%} of the copy bandwidth, {bandwidth / 1e9:.0f} GB/s")


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
