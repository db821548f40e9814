"""test_base.py - the base model that ships with the code: small, and it knows the world."""
import json
import shutil
from pathlib import Path

import pytest
import torch

from data import toy
from data.base import SHIPPED, find_base, is_world_base, load_base, world_fingerprint
from data.tokenizers import load_tokenizer
from fronts.measure import world_batches, world_logprobs
from model import Transformer
from runs.files import UserError

pytestmark = pytest.mark.skipif(not SHIPPED.exists(), reason="data/base is not there: train_base.py makes it")


def test_it_is_a_base_of_this_world(monkeypatch, tmp_path):
    """A score, a text, a prompt or a split that is another one makes another world, whose base is refused by a line.
    Wrong: to ask for base.json alone."""
    assert is_world_base(SHIPPED) and json.loads((SHIPPED / "base.json").read_text())["world"] == world_fingerprint()
    seen, scores, responses, prompts = {world_fingerprint()}, toy.scores, toy.responses, toy.prompts
    swapped = {"seen": "validation", "validation": "seen"}
    for name, other in (("scores", lambda x, texts: scores(x, texts) + 1e-3),
                        ("responses", lambda x: responses(x)[::-1]), ("prompts", lambda split: prompts(split)[1:]),
                        ("prompts", lambda split: prompts(swapped.get(split, split)))):
        with monkeypatch.context() as patch:
            patch.setattr(toy, name, other)
            world_fingerprint.cache_clear()
            seen.add(world_fingerprint())
            for use in (is_world_base, lambda base: find_base(base, None, None, torch.device("cpu")),
                        lambda base: load_base(base, "toy", torch.device("cpu"), torch.float32, None)):
                with pytest.raises(UserError, match="made for another world than data/toy.py is now .*: make it again"):
                    use(str(SHIPPED))
        world_fingerprint.cache_clear()
    assert len(seen) == 5
    shutil.copytree(SHIPPED, tmp_path / "base")                        # an older one, which does not say its world
    report = json.loads((tmp_path / "base/base.json").read_text())
    (tmp_path / "base/base.json").write_text(json.dumps({k: v for k, v in report.items() if k != "world"}))
    with pytest.raises(UserError, match=r"another world than data/toy.py is now \(None, not"):
        is_world_base(tmp_path / "base")
    (tmp_path / "base/base.json").unlink()
    assert not is_world_base(tmp_path / "base") and not is_world_base(tmp_path)
    assert find_base(Path("x"), None, None, torch.device("cpu"))[0] == str(Path("x").resolve())


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
