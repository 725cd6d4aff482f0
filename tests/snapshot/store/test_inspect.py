"""launch/inspect_snapshots.py: what lies here, and sweeping the dead."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gemini_gnn.errors import SnapshotError
from gemini_gnn.snapshot.store import arena, inspect, locks
from tests.snapshot.plain_training import run_some, slots_of

SCRIPT = Path(__file__).parents[3] / "launch" / "inspect_snapshots.py"


@pytest.fixture
def jobs(tmp_path):
    """A root with a dead job and a living one."""
    dead, living = arena.folder_of("dead", tmp_path), arena.folder_of("living", tmp_path)
    for folder in (dead, living):
        arena.make_folder(folder)
        run_some(folder, 2)
    lock = locks.take_agent_lock(living)
    assert lock is not None
    yield tmp_path, dead, living
    os.close(lock)


def run(*arguments):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


def test_every_slot_is_listed_and_only_the_dead_are_swept(jobs):
    root, dead, living = jobs
    code, out, _ = run("--arena", root)
    assert code == 0 and out.count("committed") == 12 and out.count("  ok") == 12
    assert "job dead" in out and "--sweep removes it" in out and "worker agent is alive" in out
    assert "rank-00000" in out and "common" in out and "1-1-2" in out
    code, out, _ = run("--arena", root, "--sweep", "--no-checksum")
    assert code == 0 and "job dead: swept" in out and "job living: its worker agent is alive" in out
    assert not dead.exists() and living.exists()


def test_damage_and_writing_are_shown(jobs):
    root, dead, _ = jobs
    (_, first), (_, second), *_ = slots_of(dead, "common")
    with open(first.path, "r+b") as raw:
        raw.seek(4096)
        raw.write(b"damage!!")
    assert second.lock(exclusive=True)
    by_slot = {(line.shard, line.slot): line for line in inspect.inspect(root, "dead")}
    assert "do not fit their checksum" in by_slot["common", first.slot].check
    assert by_slot["common", second.slot].check == "busy"
    (_, third) = slots_of(dead, "rank-00000")[0]
    third.void()
    os.truncate(slots_of(dead, "rank-00000")[0][1].path, 0)
    lines = [line for line in inspect.inspect(root, "dead", checksum=False) if line.shard == "rank-00000"]
    assert sorted(line.state for line in lines) == ["committed", "void", "void"]
    assert {line.check for line in lines} == {"not read", "-", "no header"}


@pytest.mark.parametrize("what", ["a slot", "the folder", "all folders"])
def test_a_job_that_ends_between_listing_and_opening_is_no_error(jobs, monkeypatch, what):
    root, dead, _ = jobs
    victim = {"a slot": dead / "rank-00000.0", "the folder": dead, "all folders": dead.parent}[what]
    opened = arena.SlotFile.__init__

    def vanishes_first(file, folder, shard, slot, create=False):
        if folder == dead and victim.exists() and shard == "rank-00000":
            shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
        opened(file, folder, shard, slot, create)

    monkeypatch.setattr(arena.SlotFile, "__init__", vanishes_first)
    slots = [(line.shard, line.slot) for line in inspect.inspect(root) if line.job == "dead"]
    assert len(slots) == (5 if what == "a slot" else 3) and ("rank-00000", 0) not in slots
    assert not victim.exists()


def test_a_job_that_is_not_here_is_said(jobs):
    root, *_ = jobs
    with pytest.raises(SnapshotError, match="no snapshots of job x .*dead, living"):
        inspect.inspect(root, "x")
    code, out, err = run("--arena", root, "--job", "x")
    assert code == 2 and "Traceback" not in err and not out
    assert run("--arena", root / "nowhere")[:2] == (0, "no snapshots in host memory here\n")
