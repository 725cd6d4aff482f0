"""The arena's files: private, allocated beforehand, swept when nobody lives; and the room for them."""

import os
import stat
import subprocess
import sys

import pytest

from gemini_gnn.errors import SnapshotError
from gemini_gnn.snapshot import attach
from gemini_gnn.snapshot.store import arena, locks
from tests.snapshot.plain_training import (
    arena_folder,
    attach_and_close,
    context_of,
    parts,
    run_some,
)


@pytest.fixture
def folder():
    with arena_folder() as path:
        yield path


def test_the_memory_needed_is_said_at_every_start(folder, caplog):
    caplog.set_level("INFO")
    for generation in (1, 2):
        caplog.clear()
        attach_and_close(folder, generation)
        (said,) = [r.message for r in caplog.records if "of host memory needed" in r.message]
        assert "6.3 MB of host memory needed on this machine" in said
        assert ("0.0 MB of it not allocated yet" in said) is (generation == 2)


def test_files_are_private_and_allocated(folder):
    module, opt = parts()
    snapshots = attach((module, opt), context=context_of(folder))
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    for path in folder.iterdir():
        info = path.stat()
        assert stat.S_IMODE(info.st_mode) == 0o600 and info.st_blocks * 512 >= info.st_size > 1 << 20
    snapshots.close()


def test_too_little_room_is_said_before_anything_is_allocated(folder, monkeypatch):
    monkeypatch.setattr(arena, "room", lambda root: arena.Room(1000, "the size of /dev/shm", "make it larger"))
    with pytest.raises(
        SnapshotError, match=r"need 6\.\d MB more .* available are 1\.0 KB, limited by .*make it larger"
    ):
        attach(parts(), context=context_of(folder))
    assert not list(folder.iterdir())


def test_an_arena_of_another_user_or_a_link_is_refused(folder, monkeypatch, tmp_path):
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    folder.symlink_to(tmp_path)
    with pytest.raises(SnapshotError, match="it is a link"):
        attach(parts(), context=context_of(folder))
    folder.unlink()
    folder.mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    with pytest.raises(SnapshotError, match="belongs to user"):
        attach(parts(), context=context_of(folder))


def test_sweep_spares_the_living(folder):
    run_some(folder, 1)
    lock = locks.take_agent_lock(folder)
    assert lock is not None and locks.agent_lives(folder)
    assert arena.sweep(folder) == "its worker agent is alive; end it with launch/stop.py first" and folder.exists()
    os.close(lock)
    assert not locks.agent_lives(folder)
    # A process holds the lock of the trainers; a process that asks holds none itself, or it would lose it by asking.
    code = "import sys; from gemini_gnn.snapshot.store import locks; from pathlib import Path\n"
    code += "locks.hold_trainers_lock(Path(sys.argv[1])); print(flush=True); sys.stdin.read()"
    trainer = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with trainer:
        trainer.stdout.readline()
        reason = arena.sweep(folder)
        trainer.stdin.close()
        assert trainer.wait(30) == 0
    assert reason is not None and f"its process {trainer.pid} is not yet" in reason and folder.exists()
    assert arena.sweep(folder) is None and not folder.exists()
    assert "gone already" in str(arena.sweep(folder))


def test_room_knows_cgroups(tmp_path, monkeypatch):
    group = tmp_path / "a" / "b"
    group.mkdir(parents=True)
    for path, limit, used in ((tmp_path / "a", "1000000", "400000"), (group, "max", "1")):
        (path / "memory.max").write_text(limit)
        (path / "memory.current").write_text(used)
        (path / "memory.stat").write_text("anon 5\ninactive_file 100000\n")
    names = ("memory.max", "memory.current", "inactive_file")
    monkeypatch.setattr(arena.cgroups, "groups", lambda: [(tmp_path / "a", names), (group, names)])
    found = arena.room("/dev/shm")
    assert found.available == 700000 and str(tmp_path / "a") in found.limit
    with pytest.raises(SnapshotError, match=r"700\.0 KB"):
        arena.check_room(700001, found)
    arena.check_room(700000, found)
