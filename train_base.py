"""train_base.py - language modelling from scratch: makes the embedded world's base model, π_ref of all that follows.

    python train_base.py --size tiny           # about a minute on 2 CPU cores; kept in out/base-tiny-seed0 and reused

A GPT-2 of the named size is trained from scratch on prompts of data/toy.py and responses drawn as base_probs says, with
the objective J_SFT = E log π(y|x) per token. The result is a Hugging Face directory that transformers reads too.
"""
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from runs.device import pick_device
from runs.directory import versions
from runs.files import UserError, write_json
from runs.flags import check_ranges, flag, run_main
from runs.log import Log
from runs.loop import learning_rate
from runs.processes import first_alone
from runs.randomness import epoch_batch, generator_for
from runs.speed import matmul_ceiling, model_flops, report_speed
from data import toy
from data.tokenizers import load_tokenizer, tokenize
from data.trees import batch_logprobs, pack
from fronts.measure import world_batches, world_logprobs
from model import SIZES, Transformer
from objectives import sft_loss


@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    size: str = flag("tiny", f"model size: {', '.join(SIZES)}")
    out: str | None = flag(None, "directory to write (default out/base-<size>-seed<seed>)")
    seed: int = flag(0, "seed of weights and data")
    device: str = flag("auto", "cpu, cuda, or auto")
    steps: int = flag(400, "optimizer steps")
    batch_size: int = flag(16, "prompts a step")
    responses: int = flag(8, "responses drawn for each prompt")
    lr: float | None = flag(None, "peak learning rate (default 3e-3 for tiny, 6e-4 otherwise)")
    weight_decay: float = flag(0.1, "AdamW's, on matrices")
    warmup_ratio: float = flag(0.05, "share of the steps with a rising learning rate")
    log_every: int = flag(20, "print a line every so many steps")


def main(flags):
    """Trains, reports how well the model knows the world, and writes the directory. Returns its path."""
    if flags.size not in SIZES:
        raise UserError(f"--size {flags.size}: choose one of {', '.join(SIZES)}")
    check_ranges(flags, dict(steps=1, batch_size=1, responses=1, log_every=1), positive=("lr",),
                 shares=("warmup_ratio",), not_negative=("weight_decay",))
    device, dtype = pick_device(flags.device, "fp32")                  # all weights train
    out = Path(flags.out or f"out/base-{flags.size}-seed{flags.seed}")
    tokenizer = load_tokenizer("toy")
    config = replace(SIZES[flags.size], vocab_size=tokenizer.vocab_size, bos_id=None, eos_id=tokenizer.eos_id)
    model = Transformer(config).init_weights(generator_for(flags.seed, "init")).to(device)
    decayed = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    peak = (3e-3 if flags.size == "tiny" else 6e-4) if flags.lr is None else flags.lr
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": flags.weight_decay},
                                   {"params": rest, "weight_decay": 0.0}], lr=peak, betas=(0.9, 0.95))
    matmul_ceiling(device, dtype)                                      # now, while nothing else runs
    prompts = toy.prompts("train")
    world = tokenize([toy.as_row(x, toy.responses(x)) for x in prompts], tokenizer, config.context_length)[0]
    probs = [toy.base_probs(x) for x in prompts]

    (out / "metrics.jsonl").unlink(missing_ok=True)
    log = Log(out / "metrics.jsonl", flags.steps, every=flags.log_every, desc="base")
    for step in range(flags.steps):
        t0 = time.time()
        # 1. batch: prompts in turn, responses drawn from the base distribution
        g, rows = generator_for(flags.seed, "sft", step), []
        for j in epoch_batch(len(prompts), flags.batch_size, flags.seed, step).tolist():
            drawn = torch.multinomial(probs[j], flags.responses, replacement=True, generator=g).tolist()
            rows.append(replace(world[j], responses=[world[j].responses[s] for s in drawn]))
        batch = pack(rows)
        tokens, flops = int(batch.nodes.sum()), model_flops(config, int(batch.nodes.sum()), len(batch.targets), base=6)
        batch = batch.to(device)
        # 2. loss per response token
        loss = sft_loss(batch_logprobs(model, batch)).sum() / batch.on_path.sum()
        # 3. backward, clip, step
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, flags.steps, peak, flags.warmup_ratio)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # 4. log
        seconds = time.time() - t0
        log.step({"step": step + 1, "loss": loss.item(), "grad_norm": norm, "tokens": tokens, "flops": flops,
                  "tokens_per_second": tokens / seconds, "seconds": seconds},
                 f"step {step + 1:05d}/{flags.steps:05d} | loss {loss.item():.4f} nats/token | grad {norm:.2f} | "
                 f"{tokens / seconds / 1e3:.1f}k tok/s")
    log.close()
    seconds = report_speed(out, device, dtype)

    # How far the base is from what it was trained on, exactly, on unseen prompts
    unseen = toy.prompts("eval")
    logps = world_logprobs(model, world_batches(unseen, tokenizer, device))                           # (prompts, S)
    target = torch.stack([toy.base_probs(x) for x in unseen])
    report = {"seconds": seconds, "parameters": sum(p.numel() for p in model.parameters()),
              "outside_mass": (1 - logps.exp().sum(1)).mean().item(),
              "kl_data_to_base": (target * (target.log() - logps)).sum(1).mean().item()}
    model.save_pretrained(out)
    write_json(out / "base.json", {"tokenizer": "toy", "flags": asdict(flags), **report, **versions()})
    print(f"base model {out}: {report['parameters'] / 1e6:.2f}M parameters, {seconds:.0f} s; "
          f"unseen prompts: KL(data || base) {report['kl_data_to_base']:.3f} nats, "
          f"mass outside the response set {report['outside_mass']:.3f}")
    return out


def base_model(size, seed, device):
    """The directory of the embedded world's base model of this size and seed, trained first if it is not there."""
    out = Path(f"out/base-{size}-seed{seed}")
    if not (out / "base.json").exists():
        print(f"no base model in {out} yet: training it (once)")
        return main(Flags(size=size, seed=seed, device=device))
    return out


def find_base(init, size, tokenizer, device):
    """The base model's directory and its tokenizer's name, from the flags --init, --size and --tokenizer.

    Without --init it is the embedded world's base model: 125m on a GPU, else tiny.
    """
    size = size or ("125m" if device.type == "cuda" else "tiny")
    base = init or str(first_alone(lambda: base_model(size, 0, str(device))))
    return base, tokenizer or ("toy" if (Path(base) / "base.json").exists() else base)


def load_base(base, tokenizer_name, flags, device, dtype):
    """The frozen base model and its tokenizer, as the flags say: --quantize, --checkpoint. Raises UserError where the
    tokenizer has ids that the model does not have."""
    model = Transformer.from_pretrained(base, dtype=dtype, device=device, quantize=flags.quantize).requires_grad_(False)
    model.checkpoint_blocks = flags.checkpoint
    tokenizer = load_tokenizer(tokenizer_name)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, the base model {base} only "
                        f"{model.config.vocab_size}: name the model's own with --tokenizer")
    return model, tokenizer


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
