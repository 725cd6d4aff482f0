"""Every order of events when machines, roots and links are lost, for small jobs: the real decisions of all roots at once.

The model: hosts of one rank each, links between them that may be cut, and the claims of terms as one shared counter, which all
hosts reach. A host has a worker, and may have a root: with a term, or as a candidate. Both ends of a connection notice its end
by themselves, in any order; a host that is lost or cut off is silent. Messages over a connection that both ends still have
arrive at once. A worker that has lost its root kills its trainer and looks for a root, or becomes a candidate. A candidate may
leave for another root. Planning, claims and reaping take their time. Long deadlines pass only if nothing else can happen.

What holds in every state:
    (a) of all generations, at most one has all its trainers: only that one can step;
    (b) no root begins a generation under a term that is not the newest, unless its orders do not even reach all seats;
    (c) each term has one holder;
    (d) if no more goes wrong and the links are whole again, a job trains on all its seats, or has ended everywhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

import pytest

from gemini_gnn.recovery.root.decisions import decide
from gemini_gnn.recovery.root.state import (
    Begin,
    Claim,
    Claimed,
    Close,
    Exited,
    Finish,
    Gone,
    Joined,
    Limits,
    Phase,
    Plan,
    Planned,
    Ready,
    Resign,
    State,
    Tick,
    Unreached,
    forming,
    succeeding,
)

LIMITS = Limits(same_step_failures=1000)
LONG_S = LIMITS.return_s  # longer deadlines pass only if nothing else can happen
FAULTS = frozenset({"power", "back", "agent", "trainer", "host", "link"})
NETWORK = frozenset({"host", "link"})


class Key(NamedTuple):
    """A generation: its number, and who has the seats."""

    term: int
    generation: int
    seats: tuple[int, ...]


class Order(NamedTuple):
    """A claim that is under way: of the term after ``term``. ``won``: its result."""

    term: int
    seats: tuple[int, ...]
    witness: bool
    won: bool | None = None

    @property
    def made(self) -> int | None:
        """The term that was claimed."""
        return self.term + 1 if self.won else None


class Root(NamedTuple):
    """As ``service.Root``. ``holds``: it has beats. ``links``: workers whose connection it has not seen end."""

    state: State
    term: int
    holds: bool
    links: frozenset[int] = frozenset()
    planning: bool = False
    claim: Order | None = None
    again: bool | None = None


class Knows(NamedTuple):
    """A worker's roster: newest term, its seats, the newest generation, and the host of the root."""

    term: int
    seats: tuple[int, ...]
    generation: int
    root: int


class Host(NamedTuple):
    """
    Attributes:
        how: "up" | "down" | "over" (the job has ended there).
        link: host of the root that it has not lost. dead: nothing comes through any more; the link was cut.
        silent: that was how the last root was lost.
        closing: its trainer is being killed.
    """

    knows: Knows
    how: str = "up"
    link: int | None = None
    dead: bool = False
    silent: bool = False
    trainer: Key | None = None
    closing: bool = False
    root: Root | None = None


class World(NamedTuple):
    """
    Attributes:
        terms: host of the holder and seats, by term - 1.
        kinds, faults: what may go wrong, and how often still. cut: links that carry nothing.
    """

    hosts: tuple[Host, ...]
    terms: tuple[tuple[int, tuple[int, ...]], ...]
    kinds: frozenset[str]
    faults: int
    cut: frozenset[tuple[int, int]] = frozenset()


def beginning(seats: int, standbys: int, faults: int, kinds: frozenset[str] = FAULTS) -> World:
    """All trains, with the root on host 0."""
    count, seated = seats + standbys, tuple(range(seats))
    state = forming(count, 1, LIMITS, standbys=standbys)
    hosts = tuple(Host(Knows(1, seated, 0, 0), link=0) for _ in range(count))
    world = World(hosts, ((0, seated),), kinds, faults)
    world = put(world, 0, root=Root(state, 1, True))
    for number in range(count):
        world = joins(world, number, 0)
    (world,) = [after for label, after in moves(world._replace(faults=0)) if "planned" in label]
    return world._replace(faults=faults)


