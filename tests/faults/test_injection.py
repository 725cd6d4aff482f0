"""The harm, done to processes; and that a fault is committed once per job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from gemini_gnn import cgroups
from gemini_gnn.config import Config
from gemini_gnn.errors import ConfigError
from gemini_gnn.faults import injection
from gemini_gnn.faults.injection import InjectedFault
from gemini_gnn.faults.schedule import named, parse, parse_command
from gemini_gnn.observe.run_directory import RunDir
from gemini_gnn.recovery import board
from gemini_gnn.recovery.board import Phase

TRAINER = """
import sys
from pathlib import Path
from gemini_gnn.faults import injection
from gemini_gnn.faults.schedule import named, parse
injection.install(named([parse(sys.argv[2])]), 1, Path(sys.argv[1]), 0)
for step in (4, 5):
    for phase in ("sampling", "forward", "backward", "agreement"):
        print(step, phase, flush=True)
        injection.at(phase, step if phase == "sampling" else None)
"""


def trainer(run_dir: Path, text: str, **options) -> subprocess.Popen[str]:
    """A process that is rank 1, and does steps 4 and 5."""
    command = [sys.executable, "-c", TRAINER, os.fspath(run_dir), text]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@contextmanager
def ended(process: subprocess.Popen[str]):
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=20)


@pytest.fixture(autouse=True)
def _disarmed():
    yield
    injection.armed.clear()


def install(run_dir: Path, *texts: str, rank: int = 1, steps_done: int = 0) -> None:
    injection.install(named(map(parse, texts)), rank, run_dir, steps_done)


def test_a_kill_strikes_its_rank_in_its_step_and_phase(tmp_path):
    out, err = (killed := trainer(tmp_path, "kill-rank 1 @ step 5 in backward")).communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert out.splitlines()[-1] == "5 backward"
    assert err == "injected fault: kill-rank 1 @ step 5 in backward, in backward of step 5\n"
    record = json.loads((tmp_path / "faults" / "kill-rank-1-step-5-in-backward.1").read_text())
    assert record["pid"] == killed.pid and (record["step"], record["phase"]) == (5, "backward")
    assert (again := trainer(tmp_path, "kill-rank 1 @ step 5 in backward")).communicate(timeout=60)[1] == ""
    assert again.returncode == 0, "once per job"
    other = trainer(tmp_path, "kill-rank 2 @ step 5")
    assert other.communicate(timeout=60)[1] == "" and other.returncode == 0, "it is rank 1"


def test_a_stopped_rank_goes_on_when_it_is_told_to(tmp_path):
    with ended(trainer(tmp_path, "stop-rank 1 @ step 5")) as stopped:
        _, status = os.waitpid(stopped.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        stopped.send_signal(signal.SIGCONT)
        out, _ = stopped.communicate(timeout=60)
        assert out.splitlines()[-1] == "5 agreement" and stopped.returncode == 0


def test_a_hanging_rank_calls_nothing_more(tmp_path):
    with ended(trainer(tmp_path, "hang-collective 1 @ step 5")) as hanging:
        assert hanging.stderr.readline().endswith("in agreement of step 5\n")
        with pytest.raises(subprocess.TimeoutExpired):
            hanging.wait(0.3)
        hanging.terminate()
        assert hanging.wait(20) == -signal.SIGTERM


def test_a_raise_is_an_error_of_the_loop(tmp_path):
    install(tmp_path, "raise-rank 1 @ step 5")
    injection.at("sampling", 4)
    with pytest.raises(InjectedFault, match="injected fault: raise-rank 1 @ step 5, in sampling of step 5"):
        injection.at("sampling", 5)
    injection.at("sampling", 5)


@contextmanager
def memory_cgroup(limit: int):
    """A folder within this process's own cgroup; skips where that cannot be."""
    found = next(cgroups.groups(), None)
    if found is None:
        pytest.skip("this machine has no memory cgroups")
    inner, (limit_name, *_) = found[0] / f"gemini-gnn-test-{os.getpid()}", found[1]
    try:
        inner.mkdir()
    except OSError as error:
        pytest.skip(f"cannot make {inner}: {error.strerror}")
    try:
        if not (inner / limit_name).is_file():
            pytest.skip(f"{found[0]} gives no limits to groups within it")
        (inner / limit_name).write_text(str(limit))
        yield inner
    finally:
        inner.rmdir()


def test_a_rank_that_takes_too_much_memory_is_killed_within_its_limit(tmp_path):
    with memory_cgroup(256 << 20) as group:

        def enter() -> None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

        with ended(trainer(tmp_path, "oom-rank 1 @ step 5", preexec_fn=enter)) as taker:
            out, err = taker.communicate(timeout=60)
        assert taker.returncode == -signal.SIGKILL, err
        assert out.splitlines()[-1] == "5 sampling"


