"""Linux calls that make processes die with each other, and that prove they are gone."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Collection, Set
from pathlib import Path

from gemini_gnn.errors import RecoveryError

AGENT_NAME = "gnn-agent"  # of the process, also of one that was a warm parent before
DUMP_STACKS = signal.SIGRTMIN + 5  # to a trainer; SIGUSR1 and SIGUSR2 are the scripts' and schedulers'
PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 1, 15, 36

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int | bytes) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise RecoveryError(f"prctl({option}) failed: {os.strerror(ctypes.get_errno())}; expected Linux 3.4 or newer")


def die_with_parent(parent: int) -> None:
    """Ask the kernel for SIGKILL when the thread that forked this process ends. Exits if it has ended already."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def close_descriptors(keep: set[int]) -> None:
    """Close all others: inherited descriptors hold locks, sockets and other processes' ends of pipes."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in keep:
            try:
                os.close(int(name))
            except OSError:
                continue  # the one that listed the folder


def adopt_orphans() -> None:
    """Ask the kernel to make orphans below this process its children, not init's: it can reap them."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def name_this(name: str) -> None:
    """Set the name of this process in ``ps -o comm`` and ``top``."""
    _prctl(PR_SET_NAME, name.encode())


def fall_to(agent: int, patience_s: float = 5.0) -> None:
    """Wait until the parent has exited and ``agent``, the subreaper above, is the parent; then die with the agent.

    Exits if the agent has died, or if the parent does not exit in time.
    """
    deadline = time.monotonic() + patience_s
    while os.getppid() != agent:
        if time.monotonic() > deadline:
            os._exit(1)
        time.sleep(0.0002)  # there is no event to wait for
    die_with_parent(agent)


def reap_children() -> list[tuple[int, int]]:
    """Reap every child that has ended, and kill its process group; (pid, code) of each. A signal's code is negative.

    The group is killed before the zombie is reaped: until then no other process can get its number.
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
    """Reap the child ``pid``; returns its code, or None if it has not ended after ``patience_s``."""
    deadline = time.monotonic() + patience_s
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.001)


def kill_and_reap_children(patience_s: float, spared: Set[int] = frozenset()) -> bool:
    """Kill all children but the ``spared``, and the orphans that then become ours. Returns whether all were reaped in time."""
    deadline = time.monotonic() + patience_s
    while True:
        reap_children()
        left = set(children()) - spared
        if not left:
            return True
        if time.monotonic() > deadline:
            return False
        for pid in left:
            with contextlib.suppress(PermissionError):  # a program of another user that a trainer started
                os.kill(pid, signal.SIGKILL)  # our child, not reaped: no other process has this number
        time.sleep(0.001)


def children() -> list[int]:
    """Pids of the children of this process, dead ones that are not reaped included."""
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
    """The environment variable by which leftovers are found: warm parent, trainers and their children inherit it."""
    return "GEMINI_GNN_ARENA", os.path.realpath(arena)


def kill_marked(arena: Path, patience_s: float, spare: Collection[int] = ()) -> tuple[int, bool]:
    """Kill all processes that a dead agent's warm parent and trainers left, in any process group or session.

    PDEATHSIG kills the processes this package forks, but not those a trainer started (data loader workers, daemons). They
    are known by the environment they began with: a recorded pid or session may belong to another process by now. A process
    that overwrote its environment (setproctitle) is not found. The caller holds the arena's lock, so no living agent's
    processes are killed, but for the caller's own: itself and ``spare``.

    Returns:
        The number of killed processes, and whether none of them lives any more.
    """
    name, value = mark(arena)
    entry, killed = f"{name}={value}".encode(), set[int]()
    deadline = time.monotonic() + patience_s
    while True:
        found = {
            int(path.name)
            for path in Path("/proc").glob("[0-9]*")
            if int(path.name) not in spare and _kill_if(path, entry)
        }
        killed |= found
        if not found or time.monotonic() > deadline:
            return len(killed), not found
        time.sleep(0.01)  # then look again: one of them may have forked before it died


def _kill_if(process: Path, entry: bytes) -> bool:
    """Kill the process if it lives, is this user's, and began with ``entry`` in its environment. Returns whether it did."""
    pid = int(process.name)
    try:
        if pid == os.getpid() or process.stat().st_uid != os.getuid():
            return False
        handle = os.pidfd_open(pid)  # before we read its environment: its number is not reused in between
    except OSError:
        return False  # gone
    try:
        if entry not in (process / "environ").read_bytes().split(b"\0"):
            return False
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    except OSError:
        return False  # gone, or a program with more rights than ours
    finally:
        os.close(handle)
    return True
