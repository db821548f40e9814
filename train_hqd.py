"""train_hqd.py - ParetoHqD (Gu et al., arXiv:2504.16628): plain SFT on the pairs of an offline set that suit λ best.

    python train_hqd.py --pref_dim 2                        # the embedded world; trains its base model first
    python train_hqd.py --pref_dim 2 --select linear        # ablations: the best by Σ λ_i r_i; all: the whole set
    python train_hqd.py --pref_dim 2 --no-stage2            # ablation: without answers of its own
    python train_hqd.py --init <Hugging Face directory> --data pairs.jsonl --rewards happy concise

N: pairs (prompt, response) of the pool   m: dimensions   A: preferences, one adapter each   k: near points (--near)
lam: (A, m) on the simplex   scores: (N, m) raw rewards   near: (A, k) which of the N pairs a preference trains on
B: rows of each adapter in a step   n: adapters that train at once, A or 1

Stage 1: all pairs are scored, the first non-dominated layers kept, and of these the k nearest to the ray from the ideal
point to W(λ) (pareto.py) teach λ's adapter. Stage 2, against learning k texts by heart: the models of the m vertices
and of the middle answer prompts, their answers are the new pool, and every adapter goes on with its k / 2 nearest.
All adapters train in one batch, whose rows choose their adapter (--together), or one after the other: the same models.
Together, a step has few and large products, but each layer multiplies by all A adapters: right for a GPU. On one CPU
thread eight rows for each of 11 adapters took 0.38 s one after the other, where a batch fits into the caches, and
0.59 s together; hence the default.
A killed run continues from its last checkpoint, bit for bit.
"""
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

import eval_front
from aggregate import simplex_lattice
from runs.checkpoints import load_state, save_state
from runs.device import pick_device
from runs.directory import prepare_run, run_name, versions
from runs.files import UserError, write_json, write_whole
from runs.flags import RunFlags, check_ranges, flag, run_main
from runs.log import Log
from runs.loop import learning_rate
from runs.randomness import epoch_batch, generator_for
from runs.speed import matmul_ceiling, model_flops, report_speed
from data import toy
from data.offline import distinct, draw_world, read_offline
from data.preferences import Row
from data.prompts import split
from data.text_rewards import collapsed
from data.tokenizers import spoken, tokenize
from data.trees import batch_logprobs, pack
from model import generate
from objectives import sft_loss
from fronts.selection import select_high_quality
from data.rewards import named_rewards, of_world, world_rewards
from svd_lora import (choose_adapter, clip_adapters, fingerprint, inject_svd_lora, load_adapter, parameter_groups,
                      save_adapter, shared_base)
from train_base import find_base, load_base


