"""train_hqd.py - ParetoHqD (Gu et al., arXiv:2504.16628): plain SFT on the pairs of an offline set that suit λ best.

    python train_hqd.py --pref_dim 2                        # the embedded world
    python train_hqd.py --pref_dim 2 --select linear        # ablations: the best by Σ λ_i r_i; all: the whole set
    python train_hqd.py --pref_dim 2 --no-stage2            # ablation: without answers of its own
    python train_hqd.py --init <Hugging Face directory> --data pairs.jsonl --rewards happy concise
    torchrun --nproc_per_node 8 train_hqd.py …              # the same on several GPUs

m: dimensions   G: preferences, one adapter each   lam: (G, m) on the simplex   k: near pairs (--near)
pool: pairs (prompt, response) with raw rewards (pairs, m)   near: (G, k) which pairs of the pool a preference trains on
B: rows per step

Stage 1: all pairs are scored, the first non-dominated layers kept, and of these the k nearest to the ray from the ideal
point to W(λ) (fronts/selection.py) teach λ's adapter. Stage 2, against learning k texts by heart: the models of the m
vertices and of the middle answer prompts, their answers are the new pool, and every adapter goes on with its k / 2
nearest. No λ enters the model: there is one model per preference, and they are trained one after the other.
A killed run continues from its last checkpoint, bit for bit.
"""
import runs.waiting  # noqa: F401  # isort: skip
import json
import time
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import torch

import eval_front
from aggregate import simplex_lattice
from data import toy
from data.base import find_base, load_base, usual_rate
from data.batches import pad_to
from data.chat import announce, turns
from data.files import Row, as_json, plain_name
from data.offline import distinct, draw_world, read_offline
from data.prompts import split
from data.rewards import of_world
from data.sources import check_rewards, rewards_in, room_for_prompts
from data.text_rewards import collapsed
from data.tokenizers import as_begun, spoken, tokenize
from data.trees import batch_logprobs, pack
from fronts.selection import select_high_quality
from fronts.tables import shown, table
from objectives import sft_loss
from runs.directory import TRAINED, models_left, open_run, run_directory
from runs.files import UserError, bar, read_lines, write_json, write_jsonl
from runs.flags import AdapterFlags, BaseFlags, RewardFlags, RunFlags, flag, preferences_of, run_main
from runs.loop import Log, Run, adamw, add_adapter
from runs.processes import (
    all_sum,
    barrier,
    check_shares,
    generate_all,
    in_shares,
    init_distributed,
    pick_device,
    share,
    sum_of_all,
)
from runs.randomness import epoch_batch, generator_for
from runs.speed import matmul_ceiling, model_flops
from svd_lora import load_adapter, save_adapter, shared_base

MOST_PROMPTS = 10_000       # that a representative answers in stage 2
GEN_BATCH = 256             # answers sampled at a time


@dataclass
class Flags(RunFlags, BaseFlags, AdapterFlags, RewardFlags):
    """The script's flags, with defaults and --help texts; more in runs/flags.py."""

    parts: int | None = flag(None, "the simplex is cut into so many parts (default 10 for m = 2: 11 preferences; 4 for "
                                   "m = 3; else 2)", 1)
    lam: list[float] | None = flag(None, "these preferences instead, one after the other: 0.3 0.7 0.5 0.5 are two")
    data: list[str] | None = flag(None, "offline set: rows of any layout of data/README.md that have responses, or "
                                        "stories in .txt (default: the embedded world's); a tenth of the prompts is "
                                        "held out for the evaluation")
    pool: int = flag(10_000, "embedded world: pairs drawn from what its base was trained on, equal ones among them", 1)
    select: Literal["directions", "linear", "all"] = flag(
        "directions", "the pairs near λ's direction; ablations: the largest Σ λ_i r_i, or the whole set for every λ")
    near: int = flag(100, "k: pairs that a preference trains on in stage 1; half as many in stage 2", 1)
    stage2: bool = flag(True, "the second stage")
    samples2: int | None = flag(
        None, "answers of each representative to a prompt (default 8 on the embedded world, 1 otherwise)", 1)
    max_new_tokens: int | None = flag(None, "an answer that has not ended by then is cut off, and dropped (default 64 "
                                            "on the embedded world, else 256, at most half of --max_length)", 1)
    steps: int = flag(200, "optimizer steps of each adapter in stage 1", 1)
    steps2: int | None = flag(
        None, "… and in stage 2 (default a quarter: the paper's 200 learn 50 pairs by heart)", 1)


