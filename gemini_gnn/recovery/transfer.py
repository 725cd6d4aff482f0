"""Shards between the arenas of two machines: what is said on one connection. No process, no thread, no plan.

    one end                            the end that listens
    Offer, header of a slot      ->    Go | Kept | Later | NotKept
    the bytes, after Go          ->    Kept | NotKept
    Ask, a shard                 ->    Serve, the bytes | Lacks

The bytes are those of the slot's file from the first page after the header to the end of the tail. They travel raw, from
one mapping into the other. The header travels in a message, under its MAC; its checksums prove the bytes.

Who owns what. The sender pins its slot by a shared lock, reads the header again, and drops the lock when the answer has
come: until then the owner of the shard finds the slot busy. The receiver holds an exclusive lock on the slot it writes, so
of two connections that bring the same shard one is told Later. Each end opens the files for itself, and a caller closes
them: the kernel drops the locks of a process that dies.

What may be interrupted where. The slot says WRITING from before the first byte to after the last checksum. So a transfer
that is cut off at any byte leaves a slot that counts as nothing, and so does one whose bytes do not fit. Any message may be
lost with its connection. A sender that has not read Kept offers again; a receiver that has the shard answers Kept at once,
once it has read its copy and found it whole. No slot is overwritten that holds the newest recoverable snapshot or a newer
one (``catalog.writable``).

All waits are bounded: ``STALL_S`` without a byte ends a transfer, with TimeoutError. Every OSError and ValueError that
leaves this module means that the connection is of no more use.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gemini_gnn.errors import SnapshotError
from gemini_gnn.recovery import messages
from gemini_gnn.recovery.wire import Wire
from gemini_gnn.snapshot.store import arena, catalog, format
from gemini_gnn.snapshot.store.arena import SlotFile
from gemini_gnn.snapshot.store.format import Header, SlotState
from gemini_gnn.snapshot.store.identity import Identity

STALL_S = 10.0  # without a byte, or an answer: then the peer is dead, stopped or unreachable
CHUNK_BYTES = 256 << 10  # at most so much is sent before the boards are looked at again
FOREIGN_SLOTS = 2  # of a shard that is kept for another machine
MOST_BYTES = 1 << 46  # of a slot, that a header is believed

Gate = Callable[[int], None]  # called before so many bytes are sent; returns when they may be


@dataclass(frozen=True)
class Order:
    """What this machine keeps now."""

    term: int
    generation: int
    kept: Collection[str]
    recoverable: Identity | None


class Slots:
    """The slot files of one arena, opened and mapped once by one thread, which closes them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[tuple[str, int], SlotFile] = {}

    def file(self, shard: str, slot: int) -> SlotFile:
        """The slot's file, made if it is not there.

        Raises:
            SnapshotError: it cannot be made, or is another user's.
        """
        if (shard, slot) not in self._files:
            self._files[shard, slot] = SlotFile(self.folder, shard, slot, create=True)
        return self._files[shard, slot]

    def there(self, shard: str) -> list[SlotFile]:
        """The slots of the shard that are there."""
        numbers = range(catalog.OWN_SLOTS)
        return [self.file(shard, slot) for slot in numbers if (self.folder / f"{shard}.{slot}").exists()]

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


@contextlib.contextmanager
def pinned(slots: Slots, shard: str, identity: Identity) -> Iterator[tuple[SlotFile, Header] | None]:
    """The slot that has this snapshot of the shard, under a shared lock while the block runs; None where there is none."""
    for file in slots.there(shard):
        if file.view().identity == identity and file.lock(exclusive=False):
            try:
                header = file.header()  # again: the slot was its owner's until now
                if header is not None and (header.state, header.identity) == (SlotState.COMMITTED, identity):
                    yield file, header
                    return
            finally:
                file.unlock()
    yield None


# --- push -------------------------------------------------------------------------------------------------------------


def push(
    wire: Wire, slots: Slots, shard: str, identity: Identity, order: Order, gate: Gate
) -> messages.Kept | messages.Later | messages.NotKept | messages.Damaged:
    """Have the peer keep this snapshot of the shard; its answer. Damaged: our own slot was, and is void now."""
    with pinned(slots, shard, identity) as found:
        if found is None:
            return messages.Later(f"{os.uname().nodename} does not have {shard} of {identity} any more")
        file, header = found
        _say(wire, messages.Offer(order.term, order.generation, format.encode_header(header), order.recoverable))
        answer = wire.receive_one(STALL_S)
        if isinstance(answer, messages.Go):
            _send(wire, file, header, gate)
            answer = wire.receive_one(STALL_S)
        if not isinstance(answer, messages.Kept | messages.Later | messages.NotKept):
            raise ValueError(f"{wire.peer} answered an offer by {messages.kind_of(type(answer))}")
        if isinstance(answer, messages.NotKept):
            try:
                file.manifest(header)  # if it holds together, the peer or the way to it is to blame
            except SnapshotError as error:
                file.void()
                return messages.Damaged(shard, identity, f"{error}, on {os.uname().nodename}. It is void now")
        return answer


