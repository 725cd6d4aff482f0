"""The claim of a term where machines share no run directory: a majority of their disks grants it. Pure.

A root that needs the next term asks the machines that have joined it for a number. A machine grants each number once, and only
one above all that it has granted or knows to be won (``observe/votes.py``). With its grant it says to whom it has granted lower
numbers since the newest term that the root knows: one of these may have won, and its root may be dead, or cut off.

Why no two memberships ever train. Of two roots that win, the one with the higher number has heard of the other: the two
majorities share a machine, and that one granted the lower number first. So whoever wins knows all that may have won before.
It begins only with a witness of each: a machine that trained in it, and has joined this root. Trainers are reaped before their
machine joins, and training is synchronous: without that machine the earlier membership takes no step (``decisions.py``). If
the witness goes back there, that root needs a new number as well.

Who may vote was settled before the job began (``launch/hosts.py private``), and never changes while it lives. A machine that
joins later has no vote. A machine whose disk was lost has none either.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Ballot:
    """
    Attributes:
        claimer: names the root, and tells its own earlier numbers from another root's: they did not win.
        known: the newest term that the root knows. number: that it asks for.
        voters: the disks that may vote. granted: those that did, for this number.
        before: of numbers that another root may have won: the disks of the machines that trained in it.
    """

    claimer: str
    known: int
    number: int
    voters: frozenset[str]
    granted: frozenset[str] = frozenset()
    before: frozenset[tuple[int, frozenset[str]]] = frozenset()


def begin(claimer: str, known: int, number: int, voters: Collection[str]) -> Ballot:
    return Ballot(claimer, known, max(number, known + 1), frozenset(voters))


def answered(
    ballot: Ballot, disk: str, number: int, granted: bool, newest: int, votes: Sequence[Mapping[str, Any]]
) -> Ballot:
    """The machine of ``disk`` has answered. A refusal asks for a higher number: the caller sends it to all again.

    Args:
        number: that it was asked for. newest: the highest that it has granted, or knows to be won.
        votes: the records of lower numbers that it has granted.
    """
    if number != ballot.number:
        return ballot
    others = [record for record in votes if record.get("claimer") != ballot.claimer]
    before = ballot.before | {(int(record["term"]), frozenset(record["trains"])) for record in others}
    if not granted:
        higher = max(ballot.number, newest) + 1
        return replace(ballot, number=higher, granted=frozenset(), before=before)
    return replace(ballot, granted=ballot.granted | ({disk} & ballot.voters), before=before)


def has_majority(ballot: Ballot) -> bool:
    return 2 * len(ballot.granted) > len(ballot.voters)


def lacks(ballot: Ballot, joined: Collection[str]) -> list[int]:
    """The numbers that another root may have won, and of which no machine is a witness: none that trained has joined.

    Args:
        joined: the disks of the machines that have joined this root, and not left.
    """
    return sorted(number for number, trained in ballot.before if not trained & set(joined))


def is_won(ballot: Ballot, joined: Collection[str]) -> bool:
    return has_majority(ballot) and not lacks(ballot, joined)
