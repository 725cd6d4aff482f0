"""A worker's connection to its root: looked for, made and watched, until it is lost.

Ownership. The uplink owns the channel and its place in the selector. On the root's machine the other end is the root in
the same loop (:class:`Local`); elsewhere it is a ``wire.Wire``. An uplink that has lost a root which answered is over: the
agent makes another, with the route by which it looks for the next root (``succession.py``).

Interruptions. The connection may end at any time. What is told meanwhile is dropped: Join, the first message on the next
connection, says how things stand. A root that says nothing for `silence_s` counts as gone, as it would the other way round
(``wire.is_silent``); time in which this process did not run itself does not count. A root of an older term than one that
was heard is refused.
"""

from __future__ import annotations

import math
import os
import selectors
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from gemini_gnn.recovery import messages, wire
from gemini_gnn.recovery.worker import succession
from gemini_gnn.recovery.worker.journal import Journal
from gemini_gnn.recovery.worker.succession import Route, Target

RETRY_S = 0.1  # between two attempts
POLL_S = 0.025  # a connection that is being made announces nothing to a reader
STRANGER_S = 15.0  # what answers there may be the end of an earlier job; after that it is not this one's root
WAITS_S = 5.0  # then it says what it waits for
LATE_S = 2.0  # a loop that comes round later did not run
ATTEMPT_S = 1.0  # for an answer, where there are others to try
UNREACHED_S = 0.5  # for a connection: a kernel answers at once, however busy its processes are


class Local(Protocol):
    """The root of this machine."""

    def local_end(self, now: float) -> messages.Channel: ...


@dataclass(frozen=True)
class Lost:
    """A root that answered does so no more.

    Attributes:
        silent: its connection did not even close.
        heard_s: when it was heard last.
        moved: where it said that another root answers; port 0: it does not know.
    """

    why: str
    silent: bool
    heard_s: float
    moved: Target | None = None


