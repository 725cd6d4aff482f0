"""DeepSpeed's launcher: how it is started, how it lets a slot finish its words, how it comes back after a failure.

A launcher that was started without all this still comes back: when the job has failed, :func:`free_launcher` ends its ssh
clients for machines on which the job no longer runs. What it may end: an ssh of this user on this machine, started by
pdsh, whose remote command is word for word the one that started this process, when a fresh ssh finds no machine there
or a machine that does not run it. Where ssh cannot ask (pdsh forwards no keys) nothing is ended, and the launcher waits
for Ctrl-C. Nothing is done on machines that did not launch.
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

# The command `deepspeed`, which is a script whose #! line ends at the first blank in the path of the environment.
DEEPSPEED = [sys.executable, "-P", "-m", "deepspeed.launcher.runner"]
LAUNCH = "deepspeed.launcher.launch"  # what the launcher starts on every machine, and the parent of its slot processes
SETTLE_S = 5.0  # for machines that are well to end their part
LAST_WORDS_S = 10.0  # for the slot that speaks to import, and to fail too
POLL_S = 0.1


@contextlib.contextmanager
def first_speaks(place: Place) -> Iterator[None]:
    """Around what fails in every slot of a machine alike: the first one's error goes on, the others exit with 2, silently."""
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
    """Stay for a while in a slot that has nothing to say.

    Its end would have the launcher terminate the one that speaks, perhaps while that is still importing. The end of the
    one that speaks has the launcher terminate this one.
    """
    deadline = time.monotonic() + LAST_WORDS_S
    while not told_to_end() and time.monotonic() < deadline:
        time.sleep(POLL_S)


class Process(NamedTuple):
    """One process of this user on this machine."""

    parent: int
    argv: list[str]


class Waiting(NamedTuple):
    """An ssh client that waits for another machine's part of a launch. ``ask`` is how that machine is asked anew."""

    pid: int
    host: str
    ask: list[str]


def launch_words(argv: Sequence[str]) -> list[str]:
    """What the command line of a launch has in common on all its machines, quotes apart; nothing for another program."""
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
    """Whether an ssh with exit ``code`` that ``said`` this found no machine at all. One that only refuses is up. Pure."""
    return code == 255 and any(why in said for why in ("timed out", "No route to host", "Host is down", "unreachable"))


def free_launcher(place: Place) -> list[str]:
    """End the launcher's ssh to machines that no longer run this job; their names. Called when the job has failed.

    By one process per machine, the first slot's, which finds something only where the launcher runs. Takes up to
    20 s, during which SIGTERM is ignored: DeepSpeed sends it to all slots when one of them has ended.
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
            return False  # it is there, and slow
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
