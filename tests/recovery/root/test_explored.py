"""Every order of events, for small jobs: the real decisions of root and workers over a model of all that is around them.

The model: per machine a worker agent (the real ``worker.decisions``), its warm parent, its trainers, and a first-in
first-out connection to the root. A claim of a term is won at once; ``test_succession_explored.py`` has several roots.
Messages are delivered late, and what is in flight is lost when a connection is cut. Each
end notices that by itself, so either may act on what it already holds. An agent that dies takes its trainers along, but they
live until its successor has seen them die; on machine 0 the root dies with it. Time stands still but for jumps to the next
deadline. A long deadline (of a machine, a stop, a reaping) that passes while something else could happen costs a fault.

A *fault* is anything that need not happen. :func:`explore` visits every state that so many faults can lead to.

What holds in every state, asserted where it could first break:
    (a) no trainer is forked while one of another generation or term lives anywhere;
    (b) snapshots are dropped only if all ranks of one generation ended with 0, or if somebody asked for it;
    (c) every run ends: nothing repeats without a fault, and where nothing can happen any more the job has ended;
    (d) without an error, a request to stop, or something that is gone for good, the job ends as "done";
    (e) an error that was told more than `settle_s` before any death is the job's error;
    (f) a generation begins only when every machine is there and ready, and no trainer lives that the root knows of.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemini_gnn.recovery.outcome import STOPPED, Failure
from gemini_gnn.recovery.root import state as root
from gemini_gnn.recovery.root.decisions import decide
from gemini_gnn.recovery.worker import decisions as worker

SETTLE_S = root.Limits().settle_s
MANY = 200_000  # states: a circle of ever new generations would have more; the largest job below has 58,000
SHORT_S = 5.0  # shorter deadlines pass without a fault
FAULTS = frozenset({"kill", "error", "agent", "cut", "warm", "hang", "stop", "drop", "slow", "stall", "stuck", "lost"})
EXCUSES = frozenset(
    {"error", "stop", "drop", "slow", "stall", "stuck", "lost"}
)  # the job need not end as "done" after these


class Trainer(NamedTuple):
    """``how``: "runs" | "asked" (to stop) | "works out" (will end with 0) | "raises" | "hangs" | "dies" | "stuck"."""

    rank: int
    key: tuple[int, int]  # term, generation
    how: str = "runs"


class Machine(NamedTuple):
    """
    Attributes:
        agent: None while the worker agent is dead.
        warm: its warm parent: "imports" | "ready" | "stalled" (for ever).
        lost: its agent never comes back.
        linked: the worker has not noticed the end of its connection.
        joined: the root has read the Join of this connection.
        cut: what is sent from now on is lost.
        up, down: in flight to the root, and from it.
    """

    agent: worker.State | None
    warm: str = "imports"
    lost: bool = False
    trainers: tuple[Trainer, ...] = ()
    linked: bool = False
    joined: bool = False
    cut: bool = False
    up: tuple[Any, ...] = ()
    down: tuple[Any, ...] = ()


class World(NamedTuple):
    """
    Attributes:
        kinds, faults: what may go wrong, and how often still.
        excuses: of the faults so far, those after which a job need not end as "done".
        dropped: somebody asked for the snapshots to be removed.
        zeros: ranks that ended with 0, in the newest generation.
        plan: number of the root's last planning, and the machines that have said what they hold.
        told: the error that the root heard first in this generation, and since when; None once a death may explain it.
        ended: how the job ended.
    """

    root: root.State | None
    machines: tuple[Machine, ...]
    local: int
    kinds: frozenset[str]
    faults: int
    term: int = 1
    excuses: frozenset[str] = frozenset()
    dropped: bool = False
    zeros: tuple[tuple[int, int], frozenset[int]] = ((0, 0), frozenset())
    plan: tuple[int, frozenset[int]] = (0, frozenset())
    told: tuple[int, float] | None = None
    ended: str | None = None


def beginning(machines: int, local: int, faults: int, kinds: frozenset[str] = FAULTS) -> World:
    hosts = tuple(Machine(fresh_agent(local)) for _ in range(machines))
    return World(new_root(machines, local, 0), hosts, local, kinds, faults)


def new_root(machines: int, local: int, deaths: int) -> root.State:
    return root.forming(machines, local, root.Limits(same_step_failures=1000), deaths)


def heir(machines: int, local: int, generation: int) -> root.State:
    """The root agent of machine 0 that comes after one that died."""
    limits, names = root.Limits(same_step_failures=1000), [f"h{number + 1}" for number in range(machines)]
    known = {"root": 0, "lost": None, "generation": generation, "reached": 0, "cause": None, "now": 0.0}
    return root.succeeding(names, range(machines), local, limits, **known)


def fresh_agent(local: int) -> worker.State:
    return worker.State(local, registered=frozenset(range(local)), deadline=worker.Limits().start_s)


# --- what happens to the parts ------------------------------------------------------------------------------------------


def put(world: World, number: int, **changes: Any) -> World:
    machines = list(world.machines)
    machines[number] = machines[number]._replace(**changes)
    return world._replace(machines=tuple(machines))


def to_root(world: World, event: Any) -> World:
    """The root sees ``event``, and its messages are on their way."""
    before = world.root
    assert before is not None
    world = blamed(world, before, event)
    state, actions = decide(before, event, 0.0)
    # Of no influence but on texts and the count of failures, which has tests of its own.
    world = world._replace(root=replace(state, cause=None, row=0, row_step=-1))
    for action in actions:
        match action:
            case root.Plan():
                assert all(one.here and one.ready for one in state.machines) and not state.alive, (
                    "(f) planned too early"
                )
                world = world._replace(plan=(world.plan[0] + 1, frozenset()))
                for number in range(len(world.machines)):
                    world = sent(world, number, ("survey", world.term, world.plan[0]))
            case root.Claim():
                world = to_root(world._replace(term=world.term + 1), root.Claimed(True))
            case root.Begin(generation):
                world = world._replace(plan=(0, frozenset()))
                assert all(one.here and one.ready for one in state.machines), "(f) a machine is not ready"
                assert not before.alive - event_ranks(before, event), "(f) a trainer lives"
                assert world.told is None or world.told[1] <= SETTLE_S, "(e) an error is hidden by a restart"
                world = world._replace(zeros=((world.term, generation), frozenset()), told=None)
                for number in range(len(world.machines)):
                    world = sent(world, number, (world.term, generation))
            case root.Close():
                for number in range(len(world.machines)):
                    world = sent(world, number, "close")
            case root.AskToStop():
                for number in range(len(world.machines)):
                    world = sent(world, number, "stop")
            case root.Finish(outcome):
                world = finished(world, outcome)
    return world


def event_ranks(state: root.State, event: Any) -> frozenset[int]:
    """Ranks that ``event`` says nothing lives of."""
    match event:
        case root.Exited(rank):
            return frozenset({rank})
        case root.Joined(machine):
            return state.ranks_of(machine)
    return frozenset()


def blamed(world: World, state: root.State, event: Any) -> World:
    """Which error the job owes; a death at most `settle_s` later may be its cause."""
    match event:
        case root.Failed(failure, generation) if (
            state.phase is root.Phase.RUNNING
            and generation == state.generation
            and not failure.consequence
            and state.hung is None
            and all(one.consequence for one in state.failures)
        ):
            return world._replace(told=(failure.rank, 0.0))
        case root.Exited(_, generation, code) if code >= 0 or generation != state.generation:
            return world
        case root.Exited() | root.Gone() | root.Joined() if world.told and world.told[1] <= SETTLE_S:
            return world._replace(told=None)
    return world


def finished(world: World, outcome: root.Outcome) -> World:
    ranks = frozenset(range(len(world.machines) * world.local))
    if outcome.kind == "done":
        assert world.zeros[1] == ranks, "(b) done, but not all ranks ended with 0"
    assert outcome.keep or outcome.kind == "done" or world.dropped, "(b) nobody asked for the snapshots to be removed"
    excused = world.excuses or any(one.agent and one.agent.unable for one in world.machines)
    assert outcome.kind == "done" or excused, f"(d) not done: {outcome}"
    if world.told and world.told[1] > SETTLE_S and outcome.kind != "lost":
        assert outcome.failure is not None and outcome.failure.rank == world.told[0], (
            f"(e) an error is hidden: {outcome}"
        )
    return world._replace(ended=outcome.kind)


def sent(world: World, number: int, message: Any) -> World:
    machine = world.machines[number]
    if not machine.joined or machine.cut:
        return world
    return put(world, number, down=(*machine.down, message))


def to_worker(world: World, number: int, event: Any) -> World:
    """The worker sees ``event``; what it tells the root is on its way, or lost if there is no connection."""
    machine = world.machines[number]
    assert machine.agent is not None
    state, actions = worker.decide(machine.agent, event, 0.0)
    told: list[Any] = []
    for action in actions:
        match action:
            case worker.StartWarm():
                machine = machine._replace(warm="imports")
            case worker.Kill(ranks):
                how = {"stuck": "stuck"}
                trainers = [one._replace(how=how.get(one.how, "dies")) for one in machine.trainers if one.rank in ranks]
                machine = machine._replace(trainers=tuple(trainers))
            case worker.TellReady(ready):
                told.append(root.Ready(number, ready))
            case worker.TellUnable(failure):
                told.append(root.Unable(number, failure))
            case worker.TellStuck(text):
                told.append(root.Stuck(number, text))
            case worker.Tell(worker.Failed(failure), generation):
                told.append(root.Failed(failure, generation))
            case worker.Tell(worker.Exited(rank, code, why), generation):
                told.append(root.Exited(rank, generation, code, why))
    machine = machine._replace(agent=state)
    if machine.linked and not machine.cut:
        machine = machine._replace(up=(*machine.up, *told))
    return put(world, number, **machine._asdict())


def obeyed(world: World, number: int, message: Any) -> World:
    """The worker reads a message of the root."""
    machine = world.machines[number]
    if message == "close":
        return to_worker(world, number, worker.Close())
    if message == "stop":
        how = {"runs": "asked"}
        asked = tuple(one._replace(how=how.get(one.how, one.how)) for one in machine.trainers)
        return put(world, number, trainers=asked)
    if message[0] == "survey":
        assert not machine.agent.alive, "(a) a trainer lives while the machine says what it holds"
        answer = () if not machine.linked or machine.cut else (("holds", *message[1:]),)
        return put(world, number, up=(*machine.up, *answer))
    for other in world.machines:
        assert all(one.key == message for one in other.trainers), "(a) a trainer of another generation lives"
    ranks = range(number * world.local, (number + 1) * world.local)
    world = to_worker(world, number, worker.Begin(message[1], frozenset(ranks)))
    how = "runs" if machine.warm == "ready" else "dies"  # the warm parent has just died
    world = put(world, number, trainers=tuple(Trainer(rank, message, how) for rank in ranks))
    machine = world.machines[number]
    if machine.linked and not machine.cut and "stop" in world.kinds:
        listens = [root.Listens(rank, message[1]) for rank in ranks]
        world = put(world, number, up=(*machine.up, *listens))
    return world


def heard(world: World, number: int, message: Any) -> World:
    """The root reads a message of a worker."""
    if isinstance(message, tuple) and message[0] == "holds":
        if message[1:] != (world.term, world.plan[0]) or world.root.phase is not root.Phase.PLANNING:
            return world  # the answer to the question of an earlier planning
        held = world.plan[1] | {number}
        world = world._replace(plan=(world.plan[0], held))
        return to_root(world, root.Planned()) if len(held) == len(world.machines) else world
    if isinstance(message, tuple):  # a Join: newest generation, ready, unable
        generation, ready, unable = message
        world = put(world, number, joined=True)
        world = to_root(world, root.Joined(number, f"h{number + 1}", generation))
        if unable is not None and not world.ended:
            world = to_root(world, root.Unable(number, unable))
        if ready and not world.ended:
            world = to_root(world, root.Ready(number))
        return world
    return to_root(world, message)


def set_trainer(world: World, number: int, trainer: Trainer, how: str | None) -> World:
    """``how`` it goes on; None: it is gone."""
    rest = [one for one in world.machines[number].trainers if one.rank != trainer.rank]
    trainers = rest if how is None else sorted([*rest, trainer._replace(how=how)], key=lambda one: one.rank)
    return put(world, number, trainers=tuple(trainers))


def exits(world: World, number: int, trainer: Trainer, code: int) -> World:
    world = set_trainer(world, number, trainer, None)
    if code == 0 and world.zeros[0] == trainer.key:
        world = world._replace(zeros=(trainer.key, world.zeros[1] | {trainer.rank}))
    return to_worker(world, number, worker.Exited(trainer.rank, code))


def shift(world: World, by_s: float) -> World:
    """So much time passes. The clock always says 0: all times are relative to now."""

    def earlier(state: Any) -> Any:
        return state if state is None or state.deadline is None else replace(state, deadline=state.deadline - by_s)

    state = earlier(world.root)
    if state is not None:
        away = [one if one.here else replace(one, since_s=one.since_s - by_s) for one in state.machines]
        failures = tuple(replace(one, time_s=one.time_s - by_s) for one in state.failures)
        state = replace(state, machines=tuple(away), failures=failures)
    machines = tuple(one._replace(agent=earlier(one.agent)) for one in world.machines)
    told = world.told and (world.told[0], world.told[1] + by_s)
    return world._replace(root=state, machines=machines, told=told)


# --- what can happen ----------------------------------------------------------------------------------------------------


Moves = Iterator[tuple[str, World]]


def moves(world: World) -> list[tuple[str, World]]:
    """All that can happen next: label and world."""
    if world.ended:
        return []
    free = list(free_moves(world))
    found = free + list(time_passes(world, bool(free)))
    found += list(fault_moves(world)) if world.faults else []
    return [(label, at_once(after)) for label, after in found]


def at_once(world: World) -> World:
    """Leave out moments at which none of the faults makes a difference: there are enough of the others."""
    while not world.ended:
        for number, machine in enumerate(world.machines):
            dying = [one for one in machine.trainers if one.how == "dies" and machine.agent is not None]
            if dying and not world.kinds & {"stuck", "slow"}:
                world = exits(world, number, dying[0], -9)
            elif machine.warm == "imports" and machine.agent and not world.kinds & {"warm", "stall", "slow"}:
                world = to_worker(put(world, number, warm="ready"), number, worker.WarmReady())
            elif number == 0 and len(world.machines) > 1 and world.root is not None and machine.agent is not None:
                # The first worker and the root are one process.
                if not machine.linked and not machine.agent.alive:
                    world = connected(world, number)
                elif machine.up:
                    world = heard(put(world, number, up=machine.up[1:]), number, machine.up[0])
                elif machine.down:
                    world = obeyed(put(world, number, down=machine.down[1:]), number, machine.down[0])
                else:
                    continue
            else:
                continue
            break
        else:
            break
    return world


def connected(world: World, number: int) -> World:
    agent = world.machines[number].agent
    assert agent is not None
    assert not agent.alive
    join = (agent.generation, agent.ready, agent.unable)
    return put(world, number, linked=True, joined=False, cut=False, up=(join,), down=())


def free_moves(world: World) -> Moves:
    state = world.root
    for number, machine in enumerate(world.machines):
        here = state is not None and state.machines[number].here
        if machine.up and state is not None:
            yield f"the root reads h{number + 1}", heard(put(world, number, up=machine.up[1:]), number, machine.up[0])
        if here and (machine.cut or not machine.joined):
            gone = put(world, number, joined=False, up=() if machine.cut else machine.up)
            yield f"the root loses h{number + 1}", to_root(gone, root.Gone(number, "agent", "is gone"))
        if machine.agent is None:
            if not machine.lost:
                yield f"h{number + 1} has a new agent", reborn(world, number)
            continue
        if machine.down and machine.linked:
            yield f"h{number + 1} reads", obeyed(put(world, number, down=machine.down[1:]), number, machine.down[0])
        if machine.linked and machine.cut:
            yield (
                f"h{number + 1} loses the root",
                to_worker(put(world, number, linked=False, down=()), number, worker.Close()),
            )
        if not machine.linked and state is not None and not machine.agent.alive:
            yield f"h{number + 1} connects", connected(world, number)
        if machine.warm == "imports":
            yield (
                f"the warm parent of h{number + 1} is ready",
                to_worker(put(world, number, warm="ready"), number, worker.WarmReady()),
            )
        for trainer in machine.trainers:
            yield from trainer_moves(world, number, trainer)
    keys = {one.key for machine in world.machines for one in machine.trainers}
    running = [one for machine in world.machines for one in machine.trainers if one.how in ("runs", "asked")]
    if len(keys) == 1 and len(running) == len(world.machines) * world.local and all(m.agent for m in world.machines):
        done = world
        for number, machine in enumerate(world.machines):
            done = put(done, number, trainers=tuple(one._replace(how="works out") for one in machine.trainers))
        yield "the work is done", done


def trainer_moves(world: World, number: int, trainer: Trainer) -> Moves:
    rank = trainer.rank
    match trainer.how:
        case "works out":
            yield f"rank {rank} ends with 0", exits(world, number, trainer, 0)
        case "asked":
            yield f"rank {rank} stops", exits(world, number, trainer, STOPPED)
        case "raises":
            yield f"rank {rank} ends with 1", exits(world, number, trainer, 1)
        case "dies":
            yield f"rank {rank} is reaped", exits(world, number, trainer, -9)
        case "hangs" | "stuck" if world.root is not None and world.root.generation == trainer.key[1]:
            state = world.root
            if state.phase is root.Phase.RUNNING and state.deadline is None and rank in state.alive:
                yield f"rank {rank} is found hanging", to_root(world, root.Hung(rank, "hangs"))
    if trainer.how in ("runs", "asked") and lost_a_peer(world, trainer):
        yield f"rank {rank} loses a peer", tells(world, number, trainer, consequence=True)


def lost_a_peer(world: World, trainer: Trainer) -> bool:
    for other in world.machines:
        if other.agent is None:
            return True
        if trainer.key in other.down:
            continue  # it is about to come
        alive = [one for one in other.trainers if one.key == trainer.key and one.how not in ("hangs", "stuck")]
        if len(alive) < world.local:
            return True
    return False


def tells(world: World, number: int, trainer: Trainer, consequence: bool) -> World:
    failure = Failure(trainer.rank, 1, 0.0, "lost a peer" if consequence else "error", "", consequence)
    world = set_trainer(world, number, trainer, "raises")
    return to_worker(world, number, worker.Failed(failure))


def reborn(world: World, number: int) -> World:
    """Another agent, after the trainers of the last one are dead; on machine 0 with another root."""
    world = put(world, number, agent=fresh_agent(world.local), warm="imports", trainers=())
    if number == 0:
        world = world._replace(root=heir(len(world.machines), world.local, world.term), plan=(0, frozenset()))
        for other in range(len(world.machines)):
            world = put(world, other, joined=False, up=())
    return world


def time_passes(world: World, something_else: bool) -> Moves:
    """The next deadline passes. Nothing is that late without a fault while something else can happen."""
    deadlines = [(-1, world.root.deadline)] if world.root and world.root.deadline is not None else []
    deadlines += [
        (i, m.agent.deadline) for i, m in enumerate(world.machines) if m.agent and m.agent.deadline is not None
    ]
    next_s = min((at_s for _, at_s in deadlines), default=None)
    if world.told and world.told[1] <= SETTLE_S and (next_s is None or next_s > 1.0):
        yield "a second passes", shift(world, 1.0)
    for owner, at_s in deadlines:
        if at_s != next_s:
            continue
        later = shift(world, at_s)
        leaves = owner < 0 and world.root is not None and world.root.phase is root.Phase.RUNNING
        if at_s > SHORT_S and not leaves:
            if something_else and (not world.faults or "slow" not in world.kinds):
                continue
            if something_else:
                later = later._replace(faults=later.faults - 1)
            later = later._replace(excuses=later.excuses | {"slow"} if something_else else later.excuses)
        fault = "FAULT: " if at_s > SHORT_S and not leaves and something_else else ""
        owner_name = "the root" if owner < 0 else f"h{owner + 1}"
        tick = to_root(later, root.Tick()) if owner < 0 else to_worker(later, owner, worker.Tick())
        yield f"{fault}{at_s:g} s pass for {owner_name}", tick


def fault_moves(world: World) -> Moves:
    for kind in sorted(world.kinds):
        paid = world._replace(faults=world.faults - 1, excuses=world.excuses | ({kind} & EXCUSES))
        if kind == "stop" and world.root is not None:
            yield "FAULT: a request to stop", to_root(paid, root.StopAsked("stop", 130))
        if kind == "drop" and world.root is not None:
            asked = root.StopAsked("stop", 143, keep=False)
            yield "FAULT: a request to stop and drop", to_root(paid._replace(dropped=True), asked)
        for number in range(len(world.machines)):
            yield from machine_faults(paid, kind, number)


def machine_faults(world: World, kind: str, number: int) -> Moves:
    machine, name = world.machines[number], f"h{number + 1}"
    if machine.agent is None:
        if kind == "lost" and number > 0 and not machine.lost:  # without the first the others end by themselves
            yield f"FAULT: {name} never comes back", put(world, number, lost=True)
        return
    match kind:
        case "agent":
            yield f"FAULT: the agent of {name} is killed", killed_agent(world, number)
        case "cut" if number > 0 and machine.linked and not machine.cut:  # the first one's is a socket pair
            yield f"FAULT: the link of {name} is cut", put(world, number, cut=True)
        case "warm" if machine.warm in ("imports", "ready"):
            world = put(world, number, warm="none")
            yield f"FAULT: the warm parent of {name} is killed", to_worker(world, number, worker.WarmDied("SIGKILL"))
        case "stall" if machine.warm == "imports":
            world = put(world, number, warm="stalled")
            yield f"FAULT: the warm parent of {name} hangs", world
            refused = worker.WarmRefused(Failure(-1, 1, 0.0, "no module", ""))
            yield f"FAULT: the warm parent of {name} cannot import", to_worker(world, number, refused)
    for trainer in machine.trainers:
        runs, rank = trainer.how in ("runs", "asked", "works out"), trainer.rank
        if kind == "stuck" and trainer.how == "dies":
            yield f"FAULT: rank {rank} is stuck", set_trainer(world, number, trainer, "stuck")
        elif kind == "kill" and runs:
            yield f"FAULT: rank {rank} is killed", set_trainer(world, number, trainer, "dies")
        elif kind == "error" and runs:
            yield f"FAULT: rank {rank} raises", tells(world, number, trainer, consequence=False)
        elif kind == "hang" and (runs or trainer.how == "raises"):
            yield f"FAULT: rank {rank} hangs", set_trainer(world, number, trainer, "hangs")


def killed_agent(world: World, number: int) -> World:
    world = put(world, number, agent=None, warm="imports", linked=False, cut=True, down=())
    if number == 0:
        world = world._replace(root=None, told=None)
        for other in range(1, len(world.machines)):
            world = put(world, other, cut=True, joined=False, up=())
    return world


# --- all of it ----------------------------------------------------------------------------------------------------------


def explore(start: World) -> Counter[str | None]:
    """Visit every state that can follow. Returns how many there are, by how the job has ended there."""
    start = at_once(start)
    numbers, worlds = {start: 0}, [start]
    came: list[tuple[int, str]] = [(-1, "")]
    after: list[list[int]] = []
    queue = deque([0])
    while queue:
        number = queue.popleft()
        try:
            found = moves(worlds[number])
        except AssertionError as error:
            raise AssertionError(f"{error}\nafter\n{path_to(number, came)}") from error
        assert found or worlds[number].ended, (
            f"(c) nothing can happen\n{worlds[number]}\nafter\n{path_to(number, came)}"
        )
        assert len(worlds) < MANY, f"(c) it goes on and on\nafter\n{path_to(number, came)}"
        after.append([])
        for label, world in found:
            other = numbers.setdefault(world, len(worlds))
            if other == len(worlds):
                worlds.append(world)
                came.append((number, label))
                queue.append(other)
            after[number].append(other)
    assert not on_a_circle(after), f"(c) a circle\nafter\n{path_to(min(on_a_circle(after)), came)}"
    return Counter(world.ended for world in worlds)


def on_a_circle(after: list[list[int]]) -> list[int]:
    """States from which a run may never end."""
    before = Counter(number for found in after for number in found)
    free = [number for number in range(len(after)) if not before[number]]
    for number in free:
        for other in after[number]:
            before[other] -= 1
            if not before[other]:
                free.append(other)
    return [number for number, count in before.items() if count]


def path_to(number: int, came: list[tuple[int, str]]) -> str:
    words = []
    while number > 0:
        number, label = came[number]
        words.append(f"  {label}")
    return "\n".join(reversed(words))


SOFTWARE = frozenset({"kill", "error", "agent", "cut"})
SLOW = frozenset({"warm", "stall", "stuck", "slow"})


@pytest.mark.parametrize(
    ("machines", "local", "faults", "kinds"),
    [(1, 2, 2, FAULTS), (2, 1, 2, FAULTS), (3, 1, 1, SOFTWARE), (3, 1, 1, SLOW)],
    ids=["1 machine of 2 ranks, 2 faults", "2 machines, 2 faults", "3 machines killed", "3 machines slow"],
)
def test_every_order_of_events(machines, local, faults, kinds):
    found = explore(beginning(machines, local, faults, kinds))
    assert found["done"] and found["failed"]
    assert found["stopped"] if "stop" in kinds else found["stopped"] == 0


@given(st.integers(1, 4), st.integers(1, 2), st.lists(st.tuples(st.integers(0, 9), st.integers(0, 999)), max_size=150))
def test_a_walk_through_a_larger_job_ends(machines, local, script):
    """Of each pair the first number says whether something goes wrong, the second one which of all that can happen does."""
    world, steps = at_once(beginning(machines, local, faults=6)), []
    try:
        for luck, choice in script + [(9, 7 * number) for number in range(400)]:
            found = moves(world)
            bad = [one for one in found if one[0].startswith("FAULT")]
            free = [one for one in found if one not in bad]
            assert found or world.ended, "(c) nothing can happen"
            if world.ended:
                return
            found = (bad or free) if luck == 0 else (free or bad)
            label, world = found[choice % len(found)]
            steps.append(label)
    except AssertionError as error:
        raise AssertionError(f"{error}\nafter\n" + "\n".join(steps)) from error
    raise AssertionError(f"(c) it goes on and on: {world}\nafter\n" + "\n".join(steps))
