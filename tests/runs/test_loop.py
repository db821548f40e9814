"""test_loop.py - runs.loop.Run by itself, on a model of one linear layer: steps, resuming, micro-batches, log."""
import json
import math
import signal
from types import SimpleNamespace

import pytest
import torch

from model import Config
from runs.directory import read_state_header
from runs.files import Stopped, UserError
from runs.loop import Log, Run, adamw, add_adapter, learning_rate
from runs.speed import model_flops
from svd_lora import set_preference, svd_lora_layers

CONFIG = Config(11, 16, n_layer=1, n_head=1, d_model=4)


def model_of(seed=0):
    """Three weights and a bias; it has a config, as every model that is trained has."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 1)
    model.config = CONFIG
    return model


def flags_of(**more):
    return SimpleNamespace(**dict(lr=0.1, warmup_ratio=0.0, max_grad_norm=100.0, log_every=1) | more)


def start(out, model, flags, steps=6, **more):
    """A Run of `model` with AdamW."""
    return Run(model, torch.optim.AdamW(model.parameters(), lr=flags.lr), out, "line", flags, steps, **more)


def loss_of(model, step, rows=slice(None)):
    """A regression on four rows that belong to the step."""
    g = torch.Generator().manual_seed(step)
    x, y = torch.randn(4, 3, generator=g), torch.randn(4, 1, generator=g)
    return (model(x[rows]) - y[rows]).square().sum() / 4


def train(run, stop=None, kept=False):
    """Trains to the end, or until step number `stop` has been logged; returns the numbers of the steps it made."""
    done = []
    for step in run.steps():
        done.append(step)
        if kept:
            run.kept["most"] = max(step, run.kept.get("most", 0))
        run.update(loss_of(run.model, step))
        run.log(10, 5, note=step)
        if step == stop:
            break
    return done


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---- learning rate, adapters, optimizer ----

def test_the_learning_rate_rises_and_falls():
    rates = [learning_rate(step, 100, 2.0, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(2) == rates[10]
    assert rates[55] == pytest.approx(1)                      # half of the way down
    assert all(a > b for a, b in zip(rates[10:], rates[11:])) and 0 < rates[99] < 0.01
    assert learning_rate(0, 1, 2.0, 0.0) == 2.0               # a single step is made at the peak


def test_every_step_has_its_rate(tmp_path):
    model, seen = model_of(), []
    run = start(tmp_path, model, flags_of(warmup_ratio=0.5))
    for step in run.steps():
        seen.append([group["lr"] for group in run.optimizer.param_groups])
        run.update(loss_of(model, step))
        run.log(1, 1)
    assert seen == [[learning_rate(step, 6, 0.1, 0.5)] for step in range(6)]
    assert [r["lr"] for r in records(tmp_path)] == [rate for rate, in seen]


@pytest.mark.parametrize("lora_dim, m, more, rank, gain", [
    (4, 2, {}, 6, 2), (4, 0, {}, 5, 2),                                  # Panacea, a baseline
    (4, 0, {"more": 2}, 6, 2),                                           # a prompted λ: Panacea's rank, all learned
    (0, 2, {}, 2, 1), (0, 0, {}, 1, 1)])                                 # the preference part alone: the default's gain
def test_adapters_of_every_method_have_one_gain(tiny, lora_dim, m, more, rank, gain):
    flags = SimpleNamespace(lora_dim=lora_dim, lora_scaling=8.0, seed=0, weight_decay=0.1, lr=1e-3, values_lr=4.0)
    model, other = tiny().requires_grad_(False), tiny().requires_grad_(False)
    add_adapter(model, flags, m, **more)
    add_adapter(other, flags, m, member=1, **more)
    layers = list(svd_lora_layers(model).values())
    assert all((layer.U.shape[1], len(layer.sigma), layer.m) == (rank, rank - m, m) for layer in layers)
    assert all(layer.gain == pytest.approx(gain) for layer in layers)
    assert not torch.equal(layers[0].U, next(iter(svd_lora_layers(other).values())).U)
    head = torch.nn.Linear(32, 2, bias=False)
    groups = adamw(model, flags, head=head).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for layer in layers for p in (layer.U, layer.V)} | {id(head.weight)}
    hurried = {id(p) for group in groups if group.get("times", 1) == 4 for p in group["params"]}
    assert hurried == {id(p) for layer in layers for p in (layer.sigma, layer.s) if isinstance(p, torch.nn.Parameter)}


def test_sigma_and_s_have_a_learning_rate_of_their_own(tmp_path, tiny):
    """Wrong: one rate for all, or one that the schedule forgets."""
    model, flags = tiny().requires_grad_(False), flags_of(lora_dim=2, lora_scaling=2.0, seed=0, weight_decay=0.0,
                                                          values_lr=10.0)
    add_adapter(model, flags, 2)
    optimizer, rates = adamw(model, flags), []
    run = Run(model, optimizer, tmp_path, "adapter", flags, 3, ["a", "b"])
    for _ in run.steps():
        rates.append([group["lr"] for group in optimizer.param_groups])
        run.norm = 0.0
        run.log(1, 1)
    peak = [learning_rate(step, 3, flags.lr, flags.warmup_ratio) for step in range(3)]
    assert rates == [[rate, 10 * rate] for rate in peak] and peak[0] > peak[2]


# ---- steps ----

def test_a_step_is_the_optimizers(tmp_path):
    """Against a plain loop: clipped gradient, AdamW, the rate of the step."""
    model, plain = model_of(), model_of()
    run, optimizer = start(tmp_path, model, flags_of(max_grad_norm=0.5)), torch.optim.AdamW(plain.parameters())
    assert train(run) == list(range(6))
    for step, record in enumerate(records(tmp_path)):
        loss = loss_of(plain, step)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = learning_rate(step, 6, 0.1, 0.0)
        optimizer.step()
        optimizer.zero_grad()
        assert (record["step"], record["member"], record["note"]) == (step + 1, 0, step)
        assert record["loss"] == loss.item() and record["grad_norm"] == norm.item() > 0.5
        assert record["tokens"] == 10 and record["seconds"] > 0
        assert record["flops"] == model_flops(CONFIG, 10, 5)
    assert torch.equal(weights(model), weights(plain))


def test_gradients_that_are_there_already(tmp_path):
    """update(None): what MGDA wrote into .grad is clipped and used; the loss is logged as 0."""
    model, plain = model_of(), model_of()
    run = start(tmp_path, model, flags_of(), steps=1)
    for _ in run.steps():
        loss_of(model, 0).backward()
        run.update(None)
        run.log(1, 1)
    train(start(tmp_path / "plain", plain, flags_of(), steps=1))
    assert torch.equal(weights(model), weights(plain)) and records(tmp_path)[0]["loss"] == 0


@pytest.mark.parametrize("stop, since", [(2, 2), (3, 4), (5, 6)])
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, stop, since):
    """Checkpoints after steps 2, 4 and 6; a kill within a step, before it is kept, loses that step."""
    flags, whole = flags_of(save_every=2), model_of()
    train(start(tmp_path / "whole", whole, flags), kept=True)
    run = start(tmp_path, model_of(), flags, member=3)
    for step in run.steps():
        run.kept["most"] = step
        run.update(loss_of(run.model, step))
        if step == stop:
            break
        run.log(10, 5, note=step)
    header = read_state_header(tmp_path / "state.safetensors")
    kept = stop - stop % 2
    assert header == {"step": kept, "member": 3, "kept": {"most": kept - 1}}
    again = start(tmp_path, model_of(seed=9), flags, member=3, resume=header)         # what it has at first is replaced
    assert train(again, kept=True) == list(range(kept, 6)) and again.kept == {"most": 5}
    assert torch.equal(weights(again.model), weights(whole))
    assert read_state_header(tmp_path / "state.safetensors")["step"] == 6


def test_a_resumed_run_that_was_complete_makes_no_step(tmp_path):
    flags, model = flags_of(save_every=4), model_of()
    train(start(tmp_path, model, flags))
    again = start(tmp_path, model_of(seed=9), flags, resume=read_state_header(tmp_path / "state.safetensors"))
    assert train(again) == [] and torch.equal(weights(again.model), weights(model))


def test_a_critic_is_kept_beside_the_model(tmp_path):
    flags, critic, other = flags_of(save_every=1), model_of(1), model_of(2)
    with_critic = lambda model, critic, **more: start(
        tmp_path, model, flags, steps=2, critic=critic, critic_optimizer=torch.optim.SGD(critic.parameters(), lr=0.1,
                                                                                         momentum=0.9), **more)
    run = with_critic(model_of(), critic)
    for step in run.steps():
        loss_of(critic, step).backward()
        run.optimizers[1].step()
        run.update(loss_of(run.model, step))
        run.log(1, 1)
    resumed = with_critic(model_of(5), other, resume=read_state_header(tmp_path / "state.safetensors"))
    assert train(resumed) == [] and torch.equal(weights(other), weights(critic))
    momentum = [o.optimizers[1].state_dict()["state"][0]["momentum_buffer"] for o in (run, resumed)]
    assert torch.equal(*momentum) and momentum[0].any()
    assert not any(name.startswith("critic.") for name, _ in run.trained)             # it is not clipped with the model


@pytest.mark.parametrize("bad, message", [
    ("loss", "line, step 3: the loss is nan; lower --lr"),
    ("gradient", "line, step 3: the gradient's norm is inf; lower --lr")])
def test_what_is_not_finite_stops_before_anything_is_changed(tmp_path, bad, message):
    model = model_of()
    run = start(tmp_path, model, flags_of(save_every=1))
    with pytest.raises(UserError) as error:
        for step in run.steps():
            before = weights(model)
            loss = loss_of(model, step)
            if step == 2:                                     # the slope of a root at 0 is infinite, its value is not
                nothing = (model.weight - model.weight.detach()).sum()
                loss = loss * math.nan if bad == "loss" else loss + nothing.sqrt()
            run.update(loss)
            run.log(1, 1)
    assert str(error.value) == message
    assert torch.equal(weights(model), before) and len(records(tmp_path)) == 2
    assert read_state_header(tmp_path / "state.safetensors")["step"] == 2


def test_weights_that_an_update_made_infinite_are_not_kept(tmp_path):
    """In the last step too, and a critic's. Wrong: a check of loss and gradient alone, which were finite."""
    flags = flags_of(save_every=1, critic_lr=0.1)
    for step, of in ((3, "model"), (5, "model"), (5, "critic")):
        out, model, critic = tmp_path / f"{of}{step}", model_of(), model_of(1)
        run = start(out, model, flags, critic=critic, critic_optimizer=torch.optim.SGD(critic.parameters(), lr=0.1))
        with pytest.raises(UserError) as error:
            for now in run.steps():
                run.update(loss_of(model, now))
                run.log(1, 1)
                if now == step:
                    (model if of == "model" else critic).weight.data[0, 1] = math.inf
        said = ("weights' norm is inf; lower --lr" if of == "model" else "critic's norm is inf; lower --critic_lr")
        assert str(error.value) == f"line, step {step + 1}: the {said}"
        assert read_state_header(out / "state.safetensors")["step"] == step           # the last good ones are


