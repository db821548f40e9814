"""test_sft.py - Panacea with the SFT objective: its data, the script run for real, its exact front, and comparisons."""
import json
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

import eval_front
from fronts import exact
from aggregate import sample_preference, tchebycheff, vertex_paths
from runs.files import UserError
from data import toy
from fronts.optimum import sft_losses
from data.prompts import read_demonstrations
from data.tokenizers import load_tokenizer
from data.rewards import of_world, world_rewards, world_scores
from test_scripts import here, metrics

ROOT = Path(__file__).parents[1]
TINY = "--steps 4 --rows 16 --responses 2 --batch_size 4 --snapshots 2 --log_every 1".split()
THREE = ["helpful", "harmless", "concise"]


def read(path):
    return json.loads(Path(path).read_text())


@pytest.fixture(scope="module")
def few_prompts():
    """Four evaluation prompts instead of forty, for all that measures."""
    every = toy.prompts
    toy.prompts = lambda split: every(split)[::10] if split == "eval" else every(split)
    yield
    toy.prompts = every


@pytest.fixture(scope="module")
def work(tmp_path_factory, few_prompts):
    """A directory with a base model that has seen a few steps, and an SFT run of two dimensions."""
    cwd = tmp_path_factory.mktemp("sft")
    here("train_base.py", "--steps", 12, "--batch_size", 4, cwd=cwd)
    here("train_sft.py", *TINY, "--out", "out/ls", cwd=cwd)
    return cwd


# ---- data ----

def test_demonstrators_tilt_the_base_by_their_dimension():
    x = toy.prompts("train")[0]
    p, base, r = toy.demonstrator_probs(x, THREE), toy.base_probs(x), toy.scores(x, toy.responses(x))
    assert p.shape == (160, 3) and torch.allclose(p.sum(0), torch.ones(3, dtype=torch.float64))
    for i in range(3):
        ratio = (p[:, i] / base).log() - r[:, i]                         # log p/base = r + a constant
        assert (ratio - ratio[0]).abs().max() < 1e-9 and (p[:, i] @ r[:, i]) > base @ r[:, i] + 0.5


def test_sampled_demonstrations_are_the_writers():
    rows, kinds = toy.sample_demonstrations("train", ["concise", "humorous"], 320, 10, torch.Generator().manual_seed(0))
    assert len(rows) == len(kinds) == 320 and kinds[0] == [0] * 10 + [1] * 10
    assert sorted(row.prompt for row in rows[:160]) == sorted(x + "\n" for x in toy.prompts("train"))
    found, wanted = [], []
    for row, kind in zip(rows, kinds):
        x = row.prompt[:-1]
        r = toy.scores(x, row.responses)[:, [2, 4]]
        found.append([r[torch.tensor(kind) == i, i].mean() for i in (0, 1)])
        wanted.append((toy.demonstrator_probs(x, ["concise", "humorous"])
                       * toy.scores(x, toy.responses(x))[:, [2, 4]]).sum(0).tolist())
    found, wanted = np.array(found).mean(0), np.array(wanted).mean(0)
    assert np.abs(found - wanted).max() < 0.08                           # standard error: about 0.02
    assert np.abs(found[::-1] - wanted).max() > 0.5                      # wrong: the writers exchanged


def test_one_file_a_dimension_shares_prompts(tmp_path):
    write = lambda name, rows: (tmp_path / name).write_text("\n".join(map(json.dumps, rows)) + "\n")
    write("short.jsonl", [{"prompt": "Hi?", "response": "Yes."}, {"prompt": "Who?", "response": "Me."}])
    write("long.jsonl", [{"prompt": "Hi?", "response": "Good day to you."}, {"prompt": "Hi?", "response": "Well met."}])
    rows, kinds = read_demonstrations([tmp_path / "short.jsonl", tmp_path / "long.jsonl"])
    assert [row.responses for row in rows] == [[" Yes.", " Good day to you.", " Well met."], [" Me."]]
    assert kinds == [[0, 1, 1], [0]] and rows[0].prompt == "\n\nHuman: Hi?\n\nAssistant:"
    write("bad.jsonl", [{"prompt": "Hi?", "response": "Yes."}, {"prompt": "Who?"}])
    with pytest.raises(UserError, match='bad.jsonl, row 2: field "response" is missing'):
        read_demonstrations([tmp_path / "bad.jsonl"])
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="empty.jsonl: the file is empty"):
        read_demonstrations([tmp_path / "empty.jsonl"])


