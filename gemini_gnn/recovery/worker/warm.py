"""The warm parent: imports torch and the like once, and forks trainers in milliseconds.

It is a process of its own (``python -m gemini_gnn.recovery.worker.warm``), because a fork must not copy the sockets and locks
of the agent. It only imports: if it ran one multi-threaded torch operation, or opened a GPU, its forks would hang for ever.
So the agent starts it with numeric libraries pinned to one thread. After each import and before every fork it checks that it
has one thread and no open GPU. Otherwise it refuses, and names the import that started the threads.

Its trainers are not its children: a process in between forks them and exits, so they fall to the agent, which reaps them.
If the warm parent dies, they live on.

The heir. If the agent dies, its warm parent takes its place: it takes the arena's lock, forks, and *becomes* the worker
agent; the fork is its warm parent, ready at once. A new agent would first import for seconds. The heir competes for the lock
with the slot processes, which give it a moment; whoever has the lock is the agent. A warm parent that is still importing,
or that must not fork, is no heir: it ends, or the next agent kills it with all that the dead one left.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from gemini_gnn.recovery import home, messages, processes
from gemini_gnn.recovery.worker import entry
from gemini_gnn.recovery.worker.agent import run
from gemini_gnn.recovery.worker.children import Warm

INHERIT_S = 2.0  # until the kernel has ended the agent


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def nvidia_files() -> dict[int, str]:
    """The open descriptors of NVIDIA's device files, with their paths."""
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
    """Import ``modules``. Returns why this failed, or None."""
    for name in modules:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit):
            return f"cannot import {name}:\n{traceback.format_exc()}"
        if (complaint := unfit()) is not None:
            return f"after the import of {name} {complaint}"
    gc.collect()
    gc.freeze()  # imported objects are never collected: their pages stay shared, and ZeRO-3 starts 8 times faster
    return None


def unfit() -> str | None:
    """Why this process must not fork, or None."""
    if threads() != 1:
        return f"the warm parent has {threads()} threads, and a fork copies one: expected 1; take it out of preload"
    # Counting GPUs (NVML, torch.cuda.is_available) opens other files than CUDA does; a fork survives that.
    if "/dev/nvidia-uvm" in nvidia_files().values():
        return "the warm parent has initialised CUDA, which does not survive a fork; take it out of preload"
    return None


@dataclass
class Imported:
    """What the agent has had imported. ``added``: variables that imports put into the environment."""

    modules: list[str]
    path: list[str]
    added: dict[str, str]


def serve(agent: messages.Channel, agent_pid: int, imported: Imported | None) -> tuple[int | None, Imported | None]:
    """Carry out the agent's requests.

    Returns:
        In a trainer its socket to the agent. None: the agent is gone.
    """
    while not agent.closed:
        for request in agent.wait(3600.0):
            if isinstance(request, messages.Preload):
                before, begin = dict(os.environ), time.monotonic()
                sys.path[:] = request.path
                problem = preload(request.modules)
                added = {key: value for key, value in os.environ.items() if before.get(key) != value}
                imported = Imported(request.modules, request.path, added) if problem is None else None
                done = messages.Ready(time.monotonic() - begin)
                agent.send(done if problem is None else messages.Unfit(problem), timeout_s=10.0)
            elif isinstance(request, messages.Fork):
                trainer = _fork_all(request.descriptors, agent, agent_pid)
                if trainer is not None:
                    return trainer, imported
                for descriptor in request.descriptors:
                    os.close(descriptor)
    return None, imported


def inherit(run_dir: Path, arena: Path, imported: Imported) -> messages.Channel:
    """Become the worker agent. Returns in the fork that is its warm parent; ends with the job, or at once without the lock."""
    deadline = time.monotonic() + INHERIT_S
    while (lock := home.take_lock(arena)) is None:
        if time.monotonic() > deadline:
            os._exit(0)  # a slot process was faster
        time.sleep(0.002)  # the kernel is still ending the agent
    ours, theirs = messages.pair(messages.FROM_WARM)
    pid = os.fork()
    if pid == 0:
        processes.close_descriptors({0, 1, 2, theirs.fileno(), *nvidia_files()})
        return messages.Channel(theirs, messages.TO_WARM)
    theirs.close()
    run(run_dir, arena, Warm(pid, ours, imported.modules, imported.path))
    os.close(lock)
    os._exit(0)


def _fork_all(descriptors: list[int], agent: messages.Channel, agent_pid: int) -> int | None:
    """Fork a trainer for each of ``descriptors``, in a process in between. Returns in a trainer its own, otherwise None."""
    if (complaint := unfit()) is not None:
        agent.send(messages.Unfit(complaint), timeout_s=10.0)
        return None
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        warm = os.getpid()
        between = os.fork()
        if between:
            os.waitpid(between, 0)
            return None
        processes.die_with_parent(warm)
        for descriptor in descriptors:
            if os.fork() == 0:
                # NVML goes on with the files it opened before the fork. If they were closed, other files would get their numbers.
                processes.close_descriptors({0, 1, 2, descriptor, *nvidia_files()})
                processes.fall_to(agent_pid)
                return descriptor
    except OSError as error:
        text = f"cannot fork a trainer: {error.strerror}; is memory or the number of processes exhausted?"
        agent.send(messages.Unfit(text), timeout_s=10.0)
        if os.getpid() == warm:
            return None
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", required=True, help="for people who read the process table")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--arena", type=Path, required=True)
    parser.add_argument("--heir", action="store_true", help="take the agent's place when it dies")
    parser.add_argument("--channel", type=int, required=True, help="descriptor of the socket to it")
    options = parser.parse_args()
    agent_pid = os.getppid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # the agent decides
    processes.name_this("gnn-warm")
    agent = messages.Channel(socket.socket(fileno=options.channel), messages.TO_WARM)
    imported: Imported | None = None
    while True:
        descriptor, imported = serve(agent, agent_pid, imported)
        if descriptor is not None:
            entry.run(descriptor, imported.added if imported else {}, options.arena)
        if imported is None or not options.heir or unfit() is not None:
            os._exit(0)
        agent_pid = os.getpid()
        agent.close()
        agent = inherit(options.run_dir, options.arena, imported)


if __name__ == "__main__":
    main()
