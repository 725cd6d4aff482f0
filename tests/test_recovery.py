"""Shim, worker agent, warm parent and trainers as real processes; trainers without torch, but for the last tests."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from gemini_gnn.errors import RecoveryError, RunDirError
from gemini_gnn.recovery import home, messages, shim
from gemini_gnn.recovery.stop import stop

PATIENCE_S = 60.0  # the machine may be busy; nothing waits that long when all is well


def wait_for(condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    deadline = time.monotonic() + patience_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen within {patience_s} s"
        time.sleep(0.01)
    return value


class Job:
    """A launch in a run directory, as a user's terminal has it: a session with a launcher and its slot processes."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self.arena = home.arena_of(run_dir)
        self.launches: list[subprocess.Popen[bytes]] = []

    def launch(self, world: int, target: str, **payload: Any) -> subprocess.Popen[bytes]:
        self.run_dir.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "tests.recovery_targets", "launch", os.fspath(self.run_dir), str(world)]
        launch = subprocess.Popen(
            [*command, target, json.dumps(payload)],
            env={**os.environ, "NOTES": os.fspath(self.run_dir / "notes.jsonl"), "MARKER": "from the shim"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.launches.append(launch)
        return launch

    def end(self, launch: subprocess.Popen[bytes]) -> tuple[int, str, str]:
        out, err = launch.communicate(timeout=PATIENCE_S)
        return launch.returncode, out.decode(), err.decode()

    def notes(self, kind: str, **fields: Any) -> list[dict]:
        return [n for n in _lines(self.run_dir / "notes.jsonl") if n["kind"] == kind and fields.items() <= n.items()]

    def events(self, kind: str, **fields: Any) -> list[dict]:
        found = [e for path in (self.run_dir / "events").glob("agent-*.jsonl") for e in _lines(path)]
        return [e for e in found if e["kind"] == kind and fields.items() <= e.items()]

    def training(self, world: int, **fields: Any) -> list[dict]:
        wait_for(lambda: len(self.notes("training", **fields)) >= world, f"{world} trainers of {fields}")
        return self.notes("training", **fields)

    def finish(self) -> None:
        (self.run_dir / "finish").touch()

    def processes(self) -> dict[int, str]:
        """Pid and role of every process that belongs to this job."""
        names = {b"gemini_gnn.recovery.agent": "agent", b"gemini_gnn.recovery.warm": "warm"}
        names[b"tests.recovery_targets"] = "launch"
        found = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    words = (folder / "cmdline").read_bytes().split(b"\0")
                    state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                except OSError:
                    continue
                mine = {os.fsencode(self.run_dir), home.job_id(self.run_dir).encode()} & set(words)
                if mine and state != "Z":
                    found[int(folder.name)] = next((role for word, role in names.items() if word in words), "launch")
        return found

    def pid_of(self, role: str) -> int:
        """The agent, or the warm parent (of the processes that look like it, the one that is nobody's fork)."""
        pids = [pid for pid, kind in self.processes().items() if kind == role]
        (pid,) = [pid for pid in pids if psutil.Process(pid).ppid() not in pids]
        return pid

    def assert_nothing_left(self) -> None:
        wait_for(lambda: not self.processes(), f"the end of {self.processes()}", 10.0)
        assert not self.arena.exists(), sorted(self.arena.iterdir())


@pytest.fixture
def job(tmp_path):
    jobs: list[Job] = []

    def make(name: str = "run") -> Job:
        jobs.append(Job(tmp_path / name))
        return jobs[-1]

    yield make
    for made in jobs:
        for role in ("launch", "agent", "warm"):
            for pid in [pid for pid, kind in made.processes().items() if kind == role]:
                with_no_error(os.kill, pid, signal.SIGKILL)
        wait_for(lambda made=made: not made.processes(), "the end of a job's processes", 10.0)
        for launch in made.launches:
            launch.communicate()
        stop(made.run_dir)
        assert not made.arena.exists()


def with_no_error(call: Callable, *arguments: Any) -> None:
    try:
        call(*arguments)
    except ProcessLookupError:
        return


def _lines(path: Path) -> list[dict]:
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


# --- a job from start to end ------------------------------------------------------------------------------------------


def test_a_job_runs_and_leaves_nothing(job):
    run = job()
    code, out, err = run.end(run.launch(2, "report", marker=[1, 2]))
    assert (code, err) == (0, "")
    assert out == "hello from rank 0\ran error line\n"
    first, second = sorted(run.notes("report"), key=lambda note: note["rank"])
    assert first["payload"] == {"marker": [1, 2]}
    assert (first["listen"], second["listen"]) == (True, False)
    assert first["port"] == second["port"] == int(first["master_port"]) != 29500
    assert (first["term"], first["generation"], first["resume"]) == (1, 1, "auto")
    assert first["marker"] == "from the shim" and first["folder"] == os.getcwd()
    assert first["omp"] == os.environ.get("OMP_NUM_THREADS")
    assert first["session"] == first["pid"]
    log = os.fspath(run.run_dir / "logs" / "rank-0.log")
    assert (first["links"]["0"], first["links"]["1"], first["links"]["2"]) == ("/dev/null", log, log)
    rest = [path for number, path in second["links"].items() if int(number) > 2]
    assert sorted(path.split(":")[0] for path in rest) == [os.fspath(run.arena / "trainers.lock"), "socket"]
    assert json.loads((run.run_dir / "status.json").read_text())["state"] == "done"
    run.assert_nothing_left()


def test_each_start_claims_a_term(job):
    run = job()
    for _ in range(2):
        assert run.end(run.launch(1, "report"))[0] == 0
    assert [note["term"] for note in run.notes("report")] == [1, 2]
    assert json.loads((run.run_dir / "terms" / "2.json").read_text())["term"] == 2


def test_exit_code_and_first_error_are_the_jobs(job):
    run = job()
    code, _, err = run.end(run.launch(3, "fail", rank=1))
    assert code == 1
    assert "ValueError: the first error" in err and "Traceback" in err and "rank 1" in err
    assert "Connection closed" not in err
    status = json.loads((run.run_dir / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("failed", "ValueError: the first error")
    assert "ValueError: the first error" in (run.run_dir / "logs" / "rank-1.log").read_text()
    assert run.events("phase", generation=2) == []  # an exception is no reason to restart
    run.assert_nothing_left()


def test_an_error_for_users_has_no_traceback(job):
    run = job()
    code, _, err = run.end(run.launch(2, "fail", rank=1, for_users=True))
    assert code == 2
    assert "expected a graph, got nothing" in err and "Traceback" not in err


def test_any_exit_code_comes_through(job):
    run = job()
    code, out, _ = run.end(run.launch(1, "report", code=17))
    assert code == 17 and "rank 0 ended with exit code 17" in out


def test_a_module_that_cannot_be_imported_is_named(job):
    run = job()
    code, _, err = run.end(run.launch(2, "report", preload=["json", "no_such_module"]))
    assert code == 1 and "cannot import no_such_module" in err
    run.assert_nothing_left()


def test_a_module_that_starts_threads_is_refused_and_named(job, tmp_path, monkeypatch):
    (tmp_path / "busy_module.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.fspath(tmp_path))
    run = job()
    code, _, err = run.end(run.launch(1, "report", preload=["busy_module"]))
    assert code == 1 and "after the import of busy_module" in err and "2 threads" in err


def test_two_jobs_at_once(job):
    runs = [job("a"), job("b")]
    launches = [run.launch(2, "train") for run in runs]
    for run in runs:
        run.training(2)
    runs[0].finish()
    assert runs[0].end(launches[0])[0] == 0
    runs[0].assert_nothing_left()
    assert len(runs[1].processes()) == 3 + 2 + 2  # launcher and slots, agent and warm parent, trainers
    runs[1].finish()
    assert runs[1].end(launches[1])[0] == 0


# --- ends that are asked for ------------------------------------------------------------------------------------------


def test_ctrl_c_ends_in_order_and_the_same_command_goes_on(job):
    run = job()
    launch = run.launch(2, "train")
    run.training(2)
    os.killpg(launch.pid, signal.SIGINT)
    code, _, err = run.end(launch)
    assert code == 130
    assert "Ctrl-C: ending after this step" in err and "the same command goes on" in err
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


def test_trainers_do_not_mind_sigterm(job):
    run = job()
    launch = run.launch(2, "train")
    for note in run.training(2):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(note["pid"], number)
    run.finish()
    assert run.end(launch)[0] == 0
    assert len(run.notes("finished")) == 2


def test_stop_ends_the_job_and_drops_its_snapshots(job):
    run = job()
    launch = run.launch(2, "train")
    run.training(2)
    said = stop(run.run_dir)
    assert "stopped" in said and "removed" in said
    code, _, err = run.end(launch)
    assert code == 143 and "launch/stop.py" in err
    assert len(run.notes("stopping")) == 2
    run.assert_nothing_left()
    assert "no job" in stop(run.run_dir)


def test_the_stop_command_can_keep_and_later_drop(job):
    run = job()
    launch = run.launch(1, "train")
    run.training(1)
    command = [sys.executable, "launch/stop.py", f"run_dir={run.run_dir}"]
    kept = subprocess.run([*command, "--keep"], capture_output=True, text=True, timeout=PATIENCE_S)
    assert kept.returncode == 0 and "goes on from the snapshot" in kept.stdout
    run.end(launch)
    wait_for(lambda: not run.processes(), "the end of all processes", 10.0)
    assert home.snapshot_files(run.arena)
    dropped = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
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
    home.make_run_dir(tmp_path)
    home.claim_term(tmp_path, {"world_size": 4, "local_world_size": local_world_size})
    assert ("run this command on each" in stop(tmp_path)) == (local_world_size < 4)
    assert "run this command on each" not in stop(tmp_path, keep=True)


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
        assert "killed 2 processes" in stop(run.run_dir)
    else:
        stop(run.run_dir)
    run.end(launch)
    assert sleepers() == []


def test_the_same_command_while_it_runs_is_told_so(job):
    run = job()
    launch = run.launch(2, "train")
    run.training(2)
    code, out, err = run.end(run.launch(2, "train"))
    assert (code, out) == (2, "")
    assert "already running" in err and f"pid {run.pid_of('agent')}" in err and "launch/stop.py" in err
    assert err.count("already running") == 1
    run.finish()
    assert run.end(launch)[0] == 0
    assert len(run.notes("training")) == 2


@pytest.mark.parametrize("another_machine_is_first", [False, True])
def test_a_removed_run_directory_is_a_new_run(job, another_machine_is_first):
    run = job()
    launch = run.launch(1, "train")
    run.training(1)
    stop(run.run_dir, keep=True)
    run.end(launch)
    (run.arena / "old").touch()
    shutil.rmtree(run.run_dir)
    if another_machine_is_first:
        home.make_run_dir(run.run_dir)
        home.run_id(run.run_dir)
        home.claim_term(run.run_dir, {})
    launch = run.launch(1, "train")
    assert "old" not in run.training(1, term=1 + another_machine_is_first)[0]["found"]
    run.finish()
    assert run.end(launch)[0] == 0


def test_resume_never_drops_the_snapshots_before_the_start_but_a_restart_goes_on(job):
    run = job()
    launch = run.launch(1, "train")
    run.training(1)
    stop(run.run_dir, keep=True)
    run.end(launch)
    (run.arena / "old").touch()
    (run.run_dir / "die-0-1").touch()
    launch = run.launch(1, "train", resume="never")
    (second,) = run.training(1, term=2, generation=2)
    (first,) = run.notes("training", term=2, generation=1)
    assert (first["resume"], second["resume"]) == ("never", "auto")
    assert "old" not in first["found"]
    run.finish()
    assert run.end(launch)[0] == 0


# --- deaths -----------------------------------------------------------------------------------------------------------


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
    code, _, err = run.end(run.launch(2, "train", max_restarts=1))
    assert code == 137 and "max_restarts" in err
    wait_for(lambda: not run.processes(), "the end of all processes", 10.0)


def test_a_killed_warm_parent_is_replaced(job):
    run = job()
    launch = run.launch(2, "train")
    old = run.training(2)
    os.kill(run.pid_of("warm"), signal.SIGKILL)
    run.training(2, generation=2)
    assert not {note["pid"] for note in old} & run.processes().keys()
    run.finish()
    code, _, err = run.end(launch)
    assert code == 0 and "the warm parent died (SIGKILL)" in err
    run.assert_nothing_left()


def test_a_killed_agent_takes_its_trainers_along_and_is_replaced(job):
    run = job()
    launch = run.launch(2, "train")
    old = {note["pid"] for note in run.training(2)}
    os.kill(run.pid_of("agent"), signal.SIGKILL)
    new = run.training(2, term=2)
    assert not old & run.processes().keys()
    assert all("shard-0-slot-0" in note["found"] for note in new)
    assert {note["generation"] for note in new} == {2}  # still the same launch, whose work may be complete
    run.finish()
    code, _, err = run.end(launch)
    assert code == 0 and err.count("the worker agent died") == 1
    run.assert_nothing_left()


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
    launch = run.launch(3, "train", max_restarts=1000)
    run.training(3)
    kills = ["agent"] * 3 + ["warm"] * 6 + ["trainer"] * 11  # a fourth dead agent in a row would be one too many
    draw.shuffle(kills)
    for role in kills:
        time.sleep(draw.random() * 0.1)  # not for an event: to be at another point of the restart each time
        pids = [pid for pid, kind in run.processes().items() if kind == ("agent" if role == "agent" else "warm")]
        parents = {pid for pid in pids if (psutil.pid_exists(pid) and _parent(pid) not in pids)}
        victims = sorted(set(pids) - parents if role == "trainer" else parents)
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


def _parent(pid: int) -> int:
    try:
        return psutil.Process(pid).ppid()
    except psutil.NoSuchProcess:
        return -1


def test_the_agent_is_out_of_the_launchers_reach(job):
    run = job()
    launch = run.launch(2, "train")
    run.training(2)
    reach = {process.pid for process in psutil.Process(launch.pid).children(recursive=True)}
    assert len(reach) == 2
    assert os.getsid(run.pid_of("agent")) != os.getsid(launch.pid)
    run.finish()
    assert run.end(launch)[0] == 0


def test_the_terminal_may_go_away(job):
    run = job()
    launch = run.launch(1, "train")
    run.training(1)
    launch.stdout.close()
    launch.stderr.close()
    with open(run.run_dir / "logs" / "rank-0.log", "a") as log:
        log.write("nobody reads this\n")
    run.finish()
    assert launch.wait(PATIENCE_S) == 0
    launch.stdout = launch.stderr = None


# --- parts ------------------------------------------------------------------------------------------------------------


def test_the_lock_has_one_holder_and_survives_removal(tmp_path):
    arena = tmp_path / "user" / "job"
    lock = home.take_lock(arena)
    assert lock is not None and home.take_lock(arena) is None and home.is_locked(arena)
    home.leave_arena(arena)
    assert not arena.parent.exists()
    another = home.take_lock(arena)  # the old file is still locked, but it is not this one
    assert another is not None
    os.close(lock)
    os.close(another)
    assert not home.is_locked(arena)


def test_a_folder_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "user").symlink_to(tmp_path / "target")
    with pytest.raises(RecoveryError, match="not a folder of this user"):
        home.take_lock(tmp_path / "user" / "job")


def test_a_long_path_is_refused(tmp_path):
    with pytest.raises(RecoveryError, match="too long for a socket"):
        home.make_arena(tmp_path / ("x" * 120))


def test_terms_are_claimed_once(tmp_path):
    home.make_run_dir(tmp_path)
    (tmp_path / "terms" / "notes.json").write_text("{}")
    assert [home.claim_term(tmp_path, {}) for _ in range(3)] == [1, 2, 3]
    assert home.newest_term(tmp_path)["term"] == 3


def test_a_run_directory_has_one_id(tmp_path):
    home.make_run_dir(tmp_path)
    run = home.run_id(tmp_path)
    assert home.run_id(tmp_path) == run
    home.make_arena(tmp_path / "arena")
    assert not home.belongs_to(tmp_path / "arena", run)
    home.assign(tmp_path / "arena", run)
    assert home.belongs_to(tmp_path / "arena", run) and not home.belongs_to(tmp_path / "arena", run[::-1])
    (tmp_path / "terms" / "id").write_text("12")
    with pytest.raises(RunDirError, match="incomplete"):
        home.run_id(tmp_path, patience_s=0.0)


def test_living_trainers_are_seen_until_the_kernel_is_done_with_them(tmp_path):
    assert home.living_trainer(tmp_path) is None
    ready, says = os.pipe()
    child = os.fork()
    if child == 0:
        home.hold_trainers_lock(tmp_path)
        os.write(says, b".")
        signal.pause()
    os.read(ready, 1)
    assert home.living_trainer(tmp_path) == child
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert home.living_trainer(tmp_path) is None
    os.close(ready)
    os.close(says)


def test_channel_carries_messages_and_descriptors():
    a, b = (messages.Channel(sock) for sock in socket.socketpair())
    ready, says = os.pipe()
    assert (
        a.send({"kind": "one"}) and a.send({"kind": "two", "text": "x" * 50_000}, [says]) and a.send({"kind": "three"})
    )
    one, two, three = b.receive()
    assert (one["kind"], two["kind"], three["kind"]) == ("one", "two", "three")
    os.write(two["descriptors"][0], b"!")
    assert os.read(ready, 1) == b"!"
    for descriptor in (ready, says, *two["descriptors"]):
        os.close(descriptor)
    b.sock.send(b"no json\n")
    assert a.receive() == [] and a.closed
    a.close()
    assert b.receive() == [] and b.closed
    b.close()


def test_channel_does_not_wait_for_who_does_not_read():
    a, b = (messages.Channel(sock) for sock in socket.socketpair())
    begin = time.monotonic()
    while a.send({"kind": "say", "text": "x" * 100_000}):
        assert time.monotonic() - begin < 10.0
    assert a.closed and a.fileno() >= 0  # its owner's selector still has it
    a.close()
    b.close()


def test_last_words_are_heard_by_who_was_speaking_too():
    a, b = (messages.Channel(sock) for sock in socket.socketpair())
    b.send({"kind": "failed"})
    b.close()
    assert not a.send({"kind": "stop"}) and not a.closed
    assert a.receive() == [{"kind": "failed"}] and a.closed
    a.close()


def test_an_agent_forgets_who_vanished_while_it_spoke(job):
    """Stop requests to dead trainers and messages to dead shims: their descriptors are given out again soon."""
    run = job()
    launch = run.launch(3, "train", listens=False)
    run.training(3)
    agent = run.pid_of("agent")
    for generation in range(1, 4):
        visitor = messages.connect(run.arena / home.AGENT_SOCKET)
        assert visitor is not None
        visitor.close()
        victims = [n["pid"] for n in run.training(3, generation=generation)][:2]
        for pid in victims:
            with_no_error(os.kill, pid, signal.SIGKILL)
        run.training(3, generation=generation + 1)
    assert run.pid_of("agent") == agent
    run.finish()
    code, _, err = run.end(launch)
    assert code == 0 and "worker agent died" not in err
    assert (run.run_dir / "logs" / f"agent-{os.uname().nodename}.log").read_text() == ""


def test_the_outcome_of_an_earlier_start_is_not_ours():
    """An agent tells its outcome to all who are connected, also to a shim of the next start it has not listened to."""
    agent, ours = (messages.Channel(sock) for sock in socket.socketpair())
    agent.send({"kind": "outcome", "outcome": "failed", "code": 1})
    screen = shim.Screen(speaks=False, streams=False, terminal=False)
    assert shim._serve(ours, {"kind": "register"}, screen, shim.StopRequest()) == {"kind": "ending"}
    agent.close()
    ours.close()


def test_launch_token_is_one_per_launch():
    from gemini_gnn.cluster import Place

    two = Place(0, 2, 0, 2, "m", "127.0.0.1", 0, "plain")
    one = Place(0, 1, 0, 1, "m", "127.0.0.1", 0, "plain")
    assert shim.launch_token(two, {}).startswith(f"{os.getppid()}-")
    assert shim.launch_token(one, {}).startswith(f"{os.getpid()}-")
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    assert shim.launch_token(two, slurm) == shim.launch_token(one, slurm) != shim.launch_token(two, {})


@pytest.mark.parametrize("module", ["gemini_gnn.run", "gemini_gnn.recovery.shim", "gemini_gnn.recovery.agent"])
def test_slot_process_and_agent_are_light(module):
    program = f"import sys, {module}; print([m for m in ('torch', 'numpy', 'deepspeed') if m in sys.modules])"
    seen = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE_S)
    assert seen.stdout.strip() == "[]", seen.stderr
