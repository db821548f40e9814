"""test_own_rewards.py - rewards of a user's own file: what they are given, and every way in which they can be wrong."""
import re
import sys
import types

import pytest
import torch
from running import ROOT

from data.files import Message
from data.own_rewards import own_reward
from data.rewards import named_rewards
from runs.directory import absolute, contents
from runs.files import UserError


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """mine(text): the text as mine.py in the working directory."""
    monkeypatch.chdir(tmp_path)
    return lambda text: (tmp_path / "mine.py").write_text(text) and "mine.py"


def test_one_text_or_many(mine):
    """Wrong: the whole conversation in the place of the last question, or responses in another order."""
    mine("from beside import more\n\ndef one(prompt, response):\n    return len(response) + more(prompt)\n\n"
         "def many(prompts, responses):\n    return [one(x, y) for x, y in zip(prompts, responses)]\n")
    open("beside.py", "w").write("def more(prompt):\n    return 100 * len(prompt)\n")
    turns = (Message("user", "A long first question?"), Message("assistant", "Yes."), Message("user", "And?"))
    rewards = named_rewards(["mine.py:one", "mine.py:many", "length"], None, None, "cpu")
    assert rewards.dims == ["one", "many", "length"] and rewards.mean == rewards.std == [None] * 3
    raw = rewards.raw([turns, "Hi"], ["Good.", "A b c."], [True, False])
    assert raw.tolist() == [[405, 405, 0.1], [206, 206, 0.3]] and raw.dtype == torch.float64
    assert own_reward("mine.py:many")([], []).shape == (0, 1)
    with pytest.raises(UserError, match="must all differ"):
        named_rewards(["mine.py:one", "mine.py:one"], None, None, "cpu")


@pytest.mark.parametrize("body, text", [
    ("f(prompt, response): return None", "None for the response 'bad'; a reward is a finite number"),
    ("f(prompt, response): return float('nan')", "nan for the response 'bad'"),
    ("f(prompt, response): return 'much'", "'much' for the response 'bad'"),
    ("f(prompts, responses): return [1.0, float('inf')]", "inf for the response 'worse'"),
    ("f(prompts, responses): return [1.0]", "1 for 2 responses, of which the first is 'bad'"),
    ("f(prompts, responses): return 1.0", "float for 2 responses"),
    ("f(prompt, response): return 1 / (len(response) - 5)", "fails at the response 'worse': ZeroDivisionError: "),
    ("f(prompts, responses): raise ValueError('two\\nlines')", "fails at the response 'bad': ValueError: two lines"),
    ("g(prompt, response): return 1", "mine.py must define f(prompt, response), or f(prompts, responses) for lists"),
    ("f(text): return 1", "must define f(prompt, response)"),
    ("f(prompt, response: return 1", "the file fails: SyntaxError: ")])
def test_what_is_wrong_is_one_line(mine, body, text):
    mine(f"def {body}\n")
    with pytest.raises(UserError, match=f"^--rewards mine.py:f: [^\n]*{re.escape(text)}[^\n]*$"):
        own_reward("mine.py:f")(["Why?", "How?"], ["bad", "worse"])


def test_a_file_that_is_not_there(mine):
    with pytest.raises(UserError, match="^--rewards none.py:f: none.py does not exist$"):
        own_reward("none.py:f")


def test_a_run_knows_the_file_and_what_is_in_it(mine, tmp_path):
    known = lambda: contents({"rewards": ["mine.py:f", "happy"]}, "toy")["rewards"]
    mine("def f(prompt, response): return 1\n")
    before = known()
    assert absolute("mine.py:f") == f"{tmp_path / 'mine.py'}:f" and before[0][1] == "f" and before[1] == [None, "happy"]
    mine("def f(prompt, response): return 2\n")
    assert known()[0][0] != before[0][0]


def test_the_example_of_the_docs(mine, monkeypatch):
    """docs/rewards.md, with a stand-in where vaderSentiment is not installed."""
    try:
        import vaderSentiment.vaderSentiment  # noqa: F401
    except ImportError:
        words = dict(great=0.6, awful=-0.5)
        analyzer = type("SentimentIntensityAnalyzer", (), {"polarity_scores": lambda self, text: dict(
            compound=sum(words.get(word.strip(".!"), 0.0) for word in text.lower().split()))})
        module = types.ModuleType("vaderSentiment.vaderSentiment")
        module.SentimentIntensityAnalyzer = analyzer
        monkeypatch.setitem(sys.modules, "vaderSentiment", types.ModuleType("vaderSentiment"))
        monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", module)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8"), re.S)
    mine("\n".join(blocks))
    rewards = named_rewards(["mine.py:cheerful", "mine.py:brief"], None, None, "cpu")
    said = ["It was great!", "It was awful.", "It was " + "so " * 20 + "great!"]
    raw = rewards.raw(["How was it?"] * 3, said, [True] * 3)
    assert raw[0, 0] > 0.3 > -0.3 > raw[1, 0] and raw[0, 1] == raw[1, 1] > raw[2, 1]
