"""scaling.py - memory and time of a DPO step from the model's shape alone; the table of docs/scaling.md.

    python bench/scaling.py                                        # the table
    python bench/scaling.py --check                                # its memory against a real step on this machine

A step has P pairs of T tokens, half of them the prompt, which a pair shares: 1.5 P T tokens run through the blocks, P T
are predicted. D: d_model   H, K: query and key/value heads   C: head_dim   d_ff: width of the MLP   r = k + m: rank

weights        bytes of the frozen base, by precision; embeddings and head are never quantised
adapter        16 bytes per parameter: fp32 value, gradient, and AdamW's two moments
activations    what a block keeps for the backward pass, per token: both norms' inputs and outputs, q, k, v, the
               attention's output, the MLP's inner ones: 4 D + 2 H C + 2 K C + 3 d_ff numbers for Llama, 4 D + 2 H C +
               2 K C + 2 d_ff for GPT-2, and a few in fp32 of the norms and of attention. With checkpointing one
               block's, and D numbers per token and block
scratch        linear_logprob's chunk of logits in fp32 and once more in the compute dtype, and for a quantised base one
               dequantised matrix; for fsdp two gathered blocks
time           model FLOPs: per token 4 times the base's parameters (2 forward, 2 for the activations' gradient), with
               checkpointing 2 times more, at a sustained rate that is assumed (--tflops), not measured
"""
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.pairs import pack_pairs, token_pairs
from data.trees import batch_logprobs
from model import SIZES, Transformer
from ops import fused
from runs.flags import flag, run_main
from runs.speed import model_flops, peak_memory
from svd_lora import inject_svd_lora, set_preference

BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "nf4": 0.5 + 2 / 64}      # nf4: a scale of 2 bytes for 64 values
SETTINGS = [   # size, precision of the blocks, checkpointing, devices, how the base is spread
    ("125m", "fp32", False, 1, ""), ("125m", "bf16", False, 1, ""),
    ("1b", "bf16", False, 1, ""), ("1b", "bf16", True, 1, ""), ("1b", "nf4", True, 1, ""),
    ("llama2-7b", "bf16", False, 1, ""), ("llama2-7b", "bf16", True, 1, ""), ("llama2-7b", "int8", True, 1, ""),
    ("llama2-7b", "nf4", True, 1, ""), ("llama2-7b", "bf16", True, 8, "ddp"), ("llama2-7b", "bf16", True, 8, "fsdp"),
    ("llama2-13b", "bf16", False, 1, ""), ("llama2-13b", "bf16", True, 1, ""), ("llama2-13b", "nf4", True, 1, ""),
    ("llama2-70b", "bf16", True, 8, "fsdp"), ("llama2-70b", "int8", True, 1, ""), ("llama2-70b", "nf4", True, 1, ""),
]


@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    pairs: int = flag(8, "pairs per step, over all devices")
    length: int = flag(512, "tokens of a response with its prompt; half of them are the prompt")
    rank: int = flag(10, "k + m")
    tflops: float = flag(400.0, "assumed sustained rate of a device, for the seconds")
    check: bool = flag(False, "compare the peak with a real step's")


def block_matrices(c):
    """[(d_out, d_in)] of a block's linear layers."""
    q, kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    mlp = [(c.d_ff, c.d_model)] * (2 if c.gated else 1) + [(c.d_model, c.d_ff)]
    return [(q, c.d_model), (kv, c.d_model), (kv, c.d_model), (c.d_model, q)] + mlp


def adapter_parameters(c, rank):
    """U and V of every matrix, and the singular values (k and a scale: counted as rank)."""
    return c.n_layer * sum((d_out + d_in + 1) * rank for d_out, d_in in block_matrices(c))


def weight_bytes(c, precision):
    """(bytes of the blocks' matrices, bytes of embeddings, head, norms and biases)."""
    blocks = c.n_layer * sum(d_out * d_in for d_out, d_in in block_matrices(c))
    tables = c.vocab_size * c.d_model * (1 if c.tied else 2)
    tables += c.context_length * c.d_model * (c.positions == "learned")
    return blocks * BYTES[precision], tables * (4 if precision == "fp32" else 2)