def test_a_number_that_is_none_is_not_logged(tmp_path):
    run = start(tmp_path, model_of(), flags_of())
    with pytest.raises(UserError, match="^line, step 1: the value_loss is nan; lower --critic_lr$"):
        for step in run.steps():
            run.update(loss_of(run.model, step))
            run.log(1, 1, value_loss=math.nan)
    assert not (tmp_path / "metrics.jsonl").exists()


# ---- signals ----

@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_after_the_step_with_a_checkpoint(tmp_path, number, status):
    """Between checkpoints; the run goes on bit for bit. Wrong: an end in the middle of a step, or none."""
    flags, whole, before = flags_of(save_every=5), model_of(), signal.getsignal(number)
    train(start(tmp_path / "whole", whole, flags))
    run = start(tmp_path, model_of(), flags)
    with pytest.raises(Stopped) as stopped:
        for step in run.steps():
            if step == 2:
                signal.raise_signal(number)
            run.update(loss_of(run.model, step))
            run.log(10, 5, note=step)
    assert stopped.value.args == ("stopped after step 3 of line; the same command goes on", status)
    assert signal.getsignal(number) is before
    header = read_state_header(tmp_path / "state.safetensors")
    again = start(tmp_path, model_of(seed=9), flags, resume=header)
    assert header["step"] == 3 and train(again) == [3, 4, 5]
    assert torch.equal(weights(again.model), weights(whole)) and len(records(tmp_path)) == 6


