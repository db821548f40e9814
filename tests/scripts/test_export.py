"""test_export.py - what export.py writes, read by this project, and by transformers and PEFT where these are there."""
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from running import BASE, go, own_rows, read, words
from small import SHAPES, adapted

import export
from data import toy
from data.tokenizers import load_tokenizer
from fronts.measure import base_of, policies
from model import Config, Transformer
from runs.files import UserError
from runs.flags import cli
from svd_lora import adapters_off, read_adapter_header, save_adapter

LAMS = [[0.3, 0.7], [1.0, 0.0], [0.0, 1.0]]
FAMILIES = {"gpt2": {}, "llama": SHAPES["llama"], "qwen2": SHAPES["llama"] | dict(qkv_bias=True),
            "qwen3": SHAPES["qwen3"]}
TOKENS = torch.tensor([load_tokenizer("toy").encode("How do I mend a door? Look at every part of it.")])


def written(run, lam, to="merged", **more):
    """The directory that export.py writes of a run at λ."""
    out = Path(f"out/exported-{Path(run).name}-{to}")
    shutil.rmtree(out, ignore_errors=True)
    return export.main(export.Flags(run=str(run), out=str(out), pref=lam and list(map(str, lam)), to=to, device="cpu",
                                    **more))


@torch.no_grad()
def logits(run, lam):
    """The run's own at λ, and those of its base."""
    config = read(run, "config.json")
    _, model = next(policies(run, config, base_of(config, "cpu"), torch.tensor([lam])))
    with adapters_off(model):
        base = model(TOKENS)
    return model(TOKENS), base


@torch.no_grad()
def read_back(folder, dtype=torch.float32):
    return Transformer.from_pretrained(folder, dtype)(TOKENS)


def moved(run, config):
    """The run, with an adapter that moves its base as a long training does."""
    model = adapted(base_of(config, "cpu"), sigma=0.1, s=0.2)
    save_adapter(model, run / "adapter.safetensors", config["dims"])
    return run


@pytest.fixture
def on_world(panacea, tmp_path):
    """A Panacea run on the world, with such an adapter."""
    run = Path(shutil.copytree(panacea, tmp_path / "run", ignore=shutil.ignore_patterns("front.*")))
    return moved(run, read(panacea, "config.json"))


@pytest.mark.parametrize("lam", LAMS)
def test_merged(on_world, lam, close):
    """Wrong: another λ, or its entries in another order."""
    folder = written(on_world, lam)
    ours, base = logits(on_world, lam)
    assert close(read_back(folder), ours, 1e-5) and not close(read_back(folder), base, 0.03)
    assert not close(read_back(folder), logits(on_world, lam[::-1])[0], 0.03)
    assert read(folder, "config.json") == read(BASE, "config.json")
    assert read(folder, "generation_config.json")["eos_token_id"] == load_tokenizer("toy").eos_id
    assert not (folder / "chat_template.jinja").exists()               # the world's prompts are texts
    card = (folder / "README.md").read_text()
    assert f"helpful {lam[0]:g}, harmless {lam[1]:g}" in card and "not evaluated" in card


def test_the_words_of_a_preference(on_world):
    by_name = written(on_world, ["harmless=0.7", "helpful=0.3"], "peft")
    bytes_of = lambda folder: (folder / "adapter_model.safetensors").read_bytes()
    first = bytes_of(by_name)
    assert first == bytes_of(written(on_world, [0.3, 0.7], "peft")) != bytes_of(written(on_world, [0.7, 0.3], "peft"))


def test_bf16_is_said_to_round(on_world, capsys):
    folder = written(on_world, [0.3, 0.7], dtype="bf16")
    told = capsys.readouterr().out
    said = float(told.split("by up to ")[1].split()[0])
    assert read(folder, "config.json")["torch_dtype"] == "bfloat16" and 0.001 < said < 0.5
    largest = said * 100 / float(told.split("on four prompts, ")[1].split(" %")[0])    # on the prompts, or TOKENS: near
    assert 0.5 < largest / logits(on_world, [0.3, 0.7])[0].abs().max() < 2
    assert "the likeliest token is " in told and "that is what bfloat16 rounds, and --dtype fp32 does not" in told
    assert [line for line in told.splitlines() if line.endswith("…")][1:] == [
        "merging and writing the weights …", "reading them again, beside the run's own model …"]
    assert read_back(folder, None).dtype == torch.bfloat16
    written(on_world, [0.3, 0.7], dtype="fp32")
    told = capsys.readouterr().out
    assert "--dtype" not in told and "the likeliest token is the same at all" in told


