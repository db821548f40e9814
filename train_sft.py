"""train_sft.py - Panacea with the SFT objective (the paper's second version): one model, every mixture of m styles.

    python train_sft.py --pref_dim 2                        # the embedded world; trains its base model first
    python train_sft.py --pref_dim 10 --aggregate tche      # up to ten dimensions; Tchebycheff
    python train_sft.py --pref_dim 2 --method rs            # baselines: rewarded soups; dps: one model a preference
    python train_sft.py --init <Hugging Face directory> --data helpful.jsonl humorous.jsonl --eval_data …

Every dimension has demonstrations of its own, a set D_i of (prompt, response), and J_i = E_{D_i} log π(y|x). What
linear scalarisation aims at is then known: the mixture Σ λ_i p_i of what the m writers would say. Files are one a
dimension; where they answer the same prompts (the paper's chat experiment: one prompt set, one answer a style) these
are shared.

G: preferences a step (--lams_per_step)   B: data rows a step, each a prompt   R: responses to them   m: dimensions
lam: (G, m) on the simplex   losses: (G, m), L_i = −J_i under each preference
A killed run continues from its last checkpoint, bit for bit.
"""
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

import eval_front
from aggregate import denominators, linear_scalarization, models_of, sample_preference, tchebycheff
from runs.checkpoints import load_state, save_state
from runs.device import pick_device
from runs.directory import prepare_run, run_name, versions
from runs.files import UserError
from runs.flags import RunFlags, check_ranges, flag, run_main
from runs.log import Log
from runs.loop import learning_rate
from runs.randomness import epoch_batch, generator_for
from runs.speed import matmul_ceiling, model_flops, report_speed
from data import toy
from data.prompts import read_demonstrations
from data.tokenizers import tokenize
from data.trees import batch_logprobs, pack, row_lengths
from fronts.exact import sft_ideal
from objectives import sft_loss
from svd_lora import fingerprint, inject_svd_lora, parameter_groups, save_adapter, set_preference
from train_base import find_base, load_base


@dataclass
class Flags(RunFlags):
    """The script's flags, with defaults and --help texts."""

    # what is trained
    pref_dim: int = flag(2, "m: the number of preference dimensions, the first m of the embedded world's")
    dims: list[str] | None = flag(None, "these dimensions instead; with --data: their names (default: the files')")
    method: Literal["panacea", "rs", "dps"] = flag("panacea", "Panacea, rewarded soups, or discrete policy solutions")
    aggregate: Literal["ls", "tche"] = flag("ls", "linear scalarisation or Tchebycheff")
    ideal: list[float] | None = flag(None, "Tchebycheff's best reachable losses, −z of Eq. (7), one a dimension "
                                           "(default: the entropies of the embedded world's writers; 0 for files)")
    # data and base model
    init: str | None = flag(None, "Hugging Face directory of the base model (default: the embedded world's)")
    size: str | None = flag(None, "size of the embedded world's base model (default tiny; 125m on a GPU)")
    data: list[str] | None = flag(None, "JSONL files with prompt and response, one a dimension")
    eval_data: list[str] | None = flag(None, "the same for the evaluation, in the same order (required with --data)")
    tokenizer: str | None = flag(
        None, "toy, gpt2, a *.tiktoken file or a directory with tokenizer.json (default: --init's)")
    max_length: int = flag(512, "tokens of prompt and response together; longer ones are cut and counted")
    rows: int = flag(1920, "embedded world: data rows, each a prompt with responses by every dimension's writer")
    responses: int | None = flag(None, "embedded world: responses by each of them in a row (default 8 / m, at least 2)")
    # hyper-parameters
    per: Literal["response", "token"] = flag(
        "token", "files: J_i in nats a response, or by the tokens that dimension i's responses have on average: "
                 "long-winded styles then weigh no more than terse ones (embedded world: a response)")
    lora_dim: int = flag(8, "k, the learned rank; the whole rank is k + m, and k + 1 for rs and dps")
    lora_scaling: float = flag(512.0, "the adapter's gain is lora_scaling / lora_dim")
    lr: float | None = flag(
        None, "peak learning rate, then a cosine to 0 "
              "(default 2e-3 on the embedded world; else 2e-4, 1e-3 below width 512)")
    weight_decay: float = flag(0.05, "AdamW's, on U and V only")
    warmup_ratio: float = flag(0.03, "share of the steps with a rising learning rate")
    batch_size: int = flag(8, "B: data rows a step")
    epochs: float = flag(1.0, "passes over --data, where --steps is not given")
    seed: int = flag(0, "seed of adapter, data order and preferences")
    steps: int | None = flag(
        None, "optimizer steps in all, shared evenly by the models of rs and dps (embedded world: 400)")
    lams_per_step: int | None = flag(None, "G: preferences a step, each on batch_size / G rows (default 8 for ls; 1 "
                                           "for tche, whose maximum is of batch means)")
    dirichlet_alpha: float = flag(1.0, "preferences are drawn from Dirichlet(alpha) …")
    vertex_share: float = flag(0.25, "… or, this share of them, from the vertices of the simplex")
    dps_parts: int = flag(10, "dps: the simplex is cut in so many parts; m = 2: parts + 1 models")
    max_grad_norm: float = flag(1.0, "gradient clipping")
    snapshots: int = flag(8, "adapters kept along the way, for the front's evolution")
    # running: common.RunFlags