@pytest.mark.parametrize(
    ("left", "free", "limit"),
    [([], 8 << 30, "no limit"), ([8 << 30], 8 << 30, "8192 MiB left to it"), ([1 << 20], None, "1 MiB left to it")],
)
def test_memory_is_not_taken_where_the_machine_would_run_out_first(tmp_path, monkeypatch, left, free, limit):
    monkeypatch.setattr(cgroups, "left", lambda: ((tmp_path, nbytes) for nbytes in left))
    monkeypatch.setattr(cgroups, "machine_left", lambda: free)
    with pytest.raises(ConfigError, match=f"oom-rank: expected a memory cgroup .*; got {limit}, .* MemoryMax=8G"):
        install(tmp_path, "oom-rank 1 @ step 5")
    install(tmp_path, "oom-rank 2 @ step 5")  # another rank's
    assert injection.armed == []


def test_the_tightest_limit_and_half_of_what_the_machine_has_besides_are_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(cgroups, "left", lambda: iter([(tmp_path, 3 << 30), (tmp_path, 2 << 30)]))
    monkeypatch.setattr(cgroups, "machine_left", lambda: 8 << 30)
    assert injection.memory_to_fill() == 5 << 30


def test_of_all_that_claim_a_fault_one_commits_it(tmp_path):
    barrier, won = threading.Barrier(8), []

    def run() -> None:
        barrier.wait(20)
        won.append(injection.claim(tmp_path / "faults" / "kill-agent-h1-step-5.1"))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(won) == [False] * 7 + [True]
    assert injection.committed(tmp_path) == {"kill-agent-h1-step-5.1"}


def test_what_another_process_has_committed_meanwhile_does_not_strike(tmp_path):
    install(tmp_path, "raise-rank 1 @ step 5")
    assert injection.claim(tmp_path / "faults" / "raise-rank-1-step-5.1")
    injection.at("sampling", 5)
    assert injection.armed == []


def test_the_second_of_two_faults_strikes_in_the_recovery_from_the_first(tmp_path):
    both = ("raise-rank 1 @ step 5", "raise-rank 1 @ step 4 in start-up")
    install(tmp_path, *both)
    injection.at("start-up")
    with pytest.raises(InjectedFault, match="@ step 5, in sampling"):
        injection.at("sampling", 5)
    with pytest.raises(InjectedFault, match="@ step 4 in start-up, in start-up of step 4"):
        install(tmp_path, *both, steps_done=4)
    install(tmp_path, *both, steps_done=4)
    assert injection.armed == []


def test_seconds_count_from_the_first_beginning_of_the_job(tmp_path):
    install(tmp_path, "raise-rank 1 @ 1000 s")
    injection.at("sampling", 1)
    begun = tmp_path / "faults" / "begun"
    assert abs(injection.begun(tmp_path) - time.time()) < 100
    begun.write_text(json.dumps({"time": time.time() - 1000}))
    with pytest.raises(InjectedFault, match="@ 1000 s, in start-up of step 7"):
        install(tmp_path, "raise-rank 1 @ 1000 s", steps_done=7)


def test_without_faults_nothing_is_armed_and_nothing_written(tmp_path):
    install(tmp_path, "raise-rank 1 @ step 9")
    (tmp_path / "other").mkdir()
    install(tmp_path / "other")
    assert injection.armed == [] and not list((tmp_path / "other").iterdir())


def test_a_fault_armed_by_hand_strikes_at_the_next_mark_of_the_board():
    injection.arm(parse_command(["raise-rank", "0"]))
    with pytest.raises(InjectedFault, match="raise-rank 0, in forward of step 12"):
        board.mark(Phase.FORWARD, 12)
    board.mark(Phase.FORWARD, 12)


def test_the_exchange_is_seen_in_the_thread_that_does_it_and_nothing_else_there():
    for phase in ("exchange", "sampling"):
        injection.arm(parse_command(["raise-rank", "0", "in", phase]))
    board.doing(Phase.SAMPLING)
    board.mark(Phase.FORWARD, 3)
    with pytest.raises(InjectedFault, match="in exchange of step 3"):
        board.doing(Phase.EXCHANGE)


def test_a_run_that_is_started_over_has_its_faults_before_it(tmp_path):
    config = Config(run_dir=os.fspath(tmp_path), resume="never")
    RunDir.claim(config).release()
    (tmp_path / "losses.csv").write_text("step,epoch,loss\n1,1,0.5\n")
    assert injection.claim(tmp_path / "faults" / "kill-rank-1-step-5.1")
    RunDir.claim(config).release()
    assert injection.committed(tmp_path) == {"kill-rank-1-step-5.1"}
    RunDir.claim(config, anew=True).release()
    assert injection.committed(tmp_path) == set() and (tmp_path / "faults.1" / "kill-rank-1-step-5.1").is_file()
