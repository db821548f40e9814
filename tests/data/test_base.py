"""test_base.py - the base model that ships with the code: small, and it knows the world."""
import json

import pytest
import torch

from data import toy
from data.base import SHIPPED, is_world_base
from data.tokenizers import load_tokenizer
from fronts.measure import world_batches, world_logprobs
from model import Transformer

pytestmark = pytest.mark.skipif(not is_world_base(SHIPPED), reason="data/base is not there: train_base.py makes it")


def test_it_is_small_and_says_where_it_comes_from():
    assert sum(f.stat().st_size for f in SHIPPED.iterdir()) <= 4_000_000
    report = json.loads((SHIPPED / "base.json").read_text())
    assert report["tokenizer"] == "toy" and report["flags"]["size"] == "tiny" and "seed" in report["flags"]
    assert set(report["splits"]) == set(toy.SPLITS)


@pytest.mark.parametrize("split", toy.SPLITS[1:])
def test_it_knows_every_prompt_of_every_split(split):
    """Mass on the listed responses, of the worst prompt, and how far it is from what it was trained on. Wrong: a base
    that has not seen the new verbs, or was trained too short."""
    prompts = toy.prompts(split)
    logps = world_logprobs(Transformer.from_pretrained(SHIPPED), world_batches(prompts, load_tokenizer("toy"), "cpu"))
    assert logps.exp().sum(1).min() >= 0.999
    target = torch.stack([toy.base_probs(x) for x in prompts])
    kl = (target * (target.log() - logps)).sum(1).mean().item()
    stored = json.loads((SHIPPED / "base.json").read_text())["splits"][split]
    assert stored["kl_data_to_base"] == pytest.approx(kl, rel=0.01, abs=1e-5)
    assert stored["outside_mass_worst"] == pytest.approx(1 - logps.exp().sum(1).min().item(), rel=0.01, abs=1e-5)
