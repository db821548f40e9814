r"""layouts.py - what the fields of a record mean: LAYOUTS has one line for each layout of public preference files.

A layout reads a record as (prompt, responses, ratings). ratings: {dimension: a number for each response, higher is
better, None: none}; a label "the first is better" is (1, 0), and a tie is equal numbers. "*" is the one dimension of a
file that does not name it; None for ratings says that the record has no place for labels. A new layout is one line
here, one in data/README.md, and a function where its fields need one.

A prompt becomes turns (data.files.Message), which a template writes as a text. They come from a list of messages, from
a dialogue as HH-RLHF writes it ("\n\nHuman: …\n\nAssistant:"), from HelpSteer's markers between turns
("\n<extra_id_1>Assistant\n"), or from any other string, which is one turn of the user. A string that ends as a written
prompt does (ENDS) holds another template: it stays the text that it is, and so do its responses. Else a response loses
the one space that stands behind "Assistant:".

Broken rows are left out, counted by cause, and a line is printed for each cause: a field that is missing or of the
wrong type, an empty response, a role that is not known, two dialogues that part before their last answer, a row that no
layout fits or that is of no use (one response where two are compared). More than 5 % of a file stop with an error: the
file is not what it was taken for. A broken file stops at once: what is no JSON, no rows, a dimension without a name or
with one that cannot be a name. A row without a label is not broken (ties, "N/A"). Nor are what is read of no file, an
image, a tool's turn or a call of one, and Chatbot Arena's conversations of several turns, which part early by design:
these are left out too, and do not count towards the 5 %.
"""
import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from itertools import combinations, groupby
from os.path import commonprefix

from data.files import Message, named, records
from runs.files import UserError

MOST_BROKEN = 0.05
OURS = ("prompt", "messages", "response", "response_0", "response_1", "chosen", "rejected")   # what --fields may name
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
TOOLS = ("tool", "function", "function_call", "observation", "ipython")       # roles of a tool's turn, or of its call
ENDS = ("Assistant:", "ASSISTANT:", "[/INST]", "### Response:", "<|im_start|>assistant", "<|assistant|>",
        "<start_of_turn>model", "assistant<|end_header_id|>")
KINDS = {str: "a string", list: "a list", dict: "an object"}
PAIR, BEST = ("response_0", "response_1"), ("chosen", "rejected")
FIRST = {"*": (1, 0)}                       # the unnamed label: the first response is better
HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


class Broken(Exception):
    """A row that cannot be used. cause: what such rows are counted by   found: what is there instead
    counts: whether it counts towards MOST_BROKEN"""

    def __init__(self, cause, *found, counts=True):
        self.cause, self.counts = cause.encode(errors="backslashreplace").decode(), counts     # halves of surrogates
        self.detail = "".join(f", not {json.dumps(value, default=str)[:60]}" for value in found)


@dataclass
class Example:
    """One row of a file, or the neighbouring rows of one prompt. where: file and row, for messages."""
    prompt: str | tuple[Message, ...]
    responses: list[str]
    ratings: dict | None
    layout: str
    where: str

    def compared(self):
        """Yields (pair, {dimension: 0 where the first of the pair is rated higher, 1 the second}) of every pair of
        responses, without ties and missing ratings."""
        for a, b in combinations(range(len(self.responses)), 2):
            pairs = {dim: (x[a], x[b]) for dim, x in self.ratings.items() if None not in (x[a], x[b])}
            yield (a, b), {dim: int(x < y) for dim, (x, y) in pairs.items() if x != y}


@dataclass
class File:
    """What was read of a file. rows: how many it has   left_out: {cause: how many of them}"""
    examples: list[Example]
    rows: int
    left_out: dict


def read_examples(path, fields=None, use=lambda example: None):
    """A file, or "dimension=file" where the file has one label without a name -> File. Prints a line for each cause.

    fields: what the file calls our fields, ["prompt=question", "helpful=label", …]; what is not in OURS is a dimension,
    with labels 0, 1 or null. use: raises Broken for an example that is of no use to the caller.
    Raises UserError for a file that is broken, or that has too many broken rows.
    """
    name, path = named(path)
    ours, read, out = _renaming(fields), [], []
    for where, record in records(path):
        try:
            read.append(_example(_renamed(record, ours) if ours else record, where))
        except Broken as why:
            out.append((why.with_traceback(None), where))
    rows, examples = len(read) + len(out), []
    for example in _joined(read):
        try:
            use(example)
            examples.append(example)
        except Broken as why:
            out.append((why.with_traceback(None), example.where))
    first, left_out = {}, Counter(why.cause for why, _ in out)
    for why, where in out:
        first.setdefault(why.cause, (why, where))
    broken = Counter(why.cause for why, _ in out if why.counts or not examples)
    if broken.total() > MOST_BROKEN * rows:
        why, where = first[broken.most_common(1)[0][0]]
        raise UserError(f"{where}: {why.cause}{why.detail} ({broken.total()} of {rows} rows are broken: too many)")
    for cause, (why, where) in first.items():
        row = where.removeprefix(f"{path}, ")
        print(f"{path}: {left_out[cause]} of {rows} rows left out: {cause}{why.detail} (first: {row})")
    return File(_with_names(examples, name, path), rows, dict(left_out))


