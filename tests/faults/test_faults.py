"""Faults are parsed and chosen purely; those that end a process are tried on a process."""

import subprocess
import sys

import pytest

from gemini_gnn.errors import ConfigError
from gemini_gnn.faults import Fault, InjectedFault, due, maybe_fail, parse_faults


def test_parses_several_faults():
    text = "raise:rank=2:step=5; kill:step=7:rank=1:generation=1;"
    assert parse_faults(text) == [Fault("raise", 2, 5), Fault("kill", 1, 7, 1)]
    assert parse_faults("") == []


@pytest.mark.parametrize(
    "text",
    [
        "explode:rank=1:step=1",
        "raise",
        "raise:rank=1",
        "raise:rank=1:step=-1",
        "raise:rank=1:step=x",
        "raise:rank=1:rank=2:step=1",
        "raise:rank=1:step=1:epoch=1",
        "raise:rank=1:step",
    ],
)
def test_says_what_is_wrong(text):
    with pytest.raises(ConfigError, match="GEMINI_GNN_FAULT"):
        parse_faults(text)


def test_is_due_at_one_rank_step_and_generation_only():
    faults = parse_faults("raise:rank=2:step=5")
    assert [(r, s) for r in range(4) for s in range(10) if due(faults, r, s)] == [(2, 5)]
    assert due(faults, 2, 5, generation=1) is None
    maybe_fail(faults, 0, 5)
    with pytest.raises(InjectedFault, match="rank 2 before step 5"):
        maybe_fail(faults, 2, 5)


@pytest.mark.parametrize("kind, code", [("kill", -9), ("exit", 17)])
def test_kill_and_exit_end_the_process(kind, code):
    script = "import os; from gemini_gnn.faults import *; maybe_fail(from_environ(os.environ), 1, 3)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"GEMINI_GNN_FAULT": f"{kind}:rank=1:step=3"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code
    assert f"{kind} on rank 1 before step 3" in done.stderr


def test_a_hanging_rank_can_be_terminated():
    script = "from gemini_gnn.faults import *; maybe_fail([Fault('hang', 0, 0)], 0, 0)"
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    try:
        assert "hang on rank 0" in process.stderr.readline()
        process.terminate()
        assert process.wait(timeout=20) == -15
    finally:
        process.kill()
        process.communicate(timeout=20)
