"""bench_7b.py - Llama-2 7B from end to end on whatever is at hand: seconds and memory of every part of a training.

    python bench/bench_7b.py                                       # needs 13 GB of disk, and of memory
    python bench/bench_7b.py --device cuda

Random weights in bf16, in shards as the real ones are, are written, used and deleted. With each base (bf16, nf4) a
process of its own reads them, computes log π_ref of the responses to --pairs short pairs, trains two steps by DPO with
--checkpoint's recomputation, and generates 8 tokens. Beside each peak stands what bench/scaling.py computes for a step.
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from aggregate import linear_scalarization, sample_preference
from bench import scaling
from bench.pairs import pack_pairs, token_pairs
from bench.turns import enter, leave, model_directory, step
from data.trees import batch_logprobs
from fronts.tables import table
from model import SIZES, Transformer, generate
from objectives import dpo_loss, losses_on_pairs
from runs.files import bar
from runs.flags import flag, run_main
from runs.processes import pick_device
from runs.speed import peak_memory
from svd_lora import adapters_off, inject_svd_lora, set_preference

PARTS = ("reading", "log π_ref", "a DPO step", "the next one", "8 tokens")


@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    size: Literal[tuple(SIZES)] = flag("llama2-7b", "model size, random weights")
    bases: list[str] = flag(["bf16", "nf4"], "precisions of the frozen base: bf16, int8, nf4")
    device: str = flag("auto", "cpu, cuda, or auto")
    pairs: int = flag(2, "pairs per step", 1)
    length: int = flag(64, "tokens of a response with its prompt; half of them are the prompt", 2)
    rank: int = flag(10, "k + m", 3)


def work(turn, base, device, flags, directory):
    """All parts, one after the other; turn() reports each with its seconds and the memory at its peak."""
    before = 0 if device.type == "cuda" else peak_memory(device)
    report = lambda: turn(bytes=peak_memory(device) - before)
    report()
    model = Transformer.from_pretrained(directory, torch.bfloat16, device, None if base == "bf16" else base)
    report()

    inject_svd_lora(model, flags.rank - 2, 2, lora_scaling=8.0, generator=torch.Generator().manual_seed(1))
    model.checkpoint_blocks = True
    ids = token_pairs(flags, model.config.vocab_size, 0)
    batch = pack_pairs(ids, m=2).to(device)
    with torch.no_grad(), adapters_off(model):
        ref = batch_logprobs(model, batch)                                            # (2 pairs,)
    report()

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    lam = sample_preference(flags.pairs, 2, generator=torch.Generator().manual_seed(0)).to(device)
    for _ in range(2):
        set_preference(model, lam)
        losses, *_ = losses_on_pairs(dpo_loss, batch_logprobs(model, batch), ref, batch.pairs, batch.better, 0.1)
        linear_scalarization(losses, lam).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        report()

    set_preference(model, lam[0])
    new = generate(model, [ids[0, 0, :flags.length // 2].tolist()], 8, eos_id=-1)
    assert len(new[0]) == 8
    report()


def main(flags):
    """Writes the directory, has it used with every base, and prints the table."""
    device, _ = pick_device(flags.device)
    config, columns, peaks = SIZES[flags.size], {"": list(PARTS)}, []
    with model_directory(config, torch.bfloat16, device, shard_bytes=2 ** 31) as directory:
        files = list(Path(directory).glob("*.safetensors"))
        stored = sum(file.stat().st_size for file in files) / 2 ** 30
        print(f"{flags.size}: {stored:.2f} GiB in {len(files)} files, {device}; {flags.pairs} pairs of {flags.length}")
        for base in flags.bases:
            worker, _ = enter(work, base, device, flags, directory)
            parts = [step(worker, base) for _ in bar(PARTS, base)]
            leave(worker)
            columns |= {f"{base}, s": [f"{part['seconds']:.1f}" for part in parts],
                        f"{base}, peak GiB": [f"{part['bytes'] / 2 ** 30:.2f}" for part in parts]}
            computed = sum(scaling.memory(config, base, True, 1, "", flags).values())
            peaks.append(f"{base}: {parts[3]['bytes'] / 2 ** 30:.2f} GiB after two steps, "
                         f"{computed / 2 ** 30:.2f} computed")
    print(table(columns))
    print("; ".join(peaks))


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
