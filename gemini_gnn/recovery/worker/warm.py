"""The warm parent: has imported torch and its kin once, and forks trainers in milliseconds.

A process of its own (``python -m gemini_gnn.recovery.worker.warm``), because its agent may hold sockets and locks that a fork
must not copy. It imports and does nothing else: a parent that ran one multi-threaded torch operation, or opened a GPU,
leaves children that hang for ever. So the agent starts it with numeric libraries pinned to one thread, and before
every fork it is checked that there is exactly one thread here and no open GPU; else the fork is refused, with the
import that started the threads.

It dies with its agent, and its trainers die with it (PDEATHSIG both times). It reaps its trainers: each is seen as a
zombie first, its process group is killed while the zombie still holds the number, then it is reaped and reported.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from gemini_gnn.recovery import messages, processes
from gemini_gnn.recovery.worker import entry
from gemini_gnn.snapshot.store import locks


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def nvidia_files() -> dict[int, str]:
    """Descriptors of NVIDIA's device files this process has open, with their paths."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            path = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the one that lists the folder
        if path.startswith("/dev/nvidia"):
            found[int(name)] = path
    return found


def preload(modules: list[str]) -> str | None:
    """Import ``modules``; what went wrong, or None."""
    for name in modules:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit):
            return f"cannot import {name}:\n{traceback.format_exc()}"
        if (complaint := unfit()) is not None:
            return f"after the import of {name} {complaint}"
    gc.collect()
    gc.freeze()  # what is imported is never collected: its pages stay shared, and ZeRO-3's start is 8 times faster
    return None


def unfit() -> str | None:
    """Why this process must not fork, or None."""
    if threads() != 1:
        return f"the warm parent has {threads()} threads, and a fork copies one: expected 1; take it out of preload"
    # Who only counts GPUs (NVML, torch.cuda.is_available) opens other files than CUDA does, and a fork survives that.
    if "/dev/nvidia-uvm" in nvidia_files().values():
        return "the warm parent has initialised CUDA, which does not survive a fork; take it out of preload"
    return None


def reap() -> list[tuple[int, int]]:
    """(pid, code) of every child that has ended, its process group killed; code is negative for a signal."""
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


def serve(agent: messages.Channel) -> dict[str, Any]:
    """Carry out the agent's requests. Returns only in a forked child: the task it is to become."""
    added = dict[str, str]()  # what the imports put into the environment
    ranks: dict[int, int] = {}  # pid -> rank of the living trainers
    wakeup, signalled = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(signalled, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    poll = select.poll()
    poll.register(wakeup, select.POLLIN)
    poll.register(agent, select.POLLIN)
    while not agent.closed:
        poll.poll()
        with contextlib.suppress(BlockingIOError):
            os.read(wakeup, 4096)
        for request in agent.receive():
            if request["kind"] == "preload":
                before, begin = dict(os.environ), time.monotonic()
                sys.path[:] = request["path"]
                problem = preload(request["modules"])
                added = {key: value for key, value in os.environ.items() if before.get(key) != value}
                answer = {"kind": "ready"} if problem is None else {"kind": "refused", "text": problem}
                agent.send({**answer, "seconds": time.monotonic() - begin}, timeout_s=10.0)
            elif request["kind"] == "fork":
                rank, task = request["place"]["rank"], {**request, "environment": {**added, **request["environment"]}}
                pid, problem = _fork(task)
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    # NVML goes on with the files it opened before the fork: closed, their numbers would be another's.
                    processes.close_descriptors({0, 1, 2, *task["descriptors"], *nvidia_files()})
                    return task
                for descriptor in task["descriptors"]:
                    os.close(descriptor)
                if pid is None:
                    agent.send({"kind": "refused", "rank": rank, "text": problem}, timeout_s=10.0)
                else:
                    ranks[pid] = rank
                    agent.send({"kind": "forked", "rank": rank, "pid": pid}, timeout_s=10.0)
            elif request["kind"] == "kill":
                for pid, rank in ranks.items():
                    if rank in request["ranks"]:
                        os.kill(pid, signal.SIGKILL)  # not reaped, so the number is still its own
        for pid, code in reap():
            if pid in ranks:  # else a helper that an import has started
                agent.send({"kind": "exited", "rank": ranks.pop(pid), "code": code}, timeout_s=10.0)
    os._exit(0)  # the agent is gone


def _fork(task: dict[str, Any]) -> tuple[int | None, str]:
    if (complaint := unfit()) is not None:
        return None, complaint
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        return os.fork(), ""
    except OSError as error:
        return None, f"cannot fork a trainer: {error.strerror}; is memory or the number of processes exhausted?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", required=True, help="for people who read the process table")
    parser.add_argument("--arena", type=Path, required=True)
    parser.add_argument("--agent", type=int, required=True, help="pid of the agent")
    parser.add_argument("--channel", type=int, required=True, help="descriptor of the socket to it")
    options = parser.parse_args()
    processes.die_with_parent(options.agent)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # the agent decides
    lock = locks.hold_trainers_lock(options.arena)
    own_pid = os.getpid()
    task = serve(messages.Channel(socket.socket(fileno=options.channel)))
    del lock
    entry.run(task, own_pid)


if __name__ == "__main__":
    main()
