"""test_plots.py - the curves of metrics.jsonl: what is read, what is drawn, and runs of every kind."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from runs import plots
from runs.directory import read_log
from runs.files import UserError
from runs.flags import cli, run_main

CONFIG = {"script": "train_dpo.py", "dims": ["helpful", "harmless"], "base": "b", "tokenizer": "t", "fingerprint": "f",
          "flags": {"steps": 3, "seed": 0, "batch_size": 1, "max_length": 9}}
RECORDS = [dict(step=1, member=0, loss=4.0, losses=[1.0, None], lam=[[0.5, 0.5]], tokens=10, weights=None),
           dict(step=2, member=0, loss=None, losses=[2.0, 3.0], lam=[[1.0, 0.0]], tokens=30, weights=None),
           dict(step=1, member=1, loss=2.0, losses=[5.0, 7.0], lam=[[0.0, 1.0]], tokens=50, weights=None)]


@pytest.fixture
def run(tmp_path):
    """run(name, records, rest): a run directory with these records, and a last line."""
    def make(name="a", records=RECORDS, rest="", config=CONFIG):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + rest)
        return tmp_path / name
    return make


def test_what_is_read(run):
    """Wrong: null as 0, the second model's steps from 1 again, a table as a key."""
    dims, columns, x, models = plots.read_run(run(rest='{"step": 2, "mem'), "step")
    assert dims == ["helpful", "harmless"] and set(columns) == {"step", "member", "loss", "losses", "tokens"}
    np.testing.assert_equal(columns["loss"], [[4], [np.nan], [2]])
    np.testing.assert_equal(columns["losses"], [[1, np.nan], [2, 3], [5, 7]])
    assert x.tolist() == [1, 2, 3] and [model.tolist() for model in models] == [[0, 1], [2]]
    assert plots.read_run(run("b"), "tokens")[2].tolist() == [10, 40, 90]


def test_columns():
    assert plots.column([1, None, 2.5], 2).shape == (3, 1) and plots.column([None, [1, 2]], 2).shape == (2, 2)
    for values in ([None, None], ["a", "b"], [[1, 2], [1]], [[[1, 2]]], [[1, 2, 3]], [{}]):
        assert plots.column(values, 2) is None, values


def test_means():
    x = np.array([0.0, 4.0, np.nan, 8.0])
    np.testing.assert_allclose(plots.mean_of(x, 1), x)
    np.testing.assert_allclose(plots.mean_of(x, 3), [4 / 3, 8 / 3, 6, 8])             # weights ½, 1, ½ of those known
    np.testing.assert_allclose(plots.mean_of(np.full(50, 3.0), 20), 3)
    assert np.isnan(plots.mean_of(np.full(3, np.nan), 2)).all() and len(plots.mean_of(np.ones(2), 99)) == 2


def drawn(paths, keys, *words):
    """{key: its (x, y, color, dash, width) of every line}, and the names in the legend."""
    flags = cli(plots.Flags, "", [*map(str, paths), *words])
    fig = plots.draw({path.name: plots.read_run(path, flags.x) for path in paths}, keys, flags)
    of = lambda line: (line.get_xdata().tolist(), line.get_ydata().tolist(), line.get_color(), line.get_linestyle(),
                       line.get_linewidth())
    return ({ax.get_title(loc="left"): [of(line) for line in ax.lines] for ax in fig.axes},
            [text.get_text().strip() for text in fig.legends[0].get_texts()])


def test_one_run(run):
    """Each model has lines of its own, so that nothing joins them; each dimension a color. Faint ones are as logged."""
    panels, legend = drawn([run()], ["losses", "tokens"])
    faint, bold = panels["losses"][0::2], panels["losses"][1::2]
    assert [(x, y[0]) for x, y, *_ in faint] == [([1, 2], 1), ([3], 5), ([1, 2], faint[2][1][0]), ([3], 7)]
    assert all(thin[4] < 1 < thick[4] and thin[2] == thick[2] for thin, thick in zip(faint, bold))
    assert legend == ["helpful", "harmless"] and len({line[2] for line in bold}) == 2
    assert {line[2] for line in panels["tokens"]} == {"0.25"}


