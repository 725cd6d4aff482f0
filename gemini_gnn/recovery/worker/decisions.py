"""What a worker agent does next. Pure: no sockets, no processes, no clock; ``now`` is an argument, in seconds.

The agent turns what it sees into events, :func:`decide` turns (state, event, now) into a new state and actions, and the
agent carries those out. The phases of a job on one machine:

    GATHERING   waits for the shim of every local rank and for the warm parent
    RUNNING     the trainers of `generation` run
    STOPPING    they were asked to stop, and are killed at the deadline
    CLOSING     they are being killed; when all are reaped the next generation begins, or the job ends with `outcome`
    ENDED       nothing lives any more

Why a trainer's exception waits before it is believed: when a trainer is killed, the others' collectives raise
("Connection closed by peer") and may be seen to exit first. A death by a signal within `settle_s` is the cause, and a
cause the job can go on from. An exception that only says that a peer is gone waits `cause_s`, for the peer's own. Of
several the job's first error is the earliest that is no such consequence: on one machine they share a clock. Once told, such an
error is the job's, though its trainer has up to `leave_s` to exit: a request to stop does not hide it, nor does a death
by a signal more than `settle_s` after it.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from gemini_gnn.observe.errors import first

MAX_WARM_DEATHS = 3  # in a row, without becoming ready in between
STOPPED = 75  # exit code of a trainer that left before its work was done because it was asked to (EX_TEMPFAIL)


class Phase(StrEnum):
    GATHERING = "gathering"
    RUNNING = "running"
    STOPPING = "stopping"
    CLOSING = "closing"
    ENDED = "ended"


@dataclass(frozen=True)
class Failure:
    """How one trainer failed.

    Attributes:
        rank: global trainer index; -1 for the agent itself.
        code: exit code the job ends with when this is its first error.
        time_s: on this machine's monotonic clock.
        summary: one line.
        text: what to show the user: the message of an error meant for users, else the traceback.
        consequence: it only says that another rank, or the way to it, is gone.
    """

    rank: int
    code: int
    time_s: float
    summary: str
    text: str
    consequence: bool = False


@dataclass(frozen=True)
class Outcome:
    """How the job ended on this machine.

    Attributes:
        kind: "done" | "stopped" | "failed" | "lost" (a trainer that cannot be reaped).
        code: exit code of the shims.
        keep: leave the snapshots in host memory, so that the same command goes on from there.
    """

    kind: str
    code: int
    reason: str
    keep: bool = True
    failure: Failure | None = None


@dataclass(frozen=True)
class Limits:
    """Deadlines and limits, in seconds.

    Attributes:
        gather_s: for every local shim to come after the first.
        start_s: for the warm parent's imports.
        stop_s: for trainers that were asked to stop; below the 30 s DeepSpeed's launcher gives its slot processes.
        reap_s: for killed trainers to be gone; after it they are stuck in the kernel. A driver that takes back gigabytes of
            page-locked memory needs seconds.
        leave_s: for a trainer that has told its error to be gone: it joins its threads and runs its exit handlers.
        settle_s, cause_s: see the module docstring.
        dump_s: for the trainers to write their stacks, before those of a hang are killed.
        max_restarts: at most so many within `restart_window_s`.
    """

    gather_s: float = 120.0
    start_s: float = 600.0
    stop_s: float = 15.0
    reap_s: float = 30.0
    leave_s: float = 30.0
    settle_s: float = 0.5
    cause_s: float = 3.0
    dump_s: float = 0.5
    max_restarts: int = 3
    restart_window_s: float = 3600.0


@dataclass(frozen=True)
class State:
    """
    Attributes:
        local, world: number of ranks on this machine and in the job.
        registered: ranks whose shims are here.
        generation: of the newest trainers; 0 before the first of a launch. Each death of an agent counts as one.
        alive: ranks whose trainer of `generation` is not reaped.
        listening: ranks whose trainer said that it looks for requests to stop.
        codes: exit code by rank of the reaped ones; negative for a signal.
        hung: which trainer hangs, in words, while the stacks are written; empty otherwise.
        cause: why the generation is being closed, for people.
        outcome: set once the job is to end; None while CLOSING means that the next generation begins.
    """

    local: int
    world: int
    limits: Limits = Limits()
    phase: Phase = Phase.GATHERING
    registered: frozenset[int] = frozenset()
    warm_ready: bool = False
    warm_deaths: int = 0  # in a row, without becoming ready in between
    generation: int = 0
    alive: frozenset[int] = frozenset()
    listening: frozenset[int] = frozenset()
    codes: tuple[tuple[int, int], ...] = ()
    failures: tuple[Failure, ...] = ()
    restarts: tuple[float, ...] = ()
    hung: str = ""
    cause: str = ""
    outcome: Outcome | None = None
    deadline: float | None = None


# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Registered:
    rank: int


@dataclass(frozen=True)
class WarmReady:
    pass


@dataclass(frozen=True)
class WarmDied:
    reason: str


@dataclass(frozen=True)
class WarmRefused:
    """It cannot import or must not fork; trying again would not help."""

    failure: Failure


@dataclass(frozen=True)
class Listens:
    rank: int


@dataclass(frozen=True)
class Failed:
    """A trainer's own record of its error; its exit follows."""

    failure: Failure


