"""bench_pama.py - what a step pays for its weights: PAMA's three readings against MGDA, over the number of objectives.

    python bench/bench_pama.py                      # one thread of a CPU; the table, then the growth of every column

n: objectives   N: sampled tokens   d: parameters of the SVD-LoRA adapter   c: weights on the simplex, (n,)
MGDA looks for the c that makes ‖Σ c_i g_i‖ smallest from the n gradients g_i: n backward passes, a Gram matrix of
n² products of d numbers, and the min-norm problem. PAMA (arXiv:2508.07768) takes advantages instead, which are there
anyway, and claims O(n) against MGDA's O(n² d). Timed are, given "no negative" advantages (n, N):

    S     the mean of each objective, and Theorem 1's closed form           O(n N), O(n) after the means
    T     Theorem 1 for every token: the smallest advantage                 O(n N)
    V     the Gram matrix over tokens and the min-norm problem              O(n² N) and the solve
    back  MGDA: n backward passes through one forward, gradients kept       O(n) passes
    solve MGDA: the Gram matrix of (n, d) and the min-norm problem          O(n² d) and the solve

Both methods then need one backward pass of the weighted loss, not timed. The models have random weights: "tiny", and
one 4 times as wide and as deep. MGDA's forward is of 2 rows of 32 tokens, fewer than N (a backward pass is linear in
them; the Gram matrix does not depend on them), so `back` is a lower bound. Times are medians over repeats (`solve` at
most 5, `back` at most 3 up to n = 8, and one above). At these sizes V's time is nearly all the min-norm problem, an
active-set loop in Python. tests/test_aggregate.py holds what is timed to its definitions.
"""
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from aggregate import min_norm_weights, pama_weights
from bench.turns import median_time
from fronts.tables import shown, table
from model import SIZES, Transformer
from ops.fused import linear_logprob
from runs.flags import flag, run_main
from svd_lora import inject_svd_lora, set_preference, svd_lora_layers

TINY = SIZES["tiny"]
MODELS = {"tiny": TINY, "4 x tiny": replace(TINY, n_layer=4 * TINY.n_layer, n_head=4 * TINY.n_head,
                                            d_model=4 * TINY.d_model, n_kv_head=None, head_dim=None, d_ff=None)}


@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    n: list[int] = flag([2, 4, 8, 16, 32, 64], "numbers of objectives", 1)
    tokens: int = flag(4096, "N: tokens that PAMA's advantages are of", 1)
    repeats: int = flag(21, "the table has medians over so many runs", 1)


def sample_advantages(n, tokens, generator):
    """"No negative" advantages (n, tokens): max(A, 0) of normal A that correlate by ½ between objectives."""
    shared = torch.randn(1, tokens, generator=generator)
    return ((shared + torch.randn(n, tokens, generator=generator)) / 2 ** 0.5).clamp(min=0)


def adapted(config, generator):
    """A model of random weights with an adapter that is in use (σ ≠ 0, else U and V would have no gradient).
    Returns it and its trainable parameters."""
    model = inject_svd_lora(Transformer(config).init_weights(generator), k=8, m=2, generator=generator)
    set_preference(model, [0.5, 0.5])
    for layer in svd_lora_layers(model).values():
        torch.nn.init.normal_(layer.sigma, std=0.01, generator=generator)
    return model, [p for p in model.parameters() if p.requires_grad]


def policy_losses(model, n, generator):
    """n policy-gradient losses −mean_t A_{i,t} log π(y_t) over one forward. -> (n,)"""
    tokens = torch.randint(model.config.vocab_size, (2, 33), generator=generator)
    hidden = model(tokens[:, :-1], return_hidden=True).flatten(0, 1)                      # (64, D)
    logp = linear_logprob(hidden, model.head_weight, tokens[:, 1:].flatten())
    return -(sample_advantages(n, len(logp), generator) * logp).mean(1)


def gradients(losses, params):
    """The gradient of every loss, one backward pass each: (n, d)"""
    out = torch.empty(len(losses), sum(p.numel() for p in params))
    for row, loss in zip(out, losses):
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, params, retain_graph=True)], out=row)
    return out


def main(flags):
    """Prints the table and the growth of its columns."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    print(f"N = {flags.tokens} tokens for PAMA, 64 for MGDA, 1 thread")
    for size, config in MODELS.items():
        model, params = adapted(config, generator)
        times = []                                                                    # a row per n
        for n in flags.n:
            A = sample_advantages(n, flags.tokens, generator)
            losses = policy_losses(model, n, generator)
            g = gradients(losses, params)
            timed = [(lambda: pama_weights(A.mean(1)), flags.repeats), (lambda: A.amin(0), flags.repeats),
                     (lambda: pama_weights(A), flags.repeats), (lambda: gradients(losses, params), 3 if n <= 8 else 1),
                     (lambda: min_norm_weights(g @ g.T), 5)]
            times.append([median_time(f, min(flags.repeats, most), warmup=1) for f, most in timed])
        lines, rows = [str(n) for n in flags.n], np.array(times) * [1e6, 1e6, 1e6, 1e3, 1e3]
        for least in sorted({min(flags.n), 8}):
            used = [i for i, n in enumerate(flags.n) if n >= least]
            if len(used) > 1:                                                         # time ~ n^p
                lines.append(f"p for n >= {least}")
                rows = np.vstack([rows, np.polyfit(np.log([flags.n[i] for i in used]), np.log(rows[used]), 1)[0]])
        heads = ("S µs", "T µs", "V µs", "back ms", "solve ms")
        print(f"\n{size}, d = {sum(p.numel() for p in params)}; time ~ n^p")
        print(table({"n": lines} | {head: shown(column, ".2f") for head, column in zip(heads, rows.T)}), flush=True)


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