def keep(wire: Wire, offer: messages.Offer, order: Order | None, slots: Slots, job: str) -> None:
    """Answer an offer, and take the shard in if it is wanted."""
    header = _header(offer.header)
    if order is None or (offer.term, offer.generation) > (order.term, order.generation):
        _say(wire, messages.Later(f"{os.uname().nodename} has not begun generation {offer.generation} yet"))
    elif (offer.term, offer.generation) < (order.term, order.generation):
        text = f"{os.uname().nodename} is in generation {order.generation} already"
        _say(wire, messages.Later(f"{text}; the offer is of generation {offer.generation}"))
    elif header.shard not in order.kept or header.job != job:
        text = f"{os.uname().nodename} keeps no copy of {header.shard} of job {header.job}"
        _say(wire, messages.NotKept(f"{text}; expected one of {', '.join(order.kept) or 'none'}, of job {job}"))
    elif _has(slots, header):
        _say(wire, messages.Kept())
    else:
        known = [one for one in (order.recoverable, offer.recoverable) if one is not None]
        files = [slots.file(header.shard, slot) for slot in range(FOREIGN_SLOTS)]
        with _free(files, max(known, default=None)) as file:
            if file is None:
                text = f"{os.uname().nodename} has no free slot for {header.shard} of {header.identity}"
                _say(wire, messages.Later(text))
                return
            try:
                _take(wire, header, file, messages.Go())
            except SnapshotError as error:
                _say(wire, messages.NotKept(f"{os.uname().nodename}: {error}"))
                return
        _say(wire, messages.Kept())


def _has(slots: Slots, header: Header) -> bool:
    """Whether the shard is kept here already, and whole. A damaged copy is voided."""
    with pinned(slots, header.shard, header.identity) as found:
        if found is None:
            return False
        file, ours = found
        if _contents(ours) == _contents(header) and _is_whole(file, ours):
            return True
    _void(file, header.identity)
    return False


# --- fetch ------------------------------------------------------------------------------------------------------------


def fetch(wire: Wire, wanted: messages.Wanted, slots: Slots) -> messages.Miss | None:
    """Get a shard from the peer into a slot of this machine's own; None: it is here, and whole."""
    shard, identity = wanted.shard, wanted.identity

    def miss(text: str, damaged: bool = False) -> messages.Miss:
        return messages.Miss(shard, identity, wanted.peer.name, damaged, text)

    try:
        with pinned(slots, shard, identity) as found:
            if found is not None and _is_whole(*found):
                return None
        if found is not None:
            _void(found[0], identity)
        with _free([slots.file(shard, slot) for slot in range(catalog.OWN_SLOTS)], identity, rolls_back=True) as file:
            if file is None:
                return miss(f"no slot of {shard} on {os.uname().nodename} is free: other processes read them")
            _say(wire, messages.Ask(shard, identity))
            answer = wire.receive_one(STALL_S)
            if isinstance(answer, messages.Lacks):
                return miss(answer.text)
            if not isinstance(answer, messages.Serve):
                raise ValueError(f"{wire.peer} answered a request by {messages.kind_of(type(answer))}")
            header = _header(answer.header)
            if (header.shard, header.identity) != (shard, identity):
                raise ValueError(f"{wire.peer} sent {header.shard} of {header.identity} for {shard} of {identity}")
            try:
                _take(wire, header, file)
            except _Damaged as error:
                return miss(f"the copy of {shard} from {wanted.peer.name} is damaged: {error}", damaged=True)
    except SnapshotError as error:
        return miss(f"{os.uname().nodename}: {error}")
    return None


def serve(wire: Wire, ask: messages.Ask, slots: Slots, gate: Gate) -> None:
    """Send a shard that is asked for. Its receiver verifies it."""
    with pinned(slots, ask.shard, ask.identity) if _is_name(ask.shard) else contextlib.nullcontext() as found:
        if found is None:
            _say(wire, messages.Lacks(f"{os.uname().nodename} does not have {ask.shard!r} of {ask.identity}"))
        else:
            file, header = found
            _say(wire, messages.Serve(format.encode_header(header)))
            _send(wire, file, header, gate)


