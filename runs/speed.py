"""speed.py - how fast a run is, in units of what the hardware allows."""
import functools
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch

from ops import fused
from runs.files import read_lines, write_json


@functools.lru_cache
def matmul_ceiling(device, dtype, seconds=0.2):
    """FLOP/s of the fastest product of two square matrices, as fused.py multiplies, among those that fit into so many
    seconds."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.rand(n, n, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    fused.product(a, a)                                                               # the first one is slow
    wait()
    best, start = math.inf, time.perf_counter()
    while time.perf_counter() - start < seconds or best == math.inf:
        t0 = time.perf_counter()
        fused.product(a, a)
        wait()
        best = min(best, time.perf_counter() - t0)
    return 2 * n ** 3 / best


def peak_memory(device):
    """The most bytes held at one time: allocated tensors on CUDA, else the resident memory of this process, 0 where the
    system does not say it (Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if Path("/proc/self/status").exists():              # Linux's getrusage would count what started this process too
        return next(int(line.split()[1]) * 1024 for line in read_lines("/proc/self/status") if line.startswith("VmHWM"))
    try:
        import resource
    except ImportError:                                 # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def model_flops(config, tokens, predicted, adapter=0, base=4):
    """Floating point operations that a Transformer (model.Config) needs for its matrices; attention scores not counted.

    tokens: that run through the blocks; predicted: that the head predicts (padding is none of either); adapter: how
    many parameters the adapter has. base: operations a parameter and token, 2 forward; 4 with the gradient of the
    activations, where the base is frozen; 6 with that of the weights too. An adapter that trains takes 6 always.
    """
    c = config
    attention = c.d_model * c.head_dim * (2 * c.n_head + 2 * c.n_kv_head)
    mlp = (3 if c.gated else 2) * c.d_model * c.d_ff
    return (base * (c.n_layer * (attention + mlp) * tokens + c.vocab_size * c.d_model * predicted)
            + (2 if base == 2 else 6) * adapter * tokens)


def report_speed(out, device, dtype, processes=1):
    """Sums up the metrics.jsonl of a finished run: prints one line, writes timing.json, returns the seconds.

    The records have "tokens", "flops" and "seconds". Seconds lie apart from all else that a run writes, so that the
    same seed on the same machine gives the same files.
    """
    records = [json.loads(line) for line in read_lines(out / "metrics.jsonl")]
    seconds, tokens, flops = (sum(r[key] for r in records) for key in ("seconds", "tokens", "flops"))
    ceiling = matmul_ceiling(device, dtype)
    timing = {"train_seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds,
              "tokens_per_second_median": statistics.median(r["tokens"] / r["seconds"] for r in records),
              "peak_memory": peak_memory(device), "flops": flops, "mfu": flops / seconds / ceiling / processes,
              "matmul_flops_per_second": ceiling, "dtype": str(dtype).removeprefix("torch."), "processes": processes}
    write_json(out / "timing.json", timing)
    print(f"{timing['tokens_per_second']:.0f} tokens/s (median step {timing['tokens_per_second_median']:.0f}), "
          f"peak memory {timing['peak_memory'] / 2 ** 30:.2f} GiB, model FLOPs utilisation {timing['mfu']:.3f} of the "
          f"{ceiling / 1e12:.3g} TFLOP/s of {timing['dtype']} products"
          + f" on each of {processes} devices" * (processes > 1))
    return seconds