def main(flags):
    """Trains one run (one adapter, or the several of rs and dps) and evaluates its front. Returns the run directory."""
    device, dtype = pick_device(flags.device, flags.precision)
    given = replace(flags)
    check(flags)
    matmul_ceiling(device, dtype)                                      # now, while nothing else runs
    base, tokenizer_name = find_base(flags.init, flags.size, flags.tokenizer, device)
    dims = flags.dims or ([Path(f).stem for f in flags.data] if flags.data else None)
    rows, kinds, dims = prepare_data(flags, dims)
    m, toy_world = len(dims), flags.data is None
    model, tokenizer = load_base(base, tokenizer_name, flags, device, dtype)
    if flags.lr is None:
        flags.lr = 2e-3 if toy_world else 1e-3 if model.config.d_model < 512 else 2e-4
    if flags.steps is None:
        flags.steps = 400 if toy_world else max(1, round(flags.epochs * len(rows) / flags.batch_size))
    token_rows, cut = tokenize(rows, tokenizer, min(flags.max_length, model.config.context_length))
    print("data: {} prompts, {prompts_cut} cut, and {responses_cut} of {responses} responses cut"
          .format(len(rows), **cut))
    scale = torch.ones(m) if toy_world or flags.per == "response" else 1 / mean_lengths(token_rows, kinds, m)
    ideal = flags.ideal or (sft_ideal(dims, "train") if toy_world else None)

    out = Path(flags.out or run_name(["sft", flags.method, flags.aggregate, *dims, f"seed{flags.seed}"], given,
                                     {"method", "aggregate", "data", "eval_data"}))
    members = models_of(flags.method, dims, flags.dps_parts)
    if flags.steps < len(members):
        raise UserError(f"--steps {flags.steps} are shared by {len(members)} models of method {flags.method}")
    config = {"script": "train_sft.py", "method": flags.method, "label": {"panacea": "Panacea", "rs": "Rewarded soups", "dps": "Discrete policy solutions"}[flags.method],
              "objective": {"name": "sft", "beta": None, "aggregate": flags.aggregate, "ideal": flags.ideal,
                            "smooth": 0.0},
              "models": len(members), "flags": asdict(flags), "dims": list(dims),
              "loss_scale": scale.tolist(), "base": str(base), "tokenizer": tokenizer_name,
              "fingerprint": fingerprint(model), "cut": cut, **versions()}
    resume = prepare_run(out, config)
    steps = flags.steps // len(members)
    for i, (name, lam) in enumerate(members):
        if resume is None or resume["member"] <= i:
            train(model, out / name, lam, token_rows, kinds, scale, ideal, dims, flags, steps, i, resume, device)
            resume = None
    seconds = report_speed(out, device, dtype)
    print(f"trained {len(members)} adapter(s) of {steps} steps in {seconds:.0f} s: {out}")
    del model
    if flags.eval:
        eval_front.main(eval_front.Flags(runs=[str(out)], device=flags.device))
    (out / "state.safetensors").unlink(missing_ok=True)                # the run is whole: nothing is left to resume
    return out


