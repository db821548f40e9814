r"""chat.py - turns of a conversation (data.files.Message) as one text: by a chat template, or in a plain form.

A template is Jinja in the model's directory: chat_template.jinja, or "chat_template" in tokenizer_config.json. It says
which markers, special tokens of the tokenizer, stand around a turn. Two plain forms do without:

    hh      \n\nHuman: {question}\n\nAssistant: {answer}\n\nHuman: {question}\n\nAssistant:     as the papers' data
    none    the contents alone, with a blank line between them

Templates come from strangers: data/render.py runs them, a process of its own with limits of time and memory. What a
template writes are special tokens; the same letters in somebody's turn are text. So these are *hidden* while the whole
is one text (hide, shown), and data.tokenizers encodes both, each as what it is.
"""
import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data.files import Message
from runs.files import UserError, read_json

TOO_MUCH = "it takes too long, or too much memory"
PATIENCE = 60           # seconds that a template has on a busy machine; render.py's own limit is a few of CPU time
RENDER = Path(__file__).with_name("render.py")
QUESTION, ANSWER = "Which day is it?", "It is a Monday."    # what a template is tried on
TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token")     # that templates know by name


@dataclass(frozen=True)
class Template:
    """How turns become a text."""
    name: str = "hh"                # hh, none, or the file that the Jinja text is from
    source: str | None = None       # Jinja; None: one of the plain forms
    system: str | None = None       # a first turn for conversations that have none
    day: str = "2024-07-26"         # what strftime_now reads: a run's first; while a template is tried, always this one
    tokens: dict = field(default_factory=dict)      # {"bos_token": "<s>", …}
    before: str = " "               # white space in front of an answer
    asks: str = "\n\nAssistant:"    # what follows a last question
    opens: str = ""                 # BOS, where the template writes it
    control: tuple[str, ...] = ()   # special tokens, which are none in a turn
    known: dict = field(default_factory=dict, compare=False, repr=False)       # what was written already


class Written(NamedTuple):
    """A prompt as a text. marked: by a template, special tokens and all. before: what its answers begin with; None:
    they follow as they are."""
    text: str
    marked: bool
    before: str | None


def find_template(choice, directory=None, system=None):
    """The Template that --template names: auto (the directory's own, else hh), hh, none, or a Jinja file.
    directory: the tokenizer's. Raises UserError for what cannot be read."""
    if choice == "none":
        return Template("none", None, system, before="", asks="")
    name, source = (None, None) if choice == "hh" else _own(directory) if choice == "auto" else (choice, _read(choice))
    if source is None:
        return Template(system=system)
    if not isinstance(source, str):
        raise UserError(f"chat template {name}: it is no text, and no list of {{name, template}}")
    return Template(str(name), source, system, tokens=_tokens(directory), before="", asks="")


def _own(directory):
    """(file, Jinja text) of a model's directory; (None, None) where it has none."""
    if directory is None:
        return None, None
    if (directory / "chat_template.jinja").is_file():
        return directory / "chat_template.jinja", _read(directory / "chat_template.jinja")
    path = directory / "tokenizer_config.json"
    source = read_json(path).get("chat_template") if path.is_file() else None
    if isinstance(source, list) and all(isinstance(each, dict) for each in source):          # several, by name
        source = next((each.get("template") for each in source if each.get("name") == "default"), None)
    return path, source


def _read(path):
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat template {path}: cannot be read ({error}); --template takes auto, none, hh or a file of "
                        f"Jinja") from None


def _tokens(directory):
    """{"bos_token": "<s>", …} of a model's directory."""
    named = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if directory is not None and (directory / file).is_file():
            settings = read_json(directory / file)
            named |= {key: settings[key] and spelled(settings, key, directory / file) for key in TOKENS
                      if key in settings}
    return {key: token for key, token in named.items() if token}


def spelled(settings, key, path):
    """The token that a file names under this key, as a string or as {"content": …}. Raises UserError for what is none.
    """
    token = settings[key].get("content") if isinstance(settings[key], dict) else settings[key]
    if not isinstance(token, str) or re.search("[\ud800-\udfff]", token):
        raise UserError(f"{path}: {key} must be a text, or {{\"content\": text}}, not {json.dumps(token)[:60]}")
    return token


def tried(template):
    """What a template makes of a question and its answer: (the prompt, the white space in front of the answer, what
    follows the question, what follows the answer); of a plain form no prompt and no end. Raises UserError where it
    refuses the question; an answer it may refuse."""
    if template.source is None:
        return "", template.before, template.asks, ""
    user, assistant = Message("user", QUESTION), Message("assistant", ANSWER)
    asked, answered = _rendered(template, [(user,), (user, assistant)], [True, False])
    prompt, whole = _text(template, (user,), asked), answered.get("text", "")
    opening, said, after = whole.rpartition(ANSWER)
    before = opening.removeprefix(prompt)
    return prompt, before if before.isspace() else "", prompt.rpartition(QUESTION)[2], after if said else ""


