"""test_hqd.py - ParetoHqD: offline sets, what is selected for whom, both stages, both ways to train, killed runs.

Runs are made inside this process, on a world of 8 responses that a base model learns in seconds.
"""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import eval_front
import train_base
import train_hqd
from runs.files import UserError
from runs.loop import Log
from data import toy
from data.offline import draw_world, read_offline
from data.prompts import split
from data.text_rewards import text_rewards
from data.tokenizers import load_tokenizer, spoken
from model import Transformer
from svd_lora import load_adapter, read_adapter_header
from test_rlhf_front import shrink
from test_scripts import metrics, script


# ---- offline sets ----

def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_pairs_of_both_schemas(tmp_path):
    file = write(tmp_path / "a.jsonl", [
        {"prompt": "How?", "response": "So."}, {"prompt": "How?", "response": "Not so."},            # one prompt twice
        {"prompt": "How?", "response": "So.", "source": "again"}, {"prompt": "Why?", "response": " \n"},
        {"prompt": "Why?", "response_0": "Because.", "response_1": "So."},                            # no label needed
        {"prompt": "\n\nHuman: Who?\n\nAssistant:", "response_0": " I.", "response_1": " You.", "better": {"warm": 1}}])
    rows, dropped = read_offline([file])
    dialogue = "\n\nHuman: {}\n\nAssistant:".format
    assert [(row.prompt, *row.responses) for row in rows] == [
        (dialogue("How?"), " So."), (dialogue("How?"), " Not so."), (dialogue("Why?"), " Because."),
        (dialogue("Why?"), " So."), (dialogue("Who?"), " I."), (dialogue("Who?"), " You.")]
    assert dropped == {"short": 0, "empty": 1, "duplicate": 1}           # wrong: by the prompt alone, as for rollouts


def test_stories_are_cut_into_pairs(tmp_path):
    (tmp_path / "s.txt").write_text("One two three four.\nToo short.\nFive six seven eight nine.\nOne two three four.")
    rows, dropped = read_offline([tmp_path / "s.txt"], prompt_words=2)
    assert [(row.prompt, *row.responses) for row in rows] == [("One two", " three four."),
                                                              ("Five six", " seven eight nine.")]
    assert dropped == {"short": 1, "empty": 0, "duplicate": 1}


@pytest.mark.parametrize("line, message", [
    ('{"prompt": "x"', "row 2: not JSON"), ("[1]", "row 2: not a JSON object"),
    ('{"response": "y"}', 'row 2: field "prompt" is missing'),
    ('{"prompt": "x"}', 'row 2: field "response" is missing'),
    ('{"prompt": "x", "response_0": "y"}', 'row 2: field "response_1" is missing'),
    ('{"prompt": "x", "response": 3}', 'row 2: field "response" must be a string, not 3')])
def test_what_is_no_pair(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "response": "y"}\n' + line + "\n")
    with pytest.raises(UserError) as error:
        read_offline([tmp_path / "a.jsonl"])
    assert f"a.jsonl, {message}" in str(error.value) and "\n" not in str(error.value)


def test_files_that_hold_no_pairs(tmp_path):
    for name, text, message in [("a.jsonl", "\n", "no pair"), ("a.txt", "short", "no pair"), ("a.csv", "x", "give")]:
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message):
            read_offline([tmp_path / name], 12)
    with pytest.raises(UserError, match="cannot be read"):
        read_offline([tmp_path / "nowhere.jsonl"])


