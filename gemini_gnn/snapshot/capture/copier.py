"""The thread that copies a rank's tensors into its slots, and commits them.

Account of the concurrency. The training thread hands over one ``Capture`` at a time with ``begin``. Afterwards it changes
only ``fenced`` in it; the next capture comes only after ``committed`` is set. In between:

- Until ``copied`` is set the copying thread reads the live tensors: the training thread may run forward and backward only.
- From then on it reads only slots and capture. It writes tails and headers COMMITTED, and releases the locks.
- ``committed`` is set last, also after an error; an exception is kept in ``error`` *before*, for the training thread.

So each byte of a slot has one writer at any instant: the training thread before ``begin`` returns, the copying thread
afterwards. Training pays for the first, so it copies only the tensors that forward changes. No byte may change under an
old header, so it first writes the header WRITING of their shards; the copying thread writes all others. Only the copying
thread writes ``stats.copy_s`` and ``seal_s``.

A kill anywhere leaves slots WRITING (void) or COMMITTED; locks die with the process.
"""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from gemini_gnn.errors import SnapshotError
from gemini_gnn.snapshot.capture.cuda import CudaCopies, on_gpu
from gemini_gnn.snapshot.capture.shards import Piece, Shard, live_pieces
from gemini_gnn.snapshot.capture.stats import Stats
from gemini_gnn.snapshot.capture.unchanged import Version, check_unchanged, versions
from gemini_gnn.snapshot.context import Context
from gemini_gnn.snapshot.state import generators, tree
from gemini_gnn.snapshot.state.generators import Generators
from gemini_gnn.snapshot.store import arena, catalog, format
from gemini_gnn.snapshot.store.format import Header, SlotState
from gemini_gnn.snapshot.store.identity import COMMON, Identity

_HELD_BELOW = 128 << 10  # smaller copies keep the interpreter lock: getting it back can take a 5 ms switch interval

_MADV_POPULATE_WRITE = 23  # Linux 5.14; elsewhere it fails, and the first captures pay the page faults
_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes, _madvise.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
_memmove_free = ctypes.CDLL(None).memmove
_memmove_held = ctypes.PyDLL(None).memmove
for _f in (_memmove_free, _memmove_held):
    _f.argtypes, _f.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t], ctypes.c_void_p


@dataclass
class Capture:
    """One unit of work of the copying thread: the snapshot of one step.

    Attributes:
        slots: the locked slot of every shard of ours.
        values: of the rank's own shard, packed; without those of ``generators``, which the copying thread packs.
        compare: keep the checksum of the common state, for ``divergence.check``.
        versions: of the tensors when the capture began.
        hold: tell that this one is held, once it is committed.
        held: slots that are not to be overwritten, whatever they hold.
        fenced: on CUDA, of the tensors when training passed the fence; copies may still be under way then.
    """

    identity: Identity
    slots: dict[str, int]
    values: tuple[dict[str, Any], list[np.ndarray]]
    generators: Generators
    compare: bool
    versions: list[Version]
    hold: bool
    held: dict[str, tuple[int, ...]]
    fenced: list[Version] | None = None


class NextSlot(NamedTuple):
    """The slot of a shard to overwrite next; ``old``: the snapshot that is lost then, None: none."""

    slot: int
    old: Identity | None


def next_slot(shard: Shard, newest: Identity | None, busy: Collection[int]) -> NextSlot | None:
    """The slot to overwrite while ``newest`` must stay, and those that are ``busy``."""
    views = [replace(view, pinned=view.slot in busy) for view in shard.views()]
    slot = catalog.writable(views, newest)
    if slot is None:
        return None
    return NextSlot(slot, views[slot].identity if views[slot].state is SlotState.COMMITTED else None)


class _Warm:
    """A request to touch the slots: after a restore, which should not wait for it."""


