"""test_torchrun.py - train_dpo.py in two processes (torchrun, gloo) equals one process; killed, it resumes."""
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from running import BASE, ROOT, go, metrics, timeless, words
from safetensors.torch import load_file

import train_dpo
from runs.files import UserError
from svd_lora import read_adapter_header

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
SMALL = dict(steps=4, rows=24, responses=4, batch_size=4, lams_per_step=4, snapshots=2, eval=False, log_every=1,
             device="cpu", init=BASE, keep=0.0)
TCHE = dict(SMALL, aggregate="tche", lams_per_step=2, orth_coeff=0.1,      # both processes have rows of each preference
            ideal=[0.6, 0.1], accumulate=2)
LONG = dict(SMALL, steps=30, save_every=4, snapshots=0)
RUNS = {"ls": SMALL, "ls-fsdp": SMALL | dict(parallel="fsdp"), "tche": TCHE, "tche-fsdp": TCHE | dict(parallel="fsdp"),
        "micro": SMALL | dict(batch_size=8, accumulate=2, keep=1.0),
        "rs-fsdp": SMALL | dict(method="rs", parallel="fsdp")}
# several runs under one torchrun, since starting it is what takes the time
DRIVER = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import train_dpo
from runs.flags import RunFlags, run_main
sys.argv[1:], runs = [], json.loads(sys.argv[1])
def main(_):
    for name, flags in runs.items():
        train_dpo.main(train_dpo.Flags(**flags, out="out/two-" + name))
run_main(main, RunFlags, "", several=True)
"""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def place(work, monkeypatch):
    """The world of other processes is the whole one, so it is here too."""
    monkeypatch.chdir(work)


@pytest.fixture(scope="module")
def two(work):
    """The output of torchrun, with every one of RUNS under out/two-<name>."""
    (work / "driver.py").write_text(DRIVER)
    done = subprocess.run([*TORCHRUN, "driver.py", json.dumps(RUNS)], cwd=work, env=ENVIRONMENT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def distance(a, b):
    """‖a − b‖ / ‖b‖ over all tensors of two adapter files."""
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys()
    return (sum((a[k] - b[k]).square().sum() for k in a) / sum(b[k].square().sum() for k in b)).sqrt().item()


@pytest.mark.parametrize("name, adapters", [("ls", ["adapter"]), ("tche", ["adapter"]), ("micro", ["adapter"]),
                                            ("rs-fsdp", ["adapter-helpful", "adapter-harmless"])])
def test_two_processes_equal_one(work, two, name, adapters):
    one = go("train_dpo", f"one-{name}", **RUNS[name] | dict(parallel="ddp"))
    run = work / f"out/two-{name}"
    for adapter in adapters:
        assert distance(run / f"{adapter}.safetensors", one / f"{adapter}.safetensors") < 1e-3   # AdamW on rounding
    for a, b in zip(metrics(run), metrics(one), strict=True):
        assert a["tokens"] == b["tokens"] and a["flops"] == b["flops"] and a["lam"] == b["lam"]
        assert abs(a["loss"] / b["loss"] - 1) < 1e-5 and abs(a["grad_norm"] / b["grad_norm"] - 1) < 1e-3
        assert torch.allclose(torch.tensor(a["losses"]), torch.tensor(b["losses"]), rtol=1e-5)
        # an untrained adapter moves nothing: which of two rewards is larger is rounding; later for one pair at most
        assert max(abs(x - y) for x, y in zip(a["accuracy"], b["accuracy"])) < 1.01 / 24 or a["step"] < 3


def test_a_sharded_base_changes_nothing(work, two):
    for name in ("ls", "tche"):
        ddp, fsdp = (load_file(work / f"out/two-{name}{end}/adapter.safetensors") for end in ("", "-fsdp"))
        assert all(torch.equal(ddp[k], fsdp[k]) for k in ddp)
    # the base's fingerprint, which no process could compute alone
    headers = [read_adapter_header(work / f"out/two-ls{end}/adapter.safetensors") for end in ("", "-fsdp")]
    assert headers[0] == headers[1]


def test_one_process_prints_and_writes(work, two):
    for name, flags in RUNS.items():
        run, members = work / f"out/two-{name}", 2 if name == "rs-fsdp" else 1
        files = {"config.json", "metrics.jsonl", "timing.json", "snapshots"}
        files |= {"adapter-helpful.safetensors", "adapter-harmless.safetensors"} if members == 2 else \
            {"adapter.safetensors"}
        assert {f.name for f in run.iterdir()} == files
        steps = flags["steps"] // members
        assert [(r["member"], r["step"]) for r in metrics(run)] == [(i, s + 1) for i in range(members)
                                                                    for s in range(steps)]
        timing = json.loads((run / "timing.json").read_text())
        assert timing["processes"] == 2 and timing["tokens"] == sum(r["tokens"] for r in metrics(run))
    lines = two.splitlines()
    assert sum(line.startswith("step 00004/00004") for line in lines) == len(RUNS) - 1
    assert sum(line.startswith("trained ") for line in lines) == len(RUNS)


@pytest.mark.slow
def test_killed_processes_resume_bit_for_bit(work):
    command = lambda name: [*TORCHRUN, str(ROOT / "train_dpo.py"), *words(LONG), "--out", f"out/two-{name}"]
    run = work / "out/two-killed"
    process = subprocess.Popen(command("killed"), cwd=work, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while not ((run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= 10):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    process.terminate()                                       # torchrun ends its processes, wherever they are
    process.wait()
    assert (run / "state.safetensors").exists() and not (run / "timing.json").exists()
    for name in ("killed", "whole"):
        done = subprocess.run(command(name), cwd=work, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.count("continuing after step") == (name == "killed"), done.stderr
    a, b = (load_file(work / f"out/two-{name}/adapter.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert timeless(run) == timeless(work / "out/two-whole") and len(metrics(run)) == 30


@pytest.mark.slow
def test_an_error_in_all_processes_is_one_line(work):
    done = subprocess.run([*TORCHRUN, str(ROOT / "train_dpo.py"), "--batch_size", "3", "--lams_per_step", "3",
                           "--device", "cpu", "--out", "out/bad"], cwd=work, env=ENVIRONMENT, capture_output=True,
                          text=True)
    assert done.returncode != 0 and not (work / "out/bad").exists()
    assert done.stderr.count("error: --batch_size 3") == 1 and "exitcode  : 2" in done.stderr


def test_what_does_not_divide_or_fit_is_refused():
    flags = lambda **more: train_dpo.Flags(**dict(SMALL, lams_per_step=4) | more)
    train_dpo.check(flags(batch_size=12), 3)
    for more, world, message in [(dict(batch_size=4), 3, "must be a multiple of the 3 processes"),
                                 (dict(batch_size=8, accumulate=4), 4, "must be a multiple of the 4 processes"),
                                 (dict(parallel="fsdp"), 1, "start it with torchrun")]:
        with pytest.raises(UserError, match=message):
            train_dpo.check(flags(**more), world)
