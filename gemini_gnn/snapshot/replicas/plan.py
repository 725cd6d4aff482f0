"""Which snapshot a job goes on from, and which machine gets which shard from where. Pure.

A *copy* is a shard under one identity, committed in the memory of a machine or in a complete checkpoint on disk. Shards are
combined under one identity only. So a plan is the newest identity under which every machine finds all it needs somewhere.

Before training goes on, each machine frees the slots that would be in the way (``obsolete``). Two snapshots are never given
up: the one that is restored, since nobody has newer work; and the newest one that already has all its copies
(``replicated``), since the restored one may have a single copy, and a second machine may be lost before it has more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from gemini_gnn.snapshot.store.catalog import SlotView, newer
from gemini_gnn.snapshot.store.format import SlotState
from gemini_gnn.snapshot.store.identity import COMMON, Identity, shard_of

DISK = -1  # the place of a copy in a checkpoint
MOST_NAMED = 8  # shards named in a row of the table

Needs = Sequence[Collection[str]]  # by machine, the shards that its ranks are restored from


class Copy(NamedTuple):
    """One shard of one snapshot. ``place``: the machine that has it in memory, or DISK."""

    shard: str
    identity: Identity
    place: int


class Get(NamedTuple):
    """``machine`` lacks ``shard``, and gets it from ``source``: another machine, or DISK."""

    machine: int
    shard: str
    source: int


class Plan(NamedTuple):
    """Restore ``identity``, after these ``fetches``."""

    identity: Identity
    fetches: tuple[Get, ...]


def needs_of(copies: Iterable[Copy], ranks_of: Sequence[Sequence[int]]) -> list[set[str]]:
    """By machine, the shards of its ranks; the common one too, if any snapshot has one. A standby needs none.

    Args:
        ranks_of: by machine its ranks.
    """
    common = {COMMON} & {copy.shard for copy in copies}
    return [common | {shard_of(rank) for rank in ranks} if ranks else set() for ranks in ranks_of]


def plan(copies: Iterable[Copy], needs: Needs, refused: Iterable[Copy] = ()) -> Plan | None:
    """The newest snapshot that can be restored, or None.

    Args:
        copies: all that is held anywhere. needs: see :func:`needs_of`.
        refused: copies that turned out damaged or out of reach.
    """
    places = _places(set(copies).difference(refused))
    for identity in sorted(places, reverse=True):
        if not _lacking(places[identity], needs):
            return Plan(identity, _fetches(places[identity], needs))
    return None


def _places(copies: Iterable[Copy]) -> dict[Identity, dict[str, set[int]]]:
    found: dict[Identity, dict[str, set[int]]] = {}
    for shard, identity, place in copies:
        found.setdefault(identity, {}).setdefault(shard, set()).add(place)
    return found


def _lacking(places: Mapping[str, Collection[int]], needs: Needs) -> list[str]:
    """The needed shards that are nowhere."""
    return sorted(set().union(*needs).difference(places))


def _fetches(places: Mapping[str, set[int]], needs: Needs) -> tuple[Get, ...]:
    """Memory before disk, and a machine that gives little before a busy one. Shards with few sources choose first."""
    wanted = [
        (machine, shard) for machine, shards in enumerate(needs) for shard in shards if machine not in places[shard]
    ]
    busy: Counter[int] = Counter()
    gets = []
    for machine, shard in sorted(wanted, key=lambda want: (len(places[want[1]] - {DISK}), want)):
        source = min(places[shard], key=lambda place: (place == DISK, busy[place], place))
        busy[source] += 1
        gets.append(Get(machine, shard, source))
    return tuple(sorted(gets))


def recoverable(reports: Mapping[int, Collection[Identity]], machines: int) -> Identity | None:
    """The newest snapshot of which every machine has reported that all its own shards have their copies, or None.

    Not the oldest of the newest reports: a machine may have reported a snapshot that another one never copied.
    """
    reported = [set(reports.get(machine, ())) for machine in range(machines)]
    return max(set.intersection(*reported), default=None) if reported else None


def replicated(
    copies: Iterable[Copy], needs: Needs, holders: Sequence[Sequence[int]], newest: Identity
) -> Identity | None:
    """The newest snapshot, ``newest`` or an older one, that has all its copies in memory; or None.

    It is recoverable before anything was reported: a new generation begins with it.

    Args:
        holders: by machine those that hold its shards (``placement.placement``). The common shard is on every machine.
    """
    for identity, places in sorted(_places(copies).items(), reverse=True):
        if identity <= newest and all(
            places.get(shard, set()).issuperset((machine,) if shard == COMMON else holders[machine])
            for machine, shards in enumerate(needs)
            for shard in shards
        ):
            return identity
    return None


def obsolete(slots: Iterable[SlotView], restored: Identity, kept: Identity | None) -> list[SlotView]:
    """The slots that a machine voids before it goes on from ``restored``.

    These are all newer ones, since their steps are computed again. Those between ``kept`` and ``restored`` would block
    the copies of what comes: they will never have all their own, and ``catalog.writable`` overwrites older than
    recoverable snapshots only.

    Args:
        slots: of own and of kept shards. kept: see :func:`replicated`.
    """
    slots = list(slots)
    between = [
        s
        for s in slots
        if s.state is not SlotState.VOID
        and s.identity is not None
        and s.identity < restored
        and (kept is None or s.identity > kept)
    ]
    return [*newer(slots, restored), *between]


def describe(chosen: Plan | None, copies: Iterable[Copy], needs: Needs, names: Sequence[str]) -> str:
    """What is held and where, one line per snapshot, for people.

    Args:
        chosen: what :func:`plan` made of ``copies`` (without the refused ones). names: of the machines.
    """
    places = _places(copies)
    if not places:
        return "no snapshot: neither in the memory of these machines nor on disk"
    rows = [("snapshot", "can be restored", "shards")]
    for identity in sorted(places, reverse=True):
        lacking = _lacking(places[identity], needs)
        if lacking:
            rows.append((str(identity), "no", f"nowhere: {_few(lacking)}"))
            continue
        picked = chosen is not None and identity == chosen.identity
        gets = chosen.fetches if chosen is not None and picked else _fetches(places[identity], needs)
        rows.append((str(identity), "yes, chosen" if picked else "yes", _from(gets, names)))
    if chosen is None:
        rows.append(("no snapshot can be restored", "", ""))
    widths = [max(len(row[i]) for row in rows if row[1]) for i in range(2)]
    return "\n".join(f"{a:{widths[0]}}  {b:{widths[1]}}  {c}".rstrip() for a, b, c in rows)


def _from(gets: Sequence[Get], names: Sequence[str]) -> str:
    if not gets:
        return "every machine has its own"
    return _few(
        [f"{names[g.machine]} gets {g.shard} from {'disk' if g.source == DISK else names[g.source]}" for g in gets]
    )


def _few(words: Sequence[str]) -> str:
    more = [f"and {len(words) - MOST_NAMED} more"] if len(words) > MOST_NAMED else []
    return ", ".join([*words[:MOST_NAMED], *more])
