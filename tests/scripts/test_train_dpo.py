"""test_train_dpo.py - train_dpo.py run for real with tiny numbers: files, determinism, options, losses, bad input."""
import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from running import (
    BASE,
    ELSEWHERE,
    SHARED,
    command,
    epoch_and_whole,
    go,
    gradients,
    killed,
    metrics,
    one_label_in_twenty,
    own_rows,
    read,
    refused,
    timeless,
    write_rows,
)
from safetensors.torch import load_file

import eval_front
import train_dpo
from data import batches, toy
from data.tokenizers import load_tokenizer, tokenize
from data.trees import batch_logprobs, pack, predicting_states
from fronts import measure
from model import Config, Transformer
from objectives import dpo_loss, losses_on_pairs
from runs.files import UserError
from runs.randomness import epoch_batch, generator_for
from svd_lora import inject_svd_lora, load_adapter, read_adapter_header, set_preference


def test_run_directory(panacea):
    assert {f.name for f in panacea.iterdir()} >= {"config.json", "metrics.jsonl", "timing.json", "adapter.safetensors",
                                                   "snapshots"}
    assert not list(panacea.glob(".*")) and not (panacea / "state.safetensors").exists()
    assert [f.name for f in (panacea / "snapshots").iterdir()] == ["adapter-000002.safetensors"]
    records = metrics(panacea)
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert abs(records[0]["loss"] - math.log(2)) < 1e-5                # a fresh adapter is the reference
    assert abs(records[-1]["loss"] - math.log(2)) > 1e-5               # and then it is not
    assert all(np.allclose(np.sum(r["lam"], axis=1), 1) and np.shape(r["lam"]) == (4, 2) for r in records)
    config = read(panacea, "config.json")
    assert config["dims"] == ["helpful", "harmless"] and config["models"] == 1
    assert config["base"] == os.path.abspath(BASE)
    assert (config["script"], config["method"], config["label"]) == ("train_dpo.py", "panacea", "Panacea")
    assert config["objective"] == {"name": "dpo", "beta": 1.0, "aggregate": "ls", "ideal": None}
    assert config["flags"]["beta"] == 1.0 and config["flags"]["lr"] == 3e-3


def test_the_losses_of_a_step_by_hand():
    """Step 3, with the adapter of the snapshot after step 2: every row under its own λ, every pair by itself."""
    run = go("train_dpo", "by-hand", lr=3e-2)                          # large steps: λ matters then
    record, tokenizer = metrics(run)[2], load_tokenizer("toy")
    rows = toy.sample_pairs("train", ["helpful", "harmless"], 24, 4, generator_for(0, "pairs"))
    base, model = Transformer.from_pretrained(BASE), Transformer.from_pretrained(BASE)
    load_adapter(model, run / "snapshots/adapter-000002.safetensors")

    @torch.no_grad()
    def logprob(net, row, text):
        x, y = tokenizer.encode(row.prompt), tokenizer.encode(text) + [tokenizer.eos_id]
        return net(torch.tensor([x + y]))[0, len(x) - 1:-1].log_softmax(-1)[torch.arange(len(y)), y].sum()

    def losses(lams):
        L = torch.zeros(4, 2)
        for g, j in enumerate(epoch_batch(24, 4, 0, 2).tolist()):
            set_preference(model, torch.tensor(lams[g]))
            h = [logprob(model, rows[j], y) - logprob(base, rows[j], y) for y in rows[j].responses]
            for (a, b), better in zip(rows[j].pairs, rows[j].better):
                for i, label in enumerate(better):
                    gap = h[a] - h[b] if label == 0 else h[b] - h[a]
                    L[g, i] -= torch.nn.functional.logsigmoid(gap) / len(rows[j].pairs)
        return L

    L = losses(record["lam"])
    assert record["losses"] == pytest.approx(L.mean(0).tolist(), rel=1e-4)
    assert record["loss"] == pytest.approx((torch.tensor(record["lam"]) * L).sum(1).mean().item(), rel=1e-4)
    assert abs(record["loss"] - L.mean().item()) > 1e-3                # wrong: λ forgotten
    assert not np.allclose(record["losses"], losses(record["lam"][::-1]).mean(0), rtol=1e-3)      # or another row's