class Uplink:
    """
    Attributes:
        term: of the newest root that was heard; 0 before the first.
        welcome: of the root that answers now; None while none does.
        target: where it is looked for, or answers; None: in this process.
        route: by which it is looked for.
        holder: of a newer term, as the run directory says.
        lost: once a root that answered does so no more.
    """

    def __init__(
        self,
        request: messages.Register,
        token: bytes,
        root: Local | Route,
        journal: Journal,
        selector: selectors.BaseSelector,
        now: float,
        term: int = 0,
    ):
        self.term = term
        self.welcome: messages.Welcome | None = None
        self.lost: Lost | None = None
        self.target: Target | None = None
        self.route = root if isinstance(root, Route) else Route(None, math.inf)
        self.holder: Target | None = None
        self._request, self._token = request, token
        self._root = None if isinstance(root, Route) else root
        self._journal, self._selector = journal, selector
        self._channel: messages.Channel | None = None
        self._heard_s = self._away_s = self._retry_s = self._looked_s = now
        self._complaint = ""  # of the last connection
        self._strange_s: float | None = None  # since when something else answers
        self._said = False

    @property
    def reaches_root(self) -> bool:
        """Whether what is told now arrives, unless the connection breaks."""
        return self._channel is not None and (self.welcome is not None or self._root is not None)

    @property
    def is_next(self) -> bool:
        """Whether this machine is to become root: no other one has answered."""
        if self._root is not None or self.welcome is not None or not succession.is_next(self.route, self._looked_s):
            return False
        return self._channel is None or self.route.tried > len(self.route.others)  # else the last attempt is under way

    def patience_s(self, now: float) -> float:
        if self.welcome is not None:
            return self.welcome.heartbeat_s
        return POLL_S if self._channel is not None else max(0.0, self._retry_s - now)

    def tell(self, message: messages.Message) -> None:
        if self._channel is not None:
            self._channel.send(message)

    def look(self, join: Callable[[], messages.Join | None], now: float) -> list[messages.Message]:
        """What the root has said; never waits. ``join`` is asked when a connection is to be made; None: not yet."""
        self._heard_s += max(0.0, now - self._looked_s - LATE_S)
        self._looked_s = now
        said: list[messages.Message] = []
        if self._channel is not None:
            for message in self._channel.receive():
                self._heard_s = now
                if isinstance(message, messages.Welcome):
                    if message.term < self.term:
                        self._lose(f"an older root agent, of term {message.term} < {self.term}, answers", False, now)
                        return said
                    self.welcome, self.term, self._journal.term = message, message.term, message.term
                    self._strange_s = None
                    self._journal.log("welcome")
                elif isinstance(message, messages.Moved):
                    self._lose("it has resigned", False, now, Target(message.address, message.port))
                    return said
                else:
                    if isinstance(message, messages.Roster):
                        self.term = max(self.term, message.term)
                    said.append(message)
        if self._channel is not None:
            silent_s = now - self._heard_s
            if self.welcome is not None and wire.is_silent(self._channel, silent_s, self.welcome.silence_s):
                self._lose(f"silent for {silent_s:.1f} s", True, now)
            elif self._channel.closed:
                self._lose(self._channel.complaint or "connection closed", False, now)
            elif self.welcome is None and self.route.until_s < math.inf:
                limit_s = ATTEMPT_S if self._channel.is_connected else UNREACHED_S
                if silent_s > limit_s:
                    self._lose(f"no answer within {limit_s:g} s", True, now)
        if self._channel is None and self.lost is None and now >= self._retry_s:
            self._connect(join, now)
        return said

    def news(self, now: float) -> str:
        """For people, once: what this machine waits for; else empty."""
        if self.welcome is not None or self._said or now - self._away_s < WAITS_S:
            return ""
        self._said = True
        here, why = os.uname().nodename, self._complaint or "no answer yet"
        return f"{here} waits for the root agent, at {self._where}: {why}"

    def given_up(self, now: float) -> str:
        """Why it is time to give the job up; else empty."""
        here = os.uname().nodename
        if self._strange_s is not None and now - self._strange_s > STRANGER_S:
            return f"{here} does not find its root agent, at {self._where}: {self._complaint}"
        first = self.term == 0
        patience_s = self._request.start_timeout_s if first else self._request.recovery.wait_s
        if self.welcome is not None or now - self._away_s <= patience_s:
            return ""
        setting = "distributed.start_timeout_s" if first else "recovery.wait_s"
        address, port = self.target or (self._request.place.master_addr, self._request.place.master_port)
        return (
            f"{here} has not reached the root agent, at {self._where}, for {patience_s:.0f} s "
            f"({setting}): {self._complaint}. Is that machine up, and does a firewall close the port? Try on {here}: "
            f"`ping {address}` and, while the job starts, `nc -zv {address} {port}`"
        )

    @property
    def _where(self) -> str:
        place = self._request.place
        address, port = self.target or (place.master_addr, place.master_port)
        return f"{address}:{port}"

    def _connect(self, join: Callable[[], messages.Join | None], now: float) -> None:
        first = join()
        if first is None:
            self._retry_s = now + POLL_S
            return
        if self._root is not None:
            self._channel = self._root.local_end(now)
        else:
            self.route, self.target = succession.following(self.route, self.holder, now)
            if self.target is None:
                self._retry_s = now + RETRY_S
                return
            self._channel = wire.connect(*self.target, messages.TO_WORKER, self._token)
        self._heard_s = now
        if self._channel.closed:
            self._lose(self._channel.complaint or "connection closed", False, now)
            return
        self._selector.register(self._channel, selectors.EVENT_READ)
        self._channel.send(first)

    def close(self) -> None:
        if self._channel is not None:
            if self._channel.fileno() >= 0 and self._channel in self._selector.get_map():
                self._selector.unregister(self._channel)
            self._channel.close()
            self._channel = None

    def _lose(self, complaint: str | ValueError, silent: bool, now: float, moved: Target | None = None) -> None:
        assert self._channel is not None
        why = str(complaint)
        if not isinstance(complaint, wire.Stranger):
            self._strange_s = None
        elif self._strange_s is None:
            self._strange_s = now
        if self.welcome is not None:
            self._away_s, self._said = now, False
            self.lost = Lost(why, silent, self._heard_s, moved)
        if why != self._complaint:
            self._journal.log("root_lost", reason=why)
        self._complaint, self.welcome = why, None
        self.close()
        self._retry_s = now + RETRY_S