@dataclass
class Flags(RunFlags):
    """The script's flags, with defaults and --help texts."""

    # what is trained
    pref_dim: int = flag(2, "m: the number of preference dimensions, the first m of the embedded world's")
    dims: list[str] | None = flag(None, "these dimensions of the embedded world instead, in this order")
    rewards: list[str] | None = flag(None, "other rewards: names of text rewards, directories of train_reward.py "
                                           "(directory:dimension for one of several), or, on the embedded world, its "
                                           "dimensions and concise:WORDS")
    method: Literal["hqd"] = flag("hqd", "ParetoHqD: one model a preference")
    parts: int | None = flag(None, "the simplex is cut in so many parts (default 10 for m = 2: 11 preferences; 4 for "
                                   "m = 3; else 2)")
    lam: list[float] | None = flag(None, "these preferences instead, one after the other: 0.3 0.7 0.5 0.5 are two")
    # the offline set and the base model
    init: str | None = flag(None, "Hugging Face directory of the base model (default: the embedded world's)")
    size: str | None = flag(None, "size of the embedded world's base model (default tiny; 125m on a GPU)")
    data: list[str] | None = flag(None, "offline set: JSONL with prompt and response, or response_0 and response_1, or "
                                        "stories in .txt (default: the embedded world's); a tenth of the prompts is "
                                        "held out for the evaluation")
    pool: int = flag(10_000, "embedded world: pairs drawn from what its base was trained on, equal ones among them")
    prompt_words: int = flag(12, "stories are cut into a prompt of so many words and the rest, its response")
    tokenizer: str | None = flag(
        None, "toy, gpt2, a *.tiktoken file or a directory with tokenizer.json (default: --init's)")
    eos_id: int | None = flag(None, "the token that ends a response (default: the tokenizer's EOS)")
    max_length: int = flag(512, "tokens of prompt and response together; longer ones are cut and counted")
    # the selection
    select: Literal["directions", "linear", "all"] = flag(
        "directions", "the points near λ's direction; ablations: the largest Σ λ_i r_i, or the whole set for every λ")
    near: int = flag(100, "k: pairs that a preference trains on in stage 1")
    near2: int | None = flag(None, "… and in stage 2 (default k / 2)")
    min_pool: int | None = flag(None, "layers of non-dominated pairs are taken until they hold so many (default 3 k)")
    layers: int | None = flag(None, "so many layers instead")
    quantile: float = flag(0.0, "ranges of the rewards from this quantile to 1 minus it, against outliers")
    # stage 2
    stage2: bool = flag(True, "the second stage")
    prompts2: int | None = flag(None, "prompts that each representative answers (default: all, at most 10000)")
    samples2: int | None = flag(None, "answers to each (default 8 on the embedded world, 1 otherwise)")
    max_new_tokens: int | None = flag(None, "an answer that has not ended by then is cut off, and dropped (default 64 "
                                            "on the embedded world, else 256, at most half of --max_length)")
    temperature: float = flag(1.0, "of these answers")
    top_p: float = flag(1.0, "nucleus that they are drawn from")
    merge_pool: bool = flag(False, "stage 2 selects among the answers and the offline set, not among answers alone")
    # hyper-parameters
    steps: int = flag(200, "optimizer steps of each adapter in stage 1")
    steps2: int | None = flag(None, "… and in stage 2 (default a quarter: the paper's 200 learn 50 pairs by heart)")
    batch_size: int = flag(8, "B: pairs a step of each adapter")
    lora_dim: int = flag(8, "the rank of an adapter is this + 1, as for the other baselines")
    lora_scaling: float = flag(512.0, "the adapter's gain is lora_scaling / lora_dim")
    lr: float | None = flag(
        None, "peak learning rate of each stage, then a cosine to 0 "
              "(default 2e-3 on the embedded world; else 2e-4, 1e-3 below width 512)")
    weight_decay: float = flag(0.05, "AdamW's, on U and V only")
    warmup_ratio: float = flag(0.03, "share of the steps with a rising learning rate")
    max_grad_norm: float = flag(1.0, "gradient clipping, of each adapter by itself")
    seed: int = flag(0, "seed of adapters, offline set, data order and answers")
    # running; more in common.RunFlags
    together: bool | None = flag(None, "all adapters in one batch, or one after the other: the same models "
                                       "(default: together on a GPU)")
    gen_batch: int = flag(256, "answers sampled at a time")