def test_same_seed_same_files_other_seed_other_files(panacea):
    """Equal numbers in another process: test_sigkill in test_killed_runs.py."""
    again, other = go("train_dpo", "panacea-again"), go("train_dpo", "panacea-seed", seed=1)
    adapter = lambda run: (run / "adapter.safetensors").read_bytes()
    assert adapter(again) == adapter(panacea) != adapter(other)
    assert timeless(again) == timeless(panacea) != timeless(other)


def test_rewarded_soups_and_discrete_policy_solutions(soups):
    assert {f.name for f in soups.glob("adapter*")} == {"adapter-helpful.safetensors", "adapter-harmless.safetensors"}
    assert [(r["member"], r["step"], r["lam"]) for r in metrics(soups)] == [
        (i, s, [lam]) for i, lam in enumerate([[1, 0], [0, 1]]) for s in (1, 2)]
    run = go("train_dpo", "dps", method="dps", dps_parts=2, steps=6)
    assert sorted(f.name for f in run.glob("adapter*")) == [f"adapter-00{i}.safetensors" for i in range(3)]
    assert [(r["member"], r["step"]) for r in metrics(run)] == [(i, s) for i in range(3) for s in (1, 2)]
    assert [r["lam"][0] for r in metrics(run)[::2]] == [[0, 1], [0.5, 0.5], [1, 0]]
    assert read(run, "config.json")["models"] == 3


def test_a_prompted_preference(panacea):
    """A plain adapter of Panacea's rank; λ stands in front of each row's prompt, and the reference never sees it."""
    run = go("train_dpo", "prompted", method="prompt", lr=3e-2)
    config, records, tokenizer = read(run, "config.json"), metrics(run), load_tokenizer("toy")
    assert (config["method"], config["label"], config["models"]) == ("prompt", "Prompted λ", 1)
    assert [r["lam"] for r in records] == [r["lam"] for r in metrics(panacea)]         # drawn as Panacea's
    sigma = next(v for k, v in load_file(run / "adapter.safetensors").items() if k.endswith("sigma"))
    assert sigma.shape == (10,) and read_adapter_header(run / "adapter.safetensors")["m"] == 0
    # step 3, with the adapter after step 2: the texts, then every pair by itself
    base, model = Transformer.from_pretrained(BASE), Transformer.from_pretrained(BASE)
    load_adapter(model, run / "snapshots/adapter-000002.safetensors")
    rows = toy.sample_pairs("train", ["helpful", "harmless"], 24, 4, generator_for(0, "pairs"))
    chosen = [rows[j] for j in epoch_batch(24, 4, 0, 2).tolist()]

    def losses(lams):
        texts = [f"{a:.2f} {b:.2f}\n" for a, b in lams]
        (batch, longer) = (pack(tokenize([replace(row, prompt=text + row.prompt) for text, row in zip(t, chosen)],
                                         tokenizer, 256)[0]) for t in ([""] * 4, texts))
        with torch.no_grad():
            L, *_ = losses_on_pairs(dpo_loss, batch_logprobs(model, longer), batch_logprobs(base, batch), batch.pairs,
                                    batch.better, 1.0)
        return L.view(4, 6, 2).mean(1)

    L = losses(records[2]["lam"])
    assert records[2]["losses"] == pytest.approx(L.mean(0).tolist(), rel=1e-4)
    assert records[2]["loss"] == pytest.approx((torch.tensor(records[2]["lam"]) * L).sum(1).mean().item(), rel=1e-4)
    assert not np.allclose(losses(records[2]["lam"][::-1]).mean(0), L.mean(0), rtol=1e-4)     # wrong: other rows' texts

    # evaluated with the same text, at any λ
    (r,) = eval_front.main(eval_front.Flags(runs=[str(run)], parts=4, device="cpu"))
    assert np.shape(r["J"]) == (5, 2) and r["regret"] > 0 and r["label"] == "Prompted λ"
    load_adapter(model, run / "adapter.safetensors")
    x = toy.prompts("new_verbs")[2]
    text = tokenize([toy.as_row("0.25 0.75\n" + x, toy.responses(x))], tokenizer, 256)[0]
    with torch.no_grad():
        expected = batch_logprobs(model, pack(text))
    lams = torch.tensor([[0.75, 0.25], [0.25, 0.75]])
    world = measure.world_batches(toy.prompts("new_verbs"), tokenizer, "cpu")
    other, got = (measure.world_logprobs(policy, world)[2] for _, policy in measure.policies(run, config, base, lams))
    assert torch.allclose(got.float(), expected, atol=1e-4) and not torch.allclose(other, got, atol=1e-3)


