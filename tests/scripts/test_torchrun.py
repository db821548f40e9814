"""test_torchrun.py - trainings in two processes equal one process; killed, they resume; one that fails ends all.

Processes are threads where that is enough (tests/threads.py), else torchrun's, with gloo.
"""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from running import ELSEWHERE, ROOT, go, killed, killing, metrics, read, timeless, words
from safetensors.torch import load_file
from threads import in_processes

import train_dpo
import train_hqd
import train_ppo
import train_reward
from runs.files import UserError
from svd_lora import read_adapter_header

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
FSDP = dict(parallel="fsdp")
TCHE = dict(aggregate="tche", lams_per_step=2, orth_coeff=0.1,             # both processes have rows of each preference
            ideal=[0.6, 0.1], accumulate=2)
PPO = dict(batch_size=16, minibatch=8, steps=2)                            # 4 prompts, 2 of them in a minibatch
RUNS = {name: ("train_dpo", flags) for name, flags in {
    "ls": {}, "ls-fsdp": FSDP, "tche": TCHE, "tche-fsdp": TCHE | FSDP,
    "micro": dict(batch_size=8, accumulate=2, keep=1.0), "rs-fsdp": dict(method="rs") | FSDP}.items()}
OTHERS = {"sft": ("train_sft", dict(aggregate="tche", lams_per_step=2)),
          "sft-rs-fsdp": ("train_sft", dict(method="rs") | FSDP),
          "reward": ("train_reward", dict(steps=6)), "reward-fsdp": ("train_reward", dict(steps=6) | FSDP),
          "ppo": ("train_ppo", PPO | dict(ptx_coeff=0.5, update_iters=2)),
          "ppo-fsdp": ("train_ppo", PPO | dict(ptx_coeff=0.5, update_iters=2) | FSDP),
          "ppo-mgda-fsdp": ("train_ppo", PPO | dict(aggregate="mgda") | FSDP),
          "ppo-resumed": ("train_ppo", PPO | dict(aggregate="tche", ideal=None, steps=3, save_every=1)),
          "hqd": ("train_hqd", dict(batch_size=4)), "hqd-resumed": ("train_hqd", dict(batch_size=4))}
# what two processes have exactly as one has it: here the samples show
EXACT = {"step", "member", "lam", "lr", "tokens", "flops", "labels", "rewards", "length", "finished", "collapsed",
         "stage", "adapter", "first_ratio"}
LONG = dict(steps=30, save_every=4, snapshots=0, rows=24, responses=4, batch_size=4, lams_per_step=4, eval=False,
            log_every=1, device="cpu", keep=0.0, **ELSEWHERE)
