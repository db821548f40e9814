"""measure.py - what a policy achieves: exactly on the embedded world, by held-out pairs, or by sampled responses.

X: evaluation prompts   S: the world's responses to a prompt   O = S + 1: with "any other text"   m: dimensions
Every class here has reference(model), which measures the base once, and measure(policy, beta), which returns
J (m,) the objectives as they were trained, scores (m,) the mean rewards (or accuracies) themselves, kl, outside_mass.
policies() gives a run's policies, one a preference.
"""
import math

import torch

from aggregate import min_norm_weights
from runs.randomness import generator_for
from data import toy
from fronts import optimum
from data.preferences import read_preferences
from data.prompts import read_demonstrations, read_prompts, split
from data.text_rewards import collapsed
from data.tokenizers import TokenRow, spoken, tokenize
from data.trees import batch_logprobs, pack
from model import Transformer, generate
from objectives import dpo_loss, losses_on_pairs
from data.rewards import world_scores
from svd_lora import adapters_off, load_adapter, merged_state_dict, set_preference, shared_base


# ---------------------------------------------------------------------------------------------------------------------
# 1. Log-probs of responses under a model.

def world_batches(prompts, tokenizer, device, responses=32, rows=20):
    """All responses to `prompts`, packed for world_logprobs: `responses` neighbours a tree, `rows` trees a batch."""
    cut = [toy.as_row(x, texts[i:i + responses]) for x in prompts for texts in [toy.responses(x)]
           for i in range(0, len(texts), responses)]
    trees = tokenize(cut, tokenizer, max_length=10_000)[0]
    return [pack(trees[i:i + rows]).to(device) for i in range(0, len(trees), rows)]


@torch.no_grad()
def world_logprobs(model, batches):
    """log π(y|x) of every prompt's every response: (prompts, S) float64."""
    return torch.cat([batch_logprobs(model, batch) for batch in batches]).double().cpu().view(-1, toy.N_RESPONSES)


# ---------------------------------------------------------------------------------------------------------------------
# 2. The policies of a run.

def policies(run, config, model, lams, adapters=None):
    """Yields (λ, model ready to be used at that λ) for each preference, with `model` changed in place.

    Panacea sets λ in its one adapter. Rewarded soups average the merged weights of m models, W0 + Σ λ_i ΔW_i. A
    discrete policy solution has one adapter for each of its own preferences, and `lams` is ignored.
    """
    method, dims = config["flags"]["method"], config["dims"]
    if method == "panacea":
        load_adapter(model, adapters or run / "adapter.safetensors", dims)
        for lam in lams:
            set_preference(model, lam)
            yield lam, model
    elif method == "rs":
        ends = []
        for dim in dims:
            load_adapter(model, run / f"adapter-{dim}.safetensors", dims)
            ends.append(merged_state_dict(model))
        soup = Transformer(model.config).to(model.embed.weight)
        for lam in lams:
            soup.load_state_dict({key: sum(w * end[key] for w, end in zip(lam.tolist(), ends)) for key in ends[0]})
            yield lam, soup
    else:
        for file in sorted(run.glob("adapter-*.safetensors")):
            header = load_adapter(model, file, dims)
            yield torch.tensor(header["lam"]), model


# ---------------------------------------------------------------------------------------------------------------------
# 3. What a policy achieves.