def test_labelers_give_one_label_by_their_weighted_reward():
    one = toy.sample_pairs("train", THREE[:2], 40, 6, torch.Generator().manual_seed(1), torch.tensor([[0.5, 0.5]]))
    assert all(np.shape(row.better) == (15, 1) for row in one)
    agree = {name: 0 for name in ("sum", "first")}
    for row in one:
        r = toy.scores(row.prompt[:-1], row.responses)[:, :2]
        for (a, b), (label,) in zip(row.pairs, row.better):
            agree["sum"] += (r[a].sum() < r[b].sum()).item() == label
            agree["first"] += (r[a, 0] < r[b, 0]).item() == label
    assert agree["sum"] > 0.72 * 600 > agree["first"] + 20               # wrong: only the first dimension decides


# ---- the script ----

def test_run_directory_and_the_first_loss(work):
    run = work / "out/ls"
    config, records = read(run / "config.json"), metrics(run)
    assert config["script"] == "train_sft.py" and config["dims"] == ["helpful", "harmless"]
    assert {"adapter.safetensors", "front.json", "front.png", "timing.json"} <= {f.name for f in run.iterdir()}
    assert [r["step"] for r in records] == [1, 2, 3, 4] and np.shape(records[0]["lam"]) == (4, 2)
    # a fresh adapter is the base: the loss of step 1 from the same rows, one by one
    from runs.randomness import epoch_batch, generator_for
    from model import Transformer
    model, tokenizer = Transformer.from_pretrained(work / "out/base-tiny-seed0"), load_tokenizer("toy")
    rows, kinds = toy.sample_demonstrations("train", config["dims"], 16, 2, generator_for(0, "demos"))
    lam = sample_preference(4, 2, 1.0, 0.25, generator_for(0, "lambda", 0))
    L = torch.zeros(4, 2)
    for g, j in enumerate(epoch_batch(16, 4, 0, 0).tolist()):
        for text, kind in zip(rows[j].responses, kinds[j]):
            x, y = tokenizer.encode(rows[j].prompt), tokenizer.encode(text) + [tokenizer.eos_id]
            logits = model(torch.tensor([x + y]))[0, len(x) - 1:-1].log_softmax(-1)
            L[g, kind] -= logits[torch.arange(len(y)), torch.tensor(y)].sum().detach() / 2
    assert np.allclose(records[0]["losses"], L.mean(0), rtol=1e-5)
    assert np.isclose(records[0]["loss"], (lam * L).sum(1).mean(), rtol=1e-5)
    assert not np.isclose(records[0]["loss"], L.mean(), rtol=1e-4)       # wrong: λ forgotten
    assert records[-1]["loss"] != records[0]["loss"]


def test_evaluation_is_the_exact_expectation(work):
    r = read(work / "out/ls/front.json")
    assert r["points_are"] == "normalised J" and r["exact"]["residual"] == 0 and len(r["exact"]["lams"]) == 101
    # the base's J by a loop over prompts and responses
    from model import Transformer
    from data.tokenizers import TokenRow
    from data.trees import batch_logprobs, pack
    model, tokenizer = Transformer.from_pretrained(work / "out/base-tiny-seed0"), load_tokenizer("toy")
    J = np.zeros(2)
    for x in toy.prompts("eval"):
        ids = [tokenizer.encode(y) + [tokenizer.eos_id] for y in toy.responses(x)]
        with torch.no_grad():
            logps = batch_logprobs(model, pack([TokenRow(tokenizer.encode(x + "\n"), ids)])).double()
        J += (toy.demonstrator_probs(x, r["dims"]) * logps[:, None]).sum(0).numpy() / len(toy.prompts("eval"))
    assert np.allclose(r["base"]["J"], J, rtol=1e-5)
    assert 0 < r["objective_share"] < 1 and r["hypervolume_share"] < 1   # a few steps
    # the optimum is the mixture of the writers
    E = r["exact"]
    demos = torch.stack([toy.demonstrator_probs(x, r["dims"]) for x in toy.prompts("eval")])
    mixture = demos @ torch.tensor(E["lams"][30], dtype=torch.float64)
    assert np.allclose(E["J"][30], -sft_losses(mixture.log(), demos), rtol=1e-9)


