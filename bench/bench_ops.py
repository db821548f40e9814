"""bench_ops.py - the fused ops: checked against float64, then timed beside their plain definitions and against peers.

    python bench/bench_ops.py                                      # CPU: fp32 and bf16
    python bench/bench_ops.py --device cuda                        # with the Triton kernels; Llama-2-7B shapes
    python bench/bench_ops.py --only linear_logprob --peers naive checkpoint_512 liger_compiled

First every op is compared with its definition in float64 on fresh random inputs, values and all gradients (relative
error below 1e-5 in fp32, 1e-2 in bf16); nothing is timed otherwise. Times are of forward and backward together; the
contestants take turns (turns.py); medians, and the median of the turns' ratios.

linear_logprob also shows memory: what a step adds to the resident set (CPU) or to the allocated bytes (CUDA) at its
peak, each contestant in a process of its own. Its peers: all logits; a checkpoint over chunks of 512 tokens; Liger's
fused linear DPO loss, compiled (pip install liger-kernel==0.8.5).
"""
import ctypes
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.turns import DTYPES, alternate, chosen, clock, enter, ratio, relative_error, take_turns, turn_columns
from data import toy
from data.tokenizers import load_tokenizer, tokenize
from data.trees import pack
from fronts.tables import shown, table
from ops import fused
from ops.attention import additive, attention
from runs.flags import flag, run_main
from runs.processes import pick_device
from runs.speed import peak_memory

OPS = ["svd_lora_linear", "linear_logprob", "rms_norm", "rope_", "swiglu", "attention"]
PEERS = ["naive", "checkpoint_512", "liger_compiled"]


@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    device: str = flag("cpu", "cpu, cuda, or auto")
    only: list[str] = flag(OPS, "these ops alone")
    turns: int = flag(5, "timed turns of each contestant", 1)
    tokens: int | None = flag(None, "N (default 2048 on a CPU, 8192 on CUDA; linear_logprob 4096)")
    peers: list[str] = flag(PEERS[:2], f"linear_logprob's: {', '.join(PEERS)}, or none")


# ---------------------------------------------------------------------------------------------------------------------
# The cases: op, definition, tensors with a gradient, constants.

