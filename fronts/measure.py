"""measure.py - what a policy achieves: exactly on the embedded world, by held-out data, or by sampled responses.

The embedded *world* (data/toy.py) is a closed set of prompts and responses: all S responses to each of its X evaluation
prompts can be listed, so a policy's expectations are sums. Everything that it can say counts: all other texts together
are one more outcome, with the score toy.OUTSIDE, and its probability is the *outside mass*. Elsewhere nothing can be
listed, and held-out pairs or demonstrations, or sampled responses, stand for the truth.
X: prompts of a split   S: the world's responses to a prompt   O = S + 1 outcomes, the last one "any other text"
m: dimensions
Every class here measures the base once, when it is made (World: by reference(model)). measure(policy, beta) returns
J (m,) the objectives as they were trained, scores (m,) the mean rewards (or accuracies) themselves, where they are
known kl and outside_mass, and, where no exact front gives J a scale, points (m,). policies() gives a run's policies,
one per preference.
"""
import json
import math
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.nn as nn

from data import toy
from data.base import is_world_base
from data.preferences import read_preferences
from data.prompts import read_demonstrations, read_prompts, split, written
from data.rewards import world_scores
from data.text_rewards import collapsed
from data.tokenizers import TokenRow, load_tokenizer, spoken, tokenize
from data.trees import batch_logprobs, pack, with_prefix
from fronts import optimum
from model import Transformer, generate
from objectives import losses_on_pairs
from ops.generation import Mixture, frozen
from ops.threads import side_by_side
from runs.directory import adapter_file, read_config
from runs.files import UserError, bar
from runs.processes import pick_device
from runs.randomness import generator_for
from svd_lora import (
    adapters_off,
    load_adapter,
    merged,
    read_adapter_header,
    set_preference,
    shared_base,
    soup,
    svd_lora_layers,
)

# ---------------------------------------------------------------------------------------------------------------------
# 1. Log-probs of responses under a model.

def world_rows(prompts, responses=32):
    """All responses to `prompts` as data rows, `responses` neighbours in each: attention is quadratic in a tree's size,
    so a few trees are cheaper than one."""
    return [toy.as_row(x, texts[i:i + responses]) for x in prompts for texts in [toy.responses(x)]
            for i in range(0, len(texts), responses)]


def world_batches(prompts, tokenizer, device, rows=5):
    """All responses to `prompts`, packed for world_logprobs: `rows` trees (data/trees.py) per batch, few, so that they
    stay in a core's caches."""
    trees = tokenize(world_rows(prompts), tokenizer, max_length=10_000)[0]
    return [pack(trees[i:i + rows]).to(device) for i in range(0, len(trees), rows)]


@torch.no_grad()
def world_logprobs(policy, batches):
    """log π(y|x) of every prompt's every response: (X, S) float64. policy: a model, or a function, TreeBatch -> (R,)"""
    on_cpu = isinstance(policy, (Transformer, Mixture)) and policy.embed.weight.device.type == "cpu"
    if on_cpu:                                                                        # a third of the time less
        fast = lambda model: frozen(merged(model), pack=True)
        policy = (Mixture([fast(model) for model in policy.models], policy.weights) if isinstance(policy, Mixture) else
                  fast(policy))
    logprobs = torch.no_grad()(partial(batch_logprobs, policy) if isinstance(policy, nn.Module) else policy)
    each = side_by_side(logprobs, batches) if on_cpu else map(logprobs, batches)
    return torch.cat(list(bar(each, "log π", len(batches)))).double().cpu().view(-1, toy.N_RESPONSES)


def held_out_batches(rows, config, tokenizer, model, device):
    """Rows of files as batches, cut to the run's length; what is cut is counted and printed."""
    flags = config["flags"]
    rows, cut = tokenize(rows, tokenizer, min(flags["max_length"], model.config.context_length))
    print("evaluation: {prompts} rows, {prompts_cut} prompts and {responses_cut} of {responses} responses cut"
          .format(**cut))
    B = flags["batch_size"]
    return [pack(rows[i:i + B]).to(device) for i in range(0, len(rows), B)]


# ---------------------------------------------------------------------------------------------------------------------
# 2. The policies of a run.

