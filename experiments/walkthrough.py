"""walkthrough.py - one training step of Panacea with DPO, from a preference row to the updated s, with its numbers.

    python -m experiments.walkthrough           # fills the numbers of docs/walkthrough.md in

It calls what train_dpo.py's loop calls, in the same order, on two rows and a base model with random weights (so that
it needs nothing that was trained). The page's words are written by hand; its blocks of numbers are made here.
"""
import re
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch

from aggregate import linear_scalarization
from data import toy
from data.batches import Batches
from data.reference import reference_logprobs
from data.tokenizers import load_tokenizer, tokenize
from data.trees import batch_logprobs, predicting_states
from model import SIZES, Transformer
from objectives import dpo_loss, losses_on_pairs
from runs.files import ROOT, write_text
from runs.flags import flag, run_main
from runs.loop import adamw, add_adapter
from runs.randomness import generator_for
from svd_lora import set_preference, svd_lora_layers

FLAGS = SimpleNamespace(lora_dim=8, lora_scaling=512.0, lr=2e-3, values_lr=None, weight_decay=0.05, batch_size=2,
                        seed=0, aggregate="ls", beta=1.0)
LAYER = "blocks.0.attn.q"


@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    page: str = flag("docs/walkthrough.md", "the page whose numbers are filled in")


def values(x):
    """A tensor as text: its shape, and its numbers: all where they are few, else the first of each row."""
    number = lambda v: f"{v + 0.0:.4g}"                                # + 0.0: no −0
    some = lambda row: "[" + ", ".join(map(number, row[:4])) + ", …" * (len(row) > 4) + "]"
    x = x.detach().double()
    if x.ndim < 2:
        return f"{tuple(x.shape)}  [{', '.join(map(number, x.reshape(-1).tolist()))}]"
    rows = x.flatten(0, -2).tolist()
    return f"{tuple(x.shape)}  [{', '.join(map(some, rows[:4]))}{', …' * (len(rows) > 4)}]"


def steps():
    """One step of Algorithm 1. Yields the blocks of the page in order, a dict each: name -> a tensor or a text."""
    tokenizer = load_tokenizer("toy")
    config = replace(SIZES["tiny"], vocab_size=tokenizer.vocab_size, bos_id=None, eos_id=tokenizer.eos_id)
    model = Transformer(config).init_weights(generator_for(0, "init"))
    dims = ["helpful", "harmless"]
    texts = toy.sample_pairs("train", dims, 2, 2, generator_for(1, "pairs"))
    rows, _ = tokenize(texts, tokenizer, config.context_length)
    yield {"prompt": repr(texts[0].prompt), "response 0": repr(texts[0].responses[0]),
           "response 1": repr(texts[0].responses[1]), "pairs": texts[0].pairs, "better": texts[0].better}
    ids = lambda x: f"{len(x)} ids  {x}"
    yield {"prompt": ids(rows[0].prompt), "response 0": ids(rows[0].responses[0]),
           "response 1": ids(rows[0].responses[1]), "EOS": tokenizer.eos_id}

    add_adapter(model, FLAGS, len(dims))
    layer = svd_lora_layers(model)[LAYER]
    yield {"W0": layer.weight, "U": layer.U, "V": layer.V, "sigma": layer.sigma, "s": layer.s}
    reference, _ = reference_logprobs(model, rows, FLAGS.batch_size, 1, torch.device("cpu"))
    yield {"row 0": reference[0], "row 1": reference[1]}

    known = [(torch.tensor(row.better) >= 0).float() for row in rows]
    batch = Batches(rows, known, FLAGS, 2, torch.device("cpu")).take(0)
    tree = batch.tree
    yield {"rows": batch.rows, "group": batch.group, "tokens": tree.tokens, "mask": tuple(tree.mask.shape),
           "targets": tree.targets[:8], "paths": tree.paths, "pairs": tree.pairs, "better": tree.better,
           "counts": batch.counts}

    lam = torch.tensor([[0.3, 0.7], [1.0, 0.0]])
    set_preference(model, lam[batch.group])
    d = lambda: layer.singular_values(layer.lam)[:, 0]                                # (B, r)
    yield {"lam": lam, "layer.lam": layer.lam, "d": d()}

    pi, ref = batch_logprobs(model, tree), torch.cat([reference[j] for j in batch.rows])
    yield {"hidden": predicting_states(model, tree), "pi": pi, "ref": ref}
    losses, *_ = losses_on_pairs(dpo_loss, pi, ref, tree.pairs, tree.better, FLAGS.beta)
    L = batch.mean(losses)
    yield {"losses": losses, "L": L}
    scalarised = linear_scalarization(L, lam)
    yield {"scalarised": scalarised, "objective": scalarised.mean()}

    scalarised.mean().backward()
    yield {"grad of s": layer.s.grad, "grad of σ": layer.sigma.grad, "grad of U": layer.U.grad}
    adamw(model, FLAGS).step()
    yield {"s": layer.s, "sigma": layer.sigma}
    pi = batch_logprobs(model, tree)
    losses, correct, _ = losses_on_pairs(dpo_loss, pi, ref, tree.pairs, tree.better, FLAGS.beta)
    L = batch.mean(losses)
    yield {"d": d(), "last m of d": d()[:, -2:], "pi": pi, "L": L, "correct": correct,
           "objective": linear_scalarization(L, lam).mean()}


def filled(page):
    """The page with its blocks of numbers made anew."""
    blocks = iter(steps())
    line = lambda name, x: f"{name:11} {values(x) if isinstance(x, torch.Tensor) else x}"
    block = lambda _: "```\n" + "\n".join(line(*item) for item in next(blocks).items()) + "\n```"
    return re.sub(r"```\n.*?\n```", block, page, flags=re.S)


def main(flags):
    """Fills the page in."""
    page = filled((ROOT / flags.page).read_text(encoding="utf-8"))
    write_text(ROOT / flags.page, page)
    print(f"{flags.page}: {len(page.splitlines())} lines")


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
