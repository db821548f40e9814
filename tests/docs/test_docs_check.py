"""test_docs_check.py - docs/check.py: the documents are in order, and each kind of broken promise is seen, by its line.
"""
import re
import shutil
import subprocess
import sys

import pytest

import chat
from docs import check


@pytest.fixture(scope="module")
def texts():
    return check.documents()


def test_the_documents_keep_their_promises(texts):
    wrong, counts = check.problems(texts)
    assert wrong == []
    least = {"links": 50, "names": 250, "commands": 180, "flags": 150, "figures": 120, "points": 8}
    assert all(counts[kind] >= n for kind, n in least.items()), counts


BROKEN = [      # document, what stands there, what stands there instead, what is said
    ("README.md", "[MIT licence](LICENSE)", "[MIT licence](LICENCE)", "LICENCE does not exist"),
    ("README.md", "(docs/img/results.png)", "(docs/img/result.png)", "docs/img/result.png does not exist"),
    ("docs/chat.md", 'src="img/chat-phone.png"', 'src="img/phone.png"', "img/phone.png does not exist"),
    ("docs/results.md", "(../data/README.md)", "(../data/README.md#preference)", "has no heading #preference"),
    ("docs/results.md", "(metrics.md) has the", "(#the-dpo) has the", "docs/results.md has no heading #the-dpo"),
    ("CHANGELOG.md", "(docs/chat.md)", "(docs/talk.md)", "docs/talk.md does not exist"),
    ("README.md", "(`data/toy.py`)", "(`data/toys.py`)", "data/toys.py does not exist"),
    ("course/instructor.md", "`course/setN/another.py`", "`course/setN/other.py`", "setN/other.py does not exist"),
    ("README.md", "`train_dpo.py: train`", "`train_dpo.py: trains`", "train_dpo.py has no trains"),
    ("docs/equations.md", "`data/batches.py: Batches.take`", "`data/batches.py: Batches.give`", "no Batches.give"),
    ("README.md", "python train_dpo.py --pref_dim 2        #", "python train_dpo.py --pref_dims 2   #", "--pref_dims"),
    ("README.md", "test.jsonl\n```", "test.jsonl --epochs x\n```", "--epochs: invalid float value"),    # the next line
    ("README.md", "`python course/handout.py --out DIR`", "`python course/handout.py --dir DIR`", "--out"),
    ("README.md", "python -m ops.check", "python -m ops.look", "ops/look.py does not exist"),
    ("docs/results.md", "`python -m experiments.reproduce ablations`", "`python -m experiments.reproduce ablation`",
     "there is no ablation"),
    ("docs/speed.md", "--only linear_logprob", "--only linear_logprobs", "there is no linear_logprobs"),
    ("course/set2/handout.md", "`python course/grade.py dpo_loss`", "`python course/grade.py dpo`", "there is no dpo"),
    ("docs/scaling.md", "torchrun --nnodes 2 --nproc_per_node 8", "torchrun --nodes 2 --nproc_per_node 8", "--nodes"),
    ("docs/scaling.md", "--rdzv_endpoint node0:29500 train_dpo.py", "--rdzv_endpoint node0:29500 train_base.py",
     "train_base.py is one process"),
    ("CONTRIBUTING.md", "`pytest -m slow` the rest", "`pytest -m slower` the rest", "what is slower?"),
    ("CONTRIBUTING.md", "`pytest tests/test_aggregate.py`", "`pytest tests/test_aggregates.py`", "test_aggregates.py?"),
    ("README.md", "`pip install -r requirements.txt && pytest`", "`pip install -r needs.txt && pytest`", "needs.txt"),
    ("docs/differences.md", "`--lams_per_step 1`", "`--lambdas 1`", "no script has the flag --lambdas"),
    ("README.md", "One 0.94M-parameter", "One 0.95M-parameter", "0.95 in"),
    ("README.md", "That makes 160 plain", "That makes 159 plain", "it is 160"),
    ("README.md", "at the same eleven preferences", "at the same ten preferences", "ten in"),
    ("README.md", "triton==3.9.0", "triton==3.8.0", "it is 3.9.0"),
    ("docs/differences.md", "learning rate 2e-3 (DPO 3e-3)", "learning rate 2e-3 (DPO 4e-3)", "4e-3 in"),
    ("docs/metrics.md", "that is left, below 1e-8", "that is left, at most 1e-8", "does not stand here any more"),
    ("README.md", "\n## Files\n", "\n" * 20 + "## Files\n", "lines are more than 200"),
    ("course/instructor.md", "| 48 | 12 | 12 | 72 points |", "| 48 | 12 | 14 | 74 points |", "[48, 12, 12, 72]"),
    ("course/instructor.md", "(6: numbers 3, meaning 3)", "(6: numbers 3, meaning 4)", "[3, 4], are not 6"),
    ("course/instructor.md", "**two_fronts** (14: picture 5", "**two_fronts** (13: picture 5", "14 in its box"),
    ("course/instructor.md", "**why_expected**", "**why**", "why_expected has no rubric"),
]


def broken(text, old, new):
    """The text with its first `old`, however its lines are broken, replaced; and the line where it stood."""
    place = re.search(r"\s+".join(map(re.escape, old.split(" "))), text)
    assert place, f"{old!r} is there no more: choose something else to break"
    return text[:place.start()] + new + text[place.end():], text.count("\n", 0, place.start()) + 1


