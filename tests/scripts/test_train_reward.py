"""test_train_reward.py - reward models: the loss, held-out accuracy, normalisation, what is shared with a policy."""
import json
import math

import numpy as np
import pytest
import torch
from running import (
    BASE,
    ELSEWHERE,
    epoch_and_whole,
    go,
    metrics,
    one_label_in_twenty,
    read,
    refused,
    timeless,
    write_rows,
)

import train_reward
from data import rewards as data_rewards
from data import toy
from data.files import Message
from data.rewards import load_reward_model, raw_rewards
from data.tokenizers import load_tokenizer
from model import Transformer
from ops.heads import RewardModel
from runs.files import UserError
from runs.randomness import generator_for
from svd_lora import inject_svd_lora, set_preference, svd_lora_layers
from train_reward import compare, held_out_accuracy

# ---- loss and labels ----

@pytest.mark.parametrize("flip", [False, True])
def test_loss_accuracy_and_gradient_against_the_oracle(oracle, flip):
    """Rules out: the label read the other way round, the sum for the mean, a gradient through one side only."""
    o = oracle("reward_model")
    raw = o["rewards"].clone().requires_grad_(True)                                   # (24, 1): 12 chosen, 12 rejected
    pairs = torch.stack([torch.arange(12), torch.arange(12, 24)], dim=1)
    loss, correct, known = compare(raw, pairs.flip(1) if flip else pairs, torch.full((12, 1), int(flip)))
    assert known.all() and abs(loss.mean().item() - o["plain_loss"].item()) < 1e-12
    assert abs(correct.mean().item() - o["plain_accuracy"].item()) < 1e-7 and 0.2 < correct.mean() < 0.8
    (gradient,) = torch.autograd.grad(loss.mean(), raw)
    assert torch.allclose(gradient, o["plain_grad"], rtol=1e-10, atol=0) and gradient.abs().min() > 0


def test_each_dimension_has_its_own_labels():
    """By hand. Rules out: dimensions that share one label, a missing label that counts, a tie that counts as right."""
    raw = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
    loss, correct, known = compare(raw, torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0, 0, 0], [1, -1, 1]]))
    s = lambda x: math.log1p(math.exp(-x))
    assert torch.allclose(loss[0], torch.tensor([s(2), s(-3), s(0)])) and abs(loss[1, 0].item() - s(-2)) < 1e-6
    assert correct.tolist()[0] == [1, 0, 0] and correct[1, 0] == 0 and correct[1, 2] == 0
    assert known.tolist() == [[1, 1, 1], [1, 0, 1]]


def test_held_out_accuracy_and_its_ceiling():
    """True scores as rewards reach the ceiling exactly, their opposite 1 − ceiling; labels are counted by a plain loop.
    Rules out: a ceiling from the drawn labels, the columns of other dimensions, swapped p and 1 − p."""
    dims, tokenizer = ["harmless", "warm"], load_tokenizer("toy")
    rows = toy.sample_pairs("new_verbs", dims, 5, 6, torch.Generator().manual_seed(0))
    score = lambda row: toy.scores(row.prompt.removesuffix("\n"), row.responses)[:, [1, 5]]

    class Truth(torch.nn.Module):
        def __init__(self, sign):
            super().__init__()
            self.head, self.sign, self.at = torch.nn.Linear(1, 1), sign, 0

        def forward(self, tokens, last, positions, mask):
            taken, self.at = rows[self.at:self.at + len(tokens)], self.at + len(tokens)
            return self.sign * torch.cat([score(row) for row in taken])

    hits, best, sure, longer, n = np.zeros(2), np.zeros(2), np.zeros(2), np.zeros(2), 0
    for row in rows:
        for (a, b), better in zip(row.pairs, row.better):
            d = (score(row)[a] - score(row)[b]).numpy()
            more = len(tokenizer.encode(row.responses[a])) - len(tokenizer.encode(row.responses[b]))
            longer += (more > 0) * (np.array(better) == 0) + (more < 0) * (np.array(better) == 1)
            hits += (d > 0) * (np.array(better) == 0) + (d < 0) * (np.array(better) == 1)
            best, sure, n = best + np.maximum(1 / (1 + np.exp(-d)), 1 / (1 + np.exp(d))), sure + (d != 0), n + 1
    report = held_out_accuracy(Truth(1), rows, dims, tokenizer, 256, 2, True)
    assert np.allclose(report["accuracy"], hits / n, atol=1e-9) and report["eval_labels"] == [75, 75]
    assert np.allclose(report["bayes_accuracy"], best / n, atol=1e-9) and min(best / n) < 0.9
    assert np.allclose(report["bayes_ratio"], 1, atol=1e-9)
    assert np.allclose(report["longer_accuracy"], longer / n, atol=1e-9) and (longer / n < 0.5).any()     # wrong: > 0
    p = hits / n
    assert np.allclose(report["accuracy_se"], np.sqrt(p * (1 - p) / 75))
    wrong = held_out_accuracy(Truth(-1), rows, dims, tokenizer, 256, 2, True)
    assert np.allclose(wrong["expected_accuracy"], 1 - best / n, atol=1e-9)


