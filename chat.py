"""chat.py - talk to a trained run at a preference, in the terminal or on a page of its own.

    python chat.py out/a --pref 0.3 0.7              # a conversation at λ; --pref helpful=0.3 harmless=0.7 is the same
    python chat.py out/a --compare                   # every answer at several λ side by side, from one mixed batch
    python chat.py out/a --web                       # a page in the browser, where λ is dragged
    echo "What is the capital of France?" | python chat.py --init DIR --greedy       # the answer alone; a base model

In the terminal /help lists the commands; Ctrl-C stops an answer, Ctrl-D ends. From a pipe every line is a question of
its own. Panacea answers at any λ, rewarded soups by the average of their models, a prompted λ is written in front of
the prompt, and of methods with one model for each preference the nearest answers.
λ, lam: (m,) a preference   lams: (n, m) those of one answer's columns   m: dimensions, 0 of a base model
turns: a conversation, list of data.files.Message, the last one a question. The embedded world's models know no turns:
they are asked the last question alone, and the probabilities of the likeliest answers are exact.
"""
import runs.waiting  # noqa: F401  # isort: skip
import contextlib
import hmac
import itertools
import json
import os
import secrets
import shutil
import sys
import textwrap
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from data import toy
from data.base import check_fit, find_base, is_world_base
from data.files import Message, Row
from data.prompts import written
from data.tokenizers import Tokenizer, load_tokenizer, tokenize
from data.trees import batch_logprobs, with_prefix
from fronts.measure import base_of, load_trained, nearest, run_config, world_batches, world_logprobs
from model import Transformer
from ops.check import replace_broken
from ops.generation import stream
from runs.directory import check_ended
from runs.files import UserError, read_json
from runs.flags import PLAIN, flag, preferences_of, run_main
from runs.processes import pick_device
from svd_lora import load_adapter, set_preference, soup

NEXT = "\n\nHuman:"             # the plain form has no token behind an answer: this begins the next turn
MOST = 6                        # columns of one answer
HELP = """/system TEXT        a system turn in front; /system alone: none
/reset              forgets the conversation
/quit               ends, as Ctrl-D does; Ctrl-C stops an answer"""


@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    run: str | None = flag(None, "run directory", positional="any")
    init: str | None = flag(None, "instead of a run: Hugging Face directory of a base model")
    pref: list[str] | None = flag(None, "the preference, one number for each dimension, or dimension=number; with "
                                        "--compare several, one after the other (default: all dimensions alike)")
    compare: bool = flag(False, "answer side by side at the preferences of --pref; one alone is joined by the vertices")
    web: bool = flag(False, "serve a page to this machine's browsers")
    port: int = flag(0, "of the page (0: any that is free)", 0)
    greedy: bool = flag(False, "always the likeliest token")
    temperature: float = flag(1.0, "of the sampling; 1: the policy itself", "positive")
    top_p: float = flag(1.0, "sample from the likeliest tokens of this mass", "share")
    max_new_tokens: int = flag(256, "the longest answer, in tokens; at most half the context", 1)
    seed: int = flag(0, "of the sampling")
    system: str | None = flag(None, "a system turn in front of the conversation")
    template: str | None = flag(None, "auto, hh, none or a file of Jinja (default: the run's, else the model's own)")
    tokenizer: str | None = flag(None, "of --init, where it is not in that directory")
    quantize: Literal["none", "int8", "nf4"] = flag("none", "--init: the matrices in 8 or 4 bits per weight")
    device: str = flag("auto", "cpu, cuda, or auto")
    plain: bool = flag(False, PLAIN)


def main(flags):
    """Talks in the way that the flags ask for."""
    with contextlib.redirect_stdout(sys.stderr):                       # from a pipe, standard output is answers alone
        talker = load(flags)
        lams = columns_of(flags.pref or [], talker.dims, flags.compare)
    if flags.web:
        server, url = page_server(talker, flags, lams)
        print(f"{url}\nfor browsers of this machine; Ctrl-C ends", flush=True)
        server.serve_forever()
    elif sys.stdin.isatty():
        converse(talker, flags, lams)
    else:
        answer_lines(talker, flags, lams)


