"""conftest.py - what several test files need: the repository on the path, tiny random models, the stored oracles, and
one trained run of each kind, in one directory, made when the first test asks for it (tests/running.py).

A test that changes a shared run copies it first.
"""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")       # tiny models: a second thread waits more than it works

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from small import SHAPES

from model import Config, Transformer

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture
def tiny():
    """tiny(family, seed, dtype): a two-layer Transformer; every weight is random, norms and biases too."""
    def build(family="gpt2", seed=0, dtype=torch.float32):
        model = Transformer(Config(61, 32, n_layer=2, n_head=4, d_model=32, **SHAPES[family]))
        generator = torch.Generator().manual_seed(seed)
        for name, p in model.named_parameters():
            scale = "norm" in name and name.endswith("weight") and model.config.norm != "rmsnorm1"
            torch.nn.init.normal_(p, float(scale), 0.2, generator=generator)
        return model.to(dtype)
    return build


@pytest.fixture
def oracle():
    """oracle(name): the arrays of shared/oracles/data/name.npz as tensors; skips the test where they are not there."""
    def load(name):
        path = SHARED / "oracles" / "data" / f"{name}.npz"
        if not path.exists():
            pytest.skip(f"{path.name} is not beside the repository")
        return {key: torch.as_tensor(value) for key, value in np.load(path).items() if value.dtype.kind in "fi"}
    return load


@pytest.fixture
def close():
    """close(a, b, tolerance): equal shapes, and no entry further apart than tolerance times the largest one."""
    def compare(a, b, tolerance=1e-6):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max())
    return compare


# ---------------------------------------------------------------------------------------------------------------------
# Trained runs. `import running` stands in the fixtures: tests of pure functions need not wait for the scripts.

@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A working directory with a base model of the small world, in out/base-tiny-seed0."""
    import running
    cwd = tmp_path_factory.mktemp("work")
    with running.inside(cwd):
        running.make_base()
    return cwd


@pytest.fixture
def in_small_world(work, monkeypatch):
    """The test runs in `work`, and its world is the small one."""
    import running
    monkeypatch.chdir(work)
    with running.small_world():
        yield work


@pytest.fixture(scope="session")
def panacea(work):
    """A DPO run of four steps."""
    import running
    with running.inside(work):
        return running.go("train_dpo", "panacea")


@pytest.fixture(scope="session")
def soups(work):
    """Rewarded soups by DPO: two models of two steps."""
    import running
    with running.inside(work):
        return running.go("train_dpo", "soups", method="rs")


@pytest.fixture(scope="session")
def sft_run(work):
    """An SFT run of four steps, evaluated at three preferences."""
    import running

    import eval_front
    with running.inside(work):
        run = running.go("train_sft", "sft")
        eval_front.main(eval_front.Flags(runs=["out/sft"], parts=2, device="cpu"))
        return run


@pytest.fixture(scope="session")
def ppo_run(work):
    """(an RLHF run of four steps, what was sampled in each: prompts and responses, every preference that was set)"""
    import running

    import train_ppo
    sampled, preferences = [], []
    with running.inside(work), pytest.MonkeyPatch.context() as patch:
        generate, use = train_ppo.generate_all, train_ppo.set_preference
        patch.setattr(train_ppo, "generate_all",
                      lambda *a, **k: sampled.append((a[1], generate(*a, **k))) or sampled[-1][1])
        patch.setattr(train_ppo, "set_preference", lambda model, lam: preferences.append(lam) or use(model, lam))
        return running.go("train_ppo", "ppo", steps=4, lr=8e-3, critic_iters=1), sampled, preferences


@pytest.fixture(scope="session")
def hqd_run(work):
    """(a ParetoHqD run of both stages, three preferences, four and three steps each; the rows of every batch)"""
    import running

    import train_hqd
    batches = []
    with running.inside(work), pytest.MonkeyPatch.context() as patch:
        pack = train_hqd.pack
        patch.setattr(train_hqd, "pack", lambda rows, *a: batches.append(rows) or pack(rows, *a))
        return running.go("train_hqd", "hqd"), batches


@pytest.fixture(scope="session")
def reward_run(work):
    """A reward model of two dimensions, 20 steps."""
    import running
    with running.inside(work):
        return running.go("train_reward", "reward")
