"""test_train_hqd.py - ParetoHqD: what is selected for whom, both stages, degenerate answers, files of one's own."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from running import BASE, go, metrics, read, refused, timeless, write_rows
from safetensors.torch import load_file

import eval_front
import train_hqd
from data import toy
from data.chat import turns
from data.offline import draw_world, read_offline
from data.prompts import split
from data.text_rewards import text_rewards
from data.tokenizers import load_tokenizer, spoken
from model import Transformer
from runs.files import UserError
from runs.randomness import generator_for
from svd_lora import load_adapter, read_adapter_header


def adapters(run, stage=2):
    """What each adapter file holds, in order."""
    return [load_file(f) for f in sorted(run.glob("adapter-*" if stage == 2 else "snapshots/stage1-*"))]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x[key], y[key]) for x, y in zip(a, b) for key in x)


def answers_of(run):
    return [json.loads(line) for line in (run / "generated.jsonl").read_text().splitlines()]


def offline_pairs():
    """The offline set of the small runs."""
    return draw_world(400, generator_for(0, "pool"))[0]


# ---- selection ----

R = torch.tensor([[0.2, 0.2], [0.9, 0.1], [0.8, 0.5], [0.5, 0.8], [0.1, 0.9], [0.6, 0.6]], dtype=torch.float64)
LAMS = torch.tensor([[0.8, 0.2], [0.5, 0.5], [0.2, 0.8]], dtype=torch.float64)


def test_selection_of_known_points(capsys):
    """Six points. (0.2, 0.2) lies on the ray of (½, ½) as (0.6, 0.6) does, and comes first, but it is dominated."""
    pool, dims = train_hqd.Pool([None] * 6, [None] * 6, R), ["a", "b"]
    flags = lambda **more: replace(train_hqd.Flags(near=1), **more)
    near, report = train_hqd.select(pool, LAMS, 1, dims, flags())
    assert near == [[2], [5], [3]] and (report["pool"], report["layers"], report["pairs"]) == (5, 1, 6)
    assert report["low"] == pytest.approx([0.1, 0.1]) and report["high"] == pytest.approx([0.9, 0.9])
    assert report["scores"][0] == pytest.approx([0.8, 0.5]) and report["overlap"] == [0, 0]
    assert report["distance"][1] == pytest.approx(0, abs=1e-12)
    printed = map(str.split, capsys.readouterr().out.splitlines())
    assert ["0.50", "0.50", "1", "0.0000", "0.600", "0.600", "0.00"] in printed
    two, _ = train_hqd.select(pool, LAMS, 1, dims, flags(near=2))       # the pool is three times as large: two layers
    assert sorted(two[1]) == [0, 5]
    assert train_hqd.select(pool, LAMS, 2, dims, flags(near=2))[0] == [[two[0][0]], [0], [two[2][0]]]       # k / 2
    linear, _ = train_hqd.select(pool, LAMS, 1, dims, flags(near=2, select="linear"))
    assert [set(index) for index in linear] == [{1, 2}, {2, 3}, {3, 4}]  # point 5 is no λ's largest sum: concave there
    whole, report = train_hqd.select(pool, LAMS, 1, dims, flags(select="all"))
    assert whole == [list(range(6))] * 3 and report["index"] is None
    with pytest.raises(UserError, match="stage 2, 6 pairs for a b"):
        train_hqd.select(replace(pool, scores=R * 0), LAMS, 2, dims, flags())


def test_representatives():
    lattice = lambda m, parts: train_hqd.simplex_lattice(m, parts)
    assert train_hqd.representatives(lattice(2, 10)) == [10, 0, 5]
    middle = train_hqd.representatives(lattice(3, 4))
    assert [lattice(3, 4)[i].tolist() for i in middle[:3]] == [[1, 0, 0], [0, 1, 0], [0, 0, 1]] and len(middle) == 4
    assert sorted(lattice(3, 4)[middle[3]].tolist()) == [0.25, 0.25, 0.5]             # the exact centre is not in it
    assert train_hqd.representatives(torch.tensor([[0.3, 0.7]])) == [0]               # one stands for all


# ---- a run ----

def test_run_directory(hqd_run):
    run, _ = hqd_run
    assert {f.name for f in run.iterdir()} >= {
        "config.json", "metrics.jsonl", "timing.json", "selection.json", "generated.jsonl", "snapshots",
        *(f"adapter-{g:03d}.safetensors" for g in range(3))}
    assert not (run / "state.safetensors").exists() and len(adapters(run, 1)) == 3
    config = read(run, "config.json")
    assert config["script"] == "train_hqd.py" and config["models"] == 3 and config["dims"] == ["helpful", "harmless"]
    assert (config["method"], config["label"], config["objective"]["name"]) == ("hqd", "ParetoHqD", "scores")
    assert config["rewards"]["scale"] == [1, 1] and config["dropped"]["duplicate"] > 0 and config["prompts"] is None
    headers = [read_adapter_header(f) for f in sorted(run.glob("adapter*"))]
    assert [h["lam"] for h in headers] == [[0, 1], [0.5, 0.5], [1, 0]]
    assert all((h["method"], h["m"], h["k"], h["gain"], h["stage"]) == ("hqd", 0, 9, 64.0, 2) for h in headers)
    records = metrics(run)
    # every adapter after the other; between the stages, as step 0, the answers
    assert [(r["stage"], r["member"], r["step"]) for r in records] == [
        *((1, g, s) for g in range(3) for s in range(1, 5)), (2, 3, 0), *((2, 3 + g, s) for g in range(3)
                                                                          for s in range(1, 4))]
    assert all(r["tokens"] > 0 and r["flops"] > 0 for r in records)
    assert all(r["adapter"] == r["member"] % 3 for r in records if r["step"])


def test_every_adapter_is_trained_on_its_own_near_points(hqd_run):
    run, batches = hqd_run
    selection, tokenizer = read(run, "selection.json"), load_tokenizer("toy")
    assert set(selection) == {"stage 1", "stage 2"} and len(batches) == 3 * 4 + 3 * 3
    offline = [(row.prompt, row.responses[0]) for row in offline_pairs()]
    good = [s for s in answers_of(run) if s["ended"] and s["response"].strip() and not s["collapsed"]]
    pools = {"stage 1": offline, "stage 2": list(dict.fromkeys((s["prompt"], s["response"]) for s in good))}
    for stage, parts, steps, k in (("stage 1", batches[:12], 4, 12), ("stage 2", batches[12:], 3, 6)):
        s = selection[stage]
        assert s["pairs"] == len(pools[stage]) and np.shape(s["index"]) == (3, k) and s["pool"] <= s["pairs"]
        orders = []
        for g in range(3):
            mine, seen = [pools[stage][i] for i in s["index"][g]], []
            for batch in parts[g * steps:(g + 1) * steps]:
                assert len(batch) == 3
                seen += [(tokenizer.decode(row.prompt), spoken(row.responses, tokenizer)[0][0]) for row in batch]
            orders.append([mine.index(pair) for pair in seen])
            # all points once before any comes again, but in a batch that belongs to two epochs
            assert len(set(seen)) >= min(k, 3 * steps) - 2
        assert len({tuple(order) for order in orders}) == 3            # each adapter in an order of its own
        assert len({tuple(i) for i in s["index"]}) > 1
        scores = torch.cat([toy.scores(x.removesuffix("\n"), [y]) for x, y in pools[stage]])[:, :2]
        for index, mean in zip(s["index"], s["scores"]):
            assert mean == pytest.approx(scores[index].mean(0).tolist())
        # what the ends train on is better there than what the other end trains on
        assert s["scores"][2][0] > s["scores"][0][0] and s["scores"][0][1] > s["scores"][2][1]


@pytest.mark.parametrize("stage", [1, 2])
def test_first_losses_are_nats_a_token_of_what_the_stage_begins_with(hqd_run, stage):
    """Of the base in stage 1, since σ = 0; of stage 1's adapters in stage 2. One mean over all tokens of a batch."""
    run, batches = hqd_run
    first = [r["loss"] for r in metrics(run) if r["stage"] == stage and r["step"] == 1]
    losses, by_response = [], []
    for g in range(3):
        model = Transformer.from_pretrained(BASE)
        if stage == 2:
            load_adapter(model, run / f"snapshots/stage1-{g:03d}.safetensors")
        nats = [-model(torch.tensor([row.prompt + y]))[0, len(row.prompt) - 1:-1].log_softmax(-1)[range(len(y)), y]
                for row in batches[4 * g if stage == 1 else 12 + 3 * g] for y in row.responses]
        losses.append(torch.cat(nats).mean().item())
        by_response.append(np.mean([x.mean().item() for x in nats]))
    assert first == pytest.approx(losses, rel=1e-4)
    if stage == 2:                                       # wrong: each response's own mean first
        assert first != pytest.approx(by_response, rel=1e-3)


