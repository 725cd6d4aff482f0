"""Taking the snapshots of a rank while training continues.

Account of the concurrency. Two threads: the training thread calls ``ready``, ``after_step`` and ``before_step``; the
copying thread (copier.py) does the work that these calls need not wait for. Per capture:

1. Training thread, just after an optimizer step. ``ready`` has locked the slots. The thread writes the header WRITING of
   the shards that have buffers, takes values and buffers, because the next forward pass changes them, and hands over.
2. Copying thread. It writes all other headers WRITING, copies the large tensors, which stay as they are until the next
   optimizer step, and sets ``copied``.
3. Copying thread; training may already be past its fence. It writes tail, checksums and header COMMITTED, releases the
   locks and sets ``committed``.

The fence (``before_step``) waits for ``copied``; this wait is the stall. Between 1 and 2 the training thread may only run
forward and backward. If it changes a tensor there, torch's version counters show it (unchanged.py) before the fence opens,
and the snapshot is not committed. An exception of the copying thread is kept, and raised by the training thread's next call.

All ranks decide together whether step s is captured: ``ready`` is this rank's bit (previous capture committed, a slot
free), and ``after_step`` gets the minimum over all ranks. So when it captures, *every* rank has committed the previous
snapshot: the whole job can restore that one, and older ones may be overwritten. Nothing else is needed to keep one
restorable snapshot at every instant, and no message can be lost.

A kill anywhere leaves slots WRITING (void) or COMMITTED; locks die with the process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from gemini_gnn.errors import SnapshotError
from gemini_gnn.snapshot.agree import Ranks
from gemini_gnn.snapshot.capture import divergence
from gemini_gnn.snapshot.capture.copier import Capture, Copier
from gemini_gnn.snapshot.capture.shards import COMMON, Shard
from gemini_gnn.snapshot.capture.stats import Stats
from gemini_gnn.snapshot.capture.unchanged import versions
from gemini_gnn.snapshot.context import Context
from gemini_gnn.snapshot.state import generators, tree
from gemini_gnn.snapshot.state.collect import TrainingState
from gemini_gnn.snapshot.store import catalog
from gemini_gnn.snapshot.store.identity import Identity


class Snapshots:
    """The snapshots of one rank; made by :func:`gemini_gnn.snapshot.attach`.

    Attributes:
        restored: identity of the snapshot that training resumed from, or None at a fresh start.
        steps: optimizer steps completed, across restarts; with ``hook=False`` only those before this start.
        recoverable: newest snapshot known to be committed by all ranks.
        stats: the cost so far.
    """

    def __init__(
        self, here: Context, ranks: Ranks, state: TrainingState, shards: list[Shard], *, every: int, timeout_s: float
    ):
        self._here, self._ranks, self._state, self._shards = here, ranks, state, shards
        self._own = [s for s in shards if s.owned]
        self._every, self._timeout_s = every, timeout_s
        self.restored: Identity | None = None
        self.steps = 0
        self.recoverable: Identity | None = None
        self.stats = Stats()
        self._last: Identity | None = None  # newest capture of this rank
        self._running: Capture | None = None  # on CUDA: the last capture, until training passes its fence
        self._reserved: dict[str, int] = {}
        self._closing: list[Callable[[], Any]] = []
        self._common = ranks.world_size > 1 and any(s.name == COMMON for s in shards)
        self._compare = False  # the last capture is one to compare over all ranks
        self._copier = Copier(here, shards, self.stats)

    def wants(self, step: int) -> bool:
        """Whether step ``step`` (steps completed) is one to capture. The same on all ranks."""
        return step % self._every == 0

    def ready(self) -> bool:
        """This rank's bit of capture-or-skip: the previous capture is committed and a slot is free. Never blocks.

        Raises:
            SnapshotError: the background failed.
        """
        begin = time.perf_counter()
        try:
            self._raise()
            return self._copier.committed.is_set() and self._reserve()
        finally:
            self.stats.stall_s += time.perf_counter() - begin

    def before_step(self) -> None:
        """The fence: call it before the optimizer changes anything. Waits until the last capture has been copied.

        Raises:
            SnapshotError: the background failed, or did not end within the timeout.
        """
        if self._copier.copied.is_set() and self._copier.error is None and self._copier.cuda is None:
            return
        begin = time.perf_counter()
        self._wait(self._copier.copied, "copied")
        if self._copier.cuda is not None:
            if self._running is not None:
                self._running.fenced, self._running = versions(self._copier.late), None
            self._copier.cuda.fence()
        elapsed = time.perf_counter() - begin
        self.stats.stall_s += elapsed
        self.stats.fence_s += elapsed
        self._raise()

    def after_step(self, step: int, capture: bool) -> None:
        """Call it when the optimizer has finished step number ``step`` (steps completed).

        Args:
            capture: the minimum of ``ready()`` over all ranks, asked after the backward pass, when the previous capture
                is mostly committed. A step that is not one of ``every`` is passed over.

        Raises:
            SnapshotError: the background failed; the state changed shape; a value in the state cannot be kept; the ranks'
                common state differs (on all of them).
        """
        begin = time.perf_counter()
        self._here.stepped(step)
        self._raise()
        if not self.wants(step):
            return
        if not capture:
            self.stats.skipped += 1
            return
        if not self._copier.committed.is_set() or not self._reserve():
            raise SnapshotError("after_step(capture=True) without this rank being ready(): pass the agreed minimum")
        self._compare_common()
        self.recoverable = self._last  # all ranks were ready, so all have committed the previous one
        self._begin(step)
        self.stats.stall_s += time.perf_counter() - begin

    def wait(self) -> None:
        """Block until the last capture is committed.

        Raises:
            SnapshotError: as for :meth:`before_step`.
        """
        self._wait(self._copier.committed, "committed")
        self._raise()

    def final(self, step: int) -> None:
        """At an orderly stop that all ranks agreed on: commit step ``step`` (steps completed) on every rank.

        Captures it if the newest snapshot is of another step, whatever ``every`` says. Collective; call it before ``close``.

        Raises:
            SnapshotError: as for :meth:`before_step`, on all ranks together; or no slot came free within the timeout.
                Then the job still resumes from the snapshot before.
        """
        self._ranks.together(self.wait)
        self._compare_common()
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
                    f"expected a free slot for the last snapshot (step {step}) within {self._timeout_s:.0f} s; other "
                    f"processes kept reading the slots of rank {self._here.rank}. The same command resumes from {self._last}"
                )
            time.sleep(0.05)  # a reader releases its lock without notice
        self._begin(step)

    @property
    def last(self) -> Identity | None:
        """Newest snapshot this rank has committed; None while a capture is under way, and after one has failed."""
        # The copying thread keeps an error before it sets ``committed``: if this thread sees that, it sees the error too.
        return self._last if self._copier.committed.is_set() and self._copier.error is None else None

    def resumed_from(self, identity: Identity) -> None:
        """``attach`` calls this when all ranks have restored ``identity``."""
        self.restored = self.recoverable = self._last = identity
        self.steps = identity.step
        self._here.committed(*identity)

    def first(self) -> None:
        """``attach`` calls this at a fresh start: from here on there is always a snapshot to restore. Collective.

        Raises:
            SnapshotError: as for :meth:`after_step`; or a rank has no free slot.
        """
        if not self._ranks.all_true(self.ready()):
            raise SnapshotError(
                "expected a free slot for the first snapshot; another process reads the slots of this job "
                f"({self._here.arena}): end it and start again"
            )
        self.after_step(0, capture=True)
        self._ranks.together(self.wait)
        self.recoverable = self.last

    def warm(self) -> None:
        """``attach`` calls this at its end."""
        self._copier.warm()

    def on_close(self, call: Callable[[], Any]) -> None:
        self._closing.append(call)

    def close(self) -> None:
        """End the last capture and the background, and close the arena's files. The snapshots stay.

        Raises:
            SnapshotError: the background failed; or it did not end within the timeout. In that case all files stay open,
                as it writes there, and ``close`` may be called again.
        """
        self._copier.end(self._timeout_s)
        # If a step raises, the others run all the same. The background's error is raised last, so the caller sees it.
        with ExitStack() as last_first:
            last_first.callback(self._raise)
            for shard in self._shards:
                last_first.callback(shard.close)
            for call in reversed(self._closing):
                last_first.callback(call)
            self._closing = []
            if self._copier.cuda is not None:
                last_first.callback(self._copier.cuda.close)

    def _wait(self, event: threading.Event, what: str) -> None:
        if not event.wait(self._timeout_s):
            raise SnapshotError(
                f"expected snapshot {self._last} to be {what} within {self._timeout_s:.0f} s; it was not. Start the job "
                "again with a higher distributed.timeout_s (attach: timeout_s)"
            )

    def _raise(self) -> None:
        if self._copier.error is not None:
            error = self._copier.error
            if isinstance(error, SnapshotError):
                raise error
            raise SnapshotError(f"the background copy of a snapshot failed: {error}") from error

    def _reserve(self) -> bool:
        """Lock a free slot of every shard of ours; a locked slot stays so until it is used."""
        # The ranks agree on this slot's capture only when every rank has committed _last: that one is kept.
        for shard in self._own:
            if shard.name in self._reserved:
                continue
            slot = self._copier.next_slots.get(shard.name)
            if slot is not None and shard.files[slot].lock(exclusive=True):
                self._reserved[shard.name] = slot
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

    def _begin(self, step: int) -> None:
        identity = Identity(self._here.term, self._here.generation, step)
        packed = tree.pack(self._state.values())
        self._compare = self._common and self.stats.captures % divergence.VERIFY_EVERY == 0
        late = versions(self._copier.late)
        capture = Capture(identity, self._reserved, packed, generators.read(), self._compare, late)
        self._reserved = {}
        self._copier.begin(capture)
        self._last = identity
        if self._copier.cuda is not None:
            self._running = capture
        self.stats.captures += 1

    def _compare_common(self) -> None:
        """Collective if the last capture is one to compare; all ranks have committed it when they call this."""
        if self._compare and self._last is not None:
            self._compare = False
            divergence.check(self._ranks.exchange(self._copier.common.hex()), self._last.step)
