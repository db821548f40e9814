"""experiment.py - when do blocks and trees pay? Your functions beside the usual way, small and large.

    python -m course.set6.experiment --out out/speed                  # half a CPU minute
    python -m course.set6.experiment --out out/quick --most 2000 --responses 4

Log-probabilities: N places, vocabularies of 1,000 words and more, forward and backward. Trees: the log-probabilities of
1, 2, 4, … responses to one prompt of the embedded world under its base model, forward and backward, as one tree and in
rows of their own. Of each: CPU seconds (the best of three), MB of the tensors alive at the worst moment, GFLOP, that is
10⁹ floating point operations, in products of matrices and in attention (all T · T pairs, whatever the mask). Writes
speed.png and speed.json to --out.
"""
import argparse
import importlib
import json
import time
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from course.gpt import load_base
from course.set6.grade import Meter
from course.world import TOKENIZER
from data import toy

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def attention(q, k, *rest, **others):
    """Operations of attention from the shapes (B, heads, T, width): q kᵀ, and the sum of the values."""
    B, heads, T, width = q
    return 4 * B * heads * T * k[2] * width


UNCOUNTED = {   # by torch, on a CPU; its backward makes q kᵀ once more
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
    lambda g, q, k, *rest, **others: 5 * attention(q, k) // 2}


def measured(step):
    """{"seconds", "mb", "gflop"} of step(). It is called five times."""
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        step()
    with Meter() as meter:
        step()
    seconds = []
    for _ in range(3):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    return {"seconds": min(seconds), "mb": 4 * meter.peak / 2 ** 20, "gflop": counter.get_total_flops() / 1e9}


def logprobs(adapters, args, generator):
    """{"words": […], "the usual way": […], "blocks of n": […]}"""
    out, V = {"words": []}, 1000
    while V <= args.most:
        hidden, weight = (torch.randn(n, args.width, generator=generator).div(args.width ** 0.25).requires_grad_(True)
                          for n in (args.places, V))
        target = torch.randint(V, (args.places,), generator=generator)
        usual = lambda: -F.cross_entropy(hidden @ weight.T, target, reduction="none")
        ways = {"the usual way": usual} | {f"blocks of {block}": lambda block=block: adapters.linear_logprob(
            hidden, weight, target, block) for block in args.blocks}
        out["words"].append(V)
        for name, way in ways.items():
            def step():
                hidden.grad = weight.grad = None
                way().sum().backward()
            assert (way() - usual()).abs().max() < 1e-3, f"{name}: other log-probabilities than the usual way's"
            out.setdefault(name, []).append(measured(step))
            print(f"{V:6d} words, {name:16s} " + shown(out[name][-1]), flush=True)
        V *= 2
    return out


def trees(adapters, args, generator):
    """{"responses": […], "rows": […], "tree": […]}; each with its number of tokens"""
    x, out, R, model = toy.prompts("train")[0], {"responses": []}, 1, load_base()
    listed = toy.responses(x)
    order = range(len(listed)) if args.order == "listed" else torch.randperm(len(listed), generator=generator).tolist()
    prompt = TOKENIZER.encode((x + " ") * (args.prompt_times - 1) + x + "\n")
    answers = [TOKENIZER.encode(listed[i]) + [TOKENIZER.eos_id] for i in order]
    while R <= min(args.responses, len(answers)):
        responses = answers[:R]
        longest = max(map(len, responses))
        rows = torch.tensor([prompt + y + [0] * (longest - len(y)) for y in responses])               # (R, T)
        mask = torch.tensor([[i < len(y) for i in range(longest)] for y in responses])                # (R, longest)

        def in_rows():
            logits = model(rows)[:, len(prompt) - 1:-1]                                               # (R, longest, V)
            each = -F.cross_entropy(logits.flatten(0, 1), rows[:, len(prompt):].flatten(), reduction="none")
            return (each.view_as(mask) * mask).sum(1)

        def as_tree():
            tokens, parents, paths = adapters.pack_tree(prompt, responses)
            states = model.states(tokens[None], *adapters.tree_attention(parents))[0]                 # (T, D)
            return adapters.tree_logprobs(states, model.embed.weight, tokens, parents, paths)

        assert (in_rows() - as_tree()).abs().max() < 1e-2, "the tree gives other log-probabilities than rows"
        out["responses"].append(R)
        for name, way, tokens in (("rows", in_rows, sum(len(prompt) + len(y) for y in responses)),
                                  ("tree", as_tree, len(adapters.pack_tree(prompt, responses)[0]))):
            def step():
                model.zero_grad()
                way().sum().backward()
            out.setdefault(name, []).append({"tokens": tokens} | measured(step))
            print(f"{R:4d} responses, {name:4s} {tokens:6d} tokens  " + shown(out[name][-1]), flush=True)
        R *= 2
    return out


def shown(result):
    return f"{result['seconds']:8.3f} s {result['mb']:9.1f} MB {result['gflop']:8.2f} GFLOP"


def draw(axes, x, ways, key, label):
    for name, results in ways.items():
        axes.plot(x, [r[key] for r in results], "o-", label=name)
    axes.set(xscale="log", yscale="log", ylabel=label)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/set6", help="folder of the picture")
    parser.add_argument("--only", choices=["logprobs", "trees"], help="one half alone")
    parser.add_argument("--places", type=int, default=512, help="N")
    parser.add_argument("--width", type=int, default=128, help="D, of the log-probabilities' states")
    parser.add_argument("--most", type=int, default=32000, help="words of the largest vocabulary")
    parser.add_argument("--blocks", type=int, nargs="+", default=[128, 1024, 8192])
    parser.add_argument("--responses", type=int, default=128, help="of the largest tree")
    parser.add_argument("--order", choices=["random", "listed"], default="random", help="of the responses")
    parser.add_argument("--prompt_times", type=int, default=1, help="how often the prompt is said")
    parser.add_argument("--adapters", default="course.adapters")
    args = parser.parse_args()
    adapters, out = importlib.import_module(args.adapters), Path(args.out)
    halves = {"logprobs": (logprobs, "words", "words of the vocabulary"),
              "trees": (trees, "responses", "responses to the prompt")}
    halves = {name: half for name, half in halves.items() if args.only in (None, name)}
    found = {name: measure(adapters, args, torch.Generator().manual_seed(0)) for name, (measure, *_) in halves.items()}
    out.mkdir(parents=True, exist_ok=True)
    (out / "speed.json").write_text(json.dumps({"settings": vars(args)} | found, indent=1))

    figure, axes = plt.subplots(len(halves), 2, figsize=(10, 4 * len(halves)), layout="constrained", squeeze=False)
    for (left, right), (name, (_, x, label)) in zip(axes, halves.items()):
        ways = {way: results for way, results in found[name].items() if way != x}
        draw(left, found[name][x], ways, "mb", "MB at the worst moment")
        draw(right, found[name][x], ways, "seconds", "CPU seconds, forward and backward")
        left.set(xlabel=label)
        right.set(xlabel=label)
        left.legend()
    figure.savefig(out / "speed.png", dpi=120)
    print(f"{out}/speed.png")


if __name__ == "__main__":
    main()
