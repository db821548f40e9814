"""files.py - the ground floor: errors that a user reads, bars of what takes long, and files that are written whole or
not at all."""
import glob
import hashlib
import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
SHOWN_AFTER = 2.0           # seconds: what is done by then has no bar


class UserError(Exception):
    """Bad input. Its message is one line: what is wrong, where, and what to do; scripts print it and exit with 2."""

    def __init__(self, message):
        line = " ".join(part.strip() for part in message.splitlines())[:1000]          # it may quote anything
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line))


class Stopped(KeyboardInterrupt):
    """Stopped(message, status): a signal has ended the process, which has kept what it had; status is its exit status.
    """


def bar(items, what, total=None, **more):
    """The items, one after the other, under a bar with the time that is left, which goes when all are done. It is shown
    on a terminal alone, and by the first process alone. total: how many, where len(items) does not say it. items: None
    for a bar that is moved by hand, within `with`, as tqdm's (more: its arguments)."""
    silent = dist.is_initialized() and dist.get_rank() > 0
    return tqdm(items, what, total, leave=False, dynamic_ncols=True, delay=SHOWN_AFTER, disable=silent or None, **more)


@contextmanager
def writing(path):
    """Within it, what cannot be written is a UserError: a full disk, a directory of others, a file for a folder."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{path} cannot be written: {e.strerror or e}") from None
    except SafetensorError as e:                            # its own name for the same
        raise UserError(f"{path} cannot be written: {e}") from None


def named(path):
    """"helpful=FILE" -> ("helpful", "FILE"), "FILE" -> (None, "FILE"). A path that exists is one, whatever is in it."""
    name, found, file = str(path).partition("=")
    return (name, file) if found and not os.path.exists(path) else (None, str(path))


def write_whole(path, write):
    """Calls write(temporary path), then renames it to `path`: a killed run leaves the old file or the new one.
    Of several processes the first one alone writes. Raises UserError where nothing can be written."""
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    path = Path(path)
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}.tmp{path.suffix}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            os.chmod(temporary, 0o644)                      # safetensors writes 0600
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_directory(path):
    """Yields an empty directory, which is `path` when all has gone well; if not, nothing is there. Raises UserError
    where `path` has something in it already, or cannot be written."""
    path = Path(path).resolve()
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}.tmp")
    with writing(path):
        if path.exists() and not (path.is_dir() and next(path.iterdir(), None) is None):
            raise UserError(f"{path} exists and is not empty: choose another --out, or remove it")
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob(f".{glob.escape(path.name[:40])}.*.tmp"):
            if left_over(old.name):
                shutil.rmtree(old)
        temporary.mkdir()
    try:
        yield temporary
        with writing(path):
            if path.exists():
                path.rmdir()
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def left_over(name):
    """Whether a file or directory of this name is one that was being written by a process that is dead now."""
    named = re.fullmatch(r"\..*\.(\d+)\.tmp(\.\w+)?", name)
    if not named or os.name == "nt":                        # there os.kill(pid, 0) is no question, it ends the process
        return False
    try:
        os.kill(int(named[1]), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:                                 # it lives, and is another user's
        pass
    return False


def write_text(path, text):
    """Writes a text as UTF-8, with the same bytes on every system, whole or not at all."""
    write_whole(path, lambda f: Path(f).write_text(text, encoding="utf-8", newline="\n"))


def write_json(path, value):
    """Writes `value` as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_jsonl(path, records):
    """Writes records as JSONL, one a line, whole or not at all."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def read_lines(path):
    """The lines of a UTF-8 text that this project wrote. Raises UserError where it is none."""
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged: not UTF-8 text") from None


def read_json(path):
    """Reads a JSON file that holds an object -> dict. Raises UserError where there is none or it does not parse."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not JSON: {e}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object, {{…}}, but {json.dumps(value)[:40]}")
    return value


def digest(value, length=8):
    """A short hash of JSON values, the same everywhere."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]


def file_name(text, most=100):
    """A text as a part of a file name that is another one for every other text, on every system: lower case letters,
    digits and _ . - stay as they are; where there is more, or more of them than `most`, a hash tells them apart."""
    if re.fullmatch(r"[a-z0-9_][a-z0-9_.-]*", text) and len(text) <= most:
        return text
    plain = re.sub(r"[^a-z0-9_-]+", "_", text.lower())[:most]
    return f"{plain}-{digest(text)}"
