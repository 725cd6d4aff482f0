"""The thread that copies a rank's tensors into its slots, and commits them.

Account of the concurrency. The training thread hands over one ``Job`` at a time with ``begin`` and never touches it again, but
for ``fenced``; the next job comes only after ``committed`` is set. In between:

- until ``copied`` is set the copying thread reads the live tensors: the training thread may run forward and backward only;
- from then on it reads only the slot and the job: tail, checksums of what lies in the slot, header COMMITTED, lock released;
- ``committed`` is set last, whatever happened; an exception is kept in ``error`` *before* it, for the training thread.

So each of the slots' bytes has one writer at any instant: the training thread before ``begin`` returns (headers, tensors
that forward changes), the copying thread afterwards. ``stats.copy_s`` and ``seal_s`` are written here only.

A kill anywhere leaves slots WRITING (void) or COMMITTED; locks die with the process.
"""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from gemini_gnn.errors import SnapshotError
from gemini_gnn.snapshot import arena, layout, replicated
from gemini_gnn.snapshot.cuda import CudaCopies, on_cuda
from gemini_gnn.snapshot.identity import Identity
from gemini_gnn.snapshot.layout import Header, SlotState
from gemini_gnn.snapshot.shards import REPLICATED, Shard
from gemini_gnn.snapshot.state import Entry
from gemini_gnn.snapshot.stats import Stats
from gemini_gnn.snapshot.unchanged import Versions, check_unchanged, versions

_HELD_BELOW = 128 << 10  # smaller copies keep the interpreter lock: getting it back can take a 5 ms switch interval

_MADV_POPULATE_WRITE = 23  # Linux 5.14; elsewhere it fails, and the first captures pay the page faults
_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes, _madvise.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
_memmove_free = ctypes.CDLL(None).memmove
_memmove_held = ctypes.PyDLL(None).memmove
for _f in (_memmove_free, _memmove_held):
    _f.argtypes, _f.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t], ctypes.c_void_p


@dataclass
class Job:
    """One capture.

    Attributes:
        slots: the locked slot of every shard of ours.
        numbers: of the rank's own shard, packed.
        verify: compute the checksum of the replicated state, for ``replicated.compare``.
        versions: of the tensors when the capture began.
        fenced: when the fence let go, on CUDA, where the copies may still be under way then.
    """

    identity: Identity
    slots: dict[str, int]
    numbers: tuple[Any, list[np.ndarray]]
    verify: bool
    versions: Versions
    fenced: Versions | None = None


class _Warm:
    """Asks for the slots to be touched: after a restore, which should not wait for it."""


