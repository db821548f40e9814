"""train_dpo.py - Panacea with DPO (arXiv:2402.02030v1, Algorithm 1): one model, one preference vector, the whole front.

    python train_dpo.py --pref_dim 2                        # the embedded world
    python train_dpo.py --pref_dim 2 --aggregate tche       # Tchebycheff instead of linear scalarisation
    python train_dpo.py --pref_dim 2 --method rs            # baselines: rewarded soups; dps: one model per preference
    python train_dpo.py --pref_dim 2 --method prompt        # baseline: λ as a text in front of the prompt
    python train_dpo.py --pref_dim 2 --loss ipo             # IPO's loss in the place of DPO's
    python train_dpo.py --pref_dim 2 --init <Hugging Face directory> --data train.jsonl --eval_data eval.jsonl
    torchrun --nproc_per_node 8 train_dpo.py …              # the same on several GPUs; --parallel fsdp: a sharded base

m: dimensions   G: preferences per step (--lams_per_step), each on B / G rows   lam: (G, m) on the simplex
B: data rows per step   R: responses in them   P: compared pairs   π: the model, π_ref: the same with its adapter off
L: (G, m), the mean loss of each dimension under each preference: one forward pass serves all m dimensions, since they
differ in their labels alone.
A killed run continues from its last checkpoint, bit for bit (runs/loop.py; micro-batches and processes are there and in
data/batches.py).
"""
import runs.waiting  # noqa: F401  # isort: skip
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

import eval_front
from aggregate import linear_scalarization, models_of, sample_preference, tchebycheff
from data.base import find_base, load_base, usual_rate
from data.batches import Batches, pad_to
from data.chat import announce
from data.files import plain_name
from data.prompts import written
from data.reference import kept_file, reference_logprobs
from data.sources import check_preferences, preference_rows
from data.tokenizers import as_begun, tokenize
from data.trees import edge_logprobs, predicting_states, row_lengths, with_prefix
from objectives import dpo_loss, ipo_loss, losses_on_pairs, response_logprobs, support_loss
from ops.fused import log_partition
from runs.directory import TRAINED, adapter_file, models_left, open_run, run_directory, steps_each
from runs.files import UserError
from runs.flags import AdapterFlags, BaseFlags, PreferenceFlags, ProcessFlags, RunFlags, check_lam, flag, run_main
from runs.loop import Run, adamw, add_adapter
from runs.processes import check_shares, init_distributed, pick_device, shard, sharded, sum_of_all
from runs.randomness import generator_for, items_of_steps
from runs.speed import matmul_ceiling
from svd_lora import orthogonality_penalty, save_adapter, set_preference

LOSSES = {"dpo": dpo_loss, "ipo": ipo_loss}
LEAST = 1e-3            # --keep: the reference allows a token to which it gives at least this probability


@dataclass
class Flags(RunFlags, BaseFlags, AdapterFlags, PreferenceFlags, ProcessFlags):
    """The script's flags, with defaults and --help texts; more in runs/flags.py."""

    method: Literal["panacea", "rs", "dps", "prompt"] = flag(
        "panacea", "Panacea; rewarded soups: one model per dimension; discrete policy solutions: one per preference; "
                   "prompt: an adapter of Panacea's rank that reads λ as a text in front of the prompt")
    loss: Literal["dpo", "ipo"] = flag("dpo", "of a pair: DPO's, Eq. (2), or IPO's")
    beta: float | None = flag(None, "β, the paper's scale_coeff; IPO's τ "
                                    "(default 1 on the embedded world, 0.1 otherwise)", "positive")
    data: list[str] | None = flag(None, "preference files of any layout of data/README.md, dimension=file where one "
                                        "has a single label without a name (default: the embedded world)")
    eval_data: list[str] | None = flag(None, "the same for the evaluation (required with --data)")
    batch_size: int | None = flag(None, "B: data rows per step (default 4 on the embedded world, 8 otherwise)", 1)
    rows: int = flag(480, "embedded world: data rows, each a prompt with some responses, all compared", 1)
    responses: int = flag(48, "embedded world: responses in a row; 48 make 1128 pairs", 2)
    epochs: float = flag(1.0, "passes over --data, where --steps is not given", "positive")
    accumulate: int = flag(1, "micro-batches per step: less memory", 1)
    pref_scaling: float | None = flag(None, "ablation: s fixed at this value instead of learned (Fig. 7)")
    keep: float | None = flag(None, "weight of a term that keeps probability on tokens that the reference allows "
                                    "(default 1 on the embedded world, 0 otherwise)", "not negative")
    orth_coeff: float = flag(0.0, "coefficient of AdaLoRA's orthogonality penalty", "not negative")


