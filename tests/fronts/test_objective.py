"""test_objective.py - the table of objectives: every exact front against its J; IPO in closed form; who meets whom."""
import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from aggregate import simplex_lattice, tchebycheff
from data.rewards import Rewards
from fronts import measure, objective, optimum
from fronts.evaluation import regret, shares, values
from fronts.exact import best, evaluation_preferences, exact_front, front_preferences, normalise
from fronts.measure import World, run_config
from fronts.metrics import hypervolume
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
    w.J, w.batches, w.dims, w.split = OBJECTIVES["rlhf"].J, None, ["a", "b", "c"], "new_verbs"
    w.scores = torch.cat([1.5 * draw(3, 6, 3)[[0, 1, 1, 2]], torch.full((4, 1, 3), -4.0, dtype=torch.float64)], 1)
    w.ref, w.r = draw(4, 7).log_softmax(-1), w.scores                                                   # (X, O)
    w.writers = (w.ref[..., None] + w.scores)[:, :-1].softmax(1)
    return w


def around(logps, size, n=30):
    """n random neighbours of a policy (X, O)."""
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
    found = best(lams, row, world, o)
    assert close(found["J"], J, 1e-9) and close(found["logps"], policies, 1e-9)
    assert found["z"] == (row.least and row.least(world))
    if name == "scores":                                                 # no KL, no limit
        return
    value = lambda lam, J, logps: (row.value or values)(lam.expand(len(J), -1), J, logps, world, o | {"z": found["z"]})
    for n, lam in enumerate(lams):
        own = value(lam, J[n:n + 1], policies[n:n + 1])
        for size in (1e-2, 0.5):
            near = around(policies[n], size)
            assert (value(lam, J_of(row, world, near), near) <= own + 1e-9).all()
        assert (value(lam, J, policies) <= own + 1e-8).all()             # nor does another preference's optimum


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_scale_is_that_of_linear_scalarisation(name, world):
    row, lams = OBJECTIVES[name], simplex_lattice(3, 3)
    ls, tche = (exact_front(lams, row, world, o) for o in (LS, TCHE))
    assert ls == tche and np.allclose(ls["J"], row.optimum(lams, world, LS)[0])      # the limit of J for both
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
    J, policies, _ = row.optimum(lams, world, LS)
    p = world.ref.exp()[..., None] * (world.r @ lams.T / LS["beta"]).exp()                              # (X, O, F)
    outside = p[:, -1] / p.sum(1)                                        # its part of the optimum, by Bayes' rule
    assert torch.allclose(policies[..., -1].exp(), outside.T) and outside.max() > 1e-4
    monkeypatch.setattr(measure, "world_logprobs", lambda model, batches: world.ref[:, :-1])
    got = world.measure(None, LS["beta"])                                # the reference: no KL
    assert got["kl"] == pytest.approx(0)
    assert got["J"] == pytest.approx(torch.einsum("xo,xom->m", world.ref.exp(), world.r / 4).tolist())
    few = torch.einsum("xs,xsm->m", world.ref[:, :-1].softmax(-1), world.r[:, :-1] / 4)      # wrong: renormalised
    assert (few - torch.tensor(got["J"])).abs().min() > 0.05


@pytest.mark.parametrize("name", ["dpo", "ipo", "sft"])
def test_what_compares_listed_texts_wants_none_but_them(name, world):
    """The best policies give other texts nothing; J of DPO and IPO does not see the outside mass, SFT's does."""
    row, lams = OBJECTIVES[name], simplex_lattice(3, 2)
    for o in (LS, TCHE | {"ideal": row.least(world)}):
        _, policies, _ = row.optimum(lams, world, o)
        assert policies[..., -1].exp().max() < 1e-9
        assert torch.allclose(policies.exp().sum(-1), torch.ones(6, 4, dtype=torch.float64))
    said = policies[2]
    spoken = optimum.with_outside(said[:, :-1] + math.log(0.7))          # 0.3 of it goes to other texts
    lost = row.J(world, said, 0.5) - row.J(world, spoken, 0.5)
    assert torch.allclose(lost, torch.full_like(lost, -math.log(0.7) if name == "sft" else 0.0), atol=1e-9)