def test_the_world_s_offline_set_is_what_its_base_was_trained_on():
    rows, dropped = draw_world(4000, torch.Generator().manual_seed(0))
    assert len(rows) + dropped["duplicate"] == 4000 and dropped["empty"] == 0 and dropped["duplicate"] > 200
    pairs = {(row.prompt, row.responses[0]) for row in rows}
    assert len(pairs) == len(rows) and {x for x, _ in pairs} == {x + "\n" for x in toy.prompts("train")}
    # how often a pair is among the distinct ones: 1 − (1 − p)^25, for each of the 160 prompts came 25 times
    x, risky = toy.prompts("train")[0], False
    for split_at in (0.005, 0.02):
        likely = [(y, p) for y, p in zip(toy.responses(x), toy.base_probs(x).tolist()) if p > split_at]
        expected = sum(1 - (1 - p) ** 25 for _, p in likely)
        found = np.mean([sum((z + "\n", y) in pairs for y, p in zip(toy.responses(z), toy.base_probs(z).tolist())
                             if p > split_at) for z in toy.prompts("train") if toy._task(z).risky == risky])
        assert abs(found - expected) < 0.1 * expected                    # wrong: uniform over the 160 responses
    assert draw_world(4000, torch.Generator().manual_seed(0))[0] == rows
    assert draw_world(4000, torch.Generator().manual_seed(1))[0] != rows


# ---- selection ----

R = torch.tensor([[0.9, 0.1], [0.8, 0.5], [0.5, 0.8], [0.1, 0.9], [0.6, 0.6], [0.2, 0.2]], dtype=torch.float64)
LAMS = torch.tensor([[0.8, 0.2], [0.5, 0.5], [0.2, 0.8]], dtype=torch.float64)


def flags_of(**flags):
    """Flags with the defaults that main() fills in."""
    return replace(train_hqd.Flags(near=2, near2=1, steps=2, steps2=2, samples2=2, lr=1e-3, together=True), **flags)


def test_selection_of_known_points(capsys):
    """The six points: distances by hand. (0.2, 0.2) lies on the ray of (½, ½), but it is dominated."""
    pool = train_hqd.Pool([None] * 6, [None] * 6, R)
    near, report = train_hqd.select(pool, LAMS, 1, ["a", "b"], flags_of(layers=1))
    assert near == [[1, 0], [4, 1], [2, 3]] and report["pool"] == 5 and report["layers"] == 1
    assert report["distance"] == pytest.approx([0.2425 / 2, 0.2652 / 2, 0.2425 / 2], abs=1e-4)
    assert report["low"] == pytest.approx([0.1, 0.1]) and report["high"] == pytest.approx([0.9, 0.9])
    assert report["scores"][0] == pytest.approx([0.85, 0.3]) and report["overlap"] == [0.5, 0]
    line = "lam 0.50 0.50 | 2 pairs | distance 0.1326 | a 0.700 b 0.550 | shared with the next 0.00\n"
    assert line in capsys.readouterr().out
    everything, _ = train_hqd.select(pool, LAMS, 1, ["a", "b"], flags_of(layers=2))
    assert everything[1] == [4, 5]                                       # wrong: without the layers
    linear, _ = train_hqd.select(pool, LAMS, 1, ["a", "b"], flags_of(select="linear"))
    assert [set(index) for index in linear] == [{0, 1}, {1, 2}, {2, 3}]  # point 4 is no λ's largest sum: concave there
    whole, report = train_hqd.select(pool, LAMS, 1, ["a", "b"], flags_of(select="all"))
    assert whole == [list(range(6))] * 3 and report["index"] is None
    assert train_hqd.select(pool, LAMS, 2, ["a", "b"], flags_of(layers=1))[0] == [[1], [4], [2]]      # k / 2
    with pytest.raises(UserError, match="stage 2, 6 pairs for a b"):
        train_hqd.select(replace(pool, scores=R * 0), LAMS, 2, ["a", "b"], flags_of())


def test_representatives():
    lattice = lambda m, parts: train_hqd.simplex_lattice(m, parts)
    assert train_hqd.representatives(lattice(2, 10)) == [10, 0, 5]
    middle = train_hqd.representatives(lattice(3, 4))
    assert [lattice(3, 4)[i].tolist() for i in middle[:3]] == [[1, 0, 0], [0, 1, 0], [0, 0, 1]] and len(middle) == 4
    assert sorted(lattice(3, 4)[middle[3]].tolist()) == [0.25, 0.25, 0.5]             # the exact centre is not in it
    assert train_hqd.representatives(torch.tensor([[0.3, 0.7]])) == [0]               # one stands for all


# ---- runs ----