def run_config(run):
    """config.json of a run that has a front. Raises UserError where it does not say what the run optimised."""
    config = read_config(run)
    o, m = config["objective"], len(config["dims"])
    if missing := [key for key in ("objective", "method", "label", "models") if config.get(key) is None]:
        raise UserError(f"{run}/config.json has no \"{missing[0]}\": it is a reward model's, or an older version "
                        f"wrote it; train the run again")
    number = lambda x: type(x) in (int, float) and math.isfinite(x)
    ideal = o.get("ideal")
    if (m < 2 or o.get("aggregate") not in ("ls", "tche") or not (o.get("beta") is None or number(o["beta"]))
            or not (ideal is None or isinstance(ideal, list) and len(ideal) == m and all(map(number, ideal)))):
        raise UserError(f"{run}/config.json: no training has written these dims and this objective, {json.dumps(o)}")
    return config


def base_of(config, device):
    """The base model of a run, as it was trained on: in the same precision, quantised or not. Raises UserError where it
    is not there any more, or knows another world."""
    flags = config["flags"]
    if not Path(config["base"]).is_dir():
        raise UserError(f"{config['base']}, the base model of this run, is not there any more: bring it back, or write "
                        f"into the run's config.json under \"base\" where it is")
    is_world_base(config["base"])
    _, dtype = pick_device(str(device), flags.get("precision") or "auto")
    return Transformer.from_pretrained(config["base"], dtype, device, flags.get("quantize"))


def load_trained(run, config, model, adapters=None):
    """Loads what a run has trained: its one adapter, or the file `adapters`, into `model`. -> (the specialists of
    rewarded soups, on the memory of `model`; {λ: file} of a method with one model for each of its own preferences)."""
    method, dims, specialists, files = config["method"], config["dims"], [], {}
    if method in ("panacea", "prompt"):
        load_adapter(model, adapters or run / "adapter.safetensors", dims)
    elif method == "rs":
        specialists = [shared_base(model) for _ in dims]
        for dim, specialist in zip(dims, specialists):
            load_adapter(specialist, adapter_file(run, f"adapter-{dim}"), dims)
    else:
        files = {tuple(read_adapter_header(f)["lam"]): f for f in sorted(run.glob("adapter-*.safetensors"))}
        if not files:
            raise UserError(f"{run} holds no adapter: its training has not ended")
    return specialists, files


def nearest(files, lam):
    """The λ of files, {λ: file}, whose model stands for the preference lam (m,)."""
    return min(files, key=lambda own: (torch.tensor(own) - lam).norm().item())


def policies(run, config, model, lams, adapters=None, mix="weights", factor=1.0):
    """Yields (λ, model ready to be used at that λ) for each preference, with `model` changed in place.

    Panacea sets λ in its one adapter (`adapters`: this file instead). Rewarded soups average the weights of m models:
    W0 + factor · Σ λ_i ΔW_i; with mix = "logprobs" it is their log-probs, and that is MOD (ops/generation.py:
    Mixture). A prompted λ is a text in front of the prompt: that policy is a function, TreeBatch -> (R,) log-probs.
    Every other method has one adapter for each of its own preferences, and `lams` is ignored.
    """
    method, (specialists, files) = config["method"], load_trained(run, config, model, adapters)
    if method == "panacea":
        for lam in lams:
            set_preference(model, lam)
            yield lam, model
    elif method == "prompt":
        for lam, text in zip(lams, written(lams, load_tokenizer(config["tokenizer"]))):
            yield lam, lambda batch, text=text: batch_logprobs(model, with_prefix(batch, text))
    elif method == "rs":
        for lam in lams:
            w = (factor * lam).tolist()
            yield lam, (Mixture([model, *specialists], [1 - factor, *w]) if mix == "logprobs" else
                        soup(model, specialists, w))
    else:
        for own, file in files.items():
            load_adapter(model, file, config["dims"])
            yield torch.tensor(own), model


# ---------------------------------------------------------------------------------------------------------------------
# 3. The embedded world: exact expectations.

def writers(dims, split):
    """The demonstrators p_i(y|x) of the SFT objective at the prompts of a split: (X, S, m)"""
    return torch.stack([toy.demonstrator_probs(x, dims) for x in toy.prompts(split)])


