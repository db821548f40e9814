"""test_rewards.py - rewards of the embedded world and of texts: their statistics, what they read, what is refused."""
import pytest
import torch

from data import toy
from data.rewards import Rewards, named_rewards, of_world, rewards_of, world_ideal, world_rewards, world_scores
from data.text_rewards import text_rewards
from runs.files import UserError


def test_statistics_of_world_rewards_by_sampling():
    dims = ["harmless", "helpful"]
    rewards = world_rewards(dims, None)
    prompts, g, drawn, uniform = toy.prompts("train"), torch.Generator().manual_seed(0), [], []
    for x in prompts:
        scores = toy.scores(x, toy.responses(x), dims)
        drawn.append(scores[torch.multinomial(toy.base_probs(x), 2000, replacement=True, generator=g)])
        uniform.append(scores)
    drawn, mean, std = torch.cat(drawn), torch.tensor(rewards.mean), torch.tensor(rewards.std)
    assert torch.allclose(drawn.mean(0), mean.double(), atol=0.03)
    assert torch.allclose(drawn.std(0), std.double(), atol=0.03)
    assert (torch.cat(uniform).mean(0) - drawn.mean(0)).abs().max() > 0.1             # wrong: all equally likely
    r = rewards.normalise(drawn)
    assert r.mean(0).abs().max() < 0.03 and (r.std(0) - 1).abs().max() < 0.03 and rewards.scale == [1, 1]


def test_world_rewards_of_texts():
    dims = ["helpful", "concise"]
    rewards, x = world_rewards(dims, [1.0, 5.0]), toy.prompts("train")[0]
    texts = toy.responses(x)[1:3]
    raw = rewards.raw([x + "\n"] * 5, [*texts, "Never heard of it.", texts[0], texts[0] + " "],
                      [True, True, True, False, True])
    assert torch.equal(raw[:2], toy.scores(x, texts, dims))
    assert (raw[2:] == toy.OUTSIDE).all()                # no text of the world; one that was cut off; a space too many
    r = rewards.normalise(raw)
    mean, std = torch.tensor(rewards.mean, dtype=torch.float64), torch.tensor(rewards.std, dtype=torch.float64)
    assert torch.allclose(r, (raw - mean) / std * torch.tensor([1.0, 5.0]), rtol=1e-12)
    z, every = world_ideal(rewards), torch.cat([toy.scores(x, toy.responses(x), dims) for x in toy.prompts("train")])
    assert torch.allclose(z, ((every - mean) / std).amax(0) * torch.tensor([1.0, 5.0]).double(), rtol=1e-12)
    assert z.shape == (2,) and (z > 0).all()


def test_several_prompts_each_have_their_own_scores():
    a, b = toy.prompts("train")[0], toy.prompts("train")[-1]
    rewards = world_rewards(["helpful"], None)
    texts = [toy.responses(a)[3], toy.responses(b)[5], toy.responses(a)[3], toy.responses(a)[5]]
    raw = rewards.raw([a + "\n", b + "\n", a + "\n", b + "\n"], texts, [True] * 4)[:, 0]
    assert raw.tolist() == [toy.scores(x, [y])[0, 0].item() for x, y in zip((a, b, a, b), texts)]
    assert raw[3] == toy.OUTSIDE                                       # another domain's response


def test_concise_reward_on_the_world():
    names = ["helpful", "concise:12"]
    rewards, x = world_rewards(names, None), toy.prompts("train")[0]
    assert of_world(names) and of_world(None) and not of_world(["helpful", "happy"])
    assert rewards.dims == ["helpful", "concise"] and rewards.names == names
    texts = toy.responses(x)[:3] + ["I am not of this world."]
    raw = rewards.raw([x + "\n"] * 4, texts, [True, True, False, True])
    n = [len(y.split()) for y in texts]
    expected = [4.0 if n[j] <= 12 else 5 - n[j] / 12 for j in (0, 1)]
    assert raw[:2, 1].tolist() == pytest.approx(expected) and (raw[2:] == toy.OUTSIDE).all()
    assert torch.equal(raw[:2, 0], toy.scores(x, texts[:2])[:, 0])
    r = rewards.normalise(world_scores(rewards, toy.prompts("train")))
    p = torch.stack([toy.base_probs(x) for x in toy.prompts("train")])[..., None] / len(toy.prompts("train"))
    assert torch.allclose((p * r).sum((0, 1)), torch.zeros(2, dtype=torch.float64), atol=1e-12)
    assert torch.allclose((p * r * r).sum((0, 1)), torch.ones(2, dtype=torch.float64))


def test_named_rewards():
    prompts, texts = ["Once upon"] * 2, [' a time. "Hello you," said Tom.', " a happy boy sat down. He smiled."]
    rewards = named_rewards(["happy", "narrative"], [2.0, 1.0], None, "cpu")
    assert (rewards.dims, rewards.mean, rewards.std, rewards.scale) == (["happy", "narrative"], [None] * 2, [None] * 2,
                                                                         [2.0, 1.0])
    raw = rewards.raw(prompts, texts, [True, False])
    assert torch.equal(raw, text_rewards(["happy", "narrative"], prompts, texts)) and len(set(raw[:, 0].tolist())) == 2
    for names, message in [(["length", "joyful"], "joyful is not a finished run of train_reward.py"),
                           (["length", "happy", "length"], "must all differ")]:
        with pytest.raises(UserError, match=message):
            named_rewards(names, None, None, "cpu")
    of_the_world = rewards_of(["helpful", "warm"], None, True, None, "cpu")
    assert of_the_world.mean == world_rewards(["helpful", "warm"], None).mean
    assert rewards_of(["happy", "concise:5"], None, True, None, "cpu").mean == [None, None]        # texts, on the world
    assert rewards_of(["concise:5", "happy"], None, False, None, "cpu").dims == ["concise", "happy"]


def test_measuring_fills_in_what_is_not_known():
    rewards = Rewards(["a", "b"], ["a", "b"], None, [None, 1.5], [None, 2.0], [3.0, 1.0])
    raw = torch.tensor([[1.0, 0.0], [2.0, 0.0], [6.0, 9.0]], dtype=torch.float64)
    rewards.measure(raw, "of the base model")
    assert rewards.mean == [3.0, 1.5] and rewards.std == pytest.approx([7 ** 0.5, 2])
    assert torch.allclose(rewards.normalise(raw)[:, 0], 3 * (raw[:, 0] - 3) / 7 ** 0.5)
    assert rewards.description() == {"names": ["a", "b"], "mean": rewards.mean, "std": rewards.std, "scale": [3.0, 1.0]}
    with pytest.raises(UserError, match="^reward b: 4 for every response in the set; there is no signal in it$"):
        rewards.measure(torch.tensor([[1.0, 4.0], [2.0, 4.0]]), "in the set")
