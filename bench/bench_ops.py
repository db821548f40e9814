"""bench_ops.py - the fused ops: checked against float64, then timed beside their plain definitions and against peers.

    python bench/bench_ops.py                                      # CPU: fp32 and bf16
    python bench/bench_ops.py --device cuda                        # with the Triton kernels; Llama-2-7B shapes
    python bench/bench_ops.py --only linear_logprob --peers trl_chunked torch_lce checkpoint_512 liger liger_compiled

First every op is compared with its definition in float64 on fresh random inputs, values and all gradients (relative
error below 1e-5 in fp32, 1e-2 in bf16); nothing is timed otherwise. Times are of forward and backward together; the
contestants take turns (turns.py); medians, and the median of the turns' ratios.

linear_logprob also shows memory: what a step adds to the resident set (CPU) or to the allocated bytes (CUDA) at its
peak, each contestant in a process of its own. Its peers: pip install trl==1.16.0 liger-kernel==0.8.5 (or --peers none).
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
from bench.turns import DTYPES, alternate, clock, enter, ratio, reporter, take_turns
from ops import fused
from runs.files import UserError
from runs.flags import flag, run_main
from runs.processes import pick_device

PEERS = ["naive", "trl_chunked", "torch_lce", "torch_lce_1024", "checkpoint_512", "liger", "liger_compiled"]


@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    device: str = flag("cpu", "cpu, cuda, or auto")
    only: list[str] | None = flag(None, "these ops alone: svd_lora_linear, linear_logprob, rms_norm, rope_, swiglu")
    turns: int = flag(5, "timed turns of each contestant", 1)
    dtypes: list[str] = flag(["fp32", "bf16"], "fp32, bf16")
    tokens: int | None = flag(None, "N (default 2048 on a CPU, 8192 on CUDA; linear_logprob 4096)")
    width: int | None = flag(None, "D (default 768 on a CPU, 4096 on CUDA)")
    vocabularies: list[int] = flag([50257, 32000], "linear_logprob's V")
    peers: list[str] = flag(["naive", "checkpoint_512"], f"linear_logprob's: {', '.join(PEERS)}, or none")
    worker: str | None = flag(None, "used by the script itself")


# ---------------------------------------------------------------------------------------------------------------------
# The cases: op, definition, tensors with a gradient, constants.

def cases(flags, device, dtype, N, D):
    """{op: (fused, plain, leaves, constants)} with B = 4 rows of N / 4 tokens, rank 10, one preference per row."""
    r, B, T, C = 10, 4, max(1, N // 4), 64
    normal = lambda *shape, scale=1.0, dt=dtype: (torch.randn(*shape, device=device) * scale).to(dt)
    x, W = normal(B, T, D), normal(D, D, scale=D ** -0.5)
    U, V = normal(D, r, dt=torch.float32), normal(D, r, dt=torch.float32)
    angle = torch.rand(1, T, C // 2, device=device) * 6
    rope_plain = lambda x, c, s: fused.rope_plain(x.unflatten(-1, (-1, C)), c, s).flatten(2)
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
    }


def run(f, leaves, constants, g=None):
    """(value, gradients) of f, with a fixed upstream gradient."""
    leaves = [t.detach().requires_grad_(True) for t in leaves]
    y = f(*leaves, *constants)
    return y, torch.autograd.grad(y, leaves, torch.ones_like(y) if g is None else g)


def check(name, case, dtype):
    """Values and gradients against the definition in float64. Returns the largest relative error."""
    f, plain, leaves, constants = case
    few = lambda t: t[:, :37] if t.ndim == 3 and t.shape[1] > 1 else t[:37] if name == "linear_logprob" else t
    leaves = [few(t) for t in leaves]
    constants = [c[:, :37] if name == "rope_" else c[:37] if c.dtype == torch.int64 else c for c in constants]
    wide = [t.double() if t.is_floating_point() else t for t in constants]
    y, gradients = run(f, leaves, constants, g=(upstream := torch.randn_like(f(*leaves, *constants))))
    y64, gradients64 = run(plain, [t.double() for t in leaves], wide, g=upstream.double())
    relative = lambda a, b: ((a.double() - b).norm() / b.norm()).item()
    errors = [relative(y, y64)] + [relative(a, b) for a, b in zip(gradients, gradients64)]
    if name == "svd_lora_linear" and dtype == torch.bfloat16:
        errors.pop()          # d's few gradients are sums that cancel under a random upstream: tests/ops/test_fused.py
    assert max(errors) < (1e-5 if dtype == torch.float32 else 1e-2), f"{name}: relative errors {errors}"
    return max(errors)


# ---------------------------------------------------------------------------------------------------------------------
# linear_logprob, with memory.

def logprob_step(name, N, D, V, dtype, device):
    """A function that does forward and backward of token log-probs to the hidden states, by this implementation."""
    torch.manual_seed(0)
    h0 = torch.randn(N, D).to(device, dtype)
    W, y = (torch.randn(V, D) * D ** -0.5).to(device, dtype), torch.randint(V, (N,)).to(device)
    up = torch.randn(N).to(device)
    if name.startswith("liger"):
        from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction
        B = 16                                                # 8 pairs; the loss is DPO's: forward makes the gradient
        def step():
            h = h0.view(B, N // B, D).clone().requires_grad_(True)
            loss = LigerFusedLinearDPOFunction.apply(h, W, y.view(B, -1), None, None, None, None, -100, 0.1, False,
                                                     name == "liger_compiled", False)[0]
            loss.backward()
            return None, h.grad
        return step
    def forward(h):
        if name == "ours":
            return fused.linear_logprob(h, W, y)
        if name == "naive":
            return (h @ W.T).float().log_softmax(-1).gather(1, y[:, None])[:, 0]
        if name == "trl_chunked":
            from trl.kernels.chunked_logprob import ChunkedLogProbFunction
            from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as size
            return ChunkedLogProbFunction.apply(h, W, None, y, 1.0, size, None, 1.0, ("log_probs",))[0]
        if name.startswith("torch_lce"):
            options = torch.nn.LinearCrossEntropyOptions() if name == "torch_lce" else \
                torch.nn.LinearCrossEntropyOptions(batch_chunk_size=1024, chunking_method=None)
            return -F.linear_cross_entropy(h, W, y, reduction="none", options=options).float()
        if name == "checkpoint_512":
            part = lambda a, t: -F.cross_entropy((a @ W.T).float(), t, reduction="none")
            return torch.cat([checkpoint(part, a, t, use_reentrant=False) for a, t in zip(h.split(512), y.split(512))])
        raise UserError(f"--peers {name}: choose among {', '.join(PEERS)}")
    def step():
        h = h0.clone().requires_grad_(True)
        logp = forward(h)
        (logp.float() * up).sum().backward()
        return logp.detach(), h.grad
    return step


def resident():
    """(bytes now, bytes at the peak since the last reset) of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(status[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))