# ---- regret and shares of the optima themselves ----

def measured(row, world, policies):
    return {"J": J_of(row, world, policies).tolist(), "logps": list(policies)}


@pytest.mark.parametrize("name, o", [*((name, LS) for name in OBJECTIVES), *((name, TCHE) for name in OBJECTIVES if
                                                                            name != "scores")])
def test_regret_is_0_at_the_optimum_and_1_at_the_base(name, o, world):
    row, lams = OBJECTIVES[name], simplex_lattice(3, 4)
    found, base = best(lams, row, world, o), measured(row, world, [world.ref])
    base = {key: value[0] for key, value in base.items()}
    of = lambda policies: regret(base, measured(row, world, policies), found, lams.tolist(), world, row, o)
    assert of(found["logps"])["regret"] == pytest.approx(0, abs=1e-7)
    assert of(found["logps"])["regret_worst"] == pytest.approx(0, abs=1e-6)
    nothing = of([world.ref] * len(lams))
    assert nothing["regret"] == pytest.approx(1) and nothing["regret_worst"] == pytest.approx(1)
    between = of((found["logps"].exp() * 0.5 + world.ref.exp() * 0.5).log())         # J are concave, scores linear
    assert (0.02 if name != "scores" else 0.49) < between["regret"] < 0.51
    assert between["regret"] <= between["regret_worst"] and between["worst_lam"] in lams.tolist()


def test_regret_of_rlhf_by_tchebycheff_is_of_the_expected_maximum(world):
    """Its objective, Eq. (13), is E R_λ − β KL, by hand here: positive for the optimum of linear scalarisation. Wrong:
    Tchebycheff of J, the maximum outside the expectation."""
    row, lams = OBJECTIVES["rlhf"], simplex_lattice(3, 4)
    o = TCHE | {"ideal": [3.0, 3.0, 3.0]}
    found, ls = best(lams, row, world, o), best(lams, row, world, LS)["logps"]
    base = {"J": J_of(row, world, [world.ref])[0].tolist(), "logps": world.ref}
    got = regret(base, measured(row, world, ls), found, lams.tolist(), world, row, o)

    def objective(lam, logp):
        R = -(lam * (3.0 - world.r))[..., lam > 0].amax(-1)                                            # (X, O)
        return (logp.exp() * (R - 0.5 * (logp - world.ref))).sum(-1).mean().item()

    before, reached, top = (np.array([objective(lam, logp) for lam, logp in zip(lams, policies)]) for policies in
                            ([world.ref] * len(lams), ls, found["logps"]))
    assert got["regret"] == pytest.approx(1 - (reached - before).sum() / (top - before).sum(), rel=1e-9)
    assert got["regret"] > 0.05 and (top >= reached - 1e-12).all()
    each = 1 - (reached - before) / (top - before)
    assert got["regret_worst"] == pytest.approx(each.max()) and got["worst_lam"] == lams[each.argmax()].tolist()
    J = lambda policies: J_of(row, world, policies)
    of_J = lambda policies: -tchebycheff(-J(policies), lams, [-3.0] * 3)                               # wrong
    wrong = 1 - (of_J(ls) - of_J([world.ref] * len(lams))).sum() / (of_J(found["logps"])
                                                                    - of_J([world.ref] * len(lams))).sum()
    assert abs(wrong.item() - got["regret"]) > 0.02


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_optimum_has_more_than_the_whole_front(name, world):
    """Tchebycheff's optima too are measured against the dense front of linear scalarisation. Wrong: against the few
    points at the run's own preferences, where other points have more."""
    row, reference = OBJECTIVES[name], OBJECTIVES[name].exact_points.reference
    front = exact_front(front_preferences(3), row, world, LS)
    lams = evaluation_preferences(3, 5)
    by = {}
    for o in (LS, TCHE):
        found = best(lams, row, world, o)
        volume = hypervolume(normalise(found["J"], front), [reference] * 3)
        r = shares({"exact": front, "reference_point": [reference] * 3, "hypervolume": volume}, found, world)
        at = r["exact"]["at_lams"]
        assert r["hypervolume_share"] == at["hypervolume_share"] == pytest.approx(volume / front["hypervolume"])
        assert 0.3 < r["hypervolume_share"] <= 1 + 1e-9 and r["hypervolume_share_at_lams"] == pytest.approx(1)
        assert np.allclose(at["J"], found["J"]) and np.allclose(at["points"], normalise(found["J"], front))
        assert np.allclose(at["scores"], torch.stack([world.mean_scores(x) for x in found["logps"]]))
        assert r["exact"]["lams"] == front["lams"] and at["z"] == found["z"]
        by[o["aggregate"]] = r
    dense = {"exact": front, "reference_point": [reference] * 3, "hypervolume": front["hypervolume"]}
    few = shares(dense, best(lams, row, world, TCHE), world)
    assert few["hypervolume_share"] == pytest.approx(1) and few["hypervolume_share_at_lams"] > 1.005


