"""test_talk_page.py - the page of chat.py: who may ask, users who do not mix, and the page itself in a real browser."""
import http.client
import json
import re
import threading
import time
from urllib.parse import urlsplit

import browser
import pytest
import torch
from running import ROOT, go
from test_talk import LAMS, flags, loaded, said, user

import chat
from data import toy
from svd_lora import svd_lora_layers


@pytest.fixture
def serving():
    """serving(run, …flags): (talker, flags, a question, the page's URL) of a server that ends with the test."""
    servers = []

    def start(run, *words):
        talker, given, question = loaded(run, *words)
        server, url = chat.page_server(talker, given, chat.columns_of(given.pref or [], talker.dims, given.compare))
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return talker, given, question, url
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def request(url, method="GET", path=None, body=None, **headers):
    """(status, headers, body) of a request to the server behind url."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=30)
    connection.request(method, parts.path if path is None else path, body, headers)
    response = connection.getresponse()
    return response.status, dict(response.getheaders()), response.read().decode()


def asking(question, lams, page="a", number=1, **more):
    return json.dumps({"page": page, "number": number, "seed": 3, "greedy": True, "lams": lams.tolist(),
                       "turns": [{"role": "user", "content": question}]} | more)


def ask(url, *args, **more):
    """(the texts, the likeliest answers) that the server sends."""
    status, _, body = request(url, "POST", urlsplit(url).path + "answer", asking(*args, **more))
    assert status == 200
    events = [json.loads(line) for line in body.splitlines()]
    top = {event["i"]: event["likeliest"] for event in events if "likeliest" in event}
    return said(((event["i"], event["text"]) for event in events if "text" in event), len(top)), list(top.values())


# ---------------------------------------------------------------------------------------------------------------------
# Who may ask, and what.

def test_the_page_and_its_rules(panacea, serving):
    *_, url = serving(panacea)
    status, headers, text = request(url)
    policy = headers["Content-Security-Policy"]
    assert status == 200 and "default-src 'none'" in policy and "unsafe" not in policy
    [nonce] = set(re.findall(r"'nonce-([\w-]+)'", policy))
    assert f'<script nonce="{nonce}">' in text and f'<style nonce="{nonce}">' in text
    assert " src=" not in text and not re.search(r"https?://", text)                   # no network
    assert nonce not in request(url)[2]                                                # another one every time


@pytest.mark.parametrize("change, status", [
    (dict(path="/"), 403), (dict(path="/wrong/"), 403), (dict(path="wrong"), 403), (dict(Host="evil.example"), 403),
    (dict(Host="evil.example:80"), 403), (dict(Origin="http" + "://evil.example"), 403), (dict(path="{}more"), 404),
    (dict(method="POST", body="{}"), 400), (dict(method="POST", path="/wrong/answer", body="{}"), 403)])
def test_who_is_refused(panacea, serving, change, status):
    *_, url = serving(panacea)
    path = urlsplit(url).path
    change = {key: x.replace("{}more", path + "more") for key, x in change.items()}
    assert request(url, **change)[0] == status
    assert request(url)[0] == 200


@pytest.mark.parametrize("more", [
    {"turns": []}, {"turns": [{"role": "user"}]}, {"turns": [{"role": "robot", "content": "x"}]}, {"lams": []},
    {"turns": [{"role": "assistant", "content": "x"}]}, {"lams": [[1, 0, 0]]}, {"lams": [[0, 0]]}, {"lams": [[2, -1]]},
    {"lams": [[1, 0]] * 7}, {"lams": [["a", "b"]]}, {"lams": [[float("inf"), 0]]}, {"lams": [[float("nan"), 1]]},
    {"seed": None}, {"lams": 3}, {"lams": [[1, 0], [1]]}])
def test_what_is_no_question(more):
    question = json.loads(asking("x", LAMS))
    assert chat.question_of(question, 2)[2]["lams"].equal(LAMS)
    with pytest.raises((ValueError, KeyError, TypeError)):
        chat.question_of(question | more, 2)


def test_names_do_not_break_out_of_the_page(panacea, serving):
    name = "</script><script>alert(1)</script>"
    *_, url = serving(panacea, "--system", name)
    text = request(url)[2]
    assert name not in text and text.count("<script") == 2
    about = re.search(r'id="about">(.*?)</script>', text)[1]
    assert json.loads(about)["system"] == name and json.loads(about)["dims"] == ["helpful", "harmless"]


# ---------------------------------------------------------------------------------------------------------------------
# Answers.

def test_two_users_at_once_do_not_mix(panacea, serving):
    """Each with a question, a λ and a page of its own; together they get what each gets alone."""
    talker, given, question, url = serving(panacea)
    wants = [(x, LAMS[i:i + 2], f"{x} {i}") for x in toy.prompts("new_verbs")[:2] for i in (0, 1)]
    alone = [ask(url, *want) for want in wants]
    assert alone[0][0] == said(chat.answer(talker, user(question), LAMS[:2], given, True, 3), 2)
    assert len({str(x) for x in alone}) == len(wants)
    together = [None] * len(wants)

    def one(i):
        together[i] = ask(url, *wants[i], number=2)
    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(wants))]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert together == alone


def test_a_new_question_of_a_page_ends_the_one_before(panacea, serving, monkeypatch):
    """Pieces come as they are said; an older question that arrives late is not answered."""
    *_, url = serving(panacea)
    said_so_far = []

    def slow(talker, turns, *args):
        for i in range(200):
            said_so_far.append(turns[-1].content)
            yield 0, "x"
            time.sleep(0.01)
    monkeypatch.setattr(chat, "answer", slow)
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=30)
    connection.request("POST", parts.path + "answer", asking("old", LAMS[:1], number=5))
    response = connection.getresponse()
    assert json.loads(response.readline()) == {"i": 0, "text": "x", "cut": False} and len(said_so_far) < 100  # streams
    monkeypatch.setattr(chat, "answer", lambda talker, turns, *args: (piece for piece in [(0, turns[-1].content)]))
    other = ask(url, "other page", LAMS[:1], page="b")                  # waits for its turn, and ends nothing
    assert other[0] == ["other page"] and said_so_far == ["old"] * 200
    assert response.read().count(b"\n") == 201
    assert ask(url, "new", LAMS[:1], number=7)[0] == ["new"] and ask(url, "late", LAMS[:1], number=6) == ([], [])


def test_a_newer_question_does_not_wait_for_the_end(panacea, serving, monkeypatch):
    *_, url = serving(panacea)
    closed = threading.Event()

    def endless(talker, turns, *args):
        try:
            while turns[-1].content == "old":
                yield 0, "x"
                time.sleep(0.01)
            yield 0, "new"
        finally:
            closed.set()
    monkeypatch.setattr(chat, "answer", endless)
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=30)
    connection.request("POST", parts.path + "answer", asking("old", LAMS[:1], number=1))
    response = connection.getresponse()
    response.readline()
    assert not closed.is_set() and ask(url, "new", LAMS[:1], number=2)[0] == ["new"] and closed.is_set()
    assert set(response.read().splitlines()) <= {b'{"i": 0, "text": "x", "cut": false}'}


# ---------------------------------------------------------------------------------------------------------------------
# In a browser.

in_browser = pytest.mark.skipif(browser.program() is None, reason="no Chromium: CHROME names one (tests/browser.py)")


@pytest.fixture
def tab(tmp_path):
    """A browser, of which nothing was asked that is not from this machine, and in which nothing went wrong."""
    window = browser.Browser(tmp_path / "profile")
    yield window
    window.run("1")
    asked = [e["params"]["request"]["url"] for e in window.events if e["method"] == "Network.requestWillBeSent"]
    wrong = [e for e in window.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    window.close()
    assert asked and all(re.match(r"http://127\.0\.0\.1:|data:,|about:", url) for url in asked) and not wrong


def texts(tab):
    return tab.run("[...document.querySelectorAll('.turn:last-of-type .said')].map(x => x.textContent)")


def settled(tab):
    tab.until("turns.length && running === null && last().columns.every(c => c.done)", 30)


@in_browser
def test_a_question_a_dragged_preference_and_a_comparison(sft_run, serving, tab):
    """By keyboard alone: the question, λ, pins; every answer is the model's at that λ, by the same random numbers."""
    talker, given, question, url = serving(sft_run)
    at = lambda *lam: said(chat.answer(talker, user(question), torch.tensor([lam]), given, seed=given.seed), 1)[0]
    tab.look(1280)
    tab.goto(url)
    tab.run("$('text').focus()")
    tab.send("Input.insertText", text=question)
    tab.key("Enter", 13, "\r")
    settled(tab)
    assert texts(tab) == [at(0.5, 0.5)] and tab.run("document.querySelectorAll('.top li').length") == 4
    tab.run("document.querySelector('input[type=range]').focus()")
    tab.key("Home", 36)
    settled(tab)
    assert texts(tab) == [at(0, 1)] != [at(0.5, 0.5)]
    assert tab.run("document.activeElement.ariaValueText") == "helpful 0.00, harmless 1.00"
    assert tab.run("$('front').getAttribute('aria-label')").startswith("At helpful 0.00, harmless 1.00 the run reaches")
    assert 0 < float(tab.run("$('status').dataset.first")) < 2000
    tab.run("(async () => { for (let i = 30; i >= 0; i--) { setLam([i / 30, 1 - i / 30]);"
            "await new Promise(after => setTimeout(after, 15)); } })()")                 # a drag: the last λ counts
    settled(tab)
    assert texts(tab) == [at(0, 1)]
    tab.run("$('pin').focus()")
    tab.key(" ", 32, " ")
    tab.run("document.querySelector('input[type=range]').focus()")
    tab.key("End", 35)
    settled(tab)
    assert texts(tab) == [at(1, 0), at(0, 1)] and tab.run("document.querySelectorAll('#front .pinned').length") == 1
    tab.until("$('live').textContent.includes('helpful 1.00, harmless 0.00')")          # what a screen reader hears
    for _ in range(6):
        tab.run("$('pin').click()")
    assert tab.run("pins.length") == 5 and tab.run("$('pin').disabled")
    tab.run("document.querySelector('#pins button').click()")
    assert tab.run("pins.length") == 4 and len(texts(tab)) == 5
    tab.run("$('reset').click()")
    assert texts(tab) == [] and tab.run("$('empty').hidden") is False


