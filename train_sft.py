"""train_sft.py - Panacea with the SFT objective (of its second version): demonstrations instead of comparisons.

    python train_sft.py --pref_dim 2                        # the embedded world
    python train_sft.py --pref_dim 2 --aggregate tche       # Tchebycheff instead of linear scalarisation
    python train_sft.py --pref_dim 2 --method rs            # baselines: rewarded soups; dps: one model per preference
    python train_sft.py --init <Hugging Face directory> --data helpful.jsonl humorous.jsonl --eval_data …
    torchrun --nproc_per_node 8 train_sft.py …              # the same on several GPUs; --parallel fsdp: a sharded base

Every dimension has demonstrations of its own, a set D_i of (prompt, response), and J_i = E_{D_i} log π(y|x). What
linear scalarisation aims at is then known: the mixture Σ λ_i p_i of what the m writers would say. Files are one per
dimension; equal prompts of several files (the paper's chat experiment: one prompt set, one answer per style) are
computed once.

m: dimensions   G: preferences per step (--lams_per_step), each on B / G rows   lam: (G, m) on the simplex
B: data rows per step, each a prompt   R: responses to them   L: (G, m), L_i = −J_i under each preference
On files J_i is divided by the tokens that dimension i's responses have on average: long-winded styles then weigh no
more than terse ones. A killed run continues from its last checkpoint, bit for bit.
"""
import runs.waiting  # noqa: F401  # isort: skip
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import eval_front
from aggregate import linear_scalarization, models_of, sample_preference, tchebycheff
from data import toy
from data.base import find_base, load_base, usual_rate
from data.batches import Batches
from data.chat import announce
from data.files import named, plain_name
from data.prompts import read_demonstrations
from data.sources import check_knows_world
from data.tokenizers import as_begun, tokenize
from data.trees import batch_logprobs
from fronts.objective import sft_ideal
from objectives import sft_loss
from runs.directory import TRAINED, adapter_file, models_left, open_run, run_directory, steps_each
from runs.files import UserError
from runs.flags import AdapterFlags, BaseFlags, PreferenceFlags, ProcessFlags, RunFlags, check_lam, flag, run_main
from runs.loop import Run, adamw, add_adapter
from runs.processes import check_shares, init_distributed, pick_device, shard, sharded
from runs.randomness import generator_for
from runs.speed import matmul_ceiling
from svd_lora import save_adapter, set_preference


@dataclass
class Flags(RunFlags, BaseFlags, AdapterFlags, PreferenceFlags, ProcessFlags):
    """The script's flags, with defaults and --help texts; more in runs/flags.py."""

    data: list[str] | None = flag(None, "files with prompt and response (data/README.md), one per dimension, as "
                                        "dimension=file (default: the files' names; or --dims)")
    eval_data: list[str] | None = flag(None, "the same for the evaluation, in the same order (required with --data)")
    batch_size: int | None = flag(None, "B: data rows per step (default 4 on the embedded world, 8 otherwise)", 1)
    rows: int = flag(480, "embedded world: data rows, each a prompt with responses by every dimension's writer", 1)
    responses: int | None = flag(
        None, "embedded world: responses by each writer in a row (default 48 / m, at least 2)", 1)
    vertex_share: float = flag(0.0, "share of the preferences that are vertices of the simplex; the others are drawn "
                                    "evenly from it", "share")
    epochs: float = flag(1.0, "passes over --data, where --steps is not given", "positive")


def train(model, out, name, fixed_lam, rows, kinds, scale, ideal, dims, flags, steps, member, resume, device):
    """Algorithm 1 for one adapter, written to out/name. fixed_lam: None for Panacea, else the one λ of this model.

    kinds: for each row which dimension each of its responses demonstrates   scale: (m,) factors of the J_i
    """
    m, G = len(dims), flags.lams_per_step if fixed_lam is None else 1
    add_adapter(model, flags, m if fixed_lam is None else 0, member)
    if flags.parallel == "fsdp":
        shard(model, device)
    known = [F.one_hot(torch.tensor(kind), m).float() for kind in kinds]                      # (responses, m) per row
    batches = Batches(rows, known, flags, G, device, member * steps, flags.data is not None)
    run = Run(model, adamw(model, flags), out, name, flags, steps, dims, member, resume)
    aggregate = linear_scalarization if flags.aggregate == "ls" else lambda L, lam: tchebycheff(L, lam, ideal)
    scale = scale.to(device)

    for step in run.steps():
        # Algorithm 1, line 5: a batch of prompts, with the responses of all dimensions' writers
        batch = batches.take(step)

        # line 6: G preferences λ; each row is computed under its group's own
        lam = (fixed_lam.expand(G, m) if fixed_lam is not None else
               sample_preference(G, m, vertex_share=flags.vertex_share,
                                 generator=generator_for(flags.seed, "lambda", step)))                # (G, m)
        if fixed_lam is None:
            set_preference(model, lam[batch.group])                                   # (B, m): d = cat(σ, s·λ), Eq. (9)

        # line 7: L_i = −J_i = −E log π(y|x) over the responses that demonstrate i, …
        nats = sft_loss(batch_logprobs(model, batch.tree))[:, None] * scale           # (R,) -> (R, m)
        L = batch.mean(nats)                                                          # (R, m) -> (G, m)

        # … aggregated according to λ
        objective = batch.over_preferences(aggregate(L, lam.to(device)))              # (G,) -> (), Eq. (6) or (7)

        # line 8: a step of gradient descent on U, V, σ and s
        run.update(objective)
        run.log(*batch.tree.size, ("losses",), lam=lam.tolist(), means={"losses": (nats, batch.known)})
    save_adapter(model, adapter_file(out, name), dims, method=flags.method,
                 lam=None if fixed_lam is None else fixed_lam.tolist())


