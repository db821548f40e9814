"""test_waiting.py - threads sleep where somebody else computes; what the environment says wins."""
import io
import os
from pathlib import Path

import pytest

import runs.waiting

SOURCE = Path(runs.waiting.__file__).read_text()
# /proc/stat before and after: user, nice, system, idle, waiting for a disk, …; 20 ticks of two cores
IDLE, BUSY = ([f"cpu  {user} 0 0 {idle} {disk} 0 0 0 0 0\ncpu0 1 2 3\n" for user, idle, disk in ticks] for ticks in
              (((50, 900, 5), (51, 916, 8)), ((50, 900, 5), (60, 910, 5))))


@pytest.mark.parametrize("ticks, given, expected", [
    (IDLE, {}, None), (BUSY, {}, "passive"), (BUSY, {"OMP_WAIT_POLICY": "active"}, "active"),
    (BUSY, {"GOMP_SPINCOUNT": "1000"}, None), (None, {}, "passive"), (["cpu  x\n"] * 2, {}, "passive")])
def test_how_threads_wait(ticks, given, expected, monkeypatch):
    """None: the library's own way. Nothing says who computes: they sleep, which is slow for nobody else."""
    for name in ("OMP_WAIT_POLICY", "KMP_BLOCKTIME", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")                          # so that it is put back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    left = list(ticks or [])

    def look(path):
        if path != "/proc/stat" or ticks is None:
            raise OSError
        return io.StringIO(left.pop(0))

    monkeypatch.setattr("builtins.open", look)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    exec(SOURCE, {})                                          # as if it were imported for the first time
    assert os.environ.get("OMP_WAIT_POLICY") == expected
    assert os.environ.get("KMP_BLOCKTIME") == ("0" if expected == "passive" else None)
