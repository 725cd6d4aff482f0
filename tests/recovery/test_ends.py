"""Ends of a job that somebody asks for, and what stays of it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from gemini_gnn.observe import terms
from gemini_gnn.recovery import home, messages
from gemini_gnn.recovery.stop import drop_finished, stop
from tests.recovery.jobs import PATIENCE_S, job, wait_for

__all__ = ["job"]  # the fixture


def test_ctrl_c_ends_in_order_and_the_same_command_goes_on(job):
    run = job()
    launch = run.launch(2, "train")
    run.training(2)
    os.killpg(launch.pid, signal.SIGINT)
    code, _, err = run.end(launch)
    assert code == 130
    assert "Ctrl-C: ending after this step" in err and "the same command resumes" in err
    assert len(run.notes("stopping")) == 2
    assert [path.name for path in home.snapshot_files(run.arena)] == ["shard-0-slot-0", "shard-1-slot-0"]
    assert run.arena.stat().st_mode & 0o777 == 0o700
    wait_for(lambda: not run.processes(), "the end of all processes", 10.0)
    launch = run.launch(2, "train")
    assert "shard-1-slot-0" in run.training(2, term=2)[0]["found"]
    run.finish()
    assert run.end(launch)[0] == 0
    run.assert_nothing_left()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_of_the_launcher_ends_in_order(job, number):
    run = job()
    launch = run.launch(2, "train")
    run.training(2)
    os.killpg(launch.pid, number)
    run.end(launch)
    assert len(run.notes("stopping")) == 2
    assert run.events("ended")[0]["code"] == 128 + number
    wait_for(lambda: not run.processes(), "the end of all processes", 10.0)
    assert home.snapshot_files(run.arena)


def test_a_stop_that_comes_together_with_the_registration(job):
    """Ctrl-C while the agent is not looking: both messages are read at once, and nothing is begun."""
    run = job()
    terms.make_run_dir(run.run_dir)
    lock = home.take_lock(run.arena)  # an agent that accepts nobody yet
    listener = messages.listen(run.arena / home.AGENT_SOCKET)
    launch = run.launch(1, "train")
    wait_for(lambda: [pid for pid, kind in run.processes().items() if kind == "launch"][1:], "the slot process")
    (slot,) = psutil.Process(launch.pid).children()
    wait_for(lambda: select.select([listener], [], [], 0)[0], "its connection")
    visitor = messages.Channel(listener.accept()[0], messages.TO_AGENT)
    wait_for(lambda: select.select([visitor], [], [], 0)[0], "its registration")
    os.kill(slot.pid, signal.SIGTERM)
    register, asked = read_until(visitor, 2)
    assert isinstance(register, messages.Register) and isinstance(asked, messages.Stop)
    listener.close()
    os.unlink(run.arena / home.AGENT_SOCKET)
    os.close(lock)
    visitor.close()
    assert run.end(launch)[0] == 143 and run.notes("training") == []  # told again to the agent it then starts
    run.assert_nothing_left()


def read_until(channel: messages.Channel, count: int) -> list[messages.Message]:
    found: list[messages.Message] = []
    wait_for(lambda: found.extend(channel.receive()) or len(found) >= count, f"{count} messages")
    return found


def test_sigterm_of_the_agent_means_that_this_machine_leaves(job):
    run = job()
    launch = run.launch(2, "train")
    run.training(2)
    os.kill(run.pid_of("agent"), signal.SIGTERM)
    code, _, err = run.end(launch)
    assert code == 143 and "SIGTERM: this machine leaves: ending after this step" in err
    assert len(run.notes("stopping")) == 2 and home.snapshot_files(run.arena)


def test_stop_ends_the_job_and_drops_its_snapshots(job):
    run = job()
    launch = run.launch(2, "train")
    run.training(2)
    said = stop(run.run_dir, keep=False)
    assert "stopped" in said and "removed" in said
    code, _, err = run.end(launch)
    assert code == 143 and "launch/stop.py" in err
    assert len(run.notes("stopping")) == 2
    run.assert_nothing_left()
    assert "no job" in stop(run.run_dir)


def test_the_stop_command_keeps_and_can_later_drop(job):
    run = job()
    launch = run.launch(1, "train")
    run.training(1)
    command = [sys.executable, "launch/stop.py", f"run_dir={run.run_dir}"]
    kept = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert kept.returncode == 0 and "resumes from the snapshot" in kept.stdout
    run.end(launch)
    wait_for(lambda: not run.processes(), "the end of all processes", 10.0)
    again = subprocess.run([*command, "keep=true"], capture_output=True, text=True, timeout=PATIENCE_S)
    assert again.returncode == 0 and "no job" in again.stdout and "keep=false removes them" in again.stdout
    assert home.snapshot_files(run.arena)
    dropped = subprocess.run([*command, "keep=false"], capture_output=True, text=True, timeout=PATIENCE_S)
    assert dropped.returncode == 0 and "removed its snapshots" in dropped.stdout
    assert not run.arena.exists()
    wrong = subprocess.run([*command, "keep=maybe"], capture_output=True, text=True, timeout=PATIENCE_S)
    assert wrong.returncode == 2 and "expected true or false" in wrong.stderr


def test_a_trainer_that_does_not_listen_is_not_waited_for(job):
    run = job()
    launch = run.launch(2, "train", listens=False)
    run.training(2)
    begin = time.monotonic()
    os.killpg(launch.pid, signal.SIGINT)
    assert run.end(launch)[0] == 130
    assert time.monotonic() - begin < 10.0


@pytest.mark.parametrize("local_world_size", [2, 4])
def test_stop_says_what_stays_on_other_machines(tmp_path, local_world_size):
    terms.make_run_dir(tmp_path)
    terms.claim_term(tmp_path, {"world_size": 4, "local_world_size": local_world_size})
    assert ("run this command on each" in stop(tmp_path, keep=False)) == (local_world_size < 4)
    assert "run this command on each" not in stop(tmp_path)


@pytest.mark.parametrize("agent_dies", ["never", "and is replaced", "with everything"])
def test_what_trainers_started_ends_with_them(job, agent_dies):
    run = job()
    seconds = f"98765.{os.getpid()}"
    launch = run.launch(1, "start_children", seconds=seconds)
    run.training(1)

    def sleepers() -> list[int]:
        return [p.pid for p in psutil.process_iter(["cmdline"]) if seconds in (p.info["cmdline"] or [])]

    old = wait_for(lambda: len(sleepers()) == 2 and sleepers(), "worker and daemon")
    if agent_dies == "and is replaced":
        os.kill(run.pid_of("agent"), signal.SIGKILL)
        run.training(1, term=2)
        wait_for(lambda: len(sleepers()) == 2, "the next worker and daemon")
        assert not set(old) & set(sleepers())
    if agent_dies == "with everything":
        agent = run.pid_of("agent")
        os.kill(agent, signal.SIGSTOP)  # so that it does not see its shims die, and end in order
        os.killpg(launch.pid, signal.SIGKILL)
        os.kill(agent, signal.SIGKILL)
        wait_for(lambda: not run.processes(), "the end of all processes", 10.0)
        assert sleepers() == old
        assert "killed 2 processes" in stop(run.run_dir, keep=False)
    else:
        stop(run.run_dir, keep=False)
    run.end(launch)
    assert sleepers() == []


# --- stop.py and an agent that is just coming or going ------------------------------------------------------------------


def agent_that(arena: Path, *answers: messages.Message) -> threading.Thread:
    """Holds the arena's lock, answers one visitor, and goes."""
    lock = home.take_lock(arena)
    assert lock is not None
    listener = messages.listen(arena / home.AGENT_SOCKET)
    listener.setblocking(True)

    def serve() -> None:
        visitor = messages.Channel(listener.accept()[0], messages.TO_AGENT)
        wait_for(visitor.receive, "the request")
        for answer in answers:
            visitor.send(answer)
        listener.close()
        os.unlink(arena / home.AGENT_SOCKET)
        visitor.close()
        os.close(lock)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return thread


