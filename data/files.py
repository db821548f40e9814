r"""files.py - reads the files that a user gives: records of JSON or parquet files, and stories; and the form of a row.

records() reads JSONL (one object a line), a JSON array of objects, both also compressed (.gz), and parquet. What the
fields of a record mean is data.layouts' subject. A file that is not one of these is broken and stops everything; the
error names file and row.
"""
import gzip
import io
import json
import os
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from runs.files import UserError, bar, named

HALF = re.compile(r"\\u[dD][89a-fA-F]")     # how JSON spells a half of a surrogate pair


class Message(NamedTuple):
    """One turn of a conversation."""
    role: str       # "system", "user" or "assistant"
    content: str


@dataclass
class Row:
    """One prompt with its responses. A row of a preference file has two responses and one pair; the embedded world has
    many of both; prompts to sample from have none.

    prompt: a text that the model continues as it is, or turns, which a template (data/chat.py) writes as a text."""
    prompt: str | tuple[Message, ...]
    responses: list[str] = field(default_factory=list)
    pairs: list[tuple[int, int]] = field(default_factory=list)  # indices into responses: (first, second)
    better: list[list[int]] = field(default_factory=list)  # (pairs, m): 0 first is better, 1 second, -1 no label


def as_json(prompt):
    """A prompt as JSON has it: a text, or a list of messages."""
    return prompt if isinstance(prompt, str) else [message._asdict() for message in prompt]


def paths_of(paths):
    """One path or several of them -> a list."""
    return [paths] if isinstance(paths, (str, Path)) else list(paths)


def plain_name(path):
    """What a file is called in the name of a run: "helpful=data/train.jsonl.gz" -> "train"."""
    return Path(Path(named(path)[1]).name.removesuffix(".gz")).stem


def is_text(path):
    """Whether the file is a text of stories, by its name: .txt or .txt.gz."""
    return str(path).removesuffix(".gz").endswith(".txt")


def records(path):
    """Yields ("FILE, row N", object) of every record. A row is a line of the file, or an element of its array.

    Half a surrogate in a text becomes U+FFFD. Raises UserError for a file that cannot be read, a row that is no JSON
    object, and a file without rows.
    """
    empty = True
    for number, row, halves in (_parquet if str(path).endswith(".parquet") else _json)(path):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number}: not a JSON object; give one object per line, or an array of them")
        empty = False
        yield f"{path}, row {number}", {name: _whole(value) for name, value in row.items()} if halves else row
    if empty:
        raise UserError(f"{path}: the file is empty; give JSONL, one JSON object per line, a JSON array, or parquet")


def _json(path):
    """Yields (number, value, whether it may hold half a surrogate). Lines are read one by one, an array as a whole."""
    lines, first = enumerate(_lines(path), start=1), True
    for number, line in lines:
        if first and line.lstrip().startswith("["):
            yield from _array(path, line + "".join(line for _, line in lines))
        elif line.strip():
            first = False
            try:
                yield number, json.loads(line), HALF.search(line)
            except (ValueError, RecursionError):
                raise UserError(f"{path}, row {number}: not JSON; give one JSON object per line") from None


def _array(path, text):
    """The same of a JSON array, element by element, so that an error knows its row."""
    decoder, blank, at, number = json.JSONDecoder(), re.compile(r"\s*"), text.index("[") + 1, 0
    if text[blank.match(text, at).end():].strip() == "]":
        return
    while text[at - 1] != "]":
        number += 1
        try:
            value, stop = decoder.raw_decode(text, blank.match(text, at).end())
        except (ValueError, RecursionError):
            raise UserError(f"{path}, row {number}: not JSON; give an array of JSON objects, or one a line") from None
        yield number, value, HALF.search(text, at, stop)
        at = blank.match(text, stop).end() + 1
        if text[at - 1:at] not in (",", "]"):
            raise UserError(f"{path}, row {number}: not JSON; behind it the array breaks off")
    if text[at:].strip():
        raise UserError(f"{path}, row {number}: not JSON; behind it the array ends, but the file goes on")


def _parquet(path):
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path}: parquet files need pyarrow: pip install pyarrow") from None
    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in bar(file.iter_batches(1024), f"reading {path}", -(-file.metadata.num_rows // 1024)):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row, False
    except (OSError, ArrowException) as error:
        raise UserError(f"{path}: cannot be read as parquet ({str(error).splitlines()[0][:80]})") from None


def _lines(path):
    """Yields the lines of a UTF-8 text, plain or .gz."""
    try:
        with open(path, "rb") as raw, bar(None, f"reading {path}", os.path.getsize(path) or None, unit="B",
                                          unit_scale=True) as read:
            file = gzip.open(raw, "rb") if str(path).endswith(".gz") else raw
            for line in io.TextIOWrapper(file, encoding="utf-8-sig"):
                if read.total:                                         # a pipe has no size, and no place
                    read.update(raw.tell() - read.n)
                yield line
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({why}); check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; give JSONL, one JSON object per line, or a text of stories") from None


def _whole(value):
    """A JSON value with U+FFFD for every half of a surrogate pair in its texts; names of fields stay."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_whole(x) for x in value]
    return {name: _whole(x) for name, x in value.items()} if isinstance(value, dict) else value


def read_stories(path, prompt_words):
    """A text of stories -> ([(prompt, response), …], how many stories were too short: fewer than 2 · prompt_words
    words).

    Stories follow each other by a single newline, their paragraphs by a blank line (TinyStories as one text). Where a
    story has single newlines inside, its paragraphs are taken for stories: the file does not tell them apart. A story's
    first prompt_words words are its prompt, and the rest, from the space on, is the response that a human wrote.
    """
    if prompt_words is None or prompt_words < 1:
        raise UserError(f"{path}: give the number of words that a story's prompt has (1 or more)")
    # a newline between two lines that both hold text; a line of spaces alone counts as blank
    parts = re.split(r"(?<=\S)[ \t]*\n(?=[ \t]*\S)", "".join(_lines(path)))
    stories = [story.strip() for story in parts if story.strip()]
    long = [story for story in stories if len(story.split()) >= 2 * prompt_words]
    if not long:
        raise UserError(f"{path}: no story in it has {2 * prompt_words} words; give another file or a smaller number "
                        f"of prompt words")
    ends = [re.match(r"\S+(?:\s+\S+){%d}" % (prompt_words - 1), story).end() for story in long]
    return [(story[:end], story[end:]) for story, end in zip(long, ends)], len(stories) - len(long)