# --- what happens to the parts --------------------------------------------------------------------------------------------


def put(world: World, number: int, **changes: Any) -> World:
    hosts = list(world.hosts)
    hosts[number] = hosts[number]._replace(**changes)
    return world._replace(hosts=tuple(hosts))


def put_root(world: World, number: int, **changes: Any) -> World:
    root = world.hosts[number].root
    assert root is not None
    return put(world, number, root=root._replace(**changes))


def reach(world: World, one: int, other: int) -> bool:
    return one == other or (min(one, other), max(one, other)) not in world.cut


def whole(world: World, worker: int, host: int | None) -> bool:
    """Whether what one end of the connection says arrives at the other."""
    if host is None:
        return False
    here, there = world.hosts[worker], world.hosts[host]
    knows = here.link == host and there.root is not None and worker in there.root.links
    return knows and here.how == there.how == "up" and not here.dead


def to_root(world: World, number: int, event: Any) -> World:
    """The root on host ``number`` sees ``event``; its orders arrive where a connection is whole."""
    root = world.hosts[number].root
    if root is None:
        return world
    state, actions = decide(root.state, event, 0.0)
    state = replace(state, cause=None, row=0, row_step=-1, failures=(), codes=())  # of influence on texts only
    world = put_root(world, number, state=state)
    for action in actions:
        root = world.hosts[number].root
        if root is None:
            break
        workers = [one for one in sorted(root.links) if whole(world, one, number)]
        match action:
            case Plan():
                world = put_root(world, number, planning=True)
            case Claim(witness):
                world = put_root(world, number, again=witness)
                if root.claim is None:
                    world = claims(world, number)
            case Begin(generation):
                world = begins(world, number, generation, workers)
            case Close():
                for one in workers:
                    if world.hosts[one].trainer is not None:
                        world = put(world, one, closing=True)
            case Resign():
                world = without_root(world, number)
            case Finish():
                for one in workers:
                    world = put(world, one, how="over", link=None, trainer=None, closing=False, root=None)
    return world


def claims(world: World, number: int) -> World:
    """As ``Root._look_at_claim``: one claim at a time."""
    root = world.hosts[number].root
    if root is None or root.again is None or root.claim is not None:
        return world
    order = Order(root.term, root.state.seats, root.again)
    return put_root(world, number, claim=order, again=None)


def begins(world: World, number: int, generation: int, workers: list[int]) -> World:
    root = world.hosts[number].root
    newest = root.term == len(world.terms)
    assert newest or not set(root.state.seats) <= set(workers), f"(b) under term {root.term} of {len(world.terms)}"
    assert root.holds and world.terms[root.term - 1][0] == number, "(c) another root has this term"
    key = Key(root.term, generation, root.state.seats)
    for one in workers:
        world = put(world, one, knows=Knows(root.term, root.state.seats, generation, number))
        if one in key.seats:
            assert world.hosts[one].trainer is None, "a trainer lives"
            world = put(world, one, trainer=key)
    return world


def joins(world: World, worker: int, host: int) -> World:
    here, root = world.hosts[worker], world.hosts[host].root
    assert here.trainer is None and root is not None
    knows = Knows(max(here.knows.term, root.term), root.state.trained, root.state.generation, host)
    generation = here.knows.generation
    world = put(world, worker, link=host, dead=False, silent=False, knows=knows)
    if worker in root.links:
        world = to_root(world, host, Gone(worker, "agent", "has come again"))
    if world.hosts[host].root is None:
        return world
    world = put_root(world, host, links=root.links | {worker})
    world = to_root(world, host, Joined(worker, f"h{worker}", generation))
    return to_root(world, host, Ready(worker))


