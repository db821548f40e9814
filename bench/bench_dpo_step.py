"""bench_dpo_step.py - seconds and memory of a DPO step: ours beside trl + peft and a minimal transformers + peft loop.

    python bench/bench_dpo_step.py                                 # GPT-2 124M, fp32, 4 pairs of 256 tokens
    python bench/bench_dpo_step.py --dtype bf16 --model llama      # a Llama of 100M; base weights in bf16
    python bench/bench_dpo_step.py --model llama2-7b --dtype bf16 --device cuda --length 512 --peers trl
    python bench/bench_dpo_step.py --peers none --m 2 10           # what more dimensions cost

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
import os
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
from bench.turns import DTYPES, clock, enter, ratio, reporter, take_turns
from data.tokenizers import TokenRow
from data.trees import batch_logprobs, pack
from model import SIZES, Config, Transformer
from objectives import dpo_loss, losses_on_pairs
from runs.flags import flag, run_main
from runs.processes import pick_device
from runs.speed import matmul_ceiling, model_flops, peak_memory
from svd_lora import adapters_off, inject_svd_lora, set_preference

SMALL_LLAMA = Config(32000, 1024, 12, 10, 640, d_ff=1728, bos_id=1, eos_id=2, norm="rmsnorm", positions="rotary",
                     activation="swiglu", qkv_bias=False, out_bias=False, tied=False)                         # 100M
MODELS = {"gpt2": SIZES["125m"], "llama": SMALL_LLAMA, **SIZES}


@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    model: Literal[tuple(MODELS)] = flag("gpt2", "shape, random weights")
    dtype: Literal["fp32", "bf16"] = flag("fp32", "of the base's weights; adapters are fp32")
    device: str = flag("cpu", "cpu or cuda")
    pairs: int = flag(4, "pairs per step", 1)
    length: int = flag(256, "tokens of a response with its prompt; half of them are the prompt", 2)
    steps: int = flag(5, "turns: timed steps of each contestant", 1)
    peers: list[str] = flag(["loop", "trl"], "beside ours: loop, trl, loop-lora, trl-lora (rank r LoRA), or none")
    m: list[int] = flag([2], "dimensions; several are contestants of their own")
    quantize: Literal["none", "int8", "nf4"] = flag("none", "ours with a quantised base")
    checkpoint: bool = flag(False, "activation checkpointing, for all contestants")
    compile: bool = flag(False, "ours with compiled blocks")
    worker: str | None = flag(None, "used by the script itself")
    directory: str | None = flag(None, "used by the script itself")


def token_pairs(flags, vocabulary, step):
    """(2, pairs, length): chosen and rejected, which share the first half."""
    g = torch.Generator().manual_seed(step)
    ids = torch.randint(3, vocabulary, (2, flags.pairs, flags.length), generator=g)
    ids[1, :, :flags.length // 2] = ids[0, :, :flags.length // 2]
    return ids


# ---------------------------------------------------------------------------------------------------------------------
# The contestants. Each yields once when it is ready, with its report, then does a step whenever it is resumed.

def ours(flags, m, keep_reference):
    """The step of train_dpo.py."""
    device = torch.device(flags.device)
    model = Transformer.from_pretrained(flags.directory, DTYPES[flags.dtype], device, flags.quantize)
    inject_svd_lora(model, 8, m, lora_scaling=8.0, generator=torch.Generator().manual_seed(1))
    model.checkpoint_blocks = flags.checkpoint
    if flags.compile:
        for block in model.blocks:
            block.compile()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    half, step, ref = flags.length // 2, 0, None
    while True:
        ids = token_pairs(flags, model.config.vocab_size, step)
        rows = [TokenRow(x[:half].tolist(), [x[half:].tolist(), y[half:].tolist()], [(0, 1)], [[0] * m])
                for x, y in zip(*ids)]
        batch = pack(rows).to(device)
        if ref is None or not keep_reference:
            with torch.no_grad(), adapters_off(model):
                ref = batch_logprobs(model, batch)                                    # (2 pairs,)
        if step == 0:
            flops = model_flops(model.config, batch.tokens.numel(), len(batch.targets))
            yield {"reference": ref.view(-1, 2).T.flatten().tolist(), "flops": flops}
        lam = sample_preference(flags.pairs, m, generator=torch.Generator().manual_seed(step)).to(device)
        set_preference(model, lam)
        pi = batch_logprobs(model, batch)
        losses, *_ = losses_on_pairs(dpo_loss, pi, ref, batch.pairs, batch.better, 0.1)            # (pairs, m)
        linear_scalarization(losses, lam).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        yield


def peer_model(flags, lora):
    """transformers' model of the same weights, and peft's adapter for it."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import transformers
    from peft import AdaLoraConfig, LoraConfig
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(flags.directory, dtype=DTYPES[flags.dtype])
    model = model.to(flags.device)
    gpt2 = model.config.model_type == "gpt2"
    shared = dict(target_modules=["c_attn", "c_proj", "c_fc"] if gpt2 else
                  [x + "_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")],
                  lora_dropout=0.0, task_type="CAUSAL_LM", lora_alpha=8, fan_in_fan_out=gpt2)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    total = flags.steps + 100
    return model, (LoraConfig(r=10, **shared) if lora else
                   AdaLoraConfig(init_r=8, target_r=8, tinit=1, tfinal=1, total_step=total, **shared))


