"""turns.py - contestants that take turns: the clock of a device, and asking a process for its next step."""
import json
import time

import torch

from runs.files import UserError


def clock(device):
    """Seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def listen(worker, name):
    """The next report of a contestant, a Popen that prints one JSON object a line. Raises UserError with its last line
    of stderr if it has died."""
    line = worker.stdout.readline()
    if not line:
        raise UserError(f"{name}: {(worker.stderr.read().strip().splitlines() or ['it ended'])[-1]}")
    return json.loads(line)


def turn(worker, name):
    """The report of a contestant's turn: of two steps the second, for one that has waited finds its memory cold."""
    for _ in range(2):
        print("go", file=worker.stdin, flush=True)
        report = listen(worker, name)
    return report
