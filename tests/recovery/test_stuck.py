"""Processes that neither work nor die: stopped, held by a debugger, stuck in an exit or a fork."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

from gemini_gnn.recovery import home
from gemini_gnn.recovery.stop import stop
from tests.recovery.jobs import held, job, wait_for

__all__ = ["job"]  # the fixture


def test_a_stopped_warm_parent_harms_nobody_until_a_fork_is_needed_and_is_replaced_then(job):
    run = job()
    launch = run.launch(2, "train", impatient=True)
    run.training(2)
    os.kill(run.pid_of("warm"), signal.SIGSTOP)
    os.kill(run.notes("training", rank=1)[0]["pid"], signal.SIGKILL)
    run.training(2, generation=3)  # those of generation 2 were never forked
    assert len(run.events("warm_hangs")) == 1 and run.notes("training", generation=2) == []
    run.finish()
    code, _, err = run.end(launch)
    assert code == 0 and "the warm parent died (it did not fork within 1 s)" in err
    run.assert_nothing_left()


def test_trainers_outlive_their_warm_parent(job):
    run = job()
    launch = run.launch(2, "train")
    run.training(2)
    os.kill(run.pid_of("warm"), signal.SIGKILL)
    wait_for(lambda: len(run.events("warm_ready")) == 2, "the next warm parent")
    assert run.events("trainer_exited") == []
    os.kill(run.notes("training", rank=0)[0]["pid"], signal.SIGKILL)
    run.training(2, generation=2)
    run.finish()
    code, _, err = run.end(launch)
    assert code == 0 and "the warm parent died (SIGKILL); starting another" in err
    run.assert_nothing_left()


HANGS_ONCE = """
import os, time
def hang(folder={folder!r}):
    if not os.path.exists(folder + "/hung"):
        open(folder + "/hung", "w").close()
        time.sleep(3600)
os.register_at_fork(before=hang)
"""


def test_a_warm_parent_that_does_not_fork_is_killed_and_the_job_begins(job, tmp_path, monkeypatch):
    (tmp_path / "hangs_once.py").write_text(HANGS_ONCE.format(folder=os.fspath(tmp_path)))
    monkeypatch.setenv("PYTHONPATH", os.fspath(tmp_path))
    run = job()
    code, _, err = run.end(run.launch(2, "report", preload=["hangs_once"], impatient=True))
    assert code == 0 and "the warm parent died (it did not fork within 1 s)" in err
    assert len(run.events("warm_hangs")) == 1
    assert {note["generation"] for note in run.notes("report")} == {2}
    run.assert_nothing_left()


def test_no_generation_begins_while_a_trainer_of_the_last_is_not_reaped(job):
    """One trainer takes its time to die; the agent is not kept from answering."""
    run = job()
    launch = run.launch(2, "train")
    slow = run.training(2)[0]["pid"]
    with held(slow):
        os.kill(run.training(2)[1]["pid"], signal.SIGKILL)
        wait_for(lambda: run.events("trainer_exited"), "the first exit")
        code, _, err = run.end(run.launch(2, "train"))
        assert code == 2 and "already running" in err
        assert run.notes("training", generation=2) == [] and len(run.events("trainer_exited")) == 1
    run.training(2, generation=2)
    assert [event["code"] for event in run.events("trainer_exited")] == [-signal.SIGKILL] * 2
    run.finish()
    assert run.end(launch)[0] == 0
    run.assert_nothing_left()


def test_a_trainer_that_cannot_be_reaped_ends_the_job_and_is_named(job):
    run = job()
    launch = run.launch(2, "train", impatient=True)
    stays = next(note["pid"] for note in run.training(2) if note["rank"] == 0)
    with held(stays):
        os.kill(run.notes("training", rank=1)[0]["pid"], signal.SIGKILL)
        code, _, err = run.end(launch)
        assert code == 1 and "lost: the trainers of ranks 0 could not be reaped" in err and "resumes from" in err
        assert json.loads((run.run_dir / "status.json").read_text())["state"] == "failed"
    assert home.snapshot_files(run.arena)


def test_a_warm_parent_that_cannot_be_reaped_is_replaced(job):
    run = job()
    launch = run.launch(2, "train", impatient=True)
    run.training(2)
    warm = run.pid_of("warm")
    with held(warm):
        os.kill(warm, signal.SIGKILL)
        wait_for(lambda: len(run.events("warm_ready")) == 2, "the next warm parent")
        os.kill(run.notes("training", rank=0)[0]["pid"], signal.SIGKILL)
        run.training(2, generation=2)
        run.finish()
        assert run.end(launch)[0] == 0
    run.assert_nothing_left()


STAYS = """
import os, sys, time
from pathlib import Path
from gemini_gnn.snapshot.store import locks
lock = locks.hold_trainers_lock(Path(sys.argv[1]))
print("here", flush=True)
sys.stdin.read()
"""


def test_a_trainer_of_the_last_term_that_stays_keeps_the_next_from_starting(job):
    """Killed with its agent, and stuck in the kernel: it could still write into the snapshots."""
    run = job()
    home.make_arena(run.arena)
    command = [sys.executable, "-c", STAYS, os.fspath(run.arena)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as stays:
        assert stays.stdout.readline() == "here\n"
        code, _, err = run.end(run.launch(2, "train", impatient=True))
        assert code == 1 and f"process {stays.pid}, a trainer of this job's last term" in err
        assert (run.arena / home.TRAINERS_LOCK).exists()  # the next start must see it too
        stays.stdin.close()
    launch = run.launch(1, "train")
    run.training(1)
    run.finish()
    assert run.end(launch)[0] == 0
    run.assert_nothing_left()


def test_an_error_counts_though_its_process_does_not_leave(job):
    run = job()
    begin = time.monotonic()
    code, out, _ = run.end(run.launch(2, "never_leaves", impatient=True))
    assert code == 1 and "ValueError: the error of one who stays" in out
    assert time.monotonic() - begin < 30.0
    run.assert_nothing_left()


def test_a_stopped_agent_is_waited_for(job):
    """Nothing it was sent is lost; stop.py, which asked meanwhile, hears the outcome."""
    run = job()
    launch = run.launch(2, "train")
    run.training(2)
    agent = run.pid_of("agent")
    os.kill(agent, signal.SIGSTOP)
    command = [sys.executable, "launch/stop.py", f"run_dir={run.run_dir}", "keep=false"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as stopping:
        os.kill(run.notes("training", rank=0)[0]["pid"], signal.SIGKILL)
        os.kill(agent, signal.SIGCONT)
        said, _ = stopping.communicate(timeout=60)
    assert stopping.returncode == 0 and "has ended: stopped" in said
    assert run.end(launch)[0] == 143
    run.assert_nothing_left()


def test_a_warm_parent_and_a_trainer_that_die_together(job):
    """Both deaths are seen in one look: the next fork waits for another warm parent."""
    run = job()
    launch = run.launch(1, "train")
    (trainer,) = run.training(1)
    agent, warm = run.pid_of("agent"), run.pid_of("warm")
    os.kill(agent, signal.SIGSTOP)
    os.kill(trainer["pid"], signal.SIGKILL)
    os.kill(warm, signal.SIGKILL)
    wait_for(lambda: not {trainer["pid"], warm} & run.processes().keys(), "their deaths")
    os.kill(agent, signal.SIGCONT)
    wait_for(lambda: run.notes("training")[-1]["generation"] > 1, "the next generation")
    assert run.pid_of("agent") == agent
    stop(run.run_dir, keep=False)
    assert run.end(launch)[0] == 143
    run.assert_nothing_left()