def loses_root(world: World, worker: int, silent: bool) -> World:
    return put(world, worker, link=None, dead=False, silent=silent, trainer=None, closing=False)


def without_root(world: World, number: int) -> World:
    """Its connections end. The worker of the same host notices at once."""
    world = put(world, number, root=None)
    return loses_root(world, number, False) if world.hosts[number].link == number else world


def candidate(world: World, number: int, knows: Knows) -> World:
    here = world.hosts[number]
    lost = knows.root if here.silent and knows.root != number else None
    names = [f"h{one}" for one in range(len(world.hosts))]
    known = {"root": number, "lost": lost, "generation": knows.generation, "reached": 0, "cause": None, "now": 0.0}
    state = succeeding(names, knows.seats, 1, LIMITS, **known)
    return joins(put(world, number, root=Root(state, knows.term, False)), number, number)


def earlier(state: State, by_s: float) -> State:
    """So much time passes for a root. Its clock always says 0, and what is long ago is long ago."""
    machines = tuple(replace(one, since_s=max(one.since_s - by_s, -LIMITS.wait_s)) for one in state.machines)
    return replace(state, machines=machines, deadline=state.deadline - by_s)


# --- what can happen ------------------------------------------------------------------------------------------------------


Moves = Iterator[tuple[str, World]]


def moves(world: World) -> list[tuple[str, World]]:
    """Label and world; a fair scheduler takes the first."""
    found = [*ends_are_noticed(world), *roots_go_on(world), *roots_are_sought(world)]
    found += deadlines(world, bool(found))
    if world.cut:
        found.append(("the links are whole", world._replace(cut=frozenset())))
    if world.faults:
        paid = world._replace(faults=world.faults - 1)
        found += [(f"FAULT: {words}", after) for kind, words, after in faults(paid) if kind in world.kinds]
    return found


def ends_are_noticed(world: World) -> Moves:
    for number, host in enumerate(world.hosts):
        if host.how != "up":
            continue
        if host.link is not None and not whole(world, number, host.link):
            silent = host.dead or world.hosts[host.link].how == "down"
            yield f"h{number} loses its root", loses_root(world, number, silent)
        if host.closing:
            after, rank = put(world, number, trainer=None, closing=False), host.trainer.seats.index(number)
            if whole(world, number, host.link):
                after = to_root(after, host.link, Exited(rank, host.trainer.generation, -9))
            yield f"h{number} reaps its trainer", after
        for worker in sorted(host.root.links) if host.root is not None else ():
            if not whole(world, worker, number):
                gone = world.hosts[worker]
                silent = gone.how == "down" or (gone.dead and gone.link == number)
                after = put_root(world, number, links=host.root.links - {worker})
                after = to_root(after, number, Gone(worker, "silent" if silent else "agent", "is gone"))
                yield f"the root on h{number} loses h{worker}", after


def roots_go_on(world: World) -> Moves:
    for number, host in enumerate(world.hosts):
        root = host.root
        if root is None:
            continue
        if root.claim is not None and root.claim.won is None and (made := claim_made(world, number)) is not None:
            yield f"the claim of h{number} is made", made
        if root.claim is not None and root.claim.won is not None:
            yield f"h{number} reads its claim", claim_read(world, number)
        if root.planning and all(whole(world, one, number) for one in root.links):
            after = put_root(world, number, planning=False)
            yield f"h{number} has planned", to_root(after, number, Planned())
        for other in unreached(world, number):
            yield f"h{number} finds h{other} unreached", to_root(world, number, Unreached(other))
        if root.holds and root.term < len(world.terms) and root.claim is None and root.state.phase is not Phase.ENDED:
            yield f"h{number} sees a newer term", without_root(world, number)


def unreached(world: World, number: int) -> list[int]:
    """As ``probes.Probes``: whom a root that takes over has not heard of, and does not reach."""
    state, hosts = world.hosts[number].root.state, enumerate(world.hosts)
    if state.claimed:
        return []
    away = [one for one, host in hosts if host.how == "down" or not reach(world, number, one)]
    return [one for one in away if not state.machines[one].here and not state.machines[one].silent]