def cases(device, dtype, N, D):
    """{op: (fused, plain, leaves, constants)} with B = 4 rows of N / 4 tokens, rank 10, one preference per row;
    attention in the trees of 4 rows of the embedded world."""
    r, B, T, C = 10, 4, max(1, N // 4), 64
    normal = lambda *shape, scale=1.0, dt=dtype: (torch.randn(*shape, device=device) * scale).to(dt)
    x, W = normal(B, T, D), normal(D, D, scale=D ** -0.5)
    U, V = normal(D, r, dt=torch.float32), normal(D, r, dt=torch.float32)
    angle = torch.rand(1, T, C // 2, device=device) * 6
    rope_plain = lambda x, c, s: fused.rope_plain(x.unflatten(-1, (-1, C)), c, s).flatten(2)
    pairs = toy.sample_pairs("train", toy.DIMS[:2], 4, 48, torch.Generator().manual_seed(0))
    mask = pack(tokenize(pairs, load_tokenizer("toy"), 512)[0]).mask.to(device)       # of a DPO step: (4, 1, T, T)
    return {
        "svd_lora_linear": (lambda x, U, V, d, W: fused.svd_lora_linear(x, W, U, V, d),
                            lambda x, U, V, d, W: fused.svd_lora_linear_plain(x, W, U, V, d),
                            [x, U, V, normal(B, 1, r, dt=torch.float32)], [W]),
        "frozen linear": (lambda x, W: fused.linear(x, W), lambda x, W: F.linear(x, W), [x], [W]),
        "linear_logprob": (fused.linear_logprob, fused.linear_logprob_plain, [normal(N, D)],
                           [normal(5003, D, scale=3 * D ** -0.5), torch.randint(5003, (N,), device=device)]),
        "rms_norm": (lambda x, w: fused.rms_norm(x, w, 1e-5), lambda x, w: fused.rms_norm_plain(x, w, 1e-5), [x],
                     [normal(D)]),
        "rope_": (lambda x, c, s: fused.rope_(1 * x, c, s), lambda x, c, s: rope_plain(1 * x, c, s), [x],
                  [angle.cos(), angle.sin()]),
        "swiglu": (fused.swiglu, fused.swiglu_plain, [x, normal(B, T, D)], []),
        "attention": (lambda q, k, v, mask: attention(q, k, v, additive(mask, q.dtype)),
                      lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
                      [normal(len(mask), 4, mask.shape[-1], 32) for _ in "qkv"], [mask]),
    }


def run(f, leaves, constants, g=None):
    """(value, gradients) of f, with a fixed upstream gradient."""
    leaves = [t.detach().requires_grad_(True) for t in leaves]
    y = f(*leaves, *constants)
    return y, torch.autograd.grad(y, leaves, torch.ones_like(y) if g is None else g)


def check(name, case, dtype):
    """Values and gradients against the definition in float64. Returns the largest relative error."""
    f, plain, leaves, constants = case
    wide = [t.double() if t.is_floating_point() else t for t in constants]
    y, gradients = run(f, leaves, constants, g=(upstream := torch.randn_like(f(*leaves, *constants))))
    y64, gradients64 = run(plain, [t.double() for t in leaves], wide, g=upstream.double())
    errors = [relative_error(a, b) for a, b in zip((y, *gradients), (y64, *gradients64))]
    if name == "svd_lora_linear" and dtype == torch.bfloat16:
        errors.pop()          # d's few gradients are sums that cancel under a random upstream: tests/ops/test_fused.py
    assert max(errors) < (1e-5 if dtype == torch.float32 else 1e-2), f"{name}: relative errors {errors}"
    return max(errors)


# ---------------------------------------------------------------------------------------------------------------------
# linear_logprob, with memory.

def naive(h, W, y):
    """Token log-probs from all logits."""
    return (h @ W.T).float().log_softmax(-1).gather(1, y[:, None])[:, 0]


def checkpoint_512(h, W, y):
    """Token log-probs by chunks of 512 tokens, whose logits are computed again in the backward pass."""
    part = lambda a, t: -F.cross_entropy((a @ W.T).float(), t, reduction="none")
    return torch.cat([checkpoint(part, a, t, use_reentrant=False) for a, t in zip(h.split(512), y.split(512))])


def liger_compiled(h, W, y):
    """Liger's DPO loss of 8 pairs: it is no log-prob, and its forward pass makes the gradient."""
    from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction
    rows = h.view(16, -1, h.shape[1])
    return LigerFusedLinearDPOFunction.apply(rows, W, y.view(16, -1), None, None, None, None, -100, 0.1, False, True,
                                             False)[0]


LOGPROBS = {"ours": fused.linear_logprob, "naive": naive, "checkpoint_512": checkpoint_512,
            "liger_compiled": liger_compiled}


def work(turn, name, device, N, D, V, dtype):
    """A contestant of linear_logprob: forward and backward to the hidden states. Reports seconds and added bytes."""
    torch.manual_seed(0)
    h0 = torch.randn(N, D).to(device, dtype)
    W, y = (torch.randn(V, D) * D ** -0.5).to(device, dtype), torch.randint(V, (N,)).to(device)
    upstream = torch.randn(N).to(device)
    def step():
        h = h0.clone().requires_grad_(True)
        out = LOGPROBS[name](h, W, y)
        loss = out if name == "liger_compiled" else (out.float() * upstream).sum()
        loss.backward()
        return out.detach(), h.grad
    turn(norms=[t.double().norm().item() for t in step()])
    while True:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:                                                 # give freed memory back first: reused memory is not seen
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        before, start = peak_memory(device), clock(device)
        out = step()
        turn(seconds=clock(device) - start, bytes=peak_memory(device) - before)
        del out


def race(names, turns, device, N, D, V, dtype):
    """linear_logprob beside its peers; the norms of log-probs and gradients must agree with ours."""
    workers, norms = {}, {}
    for name in names:
        workers[name], report = enter(work, name, device, N, D, V, dtype)
        norms[name] = torch.tensor(report["norms"])
        error = (norms[name] / norms["ours"] - 1).abs().max()
        assert name == "liger_compiled" or error < (1e-4 if dtype == torch.float32 else 1e-2), \
            f"{name} computes something else: {norms[name]} against {norms['ours']}"
    reports = take_turns(workers, turns)
    seconds = {name: [report["seconds"] for report in rows] for name, rows in reports.items()}
    memory = [statistics.median(report["bytes"] for report in rows) / 2 ** 20 for rows in reports.values()]
    print(table(turn_columns(seconds, "seconds", ".3f", "ours") | {"MB": shown(memory, ".0f")}))


# ---------------------------------------------------------------------------------------------------------------------

def race_plain(cases, turns, device):
    """Every op beside its definition; an SVD-LoRA layer beside its frozen layer, too."""
    contestants = {(kind, name): (lambda case=case, f=f: run(f, case[2], case[3]))
                   for name, case in cases.items() for kind, f in (("fused", case[0]), ("plain", case[1]))}
    seconds = alternate(contestants, turns, device, skipped=3, steps=5)
    columns = {f"{kind} ms": shown([1e3 * statistics.median(seconds[kind, name]) for name in cases], ".3f")
               for kind in ("fused", "plain")}
    ratios = [ratio(seconds["plain", name], seconds["fused", name]) for name in cases]
    print(table({"": list(cases), **columns, "plain / fused": shown(ratios, ".2f")}))
    if "svd_lora_linear" in cases:
        with torch.no_grad():
            forward = {name: (lambda case=cases[name]: case[0](*case[2], *case[3]))
                       for name in ("svd_lora_linear", "frozen linear")}
            layers = alternate(forward, 4 * turns, device, skipped=3, steps=5)
        print(f"svd_lora_linear / frozen linear, forward: {ratio(*layers.values()):.3f}")


def main(flags):
    """Checks everything, then prints the tables."""
    device, _ = pick_device(flags.device)
    gpu = device.type == "cuda"
    N, D = flags.tokens or (8192 if gpu else 2048), 4096 if gpu else 768
    only, names = chosen("only", flags.only, OPS), ["ours", *chosen("peers", flags.peers, PEERS)]
    if "svd_lora_linear" in only:
        only.append("frozen linear")
    for precision, dtype in DTYPES.items():
        print(f"\n{precision}, {device.type}, {torch.get_num_threads()} threads, N = {N}, D = {D}, forward + backward")
        few, asked = ({name: case for name, case in cases(device, dtype, tokens, D).items() if name in only}
                      for tokens in (148, N))
        for name, case in few.items():
            print(f"{name}: relative error {check(name, case, dtype):.1e}")
        if asked.pop("linear_logprob", None):
            for V in (50257, 32000):
                n = flags.tokens or 4096
                print(f"\nlinear_logprob, {precision}, N = {n}, D = {D}, V = {V}, frozen head")
                race(names, flags.turns, device, n, D, V, dtype)
        if asked:
            print()
            race_plain(asked, flags.turns, device)


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