class World:
    """The embedded world's evaluation prompts with all their responses, ready to measure policies exactly.

    Scores, KL and J of RLHF are over all O outcomes: what a policy gives to other texts counts, and stands beside them
    as outside_mass. problems, wins and writers are what single objectives need, computed when first used.
    """

    base = object()             # the model that reference() has measured

    def __init__(self, dims, tokenizer, device, J=None, rewards=None, split="new_verbs"):
        """J(world, logps (X, O), beta) -> (m,): a row's of objective.py; without it, the mean scores. rewards:
        data.rewards.Rewards in the place of the world's own scores, with the run's own statistics."""
        prompts, self.dims, self.J, self.split = toy.prompts(split), dims, J, split
        self.batches = world_batches(prompts, tokenizer, device)
        listed = (world_scores(rewards, prompts) if rewards else
                  torch.stack([toy.scores(x, toy.responses(x), dims) for x in prompts]))               # (X, S, m)
        self.scores = torch.cat([listed, torch.full_like(listed[:, :1], toy.OUTSIDE)], dim=1)          # (X, O, m)
        self.r = rewards and rewards.normalise(self.scores)                                            # (X, O, m)

    def reference(self, model):
        """Measures the base model once; what measure() needs of it."""
        self.base = model
        with adapters_off(model):
            self.ref = optimum.with_outside(world_logprobs(model, self.batches))                       # (X, O)

    def measure(self, model, beta):
        """J (m,), mean scores (m,), KL(π ‖ π_ref) in nats, outside_mass, and log π (X, O) itself."""
        known = model is self.base and not svd_lora_layers(model)                     # the base itself, a second time
        logps = self.ref if known else optimum.with_outside(world_logprobs(model, self.batches))       # (X, O)
        scores = self.mean_scores(logps)
        return {"J": (self.J(self, logps, beta) if self.J else scores).tolist(), "scores": scores.tolist(),
                "kl": (logps.exp() * (logps - self.ref)).sum(1).mean().item(),
                "outside_mass": logps[:, -1].exp().mean().item(), "logps": logps}

    def mean_scores(self, logps):
        """E r_i over everything that can be said. logps: (…, X, O) -> (…, m)"""
        return torch.einsum("...xo,xoi->...i", logps.exp(), self.scores) / len(self.scores)

    @cached_property
    def problems(self):
        """The distinct scores (Q, S, m) among the prompts, their parts w (Q,), each prompt's index (X,): optimum.py."""
        return optimum.problems(self.scores[:, :-1])

    @cached_property
    def wins(self):
        """How many of the other responses each is expected to beat, in every problem and dimension: (Q, m, S)"""
        return optimum.win_probs(self.problems[0]).sum(-1)

    @cached_property
    def writers(self):
        """The demonstrators p_i(y|x) of the SFT objective: (X, S, m)"""
        return writers(self.dims, self.split)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Held-out data and samples: where the truth is not known.

class PreferenceFiles:
    """Held-out preference rows: implicit-reward accuracy, and minus the loss, of every dimension."""

    def __init__(self, loss, config, model, tokenizer, device, rewards=None):
        """loss: objectives.dpo_loss, or another of its kind. rewards plays no part."""
        flags = config["flags"]
        rows, *_ = read_preferences(flags["eval_data"], config["dims"], seed=flags["seed"], fields=flags.get("fields"))
        self.loss, self.batches = loss, held_out_batches(rows, config, tokenizer, model, device)
        self.ref = [batch_logprobs(model, batch) for batch in bar(self.batches, "log π_ref")]

    def measure(self, model, beta):
        """J = −loss (m,) and scores: the implicit-reward accuracy (m,) on the rows that have the label."""
        loss = correct = count = 0.0
        for batch, ref in bar(zip(self.batches, self.ref), "held-out pairs", len(self.ref)):
            l, c, known = losses_on_pairs(self.loss, batch_logprobs(model, batch), ref, batch.pairs, batch.better, beta)
            loss, correct, count = loss + (l * known).sum(0), correct + (c * known).sum(0), count + known.sum(0)
        self.labels, scores = count.int().tolist(), (correct / count).tolist()
        return {"J": (-loss / count).tolist(), "scores": scores, "points": scores}


