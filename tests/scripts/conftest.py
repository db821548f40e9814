"""conftest.py - the tests of the scripts run in one directory with a base model, in the small world."""
from pathlib import Path

import matplotlib.figure
import pytest


@pytest.fixture(autouse=True)
def place(in_small_world):
    """Every test here, unless its file says otherwise."""
    return in_small_world


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Pictures are made but not rendered, which takes longer than the trainings, unless a test asks for `pictures`."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, path, **more: Path(path).touch())


@pytest.fixture
def pictures():
    """For tests that look at the pictures."""
