"""Which machine holds the feature rows of which parts, and the record of it beside them. Loads no numpy: slots import it.

A machine without a shared disk has all of a partitioned graph but the features of most nodes: sampling needs every edge,
training the rows of the own ranks. Rows that are not there are holes in files of the full size. ``held.json`` says which
are there; a folder without it holds everything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemini_gnn.errors import PartitionError

RECORD = "held.json"
DIVIDED = ("x", "x_index", "x_value")  # arrays of which a machine may hold only the rows of some parts

Piece = tuple[str, int, int, str]  # array, first byte of its file, one behind the last, xxh3_128


@dataclass(frozen=True)
class Held:
    """The contents of ``held.json``.

    Attributes:
        machine: whose folder it is. fingerprint: of the graph. parts: those whose feature rows are there.
        pieces: of the files of :data:`DIVIDED` arrays, that are there: header and rows.
    """

    machine: str
    fingerprint: str
    parts: tuple[int, ...]
    pieces: tuple[Piece, ...]


def parts_of(machines: int, slots: int, standbys: int, copies: int) -> list[tuple[int, ...]]:
    """The parts whose feature rows each machine of a launch needs. Pure.

    The machines but the last ``standbys`` have a seat each, with a part per slot. Each of them gets its own parts and those
    of the next ``copies - 1`` seats, so every row is on ``copies`` machines. A standby may take any seat, and gets all.

    Args:
        machines: in the order of ranks. slots: ranks of each.
    """
    seats = machines - standbys
    own = [range(seat * slots, (seat + 1) * slots) for seat in range(seats)]
    each = [sorted(p for n in range(copies) for p in own[(seat + n) % seats]) for seat in range(seats)]
    return [tuple(parts) for parts in each] + [tuple(range(seats * slots))] * standbys


def read(folder: Path) -> Held | None:
    """The record in ``folder``; None where there is none: then all rows are there.

    Raises:
        PartitionError: it is damaged.
    """
    try:
        value = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        pieces = tuple((str(name), int(begin), int(end), str(sum_)) for name, begin, end, sum_ in value["pieces"])
        return Held(value["machine"], value["fingerprint"], tuple(map(int, value["parts"])), pieces)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PartitionError(
            f"{folder / RECORD} cannot be read ({error!r}); delete the folder and distribute the graph again"
        ) from None


def expect(folder: Path, held: Held | None, parts: Iterable[int]) -> None:
    """Refuse to go on without the feature rows of ``parts``.

    Raises:
        PartitionError: naming those that are missing, the machine, and what to type.
    """
    missing = [] if held is None else sorted(set(parts) - set(held.parts))
    if held is not None and missing:
        raise PartitionError(
            f"{folder} on {os.uname().nodename} has no features of {named(missing)}: expected them here; it has those of "
            f"{named(held.parts)}. Type `python launch/partition.py ... --distribute HOSTFILE --to {folder}` with "
            "the hostfile and the recovery.standby_machines of the job (snapshot.replicas=MACHINES gives all to each)"
        )


def expect_here(folder: Path, parts: Iterable[int], made: bool) -> None:
    """:func:`expect`, before anything maps the graph; ``made``: nobody makes it if it is missing.

    Raises:
        PartitionError: the graph or the features of some of ``parts`` are missing.
    """
    if made and not (folder / "meta.json").is_file():
        raise PartitionError(
            f"{folder} on {os.uname().nodename}: expected a partitioned graph; there is no meta.json. Correct the path, or "
            f"type `python launch/partition.py ... --distribute HOSTFILE --to {folder}`"
        )
    expect(folder, read(folder), parts)


def named(parts: Sequence[int]) -> str:
    """``part 2``, ``parts 0, 1``; of many, the first eight. Pure."""
    more = [f"{len(parts) - 8} more"] if len(parts) > 8 else []
    return f"part{'s' * (len(parts) != 1)} {', '.join([*map(str, parts[:8]), *more])}"


def stands(
    folder: Path,
    wanted: Mapping[str, Any],
    parts: Iterable[int],
    found: Mapping[str, Any],
    held: Held | None,
    machine: str,
) -> bool:
    """Whether all that ``machine`` is to get is in its ``folder`` already; False: the folder may be replaced. Pure.

    Args:
        wanted, found: ``meta.json`` as it is to be, and as it is. parts: whose feature rows are wanted.

    Raises:
        PartitionError: the folder must not be replaced.
    """
    if found.get("checksums") != wanted["checksums"] or found.get("bounds") != wanted["bounds"]:
        raise PartitionError(
            f"{folder} holds something else: expected nothing or {wanted['graph']} in {wanted['parts']} parts; got "
            f"{found.get('graph', 'no partitioned graph')} in {found.get('parts', 'no')} parts. Delete it, or name another "
            "folder with --to"
        )
    if held is not None and held.machine != machine:
        raise PartitionError(
            f"{folder} is that of {held.machine}: expected one that only {machine} sees. Name a folder on each machine's own "
            "disk with --to, or, on a shared disk, train on the folder that was made first"
        )
    return held is None or set(parts) <= set(held.parts)
