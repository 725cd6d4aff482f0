"""Make batches ahead of the loop that consumes them.

Owners. One background thread calls ``prepare`` for one key after the other and puts the results into a queue; the
consumer takes them in that order and runs ``complete`` on each in its own thread. The stages say where communication
is allowed: with gloo the exchange belongs into ``prepare``. With NCCL it belongs into ``complete``: two communicators
used from two threads deadlock unless every rank issues all its collectives in one order. Results do not depend on
``depth``: each item is made from its key alone, in the order of the keys.

How far ahead. The thread starts item i only when item i - depth has been delivered: ``depth`` items are prepared or
under way besides the one the consumer works on. So the number of items begun is a function of the number consumed.
That matters where ``prepare`` is collective. A consumer that breaks out early, on all ranks after the same item, leaves
behind the same number of collectives on every rank: :meth:`Prefetcher.close` lets the thread finish the items it was
allowed to begin. After an exception in the consumer it does not: that rank is lost to the others anyway, so the thread
stops after the item it is at.

Interruptions. Nothing can interrupt ``prepare`` itself (gloo cannot be aborted), so it must have time limits of its
own, as an exchange has. ``close`` waits for it at most ``close_timeout_s``, and only ``ABORT_S`` after an exception: the
others notice a failed rank when its process ends, so the end must not wait for them. The thread is a daemon and does
not hold it up. An exception in ``prepare``, or in the iterator of keys, is delivered in the place of its item, after all
earlier items; one in an item that was never taken is raised by ``close``.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

from gemini_gnn.errors import PeerLost

K = TypeVar("K")
T = TypeVar("T")

ABORT_S = 2.0


class Prefetcher(Generic[K, T]):
    """Iterator and context manager; made by :func:`prefetch`.

    Attributes:
        waited_s: how long the consumer waited for the latest item, ``complete`` not included.
        total_waited_s: sum of it over all items.
    """

    def __init__(
        self,
        prepare: Callable[[K], Any],
        keys: Iterable[K],
        depth: int,
        complete: Callable[[Any], T] | None,
        close_timeout_s: float,
    ) -> None:
        self.waited_s = 0.0
        self.total_waited_s = 0.0
        self._prepare, self._keys, self._complete = prepare, iter(keys), complete
        self._close_timeout_s = close_timeout_s
        self._ready: collections.deque[tuple[str, Any]] = (
            collections.deque()
        )  # ("item", x), ("error", e), ("end", None)
        self._changed = threading.Condition()
        self._allowed = depth  # items the thread may still begin
        self._closing = self._abort = self._ended = False
        self._thread: threading.Thread | None = None
        if depth > 0:
            self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
            self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._ended or self._closing:
            raise StopIteration
        began = time.perf_counter()
        kind, value = self._next_prepared() if self._thread else self._prepare_one()
        self.waited_s = time.perf_counter() - began
        self.total_waited_s += self.waited_s
        if kind != "item":
            self._ended = True
            if kind == "end":
                raise StopIteration
            raise value  # with the traceback it got where it happened
        return self._complete(value) if self._complete else value

    def __enter__(self) -> Prefetcher[K, T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close(abort=True)
        except Exception as late:  # the consumer's own error is the one to see
            error.add_note(f"and in the background: {late}")

    def close(self, abort: bool = False) -> None:
        """Stop the thread and drop what it has prepared. May be called twice.

        Args:
            abort: stop after the item the thread is at. Otherwise it first prepares the items it was allowed to begin.

        Raises:
            PeerLost: the thread is still in ``prepare`` after the time limit; or what an item failed with that was made
                ahead and never taken.
        """
        with self._changed:
            self._closing = True
            self._abort = self._abort or abort
            self._changed.notify_all()
        if self._thread is not None:
            limit_s = min(ABORT_S, self._close_timeout_s) if abort else self._close_timeout_s
            self._thread.join(limit_s)
            if self._thread.is_alive():
                raise PeerLost(
                    f"the thread that prepares batches did not stop within {limit_s:g} s: it still waits for other ranks "
                    "or for the disk; look for the first error in the logs of the other ranks"
                )
        left, self._ready = list(self._ready), collections.deque()
        for kind, value in left:
            if kind == "error":
                raise value

    # -- the consumer's side -------------------------------------------------------------------------------------------

    def _next_prepared(self) -> tuple[str, Any]:
        with self._changed:
            # No limit of its own: the thread always ends with an item, an error or the end, and `prepare` has limits.
            while not self._changed.wait_for(lambda: self._ready, timeout=60.0):
                assert self._thread is not None
                if not self._thread.is_alive():
                    raise RuntimeError("the thread that prepares batches is gone without a word")
            prepared = self._ready.popleft()
            self._allowed += 1
            self._changed.notify_all()
            return prepared

    # -- the thread's side ---------------------------------------------------------------------------------------------

    def _work(self) -> None:
        more = True
        while more:
            with self._changed:
                self._changed.wait_for(lambda: self._allowed > 0 or self._closing)
                if self._abort or (self._closing and self._allowed == 0):
                    return
                self._allowed -= 1
            prepared = self._prepare_one()
            with self._changed:
                self._ready.append(prepared)
                self._changed.notify_all()
            more = prepared[0] == "item"
            del prepared  # or the thread would hold one more batch in memory while it waits

    def _prepare_one(self) -> tuple[str, Any]:
        try:
            try:
                key = next(self._keys)
            except StopIteration:
                return "end", None
            return "item", self._prepare(key)
        except BaseException as error:  # delivered to the consumer, where it is raised
            return "error", error


def prefetch(
    prepare: Callable[[K], Any],
    keys: Iterable[K],
    depth: int,
    *,
    complete: Callable[[Any], T] | None = None,
    close_timeout_s: float = 150.0,
) -> Prefetcher[K, T]:
    """``complete(prepare(key))`` for each of ``keys``, in order; a background thread prepares up to ``depth`` of them ahead.

    Use it in a ``with`` block: ``with prefetch(prepare, keys, 3) as batches: for batch in batches: ...``.

    Args:
        prepare: runs in the background thread; may communicate on a gloo group of its own.
        keys: of the items; the thread advances it, at most ``depth`` keys ahead of the items delivered.
        depth: 0 prepares each item in the consumer's thread when it is asked for.
        complete: runs in the consumer's thread when the item is taken; where NCCL communication belongs. None: nothing.
        close_timeout_s: how long :meth:`Prefetcher.close` waits for the thread; choose it above the limits in ``prepare``.

    Raises:
        Exception: of ``prepare``, ``keys`` or ``complete``, when the item they failed at is taken.
    """
    if depth < 0:
        raise ValueError(f"depth: expected 0 or more items; got {depth}")
    return Prefetcher(prepare, keys, depth, complete, close_timeout_s)
