"""loop.py - what every step of every training needs and no paper speaks of: resuming, learning rate, backward pass and
optimizer step over micro-batches and processes, snapshots, checkpoints, log lines, speed.

    run = Run(model, optimizer, out, "adapter", flags, steps)
    for step in run.steps():            # from 0, or from where a killed run ended
        …                               # the paper
        run.update(loss)                # backward, clip, optimizer step
        run.log(tokens, predicted, …)   # a record in metrics.jsonl, and every --log_every steps a line

m: dimensions   items: what a loss is a mean of (compared pairs, responses)
"""
import json
import math
import os
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from runs.directory import adapter_file, load_state, save_state
from runs.files import Stopped, UserError, writing
from runs.processes import all_sum, ranks, reduce_gradients
from runs.randomness import generator_for
from runs.speed import model_flops
from svd_lora import inject_svd_lora, parameter_groups, save_adapter


def learning_rate(step, steps, peak, warmup_ratio):
    """Linear warm-up over warmup_ratio · steps, then a cosine from peak to 0. step counts from 0."""
    warmup = max(1, round(warmup_ratio * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def add_adapter(model, flags, m, member=0, more=1):
    """A fresh adapter in place: rank lora_dim + m where the m preference weights are singular values, and for m = 0
    lora_dim + more, a baseline's. Its gain is lora_scaling / lora_dim for every method; for lora_dim 0 that of 8."""
    k = flags.lora_dim if m else flags.lora_dim + more
    inject_svd_lora(model, k, m, pref_scaling=getattr(flags, "pref_scaling", None),
                    generator=generator_for(flags.seed, "adapter", member),
                    gain=flags.lora_scaling / (flags.lora_dim or 8))


def adamw(model, flags, betas=(0.9, 0.95), head=None):
    """AdamW for an adapter, with weight decay on U and V alone (and on a head that learns beside it), and a learning
    rate of their own for σ and s."""
    groups = parameter_groups(model, flags.weight_decay, flags.values_lr or 1.0)
    groups += [] if head is None else [{"params": [head.weight], "weight_decay": flags.weight_decay}]
    return torch.optim.AdamW(groups, lr=flags.lr, betas=betas, fused=True)            # fused: one pass over them all


@contextmanager
def noted_signals():
    """Within it Ctrl-C and SIGTERM do not end the process but are noted: a list, of their numbers. The second one does
    end it. (Torchrun passes on what the terminal has sent already: the same within a second counts once.)"""
    noted, began = [], []

    def note(number, frame):
        if noted and not ("RANK" in os.environ and time.time() - began[0] < 1):
            signal.signal(number, usual[number])
            signal.raise_signal(number)
        noted.append(number)
        began.append(time.time())
        os.write(2, b"\nstopping after this step; once more stops at once\n")       # print is not for signal handlers

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    usual = {number: signal.signal(number, note) for number in numbers}           # another thread may not have handlers
    try:
        yield noted
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


class Log:
    """Appends one JSON object a step to metrics.jsonl and prints it as a line every `every` steps, and after the first
    and the last, above the bar."""

    def __init__(self, path, steps, first_step=0, every=1, desc=""):
        self.path, self.every, self.started = Path(path), every, time.time()
        self.always = first_step + 1, steps
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self.silent = ranks()[0] > 0
        self.bar = tqdm(total=steps, initial=first_step, desc=desc, disable=self.silent or None, dynamic_ncols=True)

    def step(self, record, line):
        """record: {"step": …, …} for the file; line: the same for people."""
        if self.silent:
            return
        with writing(self.path), self.path.open("a", encoding="utf-8", newline="\n") as f:
            f.write(json.dumps(record, allow_nan=False) + "\n")
        if record["step"] % self.every == 0 or record["step"] in self.always:
            self.bar.write(line)
        self.bar.update()

    def close(self):
        """Ends the bar; returns the seconds since the log was opened."""
        self.bar.close()
        return time.time() - self.started


class Run:
    """One training: of an adapter, of a base model, of a reward model."""

    def __init__(self, model, optimizer, out, name, flags, steps, dims=(), member=0, resume=None, parts=1, base=4,
                 critic=None, critic_optimizer=None, clip=torch.nn.utils.clip_grad_norm_):
        """model: all of it that requires a gradient is trained, by `optimizer`; it has a `config`
        out, name: the run directory, and what this training is called there   flags: lr, warmup_ratio, …
        member: the number of this training among those of the run   resume: header of a state file, or None
        parts: micro-batches per step   base: operations per parameter of the base and token (runs.speed.model_flops)
        critic, critic_optimizer: a network that is trained beside it and kept with it
        clip(parameters, max_norm) -> the gradient's norm before it was clipped
        """
        self.model, self.optimizer, self.out, self.name, self.flags = model, optimizer, out, name, flags
        alone = name.startswith(("adapter", "reward")) and steps == getattr(flags, "steps", 0)      # several share them
        self.title = "training" if alone else name
        self.n_steps, self.dims, self.member, self.resume = steps, dims, member, resume
        self.parts, self.base, self.clip = parts, base, clip
        self.trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.state = self.trained + ([(f"critic.{n}", p) for n, p in critic.named_parameters()] if critic else [])
        self.optimizers = [optimizer] + ([critic_optimizer] if critic else [])
        self.adapter_size = sum(p.numel() for n, p in self.trained if n.endswith((".U", ".V")))
        self.kept = {}          # JSON values that a resumed run needs besides, as they were after its last step

    def steps(self):
        """Yields the number of each step, from 0 or from where the killed run ended. With micro-batches the same number
        comes `parts` times, once for each, and `part` says which. After a step its weights are looked at, snapshots and
        checkpoints kept. Raises UserError for weights that are not finite; after a signal Stopped, with a checkpoint.
        """
        first, flags = 0, self.flags
        if self.resume is not None and self.resume["member"] == self.member:
            load_state(self.out / "state.safetensors", self.state, *self.optimizers)
            first, self.kept = self.resume["step"], self.resume.get("kept", {})
        elif self.resume is not None and self.resume["member"] > self.member:
            return                                                     # what comes after this training has begun
        snapshots, save_every = min(getattr(flags, "snapshots", 0), self.n_steps), getattr(flags, "save_every", None)
        snapshot_steps = {round(self.n_steps * (j + 1) / snapshots) for j in range(snapshots)} - {self.n_steps}
        self.lines = Log(self.out / "metrics.jsonl", self.n_steps, first, flags.log_every, self.title)
        with noted_signals() as signals:
            for step in range(first, self.n_steps):
                self.step, self.started, self.loss, self.sums, self.signals = step, time.time(), 0.0, {}, signals
                self.counted = self.flops = self.stop = 0
                rate = learning_rate(step, self.n_steps, flags.lr, flags.warmup_ratio)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate * group.get("times", 1)
                for self.part in range(self.parts):
                    yield step
                self.require_finite_weights()
                done = step + 1
                if done in snapshot_steps:
                    file = adapter_file(self.out / "snapshots", f"{self.name}-{done:06d}")
                    save_adapter(self.model, file, self.dims, step=done)
                if save_every and (done % save_every == 0 or done == self.n_steps or self.stop):
                    save_state(self.out / "state.safetensors", self.state, *self.optimizers, step=done,
                               member=self.member, kept=self.kept)
                if self.stop:
                    self.lines.close()
                    of = "" if self.title == "training" else f" of {self.title}"
                    raise Stopped(f"stopped after step {done}{of}; the same command goes on",
                                  128 + (signals or [signal.SIGINT])[0])
        self.lines.close()

    @property
    def last_part(self):
        """Whether this is the last micro-batch of its step."""
        return self.part == self.parts - 1

    def update(self, loss, penalty=0.0):
        """Backward pass; after the last micro-batch gradients are summed over processes, clipped, and the optimizer
        takes its step. Raises UserError where the loss or the gradient is not finite, before anything is changed.

        loss: of this micro-batch's rows on this process alone; gradients are added up afterwards. None: .grad is filled
        already (MGDA). penalty: a term without rows; every micro-batch and process takes its part of it.
        """
        rank, processes = ranks()
        if loss is not None:
            self.loss += (loss + penalty / self.parts).item()
            self.require_finite("loss", self.loss)
            (loss + penalty / self.parts / processes).backward()
        if self.last_part:
            parameters = [p for _, p in self.trained]
            reduce_gradients(parameters)
            self.norm = self.clip(parameters, self.flags.max_grad_norm).item()
            self.require_finite("gradient's norm", self.norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def require_finite(self, what, value):
        """Raises UserError for a number that is infinite or none."""
        if not math.isfinite(value):
            blamed = ("--critic_lr" if what in ("critic's norm", "value_loss") else
                      "--lr or --lora_scaling" if hasattr(self.flags, "lora_scaling") else "--lr")
            raise UserError(f"{self.name}, step {self.step + 1}: the {what} is {value}; lower {blamed}")

    def require_finite_weights(self):
        """The same for what the step has made of the weights: update() has looked at what it made of them before."""
        of_critic = [p for n, p in self.state if n.startswith("critic.")]
        for what, parameters in (("weights' norm", [p for _, p in self.trained]), ("critic's norm", of_critic)):
            if parameters:
                self.require_finite(what, torch.nn.utils.get_total_norm(parameters).item())

    def work(self, tokens, predicted=0, base=None):
        """Counts the model FLOPs of tokens that ran through the blocks, and of those that the head predicted."""
        self.flops += model_flops(self.model.config, tokens, predicted, self.adapter_size, base or self.base)

    def log(self, tokens, predicted=None, show=(), means=None, **record):
        """Adds up what this micro-batch has seen; after the last one writes the record of the step.

        tokens: that the step's speed is told by; predicted: how many of them the head predicted (None: work() has
        counted already). means: {key: (values, known)}, (items, m) each: the mean of every column over its known items,
        of all micro-batches and processes, None where there are none. record: JSON values as they are.
        show: the keys that stand in the line for people.
        """
        if predicted is not None:
            self.work(tokens, predicted)
        self.counted += tokens
        for key, (values, known) in (means or {}).items():
            self.sums[key] = self.sums.get(key, 0) + torch.stack([(values.detach() * known).sum(0), known.sum(0)])
        if not self.last_part:
            return
        totals = all_sum(torch.tensor([self.counted, self.flops, len(self.signals)], device=self.device))
        self.counted, self.flops, self.stop = totals.tolist()          # all processes stop after the same step
        for key, sums in self.sums.items():
            record[key] = [total / n if n else None for total, n in zip(*all_sum(sums).tolist())]
        seconds = time.time() - self.started
        record = {"step": self.step + 1, "member": self.member, "loss": self.loss, **record, "grad_norm": self.norm,
                  "lr": self.optimizer.param_groups[0]["lr"], "tokens": self.counted, "flops": self.flops,
                  "tokens_per_second": self.counted / seconds, "seconds": seconds}
        for key, value in record.items():
            if isinstance(value, float):
                self.require_finite(key, value)
        self.lines.step(record, self.line(record, show))

    @property
    def device(self):
        """Where the model is."""
        return self.trained[0][1].device

    def line(self, record, show):
        """A record as a line: every key of `show` with its number, or with one number per dimension."""
        number = lambda x: "-" if x is None else f"{x:.3f}"
        cells = [f"step {record['step']:05d}/{self.n_steps:05d}"]
        for key in ("loss", *show, "grad_norm"):
            value = record[key]
            if isinstance(value, list):
                value = " ".join(f"{dim} {number(x)}" for dim, x in zip(self.dims, value))
            cells.append(f"{key} {value if isinstance(value, str) else number(value)}")
        return " | ".join(cells) + f" | {record['tokens_per_second'] / 1e3:.1f}k tok/s"
