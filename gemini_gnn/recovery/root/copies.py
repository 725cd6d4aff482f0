"""The root's part in the copies of snapshots: what a generation resumes from, which snapshot is recoverable, which is persisted.

Ownership. The root has one ``Copies`` from its beginning to its end. It decides by pure functions (``restoring.py``,
``persisting.py``, ``snapshot.replicas``), and sends what they want through the root's connections.

Interruptions. A worker may be lost between any two messages. In a planning its machine is then away, and the root begins
another planning when it is back: answers to the old asks are nobody's. While trainers run, a lost worker ends the generation,
and with it all that was under way.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from gemini_gnn.config import SnapshotConfig, interval, replicas_of
from gemini_gnn.recovery import messages
from gemini_gnn.recovery.root import persisting, restoring
from gemini_gnn.recovery.root.restoring import Kind
from gemini_gnn.recovery.worker.journal import Journal
from gemini_gnn.snapshot.replicas import plan as catalog
from gemini_gnn.snapshot.replicas.placement import explain, kept, placement
from gemini_gnn.snapshot.store.identity import COMMON, Identity, shard_of

VISIT_S = 5.0  # then a visitor hears of the machines that have answered


@dataclass
class _Visit:
    """A visitor that waits for the catalog. ``waiting``: by number of the ask, the machines that have not answered."""

    channel: messages.Channel
    until_s: float
    waiting: dict[int, int]
    heard: set[int] = field(default_factory=set)
    copies: set[catalog.Copy] = field(default_factory=set)


class Copies:
    """
    Attributes:
        machines: their numbers: by seat, then the standbys that are here. Everything below counts machines by place in it.
        replicas: copies of each shard. placement: by seat, those that keep copies of its shards, itself first.
        identity: of the snapshot that the newest generation resumes from, as planned. loads: from a checkpoint.
        term: of the root.
        recoverable: the newest snapshot of which every shard has its copies.
        ending: the job has ended, and its last snapshot is being persisted.
    """

    def __init__(
        self,
        settings: SnapshotConfig,
        seats: int,
        local: int,
        send: Callable[[int, messages.Message], None],
        say: Callable[[str], None],
        journal: Journal,
        now: float,
        *,
        term: int,
        storage: restoring.Storage,
    ):
        """
        Args:
            seats: number of them. local: ranks of each.
            send: to a machine by its number.
            storage: when to look at checkpoints before the first generation.
        """
        self.settings, self._send_to, self.say, self.journal = settings, send, say, journal
        self.seats, self.machines = seats, list(range(seats))
        self.ranks_of = [list(range(seat * local, (seat + 1) * local)) for seat in range(seats)]
        self.replicas = replicas_of(settings, seats)
        self.placement = placement(seats, self.replicas, settings.failure_domains if self.replicas > 1 else ())
        self.peers: dict[int, messages.Peer] = {}
        self.term = term
        self.identity: Identity | None = None
        self.loads = False
        self.recoverable: Identity | None = None
        self._generation = 0
        self._copied: dict[int, set[Identity]] = {}
        self._restoring: restoring.Restoring | None = None
        self._asked = secrets.randbits(48)  # number of the next ask: a late answer to an earlier root is nobody's
        self._looks = -self._asked  # of visitors' asks, downwards: the asks of a planning follow each other
        self._storage = storage
        every = interval(settings.persist_every)
        assert every is not None
        self._persisting = persisting.State(seats, every, last_s=now)
        self._troubles: set[str] = set()
        self._marks = 0  # the machine that marks a checkpoint complete
        self.ending = self._explained = False
        self._visits: list[_Visit] = []

    # --- before a generation --------------------------------------------------------------------------------------------

    def send(self, machine: int, message: messages.Message) -> None:
        self._send_to(self.machines[machine], message)

    def joined(self, machine: int) -> None:
        """A standby has come."""
        if machine not in self.machines:
            self.machines.append(machine)

    def plan(self, machines: Sequence[int]) -> bool:
        """Begin to find out what is there. Returns whether there is nothing to find out.

        Args:
            machines: their numbers: by seat, then the standbys that are here.
        """
        moved = list(machines[: self.seats]) != self.machines[: self.seats]
        self.identity, self.loads, self.machines = None, False, list(machines)
        if self.settings.mode != "memory":
            return True
        storage = self._storage
        if storage is restoring.Storage.NEVER and self._persisting.newest is not None:
            storage = restoring.Storage.IF_NEEDED
        if (
            moved and storage is restoring.Storage.IF_NEEDED
        ):  # what memory still has may be older than the last checkpoint
            storage = restoring.Storage.AT_ONCE
        standbys: list[list[int]] = [[]] * (len(machines) - self.seats)
        self._restoring, asks = restoring.begin([*self.ranks_of, *standbys], self._asked, storage)
        if storage is restoring.Storage.AT_ONCE:  # once: from now on this job makes the newest ones itself
            self._storage = restoring.Storage.IF_NEEDED
        self._send(asks)
        return False

    def _send(self, asks: list[restoring.Ask]) -> None:
        self._asked += len(asks)
        for ask in asks:
            match ask.kind:
                case Kind.HOLDS:
                    self.send(ask.machine, messages.Survey(ask.number))
                case Kind.CHECKPOINTS:
                    self.send(ask.machine, messages.AskCheckpoints(ask.number))
                case Kind.MEMORY:
                    assert ask.identity is not None
                    wanted = [
                        messages.Wanted(get.shard, ask.identity, self.peers[self.machines[get.source]])
                        for get in ask.gets
                    ]
                    self.journal.log("fetch", machine=ask.machine, identity=ask.identity, gets=ask.gets)
                    self.send(ask.machine, messages.Fetch(ask.number, wanted))
                case Kind.STORAGE:
                    assert ask.identity is not None
                    self.loads = True
                    self.journal.log("load", machine=ask.machine, identity=ask.identity, gets=ask.gets)
                    self.send(ask.machine, messages.Load(ask.number, ask.identity, [get.shard for get in ask.gets]))

    def _answer(self, number: int, held: list[catalog.Copy], misses: list[messages.Miss]) -> bool:
        """Returns whether the planning is over."""
        if self._visited(number, held) or self._restoring is None:
            return False
        ask = next((one for one in self._restoring.open if one.number == number), None)
        missed = {miss.shard for miss in misses}
        gets = [get for get in ask.gets if get.shard in missed] if ask is not None else []
        for miss in misses:
            self.say(f"shard {miss.shard} of snapshot {miss.identity}: {miss.text}; looking for another copy")
        self._restoring, asks = restoring.answered(self._restoring, number, held, gets)
        self._send(asks)
        if not self._restoring.done:
            return False
        over, self._restoring = self._restoring, None
        if self.ending:
            self._persist(over.copies)
            return False
        self.identity, self.recoverable = over.identity, None
        if over.identity is not None:
            needs = catalog.needs_of(over.copies, self.ranks_of)
            self.recoverable = catalog.replicated(over.copies - over.refused, needs, self.placement, over.identity)
        self.journal.log("planned", identity=self.identity, recoverable=self.recoverable)
        return True

    # --- visitors -----------------------------------------------------------------------------------------------------------

    def inspect(self, visitor: messages.Channel, here: list[int], now: float) -> None:
        """Ask the machines that are ``here`` what they hold at this moment; the answer comes when they have said it."""
        visit = _Visit(visitor, now + VISIT_S, {})
        self._visits.append(visit)
        orders: list[tuple[int, type[messages.Look | messages.AskCheckpoints]]] = [
            (place, messages.Look) for place, machine in enumerate(self.machines) if machine in here
        ]
        if self.machines[0] in here and self.settings.mode == "memory":
            orders.append((0, messages.AskCheckpoints))
        for place, order in orders:
            self._looks -= 1
            visit.waiting[self._looks] = place
            self.send(place, order(self._looks))

    def answer_visitors(self, now: float) -> None:
        for visit in list(self._visits):
            if not visit.waiting or now > visit.until_s:
                self._visits.remove(visit)
                names = [peer.name if (peer := self.peers.get(m)) else f"machine {m + 1}" for m in self.machines]
                needs = catalog.needs_of(visit.copies, self.ranks_of)
                text = catalog.describe(catalog.plan(visit.copies, needs), visit.copies, needs, names)
                away = sorted({*range(len(names))} - visit.heard)
                answer = messages.Catalog(text, self.recoverable, self.replicas, [names[one] for one in away])
                visit.channel.send(answer, timeout_s=1.0)

    def _visited(self, number: int, held: list[catalog.Copy]) -> bool:
        for visit in self._visits:
            if number in visit.waiting:
                visit.heard.add(visit.waiting.pop(number))
                visit.copies.update(held)
                return True
        return False

    # --- after the last generation ----------------------------------------------------------------------------------------

    def end(self, here: Sequence[int]) -> None:
        """Persist the newest snapshot that the machines ``here`` hold, now that no trainer lives; ``ending`` until that is done
        or cannot be. A replica of a lost machine's shard will do."""
        if self.settings.mode != "memory" or self.settings.persist_every == "never" or not here:
            return
        self.ending, self.machines = True, list(here)
        self._restoring, asks = restoring.begin([[]] * len(here), self._asked, restoring.Storage.NEVER)
        self._send(asks)

    def _persist(self, copies: Collection[catalog.Copy]) -> None:
        """Each shard from one of the machines that hold it."""
        common = {COMMON} & {copy.shard for copy in copies}
        needs = {*common, *self._shards()}
        found = catalog.plan(copies, [needs])
        if found is None or found.identity == self._persisting.newest:
            self.ending = False
            return
        shards: dict[int, list[str]] = {}
        for shard in sorted(needs):
            place = min(copy.place for copy in copies if copy[:2] == (shard, found.identity))
            shards.setdefault(place, []).append(shard)
        self._persisting = persisting.at_the_end(self._persisting, found.identity, len(shards))
        self._marks = min(shards)
        for place, its in shards.items():
            self.send(place, messages.Persist(found.identity, its))

    # --- a generation -----------------------------------------------------------------------------------------------------

    def begun(self, generation: int) -> None:
        self._generation, self._copied, self._marks = generation, {}, 0
        self._persisting = persisting.generation(self._persisting)
        if self._explained:
            return
        self._explained = True
        if self.replicas > 1:
            names = [self.peers[machine].name for machine in self.machines[: self.seats]]
            for line in explain(self.placement, names, self.settings.failure_domains):
                self.say(line)

    def order(self, machine: int) -> dict[str, Any]:
        """The fields of Begin for the machine of this number."""
        seat = self.machines.index(machine)
        foreign = [rank for other in kept(self.placement, seat) for rank in self.ranks_of[other]]
        return {
            "restore": self.identity,
            "recoverable": self.recoverable,
            "replicas": self.replicas,
            "peers": [self.peers[self.machines[other]] for other in self.placement[seat][1:]],
            "kept": sorted(foreign),
        }

    def hear(self, machine: int, message: messages.Message, now: float) -> bool:
        """A worker's word on copies. Returns whether it ends the planning."""
        if machine not in self.machines:
            return False
        machine = self.machines.index(machine)
        match message:
            case messages.Holds(number, shards):
                return self._answer(number, [catalog.Copy(shard, identity, machine) for shard, identity in shards], [])
            case messages.Stored(number, shards, problem):
                if problem:
                    self.say(f"checkpoints cannot be listed: {problem}")
                return self._answer(
                    number, [catalog.Copy(shard, identity, catalog.DISK) for shard, identity in shards], []
                )
            case messages.Fetched(number, misses):
                return self._answer(number, [], misses)
            case messages.Copied(generation, identity) if generation == self._generation:
                self._count(machine, identity)
            case messages.Trouble(text):
                if text not in self._troubles:  # once, however often it comes
                    self._troubles.add(text)
                    self.say(text)
            case messages.Persisted(identity, problem):
                self._act(*persisting.persisted(self._persisting, machine, identity, problem), now)
            case messages.Completed(identity, problem):
                self._act(*persisting.completed(self._persisting, identity, problem), now)
        return False

    def _count(self, machine: int, identity: Identity) -> None:
        """A machine's shards of ``identity`` have their copies."""
        self._copied.setdefault(machine, set()).add(identity)
        newest = catalog.recoverable(self._copied, len(self.ranks_of))
        if newest is None or (self.recoverable is not None and newest <= self.recoverable):
            return
        self.recoverable = newest
        for reported in self._copied.values():
            reported -= {one for one in reported if one < newest}
        for place in range(len(self.machines)):  # a standby drops what it still holds
            self.send(place, messages.Advance(newest))

    def look(self, step: int, step_s: float, now: float) -> None:
        """The job trains in ``step``: is a checkpoint due?"""
        if self.settings.mode == "memory":
            self._act(*persisting.look(self._persisting, step, step_s, now), now)

    def _act(self, state: persisting.State, actions: list[persisting.Action], now: float) -> None:
        self._persisting = state
        for action in actions:
            match action:
                case persisting.Ask(step):
                    for place in range(min(self.seats, len(self.machines))):
                        self.send(place, messages.PersistAt(step))
                case persisting.Mark(identity):
                    self.send(self._marks, messages.Complete(identity, self._shards(), self.term))
                case persisting.Say(text):
                    self.say(text)
        if actions and not state.asked:
            self.journal.log("checkpoint", identity=state.newest)
            if self.ending and state.newest is not None:
                self.say(
                    f"the snapshot of step {state.newest.step} is on storage now: the same command goes on from it"
                )
            self.ending = False

    def _shards(self) -> list[str]:
        return [shard_of(rank) for ranks in self.ranks_of for rank in ranks]

    def are_whole(self, term: int, generation: int) -> bool:
        """Whether a snapshot of this generation has all its copies: after a loss the replication factor is there again."""
        newest = self.recoverable
        return self.replicas == 1 or (newest is not None and newest[:2] == (term, generation))

    def status(self) -> dict[str, Any]:
        newest = self._persisting.newest
        return {
            "replicas": self.replicas,
            "recoverable": None if self.recoverable is None else list(self.recoverable),
            "checkpoint": None if newest is None else list(newest),
        }
