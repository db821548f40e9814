"""render.py - conversations as texts, by a chat template that a stranger wrote: run as a process of its own.

    python data/render.py < {"template": …, "variables": {…}, "day": …, "chats": [[messages, add_generation_prompt], …]}

prints one JSON list: {"text": …} of each conversation, or {"error": …}. data/chat.py calls it. Jinja's sandbox keeps a
template from files and objects, but not from loops without end or from strings of gigabytes, and no list of forbidden
operators is complete. The operating system's limits are: this process imports nothing of the project, takes SECONDS of
CPU time and MEMORY, and dies of more. What templates may use is what transformers gives them; the day that they read is
the job's, not the clock's.
"""
import json
import sys
from datetime import datetime

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

try:
    import resource
except ImportError:     # Windows: data/chat.py's patience is the only limit there
    resource = None

SECONDS = 3             # and one more for every thousand conversations
MEMORY = 256 * 2 ** 20  # bytes of addresses, and ROOM times what is read
ROOM = 32
LONGEST = 100_000       # characters that a template may write beside four times its conversation's own


class Generation(Extension):
    """{% generation %} … {% endgeneration %} marks the assistant's words in some templates; it writes nothing."""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def compiled(template, day):
    """The Jinja template, in the environment that transformers has for chat templates, on a day like "2024-07-26"."""
    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.fromisoformat(day).strftime(form)
    return environment.from_string(template)


def render(template, variables, messages, ask):
    """One conversation's text. Raises ValueError for one that is far longer than what was said."""
    text, length = [], LONGEST + 4 * sum(len(message["content"]) for message in messages)
    for chunk in template.generate(messages=messages, add_generation_prompt=ask, tools=None, documents=None,
                                   **variables):
        text.append(chunk)
        length -= len(chunk)
        if length < 0:
            raise ValueError("it writes without end")
    return "".join(text)


def main():
    """Reads the job, limits this process, prints the answer."""
    job = sys.stdin.buffer.read()
    memory, seconds = MEMORY + ROOM * len(job), SECONDS + job.count(b'"role"') // 1000
    if resource:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    job, template, answer = json.loads(job), None, []
    for messages, ask in job["chats"]:
        try:
            template = template or compiled(job["template"], job["day"])
            answer.append({"text": render(template, job["variables"], messages, ask)})
        except Exception as e:                                # whatever a stranger's template raises
            answer.append({"error": f"{type(e).__name__}: {e}"})
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
