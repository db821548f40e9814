"""test_listing.py - the list of runs: what each is, how far it got, what came out; for people and for scripts."""
import json
import os
import shutil

import pytest
from running import killed

import eval_front
from runs.files import UserError, write_json
from runs.flags import cli
from runs.listing import RECORD, age, runs_under

pytestmark = pytest.mark.usefixtures("in_small_world")


@pytest.fixture
def folder(panacea, reward_run, tmp_path):
    """Copies of finished runs, one killed at its third step, and a model, which is no run."""
    left = killed("train_dpo", "listed", lambda r: r["step"] == 3, save_every=1)
    for i, run in enumerate((panacea, reward_run, left)):
        copy = shutil.copytree(run, tmp_path / "runs" / str(i))
        for file in copy.rglob("*"):
            os.utime(file, (1000 - i, 1000 - i))
    write_json(tmp_path / "runs" / "model" / "config.json", {"model_type": "gpt2"})
    write_json(tmp_path / "runs" / "0" / "front.json", dict(regret=None, points_are="accuracy", inner_product=0.75))
    os.utime(tmp_path / "runs" / "0" / "front.json", (1000, 1000))
    return tmp_path / "runs"


def test_records(folder):
    """Wrong: a run that was killed counts as finished, or a model as a run."""
    records = runs_under(folder)
    assert all(tuple(record) == RECORD for record in records)
    got = [[r[key] for key in ("script", "method", "steps", "step", "finished", "measure", "written")] for r in records]
    assert got == [["train_dpo.py", "panacea", 4, 4, True, "λ · accuracy", 1000],
                   ["train_reward.py", None, 20, 20, True, got[1][5], 999],
                   ["train_dpo.py", "panacea", 4, got[2][3], False, None, 998]] and 1 <= got[2][3] < 4
    assert [r["result"] for r in records][::2] == [0.75, None]
    write_json(folder / "0" / "front.json", dict(regret=0.5, points_are="normalised J", inner_product=0.9))
    assert [r["result"] for r in runs_under(folder) if r["measure"] == "regret"] == [0.5]
    assert [r["run"] for r in runs_under(folder / "2")] == [str(folder / "2")]


def test_a_table_for_people_and_two_forms_for_scripts(folder, capsys):
    said = lambda *words: (eval_front.main(cli(eval_front.Flags, "", words)), capsys.readouterr().out)
    records, text = said("--list", str(folder))
    assert text.count("\n") == 5 and f"{records[2]['step']} of 4" in text and "helpful harmless" in text
    assert json.loads(said(str(folder), "--list", "--json")[1]) == records
    head, *lines = said(str(folder), "--list", "--tsv")[1].splitlines()
    assert tuple(head.split("\t")) == RECORD and lines[0].split("\t")[3:6] == ["helpful harmless", "4", "4"]
    with pytest.raises(UserError, match="^nowhere is not a directory$"):
        said("--list", "nowhere")


def test_ages(monkeypatch):
    monkeypatch.setattr("runs.listing.time.time", lambda: 10 ** 6)
    ages = [age(10 ** 6 - seconds) for seconds in (-5, 95, 7100, 7300, 86400, 200_000)]
    assert ages == ["0 min", "2 min", "118 min", "2 h", "24 h", "2 d"]
