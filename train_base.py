"""train_base.py - language modelling from scratch: makes the embedded world's base model, π_ref of all that follows.

    python train_base.py --out data/base       # the model that ships with the code: a quarter of an hour on a CPU core
    python train_base.py --seed 1              # another one, in out/base-tiny-seed1: train_dpo.py --init uses it
    python train_base.py --size 125m

A GPT-2 of the named size is trained from scratch on the split "base" of data/toy.py, with the objective
J_SFT = E log π(y|x), y from base_probs. First on samples: many prompts a step, a few responses to each, from which it
learns what the words of a prompt mean. Then, for the world is closed, on the expectation itself: all S responses, each
weighted by its probability, and beside it log Σ_y π(y|x), the mass on the listed responses. Samples alone leave 0.3 %
to other texts; the second phase alone learns the prompts less well. The result is a Hugging Face directory that
transformers reads too.
"""
import runs.waiting  # noqa: F401  # isort: skip
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from data import toy
from data.base import world_fingerprint
from data.tokenizers import load_tokenizer, tokenize
from data.trees import batch_logprobs, pack
from fronts.measure import world_batches, world_logprobs, world_rows
from fronts.tables import table
from model import SIZES, Transformer
from objectives import sft_loss
from ops.check import replace_broken
from runs.directory import TRAINED, close_run, end_training, prepare_run, run_name
from runs.files import UserError, read_json, write_json
from runs.flags import PLAIN, flag, run_main
from runs.loop import Run
from runs.processes import pick_device
from runs.randomness import epoch_batch, generator_for
from runs.speed import matmul_ceiling


@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    size: str = flag("tiny", f"model size: {', '.join(SIZES)}")
    out: str | None = flag(None, "directory to write (default out/base-<size>-seed<seed>)")
    seed: int = flag(0, "seed of weights and data")
    device: str = flag("auto", "cpu, cuda, or auto")
    plain: bool = flag(False, PLAIN)
    steps: int = flag(1500, "optimizer steps on samples", 1)
    batch_size: int = flag(16, "prompts in such a step", 1)
    responses: int = flag(8, "responses drawn for each prompt", 1)
    whole_steps: int = flag(300, "steps on all responses to a prompt, at a third of the learning rate", 1)
    whole_batch: int = flag(4, "prompts in such a step", 1)
    listed: float = flag(10.0, "weight of log Σ_y π(y|x) over the listed responses in them", "not negative")
    lr: float | None = flag(None, "peak learning rate (default 3e-3 for tiny, 1.5e-4 otherwise)", "positive")
    weight_decay: float = flag(0.1, "AdamW's, on matrices", "not negative")
    warmup_ratio: float = flag(0.05, "share of the steps with a rising learning rate", "share")
    max_grad_norm: float = flag(1.0, "gradient clipping", "positive")
    log_every: int = flag(20, "print a line every so many steps, and after the first", 1)
    save_every: int = flag(200, "write a checkpoint every so many steps", 1)
    overwrite: bool = flag(False, "replace what the directory holds")


