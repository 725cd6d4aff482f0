"""Decides what a worker agent does by itself: its slot processes, its warm parent, its children. Pure; ``now`` in seconds.

The rest the root decides (``root/decisions.py``): when a generation begins and ends, and how the job ends. A worker is
*ready* when all its slot processes have registered and its warm parent can fork. It tells the root so, and it tells of
every exit. It obeys Begin and Close.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from gemini_gnn.recovery.outcome import Failure

MAX_WARM_DEATHS = 3  # in a row, without becoming ready in between


@dataclass(frozen=True)
class Limits:
    """Deadlines, in seconds.

    Attributes:
        gather_s: from the first local slot process to the last.
        start_s: of the warm parent's imports.
        reap_s: from SIGKILL to the exit; later a trainer counts as stuck in the kernel. A driver needs seconds to take
            back gigabytes of page-locked memory.
    """

    gather_s: float = 120.0
    start_s: float = 600.0
    reap_s: float = 30.0


@dataclass(frozen=True)
class State:
    """
    Attributes:
        slots: number of ranks on this machine.
        registered: slots whose slot process is here, by local rank.
        warm_deaths: in a row, without becoming ready in between.
        ready, unable: as the root was told, or will be when it is there.
        generation: of the newest trainers here; 0: none yet.
        alive: global ranks of the trainers that are not reaped.
        closing: the root has closed `generation`.
    """

    slots: int
    limits: Limits = Limits()
    registered: frozenset[int] = frozenset()
    warm_ready: bool = False
    warm_deaths: int = 0
    ready: bool = False
    unable: Failure | None = None
    generation: int = 0
    alive: frozenset[int] = frozenset()
    closing: bool = False
    deadline: float | None = None


# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Registered:
    slot: int


@dataclass(frozen=True)
class WarmReady:
    pass


@dataclass(frozen=True)
class WarmDied:
    reason: str


@dataclass(frozen=True)
class WarmRefused:
    """The warm parent cannot import or must not fork; another one could not either."""

    failure: Failure


@dataclass(frozen=True)
class Listens:
    """A trainer reads requests to stop."""

    rank: int


@dataclass(frozen=True)
class Failed:
    """A trainer has reported its error; its exit follows."""

    failure: Failure


@dataclass(frozen=True)
class Exited:
    """A trainer was reaped, and its process group killed. ``code`` is negative for a signal, ``why``: its sender, if known."""

    rank: int
    code: int
    why: str = ""


@dataclass(frozen=True)
class Begin:
    """The root begins a generation, with these ranks on this machine."""

    generation: int
    ranks: frozenset[int]


@dataclass(frozen=True)
class Close:
    """The root wants every trainer killed."""


@dataclass(frozen=True)
class Tick:
    pass


# --- actions ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StartWarm:
    pass


@dataclass(frozen=True)
class Fork:
    generation: int
    ranks: frozenset[int]


@dataclass(frozen=True)
class Kill:
    ranks: frozenset[int]


@dataclass(frozen=True)
class TellReady:
    ready: bool


@dataclass(frozen=True)
class TellUnable:
    failure: Failure


@dataclass(frozen=True)
class TellStuck:
    text: str


@dataclass(frozen=True)
class Tell:
    """Pass the event on to the root, with the generation that it belongs to."""

    event: Listens | Failed | Exited
    generation: int


@dataclass(frozen=True)
class Say:
    text: str


Event = Any  # one of the events above
Action = StartWarm | Fork | Kill | TellReady | TellUnable | TellStuck | Tell | Say
Step = tuple[State, list[Action]]


def decide(state: State, event: Event, now: float) -> Step:
    """The state after ``event`` at time ``now``, and what to do."""
    match event:
        case Registered(slot):
            return _registered(state, slot, now)
        case WarmReady():
            return _ready(_waits(replace(state, warm_ready=True, warm_deaths=0), now))
        case WarmDied(reason):
            return _warm_died(state, reason, now)
        case WarmRefused(failure):
            return _unable(state, failure)
        case Begin(generation, ranks):
            assert not state.alive, "a generation began before the last one was reaped"
            state = replace(state, generation=generation, alive=ranks, closing=False, deadline=None)
            return state, [Fork(generation, ranks)]
        case Close() if state.alive:
            return replace(state, closing=True, deadline=now + state.limits.reap_s), [Kill(state.alive)]
        case Close():
            return _closed(state, now)
        case Listens() | Failed():
            return state, [Tell(event, state.generation)]
        case Exited(rank):
            return _exited(replace(state, alive=state.alive - {rank}), event, now)
        case Tick():
            return _tick(state, now) if state.deadline is not None and now >= state.deadline else (state, [])
    raise AssertionError(f"unknown event {event!r}")


def _registered(state: State, slot: int, now: float) -> Step:
    first, state = not state.registered, replace(state, registered=state.registered | {slot})
    if first:
        state = replace(state, deadline=now + state.limits.gather_s)
    return _ready(_waits(state, now))


def _waits(state: State, now: float) -> State:
    """Where nothing runs, a warm parent that is lacking has a deadline. While slot processes are lacking, theirs stays."""
    if state.alive or len(state.registered) < state.slots:
        return state
    return replace(state, deadline=None if state.warm_ready else now + state.limits.start_s)


def _ready(state: State) -> Step:
    """Tell the root if it changed."""
    ready = state.warm_ready and len(state.registered) == state.slots
    return (state, []) if ready is state.ready else (replace(state, ready=ready), [TellReady(ready)])


def _exited(state: State, exited: Exited, now: float) -> Step:
    told: list[Action] = [Tell(exited, state.generation)]
    if state.alive:
        return state, told
    if not state.closing:  # by itself; the root may have gone, and another one may want a generation
        return _waits(state, now), told
    state, actions = _closed(state, now)
    return state, told + actions


def _closed(state: State, now: float) -> Step:
    """Nothing of the generation lives, and another may begin: the warm parent must come."""
    if state.warm_deaths > MAX_WARM_DEATHS:
        return _without_warm(replace(state, closing=False), now)
    return _waits(replace(state, closing=False), now), []


def _warm_died(state: State, reason: str, now: float) -> Step:
    """Start another one: it is needed before the next generation, while the trainers run on."""
    state, actions = _ready(replace(state, warm_ready=False, warm_deaths=state.warm_deaths + 1))
    if state.warm_deaths <= MAX_WARM_DEATHS:
        state = _waits(state, now)
        return state, [*actions, Say(f"the warm parent died ({reason}); starting another"), StartWarm()]
    if state.alive:
        return state, actions
    state, more = _without_warm(state, now)
    return state, actions + more


def _without_warm(state: State, now: float) -> Step:
    text = f"the warm parent died {state.warm_deaths} times before it was ready; see logs/agent-*.log"
    return _unable(state, Failure(-1, 1, now, text, text))


def _unable(state: State, failure: Failure) -> Step:
    return replace(state, unable=failure, deadline=None), [TellUnable(failure)]


def _tick(state: State, now: float) -> Step:
    """The deadline has passed."""
    state = replace(state, deadline=None)
    if state.closing:
        ranks = ", ".join(map(str, sorted(state.alive)))
        text = (
            f"the trainers of ranks {ranks} could not be reaped within {state.limits.reap_s:.0f} s after SIGKILL: stuck in "
            "the kernel (a dead file system or device?) or held by a debugger; this machine cannot go on, wait for them, "
            "or restart it"
        )
        return state, [TellStuck(text)]
    if state.warm_deaths > MAX_WARM_DEATHS:
        return _without_warm(state, now)
    if len(state.registered) < state.slots:
        text = (
            f"only {len(state.registered)} of {state.slots} slot processes of this machine came within "
            f"{state.limits.gather_s:.0f} s; see the launcher's output for the others"
        )
    else:
        text = f"the imports of the warm parent took longer than {state.limits.start_s:.0f} s; see logs/agent-*.log"
    return _unable(state, Failure(-1, 1, now, text, text))