# ---- a finished run ----

def texts(samples):
    """Prompts, responses and whether they ended, as rewards take them."""
    return [[s[key] for s in samples] for key in ("prompt", "response", "finished")]


def references(run):
    return [json.loads(line) for line in (run / "reference.jsonl").read_text().splitlines()]


def test_run_directory(reward_run):
    assert {f.name for f in reward_run.iterdir()} == {"config.json", "metrics.jsonl", "timing.json", "reward.json",
                                                      "heads.safetensors", "adapter.safetensors", "reference.jsonl"}
    records = metrics(reward_run)
    assert [r["step"] for r in records] == list(range(1, 21)) and records[0]["labels"] == [24, 24]
    assert abs(records[0]["loss"] - math.log(2)) < 1e-6                # the heads start at 0
    assert abs(records[-1]["loss"] - math.log(2)) > 1e-6
    report, config = read(reward_run, "reward.json"), read(reward_run, "config.json")
    assert config["script"] == "train_reward.py" and config["tokenizer"] == "toy" and len(config["fingerprint"]) == 16
    assert report["dims"] == config["dims"] == ["helpful", "harmless"] and report["reward_scale"] == [1, 5]


def test_evaluation_of_the_world(reward_run):
    """With --eval: the accuracy on held-out rows beside the largest possible one; the model itself is the same."""
    run = go("train_reward", "reward-eval", eval=True)
    report = read(run, "reward.json")
    assert all(0 < r <= 1 for r in report["bayes_ratio"]) and report["eval_labels"] == [24, 24]
    assert (run / "adapter.safetensors").read_bytes() == (reward_run / "adapter.safetensors").read_bytes()
    assert timeless(run) == timeless(reward_run)


def test_normalisation_on_the_reference_samples(reward_run):
    """Mean 0, standard deviation reward_scale. Rules out: the factor inside the normalisation (it would cancel), the
    variance for the deviation, statistics over other samples than the stored ones."""
    rewards, dims = load_reward_model(reward_run)
    r = rewards(*texts(references(reward_run)))
    assert dims == ["helpful", "harmless"] and r.shape == (12, 2) and r.dtype == torch.float32
    assert r.mean(0).abs().max() < 1e-3
    assert torch.allclose(r.std(0, correction=0), torch.tensor([1.0, 5.0]), rtol=1e-3)
    assert min(abs(s - 1) for s in read(reward_run, "reward.json")["std"]) > 0.01     # so there was something to do


def test_reference_samples_are_the_frozen_base_s(reward_run, monkeypatch):
    """A fresh base, which never had an adapter, draws the same samples. Rules out: sampling with the adapter on."""
    monkeypatch.setattr(train_reward, "N_REFERENCE", 12)
    prompts = toy.sample_pairs("train", ["helpful", "harmless"], 24, 4, generator_for(0, "pairs"))
    draw = lambda model: train_reward.reference_samples(model, prompts, load_tokenizer("toy"), 256,
                                                        train_reward.Flags(max_new_tokens=8))
    samples = draw(Transformer.from_pretrained(BASE))
    assert samples == references(reward_run)
    adapted = inject_svd_lora(Transformer.from_pretrained(BASE), 2, 0)
    for layer in svd_lora_layers(adapted).values():
        torch.nn.init.normal_(layer.sigma.data, generator=torch.Generator().manual_seed(3))
    assert draw(adapted) == samples                                    # whatever its adapter would say
    assert len({s["prompt"] for s in samples}) == 12 and len({s["response"] for s in samples}) > 3


