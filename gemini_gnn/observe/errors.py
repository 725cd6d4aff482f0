"""The errors of a job's ranks: which error came first, and which are consequences.

When one rank fails, the others lose their connection to it and fail too; their errors only say so. Each rank writes
``errors/rank-<r>.json`` and marks such *consequences*. The root agent tells causes from them as they come; these files are
for people, and for jobs without an agent. Machines have different clocks, so an error that is no consequence counts before
one that is, whatever its time.

A record names its membership (:func:`begin`): a record that an earlier start left does not explain an error of this one.
"""

from __future__ import annotations

import json
import re
import socket
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from gemini_gnn.errors import DamagedSnapshot, GeminiError, PeerLost
from gemini_gnn.files import write_atomically

SETTLE_S = 3.0  # how long a rank with a consequence waits for the record of the cause

# The texts of torch, gloo and NCCL when the other side, or the way to it, is gone. Our own errors are PeerLost.
_PEER_LOST = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|connectfullmesh|timed? ?out|broken pipe|socket error"
    r"|nccl communicator was aborted|remote process exit|failed to (connect|recv|send)|no route to host",
    re.IGNORECASE,
)


class Dated(Protocol):
    """An error that knows whether it only followed another one, and when it was raised."""

    @property
    def consequence(self) -> bool: ...

    @property
    def time_s(self) -> float: ...


E = TypeVar("E", bound=Dated)


def first(errors: Iterable[E]) -> E | None:
    """The first error: the earliest that is no consequence, else the earliest."""
    return min(errors, key=lambda error: (error.consequence, error.time_s), default=None)


def is_consequence(error: BaseException) -> bool:
    """Whether the job can go on after ``error``: it, or what caused it, says that another rank or the way to it is gone, or
    that a damaged snapshot is to be fetched from another machine.
    """
    seen: BaseException | None = error
    while seen is not None:
        foreign = type(seen).__module__.startswith("torch") or type(seen) is RuntimeError
        if isinstance(seen, PeerLost | DamagedSnapshot) or (foreign and _PEER_LOST.search(str(seen))):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


@dataclass(frozen=True)
class Record:
    """How a rank failed: the contents of ``errors/rank-<rank>.json``.

    Attributes:
        membership: the same on all ranks of one start; see :func:`begin`.
        time_s: by its machine's clock, in seconds since the epoch.
        type, message, traceback: of the exception.
        consequence: it only says that another rank, or the way to it, is gone.
        expected: it is meant for the user.
    """

    membership: str
    rank: int
    machine: str
    time_s: float
    type: str
    message: str
    traceback: str
    consequence: bool
    expected: bool

    @property
    def exit_code(self) -> int:
        return 2 if self.expected else 1


_membership = ""


def begin(membership: str) -> None:
    """From here on this process is a rank of ``membership``, "term.generation" of rank 0's agent: the same on all ranks."""
    global _membership
    _membership = membership


def _record(rank: int, error: BaseException) -> Record:
    return Record(
        membership=_membership,
        rank=rank,
        machine=socket.gethostname(),
        time_s=time.time(),
        type=type(error).__name__,
        message=str(error),
        traceback="".join(traceback.format_exception(error)),
        consequence=is_consequence(error),
        expected=isinstance(error, GeminiError),
    )


def record_error(run_dir: Path, rank: int, error: BaseException) -> None:
    """Write ``errors/rank-<rank>.json``."""
    path = run_dir / "errors" / f"rank-{rank}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(_record(rank, error)), indent=1), durable=False)
    except OSError as problem:  # the run directory may be what failed; the error itself still goes to stderr
        print(f"warning: cannot write {path}: {problem.strerror}", file=sys.stderr)


def forget_errors(run_dir: Path) -> None:
    """Remove the records of an earlier start. By rank 0, before any rank of this one may fail."""
    for path in (run_dir / "errors").glob("rank-*.json"):
        path.unlink(missing_ok=True)


def read_errors(run_dir: Path, membership: str | None = None) -> list[Record]:
    """The records of all ranks that have one, by rank; only those of ``membership`` if it is given."""
    records = []
    for path in (run_dir / "errors").glob("rank-*.json"):
        try:
            records.append(msgspec.json.decode(path.read_bytes(), type=Record))
        except (OSError, ValueError):  # being replaced, cut off by a full disk, or of another version
            continue
    return sorted((one for one in records if membership in (None, one.membership)), key=lambda record: record.rank)


def first_error(run_dir: Path) -> str | None:
    """``rank 2 on h2: ValueError: ...`` of the first error, or None if no rank wrote one."""
    record = first(read_errors(run_dir))
    return None if record is None else f"rank {record.rank} on {record.machine}: {record.type}: {record.message}"


def first_exit_code(run_dir: Path, rank: int, world_size: int, error: BaseException, settle_s: float = SETTLE_S) -> int:
    """Record ``error``, and return the exit code of the first error of any rank: of a job on one machine without an agent.

    If ``error`` is a consequence, this waits up to ``settle_s`` for the record of the cause.
    """
    record_error(run_dir, rank, error)
    deadline = time.monotonic() + settle_s
    records = read_errors(run_dir, _membership)
    while all(r.consequence for r in records) and len(records) < world_size and time.monotonic() < deadline:
        time.sleep(0.05)
        records = read_errors(run_dir, _membership)
    if all(r.rank != rank for r in records):  # the run directory cannot be written
        records.append(_record(rank, error))
    cause = first(records)
    assert cause is not None
    return cause.exit_code