def claim_made(world: World, number: int) -> World | None:
    """As ``claiming.Claim``; None: it still waits."""
    root = world.hosts[number].root
    order, newest = root.claim, len(world.terms)
    if not order.witness and not root.holds:
        holder = world.hosts[world.terms[-1][0]].root
        if holder is not None and newest in (holder.term * holder.holds, holder.claim and holder.claim.made):
            return put_root(world, number, claim=order._replace(won=False))  # it beats
    if not order.witness and any(one.trainer and not whole(world, n, one.link) for n, one in enumerate(world.hosts)):
        return None  # its worker will notice long before this claim goes on
    won = (not order.witness and not root.holds) or newest == order.term
    world = put_root(world, number, claim=order._replace(won=won, term=newest))
    return world._replace(terms=(*world.terms, (number, order.seats))) if won else world


def claim_read(world: World, number: int) -> World:
    root = world.hosts[number].root
    order = root.claim
    world = put_root(world, number, claim=None)
    if order.won:
        world = put_root(world, number, term=order.made, holds=True)
    if not order.won or root.again is None:
        world = to_root(world, number, Claimed(order.won))
    return claims(world, number)


def roots_are_sought(world: World) -> Moves:
    for number, host in enumerate(world.hosts):
        if host.how != "up" or host.trainer is not None or (host.link is not None and host.link != number):
            continue
        root = host.root
        if root is not None and (root.state.claimed or root.holds or root.state.phase is Phase.CLAIMING):
            continue  # nothing else is looked for
        answers = [one for one in range(len(world.hosts)) if answers_to(world, number, one)]
        for other in answers:
            left = without_root(world, number) if root is not None else world
            yield f"h{number} joins h{other}", joins(left, number, other)
        if root is None and host.link is None and not [one for one in answers if one < number]:
            newest = host.knows
            if newest.term < len(world.terms):
                newest = newest._replace(term=len(world.terms), seats=world.terms[-1][1])
                yield f"h{number} becomes root as the run directory says", candidate(world, number, newest)
            yield f"h{number} becomes root", candidate(world, number, host.knows)


def answers_to(world: World, number: int, other: int) -> bool:
    """Whether a worker that seeks tries that host, and is welcome."""
    here, there = world.hosts[number], world.hosts[other]
    if other == number or there.how != "up" or there.root is None or not reach(world, number, other):
        return False
    tried = other < number or other == here.knows.root or there.root.holds
    return tried and there.root.term >= here.knows.term and there.root.state.phase is not Phase.ENDED


def deadlines(world: World, something_else: bool) -> list[tuple[str, World]]:
    found = []
    for number, host in enumerate(world.hosts):
        if host.root is None or host.root.state.deadline is None:
            continue
        by_s = host.root.state.deadline
        if by_s <= LONG_S or not something_else:
            after = put_root(world, number, state=earlier(host.root.state, by_s))
            found.append((f"{by_s:g} s pass for h{number}", to_root(after, number, Tick())))
    return sorted(found, key=lambda one: one[0]) if not something_else else found


def faults(world: World) -> Iterator[tuple[str, str, World]]:
    numbers = range(len(world.hosts))
    pairs = frozenset(combinations(numbers, 2))
    for number, host in enumerate(world.hosts):
        anew = Knows(len(world.terms), world.terms[-1][1], host.knows.generation, world.terms[-1][0])
        fresh = Host(anew)
        if host.how == "down":
            yield "back", f"h{number} is back", put_host(world, number, fresh)
        if host.how != "up":
            continue
        yield "power", f"h{number} loses its power", put_host(world, number, Host(host.knows, "down"))
        yield "agent", f"the agent of h{number} is killed", put_host(world, number, fresh)
        if len(numbers) > 2:
            yield "host", f"h{number} is cut off", without(world, {pair for pair in pairs if number in pair})
        if host.trainer is not None and not host.closing:
            rank = host.trainer.seats.index(number)
            after = put(world, number, trainer=None)
            if whole(world, number, host.link):
                after = to_root(after, host.link, Exited(rank, host.trainer.generation, -9))
            yield "trainer", f"the trainer on h{number} is killed", after
    for pair in sorted(pairs - world.cut):
        yield "link", f"the link of {pair} is cut", without(world, {pair})


