"""test_eval_front.py - runs of every kind, trained for real and evaluated: files, tables, exactness, comparisons."""
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from running import BASE, go, metrics, read, write_rows
from safetensors.torch import load_file, save_file

import eval_front
from data import toy
from data.rewards import world_rewards
from data.tokenizers import TokenRow, load_tokenizer
from data.trees import batch_logprobs, pack
from fronts import measure
from fronts.objective import OBJECTIVES, measured_on
from fronts.optimum import sft_losses, with_outside
from fronts.stationarity import min_norm
from model import Transformer
from runs.files import UserError, write_json
from svd_lora import load_adapter, merged_state_dict, read_adapter_header, set_preference


def evaluate(*runs, **flags):
    """eval_front.main on these runs, on the CPU."""
    return eval_front.main(eval_front.Flags(runs=[str(run) for run in runs], device="cpu", **flags))


def test_several_runs_of_dpo(work, panacea, soups, pictures, capsys):
    evaluate(panacea, soups, parts=2, out="out/both")
    printed = capsys.readouterr().out
    assert "HV share" in printed and "panacea" in printed and "soups" in printed
    for run in (panacea, soups):
        r = read(run, "front.json")
        keys = ("dims lams J scores regret regret_worst worst_lam splits split hypervolume hypervolume_share "
                "hypervolume_share_at_lams inner_product sparsity spacing reference_point outside_mass exact").split()
        assert set(keys) <= set(r) and r["lams"] == [[0, 1], [0.5, 0.5], [1, 0]]
        assert np.shape(r["J"]) == np.shape(r["scores"]) == (3, 2) and len(r["outside_mass"]) == 3
        at = r["exact"]["at_lams"]
        assert 0 < r["hypervolume_share"] < at["hypervolume_share"] < 1 and 0.5 < r["regret"] < 1.1   # few steps
        assert r["hypervolume_share_at_lams"] == pytest.approx(r["hypervolume_share"] / at["hypervolume_share"])
        assert np.shape(at["J"]) == np.shape(at["points"]) == np.shape(at["scores"]) == (3, 2) and at["z"] == [0, 0]
        gone = {"objective_share", "hypervolume_share_all", "J_all", "kl_all"}
        assert not gone & set(r) and "logps" not in r["base"] and "logps" not in r["exact"]
        assert r["exact"]["residual"] < 1e-8 and len(r["exact"]["lams"]) == 101
        assert abs(r["base"]["J"][0] + math.log(2)) < 1e-9             # π = π_ref
        assert (run / "front.png").stat().st_size > 10_000
    assert len(read("out/both/front.json")) == 2 and (work / "out/both/front.png").exists()


def test_every_split_is_measured_and_the_last_is_the_headline(work, panacea, monkeypatch, capsys):
    (r,) = evaluate(panacea, parts=2)
    printed = capsys.readouterr().out
    assert "new_verbs" in printed and "seen" in printed and "worst" in printed
    assert list(r["splits"]) == ["seen", "new_verbs"] and r["split"] == "new_verbs"
    for split, part in r["splits"].items():
        assert set(part) == {"regret", "regret_worst", "worst_lam", "J", "outside_mass"}
        assert np.shape(part["J"]) == (3, 2) and part["worst_lam"] in r["lams"]
        assert part["regret"] <= part["regret_worst"]
    for key, value in r["splits"]["new_verbs"].items():
        assert r[key] == value and r["splits"]["seen"][key] != value or key == "worst_lam"      # wrong: the other split
    # the regret again, from what front.json holds
    lams, base, J, best = (np.array(x) for x in (r["lams"], r["base"]["J"], r["J"], r["exact"]["at_lams"]["J"]))
    gain, possible = ((x - base) * lams for x in (J, best))
    assert r["regret"] == pytest.approx(1 - gain.sum() / possible.sum(), rel=1e-6)
    # the run's J on a split, by a World of it
    world = measure.World(r["dims"], load_tokenizer("toy"), "cpu", OBJECTIVES["dpo"].J, split="seen")
    model = Transformer.from_pretrained(BASE)
    world.reference(model)
    load_adapter(model, panacea / "adapter.safetensors")
    set_preference(model, torch.tensor([0.5, 0.5]))
    assert r["splits"]["seen"]["J"][1] == pytest.approx(world.measure(model, r["objective"]["beta"])["J"], rel=1e-6)


