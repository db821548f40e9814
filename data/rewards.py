"""rewards.py - where PPO's rewards come from: the embedded world, trained reward models, or short text rewards.

    --rewards happy concise                    # text rewards of data/rewards.py, by name
    --rewards out/reward-a                     # every dimension of a reward model that train_reward.py wrote
    --rewards out/reward-a:harmless length     # one dimension of it, beside a text reward
    --rewards helpful harmless concise:12      # on the embedded world: its own scores, and a text reward of 12 words

B: responses   m: dimensions   raw: (B, m), in a source's own units   r = scale · (raw − mean) / std: what PPO sees
mean and std are those of the reference policy's own responses, measured once, stored with the run and used ever after:
so λ weighs rewards of one spread. scale (--reward_scale) is on top, like the paper's ×5 for harmlessness.
"""
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Callable

import torch

from runs.files import UserError
from data import toy
from data.text_rewards import TEXT_REWARDS, is_concise, text_rewards


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


def of_world(names):
    """Whether all of --rewards are functions on the embedded world: its dimensions, or concise:WORDS. None is."""
    return names is None or all(name in toy.DIMS or is_concise(name) for name in names)


def world_rewards(names, scale):
    """The embedded world's scores of dimensions, or text rewards of its responses (concise:12); mean and std are exact,
    over the world's own distribution on the train prompts.

    A response that is not one of the world's, or was cut off before its end, has the score toy.OUTSIDE everywhere.
    """
    def raw(prompts, responses, finished):
        ended = [y if end else "" for y, end in zip(responses, finished)]             # "" is not of the world either
        r = torch.cat([toy.scores(x.removesuffix("\n"), [y for _, y in same])                          # (B, 10)
                       for x, same in groupby(zip(prompts, ended), key=itemgetter(0))])
        outside = (r == toy.OUTSIDE).all(1)
        return torch.stack([r[:, toy.DIMS.index(name)] if name in toy.DIMS else
                            torch.where(outside, toy.OUTSIDE, text_rewards([name], prompts, ended)[:, 0])
                            for name in names], dim=1)

    rewards = Rewards([name.partition(":")[0] for name in names], raw, [0.0] * len(names), [1.0] * len(names),
                      scale or [1.0] * len(names))
    p = torch.stack([toy.base_probs(x) for x in toy.prompts("train")])[..., None] / len(toy.prompts("train"))
    scores = world_scores(rewards, toy.prompts("train"))                              # (X, S, m)
    mean = (p * scores).sum((0, 1))
    std = (p * (scores - mean).square()).sum((0, 1)).sqrt()
    return replace(rewards, mean=mean.tolist(), std=std.tolist())


def world_scores(rewards, prompts):
    """Raw rewards of all responses of the embedded world to `prompts`. (X, S, m)"""
    S = toy.N_RESPONSES
    return torch.stack([rewards.raw([x] * S, toy.responses(x), [True] * S) for x in prompts])


def world_ideal(rewards, split="train"):
    """The largest normalised reward z_i of each dimension over the world's responses, Eq. (13). (m,)"""
    return rewards.normalise(world_scores(rewards, toy.prompts(split)).flatten(0, 1)).amax(0)


def named_rewards(names, scale, policy, device):
    """The sources of --rewards side by side. A reward model brings its own statistics; text rewards leave them open.

    policy: the Transformer in use; a reward model on the same base shares its frozen weights. Raises UserError.
    """
    dims, parts, mean, std = [], [], [], []
    for name in names:
        if name in TEXT_REWARDS or is_concise(name):
            dims, mean, std = dims + [name.partition(":")[0]], mean + [None], std + [None]
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
