"""train_dpo.py - Panacea with DPO (arXiv:2402.02030v1, Algorithm 1): one model, one preference vector, the whole front.

    python train_dpo.py --pref_dim 2                        # the embedded world; trains its base model first
    python train_dpo.py --pref_dim 2 --aggregate tche       # Tchebycheff instead of linear scalarisation
    python train_dpo.py --pref_dim 2 --method rs            # baselines: rewarded soups; dps: one model a preference
    python train_dpo.py --pref_dim 2 --init <Hugging Face directory> --data train.jsonl --eval_data eval.jsonl
    torchrun --nproc_per_node 8 train_dpo.py …              # the same on several GPUs; --parallel fsdp: a sharded base

G: preferences a step (--lams_per_step)   B: data rows a step   P: compared pairs in them   m: dimensions
lam: (G, m) on the simplex   losses: (G, m), the mean DPO loss of each dimension under each preference
One forward serves all m dimensions: they differ in their labels alone. The reference is the same model with the adapter
off; its log-probs are computed once. A killed run continues from its last checkpoint, bit for bit.
Of several processes (rank of world) each takes its share of the rows; losses are means over all of them.
"""
import math
import os
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
from runs.processes import all_sum, init_distributed, ranks, reduce_gradients, with_value
from runs.randomness import epoch_batch, generator_for
from runs.sharding import shard
from runs.speed import matmul_ceiling, model_flops, report_speed
from data import toy
from data.preferences import read_preferences
from data.tokenizers import tokenize
from data.trees import batch_logprobs, pack, row_lengths
from objectives import dpo_loss, losses_on_pairs
from svd_lora import (adapters_off, fingerprint, inject_svd_lora, orthogonality_penalty, parameter_groups, save_adapter,
                      set_preference)
from train_base import find_base, load_base


@dataclass
class Flags(RunFlags):
    """The script's flags, with defaults and --help texts."""

    # what is trained
    pref_dim: int = flag(2, "m: the number of preference dimensions, the first m of the data's")
    dims: list[str] | None = flag(None, "these dimensions instead, in this order")
    method: Literal["panacea", "rs", "dps"] = flag("panacea", "Panacea, rewarded soups, or discrete policy solutions")
    aggregate: Literal["ls", "tche"] = flag("ls", "linear scalarisation, Eq. (14), or Tchebycheff, Eq. (16)")
    ideal: list[float] | None = flag(
        None, "Tchebycheff's best reachable losses, −z of Eq. (7), one a dimension; default 0, Eq. (16)")
    # data and base model
    init: str | None = flag(None, "Hugging Face directory of the base model (default: the embedded world's)")
    size: str | None = flag(None, "size of the embedded world's base model (default tiny; 125m on a GPU)")
    data: list[str] | None = flag(None, "preference JSONL files (default: the embedded world)")
    eval_data: list[str] | None = flag(None, "preference JSONL files for the evaluation (required with --data)")
    tokenizer: str | None = flag(
        None, "toy, gpt2, a *.tiktoken file or a directory with tokenizer.json (default: --init's)")
    max_length: int = flag(512, "tokens of prompt and response together; longer ones are cut and counted")
    rows: int = flag(1920, "embedded world: data rows, each a prompt with some responses and all comparisons of them")
    responses: int = flag(12, "embedded world: responses in a row")
    # the paper's hyper-parameters (Table 2)
    beta: float | None = flag(None, "β, the paper's scale_coeff (default 1 on the embedded world, 0.1 otherwise)")
    lora_dim: int = flag(8, "k, the learned rank; the whole rank is k + m, and k + 1 for rs and dps")
    lora_scaling: float = flag(512.0, "the adapter's gain is lora_scaling / lora_dim")
    lr: float | None = flag(
        None, "peak learning rate, then a cosine to 0 "
              "(default 2e-3 on the embedded world; else 2e-4, 1e-3 below width 512)")
    weight_decay: float = flag(0.05, "AdamW's, on U and V only")
    warmup_ratio: float = flag(0.03, "share of the steps with a rising learning rate")
    batch_size: int = flag(8, "data rows a step")
    epochs: float = flag(1.0, "passes over --data, where --steps is not given")
    seed: int = flag(0, "seed of adapter, data order and preferences")
    # beside the paper
    steps: int | None = flag(
        None, "optimizer steps in all, shared evenly by the models of rs and dps (embedded world: 400)")
    accumulate: int = flag(1, "micro-batches a step")
    lams_per_step: int | None = flag(None, "G: preferences a step, each on batch_size / G rows; 1 is the paper's "
                                           "(default 8 for ls; 1 for tche, whose maximum is of batch means)")
    dirichlet_alpha: float = flag(1.0, "preferences are drawn from Dirichlet(alpha) …")
    vertex_share: float = flag(0.25, "… or, this share of them, from the vertices of the simplex")
    dps_parts: int = flag(10, "dps: the simplex is cut in so many parts; m = 2: parts + 1 models")
    pref_scaling: float | None = flag(None, "ablation: s fixed at this value instead of learned (Fig. 7)")
    orth_coeff: float = flag(0.0, "coefficient of AdaLoRA's orthogonality penalty")
    max_grad_norm: float = flag(1.0, "gradient clipping")
    # running; more in common.RunFlags
    compile: bool = flag(False, "compile the blocks: a slow start, then faster steps")
    parallel: Literal["ddp", "fsdp"] = flag(
        "ddp", "under torchrun: a copy of the base in every process, or shares of it (--eval then reads it whole)")
    snapshots: int = flag(8, "adapters kept along the way, for the front's evolution")