@in_browser
def test_stop(panacea, serving, tab, monkeypatch):
    """… stands behind what was stopped, and behind that alone; of what was said at another λ nothing is left."""
    *_, url = serving(panacea, "--compare", "--pref", "1", "0", "0", "1")
    words = ["Well.", ""]

    def answers(talker, turns, lams, flags, greedy, seed, cut):
        cut.update(range(len(lams)))
        for i, word in enumerate(words[:len(lams)]):
            cut.difference_update([i] * word.endswith("."))
            yield i, word
        while not words[-1].endswith("."):
            time.sleep(0.01)
            yield 0, ""
    monkeypatch.setattr(chat, "answer", answers)
    tab.goto(url)
    tab.run("ask('x')")
    tab.until("last().columns[0].text === 'Well.'")
    tab.run("$('stop').click()")
    settled(tab)
    assert texts(tab) == ["Well.", " …"]
    words[:] = ["Well,"]
    tab.run("setLam([0.5, 0.5])")
    tab.until("last().columns[0].text === 'Well,'")
    assert texts(tab)[0] == "Well,"
    tab.run("$('stop').click()")
    settled(tab)
    assert texts(tab) == ["Well, …", " …"]
    words[:] = [""]
    tab.run("setLam([0.2, 0.8])")
    tab.until("running && last().columns[0].stale")
    assert texts(tab)[0] == "Well,"
    tab.run("$('stop').click()")
    settled(tab)
    assert texts(tab) == [" …", " …"]
    words[:] = ["Well.", "No."]
    tab.run("repeat()")
    settled(tab)
    assert texts(tab) == words


