"""How trainers fail and how jobs end: the words that root, workers and slot processes share."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from gemini_gnn.observe.errors import first

STOPPED = 75  # exit code of a trainer that stopped on request before its work was done (EX_TEMPFAIL)


@dataclass(frozen=True)
class Failure:
    """How one trainer failed.

    Attributes:
        rank: global trainer index; -1 for an agent itself.
        code: exit code of the job if this is its first error.
        time_s: on the monotonic clock of the machine that holds this object.
        summary: one line.
        text: for the user: the message of an error meant for users, otherwise the traceback.
        consequence: it only says that another rank, or the way to it, is gone.
    """

    rank: int
    code: int
    time_s: float
    summary: str
    text: str
    consequence: bool = False


@dataclass(frozen=True)
class Outcome:
    """How the job ended.

    Attributes:
        kind: "done" | "stopped" | "failed" | "lost" (a trainer cannot be reaped).
        code: exit code of the slot processes.
        keep: leave the snapshots in host memory, so that the same command resumes from them.
    """

    kind: str
    code: int
    reason: str
    keep: bool = True
    failure: Failure | None = None


def failed(text: str, now: float, code: int = 1, rank: int = -1) -> Outcome:
    """The end of a job that no trainer's error explains."""
    return Outcome("failed", code, text, failure=Failure(rank, code, now, text, text))


def told_error(failures: tuple[Failure, ...]) -> Failure | None:
    """The first error, if it is no consequence of another trainer's end."""
    failure = first(failures)
    return None if failure is None or failure.consequence else failure


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def exit_name(code: int) -> str:
    return signal_name(-code) if code < 0 else f"exit code {code}"
