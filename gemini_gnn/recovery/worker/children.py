"""What lives below a worker agent: its warm parent, and through it the trainers.

Who owns what. The warm parent is the agent's child and reaped only here. Trainers are the warm parent's children and reaped
by it; when it is dead the kernel gives them to the agent (subreaper), and they are reaped here. What trainers leave behind
comes to the agent the same way.

What may be interrupted where. The warm parent may die, or stop for ever, between any two of: a request, its fork, its report,
the exit it has to report. What it said before it died is read before its death counts. Trainers it leaves, and those it
never forked, are reported as exited when no child is left here but the next warm parent; until then nothing says that they
are gone. A warm parent that does not fork or report in time is killed: a dead one is something the job can go on from. One
that does not even die (stuck in the kernel, held by a debugger) is said, and ends the job.

A kill may not hang on a warm parent that is stopped: it is asked to, and what has a number here is killed from here as well. A
trainer whose fork is not reported has none: it is killed with the report, or, if that does not come soon, by the end of the
warm parent.

Nothing here waits but :meth:`Children.end`. Actions on who is gone do nothing: that it is gone is among the next events.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemini_gnn.recovery import messages, processes
from gemini_gnn.recovery.worker import decisions
from gemini_gnn.recovery.worker.decisions import Event, Failure
from gemini_gnn.recovery.worker.journal import Journal

FORK_S = 60.0  # for the warm parent to fork a trainer and say so
REPORT_S = 5.0  # for it to report a trainer that is seen to be dead, or the fork of one that is to be killed

# Pools are sized when a library is imported; a trainer sets its own number after the fork.
PINNED = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)
# torch.cuda.is_available() then asks NVML and does not initialise CUDA, which a fork would not survive.
PINNED["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"


@dataclass
class Warm:
    """``pid`` is its own until it is reaped. ``dying_s``: since when it is killed or has closed its socket."""

    pid: int
    channel: messages.Channel
    dying_s: float | None = None


@dataclass
class Trainer:
    """``pid`` is None until the warm parent has reported the fork. ``killed_s``: when that was asked for; ``zombie_s``: since
    when it is dead and not reaped."""

    channel: messages.Channel
    forked_s: float
    pid: int | None = None
    killed_s: float | None = None
    zombie_s: float | None = None


class Children:
    """
    Attributes:
        reap_s: for a killed warm parent to be gone (``Limits.reap_s``).
        trainers: by rank, those whose exit has not been reported.
        orphans: ranks among them whose warm parent is gone.
    """

    def __init__(self, arena: Path, job: str, journal: Journal, selector: selectors.BaseSelector, reap_s: float):
        self.reap_s = reap_s
        self.arena, self.job, self.journal, self.selector = arena, job, journal, selector
        self.warm: Warm | None = None
        self.trainers: dict[int, Trainer] = {}
        self.orphans: set[int] = set()
        self._adopted = False  # there may be children here that a warm parent left
        self._codes: dict[int, int] = {}  # pid -> exit code of reaped children, while there may be such

    # --- what to do ---------------------------------------------------------------------------------------------------

    def start_warm(self, modules: list[str], path: list[str]) -> None:
        """Start a warm parent, which imports ``modules`` with ``path`` as its ``sys.path``."""
        assert self.warm is None, "one warm parent at a time"
        ours, theirs = socket.socketpair()
        theirs.set_inheritable(True)
        command = [sys.executable, "-P", "-m", "gemini_gnn.recovery.worker.warm", "--job", self.job]
        command += ["--arena", os.fspath(self.arena), "--agent", str(os.getpid()), "--channel", str(theirs.fileno())]
        ignored = [signal.SIGINT, signal.SIGHUP]
        environment = {**os.environ, **PINNED, **dict([processes.mark(self.arena)])}
        pid = os.posix_spawn(sys.executable, command, environment, setsigdef=ignored)
        theirs.close()
        self.warm = Warm(pid, messages.Channel(ours))
        self.selector.register(self.warm.channel, selectors.EVENT_READ)
        self.journal.log("warm_started", pid=pid)
        self.warm.channel.send({"kind": "preload", "modules": modules, "path": path}, timeout_s=5.0)

    def fork(self, tasks: Mapping[int, dict[str, Any]], store: socket.socket | None) -> None:
        """Ask the warm parent for a trainer per rank.

        Args:
            tasks: by rank, what ``trainer.run`` takes, without the descriptors.
            store: listening socket that rank 0 is to serve; stays the caller's.
        """
        for rank, task in tasks.items():
            ours, theirs = socket.socketpair()
            channel = messages.Channel(ours)
            self.selector.register(channel, selectors.EVENT_READ)
            self.trainers[rank] = Trainer(channel, time.monotonic())
            descriptors = [theirs.fileno()]
            if store is not None and rank == 0:
                descriptors.append(store.fileno())
            if self.warm is not None:
                self.warm.channel.send(task, descriptors, timeout_s=5.0)
            theirs.close()
        if self.warm is None:  # it died just now: they are never forked, and count as killed
            self.orphans |= tasks.keys()
            self._adopted = True

    def ask_to_stop(self, ranks: Iterable[int]) -> None:
        for rank in ranks:
            if rank in self.trainers:
                self.trainers[rank].channel.send({"kind": "stop"})

    def kill(self, ranks: Iterable[int]) -> None:
        if self.warm is None:
            return  # they are dead or dying with it
        self.warm.channel.send({"kind": "kill", "ranks": sorted(ranks)}, timeout_s=1.0)
        for rank in ranks:
            trainer = self.trainers.get(rank)
            if trainer is not None:
                trainer.killed_s = time.monotonic()
                if trainer.pid is not None:  # the warm parent may hang
                    processes.kill_child(self.warm.pid, trainer.pid)

    def end(self, patience_s: float) -> bool:
        """SIGKILL to everything below; whether all of it is reaped after at most ``patience_s``."""
        if self.warm is not None:
            os.kill(self.warm.pid, signal.SIGKILL)
            if self.warm.dying_s is not None:  # stuck: its trainers are not told by its death, nor reaped by it
                for pid in processes.children(self.warm.pid):
                    processes.kill_child(self.warm.pid, pid)
        return processes.kill_and_reap_children(patience_s)

    # --- what has happened --------------------------------------------------------------------------------------------

    def read(self, now: float) -> list[Event]:
        """What has happened below since the last call; ``now`` on the monotonic clock. Never waits."""
        events: list[Event] = []
        for rank in self.trainers:
            events += self._words(rank)
        if self.warm is not None:
            events += self._reports(self.warm, now)
        events += self._reap(now)
        events += self._overdue(now)
        return events

    def _words(self, rank: int) -> list[Event]:
        trainer, events = self.trainers[rank], list[Event]()
        for message in trainer.channel.receive():
            if message["kind"] == "started":
                self.journal.log("trainer_started", rank=rank, fork_to_start_s=message["time_s"] - trainer.forked_s)
            elif message["kind"] == "listens":
                events.append(decisions.Listens(rank))
            elif message["kind"] == "failed":
                failure = Failure(rank, message["code"], message["time_s"], message["summary"], message["text"])
                failure = replace(failure, consequence=message["consequence"])
                self.journal.log("trainer_failed", rank=rank, code=failure.code, text=failure.text)
                self.journal.errors.append(failure)
                events.append(decisions.Failed(failure))
        if trainer.channel.closed:
            self._forget(trainer.channel)
        return events

    def _exited(self, rank: int, code: int) -> list[Event]:
        events = self._words(rank)  # its last words were sent before it died
        trainer = self.trainers.pop(rank)
        self._forget(trainer.channel)
        self.journal.log("trainer_exited", rank=rank, pid=trainer.pid, code=code)
        return [*events, decisions.Exited(rank, code)]

    def _reports(self, warm: Warm, now: float) -> list[Event]:
        events: list[Event] = []
        for message in warm.channel.receive():
            if message["kind"] == "ready":
                self.journal.log("warm_ready", seconds=message["seconds"])
                events.append(decisions.WarmReady())
            elif message["kind"] == "refused":
                self.journal.log("warm_refused", text=message["text"])
                text = message["text"]
                events.append(decisions.WarmRefused(Failure(-1, 1, now, text.strip().splitlines()[-1], text)))
                if "rank" in message:
                    events += self._exited(message["rank"], 1)
            elif message["kind"] == "forked":
                trainer = self.trainers[message["rank"]]
                trainer.pid = message["pid"]
                if trainer.killed_s is not None:
                    processes.kill_child(warm.pid, message["pid"])
                self.journal.log("trainer_forked", rank=message["rank"], pid=message["pid"])
            elif message["kind"] == "exited":
                events += self._exited(message["rank"], message["code"])
        if warm.channel.closed:
            self._forget(warm.channel)
            if warm.dying_s is None:
                self._kill_warm(warm, now)
        return events

    def _reap(self, now: float) -> list[Event]:
        """The warm parent's end, and that of the orphans below us."""
        events: list[Event] = []
        while (ended := processes.wait_for_child()) is not None:
            pid, code = ended
            self._codes[pid] = code
            if self.warm is None or pid != self.warm.pid:
                continue
            warm, self.warm = self.warm, None
            events += self._reports(warm, now)  # what it could still say
            self._forget(warm.channel)
            reason = decisions.signal_name(-code) if code < 0 else f"exit code {code}"
            self.journal.log("warm_died", pid=pid, reason=reason)
            events.append(decisions.WarmDied(reason))
            self.orphans |= self.trainers.keys()
            self._adopted = True
        if self._adopted:
            left = set(processes.children()) - ({self.warm.pid} if self.warm is not None else set())
            for pid in left:
                with contextlib.suppress(PermissionError):  # a program of another user that a trainer started
                    os.kill(pid, signal.SIGKILL)  # our child, not reaped: the number is its own
            if not left:
                for rank in sorted(self.orphans & self.trainers.keys()):
                    code = self._codes.get(self.trainers[rank].pid or -1, -signal.SIGKILL)
                    events += self._exited(rank, code)
                self.orphans, self._adopted = set(), False
        if not self._adopted:
            self._codes.clear()
        return events

    def _overdue(self, now: float) -> list[Event]:
        """End a warm parent that hangs; say so of one that cannot be ended."""
        if self.warm is None:
            return []
        if self.warm.dying_s is not None:
            return [decisions.WarmStuck(self.warm.pid)] if now - self.warm.dying_s > self.reap_s else []
        for rank, trainer in self.trainers.items():
            if trainer.pid is None:
                killed = trainer.killed_s is not None and now - trainer.killed_s > REPORT_S
                late = killed or now - trainer.forked_s > FORK_S
            else:
                zombie = processes.is_zombie(trainer.pid)
                trainer.zombie_s = None if not zombie else now if trainer.zombie_s is None else trainer.zombie_s
                late = trainer.zombie_s is not None and now - trainer.zombie_s > REPORT_S
            if late and rank not in self.orphans:
                self.journal.log("warm_hangs", pid=self.warm.pid, rank=rank, forked=trainer.pid is not None)
                self._kill_warm(self.warm, now)
                break
        return []

    def _kill_warm(self, warm: Warm, now: float) -> None:
        if warm is self.warm:  # else it is reaped already
            os.kill(warm.pid, signal.SIGKILL)
            warm.dying_s = now

    def _forget(self, channel: messages.Channel) -> None:
        if channel.fileno() >= 0:
            self.selector.unregister(channel)
            channel.close()
