"""bench_dpo_step.py - seconds and memory of a DPO step: ours beside trl + peft and a minimal transformers + peft loop.

    python bench/bench_dpo_step.py                                 # GPT-2 124M, fp32, 4 pairs of 256 tokens
    python bench/bench_dpo_step.py --dtype bf16 --model llama      # a Llama of 100M; base weights in bf16
    python bench/bench_dpo_step.py --model llama2-7b --dtype bf16 --device cuda --length 512 --peers trl
    python bench/bench_dpo_step.py --init DIR --data FILE --length 512 --steps 25       # a real model, real rows

Every contestant runs in a process of its own and waits for its turn (turns.py). Same weights (a directory that ours
wrote, or --init), same rows in the same order; adapters on every projection, no dropout; AdamW on the adapter. Random
tokens: half of each pair is its prompt. With --data the rows are tokenised, cut and put into batches of about one
length by our own code, for all contestants. First the values: log π_ref of every response must agree.

ours      SVD-LoRA k = 8, m = 2, a preference per row, LS; the reference's log-probs are made in every step, like theirs
kept      the same with the reference's log-probs made once, as train_dpo.py trains (its data is fixed). The script says
          what they cost for each step: a training of one epoch pays that too
loop      25 lines of transformers + peft (AdaLoRA, rank 8): two forwards, logits, backward; rows padded on the right
trl       trl.DPOTrainer with the same adapter; not with --data, whose rows it would take in an order of its own
The peers: pip install transformers==5.23.0 peft==0.21.2 trl==1.16.0; without one of them, name the others (--peers).
Tokens are those of the data, for all contestants: prompt + response of both responses of every pair, without padding.
Model FLOPs are counted for trained tokens alone, 4N of the blocks and of the head (no reference, no recomputation).
"""
import logging
import statistics
import sys
import tempfile
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from aggregate import linear_scalarization, sample_preference
from bench.pairs import pair_rows, token_pairs
from bench.turns import DTYPES, chosen, enter, model_directory, peer_model, relative_error, take_turns, turn_columns
from data.batches import pad_to
from data.preferences import read_preferences
from data.tokenizers import load_tokenizer, tokenize
from data.trees import batch_logprobs, pack, row_lengths
from fronts.tables import shown, table
from model import SIZES, Config, Transformer
from objectives import dpo_loss, losses_on_pairs
from runs.files import UserError
from runs.flags import flag, run_main
from runs.processes import pick_device
from runs.randomness import epoch_batch
from runs.speed import matmul_ceiling, model_flops
from svd_lora import adapters_off, inject_svd_lora, set_preference

SMALL_LLAMA = Config(32000, 1024, 12, 10, 640, d_ff=1728, bos_id=1, eos_id=2, norm="rmsnorm", positions="rotary",
                     activation="swiglu", qkv_bias=False, out_bias=False, tied=False)                         # 100M
MODELS = {"gpt2": SIZES["125m"], "llama": SMALL_LLAMA, **SIZES}
PEERS = ["loop", "trl", "loop-lora", "trl-lora"]


@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    model: Literal[tuple(MODELS)] = flag("gpt2", "shape, random weights")
    init: str | None = flag(None, "Hugging Face directory instead: a real model, for --data")
    data: list[str] | None = flag(None, "preference JSONL files instead of random tokens: their first two dimensions")
    rows: int = flag(200, "of --data, the first so many", 1)
    dtype: Literal["fp32", "bf16"] = flag("fp32", "of the base's weights; adapters are fp32")
    device: str = flag("cpu", "cpu or cuda")
    pairs: int = flag(4, "pairs per step", 1)
    length: int = flag(256, "tokens of prompt and response, half of them each; rows of --data are cut to so many", 2)
    steps: int = flag(5, "turns: timed steps of each contestant, each after one that is not", 1)
    peers: list[str] | None = flag(None, "beside ours: loop, trl, loop-lora, trl-lora (LoRA of rank 10), or none "
                                         "(default: loop trl; with --data loop loop-lora)")
    quantize: Literal["none", "int8", "nf4"] = flag("none", "ours with a quantised base")
    checkpoint: bool = flag(False, "activation checkpointing, for all contestants")


# ---------------------------------------------------------------------------------------------------------------------
# The contestants. Each calls turn() when it is ready, with log π_ref of all responses if it has it, and then after
# every step. batches: the rows (data.tokenizers.TokenRow) of every step.