class World:
    """The embedded world's evaluation prompts with all their responses, ready to measure policies exactly."""

    def __init__(self, dims, tokenizer, device, objective=None, split="eval"):
        """objective(logps, ref, beta) -> J (m,), of log-probs (prompts, S) under policy and reference: dpo_objective or
        sft_objective. None: J are the mean scores themselves."""
        prompts = toy.prompts(split)
        columns = [toy.DIMS.index(dim) for dim in dims]
        self.batches = world_batches(prompts, tokenizer, device)
        self.scores = torch.stack([toy.scores(x, toy.responses(x))[:, columns] for x in prompts])     # (prompts, S, m)
        self.objective = objective or (lambda logps, ref, beta: self.mean_scores(logps))

    def reference(self, model):
        """Measures the base model once; what measure() needs of it."""
        with adapters_off(model):
            self.ref = world_logprobs(model, self.batches)

    def measure(self, model, beta):
        """J (m,), mean scores (m,), KL(π ‖ π_ref) in nats, and the mass on texts that are not the world's.

        Scores and KL are of the policies renormalised to the world's responses.
        """
        logps = world_logprobs(model, self.batches)                                                    # (prompts, S)
        inside, ref = logps.log_softmax(-1), self.ref.log_softmax(-1)
        return {"J": self.objective(logps, self.ref, beta).tolist(), "scores": self.mean_scores(logps).tolist(),
                "kl": (inside.exp() * (inside - ref)).sum(1).mean().item(),
                "outside_mass": (1 - logps.exp().sum(1)).mean().item()}

    def mean_scores(self, logps):
        """E r_i over the world's responses, renormalised to them. logps: (…, prompts, S) -> (…, m)"""
        return torch.einsum("...xs,xsi->...i", logps.softmax(-1), self.scores) / len(self.scores)


def dpo_objective(dims, split="eval"):
    """J_i = −L_DPO,i, the exact expectation over all pairs of responses and their labels: a function for World."""
    scores, _, problem = optimum.problems(toy.prompts(split), dims)
    P = optimum.label_probs(scores)                                                                    # (Q, m, S, S)

    def objective(logps, ref, beta):
        h, J = beta * (logps - ref), 0.0
        for q in problem.unique():                                                    # few: equal prompts share
            here = problem == q
            J = J - optimum.dpo_losses(h[here][:, None], P[q][None]).sum((0, 1)) / len(h)
        return J
    return objective


def sft_objective(dims, split="eval"):
    """J_i = E log π(y|x), y from the writer of dimension i, exactly: a function for World."""
    demos = torch.stack([toy.demonstrator_probs(x, dims) for x in toy.prompts(split)])                 # (prompts, S, m)
    return lambda logps, ref, beta: -optimum.sft_losses(logps, demos)


class PreferenceFiles:
    """Held-out preference rows: implicit-reward accuracy and −L_DPO of every dimension."""

    def __init__(self, config, model, tokenizer, device):
        flags = config["flags"]
        rows, *_ = read_preferences(flags["eval_data"], dims=config["dims"], seed=flags["seed"])
        rows, cut = tokenize(rows, tokenizer, min(flags["max_length"], model.config.context_length))
        print("evaluation: {prompts} rows, {prompts_cut} prompts and {responses_cut} of {responses} responses cut"
              .format(**cut))
        B = flags["batch_size"]
        self.batches = [pack(rows[i:i + B]).to(device) for i in range(0, len(rows), B)]

    @torch.no_grad()
    def reference(self, model):
        """Measures the base model once; what measure() needs of it."""
        with adapters_off(model):
            self.ref = [batch_logprobs(model, batch) for batch in self.batches]

    @torch.no_grad()
    def measure(self, model, beta):
        """J = −L_DPO (m,) and scores: the implicit-reward accuracy (m,) on the rows that have the label."""
        loss = correct = count = 0.0
        for batch, ref in zip(self.batches, self.ref):
            l, c, known = losses_on_pairs(dpo_loss, batch_logprobs(model, batch), ref, batch.pairs, batch.better, beta)
            loss, correct, count = loss + (l * known).sum(0), correct + (c * known).sum(0), count + known.sum(0)
        self.labels = count.int().tolist()
        return {"J": (-loss / count).tolist(), "scores": (correct / count).tolist(), "kl": None, "outside_mass": None}


