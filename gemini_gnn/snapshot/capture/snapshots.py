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

With several replicas that is not enough, since the snapshot must outlive a machine: a slot is overwritten only if the one in
it is older than the *recoverable* one, of which every shard has its copies. The agents say which that is (``Context``). If
copies are slow no slot is free, and all ranks skip together.

To be persisted, the first capture of a step or a later one is *held*: its slots are left alone until the agent says so.

A kill anywhere leaves slots WRITING (void) or COMMITTED; locks die with the process.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from gemini_gnn.errors import SnapshotError
from gemini_gnn.snapshot.agree import Ranks
from gemini_gnn.snapshot.capture import divergence
from gemini_gnn.snapshot.capture.copier import Capture, Copier, next_slot
from gemini_gnn.snapshot.capture.pace import Pace
from gemini_gnn.snapshot.capture.shards import Shard
from gemini_gnn.snapshot.capture.stats import Stats
from gemini_gnn.snapshot.capture.unchanged import versions
from gemini_gnn.snapshot.context import Context
from gemini_gnn.snapshot.state import generators, tree
from gemini_gnn.snapshot.state.collect import TrainingState
from gemini_gnn.snapshot.store.identity import COMMON, Identity

FINAL_COPIES_S = 2.0  # what the last snapshot is given to reach its peers
POLL_S = 0.002

log = logging.getLogger(__name__)


