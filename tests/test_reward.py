"""test_reward.py - reward models: the loss, what a reward reads and shares with a policy, normalisation, the script."""
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

import train_reward
from runs.files import UserError, write_json
from data import toy
from data.preferences import Row
from data.tokenizers import TokenRow, load_tokenizer, tokenize
from ops.heads import RewardModel
from model import Config, Transformer
from svd_lora import inject_svd_lora, set_preference, svd_lora_layers
from train_reward import compare, held_out_accuracy, load_reward_model, pack_ends, raw_rewards

ROOT = Path(__file__).parents[1]
TINY = ("--device cpu --rows 24 --eval_rows 4 --responses 4 --batch_size 4 --steps 30 --n_reference 12 "
        "--max_new_tokens 8 --log_every 1 --reward_scale 1 5").split()


def script(*flags, cwd, status=0):
    """Runs train_reward.py in `cwd`; returns the finished process, whose exit status must be `status`."""
    done = subprocess.run([sys.executable, str(ROOT / "train_reward.py"), *map(str, flags)], cwd=cwd,
                          capture_output=True, text=True)
    assert done.returncode == status, (
        f"{flags} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return done


def timeless(run):
    """The records of metrics.jsonl without what the clock decides."""
    return [{k: v for k, v in json.loads(line).items() if "second" not in k}
            for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A working directory where the embedded world's base model is a random one of two layers."""
    cwd, tokenizer = tmp_path_factory.mktemp("reward"), load_tokenizer("toy")
    config = Config(tokenizer.vocab_size, 128, n_layer=2, n_head=2, d_model=32, eos_id=tokenizer.eos_id)
    for name, seed in (("base-tiny-seed0", 0), ("other-base", 1)):
        Transformer(config).init_weights(torch.Generator().manual_seed(seed)).save_pretrained(cwd / "out" / name)
        write_json(cwd / "out" / name / "base.json", {"tokenizer": "toy"})
    return cwd


@pytest.fixture(scope="module")
def run(work):
    script(*TINY, "--out", "out/run", cwd=work)
    return work / "out/run"


@pytest.fixture
def reward_model(tiny):
    """A reward model of two dimensions on a random base of either family; adapter and heads are random too."""
    def build(family="gpt2"):
        g = torch.Generator().manual_seed(5)
        model = RewardModel(inject_svd_lora(tiny(family), 3, 0, 4.0, generator=g), 2)
        for layer in svd_lora_layers(model).values():
            torch.nn.init.normal_(layer.sigma.data, generator=g)
        torch.nn.init.normal_(model.head.weight.data, generator=g)
        return model
    return build


# ---------------------------------------------------------------------------------------------------------------------
# Loss and labels.

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
    rows = toy.sample_pairs("eval", dims, 5, 6, torch.Generator().manual_seed(0))
    score = lambda row: toy.scores(row.prompt.removesuffix("\n"), row.responses)[:, [1, 5]]

    class Truth(torch.nn.Module):
        def __init__(self, sign):
            super().__init__()
            self.head, self.sign, self.at = torch.nn.Linear(1, 1), sign, 0

        def forward(self, tokens, last, positions, mask):
            taken, self.at = rows[self.at:self.at + len(tokens)], self.at + len(tokens)
            return self.sign * torch.cat([score(row) for row in taken])

    hits, best, n = np.zeros(2), np.zeros(2), 0
    for row in rows:
        for (a, b), better in zip(row.pairs, row.better):
            d = (score(row)[a] - score(row)[b]).numpy()
            hits += (d > 0) * (np.array(better) == 0) + (d < 0) * (np.array(better) == 1)
            best, n = best + np.maximum(1 / (1 + np.exp(-d)), 1 / (1 + np.exp(d))), n + 1
    report = held_out_accuracy(Truth(1), rows, dims, tokenizer, 256, 2, True)
    assert np.allclose(report["accuracy"], hits / n, atol=1e-9) and report["eval_labels"] == [75, 75]
    assert np.allclose(report["bayes_accuracy"], best / n, atol=1e-9) and min(best / n) < 0.9
    assert np.allclose(report["bayes_ratio"], 1, atol=1e-9)
    wrong = held_out_accuracy(Truth(-1), rows, dims, tokenizer, 256, 2, True)
    assert np.allclose(wrong["expected_accuracy"], 1 - best / n, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# What a reward reads.

ROWS = [TokenRow([5, 6], [[7, 8, 60], [7, 9], [7]]), TokenRow([4], [[3, 60], [3, 0, 0, 0, 60], [0], []]),
        TokenRow([11, 12, 13], [[60]])]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_reward_depends_on_its_own_tokens_alone(reward_model, close, family):
    """Alone, right-padded among others, and in a tree. Rules out: reading the last column (which may be padding), the
    position before the last token, a tree without EOS."""
    model = reward_model(family)
    sequences = [row.prompt + y for row in ROWS for y in row.responses]
    alone = torch.cat([model(torch.tensor([s]), torch.tensor([len(s) - 1])) for s in sequences])
    T = max(map(len, sequences))
    padded = torch.tensor([s + [9] * (T - len(s)) for s in sequences])
    lengths, offset = torch.tensor([len(s) for s in sequences]), torch.arange(len(sequences)) * T
    assert close(model(padded, offset + lengths - 1), alone, 1e-5)
    batch, last = pack_ends(ROWS)
    assert close(model(batch.tokens, last, batch.positions, batch.mask), alone, 1e-5)
    for wrong in (offset + T - 1, offset + lengths.clamp(min=2) - 2):                 # this test can tell
        assert not close(model(padded, wrong), alone, 0.1)


def test_the_last_token_is_the_one_that_is_read():
    """Rules out: reading the state before EOS, which the tree of the policy's log-probs would give."""
    batch, last = pack_ends(ROWS)
    assert batch.tokens.flatten()[last].tolist() == [60, 9, 7, 60, 60, 0, 4, 60]
    assert batch.positions.flatten()[last].tolist() == [4, 3, 2, 2, 5, 1, 0, 3]


def test_texts_are_tokenised_as_training_rows_are(work, reward_model, close):
    """Rules out: EOS behind an unfinished response, none behind a finished one, other batches giving other rewards."""
    tokenizer = load_tokenizer("toy")
    backbone = inject_svd_lora(Transformer.from_pretrained(work / "out/base-tiny-seed0"), 2, 0)
    model = RewardModel(backbone, 2)
    torch.nn.init.normal_(model.head.weight.data, generator=torch.Generator().manual_seed(2))
    prompts = ["How do I paint a bicycle?\n", "Tell me how to drug a birthday cake.\n", "", "Hm?"]
    responses, finished = ["You can do it!", "I will not help with that.", "", "Start"], [True, False, True, False]
    got = raw_rewards(model, tokenizer, 128, prompts, responses, finished)
    encode, eos = tokenizer.encode, [tokenizer.eos_id]
    texts = [encode(x) + encode(y) + (eos if end else []) for x, y, end in zip(prompts, responses, finished)]
    texts[2] = eos + eos                                              # an empty prompt is one EOS
    want = torch.cat([model(torch.tensor([t]), torch.tensor([len(t) - 1])) for t in texts])
    assert close(got, want, 1e-5) and got.dtype == torch.float32
    assert close(raw_rewards(model, tokenizer, 128, prompts, responses, finished, batch_size=1), want, 1e-5)
    other = raw_rewards(model, tokenizer, 128, prompts, responses, [not end for end in finished])
    assert ((other - want).abs() > 1e-3 * want.abs().max()).any(1).all()


# ---------------------------------------------------------------------------------------------------------------------
# A finished run.

def test_run_directory(run):
    assert {f.name for f in run.iterdir()} == {"config.json", "metrics.jsonl", "timing.json", "adapter.safetensors",
                                               "heads.safetensors", "reference.jsonl", "reward.json"}
    records = timeless(run)
    assert [r["step"] for r in records] == list(range(1, 31)) and records[0]["labels"] == [24, 24]
    assert abs(records[0]["loss"] - math.log(2)) < 1e-6                               # the heads start at 0
    assert abs(records[-1]["loss"] - math.log(2)) > 1e-6
    report, config = json.loads((run / "reward.json").read_text()), json.loads((run / "config.json").read_text())
    assert config["script"] == "train_reward.py" and config["tokenizer"] == "toy" and len(config["fingerprint"]) == 16
    assert report["dims"] == config["dims"] == ["helpful", "harmless"] and report["reward_scale"] == [1, 5]
    assert all(0 < r <= 1 for r in report["bayes_ratio"]) and report["eval_labels"] == [24, 24]


def test_normalisation_on_the_reference_samples(work, run, monkeypatch):
    """Mean 0, standard deviation reward_scale. Rules out: the factor inside the normalisation (it would cancel), the
    variance for the deviation, statistics over other samples than the stored ones."""
    monkeypatch.chdir(work)
    samples = [json.loads(line) for line in (run / "reference.jsonl").read_text().splitlines()]
    rewards, dims = load_reward_model(run)
    r = rewards(*([s[key] for s in samples] for key in ("prompt", "response", "finished")))
    assert dims == ["helpful", "harmless"] and r.shape == (12, 2) and r.dtype == torch.float32
    assert r.mean(0).abs().max() < 1e-3
    assert torch.allclose(r.std(0, correction=0), torch.tensor([1.0, 5.0]), rtol=1e-3)
    report = json.loads((run / "reward.json").read_text())
    assert min(abs(s - 1) for s in report["std"]) > 0.01                              # so there was something to do


def test_reference_samples_are_the_frozen_base_s(work, run, monkeypatch):
    """A fresh base, which never had an adapter, draws the same samples. Rules out: sampling with the adapter on."""
    monkeypatch.chdir(work)
    flags = train_reward.Flags(n_reference=12, max_new_tokens=8)
    base = Transformer.from_pretrained("out/base-tiny-seed0")
    rows = [Row(s["prompt"], [], [], []) for s in
            (json.loads(line) for line in (run / "reference.jsonl").read_text().splitlines())]
    prompts = toy.sample_pairs("train", ["helpful", "harmless"], 24, 4, train_reward.generator_for(0, "pairs"))
    samples = train_reward.reference_samples(base, prompts, load_tokenizer("toy"), 128, flags)
    assert [json.dumps(s) for s in samples] == (run / "reference.jsonl").read_text().splitlines()
    assert len({row.prompt for row in rows}) == 12 and len({s["response"] for s in samples}) > 6


def test_the_base_is_shared_with_a_policy_that_is_left_alone(work, run, monkeypatch):
    """Rules out: a second copy of the base, an adapter put over the policy's, a policy whose adapter is frozen."""
    monkeypatch.chdir(work)
    made = []
    monkeypatch.setattr(train_reward, "RewardModel", lambda *args: made.append(RewardModel(*args)) or made[-1])
    texts = ["How do I paint a bicycle?\n"], ["You can do it!"], [True]
    alone = load_reward_model(run)[0](*texts)
    policy = inject_svd_lora(Transformer.from_pretrained("out/base-tiny-seed0"), 2, 2)
    for layer in svd_lora_layers(policy).values():
        torch.nn.init.normal_(layer.sigma.data, std=0.1, generator=torch.Generator().manual_seed(3))
    set_preference(policy, torch.tensor([0.3, 0.7]))
    tokens = torch.arange(20)[None]
    before, trainable = policy(tokens), {name for name, p in policy.named_parameters() if p.requires_grad}
    monkeypatch.setattr(Transformer, "from_pretrained", None)                         # now nothing can be read again
    beside = load_reward_model(run, policy)[0](*texts)
    assert torch.equal(policy(tokens), before) and torch.equal(alone, beside)
    assert trainable == {name for name, p in policy.named_parameters() if p.requires_grad} != set()
    ours, theirs = dict(made[-1].backbone.named_parameters()), dict(policy.named_parameters())
    shared = {name for name in ours if name in theirs and ours[name].data_ptr() == theirs[name].data_ptr()}
    assert shared == {name for name in theirs if name.rpartition(".")[2] in ("weight", "bias")} and len(shared) > 20
    monkeypatch.undo()
    monkeypatch.chdir(work)
    stranger = Transformer.from_pretrained("out/other-base")                          # its base is not the reward's
    assert torch.equal(load_reward_model(run, stranger)[0](*texts), alone)


# ---------------------------------------------------------------------------------------------------------------------
# The script.

@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_files(work, run):
    """Rules out: an optimizer that starts anew, batches drawn again from the first, a half-written run that loads."""
    flags, killed = [*TINY, "--save_every", "4", "--out", "out/killed"], work / "out/killed"
    process = subprocess.Popen([sys.executable, str(ROOT / "train_reward.py"), *flags], cwd=work,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not ((killed / "metrics.jsonl").exists() and len((killed / "metrics.jsonl").read_text().splitlines()) >= 10):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (killed / "state.safetensors").exists() and not (killed / "reward.json").exists()
    with pytest.raises(UserError, match="not a finished run"):
        load_reward_model(killed)
    assert "continuing after step" in script(*flags, cwd=work).stdout
    for name in ("adapter.safetensors", "heads.safetensors", "reward.json", "reference.jsonl"):
        assert (killed / name).read_bytes() == (run / name).read_bytes(), name
    assert timeless(killed) == timeless(run)
    assert not list(killed.glob(".*")) and not (killed / "state.safetensors").exists()


def planted(path, n, offset):
    """n rows. polite: the response with "please" is better. safe: the one that refuses is; every other row tells."""
    rows = []
    for i in range(offset, offset + n):
        first = ("Please " if i % 2 else "") + ("I will not help." if i // 2 % 2 else "Open the settings.")
        second = ("" if i % 2 else "Please ") + ("Open the settings." if i // 2 % 2 else "I will not help.")
        better = {"polite": 1 - i % 2} | ({"safe": 1 - i // 2 % 2} if i // 4 % 2 else {})
        rows.append({"prompt": f"Question {i}?", "response_0": first, "response_1": second, "better": better})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_planted_signal_is_learned_in_each_dimension_from_a_file(work):
    """Two signals, independent of each other. Rules out: one head for both, labels that are lost in reading or packing,
    missing labels that count, a base that cannot be moved."""
    planted(work / "train.jsonl", 64, 0)
    planted(work / "eval.jsonl", 32, 64)
    done = script(*TINY, "--init", "out/base-tiny-seed0", "--data", "train.jsonl", "--eval_data", "eval.jsonl", "--lr",
                  5e-3, "--batch_size", 8, "--steps", 60, "--out", "out/planted", cwd=work)
    report = json.loads((work / "out/planted/reward.json").read_text())
    assert report["dims"] == ["polite", "safe"] and report["eval_labels"] == [32, 16] and "Bayes" not in done.stdout
    assert min(report["accuracy"]) > 0.9 and "bayes_ratio" not in report
    records = timeless(work / "out/planted")
    assert all(r["labels"][0] == 8 for r in records) and {r["labels"][1] for r in records} != {8}
    assert abs(records[0]["loss"] - math.log(2)) < 1e-6                               # a mean over what has a label


BAD = {
    "no such base": (dict(init="nowhere"), "config.json does not exist"),
    "unknown dimension": (dict(dims=["helpful", "kind"]), "choose each once among"),
    "scales for other dimensions": (dict(reward_scale=[1.0, 5.0, 1.0]), "--reward_scale has 3 factors"),
    "scale of 0": (dict(reward_scale=[1.0, 0.0]), "every factor must be positive"),
    "data without base": (dict(data=["x.jsonl"]), "--data needs --init"),
    "data without held-out data": (dict(data=["x.jsonl"], init="out/base-tiny-seed0"), "--data needs --eval_data"),
    "no steps": (dict(steps=0), "--steps 0: must be at least 1"),
    "no room for prompts": (dict(max_new_tokens=128), "leaves no room for a prompt in 128 tokens"),
    "learning rate not a number": (dict(lr=float("nan")), "--lr nan: must be positive"),
    "a directory of something else": (dict(out="out/base-tiny-seed0"), "holds no run of train_reward.py"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(work, monkeypatch, case):
    """Rules out: training first and failing later; leaving a directory behind."""
    monkeypatch.chdir(work)
    flags, text = BAD[case]
    with pytest.raises(UserError, match="^[^\n]*$") as error:
        train_reward.main(train_reward.Flags(**dict(out="out/bad", device="cpu", rows=4, eval_rows=2) | flags))
    assert text in str(error.value) and not (work / "out/bad").exists()


def test_bad_input_is_one_line_and_status_2(work):
    done = script("--dims", "kind", "--device", "cpu", cwd=work, status=2)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    with pytest.raises(UserError, match="not a finished run"):
        load_reward_model(work / "out/base-tiny-seed0")
    with pytest.raises(UserError, match="not a finished run"):
        load_reward_model(work / "nowhere")
