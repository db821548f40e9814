"""common.py - what every script needs once: flags from a dataclass, run directories, randomness, checkpoints, logs.

Nothing here belongs to one paper. Randomness: step t of a run draws everything from its own generator, seeded by
(seed, stream, t), so a resumed run needs no stored random state and continues bit for bit.
rank, world: which of how many processes this one is, 0 of 1 unless torchrun started several
"""
import argparse
import dataclasses
import datetime
import functools
import hashlib
import inspect
import json
import math
import os
import resource
import statistics
import sys
import time
import typing
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import fused

ROOT = Path(__file__).resolve().parent


class UserError(Exception):
    """Bad input. Its message is one line: what is wrong, where, and what to do; scripts print it and exit with 2."""


# ---------------------------------------------------------------------------------------------------------------------
# Flags.

def flag(default, text, **metadata):
    """A dataclass field that is a command line flag: default, help text."""
    metadata |= {"help": text}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class RunFlags:
    """Flags about how a training runs, not what it trains. Scripts' Flags inherit them."""

    out: str | None = flag(None, "run directory (default out/<what this run is>)")
    device: str = flag("auto", "cpu, cuda, or auto")
    precision: Literal["auto", "fp32", "bf16"] = flag(
        "auto", "of the frozen base (auto: bf16 on a GPU, else fp32); what is trained is fp32 always")
    quantize: Literal["none", "int8", "nf4"] = flag(
        "none", "keep the matrices of the frozen base in 8 or 4 bits a weight: less memory, slower products")
    checkpoint: bool = flag(False, "keep only the input of each block for the backward pass and compute the rest "
                                   "again: less memory, about a third more time")
    log_every: int = flag(20, "print a line every so many steps")
    save_every: int = flag(200, "write a checkpoint every so many steps")
    eval: bool = flag(True, "evaluate at the end")


def check_ranges(flags, at_least, positive=(), shares=(), not_negative=()):
    """Raises UserError for the first flag out of its range. None, where a flag has no value yet, is always in it.

    at_least: {name: lowest integer}; names of numbers that are positive, between 0 and 1, or not negative.
    """
    given = lambda names: [(name, value) for name in names if (value := getattr(flags, name)) is not None]
    for name, value in given(at_least):
        if value < at_least[name]:
            raise UserError(f"--{name} {value}: must be at least {at_least[name]}")
    for name, value in given(positive):
        if not 0 < value < float("inf"):
            raise UserError(f"--{name} {value}: must be positive")
    for name, value in given(shares):
        if not 0 <= value <= 1:
            raise UserError(f"--{name} {value}: must be between 0 and 1")
    for name, value in given(not_negative):
        if not 0 <= value < float("inf"):
            raise UserError(f"--{name} {value}: must not be negative")


