"""test_heads.py - the critic of PPO, and what a reward model's heads read."""
import pytest
import torch

from data.tokenizers import TokenRow
from data.trees import pack_ends
from ops.heads import Critic, RewardModel
from svd_lora import inject_svd_lora, svd_lora_layers

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
    trained(critic, states, lam, torch.ones(40, 5, 3), steps=2)        # the first moves the last layer alone
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
    assert errors[0] < 0.1 and errors[1] < 0.2 and errors[2] < 0.03    # wrong: without λ, the state, the earlier ones
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
    assert torch.equal(clean[:, :3], slipped[:, :3])                   # wrong: V_t that knows the token y_t itself
    assert not torch.isclose(clean[:, 3:], slipped[:, 3:]).any(-1).all(-1).any()      # and not of the last token alone


# ---- reward models ----

ROWS = [TokenRow([5, 6], [[7, 8, 60], [7, 9], [7]]), TokenRow([4], [[3, 60], [3, 0, 0, 0, 60], [0], []]),
        TokenRow([11, 12, 13], [[60]])]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_reward_depends_on_its_own_tokens_alone(tiny, close, family):
    """Alone, right-padded among others, and in a tree. Rules out: reading the last column (which may be padding), the
    position before the last token, a tree without EOS."""
    g = torch.Generator().manual_seed(5)
    model = RewardModel(inject_svd_lora(tiny(family), 3, 0, 4.0, generator=g), 2)     # adapter and heads are random too
    for layer in svd_lora_layers(model).values():
        torch.nn.init.normal_(layer.sigma.data, generator=g)
    torch.nn.init.normal_(model.head.weight.data, generator=g)
    sequences = [row.prompt + y for row in ROWS for y in row.responses]
    alone = torch.cat([model(torch.tensor([s]), torch.tensor([len(s) - 1])) for s in sequences])
    T = max(map(len, sequences))
    padded = torch.tensor([s + [9] * (T - len(s)) for s in sequences])
    lengths, offset = torch.tensor([len(s) for s in sequences]), torch.arange(len(sequences)) * T
    assert close(model(padded, offset + lengths - 1), alone, 1e-5)
    batch, last = pack_ends(ROWS)
    assert close(model(batch.tokens, last, batch.positions, batch.mask), alone, 1e-5)
    for wrong in (offset + T - 1, offset + lengths.clamp(min=2) - 2):                 # this test can tell
        assert not close(model(padded, wrong), alone, 0.1)