def _joined(examples):
    """HelpSteer has one row a response: its neighbouring rows of one prompt become one example."""
    key = lambda example: example.prompt if example.layout == "HelpSteer2" else example.where
    for _, same in groupby(examples, key):
        first, *others = same
        responses = [response for x in (first, *others) for response in x.responses]
        yield replace(first, responses=responses, ratings={
            dim: tuple(x.ratings[dim][0] for x in (first, *others)) for dim in first.ratings}) if others else first


def _with_names(examples, name, path):
    """The examples, their unnamed dimension called `name`, where there is one. Raises UserError for what is no name."""
    own = dict.fromkeys(dim for example in examples for dim in example.ratings or ())
    for dim in (*own, *[name] * (name is not None)):
        if not dim.isprintable() or not dim.strip() or set(dim) & set("/\\="):
            raise UserError(f"{path}: {json.dumps(dim)} cannot be the name of a dimension")
    if name is None or not own:
        return examples
    if list(own) != ["*"]:
        raise UserError(f"{path} names its dimensions itself, {', '.join(own)}: give it without {name}=")
    return [replace(x, ratings=x.ratings and {name: x.ratings["*"]}) for x in examples]


def _renaming(fields):
    """["prompt=question", …] -> {"prompt": "question", …}"""
    pairs = [field.partition("=")[::2] for field in fields or []]
    if not all(our and their for our, their in pairs) or len(dict(pairs)) < len(pairs):
        raise UserError(f"--fields {' '.join(fields)}: give OURS=THEIRS, each once, as in prompt=question "
                        f"response_0=a response_1=b helpful=label")
    return dict(pairs)


def _renamed(record, ours):
    """The record with our names, without what is not named."""
    for their in ours.values():
        if their not in record:
            raise Broken(f'field "{their}" is missing')
    row = {our: record[their] for our, their in ours.items()}
    labels = {dim: row.pop(dim) for dim in ours if dim not in OURS}
    return row | {"better": labels} if labels else row


def _example(row, where):
    """The Example of a record. Raises Broken."""
    name, read = next(((name, read) for name, fields, read in LAYOUTS if all(x in row for x in fields.split())),
                      ("", _unknown))
    prompt, responses, ratings = read(row)
    if not isinstance(prompt, str):
        if not prompt or prompt[-1].role != "user":
            raise Broken("the last turn of the prompt is not the user's")
        responses = [text.removeprefix(" ") for text in responses]
    if not all(text.strip() for text in responses):
        raise Broken("an empty response")
    return Example(prompt, responses, ratings, name, where)


# ---------------------------------------------------------------------------------------------------------------------
# From fields to prompts, responses and ratings.

def _get(row, name, kind=str):
    """A field that must be there and of this type."""
    if name not in row:
        raise Broken(f'field "{name}" is missing')
    if not isinstance(row[name], kind):
        raise Broken(f'field "{name}" must be {KINDS[kind]}', row[name])
    return row[name]


def _message(row, where):
    """A Message of {"role", "content"} or {"from", "value"}. where: the name of the field that holds it."""
    if not isinstance(row, dict):
        raise Broken(f'field "{where}": a message must be an object', row)
    role = row.get("role", row.get("from"))
    if role in TOOLS or row.get("tool_calls") or row.get("function_call"):
        raise Broken(f'field "{where}": a tool\'s turn, or a call of one, is not read', counts=False)
    if not isinstance(role, str) or role not in ROLES:
        raise Broken(f'field "{where}": a role must be system, user or assistant', role)
    return Message(ROLES[role], _said(row, "content" if "content" in row else "value"))


def _said(row, name):
    """The text in a field: a string, or a list of parts, {"type": "text", "text": …}, which are joined."""
    parts = row.get(name)
    if not isinstance(parts, list):
        return _get(row, name)
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise Broken(f'field "{name}": a part must be a text', part, counts=False)
    return "".join(part["text"] for part in parts)


def _turns(row, name):
    """The prompt in a field: turns, or a text that holds another template."""
    if isinstance(row.get(name), list):
        return tuple(_message(x, name) for x in row[name])
    return _turns_of_text(_get(row, name))


