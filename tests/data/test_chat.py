"""test_chat.py - turns as text and as tokens: against transformers, against ids worked out by hand, and templates that
do not end."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data import chat, render
from data.chat import announce, find_template, hide, question, shown, turns, write
from data.files import Message, Row, as_json
from data.tokenizers import load_tokenizer, spoken, tokenize
from runs.files import UserError

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA2 = ("{% set start = '' %}{% if messages[0]['role'] == 'system' %}"
          "{% set start = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}"
          "{% endif %}{% for m in messages %}{% if m['role'] == 'user' %}"
          "{{ bos_token + '[INST] ' + (start if loop.first else '') + m['content'].strip() + ' [/INST]' }}{% else %}"
          "{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}")
LLAMA3 = ("{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
          "m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
          "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
GEMMA = ("{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
         "{% endif %}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
         "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}")
ZEPHYR = ("{% for m in messages %}\n{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}\n"
          "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}")
# template, its special tokens, and the token behind an answer
TEMPLATES = {"chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"), "llama2": (LLAMA2, [], "</s>"),
             "llama3": (LLAMA3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>"),
             "gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"), "zephyr": (ZEPHYR, [], "</s>")}
SPELLED = "is <|im_end|> or </s> the end, or <s>?"


def user(text):
    return Message("user", text)


CHATS = [(user("What is the capital of France?"),),
         (user("Hi"), Message("assistant", "Hello."), user(" naïve 日本語 🙂\n\nx ")),
         (Message("system", "Be brief."), user("Hi"))]


def directory(path, template, extra=(), special=True, **config):
    """A Hugging Face directory whose tokenizer has <s> 0, </s> 1, the extra tokens, and then one for each byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    names = ["<s>", "</s>", *extra]
    vocab = {name: i for i, name in enumerate([*names, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    model = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    model.add_tokens([AddedToken(name, special=special, normalized=False) for name in names])
    model.save(str(path / "tokenizer.json"))
    config = dict(bos_token="<s>", eos_token="</s>", chat_template=template) | config
    (path / "tokenizer_config.json").write_text(json.dumps({key: x for key, x in config.items() if x is not None}))
    return path


def ids(tokenizer, *parts):
    """Special tokens, which are ids, and texts -> ids."""
    return [i for part in parts for i in ([part] if isinstance(part, int) else tokenizer.encode(part))]


def of_llama2(path, shared, template, extra):
    """A copy of Llama 2's tokenizer with a template and special tokens of its own."""
    tokenizer = json.loads(shared("tokenizers", "llama2").joinpath("tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["added_tokens"] += [dict(id=32000 + i, content=token, single_word=False, lstrip=False, rstrip=False,
                                       normalized=False, special=True) for i, token in enumerate(extra)]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (path / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>", chat_template=template)))
    return path


# ---- the plain forms ----

def test_the_plain_form_is_that_of_the_papers_data():
    """Wrong: no space in front of an answer, two of them, a line break missing."""
    written, *_ = write(find_template("hh"), [CHATS[1]])
    assert written == ("\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman:  naïve 日本語 🙂\n\nx \n\nAssistant:", False, " ")
    assert write(find_template("hh"), [CHATS[2]])[0].text == "Be brief.\n\nHuman: Hi\n\nAssistant:"
    tokenizer = load_tokenizer("toy")
    (turn, text), _ = tokenize([Row((user("Hi"),), ["Yes.", " Yes."]), Row("\n\nHuman: Hi\n\nAssistant:", [" Yes."])],
                               tokenizer, 100)
    assert turn.prompt == text.prompt and turn.responses == text.responses * 2
    assert turn.responses[0] != tokenizer.encode("Yes.") + [tokenizer.eos_id]


def test_no_wrapping():
    written = write(find_template("none"), [CHATS[1], "once", (user("Once upon"),)])
    assert [x.text for x in written] == ["Hi\n\nHello.\n\n naïve 日本語 🙂\n\nx ", "once", "Once upon"]
    assert not any(x.before or x.marked for x in written)


def test_a_system_turn():
    template = find_template("hh", None, "Be kind.")
    assert write(template, [CHATS[0]])[0].text.startswith("Be kind.\n\nHuman: What")
    assert write(template, [CHATS[2]])[0].text == "Be brief.\n\nHuman: Hi\n\nAssistant:"        # it has one
    assert write(template, ["once"])[0].text == "once"


# ---- whose template ----

def test_which_template(tmp_path):
    directory(tmp_path, [dict(name="tools", template="x"), dict(name="default", template="{{ 'd' }}")])
    assert find_template("auto", tmp_path).source == "{{ 'd' }}"
    (tmp_path / "chat_template.jinja").write_text("{{ 'j' }}")
    own = find_template("auto", tmp_path)
    assert own.source == "{{ 'j' }}" and own.name == str(tmp_path / "chat_template.jinja")
    assert own.tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "mine.jinja").write_text("{{ 'm' }}")
    assert find_template(str(tmp_path / "mine.jinja"), tmp_path).source == "{{ 'm' }}"
    assert find_template("hh", tmp_path).source is None and find_template("none", tmp_path).name == "none"
    directory(tmp_path, None)
    (tmp_path / "chat_template.jinja").unlink()
    assert find_template("auto", tmp_path).name == "hh" == find_template("auto").name
    with pytest.raises(UserError, match="no.jinja: cannot be read .*--template takes auto, none, hh or a file"):
        find_template("no.jinja")


# ---- tokens ----

@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", CHATS, ids=["one", "several", "system"])
def test_the_tokens_are_those_of_transformers(tmp_path, shared, name, prompt):
    """The prompt, and the answer behind it up to its end, as one conversation. Wrong: BOS twice or not at all, no
    prompt to answer, a space that SentencePiece adds, the tokenizer's EOS for the template's."""
    transformers = pytest.importorskip("transformers")
    template, extra, end = TEMPLATES[name]
    path = str(of_llama2(tmp_path, shared, template, extra))
    peer, messages = transformers.AutoTokenizer.from_pretrained(path), [turn._asdict() for turn in prompt]
    if name == "gemma" and prompt[0].role == "system":
        with pytest.raises(UserError, match="System role not supported; the turns were: system, user$"):
            tokenize([Row(prompt)], load_tokenizer(path), 1000)
        return
    (row,), _ = tokenize([Row(prompt, ["Paris it is."])], load_tokenizer(path), 1000)
    assert row.prompt == peer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    whole = peer.apply_chat_template([*messages, dict(role="assistant", content="Paris it is.")], return_dict=False)
    *answer, last = row.responses[0]
    assert whole[:len(row.prompt + answer)] == row.prompt + answer and last == peer.convert_tokens_to_ids(end)
    assert [i for i in whole[len(row.prompt + answer):] if peer.decode([i]).strip()][0] == last     # Llama 2: " </s>"


def test_a_real_chat_model():
    transformers = pytest.importorskip("transformers")
    if "SMOLLM2" not in os.environ:
        pytest.skip("SMOLLM2 is not set to a directory that shared/tools/smollm2.sh made")
    path = os.environ["SMOLLM2"]
    tokenizer, peer = load_tokenizer(path), transformers.AutoTokenizer.from_pretrained(path)
    for prompt in CHATS:
        messages = [turn._asdict() for turn in prompt]
        (row,), _ = tokenize([Row(prompt, ["Paris."])], tokenizer, 1000)
        assert row.prompt == peer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        whole = peer.apply_chat_template([*messages, dict(role="assistant", content="Paris.")], return_dict=False)
        assert row.prompt + row.responses[0] + peer.encode("\n") == whole


@pytest.mark.parametrize("name, prompt, answer", [
    ("zephyr", [529, 29989, 1792, 29989, 29958, 13, 18567, 2, 29871, 13, 29966, 29989, 465, 22137, 29989, 29958, 13],
     [2177, 275, 29889, 2]),
    ("llama2", [1, 518, 25580, 29962, 6324, 518, 29914, 25580, 29962], [3681, 29889, 2])])
def test_stored_tokens_of_transformers(tmp_path, shared, name, prompt, answer):
    """Paris is [2177, 275] behind a line break, and [3681] behind a space. Wrong: the same in both places."""
    tokenizer = load_tokenizer(of_llama2(tmp_path, shared, *TEMPLATES[name][:2]))
    (row,), _ = tokenize([Row((user("Hi"),), ["Paris."])], tokenizer, 1000)
    assert (row.prompt, row.responses) == (prompt, [answer])


def test_tokens_by_hand(tmp_path):
    """Without transformers. Wrong: the markers as letters, no prompt to answer, EOS behind the answer."""
    tokenizer = load_tokenizer(directory(tmp_path, CHATML, ["<|im_start|>", "<|im_end|>"]))
    assert (tokenizer.bos_id, tokenizer.ends, tokenizer.vocab_size) == (0, (3, 1), 260)
    (row,), _ = tokenize([Row((user("Hi"),), ["Yes", " Yes"])], tokenizer, 1000)
    assert row.prompt == ids(tokenizer, 2, "user\nHi", 3, "\n", 2, "assistant\n")       # no BOS: it writes none
    assert row.responses == [ids(tokenizer, "Yes", 3), ids(tokenizer, " Yes", 3)]       # nothing in front
    (cut,), _ = tokenize([Row((user("Hi"),))], tokenizer, 1000, max_prompt=11)
    assert cut.prompt == ids(tokenizer, 2, "assistant\n")                               # nor here a BOS


def test_bos_once(tmp_path):
    tokenizer = load_tokenizer(directory(tmp_path, LLAMA2))
    prompts = (user("Hi"),), (user("[INST] Hi [/INST]"),), (user("<s>[INST] Hi [/INST]"),)
    rows, _ = tokenize([Row(x, ["Yes"]) for x in prompts], tokenizer, 1000)
    assert [row.prompt for row in rows] == [ids(tokenizer, 0, "[INST] Hi [/INST]")] * 3
    assert rows[0].responses == [ids(tokenizer, " Yes", 1)]                             # the template's own space
    (cut, text), _ = tokenize([Row(prompts[0]), Row("Hi")], tokenizer, 1000, max_prompt=5)
    assert (cut.prompt, text.prompt) == (ids(tokenizer, 0, "NST]"), ids(tokenizer, 0, "Hi"))
    (tmp_path / "tokenizer_config.json").rename(tmp_path / "mine.jinja").write_text(LLAMA2)     # nobody names <s> now
    bare = load_tokenizer(tmp_path, str(tmp_path / "mine.jinja"))
    assert tokenize([Row(prompts[0], ["Yes"])], bare, 1000)[0] == rows[:1]


@pytest.mark.parametrize("special", [True, False])
def test_what_a_user_spells_is_text(tmp_path, special):
    """Also where the tokenizer does not say that its markers are special. Wrong: an end inside a question or an answer,
    the template's own markers as letters."""
    tokenizer = load_tokenizer(directory(tmp_path, CHATML, ["<|im_start|>", "<|im_end|>"], special))
    chat = (Message("system", SPELLED), user(SPELLED))
    (row,), _ = tokenize([Row(chat, [SPELLED])], tokenizer, 1000)
    markers = [i for i in row.prompt if i < 4]
    assert markers == [2, 3, 2, 3, 2] and [i for i in row.responses[0] if i < 4] == [3]
    assert tokenizer.decode(row.prompt).count(SPELLED) == 2 and spoken(row.responses, tokenizer) == ([SPELLED], [True])
    assert not {0, 1, 2, 3} & set(tokenizer.encode(SPELLED))


def test_all_ends_end(tmp_path):
    directory(tmp_path, CHATML, ["<|im_start|>", "<|im_end|>", "<|other|>"])
    (tmp_path / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[1, 4])))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.ends == (3, 1, 4)
    assert spoken([[9, 3], [9, 1], [9, 4], [9, 2]], tokenizer)[1] == [True, True, True, False]
    assert load_tokenizer(tmp_path, eos_id=2).ends == (2,)
    assert load_tokenizer(tmp_path, "hh").ends == (1, 4)


def test_a_template_that_writes_no_end_takes_eos(tmp_path):
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}assistant:"
    tokenizer = load_tokenizer(directory(tmp_path, plain))
    assert tokenizer.ends == (1,)
    refuses = "{% if messages[1] is defined %}{{ raise_exception('no') }}{% endif %}Q: {{ messages[0].content }}</s>"
    assert load_tokenizer(directory(tmp_path, refuses)).ends == (1,)