class DemonstrationFiles:
    """Held-out demonstrations, a file a dimension: J_i = log π(y|x), and how much better than the base that is."""

    def __init__(self, config, model, tokenizer, device):
        flags = config["flags"]
        rows, kinds = read_demonstrations(flags["eval_data"])
        rows, cut = tokenize(rows, tokenizer, min(flags["max_length"], model.config.context_length))
        print("evaluation: {prompts} prompts, {prompts_cut} cut, and {responses_cut} of {responses} responses cut"
              .format(**cut))
        B = flags["batch_size"]
        self.batches = [pack(rows[i:i + B]).to(device) for i in range(0, len(rows), B)]
        self.kinds = torch.tensor([i for kind in kinds for i in kind])                                 # (R,)
        self.scale = torch.tensor(config["loss_scale"], dtype=torch.float64)                           # (m,)

    def reference(self, model):
        """Measures the base model once; what measure() needs of it."""
        with adapters_off(model):
            self.ref = self.objectives(model)

    @torch.no_grad()
    def objectives(self, model):
        """J (m,): mean nats a response, or by the mean length, as in training (config's loss_scale)."""
        logps = torch.cat([batch_logprobs(model, batch) for batch in self.batches]).double().cpu()    # (R,)
        return self.scale * torch.stack([logps[self.kinds == i].mean() for i in range(len(self.scale))])

    def measure(self, model, beta):
        """J (m,), and scores (m,): J less the base's."""
        J = self.objectives(model)
        return {"J": J.tolist(), "scores": (J - self.ref).tolist(), "kl": None, "outside_mass": None}


class WorldRewards:
    """RLHF on the embedded world, exactly, in two ways: over its responses alone, policy and reference renormalised to
    them, with the mass on other texts beside it; and over everything, "any other text" being one more outcome."""

    def __init__(self, rewards, tokenizer, device, split="eval"):
        """rewards: rewards.Rewards with the statistics that the run was trained with."""
        prompts = toy.prompts(split)
        self.batches = world_batches(prompts, tokenizer, device)
        self.scores = world_scores(rewards, prompts)                                                   # (X, S, m)
        outside = torch.full_like(self.scores[:, :1], toy.OUTSIDE)
        self.r_all = rewards.normalise(torch.cat([self.scores, outside], dim=1))                       # (X, O, m)
        self.r = self.r_all[:, :-1]                                                                    # (X, S, m)

    def reference(self, model):
        """Measures the base model once; what measure() needs of it."""
        with adapters_off(model):
            self.ref_all = optimum.with_outside(world_logprobs(model, self.batches))                   # (X, O)
        self.ref = self.ref_all[:, :-1].log_softmax(-1)                                                # (X, S)

    def measure(self, model, beta):
        """Over the world's responses: J = E r − β KL (m,), mean scores (m,) in raw units, KL in nats. Over everything:
        J_all (m,), kl_all. And outside_mass, what the policy gives to all other texts."""
        logps_all = optimum.with_outside(world_logprobs(model, self.batches))                          # (X, O)
        logps = logps_all[:, :-1].log_softmax(-1)                                                      # (X, S)
        J, kl = optimum.rlhf_objectives(logps, self.ref, self.r, beta)
        J_all, kl_all = optimum.rlhf_objectives(logps_all, self.ref_all, self.r_all, beta)
        return {"J": J.tolist(), "scores": self.mean_scores(logps).tolist(), "kl": kl.item(), "J_all": J_all.tolist(),
                "kl_all": kl_all.item(), "outside_mass": logps_all[:, -1].exp().mean().item()}

    def mean_scores(self, logps):
        """E r_i in raw units. logps: (…, X, S), normalised -> (…, m)"""
        return torch.einsum("...xs,xsi->...i", logps.exp(), self.scores) / len(self.scores)

    def stationarity(self, model, beta):
        """How far a plain Transformer is from Pareto-stationary: min over c in the simplex of ‖Σ c_i ∇J_i‖.

        The gradients are exact, of J on these prompts, and with respect to the matrices that adapters adapt (all of
        them inside the blocks): unlike the adapter's own factors, these mean the same before and after training.
        Returns the norm, c (m,) and the norms of the single gradients (m,). The model's requires_grad is changed.
        """
        matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
        model.requires_grad_(False)
        for p in matrices:
            p.requires_grad_(True)
        total, per = [0.0] * self.r.shape[-1], self.batches[0].tokens.shape[0] * 32 // toy.N_RESPONSES   # prompts
        for i, batch in enumerate(self.batches):
            here = slice(i * per, (i + 1) * per)
            logps = optimum.with_outside(batch_logprobs(model, batch).double().cpu().view(-1, toy.N_RESPONSES))
            J, _ = optimum.rlhf_objectives(logps, self.ref_all[here], self.r_all[here], beta)          # of everything
            for j, value in enumerate(J * len(logps) / len(self.r)):
                grads = torch.autograd.grad(value, matrices, retain_graph=True)
                total[j] = total[j] + torch.cat([g.flatten() for g in grads]).double()
        gram = torch.stack(total) @ torch.stack(total).T                                                # (m, m)
        c = min_norm_weights(gram)
        return (c @ gram @ c).clamp(min=0).sqrt().item(), c.tolist(), gram.diagonal().sqrt().tolist()