@in_browser
def test_two_tabs_do_not_mix(panacea, serving, tab):
    talker, given, question, url = serving(panacea)
    other, tabs = toy.prompts("new_verbs")[1], []
    for x, lam in ((question, [1, 0]), (other, [0, 1])):
        tabs.append(tab.session if not tabs else tab.open())
        tab.goto(url)
        tab.run(f"setLam({lam}); ask({json.dumps(x)})")
    for session, x, lam in zip(tabs, (question, other), LAMS[:2]):
        tab.session = session
        settled(tab)
        assert texts(tab) == said(chat.answer(talker, user(x), lam[None], given), 1)
        assert tab.run("turns.length") == 1


@in_browser
@pytest.mark.parametrize("width", [390, 820, 1280])
def test_it_fits_every_width_light_and_dark(panacea, serving, tab, width):
    *_, question, url = serving(panacea, "--compare")
    shades = []
    for scheme in ("light", "dark"):
        tab.look(width, 844, scheme, phone=width == 390)
        tab.goto(url)
        tab.run(f"ask({json.dumps(question)})")
        settled(tab)
        assert tab.run("document.documentElement.scrollWidth") <= width
        small = tab.run("[...document.querySelectorAll('button')].filter(b => b.offsetParent && "
                        "(b.offsetHeight < 24 || b.offsetWidth < 24)).map(b => b.id)")
        assert small == [] and len(texts(tab)) == 3
        assert "helpful 1.00" in tab.run("$('pins').innerText")          # the slider has helpful at its right
        for x in toy.prompts("seen"):                                   # each stands between what is fixed
            tab.run(f"ask({json.dumps(x)})")
            settled(tab)
            top, bottom, over, under = tab.run(
                "(q => [q.top, q.bottom, $('control').getBoundingClientRect().bottom, "
                "$('form').getBoundingClientRect().top])([...document.querySelectorAll('.question')].pop()"
                ".getBoundingClientRect())")
            assert max(0, over if width == 390 else 0) <= top and bottom <= under, (top, bottom, over, under)
        shades.append(tab.run("getComputedStyle(document.body).backgroundColor"))
    assert shades[0] != shades[1]


