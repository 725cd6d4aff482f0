"""The processes below a worker agent: its warm parent and its trainers.

Who owns what. All of them are the agent's children and reaped only here: a trainer is forked by the warm parent through a
process in between and falls to the agent, which is a subreaper. What trainers leave behind comes to the agent the same way.

What may be interrupted where. A trainer says its pid first and gets its task then. One that has not said it yet has done
nothing, and will do nothing once its socket is closed: it counts as gone at that moment, whether the warm parent dies before
the fork, hangs in it, or forks later. One that has said its pid is gone when it is reaped. A death of the warm parent
harms no trainer. A warm parent that does not fork in time is killed and forgotten; should it be stuck in the kernel, the
next one takes its place all the same.

Nothing here waits but :meth:`Children.end`. Actions on what is gone do nothing: that it is gone is among the next events.
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
from gemini_gnn.recovery.worker import decisions
from gemini_gnn.recovery.worker.decisions import Event, Failure
from gemini_gnn.recovery.worker.journal import Journal

FORK_S = 60.0  # for the warm parent to fork a trainer, and for that to say its pid
REAP_WARM_S = 0.05  # to learn how a warm parent ended; one that cannot be reaped is forgotten

# Pools are sized when a library is imported; a trainer sets its own number after the fork.
PINNED = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)
# torch.cuda.is_available() then asks NVML and does not initialise CUDA, which a fork would not survive.
PINNED["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"


@dataclass
class Warm:
    """``pid`` is its own until it is reaped."""

    pid: int
    channel: messages.Channel


@dataclass
class Trainer:
    """``pid`` is None until it has said it; ``task`` is what it gets then."""

    channel: messages.Channel
    task: messages.Task
    forked_s: float
    pid: int | None = None


class Children:
    """
    Attributes:
        warm: None where there is none, or it is to be forgotten.
        trainers: by rank, those whose exit has not been reported.
    """

    def __init__(self, arena: Path, job: str, journal: Journal, selector: selectors.BaseSelector):
        self.arena, self.job, self.journal, self.selector = arena, job, journal, selector
        self.warm: Warm | None = None
        self.trainers: dict[int, Trainer] = {}
        self._given_up: list[int] = []  # ranks that ended before they said a pid; to be reported

    # --- what to do ---------------------------------------------------------------------------------------------------

    def start_warm(self, modules: list[str], path: list[str]) -> None:
        """Start a warm parent, which imports ``modules`` with ``path`` as its ``sys.path``."""
        assert self.warm is None, "one warm parent at a time"
        channel, theirs = messages.pair(messages.FROM_WARM)
        theirs.set_inheritable(True)
        command = [sys.executable, "-P", "-m", "gemini_gnn.recovery.worker.warm", "--job", self.job]
        command += ["--arena", os.fspath(self.arena), "--agent", str(os.getpid()), "--channel", str(theirs.fileno())]
        ignored = [signal.SIGINT, signal.SIGHUP]
        environment = {**os.environ, **PINNED, **dict([processes.mark(self.arena)])}
        pid = os.posix_spawn(sys.executable, command, environment, setsigdef=ignored)
        theirs.close()
        self.warm = Warm(pid, channel)
        self.selector.register(channel, selectors.EVENT_READ)
        self.journal.log("warm_started", pid=pid)
        channel.send(messages.Preload(modules, path), timeout_s=5.0)

    def fork(self, tasks: Mapping[int, messages.Task]) -> None:
        """Ask the warm parent for a trainer per rank. The descriptors in the tasks are ours from here on."""
        theirs = []
        for rank, task in tasks.items():
            channel, end = messages.pair(messages.FROM_TRAINER)
            self.selector.register(channel, selectors.EVENT_READ)
            self.trainers[rank] = Trainer(channel, task, time.monotonic())
            theirs.append(end)
        if self.warm is not None:  # else it died just now: the ends of the streams say so
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
                with contextlib.suppress(PermissionError):  # it has become a program of another user
                    os.kill(pid, signal.SIGKILL)  # our child, not reaped: the number is its own

    def is_stopped(self, rank: int) -> bool:
        """Whether the trainer is there and does not run: SIGSTOP, or a debugger that holds it."""
        trainer = self.trainers.get(rank)
        return trainer is not None and trainer.pid is not None and processes.is_stopped(trainer.pid)

    def end(self, patience_s: float) -> bool:
        """SIGKILL to everything below; whether all of it is reaped after at most ``patience_s``."""
        return processes.kill_and_reap_children(patience_s)

    # --- what has happened --------------------------------------------------------------------------------------------

    def read(self, now: float) -> list[Event]:
        """What has happened below since the last call; ``now`` on the monotonic clock. Never waits."""
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
        """It has not said its pid: with its socket closed it ends at its first instruction, whenever that comes."""
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
            os.kill(warm.pid, signal.SIGKILL)  # most often it is dead already; not reaped, so the number is its own
            code = processes.reap_child(warm.pid, REAP_WARM_S)
            events += self._lost(warm, "its connection closed" if code is None else decisions.exit_name(code))
        return events

    def _reaped(self, pid: int, code: int, now: float) -> list[Event]:
        if self.warm is not None and pid == self.warm.pid:
            events = self._reports(self.warm, now)  # what it could still say
            return events + self._lost(self.warm, decisions.exit_name(code))
        events = [event for rank in list(self.trainers) for event in self._words(rank)]  # said before it died
        for rank, trainer in list(self.trainers.items()):
            if trainer.pid == pid:
                self._forget(self.trainers.pop(rank).channel)
                self.journal.log("trainer_exited", rank=rank, pid=pid, code=code)
                events.append(decisions.Exited(rank, code))
        return events  # of none of them: what a trainer has left, or one that was given up

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