def hide(text, control):
    """The text without the tokens `control`: their numbers instead, between characters that are free for such uses."""
    text = text.replace("\ufdd0", "\ufffd")
    if not any(token in text for token in control):
        return text
    found = "|".join(map(re.escape, sorted(control, key=len, reverse=True)))
    return re.sub(found, lambda match: f"\ufdd0{control.index(match[0])}\ufdd1", text)


def shown(text, control):
    """hide() undone. Other numbers, which a template wrote itself, stay."""
    known = {str(number): token for number, token in enumerate(control)}
    return re.sub("\ufdd0(\\d+)\ufdd1", lambda match: known.get(match[1], match[0]), text)


def write(template, prompts):
    """prompts: texts or turns -> [Written, …]. Turns are written by the template, up to where an answer begins; a text
    stays what it is, and so does a question that is a whole prompt (is_text).

    Raises UserError for turns that the template refuses, and for a template that does not end.
    """
    new = [x for x in dict.fromkeys(prompts) if not is_text(template, x) and x not in template.known]
    template.known.update(zip(new, _texts(template, new)))
    written, jinja = [], template.source is not None
    for prompt in prompts:
        if not is_text(template, prompt):
            written.append(Written(template.known[prompt], jinja, template.before))
            continue
        text = prompt if isinstance(prompt, str) else prompt[0].content
        if jinja and _ends_in(text, template.asks):         # its markers are the template's, whoever wrote them
            text = hide(text, ())
            written.append(Written(text if text.startswith(template.opens) else template.opens + text, True, None))
        else:
            written.append(Written(text, False, None))
    return written


def is_text(template, prompt):
    """Whether the model continues a prompt as it is: a text, or a single question that ends where an answer begins, by
    the template's own markers or by "Assistant:"."""
    return isinstance(prompt, str) or (
        len(prompt) == 1 and prompt[0].role == "user"
        and (_ends_in(prompt[0].content, "Assistant:") or _ends_in(prompt[0].content, template.asks)))


def _ends_in(text, end):
    return bool(end.strip()) and text.rstrip().endswith(end.strip())


def question(prompt):
    """The text that an answer is to: a text prompt itself, of turns the last user's."""
    return prompt if isinstance(prompt, str) else next((x.content for x in prompt[::-1] if x.role == "user"), "")


def turns(prompt):
    """A prompt as data.files.as_json wrote it -> a text or turns."""
    return prompt if isinstance(prompt, str) else tuple(Message(**turn) for turn in prompt)


def announce(template, prompts):
    """Says in a line how turns are written, where there are any, and how many prompts stay what they are; in another,
    that these take no --system."""
    kept = sum(is_text(template, x) for x in prompts)
    if not all(isinstance(x, str) for x in prompts):
        plain = {"hh": "in the plain form, Human: … Assistant: (no chat template, or --template hh)",
                 "none": "their contents alone"}
        print(f"prompts: {plain.get(template.name, f'by the chat template of {template.name}')}"
              + f"; {kept} of {len(prompts)} are whole prompts already and stay what they are" * (kept > 0))
    if template.system is not None and kept:
        print(f"--system has no effect on {kept} of {len(prompts)} prompts, which are no turns but texts as they are")


def _texts(template, chats):
    """The conversations as texts, up to where an answer begins. Raises UserError for one that the template refuses."""
    if template.name == "none":
        return ["\n\n".join(turn.content for turn in _begun(template, chat)) for chat in chats]
    if template.source is None:
        heads = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
        return ["".join(heads.get(turn.role, "") + turn.content for turn in _begun(template, chat)) + template.asks
                for chat in chats]
    return [_text(template, *pair) for pair in zip(chats, _rendered(template, chats, [True] * len(chats)))]


def _begun(template, chat):
    """The conversation with the system turn of --system, where it has none."""
    started = template.system is None or chat[:1] and chat[0].role == "system"
    return chat if started else (Message("system", template.system), *chat)


def _rendered(template, chats, ask):
    """What data/render.py answers: {"text": …} or {"error": …} for each conversation. ask: for each of them, whether an
    answer is to begin behind it."""
    if not chats:
        return []
    hidden = [[{"role": turn.role, "content": hide(turn.content, template.control)} for turn in _begun(template, chat)]
              for chat in chats]
    job = {"template": template.source, "variables": template.tokens, "day": template.day,
           "chats": list(zip(hidden, ask))}
    try:
        done = subprocess.run([sys.executable, "-P", str(RENDER)], input=json.dumps(job), capture_output=True,
                              encoding="utf-8", timeout=PATIENCE + len(chats) / 100)
        why = done.returncode and (done.stderr.strip().splitlines()[-1:] or [TOO_MUCH])[0]
    except subprocess.TimeoutExpired:
        why = TOO_MUCH
    if why:
        raise UserError(f"chat template {template.name}: {why}")
    return json.loads(done.stdout)


def _text(template, chat, answer):
    """The text of an answer of _rendered. Raises UserError for an error."""
    if "error" in answer:
        roles = ", ".join(turn.role for turn in _begun(template, chat))
        raise UserError(f"chat template {template.name}: {' '.join(answer['error'].split())}; the turns were: {roles}")
    return answer["text"]