@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """A working directory, and a world of 8 responses and 20 prompts whose base model has mass 0.9 inside it."""
    patch = pytest.MonkeyPatch()
    shrink(patch, dict(train=8, eval=10), OPENINGS=("plain", "formal"), BODIES=("hint", "refuse"), CAUTIONS=("none",),
           CLOSINGS=("none", "cheer"))
    cwd = tmp_path_factory.mktemp("hqd")
    patch.chdir(cwd)
    train_base.main(train_base.Flags(size="tiny", steps=80, batch_size=4, lr=6e-3))
    yield cwd
    patch.undo()
    toy._world.cache_clear()


SMALL = dict(pool=400, near=12, steps=4, steps2=3, batch_size=3, parts=2, prompts2=10, samples2=3, max_new_tokens=24,
             save_every=1, eval=False, log_every=1000, device="cpu", size="tiny")


def go(name, **flags):
    """Trains out/<name> in this process, and returns its directory."""
    return train_hqd.main(train_hqd.Flags(**SMALL | flags, out=f"out/{name}"))


def read(run, name):
    return json.loads((run / name).read_text())


def adapters(run, stage=2):
    """What each adapter file holds, in order."""
    return [load_file(f) for f in sorted(run.glob("adapter-*" if stage == 2 else "snapshots/stage1-*"))]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x[key], y[key]) for x, y in zip(a, b) for key in x)