def test_validation_is_written_beside_the_results(panacea):
    evaluate(panacea, parts=1)
    before = (panacea / "front.json").read_bytes()
    (r,) = evaluate(panacea, parts=1, validation=True)
    assert r["split"] == "validation" and list(r["splits"]) == ["validation"]
    assert read(panacea, "validation/front.json")["J"] == r["J"] != json.loads(before)["J"]
    assert (panacea / "front.json").read_bytes() == before and (panacea / "validation/front.png").exists()


def test_a_short_training_follows_the_preference():
    """Sixty steps of DPO: what each dimension reaches rises with its weight, and the ends gain on the base."""
    run = go("train_dpo", "follows", dims=["helpful", "harmless"], steps=60, rows=160, responses=8, batch_size=8,
             lams_per_step=8, lr=6e-3, snapshots=0)
    (r,) = evaluate(run)
    J = np.array(r["splits"]["seen"]["J"])                                 # new verbs need more training
    assert min(r["spearman"]) > 0.95 and J[-1, 0] > J[0, 0] + 0.05 and J[0, 1] > J[-1, 1] + 0.05
    assert (J.max(0) > -math.log(2) + 0.02).all() and r["splits"]["seen"]["regret"] < 0.5
    for lam, point, best in zip(r["lams"], r["J"], r["exact"]["at_lams"]["J"]):     # none is above the optimum
        assert np.dot(lam, point) < np.dot(lam, best)


def test_ipo_is_evaluated_against_its_own_front(panacea):
    run = go("train_dpo", "ipo-eval", loss="ipo", steps=4)
    (r,) = evaluate(run, parts=2)
    assert r["objective"]["name"] == "ipo" and r["base"]["J"] == pytest.approx([-0.25] * 2, abs=1e-6)
    assert 0 < r["hypervolume_share"] < 1 and 0 < r["regret"] < 1.1
    assert max(max(point) for point in r["exact"]["J"]) > -0.25
    evaluate(run, panacea, parts=2, out="out/ipo-dpo")                 # another objective: another space
    assert not read("out/ipo-dpo/compare.json")["runs"][0]["label"] == "Panacea, DPO"


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_preference_objectives_against_plain_loops(loss):
    """World.measure on one policy: J by a loop over pairs, scores by a loop over responses, in float64."""
    dims, (X, S), beta = ["helpful", "concise"], (4, 8), 0.7
    world = measure.World(dims, load_tokenizer("toy"), "cpu", OBJECTIVES[loss].J)
    g = torch.Generator().manual_seed(7)
    logps = torch.randn(X, S, generator=g, dtype=torch.float64).log_softmax(-1) - 0.1             # 9.5 % outside
    world.ref = with_outside(torch.randn(X, S, generator=g, dtype=torch.float64).log_softmax(-1) - 0.05)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "world_logprobs", lambda model, batches: logps)
        got = world.measure(None, beta)
    J, scores = np.zeros(2), np.zeros(2)
    for x, prompt in enumerate(toy.prompts("new_verbs")):
        r = toy.scores(prompt, toy.responses(prompt))[:, [0, 2]]
        for a in range(S):
            for b in range(a):
                gap = (logps[x, a] - world.ref[x, a] - logps[x, b] + world.ref[x, b]).item()
                lost = lambda h: math.log1p(math.exp(-beta * h)) if loss == "dpo" else (h - 1 / (2 * beta)) ** 2
                p = torch.sigmoid(r[a] - r[b]).numpy()
                J -= (p * lost(gap) + (1 - p) * lost(-gap)) / (X * S * (S - 1) / 2)
        scores += ((logps[x].exp()[:, None] * r).sum(0) - 6 * (1 - math.exp(-0.1))).numpy() / X
    assert np.allclose(got["J"], J, rtol=1e-9) and np.allclose(got["scores"], scores, rtol=1e-9)
    assert abs(got["outside_mass"] - (1 - math.exp(-0.1))) < 1e-9
    inside = (logps.exp() * (logps - world.ref[:, :-1])).sum(1).mean().item()
    outside, of_base = 1 - math.exp(-0.1), 1 - math.exp(-0.05)
    assert abs(got["kl"] - (inside + outside * math.log(outside / of_base))) < 1e-9