def train(model, out, name, fixed_lam, rows, reference, allowed, dims, flags, steps, member, resume, device,
          text_of=None):
    """Algorithm 1 for one adapter, written to out/name. fixed_lam: None for Panacea, else the one λ of this model.
    text_of: λ (G, m) -> its text (G, n), tokens that each prompt begins with, in the place of Eq. (9)."""
    m, G = len(dims), flags.lams_per_step if fixed_lam is None else 1
    add_adapter(model, flags, m if fixed_lam is None and not text_of else 0, member, more=m if text_of else 1)
    if flags.parallel == "fsdp":
        shard(model, device)
    known = [(torch.tensor(row.better) >= 0).float() for row in rows]
    batches = Batches(rows, known, flags, G, device, member * steps, flags.data is not None, flags.accumulate)
    each = flags.batch_size * sum(len(row.responses) for row in rows) / len(rows)     # responses in a step
    run = Run(model, adamw(model, flags), out, name, flags, steps, dims, member, resume, flags.accumulate)
    aggregate = linear_scalarization if flags.aggregate == "ls" else lambda L, lam: tchebycheff(L, lam, flags.ideal)

    for step in run.steps():
        # Algorithm 1, line 5: a batch of rows
        batch = batches.take(step, run.part)

        # line 6: G preferences λ; each row is computed under its group's own
        lam = (fixed_lam.expand(G, m) if fixed_lam is not None else
               sample_preference(G, m, vertex_share=flags.vertex_share,
                                 generator=generator_for(flags.seed, "lambda", step)))                # (G, m)
        tree = with_prefix(batch.tree, text_of(lam)[batch.group]) if text_of else batch.tree
        if fixed_lam is None and not text_of:
            set_preference(model, lam[batch.group])                                   # (B, m): d = cat(σ, s·λ), Eq. (9)

        # line 7: the losses of all dimensions, from the log-probs of the responses, …
        states = predicting_states(model, tree)                                       # (N, D)
        logps = edge_logprobs(model, tree, states)                                    # (N,) log π(y_t|x, y_<t)
        pi = response_logprobs(logps, tree.paths)                                     # (R,) log π(y|x)
        ref = torch.cat([reference[j] for j in batch.rows]).to(device)                # (R,) log π_ref(y|x)
        losses, correct, _ = losses_on_pairs(LOSSES[flags.loss], pi, ref, batch.tree.pairs, batch.tree.better,
                                             flags.beta)                              # (P, m), Eq. (2)
        L = batch.mean(losses)                                                        # (P, m) -> (G, m)

        # … aggregated according to λ
        objective = batch.over_preferences(aggregate(L, lam.to(device)))              # (G,) -> (), Eq. (14) or (16)

        # line 8: a step of gradient descent on U, V, σ and s
        penalty = flags.orth_coeff * orthogonality_penalty(model) if flags.orth_coeff else 0.0        # of Eq. (5)
        if flags.keep:
            objective = objective + flags.keep * astray(model, batch, states, logps, allowed) / each
        run.update(objective, penalty)
        run.log(*batch.tree.size, ("losses", "accuracy"), lam=lam.tolist(),
                means={"losses": (losses, batch.known), "accuracy": (correct, batch.known)})
    save_adapter(model, adapter_file(out, name), dims, method=flags.method, beta=flags.beta,
                 lam=None if fixed_lam is None else fixed_lam.tolist())


def astray(model, batch, states, logps, allowed):
    """What keeps the policy to tokens that the reference allows (objectives.support_loss), summed over the edges of the
    batch's trees. Its value is of all processes, its gradient of this one's rows.

    states: (N, D)   logps: (N,) of the targets   allowed: for each row of the data (counts, tokens), reference_logprobs
    """
    counts, tokens = (torch.cat(x).to(states.device).long() for x in zip(*(allowed[j] for j in batch.rows)))
    edge = torch.arange(len(counts), device=states.device).repeat_interleave(counts)  # (M,), one for each allowed token
    h, W = states.float(), model.head_weight
    log_Z = log_partition(h, W, batch.tree.targets, logps)                            # (N,)
    logits = (h.index_select(0, edge) * W[tokens].float()).sum(1)                     # (M,)
    return sum_of_all(support_loss(logits - log_Z.index_select(0, edge), edge, len(counts)).sum())