def without(world: World, links: set[tuple[int, int]]) -> World:
    world = world._replace(cut=world.cut | links)
    for number, host in enumerate(world.hosts):
        if host.link is not None and not reach(world, number, host.link):
            world = put(world, number, dead=True)
    return world


def put_host(world: World, number: int, host: Host) -> World:
    return put(world, number, **host._asdict())


# --- all of it ----------------------------------------------------------------------------------------------------------


def check(world: World) -> None:
    keys = {one.trainer for one in world.hosts if one.trainer is not None}
    able = [key for key in keys if all(world.hosts[number].trainer == key for number in key.seats)]
    assert len(able) <= 1, f"(a) two generations can step: {able}"
    held = [one.root.term for one in world.hosts if one.root is not None and one.root.holds]
    assert len(set(held)) == len(held), f"(c) a term has two holders: {held}"


def settled(world: World) -> bool:
    """A job trains on all its seats, with all hosts that are up; or it has ended on all."""
    up = [one for one in world.hosts if one.how == "up"]
    if not up:
        return True
    keys = {world.hosts[number].trainer for number in world.terms[-1][1]}
    root = world.hosts[world.terms[-1][0]].root
    trains = root is not None and root.state.phase is Phase.RUNNING and len(keys) == 1 and None not in keys
    return trains and all(whole(world, number, one.link) for number, one in enumerate(world.hosts) if one.how == "up")


def settles(world: World, known: set[World]) -> None:
    """With a fair scheduler and no more faults, from here."""
    world, path, steps = world._replace(cut=frozenset(), faults=0), [], []
    while world not in known and not settled(world):
        path.append(world)
        found = moves(world)
        assert found, f"(d) nothing can happen\n{world}\nquietly\n" + "\n".join(steps)
        assert len(path) < 300, f"(d) it goes on and on\n{world}\nquietly\n" + "\n".join(steps[-40:])
        label, world = found[0]
        check(world)
        steps.append(f"  {label}")
    known.update(path)


def explore(start: World) -> int:
    """Visit every state that can follow. Returns how many there are."""
    numbers, worlds, came, known = {start: 0}, [start], [(-1, "")], set()
    queue = deque([0])
    while queue:
        number = queue.popleft()
        try:
            settles(worlds[number], known)
            found = moves(worlds[number])
            for _, world in found:
                check(world)
        except AssertionError as error:
            raise AssertionError(f"{error}\nafter\n{path_to(number, came)}") from error
        for label, world in found:
            if world not in numbers:
                numbers[world] = len(worlds)
                queue.append(len(worlds))
                worlds.append(world)
                came.append((number, label))
    return len(worlds)


def path_to(number: int, came: list[tuple[int, str]]) -> str:
    words = []
    while number > 0:
        number, label = came[number]
        words.append(f"  {label}")
    return "\n".join(reversed(words))


CASES = [
    (1, 1, 2, FAULTS),
    (2, 0, 2, FAULTS),
    (2, 1, 1, FAULTS),
    pytest.param(2, 1, 2, NETWORK, marks=pytest.mark.long),
    pytest.param(2, 1, 2, FAULTS, marks=pytest.mark.long),
]


@pytest.mark.parametrize(("seats", "standbys", "faults", "kinds"), CASES)
def test_every_order_of_losses(seats, standbys, faults, kinds):
    assert explore(beginning(seats, standbys, faults, kinds)) > 100
