"""A probe on each machine, over ssh or srun, or as a child; orders to all of them at once, each within a deadline."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import queue
import select
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemini_gnn.cluster.doctor.probe import PACKAGE, PREFIX
from gemini_gnn.cluster.hosts import KEEPALIVE

CONNECT_S = 8
END_S = 4.0  # for a probe to end by itself
SAY_S = 2.0  # between two words of waiting
PROBE = f"{PACKAGE}.probe"
GONE = "went away meanwhile"

Say = Callable[[str], None]


class Probe:
    """The process on one machine, from here.

    Attributes:
        problem: why it does not answer (any more), with ``remedy``; then no order reaches it.
        login_s: from the start of ssh to the first word from there.
    """

    def __init__(self, host: str, slots: int, how: str, folder: Path, module: str = PROBE):
        self.host, self.slots, self.how, self.folder = host, slots, how, folder
        self.problem, self.remedy = "", ""
        self.login_s: float | None = None
        self._answered = False
        self._number = 0
        self._lines: queue.SimpleQueue[tuple[float, str | None]] = queue.SimpleQueue()
        self._said: collections.deque[str] = collections.deque(maxlen=20)
        self._began = time.monotonic()
        self._process = subprocess.Popen(
            command(host, how, folder, sys.executable, module),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C ends it by the end of its stdin, so that it clears up
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put((time.monotonic(), line))
        self._lines.put((time.monotonic(), None))

    def order(self, order: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._number += 1
        with contextlib.suppress(BrokenPipeError):  # its end is read in answer()
            self._process.stdin.write(json.dumps({"number": self._number, **order}) + "\n")
            self._process.stdin.flush()

    def answer(self, until: float) -> dict[str, Any] | None:
        """The answer to the last order; None where there is none yet, or ``problem`` says why there will be none."""
        while not self.problem:
            try:
                at, line = self._lines.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                return None
            if line is None:
                code = None
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = self._process.wait(END_S)
                self._give_up(code, END_S)
            elif line.startswith(PREFIX):
                document = json.loads(line.removeprefix(PREFIX))
                if "login" in document:
                    self.login_s = at - self._began
                elif document["number"] == self._number:
                    self._answered = True
                    return dict(document["answer"])
            else:
                self._said.append(line.strip())
        return None

    def stream(self, data: Iterable[bytes], stall_s: float, moved: Callable[[int], bool]) -> None:
        """Bytes in place of an order; the next answer is to them. An end of the probe is noticed by that.

        Args:
            stall_s: after so long without a byte that moves, the probe is late.
            moved: told how many bytes moved since, once a second at least; False: stop.
        """
        assert self._process.stdin is not None
        self._number += 1
        pipe = self._process.stdin.fileno()
        os.set_blocking(pipe, False)
        room = select.poll()
        room.register(pipe, select.POLLOUT)
        last = time.monotonic()
        for piece in data:
            left = memoryview(piece)
            while left:
                count = 0
                if room.poll(1000):
                    try:
                        count = os.write(pipe, left)
                    except BrokenPipeError:
                        return
                    left, last = left[count:], time.monotonic()
                if not moved(count):
                    return
                if time.monotonic() - last > stall_s:
                    return self.late(stall_s)

    def late(self, seconds: float) -> None:
        """It has not answered within ``seconds``."""
        self._give_up(None, seconds)

    def _give_up(self, code: int | None, seconds: float = 0.0) -> None:
        if self._answered:
            self.problem, self.remedy = f"{GONE}: no power, no network, killed?", f"ssh -v {self.host} true"
            return
        logged_in = self.login_s is not None
        self.problem, self.remedy = why_silent(
            self.host, self.how, logged_in, code, [word for word in self._said if word], str(self.folder), seconds
        )

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def end(self, until: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, until - time.monotonic()))
        self._process.kill()
        self._process.wait(END_S)


def command(host: str, how: str, folder: Path, python: str, module: str = PROBE) -> list[str]:
    """The command that starts the probe on ``host``. Pure.

    Args:
        how: "ssh" | "srun" | "here". folder: of the project, the same on all machines.
        module: that takes orders and answers as the probe does.
    """
    hello = f"echo {shlex.quote(PREFIX + json.dumps({'login': True}))}"
    start = f"{hello}; cd {shlex.quote(str(folder))} && exec {shlex.quote(python)} -u -m {module}"
    if how == "ssh":
        options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_S}", *shlex.split(KEEPALIVE)]
        return ["ssh", *options, host, start]
    if how == "srun":
        return ["srun", "--overlap", "--nodes=1", "--ntasks=1", "--unbuffered", f"--nodelist={host}", "sh", "-c", start]
    return ["sh", "-c", start]


def why_silent(
    host: str, how: str, logged_in: bool, code: int | None, said: Sequence[str], folder: str, seconds: float
) -> tuple[str, str]:
    """Why a machine does not answer, and the command to type. Pure.

    Args:
        code: of ssh or srun; None: it still runs after ``seconds``.
    """
    last, by_hand = said[-1] if said else "no word", f"ssh -v {host} true"
    text = "\n".join(said)
    if logged_in and code is None:
        return f"logged in, but no answer within {seconds:.0f} s: is {folder} on a file system that hangs?", (
            f"ssh {host} ls {folder}"
        )
    if logged_in:
        here = f"{sys.executable} and {folder}"
        return f"{how} works, but not this environment ({last}); {here} must be there under the same paths", (
            f"ssh {host} 'cd {folder} && {sys.executable} -c \"import gemini_gnn\"'"
        )
    if how == "srun":
        return f"srun starts nothing there ({last})", f"srun --overlap -N1 -n1 -w {host} hostname"
    if code is None:
        return f"no answer within {seconds:.0f} s: no power, no network, a wrong name, a firewall?", by_hand
    if "Permission denied" in text:
        return f"refuses this user's key ({last})", f"ssh-copy-id {host}"
    if "Host key verification failed" in text:
        return "is not a known host; log in once", f"ssh {host} true"
    return f"cannot be reached ({last})", by_hand


def ask(
    probes: Sequence[Probe], orders: Sequence[Mapping[str, Any]], deadline_s: float, say: Say
) -> list[dict[str, Any]]:
    """One order to each probe, all at once; their answers. A probe that does not answer in time has a problem from then on."""
    began = spoke = time.monotonic()
    for probe, order in zip(probes, orders, strict=True):
        probe.order(order)
    answers: list[dict[str, Any] | None] = [None] * len(probes)
    waiting = set(range(len(probes)))
    while waiting and time.monotonic() - began < deadline_s:
        for number in sorted(waiting):
            answers[number] = probes[number].answer(time.monotonic() + 0.1 / len(waiting))
            if answers[number] is not None or probes[number].problem:
                waiting.discard(number)
        if waiting and time.monotonic() - spoke > SAY_S:
            spoke = time.monotonic()
            hosts = ", ".join(probes[number].host for number in sorted(waiting))
            say(f"waiting for {hosts}, {spoke - began:.0f} s")
    for number in waiting:
        probes[number].late(deadline_s)
    return [{"problem": probe.problem} if one is None else one for probe, one in zip(probes, answers, strict=True)]


@contextlib.contextmanager
def probes(hosts: Sequence[tuple[str, int]], how: str, folder: Path, module: str = PROBE) -> Iterator[list[Probe]]:
    """A probe on each machine; none of them is left at the end."""
    made: list[Probe] = []
    try:
        for host, slots in hosts:
            made.append(Probe(host, slots, how, folder, module))
        yield made
    finally:
        for probe in made:
            probe.close()
        until = time.monotonic() + END_S
        for probe in made:
            probe.end(until)
