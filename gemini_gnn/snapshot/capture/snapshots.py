"""Taking the snapshots of a rank while training goes on.

Account of the concurrency. Two threads: the training thread calls ``ready``, ``after_step`` and ``before_step``; the copying
thread (copier.py) does what need not be done before they return. Per capture:

1. training thread, just after an optimizer step: the slots were locked by ``ready``; numbers and buffers are taken at once,
   because the next forward pass changes them, after the header WRITING of the shards that have buffers; the job is handed over;
2. copying thread: all other headers WRITING; the large tensors, which nobody changes before the next optimizer step; then
   ``copied`` is set;
3. copying thread, while training may already have gone past its fence: tail, checksums, header COMMITTED, lock released;
   ``committed`` is set.

The fence (``before_step``) waits for ``copied``: what it waits is the stall. Between 1 and 2 the training thread may only
run forward and backward; what changes a tensor there all the same is found by torch's version counters (unchanged.py),
before the fence opens, and the snapshot is not committed. An exception of the copying thread is kept and raised in the
training thread at its next call.

All ranks decide together whether step s is captured: ``ready`` is this rank's bit (previous capture committed, a slot
free), the minimum over all ranks is what ``after_step`` is told. So when it is told to capture, *every* rank has committed
the previous snapshot: that one is recoverable for the whole job, and what is older may be overwritten. Nothing else is
needed to keep one restorable snapshot at every instant, and no message can be lost.

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
from gemini_gnn.snapshot.capture.copier import Copier, Job
from gemini_gnn.snapshot.capture.shards import REPLICATED, Shard
from gemini_gnn.snapshot.capture.stats import Stats
from gemini_gnn.snapshot.capture.unchanged import versions
from gemini_gnn.snapshot.state import generators, tree
from gemini_gnn.snapshot.state.collect import State
from gemini_gnn.snapshot.store import catalog
from gemini_gnn.snapshot.store.identity import Identity


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
        stepped: Callable[[int], None],
    ):
        self._state, self._shards, self._extra, self._ranks = state, shards, extra_state, ranks
        self._own = [s for s in shards if s.owned]
        self._rank, self._term, self._generation = rank, term, generation
        self._every, self._timeout_s = every, timeout_s
        self._stepped = stepped
        self.restored: Identity | None = None
        self.steps = 0
        self.recoverable: Identity | None = None
        self.stats = Stats()
        self._last: Identity | None = None  # newest capture of this rank
        self._running: Job | None = None  # on CUDA: the last capture, until its fence is passed
        self._reserved: dict[str, int] = {}
        self._closing: list[Callable[[], Any]] = []
        self._replicated = ranks.world_size > 1 and any(s.name == REPLICATED for s in shards)
        self._compare = False  # the last capture is one to compare over all ranks
        self._copier = Copier(self._own, [s for s in shards if not s.owned], job, rank, self.stats)

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
            SnapshotError: the background failed, or did not finish within the timeout.
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
            capture: the minimum of ``ready()`` over all ranks, asked after the backward pass: a capture that had forward
                and backward to hide behind is committed by then. Steps that are not wanted are passed over.

        Raises:
            SnapshotError: the background failed; the state changed shape; a value in the state cannot be kept; ranks that ought
                to hold the same state differ (on all of them).
        """
        begin = time.perf_counter()
        self._stepped(step)
        self._raise()
        if not self.wants(step):
            return
        if not capture:
            self.stats.skipped += 1
            return
        if not self._copier.committed.is_set() or not self._reserve():
            raise SnapshotError("after_step(capture=True) without this rank being ready(): pass the agreed minimum")
        self._compare_replicated()
        self.recoverable = self._last  # all ranks were ready, so all have committed the previous one
        self._begin(Identity(self._term, self._generation, step))
        self.stats.stall_s += time.perf_counter() - begin

    def wait(self) -> None:
        """Block until the last capture is committed.

        Raises:
            SnapshotError: as for :meth:`before_step`.
        """
        self._wait(self._copier.committed, "committed")
        self._raise()

    def final(self, step: int) -> None:
        """At an orderly stop that all ranks agreed on: have step ``step`` (steps completed) committed on every rank.

        Captures it if the newest snapshot is of another step, whatever ``every`` says. Collective; call it before ``close``.

        Raises:
            SnapshotError: as for :meth:`before_step`, on all ranks together; or no slot came free within the timeout. The
                snapshot before is then still the one to go on from.
        """
        self._ranks.together(self.wait)
        self._compare_replicated()
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
        """Newest snapshot this rank has committed; None while a capture is under way, and after one has failed."""
        # An error is kept before ``committed`` is set, so it is seen here by whoever sees that.
        return self._last if self._copier.committed.is_set() and self._copier.error is None else None

    def went_on_from(self, identity: Identity) -> None:
        """Called by ``attach`` when all ranks have restored ``identity``."""
        self.restored = self.recoverable = self._last = identity
        self.steps = identity.step

    def warm(self) -> None:
        """Called by ``attach`` at its end."""
        self._copier.warm()

    def on_close(self, call: Callable[[], Any]) -> None:
        self._closing.append(call)

    def close(self) -> None:
        """Finish the last capture, stop the background and let go of the arena. The snapshots stay.

        Raises:
            SnapshotError: the background failed; or it did not end within the timeout: then nothing is let go of, as it
                writes there, and ``close`` may be called again.
        """
        self._copier.stop(self._timeout_s)
        # Whatever raises, the rest is done too; what the background met is said above all.
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
                f"expected snapshot {self._last} to be {what} within {self._timeout_s:.0f} s; it was not"
            )

    def _raise(self) -> None:
        if self._copier.error is not None:
            error = self._copier.error
            if isinstance(error, SnapshotError):
                raise error
            raise SnapshotError(f"the background copy of a snapshot failed: {error}") from error

    def _reserve(self) -> bool:
        """Lock a free slot of every shard of ours; what is locked stays so until it is used."""
        # If the capture this slot is for is agreed upon, every rank has committed _last: that one is kept.
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

    def _begin(self, identity: Identity) -> None:
        numbers = self._state.numbers()
        if self._extra is not None:
            numbers["extra_state"] = self._extra.state_dict()
        self._compare = self._replicated and self.stats.captures % divergence.VERIFY_EVERY == 0
        late = versions(self._copier.late)
        job = Job(identity, self._reserved, tree.pack(numbers), generators.read(), self._compare, late)
        self._reserved = {}
        self._copier.begin(job)
        self._last = identity
        if self._copier.cuda is not None:
            self._running = job
        self.stats.captures += 1

    def _compare_replicated(self) -> None:
        """Collective where the last capture was one to compare, which all ranks have committed when they call this."""
        if self._compare and self._last is not None:
            self._compare = False
            divergence.check(self._ranks.exchange(self._copier.replicated.hex()), self._last.step)
