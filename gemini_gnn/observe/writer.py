"""A thread that writes files: a slow, full or dead file system never blocks who has something to write.

Ownership. Callers put work into a bounded queue and never wait. The thread alone opens, writes and closes files, in the
order of the calls. It is a daemon: if a file system hangs, it hangs there, and dies with the process.

An append that fails is kept and tried again, so a disk that was full for a while costs no line and tears none. The thread
opens the file again for it: on a network file system the old handle may be stale.
"""

from __future__ import annotations

import contextlib
import io
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

RETRY_S = 1.0  # between two attempts at an append that failed
SLOW_S = 10.0  # then a file system that does not answer is a problem
KEPT_BYTES = 1 << 20  # of failed appends, for each file


class Writer:
    """
    Attributes:
        dropped: calls that found the queue full.
    """

    def __init__(self, name: str, room: int = 10_000):
        self.dropped = 0
        self._queue: queue.Queue[tuple[Callable[..., object], tuple[Any, ...]] | None] = queue.Queue(room)
        self._files: dict[Path, io.FileIO] = {}
        self._kept: dict[Path, bytes] = {}  # appends that failed
        self._failing: dict[str, str] = {}  # by what cannot be written, the words for it
        self._problem = ""
        self._doing: tuple[str, float] | None = None  # what the thread is at, and since when
        self._said: set[str] = set()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[..., object], *args: Any) -> bool:
        """Have the thread call ``function(*args)``; a path as first argument names in messages what is written.

        Returns False, and counts the call as dropped, if the queue is full.
        """
        try:
            self._queue.put_nowait((function, args))
        except queue.Full:
            self.dropped += 1
            return False
        return True

    def append(self, path: Path, text: str) -> bool:
        """Write ``text`` to the end of ``path``, which stays open. As :meth:`submit`."""
        return self.submit(self._append, path, text.encode())

    @property
    def problem(self) -> str:
        """What cannot be written now, and why; empty while all can."""
        doing = self._doing
        if doing is not None and time.monotonic() - doing[1] > SLOW_S:
            return f"cannot write {doing[0]}: its file system does not answer"
        return self._problem

    def flush(self, deadline_s: float) -> bool:
        """Wait until all that was asked for before has been tried. Returns False if ``deadline_s`` was not enough."""
        tried = threading.Event()
        return self.submit(tried.set) and tried.wait(deadline_s)

    def close(self, deadline_s: float) -> bool:
        """Try what is left, and end the thread, within ``deadline_s``. Returns whether nothing is left.

        What is asked for afterwards is not done.
        """
        deadline = time.monotonic() + deadline_s
        try:
            self._queue.put(None, timeout=deadline_s)
        except queue.Full:
            return False
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive() and not self._failing

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        more = True
        while more:
            try:
                work = self._queue.get(timeout=RETRY_S if self._kept else None)
            except queue.Empty:
                self._try_again()
                continue
            more = work is not None
            if work is not None:
                self._do(*work)
        self._try_again()
        for file in self._files.values():
            with contextlib.suppress(OSError):  # nothing is buffered: all has been written or kept
                file.close()

    def _try_again(self) -> None:
        for path in list(self._kept):
            self._do(self._append, (path, b""))

    def _do(self, function: Callable[..., object], args: tuple[Any, ...]) -> None:
        what = str(args[0]) if args and isinstance(args[0], Path) else getattr(function, "__name__", repr(function))
        self._doing = what, time.monotonic()
        try:
            function(*args)
        except Exception as error:
            known = isinstance(error, OSError) and error.strerror
            self._failing[what] = f"cannot write {what}: {known or f'{type(error).__name__}: {error}'}"
            self._say(f"warning: {self._failing[what]}" + ("" if known else "\n" + traceback.format_exc()))
        else:
            if self._failing.pop(what, ""):
                self._say(f"{what} can be written again")
        self._problem = next(iter(self._failing.values()), "")
        self._doing = None

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            with contextlib.suppress(OSError, ValueError):  # stderr is most often a file on the same disk
                print(text, file=sys.stderr, flush=True)

    def _append(self, path: Path, data: bytes) -> None:
        left = self._kept.pop(path, b"") + data
        file = self._files.pop(path, None)
        try:
            file = file or io.FileIO(path, "a")
            while left:
                left = left[file.write(left) :]
        except OSError:
            if len(left) > KEPT_BYTES:
                self.dropped += 1
                left = left[: -len(data)]  # whole lines only
            self._kept[path] = left
            raise
        self._files[path] = file
