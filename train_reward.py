"""train_reward.py - reward models, one scalar a preference dimension (Panacea, arXiv:2402.02030v1, Sec. 3.1).

    python train_reward.py --pref_dim 2                      # the embedded world; trains its base model first
    python train_reward.py --pref_dim 2 --reward_scale 1 5   # the paper's factor 5 on the harmless reward
    python train_reward.py --dims harmless --init <Hugging Face directory> --data a.jsonl b.jsonl --eval_data c.jsonl

    rewards, dims = load_reward_model("out/reward-helpful-harmless-seed0", policy)      # as PPO uses it

B: data rows a step   R: responses in them   P: compared pairs of responses   m: dimensions   raw: (R, m), head outputs
All dimensions share one frozen base and one adapter and differ in their heads: one forward gives all m rewards.
# not in paper: it has one 7B model a dimension. An adapter of its own for each, by one run a dimension with --dims, is
as accurate on the embedded world: helpful 0.9986 of the best possible, harmless 0.9952 (--dims helpful; --dims
harmless), against 0.9979 and 0.9944 (--pref_dim 2, seed 0) for half the forward passes, in PPO too.
The loss is −log σ(r_i(x, y_w) − r_i(x, y_l)), the mean over all labels of a batch, whatever their dimension. A row's
responses are packed as a token tree, so each is computed once, and all of their pairs are used.
Only differences of raw rewards mean anything. What is used is reward_scale_i · (raw_i − mean_i) / std_i, with mean and
standard deviation over responses that the frozen base gives to training prompts, stored in reward.json.
"""
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from runs.checkpoints import load_state, save_state
from runs.device import pick_device
from runs.directory import prepare_run, run_name, versions
from runs.files import UserError, read_json, write_json, write_whole
from runs.flags import RunFlags, check_ranges, flag, run_main
from runs.log import Log
from runs.loop import learning_rate
from runs.randomness import epoch_batch, generator_for
from runs.speed import matmul_ceiling, model_flops, report_speed
from data import toy
from data.preferences import Row, read_preferences
from data.tokenizers import load_tokenizer, spoken, tokenize
from data.trees import pack, row_lengths
from ops.generation import generate
from ops.heads import RewardModel
from objectives import bradley_terry_loss
from svd_lora import (adapters_off, fingerprint, inject_svd_lora, load_adapter, parameter_groups, save_adapter,
                      shared_base)
from train_dpo import prepare_data
from train_base import load_base


@dataclass
class Flags(RunFlags):
    """The script's flags, with defaults and --help texts."""

    # what is trained
    pref_dim: int = flag(2, "m: the number of preference dimensions, the first m of the data's; 1 is allowed")
    dims: list[str] | None = flag(None, "these dimensions instead, in this order")
    reward_scale: list[float] | None = flag(
        None, "factors on the normalised rewards, one a dimension (default 1 each; the paper has 5 on harmless)")
    # data and base model
    init: str | None = flag(None, "Hugging Face directory of the base model (default: the embedded world's)")
    size: str | None = flag(None, "size of the embedded world's base model (default tiny; 125m on a GPU)")
    data: list[str] | None = flag(None, "preference JSONL files (default: the embedded world)")
    eval_data: list[str] | None = flag(None, "preference JSONL files for the held-out accuracy (required with --data)")
    tokenizer: str | None = flag(
        None, "toy, gpt2, a *.tiktoken file or a directory with tokenizer.json (default: --init's)")
    max_length: int = flag(512, "tokens of prompt and response together; longer ones are cut")
    rows: int = flag(1920, "embedded world: data rows, each a prompt with some responses and all comparisons of them")
    eval_rows: int = flag(160, "embedded world: held-out data rows")
    responses: int = flag(12, "embedded world: responses in a row")
    # hyper-parameters
    lora_dim: int = flag(8, "k, the adapter's rank")
    lora_scaling: float = flag(512.0, "the adapter's gain is lora_scaling / lora_dim")
    lr: float | None = flag(
        None, "peak learning rate, then a cosine to 0 "
              "(default 2e-3 on the embedded world; else 2e-4, 1e-3 below width 512)")
    weight_decay: float = flag(0.05, "AdamW's, on U, V and the heads")
    warmup_ratio: float = flag(0.03, "share of the steps with a rising learning rate")
    batch_size: int = flag(8, "B: data rows a step")
    epochs: float = flag(1.0, "passes over --data, where --steps is not given")
    steps: int | None = flag(None, "optimizer steps (embedded world: 200)")
    max_grad_norm: float = flag(1.0, "gradient clipping")
    seed: int = flag(0, "seed of adapter, data order and reference samples")
    # the reference samples
    n_reference: int = flag(256, "responses of the frozen base that set mean and standard deviation of the rewards")
    max_new_tokens: int = flag(64, "tokens of a reference sample; one that is cut has no EOS")
    # running: common.RunFlags