@dataclass(frozen=True)
class Exited:
    """Reaped: nothing of it runs any more. ``code`` is negative for a signal, ``why`` who sent it, where that is known."""

    rank: int
    code: int
    why: str = ""


@dataclass(frozen=True)
class Hung:
    """The trainers make no progress, and ``rank`` is the one that the others wait for; ``words`` say more."""

    rank: int
    words: str


@dataclass(frozen=True)
class StopAsked:
    """``force``: do not wait for the trainers to finish their step."""

    reason: str
    code: int
    keep: bool = True
    force: bool = False


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
class AskToStop:
    ranks: frozenset[int]


@dataclass(frozen=True)
class DumpStacks:
    """Have them written into the logs."""

    ranks: frozenset[int]


@dataclass(frozen=True)
class Kill:
    ranks: frozenset[int]


@dataclass(frozen=True)
class Say:
    text: str


@dataclass(frozen=True)
class Finish:
    outcome: Outcome


Event = Any  # one of the events above
Action = StartWarm | Fork | AskToStop | DumpStacks | Kill | Say | Finish
Step = tuple[State, list[Action]]


def decide(state: State, event: Event, now: float) -> Step:
    """The state after ``event`` at time ``now``, and what to do."""
    if state.phase is Phase.ENDED:
        return state, []
    match event:
        case Registered(rank):
            return _registered(state, rank, now)
        case WarmReady():
            return _begin(replace(state, warm_ready=True, warm_deaths=0))
        case WarmDied(reason):
            return _warm_died(state, reason, now)
        case WarmRefused(failure):
            return _close(state, Outcome("failed", failure.code, failure.summary, failure=failure), now)
        case Listens(rank):
            return replace(state, listening=state.listening | {rank}), []
        case Failed(failure):
            return _failed(state, failure, now)
        case Exited():
            return _exited(state, event, now)
        case Hung():
            return _hung(state, event, now)
        case StopAsked():
            return _stop(state, event, now)
        case Tick():
            return _tick(state, now) if state.deadline is not None and now >= state.deadline else (state, [])
    raise AssertionError(f"unknown event {event!r}")


def told_error(failures: tuple[Failure, ...]) -> Failure | None:
    """The first error that is no consequence of another's end."""
    failure = first(failures)
    return None if failure is None or failure.consequence else failure


def may_restart(state: State, now: float) -> str | None:
    """Why this machine must not start another generation by itself; None when it may."""
    if state.local != state.world:
        return "the job spans several machines"
    if state.limits.max_restarts == 0:
        return "max_restarts is 0"
    recent = [at for at in state.restarts if now - at < state.limits.restart_window_s]
    if len(recent) >= state.limits.max_restarts:
        minutes = state.limits.restart_window_s / 60
        return f"{len(recent)} restarts within {minutes:.0f} minutes are enough (max_restarts)"
    return None


def may_be_ending(state: State) -> bool:
    """Whether the job ends, or an error waits to be believed: who comes now from another start should ask again."""
    return state.outcome is not None or (state.phase is Phase.RUNNING and state.deadline is not None)


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def exit_name(code: int) -> str:
    return signal_name(-code) if code < 0 else f"exit code {code}"


def _registered(state: State, rank: int, now: float) -> Step:
    first, state = not state.registered, replace(state, registered=state.registered | {rank})
    if state.phase is Phase.GATHERING:
        if len(state.registered) == state.local:
            state = replace(state, deadline=now + state.limits.start_s)
        elif first:
            state = replace(state, deadline=now + state.limits.gather_s)
    return _begin(state)


