"""turns.py - what the benchmarks share: contestants that take turns, in one process or each in its own, and ratios.

Contestants take turns so that a busy machine slows all of them alike. A ratio is the median of the turns' ratios.
A contestant in a process of its own (a worker) has its own peak memory. It prints reports, one JSON object per line,
and waits for a line on stdin before its next step.
"""
import json
import os
import statistics
import subprocess
import sys
import time

import torch

from runs.files import UserError

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
    for turn in range(-warmup, turns):
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


# ---------------------------------------------------------------------------------------------------------------------
# Processes.

def enter(script, name, *arguments):
    """Starts a contestant: `script --worker name arguments` as a process. Returns the process and its first report."""
    worker = subprocess.Popen([sys.executable, script, "--worker", name, *arguments], text=True, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return worker, _listen(worker, name)


def take_turns(workers, turns):
    """{name: [report of every turn]} of {name: process}, which then end. A turn is two steps, of which the second is
    reported: a process that has waited finds its memory cold."""
    reports = {name: [] for name in workers}
    for _ in range(turns):
        for name, worker in workers.items():
            for _ in range(2):
                print("go", file=worker.stdin, flush=True)
                report = _listen(worker, name)
            reports[name].append(report)
    for worker in workers.values():
        worker.communicate()
    return reports


def _listen(worker, name):
    """The next report of a contestant. Raises UserError with its last line of stderr if it has died."""
    line = worker.stdout.readline()
    if not line:
        raise UserError(f"{name}: {(worker.stderr.read().strip().splitlines() or ['it ended'])[-1]}")
    return json.loads(line)


def reporter():
    """For a worker: a function that sends a report. Whatever else is printed, by libraries, goes to stderr."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return lambda report: print(json.dumps(report), file=out)