def main(flags):
    """Trains one run, an adapter for each preference, and evaluates its front. Returns the run directory."""
    device, dtype = pick_device(flags.device, flags.precision)
    given = replace(flags)
    check(flags)
    matmul_ceiling(device, dtype)                                      # now, while nothing else runs
    rows, dropped = (draw_world(flags.pool, generator_for(flags.seed, "pool")) if flags.data is None else
                     read_offline(flags.data, flags.prompt_words))
    base, tokenizer_name = find_base(flags.init, flags.size, flags.tokenizer, device)
    model, tokenizer = load_base(base, tokenizer_name, flags, device, dtype)
    if flags.eos_id is not None:
        tokenizer = replace(tokenizer, eos_id=flags.eos_id)
    rewards = (world_rewards(flags.rewards or toy.choose_dims(flags.dims, flags.pref_dim), None)
               if flags.data is None and of_world(flags.rewards) else
               named_rewards(flags.rewards, None, model, device))
    lams = preferences(flags, rewards.dims)                            # (A, m)
    length = min(flags.max_length, model.config.context_length)
    defaults(flags, model, length, device)
    rows, held_out = (rows, []) if flags.data is None else split(rows)
    print(f"offline set: {len(rows)} pairs, " + (f"{len(held_out)} held out, " if flags.data else "") + "dropped: "
          + ", ".join(f"{n} {why}" for why, n in dropped.items()))
    if len(rows) < flags.near:
        raise UserError(f"--near {flags.near}: the offline set has only {len(rows)} pairs to train on")
    if flags.max_new_tokens >= length:
        raise UserError(f"--max_new_tokens {flags.max_new_tokens} leave no room for a prompt in {length} tokens")
    tokens_of = lambda rows: tokenize(rows, tokenizer, length, length - flags.max_new_tokens)
    token_rows, cut = tokens_of(rows)
    print("tokens: {prompts_cut} prompts and {responses_cut} of {responses} responses cut".format(**cut))
    pool = Pool(rows, token_rows, score(rewards, rows))
    measure_rewards(rewards, pool.scores)

    parts = [Path(f.partition(":")[0]).stem for f in (flags.data or []) + [r for r in flags.rewards or [] if "/" in r]]
    out = Path(flags.out or run_name(["hqd", *parts, flags.select, *rewards.dims, f"seed{flags.seed}"], given,
                                     {"method", "select", "data", "rewards"}))
    # what an evaluation asks of every run: its aggregation, the weight of KL in its objective, and the files whose
    # held-out prompts are to be answered
    config = {"script": "train_hqd.py", "method": "hqd",
              "label": "ParetoHqD" if flags.select == "directions" else f"HqD, {flags.select}",
              "objective": {"name": "scores", "beta": 0.0, "aggregate": "ls", "ideal": None, "smooth": 0.0},
              "prompts": flags.data,
              "models": len(lams), "dims": rewards.dims,
              "flags": asdict(flags) | {"aggregate": flags.select, "beta": 0.0, "prompts": flags.data},
              "rewards": {"names": flags.rewards or rewards.dims, "mean": rewards.mean, "std": rewards.std, "scale": rewards.scale},
              "base": str(base), "tokenizer": tokenizer_name, "fingerprint": fingerprint(model), "cut": cut,
              "dropped": dropped, **versions()}
    resume = prepare_run(out, config)
    A, selection = len(lams), {}
    groups = [list(range(A))] if flags.together else [[a] for a in range(A)]
    for stage in (1, 2) if flags.stage2 else (1,):
        if stage == 2:
            resumed = resume is not None and resume["member"] >= len(groups)
            new, about = answers(model, out, lams, pool, rewards, tokens_of, tokenizer, resumed, len(groups), flags)
            pool = new + pool if flags.merge_pool else new
        near, selection[f"stage {stage}"] = select(pool, lams, stage, rewards.dims, flags)         # (A, k)
        if stage == 2:
            selection["stage 2"]["representatives"] = about
        write_json(out / "selection.json", selection)
        for member, group in enumerate(groups, start=(stage - 1) * len(groups)):
            if resume is None or resume["member"] <= member:
                train(model, out, stage, member, group, lams, pool.tokens, near, rewards.dims, flags, resume, device)
                resume = None
    seconds = report_speed(out, device, dtype)
    print(f"trained {A} adapter(s) of {flags.steps}{f' + {flags.steps2}' * flags.stage2} steps in {seconds:.0f} s: "
          f"{out}")
    del model
    if flags.eval:
        eval_front.main(eval_front.Flags(runs=[str(out)], device=flags.device))
    (out / "state.safetensors").unlink(missing_ok=True)                # the run is whole: nothing is left to resume
    return out


