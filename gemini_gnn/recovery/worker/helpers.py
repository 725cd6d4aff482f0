"""A helper: a process under the worker agent that may die or hang and harms nobody. Replicator and persister are two.

Ownership. The agent starts it, from its main thread (PDEATHSIG is a thread's), and talks to it by a socket pair. A handle on
the process, not its number, says whether it is gone: the agent reaps children of any kind, and the number may then belong
to another one. A dead or silent helper is replaced, once it is gone: two never write into one arena.

Losses. What was sent to a helper that dies may be lost. So the handle remembers the orders that still hold
(:func:`remembered`) and gives them to the next one: an answer may come twice, or for a request that was begun twice. An
order that nobody lived to carry out in `DEATHS` attempts is answered with a failure (:func:`declined`): the root looks for
another way, instead of waiting for ever. Copying goes on with the next helper.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import selectors
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from gemini_gnn.recovery import messages, processes
from gemini_gnn.recovery.worker.journal import Journal

AGAIN_S = (0.1, 5.0)  # from a helper that died to the next: the first time, and at most
STEADY_S = 30.0  # of life; then the next death is a first one again
DEATHS = 5  # one after the other, 3 s in all

ANSWERS: dict[type, type] = {
    messages.Quiet: messages.Silent,
    messages.Fetch: messages.Fetched,
    messages.Load: messages.Fetched,
    messages.Persist: messages.Persisted,
    messages.Complete: messages.Completed,
    messages.ListCheckpoints: messages.Checkpoints,
}


def remembered(orders: Sequence[messages.Message], message: messages.Message) -> list[messages.Message]:
    """The orders that a new helper needs, after ``message`` was sent to this one or came from it. Pure."""
    match message:
        case messages.Replicate() | messages.Quiet():  # each ends all that was ordered before
            return [message]
        case messages.Advance() | messages.Fetch():
            return [*(one for one in orders if type(one) is not type(message)), message]
        case _ if type(message) in ANSWERS:
            return [*orders, message]
    answered = next((one for one in orders if ANSWERS.get(type(one)) is type(message)), None)
    return [one for one in orders if one is not answered]


def declined(orders: Sequence[messages.Message], why: str) -> tuple[list[messages.Message], list[messages.Message]]:
    """The orders that a next helper still gets, and the failures that answer the others. Pure."""
    left: list[messages.Message] = []
    answers: list[messages.Message] = []
    for order in orders:
        match order:
            case messages.Fetch(attempt, wanted):
                misses = [messages.Miss(one.shard, one.identity, one.peer.name, False, why) for one in wanted]
                answers.append(messages.Fetched(attempt, misses))
            case messages.Load(attempt, identity, shards):
                misses = [messages.Miss(shard, identity, "storage", False, why) for shard in shards]
                answers.append(messages.Fetched(attempt, misses))
            case messages.Persist(identity):
                answers.append(messages.Persisted(identity, why))
            case messages.Complete(identity):
                answers.append(messages.Completed(identity, why))
            case messages.ListCheckpoints():
                answers.append(messages.Checkpoints([], [], why))
            case _:  # copying: it can wait
                left.append(order)
    return left, answers


class Helper:
    """
    Attributes:
        pid: of the process; 0 while there is none.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        descriptors: list[int],
        expects: Sequence[type],
        arena: Path,
        journal: Journal,
        selector: selectors.BaseSelector,
        silence_s: float = math.inf,
    ):
        """
        Args:
            name: for people, as in "the replicator".
            command: its module and its arguments, without ``--channel``. descriptors: that it inherits under their numbers.
            expects: the classes of its messages.
            silence_s: without a message, it counts as hanging.
        """
        self.name, self.pid = name, 0
        self._command, self._descriptors, self._expects, self._arena = command, descriptors, expects, arena
        self._journal, self._selector, self._silence_s = journal, selector, silence_s
        self._orders: list[messages.Message] = []
        self._channel: messages.Channel | None = None
        self._handle = -1  # of the process, until it is gone
        self._begun_s = self._heard_s = self._looked_s = 0.0
        self._next_s, self._delay_s = -math.inf, AGAIN_S[0]
        self._deaths = 0  # in a row

    def send(self, order: messages.Message) -> None:
        """Have it done, by the next helper if this one does not live to do it."""
        self._orders = remembered(self._orders, order)
        if self._channel is not None:
            self._channel.send(order, timeout_s=1.0)

    def give_up(self, *kinds: type) -> None:
        """Nobody wants orders of these classes done any more. If it has one it is killed, since it may be at it."""
        left = [one for one in self._orders if not isinstance(one, kinds)]
        if len(left) < len(self._orders):
            self._journal.log("helper_given_up", name=self.name, pid=self.pid)
            self._orders = left
            self._forget()

    def patience_s(self, now: float) -> float:
        """Until :meth:`look` has something to do that no descriptor announces."""
        if self._channel is not None:
            return max(0.0, self._heard_s + self._silence_s - now)
        return max(0.01, self._next_s - now)

    def look(self, now: float) -> list[messages.Message]:
        """What it has said; starts it if there is none. Never waits."""
        if self._channel is None:
            return self._start(now) if self._is_gone() and now >= self._next_s else []
        # Time in which this process itself did not run does not count.
        self._heard_s += max(0.0, now - self._looked_s - 2.0)
        self._looked_s = now
        said = self._channel.receive()
        for message in said:
            self._heard_s = now
            orders, self._orders = self._orders, remembered(self._orders, message)
            if len(self._orders) < len(orders):
                self._deaths = 0
        if self._channel.closed:
            said += self._lose(str(self._channel.complaint or "its connection closed"), now)
        elif now - self._heard_s > self._silence_s:
            said += self._lose(f"it was silent for {now - self._heard_s:.1f} s", now)
        return said

    def close(self) -> None:
        """Kill it. The agent reaps it with its other children."""
        self._forget()
        self._is_gone()

    def _start(self, now: float) -> list[messages.Message]:
        channel, theirs = messages.pair(self._expects)
        command = [sys.executable, "-P", "-m", *self._command, "--channel", str(theirs.fileno())]
        descriptors = [*self._descriptors, theirs.fileno()]
        environment = {**os.environ, **dict([processes.mark(self._arena)])}
        inherited = [(os.POSIX_SPAWN_DUP2, one, one) for one in descriptors]  # drops close-on-exec in the child alone
        try:
            self.pid = os.posix_spawn(
                sys.executable,
                command,
                environment,
                file_actions=inherited,
                setsigdef=[signal.SIGINT, signal.SIGHUP],
            )
            self._handle = os.pidfd_open(self.pid)  # our child, not reaped yet
        except OSError as error:  # out of processes, memory or descriptors
            channel.close()
            return self._put_off(f"cannot be started: {error.strerror}; it is tried again", now)
        finally:
            theirs.close()
        self._channel, self._begun_s, self._heard_s, self._looked_s = channel, now, now, now
        self._selector.register(channel, selectors.EVENT_READ)
        self._journal.log("helper_started", name=self.name, pid=self.pid)
        for order in self._orders:
            channel.send(order, timeout_s=1.0)
        return []

    def _lose(self, reason: str, now: float) -> list[messages.Message]:
        pid = self.pid
        self._forget()
        if now - self._begun_s > STEADY_S:
            self._delay_s, self._deaths = AGAIN_S[0], 0
        return self._put_off(f"(pid {pid}) is lost: {reason}; another one is started", now)

    def _put_off(self, why: str, now: float) -> list[messages.Message]:
        self._next_s, self._delay_s = now + self._delay_s, min(2 * self._delay_s, AGAIN_S[1])
        trouble = messages.Trouble(f"{self.name} on {os.uname().nodename} {why}")
        self._journal.log("helper_lost", name=self.name, text=trouble.text)
        self._deaths += 1
        if self._deaths < DEATHS:
            return [trouble]
        self._deaths = 0
        self._orders, answers = declined(self._orders, f"{self.name} {why}, for the {DEATHS}th time in a row")
        return [trouble, *answers]

    def _forget(self) -> None:
        if self._channel is not None:
            self._selector.unregister(self._channel)
            self._channel.close()
            self._channel = None
        if self._handle >= 0:
            with contextlib.suppress(ProcessLookupError):  # reaped
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def _is_gone(self) -> bool:
        """Whether no helper of this handle runs any more."""
        if self._handle >= 0 and select.select([self._handle], [], [], 0)[0]:
            os.close(self._handle)
            self._handle, self.pid = -1, 0
        return self._handle < 0


