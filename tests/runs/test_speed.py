"""test_speed.py - FLOPs by hand, the ceiling, memory, and what every run says of its speed."""
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from running import BASE

from model import Config, Transformer
from runs.speed import matmul_ceiling, model_flops, peak_memory, report_speed

CPU = torch.device("cpu")


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
    matrices = [p.numel() for p in Transformer(llama).blocks.parameters() if p.ndim == 2]
    assert model_flops(llama, 1, 0, base=2) == 2 * sum(matrices)


def test_ceiling_is_what_products_reach():
    ceiling = matmul_ceiling(CPU, torch.float32)
    assert 1e9 < ceiling < 1e14 and matmul_ceiling(CPU, torch.float32) == ceiling     # measured once
    state = torch.get_rng_state()
    matmul_ceiling.__wrapped__(CPU, torch.bfloat16, seconds=0.0)
    assert torch.equal(torch.get_rng_state(), state)          # a measurement draws from no generator of the run's


def test_peak_memory_grows_and_stays():
    """This process may have held more before than it does now: as much again, and 200 MB more."""
    pages = Path("/proc/self/statm")
    if not pages.exists():
        pytest.skip("what a process holds now is read from Linux's /proc")
    before, now = peak_memory(CPU), int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert 50e6 < now < 1.05 * before
    x = torch.ones((before - now) // 4 + 50_000_000)
    held = peak_memory(CPU)
    del x
    assert 150e6 < held - before < 300e6 and peak_memory(CPU) > 0.99 * held


def test_every_run_reports_its_speed(work, panacea, soups, sft_run, ppo_run, hqd_run, reward_run, tmp_path, capsys):
    for run in (work / BASE, panacea, soups, sft_run, ppo_run[0], hqd_run[0], reward_run):
        timing = json.loads((run / "timing.json").read_text())
        assert set(timing) == {"train_seconds", "tokens", "tokens_per_second", "tokens_per_second_median", "flops",
                               "peak_memory", "mfu", "matmul_flops_per_second", "dtype", "processes"}
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert timing["tokens"] == sum(r["tokens"] for r in records) > 0
        assert timing["flops"] == sum(r["flops"] for r in records) > 0
        assert abs(timing["tokens_per_second"] / (timing["tokens"] / timing["train_seconds"]) - 1) < 1e-9
        assert 0 < timing["mfu"] < 1.5 and timing["peak_memory"] > 50e6
        assert timing["dtype"] == "float32" and timing["processes"] == 1
    copy = shutil.copytree(panacea, tmp_path / "copy")
    seconds = report_speed(copy, CPU, torch.float32, processes=2)
    timing, said = json.loads((copy / "timing.json").read_text()), capsys.readouterr().out
    assert seconds == timing["train_seconds"] and timing["processes"] == 2
    assert timing["mfu"] == pytest.approx(timing["flops"] / seconds / matmul_ceiling(CPU, torch.float32) / 2)
    assert "model FLOPs utilisation" in said and "tokens/s (median step" in said and "on each of 2 devices" in said
