"""turns.py - what the benchmarks share: contestants that take turns, in one process or each in its own, the columns of
their tables, models of random weights, and transformers' model of the same weights.

Contestants take turns so that a busy machine slows all of them alike. A ratio is the median of the turns' ratios.
A contestant with a process of its own (a worker) has its own peak memory. It is a function work(turn, ...) that calls
turn() when it is ready and after every step: that reports to the bench and waits until it is this worker's turn again.
"""
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager

import torch

from model import Transformer
from runs.files import UserError, bar
from runs.speed import peak_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def clock(device):
    """Seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def alternate(contestants, turns, device, warmup=0, skipped=0, steps=1):
    """{name: [seconds of a step, one number per turn]} of functions that take turns.

    warmup: turns before those that count. A turn is `skipped` steps that do not count, then the mean of `steps`.
    """
    seconds = {name: [] for name in contestants}
    for turn in bar(range(-warmup, turns), "turns"):
        for name, step in contestants.items():
            for i in range(-skipped, steps):
                if i == 0:
                    start = clock(device)
                step()
            if turn >= 0:
                seconds[name].append((clock(device) - start) / steps)
    return seconds


def median_time(step, turns, warmup=0):
    """The median seconds of step() on a CPU."""
    return statistics.median(alternate({"": step}, turns, torch.device("cpu"), warmup)[""])


def ratio(a, b):
    """The median of the turns' ratios a / b."""
    return statistics.median(x / y for x, y in zip(a, b))


def turn_columns(values, unit, form, first):
    """Columns for fronts/tables.py with a line per contestant: median [least..most] over its turns, of its values and
    of their ratios to those of the contestant `first`. values: {name: [one number per turn]}; form: like ".3f"."""
    def spread(numbers, form):
        return f"{statistics.median(numbers):{form}} [{min(numbers):{form}}..{max(numbers):{form}}]"
    ratios = [[x / y for x, y in zip(numbers, values[first])] for numbers in values.values()]
    return {"": list(values), unit: [spread(numbers, form) for numbers in values.values()],
            f"/ {first}": [spread(numbers, ".2f") for numbers in ratios]}


def relative_error(a, b):
    """‖a − b‖ / ‖b‖."""
    return ((a.double() - b).norm() / b.double().norm()).item()


def chosen(flag, values, known):
    """The values of a flag but "none". Raises UserError for one that is not known."""
    for value in values:
        if value not in (*known, "none"):
            raise UserError(f"--{flag} {value}: choose among {', '.join(known)}")
    return [value for value in values if value != "none"]


# ---------------------------------------------------------------------------------------------------------------------
# Processes.

def enter(work, name, device, *arguments):
    """Starts work(turn, name, device, *arguments) as a process. Returns its connection and its first report.

    A report is a dict: what the worker gave to turn(), "seconds" since its turn began, and "peak", its peak_memory.
    """
    context = multiprocessing.get_context("spawn")
    connection, other_end = context.Pipe()
    context.Process(target=_serve, args=(other_end, work, name, device, *arguments), daemon=True).start()
    other_end.close()
    return connection, _listen(connection, name)


def step(connection, name):
    """Gives a worker its turn. Returns its report, and raises UserError with the reason if it has died."""
    connection.send("go")
    return _listen(connection, name)


def take_turns(workers, turns):
    """{name: [report of every turn]} of {name: connection}, whose workers then end. A turn is two steps, of which the
    second is reported: a process that has waited finds its memory cold."""
    reports = {name: [] for name in workers}
    for _ in bar(range(turns), "turns"):
        for name, connection in workers.items():
            step(connection, name)
            reports[name].append(step(connection, name))
    leave(*workers.values())
    return reports


def leave(*connections):
    """Ends workers, and waits until their memory is free."""
    for connection in connections:
        connection.close()
    for process in multiprocessing.active_children():
        process.join()


def _listen(connection, name):
    try:
        report = connection.recv()
    except EOFError:
        report = "its process ended"
    if isinstance(report, str):
        raise UserError(f"{name}: {report}")
    return report


def _serve(connection, work, name, device, *arguments):
    """The worker's process. It ends when the bench closes the connection."""
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")           # what libraries print; errors are sent
    start = clock(device)
    def turn(**report):
        nonlocal start
        connection.send({"seconds": clock(device) - start, "peak": peak_memory(device)} | report)
        connection.recv()
        start = clock(device)
    try:
        work(turn, name, device, *arguments)
    except EOFError:
        pass
    except Exception as e:
        connection.send(f"{type(e).__name__}: {e}")


# ---------------------------------------------------------------------------------------------------------------------
# Models.

def random_model(config, dtype, device):
    """A Transformer of random weights, the same in every call."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    return model.to_empty(device=device).init_weights(torch.Generator(device).manual_seed(0))


@contextmanager
def model_directory(config, dtype, device, shard_bytes=None):
    """A temporary directory with random_model's weights, of which no memory is held."""
    with tempfile.TemporaryDirectory() as directory:
        random_model(config, dtype, device).save_pretrained(directory, shard_bytes)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        yield directory


def peer_model(directory, dtype, device):
    """transformers' model of a directory (on CUDA it needs accelerate). Raises UserError where it is not installed."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import transformers
    except ImportError:
        raise UserError("transformers is not installed: see the top of this script, or choose none") from None
    transformers.logging.set_verbosity_error()
    there = {"device_map": device} if device.type == "cuda" else {}
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **there)