def test_gradients_are_clipped():
    """By its own norm, per adapter: where nothing is clipped the run is another one."""
    records = metrics(go("train_hqd", "clipped", stage2=False, max_grad_norm=0.02))
    assert sum(r["grad_norm"] > 0.02 for r in records) > 3             # logged as it was before
    p = torch.nn.Parameter(torch.zeros(3))
    q = torch.nn.Parameter(torch.zeros(2, 2))
    p.grad, q.grad = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([[0.0, 4.0], [0.0, 0.0]])
    assert train_hqd.clip([p, q], 1.0).item() == pytest.approx(5)
    assert p.grad[0].item() == pytest.approx(0.6) and q.grad[0, 1].item() == pytest.approx(0.8)
    assert train_hqd.clip([p, q], 2.0).item() == pytest.approx(1) and p.grad[0].item() == pytest.approx(0.6)


def test_another_seed_is_another_run(hqd_run):
    again, other = go("train_hqd", "hqd-again"), go("train_hqd", "hqd-seed", seed=1)
    for file in ("selection.json", "generated.jsonl", "adapter-000.safetensors"):
        assert (other / file).read_bytes() != (hqd_run[0] / file).read_bytes() == (again / file).read_bytes()
    assert timeless(again) == timeless(hqd_run[0])


