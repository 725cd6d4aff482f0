"""What the next generation resumes from, found out step by step. Pure: ``service.py`` passes asks to workers, and answers back.

    holds        every machine says which shards lie in its memory
    checkpoints  machine 0 says which lie in storage: at the first generation of a start, later only if memory lacks a shard
    memory       a machine gets shards from another one's memory
    storage      a machine reads shards of a checkpoint

Then every machine holds what its ranks need. A copy that turns out damaged, or that cannot be had, is refused, and the plan is
made anew from what is left: an older snapshot in the end, or none at all. The trainers say then whether they may begin at
step 0. Every ask has a number of its own, so the answer to an ask of an earlier planning is nobody's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

from gemini_gnn.snapshot.replicas.plan import DISK, Copy, Get, needs_of, plan
from gemini_gnn.snapshot.store.identity import Identity


class Kind(StrEnum):
    HOLDS = "holds"
    CHECKPOINTS = "checkpoints"
    MEMORY = "memory"
    STORAGE = "storage"


class Storage(StrEnum):
    """When checkpoints are looked at."""

    AT_ONCE = "at once"  # they may be newer than what memory holds
    IF_NEEDED = "if needed"  # memory lacks a shard
    NEVER = "never"  # there are none


class Ask(NamedTuple):
    """To a machine's worker. ``gets``: of MEMORY and STORAGE, all of one identity."""

    number: int
    machine: int
    kind: Kind
    identity: Identity | None = None
    gets: tuple[Get, ...] = ()


@dataclass(frozen=True)
class Restoring:
    """
    Attributes:
        ranks_of: by machine its ranks.
        next: number of the next ask.
        open: asks without an answer.
        copies: that are known. refused: those of them that turned out damaged or could not be had.
        listed: the checkpoints were asked for, or there are none.
        done: nothing is left to be asked; ``identity`` is what the next generation resumes from, None: nothing.
    """

    ranks_of: tuple[tuple[int, ...], ...]
    next: int
    open: tuple[Ask, ...] = ()
    copies: frozenset[Copy] = frozenset()
    refused: frozenset[Copy] = frozenset()
    listed: bool = False
    done: bool = False
    identity: Identity | None = None


Step = tuple[Restoring, list[Ask]]


def begin(ranks_of: Sequence[Sequence[int]], number: int, storage: Storage) -> Step:
    """Ask all machines what they hold."""
    state = Restoring(tuple(map(tuple, ranks_of)), number, listed=storage is not Storage.IF_NEEDED)
    asked = [(machine, Kind.HOLDS) for machine in range(len(ranks_of))]
    return _ask(state, [*asked, (0, Kind.CHECKPOINTS)] if storage is Storage.AT_ONCE else asked)


def answered(state: Restoring, number: int, copies: Iterable[Copy] = (), misses: Collection[Get] = ()) -> Step:
    """The answer to ask ``number``.

    Args:
        copies: that a machine, or storage, turned out to hold.
        misses: of the ask's ``gets``, those that failed.
    """
    ask = next((one for one in state.open if one.number == number), None)
    if ask is None:
        return state, []
    state = replace(state, open=tuple(one for one in state.open if one is not ask))
    state = replace(state, copies=state.copies | frozenset(copies))
    if ask.identity is not None:
        got = {Copy(get.shard, ask.identity, get.machine) for get in ask.gets if get not in misses}
        failed = {Copy(get.shard, ask.identity, get.source) for get in misses}
        state = replace(state, copies=state.copies | got, refused=state.refused | failed)
    return (state, []) if state.open else _plan(state)


def _plan(state: Restoring) -> Step:
    """Every answer is there."""
    # What is needed does not depend on which copies turned out bad.
    found = plan(state.copies, needs_of(state.copies, state.ranks_of), state.refused)
    if found is None and not state.listed:
        return _ask(replace(state, listed=True), [(0, Kind.CHECKPOINTS)])
    if found is None or not found.fetches:
        return replace(state, done=True, identity=None if found is None else found.identity), []
    orders: dict[tuple[int, Kind], tuple[Get, ...]] = {}
    for get in found.fetches:
        key = get.machine, Kind.STORAGE if get.source == DISK else Kind.MEMORY
        orders[key] = (*orders.get(key, ()), get)
    return _ask(state, list(orders), found.identity, orders)


def _ask(
    state: Restoring,
    asked: Sequence[tuple[int, Kind]],
    identity: Identity | None = None,
    orders: dict[tuple[int, Kind], tuple[Get, ...]] | None = None,
) -> Step:
    asks = [
        Ask(state.next + i, machine, kind, identity, (orders or {}).get((machine, kind), ()))
        for i, (machine, kind) in enumerate(asked)
    ]
    return replace(state, next=state.next + len(asks), open=tuple(asks)), asks
