"""bench_export.py - what export.py writes, as transformers and PEFT load it, beside the model that was exported.

    python bench/bench_export.py                                   # the table of docs/models.md

A tiny base of random weights of every family, with a random adapter of rank 4 + 2 and with two of rank 3 (rewarded
soups), is exported whole and as a PEFT adapter at λ = (0.3, 0.7) and at both vertices. Differences are the largest of
the three of a logit in fp32, divided by the largest logit; `adapter`: how far the adapter moves the base's, by the same
measure.
The peers: pip install transformers==5.23.0 peft==0.21.2
"""
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.bench_families import difference, tokens_of, transformers_model, write_directory
from export import write_merged
from fronts.tables import shown, table
from model import Transformer
from runs.files import bar
from runs.flags import run_main
from svd_lora import adapters_off, export_peft, inject_svd_lora, set_preference, shared_base, soup, svd_lora_layers

FAMILIES = ("GPT-2", "GPT-2, exact GELU, untied", "Llama", "Llama, tied", "Mistral", "Qwen2", "Qwen3", "Gemma 3")
LAMS = torch.tensor([[0.3, 0.7], [1.0, 0.0], [0.0, 1.0]])


@dataclass
class Flags:
    """The script has none."""


def adapted(base, k, m, seed):
    """A model on the weights of `base`, with an adapter of random singular values."""
    generator = torch.Generator().manual_seed(seed)
    model = inject_svd_lora(shared_base(base), k, m, generator=generator)
    for layer in svd_lora_layers(model).values():
        torch.nn.init.normal_(layer.sigma, 0, 0.5, generator)
        torch.nn.init.normal_(layer.s, 0, 1.0, generator)
    return model


def peft_model(path):
    """PEFT's model of an exported adapter, with the base that it names, in fp32."""
    from peft import AutoPeftModelForCausalLM
    return AutoPeftModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def compare(family, lam):
    """(the adapter's own share, the difference of the merged model, of PEFT's, and of a soup's by PEFT)."""
    with tempfile.TemporaryDirectory() as folder:
        base, merged, peft, mixed = (Path(folder) / name for name in ("base", "merged", "peft", "soup"))
        write_directory(base, family)
        plain = Transformer.from_pretrained(base, torch.float32)
        model, tokens = adapted(plain, 4, 2, 1), tokens_of(plain.config)
        set_preference(model, lam)
        both = soup(shared_base(plain), [adapted(plain, 3, 0, seed) for seed in (2, 3)], lam.tolist())
        write_merged(model, lam, base, torch.float32, merged)
        export_peft(model, lam, peft, base)
        export_peft(both, None, mixed, base)
        ours = model(tokens)
        with adapters_off(model):
            moved = difference(model(tokens), ours)
        return (moved, difference(transformers_model(merged)(tokens).logits, ours),
                difference(peft_model(peft)(tokens).logits, ours),
                difference(peft_model(mixed)(tokens).logits, both(tokens)))


def main(flags):
    """Prints the table."""
    results = [[compare(family, lam) for lam in LAMS] for family in bar(FAMILIES, "families")]
    columns = {"family": list(FAMILIES)}
    for i, (name, most) in enumerate((("adapter", min), ("merged", max), ("peft", max), ("peft, soup", max))):
        columns[name] = shown([most(row[i] for row in rows) for rows in results], ".1e")
    print(table(columns))


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
