"""bench_generate.py - tokens/s of generate() beside transformers' generate() of the same weights, and the memory limit.

    python bench/bench_generate.py                                 # GPT-2 124M shape, 16 prompts of 64, 64 new, fp32
    python bench/bench_generate.py --dtype bf16 --adapter          # ours with an SVD-LoRA and one λ per row
    python bench/bench_generate.py --size llama2-7b --dtype bf16 --device cuda --batch 64 --adapter --peer none
    python bench/bench_generate.py --size llama2-7b --dtype bf16 --device cuda --quantize nf4 --adapter

First what both compute is compared: every token that ours calls the best must be the best of transformers' logits, up
to rounding. Then runs take turns (turns.py); the median of the runs is printed, and the median of the ratios. Sampled
at temperature 1 from the whole distribution. transformers runs without an adapter. `pip install transformers==5.23.0`
(on CUDA accelerate, too), or --peer none. OMP_NUM_THREADS sets the threads.

The limit: a decode step must read every weight but the input embeddings once, as codes where it is quantised (which a
CPU, multiplying dense copies, does not), the adapters, and keys and values of all slots. Its bytes over the copy
bandwidth of this device, measured here, is the least time a step can take.
"""
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.turns import alternate, clock, model_directory, peer_model, turn_columns
from fronts.tables import table
from model import SIZES, Transformer, generate
from ops.generation import Decoder
from runs.flags import flag, run_main
from runs.processes import pick_device
from svd_lora import inject_svd_lora, set_preference

PROMPT, NEW = 64, 64                                                                      # tokens


@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    size: Literal[tuple(SIZES)] = flag("125m", "model size, random weights")
    batch: int = flag(16, "prompts", 1)
    dtype: Literal["fp32", "bf16"] = flag("fp32", "of the weights")
    quantize: Literal["none", "int8", "nf4"] = flag("none", "the blocks' matrices; then there is no peer")
    device: str = flag("cpu", "cpu, cuda, or auto")
    adapter: bool = flag(False, "ours with SVD-LoRA k = 8, m = 2 and one λ per row")
    runs: int = flag(5, "timed runs of each, after one to warm up", 1)
    peer: Literal["transformers", "none"] = flag("transformers", "what to compare with")


@torch.inference_mode()
def check(model, peer, prompts):
    """Every greedy token of ours is the best of theirs, or as good as the best up to rounding (a tie)."""
    tolerance = 0.03 if model.embed.weight.dtype == torch.bfloat16 else 1e-4
    for prompt, new in zip(prompts, generate(model, prompts, 16, temperature=0)):
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
def decode_step(model, prompts, device):
    """(median seconds of a greedy decode step with all rows in it, bytes of weights, bytes of cache it must read)."""
    decoder, seconds = Decoder(model, prompts, NEW, device.type == "cuda", device.type == "cpu"), []
    token = decoder.prefill().argmax(-1)
    for _ in range(NEW - 1):
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
    device, dtype = pick_device(flags.device, flags.dtype)
    config = replace(SIZES[flags.size], eos_id=None)
    with model_directory(config, dtype, device) as directory:
        model = Transformer.from_pretrained(directory, dtype, device, flags.quantize)
        wanted = flags.peer == "transformers" and flags.quantize == "none"
        peer = peer_model(directory, dtype, device) if wanted else None
    ids = torch.randint(3, config.vocab_size, (flags.batch, PROMPT), generator=torch.Generator().manual_seed(0))
    prompts, ids = ids.tolist(), ids.to(device)
    if flags.adapter:
        inject_svd_lora(model, k=8, m=2, generator=torch.Generator().manual_seed(1))
        weight = torch.linspace(0, 1, len(prompts))
        set_preference(model, torch.stack([weight, 1 - weight], dim=1))
    contestants = {"ours": lambda: generate(model, prompts, NEW)}
    if peer is not None:
        check(model, peer, prompts)
        peer.generation_config.eos_token_id, peer.generation_config.pad_token_id = None, 0
        contestants["transformers"] = lambda: peer.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=True, top_k=0, top_p=1.0)
    with torch.inference_mode():
        seconds = alternate(contestants, flags.runs, device, warmup=1)
    print(f"{flags.size}, {flags.dtype}, --quantize {flags.quantize}, {device.type}, {torch.get_num_threads()} threads")
    print(f"{len(prompts)} prompts of {PROMPT} tokens, {NEW} new"
          f"{', ours with an adapter and one λ per row' if flags.adapter else ''}")
    speed = {name: [len(prompts) * NEW / s for s in turns] for name, turns in seconds.items()}
    print(table(turn_columns(speed, "tokens/s", ".0f", list(contestants)[-1])))
    seconds, weights, cache = decode_step(model, prompts, device)
    bandwidth = copy_bandwidth(device)
    print(f"decode step {seconds * 1e3:.2f} ms: {weights / 1e6:.0f} MB of weights + {cache / 1e6:.0f} MB "
          f"of cache: {(weights + cache) / bandwidth / seconds:.0%} of the copy bandwidth, {bandwidth / 1e9:.0f} GB/s")


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
