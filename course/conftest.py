"""conftest.py - the fixture `adapters`: the module with the functions to grade, course.adapters or --adapters."""
import importlib

import pytest


def pytest_addoption(parser):
    parser.addoption("--adapters", default="course.adapters", help="the module with the functions to grade")


@pytest.fixture(scope="session")
def adapters(request):
    return importlib.import_module(request.config.getoption("--adapters"))
