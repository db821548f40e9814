"""test_flags.py - a dataclass becomes flags: types, ranges, lists; errors are one line and exit status 2."""
import sys
from dataclasses import dataclass, fields
from typing import Literal

import pytest
import torch

import train_dpo
import train_hqd
import train_ppo
import train_reward
import train_sft
from runs.files import Stopped, UserError
from runs.flags import FIRST, RunFlags, check_lam, cli, flag, preferences_of, run_main


@dataclass
class Flags(RunFlags):
    """One flag of each kind."""
    runs: list[str] = flag([], "positional", positional=True)
    rate: float | None = flag(None, "a number or none", "positive")
    count: int = flag(3, "an integer", 1)
    kind: Literal["a", "b"] = flag("a", "a choice")
    names: list[str] | None = flag(None, "several names")
    weights: list[float] = flag([1.0, 0.5], "several numbers", "share")
    decay: float = flag(0.0, "not below 0", "not negative")
    free: float | None = flag(None, "any number")


def test_types_come_from_the_annotations():
    flags = cli(Flags, "", ["x", "y"])
    assert flags == Flags(runs=["x", "y"]) and flags.weights == [1.0, 0.5] and flags.eval is True
    flags = cli(Flags, "", "x --rate 1 --count 5 --kind b --names p q --weights 0 1 --no-eval --out o".split())
    assert (flags.rate, flags.count, flags.kind, flags.names, flags.weights, flags.eval, flags.out) == (
        1.0, 5, "b", ["p", "q"], [0.0, 1.0], False, "o") and isinstance(flags.rate, float)
    Flags().weights.append(3.0)
    assert Flags().weights == [1.0, 0.5]                      # a default list is nobody's own


@pytest.mark.parametrize("words, message", [
    ("--count 0", "--count 0: must be at least 1"), ("--rate 0", "--rate 0.0: must be positive"),
    ("--rate nan", "--rate nan: must be positive"), ("--rate inf", "--rate inf: must be positive"),
    ("--weights 0.5 1.5", "--weights 1.5: must be between 0 and 1"), ("--weights nan", "must be between 0 and 1"),
    ("--decay -1", "--decay -1.0: must not be negative"), ("--decay nan", "--decay nan: must not be negative"),
    ("--save_every 0", "--save_every 0: must be at least 1"),
    ("--free nan", "--free nan: must be between -2\\^31 and 2\\^31"), (f"--count {2 ** 31}", "-2\\^31 and 2\\^31")])
def test_ranges_stand_in_the_declarations(words, message):
    with pytest.raises(UserError, match=f"^[^\n]*{message}$"):
        cli(Flags, "", ["x", *words.split()])


@pytest.mark.parametrize("words", ["--kind c", "--count x", "--nobody 1", "--config preset.json", "--count"])
def test_what_argparse_refuses(words, capsys):
    with pytest.raises(UserError, match="^[^\n]+; .* --help-all lists the flags$"):
        cli(Flags, "", ["x", *words.split()])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("words, message", [
    ("--evil", "there is no flag --evil; --eval is the nearest"), ("--qqq 1", "there is no flag --qqq"),
    ("--coun 4", "there is no flag --coun; --count is the nearest"),
    ("--coun=4", "there is no flag --coun=4; --count is the nearest"),
    ("--eval FILE", "FILE belongs to no flag: --eval takes none; --eval_data does"),
    ("--no-eval FILE", "FILE belongs to no flag: --no-eval takes none"),
    ("--count=4 FILE", "FILE belongs to no flag: --count takes one value"), ("FILE", "FILE belongs to no flag")])
def test_what_stands_at_no_place_is_named(words, message):
    """Also what argparse would take for an abbreviation."""
    @dataclass
    class Plain(RunFlags):
        """Without a positional one."""
        count: int = flag(3, "an integer", 1)
        eval_data: list[str] | None = flag(None, "files")
    with pytest.raises(UserError, match=f"^{message}; .* --help-all lists the flags$"):
        cli(Plain, "", words.split())


def test_preferences_of_numbers():
    lams = preferences_of([0.3, 0.7, 0.5, 0.50004], ["a", "b"])
    assert lams.shape == (2, 2) and lams.dtype == torch.float64 and lams[0].tolist() == pytest.approx([0.3, 0.7])
    assert lams.sum(1).tolist() == pytest.approx([1, 1], abs=1e-12)
    for numbers, text in (([0.3, 0.7, 0.5], "--lam takes 2 numbers per preference, for a b; got 3"),
                          ([0.7, 0.7], "--lam 0.7 0.7: a preference is not negative and sums to 1"),
                          ([1.5, -0.5], "not negative"), ([0.5, 0.5, 0.5, 0.6], "sums to 1")):
        with pytest.raises(UserError, match=text):
            preferences_of(numbers, ["a", "b"])


def test_preferences_of_names():
    """Each of several in its own order. Wrong: the order of the words."""
    words = ["b=0.75", "a=0.25", "a=1", "b=0", "0.5", "0.5"]
    assert preferences_of(words, ["a", "b"]).tolist() == [[0.25, 0.75], [1, 0], [0.5, 0.5]]
    assert preferences_of(["x=y=0.25", "c=0.75"], ["c", "x=y"]).tolist() == [[0.75, 0.25]]
    for words in (["0.25,0.75"], ["0.25,", "0.75"], ["b=0.75,a=0.25"]):
        assert preferences_of(words, ["a", "b"]).tolist() == [[0.25, 0.75]]
    assert preferences_of(["x,y=0.25", "c=0.75"], ["c", "x,y"]).tolist() == [[0.75, 0.25]]
    for words, text in ((["a=0.5", "0.5"], "--pref a=0.5 0.5: the dimensions are a b, each once"),
                        (["a=0.5", "a=0.5"], "each once"),
                        (["a=0.5", "c=0.5"], "--pref a=0.5 c=0.5: c is none of the dimensions, a b"),
                        (["c=1"], "c is none of"),
                        (["a=0.5", "b=half"], "--pref a=0.5 b=half: a preference is numbers, or dimension=number"),
                        (["nan", "1"], "not negative")):
        with pytest.raises(UserError, match=text):
            preferences_of(words, ["a", "b"], "--pref")


