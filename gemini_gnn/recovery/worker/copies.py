"""A worker's part in the copies of snapshots: orders of the root go on to replicator and persister, their answers go back.

Ownership. The agent has one ``Copies`` from the beginning of a job to its end, in its loop. It owns the two helpers
(``helpers.py``), processes that move bulk bytes: the replicator between memories, the persister between memory and storage. The
agent itself only reads and voids headers in the arena, and does so only while no trainer lives and the replicator is quiet.

Interruptions. A helper may die at any instruction: another one gets the orders that still hold. Storage that hangs holds up the
persister alone: what takes too long, a list of checkpoints or the load of one, is answered for it. An order of an earlier
planning may still be answered: the root knows its number no more.
"""

from __future__ import annotations

import mmap
import os
import selectors
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from gemini_gnn.errors import ClusterError
from gemini_gnn.recovery import board, messages, wire
from gemini_gnn.recovery.worker import helpers
from gemini_gnn.recovery.worker.beginning import checkpoint_folder
from gemini_gnn.recovery.worker.journal import Journal
from gemini_gnn.snapshot.replicas.plan import obsolete
from gemini_gnn.snapshot.store import arena
from gemini_gnn.snapshot.store.format import SlotState
from gemini_gnn.snapshot.store.identity import COMMON, Identity, shard_of

LIST_S = 30.0  # until storage has said which checkpoints there are
LOAD_S = 60.0  # without a byte of a checkpoint that is loaded


