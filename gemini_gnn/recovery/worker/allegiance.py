"""Which root agent a worker agent serves: the one that it follows, looks for, or is.

Ownership. The agent has one allegiance from its first slot process to its end, in its loop. It owns the ``uplink`` to the
root, the port where other machines come if this agent is root, and the root itself where this agent is it (``service.py``).

Without a root. An agent that loses its root is fenced at once: its trainers are killed, since they can do no step that counts,
and another machine may have their ranks soon; its replicator falls silent. When the trainers are reaped, the agent looks for
a root (``succession.py``), or becomes one: `uplink` leads to its own root then, and `scout` goes on looking. The agent
follows the first root that the scout finds. The scout ends when its own root holds a term. News for a lost root is dropped.
Where the run directory says that the job has ended meanwhile, it ends here too. After `recovery.wait_s`
(`distributed.start_timeout_s` before the first answer) the job is given up: its snapshots stay.

Interruptions. The agent may be killed at any instruction. The one that takes its place knows machines and seats from the
newest term and the last status in the run directory. That is read before it serves anybody, later only by a thread
(``terms.Watch``): a file system that hangs holds up no heartbeat.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import selectors
import socket
from collections.abc import Callable
from pathlib import Path

from gemini_gnn.errors import ClusterError, RunDirError
from gemini_gnn.files import write_atomically
from gemini_gnn.observe import terms, votes
from gemini_gnn.observe.status import read_status
from gemini_gnn.recovery import home, messages, wire
from gemini_gnn.recovery.outcome import Outcome, failed
from gemini_gnn.recovery.root.service import Root
from gemini_gnn.recovery.worker import beginning
from gemini_gnn.recovery.worker.copies import address_towards, everywhere
from gemini_gnn.recovery.worker.journal import Journal
from gemini_gnn.recovery.worker.succession import Route, Target, holder_of, route
from gemini_gnn.recovery.worker.uplink import Lost, Uplink


class Allegiance:
    """
    Attributes:
        number: of this machine; -1: the root has not said it yet.
        address, token: where the others reach this machine, and the secret by which they know it.
        root: where this agent is root.
        uplink: to the root; None before the job has begun.
        scout: looks for another root while the one here has no term.
        reached: the newest step that the trainers here were in.
        outcome: once the job is over for this machine without a word of the root.
        private: of this machine's run directory, if it shares none. newest: the highest term known there before this start.
    """

    def __init__(self, run_dir: Path, arena: Path, journal: Journal, selector: selectors.BaseSelector):
        self.number, self.address, self.token = 0, "127.0.0.1", b""
        self.root: Root | None = None
        self.uplink: Uplink | None = None
        self.scout: Uplink | None = None
        self.reached = 0
        self.outcome: Outcome | None = None
        self.private: votes.Private | None = None
        self.newest = 0
        self._run_dir, self._arena, self._journal, self._selector = run_dir, arena, journal, selector
        self._start = ""  # names the start of the job
        self._beats: terms.Beats | None = None  # of the term that was claimed before the root was made
        self._listener: socket.socket | None = None  # where the others come if this agent is root
        self._request: messages.Register | None = None
        self._watch: terms.Watch | None = None  # while a root is looked for
        self._roster: messages.Roster | None = None  # of the last root with a term
        self._lost: Lost | None = None  # why that one is lost
        self._stop: messages.Stop | None = None  # was asked for here
        self._greeted: messages.Welcome | None = None  # of the root that knows of it

    # --- the beginning ------------------------------------------------------------------------------------------------

    def begin(self, request: messages.Register, say: Callable[[str], None]) -> bool:
        """Become the first root of a start, if this machine is the one. Returns whether the work is done already.

        Raises:
            ClusterError, RunDirError, ConfigError: the network, the run directory or the settings refuse; nothing has begun.
        """
        place = request.place
        several, first = place.machines > 1, place.rank < place.local_world_size
        self.number = -1 if request.joins else place.rank // place.local_world_size
        self.token = self._read_token() if several else b""
        self.private = votes.private(self._run_dir) if several else None
        self.newest = votes.newest(self._run_dir) if self.private and self._beats is None else self.newest
        self._listen(request)
        if several and (not first or request.deaths > 0) and not self._was_done(request):
            return False
        if self._beats is None:  # else of a slot process that was refused after that
            self._start = secrets.token_hex(8)
            self._beats = beginning.take_run_dir(self._run_dir, self._arena, request, self._start, self._journal, say)
        self.root = beginning.make_root(
            self._run_dir,
            self._arena,
            request,
            self._start,
            self._beats,
            self.address,
            self.token,
            self._listener,
            self._journal,
            self._selector,
            self.private,
        )
        return self._beats is None

    def serve(self, request: messages.Register, now: float) -> None:
        """The job has begun: find the root."""
        self._request = request
        way, term = self._first_way(request, now)
        self.uplink = Uplink(request, self.token, way, self._journal, self._selector, now, term)

    def refused(self) -> None:
        """The job cannot begin here."""
        if self.root is not None:
            self.root.close()
            self.root = None

    def _read_token(self) -> bytes:
        try:
            return terms.token(self._run_dir)
        except PermissionError as error:
            raise RunDirError(f"{error.filename} is another user's; give another run_dir=...") from None

    def _was_done(self, request: messages.Register) -> bool:
        """The agent before this one was root and died while it cleaned up: the other machines may have to be told."""
        if request.deaths == 0:
            return False
        record, status = terms.newest_term(self._run_dir), read_status(self._run_dir)
        done = status.get("state") == "done" and status.get("term") == record.get("term")
        return done and record.get("root", 0) == self.number

    def _listen(self, request: messages.Register) -> None:
        """Bind where the other machines come if this agent is root.

        Raises:
            ClusterError: the port is taken, or there is no way to the first machine.
        """
        place = request.place
        if place.machines == 1 or self._listener is not None:
            return
        try:
            self.address = address_towards(place.master_addr)
        except ClusterError:
            if not request.deaths:
                raise
            self.address = ""  # its link is cut: the root sees the address once it is back
        if place.rank < place.local_world_size:
            self._listener = wire.listen(place.master_addr, place.master_port)
        else:
            # The other machines know the port of the agent before this one, and look for a root there.
            address, port = self.address or everywhere(place.master_addr), home.root_port(self._arena)
            try:
                self._listener = wire.listen(address, port if request.deaths else 0)
            except ClusterError:  # another program has it now
                self._listener = wire.listen(address, 0)
            write_atomically(self._arena / home.ROOT_PORT, str(self.root_port), 0o600, durable=False)

    def _first_way(self, request: messages.Register, now: float) -> tuple[Root | Route, int]:
        """The root in this process; or where it is expected, at the launcher's address or where the last one was. And the
        newest term that the run directory names, for an agent that takes the place of a dead one."""
        place = request.place
        if self.root is not None:
            return self.root, 0
        first = Target(place.master_addr, place.master_port)
        with contextlib.suppress(OSError):  # once: a resolver that does not answer would hold up the loop
            found = socket.getaddrinfo(first.address, None, type=socket.SOCK_STREAM)[0][4][0]
            first = Target(str(found), first.port)
        if not request.deaths:
            return Route(first, math.inf), 0
        self._roster, record = beginning.roster_of(self._run_dir, request)
        self._start, term = str(record.get("start", "")), int(record.get("term", 0))
        self._watch = terms.Watch(self._run_dir)
        members, root = self._roster.members, self._roster.root
        words = f"the worker agent on {members[root].name or 'its machine'} died"
        self._lost = Lost(words, False, request.died_s)
        if request.joins:
            here = (os.uname().nodename, self.address)
            own = [number for number, one in enumerate(members) if (one.name, one.address) == here]
            if not own:  # it died before the root wrote of it
                return Route(first, math.inf), term
            self.number = own[0]
        if root == self.number:
            return route(members, self.number, None, now, self.private is not None), term
        if "port" in record:
            first = Target(str(record["address"]), int(record["port"]))
        until_s = now + request.recovery.return_s
        return route(members, self.number, first, until_s, self.private is not None), term

    # --- the root -----------------------------------------------------------------------------------------------------

    @property
    def welcome(self) -> messages.Welcome | None:
        return None if self.uplink is None else self.uplink.welcome

    @property
    def reaches_root(self) -> bool:
        """Whether what is told now arrives, unless the connection breaks."""
        return self.uplink is not None and self.uplink.reaches_root

    @property
    def root_port(self) -> int:
        return self._listener.getsockname()[1] if self._listener is not None else 0

    @property
    def start(self) -> str:
        return self._start

    def patience_s(self, now: float) -> float:
        """Until :meth:`look` has something to do that no descriptor announces."""
        waits = [one.patience_s(now) for one in (self.uplink, self.scout, self.root) if one is not None]
        return min(waits, default=math.inf)

    def tell(self, message: messages.Message) -> None:
        if self.uplink is not None:
            self.uplink.tell(message)

    def vote(self, asked: messages.Vote) -> messages.Voted:
        """The answer is on the disk of this machine before it is given. If the disk does not take it, there is none.

        Raises:
            OSError: of the disk.
        """
        record, start = asked.record, str(asked.record["start"])
        granted, earlier = votes.grant(self._run_dir, asked.number, asked.known, record)
        won = votes.won(self._run_dir, asked.known, start)
        self._journal.log("vote", number=asked.number, granted=granted, claimer=record["claimer"])
        return messages.Voted(record["claimer"], asked.number, granted, votes.newest(self._run_dir), won, earlier)

    def ask_to_stop(self, message: messages.Stop) -> None:
        """Ask this root to end the job, and each that follows: this one may lose its term before it has done so."""
        self._stop = message
        self.tell(message)

    def look(
        self, join: Callable[[], messages.Join | None], fence: Callable[[], None], now: float
    ) -> list[messages.Message]:
        """What the root orders; never waits.

        Args:
            join: what this machine says to a root; None: a trainer of the last one still lives here.
            fence: is called when the root is lost.
        """
        if self.root is not None:
            self.root.tick(now)
        if self.uplink is None or self._request is None:
            return []
        said = self.uplink.look(join, now)
        if self.uplink.welcome is not None:
            self.number, self._start = self.uplink.welcome.machine, self.uplink.welcome.start
            if self._greeted is not self.uplink.welcome:
                self._greeted = self.uplink.welcome
                if self._stop is not None:
                    self.tell(self._stop)
        for message in said:
            self._hear(message)
        if self.root is not None and self.root.resigned:
            self._leave_root()
            self._seek(self.uplink.lost or Lost("it has resigned", False, now, Target("", 0)), fence, now)
        elif self.uplink.lost is not None:
            self._seek(self.uplink.lost, fence, now)
        return said + self._look_around(join, now)

    def news(self, now: float) -> str:
        """For people, once: what this machine waits for; else empty."""
        return "" if self.uplink is None else self.uplink.news(now)

    def given_up(self, now: float) -> Outcome | None:
        """The end, when no root was found for too long."""
        why = "" if self.uplink is None else self.uplink.given_up(now)
        return failed(why, now) if why else None

    def _hear(self, message: messages.Message) -> None:
        assert self.uplink is not None
        if isinstance(message, messages.Roster):  # of a root with a term
            self._roster, self._lost = message, None
            self.uplink.term = max(self.uplink.term, message.term)
            if message.record:
                self._journal.learn(message.record)
        elif isinstance(message, messages.News):
            self._journal.mirror(message.status, message.failure)
        elif isinstance(message, messages.Begin):
            self.uplink.term = self._journal.term = message.term

    def _look_around(self, join: Callable[[], messages.Join | None], now: float) -> list[messages.Message]:
        """Look for a root where there is none with a term. Returns what one that was found has said."""
        assert self.uplink is not None
        if self._watch is not None and self._roster is not None:
            seeking, own = self.scout or self.uplink, Target(self.address, self.root_port)
            seeking.holder = holder_of(self._watch.record, seeking.term, self._start, own)
            if self.scout is not None or self.uplink.welcome is None:
                self.outcome = beginning.ended_elsewhere(self._watch.record, self._watch.status, self._start)
        if self.scout is None and self.uplink.is_next and self._roster is not None and join() is not None:
            self._become_root(now)
        if self.scout is None or self.root is None:
            if self.uplink.welcome is not None and self._watch is not None:
                self._watch.stop()
                self._watch = None
            return []
        if self.root.state.claimed:  # this agent is root now
            self._end_scout()
        elif self.root.may_be_left:
            found = self.scout.look(join, now)
            if self.scout.welcome is not None:
                self._leave_root()
                self.uplink, self.scout = self.scout, None
                for message in found:
                    self._hear(message)
                return found
        return []

    def _seek(self, lost: Lost, fence: Callable[[], None], now: float) -> None:
        """The root is lost; the roster says where the next one is to be looked for."""
        assert self.uplink is not None and self._request is not None
        before = self.uplink
        self._journal.log("root_sought", why=lost.why, silent=lost.silent)
        fence()
        before.close()
        self._end_scout()
        members = self._roster.members if self._roster is not None else []
        resigned = lost.moved is not None and not lost.moved.port  # and where the other one answers is not known
        until_s = now if lost.silent or resigned else now + self._request.recovery.return_s
        root = lost.moved if lost.moved is not None and lost.moved.port else before.target
        path = route(members, self.number, root, until_s, self.private is not None)
        self.uplink = Uplink(self._request, self.token, path, self._journal, self._selector, now, before.term)
        if lost.moved is None or self._lost is None:  # else only one that could not take over
            self._lost = lost
        if self._watch is None:
            self._watch = terms.Watch(self._run_dir)

    def _become_root(self, now: float) -> None:
        """No machine before this one answers. The scout goes on looking for one."""
        assert self.uplink is not None and self._request is not None and self._roster is not None
        assert self._listener is not None and self._lost is not None
        self._journal.log("becomes_root", why=self._lost.why)
        self.scout = self.uplink
        step = 0
        if self._watch is not None:
            self._roster = beginning.newest_roster(self._roster, self._watch.record)
            step = int(self._watch.status.get("step") or 0)
        self.root = beginning.succeed_root(
            self._run_dir,
            self._arena,
            self._request,
            self._start,
            self._roster,
            self.number,
            max(self.reached, step),
            self._lost,
            self.token,
            self._listener,
            self._journal,
            self._selector,
        )
        self.uplink = Uplink(self._request, self.token, self.root, self._journal, self._selector, now, self.scout.term)

    def _leave_root(self) -> None:
        """Another agent is root."""
        assert self.root is not None and self.uplink is not None
        self.uplink.close()
        for channel in self.root.close():
            channel.send(messages.Refused(2, "another agent is root now; type the command again"))
            channel.close()
        if self.root.beats is not None:
            self.root.beats.stop(0.0)
        self.root, self._journal.speaks_for_job = None, False

    def _end_scout(self) -> None:
        if self.scout is not None:
            self.scout.close()
            self.scout = None

    # --- the end ------------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """This machine leaves the job, which goes on."""
        if self.root is not None:
            self._leave_root()

    def close(self) -> tuple[list[messages.Channel], terms.Beats | None]:
        """Let go of the other machines. Returns the root's visitors, and the beats, to be stopped when all is written."""
        beats = self._beats if self.root is None else self.root.beats
        visitors = [] if self.root is None else self.root.close()
        if self._listener is not None:
            self._listener.close()
        return visitors, beats
