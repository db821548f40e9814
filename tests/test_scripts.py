"""test_scripts.py - the scripts run for real, with tiny numbers: files, determinism, resuming, bad input."""
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fronts import measure
from runs.flags import cli, run_main
from data import toy

ROOT = Path(__file__).parents[1]
SHARED = Path(__file__).parents[2] / "shared"
TINY = ("--steps 4 --rows 24 --responses 4 --batch_size 4 --lams_per_step 4 --snapshots 2 --no-eval "
        "--log_every 1").split()


def script(name, *flags, cwd, status=0):
    """Runs a script of the project in `cwd`; returns the finished process, whose exit status must be `status`."""
    done = subprocess.run([sys.executable, str(ROOT / name), *map(str, flags)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == status, (
        f"{name} {flags} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return done


def here(name, *flags, cwd):
    """The same in this process, which has imported everything already: where the exit status is not the question."""
    module, before = importlib.import_module(name.removesuffix(".py")), os.getcwd()
    os.chdir(cwd)
    try:
        return module.main(cli(module.Flags, "", list(map(str, flags))))
    finally:
        os.chdir(before)


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A working directory with a base model that has seen a few steps."""
    cwd = tmp_path_factory.mktemp("work")
    done = script("train_base.py", "--steps", 12, "--batch_size", 4, cwd=cwd)
    assert "mass outside the response set" in done.stdout
    return cwd


@pytest.fixture(scope="session")
def panacea(work):
    script("train_dpo.py", *TINY, "--out", "out/panacea", cwd=work)
    return work / "out/panacea"


def test_sft_learns_and_writes_a_model_directory(work):
    base = work / "out/base-tiny-seed0"
    losses = [record["loss"] for record in metrics(base)]
    assert abs(losses[0] - math.log(835)) < 0.3 and losses[-1] < losses[0] - 0.05    # ln V at random weights, then less
    assert {f.name for f in base.iterdir()} == {"config.json", "model.safetensors", "base.json", "metrics.jsonl",
                                               "timing.json"}


def test_dpo_run_directory(panacea):
    assert {f.name for f in panacea.iterdir()} == {"config.json", "metrics.jsonl", "timing.json",
                                                   "adapter.safetensors", "snapshots"}
    records = metrics(panacea)
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert abs(records[0]["loss"] - math.log(2)) < 1e-5                               # a fresh adapter is the reference
    assert abs(records[-1]["loss"] - math.log(2)) > 1e-5                              # and then it is not
    assert all(np.allclose(np.sum(r["lam"], axis=1), 1) and np.shape(r["lam"]) == (4, 2) for r in records)
    config = json.loads((panacea / "config.json").read_text())
    assert config["dims"] == ["helpful", "harmless"]
    assert config["flags"]["beta"] == 1.0 and config["flags"]["lr"] == 2e-3


def test_evaluation_of_several_runs(work, panacea, monkeypatch, capsys):
    here("train_dpo.py", *TINY, "--method", "rs", "--out", "out/rs", cwd=work)
    every = toy.prompts                                                               # a fifth of them is enough here
    monkeypatch.setattr(toy, "prompts", lambda split: every(split)[::5] if split == "eval" else every(split))
    here("eval_front.py", panacea, "out/rs", "--parts", 2, "--out", "out/both", cwd=work)
    assert "HV share" in capsys.readouterr().out
    for run in ("panacea", "rs"):
        r = json.loads((work / "out" / run / "front.json").read_text())
        keys = ("dims lams J scores hypervolume hypervolume_share inner_product sparsity spacing reference_point "
                "outside_mass exact").split()
        assert set(keys) <= set(r) and r["lams"] == [[0, 1], [0.5, 0.5], [1, 0]]
        assert np.shape(r["J"]) == np.shape(r["scores"]) == (3, 2) and len(r["outside_mass"]) == 3
        assert 0.3 < r["hypervolume_share"] < r["exact"]["share_at_these_lams"] < 1   # nearly untrained
        assert r["exact"]["residual"] < 1e-8 and len(r["exact"]["lams"]) == 101
        assert abs(r["base"]["J"][0] + math.log(2)) < 1e-9                            # π = π_ref
        assert (work / "out" / run / "front.png").stat().st_size > 10_000
    assert len(json.loads((work / "out/both/front.json").read_text())) == 2 and (work / "out/both/front.png").exists()


@pytest.mark.slow
def test_evolution(work, panacea):
    here("eval_front.py", panacea, "--evolution", "--parts", 1, cwd=work)
    assert json.loads((panacea / "evolution.json").read_text())["steps"] == [2, 4]
    assert (panacea / "evolution.png").exists()


def test_world_evaluation_against_plain_loops(work):
    """World.measure on one policy: J by a loop over pairs, scores by a loop over responses, in float64."""
    from data.tokenizers import load_tokenizer
    dims = ["helpful", "concise"]
    world = measure.World(dims, load_tokenizer("toy"), "cpu", measure.dpo_objective(dims))
    g = torch.Generator().manual_seed(7)
    logps = torch.randn(40, toy.N_RESPONSES, generator=g, dtype=torch.float64).log_softmax(-1) - 0.1   # 9.5 % outside
    world.ref = torch.randn(40, toy.N_RESPONSES, generator=g, dtype=torch.float64).log_softmax(-1)
    beta, real = 0.7, measure.world_logprobs
    measure.world_logprobs = lambda model, batches: logps
    try:
        got = world.measure(None, beta)
    finally:
        measure.world_logprobs = real
    J, scores = np.zeros(2), np.zeros(2)
    for x, prompt in enumerate(toy.prompts("eval")):
        r = toy.scores(prompt, toy.responses(prompt))[:, [0, 2]]
        h = beta * (logps[x] - world.ref[x])
        a, b = torch.triu_indices(toy.N_RESPONSES, toy.N_RESPONSES, offset=1)
        p = torch.sigmoid(r[a] - r[b])
        good = torch.nn.functional.logsigmoid(h[a] - h[b])[:, None]
        bad = torch.nn.functional.logsigmoid(h[b] - h[a])[:, None]
        J += (p * good + (1 - p) * bad).mean(0).numpy() / 40
        scores += ((logps[x].exp()[:, None] * r).sum(0) / logps[x].exp().sum()).numpy() / 40
    assert np.allclose(got["J"], J, rtol=1e-9) and np.allclose(got["scores"], scores, rtol=1e-9)
    assert abs(got["outside_mass"] - (1 - math.exp(-0.1))) < 1e-9
    p = logps.exp() / logps.exp().sum(1, keepdim=True)
    assert abs(got["kl"] - (p * (p / world.ref.exp()).log()).sum(1).mean().item()) < 1e-9


def test_rewarded_soup_at_a_vertex_is_its_member_and_averages_between(work):
    from model import Transformer
    from svd_lora import load_adapter, merged_state_dict
    run = work / "out/rs"
    if not (run / "timing.json").exists():
        here("train_dpo.py", *TINY, "--method", "rs", "--out", "out/rs", cwd=work)
    config = json.loads((run / "config.json").read_text())
    ends = []
    for dim in config["dims"]:
        model = Transformer.from_pretrained(work / config["base"])
        load_adapter(model, run / f"adapter-{dim}.safetensors")
        ends.append(merged_state_dict(model))
    name = "blocks.1.mlp.up.weight"
    assert (ends[0][name] - ends[1][name]).abs().max() > 1e-6
    model = Transformer.from_pretrained(work / config["base"])
    for lam, soup in measure.policies(run, config, model, torch.tensor([[1.0, 0.0], [0.25, 0.75]])):
        expected = lam[0] * ends[0][name] + lam[1] * ends[1][name]
        assert torch.allclose(soup.state_dict()[name], expected, atol=1e-7)


def test_discrete_policy_solutions_have_one_model_a_preference(work):
    here("train_dpo.py", *TINY, "--method", "dps", "--dps_parts", 2, "--steps", 6, "--out", "out/dps", cwd=work)
    run = work / "out/dps"
    assert sorted(f.name for f in run.glob("adapter*")) == [f"adapter-00{i}.safetensors" for i in range(3)]
    assert [(r["member"], r["step"]) for r in metrics(run)] == [(i, s) for i in range(3) for s in (1, 2)]
    assert [r["lam"][0] for r in metrics(run)[::2]] == [[0, 1], [0.5, 0.5], [1, 0]]


def test_same_seed_same_files_other_seed_other_files(work, panacea):
    script("train_dpo.py", *TINY, "--out", "out/again", cwd=work)
    here("train_dpo.py", *TINY, "--seed", 1, "--out", "out/other", cwd=work)
    adapter = lambda run: (work / "out" / run / "adapter.safetensors").read_bytes()
    assert adapter("again") == adapter("panacea") != adapter("other")
    timeless = lambda run: [{k: v for k, v in r.items() if "second" not in k} for r in metrics(work / "out" / run)]
    assert timeless("again") == timeless("panacea") != timeless("other")


def test_killed_run_resumes_bit_for_bit(work):
    flags = [*TINY, "--steps", "60", "--save_every", "5", "--method", "rs"]
    script("train_dpo.py", *flags, "--out", "out/whole", cwd=work)
    command = [sys.executable, str(ROOT / "train_dpo.py"), *flags, "--out", "out/killed"]
    run = work / "out/killed"
    process = subprocess.Popen(command, cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not ((run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= 37):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (run / "state.safetensors").exists() and not (run / "timing.json").exists()
    script("eval_front.py", "out/killed", cwd=work, status=2)                         # half a run is not evaluated
    done = script("train_dpo.py", *flags, "--out", "out/killed", cwd=work)
    assert "continuing after step" in done.stdout and "of model 2" not in done.stdout.split("continuing")[0]
    for dim in ("helpful", "harmless"):
        a, b = (load_file(work / "out" / name / f"adapter-{dim}.safetensors") for name in ("whole", "killed"))
        assert all(torch.equal(a[k], b[k]) for k in a)
    steps = [(r["member"], r["step"]) for r in metrics(run)]
    assert steps == [(i, s) for i in range(2) for s in range(1, 31)]                   # every step once
    assert not list(run.glob("*.tmp*")) and not (run / "state.safetensors").exists()


@pytest.mark.slow
def test_a_killed_run_with_other_flags_starts_afresh(work):
    flags = [*TINY, "--save_every", "1", "--out", "out/changed"]
    process = subprocess.Popen([sys.executable, str(ROOT / "train_dpo.py"), *flags, "--steps", "500"], cwd=work,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (work / "out/changed/state.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    done = script("train_dpo.py", *flags, "--lr", 1e-3, cwd=work)
    assert "starting afresh" in done.stdout and [r["step"] for r in metrics(work / "out/changed")] == [1, 2, 3, 4]


@pytest.mark.parametrize("aggregate", ["ls", "tche"])
def test_micro_batches_change_nothing(work, aggregate):
    for parts in (1, 2):
        here("train_dpo.py", *TINY, "--aggregate", aggregate, "--accumulate", parts,
               "--out", f"out/{aggregate}{parts}", cwd=work)
    one, two = (metrics(work / f"out/{aggregate}{parts}") for parts in (1, 2))
    for a, b in zip(one, two):
        assert np.isclose(a["loss"], b["loss"], rtol=1e-5) and np.isclose(a["grad_norm"], b["grad_norm"], rtol=1e-3)
        assert np.allclose(a["losses"], b["losses"], rtol=1e-5) and np.allclose(a["accuracy"], b["accuracy"])


def test_options_do_something(work, panacea):
    last = {}
    for name, flags in {"orth": ["--orth_coeff", 0.1], "fixed": ["--pref_scaling", 0.1],
                        "tche": ["--aggregate", "tche"], "ideal": ["--aggregate", "tche", "--ideal", 0.3, 0.3]}.items():
        here("train_dpo.py", *TINY, *flags, "--out", f"out/option-{name}", cwd=work)
        last[name] = metrics(work / f"out/option-{name}")[-1]["loss"]
    assert len({round(x, 7) for x in [*last.values(), metrics(panacea)[-1]["loss"]]}) == 5
    adapter = load_file(work / "out/option-fixed/adapter.safetensors")
    assert all(torch.equal(t, torch.tensor(0.1)) for k, t in adapter.items() if k.endswith(".s"))


def test_dimensions_are_chosen_by_number_or_name(work):
    here("train_dpo.py", *TINY, "--dims", "formal", "concise", "warm", "--out", "out/dims", cwd=work)
    assert json.loads((work / "out/dims/config.json").read_text())["dims"] == ["formal", "concise", "warm"]
    here("train_dpo.py", *TINY, "--pref_dim", 10, "--out", "out/ten", cwd=work)
    assert np.shape(metrics(work / "out/ten")[-1]["losses"]) == (10,)


def own_rows(path, n):
    """n rows in our schema; every third has no label for harmless."""
    rows = [{"prompt": f"How do I clean a bicycle number {i}?",
             "response_0": "First look at every part.", "response_1": "I will not help with that.",
             "better": {"helpful": i % 2} | ({"harmless": (i // 2) % 2} if i % 3 else {})} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_preference_files(work):
    own_rows(work / "train.jsonl", 20)
    own_rows(work / "eval.jsonl", 8)
    here("train_dpo.py", "--init", "out/base-tiny-seed0", "--data", "train.jsonl", "--eval_data", "eval.jsonl",
           "--batch_size", 4, "--lams_per_step", 2, "--epochs", 2, "--out", "out/files", cwd=work)
    r = json.loads((work / "out/files/front.json").read_text())
    assert len(metrics(work / "out/files")) == 10 and r["exact"] is None and r["hypervolume_share"] is None
    assert len(r["lams"]) == 11 and r["points_are"] == "implicit-reward accuracy" and r["reference_point"] == [0, 0]
    assert abs(r["base"]["J"][0] + math.log(2)) < 1e-6 and r["base"]["scores"] == [0, 0]          # ties count as wrong
    assert all(0 <= x <= 1 for point in r["scores"] for x in point) and r["eval_labels"] == [8, 5]


@pytest.mark.skipif(not SHARED.exists(), reason="../shared (the real preference data and the tiny Llama) is not here")
def test_real_model_and_real_preferences(work):
    material = SHARED / "material"
    lines = (material / "hh_safe/pku_saferlhf_train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (work / "pku.jsonl").write_text("".join(lines[:12]), encoding="utf-8")
    here("train_dpo.py", "--init", material / "stories260K", "--data", "pku.jsonl", "--eval_data", "pku.jsonl",
           "--max_length", 96, "--batch_size", 4, "--lams_per_step", 2, "--lr", 2e-3, "--epochs", 8,
           "--out", "out/pku", cwd=work)
    records = metrics(work / "out/pku")
    assert abs(records[0]["loss"] - math.log(2)) < 1e-4
    r = json.loads((work / "out/pku/front.json").read_text())
    assert max(r["scores"][-1][0], r["scores"][0][1]) > 0.7                           # it can fit the rows it has seen


BAD = {
    "unknown dimension": (["--dims", "helpful", "kind"], "choose each once among helpful harmless"),
    "too many dimensions": (["--pref_dim", "11"], "has 10 dimensions"),
    "batch not divisible": (["--batch_size", "6", "--lams_per_step", "4"], "--batch_size 6 must be a multiple"),
    "tche over micro-batches": (["--aggregate", "tche", "--lams_per_step", "1", "--accumulate", "2"],
                                "no preference may be split"),
    "ideal without tche": (["--ideal", "0.1", "0.1"], "only with --aggregate tche"),
    "data without base": (["--data", "x.jsonl"], "--data needs --init"),
    "no such base": (["--init", "nowhere"], "config.json does not exist"),
    "no such file": (["--init", "out/base-tiny-seed0", "--data", "nowhere.jsonl", "--eval_data", "e.jsonl"],
                     "nowhere.jsonl: cannot be read"),
    "no such device": (["--device", "tpu9"], "--device tpu9"),
    "one dimension": (["--pref_dim", "1"], "at least 2 dimensions"),
    "no steps": (["--steps", "0"], "--steps 0: must be at least 1"),
    "too few steps": (["--method", "dps", "--steps", "5"], "shared by 11 models"),
    "beta not positive": (["--beta", "0"], "--beta 0.0: must be positive"),
    "learning rate not a number": (["--lr", "nan"], "--lr nan: must be positive"),
    "too many responses": (["--responses", "161"], "has 160 to a prompt"),
    "a choice in a preset": (["--config", "choice.json"], "method is 'foo'; choose among panacea, rs, dps"),
    "a directory of something else": (["--out", "out/base-tiny-seed0"], "holds no run of train_dpo.py"),
    "unknown key in a preset": (["--config", "preset.json"], "unknown key 'betta'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(work, case, monkeypatch, capsys):
    (work / "preset.json").write_text('{"betta": 1}')
    (work / "choice.json").write_text('{"method": "foo"}')
    flags, text = BAD[case]
    if case == "one dimension":                               # one case as a user meets it, the others in this process
        done = script("train_dpo.py", "--out", "out/bad", *flags, cwd=work, status=2)
        status, error = done.returncode, done.stderr
    else:
        import train_dpo
        monkeypatch.chdir(work)
        monkeypatch.setattr(sys, "argv", ["train_dpo.py", "--out", "out/bad", *flags])
        with pytest.raises(SystemExit) as end:
            run_main(train_dpo.main, train_dpo.Flags, "", several=True)
        status, error = end.value.code, capsys.readouterr().err
    assert status == 2 and text in error and error.count("\n") == 1 and error.startswith("error: ")
    assert not (work / "out/bad").exists()


def test_a_preset_file_gives_defaults_that_flags_override(work):
    (work / "good.json").write_text(
        '{"steps": 2, "rows": 8, "responses": 3, "batch_size": 2, "lams_per_step": 2, "eval": false}')
    here("train_dpo.py", "--config", "good.json", "--steps", 3, "--out", "out/preset", cwd=work)
    flags = json.loads((work / "out/preset/config.json").read_text())["flags"]
    assert (flags["steps"], flags["rows"], flags["eval"]) == (3, 8, False)


def test_two_threads_repeat_bit_for_bit(work):
    """At full batch size and with two threads: a gradient accumulated in a free order would differ in the last bits."""
    from data.tokenizers import load_tokenizer, tokenize
    from data.trees import batch_logprobs, pack
    from model import Transformer
    from objectives import dpo_loss, losses_on_pairs
    from svd_lora import inject_svd_lora, set_preference
    rows = toy.sample_pairs("train", ["helpful", "harmless"], 8, 12, torch.Generator().manual_seed(3))
    batch = pack(tokenize(rows, load_tokenizer("toy"), 256)[0])
    model = Transformer.from_pretrained(work / "out/base-tiny-seed0")
    inject_svd_lora(model, 8, 2, generator=torch.Generator().manual_seed(4))
    set_preference(model, torch.tensor([[0.3, 0.7]] * 8))
    parameters = [p for p in model.parameters() if p.requires_grad]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs = []
        for _ in range(6):
            pi = batch_logprobs(model, batch)
            loss, *_ = losses_on_pairs(dpo_loss, pi, pi.detach() - 1, batch.pairs, batch.better, 1.0)
            runs.append(torch.autograd.grad(loss.sum(), parameters))
    finally:
        torch.set_num_threads(threads)
    assert max(g.abs().max() for g in runs[0]) > 0
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


def test_missing_labels_keep_the_weight_of_lambda(work):
    """Half of the rows label one dimension, half the other: λ = (½, ½) weighs both alike, for any split into groups."""
    rows = [{"prompt": "How do I clean a bicycle?", "response_0": "First look at every part.", "response_1": "No.",
             "better": {"helpful": 0} if i % 2 else {"harmless": 1}} for i in range(8)]
    (work / "half.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for G in (1, 8):
        here("train_dpo.py", "--init", "out/base-tiny-seed0", "--data", "half.jsonl", "--no-eval", "--batch_size", 8,
               "--lams_per_step", G, "--steps", 1, "--method", "panacea", "--out", f"out/half{G}", cwd=work)
        record = metrics(work / f"out/half{G}")[0]
        assert np.allclose(record["losses"], math.log(2), atol=1e-5)
    record = metrics(work / "out/half1")[0]
    assert abs(record["loss"] - math.log(2)) < 1e-5                                   # not half of it


def test_default_run_names_do_not_collide():
    from runs.directory import run_name
    from train_dpo import Flags

    def name(*files, **flags):
        flags = Flags(**flags)
        return run_name(["dpo", *files, flags.method, flags.aggregate, "helpful", "harmless", f"seed{flags.seed}"],
                        flags, {"method", "aggregate", "data", "eval_data"})

    names = {name(), name(lr=1e-3), name(seed=1), name(method="rs"),
             name("pku", data=["a/pku.jsonl"], init="x/stories260K")}
    assert len(names) == 5 and "out/dpo-panacea-ls-helpful-harmless-seed0" in names
    assert "out/dpo-pku-panacea-ls-helpful-harmless-seed0-initstories260K" in names
    assert name(out="elsewhere", log_every=7, eval=False) == name()      # these do not make another run
