"""The processes below a worker agent: its warm parent and its trainers.

Ownership. All of them are the agent's children, and only this module reaps them. The warm parent forks a trainer through a
process in between; that process exits, so the trainer falls to the agent, which is a subreaper. Processes that trainers
leave behind fall to the agent in the same way.

Interruptions. A trainer sends its pid first, and gets its task then. A trainer without a known pid has done nothing. Once
its socket is closed it will do nothing either: it counts as gone from that moment, even if the warm parent forks it later.
A trainer with a known pid is gone when it is reaped. The death of the warm parent harms no trainer. If the warm parent
does not fork in time, the agent kills and forgets it, and starts another, even if the old one is stuck in the kernel.

Only :meth:`Children.end` waits. Actions on a dead process do nothing: the next events say that it is gone.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gemini_gnn.recovery import messages, processes
from gemini_gnn.recovery.outcome import Failure, exit_name
from gemini_gnn.recovery.worker import decisions
from gemini_gnn.recovery.worker.decisions import Event
from gemini_gnn.recovery.worker.journal import Journal

FORK_S = 60.0  # until the warm parent has forked a trainer and that has sent its pid
REAP_WARM_S = 0.05  # to learn how a warm parent ended; it is forgotten if it cannot be reaped in time

# Libraries size their thread pools at import; a trainer sets its own number after the fork.
PINNED = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)
# So torch.cuda.is_available() asks NVML. It would initialise CUDA otherwise, and a fork does not survive that.
PINNED["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"


@dataclass
class Warm:
    """Until it is reaped, no other process can have its ``pid``. It has or will have imported ``modules`` with ``path``."""

    pid: int
    channel: messages.Channel
    modules: list[str]
    path: list[str]


@dataclass
class Trainer:
    """``pid`` is None until the trainer has sent it; then it gets its ``task``."""

    channel: messages.Channel
    task: messages.Task
    forked_s: float
    pid: int | None = None


class Children:
    """
    Attributes:
        warm: the warm parent; None if there is none or it was forgotten.
        trainers: by rank, until their exit has been reported.
        spared: pids of children that must outlive the agent.
    """

    def __init__(self, arena: Path, job: str, journal: Journal, selector: selectors.BaseSelector):
        self.arena, self.job, self.journal, self.selector = arena, job, journal, selector
        self.warm: Warm | None = None
        self.trainers: dict[int, Trainer] = {}
        self.spared: set[int] = set()
        self._given_up: list[int] = []  # ranks given up before a pid was known; to be reported

    @property
    def has_news(self) -> bool:
        """Whether :meth:`read` has events that no descriptor announces."""
        return bool(self._given_up)

    # --- what to do ---------------------------------------------------------------------------------------------------

    def adopt(self, warm: Warm) -> None:
        """``warm``, a child of this process, is the warm parent, and ready."""
        self.warm = warm
        self.selector.register(warm.channel, selectors.EVENT_READ)
        self.journal.log("warm_adopted", pid=warm.pid)

    def start_warm(self, modules: list[str], path: list[str], heir: bool) -> None:
        """Start a warm parent, which imports ``modules`` with ``path`` as its ``sys.path``.

        Args:
            heir: it takes the place of this process if that dies.
        """
        assert self.warm is None, "one warm parent at a time"
        channel, theirs = messages.pair(messages.FROM_WARM)
        theirs.set_inheritable(True)
        command = [sys.executable, "-P", "-m", "gemini_gnn.recovery.worker.warm", "--job", self.job]
        command += ["--run-dir", os.fspath(self.journal.run_dir), "--arena", os.fspath(self.arena)]
        command += ["--channel", str(theirs.fileno()), *(["--heir"] if heir else [])]
        ignored = [signal.SIGINT, signal.SIGHUP]
        environment = {**os.environ, **PINNED, **dict([processes.mark(self.arena)])}
        pid = os.posix_spawn(sys.executable, command, environment, setsigdef=ignored)
        theirs.close()
        self.warm = Warm(pid, channel, modules, path)
        self.selector.register(channel, selectors.EVENT_READ)
        self.journal.log("warm_started", pid=pid)
        channel.send(messages.Preload(modules, path), timeout_s=5.0)

    def fork(self, tasks: Mapping[int, messages.Task]) -> None:
        """Ask the warm parent for a trainer per rank. This object closes the descriptors in the tasks."""
        theirs = []
        for rank, task in tasks.items():
            channel, end = messages.pair(messages.FROM_TRAINER)
            self.selector.register(channel, selectors.EVENT_READ)
            self.trainers[rank] = Trainer(channel, task, time.monotonic())
            theirs.append(end)
        if self.warm is not None:  # else it has just died: the ends of the streams say so
            self.warm.channel.send(messages.Fork([end.fileno() for end in theirs]), timeout_s=5.0)
        for end in theirs:
            end.close()

    def ask_to_stop(self, ranks: Iterable[int]) -> None:
        for rank in ranks:
            if rank in self.trainers:
                self.trainers[rank].channel.send(messages.StopAsked())

    def dump_stacks(self, ranks: Iterable[int]) -> None:
        """Have every thread's stack written into the logs; a trainer that is stopped goes on for it."""
        for rank in set(ranks) & self.trainers.keys():
            if (pid := self.trainers[rank].pid) is not None:
                for number in (processes.DUMP_STACKS, signal.SIGCONT):
                    with contextlib.suppress(PermissionError):  # it has become a program of another user
                        os.kill(pid, number)  # our child, not reaped: the number is its own

    def kill(self, ranks: Iterable[int]) -> None:
        for rank in set(ranks) & self.trainers.keys():
            pid = self.trainers[rank].pid
            if pid is None:
                self._give_up(rank)
            else:
                with contextlib.suppress(PermissionError):  # it runs a program of another user now
                    os.kill(pid, signal.SIGKILL)  # our child, not reaped: no other process has this number

    def is_stopped(self, rank: int) -> bool:
        """Whether the trainer is there and does not run: SIGSTOP, or a debugger that holds it."""
        trainer = self.trainers.get(rank)
        return trainer is not None and trainer.pid is not None and processes.is_stopped(trainer.pid)

    def end(self, patience_s: float) -> bool:
        """Kill all processes below but the spared. Returns whether all of them were reaped within ``patience_s``."""
        return processes.kill_and_reap_children(patience_s, self.spared)

    # --- what has happened --------------------------------------------------------------------------------------------

    def read(self, now: float) -> list[Event]:
        """Events below the agent since the last call; ``now`` on the monotonic clock. Never waits."""
        events: list[Event] = []
        for rank in list(self.trainers):
            events += self._words(rank)
        if self.warm is not None:
            events += self._reports(self.warm, now)
        for pid, code in processes.reap_children():
            events += self._reaped(pid, code, now)
        late = [rank for rank, one in self.trainers.items() if one.pid is None and now - one.forked_s > FORK_S]
        if late:
            if self.warm is not None:
                self.journal.log("warm_hangs", pid=self.warm.pid, ranks=late)
                os.kill(self.warm.pid, signal.SIGKILL)
                events += self._lost(self.warm, f"it did not fork within {FORK_S:.0f} s")
            for rank in late:
                self._give_up(rank)
        given_up, self._given_up = self._given_up, []
        return [*events, *(decisions.Exited(rank, -signal.SIGKILL) for rank in given_up)]

    def _words(self, rank: int) -> list[Event]:
        trainer, events = self.trainers[rank], list[Event]()
        for message in trainer.channel.receive():
            match message:
                case messages.Forked(pid):
                    trainer.pid = pid
                    self.journal.log("trainer_forked", rank=rank, pid=pid)
                    trainer.channel.send(trainer.task, timeout_s=5.0)
                    _close(trainer.task.descriptors)
                case messages.Started(time_s):
                    self.journal.log("trainer_started", rank=rank, fork_to_start_s=time_s - trainer.forked_s)
                case messages.Listens():
                    events.append(decisions.Listens(rank))
                case messages.Failed():
                    failure = Failure(
                        rank, message.code, message.time_s, message.summary, message.text, message.consequence
                    )
                    self.journal.log("trainer_failed", rank=rank, code=failure.code, text=failure.text)
                    self.journal.errors.append(failure)
                    events.append(decisions.Failed(failure))
        if trainer.channel.closed:
            if trainer.pid is None:
                self._give_up(rank)
            else:
                self._forget(trainer.channel)
        return events

    def _give_up(self, rank: int) -> None:
        """Close the socket of a trainer without a known pid: it exits at its first instruction, even if it is forked later."""
        trainer = self.trainers.pop(rank)
        self._forget(trainer.channel)
        _close(trainer.task.descriptors)
        self.journal.log("trainer_given_up", rank=rank)
        self._given_up.append(rank)

    def _reports(self, warm: Warm, now: float) -> list[Event]:
        events: list[Event] = []
        for message in warm.channel.receive():
            if isinstance(message, messages.Ready):
                self.journal.log("warm_ready", seconds=message.seconds)
                events.append(decisions.WarmReady())
            elif isinstance(message, messages.Unfit):
                self.journal.log("warm_refused", text=message.text)
                text = message.text
                events.append(decisions.WarmRefused(Failure(-1, 1, now, text.strip().splitlines()[-1], text)))
        if warm.channel.closed and warm is self.warm and warm.channel.fileno() >= 0:
            os.kill(warm.pid, signal.SIGKILL)  # mostly dead already; not reaped, so no other process has this number
            code = processes.reap_child(warm.pid, REAP_WARM_S)
            events += self._lost(warm, "its connection closed" if code is None else exit_name(code))
        return events

    def _reaped(self, pid: int, code: int, now: float) -> list[Event]:
        self.spared.discard(pid)
        if self.warm is not None and pid == self.warm.pid:
            events = self._reports(self.warm, now)  # its last messages
            return events + self._lost(self.warm, exit_name(code))
        events = [event for rank in list(self.trainers) for event in self._words(rank)]  # sent before it died
        for rank, trainer in list(self.trainers.items()):
            if trainer.pid == pid:
                self._forget(self.trainers.pop(rank).channel)
                self.journal.log("trainer_exited", rank=rank, pid=pid, code=code)
                events.append(decisions.Exited(rank, code))
        return events  # none for other pids: a process that a trainer left, or a trainer that was given up

    def _lost(self, warm: Warm, reason: str) -> list[Event]:
        self._forget(warm.channel)
        self.journal.log("warm_died", pid=warm.pid, reason=reason)
        self.warm = None
        return [decisions.WarmDied(reason)]

    def _forget(self, channel: messages.Channel) -> None:
        if channel.fileno() >= 0:
            if channel.complaint is not None:
                self.journal.log("message_refused", text=str(channel.complaint))
            self.selector.unregister(channel)
            channel.close()


def _close(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())