def test_nothing_is_no_crash(tmp_path):
    tokenizer = load_tokenizer(directory(tmp_path, "{{ '' }}"))
    (row,), _ = tokenize([Row((user(""),), [""])], tokenizer, 100)
    assert (row.prompt, row.responses) == ([1], [[1]])


# ---- prompts that are written already ----

def test_a_prompt_is_not_wrapped_twice(tmp_path, capsys):
    tokenizer = load_tokenizer(directory(tmp_path, CHATML, ["<|im_start|>", "<|im_end|>"]))
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    rows, _ = tokenize([Row(x, ["Yes"]) for x in ((user("Hi"),), (user(text),), text)], tokenizer, 100)
    assert rows[0] == rows[1] == rows[2]
    dialogue, mention = "\n\nHuman: Hi\n\nAssistant:", "what does <|im_start|>assistant mean?"
    prompts = [(user(dialogue),), (user(mention),), (user("Hi"),)]
    (as_it_is, asked, _), _ = tokenize([Row(x, [" A"]) for x in prompts], tokenizer, 100)
    assert as_it_is.prompt == ids(tokenizer, 0, dialogue) and asked.prompt[0] == 2 == asked.prompt[-11]
    announce(tokenizer.template, prompts)
    assert capsys.readouterr().out == (f"prompts: by the chat template of {tmp_path / 'tokenizer_config.json'}; 1 of 3 "
                                       f"are whole prompts already and stay what they are\n")
    announce(tokenizer.template, ["a story"])
    assert capsys.readouterr().out == ""
    announce(load_tokenizer("toy").template, prompts[2:])
    assert "plain form" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["hh", "none"])