def train(model, out, lams, pool, rewards, tokens_of, tokenizer, flags, resume, device):
    """The algorithm: both stages for all G preferences. Writes an adapter for each, and what it selected."""
    selection, G = {}, len(lams)
    for stage in (1, 2) if flags.stage2 else (1,):
        # 1. the pool: in stage 1 the offline set, in stage 2 what the representatives' stage-1 models answer
        if stage == 2:
            barrier()                                                  # until the adapters of stage 1 are written
            said = answers(model, out, lams, pool, rewards, tokens_of, tokenizer,
                           resume is not None and resume["member"] >= G, flags)
            pool, about = pool_of_answers(said, lams, rewards, tokens_of, flags, device)

        # 2. the pairs of its first layers that are nearest to each preference's ray; in stage 2 half as many
        near, selection[f"stage {stage}"] = select(pool, lams, stage, rewards.dims, flags)         # (G, k)
        if stage == 2:
            selection["stage 2"]["representatives"] = about
        write_json(out / "selection.json", selection)

        # 3. plain SFT, one adapter after the other; a resumed run passes over those that are done
        for member, g, state in models_left(range(G), resume, first=(stage - 1) * G):
            fine_tune(model, out, stage, member, g, lams, pool.tokens, near[g], rewards.dims, flags, state, device)


def fine_tune(model, out, stage, member, g, lams, rows, near, dims, flags, resume, device):
    """Plain SFT of the adapter of preference g on the pairs `near` of the rows. member: the number of this training
    among those of the run. Stage 2 goes on where stage 1 ended."""
    steps = flags.steps if stage == 1 else flags.steps2
    add_adapter(model, flags, 0, g)
    if stage == 2:
        load_adapter(model, stage1_file(out, g), dims)
    run = Run(model, adamw(model, flags), out, f"stage {stage}, adapter {g:03d}", flags, steps, dims, member, resume,
              clip=clip)
    first = ((stage - 1) * len(lams) + g) * steps

    for step in run.steps():
        # 1. the next B of the k pairs, which are shuffled anew when all have been seen; each process takes its share
        chosen = epoch_batch(len(near), flags.batch_size, flags.seed, first + step)[share()].tolist()
        batch = pack([rows[near[i]] for i in chosen], pad_to(device)).to(device)

        # 2. loss: nats per token. Not the mean over responses of their own means: this is the pairs' likelihood, and
        #    divided by tokens it has one scale for short and for long texts
        loss = sum_of_all(sft_loss(batch_logprobs(model, batch)).sum() / all_sum(batch.on_path.sum()))    # (B,) -> ()

        # 3. backward, clip, step
        run.update(loss)
        run.log(*batch.size, stage=stage, adapter=g)
    last = stage == 2 or not flags.stage2
    save_adapter(model, out / f"adapter-{g:03d}.safetensors" if last else stage1_file(out, g), dims, method="hqd",
                 stage=stage, lam=lams[g].tolist())


def clip(parameters, max_norm):
    """torch's clip_grad_norm_ in another order of summation: the same but for rounding. (With torch's own, adapters of
    earlier versions would not be repeated bit for bit.) Returns the norm before."""
    grads = [p.grad.view(*p.shape[:-1], 1, -1) for p in parameters if p.grad is not None]      # (…, 1, k)
    norm = torch.stack([g.square().sum([i for i in range(g.ndim) if i != g.ndim - 2]) for g in grads]).sum(0).sqrt()
    for g in grads:
        g.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0)[:, None])
    return norm