def test_a_soup_at_a_vertex_is_its_member_and_averages_between(soups):
    config, ends = read(soups, "config.json"), []
    for dim in config["dims"]:
        model = Transformer.from_pretrained(BASE)
        load_adapter(model, soups / f"adapter-{dim}.safetensors")
        ends.append(merged_state_dict(model))
    name = "blocks.1.mlp.up.weight"
    assert (ends[0][name] - ends[1][name]).abs().max() > 1e-6
    model = Transformer.from_pretrained(BASE)
    W0 = model.state_dict()[name].clone()
    for factor in (1.0, 1.5):
        policies = measure.policies(soups, config, model, torch.tensor([[1.0, 0.0], [0.25, 0.75]]), factor=factor)
        for lam, soup in policies:
            expected = W0 + factor * (lam[0] * (ends[0][name] - W0) + lam[1] * (ends[1][name] - W0))
            assert torch.allclose(merged_state_dict(soup)[name], expected, atol=1e-7)
            assert not torch.allclose(expected, W0 + (2.5 - factor) * (expected - W0) / factor, atol=1e-7)


@torch.no_grad()
def test_mod_is_the_token_by_token_mixture():
    """Against the definition: full forwards of the base and of the merged specialists, every response by itself."""
    with torch.enable_grad():
        soups = go("train_dpo", "mod", method="rs", steps=12, lr=5e-2)
    config, tokenizer, x = read(soups, "config.json"), load_tokenizer("toy"), toy.prompts("new_verbs")[1]
    models = [Transformer.from_pretrained(BASE) for _ in range(3)]
    for dim, model in zip(config["dims"], models[1:]):
        adapted = Transformer.from_pretrained(BASE)
        load_adapter(adapted, soups / f"adapter-{dim}.safetensors")
        model.load_state_dict(merged_state_dict(adapted))
    prompt, lam = tokenizer.encode(x + "\n"), torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    batches = measure.world_batches([x], tokenizer, "cpu")
    for factor in (1.0, 2.0):
        base = Transformer.from_pretrained(BASE)
        for w, policy in measure.policies(soups, config, base, lam, mix="logprobs", factor=factor):
            got = measure.world_logprobs(policy, batches)[0]
            expected, wrong = torch.zeros(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
            for s, text in enumerate(toy.responses(x)):
                y = tokenizer.encode(text) + [tokenizer.eos_id]
                ref, a, b = (model(torch.tensor([prompt + y]))[0, len(prompt) - 1:-1].log_softmax(-1).double()
                             for model in models)
                shift = w[0] * (a - ref) + w[1] * (b - ref)
                expected[s] = (ref + factor * shift).log_softmax(-1)[torch.arange(len(y)), y].sum()
                wrong[s] = (ref + factor * shift)[torch.arange(len(y)), y].sum()      # without the tokens' normalisers
            moved = (expected - measure.world_logprobs(models[0], batches)[0]).abs().max()
            assert (got - expected).abs().max() < 1e-3 * moved and moved > 0.1
            assert w[0] == factor == 1 or (wrong - expected).abs().max() > 0.01 * moved


def test_mixtures_are_evaluated_beside_the_run(ppo_run, capsys):
    """front.json of the soups stays; samples are drawn from the mixture itself; what is no soup is refused."""
    run = go("train_ppo", "mixed", method="rs", steps=4, lr=8e-3)
    (soup,) = evaluate(run, parts=2)
    before, labels = (run / "front.json").read_bytes(), {}
    for folder, flags in {"mod": dict(mix="logprobs"), "mod-1.5": dict(mix="logprobs", factor=1.5),
                          "weights-1.5": dict(factor=1.5)}.items():
        (r,) = evaluate(run, parts=2, **flags)
        assert read(run, folder, "front.json") == json.loads(json.dumps(r))
        assert str(run / folder / "front.png") in capsys.readouterr().out and (run / folder / "front.png").exists()
        assert r["method"] == "rs" and r["lams"] == soup["lams"] and 0 < r["regret"] < 1.5
        assert np.shape(read(run, folder, "samples.json")["raw"]) == (3, 16, 2)
        labels[folder] = r["label"]
        ends = np.allclose(np.array(r["J"])[[0, -1]], np.array(soup["J"])[[0, -1]], atol=1e-5)
        assert ends == (folder == "mod")                               # there both are a specialist alone
        assert not np.allclose(r["J"][1], soup["J"][1], atol=1e-7)
    assert labels == {"mod": "MOD", "mod-1.5": "MOD, factor 1.5", "weights-1.5": "Rewarded soups, factor 1.5"}
    assert (run / "front.json").read_bytes() == before
    for other, flags in ((ppo_run[0], dict(mix="logprobs")), (ppo_run[0], dict(factor=2.0)),
                         (run, dict(mix="logprobs", stationarity=True))):
        with pytest.raises(UserError, match="are ways to evaluate a run of --method rs"):
            evaluate(other, **flags)
    with pytest.raises(UserError, match="--factor 0: must be positive"):
        evaluate(run, factor=0)


def test_sft_is_evaluated_by_the_exact_expectation(sft_run):
    r = read(sft_run, "front.json")
    assert r["points_are"] == "normalised J" and r["exact"]["residual"] == 0 and len(r["exact"]["lams"]) == 101
    # the base's J by a loop over prompts and responses
    model, tokenizer, J = Transformer.from_pretrained(BASE), load_tokenizer("toy"), np.zeros(2)
    for x in toy.prompts("new_verbs"):
        ids = [tokenizer.encode(y) + [tokenizer.eos_id] for y in toy.responses(x)]
        with torch.no_grad():
            logps = batch_logprobs(model, pack([TokenRow(tokenizer.encode(x + "\n"), ids)])).double()
        J += (toy.demonstrator_probs(x, r["dims"]) * logps[:, None]).sum(0).numpy() / len(toy.prompts("new_verbs"))
    assert np.allclose(r["base"]["J"], J, rtol=1e-5)
    assert 0 < r["regret"] < 1.1 and r["hypervolume_share"] < 1        # a few steps
    # the optimum is the mixture of the writers
    E = r["exact"]
    demos = torch.stack([toy.demonstrator_probs(x, r["dims"]) for x in toy.prompts("new_verbs")])
    mixture = demos @ torch.tensor(E["lams"][30], dtype=torch.float64)
    assert np.allclose(E["J"][30], -sft_losses(mixture.log(), demos), rtol=1e-9)


def test_rlhf_on_the_world(work, ppo_run, pictures):
    runs = [ppo_run[0], go("train_ppo", "eval-rs", method="rs", steps=4),
            go("train_ppo", "eval-pama", aggregate="pama")]
    results = evaluate(*runs, parts=2, out="out/all")
    for run, result in zip(runs, results):
        r = read(run, "front.json")
        assert r["J"] == result["J"] and np.shape(r["J"]) == np.shape(r["scores_se"]) == (3, 2)
        assert r["lams"] == [[0, 1], [0.5, 0.5], [1, 0]]                # PAMA has one answer to all of them
        assert 0 <= r["hypervolume_share"] <= 1 and r["points_are"] == "normalised J"
        assert r["objective"]["name"] == "rlhf" and r["objective"]["beta"] == 0.2 and r["eval_labels"] is None
        for key in ("kl", "outside_mass", "length", "ended", "collapsed"):
            assert len(r[key]) == 3 and np.isfinite(r[key]).all()
        assert r["base"]["kl"] == 0 and 0 < r["base"]["outside_mass"] < 0.3 and "texts" not in r["base"]
        assert min(r["outside_mass"]) > 0 and max(r["outside_mass"]) < 1
        assert len(r["exact"]["lams"]) == 101 and "logps" not in r["exact"] and "samples" not in r
        for lam, J, best in zip(r["lams"], r["J"], r["exact"]["at_lams"]["J"]):       # none is above the optimum
            assert np.dot(lam, J) < np.dot(lam, best)
        samples = read(run, "samples.json")
        assert np.shape(samples["raw"]) == (3, 16, 2) and np.shape(samples["texts"])[0] == 3
        assert np.shape(samples["base"]["raw"]) == (16, 2)
        for picture in ("front.png", "histograms.png"):
            assert (run / picture).stat().st_size > 10_000
    assert [r["method"] for r in results] == ["panacea", "rs", "pama"] and 0 < results[2]["regret"]
    assert results[2]["J"] == results[2]["J"][:1] * 3 and results[0]["J"][0] != results[0]["J"][2]
    assert len(read("out/all/front.json")) == 3 and (work / "out/all/front.png").exists()


def test_evolution(panacea, ppo_run):
    for run in (panacea, ppo_run[0]):
        results = evaluate(run, parts=1, evolution=True)
        stored = read(run, "evolution.json")
        assert stored["steps"] == [2, 4] and len(results) == 2 and results[0]["J"] != results[1]["J"]
        assert (run / "evolution.png").exists()


def test_stationarity_of_runs(ppo_run):
    soups = go("train_ppo", "ppo-soups", method="rs", steps=2)
    results = evaluate(ppo_run[0], soups, stationarity=True)
    model, config = Transformer.from_pretrained(BASE), read(ppo_run[0], "config.json")
    (world,), _ = measured_on(config, model, load_tokenizer("toy"), torch.device("cpu"))
    norm, c, single = min_norm(world, model, 0.2)
    for run, result in zip((ppo_run[0], soups), results):
        assert read(run, "stationarity.json") == json.loads(json.dumps(result))
        assert len(result["before"]) == 1 and len(result["after"]) == 3               # a model, or soup, for each λ
        assert result["before"][0][0] == pytest.approx(norm, rel=1e-5) and 0 < norm <= min(single)
        assert all(0 < after[0] != norm and sum(after[1]) == pytest.approx(1) for after in result["after"])
    assert len({after[0] for after in results[0]["after"]}) == 3


def test_more_dimensions(panacea):
    """Four by SFT, at the whole grid; all of them by DPO and by PPO, at their vertices."""
    (r,) = evaluate(go("train_sft", "four", pref_dim=4, steps=2))
    assert len(r["lams"]) == 117 and len(r["exact"]["lams"]) == 117 and 0 < r["regret"] < 1.1
    assert r["hypervolume_share"] is r["exact"]["at_lams"]["hypervolume_share"] is None and len(r["spearman"]) == 4
    assert 0 < r["hypervolume_share_at_lams"] < 1
    m = len(toy.DIMS)
    for script in ("train_dpo", "train_ppo"):
        run = go(script, f"{script}-all", pref_dim=m, steps=2)
        assert np.shape(metrics(run)[0]["lam"])[1] == m
        (r,) = evaluate(run, parts=1)
        assert np.shape(r["J"]) == (m, m) and len(r["exact"]["lams"]) == 101 + 4 * m and r["dims"] == list(toy.DIMS)
        assert r["hypervolume_share"] is None and r["regret"] < 1.2 and (run / "front.png").exists()


# ---- runs of every kind in one space ----

def test_comparison_of_runs_of_different_objectives(work, panacea, sft_run, hqd_run, pictures):
    results = evaluate(sft_run, panacea, hqd_run[0], parts=2, out="out/three")
    c = read("out/three/compare.json")
    assert (work / "out/three/compare.png").exists()
    assert [r["label"] for r in c["runs"]] == ["Panacea, SFT", "Panacea, DPO", "ParetoHqD, scores"]
    limits, lams = np.array([limit["points"] for limit in c["limits"]]), np.array(c["limit_lams"])     # (budgets, F, 2)
    reach = (limits * (np.array(c["ideal"]) - c["nadir"]) * lams).sum(-1)             # λ · scores, but for a constant
    assert (np.diff(reach, axis=0) > -1e-6).all() and (np.diff(reach[:3], axis=0) > 1e-6).all()    # more KL, more score
    assert np.allclose(limits[-2].max(0), 1) and np.allclose(limits[-2].min(0), 0)    # 2 nats set the scale
    for run, r in zip(c["runs"], results):
        assert np.allclose(np.array(run["points"]) * (np.array(c["ideal"]) - c["nadir"]) + c["nadir"], r["scores"])
        assert run["gain_share"] <= 1 and 0 <= run["hypervolume_share"] < 1 and run["kl"] == r["kl"]


def changed(run, copy, file, refused, **values):
    """Asserts that a copy of a run, with other values in one of its files, is refused before anything is written."""
    shutil.copytree(run, copy, dirs_exist_ok=True)
    write_json(copy / file, read(copy, file) | values)
    before = sorted(copy.rglob("*"))
    with pytest.raises(UserError, match=refused):
        evaluate(copy)
    assert sorted(copy.rglob("*")) == before


def test_a_damaged_front_is_made_anew_by_a_command(tmp_path):
    write_json(tmp_path / "front.json", {"dims": 3})
    with pytest.raises(UserError, match="front.json is damaged: python eval_front.py .* makes it anew"):
        eval_front.show(tmp_path, SimpleNamespace(eval=True))


def test_what_cannot_be_evaluated_is_refused(work, panacea, sft_run, soups, ppo_run):
    with pytest.raises(UserError, match="^out/nowhere is no run; python eval_front.py --list shows those in out/$"):
        evaluate("out/nowhere")
    half = work / "out/half-run"
    half.mkdir(exist_ok=True)
    (half / "config.json").write_text((panacea / "config.json").read_text())
    with pytest.raises(UserError, match="training has not ended"):
        evaluate(panacea, half)
    (half / "config.json").write_text("{}")
    with pytest.raises(UserError, match="an older version wrote it"):
        evaluate(half)
    changed(panacea, half, "config.json", base=3, refused="base cannot be 3")
    changed(panacea, half, "config.json", objective=None, refused='has no "objective"')
    changed(panacea, half, "config.json", dims=["helpful"], refused="no training has written these dims")
    changed(panacea, half, "config.json", objective=dict(name="x", beta=1.0, aggregate="ls"), refused="no training has")
    changed(panacea, half, "timing.json", train_seconds="1", refused="no training has written this .* timing.json")
    warm = go("train_sft", "warm", dims=["helpful", "warm"], steps=1)
    with pytest.raises(UserError, match="different spaces"):
        evaluate(sft_run, warm, parts=1)
    for runs, flags, text in (((panacea, soups), dict(evolution=True), "--evolution takes one run"),
                              ((soups,), dict(evolution=True), "of method panacea"),
                              ((panacea,), dict(stationarity=True), "takes runs of train_ppo.py"),
                              ((panacea,), dict(parts=0), "--parts 0: must be at least 1")):
        with pytest.raises(UserError, match=text):
            evaluate(*runs, **flags)
    # another base model: refused by an evaluation, and between runs that are compared
    other = work / "out/other-weights"
    shutil.copytree(panacea, other, dirs_exist_ok=True)
    (other / "config.json").write_text(json.dumps(read(panacea, "config.json") | {"fingerprint": "0"}))
    with pytest.raises(UserError, match="is not the base model that"):
        evaluate(other, parts=1)
    results = [read(sft_run, "front.json"), read(sft_run, "front.json") | {"run": str(other)}]
    with pytest.raises(UserError, match="another base model"):
        eval_front.compare(results, "cpu")


def test_ideal_scores_come_from_the_rewards_of_the_run(ppo_run):
    """An evaluation takes the statistics in config.json, whatever it would measure itself."""
    config = read(ppo_run[0], "config.json")
    config["rewards"] |= {"mean": [1.0, 2.0], "std": [2.0, 4.0], "scale": [1.0, 5.0]}
    (world,), _ = measured_on(config, Transformer.from_pretrained(BASE), load_tokenizer("toy"), torch.device("cpu"))
    raw = world_rewards(config["dims"], None).raw
    x = toy.prompts("new_verbs")[1]
    r = raw([x + "\n"] * 8, toy.responses(x), [True] * 8)
    expected = torch.tensor([1.0, 5.0]) * (r - torch.tensor([1.0, 2.0])) / torch.tensor([2.0, 4.0])
    assert torch.allclose(world.r[1, :8], expected)


def test_a_run_is_evaluated_from_anywhere(work, panacea, tmp_path, monkeypatch):
    """Base, data and reward models are found by whole paths; a base that is gone is one clear line. Wrong: paths that
    mean something in the working directory of the training alone."""
    write_rows("near.jsonl", [{"prompt": "a", "response_0": "b", "response_1": "c", "better": {"x": 0, "y": 1}}] * 4)
    files = go("train_dpo", "files-near", init=BASE, data=["near.jsonl"], eval_data=["near.jsonl"], eval=False)
    monkeypatch.chdir(tmp_path)
    for run in (panacea, files):
        evaluate(run, parts=1)
    shutil.copytree(panacea, tmp_path / "run")
    config = read(tmp_path / "run", "config.json")
    write_json(tmp_path / "run/config.json", config | {"base": str(tmp_path / "gone")})
    with pytest.raises(UserError, match="gone, the base model of this run, is not there any more: bring it back, or"):
        evaluate("run", parts=1)


def test_a_policy_that_says_nothing_is_one_line(panacea, tmp_path):
    """Finite weights, so large that log-probs are none: an update diverged, the last one of its training."""
    run = shutil.copytree(panacea, tmp_path / "run", ignore=shutil.ignore_patterns("front.*"))
    adapter, header = load_file(run / "adapter.safetensors"), read_adapter_header(run / "adapter.safetensors")
    save_file({name: 1e12 + x for name, x in adapter.items()}, run / "adapter.safetensors",
              metadata={"panacea": json.dumps(header)})
    with pytest.raises(UserError, match="^J is not finite at λ = 0.00 1.00: the training has diverged; train again"):
        evaluate(run, parts=1)
    assert not (run / "front.json").exists()