class Copies:
    """
    Attributes:
        port: of the replicator; 0: the job has one machine, or keeps no snapshots in memory.
    """

    def __init__(
        self,
        folder: Path,
        job: str,
        request: messages.Register,
        address: str,
        token: bytes,
        journal: Journal,
        selector: selectors.BaseSelector,
        tell: Callable[[messages.Message], None],
    ):
        """``address``: of this machine, for the others."""
        self.arena, self.request, self.journal, self.tell = folder, request, journal, tell
        place, self.port = request.place, 0
        self._listener: socket.socket | None = None
        self._token = -1
        self.replicator: helpers.Helper | None = None
        if place.machines > 1 and request.snapshot.mode == "memory":
            self._listener = wire.listen(address or everywhere(place.master_addr), 0)
            self.port = self._listener.getsockname()[1]
            self._token = helpers.secret(token)
            self.replicator = helpers.replicator(folder, job, self._listener, self._token, journal, selector)
        keep, storage = request.snapshot.persist_keep, checkpoint_folder(journal.run_dir, request)
        self.persister = helpers.persister(folder, journal.run_dir, storage, keep, job, journal, selector)
        self._persists = False  # the persister has been needed
        self._survey: int | None = None  # number of one that waits for the replicator
        self._lists: dict[int, float] = {}  # by number of an AskCheckpoints, until when storage may answer
        self._load: tuple[messages.Load, float] | None = None  # under way, and until when storage may move a byte
        self._ranks: list[int] = []
        self._kept: list[int] = []
        self._persist_at = 0
        self._persisting: Identity | None = None  # the persister was told to write it
        self._dropped = True  # shards that are no longer of this machine

    # --- orders of the root -----------------------------------------------------------------------------------------------

    def obey(self, message: messages.Message, pages: mmap.mmap | None, now: float) -> None:
        match message:
            case messages.Survey(number):
                self._survey, self._load = number, None
                # Both are of no use now, and a load writes into the arena.
                self.persister.give_up(messages.Load, messages.Persist)
                if self.replicator is None:
                    self._hold()
                else:
                    self.replicator.send(messages.Quiet())
            case messages.Look(number):
                self.tell(messages.Holds(number, self._held()))
            case messages.AskCheckpoints(number):
                if not self._lists:  # else the answer to the first ask is one to all
                    self._to_persister(messages.ListCheckpoints())
                self._lists[number] = now + LIST_S
            case messages.Fetch():
                assert self.replicator is not None
                self.replicator.send(message)
            case messages.Load():
                self._load = (message, now + LOAD_S)
                self._to_persister(message)
            case messages.Advance(identity):
                for page in range(len(self._ranks) if pages is not None else 0):
                    assert pages is not None
                    board.tell_recoverable(pages, page, identity)
                if self.replicator is not None:
                    self.replicator.send(message)
                self._drop_surplus()
            case messages.PersistAt(step):
                self._persist_at, self._persisting = step, None
                for page in range(len(self._ranks) if pages is not None else 0):
                    assert pages is not None
                    board.ask_to_persist(pages, page, step)
            case messages.Persist():
                self._persist(message.identity, message.shards)
            case messages.Complete(identity, shards, term):
                common = [COMMON] if (self.arena / f"{COMMON}.0").exists() else []
                self._to_persister(messages.Complete(identity, [*shards, *common], term))

    def begin(self, begin: messages.Begin, term: int, pages: mmap.mmap | None) -> None:
        """Before the trainers of a generation are forked: no newer snapshot is left here, and the replicator knows its part."""
        self._ranks, self._kept, self._dropped = begin.ranks, begin.kept, False
        self._persist_at, self._persisting = 0, None
        if begin.restore is not None:
            for file in self._slots():
                if obsolete([file.view()], begin.restore, begin.recoverable):
                    file.void()
                file.close()
        if begin.recoverable is not None and pages is not None:
            for page in range(len(begin.ranks)):
                board.tell_recoverable(pages, page, begin.recoverable)
        if begin.replicas > 1:
            assert self.replicator is not None
            settings = self.request.snapshot
            order = messages.Replicate(
                term=term,
                generation=begin.generation,
                # At a fresh start nothing of an earlier generation: the trainers void it.
                since=begin.restore or Identity(term, begin.generation, 0),
                recoverable=begin.recoverable,
                own=[shard_of(rank) for rank in begin.ranks],
                kept=[shard_of(rank) for rank in begin.kept],
                peers=begin.peers,
                pages=len(begin.ranks),
                every_s=settings.replicate_every_s,
                bytes_per_s=settings.replica_bytes_per_s,
                interleave=settings.interleave,
            )
            self.replicator.send(order)

    def fence(self) -> None:
        """The root is lost: what it ordered is done no more, and no copy goes out or comes in."""
        self._survey, self._load, self._persist_at = None, None, 0
        self._ranks, self._kept, self._dropped = [], [], False  # another machine may have this one's place
        self._lists.clear()
        self.persister.give_up(messages.Load, messages.Persist, messages.Complete)
        if self.replicator is not None:
            self.replicator.send(messages.Quiet())

    def _to_persister(self, order: messages.Message) -> None:
        self._persists = True
        self.persister.send(order)

    # --- answers of the helpers -------------------------------------------------------------------------------------------

    def look(self, now: float) -> None:
        """Pass on what the helpers have said; never waits."""
        if self.replicator is not None:
            for message in self.replicator.look(now):
                self._pass_on(message)
        if self._persists:
            for message in self.persister.look(now):
                if self._load is not None and isinstance(message, messages.Alive):
                    self._load = (self._load[0], now + LOAD_S)
                self._pass_on(message)
        if self._load is not None and now > self._load[1]:
            (load, _), self._load = self._load, None
            self.persister.give_up(messages.Load)
            text = f"storage has not moved a byte for {LOAD_S:.0f} s"
            misses = [messages.Miss(shard, load.identity, "storage", False, text) for shard in load.shards]
            self.tell(messages.Fetched(load.attempt, misses))
        for number in [number for number, until_s in self._lists.items() if now > until_s]:
            del self._lists[number]
            self.tell(messages.Stored(number, [], f"storage has not answered for {LIST_S:.0f} s"))

    def patience_s(self, now: float) -> float:
        """Until :meth:`look` has something to do that no descriptor announces."""
        used = [self.replicator] * (self.replicator is not None) + [self.persister] * self._persists
        return min((helper.patience_s(now) for helper in used if helper is not None), default=60.0)

    def _pass_on(self, message: messages.Message) -> None:
        match message:
            case messages.Silent():
                self._hold()
            case messages.Checkpoints(identities, shards, problem):
                found = [(shard, one) for one, its in zip(identities, shards, strict=True) for shard in its]
                for number in self._lists:
                    self.tell(messages.Stored(number, found, problem))
                self._lists.clear()
            case messages.Fetched(number) if self._load is not None and number == self._load[0].attempt:
                self._load = None
                self.tell(message)
            case (
                messages.Fetched() | messages.Copied() | messages.Damaged() | messages.Trouble() | messages.Completed()
            ):
                self.tell(message)
            case messages.Persisted(identity) if identity == self._persisting:  # not one that was given up
                self.tell(message)

    def _hold(self) -> None:
        """Answer a Survey: nothing writes into the arena now."""
        if self._survey is None:
            return
        number, self._survey = self._survey, None
        self.tell(messages.Holds(number, self._held()))

    def _held(self) -> list[tuple[str, Identity]]:
        found = set()
        for file in self._slots():
            view = file.view()
            if view.state is SlotState.COMMITTED and view.identity is not None:
                found.add((view.shard, view.identity))
            file.close()
        return sorted(found)

    def _slots(self) -> list[arena.SlotFile]:
        return arena.slots(self.arena)

    # --- what the trainers hold, and what nobody needs ----------------------------------------------------------------------

    def look_at_held(self, boards: Sequence[board.Board | None]) -> None:
        """Persist the snapshot that all trainers here hold, once."""
        if not self._persist_at or self._persisting is not None:
            return
        newest = [one.held for one in boards if one is not None and one.held is not None]
        held = [one for one in newest if one.step >= self._persist_at]  # not those of the last time
        if len(held) < len(self._ranks):
            return
        identity = held[0]
        if len(set(held)) > 1:
            self._persisting = identity
            self.tell(messages.Persisted(None))  # some heard too late
            return
        common = (
            [COMMON] if 0 in self._ranks and (self.arena / f"{COMMON}.0").exists() else []
        )  # one machine's is enough
        self._persist(identity, [*map(shard_of, self._ranks), *common])

    def _persist(self, identity: Identity, shards: list[str]) -> None:
        self._persisting = identity
        self._to_persister(messages.Persist(identity, shards))

    def _drop_surplus(self) -> None:
        """A snapshot has all its copies: shards that were this machine's before hosts changed are of no use any more."""
        if self._dropped:
            return
        self._dropped = True
        wanted = {COMMON, *map(shard_of, [*self._ranks, *self._kept])}
        for file in self._slots():
            file.close()
            if file.shard not in wanted:
                with suppress(OSError):
                    file.path.unlink()
                self.journal.log("slot_dropped", shard=file.shard, slot=file.slot)

    def close(self) -> None:
        for helper in (self.replicator, self.persister):
            if helper is not None:
                helper.close()
        if self._listener is not None:
            self._listener.close()
            os.close(self._token)


def everywhere(master_addr: str) -> str:
    """The address that stands for all of this machine's, of the family of ``master_addr``."""
    return "::" if ":" in master_addr else "0.0.0.0"


def address_towards(master_addr: str) -> str:
    """The address of this machine on the way to the first one. Sends nothing.

    Raises:
        ClusterError: there is no way.
    """
    try:
        family, _, _, _, where = socket.getaddrinfo(master_addr, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(where)  # a datagram socket only looks up the route
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ClusterError(
            f"{os.uname().nodename} has no way to the first machine, MASTER_ADDR={master_addr}: {error.strerror}. Is its "
            f"network up? Try there: `ip route get {master_addr}`"
        ) from error
