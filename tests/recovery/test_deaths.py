"""A job whose processes are killed."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import psutil

from gemini_gnn.observe import terms
from gemini_gnn.observe.failures import read_failures
from gemini_gnn.observe.status import read_status
from gemini_gnn.recovery import home, messages
from gemini_gnn.recovery.stop import stop
from tests.recovery.jobs import PATIENCE_S, job, wait_for, with_no_error

__all__ = ["job"]  # the fixture


def test_a_killed_trainer_restarts_all_of_them(job):
    run = job()
    launch = run.launch(2, "train")
    victim = next(note["pid"] for note in run.training(2) if note["rank"] == 1)
    os.kill(victim, signal.SIGKILL)
    assert {note["rank"] for note in run.training(2, generation=2)} == {0, 1}
    assert len(run.processes()) == 3 + 2 + 2
    run.finish()
    code, _, err = run.end(launch)
    assert code == 0
    assert "rank 1 was killed by SIGKILL; restarting all 2 trainers as generation 2" in err
    run.assert_nothing_left()


def test_errors_that_a_kill_caused_are_not_the_jobs(job):
    run = job()
    code, _, err = run.end(run.launch(3, "collective"))
    assert code == 0 and "restarting all 3" in err and "Traceback" not in err.replace("an error line", "")


def test_restarts_are_limited(job):
    run = job()
    for generation in (1, 2):
        run.run_dir.mkdir(exist_ok=True)
        (run.run_dir / f"die-0-{generation}").touch()
    code, _, err = run.end(run.launch(2, "train", recovery={"same_step_failures": 2}))
    assert code == 137 and "same_step_failures" in err
    wait_for(lambda: not run.processes(), "the end of all processes", 10.0)


def test_a_killed_agent_takes_its_trainers_along_and_is_replaced(job):
    run = job()
    launch = run.launch(2, "train")
    old, warm = {note["pid"] for note in run.training(2)}, run.pid_of("warm")
    os.kill(run.pid_of("agent"), signal.SIGKILL)
    new = run.training(2, term=2)
    assert not old & run.processes().keys()
    assert run.pid_of("agent") == warm, "the warm parent takes the place of its agent"
    assert run.events("warm_adopted", pid=run.pid_of("warm")) and len(run.events("warm_started")) == 1
    assert all("shard-0-slot-0" in note["found"] for note in new)
    assert {note["generation"] for note in new} == {2}  # still the same launch, whose work may be complete
    run.finish()
    code, _, err = run.end(launch)
    assert code == 0 and err.count("the worker agent died") == 1
    run.assert_nothing_left()


def test_agents_that_die_before_a_step_are_limited(job):
    run = job()
    launch = run.launch(2, "train", recovery={"same_step_failures": 2})
    for term in (1, 2):
        run.training(2, term=term)
        os.kill(run.pid_of("agent"), signal.SIGKILL)
    code, _, err = run.end(launch)
    assert code == 2 and "died 2 times before a step was done (recovery.same_step_failures=2)" in err
    wait_for(lambda: not run.processes(), "the end of all processes")


def test_an_agent_whose_heir_does_not_come_is_replaced_by_the_slots(job):
    run = job()
    launch = run.launch(2, "train")
    run.training(2)
    os.kill(run.pid_of("warm"), signal.SIGSTOP)
    os.kill(run.pid_of("agent"), signal.SIGKILL)
    run.training(2, term=2)
    assert run.events("warm_adopted") == [] and len(run.events("warm_started", term=2)) == 1
    run.finish()
    assert run.end(launch)[0] == 0
    run.assert_nothing_left()


def test_heirs_follow_heirs_and_fork_trainers_that_can_be_killed(job):
    run = job()
    launch = run.launch(2, "train", recovery={"same_step_failures": 50})
    for term in range(1, 3):
        os.kill(run.training(2, term=term)[0]["pid"], signal.SIGKILL)
        run.training(2, term=term, generation=term + 1)
        os.kill(run.pid_of("agent"), signal.SIGKILL)
    run.training(2, term=3)
    assert len(run.events("warm_adopted")) == 2 and len(run.events("warm_started")) == 1
    run.finish()
    assert run.end(launch)[0] == 0
    run.assert_nothing_left()


def test_an_heir_without_slot_processes_ends(job):
    """Everything but the warm parent is killed: it takes the agent's place, finds nobody, and goes; the snapshots stay."""
    run = job()
    run.launch(2, "train")
    run.training(2)
    launches = [pid for pid, role in run.processes().items() if role == "launch"]
    for pid in [run.pid_of("agent"), *launches]:  # the agent first: it would end the job when the slots are gone
        with_no_error(os.kill, pid, signal.SIGKILL)
    wait_for(lambda: run.events("warm_adopted"), "an heir")
    wait_for(lambda: not run.processes(), "the end of all processes")
    assert (run.arena / "shard-0-slot-0").exists()