def secret(token: bytes) -> int:
    """A file in memory, without a name, with the job's token: it is on no command line and in no environment."""
    descriptor = os.memfd_create("token", os.MFD_CLOEXEC)
    os.write(descriptor, token)
    return descriptor


def replicator(
    arena: Path,
    job: str,
    listener: socket.socket,
    token: int,
    journal: Journal,
    selector: selectors.BaseSelector,
    silence_s: float = 10.0,
) -> Helper:
    """
    Args:
        listener: listens for the replicators of other machines. token: see :func:`secret`. The agent keeps both.
    """
    command = ["gemini_gnn.recovery.worker.replicator", "--arena", os.fspath(arena), "--job", job]
    command += ["--listen", str(listener.fileno()), "--token", str(token)]
    descriptors = [listener.fileno(), token]
    expects = messages.FROM_REPLICATOR
    return Helper("the replicator", command, descriptors, expects, arena, journal, selector, silence_s)


def persister(
    arena: Path, run_dir: Path, folder: Path, keep: int, job: str, journal: Journal, selector: selectors.BaseSelector
) -> Helper:
    """
    Args:
        folder: of the checkpoints. keep: so many complete ones.
    """
    command = ["gemini_gnn.recovery.worker.persister", "--arena", os.fspath(arena), "--job", job]
    command += ["--run-dir", os.fspath(run_dir), "--folder", os.fspath(folder), "--keep", str(keep)]
    return Helper("the persister", command, [], messages.FROM_PERSISTER, arena, journal, selector)
