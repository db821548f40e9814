"""test_throughput.py - batches of one length, FLOPs by hand, memory, and what every training run says of its speed."""
import json
import subprocess
import sys

import pytest
import torch

import common
import train_dpo
import train_ppo
import train_reward
import train_base
from runs.randomness import epoch_batch
from runs.speed import matmul_ceiling, model_flops, peak_memory
from data.tokenizers import TokenRow
from data.trees import pack
from model import Config
from test_scripts import ROOT, own_rows
from train_dpo import row_lengths

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------------------
# Batches of rows of about one length.

@pytest.mark.parametrize("n, size", [(103, 8), (64, 8), (1000, 4), (3, 8), (9, 8)])
def test_every_row_comes_once_an_epoch(n, size):
    lengths = torch.randint(1, 500, (n,), generator=torch.Generator().manual_seed(0))
    batches = [epoch_batch(n, size, 0, step, lengths) for step in range(5 * n // size)]
    seen = torch.cat(batches).tolist()
    for epoch in range(len(seen) // n):
        assert sorted(seen[epoch * n:(epoch + 1) * n]) == list(range(n))
    # a function of seed and step alone, whatever was asked before
    common._epoch_order.cache_clear()
    assert all(torch.equal(epoch_batch(n, size, 0, step, lengths), batches[step]) for step in (len(batches) - 1, 0))
    assert n < 20 or not torch.equal(epoch_batch(n, size, 1, 0, lengths), batches[0])
    assert n < 20 or not torch.equal(batches[0], batches[n // size])                  # another epoch, another order


def test_batches_are_of_one_length_and_in_no_order():
    lengths = torch.randint(10, 500, (800,), generator=torch.Generator().manual_seed(1))
    spread = lambda lengths_used: torch.tensor([
        (lengths[b].max() - lengths[b].min()).item() for b in
        (epoch_batch(800, 8, 0, step, lengths_used) for step in range(100))]).float()
    assert spread(lengths).mean() < 20 < 300 < spread(None).mean()
    first = torch.tensor([lengths[epoch_batch(800, 8, 0, step, lengths)].float().mean() for step in range(64)])
    assert abs(torch.corrcoef(torch.stack([first, torch.arange(64.0)]))[0, 1]) < 0.4  # wrong: the short ones first


def test_row_lengths_bound_the_trees():
    rows = [TokenRow([1, 2, 3], [[4, 5, 6], [4, 7]]), TokenRow([1], [[2]])]
    assert row_lengths(rows).tolist() == [8, 2] and pack(rows).nodes.tolist() == [5, 1]


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs, the ceiling, memory.

def test_model_flops_by_hand():
    gpt2 = Config(11, 16, n_layer=2, n_head=2, d_model=6)
    block = 4 * 6 * 6 + 2 * 6 * 24                            # q, k, v, o; up, down
    assert model_flops(gpt2, 100, 30, base=2) == 2 * (2 * block * 100 + 11 * 6 * 30)
    assert model_flops(gpt2, 100, 30, base=6) == 3 * model_flops(gpt2, 100, 30, base=2)
    # an adapter of 70 parameters over a frozen base: 4 for the base, 6 for what trains, 2 each where nothing does
    assert model_flops(gpt2, 100, 30, 70) == 4 * (2 * block * 100 + 11 * 6 * 30) + 6 * 70 * 100
    assert model_flops(gpt2, 100, 30, 70, base=2) == 2 * (2 * block * 100 + 11 * 6 * 30) + 2 * 70 * 100
    llama = Config(11, 16, n_layer=1, n_head=3, d_model=6, n_kv_head=1, head_dim=4, d_ff=10, norm="rmsnorm",
                   positions="rotary", activation="swiglu", qkv_bias=False, out_bias=False, tied=False)
    assert model_flops(llama, 1, 0, base=2) == 2 * (6 * 12 + 2 * 6 * 4 + 12 * 6 + 3 * 6 * 10)
    # its matrices are those of the real thing
    from model import Transformer
    matrices = [p.numel() for p in Transformer(llama).blocks.parameters() if p.ndim == 2]
    assert model_flops(llama, 1, 0, base=2) == 2 * sum(matrices)


def test_ceiling_is_what_products_reach():
    ceiling = matmul_ceiling(CPU, torch.float32)
    assert 1e9 < ceiling < 1e14 and matmul_ceiling(CPU, torch.float32) == ceiling     # measured once
    state = torch.get_rng_state()
    matmul_ceiling.__wrapped__(CPU, torch.bfloat16, seconds=0.0)
    assert torch.equal(torch.get_rng_state(), state)          # a measurement draws from no generator of the run's


def test_peak_memory_grows_and_stays():
    """In a process of its own: this one may have held more before."""
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
            "import torch, common\n"
            "cpu = torch.device('cpu')\n"
            "a = common.peak_memory(cpu); x = torch.ones(50_000_000); b = common.peak_memory(cpu)\n"
            "del x; c = common.peak_memory(cpu); print(a, b, c)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, held, after = map(int, done.stdout.split())
    assert before > 50e6 and 190e6 < held - before < 300e6 and after > 0.99 * held


# ---------------------------------------------------------------------------------------------------------------------
# What a run reports.

@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A directory with a base model that has seen a few steps."""
    cwd = tmp_path_factory.mktemp("throughput")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        train_base.main(train_base.Flags(device="cpu", steps=4, batch_size=4))
    return cwd


RUNS = {
    "sft": lambda: train_base.main(train_base.Flags(device="cpu", steps=3, batch_size=4, out="out/sft")),
    "dpo": lambda: train_dpo.main(train_dpo.Flags(device="cpu", steps=4, rows=16, responses=4, eval=False, method="rs",
                                                  out="out/dpo")),
    "reward": lambda: train_reward.main(train_reward.Flags(device="cpu", steps=3, rows=16, responses=4, eval=False,
                                                           n_reference=8, max_new_tokens=4, out="out/reward")),
    "ppo": lambda: train_ppo.main(train_ppo.Flags(device="cpu", steps=2, batch_size=8, samples=4, max_new_tokens=8,
                                                  eval=False, out="out/ppo")),
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_reports_its_speed(work, monkeypatch, capsys, kind):
    monkeypatch.chdir(work)
    run = RUNS[kind]()
    timing = json.loads((run / "timing.json").read_text())
    assert set(timing) == {"train_seconds", "tokens", "tokens_per_second", "tokens_per_second_median", "peak_memory",
                           "flops", "mfu", "matmul_flops_per_second", "dtype", "processes"}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert timing["tokens"] == sum(r["tokens"] for r in records) > 0
    assert timing["flops"] == sum(r["flops"] for r in records)
    assert abs(timing["tokens_per_second"] / (timing["tokens"] / timing["train_seconds"]) - 1) < 1e-9
    assert 0 < timing["mfu"] < 1.5 and timing["peak_memory"] > 50e6
    assert timing["dtype"] == "float32" and timing["processes"] == 1
    last = capsys.readouterr().out
    assert "model FLOPs utilisation" in last and "tokens/s (median step" in last and "peak memory" in last


def test_a_step_counts_its_own_tokens(work, monkeypatch):
    """tokens and FLOPs of a step of DPO, from its rows packed again."""
    from data import toy
    from data.tokenizers import load_tokenizer, tokenize
    monkeypatch.chdir(work)
    run = train_dpo.main(train_dpo.Flags(device="cpu", steps=2, rows=16, responses=4, eval=False, accumulate=2,
                                         out="out/counted"))
    rows = toy.sample_pairs("train", ["helpful", "harmless"], 16, 4, common.generator_for(0, "pairs"))
    rows = tokenize(rows, load_tokenizer("toy"), 256)[0]
    adapter = 4 * 10 * (4 * (128 + 128) + 2 * (128 + 512))    # U and V of rank 8 + 2, in four blocks
    for step, record in enumerate(json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()):
        batch = pack([rows[j] for j in epoch_batch(16, 8, 0, step).tolist()])
        assert record["tokens"] == int(batch.nodes.sum()) < batch.tokens.numel()      # wrong: padding among them
        blocks = 4 * 12 * 128 ** 2
        assert record["flops"] == (4 * (blocks * record["tokens"] + 835 * 128 * len(batch.targets))
                                   + 6 * adapter * record["tokens"])


def test_files_are_read_in_batches_of_one_length(work, monkeypatch):
    """With --data the same rows come, in other company; the run still repeats."""
    monkeypatch.chdir(work)
    own_rows(work / "train.jsonl", 20)
    flags = dict(device="cpu", init="out/base-tiny-seed0", data=["train.jsonl"], batch_size=4, lams_per_step=2,
                 epochs=2, eval=False)
    seen = []
    real = train_dpo.epoch_batch
    monkeypatch.setattr(train_dpo, "epoch_batch", lambda *args: seen.append(args[-1]) or real(*args))
    runs = [train_dpo.main(train_dpo.Flags(**flags, out=f"out/files{i}")) for i in range(2)]
    assert all(lengths is not None and len(lengths) == 20 for lengths in seen)
    assert (runs[0] / "adapter.safetensors").read_bytes() == (runs[1] / "adapter.safetensors").read_bytes()


@pytest.mark.parametrize("flags", [dict(checkpoint=True), dict(precision="bf16"), dict(quantize="int8")])
def test_options_that_save_memory(work, monkeypatch, flags):
    """--checkpoint changes nothing; another precision of the base changes the losses a little, and only that."""
    monkeypatch.chdir(work)
    small = dict(device="cpu", steps=3, rows=16, responses=4, eval=False)
    plain = train_dpo.main(train_dpo.Flags(**small, out="out/plain"))
    other = train_dpo.main(train_dpo.Flags(**small, **flags, out="out/other"))
    a, b = ([json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
            for run in (plain, other))
    limit = 1e-6 if "checkpoint" in flags else 2e-2
    assert all(abs(x - y) < limit for x, y in zip(a, b)) and ("checkpoint" in flags or a != b)
    assert json.loads((other / "timing.json").read_text())["dtype"] == ("bfloat16" if "precision" in flags
                                                                        else "float32")