def cli(cls, doc, argv=None):
    """Parses sys.argv into the dataclass `cls`, one `--field` for each of its fields.

    Types come from the annotations: bool becomes --x/--no-x, Literal its choices, list[T] takes several values, and
    T | None a T; a flag with positional=True has no dashes. `--config file.json` is read first: its keys become
    defaults, and an unknown key is an error.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--config", help="JSON file with defaults for the flags below")
    hints = typing.get_type_hints(cls)
    own = inspect.get_annotations(cls)
    for f in sorted(dataclasses.fields(cls), key=lambda f: f.name not in own):        # inherited ones stand last
        kind = hints[f.name]
        options = [a for a in typing.get_args(kind) if a is not type(None)]
        optional = type(None) in typing.get_args(kind)
        if optional and len(options) == 1:                                            # T | None
            kind, options = options[0], typing.get_args(options[0])
        default = f.default_factory() if f.default is dataclasses.MISSING else f.default
        more = dict(default=default, help=f.metadata.get("help"))
        if kind is bool:
            more |= dict(action=argparse.BooleanOptionalAction)
        elif typing.get_origin(kind) is typing.Literal:
            more |= dict(choices=options, type=type(options[0]))
        elif typing.get_origin(kind) is list:
            more |= dict(nargs="+", type=options[0], metavar=f.name.upper())
        else:
            more |= dict(type=kind)
        if f.metadata.get("positional"):
            parser.add_argument(f.name, nargs="+", help=more["help"])
        else:
            parser.add_argument("--" + f.name, **more)
    known, _ = parser.parse_known_args(argv)
    if known.config:
        preset = read_json(known.config)
        unknown = sorted(set(preset) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise UserError(f"{known.config}: unknown key {unknown[0]!r}; see --help for the flags")
        for action in parser._actions:
            if action.choices and action.dest in preset and preset[action.dest] not in action.choices:
                raise UserError(f"{known.config}: {action.dest} is {preset[action.dest]!r}; choose among "
                                f"{', '.join(map(str, action.choices))}")
        parser.set_defaults(**preset)
    args = vars(parser.parse_args(argv))
    args.pop("config")
    return cls(**args)


def run_main(main, cls, doc, several=False):
    """Parses the flags, runs main(flags); a UserError becomes one line on stderr and exit status 2.

    several: the script may be started by torchrun, as several processes; then the first one alone prints.
    """
    rank = int(os.environ.get("RANK", 0))
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not several:
            raise UserError(f"{Path(sys.argv[0]).name} is one process: start it with python, not with torchrun")
        main(cli(cls, doc))
    except UserError as e:
        if rank > 0:
            time.sleep(5)       # the first process found the same and said it: torchrun ends this one before it speaks
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# Files: written whole or not at all.

def write_whole(path, write):
    """Calls write(temporary path), then renames it to `path`: a killed run leaves the old file or the new one.
    Of several processes the first one alone writes."""
    if ranks()[0] > 0:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        os.chmod(temporary, 0o644)                          # safetensors writes 0600
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Writes `value` as JSON, whole or not at all."""
    text = json.dumps(value, indent=1, allow_nan=False)
    write_whole(path, lambda f: Path(f).write_text(text + "\n"))


