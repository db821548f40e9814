"""conftest.py - the material beside the repository, for the tests of data/."""
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[3] / "shared" / "material"


@pytest.fixture
def shared():
    """shared("text", "a.txt"): the path of a file under shared/material; skips the test where it is not there."""
    def find(*parts):
        path = SHARED.joinpath(*parts)
        if not path.exists():
            pytest.skip(f"{path.name} is not beside the repository")
        return path
    return find
