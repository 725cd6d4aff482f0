"""The records of a worker agent: its events, the errors in the trainers' logs, ``status.json``. Files only.

One thread writes them (``observe.writer``): a file system that hangs or is full costs the agent no time and ends no job.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from gemini_gnn.observe import terms, votes
from gemini_gnn.observe.events import EventLog
from gemini_gnn.observe.failures import FAILURES
from gemini_gnn.observe.logs import ENDED
from gemini_gnn.observe.status import STATUS, read_status, write_status
from gemini_gnn.observe.writer import Writer
from gemini_gnn.recovery.outcome import Failure, told_error


class Journal:
    """
    Attributes:
        term: written with every event; 0 before it is claimed.
        speaks_for_job: rank 0 runs on this machine.
        errors: of this generation's trainers, not yet in their logs.
        writer: the thread; all that this agent writes into the run directory goes through it.
        mirrored: the last status that a root on another machine said, where machines share no run directory.
    """

    def __init__(self, run_dir: Path, machine: str):
        self.run_dir, self.machine = run_dir, machine
        self.term = 0
        self.speaks_for_job = False
        self.errors: list[Failure] = []
        self.writer = Writer("journal")
        self._events = EventLog(self.writer, run_dir / "events" / f"agent-{machine}.jsonl")
        self.mirrored: dict[str, Any] = {}
        self._newest_status = 0
        self._told = ""

    def log_of(self, rank: int) -> Path:
        return self.run_dir / "logs" / f"rank-{rank}.log"

    def log(self, kind: str, **fields: Any) -> None:
        self._events.emit(kind, monotonic_s=time.monotonic(), term=self.term, **fields)

    def failure(self, record: Mapping[str, Any]) -> None:
        """Keep what a failure cost (``recovery.root.accounting``), also for later terms."""
        self.writer.append(self.run_dir / FAILURES, json.dumps(record) + "\n")

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
                text = f"{ENDED}{failure.summary} (after another trainer)"
                if whole is not None and failure.summary == whole.summary:
                    text = f"{ENDED}the same error as rank {whole.rank}: see its log"
            self.writer.submit(_add, self.log_of(failure.rank), text.rstrip("\n") + "\n")
        self.errors.clear()

    def status(self, state: str, **fields: Any) -> None:
        if self.speaks_for_job:
            number = self._newest_status + 1
            fields = {"time": time.time(), "machine": self.machine, "term": self.term, **fields}
            if self.writer.submit(self._write_status, self.run_dir / STATUS, number, state, fields):
                self._newest_status = number

    def learn(self, record: dict[str, Any]) -> None:
        """Where machines share no run directory: keep the record of a term that another machine has won."""
        self.writer.submit(votes.learn, self.run_dir, record)

    def mirror(self, status: dict[str, Any], failure: dict[str, Any]) -> None:
        """Where machines share no run directory: keep what the root on another machine says of the job."""
        if failure:
            self.failure(failure)
        if status:
            self.mirrored = status
            self.writer.submit(_mirror, self.run_dir, status)

    def _write_status(self, path: Path, number: int, state: str, fields: dict[str, Any]) -> None:
        """In the writer's thread. The file is read here, not when the status was asked for: an older one may wait before it."""
        if number < self._newest_status:
            return  # the next one is waiting already
        if read_status(path.parent).get("state") == "done" and (path.parent / "result.json").exists():
            return  # complete: the start that was refused changes nothing
        write_status(path.parent, state, **fields)

    def news(self) -> str:
        """What a person must hear of these files: once when they cannot be written, once when they can; else empty."""
        problem = self.writer.problem
        if bool(problem) == bool(self._told):
            return ""
        self._told = problem
        if not problem:
            return "run_dir is writable again"
        return f"run_dir is not writable: {problem}. Training goes on; what cannot be kept until then will be missing"

    def flush(self, deadline_s: float) -> bool:
        """Wait until all of the above has been written, or could not be; False after ``deadline_s``."""
        return self.writer.flush(deadline_s)

    def close(self, deadline_s: float) -> bool:
        """Write what is left; False if that was not possible within ``deadline_s``."""
        return self.writer.close(deadline_s)


def _mirror(run_dir: Path, status: dict[str, Any]) -> None:
    """The status, and the beat of its term: a start on this machine sees that the job lives."""
    write_status(run_dir, **status)
    terms.beat(run_dir, status["term"], round(status["time"] * 10))


def _add(path: Path, text: str) -> None:
    """Trainers write to the same file, and a person may remove it: it does not stay open."""
    with open(path, "a") as file:
        file.write(text)
