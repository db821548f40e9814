"""rewards.py - where rewards come from: the embedded world, trained reward models, short text rewards, or the user's.

    --rewards happy concise                    # text rewards of data/text_rewards.py, by name
    --rewards mine.py:polite happy             # a function of the user's own (data/own_rewards.py)
    --rewards out/reward-a                     # every dimension of a reward model that train_reward.py wrote
    --rewards out/reward-a:harmless length     # one dimension of it, beside a text reward
    --rewards helpful harmless concise:12      # on the embedded world: its own scores, and a text reward of 12 words

R: responses   m: dimensions   X: prompts   S: the world's responses to a prompt
raw: (R, m), in a source's own units   r = scale · (raw − mean) / std: what a method sees
mean and std are those of the reference policy's own responses, measured once, stored with the run and used ever after:
so λ weighs rewards of one spread. scale (--reward_scale) is on top, like the paper's ×5 for harmlessness.
"""
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Callable

import torch
from safetensors.torch import load_file

from data import toy
from data.own_rewards import is_own, own_reward
from data.preferences import Row
from data.text_rewards import TEXT_REWARDS, is_concise, text_rewards
from data.tokenizers import tokenize, tokenizer_of
from data.trees import pack_ends
from model import Transformer
from ops.heads import RewardModel
from runs.directory import read_config
from runs.files import UserError, bar, read_json
from runs.processes import pick_device
from svd_lora import fingerprint, load_adapter, shared_base


@dataclass
class Rewards:
    """raw(prompts, responses, finished) -> (R, m) float64 CPU tensor; mean, std, scale: lists of m floats."""
    dims: list[str]
    names: list[str]                # as --rewards has them
    raw: Callable
    mean: list[float | None]        # None: still to be measured
    std: list[float | None]
    scale: list[float]

    def normalise(self, raw):
        """raw (…, m) -> r (…, m) in the same dtype: scale · (raw − mean) / std"""
        mean, std, scale = (torch.tensor(x, dtype=raw.dtype) for x in (self.mean, self.std, self.scale))
        return scale * (raw - mean) / std

    def measure(self, raw, where):
        """Fills in the mean and the standard deviation of rewards that bring none: those of raw (responses, m).

        Raises UserError for a reward that is the same for all of them: there is nothing to normalise, or to learn.
        """
        for i, dim in enumerate(self.dims):
            if not raw[:, i].max() > raw[:, i].min():
                raise UserError(f"reward {dim}: {raw[0, i].item():g} for every response {where}; "
                                f"there is no signal in it")
            if self.mean[i] is None:
                self.mean[i], self.std[i] = raw[:, i].mean().item(), raw[:, i].std().item()

    def description(self):
        """What config.json says of them: an evaluation uses the statistics that the run was trained with."""
        return {"names": self.names, "mean": self.mean, "std": self.std, "scale": self.scale}