class Copier:
    """See the module's account.

    Attributes:
        copied, committed: set when the last capture is, and before the first one.
        error: the exception of this thread; no capture after it is valid.
        common: checksum of the common state of the last capture with ``compare``.
        next_slots: per shard of ours the slot to take for the next capture, if one but the last capture's is left. Only this
            process writes them, so it stays right; the slot's lock tells whether a reader holds it.
        late: the tensors that are copied in the background.
    """

    def __init__(self, here: Context, shards: list[Shard], stats: Stats):
        self._here, self._stats = here, stats
        own = self._own = [s for s in shards if s.owned]
        self._foreign = [s for s in shards if not s.owned]
        self.copied, self.committed = threading.Event(), threading.Event()
        self.copied.set()
        self.committed.set()
        self.error: BaseException | None = None
        self.common = b""
        self.next_slots: dict[str, NextSlot] = {}
        self.late = [e for s in own for e in s.entries if not e.at_once]
        self._early = [(s, pieces) for s in own if (pieces := [p for p in s.pieces if p.entry.at_once])]
        self.cuda = CudaCopies() if any(on_gpu(e.get()) for s in shards for e in s.entries) else None
        self._queue: queue.SimpleQueue[Capture | _Warm | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="snapshot", daemon=True)
        self._thread.start()

    # The training thread

    def begin(self, capture: Capture) -> None:
        """Copy the tensors that forward changes, and hand over the rest."""
        for shard, pieces in self._early:
            slot = capture.slots[shard.name]
            shard.files[slot].write_header(self._header(shard, slot, capture.identity))
            for piece in pieces:
                self._copy(shard, slot, piece)
        self.next_slots = {}
        self.copied.clear()
        self.committed.clear()
        if self.cuda is not None:
            self.cuda.mark()
        self._queue.put(capture)

    def warm(self) -> None:
        self._queue.put(_Warm())

    def end(self, timeout_s: float) -> None:
        """End the last capture and the thread. Close nothing that it uses before this returns.

        Raises:
            SnapshotError: it still copies after ``timeout_s``; call again.
        """
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise SnapshotError(
                f"expected the background of the snapshots to end within {timeout_s:.0f} s; it is still copying. Nothing "
                "was closed: call close() again, or end the process"
            )

    # The copying thread; the training thread too calls _header and _copy, for tensors that forward changes

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            captures = isinstance(work, Capture)
            try:
                if isinstance(work, Capture):
                    self._commit(work)
                else:
                    self._touch_slots()
            except BaseException as error:  # kept for the training thread, which raises it
                self.error = error
            work = None  # or its arrays would stay until the next one comes
            if captures:
                self.copied.set()
                self.committed.set()

    def _commit(self, capture: Capture) -> None:
        begin = time.perf_counter()
        if self.cuda is not None:
            self.cuda.begin()
        early = [s.name for s, _ in self._early]
        for shard in self._own:
            if shard.name not in early:
                slot = capture.slots[shard.name]
                shard.files[slot].write_header(self._header(shard, slot, capture.identity))
        present = {s.name: self._copy_all(s, capture.slots[s.name]) for s in self._own}
        # As the writer computes it from the slot. Before the fence opens: these tensors may change after it.
        compared = arena.checksum(live_pieces(self._foreign[0].entries)) if capture.compare and self._foreign else b""
        if self.cuda is None:
            check_unchanged(self.late, capture.versions, versions(self.late), capture.identity)
            self.copied.set()
        else:
            self.cuda.end()
            self.copied.set()
            self.cuda.wait()
            now = versions(self.late)  # read before asking whether the fence was passed: after it they may change
            fenced = now if capture.fenced is None else capture.fenced
            check_unchanged(self.late, capture.versions, fenced, capture.identity)
        copied = time.perf_counter()
        values, arrays = capture.values
        values["rng"], _ = tree.pack(generators.values(capture.generators), "rng", arrays)
        for shard in self._own:
            data_checksum = self._seal(shard, capture, present[shard.name])
            compared = data_checksum if shard.name == COMMON else compared
        self._here.committed(*capture.identity)
        if capture.hold:
            self._here.hold(*capture.identity)
        found = {s.name: next_slot(s, capture.identity, capture.held.get(s.name, ())) for s in self._own}
        self.next_slots = {name: one for name, one in found.items() if one is not None}
        if capture.compare:
            self.common = compared
        self._stats.copy_s += copied - begin
        self._stats.seal_s += time.perf_counter() - copied

    def _touch_slots(self) -> None:
        """Bring the slots' pages into this process, so that captures pay no page faults; stops when a capture comes."""
        for shard in self._own:
            for address in shard.addresses:
                if not self._queue.empty():
                    return
                if self.cuda is not None:
                    self.cuda.register(address, shard.layout.tail_offset)
                else:
                    _madvise(address, shard.layout.tail_offset, _MADV_POPULATE_WRITE)

    def _copy_all(self, shard: Shard, slot: int) -> tuple[int, ...]:
        """Copy the tensors that may wait; the indices of those that exist."""
        if self.cuda is not None:
            self.cuda.register(shard.addresses[slot], shard.layout.tail_offset)
        return tuple(i for i, piece in enumerate(shard.pieces) if piece.entry.at_once or self._copy(shard, slot, piece))

    def _copy(self, shard: Shard, slot: int, piece: Piece) -> bool:
        source = piece.entry.get()
        if source is None:
            return False
        if source.shape != piece.shape or source.dtype != piece.dtype:
            raise SnapshotError(
                f"tensor {piece.entry.spec.name} changed shape during training: expected {piece.dtype} "
                f"{list(piece.shape)}; got {source.dtype} {list(source.shape)}; keep its shape, or use snapshot=nfs"
            )
        if on_gpu(source):
            assert self.cuda is not None
            self.cuda.copy(shard.tensor(slot, piece), source)
        elif source.is_contiguous():
            move = _memmove_held if piece.nbytes < _HELD_BELOW else _memmove_free
            move(shard.addresses[slot] + piece.offset, source.data_ptr(), piece.nbytes)
        else:
            shard.tensor(slot, piece).copy_(source.detach())
        self._stats.bytes += piece.nbytes
        return True

    def _header(self, shard: Shard, slot: int, identity: Identity) -> Header:
        return Header(
            state=SlotState.WRITING,
            identity=identity,
            owner=self._here.rank,
            shard=shard.name,
            slot=slot,
            job=self._here.job,
            structure=shard.fingerprint,
        )

    def _seal(self, shard: Shard, capture: Capture, present: tuple[int, ...]) -> bytes:
        """Write tail and header COMMITTED, release the lock; the checksum of the tensors."""
        slot = capture.slots[shard.name]
        file, plan = shard.files[slot], shard.layout
        if present not in shard.layout_json:
            shard.layout_json[present] = format.layout_json(plan, present, shard.structure, shard.parameters)
        values, arrays = capture.values if shard.name != COMMON else (None, [])
        tail = format.encode_tail(shard.layout_json[present], values, arrays)
        file.write_tail(tail, plan.tail_offset)
        raw = memoryview(file.map(plan.tail_offset))
        pieces = [raw[plan.offsets[i] : plan.offsets[i] + plan.specs[i].nbytes] for i in present]
        header = replace(
            self._header(shard, slot, capture.identity),
            state=SlotState.COMMITTED,
            data_bytes=sum(p.nbytes for p in pieces),
            data_checksum=arena.checksum(pieces),
            tail_offset=plan.tail_offset,
            tail_bytes=len(tail),
            tail_checksum=arena.checksum([memoryview(tail)]),
            committed_ns=arena.now_ns(),
        )
        file.write_header(header)
        file.unlock()
        return header.data_checksum
