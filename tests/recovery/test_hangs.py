"""Trainers that hang, as real processes: seen on the board, their stacks in the log, gone on from as after a kill."""

from __future__ import annotations

import os
import signal

import pytest

from gemini_gnn.recovery import board
from tests.recovery.jobs import job, wait_for

__all__ = ["job"]  # the fixture

QUICK = {"recovery": {"hang_factor": 3.0, "hang_floor_s": 0.6, "heartbeat_s": 0.1}}


@pytest.mark.parametrize("stopped", [False, True], ids=["waits for ever", "SIGSTOP"])
def test_a_trainer_that_hangs_is_found_and_the_job_goes_on(job, stopped):
    run = job()
    code, _, err = run.end(run.launch(3, "beats", rank=1, stopped=stopped, **QUICK))
    assert code == 0, err
    (hang,) = run.events("hang")
    assert hang["ranks"] == [1] and "rank 1 hangs in forward of step 20 for 0." in hang["text"]
    assert hang["stopped"] == ([1] if stopped else [])
    assert "restarting all 3 trainers as generation 2" in err and len(run.notes("finished", generation=2)) == 3
    log = (run.run_dir / "logs" / "rank-1.log").read_text()
    assert log.count("most recent call first") == 1 and " in beats" in log
    assert len(run.events("trainer_exited", code=-signal.SIGKILL)) == 3
    run.assert_nothing_left()


def test_without_a_factor_nothing_is_a_hang(job):
    run = job()
    launch = run.launch(1, "beats", rank=0, recovery={"hang_floor_s": 0.1})
    run.training(1)
    seen = board.open_board(run.arena)
    last = wait_for(lambda: board.read(seen, 0), "the board")
    assert (last.generation, last.step) == (1, 20)
    with pytest.raises(AssertionError, match="did not happen"):
        wait_for(lambda: run.events("hang"), "a hang", 2.0)
    os.kill(run.notes("training")[0]["pid"], signal.SIGKILL)
    assert run.end(launch)[0] == 0 and run.events("hang") == []
    run.assert_nothing_left()


def test_an_agent_that_was_stopped_takes_nobody_for_hanging(job):
    """Nor is the stopped time counted for the one that hangs when it goes on."""
    run = job()
    launch = run.launch(2, "beats", rank=-1, **QUICK)
    agent = wait_for(lambda: run.events("trainer_started") and run.pid_of("agent"), "the agent")
    os.kill(agent, signal.SIGSTOP)
    wait_for(lambda: len(run.notes("finished")) == 2, "the end of the work")
    os.kill(agent, signal.SIGCONT)
    assert run.end(launch)[0] == 0 and run.events("hang") == []
    run.assert_nothing_left()
