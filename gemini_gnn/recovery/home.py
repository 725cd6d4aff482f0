"""Where a job lives on this machine and in its run directory: arena folder, locks, terms. Files only.

The locks, and what they say about who owns the arena and who may still write into it, are snapshot/locks.py's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import time
from pathlib import Path
from typing import Any

from gemini_gnn.errors import RecoveryError, RunDirError, SnapshotError
from gemini_gnn.files import sync
from gemini_gnn.recovery import board
from gemini_gnn.snapshot.store.arena import folder_of, list_folder, make_folder, slots
from gemini_gnn.snapshot.store.format import SlotState
from gemini_gnn.snapshot.store.locks import AGENT_LOCK, TRAINERS_LOCK, living_trainer, take_agent_lock

AGENT_SOCKET = "agent.sock"
RUN_ID, NEW_RUN_ID = "run-id", "run-id.new"  # of the run directory that the snapshots beside it belong to
# Everything else in an arena is a snapshot's.
OWN_FILES = {AGENT_LOCK, AGENT_SOCKET, TRAINERS_LOCK, RUN_ID, NEW_RUN_ID, board.FILE}
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
        RecoveryError: it cannot be made, belongs to someone else, or is not a plain folder.
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
    """The arena's lock as a file descriptor, or None while somebody else holds it. Makes the folder."""
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
    """What is in the arena besides the agent's own files."""
    return [path for path in list_folder(arena) if path.name not in OWN_FILES]


def remove_snapshots(arena: Path) -> tuple[int, int]:
    """Remove them; returns their number and bytes. The caller holds the arena's lock and has reaped all trainers."""
    files = size_bytes = 0
    for path in snapshot_files(arena):
        size_bytes += path.stat().st_blocks * 512
        path.unlink()
        files += 1
    return files, size_bytes


def holds_nothing(arena: Path) -> bool:
    """Whether there are only slots without a committed snapshot; a file that is no slot is not ours to judge."""
    files = slots(arena)
    try:
        committed = any(file.view().state is SlotState.COMMITTED for file in files)
        return not committed and len(files) == len(snapshot_files(arena))
    finally:
        for file in files:
            file.close()


def leave_arena(arena: Path) -> None:
    """Remove the agent's files and, where no snapshot is left, the folders. The caller holds the arena's lock."""
    ours = [AGENT_SOCKET, board.FILE, TRAINERS_LOCK, AGENT_LOCK]
    if living_trainer(arena) is not None:  # stuck in the kernel: the next agent must still see it
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


# --- run directory ----------------------------------------------------------------------------------------------------


