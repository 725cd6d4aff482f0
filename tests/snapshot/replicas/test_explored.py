"""Every order of events in the life of slots, for small jobs: the real decisions over a model of all that is around them.

The model: each machine runs one rank. It has three slots of its own and two for the shards of each machine that it keeps, a
replicator that pushes one snapshot after the other, and a worker that hears late what is recoverable. Captures are agreed
on by all ranks; all else happens to each machine by itself, in any order. A *fault* need not happen: trainers are killed, a
machine is lost and replaced by an empty one, a connection breaks in mid-transfer.

What holds in every state, asserted where it could first break:
    (a) once a snapshot was recoverable, there is a plan whichever m - 1 machines are lost, and it never goes back behind the
        newest snapshot that ever was recoverable; lost copies do not count as there until they are made again;
    (b) without a loss no restart goes back behind the snapshot that the trainers went on from;
    (c) what arrives is what was sent: the source still holds it when the transfer ends;
    (d) what all machines have reported has all its copies until a newer snapshot has, unless a machine was lost since;
    (e) a snapshot that is to be persisted stays until it is;
    (f) nothing waits for ever: where nothing more can happen, all captures are done and the last one is recoverable.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from functools import cache
from itertools import combinations
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemini_gnn.snapshot.replicas import plan
from gemini_gnn.snapshot.replicas.placement import placement
from gemini_gnn.snapshot.store import catalog
from gemini_gnn.snapshot.store.catalog import OWN_SLOTS, SlotView
from gemini_gnn.snapshot.store.format import SlotState
from gemini_gnn.snapshot.store.identity import Identity, shard_of

FOREIGN_SLOTS = 2
MANY = 200_000  # states


class Cell(NamedTuple):
    """What a slot holds."""

    state: SlotState = SlotState.VOID
    identity: Identity | None = None


Cells = tuple[Cell, ...]
Holders = tuple[tuple[int, ...], ...]


class Machine(NamedTuple):
    """
    Attributes:
        own: slots of its rank. foreign: by distance to their owner, slots of the shards that it keeps.
        begun: it has voided what is obsolete and forked; its replicator works.
        known: the newest snapshot that it has heard to be recoverable.
        due: the capture that its rank has agreed to, and not begun.
        pushed: the newest snapshot that its replicator has begun to push.
        sends: by peer, how far that is: "" | "under way" | "there".
        unsaid: snapshots that have all their copies; the root has not heard of it. reported: it has.
        persist: "" | "asked" | "held" | "released". held: the snapshot whose slot is not overwritten.
    """

    own: Cells
    foreign: tuple[Cells, ...]
    begun: bool = True
    known: Identity | None = None
    due: Identity | None = None
    pushed: Identity | None = None
    sends: tuple[str, ...] = ()
    unsaid: tuple[Identity, ...] = ()
    reported: frozenset[Identity] = frozenset()
    persist: str = ""
    held: Identity | None = None


class World(NamedTuple):
    """
    Attributes:
        holders: see ``placement``. steps: the last step of the training. persists: checkpoints are asked for.
        kinds, faults: what may go wrong, and how often still.
        generation, step: of the last capture. restored: what the generation went on from.
        trains: no trainer was killed, no machine lost since the generation began.
        recoverable: in this generation, as the root knows it. floor: the newest that ever was.
        spare: so many machines may be lost now. hurt: a machine was lost in this generation.
    """

    holders: Holders
    steps: int
    kinds: frozenset[str]
    faults: int
    persists: bool
    machines: tuple[Machine, ...]
    generation: int = 1
    step: int = -1
    restored: Identity | None = None
    trains: bool = True
    recoverable: Identity | None = None
    floor: Identity | None = None
    spare: int = 0
    hurt: bool = False
    ended: str = ""


Moves = Iterator[tuple[str, World]]


def beginning(
    machines: int, replicas: int, steps: int, kinds: str = "", faults: int = 0, persists: bool = False
) -> World:
    holders = placement(machines, replicas)
    hosts = (empty(replicas),) * machines
    return World(holders, steps, frozenset(kinds.split()), faults, persists, hosts)


def empty(replicas: int) -> Machine:
    return Machine((Cell(),) * OWN_SLOTS, ((Cell(),) * FOREIGN_SLOTS,) * (replicas - 1), sends=("",) * (replicas - 1))


# --- slots --------------------------------------------------------------------------------------------------------------


@cache
def views(cells: Cells, held: Identity | None = None) -> list[SlotView]:
    return [
        SlotView("a shard", slot, cell.state, cell.identity, pinned=held is not None and cell.identity == held)
        for slot, cell in enumerate(cells)
    ]


@cache
def writable(cells: Cells, recoverable: Identity | None, held: Identity | None = None) -> int | None:
    return catalog.writable(views(cells, held), recoverable)


def holds(cells: Cells, identity: Identity) -> bool:
    return Cell(SlotState.COMMITTED, identity) in cells


def filled(cells: Cells, slot: int, cell: Cell) -> Cells:
    return (*cells[:slot], cell, *cells[slot + 1 :])


def committed(cells: Cells, identity: Identity) -> Cells:
    return filled(cells, cells.index(Cell(SlotState.WRITING, identity)), Cell(SlotState.COMMITTED, identity))


def newest(*identities: Identity | None) -> Identity | None:
    return max((i for i in identities if i is not None), default=None)


Held = tuple[tuple[Cells, tuple[Cells, ...]], ...]  # by machine, its own slots and the foreign ones


def held_by(world: World) -> Held:
    return tuple((one.own, one.foreign) for one in world.machines)


@cache
def copies_of(held: Held, holders: Holders, lost: tuple[int, ...] = ()) -> list[plan.Copy]:
    return [
        plan.Copy(shard_of(owner), cell.identity, machine)
        for owner, machines in enumerate(holders)
        for distance, machine in enumerate(machines)
        if machine not in lost
        for cell in (held[machine][1][distance - 1] if distance else held[machine][0])
        if cell.state is SlotState.COMMITTED and cell.identity is not None
    ]


@cache
def planned(held: Held, holders: Holders, lost: tuple[int, ...] = ()) -> plan.Plan | None:
    return plan.plan(copies_of(held, holders, lost), needs_of(held))


@cache
def kept(held: Held, holders: Holders, restored: Identity) -> Identity | None:
    return plan.replicated(copies_of(held, holders), needs_of(held), holders, restored)


def needs_of(held: Held) -> list[set[str]]:
    return plan.needs_of([], [[rank] for rank in range(len(held))])


# --- what can happen ------------------------------------------------------------------------------------------------------


def turned(world: World) -> World:
    """One world for all that differ in the numbers of machines only. The machines form one circle."""
    machines, hashes = world.machines, [hash(one) for one in world.machines]
    first = min(range(len(machines)), key=lambda i: hashes[i:] + hashes[:i])
    return world._replace(machines=machines[first:] + machines[:first]) if first else world


def put(world: World, number: int, **changes: object) -> World:
    machines = list(world.machines)
    machines[number] = machines[number]._replace(**changes)
    return world._replace(machines=tuple(machines))


def free_moves(world: World) -> Moves:
    if world.ended:
        return
    if not world.trains:
        yield "the root plans", surveyed(world)
    elif world.step < world.steps and all(can_capture(world, one) for one in world.machines):
        identity = Identity(1, world.generation, world.step + 1)
        due = tuple(one._replace(due=identity) for one in world.machines)
        yield f"all agree to capture {identity}", world._replace(machines=due, step=identity.step)
    for number, machine in enumerate(world.machines):
        name = f"h{number + 1}"
        if not machine.begun:
            if world.trains:
                yield f"{name} begins", begun(world, number)
            continue
        if world.trains:
            yield from trainer_moves(world, number, name)
        for distance in range(1, len(world.holders[number])):
            yield from transfer_moves(world, number, distance, name)
        if machine.unsaid:
            yield f"the root hears {name}", reported(world, number)
        if world.recoverable is not None and (machine.known is None or machine.known < world.recoverable):
            yield f"{name} hears that {world.recoverable} is recoverable", put(world, number, known=world.recoverable)


def can_capture(world: World, machine: Machine) -> bool:
    first = world.step == -1
    ready = machine.begun and machine.due is None and all(one.state is not SlotState.WRITING for one in machine.own)
    known = machine.known is not None or world.restored is not None  # attach waits for the copies of the first snapshot
    return ready and (first or known) and writable(machine.own, machine.known, machine.held) is not None


def trainer_moves(world: World, number: int, name: str) -> Moves:
    machine = world.machines[number]
    if machine.due is not None:
        slot = writable(machine.own, machine.known, machine.held)
        assert slot is not None, f"(f) the slot that was free is not: {machine}"
        own = filled(machine.own, slot, Cell(SlotState.WRITING, machine.due))
        hold = {"persist": "held", "held": machine.due} if machine.persist == "asked" else {}
        yield f"{name} begins to capture {machine.due}", put(world, number, own=own, due=None, **hold)
    for cell in machine.own:
        if cell.state is SlotState.WRITING and cell.identity is not None:
            yield f"{name} commits {cell.identity}", put(world, number, own=committed(machine.own, cell.identity))
    if world.persists and machine.persist == "":
        yield f"{name} is to persist", put(world, number, persist="asked")
    if machine.persist == "held":
        yield f"{name} has persisted", put(world, number, persist="released", held=None)


def next_to_push(world: World, machine: Machine) -> Identity | None:
    """The snapshot that the replicator works on: the oldest not yet pushed, and only once the one before is recoverable."""
    if machine.pushed is not None and not all(one == "there" for one in machine.sends):
        return machine.pushed
    if machine.pushed is not None and (machine.known is None or machine.known < machine.pushed):
        return None
    since = machine.pushed or world.restored
    waiting = [
        cell.identity
        for cell in machine.own
        if cell.state is SlotState.COMMITTED
        and cell.identity is not None
        and (since is None or cell.identity > since or (machine.pushed is None and cell.identity == since))
    ]
    return min(waiting, default=None)


def told(sender: Machine, receiver: Machine) -> Identity | None:
    """What the receiver takes for recoverable: what it has heard, or what the sender says in its offer."""
    return newest(sender.known, receiver.known)


def transfer_moves(world: World, number: int, distance: int, name: str) -> Moves:
    sender, other = world.machines[number], world.holders[number][distance]
    receiver, peer = world.machines[other], f"h{other + 1}"
    identity = next_to_push(world, sender)
    if identity is None or not receiver.begun:
        return
    cells = receiver.foreign[distance - 1]
    how = sender.sends[distance - 1] if identity == sender.pushed else ""
    if how == "under way":
        assert holds(sender.own, identity), f"(c) {name} overwrote {identity} while it was sent"
        arrived = received(world, other, distance, committed(cells, identity))
        yield f"{peer} has {identity} of {name}", pushed(arrived, number, identity, distance, "there")
    elif how == "" and holds(cells, identity):
        yield f"{peer} had {identity} of {name}", pushed(world, number, identity, distance, "there")
    elif how == "" and (slot := writable(cells, told(sender, receiver))) is not None:
        began = received(world, other, distance, filled(cells, slot, Cell(SlotState.WRITING, identity)))
        yield f"{name} sends {identity} to {peer}", pushed(began, number, identity, distance, "under way")


def received(world: World, number: int, distance: int, cells: Cells) -> World:
    foreign = world.machines[number].foreign
    return put(world, number, foreign=(*foreign[: distance - 1], cells, *foreign[distance:]))


def pushed(world: World, number: int, identity: Identity, distance: int, how: str) -> World:
    machine = world.machines[number]
    sends = machine.sends if machine.pushed == identity else ("",) * len(machine.sends)
    sends = (*sends[: distance - 1], how, *sends[distance:])
    unsaid = (*machine.unsaid, identity) if all(one == "there" for one in sends) else machine.unsaid
    return put(world, number, pushed=identity, sends=sends, unsaid=unsaid)


def reported(world: World, number: int) -> World:
    machine = world.machines[number]
    world = put(world, number, reported=machine.reported.union(machine.unsaid), unsaid=())
    found = plan.recoverable({i: one.reported for i, one in enumerate(world.machines)}, len(world.machines))
    if found is None or (world.recoverable is not None and found <= world.recoverable):
        return world
    # The root forgets what is older.
    machines = tuple(one._replace(reported=frozenset(i for i in one.reported if i >= found)) for one in world.machines)
    world = world._replace(machines=machines, recoverable=found, floor=newest(found, world.floor))
    return world if world.hurt else world._replace(spare=len(world.holders[0]) - 1)


def surveyed(world: World) -> World:
    """All trainers are reaped and all replicators quiet: plan, and fetch what is lacking."""
    held = held_by(world)
    found = planned(held, world.holders)
    if found is None:
        assert world.floor is None or world.spare < 0, "(a) there is no plan"
        return world._replace(ended="nothing left")
    for machine, shard, _ in found.fetches:
        assert shard == shard_of(machine)
        own = world.machines[machine].own
        slot = writable(own, None)
        assert slot is not None, "(f) no slot to fetch into"
        world = put(world, machine, own=filled(own, slot, Cell(SlotState.COMMITTED, found.identity)))
    machines = tuple(
        Machine(one.own, one.foreign, begun=False, sends=("",) * len(one.sends), persist="released")
        for one in world.machines
    )
    return world._replace(
        machines=machines,
        generation=world.generation + 1,
        step=found.identity.step,
        restored=found.identity,
        trains=True,
        recoverable=kept(held_by(world), world.holders, found.identity),
        hurt=False,
    )


def begun(world: World, number: int) -> World:
    machine = world.machines[number]
    assert world.restored is not None
    # Nothing is recoverable by reports before every machine has begun: what the root knows is what was kept.
    own, *foreign = (swept(one, world.restored, world.recoverable) for one in (machine.own, *machine.foreign))
    return put(world, number, own=own, foreign=tuple(foreign), begun=True, known=world.recoverable)


@cache
def swept(cells: Cells, restored: Identity, kept: Identity | None) -> Cells:
    gone = {view.slot for view in plan.obsolete(views(cells), restored, kept)}
    return tuple(Cell() if slot in gone else cell for slot, cell in enumerate(cells))


def fault_moves(world: World) -> Moves:
    if not world.faults or world.ended:
        return
    paid = world._replace(faults=world.faults - 1)
    if "kill" in world.kinds and world.trains:
        yield "FAULT: a trainer is killed", ended(paid)
    for number, machine in enumerate(world.machines):
        if "lose" in world.kinds:
            yield f"FAULT: h{number + 1} is lost", lost(paid, number)
        for distance, how in enumerate(machine.sends, 1):
            if "cut" in world.kinds and how == "under way":
                cut = (*machine.sends[: distance - 1], "", *machine.sends[distance:])
                yield f"FAULT: h{number + 1} loses its connection to a peer", put(paid, number, sends=cut)


def ended(world: World) -> World:
    """The trainers are gone; what is in transfer goes on until the root plans."""
    return world._replace(trains=False, machines=tuple(one._replace(due=None) for one in world.machines))


def lost(world: World, number: int) -> World:
    replicas = len(world.holders[0])
    world = put(ended(world), number, **empty(replicas)._replace(begun=False)._asdict())
    for other in range(len(world.machines)):
        sends = world.machines[other].sends
        broken = tuple("" if world.holders[other][d + 1] == number else how for d, how in enumerate(sends))
        world = put(world, other, sends=broken)
    spare = world.spare - 1
    return world._replace(hurt=True, spare=spare, floor=world.floor if spare >= 0 else None)


# --- all of it ------------------------------------------------------------------------------------------------------------


def check(world: World) -> None:
    held = held_by(world)
    for one in world.machines:
        kept_back = one.held is None or any(cell.identity == one.held for cell in one.own)
        assert kept_back, f"(e) {one.held} is overwritten before it is persisted"
    if world.floor is not None:
        for gone in combinations(range(len(held)), world.spare):
            found = planned(held, world.holders, gone)
            assert found is not None, f"(a) there is no plan if {gone} are lost"
            assert found.identity >= world.floor, f"(a) back behind {world.floor} if {gone} are lost"
    if world.restored is not None and not world.hurt:
        found = planned(held, world.holders)
        assert found is not None and found.identity >= world.restored, "(b) back behind what was restored"
    if world.recoverable is not None and not world.hurt:
        assert complete(held, world.holders) >= world.recoverable, f"(d) {world.recoverable} lacks a copy"


@cache
def complete(held: Held, holders: Holders) -> Identity:
    """The newest snapshot of which every holder has what it should."""
    found: Counter[Identity] = Counter(copy.identity for copy in set(copies_of(held, holders)))
    all_copies = len(holders) * len(holders[0])
    return max((identity for identity, copies in found.items() if copies == all_copies), default=Identity(0, 0, 0))


def finished(world: World) -> bool:
    return world.trains and world.step == world.steps == (world.recoverable or (0, 0, -1))[2]


def explore(start: World) -> Counter[str]:
    """Visit every state that can follow. Returns how many there are, by whether and how training has ended there."""
    came: dict[World, tuple[World | None, str]] = {start: (None, "")}
    queue, ends = deque([start]), Counter[str]()
    while queue:
        world = queue.popleft()
        try:
            check(world)
            found = list(free_moves(world))
            if not found and not world.ended:
                assert finished(world), f"(f) nothing can happen\n{world}"
                world = world._replace(ended=f"generation {world.generation}")
                ends[world.ended] += 1
            else:
                ends[world.ended] += 1
                found += fault_moves(world)
        except AssertionError as error:
            raise AssertionError(f"{error}\nafter\n{path_to(world, came)}") from error
        for label, after in found:
            after = turned(after)
            if after not in came:
                came[after] = world, label
                queue.append(after)
        assert len(came) < MANY, "more states than a test can visit"
    return ends


def path_to(world: World | None, came: dict[World, tuple[World | None, str]]) -> str:
    words = []
    while world is not None:
        world, label = came[world]
        words.append(f"  {label}")
    return "\n".join(reversed(words))


@pytest.fixture(autouse=True)
def _nothing_remembered():
    yield
    for one in (views, writable, copies_of, planned, kept, swept, complete):
        one.cache_clear()


@pytest.mark.parametrize(
    ("machines", "replicas", "steps", "kinds", "faults", "persists"),
    [
        (2, 2, 3, "kill lose cut", 1, False),
        (2, 2, 2, "kill lose", 2, False),
        (2, 2, 3, "kill", 1, True),
        (3, 2, 2, "lose", 1, False),
        (3, 3, 1, "", 0, False),
    ],
    ids=["2 machines", "2 faults", "persisting", "a ring of 3", "3 copies"],
)
def test_every_order_of_events(machines, replicas, steps, kinds, faults, persists):
    found = explore(beginning(machines, replicas, steps, kinds, faults, persists))
    assert all(found[f"generation {number}"] for number in range(1, faults + 2))
    assert bool(found["nothing left"]) == bool(faults), "if a fault strikes before the first snapshot has its copies"


def at_least(slots, recoverable):
    return catalog_writable(slots, recoverable and recoverable._replace(step=recoverable.step + 1))


def of_any_machine(reports, machines):
    return max((identity for found in reports.values() for identity in found), default=None)


catalog_writable = catalog.writable
BROKEN = {
    "a recoverable snapshot is overwritten": (catalog, "writable", at_least, "(a)"),
    "one report is enough": (plan, "recoverable", of_any_machine, "(a)"),
    "a restored snapshot counts as recoverable": (plan, "replicated", lambda *those: those[-1], "(d)"),
    "no snapshot is known to have its copies": (plan, "replicated", lambda *those: None, "(a)"),
    "only newer slots are voided": (plan, "obsolete", lambda slots, restored, _: catalog.newer(slots, restored), "(f)"),
    "nothing is voided": (plan, "obsolete", lambda *those: [], "(f)"),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_is_noticed(monkeypatch, rule):
    where, name, broken, what = BROKEN[rule]
    monkeypatch.setattr(where, name, broken)
    with pytest.raises(AssertionError) as noticed:
        explore(beginning(2, 2, 3, "kill lose", 1))
    assert str(noticed.value).startswith(what)


@settings(max_examples=50)
@given(st.integers(2, 5), st.integers(2, 3), st.lists(st.tuples(st.integers(0, 9), st.integers(0, 999)), max_size=150))
def test_a_walk_through_a_larger_job_ends(machines, replicas, script):
    """Of each pair the first number says whether something goes wrong, the second one which of all that can happen does."""
    world = beginning(machines, min(replicas, machines), 6, "kill lose cut", 4, persists=True)
    steps = []
    try:
        for luck, choice in script + [(9, 7 * number) for number in range(2000)]:
            check(world)
            free, bad = list(free_moves(world)), list(fault_moves(world))
            if not free:
                assert world.ended or finished(world), f"(f) nothing can happen: {world}"
                return
            found = bad if bad and luck == 0 else free
            label, world = found[choice % len(found)]
            steps.append(label)
    except AssertionError as error:
        raise AssertionError(f"{error}\nafter\n" + "\n".join(steps)) from error
    raise AssertionError(f"(f) it goes on and on: {world}\nafter\n" + "\n".join(steps))
