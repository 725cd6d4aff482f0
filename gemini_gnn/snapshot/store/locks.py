"""The two locks of an arena: one owns it, one proves that a process may still write. Files only; imports nothing heavy.

``agent.lock``, an flock. Its holder owns ``/dev/shm/gemini-gnn-<uid>/<job>/``: the living worker agent, the shim that is
about to start one (the open descriptor passes from one to the other), or a sweeper. The kernel drops the lock with its last
holder, so there are no pid files to trust and no stale locks. Only the holder may remove the folder. A process that opened
the file just before a removal holds a lock on nothing; it notices that the path leads to another file, and begins again.

``trainers.lock``, shared *record* locks of every warm parent and trainer. Record locks belong to a process, its children do
not inherit them, and the kernel drops them when it closes the process's files. If no process holds one, none of an earlier
membership can still write here, also across the death of an agent.

The locks on the slots themselves are arena.py's.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

AGENT_LOCK, TRAINERS_LOCK = "agent.lock", "trainers.lock"

_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
_FLOCK = "hhqqi4x"  # struct flock on 64-bit Linux: type, whence, start, length, pid


def take_agent_lock(folder: Path) -> int | None:
    """The lock as a file descriptor, or None while another process holds it.

    Raises:
        FileNotFoundError: there is no folder, or the lock's last holder has just removed it: make it and try again.
        OSError: the file cannot be made.
    """
    path = folder / AGENT_LOCK
    lock = os.open(path, _FLAGS | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock), os.stat(path)):
            raise FileNotFoundError(f"{path} was removed and made anew by another process")
    except BlockingIOError:
        os.close(lock)
        return None
    except OSError:
        os.close(lock)
        raise
    return lock


def agent_lives(folder: Path) -> bool:
    """Whether a process holds the agent's lock. Makes no file."""
    try:
        lock = os.open(folder / AGENT_LOCK, _FLAGS)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def hold_trainers_lock(folder: Path) -> int:
    """A warm parent or trainer calls this; the descriptor stays open, and must be the only one, until it dies."""
    lock = os.open(folder / TRAINERS_LOCK, _FLAGS | os.O_CREAT, 0o600)
    fcntl.lockf(lock, fcntl.LOCK_SH)
    return lock


def living_trainer(folder: Path) -> int | None:
    """Pid of a warm parent or trainer that is not dead yet; None proves that there is none. Takes no lock.

    A process that holds the lock itself must not call this: closing a file drops the process's record locks on it.
    """
    try:
        lock = os.open(folder / TRAINERS_LOCK, _FLAGS)
    except FileNotFoundError:
        return None
    try:
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(lock, fcntl.F_GETLK, asked))
        return None if kind == fcntl.F_UNLCK else pid
    finally:
        os.close(lock)
