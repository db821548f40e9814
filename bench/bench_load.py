"""bench_load.py - seconds and memory to read a model's directory: ours beside transformers.

    python bench/bench_load.py                                     # GPT-2 124M, fp32
    python bench/bench_load.py --size 1b --dtype bf16              # a Llama of 1.1B in shards
    python bench/bench_load.py --size llama2-7b --dtype bf16 --device cuda --peers none

Random weights are written in shards by save_pretrained and read in turns (that they come back bit for bit is tested in
tests/test_model.py). Each turn is a process of its own, which touches every weight once after loading, since a mapped
file costs nothing until it is read. The files are in the system's cache. Memory is the process's peak over what it had
before, for CUDA the allocator's; the least possible is 1.00 x the weights.
The peer: pip install transformers==5.23.0 (on CUDA accelerate, too), or --peers none.
"""
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.turns import chosen, enter, leave, model_directory, peer_model, step, turn_columns
from fronts.tables import shown, table
from model import SIZES, Transformer
from runs.files import bar
from runs.flags import flag, run_main
from runs.processes import pick_device
from runs.speed import peak_memory


@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    size: Literal[tuple(SIZES)] = flag("125m", "model size, random weights")
    dtype: Literal["fp32", "bf16"] = flag("fp32", "of the stored weights")
    device: str = flag("cpu", "cpu or cuda")
    turns: int = flag(3, "timed turns", 1)
    peers: list[str] = flag(["transformers"], "transformers or none")


def work(turn, name, device, dtype, directory):
    """Loads once, when its turn comes; reports the bytes at the peak."""
    if name == "transformers":
        import transformers  # noqa: F401
    before = 0 if device.type == "cuda" else peak_memory(device)
    turn()
    load = peer_model if name == "transformers" else Transformer.from_pretrained
    model = load(directory, dtype, device)
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}              # a tied head once
    sum(t.view(-1)[:: 512 // t.element_size()].float().abs().sum().item() for t in tensors.values())
    turn(bytes=peak_memory(device) - before)


def main(flags):
    """Writes the directory, has it read in turns, and prints the table."""
    device, dtype = pick_device(flags.device, flags.dtype)
    config = replace(SIZES[flags.size], eos_id=None)
    reports = {name: [] for name in ("ours", *chosen("peers", flags.peers, ["transformers"]))}
    with model_directory(config, dtype, device, shard_bytes=2 ** 30) as directory:
        sizes = [file.stat().st_size for file in Path(directory).glob("*.safetensors")]
        print(f"{flags.size}, {flags.dtype}: {sum(sizes) / 2 ** 30:.2f} GiB in {len(sizes)} files")
        for _ in bar(range(flags.turns), "turns"):
            for name in reports:
                worker, _ = enter(work, name, device, dtype, directory)
                reports[name].append(step(worker, name))
                leave(worker)
    seconds = {name: [report["seconds"] for report in rows] for name, rows in reports.items()}
    peaks = [statistics.median(report["bytes"] for report in rows) / sum(sizes) for rows in reports.values()]
    print(table(turn_columns(seconds, "seconds", ".3f", "ours") | {"peak / weights": shown(peaks, ".2f")}))


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