def main(flags):
    """Trains one run (one adapter, or the several of rs and dps) and evaluates its front. Returns the run directory."""
    device, dtype = pick_device(flags.device, flags.precision)
    rank, world, device = init_distributed(device)
    given = replace(flags)
    if flags.lams_per_step is None:
        flags.lams_per_step = 8 if flags.aggregate == "ls" else 1
    check(flags, world)
    print(f"device: {device}, {world} process(es), base in {dtype}, matrix products at up to "
          f"{matmul_ceiling(device, dtype) / 1e12:.3g} TFLOP/s".replace("torch.", ""))
    rows, dims, base, tokenizer_name = prepare_data(flags, device)
    toy_world = flags.data is None
    if flags.beta is None:
        flags.beta = 1.0 if toy_world else 0.1
    if flags.steps is None:
        flags.steps = 400 if toy_world else max(1, round(flags.epochs * len(rows) / flags.batch_size))

    # a base to be sharded is read into main memory: it may be too large for one GPU
    fsdp, home = flags.parallel == "fsdp", torch.device("cpu") if flags.parallel == "fsdp" else device
    model, tokenizer = load_base(base, tokenizer_name, flags, home, dtype)
    if flags.lr is None:
        flags.lr = 2e-3 if toy_world else 1e-3 if model.config.d_model < 512 else 2e-4
    token_rows, cut = tokenize(rows, tokenizer, min(flags.max_length, model.config.context_length))
    print("data: {} rows, {prompts_cut} prompts and {responses_cut} of {responses} responses cut"
          .format(len(rows), **cut))

    files = [Path(f).stem for f in flags.data or []]
    out = Path(flags.out or run_name(["dpo", *files, flags.method, flags.aggregate, *dims, f"seed{flags.seed}"], given,
                                     {"method", "aggregate", "data", "eval_data"}))
    members = models_of(flags.method, dims, flags.dps_parts)
    if flags.steps < len(members):
        raise UserError(f"--steps {flags.steps} are shared by {len(members)} models of method {flags.method}")
    config = {"script": "train_dpo.py", "method": flags.method, "label": {"panacea": "Panacea", "rs": "Rewarded soups", "dps": "Discrete policy solutions"}[flags.method],
              "objective": {"name": "dpo", "beta": flags.beta, "aggregate": flags.aggregate, "ideal": flags.ideal,
                            "smooth": 0.0},
              "models": len(members), "flags": asdict(flags), "dims": list(dims),
              "base": str(base), "tokenizer": tokenizer_name, "fingerprint": fingerprint(model), "cut": cut,
              **versions()}
    resume = prepare_run(out, config)

    # T is padded to multiples where each new shape costs: compilation, or a fresh set of kernels
    multiple = 64 if flags.compile or device.type == "cuda" else 1
    if fsdp:
        shard(model, device)
    # log π_ref of every response, once. A row's log-probs are kept in a list of (responses,) tensors.
    reference = reference_logprobs(model, token_rows, flags.batch_size, multiple, device)

    steps = flags.steps // len(members)
    for i, (name, lam) in enumerate(members):
        if resume is None or resume["member"] <= i:
            if fsdp:                                                   # a sharded model takes no adapter any more
                model, _ = load_base(base, tokenizer_name, flags, home, dtype)
            train(model, out / name, lam, token_rows, reference, dims, flags, steps, i, resume, multiple, device)
            resume = None
    if rank > 0:
        return out
    del model, reference
    seconds = report_speed(out, device, dtype, world)
    print(f"trained {len(members)} adapter(s) of {steps} steps in {seconds:.0f} s: {out}")
    if flags.eval:
        eval_front.main(eval_front.Flags(runs=[str(out)], device=flags.device))
    (out / "state.safetensors").unlink(missing_ok=True)                # the run is whole: nothing is left to resume
    return out