def test_a_system_turn_that_no_prompt_takes_is_said(name, capsys):
    """Wrong: nothing said; said of prompts that take it, or without --system."""
    texts, turns = ["once", "[INST] Hi [/INST]"], [CHATS[0]]
    said = lambda prompts, system="Be kind.": (announce(find_template(name, None, system), prompts),
                                               capsys.readouterr().out)[1]
    line = "--system has no effect on {} of {} prompts, which are no turns but texts as they are\n"
    assert said(texts) == line.format(2, 2) and said(turns + texts).endswith(line.format(2, 3))
    assert "--system" not in said(turns) + said(texts + turns, None)


def test_hidden_and_shown():
    control = ("<a>", "<a>b", "|")
    text = "x<a>b<a>|\ufdd07\ufdd1"
    assert not any(token in hide(text, control) for token in control)
    assert shown(hide(text, control), control) == text.replace("\ufdd0", "\ufffd")
    for number in ("7", "9" * 5000):                         # as a template may write it. Wrong: IndexError, ValueError
        assert shown(f"\ufdd0{number}\ufdd1 \ufdd01\ufdd1", control) == f"\ufdd0{number}\ufdd1 <a>b"


def test_questions_and_json():
    assert question(CHATS[1]) == CHATS[1][2].content and question("once") == "once"
    assert turns(json.loads(json.dumps(as_json(CHATS[1])))) == CHATS[1] and turns("once") == "once"


