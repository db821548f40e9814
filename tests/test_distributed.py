"""test_distributed.py - train_dpo.py in two processes (torchrun, gloo) equals one process; killed, it resumes."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_dpo
from aggregate import linear_scalarization, tchebycheff
from runs.files import UserError
from runs.processes import with_value
from svd_lora import read_adapter_header

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
SMALL = dict(steps=4, rows=24, responses=4, batch_size=4, lams_per_step=4, snapshots=2, eval=False, log_every=1,
             device="cpu")
TCHE = dict(SMALL, aggregate="tche", lams_per_step=2, orth_coeff=0.1)      # both processes have rows of each preference
LONG = dict(SMALL, steps=30, save_every=4, snapshots=0)
RUNS = {"ls": SMALL, "ls-fsdp": SMALL | dict(parallel="fsdp"), "tche": TCHE, "tche-fsdp": TCHE | dict(parallel="fsdp"),
        "micro": SMALL | dict(batch_size=8, accumulate=2), "rs-fsdp": SMALL | dict(method="rs", parallel="fsdp"),
        "long": LONG}
# several runs under one torchrun, since starting it is what takes the time
DRIVER = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import common, train_dpo
sys.argv[1:], runs = [], json.loads(sys.argv[1])
def main(_):
    for name, flags in runs.items():
        train_dpo.main(train_dpo.Flags(**flags, out="out/two-" + name))
common.run_main(main, common.RunFlags, "", several=True)
"""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def as_flags(values):
    """{"steps": 4, "eval": False} -> ["--steps", "4", "--no-eval"]"""
    return [word for k, v in values.items()
            for word in ([f"--{k}", str(v)] if not isinstance(v, bool) else [f"--{k}" if v else f"--no-{k}"])]


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A directory with a base model and every one of RUNS, in two processes, under out/two-<name>."""
    cwd = tmp_path_factory.mktemp("distributed")
    subprocess.run([sys.executable, str(ROOT / "train_base.py"), "--steps", "6", "--batch_size", "4"], cwd=cwd,
                   env=ENVIRONMENT, check=True, capture_output=True)
    (cwd / "driver.py").write_text(DRIVER)
    done = subprocess.run([*TORCHRUN, "driver.py", json.dumps(RUNS)], cwd=cwd, env=ENVIRONMENT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (cwd / "stdout").write_text(done.stdout)
    return cwd


def distance(a, b):
    """‖a − b‖ / ‖b‖ over all tensors of two adapter files."""
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys()
    return (sum((a[k] - b[k]).square().sum() for k in a) / sum(b[k].square().sum() for k in b)).sqrt().item()


@pytest.mark.parametrize("name, adapters", [("ls", ["adapter"]), ("tche", ["adapter"]), ("micro", ["adapter"]),
                                            ("rs-fsdp", ["adapter-helpful", "adapter-harmless"])])
def test_two_processes_equal_one(work, monkeypatch, name, adapters):
    monkeypatch.chdir(work)
    one = train_dpo.main(train_dpo.Flags(**RUNS[name] | dict(parallel="ddp"), out=f"out/one-{name}"))
    two = work / f"out/two-{name}"
    for adapter in adapters:
        assert distance(two / f"{adapter}.safetensors", one / f"{adapter}.safetensors") < 1e-4
    for a, b in zip(metrics(two), metrics(one), strict=True):
        assert a["tokens"] == b["tokens"] and a["flops"] == b["flops"] and a["lam"] == b["lam"]
        assert abs(a["loss"] / b["loss"] - 1) < 1e-5 and abs(a["grad_norm"] / b["grad_norm"] - 1) < 1e-4
        assert torch.allclose(torch.tensor(a["losses"]), torch.tensor(b["losses"]), rtol=1e-5)
        # an untrained adapter moves nothing: which of two rewards is larger is rounding then
        assert a["accuracy"] == b["accuracy"] or a["step"] == 1


def test_a_sharded_base_changes_nothing(work):
    for name in ("ls", "tche"):
        ddp, fsdp = (load_file(work / f"out/two-{name}{end}/adapter.safetensors") for end in ("", "-fsdp"))
        assert all(torch.equal(ddp[k], fsdp[k]) for k in ddp)
    # the base's fingerprint, which no process could compute alone
    headers = [read_adapter_header(work / f"out/two-ls{end}/adapter.safetensors") for end in ("", "-fsdp")]
    assert headers[0] == headers[1]


def test_one_process_prints_and_writes(work):
    for name, flags in RUNS.items():
        run, members = work / f"out/two-{name}", 2 if name == "rs-fsdp" else 1
        files = {"config.json", "metrics.jsonl", "timing.json"} | ({"snapshots"} if flags["snapshots"] else set())
        files |= {"adapter-helpful.safetensors", "adapter-harmless.safetensors"} if members == 2 else \
            {"adapter.safetensors"}
        assert {f.name for f in run.iterdir()} == files
        steps = flags["steps"] // members
        assert [(r["member"], r["step"]) for r in metrics(run)] == [(i, s + 1) for i in range(members)
                                                                    for s in range(steps)]
        timing = json.loads((run / "timing.json").read_text())
        assert timing["processes"] == 2 and timing["tokens"] == sum(r["tokens"] for r in metrics(run))
    lines = (work / "stdout").read_text().splitlines()
    assert sum(line.startswith("step 00004/00004") for line in lines) == sum(f["steps"] == 4 for f in RUNS.values()) - 1
    assert sum(line.startswith("trained ") for line in lines) == len(RUNS)


@pytest.mark.slow
def test_killed_processes_resume_bit_for_bit(work):
    command = [*TORCHRUN, str(ROOT / "train_dpo.py"), *as_flags(LONG), "--out", "out/killed"]
    process = subprocess.Popen(command, cwd=work, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run = work / "out/killed"
    while not ((run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= 10):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    process.terminate()                                       # torchrun ends its processes, wherever they are
    process.wait()
    assert (run / "state.safetensors").exists() and not (run / "timing.json").exists()
    done = subprocess.run(command, cwd=work, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("continuing after step") == 1, done.stderr[-3000:]
    a, b = (load_file(work / f"out/{name}/adapter.safetensors") for name in ("killed", "two-long"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    timeless = lambda run: [{k: v for k, v in r.items() if "second" not in k} for r in metrics(work / "out" / run)]
    assert timeless("killed") == timeless("two-long")


@pytest.mark.parametrize("aggregate", [linear_scalarization, tchebycheff])
def test_gradient_of_an_aggregate_of_sums(aggregate):
    """Each process differentiates the aggregate at the value of the sum, with respect to its own share."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(6, generator=g, requires_grad=True)
    A = torch.randn(2, 3, 6, generator=g)                     # shares of three losses, linear in x, in two processes
    lam = torch.tensor([0.3, 0.3, 0.4])
    A[0, 0] += 3 * torch.sign(x.detach())                     # the largest of the first process …
    A[1, 0] -= 3 * torch.sign(x.detach())                     # … and the smallest of the second
    gradient = lambda value: torch.autograd.grad(value, x)[0]
    right = gradient(aggregate(A.sum(0) @ x, lam))
    whole = (A.sum(0) @ x).detach()
    shares = [gradient(aggregate(with_value(A[rank] @ x, whole), lam)) for rank in range(2)]
    assert torch.allclose(sum(shares), right, rtol=1e-5)
    assert all(torch.equal(with_value(A[rank] @ x, whole), whole) for rank in range(2))
    assert not torch.allclose(sum(shares) / 2, right, rtol=1e-2)                      # wrong: averaged
    local = sum(gradient(aggregate(A[rank] @ x, lam)) for rank in range(2))           # wrong: each its own maximum
    assert torch.allclose(local, right, rtol=1e-5) == (aggregate is linear_scalarization)