# ---- IPO ----

def lifted(world, h):
    """The policy (X, O) with these log-ratios h (Q, S) of the listed responses, and other texts as the reference."""
    return world.ref + torch.nn.functional.pad(h[world.problems[2]], (0, 1))


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
    J = OBJECTIVES["ipo"].J(world, lifted(world, h), beta).tolist()
    assert J == pytest.approx((-expected[world.problems[2]].mean(0)).tolist())


def test_ipo_in_closed_form_has_no_gradient_and_dpo_s_optimum_has(world):
    lams = simplex_lattice(3, 3)
    J, policies, _ = OBJECTIVES["ipo"].optimum(lams, world, LS)
    problem, wins = world.problems[2], world.wins

    def gradient(logps, lam):
        h = (logps - world.ref)[:, :-1].clone().requires_grad_(True)
        (ipo_losses(h, wins[problem], LS["beta"]).mean(0) @ lam).backward()
        return h.grad.abs().max().item()

    for lam, policy in zip(lams, policies):
        assert gradient(policy, lam) < 1e-12
    J_wrong, wrong, _ = OBJECTIVES["dpo"].optimum(lams, world, LS)
    assert all(gradient(policy, lam) > 1e-3 for lam, policy in zip(lams, wrong))
    assert ((lams * (J - J_of(OBJECTIVES["ipo"], world, wrong))).sum(1) > 1e-3).all()


def test_two_responses_by_hand():
    w = World.__new__(World)
    w.dims, w.scores = ["a", "b"], torch.tensor([[[1.0, -2.0], [0.0, 0.0], [-6.0, -6.0]]], dtype=torch.float64)
    w.ref = torch.zeros(1, 3, dtype=torch.float64).log_softmax(-1)
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
    worlds, other = measured_on(config, "model", "tokenizer", "cpu", ("seen", "new_verbs"))
    assert (len(worlds), other is not None) == (2 * exact, held_out)
    assert [world.args[5] for world in worlds] == ["seen", "new_verbs"][:len(worlds)]
    if names and other:
        assert other[4].mean[0] == 3.0 and other[4].raw == "judged"      # the statistics that the run was trained with
    if names and worlds:                                                 # behind a trained judge stand the true scores
        assert {world.args[4].raw for world in worlds} == {"own" if names == ["out/judge"] else "judged"}


def test_the_least_sft_losses(world):
    for ideal in (None, [1.0, 2.0, 3.0]):
        assert best(torch.eye(3), OBJECTIVES["sft"], world, LS | {"ideal": ideal})["z"] == (
            ideal or OBJECTIVES["sft"].least(world))
    least = OBJECTIVES["sft"].optimum(torch.eye(3), world, LS)[0].diagonal()             # each writer's own entropy
    assert torch.allclose(optimum.sft_entropies(world.writers), -least)
