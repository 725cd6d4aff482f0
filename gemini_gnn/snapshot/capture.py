"""Copying the state of a rank into its arena slots while training goes on.

Account of the concurrency. Two threads: the training thread calls ``ready``, ``after_step`` and ``before_step``; one
background thread copies. Per capture:

1. training thread, just after an optimizer step: the slots were locked by ``ready``; headers WRITING; numbers and buffers are
   taken at once, because the next forward pass changes them; the job is handed over;
2. background: the large tensors, which nobody changes before the next optimizer step; then ``copied`` is set;
3. background, while training may already have gone past its fence: tail, checksums of what lies in the slot, header
   COMMITTED, lock released; ``committed`` is set.

The fence (``before_step``) waits for ``copied``: what it waits is the stall. Between 1 and 2 the training thread may only
run forward and backward; what changes a tensor there all the same is found by torch's version counters, before the fence
opens, and the snapshot is not committed. An exception in the background is kept and raised in the training thread at its
next call.

All ranks decide together whether step s is captured: ``ready`` is this rank's bit (previous capture committed, a slot
free), the minimum over all ranks is what ``after_step`` is told. So when it is told to capture, *every* rank has committed
the previous snapshot: that one is recoverable for the whole job, and what is older may be overwritten. Nothing else is
needed to keep one restorable snapshot at every instant, and no message can be lost.

A kill anywhere leaves slots WRITING (void) or COMMITTED; locks die with the process.

On CUDA the copies go to a side stream, straight into the slots' pages (registered with the driver at the first capture),
and the fence makes the compute stream wait for them. Written after the documentation of the calls; not run yet.
"""

from __future__ import annotations

import ctypes
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemini_gnn.errors import SnapshotError
from gemini_gnn.snapshot import arena, catalog, layout, tree
from gemini_gnn.snapshot.agree import Ranks
from gemini_gnn.snapshot.identity import Identity
from gemini_gnn.snapshot.layout import Header, Layout, SlotState
from gemini_gnn.snapshot.state import Entry, State

log = logging.getLogger(__name__)

REPLICATED = "replicated"
VERIFY_EVERY = 64  # captures between two checks that ranks which ought to hold the same state do
_HELD_BELOW = 128 << 10  # smaller copies keep the interpreter lock: getting it back can take a 5 ms switch interval

_MADV_POPULATE_WRITE = 23  # Linux 5.14; elsewhere it fails, and the first captures pay the page faults
_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes, _madvise.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
_memmove_free = ctypes.CDLL(None).memmove
_memmove_held = ctypes.PyDLL(None).memmove
for _f in (_memmove_free, _memmove_held):
    _f.argtypes, _f.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t], ctypes.c_void_p


def shard_of(rank: int) -> str:
    """The name of a rank's own shard."""
    return f"rank-{rank:05d}"


@dataclass
class Stats:
    """What snapshots cost since ``attach``.

    Attributes:
        captures, skipped: agreed captures, and steps at which some rank was not ready.
        stall_s: what the training thread lost: taking numbers and buffers, and waiting at the fence.
        fence_s: the latter alone.
        copy_s, seal_s: background time of copying, and of checksums and commit.
        bytes: copied by this rank.
    """

    captures: int = 0
    skipped: int = 0
    stall_s: float = 0.0
    fence_s: float = 0.0
    copy_s: float = 0.0
    seal_s: float = 0.0
    bytes: int = 0