def answers_of(run):
    return [json.loads(line) for line in (run / "generated.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def together(mini):
    """A run with everything in it, all adapters in one batch; beside it the rows of every batch."""
    batches = []
    with pytest.MonkeyPatch.context() as patch:
        pack = train_hqd.pack
        patch.setattr(train_hqd, "pack", lambda rows, *a: batches.append(rows) or pack(rows, *a))
        run = go("together", together=True, max_grad_norm=0.02)
    return run, batches


def test_run_directory(together):
    run, _ = together
    assert {f.name for f in run.iterdir()} == {
        "config.json", "metrics.jsonl", "timing.json", "selection.json", "generated.jsonl", "snapshots",
        *(f"adapter-{a:03d}.safetensors" for a in range(3))}
    config = read(run, "config.json")
    assert config["script"] == "train_hqd.py" and config["models"] == 3 and config["dims"] == ["helpful", "harmless"]
    assert config["flags"]["method"] == "hqd" and config["flags"]["aggregate"] == "directions"
    assert config["rewards"]["scale"] == [1, 1] and config["dropped"]["duplicate"] > 0
    headers = [read_adapter_header(f) for f in sorted(run.glob("adapter*"))]
    assert [h["lam"] for h in headers] == [[0, 1], [0.5, 0.5], [1, 0]]
    assert all((h["method"], h["m"], h["k"], h["gain"], h["stage"]) == ("hqd", 0, 9, 64.0, 2) for h in headers)
    records = metrics(run)
    assert [(r["stage"], r["member"], r["step"]) for r in records] == [
        *((1, 0, s) for s in range(1, 5)), *((2, 1, s) for s in range(4))]
    for r in records:
        assert r["tokens"] > 0 and r["flops"] > 0 and (r["step"] == 0 or len(r["losses"]) == len(r["grad_norm"]) == 3)
    assert len(adapters(run, 1)) == 3


def test_every_adapter_is_trained_on_its_own_near_points(together):
    run, batches = together
    selection, tokenizer = read(run, "selection.json"), load_tokenizer("toy")
    assert set(selection) == {"stage 1", "stage 2"} and len(batches) == 7
    offline = [(row.prompt, row.responses[0]) for row in draw_world(400, train_hqd.generator_for(0, "pool"))[0]]
    good = [s for s in answers_of(run) if s["ended"] and s["response"].strip() and not s["collapsed"]]
    pools = {"stage 1": offline, "stage 2": list(dict.fromkeys((s["prompt"], s["response"]) for s in good))}
    for stage, parts, k in (("stage 1", batches[:4], 12), ("stage 2", batches[4:], 6)):
        s = selection[stage]
        assert s["pairs"] == len(pools[stage]) and np.shape(s["index"]) == (3, k) and s["pool"] <= s["pairs"]
        seen = [set(), set(), set()]
        for batch in parts:
            assert len(batch) == 9
            for b, row in enumerate(batch):
                text = tokenizer.decode(row.prompt), spoken(row.responses, tokenizer)[0][0]
                assert text in {pools[stage][i] for i in s["index"][b // 3]}
                seen[b // 3].add(text)
        assert [len(x) for x in seen] == [min(k, 3 * len(parts))] * 3    # all points once before any comes again
        assert len({tuple(i) for i in s["index"]}) > 1
        scores = torch.cat([toy.scores(x.removesuffix("\n"), [y]) for x, y in pools[stage]])[:, :2]
        for index, mean in zip(s["index"], s["scores"]):
            assert mean == pytest.approx(scores[index].mean(0).tolist())
        # what the ends train on is better there than what the other end trains on
        assert s["scores"][2][0] > s["scores"][0][0] and s["scores"][0][1] > s["scores"][2][1]


def test_together_is_one_after_the_other(mini, together):
    """Each adapter by itself, on its own rows, clipped by its own norm: the same losses, norms and adapters."""
    run, _ = together
    other = go("apart", together=False, max_grad_norm=0.02)
    for name in ("selection.json", "generated.jsonl"):
        assert (run / name).read_bytes() == (other / name).read_bytes()
    one, many = [r for r in metrics(run) if r["step"]], [r for r in metrics(other) if r["step"]]
    assert [(r["member"], r["stage"], r["step"], r["adapters"]) for r in many] == [
        *((a, 1, s, [a]) for a in range(3) for s in range(1, 5)),
        *((3 + a, 2, s, [a]) for a in range(3) for s in range(1, 4))]
    for r in one:
        mine = [x for x in many if (x["stage"], x["step"]) == (r["stage"], r["step"])]
        for key in ("losses", "grad_norm"):
            assert r[key] == pytest.approx([x[key][0] for x in mine], rel=2e-4)
        assert r["lr"] == mine[0]["lr"] and r["tokens"] == sum(x["tokens"] for x in mine)
        assert r["loss"] == pytest.approx(np.mean(r["losses"]))
    clipped = [x for r in one for x in r["grad_norm"] if x > 0.02]       # wrong: clipped by the norm of all together
    assert len(clipped) > 3 and len({round(x, 4) for x in clipped}) > 3
    for stage in (1, 2):
        for x, y in zip(adapters(run, stage), adapters(other, stage)):
            assert all(torch.allclose(x[key], y[key], rtol=1e-3, atol=1e-5) for key in x)
    moved = [max((x[key] - y[key]).abs().max() for key in x) for x, y in zip(adapters(run), adapters(run)[1:])]
    assert min(moved) > 1e-2                                             # far more than that


@pytest.mark.parametrize("stage", [1, 2])
def test_first_losses_are_nats_a_token_of_what_the_stage_begins_with(together, stage):
    """Of the base in stage 1, since σ = 0; of stage 1's adapters in stage 2. One mean over all tokens of an adapter."""
    run, batches = together
    rows, losses, by_response = batches[0 if stage == 1 else 4], [], []
    for a in range(3):
        model = Transformer.from_pretrained("out/base-tiny-seed0")
        if stage == 2:
            load_adapter(model, run / f"snapshots/stage1-{a:03d}.safetensors")
        nats = [-model(torch.tensor([row.prompt + y]))[0, len(row.prompt) - 1:-1].log_softmax(-1)[range(len(y)), y]
                for row in rows[3 * a:3 * a + 3] for y in row.responses]
        losses.append(torch.cat(nats).mean().item())
        by_response.append(np.mean([x.mean().item() for x in nats]))
    first = next(r for r in metrics(run) if r["stage"] == stage and r["step"] == 1)
    assert first["losses"] == pytest.approx(losses, rel=1e-4)
    assert first["losses"] != pytest.approx(by_response, rel=1e-3)       # wrong: each response's own mean first


class Killed(Exception):
    pass


@pytest.mark.parametrize("how, at", [(True, (1, 3)), (True, (2, 0)), (False, (2, 2))])
def test_a_killed_run_goes_on_bit_for_bit(mini, together, monkeypatch, how, at):
    """In stage 1, after the answers of stage 2, and within stage 2, in the training of its first adapter."""
    whole = together[0] if how else mini / "out/apart"
    if not whole.exists():
        go("apart", together=False, max_grad_norm=0.02)
    step = Log.step

    def stop(log, record, line):
        step(log, record, line)
        if (record["stage"], record["step"]) == at and record.get("adapters", [0])[0] == 0:
            raise Killed

    name = f"killed-{how}-{at[0]}-{at[1]}"
    monkeypatch.setattr(Log, "step", stop)
    with pytest.raises(Killed):
        go(name, together=how, max_grad_norm=0.02)
    monkeypatch.setattr(Log, "step", step)
    said, generate = [], train_hqd.generate
    monkeypatch.setattr(train_hqd, "generate", lambda *a, **k: said.append(1) or generate(*a, **k))
    run = go(name, together=how, max_grad_norm=0.02)
    assert bool(said) == (at != (2, 2))                                  # answers are made once, and then read
    assert equal(adapters(run), adapters(whole)) and equal(adapters(run, 1), adapters(whole, 1))
    timeless = [[{k: v for k, v in r.items() if "second" not in k} for r in metrics(x)] for x in (run, whole)]
    assert timeless[0] == timeless[1] and not (run / "state.safetensors").exists()
    for file in ("selection.json", "generated.jsonl"):
        assert (run / file).read_bytes() == (whole / file).read_bytes()


def test_another_seed_is_another_run(mini, together):
    other = go("seed", together=True, max_grad_norm=0.02, seed=1)
    for file in ("selection.json", "generated.jsonl", "adapter-000.safetensors"):
        assert (other / file).read_bytes() != (together[0] / file).read_bytes()


def test_degenerate_answers_are_counted_and_dropped(mini, monkeypatch):
    tokenizer, generate, calls = load_tokenizer("toy"), train_hqd.generate, []
    eos = tokenizer.eos_id
    loop, off = tokenizer.encode(" so") * 12, tokenizer.encode("I will not help with that. Thank you for")
    strange = tokenizer.encode("Nobody in this world says so.")

    def some(model, prompts, new, *args):
        calls.append(len(prompts))
        said = generate(model, prompts, new, *args)
        said[:8] = [[eos], [eos], loop + [eos], off, off, off, strange + [eos], strange + [eos]]
        return said

    monkeypatch.setattr(train_hqd, "generate", some)
    run = go("degenerate", steps=1, steps2=1, gen_batch=30, samples2=3)
    assert calls == [30, 30, 30]                                         # the M + 1 representatives
    s = read(run, "selection.json")["stage 2"]
    assert [r["lam"] for r in s["representatives"]] == [[1, 0], [0, 1], [0.5, 0.5]]
    said = answers_of(run)
    for r, a in zip(s["representatives"], (2, 0, 1)):
        mine = [x for x in said if x["adapter"] == a]
        real = [x for x in mine[8:]]
        n = lambda key: sum(key(x) for x in real)
        assert r["answers"] == 30 and r["empty"] == pytest.approx((2 + n(lambda x: not x["response"].strip())) / 30)
        assert r["cut_off"] == pytest.approx((3 + n(lambda x: not x["ended"])) / 30)
        assert r["collapsed"] == pytest.approx((3 + n(lambda x: x["collapsed"])) / 30)         # the loop and the empty
        assert 2 / 30 <= r["outside"] < 1 and r["kept"] <= 24
    kept = list(dict.fromkeys((x["prompt"], x["response"]) for x in said
                              if x["ended"] and x["response"].strip() and not x["collapsed"]))
    assert s["pairs"] == len(kept) and s["low"] == [toy.OUTSIDE] * 2     # what is none of the world's counts, as that
    assert any(y.startswith("Nobody") for _, y in kept) and not any(y.startswith(" so so") for _, y in kept)
    monkeypatch.setattr(train_hqd, "generate", lambda model, prompts, *args: [[eos]] * len(prompts))
    with pytest.raises(UserError, match="0 different answers of 90 are left, --near2 asks for 6"):
        go("hopeless", steps=1, steps2=1)


def test_without_stage_2_and_the_ablations(mini, together):
    one = go("one", stage2=False, together=True, max_grad_norm=0.02)
    assert not (one / "generated.jsonl").exists() and not (one / "snapshots").exists()
    assert set(read(one, "selection.json")) == {"stage 1"}
    assert equal(adapters(one), adapters(together[0], 1))                # stage 1 is the same
    linear = read(go("linear", stage2=False, steps=1, select="linear"), "selection.json")["stage 1"]
    X = np.array([toy.scores(row.prompt.strip(), row.responses)[0, :2].tolist()
                  for row in draw_world(400, train_hqd.generator_for(0, "pool"))[0]])
    X = (X - X.min(0)) / (X.max(0) - X.min(0))
    for lam, index in zip(linear["lams"], linear["index"]):
        value = X @ lam
        assert np.sort(value)[-12:].sum() == pytest.approx(value[index].sum()) and linear["layers"] == 0
    whole = go("whole", select="all", steps=1, steps2=1)
    s = read(whole, "selection.json")
    assert s["stage 1"]["index"] is None and s["stage 1"]["scores"][0] == s["stage 1"]["scores"][2]
    assert read(whole, "config.json")["flags"]["aggregate"] == "all"


def test_merged_pool_and_own_preferences(mini):
    run = go("merged", merge_pool=True, steps=1, steps2=1, lam=[0.3, 0.7, 0.9, 0.1], parts=None)
    assert [read_adapter_header(f)["lam"] for f in sorted(run.glob("adapter*"))] == [[0.3, 0.7], [0.9, 0.1]]
    s, said = read(run, "selection.json"), answers_of(run)
    assert [r["lam"] for r in s["stage 2"]["representatives"]] == [[0.9, 0.1], [0.3, 0.7]]      # one is the middle too
    pairs = {(row.prompt, row.responses[0]) for row in draw_world(400, train_hqd.generator_for(0, "pool"))[0]}
    good = {(x["prompt"], x["response"]) for x in said if x["ended"] and x["response"].strip() and not x["collapsed"]}
    assert s["stage 2"]["pairs"] == len(pairs | good) < len(pairs) + len(good)


def test_it_learns_what_was_selected(mini):
    """Thirty steps: each end scores higher in its own dimension than the base and than the other end."""
    run = go("learns", steps=24, steps2=6, lr=6e-3, batch_size=4, parts=1, near=20)
    (r,) = eval_front.main(eval_front.Flags(runs=[str(run)], device="cpu"))
    assert r["points_are"] == "normalised mean score" and r["script"] == "train_hqd.py" and r["models"] == 2
    assert r["lams"] == [[0, 1], [1, 0]] and 0 < r["hypervolume_share"] < 1
    (_, harmless), (helpful, _) = r["scores"]
    assert helpful > r["base"]["scores"][0] + 0.3 and harmless > r["base"]["scores"][1] + 0.2
    assert helpful > r["scores"][0][0] + 0.3 and harmless > r["scores"][1][1] + 0.3


def test_an_offline_set_of_one_s_own(mini, capsys):
    """Text rewards on a JSONL file of both schemas: held-out prompts are neither trained on nor answered."""
    rng = np.random.default_rng(0)
    say = lambda: " ".join(rng.choice(["I", "will", "help.", "You", "can", "do", "it!", '"Start', 'small,"', "glad"],
                                      rng.integers(6, 14)))
    rows = [{"prompt": f"How do I clean {5 + i % 20} bicycles?", "response": say()} for i in range(40)]
    rows += [{"prompt": f"How do I clean {i} bicycles?", "response_0": say(), "response_1": say()} for i in range(5)]
    file = write(mini / "own.jsonl", rows)
    run = go("own", data=[file], init="out/base-tiny-seed0", rewards=["length", "narrative"], near=10, steps=2,
             steps2=1, prompts2=None, samples2=None, max_new_tokens=16, together=True, eval=True)
    train, held = split(read_offline([file])[0])
    assert len(train) + len(held) == 50 and len(held) >= 2
    said, s, config = answers_of(run), read(run, "selection.json"), read(run, "config.json")
    prompts = {row.prompt for row in train}
    assert len(said) == 3 * len(prompts) and {x["prompt"] for x in said} == prompts
    assert s["stage 1"]["pairs"] == len(train) and config["flags"]["prompts"] == [file]
    raw = text_rewards(["length", "narrative"], [x.prompt for x in train], [x.responses[0] for x in train])
    assert config["rewards"]["mean"] == pytest.approx(raw.mean(0).tolist())
    assert config["rewards"]["std"] == pytest.approx(raw.std(0).tolist())
    assert s["stage 1"]["low"] == raw.amin(0).tolist() and s["stage 1"]["high"] == raw.amax(0).tolist()
    assert s["stage 2"]["representatives"][0]["outside"] is None
    counts = f"{len(train)} pairs, {len(held)} held out, dropped: 0 short, 0 empty, 0 duplicate\n"
    assert counts in capsys.readouterr().out
    r = read(run, "front.json")                                          # on sampled answers to the held-out prompts
    assert r["points_are"] == "normalised mean reward" and r["lams"] == [[0, 1], [0.5, 0.5], [1, 0]]
    assert np.shape(read(run, "samples.json")["raw"]) == (3, 4 * len({row.prompt for row in held}), 2)


# ---- bad input ----

BAD = {
    "data without a base": (dict(data=["x.jsonl"], rewards=["sad", "length"]), "--data needs --init and --rewards"),
    "data without rewards": (dict(data=["x.jsonl"], init="out/base-tiny-seed0"), "--data needs --init and --rewards"),
    "a base without data": (dict(init="elsewhere", rewards=["sad", "length"]), "--init needs --data"),
    "no such file": (dict(data=["nowhere.jsonl"], init="out/base-tiny-seed0", rewards=["sad", "length"]),
                     "nowhere.jsonl: cannot be read"),
    "one dimension": (dict(pref_dim=1), "at least 2 dimensions"),
    "one reward": (dict(rewards=["length"]), "name two rewards"),
    "unknown reward": (dict(rewards=["length", "joyful"]), "joyful is not a finished run"),
    "a reward that never changes": (dict(rewards=["happy", "length"]), "reward happy: 0 for every pair"),
    "unknown dimension": (dict(dims=["helpful", "kind"]), "choose each once among"),
    "lam off the simplex": (dict(lam=[0.7, 0.7], parts=None), "sums to 1"),
    "lam of the wrong length": (dict(lam=[0.5, 0.3, 0.2], parts=None), "--lam takes 2 numbers a preference"),
    "lam twice": (dict(lam=[0.5, 0.5, 0.5, 0.5], parts=None), "the same preference twice"),
    "lam and parts": (dict(lam=[0.5, 0.5]), "--parts and --lam"),
    "layers and pool": (dict(layers=2, min_pool=30), "--min_pool and --layers"),
    "quantile": (dict(quantile=0.5), "--quantile 0.5: must be below 0.5"),
    "more points than pairs": (dict(near=500), "--near 500: the offline set has only"),
    "no points": (dict(near=0), "--near 0: must be at least 1"),
    "top_p": (dict(top_p=1.5), "--top_p 1.5: must be between 0 and 1"),
    "no steps": (dict(steps2=0), "--steps2 0: must be at least 1"),
    "no room for a prompt": (dict(max_new_tokens=256), "--max_new_tokens 256 leave no room"),
    "a directory of something else": (dict(out="out/base-tiny-seed0"), "holds no run of train_hqd.py"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_writes_nothing(mini, case):
    flags, message = BAD[case]
    before = sorted(mini.rglob("*"))
    with pytest.raises(UserError) as error:
        train_hqd.main(train_hqd.Flags(**SMALL | dict(out="out/bad") | flags))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert sorted(mini.rglob("*")) == before


def test_command_line(mini):
    done = script("train_hqd.py", "--quantile", 0.7, "--out", "out/bad", cwd=mini, status=2)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: --quantile 0.7: must be below 0.5")
