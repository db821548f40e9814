"""test_chat_models.py - a chat model all the way: its template around every prompt, on the run's first day; its end
behind every answer, and no row of its vocabulary that is only padding."""
import sys
from datetime import date
from pathlib import Path

import pytest
import torch
from running import go, killed, read, write_rows
from small import SHAPES

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from test_chat import CHATML, directory, ids

import chat
import train_hqd
import train_ppo
from data import tokenizers
from data.tokenizers import load_tokenizer, tokenizer_of
from model import Config, Transformer
from runs.directory import read_config

pytestmark = pytest.mark.usefixtures("in_small_world")
VOCABULARY = 260                    # of the tokenizer; the model has 300 rows


@pytest.fixture(scope="module")
def chatty(work):
    """A random Llama with a ChatML template, in out/chatty, and a file of questions with two answers each."""
    path = work / "out" / "chatty"
    config = Config(300, 256, n_layer=1, n_head=2, d_model=16, bos_id=0, eos_id=1, **SHAPES["llama"])
    Transformer(config).init_weights(torch.Generator().manual_seed(0)).save_pretrained(path)
    directory(path, CHATML, ["<|im_start|>", "<|im_end|>"])
    rows = [{"prompt": f"How do I clean {i} bicycles?", "response_0": f"Look at {'every part of ' * (i % 3)}it.",
             "response_1": f"No, {i} is glad. He smiled a lot.", "better": {"helpful": i % 2, "warm": 1 - i % 2}}
            for i in range(40)]
    return str(path), write_rows(work / "questions.jsonl", rows)


def recorded(monkeypatch, module):
    """What the script generates, as it does so: [(prompts, responses), …]."""
    said, generate = [], module.generate_all
    monkeypatch.setattr(module, "generate_all", lambda *a, **k: said.append((a[1], generate(*a, **k))) or said[-1][1])
    return said


def check(said, path):
    """Prompts are the template's, and nothing but tokens of the tokenizer is said."""
    tokenizer = load_tokenizer(path)
    opening, closing = ids(tokenizer, 2, "user\nHow do I clean "), ids(tokenizer, "?", 3, "\n", 2, "assistant\n")
    for prompt, response in ((x, y) for part in said for x, y in zip(*part)):
        assert prompt[:len(opening)] == opening and prompt[-len(closing):] == closing
        assert max(response) < VOCABULARY and not {1, 3} & set(response[:-1])
    assert any(y[-1] in (1, 3) for _, part in said for y in part) and len(said) > 0


def test_ppo_on_a_reward_model(chatty, monkeypatch, capsys):
    path, file = chatty
    judge = go("train_reward", "judge-chat", init=path, data=[file], eval_data=[file], steps=4, max_length=128,
               template="hh")
    assert "prompts: in the plain form" in capsys.readouterr().out
    said = recorded(monkeypatch, train_ppo)
    run = go("train_ppo", "ppo-chat", init=path, prompts=[file], rewards=[f"{judge}:warm", "length"], steps=2,
             samples=2, max_length=128, max_new_tokens=16, eval=True)
    check(said, path)
    out = capsys.readouterr().out
    assert f"prompts: by the chat template of {path}/tokenizer_config.json\n" in out
    assert read(run, "front.json")["ended"] is not None


def test_hqd_continued(chatty, monkeypatch):
    """Questions that went through generated.jsonl are turns again."""
    path, file = chatty
    flags = dict(init=path, data=[file], rewards=["length", "concise:2"], near=4, steps=1, steps2=2, parts=1,
                 max_length=128, max_new_tokens=32, samples2=4)
    said = recorded(monkeypatch, train_hqd)
    killed("train_hqd", "hqd-chat", lambda record: record.get("stage") == 2 and record["step"] == 2, **flags)
    check(said, path)
    said.clear()
    go("train_hqd", "hqd-chat", **flags)
    assert not said


DATED = dict(steps=3, max_length=96, save_every=1)
SCRIPTS = {
    "train_dpo": lambda file: dict(data=[file]), "train_reward": lambda file: dict(data=[file], max_new_tokens=4),
    "train_sft": lambda file: dict(data=[f"a={file}", f"b={file}"]),
    "train_ppo": lambda file: dict(prompts=[file], rewards=["length", "concise:2"], samples=2, max_new_tokens=32),
    "train_hqd": lambda file: dict(data=[file], rewards=["length", "concise:2"], near=4, parts=1, stage2=False,
                                   max_new_tokens=8)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_keeps_the_day_that_its_template_reads(chatty, script, monkeypatch, tmp_path):
    """Killed on the one day and continued on the next, it ends as it would have on the first. Wrong: each start reads
    its own day; all read one; a run that is begun anew keeps the old one."""
    class Today(date):
        today = staticmethod(lambda: date(2031, 5, day))
    path, file = chatty
    monkeypatch.setattr(tokenizers, "date", Today)
    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%d %B %Y') }}" + CHATML)
    if script == "train_sft":
        file = write_rows(tmp_path / "one.jsonl", [{"prompt": f"Why {i}?", "response": "No."} for i in range(40)])
    flags = DATED | dict(init=path, template=str(template)) | SCRIPTS[script](file)
    weights = lambda run: [f.read_bytes() for f in sorted(run.glob("adapter*"))]
    day = 1
    whole = go(script, f"day-{script}-whole", **flags)
    run = killed(script, f"day-{script}", lambda record: record["step"] == 2, **flags)
    day = 2
    assert go(script, run.name, **flags) == run and weights(run) == weights(whole) != []
    config = read_config(run)
    assert config["day"] == "2031-05-01" == tokenizer_of(config).template.day
    if script == "train_dpo":
        assert chat.load(chat.Flags(run=str(run), device="cpu")).tokenizer.template.day == "2031-05-01"
        anew = go(script, run.name, overwrite=True, **flags)
        assert read_config(anew)["day"] == "2031-05-02" and weights(anew) != weights(whole)