def stage1_file(out, g):
    """Where the adapter of preference g waits for stage 2."""
    return out / "snapshots" / f"stage1-{g:03d}.safetensors"


def main(flags):
    """Trains one run, an adapter for each preference, and evaluates its front. Returns the run directory."""
    device, dtype = pick_device(flags.device, flags.precision, flags.plain)
    _, processes, device = init_distributed(device)
    given, on_world = replace(flags), flags.data is None
    check_rewards(flags, "data")
    check_shares(flags, flags.batch_size, f"--batch_size {flags.batch_size}", processes)
    if flags.lam is not None and flags.parts is not None:
        raise UserError("--parts and --lam both say which preferences are trained: give one of them")
    matmul_ceiling(device, dtype)                                      # now, while nothing else runs
    rows, dropped = (draw_world(flags.pool, generator_for(flags.seed, "pool")) if on_world else
                     read_offline(flags.data, flags.prompt_words, flags.fields))
    base, tokenizer_name = find_base(flags.init, flags.size, flags.tokenizer, device)
    model, tokenizer = load_base(base, tokenizer_name, device, dtype, flags)
    rewards = rewards_in(flags, flags.data, None, model, device)
    lams = preferences(flags, rewards.dims)                            # (G, m)
    flags.max_new_tokens = flags.max_new_tokens or min(64 if on_world else 256, flags.max_length // 2,
                                                       model.config.context_length // 2)
    flags.steps2 = flags.steps2 or max(1, flags.steps // 4)
    flags.samples2 = flags.samples2 or (8 if on_world else 1)
    flags.lr = flags.lr or usual_rate(on_world, model.config)
    length = room_for_prompts(flags, model.config)
    rows, held_out = (rows, []) if on_world else split(rows)
    print(f"offline set: {len(rows)} pairs, " + (f"{len(held_out)} held out, " if flags.data else "") + "dropped: "
          + ", ".join(f"{n} {why}" for why, n in dropped.items()))
    if len(rows) < flags.near:
        raise UserError(f"--near {flags.near}: the offline set has only {len(rows)} pairs to train on")
    tokens_of = lambda rows: tokenize(rows, tokenizer, length, length - flags.max_new_tokens)
    rewards_of_models = [r.partition(":")[0] for r in flags.rewards or [] if "/" in r]
    parts = [plain_name(f) for f in (flags.data or []) + rewards_of_models]
    out = run_directory(["hqd", *parts], {"data", "rewards", "fields"}, given, flags, rewards.dims)
    tokenizer = as_begun(tokenizer, out, flags.overwrite)
    announce(tokenizer.template, [row.prompt for row in rows])
    token_rows, cut = tokens_of(rows)
    print("tokens: {prompts_cut} prompts and {responses_cut} of {responses} responses cut".format(**cut))
    pool = Pool(rows, token_rows, score(rewards, rows, device))
    # the selection has its own scale, from the lowest to the highest score of its pool; this one is for the evaluation
    rewards.measure(pool.scores, "in the offline set")

    label = "ParetoHqD" if flags.select == "directions" else f"HqD, {flags.select}"
    resume = open_run(
        "train_hqd.py", out, flags, rewards.dims, model, base, tokenizer, "hqd", label=label, models=len(lams),
        objective={"name": "scores", "beta": 0.0, "aggregate": "ls", "ideal": None}, rewards=rewards.description(),
        prompts=flags.data, cut=cut, dropped=dropped)
    if resume == TRAINED:
        return eval_front.show(out, flags)
    train(model, out, lams, pool, rewards, tokens_of, tokenizer, flags, resume, device)
    del model
    steps = f"{flags.steps} + {flags.steps2}" if flags.stage2 else flags.steps
    return eval_front.finish(out, f"{len(lams)} adapter(s) of {steps} steps", flags, device, dtype, processes)


def preferences(flags, dims):
    """The preferences of --lam or --parts: (G, m) float64. Raises UserError for what is none."""
    if flags.lam is None:
        flags.parts = flags.parts or {2: 10, 3: 4}.get(len(dims), 2)
        return simplex_lattice(len(dims), flags.parts)
    lams = preferences_of(flags.lam, dims)
    if len(lams.unique(dim=0)) < len(lams):
        raise UserError(f"--lam {' '.join(map(str, flags.lam))}: the same preference twice")
    return lams


# ---------------------------------------------------------------------------------------------------------------------
# Pools of pairs, and what each preference takes of them.

@dataclass
class Pool:
    """Pairs as texts, as tokens, and their scores (pairs, m) float64."""
    rows: list
    tokens: list
    scores: torch.Tensor


def spelled(lam):
    """A preference as text."""
    return " ".join(f"{x:.2f}" for x in lam)


def score(rewards, rows, device):
    """Raw scores of pairs whose response ended by itself: (pairs, m) float64."""
    texts = [row.prompt for row in rows], [row.responses[0] for row in rows], [True] * len(rows)
    return in_shares(rewards.raw, texts, device)


def select(pool, lams, stage, dims, flags):
    """near (G, k): which pairs of the pool each preference trains on, a list of lists; and what there is to know of
    them, for selection.json."""
    k = flags.near if stage == 1 else max(1, flags.near // 2)
    try:
        # layers until they hold 3 · --near pairs, in both stages: more would bring in poor ones that lie near the ray
        chosen = select_high_quality(pool.scores.numpy(), lams.numpy(), k, 3 * flags.near, rule=flags.select)
    except ValueError as e:                                            # a reward that does not vary, or is no number
        raise UserError(f"stage {stage}, {len(pool.rows)} pairs for {' '.join(dims)}: {e}") from None
    near, low, high = chosen.index.tolist(), chosen.low.tolist(), chosen.high.tolist()
    report = {"pairs": len(pool.rows), "layers": chosen.layers, "pool": len(chosen.pool), "low": low, "high": high,
              "lams": lams.tolist(), "distance": chosen.distance.mean(1).tolist(),
              "scores": [pool.scores[index].mean(0).tolist() for index in near], "overlap": chosen.overlap.tolist(),
              "index": near if flags.select != "all" else None}
    print(f"stage {stage}: {len(pool.rows)} pairs, {chosen.layers} non-dominated layers hold {len(chosen.pool)}")
    print(table({"λ": [spelled(lam) for lam in lams.tolist()], "pairs": [str(len(index)) for index in near],
                 "distance": shown(report["distance"], ".4f"),
                 **{dim: shown(scores, ".3f") for dim, scores in zip(dims, zip(*report["scores"]))},
                 "shared with next": shown([*report["overlap"], None], ".2f")}))
    return near, report


def representatives(lams):
    """Which preferences stand for all: the nearest to each vertex and to the centre. At most m + 1 indices."""
    m = lams.shape[1]
    ends = torch.cat([torch.eye(m), torch.full((1, m), 1 / m)]).to(lams)              # (m + 1, m)
    return list(dict.fromkeys(torch.cdist(ends, lams).argmin(1).tolist()))


@torch.no_grad()
def answers(model, out, lams, pool, rewards, tokens_of, tokenizer, resumed, flags):
    """What the representatives' stage-1 models answer to prompts of the offline set: a list of dicts, and
    generated.jsonl, which is read again by a run that was killed after stage 2's first checkpoint (`resumed`)."""
    file = out / "generated.jsonl"
    if resumed and file.exists():
        return [s | {"prompt": turns(s["prompt"])} for s in map(json.loads, read_lines(file))]
    prompts = list(dict.fromkeys(row.prompt for row in pool.rows))
    order = torch.randperm(len(prompts), generator=generator_for(flags.seed, "prompts2"))
    prompts = [prompts[i] for i in order[:MOST_PROMPTS].tolist() for _ in range(flags.samples2)]
    t0, said, tokens, read = time.time(), [], 0, 0
    ids = [row.prompt for row in tokens_of([Row(x, [], [], []) for x in prompts])[0]]
    twin = shared_base(model)
    for g, i in bar(list(product(representatives(lams), range(0, len(ids), GEN_BATCH))), "sampling answers"):
        if i == 0:
            load_adapter(twin, stage1_file(out, g), rewards.dims)
        part = ids[i:i + GEN_BATCH]
        new = generate_all(twin, part, flags.max_new_tokens, tokenizer.ends,
                           generator_for(flags.seed, f"answers {g}", i), tokenizer.vocab_size)
        said += [{"adapter": g, "prompt": x, "response": text, "ended": end, "collapsed": collapsed(y)}
                 for x, y, text, end in zip(prompts[i:], new, *spoken(new, tokenizer))]
        tokens, read = tokens + sum(map(len, new)), read + sum(map(len, part))
    write_jsonl(file, [s | {"prompt": as_json(s["prompt"])} for s in said])
    log, seconds = Log(out / "metrics.jsonl", 1, desc="answers"), time.time() - t0
    log.step({"step": 0, "member": len(lams), "stage": 2, "tokens": tokens,
              "flops": model_flops(model.config, tokens + read, tokens, base=2),
              "tokens_per_second": tokens / seconds, "seconds": seconds},
             f"stage 2 | {len(said)} answers | {tokens / seconds / 1e3:.1f}k tok/s | {seconds:.0f} s")
    log.close()
    return said


def pool_of_answers(said, lams, rewards, tokens_of, flags, device):
    """The pool of stage 2, from what was answered, and a report of each representative.

    Degenerate answers are dropped before anything is sorted, for reward models love some of them: those that were cut
    off, are empty, or fell into a loop (data.text_rewards.collapsed). A text outside the embedded world is
    kept: its score is toy.OUTSIDE.
    """
    good = lambda s: s["ended"] and s["response"].strip() and not s["collapsed"]
    rows, _ = distinct([(s["prompt"], s["response"]) for s in said if good(s)])
    scores, reports = score(rewards, rows, device) if rows else torch.zeros(0, len(rewards.dims)), []
    on_world = flags.data is None and of_world(flags.rewards)
    outside = {(row.prompt, row.responses[0]) for row, s in zip(rows, scores) if on_world and (s == toy.OUTSIDE).all()}
    kinds = {"collapsed": lambda s: s["collapsed"], "empty": lambda s: not s["response"].strip(),
             "cut_off": lambda s: not s["ended"], "outside": lambda s: (s["prompt"], s["response"]) in outside}
    for g in representatives(lams):
        mine = [s for s in said if s["adapter"] == g]
        reports.append({"lam": lams[g].tolist(), "answers": len(mine), "kept": sum(map(bool, map(good, mine)))} | {
            kind: sum(map(holds, mine)) / len(mine) if on_world or kind != "outside" else None
            for kind, holds in kinds.items()})
    print(table({"stage 2, λ": [spelled(r["lam"]) for r in reports],
                 **{key: shown([r[key] for r in reports], "d") for key in ("answers", "kept")},
                 **{kind: shown([r[kind] for r in reports], ".3f") for kind in kinds}}))
    if len(rows) < max(1, flags.near // 2):
        raise UserError(f"stage 2: {len(rows)} different answers of {len(said)} are left, and half of --near "
                        f"{flags.near} are wanted: give more --samples2, more --max_new_tokens where they were cut "
                        f"off, or fewer --steps")
    return Pool(rows, tokens_of(rows)[0], scores), reports


if __name__ == "__main__":
    run_main(main, Flags, __doc__, several=True)