def ours(turn, name, device, flags, directory, batches):
    """The step of train_dpo.py."""
    model = Transformer.from_pretrained(directory, DTYPES[flags.dtype], device, flags.quantize)
    inject_svd_lora(model, 8, 2, lora_scaling=8.0, generator=torch.Generator().manual_seed(1))
    model.checkpoint_blocks = flags.checkpoint
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    @torch.no_grad()
    def reference(batch):                                                             # -> (R,)
        with adapters_off(model):
            return batch_logprobs(model, batch)
    start = time.perf_counter()
    kept = [reference(pack(rows, pad_to(device)).to(device)) for rows in batches]
    turn(reference=torch.cat(kept).cpu(), once=time.perf_counter() - start)
    for step, rows in enumerate(batches):
        batch = pack(rows, pad_to(device)).to(device)
        ref = kept[step] if name == "kept" else reference(batch)
        lam = sample_preference(len(rows), 2, generator=torch.Generator().manual_seed(step)).to(device)
        set_preference(model, lam)
        pi = batch_logprobs(model, batch)
        losses, _, known = losses_on_pairs(dpo_loss, pi, ref, batch.pairs, batch.better, 0.1)      # (pairs, 2)
        linear_scalarization(losses * known, lam).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turn(flops=model_flops(model.config, *batch.size))


