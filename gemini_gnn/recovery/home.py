"""The arena: the folder in host memory in which a job lives on this machine. Files only.

Its locks (snapshot/store/locks.py) say which process owns it, and which may still write into it. The job's files in the
run directory are in observe/terms.py.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from pathlib import Path

from gemini_gnn.errors import RecoveryError, SnapshotError
from gemini_gnn.recovery import board
from gemini_gnn.snapshot.store.arena import folder_of, list_folder, make_folder, slots
from gemini_gnn.snapshot.store.format import SlotState
from gemini_gnn.snapshot.store.locks import AGENT_LOCK, TRAINERS_LOCK, living_trainer, take_agent_lock

AGENT_SOCKET = "agent.sock"
ROOT_PORT = "root.port"  # where this machine answers as root: an heir listens there, too
RUN_ID, NEW_RUN_ID = "run-id", "run-id.new"  # id of the run directory that the snapshots belong to
# All other files in an arena are snapshots.
OWN_FILES = {AGENT_LOCK, AGENT_SOCKET, ROOT_PORT, TRAINERS_LOCK, RUN_ID, NEW_RUN_ID, board.FILE, board.BELL}
MAX_SOCKET_PATH = 100  # of 108 bytes in sockaddr_un, with room for a temporary name


def job_id(run_dir: Path) -> str:
    """Short id of the job that writes to ``run_dir``: the same for every start of it, on every machine."""
    return hashlib.sha256(os.fsencode(os.path.realpath(run_dir))).hexdigest()[:12]


def arena_of(run_dir: Path, root: str | os.PathLike[str] = "/dev/shm") -> Path:
    """The job's arena folder under ``root`` (a RAM file system)."""
    return folder_of(job_id(run_dir), root)


def make_arena(arena: Path) -> None:
    """Create the folder (mode 0700), or check the one that is there.

    Raises:
        RecoveryError: it cannot be made, belongs to another user, or is not a plain folder.
    """
    if len(os.fsencode(arena / AGENT_SOCKET)) > MAX_SOCKET_PATH:
        raise RecoveryError(
            f"the path {arena} is too long for a socket; expected at most {MAX_SOCKET_PATH} bytes, "
            f"got {len(os.fsencode(arena / AGENT_SOCKET))}; give a shorter snapshot.arena"
        )
    try:
        make_folder(arena)
    except SnapshotError as error:
        raise RecoveryError(str(error)) from None


def take_lock(arena: Path) -> int | None:
    """The arena's lock as a file descriptor, or None while another process holds it. Makes the folder."""
    while True:
        make_arena(arena)
        try:
            return take_agent_lock(arena)
        except FileNotFoundError:
            continue  # its last holder has just removed it
        except OSError as error:
            raise RecoveryError(
                f"cannot make {arena / AGENT_LOCK}: {error.strerror}; is {arena.parent.parent} full?"
            ) from None


def snapshot_files(arena: Path) -> list[Path]:
    """All files in the arena but the agent's own."""
    return [path for path in list_folder(arena) if path.name not in OWN_FILES]


def snapshot_bytes(arena: Path) -> int:
    """Host memory that the snapshots hold. A file that is just removed counts as nothing."""
    total = 0
    for path in snapshot_files(arena):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_blocks * 512
    return total


def remove_snapshots(arena: Path) -> tuple[int, int]:
    """Remove the snapshots; returns their number and bytes.

    The caller holds the arena's lock and has reaped all trainers.
    """
    files = size_bytes = 0
    for path in snapshot_files(arena):
        size_bytes += path.stat().st_blocks * 512
        path.unlink()
        files += 1
    return files, size_bytes


def holds_nothing(arena: Path) -> bool:
    """Whether the arena has no snapshot: each file is a slot, and none is committed. An unknown file counts as something."""
    files = slots(arena)
    try:
        committed = any(file.view().state is SlotState.COMMITTED for file in files)
        return not committed and len(files) == len(snapshot_files(arena))
    finally:
        for file in files:
            file.close()


def leave_arena(arena: Path) -> None:
    """Remove the agent's files and, where no snapshot is left, the folders. The caller holds the arena's lock."""
    ours = [AGENT_SOCKET, ROOT_PORT, board.FILE, board.BELL, TRAINERS_LOCK, AGENT_LOCK]
    if living_trainer(arena) is not None:  # it is stuck in the kernel: the next agent must see it
        ours.remove(TRAINERS_LOCK)
    if not snapshot_files(arena):
        ours += [RUN_ID, NEW_RUN_ID]
    for name in ours:
        (arena / name).unlink(missing_ok=True)
    for folder in (arena, arena.parent):
        try:
            folder.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                raise
            return


def root_port(arena: Path) -> int:
    """The port of the agent before this one; 0: there is none, or its file was torn."""
    try:
        port = int((arena / ROOT_PORT).read_text())
    except (OSError, ValueError):
        return 0
    return port if 0 < port < 1 << 16 else 0


def belongs_to(arena: Path, run: str) -> bool:
    """Whether the snapshots in ``arena`` were made for the run directory with the id ``run``."""
    try:
        return (arena / RUN_ID).read_text() == run
    except FileNotFoundError:
        return False


def why_forget(arena: Path, run: str, resume: str, several_machines: bool) -> str:
    """Why a start removes the snapshots in ``arena`` before it begins; empty if it may resume from them.

    Raises:
        RecoveryError: they belong to another run directory, and the job has several machines. The others may hold
            snapshots of this run, so this machine alone may not begin again.
    """
    if resume == "never":
        return "resume=never"
    if resume == "must" or belongs_to(arena, run) or not snapshot_files(arena):
        return ""
    if several_machines:
        raise RecoveryError(
            f"the snapshots in host memory on {os.uname().nodename} ({arena}) were made for another run directory at this "
            "path: it has been removed since, or this machine does not see it (is its file system mounted?). Nothing was "
            "changed. resume=never removes them and starts again from step 0"
        )
    return "they belong to a run directory that was removed"  # the first start of a new one begins at step 0


def assign(arena: Path, run: str) -> None:
    """Note that the snapshots in ``arena`` belong to the run directory with the id ``run``.

    The caller holds the arena's lock and has removed the snapshots of any other run directory.


    Raises:
        RecoveryError: the file cannot be written.
    """
    temporary = arena / NEW_RUN_ID
    try:
        temporary.write_text(run)
        os.replace(temporary, arena / RUN_ID)
    except OSError as error:
        raise RecoveryError(f"cannot write {temporary}: {error.strerror}; is {arena.parent.parent} full?") from None