def test_the_card_says_what_was_measured(on_world):
    r = dict(lams=[[0, 1], [0.25, 0.75], [1, 0]], dims=["helpful", "harmless"], points_are="normalised J",
             points=[[0.1, 0.9], [0.4, 0.8], [0.9, 0.2]], regret=0.0219)
    (on_world / "front.json").write_text(json.dumps(r))
    card = (written(on_world, [0.3, 0.7], "peft") / "README.md").read_text()
    assert "normalised J at λ = helpful 0.250, harmless 0.750: helpful 0.400, harmless 0.800; regret" in card
    assert "0.0219" in card
    for more, text in ((dict(eval_labels=[4, 3]), "0.800 (held-out rows with a label: helpful 4, harmless 3); regret"),
                       (dict(split="seen"), "0.800 (exactly, on 4 held-out prompts of the world); regret")):
        (on_world / "front.json").write_text(json.dumps(r | more))
        assert text in (written(on_world, [0.3, 0.7], "peft") / "README.md").read_text()
    (on_world / "front.json").write_text(json.dumps(r))
    (on_world / "samples.json").write_text(json.dumps(dict(texts=[["a"], ["b"] * 5, ["c"]])))
    assert "0.800 (on 5 sampled responses); regret" in (written(on_world, [0.3, 0.7]) / "README.md").read_text()


def test_the_card_says_how_it_was_made(on_world):
    card = lambda *a, **more: (written(on_world, *a, **more) / "README.md").read_text()
    command = f"`python export.py {on_world} --pref 0.3 0.7 --to"
    assert f"{command} merged --out out/exported-run-merged --dtype base`" in card([0.3, 0.7])
    peft = card([0.3, 0.7], "peft")
    assert f"{command} peft --out out/exported-run-peft`" in peft and "put the base's name on the hub there" in peft
    grid = (written(on_world, None, "grid", parts=2) / "0-1/README.md").read_text()
    assert f"`python export.py {on_world} --parts 2 --to grid --out out/exported-run-grid`" in grid


def test_every_method(soups, hqd_run, ppo_run, close):
    """Rewarded soups are averaged at λ; runs with models of their own give the nearest, and say so."""
    for run, lam in ((soups, [0.3, 0.7]), (ppo_run[0], [0.3, 0.7])):
        assert close(read_back(written(run, lam)), logits(run, lam)[0], 1e-5)
    folder = written(soups, [0.3, 0.7], "peft")
    ranks = [read_adapter_header(f)["k"] for f in soups.glob("adapter-*.safetensors")]
    assert read(folder, "adapter_config.json")["r"] == sum(ranks) and len(ranks) == 2
    hqd = hqd_run[0]
    own = {tuple(read_adapter_header(f)["lam"]): f for f in hqd.glob("adapter-*.safetensors")}
    assert len(own) == 3
    card = (written(hqd, [0.1, 0.9]) / "README.md").read_text()
    assert "helpful 0, harmless 1 (asked for: helpful 0.1, harmless 0.9; the run's nearest model" in card
    pama = go("train_ppo", "export-pama", aggregate="pama", steps=1)
    assert "| none, for this method" in (written(pama, None) / "README.md").read_text()
    folder = written(hqd, None, "grid", parts=8)
    assert sorted(f.name for f in folder.glob("*/")) == ["0-1", "0_5-0_5", "1-0"]


def test_a_grid(on_world):
    folder = written(on_world, None, "grid", parts=2)
    assert sorted(f.name for f in folder.glob("*/")) == ["0-1", "0_5-0_5", "1-0"]
    for name, lam in (("0-1", [0, 1]), ("0_5-0_5", [0.5, 0.5])):
        alone = written(on_world, lam, "peft")
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (folder / name / file).read_bytes() == (alone / file).read_bytes()
    assert "vLLM serves no adapters of GPT-2" in (folder / "README.md").read_text()
    two = written(on_world, [0.25, 0.75, 0.5, 0.5], "grid")
    assert sorted(f.name for f in two.glob("*/")) == ["0_25-0_75", "0_5-0_5"]


def test_a_quantised_base(close, capsys):
    """Merged, it is the base that the run was trained on; PEFT's is another, and the difference is told."""
    run = go("train_dpo", "export-nf4", init=BASE, quantize="nf4", steps=2)
    ours, _ = logits(run, [0.3, 0.7])
    assert close(read_back(written(run, [0.3, 0.7])), ours, 1e-5)
    capsys.readouterr()
    written(run, [0.3, 0.7], "peft")
    printed = capsys.readouterr().out
    assert "trained on a base in nf4" in printed and float(printed.split("by up to ")[1].split()[0]) > 0.05


def test_the_same_adapter_on_another_copy_of_the_base(on_world, soups, close):
    """What measures a quantised base's difference adds none of its own: on an equal base it is 0."""
    for run in (on_world, soups):
        config, lam = read(run, "config.json"), torch.tensor([0.3, 0.7])
        _, model = next(policies(run, config, base_of(config, "cpu"), lam[None]))
        other = base_of(config, "cpu")
        far, _, moved, places = export.difference(model, other, load_tokenizer("toy"))
        near, _, none, _ = export.difference(model, export.same_adapter(other, model, lam), load_tokenizer("toy"))
        assert near < 1e-5 < far and none == 0 <= moved <= places