# ---------------------------------------------------------------------------------------------------------------------
# 1. Who answers.

class Talker(NamedTuple):
    """A model with what it needs to answer. specialists, files: those of load_trained."""
    name: str
    method: str | None              # None: a base model
    dims: list[str]
    model: Transformer
    tokenizer: Tokenizer
    world: bool                     # whether it knows the embedded world, and nothing else
    specialists: list[Transformer]
    files: dict[tuple[float, ...], Path]
    system: list[Message]           # the turn in front of all, or none


def load(flags):
    """-> Talker. Raises UserError where there is no run, and no base model, of this name."""
    if (flags.run is None) == (flags.init is None):
        raise UserError("name a run directory, or a base model with --init DIR")
    if flags.top_p == 0:
        raise UserError("--top_p 0: must be more; --greedy takes the likeliest token")
    device, dtype = pick_device(flags.device, plain=flags.plain)
    if flags.run is None:
        base, name = find_base(flags.init, None, flags.tokenizer, device)
        config = {"base": base, "tokenizer": name, "flags": {}, "dims": [], "method": None, "label": Path(base).name}
    else:
        config = run_config(Path(flags.run))
        check_ended(Path(flags.run))
    if sys.stderr.isatty():                                            # as a bar: for whoever waits there
        print(f"loading {flags.run or flags.init}", file=sys.stderr)
    model = base_of(config, device) if flags.run else Transformer.from_pretrained(base, dtype, device, flags.quantize)
    replace_broken(device, model.embed.weight.dtype)
    tokenizer = load_tokenizer(config["tokenizer"], flags.template or config["flags"].get("template"),
                               eos_id=config["flags"].get("eos_id"), day=config.get("day"))
    check_fit(tokenizer, model, config["base"])
    specialists, files = load_trained(Path(flags.run), config, model) if flags.run else ([], {})
    system = flags.system or config["flags"].get("system")
    return Talker(config["label"], config["method"], config["dims"], model.requires_grad_(False), tokenizer,
                  is_world_base(config["base"]), specialists, files, [Message("system", system)] if system else [])


def columns_of(words, dims, compare, flag="--pref"):
    """The preferences that an answer is given at, (n, m), from the words of `flag`. Raises UserError."""
    m = len(dims)
    if m == 0:
        if words or compare:
            raise UserError("a base model has no preference: only runs have one")
        return torch.zeros(1, 0)
    lams = list(preferences_of(words or [1 / m] * m, dims, flag).float())
    if compare and len(lams) == 1:
        lams += [vertex for vertex in torch.eye(m)[:MOST - 1] if not vertex.equal(lams[0])]
    if len(lams) > (MOST if compare else 1):
        raise UserError(f"{flag}: {len(lams)} preferences; {flag.replace('pref', 'compare')} takes up to {MOST}, "
                        f"without it there is one")
    return torch.stack(lams)


def policies_at(talker, lams):
    """Yields (rows, model, ids): the rows of lams (n, m) that the model is ready to answer, all at once or one after
    the other, and the tokens that stand in front of their prompt."""
    model, every = talker.model, range(len(lams))
    if talker.method is None:
        yield every, model, []
    elif talker.method == "panacea":
        set_preference(model, lams if len(lams) > 1 else lams[0])
        yield every, model, []
    elif talker.method == "prompt":
        for i, ids in zip(every, written(lams, talker.tokenizer).tolist()):
            yield [i], model, ids
    elif talker.method == "rs":
        for i in every:
            yield [i], soup(model, talker.specialists, lams[i].tolist()), []
    else:
        for i in every:
            load_adapter(model, talker.files[nearest(talker.files, lams[i])], talker.dims)
            yield [i], model, []


# ---------------------------------------------------------------------------------------------------------------------
# 2. An answer.