@pytest.mark.parametrize("name, steps, title", [("adapter", 6, "training"), ("adapter-000", 6, "training"),
                                                ("adapter-helpful", 3, "adapter-helpful"), ("reward", 6, "training"),
                                                ("samples", 6, "samples")])
def test_one_model_is_called_training(tmp_path, name, steps, title):
    """Wrong: a number, or a file's name, where there is no other model."""
    model, flags = model_of(), flags_of(steps=6)
    run = Run(model, torch.optim.AdamW(model.parameters(), lr=flags.lr), tmp_path, name, flags, steps)
    with pytest.raises(Stopped) as stopped:
        for step in run.steps():
            signal.raise_signal(signal.SIGINT)
            run.update(loss_of(model, step))
            run.log(1, 1)
    of = "" if title == "training" else f" of {title}"
    assert stopped.value.args[0] == f"stopped after step 1{of}; the same command goes on" and run.title == title


def test_a_second_signal_ends_at_once(tmp_path):
    run, done = start(tmp_path, model_of(), flags_of(save_every=5)), []
    signal.signal(signal.SIGINT, signal.default_int_handler)           # a shell's background processes ignore it
    with pytest.raises(KeyboardInterrupt) as stopped:
        for step in run.steps():
            signal.raise_signal(signal.SIGINT)
            done.append(step)
            signal.raise_signal(signal.SIGINT)
            done.append(step)
    assert done == [0] and not isinstance(stopped.value, Stopped)


