"""test_talk.py - chat.py: what is said at a λ is what the model says there, streams, stops, and comes out of a pipe."""
import contextlib
import io
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from running import ROOT, go

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from small import SHAPES
from test_chat import CHATML, directory

import chat
from data import toy
from data.chat import find_template
from data.files import Message
from data.tokenizers import load_tokenizer
from fronts.measure import policies, run_config
from model import Config, Transformer, generate
from runs.files import UserError
from runs.flags import cli
from svd_lora import set_preference, svd_lora_layers

LAMS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.3, 0.7]])


def flags(*words):
    return cli(chat.Flags, "", [*map(str, words), "--device", "cpu"])


def loaded(run, *words):
    """A talker, its flags, and a question of the world. s is so large that λ matters after four steps."""
    given = flags(run, *words)
    talker = chat.load(given)
    for layer in svd_lora_layers(talker.model).values():
        if layer.m:
            layer.s.fill_(2.0)
    return talker, given, toy.prompts("new_verbs")[0]


def said(pieces, n):
    texts = [""] * n
    for i, text in pieces:
        texts[i] += text
    return texts


def user(text):
    return [Message("user", text)]


# ---------------------------------------------------------------------------------------------------------------------
# An answer.

@pytest.mark.parametrize("greedy", [True, False])
def test_a_mixed_batch_says_what_every_preference_says_alone(panacea, greedy):
    talker, given, question = loaded(panacea, "--max_new_tokens", 24)
    pieces = list(chat.answer(talker, user(question), LAMS, given, greedy, seed=5))
    prompt, alone = talker.tokenizer.encode(question + "\n"), []
    for lam in LAMS:
        set_preference(talker.model, lam)
        [y] = generate(talker.model, [prompt], 24, 0.0 if greedy else 1.0, eos_id=talker.tokenizer.ends,
                       generator=torch.Generator().manual_seed(5), vocab_size=talker.tokenizer.vocab_size)
        alone.append(talker.tokenizer.decode([token for token in y if token not in talker.tokenizer.ends]).strip())
    assert said(pieces, 3) == alone and len(set(alone)) > 1                    # the wrong rows would be seen
    assert len(pieces) > 20 and {i for i, _ in pieces[:6]} == {0, 1, 2}        # piece by piece, all at once