def main(flags):
    """Trains one reward model, measures it, fixes its normalisation, writes the run directory. Returns its path."""
    device, dtype = pick_device(flags.device, flags.precision)
    given = replace(flags)
    check(flags)
    matmul_ceiling(device, dtype)                                      # now, while nothing else runs
    rows, dims, base, tokenizer_name = prepare_data(flags, device)
    m, toy_world = len(dims), flags.data is None
    flags.reward_scale = flags.reward_scale or [1.0] * m
    if len(flags.reward_scale) != m:
        raise UserError(f"--reward_scale has {len(flags.reward_scale)} factors; the dimensions are {' '.join(dims)}")
    if flags.steps is None:
        flags.steps = 200 if toy_world else max(1, round(flags.epochs * len(rows) / flags.batch_size))
    backbone, tokenizer = load_base(base, tokenizer_name, flags, device, dtype)
    if flags.lr is None:
        flags.lr = 2e-3 if toy_world else 1e-3 if backbone.config.d_model < 512 else 2e-4
    max_length = min(flags.max_length, backbone.config.context_length)
    if flags.max_new_tokens >= max_length:
        raise UserError(f"--max_new_tokens {flags.max_new_tokens} leaves no room for a prompt in {max_length} tokens")
    held_out = []
    if flags.eval:
        held_out = (toy.sample_pairs("eval", dims, flags.eval_rows, flags.responses, generator_for(0, "eval pairs"))
                    if toy_world else read_preferences(flags.eval_data, dims)[0])
    token_rows, cut = tokenize(rows, tokenizer, max_length)
    print("data: {} rows, {prompts_cut} prompts and {responses_cut} of {responses} responses cut"
          .format(len(rows), **cut))

    files = [Path(f).stem for f in flags.data or []]
    out = Path(flags.out or run_name(["reward", *files, *dims, f"seed{flags.seed}"], given, {"data", "eval_data"}))
    config = {"script": "train_reward.py", "flags": asdict(flags), "dims": list(dims), "base": str(base),
              "tokenizer": tokenizer_name, "max_length": max_length, "fingerprint": fingerprint(backbone), "cut": cut,
              **versions()}
    resume = prepare_run(out, config)
    inject_svd_lora(backbone, flags.lora_dim, 0, flags.lora_scaling, generator=generator_for(flags.seed, "adapter"))
    model = RewardModel(backbone, m)
    multiple = 64 if device.type == "cuda" else 1                      # T in multiples: few shapes, few sets of kernels
    train(model, token_rows, dims, flags, out, resume, multiple, device)
    save_adapter(backbone, out / "adapter.safetensors", dims)
    head = {"head.weight": model.head.weight.detach().cpu()}
    write_whole(out / "heads.safetensors", lambda f: save_file(head, f))

    report = {"dims": list(dims), "reward_scale": flags.reward_scale,
              **(held_out_accuracy(model, held_out, dims, tokenizer, max_length, flags.batch_size, toy_world)
                 if flags.eval else {})}
    # mean and standard deviation on reference samples, by the same route that rewards take ever after: from texts
    samples = reference_samples(backbone, rows, tokenizer, max_length, flags)
    write_whole(out / "reference.jsonl", lambda f: Path(f).write_text("".join(json.dumps(s) + "\n" for s in samples)))
    raw = raw_rewards(model, tokenizer, max_length, *([s[key] for s in samples] for key in samples[0]))
    if not (raw.std(0, correction=0) > 1e-6).all():
        raise UserError("a dimension's reward is the same on all reference samples: nothing was learned; "
                        "raise --steps or --lr")
    report |= {"mean": raw.mean(0).tolist(), "std": raw.std(0, correction=0).tolist(),
               "reference_finished": sum(s["finished"] for s in samples) / len(samples)}
    seconds = report_speed(out, device, dtype)
    write_json(out / "reward.json", report)                            # last: a directory that has it is a finished run
    for i, dim in enumerate(dims):
        line = f"{dim}: mean {report['mean'][i]:.3f}, std {report['std'][i]:.3f} on {len(samples)} reference samples"
        if flags.eval:
            line += (f" | held-out accuracy {report['accuracy'][i]:.3f} ± {report['accuracy_se'][i]:.3f} "
                     f"on {report['eval_labels'][i]} labels")
        if flags.eval and toy_world:
            line += (f", expected {report['expected_accuracy'][i]:.4f} of at most {report['bayes_accuracy'][i]:.4f} "
                     f"(ratio {report['bayes_ratio'][i]:.4f})")
        print(line)
    print(f"trained {flags.steps} steps in {seconds:.0f} s: {out}")
    (out / "state.safetensors").unlink(missing_ok=True)                # the run is whole: nothing is left to resume
    return out