def _turns_of_text(text):
    written = text.rstrip()
    if written.startswith("\n\nHuman:") and written.endswith("\n\nAssistant:"):
        parts = re.split(r"\n\n(Human|Assistant):", written)                 # "", who, text, who, text, …, who, ""
        # a few dialogues have somebody speak twice in a row; templates want turns in turn, so that is one with a marker
        turns = groupby(zip(parts[1:-2:2], parts[2::2]), key=lambda turn: turn[0])
        return tuple(Message("user" if who == "Human" else "assistant",
                             f"\n\n{who}:".join(said for _, said in same).removeprefix(" ")) for who, same in turns)
    if written.endswith(ENDS):
        return text
    said = re.split(r"\n<extra_id_1>(User|Assistant)\n", text)               # text, who, text, …: the user begins
    return tuple(Message(who.lower(), x) for who, x in zip(["user", *said[1::2]], said[::2]))


def _answer(row, name):
    """The response in a field: a string, a message, or a list of one message."""
    value = _get(row, name, object)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return _message(value, name).content if isinstance(value, dict) else _get(row, name)


def _answers(row, names=PAIR):
    return [_answer(row, name) for name in names]


def _dialogues(row, first, second, counts=True):
    """(prompt, responses) of two whole dialogues, texts as HH-RLHF's or messages: what they share up to the last
    answer, and these. counts: whether it counts as broken where they part before."""
    a, b = row[first], row[second]
    if isinstance(a, str) and isinstance(b, str):
        turn = "\n\nAssistant:"
        end = commonprefix([a, b]).rfind(turn) + len(turn)
        prompt, responses = a[:end], [a[end:], b[end:]]
        parted = end < len(turn) or any(re.search("\n\n(Human|Assistant):", text) for text in responses)
    else:
        a, b = (tuple(_message(x, name) for x in _get(row, name, list)) for name in (first, second))
        prompt, responses = a[:-1], [x.content for x in a[-1:] + b[-1:]]
        parted = prompt != b[:-1] or [x.role for x in a[-1:] + b[-1:]] != ["assistant"] * 2
    if parted:
        raise Broken(f'"{first}" and "{second}" part before their last answers', counts=counts)
    return _turns_of_text(prompt) if isinstance(prompt, str) else prompt, responses


def _preferred(row, prompt):
    """`chosen` and `rejected`: responses to the prompt, or whole dialogues, whose last question the prompt repeats."""
    if isinstance(row["chosen"], list) and len(row["chosen"]) > 1:
        return *_dialogues(row, *BEST), FIRST
    return prompt, _answers(row, BEST), FIRST


def _labels(row, names):
    """Ratings from fields that hold the number of the better response, or null. names: {dimension: field}"""
    ratings = {}
    for dim, name in names.items():
        value = row.get(name)
        if type(value) is not int and value is not None or value not in (0, 1, None):  # True == 1: look at the type
            raise Broken(f'field "{name}" must be 0, 1 or null', value)
        ratings[dim] = (None, None) if value is None else (1 - value, value)
    return ratings


def _table(row, name):
    """The same of a field that holds an object, {dimension: number of the better response}."""
    if not isinstance(row[name], dict):
        raise Broken(f'field "{name}" must be an object like {{"helpful": 0}}', row[name])
    return _labels({f"{name}.{dim}": value for dim, value in row[name].items()}, {x: f"{name}.{x}" for x in row[name]})


def _number(row, name):
    """A number, as such or as text; None where there is none ("N/A", null)."""
    value = row.get(name)
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            if value.strip().upper() not in ("", "N/A", "NA", "NONE", "NULL"):
                raise Broken(f'field "{name}" must be a number', value) from None
            return None
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise Broken(f'field "{name}" must be a number', value)
    return None if value != value else value                                          # NaN


def _strength(row, name):
    """The unnamed rating from a number that is negative where the first response is better."""
    value = _number(row, name)
    return {"*": (None, None) if value is None else (-value, 0)}


# ---------------------------------------------------------------------------------------------------------------------
# Layouts whose fields need a function.

def _helpsteer2_pairs(row):
    ratings = {"helpful" if dim == "helpfulness" else dim: x for dim, x in _table(row, "higher").items()}
    if "concise_response_id" in row:
        ratings |= _labels(row, {"concise": "concise_response_id"})
    return _turns(row, "prompt"), _answers(row), ratings


def _ultrafeedback(row):
    said = [x if isinstance(x, dict) else {} for x in _get(row, "completions", list)]
    notes = [{dim: _number(_get(each, dim, dict), "Rating") for dim in each}
             for each in (_get(x, "annotations", dict) for x in said)]
    dims = dict.fromkeys(dim for note in notes for dim in note)
    return _turns(row, "instruction"), [_answer(x, "response") for x in said], {
        dim: tuple(note.get(dim) for note in notes) for dim in dims}


