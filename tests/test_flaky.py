"""Which tests are run once more, and how it is said."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TINY = """
from pathlib import Path
import pytest

def runs(name):
    with open(Path(__file__).with_name(name), "a") as file:
        file.write("x")
    return Path(__file__).with_name(name).stat().st_size

@pytest.fixture
def job():
    yield

@pytest.mark.processes
def test_marked():
    assert runs("marked") == 2, "marked, the first time"

def test_with_a_job(job):
    assert runs("with a job") == 2, "with a job, the first time"

def test_that_always_fails(job):
    runs("always")
    assert False

def test_that_passes(job):
    runs("passes")

@pytest.mark.long
def test_campaign(job):
    assert runs("campaign") == 2, "campaign, the first time"

def test_pure():
    assert runs("pure") == 2, "pure, the first time"
"""

RUNS = {"marked": 2, "with a job": 2, "always": 2, "passes": 1, "campaign": 1, "pure": 1}


@pytest.mark.parametrize("options", [[], ["-n", "2", "--dist", "worksteal"]])
def test_a_test_of_processes_is_run_once_more_and_named_at_the_end(tmp_path, options):
    (tmp_path / "test_tiny.py").write_text(TINY)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    processes: real ones\n    long: long ones\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.flaky", "-p", "no:cacheprovider", *options]
    ended = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 1, ended.stdout + ended.stderr
    times = {name: len((tmp_path / name).read_text()) for name in RUNS}
    assert times == RUNS
    before, _, flaky = ended.stdout.partition("tests that failed once and passed when run again")
    assert "FAILED test_tiny.py::test_pure" in before and "FAILED test_tiny.py::test_that_always_fails" in before
    assert "marked, the first time" in flaky and "with a job, the first time" in flaky
    *_, first, second, counts, _ = flaky.split("\n")
    assert {first, second} == {
        "FLAKY, to be mended: test_tiny.py::test_marked",
        "FLAKY, to be mended: test_tiny.py::test_with_a_job",
    }
    assert "3 failed, 3 passed, 3 rerun" in counts