def check(flags):
    """Raises UserError for flags that do not fit together."""
    check_ranges(flags, dict(batch_size=1, steps=1, rows=1, eval_rows=1, responses=2, lora_dim=1, n_reference=2,
                             max_new_tokens=1, save_every=1, log_every=1, max_length=2),
                 positive=("lr", "epochs", "lora_scaling", "max_grad_norm"), shares=("warmup_ratio",),
                 not_negative=("weight_decay",))
    if not all(0 < x < float("inf") for x in flags.reward_scale or []):
        raise UserError(f"--reward_scale {' '.join(map(str, flags.reward_scale))}: every factor must be positive")
    if flags.responses > toy.N_RESPONSES:
        raise UserError(f"--responses {flags.responses}: the embedded world has {toy.N_RESPONSES} to a prompt")
    if flags.data is not None and flags.init is None:
        raise UserError("--data needs --init: the embedded world's base model knows no other text")
    if flags.data is not None and flags.eval and flags.eval_data is None:
        raise UserError("--data needs --eval_data (or --no-eval)")


# ---------------------------------------------------------------------------------------------------------------------
# Training.

def train(model, rows, dims, flags, out, resume, multiple, device):
    """The loop. model: a RewardModel, trained in place; rows: TokenRows; resume: header of a state file, or None."""
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    heads = {"params": [model.head.weight], "weight_decay": flags.weight_decay}
    optimizer = torch.optim.AdamW([*parameter_groups(model.backbone, flags.weight_decay), heads], lr=flags.lr,
                                  betas=(0.9, 0.95), fused=True)       # fused: one pass over many small tensors
    adapter_size = sum(p.numel() for _, p in parameters if p.ndim == 2) - model.head.weight.numel()
    # the embedded world's rows are alike; those of files are sorted into batches of about one length
    lengths = None if flags.data is None else row_lengths(rows)
    first_step = 0
    if resume is not None:
        load_state(out / "state.safetensors", parameters, optimizer)
        first_step = resume["step"]
    log = Log(out / "metrics.jsonl", flags.steps, first_step, flags.log_every, "reward")

    for step in range(first_step, flags.steps):
        t0 = time.time()
        # 1. batch
        chosen = epoch_batch(len(rows), flags.batch_size, flags.seed, step, lengths).tolist()
        batch, last = pack_ends([rows[j] for j in chosen], multiple)
        tokens = int(batch.nodes.sum())
        batch, last = batch.to(device), last.to(device)
        # 2. rewards of all responses, all dimensions
        raw = model(batch.tokens, last, batch.positions, batch.mask)                  # (R, m)
        # 3. loss: the mean over all labels, whatever their dimension
        pair_losses, correct, known = compare(raw, batch.pairs, batch.better)         # (P, m) each
        loss = (pair_losses * known).sum() / known.sum()
        if not math.isfinite(loss.item()):
            raise UserError(f"step {step + 1}: the loss is {loss.item()}; lower --lr or --lora_scaling")
        # 4. backward
        loss.backward()
        # 5. clip, step
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, flags.steps, flags.lr, flags.warmup_ratio)
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in parameters], flags.max_grad_norm).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # 6. log: means over the labels of each dimension; None where the batch has no label of it
        labels, seconds = known.sum(0).long().tolist(), time.time() - t0
        means = lambda x: [total / n if n else None for total, n in zip((x.detach() * known).sum(0).tolist(), labels)]
        losses, accuracy = means(pair_losses), means(correct)
        show = lambda x, digits: "-" if x is None else f"{x:.{digits}f}"
        log.step({"step": step + 1, "member": 0, "loss": loss.item(), "losses": losses, "accuracy": accuracy,
                  "labels": labels, "grad_norm": norm, "lr": optimizer.param_groups[0]["lr"], "tokens": tokens,
                  "flops": model_flops(model.backbone.config, tokens, 0, adapter_size),
                  "tokens_per_second": tokens / seconds, "seconds": seconds},
                 f"step {step + 1:05d}/{flags.steps:05d} | loss {loss.item():.4f} | "
                 + " ".join(f"{dim} {show(x, 3)}" for dim, x in zip(dims, losses)) + " | acc "
                 + " ".join(show(x, 2) for x in accuracy)
                 + f" | grad {norm:.2f} | {tokens / seconds / 1e3:.1f}k tok/s")
        # 7. save
        if (step + 1) % flags.save_every == 0 or step + 1 == flags.steps:
            save_state(out / "state.safetensors", parameters, optimizer, step=step + 1, member=0)
    log.close()


