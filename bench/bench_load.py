"""bench_load.py - seconds and memory to read a model's directory: ours beside transformers and the disk itself.

    python bench/bench_load.py                                     # GPT-2 124M, fp32
    python bench/bench_load.py --size 1b --dtype bf16              # a Llama of 1.1B in shards
    python bench/bench_load.py --size llama2-7b --dtype bf16 --device cuda --peers none

Random weights are written in shards by save_pretrained and read again; every tensor must come back bit for bit. Then
turns: the files read from end to end and thrown away (what the disk gives), ours, transformers; each in a process of
its own, which touches every weight once after loading, since a mapped file costs nothing until it is read. With --cold the
system's cache of these files is dropped before every turn. Memory is the process's peak over what it had before, for
CUDA the allocator's peak; the least possible is 1.00 x the weights.
The peer: pip install transformers==5.23.0, or --peers none.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from runs.device import pick_device
from runs.files import UserError
from runs.flags import flag, run_main
from runs.speed import peak_memory
from model import SIZES, Transformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    size: str = flag("125m", f"model size, random weights: {', '.join(SIZES)}")
    dtype: Literal["fp32", "bf16"] = flag("fp32", "of the stored weights")
    device: str = flag("cpu", "cpu or cuda")
    quantize: Literal["none", "int8", "nf4"] = flag("none", "ours quantises while it reads")
    turns: int = flag(3, "timed turns")
    cold: bool = flag(False, "drop the system's cache of the files before every turn")
    peers: list[str] = flag(["transformers"], "transformers or none")
    worker: str | None = flag(None, "used by the script itself")
    directory: str | None = flag(None, "used by the script itself")


def work(flags):
    """Loads once, in a fresh process; prints seconds, bytes at the peak and a checksum."""
    device, dtype = torch.device(flags.device), DTYPES[flags.dtype]
    if flags.worker == "transformers":
        os.environ["HF_HUB_OFFLINE"] = "1"
        import transformers
        transformers.logging.set_verbosity_error()
    before, start = (0 if device.type == "cuda" else peak_memory(device)), time.perf_counter()
    if flags.worker == "disk":
        block, checksum = bytearray(2 ** 24), None
        for file in sorted(Path(flags.directory).glob("*.safetensors")):
            with open(file, "rb", buffering=0) as f:
                while f.readinto(block):
                    pass
    else:
        if flags.worker == "ours":
            more = {} if flags.quantize == "none" else {"quantize": flags.quantize}
            model = Transformer.from_pretrained(flags.directory, dtype, device, **more)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(flags.directory, dtype=dtype,
                                                                      device_map=flags.device if flags.device != "cpu"
                                                                      else None)
        tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}          # a tied head once
        checksum = sum(t.view(-1)[:: 512 // t.element_size()].float().abs().sum().item() for t in tensors.values())
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(json.dumps({"seconds": time.perf_counter() - start, "bytes": peak_memory(device) - before,
                      "checksum": checksum}))


def main(flags):
    """Writes the directory, checks that it is read back, and prints the table."""
    if flags.worker:
        return work(flags)
    if flags.size not in SIZES:
        raise UserError(f"--size {flags.size}: choose one of {', '.join(SIZES)}")
    device, _ = pick_device(flags.device)
    config = replace(SIZES[flags.size], eos_id=None)
    with tempfile.TemporaryDirectory() as directory:
        with torch.device(device):
            model = Transformer(config).to(DTYPES[flags.dtype])
        model.init_weights(torch.Generator(device).manual_seed(0))
        model.save_pretrained(directory, shard_bytes=2 ** 30)
        files = sorted(Path(directory).glob("*.safetensors"))
        size = sum(f.stat().st_size for f in files)
        again = Transformer.from_pretrained(directory)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
        del model, again
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{flags.size}, {flags.dtype}: {size / 2 ** 30:.2f} GiB in {len(files)} files, read back bit for bit")
        names = ["disk", "ours"] + [p for p in flags.peers if p != "none"]
        results = {name: [] for name in names}
        for _ in range(flags.turns):
            for name in names:
                if flags.cold:
                    for file in files:
                        with open(file, "rb") as f:
                            os.fsync(f.fileno())
                            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                run = subprocess.run([sys.executable, __file__, "--worker", name, "--directory", directory, "--device",
                                      flags.device, "--dtype", flags.dtype, "--quantize", flags.quantize],
                                     capture_output=True, text=True)
                if run.returncode:
                    raise UserError(f"{name}: {(run.stderr.strip().splitlines() or ['it ended'])[-1]}")
                results[name].append(json.loads(run.stdout.splitlines()[-1]))
        print(f"{'':14} {'seconds [min..max]':>22} {'GiB/s':>6} {'peak / weights':>15}   time / ours")
        for name, rows in results.items():
            s = [row["seconds"] for row in rows]
            ratio = statistics.median(a / b["seconds"] for a, b in zip(s, results["ours"]))
            print(f"{name:14} {statistics.median(s):8.3f} [{min(s):.3f}..{max(s):.3f}] "
                  f"{size / 2 ** 30 / statistics.median(s):6.2f} "
                  f"{statistics.median(row['bytes'] for row in rows) / size:15.2f}   {ratio:.2f}")


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
