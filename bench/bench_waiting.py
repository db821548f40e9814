"""bench_waiting.py - how OpenMP's threads should wait for each other: steps alone, and beside busy processes.

    python bench/bench_waiting.py
    python bench/bench_waiting.py --busy 0 --settings spin runs.waiting

A step is many small operations, and the threads that share one meet at its end. Threads that spin there are quick to
go on, but beside another process that wants the processor they burn the time that the last of them waits for. Each
number is the median of steps of train_dpo.py or train_ppo.py, or of calls of generate() (128 rows, an adapter), in a
process of its own. The settings are environment variables; "runs.waiting" sets none: then runs/waiting.py decides.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import runs.waiting  # noqa: F401

# isort: split
import torch

from data import toy
from data.base import SHIPPED
from data.tokenizers import load_tokenizer
from fronts.tables import table
from model import Transformer, generate
from runs.files import ROOT, UserError, bar, read_lines
from runs.flags import flag, run_main
from svd_lora import inject_svd_lora, set_preference

SETTINGS = {"runs.waiting": {}, "spin": {"GOMP_SPINCOUNT": "300000"},
            "passive": {"OMP_WAIT_POLICY": "passive"},
            "spin 1000": {"GOMP_SPINCOUNT": "1000"}, "spin 20000": {"GOMP_SPINCOUNT": "20000"},
            "one thread": {"OMP_NUM_THREADS": "1"}}
WORK = {"DPO step": ["train_dpo.py", "--rows", "64"], "PPO step": ["train_ppo.py"], "generate": None}


@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    settings: list[str] = flag(list(SETTINGS), "among: " + ", ".join(SETTINGS))
    busy: list[int] = flag([0, 1, 3], "how many busy processes run beside it", 0)
    steps: int = flag(12, "steps, of which the first four do not count", 5)
    only_generate: bool = flag(False, "(what the script calls itself with)")


def generate_seconds(flags):
    """Prints the seconds of every call of generate() as JSON."""
    model, tokenizer = Transformer.from_pretrained(SHIPPED), load_tokenizer("toy")
    inject_svd_lora(model, 8, 2, generator=torch.Generator().manual_seed(0))
    set_preference(model, torch.tensor([0.5, 0.5]))
    prompts, seconds = [tokenizer.encode(x + "\n") for x in toy.prompts("train")[::20] for _ in range(16)], []
    for i in range(flags.steps):
        start = time.perf_counter()
        generate(model, prompts, 64, eos_id=tokenizer.eos_id, generator=torch.Generator().manual_seed(i))
        seconds.append(time.perf_counter() - start)
    print(json.dumps(seconds))


def median_seconds(script, setting, steps):
    """The median of the steps of one process, under one setting."""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} | setting
    run = lambda *command: subprocess.run([sys.executable, *map(str, command)], env=environment, check=True,
                                          capture_output=True, text=True).stdout
    with tempfile.TemporaryDirectory() as out:
        if script:
            run(ROOT / script[0], *script[1:], "--steps", steps, "--no-eval", "--snapshots", 0, "--out", out)
            seconds = [json.loads(line)["seconds"] for line in read_lines(Path(out) / "metrics.jsonl")]
        else:
            seconds = json.loads(run(__file__, "--only_generate", "--steps", steps))
    return statistics.median(seconds[4:])


def main(flags):
    """Prints the table: seconds, and in brackets how many times the best of its column."""
    if flags.only_generate:
        return generate_seconds(flags)
    if unknown := set(flags.settings) - set(SETTINGS):
        raise UserError(f"--settings {' '.join(unknown)}: choose among {', '.join(SETTINGS)}")
    columns = {"": flags.settings}
    for busy in flags.busy:
        beside = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        try:
            for name, script in WORK.items():
                seconds = [median_seconds(script, SETTINGS[setting], flags.steps)
                           for setting in bar(flags.settings, f"{name}, {busy} beside")]
                columns[f"{name}, {busy} beside"] = [f"{x:.3f} ({x / min(seconds):.2f})" for x in seconds]
        finally:
            for process in beside:
                process.kill()
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads")
    print(table(columns))


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