def pack_ends(rows, multiple=1):
    """TokenRows -> (TreeBatch, last): last (R,) holds the index b·T + t of the last token of every response. multiple:
    as in pack.

    A tree has no node for a token that nothing follows. So a token is put behind every response: it is predicted and
    never read itself, and what predicts it is the response's true last token.
    """
    batch = pack([replace(row, responses=[ids + [0] for ids in row.responses]) for row in rows], multiple)
    lengths = (batch.paths < len(batch.targets)).sum(1, keepdim=True)                 # (R, 1)
    return batch, batch.parents[batch.paths.gather(1, lengths - 1)[:, 0]]


def compare(raw, pairs, better):
    """Bradley-Terry on compared responses, every dimension with its own rewards and labels.

    raw (R, m); pairs (P, 2), indices into the R; better (P, m), 0 where the first of a pair is better, 1 the second, -1
    no label. Returns loss, correct (1.0 where the better response has the higher reward; a tie is wrong) and known (0
    where there is no label: there the other two mean nothing), each (P, m).
    """
    first, second = raw.index_select(0, pairs[:, 0]), raw.index_select(0, pairs[:, 1])
    chosen, rejected = torch.where(better == 1, second, first), torch.where(better == 1, first, second)
    return bradley_terry_loss(chosen, rejected), (chosen > rejected).float(), (better >= 0).float()


# ---------------------------------------------------------------------------------------------------------------------
# Held-out accuracy.

@torch.no_grad()
def held_out_accuracy(model, rows, dims, tokenizer, max_length, batch_size, toy_world):
    """{"accuracy": share of the labels that the rewards agree with, "accuracy_se", "eval_labels"}, a list of m each.

    accuracy_se is sqrt(p(1 − p)/n), as if labels were independent. On the embedded world, where the probabilities
    behind the labels are known, also "expected_accuracy", the first without the noise of the labels drawn;
    "bayes_accuracy", that of the true scores, which none can beat; "bayes_ratio", the one over the other.
    """
    token_rows, device = tokenize(rows, tokenizer, max_length)[0], model.head.weight.device
    columns, sums = [toy.DIMS.index(dim) for dim in dims] if toy_world else None, 0
    for i in range(0, len(rows), batch_size):
        batch, last = pack_ends(token_rows[i:i + batch_size])
        raw = model(batch.tokens.to(device), last.to(device), batch.positions.to(device), batch.mask.to(device)).cpu()
        _, correct, known = compare(raw, batch.pairs, batch.better)
        terms = [correct.double() * known, known.double()]
        if toy_world:
            r = torch.cat([toy.scores(row.prompt.removesuffix("\n"), row.responses)[:, columns]
                           for row in rows[i:i + batch_size]])                        # (R, m)
            first, second = batch.pairs.T
            p = torch.sigmoid(r[first] - r[second])                                   # (P, m) P(the first is better)
            terms += [torch.where(raw[first] > raw[second], p, 1 - p), torch.maximum(p, 1 - p)]
        sums = sums + torch.stack([term.sum(0) for term in terms])                    # (2 or 4, m)
    labels, p = sums[1], sums[0] / sums[1]
    report = {"accuracy": p.tolist(), "accuracy_se": (p * (1 - p) / labels).sqrt().tolist(),
              "eval_labels": labels.long().tolist()}
    if toy_world:
        report |= {"expected_accuracy": (sums[2] / labels).tolist(), "bayes_accuracy": (sums[3] / labels).tolist(),
                   "bayes_ratio": (sums[2] / sums[3]).tolist()}
    return report


