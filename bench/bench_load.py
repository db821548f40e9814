"""bench_load.py - seconds and memory to read a model's directory: ours beside transformers and the disk itself.

    python bench/bench_load.py                                     # GPT-2 124M, fp32
    python bench/bench_load.py --size 1b --dtype bf16              # a Llama of 1.1B in shards
    python bench/bench_load.py --size llama2-7b --dtype bf16 --device cuda --peers none

Random weights are written in shards by save_pretrained and read again; every tensor must come back bit for bit. Then
turns: the files read from end to end and thrown away (what the disk gives), ours, transformers; each in a process of
its own, which touches every weight once after loading, since a mapped file costs nothing until it is read. With --cold
the system's cache of these files is dropped before every turn. Memory is the process's peak over what it had before,
for CUDA the allocator's peak; the least possible is 1.00 x the weights.
The peer: pip install transformers==5.23.0, or --peers none.
"""
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.turns import DTYPES, clock, enter, ratio, reporter
from model import SIZES, Transformer
from runs.flags import flag, run_main
from runs.processes import pick_device
from runs.speed import peak_memory


@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    size: Literal[tuple(SIZES)] = flag("125m", "model size, random weights")
    dtype: Literal["fp32", "bf16"] = flag("fp32", "of the stored weights")
    device: str = flag("cpu", "cpu or cuda")
    quantize: Literal["none", "int8", "nf4"] = flag("none", "ours quantises while it reads")
    turns: int = flag(3, "timed turns", 1)
    cold: bool = flag(False, "drop the system's cache of the files before every turn")
    peers: list[str] = flag(["transformers"], "transformers or none")
    worker: str | None = flag(None, "used by the script itself")
    directory: str | None = flag(None, "used by the script itself")


def work(flags):
    """Loads once, in a fresh process; reports seconds, bytes at the peak and a checksum."""
    device, dtype, report = torch.device(flags.device), DTYPES[flags.dtype], reporter()
    if flags.worker == "transformers":
        os.environ["HF_HUB_OFFLINE"] = "1"
        import transformers
        transformers.logging.set_verbosity_error()
    before, start = (0 if device.type == "cuda" else peak_memory(device)), clock(device)
    if flags.worker == "disk":
        block, checksum = bytearray(2 ** 24), None
        for file in sorted(Path(flags.directory).glob("*.safetensors")):
            with open(file, "rb", buffering=0) as f:
                while f.readinto(block):
                    pass
    else:
        if flags.worker == "ours":
            model = Transformer.from_pretrained(flags.directory, dtype, device, flags.quantize)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(flags.directory, dtype=dtype,
                                                                      device_map=flags.device if flags.device != "cpu"
                                                                      else None)
        tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}          # a tied head once
        checksum = sum(t.view(-1)[:: 512 // t.element_size()].float().abs().sum().item() for t in tensors.values())
    report({"seconds": clock(device) - start, "bytes": peak_memory(device) - before, "checksum": checksum})


def main(flags):
    """Writes the directory, checks that it is read back, and prints the table."""
    if flags.worker:
        return work(flags)
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
                worker, report = enter(__file__, name, "--directory", directory, "--device", flags.device, "--dtype",
                                       flags.dtype, "--quantize", flags.quantize)
                worker.communicate()
                results[name].append(report)
        print(f"{'':14} {'seconds [min..max]':>22} {'GiB/s':>6} {'peak / weights':>15}   time / ours")
        for name, rows in results.items():
            s = [row["seconds"] for row in rows]
            ours = [row["seconds"] for row in results["ours"]]
            print(f"{name:14} {statistics.median(s):8.3f} [{min(s):.3f}..{max(s):.3f}] "
                  f"{size / 2 ** 30 / statistics.median(s):6.2f} "
                  f"{statistics.median(row['bytes'] for row in rows) / size:15.2f}   {ratio(s, ours):.2f}")


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
