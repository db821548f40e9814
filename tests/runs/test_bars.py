"""test_bars.py - what takes long shows a bar with the time left: on a terminal, in one process, and of every long part.
"""
import gzip
import io
import os
import re
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from running import go, own_rows
from tqdm import tqdm

import eval_front
import export
from data import toy
from data.files import records
from data.own_rewards import own_reward
from data.tokenizers import load_tokenizer, tokenize
from families import stored_tensors
from fronts import optimum
from model import Transformer, generate
from runs import files, loop
from runs.files import bar
from runs.flags import cli
from svd_lora import inject_svd_lora, merged_state_dict


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def bars(monkeypatch):
    """bars(): {what a bar says: how many items} of all that a terminal was shown since the last call, however short."""
    terminal = Terminal()
    monkeypatch.setattr(files, "SHOWN_AFTER", 0)
    for module in (files, loop):
        monkeypatch.setattr(module, "tqdm", partial(tqdm, file=terminal))

    def shown():
        text = terminal.getvalue()
        terminal.seek(0), terminal.truncate()
        return dict(re.findall(r"([^\r\n\x1b|]+?): +\d+%\|[^|]*\| *[\d.]+\w?/([\d.]+\w?) \[", text))
    return shown


def test_a_bar(bars, monkeypatch):
    assert list(bar(range(3), "three")) == [0, 1, 2] and list(bar(iter("ab"), "two", 2)) == ["a", "b"]
    assert bars() == {"three": "3", "two": "2"}
    monkeypatch.setattr(files, "SHOWN_AFTER", 60)
    assert list(bar(range(3), "short")) == [0, 1, 2] and bars() == {}
    monkeypatch.setattr(files, "SHOWN_AFTER", 0)
    monkeypatch.setattr(files.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(files.dist, "get_rank", lambda: 1)
    assert list(bar(range(3), "of another process")) == [0, 1, 2] and bars() == {}
    monkeypatch.setattr(files.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(files, "tqdm", partial(tqdm, file=(pipe := io.StringIO())))
    assert list(bar(range(3), "no terminal")) == [0, 1, 2] and pipe.getvalue() == ""


def test_reading(bars, tmp_path):
    rows = own_rows(tmp_path / "rows.jsonl", 50)
    assert len(list(records(rows))) == 50 and bars() == {f"reading {rows}": f"{os.path.getsize(rows) / 1000:.2f}k"}
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(rows).read_bytes()))
    assert len(list(records(packed))) == 50 and set(bars()) == {f"reading {packed}"}
    tokenize([toy.as_row("How?", ["So."])] * 7, load_tokenizer("toy"), 40)
    assert bars() == {"tokens": "7"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without named pipes")
def test_a_pipe_is_read_too(bars, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=('{"a": 1}\n{"a": 2}\n',))
    writer.start()
    assert [row["a"] for _, row in records(tmp_path / "pipe")] == [1, 2]
    writer.join()


def test_models(bars, tiny, tmp_path):
    tiny().save_pretrained(tmp_path)
    assert bars() == {"writing": "1"}
    model = Transformer.from_pretrained(tmp_path, quantize="nf4")
    stored = len(list(stored_tensors(tmp_path / "model.safetensors", "cpu")))
    assert bars() == {"reading model.safetensors": str(stored)}
    merged_state_dict(inject_svd_lora(model, 2, 0, generator=torch.Generator()))
    assert bars() == {"dequantising": "12", "merging": "12"}
    generate(model, [[1, 2]], 5, eos_id=-1, show=lambda steps: bar(steps, "sampling", 5))
    assert bars() == {"sampling": "5"}


def test_rewards(bars, tmp_path):
    (tmp_path / "mine.py").write_text("def good(prompt, response):\n    return len(response)\n")
    own_reward(f"{tmp_path}/mine.py:good")(["a", "b"], ["c", "dd"])
    assert bars() == {"good": "2"}


def test_exact_fronts(bars):
    scores = torch.randn(2, 6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lams, w = torch.tensor([[0.5, 0.5], [0.2, 0.8], [1.0, 0.0]]), torch.tensor([0.5, 0.5]).double()
    optimum.dpo_ls(lams, scores, w)
    assert bars() == {"exact front": "3"}
    optimum.dpo_tche(lams, scores, w, [0.0, 0.0])
    assert bars() == {"exact front": "3"}
    optimum.most_scores(lams, scores, torch.full((2, 6), 1 / 6).double().log(), [1.0])
    assert bars() == {"largest scores": "1"}


@pytest.mark.parametrize("script, flags, parts", [
    ("train_dpo", dict(eval=True), {"log π_ref": "4", "training": "4", "front": "11", "log π": "1",
                                    "exact front": "101"}),
    ("train_dpo", dict(eval=True, method="dps", dps_parts=2, steps=3), {"adapter-001": "1", "front": "3"}),
    ("train_reward", dict(eval=True), {"training": "20", "held-out pairs": "1", "reference responses": "1",
                                       "rewards": "1"}),
    ("train_ppo", dict(eval=True, rewards=["length", "concise:3"], steps=2), {"rewards of the base": "2", "front": "11",
                                                                          "sampling": "24", "KL": "1"}),
    ("train_hqd", dict(eval=True), {"sampling answers": "3", "front": "3", "largest scores": "1"})])
def test_trainings_and_evaluations(in_small_world, bars, script, flags, parts):
    """Every long part, with how many items it has. (The small world's are few.)"""
    go(script, f"bars-{script}-{len(flags)}", **flags)
    shown = bars()
    assert set(parts) <= set(shown), (sorted(set(parts) - set(shown)), shown)
    assert {what: shown[what] for what in parts} == parts


def test_files_exports_and_stationarity(in_small_world, bars, ppo_run, tmp_path):
    files = own_rows("rows.jsonl", 40)
    go("train_dpo", "bars-files", data=[files], eval_data=[files], eval=True, init="out/base-of-no-world",
       tokenizer="toy", steps=2)
    shown = bars()
    assert shown["held-out pairs"] == "10" and shown["tokens"] == "40" and f"reading {files}" in shown
    run, *_ = ppo_run
    export.main(cli(export.Flags, "", [str(run), "--pref", "0.3", "0.7", "--out", str(tmp_path / "out")]))
    assert set(bars()) >= {"reading model.safetensors", "merging", "writing", "comparing logits"}
    eval_front.main(cli(eval_front.Flags, "", [str(run), "--stationarity", "--device", "cpu"]))
    assert bars()["gradients"] == "1"
