"""bench_preferences.py - what more dimensions and more preferences cost.

    python bench/bench_preferences.py                              # the embedded world's tiny model
    python bench/bench_preferences.py --size 125m --prompts 2      # GPT-2 124M, random weights

1. A DPO step on the embedded world with m = 10 dimensions beside one with m = 2: the same rows and comparisons, ten
   labels instead of two, rank 18 instead of 10. 2. The log-probs of some prompts' responses under 11 preferences: in
   one mixed batch, where every row has its own, beside 11 batches with one preference each. First the two are compared.
   A mixed batch goes through the model in parts of 16 rows: 44 rows at once leave a CPU's caches.
Turns alternate; medians, and the median of the turns' ratios.
"""
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from aggregate import linear_scalarization, sample_preference, simplex_lattice
from bench.turns import alternate, random_model, relative_error, turn_columns
from data import toy
from data.tokenizers import load_tokenizer, tokenize
from data.trees import batch_logprobs, pack
from fronts.tables import table
from model import SIZES
from objectives import dpo_loss, losses_on_pairs
from runs.flags import flag, run_main
from runs.processes import pick_device
from runs.randomness import generator_for
from svd_lora import inject_svd_lora, parameter_groups, set_preference, shared_base


@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    size: Literal[tuple(SIZES)] = flag("tiny", "model size, random weights")
    device: str = flag("cpu", "cpu, cuda, or auto")
    rows: int = flag(8, "data rows per step, each a prompt with 12 responses", 1)
    prompts: int = flag(4, "prompts that are evaluated, each with 32 responses", 1)
    turns: int = flag(15, "timed turns, after two to warm up", 1)


def dpo_step(base, m, flags, tokenizer, device):
    """A function that does one step of train_dpo.py on the embedded world's rows with m dimensions."""
    model = inject_svd_lora(shared_base(base), 8, m, generator=torch.Generator().manual_seed(0))
    rows = toy.sample_pairs("train", toy.DIMS, flags.rows, 12, generator_for(0, "pairs"))
    rows = [replace(row, better=[labels[:m] for labels in row.better]) for row in tokenize(rows, tokenizer, 512)[0]]
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-3, fused=True)
    with torch.no_grad():
        set_preference(model, torch.full((m,), 1 / m))
        ref = batch_logprobs(model, pack(rows).to(device))
    def step():
        batch = pack(rows).to(device)
        lam = sample_preference(flags.rows, m, generator=torch.Generator().manual_seed(1)).to(device)
        set_preference(model, lam)
        loss, _, known = losses_on_pairs(dpo_loss, batch_logprobs(model, batch), ref, batch.pairs, batch.better, 1.0)
        losses = torch.zeros(flags.rows, m, device=device).index_add(0, batch.pair_row, loss * known)
        linear_scalarization(losses / 66, lam).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def main(flags):
    """Prints the two comparisons."""
    device, dtype = pick_device(flags.device)
    tokenizer = load_tokenizer("toy")
    config = replace(SIZES[flags.size], vocab_size=max(SIZES[flags.size].vocab_size, tokenizer.vocab_size))
    base = random_model(config, dtype, device).requires_grad_(False)
    def race(contestants):
        seconds = alternate(contestants, flags.turns, device, warmup=2)
        ms = {name: [1e3 * s for s in turns] for name, turns in seconds.items()}
        print(table(turn_columns(ms, "ms", ".1f", next(iter(ms)))))
    print(f"{flags.size}, {device.type}, {torch.get_num_threads()} threads")
    print(f"\na DPO step, {flags.rows} rows of 12 responses with all 66 comparisons")
    race({f"m = {m}": dpo_step(base, m, flags, tokenizer, device) for m in (2, 10)})

    model = inject_svd_lora(base, 8, 2, generator=torch.Generator().manual_seed(0))
    for p in model.parameters():
        if p.ndim < 2 and p.requires_grad:
            p.data.fill_(1e-3)                                    # a fresh adapter would not tell preferences apart
    lams = simplex_lattice(2, 10).float().to(device)                                  # (11, 2)
    tasks = [toy.as_row(x, toy.responses(x)[:32]) for x in toy.prompts("seen")[:flags.prompts]]
    rows = tokenize(tasks, tokenizer, 10_000)[0]
    one = pack(rows).to(device)
    of_row = lams.repeat_interleave(len(rows), dim=0)                                 # one λ per row
    mixed = [(pack((rows * len(lams))[i:i + 16]).to(device), of_row[i:i + 16]) for i in range(0, len(of_row), 16)]
    @torch.no_grad()
    def logprobs(batches):                                                            # -> (11, prompts · 32)
        out = []
        for batch, lam in batches:
            set_preference(model, lam)
            out.append(batch_logprobs(model, batch))
        return torch.cat(out).view(len(lams), -1)
    contestants = {"11 passes": lambda: logprobs([(one, lam) for lam in lams]),
                   "one mixed batch": lambda: logprobs(mixed)}
    b, a = (contestant() for contestant in contestants.values())
    error = relative_error(a, b)
    assert error < (1e-5 if dtype == torch.float32 else 1e-2) and not torch.allclose(a[0], a[-1], rtol=1e-4)
    print(f"\nlog-probs of {flags.prompts} prompts × 32 responses, 11 preferences (relative difference {error:.1e})")
    race(contestants)


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