def check(flags, world):
    """Raises UserError for flags that do not fit together. world: the number of processes."""
    G, B, A = flags.lams_per_step, flags.batch_size, flags.accumulate
    m = len(flags.dims) if flags.dims else flags.pref_dim
    if m < 2:
        raise UserError("a front needs at least 2 dimensions: --pref_dim 2, or two names after --dims")
    check_ranges(flags, dict(batch_size=1, lams_per_step=1, accumulate=1, steps=1, rows=1, responses=2, lora_dim=1,
                             dps_parts=1, snapshots=0, save_every=1, log_every=1, max_length=2),
                 positive=("beta", "lr", "epochs", "lora_scaling", "max_grad_norm", "dirichlet_alpha"),
                 shares=("vertex_share", "warmup_ratio"), not_negative=("weight_decay", "orth_coeff"))
    if flags.responses > toy.N_RESPONSES:
        raise UserError(f"--responses {flags.responses}: the embedded world has {toy.N_RESPONSES} to a prompt")
    if B % G or B % A:
        raise UserError(f"--batch_size {B} must be a multiple of --lams_per_step {G} and of --accumulate {A}")
    if B // A % world:
        raise UserError(f"--batch_size {B} / --accumulate {A} must be a multiple of the number of processes, {world}")
    if flags.parallel == "fsdp" and "RANK" not in os.environ:
        raise UserError("--parallel fsdp shares the base among processes: start it with torchrun --nproc_per_node N")
    if flags.parallel == "fsdp" and (flags.quantize != "none" or flags.compile):
        raise UserError("--parallel fsdp goes neither with --quantize nor with --compile: use --parallel ddp")
    if flags.aggregate == "tche" and G % A:
        raise UserError(f"Tchebycheff takes the maximum of means, so no preference may be split between micro-batches: "
                        f"--lams_per_step {G} must be a multiple of --accumulate {A}")
    if flags.ideal is not None and not all(0 <= z < 0.69 for z in flags.ideal):
        raise UserError("--ideal takes losses from 0 to 0.69: ln 2 is the loss of the base model itself")
    if flags.ideal is not None and (flags.aggregate != "tche" or len(flags.ideal) != m):
        raise UserError(f"--ideal takes one loss for each of the {m} dimensions, and only with --aggregate tche")
    if flags.data is not None and flags.init is None:
        raise UserError("--data needs --init: the embedded world's base model knows no other text")
    if flags.data is not None and flags.eval and flags.eval_data is None:
        raise UserError("--data needs --eval_data (or --no-eval)")


def prepare_data(flags, device):
    """The data rows, the dimensions, the base model's directory and its tokenizer's name."""
    base, tokenizer = find_base(flags.init, flags.size, flags.tokenizer, device)
    if flags.data is not None:
        rows, dims, dropped = read_preferences(flags.data, flags.dims, flags.pref_dim, flags.seed)
        if flags.eval:
            read_preferences(flags.eval_data, dims)            # now, so that a bad file is not found after the training
        print(f"{' '.join(flags.data)}: {len(rows)} rows with a label for {', '.join(dims)}; "
              f"{dropped} without were dropped")
        return rows, dims, base, tokenizer
    dims = toy.choose_dims(flags.dims, flags.pref_dim)
    rows = toy.sample_pairs("train", dims, flags.rows, flags.responses, generator_for(flags.seed, "pairs"))
    return rows, dims, base, tokenizer