def test_degenerate_answers_are_counted_and_dropped(monkeypatch):
    tokenizer, generate, calls = load_tokenizer("toy"), train_hqd.generate_all, []
    eos = tokenizer.eos_id
    loop, off = tokenizer.encode(" so") * 12, tokenizer.encode("I will not help with that. Thank you for")
    strange = tokenizer.encode("Nobody in this world says so.")

    def some(model, prompts, *args, **more):
        calls.append(len(prompts))
        said = generate(model, prompts, *args, **more)
        said[:8] = [[eos], [eos], loop + [eos], off, off, off, strange + [eos], strange + [eos]]
        return said

    monkeypatch.setattr(train_hqd, "generate_all", some)
    monkeypatch.setattr(train_hqd, "GEN_BATCH", 20)
    run = go("train_hqd", "degenerate", steps=1, steps2=1)
    assert calls == [20, 10] * 3                                       # m + 1 representatives, 10 prompts three times
    s = read(run, "selection.json")["stage 2"]
    assert [r["lam"] for r in s["representatives"]] == [[1, 0], [0, 1], [0.5, 0.5]]
    said = answers_of(run)
    for r, g in zip(s["representatives"], (2, 0, 1)):
        mine = [x for x in said if x["adapter"] == g]
        real = mine[8:20] + mine[28:]
        n = lambda key: sum(map(key, real))
        assert r["answers"] == 30 and r["empty"] == pytest.approx((4 + n(lambda x: not x["response"].strip())) / 30)
        assert r["cut_off"] == pytest.approx((6 + n(lambda x: not x["ended"])) / 30)
        assert r["collapsed"] == pytest.approx((6 + n(lambda x: x["collapsed"])) / 30)           # loops, empty ones
        assert 4 / 30 <= r["outside"] < 1 and r["kept"] <= 18
    kept = list(dict.fromkeys((x["prompt"], x["response"]) for x in said
                              if x["ended"] and x["response"].strip() and not x["collapsed"]))
    assert s["pairs"] == len(kept) and s["low"] == [toy.OUTSIDE] * 2   # what is none of the world's counts, as that
    assert any(y.startswith("Nobody") for _, y in kept) and not any(y.startswith(" so so") for _, y in kept)
    monkeypatch.setattr(train_hqd, "generate_all", lambda model, prompts, *args, **more: [[eos]] * len(prompts))
    with pytest.raises(UserError, match="0 different answers of 90 are left, and half of --near 12 are wanted"):
        go("train_hqd", "hopeless", steps=1, steps2=1)


