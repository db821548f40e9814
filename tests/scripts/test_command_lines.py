"""test_command_lines.py - every script as a user starts it: bad input is one line and status 2; --help tells flags."""
import pytest
from running import ROOT, command

BAD = {"train_base": ["--size", "huge"], "train_dpo": ["--pref_dim", 1], "train_sft": ["--pref_dim", 1],
       "train_ppo": ["--lam", 0.7, 0.7, "--method", "dps"], "train_hqd": ["--near", 0],
       "train_reward": ["--dims", "kind"], "eval_front": ["out/nowhere"],
       "export": ["out/nowhere"], "chat": ["out/nowhere"]}


def test_every_script_is_here():
    scripts = [f for f in ROOT.glob("*.py") if "run_main(main, Flags" in f.read_text(encoding="utf-8")]
    assert set(BAD) <= {f.stem for f in scripts}
    # torchrun may start one of them
    several = {f.stem for f in scripts if "several=True" in f.read_text(encoding="utf-8")}
    assert several == set(BAD) - {"train_base", "eval_front", "export", "chat"}


@pytest.mark.slow
@pytest.mark.parametrize("script", BAD)
def test_bad_input_as_a_user_meets_it(work, script):
    out = [] if script in ("eval_front", "export", "chat") else ["--out", "out/bad", "--device", "cpu"]
    done = command(script, *out, *BAD[script], cwd=work, status=2)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (work / "out/bad").exists()


@pytest.mark.slow
def test_help(work):
    first, text = (command("train_dpo", word, cwd=work).stdout for word in ("--help", "--help-all"))
    assert "--lams_per_step" in text and "--no-eval" in text and "Algorithm 1" in text
    assert "--pref_dim" in first and "--no-eval" not in first and "--help-all" in first