def test_another_seed_says_something_else(panacea):
    talker, given, question = loaded(panacea)
    one, same, other = (said(chat.answer(talker, user(question), LAMS[:1], given, seed=seed), 1) for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize("method", ["rs", "prompt"])
def test_other_methods_answer_as_they_are_evaluated(method, request):
    run = request.getfixturevalue("soups") if method == "rs" else go("train_dpo", "chat-prompt", method=method)
    talker, given, question = loaded(run, "--max_new_tokens", 20, "--greedy")
    texts, prompt = said(chat.answer(talker, user(question), LAMS, given), 3), talker.tokenizer.encode(question + "\n")
    for lam, text in zip(LAMS, texts):
        if method == "rs":
            [(_, model)] = policies(run, run_config(run), Transformer.from_pretrained("out/base-tiny-seed0"), [lam])
            before = []
        else:
            model, before = talker.model, talker.tokenizer.encode(" ".join(f"{x:.2f}" for x in lam.tolist()) + "\n")
        [y] = generate(model, [before + prompt], 20, 0.0, eos_id=talker.tokenizer.ends)
        assert text == talker.tokenizer.decode([t for t in y if t not in talker.tokenizer.ends]).strip()


def test_of_one_model_for_each_preference_the_nearest_answers():
    run = go("train_dpo", "chat-dps", method="dps", dps_parts=2, steps=6)
    talker, *_ = loaded(run)
    assert [chat.nearest(talker.files, torch.tensor(lam)) for lam in ([0.7, 0.3], [0.1, 0.9], [1.0, 0.0])] == [
        (0.5, 0.5), (0.0, 1.0), (1.0, 0.0)]
    U = []
    for rows, model, before in chat.policies_at(talker, LAMS[:2]):
        assert len(rows) == 1 and before == []
        U.append(next(iter(svd_lora_layers(model).values())).U.clone())
    assert not U[0].equal(U[1])


def test_the_likeliest_answers_are_exact(panacea):
    talker, _, question = loaded(panacea)
    found = chat.likeliest(talker, question + " ", LAMS[2])
    set_preference(talker.model, LAMS[2])
    probs = {}
    for text in toy.responses(question):
        x, y = talker.tokenizer.encode(question + "\n"), [*talker.tokenizer.encode(text), talker.tokenizer.eos_id]
        logps = talker.model(torch.tensor([x + y]))[0].log_softmax(-1)[len(x) - 1:-1]
        probs[text] = logps.gather(1, torch.tensor(y)[:, None]).sum().exp().item()
    best = sorted(probs, key=probs.get, reverse=True)[:4]
    assert [text for _, text in found] == best
    assert [p for p, _ in found] == pytest.approx([probs[text] for text in best], rel=1e-3)
    assert chat.likeliest(talker, "Who are you?", LAMS[2]) == []


def test_closing_an_answer_closes_the_generation(panacea, monkeypatch):
    talker, given, question = loaded(panacea)
    closed, stream = [], chat.stream

    def watched(*args, **more):
        try:
            yield from stream(*args, **more)
        finally:
            closed.append(1)
    monkeypatch.setattr(chat, "stream", watched)
    pieces = chat.answer(talker, user(question), LAMS, given)
    next(pieces), next(pieces)
    assert not closed
    pieces.close()
    assert closed == [1]


# ---------------------------------------------------------------------------------------------------------------------
# What is shown, and what is read.

@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("toy")


@pytest.mark.parametrize("text, shown, ended", [
    (" It is é 日.", "It is é 日.", False), ("One.\n\nHuman: Two?", "One.", True), ("a\n\nb\n\n", "a\n\nb", False),
    ("One.\n\nHumans are", "One.\n\nHumans are", False)])
def test_what_is_shown_grows_and_stops_at_the_next_turn(tokenizer, text, shown, ended):
    ids, before = tokenizer.encode(text), ""
    for n in range(1, len(ids) + 1):
        now, over = chat.visible(ids[:n], tokenizer)
        assert now.startswith(before) and "\ufffd" not in now
        assert not any(now.endswith(chat.NEXT[:k]) for k in range(1, len(chat.NEXT) + 1))
        before = now
    assert (now, over) == (shown, ended)
    assert chat.visible([*ids, tokenizer.eos_id], tokenizer) == (shown, True)


def test_at_the_end_nothing_is_held_back(tokenizer):
    ids = tokenizer.encode("One.\n\nHum")
    assert chat.visible(ids, tokenizer) == ("One.", False)
    assert chat.visible(ids, tokenizer, cut=True) == ("One.\n\nHum", False)


def test_old_turns_are_left_out_where_they_do_not_fit(tokenizer):
    talker = SimpleNamespace(world=False, tokenizer=tokenizer,
                             model=SimpleNamespace(config=SimpleNamespace(context_length=100)))
    turns = [Message("system", "Be kind."), *(Message(role, f"{role} {i}") for i in range(9)
                                              for role in ("user", "assistant")), Message("user", "last")]
    text = tokenizer.decode(chat.prompt_ids(talker, turns, 40))
    assert text.startswith("Be kind.\n\nHuman: user ") and text.endswith("Human: last\n\nAssistant:")
    assert "user 8" in text and "user 0" not in text and len(tokenizer.encode(text)) <= 60
    long = chat.prompt_ids(talker, user("word " * 300), 40)
    assert len(long) == 60 and tokenizer.decode(long).endswith("word \n\nAssistant:")


@pytest.mark.parametrize("words, compare, lams", [
    ("", False, [[0.5, 0.5]]), ("0.3 0.7", False, [[0.3, 0.7]]), ("b=1 a=0", False, [[0, 1]]),
    ("", True, [[0.5, 0.5], [1, 0], [0, 1]]), ("1 0", True, [[1, 0], [0, 1]]),
    ("1 0 0.2 0.8", True, [[1, 0], [0.2, 0.8]])])
def test_the_preferences_of_an_answer(words, compare, lams):
    assert torch.allclose(chat.columns_of(words.split(), ["a", "b"], compare), torch.tensor(lams).float())


@pytest.mark.parametrize("words, compare, message", [
    ("1 0 0 1", False, "2 preferences"), ("1 0 0", True, "takes 2 numbers"), ("1 0 " * 7, True, "takes up to 6")])
def test_preferences_that_are_refused(words, compare, message):
    with pytest.raises(UserError, match=message):
        chat.columns_of(words.split(), ["a", "b"], compare)


def test_a_base_model_has_no_preference():
    assert chat.columns_of([], [], False).shape == (1, 0)
    with pytest.raises(UserError, match="a base model has no preference"):
        chat.columns_of(["1"], [], False)


def test_turns_are_the_templates_and_its_end_stops(tmp_path, monkeypatch):
    """A random ChatML model: <|im_start|> is 2, <|im_end|> 3."""
    config = Config(300, 256, n_layer=1, n_head=2, d_model=16, bos_id=0, eos_id=1, **SHAPES["llama"])
    Transformer(config).init_weights(torch.Generator().manual_seed(0)).save_pretrained(tmp_path)
    directory(tmp_path, CHATML, ["<|im_start|>", "<|im_end|>"])
    given = flags("--init", tmp_path, "--system", "Be brief.")
    talker, seen = chat.load(given), []

    def stream(model, prompts, new, temperature, top_p, ends, *args, **more):
        seen.extend([prompts[0], ends])
        yield from ((torch.tensor([0]), torch.tensor([i])) for i in [*talker.tokenizer.encode("Hello"), 3, 9, 9])
    monkeypatch.setattr(chat, "stream", stream)
    turns = [*talker.system, Message("user", "Hi"), Message("assistant", "<|im_end|>?"), Message("user", "Go")]
    assert said(chat.answer(talker, turns, torch.zeros(1, 0), given), 1) == ["Hello"]
    prompt, ends = seen
    assert talker.tokenizer.decode(prompt) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "<|im_end|>?<|im_end|>\n<|im_start|>user\nGo<|im_end|>\n<|im_start|>assistant\n")
    assert prompt.count(3) == 4 and 3 in ends                          # what somebody spells is no end