def test_stop_of_a_job_whose_agent_goes_without_a_word(tmp_path, short_path):
    """It had ended already, and closed its door before it saw the request; or it was killed."""
    arena = home.arena_of(tmp_path / "run", short_path)
    going = agent_that(arena)
    (arena / "snapshot").write_bytes(b"s" * 4096)
    said = stop(tmp_path / "run", keep=False, arena_root=short_path)
    assert "no job of" in said and "removed its snapshots" in said and not arena.exists()
    going.join(10.0)


def test_stop_drops_what_an_end_that_was_under_way_has_kept(tmp_path, short_path):
    arena = home.arena_of(tmp_path / "run", short_path)
    outcome = messages.Ended("stopped", 130, "Ctrl-C", kept_files=1)
    going = agent_that(arena, outcome)
    (arena / "snapshot").write_bytes(b"s" * 4096)
    assert "removed its snapshots" in stop(tmp_path / "run", keep=False, arena_root=short_path) and not arena.exists()
    going.join(10.0)


def test_stop_names_the_machines_that_did_not_hear_of_the_end(tmp_path, short_path):
    for keep in (True, False):
        arena = home.arena_of(tmp_path / "run", short_path)
        going = agent_that(arena, messages.Ended("stopped", 143, "launch/stop.py", away=["h3"]))
        said = stop(tmp_path / "run", keep=keep, arena_root=short_path)
        assert ("h3 did not hear of it and keep" in said) is not keep
        going.join(10.0)


def test_a_complete_run_that_was_killed_while_it_cleaned_up_is_cleaned_by_the_same_command(tmp_path, short_path):
    run_dir = tmp_path / "run"
    terms.make_run_dir(run_dir)
    arena = home.arena_of(run_dir, short_path)
    home.make_arena(arena)
    for name in ("rank-00000.0", home.AGENT_LOCK, home.AGENT_SOCKET, home.RUN_ID):
        (arena / name).touch()
    command = [sys.executable, "launch/train.py", f"run_dir={run_dir}", f"snapshot.arena={short_path}"]
    lock = home.take_lock(arena)  # an agent lives: it is none of ours
    (run_dir / "result.json").touch()
    drop_finished(run_dir, short_path)
    assert (arena / "rank-00000.0").exists()
    os.close(lock)
    (run_dir / "result.json").unlink()  # not complete: the command goes on from them
    drop_finished(run_dir, short_path)
    assert (arena / "rank-00000.0").exists()
    (run_dir / "result.json").touch()
    places = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    second = {
        **os.environ,
        **places,
        "MASTER_PORT": "29500",
    }  # comes before the first: starts no agent, ends no launcher
    other = subprocess.run(command, env=second, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (other.returncode, other.stdout, other.stderr) == (2, "", "")
    assert (arena / "rank-00000.0").exists() and not list((run_dir / "events").iterdir())
    again = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert again.returncode == 2 and "holds a finished run" in again.stderr and not arena.exists()


def test_stop_waits_for_who_holds_the_lock_for_a_moment(tmp_path, short_path):
    arena = home.arena_of(tmp_path / "run", short_path)
    lock = home.take_lock(arena)
    release = threading.Timer(0.2, os.close, [lock])
    release.start()
    assert "no job of" in stop(tmp_path / "run", arena_root=short_path)
    release.join()