def make_run_dir(run_dir: Path) -> None:
    """
    Raises:
        RunDirError: it cannot be written to.
    """
    try:
        for name in ("logs", "events", "terms"):
            (run_dir / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirError(f"run_dir {run_dir} is not writable ({error.strerror}); give another run_dir=...") from None


def claim_term(run_dir: Path, record: dict[str, Any]) -> int:
    """The next term of the job, claimed by exclusive creation of ``terms/<n>.json``.

    Raises:
        RunDirError: the file system refuses.
    """
    folder = run_dir / "terms"
    try:
        taken = [int(path.stem) for path in folder.glob("*.json") if path.stem.isdigit()]
        term = max(taken, default=0) + 1
        while True:
            try:
                file = os.open(folder / f"{term}.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                break
            except FileExistsError:
                term += 1
        with os.fdopen(file, "w") as text:
            text.write(json.dumps({"term": term, **record}))
            text.flush()
            os.fsync(text.fileno())
        sync(folder)
    except OSError as error:
        raise RunDirError(f"cannot claim a term in {folder}: {error.strerror}; is run_dir writable?") from None
    return term


def take_run_dir(run_dir: Path, who: str, patience_s: float = 2.0) -> int | None:
    """The lock on ``terms/lock``, held by the agent of rank 0's machine as long as it lives; None where the file system has none.

    The arena's lock is this machine's and this user's; ``run_dir`` may be shared with others.

    Raises:
        RunDirError: another agent holds it.
    """
    deadline = time.monotonic() + patience_s  # on NFS the lock of a dead agent stays for a moment
    lock = None
    try:
        lock = os.open(run_dir / "terms" / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(lock, 0)
                os.pwrite(lock, who.encode(), 0)
                return lock
            except BlockingIOError:
                if time.monotonic() > deadline:
                    owner = os.pread(lock, 1000, 0).decode(errors="replace") or "another worker agent"
                    os.close(lock)
                    raise RunDirError(
                        f"run_dir {run_dir} is in use by {owner}; stop it there with `python launch/stop.py "
                        f"run_dir={run_dir}`, or give another run_dir=..."
                    ) from None
                time.sleep(0.05)
    except OSError as error:
        if lock is not None:
            os.close(lock)
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            return None
        raise RunDirError(f"cannot lock {run_dir}/terms/lock: {error.strerror}; is run_dir writable?") from None


def run_id(run_dir: Path, patience_s: float = 10.0) -> str:
    """What tells this run directory from another one at the same path: random, made by whoever comes first.

    Raises:
        RunDirError: it can be neither made nor read.
    """
    path, made = run_dir / "terms" / "id", secrets.token_hex(16)
    deadline = time.monotonic() + patience_s
    try:
        if not path.exists():
            _create_whole(path, made)
        while len(found := path.read_text()) < len(made):  # another machine is just writing it
            if time.monotonic() > deadline:
                raise RunDirError(f"{path} is incomplete: who made it died; remove the file, and start again")
            time.sleep(0.05)
    except OSError as error:
        raise RunDirError(f"cannot make or read {path}: {error.strerror}; is run_dir writable?") from None
    return found


def _create_whole(path: Path, text: str) -> None:
    """Create ``path`` with ``text`` unless it exists. Who dies meanwhile leaves no part of it under that name."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "x") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        with contextlib.suppress(FileExistsError), open(path, "x") as file:  # a file system without links
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def belongs_to(arena: Path, run: str) -> bool:
    """Whether the snapshots in ``arena`` were made for the run directory with the id ``run``."""
    try:
        return (arena / RUN_ID).read_text() == run
    except FileNotFoundError:
        return False


def why_forget(arena: Path, run: str, resume: str, several_machines: bool) -> str:
    """Why a start removes the snapshots in ``arena`` before it begins; empty where it may go on from them.

    Raises:
        RecoveryError: they are another run directory's, on one of several machines. The others may hold snapshots of the
            same run: this one alone may not decide that it begins again.
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
    return "they are of a run directory that was removed"  # its first start must not go on in the middle


def assign(arena: Path, run: str) -> None:
    """From now on they do. The caller holds the arena's lock and has removed what was another's.

    Raises:
        RecoveryError: the file cannot be written.
    """
    temporary = arena / NEW_RUN_ID
    try:
        temporary.write_text(run)
        os.replace(temporary, arena / RUN_ID)
    except OSError as error:
        raise RecoveryError(f"cannot write {temporary}: {error.strerror}; is {arena.parent.parent} full?") from None


def newest_term(run_dir: Path) -> dict[str, Any]:
    """The record of the newest term; empty where there is none that can be read."""
    terms = sorted((int(path.stem), path) for path in (run_dir / "terms").glob("*.json") if path.stem.isdigit())
    records = (_read_record(path) for _, path in reversed(terms))  # who died just after the claim has left an empty one
    return next((record for record in records if record), {})


def write_status(run_dir: Path, record: dict[str, Any]) -> None:
    """Replace ``status.json``; a reader sees the old or the new file. Raises OSError."""
    temporary = run_dir / f".status.json.{os.getpid()}"
    with open(temporary, "w") as file:
        file.write(json.dumps(record, indent=1))
    os.replace(temporary, run_dir / "status.json")


def read_status(run_dir: Path) -> dict[str, Any]:
    """``status.json``; empty where there is none or it is not ours."""
    return _read_record(run_dir / "status.json")


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