def loop(flags, lora=False):
    """The shortest transformers + peft loop: what a from-scratch code must not be slower than."""
    from peft import get_peft_model
    inner, adapter = peer_model(flags, lora)
    model = get_peft_model(inner, adapter).train()
    if flags.checkpoint:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    half, step = flags.length // 2, 0
    def logps(x):
        logits = inner(input_ids=x, use_cache=False).logits[:, :-1].float()
        return logits.log_softmax(-1).gather(-1, x[:, 1:, None])[:, half - 1:, 0].sum(1)
    while True:
        x = token_pairs(flags, inner.config.vocab_size, step).flatten(0, 1).to(flags.device)
        with torch.no_grad(), model.disable_adapter():
            ref = logps(x)
        if step == 0:
            yield {"reference": ref.tolist()}
        chosen, rejected = (logps(x) - ref).chunk(2)
        (-F.logsigmoid(0.1 * (chosen - rejected))).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        yield


def trl(flags, wait, lora=False):
    """trl.DPOTrainer on the same tokens. Its own loop calls `wait` before every step: it cannot yield."""
    import transformers
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from trl import DPOConfig, DPOTrainer
    model, adapter = peer_model(flags, lora)
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
            wait()
    with tempfile.TemporaryDirectory() as scratch:
        settings = DPOConfig(output_dir=scratch, use_cpu=flags.device == "cpu", per_device_train_batch_size=flags.pairs,
                             max_steps=2 * flags.steps, logging_steps=1000, report_to=[], save_strategy="no",
                             gradient_checkpointing=flags.checkpoint, disable_tqdm=True, max_length=flags.length,
                             learning_rate=1e-4, beta=0.1, dataloader_pin_memory=False, bf16=False)
        trainer = DPOTrainer(model=model, args=settings, train_dataset=Dataset.from_list(rows),
                             processing_class=words, peft_config=adapter, callbacks=[Turns()])
        trainer.train()


def work(flags):
    """One contestant: reports, then does a step for every line on stdin and answers with its seconds."""
    device, start, send = torch.device(flags.device), None, reporter()
    def answer(report=None):
        nonlocal start
        send({"seconds": clock(device) - start, "peak": peak_memory(device)} if report is None else report)
        if not sys.stdin.readline():
            os._exit(0)
        start = clock(device)
    if flags.worker.startswith("trl"):
        turns = iter([{}])
        trl(flags, lambda: answer(next(turns, None)), flags.worker == "trl-lora")
        answer()
    else:
        name, _, m = flags.worker.partition(":")
        run = loop(flags, name == "loop-lora") if name.startswith("loop") else ours(flags, int(m), name == "kept")
        for report in run:
            answer(report)


# ---------------------------------------------------------------------------------------------------------------------

def main(flags):
    """Starts the contestants, lets them take turns, and prints the table."""
    if flags.worker:
        return work(flags)
    device, _ = pick_device(flags.device)
    config = replace(MODELS[flags.model], eos_id=None)
    dtype = DTYPES[flags.dtype]
    ceiling = matmul_ceiling(device, dtype)
    with tempfile.TemporaryDirectory() as directory:
        with torch.device(device):
            model = Transformer(config).to(dtype)
        model.init_weights(torch.Generator(device).manual_seed(0)).save_pretrained(directory)
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
        names = [f"{x}:{m}" for m in flags.m for x in ("ours", "kept")] + [x for x in flags.peers if x != "none"]
        table = race(names, flags, directory)
    print(f"\n{flags.model}, {flags.dtype}{'' if flags.quantize == 'none' else ' ' + flags.quantize}, {flags.pairs} "
          f"pairs of {flags.length} tokens, {device.type}, {torch.get_num_threads()} threads; measured ceiling of "
          f"matrix products {ceiling / 1e12:.2f} TFLOP/s")
    tokens, first = 2 * flags.pairs * flags.length, table[names[0]]["seconds"]
    print(f"{'':12} {'s/step [min..max]':>24} {'tokens/s':>9} {'MFU':>6} {'peak MB':>8}   time / ours")
    for name, result in table.items():
        s = result["seconds"]
        mfu = f"{result['flops'] / statistics.median(s) / ceiling:6.1%}" if "flops" in result else " " * 6
        print(f"{name:12} {statistics.median(s):8.3f} [{min(s):6.3f}..{max(s):6.3f}] "
              f"{tokens / statistics.median(s):9.0f} {mfu} {result['peak'] / 2 ** 20:8.0f}   {ratio(s, first):.2f}")


def race(names, flags, directory):
    """{contestant: {"seconds": […], "peak": bytes, …}}. Values are compared before any step is timed."""
    arguments = [str(x) for key in ("model", "dtype", "device", "pairs", "length", "steps", "quantize")
                 for x in (f"--{key}", getattr(flags, key))] + ["--directory", directory]
    arguments += [f"--{key}" for key in ("checkpoint", "compile") if getattr(flags, key)]
    workers, table = {}, {}
    for name in names:                                        # one after the other: loading does not disturb a turn
        workers[name], table[name] = enter(__file__, name, *arguments)
    checked = {name: torch.tensor(result["reference"]) for name, result in table.items() if "reference" in result}
    expected = checked[names[0]]
    tolerance = 0.02 if flags.dtype == "bf16" or flags.quantize != "none" else 1e-4
    for name, values in checked.items():
        error = ((values - expected).norm() / expected.norm()).item()
        print(f"log π_ref of {len(values)} responses, {name}: relative difference from {names[0]} {error:.1e}")
        assert error <= tolerance, f"{name} computes something else"
    return {name: table[name] | {"seconds": [r["seconds"] for r in reports], "peak": reports[-1]["peak"]}
            for name, reports in take_turns(workers, flags.steps).items()}


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