# several runs under one torchrun, since starting it is what takes the time
DRIVER = f"""
import json, os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from running import go, inside
from runs.flags import RunFlags, run_main
sys.argv[1:], runs = [], json.loads(sys.argv[1])
def main(_):
    with inside(os.getcwd()):
        for name, (script, flags) in runs.items():
            go(script, "two-" + name, **flags)
run_main(main, RunFlags, "", several=True)
"""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(work, runs):
    """The output of torchrun, with every one of the runs under out/two-<name>."""
    (work / "driver.py").write_text(DRIVER)
    done = subprocess.run([*TORCHRUN, "driver.py", json.dumps(runs)], cwd=work, env=ENVIRONMENT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def two(work):
    """The output of RUNS."""
    return torchrun(work, RUNS)


def distance(a, b):
    """‖a − b‖ / ‖b‖ over all tensors of two adapter files."""
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys()
    return (sum((a[k] - b[k]).square().sum() for k in a) / sum(b[k].square().sum() for k in b)).sqrt().item()


@pytest.mark.parametrize("name, adapters", [("ls", ["adapter"]), ("tche", ["adapter"]), ("micro", ["adapter"]),
                                            ("rs-fsdp", ["adapter-helpful", "adapter-harmless"])])
def test_two_processes_equal_one(work, two, name, adapters):
    one = go("train_dpo", f"one-{name}", **RUNS[name][1] | dict(parallel="ddp"))
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
    for name in RUNS:
        run, members = work / f"out/two-{name}", 2 if name == "rs-fsdp" else 1
        files = {"config.json", "metrics.jsonl", "timing.json", "snapshots"}
        files |= {"adapter-helpful.safetensors", "adapter-harmless.safetensors"} if members == 2 else \
            {"adapter.safetensors"}
        assert {f.name for f in run.iterdir()} == files
        steps = 4 // members
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


# ---- all trainers ----

def equal(run, one, script):
    """Asserts that a run of two processes is what one process makes."""
    for a, b in zip(metrics(run), metrics(one), strict=True):
        assert a.keys() == b.keys()
        for key, x in b.items():
            if key in EXACT or x is None:
                assert a[key] == x, key
            elif "second" not in key:                         # KL and moved are differences of sums of log-probs
                assert a[key] == pytest.approx(x, rel=1e-3 if key == "grad_norm" else 1e-5, abs=3e-6), key
    for file in [*one.glob("adapter*.safetensors"), *one.glob("heads.safetensors")]:
        assert distance(run / file.name, file) < 1e-3         # AdamW on rounding
    for file in ("generated.jsonl", "reference.jsonl"):
        assert (one / file).exists() == (run / file).exists() == (file in {
            "train_hqd": "generated.jsonl", "train_reward": "reference.jsonl"}.get(script, ""))
        assert not (one / file).exists() or (one / file).read_text() == (run / file).read_text()
    if script == "train_reward":
        a, b = (read(x, "reward.json") for x in (run, one))
        assert all(a[key] == pytest.approx(b[key], rel=1e-5) for key in b.keys() - {"dims"}) and a["dims"] == b["dims"]
    if script == "train_ppo":
        assert read(run, "config.json")["rewards"] == read(one, "config.json")["rewards"]


@pytest.fixture(scope="module")
def constants():
    """Those of `go`, in all threads."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in [(train_hqd, "MOST_PROMPTS", 10), (train_ppo, "REFERENCE_SAMPLES", 15),
                                    (train_reward, "EVAL_ROWS", 4), (train_reward, "N_REFERENCE", 13)]:
            patch.setattr(module, name, value)
        yield


@pytest.mark.parametrize("script, flags", [
    ("train_sft", dict(aggregate="tche", lams_per_step=2)), ("train_reward", dict(steps=4, eval=True)),
    ("train_ppo", PPO | dict(ptx_coeff=0.5)),
    ("train_ppo", PPO | dict(aggregate="tche", rewards=["warm", "concise:9"])),
    ("train_ppo", PPO | dict(aggregate="pama")), ("train_ppo", PPO | dict(aggregate="pama", pama_reading="S")),
    ("train_ppo", PPO | dict(aggregate="mgda")), ("train_ppo", PPO | dict(estimator="gdpo")),
    ("train_hqd", dict(batch_size=4, steps=2, steps2=2))])
def test_two_threads_equal_one(constants, script, flags, request):
    name = "".join(c for c in request.node.name if c.isalnum())
    one = go(script, f"one-{name}", **flags)
    runs = in_processes(2, lambda: go(script, f"two-{name}", **flags))
    assert runs[0] == runs[1]
    equal(runs[0], one, script)


@pytest.mark.slow
def test_all_trainers_under_torchrun(work):
    """Sharded bases too, and runs that one process began and two go on with, and the other way round."""
    for name, member in (("ppo-resumed", 0), ("hqd-resumed", 4)):
        script, flags = OTHERS[name]
        killed(script, f"two-{name}", lambda r: (r["member"], r["step"]) == (member, 2), **flags)
    said = torchrun(work, OTHERS)
    assert said.count("continuing after step") == 2 and said.count("trained ") == len(OTHERS)
    for name, (script, flags) in OTHERS.items():
        equal(work / f"out/two-{name}", go(script, f"one-{name}", **flags | (dict(parallel="ddp") if "parallel" in flags
                                                                            else {})), script)
    for name in ("reward", "ppo"):
        ddp, fsdp = (load_file(work / f"out/two-{name}{end}/adapter.safetensors") for end in ("", "-fsdp"))
        assert all(torch.equal(ddp[k], fsdp[k]) for k in ddp)


def test_one_process_goes_on_where_two_were_killed():
    flags = PPO | dict(aggregate="tche", steps=3, save_every=1)
    one = go("train_ppo", "one-killed", **flags)
    with killing(lambda record: record["step"] == 2 and torch.distributed.get_rank() == 0):          # who writes
        in_processes(2, lambda: go("train_ppo", "two-killed-threads", **flags))
    run = Path("out/two-killed-threads").resolve()
    assert len(metrics(run)) == 2 and (run / "state.safetensors").exists()
    assert go("train_ppo", "two-killed-threads", **flags) == run
    equal(run, one, "train_ppo")


# ---- errors ----

FAILING = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from running import go, inside
from runs import loop
from runs.files import UserError
from runs.flags import RunFlags, run_main
update, kind = loop.Run.update, {{"user": UserError, "bug": ValueError}}[sys.argv.pop()]
def failing(run, *rest):
    if run.step == 1 and os.environ["RANK"] == "1":
        raise kind("the disk is full")
    return update(run, *rest)
loop.Run.update = failing
def main(_):
    with inside(os.getcwd()):
        go("train_ppo", "failing", batch_size=16, minibatch=8)
run_main(main, RunFlags, "", several=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind, line", [("user", "error: the disk is full"), ("bug", "ValueError: the disk is full")])
def test_an_error_in_one_process_ends_all(work, kind, line):
    """While the other waits for it in a sum, for hours if it may. What is seen is its reason, not that the other lost a
    connection."""
    (work / "failing.py").write_text(FAILING)
    done = subprocess.run([*TORCHRUN, "failing.py", kind], cwd=work, env=ENVIRONMENT, capture_output=True, text=True,
                          timeout=600)
    assert done.returncode != 0 and done.stderr.count("the disk is full") == 1 + (kind == "bug") and line in done.stderr
    assert "onnection" not in done.stderr and "RuntimeError" not in done.stderr


@pytest.mark.slow
def test_an_error_in_all_processes_is_one_line(work):
    done = subprocess.run([*TORCHRUN, str(ROOT / "train_dpo.py"), "--batch_size", "3", "--lams_per_step", "3",
                           "--device", "cpu", "--out", "out/bad"], cwd=work, env=ENVIRONMENT, capture_output=True,
                          text=True)
    assert done.returncode != 0 and not (work / "out/bad").exists()
    assert done.stderr.count("error: --batch_size 3") == 1 and "exitcode  : 2" in done.stderr


def test_what_does_not_divide_or_fit_is_refused():
    flags = lambda **more: train_dpo.Flags(**dict(keep=0.0, beta=1.0, responses=4, batch_size=4, lams_per_step=4)
                                                | more)
    train_dpo.check(flags(batch_size=12), 3)
    for more, world, message in [(dict(batch_size=4), 3, "must be a multiple of the 3 processes"),
                                 (dict(batch_size=8, accumulate=4), 4, "must be a multiple of the 4 processes"),
                                 (dict(parallel="fsdp"), 1, "start it with torchrun")]:
        with pytest.raises(UserError, match=message):
            train_dpo.check(flags(**more), world)