def read_json(path):
    """Reads a JSON file. Raises UserError where there is none or it does not parse."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not JSON: {e}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Device, randomness, schedule.

def pick_device(name, precision="auto"):
    """"auto" is CUDA where there is a GPU. Returns (torch.device, dtype of the frozen base: "auto" is bf16 on CUDA)."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name}: {str(e).splitlines()[0]}") from None
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return device, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def generator_for(seed, stream, step=0):
    """A CPU generator of its own for (seed, stream, step); stream names what it is for ("lambda", "batch", …)."""
    # hashed to 32 bits: that is all torch's CPU generator looks at, and step << 32 would be the same seed every step
    digest = hashlib.sha256(f"{seed}/{stream}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def learning_rate(step, steps, peak, warmup_ratio):
    """Linear warm-up over warmup_ratio · steps, then a cosine from peak to 0. step counts from 0."""
    warmup = max(1, round(warmup_ratio * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def epoch_batch(n, size, seed, step, lengths=None):
    """The indices of batch number `step` when n items are shuffled anew each epoch and cut into batches of `size`;
    a batch may straddle two epochs. Returns (size,) int64.

    lengths: (n,), where the items are not alike; then the items of a batch are about equally long, so that little of it
    is padding. Every item still comes once an epoch, and batches come in a random order.
    """
    first, last = step * size // n, ((step + 1) * size - 1) // n
    order = torch.cat([_epoch_order(n, size, seed, epoch, lengths) for epoch in range(first, last + 1)])
    return order[step * size - first * n:][:size]


@functools.lru_cache(maxsize=4)                         # a step asks for the epoch that the step before asked for
def _epoch_order(n, size, seed, epoch, lengths):
    """The order of one epoch, (n,). With lengths: windows of 64 batches are sorted, each cut into batches."""
    order = torch.randperm(n, generator=generator_for(seed, "epoch", epoch))
    head = -epoch * n % size                            # what the last batch of the epoch before still takes
    whole = max(0, n - head) // size                    # batches that lie within this epoch
    if lengths is None or whole == 0:
        return order
    window = max(1, min(64, whole // 4))                # several, or each epoch would have the same batches
    windows = order[head:head + whole * size].split(window * size)
    batches = torch.cat([w[lengths[w].argsort(stable=True)].view(-1, size) for w in windows])         # (whole, size)
    shuffled = batches[torch.randperm(whole, generator=generator_for(seed, "batches", epoch))]
    return torch.cat([order[:head], shuffled.flatten(), order[head + whole * size:]])


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, one a GPU, started by torchrun. All compute the same batch, λ and counts, for these are functions
# of seed and step, and each takes its share of the rows. Nothing of the frozen base is ever reduced.

def init_distributed(device):
    """Joins the processes that torchrun started, if it did. Returns (rank, world, the device of this process)."""
    if "RANK" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        here = int(os.environ["LOCAL_RANK"])
        if here >= torch.cuda.device_count():
            raise UserError(f"torchrun started more processes than there are GPUs: {torch.cuda.device_count()}")
        device = torch.device("cuda", here)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # the others wait while the first one trains a base model
        backend, own = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=12), device_id=own)
    return *ranks(), device


def ranks():
    """(rank, world); (0, 1) where there is one process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier():
    """Waits until all processes are here."""
    if ranks()[1] > 1:
        dist.barrier()


def first_alone(work):
    """work(), in the first process before all others: they find what it has written."""
    if ranks()[0] > 0:
        barrier()
        return work()
    result = work()
    barrier()
    return result


def all_sum(x):
    """The sum of a tensor over all processes, in place: the same bits everywhere."""
    if ranks()[1] > 1:
        dist.all_reduce(x)
    return x


def with_value(local, whole):
    """The value of `whole` with the gradient of `local`, this process's share of it.

    A function f of a sum over processes then has the right gradient, f'(whole) · ∂local, summed over the processes;
    f(local) would have it at another point: Tchebycheff's maximum, say, is of the means of the whole batch.
    """
    return whole + (local - local.detach())


def reduce_gradients(parameters):
    """Sums the gradients over all processes: one flat buffer, for the adapter alone has gradients."""
    if ranks()[1] == 1:
        return
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    flat = all_sum(torch.cat([p.grad.flatten() for p in parameters]))
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(part.view_as(p))


def some_values(tensor):
    """Up to 64 evenly spaced values of a tensor: what tells two apart without reading all. Of those again, all."""
    flat = tensor.reshape(-1)
    n = min(64, len(flat))                                             # in integers: the same on every device
    return flat[torch.arange(n, device=flat.device) * (len(flat) - 1) // max(1, n - 1)]


def shard(model, device):
    """FSDP2, in place: each process keeps its share of the frozen base on `device` and gathers a block when it computes
    with it. What is trained, the adapter, stays whole everywhere. The base may come from the CPU's memory."""
    from torch.distributed.device_mesh import init_device_mesh         # here: slow to import, and few runs need it
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh(device.type, (ranks()[1],))
    trained = {p for p in model.parameters() if p.requires_grad}
    # what a fingerprint (svd_lora.py) reads of a base is kept: no process has all of it later
    seen = {name: some_values(p.detach()) for name, p in model.named_parameters() if p not in trained}
    for p in trained:
        p.data = p.data.to(device)
    for module in [*model.blocks, model]:
        fully_shard(module, mesh=mesh, ignored_params=trained)
    model.register_state_dict_post_hook(lambda module, state, prefix, local: state.update(seen))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: parameters and optimizer in one safetensors file; nothing is pickled.

def save_state(path, named_parameters, *optimizers, **header):
    """Writes all trainable parameters, the optimizers' states and `header` (JSON values, the step among them)."""
    tensors = {f"param.{name}": p.detach().cpu().contiguous() for name, p in named_parameters}
    for o, optimizer in enumerate(optimizers):
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{o}.{i}.{key}": torch.as_tensor(value).cpu().contiguous()
                        for key, value in state.items()}
    write_whole(path, lambda f: save_file(tensors, f, metadata={"state": json.dumps(header)}))


def read_state_header(path):
    """The header of a state file, or None where there is none."""
    if not Path(path).exists():
        return None
    try:
        with safe_open(path, framework="pt") as f:
            return json.loads(f.metadata()["state"])
    except (SafetensorError, KeyError, TypeError):
        raise UserError(f"{path} is not a state file; delete it to start afresh") from None


@torch.no_grad()
def load_state(path, named_parameters, *optimizers):
    """Restores what save_state wrote, in place."""
    states = [{} for _ in optimizers]
    with safe_open(path, framework="pt") as f:
        for name, p in named_parameters:
            p.copy_(f.get_tensor(f"param.{name}"))
        for key in f.keys():
            if key.startswith("optimizer."):
                _, o, i, name = key.split(".")
                states[int(o)].setdefault(int(i), {})[name] = f.get_tensor(key)
    for optimizer, state in zip(optimizers, states):
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


# ---------------------------------------------------------------------------------------------------------------------
# Run directories.

# flags that change nothing of what is trained, but for the last bits
UNTRAINED = {"out", "device", "log_every", "eval", "checkpoint", "compile", "parallel"}


def run_name(parts, flags, named):
    """out/<parts joined by dashes>, followed by every flag that is not at its default and not among `named`."""
    named = named | UNTRAINED | {"dims", "pref_dim", "seed", "save_every", "snapshots"}
    parts = list(parts)
    for f in dataclasses.fields(flags):
        value, default = getattr(flags, f.name), f.default
        if f.name not in named and value != default:
            parts.append(f"{f.name}{Path(value).name if isinstance(value, str) else value}")
    return "out/" + "-".join(parts).replace(" ", "").replace("/", "_")


def prepare_run(out, config):
    """Makes the run directory. Returns the header of the state to resume from, or None for a fresh start.

    Raises UserError for a directory that holds something else than a run of this script.
    """
    if ranks()[0] > 0:                                                 # the first process sees to it, below
        barrier()
        return read_state_header(out / "state.safetensors")
    if out.exists() and any(out.iterdir()) and not ((out / "config.json").exists() and
                                                    read_json(out / "config.json").get("script") == config["script"]):
        raise UserError(f"{out} exists and holds no run of {config['script']}: choose another --out, or empty it")
    state = read_state_header(out / "state.safetensors")
    if state is not None:
        before = read_json(out / "config.json")
        changed = [k for k, v in config["flags"].items()
                   if before["flags"].get(k) != v and k not in UNTRAINED]
        if changed or before["fingerprint"] != config["fingerprint"]:
            print(f"{out} holds an unfinished run with other {', '.join(changed) or 'base weights'}: starting afresh")
            (out / "state.safetensors").unlink()
            state = None
    if state is None:
        for old in [*out.glob("*.json*"), *out.glob("*.safetensors"), *out.glob("*.png"), *out.glob("snapshots/*")]:
            old.unlink()                                               # what an earlier run left: nothing is mixed
    else:
        at = state["member"], state["step"]
        truncate_log(out / "metrics.jsonl", lambda record: (record["member"], record["step"]) <= at)
        print(f"{out}: continuing after step {state['step']} of model {state['member'] + 1}")
    write_json(out / "config.json", config)
    barrier()
    return state


# ---------------------------------------------------------------------------------------------------------------------
# The log: metrics.jsonl, a progress bar, and one line a step that grep can read.

class Log:
    """Appends one JSON object a step to metrics.jsonl and prints it as a line every `every` steps, above the bar."""

    def __init__(self, path, steps, first_step=0, every=1, desc=""):
        self.path, self.every, self.started, self.steps = Path(path), every, time.time(), steps
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.silent = ranks()[0] > 0
        self.bar = tqdm(total=steps, initial=first_step, desc=desc, disable=self.silent or None, dynamic_ncols=True)

    def step(self, record, line):
        """record: {"step": …, …} for the file; line: the same for people."""
        if self.silent:
            return
        with self.path.open("a") as f:
            f.write(json.dumps(record) + "\n")
        if record["step"] % self.every == 0 or record["step"] == self.steps:
            self.bar.write(line)
        self.bar.update()

    def close(self):
        """Ends the bar; returns the seconds since the log was opened."""
        self.bar.close()
        return time.time() - self.started


def truncate_log(path, keep):
    """Drops the records of metrics.jsonl for which keep(record) is false, and a last line that was cut short."""
    lines = []
    for line in Path(path).read_text().splitlines() if Path(path).exists() else []:
        try:
            if keep(json.loads(line)):
                lines.append(line)
        except json.JSONDecodeError:
            break                                           # the line that was being written when the run was killed
    write_whole(path, lambda f: Path(f).write_text("".join(line + "\n" for line in lines)))


# ---------------------------------------------------------------------------------------------------------------------
# How fast, in units of what the hardware allows.

@functools.lru_cache
def matmul_ceiling(device, dtype, seconds=0.2):
    """FLOP/s of the fastest product of two square matrices, as fused.py multiplies, among those that fit into so many
    seconds."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.rand(n, n, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    fused.product(a, a)                                                               # the first one is slow
    wait()
    best, start = math.inf, time.perf_counter()
    while time.perf_counter() - start < seconds or best == math.inf:
        t0 = time.perf_counter()
        fused.product(a, a)
        wait()
        best = min(best, time.perf_counter() - t0)
    return 2 * n ** 3 / best


def peak_memory(device):
    """The most bytes held at one time: allocated tensors on CUDA, else the resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if Path("/proc/self/status").exists():              # Linux's getrusage would count what started this process too
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def model_flops(config, tokens, predicted, adapter=0, base=4):
    """Floating point operations that a Transformer (model.Config) needs for its matrices; attention scores not counted.

    tokens: that run through the blocks; predicted: that the head predicts (padding is none of either); adapter: how
    many parameters the adapter has. base: operations a parameter and token, 2 forward; 4 with the gradient of the
    activations, where the base is frozen; 6 with that of the weights too. An adapter that trains takes 6 always.
    """
    c = config
    attention = c.d_model * c.head_dim * (2 * c.n_head + 2 * c.n_kv_head)
    mlp = (3 if c.activation == "swiglu" else 2) * c.d_model * c.d_ff
    return (base * (c.n_layer * (attention + mlp) * tokens + c.vocab_size * c.d_model * predicted)
            + (2 if base == 2 else 6) * adapter * tokens)


def report_speed(out, device, dtype, world=1):
    """Sums up the metrics.jsonl of a finished run: prints one line, writes timing.json, returns the seconds.

    The records have "tokens", "flops" and "seconds". Seconds lie apart from all else that a run writes, so that the
    same seed on the same machine gives the same files.
    """
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seconds, tokens, flops = (sum(r[key] for r in records) for key in ("seconds", "tokens", "flops"))
    ceiling = matmul_ceiling(device, dtype)
    timing = {"train_seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds,
              "tokens_per_second_median": statistics.median(r["tokens"] / r["seconds"] for r in records),
              "peak_memory": peak_memory(device), "flops": flops, "mfu": flops / seconds / ceiling / world,
              "matmul_flops_per_second": ceiling, "dtype": str(dtype).removeprefix("torch."), "processes": world}
    write_json(out / "timing.json", timing)
    print(f"{timing['tokens_per_second']:.0f} tokens/s (median step {timing['tokens_per_second_median']:.0f}), "
          f"peak memory {timing['peak_memory'] / 2 ** 30:.2f} GiB, model FLOPs utilisation {timing['mfu']:.3f} of the "
          f"{ceiling / 1e12:.3g} TFLOP/s of {timing['dtype']} products" + f" on each of {world} devices" * (world > 1))
    return seconds


def versions():
    """The versions a run depends on, for config.json."""
    return {"python": sys.version.split()[0], "torch": torch.__version__}
