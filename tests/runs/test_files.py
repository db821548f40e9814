"""test_files.py - directories that are whole or not there; and what every system must be able to do: no module of one
system alone, no encoding but UTF-8."""
import ast
import os
import subprocess
import sys

import pytest

from runs.files import ROOT, UserError, read_json, whole_directory

CODE = [f for f in ROOT.rglob("*.py") if "tests" not in f.relative_to(ROOT).parts]


def test_a_directory_is_whole_or_not_there(tmp_path, monkeypatch):
    """Also where it exists and is empty, and after another process was killed while it wrote. Wrong: what there is gets
    replaced, or what was left over stays."""
    monkeypatch.chdir(tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for left in (f".new.{dead.pid}.tmp", f".new.{os.getppid()}.tmp", f".other.{dead.pid}.tmp"):
        (tmp_path / left / "deep").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for name in ("new", "a/b/new", "empty"):
        with whole_directory(name) as folder:
            (folder / "file").write_text("text")
            assert folder.parent == (tmp_path / name).parent and not (tmp_path / name / "file").exists()
        assert (tmp_path / name / "file").read_text() == "text" and not folder.exists()
    assert sorted(f.name for f in tmp_path.glob(".*")) == [f".new.{os.getppid()}.tmp", f".other.{dead.pid}.tmp"]
    with pytest.raises(ZeroDivisionError), whole_directory("failed") as folder:
        (folder / "file").write_text("text")
        1 / 0
    assert not (tmp_path / "failed").exists() and not folder.exists()
    for name in ("new", "new/file"):
        with pytest.raises(UserError, match=f"{name} exists and is not empty"), whole_directory(name):
            pass
    assert (tmp_path / "new" / "file").read_text() == "text"


def unnamed(source):
    """The calls that open a text file without naming its encoding."""
    for call in ast.walk(ast.parse(source)):
        text = ast.unparse(call) if isinstance(call, ast.Call) else ""
        function = text.partition("(")[0].rpartition(".")
        of_paths = function[0] and function[2] in ("read_text", "write_text")
        opens = of_paths or function[2] == "open" and function[0] != "os"
        if opens and not any(word in text for word in ("encoding=", "'rb'", "'wb'", "/proc/")):
            yield text


def test_text_files_are_utf_8_on_every_system():
    bad, good = ["open(p)", "q.read_text()"], ["open(p, 'rb')", "q.write_text(t, encoding='utf-8')", "write_text(p, t)"]
    assert list(unnamed("\n".join(bad + good))) == bad
    for file in CODE:
        assert not list(unnamed(file.read_text(encoding="utf-8"))), file


WITHOUT = """
import sys
import torch, safetensors.torch, matplotlib.figure, numpy, tqdm, tiktoken, pytest       # what these import is theirs
import os, pathlib, signal
sys.modules.update(dict.fromkeys(["fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog"]))
for place, names in ((os, ("fork", "kill", "getuid", "sysconf")), (signal, ("SIGKILL", "SIGHUP", "SIGALRM"))):
    for name in names:
        delattr(place, name)
exists = pathlib.Path.exists
pathlib.Path.exists = lambda path: not str(path).startswith("/proc") and exists(path)
sys.path[:0] = [{tests!r}, {root!r}]
import running, train_dpo, eval_front
from runs.flags import run_main
with running.small_world():
    running.make_base()
    for _ in range(2):
        sys.argv = "train_dpo.py --steps 2 --rows 8 --responses 4 --save_every 1 --device cpu --out out/λ".split()
        run_main(train_dpo.main, train_dpo.Flags, "")
    sys.argv = "eval_front.py out/λ --parts 2 --device cpu".split()
    run_main(eval_front.main, eval_front.Flags, "")
"""


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_it_trains_and_evaluates_without_what_windows_lacks(tmp_path, encoding):
    """Modules, signals and /proc of POSIX alone are hidden, and the terminal knows no λ."""
    script = tmp_path / "go.py"
    script.write_text(WITHOUT.format(tests=str(ROOT / "tests"), root=str(ROOT)), encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": encoding})
    assert done.returncode == 0, done.stderr.decode("latin-1")[-3000:]
    printed = done.stdout.decode(encoding)
    assert printed.count("?_helpful") == 3 and "training has ended before" in printed
    made = {f.name for f in (tmp_path / "out/λ").iterdir()}
    assert {"adapter.safetensors", "front.json", "front.png"} <= made and not any(name[0] == "." for name in made)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_dpo.py", "train_ppo.py", "eval_front.py"])
def test_help_on_a_terminal_of_few_letters(script):
    """Wrong: UnicodeEncodeError at the first λ."""
    done = subprocess.run([sys.executable, script, "--help-all"], cwd=ROOT, capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and b"?" in done.stdout, done.stderr[-2000:]


def test_a_message_is_one_line_whatever_it_quotes():
    assert str(UserError("a: b\n  c\x00\ud800\u2028 λ")) == "a: b c\\x00\\ud800 λ"
    assert len(str(UserError("x" * 10 ** 6))) == 1000


@pytest.mark.parametrize("text", ["[1]", "3", "null", "[" * 10_000, "1" * 10_000, '{"a": ', "\x00"])
def test_json_files_hold_an_object(tmp_path, text):
    """Wrong: RecursionError, ValueError, and AttributeError of whoever asks a list for a key."""
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="a.json (holds no JSON object|is not JSON)"):
        read_json(tmp_path / "a.json")
