"""Faults that a person or the schedule wants from a living job on one machine: done to the process that is named, once."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
import time

import pytest

from gemini_gnn.errors import ConfigError, RecoveryError
from gemini_gnn.faults import machine
from gemini_gnn.observe import terms
from gemini_gnn.observe.status import write_status
from gemini_gnn.recovery import board, messages, wire
from gemini_gnn.recovery.inject import inject
from gemini_gnn.recovery.stop import stop
from tests.recovery.jobs import PATIENCE_S, job, wait_for

__all__ = ["job"]  # the fixture

HERE = os.uname().nodename
QUICK = {"recovery": {"hang_factor": 3.0, "hang_floor_s": 0.6, "heartbeat_s": 0.1}}


def pid_of_rank(run, rank, generation):
    (note,) = [one for one in run.training(2, generation=generation) if one["rank"] == rank]
    return note["pid"]


def test_kills_strike_the_process_that_they_name_and_the_job_goes_on(job):
    run = job()
    launch = run.launch(2, "steps")
    run.training(2)
    pid = pid_of_rank(run, 1, 1)
    assert inject(run.run_dir, ["kill-rank", "1"]) == f"SIGKILL to rank 1, pid {pid} on {HERE}"
    wait_for(lambda: run.events("trainer_exited", rank=1, pid=pid, code=-9), "the exit")
    run.training(2, generation=2)
    warm = run.pid_of("warm")
    assert inject(run.run_dir, ["kill-warm", HERE]) == f"SIGKILL to the warm parent, pid {warm} on {HERE}"
    wait_for(lambda: run.events("warm_died", pid=warm), "its death")
    for term, words in ((2, ["kill-agent", "rank:1"]), (3, ["kill-root"])):
        agent = run.pid_of("agent")
        assert inject(run.run_dir, words) == f"SIGKILL to the root agent, pid {agent} on {HERE}"
        run.training(2, term=term)
    run.finish()
    assert run.end(launch)[0] == 0
    run.assert_nothing_left()


def test_only_a_job_that_allows_it_is_stopped_or_told_to_raise(job):
    run = job()
    launch = run.launch(2, "steps")
    run.training(2)
    of_ranks = ("stop-rank 1", "raise-rank 1", "hang-collective 1", "oom-rank 1", "corrupt-replica 1")
    of_machines = (f"cut-link {HERE} --for 1s", f"power-off {HERE}", f"split {HERE} from others", f"fill-shm {HERE}")
    for text in (*of_ranks, *of_machines, "hang-filesystem --for 1s"):
        with pytest.raises(RecoveryError, match="start the job with faults.allow=true"):
            inject(run.run_dir, text.split())
    with pytest.raises(RecoveryError, match="expected a rank from 0 to 1"):
        inject(run.run_dir, ["kill-rank", "2"])
    with pytest.raises(RecoveryError, match=f"expected one of the job's machines, {HERE}"):
        inject(run.run_dir, ["kill-agent", "nowhere"])
    with pytest.raises(ConfigError, match="type 'kill-rank 1'"):
        inject(run.run_dir, ["kill-rank", "1", "@", "step", "5"])
    run.finish()
    assert run.end(launch)[0] == 0 and run.events("fault_ordered") == []


def test_a_rank_that_is_told_to_raise_ends_the_job(job):
    run = job()
    launch = run.launch(2, "steps", faults={"allow": True})
    run.training(2)
    pid = pid_of_rank(run, 1, 1)
    wait_for(lambda: "raise-rank ordered" in _try(run, "raise-rank", "1"), "the first look for orders")
    code, _, err = run.end(launch)
    assert code == 1 and "InjectedFault: injected fault: raise-rank 1, as ordered" in err
    assert run.events("fault_committed", text=f"raise-rank ordered from rank 1, pid {pid} on {HERE}")


@pytest.mark.parametrize("kind", ["hang-collective", "stop-rank", "kill-rank in agreement"])
def test_a_rank_that_is_told_to_stand_still(job, kind):
    run = job()
    launch = run.launch(2, "steps", faults={"allow": True}, **QUICK)
    name, *rest = kind.split()
    run.training(2)
    seen = wait_for(lambda: board.open_board(run.arena), "the board")
    wait_for(lambda: (now := board.read(seen, 1)) and now.step > 8, "steps, so that their usual time is known")
    assert f"rank 1, pid {pid_of_rank(run, 1, 1)} on {HERE}" in inject(run.run_dir, [name, "1", *rest])
    run.training(2, generation=2)
    run.finish()
    code, _, err = run.end(launch)
    assert code == 0, err
    assert len(run.events("hang")) == (0 if rest else 1)
    said = (run.run_dir / "logs" / "rank-1.log").read_text()
    assert (f"injected fault: {name} 1 in agreement, in agreement of step " in said) == (kind != "stop-rank")
    assert "of step 0" not in said
    run.assert_nothing_left()


def _try(run, *words):
    try:
        return inject(run.run_dir, words)
    except RecoveryError as error:
        if "reads no orders before its first step" not in str(error):
            raise
        return ""


def test_a_rank_without_memory_of_its_own_is_not_told_to_take_all(job):
    """In a memory cgroup it would be killed; here the whole machine would."""
    run = job()
    launch = run.launch(1, "steps", faults={"allow": True})
    run.training(1)
    if not _unlimited():
        pytest.skip("this process has a memory cgroup with a limit")
    with pytest.raises(RecoveryError, match="oom-rank: expected a memory cgroup"):
        wait_for(lambda: _try(run, "oom-rank", "0"), "an answer")
    run.finish()
    assert run.end(launch)[0] == 0


def test_a_machine_that_is_no_host_of_the_lab_keeps_its_power_its_link_and_its_files(job):
    if machine.MARK.exists():
        pytest.skip("these tests run on a host of the lab")
    run = job()
    launch = run.launch(1, "steps", faults={"allow": True})
    run.training(1)
    for text, said in (
        (
            f"power-off {HERE}",
            "power-off: expected a host of the lab .* only what may be undone is done: type 'cut-link",
        ),
        (f"cut-link {HERE} --for 1s", "cut-link: expected a job on several machines"),
        (f"split {HERE} from others", "expected a machine or more on each side, and none on both"),
        ("corrupt-replica 0", f"expected another machine that is here; {HERE} is alone"),
        ("hang-filesystem --for 1s", "hang-filesystem: expected .* on a file system that one process of .* serves"),
    ):
        with pytest.raises(RecoveryError, match=said):
            inject(run.run_dir, text.split())
    run.finish()
    assert run.end(launch)[0] == 0
    run.assert_nothing_left()


def _unlimited():
    from gemini_gnn.faults import injection

    try:
        injection.memory_to_fill()
    except ConfigError:
        return True
    return False


def test_the_schedule_of_agents_strikes_once_per_job(job):
    run = job()
    at = ["kill-warm rank:0 @ step 5", "kill-root @ step 20", "kill-agent nowhere @ step 5"]
    launch = run.launch(2, "steps", faults={"at": at}, recovery={"heartbeat_s": 0.1, "silence_s": 5.0})
    run.training(2, term=2)
    wait_for(lambda: [e for e in run.events("say", term=2) if "kill-agent nowhere" in e["text"]], "the complaint")
    run.finish()
    assert run.end(launch)[0] == 0
    assert run.events("fault_ordered", fault=at[0]), "what a root notes just before it is killed may be lost"
    assert len(run.events("warm_died")) == 1 and len(run.events("started")) == 2
    assert sorted(p.name for p in (run.run_dir / "faults").iterdir()) == [
        "begun",
        "kill-root-step-20.1",
        "kill-warm-rank:0-step-5.1",
    ]
    run.assert_nothing_left()


def test_the_command(job):
    run = job()
    launch = run.launch(1, "steps")
    (note,) = run.training(1)
    command = [sys.executable, "launch/inject.py", f"run_dir={run.run_dir}"]

    def typed(*words):
        return subprocess.run([*command, *words], capture_output=True, text=True, timeout=PATIENCE_S)

    done = typed("kill-rank", "0")
    assert (done.returncode, done.stdout) == (0, f"SIGKILL to rank 0, pid {note['pid']} on {HERE}\n"), done.stderr
    for words, expected in (
        (("stop-rank", "0"), "faults.allow=true"),
        ((), "usage"),
        (("kill", "0"), "expected one of"),
    ):
        refused = typed(*words)
        assert refused.returncode == 2 and expected in refused.stderr and refused.stdout == ""
    run.training(1, generation=2)
    run.finish()
    assert run.end(launch)[0] == 0
    late = typed("kill-rank", "0")
    assert late.returncode == 2 and "no job of" in late.stderr and "its last news is of" in late.stderr


# --- a job that is elsewhere ----------------------------------------------------------------------------------------------


def elsewhere(run_dir, state, **fields):
    terms.make_run_dir(run_dir)
    fields = {"machine": "h9", "world_size": 2, "local_world_size": 2} | fields
    terms.claim_term(run_dir, fields)
    write_status(run_dir, state, step=7)


def test_a_job_on_one_machine_that_is_another(tmp_path):
    elsewhere(tmp_path, "running")
    with pytest.raises(RecoveryError, match="is on h9, not on .*: type the command there"):
        inject(tmp_path, ["kill-root"])
    with pytest.raises(RecoveryError, match="its last news is of 20.*: running, step 7. If it runs, type .* on h9"):
        stop(tmp_path)
    write_status(tmp_path, "done")
    assert "no job of" in stop(tmp_path) and "h9, where the job was" in stop(tmp_path, keep=False)


def test_a_root_that_does_not_answer(tmp_path, monkeypatch):
    from gemini_gnn.recovery import visits

    monkeypatch.setattr(visits, "PATIENCE_S", 0.3)
    elsewhere(tmp_path, "running", local_world_size=1, address="127.0.0.1", port=9)
    begin = time.monotonic()
    for call in (lambda: stop(tmp_path), lambda: inject(tmp_path, ["kill-rank", "0"])):
        with pytest.raises(
            RecoveryError, match="does not answer.*cannot reach an agent at 127.0.0.1:9.*running, step 7"
        ):
            call()
    assert time.monotonic() - begin < 10.0
    write_status(tmp_path, "stopped")
    assert "run this command on each" in stop(tmp_path, keep=False)


@pytest.mark.parametrize("call", [stop, lambda run_dir: inject(run_dir, ["kill-root"])], ids=["stop", "inject"])
def test_a_root_that_goes_without_an_answer_is_asked_to_stop_again_but_gets_a_fault_once(tmp_path, call):
    listener = wire.listen("127.0.0.1", 0)
    elsewhere(tmp_path, "running", local_world_size=1, address="127.0.0.1", port=listener.getsockname()[1])
    token, asked = terms.token(tmp_path), []

    def serve() -> None:
        while len(asked) < 2:
            select.select([listener], [], [], PATIENCE_S)
            root = wire.accept(listener, messages.TO_ROOT, token)
            asked.extend(wait_for(lambda r=root: r.receive() or r.closed, "a request"))
            if len(asked) == 2:
                root.send(messages.Ended("stopped", 143, "launch/stop.py"))
            root.close()

    root = threading.Thread(target=serve, daemon=True)
    root.start()
    if call is stop:
        assert "has ended: stopped" in stop(tmp_path)
    else:
        with pytest.raises(RecoveryError, match="does not answer .it went without an answer.*running, step 7"):
            call(tmp_path)
        assert asked == [messages.Inject("kill-root")]
        assert "has ended: stopped" in stop(tmp_path)
    root.join(10.0)
    listener.close()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become another user")
def test_a_job_of_another_user(tmp_path):
    elsewhere(tmp_path, "running", local_world_size=1, address="127.0.0.1", port=9)
    terms.token(tmp_path)
    (tmp_path / "terms" / "token").chmod(0o600)
    folder = tmp_path
    while folder != folder.parent and folder.name != "tmp":
        folder.chmod(0o755)
        folder = folder.parent
    code = f"""
import os
from pathlib import Path
from gemini_gnn.recovery.inject import inject
os.setuid(65534)
try: inject(Path({str(tmp_path)!r}), ["kill-root"])
except Exception as error: print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S)
    assert "is a job of another user" in said.stdout, said