def test_objective_share_by_hand():
    lams, base, best = [[0.5, 0.5], [1.0, 0.0]], [-2.0, -4.0], [[-1.0, -3.0], [-1.0, -9.0]]
    J = [[-1.5, -3.5], [-1.2, -20.0]]                                    # half the way; 0.8 of it
    assert eval_front.objective_share(J, base, best, lams, "ls", None) == pytest.approx(0.65)
    # Tchebycheff: values −max λ(L − z). (½, ½), z = (1, 3): base −½, best 0, reached −¼; (1, 0): base −1, 0, −0.2
    assert eval_front.objective_share(J, base, best, lams, "tche", [1.0, 3.0]) == pytest.approx((0.5 + 0.8) / 2)
    assert eval_front.objective_share(best, base, best, lams, "ls", None) == pytest.approx(1)
    assert eval_front.objective_share([base, base], base, best, lams, "tche", [0.0, 0.0]) == pytest.approx(0)
    assert eval_front.objective_share(J, base, [best[0], base], lams, "ls", None) == pytest.approx(0.5)   # one way left
    assert eval_front.objective_share(J, base, [base, base], lams, "ls", None) is None


def test_tche_aims_at_the_entropies(work):
    here("train_sft.py", *TINY, "--aggregate", "tche", "--steps", 2, "--no-eval", "--out", "out/tche", cwd=work)
    record, z = metrics(work / "out/tche")[0], exact.sft_ideal(["helpful", "harmless"], "train")
    L, lam = torch.tensor(record["losses"]), torch.tensor(record["lam"])             # one λ a step: the batch's own means
    assert lam.shape == (1, 2) and np.isclose(record["loss"], tchebycheff(L, lam[0], z), rtol=1e-4)
    assert not np.isclose(record["loss"], tchebycheff(L, lam[0]), rtol=0.01)          # wrong: z = 0
    p = torch.stack([toy.demonstrator_probs(x, ["helpful", "harmless"]) for x in toy.prompts("train")])
    assert np.allclose(z, -(p * p.log()).sum(1).mean(0))


