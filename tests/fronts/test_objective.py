"""test_objective.py - the table of objectives: every exact front against its J; IPO in closed form; who meets whom."""
import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from aggregate import linear_scalarization, simplex_lattice, tchebycheff
from data.rewards import Rewards
from fronts import measure, objective, optimum
from fronts.exact import exact_front, normalise
from fronts.measure import World, run_config
from fronts.objective import OBJECTIVES, POINTS, ipo_losses, measured_on, same_objective
from objectives import ipo_loss
from runs.files import UserError

LS = {"beta": 0.5, "aggregate": "ls", "ideal": None}
TCHE = LS | {"aggregate": "tche"}


@pytest.fixture(scope="module")
def world():
    """A world of 4 prompts, two of which are alike, with 6 responses and 3 dimensions; some mass lies outside."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    w = World.__new__(World)
    w.J, w.batches, w.dims, w.scores = OBJECTIVES["rlhf"].J, None, ["a", "b", "c"], 1.5 * draw(3, 6, 3)[[0, 1, 1, 2]]
    w.ref_all = draw(4, 7).log_softmax(-1)
    w.ref = w.ref_all[:, :-1].log_softmax(-1)
    w.r_all = torch.cat([w.scores, torch.full((4, 1, 3), -4.0, dtype=torch.float64)], 1)
    w.writers = (w.ref[..., None] + w.scores).softmax(1)
    return w


def around(logps, size, n=30):
    """n random neighbours of a policy (X, S)."""
    g = torch.Generator().manual_seed(3)
    return (logps + size * torch.randn(n, *logps.shape, generator=g, dtype=torch.float64)).log_softmax(-1)


def J_of(row, world, policies):
    return torch.stack([row.J(world, logps, LS["beta"]) if row.J else world.mean_scores(logps) for logps in policies])


# ---- every row ----

@pytest.mark.parametrize("o", [LS, TCHE], ids=["ls", "tche"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_policy_beats_the_exact_front(name, o, world, close):
    row, lams = OBJECTIVES[name], simplex_lattice(3, 3)
    J, policies, residual = row.optimum(lams, world, o | {"ideal": row.least and row.least(world)})
    assert residual < 1e-8 and close(J_of(row, world, policies), J, 1e-7)            # the policies reach what is said
    front = exact_front(lams, row, world, o)
    z = front["z"]
    if name == "scores" or o is TCHE and not z:                          # no KL, no limit; no function of J
        return
    value = (lambda J, lam: linear_scalarization(J, lam)) if o is LS else (lambda J, lam: -tchebycheff(-J, lam, z))
    for lam, j, policy in zip(lams, J, policies):
        for size in (1e-2, 0.5):
            assert (value(J_of(row, world, around(policy, size)), lam) <= value(j, lam) + 1e-9).all()
        assert (value(J, lam) <= value(j, lam) + 1e-8).all()             # nor does another preference's optimum


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_scale_is_that_of_linear_scalarisation(name, world):
    row, lams = OBJECTIVES[name], simplex_lattice(3, 3)
    ls, tche = (exact_front(lams, row, world, o) for o in (LS, TCHE))
    assert ls["ideal"] == tche["ideal"] and ls["nadir"] == tche["nadir"]
    assert np.allclose(normalise(ls["J"], ls), ls["points"])
    if name != "scores":                                                 # its scale is that of a limited KL
        assert torch.tensor(ls["points"]).amax(0).tolist() == pytest.approx([1] * 3)
        assert torch.tensor(ls["points"]).amin(0).tolist() == pytest.approx([0] * 3)
    assert len(ls["scores"]) == len(lams) and len(ls["scores"][0]) == 3


def test_every_row_says_what_its_points_are():
    for row in OBJECTIVES.values():
        for kind in (row.points, row.exact_points):
            assert POINTS[kind.name] is kind
            for key, unit, title in kind.planes:
                assert key in ("points", "scores", "J") and unit.format(row.label) and title.format(row.label)
    assert len({row.short for row in OBJECTIVES.values()}) == len({row.marker for row in OBJECTIVES.values()}) == 5


def test_other_texts_as_one_more_outcome(world, monkeypatch):
    row, lams = OBJECTIVES["rlhf"], simplex_lattice(3, 3)
    few, all_ = exact_front(lams, row, world, LS), exact_front(lams, row, world, LS | {"everything": True})
    assert few["J"] != all_["J"]
    monkeypatch.setattr(measure, "world_logprobs", lambda model, batches: world.ref_all[:, :-1])
    got = world.measure(None, LS["beta"])                                # the reference: no KL, in both ways
    assert got["kl"] == pytest.approx(0) and got["kl_all"] == pytest.approx(0)
    assert got["J"] == pytest.approx(torch.einsum("xs,xsm->m", world.ref.exp(), world.scores / 4).tolist())
    assert got["J_all"] == pytest.approx(torch.einsum("xs,xsm->m", world.ref_all.exp(), world.r_all / 4).tolist())


# ---- IPO ----

def test_ipo_is_the_expectation_of_its_loss(world, close):
    scores, wins, beta = world.problems[0], world.wins, 0.3
    h = torch.randn(3, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected, pairs = torch.zeros(3, 3, dtype=torch.float64), [(a, b) for a in range(6) for b in range(a)]
    for a, b in pairs:                                                   # every pair, every label, its probability
        for better, worse in ((a, b), (b, a)):
            loss = ipo_loss(h[:, better], h[:, worse], 0 * h[:, 0], 0 * h[:, 0], beta)[0]
            expected += torch.sigmoid(scores[:, better] - scores[:, worse]) * loss[:, None] / len(pairs)
    assert close(ipo_losses(h, wins, beta), expected, 1e-12)
    assert close(ipo_losses(torch.stack([h + 3, h]), wins, beta)[0], expected, 1e-12)    # a constant does not matter
    assert not close(ipo_losses(h, wins, 2 * beta), expected, 0.1)       # wrong: another β
    J = OBJECTIVES["ipo"].J(world, world.ref + h[world.problems[2]], beta).tolist()
    assert J == pytest.approx((-expected[world.problems[2]].mean(0)).tolist())


def test_ipo_in_closed_form_has_no_gradient_and_dpo_s_optimum_has(world):
    lams = simplex_lattice(3, 3)
    J, policies, _ = OBJECTIVES["ipo"].optimum(lams, world, LS)
    problem, wins = world.problems[2], world.wins

    def gradient(logps, lam):
        h = (logps - world.ref).clone().requires_grad_(True)
        (ipo_losses(h, wins[problem], LS["beta"]).mean(0) @ lam).backward()
        return h.grad.abs().max().item()

    for lam, policy in zip(lams, policies):
        assert gradient(policy, lam) < 1e-12
    J_wrong, wrong, _ = OBJECTIVES["dpo"].optimum(lams, world, LS)
    assert all(gradient(policy, lam) > 1e-3 for lam, policy in zip(lams, wrong))
    assert ((lams * (J - J_of(OBJECTIVES["ipo"], world, wrong))).sum(1) > 1e-3).all()


def test_two_responses_by_hand():
    w = World.__new__(World)
    w.dims, w.scores = ["a", "b"], torch.tensor([[[1.0, -2.0], [0.0, 0.0]]], dtype=torch.float64)
    w.ref = torch.zeros(1, 2, dtype=torch.float64).log_softmax(-1)
    lam = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    win = (lam[0] * torch.sigmoid(w.scores[0, 0])).sum().item()          # the mixed chance that the first is better
    _, policy, _ = OBJECTIVES["ipo"].optimum(lam, w, LS)
    assert (policy[0, 0, 0] - policy[0, 0, 1]).item() == pytest.approx((2 * win - 1) / (2 * LS["beta"]))


# ---- runs ----

def result(name="dpo", beta=1.0, aggregate="ls", points_are="normalised J", **more):
    return {"objective": {"name": name, "beta": beta, "aggregate": aggregate} | more, "points_are": points_are}


def test_runs_meet_only_if_their_objective_is_the_same():
    rewards = {"rewards": {"names": ["a", "b"], "scale": [1, 1]}}
    dpo, rlhf = result(), result("rlhf", **rewards)
    assert same_objective([dpo, result(aggregate="tche")]) and same_objective([rlhf, result("rlhf", **rewards)])
    for other in (result("ipo"), result(beta=0.1), result(points_are="implicit-reward accuracy"), rlhf):
        assert not same_objective([dpo, other])
    assert not same_objective([rlhf, result("rlhf", rewards={"names": ["a", "c"], "scale": [1, 1]})])


def test_a_run_of_an_older_version_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"script": "train_dpo.py", "flags": {}}))
    with pytest.raises(UserError, match="older version"):
        run_config(tmp_path)


TEXT, TOY, FOUR = ["happy", "dialogue"], ["helpful", "harmless"], ["helpful", "harmless", "warm", "curious"]


@pytest.mark.parametrize("name, names, dims, files, exact, held_out", [
    ("dpo", None, TOY, None, True, False), ("dpo", None, TOY, ["x.jsonl"], False, True),
    ("ipo", None, TOY, ["x.jsonl"], False, True), ("sft", None, TOY, None, True, False),
    ("rlhf", TOY, TOY, None, True, True), ("rlhf", FOUR, FOUR, None, True, False),
    ("rlhf", ["helpful", "concise:12"], ["helpful", "concise"], None, True, True),
    ("rlhf", ["out/judge"], TOY, None, True, True), ("rlhf", TEXT, TEXT, ["x.txt"], False, True),
    ("rlhf", ["length", "helpful"], ["length", "helpful"], None, False, True),
    ("scores", TOY, TOY, None, True, False), ("scores", TEXT, TEXT, ["x.txt"], False, True)])
def test_what_a_run_is_measured_on(name, names, dims, files, exact, held_out, monkeypatch):
    judged, own = (Rewards(dims, names or dims, kind, [0.0] * len(dims), [1.0] * len(dims), [1.0] * len(dims))
                   for kind in ("judged", "own"))
    monkeypatch.setattr(objective, "World", lambda *args: SimpleNamespace(args=args, reference=lambda model: None))
    monkeypatch.setattr(objective, "rewards_of", lambda *args: judged)
    monkeypatch.setattr(objective, "world_rewards", lambda *args: own)
    monkeypatch.setitem(OBJECTIVES, name, dataclasses.replace(OBJECTIVES[name], held_out=lambda *args: args))
    config = {"objective": {"name": name}, "dims": dims, "flags": {"data": files}, "prompts": files}
    if names:
        config["rewards"] = {"names": names, **{k: [3.0] * len(dims) for k in ("mean", "std", "scale")}}
    world, other = measured_on(config, "model", "tokenizer", "cpu")
    assert (world is not None, other is not None) == (exact, held_out)
    if names and other:
        assert other[4].mean[0] == 3.0 and other[4].raw == "judged"      # the statistics that the run was trained with
    if names and world:                                                  # behind a trained judge stand the true scores
        assert world.args[4].raw == ("own" if names == ["out/judge"] else "judged")


def test_the_least_sft_losses(world):
    for ideal in (None, [1.0, 2.0, 3.0]):
        assert exact_front(torch.eye(3), OBJECTIVES["sft"], world, LS | {"ideal": ideal})["z"] == (
            ideal or OBJECTIVES["sft"].least(world))
    least = OBJECTIVES["sft"].optimum(torch.eye(3), world, LS)[0].diagonal()             # each writer's own entropy
    assert torch.allclose(optimum.sft_entropies(world.writers), -least)