def work(flags):
    """One contestant of linear_logprob: a step for every line on stdin, answered with seconds and added bytes."""
    name, N, D, V, dtype = flags.worker.split(":")
    device, report = torch.device(flags.device), reporter()
    step = logprob_step(name, int(N), int(D), int(V), DTYPES[dtype], device)
    while True:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:                                                 # give freed memory back first: reused memory is not seen
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before, _ = resident()
        start = clock(device)
        out = step()
        seconds = clock(device) - start
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident()[1]
        sums = [None if t is None else t.double().norm().item() for t in out]
        del out
        report({"seconds": seconds, "bytes": peak - before, "norms": sums})
        if not sys.stdin.readline():
            return


def race(flags, N, D, V, dtype):
    """linear_logprob beside its peers; the norms of log-probs and gradients must agree with ours."""
    names = ["ours"] + [p for p in flags.peers if p != "none"]
    workers = {name: enter(__file__, f"{name}:{N}:{D}:{V}:{dtype}", "--device", flags.device)[0] for name in names}
    results = take_turns(workers, flags.turns)
    ours = results["ours"]
    for name, rows in results.items():
        for a, b in zip(rows[0]["norms"], ours[0]["norms"]):
            bound = 1e-4 if dtype == "fp32" else 1e-2
            assert a is None or name.startswith("liger") or abs(a / b - 1) < bound, \
                f"{name} computes something else: {rows[0]['norms']} against {ours[0]['norms']}"
        s, memory = [x["seconds"] for x in rows], statistics.median(x["bytes"] for x in rows)
        naive = min(x["bytes"] for x in results["naive"]) if "naive" in results else None
        print(f"  {name:16} {statistics.median(s):8.3f} s [{min(s):.3f}..{max(s):.3f}]   "
              f"{ratio(s, [y['seconds'] for y in ours]):5.2f} x ours   {memory / 2 ** 20:7.0f} MB"
              + (f" = {memory / naive:6.1%} of naive" if naive else ""))


def main(flags):
    """Checks everything, then prints the table."""
    if flags.worker:
        return work(flags)
    device, _ = pick_device(flags.device)
    flags.device = str(device)
    gpu = device.type == "cuda"
    N, D = flags.tokens or (8192 if gpu else 2048), flags.width or (4096 if gpu else 768)
    for dtype_name in flags.dtypes:
        dtype = DTYPES[dtype_name]
        table = {k: v for k, v in cases(flags, device, dtype, N, D).items() if not flags.only or k in flags.only or
                 (k == "frozen linear" and "svd_lora_linear" in flags.only)}
        errors = {name: check(name, case, dtype) for name, case in table.items()}
        print(f"\n{dtype_name}, {device.type}, {torch.get_num_threads()} threads, N = {N}, D = {D}, forward + backward")
        print(f"{'':18} {'error':>9} {'fused ms':>10} {'plain ms':>10}   plain / fused")
        contestants = {(kind, name): (lambda f=case[kind == "plain"], case=case: run(f, case[2], case[3]))
                       for name, case in table.items() for kind in ("fused", "plain") if name != "linear_logprob"}
        seconds = alternate(contestants, flags.turns, device, skipped=3, steps=5)
        for name in table:
            if name == "linear_logprob":
                print(f"{name:18} {errors[name]:9.1e}   (below)")
                continue
            a, b = seconds["fused", name], seconds["plain", name]
            print(f"{name:18} {errors[name]:9.1e} {1e3 * statistics.median(a):10.3f} {1e3 * statistics.median(b):10.3f}"
                  f"   {ratio(b, a):.2f}")
        if ("fused", "svd_lora_linear") in seconds:
            over = ratio(seconds["fused", "svd_lora_linear"], seconds["fused", "frozen linear"])
            print(f"svd_lora_linear over the frozen layer, forward + backward: {over:.3f} x")
            with torch.no_grad():
                forward = {name: (lambda case=table[name]: case[0](*case[2], *case[3]))
                           for name in ("svd_lora_linear", "frozen linear")}
                s = alternate(forward, 4 * flags.turns, device, skipped=3, steps=5)
            over = ratio(s["svd_lora_linear"], s["frozen linear"])
            print(f"svd_lora_linear over the frozen layer, forward: {over:.3f} x")
        if "linear_logprob" in table:
            for V in flags.vocabularies:
                n = flags.tokens or 4096
                print(f"linear_logprob, {dtype_name}, N = {n}, D = {D}, V = {V}, forward + backward, frozen head")
                race(flags, n, D, V, dtype_name)


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
