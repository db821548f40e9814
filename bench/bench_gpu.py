"""bench_gpu.py - everything that wants a GPU, in one command: values first, then ops, steps, generation and loading.

    python bench/bench_gpu.py                                      # about ten minutes on one large GPU
    python bench/bench_gpu.py --only tests ops                     # some parts of it
    python bench/bench_gpu.py --peers loop trl --minutes 20        # with transformers, peft and trl installed

Each part is a command of its own, printed before it runs; a part that fails or takes too long is reported, and the
others still run. The first part is the tests of kernels, fused ops and quantised weights on the GPU: where they fail,
nothing is timed. At the end stands one line per part.
"""
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.turns import chosen
from fronts.tables import table
from runs.files import ROOT, UserError
from runs.flags import flag, run_main

BIG = ["--model", "llama2-7b", "--dtype", "bf16", "--device", "cuda", "--length", "512", "--steps", "4"]
PARTS = {   # name: (seconds it may take, command)
    "tests": (150, ["-m", "pytest", "tests/ops/test_triton_kernels.py", "tests/ops/test_fused.py",
                    "tests/ops/test_quantize.py"]),
    "ops": (100, ["bench/bench_ops.py", "--device", "cuda", "--tokens", "8192"]),
    "step-7b": (150, ["bench/bench_dpo_step.py", *BIG, "--pairs", "8"]),
    "step-7b-16GiB": (120, ["bench/bench_dpo_step.py", *BIG, "--pairs", "4", "--quantize", "nf4", "--checkpoint"]),
    "step-125m": (60, ["bench/bench_dpo_step.py", "--model", "gpt2", "--dtype", "bf16", "--device", "cuda", "--length",
                       "512", "--pairs", "32"]),
    "generate-7b": (150, ["bench/bench_generate.py", "--size", "llama2-7b", "--dtype", "bf16", "--device", "cuda",
                          "--batch", "64", "--adapter", "--peer", "none", "--runs", "3"]),
    "generate-125m": (60, ["bench/bench_generate.py", "--dtype", "bf16", "--device", "cuda", "--peer", "none"]),
    "preferences": (60, ["bench/bench_preferences.py", "--device", "cuda"]),
    "load-7b": (120, ["bench/bench_load.py", "--size", "llama2-7b", "--dtype", "bf16", "--device", "cuda", "--turns",
                      "1", "--peers", "none"]),
}


@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    only: list[str] = flag(list(PARTS), "these parts alone")
    peers: list[str] = flag(["none"], "of the steps: loop, trl, loop-lora, trl-lora, or none")
    minutes: float = flag(9.5, "no part is started after so long, and none runs longer")


def main(flags):
    """Runs the parts in order and sums up."""
    if not torch.cuda.is_available():
        raise UserError("bench_gpu.py needs a CUDA device; on a CPU run the scripts of bench/ one by one")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    start, outcomes = time.perf_counter(), {}
    for name in chosen("only", flags.only, PARTS):
        limit, command = PARTS[name]
        left = 60 * flags.minutes - (time.perf_counter() - start)
        if left < 10 or outcomes.get("tests", "ok") != "ok":
            outcomes[name] = "not run: " + ("the tests failed" if left >= 10 else "no time left")
            continue
        if name.startswith("step"):
            command = [*command, "--peers", *flags.peers]
        print(f"\n$ python {' '.join(command)}", flush=True)
        began = time.perf_counter()
        try:
            code = subprocess.run([sys.executable, *command], cwd=ROOT, timeout=min(limit, left)).returncode
            outcomes[name] = "ok" if code == 0 else f"failed with status {code}"
        except subprocess.TimeoutExpired:
            outcomes[name] = f"stopped after {min(limit, left):.0f} s"
        print(f"({time.perf_counter() - began:.0f} s)", flush=True)
    print()
    print(table({"part": list(outcomes), "outcome": list(outcomes.values())}))


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