def test_the_preference_part_alone(panacea):
    """--lora_dim 0: two singular values, both λ's; the run goes on after a kill and is evaluated."""
    run = go("train_dpo", "k0", lora_dim=0, steps=6, save_every=1, lr=3e-2)
    state, header = load_file(run / "adapter.safetensors"), read_adapter_header(run / "adapter.safetensors")
    assert all(v.shape == (0,) for k, v in state.items() if k.endswith("sigma"))
    assert all(v.shape[1] == 2 for k, v in state.items() if k.endswith(".U")) and header["gain"] == 64
    assert all(v != 0 for k, v in state.items() if k.endswith(".s"))
    when = lambda record: record["step"] == 4
    cut = killed("train_dpo", "k0-killed", when, lora_dim=0, steps=6, save_every=1, lr=3e-2)
    assert timeless(go("train_dpo", cut.name, lora_dim=0, steps=6, save_every=1, lr=3e-2)) == timeless(run)
    (r,) = eval_front.main(eval_front.Flags(runs=[str(run)], parts=2, device="cpu"))
    assert r["J"][0] != r["J"][-1]
    baseline = load_file(go("train_dpo", "k0-rs", lora_dim=0, method="rs") / "adapter-helpful.safetensors")
    assert all(v.shape == (1,) for k, v in baseline.items() if k.endswith("sigma"))


def test_one_compromise_answers_every_preference():
    run = go("train_dpo", "compromise", method="dps", lam=[0.5, 0.5], lr=3e-2)
    assert [f.name for f in run.glob("adapter*")] == ["adapter-000.safetensors"]
    assert all(r["lam"] == [[0.5, 0.5]] for r in metrics(run)) and len(metrics(run)) == 4
    (r,) = eval_front.main(eval_front.Flags(runs=[str(run)], parts=4, device="cpu"))
    assert r["lams"] == [[i / 4, 1 - i / 4] for i in range(5)] and r["models"] == 1
    assert r["J"] == r["J"][:1] * 5 and r["J"][0] != r["base"]["J"] and r["spearman"] == [0, 0]
    gain = lambda lam, J: np.dot(lam, J) - np.dot(lam, r["base"]["J"])
    gains, best = ([gain(lam, J) for lam, J in zip(r["lams"], many)] for many in (r["J"], r["exact"]["at_lams"]["J"]))
    assert r["regret"] == pytest.approx(1 - sum(gains) / sum(best), rel=1e-6)
    assert r["regret"] != pytest.approx(1 - gains[2] / best[2], rel=0.01)                 # wrong: at its own λ alone