def test_all_or_nothing(on_world, monkeypatch):
    """Wrong: weights are left behind where the model card could not be written."""
    monkeypatch.setattr(export, "card", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        written(on_world, [0.3, 0.7])
    assert not list(Path("out").glob("*exported-run-merged*"))


@pytest.mark.parametrize("flags, text", [
    ({}, "--to merged takes one preference: --pref and 2 numbers, for helpful harmless"),
    (dict(pref=[0.3, 0.7, 0.5, 0.5]), "takes one preference"), (dict(pref=[0.3, 0.8]), "sums to 1"),
    (dict(pref=["helpful=0.3", "harm=0.7"]), "harm is none of the dimensions, helpful harmless"),
    (dict(pref=["helpful=0.3", 0.7]), "each once"), (dict(pref=["a", "b"]), "numbers, or dimension=number"),
    (dict(pref=[0.3, 0.7], to="peft", dtype="bf16"), "--dtype is of --to merged"),
    (dict(pref=[0.3, 0.7], parts=2), "--parts is of --to grid"),
    (dict(pref=[0.3, 0.7], out="out"), "exists and is not empty"), (dict(pref=[0.3, 0.7], out=None), "--out names")])
def test_refused(panacea, flags, text):
    with pytest.raises(UserError, match=re.escape(text)):
        export.main(cli(export.Flags, "", [str(panacea), *words(dict(out="out/bad") | flags)]))
    assert not Path("out/bad").exists()


def test_a_prompted_preference_has_no_weights():
    with pytest.raises(UserError, match="no weights of a λ"):
        written(go("train_dpo", "export-prompt", method="prompt"), [0.3, 0.7])


# ---------------------------------------------------------------------------------------------------------------------
# The peers.

@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_and_peft_load_it(work, family, close, monkeypatch):
    """Logits in fp32 at λ inside the simplex and at its ends; PEFT finds the base by itself."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base, tokenizer = work / f"out/export-{family}", load_tokenizer("toy")
    shape = FAMILIES[family] | dict(eos_id=tokenizer.eos_id)
    Transformer(Config(tokenizer.vocab_size, 64, n_layer=2, n_head=4, d_model=32, **shape)).init_weights(
        torch.Generator().manual_seed(0)).save_pretrained(base)
    run = go("train_dpo", f"export-{family}-run", init=str(base), tokenizer="toy", data=[own_rows("export.jsonl", 8)],
             eval_data=["export.jsonl"], steps=1, lams_per_step=2)
    moved(run, read(run, "config.json"))
    for lam in LAMS:
        ours, plain = logits(run, lam)
        for to, loader in (("merged", transformers.AutoModelForCausalLM), ("peft", peft.AutoPeftModelForCausalLM)):
            model = loader.from_pretrained(written(run, lam, to), dtype=torch.float32).eval()
            with torch.no_grad():
                assert close(model(TOKENS).logits, ours, 1e-5) and not close(plain, ours, 0.1)
    for to in ("merged", "peft", "grid"):                              # the card's own lines, where it lies
        folder = written(run, LAMS[0], to)
        folder = folder / "0_3-0_7" if to == "grid" else folder
        card = (folder / "README.md").read_text()
        with monkeypatch.context() as there:
            there.chdir(folder)
            exec(re.search(r"```python\n(.*?)```", card, re.S)[1], names := {})
        assert close(names["model"].float()(TOKENS).logits, logits(run, LAMS[0])[0], 1e-4)
        assert names["tokenizer"]("Hello").input_ids == tokenizer.encode("Hello")
        assert "written by the template chat_template.jinja" in card


def test_transformers_reads_the_tokenizer_and_the_plain_form(on_world):
    """The toy's ids, and the form Human: … Assistant: of a run on turns."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(written(on_world, [0.3, 0.7]))
    ours = load_tokenizer("toy")
    for prompt in toy.prompts("new_verbs"):
        for text in (prompt, *toy.responses(prompt)):
            assert tokenizer(text).input_ids == ours.encode(text)
    assert (tokenizer.eos_token_id, len(tokenizer)) == (ours.eos_id, ours.vocab_size)
    turns = [dict(role="system", content="Be kind."), dict(role="user", content="Hi"),
             dict(role="assistant", content="Yes?"), dict(role="user", content="Help.")]
    assert (tokenizer.apply_chat_template(turns, chat_template=export.HH, tokenize=False, add_generation_prompt=True)
            == "Be kind.\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Help.\n\nAssistant:")