# ---------------------------------------------------------------------------------------------------------------------
# The reward as it is used.

@torch.no_grad()
def reference_samples(backbone, rows, tokenizer, max_length, flags):
    """n_reference responses of the frozen base (temperature 1) to the training prompts, in a random order and again
    from the first where there are fewer. Returns a list of {"prompt", "response", "finished": it ended in EOS}."""
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    order = torch.randperm(len(prompts), generator=generator_for(flags.seed, "reference")).tolist()
    prompts = [prompts[order[i % len(order)]] for i in range(flags.n_reference)]
    ids = tokenize([Row(prompt, [], [], []) for prompt in prompts], tokenizer, max_length,
                   max_prompt=max_length - flags.max_new_tokens)[0]
    out = []
    with adapters_off(backbone):
        for i in range(0, len(prompts), 64):
            out += generate(backbone, [row.prompt for row in ids[i:i + 64]], flags.max_new_tokens,
                            eos_id=tokenizer.eos_id, generator=generator_for(flags.seed, "reference samples", i))
    return [{"prompt": x, "response": y, "finished": end} for x, y, end in zip(prompts, *spoken(out, tokenizer))]


@torch.no_grad()
def raw_rewards(model, tokenizer, max_length, prompts, responses, finished, batch_size=32):
    """Rewards before normalisation, (B, m) fp32 on the CPU, of B texts: tokenised as training rows are, with EOS behind
    the response where it is finished. Three lists of length B: str, str, bool."""
    rows = tokenize([Row(x, [y], [], []) for x, y in zip(prompts, responses, strict=True)], tokenizer, max_length)[0]
    for row, done in zip(rows, finished, strict=True):
        if not done and row.responses[0][-1] == tokenizer.eos_id:
            row.responses[0].pop()
    out, device = [], model.head.weight.device
    for i in range(0, len(rows), batch_size):
        batch, last = pack_ends(rows[i:i + batch_size])
        batch = batch.to(device)
        out.append(model(batch.tokens, last.to(device), batch.positions, batch.mask).cpu())
    return torch.cat(out)


def load_reward_model(path, policy=None, device="cpu"):
    """The rewards of a finished run directory -> (rewards, dims).

    rewards(prompts, responses, finished) -> (B, m) fp32 on the CPU: reward_scale_i · (raw_i − mean_i) / std_i, columns
    as dims. Prompts are whole model inputs, as data.preferences.Row has them (the embedded world's end in a line break,
    the others' in "Assistant:"); responses are without EOS, finished says whether it followed.
    policy: a Transformer, with or without an adapter. Where its base is the reward model's own, that base is used, its
    weights frozen and its adapter left alone: there is no second copy of it, and `device` is the policy's. Else the
    base is read from the directory it was trained from. Raises UserError for a directory that is not a finished run.
    """
    path = Path(path)
    if not (path / "reward.json").exists() or read_json(path / "config.json").get("script") != "train_reward.py":
        raise UserError(f"{path} is not a finished run of train_reward.py")
    config, report = read_json(path / "config.json"), read_json(path / "reward.json")
    if policy is not None and fingerprint(policy) == config["fingerprint"]:
        backbone = shared_base(policy)
    else:
        as_trained = Flags(**{k: config["flags"][k] for k in ("precision", "quantize") if k in config["flags"]})
        device, dtype = pick_device(str(device), as_trained.precision)
        backbone, _ = load_base(config["base"], config["tokenizer"], as_trained, device, dtype)
    load_adapter(backbone, path / "adapter.safetensors", config["dims"])
    model = RewardModel(backbone, len(config["dims"]))
    model.load_state_dict(load_file(path / "heads.safetensors"), strict=False)
    model.requires_grad_(False)
    tokenizer, max_length = load_tokenizer(config["tokenizer"]), config["max_length"]
    mean, std, scale = (torch.tensor(report[key]) for key in ("mean", "std", "reward_scale"))

    def rewards(prompts, responses, finished):
        """Normalised rewards of B texts: (B, m) fp32 on the CPU."""
        return scale * (raw_rewards(model, tokenizer, max_length, prompts, responses, finished) - mean) / std

    return rewards, list(config["dims"])


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