@dataclass
class Shard:
    """A shard this rank writes, or (``owned`` false) reads: the replicated one of another rank of this machine.

    Attributes:
        name: of the shard; entries: its tensors, in the order of ``layout.specs``.
        topology: as ``layout.describe`` made it; fingerprint: of it.
        files: the slots; mapped up to the tail. Empty until opened.
    """

    name: str
    entries: list[Entry]
    layout: Layout
    topology: dict[str, Any]
    fingerprint: bytes
    owned: bool
    files: list[arena.SlotFile] = field(default_factory=list)
    memory: list[Any] = field(default_factory=list)  # keeps the mappings alive that addresses point into
    addresses: list[int] = field(default_factory=list)
    layout_json: dict[tuple[int, ...], bytes] = field(default_factory=dict)

    def open(self, folder: Path) -> None:
        """Reserve and map all slots (owner), or open what is there.

        Raises:
            SnapshotError: no room, or somebody else's files.
        """
        for slot in range(catalog.OWN_SLOTS):
            file = arena.SlotFile(folder, self.name, slot, create=self.owned)
            self.files.append(file)
            if self.owned:
                file.reserve(self.layout.file_bytes)
                view = (ctypes.c_char * self.layout.tail_offset).from_buffer(file.map(self.layout.tail_offset))
                self.memory.append(view)
                self.addresses.append(ctypes.addressof(view))

    def views(self) -> list[catalog.SlotView]:
        return [f.view() for f in self.files]

    def close(self) -> None:
        for file in self.files:
            file.close()
        self.files, self.memory, self.addresses = [], [], []


def topology_of(state: State, world_size: int, plan: Layout, extra_state: bool) -> dict[str, Any]:
    return layout.describe(
        state.kind,
        world_size,
        state.optimizer,
        plan,
        scheduler=state.scheduler,
        param_groups=state.param_groups,
        extra_state=extra_state,
    )


def make_shard(
    name: str, entries: list[Entry], state: State, world_size: int, owned: bool, extra_state: bool = False
) -> Shard:
    plan = layout.plan(e.spec for e in entries)
    topology = topology_of(state, world_size, plan, extra_state)
    return Shard(name, entries, plan, topology, layout.fingerprint(topology), owned)


