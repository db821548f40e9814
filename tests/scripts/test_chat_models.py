"""test_chat_models.py - a chat model all the way: its template around every prompt, its end behind every answer, and no
row of its vocabulary that is only padding."""
import sys
from pathlib import Path

import pytest
import torch
from running import go, killed, read, write_rows
from small import SHAPES

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from test_chat import CHATML, directory, ids

import train_hqd
import train_ppo
from data.tokenizers import load_tokenizer
from model import Config, Transformer

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
