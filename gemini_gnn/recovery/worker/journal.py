"""The records of a worker agent: its events, the errors in the trainers' logs, ``status.json``. Files only.

A full or lost disk does not end a job: if an event cannot be written, the agent tries its own log once.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from gemini_gnn.observe.status import read_status, write_status
from gemini_gnn.recovery.outcome import Failure, told_error


class Journal:
    """
    Attributes:
        term: written with every event; 0 before it is claimed.
        speaks_for_job: rank 0 runs on this machine.
        errors: of this generation's trainers, not yet in their logs.
    """

    def __init__(self, run_dir: Path, machine: str):
        self.run_dir, self.machine = run_dir, machine
        self.term = 0
        self.speaks_for_job = False
        self.errors: list[Failure] = []
        self._events = open(run_dir / "events" / f"agent-{machine}.jsonl", "a")  # as long as the agent lives

    def log_of(self, rank: int) -> Path:
        return self.run_dir / "logs" / f"rank-{rank}.log"

    def log(self, kind: str, **fields: Any) -> None:
        record = {"t": time.time(), "monotonic_s": time.monotonic(), "term": self.term, "kind": kind, **fields}
        try:
            self._events.write(json.dumps(record) + "\n")
            self._events.flush()
        except OSError as error:
            with contextlib.suppress(OSError):  # most often on the same disk
                print(f"cannot write {self._events.name}: {error.strerror}: {record}", file=sys.stderr, flush=True)

    def write_errors(self, first: Failure | None, ranks: Collection[int] = ()) -> None:
        """Write the errors of this machine's trainers into their logs: the job's first error whole, one line of the others.

        If the job goes on or ends without an error, ``first`` is None: the first that is no consequence is written whole.

        Args:
            ranks: on this machine.
        """
        if first is not None:
            told = next((one for one in self.errors if (one.rank, one.text) == (first.rank, first.text)), None)
            if told is None and first.rank in ranks:
                self.errors.append(first)  # the trainer ended without a message
            first = told or first
        whole = first or told_error(tuple(self.errors))
        for failure in self.errors:
            text = failure.text if failure.text.startswith("Traceback") else f"error: {failure.text}"
            if failure is not whole:
                text = f"[gemini_gnn] ended by {failure.summary} (after another trainer)"
                if whole is not None and failure.summary == whole.summary:
                    text = f"[gemini_gnn] ended by the same error as rank {whole.rank}: see its log"
            try:
                with open(self.log_of(failure.rank), "a") as log:
                    log.write(text.rstrip("\n") + "\n")
            except OSError as error:  # the outcome has it too
                self.log("log_failed", rank=failure.rank, error=error.strerror)
        self.errors.clear()

    def status(self, state: str, **fields: Any) -> None:
        if not self.speaks_for_job:
            return
        try:
            was_done = read_status(self.run_dir).get("state") == "done"
            if was_done and state == "done":
                return  # the trainer has written so, and more
            if was_done and (self.run_dir / "result.json").exists():
                return  # complete: the start that was refused changes nothing
            write_status(self.run_dir, state, machine=self.machine, term=self.term, **fields)
        except OSError as error:
            self.log("status_failed", error=error.strerror)