def check(flags):
    """Raises UserError for flags that do not fit together."""
    check_ranges(flags, dict(pool=1, prompt_words=1, near=1, near2=1, min_pool=1, layers=1, parts=1, prompts2=1,
                             samples2=1, max_length=2, max_new_tokens=1, steps=1, steps2=1, batch_size=1, lora_dim=1,
                             gen_batch=1, save_every=1, log_every=1),
                 positive=("lr", "lora_scaling", "max_grad_norm", "top_p"),
                 shares=("quantile", "top_p", "warmup_ratio"), not_negative=("weight_decay", "temperature"))
    if flags.quantile >= 0.5:
        raise UserError(f"--quantile {flags.quantile}: must be below 0.5, or the range of a reward is empty")
    if flags.min_pool is not None and flags.layers is not None:
        raise UserError("--min_pool and --layers both say how many layers are taken: give one of them")
    if flags.data is not None and (flags.init is None or flags.rewards is None):
        raise UserError("--data needs --init and --rewards: the embedded world's model and scores know no other text")
    if flags.init is not None and flags.data is None and not (Path(flags.init) / "base.json").exists():
        raise UserError("--init needs --data (and --rewards): this model knows nothing of the embedded world")
    if flags.rewards is None and len(flags.dims or [0] * flags.pref_dim) < 2:
        raise UserError("a front needs at least 2 dimensions: --pref_dim 2, or two names after --dims")
    if flags.lam is not None and flags.parts is not None:
        raise UserError("--parts and --lam both say which preferences are trained: give one of them")


def preferences(flags, dims):
    """The preferences of --lam or --parts: (A, m) float64. Raises UserError for what is none."""
    m = len(dims)
    if m < 2:
        raise UserError("a front needs at least 2 dimensions: name two rewards after --rewards")
    if flags.lam is None:
        flags.parts = flags.parts or {2: 10, 3: 4}.get(m, 2)
        return simplex_lattice(m, flags.parts)
    if len(flags.lam) % m:
        raise UserError(f"--lam takes {m} numbers a preference, for {' '.join(dims)}; got {len(flags.lam)}")
    lams = torch.tensor(flags.lam, dtype=torch.float64).view(-1, m)
    if not ((lams >= 0).all() and ((lams.sum(1) - 1).abs() < 1e-4).all()):
        raise UserError(f"--lam {' '.join(map(str, flags.lam))}: a preference is not negative and sums to 1")
    if len(lams.unique(dim=0)) < len(lams):
        raise UserError(f"--lam {' '.join(map(str, flags.lam))}: the same preference twice")
    return lams / lams.sum(1, keepdim=True)