def check(flags):
    """Raises UserError for flags that do not fit together."""
    G, B = flags.lams_per_step, flags.batch_size
    if flags.lams_per_step is None:
        G = flags.lams_per_step = math.gcd(8, B) if flags.aggregate == "ls" else 1
    m = len(flags.data or flags.dims or [0] * flags.pref_dim)
    if m < 2:
        raise UserError("a front needs at least 2 dimensions: --pref_dim 2, two names after --dims, or two files")
    check_ranges(flags, dict(batch_size=1, lams_per_step=1, steps=1, rows=1, responses=1, lora_dim=1, dps_parts=1,
                             snapshots=0, save_every=1, log_every=1, max_length=2),
                 positive=("lr", "epochs", "lora_scaling", "max_grad_norm", "dirichlet_alpha"),
                 shares=("vertex_share", "warmup_ratio"), not_negative=("weight_decay",))
    if B % G:
        raise UserError(f"--batch_size {B} must be a multiple of --lams_per_step {G}")
    if flags.ideal is not None and (flags.aggregate != "tche" or len(flags.ideal) != m or min(flags.ideal) < 0):
        raise UserError(f"--ideal takes one loss, 0 or more, for each of the {m} dimensions, and only with "
                        f"--aggregate tche")
    if flags.data is None:
        return
    if flags.init is None:
        raise UserError("--data needs --init: the embedded world's base model knows no other text")
    if flags.eval and (flags.eval_data is None or len(flags.eval_data) != m):
        raise UserError(f"--data needs as many --eval_data files, {m}, in the same order (or --no-eval)")
    names = flags.dims or [Path(f).stem for f in flags.data]
    if len(names) != m or len(set(names)) < m:
        raise UserError(f"{m} files need {m} different names: --dims, or the names of the files; got {' '.join(names)}")