def train(model, out, trees, probs, flags, resume, device):
    """Language modelling: samples first, then all responses weighted by their probabilities.

    trees: for each prompt TokenRows of some of its responses each   probs: for each prompt (S,), in the same order
    """
    decayed = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    adamw = lambda lr: torch.optim.AdamW([{"params": decayed, "weight_decay": flags.weight_decay},
                                          {"params": rest, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.95))
    rows = [replace(each[0], responses=[y for tree in each for y in tree.responses]) for each in trees]

    run = Run(model, adamw(flags.lr), out, "samples", flags, flags.steps, resume=resume, base=6)
    for step in run.steps():
        # prompts in turn, responses drawn from the base distribution
        g, batch = generator_for(flags.seed, "sft", step), []
        for j in epoch_batch(len(rows), flags.batch_size, flags.seed, step).tolist():
            drawn = torch.multinomial(probs[j], flags.responses, replacement=True, generator=g).tolist()
            batch.append(replace(rows[j], responses=[rows[j].responses[s] for s in drawn]))
        batch = pack(batch).to(device)

        # nats per token of the responses
        loss = sft_loss(batch_logprobs(model, batch)).sum() / batch.on_path.sum()
        run.update(loss)
        run.log(*batch.size)

    again = replace(flags, lr=flags.lr / 3)
    run = Run(model, adamw(again.lr), out, "all responses", again, flags.whole_steps, member=1, resume=resume, base=6)
    for step in run.steps():
        # prompts in turn, with all of their responses
        chosen = epoch_batch(len(trees), flags.whole_batch, flags.seed, step).tolist()
        batch = pack([tree for j in chosen for tree in trees[j]]).to(device)
        p = torch.cat([probs[j] for j in chosen]).float().to(device)                  # (R,), sums to the prompts

        # nats per token: the expectation over the responses, and the mass on all that are listed
        logps = batch_logprobs(model, batch)                                          # (R,)
        loss = p @ sft_loss(logps) - flags.listed * logps.view(len(chosen), -1).logsumexp(1).sum()
        run.update(loss / (p @ batch.on_path.sum(1)))
        run.log(*batch.size)


def on_split(model, split, tokenizer, device):
    """How far the base is from what it was trained on, exactly, at all prompts of a split: the loss −E log π(y|x) and
    its excess over the data's own entropy, nats per response; the mass outside the listed responses."""
    prompts = toy.prompts(split)
    logps = world_logprobs(model, world_batches(prompts, tokenizer, device))                          # (prompts, S)
    target, outside = torch.stack([toy.base_probs(x) for x in prompts]), 1 - logps.exp().sum(1)
    return {"loss": -(target * logps).sum(1).mean().item(),
            "kl_data_to_base": (target * (target.log() - logps)).sum(1).mean().item(),
            "outside_mass": outside.mean().item(), "outside_mass_worst": outside.max().item()}


def main(flags):
    """Trains, reports how well the model knows the world, and writes the directory. Returns its path."""
    if flags.size not in SIZES:
        raise UserError(f"--size {flags.size}: choose one of {', '.join(SIZES)}")
    device, dtype = pick_device(flags.device, "fp32", flags.plain)     # all weights train
    out = Path(flags.out or run_name(["base", flags.size, f"seed{flags.seed}"], flags, {"size", "seed"}))
    tokenizer = load_tokenizer("toy")
    config = replace(SIZES[flags.size], vocab_size=tokenizer.vocab_size, bos_id=None, eos_id=tokenizer.eos_id)
    model = Transformer(config).init_weights(generator_for(flags.seed, "init")).to(device)
    replace_broken(device, dtype)
    flags.lr = flags.lr or (3e-3 if flags.size == "tiny" else 1.5e-4)
    matmul_ceiling(device, dtype)                                      # now, while nothing else runs
    prompts = toy.prompts("base")
    trees = [tokenize(world_rows([x]), tokenizer, config.context_length)[0] for x in prompts]
    report = {"script": "train_base.py", "tokenizer": "toy", "world": world_fingerprint(), "flags": asdict(flags)}
    # Hugging Face's config.json is what save_pretrained writes last
    resume = prepare_run(out, report, flags.overwrite, "base.json", done="config.json")
    if resume != TRAINED:
        train(model, out, trees, [toy.base_probs(x) for x in prompts], flags, resume, device)
        end_training(out, f"{flags.steps} + {flags.whole_steps} steps", device, dtype)
        report |= {"parameters": sum(p.numel() for p in model.parameters()),
                   "splits": {split: on_split(model, split, tokenizer, device) for split in toy.SPLITS}}
        write_json(out / "base.json", report)
        model.save_pretrained(out)
    report = read_json(out / "base.json")
    print(f"base model {out}: {report['parameters'] / 1e6:.2f}M parameters")
    print(table({"prompts": list(report["splits"])} | {
        head: [f"{measured[key]:.5f}" for measured in report["splits"].values()] for head, key in
        (("loss", "loss"), ("KL(data || base)", "kl_data_to_base"), ("outside mass", "outside_mass"),
         ("at worst", "outside_mass_worst"))}))
    close_run(out)
    return out


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