def test_a_killed_shim_ends_the_job_in_order(job):
    run = job()
    launch = run.launch(2, "train")
    run.training(2)
    (shim_of_1,) = [e["pid"] for e in run.events("registered", rank=1)]
    os.kill(shim_of_1, signal.SIGKILL)
    assert run.end(launch)[0] in (137, -signal.SIGKILL, 247)
    wait_for(lambda: not run.processes(), "the end of all processes", 10.0)
    assert home.snapshot_files(run.arena)


def test_everything_killed_goes_on_from_memory(job):
    run = job()
    launch = run.launch(2, "train")
    run.training(2)
    for pid in run.processes():
        with_no_error(os.kill, pid, signal.SIGKILL)
    launch.communicate()
    launch = run.launch(2, "train")
    assert all("shard-1-slot-0" in note["found"] for note in run.training(2, term=2))
    run.finish()
    assert run.end(launch)[0] == 0
    run.assert_nothing_left()


def test_a_killed_launch_takes_the_job_down_by_itself(job):
    run = job()
    launch = run.launch(2, "train")
    run.training(2)
    os.killpg(launch.pid, signal.SIGKILL)
    launch.communicate()
    wait_for(lambda: not run.processes(), "the end of all processes", 20.0)
    assert home.snapshot_files(run.arena)
    assert json.loads((run.run_dir / "status.json").read_text())["state"] == "stopped"


def test_retyping_at_once_waits_for_the_end_of_the_last_start(job):
    run = job()
    launch = run.launch(2, "train")
    run.training(2)
    os.killpg(launch.pid, signal.SIGKILL)
    launch.communicate()
    launch = run.launch(2, "train")
    run.training(2, term=2)
    run.finish()
    assert run.end(launch)[0] == 0


def test_any_process_may_be_killed_at_any_moment(job):
    """Restarts while restarting, agents that die while they start, a warm parent that dies while it forks."""
    run, draw = job(), random.Random(7)
    launch = run.launch(3, "train", recovery={"same_step_failures": 1000})
    run.training(3)
    kills = ["agent"] * 3 + ["warm"] * 6 + ["trainer"] * 11  # a fourth dead agent in a row would be one too many
    draw.shuffle(kills)
    for role in kills:
        time.sleep(draw.random() * 0.1)  # not for an event: to be at another point of the restart each time
        pids = [pid for pid, kind in run.processes().items() if kind == ("agent" if role == "agent" else "warm")]
        # "warm" has the forks too that are in between, or have no task yet
        victims = sorted(pid for pid in pids if role == "agent" or (_name(pid) == "gnn-warm") == (role == "warm"))
        if victims:
            with_no_error(os.kill, draw.choice(victims), signal.SIGKILL)
    wait_for(lambda: len(run.processes()) == 4 + 2 + 3, "a whole job")
    newest = max((e["term"], e["generation"]) for e in run.notes("training"))
    assert newest > (1, 3)
    run.finish()
    code, _, err = run.end(launch)
    assert code == 0, err
    assert run.notes("overlap") == []
    finished = run.notes("finished")
    assert len(finished) == 3 and len({(note["term"], note["generation"]) for note in finished}) == 1
    run.assert_nothing_left()


def _name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.NoSuchProcess:
        return ""