class DemonstrationFiles:
    """Held-out demonstrations, one file per dimension: J_i = log π(y|x), and how much better than the base that is."""

    def __init__(self, config, model, tokenizer, device, rewards=None):
        """rewards plays no part."""
        rows, kinds = read_demonstrations(config["flags"]["eval_data"], config["flags"].get("fields"))
        self.batches = held_out_batches(rows, config, tokenizer, model, device)
        self.kinds = torch.tensor([i for kind in kinds for i in kind])                                 # (R,)
        self.scale = torch.tensor(config["loss_scale"], dtype=torch.float64)                           # (m,)
        self.ref = self.objectives(model)

    def objectives(self, model):
        """J (m,): mean nats per response, or by the mean length, as in training (config's loss_scale)."""
        logps = torch.cat([batch_logprobs(model, batch) for batch in bar(self.batches, "demonstrations")])        # (R,)
        logps = logps.double().cpu()
        return self.scale * torch.stack([logps[self.kinds == i].mean() for i in range(len(self.scale))])

    def measure(self, model, beta):
        """J (m,), and scores (m,): J less the base's."""
        J = self.objectives(model)
        scores = (J - self.ref).tolist()
        return {"J": J.tolist(), "scores": scores, "points": scores}


class Samples:
    """Sampled responses to evaluation prompts: rewards with a standard error, Eq. (1), and what no reward shows."""

    per_prompt, most = 4, 64

    def __init__(self, config, model, tokenizer, device, rewards):
        """model: still without an adapter. At most `most` prompts, `per_prompt` responses to each."""
        flags = config["flags"]
        rows = (split(read_prompts(config["prompts"], flags["prompt_words"], flags.get("fields"))[0])[1]
                if config["prompts"] else
                [toy.as_row(x, []) for x in toy.prompts("new_verbs")])
        self.texts = [row.prompt for row in rows[:self.most]]
        self.new, self.tokenizer, self.rewards = flags["max_new_tokens"], tokenizer, rewards
        length = min(flags["max_length"], model.config.context_length)
        self.prompts = [row.prompt for row in tokenize(rows[:self.most], tokenizer, length, length - self.new)[0]]
        own = [row for row in tokenize(rows, tokenizer, length)[0] if row.responses]
        self.own = [pack(own[i:i + 16]).to(device) for i in range(0, min(len(own), 2 * self.most), 16)]
        self.device, self.base = device, shared_base(model)                   # the base, on the same memory

    def measure(self, model, beta):
        """J = mean r − β KL; scores: mean raw rewards, and their standard errors (over prompts); points: the scores,
        normalised; KL as the mean of log π/π_ref; length in tokens; ended and collapsed: parts of the responses, in
        [0, 1], that ended by themselves and that fell into a loop; own_text_loss: nats per token on the texts that the
        prompts were cut from; raw (R, m) and texts, the samples themselves."""
        n = self.per_prompt
        prompts, asked = ([x for x in each for _ in range(n)] for each in (self.prompts, self.texts))
        responses = generate(model, prompts, self.new, eos_id=self.tokenizer.ends,
                             generator=generator_for(0, "evaluation"), vocab_size=self.tokenizer.vocab_size,
                             show=lambda steps: bar(steps, "sampling", self.new))
        texts, finished = spoken(responses, self.tokenizer)
        raw = self.rewards.raw(asked, texts, finished)                                                 # (R, m)
        trees = [TokenRow(x, responses[i * n:(i + 1) * n]) for i, x in enumerate(self.prompts)]
        kl = 0.0
        for i in bar(range(0, len(trees), 16), "KL"):
            part = pack(trees[i:i + 16]).to(self.device)
            kl += (batch_logprobs(model, part) - batch_logprobs(self.base, part)).sum().item() / len(prompts)
        own = (None if not self.own else -sum(batch_logprobs(model, b).sum().item() for b in self.own)
               / sum((b.paths < len(b.targets)).sum().item() for b in self.own))
        by_prompt = raw.view(-1, n, raw.shape[1]).mean(1)
        J = self.rewards.normalise(raw).mean(0) - beta * kl
        return {"J": J.tolist(), "scores": raw.mean(0).tolist(),
                "points": self.rewards.normalise(raw.mean(0)).tolist(),
                "scores_se": (by_prompt.std(0) / math.sqrt(len(by_prompt))).tolist(), "kl": kl,
                "length": sum(map(len, responses)) / len(responses), "ended": sum(finished) / len(finished),
                "collapsed": sum(map(collapsed, responses)) / len(responses), "own_text_loss": own,
                "raw": raw.tolist(), "texts": texts[::n]}