@pytest.mark.parametrize("words", [[], ["out/panacea", "--init", "out/base-tiny-seed0"], ["out/nowhere"],
                                   ["out/panacea", "--top_p", "0"]])
def test_who_is_to_talk_must_be_said(words):
    with pytest.raises(UserError):
        chat.load(flags(*words))


def test_half_a_run_does_not_talk(panacea, tmp_path):
    shutil.copyfile(panacea / "config.json", tmp_path / "config.json")
    with pytest.raises(UserError, match="the training has not ended; run its command again to resume it"):
        chat.load(flags(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# In the terminal.

@pytest.mark.slow
def test_a_pipe_gets_answers_alone():
    """With the base model that ships, in a process of its own."""
    script, base = ROOT / "chat.py", ROOT / "data" / "base"
    done = subprocess.run([sys.executable, script, "--init", base, "--greedy", "--device", "cpu"], encoding="utf-8",
                          input="How do I thank my neighbour?\n\nHow do I paint a bicycle?\n", capture_output=True)
    first, second, third, rest = done.stdout.split("\n")
    assert done.returncode == 0 and second == rest == "" and first.endswith((".", "?", "!")) and first != third


def test_what_loading_says_is_no_answer(monkeypatch, capsys):
    load = chat.load
    monkeypatch.setattr(chat, "load", lambda flags: print("loading") or load(flags))
    monkeypatch.setattr(sys, "stdin", io.StringIO(toy.prompts("seen")[0] + "\n"))
    chat.main(flags("--init", "out/base-tiny-seed0", "--greedy"))
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and out[0].isupper() and "loading" in err and "loading" not in out


def test_whoever_waits_at_a_terminal_is_told_why(panacea, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
        chat.main(flags(panacea))
        assert capsys.readouterr() == ("", f"loading {panacea}\n" * terminal)


def test_lines_are_questions_of_their_own(panacea, monkeypatch, capsys):
    talker, given, question = loaded(panacea, "--greedy")
    alone = said(chat.answer(talker, user(question), LAMS, given), 3)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{question}\n{question}\n"))
    chat.answer_lines(talker, given, LAMS[:1])
    assert capsys.readouterr().out == f"{alone[0]}\n{alone[0]}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(question))
    chat.answer_lines(talker, given, LAMS)
    heads = "helpful 1, harmless 0", "helpful 0, harmless 1", "helpful 0.3, harmless 0.7"
    assert capsys.readouterr().out == "".join(f"{head}: {text}\n" for head, text in zip(heads, alone))


def test_a_conversation(panacea, monkeypatch, capsys):
    """What is asked, with which turns, at which λ."""
    talker, given, _ = loaded(panacea)
    lines = iter(["Hi", "/pref 1 0", "/system Be kind.", "Again", "/pref 1 1", "/nothing", "/help", "/compare", "Both",
                  "/compare off", "/reset", "/system", "  ", "New", "/quit", "never"])
    asked = []
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(chat, "answer", lambda talker, turns, lams, flags, cut: asked.append(
        ([turn.content for turn in turns], lams.tolist())) or (x for x in [(0, "Yes"), (0, "."), (len(lams) - 1, "")]))
    chat.converse(talker, given, torch.tensor([[0.5, 0.5]]))
    assert asked == [(["Hi"], [[0.5, 0.5]]), (["Be kind.", "Hi", "Yes.", "Again"], [[1, 0]]),
                     (["Be kind.", "Hi", "Yes.", "Again", "Yes.", "Both"], [[1, 0], [0, 1]]), (["New"], [[1, 0]])]
    out = capsys.readouterr().out
    assert "error: /pref 1 1: " in out and "/nothing is no command" in out and "/compare off" in out
    assert "/pref helpful=0.3 harmless=0.7\n" in out and "conversation goes on" not in out         # the world has none
    assert next(lines) == "never" and "\x1b" not in out                                # no colours into a file


def test_ctrl_c_stops_the_answer_alone(panacea, monkeypatch, capsys):
    talker, given, question = loaded(panacea)
    closed = []

    def interrupted(*args, cut):
        cut.add(0)
        with contextlib.closing(SimpleNamespace(close=lambda: closed.append(1))):
            yield 0, "The first"
            yield 0, " words"
            raise KeyboardInterrupt
    lines = iter([KeyboardInterrupt, question, "/quit"])

    def read(prompt):
        line = next(lines)
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line
    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(chat, "answer", interrupted)
    chat.converse(talker, given, LAMS[:1])
    assert "The first words …\n" in capsys.readouterr().out and closed == [1] and next(lines, None) is None


def test_another_preference_in_the_middle_of_a_conversation(panacea, monkeypatch, capsys):
    talker, given, _ = loaded(panacea)
    lines = iter(["/pref 1,0", "Hi", "/pref nice=1", "/pref helpful=0 harmless=1", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(chat, "answer", lambda *args, cut: (x for x in [(0, "Yes")]))
    chat.converse(talker._replace(world=False), given, LAMS[:1])
    out = capsys.readouterr().out
    assert "error: /pref nice=1: nice is none of the dimensions, helpful harmless\n" in out
    assert out.count("the conversation goes on; /reset forgets it\n") == 1 and out.index("Yes") < out.index("goes on")


def test_help_has_the_run_s_own_dimensions():
    assert "/pref 0.3 0.7 0     the preference; also /pref a=0.3 b=0.7 c=0\n" in chat.help_of(["a", "b", "c"])
    assert "/compare 1 0 0 0.3 0.7 0:" in chat.help_of(["a", "b", "c"]) and "/pref" not in chat.help_of([])


def test_an_answer_that_is_cut_off_says_so(panacea, monkeypatch, capsys):
    """In a pipe on standard error alone; in the terminal and on the page by a sign, which is no part of what was said.
    """
    talker, given, question = loaded(panacea, "--greedy", "--max_new_tokens", 3)
    [short] = said(chat.answer(talker, user(question), LAMS[:1], given), 1)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"\n{question}\n"))
    chat.answer_lines(talker, given, LAMS[:1])
    out, err = capsys.readouterr()
    assert out == f"\n{short}\n" and err.startswith("line 2: the answer was cut off at --max_new_tokens")
    monkeypatch.setattr(sys, "stdin", io.StringIO(question))
    chat.answer_lines(talker, given, LAMS[:2])
    assert "line 1: the answer at helpful 1, harmless 0 and helpful 0, harmless 1 was cut" in capsys.readouterr().err
    assert chat.say(talker, user(question), LAMS[:1], given) == [short] and capsys.readouterr().out == f"{short} …\n"
    chat.say(talker, user(question), LAMS[:2], given)
    assert capsys.readouterr().out.count(" …") == 2
    last = lambda: {event["i"]: event["cut"] for event in chat.events(talker, given, user(question), LAMS[:2], True, 0)
                    if "text" in event}
    assert last() == {0: True, 1: True}
    given.max_new_tokens, cut = 200, set()
    list(chat.answer(talker, user(question), LAMS[:2], given, cut=cut))
    assert cut == set() and last() == {0: False, 1: False}


def test_columns_beside_each_other():
    lines = chat.side_by_side(["a", "b"], ["one two three four five six", "x\n\ny"], 45)
    assert lines == ["a                       b", "---------------------   ---------------------",
                     "one two three four      x", "five six", "                        y"]
    assert chat.side_by_side(["a", "b"], ["one", "two"], 30) == ["a:", "one", "", "b:", "two", ""]


def test_a_template_that_refuses_ends_nothing(panacea, monkeypatch, capsys, tmp_path):
    talker, given, _ = loaded(panacea)
    (tmp_path / "no.jinja").write_text("{{ raise_exception('no') if messages[0].content == 'no' else 'What?' }}")
    refuses = find_template(str(tmp_path / "no.jinja"))
    talker = talker._replace(world=False, tokenizer=SimpleNamespace(**vars(talker.tokenizer) | {
        "template": refuses, "ends": talker.tokenizer.ends}))
    lines = iter(["no", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    chat.converse(talker, given, LAMS[:1])
    assert "error: chat template" in capsys.readouterr().out