class Copier:
    """See the module's account.

    Attributes:
        copied, committed: set when the job handed over last is; and before the first one.
        error: what went wrong; no job after it is believed.
        expected: what the writer of the replicated state must have committed, as far as this rank is concerned.
    """

    def __init__(self, own: list[Shard], foreign: list[Shard], job: str, rank: int, stats: Stats):
        self._own, self._foreign, self._job, self._rank, self._stats = own, foreign, job, rank, stats
        self.copied, self.committed = threading.Event(), threading.Event()
        self.copied.set()
        self.committed.set()
        self.error: BaseException | None = None
        self.expected: replicated.Expected | None = None
        self.cuda = CudaCopies() if any(on_cuda(e) for s in own for e in s.entries) else None
        self._queue: queue.SimpleQueue[Job | _Warm | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="snapshot", daemon=True)
        self._thread.start()

    # The training thread

    def begin(self, job: Job) -> None:
        """Write the headers, copy what forward changes, and hand over the rest."""
        for shard in self._own:
            slot = job.slots[shard.name]
            shard.files[slot].write_header(self._header(shard, slot, job.identity))
            for entry, offset in zip(shard.entries, shard.layout.offsets, strict=True):
                if entry.at_once:
                    self._copy(shard, slot, entry, offset)
        self.copied.clear()
        self.committed.clear()
        if self.cuda is not None:
            self.cuda.mark()
        self._queue.put(job)

    def warm(self) -> None:
        self._queue.put(_Warm())

    def stop(self, timeout_s: float) -> None:
        """Finish the last job and end the thread."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join(timeout_s)

    # The copying thread, but for _header and _copy of tensors that forward changes

    def _run(self) -> None:
        if self.cuda is not None:
            torch.cuda.set_device(self.cuda.device)  # a new thread starts on device 0
        while (job := self._queue.get()) is not None:
            if isinstance(job, _Warm):
                self._touch_slots()
                continue
            try:
                self._do(job)
            except BaseException as error:  # kept for the training thread, which raises it
                self.error = error
            self.copied.set()
            self.committed.set()

    def _do(self, job: Job) -> None:
        begin = time.perf_counter()
        present = {s.name: self._copy_all(s, job.slots[s.name]) for s in self._own}
        expected = replicated.expect(self._foreign[0], job.identity) if job.verify else None
        if self.cuda is None:
            check_unchanged(job.versions, versions(self._own), job.identity)
            self.copied.set()
        else:
            self.cuda.enqueued()
            self.copied.set()
            self.cuda.wait()
            now = versions(self._own)  # read before asking whether the fence was passed: after it they may change
            check_unchanged(job.versions, now if job.fenced is None else job.fenced, job.identity)
        copied = time.perf_counter()
        for shard in self._own:
            self._seal(shard, job, present[shard.name])
        self.expected = expected
        self._stats.copy_s += copied - begin
        self._stats.seal_s += time.perf_counter() - copied

    def _touch_slots(self) -> None:
        """Bring the slots' pages into this process, so that captures pay no page faults; stops when a capture comes."""
        for shard in self._own:
            for address in shard.addresses:
                if self._queue.empty():
                    _madvise(address, shard.layout.tail_offset, _MADV_POPULATE_WRITE)

    def _copy_all(self, shard: Shard, slot: int) -> tuple[int, ...]:
        """Copy what may wait; the indices of the tensors that exist."""
        present = []
        for i, (entry, offset) in enumerate(zip(shard.entries, shard.layout.offsets, strict=True)):
            if entry.at_once or self._copy(shard, slot, entry, offset):
                present.append(i)
        return tuple(present)

    def _copy(self, shard: Shard, slot: int, entry: Entry, offset: int) -> bool:
        source = entry.get()
        if source is None:
            return False
        spec = entry.spec
        if tuple(source.shape) != spec.shape or str(source.dtype) != f"torch.{spec.dtype}":
            raise SnapshotError(
                f"tensor {spec.name} changed shape during training: expected {spec.dtype} {list(spec.shape)}; got "
                f"{source.dtype} {list(source.shape)}; start again with resume=never, or use snapshot=nfs"
            )
        nbytes, target = spec.nbytes, shard.addresses[slot] + offset
        if source.is_cuda:
            assert self.cuda is not None
            self.cuda.copy(shard, slot, source, entry, offset)
        elif source.is_contiguous():
            (_memmove_held if nbytes < _HELD_BELOW else _memmove_free)(target, source.data_ptr(), nbytes)
        else:
            shard.tensor(slot, spec, offset).copy_(source)
        self._stats.bytes += nbytes
        return True

    def _header(self, shard: Shard, slot: int, identity: Identity) -> Header:
        return Header(
            state=SlotState.WRITING,
            identity=identity,
            owner=self._rank,
            shard=shard.name,
            slot=slot,
            job=self._job,
            topology=shard.fingerprint,
        )

    def _seal(self, shard: Shard, job: Job, present: tuple[int, ...]) -> None:
        slot = job.slots[shard.name]
        file, plan = shard.files[slot], shard.layout
        if present not in shard.layout_json:
            shard.layout_json[present] = layout.layout_json(plan, present, shard.topology)
        numbers, arrays = job.numbers if shard.name != REPLICATED else (None, [])
        tail = layout.encode_tail(shard.layout_json[present], numbers, arrays)
        file.write_tail(tail, plan.tail_offset)
        raw = memoryview(file.map(plan.tail_offset))
        pieces = [raw[plan.offsets[i] : plan.offsets[i] + plan.specs[i].nbytes] for i in present]
        header = replace(
            self._header(shard, slot, job.identity),
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
