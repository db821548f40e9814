r"""files.py - reads the files that a user gives: rows of JSONL files, and stories, brought to one form.

An *example* is what one row of a file, or one story, holds: a prompt, its responses and its labels. What examples are
good for is decided by those who read them: data.preferences (pairs with labels), data.prompts (prompts to sample from,
demonstrations) and data.offline (prompt and response pairs). A *layout* is a data set's way to write a row. LAYOUTS has
one line for each, and a row's own keys say which one it is:

  fields of a row                                            data sets
  prompt, response_0, response_1, better                     ours: an object like {"helpful": 0, "harmless": 1}
  prompt, response_0, response_1, higher                     HelpSteer2: such an object; helpfulness -> helpful,
                                                             concise_response_id -> concise
  prompt, response_0, response_1, better_response_id         PKU-SafeRLHF, BeaverTails, HH-RLHF:
    and safer_response_id, or one of them                    better -> helpful, safer -> harmless
  prompt, response_0, response_1                             two responses without labels
  prompt, and response where there is one                    prompts, demonstrations

A label is 0 or 1, the number of the better response, or null.

All prompts are made to look alike, in HH-RLHF's form: a prompt that does not yet end in "Assistant:" is wrapped as
"\n\nHuman: {prompt}\n\nAssistant:", its responses begin with one space, and HelpSteer2's turn markers become the same
Human and Assistant turns. Prompts that end in "Assistant:" are kept as they are, and so are their responses.
"""
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from runs.files import UserError


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


@dataclass
class Example:
    """One row of a file. labels: {dimension: (name of its field, value)}, values unchecked; None: the row has no field
    for labels. where: file and row, for error messages."""
    prompt: str
    responses: list[str]
    labels: dict | None
    where: str


def paths_of(paths):
    """One path or several of them -> list[Path]."""
    return [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]


def read_rows(path, what):
    """A JSONL file, whatever its name -> [Example, …]. what: what the caller looks for, for the error where there is
    none. Raises UserError for a file, a row or a field that cannot be read."""
    examples = [_example(line, f"{path}, row {number}")
                for number, line in enumerate(_text(path).split("\n"), start=1) if line.strip()]
    if not examples:
        raise UserError(f"{path}: the file is empty, there is no {what} in it; give JSONL, one JSON object per line")
    return examples


def read_stories(path, what, prompt_words):
    """A text of stories -> ([Example, …], how many stories were too short: fewer than 2 · prompt_words words).

    Stories follow each other by a single newline, their paragraphs by a blank line (TinyStories as one text). Where a
    story has single newlines inside, its paragraphs are taken for stories: the file does not tell them apart. A story's
    first prompt_words words are its prompt, and the rest, from the space on, is the response that a human wrote.
    """
    if prompt_words is None or prompt_words < 1:
        raise UserError(f"{path}: give the number of words that a story's prompt has (1 or more)")
    # a newline between two lines that both hold text; a line of spaces alone counts as blank
    stories = [story.strip() for story in re.split(r"(?<=\S)[ \t]*\n(?=[ \t]*\S)", _text(path)) if story.strip()]
    long = [story for story in stories if len(story.split()) >= 2 * prompt_words]
    if not long:
        raise UserError(f"{path}: there is no {what} in it: no story has {2 * prompt_words} words; give another file "
                        f"or a smaller number of prompt words")
    ends = [re.match(r"\S+(?:\s+\S+){%d}" % (prompt_words - 1), story).end() for story in long]
    return ([Example(story[:end], [story[end:]], None, str(path)) for story, end in zip(long, ends)],
            len(stories) - len(long))


def read_file(path, what, prompt_words=None):
    """A .jsonl file of rows or a .txt file of stories -> ([Example, …], how many stories were too short)."""
    if path.suffix == ".jsonl":
        return read_rows(path, what), 0
    if path.suffix == ".txt":
        return read_stories(path, what, prompt_words)
    raise UserError(f"{path}: give a .txt file of stories or a .jsonl file of rows")


def _text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; give JSONL, one JSON object per line, or a text of stories") from None


def _example(line, where):
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: not JSON; give one JSON object per line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object; give one JSON object per line")
    read = next(read for fields, read in LAYOUTS if all(name in row for name in fields))
    return Example(*read(row, where), where)


# ---------------------------------------------------------------------------------------------------------------------
# Layouts: functions (row, where) -> (prompt, responses, labels), as an Example has them.

def _ours(row, where):
    return *_texts(row, where), _table(row, "better", where)


def _helpsteer2(row, where):
    prompt, responses = _texts(row, where, markers=True)
    labels = {"helpful" if dim == "helpfulness" else dim: label for dim, label in _table(row, "higher", where).items()}
    if "concise_response_id" in row:
        labels["concise"] = ("concise_response_id", row["concise_response_id"])
    return prompt, responses, labels


def _saferlhf(row, where):
    return *_texts(row, where), {dim: (name, row.get(name)) for dim, name in (("helpful", "better_response_id"),
                                                                               ("harmless", "safer_response_id"))}


def _unlabelled(row, where):
    return *_texts(row, where), None


LAYOUTS = (  # (fields, layout): a row is read by the first layout whose fields it has
    (("response_0", "better"), _ours),
    (("response_0", "higher"), _helpsteer2),
    (("response_0", "better_response_id"), _saferlhf),
    (("response_0", "safer_response_id"), _saferlhf),
    ((), _unlabelled),
)


def _texts(row, where, markers=False):
    """(prompt, responses) in HH-RLHF's form: two responses, or one, or none. markers: the prompt may have HelpSteer2's
    turn markers. Raises UserError for a field that is missing or no string."""
    names = ["response_0", "response_1"] if "response_0" in row else ["response"] * ("response" in row)
    for name in ("prompt", *names):
        if name not in row:
            raise UserError(f'{where}: field "{name}" is missing; every row needs it')
        if not isinstance(row[name], str):
            raise UserError(f'{where}: field "{name}" must be a string, not {json.dumps(row[name])[:40]}')
    prompt, responses = row["prompt"], [row[name] for name in names]
    if prompt.endswith("Assistant:"):
        return prompt, responses
    if markers:
        prompt = re.sub(r"\n<extra_id_1>(User|Assistant)\n",
                        lambda turn: "\n\nHuman: " if turn[1] == "User" else "\n\nAssistant: ", prompt)
    return f"\n\nHuman: {prompt}\n\nAssistant:", [" " + text.lstrip(" ") for text in responses]


def _table(row, name, where):
    """The labels of a field that holds an object, as in Example."""
    if not isinstance(row[name], dict):
        raise UserError(f'{where}: field "{name}" must be an object like {{"helpful": 0}}, '
                        f'not {json.dumps(row[name])[:40]}')
    return {dim: (f"{name}.{dim}", value) for dim, value in row[name].items()}