def _arena(row):
    ratings = {"model_a": (1, 0), "model_b": (0, 1), "tie": (0, 0), "tie (bothbad)": (0, 0)}
    if _get(row, "winner") not in ratings:
        raise Broken('field "winner" must be model_a, model_b, tie or tie (bothbad)', row["winner"])
    return *_dialogues(row, "conversation_a", "conversation_b", counts=False), {"*": ratings[row["winner"]]}


def _shp(row):
    ratings = {"*": _labels(row, {"*": "labels"})["*"][::-1]}                         # 1: the first is better
    return _turns(row, "history"), _answers(row, ("human_ref_A", "human_ref_B")), ratings


def _openai(row):
    prompt = _turns(_get(row, "input", dict), "messages")
    return prompt, _answers(row, ("preferred_output", "non_preferred_output")), FIRST


def _sharegpt(row):
    system = (Message("system", _get(row, "system")),) if row.get("system") else ()
    return *system, *_turns(row, "conversations")


def _alpaca(row):
    """A system text, earlier questions and answers, and the question, in two parts."""
    turns = [Message("system", _get(row, "system"))] if row.get("system") else []
    for pair in _get(row, "history", list) if row.get("history") else []:
        if not isinstance(pair, list):
            raise Broken('field "history" must be a list of [question, answer]', pair)
        turns += [_message(dict(role=role, content=x), "history") for role, x in zip(("user", "assistant"), pair)]
    question = [_get(row, name) for name in ("instruction", "input") if row.get(name)]
    return *turns, Message("user", "\n".join(question))


def _conversation(turns):
    """Turns that may end in a response."""
    ends = bool(turns) and turns[-1].role == "assistant"
    return turns[:-1] if ends else turns, [x.content for x in turns[-1:] * ends], None


def _unknown(row):
    raise Broken("its fields are of no known layout; name them with --fields (data/README.md)", list(row))


LAYOUTS = (  # (name, fields, reader): a row is read by the first layout whose fields it has
    ("this project's", "response_0 better", lambda row: (_turns(row, "prompt"), _answers(row), _table(row, "better"))),
    ("HelpSteer2, pairs", "response_0 higher", _helpsteer2_pairs),
    ("PKU-SafeRLHF", "response_0 better_response_id", lambda row: (_turns(row, "prompt"), _answers(row), _labels(
        row, {"helpful": "better_response_id", "harmless": "safer_response_id"}))),
    ("PKU-SafeRLHF, harmlessness", "response_0 safer_response_id", lambda row: (
        _turns(row, "prompt"), _answers(row), _labels(row, {"harmless": "safer_response_id"}))),
    ("pairs without labels", "response_0", lambda row: (_turns(row, "prompt"), _answers(row), None)),
    ("HelpSteer2", "prompt response helpfulness", lambda row: (
        _turns(row, "prompt"), [_answer(row, "response")], {dim: (_number(row, dim),) for dim in HELPSTEER})),
    ("HelpSteer2, preferences", "response_1 response_2 preference_strength", lambda row: (
        _turns(row, "prompt"), _answers(row, ("response_1", "response_2")), _strength(row, "preference_strength"))),
    ("HelpSteer3", "context response1 response2 overall_preference", lambda row: (
        _turns(row, "context"), _answers(row, ("response1", "response2")), _strength(row, "overall_preference"))),
    ("UltraFeedback", "instruction completions", _ultrafeedback),
    ("SHP", "history human_ref_A labels", _shp),
    ("Chatbot Arena", "conversation_a conversation_b winner", _arena),
    ("OpenAI", "input preferred_output", _openai),
    ("ShareGPT", "conversations chosen", lambda row: (_sharegpt(row), _answers(row, BEST), FIRST)),
    ("Alpaca", "instruction chosen", lambda row: (_alpaca(row), _answers(row, BEST), FIRST)),
    ("chosen and rejected", "prompt chosen", lambda row: _preferred(row, _turns(row, "prompt"))),
    ("messages, chosen and rejected", "messages chosen", lambda row: _preferred(row, _turns(row, "messages"))),
    ("two whole dialogues", "chosen rejected", lambda row: (*_dialogues(row, *BEST), FIRST)),
    ("a conversation", "messages", lambda row: _conversation(_turns(row, "messages"))),
    ("ShareGPT, a conversation", "conversations", lambda row: _conversation(_sharegpt(row))),
    ("Alpaca, one response", "instruction output", lambda row: (_alpaca(row), [_answer(row, "output")], None)),
    ("prompt, completion", "prompt completion", lambda row: (
        _turns(row, "prompt"), [_answer(row, "completion")], None)),
    ("prompt, response", "prompt", lambda row: (
        _turns(row, "prompt"), [_answer(row, "response")] if "response" in row else [], None)),
)
