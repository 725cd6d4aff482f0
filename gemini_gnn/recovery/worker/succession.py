"""Where a worker that has lost its root looks for one, and when it becomes root itself. Pure; ``now`` in seconds.

A machine that holds a newer term is tried first (``terms.Watch``). Then the lost root is tried alone for a while if its
connection only broke: an agent that died has an heir. Then the machines before this one are tried: of all that are left the
first is to become root. When each of them has been tried without an answer, this machine is that one. It goes on looking all
the same: it may have been cut off alone. It follows any root with a term, and any candidate before it. Where machines share
no run directory, none tells of a newer term: then it looks at the machines after it, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from gemini_gnn.recovery.messages import Member


class Target(NamedTuple):
    """Where a root agent may answer."""

    address: str
    port: int


@dataclass(frozen=True)
class Route:
    """
    Attributes:
        root: where the lost one answered; None: it was on this machine.
        until_s: until then only that one is tried.
        others: the machines before this one, in order.
        tried: number of attempts at them since then, and at the others in turn.
        asked: the holder of a newer term that was tried last.
        later: machines after this one, that are looked at, but do not keep it from becoming root.
    """

    root: Target | None
    until_s: float
    others: tuple[Target, ...] = ()
    tried: int = 0
    asked: Target | None = None
    later: tuple[Target, ...] = ()


def route(members: Sequence[Member], machine: int, root: Target | None, until_s: float, private: bool = False) -> Route:
    """
    Args:
        members: as the last root knew them, by number. machine: number of this one.
        private: machines share no run directory.
    """
    before, after = (
        tuple(at for one in some if one.port and (at := Target(one.address, one.port)) != root)
        for some in (members[:machine], members[machine + 1 :] if private else ())
    )
    return Route(root, until_s, before, later=after)


def following(route: Route, holder: Target | None, now: float) -> tuple[Route, Target | None]:
    """The target to try now; None: there is none.

    Args:
        holder: of a newer term than that of the lost root.
    """
    if holder is not None and holder != route.asked:
        return replace(route, asked=holder), holder
    if now < route.until_s and route.root is not None:
        return route, route.root
    targets = [*route.others, *([route.root] if route.root else []), *([holder] if holder is not None else [])]
    targets += route.later
    target = targets[route.tried % len(targets)] if targets else None
    return replace(route, tried=route.tried + 1), target


def is_next(route: Route, now: float) -> bool:
    """Whether this machine is to become root: none before it has answered."""
    return (now >= route.until_s or route.root is None) and route.tried >= len(route.others)


def holder_of(record: dict[str, Any], term: int, start: str, own: Target) -> Target | None:
    """Where the holder of a newer term than ``term`` answers, if it is a root of the same job. ``own``: of this machine."""
    if record.get("term", 0) <= term or record.get("start") != start or not record.get("port"):
        return None
    found = Target(str(record.get("address")), int(record["port"]))
    return None if found == own else found
