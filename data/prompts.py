"""prompts.py - prompts to sample from: the first words of stories, or the prompts of JSONL files.

A .txt file holds stories that follow each other by a single newline, their paragraphs by a blank line (TinyStories as
one text). Each is cut after its first words: a prompt, and the rest as the response that a human wrote. Where a story
has single newlines inside, its paragraphs are taken for stories: the file does not tell them apart.
A JSONL file has one object a row with `prompt` and, where there is one, `response`. Both take the form that
data.preferences gives them (HH-RLHF's), so that policy and reward model see the same prompts. Demonstrations for SFT
are such files, one a dimension.
"""
import hashlib
import json
import re
from pathlib import Path

from runs.files import UserError
from data.preferences import Row, _as_dialogue


def read_prompts(paths, prompt_words=None):
    """paths: one .txt or .jsonl file or a list of them -> (rows, dropped): Row(prompt, [response] or []) in order.

    prompt_words: a story's words that are its prompt (.txt only). Prompt and response joined are the story, spaces and
    line breaks as they were. dropped: {"short": stories of fewer than 2 · prompt_words words, "duplicate": rows whose
    prompt was there before}; many stories begin alike. Raises UserError for a file, row or field that is not so.
    """
    rows, short, read = {}, 0, 0
    for path in map(Path, [paths] if isinstance(paths, (str, Path)) else paths):
        text = _read_text(path)
        if path.suffix == ".jsonl":
            found = [_read_row(line, f"{path}, row {number}")
                     for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        elif path.suffix == ".txt":
            if prompt_words is None or prompt_words < 1:
                raise UserError(f"{path}: give the number of words that a story's prompt has (1 or more)")
            stories = _stories(text)
            found = [_cut(story, prompt_words) for story in stories if len(story.split()) >= 2 * prompt_words]
            short += len(stories) - len(found)
        else:
            raise UserError(f"{path}: give a .txt file of stories or a .jsonl file of prompts")
        if not found:
            raise UserError(f"{path}: there is no prompt in it")
        read += len(found)
        for row in found:
            rows.setdefault(row.prompt, row)
    if not rows:
        raise UserError("no prompt file given; name at least one .txt or .jsonl file")
    return list(rows.values()), {"short": short, "duplicate": read - len(rows)}


def read_demonstrations(paths):
    """One JSONL file a dimension, rows with `prompt` and `response` -> (rows, kinds): a Row(prompt, responses) for each
    prompt, in order, and which file each of its responses is from, list[list[int]].

    Equal prompts of several files (one prompt set, an answer of every style) become one row, so what they share is
    computed once. Raises UserError for a file, row or field that is not so.
    """
    rows, kinds = {}, {}
    for i, path in enumerate(map(Path, paths)):
        found = 0
        for number, line in enumerate(_read_text(path).split("\n"), start=1):
            if line.strip():
                row = _read_row(line, f"{path}, row {number}")
                if not row.responses:
                    raise UserError(f'{path}, row {number}: field "response" is missing; a demonstration needs it')
                rows.setdefault(row.prompt, Row(row.prompt, [], [], [])).responses.append(row.responses[0])
                kinds.setdefault(row.prompt, []).append(i)
                found += 1
        if not found:
            raise UserError(f"{path}: the file is empty; give JSONL, one object with prompt and response per line")
    return list(rows.values()), list(kinds.values())


def split(rows, share=0.1):
    """-> (train, eval): a row goes to eval where its prompt's SHA-256, as a fraction of its range, is below `share`.
    So a prompt is never in both, and stays where it is whatever other rows there are."""
    fraction = lambda row: int(hashlib.sha256(row.prompt.encode("utf-8", "surrogatepass")).hexdigest(), 16) / 2 ** 256
    return [row for row in rows if fraction(row) >= share], [row for row in rows if fraction(row) < share]


def _stories(text):
    """Cuts at newlines between two lines that both hold text; a line of spaces alone counts as blank."""
    return [story.strip() for story in re.split(r"(?<=\S)[ \t]*\n(?=[ \t]*\S)", text) if story.strip()]


def _cut(story, prompt_words):
    """A story -> Row(its first words, [all that follows, from the space on])."""
    prompt = re.match(r"\S+(?:\s+\S+){%d}" % (prompt_words - 1), story)[0]
    return Row(prompt, [story[len(prompt):]], [], [])


def _read_text(path):
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None


def _read_row(line, where):
    """One line of a JSONL file -> Row. where: file and row, for the error."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: not JSON; give one JSON object per line") from None
    if not isinstance(row, dict) or "prompt" not in row:
        raise UserError(f'{where}: field "prompt" is missing; every row needs it')
    for field in ("prompt", "response"):
        if not isinstance(row.get(field, ""), str):
            raise UserError(f'{where}: field "{field}" must be a string, not {json.dumps(row[field])[:40]}')
    return Row(*_as_dialogue(row["prompt"], [row["response"]] if "response" in row else [], False), [], [])
