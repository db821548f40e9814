"""bench_dpo_step.py - seconds and memory of a DPO step: ours beside trl + peft and a minimal transformers + peft loop.

    python bench/bench_dpo_step.py                                 # GPT-2 124M, fp32, 4 pairs of 256 tokens
    python bench/bench_dpo_step.py --dtype bf16 --model llama      # a Llama of 100M; base weights in bf16
    python bench/bench_dpo_step.py --model llama2-7b --dtype bf16 --device cuda --length 512 --peers trl

Every contestant runs in a process of its own and waits for its turn (turns.py). Same weights (a directory that ours
wrote), same tokens, half of each pair its prompt; adapters on every projection, no dropout; AdamW on the adapter. First
the values: log π_ref of every response must agree.

ours      SVD-LoRA k = 8, m = 2, a preference per row, LS; the reference's log-probs are made in every step, like theirs
kept      the same with the reference's log-probs made once, as train_dpo.py trains (its data is fixed)
loop      25 lines of transformers + peft (AdaLoRA, rank 8): two forwards, logits, backward
trl       trl.DPOTrainer with the same adapter
The peers: pip install transformers==5.23.0 peft==0.21.2 trl==1.16.0; without one of them, name the others (--peers).
Model FLOPs are counted for trained tokens alone, 4N of the blocks and of the head (no reference, no recomputation).
"""
import logging
import statistics
import sys
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from aggregate import linear_scalarization, sample_preference
from bench.pairs import pack_pairs, token_pairs
from bench.turns import DTYPES, chosen, enter, model_directory, peer_model, relative_error, take_turns, turn_columns
from data.trees import batch_logprobs
from fronts.tables import shown, table
from model import SIZES, Config, Transformer
from objectives import dpo_loss, losses_on_pairs
from runs.flags import flag, run_main
from runs.processes import pick_device
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
    dtype: Literal["fp32", "bf16"] = flag("fp32", "of the base's weights; adapters are fp32")
    device: str = flag("cpu", "cpu or cuda")
    pairs: int = flag(4, "pairs per step", 1)
    length: int = flag(256, "tokens of a response with its prompt; half of them are the prompt", 2)
    steps: int = flag(5, "turns: timed steps of each contestant", 1)
    peers: list[str] = flag(PEERS[:2], "beside ours: loop, trl, loop-lora, trl-lora (LoRA of rank 10), or none")
    quantize: Literal["none", "int8", "nf4"] = flag("none", "ours with a quantised base")
    checkpoint: bool = flag(False, "activation checkpointing, for all contestants")


# ---------------------------------------------------------------------------------------------------------------------
# The contestants. Each calls turn() when it is ready, with log π_ref if it has it, and then after every step.

def ours(turn, name, device, flags, directory):
    """The step of train_dpo.py."""
    model = Transformer.from_pretrained(directory, DTYPES[flags.dtype], device, flags.quantize)
    inject_svd_lora(model, 8, 2, lora_scaling=8.0, generator=torch.Generator().manual_seed(1))
    model.checkpoint_blocks = flags.checkpoint
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    for step in range(2 * flags.steps):
        batch = pack_pairs(token_pairs(flags, model.config.vocab_size, step), m=2).to(device)
        if step == 0 or name != "kept":
            with torch.no_grad(), adapters_off(model):
                ref = batch_logprobs(model, batch)                                    # (2 pairs,)
        if step == 0:
            flops = model_flops(model.config, batch.tokens.numel(), len(batch.targets))
            turn(reference=ref.view(-1, 2).T.flatten().cpu(), flops=flops)
        lam = sample_preference(flags.pairs, 2, generator=torch.Generator().manual_seed(step)).to(device)
        set_preference(model, lam)
        pi = batch_logprobs(model, batch)
        losses, *_ = losses_on_pairs(dpo_loss, pi, ref, batch.pairs, batch.better, 0.1)            # (pairs, 2)
        linear_scalarization(losses, lam).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turn()


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


def loop(turn, name, device, flags, directory):
    """The shortest transformers + peft loop: what a from-scratch code must not be slower than."""
    inner, adapter = adapted_peer(name, device, flags, directory)
    from peft import get_peft_model
    model = get_peft_model(inner, adapter).train()
    if flags.checkpoint:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    half = flags.length // 2
    def logps(x):
        logits = inner(input_ids=x, use_cache=False).logits[:, :-1].float()
        return logits.log_softmax(-1).gather(-1, x[:, 1:, None])[:, half - 1:, 0].sum(1)
    for step in range(2 * flags.steps):
        x = token_pairs(flags, inner.config.vocab_size, step).flatten(0, 1).to(device)
        with torch.no_grad(), model.disable_adapter():
            ref = logps(x)
        if step == 0:
            turn(reference=ref.cpu())
        chosen, rejected = (logps(x) - ref).chunk(2)
        (-F.logsigmoid(0.1 * (chosen - rejected))).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turn()


def trl(turn, name, device, flags, directory):
    """trl.DPOTrainer on the same tokens."""
    model, adapter = adapted_peer(name, device, flags, directory)
    import transformers
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from trl import DPOConfig, DPOTrainer
    V, half = model.config.vocab_size, flags.length // 2
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, V)},
                                       unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>",
                                                 eos_token="</s>")
    say = lambda ids: " ".join(f"w{i}" for i in ids.tolist())
    rows = [dict(prompt=say(x[:half]), chosen=" " + say(x[half:-1]) + " </s>", rejected=" " + say(y[half:-1]) + " </s>")
            for step in range(2 * flags.steps) for x, y in zip(*token_pairs(flags, V, step))]
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

def main(flags):
    """Starts the contestants, compares their values, lets them take turns, and prints the table."""
    device, dtype = pick_device(flags.device, flags.dtype)
    peers = chosen("peers", flags.peers, PEERS)
    ceiling = matmul_ceiling(device, dtype)
    workers, first = {}, {}
    with model_directory(replace(MODELS[flags.model], eos_id=None), dtype, device) as directory:
        for name in ("ours", "kept", *peers):                 # one after the other: loading does not disturb a turn
            work = trl if name.startswith("trl") else loop if name.startswith("loop") else ours
            workers[name], first[name] = enter(work, name, device, flags, directory)
            if "reference" in first[name]:
                error = relative_error(first[name]["reference"], first["ours"]["reference"])
                print(f"log π_ref of all responses, {name}: relative difference from ours {error:.1e}")
                assert error <= (0.02 if flags.dtype == "bf16" or flags.quantize != "none" else 1e-4), \
                    f"{name} computes something else"
        reports = take_turns(workers, flags.steps)
    print(f"\n{flags.model}, {flags.dtype}, --quantize {flags.quantize}, {flags.pairs} pairs of {flags.length} tokens")
    print(f"{device.type}, {torch.get_num_threads()} threads, matrix products at most {ceiling / 1e12:.2f} TFLOP/s")
    seconds = {name: [report["seconds"] for report in rows] for name, rows in reports.items()}
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    mfu = [first[name]["flops"] / s / ceiling if "flops" in first[name] else None for name, s in medians.items()]
    print(table(turn_columns(seconds, "s per step", ".3f", "ours") | {
        "tokens/s": shown([2 * flags.pairs * flags.length / s for s in medians.values()], ".0f"),
        "MFU": shown(mfu, ".1%"),
        "peak MB": shown([rows[-1]["peak"] / 2 ** 20 for rows in reports.values()], ".0f")}))


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
