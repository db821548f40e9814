"""conftest.py - the tests of the scripts run in one directory with a base model, in the small world."""
import pytest


@pytest.fixture(autouse=True)
def place(in_small_world):
    """Every test here, unless its file says otherwise."""
    return in_small_world