def live_pieces(entries: list[Entry]) -> list[memoryview]:
    """The bytes of the live tensors, in order and without gaps: comparable with a slot's ``data_checksum``."""
    return [
        memoryview(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        for t in (e.get() for e in entries)
        if t is not None
    ]


Versions = dict[str, tuple[int, int]]


def versions(shards: list[Shard]) -> Versions:
    """How often autograd saw each background-copied tensor change in place, and where it lies. What is changed in place
    through ``.data`` is not counted by torch.
    """
    return {
        e.spec.name: (0 if t.is_inference() else t._version, t.data_ptr())
        for s in shards
        for e in s.entries
        if not e.at_once and (t := e.get()) is not None
    }


def check_unchanged(before: Versions, after: Versions, identity: Identity) -> None:
    """
    Raises:
        SnapshotError: a tensor was changed while it was copied.
    """
    for name in before.keys() | after.keys():
        if before.get(name) != after.get(name):
            raise SnapshotError(
                f"{name} was changed while it was copied into snapshot {identity}, which is void therefore; call "
                "snapshots.before_step() before changing parameters between steps"
            )


@dataclass
class _Job:
    identity: Identity
    slots: dict[str, int]
    numbers: tuple[Any, list[np.ndarray]]
    check: bool
    versions: Versions  # when the capture began
    fenced: Versions | None = None  # when the fence let go, on CUDA, where the copies may still be under way then


class _Warm:
    """Asks the background to touch the slots: after a restore, which should not wait for it."""


class Snapshots:
    """The snapshots of one rank; made by :func:`gemini_gnn.snapshot.attach`.

    Attributes:
        restored: identity of the snapshot that training goes on from, or None at a fresh start.
        steps: optimizer steps completed, in loops that do not count them themselves.
        recoverable: newest snapshot known to be committed by all ranks.
        stats: what it cost so far.
    """

    def __init__(
        self,
        state: State,
        shards: list[Shard],
        extra_state: Any,
        ranks: Ranks,
        *,
        job: str,
        rank: int,
        term: int,
        generation: int,
        every: int,
        timeout_s: float,
    ):
        self._state, self._shards, self._extra, self._ranks = state, shards, extra_state, ranks
        self._own = [s for s in shards if s.owned]
        self._foreign = [s for s in shards if not s.owned]
        self._job, self._rank, self._term, self._generation = job, rank, term, generation
        self._every, self._timeout_s = every, timeout_s
        self.restored: Identity | None = None
        self.steps = 0
        self.recoverable: Identity | None = None
        self.stats = Stats()
        self._last: Identity | None = None  # newest capture of this rank
        self._running: _Job | None = None  # the last capture, as long as its fence was not passed
        self._reserved: dict[str, int] = {}
        self._expected: tuple[Identity, bytes] | None = None  # replicated state as this rank sees it, to be compared
        self._error: BaseException | None = None
        self._queue: queue.SimpleQueue[_Job | _Warm | None] = queue.SimpleQueue()
        self._copied, self._committed = threading.Event(), threading.Event()
        self._copied.set()
        self._committed.set()
        self._closing: list[Callable[[], Any]] = []
        self._cuda = _Cuda() if any(_on_cuda(e) for s in self._own for e in s.entries) else None
        self._thread = threading.Thread(target=self._background, name="snapshot", daemon=True)
        self._thread.start()

    # The training thread

    def wants(self, step: int) -> bool:
        """Whether step ``step`` (steps completed) is one to capture. The same on all ranks."""
        return step % self._every == 0

    def ready(self) -> bool:
        """This rank's bit of capture-or-skip: the previous capture is committed and a slot is free. Never blocks.

        Raises:
            SnapshotError: the background failed, or ranks that ought to hold the same state differ.
        """
        begin = time.perf_counter()
        try:
            self._raise()
            return self._committed.is_set() and self._reserve()
        finally:
            self.stats.stall_s += time.perf_counter() - begin

    def before_step(self) -> None:
        """The fence: call it before the optimizer changes anything. Waits until the last capture has been copied.

        Raises:
            SnapshotError: the background failed, or did not finish within the timeout.
        """
        if self._copied.is_set() and self._error is None and self._cuda is None:
            return
        begin = time.perf_counter()
        self._wait(self._copied, "copied")
        if self._cuda is not None:
            if self._running is not None:
                self._running.fenced, self._running = versions(self._own), None
            self._cuda.fence()
        elapsed = time.perf_counter() - begin
        self.stats.stall_s += elapsed
        self.stats.fence_s += elapsed
        self._raise()

    def after_step(self, step: int, capture: bool) -> None:
        """Call it when the optimizer has finished step number ``step`` (steps completed).

        Args:
            capture: the minimum of ``ready()`` over all ranks, asked after the backward pass: a capture that had forward
                and backward to hide behind is committed by then. Steps that are not wanted are passed over.

        Raises:
            SnapshotError: the background failed; the state changed shape; a value in the state cannot be kept.
        """
        begin = time.perf_counter()
        self._raise()
        if not self.wants(step):
            return
        if not capture:
            self.stats.skipped += 1
            return
        if not self._committed.is_set() or not self._reserve():
            raise SnapshotError("after_step(capture=True) without this rank being ready(): pass the agreed minimum")
        self.recoverable = self._last  # all ranks were ready, so all have committed the previous one
        self._begin(Identity(self._term, self._generation, step))
        self.stats.stall_s += time.perf_counter() - begin

    def wait(self) -> None:
        """Block until the last capture is committed.

        Raises:
            SnapshotError: as for :meth:`before_step`.
        """
        self._wait(self._committed, "committed")
        self._raise()

    def final(self, step: int) -> None:
        """At an orderly stop that all ranks agreed on: have step ``step`` (steps completed) committed on every rank.

        Captures it if the newest snapshot is of another step, whatever ``every`` says. Collective; call it before ``close``.

        Raises:
            SnapshotError: as for :meth:`before_step`, on all ranks together; or no slot came free within the timeout. The
                snapshot before is then still the one to go on from.
        """
        self._ranks.together(self.wait)
        self.recoverable = self._last  # all have committed it
        if self._ranks.all_true(self._last is not None and self._last.step == step):
            return
        self._ranks.together(lambda: self._begin_final(step))
        self._ranks.together(self.wait)
        self.recoverable = self._last

    def _begin_final(self, step: int) -> None:
        deadline = time.monotonic() + self._timeout_s
        while not self._reserve():
            if time.monotonic() > deadline:
                raise SnapshotError(
                    f"expected a free slot for the last snapshot (step {step}) within {self._timeout_s:.0f} s; others kept "
                    f"reading the slots of rank {self._rank}. Training can go on from {self._last}"
                )
            time.sleep(0.05)  # a reader lets go of its lock without telling anyone
        self._begin(Identity(self._term, self._generation, step))

    @property
    def last(self) -> Identity | None:
        """Newest snapshot this rank has committed, or None."""
        return self._last if self._committed.is_set() else None

    def went_on_from(self, identity: Identity) -> None:
        """Called by ``attach`` when all ranks have restored ``identity``."""
        self.restored = self.recoverable = self._last = identity
        self.steps = identity.step

    def warm(self) -> None:
        """Called by ``attach`` at its end."""
        self._queue.put(_Warm())

    def on_close(self, call: Callable[[], Any]) -> None:
        self._closing.append(call)

    def close(self) -> None:
        """Finish the last capture, stop the background and let go of the arena. The snapshots stay."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join(self._timeout_s)
        for call in self._closing:
            call()
        self._closing = []
        for shard in self._shards:
            shard.close()
        self._raise()

    def _wait(self, event: threading.Event, what: str) -> None:
        if not event.wait(self._timeout_s):
            raise SnapshotError(
                f"expected snapshot {self._last} to be {what} within {self._timeout_s:.0f} s; it was not"
            )

    def _raise(self) -> None:
        if self._error is not None:
            error = self._error
            if isinstance(error, SnapshotError):
                raise error
            raise SnapshotError(f"the background copy of a snapshot failed: {error}") from error

    def _reserve(self) -> bool:
        """Lock a free slot of every shard of ours; what is locked stays so until it is used."""
        self._compare_replicated()
        # If the capture this slot is for is agreed upon, every rank has committed _last: that one is kept.
        for shard in self._own:
            if shard.name in self._reserved:
                continue
            views = shard.views()
            while True:
                slot = catalog.writable(views, self._last)
                if slot is None:
                    return False
                if shard.files[slot].lock(exclusive=True):
                    self._reserved[shard.name] = slot
                    break
                views[slot] = replace(views[slot], pinned=True)
        return True

    def _begin(self, identity: Identity) -> None:
        numbers = self._state.numbers()
        if self._extra is not None:
            numbers["extra_state"] = self._extra.state_dict()
        check = bool(self._foreign) and self.stats.captures % VERIFY_EVERY == 0
        job = _Job(identity, self._reserved, tree.pack(numbers), check, versions(self._own))
        self._reserved = {}
        for shard in self._own:
            slot = job.slots[shard.name]
            shard.files[slot].write_header(self._header(shard, slot, identity))
            for entry, offset in zip(shard.entries, shard.layout.offsets, strict=True):
                if entry.at_once:
                    self._copy(shard, slot, entry, offset)
        self._last = identity
        self.stats.captures += 1
        self._copied.clear()
        self._committed.clear()
        if self._cuda is not None:
            self._cuda.mark()
        self._running = job
        self._queue.put(job)

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

    def _compare_replicated(self) -> None:
        """Compare what this rank computed of the replicated state with what its writer committed."""
        if self._expected is None:
            return
        identity, ours = self._expected
        for shard in self._foreign:
            for file in shard.files:
                h = file.header()
                if h is None or h.state is not SlotState.COMMITTED or h.identity < identity:
                    continue
                self._expected = None  # its writer has spoken, or gone beyond it; until then it may still be sealing
                if h.identity == identity and h.data_checksum != ours:
                    raise SnapshotError(
                        f"expected rank {self._rank} and rank {h.owner} to hold the same parameters and moments after "
                        f"step {identity.step}, as data-parallel ranks do; they differ. A rank has skipped an update "
                        "or computes nondeterministically: fix that, or the job cannot be restored"
                    )

    # The background thread

    def _background(self) -> None:
        if self._cuda is not None:
            torch.cuda.set_device(self._cuda.device)  # a new thread starts on device 0
        while (job := self._queue.get()) is not None:
            if isinstance(job, _Warm):
                self._touch_slots()
                continue
            try:
                begin = time.perf_counter()
                present = {s.name: self._copy_all(s, job.slots[s.name]) for s in self._own}
                expected = None
                if job.check:
                    expected = job.identity, arena.checksum(live_pieces(self._foreign[0].entries))
                if self._cuda is None:
                    check_unchanged(job.versions, versions(self._own), job.identity)
                    self._copied.set()
                else:
                    self._cuda.enqueued()
                    self._copied.set()
                    self._cuda.wait()
                    now = versions(
                        self._own
                    )  # read before asking whether the fence was passed: after it they may change
                    check_unchanged(job.versions, now if job.fenced is None else job.fenced, job.identity)
                copied = time.perf_counter()
                for shard in self._own:
                    self._seal(shard, job, present[shard.name])
                self._expected = expected
                self.stats.copy_s += copied - begin
                self.stats.seal_s += time.perf_counter() - copied
            except BaseException as error:  # kept for the training thread, which raises it
                self._error = error
            self._copied.set()
            self._committed.set()

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
            assert self._cuda is not None
            self._cuda.copy(shard, slot, source, offset, at_once=entry.at_once)
        elif source.is_contiguous():
            (_memmove_held if nbytes < _HELD_BELOW else _memmove_free)(target, source.data_ptr(), nbytes)
        else:
            _tensor_at(shard, slot, entry, offset).copy_(source)
        self.stats.bytes += nbytes
        return True

    def _seal(self, shard: Shard, job: _Job, present: tuple[int, ...]) -> None:
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


def _tensor_at(shard: Shard, slot: int, entry: Entry, offset: int) -> torch.Tensor:
    """A tensor over the slot's bytes."""
    spec = entry.spec
    if spec.nbytes == 0:
        return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
    raw = memoryview(shard.files[slot].map(shard.layout.tail_offset))[offset : offset + spec.nbytes]
    return torch.frombuffer(raw, dtype=getattr(torch, spec.dtype)).reshape(spec.shape)


def _on_cuda(entry: Entry) -> bool:
    tensor = entry.get()
    return tensor is not None and tensor.is_cuda


class _Cuda:
    """Copies from the GPU on a stream of their own. Unproven: no GPU was at hand when it was written.

    ``mark`` and ``fence`` are called by the training thread, the rest by the background thread (``copy`` of at-once tensors
    by the training thread, in its stream: so they come before the next forward pass).
    """

    def __init__(self) -> None:
        self.device = torch.cuda.current_device()
        self._stream = torch.cuda.Stream()
        self._stepped = torch.cuda.Event()
        self._done = torch.cuda.Event()
        self._registered: set[int] = set()

    def mark(self) -> None:
        self._stepped.record(torch.cuda.current_stream())

    def copy(self, shard: Shard, slot: int, source: torch.Tensor, offset: int, at_once: bool) -> None:
        address = shard.addresses[slot]
        if address not in self._registered:
            # After the first step, not at attach: it takes time, and a restart should not wait for it.
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(address, shard.layout.tail_offset, 0)))
            self._registered.add(address)
        entry = next(e for e, o in zip(shard.entries, shard.layout.offsets, strict=True) if o == offset)
        target = _tensor_at(shard, slot, entry, offset)
        if at_once:
            target.copy_(source, non_blocking=True)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._stepped)
            target.copy_(source, non_blocking=True)

    def enqueued(self) -> None:
        self._stream.wait_event(self._stepped)  # also covers the at-once copies, which were recorded before it
        self._done.record(self._stream)

    def fence(self) -> None:
        torch.cuda.current_stream().wait_event(self._done)

    def wait(self) -> None:
        self._done.synchronize()
