"""Decides the next actions of a worker agent. Pure: no sockets, processes or clock; ``now`` is an argument, in seconds.

The agent turns what it sees into events, :func:`decide` turns (state, event, now) into a new state and actions, and the
agent carries those out. The phases of a job on one machine:

    GATHERING   waits for the shim of every local rank and for the warm parent
    RUNNING     the trainers of `generation` run
    STOPPING    the trainers were asked to stop; the agent kills them at the deadline
    CLOSING     the agent has killed the trainers; when all are reaped the next generation begins, or the job ends
    ENDED       no process is left

Why the agent does not believe a trainer's exception at once: if a trainer is killed, the others' collectives raise
("Connection closed by peer"), and the others may exit first. A death by a signal within `settle_s` is the cause, and the job
can resume after it. If an exception only says that a peer is gone, the agent waits `cause_s` for the peer's own exception.
The job's first error is the earliest exception that is no such consequence: on one machine they share a clock. It ends the
job, and its trainer has up to `leave_s` to exit. A later request to stop does not change that; nor does a death by a signal
more than `settle_s` later.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from gemini_gnn.observe.errors import first

MAX_WARM_DEATHS = 3  # in a row, without becoming ready in between
STOPPED = 75  # exit code of a trainer that stopped on request before its work was done (EX_TEMPFAIL)


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
        code: exit code of the job if this is its first error.
        time_s: on this machine's monotonic clock.
        summary: one line.
        text: for the user: the message of an error meant for users, otherwise the traceback.
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
        kind: "done" | "stopped" | "failed" | "lost" (a trainer cannot be reaped).
        code: exit code of the shims.
        keep: leave the snapshots in host memory, so that the same command resumes from them.
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
        gather_s: from the first local shim to the last.
        start_s: of the warm parent's imports.
        stop_s: from the request to stop to the exit; below the 30 s that DeepSpeed's launcher gives its slot processes.
        reap_s: from SIGKILL to the exit; later a trainer counts as stuck in the kernel. A driver needs seconds to take
            back gigabytes of page-locked memory.
        leave_s: from a trainer's error to its exit: it joins its threads and runs its exit handlers.
        settle_s, cause_s: see the module docstring.
        dump_s: from a hang to the kill, so that the trainers write their stacks.
        max_restarts: of all trainers within `restart_window_s`, at most.
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
        registered: ranks with a shim here.
        generation: of the newest trainers; 0 before the first of a launch. Each death of an agent counts as one.
        alive: ranks with a trainer of `generation` that is not reaped.
        listening: ranks with a trainer that reads requests to stop.
        codes: exit code by rank of the reaped ones; negative for a signal.
        hung: which trainer hangs, in words, while the stacks are written; empty otherwise.
        cause: why the generation is being closed, for people.
        outcome: set once the job is to end; if it is None while CLOSING, the next generation begins.
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
    """The warm parent cannot import or must not fork; another one could not either."""

    failure: Failure


@dataclass(frozen=True)
class Listens:
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
    """The first error, if it is no consequence of another trainer's end."""
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
    """Whether the job ends, or will end unless an error turns out to be a consequence. A new shim should ask again."""
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
    """Start the next generation if all shims and the warm parent are here."""
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
    """Wait for the exit, but not for ever: the trainer may hang in a thread that it joins."""
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
    """Every trainer is reaped, and the agent killed none. In STOPPING, another process may have killed one."""
    asked = state.outcome
    if all(code == 0 for _, code in state.codes):
        return _finish(state, Outcome("done", 0, "done", keep=False))
    if asked is not None:
        return _finish(state, asked)
    if not state.failures:
        return _finish(state, Outcome("stopped", STOPPED, "the trainers stopped by themselves"))
    return _erred(state, now)


def _erred(state: State, now: float) -> Step:
    """End with the first error. If it only says that a peer is gone, restart instead: the peer died without an error."""
    failure = first(state.failures)
    assert failure is not None
    if failure.consequence and may_restart(state, now) is None:
        return _restart(state, f"rank {failure.rank} lost a peer and no trainer says why", failure.code, now)
    return _close(state, Outcome("failed", failure.code, failure.summary, failure=failure), now)


def _restart(state: State, cause: str, code: int, now: float) -> Step:
    """A trainer was killed: close this generation, and begin the next if allowed."""
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
    """Kill living trainers, then end with ``outcome``, or begin the next generation if it is None."""
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
    if state.outcome is not None:  # ending already: the first reason stays, but a later request may drop snapshots
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
    # Killing a trainer that reads no requests loses nothing: the snapshot of its last step is committed.
    return _close(state, outcome, now)


def _warm_died(state: State, reason: str, now: float) -> Step:
    """Start another one: it is needed before the next generation, while the trainers run on."""
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
        if not state.failures:  # one trainer stopped by itself, the others run: they will notice
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