def prepare_data(flags, dims):
    """The data rows, which dimension each of their responses demonstrates, and the dimensions."""
    if flags.data is None:
        dims = toy.choose_dims(flags.dims, flags.pref_dim)
        each = flags.responses or max(2, 8 // len(dims))
        return *toy.sample_demonstrations("train", dims, flags.rows, each, generator_for(flags.seed, "demos")), dims
    rows, kinds = read_demonstrations(flags.data)
    if flags.eval:
        read_demonstrations(flags.eval_data)                   # now, so that a bad file is not found after the training
    print(f"{len(rows)} prompts; responses: " + ", ".join(f"{d} {sum(k.count(i) for k in kinds)}"
                                                          for i, d in enumerate(dims)))
    return rows, kinds, dims


def mean_lengths(rows, kinds, m):
    """Mean tokens of a response of each dimension. (m,)"""
    lengths = [[len(y) for row, kind in zip(rows, kinds) for y, k in zip(row.responses, kind) if k == i]
               for i in range(m)]
    return torch.tensor([sum(x) / len(x) for x in lengths])


def train(model, path, fixed_lam, rows, kinds, scale, ideal, dims, flags, steps, member, resume, device):
    """Algorithm 1 for one adapter, written to `path`.safetensors. fixed_lam: None for Panacea, else this member's λ."""
    m, B, out = len(dims), flags.batch_size, path.parent
    G = flags.lams_per_step if fixed_lam is None else 1
    k, pref_m = (flags.lora_dim, m) if fixed_lam is None else (flags.lora_dim + 1, 0)
    # inject divides by its rank: scaled so that the gain is lora_scaling / lora_dim for every method
    inject_svd_lora(model, k, pref_m, flags.lora_scaling / flags.lora_dim * k,
                    generator=generator_for(flags.seed, "adapter", member))
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    adapter_size = sum(p.numel() for _, p in parameters if p.ndim == 2)
    optimizer = torch.optim.AdamW(parameter_groups(model, flags.weight_decay), lr=flags.lr, betas=(0.9, 0.95),
                                  fused=True)                          # one pass over many small tensors
    aggregate = linear_scalarization if flags.aggregate == "ls" else lambda L, lam: tchebycheff(L, lam, ideal)
    first_step = 0
    if resume is not None:
        load_state(out / "state.safetensors", parameters, optimizer)
        first_step = resume["step"]
    # the embedded world's rows are alike; those of files are sorted into batches of about one length
    lengths = None if flags.data is None else row_lengths(rows)
    multiple = 64 if device.type == "cuda" else 1             # T in multiples: few shapes, few sets of kernels
    snapshot_steps = {round(steps * (j + 1) / flags.snapshots) for j in range(flags.snapshots)}
    log = Log(out / "metrics.jsonl", steps, first_step, flags.log_every, path.name)

    for step in range(first_step, steps):
        t0 = time.time()
        # 1. preferences λ, one for each group of B / G rows
        lam = (fixed_lam.expand(G, m) if fixed_lam is not None else
               sample_preference(G, m, flags.dirichlet_alpha, flags.vertex_share,
                                 generator_for(flags.seed, "lambda", step)))
        # 2. batch: B prompts with the responses of all dimensions
        chosen = epoch_batch(len(rows), B, flags.seed, member * steps + step, lengths).tolist()
        group = torch.arange(B) // (B // G)                                           # (B,): the group of each row
        batch = pack([rows[j] for j in chosen], multiple)
        kind = torch.tensor([i for j in chosen for i in kinds[j]])                    # (R,) the dimension of a response
        cell = group.repeat_interleave(torch.tensor([len(kinds[j]) for j in chosen])) * m + kind      # (R,) of (G, m)
        here = torch.bincount(cell, minlength=G * m).view(G, m).float().to(device)    # responses in each
        counts, absent = denominators(here, flags.aggregate)
        tokens, predicted = int(batch.nodes.sum()), len(batch.targets)
        batch = batch.to(device)
        if pref_m:
            set_preference(model, lam[group])                                         # one λ a row
        # 3. losses (G, m): L_i = −J_i = −E log π(y|x)
        nats = sft_loss(batch_logprobs(model, batch)) * scale[kind].to(device)        # (R,)
        losses = nats.new_zeros(G * m).index_add(0, cell.to(device), nats).view(G, m) / counts
        # 4. aggregate: (G, m) -> (G,) -> mean over preferences
        loss = aggregate(losses + absent, lam.to(device)).mean()
        if not math.isfinite(total := loss.item()):
            raise UserError(f"step {step + 1}: the loss is {total}; lower --lr or --lora_scaling")
        # 5. backward
        loss.backward()
        # 6. clip, step
        for g in optimizer.param_groups:
            g["lr"] = learning_rate(step, steps, flags.lr, flags.warmup_ratio)
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in parameters], flags.max_grad_norm).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # 7. log: means over the whole batch
        mean = ((losses.detach() * counts).sum(0) / here.sum(0).clamp(min=1)).tolist()          # (m,)
        seconds = time.time() - t0
        log.step({"step": step + 1, "member": member, "loss": total, "losses": mean, "lam": lam.tolist(),
                  "grad_norm": norm, "lr": optimizer.param_groups[0]["lr"], "tokens": tokens,
                  "flops": model_flops(model.config, tokens, predicted, adapter_size),
                  "tokens_per_second": tokens / seconds, "seconds": seconds},
                 f"step {step + 1:05d}/{steps:05d} | loss {total:.4f} | "
                 + " ".join(f"{dim} {x:.3f}" for dim, x in zip(dims, mean))
                 + f" | grad {norm:.2f} | {tokens / seconds / 1e3:.1f}k tok/s")
        # 8. save
        if step + 1 in snapshot_steps and step + 1 < steps:
            save_adapter(model, out / "snapshots" / f"{path.name}-{step + 1:06d}.safetensors", dims, step=step + 1)
        if (step + 1) % flags.save_every == 0 or step + 1 == steps:
            save_state(out / "state.safetensors", parameters, optimizer, step=step + 1, member=member)
    log.close()
    save_adapter(model, path.with_suffix(".safetensors"), dims, method=flags.method,
                 lam=None if fixed_lam is None else fixed_lam.tolist())


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