# --- parts ------------------------------------------------------------------------------------------------------------


class _Damaged(SnapshotError):
    """All bytes came, and they are not those that were committed."""


def _say(wire: Wire, message: messages.Message) -> None:
    if not wire.send(message, STALL_S):
        raise ConnectionError(f"{wire.peer} has closed the connection")


def _header(raw: bytes) -> Header:
    """The header of a peer's committed slot.

    Raises:
        ValueError: it is none.
    """
    try:
        header = format.decode_header(raw)
    except SnapshotError as error:
        raise ValueError(str(error)) from None
    if header is None or header.state is not SlotState.COMMITTED or not _is_name(header.shard):
        raise ValueError("expected the header of a committed slot; got something else")
    if not format.PAGE <= header.tail_offset <= _end(header) <= MOST_BYTES:
        raise ValueError(f"expected a slot of at most {MOST_BYTES} bytes; the header says {_end(header)}")
    return header


def _is_name(shard: str) -> bool:
    """Whether this may be the name of a shard: never a path."""
    return shard.isascii() and shard.replace("-", "").isalnum()


def _end(header: Header) -> int:
    return header.tail_offset + header.tail_bytes


def _contents(header: Header) -> Header:
    """What must be equal in the headers of two copies."""
    return replace(header, slot=0, committed_ns=0)


def _is_whole(file: SlotFile, header: Header) -> bool:
    try:
        file.manifest(header)
    except SnapshotError:
        return False
    return True


def _void(file: SlotFile, identity: Identity) -> None:
    """Void a slot that still has this snapshot, unless another process reads or writes it."""
    if file.lock(exclusive=True):
        try:
            if file.view().identity == identity:
                file.void()
        finally:
            file.unlock()


@contextlib.contextmanager
def _free(files: list[SlotFile], recoverable: Identity | None, rolls_back: bool = False) -> Iterator[SlotFile | None]:
    """A slot of one shard that may be written, under an exclusive lock while the block runs; None: there is none.

    Args:
        rolls_back: the job goes back to ``recoverable``. So snapshots that are newer go before it goes on; the newest of
            them gives its slot, if no other slot is free.
    """
    views = {file.slot: file.view() for file in files}
    busy: set[int] = set()
    while True:
        left = [replace(view, pinned=slot in busy) for slot, view in views.items()]
        slot = catalog.writable(left, recoverable)
        if slot is None and rolls_back:
            newer = [view for view in catalog.newer(left, recoverable) if not view.pinned]
            slot = max(newer, key=lambda view: view.identity or Identity(0, 0, 0)).slot if newer else None
        if slot is None:
            yield None
            return
        (file,) = (file for file in files if file.slot == slot)
        if not file.lock(exclusive=True):
            busy.add(slot)
            continue
        try:
            if file.view() == views[slot]:
                yield file
                return
            views[slot] = file.view()  # it was another's until now
        finally:
            file.unlock()


def _send(wire: Wire, file: SlotFile, header: Header, gate: Gate) -> None:
    """The bytes of a pinned slot."""
    with memoryview(file.map(_end(header))) as raw:
        for begin in range(format.PAGE, _end(header), CHUNK_BYTES):
            size = min(CHUNK_BYTES, _end(header) - begin)
            gate(size)
            wire.send_bytes(raw[begin : begin + size], STALL_S)


def _take(wire: Wire, header: Header, file: SlotFile, go: messages.Message | None = None) -> None:
    """Receive the bytes of a slot into ``file``, which is locked; ``go``: is said once there is room for them.

    Raises:
        SnapshotError: there is no room, or (:class:`_Damaged`) the bytes do not fit.
    """
    ours = replace(header, slot=file.slot)
    size = header.tail_offset + max(header.tail_bytes, format.TAIL_ROOM)
    file.reserve(size)
    file.write_header(replace(ours, state=SlotState.WRITING))
    if go is not None:
        _say(wire, go)
    wire.receive_bytes(memoryview(file.map(size))[format.PAGE : _end(header)], STALL_S)
    try:
        file.manifest(ours)
    except SnapshotError as error:
        raise _Damaged(str(error)) from None
    file.write_header(replace(ours, committed_ns=arena.now_ns()))