def main(flags):
    """Trains one run (one adapter, or the several of rs and dps) and evaluates its front. Returns the run directory."""
    device, dtype = pick_device(flags.device, flags.precision, flags.plain)
    _, processes, device = init_distributed(device)
    given, on_world = replace(flags), flags.data is None               # given: before defaults are filled in
    flags.batch_size, flags.values_lr = flags.batch_size or (4 if on_world else 8), flags.values_lr or 10.0
    flags.lams_per_step = flags.lams_per_step or (math.gcd(8, flags.batch_size) if flags.aggregate == "ls" else 1)
    flags.beta = flags.beta or (1.0 if on_world else 0.1)
    flags.keep = float(on_world) if flags.keep is None else flags.keep
    check(flags, processes)
    print(f"device: {device}, {processes} process(es), base in {dtype}, matrix products at up to "
          f"{matmul_ceiling(device, dtype) / 1e12:.3g} TFLOP/s".replace("torch.", ""))
    base, tokenizer_name = find_base(flags.init, flags.size, flags.tokenizer, device)
    rows, _, dims = preference_rows(flags)
    check_lam(flags, dims)
    # a base to be sharded is read into main memory: it may be too large for one GPU
    load = lambda: load_base(base, tokenizer_name, torch.device("cpu") if flags.parallel == "fsdp" else device, dtype,
                             flags)
    model, tokenizer = load()
    flags.lr = flags.lr or (3e-3 if on_world else usual_rate(on_world, model.config))
    flags.steps = flags.steps or (240 if on_world else max(1, round(flags.epochs * len(rows) / flags.batch_size)))
    files = [plain_name(f) for f in flags.data or []]
    out = run_directory(["dpo", *files], {"data", "eval_data", "fields"}, given, flags, dims)
    tokenizer = as_begun(tokenizer, out, flags.overwrite)
    announce(tokenizer.template, [row.prompt for row in rows])
    rows, cut = tokenize(rows, tokenizer, min(flags.max_length, model.config.context_length))
    print("data: {prompts} rows, {prompts_cut} prompts and {responses_cut} of {responses} responses cut".format(**cut))

    models = models_of(flags.method, dims, flags.dps_parts, flags.lam)
    text_of = (lambda lams: written(lams, tokenizer)) if flags.method == "prompt" else None
    steps = steps_each(flags, models)
    objective = {"name": flags.loss, "beta": flags.beta, "aggregate": flags.aggregate, "ideal": flags.ideal}
    resume = open_run("train_dpo.py", out, flags, dims, model, base, tokenizer, flags.method, objective=objective,
                      models=len(models), cut=cut)
    if resume == TRAINED:
        return eval_front.show(out, flags)
    kept = kept_file(out, model, dtype, flags.quantize) if flags.data and not flags.keep else None
    if flags.parallel == "fsdp":
        shard(model, device)
    used = items_of_steps(len(rows), flags.batch_size, flags.seed, steps * len(models),
                          row_lengths(rows) if flags.data else None)
    reference, allowed = reference_logprobs(model, rows, flags.batch_size, pad_to(device), device,
                                            LEAST if flags.keep else None, used, kept)                 # once
    for i, (name, lam), state in models_left(models, resume):
        if sharded(model):                                             # train() shards anew, with the adapter in place
            model, _ = load()
        train(model, out, name, lam, rows, reference, allowed, dims, flags, steps, i, state, device, text_of)
    del model, reference
    return eval_front.finish(out, f"{len(models)} adapter(s) of {steps} steps", flags, device, dtype, processes)


def check(flags, processes):
    """Raises UserError for flags that do not fit together. processes: how many there are."""
    G, B, parts = flags.lams_per_step, flags.batch_size, flags.accumulate
    m = len(flags.dims) if flags.dims else flags.pref_dim
    if m < 2:
        raise UserError("a front needs at least 2 dimensions: --pref_dim 2, or two names after --dims")
    check_preferences(flags)
    if flags.method == "prompt" and flags.data is not None:
        raise UserError("--method prompt is for the embedded world, without --data")
    if B % G or B % parts:
        raise UserError(f"--batch_size {B} must be a multiple of --lams_per_step {G} and of --accumulate {parts}")
    check_shares(flags, B // parts, f"--batch_size {B} / --accumulate {parts}", processes)
    if flags.aggregate == "tche" and G % parts:
        raise UserError(f"Tchebycheff takes the maximum of means, so no preference may be split between micro-batches: "
                        f"--lams_per_step {G} must be a multiple of --accumulate {parts}")
    of_base = math.log(2) if flags.loss == "dpo" else 1 / (2 * flags.beta) ** 2       # the loss at π = π_ref
    if flags.ideal is not None and not all(0 <= z < of_base for z in flags.ideal):
        raise UserError(f"--ideal takes losses from 0 to below {of_base:.4g}, the loss of the base model itself")
    if flags.ideal is not None and (flags.aggregate != "tche" or len(flags.ideal) != m):
        raise UserError(f"--ideal takes one loss for each of the {m} dimensions, and only with --aggregate tche")


if __name__ == "__main__":
    run_main(main, Flags, __doc__, several=True)