def block_activations(c, compute_bytes):
    """Bytes that one block keeps, per token."""
    layernorm = c.norm == "layernorm"
    numbers = (4 * c.d_model + 2 * c.n_head * c.head_dim + 2 * c.n_kv_head * c.head_dim
               + (3 if c.gated else 2) * c.d_ff)
    return numbers * compute_bytes + 4 * (c.n_head + (4 if layernorm else 2))


def memory(c, precision, checkpoint, devices, spread, flags):
    """Bytes of one device by part: weights, adapter, activations, scratch."""
    compute = 4 if precision == "fp32" else 2
    pairs = flags.pairs / devices
    tokens, predicted = 1.5 * pairs * flags.length, pairs * flags.length
    blocks, tables = weight_bytes(c, precision)
    shards = devices if spread == "fsdp" else 1
    block = block_activations(c, compute)
    kept = c.d_model * compute * c.n_layer + block if checkpoint else block * c.n_layer
    scratch = min(predicted * c.vocab_size, fused.CUDA_LOGITS) * (4 + compute) + 3 * predicted * c.d_model * compute
    if precision in ("int8", "nf4"):
        scratch += max(a * b for a, b in block_matrices(c)) * compute
    if spread == "fsdp":
        scratch += 2 * blocks / c.n_layer
    return {"weights": (blocks + tables) / shards, "adapter": 16 * adapter_parameters(c, flags.rank),
            "activations": kept * tokens, "scratch": scratch}


def step_flops(c, checkpoint, flags):
    """(model FLOPs of a step, FLOPs that are executed for it)."""
    tokens, predicted = 1.5 * flags.pairs * flags.length, flags.pairs * flags.length
    adapter = adapter_parameters(c, flags.rank)
    useful = model_flops(c, tokens, predicted, adapter)
    return useful, useful + (model_flops(c, tokens, 0, adapter, base=2) if checkpoint else 0)


def table(flags):
    """The lines of the markdown table."""
    yield ("| model | base | checkpointing | GPUs | weights | adapter | activations | scratch | GiB per GPU | "
           "TFLOP per step | s per step |")
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for size, precision, checkpoint, devices, spread in SETTINGS:
        c = SIZES[size]
        parts = memory(c, precision, checkpoint, devices, spread, flags)
        useful, executed = step_flops(c, checkpoint, flags)
        cells = [f"{x / 2 ** 30:.2f}" for x in parts.values()]
        yield (f"| {size} | {precision} | {'yes' if checkpoint else 'no'} | {f'{devices} {spread}'.strip()} | "
               + " | ".join(cells) + f" | **{sum(parts.values()) / 2 ** 30:.1f}** | {useful / 1e12:.1f} | "
               f"{executed / devices / flags.tflops / 1e12:.3f} |")


def check(flags):
    """The peak of a real step of GPT-2 124M beside the formula's."""
    flags = replace(flags, pairs=min(flags.pairs, 4), length=min(flags.length, 256))
    c = SIZES["125m"]
    model = Transformer(c).init_weights(torch.Generator().manual_seed(0))
    inject_svd_lora(model, flags.rank - 2, 2)
    set_preference(model, torch.tensor([0.5, 0.5]))
    batch = pack_pairs(token_pairs(flags, c.vocab_size, 0), m=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    before = peak_memory(torch.device("cpu"))
    for _ in range(2):
        batch_logprobs(model, batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    grown = peak_memory(torch.device("cpu")) - before
    parts = memory(c, "fp32", False, 1, "", flags)
    # on a CPU the logits come in tiles; values and gradients of the adapter were there before or are small
    formula = parts["activations"] + 3 * flags.pairs * flags.length * c.d_model * 4 + parts["adapter"] * 3 / 4
    print(f"125m, fp32, {flags.pairs} pairs of {flags.length}: a step adds {grown / 2 ** 20:.0f} MiB to the process, "
          f"formula {formula / 2 ** 20:.0f} ({formula / grown:.2f})")


def main(flags):
    """Prints the table, or checks it."""
    if flags.check:
        return check(flags)
    print("\n".join(table(flags)))


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
