"""The part of a run directory that outlives a start of its job: ``terms/``.

    terms/<n>.json   one record for each start; claimed by exclusive creation, so a term has one agent
    terms/id         random: tells this run directory from another one at the same path
    terms/lock       held by the worker agent of rank 0's machine while it lives

Agents and slot processes load this module: nothing heavy is imported.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import time
from pathlib import Path
from typing import Any

from gemini_gnn.errors import RunDirError
from gemini_gnn.files import create, read_record

ID_CHARACTERS = 32


def make_run_dir(run_dir: Path) -> None:
    """Make the folders that agents and slot processes write to.

    Raises:
        RunDirError: it cannot be written to.
    """
    try:
        for name in ("logs", "events", "terms"):
            (run_dir / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_writable(run_dir, error) from None


def not_writable(run_dir: Path, error: OSError) -> RunDirError:
    return RunDirError(f"run_dir {run_dir} is not writable ({error.strerror}); give another run_dir=...")


def claim_term(run_dir: Path, record: dict[str, Any]) -> int:
    """Claim the job's next term, and write ``record`` into its file.

    Raises:
        RunDirError: the file system refuses.
    """
    folder = run_dir / "terms"
    try:
        term = 1 + max((int(path.stem) for path in _terms(run_dir)), default=0)
        while not create(folder / f"{term}.json", json.dumps({"term": term, **record})):
            term += 1
    except OSError as error:
        raise RunDirError(f"cannot claim a term in {folder}: {error.strerror}; is run_dir writable?") from None
    return term


def newest_term(run_dir: Path) -> dict[str, Any]:
    """The record of the newest term; empty where there is none that can be read."""
    newest_first = sorted(_terms(run_dir), key=lambda path: int(path.stem), reverse=True)
    # A file may be empty: without links, an agent can be killed between claim and record.
    return next((record for record in map(read_record, newest_first) if record), {})


def _terms(run_dir: Path) -> list[Path]:
    return [path for path in (run_dir / "terms").glob("*.json") if path.stem.isdigit()]


def run_id(run_dir: Path, patience_s: float = 10.0) -> str:
    """The run directory's id; the first process that asks makes it.

    Raises:
        RunDirError: it can be neither made nor read.
    """
    path = run_dir / "terms" / "id"
    deadline = time.monotonic() + patience_s
    try:
        if not path.exists():
            create(path, secrets.token_hex(ID_CHARACTERS // 2))
        while len(found := path.read_text()) < ID_CHARACTERS:  # another machine is just writing it
            if time.monotonic() > deadline:
                raise RunDirError(f"{path} is incomplete: its writer died; remove the file and start again")
            time.sleep(0.05)
    except OSError as error:
        raise RunDirError(f"cannot make or read {path}: {error.strerror}; is run_dir writable?") from None
    return found


def lock_run_dir(run_dir: Path, file: str, owner: str, patience_s: float) -> int | None:
    """Lock ``file`` in ``run_dir``, as long as this process lives. Returns the descriptor; None: this file system has no locks.

    Args:
        owner: written into the file, for the message that another process gets.
        patience_s: how long to try; on NFS the lock of a dead process stays for a moment.

    Raises:
        RunDirError: another process holds the lock, or the file system refuses.
    """
    deadline = time.monotonic() + patience_s
    lock = None
    try:
        lock = os.open(run_dir / file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(lock, 0)
                os.pwrite(lock, owner.encode(), 0)
                return lock
            except BlockingIOError:
                if time.monotonic() > deadline:
                    holder = os.pread(lock, 1000, 0).decode(errors="replace") or "another process"
                    os.close(lock)
                    raise RunDirError(
                        f"run_dir {run_dir} is in use by {holder}; stop it there with `python launch/stop.py "
                        f"run_dir={run_dir}`, or give another run_dir=..."
                    ) from None
                time.sleep(0.05)
    except OSError as error:
        if lock is not None:
            os.close(lock)
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            return None
        raise RunDirError(f"cannot lock {run_dir / file}: {error.strerror}; is run_dir writable?") from None


def take_run_dir(run_dir: Path, owner: str, patience_s: float = 2.0) -> int | None:
    """Lock the job, by the agent of rank 0's machine. The arena's lock is not enough: other machines and users may share
    ``run_dir``. As :func:`lock_run_dir`."""
    return lock_run_dir(run_dir, "terms/lock", owner, patience_s)


def token(run_dir: Path) -> bytes:
    path = run_dir / "terms" / "token"
    if not path.exists():
        create(path, secrets.token_hex(32))
    return bytes.fromhex(path.read_text())