class Samples:
    """Sampled responses to evaluation prompts: rewards with a standard error, and what no reward shows."""

    def __init__(self, config, rewards, model, tokenizer, device, per_prompt=4, most=64):
        """model: still without an adapter. At most `most` prompts, `per_prompt` responses to each."""
        flags = config["flags"]
        rows = (split(read_prompts(flags["prompts"], flags["prompt_words"])[0])[1] if flags["prompts"] else
                [toy.as_row(x, []) for x in toy.prompts("eval")])
        self.texts = [row.prompt for row in rows[:most]]
        self.new, self.tokenizer, self.rewards, self.n = flags["max_new_tokens"], tokenizer, rewards, per_prompt
        length = min(flags["max_length"], model.config.context_length)
        self.prompts = [row.prompt for row in tokenize(rows[:most], tokenizer, length, length - self.new)[0]]
        told = [row for row in tokenize(rows, tokenizer, length)[0] if row.responses]
        self.told = [pack(told[i:i + 16]).to(device) for i in range(0, min(len(told), 2 * most), 16)]
        self.device = device

    def reference(self, model):
        """Keeps the base, on the same memory; what measure() needs of it."""
        self.base = shared_base(model)

    @torch.no_grad()
    def measure(self, model, beta):
        """J = mean r − β KL, scores: mean raw rewards and their standard errors (over prompts), KL as the mean of
        log π/π_ref; length in tokens, the shares that ended by themselves and that collapsed; told: nats a token on the
        prompts' own texts; raw (responses, m) and texts, the samples themselves."""
        prompts = [x for x in self.prompts for _ in range(self.n)]
        responses = generate(model, prompts, self.new, eos_id=self.tokenizer.eos_id,
                             generator=generator_for(0, "evaluation"))
        texts, finished = spoken(responses, self.tokenizer)
        raw = self.rewards.raw([x for x in self.texts for _ in range(self.n)], texts, finished)       # (R, m)
        kl = 0.0
        for i in range(0, len(prompts), 64):
            part = pack([TokenRow(*xy) for xy in zip(prompts[i:i + 64], [[y] for y in responses[i:i + 64]])])
            part = part.to(self.device)
            kl += (batch_logprobs(model, part) - batch_logprobs(self.base, part)).sum().item() / len(prompts)
        told = (None if not self.told else -sum(batch_logprobs(model, b).sum().item() for b in self.told)
                / sum((b.paths < len(b.targets)).sum().item() for b in self.told))
        by_prompt = raw.view(-1, self.n, raw.shape[1]).mean(1)
        J = self.rewards.normalise(raw).mean(0) - beta * kl
        return {"J": J.tolist(), "scores": raw.mean(0).tolist(),
                "scores_se": (by_prompt.std(0) / math.sqrt(len(by_prompt))).tolist(), "kl": kl, "outside_mass": None,
                "length": sum(map(len, responses)) / len(responses), "ended": sum(finished) / len(finished),
                "collapsed": sum(map(collapsed, responses)) / len(responses), "told": told,
                "raw": raw.tolist(), "texts": texts[::self.n]}