def test_without_stage_2_and_the_ablations(hqd_run):
    one = go("train_hqd", "one-stage", stage2=False)
    assert not (one / "generated.jsonl").exists() and not (one / "snapshots").exists()
    assert set(read(one, "selection.json")) == {"stage 1"}
    assert equal(adapters(one), adapters(hqd_run[0], 1))               # stage 1 is the same
    run = go("train_hqd", "hqd-linear", stage2=False, steps=1, select="linear")
    linear = read(run, "selection.json")["stage 1"]
    X = np.array([toy.scores(row.prompt.strip(), row.responses)[0, :2].tolist() for row in offline_pairs()])
    X = (X - X.min(0)) / (X.max(0) - X.min(0))
    for lam, index in zip(linear["lams"], linear["index"]):
        value = X @ lam
        assert np.sort(value)[-12:].sum() == pytest.approx(value[index].sum()) and linear["layers"] == 0
    assert read(run, "config.json")["label"] == "HqD, linear"
    whole = read(go("train_hqd", "hqd-all", select="all", steps=1, steps2=1), "selection.json")["stage 1"]
    assert whole["index"] is None and whole["scores"][0] == whole["scores"][2]


def test_preferences_of_one_s_own():
    run = go("train_hqd", "hqd-lam", steps=1, steps2=1, lam=[0.3, 0.7, 0.9, 0.1], parts=None)
    assert [read_adapter_header(f)["lam"] for f in sorted(run.glob("adapter*"))] == [[0.3, 0.7], [0.9, 0.1]]
    representatives = read(run, "selection.json")["stage 2"]["representatives"]
    assert [r["lam"] for r in representatives] == [[0.9, 0.1], [0.3, 0.7]]            # one is the middle too


def test_it_learns_what_was_selected():
    """Thirty steps: each end scores higher in its own dimension than the base and than the other end."""
    run = go("train_hqd", "hqd-learns", steps=24, steps2=6, lr=6e-3, batch_size=4, parts=1, near=20,
             dims=["formal", "encouraging"])
    (r,) = eval_front.main(eval_front.Flags(runs=[str(run)], device="cpu"))
    assert r["points_are"] == "normalised mean score" and r["method"] == "hqd" and r["models"] == 2
    assert r["lams"] == [[0, 1], [1, 0]] and 0 <= r["hypervolume_share"] < 1 and r["regret"] < 0.9
    (_, encouraging), (formal, _) = r["scores"]
    assert formal > r["base"]["scores"][0] + 0.3 and encouraging > r["base"]["scores"][1] + 0.3
    assert formal > r["scores"][0][0] + 0.3 and encouraging > r["scores"][1][1] + 0.3