def test_what_does_not_divide_or_fit_is_refused():
    flags = lambda **more: train_dpo.Flags(**dict(SMALL, lams_per_step=4) | more)
    train_dpo.check(flags(batch_size=12), 3)
    for more, world, message in [(dict(batch_size=4), 3, "must be a multiple of the number of processes, 3"),
                                 (dict(batch_size=8, accumulate=4), 4, "multiple of the number of processes, 4"),
                                 (dict(parallel="fsdp"), 1, "start it with torchrun")]:
        with pytest.raises(UserError, match=message):
            train_dpo.check(flags(**more), world)


def test_other_scripts_refuse_torchrun(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "train_base.py")], cwd=tmp_path, capture_output=True, text=True,
                          env=ENVIRONMENT | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr == "error: train_base.py is one process: start it with python, not with torchrun\n"
    scripts = [f for f in ROOT.glob("*.py") if "run_main(main, Flags" in f.read_text(encoding="utf-8")]
    assert [f.name for f in scripts if "several=True" in f.read_text(encoding="utf-8")] == ["train_dpo.py"]
    assert len(scripts) >= 5


@pytest.mark.slow
def test_an_error_in_all_processes_is_one_line(work):
    done = subprocess.run([*TORCHRUN, str(ROOT / "train_dpo.py"), "--batch_size", "3", "--lams_per_step", "3",
                           "--device", "cpu", "--out", "out/bad"], cwd=work, env=ENVIRONMENT, capture_output=True,
                          text=True)
    assert done.returncode != 0 and not (work / "out/bad").exists()
    assert done.stderr.count("error: --batch_size 3") == 1 and "exitcode  : 2" in done.stderr
