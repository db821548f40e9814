"""test_seminar.py - the seminar pages: their form, figures that stand where they say, and their examples, computed."""
import re

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from aggregate import min_norm_weights, pama_advantages, simplex_lattice
from course import handout
from course.grade import ROOT, SETS
from fronts.selection import direction_distance
from objectives import noon

PAGES = sorted((ROOT / "course/seminar").glob("*.md"))
PARTS = ["What is claimed", "What is proved, and under which assumptions", "What was measured here",
         "What nobody knows", "Five questions"]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def t(*rows):
    return torch.tensor(rows, dtype=torch.float64)


@pages
def test_form(page):
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Seminar: ") and re.findall(r"^## (.+)", text, re.M) == PARTS
    assert re.findall(r"^(\d)\. ", text.split(PARTS[-1])[1], re.M) == list("12345")
    assert len(text.splitlines()) <= 90 and all(len(x) <= 120 for x in text.splitlines() if not x.startswith("|"))
    assert f"seminar/{page.name}" in (ROOT / "course/instructor.md").read_text(encoding="utf-8")
    assert f"course/seminar/{page.name}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert not any(path.startswith("course/seminar") for path in handout.files(SETS))     # pama.md answers set 5


@pages
def test_figures_stand_in_their_source(page):
    """What a table of measurements says stands in the file that its row names: results that were made anew are seen."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert len(rows) > 5 and all(len(row) == 4 for row in rows)
    for what, figure, where, _ in rows[1:]:
        source = (ROOT / where.partition(",")[0]).read_text(encoding="utf-8").replace("\n", " ")
        for number in re.findall(r"−?\d+(?:\.\d+)?", figure) + re.findall(r"\d+\.\d+", what):
            assert re.search(rf"(?<![\d.]){number}(?!\d)", source), f"{page.name}: {what}: {number} is not in {where}"


def test_a_figure_that_is_made_up_would_be_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGES[0].read_text(encoding="utf-8").replace("| 0.05 |", "| 0.0512 |"), encoding="utf-8")
    with pytest.raises(AssertionError, match="0.0512 is not in docs/log.md"):
        test_figures_stand_in_their_source(page)


# ---------------------------------------------------------------------------------------------------------------------
# Panacea

def test_lemma_4_2_of_two_answers():
    """The middle of two policies' J is on no policy's J, and below that of h = 0."""
    J = lambda h: torch.stack([logsigmoid(h), logsigmoid(-h)], -1)
    middle = J(t(2, -2)).mean(0)
    assert middle.tolist() == pytest.approx([-1.127] * 2, abs=5e-4)
    curve = J(torch.linspace(-20, 20, 40001, dtype=torch.float64))
    assert (curve - middle).norm(dim=1).min() > 0.4
    assert J(t(0))[0].tolist() == pytest.approx([-0.693] * 2, abs=5e-4) and (J(t(0))[0] > middle).all()


# ---------------------------------------------------------------------------------------------------------------------
# PAMA

def logit_gradient(probs, A):
    """∂/∂logits of E A log π, A held fixed, at a softmax policy."""
    return probs * (A - probs @ A)


def test_weights_of_advantages():
    gradients = t([3, 0], [-1, 1])                                        # of the two objectives: one token each
    (combined, c) = pama_advantages(t([[1, 0], [0, 1]]), torch.ones(1, 2), "V")
    assert (gradients @ (combined[0] @ gradients)).tolist() == pytest.approx([3, -0.5])
    mgda = min_norm_weights(gradients @ gradients.T)
    assert (gradients @ (mgda @ gradients)).tolist() == pytest.approx([9 / 17] * 2)


def test_no_negative_can_lower_the_objective():
    probs, A = t(0.9, 0.09, 0.01), t(0.5, 1, -54)
    assert abs(probs @ A) < 1e-12
    J = logit_gradient(probs, A)
    assert (logit_gradient(probs, A.clamp(min=0)) @ J).item() == pytest.approx(-0.0096, abs=5e-5) and J @ J > 0


def test_reading_T_stops_where_both_objectives_could_rise():
    probs, rewards = torch.full((3,), 1 / 3).double(), t([3, 0, 0], [0, 3, 0])
    A = rewards - rewards.mean(1, keepdim=True)                           # (2, 3)
    positive = noon(A.T[None], torch.ones(1, 3))                          # (1, 3, 2)
    combined = {name: pama_advantages(positive, torch.ones(1, 3), name)[0][0] for name in "VT"}
    gradients = probs * A
    c = min_norm_weights(gradients @ gradients.T)
    assert (c @ gradients).norm() > 0.3                                   # not Pareto-stationary
    assert not logit_gradient(probs, combined["T"]).any()
    assert (gradients @ logit_gradient(probs, combined["V"]) > 0.1).all()


def test_the_ends_of_the_interval_of_steps():
    theta, curvature = 1.5, 3.0
    for eta, after in ((0.0, theta), (2 / curvature, -theta)):
        assert theta - eta * curvature * theta == pytest.approx(after)


# ---------------------------------------------------------------------------------------------------------------------
# ParetoHqD

def test_directions_of_three_objectives_are_a_quarter():
    """The shares of what is given up, (1 − ω)/2, are those of at most ½ each: a quarter of the simplex."""
    shares = (1 - simplex_lattice(3, 40).numpy()) / 2
    assert np.allclose(shares.sum(1), 1) and shares.max() == 0.5 and shares.min() == 0
    simplex = np.random.default_rng(0).dirichlet(np.ones(3), 40_000)
    assert abs((simplex.max(1) <= 0.5).mean() - 0.25) < 0.01


def test_a_dominated_pair_lies_on_the_ray():
    scores = np.array([[0.2, 0.2], [0.6, 0.6], [0.9, 0.9], [0.1, 0.9], [0.9, 0.1]])
    unit = (scores - 0.1) / 0.8
    assert np.allclose(direction_distance(unit, [0.5, 0.5])[:3], 0) and direction_distance(unit, [0.5, 0.5])[3] > 0.5
    assert all(direction_distance(unit[2:3], lam)[0] < 1e-12 for lam in ([1, 0], [0.3, 0.7]))
