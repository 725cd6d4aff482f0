"""Events as JSON lines, written by a thread: nothing that happens to the file system blocks training or an agent."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from gemini_gnn.observe.writer import Writer


class EventLog:
    """``always`` stands in every record. After records that found no room the next one says how many."""

    def __init__(self, writer: Writer, path: Path, **always: Any):
        self._writer, self._path, self._always = writer, path, always
        self._dropped = 0

    def emit(self, kind: str, **fields: Any) -> None:
        record = {"t": time.time(), **self._always, "kind": kind, **fields}
        if self._dropped:
            record["dropped_before"] = self._dropped
        written = self._writer.append(self._path, json.dumps(record) + "\n")
        self._dropped = 0 if written else self._dropped + 1