# ---- micro-batches ----

def test_micro_batches_add_up(tmp_path):
    """Four parts of one row each: the loss, the norm, the tokens and the weights of one part with all rows."""
    one, four = model_of(), model_of()
    train(start(tmp_path / "one", one, flags_of(max_grad_norm=0.5)))
    run, parts = start(tmp_path / "four", four, flags_of(max_grad_norm=0.5), parts=4), []
    for step in run.steps():
        parts.append((step, run.part, run.last_part))
        run.update(loss_of(four, step, slice(run.part, run.part + 1)))
        run.log(2.5, 1.25, note=step)
    assert parts == [(step, part, part == 3) for step in range(6) for part in range(4)]
    for a, b in zip(records(tmp_path / "four"), records(tmp_path / "one"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], 1e-5)
        assert (a["step"], a["tokens"], a["flops"], a["lr"]) == (b["step"], b["tokens"], b["flops"], b["lr"])
    assert torch.allclose(weights(four), weights(one), rtol=1e-4, atol=1e-6)


def test_a_penalty_counts_once(tmp_path):
    """However many parts a step has: it is no mean over rows."""
    ends = []
    for parts in (1, 4):
        model = model_of()
        run = start(tmp_path / str(parts), model, flags_of(), steps=1, parts=parts)
        for step in run.steps():
            rows = slice(None) if parts == 1 else slice(run.part, run.part + 1)
            run.update(loss_of(model, step, rows), 0.3 * model.weight.square().sum())
            run.log(1, 1)
        ends.append((records(tmp_path / str(parts))[0]["loss"], weights(model)))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-5) and torch.allclose(ends[0][1], ends[1][1], atol=1e-5)
    alone = loss_of(model_of(), 0).item() + 0.3 * model_of().weight.square().sum().item()
    assert ends[0][0] == pytest.approx(alone, rel=1e-5)


def test_means_over_labels(tmp_path, capsys):
    """Of all micro-batches together, each over its own labels; null where a dimension has none."""
    values = [torch.tensor([[1.0, 5.0, 9.0], [2.0, 7.0, 9.0]]), torch.tensor([[6.0, 1.0, 9.0]])]
    known = [torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])]
    model = model_of()
    run = start(tmp_path, model, flags_of(), steps=1, parts=2, dims=["a", "b", "c"])
    for step in run.steps():
        run.update(loss_of(model, step) / 2)
        run.log(1, 1, ("losses", "note"), means={"losses": (values[run.part], known[run.part])}, note=0.25)
    (record,) = records(tmp_path)
    assert record["losses"] == [3.0, 7.0, None]               # wrong: (1.5 + 6) / 2, the mean of the parts' means
    assert "null" in (tmp_path / "metrics.jsonl").read_text()
    assert "losses a 3.000 b 7.000 c - | note 0.250 | grad_norm" in capsys.readouterr().out


def test_snapshots_on_the_way(tmp_path, tiny):
    """Evenly, without the last step, whose adapter the script itself keeps."""
    model = tiny().requires_grad_(False)
    flags = flags_of(lora_dim=2, lora_scaling=2.0, seed=0, weight_decay=0.0, values_lr=None, snapshots=3)
    add_adapter(model, flags, 2)
    set_preference(model, torch.tensor([0.5, 0.5]))
    run = Run(model, adamw(model, flags), tmp_path, "adapter", flags, 6, ["a", "b"])
    for _ in run.steps():
        run.update(model(torch.tensor([[1, 2]])).square().mean())
        run.log(2, 0)
    assert sorted(f.name for f in (tmp_path / "snapshots").iterdir()) == ["adapter-000002.safetensors",
                                                                          "adapter-000004.safetensors"]
    size = sum(p.numel() for layer in svd_lora_layers(model).values() for p in (layer.U, layer.V))
    assert records(tmp_path)[0]["flops"] == model_flops(model.config, 2, 0, size)


# ---- log ----

def test_lines_for_people(tmp_path, capsys):
    log = Log(tmp_path / "deep" / "metrics.jsonl", 5, every=2)
    for step in range(1, 6):
        log.step({"step": step}, f"line {step}")
    assert log.close() >= 0
    assert [r["step"] for r in records(tmp_path / "deep")] == [1, 2, 3, 4, 5]
    assert capsys.readouterr().out.split() == "line 1 line 2 line 4 line 5".split()   # every second, both ends
    log = Log(tmp_path / "resumed.jsonl", 40, first_step=10, every=20)
    for step in range(11, 41):
        log.step({"step": step}, f"line {step}")
    assert capsys.readouterr().out.split() == "line 11 line 20 line 40".split()