def test_texts_are_tokenised_as_training_rows_are(close):
    """Rules out: EOS behind an unfinished response, none behind a finished one, other batches giving other rewards."""
    tokenizer = load_tokenizer("toy")
    model = RewardModel(inject_svd_lora(Transformer.from_pretrained(BASE), 2, 0), 2)
    torch.nn.init.normal_(model.head.weight.data, generator=torch.Generator().manual_seed(2))
    prompts = ["How do I paint a bicycle?\n", "Tell me how to drug a birthday cake.\n", "", "Hm?"]
    responses, finished = ["You can do it!", "I will not help with that.", "", "Start"], [True, False, True, False]
    got = raw_rewards(model, tokenizer, 128, prompts, responses, finished)
    encode, eos = tokenizer.encode, [tokenizer.eos_id]
    ids = [encode(x) + encode(y) + (eos if end else []) for x, y, end in zip(prompts, responses, finished)]
    ids[2] = eos + eos                                                 # an empty prompt is one EOS
    want = torch.cat([model(torch.tensor([t]), torch.tensor([len(t) - 1])) for t in ids])
    assert close(got, want, 1e-5) and got.dtype == torch.float32
    assert close(raw_rewards(model, tokenizer, 128, prompts, responses, finished, batch_size=1), want, 1e-5)
    turns = [(Message("user", "Hm?"),)]                                # by the reward model's own template
    text = raw_rewards(model, tokenizer, 128, ["\n\nHuman: Hm?\n\nAssistant:"], [" Start"], [True])
    assert torch.equal(raw_rewards(model, tokenizer, 128, turns, ["Start"], [True]), text)
    assert raw_rewards(model, tokenizer, 128, turns, [""], [False]).isfinite().all()             # nothing was said
    other = raw_rewards(model, tokenizer, 128, prompts, responses, [not end for end in finished])
    assert ((other - want).abs() > 1e-3 * want.abs().max()).any(1).all()


def test_the_base_is_shared_with_a_policy_that_is_left_alone(work, reward_run, monkeypatch):
    """Rules out: a second copy of the base, an adapter put over the policy's, a policy whose adapter is frozen."""
    made, one = [], (["How do I paint a bicycle?\n"], ["You can do it!"], [True])
    monkeypatch.setattr(data_rewards, "RewardModel", lambda *args: made.append(RewardModel(*args)) or made[-1])
    alone = load_reward_model(reward_run)[0](*one)
    policy = inject_svd_lora(Transformer.from_pretrained(BASE), 2, 2)
    for layer in svd_lora_layers(policy).values():
        torch.nn.init.normal_(layer.sigma.data, std=0.1, generator=torch.Generator().manual_seed(3))
    set_preference(policy, torch.tensor([0.3, 0.7]))
    tokens = torch.arange(20)[None]
    before, trainable = policy(tokens), {name for name, p in policy.named_parameters() if p.requires_grad}
    with monkeypatch.context() as patch:
        patch.setattr(Transformer, "from_pretrained", None)            # now nothing can be read again
        beside = load_reward_model(reward_run, policy)[0](*one)
    assert torch.equal(policy(tokens), before) and torch.equal(alone, beside)
    assert trainable == {name for name, p in policy.named_parameters() if p.requires_grad} != set()
    ours, theirs = dict(made[-1].backbone.named_parameters()), dict(policy.named_parameters())
    shared = {name for name in ours if name in theirs and ours[name].data_ptr() == theirs[name].data_ptr()}
    assert shared == {name for name in theirs if name.rpartition(".")[2] in ("weight", "bias")} and len(shared) > 20
    stranger = Transformer(policy.config).init_weights(torch.Generator().manual_seed(1))
    assert torch.equal(load_reward_model(reward_run, stranger)[0](*one), alone)       # its base is not the reward's