class Snapshots:
    """The snapshots of one rank; made by :func:`gemini_gnn.snapshot.attach`.

    Attributes:
        restored: identity of the snapshot that training resumed from, or None at a fresh start.
        steps: optimizer steps completed, across restarts; with ``hook=False`` only those before this start.
        stats: the cost so far.
    """

    def __init__(
        self,
        here: Context,
        ranks: Ranks,
        state: TrainingState,
        shards: list[Shard],
        *,
        every: int | str,
        mtbf_s: float,
        timeout_s: float,
    ):
        self._here, self._ranks, self._state, self._shards = here, ranks, state, shards
        self._own = [s for s in shards if s.owned]
        self._every, self._timeout_s = every, timeout_s
        self.restored: Identity | None = None
        self.steps = 0
        self._agreed: Identity | None = None  # newest that all ranks have committed
        self.stats = Stats()
        self._last: Identity | None = None  # newest capture of this rank
        self._running: Capture | None = None  # on CUDA: the last capture, until training passes its fence
        self._reserved: dict[str, int] = {}
        self._held: dict[str, tuple[int, ...]] = {}  # slots of the held snapshot,
        self._held_for = 0  # and the step for which it was asked
        self._pace = Pace(every, mtbf_s) if every == "auto" or here.replicas > 1 else None
        self._due = True
        self._closing: list[Callable[[], Any]] = []
        self._common = ranks.world_size > 1 and any(s.name == COMMON for s in shards)
        self._compare = False  # the last capture is one to compare over all ranks
        self._copier = Copier(here, shards, self.stats)

    def wants(self, step: int) -> bool:
        """Whether step ``step`` (steps completed) is one to capture. The same on all ranks."""
        return isinstance(self._every, str) or step % self._every == 0

    @property
    def recoverable(self) -> Identity | None:
        """Newest snapshot that is committed on all ranks and, with several replicas, has all its copies."""
        return self._here.recoverable() if self._here.replicas > 1 else self._agreed

    def ready(self) -> bool:
        """This rank's bit of capture-or-skip: one is due, the one before is committed, a slot is free. Never blocks.

        Raises:
            SnapshotError: the background failed.
        """
        begin = time.perf_counter()
        if self._pace is not None:
            self._pace.recoverable(self.recoverable, begin)
            self._due = self._pace.due(begin)
            if not self._due:
                return False
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
            self.stats.skipped += self._due
            return
        if not self._copier.committed.is_set() or not self._reserve():
            raise SnapshotError("after_step(capture=True) without this rank being ready(): pass the agreed minimum")
        self._compare_common()
        self._agreed = self._last  # all ranks were ready, so all have committed the previous one
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
        Copies on peers are not waited for, but for a moment: what is committed is enough to go on from.

        Raises:
            SnapshotError: as for :meth:`before_step`, on all ranks together; or no slot came free within the timeout.
                Then the job still resumes from the snapshot before.
        """
        self._ranks.together(self.wait)
        self._compare_common()
        self._agreed = self._last  # all have committed it
        if not self._ranks.all_true(self._last is not None and self._last.step == step):
            self._ranks.together(lambda: self._begin_final(step))
            self._ranks.together(self.wait)
            self._agreed = self._last
        self._copied(FINAL_COPIES_S)

    def _begin_final(self, step: int) -> None:
        deadline = time.monotonic() + self._timeout_s
        while not self._reserve():
            if time.monotonic() > deadline:
                why = f"other processes kept reading the slots of rank {self._here.rank}"
                if self._here.replicas > 1:
                    why = f"copies to peers were not done: {self.recoverable} is the newest snapshot that has them"
                raise SnapshotError(
                    f"expected a free slot for the last snapshot (step {step}) within {self._timeout_s:.0f} s; {why}. The "
                    f"same command resumes from {self._last}"
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
        self.restored = self._agreed = self._last = identity
        self.steps = identity.step
        self._here.committed(*identity)

    def first(self) -> None:
        """``attach`` calls this at a fresh start: from here on there is always a snapshot to restore. Collective.

        With several replicas training waits here until it has its copies. So a blocked port is found before hours of work
        count on it, and no step is ever without protection.

        Raises:
            SnapshotError: as for :meth:`after_step`; or a rank has no free slot; or copies do not arrive within the timeout.
        """
        if not self._ranks.all_true(self.ready()):
            raise SnapshotError(
                "expected a free slot for the first snapshot; another process reads the slots of this job "
                f"({self._here.arena}): end it and start again"
            )
        self.after_step(0, capture=True)
        self._ranks.together(self.wait)
        self._agreed = self.last
        if self._here.replicas == 1:
            return
        # In parts, each of which the ranks end together: none waits in vain for one that waits for copies.
        if not any(self._ranks.all_true(self._copied(self._timeout_s / 10)) for _ in range(10)):
            raise SnapshotError(
                f"expected every shard of the first snapshot {self._last} on {self._here.replicas} machines within "
                f"{self._timeout_s:.0f} s; its copies did not arrive. logs/agent-*.log names the two machines that do not reach "
                "each other: open the ports between them (firewall). If they are only slow, set a higher "
                "distributed.timeout_s (attach: timeout_s), or snapshot.replicas=1"
            )

    def _copied(self, within_s: float) -> bool:
        """Wait until the last snapshot has all its copies; False: not within that time."""
        deadline = time.monotonic() + within_s
        while self.recoverable is None or self._last is None or self.recoverable < self._last:
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)  # the agent writes into shared memory, which wakes nobody
        return True

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
        if self._held and self._here.persist_at() != self._held_for:
            self._held, self._copier.next_slots = {}, {}  # its slots are the oldest now
        # With one replica _last is kept: the ranks agree on the capture into this slot only when all have committed _last.
        kept = self.recoverable if self._here.replicas > 1 else self._last
        for shard in self._own:
            if shard.name not in self._reserved:
                slot = self._lock_free(shard, kept)
                if slot is None:
                    return False
                self._reserved[shard.name] = slot
        return True

    def _lock_free(self, shard: Shard, kept: Identity | None) -> int | None:
        busy = set(self._held.get(shard.name, ()))
        found = self._copier.next_slots.get(shard.name) or next_slot(shard, self._last, busy)
        if found is not None:
            self._copier.next_slots[shard.name] = found
        while found is not None and (found.old is None or (kept is not None and found.old < kept)):
            if shard.files[found.slot].lock(exclusive=True):
                return found.slot
            busy.add(found.slot)
            found = next_slot(shard, self._last, busy)
        return None

    def _begin(self, step: int) -> None:
        identity = Identity(self._here.term, self._here.generation, step)
        packed = tree.pack(self._state.values())
        self._compare = self._common and self.stats.captures % divergence.VERIFY_EVERY == 0
        late = versions(self._copier.late)
        asked = self._here.persist_at()
        hold = 0 < asked <= step and not self._held
        if hold:
            self._held_for, self._held = asked, {name: (slot,) for name, slot in self._reserved.items()}
        capture = Capture(identity, self._reserved, packed, generators.read(), self._compare, late, hold, self._held)
        self._reserved = {}
        self._copier.begin(capture)
        self._last = identity
        if self._copier.cuda is not None:
            self._running = capture
        self.stats.captures += 1
        if self._pace is not None:
            news = self._pace.begun(identity, time.perf_counter(), self.stats.stall_s)
            if news and self._here.rank == 0:
                log.info("%s", news)

    def _compare_common(self) -> None:
        """Collective if the last capture is one to compare; all ranks have committed it when they call this."""
        if self._compare and self._last is not None:
            self._compare = False
            divergence.check(self._ranks.exchange(self._copier.common.hex()), self._last.step)