def adapted_peer(name, device, flags, directory):
    """transformers' model of the same weights, without dropout, and peft's adapter for it."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    model = peer_model(directory, DTYPES[flags.dtype], device)
    from peft import AdaLoraConfig, LoraConfig
    gpt2 = model.config.model_type == "gpt2"
    shared = dict(target_modules=["c_attn", "c_proj", "c_fc"] if gpt2 else
                  [x + "_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")],
                  lora_dropout=0.0, task_type="CAUSAL_LM", lora_alpha=8, fan_in_fan_out=gpt2)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if name.endswith("-lora"):
        return model, LoraConfig(r=10, **shared)
    return model, AdaLoraConfig(init_r=8, target_r=8, tinit=1, tfinal=1, total_step=flags.steps + 100, **shared)


def loop(turn, name, device, flags, directory, batches):
    """The shortest transformers + peft loop: what a from-scratch code must not be slower than."""
    inner, adapter = adapted_peer(name, device, flags, directory)
    from peft import get_peft_model
    model = get_peft_model(inner, adapter).train()
    if flags.checkpoint:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    def logps(rows):                                          # -> (rows, 2)
        pad = lambda lists: pad_sequence([torch.tensor(ids) for ids in lists], batch_first=True).to(device)
        x = pad(row.prompt + y for row in rows for y in row.responses)                # (2 rows, T)
        predicted = pad([0] * (len(row.prompt) - 1) + [1] * len(y) for row in rows for y in row.responses)
        logits = inner(input_ids=x, use_cache=False).logits[:, :-1].float()       # padded on the right: no mask
        return (logits.log_softmax(-1).gather(-1, x[:, 1:, None])[:, :, 0] * predicted).sum(1).view(-1, 2)
    @torch.no_grad()
    def reference(rows):
        with model.disable_adapter():
            return logps(rows)
    turn(reference=torch.cat([reference(rows).flatten() for rows in batches]).cpu())
    for rows in batches:
        ref = reference(rows)
        first, second = (logps(rows) - ref).T
        sign = torch.tensor([(1, -1, 0)[row.better[0][0]] for row in rows], device=device)   # no label: -1, so 0
        (-F.logsigmoid(0.1 * sign * (first - second))).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turn()


def trl(turn, name, device, flags, directory, batches):
    """trl.DPOTrainer on the same tokens."""
    model, adapter = adapted_peer(name, device, flags, directory)
    import transformers
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from trl import DPOConfig, DPOTrainer
    V = model.config.vocab_size
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, V)},
                                       unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>",
                                                 eos_token="</s>")
    say = lambda ids: " ".join(f"w{i}" for i in ids)
    rows = [dict(prompt=say(row.prompt), chosen=f" {say(row.responses[0][:-1])} </s>",
                 rejected=f" {say(row.responses[1][:-1])} </s>") for rows in batches for row in rows]
    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            turn()
    with tempfile.TemporaryDirectory() as scratch:
        settings = DPOConfig(output_dir=scratch, use_cpu=device.type == "cpu", per_device_train_batch_size=flags.pairs,
                             max_steps=2 * flags.steps, logging_steps=1000, report_to=[], save_strategy="no",
                             gradient_checkpointing=flags.checkpoint, disable_tqdm=True, max_length=flags.length,
                             learning_rate=1e-4, beta=0.1, dataloader_pin_memory=False, bf16=False)
        trainer = DPOTrainer(model=model, args=settings, train_dataset=Dataset.from_list(rows),
                             processing_class=words, peft_config=adapter, callbacks=[Turns()])
        trainer.train()
        turn()


# ---------------------------------------------------------------------------------------------------------------------

def random_batches(flags):
    """Pairs of random tokens for every step."""
    return [pair_rows(token_pairs(flags, MODELS[flags.model].vocab_size, step), m=2) for step in range(2 * flags.steps)]


def real_batches(flags):
    """The rows of every step, in the order in which train_dpo.py takes those of files: a batch has about one length."""
    rows, *_ = read_preferences(flags.data, pref_dim=2)
    rows, cut = tokenize(rows[:flags.rows], load_tokenizer(flags.init), flags.length)
    print("{prompts} rows, {prompts_cut} prompts and {responses_cut} of {responses} responses cut".format(**cut))
    lengths = row_lengths(rows)
    return [[rows[j] for j in epoch_batch(len(rows), flags.pairs, 0, step, lengths)] for step in range(2 * flags.steps)]


def main(flags):
    """Starts the contestants, compares their values, lets them take turns, and prints the table."""
    if (flags.init is None) != (flags.data is None):
        raise UserError("--init and --data go together: a real model and real rows")
    device, dtype = pick_device(flags.device, flags.dtype)
    known = PEERS if flags.data is None else ["loop", "loop-lora"]
    peers = chosen("peers", flags.peers or known[:2], known)
    batches = random_batches(flags) if flags.data is None else real_batches(flags)
    lengths = [[len(row.prompt) + len(y) for row in rows for y in row.responses] for rows in batches]
    padding = 1 - sum(map(sum, lengths)) / sum(max(x) * len(x) for x in lengths)
    ceiling = matmul_ceiling(device, dtype)
    workers, first = {}, {}
    with (nullcontext(flags.init) if flags.init else
          model_directory(replace(MODELS[flags.model], eos_id=None), dtype, device)) as directory:
        for name in ("ours", "kept", *peers):                 # one after the other: loading does not disturb a turn
            work = trl if name.startswith("trl") else loop if name.startswith("loop") else ours
            workers[name], first[name] = enter(work, name, device, flags, directory, batches)
            if "reference" in first[name]:
                error = relative_error(first[name]["reference"], first["ours"]["reference"])
                print(f"log π_ref of all {sum(map(len, lengths))} responses, {name}: "
                      f"relative difference from ours {error:.1e}", flush=True)
                assert error <= (0.02 if flags.dtype == "bf16" or flags.quantize != "none" else 1e-4), \
                    f"{name} computes something else"
        reports = take_turns(workers, flags.steps)
    print(f"\n{flags.init or flags.model}, {flags.dtype}, --quantize {flags.quantize}, {flags.pairs} pairs of "
          f"{'at most ' if flags.data else ''}{flags.length} tokens; {padding:.1%} of what the loop reads is padding")
    print(f"{device.type}, {torch.get_num_threads()} threads, matrix products at most {ceiling / 1e12:.2f} TFLOP/s")
    print(f"kept: the reference's log-probs were made once, in {first['kept']['once'] / len(batches):.3f} s per step")
    tokens = [sum(x) for x in lengths[1::2]]                  # of the steps that count: the second of each turn
    seconds = {name: [report["seconds"] for report in rows] for name, rows in reports.items()}
    speeds = {name: [n / s for n, s in zip(tokens, each)] for name, each in seconds.items()}
    mfu = [statistics.median(report["flops"] / report["seconds"] for report in rows) / ceiling
           if "flops" in rows[0] else None for rows in reports.values()]
    print(table(turn_columns(seconds, "s per step", ".3f", "ours") | {
        "tokens/s": turn_columns(speeds, "tokens/s", ".0f", "ours")["tokens/s"],
        "tokens/s in all": shown([sum(tokens) / sum(each) for each in seconds.values()], ".0f"),
        "MFU": shown(mfu, ".1%"),
        "peak MB": shown([rows[-1]["peak"] / 2 ** 20 for rows in reports.values()], ".0f")}))


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