def train(model, path, fixed_lam, rows, reference, dims, flags, steps, member, resume, multiple, device):
    """Algorithm 1 for one adapter, written to `path`.safetensors. fixed_lam: None for Panacea, else this member's λ."""
    m, B, out, (rank, world) = len(dims), flags.batch_size, path.parent, ranks()
    G = flags.lams_per_step if fixed_lam is None else 1
    k, pref_m = (flags.lora_dim, m) if fixed_lam is None else (flags.lora_dim + 1, 0)
    # inject divides by its rank: scaled so that the gain is lora_scaling / lora_dim for every method
    inject_svd_lora(model, k, pref_m, flags.lora_scaling / flags.lora_dim * k, flags.pref_scaling,
                    generator_for(flags.seed, "adapter", member))
    if flags.parallel == "fsdp":
        shard(model, device)
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    adapter_size = sum(p.numel() for _, p in parameters if p.ndim == 2)
    optimizer = torch.optim.AdamW(parameter_groups(model, flags.weight_decay), lr=flags.lr, betas=(0.9, 0.95),
                                  fused=True)                          # one pass over many small tensors
    aggregate = linear_scalarization if flags.aggregate == "ls" else lambda L, lam: tchebycheff(L, lam, flags.ideal)
    first_step = 0
    if resume is not None:
        load_state(out / "state.safetensors", parameters, optimizer)
        first_step = resume["step"]
    if flags.compile:
        compile_blocks(model)
    # the embedded world's rows are alike; those of files are sorted into batches of about one length
    lengths = None if flags.data is None else row_lengths(rows)
    snapshot_steps = {round(steps * (j + 1) / flags.snapshots) for j in range(flags.snapshots)}
    log = Log(out / "metrics.jsonl", steps, first_step, flags.log_every, path.name)

    for step in range(first_step, steps):
        t0 = time.time()
        # 1. preferences λ, one for each group of B / G rows
        lam = (fixed_lam.expand(G, m) if fixed_lam is not None else
               sample_preference(G, m, flags.dirichlet_alpha, flags.vertex_share,
                                 generator_for(flags.seed, "lambda", step)))
        # 2. batch
        chosen_rows = epoch_batch(len(rows), B, flags.seed, member * steps + step, lengths).tolist()
        group = torch.arange(B) // (B // G)                                           # (B,): the group of each row
        # labels a dimension has under each preference, in the whole batch: the denominators of the means
        labels = torch.zeros(G, m)
        for b, j in enumerate(chosen_rows):
            labels[group[b]] += (torch.tensor(rows[j].better) >= 0).sum(0)
        labels = labels.to(device)
        counts, absent = denominators(labels, flags.aggregate)
        total, losses, sums = 0.0, torch.zeros(G, m, device=device), torch.zeros(m + 2, device=device)
        for micro in torch.arange(B).chunk(flags.accumulate):
            mine = micro[rank::world]                                                 # this process's rows of it
            batch = pack([rows[chosen_rows[b]] for b in mine], multiple)
            tokens, predicted = int(batch.nodes.sum()), len(batch.targets)
            batch = batch.to(device)
            if pref_m:
                set_preference(model, lam[group[mine]])                               # one λ a row
            # 3. losses (G, m): this process's share of them, and their values, the sums of all shares
            pi = batch_logprobs(model, batch)                                         # (R,) log π(y|x)
            ref = torch.cat([reference[chosen_rows[b]] for b in mine]).to(device)     # (R,) log π_ref(y|x)
            loss, correct, known = losses_on_pairs(dpo_loss, pi, ref, batch.pairs, batch.better, flags.beta)   # (P, m) each
            pair_group = group[mine].to(device)[batch.pair_row]                       # (P,)
            share = torch.zeros(G, m, device=device).index_add(0, pair_group, loss * known) / counts
            micro_losses = with_value(share, all_sum(share.detach().clone()))
            # 4. aggregate: (G, m) -> (G,) -> mean over preferences. What other micro-batches hold is 0 here: linear
            #    scalarisation is additive, and for Tchebycheff every preference lies within one micro-batch (check())
            objective = aggregate(micro_losses + absent, lam.to(device)).sum() / G
            penalty = flags.orth_coeff * orthogonality_penalty(model) / flags.accumulate if flags.orth_coeff else 0.0
            # 5. backward. Every process has the whole penalty: its gradient is divided, for gradients are summed
            (objective + penalty / world).backward()
            total += (objective + penalty).detach()
            losses += micro_losses.detach()
            sums += torch.cat([(correct * known).sum(0), sums.new_tensor([tokens, predicted])])
        reduce_gradients([p for _, p in parameters])
        *hits, tokens, predicted = all_sum(sums).tolist()
        if not math.isfinite(total := total.item()):
            raise UserError(f"step {step + 1}: the loss is {total}; lower --lr or --lora_scaling")
        # 6. clip, step
        for g in optimizer.param_groups:
            g["lr"] = learning_rate(step, steps, flags.lr, flags.warmup_ratio)
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in parameters], flags.max_grad_norm).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # 7. log: means over the whole batch
        mean = ((losses * counts).sum(0) / labels.sum(0).clamp(min=1)).tolist()       # (m,)
        accuracy = (torch.tensor(hits) / labels.sum(0).clamp(min=1).cpu()).tolist()
        seconds = time.time() - t0
        log.step({"step": step + 1, "member": member, "loss": total, "losses": mean, "accuracy": accuracy,
                  "lam": lam.tolist(), "grad_norm": norm, "lr": optimizer.param_groups[0]["lr"], "tokens": int(tokens),
                  "flops": model_flops(model.config, int(tokens), int(predicted), adapter_size),
                  "tokens_per_second": tokens / seconds, "seconds": seconds},
                 f"step {step + 1:05d}/{steps:05d} | loss {total:.4f} | "
                 + " ".join(f"{dim} {x:.3f}" for dim, x in zip(dims, mean)) + " | acc "
                 + " ".join(f"{x:.2f}" for x in accuracy)
                 + f" | grad {norm:.2f} | {tokens / seconds / 1e3:.1f}k tok/s")
        # 8. save
        if step + 1 in snapshot_steps and step + 1 < steps:
            save_adapter(model, out / "snapshots" / f"{path.name}-{step + 1:06d}.safetensors", dims, step=step + 1)
        if (step + 1) % flags.save_every == 0 or step + 1 == steps:
            save_state(out / "state.safetensors", parameters, optimizer, step=step + 1, member=member)
    log.close()
    save_adapter(model, path.with_suffix(".safetensors"), dims, method=flags.method, beta=flags.beta,
                 lam=None if fixed_lam is None else fixed_lam.tolist())


