"""Terms of a job whose machines share no run directory: each has one of its own, and a majority of them grants a term.

    terms/private    JSON: ``disk`` names the folder of this machine, ``voters`` those of all machines of a start
    terms/<n>.vote   the record to which this machine has granted number n, before anybody knew whether it won
    terms/<n>.json   the record of a term that was won, as where the folder is shared (terms.py); the root sends it to all

``python launch/hosts.py private`` makes ``terms/private``, and copies ``terms/id`` and ``terms/token`` to every machine.

Ownership. The worker agent of a machine is the only one that writes here. It grants a number once, and only one above all that
it has granted or knows to be won. The vote is on the disk before the agent says so: after a loss of power it still stands. A
folder that was lost with its disk has another name when it is made anew, and so no vote.

Interruptions. An agent that is killed after it wrote a vote, and before it said so, has granted it: the next claim hears of it.

Agents load this module: nothing heavy is imported.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemini_gnn.files import create, read_record
from gemini_gnn.observe import terms

PRIVATE = "private"


@dataclass(frozen=True)
class Private:
    """``disk`` names the run directory of this machine, ``voters`` those of all machines that may vote."""

    disk: str
    voters: tuple[str, ...]


def private(run_dir: Path) -> Private | None:
    """What ``terms/private`` says; None where all machines share the run directory."""
    record = read_record(run_dir / "terms" / PRIVATE)
    disk, voters = record.get("disk"), record.get("voters")
    if not isinstance(disk, str) or not isinstance(voters, list):
        return None
    return Private(disk, tuple(map(str, voters)))


def newest(run_dir: Path) -> int:
    """The highest number that is known to be won, or was granted, here; 0: none."""
    return max(
        [0, *_granted(run_dir), *(int(path.stem) for path in (run_dir / "terms").glob("*.json") if _counts(path))]
    )


def grant(run_dir: Path, number: int, known: int, record: dict[str, Any]) -> tuple[bool, list[dict[str, Any]]]:
    """Whether this machine grants ``number`` to the process of ``record``, and the records of the same start of the job that it
    has granted earlier numbers above ``known``: one of them may have won.

    Raises:
        OSError: of the disk. It may have been granted.
    """
    folder = run_dir / "terms"
    granted = number > newest(run_dir) and create(folder / f"{number}.vote", json.dumps(record | {"term": number}))
    earlier = [read_record(folder / f"{one}.vote") for one in _granted(run_dir) if known < one < number]
    return granted, [one for one in earlier if one.get("start") == record["start"]]


def learn(run_dir: Path, record: dict[str, Any]) -> None:
    """The term of ``record`` was won: what was granted before it no longer matters.

    Raises:
        OSError: of the disk.
    """
    folder, term = run_dir / "terms", int(record["term"])
    create(folder / f"{term}.json", json.dumps(record))
    for number in _granted(run_dir):
        if number < term:
            (folder / f"{number}.vote").unlink(missing_ok=True)


def won(run_dir: Path, known: int, start: str) -> dict[str, Any]:
    """The record of a newer term than ``known`` of the same start; empty where this machine knows of none."""
    record = terms.newest_term(run_dir)
    return record if record.get("term", 0) > known and record.get("start") == start else {}


def _granted(run_dir: Path) -> list[int]:
    return sorted(int(path.stem) for path in (run_dir / "terms").glob("*.vote") if _counts(path))


def _counts(path: Path) -> bool:
    return path.stem.isdigit()