# ---- templates of strangers ----

@pytest.fixture
def one_second(tmp_path, monkeypatch):
    """The process that renders has one second."""
    path = tmp_path / "render_in_a_second.py"
    path.write_text(Path(render.__file__).read_text().replace("SECONDS = 3 ", "SECONDS = 1 "))
    assert "SECONDS = 1 " in path.read_text()
    monkeypatch.setattr(chat, "RENDER", path)


@pytest.mark.parametrize("template, says", [
    ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    ("{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}", "it writes without end"),
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "too long, or too much memory"),
    ("{{ 'x' * 10**9 }}", "MemoryError"), ("{{ '%1000000000d' % 1 }}", "MemoryError"),
    ("{% set x = namespace(y='x') %}{% for i in range(99) %}{% set x.y = x.y ~ x.y %}{% endfor %}",
     "MemoryError|too much memory"),                                            # or the second is over before
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ("{{ raise_exception('only\nfools') }}", "TemplateError: only fools; the turns were: user"),
    ("{% if %}", "TemplateSyntaxError"), ("{{ messages.append(1) }}", "SecurityError"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "UndefinedError|SecurityError")])
def test_bad_templates_are_one_line(tmp_path, one_second, template, says):
    """Wrong: a training that waits for ever, or takes gigabytes."""
    start = time.time()
    with pytest.raises(UserError, match=says) as error:
        load_tokenizer(directory(tmp_path, template))
    assert "\n" not in str(error.value) and str(tmp_path / "tokenizer_config.json") in str(error.value)
    assert time.time() - start < 20                                             # a second of CPU, on a busy machine


def test_what_templates_may_use(tmp_path):
    template = ("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}\n"
                "  {% generation %}{{ {'b': m.content} | tojson }}{% endgeneration %}\n{% endfor %}"
                "{{ strftime_now('%d %b %Y, %H:%M') }}{{ tools is none }}{{ bos_token }}{{ unk_token is defined }}")
    job = dict(template=template, variables=dict(bos_token="<s>"), day="2024-07-26",
               chats=[[[turn._asdict() for turn in CHATS[1]], True]])
    done = subprocess.run([sys.executable, render.__file__], capture_output=True, text=True, input=json.dumps(job))
    assert json.loads(done.stdout) == [{"text": '{"b": "Hi"}26 Jul 2024, 00:00True<s>False'}]