@pytest.mark.slow
def test_same_seed_same_adapter_and_a_killed_run_resumes_bit_for_bit(work):
    flags = [*TINY, "--steps", "40", "--save_every", "5", "--method", "rs", "--no-eval"]
    here("train_sft.py", *flags, "--out", "out/whole", cwd=work)
    command, run = [sys.executable, str(ROOT / "train_sft.py"), *flags, "--out", "out/killed"], work / "out/killed"
    process = subprocess.Popen(command, cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not ((run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= 27):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run / "timing.json").exists()
    here("train_sft.py", *flags, "--out", "out/killed", cwd=work)
    for dim in ("helpful", "harmless"):
        a, b = (load_file(work / "out" / name / f"adapter-{dim}.safetensors") for name in ("whole", "killed"))
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert [(r["member"], r["step"]) for r in metrics(run)] == [(i, s) for i in range(2) for s in range(1, 21)]


def test_files(work):
    styles = {"terse": "Yes. It is {}.", "chatty": "Oh what a fine thing to ask, my friend: it is {}, I am sure of it."}
    for part, numbers in (("train", range(20)), ("eval", range(20, 26))):
        for style, text in styles.items():
            (work / f"{style}-{part}.jsonl").write_text("".join(
                json.dumps({"prompt": f"What is {n} and {n}?", "response": text.format(2 * n)}) + "\n" for n in numbers))
    files = [f"{style}-{part}.jsonl" for part in ("train", "eval") for style in styles]
    here("train_sft.py", "--init", "out/base-tiny-seed0", "--data", *files[:2], "--eval_data", *files[2:], "--dims",
         "terse", "chatty", "--batch_size", 4, "--epochs", 12, "--out", "out/files", cwd=work)
    r, run = read(work / "out/files/front.json"), work / "out/files"
    assert r["dims"] == ["terse", "chatty"] and r["points_are"] == "gain in log-likelihood" and r["exact"] is None
    assert np.allclose(r["base"]["scores"], 0) and np.array(r["points"]).max() > 0.3            # nats a token
    assert r["points"][0][1] > r["points"][-1][1] and r["points"][-1][0] > r["points"][0][0]    # λ steers
    scale = read(run / "config.json")["loss_scale"]
    assert scale[0] > 1.5 * scale[1] and len(metrics(run)) == 60                                 # by mean length


BAD = {"one file": (["--data", "a.jsonl", "--init", "x"], "at least 2 dimensions"),
       "no init": (["--data", "a.jsonl", "b.jsonl"], "--data needs --init"),
       "eval files": (["--data", "a.jsonl", "b.jsonl", "--init", "x", "--eval_data", "a.jsonl"], "as many --eval_data"),
       "groups": (["--batch_size", 6, "--lams_per_step", 4], "must be a multiple of --lams_per_step"),
       "ideal": (["--ideal", 1, 1], "only with --aggregate tche"),
       "names": (["--data", "x/a.jsonl", "y/a.jsonl", "--init", "x", "--no-eval"], "2 different names"),
       "dims": (["--dims", "helpful", "kind"], "choose each once")}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(work, case):
    flags, text = BAD[case]
    with pytest.raises(UserError, match=text):
        here("train_sft.py", *flags, "--out", "out/bad", cwd=work)
    assert not (work / "out/bad").exists()


# ---- preferences of an evaluation, many dimensions ----

def test_preferences_of_an_evaluation():
    paths = vertex_paths(4)
    assert paths.shape == (17, 4) and torch.allclose(paths.sum(1), torch.ones(17, dtype=torch.float64))
    assert paths[0].tolist() == [0.25] * 4 and paths[4].tolist() == [1, 0, 0, 0] and paths[16].tolist() == [0, 0, 0, 1]
    assert torch.allclose(paths[2], torch.tensor([0.625, 0.125, 0.125, 0.125], dtype=torch.float64))
    ten = exact.evaluation_preferences(10)
    assert ten.shape == (141, 10) and torch.equal(ten, exact.evaluation_preferences(10)) and (ten >= 0).all()
    assert len(exact.evaluation_preferences(2)) == 11 and len(exact.evaluation_preferences(3)) == 66
    assert len(exact.evaluation_preferences(10, 1)) == 10
    own = torch.tensor([[0.3, 0.3, 0.2, 0.2]])
    assert len(exact.front_preferences(4, own)) == len(exact.evaluation_preferences(4)) + 1
    assert len(exact.front_preferences(2, own[:, :2])) == 101


def test_spearman_is_taken_along_the_paths():
    lams = exact.evaluation_preferences(5)
    points = lams.clone() ** 0.5
    points[21:] = torch.rand(100, 5, generator=torch.Generator().manual_seed(0))      # off the paths: anything
    assert eval_front.metrics(lams.tolist(), points, [-0.1] * 5)["spearman"] == pytest.approx([1] * 5)
    points[8, 1] = 0                                                                  # vertex 1 is bad at its own
    assert eval_front.metrics(lams.tolist(), points, [-0.1] * 5)["spearman"][1] == pytest.approx(0)


@pytest.mark.slow
def test_four_dimensions_run_and_are_evaluated(work):
    here("train_sft.py", *TINY, "--pref_dim", 4, "--steps", 2, "--no-eval", "--out", "out/four", cwd=work)
    (r,) = here("eval_front.py", "out/four", cwd=work)
    assert len(r["lams"]) == 117 and len(r["exact"]["lams"]) == 117 and 0 < r["objective_share"] < 1
    assert r["exact"]["share_at_these_lams"] == pytest.approx(1) and len(r["spearman"]) == 4


@pytest.mark.parametrize("script, flags", [("train_dpo.py", ["--rows", 16, "--responses", 4]),
                                           ("train_ppo.py", ["--batch_size", 16, "--samples", 4, "--max_new_tokens", 8])])
def test_ten_dimensions_by_dpo_and_by_ppo(work, script, flags):
    run = script[6:9] + "10"
    here(script, "--pref_dim", 10, "--steps", 2, *flags, "--no-eval", "--out", f"out/{run}", cwd=work)
    assert np.shape(metrics(work / "out" / run)[0]["lam"])[1] == 10
    (r,) = here("eval_front.py", f"out/{run}", "--parts", 1, cwd=work)               # the ten vertices
    assert np.shape(r["J"]) == (10, 10) and len(r["exact"]["lams"]) == 141 and r["dims"] == list(toy.DIMS)
    assert (r["objective_share"] is None or r["objective_share"] < 1) and (work / "out" / run / "front.png").exists()


# ---- runs of every kind in one space ----

def test_comparison_of_runs_of_different_objectives(work):
    here("train_dpo.py", "--steps", 4, "--rows", 16, "--responses", 4, "--no-eval", "--out", "out/dpo", cwd=work)
    results = here("eval_front.py", "out/ls", "out/dpo", "--out", "out/both", "--parts", 2, cwd=work)
    c = read(work / "out/both/compare.json")
    assert (work / "out/both/compare.png").exists() and [r["label"] for r in c["runs"]] == ["Panacea, SFT",
                                                                                              "Panacea, DPO"]
    limits = np.array([limit["points"] for limit in c["limits"]])                     # (budgets, N, 2)
    lams = np.array(c["limit_lams"])
    reach = (limits * (np.array(c["ideal"]) - c["nadir"]) * lams).sum(-1)             # λ · scores, up to a constant of λ
    assert (np.diff(reach, axis=0) > 1e-6).all()                                      # more KL, more score
    assert np.allclose(limits[-2].max(0), 1) and np.allclose(limits[-2].min(0), 0)    # 2 nats set the scale
    for run, r in zip(c["runs"], results):
        assert np.allclose(np.array(run["points"]) * (np.array(c["ideal"]) - c["nadir"]) + c["nadir"], r["scores"])
        assert run["of_best"] <= 1 and 0 <= run["hypervolume_share"] < 1 and run["kl"] == r["kl"]
    ppo = work / "out/none"
    ppo.mkdir()
    (ppo / "config.json").write_text("{}")
    with pytest.raises(UserError, match="training has not ended"):
        here("eval_front.py", "out/ls", "out/none", cwd=work)


def test_what_could_be_gained_is_gained_by_the_optimum():
    """of_best is 1 for the policy π_ref exp(λ·r/β) itself, and less for one at the same KL for another λ."""
    from fronts.optimum import best_at_kl
    x = toy.prompts("eval")[:2]
    scores = torch.stack([toy.scores(p, toy.responses(p))[:, :2] for p in x])
    ref = torch.stack([toy.base_probs(p).log() for p in x])
    lam = torch.tensor([[0.3, 0.7], [0.7, 0.3]], dtype=torch.float64)
    logps = (ref + torch.einsum("xsm,nm->nxs", scores, lam) / 0.7).log_softmax(-1)
    kl = (logps.exp() * (logps - ref)).sum(-1).mean(-1)
    reached = torch.einsum("nxs,xsm,nm->n", logps.exp(), scores, lam) / 2
    assert torch.allclose(best_at_kl(lam, kl, scores, ref), reached, rtol=1e-6)
    assert (best_at_kl(lam.flip(0), kl, scores, ref) - torch.einsum("nxs,xsm,nm->n", logps.exp(), scores, lam.flip(0)) / 2
            > 0.01).all()


def test_runs_of_other_dimensions_or_bases_are_refused(work):
    if not (work / "out/dpo/timing.json").exists():
        here("train_dpo.py", "--steps", 4, "--rows", 16, "--responses", 4, "--no-eval", "--out", "out/dpo", cwd=work)
    here("train_sft.py", *TINY, "--dims", "helpful", "warm", "--no-eval", "--out", "out/warm", cwd=work)
    with pytest.raises(UserError, match="different spaces"):
        here("eval_front.py", "out/ls", "out/warm", "--parts", 1, cwd=work)
    config = read(work / "out/dpo/config.json")
    results = [read(work / "out/ls/front.json"), read(work / "out/ls/front.json") | {"run": str(work / "out/dpo")}]
    results[0]["run"] = str(work / "out/ls")
    (work / "out/dpo/config.json").write_text(json.dumps(config | {"fingerprint": "0"}))
    with pytest.raises(UserError, match="another base model"):
        eval_front.compare(results, "cpu")
    (work / "out/dpo/config.json").write_text(json.dumps(config))


# ---- rewards of the embedded world that are functions of texts ----

def test_concise_reward_on_the_world():
    names = ["helpful", "concise:12"]
    rewards, x = world_rewards(names, None), toy.prompts("train")[0]
    assert of_world(names) and of_world(None) and not of_world(["helpful", "happy"]) and rewards.dims == THREE[::2]
    texts = toy.responses(x)[:3] + ["I am not of this world."]
    raw = rewards.raw([x + "\n"] * 4, texts, [True, True, False, True])
    n = [len(y.split()) for y in texts]
    expected = [4.0 if n[j] <= 12 else 5 - n[j] / 12 for j in (0, 1)]
    assert raw[:2, 1].tolist() == pytest.approx(expected) and (raw[2:] == toy.OUTSIDE).all()
    assert torch.equal(raw[:2, 0], toy.scores(x, texts[:2])[:, 0])
    r = rewards.normalise(world_scores(rewards, toy.prompts("train")))
    p = torch.stack([toy.base_probs(x) for x in toy.prompts("train")])[..., None] / 160
    assert torch.allclose((p * r).sum((0, 1)), torch.zeros(2, dtype=torch.float64), atol=1e-12)
    assert torch.allclose((p * r * r).sum((0, 1)), torch.ones(2, dtype=torch.float64))
