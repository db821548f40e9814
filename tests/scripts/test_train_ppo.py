"""test_train_ppo.py - MGDA's backward pass, and train_ppo.py on the small world, with reward models, on stories.

At step 1 the critic is 0 and the policy is its reference, so its losses are known in closed form.
"""
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from running import BASE, SHARED, go, killed, metrics, read, refused, timeless, write_rows
from safetensors.torch import load_file

import eval_front
import train_ppo
from aggregate import min_norm_weights
from data.prompts import read_prompts, split
from data.rewards import Rewards, named_rewards, world_ideal, world_rewards
from data.text_rewards import text_rewards
from data.tokenizers import load_tokenizer, spoken, tokenize
from fronts import measure
from fronts.objective import OBJECTIVES
from model import Transformer
from objectives import gae, kl_penalized_rewards
from runs.files import UserError
from svd_lora import inject_svd_lora, load_adapter, set_preference

STORIES, LLAMA = SHARED / "material/text/tinystories_sample.txt", SHARED / "material/stories260K"


def test_mixed_advantages_are_those_of_the_mixed_reward(close):
    """Σ λ_i A_i, with one head per dimension and the KL in each, is GAE of Σ λ_i r_i − β KL with V_λ = Σ λ_i V_i."""
    g = torch.Generator().manual_seed(3)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0.0]], dtype=torch.float64)
    score, old, ref, values, lam = rand(2, 3), rand(2, 4), rand(2, 4), rand(2, 4, 3), rand(2, 3).softmax(-1)
    each = gae(kl_penalized_rewards(score, old, ref, mask, 0.3), values, mask)[0]
    mixed = gae(kl_penalized_rewards((lam * score).sum(-1), old, ref, mask, 0.3),
                (lam[:, None] * values).sum(-1), mask)[0]
    assert close((lam[:, None] * each).sum(-1), mixed, 1e-12)
    thirds = gae(kl_penalized_rewards(score, old, ref, mask, 0.1), values, mask)[0]      # wrong: a third of the KL each
    assert not close((lam[:, None] * thirds).sum(-1), mixed, 1e-2)


@pytest.mark.parametrize("n, pref_m", [(2, 0), (3, 2)])
def test_mgda_backward(tiny, close, n, pref_m):
    model = tiny().requires_grad_(False)
    inject_svd_lora(model, 4, pref_m, generator=torch.Generator().manual_seed(1))
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in parameters:
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    if pref_m:
        set_preference(model, torch.tensor([0.3, 0.7]))
    weights = torch.randn(n, 61, generator=torch.Generator().manual_seed(2)) * torch.tensor([1.0, 3.0, 5.0])[:n, None]
    weights[1] = 0.4 * weights[1] - 2 * weights[0]                                    # in conflict with the first
    losses = lambda: (model(torch.tensor([[5, 6, 7, 8]])).log_softmax(-1).mean((0, 1)) * weights).sum(-1)
    used = [p for p in parameters if torch.autograd.grad(losses()[0], p, allow_unused=True)[0] is not None]
    flat = lambda values: torch.cat([v.flatten() for v in values]).double()
    G = torch.stack([flat(torch.autograd.grad(loss, used, retain_graph=True)) for loss in losses()])
    c = train_ppo.mgda_backward(list(losses()), parameters)
    assert close(c, min_norm_weights(G @ G.T), 1e-4) and (c > 1e-3).sum() > 1 and len(used) >= 8
    together = flat([p.grad for p in used])
    assert close(together, c @ G, 1e-5) and together.norm() > 1e-6
    inner = G @ together                                 # a step against it worsens none: each is at least its norm²
    assert (inner >= together.square().sum() * (1 - 1e-3)).all()
    assert (G @ G.mean(0)).min() < 0                     # wrong: equal weights, which sacrifice one
    assert all(p.grad is None or not p.grad.any() for p in parameters if not any(p is q for q in used))


# ---- what a step does ----