@in_browser
@pytest.mark.parametrize("m, control", [(3, "#triangle"), (4, "input[type=range]")])
def test_more_dimensions(m, control, serving, tab):
    """A triangle for three, by keyboard, by hand and by numbers; from four on a slider for each."""
    run = go("train_dpo", f"chat-m{m}", pref_dim=m)
    talker, given, question, url = serving(run)
    tab.look(1280)
    tab.goto(url)
    tab.run(f"ask({json.dumps(question)})")
    settled(tab)
    tab.run(f"document.querySelector('{control}').focus()")
    tab.key("ArrowUp", 38)
    lam = tab.run("lam")
    assert lam[0] > 1 / m + 0.005 > 1 / m > lam[1] and sum(lam) == pytest.approx(1)
    if m == 3:
        for width in (390, 820, 1280):                                  # its corners' names can be read
            tab.look(width)
            assert tab.run("parseFloat(getComputedStyle(document.querySelector('#triangle text')).fontSize) / 300 * "
                           "$('triangle').getBoundingClientRect().width") > 10
        x, y = tab.run("(box => [box.left + box.width * 20 / 300, box.top + box.height * 230 / 256])"
                       "($('triangle').getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            tab.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        assert tab.run("lam") == [0, 1, 0]
        tab.run("(i => { i.value = 0.5; i.onchange(); })(document.querySelector('#lam input'))")
        assert tab.run("lam") == [0.5, 0.5, 0]
        assert tab.run("$('triangle').getAttribute('aria-valuetext')") == "helpful 0.50, harmless 0.50, concise 0.00"
    settled(tab)
    assert texts(tab) == said(chat.answer(talker, user(question), torch.tensor([tab.run("lam")]), given), 1)


@in_browser
def test_a_base_model_and_markup_in_answers(serving, tab, monkeypatch):
    """No λ; what is said is text, whatever it looks like; an error is shown and nothing hangs."""
    given = flags("--init", "out/base-tiny-seed0")
    talker = chat.load(given)
    assert not svd_lora_layers(talker.model)
    server, url = chat.page_server(talker, given, torch.zeros(1, 0))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(chat, "answer", lambda *args: (x for x in [(0, "<img src=x onerror=alert(1)>")]))
    tab.goto(url)
    tab.run("ask('<b>x</b>')")
    settled(tab)
    assert texts(tab) == ["<img src=x onerror=alert(1)>"] and tab.run("document.querySelectorAll('img, b').length") == 0

    def broken(*args):
        raise FloatingPointError("not finite")
        yield
    monkeypatch.setattr(chat, "answer", broken)
    tab.run("ask('again')")
    settled(tab)
    assert texts(tab) == ["not finite"] and tab.run("$('send').hidden") is False
    server.shutdown(), server.server_close()


def test_the_page_names_no_other_place():
    text = (ROOT / "chat.html").read_text(encoding="utf-8")
    assert not re.findall(r"https?://", text) and not re.findall(r"@import|url\(", text)