def defaults(flags, model, length, device):
    """Fills in the flags whose defaults depend on others. length: tokens that prompt and response may have together."""
    if flags.max_new_tokens is None:
        flags.max_new_tokens = min(64 if flags.data is None else 256, length // 2)
    if flags.together is None:
        flags.together = device.type == "cuda"
    if flags.near2 is None:
        flags.near2 = max(1, flags.near // 2)
    if flags.min_pool is None and flags.layers is None:
        flags.min_pool = 3 * flags.near                       # deeper layers lie below the front, yet rays meet them
    if flags.steps2 is None:
        flags.steps2 = max(1, flags.steps // 4)
    if flags.samples2 is None:
        flags.samples2 = 8 if flags.data is None else 1
    if flags.lr is None:
        flags.lr = 2e-3 if flags.data is None else 1e-3 if model.config.d_model < 512 else 2e-4


# ---------------------------------------------------------------------------------------------------------------------
# Pools of pairs, and what each preference takes of them.

@dataclass
class Pool:
    """N pairs: as texts, as tokens, and their scores (N, m) float64."""
    rows: list
    tokens: list
    scores: torch.Tensor

    def __add__(self, other):
        """Both, less the pairs of `other` that are in this one too."""
        here = {(row.prompt, row.responses[0]) for row in self.rows}
        new = [i for i, row in enumerate(other.rows) if (row.prompt, row.responses[0]) not in here]
        return Pool(self.rows + [other.rows[i] for i in new], self.tokens + [other.tokens[i] for i in new],
                    torch.cat([self.scores, other.scores[new]]))


def score(rewards, rows):
    """Raw scores of pairs whose response ended by itself: (N, m) float64."""
    return rewards.raw([row.prompt for row in rows], [row.responses[0] for row in rows], [True] * len(rows))


def measure_rewards(rewards, scores):
    """Fills in the mean and the standard deviation of rewards that bring none: those of the offline set. (The selection
    has its own scale, from the lowest to the highest score of its pool; these are for the evaluation.)"""
    for i, dim in enumerate(rewards.dims):
        if rewards.mean[i] is None:
            rewards.mean[i], rewards.std[i] = scores[:, i].mean().item(), scores[:, i].std().item()
        if not scores[:, i].max() > scores[:, i].min():
            raise UserError(f"reward {dim}: {scores[0, i].item():g} for every pair of the offline set; "
                            f"there is nothing to select by")


def select(pool, lams, stage, dims, flags):
    """near (A, k): which pairs of the pool each preference trains on, a list of lists; and what there is to know of
    them, for selection.json."""
    k = flags.near if stage == 1 else flags.near2
    try:
        chosen = select_high_quality(pool.scores.numpy(), lams.numpy(), k, flags.min_pool, flags.layers, flags.quantile,
                                     flags.select)
    except ValueError as e:                                            # a reward that does not vary, or is no number
        raise UserError(f"stage {stage}, {len(pool.rows)} pairs for {' '.join(dims)}: {e}") from None
    near, low, high = chosen.index.tolist(), chosen.low.tolist(), chosen.high.tolist()
    report = {"pairs": len(pool.rows), "layers": chosen.layers, "pool": len(chosen.pool), "low": low, "high": high,
              "lams": lams.tolist(), "distance": chosen.distance.mean(1).tolist(),
              "scores": [pool.scores[index].mean(0).tolist() for index in near], "overlap": chosen.overlap.tolist(),
              "index": near if flags.select != "all" else None}
    print(f"stage {stage} | {len(pool.rows)} pairs | {chosen.layers} layers | pool {len(chosen.pool)} | range "
          + " ".join(f"{d} {a:.3f} to {b:.3f}" for d, a, b in zip(dims, low, high)))
    for lam, index, distance, mean, shared in zip(lams.tolist(), near, report["distance"], report["scores"],
                                                  [*report["overlap"], None]):
        print(f"stage {stage} | lam {' '.join(f'{x:.2f}' for x in lam)} | {len(index)} pairs | distance {distance:.4f}"
              f" | " + " ".join(f"{d} {x:.3f}" for d, x in zip(dims, mean))
              + (f" | shared with the next {shared:.2f}" if shared is not None else ""))
    return near, report


def representatives(lams):
    """Which preferences stand for all: the nearest to each vertex and to the centre. At most m + 1 indices."""
    m = lams.shape[1]
    ends = torch.cat([torch.eye(m), torch.full((1, m), 1 / m)]).to(lams)              # (m + 1, m)
    return list(dict.fromkeys(torch.cdist(ends, lams).argmin(1).tolist()))


def answers(model, out, lams, pool, rewards, tokens_of, tokenizer, resumed, member, flags):
    """What the representatives' stage-1 models answer to prompts of the offline set -> (Pool, a report of each).

    Degenerate answers are dropped before anything is sorted, for reward models love some of them: those that were cut
    off, are empty, or fell into a loop (data.rewards.collapsed). A text that is none of the embedded world's is no
    such answer: it is scored, toy.OUTSIDE. generated.jsonl has all of them, and a run that was killed in stage 2 reads
    it again (`resumed`).
    """
    file, known = out / "generated.jsonl", flags.data is None and of_world(flags.rewards)
    prompts = list(dict.fromkeys(row.prompt for row in pool.rows))
    order = torch.randperm(len(prompts), generator=generator_for(flags.seed, "prompts2"))
    prompts = [prompts[i] for i in order[:flags.prompts2 or 10_000].tolist() for _ in range(flags.samples2)]
    if not (resumed and file.exists()):
        t0, said, tokens, read = time.time(), [], 0, 0
        ids = [row.prompt for row in tokens_of([Row(x, [], [], []) for x in prompts])[0]]
        twin = shared_base(model)
        for a in representatives(lams):
            load_adapter(twin, stage1_file(out, a), rewards.dims)
            for i in range(0, len(ids), flags.gen_batch):
                part = ids[i:i + flags.gen_batch]
                new = generate(twin, part, flags.max_new_tokens, flags.temperature, flags.top_p, tokenizer.eos_id,
                               generator_for(flags.seed, f"answers {a}", i))
                said += [{"adapter": a, "prompt": x, "response": text, "ended": end, "collapsed": collapsed(y)}
                         for x, y, text, end in zip(prompts[i:], new, *spoken(new, tokenizer))]
                tokens, read = tokens + sum(map(len, new)), read + sum(map(len, part))
        write_whole(file, lambda f: Path(f).write_text("".join(json.dumps(line) + "\n" for line in said)))
        log, seconds = Log(out / "metrics.jsonl", 1, desc="answers"), time.time() - t0
        log.step({"step": 0, "member": member, "stage": 2, "tokens": tokens,
                  "flops": model_flops(model.config, tokens + read, tokens, base=2),
                  "tokens_per_second": tokens / seconds, "seconds": seconds},
                 f"stage 2 | {len(said)} answers | {tokens / seconds / 1e3:.1f}k tok/s | {seconds:.0f} s")
        log.close()
    said = [json.loads(line) for line in file.read_text().splitlines()]
    good = [s for s in said if s["ended"] and s["response"].strip() and not s["collapsed"]]
    rows, _ = distinct([(s["prompt"], s["response"]) for s in good])
    scores, reports = score(rewards, rows) if rows else pool.scores[:0], []
    outside = {(row.prompt, row.responses[0]) for row, s in zip(rows, scores) if known and (s == toy.OUTSIDE).all()}
    for a in representatives(lams):
        mine, kept = ([s for s in group if s["adapter"] == a] for group in (said, good))
        share = lambda what: sum(map(what, mine)) / len(mine)
        report = {"lam": lams[a].tolist(), "answers": len(mine), "kept": len(kept),
                  "collapsed": share(lambda s: s["collapsed"]),
                  "empty": share(lambda s: not s["response"].strip()),
                  "cut_off": share(lambda s: not s["ended"]),
                  "outside": share(lambda s: (s["prompt"], s["response"]) in outside) if known else None}
        reports.append(report)
        print(f"stage 2 | lam {' '.join(f'{x:.2f}' for x in report['lam'])} answers {len(mine)} times | "
              + " | ".join(f"{key} {report[key]:.3f}" for key in ("collapsed", "empty", "cut_off", "outside")
                           if report[key] is not None) + f" | kept {len(kept)}")
    if len(rows) < flags.near2 and not flags.merge_pool:
        raise UserError(f"stage 2: {len(rows)} different answers of {len(said)} are left, --near2 asks for "
                        f"{flags.near2}: give more --prompts2 or --samples2, more --max_new_tokens where they were cut "
                        f"off, or fewer --steps")
    return Pool(rows, tokens_of(rows)[0], scores), reports


def stage1_file(out, a):
    """Where adapter a waits for stage 2."""
    return out / "snapshots" / f"stage1-{a:03d}.safetensors"


# ---------------------------------------------------------------------------------------------------------------------
# Training.

def train(model, out, stage, member, group, lams, rows, near, dims, flags, resume, device):
    """Plain SFT of the n adapters `group`, each on its own pairs near[a] of the rows; writes them to files.

    member: the number of this training among those of the run. Stage 2 goes on where stage 1 ended.
    """
    n, B, steps, rank = len(group), flags.batch_size, flags.steps if stage == 1 else flags.steps2, flags.lora_dim + 1
    # inject divides by its rank: scaled so that the gain is lora_scaling / lora_dim for every method
    inject_svd_lora(model, rank, 0, flags.lora_scaling / flags.lora_dim * rank,
                    generator=[generator_for(flags.seed, "adapter", a) for a in group], adapters=n)
    if stage == 2:
        for j, a in enumerate(group):
            load_adapter(model, stage1_file(out, a), dims, only=j)
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    adapter_size = sum(p.numel() for _, p in parameters if p.ndim == 2) // n          # a token meets one of them
    optimizer = torch.optim.AdamW(parameter_groups(model, flags.weight_decay), lr=flags.lr, betas=(0.9, 0.95),
                                  fused=True)                          # one pass over many small tensors
    first_step = 0
    if resume is not None:
        load_state(out / "state.safetensors", parameters, optimizer)
        first_step = resume["step"]
    choose_adapter(model, torch.arange(n).repeat_interleave(B))       # B rows for each, in this order, in every step
    multiple = 64 if device.type == "cuda" else 1             # T in multiples: few shapes, few sets of kernels
    log = Log(out / "metrics.jsonl", steps, first_step, flags.log_every,
              f"stage {stage}" if flags.together else f"stage {stage}, adapter {group[0]:03d}")

    for step in range(first_step, steps):
        t0 = time.time()
        # 1. batch: each adapter's next B pairs of its own k, which are shuffled anew when all have been seen
        chosen = [near[a][i] for a in group for i in epoch_batch(
            len(near[a]), B, flags.seed, ((stage - 1) * len(lams) + a) * steps + step).tolist()]
        batch = pack([rows[i] for i in chosen], multiple)
        tokens, predicted = int(batch.nodes.sum()), len(batch.targets)
        batch = batch.to(device)
        # 2. losses (n,): nats a token of each adapter's own rows. Not the mean over responses of their own means: this
        #    is their likelihood, and divided by tokens it has one scale for short and for long texts
        nats = sft_loss(batch_logprobs(model, batch)).view(n, B).sum(1)                           # (nB,) -> (n,)
        losses = nats / batch.on_path.view(n, -1).sum(1)
        # 3. backward: no adapter occurs in another one's loss, so the sum gives each its own gradient
        losses.sum().backward()
        # 4. clip each by itself, step
        for g in optimizer.param_groups:
            g["lr"] = learning_rate(step, steps, flags.lr, flags.warmup_ratio)
        norms = clip_adapters(model, flags.max_grad_norm)                                         # (n,)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # 5. log
        loss, norm = losses.mean().item(), norms.max().item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise UserError(f"stage {stage}, step {step + 1}: the loss is {loss}, the gradient's norm {norm}; "
                            f"lower --lr or --lora_scaling")
        seconds = time.time() - t0
        log.step({"step": step + 1, "member": member, "stage": stage, "adapters": group, "loss": loss,
                  "losses": losses.tolist(), "grad_norm": norms.tolist(), "lr": optimizer.param_groups[0]["lr"],
                  "tokens": tokens, "flops": model_flops(model.config, tokens, predicted, adapter_size),
                  "tokens_per_second": tokens / seconds, "seconds": seconds},
                 f"step {step + 1:05d}/{steps:05d} | stage {stage} | loss {loss:.4f} nats/token | from "
                 f"{losses.min().item():.3f} to {losses.max().item():.3f} | grad {norm:.2f} | "
                 f"{tokens / seconds / 1e3:.1f}k tok/s")
        # 6. save
        if (step + 1) % flags.save_every == 0 or step + 1 == steps:
            save_state(out / "state.safetensors", parameters, optimizer, step=step + 1, member=member)
    log.close()
    last = stage == 2 or not flags.stage2
    for j, a in enumerate(group):
        save_adapter(model, out / f"adapter-{a:03d}.safetensors" if last else stage1_file(out, a), dims, only=j,
                     method=flags.method, stage=stage, lam=lams[a].tolist())


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