@pytest.mark.parametrize("aggregate, more", [("ls", {}), ("tche", {}), ("tche", dict(ideal=[0.6, 0.1]))])
def test_micro_batches_change_nothing(aggregate, more):
    """The second ideal is so low that a preference whose rows are elsewhere would count as a loss of −λ · ideal."""
    one, two = (metrics(go("train_dpo", f"{aggregate}{parts}-{len(more)}", aggregate=aggregate, accumulate=parts,
                           orth_coeff=1e-3, lr=8e-3, **more)) for parts in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert np.isclose(a["loss"], b["loss"], rtol=1e-5) and np.isclose(a["grad_norm"], b["grad_norm"], rtol=1e-3)
        assert np.allclose(a["losses"], b["losses"], rtol=1e-5)
        # an untrained adapter moves nothing: which of two rewards is larger is rounding then
        assert a["step"] < 3 or a["accuracy"] == b["accuracy"]
        assert a["tokens"] == b["tokens"] and a["flops"] == b["flops"]


def test_micro_batches_leave_the_gradient_of_tchebycheff():
    one, two = (gradients("train_dpo", f"gradient{parts}", aggregate="tche", ideal=[0.6, 0.1], accumulate=parts,
                          lr=1e-7) for parts in (1, 2))
    assert one.shape == two.shape and (one - two).norm() < 1e-5 * one.norm() and one.norm(dim=1).min() > 0


def test_options_do_something(panacea):
    last = {}
    for name, flags in {"orth": dict(orth_coeff=0.1), "fixed": dict(pref_scaling=0.1), "tche": dict(aggregate="tche"),
                        "ideal": dict(aggregate="tche", ideal=[0.3, 0.3]), "beta": dict(beta=0.5)}.items():
        last[name] = metrics(go("train_dpo", f"option-{name}", **flags))[-1]["loss"]
    assert len({round(x, 7) for x in [*last.values(), metrics(panacea)[-1]["loss"]]}) == 6
    adapter = load_file("out/option-fixed/adapter.safetensors")
    assert all(torch.equal(t, torch.tensor(0.1)) for k, t in adapter.items() if k.endswith(".s"))
    first = metrics(go("train_dpo", "option-one", aggregate="tche", ideal=[0.3, 0.3], steps=1))[0]
    assert first["loss"] == pytest.approx(np.mean([max(lam) for lam in first["lam"]]) * (math.log(2) - 0.3), rel=1e-4)


def test_ipo(panacea):
    """The loss starts at (1/(2β))²; its gradient is not DPO's; it learns."""
    run = go("train_dpo", "ipo", loss="ipo", steps=30)
    records = metrics(run)
    assert records[0]["losses"] == pytest.approx([0.25] * 2, abs=1e-4)
    assert records[0]["loss"] == pytest.approx(0.25, abs=1e-4)
    assert np.mean([r["losses"][0] for r in records[-8:]]) < 0.23      # its labels are clear ones
    assert read(run, "config.json")["objective"]["name"] == "ipo"
    assert all(r["lam"] == other["lam"] for r, other in zip(records, metrics(panacea)))           # the λ of DPO's run
    assert records[0]["grad_norm"] != pytest.approx(metrics(panacea)[0]["grad_norm"], rel=0.01)
    wide = metrics(go("train_dpo", "ipo-wide", loss="ipo", beta=0.25, steps=1))[0]
    assert wide["losses"] == pytest.approx([4, 4], rel=1e-5)


def test_dimensions_are_chosen_by_number_or_name():
    run = go("train_dpo", "dims", dims=["formal", "concise", "warm"], steps=1)
    assert read(run, "config.json")["dims"] == ["formal", "concise", "warm"]
    every = go("train_dpo", "every", pref_dim=len(toy.DIMS), steps=1)
    assert np.shape(metrics(every)[-1]["losses"]) == (len(toy.DIMS),)


def test_default_names_and_preferences():
    """Without --out the run is named after what it is; without --lams_per_step G is 4 for ls, 1 for tche."""
    run = train_dpo.main(train_dpo.Flags(steps=1, rows=8, responses=3, eval=False, device="cpu", aggregate="tche"))
    assert str(run).startswith("out/dpo-helpful-harmless-") and "aggregate=tche" in str(run)
    assert np.shape(metrics(run)[0]["lam"]) == (1, 2)
    run = train_dpo.main(train_dpo.Flags(steps=1, rows=8, responses=3, eval=False, device="cpu"))
    assert np.shape(metrics(run)[0]["lam"]) == (4, 2)


@pytest.mark.parametrize("flags", [dict(checkpoint=True), dict(precision="bf16"), dict(quantize="int8")])
def test_options_that_save_memory(panacea, flags):
    """--checkpoint changes nothing; another precision of the base changes the losses a little, and only that."""
    other = go("train_dpo", "-".join(["memory", *flags]), **flags)
    a, b = ([record["loss"] for record in metrics(run)] for run in (panacea, other))
    limit = 1e-6 if "checkpoint" in flags else 2e-2
    assert all(abs(x - y) < limit for x, y in zip(a, b)) and ("checkpoint" in flags or a != b)
    assert read(other, "timing.json")["dtype"] == ("bfloat16" if "precision" in flags else "float32")


# ---- files ----

def test_preference_files():
    own_rows("train.jsonl", 20)
    own_rows("eval.jsonl", 8)
    run = go("train_dpo", "files", init=BASE, data=["train.jsonl"], eval_data=["eval.jsonl"], lams_per_step=2, epochs=2,
             steps=None, eval=True)
    r = read(run, "front.json")
    assert len(metrics(run)) == 10 and r["exact"] is None and r["hypervolume_share"] is None
    assert len(r["lams"]) == 11 and r["points_are"] == "implicit-reward accuracy" and r["reference_point"] == [0, 0]
    assert abs(r["base"]["J"][0] + math.log(2)) < 1e-6 and r["base"]["scores"] == [0, 0]          # ties count as wrong
    assert all(0 <= x <= 1 for point in r["scores"] for x in point) and r["eval_labels"] == [8, 5]
    assert read(run, "config.json")["flags"]["beta"] == 0.1 and read(run, "config.json")["flags"]["lr"] == 1e-3


def test_files_are_read_in_batches_of_one_length(monkeypatch):
    """With --data the same rows come, in other company; the run still repeats."""
    own_rows("lengths.jsonl", 20)
    flags = dict(init=BASE, data=["lengths.jsonl"], lams_per_step=2)
    seen, real = [], batches.epoch_batch
    monkeypatch.setattr(batches, "epoch_batch", lambda *args: seen.append(args[-1]) or real(*args))
    runs = [go("train_dpo", f"lengths{i}", **flags) for i in range(2)]
    assert len(seen) == 8 and all(lengths is not None and len(lengths) == 20 for lengths in seen)
    assert (runs[0] / "adapter.safetensors").read_bytes() == (runs[1] / "adapter.safetensors").read_bytes()
    seen.clear()
    go("train_dpo", "lengths-world", steps=1)
    assert seen == [None]                                              # the embedded world's rows are alike


def test_missing_labels_keep_the_weight_of_lambda():
    """Half of the rows label one dimension, half the other: λ = (½, ½) weighs both alike, for any split into groups."""
    write_rows("half.jsonl", [{"prompt": "How do I clean a bicycle?", "response_0": "First look at every part.",
                               "response_1": "No.", "better": {"helpful": 0} if i % 2 else {"harmless": 1}}
                              for i in range(8)])
    for G in (1, 8):
        run = go("train_dpo", f"half{G}", init=BASE, data=["half.jsonl"], batch_size=8, lams_per_step=G, steps=1)
        assert np.allclose(metrics(run)[0]["losses"], math.log(2), atol=1e-5)
    assert abs(metrics(go("train_dpo", "half1", init=BASE, data=["half.jsonl"], batch_size=8, lams_per_step=1,
                          steps=1))[0]["loss"] - math.log(2)) < 1e-5   # not half of it
    write_rows("one.jsonl", [{"prompt": f"How do I clean a bicycle {i}?", "response_0": "Look.", "response_1": "No.",
                              "better": {"helpful": 0} if i % 4 else {"harmless": 1}} for i in range(8)])
    records = metrics(go("train_dpo", "one", init=BASE, data=["one.jsonl"], batch_size=2, lams_per_step=2, steps=4,
                         vertex_share=0))
    assert sorted(str(r["losses"][1]) == "None" for r in records)[-1]  # no label: no number
    assert all(np.isfinite(r["loss"]) and r["losses"][0] is not None for r in records)


def test_an_epoch_weighs_a_rare_dimension_by_lambda(close):
    """1 label of harmless in 20 rows, λ = (0, 1), (½, ½), (1, 0): over an epoch of 5 batches the mean gradient is that
    of Σ λ_i L_i. Rules out: division by the batch's own count, 0.2 of it for λ = (0, 1). A step without a label of
    harmless logs null."""
    few, whole, records = epoch_and_whole("train_dpo", 3, data=[one_label_in_twenty("rare.jsonl")], method="dps",
                                          dps_parts=2, lams_per_step=1)
    for mean, all_rows in zip(few, whole):
        assert all_rows.norm() > 0 and close(mean, all_rows, 1e-5)
    for key in ("losses", "accuracy"):
        assert [sum(r[key][i] is None for r in records) for i in (0, 1)] == [0, 12]        # 4 of 5 steps, 3 models


@pytest.mark.skipif(not SHARED.exists(), reason="../shared (the real preference data and the tiny Llama) is not here")
def test_real_model_and_real_preferences():
    material = SHARED / "material"
    lines = (material / "hh_safe/pku_saferlhf_train.jsonl").read_text(encoding="utf-8").splitlines()
    with open("pku.jsonl", "w", encoding="utf-8") as f:
        f.write("\n".join(lines[:12]) + "\n")
    run = go("train_dpo", "pku", init=str(material / "stories260K"), data=["pku.jsonl"], eval_data=["pku.jsonl"],
             max_length=96, lams_per_step=2, lr=2e-3, epochs=8, steps=None)
    assert abs(metrics(run)[0]["loss"] - math.log(2)) < 1e-4
    (r,) = eval_front.main(eval_front.Flags(runs=[str(run)], parts=1, device="cpu"))
    assert max(r["scores"][-1][0], r["scores"][0][1]) > 0.7            # it can fit the rows it has seen


# ---- bad input ----

BAD = {
    "unknown dimension": (dict(dims=["helpful", "kind"]), "choose each once among helpful harmless"),
    "too many dimensions": (dict(pref_dim=11), "has 10 dimensions"),
    "one dimension": (dict(pref_dim=1), "at least 2 dimensions"),
    "batch not divisible": (dict(batch_size=6, lams_per_step=4), "--batch_size 6 must be a multiple"),
    "micro-batches do not divide": (dict(accumulate=3), "of --accumulate 3"),
    "tche over micro-batches": (dict(aggregate="tche", lams_per_step=1, accumulate=2), "no preference may be split"),
    "ideal without tche": (dict(ideal=[0.1, 0.1]), "only with --aggregate tche"),
    "ideal out of reach": (dict(aggregate="tche", ideal=[0.1, 0.7]), "--ideal takes losses from 0 to below 0.6931"),
    "data without base": (dict(data=["x.jsonl"]), "--data needs --init"),
    "data without evaluation data": (dict(data=["x.jsonl"], init=BASE, eval=True), "--data needs --eval_data"),
    "no such base": (dict(init="nowhere"), "config.json does not exist"),
    "a base of no world": (dict(init=ELSEWHERE["init"]), "--init needs --data: out/base-of-no-world does not know the"),
    "no such file": (dict(init=BASE, data=["nowhere.jsonl"]), "nowhere.jsonl: cannot be read"),
    "no such evaluation file": (dict(init=BASE, data=["repeat.jsonl"], eval_data=["nowhere.jsonl"], eval=True),
                                "nowhere.jsonl: cannot be read"),
    "no such device": (dict(device="tpu9"), "--device tpu9"),
    "no steps": (dict(steps=0), "--steps 0: must be at least 1"),
    "prompt with files": (dict(method="prompt", data=["x.jsonl"], init=BASE), "prompt is for the embedded world"),
    "lam without dps": (dict(lam=[0.5, 0.5]), "the one preference of --method dps"),
    "lam off the simplex": (dict(method="dps", lam=[0.7, 0.7]), "sums to 1"),
    "too few steps": (dict(method="dps", steps=5), "shared by 11 models"),
    "beta not positive": (dict(beta=0), "--beta 0.0: must be positive"),
    "learning rate not a number": (dict(lr="nan"), "--lr nan: must be positive"),
    "share": (dict(vertex_share=1.5), "--vertex_share 1.5: must be between 0 and 1"),
    "too many responses": (dict(responses=9), "has 8 to a prompt"),
    "another tokenizer": (dict(tokenizer="gpt2"), "gpt2"),
    "fsdp alone": (dict(parallel="fsdp"), "start it with torchrun"),
    "a directory of something else": (dict(out=BASE), "holds no run of train_dpo.py"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(monkeypatch, capsys, case):
    own_rows("repeat.jsonl", 12)
    flags, text = BAD[case]
    refused("train_dpo", flags, text, monkeypatch, capsys, several=True)


def test_bad_input_as_a_user_meets_it(work):
    done = command("train_dpo", "--pref_dim", 1, "--out", "out/bad", cwd=work, status=2)
    assert done.stderr == "error: a front needs at least 2 dimensions: --pref_dim 2, or two names after --dims\n"
    assert not (work / "out/bad").exists()


def test_a_loss_that_is_not_finite_ends_the_run_in_one_line(monkeypatch):
    """After step 2; the checkpoint of the step before stays."""
    real, calls = train_dpo.losses_on_pairs, []

    def some(*args):
        losses, correct, known = real(*args)
        calls.append(1)
        return losses * (math.nan if len(calls) == 3 else 1), correct, known

    monkeypatch.setattr(train_dpo, "losses_on_pairs", some)
    with pytest.raises(UserError, match="^adapter, step 3: the loss is nan; lower --lr or --lora_scaling$"):
        go("train_dpo", "nan", save_every=1)
    monkeypatch.undo()


# ---- arithmetic ----

def test_a_step_counts_its_own_tokens():
    """tokens and FLOPs of a step, from its rows packed again."""
    run = go("train_dpo", "counted", steps=2, rows=16, batch_size=8, lams_per_step=8, accumulate=2)
    rows = toy.sample_pairs("train", ["helpful", "harmless"], 16, 4, generator_for(0, "pairs"))
    rows = tokenize(rows, load_tokenizer("toy"), 256)[0]
    adapter = 2 * 10 * (4 * (64 + 64) + 2 * (64 + 256))                # U and V of rank 8 + 2, in two blocks
    blocks, V = 2 * 12 * 64 ** 2, load_tokenizer("toy").vocab_size
    for step, record in enumerate(metrics(run)):
        batch = pack([rows[j] for j in epoch_batch(16, 8, 0, step).tolist()])
        assert record["tokens"] == batch.size[0] < batch.tokens.numel()      # wrong: padding among them
        assert record["flops"] == (4 * (blocks * record["tokens"] + V * 64 * len(batch.targets))
                                   + 6 * adapter * record["tokens"])


def test_two_threads_repeat_bit_for_bit():
    """At full batch size and with two threads: a gradient accumulated in a free order would differ in the last bits."""
    rows = toy.sample_pairs("train", ["helpful", "harmless"], 8, 8, torch.Generator().manual_seed(3))
    batch = pack(tokenize(rows, load_tokenizer("toy"), 256)[0])
    model = Transformer(Config(load_tokenizer("toy").vocab_size, 256, n_layer=2, n_head=4, d_model=128))
    model.init_weights(torch.Generator().manual_seed(0))
    inject_svd_lora(model, 8, 2, generator=torch.Generator().manual_seed(4))
    set_preference(model, torch.tensor([[0.3, 0.7]] * 8))
    parameters, threads = [p for p in model.parameters() if p.requires_grad], torch.get_num_threads()
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


def test_keep_adds_what_the_reference_rules_out():
    """At the first step π is π_ref: beside the DPO loss stands its own mass on tokens below 1e-3, per response."""
    plain, kept, halves = (metrics(go("train_dpo", f"keep{keep}{parts}", keep=keep, accumulate=parts, lams_per_step=4,
                                      lr=8e-3)) for keep, parts in ((0.0, 1), (2.0, 1), (2.0, 2)))
    rows = toy.sample_pairs("train", ["helpful", "harmless"], 24, 4, generator_for(0, "pairs"))
    chosen = [rows[j] for j in epoch_batch(24, 4, 0, 0).tolist()]
    batch, model = pack(tokenize(chosen, load_tokenizer("toy"), 256)[0]), Transformer.from_pretrained(BASE)
    with torch.no_grad():
        p = (predicting_states(model, batch) @ model.head_weight.T).softmax(-1)
    astray = -(p * (p >= 1e-3)).sum(1).log().sum().item() / 16
    assert astray > 1e-3 and kept[0]["loss"] - plain[0]["loss"] == pytest.approx(2 * astray, rel=1e-2)
    assert kept[0]["losses"] == plain[0]["losses"] and kept[3]["losses"] != plain[3]["losses"]
    for a, b in zip(kept, halves, strict=True):
        assert np.isclose(a["loss"], b["loss"], rtol=1e-5) and np.isclose(a["grad_norm"], b["grad_norm"], rtol=1e-3)


def test_another_base_with_the_world_s_tokenizer_is_trained_on_the_world(capsys):
    go("train_dpo", "of-no-world", **ELSEWHERE, steps=1)
    assert "data: the embedded world, which out/base-of-no-world was not made for" in capsys.readouterr().out