def test_several_runs(run):
    """Each run has a color, each dimension a dash; a run without the key has no line, a key of one run is drawn."""
    other = run("b", [{"step": 1, "member": 0, "losses": [1.0, 2.0], "kl": 1.0}])
    panels, legend = drawn([run(), other], ["losses", "loss", "kl"])
    looks = {line[2:4] for line in panels["losses"][1::2]}
    assert legend == ["a", "b", "helpful", "harmless"] and len(looks) == 4
    assert len({color for color, _ in looks}) == 2 == len({dash for _, dash in looks})
    assert {line[2] for line in panels["loss"]} == {plots.COLORS[0]} and panels["kl"][0][2] == plots.COLORS[1]


def test_a_spike_leaves_the_panel(run):
    path = run("s", [{"step": i + 1, "member": 0, "grad_norm": 1000.0 if i == 150 else 1 + i % 2} for i in range(300)])
    fig = plots.draw({"s": plots.read_run(path, "step")}, ["grad_norm"], cli(plots.Flags, "", [str(path)]))
    assert 2 < fig.axes[0].get_ylim()[1] < 5


def test_the_command(run, capsys):
    path = run()
    picture = plots.main(cli(plots.Flags, "", [str(path)]))
    assert picture == path / "curves.png" and picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in capsys.readouterr().out
    plots.main(cli(plots.Flags, "", [str(path), "--list"]))
    assert set(capsys.readouterr().out.split()) == {"step", "member", "loss", "losses", "tokens"}
    plots.main(cli(plots.Flags, "", [str(path), "--keys", "tokens", "--x", "tokens", "--out", str(path / "x.svg")]))
    assert "<svg" in (path / "x.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("words, says", [
    ("a --keys lam", "--keys lam: there are "), ("nowhere", "nowhere: no metrics.jsonl with a step"),
    ("empty", "empty: no metrics.jsonl with a step"), ("a --out x.jpeg", "ends in .png, .svg or .pdf"),
    ("damaged", "metrics.jsonl, line 2: damaged"), ("a --smooth 0", "must be at least 1"), ("", "required: runs"),
    ("a --out a/config.json/x.png", "cannot be written"), ("old", "older version")])
def test_bad_input_is_one_line(run, words, says, monkeypatch, capsys):
    path = run()
    run("empty", [])
    run("damaged", RECORDS[:1] + ["x"] + RECORDS[1:])
    run("old", config={"dims": ["helpful"]})
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(sys, "argv", ["plots.py", *words.split()])
    with pytest.raises(SystemExit) as end:
        run_main(plots.main, plots.Flags, "")
    error = capsys.readouterr().err
    assert end.value.code == 2 and says in error and error.count("\n") == 1
    assert not list(path.parent.rglob("*.png"))


def test_a_log_is_read_up_to_where_it_was_being_written(run):
    assert [record["step"] for _, record in read_log(run(rest='{"step"') / "metrics.jsonl")] == [1, 2, 1]
    for number, line in enumerate(('{"step": 1.5}', '{"step": 1, "member": "a"}', "null")):
        path = run(f"d{number}", rest=line + "\n" + json.dumps(RECORDS[0]) + "\n")
        with pytest.raises(UserError, match="line 4: damaged"):
            read_log(path / "metrics.jsonl")


def test_runs_of_every_kind(panacea, soups, ppo_run, hqd_run, reward_run, work, monkeypatch):
    """Alone, by what matters for each; and together. A base model has a directory of another form."""
    monkeypatch.chdir(work)
    seen, draw = [], plots.draw
    monkeypatch.setattr(plots, "draw", lambda runs, keys, flags: seen.append(keys) or draw(runs, keys, flags))
    paths = [panacea, soups, ppo_run[0], hqd_run[0], reward_run, Path("out/base-tiny-seed0").resolve()]
    for path in paths:
        assert plots.main(cli(plots.Flags, "", [str(path)])).stat().st_size > 10_000
        (path / "curves.png").unlink()
    usual = ["loss", "losses", "accuracy", "grad_norm"]
    assert seen == [usual, usual, ["rewards", "objective", "kl", "length", "explained_variance", "grad_norm"],
                    ["loss", "grad_norm"], usual, ["loss", "grad_norm"]]
    assert plots.main(cli(plots.Flags, "", [*map(str, paths), "--keys", "loss", "--out", "all.png"])).exists()
