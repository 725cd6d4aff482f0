"""Events of one rank as JSON lines, written by a thread: a slow or dead file system never blocks training.

The training thread puts records into a bounded queue and never waits; when the queue is full the record is dropped and
counted, and the count is written when there is room again. A write that fails (disk full, file system gone) is said
once on stderr; training goes on.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any


class EventLog:
    """``emit`` never blocks; ``close`` waits for the writer, at most ``deadline_s``."""

    def __init__(self, path: Path, rank: int):
        self._path = path
        self._rank = rank
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(maxsize=10_000)
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, name="events", daemon=True)
        self._thread.start()

    def emit(self, kind: str, **fields: Any) -> None:
        record = {"t": time.time(), "rank": self._rank, "kind": kind, **fields}
        if self._dropped:
            record["dropped_before"] = self._dropped
        try:
            self._queue.put_nowait(record)
            self._dropped = 0
        except queue.Full:
            self._dropped += 1

    def close(self, deadline_s: float = 5.0) -> None:
        try:
            self._queue.put(None, timeout=deadline_s)
        except queue.Full:
            return  # the writer hangs in a dead file system; it is a daemon thread and dies with the process
        self._thread.join(deadline_s)

    def _write(self) -> None:
        try:
            with open(self._path, "a") as file:
                while (record := self._queue.get()) is not None:
                    file.write(json.dumps(record) + "\n")
                    if self._queue.empty():
                        file.flush()
        except OSError as error:
            print(f"warning: cannot write events to {self._path}: {error}", file=sys.stderr)
            while self._queue.get() is not None:
                pass
