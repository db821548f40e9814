"""real_rlhf.py on a tiny Llama and a reward of the test's own: what it measures and prints, and what it leaves."""
import math
import sys

import pytest
from running import SHARED, read, write_rows

from data.text_rewards import concise
from experiments import real_rlhf
from runs.files import UserError
from runs.flags import cli

LLAMA = SHARED / "material/stories260K"
REWARD = "def vowels(prompt, response):\n    return sum(response.count(x) for x in 'aeiou') / 10\n"


@pytest.fixture
def flags(tmp_path, monkeypatch):
    """flags(…): of two short runs in a directory of their own, and these."""
    if not LLAMA.exists():
        pytest.skip(f"{LLAMA} is not there")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(REWARD)
    prompts = [{"prompt": f"Who was number {i}?"} for i in range(100)] + [{"prompt": "Tell me more. " * 40}]
    argv = ["--init", LLAMA, "--prompts", write_rows("prompts.jsonl", prompts), "--sentiment",
            "mine.py:vowels", "--only", "panacea", "mgda", "--steps", 2, "--batch_size", 4, "--samples", 2,
            "--max_new_tokens", 40, "--system", "Hi.", "--max_prompt", 60, "--device", "cpu"]
    return lambda *more: cli(real_rlhf.Flags, "", [*map(str, argv), *more])


def test_two_runs(flags, tmp_path, monkeypatch, capsys):
    r = real_rlhf.main(flags())
    assert list(r["runs"]) == ["panacea", "mgda"] and r["dims"] == ["vowels", "concise"]
    long = [row for row in r["prompts"] if "more" in row]
    assert not long and 2 <= len(r["prompts"]) < 30                    # held out, and short
    panacea, mgda = r["runs"].values()
    assert [len(panacea[key]) for key in ("lams", "texts", *real_rlhf.FIGURES)] == [11] * 9
    assert [len(mgda[key]) for key in ("lams", "texts", *real_rlhf.FIGURES)] == [1] * 9
    for x in (r["base"], *({key: run[key][i] for key in (*real_rlhf.FIGURES, "texts")}
                           for run in r["runs"].values() for i in range(len(run["lams"])))):
        assert all(map(math.isfinite, [*x["scores"], *x["J"], x["kl"]])) and min(x["scores_se"]) >= 0
        assert 0 < x["length"] <= 40 and 0 <= x["collapsed"] <= 1 and len(x["texts"]) == len(r["prompts"])
    assert r["base"]["kl"] == pytest.approx(0, abs=1e-4) and r["base"]["scores_se"][0] > 0
    # of the base's answers, the first to each prompt are the texts, and the rewards are theirs
    raw = read("out/rlhf-mgda/samples.json")["base"]["raw"][::4]
    assert raw == [[sum(map(y.count, "aeiou")) / 10, concise("", y, 12)] for y in r["base"]["texts"]]
    said = capsys.readouterr().out
    assert all(f"{value:.3f} ± " in said for value in mgda["scores"][0] + r["base"]["scores"])
    assert said.count("| Who was number") == real_rlhf.SHOWN and "Spearman along λ: vowels" in said
    assert read("out/real_rlhf.json") == r and (tmp_path / "out/real_rlhf.png").stat().st_size > 10_000

    monkeypatch.setattr(real_rlhf, "call", lambda what, *more: pytest.fail(f"{what} again"))
    assert real_rlhf.main(flags()) == r
    with pytest.raises(UserError, match="no prompt has at most 3 tokens"):
        real_rlhf.main(flags("--max_prompt", "3"))
    with pytest.raises(UserError, match="--only dpo: choose among panacea pamav"):
        real_rlhf.main(flags("--only", "dpo"))


def test_a_reward_that_is_missing(flags, monkeypatch):
    with pytest.raises(UserError, match="none.py does not exist"):
        real_rlhf.main(flags("--sentiment", "none.py:happy"))
    for name in ("vaderSentiment", "vaderSentiment.vaderSentiment"):   # as where it is not installed
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="pip install vaderSentiment$"):
        real_rlhf.main(flags("--sentiment", real_rlhf.Flags.sentiment))