def compile_blocks(model):
    """torch.compile for each block, in place. Shapes are static, one compilation each: T comes in multiples."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for block in model.blocks:
        block.compile(dynamic=False)


@torch.no_grad()
def reference_logprobs(model, rows, batch_size, multiple, device):
    """log π_ref of every response: a list with one (responses,) CPU tensor a row.

    Rows are taken in the order of their lengths, so that little is padding; each process takes its share.
    """
    (rank, world), n = ranks(), len(rows)
    order = row_lengths(rows).argsort(stable=True).tolist()
    sizes = [len(row.responses) for row in rows]
    out = list(torch.zeros(sum(sizes)).split(sizes))
    with adapters_off(model):
        for i in range(0, n, batch_size):
            mine = order[i:i + batch_size][rank::world] or order[:1]       # a share may be empty, but no forward pass:
            batch = pack([rows[j] for j in mine], multiple).to(device)     # with fsdp the processes make it together
            logps = batch_logprobs(model, batch).cpu().split([sizes[j] for j in mine])
            for j, logp in zip(order[i:i + batch_size][rank::world], logps):
                out[j] = logp
    return list(all_sum(torch.cat(out).to(device)).cpu().split(sizes))


if __name__ == "__main__":
    run_main(main, Flags, __doc__, several=True)
