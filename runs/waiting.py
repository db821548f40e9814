"""waiting.py - how OpenMP's threads wait for each other. Every script imports it before torch, which reads this once.

# why: a step is many small operations, and after each the threads meet. By default the first to come spin, which is
quick alone: asleep, a step takes a fifth longer. Beside another busy process spinning burns what the last thread waits
for, and a step takes twice as long or more. So they sleep where somebody else computes at the start.
bench/bench_waiting.py measures both (docs/speed.md); what the environment says wins.
"""
import os
import time

FREE = 0.25                 # cores that others may keep busy on a machine that counts as idle


def busy_cores(seconds=0.05):
    """How many cores are busy, over so many seconds in which this process sleeps; infinity where nothing says so."""
    try:
        looks = []
        for wait in (0, seconds):
            time.sleep(wait)
            with open("/proc/stat") as f:
                ticks = [int(x) for x in f.readline().split()[1:9]]
            looks.append((sum(ticks), ticks[3] + ticks[4]))                           # all; idle and waiting for a disk
        (all_0, idle_0), (all_1, idle_1) = looks
        return os.cpu_count() * (1 - (idle_1 - idle_0) / (all_1 - all_0))
    except (OSError, ValueError, IndexError, ZeroDivisionError):
        return float("inf")


if not {"OMP_WAIT_POLICY", "KMP_BLOCKTIME", "GOMP_SPINCOUNT"} & set(os.environ) and busy_cores() > FREE:
    os.environ["OMP_WAIT_POLICY"] = "passive"            # GNU's and LLVM's OpenMP
    os.environ["KMP_BLOCKTIME"] = "0"                    # Intel's, which sleeps after so many milliseconds