def test_an_offline_set_of_one_s_own(work, capsys):
    """Text rewards on a JSONL file of both schemas: held-out prompts are neither trained on nor answered."""
    rng = np.random.default_rng(0)
    say = lambda: " ".join(rng.choice(["I", "will", "help.", "You", "can", "do", "it!", '"Start', 'small,"', "glad"],
                                      rng.integers(6, 14)))
    rows = [{"prompt": f"How do I clean {5 + i % 20} bicycles?", "response": say()} for i in range(40)]
    rows += [{"prompt": f"How do I clean {i} bicycles?", "response_0": say(), "response_1": say()} for i in range(5)]
    file = write_rows(work / "own.jsonl", rows)
    run = go("train_hqd", "hqd-own", data=[file], init=BASE, rewards=["length", "narrative"], near=10, steps=2,
             steps2=1, samples2=None, max_new_tokens=16, eval=True)
    train, held = split(read_offline([file])[0])
    assert len(train) + len(held) == 50 and len(held) >= 2
    said, s, config = answers_of(run), read(run, "selection.json"), read(run, "config.json")
    prompts = {row.prompt for row in train}
    assert {turns(x["prompt"]) for x in said} <= prompts and len(said) == 3 * min(10, len(prompts))     # MOST_PROMPTS
    assert s["stage 1"]["pairs"] == len(train) and config["prompts"] == [file]
    raw = text_rewards(["length", "narrative"], [x.prompt for x in train], [x.responses[0] for x in train])
    assert config["rewards"]["mean"] == pytest.approx(raw.mean(0).tolist())
    assert config["rewards"]["std"] == pytest.approx(raw.std(0).tolist())
    assert s["stage 1"]["low"] == raw.amin(0).tolist() and s["stage 1"]["high"] == raw.amax(0).tolist()
    assert s["stage 2"]["representatives"][0]["outside"] is None
    counts = f"{len(train)} pairs, {len(held)} held out, dropped: 0 short, 0 duplicate\n"
    assert counts in capsys.readouterr().out
    r = read(run, "front.json")                                        # on sampled answers to the held-out prompts
    assert r["points_are"] == "normalised mean reward" and r["lams"] == [[0, 1], [0.5, 0.5], [1, 0]]
    assert np.shape(read(run, "samples.json")["raw"]) == (3, 4 * len({row.prompt for row in held}), 2)


# ---- bad input ----

BAD = {
    "data without a base": (dict(data=["x.jsonl"], rewards=["happy", "length"]), "--data needs --init and --rewards"),
    "data without rewards": (dict(data=["x.jsonl"], init=BASE), "--data needs --init and --rewards"),
    "a base without data": (dict(init="elsewhere", rewards=["happy", "length"]), "--init needs --data"),
    "no such file": (dict(data=["nowhere.jsonl"], init=BASE, rewards=["happy", "length"]),
                     "nowhere.jsonl: cannot be read"),
    "one dimension": (dict(pref_dim=1), "at least 2 dimensions"),
    "one reward": (dict(rewards=["length"]), "name two rewards"),
    "unknown reward": (dict(rewards=["length", "joyful"]), "joyful is not a finished run"),
    "a reward that never changes": (dict(rewards=["happy", "length"]), "reward happy: 0 for every response"),
    "unknown dimension": (dict(dims=["helpful", "kind"]), "choose each once among"),
    "lam off the simplex": (dict(lam=[0.7, 0.7], parts=None), "sums to 1"),
    "lam of the wrong length": (dict(lam=[0.5, 0.3, 0.2], parts=None), "--lam takes 2 numbers per preference"),
    "lam twice": (dict(lam=[0.5, 0.5, 0.5, 0.5], parts=None), "the same preference twice"),
    "lam and parts": (dict(lam=[0.5, 0.5]), "--parts and --lam"),
    "more points than pairs": (dict(near=500), "--near 500: the offline set has only"),
    "no points": (dict(near=0), "--near 0: must be at least 1"),
    "no steps": (dict(steps2=0), "--steps2 0: must be at least 1"),
    "no room for a prompt": (dict(max_new_tokens=256), "--max_new_tokens 256 leave no room"),
    "a directory of something else": (dict(out=BASE), "holds no run of train_hqd.py"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_writes_nothing(monkeypatch, capsys, case):
    refused("train_hqd", *BAD[case], monkeypatch, capsys)