def _begin(state: State) -> Step:
    """Start the next generation if all it needs is here."""
    if state.phase is not Phase.GATHERING or not state.warm_ready or len(state.registered) < state.local:
        return state, []
    assert not state.alive, "a generation began before the last one was reaped"
    generation = state.generation + 1
    state = replace(
        state,
        phase=Phase.RUNNING,
        generation=generation,
        alive=state.registered,
        listening=frozenset(),
        codes=(),
        failures=(),
        hung="",
        cause="",
        deadline=None,
    )
    return state, [Fork(generation, state.registered)]


def _failed(state: State, failure: Failure, now: float) -> Step:
    """Its exit is to follow; a thread that it waits for may never end."""
    state = replace(state, failures=(*state.failures, failure))
    if state.phase is Phase.RUNNING and state.deadline is None:
        state = replace(state, deadline=now + state.limits.leave_s)
    return state, []


def _hung(state: State, hung: Hung, now: float) -> Step:
    """Gone on from as from a kill, when the stacks are written; an exit that is awaited comes first."""
    if state.phase is not Phase.RUNNING or state.deadline is not None or hung.rank not in state.alive:
        return state, []
    return replace(state, hung=hung.words, deadline=now + state.limits.dump_s), [DumpStacks(state.alive)]


def _exited(state: State, exited: Exited, now: float) -> Step:
    rank, code = exited.rank, exited.code
    state = replace(state, alive=state.alive - {rank}, codes=(*state.codes, (rank, code)))
    if state.phase is Phase.CLOSING:
        return (state, []) if state.alive else _closed(state, now)
    if state.phase is Phase.STOPPING:
        return (state, []) if state.alive else _ended_by_itself(state, now)
    assert state.phase is Phase.RUNNING, f"rank {rank} exited in phase {state.phase}"
    if code < 0:
        how = f": {exited.why}" if exited.why else f" by {signal_name(-code)}"
        return _restart(state, f"the trainer of rank {rank} was killed{how}", 128 - code, now)
    if code > 0 and code != STOPPED and all(failure.rank != rank for failure in state.failures):
        summary = f"the trainer of rank {rank} ended with exit code {code}"
        state = replace(state, failures=(*state.failures, Failure(rank, code, now, summary, summary)))
    if not state.alive:
        return _ended_by_itself(state, now)
    if code != 0:
        caused = any(not failure.consequence for failure in state.failures)
        deadline = now + (state.limits.settle_s if caused else state.limits.cause_s)
        state = replace(state, deadline=deadline if state.deadline is None else min(deadline, state.deadline))
    return state, []


def _ended_by_itself(state: State, now: float) -> Step:
    """Every trainer is reaped and none had to be killed, unless by a signal of somebody else while STOPPING."""
    asked = state.outcome
    if all(code == 0 for _, code in state.codes):
        return _finish(state, Outcome("done", 0, "done", keep=False))
    if asked is not None:
        return _finish(state, asked)
    if not state.failures:
        return _finish(state, Outcome("stopped", STOPPED, "the trainers stopped by themselves"))
    return _erred(state, now)


def _erred(state: State, now: float) -> Step:
    """End with the first error, but not with one that only says that a peer is gone: such a death can be gone on from."""
    failure = first(state.failures)
    assert failure is not None
    if failure.consequence and may_restart(state, now) is None:
        return _restart(state, f"rank {failure.rank} lost a peer and no trainer says why", failure.code, now)
    return _close(state, Outcome("failed", failure.code, failure.summary, failure=failure), now)


def _restart(state: State, cause: str, code: int, now: float) -> Step:
    """Something died that the job can go on from: close this generation, and begin the next if allowed."""
    failure = told_error(state.failures)
    if failure is not None and now - failure.time_s > state.limits.settle_s:  # not caused by this death
        return _close(state, Outcome("failed", failure.code, failure.summary, failure=failure), now)
    reason = may_restart(state, now)
    if reason is not None:
        text = f"{cause}; not restarted here: {reason}"
        if cause.endswith("by SIGKILL"):
            text += "; if nobody killed it, memory was short: dmesg says so"
        return _close(state, Outcome("failed", code, text, failure=Failure(-1, code, now, text, text)), now)
    state = replace(state, restarts=(*state.restarts, now), cause=cause)
    text = f"{cause}; restarting all {state.local} trainers as generation {state.generation + 1}"
    state, actions = _close(state, None, now)
    return state, [Say(text), *actions]


