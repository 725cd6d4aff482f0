"""What Linux offers for processes that must not outlive each other, and for knowing that they are gone."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from pathlib import Path

from gemini_gnn.errors import RecoveryError

DUMP_STACKS = signal.SIGRTMIN + 5  # to a trainer; SIGUSR1 and SIGUSR2 are the scripts' and schedulers'
PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 1, 15, 36

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int | bytes) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise RecoveryError(f"prctl({option}) failed: {os.strerror(ctypes.get_errno())}; expected Linux 3.4 or newer")


def die_with_parent(parent: int) -> None:
    """The kernel sends SIGKILL when the thread that forked this process ends. Exits if that has happened already."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def close_descriptors(keep: set[int]) -> None:
    """Close all but ``keep``: inherited descriptors hold locks, sockets and other processes' ends of pipes."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in keep:
            try:
                os.close(int(name))
            except OSError:
                continue  # the one that listed the folder


def adopt_orphans() -> None:
    """Orphans below this process become its children, not init's, so that it can reap them."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def name_this(name: str) -> None:
    """What ``ps -o comm`` and ``top`` show for this process."""
    _prctl(PR_SET_NAME, name.encode())


def fall_to(agent: int, patience_s: float = 5.0) -> None:
    """Wait until the parent has exited and ``agent``, the subreaper above it, is the parent; die with that one.

    Exits if the agent has died, or the parent does not exit in time.
    """
    deadline = time.monotonic() + patience_s
    while os.getppid() != agent:
        if time.monotonic() > deadline:
            os._exit(1)
        time.sleep(0.0002)  # there is no event to wait for
    die_with_parent(agent)


def reap_children() -> list[tuple[int, int]]:
    """(pid, code) of every child that has ended, reaped now with its process group killed; code is negative for a signal.

    The group is killed while the zombie still holds the number: it can be nobody else's.
    """
    ended: list[tuple[int, int]] = []
    while True:
        try:
            child = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return ended
        if child is None:
            return ended
        with contextlib.suppress(ProcessLookupError, PermissionError):  # died before it had a group of its own
            os.killpg(child.si_pid, signal.SIGKILL)  # data loader workers and the like
        _, status = os.waitpid(child.si_pid, 0)
        ended.append((child.si_pid, os.waitstatus_to_exitcode(status)))


def reap_child(pid: int, patience_s: float) -> int | None:
    """The code of the child ``pid``, reaped; None if it has not ended after ``patience_s``."""
    deadline = time.monotonic() + patience_s
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.001)


def kill_and_reap_children(patience_s: float) -> bool:
    """SIGKILL all children, and the orphans that become ours thereby; whether all of them are reaped in time."""
    deadline = time.monotonic() + patience_s
    while True:
        reap_children()
        left = children()
        if not left:
            return True
        if time.monotonic() > deadline:
            return False
        for pid in left:
            with contextlib.suppress(PermissionError):  # a program of another user that a trainer started
                os.kill(pid, signal.SIGKILL)  # our child, not reaped: the number is its own
        time.sleep(0.001)


def children() -> list[int]:
    """Pids of the children of this process, also those that are dead and not reaped."""
    own = os.getpid()
    try:
        return list(map(int, Path(f"/proc/{own}/task/{own}/children").read_text().split()))
    except OSError:  # a kernel without CONFIG_PROC_CHILDREN
        return [int(path.name) for path in Path("/proc").glob("[0-9]*") if _parent(path) == str(own)]


def is_stopped(pid: int) -> bool:
    return _stat(Path(f"/proc/{pid}"))[:1] in (["T"], ["t"])


def _parent(process: Path) -> str:
    """Pid of its parent; empty for a process that is gone."""
    return "".join(_stat(process)[1:2])


def _stat(process: Path) -> list[str]:
    """What follows its name in ``stat``: state, parent, ...; nothing for a process that is gone."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def mark(arena: Path) -> tuple[str, str]:
    """Environment variable that warm parent, trainers and all that these start inherit: how leftovers are known."""
    return "GEMINI_GNN_ARENA", os.path.realpath(arena)


def kill_marked(arena: Path, patience_s: float) -> tuple[int, bool]:
    """SIGKILL to everything a dead agent's warm parent and trainers left, whatever group or session it is in.

    PDEATHSIG reaches the processes this package forks, not what a trainer started (data loader workers, daemons). A
    recorded pid or session could be somebody else's by now; the environment a process began with cannot. What overwrote
    its own (setproctitle) is not found. The caller holds the arena's lock, so no living agent's processes are hit.

    Returns:
        How many were killed, and whether none lives any more.
    """
    name, value = mark(arena)
    entry, killed = f"{name}={value}".encode(), set[int]()
    deadline = time.monotonic() + patience_s
    while True:
        found = {int(path.name) for path in Path("/proc").glob("[0-9]*") if _kill_if(path, entry)}
        killed |= found
        if not found or time.monotonic() > deadline:
            return len(killed), not found
        time.sleep(0.01)  # then again: one of them may have forked just before


def _kill_if(process: Path, entry: bytes) -> bool:
    """SIGKILL to a process of this user that began with ``entry`` in its environment, and lives."""
    pid = int(process.name)
    try:
        if pid == os.getpid() or process.stat().st_uid != os.getuid():
            return False
        handle = os.pidfd_open(pid)  # before its environment is read: no number is reused in between
    except OSError:
        return False  # gone
    try:
        if entry not in (process / "environ").read_bytes().split(b"\0"):
            return False
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    except OSError:
        return False  # gone, or (a program with more rights than ours) not to be touched
    finally:
        os.close(handle)
    return True
