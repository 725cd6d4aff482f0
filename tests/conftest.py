"""Shared fixtures and settings of all tests."""

import os
import random
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.flaky import pytest_collection_modifyitems, pytest_terminal_summary
from tests.lab.fixtures import lab, lab_session

# The figures and bits these tests compare are the CPU's, also on a machine with a GPU; what runs there is in test_cuda.py.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

# A shell that runs the tests in the background, or nohup, has these ignored, and every job started here would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

__all__ = ["data_root", "lab", "lab_session", "pytest_collection_modifyitems", "pytest_terminal_summary"]

# Deterministic, and without deadlines: the machine may be slow, the code is judged by its results.
settings.register_profile("ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="of the campaigns in tests/chaos; a new one where none is given")
    parser.addoption("--kills", type=int, default=40, help="of each campaign")


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    """Of a campaign: given by ``--seed``, or a new one. Print it: a failure is repeated with it."""
    given = request.config.getoption("seed")
    return random.SystemRandom().randrange(10**6) if given is None else given


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with real graphs, or a skip that says how to get one."""
    root = os.environ.get("GEMINI_GNN_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("GEMINI_GNN_DATA does not name a folder with the real graphs")
    return Path(root)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """As ``tmp_path``, for folders that hold a socket, whose path may not be long."""
    with tempfile.TemporaryDirectory(prefix="gemini-") as folder:
        yield Path(folder)
