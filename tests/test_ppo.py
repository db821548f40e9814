"""test_ppo.py - the critic, the rewards, MGDA's backward pass, and train_ppo.py on a small world, on stories, killed.

Runs are made inside this process, on a world of 8 responses that a base model learns in seconds; one run is killed as a
process of its own. At step 1 the critic is 0 and the policy is its reference, so its losses are known in closed form.
"""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import eval_front
from fronts import measure
import train_ppo
import train_reward
import train_base
from aggregate import min_norm_weights
from runs.files import UserError
from data import toy
from data.prompts import read_prompts, split
from data.text_rewards import text_rewards
from data.tokenizers import load_tokenizer, spoken, tokenize
from ops.heads import Critic
from model import Transformer
from objectives import gae, kl_penalized_rewards
from data.rewards import Rewards, named_rewards, world_ideal, world_rewards
from svd_lora import inject_svd_lora, load_adapter, set_preference
from test_rlhf_front import shrink
from test_scripts import ROOT, SHARED, metrics, script

STORIES, LLAMA = SHARED / "material/text/tinystories_sample.txt", SHARED / "material/stories260K"


# ---- the critic ----

def sequences(B=40, L=5, d=16, seed=0):
    """Random states (B, L, d) and a preference (B, 2) for each response."""
    g = torch.Generator().manual_seed(seed)
    lam = torch.rand(B, 1, generator=g)
    return torch.randn(B, L, d, generator=g), torch.cat([lam, 1 - lam], dim=1)


def slips(states, at=None):
    """Log-probs (B, L) of tokens that are all likely, but for one of every response where `at` says."""
    logps = torch.full(states.shape[:2], -0.1)
    if at is not None:
        logps[:, at] = -8.0
    return logps