def _close(state: State, outcome: Outcome | None, now: float) -> Step:
    """Kill what lives, then end with ``outcome``, or begin the next generation if it is None."""
    state = replace(state, phase=Phase.CLOSING, outcome=outcome, deadline=now + state.limits.reap_s)
    if state.alive:
        return state, [Kill(state.alive)]
    return _closed(state, now)


def _closed(state: State, now: float) -> Step:
    if state.outcome is not None:
        return _finish(state, state.outcome)
    state = replace(state, phase=Phase.GATHERING, deadline=now + state.limits.start_s)
    return _without_warm(state, now) if state.warm_deaths > MAX_WARM_DEATHS else _begin(state)


def _finish(state: State, outcome: Outcome) -> Step:
    return replace(state, phase=Phase.ENDED, outcome=outcome, deadline=None), [Finish(outcome)]


def _stop(state: State, asked: StopAsked, now: float) -> Step:
    outcome = Outcome("stopped", asked.code, asked.reason, keep=asked.keep)
    if (
        state.outcome is not None
    ):  # it is ending already: the first reason stays, but a later request may drop snapshots
        keep = state.outcome.keep and asked.keep
        state = replace(state, outcome=replace(state.outcome, keep=keep))
        if state.phase is Phase.STOPPING and asked.force:
            return _close(state, state.outcome, now)
        return state, []
    failure = told_error(state.failures) if state.phase is Phase.RUNNING else None  # else of the last generation
    if failure is not None:  # its exit would have ended the job
        return _close(state, Outcome("failed", failure.code, failure.summary, keep=asked.keep, failure=failure), now)
    if state.phase is Phase.RUNNING and state.alive <= state.listening and state.deadline is None and not asked.force:
        state = replace(state, phase=Phase.STOPPING, outcome=outcome, deadline=now + state.limits.stop_s)
        return state, [Say(f"{asked.reason}: ending after this step"), AskToStop(state.alive)]
    # A trainer that does not look for requests is lost nothing by a kill: its last step's snapshot is committed.
    return _close(state, outcome, now)


def _warm_died(state: State, reason: str, now: float) -> Step:
    """It harms no trainer: another one is needed before the next generation can begin."""
    state = replace(state, warm_ready=False, warm_deaths=state.warm_deaths + 1)
    if state.outcome is not None:
        return state, []
    if state.warm_deaths <= MAX_WARM_DEATHS:
        return state, [Say(f"the warm parent died ({reason}); starting another"), StartWarm()]
    return _without_warm(state, now) if state.phase is Phase.GATHERING else (state, [])


def _without_warm(state: State, now: float) -> Step:
    text = f"the warm parent died {state.warm_deaths} times before it was ready; see logs/agent-*.log"
    return _close(state, Outcome("failed", 1, text, failure=Failure(-1, 1, now, text, text)), now)


def _tick(state: State, now: float) -> Step:
    """The deadline has passed."""
    if state.phase is Phase.GATHERING:
        if len(state.registered) < state.local:
            text = (
                f"only {len(state.registered)} of {state.local} slot processes of this machine came within "
                f"{state.limits.gather_s:.0f} s; see the launcher's output for the others"
            )
        else:
            text = f"the imports of the warm parent took longer than {state.limits.start_s:.0f} s; see logs/agent-*.log"
        return _close(state, Outcome("failed", 1, text, failure=Failure(-1, 1, now, text, text)), now)
    if state.phase is Phase.RUNNING:
        if state.hung:
            return _restart(state, state.hung, 1, now)
        if not state.failures:  # one stopped by itself and the others go on: they will notice each other
            return replace(state, deadline=None), []
        return _erred(state, now)
    if state.phase is Phase.STOPPING:
        assert state.outcome is not None
        state, actions = _close(state, state.outcome, now)
        return state, [Say(f"killing the trainers: they did not stop within {state.limits.stop_s:.0f} s"), *actions]
    ranks = ", ".join(map(str, sorted(state.alive)))
    text = (
        f"the trainers of ranks {ranks} could not be reaped within {state.limits.reap_s:.0f} s after SIGKILL: stuck in the "
        "kernel (a dead file system or device?) or held by a debugger; this machine cannot go on, wait for them, or restart it"
    )
    return _finish(state, Outcome("lost", 1, text, failure=Failure(-1, 1, now, text, text)))