def rewards_of(names, scale, on_world, policy, device):
    """The rewards that --rewards names. on_world: prompts are the embedded world's.

    policy: the Transformer in use; a reward model on the same base shares its frozen weights. Raises UserError.
    """
    if on_world and of_world(names):
        return world_rewards(names, scale)
    return named_rewards(names, scale, policy, device)


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
        r = torch.cat([toy.scores(x.removesuffix("\n"), [y for _, y in same])                # (R, all dimensions)
                       for x, same in groupby(zip(prompts, ended), key=itemgetter(0))])
        outside = (r == toy.OUTSIDE).all(1)
        return torch.stack([r[:, toy.DIMS.index(name)] if name in toy.DIMS else
                            torch.where(outside, toy.OUTSIDE, text_rewards([name], prompts, ended)[:, 0])
                            for name in names], dim=1)

    rewards = Rewards([name.partition(":")[0] for name in names], list(names), raw, None, None,
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


def world_ideal(rewards):
    """z of Eq. (13): the largest normalised reward of each dimension on the train prompts. (m,)"""
    return rewards.normalise(world_scores(rewards, toy.prompts("train")).flatten(0, 1)).amax(0)


def named_rewards(names, scale, policy, device):
    """The sources of --rewards side by side. A reward model brings its own statistics; functions leave them open."""
    dims, parts, mean, std = [], [], [], []
    for name in names:
        if name in TEXT_REWARDS or is_concise(name):
            dims, mean, std = dims + [name.partition(":")[0]], mean + [None], std + [None]
            parts.append(lambda x, y, end, name=name: text_rewards([name], x, y))
            continue
        if is_own(name):
            dims, mean, std = dims + [name.rpartition(":")[2]], mean + [None], std + [None]
            parts.append(lambda x, y, end, reward=own_reward(name): reward(x, y))
            continue
        directory, _, dim = name.partition(":")
        judge, judged = load_reward_model(directory, policy, device)
        if dim and dim not in judged:
            raise UserError(f"--rewards {name}: that reward model has the dimensions {' '.join(judged)}")
        columns = [judged.index(dim)] if dim else list(range(len(judged)))
        dims, mean, std = dims + [judged[i] for i in columns], mean + [0.0] * len(columns), std + [1.0] * len(columns)
        parts.append(lambda *args, judge=judge, columns=columns: judge(*args)[:, columns].double())
    if len(set(dims)) < len(dims):
        raise UserError(f"--rewards {' '.join(names)}: the dimensions {' '.join(dims)} must all differ")
    return Rewards(dims, list(names), lambda *args: torch.cat([part(*args) for part in parts], dim=1), mean, std,
                   scale or [1.0] * len(dims))


# ---------------------------------------------------------------------------------------------------------------------
# Trained reward models.

@torch.no_grad()
def raw_rewards(model, tokenizer, max_length, prompts, responses, finished, batch_size=32):
    """A reward model's rewards before normalisation, (R, m) fp32 on the CPU, of R texts: tokenised as training rows
    are, with EOS behind the response where it is finished. Three lists of length R: prompts as data.files.Row has them,
    str, bool."""
    rows = tokenize([Row(x, [y], [], []) for x, y in zip(prompts, responses, strict=True)], tokenizer, max_length)[0]
    for row, done in zip(rows, finished, strict=True):
        if not done and row.responses[0][-1] == tokenizer.eos_id:
            row.responses[0].pop()
    out, device = [], model.head.weight.device
    for i in bar(range(0, len(rows), batch_size), "rewards"):
        batch, last = pack_ends(rows[i:i + batch_size])
        batch = batch.to(device)
        out.append(model(batch.tokens, last.to(device), batch.positions, batch.mask).cpu())
    return torch.cat(out)


def load_reward_model(path, policy=None, device="cpu"):
    """The rewards of a finished run directory of train_reward.py -> (rewards, dims).

    rewards(prompts, responses, finished) -> (R, m) fp32 on the CPU: reward_scale_i · (raw_i − mean_i) / std_i, columns
    as dims. Prompts are as data.files.Row has them, and of turns the reward model's own template makes a
    text; responses are without EOS, finished says whether it followed.
    policy: a Transformer, with or without an adapter. Where its base is the reward model's own, that base is used, its
    weights frozen and its adapter left alone: there is no second copy of it, and `device` is the policy's. Else the
    base is read from the directory it was trained from. Raises UserError for a directory that is not a finished run.
    """
    path = Path(path)
    config = read_config(path) if (path / "reward.json").exists() else {}
    if config.get("script") != "train_reward.py":
        raise UserError(f"{path} is not a finished run of train_reward.py")
    report = read_json(path / "reward.json")
    if policy is not None and fingerprint(policy) == config["fingerprint"]:
        backbone = shared_base(policy)
    else:
        device, dtype = pick_device(str(device), config["flags"]["precision"])
        backbone = Transformer.from_pretrained(config["base"], dtype, device, config["flags"]["quantize"])
    load_adapter(backbone, path / "adapter.safetensors", config["dims"])
    model = RewardModel(backbone, len(config["dims"]))
    model.load_state_dict(load_file(path / "heads.safetensors"), strict=False)
    model.requires_grad_(False)
    raw = partial(raw_rewards, model, tokenizer_of(config), config["max_length"])
    mean, std, scale = (torch.tensor(report[key]) for key in ("mean", "std", "reward_scale"))
    return lambda *texts: scale * (raw(*texts) - mean) / std, list(config["dims"])
