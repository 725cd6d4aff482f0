"""DeepSpeed's launcher: how it is started, how a slot prints its error before the others end, how it returns after a failure.

When the job has failed, the launcher may wait for machines that no longer run it. :func:`free_launcher` ends its ssh clients
for those machines. It ends an ssh only if all of this holds: pdsh started it on this machine for this user; its remote
command is word for word the one that started this process; and a fresh ssh finds no machine there, or one that does not run
that command. If ssh cannot ask (pdsh forwards no keys), nothing is ended and the launcher waits for Ctrl-C. On machines that
did not launch, nothing is done.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from gemini_gnn.cluster.place import Place
from gemini_gnn.errors import GeminiError

# Not the command `deepspeed`: the #! line of that script ends at the first blank in the path of the environment.
DEEPSPEED = [sys.executable, "-P", "-m", "deepspeed.launcher.runner"]
LAUNCH = "deepspeed.launcher.launch"  # the launcher starts it on every machine; the parent of the slot processes
SETTLE_S = 5.0  # until healthy machines have ended their part
LAST_WORDS_S = 10.0  # until the slot that speaks has imported and failed too
POLL_S = 0.1


@contextlib.contextmanager
def first_speaks(place: Place) -> Iterator[None]:
    """For errors that every slot of a machine meets alike: the first slot raises it, the others exit with 2, silently."""
    try:
        yield
    except GeminiError:
        if place.local_rank == 0:
            raise
        came: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _frame: came.append(number))
        let_the_first_speak(lambda: bool(came))
        sys.exit(2)


def let_the_first_speak(told_to_end: Callable[[], bool]) -> None:
    """Wait in a slot that prints nothing, until the slot that prints the error has ended.

    When one slot ends, the launcher terminates all. If this slot ended first, the other might still be importing and print
    nothing. When the other ends, the launcher terminates this one.
    """
    deadline = time.monotonic() + LAST_WORDS_S
    while not told_to_end() and time.monotonic() < deadline:
        time.sleep(POLL_S)


class Process(NamedTuple):
    """One process of this user on this machine."""

    parent: int
    argv: list[str]


class Waiting(NamedTuple):
    """An ssh client that waits for another machine's part of a launch. ``ask`` is a command that asks that machine anew."""

    pid: int
    host: str
    ask: list[str]


def launch_words(argv: Sequence[str]) -> list[str]:
    """The words that a launch's command line has on all its machines, without quotes; empty for another program."""
    if LAUNCH not in argv:
        return []
    words = " ".join(argv[argv.index(LAUNCH) :]).translate({ord(c): None for c in "\"\\'"}).split()
    return [word for word in words if not word.startswith("--node_rank=")]


def waiting_ssh(own: int, processes: Mapping[int, Process]) -> list[Waiting]:
    """The ssh clients by which pdsh, on this machine, waits for the other machines of process ``own``'s launch. Pure."""
    while own in processes and not launch_words(processes[own].argv):
        own = processes[own].parent
    if own not in processes:
        return []
    ours, found = processes[own].argv, []
    for pid, (parent, argv) in processes.items():
        pdsh = processes[parent].argv[:1] if parent in processes else []
        if [os.path.basename(word) for word in [*argv[:1], *pdsh]] != ["ssh", "pdsh"]:
            continue
        if launch_words(argv) != launch_words(ours) or _node_rank(argv) == _node_rank(ours):
            continue
        host = _machines_of(argv)[_node_rank(argv)].split("@")[-1]
        options = argv[1 : argv.index(LAUNCH)]  # ssh's own, the host, and the beginning of the remote command
        if host in options:
            afresh = ["-n", "-oBatchMode=yes", "-oConnectTimeout=5", "-oControlPath=none"]
            options = options[: len(options) - options[::-1].index(host)]
            found.append(Waiting(pid, host, [argv[0], *afresh, *options, "ps -eww -o args="]))
    return found


def _node_rank(argv: Sequence[str]) -> int:
    return int(next(word.partition("=")[2] for word in argv if word.startswith("--node_rank=")))


def _machines_of(argv: Sequence[str]) -> list[str]:
    encoded = next(word.partition("=")[2] for word in argv if word.startswith("--world_info="))
    return list(json.loads(base64.urlsafe_b64decode(encoded)))


def runs_there(said: str, words: Sequence[str]) -> bool:
    """Whether a launch is among the command lines that another machine's ``ps`` has printed. Pure."""
    return any(launch_words(line.split()) == list(words) for line in said.splitlines())


def answers_no_more(code: int, said: str) -> bool:
    """Whether ssh, with this exit ``code`` and output, found no machine at all. A machine that refuses is up. Pure."""
    return code == 255 and any(why in said for why in ("timed out", "No route to host", "Host is down", "unreachable"))


def free_launcher(place: Place) -> list[str]:
    """End the launcher's ssh to machines that no longer run this job; returns their names. Called when the job has failed.

    The first slot of each machine does this; it finds an ssh only on the launcher's machine. It takes up to 20 s and ignores
    SIGTERM meanwhile: DeepSpeed sends that to all slots when one of them has ended.
    """
    if place.launcher != "deepspeed" or place.machines == 1 or place.local_rank != 0:
        return []
    import psutil

    now = _processes_here()
    words = {pid: launch_words(process.argv) for pid, process in now.items()}
    clients = {}
    for waiting in waiting_ssh(os.getpid(), now):
        with contextlib.suppress(psutil.NoSuchProcess):
            clients[psutil.Process(waiting.pid)] = waiting
    if not clients:
        return []
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: None)

    def without_its_job(client: Any) -> bool:
        waiting = clients[client]
        try:
            done = subprocess.run(waiting.ask, capture_output=True, text=True, errors="replace", timeout=10)
        except subprocess.TimeoutExpired:
            return False  # the machine is up, and slow
        if done.returncode == 0:
            return not runs_there(done.stdout, words[waiting.pid])
        return answers_no_more(done.returncode, done.stderr)

    _, left = psutil.wait_procs(clients, timeout=SETTLE_S)
    with ThreadPoolExecutor(max_workers=len(clients)) as pool:
        gone = [client for client, lost in zip(left, pool.map(without_its_job, left), strict=True) if lost]
    _, stuck = psutil.wait_procs(gone, timeout=1.0)  # it may have been about to end, and have something left to print
    for client in stuck:
        with contextlib.suppress(psutil.NoSuchProcess):
            client.terminate()
    lost = [clients[client].host for client in stuck]
    if lost:
        names = ", ".join(lost)
        text = f"[gemini_gnn] nothing of this job runs on {names}: ended the launcher's ssh, which waited for it"
        print(text, file=sys.stderr, flush=True)
    return lost


def _processes_here() -> dict[int, Process]:
    import psutil

    found = {}
    for process in psutil.process_iter(["ppid", "cmdline", "uids"]):
        known = process.info
        if known["cmdline"] and known["uids"] and known["uids"].real == os.getuid():
            found[process.pid] = Process(known["ppid"], known["cmdline"])
    return found
