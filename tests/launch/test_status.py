"""What `launch/status.py` shows of a job as real processes, while it lives and when it is over."""

from __future__ import annotations

import os
import signal

import pytest

from gemini_gnn.observe.status import read_status
from tests.recovery.jobs import job, wait_for

pytestmark = pytest.mark.processes

__all__ = ["job"]  # the fixture


def killed_once(run):
    """A job whose trainers wait in step 20, of which one is killed: then it goes on to its end."""
    launch = run.launch(3, "beats", rank=1)
    (note,) = run.training(1)
    wait_for(lambda: read_status(run.run_dir).get("step") == 20, "the status")
    os.kill(note["pid"], signal.SIGKILL)
    return launch


def test_the_last_status_has_the_whole_picture(job):
    run = job()
    code, _, err = run.end(killed_once(run))
    assert code == 0, err
    status = read_status(run.run_dir)
    assert (status["state"], status["exit_code"], status["reason"]) == ("done", 0, "done")
    assert (status["term"], status["generation"], status["step"], status["world_size"]) == (1, 2, 39, 3)
    (machine,) = status["machines"]
    assert machine["machine"] == status["machine"] == os.uname().nodename and machine["here"]
    ranks = [(one["rank"], one["alive"], one["step"], one["phase"]) for one in status["ranks"]]
    assert ranks == [(rank, False, 39, "writing") for rank in range(3)]
    (failure,) = status["failures"]
    assert (failure["kind"], failure["rank"], failure["step"], status["failure_count"]) == ("killed", 1, 20, 1)
    assert status["run_dir"] == os.fspath(run.run_dir) and status["since"] <= status["time"]