def test_positional_flags():
    @dataclass
    class One:
        """One text, and any number of others."""
        run: str = flag(None, "a text", positional=True)
        others: list[str] = flag([], "texts", positional="any")

    @dataclass
    class Any:
        """One text, or none."""
        run: str | None = flag(None, "a text", positional="any")
    assert cli(Any, "", []).run is None and cli(Any, "", ["x"]).run == "x"
    assert cli(One, "", ["x"]) == One("x", []) and cli(One, "", ["x", "y", "z"]) == One("x", ["y", "z"])
    for flags, words in ((One, []), (Any, ["x", "y"]), (Flags, ["--count", "3"])):
        with pytest.raises(UserError):
            cli(flags, "", words)


def test_lam_is_one_preference_of_dps():
    check_lam(train_dpo.Flags(), ["a", "b"])
    check_lam(train_dpo.Flags(method="dps", lam=[0.5, 0.5]), ["a", "b"])
    for flags, text in ((dict(lam=[0.5, 0.5]), "the one preference of --method dps; panacea serves"),
                        (dict(method="dps", lam=[0.5, 0.5, 1.0, 0.0]), "--lam takes 2 numbers, for a b; got 4"),
                        (dict(method="dps", lam=[0.5]), "--lam takes 2 numbers"),
                        (dict(method="dps", lam=[0.7, 0.7]), "sums to 1")):
        with pytest.raises(UserError, match=text):
            check_lam(train_dpo.Flags(**flags), ["a", "b"])


def helped(capsys, script, word):
    with pytest.raises(SystemExit) as end:
        cli(script.Flags, script.__doc__, [word])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_tells_every_flag_and_its_default(capsys):
    text = helped(capsys, train_dpo, "--help-all")
    assert all(f"--{f.name} " in text or f"--{f.name}," in text for f in fields(train_dpo.Flags))
    assert "(default: 480)" in text and "--no-eval" in text and "(default: None)" not in text
    assert text.index("--beta") < text.index("--log_every")   # the script's own first
    titles = [line.rstrip(":") for line in text.splitlines() if line.endswith(":") and line[0] != " "]
    assert titles[:2] == ["options", "this script"] and len(titles) == len(set(titles)) == 7     # one for each class


@pytest.mark.parametrize("script", [train_dpo, train_sft, train_ppo, train_hqd, train_reward])
def test_short_help(capsys, script):
    """At most ten flags, of which the others are not named; they are still taken."""
    text = helped(capsys, script, "--help")
    shown = {f.name for f in fields(script.Flags) if f"\n  --{f.name} " in text}
    assert {"steps", "init", "out"} <= shown <= set(FIRST) and len(shown) <= 10 and "--warmup_ratio" not in text
    assert cli(script.Flags, "", ["--warmup_ratio", "0.5"]).warmup_ratio == 0.5


def ends(monkeypatch, main, argv=("x",), **more):
    """The exit status of run_main, 0 where it returns."""
    monkeypatch.setattr(sys, "argv", ["train_x.py", *argv])
    try:
        run_main(main, Flags, "", **more)
    except SystemExit as end:
        return end.code
    return 0


def test_errors_of_users_are_one_line(monkeypatch, capsys):
    def bad(flags):
        raise UserError(f"{flags.runs[0]} is no run")

    def stopped(flags):
        raise KeyboardInterrupt

    assert ends(monkeypatch, lambda flags: None) == 0
    def damaged(flags):
        raise FloatingPointError("the model's logits are not finite")

    assert ends(monkeypatch, bad) == 2 and capsys.readouterr().err == "error: x is no run\n"
    assert ends(monkeypatch, damaged) == 2 and capsys.readouterr().err == "error: the model's logits are not finite\n"
    assert ends(monkeypatch, bad, ["x", "--count", "0"]) == 2
    assert capsys.readouterr().err == "error: --count 0: must be at least 1\n"
    assert ends(monkeypatch, stopped) == 130
    assert capsys.readouterr().err == "stopped; the same command goes on\n"           # for Flags are a training's

    monkeypatch.setattr(sys, "argv", ["eval_x.py"])
    with pytest.raises(SystemExit) as end:
        run_main(stopped, dataclass(type("Other", (), {})), "")
    assert end.value.code == 130 and capsys.readouterr().err == "stopped\n"

    def kept(flags):
        raise Stopped("stopped after step 3", 143)

    assert ends(monkeypatch, kept) == 143 and capsys.readouterr().err == "stopped after step 3\n"

    def broken(flags):
        raise ValueError("a bug")                             # is no user's error, and not hidden

    with pytest.raises(ValueError):
        ends(monkeypatch, broken)


def test_scripts_of_one_process_refuse_torchrun(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    ran = []
    assert ends(monkeypatch, ran.append) == 2 and not ran
    assert capsys.readouterr().err == "error: train_x.py is one process: start it with python, not with torchrun\n"
    assert ends(monkeypatch, ran.append, several=True) == 0 and len(ran) == 1


def test_of_several_processes_the_first_alone_prints(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "stdout", sys.stdout)            # put back at the end
    assert ends(monkeypatch, lambda flags: print("said twice"), several=True) == 0
    assert capsys.readouterr().out == ""