def first_step(sampled, decay=0.95):
    """What step 1 must show: rewards (R, m) normalised, and for each token of each response γλ's power of its distance
    to the end, which at V = 0 and KL = 0 is its advantage for a reward of 1."""
    tokenizer = load_tokenizer("toy")
    prompts, responses = sampled[0]
    rewards = world_rewards(["helpful", "harmless"], None)
    finished = [y[-1] == tokenizer.eos_id for y in responses]
    texts = [tokenizer.decode(y[:-1] if end else y) for y, end in zip(responses, finished)]
    r = rewards.normalise(rewards.raw([tokenizer.decode(x) for x in prompts], texts, finished))
    return r, [decay ** np.arange(len(y) - 1, -1, -1) for y in responses]


def test_run_directory(ppo_run):
    run, sampled, _ = ppo_run
    assert {f.name for f in run.iterdir()} >= {"config.json", "metrics.jsonl", "timing.json", "adapter.safetensors",
                                               "snapshots"}
    assert not (run / "state.safetensors").exists()
    assert [f.name for f in (run / "snapshots").iterdir()] == ["adapter-000002.safetensors"]
    config = read(run, "config.json")
    assert config["dims"] == ["helpful", "harmless"] and config["models"] == 1 and config["script"] == "train_ppo.py"
    assert config["base"] == os.path.abspath(BASE) and config["flags"]["minibatch"] == 8 and config["prompts"] is None
    assert config["objective"] == {"name": "rlhf", "beta": 0.2, "aggregate": "ls", "ideal": None}
    known = world_rewards(config["dims"], None)
    assert config["rewards"] == {"names": config["dims"], "mean": known.mean, "std": known.std, "scale": [1.0, 1.0]}


def test_metrics_of_every_step(ppo_run):
    run, sampled, _ = ppo_run
    records = metrics(run)
    assert [r["step"] for r in records] == [1, 2, 3, 4] and len(sampled) == 4
    for r, (_, responses) in zip(records, sampled):
        assert r["first_ratio"] == 1.0                   # the update sees the very log-probs of the rollout
        assert np.shape(r["lam"]) == (2, 2) and np.allclose(np.sum(r["lam"], axis=1), 1) and np.min(r["lam"]) >= 0
        assert r["moved"] == 0 and r["clip_fraction"] == 0           # one update on all of it: nothing moved before
        assert all(np.isfinite(r[key]).all() for key in ("rewards", "normalised", "kl", "loss", "value_loss",
                                                         "explained_variance", "grad_norm"))
        assert r["length"] == np.mean([len(y) for y in responses]) and 0 <= r["finished"] <= 1
        assert r["weights"] is None and r["ideal"] is None and r["ptx"] == 0
    assert records[0]["kl"] == 0 and records[0]["explained_variance"] == 0
    assert all(r["kl"] != 0 for r in records[2:])
    assert len({json.dumps(r["lam"]) for r in records}) == 4


def test_losses_of_the_first_step_in_closed_form(ppo_run):
    run, sampled, _ = ppo_run
    record, (r, decay) = metrics(run)[0], first_step(sampled)
    assert len({tuple(x) for x in r.tolist()}) >= 3      # or the order of responses would not matter
    assert record["normalised"] == pytest.approx(r.mean(0).tolist(), rel=1e-9)
    lam, tokens = np.repeat(record["lam"], 4, axis=0), sum(map(len, decay))           # λ of a prompt: 4 responses
    expected = -sum((R * d).sum() for R, d in zip((lam * r.numpy()).sum(1), decay)) / tokens
    assert record["loss"] == pytest.approx(expected, rel=1e-4)
    tiled = -sum((R * d).sum() for R, d in zip((np.tile(record["lam"], (4, 1)) * r.numpy()).sum(1), decay)) / tokens
    by_rows = -np.mean([(R * d).mean() for R, d in zip((lam * r.numpy()).sum(1), decay)])
    for wrong in (tiled, by_rows):                       # λ of the other prompt; each response's own mean first
        assert abs(wrong - expected) > 0.01 * abs(expected)
    assert record["objective"] == pytest.approx((lam * r.numpy()).sum(1).mean(), rel=1e-6)        # R_λ; KL is 0
    value_loss = 0.5 * sum(((R * d) ** 2).sum() for row, d in zip(r.tolist(), decay) for R in row) / tokens / 2
    assert record["value_loss"] == pytest.approx(value_loss, rel=1e-4)                # at V = 0, for both heads


