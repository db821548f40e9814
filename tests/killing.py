"""killing.py - a run is killed at each of its file-system calls in turn, run again, and must end in the same files.

A kill is an exception at the n-th call that changes a file. Every such call after it raises too: the dead clean up
nothing. All in one process, so that a point costs no start of Python.
"""
import builtins
import io
import os
import shutil
from contextlib import contextmanager

import pytest
from running import let_go, timeless

import model
import runs.directory
import svd_lora
import train_reward

DEAD = 2 ** 22 + 1              # no process has this number


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


@contextmanager
def killed_at(n):
    """Within it the n-th call that changes a file, and every one after it, raises Killed; n = 0: none. Yields the list
    of what was called. What safetensors was to write is there by half."""
    calls = []

    def watched(usual, name, writes):
        def call(*args, **more):
            if not writes(args, more):
                return usual(*args, **more)
            calls.append(f"{name} {args[1] if name == 'save_file' else args[0]}")
            if not n or len(calls) < n:
                return usual(*args, **more)
            if name == "save_file" and len(calls) == n:
                with pytest.MonkeyPatch.context() as once:
                    once.setattr(builtins, "open", opened)
                    with open(args[1], "wb") as file:
                        file.write(b"half")
            raise Killed
        return call

    opened, always = builtins.open, lambda args, more: True
    to_write = lambda args, more: set(more.get("mode", args[1] if len(args) > 1 else "r")) & set("wax+")
    with pytest.MonkeyPatch.context() as patch:
        for place, name, writes in (
                (os, "replace", always), (os, "unlink", always), (os, "mkdir", always), (io, "open", to_write),
                (builtins, "open", to_write), *((module, "save_file", always) for module in
                                                (model, runs.directory, svd_lora, train_reward))):
            patch.setattr(place, name, watched(getattr(place, name), name, writes))
        if n:
            patch.setattr(os, "getpid", lambda: DEAD)
        yield calls


def contents(run):
    """{name: what is in it} of all files of a run, without what the clock decides."""
    files = {f.relative_to(run).as_posix(): f for f in run.rglob("*") if f.is_file()}
    return {name: timeless(run) if name == "metrics.jsonl" else None if name == "timing.json" else f.read_bytes()
            for name, f in files.items()}


def kill_everywhere(make, run):
    """make() trains into the directory `run`. Asserts that it does so to the same bytes after a kill at any point, and
    that it leaves no other file than the run that was not killed. Returns the number of points."""
    with killed_at(0) as calls:
        make()
    whole, failed = contents(run), []
    for n in range(1, len(calls) + 1):
        shutil.rmtree(run)
        with pytest.raises(Killed), killed_at(n):
            make()
        let_go()
        try:
            make()
            assert contents(run) == whole
        except Exception as e:
            failed.append(f"{n}, {calls[n - 1]}: {type(e).__name__} {str(e)[:300]}")
    print(f"{run.name}: {len(calls)} points, {len(failed)} failures")
    assert not failed, "\n".join(failed)
    return len(calls)