def trained(critic, states, lam, target, steps=150):
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = torch.nn.functional.mse_loss(critic(states, slips(states), lam), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_the_critic_starts_at_zero_and_leaves_the_policy_alone():
    states, lam = sequences()
    critic = Critic(16, 2, 3, torch.Generator().manual_seed(1))
    states.requires_grad_(True)
    values = critic(states, slips(states), lam)
    assert values.shape == (40, 5, 3) and values.dtype == torch.float32 and not values.any()
    trained(critic, states, lam, torch.ones(40, 5, 3), steps=2)          # the first moves the last layer alone
    assert states.grad is None and all(p.grad.abs().max() > 0 for p in critic.parameters())
    assert critic(states.bfloat16(), slips(states), lam).dtype == torch.float32
    twin, other = (Critic(16, 2, 3, torch.Generator().manual_seed(seed)).inner.weight for seed in (1, 2))
    assert torch.equal(twin, Critic(16, 2, 3, torch.Generator().manual_seed(1)).inner.weight)
    assert not torch.equal(twin, other)


def test_the_critic_learns_what_depends_on_lam_and_on_the_states():
    states, lam = sequences(B=100)
    before = torch.cat([torch.zeros(100, 1), states[:, :1, 1].expand(-1, 4)], dim=1)      # what the first state said
    target = torch.stack([3 * lam[:, :1].expand(-1, 5), states[..., 0].sign(), 2 * before], dim=2)
    critic = Critic(16, 2, 3, torch.Generator().manual_seed(1))
    trained(critic, states, lam, target, steps=200)
    errors = (critic(states, slips(states), lam) - target).square().mean((0, 1)) / target.var((0, 1))
    assert errors[0] < 0.1 and errors[1] < 0.2 and errors[2] < 0.03      # wrong: without λ, the state, the earlier ones
    ends = [critic(states, slips(states), torch.tensor([end] * 100))[..., 0].mean() for end in ([0.0, 1.0], [1.0, 0.0])]
    assert ends[1] - ends[0] > 2
    # nothing looks ahead: not padding, nor what the response says later
    later = states.clone()
    later[:, 3:] = 7.0
    values, changed = critic(states, slips(states), lam), critic(later, slips(states), lam)
    assert torch.equal(values[:, :3], changed[:, :3]) and not torch.allclose(values[:, 3:], changed[:, 3:])
    earlier = states.clone()
    earlier[:, 0] += 1.0
    assert not torch.allclose(critic(earlier, slips(states), lam)[:, 1:], values[:, 1:])


def test_the_critic_knows_the_least_likely_token_so_far():
    states, lam = sequences()
    critic = Critic(16, 2, 3, torch.Generator().manual_seed(1))
    trained(critic, states, lam, torch.ones(40, 5, 3), steps=2)
    clean, slipped = critic(states, slips(states), lam), critic(states, slips(states, at=2), lam)
    assert torch.equal(clean[:, :3], slipped[:, :3])                     # wrong: V_t that knows the token y_t itself
    assert not torch.isclose(clean[:, 3:], slipped[:, 3:]).any(-1).all(-1).any()      # and not of the last token alone


def test_mixed_advantages_are_those_of_the_mixed_reward(close):
    """Σ λ_i A_i, with one head a dimension and the KL in each, is GAE of Σ λ_i r_i − β KL with V_λ = Σ λ_i V_i."""
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


# ---- rewards ----

def test_statistics_of_world_rewards_by_sampling():
    dims = ["harmless", "helpful"]
    rewards = world_rewards(dims, None)
    prompts, columns = toy.prompts("train"), [toy.DIMS.index(dim) for dim in dims]
    g, drawn, uniform = torch.Generator().manual_seed(0), [], []
    for x in prompts:
        scores = toy.scores(x, toy.responses(x))[:, columns]
        drawn.append(scores[torch.multinomial(toy.base_probs(x), 4000, replacement=True, generator=g)])
        uniform.append(scores)
    drawn = torch.cat(drawn)
    assert torch.allclose(drawn.mean(0), torch.tensor(rewards.mean, dtype=torch.float64), atol=0.03)
    assert torch.allclose(drawn.std(0), torch.tensor(rewards.std, dtype=torch.float64), atol=0.03)
    assert (torch.cat(uniform).mean(0) - drawn.mean(0)).abs().max() > 0.1            # wrong: all equally likely
    r = rewards.normalise(drawn)
    assert r.mean(0).abs().max() < 0.03 and (r.std(0) - 1).abs().max() < 0.03 and rewards.scale == [1, 1]


def test_world_rewards_of_texts():
    dims = ["helpful", "concise"]
    rewards, x = world_rewards(dims, [1.0, 5.0]), toy.prompts("train")[0]
    texts = toy.responses(x)[1:3]
    raw = rewards.raw([x + "\n"] * 5, [*texts, "Never heard of it.", texts[0], texts[0] + " "],
                      [True, True, True, False, True])
    assert torch.equal(raw[:2], toy.scores(x, texts)[:, [0, 2]])
    assert (raw[2:] == toy.OUTSIDE).all()                # no text of the world; one that was cut off; a space too many
    r = rewards.normalise(raw)
    mean, std = torch.tensor(rewards.mean, dtype=torch.float64), torch.tensor(rewards.std, dtype=torch.float64)
    assert torch.allclose(r, (raw - mean) / std * torch.tensor([1.0, 5.0]), rtol=1e-12)
    z = world_ideal(rewards)
    every = [(toy.scores(x, [y])[0, [0, 2]] - mean) / std for x in toy.prompts("train") for y in toy.responses(x)[::2]]
    every = torch.stack(every) * torch.tensor([1.0, 5.0])
    assert (every <= z + 1e-12).all() and z.shape == (2,) and (z > 0).all()
    assert any(torch.equal(rewards.normalise(toy.scores(x, toy.responses(x))[:, [0, 2]]).amax(0)[i], z[i])
               for x in toy.prompts("train") for i in (0, 1))


def test_named_rewards(tmp_path, tiny):
    prompts, texts = ["Once upon"] * 2, [' a time. "Hello you," said Tom.', " a very sad boy sat down alone. He cried."]
    rewards = named_rewards(["sad", "narrative"], [2.0, 1.0], None, "cpu")
    assert (rewards.dims, rewards.mean, rewards.std, rewards.scale) == (["sad", "narrative"], [None] * 2, [None] * 2,
                                                                         [2.0, 1.0])
    raw = rewards.raw(prompts, texts, [True, False])
    assert torch.equal(raw, text_rewards(["sad", "narrative"], prompts, texts)) and len(set(raw[:, 0].tolist())) == 2
    for names, message in [(["length", "joyful"], "joyful is not a finished run of train_reward.py"),
                           (["length", "sad", "length"], "must all differ")]:
        with pytest.raises(UserError, match=message):
            named_rewards(names, None, None, "cpu")


# ---- MGDA ----

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
    weights[1] = 0.4 * weights[1] - 2 * weights[0]                                   # in conflict with the first
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


# ---- runs on a small world ----

@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """A working directory, and a world of 8 responses and few prompts whose base model has mass 0.9 inside it."""
    patch = pytest.MonkeyPatch()
    shrink(patch, dict(train=20, eval=10), OPENINGS=("plain", "formal"), BODIES=("hint", "refuse"), CAUTIONS=("none",),
           CLOSINGS=("none", "cheer"))
    cwd = tmp_path_factory.mktemp("ppo")
    patch.chdir(cwd)
    train_base.main(train_base.Flags(size="tiny", steps=100, batch_size=4, lr=6e-3))
    yield cwd
    patch.undo()
    toy._world.cache_clear()


SMALL = dict(batch_size=8, samples=4, minibatch=8, kl_coeff=0.2, max_new_tokens=24, steps=3, eval=False, snapshots=2, log_every=1000, device="cpu",
             size="tiny")


def go(name, **flags):
    """Trains out/<name> in this process, and returns its directory."""
    return train_ppo.main(train_ppo.Flags(**SMALL | flags, out=f"out/{name}"))


def config_of(run):
    return json.loads((run / "config.json").read_text())


@pytest.fixture(scope="module")
def panacea(mini):
    """A run with linear scalarisation; beside it what was sampled, and every preference that was set."""
    sampled, preferences = [], []
    with pytest.MonkeyPatch.context() as patch:
        generate, use = train_ppo.generate, train_ppo.set_preference
        patch.setattr(train_ppo, "generate",
                      lambda *a, **k: sampled.append((a[1], generate(*a, **k))) or sampled[-1][1])
        patch.setattr(train_ppo, "set_preference", lambda model, lam: preferences.append(lam) or use(model, lam))
        run = go("ls", steps=4, lr=8e-3, critic_iters=1)
    return run, sampled, preferences


def first_step(sampled, kl_coeff=0.2, gae_lambda=0.95):
    """What step 1 must show: rewards (B, m) normalised, and for each token of each response γλ's power of its distance
    to the end, which at V = 0 and KL = 0 is its advantage for a reward of 1."""
    tokenizer = load_tokenizer("toy")
    prompts, responses = sampled[0]
    rewards = world_rewards(["helpful", "harmless"], None)
    finished = [y[-1] == tokenizer.eos_id for y in responses]
    texts = [tokenizer.decode(y[:-1] if end else y) for y, end in zip(responses, finished)]
    r = rewards.normalise(rewards.raw([tokenizer.decode(x) for x in prompts], texts, finished))
    return r, [gae_lambda ** np.arange(len(y) - 1, -1, -1) for y in responses]


def test_run_directory(mini, panacea):
    run, sampled, _ = panacea
    assert {f.name for f in run.iterdir()} == {"config.json", "metrics.jsonl", "timing.json", "adapter.safetensors",
                                               "snapshots"}
    assert [f.name for f in (run / "snapshots").iterdir()] == ["adapter-000002.safetensors"]
    config = config_of(run)
    assert config["dims"] == ["helpful", "harmless"] and config["models"] == 1 and config["script"] == "train_ppo.py"
    assert config["base"] == "out/base-tiny-seed0" and config["flags"]["minibatch"] == 8
    known = world_rewards(config["dims"], None)
    assert config["rewards"] == {"mean": known.mean, "std": known.std, "scale": [1.0, 1.0]}


def test_metrics_of_every_step(panacea):
    run, sampled, _ = panacea
    records = metrics(run)
    assert [r["step"] for r in records] == [1, 2, 3, 4] and len(sampled) == 4
    for r, (_, responses) in zip(records, sampled):
        assert r["first_ratio"] == 1.0                   # the update sees the very log-probs of the rollout
        assert np.shape(r["lam"]) == (2, 2) and np.allclose(np.sum(r["lam"], axis=1), 1) and np.min(r["lam"]) >= 0
        assert r["moved"] == 0 and r["clip_fraction"] == 0           # one update on all of it: nothing moved before
        assert all(np.isfinite(r[key]).all() for key in ("rewards", "normalised", "kl", "policy_loss", "value_loss",
                                                         "explained_variance", "grad_norm"))
        assert r["length"] == np.mean([len(y) for y in responses]) and 0 <= r["finished"] <= 1
        assert r["weights"] is None and r["ideal"] is None and r["ptx"] == 0
    assert records[0]["kl"] == 0 and records[0]["explained_variance"] == 0
    assert all(r["kl"] != 0 for r in records[2:])
    assert len({json.dumps(r["lam"]) for r in records}) == 4


def test_losses_of_the_first_step_in_closed_form(panacea):
    run, sampled, _ = panacea
    record, (r, decay) = metrics(run)[0], first_step(sampled)
    assert len({tuple(x) for x in r.tolist()}) >= 3      # or the order of responses would not matter
    assert record["normalised"] == pytest.approx(r.mean(0).tolist(), rel=1e-9)
    lam, tokens = np.repeat(record["lam"], 4, axis=0), sum(map(len, decay))          # λ of a prompt for its 4 responses
    expected = -sum((R * d).sum() for R, d in zip((lam * r.numpy()).sum(1), decay)) / tokens
    assert record["policy_loss"] == pytest.approx(expected, rel=1e-4)
    tiled = -sum((R * d).sum() for R, d in zip((np.tile(record["lam"], (4, 1)) * r.numpy()).sum(1), decay)) / tokens
    by_rows = -np.mean([(R * d).mean() for R, d in zip((lam * r.numpy()).sum(1), decay)])
    for wrong in (tiled, by_rows):                       # λ of the other prompt; each response's own mean first
        assert abs(wrong - expected) > 0.01 * abs(expected)
    assert record["objective"] == pytest.approx((lam * r.numpy()).sum(1).mean(), rel=1e-6)       # R_λ; KL is 0
    value_loss = 0.5 * sum(((R * d) ** 2).sum() for row, d in zip(r.tolist(), decay) for R in row) / tokens / 2
    assert record["value_loss"] == pytest.approx(value_loss, rel=1e-4)               # at V = 0, for both heads


def test_kl_of_a_later_step(panacea):
    """Step 3 samples with the adapter of the snapshot after step 2: its KL, one response after the other."""
    run, sampled, _ = panacea
    record, (prompts, responses) = metrics(run)[2], sampled[2]
    base = Transformer.from_pretrained(config_of(run)["base"])
    model = Transformer.from_pretrained(config_of(run)["base"])
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
    assert abs(estimate(record["lam"]) - record["kl"]) > 0.1 * abs(record["kl"])


def test_one_preference_a_prompt_from_rollout_to_update(panacea):
    run, sampled, preferences = panacea
    for step, record in enumerate(metrics(run)):
        rollout, *others = preferences[3 * step:3 * step + 3]
        lam = torch.tensor(record["lam"])
        assert torch.equal(rollout, lam.repeat_interleave(4, dim=0)) and all(torch.equal(x, lam) for x in others)
        assert not torch.equal(lam[0], lam[1])
        prompts = sampled[step][0]
        assert prompts[0] == prompts[3] != prompts[4] == prompts[7]                  # K = 4 responses to each
    assert len(preferences) == 12


def test_same_seed_same_adapter(mini, panacea):
    again, other = go("again", steps=4, lr=8e-3, critic_iters=1), go("other", seed=1)
    adapter = lambda run: (run / "adapter.safetensors").read_bytes()
    assert adapter(again) == adapter(panacea[0]) != adapter(other)
    timeless = lambda run: [{k: v for k, v in r.items() if "second" not in k} for r in metrics(run)]
    assert timeless(again) == timeless(panacea[0])


def test_preferences_a_rollout(mini):
    run = go("one", lams_per_step=1, batch_size=16)
    assert all(len({tuple(lam) for lam in r["lam"]}) == 1 and len(r["lam"]) == 4 for r in metrics(run))


def test_second_passes_move_the_ratio(mini):
    record = metrics(go("passes", update_iters=3, lr=1e-2, warmup_ratio=0.0))
    assert all(r["first_ratio"] == 1 and r["moved"] != 0 for r in record)
    assert max(r["clip_fraction"] for r in record) > 0
    halves = metrics(go("halves", minibatch=4))
    assert all(r["first_ratio"] == 1 and r["moved"] != 0 for r in halves)            # the second half: one step later


def test_baselines(mini):
    soups = go("rs", method="rs", steps=4)
    assert {f.name for f in soups.glob("adapter*")} == {"adapter-helpful.safetensors", "adapter-harmless.safetensors"}
    assert [(r["member"], r["step"]) for r in metrics(soups)] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert [r["lam"] for r in metrics(soups)] == [[[1, 0]] * 2] * 2 + [[[0, 1]] * 2] * 2
    single = go("dps", method="dps", lam=[0.25, 0.75])
    assert [f.name for f in single.glob("adapter*")] == ["adapter-000.safetensors"]
    assert all(r["lam"] == [[0.25, 0.75]] * 2 for r in metrics(single))
    lattice = go("lattice", method="dps", dps_parts=2)
    assert [r["lam"][0] for r in metrics(lattice)] == [[0, 1], [0.5, 0.5], [1, 0]] and config_of(lattice)["models"] == 3
    # as long as λ is no input there is no singular value for it: rank k + 1 against k + m
    sigma = lambda f: next(v for k, v in load_file(f).items() if k.endswith("sigma")).shape
    assert sigma(single / "adapter-000.safetensors") == (9,) and sigma(mini / "out/ls/adapter.safetensors") == (8,)


def test_tchebycheff(mini, panacea):
    run = go("tche", aggregate="tche", critic_iters=1)
    record, (r, decay) = metrics(run)[0], first_step(panacea[1])                     # one seed: the same sample
    z = world_ideal(world_rewards(["helpful", "harmless"], None))
    assert config_of(run)["flags"]["ideal"] == pytest.approx(z.tolist()) == metrics(run)[-1]["ideal"]
    lam = np.repeat(record["lam"], 4, axis=0)
    R = -(lam * (z - r).numpy()).max(1)
    expected = -sum((x * d).sum() for x, d in zip(R, decay)) / sum(map(len, decay))
    assert record["policy_loss"] == pytest.approx(expected, rel=1e-4)
    linear = metrics(panacea[0])[0]["policy_loss"]
    assert abs(linear - expected) > 0.01 * abs(expected)
    assert record["normalised"] == metrics(panacea[0])[0]["normalised"]
    own = go("tche-own", aggregate="tche", ideal=[5.0, 5.0], smooth=0.5, critic_iters=1)
    R = -0.5 * np.log(np.exp(lam * (5 - r.numpy()) / 0.5).sum(1))
    expected = -sum((x * d).sum() for x, d in zip(R, decay)) / sum(map(len, decay))
    assert metrics(own)[0]["policy_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("aggregate, reading", [("pama", "V"), ("pama", "T"), ("pama", "S"), ("mgda", "V")])
def test_without_a_preference(mini, panacea, aggregate, reading):
    run = go(f"{aggregate}-{reading}", aggregate=aggregate, pama_reading=reading)
    flags, records = config_of(run)["flags"], metrics(run)
    assert flags["method"] == "dps" and flags["lam"] == [0.5, 0.5]
    assert [f.name for f in run.glob("adapter*")] == ["adapter-000.safetensors"]
    for r in records:
        assert r["first_ratio"] == 1 and np.isfinite([r["policy_loss"], r["kl"], r["grad_norm"]]).all()
        if reading == "T":
            assert r["weights"] is None
        else:
            assert min(r["weights"]) >= 0 and sum(r["weights"]) == pytest.approx(1)
    r, decay = first_step(panacea[1])
    A = [np.concatenate([x * d for x, d in zip(column, decay)]) for column in r.T.tolist()]
    positive = np.maximum(A, 0)                                                      # Noon
    if aggregate == "mgda":
        loss = -(np.array(records[0]["weights"]) @ A).mean()
    elif reading == "T":
        loss = -positive.min(0).mean()
    else:
        c = (min_norm_weights(torch.tensor(positive @ positive.T)).numpy() if reading == "V" else
             np.eye(2)[positive.mean(1).argmin()])
        assert records[0]["weights"] == pytest.approx(c.tolist(), abs=1e-4)
        loss = -(c @ positive).mean()
    assert records[0]["policy_loss"] == pytest.approx(loss, rel=1e-4) and abs(loss) > 1e-3


def test_ppo_learns_and_follows_the_preference(mini):
    """Twenty steps: each vertex has the higher reward of its own dimension, and more of it than the base has."""
    run = go("learns", dims=["formal", "encouraging"], steps=20, batch_size=48, samples=8, vertex_share=1.0, lr=4e-3)
    config = config_of(run)
    model, tokenizer = Transformer.from_pretrained(config["base"]), load_tokenizer("toy")
    data = measure.WorldRewards(world_rewards(config["dims"], None), tokenizer, "cpu")
    data.reference(model)
    base = data.measure(model, 0.2)
    load_adapter(model, run / "adapter.safetensors", config["dims"])
    ends = []
    for lam in ([1.0, 0.0], [0.0, 1.0]):
        set_preference(model, torch.tensor(lam))
        ends.append(data.measure(model, 0.2))
    for i in (0, 1):
        assert ends[i]["scores"][i] > base["scores"][i] + 0.2                        # wrong: a sign
        assert ends[i]["J"][i] > base["J"][i] + 0.05
        assert ends[i]["scores"][i] > ends[1 - i]["scores"][i] + 0.2                 # wrong: λ does nothing


# ---- evaluation ----

def test_evaluation_on_the_world(mini, panacea):
    runs = [panacea[0], *(go(f"eval-{name}", **flags) for name, flags in
                          {"rs": dict(method="rs", steps=4), "pama": dict(aggregate="pama")}.items())]
    results = eval_front.main(eval_front.Flags(runs=[str(run) for run in runs], parts=2, device="cpu", out="out/all"))
    for run, result, count in zip(runs, results, (3, 3, 1)):
        r = json.loads((run / "front.json").read_text())
        assert r["J"] == result["J"] and np.shape(r["J"]) == np.shape(r["scores_se"]) == (count, 2)
        assert r["lams"] == ([[0, 1], [0.5, 0.5], [1, 0]] if count == 3 else [[0.5, 0.5]])
        assert 0 <= r["hypervolume_share"] <= 1 and r["points_are"] == "normalised J"
        assert r["script"] == "train_ppo.py" and r["beta"] == 0.2 and r["eval_labels"] is None
        for key in ("kl", "outside_mass", "length", "ended", "collapsed"):
            assert len(r[key]) == count and np.isfinite(r[key]).all()
        assert r["base"]["kl"] == 0 and 0 < r["base"]["outside_mass"] < 0.3 and "texts" not in r["base"]
        assert min(r["outside_mass"]) > 0 and max(r["outside_mass"]) < 1
        assert len(r["exact"]["lams"]) == 101 and "logps" not in r["exact"] and "samples" not in r
        # no policy is above the exact front for its own λ
        for lam, J in zip(r["lams"], r["J"]):
            best = r["exact"]["J"][[[round(x, 6) for x in l] for l in r["exact"]["lams"]].index(lam)]
            assert np.dot(lam, J) < np.dot(lam, best)
        samples = json.loads((run / "samples.json").read_text())
        assert np.shape(samples["raw"]) == (count, 16, 2) and np.shape(samples["texts"]) == (count, 4)
        assert np.shape(samples["base"]["raw"]) == (16, 2)
        for picture in ("front.png", "histograms.png"):
            assert (run / picture).stat().st_size > 10_000
    assert len(json.loads((mini / "out/all/front.json").read_text())) == 3 and (mini / "out/all/front.png").exists()


def test_evolution(mini, panacea):
    results = eval_front.main(eval_front.Flags(runs=[str(panacea[0])], parts=1, evolution=True, device="cpu"))
    stored = json.loads((panacea[0] / "evolution.json").read_text())
    assert stored["steps"] == [2, 4] and len(results) == 2 and results[0]["J"] != results[1]["J"]


def test_stationarity_of_runs(mini, panacea):
    soups = go("soups", method="rs", steps=2)
    results = eval_front.main(eval_front.Flags(runs=[str(panacea[0]), str(soups)], stationarity=True, device="cpu"))
    data = measure.WorldRewards(world_rewards(["helpful", "harmless"], None),
                                load_tokenizer("toy"), "cpu")
    model = Transformer.from_pretrained("out/base-tiny-seed0")
    data.reference(model)
    norm, c, single = data.stationarity(model, 0.2)
    for run, result in zip((panacea[0], soups), results):
        assert json.loads((run / "stationarity.json").read_text()) == json.loads(json.dumps(result))
        assert len(result["before"]) == 1 and len(result["after"]) == 3              # a model, or soup, for each of 3 λ
        assert result["before"][0][0] == pytest.approx(norm, rel=1e-5) and 0 < norm <= min(single)
        assert all(0 < after[0] != norm and sum(after[1]) == pytest.approx(1) for after in result["after"])
    assert len({after[0] for after in results[0]["after"]}) == 3


@pytest.fixture(scope="module")
def judge(mini):
    """The directory of a reward model with two dimensions, nearly untrained."""
    return train_reward.main(train_reward.Flags(size="tiny", steps=5, rows=16, responses=4, n_reference=32, eval=False,
                                                device="cpu", out="out/judge"))


@pytest.mark.parametrize("aggregate", ["ls", "tche"])
def test_reward_models_are_evaluated_by_the_true_rewards(mini, judge, aggregate):
    run = go(f"judged-{aggregate}", rewards=[str(judge)], aggregate=aggregate, max_new_tokens=16)
    config, records = config_of(run), metrics(run)
    assert config["rewards"] == {"mean": [0, 0], "std": [1, 1], "scale": [1, 1]}     # a reward model brings its own
    assert config["dims"] == ["helpful", "harmless"] and records[0]["kl"] == 0
    assert all(r["first_ratio"] == 1 and r["rewards"] == r["normalised"] for r in records)
    (r,) = eval_front.main(eval_front.Flags(runs=[str(run)], parts=1, device="cpu"))
    assert r["points_are"] == "normalised J" and 0 <= r["hypervolume_share"] <= 1
    data = measure.WorldRewards(world_rewards(r["dims"], None), load_tokenizer("toy"), "cpu")
    model = Transformer.from_pretrained(config["base"])
    data.reference(model)
    assert r["base"]["J"] == pytest.approx(data.measure(model, r["beta"])["J"], rel=1e-6)


def test_one_dimension_of_a_reward_model(mini, judge):
    run = go("mixed", rewards=[f"{judge}:harmless", "length"], reward_scale=[5.0, 1.0], reference_samples=16)
    known = config_of(run)["rewards"]
    assert config_of(run)["dims"] == ["harmless", "length"] and known["scale"] == [5, 1]
    assert known["mean"][0] == 0 and known["mean"][1] > 0.3
    for r in metrics(run):
        assert r["normalised"][0] == pytest.approx(5 * r["rewards"][0])
    with pytest.raises(UserError, match="has the dimensions helpful harmless"):
        named_rewards([f"{judge}:warm", "length"], None, None, "cpu")


# ---- bad input ----

BAD = {
    "prompts without a base": (dict(prompts=["x.txt"], rewards=["sad", "length"]), "--prompts needs --init"),
    "prompts without rewards": (dict(prompts=["x.txt"], init="out/base-tiny-seed0"), "needs --init and --rewards"),
    "a base without prompts": (dict(init="elsewhere", rewards=["sad", "length"]), "--init needs --prompts"),
    "lam off the simplex": (dict(method="dps", lam=[0.7, 0.7]), "sums to 1"),
    "lam of the wrong length": (dict(method="dps", lam=[0.5, 0.3, 0.2]), "--lam takes 2 numbers"),
    "lam for panacea": (dict(lam=[0.5, 0.5]), "--lam is the one preference"),
    "minibatch not divisible": (dict(minibatch=6), "--minibatch 6 must be a multiple of --samples 4"),
    "batch not divisible": (dict(batch_size=10), "--batch_size 10 must be a multiple"),
    "prompts not divisible": (dict(lams_per_step=3), "one of --lams_per_step 3"),
    "pama with a method": (dict(aggregate="pama", method="rs"), "--aggregate pama trains one policy"),
    "mgda with a preference": (dict(aggregate="mgda", lam=[0.5, 0.5]), "--lam"),
    "ideal without tche": (dict(ideal=[1.0, 1.0]), "belong to --aggregate tche"),
    "smooth without tche": (dict(smooth=0.1), "belong to --aggregate tche"),
    "ideal of the wrong length": (dict(aggregate="tche", ideal=[1.0]), "--ideal takes 2 numbers"),
    "unknown reward": (dict(rewards=["length", "joyful"]), "joyful is not a finished run"),
    "one reward": (dict(rewards=["length"]), "name two rewards"),
    "the same reward twice": (dict(rewards=["length", "length"]), "must all differ"),
    "a reward that never changes": (dict(rewards=["length", "concise"]), "PPO would find no signal"),
    "one dimension": (dict(pref_dim=1), "at least 2 dimensions"),
    "unknown dimension": (dict(dims=["helpful", "kind"]), "choose each once among"),
    "scale not positive": (dict(reward_scale=[1.0, 0.0]), "--reward_scale takes positive"),
    "no room for a prompt": (dict(max_new_tokens=256), "--max_new_tokens 256 leave no room"),
    "too few steps": (dict(method="dps", steps=10), "shared by 11 models"),
    "no β": (dict(kl_coeff=0.0), "--kl_coeff 0.0: must be positive"),
    "gae_lambda": (dict(gae_lambda=1.5), "--gae_lambda 1.5: must be between 0 and 1"),
    "no such file": (dict(prompts=["nowhere.txt"], init="out/base-tiny-seed0", rewards=["sad", "length"]),
                     "nowhere.txt: cannot be read"),
    "a directory of something else": (dict(out="out/base-tiny-seed0"), "holds no run of train_ppo.py"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_writes_nothing(mini, case):
    flags, message = BAD[case]
    before = sorted(mini.rglob("*"))
    with pytest.raises(UserError) as error:
        train_ppo.main(train_ppo.Flags(**SMALL | dict(out="out/bad") | flags))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert sorted(mini.rglob("*")) == before


def test_too_few_prompts_to_hold_out(mini):
    """A standard error needs two of them."""
    rows = [{"prompt": f"How do I clean a bicycle number {i}?"} for i in range(60)]
    dump = lambda kept: (mini / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    dump(rows)
    out = {row.prompt for row in split(read_prompts("few.jsonl")[0])[1]}
    held = [row for row, read in zip(rows, read_prompts("few.jsonl")[0]) if read.prompt in out]
    dump([row for row in rows if row not in held][:20] + held[:1])
    with pytest.raises(UserError, match="too few prompts"):
        go("few", prompts=["few.jsonl"], init="out/base-tiny-seed0", rewards=["length", "narrative"])


def test_ptx_needs_texts(mini):
    rows = [{"prompt": f"How do I clean a bicycle number {i}?"} for i in range(40)]
    (mini / "bare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="ptx_coeff"):
        go("bare", prompts=["bare.jsonl"], init="out/base-tiny-seed0", rewards=["length", "narrative"], ptx_coeff=0.1)
    assert not (mini / "out/bare").exists()


def test_command_line(mini):
    done = script("train_ppo.py", "--lam", 0.7, 0.7, "--method", "dps", "--out", "out/bad", cwd=mini, status=2)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: --lam 0.7 0.7")
    assert not (mini / "out/bad").exists()


# ---- killed runs ----

def test_a_killed_run_resumes_bit_for_bit_with_its_ideal(mini):
    """Tchebycheff on text rewards: z is the largest reward so far, so it must come back with adapter and critic."""
    flags = ("--rewards length narrative --aggregate tche --batch_size 8 --samples 4 --max_new_tokens 24 --steps 12 "
             "--save_every 3 --reference_samples 16 --seed 6 --size tiny --device cpu --no-eval --snapshots 1").split()
    script("train_ppo.py", *flags, "--out", "out/whole", cwd=mini)
    run = mini / "out/killed"
    process = subprocess.Popen([sys.executable, str(ROOT / "train_ppo.py"), *flags, "--out", "out/killed"], cwd=mini,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not ((run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= 7):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (run / "state.safetensors").exists() and not (run / "timing.json").exists()
    done = script("train_ppo.py", *flags, "--out", "out/killed", cwd=mini)
    assert "continuing after step" in done.stdout
    timeless = [[{k: v for k, v in r.items() if "second" not in k} for r in metrics(mini / "out" / name)]
                for name in ("whole", "killed")]
    assert timeless[0] == timeless[1] and [r["step"] for r in timeless[1]] == list(range(1, 13))
    a, b = (load_file(mini / "out" / name / "adapter.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(a[k], b[k]) for k in a) and not (run / "state.safetensors").exists()
    ideals = np.array([r["ideal"] for r in timeless[0]])
    assert (np.diff(ideals, axis=0) >= 0).all() and (ideals[-1] > ideals[0]).any()
    assert (ideals[6] == ideals[5]).all() and (ideals[9] == ideals[8]).all()         # and is older than a resumption


# ---- stories ----

@pytest.mark.skipif(not STORIES.exists(), reason="../shared (the tiny Llama and the stories) is not here")
def test_text_rewards_on_stories(mini, capsys, monkeypatch):
    text = STORIES.read_text(encoding="utf-8")
    (mini / "stories.txt").write_text(text[:40_000], encoding="utf-8")
    sampled, generate = [], train_ppo.generate
    monkeypatch.setattr(train_ppo, "generate",
                        lambda *a, **k: sampled.append((a[1], generate(*a, **k))) or sampled[-1][1])
    run = go("stories", init=str(LLAMA), prompts=["stories.txt"], rewards=["dialogue", "narrative"], eos_id=1,
             max_new_tokens=16, samples=None, kl_coeff=None, ptx_coeff=0.1, steps=2,
             reference_samples=32)
    records, config = metrics(run), config_of(run)
    assert all(r["first_ratio"] == 1 and 0.5 < r["ptx"] < 6 and np.isfinite(r["rewards"]).all() for r in records)
    assert records[0]["kl"] == 0 and np.shape(records[0]["lam"]) == (8, 2)           # K = 1: a λ for every response
    assert config["flags"]["kl_coeff"] == 0.02
    # the rewards' mean and deviation are those of the base model's own responses, sampled before the first step
    tokenizer, names = replace(load_tokenizer(str(LLAMA)), eos_id=1), ["dialogue", "narrative"]
    assert len(sampled) == 4 + 2 and all(len(y) <= 16 for _, responses in sampled for y in responses)
    prompts, responses = ([x for part in sampled[:4] for x in part[i]] for i in (0, 1))
    raw = text_rewards(names, [tokenizer.decode(x[1:]) for x in prompts], spoken(responses, tokenizer)[0])   # less BOS
    assert config["rewards"]["mean"] == pytest.approx(raw.mean(0).tolist(), rel=1e-9)
    assert config["rewards"]["std"] == pytest.approx(raw.std(0).tolist(), rel=1e-9) and raw.std(0).min() > 0
    capsys.readouterr()
    (result,) = eval_front.main(eval_front.Flags(runs=[str(run)], parts=1, device="cpu"))
    printed = capsys.readouterr().out
    r = json.loads((run / "front.json").read_text())
    assert r["lams"] == [[0, 1], [1, 0]] and r["points_are"] == "normalised mean reward" and r["exact"] is None
    assert r["hypervolume_share"] is None and min(min(x) for x in r["scores_se"]) >= 0
    assert f"{r['scores'][0][1]:.3f} ± {r['scores_se'][0][1]:.3f}" in printed and f"{r['told'][1]:6.3f}" in printed
    assert all(0.5 < x < 6 for x in [*r["told"], r["base"]["told"]])                 # nats a token
    assert r["base"]["kl"] == pytest.approx(0, abs=1e-4)
    raw = torch.tensor(result["samples"]["base"]["raw"], dtype=torch.float64)
    rewards = Rewards(names, None, **config["rewards"])
    assert r["base"]["points"] == pytest.approx(rewards.normalise(raw).mean(0).tolist(), rel=1e-6)
    by_prompt = raw.view(-1, 4, 2).mean(1)
    assert r["base"]["scores_se"] == pytest.approx((by_prompt.std(0) / len(by_prompt) ** 0.5).tolist(), rel=1e-6)
    # told: the base model's nats a token on what the held-out stories really go on with
    held_out = split(read_prompts("stories.txt", 12)[0])[1]
    model, nats, count = Transformer.from_pretrained(LLAMA), 0.0, 0
    for row in tokenize(held_out, tokenizer, 512)[0]:
        (y,) = row.responses
        logps = model(torch.tensor([row.prompt + y]))[0, len(row.prompt) - 1:-1].log_softmax(-1)
        nats, count = nats - logps[torch.arange(len(y)), torch.tensor(y)].sum().item(), count + len(y)
    assert r["base"]["told"] == pytest.approx(nats / count, rel=1e-4) and len(held_out) >= 2