def answer(talker, turns, lams, flags, greedy=None, seed=None, cut=None):
    """Yields (i, text): the next piece of what is said at lams[i], as it comes. All columns draw the same random
    numbers, so that only λ makes them differ. Raises UserError for turns that the template refuses.

    cut: a set, in which every i is until its answer has ended; at last those that --max_new_tokens cut off."""
    cut = set() if cut is None else cut
    cut.update(range(len(lams)))
    greedy, seed = flags.greedy if greedy is None else greedy, flags.seed if seed is None else seed
    tokenizer, new = talker.tokenizer, min(flags.max_new_tokens, talker.model.config.context_length // 2)
    for rows, model, before in policies_at(talker, lams):
        prompt = before + prompt_ids(talker, turns, new, len(before))
        steps = stream(model, [prompt], new, 0.0 if greedy else flags.temperature, flags.top_p, tokenizer.ends,
                       torch.Generator().manual_seed(seed), own=[0] * len(rows), vocab_size=tokenizer.vocab_size)
        ids, said = {i: [] for i in rows}, dict.fromkeys(rows, "")
        going = set(rows)
        with contextlib.closing(steps):
            for here, tokens in steps:
                for i, token in zip([rows[j] for j in here.tolist()], tokens.tolist()):
                    if i in going:
                        ids[i].append(token)
                        text, ended = visible(ids[i], tokenizer)
                        for still in (going, cut) if ended else ():
                            still.discard(i)
                        yield i, text[len(said[i]):]
                        said[i] = text
                if not going:
                    break
        for i in going:                                                # cut short: what was held back
            yield i, visible(ids[i], tokenizer, cut=True)[0][len(said[i]):]


def visible(ids, tokenizer, cut=False):
    """(what can be shown of an answer's tokens, whether it has ended). Half a character, white space and what may be
    the beginning of NEXT are held back until more is known; cut: no more will come."""
    ended = ids[-1] in tokenizer.ends
    text = tokenizer.decode(ids[:-1] if ended else ids)
    if tokenizer.template.name == "hh":
        text, found, _ = text.partition(NEXT)
        ended = ended or bool(found)
    text = text.strip()
    if not ended and not cut:
        text = text.rstrip("\ufffd")
        start = text.rfind(NEXT[:2])
        text = text[:start] if start >= 0 and NEXT.startswith(text[start:]) else text
    return text, ended


def prompt_ids(talker, turns, new, more=0):
    """The tokens of a conversation, with room for `new` and `more` others. The oldest turns are left out where they do
    not fit, and of a question that does not fit alone, its beginning."""
    context = talker.model.config.context_length - more
    if talker.world:
        row = toy.as_row(turns[-1].content.strip(), [])
        return tokenize([row], talker.tokenizer, context, context - new)[0][0].prompt
    system, turns = [turn for turn in turns if turn.role == "system"], [turn for turn in turns if turn.role != "system"]
    while True:
        [row], cut = tokenize([Row((*system, *turns))], talker.tokenizer, context, context - new)
        if not cut["prompts_cut"] or len(turns) == 1:
            return row.prompt
        turns = turns[2:]


def likeliest(talker, question, lam, most=4):
    """The world's likeliest answers to a question at lam (m,), [(probability, text), …]; none where the question is not
    one of the world's."""
    try:
        texts = toy.responses(question.strip()) if talker.world else []
    except ValueError:
        texts = []
    if not texts:
        return []
    batches = world_batches([question.strip()], talker.tokenizer, talker.model.embed.weight.device)
    [(_, model, ids)] = policies_at(talker, lam[None])
    policy = (lambda batch: batch_logprobs(model, with_prefix(batch, torch.tensor(ids)))) if ids else model
    probs, best = world_logprobs(policy, batches)[0].exp().topk(most)
    return [(p, texts[j]) for p, j in zip(probs.tolist(), best.tolist())]


# ---------------------------------------------------------------------------------------------------------------------
# 3. In the terminal.

def answer_lines(talker, flags, lams):
    """Every line of standard input is a question; standard output has the answers, of several λ one after the other."""
    try:
        for number, line in enumerate(map(str.strip, sys.stdin), 1):
            texts, cut, turns = [""] * len(lams), set(), [*talker.system, Message("user", line)]
            for i, text in answer(talker, turns, lams, flags, cut=cut) if line else ():
                texts[i] += text
                if len(lams) == 1:
                    print(text, end="", flush=True)
            heads = [f"{named(talker, lam)}: " for lam in lams] if len(lams) > 1 else []
            print("\n".join(head + text for head, text in zip(heads, texts)), flush=True)
            if cut:
                at = " at " + " and ".join(named(talker, lams[i]) for i in sorted(cut)) if len(lams) > 1 else ""
                print(f"line {number}: the answer{at} was cut off at --max_new_tokens (at most half the context)",
                      file=sys.stderr)
    except BrokenPipeError:                                            # `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def converse(talker, flags, lams):
    """A conversation with whoever sits at the terminal."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # input() then has a history and can be edited
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if colour and os.name == "nt":
        os.system("")                                                  # Windows' terminal begins to read ANSI codes
    dim = lambda text: f"\x1b[2m{text}\x1b[0m" if colour else text
    system, turns = talker.system, []
    print(dim(f"{talker.name}; /help lists the commands" + "; it knows no turns: every question stands alone"
              * talker.world))
    while True:
        try:
            line = input(named(talker, lams[0]) + f" and {len(lams) - 1} more" * (len(lams) > 1) + "> ").strip()
        except EOFError:
            return print()
        except KeyboardInterrupt:
            print(dim("\nCtrl-D or /quit ends"))
            continue
        command, *words = line.split() or [""]
        try:
            if command in ("/quit", "/exit"):
                return None
            if command == "/help":
                print(help_of(talker.dims))
            elif command == "/pref":
                lams = columns_of(words, talker.dims, False, command)
                if turns and not talker.world:
                    print(dim("the conversation goes on; /reset forgets it"))
            elif command == "/compare":
                now = [f"{x:g}" for x in lams[0].tolist()]
                lams = lams[:1] if words == ["off"] else columns_of(words or now, talker.dims, True, command)
            elif command == "/system":
                system = [Message("system", " ".join(words))] if words else []
            elif command == "/reset":
                turns = []
            elif command.startswith("/"):
                print(f"{command} is no command; /help lists them")
            elif command:
                asked = [*system, *turns, Message("user", line)]
                texts = say(talker, asked, lams, flags)
                turns += [Message("user", line), Message("assistant", texts[0])]
                for lam in lams:
                    if top := likeliest(talker, line, lam):
                        print(dim(f"  the likeliest at {named(talker, lam)}" if talker.dims else "  the likeliest"))
                        print(dim("\n".join(f"  {p:6.1%}  {text}" for p, text in top)))
        except (UserError, FloatingPointError) as e:
            print(f"error: {e}")
        except KeyboardInterrupt:                                      # while the likeliest were computed
            print()


def help_of(dims):
    """The commands, with a preference between these dimensions as the example; of a base model, [], those that it has.
    """
    if not dims:
        return HELP
    pref, vertex = ["0.3", "0.7", *["0"] * (len(dims) - 2)], ["1", *["0"] * (len(dims) - 1)]
    names = " ".join(f"{name}={x}" for name, x in zip(dims, pref))
    return (f"{'/pref ' + ' '.join(pref):19} the preference; also /pref {names}\n"
            f"/compare            answers side by side, at /pref and the vertices; /compare {' '.join(vertex + pref)}: "
            f"at these; /compare off\n{HELP}")


def say(talker, turns, lams, flags):
    """Writes an answer to the terminal while it comes; Ctrl-C stops it. … stands where it was stopped or cut off.
    Returns the texts, one for each λ."""
    texts, cut, drawn, (width, height) = [""] * len(lams), set(), 0, shutil.get_terminal_size()
    heads, live = [named(talker, lam) for lam in lams], sys.stdout.isatty()
    with contextlib.closing(answer(talker, turns, lams, flags, cut=cut)) as pieces:
        try:
            for i, text in pieces:
                texts[i] += text
                if len(lams) == 1:
                    print(text, end="", flush=True)
                elif live and len(lines := side_by_side(heads, texts, width)) < height:
                    print(f"\x1b[{drawn}A" * (drawn > 0) + "\x1b[J" + "\n".join(lines), flush=True)
                    drawn = len(lines)
        except KeyboardInterrupt:
            pass
    marked = [text + " …" * (i in cut) for i, text in enumerate(texts)]
    print(" …" * len(cut) if len(lams) == 1 else
          f"\x1b[{drawn}A\x1b[J" * (drawn > 0) + "\n".join(side_by_side(heads, marked, width)))
    return texts


def side_by_side(heads, texts, width):
    """Lines with the texts in columns under their heads; one below the other where the terminal is narrow."""
    each = (width - 3 * (len(texts) - 1)) // len(texts)
    wrap = lambda text, to: [line for part in text.splitlines() for line in textwrap.wrap(part, to) or [""]]
    if each < 20:
        return [line for head, text in zip(heads, texts) for line in (f"{head}:", *wrap(text, width), "")]
    cells = [[*wrap(head, each), "-" * each, *wrap(text, each)] for head, text in zip(heads, texts)]
    return ["   ".join(cell.ljust(each) for cell in row).rstrip()
            for row in itertools.zip_longest(*cells, fillvalue="")]


def named(talker, lam):
    """A preference for readers: "helpful 0.3, harmless 0.7"."""
    return ", ".join(f"{dim} {x:.2g}" for dim, x in zip(talker.dims, lam.tolist()))


# ---------------------------------------------------------------------------------------------------------------------
# 4. On a page. It keeps the conversation and sends it with every question, so the server knows nothing of its users.

def about(talker, flags, lams):
    """What the page has to know, as JSON values. The front is that of eval_front.py, where it has been made."""
    front, file = None, Path(flags.run or "") / "front.json"
    if flags.run and file.exists():
        r = read_json(file)
        front = {key: r[key] for key in ("lams", "points", "points_are", "regret")} | {
            "exact": r["exact"] and r["exact"]["points"], "base": r["base"]["points"]}
    return {"name": talker.name, "run": Path(flags.run or flags.init).name, "dims": talker.dims, "lams": lams.tolist(),
            "front": front, "world": talker.world, "models": [list(own) for own in talker.files], "most": MOST,
            "greedy": flags.greedy, "system": "".join(turn.content for turn in talker.system), "seed": flags.seed,
            "prompts": [x for split in ("new_verbs", "seen") for x in toy.prompts(split)] if talker.world else []}


class Handler(BaseHTTPRequestHandler):
    """One request to page_server's server, whose attributes it reads."""
    timeout, disable_nagle_algorithm = 60, True             # a browser that reads no more holds nobody up for ever

    def log_message(self, *_):
        pass

    def send(self, status, kind="text/plain", text="", **headers):
        self.send_response(status)
        for name, value in {"Content-Type": f"{kind}; charset=utf-8", "Cache-Control": "no-store",
                            "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
                            "Cross-Origin-Resource-Policy": "same-origin", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def refused(self):
        """Whether the request is not from the page; then it has been answered."""
        host, given, token = self.headers.get("Host", ""), self.path[1:].partition("/")[0], self.server.token
        ours = host in [f"{name}:{self.server.server_port}" for name in ("127.0.0.1", "localhost")]        # rebound DNS
        origin = self.headers.get("Origin", f"http://{host}")
        if not (ours and origin == f"http://{host}" and hmac.compare_digest(given.encode(), token.encode())):
            self.send(403, text="not allowed: open the address that chat.py has printed\n")
            return True
        return False

    def handle(self):
        with contextlib.suppress(ConnectionError, TimeoutError):                      # the page has gone
            super().handle()

    def do_GET(self):
        if self.refused():
            return
        if self.path != f"/{self.server.token}/":
            return self.send(404, text="there is one page\n")
        nonce = secrets.token_urlsafe(16)
        policy = (f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
                  "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
        told = json.dumps(self.server.about).replace("<", "\\u003c")                  # no </script> in a name
        self.send(200, "text/html", self.server.page.replace("{nonce}", nonce).replace("{about}", told),
                  **{"Content-Security-Policy": policy})

    def do_POST(self):
        if self.refused():
            return
        server = self.server
        try:
            length = int(self.headers.get("Content-Length", ""))
            if self.path != f"/{server.token}/answer" or not 0 < length < 10 ** 6:
                raise ValueError("no question")
            page, number, question = question_of(json.loads(self.rfile.read(length)), len(server.talker.dims))
        except (ValueError, KeyError, TypeError):
            return self.send(400, text="this is no question\n")
        latest = server.latest
        latest[page] = max(number, latest.get(page, number))           # requests may overtake each other
        self.send(200, "application/x-ndjson")
        with server.lock, contextlib.closing(events(server.talker, server.flags, **question)) as coming:
            for event in coming:
                if latest[page] != number:
                    break
                self.wfile.write((json.dumps(event) + "\n").encode())


def page_server(talker, flags, lams):
    """(a server on this machine's own address, the page's URL). Requests must name the token of this start and this
    host, so that no other site, and no other user of the machine, can ask. One lock stands around the model: questions
    wait for each other, and of one page a new one ends the one before."""
    try:
        server = ThreadingHTTPServer(("127.0.0.1", flags.port), Handler)
    except (OSError, OverflowError) as e:
        raise UserError(f"--port {flags.port}: {e}") from None
    server.page = Path(__file__).with_name("chat.html").read_text(encoding="utf-8")
    server.daemon_threads, server.talker, server.flags, server.about = True, talker, flags, about(talker, flags, lams)
    server.token, server.lock, server.latest = secrets.token_urlsafe(16), threading.Lock(), {}    # {page: number}
    return server, f"http://127.0.0.1:{server.server_port}/{server.token}/"


def question_of(asked, m):
    """(the page that asks, the question's number, what is asked: turns, lams, greedy, seed) from its JSON. Raises
    ValueError, KeyError or TypeError for what is none."""
    turns, lams = [Message(str(turn["role"]), str(turn["content"])) for turn in asked["turns"]], asked["lams"]
    if not turns or {turn.role for turn in turns} - {"system", "user", "assistant"} or turns[-1].role != "user":
        raise ValueError("no conversation")
    if not 1 <= len(lams) <= MOST or {len(lam) for lam in lams} != {m}:
        raise ValueError("not one number for each dimension")
    lams = torch.tensor(lams, dtype=torch.float64)
    total = lams.sum(1, keepdim=True) if m else torch.ones(1)
    if not ((lams >= 0).all() and (total > 0).all() and total.isfinite().all()):
        raise ValueError("no preferences")
    return str(asked["page"]), int(asked["number"]), {
        "turns": turns, "lams": (lams / total).float(), "greedy": bool(asked["greedy"]),
        "seed": int(asked["seed"]) % 2 ** 63}


def events(talker, flags, turns, lams, greedy, seed):
    """What the page is sent: {"i", "text", "cut"} for a piece of column i, and whether the answer would be cut short
    behind it; {"ended"} for all, {"i", "likeliest"}, {"error"}."""
    cut = set()
    try:
        with contextlib.closing(answer(talker, turns, lams, flags, greedy, seed, cut)) as pieces:
            yield from ({"i": i, "text": text, "cut": i in cut} for i, text in pieces if text or i not in cut)
        yield {"ended": True}
        for i, lam in enumerate(lams):
            yield {"i": i, "likeliest": likeliest(talker, turns[-1].content, lam)}
    except (UserError, FloatingPointError) as e:
        yield {"error": str(e)}


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