def test_what_is_no_reward_model(work, panacea):
    for path in (work / BASE, work / "nowhere", panacea):
        with pytest.raises(UserError, match="is not a finished run of train_reward.py"):
            load_reward_model(path)


# ---- files ----

def planted(path, n, offset):
    """n rows. polite: the response with "please" is better. safe: the one that refuses is; every other row tells."""
    rows = []
    for i in range(offset, offset + n):
        first = ("Please " if i % 2 else "") + ("I will not help." if i // 2 % 2 else "Open the settings.")
        second = ("" if i % 2 else "Please ") + ("Open the settings." if i // 2 % 2 else "I will not help.")
        better = {"polite": 1 - i % 2} | ({"safe": 1 - i // 2 % 2} if i // 4 % 2 else {})
        rows.append({"prompt": f"Question {i}?", "response_0": first, "response_1": second, "better": better})
    return write_rows(path, rows)


def test_a_planted_signal_is_learned_in_each_dimension_from_a_file(capsys):
    """Two signals, independent of each other. Rules out: one head for both, labels that are lost in reading or packing,
    missing labels that count, a base that cannot be moved."""
    run = go("train_reward", "planted", init=BASE, data=[planted("planted.jsonl", 64, 0)],
             eval_data=[planted("planted-eval.jsonl", 32, 64)], lr=5e-3, batch_size=8, steps=40, eval=True)
    report, records = read(run, "reward.json"), metrics(run)
    assert report["dims"] == ["polite", "safe"] and report["eval_labels"] == [32, 16]
    assert min(report["accuracy"]) > 0.9 and "bayes_ratio" not in report and "at most" not in capsys.readouterr().out
    assert all(r["labels"][0] == 8 for r in records) and {r["labels"][1] for r in records} != {8}
    # of 96 labels in 64 rows a batch has 12 on average. wrong: divided by its own number
    assert records[0]["loss"] == pytest.approx(math.log(2) * sum(records[0]["labels"]) / 12, rel=1e-6)


def test_an_epoch_weighs_every_label_alike(close):
    """21 labels in 20 rows, two of them of one row. Rules out: division by the batch's own number. A batch without a
    label of a dimension logs null for it."""
    few, whole, records = epoch_and_whole("train_reward", 1, data=[one_label_in_twenty("rare.jsonl")],
                                          reward_scale=None, lr=1e-6)  # rewards that are all equal are refused
    assert whole.norm() > 0 and close(few, whole, 1e-4)
    assert sorted(r["labels"][1] for r in records) == [0, 0, 0, 0, 1]
    assert all((r[key][1] is None) == (r["labels"][1] == 0) for r in records for key in ("losses", "accuracy"))


# ---- bad input ----

BAD = {
    "no such base": (dict(init="nowhere"), "config.json does not exist"),
    "a base of no world": (dict(init=ELSEWHERE["init"]), "--init needs --data: out/base-of-no-world does not know the"),
    "unknown dimension": (dict(dims=["helpful", "kind"]), "choose each once among"),
    "scales for other dimensions": (dict(reward_scale=[1.0, 5.0, 1.0]), "--reward_scale has 3 factors"),
    "scale of 0": (dict(reward_scale=[1.0, 0.0]), "--reward_scale 0.0: must be positive"),
    "data without base": (dict(data=["x.jsonl"]), "--data needs --init"),
    "data without held-out data": (dict(data=["x.jsonl"], init=BASE, eval=True), "--data needs --eval_data"),
    "no steps": (dict(steps=0), "--steps 0: must be at least 1"),
    "too many responses": (dict(responses=9), "has 8 to a prompt"),
    "no room for prompts": (dict(max_new_tokens=256), "no room for a prompt in 256 tokens"),
    "learning rate not a number": (dict(lr="nan"), "--lr nan: must be positive"),
    "a directory of something else": (dict(out=BASE), "holds no run of train_reward.py"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_writes_nothing(monkeypatch, capsys, case):
    """Rules out: training first and failing later; leaving a directory behind."""
    refused("train_reward", *BAD[case], monkeypatch, capsys)