def main(flags):
    """Trains one run (one adapter, or the several of rs and dps) and evaluates its front. Returns the run directory."""
    device, dtype = pick_device(flags.device, flags.precision, flags.plain)
    _, processes, device = init_distributed(device)
    given, on_world = replace(flags), flags.data is None               # given: before defaults are filled in
    flags.batch_size, flags.values_lr = flags.batch_size or (4 if on_world else 8), flags.values_lr or 10.0
    check(flags, processes)
    matmul_ceiling(device, dtype)                                      # now, while nothing else runs
    base, tokenizer_name = find_base(flags.init, flags.size, flags.tokenizer, device)
    rows, kinds, dims = demonstrations(flags)
    check_lam(flags, dims)
    m = len(dims)
    # a base to be sharded is read into main memory: it may be too large for one GPU
    load = lambda: load_base(base, tokenizer_name, torch.device("cpu") if flags.parallel == "fsdp" else device, dtype,
                             flags)
    model, tokenizer = load()
    flags.lr = flags.lr or (3e-3 if on_world else usual_rate(on_world, model.config))
    flags.steps = flags.steps or (240 if on_world else max(1, round(flags.epochs * len(rows) / flags.batch_size)))
    out = run_directory(["sft"], {"data", "eval_data", "fields"}, given, flags, dims)
    tokenizer = as_begun(tokenizer, out, flags.overwrite)
    announce(tokenizer.template, [row.prompt for row in rows])
    rows, cut = tokenize(rows, tokenizer, min(flags.max_length, model.config.context_length))
    print("data: {prompts} prompts, {prompts_cut} cut, and {responses_cut} of {responses} responses cut".format(**cut))
    scale = torch.ones(m) if on_world else 1 / mean_lengths(rows, kinds, m)
    ideal = flags.ideal or (sft_ideal(dims, "train") if on_world else None)

    models = models_of(flags.method, dims, flags.dps_parts, flags.lam)
    steps = steps_each(flags, models)
    objective = {"name": "sft", "beta": None, "aggregate": flags.aggregate, "ideal": flags.ideal}
    resume = open_run("train_sft.py", out, flags, dims, model, base, tokenizer, flags.method, objective=objective,
                      models=len(models), cut=cut, loss_scale=scale.tolist())
    if resume == TRAINED:
        return eval_front.show(out, flags)
    for i, (name, lam), state in models_left(models, resume):
        if sharded(model):                                             # by the adapter before
            model, _ = load()
        train(model, out, name, lam, rows, kinds, scale, ideal, dims, flags, steps, i, state, device)
    del model
    return eval_front.finish(out, f"{len(models)} adapter(s) of {steps} steps", flags, device, dtype, processes)


def check(flags, processes):
    """Fills in --lams_per_step. Raises UserError for flags that do not fit together. processes: how many there are."""
    B = flags.batch_size
    if flags.lams_per_step is None:
        flags.lams_per_step = math.gcd(8, B) if flags.aggregate == "ls" else 1
    m = len(flags.data or flags.dims or [0] * flags.pref_dim)
    if m < 2:
        raise UserError("a front needs at least 2 dimensions: --pref_dim 2, two names after --dims, or two files")
    if B % flags.lams_per_step:
        raise UserError(f"--batch_size {B} must be a multiple of --lams_per_step {flags.lams_per_step}")
    check_shares(flags, B, f"--batch_size {B}", processes)
    if flags.ideal is not None and (flags.aggregate != "tche" or len(flags.ideal) != m or min(flags.ideal) < 0):
        raise UserError(f"--ideal takes one loss, 0 or more, for each of the {m} dimensions, and only with "
                        f"--aggregate tche")
    check_knows_world(flags)
    if flags.data is None:
        return
    if flags.init is None:
        raise UserError("--data needs --init: the embedded world's base model knows no other text")
    if flags.eval and (flags.eval_data is None or len(flags.eval_data) != m):
        raise UserError(f"--data needs as many --eval_data files, {m}, in the same order (or --no-eval)")
    names = flags.dims or [named(f)[0] or plain_name(f) for f in flags.data]
    if len(names) != m or len(set(names)) < m:
        raise UserError(f"{m} files need {m} different names: --dims, or the names of the files; got {' '.join(names)}")


def demonstrations(flags):
    """The data rows, which dimension each of their responses demonstrates, and the dimensions."""
    if flags.data is None:
        dims = toy.choose_dims(flags.dims, flags.pref_dim)
        each = flags.responses or max(2, 48 // len(dims))
        return *toy.sample_demonstrations("train", dims, flags.rows, each, generator_for(flags.seed, "demos")), dims
    rows, kinds = read_demonstrations(flags.data, flags.fields)
    if flags.eval:
        read_demonstrations(flags.eval_data, flags.fields)     # now, so that a bad file is not found after the training
    dims = flags.dims or [named(f)[0] or plain_name(f) for f in flags.data]
    print(f"{len(rows)} prompts; responses: " + ", ".join(f"{d} {sum(k.count(i) for k in kinds)}"
                                                          for i, d in enumerate(dims)))
    return rows, kinds, dims


def mean_lengths(rows, kinds, m):
    """Mean tokens of a response of each dimension. (m,)"""
    lengths = [[len(y) for row, kind in zip(rows, kinds) for y, k in zip(row.responses, kind) if k == i]
               for i in range(m)]
    return torch.tensor([sum(x) / len(x) for x in lengths])


if __name__ == "__main__":
    run_main(main, Flags, __doc__, several=True)