@pytest.mark.parametrize("name, old, new, says", BROKEN)
def test_what_is_broken_is_seen(texts, name, old, new, says):
    """One problem (or two, of a number that two phrases hold), in the line where it stands or its sentence begins."""
    changed, line = broken(texts[name], old, new)
    wrong, _ = check.problems({name: changed})
    assert 1 <= len(wrong) <= 2 and all(says in problem and problem.startswith(f"{name}:") for problem in wrong), wrong
    if not any(of_all in says for of_all in ("any more", "has no rubric", "are more than")):
        assert 0 <= line - int(wrong[0].split(":")[1]) <= 5


@pytest.mark.parametrize("command", [
    "python train_dpo.py …", "python train_dpo.py --data … --eval_data …", "python eval_front.py RUN…",
    "python -m experiments.reproduce …", "python train_hqd.py --lam", "TRITON_INTERPRET=1 python -m ops.check",
    "torchrun --nproc_per_node N train_sft.py … --parallel ddp", "echo 'x | y' | python chat.py --init DIR",
    "python train_dpo.py --init <Hugging Face directory> --no-eval", "python export.py --help",
    "hf download a --include x"])
def test_placeholders_are_no_mistakes(command):
    wrong, counts = check.problems({"docs/new.md": f"As in\n\n```\n{command}      # of course\n```\n"})
    assert wrong == [] and (counts["commands"] == 1 or "--help" in command or command.startswith("hf"))


def test_a_changed_default_is_seen(texts, monkeypatch):
    """The truth comes from the code: a document that nobody has changed is wrong where the code is another one."""
    monkeypatch.setattr(chat, "MOST", 7)
    check.table.cache_clear()
    wrong, _ = check.problems({"docs/chat.md": texts["docs/chat.md"]})
    check.table.cache_clear()
    assert len(wrong) == 1 and "five in 'keeps a λ, up to #, beside': it is 6" in wrong[0]


def test_a_copy_with_a_problem_of_each_kind(texts, tmp_path):
    """As a user runs it: FILE:LINE lines, a summary, status 1; and nothing is left behind."""
    copy = shutil.copytree(check.ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns("out", ".git", "__pycache__"))
    kinds = [next(row for row in BROKEN if row[3].startswith(says)) for says in (
        "LICENCE", "data/toys.py", "--pref_dims", "no script", "0.95", "[48")]
    for name, old, new, _ in kinds:
        (copy / name).write_text(broken((copy / name).read_text(encoding="utf-8"), old, new)[0], encoding="utf-8")
    before = sorted(copy.rglob("*"))
    done = subprocess.run([sys.executable, "-B", str(copy / "docs/check.py")], cwd=tmp_path, capture_output=True,
                          text=True)
    *lines, last = done.stdout.splitlines()
    assert done.returncode == 1 and last.endswith("6 problems") and done.stderr == "" and len(lines) == 6, done
    for name, *_, says in kinds:
        assert any(re.match(rf"{name}:\d+: ", line) and says in line for line in lines), (says, lines)
    assert sorted(copy.rglob("*")) == before


def test_commands_that_are_run(monkeypatch, capsys):
    """In a copy, in order, with a limit; a command that fails, that takes too long, that no document has."""
    text = {"docs/new.md": "```\npython a.py\npython b.py\npython c.py\n```\n"}
    monkeypatch.setattr(check, "RUN", (("python a.py", "echo x > made && test -f README.md", 20),
                                       ("python b.py", "cat made && echo 'it broke' >&2 && exit 3", 20),
                                       ("python c.py", "sleep 20 | cat", 0.2), ("python d.py", "true", 20)))
    wrong = list(check.run_cheap(text))
    assert len(wrong) == 3 and all(says in line for says, line in zip(
        ("status 3: it broke", "more than 0.2 s", "no document has the command 'python d.py'"), wrong))
    assert "s  echo x > made" in capsys.readouterr().out and not (check.ROOT / "made").exists()
    monkeypatch.setattr(check, "documents", lambda: text)
    assert check.main(["--run"]) == 1 and check.main([]) == 1


def test_what_a_phrase_finds():
    text = "Some 1,200 and\ntwo of 3e-3, 0.5 or ¼; Ten."
    found = lambda phrase: [numbers for _, numbers in check.stated(phrase, text)]
    assert found("Some # and # of #, # or #; #.") == [("1,200", "two", "3e-3", "0.5", "¼", "Ten")]
    assert found("Some # ~ or #;") == [("1,200", "¼")] and found("Some # of") == []
    right = [("1,200", 1200), ("two", 2), ("3e-3", 0.003), ("0.5", 0.4567), ("¼", 0.25), ("3.9.0", "3.9.0")]
    wrong = [("1,200", 1200.4), ("two", 3), ("3e-3", 0.0031), ("0.5", 0.44), ("¼", 0.26), ("3.9.0", "3.9.1")]
    assert all(check.agrees(*pair) for pair in right) and not any(check.agrees(*pair) for pair in wrong)


def test_a_truth_that_is_gone_is_one_line(monkeypatch, capsys):
    """A line of the code that the table reads a number from has changed."""
    monkeypatch.setattr(check, "table", lambda: {"README.md": [("any #", check.said("pytest.ini", "no such # line"))]})
    assert check.main([]) == 1
    said = capsys.readouterr().out
    assert said == "docs/check.py looks for 'no such # line' in pytest.ini, and it is not there any more\n"
