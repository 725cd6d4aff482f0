"""Which machines keep whose shards, and how likely that survives lost machines. Pure.

GEMINI (SOSP'23, section 4): where m copies divide N machines, groups of m keep each other's shards. Otherwise
floor(N/m) - 1 such groups are made, and the remaining m + N mod m machines form a ring: the shards of each are also on the
next m - 1. So every machine keeps the shards of m - 1 others.

Groups are best against machines that die at random: fewer sets of m machines hold all copies of something. Machines that
die together (one rack, one switch) are a *failure domain*. If no domain has more than floor(N/m) machines, no two copies of
a shard need to share one: a ring in which each domain recurs after m machines at the earliest does it, and often groups do.
If a domain is larger, its machines write more copies than the others have room for: every machine keeps the shards of m - 1
others, no more. So some copies share it, as few as can be (tests compare with an upper bound).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from math import comb

from gemini_gnn.errors import SnapshotError

MOST_LOSSES = 4  # explained at the start of a job
MOST_NAMED = 8  # groups, or machines, in one explanation

Placement = tuple[tuple[int, ...], ...]


def placement(machines: int, replicas: int, domains: Sequence[str] = ()) -> Placement:
    """Per machine the ``replicas`` machines that hold its shards, itself first.

    Args:
        domains: the failure domain of each machine; none: every machine is one of its own.

    Raises:
        SnapshotError: there are fewer machines than replicas; not one domain per machine.
    """
    if not 1 <= replicas <= machines:
        raise SnapshotError(
            f"expected from 1 to {machines} replicas, for {machines} machines; got {replicas}. "
            "Set snapshot.replicas=auto, or start on more machines"
        )
    if domains and len(domains) != machines:
        raise SnapshotError(
            f"expected a failure domain for each of {machines} machines; got {len(domains)}. "
            "List one per host in snapshot.failure_domains, in the order of the hostfile"
        )
    most = machines // replicas
    groups = most - (machines % replicas > 0)
    best = _holders(range(machines), replicas, groups)
    if not domains:
        return best
    limit = machines * min(replicas, len(set(domains)))
    deals = [(most, n) for n in range(groups, -1, -1)]
    deals += [(hands, 0) for hands in range(most + 1, max(Counter(domains).values()) + 1)]
    for hands, n in deals:
        if _different(best, domains) == limit:
            break
        # Of equals the first: that with most groups.
        dealt = _holders(_dealt(domains, hands, replicas, n), replicas, n)
        best = max(best, dealt, key=lambda one: _different(one, domains))
    return best


def _holders(order: Sequence[int], replicas: int, groups: int) -> Placement:
    """The first ``groups * replicas`` machines of ``order`` in groups, the others in a ring."""
    ring = groups * replicas
    circles = [order[i : i + replicas] for i in range(0, ring, replicas)] + [order[ring:]]
    holders = {
        machine: tuple(circle[(i + j) % len(circle)] for j in range(replicas))
        for circle in circles
        for i, machine in enumerate(circle)
    }
    return tuple(holders[machine] for machine in range(len(order)))


def _dealt(domains: Sequence[str], hands: int, replicas: int, groups: int) -> list[int]:
    """An order in which machines of one domain are far apart: dealt in turn, like cards, domain by domain.

    The first ``groups`` hands get ``replicas`` machines each; the ring consists of the other hands, one after the other.
    """
    size = Counter(domains)
    # Large domains first: one with as many machines as there are hands gets exactly one machine into each.
    pack = sorted(range(len(domains)), key=lambda machine: (-size[domains[machine]], domains[machine], machine))
    dealt: list[list[int]] = [[] for _ in range(hands)]
    for i, machine in enumerate(pack):
        over = i - hands * replicas
        dealt[i % hands if over < 0 else groups + over % (hands - groups)].append(machine)
    return [machine for hand in dealt for machine in hand]


def _different(holders: Placement, domains: Sequence[str]) -> int:
    """In how many failure domains the copies of each shard are; the sum over all machines."""
    return sum(len({domains[holder] for holder in one}) for one in holders)


def kept(holders: Placement, machine: int) -> tuple[int, ...]:
    """The machines whose shards ``machine`` keeps; not itself."""
    return tuple(owner for owner, one in enumerate(holders) if machine in one[1:])


def survives(holders: Placement, lost: Iterable[int]) -> bool:
    """Whether every shard has a copy on a machine that is not ``lost``."""
    gone = frozenset(lost)
    return not any(gone.issuperset(holders[machine]) for machine in gone)  # the first holder is the machine itself


def survival(holders: Placement, lost: int) -> float:
    """The probability that ``lost`` machines, all equally likely and lost at once, leave every shard a copy.

    Circles (groups and the ring) share no shards. So the ways to lose some machines in each of them are counted one by one
    and multiplied as polynomials.

    Raises:
        SnapshotError: there are not so many machines.
    """
    machines = len(holders)
    if not 0 <= lost <= machines:
        raise SnapshotError(f"expected from 0 to {machines} lost machines, of {machines}; got {lost}")
    replicas = len(holders[0])
    if lost < replicas:
        return 1.0
    ways = [1] + [0] * lost  # by number of lost machines, over the circles so far
    for size, many in Counter(len(circle) for circle in _circles(holders)).items():
        here = [_ways(size, n, replicas) for n in range(min(lost, size) + 1)]
        for _ in range(many):
            ways = [sum(ways[n - i] * here[i] for i in range(min(n + 1, len(here)))) for n in range(lost + 1)]
    return ways[lost] / comb(machines, lost)


def _ways(size: int, lost: int, replicas: int) -> int:
    """In how many ways ``lost`` of a circle of ``size`` machines are no ``replicas`` neighbors.

    Begin at a machine that is left: each machine that is left has from 0 to replicas - 1 lost ones behind it. So the number
    is the coefficient of x^lost in (1 + ... + x^(replicas-1))^left, times the ``size`` machines at which the round may
    begin, by the ``left`` beginnings that are the same round.
    """
    left = size - lost
    if not left:
        return 0
    terms = (
        (-1) ** i * comb(left, i) * comb(lost - i * replicas + left - 1, left - 1) for i in range(lost // replicas + 1)
    )
    return size * sum(terms) // left


def survival_closed_form(machines: int, replicas: int, lost: int) -> float:
    """GEMINI's formula for groups: at most one group can be lost whole.

    Raises:
        SnapshotError: the machines do not divide into groups, or two groups could be lost.
    """
    if not 1 <= replicas <= machines or machines % replicas or not 0 <= lost < min(2 * replicas, machines + 1):
        raise SnapshotError(
            f"expected replicas that divide {machines} machines, and fewer than twice as many lost machines; "
            f"got {replicas} replicas, {lost} lost. Use survival()"
        )
    if lost < replicas:
        return 1.0
    return 1 - machines // replicas * comb(machines - replicas, lost - replicas) / comb(machines, lost)


def _circles(holders: Placement) -> list[list[int]]:
    """The groups and the ring. The machine that comes next in a circle keeps the shards of the one before."""
    circles: list[list[int]] = []
    seen: set[int] = set()
    for first in range(len(holders)):
        circle: list[int] = []
        machine = first
        while machine not in seen:
            seen.add(machine)
            circle.append(machine)
            machine = holders[machine][1 % len(holders[machine])]
        circles += [circle] if circle else []
    return circles


def explain(holders: Placement, names: Sequence[str], domains: Sequence[str] = ()) -> list[str]:
    """Who keeps whose shards, and what that survives: the lines that the start of a job prints."""
    losses = range(1, min(MOST_LOSSES, len(holders) - 1) + 1)
    chances = ", ".join(f"{lost}: {_percent(survival(holders, lost))}" for lost in losses)
    return [
        *_who(holders, names),
        *([f"probability that memory keeps every shard, by machines lost at once: {chances}"] if chances else []),
        *_shared(holders, names, domains),
    ]


def _who(holders: Placement, names: Sequence[str]) -> list[str]:
    replicas = len(holders[0])
    if replicas == 1:
        return ["replicas=1: every machine keeps its own shards only; if one is lost, its shards are lost"]
    circles = [[names[machine] for machine in circle] for circle in _circles(holders)]
    groups = [" ".join(circle) for circle in circles if len(circle) == replicas]
    more = [f"and {len(groups) - MOST_NAMED} more groups of {replicas}"] if len(groups) > MOST_NAMED else []
    keep = ["these machines keep each other's shards: " + "; ".join(groups[:MOST_NAMED] + more)] if groups else []
    for circle in circles:
        if len(circle) > replicas:
            following = "machine keeps" if replicas == 2 else f"{replicas - 1} machines keep"
            more = [f"{len(circle) - MOST_NAMED} more"] if len(circle) > MOST_NAMED else []
            path = " > ".join([*circle[:MOST_NAMED], *more, circle[0]])
            keep.append(f"in the ring {path} the next {following} the shards of each")
    return [f"replicas={replicas}: {line}" for line in keep]


def _shared(holders: Placement, names: Sequence[str], domains: Sequence[str]) -> list[str]:
    """Whether copies of a shard share a failure domain, and why."""
    if not domains or len(holders[0]) == 1:
        return []
    shared = [names[m] for m, one in enumerate(holders) if len({domains[h] for h in one}) < len(one)]
    if not shared:
        return ["no two copies of a shard are in one failure domain"]
    machines, most = len(holders), len(holders) // len(holders[0])
    large = [f"{name} has {n} of {machines} machines" for name, n in Counter(domains).most_common() if n > most]
    return [
        f"copies of the shards of {_listed(shared)} share a failure domain: {_listed(large)}; "
        f"with {len(holders[0])} replicas at most {most} can be kept apart"
    ]


def _listed(words: Sequence[str]) -> str:
    if len(words) > MOST_NAMED:
        words = [*words[:MOST_NAMED], f"{len(words) - MOST_NAMED} more"]
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _percent(chance: float) -> str:
    """Never 100 % or 0 % of what is not certain."""
    if chance in (0.0, 1.0):
        return f"{chance:.0%}".replace("%", " %")
    return f"{min(max(chance, 0.001), 0.999) * 100:.1f} %"