def test_kl_of_a_later_step(ppo_run):
    """Step 3 samples with the adapter of the snapshot after step 2: its KL, one response after the other."""
    run, sampled, _ = ppo_run
    record, (prompts, responses) = metrics(run)[2], sampled[2]
    base, model = Transformer.from_pretrained(BASE), Transformer.from_pretrained(BASE)
    load_adapter(model, run / "snapshots/adapter-000002.safetensors")

    @torch.no_grad()
    def estimate(lams):
        kl = 0.0
        for b, (x, y) in enumerate(zip(prompts, responses)):
            set_preference(model, torch.tensor(lams[b // 4]))
            policy, ref = (net(torch.tensor([x + y]))[0, len(x) - 1:-1].log_softmax(-1)[torch.arange(len(y)), y].sum()
                           for net in (model, base))
            kl += (policy - ref).item() / 8
        return kl

    assert record["kl"] == pytest.approx(estimate(record["lam"]), rel=0.01)
    load_adapter(model, run / "adapter.safetensors")     # wrong: the policy as it is after the updates
    assert abs(estimate(record["lam"]) - record["kl"]) > 0.05 * abs(record["kl"])


def test_one_preference_a_prompt_from_rollout_to_update(ppo_run):
    run, sampled, preferences = ppo_run
    for step, record in enumerate(metrics(run)):
        rollout, *others = preferences[3 * step:3 * step + 3]
        lam = torch.tensor(record["lam"])
        assert torch.equal(rollout, lam.repeat_interleave(4, dim=0)) and all(torch.equal(x, lam) for x in others)
        assert not torch.equal(lam[0], lam[1])
        prompts = sampled[step][0]
        assert prompts[0] == prompts[3] != prompts[4] == prompts[7]                   # K = 4 responses to each
    assert len(preferences) == 12


def test_same_seed_same_adapter(ppo_run):
    again, other = go("train_ppo", "ppo-again", steps=4, lr=8e-3, critic_iters=1), go("train_ppo", "ppo-seed", seed=1)
    adapter = lambda run: (run / "adapter.safetensors").read_bytes()
    assert adapter(again) == adapter(ppo_run[0]) != adapter(other) and timeless(again) == timeless(ppo_run[0])


def test_preferences_a_rollout():
    run = go("train_ppo", "one-lam", lams_per_step=1, batch_size=16)
    assert all(len({tuple(lam) for lam in r["lam"]}) == 1 and len(r["lam"]) == 4 for r in metrics(run))


def test_second_passes_move_the_ratio():
    records = metrics(go("train_ppo", "passes", update_iters=3, lr=1e-2, warmup_ratio=0))
    assert all(r["first_ratio"] == 1 and r["moved"] != 0 for r in records)
    assert max(r["clip_fraction"] for r in records) > 0
    halves = metrics(go("train_ppo", "halves", minibatch=4))
    assert all(r["first_ratio"] == 1 and r["moved"] != 0 for r in halves)             # the second half: one step later


def test_baselines(ppo_run):
    soups = go("train_ppo", "ppo-rs", method="rs", steps=4)
    assert {f.name for f in soups.glob("adapter*")} == {"adapter-helpful.safetensors", "adapter-harmless.safetensors"}
    assert [(r["member"], r["step"]) for r in metrics(soups)] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert [r["lam"] for r in metrics(soups)] == [[[1, 0]] * 2] * 2 + [[[0, 1]] * 2] * 2
    single = go("train_ppo", "ppo-dps", method="dps", lam=[0.25, 0.75])
    assert [f.name for f in single.glob("adapter*")] == ["adapter-000.safetensors"]
    assert all(r["lam"] == [[0.25, 0.75]] * 2 for r in metrics(single))
    lattice = go("train_ppo", "ppo-lattice", method="dps", dps_parts=2)
    assert [r["lam"][0] for r in metrics(lattice)] == [[0, 1], [0.5, 0.5], [1, 0]]
    assert read(lattice, "config.json")["models"] == 3
    # as long as λ is no input there is no singular value for it: rank k + 1 against k + m
    sigma = lambda f: next(v for k, v in load_file(f).items() if k.endswith("sigma")).shape
    assert sigma(single / "adapter-000.safetensors") == (9,) and sigma(ppo_run[0] / "adapter.safetensors") == (8,)


def test_tchebycheff(ppo_run):
    run = go("train_ppo", "ppo-tche", aggregate="tche", critic_iters=1, steps=1)
    linear = metrics(ppo_run[0])[0]
    record, (r, decay) = metrics(run)[0], first_step(ppo_run[1])                      # one seed: the same sample
    z = world_ideal(world_rewards(["helpful", "harmless"], None))
    config = read(run, "config.json")
    assert config["flags"]["ideal"] == config["objective"]["ideal"] == pytest.approx(z.tolist()) == record["ideal"]
    lam, tokens = np.repeat(record["lam"], 4, axis=0), sum(map(len, decay))
    for name, ideal in ((record, z.numpy()), (None, np.array([5.0, 5.0]))):
        record = name or metrics(go("train_ppo", "ppo-ideal", aggregate="tche", ideal=[5, 5], steps=1))[0]
        R = -(lam * (ideal - r.numpy())).max(1)
        expected = -sum((x * d).sum() for x, d in zip(R, decay)) / tokens
        assert record["loss"] == pytest.approx(expected, rel=1e-4)
        assert abs(linear["loss"] - expected) > 0.01 * abs(expected)
        assert record["normalised"] == linear["normalised"]


@pytest.mark.parametrize("aggregate, reading", [("pama", "V"), ("pama", "T"), ("pama", "S"), ("mgda", "V")])
def test_without_a_preference(ppo_run, aggregate, reading):
    run = go("train_ppo", f"{aggregate}-{reading}", aggregate=aggregate, pama_reading=reading)
    config, records = read(run, "config.json"), metrics(run)
    assert config["flags"]["method"] == "dps" and config["flags"]["lam"] == [0.5, 0.5]
    assert (config["method"], config["label"], config["objective"]["aggregate"]) == (aggregate, aggregate.upper(), "ls")
    assert [f.name for f in run.glob("adapter*")] == ["adapter-000.safetensors"]
    for r in records:
        assert r["first_ratio"] == 1 and np.isfinite([r["loss"], r["kl"], r["grad_norm"]]).all()
        if reading == "T":
            assert r["weights"] is None
        else:
            assert min(r["weights"]) >= 0 and sum(r["weights"]) == pytest.approx(1)
    r, decay = first_step(ppo_run[1])
    A = [np.concatenate([x * d for x, d in zip(column, decay)]) for column in r.T.tolist()]
    positive = np.maximum(A, 0)                                                       # Noon
    if aggregate == "mgda":
        loss = -(np.array(records[0]["weights"]) @ A).mean()
    elif reading == "T":
        loss = -positive.min(0).mean()
    else:
        c = (min_norm_weights(torch.tensor(positive @ positive.T)).numpy() if reading == "V" else
             np.eye(2)[positive.mean(1).argmin()])
        assert records[0]["weights"] == pytest.approx(c.tolist(), abs=1e-4)
        loss = -(c @ positive).mean()
    assert records[0]["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-6)


ONE_BY_ONE = {
    "rloo": lambda s, k: s[k] - np.delete(s, k).mean(), "grpo": lambda s, k: (s[k] - s.mean()) / s.std(ddof=1),
    "gdpo": lambda s, k: (s[k] - s.mean()) / s.std(ddof=1)}


@pytest.mark.parametrize("estimator, aggregate", [
    ("rloo", "ls"), ("grpo", "ls"), ("gdpo", "ls"), ("grpo", "tche"), ("rloo", "pama"), ("grpo", "mgda")])
def test_without_a_critic(ppo_run, estimator, aggregate):
    """The first loss, where KL is 0, response by response; every token of a response counts with its advantage."""
    run = go("train_ppo", f"{estimator}-{aggregate}", estimator=estimator, aggregate=aggregate, lr=8e-3)
    records = metrics(run)
    assert all(r["value_loss"] is None and r["explained_variance"] is None and r["first_ratio"] == 1 for r in records)
    assert all(np.isfinite([r["loss"], r["kl"], r["grad_norm"]]).all() for r in records) and records[2]["kl"] != 0
    r, lengths = first_step(ppo_run[1])[0].numpy(), np.array([len(y) for y in ppo_run[1][0][1]])   # the same sample
    lam = np.repeat(records[0]["lam"], 4, axis=0)
    each = lambda s: np.stack([np.concatenate([[ONE_BY_ONE[estimator](column[x:x + 4], k) for k in range(4)]
                                               for x in (0, 4)]) for column in s.T], axis=1)       # (R, n)
    if aggregate == "tche":
        A = each(-(lam * (world_ideal(world_rewards(["helpful", "harmless"], None)).numpy() - r)).max(1)[:, None])
    elif aggregate == "ls":
        before, after = each((lam * r).sum(1, keepdims=True)), (lam * each(r)).sum(1, keepdims=True)
        A = after / after.std(ddof=1) if estimator == "gdpo" else before
        assert estimator == "rloo" or np.abs(before - after).max() > 0.05             # wrong: the sum at another place
    else:
        A = each(r)
        if aggregate == "pama":
            A = np.maximum(A, 0)
        A = A @ np.array(records[0]["weights"])[:, None]
    expected = -(A[:, 0] * lengths).sum() / lengths.sum()
    assert records[0]["loss"] == pytest.approx(expected, rel=2e-3, abs=1e-5)          # 1e-4 is added to deviations


def test_without_a_critic_its_flags_have_no_effect():
    plain, other = (go("train_ppo", f"no-critic{i}", estimator="rloo", critic_lr=lr, critic_iters=n, gae_lambda=decay)
                    for i, (lr, n, decay) in enumerate([(3e-3, 4, 0.95), (1.0, 1, 0.5)]))
    assert timeless(plain) == timeless(other)
    assert (plain / "adapter.safetensors").read_bytes() == (other / "adapter.safetensors").read_bytes()
    left = killed("train_ppo", "no-critic-killed", lambda r: r["step"] == 3, estimator="rloo", save_every=2)
    kept = load_file(left / "state.safetensors")
    assert kept and not [key for key in kept if key.startswith(("param.critic", "optimizer.1."))]


def test_ppo_learns_and_follows_the_preference():
    """Fourteen steps: each vertex has the higher reward of its own dimension, and more of it than the base has."""
    dims = ["formal", "encouraging"]
    run = go("train_ppo", "ppo-learns", dims=dims, steps=14, batch_size=32, minibatch=16, samples=8, vertex_share=1,
             lr=6e-3)
    model, rewards = Transformer.from_pretrained(BASE), world_rewards(dims, None)
    world = measure.World(dims, load_tokenizer("toy"), "cpu", OBJECTIVES["rlhf"].J, rewards)
    world.reference(model)
    base = world.measure(model, 0.2)
    load_adapter(model, run / "adapter.safetensors", dims)
    ends = []
    for lam in ([1.0, 0.0], [0.0, 1.0]):
        set_preference(model, torch.tensor(lam))
        ends.append(world.measure(model, 0.2))
    for i in (0, 1):
        assert ends[i]["scores"][i] > base["scores"][i] + 0.2                         # wrong: a sign
        assert ends[i]["J"][i] > base["J"][i] + 0.05
        assert ends[i]["scores"][i] > ends[1 - i]["scores"][i] + 0.2                  # wrong: λ does nothing


def test_ptx_on_the_world(monkeypatch):
    """Its first loss is that of the base on the texts drawn for it; its gradient reaches the adapter."""
    monkeypatch.setattr(train_ppo, "PTX_SAMPLES", 2)
    seen, pack = [], train_ppo.pack
    monkeypatch.setattr(train_ppo, "pack", lambda rows, *a: seen.append(rows) or pack(rows, *a))
    with_ptx, without = (metrics(go("train_ppo", f"ptx{c}", ptx_coeff=c, steps=1))[0] for c in (100, 0))
    told = seen[1]
    assert len(told) == 2 and all(len(row.responses) == 2 for row in told)
    model, nats, count = Transformer.from_pretrained(BASE), 0.0, 0
    for row in told:
        for y in row.responses:
            logps = model(torch.tensor([row.prompt + y]))[0, len(row.prompt) - 1:-1].log_softmax(-1)
            nats, count = nats - logps[torch.arange(len(y)), torch.tensor(y)].sum().item(), count + len(y)
    assert with_ptx["ptx"] == pytest.approx(nats / count, rel=1e-4) and without["ptx"] == 0
    assert with_ptx["loss"] == pytest.approx(without["loss"], rel=1e-6)               # PPO's own, beside it
    assert abs(with_ptx["grad_norm"] - without["grad_norm"]) > 0.05 * without["grad_norm"]


# ---- trained reward models ----

@pytest.mark.parametrize("aggregate", ["ls", "tche"])
def test_reward_models_are_evaluated_by_the_true_rewards(reward_run, aggregate):
    run = go("train_ppo", f"judged-{aggregate}", rewards=[str(reward_run)], aggregate=aggregate, max_new_tokens=16)
    config, records = read(run, "config.json"), metrics(run)
    assert config["rewards"] == {"names": [str(reward_run)], "mean": [0, 0], "std": [1, 1], "scale": [1, 1]}  # its own
    assert config["dims"] == ["helpful", "harmless"] and records[0]["kl"] == 0
    assert all(r["first_ratio"] == 1 and r["rewards"] == r["normalised"] for r in records)
    (r,) = eval_front.main(eval_front.Flags(runs=[str(run)], parts=1, device="cpu"))
    assert r["points_are"] == "normalised J" and 0 <= r["hypervolume_share"] <= 1
    world = measure.World(r["dims"], load_tokenizer("toy"), "cpu", OBJECTIVES["rlhf"].J, world_rewards(r["dims"], None))
    model = Transformer.from_pretrained(BASE)
    world.reference(model)
    assert r["base"]["J"] == pytest.approx(world.measure(model, r["objective"]["beta"])["J"], rel=1e-6)


def test_one_dimension_of_a_reward_model(reward_run):
    run = go("train_ppo", "harmless-length", rewards=[f"{reward_run}:harmless", "length"], reward_scale=[5, 1])
    config = read(run, "config.json")
    assert config["dims"] == ["harmless", "length"] and config["rewards"]["scale"] == [5, 1]
    assert config["rewards"]["mean"][0] == 0 and config["rewards"]["mean"][1] > 0.3
    for r in metrics(run):
        assert r["normalised"][0] == pytest.approx(5 * r["rewards"][0])
    with pytest.raises(UserError, match="has the dimensions helpful harmless"):
        named_rewards([f"{reward_run}:warm", "length"], None, None, "cpu")


# ---- stories ----

@pytest.mark.skipif(not STORIES.exists(), reason="../shared (the tiny Llama and the stories) is not here")
def test_text_rewards_on_stories(work, capsys, monkeypatch):
    (work / "stories.txt").write_text(STORIES.read_text(encoding="utf-8")[:30_000], encoding="utf-8")
    sampled, generate = [], train_ppo.generate_all
    monkeypatch.setattr(train_ppo, "generate_all",
                        lambda *a, **k: sampled.append((a[1], generate(*a, **k))) or sampled[-1][1])
    monkeypatch.setattr(train_ppo, "REFERENCE_SAMPLES", 32)
    run = go("train_ppo", "stories", init=str(LLAMA), prompts=["stories.txt"], rewards=["dialogue", "narrative"],
             eos_id=1, max_new_tokens=16, samples=None, kl_coeff=None, ptx_coeff=0.1, steps=2)
    records, config = metrics(run), read(run, "config.json")
    assert all(r["first_ratio"] == 1 and 0.5 < r["ptx"] < 6 and np.isfinite(r["rewards"]).all() for r in records)
    assert records[0]["kl"] == 0 and np.shape(records[0]["lam"]) == (8, 2)            # K = 1: a λ for every response
    assert config["flags"]["kl_coeff"] == 0.02
    # the rewards' mean and deviation are those of the base model's own responses, sampled before the first step
    tokenizer, names = replace(load_tokenizer(str(LLAMA)), eos_id=1), ["dialogue", "narrative"]
    assert len(sampled) == 4 + 2 and all(len(y) <= 16 for _, responses in sampled for y in responses)
    prompts, responses = ([x for part in sampled[:4] for x in part[i]] for i in (0, 1))
    raw = text_rewards(names, [tokenizer.decode(x[1:]) for x in prompts], spoken(responses, tokenizer)[0])    # less BOS
    assert config["rewards"]["mean"] == pytest.approx(raw.mean(0).tolist(), rel=1e-9)
    assert config["rewards"]["std"] == pytest.approx(raw.std(0).tolist(), rel=1e-9) and raw.std(0).min() > 0
    capsys.readouterr()
    (result,) = eval_front.main(eval_front.Flags(runs=[str(run)], parts=1, device="cpu"))
    printed, r, samples = capsys.readouterr().out, read(run, "front.json"), read(run, "samples.json")
    assert r["lams"] == [[0, 1], [1, 0]] and r["points_are"] == "normalised mean reward" and r["exact"] is None
    assert r["hypervolume_share"] is None and min(min(x) for x in r["scores_se"]) >= 0
    assert any({f"{r['scores'][0][1]:.3f}", f"{r['scores_se'][0][1]:.3f}"} <= set(line.split())
               for line in printed.splitlines()) and "±_narrativ" in printed
    own = [*r["own_text_loss"], r["base"]["own_text_loss"]]
    assert all(0.5 < x < 6 for x in own) and f"{own[1]:.3f}" in printed               # nats per token
    assert r["base"]["kl"] == pytest.approx(0, abs=1e-4)
    raw = torch.tensor(samples["base"]["raw"], dtype=torch.float64)
    rewards = Rewards(names, **{k: v for k, v in config["rewards"].items()}, raw=None)
    assert r["base"]["points"] == pytest.approx(rewards.normalise(raw).mean(0).tolist(), rel=1e-6)
    by_prompt = raw.view(-1, 4, 2).mean(1)
    assert r["base"]["scores_se"] == pytest.approx((by_prompt.std(0) / len(by_prompt) ** 0.5).tolist(), rel=1e-6)
    # the base model's nats per token on what the held-out stories really go on with
    held_out = split(read_prompts(["stories.txt"], 12)[0])[1]
    model, nats, count = Transformer.from_pretrained(LLAMA), 0.0, 0
    for row in tokenize(held_out, tokenizer, 512)[0]:
        (y,) = row.responses
        logps = model(torch.tensor([row.prompt + y]))[0, len(row.prompt) - 1:-1].log_softmax(-1)
        nats, count = nats - logps[torch.arange(len(y)), torch.tensor(y)].sum().item(), count + len(y)
    assert r["base"]["own_text_loss"] == pytest.approx(nats / count, rel=1e-4) and len(held_out) >= 2


# ---- bad input ----

BAD = {
    "prompts without a base": (dict(prompts=["x.txt"], rewards=["happy", "length"]), "--prompts needs --init"),
    "prompts without rewards": (dict(prompts=["x.txt"], init=BASE), "needs --init and --rewards"),
    "a base without prompts": (dict(init="elsewhere", rewards=["happy", "length"]), "--init needs --prompts"),
    "lam off the simplex": (dict(method="dps", lam=[0.7, 0.7]), "sums to 1"),
    "lam of the wrong length": (dict(method="dps", lam=[0.5, 0.3, 0.2]), "--lam takes 2 numbers"),
    "lam for panacea": (dict(lam=[0.5, 0.5]), "--lam is the one preference"),
    "minibatch not divisible": (dict(minibatch=6), "--minibatch 6 must be a multiple of --samples 4"),
    "batch not divisible": (dict(batch_size=10), "--batch_size 10 must be a multiple"),
    "prompts not divisible": (dict(lams_per_step=3), "one of --lams_per_step 3"),
    "one response to a prompt": (dict(estimator="rloo", samples=1), "--samples must be at least 2"),
    "gdpo for one reward": (dict(estimator="gdpo", aggregate="tche"), "it belongs to --aggregate ls"),
    "pama with a method": (dict(aggregate="pama", method="rs"), "--aggregate pama trains one policy"),
    "mgda with a preference": (dict(aggregate="mgda", lam=[0.5, 0.5]), "--lam"),
    "ideal without tche": (dict(ideal=[1.0, 1.0]), "--ideal belongs to --aggregate tche"),
    "ideal of the wrong length": (dict(aggregate="tche", ideal=[1.0]), "--ideal takes 2 numbers"),
    "unknown reward": (dict(rewards=["length", "joyful"]), "joyful is not a finished run"),
    "one reward": (dict(rewards=["length"]), "name two rewards"),
    "the same reward twice": (dict(rewards=["length", "length"]), "must all differ"),
    "a reward that never changes": (dict(rewards=["length", "happy"]), "there is no signal in it"),
    "one dimension": (dict(pref_dim=1), "at least 2 dimensions"),
    "unknown dimension": (dict(dims=["helpful", "kind"]), "choose each once among"),
    "scale not positive": (dict(reward_scale=[1.0, 0.0]), "--reward_scale 0.0: must be positive"),
    "no room for a prompt": (dict(max_new_tokens=256), "--max_new_tokens 256 leave no room"),
    "too few steps": (dict(method="dps", steps=10), "shared by 11 models"),
    "no β": (dict(kl_coeff=0.0), "--kl_coeff 0.0: must be positive"),
    "gae_lambda": (dict(gae_lambda=1.5), "--gae_lambda 1.5: must be between 0 and 1"),
    "no such file": (dict(prompts=["nowhere.txt"], init=BASE, rewards=["happy", "length"]),
                     "nowhere.txt: cannot be read"),
    "a directory of something else": (dict(out=BASE), "holds no run of train_ppo.py"),
    "too few prompts to hold out": (dict(prompts=["few.jsonl"], init=BASE, rewards=["length", "narrative"]),
                                    "too few prompts"),
    "ptx without texts": (dict(prompts=["bare.jsonl"], init=BASE, rewards=["length", "narrative"], ptx_coeff=0.1),
                          "--ptx_coeff needs prompts that all have their own text"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_writes_nothing(monkeypatch, capsys, case):
    monkeypatch.setattr(train_ppo, "REFERENCE_SAMPLES", 8)
    refused("train_ppo", *BAD[case], monkeypatch, capsys)


@pytest.fixture(autouse=True)
def prompt_files(place):
    """Prompts without texts of their own: many, and so few that only one is held out: a standard error needs two."""
    if not (place / "bare.jsonl").exists():
        rows = [{"prompt": f"How do I clean a bicycle number {i}?"} for i in range(60)]
        every = read_prompts([write_rows(place / "bare.jsonl", rows)])[0]
        out = {row.prompt for row in split(every)[1]}
        held = [row for row, read_back in zip(rows, every) if read_back.prompt in out]
        write_rows(place / "few.jsonl", [row for row in rows if row not in held][:20] + held[:1])


def test_estimator_by_default():
    """GRPO where a prompt has several responses to compare; a critic where it has one, and for PAMA."""
    for given, want in (({}, "grpo"), (dict(aggregate="tche"), "grpo"), (dict(samples=1), "gae"),
                        (dict(aggregate="pama"), "gae"), (dict(aggregate="mgda"), "gae"),
                        (dict(estimator="rloo"), "rloo"), (dict(estimator="gae"), "gae")):
        flags = train_ppo.Flags(**given)
        train_ppo.defaults(flags, world_rewards(["helpful", "harmless"], None), 1)
        assert flags.estimator == want


def test_a_reward_of_ones_own(tmp_path, monkeypatch):
    """The evaluation finds the file from another working directory."""
    Path("mine.py").write_text("def curious(prompt, response):\n    return len(prompt) + response.count('e')\n")
    run = go("train_ppo", "own", rewards=["mine.py:curious", "length"], steps=1)
    assert read(run, "config.json")["rewards"]["names"] == [f"{Path('mine.py').resolve()}:curious", "length"]
    monkeypatch.chdir(tmp_path)
    (r,) = eval_front.main(eval_front.Flags(runs=[str(run)], parts=1, device="cpu"))
    assert r["dims"] == ["curious", "length"] and 20 < r["base"]["scores"][0] < 200
