"""test_fuzz.py - the fuzzer itself: what it calls a finding, and a minute of it (slow)."""
import gzip
import json
import multiprocessing
import random
import time

import fuzz
import pytest
import torch
from safetensors.torch import save

from runs.files import UserError, read_json


def outcome(tmp_path, read):
    (tmp_path / "a.json").write_text("{}")
    return fuzz.outcome(read, random.Random(0), tmp_path / "a.json", tmp_path)


def test_what_a_finding_is(tmp_path):
    """A traceback, a message of no or two lines, another exit status, a file that is left behind."""
    def refuse(rng, file):
        raise UserError(f"{file} is bad")

    def leave(rng, file):
        (file.parent / ".half.tmp").write_text("")
        refuse(rng, file)

    def two_lines(rng, file):
        error = UserError("")
        error.args = ("one\ntwo",)
        raise error

    assert outcome(tmp_path, lambda rng, file: read_json(file)) == ("works", "")
    assert outcome(tmp_path, refuse) == ("refused", f"error: {tmp_path / 'a.json'} is bad")
    assert outcome(tmp_path, lambda rng, file: read_json(file)["x"])[0] == "KeyError in test_fuzz.py: <lambda>"
    assert outcome(tmp_path, lambda rng, file: json.loads("{"))[0].startswith("JSONDecodeError")
    assert outcome(tmp_path, two_lines)[0] == "more than a line"
    assert outcome(tmp_path, lambda rng, file: exit(3))[0] == "exit status 3"
    assert outcome(tmp_path, leave)[0] == "leaves something behind"


def never(pipe, valid):
    """In the place of fuzz.work: gives no answer."""
    time.sleep(60)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the system has no fork")
@pytest.mark.parametrize("work, kind", [(never, "hangs"), (lambda pipe, valid: exit(1), "dies")])
def test_a_case_that_hangs_or_dies(tmp_path, monkeypatch, capsys, work, kind):
    """It is found, and the next case has a process of its own."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(fuzz.multiprocessing, "get_context", lambda _: fork)
    monkeypatch.setattr(fuzz, "PATIENCE", 0.2)
    monkeypatch.setattr(fuzz, "work", work)
    findings, counts = fuzz.fuzz(0.02, 0, ["preferences"], tmp_path / "valid")
    assert set(findings) == {kind} and len(findings[kind]) >= 2 and counts.total() == len(findings[kind])
    assert f"FINDING {kind}: --target preferences --seed 0" in capsys.readouterr().out


def test_changes_are_repeated_by_their_seed_and_reach_everything():
    """Every kind of file, a thousand times: no change fails, most differ, and a seed gives the same again."""
    row = json.dumps(fuzz.RECORDS[0]).encode()
    for name, data in (("a.jsonl", row + b"\n" + row), ("a.json", row), ("a.jinja", fuzz.TEMPLATE.encode()),
                       ("a.safetensors", save({"a": torch.ones(2, 3), "b": torch.ones(())}, {"x": "{}"})),
                       ("a.jsonl.gz", gzip.compress(row, mtime=0)), ("a.txt", b"Once.")):
        found = {fuzz.changed_file(random.Random(seed), name, data) for seed in range(300)}
        assert len(found) > 60 and fuzz.changed_file(random.Random(7), name, data) in found, name


@pytest.mark.slow
def test_a_minute_of_all_targets(capsys):
    assert fuzz.main(["--minutes", "1", "--seed", "0"]) == 0, capsys.readouterr().out