def test_an_agent_forgets_who_vanished_while_it_spoke(job):
    """Stop requests to dead trainers and messages to dead shims: their descriptors are given out again soon."""
    run = job()
    launch = run.launch(3, "train", listens=False)
    run.training(3)
    agent, warm = run.pid_of("agent"), run.pid_of("warm")

    def descriptors() -> list[int]:
        return [psutil.Process(pid).num_fds() for pid in (agent, warm)]

    before = []
    for generation in range(1, 5):
        if generation == 3:  # failures.jsonl, which stays open, has its first record; other files open for a moment
            wait_for(lambda: read_failures(run.run_dir), "the first record")
            before = min(descriptors() for _ in range(50))
        visitor = messages.connect(run.arena / home.AGENT_SOCKET)
        assert visitor is not None
        visitor.close()
        victims = [n["pid"] for n in run.training(3, generation=generation)][:2]
        for pid in victims:
            with_no_error(os.kill, pid, signal.SIGKILL)
        run.training(3, generation=generation + 1)
    wait_for(lambda: descriptors() == before, f"the closing of all but {before} descriptors")
    assert run.pid_of("agent") == agent
    run.finish()
    code, _, err = run.end(launch)
    assert code == 0 and "worker agent died" not in err
    assert (run.run_dir / "logs" / f"agent-{os.uname().nodename}.log").read_text() == ""


def test_an_agent_that_dies_while_it_cleans_up_does_not_begin_the_work_again(job):
    run = job()
    launch = run.launch(2, "fill_arena", files=10_000)
    run.training(2)
    agent = run.pid_of("agent")
    deadline = time.monotonic() + PATIENCE_S
    while read_status(run.run_dir).get("state") != "done":
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    os.kill(agent, signal.SIGKILL)
    assert run.end(launch)[0] == 0
    assert len(run.notes("training")) == 2
    assert (
        terms.newest_term(run.run_dir)["term"] == 1
    )  # else the second slot, after the first, would find no finished work
    run.assert_nothing_left()


WILD = """
import itertools, time
jumps = itertools.cycle([0, 86_400, -86_400, 3e9, -1e9])
time.time = lambda now=time.time: now() + next(jumps)
"""


def test_a_clock_that_jumps_changes_nothing(job, tmp_path, monkeypatch):
    """In every process of the job, by days and decades at every look: no time limit, no age and no order hangs on it."""
    (tmp_path / "sitecustomize.py").write_text(WILD)
    monkeypatch.setenv("PYTHONPATH", os.fspath(tmp_path))
    run = job()
    launch = run.launch(2, "train", recovery={"same_step_failures": 2})
    os.kill(run.training(2)[0]["pid"], signal.SIGKILL)
    run.training(2, generation=2)
    os.kill(run.pid_of("agent"), signal.SIGKILL)
    run.training(2, term=2)
    times = [event["t"] for kind in ("registered", "phase", "trainer_forked") for event in run.events(kind)]
    assert max(times) - min(times) > 80_000, "the clock of the agent did not jump"
    assert "stopped" in stop(run.run_dir, keep=False)
    assert run.end(launch)[0] == 143
    run.assert_nothing_left()


def test_a_kill_for_want_of_memory_is_told_from_one_by_hand(job, tmp_path, monkeypatch):
    """The cgroup is a folder of ours: the kernel counts there just before it kills."""
    counter = tmp_path / "memory.events"
    counter.write_text("oom 0\noom_kill 0\n")
    monkeypatch.setenv("CGROUP", str(tmp_path))
    run = job()
    launch = run.launch(2, "train", impatient=True)
    os.kill(run.training(2, generation=1)[0]["pid"], signal.SIGKILL)
    run.training(2, generation=2)
    counter.write_text("oom 1\noom_kill 1\n")
    os.kill(run.training(2, generation=2)[0]["pid"], signal.SIGKILL)
    run.training(2, generation=3)
    run.finish()
    code, _, err = run.end(launch)
    assert code == 0
    assert "was killed by SIGKILL; restarting all 2 trainers as generation 2" in err
    assert f"was killed: out of memory (memory cgroup {tmp_path}); restarting all 2 trainers as generation 3" in err
    run.assert_nothing_left()
