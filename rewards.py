"""rewards.py - where PPO's rewards come from: the embedded world, trained reward models, or short text rewards.

    --rewards happy concise                    # text rewards of data/rewards.py, by name
    --rewards out/reward-a                     # every dimension of a reward model that train_reward.py wrote
    --rewards out/reward-a:harmless length     # one dimension of it, beside a text reward

B: responses   m: dimensions   raw: (B, m), in a source's own units   r = scale · (raw − mean) / std: what PPO sees
mean and std are those of the reference policy's own responses, measured once, stored with the run and used ever after:
so λ weighs rewards of one spread. scale (--reward_scale) is on top, like the paper's ×5 for harmlessness.
"""
from dataclasses import dataclass
from typing import Callable

import torch

from common import UserError
from data import toy
from data.rewards import TEXT_REWARDS, text_rewards


@dataclass
class Rewards:
    """raw(prompts, responses, finished) -> (B, m) float64 CPU tensor; mean, std, scale: lists of m floats."""
    dims: list[str]
    raw: Callable
    mean: list[float | None]        # None: still to be measured
    std: list[float | None]
    scale: list[float]

    def normalise(self, raw):
        """raw (…, m) -> r (…, m) in the same dtype: scale · (raw − mean) / std"""
        mean, std, scale = (torch.tensor(x, dtype=raw.dtype) for x in (self.mean, self.std, self.scale))
        return scale * (raw - mean) / std


def world_rewards(dims, scale):
    """The embedded world's scores of `dims`; mean and std are exact, over its own distribution on the train prompts.

    A response that is not one of the world's, or was cut off before its end, has the score toy.OUTSIDE everywhere.
    """
    columns = [toy.DIMS.index(dim) for dim in dims]

    def raw(prompts, responses, finished):
        ended = [y if end else "" for y, end in zip(responses, finished)]             # "" is not of the world either
        return torch.cat([toy.scores(x.removesuffix("\n"), [y]) for x, y in zip(prompts, ended)])[:, columns]

    p = torch.stack([toy.base_probs(x) for x in toy.prompts("train")])[..., None] / len(toy.prompts("train"))
    scores = torch.stack([toy.scores(x, toy.responses(x)) for x in toy.prompts("train")])[..., columns]
    mean = (p * scores).sum((0, 1))
    std = (p * (scores - mean).square()).sum((0, 1)).sqrt()
    return Rewards(dims, raw, mean.tolist(), std.tolist(), scale or [1.0] * len(dims))


def world_ideal(rewards, split="train"):
    """The largest normalised reward z_i of each dimension over the world's responses, Eq. (13). (m,)"""
    columns = [toy.DIMS.index(dim) for dim in rewards.dims]
    scores = torch.cat([toy.scores(x, toy.responses(x)) for x in toy.prompts(split)])[:, columns]
    return rewards.normalise(scores).amax(0)


def named_rewards(names, scale, policy, device):
    """The sources of --rewards side by side. A reward model brings its own statistics; text rewards leave them open.

    policy: the Transformer in use; a reward model on the same base shares its frozen weights. Raises UserError.
    """
    dims, parts, mean, std = [], [], [], []
    for name in names:
        if name in TEXT_REWARDS:
            dims, mean, std = dims + [name], mean + [None], std + [None]
            parts.append(lambda x, y, end, name=name: text_rewards([name], x, y))
            continue
        from train_reward import load_reward_model                                    # it trains too: only on demand
        directory, _, dim = name.partition(":")
        judge, judged = load_reward_model(directory, policy, device)
        if dim and dim not in judged:
            raise UserError(f"--rewards {name}: that reward model has the dimensions {' '.join(judged)}")
        columns = [judged.index(dim)] if dim else list(range(len(judged)))
        dims, mean, std = dims + [judged[i] for i in columns], mean + [0.0] * len(columns), std + [1.0] * len(columns)
        parts.append(lambda *args, judge=judge, columns=columns: judge(*args)[:, columns].double())
    if len(set(dims)) < len(dims):
        raise UserError(f"--rewards {' '.join(names)}: the dimensions {' '.join(dims)} must all differ")
    return Rewards(dims, lambda *args: torch.cat([part(*args) for part in parts], dim=1), mean, std,
                   scale or [1.0] * len(dims))
